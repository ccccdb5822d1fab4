"""Launches injected.py and compares what its runs ended with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("injected.py")
ROOT = Path(__file__).parents[2]


LAUNCHES = [1, 2, pytest.param("gpu", marks=pytest.mark.gpu)]  # CPU processes, or one process on a GPU
ON_GPU = ["device=auto", "deterministic=true"]  # as --set would; without the second, no two trainings are equal


def launch(folder: Path, processes: int | str, scenarios: list[dict]) -> Path:
    """All scenarios in one launch, of ``LAUNCHES``; returns the folder of their runs."""
    on_gpu, processes = processes == "gpu", count(processes)
    if on_gpu:
        scenarios = [row | {"set": [*row.get("set", []), *ON_GPU]} for row in scenarios]
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if on_gpu else {"ACCELERATE_USE_CPU": "true"}
    program = [str(SCRIPT), str(folder), str(folder / "scenarios.json")]
    done = warm.run(program, env=env, processes=processes if processes > 1 else 0, timeout=290)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def count(launch: int | str) -> int:
    """Of its processes."""
    return 1 if launch == "gpu" else launch


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
