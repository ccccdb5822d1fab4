"""RT-DETR: outputs, query selection, padding, denoising, precision, export."""

import pytest
import torch

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.models.attention import shrink_mask
from detr_accel.models.deformable import levels_of
from detr_accel.models.denoising import Noise, generators
from detr_accel.models.detr import keep_decoder_layers
from detr_accel.models.rtdetr import _anchors, inverse_sigmoid
from detr_accel.structures import UserError


def maps(batch=2, seed=0, width=12, dim=16):
    """Of an encoder, for a canvas of 64 by 8 * width pixels."""
    gen = torch.Generator().manual_seed(seed)
    sizes = ((8, width), (4, width // 2), (2, width // 4))
    return [torch.randn(batch, dim, h, w, generator=gen, dtype=torch.float64) for h, w in sizes]


def nothing(batch=2):
    return torch.zeros(batch, 0, 0, dtype=torch.bool)


def disturbed(targets, most=None):
    most = max(len(t.labels) for t in targets) if most is None else most
    return Noise(12).queries(targets, generators(0, 0, range(len(targets))), 4, most)


def test_outputs_of_every_layer_of_the_encoder_and_of_denoising(make_rtdetr, make_batch):
    model = make_rtdetr().train()
    images, mask, targets = make_batch([2, 0, 3])
    denoising = disturbed(targets)
    found = model(images, mask, denoising)
    assert found["pred_logits"].shape == (3, 9, 4) and found["pred_boxes"].shape == (3, 9, 4)
    assert len(found["aux_outputs"]) == 2 and found["enc_outputs"]["pred_boxes"].shape == (3, 9, 4)
    assert [d["pred_logits"].shape for d in found["dn_outputs"]] == [(3, denoising.size.num_queries, 4)] * 3
    for layer in (found, found["enc_outputs"], *found["aux_outputs"], *found["dn_outputs"]):
        assert 0 <= layer["pred_boxes"].min() and layer["pred_boxes"].max() <= 1


def test_denoising_changes_nothing_of_the_queries(make_rtdetr, make_batch):
    model = make_rtdetr().eval()
    images, mask, targets = make_batch([2, 0, 3])
    with torch.no_grad():
        without, with_it = model(images, mask), model(images, mask, disturbed(targets))
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(without[key], with_it[key], rtol=1e-10, atol=1e-12)
    assert "dn_outputs" not in without


def test_a_denoising_group_does_not_see_the_others(make_rtdetr, make_batch):
    model = make_rtdetr().eval()
    images, mask, targets = make_batch([2, 1, 2])
    one = disturbed(targets)
    group = 2 * one.size.num_slots
    boxes = one.boxes_cxcywh.clone()
    boxes[:, group:] = 0.5
    other = type(one)(one.labels, boxes, one.size)
    with torch.no_grad():
        a, b = (model(images, mask, d)["dn_outputs"][-1]["pred_boxes"] for d in (one, other))
    torch.testing.assert_close(a[:, :group], b[:, :group], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(a[:, group:], b[:, group:])


def test_every_parameter_has_a_gradient_with_and_without_denoising(make_rtdetr, make_batch):
    recipe_model = make_rtdetr().train()
    criterion = models.build_criterion(recipes.loads(_TEXT), 4)
    images, mask, targets = make_batch([2, 0, 3])
    for denoising in (None, disturbed(targets)):
        recipe_model.zero_grad(set_to_none=True)
        outputs = recipe_model(images, mask, denoising)
        criterion(outputs, targets, criterion.normalisers(criterion.count(targets)), denoising).total.backward()
        missing = [n for n, p in recipe_model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


_TEXT = """
name: t
data: {format: shapes}
model: {name: rtdetr, num_queries: 9, backbone: {weights: none}, rtdetr: {num_denoising: 12}}
"""


# --- queries


def test_queries_are_the_cells_with_the_highest_score(make_rtdetr):
    decoder, given = make_rtdetr().decoder.eval(), maps()
    levels = levels_of(given, nothing())
    memory = torch.cat([p(m).flatten(2).transpose(1, 2) for p, m in zip(decoder.input_proj, given, strict=True)], 1)
    with torch.no_grad():
        contents, boxes_logit, encoder = decoder._select(memory, levels)
        anchors, is_anchor = _anchors(levels, memory.device, memory.dtype)
        cells = decoder.enc_output["norm"](decoder.enc_output["proj"](memory * is_anchor))
        scores = decoder.enc_score_head(cells)
    for b in range(2):
        best = sorted(range(len(scores[b])), key=lambda i: -scores[b, i].max().item())[:9]
        torch.testing.assert_close(encoder["pred_logits"][b], scores[b, best])
        torch.testing.assert_close(contents[b], cells[b, best])
        torch.testing.assert_close(boxes_logit[b], (decoder.enc_bbox_head(cells) + anchors)[b, best])


def test_no_query_is_taken_from_padding_however_it_scores(make_rtdetr):
    """Padding whose score is far above all of the image's, and an image that is hardly larger than the queries."""
    decoder, given = make_rtdetr().decoder.eval(), maps()
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 32:] = True
    levels = levels_of(given, mask)
    memory = torch.cat([p(m).flatten(2).transpose(1, 2) for p, m in zip(decoder.input_proj, given, strict=True)], 1)
    with torch.no_grad():  # padding is zeros in front of the projection
        padding = decoder.enc_output["norm"](decoder.enc_output["proj"].bias)
        decoder.enc_score_head.weight[0] = 100 * padding
        cells = decoder.enc_output["norm"](decoder.enc_output["proj"](memory))
        of_image = decoder.enc_score_head(cells)[1, levels.valid[1]].amax()
        assert decoder.enc_score_head(padding).amax() > of_image + 100
    centres = torch.cat([_centres(h, w) for h, w in levels.sizes])[levels.valid[1]] / torch.tensor([1 / 3, 1.0])
    with torch.no_grad():  # the box head moves them from the anchor: compare anchors alone
        for p in decoder.enc_bbox_head.parameters():
            p.zero_()
        _, boxes_logit, _ = decoder._select(memory, levels)
    chosen = boxes_logit[1].sigmoid()[:, :2]
    inside = (chosen[:, None] - centres[None]).abs().amax(-1).amin(1) < 1e-6
    assert inside.all() and levels.valid[1].sum() > len(inside) > 0


def _centres(h, w):
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    return torch.stack((x, y), -1).flatten(0, 1).double()


def test_anchors_are_squares_that_double_with_each_level_and_none_near_the_border():
    levels = levels_of([torch.zeros(1, 1, 80, 80), torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 20, 20)], nothing(1))
    anchors, is_anchor = _anchors(levels, torch.device("cpu"), torch.float64)
    boxes = anchors.sigmoid()
    for i, (rows, side) in enumerate(((slice(0, 6400), 0.05), (slice(6400, 8000), 0.1), (slice(8000, 8400), 0.2))):
        valid = is_anchor[0, rows, 0]
        torch.testing.assert_close(boxes[0, rows, 2:][valid], torch.full((int(valid.sum()), 2), side).double())
        assert (~valid).sum() == (4 * 80 - 4 if i == 0 else 0), "half a cell of 80 lies within a hundredth of the side"
    assert (boxes[~is_anchor[..., 0]] == 1).all()


def test_more_queries_than_cells_are_refused_in_a_sentence(make_rtdetr, make_batch):
    model = make_rtdetr(num_queries=200)
    images, mask, _ = make_batch([1])
    with pytest.raises(UserError, match=r"num_queries is 200, but .* has only 98 cells .* lower model.num_queries"):
        model(images, mask)


def test_learned_queries_start_as_learned(make_rtdetr, make_batch):
    model = make_rtdetr(parts={"learned_queries": True}).eval()
    images, mask, _ = make_batch([1, 1])
    with torch.no_grad():
        before = model(images, mask)["pred_boxes"]
        model.decoder.tgt_embed.weight.add_(torch.randn_like(model.decoder.tgt_embed.weight))
        assert not torch.allclose(before, model(images, mask)["pred_boxes"])


# --- padding


@pytest.mark.law1
@pytest.mark.parametrize("width", [8, 4])
def test_the_decoder_finds_the_same_on_a_padded_canvas(make_rtdetr, width):
    """What holds exactly: given the same maps where the image is, padding changes nothing, whatever it contains.
    The backbone's and the encoder's convolutions see what lies beside the border; see test_hybrid_encoder."""
    decoder = make_rtdetr().decoder.eval()
    wide = maps(width=12)
    narrow = [m[..., : m.shape[-1] * width // 12] for m in wide]
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[:, :, 8 * width :] = True
    with torch.no_grad():
        found, alone = decoder(wide, mask), decoder(narrow, nothing())
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[key], alone[key], rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        blind = decoder(wide, nothing())
    assert not torch.allclose(blind["pred_boxes"], alone["pred_boxes"]), "the mask matters"


@pytest.mark.law1
@pytest.mark.parametrize("height, width", [(64, 96), (800, 1333), (769, 1025), (33, 17), (30, 29), (9, 65)])
def test_an_image_has_the_same_cells_on_every_canvas(height, width):
    for stride in (8, 16, 32):
        own = (-(-height // stride), -(-width // stride))
        for canvas in ((height, width), (height, width + 7), (height, width + 301), (1333, 1400)):
            mask = torch.ones(1, *canvas, dtype=torch.bool)
            mask[:, :height, :width] = False
            size = (-(-canvas[0] // stride), -(-canvas[1] // stride))
            small = ~shrink_mask(mask, size)[0]
            assert (int(small[:, 0].sum()), int(small[0].sum())) == own, (stride, canvas)


def test_a_fully_padded_image_stays_finite_and_leaves_the_others_alone(make_rtdetr, make_batch):
    model = make_rtdetr().eval()
    images, mask, _ = make_batch([1, 1])
    alone = model(images[:1], mask[:1])
    mask[1] = True
    outputs = model(images, mask)
    assert outputs["pred_boxes"].isfinite().all() and outputs["pred_logits"].isfinite().all()
    torch.testing.assert_close(outputs["pred_boxes"][:1], alone["pred_boxes"], rtol=1e-9, atol=1e-12)
    outputs["pred_boxes"].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --- layers, parts, precision


def test_earlier_layers_are_what_a_shorter_decoder_finds(make_rtdetr, make_batch):
    model = make_rtdetr().eval()
    images, mask, _ = make_batch([1, 2])
    with torch.no_grad():
        full = model(images, mask)
        cut = keep_decoder_layers(model, 2)(images, mask)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(cut[key], full["aux_outputs"][1][key])
    with pytest.raises(UserError, match="this model has 2"):
        keep_decoder_layers(model, 3)


def test_looking_twice_sends_a_layers_box_loss_to_the_layer_before(make_rtdetr, make_batch):
    images, mask, _ = make_batch([1, 2])
    reached = []
    for twice in (True, False):
        model = make_rtdetr(parts={"look_twice": twice}).eval()
        model(images, mask)["pred_boxes"].square().sum().backward()
        first = model.decoder.dec_bbox_head[1].layers[-1].weight.grad
        reached.append(first is not None and bool(first.abs().sum() > 0))
    assert reached == [True, False]


@pytest.mark.parametrize("known", [False, True])
def test_a_layers_box_loss_reaches_its_own_head_and_the_one_before_alike_and_no_other(make_rtdetr, make_batch, known):
    """Exact: a box is sigmoid(step + logit of the box before), so both steps have one gradient, layer by layer."""
    images, mask, targets = make_batch([1, 2])
    model = make_rtdetr().eval()
    outputs = model(images, mask, disturbed(targets))
    rows = outputs["dn_outputs"] if known else [*outputs["aux_outputs"], outputs]
    biases = [head.layers[-1].bias for head in model.decoder.dec_bbox_head]
    for i, row in enumerate(rows):
        weights = torch.linspace(0.1, 1, row["pred_boxes"].numel()).view_as(row["pred_boxes"])
        if i > 0:  # a logit is bounded where a box touches the image's border, and has no gradient there
            weights = weights * ((rows[i - 1]["pred_boxes"] - 0.5).abs() < 0.4999)
        assert weights.count_nonzero() > 0.5 * weights.numel()
        loss = (row["pred_boxes"] * weights).sum()
        gradients = torch.autograd.grad(loss, biases, retain_graph=True, allow_unused=True)
        assert gradients[i].abs().min() > 0, i
        for j, gradient in enumerate(gradients):
            if j == i - 1:
                torch.testing.assert_close(gradient, gradients[i], rtol=1e-9, atol=1e-12)
            elif j != i:
                assert gradient is None or not gradient.any(), (i, j)


@pytest.mark.parametrize("part", ["backbone", "encoder", "decoder"])
def test_checkpointing_a_part_changes_no_gradient(make_rtdetr, make_batch, part):
    images, mask, targets = make_batch([2, 0, 3])
    found = []
    for parts in ((), (part,)):
        model = make_rtdetr().train()
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.eval()
        models.checkpoint_parts(model, parts)
        model(images, mask, disturbed(targets))["pred_boxes"].square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 50
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-9, atol=1e-12)


def test_autocast_leaves_boxes_and_scores_in_full_precision(make_rtdetr, make_batch):
    """Float32 heads, reference points and places. What is left is bfloat16's three digits in the contents: a box moves
    by a hundredth of the image at most, in the mean by far less."""
    model = make_rtdetr(dtype=torch.float32).eval()
    images, mask, targets = make_batch([1, 1], dtype=torch.float32)
    with torch.no_grad():
        full = model(images, mask)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images, mask, disturbed(targets))
    for layer in (half, half["enc_outputs"], *half["aux_outputs"], *half["dn_outputs"]):
        for key in ("pred_boxes", "pred_logits"):
            assert layer[key].dtype == torch.float32
            assert (layer[key] != layer[key].bfloat16().float()).any(), "the heads themselves must not run in bfloat16"
    # another choice of queries is another list: boxes are compared as sets
    gap = (half["enc_outputs"]["pred_boxes"][:, :, None] - full["enc_outputs"]["pred_boxes"][:, None]).abs().amax(-1)
    assert gap.amin(2).median() < 0.01


@pytest.mark.parametrize("kind", ["vfl", "mal"])
def test_losses_are_float32_under_autocast(make_rtdetr_recipe, make_rtdetr, make_batch, kind):
    model = make_rtdetr(dtype=torch.float32).train()
    criterion = models.build_criterion(make_rtdetr_recipe(loss={"kind": kind}), 4)
    images, mask, targets = make_batch([1, 2], dtype=torch.float32)
    denoising = disturbed(targets)
    counts = criterion.normalisers(criterion.count(targets))
    with torch.autocast("cpu", torch.bfloat16):
        result = criterion(model(images, mask, denoising), targets, counts, denoising)
    assert result.total.dtype == torch.float32
    assert all(v.dtype == torch.float32 and v.isfinite() for k, v in result.losses.items() if k.startswith("loss"))
    assert set(result.losses) == set(criterion.loss_names(3))


def test_autocast_leaves_the_positions_of_queries_in_full_precision(make_rtdetr, make_batch):
    model = make_rtdetr(dtype=torch.float32).eval()
    images, mask, _ = make_batch([1, 1], dtype=torch.float32)
    made = []
    head = model.decoder.query_pos_head
    hook = head.register_forward_hook(lambda _, boxes, found: made.append((boxes[0], found)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images, mask)
    hook.remove()
    assert len(made) == 3
    for boxes, found in made:
        torch.testing.assert_close(found, head(boxes.float()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_a_panorama_with_fewer_cells_than_queries_is_answered(make_rtdetr, learned):
    """Rectangles: one image of 1 to 40 must not end an evaluation. Training refuses it."""
    model = make_rtdetr(dtype=torch.float32, num_queries=60, parts={"learned_queries": learned}).eval()
    images, mask = torch.randn(1, 3, 32, 64), torch.zeros(1, 0, 0, dtype=torch.bool)
    with torch.no_grad():
        found = model(images, mask)
    assert found["pred_boxes"].shape[1] == 4 * 8 + 2 * 4 + 1 * 2 and found["pred_boxes"].isfinite().all()
    with pytest.raises(UserError, match="has only 42 cells to choose from"):
        model.train()(images, mask)


def test_inverse_sigmoid_is_finite_at_the_ends():
    x = torch.tensor([0.0, 1e-9, 0.25, 1.0, 1.5, -0.5], dtype=torch.float64)
    y = inverse_sigmoid(x)
    assert y.isfinite().all()
    assert y[[0, 1, 3, 4, 5]].tolist() == pytest.approx([-11.5129, -11.5129, 11.5129, 11.5129, -11.5129], abs=1e-4)
    assert y[2].sigmoid().item() == pytest.approx(0.25)


# --- building, export


def test_a_new_model_says_nothing_everywhere_and_starts_at_its_anchors(make_rtdetr_recipe, make_batch):
    recipe = make_rtdetr_recipe(backbone={"name": "test_efficientnet", "weights": "none"})
    model = models.build(recipe, 4, load_weights=False).eval()
    images, mask, _ = make_batch([1], dtype=torch.float32)
    with torch.no_grad():
        found = model(images, mask)
    torch.testing.assert_close(found["pred_boxes"], found["enc_outputs"]["pred_boxes"], rtol=1e-4, atol=1e-5)
    assert found["pred_logits"].sigmoid().max() < 0.5


@pytest.mark.law7
@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
def test_the_decoder_exports_and_the_program_finds_the_same(make_rtdetr, sampling):
    decoder = make_rtdetr(dtype=torch.float32, num_decoder_layers=1, parts={"sampling": sampling}).decoder.eval()
    given = [m.float() for m in maps()]
    program = torch.export.export(decoder, (given, nothing())).module()
    with torch.no_grad():
        plain, exported = decoder(given, nothing()), program(given, nothing())
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(exported[key], plain[key], rtol=1e-5, atol=1e-6)
