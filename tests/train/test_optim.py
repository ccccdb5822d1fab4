import torch
from torch import nn

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.train.optim import build_optimizer, lr_schedule, set_lr


def groups():
    torch.manual_seed(0)
    body, head = nn.Linear(3, 3), nn.Linear(3, 2)
    return {"backbone": list(body.named_parameters()), "heads": list(head.named_parameters()), "empty": []}


def test_backbone_learns_at_its_own_rate_and_empty_groups_vanish():
    opt = build_optimizer(groups(), lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4, betas=(0.9, 0.999), eps=1e-8)
    assert [(g["name"], g["lr"]) for g in opt.param_groups] == [("backbone", 1e-5), ("heads", 1e-4)]
    assert set_lr(opt, 0.5) == {"backbone": 5e-6, "heads": 5e-5}
    assert set_lr(opt, 1.0) == {"backbone": 1e-5, "heads": 1e-4}, "the factor must not compound"


def test_the_fused_step_is_the_plain_step():
    options = {"lr": 1e-3, "lr_backbone": 1e-4, "weight_decay": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    both = [groups(), groups()]
    for group, fused in zip(both, (False, True), strict=True):
        opt = build_optimizer(group, fused=fused, **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            for _, p in group["backbone"] + group["heads"]:
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
    for plain, fused in zip(*(g["backbone"] + g["heads"] for g in both), strict=True):
        torch.testing.assert_close(fused[1], plain[1], rtol=1e-6, atol=1e-7)


def test_step_schedule_drops_once_as_the_original_does():
    factor = lr_schedule("step", 300, drop_at=[0.6667], gamma=0.1)
    assert [factor(s) for s in (0, 199, 200, 299)] == [1.0, 1.0, 0.1, 0.1]


def test_two_drops_multiply():
    factor = lr_schedule("step", 100, drop_at=[0.9, 0.5], gamma=0.1)
    assert abs(factor(95) - 0.01) < 1e-15


def test_warmup_is_linear_and_learns_from_the_first_step():
    factor = lr_schedule("constant", 100, warmup_steps=4)
    assert [factor(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_from_one_to_its_floor():
    factor = lr_schedule("cosine", 110, warmup_steps=10, min_factor=0.2)
    assert factor(10) == 1.0
    assert abs(factor(60) - 0.6) < 1e-12
    assert abs(factor(110) - 0.2) < 1e-12
    assert all(factor(s) >= factor(s + 1) for s in range(10, 110))


def test_flat_cosine_stays_then_falls_then_stays():
    """DEIM's 60 epochs: flat to the 34th, at half of it from the 58th on."""
    shape = {"fall": (34 / 60, 58 / 60), "min_factor": 0.5, "warmup": "quadratic"}
    factor = lr_schedule("flat_cosine", 600, warmup_steps=20, **shape)
    assert factor(9) == 0.25 and factor(19) == 1.0, "the square of half of the way"
    assert {factor(s) for s in range(20, 341)} == {1.0} and {factor(s) for s in range(580, 700)} == {0.5}
    assert abs(factor(460) - 0.75) < 1e-12, "half of the fall"
    assert all(factor(s) > factor(s + 1) for s in range(340, 580))


def test_what_is_named_does_not_decay_and_the_rest_does():
    parts = groups()
    named = dict(parts["backbone"] + parts["heads"])
    free = named["bias"]  # of the heads: the names are a real model's elsewhere
    opt = build_optimizer(
        {"heads": parts["heads"]}, lr=0.1, lr_backbone=0.1, weight_decay=0.5, betas=(0.9, 0.999), eps=1e-8,
        no_decay={"bias"},
    )  # fmt: skip
    assert [(g["name"], g["weight_decay"]) for g in opt.param_groups] == [("heads", 0.5), ("heads", 0.0)]
    weight, before = named["weight"], [p.detach().clone() for p in (named["weight"], free)]
    for p in (weight, free):
        p.grad = torch.zeros_like(p)
    opt.step()
    torch.testing.assert_close(weight.detach(), before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(free, before[1])
    assert set_lr(opt, 0.5) == {"heads": 0.05} and {g["lr"] for g in opt.param_groups} == {0.05}


def test_the_backbones_norms_may_learn_at_a_rate_of_their_own():
    """As DEIM trains them: a hundred times as fast as the rest of the backbone."""
    text = (
        "data: {format: shapes}\nmodel: {name: rtdetr, backbone: {name: test_efficientnet, weights: none}}\n"
        "optim: {lr: 2.0e-4, lr_backbone: 2.0e-6, lr_backbone_norms: 1.0e-4, no_decay: [norms]}\n"
    )
    recipe = recipes.loads(text)
    model = models.build(recipe, 3)
    groups = models.param_groups(model, norms_apart=True)
    names = [name for name, _ in groups["backbone_norms"]]
    assert names and all(name.startswith("backbone.") and ".bn" in name for name in names)
    assert not [name for name, _ in groups["backbone"] if ".bn" in name]
    whole = {name for rows in models.param_groups(model).values() for name, _ in rows}
    assert {name for rows in groups.values() for name, _ in rows} == whole
    optimizer = build_optimizer(
        groups, lr=2e-4, lr_backbone=2e-6, weight_decay=1e-4, betas=(0.9, 0.999), eps=1e-8,
        no_decay=models.not_decayed(model, ["norms"]), lr_backbone_norms=1e-4,
    )  # fmt: skip
    rates = {group["name"]: group["base_lr"] for group in optimizer.param_groups}
    assert rates == {"backbone": 2e-6, "backbone_norms": 1e-4, "transformer": 2e-4, "heads": 2e-4}
