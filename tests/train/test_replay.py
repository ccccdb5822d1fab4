"""Faults are put into real windows, kept by the trainer's own hand, and must be named by ``detr-accel replay``."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from shared import load_module

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.structures import Batch, UserError
from detr_accel.train import parts, replay
from detr_accel.train.capture import CAPTURE, Captures
from detr_accel.train.checkpoint import State
from detr_accel.train.launch import make_accelerator

runs = load_module(Path(__file__).parents[1] / "integration" / "runs.py")

RECIPE = "name: faulty\ndata: {format: shapes}\nmodel: {backbone: {name: test_resnet, weights: none, norm: live}}\n"
LAYER = "transformer.decoder.layers.1"


class World:
    """A small detector and the window that it meets next; ``capture`` keeps a faulty one as training would."""

    def __init__(self, folder: Path) -> None:
        (folder / "r.yaml").write_text(RECIPE)
        recipe = recipes.load(folder / "r.yaml", [*runs.TINY, "data.workers=0"])
        accelerator = make_accelerator("no", "cpu")
        splits = data.build(recipe, None)
        parts.seed_everything(0, False)
        self.built = parts.build(recipe, accelerator, splits, resume=False)
        self.clean = {k: v.clone() for k, v in self.built.bare.state_dict().items()}
        windows = data.train_windows(
            recipe, splits.train, rank=0, num_ranks=1, start_window=0, end_window=1, mean=self.built.bare.mean,
            std=self.built.bare.std,
        )  # fmt: skip
        self.window = next(windows)
        assert len(self.window) == 2 and all(len(b) == 4 for b in self.window)

    def copies(self) -> list[Batch]:
        """The window, to be spoiled."""
        batches = [b.to("cpu") for b in self.window]
        for batch in batches:
            batch.images = batch.images.clone()
            for target in batch.targets:
                target.boxes_cxcywh = target.boxes_cxcywh.clone()
        return batches

    def capture(self, folder: Path, spoil: Callable, precision: str = "no", must_fail: bool = True) -> Path:
        bare, batches = self.built.bare, self.copies()
        bare.load_state_dict(self.clean)
        try:
            with torch.no_grad():
                spoil(bare, batches)
            result = self.built.runner.run(batches)
            assert result.trained and (not must_fail or not result.finite)
            self.built.runner.forward_state.restore()
            kept = Captures(self.built, folder).save(State(window=7, step=6), result, batches)
        finally:
            self.built.runner.discard()
            bare.load_state_dict(self.clean)
        edit(kept, precision=precision)  # training refuses fp16 on a CPU, autocast does not
        return kept


def edit(folder: Path, **changes) -> None:
    path = folder / CAPTURE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def healthy(world, tmp_path_factory):
    return world.capture(tmp_path_factory.mktemp("healthy"), lambda model, batches: None, must_fail=False)


class Backward(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor, for one image or for all."""

    @staticmethod
    def forward(ctx, x, image, factor):
        ctx.image, ctx.factor = image, factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.image] *= ctx.factor
        return grad, None, None


# --- the faults


@dataclass
class Fault:
    """``spoil`` changes model and batches before the window is captured, ``rig`` the case before it is run again.

    module, image (micro-batch of the window, index), box, cause, float32: what must be said.
    """

    name: str
    module: str
    cause: str
    image: tuple[int, int] | None = None
    box: int | None = None
    float32: bool = True
    precision: str = "no"
    spoil: Callable = lambda model, batches: None
    rig: Callable = lambda case: None
    must_fail: bool = True


def pixels(batch: int, image: int, value: float) -> Callable:
    def spoil(model, batches):
        batches[batch].images[image, 1, 20, 30] = value

    return spoil


def box(batch: int, image: int, number: int, coordinate: int, value: float) -> Callable:
    def spoil(model, batches):
        batches[batch].targets[image].boxes_cxcywh[number, coordinate] = value

    return spoil


def weight(name: str, value: float) -> Callable:
    """One entry of a parameter or buffer."""

    def spoil(model, batches):
        model.state_dict()[name].flatten()[3] = value

    return spoil


def scaled(name: str, factor: float) -> Callable:
    def spoil(model, batches):
        model.state_dict()[name].mul_(factor)

    return spoil


