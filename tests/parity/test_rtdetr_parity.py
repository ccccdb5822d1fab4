"""Our RT-DETR against transformers' two versions, with the same random weights: outputs, loss terms, every gradient.

In double precision, norm weights and statistics random, unequal numbers of boxes, denoising included: transformers'
disturbed boxes are replaced by ours, which are drawn otherwise. One process and one batch: there, and only there, its
local denominators are ours. It cuts the gradient between decoder layers where the original does not (look_twice).
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")

import transformers.models.rt_detr.modeling_rt_detr as first  # noqa: E402
import transformers.models.rt_detr_v2.modeling_rt_detr_v2 as second  # noqa: E402
from rtdetr_files import randomise, small_recipe  # noqa: E402
from transformers import RTDetrConfig, RTDetrResNetConfig, RTDetrV2Config  # noqa: E402

from detr_accel import models  # noqa: E402
from detr_accel.models import rtdetr_keymaps as keymaps  # noqa: E402
from detr_accel.models.denoising import generators  # noqa: E402
from detr_accel.models.keymaps import is_counter  # noqa: E402
from detr_accel.models.rtdetr import inverse_sigmoid  # noqa: E402
from detr_accel.structures import Targets  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.law6]
NUM_CLASSES, LAYERS, QUERIES, DISTURBED = 7, 3, 20, 10
WEIGHTS = {"vfl": 1.0, "bbox": 5.0, "giou": 2.0}


@dataclass
class Case:
    second: bool = False
    bottleneck: bool = False
    size: tuple[int, int] = (96, 96)
    boxes: tuple[int, ...] = (3, 5)
    theirs: dict = field(default_factory=dict)
    ours: dict = field(default_factory=dict)
    floats: torch.dtype = torch.float64


CASES = {
    "v1": Case(),
    "v1-rectangle-silu": Case(
        size=(96, 128), theirs={"decoder_activation_function": "silu"}, ours={"activation": "silu"}
    ),
    "v1-bottleneck-image-without-boxes": Case(bottleneck=True, boxes=(3, 0)),
    "v2-two-points": Case(second=True, theirs={"decoder_n_points": 2}, ours={"num_points": [2, 2, 2]}),
    "v2-discrete": Case(second=True, theirs={"decoder_method": "discrete"}, ours={"sampling": "discrete"}),
    "v1-float32": Case(floats=torch.float32),
}


@pytest.fixture(params=CASES)
def case(request):
    """transformers makes some constants in the default type."""
    case, before = CASES[request.param], torch.get_default_dtype()
    torch.set_default_dtype(case.floats)
    yield case
    torch.set_default_dtype(before)


def _ours(case):
    inside = {"encoder_dim": 48, "encoder_feedforward": 64, "expansion": 0.5, "look_twice": False, **case.ours}
    recipe = small_recipe(
        "resnet26d.bt_in1k" if case.bottleneck else "resnet18d.ra2_in1k", rtdetr=inside | {"num_denoising": DISTURBED},
        hidden_dim=32, num_heads=4, num_decoder_layers=LAYERS, dim_feedforward=64, num_queries=QUERIES,
    )  # fmt: skip
    model = randomise(models.build(recipe, NUM_CLASSES, load_weights=False).to(case.floats))
    return model, models.build_criterion(recipe, NUM_CLASSES)


def _theirs(case, ours):
    kind, widths = ("bottleneck", [256, 512, 1024, 2048]) if case.bottleneck else ("basic", [64, 128, 256, 512])
    resnet = RTDetrResNetConfig(
        embedding_size=64, hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type=kind,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = (RTDetrV2Config if case.second else RTDetrConfig)(
        backbone_config=resnet, encoder_in_channels=widths[1:], encoder_hidden_dim=48, encoder_ffn_dim=64,
        hidden_expansion=0.5, encoder_attention_heads=4, d_model=32, decoder_in_channels=[48] * 3, decoder_ffn_dim=64,
        decoder_attention_heads=4, decoder_layers=LAYERS, num_queries=QUERIES, num_denoising=DISTURBED,
        num_labels=NUM_CLASSES, **case.theirs,
    )  # fmt: skip
    module = second.RTDetrV2ForObjectDetection(config) if case.second else first.RTDetrForObjectDetection(config)
    own = {k: v for k, v in module.state_dict().items() if not k.endswith("n_points_scale")}
    state = keymaps.to_transformers(ours.state_dict(), heads_twice=case.second)
    with torch.no_grad():
        for key, value in own.items():  # theirs are in the names of version 5's modules
            value.copy_(state.pop(_hub_name(key)))
    assert all(is_counter(k) for k in state)  # nothing of ours is left over
    return module


def _hub_name(key):
    for new, old in (("encoder.aifi.", "encoder.encoder."), (".o_proj.", ".out_proj."), (".mlp.fc", ".fc")):
        key = key.replace(new, old)
    return key


def _batch(case):
    rng = np.random.default_rng(3)
    images = torch.from_numpy(rng.standard_normal((len(case.boxes), 3, *case.size))).to(case.floats)
    targets = []
    for i, num in enumerate(case.boxes):
        boxes = np.concatenate((rng.uniform(0.3, 0.7, (num, 2)), rng.uniform(0.1, 0.4, (num, 2))), 1)
        labels = torch.from_numpy(rng.integers(0, NUM_CLASSES, num))
        targets.append(Targets(i, labels, torch.from_numpy(boxes).to(case.floats), case.size, case.size))
    return images, targets


def _disturb_as_ours(monkeypatch, denoising):
    """Hand transformers our disturbed boxes, in the form of its own function."""
    groups, slots = denoising.size.num_groups, denoising.size.num_slots

    def disturbed(targets, num_classes, num_queries, class_embed, **_):
        may_see = denoising.may_see(num_queries)[0, 0]
        mask = torch.zeros(may_see.shape).masked_fill(~may_see, -torch.inf)
        starts = 2 * slots * torch.arange(groups)
        positive = [(starts[:, None] + torch.arange(len(t["class_labels"]))).flatten() for t in targets]
        meta = {
            "dn_positive_idx": positive, "dn_num_group": groups,
            "dn_num_split": [denoising.size.num_queries, num_queries],
        }  # fmt: skip
        return class_embed(denoising.labels), inverse_sigmoid(denoising.boxes_cxcywh), mask, meta

    for module in (first, second):
        monkeypatch.setattr(module, "get_contrastive_denoising_training_group", disturbed)


def _norms_still(module):
    """Training with the statistics as they are: batch statistics would hide a wrong one."""
    module.train()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()


def _our_name(key):
    """loss_vfl_aux_0 -> loss_vfl_0; the encoder's own prediction is the aux term behind those of the layers."""
    return key.replace(f"_aux_{LAYERS - 1}", "_enc").replace("_aux_", "_")


