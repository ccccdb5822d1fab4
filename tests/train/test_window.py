"""Law 1: the same window gives the same loss and gradient however it is cut."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm

from detr_accel import data
from detr_accel.models.losses import _box_sums, image_spread
from detr_accel.structures import Batch, Targets
from detr_accel.train import forward_state
from detr_accel.train.window import FACTS, WindowResult, WindowRunner, count_facts

SCRIPT = Path(__file__).with_name("window_layouts.py")
ROOT = Path(__file__).parents[2]


DETECTORS = ["detr", "vfl", "mal"]


def launch(out: Path, processes: int, dtype: str) -> dict:
    """Detector -> what its windows came to, see ``window_layouts.run``."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = warm.run([str(SCRIPT), str(out), dtype, *DETECTORS], env=env, processes=processes if processes > 1 else 0)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return {n: launch(folder / f"{n}.pt", n, "float64") for n in (1, 2)}


def compare(reference: dict, other: dict, relative: float) -> None:
    total = np.sqrt(sum(g.square().sum().item() for g in reference.values()))
    for name, grad in reference.items():
        allowed = relative * grad.norm().item() + 1e-3 * relative * total
        assert (grad - other[name]).norm().item() <= allowed, name


@pytest.mark.law1
@pytest.mark.parametrize(
    "detector, kind",
    [(d, k) for d in DETECTORS for k in ("full", "short", *(("one", "empty", "half") if d != "mal" else ()))],
)
@pytest.mark.parametrize("processes, micro", [(1, 4), (1, 2), (1, 1), (2, 8), (2, 4), (2, 2), (2, 1)])
@pytest.mark.parametrize("overlap", [False, True])
def test_every_layout_gives_the_gradient_of_the_whole_batch(layouts, detector, kind, processes, micro, overlap):
    if overlap and processes == 1:
        pytest.skip("nothing to overlap with on one process")
    whole, whole_grads = layouts[1][detector][kind, 8, False]
    result, grads = layouts[processes][detector][kind, micro, overlap]
    for name, value in whole["losses"].items():
        assert result["losses"][name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
    assert result["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-9)
    assert (result["num_images"], result["num_boxes"]) == (whole["num_images"], whole["num_boxes"])
    assert result["facts"] == whole["facts"]
    compare(whole_grads, grads, 1e-9)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_wait_for_images_is_that_of_the_process_that_waited_longest(layouts, processes):
    """The others wait for it in the reduction, and would say that they never wait for images."""
    results = layouts[processes]["detr"]
    assert {results[kind, 2, False][0]["wait_seconds"] for kind in ("full", "one")} == {processes - 0.5}


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_comparison_can_fail(layouts, detector):
    _, whole = layouts[1][detector]["full", 8, False]
    _, short = layouts[1][detector]["short", 8, False]
    with pytest.raises(AssertionError):
        compare(whole, short, 1e-9)
    name = max(whole, key=lambda n: whole[n].norm())
    with pytest.raises(AssertionError, match=name):
        compare(whole, {**whole, name: whole[name] * (1 + 1e-7)}, 1e-9)


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("layouts") / "f32.pt", 2, "float32")


@pytest.mark.law1
@pytest.mark.parametrize("detector", DETECTORS)
def test_float32_layouts_agree_to_rounding(in_float32, layouts, detector):
    whole, whole_grads = layouts[1][detector]["full", 8, False]
    result, grads = in_float32[detector]["full", 2, False]
    assert result["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
    compare(whole_grads, {n: g.double() for n, g in grads.items()}, 1e-2)


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("processes, micro", [(1, 8), (1, 2), (1, 1), (2, 4), (2, 1)])
def test_a_window_reads_the_device_once_a_micro_batch_and_twice(layouts, detector, processes, micro, overlap):
    if overlap and processes == 1:
        pytest.skip("nothing to overlap with on one process")
    num_micro_batches, reads = layouts[processes][detector]["reads"]["full", micro, overlap]
    assert num_micro_batches == 8 // processes // micro
    # flags (where there is anybody to agree with) and the numbers of the window; before it, with denoising, the most
    # boxes that an image of any process has
    agreed = 0 if detector == "detr" or processes == 1 else 1
    assert len(reads) == num_micro_batches + processes + agreed, reads


def test_a_canvas_is_the_planned_one_where_its_largest_images_are_lost():
    """On one process the canvas stays the window's, too: whose images are lost does not change the others' padding."""
    runner = object.__new__(WindowRunner)
    runner.criterion = SimpleNamespace(noise=None)
    runner.own_canvas, runner.accelerator = True, SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    batches = [Batch(torch.zeros(0, 3, 64, 96), torch.zeros(0, 64, 96), [], ()) for _ in range(2)]
    assert data.largest_canvas(batches) == (64, 96) and data.largest_canvas([]) == (0, 0)
    assert runner._largest([], data.largest_canvas(batches)) == ((64, 96), 0)
    assert runner._largest(batches[:1], (80, 10)) == ((80, 96), 0)


def test_running_statistics_become_their_mean_over_processes_by_images(monkeypatch):
    """Three images here and one on the other process: by hand, and not the main process's or the plain mean."""
    norms = [torch.nn.BatchNorm2d(3).double() for _ in range(2)]
    for i, norm in enumerate(norms):
        norm(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
    here, there = (torch.cat([n.running_mean, n.running_var]).clone() for n in norms)
    monkeypatch.setattr(forward_state, "all_reduce_sum", lambda flat, device: flat + 1 * there)
    state = forward_state.ForwardState(norms[0])
    state.combine(3, torch.tensor(4), 2, torch.device("cpu"))
    found = torch.cat([norms[0].running_mean, norms[0].running_var])
    torch.testing.assert_close(found, (3 * here + there) / 4, rtol=1e-12, atol=0)
    assert (found - here).abs().min() > 1e-6 and (found - (here + there) / 2).abs().min() > 1e-6


def test_clipping_bounds_the_norm_or_each_component():
    p = torch.nn.Parameter(torch.zeros(3))
    runner = object.__new__(WindowRunner)
    runner.groups = {"all": [p]}
    p.grad = torch.tensor([3.0, -4.0, 0.0])
    runner.clip(WindowResult(grad_norm=5.0), 0.1, None)
    assert p.grad.norm().item() == pytest.approx(0.1, rel=1e-5) and p.grad[0] / p.grad[1] == pytest.approx(-0.75)
    p.grad = torch.tensor([0.03, -0.04, 0.0])
    runner.clip(WindowResult(grad_norm=0.05), 0.1, None)
    assert torch.equal(p.grad, torch.tensor([0.03, -0.04, 0.0])), "a small gradient stays as it is"
    p.grad = torch.tensor([3.0, -4.0, 0.2])
    runner.clip(WindowResult(grad_norm=5.0), None, 0.5)
    assert torch.equal(p.grad, torch.tensor([0.5, -0.5, 0.2]))


def test_facts_of_the_targets_are_counted():
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.01, 0.5], [0.5, 0.5, 0.5, 0.05]])
    full = Targets(1, torch.zeros(3, dtype=torch.int64), boxes, (50, 100), (50, 100), num_cut=2)
    empty = Targets(2, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (50, 100), (50, 100), is_blank=True)
    counted = dict(zip(FACTS, count_facts([full, empty]).tolist(), strict=True))
    assert counted == {"blank_images": 1, "empty_images": 1, "cut_boxes": 2, "tiny_boxes": 1}
    assert count_facts([]).tolist() == [0, 0, 0, 0]


def test_the_spread_over_images_is_that_of_all_micro_batches_together():
    boxes = torch.rand(6, 5, 4, dtype=torch.float64)
    sums = _box_sums(boxes[:2]) + _box_sums(boxes[2:])
    assert image_spread(sums, torch.tensor(6.0)).item() == pytest.approx(boxes.std(0, correction=0).mean().item())
    same = boxes[:1].expand(4, 5, 4)
    assert image_spread(_box_sums(same), torch.tensor(4.0)).item() < 1e-7
    assert image_spread(torch.zeros(2, 5, 4, dtype=torch.float64), torch.tensor(0.0)).item() == 0