def hooked(module: str, image: int | slice, factor: float = float("nan"), every: bool = False) -> Callable:
    """A faulty backward, in the first of two micro-batches or in both."""

    def rig(case):
        calls = itertools.count()

        def hook(m, inputs, out):
            return Backward.apply(out, image, factor) if next(calls) % 2 == 0 or every else None

        case.model.get_submodule(module).register_forward_hook(hook)

    return rig


def loss_weight(case) -> None:
    case.criterion.weights["giou"] = float("nan")


def both(*spoils: Callable) -> Callable:
    def spoil(model, batches):
        for one in spoils:
            one(model, batches)

    return spoil


NAN, INF = float("nan"), float("inf")
STEM, BLOCK = "backbone.body.conv1.0", "backbone.body.layer2.0.conv1"
FAULTS = [
    Fault("NaN pixel", STEM, "data", (1, 2), spoil=pixels(1, 2, NAN)),
    Fault("Inf pixel", STEM, "data", (0, 3), spoil=pixels(0, 3, INF)),
    # a convolution still holds it; the variance of the norm behind it, conv1.1, does not
    Fault("pixel of 3e38", "backbone.body.conv1.1", "data", (0, 1), spoil=pixels(0, 1, 3e38)),
    Fault("NaN box", "criterion", "data", (0, 0), 1, spoil=box(0, 0, 1, 2, NAN)),
    Fault("Inf box", "criterion", "data", (1, 1), 0, spoil=box(1, 1, 0, 0, INF)),
    Fault("box of 1e30 widths", "criterion", "data", (1, 0), 0,
          spoil=both(box(1, 0, 0, 2, 1e30), box(1, 0, 0, 3, 1e30))),
    Fault("NaN box among degenerate ones", "criterion", "data", (0, 2), 0,
          spoil=both(box(0, 0, 0, 2, 0.0), box(0, 2, 0, 3, NAN))),
    Fault("NaN in a convolution", BLOCK, "weights", spoil=weight(BLOCK + ".weight", NAN)),
    Fault("Inf in a decoder linear", LAYER + ".linear1", "weights", spoil=weight(LAYER + ".linear1.weight", INF)),
    Fault("NaN in the class head's bias", "class_embed", "weights", spoil=weight("class_embed.bias", NAN)),
    Fault("NaN in an attention's projection", LAYER + ".self_attn", "weights",
          spoil=weight(LAYER + ".self_attn.in_proj_weight", NAN)),
    Fault("NaN query", "query_embed", "weights", spoil=weight("query_embed.weight", NAN)),
    Fault("NaN running mean", "backbone.body.bn1", "weights", spoil=weight("backbone.body.bn1.running_mean", NAN)),
    Fault("weights and a degenerate box", LAYER + ".linear2", "weights",
          spoil=both(box(0, 0, 0, 2, 0.0), weight(LAYER + ".linear2.weight", NAN))),
    Fault("overflow of fp16 alone", "input_proj", "precision", float32=False, precision="fp16",
          spoil=scaled("input_proj.weight", 1e6), must_fail=False),
    Fault("overflow of fp16 in the class head", "class_embed", "precision", float32=False, precision="fp16",
          spoil=scaled("class_embed.weight", 5e4), must_fail=False),
    Fault("overflow of float32 in a linear", LAYER + ".linear2", "weights",
          spoil=both(scaled(LAYER + ".linear1.weight", 1e25), scaled(LAYER + ".linear2.weight", 1e25))),
    Fault("overflow of float32 in bf16", "input_proj", "weights", precision="bf16",
          spoil=scaled("input_proj.weight", 3e38)),
    Fault("NaN loss weight", "criterion", "arithmetic", rig=loss_weight, must_fail=False),
    Fault("NaN gradient of one image in the decoder", LAYER + ".linear1", "arithmetic", (0, 2),
          rig=hooked(LAYER + ".linear1", 2), must_fail=False),
    Fault("NaN gradient of one image in the encoder", "transformer.encoder.layers.0.norm1", "arithmetic", (0, 1),
          rig=hooked("transformer.encoder.layers.0.norm1", 1), must_fail=False),
    Fault("NaN gradient of one image in the backbone", BLOCK, "arithmetic", (0, 3), rig=hooked(BLOCK, 3),
          must_fail=False),
    Fault("NaN gradient of all images of all micro-batches", LAYER + ".norm2", "arithmetic",
          rig=hooked(LAYER + ".norm2", slice(None), every=True), must_fail=False),
    Fault("finite gradients, infinite norm", "backbone.body.conv1.0", "arithmetic",
          rig=hooked("input_proj", slice(None), 1e28, every=True), must_fail=False),
    Fault("NaN gradient in the stem, whose input has none", STEM, "arithmetic", rig=hooked(STEM, 0), must_fail=False),
]  # fmt: skip


