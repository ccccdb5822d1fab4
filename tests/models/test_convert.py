"""Conversion of official checkpoints and of ours: there and back unchanged, and nothing foreign passes in silence.

(transformers' folders: tests/parity/test_convert_parity.py.) The models are ResNet-18 DETRs of width 16.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import unittest.mock
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.models import architecture, convert, weights
from detr_accel.models.coco_classes import coco_91
from detr_accel.structures import Classes, UserError

COCO_JSON = Path(__file__).parents[3] / "shared/data/coco_free/annotations/instances_val.json"


def tiny_recipe(backbone="resnet18.tv_in1k", dc5=False, **changes):
    sizes = {"hidden_dim": 16, "num_heads": 8, "num_encoder_layers": 2, "num_decoder_layers": 2} | changes
    sizes = {"dim_feedforward": 24, "num_queries": 6} | sizes
    part = recipes.Backbone(name=backbone, norm="frozen", dc5=dc5)
    return recipes.Recipe(data=recipes.Data(root="/data"), model=recipes.Model(backbone=part, **sizes))


def tiny_model(num_classes, seed=0, **changes):
    """A model with every number random, statistics and biases included, so that no two tensors are alike."""
    torch.manual_seed(seed)
    model = models.build(tiny_recipe(**changes), num_classes, load_weights=False).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) if key.endswith("running_var") else 0.05 * torch.randn_like(value))
    return model


def official_state(num_classes=91, **changes):
    state = tiny_model(num_classes, **changes).state_dict()
    return {k.replace("backbone.body.", "backbone.0.body."): v.clone() for k, v in state.items()}


@pytest.fixture(scope="module")
def official():
    return official_state()


@pytest.fixture
def pth(official, tmp_path):
    def save(content=None, name="detr-r18.pth"):
        torch.save({"model": official} if content is None else content, tmp_path / name)
        return tmp_path / name

    return save


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


def said(lines, *parts):
    return any(all(p in line for p in parts) for line in lines)


# -- the official .pth


@pytest.mark.parity
@pytest.mark.law6
def test_official_file_goes_there_and_back_unchanged(pth, official, tmp_path):
    convert.write(convert.read(pth()), tmp_path / "ours")
    convert.write(convert.read(tmp_path / "ours"), tmp_path / "back.pth", to="official")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == ["model"]
    assert equal(back["model"], official)


def test_official_file_is_read_with_its_architecture_and_the_coco_table(pth):
    loaded = convert.read(pth())
    model = loaded.recipe.model
    assert model.backbone.name == "resnet18.tv_in1k"
    assert (model.hidden_dim, model.num_queries, model.dim_feedforward) == (16, 6, 24)
    assert (model.num_encoder_layers, model.num_decoder_layers) == (2, 2)
    assert model.backbone.norm == "frozen"
    assert loaded.classes == coco_91()
    assert len(loaded.state_dict["class_embed.bias"]) == 92
    assert said(loaded.report, "architecture", "resnet18") and said(loaded.report, "COCO's 80 names")


def test_a_written_model_is_loadable_as_its_recipe_says(pth, official, tmp_path):
    lines = convert.write(convert.read(pth()), tmp_path / "ours")
    loaded = weights.load(tmp_path / "ours")
    assert recipes.loads(recipes.dumps(loaded.recipe)) == loaded.recipe
    model = models.build(loaded.recipe, len(loaded.classes), load_weights=False)
    weights.load_into(model, loaded.state_dict, "ours")
    assert torch.equal(model.state_dict()["query_embed.weight"], official["query_embed.weight"])
    assert said(lines, "data.root", "stand-in") and said(lines, "wrote")


@pytest.mark.parametrize("name", sorted(architecture._RESNETS.values()))
def test_every_torchvision_resnet_is_recognised_by_its_shapes(name):
    state = models.build(tiny_recipe(name), 3, device="meta", load_weights=False).state_dict()
    told = architecture.infer(state, "x", "x")
    assert told.model == tiny_recipe(name).model.model_copy(
        update={"backbone": recipes.Backbone(name=name, norm="frozen", frozen_stages=2)}
    )


def test_published_sizes_give_the_published_counts():
    for name, parameters, keys in [("resnet50.tv_in1k", 41_524_768, 458), ("resnet101.tv_in1k", 60_464_672, 713)]:
        recipe = recipes.Recipe(
            data=recipes.Data(root="/d"), model=recipes.Model(backbone=recipes.Backbone(name=name, norm="frozen"))
        )
        model = models.build(recipe, 91, device="meta", load_weights=False)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert len(model.state_dict()) == keys


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}])
def test_bare_and_wrapped_state_dicts_are_read_alike(pth, official, wrap):
    assert equal(convert.read(pth(wrap(official))).state_dict, convert.read(pth()).state_dict)


def test_a_safetensors_file_with_official_names_is_read(official, tmp_path):
    from safetensors.torch import save_file

    save_file(official, tmp_path / "detr.safetensors")
    assert len(convert.read(tmp_path / "detr.safetensors").state_dict) == len(official)


def test_reading_says_which_weights_and_by_which_metric(pth, tmp_path):
    meta = {"weights": "ema", "metric": "AP", "metrics": {"AP": 0.5}, "window": 40, "metrics_window": 30}
    loaded = replace(convert.read(pth()), meta=meta, split={"seed": 0, "train": [1], "val": [2]})
    convert.write(loaded, tmp_path / "run")
    sentence = f"weights: ema of window 40 from {tmp_path / 'run'}, last evaluated at window 30: AP 0.5000"
    lines = convert.write(convert.read(tmp_path / "run"), tmp_path / "copy")
    assert lines[0].startswith(sentence)
    assert convert.read(tmp_path / "copy").split == loaded.split
    assert said(convert.init_from(tiny_model(91), coco_91(), tmp_path / "run"), sentence)


def test_what_lies_beside_the_weights_is_named_as_left_out(pth, official):
    content = {"model": official, "optimizer": {"state": {}}, "lr_scheduler": {"last_epoch": 3}, "epoch": 3}
    assert said(convert.read(pth(content)).report, "left out", "epoch, lr_scheduler, optimizer")


def test_batch_counters_are_named_as_left_out(pth, official):
    counted = official | {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(7)}
    loaded = convert.read(pth({"model": counted}))
    assert said(loaded.report, "left out: 1 batch counters")
    assert equal(loaded.state_dict, convert.read(pth()).state_dict)


def test_dc5_is_what_the_caller_says_and_comes_back(pth, tmp_path):
    assert convert.read(pth()).recipe.model.backbone.dc5 is False
    assert said(convert.read(pth()).report, "dc5", "taken as false")
    loaded = convert.read(pth(), dc5=True)
    lines = convert.write(loaded, tmp_path / "dc5.pth", to="official")
    assert said(lines, "--dilation")
    assert convert.read(tmp_path / "dc5.pth").recipe.model.backbone.dc5 is True
    with pytest.raises(UserError, match="says itself that dc5 is true"):
        convert.read(tmp_path / "dc5.pth", dc5=False)


def test_own_class_names_and_heads_survive_the_official_format(tmp_path):
    state = {k.replace("backbone.0.body.", "backbone.body."): v for k, v in official_state(2).items()}
    recipe, classes = tiny_recipe(num_heads=4), Classes(("cat", "dog"), (7, 3))
    ours = weights.Loaded(state, recipe, classes, {}, tmp_path)
    convert.write(ours, tmp_path / "own.pth", to="official")
    back = convert.read(tmp_path / "own.pth")
    assert (back.classes, back.recipe) == (classes, recipe)
    assert equal(back.state_dict, state)


def test_a_head_of_unknown_classes_gets_plain_names(pth):
    loaded = convert.read(pth({"model": official_state(3)}))
    assert loaded.classes == Classes(("category 0", "category 1", "category 2"), (0, 1, 2))
    assert said(loaded.report, "class table", "has none")


# -- refusals


def test_pickled_objects_are_refused_with_the_remedy_and_never_run(pth, official, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for args in (argparse.Namespace(lr=1e-4), Bomb()):
        path = pth({"model": official, "args": args}, "own-training.pth")
        with pytest.raises(UserError, match="own-training.pth holds pickled .*weights_only.pth") as caught:
            convert.read(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("cut", [0, 100, 10_000])
def test_a_pth_that_is_cut_short_is_refused_by_name(pth, cut):
    path = pth()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="detr-r18.pth"):
        convert.read(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": {}}, {"weights": {"a": 1}}], ids=str)
def test_a_file_without_a_state_dict_is_refused(pth, content):
    with pytest.raises(UserError, match="detr-r18.pth holds"):
        convert.read(pth(content))


@pytest.mark.parametrize("change, sentence", [
    (lambda s: {f"detr.{k}": v for k, v in s.items()} | {"mask_head.lay1.weight": torch.zeros(1)}, "mask heads"),
    (lambda s: s | {"transformer.encoder.norm.weight": torch.zeros(16)}, "pre_norm"),
    (lambda s: s | {"backbone.1.row_embed.weight": torch.zeros(50, 8)}, "learned position"),
    (lambda s: s | {"transformer.level_embed": torch.zeros(4, 16)}, "transformer.level_embed is unexpected"),
    (lambda s: {k: v for k, v in s.items() if k != "input_proj.bias"}, "input_proj.bias is missing"),
    (lambda s: {k: v for k, v in s.items() if k != "query_embed.weight"}, "no DETR detector"),
    (lambda s: s | {"bbox_embed.layers.2.bias": torch.zeros(5)}, r"bbox_embed.layers.2.bias is \[5\] instead of \[4\]"),
    (lambda s: s | {"backbone.0.body.layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)}, "none of torchvision's"),
    (lambda s: {f"model.{k.removeprefix('transformer.')}": v for k, v in s.items()}, "transformers' key names"),
], ids=["masks", "pre-norm", "learned", "unexpected", "missing", "no queries", "shape", "backbone", "transformers"])
# fmt: skip
def test_what_is_not_our_detr_is_refused_in_one_sentence(pth, official, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        convert.read(pth({"model": change(official)}))
    assert "detr-r18.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_our_folder_is_checked_against_its_recipe(pth, tmp_path):
    convert.write(convert.read(pth()), tmp_path / "ours")
    other = recipes.dumps(tiny_recipe(num_queries=7))
    (tmp_path / "ours" / "recipe.yaml").write_text(other)
    with pytest.raises(UserError, match="query_embed.weight"):
        convert.read(tmp_path / "ours")


def test_nothing_that_exists_is_overwritten(pth, tmp_path):
    loaded = convert.read(pth())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for path, to in [(tmp_path / "taken", "ours"), (pth(), "official")]:
        with pytest.raises(UserError, match="exists already"):
            convert.write(loaded, path, to=to)
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_other_backbones_are_refused_by_the_official_format_and_leave_no_file(tmp_path):
    model = tiny_model(2, backbone="test_resnet.r160_in1k")
    recipe = tiny_recipe("test_resnet.r160_in1k")
    loaded = weights.Loaded(model.state_dict(), recipe, Classes(("a", "b"), (1, 2)), {}, tmp_path)
    with pytest.raises(UserError, match="torchvision's ResNets only, not test_resnet"):
        convert.write(loaded, tmp_path / "x.pth", to="official")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"root:x:0:0:/root\n" * 50, b"\xff\xd8\xff\xe0\0\x10JFIF", b"\x80abc", b""])
def test_what_is_no_weights_file_is_called_so_and_never_recommended_to_be_run(tmp_path, content):
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(UserError, match="photo.jpg is no weights file") as caught:
        convert.read(tmp_path / "photo.jpg")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("extra", [5, {"recipe": 3}, {"recipe": "data: {format: shapes}", "classes": {"names": 3}}])
def test_a_damaged_entry_beside_the_weights_is_one_sentence(pth, official, extra):
    with pytest.raises(UserError, match="detr-r18.pth.*entry detr_accel") as caught:
        convert.read(pth({"model": official, "detr_accel": extra}))
    assert "\n" not in str(caught.value)


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (convert.read, lambda path: convert.init_from(nn.Linear(1, 1), coco_91(), path)):
        with pytest.raises(UserError, match="no such run, checkpoint or file: runs/nope") as caught:
            read("runs/nope")
        assert "fetch" not in str(caught.value)


@pytest.mark.parametrize("to", ["ours", "official", "transformers"])
@pytest.mark.parametrize("place", ["/proc/nothing/c", "file/c", "full"])
def test_a_disk_that_cannot_be_written_is_one_sentence_and_leaves_nothing(pth, tmp_path, to, place):
    loaded = convert.read(pth())
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if place == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # each file ends after 1 MiB, as a disk would
    try:
        with pytest.raises(UserError, match="cannot write .*; free space there or choose another path") as caught:
            convert.write(loaded, tmp_path / place, to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


# -- classes and the head


@pytest.mark.skipif(not COCO_JSON.exists(), reason=f"no data at {COCO_JSON}")
def test_the_coco_table_is_that_of_the_data_set():
    categories = json.loads(COCO_JSON.read_text())["categories"]
    table = coco_91()
    assert {(c["id"], c["name"]) for c in categories} == {
        (i, name) for i, name in enumerate(table.names) if name is not None
    }
    assert len(table) == 91 and table.label_of == {c["id"]: c["id"] for c in categories}


def test_cutting_the_head_keeps_the_used_rows_in_order_and_no_object_last(pth, official, tmp_path):
    lines = convert.write(convert.read(pth()), tmp_path / "cut", cut_head=True)
    cut = weights.load(tmp_path / "cut")
    ids = [i for i in coco_91().category_ids if i is not None]
    assert cut.classes.category_ids == tuple(ids) and None not in cut.classes.names and len(cut.classes) == 80
    assert torch.equal(cut.state_dict["class_embed.weight"], official["class_embed.weight"][[*ids, 91]])
    assert torch.equal(cut.state_dict["class_embed.bias"], official["class_embed.bias"][[*ids, 91]])
    assert said(lines, "cut from 91 labels to the 80")
    convert.read(tmp_path / "cut")  # whole, as its recipe says


def test_the_head_is_cut_only_on_demand(pth, tmp_path):
    loaded = convert.read(pth())
    convert.write(loaded, tmp_path / "whole")
    assert len(weights.load(tmp_path / "whole").classes) == 91
    assert len(convert.cut_head(loaded).classes) == 80 and len(loaded.classes) == 91


# -- starting from a detector


@pytest.fixture
def source(tmp_path):
    """A run whose best checkpoint knows cat, Traffic Light, (gap), dog."""
    classes = Classes(("cat", "Traffic Light", None, "dog"), (1, 2, None, 5))
    state = tiny_model(4, seed=1).state_dict()
    folder = tmp_path / "runs" / "a" / "checkpoints" / "best"
    weights.save(folder, state, recipes.dumps(tiny_recipe()), classes, {"weights": "raw"})
    return tmp_path / "runs" / "a", state


NEW = Classes(("zebra", "dog", "traffic_light"), (1, 2, 3))
HEAD = ("class_embed.weight", "class_embed.bias")


def test_matching_copies_rows_of_equal_names_and_no_object_and_names_the_rest(source):
    run, old = source
    model = tiny_model(3)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    lines = convert.init_from(model, NEW, str(run), "match")
    new = model.state_dict()
    for key in HEAD:
        assert torch.equal(new[key][0], fresh[key][0])
        assert torch.equal(new[key][1:], old[key][[3, 1, 4]])
    assert all(torch.equal(v, old[k]) for k, v in new.items() if k not in HEAD)
    assert said(lines, "2 of 3 class rows copied by name: dog, traffic_light")
    assert said(lines, "1 class rows start fresh: zebra")


def test_keeping_takes_the_head_whole_and_needs_equal_tables(source):
    run, old = source
    same = Classes(("CAT", "traffic_light", None, "dog"), (11, 12, None, 15))
    model = tiny_model(4)
    convert.init_from(model, same, run, "keep")
    assert equal(model.state_dict(), old)
    with pytest.raises(UserError, match="3 labels and the source 4.*match"):
        convert.init_from(tiny_model(3), NEW, run, "keep")
    other = replace(same, names=("cat", "bird", None, "dog"))
    with pytest.raises(UserError, match="label 1 is 'bird' in the data set and 'Traffic Light'"):
        convert.init_from(tiny_model(4), other, run, "keep")


def test_resetting_leaves_the_head_fresh_and_copies_the_rest(source):
    run, old = source
    model = tiny_model(3)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    lines = convert.init_from(model, NEW, run, "reset")
    assert all(torch.equal(v, (fresh if k in HEAD else old)[k]) for k, v in model.state_dict().items())
    assert said(lines, "class head: starts fresh")


def test_a_rule_that_is_none_is_refused(source):
    with pytest.raises(UserError, match="match, keep, reset"):
        convert.init_from(tiny_model(3), NEW, source[0], "copy")


def test_published_rows_reach_a_contiguous_coco_head(pth, official):
    """91 labels -> the 80 of a COCO folder: all rows found by name, so the answers are the same."""
    table = convert.cut_head(convert.read(pth())).classes
    model = tiny_model(80, seed=3)
    lines = convert.init_from(model, table, pth(), "match")
    assert said(lines, "80 of 80 class rows") and not said(lines, "start fresh")
    whole = tiny_model(91)
    whole.load_state_dict({k.replace("backbone.0.body.", "backbone.body."): v for k, v in official.items()})
    images, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        a, b = model(images, mask), whole(images, mask)
    ids = [i for i in coco_91().category_ids if i is not None]
    torch.testing.assert_close(a["pred_logits"], b["pred_logits"][..., [*ids, 91]])
    assert torch.equal(a["pred_boxes"], b["pred_boxes"])


@pytest.mark.parametrize("num, line", [(4, "the first 4 of the source's 6"), (9, "6 of 9 copied, the other 3 start")])
def test_queries_are_copied_as_far_as_both_have_them(source, num, line):
    run, old = source
    model = tiny_model(3, num_queries=num)
    fresh = model.query_embed.weight.detach().clone()
    assert said(convert.init_from(model, NEW, run), "queries", line)
    n = min(num, 6)
    assert torch.equal(model.query_embed.weight[:n], old["query_embed.weight"][:n])
    assert torch.equal(model.query_embed.weight[n:], fresh[n:])


@pytest.mark.parametrize("num, line", [(1, "last 1 of 2 layers left out"), (3, "last 1 of 3 layers start fresh")])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_layers_are_copied_as_far_as_both_have_them(source, stack, num, line):
    run, old = source
    model = tiny_model(3, **{f"num_{stack}_layers": num})
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    assert said(convert.init_from(model, NEW, run), stack, line)
    for key, value in model.state_dict().items():
        if key not in HEAD:
            beyond = key.startswith(f"transformer.{stack}.layers.2.")
            assert torch.equal(value, (fresh if beyond else old)[key]), key


@pytest.mark.parametrize("changes, sentence", [
    ({"hidden_dim": 32}, "model.hidden_dim is 32, but 16 in .*set model.hidden_dim=16"),
    ({"num_heads": 4}, "model.num_heads is 4.*trained with 8"),
    ({"dim_feedforward": 20}, "model.dim_feedforward=24"),
    ({"backbone": "resnet34.tv_in1k"}, "model.backbone.name=resnet18.tv_in1k"),
], ids=["width", "heads", "feed-forward", "backbone"])
# fmt: skip
def test_another_architecture_is_refused_in_words_and_changes_nothing(source, changes, sentence):
    model = tiny_model(3, **changes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=sentence):
        convert.init_from(model, NEW, source[0])
    assert equal(model.state_dict(), before)


def test_live_normalisation_starts_from_frozen_statistics(source):
    run, old = source
    live = tiny_recipe()
    live.model.backbone.norm, live.model.backbone.frozen_stages = "live", 0
    model = models.build(live, 3, load_weights=False)
    counters = [k for k in model.state_dict() if k.endswith("num_batches_tracked")]
    assert said(convert.init_from(model, NEW, run), f"{len(counters)} batch counters start at 0")
    key = "backbone.body.layer4.1.bn2.running_var"
    assert torch.equal(model.state_dict()[key], old[key])


# -- the Hub


def offline(code, home):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline_and_not_cached_is_one_sentence_with_the_way_out(tmp_path):
    out = offline(
        "from detr_accel.models import convert\n"
        "from detr_accel.structures import Classes, UserError\n"
        "try: convert.init_from(None, Classes((), ()), 'facebook/detr-resnet-101')\n"
        "except UserError as error: print(error)",
        tmp_path / "empty",
    ).strip()
    assert "facebook/detr-resnet-101 is not in the cache" in out and "\n" not in out
    assert "detr-accel fetch facebook/detr-resnet-101 --out FOLDER" in out and "model.init_from" in out


def test_a_cached_detector_is_found_without_network(pth, tmp_path):
    repo = tmp_path / "home" / "hub" / "models--someone--detr"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    convert.write(convert.read(pth()), repo / "snapshots" / ("0" * 40))
    out = offline(
        "from detr_accel.models import convert\n"
        "folder = convert.fetch('someone/detr')\n"
        "print(folder); print(len(convert.read(folder).classes))",
        tmp_path / "home",
    ).split()
    assert out == [str(repo / "snapshots" / ("0" * 40)), "91"]
    (tmp_path / "out").mkdir()
    copy = f"from detr_accel.models import convert\nprint(convert.fetch('someone/detr', {str(tmp_path / 'out')!r}))"
    assert offline(copy, tmp_path / "home").split() == [str(tmp_path / "out")]
    assert len(convert.read(tmp_path / "out").classes) == 91
    with pytest.raises(UserError, match="out exists already"):
        convert.fetch("someone/detr", tmp_path / "out")


def test_a_path_that_is_begun_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no such run, checkpoint or file: runs/absent"):
        convert.init_from(tiny_model(3), NEW, "runs/absent")


def test_reading_a_hub_id_says_how_to_fetch_it():
    with pytest.raises(UserError, match="no such run, .*: someone/detr; .*detr-accel fetch someone/detr --out FOLDER"):
        convert.read("someone/detr")


@pytest.mark.parametrize(
    "error, words",
    [
        (ConnectionError("peer closed connection\nin the middle"), "failed .peer closed connection.: try again"),
        (type("ReadTimeout", (Exception,), {})(), "failed .ReadTimeout.: try again"),
        (None, "someone/detr on the Hub has no revision v9: give a branch"),
    ],
)
def test_a_download_that_breaks_off_is_a_sentence(monkeypatch, error, words):
    """Each transport has errors of its own, which are no OSError."""
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    def broken(*_, **__):
        raise error or RevisionNotFoundError("no", response=unittest.mock.MagicMock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=words):
        convert.fetch("someone/detr@v9")


@pytest.mark.network
@pytest.mark.parametrize("hub_id, keys", [("facebook/detr-resnet-50", 458), ("facebook/detr-resnet-101-dc5", 713)])
def test_published_detectors_are_fetched_and_read(hub_id, keys):
    loaded = convert.read(convert.fetch(hub_id))
    assert len(loaded.state_dict) == keys
    assert loaded.classes == coco_91()
    assert loaded.recipe.model.backbone.dc5 is hub_id.endswith("dc5")
