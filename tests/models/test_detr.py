import pytest
import torch

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.models.detr import keep_decoder_layers
from detr_accel.structures import UserError


@pytest.mark.parametrize("dc5", [False, True])
@pytest.mark.parametrize(
    ("name", "total", "trainable", "keys", "elements"),
    [
        ("resnet50.tv_in1k", 41_524_768, 41_302_368, 458, 41_631_008),
        ("resnet101.tv_in1k", 60_464_672, 60_242_272, 713, 60_675_360),
    ],
)
def test_official_parameter_counts(name, total, trainable, keys, elements, dc5):
    part = recipes.Backbone(name=name, dc5=dc5)
    recipe = recipes.Recipe(data=recipes.Data(root="/data"), model=recipes.Model(backbone=part))
    model = models.build(recipe, 91, device="meta", load_weights=False)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    state = model.state_dict()
    assert (len(state), sum(v.numel() for v in state.values())) == (keys, elements)
    assert model.backbone.stride == (16 if dc5 else 32)


def test_builds_under_the_meta_device(make_recipe):
    with torch.device("meta"):
        model = models.build(make_recipe(), 4, load_weights=False)
    assert all(v.is_meta for v in model.state_dict().values())
    outputs = model(torch.zeros(1, 3, 64, 64, device="meta"), torch.zeros(1, 64, 64, dtype=torch.bool, device="meta"))
    assert outputs["pred_boxes"].shape == (1, 7, 4)


def test_state_dict_has_the_official_names(make_model):
    keys = set(make_model(num_encoder_layers=1, num_decoder_layers=1).state_dict())
    attention = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    pair = {"weight", "bias"}
    expected = {f"transformer.encoder.layers.0.self_attn.{a}" for a in attention}
    expected |= {f"transformer.decoder.layers.0.{n}.{a}" for n in ("self_attn", "multihead_attn") for a in attention}
    for stack, num_norms in (("encoder", 2), ("decoder", 3)):
        parts = ["linear1", "linear2", *(f"norm{i + 1}" for i in range(num_norms))]
        expected |= {f"transformer.{stack}.layers.0.{n}.{p}" for n in parts for p in pair}
    expected |= {f"{n}.{p}" for n in ("transformer.decoder.norm", "class_embed", "input_proj") for p in pair}
    expected |= {f"bbox_embed.layers.{k}.{p}" for k in range(3) for p in pair} | {"query_embed.weight"}
    assert {k for k in keys if not k.startswith("backbone.")} == expected
    assert {"backbone.body.conv1.weight", "backbone.body.layer2.0.downsample.1.running_var"} <= keys
    assert not any("num_batches_tracked" in k for k in keys)


def test_auxiliary_outputs_are_those_of_the_earlier_layers(make_model, make_batch):
    model = make_model().eval()
    images, mask, _ = make_batch([1, 2])
    with torch.no_grad():
        full = model(images, mask)
        assert len(full["aux_outputs"]) == 2
        cut = keep_decoder_layers(model, 2)(images, mask)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(cut[key], full["aux_outputs"][1][key])
        assert not torch.allclose(cut[key], full[key])


@pytest.mark.parametrize("num_layers", [0, 4, -1])
def test_keeping_an_impossible_number_of_decoder_layers_is_refused(make_model, num_layers):
    with pytest.raises(UserError, match="this model has 3"):
        keep_decoder_layers(make_model(), num_layers)


def test_padding_pixels_do_not_matter_to_a_masked_query_but_pixels_inside_do(make_model, make_batch):
    """Whatever a padded token holds, the transformer never sees it."""
    model = make_model().eval()
    tokens, pos = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 6, 16, dtype=torch.float64)
    padded = torch.zeros(2, 6, dtype=torch.bool)
    padded[1, 4:] = True
    from detr_accel.models.attention import valid_keys

    def run(tokens):
        return model.transformer(tokens, pos, model.query_embed.weight, valid_keys(padded))

    other = tokens.clone()
    other[1, 4:] += 100
    torch.testing.assert_close(run(tokens), run(other), rtol=1e-12, atol=1e-12)
    other[1, 3] += 1
    assert not torch.allclose(run(tokens), run(other))