def run(world: World, folder: Path, fault: Fault) -> replay.Report:
    kept = world.capture(folder / fault.name.replace(" ", "-"), fault.spoil, fault.precision, fault.must_fail)
    case = replay.load(kept, "cpu")
    fault.rig(case)
    return replay.diagnose(case, quiet=True)


def wrong(world: World, fault: Fault, report: replay.Report) -> list[str]:
    """What the report says and should not. Several images where one was spoiled are wrong."""
    ids = [t.image_id for b in world.window for t in b.targets]
    image = [divmod(ids.index(i.image_id), 4) for i in report.images] or None
    image = image[0] if image and len(image) == 1 else image
    in_backward = report.stage == "backward"  # there the box is the costliest, not a broken one
    said = (report.module, report.cause, image, fault.box if in_backward else report.box, report.fails_in_float32)
    wanted = (fault.module, fault.cause, fault.image, fault.box, fault.float32)
    words = ("module", "cause", "image", "box", "float32")
    return [f"{w} {s}, not {x}" for w, s, x in zip(words, said, wanted, strict=True) if s != x] + (
        [] if report.fails else ["it does not fail"]
    )


@pytest.fixture(scope="module")
def reports(world, tmp_path_factory):
    return {f.name: run(world, tmp_path_factory.mktemp("faults"), f) for f in FAULTS}


def test_module_image_box_and_cause_are_right_in_nine_of_ten_faults(world, reports):
    table = {f.name: wrong(world, f, reports[f.name]) for f in FAULTS}
    hits = sum(not misses for misses in table.values())
    shown = "\n".join(f"{name}: {'; '.join(misses) or 'right'}" for name, misses in table.items())
    assert len(table) >= 12 and hits >= 0.9 * len(table), f"{hits} of {len(table)}\n{shown}"


def test_an_image_that_is_not_finite_is_named_with_its_pixels(world, reports):
    report = reports["NaN pixel"]
    target = world.window[1].targets[2]
    assert [i.image_id for i in report.images] == [target.image_id] and report.images[0].name.startswith("shapes/train")
    assert [(f.kind, f.fatal) for f in report.faults] == [("pixels", True)]
    assert report.faults[0].words.startswith("1 of ") and "data" in report.lines()[8]


def test_a_box_that_is_not_finite_is_named_with_its_numbers(reports):
    report = reports["NaN box"]
    assert (report.stage, report.box) == ("loss", 1) and "nan" in report.verdict
    assert {"loss_bbox", "loss_bbox_0", "loss_giou", "loss_giou_0"} <= set(report.terms)
    assert "loss_ce" not in report.terms


def test_a_weight_that_is_not_finite_is_named_and_no_image(reports):
    report = reports["Inf in a decoder linear"]
    assert [(t.name, t.num_bad) for t in report.tensors] == [(f"{LAYER}.linear1.weight", 1)]
    assert report.images == [] and report.box is None and report.place == "decoder layer 2, feed-forward"


def test_the_tensor_is_described_by_what_is_left_of_it(world, reports):
    t = reports["Inf in a decoder linear"].tensor
    assert t["shape"] == [4, 10, 32] and t["num_bad"] == 4 * 10  # one of 32 features, in every query
    assert -20 < t["low"] < 0 < t["high"] < 20 and 0 < t["peak_input"] < 20
    assert (
        t["peak_weight"] == world.clean[f"{LAYER}.linear1.weight"].flatten()[[*range(3), *range(4, 1024)]].abs().max()
    )


def test_what_float32_survives_is_precision(reports):
    for name in ("overflow of fp16 alone", "overflow of fp16 in the class head"):
        assert reports[name].fails_in_float32 is False and reports[name].cause == "precision"
    assert "also fails in float32: yes" in reports["overflow of float32 in bf16"].lines()
    report = reports["overflow of float32 in a linear"]
    assert (report.fails_in_float32, report.fails_in_float64) == (True, False)


