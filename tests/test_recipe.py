import json
import re

import pytest

from detr_accel import models, recipe
from detr_accel.structures import UserError

SHIPPED = sorted(recipe.folder().glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def refusal(path, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        recipe.load(path, overrides)
    return str(caught.value)


def test_a_number_in_scientific_notation_is_a_number(tmp_path):
    path = write(tmp_path, "data: {format: shapes}\noptim: {lr: 1e-4}\nprecision: no\n")
    loaded = recipe.load(path, ["optim.lr_backbone=1e-5", "schedule.epochs=3"])
    assert (loaded.optim.lr, loaded.optim.lr_backbone, loaded.schedule.epochs) == (1e-4, 1e-5, 3.0)
    assert loaded.precision == "no", "YAML 1.1 would read false"


def test_all_mistakes_are_told_at_once_each_with_its_line(tmp_path):
    path = write(
        tmp_path, "data: {format: shapes}\noptim:\n  lrr: 1\n  clip_norm: -1\nbatch:\n  micro: true\nmodle: {}\n"
    )
    said = refusal(path, "schedule.kind=stepp").splitlines()
    assert len(said) == 5
    text = "\n".join(said)
    assert f"{path}, line 3: optim.lrr: no such key; did you mean optim.lr?" in text
    assert f"{path}, line 4: optim.clip_norm: -1 is refused: it should be greater than 0" in text
    assert f"{path}, line 6: batch.micro: true is refused: it should be a valid integer" in text
    assert f"{path}, line 7: modle: no such key; did you mean model?" in text
    kinds = "it should be 'step', 'cosine', 'flat_cosine', 'constant' or 'plateau'"
    assert f'command line: schedule.kind: "stepp" is refused: {kinds}' in text


@pytest.mark.parametrize(
    "text, words",
    [
        ("optim: {clip_value: 1.0}", "clip_norm or clip_value, not both"),
        ("model: {hidden_dim: 100}", "multiple of num_heads"),
        ("model: {backbone: {weights: none, norm: frozen}}", "destroy the signal"),
        ("data: {format: coco}", "data.root is not set"),
        ("data: {format: shapes, augment: {crop_size: [600, 384]}}", "600 > 384"),
        (
            "data: {format: shapes, augment: {mosaic: {start: 0.5, stop: 0.5}}}",
            "start 0.5 should be less than stop 0.5",
        ),
        (
            "data: {format: shapes, augment: {mixup: {weight: [0.6, 0.4]}}}",
            "weight is [least, greatest], but 0.6 > 0.4",
        ),
        ("data: {format: shapes, augment: {iou_crop: {min_iou: []}}}", "min_iou needs at least one value"),
        ("data: {format: shapes, augment: {mosaic: {probabilty: 1}}}", "did you mean data.augment.mosaic.probability?"),
        ("schedule: {fall: [0.9, 0.5]}", "fall is [first, last], but 0.9 > 0.5"),
        ("optim.lr: 1.0e-4", "optim.lr is written with dots on the command line only; here: optim: {lr: ...}"),
        ("data: {format: shapes, augment.flip: 0}", "command line only; here: data: {augment: {flip: ...}}"),
        ("data: {format: shapes, augment: {mosaic: {scale: [0.5, 3]}}}", "mosaic.scale goes up to 3, and caches"),
        ("optim:", "optim: null is refused: it should be a section with keys below it"),
        ("name: 2026-25-11", "a value that looks like a date is none"),
        ("optim: {lr: .nan}", "optim.lr: NaN is refused"),
        ("dist: {timeout_minutes: .inf}", "dist.timeout_minutes: Infinity is refused"),
        ("data: {format: shapes, square: true, eval_size: 1600}", "eval_max_size (1333) bounds every side: raise it"),
        ("optim: {lr_backbone_norms: 1.0e-4}", "the backbone's norms are frozen: leave it out, or set model.backbone"),
        ("model: {name: rtdetr}\nloss: {aux: false}", "loss.aux is false, but RT-DETR's decoder layers have heads"),
        ("loss: {cost_class: 0, cost_bbox: 0, cost_giou: 0}", "nothing would decide the matching"),
        ("loss: {kind: mal}", "loss.kind is mal, which does not fit model.name detr: use ce (or auto)"),
        ("loss: {mal: 2}", "loss.mal is set, but this recipe's loss.kind is ce, which does not read it: leave it out"),
        (
            "model: {name: rtdetr}\nloss: {kind: mal, vfl_gamma: 1.5}",
            "loss.vfl_gamma is set, but this recipe's loss.kind is mal, which does not read it: leave it out, or set "
            "loss.kind=vfl",
        ),
        ("model: {name: rtdetr}\nloss: {eos_coef: 0.2}", "loss.eos_coef is set, but this recipe's loss.kind is vfl"),
        (
            "model: {name: rtdetr}\nloss: {kind: ce}",
            "loss.kind is ce, which does not fit model.name rtdetr: use vfl or mal (or auto)",
        ),
        ("model: {rtdetr: {encoder_dim: 384}}", "but model.name is detr, which reads nothing of it: leave it out"),
        ("model: {name: rtdetr, rtdetr: {num_points: []}}", "model.rtdetr.num_points: [] is refused"),
        ("model: {name: rtdetr, rtdetr: {expansion: 0.001}}", "expansion 0.001 leaves nothing of encoder_dim 256"),
        ("model: {name: rtdetr, backbone: {dc5: true}}", "backbone.dc5 belongs to DETR"),
        ("name: a/b", "name"),
        ("- a\n- b", "mapping"),
        ("a: [1", "not valid YAML"),
        ("batch: 8", "batch: 8 is refused"),
        ('data: {format: coco, root: ""}', 'data.root: "" is refused: it should not be empty'),
        ("optim: !!python/object:x {lr: 1}", "the YAML tag tag:yaml.org,2002:python/object:x is refused"),
        ("name: !!python/object/apply:os.system [ls]", "is refused: a recipe holds plain values only"),
        ("name: a\x01b", "line 1: not valid YAML: special characters are not allowed (U+0001)"),
        ("data: &a {format: {deeper: *a}}", "data.format"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested without end"),
    ],
)
def test_impossible_values_are_refused_in_words(tmp_path, text, words):
    text = text if "data:" in text or text.startswith(("-", "a:")) else f"{text}\ndata: {{format: shapes}}"
    assert words in refusal(write(tmp_path, text))


def test_the_same_key_twice_is_refused(tmp_path):
    assert "line 2" in refusal(write(tmp_path, "seed: 1\nseed: 2\n"))


def test_what_only_new_runs_are_refused_for_leaves_old_ones_alone(tmp_path):
    path = write(tmp_path, "data: {format: shapes}\nmodel: {name: rtdetr}\nloss: {aux: false}\n")
    old = recipe.load(path, is_new=False)
    assert not old.loss.aux
    with pytest.raises(UserError, match="loss.aux is false, but RT-DETR's decoder layers"):
        recipe.check_new(old)


@pytest.mark.parametrize("override", ["optim.lr", "=3", "lr 3"])
def test_an_override_without_key_and_value_is_refused(tmp_path, override):
    path = write(tmp_path, "data: {format: shapes}\n")
    assert "write key=value" in refusal(path, override)


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim..lr=1", "command line: 'optim..lr' has an empty part between its dots"),
        ("optim.lr.x=3", "command line: optim.lr.x: no such key: optim.lr is a value, not a section"),
        ("batch.micro.x=3", "batch.micro is a value, not a section"),
        ("name=\x01", "command line: not valid YAML: special characters are not allowed"),
        ("name=!!python/object:x {b: 1}", "command line: the YAML tag"),
        ('data.root=""', 'command line: data.root: "" is refused'),
        ("ema.enabled=maybe", 'command line: ema.enabled: "maybe" is refused'),
    ],
)
def test_a_mistake_on_the_command_line_is_blamed_on_it(tmp_path, override, words):
    said = refusal(write(tmp_path, "data: {format: shapes}\n"), override)
    assert words in said and "\n" not in said


def test_keys_that_a_merge_brings_in_are_read_and_placed_at_their_section(tmp_path):
    text = "data: {format: shapes}\noptim: &o {lr: 0.5}\n"
    assert "line 3: ema.lr: no such key" in refusal(write(tmp_path, f"{text}ema: {{<<: *o}}\n"))
    twice = "data: {format: shapes}\nevaluate: &e {every_epochs: 3}\ncheckpoint: {<<: *e, keep: 4}\n"
    assert recipe.load(write(tmp_path, twice)).checkpoint.every_epochs == 3


def test_a_string_tag_is_a_string(tmp_path):
    assert recipe.load(write(tmp_path, "data: {format: shapes}\nname: !!str 3\n")).name == "3"


def test_overriding_a_section_keeps_its_other_keys(tmp_path):
    path = write(tmp_path, "data: {format: shapes, workers: 7}\n")
    assert recipe.load(path, ["data={prefetch: 5}"]).data.workers == 7


def shipped(path) -> recipe.Recipe:
    return recipe.load(path, [] if "format: shapes" in path.read_text() else ["data.root=/data"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_survives_a_round_trip_and_builds(path):
    loaded = shipped(path)
    assert recipe.loads(recipe.dumps(loaded)) == loaded
    model = models.build(loaded, 91, device="meta", load_weights=False)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    "name, published", [("rtdetr_r101_coco", 76), ("rtdetr_v2_r101_coco", 76), ("rtdetr_r50_coco", 42)]
)
def test_a_recipe_of_rtdetr_has_the_published_size_and_says_its_own(name, published):
    path = recipe.folder() / f"{name}.yaml"
    model = models.build(recipe.load(path), 80, device="meta", load_weights=False)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert int(millions) == published
    assert f"Parameters: {millions:.1f} million (published: {published})" in path.read_text()


# What the papers' and programs' own settings say (arXiv 2304.08069, 2407.17140, 2412.04234), key by key.
OF_ALL = {
    "batch.size": 16, "optim.weight_decay": 1e-4, "optim.betas": [0.9, 0.999], "optim.clip_norm": 0.1,
    "ema.enabled": True, "ema.decay": 0.9999, "data.eval_size": 640, "data.square": True,
    "data.augment.scales": [*range(480, 640, 32), 640, 640, 640, *range(672, 801, 32)],
    "data.augment.photometric.probability": 0.5, "data.augment.zoom_out.probability": 0.5,
    "data.augment.iou_crop.probability": 0.8, "data.augment.flip": 0.5, "model.num_queries": 300,
    "model.num_decoder_layers": 6, "model.num_encoder_layers": 1, "model.hidden_dim": 256, "model.num_heads": 8,
    "model.dim_feedforward": 1024, "model.dropout": 0.0, "model.rtdetr.num_points": [4, 4, 4],
    "model.rtdetr.num_denoising": 100, "model.rtdetr.label_noise": 0.5, "model.rtdetr.box_noise": 1.0,
    "loss.bbox": 5.0, "loss.giou": 2.0, "loss.cost_class": 2.0, "loss.cost_bbox": 5.0, "loss.cost_giou": 2.0,
}  # fmt: skip
R101 = {"model.rtdetr.encoder_dim": 384, "model.rtdetr.encoder_feedforward": 2048}
FIRST = {  # auto: frozen with weights, varifocal
    "schedule.epochs": 72, "schedule.kind": "constant", "optim.lr": 1e-4, "model.backbone.norm": "auto",
    "model.backbone.frozen_stages": 1, "loss.kind": "auto", "loss.vfl": 1.0, "model.rtdetr.activation": "relu",
    "model.rtdetr.query_pos_layers": 2,
}  # fmt: skip
PUBLISHED = {
    "rtdetr_r50_coco": OF_ALL | FIRST | {
        "model.rtdetr.encoder_dim": 256, "model.rtdetr.encoder_feedforward": 1024, "optim.lr_backbone": 1e-5,
        "schedule.warmup_steps": 0, "optim.no_decay": ["norms", "biases"],
    },
    "rtdetr_r101_coco": OF_ALL | R101 | FIRST | {
        "optim.lr_backbone": 1e-6, "schedule.warmup_steps": 0, "optim.no_decay": [],
    },
    "rtdetr_v2_r101_coco": OF_ALL | R101 | FIRST | {
        "optim.lr_backbone": 1e-6, "schedule.warmup_steps": 2000, "schedule.warmup": "linear",
        "optim.no_decay": ["norms"], "data.augment.photometric.stop": pytest.approx(71 / 72, abs=1e-3),
        "data.augment.scales_stop": pytest.approx(71 / 72, abs=1e-3),
    },
    "rtdetr_r101_deim_coco": OF_ALL | R101 | {
        "schedule.epochs": 60, "schedule.kind": "flat_cosine", "schedule.warmup": "quadratic",
        "schedule.warmup_steps": 2000, "schedule.min_factor": 0.5,
        "schedule.fall": [pytest.approx(34 / 60, abs=1e-3), pytest.approx(58 / 60, abs=1e-3)],
        "schedule.return_to_best": pytest.approx(58 / 60, abs=1e-3), "optim.lr": 2e-4, "optim.lr_backbone": 2e-6,
        "optim.lr_backbone_norms": 2e-4, "optim.no_decay": ["norms"], "model.backbone.norm": "live",
        "model.backbone.frozen_stages": 0, "loss.kind": "mal", "loss.mal": 1.0, "model.rtdetr.activation": "silu",
        "model.rtdetr.mlp_activation": "silu", "model.rtdetr.query_pos_layers": 3,
        "data.augment.mosaic.probability": 0.5, "data.augment.mixup.probability": 0.5,
        "data.augment.mosaic.start": pytest.approx(4 / 60, abs=1e-3),
        "data.augment.mosaic.stop": pytest.approx(34 / 60, abs=1e-3),
        "data.augment.mixup.stop": pytest.approx(34 / 60, abs=1e-3),
        "data.augment.iou_crop.stop": pytest.approx(58 / 60, abs=1e-3),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_of_rtdetr_has_the_published_numbers(name):
    loaded = json.loads(shipped(recipe.folder() / f"{name}.yaml").model_dump_json())

    def at(key: str):
        value = loaded
        for part in key.split("."):
            value = value[part]
        return value

    assert {key: at(key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_rtdetrs_recipes_train_and_evaluate_on_the_same_squares():
    for path in SHIPPED:
        loaded = shipped(path)
        if loaded.model.name == "rtdetr":
            assert loaded.data.square and loaded.data.augment.crop == 0 and loaded.model.num_queries <= 300
            assert loaded.data.eval_size in loaded.data.augment.scales


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_has_an_honest_header(path):
    assert faults_of_header(path.read_text(), path.stem) == []
    assert recipe.headline(path).endswith(".") and len(recipe.headline(path)) > 30


def faults_of_header(text: str, name: str) -> list[str]:
    """What a recipe's header lacks: command, expected result, arithmetic, time and hardware, or "not measured yet"."""
    head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    whole = text if "\ndata:" in text else f"{text}data:\n"
    placed = "root:" in text or "format: shapes" in text
    chosen = recipe.loads(whole if placed else whole.replace("\ndata:\n", "\ndata:\n  root: /data\n"))
    launch = r"accelerate launch --config_file accelerate_config.yaml (.*?)train.py(?: \\)?"
    file = "" if name == "shapes" else f" --recipe recipes/{name}.yaml"  # train.py alone trains the shapes
    command = re.search(launch + re.escape(file), head)
    asked = re.search(r"--num_processes (\d+)", command[1]) if command else None
    faults = [] if command else ["command"]
    cut = re.search(r"Batch: (\d+) images a step = (\d+) process\w* x (\d+) micro-batch\w* x (\d+) image", head)
    size, processes, times, micro = (int(number) for number in cut.groups()) if cut else (0, 0, 0, 0)
    arithmetic_holds = size == processes * times * micro == chosen.batch.size
    if not arithmetic_holds or chosen.batch.micro not in (micro, "auto"):
        faults.append("batch arithmetic")
    if processes != int(asked[1] if asked else 1):
        faults.append("processes of the command and of the arithmetic")
    measured = r"(not measured yet|.*\bcommit [0-9a-f]{7,})"
    for what, pattern in {
        "expected result": rf"Expected: (.*?\b(AP \d|[Dd]epends)|{measured})",
        "time and hardware": rf"(Time|Measured)[^.:]*: {measured}",
    }.items():
        if not re.search(pattern, head):
            faults.append(what)
    return faults


@pytest.mark.parametrize(
    "cut, fault",
    [
        ("train.py", "command"),
        ("recipes/detr_r50_coco", "command"),
        ("Expected: AP 40.6", "expected result"),
        ("4 micro-batches", "batch arithmetic"),
        ("--num_processes 8", "processes of the command and of the arithmetic"),
        ("Time and memory on a GPU: ", "time and hardware"),
    ],
)
def test_a_header_that_lacks_something_is_found_out(cut, fault):
    text = (recipe.folder() / "detr_r50_coco.yaml").read_text()
    assert cut in text and fault in faults_of_header(text.replace(cut, ""), "detr_r50_coco")


def test_the_schema_in_the_recipes_folder_is_current():
    path = recipe.folder() / "schema.json"
    assert path.read_text() == recipe.schema(), "run: detr-accel recipes --schema recipes/schema.json"


def test_every_knob_says_what_it_means():
    schema = json.loads(recipe.schema())
    sections = {"Recipe": schema, **schema["$defs"]}
    knobs = [(f"{s}.{k}", p) for s, body in sections.items() for k, p in body["properties"].items()]
    silent = [name for name, p in knobs if "description" not in p]
    assert silent == []


def test_a_folder_for_shapes_is_refused_instead_of_not_read(tmp_path):
    (tmp_path / "r.yaml").write_text("data: {format: shapes}\n")
    with pytest.raises(UserError, match="data.root is /data/mine while data.format is shapes.*data.format=coco"):
        recipe.load(tmp_path / "r.yaml", ["data.root=/data/mine"])


def test_a_stored_recipe_is_read_whatever_a_new_one_may_not_say():
    """A finished run must not become unreadable by a rule that came later."""
    text = "data: {format: shapes, square: true, eval_size: 1600}\nmodel: {name: rtdetr}\nloss: {aux: false}\n"
    assert recipe.loads(recipe.dumps(recipe.loads(text))).loss.aux is False


def test_a_stored_recipe_can_be_changed_as_on_the_command_line():
    stored = recipe.loads("data: {format: shapes}")
    assert recipe.changed(stored, ["data.eval_size=320"]).data.eval_size == 320
    assert recipe.changed(stored, []) == stored
    square = recipe.loads("data: {format: shapes, square: true, eval_size: 640, eval_max_size: 640}")
    with pytest.raises(UserError, match="eval_max_size .640. bounds every side: raise it too"):
        recipe.changed(square, ["data.eval_size=800"])
    with pytest.raises(UserError, match="the stored recipe|command line"):
        recipe.changed(stored, ["data.eval_sise=320"])
