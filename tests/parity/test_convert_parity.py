"""Conversion against transformers itself: it loads what we write without a complaint and answers the same, we read what
it writes, and nothing changes on the way there and back. Widths are small; the backbones are real."""

import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig  # noqa: E402

from detr_accel import models  # noqa: E402
from detr_accel import recipe as recipes  # noqa: E402
from detr_accel.models import convert, weights  # noqa: E402
from detr_accel.models.coco_classes import COCO_NAMES, coco_91  # noqa: E402
from detr_accel.structures import Classes, UserError  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.law6]

CLASSES = Classes(("cat", None, "dog"), (17, None, 3))
SIZES = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 5},
    **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
OWN_RESNETS = {  # the two shapes of transformers' own ResNet that torchvision has too
    "resnet18.tv_in1k": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "resnet50.tv_in1k": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
}


def randomise(module):
    """Every number random, norm weights and statistics included: timm starts the last norm of each block at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                scale = value[0].numel() ** -0.5 if value.dim() > 1 else 0.2
                noise = scale * torch.randn_like(value)
                is_norm = key.endswith(("running_var", "norm.weight")) or ".bn" in key and key.endswith("weight")
                value.copy_(1 + noise.abs() if is_norm else noise)
    return module.eval()


def ours(backbone, dc5=False, norm="frozen", classes=CLASSES):
    part = recipes.Backbone(name=backbone, norm=norm, dc5=dc5, frozen_stages=0 if norm == "live" else 2)
    model = recipes.Model(
        backbone=part, hidden_dim=16, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=24,
        num_queries=5,
    )  # fmt: skip
    recipe = recipes.Recipe(data=recipes.Data(root="/data"), model=model)
    module = randomise(models.build(recipe, len(classes), load_weights=False))
    return module, weights.Loaded(module.state_dict(), recipe, classes, {"weights": "raw"}, None)


def rebuilt(loaded):
    model = models.build(loaded.recipe, len(loaded.classes), load_weights=False)
    weights.load_into(model, loaded.state_dict, "converted")
    return model.eval()


def theirs(**changes):
    config = DetrConfig(**SIZES, num_labels=3, use_pretrained_backbone=False, **changes)
    return randomise(DetrForObjectDetection(config))


def timm_config(name, **changes):
    return {"model_type": "timm_backbone", "backbone": name, "features_only": True, "use_pretrained_backbone": False,
            "out_indices": [1, 2, 3, 4], **changes}  # fmt: skip


def load_theirs(folder):
    model, info = DetrForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_same_answers(our_model, their_model):
    """float64, a padded batch, relative 1e-9 with a floor from the size of the whole."""
    images, mask = torch.randn(2, 3, 96, 64, dtype=torch.float64), torch.zeros(2, 96, 64, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 48:] = True, True
    images = images.masked_fill(mask[:, None], 0.0)
    with torch.no_grad():
        a = our_model.double()(images, mask)
        b = their_model.double()(images, pixel_mask=(~mask).long())
    for x, y in ((a["pred_logits"], b.logits), (a["pred_boxes"], b.pred_boxes)):
        assert y.std() > 1e-3  # queries apart, so that a wrong order would show
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * y.abs().max().item())


@pytest.mark.parametrize("backbone, dc5, norm", [
    ("resnet18.tv_in1k", False, "frozen"),
    ("resnet18.tv_in1k", False, "live"),
    ("resnet50.tv_in1k", True, "frozen"),
    ("resnet101.tv_in1k", False, "frozen"),
    ("test_resnet.r160_in1k", False, "frozen"),  # a deep stem, which the official code does not have
])  # fmt: skip
def test_transformers_loads_what_we_write_and_answers_the_same(tmp_path, backbone, dc5, norm):
    model, loaded = ours(backbone, dc5, norm)
    lines = convert.write(loaded, tmp_path / "hf", to="transformers")
    their_model = load_theirs(tmp_path / "hf")
    assert their_model.config.id2label == {0: "cat", 1: "N/A", 2: "dog"}
    assert any("batch counters" in line for line in lines) == (norm == "live")
    assert_same_answers(model, their_model)


@pytest.mark.parametrize("backbone, dc5", [("resnet18.tv_in1k", False), ("test_resnet.r160_in1k", True)])
def test_our_detector_comes_back_from_transformers_unchanged(tmp_path, backbone, dc5):
    _, loaded = ours(backbone, dc5)
    convert.write(loaded, tmp_path / "hf", to="transformers")
    back = convert.read(tmp_path / "hf")
    assert back.classes == CLASSES
    assert back.recipe.model == loaded.recipe.model
    assert back.state_dict.keys() == loaded.state_dict.keys()
    assert all(torch.equal(v, loaded.state_dict[k]) for k, v in back.state_dict.items())


def test_a_detector_saved_again_by_transformers_keeps_its_category_ids(tmp_path):
    _, loaded = ours("resnet18.tv_in1k", dc5=True)
    convert.write(loaded, tmp_path / "hf", to="transformers")
    load_theirs(tmp_path / "hf").save_pretrained(tmp_path / "again")
    back = convert.read(tmp_path / "again")
    assert back.classes == CLASSES and back.recipe.model == loaded.recipe.model
    assert all(torch.equal(v, loaded.state_dict[k]) for k, v in back.state_dict.items())


def sources():
    yield "timm", lambda: theirs(backbone_config=timm_config("resnet18"))
    yield "timm dc5", lambda: theirs(backbone_config=timm_config("resnet18", output_stride=16), dilation=True)
    yield "timm as on the Hub", lambda: theirs(backbone="resnet18", use_timm_backbone=True)
    for name, shape in OWN_RESNETS.items():
        yield f"own {name}", lambda shape=shape: theirs(
            use_timm_backbone=False, backbone_config=ResNetConfig(**shape, out_features=["stage4"])
        )


@pytest.fixture(params=list(sources()), ids=lambda s: s[0])
def their_folder(request, tmp_path):
    model = request.param[1]()
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


def test_transformers_detectors_go_there_and_back_bit_for_bit(their_folder, tmp_path):
    _, folder = their_folder
    convert.write(convert.read(folder), tmp_path / "ours")
    convert.write(convert.read(tmp_path / "ours"), tmp_path / "back", to="transformers")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())
    config, written = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert {k: written[k] for k in config} == config
    load_theirs(tmp_path / "back")


def test_transformers_detectors_answer_the_same_with_us(their_folder):
    their_model, folder = their_folder
    loaded = convert.read(folder)
    assert loaded.recipe.model.backbone.dc5 == their_model.config.dilation
    assert_same_answers(rebuilt(loaded), their_model)


def test_the_names_of_version_5_and_of_the_hub_are_read_alike(their_folder, tmp_path):
    their_model, folder = their_folder
    renamed = {k: v.contiguous() for k, v in their_model.state_dict().items()}
    assert renamed.keys() != load_file(folder / "model.safetensors").keys()
    (tmp_path / "v5").mkdir()
    (tmp_path / "v5" / "config.json").write_text((folder / "config.json").read_text())
    save_file(renamed, tmp_path / "v5" / "model.safetensors")
    a, b = convert.read(folder).state_dict, convert.read(tmp_path / "v5").state_dict
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_official_weights_reach_transformers_through_us(tmp_path):
    """.pth -> ours -> transformers -> ours -> .pth: the published 92 logits and their names all the way."""
    _, loaded = ours("resnet18.tv_in1k", classes=coco_91())
    state = {k.replace("backbone.body.", "backbone.0.body."): v for k, v in loaded.state_dict.items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    convert.write(convert.read(tmp_path / "a.pth", num_heads=4), tmp_path / "ours")
    convert.write(convert.read(tmp_path / "ours"), tmp_path / "hf", to="transformers")
    labels = load_theirs(tmp_path / "hf").config.id2label
    assert [labels[i] for i in (0, 1, 12, 90)] == ["N/A", "person", "N/A", "toothbrush"] and len(labels) == 91
    convert.write(convert.read(tmp_path / "hf"), tmp_path / "b.pth", to="official")
    back = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    assert back.keys() == state.keys() and all(torch.equal(v, back[k]) for k, v in state.items())


def test_gap_labels_that_a_config_names_are_still_gaps(tmp_path):
    _, loaded = ours("resnet18.tv_in1k", classes=coco_91())
    convert.write(loaded, tmp_path / "hf", to="transformers")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] |= {"12": "street sign", "26": "hat"}
    del config["category_ids"]
    path.write_text(json.dumps(config))
    assert convert.read(tmp_path / "hf").classes == coco_91()
    config["id2label"]["1"] = "human"  # another table: its names are taken as they stand
    path.write_text(json.dumps(config))
    names = convert.read(tmp_path / "hf").classes.names
    assert names[12] == "street sign" and names[1] == "human" and names[29] is None and names[2] == COCO_NAMES[2]


def test_a_cut_head_reaches_transformers_with_its_labels(tmp_path):
    _, loaded = ours("resnet18.tv_in1k")
    convert.write(loaded, tmp_path / "hf", to="transformers")
    convert.write(convert.read(tmp_path / "hf"), tmp_path / "cut", to="transformers", cut_head=True)
    model = load_theirs(tmp_path / "cut")
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.class_labels_classifier.out_features == 3
    assert convert.read(tmp_path / "cut").classes == Classes(("cat", "dog"), (17, 3))


def test_transformers_image_processor_is_set_up_as_our_evaluation(tmp_path):
    _, loaded = ours("resnet18.tv_in1k")
    convert.write(loaded, tmp_path / "hf", to="transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert type(processor).__name__.startswith("DetrImageProcessor")
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (800, 1333)
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406) and tuple(processor.image_std) == (0.229, 0.224, 0.225)


def test_activations_hidden_in_a_norm_are_refused_for_transformers(tmp_path):
    """transformers replaces timm's BatchNormAct2d, activation and all: the answers would be others."""
    _, loaded = ours("tf_efficientnet_lite0.in1k")
    with pytest.raises(UserError, match="only ResNets are written for it"):
        convert.write(loaded, tmp_path / "hf", to="transformers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change, sentence", [
    ({"model_type": "conditional_detr"}, "describes conditional_detr, not detr"),
    ({"position_embedding_type": "learned"}, "position_embedding_type is 'learned'"),
    ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
    ({"decoder_attention_heads": 8}, "decoder_attention_heads is 8"),
    ({"decoder_ffn_dim": 12, "id2label": {"0": "a"}}, "names 1 labels, but the head has 3"),
    ({"encoder_attention_heads": "4"}, "encoder_attention_heads is '4'; it must be a whole number above 0"),
    ({"dropout": "much"}, "dropout is 'much'; it must be a number"),
    ({"backbone_config": "resnet"}, "backbone_config is 'resnet'; it must be a table"),
    ({"backbone_kwargs": [16]}, r"backbone_kwargs is \[16\]; it must be a table"),
    ({"id2label": ["a"]}, r"id2label is \['a'\]; it must be a table"),
    ({"id2label": {"x": "a"}}, "it must be a table of labels 0, 1"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")  # fmt: skip
def test_configs_of_other_detectors_are_refused_in_one_sentence(tmp_path, change, sentence):
    _, loaded = ours("resnet18.tv_in1k")
    convert.write(loaded, tmp_path / "hf", to="transformers")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=sentence):
        convert.read(tmp_path / "hf")


def test_other_pixels_are_told_whatever_stands_there(tmp_path):
    _, loaded = ours("resnet18.tv_in1k")
    convert.write(loaded, tmp_path / "hf", to="transformers")
    path = tmp_path / "hf" / "preprocessor_config.json"
    told = json.loads(path.read_text())
    assert not any("beware" in line for line in convert.read(tmp_path / "hf").report)
    for mean in ([0.5, 0.5, 0.5], 0.5, None, "imagenet", [None, 0.456, 0.406]):
        path.write_text(json.dumps(told | {"image_mean": mean}))
        report = convert.read(tmp_path / "hf").report
        assert any("beware: its images are normalised with mean" in line for line in report)
    path.write_text("[]")
    with pytest.raises(UserError, match="is no table of settings"):
        convert.read(tmp_path / "hf")


def with_data(loaded, square, pixels, **sizes):
    recipe = loaded.recipe
    data = recipe.data.model_copy(update={"square": square, **sizes})
    backbone = recipe.model.backbone.model_copy(update={"pixels": pixels})
    model = recipe.model.model_copy(update={"backbone": backbone})
    loaded.recipe = recipe.model_copy(update={"data": data, "model": model})
    return loaded


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("pixels", ["timm", "unit"])
def test_what_is_done_to_images_goes_there_and_back_and_is_what_transformers_does(tmp_path, square, pixels):
    loaded = with_data(ours("resnet18.tv_in1k")[1], square, pixels, eval_size=160, eval_max_size=240)
    convert.write(loaded, tmp_path / "hf", to="transformers")
    back = convert.read(tmp_path / "hf").recipe
    assert (back.data.square, back.data.eval_size, back.model.backbone.pixels) == (square, 160, pixels)
    image = np.full((100, 200, 3), 128, np.uint8)
    processor = transformers.DetrImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    assert theirs.shape[2:] == ((160, 160) if square else (120, 240))
    wanted = 128 / 255 if pixels == "unit" else (128 / 255 - 0.406) / 0.225
    assert theirs.max().item() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    "size, known",
    [
        (600, (600, 1333, False)),
        ({"height": 480, "width": 480}, (480, 1333, True)),
        ({"shortest_edge": 480, "longest_edge": 600}, (480, 600, False)),
        ({"max_height": 480, "max_width": 480}, None),
        ({"height": 480, "width": 640}, None),
        ("large", None),
    ],
)
def test_sizes_of_a_transformers_folder_are_taken_or_told(tmp_path, size, known):
    convert.write(ours("resnet18.tv_in1k")[1], tmp_path / "hf", to="transformers")
    path = tmp_path / "hf" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": size}))
    back = convert.read(tmp_path / "hf")
    data, told = back.recipe.data, [line for line in back.report if "beware: its images are resized to" in line]
    assert (data.eval_size, data.eval_max_size, data.square) == (known or (800, 1333, False))
    assert bool(told) == (known is None)


def test_what_the_original_would_do_otherwise_is_told(tmp_path):
    loaded = with_data(ours("resnet18.tv_in1k")[1], True, "unit")
    lines = convert.write(loaded, tmp_path / "own.pth", to="official")
    assert sum("beware: this detector" in line for line in lines) == 2


def test_a_panoptic_detector_is_refused_in_one_sentence(tmp_path):
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    config = DetrConfig(**(SIZES | {"d_model": 128} | heads), num_labels=3, backbone_config=timm_config("resnet18"))
    transformers.DetrForSegmentation(config).save_pretrained(tmp_path / "panoptic")
    with pytest.raises(UserError, match="mask heads"):
        convert.read(tmp_path / "panoptic")


def test_a_transformers_folder_without_safetensors_is_refused(tmp_path):
    _, loaded = ours("resnet18.tv_in1k")
    convert.write(loaded, tmp_path / "hf", to="transformers")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        convert.read(tmp_path / "hf")
