"""``auto``: what fits is found by trying, before the first step, and leaves no trace in the training."""

from pathlib import Path

import pytest
import torch
from shared import load_module

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.monitor import memory
from detr_accel.structures import UserError
from detr_accel.train import loop, memory_fit, parts
from detr_accel.train.launch import make_accelerator
from detr_accel.train.loop import train

inject = load_module(Path(__file__).with_name("injecting.py"))
injected = load_module(Path(__file__).with_name("injected.py"))
SHORT = "schedule: {steps: 2, kind: constant}\n"


@pytest.fixture
def built():
    text = injected.TINY.replace("name: test_resnet", "name: resnet10t")  # large enough to be seen
    text = text.replace("scales: [64]", "scales: [160]").replace("image_size: 64", "image_size: 160")
    recipe = recipes.loads(text + SHORT + "name: fit\n")
    splits = data.build(recipe)
    return parts.build(recipe, make_accelerator("no", "cpu"), splits, resume=False)


def test_the_size_grows_with_the_memory_and_is_a_cut_of_the_share(built, monkeypatch):
    found = {}
    for gib in (0.15, 0.3, 0.6, 2, 20):
        monkeypatch.setattr(memory, "free_bytes", lambda _, gib=gib: int(gib * 2**30))
        try:
            found[gib] = memory_fit.fit(built, "auto", [])[0]
        except UserError:
            found[gib] = 0
    sizes = list(found.values())
    assert sizes == sorted(sizes) and sizes[-1] == 8 and len(set(sizes)) > 1, found
    assert set(sizes) <= {0, 1, 2, 3, 4, 8}, "sizes that cut 8 images into parts as equal as can be"


def test_activation_checkpointing_is_switched_on_only_where_it_is_needed(built, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 20 * 2**30)
    micro, checkpointed, words = memory_fit.fit(built, 4, "auto")
    assert (micro, checkpointed) == (4, []) and "batch.micro 4" in words
    needs = {(): 9.0, ("backbone",): 5.0, ("backbone", "encoder"): 3.0, ("backbone", "encoder", "decoder"): 2.0}
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4 / 0.9)
    monkeypatch.setattr(memory_fit._Trial, "bytes", lambda self, micro: needs[tuple(now(built))] * micro)
    frozen = built.recipe.model.backbone.model_copy(update={"norm": "frozen", "weights": "pretrained"})
    model = built.recipe.model.model_copy(update={"backbone": frozen})
    monkeypatch.setattr(built, "recipe", built.recipe.model_copy(update={"model": model}))
    micro, checkpointed, words = memory_fit.fit(built, "auto", "auto")
    assert (micro, checkpointed) == (1, ["backbone", "encoder"]) and "activation checkpointing on backbone" in words
    assert "beware" not in words


def test_rtdetr_fits_too_with_its_denoising_and_its_parts(monkeypatch):
    text = injected.TINY + SHORT + "name: rt\n"
    tree, lines = recipes._parse(text, "rt")
    for setting in injected.RTDETR:
        recipes._apply_override(tree, lines, setting)
    recipe = recipes._validate(tree, lines, "rt")
    rt = parts.build(recipe, make_accelerator("no", "cpu"), data.build(recipe), resume=False)
    before = {k: v.clone() for k, v in rt.bare.state_dict().items()}
    seen, plain = [], rt.bare.forward
    monkeypatch.setattr(rt.bare, "forward", lambda *args: (seen.append(len(args)), plain(*args))[1])
    monkeypatch.setattr(memory, "free_bytes", lambda _: 20 * 2**30)
    assert memory_fit.fit(rt, "auto", [])[0] == 8 and set(seen) == {3}, "images, mask and disturbed boxes"
    assert all(torch.equal(v, before[k]) for k, v in rt.bare.state_dict().items()), "norms included"
    needs = {0: 9.0, 1: 5.0, 2: 3.0, 3: 2.0}
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4 / 0.9)

    def on() -> int:
        body = any(type(m).__name__ == "_CheckpointedBlocks" for m in rt.bare.backbone.modules())
        return body + rt.bare.encoder.checkpointing + rt.bare.decoder.checkpointing

    monkeypatch.setattr(memory_fit._Trial, "bytes", lambda self, micro: needs[on()] * micro)
    micro, checkpointed, words = memory_fit.fit(rt, "auto", "auto")
    everything = ["backbone", "encoder", "decoder"]
    assert (micro, checkpointed) == (2, everything), "few images make poor statistics: as many as can be"
    assert "beware: norms that train see only 2 images at a time" in words


