"""What a recipe's data can bring at the most, and the loader that this allows. A builder: it sees the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from detr_accel.data import augment, workers
from detr_accel.data.geometry import Augmentation, Demands, eval_plan, stepped, worst_canvas
from detr_accel.data.opening import Splits
from detr_accel.data.sampler import share, windows_per_epoch
from detr_accel.data.shapes import ShapesSource
from detr_accel.data.source import Source
from detr_accel.data.stream import StreamSource
from detr_accel.data.workers import Loading, Room
from detr_accel.recipe import Recipe


def loading(
    recipe: Recipe, source: Source, *, micro: int, num_ranks: int, device: torch.device | str,
    count: int | None = None, room: Room | None = None,
) -> tuple[Loading, str | None]:  # fmt: skip
    """Loader processes of a training and what each keeps ready, within data.queue_gib, memory and /dev/shm.

    Args:
        micro: images of a micro-batch.
        count: processes, where data.workers is auto and they were measured; None takes the recipe's, or a few.
        room: of each process, as all agreed on; None: as this one sees it.
    Returns:
        and what to say where it is less than was asked for.
    """
    d, room = recipe.data, room or workers.room(queue_gib=recipe.data.queue_gib)
    count = worker_count(recipe, room) if count is None else count
    tasks = -(-len(share(recipe.batch.size, 0, num_ranks)) // micro)
    if not count:
        return Loading(0, 1), None
    return workers.within(count, d.prefetch, tasks, task_bytes(recipe, source, micro, torch.device(device)), room)


def worker_count(recipe: Recipe, room: Room) -> int:
    """Loader processes that the recipe asks for; of auto, those to begin with."""
    return room.first if recipe.data.workers == "auto" else recipe.data.workers


def task_bytes(recipe: Recipe, source: Source, micro: int, device: torch.device) -> int:
    """Of the largest micro-batch that can wait in a queue: float32 and mask, or the images as decoded."""
    if not pixels_on_device(recipe, device):
        height, width = _worst_canvas(recipe, source)
        return micro * height * width * (3 * 4 + 1)
    policy, strong = base_policy(recipe, len(source)), strong_policy(recipe, len(source))
    if isinstance(source, StreamSource):  # of any shape that fits between the longest side and the short one
        longest = 2 if policy.square else policy.max_size / min(policy.max_size, policy.largest)
        sizes = [(10**6, 10**6), (10**6, int(10**6 * longest))]
    else:
        sizes = image_sizes(source)
    drawn, seen = isinstance(source, ShapesSource), not isinstance(source, StreamSource)
    return micro * workers.decoded_bytes(sizes, policy, strong, scaled=not drawn, seen=seen)


def _worst_canvas(recipe: Recipe, source: Source) -> tuple[int, int]:
    if isinstance(source, StreamSource):
        return _any_canvas(recipe)
    return _with_strong(recipe, worst_canvas(image_sizes(source), base_policy(recipe, len(source))))


def _any_canvas(recipe: Recipe) -> tuple[int, int]:
    """What a training window can be where an image may have any shape."""
    policy = base_policy(recipe, 1)
    side = policy.resized((1, 1), policy.largest)[0] if policy.square else policy.max_size
    return _with_strong(recipe, (side, side))


def pixels_on_device(recipe: Recipe, device: torch.device) -> bool:
    """Whether loader processes only decode (``data.pixels``)."""
    return recipe.data.pixels == "device" or (recipe.data.pixels == "auto" and device.type == "cuda")


def worst_window(recipe: Recipe, source: Source) -> tuple[tuple[int, int], int]:
    """What the most demanding window can hold: canvas (h, w) in pixels, and boxes in one image. Nothing is decoded; of
    a stream it is what the recipe allows, and as many boxes as there are queries."""
    if isinstance(source, StreamSource):
        return _worst_canvas(recipe, source), recipe.model.num_queries
    strong = strong_policy(recipe, len(source))
    most = source.most_boxes()
    return _worst_canvas(recipe, source), most if strong is None else strong.most_boxes(most)


def _with_strong(recipe: Recipe, canvas_px: tuple[int, int]) -> tuple[int, int]:
    """A canvas that also holds what the stronger augmentations make."""
    strong = strong_policy(recipe, 1)
    height, width = (0, 0) if strong is None else strong.worst_size(base_policy(recipe, 1))
    return stepped((max(canvas_px[0], height), max(canvas_px[1], width)), recipe.data.augment.canvas_step)


def demands(recipe: Recipe, splits: Splits | None) -> Demands:
    """
    Args:
        splits: of ``build``; None: the data are not there. Then every image may have any shape, so that a window's
            canvas is ``max_size`` both ways unless images are squeezed, and one has as many boxes as there are queries;
            there are COCO's 80 classes.
    """
    d = recipe.data
    if splits is None:
        long, short = d.eval_max_size, min(d.eval_size, d.eval_max_size)
        one = (short, short) if d.square else (short, long)
        eval_canvas = one if d.square or recipe.evaluate.batch == 1 else (long, long)
        return Demands(_any_canvas(recipe), recipe.model.num_queries, eval_canvas, 80, None, True)
    canvas, most_boxes = worst_window(recipe, splits.train)
    sizes = eval_sizes(recipe, splits.val)
    if recipe.evaluate.batch > 1:
        eval_canvas = max(h for h, _ in sizes), max(w for _, w in sizes)
    else:
        eval_canvas = max(sizes, key=lambda size: size[0] * size[1])
    return Demands(canvas, most_boxes, eval_canvas, len(splits.train.classes), len(splits.train), False)


def image_sizes(source: Source) -> Iterator[tuple[int, int]]:
    """(h, w) of every image, in pixels."""
    return (source.size_px(i) for i in range(len(source)))


def evaluated(recipe: Recipe) -> tuple[int, int, bool]:
    """How ``eval_plan`` resizes: short side, bound of the long one, whether to a square."""
    return recipe.data.eval_size, recipe.data.eval_max_size, recipe.data.square


def eval_sizes(recipe: Recipe, source: Source) -> list[tuple[int, int]]:
    """(h, w) in pixels that evaluation resizes images to, of each size among them."""
    return [eval_plan(size_px, *evaluated(recipe)).size_px for size_px in {*image_sizes(source)}]


def finest_stride(recipe: Recipe) -> int:
    """Pixels to a cell of the finest map that the detector looks at, with a backbone that ends at stride 32."""
    model = recipe.model
    if model.name == "rtdetr":
        return 64 >> len(model.rtdetr.num_points)
    return 16 if model.backbone.dc5 else 32


def base_policy(recipe: Recipe, num_images: int) -> Augmentation:
    """The detector's own augmentation, without what is stronger."""
    a = recipe.data.augment
    final = None if a.scales_stop == 1 else recipe.data.eval_size
    return Augmentation(
        a.flip, tuple(a.scales), a.max_size, a.crop, tuple(a.crop_scales), tuple(a.crop_size), a.scale_by,
        a.canvas_step, recipe.data.square, final, math.ceil(a.scales_stop * total_windows(recipe, num_images)),
    )  # fmt: skip


