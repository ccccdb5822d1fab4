"""What may differ between a checkpoint's recipe and the one it is resumed with."""

from __future__ import annotations

import json
from typing import Any

from detr_accel.recipe import Recipe
from detr_accel.structures import UserError

SAFE, BRANCHING, FORBIDDEN = "safe", "branching", "forbidden"

# the longest matching prefix decides; every key of a recipe has one (a test walks through them)
RULES = {
    "name": SAFE,  # a branch has another
    "seed": FORBIDDEN,  # the sample order would not go on where it stopped
    "deterministic": SAFE,
    "precision": BRANCHING,
    "device": SAFE,
    "data": BRANCHING,  # root and files: the data's fingerprint decides whether they are the same
    "data.format": FORBIDDEN,
    "data.root": SAFE,
    "data.train_images": SAFE,
    "data.train_annotations": SAFE,
    "data.val_images": SAFE,
    "data.val_annotations": SAFE,
    "data.group_by_shape": FORBIDDEN,  # another sample order
    "data.val_fraction": FORBIDDEN,  # the split is saved with the run
    "data.on_bad": SAFE,  # what it leaves out is in the data's fingerprint
    "data.hub": FORBIDDEN,  # what a box or a class is, and the order of a stream
    "data.hub.name": SAFE,  # as data.root: the fingerprint decides
    "data.hub.config": SAFE,
    "data.hub.revision": SAFE,
    "data.workers": SAFE,
    "data.prefetch": SAFE,
    "data.queue_gib": SAFE,
    "data.cache": SAFE,
    "data.cache_folder": SAFE,
    "data.pixels": SAFE,  # the same pictures to one of 255 steps
    "data.shapes": FORBIDDEN,
    "model": FORBIDDEN,
    "model.dropout": BRANCHING,
    "model.num_queries": BRANCHING,  # picked out of the image; where they are weights, see ``check``
    "model.rtdetr.num_denoising": BRANCHING,  # 0 and more differ in their weights, which the weights' names tell
    "model.rtdetr.label_noise": BRANCHING,
    "model.rtdetr.box_noise": BRANCHING,
    "model.rtdetr.mirror_boxes": BRANCHING,
    "model.rtdetr.look_twice": BRANCHING,
    "model.init_from": SAFE,  # where the run began; a resume does not begin again
    "model.init_head": SAFE,
    "model.backbone.weights": SAFE,
    "model.backbone.frozen_stages": BRANCHING,
    "model.backbone.fold_norm": SAFE,
    "model.activation_checkpointing": SAFE,
    "loss": BRANCHING,
    "batch.size": FORBIDDEN,  # the place in the epoch would move
    "batch.micro": SAFE,
    "batch.memory_fraction": SAFE,
    "optim": BRANCHING,
    "schedule": BRANCHING,
    "schedule.epochs": SAFE,  # a longer run; the learning rate before and after is said
    "schedule.steps": SAFE,
    "ema": BRANCHING,
    "ema.enabled": FORBIDDEN,  # the checkpoint holds another set of weights
    "early_stop": SAFE,
    "evaluate": SAFE,
    "evaluate.metric": BRANCHING,  # "best so far" would compare two metrics
    "checkpoint": SAFE,
    "health": SAFE,
    "alarms": SAFE,
    "log": SAFE,
    "dist": SAFE,
}
_WHY = {
    "model": "the weights in the checkpoint belong to the model as it was",
    "batch.size": "the learning rate belongs to it and the place in the epoch would move",
    "seed": "the sample order would not go on where it stopped",
    "ema.enabled": "the checkpoint holds weights with and without average accordingly",
}


def rule(key: str) -> str:
    """SAFE, BRANCHING or FORBIDDEN, for a dotted key."""
    return RULES[_matching(key, RULES)]


def _matching(key: str, table: dict[str, str]) -> str:
    parts = key.split(".")
    return next(p for p in (".".join(parts[:n]) for n in range(len(parts), 0, -1)) if p in table)


def differences(before: Recipe, after: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> value before and after, for every key that differs."""
    old, new = (_flat(json.loads(r.model_dump_json())) for r in (before, after))
    return {key: (old.get(key), new[key]) for key in new if old.get(key) != new[key]}


def check(before: Recipe, after: Recipe, *, branch: bool, run: str) -> list[str]:
    """What to say about the changes between a checkpoint's recipe and the one that goes on from it.

    Args:
        branch: whether a new run is made of the checkpoint, which may train differently.
        run: the name of the run that the checkpoint belongs to, for the remedy.
    Raises:
        UserError: one line for each change that may not be.
    """
    notes, refused = [], []
    for key, (old, new) in differences(before, after).items():
        if key == "schedule.fall" and "flat_cosine" not in (before.schedule.kind, after.schedule.kind):
            continue  # nothing reads it, and its default was another once
        change = f"{key}: {_show(old)} -> {_show(new)}"
        kind = FORBIDDEN if key == "model.num_queries" and _queries_are_weights(before) else rule(key)
        if kind == FORBIDDEN:
            why = next(
                (w for k, w in _WHY.items() if key == k or key.startswith(k + ".")), "it would be another training"
            )
            refused.append(
                f"{change} cannot change on a resume: {why}; put it back, or start anew with model.init_from={run}"
            )
        elif kind == BRANCHING and not branch:
            refused.append(
                f"{change} would train differently from how this run began: put it back to resume, or branch off with "
                f"--branch {run} name=NEW"
            )
        elif key != "name":
            notes.append(f"changed since the checkpoint: {change}")
    if refused:
        raise UserError("\n".join(refused))
    return notes


def _queries_are_weights(recipe: Recipe) -> bool:
    return recipe.model.name == "detr" or recipe.model.rtdetr.learned_queries


def lr_note(step: int, before: Any, after: Any, base_lr: float) -> list[str]:
    """The learning rate of the next step under the schedule before and after, where they differ.

    Args:
        before, after: functions from a step to the factor on base_lr.
    """
    old, new = (base_lr * factor(step) for factor in (before, after))
    return [f"learning rate at step {step}: {old:.3g} before the change, {new:.3g} after it"] if old != new else []


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
