"""The json files of a run: deterministic rows apart from the clock, whole after any kill."""

import importlib.util
import io
import json
from pathlib import Path

import pytest

from detr_accel.monitor.console import Console
from detr_accel.monitor.jsonl import JsonLines, read
from detr_accel.monitor.sinks import Silent, Sinks
from detr_accel.monitor.timing import Eta

_spec = importlib.util.spec_from_file_location("monitor_small_run", Path(__file__).with_name("small_run.py"))
small_run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small_run)


def make(folder: Path, start: int = 0) -> tuple[Sinks, io.StringIO]:
    stream = io.StringIO()
    eta = Eta(30, 15, start_window=start, num_evaluations=2, num_checkpoints=0)
    return Sinks(folder, Console(30, 15, start, stream), eta, None, name="small", start_window=start), stream


def go(folder: Path, start: int, end: int, *, close: bool = True) -> str:
    sinks, stream = make(folder, start)
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
    go(tmp_path, 0, 15)
    assert "at window 15" in go(tmp_path, 15, 30)


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
