"""Every alarm fires on a made history, in words that name recipe keys, and keeps silent over a healthy one."""

import dataclasses
import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from detr_accel import monitor
from detr_accel import recipe as recipes
from detr_accel.monitor import alarm_rules, feeding, machine_rules
from detr_accel.monitor.alarms import OUT_OF_REACH, TITLES, About, Alarms, Memory, judge_rows
from detr_accel.monitor.rows import train_row
from detr_accel.structures import LoaderTime, StepStats, UserError

PLAIN = About()
KEYS = set(recipes._known())
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
FACTS = {"blank_images": 0, "empty_images": 0, "cut_boxes": 0, "tiny_boxes": 0, "unmatched_boxes": 0}


def window(number: int, **changes) -> StepStats:
    """Window ``number`` of a healthy run: the loss falls from 25 to 10, noise of 5 %."""
    noise = random.Random(number).gauss(1, 0.05)
    fallen = 2.718 ** (-number / 1000)
    losses = {
        "loss_giou": (0.5 + 0.6 * fallen) * noise, "class_error": 30 + 60 * fallen, "box_spread": 0.15,
        "image_spread": 0.05,
    }  # fmt: skip
    losses |= changes.pop("losses", {})
    facts = FACTS | changes.pop("facts", {})
    base = StepStats(
        window=number, step=number, epoch=number / 500, loss=(10 + 15 * fallen) * noise, losses=losses,
        grad_norm=20 * noise**3, grad_norms={"backbone": 5.0, "transformer": 15.0, "heads": 10.0},
        lr={"backbone": 1e-5, "transformer": 1e-4, "heads": 1e-4}, num_images=8, num_boxes=24, seconds=1.0,
        wait_seconds=0.05, facts=facts,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def run(length: int, change=lambda w: {}) -> list[StepStats]:
    """A run with ``change(window number)`` made to each window."""
    return [window(w, **change(w)) for w in range(1, length + 1)]


def raised(stats: list[StepStats], about: About = PLAIN, **more) -> list[tuple[int, str, str]]:
    alarms = Alarms(about, Memory(head_loaded=more.pop("head_loaded", 0.0)), **more)
    return [(s.window, a.title, a.text) for s in stats for a in alarms.judge(s)]


def after(start: int, **changes):
    return lambda w: changes if w > start else {}


def losses(**values):
    return {"losses": values}


HIGH = About(lr=2e-3)
NAN = float("nan")
NOT_FINITE = {"loss": NAN, "grad_norm": NAN, "grad_norms": {"transformer": NAN, "heads": NAN}, "accepted": False}
# title -> (windows, the recipe's numbers, further arguments, window in which it must have spoken)
HISTORIES = {
    "Diverged": (run(400, lambda w: {"loss": 40.0} if w > 250 else {}), About(), {}, 300),
    "Loss spike": (run(200, lambda w: {"loss": 60.0} if w in (150, 151, 153) else {}), About(), {}, 153),
    "Gradient spikes": (run(200, lambda w: {"grad_norm": 900.0} if w in (150, 155, 160) else {}), About(), {}, 160),
    "Clipping saturated": (run(120, lambda w: {"grad_norm": 2000.0}), About(clip_norm=0.1), {}, 100),
    "Plateau": (run(2500, lambda w: {"loss": window(10**6 + w).loss + 14, **losses(loss_giou=1.1)}), About(), {}, 2100),
    "Too good too early": (run(300, after(150, losses={"loss_giou": 0.04, "class_error": 0.0})), About(), {}, 180),
    "Collapsed predictions": (run(300, after(30, losses={"box_spread": 1e-8})), HIGH, {}, 50),
    "Same boxes in every image": (run(300, after(30, losses={"image_spread": 1e-8})), HIGH, {}, 50),
    "Classes do not fit": (
        run(60, after(0, losses={"loss_giou": 0.4, "class_error": 97.0})), About(from_scratch=False),
        {"head_loaded": 1.0}, 10,
    ),
    "Batch of one image": (run(3, after(0, num_images=1)), About(batch_size=1), {}, 1),
    "Windows without boxes": (run(60, after(0, num_boxes=0)), About(), {}, 20),
    "Blank images": (run(60, after(0, facts={"blank_images": 6})), About(), {}, 2),
    "Boxes leave their images": (run(60, after(0, facts={"cut_boxes": 9})), About(), {}, 3),
    "Tiny boxes": (run(60, after(0, facts={"tiny_boxes": 20})), About(), {}, 3),
    "More boxes than queries": (run(60, after(0, facts={"unmatched_boxes": 4})), About(num_queries=5), {}, 9),
    "Nothing learns": (run(5, after(0, lr={"transformer": 0.0, "heads": 0.0})), About(lr=0), {}, 1),
    "Part without learning rate": (
        run(5, after(0, lr={"backbone": 1e-4, "transformer": 1e-4, "heads": 0.0})), About(), {}, 1,
    ),
    "Device waits for images": (run(80, after(0, wait_seconds=0.6)), About(), {}, 50),
    "Memory nearly full": (run(20, after(9, memory_fraction=0.99)), About(), {}, 10),
}  # fmt: skip


def evaluations(val: list[float], train: list[float]):
    alarms = Alarms(About(), Memory())
    rows = [{"val/loss": v, "val/train_loss": t, "val/AP": 0.1} for v, t in zip(val, train, strict=True)]
    return [(i, a.title, a.text) for i, row in enumerate(rows) for a in alarms.evaluated(100 * i, float(i), row)]


def names_keys(text: str) -> None:
    """The remedy is in the recipe's own keys, and every key that is named exists."""
    named = re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_.]*[a-z_]", text)
    assert named, text
    assert set(named) <= KEYS, set(named) - KEYS


