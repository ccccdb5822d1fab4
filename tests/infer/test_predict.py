"""``detr-accel predict``: what scores above the threshold is drawn and listed, with the threshold and its origin."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from detr_accel import cli
from detr_accel.infer import predict
from detr_accel.infer.detector import Detector
from detr_accel.infer.predict import DEFAULT_THRESHOLD, _above, draw
from detr_accel.structures import Classes, Detections

GREY = 120


@pytest.fixture
def photos(tmp_path):
    """Two photos of one grey, so that whatever else is in a picture was drawn."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (320 + 40 * i, 240), (GREY, GREY, GREY)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def predicted(tmp_path, photos, capsys):
    """Runs the verb and returns (rows of detections.json, printed text, folder of pictures)."""

    def run(*options: str, out: str = "found"):
        command = ["predict", str(tmp_path / "run"), str(photos), "--out", str(tmp_path / out), "--device", "cpu"]
        assert cli.main([*command, *options]) == 0
        rows = json.loads((tmp_path / out / "detections.json").read_text())
        return rows, capsys.readouterr().out, tmp_path / out

    return run


def test_the_threshold_of_the_checkpoint_is_used_and_said(make_run, predicted):
    checkpoint = make_run()
    every, _, _ = predicted("--threshold", "0", out="every")
    scores = sorted(row["score"] for row in every)
    threshold = (scores[30] + scores[90]) / 2
    meta = json.loads((checkpoint / "meta.json").read_text())
    (checkpoint / "meta.json").write_text(json.dumps(meta | {"threshold": threshold}))
    rows, said, _ = predicted()
    assert len(every) == 120 and 0 < len(rows) < 120
    assert rows == [row for row in every if row["score"] >= threshold]
    assert f"score >= {threshold:.3f} (best F1 on the checkpoint's validation set)" in said


@pytest.mark.parametrize("meta, options, words", [
    ({}, (), "0.400 (best F1 on the checkpoint's validation set)"),
    ({}, ("--decoder-layers", "1"), "validation set, measured with all 3 decoder layers)"),
    ({}, ("--decoder-layers", "3"), "0.400 (best F1 on the checkpoint's validation set)"),
    ({"metrics_window": 9}, (), "0.400 (best F1 on the checkpoint's validation set at window 9)"),
    ({"threshold": None}, (), f"{DEFAULT_THRESHOLD:.3f} (the checkpoint stores none; set it with --threshold)"),
    ({}, ("--threshold", "0.9"), "0.900 (as asked)"),
])  # fmt: skip
def test_the_threshold_says_where_it_comes_from(make_run, predicted, meta, options, words):
    make_run(**meta)
    assert words in predicted(*options)[1]


def test_weights_that_were_never_evaluated_are_called_so(make_run, predicted):
    make_run(metrics=None, metrics_window=None, threshold=None)
    _, said, _ = predicted()
    assert said.splitlines()[0].startswith("weights: ema of window 12 from ") and "never evaluated" in said


def test_fewer_decoder_layers_find_something_else(make_run, predicted):
    make_run()
    whole, first = predicted("--threshold", "0"), predicted("--threshold", "0", "--decoder-layers", "1", out="first")
    assert "decoder: 1 of 3 layers" in first[1] and "decoder:" not in whole[1]
    assert len(first[0]) == len(whole[0]) and first[0] != whole[0]


