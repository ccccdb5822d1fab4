"""The main job, whole, as a person starts it: train, status, evaluate, predict, resume, on one process and on two."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from shared import load_module

from detr_accel import data, recipe
from detr_accel.infer.evaluation import evaluate_checkpoint

HERE = Path(__file__).parent
runs = load_module(HERE / "runs.py")
sharded_eval = load_module(HERE / "sharded_eval.py")
wandb_file = load_module(HERE.parent / "monitor/wandb_file.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main_job")
    arguments = [*runs.TINY, "name=a", "log.wandb.enabled=true", "log.wandb.mode=offline"]
    done = runs.launch(folder, *arguments, launcher=[*runs.REAL, "1"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, done


def test_a_run_leaves_what_the_design_promises(finished):
    folder, done = finished
    run = folder / "runs" / "a"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    for name in ("recipe.yaml", "metrics.jsonl", "alarms.jsonl", "checkpoints/last/manifest.json", "checkpoints/best"):
        assert (run / name).exists(), name
    assert (run / "alarms.jsonl").read_text() == ""
    windows = [r["window"] for r in runs.rows(run / "metrics.jsonl") if "train/loss" in r]
    assert windows == [1, 2, 3, 4, 5, 6], "22 images in windows of 8 are 3 windows an epoch, the last one short"
    assert "batch: 8 images per step = 1 process x 2 micro-batches x 4 images" in done.stdout + done.stderr


def test_the_average_is_what_is_handed_over(finished):
    folder, _ = finished
    last = folder / "runs" / "a" / "checkpoints" / "last"
    assert json.loads((last / "meta.json").read_text())["weights"] == "ema"
    average, raw = load_file(last / "model.safetensors"), load_file(last / "raw.safetensors")
    assert average.keys() == raw.keys()
    assert not any(k.startswith(("module.", "_orig_mod.")) for k in raw)
    assert any(not (average[k] == raw[k]).all() for k in raw)


def test_the_same_recipe_gives_the_same_numbers_again(finished):
    folder, _ = finished
    done = runs.launch(folder, *runs.TINY, "name=again")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (folder / "runs" / n / "metrics.jsonl" for n in ("a", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.law2
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(finished):
    folder, _ = finished
    short = [a for a in runs.TINY if "schedule" not in a]
    constant = ["schedule.kind=constant", "schedule.epochs=2"]
    whole = runs.launch(folder, *short, *constant, "name=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    half = runs.launch(folder, *short, "schedule.kind=constant", "schedule.steps=2", "name=halves")
    assert half.returncode == 0, half.stderr[-3000:]
    again = runs.launch(folder, *short, *constant, "name=halves", "--resume", launcher=[*runs.REAL, "1"])
    assert again.returncode == 0, again.stderr[-3000:]
    a, b = (load_file(folder / "runs" / n / "checkpoints" / "last" / "raw.safetensors") for n in ("whole", "halves"))
    assert all((a[k] == b[k]).all() for k in a), "resumed in the middle of an epoch, after window 2 of 3"
    logs = [runs.rows(folder / "runs" / n / "metrics.jsonl") for n in ("whole", "halves")]
    train = [[r for r in log if "train/loss" in r] for log in logs]
    assert train[0] == train[1]


@pytest.fixture(scope="module")
def wandb_run(finished):
    run = finished[0] / "runs" / "a"
    source = data.eval_source(recipe.load(run / "recipe.yaml"), None, "val")
    return wandb_file.records(run), next(run.glob("wandb/offline-run-*/files")), source


def evaluations(records) -> list[dict]:
    return [row for row in wandb_file.history(records) if "val/AP" in row]


def test_wandb_has_the_numbers_of_every_evaluation_in_a_row_of_its_window(finished, wandb_run):
    logged = [r for r in runs.rows(finished[0] / "runs/a/metrics.jsonl") if "val/AP" in r]
    found = evaluations(wandb_run[0])
    assert [r["train/window"] for r in found] == [r["window"] for r in logged] == [3, 6]
    for row, own in zip(found, logged, strict=True):
        numbers = {k: v for k, v in own.items() if k.startswith("val/") and isinstance(v, int | float)}
        assert len(numbers) >= 12 and {k: row[k] for k in numbers} == numbers


def test_wandb_has_the_best_value_in_its_summary(wandb_run):
    values = [row["val/AP"] for row in evaluations(wandb_run[0])]
    assert wandb_file.summary(wandb_run[0])["val/AP"] == {"max": max(values), "last": values[-1]}
    assert wandb_file.summary(wandb_run[0])["val/weights"] == "ema"


def test_wandb_has_a_table_with_a_row_per_class(wandb_run):
    found, files, source = wandb_run
    truth = source.ground_truth()
    counts = Counter(a["category_id"] for a in truth["annotations"])
    for row in evaluations(found):
        table = json.loads((files / row["val/per_class.path"]).read_text())
        assert table["columns"] == ["class", "AP", "objects"]
        expected = {c["name"]: counts[c["id"]] for c in truth["categories"]}
        assert {name: objects for name, _, objects in table["data"]} == expected
        assert all((ap is None) == (objects == 0) for _, ap, objects in table["data"])


def test_wandb_has_the_same_pictures_with_true_and_predicted_boxes_each_time(wandb_run):
    found, files, source = wandb_run
    for row in evaluations(found):
        names, layers = row["val/panel.filenames"], row["val/panel.all_boxes"]
        assert len(names) == len(layers) == 7, "no more images than the split has"
        for i, (name, boxes) in enumerate(zip(names, layers, strict=True)):
            assert np.asarray(Image.open(files / name)).std() > 5, "a picture, not a blank"
            shown = {k: json.loads((files / boxes[k]["path"]).read_text())["box_data"] for k in ("truth", "prediction")}
            assert [box["class_id"] for box in shown["truth"]] == source.sample(i).labels.tolist()
            assert len(shown["prediction"]) <= 10, "as many as the model has queries"
        assert [f"image {source.image_id(i)}" for i in range(7)] == row["val/panel.captions"]


def test_a_launch_without_any_config_trains(tmp_path):
    done = runs.launch(tmp_path, *runs.TINY, "schedule.epochs=1", "name=bare", launcher=[])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert not (tmp_path / "hf" / "accelerate").exists(), "HF_HOME holds no default config"
    assert json.loads((tmp_path / "runs/bare/status.json").read_text())["state"] == "done"
    assert "precision float32, 1 process" in done.stdout + done.stderr


@pytest.mark.law5
@pytest.mark.skipif(not sharded_eval.COCO_FREE.exists(), reason=f"no images at {sharded_eval.COCO_FREE}")
def test_one_checkpoint_gives_the_same_numbers_on_one_process_and_on_two(tmp_path):
    sharded_eval.fit(sharded_eval.COCO_FREE, tmp_path / "checkpoint")
    arguments = [str(tmp_path / "checkpoint"), str(sharded_eval.COCO_FREE)]
    one, two = (runs.launch_script(HERE / "sharded_eval.py", n, *arguments, str(tmp_path / f"{n}")) for n in (1, 2))
    assert one.returncode == two.returncode == 0, one.stderr[-2000:] + two.stderr[-2000:]
    results = [json.loads((tmp_path / name).read_text()) for name in ("1.0", "2.0", "2.1")]
    assert [r["processes"] for r in results] == [1, 2, 2]
    values = results[0]["values"]
    assert len(values) == 12 and all(value > 0 for value in values.values()), "zeros would agree by themselves"
    assert results[0]["whole"] == results[1]["whole"] == results[2]["whole"]
    losses = [r["losses"] for r in results]
    assert losses[0] == losses[1] == losses[2] and losses[0]["loss"] > losses[0]["loss_ce"] > 0
    alone, _ = evaluate_checkpoint(
        tmp_path / "checkpoint", data_folder=sharded_eval.COCO_FREE, split="val", device="cpu", quiet=True
    )
    assert alone.to_json() == results[0]["whole"], "detr-accel eval says the same"


@pytest.mark.law1
def test_two_processes_start_like_one_and_count_each_image_once(finished):
    folder, _ = finished
    two = runs.launch(folder, *runs.TINY, "name=two", launcher=[*runs.REAL, "2"])
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-3000:]
    one_rows, two_rows = (runs.rows(folder / "runs" / n / "metrics.jsonl") for n in ("a", "two"))
    assert one_rows[0]["train/loss"] == pytest.approx(two_rows[0]["train/loss"], rel=1e-2)  # batch statistics
    assert one_rows[0]["data/num_boxes"] == two_rows[0]["data/num_boxes"]
    assert [r["val/num_images"] for r in two_rows if "val/AP" in r] == [7, 7]


def test_eval_says_the_same_as_the_training(finished):
    folder, _ = finished
    done = runs.verb(folder, "eval", "runs/a", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    trained = [r for r in runs.rows(folder / "runs/a/metrics.jsonl") if "val/AP" in r]
    best = max(trained, key=lambda r: r["val/AP"])
    assert said["AR100"] == pytest.approx(best["val/AR100"], abs=1e-12)
    assert "weights: ema" in said["notes"][0]


def test_predict_writes_pictures_and_coco_json(finished, tmp_path):
    folder, _ = finished
    for i in range(2):
        Image.new("RGB", (90 + i, 70), (200, 30, 30)).save(tmp_path / f"x{i}.png")
    done = runs.verb(folder, "predict", "runs/a", str(tmp_path), "--out", str(tmp_path / "out"), "--threshold", "0")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(found) == 20 and {r["file_name"] for r in found} == {str(tmp_path / "x0.png"), str(tmp_path / "x1.png")}
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2


def test_fewer_decoder_layers_are_used_and_said(finished):
    folder, _ = finished
    done = runs.verb(folder, "eval", "runs/a", "--decoder-layers", "1")
    assert done.returncode == 0 and "decoder: 1 of 2 layers" in done.stdout
    wrong = runs.verb(folder, "eval", "runs/a", "--decoder-layers", "3")
    assert wrong.returncode == 2 and "give 1 to 2" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["--recipe", "nothing.yaml"], "no recipe at nothing.yaml"),
        (["data.format=coco", "data.root=/nowhere"], "/nowhere"),
        (["batch.size=1", "name=a"], "already holds a run"),
        (["--resume", "name=fresh"], "there is no run"),
        (["precision=fp16", "name=b"], "fp16"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_traceback(finished, arguments, words):
    folder, _ = finished
    done = runs.verb(folder, "train", *arguments)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_second_start_does_not_overwrite(finished):
    folder, _ = finished
    before = (folder / "runs/a/metrics.jsonl").read_bytes()
    assert runs.launch(folder, *runs.TINY, "name=a").returncode != 0
    assert (folder / "runs/a/metrics.jsonl").read_bytes() == before
    assert json.loads((folder / "runs/a/status.json").read_text())["state"] == "done"
