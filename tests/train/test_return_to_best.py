"""schedule.return_to_best: the best weights so far take the place of the last ones, also over a resume."""

import json
from pathlib import Path

import pytest
from shared import load_module

from detr_accel import recipe as recipes
from detr_accel.train import loop, validation
from detr_accel.train.loop import train

inject = load_module(Path(__file__).with_name("injecting.py"))
injected = load_module(Path(__file__).with_name("injected.py"))
SCHEDULE = "schedule: {epochs: 3, kind: cosine, return_to_best: 0.7}\n"  # 9 windows: before the eighth, as 7 / 9 > 0.7
KEEP = "checkpoint: {every_steps: 1, keep: 9}\n"
AT, BEST = 7, "window-00000003"
SCORES = {3: 0.5, 6: 0.4, 9: 0.3, 12: 0.2, 15: 0.2, 18: 0.2}
SAID = "schedule.return_to_best: the weights are those after window "


def recipe(more: str = SCHEDULE + KEEP) -> recipes.Recipe:
    return recipes.loads(injected.TINY + "name: r\n" + more)


@pytest.fixture(autouse=True)
def scores(monkeypatch):
    def set_to(values: dict[int, float]) -> None:
        for name, method in injected.scored(values).items():
            monkeypatch.setattr(validation.Validation, name, method)

    set_to(SCORES)
    return set_to


class Seen(dict):
    """Weights, averages and moments just before each window is trained, by its number from 0; and deeds there."""

    def __init__(self, monkeypatch):
        self.deeds, plain = {}, loop._Turn.run

        def run(turn, *args):
            self[turn.state.window] = _held(turn.built)
            self.deeds.pop(turn.state.window, lambda: None)()
            return plain(turn, *args)

        monkeypatch.setattr(loop._Turn, "run", run)


def _held(built) -> dict:
    names = {p: n for n, p in built.bare.named_parameters()}
    held = {f"raw/{k}": v.clone() for k, v in built.bare.state_dict().items()}
    held |= {f"model/{k}": v.clone() for k, v in built.ema.module.state_dict().items()}
    moments = {f"{names[p]}/{k}": v for p, row in built.optimizer.state.items() for k, v in row.items()}
    return held | {f"optimizer/{k}": v.clone() for k, v in moments.items()}


def rows_of(run: Path, key: str) -> list:
    return [row[key] for row in inject.rows(run) if "train/loss" in row]


def test_the_best_weights_go_on_with_the_schedule_of_the_last(tmp_path, monkeypatch, capsys):
    seen = Seen(monkeypatch)
    run = train(recipe(), runs=tmp_path)
    assert inject.differing(seen[AT], inject.weights(run, BEST)) == []
    assert inject.differing(seen[AT], inject.weights(run, f"window-{AT:08d}")), "the last weights were others"
    assert rows_of(run, "step") == list(range(1, 10))
    assert capsys.readouterr().out.count(f"{SAID}3 again (AP 50.0)") == 1
    without = train(recipe(SCHEDULE.replace("0.7", "null") + KEEP), runs=tmp_path / "without")
    assert rows_of(run, "train/lr/heads") == rows_of(without, "train/lr/heads")
    losses, other = inject.losses(run), inject.losses(without)
    assert losses[:AT] == other[:AT] and losses[AT:] != other[AT:]
    assert "return_to_best" not in capsys.readouterr().out
    assert (run / "alarms.jsonl").read_text() == ""


@pytest.mark.law2
@pytest.mark.parametrize("killed_at", [AT - 1, AT, AT + 1])
def test_a_resume_goes_back_as_the_whole_run_did(tmp_path, monkeypatch, killed_at):
    more = SCHEDULE + "checkpoint: {every_steps: 2, keep: 2}\n"
    whole = train(recipe(more), runs=tmp_path / "whole")
    with monkeypatch.context() as patch:
        Seen(patch).deeds[killed_at] = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            train(recipe(more), runs=tmp_path)
    run = train(recipe(more), runs=tmp_path, resume=True)
    assert inject.differing(inject.weights(run), inject.weights(whole)) == []
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.law3
def test_a_rollback_behind_it_goes_to_the_best_once_more(tmp_path, monkeypatch, capsys):
    more = SCHEDULE + "checkpoint: {every_steps: 4, keep: 9}\nhealth: {on_nonfinite: rollback, strikes: 1}\n"
    monkeypatch.setattr(injected.window.WindowRunner, "_micro_batch", injected.micro_batch)
    injected.faults.left = [{"what": "image", "window": AT}]
    seen = Seen(monkeypatch)
    run = train(recipe(more), runs=tmp_path)
    assert capsys.readouterr().out.count(SAID) == 2
    for window in (AT, AT + 1):
        assert inject.differing(seen[window], inject.weights(run, BEST)) == []


