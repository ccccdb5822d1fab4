"""The data as a run will read them, looked at within a given time: formats, files, the loader, the targets."""

from __future__ import annotations

import contextlib
import time

import numpy as np
from accelerate import Accelerator

from detr_accel import data, evaluate
from detr_accel.data import look
from detr_accel.recipe import Recipe
from detr_accel.structures import UserError
from detr_accel.train import parts

MOST_DECODED = 500  # images looked at one by one, in each split
BLANK = 0.5  # a larger share of images of one colour is no accident


def check(recipe: Recipe, splits: data.Splits, accelerator: Accelerator, seconds: float) -> tuple[str, list[str]]:
    """Everything that can be known about the data in the time there is; the first windows come first.

    Raises:
        Trouble: a run would fail on it, or learn something else than was meant.
    """
    train, val = data.in_any_order(recipe, splits.train), splits.val
    findings = [] if not accelerator.is_local_main_process else [
        *look.boxes(train), *look.boxes(val), *look.classes(train, val), *_queries(recipe, train, val),
    ]  # fmt: skip
    _stop_at(findings)
    findings += _queues(recipe, splits, accelerator)
    to_cache = data.cache_room(recipe, splits)
    try:
        first, read, rate = _first_windows(recipe, splits.train, accelerator, seconds / 3)
    except RuntimeError as error:  # a worker that dies interrupts whatever statement is in hand
        raise data.worker_death(error) or error from None
    text = f"first {first} windows read ({read} images on this process, {rate:.0f} a second)"
    if accelerator.is_local_main_process:
        faults, decoded = [], []
        for source, name in ((train, "training"), (val, "validation")):
            more, count = _decode(source, name, recipe.seed, seconds / 4)
            faults += more
            decoded.append(f"{count} of {len(source)} {name}")
        _stop_at(faults)
        text += f"; {' and '.join(decoded)} images decoded"
        findings += look.shared_images(train, val, seconds / 8)
        _stop_at([f for s in (train, val) if (f := _targets(recipe, s)) is not None])
    if to_cache:
        text_of = (
            f"data.cache is {recipe.data.cache}: {to_cache:.2f} GiB are built when the night begins, for which there"
        )
        findings.append(look.Finding(f"{text_of} is room; the rehearsal reads without a cache"))
    notes = [line.removeprefix("data: ") for line in splits.found if "warning" in line or "have no box" in line]
    return text, [*notes, *(f"{f.text}; {f.remedy}" if f.remedy else f.text for f in findings)]


def _stop_at(findings: list[look.Finding]) -> None:
    for f in findings:
        if f.bad:
            raise UserError(f"{f.text}; {f.remedy}")


def _queries(recipe: Recipe, train: data.Source, val: data.Source) -> list[look.Finding]:
    most = train.most_boxes()
    queries = recipe.model.num_queries
    findings = []
    if most > queries:
        text = f"a training image has {most} boxes and model.num_queries is {queries}: some cannot be found"
        findings.append(look.Finding(text, "raise model.num_queries where the weights allow it"))
    crowded = evaluate.beyond_limits(val.ground_truth()["annotations"], recipe.evaluate.max_detections, queries)
    return [*findings, *(look.Finding(text, remedy) for text, remedy in crowded)]


def _queues(recipe: Recipe, splits: data.Splits, accelerator: Accelerator) -> list[look.Finding]:
    """Workers hand batches over in /dev/shm; a container may have 64 MiB of it."""
    micro = 1 if recipe.batch.micro == "auto" else min(recipe.batch.micro, recipe.batch.size)
    _, note = data.loading(
        recipe, splits.train, micro=micro, num_ranks=accelerator.num_processes, device=accelerator.device
    )
    return [look.Finding(note.removeprefix("loader: "))] if note else []


def _first_windows(
    recipe: Recipe, train: data.Source, accelerator: Accelerator, seconds: float
) -> tuple[int, int, float]:
    """What this process will read first, through the real loader; windows, images, and images a second."""
    micro = 1 if recipe.batch.micro == "auto" else recipe.batch.micro
    length = parts.measure(recipe, len(train))
    stream = data.train_windows(
        recipe, train, rank=accelerator.process_index, num_ranks=accelerator.num_processes, start_window=0,
        end_window=length.total, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), micro=micro,
        device=accelerator.device,
    )  # fmt: skip
    begun = first = time.monotonic()
    windows = images = timed = 0
    with contextlib.closing(stream):
        for micro_batches in stream:
            now, windows = time.monotonic(), windows + 1
            images += sum(len(b) for b in micro_batches)
            first, timed = (now, 0) if windows == 1 else (first, timed + sum(len(b) for b in micro_batches))
            if now - begun > seconds or windows >= length.per_epoch:
                break
    spent = time.monotonic() - (first if timed else begun)
    return windows, images, (timed or images) / max(spent, 1e-6)


def _decode(source: data.Source, name: str, seed: int, seconds: float) -> tuple[list[look.Finding], int]:
    """Images here and there, until the time is over; returns the faults and how many were decoded."""
    order = np.random.default_rng(seed).permutation(len(source))[:MOST_DECODED]
    until, broken, blank, count = time.monotonic() + seconds, [], [], 0
    for index in order.tolist():
        if count >= 8 and time.monotonic() > until:
            break
        count += 1
        try:
            image = source.sample(index).image
        except UserError as error:
            broken.append(str(error))
            continue
        if np.ptp(image) <= 2:
            blank.append(source.name(index))
    found = []
    if broken:
        found.append(look.Finding(f"{len(broken)} of {count} {name} images cannot be read: {broken[0]}", _TELL, True))
    if len(blank) > BLANK * count:
        text = f"{len(blank)} of {count} {name} images are of one colour (black, say), the first {blank[0]!r}"
        found.append(look.Finding(text, "look at the files and at how they were exported", True))
    return found, count


_TELL = "put whole files in their places or take their records out of the json"


def _targets(recipe: Recipe, source: data.Source) -> look.Finding | None:
    indices = list(range(0, len(source), max(1, len(source) // 16)))[:16]
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "rank": 0, "num_ranks": 1, "micro": 1}
    for index in indices:
        (batch,) = data.still_window(recipe, source, [index], **plain)
        found = look.targets(source, batch, [index])
        if found is not None:
            return found
    return None
