"""Laws 2, 3 and 4 for RT-DETR: live norms in the encoder, denoising noise that follows from an image's place."""

import json
from pathlib import Path

import pytest
from shared import load_module

from detr_accel import recipe as recipes
from detr_accel.models import weights
from detr_accel.train import replay
from detr_accel.train.replay_report import place

HERE = Path(__file__).parent
inject, injected = load_module(HERE / "injecting.py"), load_module(HERE / "injected.py")
launcher = load_module(HERE.parent / "integration" / "runs.py")
SHARDED = HERE.parent / "integration" / "sharded_eval.py"
AT = 3  # of six windows, counted from 0
KINDS = ["denoising", "gradient", "weight"]


def scenarios(processes: int) -> list[dict]:
    last = processes - 1
    saved = "checkpoint: {every_steps: 2, keep: 9}"
    rows = [
        {"name": "clean", "faults": [], "recipe": saved},
        {"name": "unseen", "faults": [{"what": "never seen", "window": AT, "rank": "all"}]},
        {"name": "switched", "faults": [{"what": "smaller", "window": AT, "rank": "all", "to": 1}]},
    ]
    for kind in KINDS:
        fault = {"what": kind, "window": AT, "rank": last, "micro": 1, "value": "nan"}
        rows.append({"name": kind, "faults": [fault], "recipe": "health: {captures: 1}"})
    rows.append({"name": "oom", "faults": [{"what": "oom backward", "window": AT, "rank": last, "micro": 1}]})
    rows.append({"name": "ended", "faults": [{"what": "error", "window": 5, "rank": last}], "recipe": saved})
    rows.append({"name": "ended", "faults": [], "recipe": saved, "resume": True})
    return [row | {"set": injected.RTDETR} for row in rows]


@pytest.fixture(scope="module", params=inject.LAUNCHES)
def runs(request, tmp_path_factory):
    rows = scenarios(inject.count(request.param))
    folder = inject.launch(tmp_path_factory.mktemp(f"rtdetr{request.param}"), request.param, rows)
    if request.param == 1:
        (folder / "clean-of-one").touch()
    return folder


@pytest.mark.law2
def test_a_run_that_ended_goes_on_bit_for_bit(runs):
    """Resumed from window 4 of 6: weights, average, running statistics, optimizer, and every logged number."""
    assert inject.outcome(runs, "ended") is None
    assert inject.differing(inject.weights(runs / "ended"), inject.weights(runs / "clean")) == []
    assert (runs / "ended" / "metrics.jsonl").read_bytes() == (runs / "clean" / "metrics.jsonl").read_bytes()


@pytest.mark.law3
@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_window_leaves_what_a_run_without_it_has(runs, kind):
    assert inject.outcome(runs, kind) is None
    assert inject.differing(inject.weights(runs / kind), inject.weights(runs / "unseen")) == []
    losses, unseen = inject.losses(runs / kind), inject.losses(runs / "unseen")
    assert losses[:AT] + losses[AT + 1 :] == unseen[:AT] + unseen[AT + 1 :]
    assert losses[AT] is None or kind == "gradient"
    (alarm,) = inject.rows(runs / kind, "alarms.jsonl")
    assert alarm["window"] == AT + 1 and alarm["title"] == "Non-finite window"


@pytest.mark.law4
def test_out_of_memory_is_the_run_that_switched_without_need(runs):
    """Live norms see other images in smaller parts; that is the switch's doing and not the fault's."""
    assert inject.outcome(runs, "oom") is None
    assert inject.differing(inject.weights(runs / "oom"), inject.weights(runs / "switched")) == []
    assert inject.losses(runs / "oom") == inject.losses(runs / "switched")
    assert inject.losses(runs / "switched") != inject.losses(runs / "clean")


def test_running_statistics_and_their_average_are_kept(runs):
    saved = {n: v for n, v in inject.weights(runs / "clean").items() if n.endswith("running_var")}
    averaged = {n.removeprefix("model/"): v for n, v in saved.items() if n.startswith("model/")}
    trained = {n.removeprefix("raw/"): v for n, v in saved.items() if n.startswith("raw/")}
    assert averaged.keys() == trained.keys() and any(n.startswith("encoder.fpn_blocks") for n in trained)
    for name, value in trained.items():
        assert not value.eq(1).all() or "backbone" in name, f"{name} saw no image"
        assert value.eq(averaged[name]).all(), f"{name} is a buffer: copied, not averaged"


