"""More than a hundred, and more than three hundred objects in an image: nothing is lost without a word."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import load_module

from detr_accel import data, evaluate, models
from detr_accel import recipe as recipes
from detr_accel.monitor.alarms import OUT_OF_REACH, About, Alarms, Memory
from detr_accel.structures import Batch, Targets, UserError
from detr_accel.train import dry_step, parts, rehearsal, rehearsal_data
from detr_accel.train.launch import make_accelerator
from detr_accel.train.window import forward

histories = load_module(Path(__file__).parents[1] / "monitor" / "test_alarms.py")

TEXT = """
name: crowded
data: {format: shapes}
model:
  name: rtdetr
  backbone: {name: test_efficientnet, weights: none}
  hidden_dim: 16
  num_heads: 4
  num_decoder_layers: 2
  dim_feedforward: 16
  num_queries: QUERIES
  rtdetr: {encoder_dim: 16, encoder_feedforward: 16, num_blocks: 1, expansion: 0.5}
evaluate: {max_detections: QUERIES}
"""
MANY = 400


def crowd(num: int) -> Targets:
    """Squares in rows over the whole image."""
    side = int(np.ceil(np.sqrt(num)))
    place = torch.arange(num)
    centre = torch.stack(((place % side + 0.5) / side, (place // side + 0.5) / side), -1)
    boxes = torch.cat((centre, torch.full((num, 2), 0.8 / side)), -1)
    return Targets(1, place % 3, boxes, (192, 192), (192, 192))


def build(queries: int):
    recipe = recipes.loads(TEXT.replace("QUERIES", str(queries)))
    torch.manual_seed(0)
    return recipe, models.build(recipe, 3), models.build_criterion(recipe, 3)


@pytest.mark.parametrize("sizes", ["augment: {scales: [320, 64]}, eval_size: 320", "eval_size: 64"])
def test_more_queries_than_the_smallest_square_has_cells_end_no_training_half_way(sizes):
    """64 + 16 + 4 cells: refused before the first window, and by the plan, instead of when a window draws 64."""
    text = TEXT.replace("{format: shapes}", f"{{format: shapes, square: true, {sizes}}}")
    recipe = recipes.loads(text.replace("QUERIES", "85"))
    splits = data.build(recipe)
    refused = "num_queries is 85, but squares of 64 pixels have only 84 cells"
    with pytest.raises(UserError, match=refused):
        parts.build(recipe, make_accelerator("no", "cpu"), splits, resume=False)
    with pytest.raises(UserError, match=refused):
        dry_step.run(recipe, data.demands(recipe, splits), 1, dry_step.Layout(1, True, "no"))
    enough = recipes.loads(text.replace("QUERIES", "84"))
    assert parts.build(enough, make_accelerator("no", "cpu"), splits, resume=False).bare.num_queries == 84


@pytest.mark.parametrize("queries, matched", [(500, MANY), (300, 300)])
def test_a_window_with_an_image_of_400_boxes_trains(queries, matched):
    recipe, model, criterion = build(queries)
    few = Targets(2, torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]), (192, 192), (192, 192))
    targets = [crowd(MANY), few]
    batch = Batch(torch.randn(2, 3, 192, 192), torch.zeros(2, 192, 192, dtype=torch.bool), targets, (0, 1))
    count = criterion.count(targets)
    assert count.tolist() == [MANY + 1, matched + 1, 2]
    denoising = criterion.disturb(batch, MANY, seed=0)
    assert denoising.size.num_groups == 1 and denoising.labels.shape == (2, 2 * MANY)
    outputs, denoising = forward(model.train(), batch, denoising)
    result = criterion(outputs, targets, criterion.normalisers(count), denoising)
    result.total.backward()
    assert result.total.isfinite() and not result.bad_image.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert len(models.detections_of(model, outputs, targets, recipe.evaluate.max_detections)[0].scores) == queries


@pytest.mark.parametrize("most", [100, 300, MANY])
def test_as_many_detections_are_told_as_the_recipe_allows(most):
    """Queries that answer with the truth: AP is 1 where all may be told, and the rest is told in words where not."""
    target = crowd(MANY)
    target.labels.zero_()  # COCO's limit is one of each image and class
    logits = torch.full((1, 500, 3), -9.0)
    logits[0, :MANY] = logits[0, :MANY].scatter(1, target.labels[:, None], 4.0)
    boxes = torch.full((1, 500, 4), 0.5)
    boxes[0, :MANY] = target.boxes_cxcywh
    (found,) = models.detections(
        {"pred_logits": logits, "pred_boxes": boxes}, [1], torch.tensor([[192, 192]]), most, has_background=False
    )
    assert len(found.scores) == most and (np.diff(found.scores) <= 0).all()
    xywh = (target.boxes_cxcywh[:, :2] - target.boxes_cxcywh[:, 2:] / 2) * 192
    truth = {
        "images": [{"id": 1, "width": 192, "height": 192}], "categories": [{"id": c, "name": str(c)} for c in range(3)],
        "annotations": [
            {
                "id": i + 1, "image_id": 1, "category_id": int(target.labels[i]), "iscrowd": 0,
                "bbox": [*xywh[i].tolist(), *(target.boxes_cxcywh[i, 2:] * 192).tolist()],
                "area": float((target.boxes_cxcywh[i, 2:] * 192).prod()),
            }
            for i in range(MANY)
        ],
    }  # fmt: skip
    metrics = evaluate.score(truth, [found], {c: c for c in range(3)}, max_detections=most)
    assert metrics.values["AR100"] == pytest.approx(most / MANY, abs=0.01)
    assert metrics.out_of_reach == MANY - most


def test_boxes_without_a_query_raise_an_alarm_and_enough_queries_none():
    crowded = {"facts": {"unmatched_boxes": 100}, "num_boxes": 400}
    rows = histories.run(60, lambda w: crowded)

    def told(stats) -> list[str]:
        alarms = Alarms(About(num_queries=300), Memory())
        return [a.text for s in stats for a in alarms.judge(s)]

    (text,) = told(rows)
    assert "found no query" in text and "raise model.num_queries" in text and "300" in text
    assert told(histories.run(60, lambda w: {"num_boxes": 400})) == []


def test_a_rehearsal_says_what_queries_and_detections_cannot_hold():
    class Crowd:
        def most_boxes(self) -> int:
            return MANY

        def ground_truth(self) -> dict:
            rows = [{"image_id": 1, "category_id": 1 + (i >= 350), "iscrowd": 0} for i in range(MANY)]
            return {"annotations": rows}

    recipe, *_ = build(300)
    training, validation, crowded = (f.text for f in rehearsal_data._queries(recipe, Crowd(), Crowd()))
    assert "100 validation boxes are beyond model.num_queries (300) in their image" in crowded
    assert "400 boxes and model.num_queries is 300" in training
    assert "50 validation boxes are beyond evaluate.max_detections (300) of a class in their image" in validation
    assert rehearsal_data._queries(build(500)[0], Crowd(), Crowd()) == []


def test_a_rehearsal_says_it_once(tmp_path):
    """Its short run sees fewer images, so that the alarm there would give another count of the same."""
    rows = [{"title": OUT_OF_REACH, "text": "9 boxes"}, {"title": "Diverged", "text": "loss 9"}]
    (tmp_path / "alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rehearsal._alarms(tmp_path) == ["Diverged: loss 9"]
