"""Law 2, by killing: SIGKILL at any moment, again and again, and the run that comes out is the one never disturbed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from shared import load_module

runs = load_module(Path(__file__).with_name("runs.py"))

KILLS = int(os.environ.get("SOAK_KILLS", "25"))  # for each number of processes
LONG = [a for a in runs.TINY if not a.startswith(("schedule", "data.shapes.num_train"))] + [
    "data.shapes.num_train=60", "schedule.epochs=16", "checkpoint.every_steps=3", "checkpoint.keep=2",
]  # fmt: skip
FILES = ("model", "raw", "optimizer")


def start(folder: Path, processes: int) -> subprocess.Popen:
    config = ["--config_file", str(runs.ROOT / "accelerate_config.yaml"), "--num_processes", str(processes)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, "--main_process_port", "0"]
    env = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.ROOT),
        "WANDB_MODE": "offline", "HF_HOME": str(folder / "hf"),
    }  # fmt: skip
    return subprocess.Popen(
        [*command, str(runs.ROOT / "train.py"), *LONG, "name=a", "--resume", "auto"], cwd=folder, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def moment(run: Path, kind: str, rng: random.Random, process: subprocess.Popen) -> None:
    """Wait for the moment to kill: after some seconds, in the middle of a checkpoint, or of an evaluation."""
    begun, limit = time.monotonic(), rng.uniform(6, 22)
    while process.poll() is None and time.monotonic() - begun < (limit if kind == "any" else 40):
        if kind == "checkpoint" and time.monotonic() - begun > 5 and list(run.glob("checkpoints/.window-*.tmp")):
            return
        if kind == "evaluation" and time.monotonic() - begun > 5 and evaluating(run):
            return
        time.sleep(0.002)


def evaluating(run: Path) -> bool:
    path = run / "metrics.jsonl"
    if not path.exists():
        return False
    lines = path.read_text().splitlines()
    return bool(lines) and '"train/loss"' in lines[-1] and json.loads(lines[-1])["window"] % 8 == 0


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The launcher's children, training processes and loader workers; they have sessions of their own."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def clear(members: list[psutil.Process]) -> None:
    """SIGKILL to all, and wait until they are gone."""
    for member in members:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(members, timeout=20)


@pytest.mark.slow
@pytest.mark.law2
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_again_and_again_is_the_run_never_killed(tmp_path, processes):
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    first = start(undisturbed, processes)
    said = first.communicate(timeout=280)[0]
    assert first.returncode == 0, said[-3000:]

    rng = random.Random(processes)
    run, kills, locked_out, tally = tmp_path / "runs" / "a", 0, 0, {}
    while kills < KILLS:
        process = start(tmp_path, processes)
        kind = rng.choice(["any", "checkpoint", "evaluation"])
        moment(run, kind, rng, process)
        if process.poll() is not None:
            said = process.communicate()[0]
            assert process.returncode == 0, said[-3000:]
            done = json.loads((run / "status.json").read_text())["state"] == "done"
            assert done
            compare(undisturbed / "runs" / "a", run)
            for path in sorted(run.rglob("*"), reverse=True):  # begin anew: there are kills left
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            continue
        members = family(process)
        process.kill()
        process.wait()
        kills += 1
        tally[kind] = tally.get(kind, 0) + 1
        if rng.random() < 0.2:  # the launcher alone is gone: its orphan must keep a new start out, or have ended
            second = start(tmp_path, processes)
            said = second.communicate(timeout=200)[0]
            if "is being written by process" in said:
                locked_out += 1
            else:
                assert second.returncode == 0, said[-3000:]
        clear(members)
    last = start(tmp_path, processes)
    said = last.communicate(timeout=280)[0]
    assert last.returncode == 0, said[-3000:]
    compare(undisturbed / "runs" / "a", run)
    print(f"{kills} kills ({tally}), {locked_out} times an orphan kept the run and the new start was refused")


def compare(undisturbed: Path, run: Path) -> None:
    for name in FILES:
        one, other = (load_file(r / "checkpoints" / "last" / f"{name}.safetensors") for r in (undisturbed, run))
        assert [k for k in one if not torch.equal(one[k], other[k])] == [], name
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
