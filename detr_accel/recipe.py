"""Every knob of a run: typed, with unit, range and meaning. ``load`` reads a YAML recipe, or refuses it in words.

A recipe file holds only what differs from the defaults below. Nothing outside this file, recipe_augment.py
(``data.augment``), recipe_model.py (``model``, ``loss``) and recipe_parts.py (``data.hub``) invents a knob, and no
class below floor 3 sees a recipe: the builders in each wing's ``__init__`` unpack it into plain arguments.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from detr_accel.recipe_augment import Augment
from detr_accel.recipe_model import DEFAULTS_OF, Backbone, Loss, Model, RtDetr, misfit, unwise
from detr_accel.recipe_parts import NO_STREAM, Fraction, Hub, Positive, Section, Text
from detr_accel.structures import UserError

__all__ = ["Augment", "Backbone", "Data", "Hub", "Loss", "Model", "Recipe", "RtDetr", "load", "loads"]

Watched = Literal["AP", "AP50", "AP75", "AR100", "loss"]


class Shapes(Section):
    """The procedural data set behind ``data.format: shapes``."""

    num_train: Positive = 4000
    """Images in the training split."""
    num_val: Positive = 200
    """Images in the validation split."""
    image_size: Annotated[int, Field(ge=64, le=2048)] = 192
    """Longest side of an image, in pixels; the other side varies between 0.75 of it and all of it."""
    max_objects: Annotated[int, Field(ge=1, le=100)] = 6
    """Most objects in one image."""
    empty_fraction: Fraction = 0.05
    """Share of images without any object."""
    colour_cue: Fraction = 0.0
    """Share of objects that have their class's colour: 0 leaves only the outline to tell the class, 1 is easiest."""


class Data(Section):
    """Where the images are and how they are read."""

    format: Literal["coco", "hub", "shapes"] = "coco"
    """``coco``: a folder with images and annotation json. ``hub``: a Hugging Face data set, on the Hub or on disk.
    ``shapes``: made on the fly, nothing to download."""
    root: Text | None = None
    """Folder of the data set. The usual layouts are found without being told."""
    hub: Hub = Hub()
    """A Hugging Face data set."""
    train_images: Text | None = None
    """Image folder of the training split, absolute or relative to root; found by itself when left out."""
    train_annotations: Text | None = None
    """COCO json of the training split, absolute or relative to root; found by itself when left out."""
    val_images: Text | None = None
    """As train_images, for the validation split."""
    val_annotations: Text | None = None
    """As train_annotations, for the validation split."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the images kept for validation when there is a single json or split; drawn by seed and saved."""
    on_bad: Literal["mend", "drop", "stop"] = "mend"
    """What happens to records and images that are odd or broken. ``mend``: repaired where nothing has to be guessed,
    else left out. ``drop``: left out. ``stop``: the run ends with a sentence about the first one. What was mended or
    left out is counted and named at the start; an image that cannot be read leaves its place in the window empty."""
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = "auto"
    """Loader processes per training process. 0 reads in the training process itself. ``auto``: a few at first, then as
    many as the first windows show to be faster than the device, within the cores and the memory there are. The training
    is the same bit for bit with any number."""
    prefetch: Positive | Literal["auto"] = "auto"
    """Micro-batches that each worker keeps ready. ``auto``: enough for the next window, and at least 2."""
    queue_gib: Annotated[float, Field(gt=0)] = 2.0
    """Most memory of the batches that wait in the queues of a training process, in GiB, counted with the largest batch
    that can come; an evaluation's queue, while it runs, has the same limit of its own. Fewer are kept ready where they
    would take more, or more than memory and /dev/shm have."""
    group_by_shape: bool = False
    """A window holds tall, square or wide images, so that they pad each other less: less memory and time, and the same
    number of windows. What counts is the shape that training sees, after the crop. Still random: the order within a
    shape and of the windows is drawn for each epoch."""
    cache: Literal["none", "ram", "disk"] = "none"
    """Keep decoded images, no larger than they are needed, for the next epochs and runs. ``disk``: in cache_folder.
    ``ram``: in memory, shared by all processes, until the run ends. An epoch then reads no file and decodes nothing."""
    cache_folder: Text | None = None
    """Where ``cache: disk`` lies; null: ~/.cache/detr_accel. A changed file or size makes another; delete at will."""
    pixels: Literal["auto", "workers", "device"] = "auto"
    """Where training images are resized and normalised. ``device``: on the training device, so that workers only read
    and decode. ``auto``: there on a GPU, else in the workers."""
    augment: Augment = Augment()
    """What training does to images: geometry, colours, mosaics."""
    eval_size: Positive = 800
    """Short side at evaluation and prediction, in pixels."""
    eval_max_size: Positive = 1333
    """Upper bound of the long side at evaluation and prediction, in pixels."""
    square: bool = False
    """Squeeze images to squares, in training, evaluation and prediction, as RT-DETR does: augment.scales and eval_size
    are their sides. No padding, but what is narrow gets wide."""
    shapes: Shapes = Shapes()
    """The procedural data set."""