def test_fully_masked_image_stays_finite_and_leaves_the_others_alone(make_model, make_batch):
    model = make_model()
    images, mask, _ = make_batch([1, 1])
    alone = model(images[:1], mask[:1])
    mask[1] = True
    outputs = model(images, mask)
    assert outputs["pred_boxes"].isfinite().all() and outputs["pred_logits"].isfinite().all()
    torch.testing.assert_close(outputs["pred_boxes"][:1], alone["pred_boxes"], rtol=1e-9, atol=1e-12)
    outputs["pred_boxes"].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_boxes_and_scores_are_float32_under_autocast(make_model, make_batch):
    model = make_model(dtype=torch.float32)
    images, mask, _ = make_batch([1, 1], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images, mask)
    assert outputs["pred_boxes"].dtype == torch.float32
    assert outputs["pred_logits"].dtype == torch.float32
    for key in ("pred_boxes", "pred_logits"):
        coarse = outputs[key].bfloat16().float()
        assert (outputs[key] != coarse).any(), "the heads themselves must not run in bfloat16"
    full = model(images, mask)
    assert (outputs["pred_boxes"] - full["pred_boxes"]).abs().max() < 0.1
    outputs["pred_boxes"].sum().backward()
    assert model.backbone.body.layer4[0].conv1.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("norm", "parts"), [("live", ["backbone"]), ("frozen", ["encoder"]), ("frozen", ["backbone", "encoder", "decoder"])]
)
def test_activation_checkpointing_changes_no_number(make_recipe, make_batch, randomise, norm, parts):
    """Dropout included: the generators are set back before the second run."""
    images, mask, _ = make_batch([1, 1])
    results = []
    for checkpointing in ([], parts):
        recipe = make_recipe({"norm": norm}, activation_checkpointing=checkpointing, dropout=0.2)
        model = randomise(models.build(recipe, 4, load_weights=False)).double().train()
        torch.manual_seed(5)
        outputs = model(images, mask)
        (outputs["pred_boxes"].pow(2).sum() + outputs["pred_logits"].pow(2).sum()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((outputs["pred_boxes"], gradients, dict(model.named_buffers())))
    (boxes, gradients, buffers), (boxes_again, gradients_again, buffers_again) = results
    assert torch.equal(boxes, boxes_again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    for name, value in buffers.items():
        assert torch.equal(buffers_again[name], value), name


def test_activation_checkpointing_keeps_less(make_recipe, make_batch, randomise):
    images, mask, _ = make_batch([1, 1], dtype=torch.float32)
    kept = []
    for checkpointing in ([], ["backbone", "encoder", "decoder"]):
        recipe = make_recipe({"name": "resnet50.tv_in1k"}, activation_checkpointing=checkpointing)
        model = models.build(recipe, 4, load_weights=False).train()
        parameters = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
        sizes = {}

        def pack(tensor, sizes=sizes, parameters=parameters):
            if tensor.data_ptr() not in parameters:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = model(images, mask)
        kept.append(sum(sizes.values()))
        del outputs
    assert kept[1] < 0.5 * kept[0]


def test_param_groups_cover_each_trainable_parameter_once(make_model):
    model = make_model()
    groups = models.param_groups(model)
    names = [name for rows in groups.values() for name, _ in rows]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert {n.partition(".")[0] for n, _ in groups["backbone"]} == {"backbone"}
    assert {n.partition(".")[0] for n, _ in groups["heads"]} == {"class_embed", "bbox_embed"}
    assert {n.partition(".")[0] for n, _ in groups["transformer"]} == {"transformer", "query_embed", "input_proj"}


def test_backbone_learning_rate_zero_freezes_it(make_recipe):
    recipe = make_recipe().model_copy(update={"optim": recipes.Optim(lr_backbone=0.0)})
    model = models.build(recipe, 4, device="meta", load_weights=False)
    assert models.param_groups(model)["backbone"] == []


def test_deep_copy_is_independent(make_model, make_batch):
    """An averaged copy must read its own norms, not those of the model that it was copied from."""
    import copy

    model = make_model().eval()
    images, mask, _ = make_batch([1])
    twin = copy.deepcopy(model)
    before = twin(images, mask)["pred_boxes"]
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.mul_(3)
    assert torch.equal(twin(images, mask)["pred_boxes"], before)
    assert not torch.allclose(model(images, mask)["pred_boxes"], before)


def test_what_may_not_decay_is_found_by_its_layer(make_recipe):
    recipe = make_recipe(name="rtdetr", backbone={"weights": "none", "norm": "live"}, num_queries=5)
    model = models.build(recipe, 4, device="meta", load_weights=False)
    norms, biases = (models.not_decayed(model, [kind]) for kind in ("norms", "biases"))
    layers = dict(model.named_modules())
    kinds = {type(layers[name.rpartition(".")[0]]).__name__ for name in norms}
    assert kinds == {"BatchNorm2d", "LayerNorm"}
    assert {name.rpartition(".")[2] for name in norms} == {"weight", "bias"}
    assert all(name.endswith("bias") for name in biases) and any("in_proj_bias" in name for name in biases)
    assert not norms & biases and models.not_decayed(model, []) == set()
    shapes = {name: p.dim() for name, p in model.named_parameters()}
    left = {n for n, dims in shapes.items() if dims == 1} - norms - biases
    assert not left and all(shapes[name] == 1 for name in norms | biases), "all of one dimension, and nothing else"