def test_every_row_of_the_table_has_its_history():
    assert {*HISTORIES, *alarm_rules.AT_EVALUATION, OUT_OF_REACH} == set(TITLES)


@pytest.mark.parametrize("title", HISTORIES)
def test_it_fires_on_its_history_and_says_what_to_change(title):
    stats, about, more, due = HISTORIES[title]
    said = [(at, text) for at, name, text in raised(stats, about, **more) if name == title]
    assert said, f"{title} said nothing"
    assert said[0][0] <= due
    assert len(said) == 1, "an alarm that goes on is not said again so soon"
    names_keys(said[0][1])


@pytest.mark.law9
@pytest.mark.parametrize("share", [0.4, 0.5, 0.7])
def test_windows_without_boxes_are_no_measure_of_those_with_some(share):
    """Of sparse pictures: without a box an RT-DETR's loss is a hundredth, and its gradient, too."""
    empty = {"num_boxes": 0, "loss": 0.3, "grad_norm": 0.2}
    stats = run(900, lambda w: empty if random.Random(w).random() < share else {})
    assert raised(stats, off=["Windows without boxes"]) == []
    late = [dataclasses.replace(s, loss=60.0) if s.window > 600 and s.num_boxes else s for s in stats]
    assert "Diverged" in {title for _, title, _ in raised(late)}, "and those with boxes are judged all the same"


def test_dead_predictions_are_told_where_no_window_has_a_box():
    stats = run(40, after(0, num_boxes=0, losses={"box_spread": 0.0, "image_spread": 0.0}))
    said = {title: text for _, title, text in raised(stats)}
    assert "Collapsed predictions" in said and "since window 1 " in said["Collapsed predictions"]
    assert "Same boxes in every image" in said and not any("itself failed" in text for text in said.values())


def test_a_state_from_before_goes_on():
    """It has no list of the windows with boxes, and a loss of each window."""
    stats, memory = run(200, lambda w: {"grad_norm": 900.0} if w in (150, 155, 160) else {}), Memory()
    alarms = Alarms(PLAIN, memory)
    for s in stats[:120]:
        alarms.judge(s)
    del memory.recent["placed"], memory.recent["start_giou"]
    again = Alarms(PLAIN, Memory(**json.loads(json.dumps(asdict(memory)))))
    said = [(s.window, a) for s in stats[120:] for a in again.judge(s)]
    assert [(at, a.title) for at, a in said] == [(160, "Gradient spikes")] and "since window 150" in said[0][1].text