class BatchSize(Section):
    """Images per optimizer step, and how a step is cut."""

    size: Positive = 16
    """Images per optimizer step, over all processes. The learning rate belongs to it; it never changes by itself."""
    micro: Positive | Literal["auto"] = 2
    """Images per process and forward (RT-DETR: 4). Accumulation follows: size / (micro x processes), rounded up.
    ``auto``: as many as fit, found by trying the worst window of the data before the first step; kept on resume."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """How much of the memory that is free at the start ``auto`` may plan with."""


class Optim(Section):
    """AdamW."""

    lr: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate of the transformer and the heads."""
    lr_backbone: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate of the backbone; 0 freezes it whole."""
    lr_backbone_norms: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the backbone's normalisation layers where they train (model.backbone.norm: live); null: as
    lr_backbone (DEIM: that of the heads, 2e-4)."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's decay, on every parameter but those of no_decay."""
    no_decay: list[Literal["norms", "biases"]] = []
    """What does not decay: scales and shifts of normalisation layers, and biases elsewhere. DETR decays everything
    (RT-DETRv2: [norms])."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's averaging of gradients and of their squares."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's guard against division by zero."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 0.1
    """Upper bound of the gradient's total L2 norm; null switches it off."""
    clip_value: Annotated[float, Field(gt=0)] | None = None
    """Upper bound of each gradient component; null switches it off. Not together with clip_norm."""

    @model_validator(mode="after")
    def _one_clip(self) -> Optim:
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("set clip_norm or clip_value, not both: write clip_norm: null to clip by value")
        return self


class Schedule(Section):
    """How long, and how the learning rate moves."""

    epochs: Annotated[float, Field(gt=0)] = 300
    """Length of the training, in passes over the training split."""
    steps: Positive | None = None
    """Length in optimizer steps; takes the place of epochs when set."""
    kind: Literal["step", "cosine", "flat_cosine", "constant", "plateau"] = "step"
    """``step``: multiply by gamma at each of drop_at. ``cosine``: fall to min_factor at the end. ``flat_cosine``: stay,
    then fall to min_factor over ``fall``, then stay there (DEIM). ``plateau``: multiply by gamma whenever ``patience``
    evaluations in a row brought nothing better."""
    drop_at: list[Annotated[float, Field(gt=0, lt=1)]] = [0.6667]
    """Fractions of the training at which ``step`` drops (DETR: 200 of 300 epochs, 400 of 500)."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What ``step`` and ``plateau`` multiply by at each drop."""
    min_factor: Fraction = 0.0
    """What cosine and flat_cosine leave of the learning rate at the end, and plateau at the least."""
    fall: tuple[Fraction, Fraction] = (0.5, 1.0)
    """Fractions of the training between which ``flat_cosine`` falls (DEIM: 0.567 to 0.967, epochs 34 to 58 of 60)."""
    patience: Positive = 3
    """Evaluations without a better ``metric`` after which ``plateau`` drops."""
    metric: Watched = "AP"
    """What ``plateau`` watches; ``loss`` is that of the validation split, where less is better."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    warmup: Literal["linear", "quadratic"] = "linear"
    """How it rises: ``quadratic`` is slower at first (DEIM)."""
    return_to_best: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of the training at which the weights, their average and the optimizer's moments become those of the best
    evaluation so far (DEIM: 0.967, where its strong augmentation ends); null: never. The learning rate and the samples
    go on. The validation split has a say in the training then: measure the end result on another."""

    @model_validator(mode="after")
    def _it_falls_forward(self) -> Schedule:
        if self.fall[0] > self.fall[1]:
            raise ValueError(f"fall is [first, last], but {self.fall[0]:g} > {self.fall[1]:g}")
        return self


