import subprocess
import sys

from detr_accel.monitor import memory

# A process of its own: what earlier tests have allocated and freed would hide an allocation here.
CHILD = """
import numpy as np
from detr_accel.monitor import memory
before = memory.peak_gib()
block = np.ones(2**28, dtype=np.uint8)
peak = memory.peak_gib()
del block
print(before, peak, memory.peak_gib())
"""


def test_peak_follows_an_allocation_and_stays_after_it():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    before, peak, after = map(float, done.stdout.split())
    assert 0.2 < peak - before < 0.35  # a quarter GiB
    assert after > peak - 0.01  # the kernel counts pages in batches per thread
    assert memory.reserved_gib("cpu") is None
