"""Data: sources of images and boxes, and the batches made of them. Only these builders see a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from detr_accel.data import cache, check_report, first_recipe, hub_opening, layout, loader, opening, stream, workers
from detr_accel.data import check as checks
from detr_accel.data.collate import make_batch
from detr_accel.data.device import PlannedBatch, ahead
from detr_accel.data.dirt import Dirt
from detr_accel.data.geometry import Demands, canvas, eval_plan, largest_first, resized
from detr_accel.data.hub_columns import Columns
from detr_accel.data.hub_where import Where
from detr_accel.data.images import ImageFiles
from detr_accel.data.layout import format_of, is_hub_file
from detr_accel.data.loader import largest_canvas, without_lost, worker_death
from detr_accel.data.opening import Splits, describe
from detr_accel.data.preview import epoch_sheet
from detr_accel.data.read_ahead import Ahead
from detr_accel.data.sampler import EvalTasks, Task, TrainTasks, share, windows_per_epoch
from detr_accel.data.shapes import ShapesSource
from detr_accel.data.sizes import (
    base_policy,
    changes_of_augmentation,
    demands,
    eval_sizes,
    evaluated,
    finest_stride,
    loading,
    pixels_on_device,
    strong_policy,
    task_bytes,
    total_windows,
    worker_count,
    worst_window,
)  # fmt: skip
from detr_accel.data.source import Source, Subset
from detr_accel.data.stream import FirstRows, StreamSource, StreamTasks
from detr_accel.data.workers import Loading, Room
from detr_accel.recipe import Recipe
from detr_accel.structures import Batch, UserError

__all__ = [
    "Demands", "ImageFiles", "Loading", "PlannedBatch", "Room", "Source", "Splits", "StreamSource", "Subset",
    "all_share", "build", "cache_place", "cache_room", "changes_of_augmentation", "check", "check_report",
    "demands", "describe", "eval_batches", "eval_source", "first_recipe_for", "format_of", "in_any_order",
    "is_hub_file", "is_there", "largest_canvas", "loading", "odd_rows", "preview", "reads_its_own", "share",
    "still_window", "task_bytes", "total_windows", "train_windows", "who_reads_what",
    "windows_per_epoch", "with_cache", "without_lost", "worker_death", "workers", "worst_window",
]  # fmt: skip

_TASKS_AHEAD = 16  # micro-batches of a stream, encoded


def build(recipe: Recipe, split_json: dict | None = None, max_val_images: int | None = None) -> Splits:
    """Open the data set of a recipe.

    Args:
        split_json: a split saved before (``Splits.split_json``); otherwise one is drawn from the seed where needed.
        max_val_images: a rehearsal evaluates on so many images of the validation split; None takes all.
    Raises:
        UserError: something is missing or broken; names file, record and value.
    """
    splits = _FORMATS[recipe.data.format](recipe, split_json)
    return splits if max_val_images is None else replace(splits, val=splits.val.head(max_val_images))


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
    train_json = opening.explicit(root, d.train_annotations)
    val_json = opening.explicit(root, d.val_annotations)
    if train_json is None:
        found = layout.find_jsons(root)
        train_json = layout.pick(found, "train", root) or layout.pick(found, "", root)
        val_json = val_json or layout.pick(found, "val", root)
        if train_json is None:
            there = ", ".join(sorted(found))
            raise UserError(f"{root} has jsons for {there} but none to train on: set data.train_annotations")
    found, more = Dirt(d.on_bad), Dirt(d.on_bad)
    train = opening.open_split(train_json, root, "train", opening.explicit(root, d.train_images), found)
    if val_json is None:
        splits = opening.cut(train, split_json or opening.draw_split(train, d.val_fraction, recipe.seed))
        return replace(splits, found=[*splits.found, *found.lines("both", opening.DESCRIBED)])
    val = opening.open_split(val_json, root, "val", opening.explicit(root, d.val_images), more, train.classes)
    opening.check_targets(train)
    lines = [
        opening.line("train", train), opening.line("val", val), *opening.shared_files(train, val),
        *opening.unused(train), *opening.no_boxes(val), *found.lines("train", opening.DESCRIBED),
        *more.lines("val", opening.DESCRIBED),
    ]  # fmt: skip
    return Splits(train, val, lines)


def _build_hub(recipe: Recipe, split_json: dict | None) -> Splits:
    h = recipe.data.hub
    if h.streaming:
        return hub_opening.streamed(_asked(recipe), h.length, h.block, h.lanes)
    return hub_opening.whole(_asked(recipe), split_json, recipe.data.val_fraction, recipe.seed)


def _asked(recipe: Recipe) -> hub_opening.Asked:
    h, root = recipe.data.hub, Path(recipe.data.root or ".").expanduser()
    return hub_opening.Asked(
        Where(h.name or str(root), h.config, h.revision),
        Columns(h.image, h.objects, h.box, h.category, h.box_format, tuple(h.class_names)),
        h.train_split, h.val_split, recipe.data.on_bad,
    )  # fmt: skip


_FORMATS = {"coco": _build_coco, "hub": _build_hub, "shapes": _build_shapes}


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
            return hub_opening.split_named(_asked(recipe), wanted, recipe.data.hub.streaming)
        return getattr(build(recipe, split_json), wanted)
    root = Path(folder if folder is not None else recipe.data.root or ".").expanduser()
    found = layout.find_jsons(root)
    if folder is not None and len(found) == 1 and (split is None or "" in found):
        (wanted,) = found
    path = layout.pick(found, wanted, root)
    if path is None:
        there = ", ".join(s or "one that names no split" for s in found)
        raise UserError(f"{root} has no json for the split {wanted!r}, it has: {there}; choose with --split")
    return opening.open_split(path, root, wanted, None, Dirt(recipe.data.on_bad))


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
    if recipe.data.format == "shapes":
        raise UserError("check-data looks at data sets of people; data.format is shapes, which are made on the fly")
    e, model = recipe.data, checks.Model(finest_stride(recipe), recipe.model.num_queries, *evaluated(recipe))
    if e.format == "hub":
        splits = hub_opening.to_check(_asked(recipe))
    else:
        given = {"train": (e.train_annotations, e.train_images), "val": (e.val_annotations, e.val_images)}
        splits = opening.to_check(Path(e.root or "").expanduser(), given, e.on_bad)
    return checks.check(splits, model, policy=e.on_bad, workers=workers, progress=progress)


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
    by: Loading | None = None,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each window in [start_window, end_window). One may be empty: see ``without_lost``.

    Closing the iterator ends its workers. Images and canvas are the same for any number of ranks, workers and micro.

    Args:
        start_window: windows already trained; any value continues exactly there.
        mean, std: of the model's backbone, three numbers on the 0..1 scale.
        micro: images per micro-batch, where ``batch.micro`` leaves it open.
        device: where the batches will be used; with ``data.pixels`` there, they come as PlannedBatch, and on a GPU
            their copy is under way.
        by: loader processes and their queues; None: as ``loading`` settles them.
    Raises:
        UserError: from ``next``: a record is broken, or a worker was ended from outside.
    """
    micro = recipe.batch.micro if micro is None else micro
    tasks = _tasks(recipe, source, micro, rank, num_ranks, start_window, end_window)
    device, streamed = torch.device(device), isinstance(source, StreamSource)
    on_device, leave_out = pixels_on_device(recipe, device), recipe.data.on_bad != "stop"
    by = by or loading(recipe, source, micro=micro, num_ranks=num_ranks, device=device)[0]
    ordered = Ahead(tasks, _TASKS_AHEAD, lambda task, seconds: replace(task, waited=seconds)) if streamed else tasks
    batches = loader.batches(source, ordered, **_how(recipe, by, mean, std), on_device=on_device, leave_out=leave_out)
    return ahead(loader.windows(batches, tasks), device)


