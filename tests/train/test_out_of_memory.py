"""Law 4: running out of memory loses no sample and changes neither batch.size nor the result."""

from pathlib import Path

import pytest
import torch
from shared import load_module

from detr_accel import models
from detr_accel.monitor.memory import is_out_of_memory
from detr_accel.recipe import loads
from detr_accel.structures import Batch, Targets, UserError
from detr_accel.train import memory_fit
from detr_accel.train.checkpoint import State

inject = load_module(Path(__file__).with_name("injecting.py"))

AT = 3
PLACES = [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)]


def scenarios(processes: int) -> list[dict]:
    rows = [{"name": "clean", "faults": []}]
    rows.append({"name": "switched", "faults": [{"what": "smaller", "window": AT, "rank": "all", "to": 1}]})
    for way, micro in PLACES:
        for rank in range(processes):
            fault = {"what": f"oom {way}", "window": AT, "rank": rank, "micro": micro}
            rows.append({"name": f"{way}-{micro}-{rank}", "faults": [fault]})
    last = processes - 1
    twice = {"what": "oom forward", "window": AT, "rank": last, "times": 2}
    rows.append({"name": "twice", "faults": [twice]})
    rows.append({"name": "hopeless", "faults": [twice | {"times": 99}]})
    step = {"what": "oom step", "window": AT, "rank": last}
    rows.append({"name": "step", "faults": [step], "recipe": "checkpoint: {every_steps: 2, keep: 9}"})
    rows.append({"name": "step-early", "faults": [step | {"window": 0}]})
    rows.append({"name": "loader", "faults": [{"what": "loader", "window": AT, "rank": last}]})
    for kind in ("evaluation", "evaluation oom"):
        rows.append({"name": kind.replace(" ", "-"), "faults": [{"what": kind, "window": -1, "rank": last}]})
    rows.append({"name": "bug", "faults": [{"what": "error", "window": AT, "rank": last}]})
    return rows


@pytest.fixture(scope="module", params=inject.LAUNCHES)
def runs(request, tmp_path_factory):
    processes = inject.count(request.param)
    folder = tmp_path_factory.mktemp(f"memory{request.param}")
    return inject.launch(folder, request.param, scenarios(processes)), processes


