"""What a replay found, in words and as fields; how the cause is concluded is told in ``replay``."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from detr_accel.train.suspects import Fault, Image, TensorFault

if TYPE_CHECKING:
    from detr_accel.train.replay import Case, Outcome

CRITERION = "criterion"
ADVICE = {
    "data": "mend or remove this image's record; weights and learning rate are not at fault",
    "weights": "go back to an earlier checkpoint (health.on_nonfinite: rollback does) and halve optim.lr",
    "precision": "train with precision: bf16, or no where the GPU has no bf16",
    "arithmetic": "lower optim.lr and keep optim.clip_norm; if it comes back, report it with this capture",
}  # fmt: skip


@dataclass
class Report:
    """What a replay found. Fields without a value are None or empty."""

    capture: str
    window: int
    precision: str  # of the captured run: no, bf16 or fp16
    device: str  # where it was run again
    micro_batches: int
    num_images: int
    fails: bool = False
    failed_micro_batches: int = 0
    cause: str | None = None  # data, weights, precision or arithmetic
    verdict: str = ""
    advice: str = ""
    stage: str | None = None  # input, forward, loss, backward, norm or statistics
    module: str | None = None
    place: str = ""  # the module's place in words
    tensor: dict[str, Any] = field(default_factory=dict)  # see ``trace.Spot``
    terms: list[str] = field(default_factory=list)  # of the loss, that are not finite
    images: list[Image] = field(default_factory=list)  # to blame
    box: int | None = None  # of the first of them, from 0
    box_loss: float | None = None
    fails_in_float32: bool | None = None
    fails_in_float64: bool | None = None  # asked only where the run itself was in float32
    faults: list[Fault] = field(default_factory=list)  # of pixels, boxes and labels, fatal or not
    tensors: list[TensorFault] = field(default_factory=list)  # that are not finite or enormous
    notes: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, case: Case, faults: list[Fault], tensors: list[TensorFault]) -> Report:
        """Before anything has run."""
        about = case.about
        num_images = sum(map(len, case.images))
        report = cls(
            str(case.folder), about["window"], case.precision, case.device.type, len(case.batches), num_images,
            faults=faults, tensors=tensors,
        )  # fmt: skip
        if case.left_out:
            left_out = _count(case.left_out, "micro-batch")
            report.notes.append(f"left out of the capture for lack of room (health.capture_gib): {left_out}")
        if about["device"] != case.device.type:
            report.notes.append(
                f"captured on {about['device']} and run on {case.device.type}: sums are rounded otherwise and dropout "
                "draws other numbers"
            )
        return report

    def conclude(self, outcome: Outcome, higher_fails: bool | None, failed: list[Outcome]) -> None:
        """Fill in place, blame and cause.

        Args:
            outcome: of the first micro-batch that failed.
            higher_fails: whether float32 fails too, or float64 where the run was in float32; None: not asked.
            failed: of all micro-batches that did.
        """
        self.fails, self.failed_micro_batches = True, len(failed)
        if self.precision == "no":
            self.fails_in_float32, self.fails_in_float64 = (True if failed else None), higher_fails
        else:
            self.fails_in_float32 = higher_fails
        self.stage, self.terms, self.images = outcome.stage, outcome.terms, outcome.images
        self.box = outcome.box
        self.box_loss = None if math.isnan(outcome.box_loss) else outcome.box_loss
        if outcome.spot is not None:
            self.module, self.tensor = outcome.spot.module, asdict(outcome.spot)
        elif outcome.stage in ("loss", "backward"):
            self.module = CRITERION
        self._set_cause()
        self.place = place(self.module or "")
        self.advice = ADVICE[self.cause]

    def _set_cause(self) -> None:
        broken = [t for t in self.tensors if t.num_bad]
        if any(f.fatal for f in self.faults):
            self._blame_data([f for f in self.faults if f.fatal])
        elif broken:
            self._blame_weights(broken, "the model itself is not finite")
        elif faults := self._suspicious():
            self._blame_data(faults)
        elif self.precision != "no" and not self.fails_in_float32:
            self.cause = "precision"
            large = f"; weights are enormous too: {_some(self.tensors)}" if self.tensors else ""
            self.verdict = f"numbers pass what {self.precision} can hold, and float32 is finite{large}"
        elif self.tensors:
            self._blame_weights(self.tensors, "weights are enormous, as after a learning rate too high")
        else:
            self.cause = "arithmetic"
            self.verdict = f"{self.module or 'the model'} makes non-finite numbers of finite ones, in float32 too"
            if self.stage == "norm":
                self.verdict = "gradients are finite but so large that their norm is not, in float32 too"
            elif self.stage == "loss" and not self.images:
                self.verdict = "no image alone fails: look at the weights of the loss (loss.*) and its divisors"

    def _suspicious(self) -> list[Fault]:
        """Faults that a model may survive and this one did not: the blamed box, where the loss fails; else pixels of
        the blamed images, or of any where none alone is blamed."""
        blamed = {(i.micro_batch, i.index) for i in self.images}
        if self.stage == "loss":
            faults = [f for f in self.faults if f.kind == "box" and f.box == self.box and blamed]
        else:
            faults = [f for f in self.faults if f.kind == "pixels"]
        return [f for f in faults if not blamed or (f.image.micro_batch, f.image.index) in blamed]

    def _blame_data(self, faults: list[Fault]) -> None:
        self.cause = "data"
        self.images = list(dict.fromkeys(f.image for f in faults))
        self.box = next((f.box for f in faults if f.image == self.images[0] and f.box is not None), None)
        if self.box is None:
            self.box_loss = None
        self.verdict = f"{self.images[0]} came in broken: " + "; ".join(f.words for f in faults[:2])

    def _blame_weights(self, tensors: list[TensorFault], words: str) -> None:
        self.cause = "weights"
        passed_on = tensors[0].num_bad and not self.tensor.get("bad_weights") and self.stage != "statistics"
        if passed_on or self.module is None:  # what failed first only uses the bad tensor
            self.module = tensors[0].name.rpartition(".")[0]
        self.images, self.box, self.box_loss = [], None, None
        self.verdict = f"{words}: {_some(tensors)}"

    def to_json(self) -> dict[str, Any]:
        """Everything, with text for what json has no number for."""
        return _plain(asdict(self))

    def lines(self) -> list[str]:
        """About ten short lines."""
        name = precision_name(self.precision)
        head = f"capture: window {self.window}, {_count(self.num_images, 'image')} in "
        head += f"{_count(self.micro_batches, 'micro-batch')}, run again in {name} on {self.device}"
        if not self.fails:
            said = [head, "result: it does not fail again: loss, gradients and statistics are finite"]
            said += [f"found: {f.image}: {f.words}" for f in self.faults[:3]]
            said += [f"found: {t}" for t in self.tensors[:3]]
            return said + [f"note: {n}" for n in self.notes] + [_NOT_AGAIN]
        said = [head, self._result()]
        said += [*self._where(), f"image: {self._whom()}", f"box: {self._which_box()}", self._in_float32()]
        said += [f"cause: {self.cause}: {self.verdict}", f"do: {self.advice}"]
        return said + [f"note: {n}" for n in self.notes]

    def _result(self) -> str:
        if self.stage == "input":
            return "result: it cannot run"
        if self.stage in ("norm", "statistics"):
            return "result: it fails again, as a whole: each loss is finite"
        return f"result: it fails again, {self.failed_micro_batches} of {_count(self.micro_batches, 'micro-batch')}"

    def _where(self) -> list[str]:
        t, place = self.tensor, f" ({self.place})" if self.place else ""
        if self.module is None:
            return ["first: before any module"]
        if not t:
            terms = f": {', '.join(self.terms[:4])}" if self.terms else ""
            return [f"first: {self.module}{place}, while the predictions are finite{terms}"]
        rest = f"the others lie in {t['low']:.3g} .. {t['high']:.3g}" if t["low"] == t["low"] else "no other is left"
        total = math.prod(t["shape"])
        owner = f"{self.module}{place}"
        if t["module"] != self.module:
            owner += f"; seen first in {t['seen_first'] or t['module']}"
        said = [f"first: {owner}", f"tensor: {t['what']} {t['shape']}, {t['num_bad']} of {total} not finite; {rest}"]
        figures = {"largest |input|": t["peak_input"], "largest |weight|": t["peak_weight"]}
        figures = [f"{name} {value:.3g}" for name, value in figures.items() if value == value]
        return [*said, "there: " + ", ".join(figures)] if figures else said

    def _whom(self) -> str:
        if not self.images:
            return "none alone is to blame"
        more = f" and {len(self.images) - 3} more" if len(self.images) > 3 else ""
        return ", ".join(map(str, self.images[:3])) + more

    def _which_box(self) -> str:
        if self.box is None:
            return "none"
        loss = "" if self.box_loss is None else f", whose matched pair costs {self.box_loss:.4g}"
        return f"{self.box} of {_count_from_zero(self.images[0])}{loss}"

    def _in_float32(self) -> str:
        if self.fails_in_float32 is None:
            return "also fails in float32: not tried"
        if self.precision != "no":
            return f"also fails in float32: {_yes(self.fails_in_float32)}"
        return f"also fails in float32: yes, it was float32; in float64: {_yes(bool(self.fails_in_float64))}"


_NOT_AGAIN = (
    "do: nothing is proven against data or weights; try --device as captured, and watch whether the alarm comes back"
)
_PARTS = [
    (r"backbone\b", "backbone"),
    (r"input_proj", "projection of the features"),
    (r"query_embed", "object queries"),
    (r"class_embed", "class head"),
    (r"bbox_embed", "box head"),
    (r"criterion", "matching and losses"),
    (r"decoder\.input_proj", "projection of the encoder's maps"),
    (r"decoder\.enc_output", "candidates for queries"),
    (r"decoder\.enc_score_head", "class head of the candidates"),
    (r"decoder\.enc_bbox_head", "box head of the candidates"),
    (r"decoder\.query_pos_head", "positions of the queries"),
    (r"decoder\.denoising_class_embed", "disturbed labels"),
    (r"decoder\.tgt_embed", "object queries"),
    (r"encoder\.input_proj", "projection of the features"),
    (r"encoder\.lateral_convs", "between the encoder's maps"),
    (r"encoder\.(fpn|pan)_blocks", "fusion of the encoder's maps"),
    (r"encoder\.downsample_convs", "between the encoder's maps"),
]
_HEADS = {"score": "class head", "bbox": "box head"}
_INNER = [
    (r"self_attn", "self-attention"),
    (r"(multihead|cross)_attn", "cross-attention"),
    (r"linear[12]", "feed-forward"),
    (r"norm\d?", "norm"),
]


def place(module: str) -> str:
    """``transformer.decoder.layers.1.linear2`` -> "decoder layer 2, feed-forward"; "" where there is nothing to add."""
    for pattern, words in _PARTS:
        if re.match(pattern, module):
            return words
    if head := re.match(r"decoder\.dec_(score|bbox)_head\.(\d+)", module):
        return f"{_HEADS[head[1]]} of decoder layer {int(head[2]) + 1}"
    layer = re.match(r"(?:transformer|encoder|decoder)\.(encoder|decoder)(?:\.0)?\.layers\.(\d+)\.?(.*)", module)
    if not layer:
        return ""
    side, number, rest = layer.groups()
    inner = next((words for pattern, words in _INNER if re.match(pattern, rest)), "sums between its parts")
    return f"{side} layer {int(number) + 1}, {inner}"


def precision_name(precision: str) -> str:
    return "float32" if precision == "no" else precision


def _some(tensors: list[TensorFault]) -> str:
    tensors = sorted(tensors, key=lambda t: 0 if t.num_bad else -t.peak)  # of enormous ones the largest first
    more = f" and {len(tensors) - 2} more" if len(tensors) > 2 else ""
    return ", ".join(map(str, tensors[:2])) + more


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" + ("" if n == 1 else "es" if thing.endswith("ch") else "s")


def _count_from_zero(image: Image) -> str:
    return f"{image.name or f'image {image.image_id}'} (counted from 0)"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _plain(value: Any) -> Any:
    """json has no nan: written as text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
