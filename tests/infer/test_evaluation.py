"""``detr-accel eval``: on the images that the run validated on, or on those that were asked for; and it says which."""

import json

import numpy as np
import pytest
import torch

from detr_accel import cli, data, models
from detr_accel import recipe as recipes
from detr_accel.data.shapes import CLASSES
from detr_accel.infer import detector
from detr_accel.infer.evaluation import evaluate_checkpoint
from detr_accel.models import weights
from detr_accel.structures import UserError


def evaluated(path, **options):
    return evaluate_checkpoint(path, device="cpu", quiet=True, **options)


def said(notes, *parts):
    return any(all(p in line for p in parts) for line in notes)


@pytest.mark.parametrize("place", ["checkpoint", "run"])
def test_images_that_came_later_do_not_change_the_split_that_is_evaluated(tmp_path, make_run, make_coco, place):
    root = make_coco(tmp_path / "mine", 10)
    checkpoint = make_run(root)
    split = data.build(detector.load(checkpoint, device="cpu").recipe).split_json
    folder = checkpoint if place == "checkpoint" else tmp_path / "run"
    (folder / "split.json").write_text(json.dumps(split))
    before, _ = evaluated(tmp_path / "run")
    make_coco(root, 20)
    after, _ = evaluated(tmp_path / "run")
    assert before.num_images == 3 and after.to_json() == before.to_json()
    rest, _ = evaluated(tmp_path / "run", split="train")
    assert rest.num_images == 7
    (folder / "split.json").unlink()
    assert evaluated(tmp_path / "run")[0].num_images == 6, "without it the seed cuts the 20 images anew"


def test_an_image_of_the_split_that_is_gone_is_named(tmp_path, make_run, make_coco):
    root = make_coco(tmp_path / "mine", 4)
    make_run(root, split={"seed": 0, "train": [1, 2], "val": [99]})
    with pytest.raises(UserError, match="no longer has image 99"):
        evaluated(tmp_path / "run")


@pytest.mark.parametrize("split", ["test", "train", ""])
def test_the_only_json_of_another_folder_is_taken(tmp_path, make_run, make_coco, split):
    make_run()
    other = make_coco(tmp_path / "other", 4, split=split)
    metrics, notes = evaluated(tmp_path / "run", data_folder=other)
    assert metrics.num_images == 4 and said(notes, "data: 4 images", str(other))


def test_a_split_of_another_folder_can_be_chosen(tmp_path, make_run, make_coco, capsys):
    make_run()
    for split, count in (("train", 5), ("valid", 4), ("test", 3)):
        make_coco(tmp_path / "other", count, split=split)
    command = ["eval", str(tmp_path / "run"), "--data", str(tmp_path / "other"), "--device", "cpu", "--json"]
    for split, count in (("train", 5), ("val", 4), ("test", 3), (None, 4)):
        assert cli.main(command + (["--split", split] if split else [])) == 0
        assert json.loads(capsys.readouterr().out)["num_images"] == count


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path, make_run, make_coco, capsys):
    make_run()
    for split in ("train", "test"):
        make_coco(tmp_path / "other", 3, split=split)
    assert cli.main(["eval", str(tmp_path / "run"), "--data", str(tmp_path / "other")]) == 2
    assert "it has: test, train; choose with --split" in capsys.readouterr().err


def test_the_test_split_of_the_runs_own_folder_can_be_evaluated(tmp_path, make_run, make_coco):
    for split, count in (("train", 5), ("valid", 4), ("test", 3)):
        make_coco(tmp_path / "mine", count, split=split)
    make_run(tmp_path / "mine")
    assert [evaluated(tmp_path / "run", split=s)[0].num_images for s in ("train", "val", "test")] == [5, 4, 3]


def test_classes_of_another_folder_are_matched_by_name(tmp_path, make_run, make_coco):
    make_run()
    same, _ = evaluated(tmp_path / "run", data_folder=make_coco(tmp_path / "same", 30))
    other = [{"id": 70 - i, "name": name.upper()} for i, name in enumerate(CLASSES.names)]
    other.append({"id": 90, "name": "yak"})
    renamed, notes = evaluated(tmp_path / "run", data_folder=make_coco(tmp_path / "other", 30, categories=other))
    one, two = (m.to_json() for m in (same, renamed))
    assert [two[name] for name in same.values] == [one[name] for name in same.values] and one["AR100"] > 0
    assert said(notes, "6 of the data set's 7 classes matched by name") and said(notes, "never found: yak")


