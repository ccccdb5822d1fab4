"""Early stopping and the schedule on a plateau: decided by evaluations, remembered in the checkpoint."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
from shared import load_module

from detr_accel import recipe as recipes
from detr_accel.recipe import Recipe
from detr_accel.train import loop
from detr_accel.train.loop import train
from detr_accel.train.patience import Patience, Waiting

inject = load_module(Path(__file__).with_name("injecting.py"))
injected = load_module(Path(__file__).with_name("injected.py"))
# a rate of next to nothing: nothing gets better by 0.5
STILL = "optim: {lr: 1.0e-9, lr_backbone: 1.0e-9}\nschedule: {epochs: 4, kind: constant}\n"


def recipe(name: str, more: str) -> Recipe:
    return recipes.loads(injected.TINY + f"name: {name}\n" + more)


def waited(metric: str, values: list[float], min_delta: float = 0.0, patience: int = 2) -> list[bool]:
    rule, waiting, over = Patience(metric, patience, min_delta), Waiting(), []
    for value in values:
        rule.note(waiting, value)
        over.append(rule.over(waiting))
    return over


@pytest.mark.parametrize(
    ("metric", "values", "min_delta", "over"),
    [
        ("AP", [0.1, 0.2, 0.2, 0.1], 0.0, [False, False, False, True]),
        ("AP", [0.1, 0.2, 0.15, 0.3], 0.0, [False] * 4),
        ("AP", [0.10, 0.104, 0.108, 0.120], 0.005, [False, False, False, False]),  # 0.108 beats 0.10 by enough
        ("AP", [0.10, 0.104, 0.104, 0.104], 0.005, [False, False, True, True]),
        ("loss", [9.0, 8.0, 8.5, 8.0], 0.0, [False, False, False, True]),
        ("AP", [math.nan, math.nan, math.nan, 0.0], 0.0, [False] * 4),
        ("AP", [0.1, math.nan, 0.1, 0.1], 0.0, [False, False, False, True]),
    ],
)
def test_only_evaluations_without_anything_better_count(metric, values, min_delta, over):
    assert waited(metric, values, min_delta) == over


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    more = STILL + "early_stop: {metric: loss, patience: 1, min_delta: 0.5}\n"
    return train(recipe("still", more), runs=tmp_path_factory.mktemp("still"))


def windows(run: Path) -> list[int]:
    return [row["window"] for row in inject.rows(run) if "train/loss" in row]


def test_a_run_that_gets_no_better_ends_whole(stopped):
    assert windows(stopped) == [1, 2, 3, 4, 5, 6], "evaluated after 3 and 6 of 12"
    assert json.loads((stopped / "status.json").read_text())["state"] == "done"
    assert (stopped / "checkpoints" / "last").resolve().name == "window-00000006"
    assert (stopped / "checkpoints" / "best").is_dir()


@pytest.mark.law2
def test_going_on_with_a_run_that_is_over_changes_nothing(stopped, capsys):
    kept = (stopped / "metrics.jsonl").read_bytes()
    more = STILL + "early_stop: {metric: loss, patience: 1, min_delta: 0.5}\n"
    train(recipe("still", more), runs=stopped.parent, resume=True)
    assert "stopped early after window 6" in capsys.readouterr().out
    assert (stopped / "metrics.jsonl").read_bytes() == kept


@pytest.mark.law2
def test_more_patience_goes_on_where_it_ended(stopped, tmp_path):
    more = STILL + "early_stop: {metric: loss, patience: 2, min_delta: 0.5}\n"
    train(recipe("still", more), runs=stopped.parent, resume=True)
    straight = train(recipe("still", more), runs=tmp_path)
    assert windows(stopped) == windows(straight) == list(range(1, 10))
    assert inject.differing(inject.weights(stopped), inject.weights(straight)) == []
    assert (stopped / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_no_run_ends_before_min_epochs(tmp_path):
    more = STILL + "early_stop: {metric: loss, patience: 1, min_delta: 0.5, min_epochs: 3}\n"
    assert windows(train(recipe("later", more), runs=tmp_path)) == list(range(1, 10))


@pytest.mark.law2
def test_a_plateau_drops_the_rate_and_a_resume_keeps_it(tmp_path, capsys):
    plateau = "kind: plateau, metric: AP75, patience: 1, gamma: 0.5, min_factor: 0.3"
    more = "optim: {lr: 1.0e-9, lr_backbone: 1.0e-9}\nschedule: {epochs: 4, " + plateau + "}\n"
    run = train(recipe("flat", more), runs=tmp_path / "whole")
    rates = {r["window"]: r["train/lr/heads"] for r in inject.rows(run) if "train/loss" in r}
    # an AP75 of 0 after 3, 6 and 9 windows: the first is the best so far, each later one a drop
    expected = {w: 1e-9 * {0: 1, 1: 1, 2: 0.5, 3: 0.3}[(w - 1) // 3] for w in range(1, 13)}
    assert rates == pytest.approx(expected)
    assert "no better AP75 in 1 evaluations" in capsys.readouterr().out
    short = more.replace("epochs: 4", "epochs: 2")
    train(recipe("flat", short), runs=tmp_path / "cut")
    train(recipe("flat", more), runs=tmp_path / "cut", resume=True)
    assert (tmp_path / "cut/flat/metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert inject.differing(inject.weights(tmp_path / "cut/flat"), inject.weights(run)) == []


@pytest.mark.law2
def test_a_branch_waits_anew(stopped, tmp_path):
    more = STILL + "early_stop: {metric: loss, patience: 2, min_delta: 0.5}\n"
    run = train(recipe("child", more.replace("1.0e-9", "1.0e-8")), runs=tmp_path, branch=stopped)
    assert windows(run) == [10, 11, 12], "its parent's patience was at an end; the schedule ends it"


def test_another_metric_begins_anew(tmp_path):
    first = STILL.replace("epochs: 4", "epochs: 2") + "early_stop: {metric: AP75, patience: 9}\n"
    train(recipe("other", first), runs=tmp_path)
    run = train(recipe("other", STILL + "early_stop: {metric: loss, patience: 2}\n"), runs=tmp_path, resume=True)
    assert windows(run) == list(range(1, 13)), "evaluations at 9 and 12: a first one, and one to wait for"


@pytest.mark.law2
def test_an_evaluation_that_ends_a_run_is_made_once(tmp_path, monkeypatch):
    """Stopped in the window before the evaluation that will end the run: it is owed, and made by the first resume."""
    more = STILL + "early_stop: {metric: loss, patience: 1, min_delta: 0.5}\ncheckpoint: {every_epochs: 9}\n"
    plain = loop._Turn.run

    def run(self, micro_batches, failure):
        if self.state.window == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, micro_batches, failure)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Turn, "run", run)
        train(recipe("owed", more), runs=tmp_path)
    for _ in range(2):
        folder = train(recipe("owed", more), runs=tmp_path, resume=True)
    assert [r["window"] for r in inject.rows(folder) if "val/AP" in r] == [3, 6]
    straight = train(recipe("owed", more), runs=tmp_path / "straight")
    assert (folder / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_two_processes_end_together(tmp_path):
    more = STILL + "early_stop: {metric: loss, patience: 1, min_delta: 0.5}\n"
    inject.launch(tmp_path, 2, [{"name": "both", "faults": [], "recipe": more}])
    assert inject.outcome(tmp_path, "both", 0) is None and inject.outcome(tmp_path, "both", 1) is None
    assert windows(tmp_path / "both") == [1, 2, 3, 4, 5, 6]
