"""Small detectors in double precision, with every number random."""

import pytest
import torch

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.structures import Targets

SMALL = {
    "hidden_dim": 16, "num_heads": 4, "num_encoder_layers": 2, "num_decoder_layers": 3, "dim_feedforward": 24,
    "num_queries": 7, "dropout": 0.0,
}  # fmt: skip
RTDETR = {
    "name": "rtdetr", "num_encoder_layers": 1, "num_queries": 9, "backbone": {"name": "test_efficientnet.r160_in1k"},
}  # fmt: skip
RTDETR_PARTS = {"encoder_dim": 16, "encoder_feedforward": 24, "expansion": 0.5, "num_blocks": 1, "num_denoising": 12}


def _rtdetr_recipe(parts=None, **changes):
    return _recipe(**{**RTDETR, "rtdetr": recipes.RtDetr(**{**RTDETR_PARTS, **(parts or {})}), **changes})


def _recipe(backbone=None, loss=None, **changes):
    part = recipes.Backbone(**{"name": "resnet18.tv_in1k", **(backbone or {})})
    model = recipes.Model(**{**SMALL, "backbone": part, **changes})
    return recipes.Recipe(data=recipes.Data(root="/data"), model=model, loss=recipes.Loss(**(loss or {})))


def _randomise(module, seed=0):
    """timm starts the last norm of a block at zero, which hides gradients; equal queries would let rounding match."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            if key.startswith("query_embed"):
                value.copy_(4 * noise)
            elif value.dim() > 1:
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif key.endswith(("weight", "running_var")):
                value.copy_(0.6 + 0.3 * noise.abs())
            else:
                value.copy_(0.1 * noise)
    return module


@pytest.fixture
def make_recipe():
    return _recipe


@pytest.fixture
def make_rtdetr_recipe():
    """``parts`` are options of model.rtdetr."""
    return _rtdetr_recipe


@pytest.fixture
def randomise():
    return _randomise


@pytest.fixture
def make_model():
    def make(num_classes=4, dtype=torch.float64, **changes):
        model = models.build(_recipe(**changes), num_classes, load_weights=False)
        return _randomise(model).to(dtype)

    return make


@pytest.fixture
def make_rtdetr():
    def make(num_classes=4, dtype=torch.float64, **changes):
        model = models.build(_rtdetr_recipe(**changes), num_classes, load_weights=False)
        return _randomise(model).to(dtype)

    return make


@pytest.fixture
def make_batch():
    """images, mask and targets; ``sizes`` are the numbers of boxes, image i is padded by 8 * i columns."""

    def make(sizes, num_classes=4, height=64, width=72, dtype=torch.float64, seed=3):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(len(sizes), 3, height, width, generator=generator, dtype=torch.float64).to(dtype)
        mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
        targets = []
        for i, size in enumerate(sizes):
            mask[i, :, width - 8 * i :] = True
            images[i, :, :, width - 8 * i :] = 0
            boxes = torch.rand(size, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.3
            labels = torch.randint(0, num_classes, (size,), generator=generator)
            shape = (height, width - 8 * i)
            targets.append(Targets(i, labels, boxes.to(dtype), shape, shape))
        return images, mask, targets

    return make
