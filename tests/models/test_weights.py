"""The model folder: what is written is what is read, and everything else is refused in one sentence."""

import hashlib
import json
import shutil

import pytest
import torch
from torch import nn

from detr_accel import recipe as recipes
from detr_accel.models import weights
from detr_accel.structures import Classes, UserError

CLASSES = Classes((None, "cat", "traffic light"), (None, 17, 10))
RECIPE = recipes.Recipe(name="tiny", data=recipes.Data(root="/data"), optim=recipes.Optim(lr=3e-5))
META = {
    "weights": "ema", "metric": "AP", "metrics": {"AP": 0.25}, "window": 12, "metrics_window": 12, "threshold": 0.5
}  # fmt: skip
SPLIT = {"seed": 0, "val_fraction": 0.5, "train": [3, 8], "val": [5]}


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.class_embed = nn.Linear(4, 4)


def write(folder, model=None, **changes):
    given = {"recipe_yaml": recipes.dumps(RECIPE), "classes": CLASSES, "meta": META} | changes
    weights.save(folder, Tiny() if model is None else model, **given)
    return folder


def test_folder_comes_back_as_it_was_written(tmp_path):
    model = Tiny()
    loaded = weights.load(write(tmp_path / "m", model))
    assert loaded.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict[k]) and v.dtype == loaded.state_dict[k].dtype
               for k, v in model.state_dict().items())  # fmt: skip
    assert (loaded.recipe, loaded.classes, loaded.meta) == (RECIPE, CLASSES, META)
    assert loaded.folder == tmp_path / "m"


def test_nothing_in_the_folder_is_pickled(tmp_path):
    names = {p.name for p in write(tmp_path / "m").iterdir()}
    assert names == {"model.safetensors", "recipe.yaml", "classes.json", "meta.json"}


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"),
             lambda m: nn.DataParallel(torch.compile(m, backend="eager"))], ids=["parallel", "compiled", "both"],
)  # fmt: skip
def test_keys_are_free_of_wrapper_prefixes(tmp_path, wrap):
    model = Tiny()
    loaded = weights.load(write(tmp_path / "m", wrap(model)))
    assert loaded.state_dict.keys() == model.state_dict().keys()


def test_a_compiled_part_leaves_no_trace_in_the_keys(tmp_path):
    model, plain = Tiny(), Tiny()
    model.backbone = torch.compile(model.backbone, backend="eager")
    assert any("_orig_mod" in k for k in model.state_dict())
    assert weights.load(write(tmp_path / "m", model)).state_dict.keys() == plain.state_dict().keys()


def test_shared_and_strided_tensors_are_written_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "b": base, "c": base.t(), "d": base[1:]}
    loaded = weights.load(write(tmp_path / "m", state))
    assert all(torch.equal(v, loaded.state_dict[k]) for k, v in state.items())


def test_a_run_means_its_best_checkpoint_else_its_last(tmp_path):
    run = tmp_path / "run"
    last = write(run / "checkpoints" / "last")
    assert weights.find(run) == last
    best = write(run / "checkpoints" / "best" / "model")
    assert weights.find(run) == best
    assert weights.find(run, "last") == last
    assert weights.find(run / "checkpoints" / "best") == best
    assert weights.find(best) == best
    assert weights.find(best / "model.safetensors") == best


@pytest.mark.parametrize("which, missing", [(None, "best or last"), ("best", "best")])
def test_a_run_without_a_finished_checkpoint_says_so(tmp_path, which, missing):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=rf"no finished checkpoint \({missing}\)"):
        weights.find(tmp_path, which)


def test_an_insisted_checkpoint_is_not_replaced_by_the_other(tmp_path):
    write(tmp_path / "checkpoints" / "last")
    with pytest.raises(UserError, match="no finished checkpoint"):
        weights.find(tmp_path, "best")


def test_a_path_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing at .*absent"):
        weights.load(tmp_path / "absent")
    with pytest.raises(UserError, match="no model.safetensors in"):
        weights.load(tmp_path)


@pytest.mark.parametrize("name", ["recipe.yaml", "classes.json"])
def test_a_missing_file_is_named(tmp_path, name):
    (write(tmp_path / "m") / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        weights.load(tmp_path / "m")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused_by_name(tmp_path, share):
    path = write(tmp_path / "m") / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="model.safetensors is damaged or cut short") as caught:
        weights.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"names": ["a"], "category_ids": []}', '{"names": ["a"]}'])
