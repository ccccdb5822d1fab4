"""fp16's scaler, on a CPU: its search for a scale is no poison, and poison is not its business."""

from pathlib import Path

import pytest
import torch
from accelerate.optimizer import patch_optimizer_step
from shared import load_module

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.monitor import Silent
from detr_accel.train import parts
from detr_accel.train.capture import Captures
from detr_accel.train.checkpoint import State
from detr_accel.train.commit import Commit
from detr_accel.train.health import Health, HealthState
from detr_accel.train.launch import make_accelerator
from detr_accel.train.run_folder import RunFolder
from detr_accel.train.saving import Saver
from detr_accel.train.window import WindowResult

injected = load_module(Path(__file__).with_name("injected.py"))


@pytest.fixture
def training(tmp_path):
    """Parts whose accelerator scales as under fp16; forward stays in float32, which this CPU computes in."""
    accelerator = make_accelerator("no", "cpu")
    kept = accelerator.scaler, accelerator.native_amp, accelerator.state._mixed_precision
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    recipe = recipes.loads(injected.TINY.replace('precision: "no"\n', "") + "name: scaled\n")
    built = parts.build(recipe, accelerator, data.build(recipe), resume=False)
    parts.prepare(built)
    run = RunFolder(tmp_path / "scaled")
    yield built, Commit(built, run, Silent(), Captures(built, run.path / "captures"))
    accelerator.scaler, accelerator.native_amp, accelerator.state._mixed_precision = kept


def go(built, commit, state: State, spoil=lambda batches: batches) -> bool:
    windows = data.train_windows(
        built.recipe, built.splits.train, rank=0, num_ranks=1, start_window=state.window, end_window=9,
        mean=built.bare.mean, std=built.bare.std,
    )  # fmt: skip
    batches = spoil(next(windows))
    built.optimizer.zero_grad(set_to_none=True)
    result = built.runner.run(batches)
    state.window += 1
    return commit(state, result, batches)


def tensors(built) -> list[torch.Tensor]:
    rows = [built.optimizer.state[p] for p in built.bare.parameters() if p.requires_grad]
    moments = [row[key] for row in rows for key in sorted(row)]
    return [t.clone() for t in (*built.bare.state_dict().values(), *moments, *built.ema.module.state_dict().values())]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def nan_pixel(batches):
    batches[1].images[0, 0, 3, 3] = float("nan")
    return batches


@pytest.mark.law3
def test_steps_overflows_and_poison_follow_each_other(training):
    built, commit = training
    scaler, state = built.accelerator.scaler, State(micro=2)
    before = tensors(built)
    assert go(built, commit, state) and state.step == 1 and not same(before, tensors(built))

    scaler.update(2.0**127)  # every scaled gradient overflows: the ordinary search for a scale
    before = tensors(built)
    assert not go(built, commit, state)
    assert same(before, tensors(built)), "running statistics included"
    assert scaler.get_scale() == 2.0**126 and state.step == 1
    assert (state.health.nonfinite, state.health.overflows_in_a_row) == (0, 1)

    scaler.update(2.0**4)
    growth = scaler.state_dict()
    assert not go(built, commit, state, nan_pixel)
    assert same(before, tensors(built)) and scaler.state_dict() == growth, "poison is not the scale's fault"
    assert (state.health.nonfinite, state.step) == (1, 1)

    assert go(built, commit, state) and state.step == 2, "the scaler is ready for the next window"
    assert state.health.overflows_in_a_row == state.health.refused_in_a_row == 0


@pytest.mark.law3
def test_a_norm_that_overflows_with_finite_components_is_no_step(training):
    built, commit = training
    state = State(micro=2, window=1)
    before = tensors(built)
    result = WindowResult(losses={"loss": 3.0}, grad_norms={"all": float("inf")}, grad_norm=float("inf"))
    for row in built.runner.groups.values():
        for p in row:
            p.grad = torch.full_like(p, 1e30) * built.accelerator.scaler.get_scale()
    built.accelerator.unscale_gradients()
    assert not commit(state, result, [])
    assert same(before, tensors(built))


@pytest.mark.law4
def test_half_a_step_leaves_the_scaler_ready(training, tmp_path):
    built, commit = training
    state = State(micro=2)
    saver = Saver(built, RunFolder(tmp_path / "scaled"), Silent())
    assert go(built, commit, state)
    saver(state, counted=True, must=True)
    kept, scale = tensors(built), built.accelerator.scaler.get_scale()
    plain = built.optimizer.step

    def half(*args, **kwargs):
        plain(*args, **kwargs)
        raise torch.OutOfMemoryError("injected")

    built.prepared._optimizer_patched_step_method = half
    assert not go(built, commit, state) and commit.broken
    built.prepared._optimizer_patched_step_method = patch_optimizer_step(built.prepared, plain)
    commit.settle(state)
    assert same(kept, tensors(built)) and built.accelerator.scaler.get_scale() == scale
    assert go(built, commit, state), "the scaler is ready for the next window"


@pytest.mark.law9
def test_the_search_for_a_scale_raises_no_alarm_and_many_overflows_do():
    policy = Health("skip", strikes=3, within=9, lr_factor=0.5, give_up_after=9, overflow_patience=4)
    state, overflow = HealthState(), WindowResult(losses={"loss": 3.0}, grad_norm=float("inf"))
    told = [policy.judge(state, overflow, window, scaler=True, precision="fp16", images=[]) for window in range(1, 9)]
    assert [v.action for v in told] == ["commit"] * 4 + ["skip"] * 4, (
        "the scaler itself skips the step, and then poison"
    )
    assert [bool(v.text) for v in told] == [False] * 3 + [True] * 5
    assert "4 windows in a row" in told[3].text and "bf16" in told[3].text
    assert told[4].capture and state.nonfinite == 4


@pytest.mark.law3
def test_statistics_that_are_not_finite_are_no_search_for_a_scale():
    policy = Health("skip", strikes=3, within=9, lr_factor=0.5, give_up_after=9, overflow_patience=4)
    result = WindowResult(losses={"loss": 3.0}, grad_norm=1.0, statistics_finite=False)
    verdict = policy.judge(HealthState(), result, 1, scaler=True, precision="fp16", images=[])
    assert verdict.action == "skip" and "running statistics" in verdict.text
