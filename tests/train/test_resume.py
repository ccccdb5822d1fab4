"""Law 2: a run that was stopped or killed and started again is the run that was never stopped, bit for bit."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from shared import load_module

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.data.shapes import ShapesSource
from detr_accel.recipe import Recipe
from detr_accel.structures import UserError
from detr_accel.train import changes, checkpoint, loop, stopping, validation
from detr_accel.train.loop import train

inject = load_module(Path(__file__).with_name("injecting.py"))
injected = load_module(Path(__file__).with_name("injected.py"))
alarm_cases = load_module(Path(__file__).parents[2] / "benchmarks" / "alarm_cases.py")
FLIPS = "schedule: {epochs: 3, kind: cosine}\ncheckpoint: {every_steps: 2, keep: 9}\n"


def recipe(name: str, more: str = FLIPS) -> Recipe:
    return recipes.loads(injected.TINY + f"name: {name}\n" + more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that was never stopped: 9 windows, evaluated after 3, 6 and 9."""
    return train(recipe("whole"), runs=tmp_path_factory.mktemp("whole"))


def assert_same(run: Path, whole: Path) -> None:
    assert inject.differing(inject.weights(run), inject.weights(whole)) == []
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def at_window(monkeypatch, window: int, action) -> None:
    """Do something just before a window (counted from 0) is trained, once."""
    plain, done = loop._Turn.run, []

    def run(self, micro_batches, failure):
        if self.state.window == window and not done:
            done.append(window)
            action()
        return plain(self, micro_batches, failure)

    monkeypatch.setattr(loop._Turn, "run", run)