@pytest.mark.law9
def test_an_rtdetr_whose_boxes_never_get_better_learns_nothing_whatever_its_loss_says():
    """Its class scores fall within a few windows, by which the loss does, too."""
    about = About(lr=2e-2, detector="RT-DETR")
    noise = [random.Random(w).gauss(1, 0.05) for w in range(301)]
    dead = run(300, lambda w: {"loss": (18 + 10 * 0.8**w) * noise[w], **losses(loss_giou=1.1 * noise[w])})
    ((at, title, text),) = raised(dead, about)
    assert title == "Diverged" and at <= 160 and "the loss_giou began at 1.1" in text
    names_keys(text)
    falls = [0.4 + 0.7 * 0.98**w for w in range(301)]
    alive = run(300, lambda w: {"loss": (18 + 10 * 0.8**w) * noise[w], **losses(loss_giou=falls[w] * noise[w])})
    assert raised(alive, about) == []


def test_worse_validation_while_training_improves():
    ((at, title, text),) = evaluations([9, 8, 7, 7.5, 7.6, 7.7], [9, 7, 6, 5, 4, 3])
    assert (at, title) == (4, "Validation gets worse")
    assert "was 7 at window 200 and is 7.6" in text and "fell from 6 to 4" in text
    names_keys(text)


@pytest.mark.parametrize(
    "val, train",
    [
        ([9, 8, 7, 6.5, 6.4], [9, 8, 7, 6, 5]),  # both improve
        ([9, 7, 7.5, 7.1, 7.6], [9, 8, 7, 6, 5]),  # once worse, not twice in a row
        ([9, 7, 7.5, 7.6, 7.7], [9, 6, 6.5, 7, 8]),  # training got worse, too: it is no learning by heart
        ([9, 7], [9, 8]),
    ],
)
def test_other_evaluations_are_no_overfitting(val, train):
    assert evaluations(val, train) == []


def test_evaluations_without_the_two_losses_say_nothing():
    alarms = Alarms(About(), Memory())
    assert [alarms.evaluated(w, 1.0, {"val/AP": 0.5 - w / 1000}) for w in range(100, 500, 100)] == [[]] * 4


@pytest.mark.law9
@pytest.mark.parametrize(
    "about",
    [About(), About(batch_size=1, lr=1e-5), About(clip_norm=None), About(from_scratch=False), About(on_gpu=False)],
)
def test_a_healthy_history_is_silent(about):
    assert raised(run(3000), about) == []


@pytest.mark.law9
@pytest.mark.parametrize(
    "change",
    [
        lambda w: {"grad_norm": 5000.0} if w % 300 == 0 else {},  # one jump now and then is what clipping is for
        lambda w: {"loss": 60.0} if w % 200 == 0 else {},  # one odd window
        lambda w: losses(box_spread=2e-4) if w < 60 else {},  # every decoder begins like this
        lambda w: {"num_boxes": 0, "losses": {"loss_giou": 0.0, "class_error": 0.0}} if w % 2 else {},
        lambda w: {"lr": {"transformer": 1e-4, "heads": 1e-4}},  # a backbone frozen on purpose has no group
        lambda w: {"facts": {"cut_boxes": 1, "tiny_boxes": 5, "blank_images": 1}} if w % 3 == 0 else {},
        lambda w: NOT_FINITE if w == 500 else {},  # health speaks of it
    ],
    ids=["jumps", "odd loss", "young decoder", "half empty", "frozen backbone", "some dirt", "not finite"],
)
def test_what_healthy_runs_do_now_and_then_is_no_alarm(change):
    assert raised(run(1200, change)) == []


@pytest.mark.law9
def test_a_branch_that_begins_with_a_trained_model_is_no_divergence():
    assert raised(run(3400)[3000:], About(lr=1e-3)) == []


