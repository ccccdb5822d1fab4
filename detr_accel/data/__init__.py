"""Data: sources of images and boxes, and the batches made of them. Only these builders see a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from detr_accel.data import cache, check_report, coco_json, first_recipe, layout, loader
from detr_accel.data import check as checks
from detr_accel.data import source as seeds
from detr_accel.data.coco import CocoSource, classes_like, classes_of
from detr_accel.data.cost import ImageCost, image_cost
from detr_accel.data.device import PlannedBatch, ahead
from detr_accel.data.dirt import Dirt
from detr_accel.data.geometry import Augmentation, largest_first, resized, worst_canvas
from detr_accel.data.images import ImageFiles
from detr_accel.data.loader import without_lost, worker_death
from detr_accel.data.sampler import EvalTasks, TrainTasks, shapes_of, share, windows_per_epoch
from detr_accel.data.settle import settle
from detr_accel.data.shapes import ShapesSource
from detr_accel.data.source import Source, Subset
from detr_accel.recipe import Recipe
from detr_accel.structures import Batch, Classes, UserError

__all__ = [
    "ImageCost", "ImageFiles", "PlannedBatch", "Source", "Splits", "Subset", "build", "check", "check_report", "cost",
    "describe", "eval_batches", "eval_source", "first_recipe_for", "share", "train_windows", "windows_per_epoch",
    "with_cache", "without_lost", "worker_death",
    "worst_window",
]  # fmt: skip


@dataclass(frozen=True)
class Splits:
    """Both splits, and what to tell and to keep about them."""

    train: Source
    val: Source
    found: list[str]  # lines for the console
    split_json: dict | None = None  # the image ids of each split, where one json was cut in two


def build(recipe: Recipe, split_json: dict | None = None) -> Splits:
    """Open the data set of a recipe.

    Args:
        split_json: a split saved before (``Splits.split_json``); otherwise one is drawn from the seed where needed.
    Raises:
        UserError: something is missing or broken; names file, record and value.
    """
    return _FORMATS[recipe.data.format](recipe, split_json)


def _build_shapes(recipe: Recipe, _: dict | None) -> Splits:
    train, val = _shapes(recipe, "train"), _shapes(recipe, "val")
    return Splits(train, val, [f"data: procedural shapes, {len(train)} images to train on, {len(val)} to validate on"])


def _shapes(recipe: Recipe, split: str) -> ShapesSource:
    s = recipe.data.shapes
    if split not in ("train", "val"):
        raise UserError(f"the procedural shapes have the splits train and val, not {split!r}")
    num_images = s.num_train if split == "train" else s.num_val
    return ShapesSource(recipe.seed, split, num_images, s.image_size, s.max_objects, s.empty_fraction, s.colour_cue)


def _build_coco(recipe: Recipe, split_json: dict | None) -> Splits:
    d = recipe.data
    root = Path(d.root).expanduser() if d.root is not None else Path()
    train_json = _explicit(root, d.train_annotations)
    val_json = _explicit(root, d.val_annotations)
    if train_json is None:
        found = layout.find_jsons(root)
        train_json = layout.pick(found, "train", root) or layout.pick(found, "", root)
        val_json = val_json or layout.pick(found, "val", root)
        if train_json is None:
            there = ", ".join(sorted(found))
            raise UserError(f"{root} has jsons for {there} but none to train on: set data.train_annotations")
    found, more = Dirt(d.on_bad), Dirt(d.on_bad)
    train = _open(train_json, root, "train", _explicit(root, d.train_images), found)
    if val_json is None:
        splits = _cut(train, split_json or _draw_split(train, d.val_fraction, recipe.seed))
        return replace(splits, found=[*splits.found, *found.lines("both", _DESCRIBED)])
    val = _open(val_json, root, "val", _explicit(root, d.val_images), more, train.classes)
    _check_targets(train)
    lines = [_line("train", train), _line("val", val), *_shared_files(train, val), *_unused(train), *_no_boxes(val)]
    return Splits(train, val, [*lines, *found.lines("train", _DESCRIBED), *more.lines("val", _DESCRIBED)])


_DESCRIBED = ("box.flat", "box.outside")  # in a source's own line

_FORMATS = {"coco": _build_coco, "shapes": _build_shapes}


def _explicit(root: Path, path: str | None) -> Path | None:
    if path is None:
        return None
    full = root / Path(path).expanduser()
    if not full.exists():
        raise UserError(f"{full} does not exist (from {path!r} in the recipe)")
    return full


def _open(
    json_path: Path, root: Path, split: str, images: Path | None, dirt: Dirt, like: Classes | None = None
) -> CocoSource:
    table = coco_json.read(json_path, dirt)
    folders = [images] if images is not None else layout.image_folders(json_path, root, split)
    folder, paths = layout.locate(json_path, table.file_names, folders, dirt)
    table, paths = settle(table, folder, paths, dirt)
    classes = classes_of(table) if like is None else classes_like(like, table)
    return CocoSource(table, folder, paths, classes, scale=dirt.policy == "mend")


def _draw_split(source: CocoSource, val_fraction: float, seed: int) -> dict:
    """A function of the seed and the set of image ids, whatever their order in the file."""
    ids = np.sort(source.table.image_ids)
    if len(ids) < 2:
        raise UserError(f"{source.table.path} lists one image: a training and a validation split need two")
    num_val = min(max(1, round(len(ids) * val_fraction)), len(ids) - 1)
    order = seeds.generator(seed, seeds.SPLIT).permutation(len(ids))
    parts = {"train": ids[np.sort(order[num_val:])], "val": ids[np.sort(order[:num_val])]}
    return {"seed": seed, "val_fraction": val_fraction, **{name: part.tolist() for name, part in parts.items()}}


def _cut(source: CocoSource, split_json: dict) -> Splits:
    row_of = {image_id: row for row, image_id in enumerate(source.table.image_ids.tolist())}
    gone = [i for name in ("train", "val") for i in split_json[name] if i not in row_of]
    if gone:
        raise UserError(f"{source.table.path} no longer has image {gone[0]} of the saved split ({len(gone)} are gone)")
    train, val = (source.subset(sorted(row_of[i] for i in split_json[name])) for name in ("train", "val"))
    _check_targets(train)
    new = len(row_of) - len(train) - len(val)
    lines = [
        f"data: one json, cut by seed {split_json['seed']} into train and val (the split is saved with the run)",
        _line("train", train), _line("val", val), *_unused(train), *_no_boxes(val),
    ]  # fmt: skip
    if new:
        lines.append(f"data: {new} images came after the split was saved; they are in neither part")
    return Splits(train, val, lines, split_json)


def _line(split: str, source: CocoSource) -> str:
    return f"data: {split}: {describe(source)}"


def describe(source: Source) -> str:
    """Which images these are, in one line."""
    if isinstance(source, CocoSource):
        return f"{source.describe()}; {source.table.path}, images in {source.folder}"
    return f"{len(source)} procedural shapes"


def _unused(train: CocoSource) -> list[str]:
    used = set(np.unique(train.table.category_ids).tolist())
    names = [n for c, n in train.table.categories.items() if c not in used]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return [f"data: {len(names)} classes have no box in the training json: {shown}"] if names else []


def _check_targets(train: CocoSource) -> None:
    """
    Raises:
        UserError: not one box to learn from.
    """
    if train.num_targets() == 0:
        raise UserError(
            f"{train.table.path}: no image of the training split has a box that could be learned from "
            f"({train.describe()}): add annotations, or set data.train_annotations to the right json"
        )


def _no_boxes(val: CocoSource) -> list[str]:
    if val.num_targets():
        return []
    return [f"data: warning: the validation split has no boxes ({val.table.path}), so its metrics will be empty"]


def _shared_files(train: CocoSource, val: CocoSource) -> list[str]:
    if train.folder != val.folder:
        return []
    num = len({train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val))})
    return [f"data: warning: {num} images are in both splits, so the validation figures will flatter"] if num else []


def eval_source(
    recipe: Recipe, folder: str | Path | None = None, split: str | None = None, split_json: dict | None = None
) -> Source:
    """A split to evaluate on.

    Args:
        folder: another data set than the recipe's, in COCO form; a folder with a single json is taken whole.
        split: ``train``, ``val`` or, in a folder that has it, ``test``; None takes val, or the only one of ``folder``.
        split_json: as in ``build``.
    Returns:
        a source with its own class table; match it to the model's by name.
    Raises:
        UserError: the split is not there; the message names those that are.
    """
    wanted = split or "val"
    if folder is None and (recipe.data.format != "coco" or wanted in ("train", "val")):
        if recipe.data.format == "shapes":
            return _shapes(recipe, wanted)
        return getattr(build(recipe, split_json), wanted)
    root = Path(folder if folder is not None else recipe.data.root or ".").expanduser()
    found = layout.find_jsons(root)
    if folder is not None and len(found) == 1 and (split is None or "" in found):
        (wanted,) = found
    path = layout.pick(found, wanted, root)
    if path is None:
        there = ", ".join(s or "one that names no split" for s in found)
        raise UserError(f"{root} has no json for the split {wanted!r}, it has: {there}; choose with --split")
    return _open(path, root, wanted, None, Dirt(recipe.data.on_bad))


def check(
    recipe: Recipe, *, workers: int = 0, progress: Callable[[Iterable, int], Iterable] = lambda items, total: items
) -> checks.Report:
    """Look at every record and file of the data set of a recipe, whatever is wrong with it.

    Args:
        workers: processes that decode; 0 works here.
        progress: wraps the loop over the files; gets it and their number.
    Raises:
        UserError: there is no data set.
    """
    if recipe.data.format != "coco":
        raise UserError(f"check-data looks at COCO folders; data.format is {recipe.data.format}")
    e, stride = recipe.data, 16 if recipe.model.backbone.dc5 else 32
    model = checks.Model(stride, recipe.model.num_queries, e.eval_size, e.eval_max_size)
    splits = [_look(recipe, *row) for row in _jsons(recipe)]
    return checks.check(splits, model, policy=recipe.data.on_bad, workers=workers, progress=progress)


def _jsons(recipe: Recipe) -> list[tuple[str, Path, Path | None]]:
    """Split, json and image folder (None: to be found) of all there are; one that names no split is ``all``."""
    d, root = recipe.data, Path(recipe.data.root or "").expanduser()
    given = {"train": (d.train_annotations, d.train_images), "val": (d.val_annotations, d.val_images)}
    found: dict[str, Path | None] = {s: _explicit(root, json_path) for s, (json_path, _) in given.items()}
    if found["train"] is None:
        there = layout.find_jsons(root)
        found |= {s: found.get(s) or layout.pick(there, s, root) for s in there if s or not found["val"]}
    images = {s: _explicit(root, folder) for s, (_, folder) in given.items()}
    return [(s or "all", path, images.get(s or "train")) for s, path in found.items() if path is not None]


def _look(recipe: Recipe, split: str, json_path: Path, images: Path | None) -> checks.Split:
    dirt = Dirt("mend" if recipe.data.on_bad == "stop" else recipe.data.on_bad, look=True)
    try:
        return checks.Split(split, _open(json_path, Path(recipe.data.root or ""), split, images, dirt), dirt)
    except UserError as error:
        return checks.Split(split, None, dirt, str(error))


def train_windows(
    recipe: Recipe,
    source: Source,
    *,
    rank: int,
    num_ranks: int,
    start_window: int,
    end_window: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    micro: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each window in [start_window, end_window). One may be empty: see ``without_lost``.

    Closing the iterator ends its workers. Images and canvas are the same for any number of ranks, workers and micro.

    Args:
        start_window: windows already trained; any value continues exactly there.
        mean, std: of the model's backbone, three numbers on the 0..1 scale.
        micro: images per micro-batch, where ``batch.micro`` leaves it open.
        device: where the batches will be used; with ``data.pixels`` there, they come as PlannedBatch, and on a GPU
            their copy is under way.
    Raises:
        UserError: from ``next``: a record is broken, or a worker was ended from outside.
    """
    size, micro = recipe.batch.size, recipe.batch.micro if micro is None else micro
    tasks = TrainTasks(
        source, _policy(recipe), size, micro, recipe.seed, rank, num_ranks, start_window, end_window,
        shapes_of(source) if recipe.data.group_by_shape else None,
    )  # fmt: skip
    device = torch.device(device)
    on_device, leave_out = _on_device(recipe, device), recipe.data.on_bad != "stop"
    stream = loader.batches(source, tasks, **_loading(recipe, mean, std), on_device=on_device, leave_out=leave_out)
    return ahead(loader.windows(stream, tasks), device)


