"""Will a recipe fit, and how: memory by component, the largest micro-batch and what each lever saves, without a GPU.

``memory_fit`` tries the real thing before a run's first step. Here nothing is computed and nothing is needed: neither
the device, nor weights, nor (where the worst that they could bring is assumed) the data.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from detr_accel import data, models
from detr_accel.recipe import Recipe
from detr_accel.structures import UserError
from detr_accel.train import dry_step, memory_fit, parts
from detr_accel.train.dry_step import Layout, Peaks

GPU_GIB, NCCL_GIB, CPU_GIB = 1.0, 0.25, 1.0  # what cannot be counted; see ``_allowance``
_GIB = 2**30
_CHECKPOINTING, _SIZE = "model.activation_checkpointing", "data.augment.max_size"
_FROZEN, _EVALUATED = "model.backbone.frozen_stages", "evaluate.batch"
_QUICK_MODULES, _SHORT_RUN = 200, 100  # of the model; windows
_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Lever:
    """``setting``: what to change in the recipe; ``saves``: bytes of the peak; ``peak``: with it."""

    setting: str
    saves: int
    peak: int


@dataclass
class Plan:
    """What was found. Bytes are those of one device.

    fits: with ``settings``, where the recipe does not fit as it is. usable: what the counted bytes may come to: the
    memory less the allowance, and of that ``batch.memory_fraction``.
    """

    recipe: Recipe  # with the settings
    layout: Layout
    demands: data.Demands
    memory: int
    allowance: int
    usable: int
    micro: int
    largest_micro: int
    peaks: Peaks
    fits: bool
    settings: list[str] = field(default_factory=list)
    levers: list[Lever] = field(default_factory=list)
    remedy: str = ""  # where it does not fit: what would

    @property
    def share(self) -> int:
        """Images of a window that the fullest device has."""
        return len(data.share(self.recipe.batch.size, 0, self.layout.num_devices))

    @property
    def accumulation(self) -> int:
        """Micro-batches of the largest share of a window."""
        return -(-self.share // self.micro)

    @property
    def beware(self) -> str:
        """Where what ``auto`` finds has its price; else nothing."""
        is_auto = self.recipe.batch.micro == "auto"
        return memory_fit.too_few(self.recipe.model, self.micro, self.share) if is_auto else ""


def parse_memory(text: str) -> int:
    """ "16GiB", "16GB" or "16384MiB" -> bytes.

    Raises:
        UserError: no number, no unit, or nothing at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?\s*", text.lower())
    if found is None or float(found[1]) == 0:
        raise UserError(f"--memory {text}: give a number and its unit, for example 16GiB, 16GB or 16384MiB")
    return round(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2]])


def plan(
    recipe: Recipe, memory: int, *, devices: int = 1, precision: str | None = None, device: str = "auto",
    levers: bool = True, quiet: bool = True,
) -> Plan:  # fmt: skip
    """
    Args:
        memory: bytes of one device (on a CPU: of one process).
        devices: processes.
        precision: "no", "bf16" or "fp16"; None takes the recipe's, else float32.
        device: ``cuda``, ``cpu``, or ``auto``: a GPU unless the recipe says cpu.
        levers: whether to look at what each change would save, which takes two thirds of the time.
        quiet: no progress bar.
    Raises:
        UserError: the data are there and broken, or the recipe cannot run on so many devices.
    """
    if devices < 1:
        raise UserError(f"--devices {devices}: give the number of training processes, 1 or more")
    on_gpu = device == "cuda" or (device == "auto" and recipe.device != "cpu")
    layout = Layout(devices, on_gpu, precision or recipe.precision or "no")
    if layout.precision == "fp16" and not on_gpu:
        raise UserError("precision fp16 needs a GPU; plan with --precision bf16 or no")
    parts.batch_arithmetic(recipe.batch.size, 1, devices, recipe.batch.size)
    splits = data.build(recipe) if data.is_there(recipe) else None
    with tqdm(desc="plan", unit=" dry steps", disable=quiet or None, leave=False) as bar:
        return _Planner(recipe, splits, layout, memory, levers, bar).plan()