def test_a_high_rate_that_never_lets_the_loss_fall_is_named():
    stats = run(120, lambda w: {"loss": 45.0 if w > 1 else 47.0})
    ((at, title, text),) = raised(stats, HIGH)
    assert (at, title) == (100, "Diverged") and "began at 45" in text
    assert raised(stats, About()) == [], "at DETR's own rate a hundred windows are no judgement"


def test_waiting_says_nothing_on_a_cpu_that_it_shares_with_the_loader():
    assert raised(run(100, after(0, wait_seconds=0.9)), About(on_gpu=False)) == []


@pytest.mark.parametrize(
    ("spent", "workers", "words"),
    [
        (LoaderTime(8.0, 1.0, 0.5, 8), 4, ("reading a file takes 1000 ms", "data.cache=ram")),
        (LoaderTime(0.1, 4.0, 0.5, 8, 9, 1), 4, ("decoding takes 500 ms", "data.cache=disk")),
        (LoaderTime(0.1, 0.5, 1.5, 8), 1, ("1 loader process cannot keep up", "data.workers=7")),
        (LoaderTime(0.1, 0.5, 5.5, 8), 8, ("pixels takes most of their time",)),
    ],
)
def test_a_starved_device_names_what_the_loader_does_and_what_helps(spent, workers, words):
    """In the words of the doctor's verdict: one rule for both."""
    stats = run(60, after(0, wait_seconds=0.6, loader=spent, workers=workers))
    ((at, title, text),) = raised(stats, About(cores=8))
    assert (at, title) == (50, "Device waits for images") and "waits 60 % of the time" in text
    assert all(w in text for w in words), text
    names_keys(text)
    feed = feeding.Feed(0.6, spent.per_image(), 0.4, 8, workers, 8, False)
    assert feeding.judge(feed).text in text


@pytest.mark.parametrize(("prefetch", "words"), [(2, "data.prefetch=4 "), (6, "data.prefetch=12 "), (10, "10 micro-b")])
def test_no_fewer_micro_batches_are_proposed_than_are_kept_ready(prefetch, words):
    spent = LoaderTime(0.1, 0.2, 0.1, 8)
    ((_, _, text),) = raised(run(60, after(0, wait_seconds=0.6, loader=spent, workers=8, prefetch=prefetch)), About())
    assert words in text, text


@pytest.mark.parametrize(
    ("spent", "words", "never"),
    [
        (LoaderTime(0.0, 0.5, 0.5, 8, stream=0.5), ("62 ms an image", "data.hub.streaming=false"), "data.workers="),
        (LoaderTime(8.0, 1.0, 0.5, 8), ("reading a file takes 1000 ms",), "data.cache=ram"),
        (LoaderTime(0.1, 9.0, 0.5, 8, 99, 1), ("decoding takes most", "data.hub.streaming=false"), "smaller data.augm"),
    ],
)
def test_of_a_slow_stream_nothing_is_proposed_that_a_stream_refuses(spent, words, never):
    stats = run(60, after(0, wait_seconds=0.6, loader=spent, workers=8))
    ((_, _, text),) = raised(stats, About(cores=8, streamed=True))
    assert all(w in text for w in words) and never not in text, text
    names_keys(text)
    assert feeding.judge(feeding.Feed(0.6, spent.per_image(), 0.4, 8, 8, 8, False, streamed=True)).changes == {}


def test_what_goes_on_is_said_again_after_long_and_counted():
    said = raised(run(2600, after(0, facts={"cut_boxes": 9})), again_after=1000)
    assert [at for at, _, _ in said] == [3, 1003, 2003]
    assert "(time 2; in 1001 windows since window 3)" in said[1][2]


def test_what_comes_again_after_long_is_another_episode():
    def spikes(w):
        return {"loss": 60.0} if w in (150, 151, 152, 1950, 1951, 1952) else {}

    said = raised(run(2000, spikes), again_after=1000)
    assert [at for at, _, _ in said] == [152, 1952]
    assert "time 2" not in said[1][2]


