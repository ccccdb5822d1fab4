"""Starting an RT-DETR from a trained one: rows by name in every head; what has no partner is told, other meanings are
refused."""

import json

import pytest
import torch
from rtdetr_files import DEIM, loaded, randomise, small_model, small_recipe

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.models import architecture, convert, weights
from detr_accel.models.class_rows import class_entries
from detr_accel.models.warm_start import match_rows
from detr_accel.structures import Classes, UserError

OLD = Classes(("cat", "Traffic Light", None, "dog"), (1, 2, None, 5))
NEW = Classes(("zebra", "dog", "traffic_light"), (1, 2, 3))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A converted folder, and its weights."""
    folder = tmp_path_factory.mktemp("source") / "model"
    old = loaded(4, OLD, seed=1)
    convert.write(old, folder)
    return folder, old.state_dict


def fresh_and_model(num_classes=3, **changes):
    model, _ = small_model(num_classes, **changes)
    return {k: v.clone() for k, v in model.state_dict().items()}, model


def said(lines, *parts):
    return any(all(p in line for p in parts) for line in lines)


def test_matching_copies_rows_of_equal_names_in_every_head_and_the_empty_label(source):
    folder, old = source
    fresh, model = fresh_and_model()
    lines = convert.init_from(model, NEW, folder, "match")
    new = model.state_dict()
    heads = class_entries(new)
    assert len(heads) == 2 * (1 + 2) + 1
    for key, behind in heads.items():
        assert torch.equal(new[key][0], fresh[key][0]), key
        assert torch.equal(new[key][1:], old[key][[3, 1, *([4] if behind else [])]]), key
    assert all(torch.equal(v, old[k]) for k, v in new.items() if k not in heads)
    assert said(lines, "2 of 3 class rows copied by name: dog, traffic_light")
    assert said(lines, "1 class rows start fresh: zebra") and not said(lines, "no-object")


def test_keeping_takes_every_head_whole_and_resetting_none(source):
    folder, old = source
    _, model = fresh_and_model(4)
    convert.init_from(model, OLD, folder, "keep")
    assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="3 labels and the source 4.*match"):
        convert.init_from(fresh_and_model()[1], NEW, folder, "keep")
    fresh, model = fresh_and_model()
    convert.init_from(model, NEW, folder, "reset")
    heads = class_entries(fresh)
    assert all(torch.equal(v, (fresh if k in heads else old)[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("num", [5, 40])
def test_queries_out_of_the_image_may_be_any_number(source, num):
    _, model = fresh_and_model(num_queries=num)
    lines = convert.init_from(model, NEW, source[0])
    assert not said(lines, "queries")
    assert model.num_queries == num


def test_learned_queries_are_copied_as_far_as_both_have_them(source, tmp_path):
    key = "decoder.tgt_embed.weight"
    learned = {"rtdetr": {"learned_queries": True}}
    old = loaded(4, OLD, seed=1, num_queries=6, **learned)
    convert.write(old, tmp_path / "old")
    fresh, model = fresh_and_model(num_queries=9, **learned)
    assert said(convert.init_from(model, NEW, tmp_path / "old"), "queries: 6 of 9 copied, the other 3 start fresh")
    assert torch.equal(model.state_dict()[key], torch.cat((old.state_dict[key], fresh[key][6:])))
    fresh, model = fresh_and_model(num_queries=9, **learned)
    assert said(convert.init_from(model, NEW, source[0]), "queries: start fresh (the source has none)")
    assert torch.equal(model.state_dict()[key], fresh[key])
    assert said(convert.init_from(fresh_and_model()[1], NEW, tmp_path / "old"), "queries: the source's left out")


@pytest.mark.parametrize("num, line", [(1, "last 1 of 2 layers left out"), (3, "last 1 of 3 layers start fresh")])
def test_decoder_layers_go_with_their_heads(source, num, line):
    folder, old = source
    fresh, model = fresh_and_model(4, num_decoder_layers=num)
    assert said(convert.init_from(model, OLD, folder, "keep"), "decoder", line)
    for key, value in model.state_dict().items():
        beyond = any(f"{part}.2." in key for part in ("decoder.layers", "dec_score_head", "dec_bbox_head"))
        assert torch.equal(value, (fresh if beyond else old)[key]), key


@pytest.mark.parametrize("num, line", [(0, "last 1 of 1 layers left out"), (2, "last 1 of 2 layers start fresh")])
def test_encoder_layers_are_copied_as_far_as_both_have_them(source, num, line):
    folder, old = source
    fresh, model = fresh_and_model(4, num_encoder_layers=num)
    assert said(convert.init_from(model, OLD, folder, "keep"), "encoder", line)
    for key, value in model.state_dict().items():
        beyond = key.startswith("encoder.encoder.0.layers.1.")
        assert torch.equal(value, (fresh if beyond else old)[key]), key


def test_denoising_may_be_switched_off_and_on(source, tmp_path):
    key, off = "decoder.denoising_class_embed.weight", {"rtdetr": {"num_denoising": 0}}
    _, model = fresh_and_model(**off)
    assert said(convert.init_from(model, NEW, source[0]), "embeddings of labels left out")
    convert.write(loaded(4, OLD, seed=1, **off), tmp_path / "old")
    fresh, model = fresh_and_model()
    assert said(convert.init_from(model, NEW, tmp_path / "old"), "embeddings of labels start fresh")
    assert torch.equal(model.state_dict()[key], fresh[key])


def test_live_normalisation_starts_from_frozen_statistics_and_back(source, tmp_path):
    folder, old = source
    _, model = fresh_and_model(live=True)
    lines = convert.init_from(model, NEW, folder)
    counters = [k for k in model.backbone.state_dict() if k.endswith("num_batches_tracked")]
    assert said(lines, f"{len(counters)} batch counters start at 0")
    key = "backbone.body.layer4.1.bn2.running_var"
    assert torch.equal(model.state_dict()[key], old[key])
    convert.write(loaded(4, OLD, live=True), tmp_path / "live")
    assert said(convert.init_from(fresh_and_model()[1], NEW, tmp_path / "live"), "batch counters left out")


def test_whole_cells_may_take_the_place_of_interpolation(source):
    """The published models with discrete sampling are trained on from those without."""
    _, model = fresh_and_model(rtdetr={"sampling": "discrete"})
    convert.init_from(model, NEW, source[0])


@pytest.mark.parametrize("changes, sentence", [
    ({"hidden_dim": 32}, "model.hidden_dim is 32, but 16 in .*set model.hidden_dim=16"),
    ({"num_heads": 4}, "model.num_heads is 4.*trained with 8"),
    ({"rtdetr": {"activation": "silu"}}, "model.rtdetr.activation is silu.*trained with relu.*activation=relu"),
    ({"rtdetr": {"mlp_activation": "silu"}}, "model.rtdetr.mlp_activation is silu.*trained with relu"),
    ({"rtdetr": DEIM | {"activation": "relu", "mlp_activation": "relu"}}, "model.rtdetr.query_pos_layers=2"),
    ({"rtdetr": {"num_points": [2, 4, 4]}}, r"model.rtdetr.num_points is \[2, 4, 4\].*\[4, 4, 4\]"),
    ({"rtdetr": {"encoder_dim": 16}}, "model.rtdetr.encoder_dim=32"),
    ({"rtdetr": {"expansion": 1.0}}, "expansion=0.5"),
    ({"dim_feedforward": 20}, "model.dim_feedforward=24"),
    ({"backbone": "resnet34d.ra2_in1k"}, "model.backbone.name=resnet18d.ra2_in1k with first_shortcut=true"),
    ({"first_shortcut": False}, "model.backbone.name=resnet18d.ra2_in1k with first_shortcut=true"),
], ids=lambda v: str(v) if isinstance(v, dict) else "")  # fmt: skip
def test_another_architecture_is_refused_in_words_and_changes_nothing(source, changes, sentence):
    before, model = fresh_and_model(**changes)
    with pytest.raises(UserError, match=sentence) as caught:
        convert.init_from(model, NEW, source[0])
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_pixels_normalised_otherwise_are_refused(source):
    _, model = fresh_and_model()
    model.mean = tuple(model.backbone.body.pretrained_cfg["mean"])
    with pytest.raises(UserError, match="model.backbone.pixels is timm, .* trained with unit"):
        convert.init_from(model, NEW, source[0])


def test_detr_and_rtdetr_do_not_start_from_each_other(source, tmp_path):
    part = recipes.Backbone(name="resnet18.tv_in1k", norm="frozen")
    sizes = {"hidden_dim": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 24}
    recipe = recipes.Recipe(data=recipes.Data(root="/data"), model=recipes.Model(backbone=part, **sizes))
    detr = models.build(recipe, 4, load_weights=False)
    with pytest.raises(UserError, match="model.name is detr, but .* holds a rtdetr.*set model.name=rtdetr"):
        convert.init_from(detr, OLD, source[0])
    weights.save(tmp_path / "detr", detr, recipes.dumps(recipe), OLD)
    with pytest.raises(UserError, match="model.name is rtdetr, but .* holds a detr"):
        convert.init_from(fresh_and_model()[1], NEW, tmp_path / "detr")


def test_a_first_shortcut_starts_as_the_identity_and_is_refused_where_there_is_one():
    without, with_one = (
        models.build(small_recipe(first_shortcut=f), 3, load_weights=False).backbone.eval() for f in (False, True)
    )
    randomise(without)
    assert with_one.load_state_dict(without.state_dict(), strict=False).unexpected_keys == []
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(with_one(images), without(images), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(UserError, match="first block of resnet50d.ra2_in1k has no plain shortcut"):
        small_model(3, backbone="resnet50d.ra2_in1k", first_shortcut=True)


def test_a_refusal_names_everything_that_differs_and_that_is_all_it_takes(tmp_path):
    """Not one key after the other, run after run."""
    old = loaded(4, OLD, seed=1, num_decoder_layers=1, rtdetr=DEIM)
    convert.write(old, tmp_path / "old")
    asked = small_recipe().model
    with pytest.raises(UserError) as refused:
        convert.init_from(fresh_and_model()[1], NEW, tmp_path / "old", asked=asked)
    settings = str(refused.value).partition("All that differs: ")[2].split()
    assert "model.num_decoder_layers=1" in settings and "model.rtdetr.query_pos_layers=3" in settings
    assert "model.rtdetr.activation=silu" in settings and not [s for s in settings if "backbone" in s]
    (tmp_path / "r.yaml").write_text(recipes.dumps(small_recipe()))
    changed = recipes.load(tmp_path / "r.yaml", settings)
    assert architecture.differing(changed.model, old.recipe.model) == []
    lines = convert.init_from(models.build(changed, 3, load_weights=False), NEW, tmp_path / "old", asked=changed.model)
    assert not said(lines, "layers start fresh")


def test_fewer_layers_than_the_source_are_a_choice_and_not_what_is_wrong(tmp_path):
    old = loaded(4, OLD, seed=1, rtdetr=DEIM)
    asked = small_recipe(num_decoder_layers=1).model
    settings = architecture.differing(asked, old.recipe.model)
    assert "model.rtdetr.activation=silu" in settings and not [s for s in settings if "layers" in s and "num_" in s]


def test_a_source_without_names_says_how_to_give_it_names(tmp_path):
    nameless = Classes(("category 0", "category 1", "category 2"), (0, 1, 2))
    convert.write(loaded(3, nameless), tmp_path / "old")
    with pytest.raises(UserError, match="the source has no names, so convert it .* names into the new classes.json"):
        convert.init_from(fresh_and_model()[1], NEW, tmp_path / "old", "keep")
    (tmp_path / "old" / "classes.json").write_text(json.dumps(NEW.to_json()))  # what the sentence says
    assert convert.init_from(fresh_and_model()[1], NEW, tmp_path / "old", "keep")


def test_layers_that_answer_without_having_learned_are_told_with_the_key(tmp_path):
    convert.write(loaded(4, OLD, seed=1, num_decoder_layers=1), tmp_path / "old")
    lines = convert.init_from(fresh_and_model()[1], NEW, tmp_path / "old")
    assert said(lines, "the last 1 of 2 layers start fresh", "model.num_decoder_layers=1 takes the source's alone")


def test_rows_of_names_that_differ_in_case_only_are_told_apart():
    names = lambda *n: Classes(n, tuple(range(len(n))))  # noqa: E731
    assert match_rows(names("car", "Car"), names("Car", "car")) == {0: 1, 1: 0}
    assert match_rows(names("CAR", "traffic_light"), names("car", "Traffic Light")) == {0: 0, 1: 1}