def in_any_order(recipe: Recipe, source: Source, num: int = 256) -> Source:
    """The source; of a stream its first ``num`` images, as a source that may be asked for any of them."""
    return FirstRows(source, recipe.seed, num) if isinstance(source, StreamSource) else source


def all_share(source: Source, num_images: int, num_ranks: int) -> bool:
    """Whether a window surely has images for every process: of a stream, each reads what its own lanes bring."""
    return num_ranks == 1 or (num_images >= num_ranks and not reads_its_own(source, num_ranks))


def reads_its_own(source: Source, num_ranks: int) -> bool:
    """Whether each of several processes sees its own images of a window only, and so knows its own canvas only."""
    return num_ranks > 1 and isinstance(source, StreamSource) and source.own_lanes(0, num_ranks) is not None


def who_reads_what(source: Source, num_ranks: int) -> list[str]:
    """What to say about a stream that several processes read."""
    return [stream.sharing(source, num_ranks)] if num_ranks > 1 and isinstance(source, StreamSource) else []


def odd_rows(source: Source, start_window: int, end_window: int, name: str) -> list[str]:
    """What was odd in the rows of a stream that this process read for these windows, a line a kind; else nothing."""
    return source.odd(start_window, end_window, name) if isinstance(source, StreamSource) else []