class Ema(Section):
    """Exponential moving average of the weights."""

    enabled: bool = False
    """When on, both weights are kept, and evaluation uses the average."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9998
    """How much of the average stays at each step."""
    warmup_steps: Positive = 2000
    """The decay in force after t steps is decay * (1 - exp(-t / warmup_steps))."""


class Evaluate(Section):
    """COCO metrics on the validation split."""

    every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """How often, in epochs; the end of the training is always evaluated."""
    batch: Positive = 2
    """Images per process and forward."""
    max_detections: Positive = 100
    """Most detections of an image and class that count (COCO: 100)."""
    backend: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """hotcoco gives the same digits, about a hundred times faster."""
    metric: Literal["AP", "AP50", "AP75", "AR100"] = "AP"
    """By which ``best`` is chosen."""
    panel_images: Annotated[int, Field(ge=0, le=64)] = 8
    """Validation images shown with true and predicted boxes in W&B."""
    raw: bool = False
    """Evaluate the trained weights too where an average is kept (logged as val/raw/...): twice the time."""
    train_images: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Training images whose loss is taken at each evaluation as that of the validation split is (no augmentation, no
    dropout, the same weights): where the two part, the model overfits. ``auto``: 2 % of the images trained on between
    two evaluations, at most 512, about 1 % of the time. 0: none."""


class EarlyStop(Section):
    """Ends a run that no longer gets better."""

    patience: Positive | None = None
    """Evaluations in a row without a better ``metric`` after which the run ends; null: it runs to its end."""
    metric: Watched = "AP"
    """What is watched; ``loss`` is that of the validation split, where less is better."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """How much better than the best so far counts as better: 0.001 is 0.1 AP."""
    min_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs before which no run is ended."""


