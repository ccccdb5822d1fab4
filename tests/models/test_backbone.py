from math import ceil, floor

import pytest
import torch
from torch import nn

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.models.backbone import Backbone
from detr_accel.models.frozen_norm import FoldedConv2d, FrozenBatchNorm2d
from detr_accel.structures import UserError

FAMILIES = [
    "resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002", "convnext_atto", "densenet121",
    "hrnet_w18_small", "ghostnet_050", "edgenext_xx_small", "repvgg_a0", "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
]  # fmt: skip


def _live_norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_timm_model_with_features_serves(name):
    """Last feature map, at the stride it claims, on a canvas that is no square; frozen as a pretrained one would be."""
    torch.manual_seed(0)
    backbone = Backbone(name, norm="frozen", frozen_stages=2)
    images = torch.randn(1, 3, 64, 96)
    (features,) = backbone(images)
    stride = backbone.stride
    assert features.shape == (1, backbone.num_channels, 64 // stride, 96 // stride)
    assert features.isfinite().all() and features.std() > 0
    assert not _live_norms(backbone)
    features.pow(2).mean().backward()
    trained = [n for n, p in backbone.named_parameters() if p.grad is not None and p.grad.any()]
    frozen = [n for n, p in backbone.named_parameters() if not p.requires_grad]
    assert trained and frozen
    assert all(p.grad is None for p in backbone.parameters() if not p.requires_grad)
    assert len(backbone.mean) == len(backbone.std) == 3


NO_THREE = {"vit_tiny_patch16_224": "strides 16, 16, 16"}
OF_RTDETR = """
name: t
data: {format: shapes}
model:
  name: rtdetr
  backbone: {name: NAME, weights: none}
  hidden_dim: 16
  num_heads: 4
  num_decoder_layers: 1
  dim_feedforward: 16
  num_queries: 9
  rtdetr: {encoder_dim: 16, encoder_feedforward: 16, num_blocks: 1}
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_any_timm_model_whose_maps_halve_serves_an_rtdetr(name, make_batch):
    recipe = recipes.loads(OF_RTDETR.replace("NAME", name))
    if name in NO_THREE:
        with pytest.raises(UserError, match=f"{name} has the {NO_THREE[name]}; choose another"):
            models.build(recipe, 4)
        return
    torch.manual_seed(0)
    model, criterion = models.build(recipe, 4).train(), models.build_criterion(recipe, 4)
    images, mask, targets = make_batch([2, 0, 1], dtype=torch.float32)
    maps = model.backbone(images)
    sides = [tuple(m.shape[-2:]) for m in maps]
    up, down = ([tuple(f(n / s) for n in images.shape[-2:]) for s in model.backbone.strides] for f in (ceil, floor))
    assert sides in (up, down) and [m.shape[1] for m in maps] == model.backbone.channels
    criterion(model(images, mask), targets, criterion.normalisers(criterion.count(targets))).total.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert all(g.isfinite().all() for g in grads.values()) and any(n.startswith("backbone") for n in grads)


@pytest.mark.parametrize("name", ["repvgg_a0", "resnet18"])
@pytest.mark.parametrize("norm", ["live", "frozen", "folded"])
def test_a_strided_1x1_convolution_of_few_channels_is_not_given_channels_last(name, norm, monkeypatch):
    """Its weight gradient corrupts memory in that layout, which ends the process at some later time."""
    backbone = Backbone(name, norm="live" if norm == "live" else "frozen", fold=norm == "folded", num_maps=3)
    assert any(isinstance(m, FoldedConv2d) for m in backbone.modules()) == (norm == "folded")
    seen, convolve = {}, nn.functional.conv2d

    def look(maps, weight, bias=None, stride=1, *rest):
        if weight.shape[2:] == (1, 1) and tuple(stride) == (2, 2):
            seen[weight.shape[1]] = maps.is_contiguous()
        return convolve(maps, weight, bias, stride, *rest)

    monkeypatch.setattr(nn.functional, "conv2d", look)
    backbone(torch.randn(3, 3, 64, 72))
    assert (3 in seen) == (name == "repvgg_a0") and seen.pop(3, True) and seen
    assert not any(seen.values()), "elsewhere channels last is the faster one"


@pytest.mark.parametrize("name", ["resnet18d", "convnext_atto", "repvgg_a0"])
def test_cells_are_counted_as_a_model_rounds_them(name):
    backbone = Backbone(name, norm="live", num_maps=3).train()
    state = {n: t.clone() for n, t in backbone.state_dict().items()}
    counted = [backbone.num_cells(side) for side in (64, 63, 50)]
    assert all(torch.equal(t, state[n]) for n, t in backbone.state_dict().items()), "nothing was computed"
    with torch.no_grad():
        seen = [sum(m[0, 0].numel() for m in backbone.eval()(torch.zeros(1, 3, side, side))) for side in (64, 63, 50)]
    assert counted == seen and seen[0] == 84


def test_cells_are_rounded_up_where_the_meta_device_lacks_an_operation(monkeypatch):
    def lacking(*_):
        raise NotImplementedError

    monkeypatch.setattr(torch.func, "functional_call", lacking)
    assert Backbone("resnet18d", norm="live", num_maps=3).num_cells(63) == 8**2 + 4**2 + 2**2


def test_layer_norm_and_group_norm_stay_and_train():
    backbone = Backbone("convnext_atto", norm="frozen", frozen_stages=0)
    norms = [m for m in backbone.modules() if isinstance(m, nn.LayerNorm)]
    assert norms and all(p.requires_grad for m in norms for p in m.parameters())


@pytest.mark.parametrize(
    ("stages", "frozen"), [(0, []), (1, ["conv1"]), (2, ["conv1", "layer1"]), (3, ["conv1", "layer1", "layer2"])]
)
def test_frozen_stages_count_from_the_stem(stages, frozen):
    body = Backbone("resnet18", norm="frozen", frozen_stages=stages).body
    still = {n.partition(".")[0] for n, p in body.named_parameters() if not p.requires_grad}
    moving = {n.partition(".")[0] for n, p in body.named_parameters() if p.requires_grad}
    assert sorted(still) == frozen and not still & moving


def test_frozen_stage_of_a_live_backbone_keeps_its_statistics():
    """Frozen filters under moving statistics would be no frozen stage."""
    backbone = Backbone("resnet18", norm="live", frozen_stages=2).train()
    before = backbone.body.layer1[0].bn1.running_mean.clone()
    live = backbone.body.layer2[0].bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert torch.equal(backbone.body.layer1[0].bn1.running_mean, before)
    assert not torch.equal(backbone.body.layer2[0].bn1.running_mean, live)


def test_live_norm_trains_on_a_padded_batch(make_recipe, make_batch):
    recipe = make_recipe({"weights": "none"})
    model = models.build(recipe, 4).train()
    criterion = models.build_criterion(recipe, 4)
    norms = _live_norms(model.backbone)
    assert norms and all(p.requires_grad for p in model.parameters())
    images, mask, targets = make_batch([1, 0, 2], dtype=torch.float32)
    criterion(model(images, mask), targets, criterion.normalisers(criterion.count(targets))).total.backward()
    assert all(n.weight.grad.isfinite().all() for n in norms)
    assert all(n.num_batches_tracked == 1 for n in norms)


def test_dc5_dilates_the_last_stage():
    backbone = Backbone("resnet50", norm="frozen", dc5=True)
    assert backbone(torch.randn(1, 3, 64, 96))[0].shape == (1, 2048, 4, 6)
    second = [backbone.body.layer4[i].conv2 for i in range(3)]
    assert [c.dilation for c in second] == [(1, 1), (2, 2), (2, 2)]  # torchvision's; detectron2 dilates all three


def test_dc5_is_refused_where_there_is_no_stride_16():
    with pytest.raises(UserError, match="dc5"):
        Backbone("swin_tiny_patch4_window7_224", dc5=True)


@pytest.mark.parametrize(
    ("backbone", "init_from", "frozen"),
    [
        ({"weights": "pretrained"}, None, True),
        ({"weights": "none"}, None, False),
        ({"weights": "none"}, "some/run", True),
        ({"weights": "pretrained", "norm": "live", "frozen_stages": 0}, None, False),
    ],
)
def test_auto_freezes_exactly_what_is_trained_already(make_recipe, backbone, init_from, frozen):
    model = models.build(make_recipe(backbone, init_from=init_from), 4, load_weights=False)
    assert any(isinstance(m, FrozenBatchNorm2d) for m in model.modules()) is frozen
    assert bool(_live_norms(model)) is not frozen
    assert model.backbone.body.conv1.weight.requires_grad is not frozen
    assert any(isinstance(m, FoldedConv2d) for m in model.modules()) is frozen


def test_folding_can_be_switched_off(make_recipe):
    model = models.build(make_recipe({"fold_norm": False}), 4, load_weights=False)
    assert not any(isinstance(m, FoldedConv2d) for m in model.modules())


def test_frozen_statistics_on_random_weights_are_refused(make_recipe):
    with pytest.raises(ValueError, match="norm is frozen while .*weights is none"):
        models.build(make_recipe({"weights": "none", "norm": "frozen"}), 4)
    with pytest.raises(UserError, match="frozen_stages is 2 while .*weights is none"):
        models.build(make_recipe({"weights": "none", "frozen_stages": 2}), 4)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnett18", "did you mean resnet18"), ("resnet18.nonsense", "tv_in1k"), ("not_a_model_at_all_xyz", "timm")],
)
def test_unknown_names_are_refused_with_near_ones(name, hint):
    with pytest.raises(UserError, match=hint):
        Backbone(name)


def test_a_model_without_blocks_to_compute_again_says_so():
    with pytest.raises(UserError, match="activation_checkpointing"):
        Backbone("vgg11", checkpointing=True)


def test_recipe_defaults_are_detr_r101():
    recipe = recipes.Recipe(data=recipes.Data(root="/data"))
    model = models.build(recipe, 91, device="meta", load_weights=False)
    assert model.mean == (0.485, 0.456, 0.406) and model.std == (0.229, 0.224, 0.225)
    trained = {n.split(".")[2] for n, _ in models.param_groups(model)["backbone"]}
    assert trained == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "hrnet_w18_small"])
def test_sides_that_no_patch_divides_are_padded_below_and_to_the_right(name):
    torch.manual_seed(0)
    backbone = Backbone(name).eval()
    images, padded = torch.randn(1, 3, 72, 100), torch.zeros(1, 3, 96, 128)
    padded[..., :72, :100] = images
    below, right = (-side % backbone.side_multiple for side in (72, 100))
    with torch.no_grad():
        (features,) = backbone(images)
        assert torch.equal(features, backbone(padded[..., : 72 + below, : 100 + right])[0])
    assert features.shape[-2:] == (-(-72 // backbone.stride), -(-100 // backbone.stride))


def test_models_that_take_any_size_are_given_the_image_as_it_is():
    assert Backbone("resnet18").side_multiple == 1


def test_a_detector_takes_a_canvas_that_no_patch_divides(make_model, make_batch):
    model = make_model(backbone={"name": "vit_tiny_patch16_224", "weights": "none"}).eval()
    images, mask, _ = make_batch([1, 1], height=72, width=100)
    assert model(images, mask)["pred_boxes"].isfinite().all()


@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "levit_128s"])
def test_a_model_for_one_image_size_is_refused_before_the_first_image(name):
    with pytest.raises(UserError, match=f"model.backbone.name: {name} takes images of one size only.*resnet50"):
        Backbone(name)


@pytest.mark.parametrize("name", ["hrnet_w18_small", "resnet18d"])
def test_maps_end_with_the_image_where_sides_must_be_multiples(name):
    """Boxes are in 0..1 of the image: cells of what was added beside it would move them all."""
    backbone = Backbone(name, num_maps=3)
    maps = backbone(torch.zeros(1, 3, 72, 100))
    assert [m.shape[-2:] for m in maps] == [(9, 13), (5, 7), (3, 4)]


def test_maps_that_make_no_pyramid_are_refused_before_the_first_image():
    with pytest.raises(UserError, match="vit_tiny_patch16_224 has the strides 16, 16, 16; choose another"):
        Backbone("vit_tiny_patch16_224", num_maps=3)
    with pytest.raises(UserError, match="model.rtdetr.num_points has 6 numbers, and resnet18d has fewer feature maps"):
        Backbone("resnet18d", num_maps=6)
