"""Train windows of a stream in several layouts on this launch's processes; the main one writes losses and gradients.

Usage: accelerate launch ... stream_layouts.py OUT.pt FOLDER, on one process or on two. The processes read their own
lanes (``auto``) or everything (``1``).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared import load_module  # noqa: E402

from detr_accel import data, models  # noqa: E402
from detr_accel.recipe import loads  # noqa: E402
from detr_accel.train import launch  # noqa: E402
from detr_accel.train.launch import make_accelerator  # noqa: E402
from detr_accel.train.window import Requests, WindowRunner  # noqa: E402

window_layouts = load_module(Path(__file__).with_name("window_layouts.py"))

RECIPE = """
name: t
seed: 4
data:
  format: hub
  root: FOLDER
  workers: 0
  augment: {scales: [32, 48, 64, 80], crop_scales: [60], crop_size: [20, 50]}
  hub: {streaming: true, block: 12, lanes: LANES}
batch: {size: 8}
model:
  backbone: {name: test_resnet, weights: none, norm: live}
  hidden_dim: 32
  num_heads: 4
  num_encoder_layers: 1
  num_decoder_layers: 2
  dim_feedforward: 32
  dropout: 0.0
  num_queries: 12
"""
WINDOWS = 4  # the third is short, the fourth is of the next epoch


def build(lanes: str, folder: str):
    """Training split, recipe, detector and criterion; the detector's BatchNorm stays in eval."""
    recipe = loads(RECIPE.replace("LANES", lanes).replace("FOLDER", folder))
    train = data.build(recipe).train
    torch.manual_seed(0)
    model, criterion = models.build(recipe, len(train.classes)), models.build_criterion(recipe, len(train.classes))
    for module in model.modules():  # live batch statistics are the law's named exception
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, m=module: m
            module.eval()
            module.training = False
    window_layouts.spread(model)
    return recipe, train, model.double(), criterion.double()


def main() -> None:
    out, folder = sys.argv[1:]
    accelerator = make_accelerator("no", "cpu", timeout_minutes=2)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    found = {}
    for lanes in ("auto", "1"):
        recipe, train, model, criterion = build(lanes, folder)
        runner = WindowRunner(
            accelerator, model, criterion, models.param_groups(model), loss_names=criterion.loss_names(2), seed=1,
            own_canvas=data.reads_its_own(train, ranks),
        )  # fmt: skip
        for micro in (8, 3, 1):
            windows = data.train_windows(
                recipe, train, rank=rank, num_ranks=ranks, start_window=0, end_window=WINDOWS, mean=model.mean,
                std=model.std, micro=micro,
            )  # fmt: skip
            for number, batches in enumerate(windows):
                model.zero_grad(set_to_none=True)
                for batch in batches:
                    batch.images = batch.images.double()
                canvas_px = data.largest_canvas(batches)
                kept, lost = data.without_lost(batches)
                result = runner.run(kept, requests=Requests(canvas_px=canvas_px))
                grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
                found[lanes, micro, number] = {**vars(result), "own_px": canvas_px, "num_lost": len(lost)}, grads
    if accelerator.is_main_process:
        torch.save(found, out)
    launch.leave()


if __name__ == "__main__":
    main()
