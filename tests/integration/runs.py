"""Helpers that start real runs the way a person does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import warm
from PIL import Image

from detr_accel.data.shapes import ShapesSource

ROOT = Path(__file__).parents[2]
# a detector small enough to train a few windows in seconds
TINY = [
    "data.shapes.num_train=22", "data.shapes.num_val=7", "data.shapes.image_size=64", "data.augment.scales=[64]",
    "data.eval_size=64", "data.workers=1", "model.backbone.name=test_resnet",
    "model.hidden_dim=32", "model.num_heads=4",
    "model.num_encoder_layers=1", "model.num_decoder_layers=2", "model.dim_feedforward=32", "model.num_queries=10",
    "batch.size=8", "batch.micro=4", "schedule.epochs=2", "log.every=1", "evaluate.every_epochs=1",
    "checkpoint.every_epochs=1", "evaluate.batch=2", "ema.enabled=true",
    "log.wandb.enabled=false",
]  # fmt: skip


def coco_folder(
    folder: Path, num_train: int = 9, num_val: int = 4, name: str = "{number}.jpg", empty_fraction: float = 0.05
) -> None:
    """A small COCO folder of shapes, written as files called ``name``."""
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", num_train), ("val", num_val)):
        source = ShapesSource(1, split, count, 64, empty_fraction=empty_fraction)
        truth = source.ground_truth()
        (folder / split).mkdir()
        for number, record in enumerate(truth["images"]):
            record["file_name"] = name.format(split=split, number=number)
            Image.fromarray(source.sample(number).image).save(folder / split / record["file_name"])
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))


REAL = ["--config_file", str(ROOT / "accelerate_config.yaml"), "--num_processes"]


def launch(folder: Path, *arguments: str, processes: int = 1, launcher: list[str] | None = None, timeout: int = 280):
    """``train.py`` in ``folder``; returns the finished process.

    With the flags of a ``launcher`` it is a real ``accelerate launch``: ``[*REAL, "1"]`` as the README writes it.
    Without, the same processes are started from a warm one (tests/warm.py), which takes a tenth of the time.
    """
    env = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline", "HF_HOME": str(folder / "hf"),
    }  # fmt: skip
    program = [str(ROOT / "train.py"), *arguments]
    if launcher is None:
        return warm.run(program, env=env, cwd=folder, processes=processes if processes > 1 else 0, timeout=timeout)
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", "0"]
    return _to_its_end([*command, *program], folder, env | {"PYTHONFAULTHANDLER": "1"}, timeout)


def _to_its_end(command: list[str], folder: Path, env: dict, timeout: int) -> subprocess.CompletedProcess:
    """``subprocess.run``, but one that lasts too long shows where each of its processes stands."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=env, text=True, **pipes) as process:
        try:
            said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.send_signal(signal.SIGABRT)  # Python's fault handler prints the stacks
            said = process.communicate()
            raise AssertionError(f"not at its end after {timeout} s:\n{said[0][-3000:]}\n{said[1][-9000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, *said)


def launch_script(script: Path, processes: int, *arguments: str, timeout: int = 280):
    """A test's own script on so many processes of the CPU; returns the finished process."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = processes if processes > 1 else 0
    return warm.run([str(script), *arguments], env=env, processes=processes, timeout=timeout)


def verb(folder: Path, *arguments: str, timeout: int = 280):
    """``detr-accel VERB ...``; returns the finished process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return warm.run(["-m", "detr_accel.cli", *arguments], env=env, cwd=folder, timeout=timeout)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
