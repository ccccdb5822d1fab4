"""data.workers auto: what the first windows took settles it, on every process alike, and nothing else changes."""

import json
import multiprocessing as mp
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shared import load_module

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.data import workers
from detr_accel.monitor.sinks import Silent
from detr_accel.structures import LoaderTime
from detr_accel.train import feeder, loop, parts
from detr_accel.train.checkpoint import State
from detr_accel.train.feeder import Feeder
from detr_accel.train.launch import make_accelerator
from detr_accel.train.loop import train
from detr_accel.train.parts import Length
from detr_accel.train.run_folder import RunFolder
from detr_accel.train.validation import Validation

injected = load_module(Path(__file__).with_name("injected.py"))
EIGHT = workers.Machine("here", frozenset(range(8)), float("inf"), 2**36, 2**36)


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(workers, "machine", lambda: EIGHT)
    recipe = recipes.loads(
        "data: {format: shapes, shapes: {image_size: 64, num_train: 40}, augment: {scales: [48, 64], max_size: 96,"
        " crop: 0.0}}\nbatch: {size: 8, micro: 4}\n"
    )
    splits = data.build(recipe)
    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    bare = SimpleNamespace(mean=(0.5,) * 3, std=(0.2,) * 3)
    found = SimpleNamespace(recipe=recipe, splits=splits, accelerator=accelerator, bare=bare, length=Length(5, 10))
    parts.agree_on_room(found)
    return found


def images(windows) -> list[torch.Tensor]:
    return [torch.cat([b.images for b in w]).clone() for w in windows]


def drive(feed: Feeder, spent: LoaderTime, seconds: float) -> tuple[list[torch.Tensor], list[str]]:
    found, told = [], []
    for window in feed:
        found += images([window])
        told.append(feed.seen(spent, seconds))
    return found, told


@pytest.mark.law2
def test_whatever_is_chosen_the_windows_are_the_same_bit_for_bit(built):
    plain = built.recipe.model_copy(update={"data": built.recipe.data.model_copy(update={"workers": 0})})
    reference = images(
        data.train_windows(
            plain, built.splits.train, rank=0, num_ranks=1, start_window=0, end_window=10, mean=built.bare.mean,
            std=built.bare.std, micro=4,
        )
    )  # fmt: skip
    feed = Feeder(built, 0, 4, skipped=1, measured=3)
    assert (feed.by.workers, built.loading.workers) == (2, 2), "to begin with"
    found, told = drive(feed, LoaderTime(decode=0.8, images=8), 0.25)
    assert (feed.by.workers, built.loading.workers) == (4, 4), "1.2 x 0.8 / 0.25 = 3.84"
    assert [t is not None for t in told] == [False] * 3 + [True] + [False] * 6
    assert "1.2 x 8 images x 100.0 ms / 250 ms of a window = 4 needed" in told[3] and "\n" not in told[3]
    assert len(found) == 10 and all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
    again, _ = drive(Feeder(built, 6, 4, skipped=1, measured=1), LoaderTime(decode=0.001, images=8), 1.0)
    assert built.loading.workers == 1, "a resume may choose otherwise"
    assert all(torch.equal(a, b) for a, b in zip(again, reference[6:], strict=True))


def test_there_are_no_more_than_cores_allow(built):
    feed = Feeder(built, 0, 4, skipped=0, measured=1)
    next(feed)
    told = feed.seen(LoaderTime(decode=8.0, images=8), 0.1)
    feed.close()
    assert feed.by.workers == 4 and "8 cores and the memory leave room for 4" in told, "half of them, on a CPU"


def test_a_number_is_a_number(built):
    built.recipe = built.recipe.model_copy(update={"data": built.recipe.data.model_copy(update={"workers": 1})})
    feed = Feeder(built, 0, 4, skipped=0, measured=1)
    next(feed)
    assert feed.said == [] and feed.seen(LoaderTime(decode=8.0, images=8), 0.1) is None
    feed.close()
    assert feed.by.workers == 1


def test_all_processes_take_the_number_of_the_one_that_needs_most(built, monkeypatch):
    """Each hears what all found; the slow disk of one decides."""
    chosen = []
    fast, slow = LoaderTime(decode=0.1, images=8), LoaderTime(decode=0.8, images=8)
    for own, other in ((fast, slow), (slow, fast)):
        feed = Feeder(built, 0, 4, skipped=0, measured=1)
        next(feed)
        row = (other.per_image(), 8.0, 0.25)
        monkeypatch.setattr(feeder, "gather_object", lambda mine, row=row: [*mine, row])
        feed.seen(own, 0.25)
        monkeypatch.setattr(feeder, "gather_object", lambda mine: mine)
        feed.close()
        chosen.append(feed.by)
    assert chosen[0] == chosen[1] and chosen[0].workers == 4


