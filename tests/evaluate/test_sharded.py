"""Law 5: one process = two processes = pycocotools; each image counts exactly once, or nobody gets a number."""

import json
import os
from pathlib import Path

import pytest
import warm
from shared import load_module

from detr_accel.evaluate.coco import NAMES

SCRIPT = Path(__file__).with_name("cases.py")
ROOT = Path(__file__).parents[2]

cases = load_module(SCRIPT)


def launch(out: Path, processes: int) -> list[dict]:
    """What each process wrote."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = warm.run([str(SCRIPT), str(out)], env=env, processes=processes if processes > 1 else 0)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one") / "out", 1)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two") / "out", 2)


def whole(result: dict) -> dict:
    return {k: v for k, v in result["whole"].items() if k != "kept"}


@pytest.mark.law5
def test_two_processes_equal_one_equal_pycocotools(one, two):
    assert [r["processes"] for r in two] == [2, 2]
    assert whole(one) == whole(two[0]) == whole(two[1])
    truth = json.loads(cases.COCO_FREE.read_text()) if cases.COCO_FREE.exists() else cases.nasty(0)
    theirs = cases.oracle(truth, cases.detect(truth, seed=1)).stats
    assert [whole(two[0])[name] for name in NAMES] == [None if v == -1 else v for v in theirs]
    assert whole(two[0])["num_images"] == len(truth["images"])


@pytest.mark.law5
def test_scoring_everywhere_gives_the_broadcast_result(two):
    for result in two:
        assert {k: v for k, v in result["scored everywhere"].items() if k != "kept"} == whole(result)


def test_kept_detections_reach_the_main_process(two):
    assert len(two[0]["whole"]["kept"]) == 2


@pytest.mark.law5
def test_an_image_counted_twice_is_refused_everywhere(one, two):
    for result in (one, *two):
        assert result["twice"].startswith("UserError: 4 of") and "evaluated twice" in result["twice"]


@pytest.mark.law5
def test_a_missing_image_is_refused_everywhere(one, two):
    for result in (one, *two):
        assert result["missing"].startswith("UserError") and "not evaluated" in result["missing"]


def test_a_failing_process_fails_all_instead_of_leaving_them_waiting(two):
    assert two[0]["failed"].startswith("UserError: prediction failed") and "ZeroDivisionError" in two[0]["failed"]
    assert two[1]["failed"].startswith("ZeroDivisionError"), "the process that failed raises its own error"
