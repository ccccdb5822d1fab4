"""A minute of training, looked at: where the time goes, what holds it up, and which change of the recipe would help.

Everything is what the training itself does: the same loader, window, step and evaluation. Only the clock is new, which
on a GPU waits for the device at each turn and so slows the training that is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import torch

from detr_accel import data, models
from detr_accel.monitor import feeding, memory
from detr_accel.monitor.feeding import Feed, Verdict
from detr_accel.monitor.stopwatch import Stopwatch
from detr_accel.recipe import Recipe
from detr_accel.structures import Batch, ImageCost, LoaderTime, UserError
from detr_accel.train import launch, memory_fit, parts
from detr_accel.train.checkpoint import State
from detr_accel.train.feeder import Feeder
from detr_accel.train.parts import Parts

SECTIONS = ("wait", "copy", "forward", "matcher", "loss", "backward", "reduce", "optimizer", "evaluation", "other")
WORTH = 0.15  # a share of the time below which nothing is said about it
WARM_WINDOWS = 3


@dataclass
class Findings:
    """Seconds per window by section, per image in a loader process, and the verdict."""

    seconds: dict[str, float]
    image: ImageCost
    workers: int
    windows: int
    images_per_second: float
    peak_gib: float
    verdict: Verdict
    said: str = ""  # about the loader

    def to_json(self) -> dict:
        return asdict(self)

    def table(self) -> str:
        whole = sum(self.seconds.values())
        rows = [f"{'':12s}{'s/window':>10s}{'share':>8s}"]
        rows += [f"{n:12s}{s:10.4f}{100 * s / whole:7.1f} %" for n, s in self.seconds.items()]
        i = self.image
        rows += [
            f"{'together':12s}{whole:10.4f}   {self.images_per_second:.1f} images/s, "
            f"peak memory {self.peak_gib:.2f} GiB",
            f"in each of {self.workers} loader processes, ms per image: read {1e3 * i.read:.1f}, decode "
            f"{1e3 * i.decode:.1f}, pixels {1e3 * i.pixels:.1f}",
        ]
        rows += [f"waiting for the stream, ms per image: {1e3 * i.stream:.1f}"] if i.stream else []
        rows += [self.said] if self.said else []
        return "\n".join([*rows, f"verdict: {self.verdict.text}"])


def look(recipe: Recipe, seconds: float = 60.0, say: Callable[[str], None] = lambda line: None) -> Findings:
    """Train for about so long, without keeping anything but the recipe's cache.

    Args:
        say: gets a line before what takes long, or much room.
    Raises:
        UserError: as a training would; or it is started on several processes.
    """
    accelerator = launch.make_accelerator(recipe.precision, recipe.device, recipe.dist.overlap)
    if accelerator.num_processes > 1:
        raise UserError("doctor looks at one process: start it without accelerate launch, or with --num_processes 1")
    parts.seed_everything(recipe.seed, recipe.deterministic)
    splits = data.build(recipe)
    if gib := data.cache_room(recipe, splits):
        stays = "given back at the end" if recipe.data.cache == "ram" else "which stays there for the training"
        where = data.cache_place(recipe)
        say(f"cache: {gib:.2f} GiB (data.cache={recipe.data.cache}) are first built in {where}, {stays}")
    splits = data.with_cache(recipe, splits)
    built = parts.build(recipe, accelerator, splits, resume=False)
    state = State(micro=recipe.batch.micro)
    if "auto" in (recipe.batch.micro, recipe.model.activation_checkpointing):
        fitted = memory_fit.fit(built, recipe.batch.micro, recipe.model.activation_checkpointing)
        state.micro, state.checkpointed, _ = fitted
    parts.prepare(built)
    parts.agree_on_room(built)
    spent, windows, images, loader, said = _train(built, state, seconds)
    cost = loader.per_image()
    spent["evaluation"] = _evaluation(built, seconds / 4) * _evaluations(recipe) / built.length.per_epoch
    ordered = {name: spent.get(name, 0.0) for name in SECTIONS}
    verdict = judge(recipe, ordered, cost, built.loading, max(1, int(built.room.cores)), images / windows)
    verdict = _within_queues(built, state.micro, verdict)
    return Findings(
        ordered, cost, built.loading.workers, windows, images / windows / sum(ordered.values()),
        memory.peak_gib(accelerator.device), verdict, said,
    )  # fmt: skip


def _evaluations(recipe: Recipe) -> float:
    """Evaluations in an epoch."""
    return 1 / recipe.evaluate.every_epochs


def _train(built: Parts, state: State, seconds: float) -> tuple[dict[str, float], int, float, LoaderTime, str]:
    """Seconds per window by section, windows seen, their images, what making these took, and what is said about the
    loader."""
    clock, o = Stopwatch(built.accelerator.device), built.recipe.optim
    built.runner.clock = clock
    stream = Feeder(built, 0, state.micro, skipped=1, measured=WARM_WINDOWS - 1)
    begun, windows, images, loader, told = time.perf_counter(), 0, 0, LoaderTime(), "\n".join(stream.said)
    try:
        while True:
            with clock.section("wait"):
                batches = next(stream, None)
            if batches is None:
                break
            begun_window = time.perf_counter()
            with clock.section("other"):
                built.optimizer.zero_grad(set_to_none=True)
                result = built.runner.run(data.without_lost(batches)[0])
                if result.failure or result.out_of_memory:
                    raise UserError(result.failure or "out of memory: set batch.micro=auto, which finds what fits")
                with clock.section("optimizer"):
                    built.runner.clip(result, o.clip_norm, o.clip_value)
                    built.prepared.step()
                    if built.ema is not None:
                        built.ema.update(built.bare)
            windows, images = windows + 1, images + result.num_images
            spent = LoaderTime.of(batches)
            told = stream.seen(spent, time.perf_counter() - begun_window) or told
            loader += spent
            if windows == WARM_WINDOWS:  # workers start, kernels are chosen
                clock.take()
                begun, counted, seen, loader = time.perf_counter(), windows, images, LoaderTime()
            if windows > WARM_WINDOWS and time.perf_counter() - begun > seconds:
                break
    finally:
        stream.close()
    if windows <= WARM_WINDOWS:
        raise UserError(f"the run has {windows} windows, too few to look at: raise schedule.epochs")
    return {k: v / (windows - counted) for k, v in clock.take().items()}, windows - counted, images - seen, loader, told


def _evaluation(built: Parts, seconds: float) -> float:
    """Seconds of a whole evaluation, from as many of its batches as fit into so long; scoring is not in it."""
    recipe, device, model = built.recipe, built.accelerator.device, built.evaluated
    batches = data.eval_batches(
        recipe, built.splits.val, rank=0, num_ranks=1, mean=model.mean, std=model.std, keep_faults=True,
        loading=built.loading, room=built.room,
    )
    model.eval()
    begun, images = time.perf_counter(), 0
    with torch.inference_mode():
        for batch in islice(batches, 10_000):
            if isinstance(batch, Batch):
                moved = batch.to(device)
                with built.accelerator.autocast():
                    outputs = model(moved.images, moved.mask)
                models.detections_of(model, outputs, batch.targets, recipe.evaluate.max_detections)
                images += len(batch)
            if time.perf_counter() - begun > seconds:
                break
    batches.close()
    return (time.perf_counter() - begun) * len(built.splits.val) / max(1, images)


def judge(
    recipe: Recipe, seconds: dict[str, float], cost: ImageCost, loading: data.Loading, cores: int, images: float
) -> Verdict:
    """What takes the most time that a change of the recipe could save.

    Args:
        seconds: per window, by section.
        images: per window.
    """
    whole = sum(seconds.values())
    shares = {name: value / whole for name, value in seconds.items()}
    held_up = {"data": shares["wait"], "matching": shares["matcher"], "evaluation": shares["evaluation"]}
    worst = max(held_up, key=held_up.__getitem__)
    if held_up[worst] < WORTH:
        return _computing(recipe, shares)
    if worst == "matching":
        return Verdict(
            "matching",
            f"matching takes {100 * shares['matcher']:.0f} % of the time: it grows with model.num_queries "
            f"({recipe.model.num_queries}), the boxes of an image and the decoder layers that are supervised; lower "
            "model.num_queries to little more than the fullest image has"
            + (", or set loss.aux=false" if recipe.model.name == "detr" else ""),
            {"loss.aux": False} if recipe.model.name == "detr" else {},
        )
    if worst == "evaluation":
        every = float(np.ceil(recipe.evaluate.every_epochs * shares["evaluation"] / 0.05))
        return Verdict(
            "evaluation",
            f"evaluation takes {100 * shares['evaluation']:.0f} % of the time: evaluate less often with "
            f"evaluate.every_epochs={every:g} (it is {recipe.evaluate.every_epochs:g}), or raise evaluate.batch "
            f"({recipe.evaluate.batch})",
            {"evaluate.every_epochs": every},
        )
    kept, busy, streamed = recipe.data.cache != "none", whole - seconds["wait"], recipe.data.hub.streaming
    feed = Feed(shares["wait"], cost, busy, images, loading.workers, cores, kept, loading.prefetch, streamed)
    return feeding.judge(feed)


def _within_queues(built: Parts, micro: int, verdict: Verdict) -> Verdict:
    """The verdict; where data.queue_gib would cut its change back to the loader that there is, with room for it."""
    if not verdict.changes.keys() & {"data.workers", "data.prefetch"}:
        return verdict
    recipe, source, device = built.recipe, built.splits.train, built.accelerator.device
    workers = verdict.changes.get("data.workers", built.loading.workers)
    prefetch = verdict.changes.get("data.prefetch", recipe.data.prefetch)

    def loader(room: data.Room) -> data.Loading:
        changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"prefetch": prefetch})})
        return data.loading(changed, source, micro=micro, num_ranks=1, device=device, count=workers, room=room)[0]

    if loader(built.room) != built.loading:
        return verdict
    each = prefetch if prefetch != "auto" else max(2, built.loading.prefetch)
    needed = workers * each * data.task_bytes(recipe, source, micro, device) / data.workers.GIB
    gib = float(np.ceil(100 * needed) / 100)
    held = f"{verdict.text}; that puts more into the queues than"
    if gib <= recipe.data.queue_gib or loader(data.workers.room(queue_gib=gib)) == built.loading:
        return Verdict(verdict.name, f"{held} memory or /dev/shm leave: free some, or lower batch.micro ({micro})")
    text = f"{held} data.queue_gib {recipe.data.queue_gib:g} allows: data.queue_gib={gib:g} as well"
    return Verdict(verdict.name, text, verdict.changes | {"data.queue_gib": gib})


def _computing(recipe: Recipe, shares: dict[str, float]) -> Verdict:
    parts_ = {name: shares[name] for name in ("forward", "backward", "optimizer")}
    most = max(parts_, key=parts_.__getitem__)
    return Verdict(
        "computing",
        f"nothing holds the device up: {most} takes {100 * parts_[most]:.0f} % of the time; precision=bf16 on a GPU "
        "that has it, smaller data.augment.scales or a smaller model.backbone are what is left",
    )
