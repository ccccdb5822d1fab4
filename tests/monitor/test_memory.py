import numpy as np
import psutil

from detr_accel.monitor import memory


def test_peak_follows_an_allocation_and_stays_after_it():
    before, now = memory.peak_gib(), psutil.Process().memory_info().rss / 2**30
    assert before >= 0.95 * now
    more = before - now + 0.125  # enough to pass the old peak by 1/8 GiB
    block = np.ones(int(more * 2**30), dtype=np.uint8)
    peak = memory.peak_gib()
    del block
    assert before + 0.1 < peak < before + 0.2
    assert memory.peak_gib() >= peak
    assert memory.reserved_gib("cpu") is None
