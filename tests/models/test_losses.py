import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from detr_accel import models
from detr_accel.boxes import cxcywh_to_xyxy
from detr_accel.models.autocast import within_half
from detr_accel.models.class_losses import CrossEntropy
from detr_accel.models.losses import SetCriterion
from detr_accel.models.matcher import Matcher
from detr_accel.models.transformer import DecoderLayer
from detr_accel.structures import Targets, UserError


def _criterion(make_recipe, **loss):
    return models.build_criterion(make_recipe(loss=loss), 4)


def _outputs(num_images, dtype=torch.float64, num_layers=3, seed=0):
    exact = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    rows = [
        {
            "pred_logits": torch.randn(num_images, 7, 5, **exact).to(dtype),
            "pred_boxes": (torch.rand(num_images, 7, 4, **exact) * 0.4 + 0.3).to(dtype),
        }
        for _ in range(num_layers)
    ]
    for row in rows:
        for value in row.values():
            value.requires_grad_()
    return {**rows[-1], "aux_outputs": rows[:-1]}


def _whole(criterion, outputs, targets):
    return criterion(outputs, targets, criterion.normalisers(criterion.count(targets)))


def test_terms_are_those_of_the_paper(make_recipe, make_batch):
    """Each term computed again from the assignment, with torch's and torchvision's own losses."""
    criterion = _criterion(make_recipe)
    _, _, targets = make_batch([2, 0, 3])
    outputs = _outputs(3)
    result = _whole(criterion, outputs, targets)
    for suffix, layer in (("_0", outputs["aux_outputs"][0]), ("_1", outputs["aux_outputs"][1]), ("", outputs)):
        wanted = torch.full((3, 7), 4)
        distance = overlap = 0.0
        for image, target in enumerate(targets):
            if len(target.labels) == 0:
                continue
            logits, boxes = layer["pred_logits"][image].detach(), layer["pred_boxes"][image].detach()
            match = criterion.matcher(
                logits[None, None], boxes[None, None], target.labels, target.boxes_cxcywh, [len(target.labels)]
            )
            query, index = match.query_index[0], match.target_index[0]
            wanted[image, query] = target.labels[index]
            distance += (boxes[query] - target.boxes_cxcywh[index]).abs().sum()
            pair = cxcywh_to_xyxy(boxes[query]), cxcywh_to_xyxy(target.boxes_cxcywh[index])
            overlap += generalized_box_iou_loss(*pair, reduction="sum", eps=0)
        class_weight = torch.tensor([1, 1, 1, 1, 0.1], dtype=torch.float64)
        ce = F.cross_entropy(layer["pred_logits"].transpose(1, 2), wanted, class_weight)
        torch.testing.assert_close(result.losses[f"loss_ce{suffix}"], ce.detach())
        torch.testing.assert_close(result.losses[f"loss_bbox{suffix}"], distance / 5)
        torch.testing.assert_close(result.losses[f"loss_giou{suffix}"], overlap / 5)


def test_total_is_the_weighted_sum_of_all_layers(make_recipe, make_batch):
    _, _, targets = make_batch([2, 1])
    result = _whole(_criterion(make_recipe, ce=0.7, bbox=3.0, giou=1.5), _outputs(2), targets)
    weights = {"ce": 0.7, "bbox": 3.0, "giou": 1.5}
    suffixes = ("", "_0", "_1")
    total = sum(w * result.losses[f"loss_{n}{s}"] for n, w in weights.items() for s in suffixes)
    torch.testing.assert_close(result.total.detach(), total)
    assert not any(v.requires_grad for v in result.losses.values())


def test_without_aux_only_the_last_layer_is_supervised(make_recipe, make_batch):
    _, _, targets = make_batch([2, 1])
    outputs = _outputs(2)
    result = _whole(_criterion(make_recipe, aux=False), outputs, targets)
    figures = ["box_spread", "cardinality_error", "class_error"]
    assert sorted(result.losses) == [*figures, "loss_bbox", "loss_ce", "loss_giou"]
    result.total.backward()
    assert outputs["aux_outputs"][0]["pred_logits"].grad is None


def test_empty_targets_give_a_zero_that_hangs_on_the_graph(make_recipe, make_batch):
    """Each parameter gets a gradient on every rank, also on one that saw no box."""
    _, _, targets = make_batch([0, 0])
    outputs = _outputs(2)
    result = _whole(_criterion(make_recipe), outputs, targets)
    assert result.losses["loss_bbox"] == result.losses["loss_giou"] == result.losses["class_error"] == 0
    assert result.losses["loss_ce"] > 0
    result.total.backward()
    for layer in (outputs, *outputs["aux_outputs"]):
        assert torch.equal(layer["pred_boxes"].grad, torch.zeros_like(layer["pred_boxes"]))