def _tasks(
    recipe: Recipe, source: Source, micro: int, rank: int, num_ranks: int, start: int, end: int,
    size: int | None = None, grouped: bool = True,
) -> TrainTasks | StreamTasks:  # fmt: skip
    place = (
        base_policy(recipe, len(source)), size or recipe.batch.size, micro, recipe.seed, rank, num_ranks, start, end
    )
    strong = strong_policy(recipe, len(source))
    if isinstance(source, StreamSource):
        return StreamTasks(source, *place, strong)
    return TrainTasks(source, *place, grouped and recipe.data.group_by_shape, strong)


def preview(
    recipe: Recipe, source: Source, *, epoch: int = 0, images: int = 12, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Image.Image, str]:
    """What training will see in an epoch: ``epoch_sheet`` of a recipe."""
    tasks = _tasks(recipe, source, 1, 0, 1, 0, total_windows(recipe, len(source)))
    return epoch_sheet(tasks, epoch, images, tuple(mean), tuple(std))


def first_recipe_for(root: Path, name: str, detector: str = "auto", file: str | None = None) -> tuple[str, list[str]]:
    """A recipe for a folder, and what was found in it.

    Args:
        detector: ``detr``, ``rtdetr``, or ``auto``: by the data.
        file: where the recipe will lie; None: NAME.yaml.
    Raises:
        UserError: as in ``build``.
    """
    format_ = layout.format_of(root)
    splits = build(Recipe.model_validate({"data": {"root": str(root), "format": format_}}))
    for split, source in (("training", splits.train), ("validation", splits.val)):
        opening.check_readable(source, split)
    found = first_recipe.facts(splits.train, splits.val)
    return first_recipe.write(found, name, str(root), format_, detector, file), splits.found


def with_cache(recipe: Recipe, splits: Splits, quiet: bool = False) -> Splits:
    """The same splits with their images in a cache, where the recipe asks for one; built first where it is not there.
    What killed runs left in memory is removed, whatever the recipe asks for.

    Raises:
        UserError: no room for it.
    """
    d = recipe.data
    if d.cache == "none":
        return replace(splits, found=[*splits.found, *_swept()])
    from tqdm import tqdm

    def progress(items, total):
        return tqdm(items, "cache", total, disable=True if quiet else None, leave=False, delay=2)

    folder = Path(d.cache_folder or _CACHES)
    alone = workers.room([workers.machine()])  # the processes beside this one wait for the cache
    building = max(1, int(alone.cores)) if d.workers == "auto" else d.workers
    (train, one), (val, two) = (
        cache.cached(source, d.cache, folder, workers=building, progress=progress, **how)
        for source, how in _kept(recipe, splits)
    )
    return replace(splits, train=train, val=val, found=[*splits.found, one, two, *_swept()])


def _swept() -> list[str]:
    """After the run's own are held: one that a killed run left is used again where it fits."""
    gib = cache.sweep()
    return [f"cache: {gib:.2f} GiB in memory removed, which runs that were killed had left"] if gib else []


def cache_room(recipe: Recipe, splits: Splits) -> float:
    """GiB that are still to be written before ``with_cache`` has what the recipe asks for.

    Raises:
        UserError: no room for them.
    """
    folder = Path(recipe.data.cache_folder or _CACHES)
    return 0.0 if recipe.data.cache == "none" else cache.room(_kept(recipe, splits), recipe.data.cache, folder)


def cache_place(recipe: Recipe) -> str:
    """Where the cache of a recipe lies, in words."""
    return f"memory ({cache.RAM})" if recipe.data.cache == "ram" else str(Path(recipe.data.cache_folder or _CACHES))


