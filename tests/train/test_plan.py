"""The plan: what a step would hold, counted without computing it, is what the profiler sees it hold."""

import json
import re
from pathlib import Path

import pytest
import torch
from shared import load_module
from torch.nn import functional as F
from tqdm import tqdm

from detr_accel import cli, data, models
from detr_accel import recipe as recipes
from detr_accel.structures import UserError
from detr_accel.train import dry_step, plan, plan_report
from detr_accel.train.dry_step import Layout
from detr_accel.train.loop import train

ROOT = Path(__file__).parents[2]
GIB = 2**30


check = load_module(ROOT / "benchmarks" / "plan_check.py")
injected = load_module(Path(__file__).with_name("injected.py"))

# frozen, folded norms (their weights are not read), dropout, an average: everything that a step can hold
SMALL = """
name: small
data: {root: nowhere, augment: {scales: [160], max_size: 160, crop: 0}, eval_size: 160, eval_max_size: 160}
model:
  backbone: {name: test_resnet.r160_in1k, frozen_stages: 0}
  hidden_dim: 32
  num_heads: 4
  num_encoder_layers: 1
  num_decoder_layers: 1
  dim_feedforward: 64
  num_queries: 20
batch: {size: 8, micro: 4}
ema: {enabled: true}
device: cpu
"""


def small(*settings: str) -> recipes.Recipe:
    tree, lines = recipes._parse(SMALL, "small")
    for setting in settings:
        recipes._apply_override(tree, lines, setting)
    return recipes._validate(tree, lines, "small")


def peaks(recipe: recipes.Recipe, micro: int, *, devices: int = 1, gpu: bool = False) -> dry_step.Peaks:
    layout = Layout(devices, gpu, recipe.precision or "no")
    return plan.dry_run(recipe, data.demands(recipe, None), micro, layout)


def fit(recipe: recipes.Recipe, memory: int) -> plan.Plan:
    return plan.plan(recipe, memory, levers=False)


def both(recipe: recipes.Recipe, micro: int) -> tuple[dict, dict]:
    """Planned and measured bytes by moment."""
    demands = data.demands(recipe, None)
    return check.planned_bytes(peaks(recipe, micro)), check.live_bytes(recipe, demands, micro)


@pytest.fixture(scope="module")
def plain():
    return both(small(), 4)


# --- against the profiler


def test_a_planned_step_is_what_the_profiler_sees(plain):
    planned, measured = plain
    for moment in ("forward", "backward", "optimizer", "all"):
        assert planned[moment] == pytest.approx(measured[moment], rel=0.15), moment


@pytest.mark.parametrize("micro, settings", [(8, ["ema.enabled=false"]), (2, ["data.augment.max_size=224"])])
def test_so_it_is_without_accumulation_and_at_another_size(micro, settings):
    planned, measured = both(small(*settings), micro)
    assert planned["all"] == pytest.approx(measured["all"], rel=0.15)


RTDETR = [
    "model.name=rtdetr", "model.backbone.name=test_efficientnet.r160_in1k", "model.num_decoder_layers=2",
    "model.rtdetr.encoder_dim=32", "model.rtdetr.encoder_feedforward=64", "model.rtdetr.num_blocks=1",
    "model.rtdetr.num_denoising=100",
]  # fmt: skip


@pytest.mark.parametrize(
    "micro, settings",
    [
        (4, []),
        pytest.param(1, ["batch.size=2"], marks=pytest.mark.slow),
        (4, ["model.activation_checkpointing=[encoder,decoder]", "precision=bf16"]),
    ],
)
def test_so_it_is_for_rtdetr(micro, settings):
    recipe = small(*RTDETR, *settings)
    planned, measured = both(recipe, micro)
    for moment in ("forward", "backward", "optimizer", "all"):
        assert planned[moment] == pytest.approx(measured[moment], rel=0.05), moment
    without = peaks(small(*RTDETR, *settings, "model.rtdetr.num_denoising=0"), micro)
    assert peaks(recipe, micro).moments["losses"] > 1.02 * without.moments["losses"], "denoising is counted"


def size_lever(recipe: recipes.Recipe) -> recipes.Recipe | None:
    """With the plan's change of the size."""
    with tqdm(disable=True) as bar:
        planner = plan._Planner(recipe, None, Layout(1, False, "no"), 64 * GIB, True, bar)
        return next((r for r, _, setting in planner._levers(recipe, "no") if "max_size" in setting), None)


def test_the_size_lever_of_squares_makes_them_smaller():
    recipe = small(*RTDETR, "data.square=true", "data.augment.max_size=1333", "evaluate.batch=1")
    less = size_lever(recipe)
    assert less.data.augment.max_size == 96  # three quarters of 160, in steps of 32
    assert data.demands(less, None).canvas_px == (96, 96) and data.demands(recipe, None).canvas_px == (160, 160)


