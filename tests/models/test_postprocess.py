from types import SimpleNamespace

import numpy as np
import torch

from detr_accel import models
from detr_accel.models import postprocess
from detr_accel.structures import Targets


def test_detections_are_the_best_class_of_each_query_in_pixels_of_the_file():
    logits = torch.tensor([[[0.0, 2.0, 5.0], [3.0, 0.0, 0.0], [1.0, 1.5, 0.0]]])  # "no object" wins query 0: dropped
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0], [0.9, 0.9, 0.4, 0.4]]])
    (found,) = postprocess.detections({"pred_logits": logits, "pred_boxes": boxes}, [7], torch.tensor([[100, 200]]), 9)
    probability = logits.softmax(-1)[0]
    assert found.image_id == 7
    np.testing.assert_allclose(found.scores, [probability[1, 0], probability[2, 1], probability[0, 1]], rtol=1e-6)
    assert found.labels.tolist() == [0, 1, 1]
    expected = [[0, 0, 100, 100], [140, 70, 220, 110], [80, 30, 120, 70]]  # not clipped, as DETR
    np.testing.assert_allclose(found.boxes_xyxy_px, expected, rtol=1e-5, atol=1e-4)
    dtypes = found.scores.dtype, found.labels.dtype, found.boxes_xyxy_px.dtype
    assert dtypes == (np.float32, np.int64, np.float32)


def test_equal_scores_keep_the_order_of_the_queries_and_the_list_is_cut():
    logits = torch.zeros(2, 6, 4)
    logits[1, 4, 2] = 3.0
    boxes = torch.linspace(0.1, 0.9, 6)[None, :, None].expand(2, 6, 4)
    first, second = postprocess.detections(
        {"pred_logits": logits, "pred_boxes": boxes}, [0, 1], torch.tensor([[10, 10], [10, 10]]), 3
    )
    assert len(first.scores) == len(second.scores) == 3
    np.testing.assert_allclose(first.boxes_xyxy_px[:, 2:].mean(1), boxes[0, :3, 0] * 15, rtol=1e-5)
    assert second.labels[0] == 2
    np.testing.assert_allclose(second.boxes_xyxy_px[1:, 2:].mean(1), boxes[0, :2, 0] * 15, rtol=1e-5)


def test_more_detections_than_queries_may_be_asked_for():
    outputs = {"pred_logits": torch.zeros(1, 2, 3), "pred_boxes": torch.rand(1, 2, 4)}
    (found,) = postprocess.detections(outputs, [0], torch.tensor([[10, 10]]), 100)
    assert len(found.scores) == 2


def independent(logits, boxes, most):
    (found,) = postprocess.detections(
        {"pred_logits": logits, "pred_boxes": boxes}, [0], torch.tensor([[100, 200]]), most, has_background=False
    )
    return found


def test_of_independent_classes_a_query_may_say_several():
    logits = torch.tensor([[[2.0, 1.0, -9.0], [0.5, 3.0, -9.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    found = independent(logits, boxes, 4)
    np.testing.assert_allclose(found.scores, torch.tensor([3.0, 2.0, 1.0, 0.5]).sigmoid(), rtol=1e-6)
    assert found.labels.tolist() == [1, 0, 1, 0]
    expected = [[0, 0, 100, 100], [80, 30, 120, 70], [80, 30, 120, 70], [0, 0, 100, 100]]
    np.testing.assert_allclose(found.boxes_xyxy_px, expected, rtol=1e-5, atol=1e-4)
    assert len(independent(logits, boxes, 100).scores) == 6, "no more than queries times classes"


def test_equal_scores_of_independent_classes_keep_their_order_whatever_the_batch():
    """Law 5's ties: by query, then by class."""
    logits, boxes = torch.zeros(1, 50, 4), torch.rand(1, 50, 4, generator=torch.Generator().manual_seed(0))
    logits[0, 7, 2] = 1.0
    found = independent(logits, boxes, 9)
    assert found.labels.tolist() == [2, 0, 1, 2, 3, 0, 1, 2, 3]
    others = {"pred_logits": logits.expand(5, -1, -1), "pred_boxes": boxes.expand(5, -1, -1)}
    many = postprocess.detections(others, list(range(5)), torch.tensor([[100, 200]] * 5), 9, has_background=False)
    for one in many:
        np.testing.assert_array_equal(one.boxes_xyxy_px, found.boxes_xyxy_px)
        np.testing.assert_array_equal(one.labels, found.labels)


def test_an_evaluation_hears_of_as_many_as_there_are_queries():
    """The originals keep 300 of all queries and classes; COCO's limit of 100 is one of each image and class."""
    model = SimpleNamespace(num_queries=300, has_background=False)
    gen = torch.Generator().manual_seed(0)
    outputs = {"pred_logits": torch.randn(1, 300, 4, generator=gen), "pred_boxes": torch.rand(1, 300, 4, generator=gen)}
    target = Targets(1, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (8, 8), (80, 80))
    assert len(models.detections_of(model, outputs, [target], 100)[0].scores) == 300
    assert len(models.detections_of(model, outputs, [target], 500)[0].scores) == 500