@pytest.mark.law4
def test_memory_that_runs_out_in_a_step_behind_it_does_not_undo_it(tmp_path, monkeypatch, capsys):
    more = SCHEDULE + "checkpoint: {every_steps: 4, keep: 9}\n"
    monkeypatch.setattr(injected.commit.Commit, "__call__", injected.commit_or_not)
    injected.faults.left = [{"what": "oom step", "window": AT}]
    run = train(recipe(more), runs=tmp_path)
    assert capsys.readouterr().out.count(SAID) == 2
    injected.faults.left = [{"what": "never seen", "window": AT}]
    other = train(recipe(more), runs=tmp_path / "other")
    assert inject.losses(run)[AT + 1] == inject.losses(other)[AT + 1], "the best weights again"


@pytest.mark.parametrize("values, words", [({}, "no AP above 0 has come yet"), (None, "no evaluation has come yet")])
def test_where_nothing_was_found_the_weights_stay(tmp_path, monkeypatch, capsys, scores, values, words):
    """An epoch that found nothing is no better than any other, and nothing to throw a training away for."""
    scores(values or {})
    more = SCHEDULE if values is not None else SCHEDULE.replace("0.7", "0.2")
    seen = Seen(monkeypatch)
    run = train(recipe(more + KEEP), runs=tmp_path)
    at = AT if values is not None else 2
    assert words in capsys.readouterr().out
    assert inject.differing(seen[at], inject.weights(run, f"window-{at:08d}")) == []


def test_a_damaged_best_is_said_and_the_training_goes_on(tmp_path, monkeypatch, capsys):
    seen = Seen(monkeypatch)
    seen.deeds[AT - 1] = lambda: (tmp_path / "r" / "checkpoints" / BEST / "raw.safetensors").unlink()
    run = train(recipe(), runs=tmp_path)
    said = capsys.readouterr().out
    assert "warning: schedule.return_to_best: the weights stay" in said and "raw.safetensors is missing" in said
    assert inject.differing(seen[AT], inject.weights(run, f"window-{AT:08d}")) == []


def test_a_longer_schedule_brings_the_place_again(tmp_path, capsys):
    train(recipe(), runs=tmp_path)
    train(recipe(SCHEDULE.replace("epochs: 3", "epochs: 6") + KEEP), runs=tmp_path, resume=True)
    assert capsys.readouterr().out.count(SAID) == 2


def test_two_processes_go_back_together(tmp_path):
    never = {"name": "never", "faults": [], "recipe": SCHEDULE.replace("0.7", "null") + KEEP, "scores": SCORES}
    inject.launch(tmp_path, 2, [never | {"name": "r", "recipe": SCHEDULE + KEEP}, never])
    assert all(inject.outcome(tmp_path, name, rank) is None for name in ("r", "never") for rank in (0, 1))
    took = {}
    for name in ("r", "never"):
        moments = inject.weights(tmp_path / name, f"window-{AT + 1:08d}")
        took[name] = {v.item() for k, v in moments.items() if k.endswith("/step")}
    assert took == {"r": {4.0}, "never": {8.0}}, "AdamW's count of its steps is the best's and one more"
    assert inject.losses(tmp_path / "r")[:AT] == inject.losses(tmp_path / "never")[:AT]


@pytest.mark.law9
def test_what_alarms_compare_begins_anew_with_other_pictures(tmp_path):
    other = "{scales: [64], photometric: {probability: 1.0, start: 0.5, stop: 1.0}}"
    text = injected.TINY.replace("{scales: [64]}", other) + "name: r\n" + SCHEDULE.replace("0.7", "null") + KEEP
    run = train(recipes.loads(text), runs=tmp_path)
    state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    assert state["alarms"]["recent"]["window"] == [6, 7, 8, 9], "colours begin with the sixth of nine windows"
