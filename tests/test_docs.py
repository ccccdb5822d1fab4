"""The commands of the README and of docs/, run one after the other as they stand.

Each line of a ```sh block is either run here or listed below with the reason why not. Training commands get a tiny
detector appended, and a small folder in COCO's layout stands for COCO: the test has seconds where a person has hours.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from shared import load_module

runs = load_module(Path(__file__).parent / "integration/runs.py")
hub_sets = load_module(Path(__file__).parent / "data/hub_sets.py")
ROOT = runs.ROOT

LAUNCHER = Path(__file__).with_name("launch_here.py")
TEXTS = [
    "README.md", "docs/own-data.md", "docs/nan.md", "docs/not-learning.md", "docs/out-of-memory.md", "docs/resume.md",
    "docs/overfitting.md", "docs/speed.md", "docs/rehearsal.md", "docs/augmentation.md",
]  # fmt: skip
NOT_RUN = {
    "data.hub.name=USER/SET": "needs the network; tests/data/test_hub.py holds the refusal without one",
    "make train": "installs the whole environment; .ci/run does",
    "make test": "this is it",
    "source .venv/bin/activate": "the environment of this test is another",
    "detr-r101-2c7b67e5.pth": "released weights need the network; tests/models/test_convert.py holds the conversion",
    "rtdetrv2_r101vd_6x_coco.pth": "likewise; tests/models/test_rtdetr_convert.py holds the conversion",
    "detr-accel fetch": "needs the network; its refusal without one is tested in tests/models/test_convert.py",
}
HERE = {"/data/coco": "mine"}  # what a text calls it -> the folder of the same layout that is here
SMALL = [a for a in runs.TINY if not a.startswith(("data.shapes", "ema"))] + [
    "model.init_from=null", "model.backbone.name=resnet18", "model.backbone.weights=none",
    "data.augment.max_size=96", "data.eval_max_size=96",
    "data.augment.crop=0", "schedule.steps=2", "schedule.warmup_steps=0",
]  # fmt: skip


def commands(path: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


# through `accelerate launch` itself; the others start warm, which torch's thread pool does not always survive in `plan`
BY_DEFAULT = ("README.md",)  # the others are left to the slow tests: five minutes in all
REAL = ("README.md", "docs/rehearsal.md", "docs/out-of-memory.md")


@pytest.fixture
def place(tmp_path, name):
    """A copy of the checkout's top level, with the data sets that the texts speak of."""
    folder = tmp_path
    for name in ("train.py", "accelerate_config.yaml", "recipes"):
        source = ROOT / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    runs.coco_folder(folder / "mine")
    runs.coco_folder(folder / "other-folder")
    hub_sets.parquet(folder / "mine", folder / "hub-set", shards=4)
    shutil.copytree(folder / "mine" / "val", folder / "photos")
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    python = [sys.executable] if name in REAL else warm.python()
    launcher = ["-m", "accelerate.commands.accelerate_cli"] if name in REAL else [str(LAUNCHER)]
    for program, module in (("accelerate", launcher), ("detr-accel", ["-m", "detr_accel.cli"])):
        script = bin_folder / program
        script.write_text(f"#!/bin/sh\nexec {shlex.join([*python, *module])} \"$@\"\n")
        script.chmod(0o755)
    return folder


def run(place: Path, command: str) -> None:
    for theirs, ours in HERE.items():
        command = command.replace(theirs, ours)
    if "doctor recipes" in command:
        command += " --seconds 1 schedule.steps=40"
    if "train.py" in command or "doctor recipes" in command:
        said = {word.partition("=")[0] for word in command.split()}
        command += " --rehearse-minutes 0.05" if "--rehearse" in command else ""
        command += " " + " ".join(f"'{a}'" for a in SMALL if a.partition("=")[0] not in said)
    env = {
        **os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true", "MASTER_PORT": "0", "HF_DATASETS_CACHE": str(place / "cache"),
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", command], cwd=place, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [n if n in BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in TEXTS])
def test_the_commands_run_as_they_stand(place, name):
    found = commands(ROOT / name)
    assert found
    for command in found:
        if not any(part in command for part in NOT_RUN):
            run(place, command)


def test_every_reason_not_to_run_belongs_to_a_command():
    found = [command for name in TEXTS for command in commands(ROOT / name)]
    assert [part for part in NOT_RUN if not any(part in command for command in found)] == []


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target
