"""``--rehearse``: a healthy recipe is safe to leave; with one thing broken, that thing is named, with exit code 1."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from safetensors.torch import save_file
from shared import load_module

from detr_accel import cli, data
from detr_accel import recipe as recipes
from detr_accel.data import look
from detr_accel.structures import Detections
from detr_accel.train import rehearsal_compare, rehearsal_overfit, rehearsal_process
from detr_accel.train.rehearsal_process import Child, Starter, Trouble

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).with_name("rehearsal_faults.py")
runs = load_module(ROOT / "tests" / "integration" / "runs.py")
PLAIN = Starter.as_started
SHAPES = ["--recipe", str(ROOT / "recipes/detr_shapes.yaml"), *runs.TINY, "device=cpu", "name=r"]


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A small COCO folder of shapes, written as files."""
    folder = tmp_path_factory.mktemp("coco") / "data"
    runs.coco_folder(folder, 12, 5, "{split}-{number}.png", empty_fraction=0.0)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dirty(place, coco):
    """A copy of the COCO folder, to be broken."""
    shutil.copytree(coco, place / "data")
    return place / "data"


COCO = [*(a for a in SHAPES if not a.startswith("data.shapes")), "data.format=coco", "data.root=data"]


def rehearse(capsys, *arguments: str, minutes: float = 0.05) -> tuple[int, str]:
    """Exit code and last words; with everything said on failure of the test."""
    with pytest.MonkeyPatch.context() as patch:
        if Starter.as_started == PLAIN:
            start_as(patch, ["-m", "detr_accel.cli", "train"])
        code = cli.main(["train", "--rehearse", "--rehearse-minutes", str(minutes), *arguments])
    said = capsys.readouterr()
    print(said.out, said.err)
    verdict = [line for line in said.out.splitlines() if line.startswith(("safe", "not safe"))]
    assert len(verdict) == 1, "one verdict, whatever happens"
    return code, verdict[0]


def refused(result: tuple[int, str], *words: str) -> None:
    code, verdict = result
    assert code == 1 and verdict.startswith("not safe to leave: "), verdict
    for word in words:
        assert word in verdict


def broken(monkeypatch, fault: str, python: list[str] | None = None) -> None:
    """The children are started with a fault in them."""
    start_as(monkeypatch, [str(FAULTS)], python, FAULT=fault)


def start_as(monkeypatch, program: list[str], python: list[str] | None = None, **env: str) -> None:
    """The children are another program, started warm if no ``python`` is named."""

    def kill(child: Child) -> None:
        plain_kill(child)
        warm.settle()

    plain_kill = Child.kill
    monkeypatch.setattr(Child, "kill", kill)
    starter = Starter([*(python or warm.python()), *program], PLAIN().env | env)
    monkeypatch.setattr(Starter, "as_started", classmethod(lambda cls: starter))


def change(json_path: Path, action) -> None:
    tree = json.loads(json_path.read_text())
    action(tree)
    json_path.write_text(json.dumps(tree))


# --- nothing is broken


