import math

import torch
from torch import nn

from detr_accel.train.ema import Ema


def test_average_follows_its_formula_and_copies_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = Ema(model, decay=0.9, warmup_steps=3)
    expected = model[0].weight.detach().clone()
    for t in range(1, 4):
        with torch.no_grad():
            model[0].weight.add_(1.0)
            model[1].running_mean.add_(2.0)
        ema.update(model)
        decay = 0.9 * (1 - math.exp(-t / 3))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(ema.module[0].weight, expected)
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)


def test_average_does_not_train_and_does_not_move_the_model():
    model = nn.Linear(2, 2)
    ema = Ema(model, decay=0.5, warmup_steps=1)
    before = model.weight.detach().clone()
    ema.update(model)
    assert torch.equal(model.weight, before)
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in model.parameters())