@pytest.mark.law5
@pytest.mark.parametrize("tied", [False, True])
def test_one_process_and_two_give_one_metric_ties_included(runs, tmp_path, tied):
    """``tied``: every query says the same of each class, so that the order decides everything."""
    if not (runs / "clean-of-one").exists():
        pytest.skip("once is enough")
    loaded, checkpoint = weights.load(runs / "clean" / "checkpoints" / "last"), tmp_path / "checkpoint"
    if tied:
        loaded.state_dict["decoder.dec_score_head.1.weight"].zero_()
    weights.save(checkpoint, loaded.state_dict, recipes.dumps(loaded.recipe), loaded.classes, loaded.meta)
    launcher.coco_folder(tmp_path / "set", 2, 7)
    arguments = [str(checkpoint), str(tmp_path / "set")]
    for n in (1, 2):
        done = launcher.launch_script(SHARDED, n, *arguments, str(tmp_path / str(n)))
        assert done.returncode == 0, done.stderr[-3000:]
    one, *two = (json.loads((tmp_path / name).read_text()) for name in ("1.0", "2.0", "2.1"))
    assert [r["processes"] for r in two] == [2, 2]
    for result in two:
        assert result["whole"] == one["whole"]
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert one["whole"]["num_detections"] > 0


@pytest.mark.law9
def test_a_healthy_run_raises_no_alarm_and_logs_every_term(runs):
    assert (runs / "clean" / "alarms.jsonl").read_text() == ""
    (row, *_) = [row for row in inject.rows(runs / "clean") if "train/loss" in row]
    for term in ("vfl", "bbox", "giou"):
        for suffix in ("", "_0", "_enc", "_dn_0", "_dn_1"):
            assert row[f"train/loss_{term}{suffix}"] > 0
    evaluated = [row for row in inject.rows(runs / "clean") if "val/AP" in row]
    assert evaluated and all(0 <= row["val/AP"] <= 1 for row in evaluated)


@pytest.mark.parametrize(
    "kind, stage, words", [("weight", "forward", "decoder layer 1, feed-forward"), ("denoising", "forward", "decoder")]
)
def test_a_capture_is_replayed_with_its_noise_and_names_the_place(runs, kind, stage, words):
    capture = runs / kind / "captures" / f"window-{AT + 1:08d}"
    if kind == "denoising":  # the fault was in the queries, which are made anew: the window itself is healthy
        report = replay.replay(capture, quiet=True)
        assert not report.fails
        assert json.loads((capture / "capture.json").read_text())["most_boxes"] > 0
        return
    path = capture / "model.safetensors"
    tensors = inject.load_file(path)
    tensors["decoder.decoder.layers.0.linear1.weight"][0, 0] = float("nan")
    replay_with(path, tensors)
    report = replay.replay(capture, quiet=True)
    assert report.fails and report.stage == stage and report.place == words and report.cause == "weights"


def replay_with(path: Path, tensors: dict) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "module, words",
    [
        ("encoder.encoder.0.layers.0.self_attn", "encoder layer 1, self-attention"),
        ("decoder.decoder.layers.2.cross_attn.value_proj", "decoder layer 3, cross-attention"),
        ("decoder.decoder.layers.1", "decoder layer 2, sums between its parts"),
        ("decoder.dec_bbox_head.3.layers.0", "box head of decoder layer 4"),
        ("decoder.dec_score_head.0", "class head of decoder layer 1"),
        ("decoder.enc_score_head", "class head of the candidates"),
        ("encoder.fpn_blocks.1.bottlenecks.0.conv1.conv", "fusion of the encoder's maps"),
        ("encoder.input_proj.0.norm", "projection of the features"),
        ("decoder.input_proj.2.conv", "projection of the encoder's maps"),
        ("decoder.denoising_class_embed", "disturbed labels"),
        ("backbone.body.conv1", "backbone"),
        ("transformer.decoder.layers.1.linear2", "decoder layer 2, feed-forward"),
    ],
)
def test_places_are_told_in_words(module, words):
    assert place(module) == words
