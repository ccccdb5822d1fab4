"""A training whose pixels are worked on beside the model."""

from pathlib import Path

import pytest
from shared import load_module

from detr_accel import recipe as recipes
from detr_accel.train.loop import train

inject = load_module(Path(__file__).with_name("injecting.py"))
injected = load_module(Path(__file__).with_name("injected.py"))


def run(folder: Path, pixels: str, more: str, resume: bool = False) -> Path:
    text = injected.TINY.replace("workers: 0", f"workers: 1\n  pixels: {pixels}")
    text = text.replace("scales: [64]", "scales: [48, 64], crop_scales: [40], crop_size: [30, 40]")
    return train(recipes.loads(f"{text}name: {pixels}\n{more}"), runs=folder, resume=resume)


@pytest.mark.law2
def test_it_learns_the_same_and_goes_on_as_if_never_stopped(tmp_path):
    whole, workers = (run(tmp_path / "whole", where, injected.EPOCHS) for where in ("device", "workers"))
    assert inject.losses(whole) == pytest.approx(inject.losses(workers), rel=0.02)
    assert inject.losses(whole) != inject.losses(workers), "they are two ways"
    short = injected.EPOCHS.replace("epochs: 2", "epochs: 1")
    run(tmp_path / "cut", "device", short)
    cut = run(tmp_path / "cut", "device", injected.EPOCHS, resume=True)
    assert inject.differing(inject.weights(cut), inject.weights(whole)) == []
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
