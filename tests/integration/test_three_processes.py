"""Eight images a step on three processes, which no division makes even: a real run, as a person launches it."""

import json
from pathlib import Path

import pytest
from shared import load_module

runs = load_module(Path(__file__).parent / "runs.py")
DETR = ["--recipe", str(runs.ROOT / "recipes" / "detr_shapes.yaml")]
SHORT = ["data.shapes.num_train=8", "data.shapes.num_val=4", "data.workers=0", "schedule.epochs=1", "ema.enabled=false"]
# LayerNorm: the batch statistics of a live BatchNorm would be the layout's, the exception of law 1
SAME = ["model.backbone.name=convnext_atto", "model.dropout=0"]


@pytest.mark.law1
def test_eight_images_on_three_processes_are_the_window_of_one_process(tmp_path):
    rows = {}
    for processes in (1, 3):
        arguments = [*DETR, *runs.TINY, *SHORT, *SAME, f"name=on{processes}"]
        done = runs.launch(tmp_path, *arguments, processes=processes)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        run = tmp_path / "runs" / f"on{processes}"
        assert json.loads((run / "status.json").read_text())["state"] == "done"
        (rows[processes],) = [r for r in runs.rows(run / "metrics.jsonl") if "train/loss" in r]
    numbers = [k for k, v in rows[1].items() if isinstance(v, int | float)]
    assert "train/loss" in numbers and any("grad_norm" in k for k in numbers)
    # float32, and sums in another order
    assert {k: rows[3][k] for k in numbers} == pytest.approx({k: rows[1][k] for k in numbers}, rel=1e-3)