@pytest.mark.law4
@pytest.mark.parametrize("way, micro", PLACES)
def test_the_window_is_trained_again_in_smaller_parts_bit_for_bit(runs, way, micro):
    folder, processes = runs
    for rank in range(processes):
        name = f"{way}-{micro}-{rank}"
        assert inject.outcome(folder, name) is None
        assert inject.differing(inject.weights(folder / name), inject.weights(folder / "switched")) == [], name
        assert inject.losses(folder / name) == inject.losses(folder / "switched")
        rows = [row for row in inject.rows(folder / name) if "train/loss" in row]
        assert [row["window"] for row in rows] == [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [row["data/num_images"] for row in rows] == [8, 8, 6, 8, 8, 6]
        assert rows[-1]["health/out_of_memory"] == 1


@pytest.mark.law4
def test_switching_changes_more_than_nothing(runs):
    folder, _ = runs
    assert inject.differing(inject.weights(folder / "switched"), inject.weights(folder / "clean"))


@pytest.mark.law4
def test_the_alarm_says_what_was_done_and_what_to_set(runs):
    folder, _ = runs
    (alarm,) = inject.rows(folder / "forward-0-0", "alarms.jsonl")
    assert alarm["window"] == AT + 1 and alarm["title"] == "Out of memory"
    for words in ("2 images", "trained again with 1", "batch.micro=1"):
        assert words in alarm["text"]


@pytest.mark.law4
def test_below_one_image_activations_are_computed_again(runs):
    folder, _ = runs
    alarms = inject.rows(folder / "twice", "alarms.jsonl")
    assert len(alarms) == 2 and "model.activation_checkpointing=[backbone]" in alarms[1]["text"]
    assert inject.losses(folder / "twice") == inject.losses(folder / "switched")


@pytest.mark.law4
def test_what_cannot_be_helped_ends_in_words_on_every_process(runs):
    folder, processes = runs
    for rank in range(processes):
        said = inject.outcome(folder, "hopeless", rank)
        assert "out of memory with one image" in said and "data.augment.scales" in said and "--resume" in said


@pytest.mark.law4
def test_half_a_step_goes_back_to_the_checkpoint_on_every_process(runs):
    folder, _ = runs
    rows = [row for row in inject.rows(folder / "step") if "train/loss" in row]
    assert rows[-1]["step"] < 6 and rows[-1]["window"] == 6
    (alarm,) = inject.rows(folder / "step", "alarms.jsonl")
    assert alarm["level"] == "ERROR" and "inside the optimizer's step" in alarm["text"] and "went back" in alarm["text"]
    after = inject.weights(folder / "step", "window-00000004")
    before = inject.weights(folder / "step", "window-00000003")
    assert inject.differing(after, before) == [], "the half step of window 4 left nothing"


def test_half_a_step_without_a_checkpoint_ends_in_words(runs):
    folder, processes = runs
    assert "no checkpoint to go back to" in inject.outcome(folder, "step-early", processes - 1)


@pytest.mark.parametrize("name, words", [("evaluation", "injected"), ("evaluation-oom", "lower evaluate.batch")])
def test_an_evaluation_that_fails_on_one_process_ends_all_and_saves_first(runs, name, words):
    folder, processes = runs
    said = [inject.outcome(folder, name, rank) for rank in range(processes)]
    assert all(words in text for text in said), said
    assert (folder / name / "checkpoints" / "last").readlink().name == "window-00000003"


@pytest.mark.parametrize("name, words", [("loader", "x.jpg cannot be decoded"), ("bug", "ZeroDivisionError: injected")])
def test_an_error_of_one_process_ends_all_in_the_same_words(runs, name, words):
    folder, processes = runs
    for rank in range(processes):
        assert words in inject.outcome(folder, name, rank)


@pytest.mark.parametrize("micro, smaller", [(8, [4, 2, 1]), (6, [3, 1]), (9, [3, 1]), (7, [1]), (1, [])], ids=str)
def test_smaller_sizes_divide_the_larger(micro, smaller):
    found = []
    while (micro := memory_fit.next_micro(micro)) is not None:
        found.append(micro)
    assert found == smaller


def test_cutting_again_gives_what_the_loader_would_have_given():
    def batch(start: int, stop: int) -> Batch:
        num = stop - start
        images = torch.arange(start, stop).view(-1, 1, 1, 1).expand(num, 3, 4, 4)
        targets = [
            Targets(i, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (4, 4), (4, 4)) for i in range(start, stop)
        ]
        return Batch(images, torch.zeros(num, 4, 4, dtype=torch.bool), targets, tuple(range(start, stop)))

    def cut(size: int) -> list[tuple[int, ...]]:
        return [batch(i, min(i + size, 14)).positions for i in range(0, 14, size)]

    for size, smaller in ((6, 3), (4, 2), (9, 3)):
        whole = [batch(i, min(i + size, 14)) for i in range(0, 14, size)]
        assert [b.positions for b in memory_fit.recut(whole, smaller)] == cut(smaller)
        assert all(
            (b.images[:, 0, 0, 0].tolist(), [t.image_id for t in b.targets]) == (list(b.positions),) * 2
            for b in memory_fit.recut(whole, smaller)
        )


def test_a_place_that_is_empty_stays_empty_where_the_loader_would_leave_it():
    no_boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    there = [8, 10, 11]  # of 8, 9, 10, 11
    targets = [Targets(i, *no_boxes, (4, 4), (4, 4)) for i in there]
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    whole = Batch(torch.zeros(3, 3, 4, 4), mask, targets, tuple(there), places=(0, 2, 3))
    assert [b.positions for b in memory_fit.recut([whole], 2)] == [(8,), (10, 11)]
    assert [b.positions for b in memory_fit.recut(memory_fit.recut([whole], 2), 1)] == [(8,), (10,), (11,)]
    assert [b.positions for b in memory_fit.recut([whole], 4)] == [(8, 10, 11)]


@pytest.mark.parametrize(
    "error, is_it",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_memory_is_told_from_other_errors(error, is_it):
    assert is_out_of_memory(error) == is_it


def test_room_is_made_step_by_step_until_nothing_is_left():
    text = "name: t\ndata: {format: shapes}\nmodel: {backbone: {name: test_resnet, weights: none}, hidden_dim: 32}"
    model = models.build(loads(text), 3)
    state = State(micro=4)
    told = []
    with pytest.raises(UserError, match="activation checkpointing on everything"):
        for _ in range(9):
            told.append(memory_fit.make_room(model, state))
    assert (state.micro, state.checkpointed) == (1, ["backbone", "encoder", "decoder"])
    assert len(told) == 5
