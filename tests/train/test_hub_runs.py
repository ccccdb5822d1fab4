"""Whole trainings on Hugging Face data sets: map style and streamed, stopped and resumed, evaluated."""

import io
import json
import os
import shutil
import signal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import warm
from PIL import Image
from shared import load_module

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.data.shapes import ShapesSource
from detr_accel.infer.evaluation import evaluate_checkpoint
from detr_accel.structures import UserError
from detr_accel.train import loop, replay
from detr_accel.train.loop import train

inject = load_module(Path(__file__).with_name("injecting.py"))
injected = load_module(Path(__file__).with_name("injected.py"))
SCRIPT, ROOT = Path(__file__).with_name("stream_layouts.py"), Path(__file__).parents[2]
MORE = "schedule: {epochs: 3, kind: constant}\ncheckpoint: {every_steps: 2, keep: 9}\n"


def rows(split: str, num: int):
    source = ShapesSource(1, split, num, 64)
    truth = source.ground_truth()
    for i, image in enumerate(truth["images"]):
        png = io.BytesIO()
        Image.fromarray(source.sample(i).image).save(png, "PNG")
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        objects = {
            "bbox": [a["bbox"] for a in own],
            "category": [source.classes.label_of[a["category_id"]] for a in own],
        }
        size = {name: image[name] for name in ("width", "height")}
        yield {"image": {"bytes": png.getvalue(), "path": None}, "image_id": i, "objects": objects} | size


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """22 images to train on in 4 shards, 3 to validate on."""
    folder = tmp_path_factory.mktemp("shapes")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    names = [str(n) for n in ShapesSource(1, "train", 1, 64).classes.names]
    features = datasets.Features(
        {
            "image": datasets.Image(), "image_id": datasets.Value("int64"), "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
                "category": datasets.List(datasets.ClassLabel(names=names)),
            },
        }
    )  # fmt: skip
    for split, num, shards in (("train", 22, 4), ("validation", 3, 1)):
        whole = datasets.Dataset.from_list(list(rows(split[:5].replace("valid", "val"), num)), features=features)
        for s in range(shards):
            whole.shard(shards, s, contiguous=True).to_parquet(folder / f"{split}-{s:05d}-of-{shards:05d}.parquet")
    yield folder
    patch.undo()


def keys(folder: Path, streaming: bool) -> list[str]:
    stream = f"data.hub.streaming={str(streaming).lower()}"
    return ["data.format=hub", f"data.root={folder}", stream, "data.hub.block=12"]


def recipe(name: str, folder: Path, streaming: bool, more: str = MORE, more_keys: list[str] | None = None):
    file = folder.parent / "recipe.yaml"
    file.write_text(f"{injected.TINY}name: {name}\n{more}")
    return recipes.load(file, keys(folder, streaming) + (more_keys or []))


def rows_of(run: Path, key: str, file: str = "metrics.jsonl") -> list:
    lines = [json.loads(line) for line in (run / file).read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def assert_same(run: Path, whole: Path) -> None:
    assert inject.differing(inject.weights(run), inject.weights(whole)) == []
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.law2
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_run_is_trained_stopped_resumed_and_evaluated(tmp_path, monkeypatch, shapes, streaming):
    whole = train(recipe("a", shapes, streaming), runs=tmp_path / "whole")
    assert json.loads((whole / "status.json").read_text())["state"] == "done"
    assert len(rows_of(whole, "train/loss")) == 9 and len(rows_of(whole, "val/AP")) == 3
    for stop_at in (4, 7):
        plain, done = loop._Turn.run, []

        def run(self, micro_batches, failure, plain=plain, done=done, stop_at=stop_at):
            if self.state.window == stop_at and not done:
                done.append(os.kill(os.getpid(), signal.SIGTERM))
            return plain(self, micro_batches, failure)

        with monkeypatch.context() as patch:
            patch.setattr(loop._Turn, "run", run)
            half = train(recipe("a", shapes, streaming), runs=tmp_path / f"half{stop_at}")
        assert json.loads((half / "status.json").read_text())["state"] == "resume"
        train(recipe("a", shapes, streaming), runs=tmp_path / f"half{stop_at}", resume=True)
        assert_same(half, whole)
    metrics, said = evaluate_checkpoint(whole, quiet=True)
    assert metrics.values["AP"] == pytest.approx(max(rows_of(whole, "val/AP")), abs=1e-6)
    assert any("3 images" in line and "split validation" in line for line in said)
    assert len(evaluate_checkpoint(whole, split="train", quiet=True)[0].values) > 5


@pytest.mark.law2
def test_a_stream_that_changed_is_refused_on_resume(tmp_path, shapes):
    short = "schedule: {steps: 2, kind: constant}\n"
    train(recipe("b", shapes, True, short), runs=tmp_path)
    (tmp_path / "other").mkdir()
    for file in shapes.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    first, second = (tmp_path / f"other/train-0000{i}-of-00004.parquet" for i in (0, 3))
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="the training data differ"):
        train(recipe("b", tmp_path / "other", True, short), runs=tmp_path, resume=True)
    text = MORE.replace("epochs: 3", "steps: 4, epochs: 3")
    wider = recipes.loads(recipes.dumps(recipe("b", shapes, True, text)).replace("block: 12", "block: 16"))
    with pytest.raises(UserError, match="data.hub.block: 12 -> 16 cannot change on a resume"):
        train(wider, runs=tmp_path, resume=True)


