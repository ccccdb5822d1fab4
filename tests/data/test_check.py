"""``detr-accel check-data``: each kind of dirt is found, counted, shown, and told what training does about it."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared import load_module

from detr_accel import cli, data
from detr_accel.data.check import ALL, CHECKS
from detr_accel.data.check_files import look_at
from detr_accel.data.dirt import KINDS
from detr_accel.recipe import Recipe

DATA = Path(__file__).parents[2].parent / "shared/data"
pytestmark = pytest.mark.law8


@pytest.fixture
def folder(tmp_path, write_split):
    """12 images to train on and 4 to validate on, of 20 x 30 px, cats and dogs; nothing odd."""
    write_split(tmp_path / "annotations/instances_train.json", tmp_path / "train", 12)
    write_split(tmp_path / "annotations/instances_val.json", tmp_path / "val", 4, first=21)
    return tmp_path


def report_of(root: Path, policy: str = "mend", workers: int = 0, **model):
    recipe = Recipe.model_validate({"data": {"root": str(root), "on_bad": policy}, "model": model})
    return data.check(recipe, workers=workers)


def found(report) -> dict[tuple[str, str], int]:
    return {(f.split, f.kind): f.count for f in report.findings}


def change_json(change, split: str = "train"):
    def act(root: Path) -> None:
        path = root / f"annotations/instances_{split}.json"
        tree = json.loads(path.read_text())
        path.write_text(change(tree) or json.dumps(tree))

    return act


def record(kind: str, number: int, **values):
    return change_json(lambda t: t[kind][number].update(values))


def picture(number: int, mode: str = "RGB", form: str = "PNG", size=(30, 20), **options):
    """Replace im2.png by noise in another mode."""

    def act(root: Path) -> None:
        pixels = np.random.default_rng(99 + number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
        image.save(root / "train/im2.png", form, **options)

    return act


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(2, exif=exif)(root)


def copy(source: str, target: str):
    return lambda root: (root / target).write_bytes((root / source).read_bytes())


def corners(tree: dict) -> None:
    rng = np.random.default_rng(0)
    boxes = [np.sort(rng.uniform(0, (30, 20), (2, 2)), axis=0).ravel().tolist() for _ in range(60)]
    tree["annotations"] = [
        {"id": i + 1, "image_id": 1 + i % 12, "category_id": (2, 7)[i % 2], "bbox": b} for i, b in enumerate(boxes)
    ]


def many(tree: dict) -> None:
    tree["annotations"] += [
        {"id": 900 + i, "image_id": 3, "category_id": 2, "bbox": [i % 20, i // 20, 9, 9]} for i in range(110)
    ]


def uneven(tree: dict) -> None:
    tree["annotations"] += [
        {"id": 900 + i, "image_id": 1 + i % 12, "category_id": 2, "bbox": [i % 20, i // 100, 9, 9]} for i in range(800)
    ]


# damage -> where it is found, and how often
FOUND = {
    "truncated": (lambda r: (r / "train/im2.png").write_bytes(b"\x89PNG\r\n"), {("train", "image.unreadable"): 1}),
    "missing": (lambda r: (r / "train/im2.png").unlink(), {("train", "image.missing"): 1}),
    "missing in val": (lambda r: (r / "val/im21.png").unlink(), {("val", "image.missing"): 1}),
    "another size": (record("images", 1, width=60, height=40), {("train", "image.scaled"): 1}),
    "another shape": (record("images", 1, width=20, height=30), {("train", "image.other_size"): 1}),
    "turned": (turned, {("train", "image.exif"): 1}),
    "16 bits": (picture(2, "I;16"), {("train", "image.mode"): 1}),
    "CMYK": (picture(2, "CMYK", "JPEG"), {("train", "image.mode"): 1, ("train", "image.named"): 1}),
    "palette": (picture(2, "P"), {("train", "image.mode"): 1}),
    "alpha": (picture(2, "RGBA"), {("train", "image.mode"): 1}),
    "one bit": (picture(2, "1"), {("train", "image.mode"): 1}),
    "JPEG named png": (picture(2, form="JPEG"), {("train", "image.named"): 1}),
    "grey is not odd": (picture(2, "L"), {}),
    "huge": (
        lambda r: (picture(2, size=(300, 200))(r), record("images", 1, width=300, height=200)(r)),
        {("train", "image.huge"): 1},
    ),
    "one colour": (lambda r: Image.new("RGB", (30, 20)).save(r / "train/im2.png"), {("train", "image.blank"): 1}),
    "a copy": (copy("train/im1.png", "train/im2.png"), {("train", "image.copy"): 1}),
    "leakage": (copy("train/im1.png", "val/im21.png"), {("val", "image.leak"): 1}),
    "flat": (record("annotations", 1, bbox=[1, 2, 0, 9]), {("train", "box.flat"): 1}),
    "outside": (record("annotations", 1, bbox=[40, 2, 5, 9]), {("train", "box.outside"): 1}),
    "inverted": (record("annotations", 1, bbox=[9, 9, -5, 9]), {("train", "box.inverted"): 1}),
    "not a number": (record("annotations", 1, bbox=[9, 9, float("nan"), 9]), {("train", "annotation.box"): 1}),
    "reaches out": (record("annotations", 1, bbox=[25, 2, 15, 9]), {("train", "box.cut"): 1}),
    "corners": (change_json(corners), {("train", "box.format"): 60, ("train", "box.cut"): None}),
    "twice": (
        change_json(lambda t: t["annotations"].append(t["annotations"][1] | {"id": 900})), {("train", "box.twice"): 1},
    ),
    "nearly twice": (
        change_json(lambda t: t["annotations"].append(t["annotations"][1] | {"id": 900, "bbox": [1, 2, 9, 10.1]})),
        {("train", "box.overlap"): 1},
    ),
    "ids used twice": (record("annotations", 1, id=10), {("train", "annotation.ids"): 2}),
    "one id, two files": (
        change_json(lambda t: t["images"].append(t["images"][1] | {"file_name": "im3.png"})),
        {("train", "image.id_twice"): 1},
    ),
    "one file, two records": (record("images", 1, file_name="im1.png"), {("train", "image.file_twice"): 1}),
    "unknown category": (record("annotations", 1, category_id=3), {("train", "annotation.category"): 1}),
    "unknown image": (record("annotations", 1, image_id=99), {("train", "annotation.image"): 1}),
    "tiny": (record("annotations", 1, bbox=[1, 2, 0.3, 0.3]), {("train", "box.small"): 1}),
    "more objects than queries": (change_json(many), {("train", "image.queries"): 1}),
    "uneven": (change_json(uneven), {("train", "category.balance"): None, ("train", "box.twice"): None}),
    "unseen": (
        change_json(lambda t: t.update(annotations=[a for a in t["annotations"] if a["category_id"] == 2])),
        {("train", "category.unused"): 1, ("val", "category.unseen"): 1},
    ),
    "one box of a class": (
        change_json(
            lambda t: t.update(annotations=[a for a in t["annotations"] if a["category_id"] == 2 or a["id"] == 21])
        ),
        {("train", "category.one_box"): 1},
    ),
    "other names": (
        change_json(lambda t: t["categories"][0].update(name="horse"), "val"), {("val", "category.names"): 2},
    ),
    "no json": (change_json(lambda t: "{", "val"), {("val", "json"): 1}),
    "no categories": (change_json(lambda t: t.update(categories=[])), {("train", "json"): 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_each_kind_is_found_and_nothing_else(folder, name):
    change, expected = FOUND[name]
    change(folder)
    report = report_of(folder)
    counts = found(report)
    assert {k: v for k, v in counts.items() if expected.get(k, 0) is not None} == {
        k: v for k, v in expected.items() if v is not None
    }
    assert all(k in counts for k in expected)
    assert report.ok == (not any(ALL[kind].harm for _, kind in counts))
    for f in report.findings:
        assert f.training and f.examples and len(f.examples) <= 5 and ALL[f.kind].words
        assert not any("\n" in text for text in f.examples)
    data.check_report.page(report, "x")
    assert json.loads(json.dumps(report.to_json()))["ok"] == report.ok


def test_a_clean_folder_is_clean(folder):
    report = report_of(folder)
    assert report.findings == [] and report.ok and "clean" in data.check_report.table(report)
    assert report.splits["train"]["images"] == report.splits["train"]["read"] == 12
    assert report.classes == [{"name": "cat", "train": 8, "val": 2}, {"name": "dog", "train": 4, "val": 1}]


def test_the_policy_is_told(folder):
    record("annotations", 1, bbox=[1, 2, 0, 9])(folder)
    (mended,), (stopped,) = (report_of(folder, policy).findings for policy in ("mend", "stop"))
    assert mended.training == KINDS["box.flat"].mend and not mended.harm
    assert "does not start" in stopped.training and stopped.harm


def test_what_is_said_of_images_is_what_training_does(folder, recipe_for):
    """Each image that the report says is left out is the one that the loader leaves out, and no other."""
    (folder / "train/im1.png").write_bytes(b"")
    (folder / "train/im3.png").unlink()
    record("images", 4, width=20, height=30)(folder)
    record("images", 6, width=60, height=40)(folder)
    recipe = recipe_for(folder)
    windows = data.train_windows(
        recipe, data.build(recipe).train, rank=0, num_ranks=1, start_window=0, end_window=2, mean=(0.5,) * 3,
        std=(0.5,) * 3, micro=4,
    )  # fmt: skip
    lost = {image_id for window in windows for image_id, _ in data.without_lost(window)[1]}
    empty = {f.examples[0] for f in report_of(folder).findings if "stays empty" in f.training}
    assert lost == {1, 3, 5} and {int(re.search(r"im(\d+)\.png", text)[1]) for text in empty} == lost


def test_worker_processes_find_the_same(folder):
    for change in ("truncated", "a copy", "flat"):
        FOUND[change][0](folder)
    one, two = (report_of(folder, workers=w).to_json() for w in (0, 2))
    for i in range(30, 60):  # more than one worker's worth
        (folder / f"train/im{i}.png").write_bytes((folder / "train/im3.png").read_bytes())
    change_json(lambda t: t["images"].extend(
        {"id": i, "file_name": f"im{i}.png", "width": 30, "height": 20} for i in range(30, 60)
    ))(folder)  # fmt: skip
    three, four = (report_of(folder, workers=w).to_json() for w in (0, 2))
    assert one == two and three == four and three != one


def test_every_file_gives_facts_and_never_an_error(tmp_path):
    for name, content in {
        "empty": b"",
        "text": b"hello",
        "zeros": bytes(500),
        "jpeg": b"\xff\xd8\xff\xe0" + bytes(90),
    }.items():
        path = tmp_path / f"{name}.jpg"
        path.write_bytes(content)
        facts = look_at(str(path), (20, 30))
        assert facts.fault == "image.unreadable" and str(path) in facts.why and facts.digest == b""


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["check-data", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_line(folder, tmp_path, capsys):
    code, out, _ = run(capsys, folder, "--workers", "0")
    assert code == 0 and "clean: nothing odd" in out
    FOUND["flat"][0](folder)
    assert run(capsys, folder, "--json", "--workers", "0")[0] == 0, "mended"
    FOUND["leakage"][0](folder)
    code, out, _ = run(capsys, folder, "--json", "--workers", "0")
    told = json.loads(out)
    assert code == 1 and [(f["kind"], f["harm"]) for f in told["findings"]] == [
        ("image.leak", True),
        ("box.flat", False),
    ]
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: {{root: {folder}}}\nmodel: {{num_queries: 1}}\n")
    code, out, _ = run(capsys, file, "model.num_queries=2", "data.on_bad=stop", "--workers", "0")
    assert code == 1 and "2 queries" in out and "data.on_bad: stop" in out
    code, _, err = run(capsys, tmp_path / "nowhere")
    assert code == 2 and "nowhere" in err and err.count("\n") == 1
    code, _, err = run(capsys, folder, "data.on_bad=stop")
    assert code == 2 and "needs a recipe" in err


def test_the_page_needs_nothing_but_itself_and_shows_the_worst(folder, tmp_path, capsys):
    change_json(lambda t: t["categories"][0].update(name="<script>alert(1)</script>"))(folder)
    change_json(lambda t: t["categories"][0].update(name="<script>alert(1)</script>"), "val")(folder)
    for name in ("outside", "leakage"):
        FOUND[name][0](folder)
    (folder / "train/im5.png").write_bytes(b"")
    assert run(capsys, folder, "--out", tmp_path / "out", "--workers", "0")[0] == 1
    page = (tmp_path / "out/report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert (
        not re.findall(r"(?:src|href)=\"(?!data:image/jpeg;base64,)", page)
        and "http" not in page
        and "url(" not in page
    )
    assert page.count("<img") == 3 and page.count("cannot be shown") == 1
    assert json.loads((tmp_path / "out/report.json").read_text())["ok"] is False


def test_a_single_json_and_a_test_split(tmp_path, write_split):
    write_split(tmp_path / "one/labels.json", tmp_path / "one/images", 6)
    assert list(report_of(tmp_path / "one").splits) == ["all"]
    for split in ("train", "valid", "test"):
        write_split(tmp_path / f"rf/{split}/_annotations.coco.json", tmp_path / f"rf/{split}", 6)
    report = report_of(tmp_path / "rf")
    assert list(report.splits) == ["train", "val", "test"]
    assert found(report) == {("val", "image.leak"): 6, ("test", "image.leak"): 6}


def test_the_check_looks_at_what_a_training_takes(tmp_path, write_split):
    """A json from before the split was cut, and settings beside the pictures, are no splits."""
    write_split(tmp_path / "a/annotations/train.json", tmp_path / "a/images", 4)
    write_split(tmp_path / "a/annotations/val.json", tmp_path / "a/images", 3, first=5)
    write_split(tmp_path / "a/annotations/annotations.json", tmp_path / "a/images", 7)
    (tmp_path / "a/settings.json").write_text("{}")
    report = report_of(tmp_path / "a")
    assert list(report.splits) == ["train", "val"] and not [f for f in report.findings if f.harm]
    write_split(tmp_path / "b/annotations/annotations.json", tmp_path / "b/images", 4)
    others = [{"id": 7, "name": "wolf"}, {"id": 2, "name": "cat"}]
    write_split(tmp_path / "b/annotations/annotations_val.json", tmp_path / "b/images", 3, first=5, categories=others)
    report = report_of(tmp_path / "b")
    assert sorted(report.splits) == ["train", "val"] and [f for f in report.findings if f.harm]


@pytest.mark.parametrize(("name", "harm"), [("bccd", set()), ("coco_free", {"category.unseen"}), ("cards", set())])
def test_genuine_data(name, harm):
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent")
    report = report_of(DATA / name, workers=2)
    assert {f.kind for f in report.findings if f.harm} == harm
    if name == "bccd":
        assert found(report) == {("train", "box.flat"): 2, ("train", "box.overlap"): 6, ("val", "box.overlap"): 1}


def test_fuzzed_annotations_never_crash_the_check(tmp_path, write_split):
    dirt = load_module(Path(__file__).with_name("test_dirt.py"))
    tree = write_split(tmp_path / "annotations/train.json", tmp_path / "images", 5)
    write_split(tmp_path / "annotations/val.json", tmp_path / "images", 2, first=6)
    rng, told = random.Random(5), 0
    for case in range(300):
        text = json.dumps(dirt.mutate(rng, tree))
        (tmp_path / "annotations/train.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with dirt.at_most(20):
            report = report_of(tmp_path, ("mend", "drop", "stop")[case % 3])
            data.check_report.table(report).encode()
            data.check_report.page(report, "x")
            json.dumps(report.to_json())
        told += len(report.findings) > 0
    assert told > 250


def test_no_kind_has_two_meanings():
    assert not set(KINDS) & set(CHECKS)
    assert len({row.words for row in ALL.values()}) == len(ALL)