def ask(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.law2
@pytest.mark.parametrize("number", stopping.SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize("window", [4, 5])
def test_a_signal_finishes_the_window_and_saves(tmp_path, monkeypatch, whole, number, window):
    with monkeypatch.context() as patch:
        at_window(patch, window, lambda: ask(number))
        run = train(recipe("whole"), runs=tmp_path)
    assert json.loads((run / "status.json").read_text())["state"] == "resume"
    assert os.readlink(run / "checkpoints" / "last") == f"window-{window + 1:08d}"
    train(recipe("whole"), runs=tmp_path, resume=True)
    assert_same(run, whole)


@pytest.mark.law2
def test_a_window_that_cannot_wait_is_given_up_and_comes_again(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "WINDOW_S", -1.0)
        at_window(patch, 4, lambda: ask(signal.SIGTERM))
        run = train(recipe("whole"), runs=tmp_path)
    assert os.readlink(run / "checkpoints" / "last") == "window-00000004"
    train(recipe("whole"), runs=tmp_path, resume="auto")
    assert_same(run, whole)


@pytest.mark.law2
def test_a_stop_during_evaluation_leaves_it_owed(tmp_path, monkeypatch, whole):
    plain = models.detections
    with monkeypatch.context() as patch:

        def stopping_detections(*args):
            ask(signal.SIGTERM)
            return plain(*args)

        patch.setattr(validation.models, "detections", stopping_detections)
        run = train(recipe("whole"), runs=tmp_path)
    assert not [row for row in inject.rows(run) if "val/AP" in row]
    assert os.readlink(run / "checkpoints" / "last") == "window-00000003"
    train(recipe("whole"), runs=tmp_path, resume=True)
    assert_same(run, whole)


@pytest.mark.law2
def test_a_crash_goes_on_from_the_last_checkpoint(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        at_window(patch, 5, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipe("whole"), runs=tmp_path)
    assert json.loads((tmp_path / "whole" / "status.json").read_text())["state"] == "failed"
    run = train(recipe("whole"), runs=tmp_path, resume=True)
    assert_same(run, whole)


@pytest.mark.law2
def test_stronger_augmentation_goes_on_where_it_was(tmp_path, monkeypatch):
    """Stopped while a mosaic is on, it is on and goes off as in the run that was never stopped."""
    sections = ("photometric", "zoom_out", "iou_crop", "large_scale_jitter", "mosaic", "mixup")
    on = ", ".join(f"{name}: {{probability: 0.4, stop: 0.7}}" for name in sections)
    text = injected.TINY.replace("{scales: [64]}", f"{{scales: [64], {on}}}") + "name: strong\n" + FLIPS
    whole = train(recipes.loads(text), runs=tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_window(patch, 5, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipes.loads(text), runs=tmp_path)
    assert_same(train(recipes.loads(text), runs=tmp_path, resume=True), whole)


@pytest.mark.law2
def test_checkpoints_by_the_clock_change_nothing(tmp_path, whole):
    more = FLIPS.replace("keep: 9", "keep: 3, every_minutes: 0.00001")
    run = train(recipe("whole", more), runs=tmp_path)
    assert_same(run, whole)
    left = sorted(p.name for p in (run / "checkpoints").glob("window-*"))
    assert left[-3:] == ["window-00000007", "window-00000008", "window-00000009"]


@pytest.mark.law2
@pytest.mark.parametrize("harm", ["flipped byte", "missing file"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, monkeypatch, capsys, whole, harm):
    with monkeypatch.context() as patch:
        at_window(patch, 5, lambda: ask(signal.SIGTERM))
        run = train(recipe("whole"), runs=tmp_path)
    file = run / "checkpoints" / "window-00000006" / "raw.safetensors"
    if harm == "missing file":
        file.unlink()
    else:
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 4
        file.write_bytes(raw)
    train(recipe("whole"), runs=tmp_path, resume=True)
    said = capsys.readouterr().out
    assert "window-00000006 is passed over and set aside" in said and "raw.safetensors" in said
    assert (run / "checkpoints" / "damaged-window-00000006").is_dir()
    assert_same(run, whole)


@pytest.mark.law2
@pytest.mark.law3
def test_a_rollback_is_resumed_like_anything_else(tmp_path, monkeypatch):
    more = FLIPS + "health: {on_nonfinite: rollback, strikes: 2, within: 3}\n"
    monkeypatch.setattr(injected.window.WindowRunner, "_micro_batch", injected.micro_batch)
    faults = [{"what": "image", "window": w} for w in (4, 5)]

    def go(name: str, folder: Path, **how) -> Path:
        injected.faults.left = [dict(f) for f in faults]
        return train(recipe(name, more), runs=folder, **how)

    undisturbed = go("whole", tmp_path / "a")
    for window in (5, 6, 7):
        with monkeypatch.context() as patch:
            at_window(patch, window, lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                go("whole", tmp_path / str(window))
        run = go("whole", tmp_path / str(window), resume=True)
        assert_same(run, undisturbed)
        alarms = [a["text"].split("replay")[0] for a in inject.rows(run, "alarms.jsonl")]
        assert alarms == [a["text"].split("replay")[0] for a in inject.rows(undisturbed, "alarms.jsonl")]


@pytest.mark.law2
@pytest.mark.law3
@pytest.mark.parametrize("window", [1, 3])
def test_a_stop_where_a_checkpoint_is_due_anyway_is_what_a_rollback_goes_back_to(tmp_path, monkeypatch, window):
    """With or without the stop; and one where none is due is not."""
    more = FLIPS.replace("every_steps: 2", "every_steps: 4") + "health: {on_nonfinite: rollback, strikes: 1}\n"
    monkeypatch.setattr(injected.window.WindowRunner, "_micro_batch", injected.micro_batch)
    fault = {"what": "image", "window": 4}
    injected.faults.left = [dict(fault)]
    undisturbed = train(recipe("whole", more), runs=tmp_path / "a")
    injected.faults.left = [dict(fault)]
    with monkeypatch.context() as patch:
        at_window(patch, window, lambda: ask(signal.SIGTERM))
        run = train(recipe("whole", more), runs=tmp_path / "b")
    train(recipe("whole", more), runs=tmp_path / "b", resume=True)
    assert_same(run, undisturbed)


@pytest.mark.law2
@pytest.mark.law4
def test_a_smaller_cut_is_kept_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(injected.window.WindowRunner, "_micro_batch", injected.micro_batch)
    fault = {"what": "oom forward", "window": 2}
    injected.faults.left = [dict(fault)]
    undisturbed = train(recipe("whole"), runs=tmp_path / "a")
    injected.faults.left = [dict(fault)]
    with monkeypatch.context() as patch:
        at_window(patch, 5, lambda: ask(signal.SIGTERM))
        run = train(recipe("whole"), runs=tmp_path / "b")
    train(recipe("whole"), runs=tmp_path / "b", resume=True)
    assert_same(run, undisturbed)


def test_auto_starts_goes_on_and_is_done(tmp_path, capsys):
    short = "schedule: {steps: 2, kind: constant}\n"
    train(recipe("r", short), runs=tmp_path, resume="auto")
    said = capsys.readouterr().out
    assert "resumed from" not in said
    assert said.splitlines()[-1].startswith(f"done: {tmp_path / 'r'}/checkpoints/best (AP ")
    train(recipe("r", short), runs=tmp_path, resume="auto")
    assert "already done: 2 of 2 windows; raise schedule.steps to go on" in capsys.readouterr().out
    train(recipe("r", short.replace("2", "3")), runs=tmp_path, resume="auto")
    said = capsys.readouterr().out
    assert "resumed from" in said and "changed since the checkpoint: schedule.steps: 2 -> 3" in said
    assert [row["step"] for row in inject.rows(tmp_path / "r") if "train/loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("shorter", ["{steps: 1, kind: constant}", "{epochs: 0.25, kind: constant}"])
def test_a_schedule_that_ended_before_is_refused_and_the_run_stays_as_it_was(tmp_path, monkeypatch, shorter):
    run = train(recipe("r", "schedule: {steps: 3, kind: constant}\n"), runs=tmp_path)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != "lock"}
    assert {"recipe.yaml", "metrics.jsonl"} <= before.keys()
    key = "schedule.steps=1" if "steps" in shorter else r"schedule.epochs=0.25"
    for how in ({"resume": True}, {"resume": "auto"}):
        with pytest.raises(UserError, match=rf"{key} ends after \d windows?, and .* has 3 behind it: raise schedule"):
            train(recipe("r", f"schedule: {shorter}\n"), runs=tmp_path, **how)
    with monkeypatch.context() as patch:
        patch.setattr(ShapesSource, "fingerprint", lambda self: "other images")
        with pytest.raises(UserError, match="the training data differ"):
            train(recipe("r", f"schedule: {shorter}\n"), runs=tmp_path, resume=True)
    with pytest.raises(UserError, match=rf"{key} ends after"):
        train(recipe("b", f"schedule: {shorter}\n"), runs=tmp_path, branch=run)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != "lock"} == before


def test_a_run_that_ends_before_its_warm_up_says_so(tmp_path, capsys):
    for steps, name in ((2, "short"), (3, "enough")):
        train(recipe(name, f"schedule: {{steps: {steps}, warmup_steps: 2}}\n"), runs=tmp_path)
        said = "schedule.warmup_steps is 2 and the run ends after 2" in capsys.readouterr().out
        assert said == (name == "short")


def test_a_longer_schedule_says_the_rate_before_and_after(tmp_path, capsys):
    cosine = "schedule: {steps: 2, kind: cosine}\n"
    train(recipe("r", cosine), runs=tmp_path)
    capsys.readouterr()
    train(recipe("r", cosine.replace("2", "4")), runs=tmp_path, resume=True)
    assert "learning rate at step 2: 0 before the change, 5e-05 after it" in capsys.readouterr().out


def test_what_would_be_another_training_is_refused_or_branched(tmp_path, capsys):
    short = "schedule: {steps: 2, kind: constant}\n"
    train(recipe("r", short), runs=tmp_path)
    status = (tmp_path / "r" / "status.json").read_text()
    longer = short.replace("2", "4")
    with pytest.raises(UserError, match=r"optim.lr: 0.0001 -> 0.001 would train differently.*--branch .*r name=NEW"):
        train(recipe("r", longer + "optim: {lr: 1.0e-3}\n"), runs=tmp_path, resume=True)
    with pytest.raises(UserError, match=r"seed: 42 -> 7 cannot change on a resume"):
        train(recipe("r", longer + "seed: 7\n"), runs=tmp_path, resume=True)
    with pytest.raises(UserError, match=r"ema.decay: 0.9998 -> 0.99 would train differently"):
        slower = recipe("r", longer).model_copy(update={"ema": recipes.Ema(enabled=True, decay=0.99)})
        train(slower, runs=tmp_path, resume=True)
    assert (tmp_path / "r" / "status.json").read_text() == status, "a refusal leaves the run as it was"
    capsys.readouterr()
    other = recipe("other", longer + "optim: {lr: 1.0e-3}\n")
    branch = train(other, runs=tmp_path, branch=tmp_path / "r")
    assert "branched off" in capsys.readouterr().out
    rows = [row for row in inject.rows(branch) if "train/loss" in row]
    assert [row["window"] for row in rows] == [3, 4] and rows[0]["train/lr/heads"] == 1e-3
    meta = json.loads((branch / "checkpoints" / "last" / "meta.json").read_text())
    assert meta["parent"].endswith("r/checkpoints/window-00000002")
    with pytest.raises(UserError, match="needs a name of its own"):
        train(recipe("r", longer), runs=tmp_path, branch=tmp_path / "r")
    with pytest.raises(UserError, match="no run with checkpoints"):
        train(recipe("r2", longer), runs=tmp_path, branch=tmp_path / "nothing")


def of(*settings: str) -> Recipe:
    return recipes.changed(recipes.loads("name: t\ndata: {format: shapes}\n"), settings)


def test_queries_are_more_on_a_branch_where_they_are_picked_and_never_where_they_are_weights():
    picked = of("model.name=rtdetr"), of("model.name=rtdetr", "model.num_queries=500")
    assert changes.check(*picked, branch=True, run="runs/r") == [
        "changed since the checkpoint: model.num_queries: 100 -> 500"
    ]
    with pytest.raises(UserError, match="would train differently from how this run began.*--branch runs/r"):
        changes.check(*picked, branch=False, run="runs/r")
    for before in (of(), of("model.name=rtdetr", "model.rtdetr.learned_queries=true")):
        after = recipes.changed(before, ["model.num_queries=500"])
        with pytest.raises(UserError, match="belong to the model as it was.*start anew with model.init_from=runs/r"):
            changes.check(before, after, branch=True, run="runs/r")


def test_a_default_that_was_another_once_and_that_nothing_reads_does_not_stop_a_resume():
    for kind, is_read in (("cosine", False), ("flat_cosine", True)):
        before, after = (of(f"schedule.kind={kind}", f"schedule.fall=[0.5,{last}]") for last in (0.95, 1.0))
        try:
            assert changes.check(before, after, branch=False, run="runs/r") == [] and not is_read
        except UserError:
            assert is_read


def test_other_validation_data_begin_the_best_anew(tmp_path, monkeypatch, capsys):
    """Wrong labels were mended, or more detections count: what was best by the old measure holds nothing up."""
    for name, method in injected.scored({3: 0.9, 6: 0.2, 9: 0.1}).items():
        monkeypatch.setattr(validation.Validation, name, method)
    more = "checkpoint: {every_steps: 1, keep: 9}\nearly_stop: {patience: 1}\n"
    first = "schedule: {steps: 3, kind: constant}\n"
    run = train(recipe("r", first + more), runs=tmp_path)
    assert os.readlink(run / "checkpoints" / "best") == "window-00000003"
    plain, judged = shutil.copytree(tmp_path / "r", tmp_path / "plain" / "r", symlinks=True), "begin anew"
    longer = first.replace("3", "9")
    train(recipe("r", longer + more), runs=tmp_path / "plain", resume=True)
    assert os.readlink(plain / "checkpoints" / "best") == "window-00000003" and judged not in capsys.readouterr().out
    fewer = longer + more + "evaluate: {max_detections: 50, metric: AP}\n"
    shutil.copytree(run, tmp_path / "fewer" / "r", symlinks=True)
    train(recipe("r", fewer), runs=tmp_path / "fewer", resume=True)
    assert os.readlink(tmp_path / "fewer/r/checkpoints/best") == "window-00000006"
    assert judged in capsys.readouterr().out
    with monkeypatch.context() as patch:  # as where labels of the validation split were mended
        before = ShapesSource.fingerprint
        patch.setattr(ShapesSource, "fingerprint", lambda self: before(self) + "!" * (self.split == "val"))
        train(recipe("r", longer + more), runs=tmp_path, resume=True)
    assert os.readlink(run / "checkpoints" / "best") == "window-00000006" and judged in capsys.readouterr().out


def test_every_knob_has_a_rule_for_a_resume():
    sections = {".".join(k.split(".")[:n]) for k in recipes._known() for n in range(1, k.count(".") + 1)}
    for key in set(recipes._known()) - sections:
        assert changes.rule(key) in (changes.SAFE, changes.BRANCHING, changes.FORBIDDEN), key
    assert changes.rule("model.hidden_dim") == changes.FORBIDDEN
    assert changes.rule("log.wandb.tags") == changes.SAFE
    assert changes.rule("optim.lr") == changes.BRANCHING
    unknown = [k for k in changes.RULES if k not in recipes._known()]
    assert unknown == [], "rules for knobs that are gone"


def test_a_full_disk_is_an_alarm_until_the_end_and_then_an_error(tmp_path, monkeypatch):
    plain = checkpoint.save_file

    def full(tensors, path, *more):
        if "window-00000002" in str(path) or "window-00000004" in str(path):
            from safetensors import SafetensorError

            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        plain(tensors, path, *more)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="window-00000004 could not be written.*No space left"):
        train(recipe("r", "schedule: {steps: 4, kind: constant}\ncheckpoint: {every_steps: 2}\n"), runs=tmp_path)
    (alarm,) = inject.rows(tmp_path / "r", "alarms.jsonl")
    assert alarm["title"] == "Checkpoint not written" and "No space left" in alarm["text"] and alarm["window"] == 2
    folder = tmp_path / "r" / "checkpoints"
    assert [p.name for p in folder.glob("window-*")] == ["window-00000003"]
    assert checkpoint.damage(folder / "window-00000003") is None and not list(folder.glob(".*tmp"))


def test_too_little_disk_is_refused_before_the_first_window(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "num_bytes", lambda *_: 2**60)
    with pytest.raises(UserError, match="a checkpoint takes .* MiB and .* has .* MiB free"):
        train(recipe("r"), runs=tmp_path)
    assert not list((tmp_path / "r").glob("checkpoints/window-*"))


def test_an_evaluation_that_fails_saves_first(tmp_path, monkeypatch):
    def broken(*_):
        raise UserError("image v.jpg cannot be decoded")

    with monkeypatch.context() as patch:
        patch.setattr(validation.models, "detections", broken)
        with pytest.raises(UserError, match="v.jpg"):
            train(recipe("r"), runs=tmp_path)
    assert os.readlink(tmp_path / "r" / "checkpoints" / "last") == "window-00000003"


@pytest.mark.law1
@pytest.mark.law2
@pytest.mark.parametrize("written_by", [1, 2])
def test_another_number_of_processes_keeps_order_and_gradient(tmp_path, written_by):
    schedule = "schedule: {steps: %d, kind: constant}\n"
    inject.launch(tmp_path, written_by, [{"name": "base", "faults": [], "recipe": schedule % 3}])
    logs = []
    for processes in (1, 2):
        name = f"goes-on-with-{processes}"
        shutil.copytree(tmp_path / "base", tmp_path / name, symlinks=True)
        scenario = {"name": name, "faults": [], "recipe": schedule % 5, "resume": True}
        inject.launch(tmp_path, processes, [scenario])
        logs.append([row for row in inject.rows(tmp_path / name) if "train/loss" in row])
    for one, two in zip(*logs, strict=True):
        assert one["data/num_boxes"] == two["data/num_boxes"], "the same images in the same windows"
    # the first window after the change: the same weights, images and cuts of two; sums are rounded differently
    one, two = logs[0][3], logs[1][3]
    assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-5)
    for key in (k for k in one if k.startswith("health/grad_norm")):
        assert one[key] == pytest.approx(two[key], rel=1e-4), key


@pytest.mark.law2
def test_an_evaluation_that_is_owed_is_logged_once_however_often_it_is_killed(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        at_window(patch, 2, lambda: ask(signal.SIGTERM))
        run = train(recipe("whole"), runs=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *a, **k: 1 / 0)  # killed after the row, before it is saved
        with pytest.raises(ZeroDivisionError):
            train(recipe("whole"), runs=tmp_path, resume=True)
    assert [row["window"] for row in inject.rows(run) if "val/AP" in row] == [3]
    train(recipe("whole"), runs=tmp_path, resume=True)
    assert_same(run, whole)


def test_a_best_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    for name, method in injected.scored({3: 0.5, 6: 0.6, 9: 0.4}).items():
        monkeypatch.setattr(validation.Validation, name, method)
    plain = checkpoint.save_file

    def full(tensors, path, *more):
        if "window-00000006" in str(path):
            raise OSError(28, "No space left on device")
        plain(tensors, path, *more)

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = train(recipe("r", FLIPS.replace("keep: 9", "keep: 1")), runs=tmp_path)
    assert os.readlink(run / "checkpoints" / "best") == "window-00000003"
    state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    assert (state["best"], state["best_window"]) == (0.5, 3)


@pytest.mark.law2
@pytest.mark.law8
def test_a_lost_image_after_a_smaller_cut_leaves_the_same_place_empty_after_a_resume(tmp_path, monkeypatch):
    """The loader that cuts in twos leaves the place empty in its part, as cutting a part of four again does."""
    folder = tmp_path / "data"
    alarm_cases.shapes_folder(folder, num_train=22)
    next(iter(sorted((folder / "train").glob("*.png")))).write_bytes(b"broken")
    text = injected.TINY.replace("format: shapes", f"format: coco\n  root: {folder}").replace("micro: 2", "micro: 4")
    lost = recipes.loads(text + "name: whole\n" + FLIPS)
    monkeypatch.setattr(injected.window.WindowRunner, "_micro_batch", injected.micro_batch)
    fault = {"what": "oom forward", "window": 0}
    injected.faults.left = [dict(fault)]
    undisturbed = train(lost, runs=tmp_path / "a")
    injected.faults.left = [dict(fault)]
    with monkeypatch.context() as patch:
        at_window(patch, 1, lambda: ask(signal.SIGTERM))
        run = train(lost, runs=tmp_path / "b")
    train(lost, runs=tmp_path / "b", resume=True)
    assert json.loads((run / "checkpoints" / "last" / "state.json").read_text())["dropped"] > 0
    assert_same(run, undisturbed)