_CACHES = "~/.cache/detr_accel"


def _kept(recipe: Recipe, splits: Splits) -> list[tuple[Source, dict]]:
    """Both splits, and how their images are kept."""
    d, policy = recipe.data, base_policy(recipe, len(splits.train))
    strong = strong_policy(recipe, len(splits.train))
    whole = strong is not None and strong.crops_originals()
    first: Callable = lambda size: size if whole else largest_first(size, policy)  # noqa: E731
    settings = ("train", d.on_bad, policy.scales, policy.max_size, policy.crop > 0, policy.crop_scales)
    settings += ("whole",) * whole + ("square",) * d.square + (policy.largest,) * (policy.largest > max(policy.scales))
    at_eval: Callable = lambda size: resized(size, *evaluated(recipe))  # noqa: E731
    in_val = ("val", d.on_bad, d.eval_size, d.eval_max_size) + ("square",) * d.square
    return [
        (splits.train, {"largest": first, "exact": False, "settings": settings}),
        (splits.val, {"largest": at_eval, "exact": True, "settings": in_val}),
    ]


def is_there(recipe: Recipe) -> bool:
    """Whether there is a data set to look at; one that is broken counts as there, and is refused when it is opened."""
    d = recipe.data
    root = Path(d.root).expanduser() if d.root is not None else Path()
    if d.format != "coco":
        return d.root is None or d.format == "shapes" or root.exists()
    return root.exists() if d.train_annotations is None else (root / Path(d.train_annotations).expanduser()).exists()


def eval_batches(
    recipe: Recipe,
    source: Source,
    *,
    rank: int,
    num_ranks: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    keep_faults: bool = False,
    loading: Loading | None = None,
    room: workers.Room | None = None,
) -> Iterator[Batch | UserError]:
    """This rank's batches of a split: each image once over all ranks, in batches that do not depend on their number.
    Images that cannot be read are in no batch but in its ``lost``, unless ``data.on_bad`` is to stop.

    Args:
        keep_faults: yield the error of a broken image in the place of its batch, and go on.
        loading: how training is fed, where data.workers is auto and that was measured; its loader processes are taken.
        room: of each process, as all agreed on; None: as this one sees it.
    """
    d, room = recipe.data, room or workers.room(queue_gib=recipe.data.queue_gib)
    short, long, square = evaluated(recipe)
    tasks = EvalTasks(source, recipe.evaluate.batch, short, long, rank, num_ranks, square)
    leave_out = recipe.data.on_bad != "stop" and not keep_faults
    sizes = eval_sizes(recipe, source)
    canvas_px = max((h for h, _ in sizes), default=1) * max((w for _, w in sizes), default=1)
    count = worker_count(recipe, room) if loading is None else loading.workers
    by, _ = workers.within(count, d.prefetch, 1, recipe.evaluate.batch * canvas_px * (3 * 4 + 1), room)
    return loader.batches(source, tasks, **_how(recipe, by, mean, std), keep_faults=keep_faults, leave_out=leave_out)


def still_window(
    recipe: Recipe,
    source: Source,
    indices: Sequence[int],
    *,
    rank: int,
    num_ranks: int,
    micro: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> list[Batch]:
    """This rank's micro-batches of a window of chosen images without augmentation, as evaluation would see them.

    Args:
        indices: into the source, of all ranks.
        micro: most images in a micro-batch.
    """
    plans = [eval_plan(source.size_px(i), *evaluated(recipe)) for i in indices]
    size, mine = canvas(plans), share(len(indices), rank, num_ranks)
    parts = [range(i, min(i + micro, mine.stop)) for i in range(mine.start, mine.stop, micro)]
    tasks = [Task(0, 0, tuple(p), tuple(indices[i] for i in p), tuple(plans[i] for i in p), size) for p in parts]
    return [make_batch(source, task, tuple(mean), tuple(std)) for task in tasks]


def _how(recipe: Recipe, by: Loading, mean: tuple[float, ...], std: tuple[float, ...]) -> dict:
    return {
        "mean": tuple(mean),
        "std": tuple(std),
        "workers": by.workers,
        "prefetch": by.prefetch,
        "pin_memory": recipe.device == "auto" and torch.cuda.is_available(),
    }