def test_a_gradient_is_followed_to_the_module_and_the_costliest_box(world, reports):
    report = reports["NaN gradient of one image in the decoder"]
    assert report.stage == "backward" and report.tensor["what"] == "gradient of its input"
    assert report.tensor["image_bad"] == [False, False, True, False]
    assert 0 <= report.box < len(world.window[0].targets[2].labels) and report.box_loss > 0


def test_all_that_is_said_fits_in_ten_short_lines(reports):
    for name, report in reports.items():
        lines = report.lines()
        assert len(lines) <= 11 and max(map(len, lines)) < 250, name
        assert lines[-1].startswith("do: ") or "note: " in lines[-1], name
        json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.slow
def test_any_module_with_a_bad_weight_is_named(healthy):
    case = replay.load(healthy, "cpu")
    names = [n for n, m in case.model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    said = {}
    for name in names:
        model = copy.deepcopy(case.model)
        with torch.no_grad():
            next(model.get_submodule(name).parameters(recurse=False)).flatten()[0] = NAN
        report = replay.diagnose(dataclasses.replace(case, model=model), quiet=True)
        said[name] = (report.module, report.cause, report.images)
    assert len(said) > 50 and {n: s for n, s in said.items() if s != (n, "weights", [])} == {}


@pytest.mark.slow
def test_any_module_with_a_bad_gradient_of_one_image_is_named(healthy):
    case = replay.load(healthy, "cpu")
    names = [n for n, m in case.model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    heads = ("class_embed", "bbox_embed", "transformer.decoder.norm")  # there images are not the first axis
    names = [n for n in names if not n.startswith((*heads, "query_embed", STEM))]  # the stem's input has no gradient
    said, wanted = {}, {}
    for name in names[::2]:
        live_norm = isinstance(case.model.get_submodule(name), torch.nn.BatchNorm2d)  # whose backward mixes images
        wanted[name] = (name, [] if live_norm else [(0, 1)])
        mine = dataclasses.replace(case, model=copy.deepcopy(case.model))
        hooked(name, 1)(mine)
        report = replay.diagnose(mine, quiet=True)
        said[name] = (report.module, [(i.micro_batch, i.index) for i in report.images])
    assert len(said) > 20 and said == wanted


# --- windows that do not fail


def test_a_healthy_window_does_not_fail_again(healthy):
    report = replay.replay(healthy, "cpu", quiet=True)
    assert not report.fails and report.cause is None and report.faults == report.tensors == []
    assert "does not fail again" in report.lines()[1]


def test_degenerate_and_misplaced_boxes_are_told_but_do_not_fail(world, tmp_path):
    spoil = both(box(0, 0, 0, 2, 0.0), box(1, 0, 0, 0, 1.4))
    report = replay.replay(world.capture(tmp_path, spoil, must_fail=False), "cpu", quiet=True)
    assert not report.fails and [f.fatal for f in report.faults] == [False, False]
    assert "has no area" in report.faults[0].words and "reaches out" in report.faults[1].words


def test_the_case_is_left_as_it_was(healthy):
    case = replay.load(healthy, "cpu")
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    for _ in range(2):
        assert not replay.diagnose(case, quiet=True).fails
    after = case.model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.grad is None for p in case.model.parameters())


def test_watching_changes_neither_loss_nor_gradient(world, healthy):
    """The trainer's own numbers for the window, and those of the case with every module watched."""
    world.built.bare.load_state_dict(world.clean)
    result = world.built.runner.run(world.copies())
    wanted = {n: p.grad.clone() for n, p in world.built.bare.named_parameters() if p.grad is not None}
    world.built.runner.discard()
    case = replay.load(healthy, "cpu")
    case.model.train(), case.criterion.train()
    counts = replay._counts(case)
    outcomes = [
        replay._micro_batch(case, *pair, counts, "no", torch.float32)
        for pair in zip(case.batches, case.images, strict=True)
    ]
    assert [o.stage for o in outcomes] == [None, None] and result.finite
    for name, p in case.model.named_parameters():
        # a sum of three gradients may be added in another order
        assert (p.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name


# --- captures that are not whole


def test_micro_batches_without_room_are_counted(world, healthy, tmp_path):
    folder = shutil.copytree(healthy, tmp_path / "c")
    rows = json.loads((folder / CAPTURE).read_text())["micro_batches"]
    edit(folder, micro_batches=[rows[0], rows[1] | {"file": None}])
    report = replay.replay(folder, "cpu", quiet=True)
    assert report.micro_batches == 1 and report.notes[0].endswith(": 1 micro-batch")
    edit(folder, micro_batches=[row | {"file": None} for row in rows])
    with pytest.raises(UserError, match="kept no micro-batch for lack of room.*health.capture_gib"):
        replay.replay(folder, "cpu")


def test_what_the_losses_are_divided_by_counts_images_that_were_not_kept(healthy, tmp_path):
    folder = shutil.copytree(healthy, tmp_path / "c")
    whole = replay._counts(replay.load(folder, "cpu"))
    rows = json.loads((folder / CAPTURE).read_text())["micro_batches"]
    edit(folder, micro_batches=rows[:1])
    part = replay._counts(replay.load(folder, "cpu"))
    assert whole == part


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / CAPTURE).write_text("{"), "not valid json"),
        (lambda f: (f / CAPTURE).write_text("{}"), "lacks window"),
        (lambda f: edit(f, precision="int8"), "unknown precision"),
        (lambda f: edit(f, micro_batches=[{}]), "incomplete micro-batch"),
        (lambda f: (f / "rank0-000.safetensors").write_bytes(b"x" * 100), "rank0-000.safetensors cannot be read"),
        (lambda f: (f / "rank0-001.safetensors").unlink(), "rank0-001.safetensors cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "recipe.yaml").unlink(), "recipe.yaml is missing"),
        (lambda f: (f / CAPTURE).unlink(), "no capture at"),
    ],
)
def test_a_damaged_capture_is_refused_in_one_sentence(healthy, tmp_path, damage, words):
    folder = shutil.copytree(healthy, tmp_path / "c")
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        replay.replay(folder, "cpu")
    assert "\n" not in str(error.value)