SIZES = ["data.augment.scales=[32, 48, 64, 80]", "data.augment.crop_scales=[60]", "data.augment.crop_size=[20, 50]"]


@pytest.mark.law2
def test_two_processes_train_the_same_images_of_a_stream_and_go_on_where_one_stopped(tmp_path, monkeypatch, shapes):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rest = ", kind: constant}\nevaluate: {every_epochs: 9}\n"
    short = "schedule: {steps: 6" + rest
    alone = train(recipe("alone", shapes, True, short, SIZES), runs=tmp_path)
    train(recipe("half", shapes, True, "schedule: {steps: 4" + rest, SIZES), runs=tmp_path)
    one = {"faults": [], "recipe": short, "set": [*keys(shapes, True), *SIZES]}
    workers = one | {"set": [*one["set"], "data.workers=2"]}
    poison = workers | {"name": "poison", "faults": [{"what": "image", "window": 3, "rank": 1}]}
    inject.launch(tmp_path, 2, [workers | {"name": "two"}, one | {"name": "half", "resume": True}, poison])
    wanted = rows_of(alone, "data/num_boxes")
    assert len(wanted) == 6 and len(set(wanted)) > 3
    for name in ("two", "half"):
        assert inject.outcome(tmp_path, name) is None
        assert rows_of(tmp_path / name, "data/num_boxes") == wanted
        losses = rows_of(tmp_path / name, "train/loss")
        assert losses[:4] == pytest.approx(rows_of(alone, "train/loss")[:4], rel=0.05)
        padding = rows_of(alone, "speed/padding", "speed.jsonl")
        assert rows_of(tmp_path / name, "speed/padding", "speed.jsonl") == padding and min(padding[1:]) > 0.1
    alarm = json.loads((tmp_path / "poison/alarms.jsonl").read_text().splitlines()[0])["text"]
    assert f"window 4: the predictions for image {shapes}, split train, image_id " in alarm
    assert rows_of(tmp_path / "poison", "data/num_boxes") == wanted
    assert_captured_as_trained(tmp_path / "poison", recipe("alone", shapes, True, short, SIZES), window=3, rank=1)


def assert_captured_as_trained(run: Path, recipe, window: int, rank: int) -> None:
    """On the canvas of all processes, though the one that kept it read a smaller one."""
    own, whole = (
        next(
            data.train_windows(
                recipe, data.build(recipe).train, rank=at, num_ranks=ranks, start_window=window,
                end_window=window + 1, mean=(0.5,) * 3, std=(0.2,) * 3,
            )
        )
        for at, ranks in ((rank, 2), (0, 1))
    )  # fmt: skip
    case = replay.load(run)
    assert {b.canvas_px for b in case.batches} == {whole[0].canvas_px} != {own[0].canvas_px}
    for batch in case.batches:
        for target, mask in zip(batch.targets, batch.mask, strict=True):
            h, w = target.size_px
            assert not mask[:h, :w].any() and mask[h:].all() and mask[:, w:].all()


def layouts(folder: Path, shapes: Path, processes: int) -> dict:
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["HF_DATASETS_CACHE"] = str(folder / "cache")
    out = folder / f"{processes}.pt"
    done = warm.run([str(SCRIPT), str(out), str(shapes)], env=env, processes=processes if processes > 1 else 0)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.mark.law1
def test_a_window_of_a_stream_gives_one_gradient_in_every_layout(tmp_path, shapes):
    """One process, accumulated, two processes with lanes of their own, and two that each read everything; with a short
    window, an image that is lost and canvases that differ from process to process."""
    folder = tmp_path / "shapes"
    shutil.copytree(shapes, folder)
    spoil(folder / "train-00001-of-00004.parquet")
    found = {processes: layouts(tmp_path, folder, processes) for processes in (1, 2)}
    sizes, different, lost = set(), 0, 0
    for (lanes, micro, window), (result, grads) in [*found[1].items(), *found[2].items()]:
        whole, whole_grads = found[1][lanes, 8, window]
        for name, value in whole["losses"].items():
            assert result["losses"][name] == pytest.approx(value, rel=1e-9, abs=1e-9), (lanes, micro, window, name)
        assert (result["num_images"], result["num_boxes"]) == (whole["num_images"], whole["num_boxes"])
        assert result["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-9)
        for name, grad in whole_grads.items():
            allowed = 1e-9 * grad.norm().item() + 1e-12 * whole["grad_norm"]
            assert (grad - grads[name]).norm().item() <= allowed, (lanes, micro, window, name)
        sizes.add(result["num_images"])
        different += result["canvas_px"] not in (None, result["own_px"])
        lost += result["num_lost"]
        assert result["canvas_px"] in (None, whole["own_px"])
    assert len(found[1]) == len(found[2]) == 24 and min(sizes) < 7 and different and lost
    one, other = (found[1]["auto", 8, window][1] for window in (0, 1))
    assert any((one[name] - other[name]).norm() > 1e-3 * one[name].norm() for name in one), "the comparison can fail"


def spoil(path: Path) -> None:
    """Break the pixels of a shard's second image; its size is still told."""
    table = pq.read_table(path)
    rows = table.column("image").to_pylist()
    rows[1]["bytes"] = rows[1]["bytes"][:60]
    at = table.column_names.index("image")
    pq.write_table(table.set_column(at, table.field("image"), pa.array(rows, table.field("image").type)), path)
