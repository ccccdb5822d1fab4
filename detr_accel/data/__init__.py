"""Data: sources of images and boxes, and the batches made of them. Only these builders see a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from detr_accel.data import cache, coco_json, first_recipe, hub, layout, loader, stream
from detr_accel.data import source as seeds
from detr_accel.data.coco import CocoSource, classes_like, classes_of
from detr_accel.data.cost import ImageCost, image_cost
from detr_accel.data.device import PlannedBatch, ahead
from detr_accel.data.geometry import Augmentation, largest_first, resized, worst_canvas
from detr_accel.data.images import ImageFiles
from detr_accel.data.loader import worker_death
from detr_accel.data.sampler import EvalTasks, TrainTasks, shapes_of, share, windows_per_epoch
from detr_accel.data.shapes import ShapesSource
from detr_accel.data.source import Source, Subset
from detr_accel.data.stream import StreamSource, StreamTasks
from detr_accel.recipe import Recipe
from detr_accel.structures import Batch, Classes, UserError

__all__ = [
    "ImageCost", "ImageFiles", "PlannedBatch", "Source", "Splits", "StreamSource", "Subset", "build", "cost",
    "describe", "eval_batches", "eval_source", "first_recipe_for", "share", "train_windows", "who_reads_what",
    "windows_per_epoch", "with_cache", "worker_death", "worst_window",
]  # fmt: skip

_TASKS_AHEAD = 16  # micro-batches of a stream, encoded


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
    train = _open(train_json, root, "train", _explicit(root, d.train_images))
    if val_json is None:
        return _cut(train, split_json or _draw_split(train, d.val_fraction, recipe.seed))
    val = _open(val_json, root, "val", _explicit(root, d.val_images), train.classes)
    _check_targets(train)
    lines = [_line("train", train), _line("val", val), *_shared_files(train, val), *_unused(train), *_no_boxes(val)]
    return Splits(train, val, lines)


def _build_hub(recipe: Recipe, split_json: dict | None) -> Splits:
    h, where, columns = recipe.data.hub, _where(recipe), _columns(recipe)
    splits = hub.load(where, h.streaming)
    train_name, val_name = hub.split_names(splits, h.train_split, h.val_split, where)
    if h.streaming:
        return _build_stream(recipe, splits[train_name], train_name, val_name)
    train = hub.open_split(splits[train_name], columns, f"{where}, split {train_name}")
    odd = hub.reaches_out(train, h.box_format)
    if val_name is None:
        cut = _cut(train, split_json or _draw_split(train, recipe.data.val_fraction, recipe.seed))
        return replace(cut, found=[*cut.found, *odd])
    val = hub.open_split(splits[val_name], columns, f"{where}, split {val_name}", train.classes)
    _check_targets(train)
    lines = [_line("train", train), _line("val", val), *odd, *_unused(train), *_no_boxes(val)]
    return Splits(train, val, lines)


def _build_stream(recipe: Recipe, dataset, train_name: str, val_name: str | None) -> Splits:
    h, where = recipe.data.hub, _where(recipe)
    if val_name is None:
        raise UserError(
            f"{where} has the single split {train_name!r}, and a stream cannot be cut in two: set data.hub.val_split, "
            "or data.hub.streaming=false"
        )
    train = stream.open_stream(
        dataset, _columns(recipe), stream.parquet_rows(hub.files(where, train_name)), h.length or
        hub.told_length(dataset, train_name), h.block, h.lanes, f"{where}, split {train_name}",
    )  # fmt: skip
    val = hub.open_split(hub.load_one(where, val_name), _columns(recipe), f"{where}, split {val_name}", train.classes)
    return Splits(train, val, [_line("train", train), _line("val", val), *_no_boxes(val)])


def _where(recipe: Recipe) -> hub.Where:
    h, root = recipe.data.hub, recipe.data.root
    return hub.Where(h.name or str(Path(root or ".").expanduser()), h.config, h.revision)


def _columns(recipe: Recipe) -> hub.Columns:
    h = recipe.data.hub
    return hub.Columns(h.image, h.objects, h.box, h.category, h.box_format, tuple(h.class_names))


_FORMATS = {"coco": _build_coco, "hub": _build_hub, "shapes": _build_shapes}


def _explicit(root: Path, path: str | None) -> Path | None:
    if path is None:
        return None
    full = root / Path(path).expanduser()
    if not full.exists():
        raise UserError(f"{full} does not exist (from {path!r} in the recipe)")
    return full


def _open(json_path: Path, root: Path, split: str, images: Path | None, like: Classes | None = None) -> CocoSource:
    table = coco_json.read(json_path)
    folders = [images] if images is not None else layout.image_folders(json_path, root, split)
    folder, paths = layout.locate(json_path, table.file_names, folders)
    return CocoSource(table, folder, paths, classes_of(table) if like is None else classes_like(like, table))


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
    whole = "split" if isinstance(source, hub.HubSource) else "json"
    lines = [
        f"data: one {whole}, cut by seed {split_json['seed']} into train and val (the split is saved with the run)",
        _line("train", train), _line("val", val), *_unused(train), *_no_boxes(val),
    ]  # fmt: skip
    if new:
        lines.append(f"data: {new} images came after the split was saved; they are in neither part")
    return Splits(train, val, lines, split_json)


def _line(split: str, source: CocoSource) -> str:
    return f"data: {split}: {describe(source)}"


def describe(source: Source) -> str:
    """Which images these are, in one line."""
    if isinstance(source, StreamSource):
        return source.describe()
    if isinstance(source, hub.HubSource):
        return f"{source.describe()}; {source.table.path}"
    if isinstance(source, CocoSource):
        return f"{source.describe()}; {source.table.path}, images in {source.folder}"
    return f"{len(source)} procedural shapes"


def _unused(train: CocoSource) -> list[str]:
    used = set(np.unique(train.table.category_ids).tolist())
    names = [n for c, n in train.table.categories.items() if c not in used]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return [f"data: {len(names)} classes have no box in the training split: {shown}"] if names else []


def _check_targets(train: CocoSource) -> None:
    """
    Raises:
        UserError: not one box to learn from.
    """
    if train.num_targets() == 0:
        raise UserError(
            f"{train.table.path}: no image of the training split has a box that could be learned from "
            f"({train.describe()}): add annotations, or set data.train_annotations (data.hub.train_split) anew"
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
        if recipe.data.format == "hub" and (wanted == "test" or recipe.data.hub.streaming):
            return _hub_split(recipe, wanted)
        return getattr(build(recipe, split_json), wanted)
    root = Path(folder if folder is not None else recipe.data.root or ".").expanduser()
    found = layout.find_jsons(root)
    if folder is not None and len(found) == 1 and (split is None or "" in found):
        (wanted,) = found
    path = layout.pick(found, wanted, root)
    if path is None:
        there = ", ".join(s or "one that names no split" for s in found)
        raise UserError(f"{root} has no json for the split {wanted!r}, it has: {there}; choose with --split")
    return _open(path, root, wanted, None)


def _hub_split(recipe: Recipe, wanted: str) -> Source:
    """A split whole: one that no training uses, or one of a set that is streamed in training."""
    h, where, columns = recipe.data.hub, _where(recipe), _columns(recipe)
    splits = hub.load(where)
    train_name, val_name = hub.split_names(splits, h.train_split, h.val_split, where)
    name = {"train": train_name, "val": val_name}.get(wanted, wanted)
    if name not in splits:
        raise UserError(f"{where} has no split {wanted!r} ({', '.join(splits)}); choose with --split")
    return hub.open_split(splits[name], columns, f"{where}, split {name}")


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
    """This rank's micro-batches of each window in [start_window, end_window).

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
    place = (_policy(recipe), size, micro, recipe.seed, rank, num_ranks, start_window, end_window)
    if isinstance(source, StreamSource):
        tasks = StreamTasks(source, *place)
        ordered = stream.Ahead(tasks, _TASKS_AHEAD)
    else:
        ordered = tasks = TrainTasks(source, *place, shapes_of(source) if recipe.data.group_by_shape else None)
    device = torch.device(device)
    batches = loader.batches(source, ordered, **_loading(recipe, mean, std), on_device=_on_device(recipe, device))
    return ahead(loader.windows(batches, tasks), device)