def at_start(built: parts.Parts, micro: int, checkpointed: Sequence[str]) -> float | None:
    """The peak of a run whose sizes are settled, in GiB; None where it would take longer than about two seconds (any
    ResNet-50) or the run is over in a moment, and on processes that say nothing."""
    accelerator = built.accelerator
    too_short = built.length.total < _SHORT_RUN
    if not accelerator.is_main_process or too_short or sum(1 for _ in built.bare.modules()) > _QUICK_MODULES:
        return None
    recipe = _set(built.recipe, _CHECKPOINTING, list(checkpointed))
    on_gpu = accelerator.device.type == "cuda"
    layout = Layout(accelerator.num_processes, on_gpu, accelerator.mixed_precision)
    try:
        return dry_step.run(recipe, data.demands(recipe, built.splits), micro, layout).bytes / _GIB
    except Exception:  # a plan that cannot be made must not end a run
        return None


def dry_run(recipe: Recipe, demands: data.Demands, micro: int, layout: Layout) -> Peaks:
    """``dry_step.run``, once for each question."""
    key = (_set(recipe, "batch.micro", 1).model_dump_json(), demands, micro, layout)
    if key not in _known:
        _known[key] = dry_step.run(recipe, demands, micro, layout)
    return _known[key]


_known: dict[tuple, Peaks] = {}