def test_a_run_stands_for_its_only_capture_and_several_are_listed(healthy, tmp_path):
    folder = shutil.copytree(healthy, tmp_path / "run" / "captures" / "window-00000007")
    for path in (tmp_path / "run", tmp_path / "run" / "captures", folder, folder / CAPTURE):
        assert replay.find(path) == folder
    shutil.copytree(healthy, tmp_path / "run" / "captures" / "window-00000009")
    with pytest.raises(UserError, match="has 2 captures.*window-00000007, .*window-00000009"):
        replay.find(tmp_path / "run")


@pytest.mark.parametrize("device", ["cuda"])
def test_a_device_that_is_not_there_is_refused(healthy, device):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match="--device cpu"):
        replay.replay(healthy, device)


def test_a_label_that_the_model_does_not_have_is_named(healthy, tmp_path):
    case = replay.load(healthy, "cpu")
    case.batches[0].targets[0].labels[1] = 99
    report = replay.diagnose(case, quiet=True)
    assert (report.cause, report.stage, report.box) == ("data", "input", 1) and "label 99" in report.verdict
    assert report.lines()[1] == "result: it cannot run"


# --- from the command line


def test_the_command_says_what_failed_and_exits_by_it(world, healthy, tmp_path):
    bad = world.capture(tmp_path / "run" / "captures", pixels(1, 2, NAN))
    done = runs.verb(tmp_path, "replay", "run", "--device", "cpu", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0 and (said["cause"], said["window"]) == ("data", 7)
    assert said["images"][0]["image_id"] == world.window[1].targets[2].image_id
    done = runs.verb(tmp_path, "replay", str(healthy), "--device", "cpu")
    assert done.returncode == 1 and "does not fail again" in done.stdout
    (bad / "rank0-000.safetensors").unlink()  # the only guilty micro-batch is all that is kept
    done = runs.verb(tmp_path, "replay", str(bad))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_a_learning_rate_far_too_high_is_told_from_the_capture_of_a_real_run(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("faulty", "high"))
    settings = [*runs.TINY, "optim.lr=1e8", "optim.lr_backbone=1e8", "optim.clip_norm=null", "schedule.warmup_steps=0"]
    done = runs.verb(tmp_path, "train", "--recipe", "r.yaml", *settings, "health.captures=1", "schedule.steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    report = replay.replay(tmp_path / "runs" / "high", "cpu", quiet=True)
    assert report.fails and report.cause == "weights" and report.tensors and report.images == []
    assert "learning rate" in report.verdict and "optim.lr" in report.advice