def _close(actual, expected, what, floor=0.0):
    exact = actual.dtype == torch.float64
    rtol = 1e-9 if exact else 2e-3
    atol = max(1e-12 if exact else 2e-5, floor * (1e-11 if exact else 2e-5))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def test_rtdetr_equals_transformers(case, monkeypatch):
    ours, criterion = _ours(case)
    theirs = _theirs(case, ours)
    images, targets = _batch(case)
    nowhere, no_mask = (torch.zeros(len(images), *size, dtype=torch.bool) for size in (case.size, (0, 0)))
    with torch.no_grad():
        wanted = theirs.eval()(images)
        for mask in (nowhere, no_mask):
            found = ours.eval()(images, mask)
            _close(found["pred_logits"], wanted.logits, "logits")
            _close(found["pred_boxes"], wanted.pred_boxes, "boxes")
    assert wanted.logits.std(1).min() > 1e-3  # queries apart, so that a wrong order would show

    most = max(case.boxes)
    denoising = criterion.noise.queries(targets, generators(1, 0, range(len(targets))), NUM_CLASSES, most)
    _disturb_as_ours(monkeypatch, denoising)
    _norms_still(ours)
    _norms_still(theirs)
    labels = [{"class_labels": t.labels, "boxes": t.boxes_cxcywh} for t in targets]
    wanted = theirs(images, labels=labels)
    wanted.loss.backward()
    counts = criterion.normalisers(criterion.count(targets))
    result = criterion(ours(images, nowhere, denoising), targets, counts, denoising)
    result.total.backward()

    terms = {_our_name(k): v.detach() for k, v in wanted.loss_dict.items()}
    assert set(terms) == {k for k in result.losses if k.startswith("loss_")}
    assert len(terms) == 3 * (LAYERS + 1 + LAYERS)
    for key, value in terms.items():
        _close(result.losses[key] * WEIGHTS[key.split("_")[1]], value.to(case.floats), key)
    _close(result.total, wanted.loss.to(case.floats), "total")

    gradients = keymaps.from_transformers({k: p.grad for k, p in theirs.named_parameters() if p.grad is not None})
    trained = {k: p.grad for k, p in ours.named_parameters() if p.requires_grad}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    still = {k for k, p in ours.named_parameters() if not p.requires_grad}  # the stem, and offsets of whole cells
    assert set(trained) - still == set(gradients) - still and norm > 0.1
    for key, value in trained.items():
        _close(value, gradients[key], f"gradient of {key}", floor=norm)
        assert value.any(), key
