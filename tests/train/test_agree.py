"""Doing something on every process, and the panel's pictures: what needs no second process to be seen."""

import numpy as np
import pytest

from detr_accel.structures import Detections, Sample, UserError
from detr_accel.train import agree, validation


class Alone:
    """Not the first process of its node."""

    is_local_main_process = False

    def __init__(self):
        self.waited = 0

    def wait_for_everyone(self) -> None:
        self.waited += 1


@pytest.mark.parametrize("at_once", [False, True])
def test_what_waits_for_others_by_itself_waits_in_no_exchange(monkeypatch, at_once):
    """A cache takes hours to build, and an exchange between processes 30 minutes at most."""
    monkeypatch.setattr(agree, "gather_object", lambda said: said)
    accelerator, order = Alone(), []
    found = agree.everywhere(accelerator, lambda: order.append(accelerator.waited) or 5, at_once=at_once)
    assert found == 5 and order == [0 if at_once else 1] and accelerator.waited == (not at_once)
    with pytest.raises(UserError, match="no room"):
        agree.everywhere(accelerator, _refuse, at_once=at_once)


def _refuse() -> None:
    raise UserError("no room")


def test_a_cached_picture_of_the_panel_has_its_boxes_where_they_belong():
    """The cache keeps it smaller than the file, whose pixels boxes and detections are in."""

    class Cached:
        def size_px(self, index):
            return 200, 400

        def image_id(self, index):
            return 7

        def sample(self, index):
            image, boxes = np.zeros((100, 100, 3), np.uint8), np.float32([[40, 20, 80, 60]])
            return Sample(image, 7, boxes, np.int64([0]))

    panel = validation.Validation.__new__(validation.Validation)
    panel.panel, panel.source = [0], Cached()
    found = Detections(7, np.float32([0.9]), np.int64([0]), np.float32([[400, 200, 0, 0]]))
    ((_, truth, _, seen, _),) = panel._pictures({7: found})
    assert truth.tolist() == [[10, 10, 20, 30]] and seen.boxes_xyxy_px.tolist() == [[100, 100, 0, 0]]
