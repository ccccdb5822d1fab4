"""Our DETR against transformers', with the same random weights: outputs, each loss term, every gradient.

In double precision, norm weights and statistics random, queries spread apart, no dropout, padded images, unequal
numbers of boxes. One process and one batch: there, and only there, its local denominators are ours.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")

from transformers import DetrConfig, DetrForObjectDetection  # noqa: E402
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss  # noqa: E402

from detr_accel import models  # noqa: E402
from detr_accel import recipe as recipes  # noqa: E402
from detr_accel.models import keymaps  # noqa: E402
from detr_accel.structures import Targets  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.law6]
NUM_CLASSES = 6


@pytest.fixture(autouse=True)
def double_precision():
    """transformers makes some constants in the default type (the class weights, the number of boxes)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def _randomise(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if key.startswith("query_embed"):
                value.copy_(4 * noise)
            elif value.dim() > 1:
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif key.endswith(("weight", "running_var")):
                value.copy_(0.5 + 0.3 * noise.abs())
            else:
                value.copy_(0.1 * noise)
    return module


def _ours(name, dc5, fold, width):
    part = recipes.Backbone(name=name, dc5=dc5, fold_norm=fold)
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 3, "dim_feedforward": 48, "num_queries": 9}
    model = recipes.Model(backbone=part, hidden_dim=width, num_heads=4, dropout=0.0, **sizes)
    recipe = recipes.Recipe(data=recipes.Data(root="/data"), model=model, loss=recipes.Loss(eos_coef=0.2, bbox=3.0))
    module = models.build(recipe, NUM_CLASSES, load_weights=False).double()
    return _randomise(module).train(), models.build_criterion(recipe, NUM_CLASSES)


def _theirs(ours, name, dc5, width):
    stride = {"output_stride": 16} if dc5 else {}
    config = DetrConfig(
        backbone_config={
            "model_type": "timm_backbone", "backbone": name, "features_only": True, "use_pretrained_backbone": False,
            "out_indices": [1, 2, 3, 4], **stride,
        },
        d_model=width, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=9,
        encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0, attention_dropout=0.0,
        num_labels=NUM_CLASSES, auxiliary_loss=False, eos_coefficient=0.2, bbox_loss_coefficient=3,
        attn_implementation="eager",
    )  # fmt: skip
    module = DetrForObjectDetection(config).double().train()
    with torch.no_grad():
        # every one of its tensors is filled from ours through the inverse of the map that is under test elsewhere
        for tensor, source in _shared(module, ours.state_dict()):
            tensor.copy_(source)
    return module


def _shared(theirs, state):
    """Pairs of (their tensor, ours), attention projections cut; complete on both sides."""
    own = {k: v for k, v in theirs.state_dict().items() if not keymaps.is_counter(k)}
    marked = {k: torch.full(v.shape, float(i)) for i, (k, v) in enumerate(own.items())}
    named = keymaps.from_transformers(marked)  # our name -> which of theirs, row by row
    assert set(named) == set(state)
    keys, pairs = list(own), []
    for name, marks in named.items():
        assert marks.shape == state[name].shape, name
        rows = marks.flatten(1)[:, 0] if marks.dim() > 1 else marks
        for mark in rows.unique(sorted=False) if rows.dim() else [marks]:
            pairs.append((own[keys[int(mark)]], state[name][rows == mark]))
    assert len(pairs) == len(own)
    return pairs


