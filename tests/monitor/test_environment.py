"""doctor --env: what is installed against what was tested, in words; never hanging without a network."""

import json
import time

import pytest

from detr_accel.monitor import environment
from detr_accel.monitor.environment import explain_gpu, judge, report, system_gpus


@pytest.mark.parametrize(
    "installed, tested, lower, newest, ok, words",
    [
        ("2.14.1", "2.14.1", "2.6", None, True, ""),
        ("2.14.1+cu130", "2.14.1", "2.6", None, True, ""),  # a local build of the tested version
        ("2.5.0", "2.14.1", "2.6", None, False, "too old: pip install 'torch==2.14.1'"),
        ("2.15.0", "2.14.1", "2.6", None, True, "newer than tested; if something breaks: pip install 'torch==2.14"),
        ("2.10.0", "2.14.1", "2.6", "2.14.1", True, "older than tested; if something breaks: pip install 'torch==2"),
        (None, "2.14.1", "2.6", None, False, "missing: pip install 'torch==2.14.1'"),
        ("2.14.1", "2.14.1", "2.6", "2.15.0", True, "2.15.0 is out: pip install 'torch==2.15.0', run the tests"),
    ],
)
def test_each_difference_says_what_to_do(installed, tested, lower, newest, ok, words):
    verdict, advice = judge("torch", "", installed, tested, lower, newest)
    assert verdict == ok and (advice.startswith(words) if words else advice == "")


def test_a_missing_extra_is_no_fault():
    ok, advice = judge("matplotlib", "plots", None, "3.11.2", "3.8", None)
    assert ok and advice == "optional: pip install 'detr-accel[plots]'"


def test_the_report_lists_every_dependency_with_its_three_versions():
    found = report()
    rows = {row.name: row for row in found.rows}
    assert {"torch", "torchvision", "accelerate", "timm", "matplotlib", "transformers"} <= set(rows)
    declared = environment.declarations()
    assert rows["torch"].tested == declared.tested["torch"] and rows["torch"].lower == "2.6"
    assert all(row.newest is None for row in found.rows)
    table = found.table()
    assert all(name in table for name in rows) and "python 3." in table and "device:" in table
    assert {r["name"] for r in json.loads(json.dumps(found.to_json()))["rows"]} == set(rows)


def test_checkout_and_wheel_metadata_declare_the_same(monkeypatch):
    """A wheel carries the requirements as metadata lines with extra markers, the tested set as one of the extras."""
    checkout = environment.declarations()
    lines = [str(r) for r in checkout.required.values()]
    lines += [f'{r}; extra == "{e}"' for e, group in checkout.extras.items() for r in group.values()]
    lines += [f'{name}=={version}; extra == "tested"' for name, version in checkout.tested.items()]
    monkeypatch.setattr(environment.importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(environment.importlib.metadata, "metadata", lambda name: {"Requires-Python": ">=3.11"})
    wheel = environment._from_metadata()
    assert wheel.python == checkout.python and wheel.tested == checkout.tested
    assert set(wheel.required) == set(checkout.required)
    assert {e: set(g) for e, g in wheel.extras.items()} == {e: set(g) for e, g in checkout.extras.items()}


def test_without_a_network_it_says_so_and_does_not_hang(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    began = time.monotonic()
    found = report(check_network=True)
    assert any("offline" in note for note in found.notes) and all(row.newest is None for row in found.rows)
    assert time.monotonic() - began < environment.RELEASE_TIMEOUT_S + 30


def test_a_newer_release_on_the_index_is_listed(monkeypatch, tmp_path):
    (tmp_path / "tqdm").mkdir()
    link = '<a href="tqdm-999.0-py3-none-any.whl">tqdm-999.0-py3-none-any.whl</a>'
    (tmp_path / "tqdm/index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    found = report(check_network=True)
    row = next(r for r in found.rows if r.name == "tqdm")
    assert row.newest == "999.0" and "999.0 is out" in row.advice
    assert "newer releases: tqdm 999.0" in found.notes


@pytest.mark.network
def test_the_real_index_answers():
    notes = report(check_network=True).notes
    assert any(n.startswith("newer releases:") and "not known" not in n for n in notes)


# --- the GPU that torch cannot use


def test_a_gpu_is_seen_through_the_driver(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    card = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA Test 9000\nIRQ: 1\n")
    assert system_gpus(tmp_path) == ["NVIDIA Test 9000"]


def test_a_host_gpu_that_is_not_passed_into_the_container_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    card = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: NVIDIA Test 9000\n")
    assert system_gpus(tmp_path) == []


@pytest.mark.parametrize(
    "cuda, visible, words",
    [
        (None, None, "is a build without CUDA; install one with it"),
        ("13.0", None, "update the NVIDIA driver"),
        ("13.0", "7", "CUDA_VISIBLE_DEVICES is '7'"),
    ],
)
def test_the_remedy_follows_the_cause(cuda, visible, words):
    sentence = explain_gpu(["NVIDIA Test 9000"], "2.14.1", cuda, visible, "")
    assert words in sentence and "NVIDIA Test 9000" in sentence and sentence.endswith("device=cpu")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hiding_the_gpus_on_purpose_is_no_trouble(hidden):
    assert environment.gpu_trouble({"CUDA_VISIBLE_DEVICES": hidden}) is None
