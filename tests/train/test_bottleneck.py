"""``detr-accel doctor RECIPE``: five planted bottlenecks, each named right, and a training that nothing holds up."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared import load_module

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.cli import main
from detr_accel.data import decode, workers
from detr_accel.data.shapes import ShapesSource
from detr_accel.data.workers import Loading
from detr_accel.models import matcher
from detr_accel.structures import ImageCost, LoaderTime
from detr_accel.train import bottleneck

injected = load_module(Path(__file__).with_name("injected.py"))
TINY = injected.TINY.replace("workers: 0", "workers: 1\n  prefetch: 2") + "name: b\nschedule: {epochs: 500}\n"
RARELY = "evaluate: {every_epochs: 100}\n"
FREE = ImageCost(1e-4, 1e-3, 1e-3, 1.0)


def folder_of(root: Path, size: tuple[int, int], number: int = 24) -> Path:
    """A COCO folder of smooth JPEGs."""
    (root / "annotations").mkdir(parents=True)
    truth = ShapesSource(1, "train", number, 64).ground_truth()
    for record in truth["images"]:
        record |= {"file_name": f"{record['id']}.jpg", "height": size[0], "width": size[1]}
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)
    for split in ("train", "val"):
        (root / split).mkdir()
        for record in truth["images"]:
            picture.save(root / split / record["file_name"], quality=95)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))
    return root


def look(more: str = RARELY, text: str = TINY, seconds: float = 2.0) -> bottleneck.Findings:
    return bottleneck.look(recipes.loads(text + more), seconds)


def on_files(root: Path) -> str:
    return TINY.replace("format: shapes", f"root: {root}")


def test_a_slow_disk(tmp_path, monkeypatch):
    plain = decode.read_bytes

    def slow(path):
        time.sleep(0.08)
        return plain(path)

    monkeypatch.setattr(decode, "read_bytes", slow)
    found = look(text=on_files(folder_of(tmp_path / "set", (64, 80))))
    assert found.verdict.name == "disk", found.table()
    assert found.image.read > 0.07 and "data.cache" in found.verdict.text


@pytest.mark.slow
def test_what_the_first_windows_took_counts_no_more_than_their_waiting(tmp_path, monkeypatch):
    """Such as the first rows of a stream far away: else a start would be blamed for the waiting of all that follows."""
    plain, slow_ones = decode.read_bytes, iter(range(4))

    def slow_at_first(path):
        if next(slow_ones, None) is not None:
            time.sleep(0.8)
        return plain(path)

    monkeypatch.setattr(decode, "read_bytes", slow_at_first)
    found = look(text=on_files(folder_of(tmp_path / "set", (64, 80))))
    assert 0 < found.image.read < 5e-3, found.table()


def test_huge_jpegs(tmp_path):
    text = on_files(folder_of(tmp_path / "set", (2400, 3200), 8)).replace("prefetch: 2", "prefetch: 1")
    found = look(text=text)
    assert found.verdict.name == "decoding", found.table()
    assert found.verdict.changes == {"data.cache": "disk"} and found.image.excess > 20


def test_one_worker(monkeypatch):
    monkeypatch.setattr(workers, "_quota", lambda: 8.0)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(8)))
    plain = ShapesSource.sample

    def slow(self, *args):
        until = time.perf_counter() + 0.1
        while time.perf_counter() < until:
            pass
        return plain(self, *args)

    monkeypatch.setattr(ShapesSource, "sample", slow)
    found = look()
    assert found.verdict.name == "workers", found.table()
    assert found.verdict.changes["data.workers"] > 1


def test_slow_matching(monkeypatch):
    plain = matcher.assign

    def slow(*args):
        time.sleep(0.15)
        return plain(*args)

    monkeypatch.setattr(matcher, "assign", slow)
    found = look()
    assert found.verdict.name == "matching", found.table()
    assert found.seconds["matcher"] > 3 * 0.15, "three or four micro-batches a window"


def test_slow_evaluation():
    found = look("evaluate: {every_epochs: 0.3, batch: 1}\n", text=TINY.replace("num_val: 3", "num_val: 400"))
    assert found.verdict.name == "evaluation", found.table()
    assert found.verdict.changes["evaluate.every_epochs"] >= 1


def test_nothing_holds_up_a_training_that_computes(capsys):
    heavy = TINY.replace("image_size: 64", "image_size: 160").replace("scales: [64]", "scales: [160]")
    found = look(text=heavy)
    assert found.verdict.name == "computing", found.table()
    assert {"wait", "forward", "matcher", "backward", "optimizer", "evaluation"} <= found.seconds.keys()
    assert all(value > 0 for name, value in found.seconds.items() if name != "copy")


@pytest.mark.parametrize(
    ("seconds", "cost", "workers", "cores", "name"),
    [
        ({"wait": 0.05, "forward": 1.0}, FREE, 1, 8, "computing"),
        ({"wait": 0.8, "forward": 1.0}, ImageCost(0.2, 0.01, 0.01, 1.0), 4, 8, "disk"),
        ({"wait": 0.8, "forward": 1.0}, ImageCost(0.0, 0.2, 0.01, 9.0), 1, 8, "decoding"),
        ({"wait": 0.8, "forward": 1.0}, ImageCost(0.0, 0.2, 0.01, 1.0), 1, 8, "workers"),
        ({"wait": 0.8, "forward": 1.0}, ImageCost(0.0, 0.4, 0.01, 1.0), 2, 2, "decoding"),
        ({"wait": 0.8, "forward": 1.0}, ImageCost(0.0, 0.01, 0.4, 1.0), 2, 2, "pixels"),
        ({"wait": 0.8, "forward": 1.0}, ImageCost(0.0, 0.2, 0.01, 1.0), 8, 8, "workers"),
        ({"wait": 0.3, "forward": 1.0, "matcher": 0.9}, FREE, 1, 8, "matching"),
        ({"evaluation": 3.0, "forward": 1.0}, FREE, 1, 8, "evaluation"),
    ],
)
def test_the_greatest_share_that_can_be_saved_is_named(seconds, cost, workers, cores, name):
    seconds = dict.fromkeys(bottleneck.SECTIONS, 0.0) | seconds
    verdict = bottleneck.judge(recipes.loads(TINY), seconds, cost, Loading(workers, 2), cores, 8.0)
    assert verdict.name == name
    for key in verdict.changes:
        assert key in recipes._known() and key in verdict.text


@pytest.mark.parametrize(("ready", "proposed"), [(1, 4), (2, 4), (4, 8), (8, 16), (9, None), (16, None)])
def test_more_prefetch_is_proposed_where_it_is_more(ready, proposed):
    seconds = dict.fromkeys(bottleneck.SECTIONS, 0.0) | {"wait": 0.8, "forward": 1.0}
    cost = ImageCost(0.0, 0.2, 0.01, 1.0)
    verdict = bottleneck.judge(recipes.loads(TINY), seconds, cost, Loading(8, ready), 8, 8.0)
    assert verdict.changes == ({} if proposed is None else {"data.prefetch": proposed})
    assert f"data.prefetch={proposed}" in verdict.text if proposed else f"{ready} micro-batches" in verdict.text


def test_loader_processes_are_proposed_for_the_cores_that_training_has(monkeypatch):
    """The room that training agreed on decides, not what is seen when the verdict is made."""
    eight = workers.Machine("here", frozenset(range(8)), float("inf"), 2**36, 2**36)
    agree, told = bottleneck.parts.agree_on_room, []

    def agreed(built):
        monkeypatch.setattr(workers, "machine", lambda: eight)
        agree(built)
        monkeypatch.setattr(workers, "machine", lambda: replace(eight, cpus=frozenset({0})))

    def trained(built, *_):
        built.loading = Loading(1, 2)
        return {"wait": 1.0, "forward": 1.0}, 1, 8.0, LoaderTime(decode=8.0, images=8), ""

    judged = bottleneck.judge
    monkeypatch.setattr(bottleneck.parts, "agree_on_room", agreed)
    monkeypatch.setattr(bottleneck, "_train", trained)
    monkeypatch.setattr(bottleneck, "_evaluation", lambda *_: 0.0)
    monkeypatch.setattr(bottleneck, "judge", lambda *args: told.append(args[4]) or judged(*args))
    verdict = look().verdict
    assert told == [8] and verdict.changes == {"data.workers": 8}, "1.2 x 8 images, 8 cores"


@pytest.mark.parametrize(("cost", "number"), [(0.01, 2), (0.2, 1)])
@pytest.mark.parametrize(("memory", "queue_gib"), [(2**36, 2.0), (2**36, 0.001), (2**21, 2.0)])
def test_what_is_proposed_changes_the_loader(monkeypatch, cost, number, memory, queue_gib):
    """A change that data.queue_gib or the memory would cut back to what there is comes with room, or not at all."""
    here = workers.Machine("here", frozenset(range(8)), float("inf"), memory, memory)
    monkeypatch.setattr(workers, "machine", lambda: here)
    monkeypatch.setattr(workers, "_PROCESS_BYTES", 1)
    text = TINY.replace("workers: 1", f"workers: {number}\n  queue_gib: {queue_gib}").replace("fetch: 2", "fetch: 8")
    recipe = recipes.loads(text.replace("micro: 2", "micro: 8"))
    settled = []

    def settle(built):
        source = built.splits.train
        return data.loading(built.recipe, source, micro=8, num_ranks=1, device="cpu", room=built.room)[0]

    def trained(built, *_):
        built.loading = settle(built)
        settled.append(built)
        return {"wait": 1.0, "forward": 1.0}, 1, 8.0, LoaderTime(decode=8 * cost, images=8), ""

    monkeypatch.setattr(bottleneck, "_train", trained)
    monkeypatch.setattr(bottleneck, "_evaluation", lambda *_: 0.0)
    verdict = bottleneck.look(recipe, 1.0).verdict
    (built,) = settled
    assert verdict.name == "workers"
    if not verdict.changes:
        assert memory == 2**21 and "/dev/shm" in verdict.text
        return
    for key, value in verdict.changes.items():
        assert f"{key}={value:g}" in verdict.text
    update = {key.removeprefix("data."): value for key, value in verdict.changes.items()}
    built.recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})
    bottleneck.parts.agree_on_room(built)
    assert settle(built) != built.loading, verdict.text


def test_the_command_tries_the_change_and_shows_before_and_after(tmp_path, monkeypatch, capsys):
    plain = decode.read_bytes

    def slow(path):
        time.sleep(0.05)
        return plain(path)

    monkeypatch.setattr(decode, "read_bytes", slow)
    file = tmp_path / "r.yaml"
    file.write_text(on_files(folder_of(tmp_path / "set", (64, 80))) + RARELY)
    assert main(["doctor", str(file), "--seconds", "1.5", "--apply"]) == 0
    said, err = capsys.readouterr()
    assert "GiB (data.cache=ram) are first built in memory" in err and "given back at the end" in err
    assert said.count("verdict: ") == 2 and 'with data.cache="ram": ' in said
    gain = float(said.rsplit("(", 1)[1].partition("x")[0])
    assert gain > 1.1


def test_keys_without_a_recipe_are_refused(capsys):
    assert main(["doctor", "optim.lr=1"]) == 2
    assert "doctor RECIPE" in capsys.readouterr().err


def test_windows_without_an_image_that_can_be_read_are_looked_at_as_training_does(tmp_path):
    root = folder_of(tmp_path / "set", (64, 80), 24)
    for number in range(0, 24, 3):
        (root / "train" / f"{number}.jpg").write_bytes(b"no jpeg")
    text = on_files(root).replace("batch: {size: 8, micro: 2}", "batch: {size: 2, micro: 1}")
    found = look(text=text.replace("{epochs: 500}", "{epochs: 2}"), seconds=600.0)
    assert found.windows == 2 * 24 // 2 - bottleneck.WARM_WINDOWS, "to the end, whatever the clock says"
