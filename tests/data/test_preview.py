"""The contact sheet shows what training sees: pixels, boxes and what made them; its door answers in one sentence."""

import numpy as np
import pytest
import torch
from PIL import Image

from detr_accel import cli, data
from detr_accel import recipe as recipes
from detr_accel.data.preview import _draw
from detr_accel.structures import Classes, Targets, UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE = """
data:
  format: shapes
  shapes: {num_train: 20, image_size: 64}
  augment: {scales: [64], crop: 0, mosaic: {probability: 1.0, start: 0.5}}
model: {backbone: {name: test_resnet, weights: none}}
batch: {size: 8}
schedule: {epochs: 4}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(BASE)
    return tmp_path / "r.yaml"


def test_a_box_is_drawn_around_its_object():
    pixels = torch.zeros(60, 90, 3, dtype=torch.uint8)
    pixels[20:40, 30:60] = 255
    boxes = torch.tensor([[45 / 90, 30 / 60, 30 / 90, 20 / 60]])
    targets = Targets(1, torch.tensor([0]), boxes, (60, 90), (60, 90))
    picture = np.asarray(_draw(pixels, targets, Classes(("thing",), (1,)))).astype(int)
    assert picture.shape[:2] == (240, 360), "four times as large"
    red = (picture[..., 0] > 200) & (picture[..., 1:].max(-1) < 60)
    ys, xs = np.flatnonzero(red[100:, :].any(1)) + 100, np.flatnonzero(red[100:150].any(0))
    assert (ys[-1], xs[0], xs[-1]) == (159, 120, 239), "on the last pixels of the object, at its scale"
    assert (picture[90:150, 130:230] > 250).all()


def test_the_door_writes_the_sheet_and_says_what_is_on(recipe, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert cli.main(["check-data", str(recipe), "--preview", str(out), "--images", "5"]) == 0
    assert "epoch 0 of 4, beyond DETR's policy: nothing" in capsys.readouterr().out
    plain = Image.open(out)
    assert plain.width > 4 * 360 and plain.height > 2 * 300, "four in a row, then one"
    assert cli.main(["check-data", str(recipe), "--preview", str(out), "--epoch", "2", "seed=3"]) == 0
    assert "epoch 2 of 4, beyond DETR's policy: mosaic 1" in capsys.readouterr().out


def test_it_shows_the_images_of_that_epoch(recipe):
    loaded = recipes.load(recipe)
    source = data.build(loaded).train
    sheets = [data.preview(loaded, source, epoch=e, images=4, mean=MEAN, std=STD)[0] for e in (0, 0, 1)]
    assert np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])


@pytest.mark.parametrize("epoch", [4, -1])
def test_an_epoch_that_the_training_has_not_is_refused(recipe, tmp_path, capsys, epoch):
    assert cli.main(["check-data", str(recipe), "--preview", str(tmp_path / "s.png"), "--epoch", str(epoch)]) == 2
    said = capsys.readouterr().err
    assert said == f"detr-accel: there is no epoch {epoch}: the training has the epochs 0 to 3\n"
    with pytest.raises(UserError):
        loaded = recipes.load(recipe)
        data.preview(loaded, data.build(loaded).train, epoch=epoch, mean=MEAN, std=STD)


def test_a_sheet_that_cannot_be_written_is_one_sentence(recipe, tmp_path, capsys):
    for name in ("gone/s.png", "s.nothing"):
        assert cli.main(["check-data", str(recipe), "--preview", str(tmp_path / name), "--images", "1"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"detr-accel: cannot write {tmp_path / name}: ") and said.count("\n") == 1


def test_an_image_that_cannot_be_read_has_a_blank_place_and_the_others_are_shown(recipe, monkeypatch):
    loaded = recipes.load(recipe)
    source = data.build(loaded).train
    plain = np.asarray(data.preview(loaded, source, epoch=0, images=8, mean=MEAN, std=STD)[0])
    whole = type(source).sample

    def sample(self, index, *args):
        if index % 2:
            raise UserError(f"image {index} cannot be read")
        return whole(self, index, *args)

    monkeypatch.setattr(type(source), "sample", sample)
    sheet = np.asarray(data.preview(loaded, source, epoch=0, images=8, mean=MEAN, std=STD)[0])
    gray = (sheet == 200).all(-1).mean()
    assert 0.05 < gray < 0.6 and (plain == 200).all(-1).mean() < 0.01


def test_numbers_that_cannot_be_are_refused(recipe, tmp_path, capsys):
    for flag, value in (("--images", "0"), ("--images", "-3")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["check-data", str(recipe), "--preview", str(tmp_path / "s.png"), flag, value])
        assert stop.value.code == 2 and f"{value} is not at least" in capsys.readouterr().err