class Checkpoint(Section):
    """State that a run can go on from."""

    every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """How often, in epochs; the end of the training is always saved."""
    every_steps: Positive | None = None
    """How often, in windows, beside every_epochs."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """How often by the clock, beside the others; checkpoints that come by the clock are no target of a rollback."""
    keep: Positive = 2
    """How many of the newest stay on disk; the best one and the target of a rollback stay beside them."""


class Health(Section):
    """What happens to a window whose loss or gradient is not finite."""

    on_nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """``skip``: it changes nothing, is counted and alarmed, and the run goes on. ``rollback``: after several of them,
    back to the last checkpoint with a lower learning rate; the samples go on. ``stop``: the run ends."""
    strikes: Positive = 3
    """How many such windows within ``within`` cause a rollback."""
    within: Positive = 200
    """Over how many windows strikes are counted."""
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """What each rollback multiplies the learning rate by."""
    give_up_after: Positive = 50
    """So many such windows in a row end the run, whatever the policy: nothing is learned any more."""
    overflow_patience: Positive = 50
    """fp16 overflows in a row that belong to the search for a scale; more of them raise an alarm."""
    captures: Annotated[int, Field(ge=0)] = 3
    """How many such windows are kept in captures/ for ``detr-accel replay``: the first ones, which show the cause."""
    capture_gib: Annotated[float, Field(gt=0)] = 4.0
    """Most disk space of all captures together, in GiB."""


class Alarms(Section):
    """Words about a run that does not learn as it should: docs/not-learning.md has them all. They change nothing."""

    enabled: bool = True
    """Judge every window and every evaluation."""
    off: list[Text] = []
    """Titles of alarms that are not to speak, such as ``Plateau``."""
    again_after: Positive = 1000
    """Windows until an alarm that goes on is said again."""


class Wandb(Section):
    """Weights & Biases. Without an account or key the run is written offline; it never asks and never hangs."""

    enabled: bool = True
    """Write a W&B run."""
    project: str = "detr_accel"
    """The W&B project."""
    entity: str | None = None
    """User or team; null takes the account's default."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: list[str] = []
    """Labels to filter by."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """``auto``: online with a key, offline without."""
    upload_weights: bool = False
    """Send the best checkpoint as an artifact."""


class Log(Section):
    every: Positive = 10
    """Windows between two logged rows; the numbers are read from the device only then."""
    wandb: Wandb = Wandb()
    """Weights & Biases."""


class Dist(Section):
    """Between processes."""

    overlap: bool = False
    """Reduce gradients during the last backward of a window (for slow interconnects) instead of after it."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    """How long a process waits for the others before the run is given up."""


class Recipe(Section):
    """One file = one run = what differs from these defaults."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """The run lives in runs/NAME."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Of initial weights, sample order, augmentation and dropout."""
    deterministic: bool = False
    """Deterministic kernels everywhere: repeatable bit for bit on one machine, and slower on a GPU."""
    precision: Literal["no", "bf16", "fp16"] | None = None
    """Mixed precision. null takes the launcher's choice (accelerate_config.yaml); a conflict with it is refused."""
    device: Literal["auto", "cpu"] = "auto"
    """``cpu`` keeps the run off a GPU that is there."""
    data: Data = Data()
    """Where the images are."""
    model: Model = Model()
    """The detector."""
    loss: Loss = Loss()
    """Loss terms and matching."""
    batch: BatchSize = BatchSize()
    """Images per step."""
    optim: Optim = Optim()
    """The optimizer."""
    schedule: Schedule = Schedule()
    """Length and learning rate."""
    ema: Ema = Ema()
    """Averaged weights."""
    evaluate: Evaluate = Evaluate()
    """Metrics."""
    early_stop: EarlyStop = EarlyStop()
    """The end before the end."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    health: Health = Health()
    """Windows that are not finite."""
    alarms: Alarms = Alarms()
    """Runs that do not learn."""
    log: Log = Log()
    """Reporting."""
    dist: Dist = Dist()
    """Several processes."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        backbone = self.model.backbone
        if self.data.format == "coco" and self.data.root is None and self.data.train_annotations is None:
            raise ValueError("data.root is not set: give the folder of the data set, for example data.root=/data/coco")
        if self.data.format == "shapes" and self.data.root is not None:
            raise ValueError(
                f"data.root is {self.data.root} while data.format is shapes, which reads no files: set "
                "data.format=coco (or hub) too, or let `detr-accel start FOLDER` write a recipe for it"
            )
        if self.data.format == "hub" and (self.data.root is None) == (self.data.hub.name is None):
            raise ValueError("set one of data.hub.name (a set on the Hub) and data.root (a folder or .parquet file)")
        augment = self.data.augment
        needs_all = (
            self.data.group_by_shape or self.data.cache != "none" or self.evaluate.train_images not in (0, "auto")
            or augment.mosaic.probability > 0 or augment.mixup.probability > 0
        )  # fmt: skip
        if self.data.format == "hub" and self.data.hub.streaming and needs_all:
            raise ValueError(NO_STREAM)
        if backbone.weights == "none" and self.model.init_from is None and backbone.norm == "frozen":
            raise ValueError(
                "model.backbone.norm is frozen while model.backbone.weights is none: frozen statistics on random "
                "weights destroy the signal; use norm: live (or auto)"
            )
        if why := misfit(self.model, self.loss):
            raise ValueError(why)
        return self


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, is_new: bool = True) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        overrides: ``key=value`` with a dotted key; the value is read as YAML.
        is_new: False for a run that may go on: what only new runs are refused for is left to ``check_new``.
    Raises:
        UserError: one line for every mistake, with line, key, value, what is allowed, and the nearest known key.
    """
    tree, lines = _read_yaml(Path(path))
    for text in overrides:
        _apply_override(tree, lines, text)
    recipe = _validate(tree, lines, str(path))
    if is_new:
        check_new(recipe, f"{path}: ")
    return recipe


def check_new(recipe: Recipe, source: str = "") -> None:
    """
    Raises:
        UserError: it says what no new run should be begun with, and older ones may have been.
    """
    if why := _unwise(recipe):
        raise UserError("\n".join(f"{source}{text}" for text in why))


def _unwise(recipe: Recipe) -> list[str]:
    """What a person's own recipe should not say, and a finished run's may have said."""
    d, optim = recipe.data, recipe.optim
    why = unwise(recipe.model, recipe.loss, optim.lr_backbone, optim.lr_backbone_norms)
    if d.square and d.eval_size > d.eval_max_size:
        why.append(
            f"data.eval_size is {d.eval_size} with data.square, and data.eval_max_size ({d.eval_max_size}) bounds "
            "every side: raise it too"
        )
    if (most := d.augment.mosaic.scale[1]) > 2:
        why.append(f"data.augment.mosaic.scale goes up to {most:g}, and caches and queues count on 2: make it less")
    return why


def loads(text: str, source: str = "recipe") -> Recipe:
    """As ``load``, from a string (a resolved recipe inside a checkpoint)."""
    tree, lines = _parse(text, source)
    return _validate(tree, lines, source)


def changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A stored recipe with some keys set, as on the command line.

    Raises:
        UserError: as ``load``.
    """
    tree, lines = _parse(dumps(recipe), "the stored recipe")
    for text in overrides:
        _apply_override(tree, lines, text)
    found, before = _validate(tree, lines, "the stored recipe"), _unwise(recipe)
    if why := [text for text in _unwise(found) if text not in before]:
        raise UserError("\n".join(why))
    return found


