"""Law 3: a window whose loss or gradient is not finite changes nothing that lasts, on any process."""

import json
from pathlib import Path

import pytest
from shared import load_module

inject = load_module(Path(__file__).with_name("injecting.py"))

wandb_file = load_module(Path(__file__).parents[1] / "monitor" / "wandb_file.py")

pytestmark = pytest.mark.law3
KINDS = ["image", "weight", "loss", "gradient"]
AT = 3  # of six windows, counted from 0


def scenarios(processes: int) -> list[dict]:
    rank = processes - 1
    rows = [
        {"name": "clean", "faults": []},
        {"name": "unseen", "faults": [{"what": "never seen", "window": AT, "rank": "all"}]},
    ]
    for kind in KINDS:
        for value in ("nan", "inf"):
            fault = {"what": kind, "window": AT, "rank": rank, "micro": 1, "value": value}
            rows.append({"name": f"{kind}-{value}", "faults": [fault], "recipe": "health: {captures: 1}"})
    fault = {"what": "image", "window": 2, "rank": rank, "value": "nan"}
    rollback = "health: {on_nonfinite: rollback, strikes: 2, within: 3}\ncheckpoint: {every_steps: 2, keep: 9}"
    for kind in KINDS:
        once = {"what": kind, "window": 2, "rank": rank, "micro": 0, "value": "inf"}
        short = "\nschedule: {steps: 4, kind: constant}"
        rows.append({"name": f"stop-{kind}", "faults": [dict(once)], "recipe": "health: {on_nonfinite: stop}" + short})
        twice = [dict(once), once | {"window": 3, "value": "nan"}]
        rows.append({"name": f"rollback-{kind}", "faults": twice, "recipe": rollback + short})
    rows.append({"name": "stop", "faults": [dict(fault)], "recipe": "health: {on_nonfinite: stop}"})
    twice = [dict(fault), fault | {"window": 3}]
    rows.append({"name": "rollback", "faults": twice, "recipe": rollback})
    rows.append(
        {"name": "rollback-end", "faults": twice, "recipe": rollback + "\nschedule: {steps: 4, kind: constant}"}
    )
    far_apart = [fault | {"window": 0}, fault | {"window": 4}]
    rows.append({"name": "far-apart", "faults": far_apart, "recipe": rollback})
    lasting = [{"what": "lasting weight", "window": 3, "rank": "all"}]
    rows.append({"name": "lasting", "faults": lasting, "recipe": rollback.replace("every_steps: 2", "every_steps: 3")})
    rows.append({"name": "lost", "faults": lasting})
    twice_more = [{"what": "image", "window": w, "rank": rank} for w in (2, 3, 4, 5)]
    rows.append({"name": "rollback-twice", "faults": twice_more, "recipe": rollback})
    rows.append({"name": "give-up", "faults": lasting, "recipe": "health: {give_up_after: 2}"})
    fault = {"what": "image", "window": AT, "rank": rank, "value": "nan"}
    rows.append({"name": "wandb", "faults": [fault], "set": ["log.wandb.enabled=true", "log.wandb.mode=offline"]})
    return rows


@pytest.fixture(scope="module", params=inject.LAUNCHES)
def runs(request, tmp_path_factory):
    rows = scenarios(inject.count(request.param))
    return inject.launch(tmp_path_factory.mktemp(f"poison{request.param}"), request.param, rows)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_window_leaves_what_a_run_without_it_has(runs, kind, value):
    name = f"{kind}-{value}"
    assert inject.outcome(runs, name) is None
    assert inject.differing(inject.weights(runs / name), inject.weights(runs / "unseen")) == []
    losses, unseen = inject.losses(runs / name), inject.losses(runs / "unseen")
    assert losses[:AT] + losses[AT + 1 :] == unseen[:AT] + unseen[AT + 1 :]
    counted = [row["health/nonfinite"] for row in inject.rows(runs / name) if "train/loss" in row]
    assert counted == [0] * AT + [1] * (6 - AT)
    steps = [row["step"] for row in inject.rows(runs / name) if "train/loss" in row]
    assert steps == [1, 2, 3, 3, 4, 5]


