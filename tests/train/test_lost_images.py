"""A file that goes away in the middle of a run empties its place in the window, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from shared import load_module

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.data import sampler
from detr_accel.structures import UserError
from detr_accel.train import loop, parts
from detr_accel.train.launch import make_accelerator
from detr_accel.train.loop import train

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.law8


inject, injected = (load_module(Path(__file__).with_name(f"{n}.py")) for n in ("injecting", "injected"))
runs = load_module(TESTS / "integration/runs.py")
PLAIN = "schedule: {epochs: 3, kind: constant}\ncheckpoint: {every_steps: 1, keep: 99}\n"


@pytest.fixture
def folder(tmp_path):
    runs.coco_folder(tmp_path / "mine", num_train=11, num_val=4)
    return tmp_path / "mine"


def recipe(root: Path, name: str, more: str = PLAIN, **keys):
    """11 images, 4 a step: windows of 4, 4 and 3."""
    text = injected.TINY.replace("format: shapes", f"root: {root}").replace("size: 8", "size: 4")
    text = "\n".join(line for line in text.splitlines() if "shapes:" not in line)
    sets = [f"{key}={value}" for key, value in keys.items()]
    file = root.parent / f"{name}.yaml"
    file.write_text(f"{text}\nname: {name}\n{more}")
    return recipes.load(file, sets)


def at_window(monkeypatch, window: int, action) -> None:
    """Do something after a window (counted from 1), before the next one is read."""
    plain = loop._Turn.after

    def after(self, result):
        if self.state.window == window:
            action()
        return plain(self, result)

    monkeypatch.setattr(loop._Turn, "after", after)


def place(root: Path, file_name: str, epoch: int) -> int:
    """In which window of the run (from 1) an image comes in an epoch."""
    source = data.build(recipe(root, "probe")).train
    order = sampler.permutation(recipe(root, "probe").seed, epoch, 11).tolist()
    index = [source.name(i) for i in range(11)].index(file_name)
    return 3 * epoch + order.index(index) // 4 + 1


def train_rows(run: Path) -> list[dict]:
    return [row for row in inject.rows(run) if "train/loss" in row]


@pytest.mark.parametrize("where", ["workers", "device"])
def test_a_run_goes_on_without_the_file_and_says_so_once(folder, tmp_path, monkeypatch, where):
    whole = train(recipe(folder, "whole", **{"data.pixels": where}), runs=tmp_path / "runs")
    at_window(monkeypatch, 3, (folder / "train/5.jpg").unlink)  # after the first epoch
    run = train(recipe(folder, "cut", **{"data.pixels": where}), runs=tmp_path / "runs")
    windows = [place(folder, "5.jpg", epoch) for epoch in (1, 2)]
    rows, before = train_rows(run), train_rows(whole)
    assert len(rows) == 9
    assert [r["data/dropped"] for r in rows] == [sum(w <= at for w in windows) for at in range(1, 10)]
    full = [4, 4, 3] * 3
    assert [r["data/num_images"] for r in rows] == [n - (at in windows) for at, n in enumerate(full, 1)]
    assert rows[: windows[0] - 1] == before[: windows[0] - 1] and rows[windows[0] - 1] != before[windows[0] - 1]
    alarms = [r for r in inject.rows(run, "alarms.jsonl") if r["title"] == "Unreadable images"]
    assert [r["window"] for r in alarms] == windows[:1] and "5.jpg" in alarms[0]["text"]
    assert json.loads((run / "status.json").read_text())["state"] == "done"


@pytest.mark.law2
def test_a_run_stopped_after_the_loss_goes_on_as_if_never_stopped(folder, tmp_path, monkeypatch):
    at_window(monkeypatch, 3, lambda: (folder / "train/5.jpg").unlink(missing_ok=True))
    whole = train(recipe(folder, "whole"), runs=tmp_path / "runs")
    for at in (3, 6):  # before the image is missed, and after
        start = tmp_path / f"from{at}" / "whole"
        shutil.copytree(whole, start, symlinks=True)
        for file in (start / "checkpoints").glob("window-*"):
            if int(file.name.removeprefix("window-")) > at:
                shutil.rmtree(file)
        for link in ("last", "best"):
            (start / "checkpoints" / link).unlink(missing_ok=True)
        (start / "checkpoints/last").symlink_to(f"window-{at:08d}")
        run = train(recipe(folder, "whole"), runs=start.parent, resume=True)
        assert inject.differing(inject.weights(run), inject.weights(whole)) == []
        assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_the_window_is_the_one_without_that_image(folder):
    """Loss and gradient in float64: the lost image neither counts nor moves what the others learn."""
    built, whole = _runner(folder), _window(folder)
    position, name = whole[1].positions[0], data.build(recipe(folder, "probe")).train.name
    ids = {data.build(recipe(folder, "probe")).train.image_id(i): name(i) for i in range(11)}
    gone = ids[whole[1].targets[0].image_id]
    without = [whole[0], whole[1].part(1, 2)]
    expected = built.runner.run([_double(b) for b in without])
    grads = [p.grad.clone() for rows in built.groups.values() for _, p in rows]
    built.runner.discard()
    (folder / "train" / gone).write_bytes(b"no longer an image")
    kept, lost = data.without_lost(_window(folder))
    assert [i for i, _ in lost] == [whole[1].targets[0].image_id] and position not in kept[1].positions
    result = built.runner.run([_double(b) for b in kept])
    assert result.losses == expected.losses and result.num_images == 3
    now = [p.grad for rows in built.groups.values() for _, p in rows]
    assert all(torch.equal(a, b) for a, b in zip(grads, now, strict=True))


def _runner(folder: Path):
    made = recipe(folder, "probe", **{"model.dropout": 0})
    parts.seed_everything(1, False)
    built = parts.build(made, make_accelerator("no", "cpu"), data.build(made), resume=False)
    built.bare.double()
    return built


def _window(folder: Path) -> list:
    made = recipe(folder, "probe")
    windows = data.train_windows(
        made, data.build(made).train, rank=0, num_ranks=1, start_window=0, end_window=1, mean=(0.5,) * 3,
        std=(0.2,) * 3, micro=2,
    )  # fmt: skip
    return next(windows)


def _double(batch):
    targets = [t.to("cpu") for t in batch.targets]
    for t in targets:
        t.boxes_cxcywh = t.boxes_cxcywh.double()
    return type(batch)(batch.images.double(), batch.mask, targets, batch.positions, batch.window, batch.epoch)


def test_a_window_without_any_image_moves_nothing(folder, tmp_path, monkeypatch):
    keys = {"batch.size": 1, "batch.micro": 1, "schedule.steps": 11, "schedule.epochs": 1}
    (folder / "train/5.jpg").write_bytes(b"\xff\xd8\xff no")
    run = train(recipe(folder, "alone", **keys), runs=tmp_path / "runs")
    rows = train_rows(run)
    (blank,) = [r["window"] for r in rows if r["data/num_images"] == 0]
    row = rows[blank - 1]
    assert row["health/accepted"] == 0 and row["train/loss"] == 0 and rows[-1]["step"] == 10
    assert row["health/nonfinite"] == 0, "it is no fault of the numbers"
    assert {r["title"] for r in inject.rows(run, "alarms.jsonl") if r["window"] == blank} == {"Unreadable images"}
    checkpoints = [f"window-{blank + d:08d}" for d in (-1, 0)]
    if blank > 1:
        assert inject.differing(*(inject.weights(run, c) for c in checkpoints)) == []


def test_a_disk_that_is_gone_ends_the_run_in_a_sentence(folder, tmp_path, monkeypatch):
    at_window(monkeypatch, 3, lambda: shutil.rmtree(folder / "train"))
    with pytest.raises(UserError, match="not one image of 4 windows in a row could be read.*jpg.*is the disk"):
        train(recipe(folder, "gone", **{"health.give_up_after": 4, "evaluate.every_epochs": 9}), runs=tmp_path / "runs")


def test_stop_ends_the_run_at_the_first(folder, tmp_path, monkeypatch):
    at_window(monkeypatch, 3, (folder / "train/5.jpg").unlink)
    with pytest.raises(UserError, match=r"image id .*5\.jpg cannot be decoded"):
        train(recipe(folder, "stop", **{"data.on_bad": "stop"}), runs=tmp_path / "runs")


def test_an_unreadable_validation_image_counts_nowhere(folder, tmp_path):
    (folder / "val/2.jpg").write_bytes((folder / "val/2.jpg").read_bytes()[:200])
    keys = {"schedule.epochs": 1, "log.wandb.enabled": "false"}
    run = train(recipe(folder, "val", **keys), runs=tmp_path / "runs")
    (row,) = [r for r in inject.rows(run) if "val/AP" in r]
    assert row["val/num_images"] == 3
    told = [r["text"] for r in inject.rows(run, "alarms.jsonl") if r["title"] == "Unreadable validation images"]
    assert len(told) == 1 and "2.jpg" in told[0] and "left out of the evaluation" in told[0]
    path = folder / "annotations/instances_val.json"
    tree = json.loads(path.read_text())
    gone = next(i["id"] for i in tree["images"] if i["file_name"] == "2.jpg")
    tree["images"] = [i for i in tree["images"] if i["id"] != gone]
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != gone]
    path.write_text(json.dumps(tree))
    other = train(recipe(folder, "without", **keys), runs=tmp_path / "runs")
    (expected,) = [r for r in inject.rows(other) if "val/AP" in r]
    assert row == expected


@pytest.mark.law1
@pytest.mark.parametrize("overlap", ["false", "true"])
def test_two_processes_are_one_when_a_share_loses_all(folder, tmp_path, overlap):
    """Micro-batches of one image: in some window one process has nothing left; nobody waits for it."""
    names = [p for p in runs.TINY if not p.startswith(("data.shapes", "batch", "data.workers"))]
    common = [*names, f"data.root={folder}", "data.format=coco", "batch.size=2", "batch.micro=1", "data.workers=1"]
    common += ["model.dropout=0", "schedule.epochs=1", f"dist.overlap={overlap}", "model.init_from=null"]
    common += ["model.backbone.weights=none", "data.augment.crop=0", "schedule.warmup_steps=0"]
    for name in ("5.jpg", "7.jpg"):
        (folder / "train" / name).write_bytes(b"gone")
    (folder / "val/1.jpg").unlink()
    for processes in (1, 2):
        recipe_file = str(runs.ROOT / "recipes/detr_finetune.yaml")
        done = runs.launch(
            tmp_path, "--recipe", recipe_file, *common, f"name=p{processes}", "precision=no", processes=processes
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    one, two = (train_rows(tmp_path / f"runs/p{processes}") for processes in (1, 2))
    assert [r["data/dropped"] for r in one] == [r["data/dropped"] for r in two] and one[-1]["data/dropped"] == 2
    assert [r["data/num_images"] for r in one] == [r["data/num_images"] for r in two]
    assert [r["train/loss"] for r in two] == pytest.approx([r["train/loss"] for r in one], rel=1e-3)
    told = "\n".join(r["text"] for r in inject.rows(tmp_path / "runs/p2", "alarms.jsonl"))
    assert told.count("train/5.jpg") == 1 and told.count("train/7.jpg") == 1 and told.count("val/1.jpg") == 1
    values = [[r for r in inject.rows(tmp_path / f"runs/p{n}") if "val/AP" in r][0] for n in (1, 2)]
    assert values[0]["val/num_images"] == values[1]["val/num_images"] == 3