def who_reads_what(source: Source, num_ranks: int) -> list[str]:
    """What to say about a stream that several processes read."""
    if num_ranks == 1 or not isinstance(source, StreamSource):
        return []
    return [stream.sharing(source, num_ranks)]


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
        settings=("train", policy.scales, policy.max_size, policy.crop > 0, policy.crop_scales), workers=d.workers,
        progress=progress,
    )  # fmt: skip
    val, two = cache.cached(
        splits.val, d.cache, folder, lambda size: resized(size, d.eval_size, d.eval_max_size), exact=True,
        settings=("val", d.eval_size, d.eval_max_size), workers=d.workers, progress=progress,
    )  # fmt: skip
    return replace(splits, train=train, val=val, found=[*splits.found, one, two])


def cost(recipe: Recipe, source: Source, mean: tuple[float, ...], std: tuple[float, ...], device) -> ImageCost:
    """What a loader process spends on a training image."""
    kind = StreamTasks if isinstance(source, StreamSource) else TrainTasks
    tasks = kind(source, _policy(recipe), 4, 4, recipe.seed, 0, 1, 0, min(12, windows_per_epoch(len(source), 4)))
    return image_cost(tasks, mean, std, _on_device(recipe, torch.device(device)))


def _on_device(recipe: Recipe, device: torch.device) -> bool:
    return recipe.data.pixels == "device" or (recipe.data.pixels == "auto" and device.type == "cuda")


def worst_window(recipe: Recipe, source: Source) -> tuple[tuple[int, int], int]:
    """What the most demanding window can hold: canvas (h, w) in pixels, and boxes in one image. Nothing is decoded; of
    a stream it is what the recipe allows, and as many boxes as there are queries."""
    if isinstance(source, StreamSource):
        return (recipe.data.augment.max_size,) * 2, recipe.model.num_queries
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

    Args:
        keep_faults: yield the error of a broken image in the place of its batch, and go on.
    """
    d = recipe.data
    tasks = EvalTasks(source, recipe.evaluate.batch, d.eval_size, d.eval_max_size, rank, num_ranks)
    return loader.batches(source, tasks, **_loading(recipe, mean, std), keep_faults=keep_faults)


def _loading(recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...]) -> dict:
    return {
        "mean": tuple(mean),
        "std": tuple(std),
        "workers": recipe.data.workers,
        "prefetch": recipe.data.prefetch,
        "pin_memory": recipe.device == "auto" and torch.cuda.is_available(),
    }