def test_classes_without_a_common_name_are_refused_in_one_sentence(tmp_path, make_run, make_coco, capsys):
    make_run()
    other = [{"id": i + 1, "name": f"cell {i}"} for i in range(len(CLASSES))]
    make_coco(tmp_path / "other", 3, categories=other)
    assert cli.main(["eval", str(tmp_path / "run"), "--data", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the model knows circle, square" in error and "data set has cell 0" in error


def test_a_folder_that_has_moved_away_is_named_with_the_way_out(tmp_path, make_run):
    make_run(tmp_path / "gone")
    with pytest.raises(UserError, match="there is no folder .*gone.*give data.root=FOLDER; for another .*--data"):
        evaluated(tmp_path / "run")


def test_the_precision_of_the_figures_is_said(tmp_path, make_run, make_coco):
    root = make_coco(tmp_path / "mine", 6)
    make_run(root, "precision: bf16\n")
    _, notes = evaluated(tmp_path / "run")
    assert notes[-1] == "evaluated in float32; the run took its own figures in bf16, as --precision bf16 does"
    _, notes = evaluated(tmp_path / "run", precision="bf16")
    assert notes[-1] == "evaluated in bf16"


def test_bf16_evaluates_as_the_training_does(tmp_path, make_run, make_coco):
    root = make_coco(tmp_path / "mine", 6)
    make_run(root)
    ours = detector.load(tmp_path / "run", device="cpu", precision="bf16")
    plain = detector.load(tmp_path / "run", device="cpu")
    source = data.eval_source(ours.recipe, root, None)
    (batch, *_) = data.eval_batches(ours.recipe, source, rank=0, num_ranks=1, mean=ours.model.mean, std=ours.model.std)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = plain.model(batch.images, batch.mask)["pred_logits"].float().softmax(-1)[..., :-1].amax(-1)
    for found, scores, other in zip(ours(batch), expected, plain(batch), strict=True):
        assert np.array_equal(found.scores, scores.sort(descending=True).values.numpy())
        assert not np.array_equal(found.scores, other.scores)


def test_fp16_on_a_cpu_is_refused(tmp_path, make_run, capsys):
    make_run()
    assert cli.main(["eval", str(tmp_path / "run"), "--device", "cpu", "--precision", "fp16"]) == 2
    assert "--precision fp16 does nothing on a CPU" in capsys.readouterr().err


def test_weights_are_told_with_the_window_of_their_value(tmp_path, make_run, make_coco, capsys):
    make_run(make_coco(tmp_path / "mine", 6), window=40, metrics_window=30)
    assert cli.main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("weights: ema of window 40 from ")
    assert first.endswith("checkpoints/best, last evaluated at window 30: AP 0.2500 on its validation set")


def test_fewer_decoder_layers_give_that_layers_answer(tmp_path, make_run, make_coco):
    root = make_coco(tmp_path / "mine", 6)
    make_run(root)
    whole, first = (detector.load(tmp_path / "run", device="cpu", decoder_layers=n) for n in (None, 1))
    source = data.eval_source(whole.recipe, root, None)
    (batch, *_) = data.eval_batches(
        whole.recipe, source, rank=0, num_ranks=1, mean=whole.model.mean, std=whole.model.std
    )
    with torch.inference_mode():
        expected = whole.model(batch.images, batch.mask)["aux_outputs"][0]
        found = first.model(batch.images, batch.mask)
    assert all(torch.equal(found[key], expected[key]) for key in ("pred_logits", "pred_boxes"))
    assert "decoder: 1 of 3 layers" in first.notes and first.cut_from == 3


def test_a_data_set_that_has_moved_keeps_the_runs_own_split(tmp_path, make_run, make_coco):
    root = make_coco(tmp_path / "mine", 10)
    checkpoint = make_run(root)
    split = data.build(detector.load(checkpoint, device="cpu").recipe).split_json
    (checkpoint / "split.json").write_text(json.dumps(split))
    before, _ = evaluated(checkpoint)
    root.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="give data.root=FOLDER, which keeps the run's own split; for another .*--data"):
        evaluated(checkpoint)
    after, _ = evaluated(checkpoint, overrides=[f"data.root={tmp_path / 'moved'}", "evaluate.batch=1"])
    assert after.num_images == 3 and after.to_json()["AP"] == before.to_json()["AP"]
    whole, notes = evaluated(checkpoint, data_folder=tmp_path / "moved")
    assert whole.num_images == 10 and said(notes, "beware: 7 of 10 images", "data.root=")
    with pytest.raises(UserError, match="takes keys of data and evaluate"):
        evaluated(checkpoint, overrides=["model.dropout=0"])


def test_what_an_evaluation_found_is_written_with_the_data_sets_own_ids(tmp_path, make_run, make_coco, capsys):
    """pycocotools reads the file against the annotations, and comes to the same AP."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    root = make_coco(tmp_path / "mine", 4, split="val")
    make_run()
    command = ["eval", str(tmp_path / "run"), "--data", str(root), "--device", "cpu", "--json"]
    assert cli.main([*command, "--detections", str(tmp_path / "first.json")]) == 0
    labels, rows = root / "val" / "_annotations.coco.json", json.loads((tmp_path / "first.json").read_text())
    boxes = [{**row, "id": i, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]} for i, row in enumerate(rows, 1)]
    labels.write_text(json.dumps(json.loads(labels.read_text()) | {"annotations": boxes[::3]}))  # some are right
    capsys.readouterr()
    assert cli.main([*command, "--detections", str(tmp_path / "out" / "found.json")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert any("detections in COCO's result format" in line for line in told["notes"])
    truth = COCO(str(labels))
    theirs = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / "found.json")), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert theirs.stats[8] == pytest.approx(told["AR100"], abs=1e-6) and told["AR100"] > 0
    assert theirs.stats[0] == pytest.approx(told["AP"], abs=1e-4)
    capsys.readouterr()
    assert cli.main([*command, "--detections", str(tmp_path / "out" / "found.json")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_memory_that_runs_out_in_an_evaluation_is_one_sentence(tmp_path, make_run, make_coco, monkeypatch):
    checkpoint = make_run(make_coco(tmp_path / "mine", 10))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(detector.Detector, "__call__", full)
    with pytest.raises(UserError, match="evaluation ran out of memory: set evaluate.batch below"):
        evaluated(checkpoint)


RTDETR = """
name: small
data: {{format: coco, root: "{root}", square: true, eval_size: 64, workers: 0, val_fraction: 0.5}}
model:
  name: rtdetr
  backbone: {{name: test_efficientnet, weights: none}}
  hidden_dim: 16
  num_heads: 4
  num_decoder_layers: 1
  dim_feedforward: 16
  num_queries: 12
  rtdetr: {{encoder_dim: 16, encoder_feedforward: 16, num_blocks: 1, learned_queries: {learned}}}
"""


@pytest.mark.parametrize("learned", [False, True])
def test_an_rtdetr_is_asked_for_as_many_objects_as_one_likes_unless_its_queries_are_learned(
    tmp_path, make_coco, learned
):
    recipe = recipes.loads(RTDETR.format(root=make_coco(tmp_path / "mine", 6), learned=str(learned).lower()))
    model = models.build(recipe, len(CLASSES))
    weights.save(tmp_path / "one", model.state_dict(), recipes.dumps(recipe), CLASSES, {"weights": "raw"}, None)
    few, _ = evaluated(tmp_path / "one", overrides=["evaluate.max_detections=500"])
    assert few.num_detections == 3 * 12 * len(CLASSES)
    asked = ["model.num_queries=60", "model.rtdetr.sampling=discrete", "evaluate.max_detections=500"]
    if learned:
        with pytest.raises(UserError, match="model.num_queries=60: the 12 queries of this RT-DETR are weights"):
            evaluated(tmp_path / "one", overrides=asked)
        asked = asked[1:]
    many, notes = evaluated(tmp_path / "one", overrides=asked)
    assert many.num_detections == few.num_detections * (1 if learned else 5)
    assert said(notes, "model.num_queries: 60, where the checkpoint's recipe has 12") is not learned
    assert said(notes, "model.rtdetr.sampling: discrete, where the checkpoint's recipe has bilinear")


def test_there_are_no_more_queries_than_cells_and_what_cannot_be_found_counts_from_those(tmp_path, make_coco):
    """Squares of 64 pixels have 8 * 8 + 4 * 4 + 2 * 2 = 84 cells, of 32 pixels 21."""
    recipe = recipes.loads(RTDETR.format(root=make_coco(tmp_path / "mine", 6), learned="false"))
    recipe = recipes.changed(recipe, ["model.num_queries=84"])
    model = models.build(recipe, len(CLASSES))
    weights.save(tmp_path / "one", model.state_dict(), recipes.dumps(recipe), CLASSES, {"weights": "raw"}, None)
    with pytest.raises(UserError, match="squares of 64 pixels have only 84 cells .* at most model.num_queries=84"):
        evaluated(tmp_path / "one", overrides=["model.num_queries=85"])
    whole, notes = evaluated(tmp_path / "one", overrides=["evaluate.max_detections=500"])
    assert whole.num_queries == 84 and not said(notes, "queries: ")
    small, notes = evaluated(tmp_path / "one", overrides=["evaluate.max_detections=500", "data.eval_size=32"])
    assert small.num_queries == 21 and said(notes, "queries: 21 of 84, as squares of 32 pixels have no more cells")
    assert small.num_detections == 3 * 21 * len(CLASSES)
    discrete = ["evaluate.max_detections=500", "data.eval_size=32", "model.rtdetr.sampling=discrete"]
    assert evaluated(tmp_path / "one", overrides=discrete)[0].num_queries == 21, "nobody asked for more of them"
    with pytest.raises(UserError, match="model.num_querys=9: did you mean model.num_queries"):
        evaluated(tmp_path / "one", overrides=["model.num_querys=9"])


def test_what_belongs_to_a_detrs_weights_cannot_be_set(tmp_path, make_run, make_coco):
    run = make_run(make_coco(tmp_path / "mine", 6))
    with pytest.raises(UserError, match="model.num_queries=70: a DETR's 60 queries are weights"):
        evaluated(run, overrides=["model.num_queries=70"])
    with pytest.raises(UserError, match="model.rtdetr.sampling=discrete: a DETR samples nothing"):
        evaluated(run, overrides=["model.rtdetr.sampling=discrete"])
    with pytest.raises(UserError, match="model.hidden_dim=8: only model.num_queries and .* of an RT-DETR"):
        detector.load(run, overrides=["model.hidden_dim=8"])
