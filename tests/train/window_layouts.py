"""Run windows in several layouts on this launch's processes; the main one writes losses and gradients to a file.

Usage: accelerate launch ... window_layouts.py OUT.pt DTYPE DETECTOR ..., on one process or on two.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from detr_accel import models
from detr_accel.data.sampler import share
from detr_accel.recipe import loads
from detr_accel.structures import Batch, Targets
from detr_accel.train import launch
from detr_accel.train.launch import make_accelerator
from detr_accel.train.window import Requests, WindowRunner

_file = Path(__file__).parents[2] / "benchmarks" / "device_reads.py"
_spec = importlib.util.spec_from_file_location("device_reads", _file)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
CountReads = _module.CountReads

DETR = """
name: t
data: {format: shapes}
model:
  backbone: {name: resnet10t, weights: none, norm: live}
  hidden_dim: 32
  num_heads: 4
  num_encoder_layers: 1
  num_decoder_layers: 3
  dim_feedforward: 32
  dropout: 0.0
  num_queries: 12
"""
RTDETR = """
name: t
data: {format: shapes}
model:
  name: rtdetr
  backbone: {name: test_efficientnet, weights: none, norm: live}
  hidden_dim: 16
  num_heads: 4
  num_decoder_layers: 3
  dim_feedforward: 16
  num_queries: 12
  rtdetr: {encoder_dim: 16, encoder_feedforward: 16, expansion: 0.5, num_blocks: 1, num_denoising: 30}
loss: {kind: LOSS}
"""
DETECTORS = {"detr": DETR, "vfl": RTDETR.replace("LOSS", "vfl"), "mal": RTDETR.replace("LOSS", "mal")}
# boxes of each image; more than the 12 queries in one, none in another, and none on the second of two processes
SIZES = {
    "full": [3, 0, 5, 1, 14, 2, 1, 7], "short": [2, 0, 9], "one": [4], "empty": [0, 0, 0, 0, 0, 0, 0, 0],
    "half": [3, 1, 5, 2, 0, 0, 0, 0],
}  # fmt: skip

# what "mal" has of its own is one term of the loss, and one kind of window shows it
KINDS = {"detr": tuple(SIZES), "vfl": tuple(SIZES), "mal": ("full", "short")}


def window(kind: str) -> Batch:
    gen = torch.Generator().manual_seed(7)
    targets = []
    for i, n in enumerate(SIZES[kind]):
        boxes = torch.rand(n, 4, generator=gen) * torch.tensor([0.6, 0.6, 0.3, 0.3])
        boxes += torch.tensor([0.2, 0.2, 0.05, 0.05])
        labels = torch.randint(0, 5, (n,), generator=gen)
        targets.append(Targets(i, labels, boxes, (64, 64), (64, 64)))
    num = len(targets)
    mask = torch.zeros(num, 64, 96, dtype=torch.bool)
    mask[::2, :, 70:] = True
    images = torch.randn(num, 3, 64, 96, generator=gen) * ~mask[:, None]
    return Batch(images, mask, targets, tuple(range(num)))


def cut(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(*(x[start:stop] for x in (batch.images, batch.mask, batch.targets, batch.positions)))


def spread(model: torch.nn.Module) -> None:
    """Random norms and statistics, no weight zero, queries far apart: no gradient is zero and no assignment is a coin
    toss."""
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                low, high = (0.5, 1.5) if name.endswith(("weight", "running_var")) else (-0.2, 0.2)
                tensor.copy_(torch.rand(tensor.shape, generator=gen) * (high - low) + low)
            elif tensor.is_floating_point() and not tensor.any():
                tensor.copy_(torch.randn(tensor.shape, generator=gen) * 0.2)
        if hasattr(model, "query_embed"):
            model.query_embed.weight.copy_(torch.randn(model.query_embed.weight.shape, generator=gen) * 5)


def build(detector: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Detector and criterion; the detector's BatchNorm stays in eval."""
    torch.manual_seed(0)
    recipe = loads(DETECTORS[detector])
    model = models.build(recipe, 5)
    for module in model.modules():  # live batch statistics are the law's named exception
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, m=module: m
            module.eval()
            module.training = False
    spread(model)
    return model, models.build_criterion(recipe, 5)


def run(detector: str, dtype: torch.dtype, accelerator) -> tuple[dict, dict]:
    """Results with gradients, and device reads, by kind of window, micro-batch and overlap."""
    ranks, rank = accelerator.num_processes, accelerator.process_index
    model, criterion = (part.to(dtype) for part in build(detector))
    groups = models.param_groups(model)
    results, reads = {}, {}
    for kind in KINDS[detector] if dtype is torch.float64 else ("full",):
        sizes = SIZES[kind]
        for micro in (1, 2, 4, 8):
            for overlap in (False, True):
                if overlap and ranks == 1:
                    continue
                wrapped = accelerator.prepare_model(model, evaluation_mode=not overlap) if overlap else model
                runner = WindowRunner(
                    accelerator, wrapped, criterion, groups, loss_names=criterion.loss_names(3), seed=1, overlap=overlap
                )
                model.zero_grad(set_to_none=True)
                batch = window(kind)
                batch.images = batch.images.to(dtype)
                mine = share(len(sizes), rank, ranks)
                start, stop = mine.start, mine.stop
                micros = [cut(batch, i, min(i + micro, stop)) for i in range(start, stop, micro)]
                with CountReads(moves=False) as counted:
                    waited = Requests(wait_seconds=rank + 0.5)
                    result = runner.run(micros, all_share=len(sizes) >= ranks, requests=waited)
                reads[kind, micro, overlap] = (len(micros), counted.reads)
                grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
                results[kind, micro, overlap] = (vars(result), grads)
                if overlap:
                    model._is_accelerate_prepared = False
    return results, reads


def main() -> None:
    out, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    accelerator = make_accelerator("no", "cpu", overlap=True, timeout_minutes=2)
    found = {detector: run(detector, dtype, accelerator) for detector in sys.argv[3:]}
    if accelerator.is_main_process:
        torch.save({name: results | {"reads": reads} for name, (results, reads) in found.items()}, out)
    launch.leave()


if __name__ == "__main__":
    main()
