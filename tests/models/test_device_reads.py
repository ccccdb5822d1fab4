"""A training step waits for the device once: to solve the assignment."""

from pathlib import Path

import pytest
import torch
from shared import load_module

from detr_accel import models
from detr_accel.structures import Batch

_FILE = Path(__file__).parents[2] / "benchmarks" / "device_reads.py"
device_reads = load_module(_FILE)
CountReads = device_reads.CountReads

def test_the_counter_counts():
    x = torch.arange(4.0)
    for read in (
        lambda: x[x > 1], lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.tolist(), lambda: x.to("cpu"),
        lambda: x.nonzero(), lambda: torch.where(x > 1), lambda: float(x[0]), lambda: x.cpu().numpy(),
    ):  # fmt: skip
        with CountReads() as mode:
            read()
        assert len(mode.reads) == 1, mode.reads
    with CountReads() as mode:
        x[torch.tensor([1, 2])].float().sum()
    assert mode.reads == []


@pytest.mark.parametrize("sizes", [[2, 0, 9], [0, 0, 0]])
@pytest.mark.parametrize("parts", [[], ["backbone", "encoder", "decoder"]])
def test_one_read_of_the_device_in_a_micro_batch(make_recipe, make_batch, sizes, parts):
    recipe = make_recipe(activation_checkpointing=parts, dropout=0.1)
    model = models.build(recipe, 4, load_weights=False).train()
    criterion = models.build_criterion(recipe, 4)
    images, mask, targets = make_batch(sizes, dtype=torch.float32)
    counts = criterion.normalisers(criterion.count(targets))
    with CountReads() as mode:
        criterion(model(images, mask), targets, counts).total.backward()
    assert mode.reads == ["cpu"]


@pytest.mark.parametrize("sizes", [[2, 0, 9], [0, 0, 0]])
@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
def test_one_read_of_the_device_in_a_micro_batch_of_rtdetr(make_rtdetr_recipe, make_batch, sizes, sampling):
    recipe = make_rtdetr_recipe({"sampling": sampling})
    model = models.build(recipe, 4, load_weights=False).train()
    criterion = models.build_criterion(recipe, 4)
    images, mask, targets = make_batch(sizes, dtype=torch.float32)
    counts = criterion.normalisers(criterion.count(targets))
    with CountReads() as mode:
        denoising = criterion.disturb(Batch(images, mask, targets, (0, 1, 2)), max(sizes), seed=0)
        criterion(model(images, mask, denoising), targets, counts, denoising).total.backward()
    assert mode.reads == ["cpu"]


def _waits_in_backward(total) -> list[str]:
    """What reads the device inside autograd's own code, where no Python function is called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        total.backward()
    found = []
    for event in seen.events():
        if event.name in ("aten::_local_scalar_dense", "aten::nonzero"):
            while event is not None and not event.name.startswith("autograd::engine"):
                event = event.cpu_parent
            found += [event.name.rpartition(" ")[2]] if event is not None else []
    return found


def test_nothing_is_read_inside_backward(make_recipe, make_rtdetr_recipe, make_batch):
    rows = torch.rand(5, 2, requires_grad=True)
    assert _waits_in_backward(rows.prod(-1).sum()) == ["ProdBackward1"], "looks for zeros: it can be seen"
    for recipe in (make_recipe(), make_rtdetr_recipe(), make_rtdetr_recipe({"sampling": "discrete"})):
        model = models.build(recipe, 4, load_weights=False).train()
        criterion = models.build_criterion(recipe, 4)
        images, mask, targets = make_batch([2, 0, 9], dtype=torch.float32)
        counts = criterion.normalisers(criterion.count(targets))
        denoising = criterion.disturb(Batch(images, mask, targets, (0, 1, 2)), 9, seed=0)
        there = [] if denoising is None else [denoising]
        assert _waits_in_backward(criterion(model(images, mask, *there), targets, counts, *there).total) == []


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["detr", "bilinear", "discrete"])
def test_one_synchronisation_on_a_gpu(make_recipe, make_rtdetr_recipe, make_batch, kind):
    recipe = make_recipe(dropout=0.1) if kind == "detr" else make_rtdetr_recipe({"sampling": kind})
    model = models.build(recipe, 4, device="cuda", load_weights=False).train()
    criterion = models.build_criterion(recipe, 4).to("cuda")
    images, mask, targets = make_batch([2, 0, 9], dtype=torch.float32)
    counts = criterion.normalisers(criterion.count(targets))
    counts = {name: count.to("cuda") for name, count in counts.items()}
    denoising = criterion.disturb(Batch(images, mask, targets, (0, 1, 2)), 9, seed=0)
    there = [] if denoising is None else [denoising.to("cuda")]
    images, mask, targets = images.cuda(), mask.cuda(), [t.to("cuda") for t in targets]

    def step():
        criterion(model(images, mask, *there), targets, counts, *there).total.backward()

    step()  # kernels are loaded, which synchronises
    with pytest.warns(UserWarning, match="synchronizing") as caught:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # switching the mode on warns, too, that it is a prototype
    assert len([w for w in caught if "called a synchronizing" in str(w.message)]) == 1
