"""Why a device waits for images, and which change of the recipe helps most: the rule of ``doctor`` and of the alarm."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from detr_accel.structures import ImageCost

_MOST_READY = 16  # micro-batches in each loader process, beyond which more are of no use
MARGIN = 1.2  # so many times faster than the device should the loader processes be


@dataclass
class Verdict:
    """What holds the training up, in words, and what would help.

    Args:
        name: disk, stream, decoding, pixels, workers, matching, evaluation or computing.
        changes: recipe keys and values to try.
    """

    name: str
    text: str
    changes: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Feed:
    """How a device is fed.

    Args:
        share: of the time that it waits, 0..1.
        busy: seconds of a window that are not waiting.
        images: of this process in a window.
        workers: loader processes there are; cores: that this process may use.
        cached: whether images come from a cache.
        prefetch: micro-batches that each loader process keeps ready.
        streamed: whether images come from a stream, of which nothing can be kept.
    """

    share: float
    cost: ImageCost
    busy: float
    images: float
    workers: int
    cores: int
    cached: bool
    prefetch: int = 2
    streamed: bool = False

    @property
    def waited(self) -> float:
        """Seconds of a window that the device waits."""
        return self.busy * self.share / max(1e-9, 1 - self.share)


def needed_workers(cost: ImageCost, images: float, seconds: float, margin: float = MARGIN) -> int:
    """Loader processes that make ``images`` in ``seconds``, with a margin; at least 1."""
    return max(1, math.ceil(margin * images * cost.total / max(seconds, 1e-9)))


def judge(feed: Feed) -> Verdict:
    """What takes the loader processes' time, and the change that helps most."""
    cost, waits = feed.cost, f"the device waits {100 * feed.share:.0f} % of the time for images"
    if feed.streamed and cost.stream * feed.images > 0.5 * feed.waited:
        return Verdict(
            "stream",
            f"{waits}, {1e3 * cost.stream:.0f} ms an image of it for the stream's rows: one thread of each training "
            "process reads them, so no data.workers will help; bring the set to a fast local disk (its folder as "
            "data.root), or set data.hub.streaming=false, which copies all of it there first",
        )
    keeps = not feed.cached and not feed.streamed
    if feed.streamed and cost.read > 0.5 * cost.total:
        return Verdict(
            "disk",
            f"{waits}, and reading a file takes {1e3 * cost.read:.0f} ms of the {1e3 * cost.total:.0f} ms that a "
            "loader process spends on one: a slow or remote disk; bring the files to a local one, or write the set "
            "with the images inside; more data.workers read at the same time",
        )
    if cost.read > 0.5 * cost.total and keeps:
        return Verdict(
            "disk",
            f"{waits}, and reading a file takes {1e3 * cost.read:.0f} ms of the {1e3 * cost.total:.0f} ms that a "
            "loader process spends on one: a slow or remote disk; data.cache=disk on a local one (data.cache_folder), "
            "or data.cache=ram, reads each file once, and more data.workers read at the same time",
            {"data.cache": "ram"},
        )
    if cost.decode > 0.5 * cost.total and cost.excess > 4 and keeps:
        return Verdict(
            "decoding",
            f"{waits}, and decoding takes {1e3 * cost.decode:.0f} ms an image: the files have {cost.excess:.0f} times "
            "the pixels that are used; data.cache=disk (or ram) keeps them at the size that is needed",
            {"data.cache": "disk"},
        )
    needed = needed_workers(cost, feed.images, feed.busy)
    better = min(needed, feed.cores)
    if feed.workers < better:
        return Verdict(
            "workers",
            f"{waits}, and {feed.workers} loader process{'es' * (feed.workers != 1)} cannot keep up: "
            f"data.workers={better} ({needed} would be needed, {feed.cores} cores are there)",
            {"data.workers": better},
        )
    if feed.workers >= needed:
        ready = max(4, 2 * feed.prefetch)
        text = (
            f"{waits}, though data.workers {feed.workers} would be enough for what an image takes on average "
            f"({1e3 * cost.total:.0f} ms): the loader is held up between images (other programs on these cores, a "
            "source that answers in fits), or a few images take far longer than the others; "
        )
        if ready > _MOST_READY:
            return Verdict("workers", f"{text}{feed.prefetch} micro-batches ready in each do not bridge it: look there")
        return Verdict("workers", f"{text}data.prefetch={ready} rides over it", {"data.prefetch": ready})
    biggest = "decoding" if cost.decode > cost.pixels else "pixels"
    remedy = "data.cache=disk saves the decoding"
    if not keeps:
        remedy = "smaller data.augment.scales need fewer pixels"
    if feed.streamed and biggest == "decoding":
        remedy = "data.hub.streaming=false lets data.cache=disk save the decoding; or smaller files"
    return Verdict(
        biggest,
        f"{waits}, {feed.workers} loader processes on {feed.cores} cores are all there can be, and {biggest} takes "
        f"most of their time; {remedy}",
        {"data.cache": "disk"} if keeps else {},
    )