@pytest.mark.parametrize(
    "gib, found", [(36, (4, [])), (20, (4, ["backbone"])), (8, (4, ["backbone", "encoder", "decoder"]))]
)
def test_norms_that_train_keep_four_images_as_long_as_checkpointing_helps(built, monkeypatch, gib, found):
    needs = {0: 9.0, 1: 5.0, 2: 3.0, 3: 2.0}
    monkeypatch.setattr(memory, "free_bytes", lambda _: (gib + 0.1) / 0.9)
    monkeypatch.setattr(memory_fit._Trial, "bytes", lambda self, micro: needs[len(now(built))] * micro)
    micro, checkpointed, words = memory_fit.fit(built, "auto", "auto")
    assert (micro, checkpointed) == found and "beware" not in words


def test_no_checkpointing_is_paid_for_a_size_that_is_not_taken():
    """Six images are cut into 1, 2, 3 or 6: four in a forward would be three."""
    model = recipes.loads("name: t\ndata: {format: shapes}\nmodel: {name: rtdetr}\n").model
    assert [memory_fit.least_wanted(model, share) for share in (1, 3, 4, 5, 6, 8, 9, 16)] == [1, 3, 4, 5, 6, 4, 5, 4]
    detr = recipes.loads("name: t\ndata: {format: shapes}\n").model
    assert memory_fit.least_wanted(detr, 16) == 1


def test_few_images_are_told_whatever_checkpointing_is_set_to(built, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 7 / 0.9)
    monkeypatch.setattr(memory_fit._Trial, "bytes", lambda self, micro: 5.0 * micro)
    monkeypatch.setattr(built, "recipe", recipes.changed(built.recipe, ["batch.micro=auto"]))
    assert "beware: norms that train see only 1 image at a time" in memory_fit.fit(built, "auto", [])[2]


def now(built) -> list[str]:
    """The parts that compute again in backward."""
    body = any(type(m).__name__ == "_CheckpointedBlocks" for m in built.bare.backbone.modules())
    transformer = built.bare.transformer
    on = {"backbone": body, "encoder": transformer.encoder.checkpointing, "decoder": transformer.decoder.checkpointing}
    return [name for name, is_on in on.items() if is_on]


def test_what_cannot_fit_is_a_sentence_with_both_figures(built, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2**20)
    with pytest.raises(
        UserError, match=r"the worst window \(250x250 pixels, 6 boxes an image\).* GiB.*lower batch.micro"
    ):
        memory_fit.fit(built, 4, "auto")


def test_a_size_that_runs_out_of_memory_does_not_fit(built, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 20 * 2**30)
    plain = memory_fit._forward_backward

    def small_device(parts_, batch):
        if len(batch) > 1:
            raise torch.OutOfMemoryError("injected")
        plain(parts_, batch)

    monkeypatch.setattr(memory_fit, "_forward_backward", small_device)
    assert memory_fit.fit(built, "auto", [])[0] == 1


@pytest.mark.law4
def test_trying_leaves_no_trace_in_the_training(tmp_path):
    auto = injected.TINY.replace("micro: 2", "micro: auto").replace("name: test_resnet", "name: resnet10t")
    tried = train(recipes.loads(auto + SHORT + "name: tried\n"), runs=tmp_path)
    state = (tried / "checkpoints" / "last" / "state.json").read_text()
    assert '"micro": 8' in state
    given = train(recipes.loads(auto.replace("auto", "8") + SHORT + "name: given\n"), runs=tmp_path)
    assert inject.differing(inject.weights(tried), inject.weights(given)) == []
    assert (tried / "metrics.jsonl").read_bytes() == (given / "metrics.jsonl").read_bytes()


