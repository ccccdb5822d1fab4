"""A GPU gives what a CPU gives: outputs, every loss term and every gradient, in double precision."""

from copy import deepcopy

import pytest
import torch

from detr_accel import models
from detr_accel.structures import Batch

pytestmark = pytest.mark.gpu
SIZES = [2, 0, 9]


def step(model, criterion, images, mask, targets, device):
    """One micro-batch with its denoising part where the model has one; everything is back on the host."""
    model, criterion = deepcopy(model).to(device).train(), criterion.to(device)
    counts = {k: v.to(device) for k, v in criterion.normalisers(criterion.count(targets)).items()}
    denoising = criterion.disturb(Batch(images, mask, targets, (0, 1, 2)), max(SIZES), seed=0)
    there = [] if denoising is None else [denoising.to(device)]
    outputs = model(images.to(device), mask.to(device), *there)
    found = criterion(outputs, [t.to(device) for t in targets], counts, *there)
    found.total.backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    assert outputs["pred_boxes"].device.type == device
    boxes, logits = (outputs[k].detach().cpu() for k in ("pred_boxes", "pred_logits"))
    return boxes, logits, {k: v.detach().cpu() for k, v in found.losses.items()}, grads


@pytest.mark.parametrize("kind", ["detr", "bilinear", "discrete"])
def test_a_gpu_gives_what_a_cpu_gives(make_recipe, make_rtdetr_recipe, make_batch, randomise, kind):
    recipe = make_recipe() if kind == "detr" else make_rtdetr_recipe({"sampling": kind})
    model = randomise(models.build(recipe, 4, load_weights=False)).double()
    images, mask, targets = make_batch(SIZES)
    found = {d: step(model, models.build_criterion(recipe, 4), images, mask, targets, d) for d in ("cpu", "cuda")}
    for here, there in zip(found["cpu"][:2], found["cuda"][:2], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-8, atol=1e-10)
    for here, there in zip(found["cpu"][2:], found["cuda"][2:], strict=True):
        assert here.keys() == there.keys() and here
        for name in here:
            torch.testing.assert_close(there[name], here[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_finite_and_near(make_rtdetr_recipe, make_batch, randomise, dtype):
    recipe = make_rtdetr_recipe()
    model = randomise(models.build(recipe, 4, load_weights=False)).cuda().eval()
    images, mask, _ = make_batch(SIZES, dtype=torch.float32)
    with torch.no_grad():
        plain = model(images.cuda(), mask.cuda())
        with torch.autocast("cuda", dtype):
            mixed = model(images.cuda(), mask.cuda())
    best = plain["pred_logits"].sigmoid().amax((1, 2)), mixed["pred_logits"].sigmoid().amax((1, 2))
    torch.testing.assert_close(best[1].float(), best[0], rtol=0.05, atol=0.02)
    assert mixed["pred_boxes"].isfinite().all()