def test_the_size_lever_keeps_a_cell_for_each_query():
    more = ["data.square=true", "data.augment.max_size=1333", "evaluate.batch=1"]
    assert size_lever(small(*RTDETR, *more, "model.num_queries=190")).data.augment.max_size == 128  # 96 px: 189 cells
    assert size_lever(small(*RTDETR, *more, "model.num_queries=400")) is None, "160 px have 525, 128 px 336"


def test_rtdetr_is_planned_for_a_gpu_too():
    recipe = small(*RTDETR, "device=auto")
    cpu, gpu = peaks(recipe, 4), peaks(recipe, 4, gpu=True)
    assert 0 < gpu.bytes < cpu.bytes
    for part in ("backbone", "encoder", "decoder", "heads_and_losses"):
        assert gpu.components["losses"][f"activations/{part}"] > 0
    again = peaks(small(*RTDETR, "device=auto", "model.activation_checkpointing=[decoder]"), 4, gpu=True)
    assert again.bytes < gpu.bytes


def test_deterministic_reads_are_counted_on_a_gpu_and_nowhere_else():
    recipe, still = small(*RTDETR, "device=auto"), small(*RTDETR, "device=auto", "deterministic=true")
    assert peaks(still, 4, gpu=True).bytes > peaks(recipe, 4, gpu=True).bytes
    assert peaks(still, 4).bytes == peaks(recipe, 4).bytes


@pytest.mark.slow
def test_norms_that_train_keep_four_images_as_long_as_checkpointing_helps():
    auto = small(*RTDETR, "batch.micro=auto", "model.activation_checkpointing=auto")
    steps = [
        small(*RTDETR, f"model.activation_checkpointing=[{s}]") for s in ("", "backbone", "backbone,encoder,decoder")
    ]
    enough = [room(step, 4) for step in steps]
    assert enough == sorted(enough, reverse=True) and len(set(enough)) == 3
    assert fit(auto, enough[0]).recipe.model.activation_checkpointing == []
    found = fit(auto, enough[1])
    assert (found.micro, found.recipe.model.activation_checkpointing, found.settings) == (4, ["backbone"], [])
    assert "beware" not in "\n".join(plan_report.lines(found))
    tight = fit(auto, room(steps[-1], 2))
    assert tight.micro in (2, 3) and len(tight.recipe.model.activation_checkpointing) == 3 and tight.fits
    assert f"beware: norms that train see only {tight.micro} images" in "\n".join(plan_report.lines(tight))
    assert plan_report.to_json(tight)["beware"]
    plain = small("batch.micro=auto", "model.activation_checkpointing=auto")  # DETR: frozen norms, one image is enough
    assert fit(plain, room(small(), 1)).recipe.model.activation_checkpointing == []


def test_the_comparison_can_fail(plain):
    _, measured = plain
    other = check.planned_bytes(peaks(small("data.augment.max_size=192"), 4))
    assert other["all"] != pytest.approx(measured["all"], rel=0.15)


def test_each_lever_saves_what_the_profiler_sees_it_save(plain):
    levers = plan.plan(small(), 64 * GIB).levers
    assert len(levers) == 7, "three parts, all of them, bf16, a smaller size, a frozen stage"
    for lever in levers:
        seen = (
            plain[1]["all"] - check.live_bytes(small(lever.setting), data.demands(small(lever.setting), None), 4)["all"]
        )
        # a hundredth of the peak is no saving to quarrel about
        assert lever.saves == pytest.approx(seen, rel=0.2, abs=0.01 * plain[1]["all"]), lever.setting
    assert max(lever.saves for lever in levers) > 0.2 * plain[1]["all"], "and some of them are worth it"


# --- what is counted


def test_components_add_up_to_the_peak_and_weights_are_the_models():
    recipe = small()
    found = peaks(recipe, 4)
    model = models.build(recipe, 80, load_weights=False)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for moment, total in found.moments.items():
        held = found.components[moment]
        assert sum(held.values()) == total, moment
        assert held["weights"] == pytest.approx(weights, rel=0.05) and held["ema"] == pytest.approx(weights, rel=0.05)
        assert held["optimizer"] == pytest.approx(2 * trained, rel=0.05)
        assert set(+held) <= set(dry_step.COMPONENTS)
    assert found.components["optimizer"]["gradients"] == pytest.approx(trained, rel=0.05)
    for part in ("backbone", "encoder", "decoder", "heads_and_losses"):
        assert found.components["losses"][f"activations/{part}"] > 0