class _Planner:
    def __init__(
        self, recipe: Recipe, splits: data.Splits | None, layout: Layout, memory: int, levers: bool, bar: tqdm
    ) -> None:
        self.recipe, self.splits, self.layout, self.memory = recipe, splits, layout, memory
        self.levers, self.bar = levers, bar
        self.allowance = _allowance(layout)
        self.usable = int(recipe.batch.memory_fraction * max(0, memory - self.allowance))
        self.share = len(data.share(recipe.batch.size, 0, layout.num_devices))

    def plan(self) -> Plan:
        own = self.recipe.batch.micro
        least = 1 if own == "auto" else min(own, self.share)
        ways = list(self._ways())
        if own == self.recipe.model.activation_checkpointing == "auto":
            ways = [self._chosen(list(steps)) for _, steps in itertools.groupby(ways, key=lambda way: way[1:])]
        for recipe, precision, settings in ways:
            if not settings and self._fits(recipe, least, precision):
                micro = self._largest(recipe, precision) if own == "auto" else least
                return self._found(recipe, micro, precision, [])
        most = ways[-1]
        for recipe, precision, settings in ways if self._fits(most[0], 1, most[1]) else ():
            if self._fits(recipe, 1, precision):
                micro = min(self._largest(recipe, precision), self.share if own == "auto" else own)
                told = [] if own == "auto" or micro == least else [f"batch.micro={micro}"]
                return self._found(recipe, micro, precision, told + settings)
        return self._not_found(*most)

    def _chosen(self, steps: list[tuple[Recipe, str, list[str]]]) -> tuple[Recipe, str, list[str]]:
        """The step of activation checkpointing that a training would take by itself, see ``memory_fit.fit``."""
        wanted = memory_fit.least_wanted(self.recipe.model, self.share)
        return next((way for way in steps if self._fits(way[0], wanted, way[1])), steps[-1])

    def _ways(self) -> Iterable[tuple[Recipe, str, list[str]]]:
        """The recipe, and then with more and more levers, mildest first; what ``auto`` does by itself is no setting."""
        recipe, evaluation = self.recipe, []
        while self._evaluation_is_too_much(recipe):
            recipe = _set(recipe, _EVALUATED, recipe.evaluate.batch // 2)
            evaluation = [f"{_EVALUATED}={recipe.evaluate.batch}"]
        own = recipe.model.activation_checkpointing
        ladder = _ladder(recipe)
        steps = ladder if own == "auto" else [tuple(own), *(s for s in ladder if set(s) > set(own))]
        for precision in dict.fromkeys((self.layout.precision, "bf16" if self.layout.precision == "no" else None)):
            for step in steps if precision is not None else ():
                settings = [] if own == "auto" or step == tuple(own) else [_on(step)]
                changed = [] if precision == self.layout.precision else [f"precision={precision}"]
                yield _set(recipe, _CHECKPOINTING, list(step)), precision, evaluation + settings + changed

    def _evaluation_is_too_much(self, recipe: Recipe) -> bool:
        """Whether no lever of the training would help, and fewer images at a time in evaluation would."""
        peaks = self._peaks(recipe, 1, self.layout.precision)
        return peaks.moment == "evaluation" and peaks.bytes > self.usable and recipe.evaluate.batch > 1

    def _found(self, recipe: Recipe, micro: int, precision: str, settings: list[str]) -> Plan:
        peaks = self._peaks(recipe, micro, precision)
        largest = self._largest(recipe, precision)
        levers = [
            Lever(setting, peaks.bytes - (less := self._peaks(other, micro, kind).bytes), less)
            for other, kind, setting in (self._levers(recipe, precision) if self.levers else ())
        ]
        return Plan(
            recipe, Layout(self.layout.num_devices, self.layout.on_gpu, precision), self._demands(recipe), self.memory,
            self.allowance, self.usable, micro, largest, peaks, True, settings, levers,
        )  # fmt: skip

    def _not_found(self, recipe: Recipe, precision: str, settings: list[str]) -> Plan:
        """Not one image with every lever: how much memory, or how small a picture, would do."""
        peaks = self._peaks(recipe, 1, precision)
        enough = (peaks.bytes / self.recipe.batch.memory_fraction + self.allowance) / _GIB
        remedy = f"{enough:.1f} GiB would do with batch.micro=1 {' '.join(settings)}".rstrip()
        smaller = self._smaller(recipe, precision)
        if smaller is not None:
            remedy += f"; in {self.memory / _GIB:.1f} GiB the same with {_SIZE}={smaller}"
        elif peaks.moment != "evaluation":
            remedy += "; with less, take a smaller model.backbone.name or model.hidden_dim"
        if peaks.moment == "evaluation":
            remedy += "; most is held in evaluation: lower evaluate.batch, data.eval_size and data.eval_max_size"
        return Plan(
            recipe, Layout(self.layout.num_devices, self.layout.on_gpu, precision), self._demands(recipe), self.memory,
            self.allowance, self.usable, 1, 0, peaks, False, settings, [], remedy,
        )  # fmt: skip

    def _smaller(self, recipe: Recipe, precision: str) -> int | None:
        """The greatest max_size with which one image fits."""
        if recipe.model.name == "rtdetr" and not recipe.data.square:
            return None  # how many cells a rectangle has depends on the images
        sizes = range(_least_side(recipe), _longest(recipe), 32)
        low, high = -1, len(sizes)  # what fits, what does not
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._fits(_set(recipe, _SIZE, sizes[middle]), 1, precision)
            low, high = (middle, high) if fits else (low, middle)
        return None if low < 0 else sizes[low]

    def _levers(self, recipe: Recipe, precision: str) -> Iterable[tuple[Recipe, str, str]]:
        """Single changes to a recipe that is not using them, each with its words."""
        on = tuple(recipe.model.activation_checkpointing)
        everything = _ladder(recipe)[-1]
        for part in everything:
            if part not in on:
                step = tuple(p for p in everything if p in on or p == part)
                yield _set(recipe, _CHECKPOINTING, list(step)), precision, _on(step)
        if len(set(everything) - set(on)) > 1:
            yield _set(recipe, _CHECKPOINTING, list(everything)), precision, _on(everything)
        if precision == "no":
            yield recipe, "bf16", "precision=bf16"
        if recipe.evaluate.batch > 1 and self._peaks(recipe, 1, precision).moment == "evaluation":
            yield _set(recipe, _EVALUATED, 1), precision, f"{_EVALUATED}=1"
        size = max(_least_side(recipe), _longest(recipe) * 3 // 4 // 32 * 32)
        if size < _longest(recipe):
            yield _set(recipe, _SIZE, size), precision, f"{_SIZE}={size}"
        stages = _frozen_stages(recipe)
        if stages is not None:
            yield _set(recipe, _FROZEN, stages), precision, f"{_FROZEN}={stages}"

    def _largest(self, recipe: Recipe, precision: str) -> int:
        """The most images of those sizes that cut a share into parts as equal as can be; one fits already."""
        sizes = sorted({-(-self.share // cuts) for cuts in range(1, self.share + 1)})
        low, high = 0, len(sizes)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(recipe, sizes[middle], precision) else (low, middle)
        return sizes[low]

    def _fits(self, recipe: Recipe, micro: int, precision: str) -> bool:
        return self._peaks(recipe, micro, precision).bytes <= self.usable

    def _peaks(self, recipe: Recipe, micro: int, precision: str) -> Peaks:
        self.bar.update()
        layout = Layout(self.layout.num_devices, self.layout.on_gpu, precision)
        return dry_run(recipe, self._demands(recipe), micro, layout)

    def _demands(self, recipe: Recipe) -> data.Demands:
        return data.demands(recipe, self.splits)


def _allowance(layout: Layout) -> int:
    """What cannot be counted. On a GPU: CUDA's context and kernels, cuDNN's and cuBLAS's workspaces (a round figure,
    not a measurement), and NCCL's buffers where there are several. On a CPU: Python, the libraries and what the
    allocator keeps (0.8 to 1.0 GiB on one machine)."""
    if not layout.on_gpu:
        return round(CPU_GIB * _GIB)
    return round((GPU_GIB + (NCCL_GIB if layout.num_devices > 1 else 0)) * _GIB)


def _ladder(recipe: Recipe) -> list[tuple[str, ...]]:
    meta = models.build(recipe, 1, device="meta", load_weights=False)
    return models.checkpointing_ladder(meta)


def _longest(recipe: Recipe) -> int:
    """The greatest side of a training image, in pixels: of a square the largest scale, where that is within bounds."""
    augment = recipe.data.augment
    last = recipe.data.eval_size if augment.scales_stop < 1 else 0  # what the last windows are resized to
    return min(augment.max_size, max(*augment.scales, last)) if recipe.data.square else augment.max_size


def _least_side(recipe: Recipe) -> int:
    """Of an image, in steps of 32 pixels: RT-DETR needs a cell for each query."""
    if recipe.model.name != "rtdetr":
        return 32
    strides = [32 >> i for i in range(len(recipe.model.rtdetr.num_points))]
    fits = (s for s in itertools.count(32, 32) if models.num_cells(s, strides) >= recipe.model.num_queries)
    return next(fits)


def _on(step: Sequence[str]) -> str:
    return f"{_CHECKPOINTING}=[{','.join(step)}]"


def _frozen_stages(recipe: Recipe) -> int | None:
    """One part more than are frozen now; None where the builder would refuse it."""
    backbone = recipe.model.backbone
    if (backbone.weights == "none" and recipe.model.init_from is None) or recipe.optim.lr_backbone == 0:
        return None
    now = 2 if backbone.frozen_stages == "auto" else backbone.frozen_stages
    return now + 1 if now < 4 else None


def _set(section, key: str, value):
    """A copy of a recipe with one key changed."""
    name, _, rest = key.partition(".")
    inner = _set(getattr(section, name), rest, value) if rest else value
    return section.model_copy(update={name: inner})