def dumps(recipe: Recipe) -> str:
    """The resolved recipe as YAML; ``loads(dumps(r)) == r``, and it can be launched again as it is."""
    out = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(json.loads(recipe.model_dump_json()), out)
    return out.getvalue()


def schema() -> str:
    """JSON schema of a recipe, for completion in editors."""
    return json.dumps(Recipe.model_json_schema(), indent=1) + "\n"


def folder() -> Path:
    """Where the shipped recipes are: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def _read_yaml(path: Path) -> tuple[dict, dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = f"; shipped ones in {folder()}: {', '.join(sorted(p.name for p in folder().glob('*.yaml')))}"
        what = f"no recipe at {path}{known}" if path.suffix in (".yaml", ".yml") else f"no folder or recipe at {path}"
        raise UserError(what) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {error}") from None
    return _parse(text, str(path))


def _parse(text: str, source: str) -> tuple[dict, dict[str, str]]:
    try:
        tree = YAML(typ="rt").load(text)
        plain = _plain(tree, source)
    except YAMLError as error:
        raise UserError(_not_yaml(error, text, source)) from None
    except UserError:
        raise
    except ValueError as error:  # a date that is none, such as 2026-25-11
        raise UserError(f"{source}: a value that looks like a date is none ({error}): put it in quotes") from None
    except RecursionError:
        raise UserError(
            f"{source}: nested without end: a recipe has a few levels, and no anchor inside itself"
        ) from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UserError(f"{source}: a recipe is a mapping of keys to values, not a {type(tree).__name__}")
    lines: dict[str, str] = {}
    _collect_lines(tree, "", source, lines, f"{source}, line 1")
    return plain, lines


def _not_yaml(error: YAMLError, text: str, source: str) -> str:
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        return f"{where}: not valid YAML: {error.problem}"
    line = text.count("\n", 0, getattr(error, "position", 0)) + 1
    reason = getattr(error, "reason", None) or str(error).partition("\n")[0]
    character = getattr(error, "character", None)
    named = f" (U+{character:04X})" if isinstance(character, int) else ""
    where = source if source == "command line" else f"{source}, line {line}"
    return f"{where}: not valid YAML: {reason}{named}; remove the character"


def _collect_lines(tree: Any, prefix: str, source: str, lines: dict[str, str], above: str) -> None:
    """``above``: the place of the section itself, which stands for keys that a merge (``<<``) brought in."""
    places = tree.lc.data or {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        lines[dotted] = f"{source}, line {places[key][0] + 1}" if key in places else above
        if isinstance(value, dict):
            _collect_lines(value, f"{dotted}.", source, lines, lines[dotted])


def _plain(node: Any, source: str) -> Any:
    """ruamel's round-trip types -> plain ones. (Its floats and ints are subclasses that strict validation would accept,
    but that do not survive json.)

    Raises:
        UserError: a tag such as ``!!python/object``, which a recipe has no use for.
    """
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag == "tag:yaml.org,2002:str":
        return str(node)
    if tag not in (None, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise UserError(f"{source}: the YAML tag {tag} is refused: a recipe holds plain values only; remove the tag")
    if isinstance(node, dict):
        return {str(k): _plain(v, source) for k, v in node.items()}
    if isinstance(node, list):
        return [_plain(v, source) for v in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _apply_override(tree: dict, lines: dict[str, str], text: str) -> None:
    key, sep, value = text.partition("=")
    key = key.strip().removeprefix("--")
    if not sep or not key:
        raise UserError(f"{text!r} is not an override; write key=value, for example optim.lr=5e-5")
    parsed = _read_value(value)
    node = tree
    *parents, leaf = key.split(".")
    _check_parents(key)
    for depth, parent in enumerate(parents, start=1):
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
            lines[".".join(parents[:depth])] = "command line"
        node = node[parent]
    if isinstance(parsed, dict) and isinstance(node.get(leaf), dict):
        node[leaf].update(parsed)
    else:
        node[leaf] = parsed
    lines[key] = "command line"


def _read_value(text: str) -> Any:
    """An override's value as YAML; what is no YAML is text."""
    try:
        return _plain(YAML(typ="rt").load(text), "command line") if text.strip() else None
    except UserError:
        raise
    except (MarkedYAMLError, ValueError):  # ValueError: a date that is none
        return text
    except (YAMLError, RecursionError) as error:
        what = (
            _not_yaml(error, text, "command line") if isinstance(error, YAMLError) else "command line: nested too deep"
        )
        raise UserError(what) from None