def first_recipe_for(root: Path, name: str) -> tuple[str, list[str]]:
    """A recipe for a COCO folder, and what was found in it.

    Raises:
        UserError: as in ``build``.
    """
    splits = build(Recipe.model_validate({"data": {"root": str(root)}}))
    return first_recipe.write(first_recipe.facts(splits.train, splits.val), name, str(root)), splits.found


def with_cache(recipe: Recipe, splits: Splits, quiet: bool = False) -> Splits:
    """The same splits with their images in a cache, where the recipe asks for one; built first where it is not there.

    Raises:
        UserError: no room for it.
    """
    d = recipe.data
    if d.cache == "none":
        return splits
    from tqdm import tqdm

    policy = _policy(recipe)

    def progress(items, total):
        return tqdm(items, "cache", total, disable=True if quiet else None, leave=False, delay=2)

    folder = Path(d.cache_folder or "~/.cache/detr_accel")
    train, one = cache.cached(
        splits.train, d.cache, folder, lambda size: largest_first(size, policy), exact=False,
        settings=("train", d.on_bad, policy.scales, policy.max_size, policy.crop > 0, policy.crop_scales),
        workers=d.workers, progress=progress,
    )  # fmt: skip
    val, two = cache.cached(
        splits.val, d.cache, folder, lambda size: resized(size, d.eval_size, d.eval_max_size), exact=True,
        settings=("val", d.on_bad, d.eval_size, d.eval_max_size), workers=d.workers, progress=progress,
    )  # fmt: skip
    return replace(splits, train=train, val=val, found=[*splits.found, one, two])


