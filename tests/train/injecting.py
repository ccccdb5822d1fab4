"""Launches injected.py and compares what its runs ended with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("injected.py")
ROOT = Path(__file__).parents[2]


def launch(folder: Path, processes: int, scenarios: list[dict]) -> Path:
    """All scenarios in one launch; returns the folder of their runs."""
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    many = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--num_processes", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *many, "--main_process_port", "0"]
    config = ["--config_file", str(ROOT / "accelerate_config.yaml"), "--mixed_precision", "no"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*command, *config, str(SCRIPT), str(folder), str(folder / "scenarios.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def weights(run: Path, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    """Weights, running statistics, averages and optimizer state of a run's checkpoint."""
    found = {}
    for name in ("raw", "model", "optimizer"):
        for key, value in load_file(run / "checkpoints" / checkpoint / f"{name}.safetensors").items():
            found[f"{name}/{key}"] = value
    return found


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bits differ."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def rows(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def losses(run: Path) -> list[float | None]:
    return [row["train/loss"] for row in rows(run) if "train/loss" in row]


def outcome(folder: Path, name: str, rank: int = 0) -> str | None:
    return json.loads((folder / f"outcome-{name}-{rank}.json").read_text())