def test_a_class_table_that_is_none_is_refused(tmp_path, text):
    (write(tmp_path / "m") / "classes.json").write_text(text)
    with pytest.raises(UserError, match="classes.json is (not valid json|no class table)"):
        weights.load(tmp_path / "m")


def test_a_class_table_of_another_model_is_refused(tmp_path):
    write(tmp_path / "m", classes=Classes(("cat",), (1,)))
    with pytest.raises(UserError, match="names 1 labels, but the head has 4 outputs"):
        weights.load(tmp_path / "m")


def test_a_recipe_with_an_unknown_key_is_refused_by_name(tmp_path):
    write(tmp_path / "m", recipe_yaml="modle: {}\n")
    with pytest.raises(UserError, match="recipe.yaml.*modle"):
        weights.load(tmp_path / "m")


@pytest.mark.parametrize("fault, sentence", [
    (lambda s: s.pop("class_embed.bias"), "class_embed.bias is missing"),
    (lambda s: s.update(extra=torch.zeros(1)), "extra is not known"),
    (lambda s: s.update({"class_embed.bias": torch.zeros(7)}), r"class_embed.bias is \(7,\) and should be \(4,\)"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named_and_leave_the_model_alone(fault, sentence):
    model, state = Tiny(), dict(Tiny().state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fault(state)
    with pytest.raises(UserError, match=sentence):
        weights.load_into(model, state, "somewhere")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_folder_can_be_moved(tmp_path):
    write(tmp_path / "m")
    shutil.move(tmp_path / "m", tmp_path / "elsewhere")
    assert weights.load(tmp_path / "elsewhere").meta == META


@pytest.mark.parametrize("meta, sentence", [
    ({}, ": AP 0.2500 on its validation set"),
    ({"window": 40, "metrics_window": 30}, ", last evaluated at window 30: AP 0.2500 on its validation set"),
    ({"metrics": None, "metrics_window": None}, ", never evaluated"),
    ({"metrics": {"AP": None}}, ": AP undefined on its validation set"),
])  # fmt: skip
def test_a_value_is_told_with_the_window_that_it_was_measured_at(tmp_path, meta, sentence):
    loaded = weights.load(write(tmp_path / "m", meta=META | meta))
    assert weights.which(loaded) == f"weights: ema of window {loaded.meta['window']} from {tmp_path / 'm'}{sentence}"


def test_a_value_of_unknown_window_claims_none(tmp_path):
    loaded = weights.load(write(tmp_path / "m", meta={k: v for k, v in META.items() if k != "metrics_window"}))
    assert weights.which(loaded).endswith(", at its last evaluation: AP 0.2500 on its validation set")


def test_foreign_weights_claim_no_window(tmp_path):
    loaded = weights.load(write(tmp_path / "m", meta={"weights": "raw", "format": "official"}))
    assert weights.which(loaded) == f"weights: raw from {tmp_path / 'm'}"


def test_the_saved_split_is_read_from_the_checkpoint_or_else_from_its_run(tmp_path):
    run = tmp_path / "run"
    write(run / "checkpoints" / "window-00000012")
    (run / "checkpoints" / "best").symlink_to("window-00000012")
    assert weights.load(run).split is None
    (run / "split.json").write_text(weights.to_json(SPLIT))
    for path in (run, run / "checkpoints" / "best", run / "checkpoints" / "window-00000012"):
        assert weights.load(path).split == SPLIT
    own = SPLIT | {"val": [3], "train": [5, 8]}
    (run / "checkpoints" / "best" / "split.json").write_text(weights.to_json(own))
    assert weights.load(run).split == own
    assert weights.load(write(tmp_path / "copy", split=own)).split == own


@pytest.mark.parametrize("text, words", [("{", "not valid json"), ("[1]", "no saved split"), ("{}", "no saved split")])
def test_a_damaged_split_is_named(tmp_path, text, words):
    (write(tmp_path / "m") / "split.json").write_text(text)
    with pytest.raises(UserError, match=f"split.json is {words}"):
        weights.load(tmp_path / "m")


# -- checkpoints with a manifest, and a run whose links were lost


def checkpoint(run, window, **changes):
    """A checkpoint as a run leaves it: weights, raw weights, and a manifest over all files."""
    folder = write(run / "checkpoints" / f"window-{window:08d}", meta=META | {"window": window}, **changes)
    shutil.copy(folder / "model.safetensors", folder / "raw.safetensors")
    rows = {
        p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size}
        for p in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder


def zero(path):
    content = path.read_bytes()
    path.write_bytes(content[:-16] + b"\0" * 16)


@pytest.mark.parametrize("harm, words", [
    (lambda f: zero(f / "model.safetensors"), "model.safetensors was changed after it was written"),
    (lambda f: (f / "model.safetensors").open("ab").write(b"x"), r"model.safetensors has \d+ bytes instead of \d+"),
    (lambda f: (f / "recipe.yaml").write_text(recipes.dumps(RECIPE) + "#"), "recipe.yaml has"),
    (lambda f: (f / "classes.json").unlink(), "classes.json is missing"),
    (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json does not list model.safetensors"),
    (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is no table of files"),
    (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    (lambda f: (f / "manifest.json").write_text('{"model.safetensors": 3}'), "manifest.json has no size"),
])  # fmt: skip
def test_files_that_are_not_as_the_manifest_says_are_refused(tmp_path, harm, words):
    folder = checkpoint(tmp_path, 2)
    assert weights.load(folder).meta["window"] == 2
    harm(folder)
    with pytest.raises(UserError, match=f"window-00000002 is damaged: {words}.*; copy it again") as caught:
        weights.load(folder)
    assert "\n" not in str(caught.value)


def test_raw_weights_are_read_with_the_recipe_beside_them_and_called_raw(tmp_path):
    loaded = weights.load(checkpoint(tmp_path, 2) / "raw.safetensors")
    assert (loaded.recipe, loaded.classes) == (RECIPE, CLASSES)
    assert weights.which(loaded).startswith("weights: raw of window 2 from ")
    assert weights.which(loaded).endswith("raw.safetensors, never evaluated") and loaded.meta["threshold"] is None
    zero(loaded.folder)
    with pytest.raises(UserError, match="raw.safetensors was changed"):
        weights.load(loaded.folder)


def test_a_run_that_lost_its_links_means_its_newest_whole_checkpoint_and_says_so(tmp_path):
    folders = [checkpoint(tmp_path, window) for window in (1, 2, 3)]
    (tmp_path / "checkpoints" / "best").symlink_to("gone")
    zero(folders[2] / "model.safetensors")
    loaded = weights.load(tmp_path)
    assert loaded.folder == folders[1] == weights.find(tmp_path, "last")
    assert "lost its links" in loaded.report[0] and "window-00000002, is taken" in loaded.report[0]
    with pytest.raises(UserError, match="no finished checkpoint"):
        weights.find(tmp_path, "best")
    for folder in folders[:2]:
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no checkpoint in .* is whole .*-00000003: model.safetensors was changed"):
        weights.load(tmp_path)


def test_a_best_that_points_to_nothing_is_said_when_the_last_is_taken(tmp_path):
    checkpoint(tmp_path, 2)
    (tmp_path / "checkpoints" / "best").symlink_to("window-00000001")
    (tmp_path / "checkpoints" / "last").symlink_to("window-00000002")
    assert "best points to nothing: the last checkpoint is taken" in weights.load(tmp_path).report[0]


def test_a_checkpoint_without_its_weights_is_named(tmp_path):
    (checkpoint(tmp_path, 2) / "model.safetensors").unlink()
    (tmp_path / "checkpoints" / "last").symlink_to("window-00000002")
    with pytest.raises(UserError, match="checkpoints/last/model.safetensors is missing"):
        weights.load(tmp_path)


@pytest.mark.parametrize("name, text, words", [
    ("meta.json", "[]", "meta.json does not describe weights"),
    ("meta.json", '{"metrics": 5}', "meta.json does not describe weights"),
    ("meta.json", '{"metrics": {"AP": 1}}', "meta.json does not describe weights"),
    ("meta.json", '{"threshold": "high"}', "meta.json does not describe weights"),
    ("meta.json", "[" * 100_000, "meta.json is not valid json"),
    ("split.json", "{", "split.json is not valid json"),
    ("split.json", '{"seed": 0, "train": 3, "val": [1]}', "split.json is no saved split"),
    ("split.json", '{"seed": 0, "train": ["a"], "val": [1]}', "split.json is no saved split"),
    ("classes.json", '{"names": [null, 1, 2], "category_ids": [null, 17, 10]}', "classes.json is no class table"),
])  # fmt: skip
def test_damaged_files_beside_the_weights_are_one_sentence(tmp_path, name, text, words):
    (write(tmp_path / "m", split=SPLIT) / name).write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        weights.load(tmp_path / "m")
    assert "\n" not in str(caught.value)
