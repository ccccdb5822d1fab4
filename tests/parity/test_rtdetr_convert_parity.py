"""Conversion of RT-DETR against transformers itself: it loads what we write without a complaint and answers the same,
we read what it writes, and nothing changes on the way there and back."""

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")

from rtdetr_files import loaded, randomise, small_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from detr_accel import models  # noqa: E402
from detr_accel.models import convert, weights  # noqa: E402
from detr_accel.structures import Classes  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.law6]

CLASSES = Classes(("cat", None, "dog"), (17, None, 3))
DISCRETE = {"rtdetr": {"sampling": "discrete"}}
RESNETS = {
    "basic": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "bottleneck": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
}


def load_theirs(folder):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    made = RTDetrV2ForObjectDetection if kind == "rt_detr_v2" else RTDetrForObjectDetection
    model, info = made.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_same_answers(our_model, their_model):
    """float64, with the few constants that transformers computes in float32."""
    images = torch.rand(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        a = our_model.double()(images, torch.zeros(2, 0, 0, dtype=torch.bool))
        b = their_model.double()(images)
    for x, y in ((a["pred_logits"], b.logits), (a["pred_boxes"], b.pred_boxes)):
        assert y.std() > 1e-3  # queries apart, so that a wrong order would show
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [
    {}, {"live": True}, DISCRETE, {"backbone": "resnet50d.ra2_in1k", "rtdetr": {"activation": "silu"}},
], ids=["r18", "live", "discrete", "r50"])  # fmt: skip
def test_transformers_loads_what_we_write_and_answers_the_same(tmp_path, options):
    model, recipe = small_model(3, num_queries=20, num_heads=4, **options)
    convert.write(weights.Loaded(model.state_dict(), recipe, CLASSES, {}, None), tmp_path / "hf", to="transformers")
    their_model = load_theirs(tmp_path / "hf")
    assert their_model.config.id2label == {0: "cat", 1: "N/A", 2: "dog"}
    assert_same_answers(model, their_model)


def test_a_detector_saved_again_by_transformers_keeps_its_category_ids(tmp_path):
    ours = loaded(3, CLASSES, num_queries=20, num_heads=4)
    convert.write(ours, tmp_path / "hf", to="transformers")
    load_theirs(tmp_path / "hf").save_pretrained(tmp_path / "again")
    back = convert.read(tmp_path / "again")
    assert back.classes == CLASSES and back.recipe.model == ours.recipe.model
    assert all(torch.equal(v, ours.state_dict[k]) for k, v in back.state_dict.items())


@pytest.fixture(scope="module", params=["v1-basic", "v1-bottleneck", "v2-basic-live"])
def their_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    version, kind, *live = request.param.split("-")
    resnet = RTDetrResNetConfig(**RESNETS[kind], embedding_size=64, out_features=["stage2", "stage3", "stage4"])
    made = (RTDetrV2Config, RTDetrV2ForObjectDetection) if version == "v2" else (RTDetrConfig, RTDetrForObjectDetection)
    config = made[0](
        backbone_config=resnet, encoder_in_channels=RESNETS[kind]["hidden_sizes"][1:], encoder_hidden_dim=16,
        encoder_ffn_dim=24, encoder_attention_heads=4, d_model=16, decoder_in_channels=[16] * 3, decoder_ffn_dim=24,
        decoder_attention_heads=4, decoder_layers=2, num_queries=20, num_labels=3,
        freeze_backbone_batch_norms=not live, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2},
    )  # fmt: skip
    model = randomise(made[1](config)).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("n_points_scale"):
                value.fill_(1 / 4)
    model.save_pretrained(folder)
    return model, folder


def test_transformers_detectors_go_there_and_back_bit_for_bit_and_answer_the_same(their_folder, tmp_path):
    their_model, folder = their_folder
    their_model = copy.deepcopy(their_model)
    read = convert.read(folder)
    convert.write(read, tmp_path / "ours")
    convert.write(convert.read(tmp_path / "ours"), tmp_path / "back", to="transformers")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())
    config, written = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert written == config
    model = models.build(read.recipe, 3, load_weights=False)
    weights.load_into(model, read.state_dict, folder)
    assert_same_answers(model.eval(), their_model)


def test_the_names_of_version_5_and_of_the_hub_are_read_alike(their_folder, tmp_path):
    their_model, folder = their_folder
    renamed = {k: v.clone().contiguous() for k, v in their_model.state_dict().items()}
    assert renamed.keys() != load_file(folder / "model.safetensors").keys()
    (tmp_path / "v5").mkdir()
    (tmp_path / "v5" / "config.json").write_text((folder / "config.json").read_text())
    save_file(renamed, tmp_path / "v5" / "model.safetensors")
    a, b = convert.read(folder).state_dict, convert.read(tmp_path / "v5").state_dict
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_transformers_image_processor_is_set_up_for_zero_to_one(tmp_path):
    convert.write(loaded(num_queries=20), tmp_path / "hf", to="transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert type(processor).__name__.startswith("RTDetrImageProcessor")
    assert processor.do_normalize is False and processor.rescale_factor == 1 / 255
