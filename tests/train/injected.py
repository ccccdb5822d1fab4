"""Small trainings with faults put into them, one after the other on this launch's processes.

Usage: accelerate launch ... injected.py FOLDER SCENARIOS.json; every scenario is {"name", "faults", "recipe"}, every
fault {"what", "window" (from 0), "rank", "micro" (index of the micro-batch), "value", "times"}. What a run ended with
is in FOLDER/NAME/checkpoints, and in FOLDER/outcome-NAME.json where it was refused.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.structures import Batch, UserError
from detr_accel.train import commit, launch, loop, validation, window

# live BatchNorm, so that running statistics are at stake too
TINY = """
data:
  format: shapes
  workers: 0
  shapes: {num_train: 22, num_val: 3, image_size: 64}
  augment: {scales: [64]}
  eval_size: 64
model:
  backbone: {name: test_resnet, weights: none}
  hidden_dim: 32
  num_heads: 4
  num_encoder_layers: 1
  num_decoder_layers: 2
  dim_feedforward: 32
  num_queries: 10
batch: {size: 8, micro: 2}
ema: {enabled: true}
log:
  every: 1
  wandb: {enabled: false}
device: cpu
precision: "no"
"""
# as --set would make RT-DETR of it
RTDETR = [
    "model.name=rtdetr", "model.backbone.name=test_efficientnet", "model.hidden_dim=16", "model.dim_feedforward=16",
    "model.rtdetr.encoder_dim=16", "model.rtdetr.encoder_feedforward=16", "model.rtdetr.num_blocks=1",
    "model.rtdetr.expansion=0.5", "model.rtdetr.num_denoising=12",
]  # fmt: skip
EPOCHS = "schedule: {epochs: 2, kind: constant}\n"
RANK = int(os.environ.get("RANK", "0"))


class Faults:
    """The faults of the scenario in hand, each as often as it is due."""

    def __init__(self) -> None:
        self.left: list[dict] = []

    def due(self, at: int, micro: int | None = None, *kinds: str) -> dict | None:
        for fault in self.left:
            here = fault["window"] == at and fault.get("rank", 0) in (RANK, "all") and fault["what"] in kinds
            if here and micro in (None, fault.get("micro", 0)) and fault.get("times", 1) > 0:
                fault["times"] = fault.get("times", 1) - 1
                return fault
        return None


faults = Faults()
_plain_micro_batch = window.WindowRunner._micro_batch
_plain_commit = commit.Commit.__call__
_plain_detections = models.detections
_plain_turn = loop._Turn.run
_plain_validate, _plain_scores = validation.Validation.__call__, validation.Validation._metrics


def parameter(runner: window.WindowRunner) -> torch.nn.Parameter:
    bare = runner.accelerator.unwrap_model(runner.model)
    return (bare.transformer.decoder if hasattr(bare, "transformer") else bare.decoder).layers[0].linear1.weight


def micro_batch(self, batch: Batch, counts, share, scale: int) -> None:
    number = len(share.totals)
    fault = faults.due(
        batch.window, number, "image", "weight", "lasting weight", "loss", "gradient", "oom forward", "oom backward",
        "label", "error", "denoising",
    )  # fmt: skip
    if fault is None:
        return _plain_micro_batch(self, batch, counts, share, scale)
    value, weight, undo = float(fault.get("value", "nan")), parameter(self), []
    if fault["what"] == "oom forward":
        raise torch.OutOfMemoryError("injected")
    if fault["what"] == "error":
        raise ZeroDivisionError("injected")
    if fault["what"] == "image":
        # on a GPU a batch is recipes for images until it is there
        batch = batch.part(0, len(batch)) if hasattr(batch, "images") else batch.to(self.accelerator.device)
        batch.images = batch.images.clone()
        batch.images[0, 1, 5, 5] = value
    if fault["what"] in ("weight", "lasting weight"):
        kept = weight[0, 0].item()
        with torch.no_grad():
            weight[0, 0] = value
        if fault["what"] == "weight":
            undo.append(lambda: weight.data.view(-1)[0].fill_(kept))
    if fault["what"] == "denoising":
        plain = self.criterion.disturb

        def spoiled(*args):
            queries = plain(*args)
            queries.boxes_cxcywh[0, 0, 0] = value
            return queries

        self.criterion.disturb = spoiled
        undo.append(lambda: delattr(self.criterion, "disturb"))
    if fault["what"] in ("gradient", "oom backward"):

        def hook(grad: torch.Tensor) -> torch.Tensor:
            if fault["what"] == "gradient":
                return grad * value
            raise torch.OutOfMemoryError("injected")

        undo.append(weight.register_hook(hook).remove)
    if fault["what"] == "loss":
        undo.append(
            self.criterion.register_forward_hook(lambda m, a, out: replace(out, total=out.total * value)).remove
        )
    try:
        return _plain_micro_batch(self, batch, counts, share, scale)
    finally:
        for action in undo:
            action()


def commit_or_not(self, state, result, micro_batches) -> bool:
    at = state.window - 1
    if faults.due(at, None, "never seen"):  # the reference: what a run without this window does
        self.parts.runner.discard()
        return False
    if faults.due(at, None, "oom step"):
        step = self.parts.prepared.step

        def half() -> None:
            step()
            with torch.no_grad():
                parameter(self.parts.runner).mul_(3)
            raise torch.OutOfMemoryError("injected")

        self.parts.prepared.step = half
        try:
            return _plain_commit(self, state, result, micro_batches)
        finally:
            self.parts.prepared.step = step
    return _plain_commit(self, state, result, micro_batches)


def turn(self, micro_batches, failure):
    fault = faults.due(self.state.window, None, "smaller")  # the reference: a run that switches without need
    if fault:
        self.state.micro = fault["to"]
    fault = faults.due(self.state.window, None, "loader")
    return _plain_turn(self, micro_batches, "image x.jpg cannot be decoded: injected" if fault else failure)


def detections(*args):
    fault = faults.due(-1, None, "evaluation", "evaluation oom")
    if fault is not None:
        raise torch.OutOfMemoryError("injected") if "oom" in fault["what"] else RuntimeError("injected")
    return _plain_detections(*args)


def scored(values: dict[int, float]) -> dict[str, object]:
    """Methods of Validation that find a made-up AP at a window, for detectors too small to have any."""
    def call(self, state, stop):
        self.made_up = values.get(state.window)
        return _plain_validate(self, state, stop)

    def metrics(self, model, stop):
        found = _plain_scores(self, model, stop)
        if found is not None and self.made_up is not None:
            found[0].values["AP"] = self.made_up
        return found

    return {"__call__": call, "_metrics": metrics}


def main() -> None:
    validation.models.detections = detections
    window.WindowRunner._micro_batch, commit.Commit.__call__, loop._Turn.run = micro_batch, commit_or_not, turn
    folder = Path(sys.argv[1])
    for scenario in json.loads(Path(sys.argv[2]).read_text()):
        made_up = {int(window): value for window, value in scenario.get("scores", {}).items()}
        for name, method in scored(made_up).items():
            setattr(validation.Validation, name, method)
        faults.left = scenario["faults"]
        more = scenario.get("recipe", "")
        text = TINY + EPOCHS * ("schedule" not in more) + f"name: {scenario['name']}\n" + more
        file = folder / f"recipe-{scenario['name']}-{RANK}.yaml"
        file.write_text(text)
        recipe = recipes.load(file, scenario.get("set", ()))
        said = None
        try:
            loop.train(recipe, runs=folder, resume=scenario.get("resume", False))
        except (UserError, RuntimeError) as error:
            said = str(error)
        (folder / f"outcome-{scenario['name']}-{RANK}.json").write_text(json.dumps(said))
    launch.leave()


if __name__ == "__main__":
    main()
