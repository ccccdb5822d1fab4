"""The offline W&B run as it lies on disk: each thing once, at its step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from shared import load_module

from detr_accel.monitor.wandb_sink import WandbSink, decide_mode, tracker_kwargs
from detr_accel.structures import UserError

wf = load_module(Path(__file__).with_name("wandb_file.py"))
SCRIPT = Path(__file__).with_name("small_run.py")
ROOT = Path(__file__).parents[2]
KEYS = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL")


def launch(folder: Path, processes: int = 1, extra: tuple[str, ...] = (), **env: str) -> str:
    """The whole small run on a machine that knows no key, with nobody at the keyboard; returns what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if k not in KEYS}
    clean |= {"HOME": str(folder), "NETRC": str(folder / "netrc"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if processes > 1:
        clean["ACCELERATE_USE_CPU"] = "true"
    program = [str(SCRIPT), str(folder / "runs" / "small"), "30", "0", *extra]
    done = warm.run(program, env=clean | env, processes=processes if processes > 1 else 0, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    out = launch(folder, extra=("artifact",))
    return folder / "runs" / "small", wf.records(folder / "runs" / "small"), out


def rows_with(run, key: str) -> list[dict]:
    return [row for row in wf.history(run[1]) if key in row or any(k.startswith(key + ".") for k in row)]


def test_without_a_key_the_run_is_offline_and_says_how_to_send_it(run):
    assert "W&B: offline" in run[2] and "wandb sync" in run[2]


def test_run_bears_its_name_project_and_tags(run):
    (record,) = wf.of_kind(run[1], "run")
    assert (record.display_name, record.project, list(record.tags)) == ("small", "testing", ["one", "two"])
    assert record.run_group == "small"


def test_config_holds_recipe_versions_and_fingerprint(run):
    config = wf.config(run[1])
    assert config["recipe"]["log"]["wandb"]["project"] == "testing"
    assert config["recipe"]["optim"]["lr"] == 1e-4, "resolved: defaults are in it"
    assert config["data"]["fingerprint"] == {"train": "feed", "val": "beef"}
    for package in ("torch", "torchvision", "accelerate", "timm", "wandb", "detr_accel", "python", "device"):
        assert config["versions"][package], package


def test_axes_are_defined_once_for_each_namespace(run):
    metrics = wf.of_kind(run[1], "metric")
    steps = [(m.glob_name or m.name, m.step_metric) for m in metrics]
    assert len(set(steps)) == len(steps)
    for namespace in ("train", "health", "speed", "memory", "data"):
        assert (f"{namespace}/*", "train/window") in steps
    assert ("val/*", "train/epoch") in steps
    assert {"train/window", "train/step", "train/epoch"} <= {name for name, step in steps if not step}
    assert [m.summary.max for m in metrics if m.name == "val/AP"] == [True]


def test_losses_norms_and_rates_are_logged_once_a_row_at_their_window(run):
    rows = rows_with(run, "train/loss")
    assert [r["train/window"] for r in rows] == [5, 10, 15, 20, 25, 30]
    row = rows[1]
    assert (row["train/step"], row["train/epoch"]) == (9, pytest.approx(10 / 15))
    assert (row["train/loss"], row["train/loss_ce"], row["train/loss_ce_0"]) == (1.0, 0.1, 0.3)
    assert (row["health/grad_norm"], row["health/grad_norm/backbone"]) == (0.5, 0.3)
    assert row["train/lr/transformer"] == 1e-4 and row["data/num_boxes"] == 30
    assert row["speed/images_per_second"] == pytest.approx(16) and row["speed/wait_fraction"] == pytest.approx(0.2)
    assert row["memory/peak_gib"] > 0


def test_evaluations_carry_numbers_table_and_panel_in_one_row_each(run):
    for key in ("val/AP", "val/per_class", "val/panel"):
        rows = rows_with(run, key)
        assert [(r["train/window"], r["train/step"], r["train/epoch"]) for r in rows] == [(15, 14, 1), (30, 29, 2)], key
    assert all("val/APl" not in r for r in rows_with(run, "val/AP")), "undefined: left out, not nan"


def test_best_value_is_in_the_summary(run):
    first, last = (r["val/AP"] for r in rows_with(run, "val/AP"))
    assert first > last
    assert wf.summary(run[1])["val/AP"] == {"max": first, "last": last}
    assert wf.summary(run[1])["val/weights"] == "ema"
    assert wf.summary(run[1])["best/AP"] == first and wf.summary(run[1])["best/window"] == 15


def test_class_table_has_a_row_per_class_and_no_minus_one(run):
    row = rows_with(run, "val/per_class")[0]
    files = run[0].glob("wandb/offline-run-*/files")
    table = json.loads((next(files) / row["val/per_class.path"]).read_text())
    assert table["columns"] == ["class", "AP", "objects"]
    assert [r[0] for r in table["data"]] == ["cat", "dog", "yak"]
    assert table["data"][2] == ["yak", None, 0] and table["data"][0][1] > 0.5


def panel(run) -> list[tuple[dict, dict]]:
    row = rows_with(run, "val/panel")[0]
    files = next(run[0].glob("wandb/offline-run-*/files"))
    return [
        tuple(json.loads((files / boxes[layer]["path"]).read_text()) for layer in ("truth", "prediction"))
        for boxes in row["val/panel.all_boxes"]
    ]


def test_panel_shows_true_and_predicted_boxes_with_names(run):
    row = rows_with(run, "val/panel")[0]
    assert row["val/panel.count"] == 2 and row["val/panel.format"] == "jpg"
    assert row["val/panel.captions"] == ["image 0", "image 1"]
    truth, prediction = panel(run)[0]
    assert truth["class_labels"] == {"0": "cat", "1": "dog", "2": "yak"}
    (box,) = truth["box_data"]
    assert (box["position"], box["class_id"]) == ({"minX": 10, "minY": 20, "maxX": 60, "maxY": 80}, 0)
    assert [b["class_id"] for b in prediction["box_data"]] == [0, 2]
    assert prediction["box_data"][0]["scores"] == {"score": pytest.approx(0.9)}


def test_panel_pictures_share_one_size_and_boxes_follow_the_shrinking(run):
    from PIL import Image

    row = rows_with(run, "val/panel")[0]
    files = next(run[0].glob("wandb/offline-run-*/files"))
    sizes = {Image.open(files / name).size for name in row["val/panel.filenames"]}
    assert sizes == {(1024, 683)}  # the second picture is 2400 x 1600
    scale = 1024 / 2400
    (box,) = panel(run)[1][0]["box_data"]
    assert box["position"]["maxX"] == pytest.approx(60 * scale, abs=0.01)


def test_alarm_is_sent_once_and_written_each_time(run):
    (alert,) = wf.of_kind(run[1], "alert")
    assert (alert.title, alert.level) == ("Loss spike", "WARN")
    alarms = [json.loads(line) for line in (run[0] / "alarms.jsonl").read_text().splitlines()]
    assert [(a["title"], a["window"]) for a in alarms] == [("Loss spike", 12)] * 2


def test_artifact_is_written_when_asked_and_only_then(run, tmp_path):
    models = [a for a in wf.of_kind(run[1], "artifact") if a.type == "model"]
    assert [a.name for a in models] == ["small-model"]
    launch(tmp_path)
    assert not [a for a in wf.of_kind(wf.records(tmp_path / "runs" / "small"), "artifact") if a.type == "model"]


def test_no_name_contains_a_path_of_this_machine(run):
    names = {key for row in wf.history(run[1]) for key in row} | set(wf.config(run[1])) | set(wf.summary(run[1]))
    names |= {m.name or m.glob_name for m in wf.of_kind(run[1], "metric")}
    names |= {a.name for a in wf.of_kind(run[1], "artifact")}
    secrets = (str(run[0]), str(ROOT), str(Path.home()))
    assert not [n for n in names if any(s in n for s in secrets)]


def test_exit_says_that_it_went_well(run):
    (end,) = wf.of_kind(run[1], "exit")
    assert end.exit_code == 0


def test_two_processes_write_one_run_and_each_row_once(tmp_path):
    launch(tmp_path, processes=2)
    found = wf.records(tmp_path / "runs" / "small")  # asserts that there is one run file
    assert [r["train/window"] for r in wf.history(found) if "train/loss" in r] == [5, 10, 15, 20, 25, 30]
    lines = (tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


def test_auto_goes_online_exactly_with_a_key(no_key, tmp_path):
    assert decide_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine example.org login user password x\n")
    assert decide_mode("auto") == "offline", "a key for another host"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert decide_mode("auto") == "online" and decide_mode("offline") == "offline"
    (tmp_path / "netrc").unlink()
    no_key.setenv("WANDB_API_KEY", "x" * 40)
    assert decide_mode("auto") == "online"


def test_looking_for_a_key_leaves_no_service_to_the_processes_started_from_here(no_key):
    no_key.delenv("WANDB_SERVICE", raising=False)
    assert decide_mode("auto") == "offline" and "WANDB_SERVICE" not in os.environ


def test_a_service_that_a_parent_started_elsewhere_still_writes_to_the_run_folder(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    child = [sys.executable, str(SCRIPT), "runs/small", "30", "0"]
    parent = f"import subprocess, wandb; wandb.setup(); subprocess.run({child}, cwd={str(here)!r}, check=True)"
    env = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    env.pop("WANDB_SERVICE", None)
    done = subprocess.run([sys.executable, "-c", parent], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wandb sync runs/small/wandb/offline-run" in done.stdout
    assert len(wf.history(wf.records(here / "runs" / "small"))) == 8


def test_the_environment_beats_the_recipe(no_key):
    no_key.setenv("WANDB_API_KEY", "x" * 40)
    for value, mode in (("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("online", "online")):
        no_key.setenv("WANDB_MODE", value)
        assert decide_mode("auto") == mode
    no_key.delenv("WANDB_MODE")
    no_key.setenv("WANDB_DISABLED", "true")
    assert decide_mode("online") == "disabled"


def test_online_without_a_key_is_refused_instead_of_asking(no_key):
    with pytest.raises(UserError, match="wandb login"):
        decide_mode("online")


def test_a_run_is_continued_by_id_online_only(tmp_path):
    common = {"name": "a", "project": "p", "folder": tmp_path, "config": {}, "run_id": "abc"}
    online = tracker_kwargs(mode="online", **common)["init_kwargs"]["wandb"]
    assert (online["id"], online["resume"]) == ("abc", "allow")
    offline = tracker_kwargs(mode="offline", **common)["init_kwargs"]["wandb"]
    assert "id" not in offline and offline["group"] == "a"


@pytest.mark.slow
def test_a_server_that_does_not_answer_leaves_an_offline_run(tmp_path):
    out = launch(tmp_path, WANDB_API_KEY="x" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert "offline, because going online failed" in out
    assert len(wf.history(wf.records(tmp_path / "runs" / "small"))) == 8


def test_settings_that_wandb_refuses_are_one_sentence(no_key):
    no_key.setenv("WANDB_MODE", "off")
    with pytest.raises(UserError, match="W&B refuses its settings .*WANDB_. variables.*log.wandb.enabled=false"):
        decide_mode("auto")


def test_a_tracker_that_cannot_start_leaves_the_run_without_it(tmp_path):
    class Broken:
        trackers, is_main_process = [], True

        def init_trackers(self, **_):
            self.trackers.append("half")
            raise ValueError("no such thing")

    arguments = tracker_kwargs(mode="online", name="a", project="p", folder=tmp_path, config={})
    sink = WandbSink(Broken(), arguments)
    assert sink.run is None and sink.run_id is None
    assert sink.note.startswith("W&B: off, because it could not start (no such thing)")


@pytest.mark.parametrize(
    "mode, fails, kept", [("online", False, "abc"), ("online", True, "abc"), ("offline", False, None)]
)
def test_the_run_that_is_online_is_what_a_later_resume_goes_on_with(tmp_path, mode, fails, kept):
    """Where going online fails, the run before is not forgotten for the offline one, which nobody can go on with."""

    class Run:
        id, url, dir = "new", "there", str(tmp_path / "files")

        def define_metric(self, *_, **__): ...

    class Tracked:
        trackers, is_main_process = [], True

        def init_trackers(self, init_kwargs, **_):
            told = init_kwargs["wandb"]
            if fails and told["mode"] == "online":
                raise ConnectionError("no server")
            self.trackers.append("wandb")
            Run.id = told.get("id", "new")

        def get_tracker(self, *_, **__):
            return Run()

    asked = {"name": "a", "project": "p", "folder": tmp_path, "config": {}, "mode": mode}
    Tracked.trackers = []
    assert WandbSink(Tracked(), tracker_kwargs(run_id="abc", **asked)).run_id == kept
    Tracked.trackers = []
    fresh = WandbSink(Tracked(), tracker_kwargs(**asked)).run_id
    assert fresh == ("new" if mode == "online" and not fails else None)
