"""A process that dies under the others: words and an alarm instead of a traceback, and a run that can go on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from shared import load_module

from detr_accel.train import lost

runs = load_module(Path(__file__).parents[1] / "integration" / "runs.py")

LONG = [a for a in runs.TINY if not a.startswith("schedule")] + ["schedule.steps=400", "checkpoint.every_steps=3"]


def start(folder: Path) -> subprocess.Popen:
    flags = ["--config_file", str(runs.ROOT / "accelerate_config.yaml"), "--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--main_process_port", "0"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.ROOT)}
    return subprocess.Popen(
        [*command, str(runs.ROOT / "train.py"), *LONG, "name=a"], cwd=folder, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def member(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    """The training process of a rank; loader workers inherit its environment, and are its children."""
    children = psutil.Process(launcher.pid).children()
    return next(p for p in children if p.environ().get("RANK") == str(rank))


def wait_for_windows(path: Path, number: int) -> None:
    until = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < number:
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.05)


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_process_is_told_by_the_one_that_is_left_and_the_run_can_go_on(tmp_path, rank):
    launcher = start(tmp_path)
    run = tmp_path / "runs" / "a"
    wait_for_windows(run / "metrics.jsonl", 5)
    victim = member(launcher, rank)
    victim.kill()
    said = launcher.communicate(timeout=90)[0]
    assert launcher.returncode != 0
    sentence = f"rank {rank} (process {victim.pid}) of 2 is gone"
    assert f"detr-accel: dead process: {sentence}" in said and "go on with --resume" in said
    ours = said.partition("detr-accel: dead process")[0]
    assert "Traceback" not in ours, ours[-3000:]
    (row,) = runs.rows(run / "alarms.jsonl")
    assert row["title"] == lost.TITLE and sentence in row["text"] and row["level"] == "ERROR"
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and sentence in status["reason"]
    if rank == 1:
        more = ["--resume", f"schedule.steps={row['window'] + 1}"]
        again = [a for a in LONG if not a.startswith("schedule")]
        done = runs.launch(tmp_path, *again, "name=a", *more, processes=2)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_which_errors_are_a_lost_connection():
    gloo = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242")
    assert lost.is_lost_connection(gloo)
    assert not lost.is_lost_connection(RuntimeError("CUDA error: device-side assert triggered"))
    assert not lost.is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
