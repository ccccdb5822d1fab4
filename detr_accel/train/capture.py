"""Windows that were not finite, kept for ``detr-accel replay``.

captures/window-00000050/
    capture.json           where in the run, which images, losses, gradient norms, seeds
    rank0-000.safetensors  one micro-batch as it reached the model
    model.safetensors      the weights it met; recipe.yaml and classes.json beside it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from detr_accel import data, models
from detr_accel import recipe as recipes
from detr_accel.structures import Batch, Targets, UserError
from detr_accel.train.agree import on_main
from detr_accel.train.parts import Parts
from detr_accel.train.window import WindowResult

CAPTURE = "capture.json"


class Captures:
    """Writes captures, a few of them and no more than they may take.

    Args:
        folder: runs/NAME/captures.
    """

    def __init__(self, parts: Parts, folder: Path) -> None:
        self.parts, self.folder = parts, folder

    def save(self, state, result: WindowResult, micro_batches: list[Batch]) -> Path | None:
        """Keep a window, every process its own part. A disk that is full, or enough captures already, is no error.

        Args:
            state: of the run; its weights are those that the window met.
            micro_batches: this process's, as they were loaded; they are kept as they reached the model.
        Returns:
            the folder, None where nothing was kept; the same on every process.
        """
        accelerator = self.parts.accelerator
        folder = self.folder / f"window-{state.window:08d}"
        temporary = folder.with_name(f".{folder.name}.tmp")
        weights = sum(t.numel() * t.element_size() for t in self.parts.bare.state_dict().values())
        room = on_main(accelerator, lambda: self._room(temporary, weights))
        if room is None:
            return None
        suspects = self._suspects(result, micro_batches)
        try:
            rows = _write_batches(
                temporary, accelerator.process_index, accelerator.device, suspects, room / accelerator.num_processes,
                result.canvas_px,
            )  # fmt: skip
        except (OSError, SafetensorError):
            rows = []
        rows = [self._named(row) for row in rows]
        rows = gather_object(rows)
        done = on_main(accelerator, lambda: self._finish(temporary, folder, state, result, rows))
        return folder if done else None

    def _room(self, temporary: Path, weights: int) -> float | None:
        """Bytes left for pixels; None where no capture may be made."""
        health = self.parts.recipe.health
        there = list(self.folder.glob("window-*"))
        used = sum(f.stat().st_size for c in there for f in c.iterdir())
        room = health.capture_gib * 2**30 - used - weights
        if len(there) >= health.captures or room <= 0:
            return None
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            room = min(room, shutil.disk_usage(temporary).free - 2 * weights)  # a checkpoint goes first
        except OSError:
            return None
        return room if room > 0 else None

    def _suspects(self, result: WindowResult, micro_batches: list[Batch]) -> list[Batch]:
        """The micro-batches whose own loss is not finite, on any process; all of them where the loss tells nothing."""
        finite = [bool(torch.isfinite(total)) for total in result.totals]
        guilty = [b for b, ok in zip(micro_batches, finite, strict=True) if not ok]
        return guilty if any(gather_object([bool(guilty)])) else micro_batches

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        names = names_of(self.parts.splits.train, row["image_ids"])
        return row | {"names": [names[i] for i in row["image_ids"]]}

    def _finish(self, temporary: Path, folder: Path, state, result: WindowResult, rows: list[dict]) -> bool:
        recipe, accelerator = self.parts.recipe, self.parts.accelerator
        about = {
            "window": state.window, "step": state.step, "seed": recipe.seed, "precision": accelerator.mixed_precision,
            "device": accelerator.device.type, "processes": accelerator.num_processes, "losses": result.losses,
            "grad_norm": result.grad_norm, "grad_norms": result.grad_norms, "bad_images": result.bad_images,
            "num_images": result.num_images, "num_boxes": result.num_boxes, "most_boxes": result.most_boxes,
            "micro_batches": rows,
        }  # fmt: skip
        try:
            models.weights.save(
                temporary, self.parts.bare, recipes.dumps(recipe), self.parts.classes, {"weights": "raw"}
            )
            (temporary / CAPTURE).write_text(json.dumps(_plain(about), indent=1), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except (OSError, SafetensorError):
            shutil.rmtree(temporary, ignore_errors=True)
            return False
        return True


def names_of(source: data.Source, image_ids: Sequence[int]) -> dict[int, str]:
    """Image id -> name, in the order of the source, which is only looked through where there is anything to find."""
    if isinstance(source, data.StreamSource):
        return source.names_of(image_ids)
    wanted = set(image_ids)
    indices = range(len(source)) if wanted else ()
    return {source.image_id(i): source.name(i) for i in indices if source.image_id(i) in wanted}


def _write_batches(
    folder: Path, rank: int, device: torch.device, batches: list[Batch], room: float,
    canvas_px: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Each micro-batch to a file of its own, as long as there is room; the rows that describe them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, batch in enumerate(batches):
        batch = batch.to(device)  # a planned one has no pixels before
        if canvas_px is not None:
            batch = batch.padded(canvas_px)
        size = batch.images.numel() * batch.images.element_size() + batch.mask.numel()
        row = {
            "file": f"rank{rank}-{number:03d}.safetensors" if size <= room else None, "rank": rank,
            "epoch": batch.epoch, "positions": list(batch.positions), "image_ids": [t.image_id for t in batch.targets],
        }  # fmt: skip
        if row["file"]:
            save_file(_tensors(batch), folder / row["file"])
            room -= size
        rows.append(row)
    return rows


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    targets = batch.targets
    sizes = [(*t.size_px, *t.orig_size_px) for t in targets]
    return {
        "images": batch.images.cpu().contiguous(),
        "mask": batch.mask.cpu().contiguous(),
        "labels": torch.cat([t.labels.cpu() for t in targets]),
        "boxes_cxcywh": torch.cat([t.boxes_cxcywh.cpu() for t in targets]),
        "num_boxes": torch.tensor([len(t.labels) for t in targets]),
        "sizes_px": torch.tensor(sizes).reshape(-1, 4),
    }


def read_batch(folder: Path, row: dict[str, Any]) -> Batch:
    """A micro-batch as it was kept.

    Raises:
        UserError: the file is gone or damaged.
    """
    path = folder / row["file"]
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the capture again") from None
    ends = tensors["num_boxes"].cumsum(0).tolist()
    targets = []
    for i, (image_id, end) in enumerate(zip(row["image_ids"], ends, strict=True)):
        cut = slice(end - int(tensors["num_boxes"][i]), end)
        h, w, orig_h, orig_w = tensors["sizes_px"][i].tolist()
        targets.append(
            Targets(image_id, tensors["labels"][cut], tensors["boxes_cxcywh"][cut], (h, w), (orig_h, orig_w))
        )
    return Batch(tensors["images"], tensors["mask"], targets, tuple(row["positions"]), epoch=row["epoch"])


def _plain(value: Any) -> Any:
    """json has no nan: written as text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
