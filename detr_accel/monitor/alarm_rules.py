"""The alarms, one small function each, and the table of them at the end.

A rule looks at the window in hand, at the bounded past and at the recipe's numbers, and answers with an alarm or None.
To add one: write the function, add its row, make a history on which it fires in tests/monitor/test_alarms.py. What
depends on time and memory is in machine_rules.py.
The figures in the rules were set between what healthy runs and broken ones show: docs/not-learning.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from detr_accel.structures import LoaderTime, StepStats

KEPT = 200  # windows that are remembered one by one
BLOCK = 100  # windows whose mean loss is remembered for longer
MOST_BLOCKS = 400
DETR_LR, DETR_BATCH = 1e-4, 16
OF_LOSSES = ("loss_giou", "class_error", "box_spread", "image_spread")
STARTS = {"loss": "start", "loss_giou": "start_giou"}  # what is remembered of the first BLOCK windows, and as what
FULL_LR = 0.9  # of optim.lr: what counts as not yet lowered


@dataclass(frozen=True)
class Alarm:
    """``text``: what happened, since when, the likely cause, and what to change in the recipe."""

    text: str
    level: str = "WARN"
    title: str = ""  # the row of the table; filled in by whoever asks


@dataclass(frozen=True)
class About:
    """The recipe's numbers that rules and their words need."""

    lr: float = DETR_LR  # optim.lr
    clip_norm: float | None = 0.1
    warmup_steps: int = 0
    batch_size: int = DETR_BATCH
    num_queries: int = 100
    cores: int = 2  # that a process may use
    cached: bool = False  # data.cache
    streamed: bool = False  # data.hub.streaming
    from_scratch: bool = True  # no model.init_from
    detector: str = "DETR"  # or RT-DETR
    on_gpu: bool = True
    num_images: int = 10**6  # in the training split


