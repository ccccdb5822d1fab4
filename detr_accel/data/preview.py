"""A contact sheet of what a training will see: pixels as they reach the model, boxes as the loss will see them."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detr_accel.data.collate import make_batch
from detr_accel.data.sampler import Task, TrainTasks, windows_per_epoch
from detr_accel.data.source import Source
from detr_accel.structures import Batch, Classes, Targets, UserError

_SIDE = 360  # of a cell, in pixels
_LINE = 15  # of a caption
_CROWD = 10  # in an image with more boxes only those carry a name that have the width for it
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


def epoch_sheet(
    tasks: TrainTasks, epoch: int, images: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Image.Image, str]:
    """What training will see in an epoch, from its first window on: a contact sheet, and what is on in that window.

    Args:
        tasks: of the whole training, one image each.
        epoch: the first one is 0.
        images: how many to draw.
        mean, std: of the model's backbone, three numbers on the 0..1 scale.
    Raises:
        UserError: the training has no such epoch, or an image cannot be decoded.
    """
    per_epoch, total = windows_per_epoch(len(tasks.source), tasks.batch_size), tasks.end_window
    window = epoch * per_epoch
    if not 0 <= window < total:
        raise UserError(f"there is no epoch {epoch}: the training has the epochs 0 to {(total - 1) // per_epoch}")
    on = {} if tasks.strong is None else tasks.strong.at(window).probabilities()
    parts = [f"{name.replace('_', ' ')} {probability:g}" for name, probability in on.items()]
    line = f"epoch {epoch} of {total / per_epoch:g}, beyond DETR's policy: {', '.join(parts) or 'nothing'}"
    part = replace(tasks, start_window=window, end_window=min(window + per_epoch, total))
    return contact_sheet(tasks.source, part, mean, std, images, line), line


def contact_sheet(
    source: Source,
    tasks: Iterable[Task],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    images: int,
    title: str,
    columns: int = 4,
) -> Image.Image:
    """Draw the first images of some tasks.

    Args:
        mean, std: of the model's backbone, three numbers on the 0..1 scale.
        images: how many; fewer where the tasks end.
        title: the line above them.
    Returns:
        a picture; beneath each image its name, its size and which augmentations made it.
    """
    cells = [cell for cell, _ in zip(_cells(source, tasks, mean, std), range(images), strict=False)]
    columns = max(1, min(columns, len(cells)))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(picture.height for picture, _ in row) + 2 * _LINE + 10 for row in rows]
    sheet = Image.new("RGB", (columns * (_SIDE + 6) + 6, _LINE + 12 + sum(heights)), _PAPER)
    ImageDraw.Draw(sheet).text((6, 4), title, _INK, font=ImageFont.load_default(12))
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            _paste(sheet, cell, 6 + column * (_SIDE + 6), _LINE + 12 + sum(heights[:number]))
    return sheet


def _paste(sheet: Image.Image, cell: tuple[Image.Image, list[str]], x: int, y: int) -> None:
    picture, lines = cell
    sheet.paste(picture, (x, y))
    for number, line in enumerate(lines):
        where = (x, y + picture.height + 1 + number * _LINE)
        ImageDraw.Draw(sheet).text(where, line[:60], _INK, font=ImageFont.load_default(11))


def _cells(
    source: Source, tasks: Iterable[Task], mean: tuple[float, ...], std: tuple[float, ...]
) -> Iterator[tuple[Image.Image, list[str]]]:
    for task in tasks:
        batch = make_batch(source, task, mean, std, leave_out=True)
        place = dict(zip(batch.positions, range(len(batch)), strict=True))
        for position, index, plan in zip(task.positions, task.indices, task.plans, strict=True):
            if position not in place:  # cannot be read: training leaves its place empty, too
                yield _blank(), [source.name(index), "cannot be read"]
                continue
            row = place[position]
            targets = batch.targets[row]
            h, w = targets.size_px
            boxes = f"{len(targets.labels)} box{'es' * (len(targets.labels) != 1)}"
            lines = [f"{source.name(index)}  {w}x{h}, {boxes}", ", ".join(plan.kinds) or "as DETR"]
            yield _draw(_levels(batch, row, mean, std), targets, source.classes), lines


def _blank() -> Image.Image:
    return Image.new("RGB", (_SIDE, _SIDE // 2), (200, 200, 200))


def _levels(batch: Batch, row: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [h, w, 3]: the un-padded image, normalisation taken back."""
    h, w = batch.targets[row].size_px
    m, s = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return ((batch.images[row, :, :h, :w] * s + m) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()


def _draw(pixels: Tensor, targets: Targets, classes: Classes) -> Image.Image:
    picture = Image.fromarray(pixels.numpy())
    ratio = _SIDE / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for (cx, cy, w, h), label in zip(targets.boxes_cxcywh.tolist(), targets.labels.tolist(), strict=True):
        corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        x0, y0, x1, y1 = (round(v * side) for v, side in zip(corners, picture.size * 2, strict=True))
        hue = label * 0.618 % 1  # the golden ratio: neighbours differ
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 1, 1))
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
        name = classes.names[label] or str(label)
        if len(targets.labels) <= _CROWD or pen.textlength(name, font=font) <= x1 - x0:
            where = (x0 + 2, y0 + 1 if y0 < 12 else y0 - 12)
            pen.rectangle(pen.textbbox(where, name, font=font), fill=colour)
            pen.text(where, name, (0, 0, 0) if sum(colour) > 300 else (255, 255, 255), font=font)
    return picture