@pytest.mark.law8
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_skipped_and_named_and_the_rest_is_found(
    make_run, tmp_path, photos, capsys, workers
):
    recipe = make_run() / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("workers: 0", f"workers: {workers}"))
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    Image.fromarray(noise).save(photos / "00.jpg")  # between the two others
    (photos / "00.jpg").write_bytes((photos / "00.jpg").read_bytes()[:2000])
    (photos / "none.png").write_bytes(b"<html>")
    command = ["predict", str(tmp_path / "run"), str(photos), "--out", str(tmp_path / "out"), "--threshold", "0"]
    assert cli.main([*command, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 2 and {r["file_name"] for r in told["skipped"]} == {
        str(photos / "00.jpg"), str(photos / "none.png")
    }  # fmt: skip
    assert any("truncated" in r["reason"] for r in told["skipped"])
    assert told["notes"][-3] == "skipped 2 of 4 files:"
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {(r["image_id"], r["file_name"]) for r in rows} == {(1, str(photos / "0.png")), (3, str(photos / "1.png"))}
    assert sorted(p.name for p in (tmp_path / "out").glob("*.jpg")) == ["00001_0.jpg", "00003_1.jpg"]


def test_pictures_are_never_mixed_with_the_images(make_run, tmp_path, photos, capsys):
    make_run()
    command = ["predict", str(tmp_path / "run"), str(photos), "--out", str(photos / "../photos")]
    assert cli.main(command) == 2 and "is also a folder of images" in capsys.readouterr().err
    (photos / "0.png").rename(photos / "00001_0.jpg")
    (photos / "1.png").rename(photos / "0.png")
    command = [
        "predict",
        str(tmp_path / "run"),
        str(photos / "0.png"),
        str(photos / "00001_0.jpg"),
        "--out",
        str(photos),
    ]
    assert cli.main(command) == 2 and "would overwrite an image" in capsys.readouterr().err
    assert len(list(photos.iterdir())) == 2


@pytest.mark.parametrize("threshold", ["2", "nan", "inf", "-1"])
def test_a_threshold_that_is_no_score_is_refused(make_run, tmp_path, photos, capsys, threshold):
    make_run()
    command = ["predict", str(tmp_path / "run"), str(photos), "--out", str(tmp_path / "out")]
    assert cli.main([*command, f"--threshold={threshold}"]) == 2
    assert "give a number from 0 to 1" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file/x", "/proc/nothing/x", "blocked"])
def test_an_output_folder_that_cannot_be_written_is_one_sentence(make_run, tmp_path, photos, capsys, out):
    make_run()
    (tmp_path / "file").write_text("")
    (tmp_path / "blocked" / "detections.json").mkdir(parents=True)
    command = ["predict", str(tmp_path / "run"), str(photos), "--out", str(tmp_path / out)]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("detr-accel: cannot write ") and error.count("\n") == 1


def test_boxes_are_drawn_where_they_were_found(make_run, predicted):
    make_run()
    rows, _, out = predicted("--threshold", "0.5")
    assert sorted(p.name for p in out.glob("*.jpg")) == ["00001_0.jpg", "00002_1.jpg"] and rows
    for index, path in enumerate(sorted(out.glob("*.jpg"))):
        picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
        drawn = np.abs(picture - GREY).max(2) > 24  # JPEG alone moves a grey by less
        boxes = [row["bbox"] for row in rows if row["image_id"] == index + 1]
        for x, y, w, h in boxes:
            columns = np.clip(np.round([x, x + w]), 0, picture.shape[1] - 1).astype(int)
            lines = np.clip(np.round([y, y + h]), 0, picture.shape[0] - 1).astype(int)
            middle = drawn[lines[0] : lines[1] + 1, max(0, columns[0] - 1) : columns[0] + 2]
            assert middle.any(1).mean() > 0.9, "the left side"
        assert bool(boxes) == drawn.any()


def test_a_drawn_box_changes_its_border_and_not_its_inside():
    image = np.full((200, 300, 3), GREY, np.uint8)
    boxes = np.array([[50, 60, 250, 180], [-20, 100, 40, 400]], np.float32)  # the second reaches out of the picture
    found = Detections(1, np.array([0.9, 0.3], np.float32), np.array([0, 1]), boxes)
    picture = np.asarray(draw(image, found, Classes(("cat", "yak"), (1, 2))))
    drawn = (picture != GREY).any(2)
    for line in (drawn[60, 50:251], drawn[180, 50:251], drawn[60:181, 50], drawn[60:181, 250], drawn[100:, 40]):
        assert line.all()
    assert not drawn[64:176, 54:246].any() and (image == GREY).all()
    assert tuple(picture[180, 150]) != tuple(picture[190, 40]), "a colour belongs to a class"


def test_nothing_found_leaves_the_picture_as_it_was():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    none = Detections(1, np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
    assert (np.asarray(draw(image, none, Classes((), ()))) == image).all()


def test_a_long_name_and_a_picture_too_large_for_a_jpeg_cost_nothing(make_run, tmp_path, photos, capsys):
    make_run()
    Image.new("RGB", (40, 40)).save(photos / ("x" * 250 + ".png"))
    Image.new("RGB", (66_000, 8)).save(photos / "long.png")
    command = ["predict", str(tmp_path / "run"), str(photos), "--out", str(tmp_path / "found"), "--threshold", "0"]
    assert cli.main([*command, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "long.png, as a JPEG cannot be so large; their objects are in the list" in said and "in 4 images" in said
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert len({row["file_name"] for row in rows}) == 4
    assert len(list((tmp_path / "found").glob("*.jpg"))) == 3


def test_two_predictions_are_never_mixed(make_run, predicted, tmp_path, photos, capsys):
    make_run()
    predicted()
    before = (tmp_path / "found" / "detections.json").read_bytes()
    command = ["predict", str(tmp_path / "run"), str(photos), "--out", str(tmp_path / "found"), "--device", "cpu"]
    assert cli.main(command) == 2 and "holds a prediction already" in capsys.readouterr().err
    assert (tmp_path / "found" / "detections.json").read_bytes() == before


def test_a_prediction_that_is_stopped_leaves_the_list_of_what_it_has(make_run, photos, tmp_path, monkeypatch):
    make_run()
    plain, done = Detector.__call__, []

    def stopped(self, *args):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return plain(self, *args)

    monkeypatch.setattr(Detector, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict.predict(tmp_path / "run", [photos], out=tmp_path / "found", threshold=0, device="cpu", quiet=True)
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert {row["image_id"] for row in rows} == {1} and len(list((tmp_path / "found").glob("*.jpg"))) == 1


def test_numbers_that_are_none_are_left_out_and_said(make_run, photos, tmp_path, capsys, monkeypatch):
    make_run()
    plain = Detector.__call__

    def broken(self, *args):
        (found,) = plain(self, *args)
        found.scores[0], found.boxes_xyxy_px[1] = np.nan, np.inf
        return [found]

    monkeypatch.setattr(Detector, "__call__", broken)
    command = ["predict", str(tmp_path / "run"), str(photos), "--out", str(tmp_path / "found"), "--threshold", "0"]
    assert cli.main([*command, "--device", "cpu"]) == 1
    assert "numbers are not finite over 2 images" in capsys.readouterr().out
    text = (tmp_path / "found" / "detections.json").read_text()
    assert len(json.loads(text)) == 120 - 4 and "NaN" not in text and "Infinity" not in text


def test_what_is_not_looked_at_in_a_folder_is_counted(make_run, photos, tmp_path, capsys):
    make_run()
    (photos / "more").mkdir()
    (photos / "a.heic").write_bytes(b"x")
    (photos / "gone.jpg").symlink_to(tmp_path / "nowhere")
    command = ["predict", str(tmp_path / "run"), str(photos), "--out", str(tmp_path / "found"), "--device", "cpu"]
    assert cli.main(command) == 1
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if line.startswith("not looked at, beside the images: "))
    assert set(line.partition(": ")[2].split(", ")) == {"1 folders", "1 .heic"}
    assert "skipped 1 of 3 files" in said and "gone.jpg" in said


def test_labels_that_no_category_uses_are_not_found():
    classes = Classes((None, "cat"), (None, 7))
    found = Detections(1, np.float32([0.9, 0.8, 0.1]), np.int64([0, 1, 1]), np.zeros((3, 4), np.float32))
    assert _above(found, 0.5, classes).labels.tolist() == [1]


def test_an_image_too_large_for_the_memory_is_skipped_and_named(make_run, tmp_path, photos, capsys, monkeypatch):
    make_run()
    plain, seen = Detector.__call__, []

    def full(self, batch, most):
        seen.append(1)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, batch, most)

    monkeypatch.setattr(Detector, "__call__", full)
    command = ["predict", str(tmp_path / "run"), str(photos), "--out", str(tmp_path / "found"), "--device", "cpu"]
    assert cli.main(command) == 1
    assert "memory ran out over" in capsys.readouterr().out and len(list((tmp_path / "found").glob("*.jpg"))) == 1