def _check_parents(key: str) -> None:
    """
    Raises:
        UserError: an empty part, or a part that is a value where a section should be.
    """
    parts, known = key.split("."), _known()
    if not all(parts):
        raise UserError(f"command line: {key!r} has an empty part between its dots; write SECTION.KEY=VALUE")
    for depth in range(1, len(parts)):
        above = ".".join(parts[:depth])
        if above in known and not any(k.startswith(f"{above}.") for k in known):
            raise UserError(f"command line: {key}: no such key: {above} is a value, not a section; set {above} itself")


def _validate(tree: dict, lines: dict[str, str], source: str) -> Recipe:
    try:
        # lists in YAML stand for tuples; strict validation through json accepts them and stays strict otherwise
        return Recipe.model_validate_json(json.dumps(_for_its_detector(tree), default=str))
    except ValidationError as error:
        raise UserError("\n".join(_rows([_explain(e, lines, source) for e in error.errors()]))) from None


def _for_its_detector(tree: dict) -> dict:
    """With the defaults of the detector that it names, where they differ. (No validator of pydantic's: one that looks
    before the types do takes json's strictness away.)"""
    model = tree.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    defaults = DEFAULTS_OF.get(name, {}) if isinstance(name, str) else {}
    for section, values in defaults.items():
        if isinstance(tree.get(section, {}), dict):
            tree = {**tree, section: values | tree.get(section, {})}
    return tree


def _rows(told: list[str]) -> list[str]:
    """One row for each refused value: what may be a number or a word is refused once for each."""
    rows: dict[str, str] = {}
    for text in told:
        value, refused, allowed = text.partition(" is refused: it ")
        known = rows.get(value)
        if known is None:
            rows[value] = text
        elif refused and known != text:
            rows[value] = f"{known}, or {allowed.removeprefix('should be ')}"
    return list(rows.values())


def _explain(error: Any, lines: dict[str, str], source: str) -> str:
    # pydantic appends the tried member of a union to the location; those parts are no keys
    parts: list[str] = []
    for part in error["loc"]:
        if isinstance(part, str) and (".".join([*parts, part]) not in _known() and error["type"] != "extra_forbidden"):
            break
        parts.append(str(part))
    key = ".".join(parts)
    named = ".".join(p for p in parts if not p.isdigit())
    where = lines.get(named) or lines.get(named.rpartition(".")[0]) or source
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        if "." in str(error["loc"][-1]) and key in _known():
            *sections, leaf = key.split(".")
            nested = ": {".join([*sections, f"{leaf}: ..."]) + "}" * len(sections)
            return f"{where}: {key} is written with dots on the command line only; here: {nested}"
        near = difflib.get_close_matches(key, _known(), n=1, cutoff=0.6) or _same_leaf(key)
        hint = f"did you mean {near[0]}?" if near else "detr-accel recipes --schema FILE writes down all there are"
        return f"{where}: {key}: no such key; {hint}"
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        return f"{where}: {key}: {text}" if key else f"{source}: {text}"
    return f"{where}: {key}: {json.dumps(value, default=str)} is refused: {_allowed(error)}"


def _allowed(error: Any) -> str:
    message = error["msg"][0].lower() + error["msg"][1:]
    for theirs, ours in _PLAIN_WORDS.items():
        message = message.replace(theirs, ours)
    if message.startswith("input should be"):
        return "it" + message.removeprefix("input")
    if error["type"] == "string_too_short":
        return "it should not be empty; leave the key out, or write null, for none"
    return message


_PLAIN_WORDS = {
    "an object": "a section with keys below it, or not there", "a valid array": "a list, such as [480, 640]",
    "a valid list": "a list, such as [480, 640]", "a valid string": "text (a number or date in quotes)",
}  # fmt: skip


def _same_leaf(key: str) -> list[str]:
    leaf = key.rpartition(".")[2]
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(_known())}
    near = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)
    return [by_leaf[near[0]]] if near else []


def _known(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += _known(info.annotation, f"{prefix}{name}.")
    return keys


def headline(path: Path) -> str:
    """The first comment line of a recipe that says something."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and not text.startswith("yaml-language-server"):
            return text
    return ""