def strong_policy(recipe: Recipe, num_images: int) -> augment.Strong | None:
    """What is done beyond it, over the whole training; None: nothing."""
    return augment.strong_of(total_windows(recipe, num_images), recipe.data.augment.model_dump())


def total_windows(recipe: Recipe, num_images: int) -> int:
    """Length of a training in windows."""
    per_epoch = windows_per_epoch(num_images, recipe.batch.size)
    return recipe.schedule.steps or max(1, round(recipe.schedule.epochs * per_epoch))


def changes_of_augmentation(recipe: Recipe, num_images: int) -> set[int]:
    """Windows, from 0, with which something of the augmentation begins or ends: other pictures from there on."""
    total = total_windows(recipe, num_images)
    policy, strong = base_policy(recipe, num_images), strong_policy(recipe, num_images)
    kinds = recipe.data.augment.model_dump().values()
    marks = {k[at] for k in kinds if isinstance(k, dict) and k["probability"] > 0 for at in ("start", "stop")}
    near = {math.ceil(mark * total) + d for mark in (*marks, recipe.data.augment.scales_stop) for d in (-1, 0, 1)}

    def on(window: int) -> tuple:
        return policy.at(window), strong.at(window) if strong is not None else None

    return {window for window in near if 0 < window < total and on(window) != on(window - 1)}