@pytest.mark.slow  # tests/test_docs.py rehearses a healthy recipe, too
@pytest.mark.timeout(600)
def test_a_healthy_recipe_is_safe_to_leave_and_leaves_no_trace(place):
    done = runs.launch(
        place, *SHAPES[2:], "--rehearse", "--rehearse-minutes", "0.2", "log.wandb.enabled=true", timeout=590
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    *stages, verdict = done.stdout.splitlines()
    assert verdict.startswith("safe to leave") and "training will finish about 20" in verdict
    for words in (
        "first 3 windows read (22 images", "22 of 22 training and 7 of 7 validation images decoded", "peak",
        "boxes of 8 images found", "SIGKILL", "bit for bit the run that was not killed", "rows in the file",
    ):  # fmt: skip
        assert any(words in line for line in stages), words
    assert list((place / "runs").iterdir()) == [], "neither the rehearsal's folder nor the run's"


@pytest.mark.slow
def test_two_processes_rehearse_as_one_launch(place):
    arguments = [*SHAPES[2:], "--rehearse", "--rehearse-minutes", "0.3"]
    done = runs.launch(place, *arguments, launcher=[*runs.REAL, "2"], timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("safe to leave") == 1 and "2 processes" in done.stdout
    assert "bit for bit the run that was not killed" in done.stdout


RTDETR = [
    "model.name=rtdetr", "model.backbone.name=test_efficientnet", "model.hidden_dim=32", "model.rtdetr.encoder_dim=32",
    "model.rtdetr.encoder_feedforward=64", "model.rtdetr.num_blocks=1", "model.rtdetr.num_denoising=20",
    "model.backbone.dc5=false",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rtdetr_rehearses_every_stage(place):
    """In this time the boxes are not all found; every part moves and every term falls."""
    done = runs.launch(place, *SHAPES[2:], *RTDETR, "--rehearse", "--rehearse-minutes", "0.5", timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    *stages, verdict = done.stdout.splitlines()
    assert verdict.startswith("safe to leave"), verdict
    (line,) = [s for s in stages if " overfit " in s]
    assert "class_error" in line and "loss_giou" in line
    assert any("bit for bit the run that was not killed" in s for s in stages)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_boxes_are_found_by_a_recipe_that_learns(place, capsys):
    arguments = [*SHAPES[:2], "device=cpu", "name=r", "log.wandb.enabled=false"]
    assert cli.main(["train", "--rehearse", "--rehearse-minutes", "5", *arguments]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if " overfit " in line]
    hits, _, boxes, *_ = line.split("s  ")[1].split()
    assert int(hits) >= 0.9 * int(boxes), line
    assert "warning" not in said


# --- wrong use


def test_wrong_use_is_code_2(place, capsys):
    assert cli.main(["train", "--rehearse", "--resume", *SHAPES]) == 2
    assert cli.main(["train", "--rehearse", "--rehearse-minutes", "0", *SHAPES]) == 2
    assert cli.main(["train", "--rehearse", *SHAPES, "optim.lrr=1"]) == 2
    assert "fresh start" in capsys.readouterr().err and not (place / "runs" / "r").exists()


def test_several_processes_without_the_launcher_are_refused(place, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cli.main(["train", "--rehearse", *SHAPES]) == 2
    assert "accelerate launch" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "--rehearse", *SHAPES]) == 0, "the others leave at once"


# --- one thing broken: before anything is started


def test_a_run_that_is_already_there(place, capsys):
    (place / "runs/r/checkpoints/window-00000003").mkdir(parents=True)
    before = sorted(p for p in (place / "runs/r").rglob("*"))
    refused(rehearse(capsys, *SHAPES), "launch: runs/r already holds a run", "--resume")
    assert sorted(p for p in (place / "runs/r").rglob("*")) == before


def test_a_run_that_is_being_written(place, capsys):
    code = "import sys, time; from detr_accel.train.run_folder import RunFolder; from pathlib import Path\n"
    code += "run = RunFolder(Path('runs/r')); run.acquire(); print('held', flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as other:
        assert other.stdout.readline() == b"held\n"
        before = (place / "runs/r/lock").read_text()
        try:
            refused(rehearse(capsys, *SHAPES), "launch: runs/r is being written by another process")
        finally:
            other.kill()
    assert (place / "runs/r/lock").read_text() == before


def test_a_runs_folder_that_cannot_be_written(place, capsys):
    refused(rehearse(capsys, *SHAPES, "--runs", "/proc/nothing"), "cannot write in the run folder", "--runs")


def test_wandb_online_without_a_key(place, capsys, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(place / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(place))
    more = ["log.wandb.enabled=true", "log.wandb.mode=online"]
    refused(rehearse(capsys, *SHAPES, *more), "launch: W&B is asked to be online, but there is no key", "wandb login")


def test_a_forgotten_launcher_config(place):
    (place / "hf" / "accelerate").mkdir(parents=True)
    (place / "hf" / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\nnum_processes: 1\n"
    )
    done = runs.launch(place, *SHAPES[2:], "--rehearse", launcher=[])
    assert done.returncode == 1
    (verdict,) = [line for line in done.stdout.splitlines() if "safe to leave" in line]
    assert verdict.startswith("not safe to leave: launch: the default config") and "chooses precision bf16" in verdict


# --- one thing broken: the data


def test_a_missing_image(dirty, capsys):
    (dirty / "train" / "train-3.png").unlink()
    found = rehearse(capsys, *COCO)
    refused(found, "data: ", "1 of 12 training images cannot be read", "train-3.png", "put whole files in their places")


@pytest.mark.parametrize("split, words", [("train", "cannot be decoded"), ("val", "validation images cannot be read")])
def test_a_truncated_image(dirty, capsys, split, words):
    file = dirty / split / f"{split}-2.png"
    file.write_bytes(file.read_bytes()[:-900])
    refused(rehearse(capsys, *COCO), "data: ", words, f"{split}-2.png")


def test_boxes_in_another_format(dirty, capsys):
    def corners(tree):
        for a in tree["annotations"]:
            x, y, w, h = a["bbox"]
            a["bbox"] = [x, y, x + w, y + h]

    change(dirty / "annotations/instances_train.json", corners)
    found = rehearse(capsys, *COCO)
    refused(found, "data: ", "instances_train.json", "the boxes look like [x1, y1, x2, y2]", "leave their images")


def test_classes_that_do_not_match(dirty, capsys):
    change(dirty / "annotations/instances_val.json", lambda t: t["categories"][0].update(name="disc"))
    refused(rehearse(capsys, *COCO), "data: ", "other categories than the training json", "'circle'", "'disc'")


def test_black_images(dirty, capsys):
    for file in (dirty / "train").iterdir():
        Image.new("RGB", Image.open(file).size).save(file)
    refused(rehearse(capsys, *COCO), "data: 12 of 12 training images are of one colour")


def test_a_loader_process_that_dies(place, capsys, monkeypatch):
    broken(monkeypatch, "worker_dies")
    refused(rehearse(capsys, *SHAPES), "data: a loader process was ended from outside", "data.workers")


@pytest.mark.parametrize("fault, words", [("box_format", "target boxes"), ("shifted_labels", "target labels")])
def test_targets_that_are_not_the_annotations(place, capsys, monkeypatch, fault, words):
    broken(monkeypatch, fault)
    refused(rehearse(capsys, *SHAPES), f"data: the {words} of image 'shapes/train/0' are not its annotations'")


# --- one thing broken: the machine


def test_a_disk_too_small_for_what_is_to_come(place, capsys):
    (place / "small").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place / "small")])
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        found = rehearse(capsys, *SHAPES, "--runs", "small")
    finally:
        subprocess.run(["umount", "--lazy", str(place / "small")], check=True)
    refused(found, "disk: 5 checkpoints of 7 MiB at a time", "small has", "lower checkpoint.keep")


def test_a_cache_without_room(place, capsys):
    large = ["data.shapes.image_size=2048", "data.shapes.num_train=20000", "data.augment.scales=[2048]"]
    found = rehearse(capsys, *SHAPES, *large, "data.augment.max_size=2048", "data.cache=ram")
    refused(found, "data: data.cache=ram needs", "GiB and memory has", "data.cache=disk or none")


@pytest.mark.parametrize("micro", ["auto", "4"])
def test_a_window_that_does_not_fit_into_memory(place, capsys, micro):
    found = rehearse(capsys, *SHAPES, f"batch.micro={micro}", "batch.memory_fraction=1e-5")
    refused(found, "memory: the worst window (", "may be used: lower batch.micro")


def test_a_process_that_is_ended_from_outside(place, capsys, monkeypatch):
    broken(monkeypatch, "killed")
    refused(rehearse(capsys, *SHAPES), "start: the process was ended from outside (SIGKILL)", "lack of memory")


def test_something_that_hangs_is_ended(place):
    starter = Starter(
        [sys.executable, "-c", "import time; print('reading', flush=True); time.sleep(600)"], dict(os.environ)
    )
    with Child(starter, [], place / "log.txt") as child, pytest.raises(Trouble, match="nothing was heard.*reading"):
        child.wait("data", [], silence_s=1.5)
    assert not child.running


@pytest.mark.slow
def test_weights_that_are_not_there(place, capsys):
    refused(rehearse(capsys, *SHAPES, "model.init_from=nowhere"), "model: ", "nowhere")


# --- one thing broken: learning


def test_a_learning_rate_of_0(place, capsys):
    refused(rehearse(capsys, *SHAPES, "optim.lr=0"), "overfit: the learning rate of transformer and heads is 0", "1e-4")


@pytest.mark.parametrize(
    "fault, words",
    [("dead_head", "class_embed is dead: none of its weights is trained"), ("cut_off_head", "bbox_embed is dead")],
)
def test_a_dead_head(place, capsys, monkeypatch, fault, words):
    broken(monkeypatch, fault)
    refused(rehearse(capsys, *SHAPES), f"overfit: {words}")


def test_a_loss_that_is_not_finite(place, capsys, monkeypatch):
    broken(monkeypatch, "nan_loss")
    refused(rehearse(capsys, *SHAPES), "overfit: overfit, step 1: the predictions for image", "not finite", "optim.lr")


def test_an_evaluation_that_does_not_fit(place, capsys, monkeypatch):
    broken(monkeypatch, "evaluation")
    refused(rehearse(capsys, *SHAPES), "evaluation ran out of memory: lower evaluate.batch")


@pytest.mark.slow
def test_a_learning_rate_that_diverges(place, capsys):
    found = rehearse(capsys, *SHAPES, "optim.lr=1e3", "optim.clip_norm=null", minutes=1)
    refused(found, "overfit: ")


# --- one thing broken: going on


@pytest.mark.slow
def test_a_checkpoint_that_a_run_cannot_go_on_from(place, capsys, monkeypatch):
    broken(monkeypatch, "forgetful_checkpoint", [sys.executable])  # forked from a warm one, torch's thread pool is lost
    found = rehearse(capsys, *SHAPES)
    refused(found, "resume: ", "tensors differ from the run that was not killed")
    assert list(place.glob("runs/.rehearsal-r/**/checkpoints")) == [], "the weights go, the words stay"
    assert (place / "runs/.rehearsal-r/killed/output.txt").exists()


# --- the parts


@pytest.mark.parametrize("text", ["format: shapes, shapes: {num_val: 9}", "root: {root}", "root: {root}/train"])
def test_a_part_of_the_validation_split_is_its_first_images(coco, text):
    one_json = coco / "train" / "labels.json"  # "root: .../train" has a single json, which is cut in two
    shutil.copy(coco / "annotations/instances_train.json", one_json)
    recipe = recipes.loads(f"data: {{{text.replace('{root}', str(coco))}, val_fraction: 0.5}}")
    whole, part = data.build(recipe), data.build(recipe, None, 3)
    one_json.unlink()
    assert len(part.val) == 3 < len(whole.val) and part.train.fingerprint() == whole.train.fingerprint()
    assert part.split_json == whole.split_json
    kept = [part.val.image_id(i) for i in range(3)]
    assert kept == [whole.val.image_id(i) for i in range(3)]
    truth, all_truth = part.val.ground_truth(), whole.val.ground_truth()
    assert truth["images"] == all_truth["images"][:3] and truth["categories"] == all_truth["categories"]
    bare = [{k: v for k, v in a.items() if k != "id"} for a in truth["annotations"]]
    wanted = [{k: v for k, v in a.items() if k != "id"} for a in all_truth["annotations"] if a["image_id"] in kept]
    assert bare == wanted
    for i in range(3):
        assert np.array_equal(part.val.sample(i).image, whole.val.sample(i).image)


@pytest.mark.parametrize("name, kind", [("[x1", "xyxy"), ("[centre", "cxcywh"), ("[y, x", "yxhw"), ("", "xywh")])
def test_box_formats_are_told_apart(name, kind):
    rng = np.random.default_rng(0)
    sizes = np.tile([480, 640], (500, 1))
    wh = rng.uniform(20, 200, (500, 2))
    xy = rng.uniform(0, 1, (500, 2)) * (np.array([640, 480]) - wh)
    written = {
        "xywh": np.hstack((xy, wh)), "xyxy": np.hstack((xy, xy + wh)), "cxcywh": np.hstack((xy + wh / 2, wh)),
        "yxhw": np.hstack((xy, wh))[:, [1, 0, 3, 2]],
    }  # fmt: skip
    found = look.box_format(written[kind], sizes)
    assert (found is None) == (kind == "xywh")
    if found is not None:
        assert found.bad and f"read as {name}" in found.text
    fractions = look.box_format(written[kind] / 640, sizes)
    assert fractions.bad and "fractions of the image" in fractions.text


@pytest.mark.parametrize("name", ["bccd", "cards", "coco_free"])
def test_people_s_own_boxes_are_told_from_the_same_in_another_format(name):
    root = ROOT.parent / "shared" / "data" / name
    if not root.is_dir():
        pytest.skip(f"no data set at ../shared/data/{name}")
    splits = data.build(recipes.loads(f"data: {{root: {root}}}"))
    assert [*look.boxes(splits.train), *look.boxes(splits.val)] == []
    boxes, sizes, _, _ = splits.train.written()
    corner, wh = boxes[:, :2], boxes[:, 2:]
    for words, other in {
        "[x1, y1, x2, y2]": np.hstack((corner, corner + wh)), "[centre x": np.hstack((corner + wh / 2, wh)),
        "[y, x, height, width]": boxes[:, [1, 0, 3, 2]], "fractions": boxes / np.tile(sizes[:, ::-1], 2),
    }.items():  # fmt: skip
        found = look.box_format(other, sizes)
        assert found.bad and words in found.text, found


def test_a_few_boxes_over_the_border_are_no_reason():
    boxes = np.tile([10.0, 10.0, 50.0, 50.0], (100, 1))
    boxes[:5, 2] = 900
    found = look.box_format(boxes, np.tile([480, 640], (100, 1)))
    assert not found.bad and found.text.startswith("5 of 100 boxes")


def test_a_box_is_found_by_class_place_and_score_and_once():
    def found(scores, labels, boxes):
        return Detections(1, np.array(scores, np.float32), np.array(labels), np.array(boxes, np.float32))

    boxes, ids, table = np.array([[0, 0, 10, 10], [20, 20, 30, 30.0]]), np.array([7, 9]), (7, 9)
    right = [[0, 0, 10, 10], [20, 20, 30, 30]]
    assert rehearsal_overfit.count_found(found([0.9, 0.8], [0, 1], right), boxes, ids, table) == 2
    assert rehearsal_overfit.count_found(found([0.9, 0.8], [1, 0], right), boxes, ids, table) == 0, "the wrong class"
    assert rehearsal_overfit.count_found(found([0.9, 0.4], [0, 1], right), boxes, ids, table) == 1, "a low score"
    assert rehearsal_overfit.count_found(found([0.9, 0.8], [0, 0], [right[0]] * 2), boxes, ids, table) == 1, "only once"


def test_the_launchers_own_port_is_not_used_twice():
    flags = ["--num_processes", "2", "--main_process_port", "29500", "--main-process-port=1", "--multi_gpu"]
    assert rehearsal_process._without_port(flags) == ["--num_processes", "2", "--multi_gpu"]


@pytest.mark.parametrize("after, words", [(2.01, None), (2.2, "differs by 10.0% from what it was before the kill")])
def test_where_kernels_are_not_deterministic_a_resume_is_compared_with_the_killed_run(tmp_path, after, words):
    """Two trainings on a GPU part before any kill: the whole run's loss (here 3) says nothing."""
    for name, loss in (("whole", 3.0), ("resumed", after)):
        (tmp_path / name / "checkpoints" / "last").mkdir(parents=True)
        row = {"window": 5, "train/loss": loss}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        save_file({"w": torch.tensor([loss])}, tmp_path / name / "checkpoints" / "last" / "raw.safetensors")

    def compare():
        return rehearsal_compare.compare(tmp_path / "whole", tmp_path / "resumed", 4, exact=False, loss=2.0)

    if words is None:
        assert "not bit for bit" in compare()[0]
    else:
        with pytest.raises(Trouble, match=words):
            compare()