def test_titles_that_are_off_do_not_speak():
    stats, about, more, _ = HISTORIES["Batch of one image"]
    assert raised(stats, about, off=["Batch of one image"], **more) == []
    recipe = recipes.loads("data: {format: shapes}\nalarms: {off: [Plateux]}")
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="alarms.off: no alarm is called 'Plateux'; there are: .*Plateau"):
        monitor.build_alarms(recipe, Memory(), 10, cpu)


def test_a_rule_that_fails_says_so_and_ends_nothing(monkeypatch):
    monkeypatch.setitem(alarm_rules.EVERY_WINDOW, "Tiny boxes", lambda now, past, about: 1 / 0)
    ((at, title, text),) = raised(run(10))
    assert (at, title) == (1, "Tiny boxes") and "ZeroDivisionError" in text and "alarms.off" in text


@pytest.mark.law2
@pytest.mark.parametrize("title", [t for t in HISTORIES if t not in machine_rules.MACHINE])
@pytest.mark.parametrize("stop", [1, 40, 101, 151, 152])
def test_a_resumed_run_raises_the_alarms_of_the_run_never_stopped(title, stop):
    stats, about, more, _ = HISTORIES[title]
    whole = raised(stats, about, **more)
    memory = Memory(**more)
    first = Alarms(about, memory)
    said = [(s.window, a.title, a.text) for s in stats[:stop] for a in first.judge(s)]
    kept = json.loads(json.dumps(asdict(memory)))
    [a for s in stats[stop : stop + 20] for a in first.judge(s)]  # these are lost with the process
    second = Alarms(about, Memory(**kept))
    said += [(s.window, a.title, a.text) for s in stats[stop:] for a in second.judge(s)]
    assert said == whole


def test_memory_is_bounded():
    memory = Memory()
    alarms = Alarms(About(), memory)
    for s in run(1500):
        alarms.judge(s)
    long = len(json.dumps(asdict(memory)))
    assert long < 40_000
    assert max(map(len, memory.recent.values())) <= alarm_rules.KEPT


@pytest.mark.parametrize("title", [t for t in HISTORIES if t not in machine_rules.MACHINE])
def test_a_log_of_every_window_is_judged_as_the_run_was(title):
    stats, about, more, _ = HISTORIES[title]
    rows = [{"window": s.window, "step": s.step, "epoch": s.epoch} | train_row(s) for s in stats]
    again = judge_rows(json.loads(json.dumps(rows)), about, **more)
    assert [(w, a.title) for w, a in again] == [(w, t) for w, t, _ in raised(stats, about, **more)]


def test_the_docs_have_a_row_for_every_alarm():
    text = (Path(__file__).parents[2] / "docs" / "not-learning.md").read_text()
    assert [title for title in TITLES if f"| `{title}` |" not in text] == []


@pytest.mark.law9
@pytest.mark.parametrize("told", [True, False])
def test_losses_from_before_the_weights_went_back_are_no_measure(told):
    """Back at earlier weights the training loss is what it was then; without a word of it, that is divergence."""
    memory, said = Memory(), []
    alarms = Alarms(PLAIN, memory)
    for stats in run(600):
        said += alarms.judge(stats)
    if told:
        memory.begin_anew()
    for stats in run(900, lambda w: {"loss": 2.5 * window(w).loss})[600:]:
        said += alarms.judge(stats)
    assert bool(said) != told, said


@pytest.mark.law9
def test_a_small_rtdetr_may_fit_its_images_in_ten_epochs():
    """rtdetr_tiny_cpu on 296 photographs of cards did, and found 71 AP of those that it had not seen."""
    perfect = run(400, lambda w: losses(loss_giou=0.06, class_error=0.0))
    assert [title for _, title, _ in raised(perfect, About(num_images=296))] == ["Too good too early"]
    assert raised(perfect, About(num_images=296, detector="RT-DETR")) == []


def test_a_schedule_that_ends_at_nothing_is_named_as_the_cause():
    still = run(1, lambda w: {"lr": {"backbone": 0.0, "heads": 0.0}})
    ((_, _, text),) = raised(still, About(lr=1e-3))
    assert "schedule.min_factor" in text
    ((_, _, text),) = raised(still, About(lr=0.0))
    assert "set optim.lr" in text
