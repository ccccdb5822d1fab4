"""setup.cfg, constraints.txt, environment.yml, Makefile and accelerate_config.yaml say the same."""

import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ruamel.yaml import YAML
from setuptools import find_packages

from detr_accel.monitor import environment

ROOT = Path(__file__).resolve().parents[1]
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")
DECLARED = environment.declarations()
ALL = {**DECLARED.required, **{n: r for extra in DECLARED.extras.values() for n, r in extra.items()}}


def test_every_dependency_has_a_lower_bound_that_the_tested_version_meets():
    for name, requirement in ALL.items():
        lower, tested = environment.lower_bound(requirement), DECLARED.tested.get(name)
        assert lower, f"{name}: setup.cfg gives no lower bound"
        assert tested, f"{name}: not in constraints.txt"
        assert Version(tested) >= Version(lower), f"{name}: tested {tested} is below its own lower bound {lower}"


def test_the_documented_lower_bounds_are_those_of_setup_cfg():
    text = (ROOT / "docs/dependencies.md").read_text()
    rows = dict(re.findall(r"^\| ([\w.-]+) \| ([\d.]+) \| .+ \|$", text, re.MULTILINE))
    assert rows.pop("Python") == DECLARED.python
    bounds = {r.name: environment.lower_bound(r) for r in DECLARED.required.values()}
    assert rows == bounds and list(rows)[0] == "torch"
    assert not re.search(r"@\w+@", text), "a placeholder is left"


def test_every_dependency_is_imported_or_says_what_it_is_for():
    sources = "\n".join(p.read_text() for p in (ROOT / "detr_accel").rglob("*.py"))
    module = {name: {"pillow": "PIL"}.get(name, name.replace("-", "[._]")) for name in DECLARED.required}
    idle = [name for name in DECLARED.required if not re.search(rf"(import|from) {module[name]}\b", sources)]
    text = (ROOT / "setup.cfg").read_text()
    assert [n for n in idle if f"    # {n}: " not in text] == []


def test_the_constraints_are_exact_and_hold_everything_that_the_dependencies_bring():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert all("==" in x for x in lines) and lines == sorted(lines, key=str.lower)
    missing = _closure(set(ALL)) - set(DECLARED.tested)
    assert {m for m in missing if not m.startswith(("nvidia-", "cuda-"))} == set()


def _closure(names: set[str]) -> set[str]:
    seen: set[str] = set()
    while names - seen:
        name = (names - seen).pop()
        seen.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        parsed = [Requirement(line) for line in lines]
        names = names | {canonicalize_name(r.name) for r in parsed if not r.marker or r.marker.evaluate({"extra": ""})}
    return seen


def test_the_tested_extra_is_the_constraints_file():
    assert CONFIG["options.extras_require"]["tested"] == "file: constraints.txt"


def test_conda_installs_the_same_set_as_make():
    conda = YAML(typ="safe").load((ROOT / "environment.yml").read_text())
    plain = [d for d in conda["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    python = next(d.removeprefix("python=") for d in plain if d.startswith("python="))
    assert Version(python) >= Version(DECLARED.python) and {"pip", "git", "make"} <= set(plain)
    assert pip == ["--constraint constraints.txt", "--editable .[dev,plots]"]
    makefile = (ROOT / "Makefile").read_text()
    assert "--constraint constraints.txt --editable '.[dev,plots]'" in makefile


def test_make_sets_up_again_when_what_it_installs_changed():
    rule = next(x for x in (ROOT / "Makefile").read_text().splitlines() if x.startswith("$(STAMP):"))
    assert {"setup.cfg", "pyproject.toml", "constraints.txt"} <= set(rule.split())


def test_every_package_is_installed():
    listed = set(CONFIG["options"]["packages"].split())
    folders = {"detr_accel." + f.name for f in (ROOT / "detr_accel").iterdir() if any(f.glob("*.py"))}
    assert listed == {"detr_accel", "detr_accel.recipes"} | folders, "setup.cfg [options] packages names each folder"
    found = set(find_packages(ROOT, include=["detr_accel*"]))
    assert listed - {"detr_accel.recipes"} == found, "an __init__.py is missing"


def test_every_marker_of_the_laws_is_registered(pytestconfig):
    registered = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert {f"law{i}" for i in range(1, 10)} | {"parity", "slow", "gpu", "network"} <= registered


def test_the_launch_config_holds_launch_defaults_only():
    launch = YAML(typ="safe").load((ROOT / "accelerate_config.yaml").read_text())
    assert set(launch) == {
        "compute_environment", "distributed_type", "num_machines", "num_processes", "mixed_precision"
    }  # fmt: skip


def test_the_licence_is_whole_and_declared():
    text = (ROOT / "LICENSE").read_text()
    assert CONFIG["metadata"]["license"] == "Apache-2.0" and CONFIG["metadata"]["license_files"] == "LICENSE"
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text and len(text.split()) > 1500


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_trains_the_embedded_default_outside_the_tree(tmp_path):
    """A clean venv sees the wheel, and this environment's packages behind it, so that nothing is downloaded."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    tree = tmp_path / "tree"
    done = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=True, text=True)
    for name in filter(None, done.stdout.split("\0")):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    _run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree])
    wheel = next(tmp_path.glob("detr_accel-*.whl"))
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    _run([python, "-m", "pip", "install", "--no-deps", "--no-index", wheel])
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (site / "tested.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))

    shipped = {p.name for p in (ROOT / "recipes").glob("*.yaml")}
    listed = _run([python.parent / "detr-accel", "recipes"], cwd=tmp_path)
    assert all(name in listed for name in shipped) and str(site) in listed
    assert "torch" in _run([python.parent / "detr-accel", "doctor", "--env", "--offline"], cwd=tmp_path)
    probe = "from detr_accel.monitor.environment import declarations as d; print(len(d().tested), *sorted(d().extras))"
    assert _run([python, "-c", probe], cwd=tmp_path).split() == [str(len(DECLARED.tested)), "dev", "plots"]

    small = ["schedule.steps=2", "data.shapes.num_train=16", "data.shapes.num_val=4", "data.workers=0", "name=wheel"]
    _run([python.parent / "detr-accel", "train", *small], cwd=tmp_path)
    assert (tmp_path / "runs/wheel/checkpoints/last").exists()
    assert '"done"' in (tmp_path / "runs/wheel/status.json").read_text()


def _run(command, cwd=None) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