@pytest.mark.law2
def test_what_auto_chose_is_kept_on_resume(tmp_path, monkeypatch, capsys):
    auto = injected.TINY.replace("micro: 2", "micro: auto") + "name: r\n"
    train(recipes.loads(auto + SHORT), runs=tmp_path)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2**20)
    train(recipes.loads(auto + SHORT.replace("2", "3")), runs=tmp_path, resume=True)
    assert "batch.micro 8 as before" in capsys.readouterr().out


@pytest.mark.parametrize("step", [1, 64])
def test_no_plan_passes_the_worst_canvas(step):
    text = "name: t\ndata: {format: shapes, augment: {crop: 0.7, crop_size: [30, 70], crop_scales: [60, 90]"
    text += f", canvas_step: {step}, scales: [64, 96], max_size: 140}}, shapes: {{image_size: 100, num_train: 400}}}}"
    recipe = recipes.loads(text)
    source = data.build(recipe).train
    (height, width), most = data.worst_window(recipe, source)
    assert most == 6
    windows = data.train_windows(
        recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 0})}), source, rank=0, num_ranks=1,
        start_window=0, end_window=40, mean=(0.5,) * 3, std=(0.5,) * 3, micro=16,
    )  # fmt: skip
    seen = [batch.images.shape[-2:] for window in windows for batch in window]
    assert max(h for h, _ in seen) <= height and max(w for _, w in seen) <= width
    assert max(h for h, _ in seen) >= 0.75 * height, "and it is not far above what comes"


@pytest.mark.gpu
def test_a_gpu_that_is_almost_full_gets_smaller_parts_and_the_same_rows(tmp_path):
    text = injected.TINY.replace("device: cpu", "device: auto").replace("micro: 2", "micro: auto")
    free = train(recipes.loads(text + SHORT + "name: free\n"), runs=tmp_path)
    held = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.97), dtype=torch.uint8, device="cuda")
    tight = train(recipes.loads(text + SHORT + "name: tight\n"), runs=tmp_path)
    del held
    for one, two in zip(inject.losses(free), inject.losses(tight), strict=True):
        assert one == pytest.approx(two, rel=5e-2)


@pytest.mark.gpu
def test_a_gpu_that_fills_up_in_the_middle_of_a_run_repeats_the_window(tmp_path, monkeypatch):
    """Real memory, really gone: all that is free is taken before the third window, and given back when it failed."""
    text = injected.TINY.replace("device: cpu", "device: auto").replace("image_size: 64", "image_size: 640")
    text = text.replace("scales: [64]", "scales: [640]").replace("micro: 2", "micro: 8")
    held, plain, release = [], loop._Turn.run, memory_fit.release

    def run(self, micro_batches, failure):
        if self.state.window == 2:
            torch.cuda.empty_cache()
            held.append(torch.empty(int(torch.cuda.mem_get_info()[0] * 0.99), dtype=torch.uint8, device="cuda"))
        return plain(self, micro_batches, failure)

    monkeypatch.setattr(loop._Turn, "run", run)
    monkeypatch.setattr(memory_fit, "release", lambda device: (held.clear(), release(device)))
    run_folder = train(recipes.loads(text + "schedule: {steps: 4, kind: constant}\nname: r\n"), runs=tmp_path)
    rows = [row for row in inject.rows(run_folder) if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["health/out_of_memory"] >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("model", [[], injected.RTDETR], ids=["detr", "rtdetr"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gpu_trains_in_mixed_precision_and_refuses_poison(tmp_path, precision, model):
    faults = [{"what": "weight", "window": 1}]
    row = {"name": "r", "faults": faults, "recipe": "schedule: {steps: 4, kind: constant}"}
    inject.launch(tmp_path, "gpu", [row | {"set": [*model, f"precision={precision}"]}])
    assert inject.outcome(tmp_path, "r") is None
    assert [loss is None for loss in inject.losses(tmp_path / "r")] == [False, True, False, False]