def test_half_precision_outputs_are_judged_in_float32(make_recipe, make_batch):
    _, _, targets = make_batch([2, 1], dtype=torch.float32)
    outputs = _outputs(2, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        result = _whole(_criterion(make_recipe), outputs, targets)
    assert {v.dtype for v in (result.total, *result.losses.values())} == {torch.float32}


@pytest.mark.law3
def test_poison_reaches_the_loss_and_the_flag(make_recipe, make_batch):
    _, _, targets = make_batch([2, 1])
    outputs = _outputs(2)
    with torch.no_grad():
        outputs["pred_logits"][1, 3, 2] = float("nan")
    result = _whole(_criterion(make_recipe), outputs, targets)
    assert result.bad_image.tolist() == [False, True]
    assert not result.total.isfinite()


def test_logged_errors(make_recipe, make_batch):
    criterion = _criterion(make_recipe)
    _, _, targets = make_batch([2, 1])
    outputs = _outputs(2)
    with torch.no_grad():
        outputs["pred_logits"].copy_(torch.eye(5, dtype=torch.float64)[4] * 9)  # every query: no object
    result = _whole(criterion, outputs, targets)
    assert result.losses["class_error"] == 100
    assert result.losses["cardinality_error"] == 1.5  # (2 + 1) / 2 images
    with torch.no_grad():
        for image, target in enumerate(targets):
            for query, (label, box) in enumerate(zip(target.labels, target.boxes_cxcywh, strict=True)):
                outputs["pred_logits"][image, query] = torch.eye(5, dtype=torch.float64)[label] * 9
                outputs["pred_boxes"][image, query] = box
    result = _whole(criterion, outputs, targets)
    assert result.losses["class_error"] == 0 and result.losses["cardinality_error"] == 0
    assert result.losses["loss_bbox"] == 0 and result.losses["loss_giou"].abs() < 1e-12


def test_denominators(make_recipe, make_batch):
    criterion = _criterion(make_recipe, eos_coef=0.25)
    _, _, targets = make_batch([9, 0, 2])  # 7 queries: 9 targets give 7 pairs
    counts = criterion.normalisers(criterion.count(targets))
    assert counts["num_boxes"] == 11
    assert counts["ce"] == 9 + 0.25 * (3 * 7 - 9)
    assert criterion.normalisers(torch.zeros(3, dtype=torch.float64))["num_boxes"] == 1


@pytest.mark.law1
@pytest.mark.parametrize("cut", [[1, 1, 1, 1], [2, 2], [1, 3]])
def test_micro_batches_add_up_to_the_window(make_model, make_recipe, make_batch, cut):
    """Loss, every logged term and every gradient, with unequal boxes, more targets than queries and an empty image."""
    images, mask, targets = make_batch([3, 0, 9, 1], width=64)
    criterion = _criterion(make_recipe)
    counts = criterion.normalisers(criterion.count(targets))
    whole = make_model()
    expected = criterion(whole(images, mask), targets, counts)
    expected.total.backward()

    model = make_model()
    terms = dict.fromkeys(expected.losses, 0.0)
    added = torch.zeros(3, dtype=torch.float64)
    start = 0
    for size in cut:
        part = slice(start, start := start + size)
        added += criterion.count(targets[part])
        result = criterion(model(images[part], mask[part]), targets[part], counts)
        result.total.backward()
        terms = {k: v + result.losses[k] for k, v in terms.items()}
    assert torch.equal(added, criterion.count(targets))
    for name, value in terms.items():
        torch.testing.assert_close(value, expected.losses[name], rtol=1e-9, atol=1e-12, msg=name)
    gradients = {n: p.grad for n, p in whole.named_parameters() if p.requires_grad}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert norm > 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12 * norm.item(), msg=name)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_without_a_class_is_named_before_a_device_sees_it(label):
    criterion = SetCriterion(5, 4, Matcher(), {"ce": 1.0, "bbox": 5.0, "giou": 2.0}, CrossEntropy(0.1))
    boxes = torch.full((2, 4), 0.3)
    target = Targets(17, torch.tensor([0, label]), boxes, (8, 8), (8, 8))
    with pytest.raises(UserError, match=f"image 17 has a box with label {label}, and the model has the classes 0 to 4"):
        criterion.count([target])


def test_half_precision_stays_inside_its_border_and_nothing_else_is_touched():
    x = torch.tensor([70000.0, -70000.0, 3.0])
    assert within_half(x) is x, "float32 has no such border"
    half = within_half(torch.tensor([float("inf"), float("-inf"), 3.0, float("nan")], dtype=torch.float16))
    assert half[:3].tolist() == [65504.0, -65504.0, 3.0] and half[3].isnan(), "poison stays poison"
    layer = DecoderLayer(16, 4, 32, 0.0)
    with torch.no_grad():
        layer.linear2.weight.fill_(3e4)
        layer.linear1.weight.fill_(30.0)
    with torch.autocast("cpu", torch.float16):
        out = layer(*(torch.randn(2, 5, 16) for _ in range(4)), None)
    assert torch.isfinite(out).all()