def _their_outputs_and_loss(theirs, images, mask, targets):
    """Their model, shared norm, heads, matcher and losses on every decoder layer.

    Not through config.auxiliary_loss: with it, transformers feeds each layer the *normalised* output of the one
    before, and normalises the last twice, another network than the original (and its own with that switch off).
    """
    layers = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: layers.append(output))
        for layer in theirs.model.decoder.layers
    ]
    outputs = theirs(pixel_values=images, pixel_mask=(~mask).long())
    for handle in handles:
        handle.remove()
    hidden = theirs.model.decoder.layernorm(torch.stack(layers))
    logits, boxes = theirs.class_labels_classifier(hidden), theirs.bbox_predictor(hidden).sigmoid()
    _close(logits[-1], outputs.logits, "their own logits")
    _close(boxes[-1], outputs.pred_boxes, "their own boxes")
    labels = [{"class_labels": t.labels, "boxes": t.boxes_cxcywh} for t in targets]
    theirs.config.auxiliary_loss = True  # for the loss alone
    total, terms, _ = ForObjectDetectionLoss(logits[-1], labels, "cpu", boxes[-1], theirs.config, logits, boxes)
    return logits, boxes, total, terms


def _batch(height, width):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, height, width, generator=generator)
    mask = torch.zeros(3, height, width, dtype=torch.bool)
    mask[1, :, width - 40 :], mask[2, height - 40 :] = True, True
    images = images * ~mask[:, None]
    targets = []
    for i, size in enumerate((3, 0, 5)):
        boxes = torch.rand(size, 4, generator=generator) * 0.5 + 0.25
        labels = torch.randint(0, NUM_CLASSES, (size,), generator=generator)
        targets.append(Targets(i, labels, boxes, (height, width), (height, width)))
    return images, mask, targets


def _close(actual, expected, what, floor=1e-12):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=floor, msg=lambda text: f"{what}: {text}")


CASES = [
    pytest.param("resnet18.tv_in1k", False, True, id="r18"),
    pytest.param("resnet18.tv_in1k", False, False, id="r18-unfolded"),
    pytest.param("resnet50.tv_in1k", False, True, id="r50"),
    pytest.param("resnet50.tv_in1k", True, True, id="r50-dc5"),
    pytest.param("resnet101.tv_in1k", False, True, id="r101", marks=pytest.mark.slow),
    pytest.param("resnet101.tv_in1k", True, True, id="r101-dc5", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "dc5", "fold"), CASES)
def test_detr_equals_transformers(name, dc5, fold):
    ours, criterion = _ours(name, dc5, fold, width=32)
    theirs = _theirs(ours, name, dc5, width=32)
    images, mask, targets = _batch(64, 96)

    outputs = ours(images, mask)
    result = criterion(outputs, targets, criterion.normalisers(criterion.count(targets)))
    result.total.backward()
    logits, boxes, total, terms = _their_outputs_and_loss(theirs, images, mask, targets)
    total.backward()

    for i, layer in enumerate([*outputs["aux_outputs"], outputs]):
        _close(layer["pred_logits"], logits[i], f"logits of layer {i}")
        _close(layer["pred_boxes"], boxes[i], f"boxes of layer {i}")
    their_losses = {k: v for k, v in terms.items() if k.startswith("loss_")}
    assert set(their_losses) == {k for k in result.losses if k.startswith("loss_")} and len(their_losses) == 9
    for key, value in their_losses.items():
        _close(result.losses[key], value.detach().double(), key)
    # theirs averages whole numbers in float32
    torch.testing.assert_close(result.losses["cardinality_error"].float(), terms["cardinality_error"].float())
    _close(result.total, total, "total")

    gradients = keymaps.from_transformers({k: p.grad for k, p in theirs.named_parameters() if p.grad is not None})
    trained = {k: p.grad for k, p in ours.named_parameters() if p.requires_grad}
    frozen = {k for k, p in ours.named_parameters() if not p.requires_grad}  # theirs trains these stages too
    assert set(trained) | frozen == set(gradients)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert norm > 0.1
    # a hundred random layers make features of 4e4, which multiply rounding: 8e-11 was seen, norms folded or not
    rounding = 1e-9 if "101" in name else 1e-12
    for key, value in trained.items():
        _close(value, gradients[key], f"gradient of {key}", floor=rounding * norm.item())
        assert value.any(), key