def test_several_devices_need_a_bucket_to_reduce_in():
    one, two = peaks(small(), 4).moments["reduce"], peaks(small(), 4, devices=2).moments["reduce"]
    # a CPU holds a window's share of images, which is half as many on two processes
    images = 4 * 160 * 160 * 13
    trained = peaks(small(), 4).components["reduce"]["gradients"]
    assert two - (one - images) == pytest.approx(min(trained, 32 * 2**20), rel=0.05)


def test_a_gpu_keeps_no_attention_weights_and_goes_back_on_checkpointed_parts():
    own = F.dropout, F.layer_norm, F.scaled_dot_product_attention
    cpu, gpu = peaks(small(), 4), peaks(small(), 4, gpu=True)
    assert gpu.components["losses"]["activations/encoder"] < 0.8 * cpu.components["losses"]["activations/encoder"]
    again = peaks(small("model.activation_checkpointing=[backbone,encoder,decoder]"), 4, gpu=True)
    half = peaks(small("precision=bf16", "device=auto"), 4, gpu=True)
    for other in (again, half):
        assert other.moments["losses"] < 0.95 * gpu.moments["losses"]
    assert own == (F.dropout, F.layer_norm, F.scaled_dot_product_attention)


def test_planning_draws_no_random_numbers():
    before = torch.get_rng_state()
    peaks(small(), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_main_recipe_is_planned_without_its_data_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load(ROOT / "recipes" / "detr_r101_coco.yaml")
    assert not data.is_there(recipe)
    demands = data.demands(recipe, None)
    assert (demands.canvas_px, demands.most_boxes, demands.assumed) == ((1333, 1333), 100, True)
    found = dry_step.run(recipe, demands, 2, Layout(8, True, "no"))
    weights = 60_675_360 * 4  # with 92 logits, as published
    assert found.components["forward"]["weights"] == pytest.approx(weights, rel=0.01)
    assert 3 * GIB < found.bytes < 8 * GIB


def test_shapes_come_from_the_data_where_they_are_there():
    recipe = recipes.loads(injected.TINY + "name: t\n")
    splits = data.build(recipe)
    found = data.demands(recipe, splits)
    assert (found.canvas_px, found.most_boxes) == data.worst_window(recipe, splits.train)
    assert (found.num_classes, found.num_images, found.assumed) == (len(splits.train.classes), 22, False)
    batches = data.eval_batches(recipe, splits.val, rank=0, num_ranks=1, mean=(0.5,) * 3, std=(0.5,) * 3)
    sizes = [batch.images.shape[-2:] for batch in batches]
    assert all(h <= found.eval_canvas_px[0] and w <= found.eval_canvas_px[1] for h, w in sizes)
    assert found.eval_canvas_px[0] in [h for h, _ in sizes] and found.eval_canvas_px[1] in [w for _, w in sizes]
    said = "\n".join(plan_report.lines(fit(recipe, 64 * GIB)))
    assert "the most that the data can bring" in said and "22 images = 3 steps per epoch" in said


# --- what fits


def room(recipe: recipes.Recipe, micro: int) -> int:
    """The memory in which just so many images fit, at a memory_fraction of 0.9."""
    return int((peaks(recipe, micro).bytes + 2**16) / 0.9 + plan.CPU_GIB * GIB)


def test_the_largest_micro_batch_is_the_largest_that_fits():
    for micro, settings in ((1, []), (2, []), (4, []), (8, ["batch.micro=auto"])):
        recipe = small(*settings)
        found = fit(recipe, room(recipe, micro))
        assert found.largest_micro == micro and found.fits
        assert found.settings == ([] if micro >= 4 else [f"batch.micro={micro}"])
        assert found.micro == micro and found.accumulation == 8 // micro
    assert fit(small(), 64 * GIB).micro == 4, "a recipe's own number stays"


def test_what_does_not_fit_as_it_is_gets_the_mildest_levers_that_make_it_fit():
    ladder = "model.activation_checkpointing=[backbone]"
    memory = room(small(ladder), 1)
    assert memory < room(small(), 1)
    found = fit(small(), memory)
    assert found.fits and found.settings == ["batch.micro=1", ladder]
    assert "does not fit as it is; it fits with batch.micro=1 " + ladder in "\n".join(plan_report.lines(found))
    automatic = fit(small("batch.micro=auto", "model.activation_checkpointing=auto"), memory)
    assert automatic.fits and automatic.settings == [] and automatic.micro == 1
    assert automatic.recipe.model.activation_checkpointing == ["backbone"]


def test_what_cannot_fit_says_what_would_and_that_is_true():
    memory = room(small("precision=bf16", "data.augment.max_size=96"), 1)
    tight = fit(small(), memory)
    assert not tight.fits and plan_report.to_json(tight)["fits"] is False
    gib, settings, size = re.match(
        r"([\d.]+) GiB would do with (.*); in .* the same with data.augment.max_size=(\d+)", tight.remedy
    ).groups()
    settings = settings.split()
    assert settings[-1] == "precision=bf16" and len(settings) == 3
    usable = int(0.9 * (memory - plan.CPU_GIB * GIB))
    assert peaks(small(*settings, f"data.augment.max_size={size}"), 1).bytes <= usable
    assert peaks(small(*settings, f"data.augment.max_size={int(size) + 32}"), 1).bytes > usable
    needed = peaks(small(*settings), 1).bytes / 0.9 + plan.CPU_GIB * GIB
    assert float(gib) == pytest.approx(needed / GIB, abs=0.05)


# --- the door


@pytest.mark.parametrize(
    "text, size",
    [("16GiB", 16 * GIB), ("16GB", 16 * 10**9), ("16384MiB", 16 * GIB), ("0.5 gib", GIB // 2), ("2g", 2 * 10**9)],
)
def test_memory_with_its_unit(text, size):
    assert plan.parse_memory(text) == size


@pytest.mark.parametrize("text", ["16", "GiB", "0GiB", "-1GiB", "16 apples", "", "nanGiB"])
def test_memory_without_one_is_refused(text):
    with pytest.raises(UserError, match="for example 16GiB"):
        plan.parse_memory(text)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--memory", "16"], "--memory 16: give a number and its unit"),
        (["--memory", "16GiB", "--devices", "0"], "--devices 0: give the number of training processes"),
        (["--memory", "16GiB", "--devices", "9"], "batch.size is 8 but there are 9 processes"),
        (["--memory", "16GiB", "--precision", "fp16"], "precision fp16 needs a GPU"),
        (["--memory", "16GiB", "model.backbone.nme=x"], "no such key; did you mean model.backbone.name?"),
        (["--memory", "16GiB", "--frobnicate"], "'--frobnicate' is not understood"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, arguments, words):
    (tmp_path / "small.yaml").write_text(SMALL)
    assert cli.main(["plan", str(tmp_path / "small.yaml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_exit_code_is_the_answer(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    assert cli.main(["plan", str(path), "--memory", "8GiB", "--devices", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["as_it_is"] and found["assumed"]
    assert (found["devices"], found["device"], found["micro"], found["accumulation"]) == (2, "cpu", 4, 1)
    assert sum(found["components_gib"].values()) == pytest.approx(found["peak_gib"])
    assert found["peak_gib"] == max(found["moments_gib"].values()) == found["moments_gib"][found["peak_moment"]]
    assert cli.main(["plan", str(path), "--memory", f"{plan.CPU_GIB * 1024 + 1}MiB"]) == 1
    out = capsys.readouterr().out
    assert "does not fit, even with every lever" in out and "would do" in out


# --- in a run


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_logs_memory_by_phase_beside_the_plan(tmp_path, capsys, monkeypatch, every):
    monkeypatch.setattr(plan, "_SHORT_RUN", 1)
    text = injected.TINY.replace("every: 1", f"every: {every}") + "name: phases\nschedule: {steps: 6, kind: constant}\n"
    run = train(recipes.loads(text), runs=tmp_path)
    rows = [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()]
    logged = [r for r in rows if "speed/seconds" in r]
    assert [r["window"] for r in logged] == list(range(every, 7, every))
    for row in logged:
        figures = [row[f"memory/{phase}_gib"] for phase in ("forward", "backward", "optimizer")]
        assert all(0.1 < x <= row["memory/peak_gib"] for x in figures)
        assert 0 < row["memory/planned_gib"] < 0.1, "what a step holds, without Python and its libraries"
    evaluated = [r for r in rows if "memory/evaluation_gib" in r]
    assert evaluated and all(0.1 < r["memory/evaluation_gib"] for r in evaluated)
    assert "memory/" not in (run / "metrics.jsonl").read_text()
    assert capsys.readouterr().out.count("memory: the plan is ") == 1


def test_an_evaluation_that_is_too_much_is_named_and_nothing_of_the_training():
    recipe = recipes.load(recipes.folder() / "detr_shapes.yaml", ["device=cpu", "evaluate.batch=512"])
    found = plan.plan(recipe, plan.parse_memory("1600MiB"), levers=False)
    assert found.fits and found.settings == ["evaluate.batch=256"]
    assert found.recipe.model.activation_checkpointing == [] and found.peaks.moment == "evaluation"
