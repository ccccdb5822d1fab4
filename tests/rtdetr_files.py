"""Small RT-DETRs and the files that other programs would make of them, for the tests of conversion."""

import copy
import itertools

import torch

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.models import rtdetr_keymaps, weights
from detr_accel.models.coco_classes import coco_80

SIZES = {
    "hidden_dim": 16, "num_heads": 8, "num_encoder_layers": 1, "num_decoder_layers": 2, "dim_feedforward": 24,
    "num_queries": 300, "dropout": 0.0,
}  # fmt: skip
INSIDE = {"encoder_dim": 32, "encoder_feedforward": 40, "expansion": 0.5}
DEIM = {"activation": "silu", "mlp_activation": "silu", "query_pos_layers": 3}


def small_recipe(backbone="resnet18d.ra2_in1k", live=False, rtdetr=None, loss=None, first_shortcut=None, **changes):
    basic = backbone.startswith(("resnet18d", "resnet34d")) if first_shortcut is None else first_shortcut
    part = recipes.Backbone(
        name=backbone, pixels="unit", norm="live" if live else "frozen", frozen_stages=0 if live else 1,
        first_shortcut=basic,
    )  # fmt: skip
    inside = recipes.Model.model_fields["rtdetr"].annotation(**{**INSIDE, **(rtdetr or {})})
    model = recipes.Model(name="rtdetr", backbone=part, rtdetr=inside, **{**SIZES, **changes})
    terms = recipes.Loss(cost_class=2.0, **(loss or {}))
    data = recipes.Data(root="/data/coco", square=True, eval_size=640, eval_max_size=640)
    return recipes.Recipe(data=data, model=model, loss=terms)


def randomise(module, seed=0):
    """Every number random and no two tensors alike, norms kept sane; counters count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, (key, value) in enumerate(module.state_dict().items()):
            if not value.is_floating_point():
                value.fill_(i + 1)
                continue
            noise = torch.randn(value.shape, generator=generator).to(value)
            if value.dim() > 1:
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif key.endswith(("weight", "running_var")):
                value.copy_(0.6 + 0.3 * noise.abs())
            else:
                value.copy_(0.1 * noise)
    return module


def small_model(num_classes=80, seed=0, **changes):
    """A model of one's own; equal ones are built once."""
    recipe, key = small_recipe(**changes), (num_classes, seed, repr(changes))
    if key not in _built:
        _built[key] = randomise(models.build(recipe, num_classes, load_weights=False), seed).eval()
    return copy.deepcopy(_built[key]), recipe


_built = {}


def loaded(num_classes=80, classes=None, **changes):
    """A detector of ours, as it would be read from a folder."""
    model, recipe = small_model(num_classes, **changes)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return weights.Loaded(state, recipe, classes or coco_80(), {"weights": "raw"}, None)


def official_state(version, live=False, side=64, **changes):
    """As the original saves it, its buffers included; their values follow the paper, not our code."""
    model, recipe = small_model(live=live, **changes)
    state = rtdetr_keymaps.to_official({k: v.clone() for k, v in model.state_dict().items()}, version)
    if version == 2:
        points = recipe.model.rtdetr.num_points
        for i in range(recipe.model.num_decoder_layers):
            scale = torch.tensor([1 / n for n in points for _ in range(n)])
            state[f"decoder.decoder.layers.{i}.cross_attn.num_points_scale"] = scale
        state["decoder.anchors"], state["decoder.valid_mask"] = anchors(side)
    return state


def anchors(height, width=None):
    cells = []
    for level, stride in enumerate((8, 16, 32)):
        h, w = height // stride, (width or height) // stride
        for y, x in itertools.product(range(h), range(w)):
            cells.append([(x + 0.5) / w, (y + 0.5) / h, 0.05 * 2**level, 0.05 * 2**level])
    boxes = torch.tensor([cells])
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    return torch.where(valid, (boxes / (1 - boxes)).log(), torch.inf), valid


def official_names(version, live, layers=2, blocks=(2, 2, 2, 2), basic=True, position_layers=2):
    """The names in an original file, written down from what such files hold."""
    norm = ["weight", "bias", "running_mean", "running_var"]
    counted = [*norm, "num_batches_tracked"]

    def conv_norm(prefix, statistics, first="conv", second="norm"):
        return [f"{prefix}.{first}.weight", *(f"{prefix}.{second}.{n}" for n in statistics)]

    def pair(prefix):
        return [f"{prefix}.weight", f"{prefix}.bias"]

    body = counted if live else norm
    names = [n for i in (1, 2, 3) for n in conv_norm(f"backbone.conv1.conv1_{i}", body)]
    for stage, count in enumerate(blocks):
        for block in range(count):
            prefix = f"backbone.res_layers.{stage}.blocks.{block}"
            for branch in "ab" if basic else "abc":
                names += conv_norm(f"{prefix}.branch2{branch}", body)
            if block == 0:
                names += conv_norm(f"{prefix}.short" + (".conv" if stage else ""), body)
    numbered = ("0", "1") if version == 1 else ("conv", "norm")
    for i in range(3):
        names += conv_norm(f"encoder.input_proj.{i}", counted, *numbered)
        names += conv_norm(f"decoder.input_proj.{i}", counted)
    for i, side in itertools.product(range(2), ("fpn", "pan")):
        prefix = f"encoder.{side}_blocks.{i}"
        names += [n for j in (1, 2, 3) for n in conv_norm(f"{prefix}.conv{j}", counted)]
        for k, j in itertools.product(range(3), (1, 2)):
            names += conv_norm(f"{prefix}.bottlenecks.{k}.conv{j}", counted)
        names += conv_norm(f"encoder.{'lateral' if side == 'fpn' else 'downsample'}_convs.{i}", counted)

    def attention(prefix):
        return [f"{prefix}.in_proj_weight", f"{prefix}.in_proj_bias", *pair(f"{prefix}.out_proj")]

    one = "encoder.encoder.0.layers.0"
    names += attention(f"{one}.self_attn")
    names += [n for part in ("linear1", "linear2", "norm1", "norm2") for n in pair(f"{one}.{part}")]
    for i in range(layers):
        one = f"decoder.decoder.layers.{i}"
        names += attention(f"{one}.self_attn")
        across = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        names += [n for part in across for n in pair(f"{one}.cross_attn.{part}")]
        names += [n for part in ("linear1", "linear2", "norm1", "norm2", "norm3") for n in pair(f"{one}.{part}")]
        names += [f"{one}.cross_attn.num_points_scale"] if version == 2 else []
        names += pair(f"decoder.dec_score_head.{i}")
        names += [n for j in range(3) for n in pair(f"decoder.dec_bbox_head.{i}.layers.{j}")]
    names += ["decoder.denoising_class_embed.weight", *pair("decoder.enc_score_head")]
    for part in ("0", "1") if version == 1 else ("proj", "norm"):
        names += pair(f"decoder.enc_output.{part}")
    names += [n for j in range(3) for n in pair(f"decoder.enc_bbox_head.layers.{j}")]
    names += [n for j in range(position_layers) for n in pair(f"decoder.query_pos_head.layers.{j}")]
    return {*names, *(("decoder.anchors", "decoder.valid_mask") if version == 2 else ())}
