"""The json files of a run: deterministic rows apart from the clock, whole after any kill."""

import io
import json
import resource
from pathlib import Path

import pytest
from shared import load_module

from detr_accel.monitor.console import Console
from detr_accel.monitor.jsonl import JsonLines, read
from detr_accel.monitor.sinks import Silent, Sinks, _Sent
from detr_accel.monitor.timing import Eta

small_run = load_module(Path(__file__).with_name("small_run.py"))


def make(folder: Path, start: int = 0, best: tuple[float, int] | None = None) -> tuple[Sinks, io.StringIO]:
    stream = io.StringIO()
    eta = Eta(30, 15, start_window=start, num_evaluations=2, num_checkpoints=0)
    console = Console(30, 15, start, stream)
    return Sinks(folder, console, eta, None, name="small", start_window=start, best=best), stream


def go(folder: Path, start: int, end: int, *, close: bool = True, best: tuple[float, int] | None = None) -> str:
    sinks, stream = make(folder, start, best)
    for window in range(start + 1, end + 1):
        sinks.tick(small_run.stats(window))
        if window % 5 == 0:
            sinks.log(small_run.stats(window))
        if window % 15 == 0:
            with sinks.timed("evaluation"):
                metrics, _ = small_run.score(0.8 if window == 15 else 0.4)
            sinks.evaluation(metrics, window=window, step=window - 1, epoch=window / 15, weights="raw")
    if close:
        sinks.close()
    return stream.getvalue()


@pytest.mark.law2
@pytest.mark.parametrize("killed_at", [14, 17, 22, 30])
def test_metrics_of_a_killed_and_resumed_run_are_those_of_the_run_never_killed(tmp_path, killed_at):
    go(tmp_path / "whole", 0, 30)
    go(tmp_path / "killed", 0, killed_at, close=False)
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"window": 31, "train/lo')  # a kill in the middle of a row
    start = 15 if killed_at >= 15 else 10  # the last checkpoint
    go(tmp_path / "killed", start, 30)
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    assert len(whole.splitlines()) == 8


def test_alarms_of_a_run_that_begins_anew_are_its_own(tmp_path):
    """A first attempt ended before any checkpoint; its alarms must not hush those of the next."""
    for start, rows in ((0, 1), (0, 1), (15, 1)):
        sinks, _ = make(tmp_path, start)
        sinks.alarm("Loss spike", "it rose; lower optim.lr", window=12)
        sinks.close()
        assert len(read(tmp_path / "alarms.jsonl")) == rows
    sinks, _ = make(tmp_path, 15)
    sinks.alarm("Loss spike", "it rose; lower optim.lr", window=20)
    sinks.close()
    assert [row["window"] for row in read(tmp_path / "alarms.jsonl")] == [12, 20]


def test_metrics_rows_hold_no_clock_and_no_memory_figure(tmp_path):
    go(tmp_path, 0, 15)
    rows = read(tmp_path / "metrics.jsonl")
    keys = {k for row in rows for k in row}
    assert not [k for k in keys if k.startswith(("speed/", "memory/")) or "time" in k or "second" in k]
    assert [r["window"] for r in rows] == [5, 10, 15, 15]
    evaluation = rows[-1]
    assert evaluation["val/weights"] == "raw" and evaluation["val/AP"] > 0
    assert evaluation["val/APl"] is None and evaluation["val/per_class"]["yak"] is None, "nan is null in json"


def test_speed_rows_hold_clock_and_memory(tmp_path):
    go(tmp_path, 0, 30)
    rows = read(tmp_path / "speed.jsonl")
    evaluated = [r for r in rows if "speed/seconds" not in r]
    assert [(r["window"], r["memory/evaluation_gib"] > 0) for r in evaluated] == [(15, True), (30, True)]
    rows = [r for r in rows if r not in evaluated]
    assert [r["window"] for r in rows] == [5, 10, 15, 20, 25, 30]
    for row in rows:
        assert row["speed/images_per_second"] == pytest.approx(16) and row["speed/wait_seconds"] == pytest.approx(0.1)
        assert row["memory/peak_gib"] > 0 and "T" in row["time"]
    assert "speed/seconds_left" not in rows[2] and rows[3]["speed/seconds_left"] > 0, "known after 20 windows"


def test_console_tells_time_left_once_known_and_the_best_evaluation(tmp_path):
    text = go(tmp_path, 0, 30)
    assert text.count("time: ") == 1 and "evaluations and checkpoints included" in text
    assert "evaluation after epoch 1.00 (window 15), raw weights\n" in text
    assert "evaluation after epoch 2.00 (window 30), raw weights, best AP" in text and "at window 15" in text


def test_the_best_is_remembered_over_a_resume(tmp_path):
    """As the checkpoint has it, and not as the file has: other validation data begin it anew."""
    go(tmp_path, 0, 15)
    assert "best AP 80.0 at window 15" in go(tmp_path, 15, 30, best=(0.8, 15))
    assert "best AP" not in go(tmp_path, 15, 30)


def test_what_wandb_has_had_it_does_not_get_again_however_often_a_run_is_killed(tmp_path):
    path = tmp_path / "wandb_sent.json"
    first = _Sent(path, 0)
    assert all(first.is_new("train", w) for w in range(1, 21)) and first.is_new("val", 20)
    second = _Sent(path, 10)  # resumed after window 10, and killed at 15
    assert not any(second.is_new("train", w) for w in range(11, 16))
    third = _Sent(path, 10)
    assert [third.is_new("train", w) for w in (16, 20, 21)] == [False, False, True]
    assert not third.is_new("val", 20)
    assert _Sent(path, 0).is_new("train", 1), "a run that begins anew has sent nothing"


def test_a_full_disk_drops_whole_rows_and_the_run_goes_on(tmp_path):
    sinks, stream = make(tmp_path)
    sinks.alarm("First", "it fits", window=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "alarms.jsonl").stat().st_size + 20, before[1]))
    try:
        sinks.alarm("Second", "there is room for twenty bytes of it", window=2)
        sinks.alarm("Third", "nor this", window=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sinks.alarm("Fourth", "space was freed", window=4)
    sinks.close()
    assert [row["title"] for row in read(tmp_path / "alarms.jsonl")] == ["First", "Fourth"]
    assert stream.getvalue().count("rows are missing from") == 1


def test_alarms_survive_a_resume(tmp_path):
    sinks, stream = make(tmp_path)
    sinks.alarm("Out of memory", "a large window; lower batch.micro", level="ERROR", window=29)
    sinks.close(False)
    make(tmp_path, 10)[0].close()
    (row,) = read(tmp_path / "alarms.jsonl")
    assert (row["window"], row["level"], row["title"]) == (29, "ERROR", "Out of memory")
    assert "ERROR: Out of memory: a large window; lower batch.micro" in stream.getvalue()


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    file = JsonLines(tmp_path / "a.jsonl")
    file.write({"window": 1, "x": float("inf"), "y": float("nan")})
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"window": 1, "x": "inf", "y": None}


def test_the_silent_object_has_every_public_method_of_the_real_one():
    public = {name for name in vars(Sinks) if not name.startswith("_")}
    assert public <= {name for name in vars(Silent) if not name.startswith("_")}
    silent = Silent()
    with silent.timed("evaluation"):
        assert list(silent.progress([1, 2])) == [1, 2]
    assert silent.wandb_run_id is None
