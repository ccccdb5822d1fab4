import json
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


PHASES = """
import json, numpy as np, torch
from detr_accel.monitor import memory
phases = memory.Phases(torch.device("cpu"))
def hold(mib):
    block = np.ones(mib * 2**20, dtype=np.uint8)
    del block
for forward, backward in ((256, 32), (32, 128)):  # two micro-batches
    phases.begin("forward"); hold(forward)
    phases.begin("backward"); hold(backward)
phases.begin(None); hold(400)  # nobody's
phases.begin("optimizer")
first, highest = phases.take(), memory.peak_gib()
phases.watch(False)
phases.begin("forward"); hold(64)
print(json.dumps([first, highest, phases.take()]))
"""


def test_phases_know_their_own_peak_over_all_micro_batches():
    done = subprocess.run([sys.executable, "-c", PHASES], capture_output=True, text=True, check=True)
    first, highest, unwatched = json.loads(done.stdout)
    forward, backward, optimizer = (first[f"{phase}_gib"] for phase in ("forward", "backward", "optimizer"))
    assert 0.2 < forward - optimizer < 0.3 and 0.1 < backward - optimizer < 0.15
    assert highest - optimizer > 0.35, "the peak of the process is not forgotten with a phase's"
    assert unwatched == {}
