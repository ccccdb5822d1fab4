import json
import subprocess
import sys

import pytest

from detr_accel.structures import UserError
from detr_accel.train.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from detr_accel.train.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_and_told_who_holds_it_until_it_dies(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip() == "held"
    try:
        with pytest.raises(UserError, match=f"process {holder.pid}"):
            RunFolder(tmp_path / "run").acquire()
    finally:
        holder.kill()
        holder.wait()
    run = RunFolder(tmp_path / "run")
    run.acquire()  # the kernel gave the dead process's lock back
    run.release()


def test_status_is_whole_and_says_its_state(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.acquire()
    run.status("failed", reason="disk full")
    row = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (row["state"], row["reason"]) == ("failed", "disk full")
    run.release()