def test_the_comparison_can_fail(runs):
    assert inject.differing(inject.weights(runs / "unseen"), inject.weights(runs / "clean"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_alarm_says_what_where_why_and_what_to_do(runs, kind):
    (alarm,) = inject.rows(runs / f"{kind}-nan", "alarms.jsonl")
    assert alarm["window"] == AT + 1 and alarm["title"] == "Non-finite window" and alarm["level"] == "WARN"
    for words in (f"window {AT + 1}: ", "not finite", "nothing was updated", "learning rate", "detr-accel replay"):
        assert words in alarm["text"], alarm["text"]


def test_the_window_is_kept_as_it_reached_the_model(runs):
    capture = runs / "image-nan" / "captures" / f"window-{AT + 1:08d}"
    about = json.loads((capture / "capture.json").read_text())
    assert about["losses"]["loss"] == "nan" and about["window"] == AT + 1
    suspects = [row for row in about["micro_batches"] if row["file"]]
    assert len(suspects) == 1, "the one micro-batch whose loss is not finite"
    tensors = inject.load_file(capture / suspects[0]["file"])
    assert tensors["images"].shape[0] == len(suspects[0]["image_ids"]) == len(suspects[0]["names"]) == 2
    before = {k.removeprefix("raw/") for k in inject.weights(runs / "image-nan") if k.startswith("raw/")}
    assert inject.load_file(capture / "model.safetensors").keys() == before


def test_stop_ends_the_run_in_words_and_keeps_the_last_checkpoint(runs):
    said = inject.outcome(runs, "stop")
    assert "window 3" in said and "stops" in said and "--resume" in said
    assert json.loads((runs / "stop" / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_not_finite_stops_or_goes_back(runs, kind):
    assert "window 3" in inject.outcome(runs, f"stop-{kind}") and "stops" in inject.outcome(runs, f"stop-{kind}")
    assert inject.outcome(runs, f"rollback-{kind}") is None
    ended = inject.weights(runs / f"rollback-{kind}")
    assert inject.differing(ended, inject.weights(runs / f"rollback-{kind}", "window-00000002")) == []


def test_two_strikes_go_back_to_the_checkpoint_and_lower_the_rate(runs):
    rows = [row for row in inject.rows(runs / "rollback") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 2, 2, 3, 4]
    assert [row["health/rollbacks"] for row in rows] == [0, 0, 0, 1, 1, 1]
    rates = [row["train/lr/heads"] for row in rows]
    assert rates[4] == rates[0] / 2 and rates[3] == rates[0]
    alarms = inject.rows(runs / "rollback", "alarms.jsonl")
    assert [a["level"] for a in alarms] == ["WARN", "ERROR"] and "go back to the last checkpoint" in alarms[1]["text"]


def test_after_a_rollback_everything_is_what_the_checkpoint_had(runs):
    ended = inject.weights(runs / "rollback-end")
    earlier = inject.weights(runs / "rollback-end", "window-00000002")
    assert inject.differing(ended, earlier) == []


def test_strikes_far_apart_cause_no_rollback(runs):
    rows = [row for row in inject.rows(runs / "far-apart") if "train/loss" in row]
    assert rows[-1]["health/rollbacks"] == 0 and rows[-1]["health/nonfinite"] == 2


def test_a_broken_weight_is_healed_by_a_rollback(runs):
    rows = [row for row in inject.rows(runs / "lasting") if "train/loss" in row]
    assert [row["train/loss"] is None for row in rows] == [False, False, False, True, True, False]


def test_weights_that_are_lost_never_take_a_good_checkpoints_place(runs):
    assert "weights are not finite" in inject.outcome(runs, "lost")
    assert (runs / "lost" / "checkpoints" / "last").readlink().name == "window-00000003"


def test_each_rollback_lowers_the_rate_again(runs):
    rows = [row for row in inject.rows(runs / "rollback-twice") if "train/loss" in row]
    assert [row["health/rollbacks"] for row in rows] == [0, 0, 0, 1, 1, 2]
    assert [row["step"] for row in rows] == [1, 2, 2, 2, 2, 2]
    state = json.loads((runs / "rollback-twice" / "checkpoints" / "last" / "state.json").read_text())
    assert state["health"]["lr_factor"] == 0.25


def test_a_run_that_learns_nothing_any_more_gives_up(runs):
    assert "2 such windows in a row" in inject.outcome(runs, "give-up")


def test_the_alert_and_the_count_reach_wandb_once(runs):
    found = wandb_file.records(runs / "wandb")
    (alert,) = wandb_file.of_kind(found, "alert")
    assert alert.title == "Non-finite window" and alert.level == "WARN"
    for words in (f"window {AT + 1}: ", "nothing was updated", "learning rate", "detr-accel replay"):
        assert words in alert.text, alert.text
    counted = [row["health/nonfinite"] for row in wandb_file.history(found) if "health/nonfinite" in row]
    assert counted == [0] * AT + [1] * (6 - AT)


def test_a_healthy_run_raises_no_alarm(runs):
    assert (runs / "clean" / "alarms.jsonl").read_text() == ""