def cost(recipe: Recipe, source: Source, mean: tuple[float, ...], std: tuple[float, ...], device) -> ImageCost:
    """What a loader process spends on a training image."""
    tasks = TrainTasks(source, _policy(recipe), 4, 4, recipe.seed, 0, 1, 0, min(12, windows_per_epoch(len(source), 4)))
    return image_cost(tasks, mean, std, _on_device(recipe, torch.device(device)))


def _on_device(recipe: Recipe, device: torch.device) -> bool:
    return recipe.data.pixels == "device" or (recipe.data.pixels == "auto" and device.type == "cuda")


def worst_window(recipe: Recipe, source: Source) -> tuple[tuple[int, int], int]:
    """What the most demanding window can hold: canvas (h, w) in pixels, and boxes in one image. Nothing is decoded."""
    sizes = (source.size_px(i) for i in range(len(source)))
    return worst_canvas(sizes, _policy(recipe)), source.most_boxes()


def _policy(recipe: Recipe) -> Augmentation:
    a = recipe.data.augment
    return Augmentation(
        a.flip, tuple(a.scales), a.max_size, a.crop, tuple(a.crop_scales), tuple(a.crop_size), a.scale_by
    )


def eval_batches(
    recipe: Recipe,
    source: Source,
    *,
    rank: int,
    num_ranks: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    keep_faults: bool = False,
) -> Iterator[Batch | UserError]:
    """This rank's batches of a split: each image once over all ranks, in batches that do not depend on their number.
    Images that cannot be read are in no batch but in its ``lost``, unless ``data.on_bad`` is to stop.

    Args:
        keep_faults: yield the error of a broken image in the place of its batch, and go on.
    """
    d = recipe.data
    tasks = EvalTasks(source, recipe.evaluate.batch, d.eval_size, d.eval_max_size, rank, num_ranks)
    leave_out = recipe.data.on_bad != "stop" and not keep_faults
    return loader.batches(source, tasks, **_loading(recipe, mean, std), keep_faults=keep_faults, leave_out=leave_out)


def _loading(recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...]) -> dict:
    return {
        "mean": tuple(mean),
        "std": tuple(std),
        "workers": recipe.data.workers,
        "prefetch": recipe.data.prefetch,
        "pin_memory": recipe.device == "auto" and torch.cuda.is_available(),
    }