def test_a_limit_lowers_what_was_asked_for_and_says_so(built, monkeypatch):
    update = {"workers": 2, "prefetch": 50, "queue_gib": 0.01}
    built.recipe = built.recipe.model_copy(update={"data": built.recipe.data.model_copy(update=update)})
    parts.agree_on_room(built)
    feed = Feeder(built, 0, 4)
    feed.close()
    (note,) = feed.said
    task = data.task_bytes(built.recipe, built.splits.train, 4, torch.device("cpu"))
    assert feed.by.workers * feed.by.prefetch * task <= 0.01 * 2**30
    assert f"data.prefetch 50 -> {feed.by.prefetch}" in note


def test_evaluation_is_fed_as_training_within_the_same_room():
    """What all processes agreed on, not what one of them sees that is pinned to a core."""
    recipe = recipes.loads(injected.TINY.replace("workers: 0", "workers: auto") + "name: probe\n")
    built = parts.build(recipe, make_accelerator("no", "cpu"), data.build(recipe), resume=False)
    built.loading = data.Loading(2, 2)
    for queue_bytes, children in ((2**30, 2), (0, 0)):
        built.room = data.workers.Room(8.0, queue_bytes, 8)
        before = len(mp.active_children())
        batches = Validation(built, None)._batches(built.splits.val)
        next(batches)
        assert len(mp.active_children()) - before == children
        batches.close()


def test_alarms_count_with_the_cores_that_all_agreed_on(monkeypatch, tmp_path):
    """Not with those that this process sees by itself: pinned to one, it would call the others' cores missing."""
    recipe = recipes.loads(injected.TINY + "name: probe\n")
    built = parts.build(recipe, make_accelerator("no", "cpu"), data.build(recipe), resume=False)
    asked = []
    monkeypatch.setattr(loop.monitor, "build_alarms", lambda *_, cores: asked.append(cores))
    monkeypatch.setattr(workers, "machine", lambda: workers.Machine("here", frozenset({0}), 1.0, 2**36, 2**36))
    for cores in (8.0, 2.5, 0.5):
        built.room = workers.Room(cores, 2**30, 8)
        loop._Turn(built, RunFolder(tmp_path / "run"), State(), Silent(), None)
    assert asked == [8, 2, 1]


@pytest.mark.parametrize(("asked", "building"), [("auto", 6), (3, 3)])
def test_a_cache_is_built_with_all_cores_of_its_builder(monkeypatch, asked, building):
    """Training processes beside it only wait, so their share of the cores is its own as well."""
    text = injected.TINY.replace("workers: 0", f"workers: {asked}\n  cache: disk") + "name: probe\n"
    recipe, found = recipes.loads(text), []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(workers, "machine", lambda: workers.Machine("here", frozenset(range(6)), 9.0, 2**36, 2**36))

    def built(source, *_, workers, **how):
        found.append(workers)
        return source, ""

    monkeypatch.setattr(data.cache, "cached", built)
    data.with_cache(recipe, data.build(recipe), quiet=True)
    assert found == [building] * 2


@pytest.mark.law2
def test_a_training_with_auto_is_the_training_without(tmp_path, capsys):
    runs = []
    for count in ("auto", "0"):
        text = injected.TINY.replace("workers: 0", f"workers: {count}")
        text = text.replace("num_train: 22", "num_train: 48") + f"name: w\n{injected.EPOCHS}"
        runs.append(train(recipes.loads(text), runs=tmp_path / count))
    said = capsys.readouterr().out
    assert "data.workers auto begins with" in said and "data.workers auto is " in said, said
    one, other = ((run / "metrics.jsonl").read_bytes() for run in runs)
    assert one == other
    rows = [json.loads(line) for line in (runs[0] / "speed.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "speed/share_forward" in row)
    shares = [value for name, value in row.items() if name.startswith("speed/share_")]
    assert sum(shares) == pytest.approx(1) and row["speed/share_backward"] > 0.05
    last = {name: value for name, value in rows[-1].items() if name.startswith("speed/share_")}
    assert last["speed/share_evaluation"] > 0 and sum(last.values()) == pytest.approx(1), "of the last evaluation"
    assert row["speed/decode_ms"] > 0 and 0 < row["speed/padding"] < 1 and row["speed/loader_busy"] > 0