@dataclass
class Past:
    """The last ``KEPT`` windows and a few figures of the time before them, the window in hand included."""

    recent: dict[str, list[float]] = field(default_factory=dict)
    blocks: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    head_loaded: float = 0.0
    # of the last windows: seconds, of which waiting, and what making the images took; not kept over a resume
    machine: list[tuple[float, float, LoaderTime]] = field(default_factory=list)

    def add(self, stats: StepStats) -> bool:
        """Returns whether the window is one to judge: those that were refused have their own alarm, and are no measure
        of what comes after."""
        self.machine = [*self.machine[-49:], (stats.seconds, stats.wait_seconds, stats.loader)]
        if not (stats.accepted and math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
            return False
        named = {"window": stats.window, "images": stats.num_images, "boxes": stats.num_boxes} | stats.facts
        if "placed" not in self.recent:  # of a state from before: each window has a loss
            num = len(self.last("loss", KEPT))
            self.recent["placed"] = self.last("window", num) if num else []
        if stats.num_boxes:  # without a box nothing is placed or named, and the loss is another one
            named |= {"placed": stats.window, "loss": stats.loss, "grad_norm": stats.grad_norm}
        known = OF_LOSSES if stats.num_boxes else OF_LOSSES[2:]
        named |= {name: stats.losses[name] for name in known if name in stats.losses}
        for name, value in named.items():
            rows = self.recent.setdefault(name, [])
            rows.append(value if isinstance(value, int) else float(f"{value:.6g}"))
            del rows[:-KEPT]
        for name, start in STARTS.items():
            began = self.recent.setdefault(start, [])
            if stats.window <= BLOCK and name in named:
                began.append(self.recent[name][-1])
        if len(self.last("loss", BLOCK)) >= BLOCK and stats.window % BLOCK == 0:
            self.blocks.append(sum(self.last("loss", BLOCK)) / BLOCK)
            del self.blocks[:-MOST_BLOCKS]
        return True

    def add_evaluation(self, window: int, epoch: float, metrics: dict[str, float]) -> None:
        if {"val/loss", "val/train_loss"} <= metrics.keys():
            row = {"window": window, "epoch": epoch, "val": metrics["val/loss"], "train": metrics["val/train_loss"]}
            self.evaluations.append(row)
            del self.evaluations[:-100]

    def last(self, name: str, number: int) -> list[float]:
        return self.recent.get(name, [])[-number:]

    def sum(self, name: str, number: int) -> float:
        return sum(self.last(name, number))


Rule = Callable[[StepStats, Past, About], Alarm | None]


# --- the loss and its gradient


def gradient_spikes(now: StepStats, past: Past, about: About) -> Alarm | None:
    """Three of the last twenty windows far above the earlier ones: one alone is what clipping is for."""
    norms, windows = past.last("grad_norm", KEPT), past.last("placed", 20)
    before, recent = [math.log(max(n, 1e-12)) for n in norms[:-20]], norms[-20:]
    if len(before) < 50:
        return None
    middle, spread = _middle(before)
    jumps = [
        (w, n / math.exp(middle))
        for w, n in zip(windows, recent, strict=True)
        if _z(math.log(max(n, 1e-12)), middle, spread) > 6 and n > 8 * math.exp(middle)
    ]
    if len(jumps) < 3:
        return None
    return Alarm(
        f"gradient norm up to {max(r for _, r in jumps):.0f}x its median, in {len(jumps)} windows since window "
        f"{jumps[0][0]:.0f}, while lr is {_lr(now):.3g}: lower optim.lr (DETR trains at {DETR_LR:g}), or raise "
        f"schedule.warmup_steps (it is {about.warmup_steps})"
    )


def clipping_saturated(now: StepStats, past: Past, about: About) -> Alarm | None:
    """DETR's gradients are nearly always clipped, some hundredfold, and AdamW does not mind; thousands are too many."""
    norms = past.last("grad_norm", BLOCK)
    if about.clip_norm is None or len(norms) < BLOCK or median(norms) < 5000 * about.clip_norm:
        return None
    return Alarm(
        f"gradients are clipped {median(norms) / about.clip_norm:.0f}-fold (median norm {median(norms):.3g} over "
        f"{BLOCK} windows, optim.clip_norm {about.clip_norm:g}): the step keeps next to nothing of their size; lower "
        f"optim.lr (it is {about.lr:g}); where it came with new data, look at their boxes and pixels"
    )


def loss_spike(now: StepStats, past: Past, about: About) -> Alarm | None:
    """Three of the last five windows far above the hundred before them."""
    losses = past.last("loss", BLOCK + 5)
    before, recent = losses[:-5], losses[-5:]
    if len(before) < 50:
        return None
    middle, spread = _middle(before)
    high = [x for x in recent if _z(x, middle, spread) > 8 and x > 1.5 * middle]
    if len(high) < 3:
        return None
    return Alarm(
        f"loss {max(high):.3g}, {max(high) / middle:.1f}x its median of {middle:.3g}, since window "
        f"{past.last('placed', 5)[0]:.0f} while lr is {_lr(now):.3g}: if it stays, lower optim.lr and begin "
        "again from an earlier checkpoint (model.init_from=runs/NAME/checkpoints/best); a spike that goes by is left "
        "alone"
    )


def diverged(now: StepStats, past: Past, about: About) -> Alarm | None:
    """The loss is half as high again as it was, or a high learning rate has never let it fall."""
    losses = past.last("loss", 50)
    if len(losses) < 50 or _lr(now) == 0:
        return None
    level, advice = median(losses), f"lower optim.lr (it is {about.lr:g}; DETR trains at {DETR_LR:g})"
    if past.blocks and level > 1.5 * min(past.blocks):
        return Alarm(
            f"the loss is {level:.3g} over the last 50 windows and was {min(past.blocks):.3g}, while lr is "
            f"{_lr(now):.3g}: the training has diverged; {advice} and begin again, or from an earlier checkpoint "
            "(model.init_from=runs/NAME/checkpoints/best)",
            "ERROR",
        )
    # RT-DETR's class scores fall in a few windows whatever comes; its boxes tell
    name = "loss" if about.detector == "DETR" else "loss_giou"
    start, held = past.last(STARTS[name], BLOCK), past.last(name, 50)
    begun = median(start[:10]) if len(start) >= 10 else math.inf  # a branch did not begin at window 1
    late_enough = now.step >= about.warmup_steps + BLOCK and about.lr >= 2.99 * DETR_LR
    if late_enough and about.from_scratch and len(held) == 50 and median(held) > 0.93 * begun:
        return Alarm(
            f"the {name} began at {begun:.3g} and after {now.window} windows is still {median(held):.3g} (at most "
            f"{max(start):.3g} on the way): the steps are too long to learn anything; {advice}, or "
            f"set schedule.warmup_steps=1000 (it is {about.warmup_steps})",
            "ERROR",
        )
    return None


def plateau(now: StepStats, past: Past, about: About) -> Alarm | None:
    """A thousand windows no better than the thousand before, at the full learning rate, while boxes are poor."""
    if len(past.blocks) < 20 or now.window % BLOCK or now.epoch < 2 or _lr(now) < FULL_LR * about.lr:
        return None
    before, recent = past.blocks[-20:-10], past.blocks[-10:]
    noise = _middle(before)[1] / math.sqrt(10)
    gious = past.last("loss_giou", BLOCK)
    poor = bool(gious) and median(gious) > 0.7
    if not poor or median(recent) < median(before) - max(2 * noise, 0.005 * median(before)):
        return None
    cause = (
        f"with {about.num_images} images from scratch that is {about.detector}'s usual plateau; start from a trained "
        "detector (model.init_from), or train longer"
    )
    if not about.from_scratch:
        cause = "the detector that it began from (model.init_from) knows other things; train longer"
    return Alarm(
        f"the loss stays at {median(recent):.3g} (it was {median(before):.3g} a thousand windows before) and boxes do "
        f"not fit yet (loss_giou {median(gious):.2f}): {cause}; a learning rate far from {DETR_LR:g} does it too "
        f"(optim.lr is {about.lr:g})"
    )


def too_good(now: StepStats, past: Past, about: About) -> Alarm | None:
    """Fitting the training images nearly perfectly, from random weights, within a few thousand windows. A DETR cannot;
    a small RT-DETR with an ImageNet backbone does so with a few hundred images in ten epochs."""
    gious, errors = past.last("loss_giou", 50), past.last("class_error", 50)
    if about.detector != "DETR" or not about.from_scratch or now.window > 5000 or len(gious) < 50:
        return None
    if not (median(gious) < 0.1 and median(errors) < 1):
        return None
    return Alarm(
        f"boxes and classes of the training images are all but perfect after {now.window} windows (loss_giou "
        f"{median(gious):.2f}, class_error {median(errors):.1f} %), far too early for training from scratch: the same "
        f"few images come again and again ({about.num_images} in the training split), or the answer is drawn into "
        "them; look at data.root, and believe validation alone"
    )


# --- predictions


def collapsed(now: StepStats, past: Past, about: About) -> Alarm | None:
    """All queries of an image say one box. Young decoders nearly do (a spread of 2e-4 was seen, left after 60 windows);
    dead ones do exactly, up to rounding."""
    spreads = past.last("box_spread", KEPT)
    dead = len(spreads) >= 20 and max(spreads[-20:]) < 1e-5
    stuck = len(spreads) == KEPT and max(spreads) < 2e-3 and now.step >= about.warmup_steps + 500
    if about.num_queries < 2 or not (dead or stuck):
        return None
    windows = 20 if dead else KEPT
    return Alarm(
        f"all {about.num_queries} queries of an image predict the same box (they differ by "
        f"{median(spreads[-windows:]):.1g} of its side) since window {past.last('window', windows)[0]:.0f} or before: "
        f"the decoder has collapsed; lower optim.lr (it is {about.lr:g}; DETR trains at {DETR_LR:g}), raise "
        f"schedule.warmup_steps (it is {about.warmup_steps}), or start from a trained detector (model.init_from)"
    )


def blind(now: StepStats, past: Past, about: About) -> Alarm | None:
    """Each query says the same box in every image: nothing of the pictures reaches the decoder."""
    spreads, images = past.last("image_spread", 20), past.last("images", 20)
    if len(spreads) < 20 or min(images) < 2 or not max(spreads) < 1e-5:
        return None
    return Alarm(
        f"every image is given the same boxes (they differ by {median(spreads):.1g} of its side from image to image) "
        f"since window {past.last('window', 20)[0]:.0f} or before: nothing of the pictures reaches the decoder; lower "
        f"optim.lr (it is {about.lr:g}; DETR trains at {DETR_LR:g}), and look whether model.backbone.weights and the "
        "images under data.root are what they should be"
    )


def classes_do_not_fit(now: StepStats, past: Past, about: About) -> Alarm | None:
    """A trained class head that is wrong about boxes which it finds: its labels are not the data set's."""
    errors, gious = past.last("class_error", KEPT), past.last("loss_giou", KEPT)
    if past.head_loaded < 0.9 or not 10 <= now.window <= 60 or len(errors) < 10:
        return None
    if not (median(gious) < 0.8 and median(errors) > 80):
        return None
    return Alarm(
        f"the loaded detector finds the boxes (loss_giou {median(gious):.2f}) and calls {median(errors):.0f} % of them "
        f"by another class, over the first {now.window} windows: the labels do not mean what they meant where its "
        "class head was trained, most often shifted by one; mend the category ids of the data set, or start the head "
        "anew with model.init_head=reset"
    )


# --- what is fed


def batch_of_one(now: StepStats, past: Past, about: About) -> Alarm | None:
    fitting = DETR_LR / math.sqrt(DETR_BATCH)
    if about.batch_size > 1 or about.lr <= fitting:
        return None
    return Alarm(
        f"batch.size is 1 at optim.lr {about.lr:g}: each step follows a single image, and DETR's learning rate belongs "
        f"to {DETR_BATCH}; set batch.size={DETR_BATCH} (batch.micro=1 keeps the memory: it accumulates), or "
        f"optim.lr={fitting:g}"
    )


def windows_without_boxes(now: StepStats, past: Past, about: About) -> Alarm | None:
    boxes = past.last("boxes", 50)
    empty = sum(n == 0 for n in boxes)
    if len(boxes) < 20 or empty < 0.8 * len(boxes):
        return None
    return Alarm(
        f'{empty} of the last {len(boxes)} windows had no box at all: only "no object" is learned; look whether '
        "data.train_annotations belongs to these images, lower data.augment.crop (it is for images with many boxes), "
        "or raise batch.size"
    )


def blank_images(now: StepStats, past: Past, about: About) -> Alarm | None:
    blank, images = past.sum("blank_images", 20), past.sum("images", 20)
    if images < 16 or blank < 0.5 * images:
        return None
    return Alarm(
        f"{blank:.0f} of the last {images:.0f} images are of one colour throughout: nothing can be seen in them; look "
        "at the files under data.root (data.train_images), most often a failed copy or conversion"
    )


def boxes_leave_images(now: StepStats, past: Past, about: About) -> Alarm | None:
    """What a data set with boxes in another format shows: corners read as sizes reach out of the image."""
    cut, boxes = past.sum("cut_boxes", 50), past.sum("boxes", 50)
    total = max(cut, boxes)
    if total < 50 or cut < 0.1 * total:
        return None
    return Alarm(
        f"{cut:.0f} of the last {total:.0f} boxes reach out of their image and were cut at its border: COCO's bbox is "
        "[left, top, width, height] in pixels, and these look like [left, top, right, bottom] or like pixels of an "
        "image of another size; convert the json (data.train_annotations)"
    )


def tiny_boxes(now: StepStats, past: Past, about: About) -> Alarm | None:
    tiny, boxes = past.sum("tiny_boxes", 50), past.sum("boxes", 50)
    if boxes < 50 or tiny < 0.5 * boxes:
        return None
    return Alarm(
        f"{tiny:.0f} of the last {boxes:.0f} boxes are less than 2 pixels wide or high in the image that the model "
        "sees: if bbox is in fractions of the image, convert the json to pixels; if the objects are that small, raise "
        "data.augment.scales and data.augment.max_size, or cut the images into tiles"
    )


def more_boxes_than_queries(now: StepStats, past: Past, about: About) -> Alarm | None:
    left, boxes = past.sum("unmatched_boxes", BLOCK), past.sum("boxes", BLOCK)
    if boxes < 200 or left < 0.02 * boxes:
        return None
    return Alarm(
        f"{left:.0f} of the last {boxes:.0f} boxes found no query, because their images hold more than the model's "
        f"{about.num_queries}: they are not learned; raise model.num_queries"
    )


# --- what moves


def nothing_learns(now: StepStats, past: Past, about: About) -> Alarm | None:
    if any(rate > 0 and now.grad_norms.get(group, 0) > 0 for group, rate in now.lr.items()) or not now.num_boxes:
        return None
    if all(rate == 0 for rate in now.lr.values()):
        if about.lr > 0:
            return Alarm(
                f"no weight moves: the schedule has brought every learning rate to 0 at window {now.window}; raise "
                "schedule.min_factor, or let schedule.fall end at 1.0",
                "ERROR",
            )
        return Alarm(
            f"no weight moves: the learning rate of every group is 0 at window {now.window}; set optim.lr (DETR trains "
            f"at {DETR_LR:g}) and optim.lr_backbone (1e-5)",
            "ERROR",
        )
    return Alarm(
        f"no weight moves: the gradient of every group that has a learning rate is 0 at window {now.window}; look at "
        "the weights in loss.ce (RT-DETR: loss.vfl or loss.mal), loss.bbox and loss.giou, and at what is frozen",
        "ERROR",
    )


def part_without_rate(now: StepStats, past: Past, about: About) -> Alarm | None:
    """A group that has a gradient and no rate while others have one; a frozen backbone is asked for and has neither."""
    still = [g for g, rate in now.lr.items() if rate == 0 and now.grad_norms.get(g, 0) > 0 and g != "backbone"]
    if not still or not any(now.lr.values()):
        return None
    return Alarm(
        f"{' and '.join(still)} do not learn: their learning rate is 0 at window {now.window} while their gradient is "
        f"not; set optim.lr (it is {about.lr:g}; DETR trains at {DETR_LR:g})"
    )


# --- evaluations


def overfit(past: Past, about: About) -> Alarm | None:
    """Validation has been worse than its best twice in a row while the training images went on improving."""
    rows = past.evaluations
    if len(rows) < 3:
        return None
    best = min(rows, key=lambda row: row["val"])
    worse = all(row["val"] > 1.03 * best["val"] and row["window"] > best["window"] for row in rows[-2:])
    if not worse or not rows[-1]["train"] < best["train"]:
        return None
    return Alarm(
        f"the loss on validation images was {best['val']:.3g} at window {best['window']:.0f} and is "
        f"{rows[-1]['val']:.3g}, while that on training images fell from {best['train']:.3g} to "
        f"{rows[-1]['train']:.3g}: the images are being learned by heart; look whether val/AP still "
        "rises, which it may for long; if not, use checkpoints/best, let early_stop.patience end such runs, raise "
        "model.dropout or optim.weight_decay, or add images"
    )


EVERY_WINDOW: dict[str, Rule] = {
    "Diverged": diverged,
    "Loss spike": loss_spike,
    "Gradient spikes": gradient_spikes,
    "Clipping saturated": clipping_saturated,
    "Plateau": plateau,
    "Too good too early": too_good,
    "Collapsed predictions": collapsed,
    "Same boxes in every image": blind,
    "Classes do not fit": classes_do_not_fit,
    "Batch of one image": batch_of_one,
    "Windows without boxes": windows_without_boxes,
    "Blank images": blank_images,
    "Boxes leave their images": boxes_leave_images,
    "Tiny boxes": tiny_boxes,
    "More boxes than queries": more_boxes_than_queries,
    "Nothing learns": nothing_learns,
    "Part without learning rate": part_without_rate,
}
AT_EVALUATION: dict[str, Callable[[Past, About], Alarm | None]] = {"Validation gets worse": overfit}


def _lr(now: StepStats) -> float:
    return max(now.lr.values(), default=0.0)


def _middle(values: list[float]) -> tuple[float, float]:
    """Median, and the spread that outliers do not move: 1.4826 x the median distance from it."""
    middle = median(values)
    return middle, 1.4826 * median(abs(v - middle) for v in values)


def _z(value: float, middle: float, spread: float) -> float:
    return (value - middle) / max(spread, 1e-3 * abs(middle), 1e-12)
