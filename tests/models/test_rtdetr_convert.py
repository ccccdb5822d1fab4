"""Conversion of RT-DETR's files: those of the original's two versions, DEIM's and transformers', there and back.

(With transformers itself: tests/parity/test_rtdetr_convert_parity.py.) The models are ResNet-18 ones of width 16.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rtdetr_files import DEIM, anchors, loaded, official_names, official_state, small_model, small_recipe
from safetensors.torch import load_file, save_file

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.infer.detector import load as load_detector
from detr_accel.infer.evaluation import evaluate_checkpoint
from detr_accel.models import class_rows, convert, rtdetr_architecture, rtdetr_keymaps, weights
from detr_accel.models.coco_classes import COCO_NAMES, coco_80
from detr_accel.structures import Classes, UserError

CASES = {  # version, whether norms are live, options
    "v1": (1, False, {}),
    "v2": (2, False, {}),
    "v2-live": (2, True, {}),
    "deim": (2, True, {"rtdetr": DEIM, "loss": {"kind": "mal"}}),
}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


def said(lines, *parts):
    return any(all(p in line for p in parts) for line in lines)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    version, live, options = CASES[request.param]
    state, path = official_state(version, live, **options), tmp_path_factory.mktemp("case") / "theirs.pth"
    torch.save({"model": state}, path)
    return state, path, small_recipe(live=live, **options), version


@pytest.fixture(scope="module")
def v1():
    return official_state(1)


def save(content, path):
    torch.save(content, path)
    return path


# -- the original's files


@pytest.mark.parity
@pytest.mark.law6
def test_official_files_go_there_and_back_unchanged(case, tmp_path):
    state, path, recipe, version = case
    convert.write(convert.read(path), tmp_path / "ours")
    lines = convert.write(convert.read(tmp_path / "ours"), tmp_path / "back.pth", to="official")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == ["model"]
    assert equal(back["model"], state)
    assert said(lines, "version", str(version))


def test_official_files_have_the_names_that_the_original_gives(case):
    state, _, recipe, version = case
    live, layers = recipe.model.backbone.norm == "live", recipe.model.rtdetr.query_pos_layers
    assert set(state) == official_names(version, live, position_layers=layers)


def test_the_recipe_follows_from_the_shapes(case):
    _, path, recipe, _ = case
    read = convert.read(path)
    assert read.recipe.model == recipe.model
    assert read.recipe.loss == recipe.loss
    assert read.classes == coco_80()
    assert said(read.report, "num_queries", "300") and said(read.report, "pixels", "0..1")
    assert recipes.loads(recipes.dumps(read.recipe)) == read.recipe


PAIRS = [  # ours, version 1's, version 2's, transformers'
    ("backbone.body.conv1.3.weight", "backbone.conv1.conv1_2.conv.weight", None,
     "model.backbone.model.embedder.embedder.1.convolution.weight"),
    ("backbone.body.bn1.running_var", "backbone.conv1.conv1_3.norm.running_var", None,
     "model.backbone.model.embedder.embedder.2.normalization.running_var"),
    ("backbone.body.layer1.0.downsample.1.weight", "backbone.res_layers.0.blocks.0.short.conv.weight", None,
     "model.backbone.model.encoder.stages.0.layers.0.shortcut.convolution.weight"),
    ("backbone.body.layer2.0.downsample.2.bias", "backbone.res_layers.1.blocks.0.short.conv.norm.bias", None,
     "model.backbone.model.encoder.stages.1.layers.0.shortcut.1.normalization.bias"),
    ("backbone.body.layer3.1.conv2.weight", "backbone.res_layers.2.blocks.1.branch2b.conv.weight", None,
     "model.backbone.model.encoder.stages.2.layers.1.layer.1.convolution.weight"),
    ("encoder.input_proj.2.norm.weight", "encoder.input_proj.2.1.weight", "encoder.input_proj.2.norm.weight",
     "model.encoder_input_proj.2.1.weight"),
    ("decoder.input_proj.0.conv.weight", "decoder.input_proj.0.conv.weight", None,
     "model.decoder_input_proj.0.0.weight"),
    ("encoder.encoder.0.layers.0.norm2.weight", "encoder.encoder.0.layers.0.norm2.weight", None,
     "model.encoder.encoder.0.layers.0.final_layer_norm.weight"),
    ("encoder.pan_blocks.1.bottlenecks.2.conv1.norm.bias", "encoder.pan_blocks.1.bottlenecks.2.conv1.norm.bias", None,
     "model.encoder.pan_blocks.1.bottlenecks.2.conv1.norm.bias"),
    ("decoder.enc_output.proj.bias", "decoder.enc_output.0.bias", "decoder.enc_output.proj.bias",
     "model.enc_output.0.bias"),
    ("decoder.decoder.layers.1.cross_attn.value_proj.weight", "decoder.decoder.layers.1.cross_attn.value_proj.weight",
     None, "model.decoder.layers.1.encoder_attn.value_proj.weight"),
    ("decoder.decoder.layers.1.norm2.bias", "decoder.decoder.layers.1.norm2.bias", None,
     "model.decoder.layers.1.encoder_attn_layer_norm.bias"),
    ("decoder.decoder.layers.0.linear2.weight", "decoder.decoder.layers.0.linear2.weight", None,
     "model.decoder.layers.0.fc2.weight"),
    ("decoder.dec_score_head.1.bias", "decoder.dec_score_head.1.bias", None, "model.decoder.class_embed.1.bias"),
    ("decoder.dec_bbox_head.0.layers.2.weight", "decoder.dec_bbox_head.0.layers.2.weight", None,
     "model.decoder.bbox_embed.0.layers.2.weight"),
    ("decoder.query_pos_head.layers.0.weight", "decoder.query_pos_head.layers.0.weight", None,
     "model.decoder.query_pos_head.layers.0.weight"),
    ("decoder.denoising_class_embed.weight", "decoder.denoising_class_embed.weight", None,
     "model.denoising_class_embed.weight"),
]  # fmt: skip


@pytest.mark.parametrize("ours, first, second, theirs", PAIRS, ids=[p[0] for p in PAIRS])
def test_each_kind_of_weight_has_its_name_in_every_format(ours, first, second, theirs):
    value = torch.randn(3)
    for names, to, back in [
        ([first], lambda s: rtdetr_keymaps.to_official(s, 1), rtdetr_keymaps.from_official),
        ([second or first], lambda s: rtdetr_keymaps.to_official(s, 2), rtdetr_keymaps.from_official),
        ([theirs], rtdetr_keymaps.to_transformers, rtdetr_keymaps.from_transformers),
    ]:
        assert list(to({ours: value})) == names
        assert list(back(to({ours: value}))) == [ours]


def test_averaged_weights_are_taken_where_there_are_any_and_written_to_their_place(v1, tmp_path):
    raw = {k: v + 1 for k, v in v1.items()}
    content = {"model": raw, "ema": {"module": v1, "updates": 9}, "optimizer": {"state": {}}, "last_epoch": 3}
    read = convert.read(save(content, tmp_path / "a.pth"))
    assert said(read.report, "averaged ones") and said(read.report, "left out", "last_epoch, model, optimizer")
    convert.write(read, tmp_path / "b.pth", to="official")
    back = torch.load(tmp_path / "b.pth", weights_only=True)
    assert list(back) == ["ema"] and equal(back["ema"]["module"], v1)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}])
def test_bare_and_wrapped_state_dicts_are_read_alike(v1, tmp_path, wrap):
    a, b = (convert.read(save(c, tmp_path / "a.pth")) for c in (wrap(v1), {"model": v1}))
    assert equal(a.state_dict, b.state_dict) and a.recipe == b.recipe


def test_anchors_of_another_image_size_come_back(tmp_path):
    state = official_state(2, side=96)
    read = convert.read(save({"model": state}, tmp_path / "a.pth"))
    assert read.recipe.data.eval_size == 96
    convert.write(read, tmp_path / "b.pth", to="official")
    assert equal(torch.load(tmp_path / "b.pth", weights_only=True)["model"], state)


@pytest.mark.parametrize("height, width", [(480, 640), (640, 384), (600, 600), (608, 96)])
def test_images_of_any_shape_that_an_official_file_was_made_for_are_told_and_come_back(tmp_path, height, width):
    state = official_state(2)
    state["decoder.anchors"], state["decoder.valid_mask"] = anchors(height, width)
    read = convert.read(save({"model": state}, tmp_path / "a.pth"))
    square = height == width
    assert read.recipe.data.eval_size == (height if square else 640)
    assert said(read.report, "beware", f"{height} x {width}", "squares of 640") != square
    lines = convert.write(read, tmp_path / "b.pth", to="official")
    assert said(lines, f"anchors: for images of {height} x {width}, which must be eval_spatial_size")
    assert equal(torch.load(tmp_path / "b.pth", weights_only=True)["model"], state)


def test_anchors_that_nobody_knows_are_told_and_made_anew(tmp_path):
    state = official_state(2)
    state["decoder.anchors"] = torch.randn(1, 100, 4)
    read = convert.read(save({"model": state}, tmp_path / "a.pth"))
    assert said(read.report, "beware", "unknown shape") and read.recipe.data.eval_size == 640


@pytest.mark.parametrize("version", [1, 2])
def test_a_detector_of_another_size_is_written_with_it(tmp_path, version):
    ours = loaded()
    data = ours.recipe.data.model_copy(update={"eval_size": 320})
    ours.recipe, ours.meta["version"] = ours.recipe.model_copy(update={"data": data}), version
    lines = convert.write(ours, tmp_path / "own.pth", to="official")
    assert said(lines, "anchors: for images of 320 x 320") == (version == 2)
    assert convert.read(tmp_path / "own.pth").recipe.data.eval_size == 320


@pytest.mark.parametrize("to", ["official", "transformers"])
def test_a_detector_of_rectangles_is_not_written_as_one_of_squares_in_silence(tmp_path, to):
    ours = loaded()
    assert not said(convert.write(ours, tmp_path / "square", to=to), "beware")
    data = ours.recipe.data.model_copy(update={"square": False})
    ours.recipe = ours.recipe.model_copy(update={"data": data})
    assert said(convert.write(ours, tmp_path / "own", to=to), "beware", "trained on rectangles")


def test_what_leaves_no_shape_is_told_for_the_originals_config(tmp_path):
    odd = {"activation": "silu", "mlp_activation": "relu", "num_points": [2, 6, 4]}
    lines = convert.write(loaded(rtdetr=odd), tmp_path / "own.pth", to="official")
    assert said(lines, "its config must say", "activation silu", "num_points [2, 6, 4]") and not said(lines, "mlp_act")
    lines = convert.write(loaded(80, coco_80(), rtdetr=DEIM), tmp_path / "deim.pth", to="official")
    assert not said(lines, "its config must say")


def test_classes_of_ones_own_are_told_for_the_originals_config(tmp_path):
    cats = loaded(2, Classes(("cat", "dog"), (7, 3)), num_queries=500)
    lines = convert.write(cats, tmp_path / "own.pth", to="official")
    config = ("num_classes 2", "remap_mscoco_category False", "num_queries 500", "num_top_queries 500")
    assert said(lines, "its config must say", *config) and said(lines, "labels", "0 is 7, 1 is 3 in your data")
    from_0 = convert.write(loaded(2, Classes(("cat", "dog"), (0, 1))), tmp_path / "from_0.pth", to="official")
    assert said(from_0, "num_classes 2") and not said(from_0, "in your data")


def test_a_detector_of_ours_is_written_where_the_originals_evaluation_looks(tmp_path):
    """It evaluates the average, and says nothing where a file has none."""
    convert.write(loaded(), tmp_path / "own.pth", to="official")
    content = torch.load(tmp_path / "own.pth", weights_only=True)
    assert equal(content["ema"]["module"], content["model"])
    assert os.path.getsize(tmp_path / "own.pth") < 1.5 * sum(v.nbytes for v in content["model"].values()) + 2**17
    assert not said(convert.read(tmp_path / "own.pth").report, "left out")


def test_how_a_file_of_the_second_version_was_sampled_is_said_to_be_assumed(tmp_path):
    second = save({"model": official_state(2)}, tmp_path / "second.pth")
    assert said(convert.read(second).report, "sampling", "taken as bilinear", "dsp")
    first = save({"model": official_state(1)}, tmp_path / "first.pth")
    assert not said(convert.read(first).report, "sampling")


def test_the_folder_where_one_stands_is_no_place_to_write_a_detector_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^\. is the folder that you are in: give a new one, such as detector$"):
        convert.write(loaded(), ".", to="transformers")


def test_points_and_heads_are_told_apart_where_the_file_has_their_scale(tmp_path):
    changed = {"rtdetr": {"num_points": [4, 2, 3], "learned_queries": True}, "num_heads": 4, "num_queries": 20}
    state = official_state(2, **changed)
    model = convert.read(save({"model": state}, tmp_path / "a.pth")).recipe.model
    assert (model.num_heads, model.rtdetr.num_points, model.num_queries) == (4, [4, 2, 3], 20)
    assert model.rtdetr.learned_queries
    first = save({"model": official_state(1, num_heads=4)}, tmp_path / "b.pth")
    assert convert.read(first, num_heads=4).recipe.model.rtdetr.num_points == [4, 4, 4]
    assert convert.read(first).recipe.model.rtdetr.num_points == [2, 2, 2]  # as many weights; said in the report
    assert said(convert.read(first).report, "num_heads", "taken as 8")


def test_what_an_official_file_cannot_say_survives_in_an_entry_of_ours(tmp_path):
    classes = Classes(("cat", "dog"), (7, 3))
    ours = loaded(2, classes, rtdetr={"sampling": "discrete"}, num_queries=20)
    lines = convert.write(ours, tmp_path / "own.pth", to="official")
    back = convert.read(tmp_path / "own.pth")
    assert (back.classes, back.recipe) == (classes, ours.recipe) and equal(back.state_dict, ours.state_dict)
    assert said(lines, "entry detr_accel") and said(lines, "anchors", "640 x 640")
    assert said(lines, "its config must say", "num_queries 20", "cross_attn_method discrete")
    assert not said(lines, "normalised"), "the original's pixels are this detector's"
    theirs = torch.load(tmp_path / "own.pth", weights_only=True)["ema"]["module"]
    for name, wanted in zip(("anchors", "valid_mask"), anchors(640), strict=True):
        assert torch.equal(theirs[f"decoder.{name}"], wanted)


def test_pixels_that_the_original_does_not_normalise_are_told(tmp_path):
    ours = loaded()
    model = ours.recipe.model
    backbone = model.backbone.model_copy(update={"pixels": "timm"})
    ours.recipe = ours.recipe.model_copy(update={"model": model.model_copy(update={"backbone": backbone})})
    lines = convert.write(ours, tmp_path / "own.pth", to="official")
    assert said(lines, "beware", "normalised with the backbone's mean and deviation, the original's are not")


PUBLISHED = {  # backbone -> sizes; parameters that the original counts with them, and entries of its first version
    "resnet18d.ra2_in1k": ({"num_decoder_layers": 3}, {"expansion": 0.5}, 20_184_464, 533),
    "resnet34d.ra2_in1k": ({"num_decoder_layers": 4}, {"expansion": 0.5}, 31_441_668, 659),
    "resnet50d.ra2_in1k": ({}, {}, 42_944_620, 791),
    "resnet101d.ra2_in1k": ({}, {"encoder_dim": 384, "encoder_feedforward": 2048}, 76_661_740, 1097),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_recognised_and_give_the_published_counts(name):
    sizes, inside, parameters, entries = PUBLISHED[name]
    full = {"hidden_dim": 256, "num_decoder_layers": 6, "dim_feedforward": 1024, **sizes}
    whole = {"encoder_dim": 256, "encoder_feedforward": 1024, "expansion": 1.0, **inside}
    recipe = small_recipe(name, live=True, rtdetr=whole, **full)
    model = models.build(recipe, 80, device="meta", load_weights=False)
    told = rtdetr_architecture.infer(model.state_dict(), "x", "x", rtdetr_architecture.Told())
    assert told.model == recipe.model
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == len(rtdetr_keymaps.to_official(model.state_dict(), 1)) == entries


# -- refusals


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s | {"backbone.res_layers.0.blocks.0.extra.weight": torch.zeros(1)}, "none of ResNet-18, 34, 50, 101"),
    (lambda s: s | {"decoder.new.weight": torch.zeros(1)}, "decoder.new.weight is unexpected"),
    (lambda s: {k: v for k, v in s.items() if "enc_score_head" not in k}, "holds no RT-DETR detector"),
    (lambda s: {k: v for k, v in s.items() if k != "decoder.enc_bbox_head.layers.0.bias"},
     "decoder.enc_bbox_head.layers.0.bias is missing"),
    (lambda s: s | {"decoder.enc_score_head.bias": torch.tensor(1.0)}, "no size of decoder.enc_score_head.bias"),
    (lambda s: s | {"encoder.input_proj.0.conv.weight": torch.zeros(0, 1, 1, 1)}, "no size of encoder.input_proj.0"),
    (lambda s: {k: v[:-1] if "attention_weights" in k else v for k, v in s.items()}, "8 heads do not fit"),
    (lambda s: rtdetr_keymaps.to_transformers(rtdetr_keymaps.from_official(s)), "transformers' key names"),
], ids=["backbone", "unexpected", "no head", "missing", "scalar", "empty", "points", "transformers"])  # fmt: skip
def test_what_is_not_our_rtdetr_is_refused_in_one_sentence(v1, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        convert.read(save({"model": change(v1)}, tmp_path / "rt.pth"))
    assert "rt.pth" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options, to, sentence", [
    ({"backbone": "test_resnet.r160_in1k"}, "official", "resnet101d only, not test_resnet"),
    ({"first_shortcut": False}, "official", "train with model.backbone.first_shortcut=true"),
    ({"rtdetr": DEIM}, "transformers", "does not have mlp_activation silu, query_pos_layers 3"),
    ({"rtdetr": {"num_points": [4, 2, 4]}}, "transformers", r"does not have num_points \[4, 2, 4\]"),
    ({"first_shortcut": False}, "transformers", "resnet18d without .* model.backbone.first_shortcut=true"),
    ({"backbone": "test_resnet.r160_in1k"}, "transformers", r"backbone test_resnet.r160_in1k \(only .*101d\): keep"),
], ids=["backbone", "shortcut", "deim", "points", "shortcut-hf", "backbone-hf"])  # fmt: skip
def test_a_format_that_cannot_hold_a_detector_says_so_and_leaves_no_file(tmp_path, options, to, sentence):
    with pytest.raises(UserError, match=sentence):
        convert.write(loaded(**options), tmp_path / "x", to=to)
    assert list(tmp_path.iterdir()) == []


# -- transformers' folders, without transformers


@pytest.mark.parametrize("options", [{}, {"live": True}, {"rtdetr": {"sampling": "discrete"}}], ids=str)
def test_our_detector_comes_back_from_a_transformers_folder_unchanged(tmp_path, options):
    ours = loaded(2, Classes(("cat", "dog"), (7, 3)), num_heads=4, num_queries=20, **options)
    convert.write(ours, tmp_path / "hf", to="transformers")
    back = convert.read(tmp_path / "hf")
    assert (back.classes, back.recipe.model) == (ours.classes, ours.recipe.model)
    assert equal(back.state_dict, ours.state_dict)
    preprocessor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert preprocessor["do_normalize"] is False


VOC = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
       "dining table": "diningtable", "tv": "tvmonitor"}  # fmt: skip


@pytest.fixture(scope="module")
def from_the_hub(tmp_path_factory):
    """As on the Hub: heads twice, names of six classes that COCO does not have, keys that we do not know."""
    tmp_path = tmp_path_factory.mktemp("hub")
    convert.write(loaded(), tmp_path / "hf", to="transformers")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["id2label"] = {i: VOC.get(name, name) for i, name in config["id2label"].items()}
    config["label2id"] = {name: int(i) for i, name in config["id2label"].items()}
    del config["category_ids"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"initializer_range": 0.01}))
    state = load_file(tmp_path / "hf" / "model.safetensors")
    heads = ("model.decoder.class_embed.", "model.decoder.bbox_embed.")
    twice = {k.removeprefix("model.decoder."): v.clone() for k, v in state.items() if k.startswith(heads)}
    save_file(state | twice, tmp_path / "hf" / "model.safetensors")
    return tmp_path / "hf"


@pytest.fixture
def hub_folder(from_the_hub, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(from_the_hub, tmp_path / "hf"))


def test_a_folder_from_the_hub_comes_back_with_its_double_heads_and_its_config(hub_folder, tmp_path):
    folder = hub_folder
    read = convert.read(folder)
    assert read.classes == coco_80() and said(read.report, "COCO's 80")
    convert.write(read, tmp_path / "ours")
    convert.write(convert.read(tmp_path / "ours"), tmp_path / "back", to="transformers")
    assert equal(*(load_file(f / "model.safetensors") for f in (folder, tmp_path / "back")))
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((folder / name).read_text())


def test_coco_labels_are_category_ids_in_their_order():
    table = coco_80()
    assert len(table) == 80 and table.category_ids == tuple(sorted(COCO_NAMES))
    assert table.label_of[90] == 79 and table.names[79] == "toothbrush" and table.names[0] == "person"


@pytest.mark.parametrize("change, sentence", [
    ({"decoder_activation_function": "gelu"}, "decoder_activation_function is 'gelu'; it must be one of relu, silu"),
    ({"normalize_before": True}, "normalize_before is True"),
    ({"decoder_attention_heads": 4}, "decoder_attention_heads is 4"),
    ({"backbone_config": {"model_type": "timm_backbone"}}, "model_type is 'timm_backbone'"),
    ({"id2label": {"0": "a"}}, "names 1 labels, but the head has 80"),
    ({"model_type": "d_fine"}, "describes d_fine, not detr"),
    ({"num_feature_levels": "3"}, "num_feature_levels is '3'; it must be a whole number above 0"),
    ({"decoder_n_points": [4, 4, 4]}, r"decoder_n_points is \[4, 4, 4\]; it must be a whole number above 0"),
    ({"num_queries": 0}, "num_queries is 0; it must be a whole number above 0"),
    ({"dropout": None}, "dropout is None; it must be a number"),
    ({"backbone_config": "resnet"}, "backbone_config is 'resnet'; it must be a table"),
    ({"id2label": ["a"]}, r"id2label is \['a'\]; it must be a table"),
    ({"id2label": {"x": "a"}}, "it must be a table of labels 0, 1"),
    ({"id2label": {"0": 5}}, "it must be a table of names"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")  # fmt: skip
def test_configs_of_other_detectors_are_refused_in_one_sentence(hub_folder, change, sentence):
    folder = hub_folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=sentence):
        convert.read(folder)


def test_what_the_recipe_changed_goes_into_the_config_that_came(hub_folder, tmp_path):
    path = hub_folder / "config.json"
    config = json.loads(path.read_text()) | {"label_noise_ratio": 0.3, "box_noise_scale": 0.4}
    path.write_text(json.dumps(config))
    read = convert.read(hub_folder)
    assert (read.recipe.model.rtdetr.label_noise, read.recipe.model.rtdetr.box_noise) == (0.3, 0.4)

    def written(name, **changes):
        inside = read.recipe.model.rtdetr.model_copy(update=changes.pop("rtdetr", {}))
        model = read.recipe.model.model_copy(update={"rtdetr": inside, **changes})
        read.recipe = read.recipe.model_copy(update={"model": model})
        convert.write(read, tmp_path / name, to="transformers")
        return json.loads((tmp_path / name / "config.json").read_text())

    assert written("same") == config
    assert written("more", num_queries=500) == config | {"num_queries": 500}
    other = written("cells", rtdetr={"sampling": "discrete"})
    assert (other["model_type"], other["decoder_method"], other["num_queries"]) == ("rt_detr_v2", "discrete", 500)


@pytest.mark.parametrize("size", [{"height": 480, "width": 640}, {"shortest_edge": 480}, {"height": 512, "width": 512}])
def test_sizes_that_came_go_back_and_changed_ones_are_written(hub_folder, tmp_path, size):
    path = hub_folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": size}))
    read = convert.read(hub_folder)
    convert.write(read, tmp_path / "same", to="transformers")
    assert json.loads((tmp_path / "same" / "preprocessor_config.json").read_text())["size"] == size
    data = read.recipe.data.model_copy(update={"eval_size": 320})
    read.recipe = read.recipe.model_copy(update={"data": data})
    convert.write(read, tmp_path / "other", to="transformers")
    written = json.loads((tmp_path / "other" / "preprocessor_config.json").read_text())
    assert written["size"] == {"height": 320, "width": 320}


def test_images_normalised_otherwise_than_known_are_refused(hub_folder):
    folder = hub_folder
    path = folder / "preprocessor_config.json"
    assert convert.read(folder).recipe.data.eval_size == 640
    told = json.loads(path.read_text()) | {"do_normalize": True}
    path.write_text(json.dumps(told))
    assert convert.read(folder).recipe.model.backbone.pixels == "timm"
    for mean in ([0.5, 0.5, 0.5], 0.5, "imagenet", [None, 0.5, 0.5]):
        path.write_text(json.dumps(told | {"image_mean": mean}))
        with pytest.raises(UserError, match="only ImageNet's mean and deviation"):
            convert.read(folder)


def test_every_format_answers_the_same(tmp_path):
    """What evaluation and prediction build from a path."""
    model, recipe = small_model(num_queries=20)
    ours = weights.Loaded(model.state_dict(), recipe, coco_80(), {}, None)
    images, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 0, 0, dtype=torch.bool)
    with torch.no_grad():
        wanted = model(images, mask)
    for to in ("ours", "official", "transformers"):
        convert.write(ours, tmp_path / to, to=to)
        detector = load_detector(tmp_path / to, device="cpu")
        assert detector.model.mean == (0.0, 0.0, 0.0) and detector.classes == coco_80()
        with torch.no_grad():
            found = detector.model(images, mask)
        assert torch.equal(found["pred_logits"], wanted["pred_logits"]), to
        assert torch.equal(found["pred_boxes"], wanted["pred_boxes"]), to


def test_cutting_the_head_cuts_every_layers_and_keeps_the_empty_label(tmp_path):
    ours = loaded(4, Classes(("cat", None, "dog", None), (1, None, 5, None)))
    cut = convert.cut_head(ours)
    assert cut.classes == Classes(("cat", "dog"), (1, 5))
    entries = class_rows.class_entries(ours.state_dict)
    assert len(entries) == 2 * (1 + 2) + 1
    for key, behind in entries.items():
        assert torch.equal(cut.state_dict[key], ours.state_dict[key][[0, 2, *([4] if behind else [])]]), key
    convert.write(cut, tmp_path / "cut")
    convert.read(tmp_path / "cut")


def test_the_options_of_deim_change_what_the_small_nets_compute():
    recipe = small_recipe(rtdetr=DEIM)
    decoder = models.build(recipe, 3, load_weights=False).decoder
    x = torch.randn(5, 16)
    for net, width in ((decoder.enc_bbox_head, 16), (decoder.dec_bbox_head[1], 16), (decoder.query_pos_head, 4)):
        wanted = x[:, :width]
        for i, layer in enumerate(net.layers):
            wanted = layer(wanted) if i == 2 else torch.nn.functional.silu(layer(wanted))
        assert len(net.layers) == 3 and torch.equal(net(x[:, :width]), wanted)


@pytest.mark.network
@pytest.mark.parametrize("hub_id, kind", [
    ("PekingU/rtdetr_r101vd", "rt_detr"), ("PekingU/rtdetr_v2_r101vd", "rt_detr_v2"),
])  # fmt: skip
def test_published_detectors_are_fetched_and_answer_as_published(hub_id, kind):
    """On COCO's 000000039769, in squares of 640."""
    from PIL import Image

    folder = convert.fetch(hub_id)
    read = convert.read(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    assert read.classes == coco_80() and read.recipe.model.rtdetr.encoder_dim == 384
    photo = Image.open(coco_photo()).convert("RGB").resize((640, 640), Image.BILINEAR)
    images = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(1, 640, 640, 3).permute(0, 3, 1, 2)
    detector = load_detector(folder, device="cpu")
    with torch.no_grad():
        found = detector.model(images.float() / 255, torch.zeros(1, 0, 0, dtype=torch.bool))
    logits = [[-4.6162, -4.9189, -4.6656], [-4.4701, -4.4997, -4.9659], [-5.6641, -7.9000, -5.0725]]
    boxes = [[0.7707, 0.4124, 0.4585], [0.2589, 0.5492, 0.4735], [0.1688, 0.1993, 0.2108]]
    torch.testing.assert_close(found["pred_logits"][0, :3, :3], torch.tensor(logits), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(found["pred_boxes"][0, :3, :3], torch.tensor(boxes), atol=1e-3, rtol=1e-3)


_RELEASES = "https://github.com/lyuwenyu/storage/releases/download/v0.1/"


@pytest.mark.network
@pytest.mark.parametrize("name, hub_id", [
    ("rtdetr_r101vd_6x_coco_from_paddle.pth", "PekingU/rtdetr_r101vd"),
    ("rtdetrv2_r101vd_6x_coco_from_paddle.pth", "PekingU/rtdetr_v2_r101vd"),
])  # fmt: skip
def test_the_originals_files_hold_what_the_hub_has(tmp_path, name, hub_id):
    torch.hub.download_url_to_file(_RELEASES + name, str(tmp_path / name), progress=False)
    ours, theirs = convert.read(tmp_path / name), convert.read(convert.fetch(hub_id))
    assert equal(ours.state_dict, theirs.state_dict) and ours.classes == theirs.classes


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("hub_id, ap", [
    ("PekingU/rtdetr_r101vd", 0.543), ("PekingU/rtdetr_v2_r101vd", 0.543), ("PekingU/rtdetr_r101vd_coco_o365", 0.562),
])  # fmt: skip
def test_published_detectors_score_as_published(hub_id, ap):
    """On val2017, in the folder that the environment's COCO names."""
    coco = os.environ.get("COCO")
    if not coco:
        pytest.skip("set COCO to the folder that holds val2017 and annotations")
    metrics, _ = evaluate_checkpoint(str(convert.fetch(hub_id)), split="val", data_folder=Path(coco), quiet=True)
    assert metrics.values["AP"] == pytest.approx(ap, abs=0.001)


def coco_photo():
    from urllib.request import urlretrieve

    path, _ = urlretrieve("http://images.cocodataset.org/val2017/000000039769.jpg")
    return Path(path)


def test_a_class_table_of_another_model_is_refused(tmp_path):
    ours = loaded()
    weights.save(tmp_path, ours.state_dict, recipes.dumps(ours.recipe), Classes(("a", "b"), (1, 2)))
    with pytest.raises(UserError, match="names 2 labels, but the head has 80 outputs"):
        convert.read(tmp_path)
