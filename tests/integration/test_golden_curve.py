"""The embedded default's first losses stay what they were: a change of numbers does not slip in with something else."""

import json
from pathlib import Path

import pytest
from shared import load_module

golden = load_module(Path(__file__).with_name("golden_curve.py"))


@pytest.mark.parametrize("recipe", golden.RECIPES)
def test_the_first_losses_of_shapes_are_the_golden_ones(recipe, tmp_path):
    wanted = json.loads(golden.GOLDEN.read_text(encoding="utf-8"))[recipe]
    losses = golden.curve(recipe, tmp_path)
    assert len(losses) == len(wanted) == golden.STEPS
    assert losses[:5] == pytest.approx(wanted[:5], rel=1e-3)
    assert losses == pytest.approx(wanted, rel=2e-2)
    assert len(set(losses)) == golden.STEPS, "every window is another one"
