"""Whatever is wrong with a data set is mended, left out or refused, counted by kind, and never becomes a wrong box."""

import copy
import json
import math
import random
import re
import signal
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_accel import data
from detr_accel.data.decode import read_rgb, same_shape
from detr_accel.data.dirt import KINDS, Dirt
from detr_accel.data.settle import other_format
from detr_accel.structures import UserError
from detr_accel.train import lost_images

DATA = Path(__file__).parents[2].parent / "shared/data"
pytestmark = pytest.mark.law8


@pytest.fixture
def folder(tmp_path, write_split):
    """Images 1..6 of 20 x 30 px; 2 and 5 have a cat and a dog, 1 and 4 a cat, 3 and 6 nothing."""
    for number, split in enumerate(("train", "val")):
        write_split(tmp_path / f"annotations/instances_{split}.json", tmp_path / split, 6, first=10 * number + 1)
    return tmp_path


def spoil(root: Path, change) -> None:
    path = root / "annotations/instances_train.json"
    tree = json.loads(path.read_text())
    change(tree, root / "train")
    path.write_text(json.dumps(tree))


def targets(source) -> dict[int, list]:
    """Image id -> sorted (class name, box), of every image that can be read."""
    found = {}
    for i in range(len(source)):
        try:
            sample = source.sample(i)
        except UserError:
            found[source.image_id(i)] = None
            continue
        h, w = source.size_px(i)
        assert sample.image.shape == (h, w, 3) and sample.image.dtype == np.uint8
        names = [source.classes.names[label] for label in sample.labels]
        found[source.image_id(i)] = sorted(zip(names, sample.boxes_xyxy_px.tolist(), strict=True))
    return found


def box(i: int, k: int) -> tuple[str, list[float]]:
    return ("cat", "dog")[k], [3.0 * k + 1, 2.0, 3.0 * k + 10, 10.0 + i % 5]


CLEAN = {i: [box(i, k) for k in range(i % 3)] for i in range(1, 7)}
GONE = None  # its place is there, and empty


def put(kind: str, number: int, **values):
    return lambda tree, _: tree[kind][number].update(values)


def again(kind: str, number: int, **values):
    return lambda tree, _: tree[kind].append(tree[kind][number] | values)


def without(kind: str, number: int, key: str):
    return lambda tree, _: tree[kind][number].pop(key)


def more(kind: str, record):
    return lambda tree, _: tree[kind].append(record)


def file(change):
    """``change`` gets the path of image 2."""
    return lambda _, images: change(images / "im2.png")


def save(mode: str = "RGB", form: str = "PNG"):
    def change(path: Path) -> None:
        Image.new(mode, (30, 20)).save(path, form)

    return change


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 60)).save(path, exif=exif)


def without_images(*ids: int) -> dict:
    return {i: rows for i, rows in CLEAN.items() if i not in ids}


def of_2(*rows) -> dict:
    return CLEAN | {2: list(rows)}


def scaled_sizes(tree, _) -> None:
    """Image 2 was shrunk by two, its record was not; its boxes are where the record has them."""
    tree["images"][1].update(width=60, height=40)


CAT, DOG = box(2, 0), box(2, 1)
# damage -> kinds counted, what remains under mend, and under drop where that differs
DAMAGE = {
    "annotation is text": (more("annotations", "x"), {"annotation.record": 1}, CLEAN),
    "annotation is null": (more("annotations", None), {"annotation.record": 1}, CLEAN),
    "unknown image": (put("annotations", 1, image_id=99), {"annotation.image": 1}, of_2(DOG)),
    "image id is a list": (put("annotations", 1, image_id=[2]), {"annotation.image": 1}, of_2(DOG)),
    "image id beyond 64 bits": (put("annotations", 1, image_id=2**70), {"annotation.image": 1}, of_2(DOG)),
    "no image id": (without("annotations", 1, "image_id"), {"annotation.image": 1}, of_2(DOG)),
    "image id as text": (put("annotations", 1, image_id="2"), {"number.text": 1}, CLEAN, of_2(DOG)),
    "image id as a float": (put("annotations", 1, image_id=2.0), {}, CLEAN),
    "unknown category": (put("annotations", 1, category_id=3), {"annotation.category": 1}, of_2(DOG)),
    "category as text": (put("annotations", 1, category_id="2"), {"number.text": 1}, CLEAN, of_2(DOG)),
    "category by name": (put("annotations", 1, category_id="cat"), {"annotation.category": 1}, of_2(DOG)),
    "no box": (without("annotations", 1, "bbox"), {"annotation.box": 1}, of_2(DOG)),
    "box of three numbers": (put("annotations", 1, bbox=[1, 2, 3]), {"annotation.box": 1}, of_2(DOG)),
    "nan in a box": (put("annotations", 1, bbox=[1, 2, math.nan, 4]), {"annotation.box": 1}, of_2(DOG)),
    "infinity in a box": (put("annotations", 1, bbox=[1, 2, math.inf, 4]), {"annotation.box": 1}, of_2(DOG)),
    "an integer beyond floats": (put("annotations", 1, bbox=[1, 2, 10**400, 4]), {"annotation.box": 1}, of_2(DOG)),
    "words in a box": (put("annotations", 1, bbox=[1, 2, "wide", 4]), {"annotation.box": 1}, of_2(DOG)),
    "a box as text": (put("annotations", 1, bbox=["1", "2", "9", "10"]), {"number.text": 1}, CLEAN, of_2(DOG)),
    "zero width": (put("annotations", 1, bbox=[1, 2, 0, 10]), {"box.flat": 1}, of_2(DOG)),
    "inverted": (put("annotations", 1, bbox=[10, 12, -9, -10]), {"box.inverted": 1}, of_2(DOG)),
    "outside": (put("annotations", 1, bbox=[31, 2, 9, 10]), {"box.outside": 1}, of_2(DOG)),
    "reaches out": (
        put("annotations", 1, bbox=[-5, -5, 9, 10]), {"box.cut": 1}, of_2(("cat", [0.0, 0.0, 4.0, 5.0]), DOG),
    ),
    "beyond every float32": (
        put("annotations", 1, bbox=[1, 2, 1e300, 10]), {"box.cut": 1}, of_2(("cat", [1.0, 2.0, 30.0, 12.0]), DOG),
    ),
    "the same box twice": (again("annotations", 1, id=77), {"box.twice": 1}, CLEAN),
    "the same box, another class": (
        again("annotations", 1, id=77, category_id=7), {}, of_2(CAT, (("dog", CAT[1])), DOG),
    ),
    "annotation id used twice": (put("annotations", 1, id=10), {"annotation.ids": 2}, CLEAN),
    "image is text": (more("images", "x"), {"image.record": 1}, CLEAN),
    "image without id": (without("images", 1, "id"), {"image.record": 1, "annotation.image": 2}, without_images(2)),
    "image id by name": (put("images", 1, id="two"), {"image.record": 1, "annotation.image": 2}, without_images(2)),
    "image without file name": (put("images", 1, file_name=" "), {"image.record": 1}, without_images(2)),
    "half a character": (put("images", 1, file_name="a\ud800.png"), {"image.record": 1}, without_images(2)),
    "zero byte in a name": (put("images", 1, file_name="a\0.png"), {"image.record": 1}, without_images(2)),
    "one id, two files": (
        lambda t, f: t["images"].append(t["images"][1] | {"file_name": "im5.png"}), {"image.id_twice": 1},
        without_images(2),
    ),
    "a record twice": (again("images", 1), {"image.record_twice": 1}, CLEAN),
    "a file twice": (
        put("images", 3, file_name="im2.png"), {"image.file_twice": 1},
        without_images(4) | {2: sorted([CAT, box(4, 0), DOG])}, without_images(2, 4),
    ),
    "a file twice with two sizes": (
        put("images", 3, file_name="im2.png", width=60, height=40), {"image.file_conflict": 1}, without_images(2, 4),
    ),
    "two folders' pictures in one file": (  # flattened, and one overwrote the other
        lambda t, f: [t["images"][i].update(file_name=f"cam{i}/im2.png") for i in (1, 3)],
        {"image.file_conflict": 1}, without_images(2, 4),
    ),
    "one file for two folders, and once without": (
        lambda t, f: [t["images"][i].update(file_name=f"{at}im2.png") for i, at in ((1, ""), (3, "a/"), (4, "b/"))],
        {"image.file_twice": 1, "image.file_conflict": 1}, without_images(2, 4, 5),
    ),
    "a head, and an annotation with no id for a category": (
        lambda t, f: (
            t["annotations"][1].update(category_id=[3]),
            t.update(categories=[{"id": 0, "name": "cat"}, *({**c, "supercategory": "cat"} for c in t["categories"])]),
        ),
        {"category.head": 1, "annotation.category": 1}, of_2(DOG),
    ),
    "a file twice, once with its folder": (
        put("images", 3, file_name="images/im2.png"), {"image.file_twice": 1},
        without_images(4) | {2: sorted([CAT, box(4, 0), DOG])}, without_images(2, 4),
    ),
    "a category above one of its name": (  # as Roboflow writes a project whose group has its class's name
        lambda t, f: t.update(categories=[
            {"id": 0, "name": "cat", "supercategory": "none"},
            *({**c, "supercategory": "cat"} for c in t["categories"]),
        ]),
        {"category.head": 1}, CLEAN,
    ),
    "negative size": (put("images", 1, height=-4), {"image.size": 1}, CLEAN, without_images(2)),
    "fractional size": (put("images", 1, width=30.5), {"image.size": 1}, CLEAN, without_images(2)),
    "size as text": (put("images", 1, width="30"), {"number.text": 1}, CLEAN, without_images(2)),
    "size is not there": (without("images", 1, "width"), {}, CLEAN),
    "no size anywhere": (
        lambda t, f: (t["images"][1].pop("width"), (f / "im2.png").write_text("?")), {"image.no_size": 1},
        without_images(2),
    ),
    "missing": (put("images", 1, file_name="gone.png"), {"image.missing": 1}, CLEAN | {2: GONE}),
    "a name for two files": (
        lambda t, f: [(f / d).mkdir() or save()(f / d / "b.png") for d in "xy"]
        and t["images"][1].update(file_name="b.png"),
        {"image.unclear": 1}, CLEAN | {2: GONE},
    ),
    "another shape": (put("images", 1, width=20, height=30), {"image.other_size": 1}, CLEAN | {2: GONE}),
    "another size": (scaled_sizes, {"image.scaled": 1}, CLEAN, CLEAN | {2: GONE}),
    "another size, turned": (file(turned), {"image.scaled": 1}, CLEAN, CLEAN | {2: GONE}),
    "empty file": (file(lambda p: p.write_bytes(b"")), {}, CLEAN | {2: GONE}),
    "web page": (file(lambda p: p.write_bytes(b"<html>not found</html>")), {}, CLEAN | {2: GONE}),
    "truncated": (file(lambda p: p.write_bytes(p.read_bytes()[:400])), {}, CLEAN | {2: GONE}),
    "a folder": (file(lambda p: (p.unlink(), p.mkdir())), {"image.missing": 1}, CLEAN | {2: GONE}),
    "floating-point pixels": (file(save(mode="F", form="TIFF")), {}, CLEAN | {2: GONE}),
    "JPEG named png": (file(save(form="JPEG")), {}, CLEAN),
    "CMYK": (file(save(mode="CMYK", form="JPEG")), {}, CLEAN),
    "16 bits": (file(save(mode="I;16")), {}, CLEAN),
    "palette": (file(save(mode="P")), {}, CLEAN),
    "alpha": (file(save(mode="RGBA")), {}, CLEAN),
}  # fmt: skip


@pytest.mark.parametrize("policy", ["mend", "drop"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_counted_and_leaves_only_right_boxes(folder, recipe_for, name, policy):
    change, kinds, mended, *dropped = DAMAGE[name]
    spoil(folder, change)
    splits = data.build(recipe_for(folder, on_bad=policy))
    assert targets(splits.train) == (dropped[0] if dropped and policy == "drop" else mended)
    said = "\n".join(splits.found)
    for kind, num in kinds.items():
        told = {"box.flat": "boxes without area", "box.outside": "boxes outside their image"}.get(kind)
        assert f"{num} {told or KINDS[kind].words}" in said, said
    others = [k for k in KINDS if k not in kinds and re.search(rf"\d {re.escape(KINDS[k].words)}", said)]
    assert not others, said


def test_there_are_many_kinds_of_damage():
    assert len(DAMAGE) >= 50 and {k for _, kinds, *_ in DAMAGE.values() for k in kinds} <= set(KINDS)


STOPS = [n for n, (_, kinds, *_) in DAMAGE.items() if any(KINDS[k].stops for k in kinds)]


@pytest.mark.parametrize("name", STOPS)
def test_stop_ends_with_one_sentence_at_the_first(folder, recipe_for, name):
    spoil(folder, DAMAGE[name][0])
    with pytest.raises(UserError) as caught:
        data.build(recipe_for(folder, on_bad="stop"))
    assert "\n" not in str(caught.value) and "train" in str(caught.value)


@pytest.mark.parametrize("name", [n for n, row in DAMAGE.items() if row[2].get(2, ()) is GONE])
def test_stop_does_not_read_what_the_others_leave_empty(folder, recipe_for, name):
    spoil(folder, DAMAGE[name][0])
    try:
        train = data.build(recipe_for(folder, on_bad="stop")).train
    except UserError:
        return
    with pytest.raises(UserError):
        train.sample(1)


def test_a_clean_folder_has_nothing_to_say(folder, recipe_for):
    assert len(data.build(recipe_for(folder)).found) == 2
    assert data.build(recipe_for(folder, on_bad="stop")).found == data.build(recipe_for(folder)).found


def test_mending_leaves_the_fingerprint_of_clean_data_alone(folder, recipe_for):
    prints = {data.build(recipe_for(folder, on_bad=policy)).train.fingerprint() for policy in ("mend", "drop", "stop")}
    assert len(prints) == 1
    (folder / "train/im2.png").unlink()  # it keeps its place, so a run goes on where it stopped
    assert {data.build(recipe_for(folder)).train.fingerprint()} == prints


def test_most_images_missing_is_another_folder(folder, recipe_for):
    for i in range(1, 5):
        (folder / f"train/im{i}.png").unlink()
    with pytest.raises(UserError, match="4 of 6 images are not in .*train, the first is 'im1.png'"):
        data.build(recipe_for(folder))


def test_ground_truth_is_the_file_with_what_cannot_be_evaluated_left_out(folder, recipe_for):
    """Zero-area, outside and doubled boxes count as in pycocotools; NaN and unknown ids cannot."""
    extra = [
        {"image_id": 3, "category_id": 2, "bbox": b, "id": 90 + k, "area": 4.0, "iscrowd": 0}
        for k, b in enumerate([[3, 3, 0, 4], [40, 3, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4], [1, 2, math.nan, 3]])
    ]
    spoil(folder, lambda tree, _: tree["annotations"].extend(extra))
    truth = data.build(recipe_for(folder)).train.ground_truth()
    assert [a["id"] for a in truth["annotations"] if a["image_id"] == 3] == [90, 91, 92, 93]


@pytest.mark.law8
@pytest.mark.parametrize("times", [0.5, 1.5])
@pytest.mark.parametrize("strong", ["nothing", "iou_crop", "large_scale_jitter", "mosaic"])
def test_a_scaled_picture_keeps_its_boxes_on_what_they_mark(folder, recipe_for, strong, times):
    """A white square, marked in a picture of twice the size; through decoding, plan and normalisation."""
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[40:80, 120:200] = 255
    small = (round(300 * times), round(200 * times))
    Image.fromarray(pixels).resize(small, Image.Resampling.BILINEAR).save(folder / "train/im2.png")

    def change(tree, _):
        tree["images"][1].update(width=300, height=200)
        tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != 2]
        tree["annotations"].append({"id": 500, "image_id": 2, "category_id": 2, "bbox": [120, 40, 80, 40]})

    spoil(folder, change)
    for pixels_at in ("workers", "device"):
        augment = {"scales": [96, 128], "max_size": 200, "crop_scales": [100], "crop_size": (90, 140)}
        augment |= {strong: {"probability": 1.0, "stop": 1.0}} if strong != "nothing" else {}
        recipe = recipe_for(folder, pixels=pixels_at, augment=augment)
        windows = data.train_windows(
            recipe, data.build(recipe).train, rank=0, num_ranks=1, start_window=0, end_window=1, mean=(0.0,) * 3,
            std=(1.0,) * 3, micro=6,
        )  # fmt: skip
        (batch,) = next(windows)
        batch = batch.to("cpu")
        (row,) = [i for i, t in enumerate(batch.targets) if t.image_id == 2]
        target = batch.targets[row]
        assert target.orig_size_px == (200, 300)
        (h, w), image = target.size_px, batch.images[row, 0]
        if strong == "mosaic":  # other pictures, with boxes of their own: nothing fails
            continue
        if len(target.boxes_cxcywh):  # a crop may have lost it
            cx, cy, bw, bh = target.boxes_cxcywh[0].tolist()
            y0, y1, x0, x1 = (cy - bh / 2) * h, (cy + bh / 2) * h, (cx - bw / 2) * w, (cx + bw / 2) * w
            inner = image[math.ceil(y0 + 2) : math.floor(y1 - 2), math.ceil(x0 + 2) : math.floor(x1 - 2)]
            assert inner.min() > 0.8 if inner.numel() else (y1 - y0) * (x1 - x0) < 60
            if strong != "large_scale_jitter":  # there it may be a few pixels large
                assert image[:h, :w].sum() / ((y1 - y0) * (x1 - x0)) == pytest.approx(1, abs=0.1)


def test_a_few_fractions_are_told_from_a_few_boxes_of_a_pixel():
    sizes, few = np.full((12, 2), 480), np.tile([[0.31, 0.22, 0.4, 0.5]], (12, 1))
    assert other_format(few, sizes)[0] == other_format(few[:1], sizes[:1])[0] == "fractions"
    assert other_format(np.tile([[1.0, 0.0, 1.0, 1.0]], (12, 1)), sizes) == ("", "")
    assert other_format(np.array([[-9.5, -8.0, 0.8, 0.6]]), sizes[:1]) == ("", "")
    assert other_format(np.zeros((0, 4)), np.zeros((0, 2))) == ("", "")


def test_shapes_are_compared_to_a_pixel():
    assert same_shape((480, 640), (240, 320)) and same_shape((427, 640), (213, 320)) and same_shape((21, 30), (20, 30))
    assert not same_shape((480, 640), (640, 480)) and not same_shape((480, 640), (240, 330))
    assert not same_shape((2, 1), (2, 3)), "anything fits a picture of a few pixels"


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda x, y, w, h, W, H: [x, y, x + w, y + h], r"look like \[x1, y1, x2, y2\]"),
        (lambda x, y, w, h, W, H: [x + w / 2, y + h / 2, w, h], r"look like \[centre x, centre y, width, height\]"),
        (lambda x, y, w, h, W, H: [x / W, y / H, w / W, h / H], "look like fractions"),
        (lambda x, y, w, h, W, H: [x, y, w, h], None),
    ],
)
@pytest.mark.parametrize("policy", ["mend", "drop", "stop"])
def test_boxes_in_another_format_are_refused_before_training(folder, recipe_for, write, said, policy):
    rng = np.random.default_rng(3)
    boxes = []
    for _ in range(60):
        w, h = rng.uniform(2, 29), rng.uniform(2, 19)
        boxes.append(write(rng.uniform(0, 30 - w), rng.uniform(0, 20 - h), w, h, 30, 20))
    rows = [{"id": i + 1, "image_id": 1 + i % 6, "category_id": 2, "bbox": b} for i, b in enumerate(boxes)]
    spoil(folder, lambda tree, _: tree.update(annotations=rows))
    if said is None:
        assert len(data.build(recipe_for(folder, on_bad=policy)).found) == 3  # dogs have no box
        return
    with pytest.raises(UserError, match=f"instances_train.json: the boxes {said}.*export them"):
        data.build(recipe_for(folder, on_bad=policy))


@pytest.mark.parametrize("name", ["coco_free", "bccd", "cards"])
def test_genuine_boxes_are_not_taken_for_another_format(name):
    for split in ("train", "val"):
        path = DATA / name / f"annotations/instances_{split}.json"
        if not path.exists():
            pytest.skip(f"{path} is absent")
        tree = json.loads(path.read_text())
        size = {i["id"]: (i["height"], i["width"]) for i in tree["images"]}
        boxes = np.array([a["bbox"] for a in tree["annotations"]], float)
        sizes = np.array([size[a["image_id"]] for a in tree["annotations"]])
        assert other_format(boxes, sizes) == ("", "")
        boxes[:, 2:] += boxes[:, :2]
        assert other_format(boxes, sizes)[0] == "[x1, y1, x2, y2]"


def test_genuine_dirt_is_named(recipe_for):
    if not (DATA / "bccd").is_dir():
        pytest.skip(f"{DATA / 'bccd'} is absent")
    splits = data.build(recipe_for(DATA / "bccd"))
    assert sum(line.count("boxes without area") for line in splits.found) >= 1
    zero = [s for s in (splits.train, splits.val) for i in range(len(s)) if _has_flat(s, i)]
    assert len(zero) == 2
    with pytest.raises(UserError, match=r"annotation \d+ of 'BloodImage_00(338|343).jpg' \(640x480\): bbox \["):
        data.build(recipe_for(DATA / "bccd", on_bad="stop"))
    if not (DATA / "coco_free").is_dir():
        pytest.skip(f"{DATA / 'coco_free'} is absent")
    splits = data.build(recipe_for(DATA / "coco_free", on_bad="drop"))
    crowds = [int(n) for line in splits.found for n in re.findall(r"(\d+) crowd regions", line)]
    assert sum(crowds) == 14 and not any("cannot" in line for line in splits.found)


def _has_flat(source, index: int) -> bool:
    t, row = source.table, int(source._rows[index])
    return bool((t.boxes_xywh_px[t.offsets[row] : t.offsets[row + 1], 2:] <= 0).any())


# --- fuzz: deterministic, bounded in time


@contextmanager
def at_most(seconds: int):
    """A case that hangs fails here, with its place, and not in somebody's training."""

    def late(*_):
        raise AssertionError("a case hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


JUNK = [
    None, True, False, 0, 1, -1, 2, 7, 99, 2**31, 2**63, -(2**63), 10**30, 0.5, 2.0, -0.0, 1e308, -1e308, 1e-320,
    math.nan, math.inf, -math.inf, "", " ", "2", "-7", "1e3", "cat", "im3.png", "../im1.png", "a\ud800", "\0",
    "x" * 300, [], [2], [1, 2, 9, 10], [1, 2, -3, 4], [5, 5, 0, 0], [100, 100, 5, 5], ["1", "2", "3", "4"],
    [1, 2, 3, math.nan], {}, {"id": 2}, [[1, 2, 3, 4]], [25, 15, 1e30, 1e30], [-1e30, -1e30, 2e30, 2e30],
    "\uff11\uff12", "\u0663",
]  # fmt: skip


def mutate(rng: random.Random, tree: dict) -> dict:
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        kind = rng.choice(("images", "annotations", "annotations", "annotations", "categories"))
        rows = tree.get(kind)
        if not isinstance(rows, list) or not rows or rng.random() < 0.01:
            tree[kind] = rng.choice(JUNK)
            continue
        at = rng.randrange(len(rows))
        what = rng.random()
        if what < 0.08:
            rows[at] = rng.choice(JUNK)
        elif what < 0.16:
            rows.append(copy.deepcopy(rows[at]))
        elif what < 0.2:
            del rows[at]
        elif isinstance(rows[at], dict) and rows[at]:
            key = rng.choice(sorted(rows[at]))
            other = rng.choice(rows)
            if what < 0.3:
                del rows[at][key]
            elif what < 0.45 and isinstance(other, dict):
                rows[at][key] = copy.deepcopy(other.get(key))
            elif what < 0.6 and isinstance(rows[at].get("bbox"), list) and len(rows[at]["bbox"]) == 4:
                rows[at]["bbox"][rng.randrange(4)] = rng.choice(JUNK)
            else:
                rows[at][key] = rng.choice(JUNK)
    return tree


def number(value):
    """What a value says, read by another way than the program's."""
    try:
        return None if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def allowed(tree: dict, file_of: dict[str, set], name: str, h: int, w: int) -> list:
    """Every (class name, box) that the json puts into the file of this name, cut at the border."""
    names = {}
    for c in tree["categories"]:
        names.setdefault(number(c["id"]), set()).add(str(c["name"]))
    found = []
    for a in tree["annotations"]:
        if not isinstance(a, dict) or not isinstance(a.get("bbox"), list) or number(a.get("image_id")) is None:
            continue
        values = [number(v) for v in a["bbox"]]
        if len(values) != 4 or None in values or number(a["image_id"]) not in file_of.get(name, ()):
            continue
        x, y, bw, bh = np.array(values, np.float64)
        with np.errstate(all="ignore"):
            cut = np.clip([x, y, x + bw, y + bh], 0, [w, h, w, h])
        found += [(n, cut) for n in names.get(number(a.get("category_id")), ())]
    return found


def check_case(source, tree: dict) -> int:
    file_of: dict[str, set] = {}
    for record in tree["images"]:
        if isinstance(record, dict) and isinstance(record.get("file_name"), str):
            file_of.setdefault(Path(record["file_name"]).name, set()).add(number(record.get("id")))
    checked = 0
    for i in range(len(source)):
        h, w = source.size_px(i)
        boxes, labels, _ = source._targets(source._rows[i], (h, w))
        assert (boxes >= 0).all() and (boxes <= (w, h, w, h)).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        fitting = allowed(tree, file_of, Path(source.name(i)).name, h, w)
        for target, label in zip(boxes, labels.tolist(), strict=True):
            name = source.classes.names[label]
            assert any(n == name and np.allclose(target, b, rtol=1e-4, atol=1e-3) for n, b in fitting), (target, name)
            checked += 1
    return checked


def test_fuzzed_annotations_never_crash_nor_make_a_wrong_box(tmp_path, recipe_for, write_split):
    tree = write_split(tmp_path / "annotations/train.json", tmp_path / "images", 5)
    write_split(tmp_path / "annotations/val.json", tmp_path / "images", 2, first=6)
    path, rng, refused, checked = tmp_path / "annotations/train.json", random.Random(8), 0, 0
    recipes = [recipe_for(tmp_path, on_bad=policy) for policy in ("mend", "mend", "drop", "stop")]
    for case in range(2500):
        damaged = mutate(rng, tree)
        text = json.dumps(damaged)
        if rng.random() < 0.1:  # the text itself
            at = rng.randrange(len(text))
            junk = rng.choice(("", "\x00", "]", "}", '"', "1e999", "\\ud800"))
            text = text[:at] + junk + text[at + rng.randrange(3) :]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with at_most(5):
            try:
                source = data.build(recipes[case % 4]).train
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000
                refused += 1
                continue
            checked += check_case(source, json.loads(text))
            index = case % len(source)
            try:
                sample = source.sample(index)
                assert sample.image.shape == (*source.size_px(index), 3)
            except UserError:
                pass
    assert 300 < refused < 1500 and checked > 5000


def pictures() -> list[tuple[bytes, str]]:
    import io

    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    made = []
    for form, mode in (
        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("GIF", "P"),
        ("BMP", "RGB"), ("TIFF", "RGB"), ("WEBP", "RGB"), ("PPM", "RGB"),
    ):  # fmt: skip
        out = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(out, form)
        made.append((out.getvalue(), form))
    return made


def damaged_bytes(rng: random.Random, whole: bytes) -> bytes:
    spoilt = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(spoilt)) if rng.random() < 0.5 else rng.randrange(min(64, len(spoilt)))
        what = rng.random()
        if what < 0.5:
            spoilt[at] = rng.randrange(256)
        elif what < 0.65:
            del spoilt[at : at + rng.randrange(1, 30)]
        elif what < 0.8:
            spoilt[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif what < 0.9:
            spoilt[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)))
        else:
            del spoilt[max(1, at) :]
        if not spoilt:
            break
    return bytes(spoilt)


def test_fuzzed_image_files_give_a_picture_of_the_right_size_or_a_sentence(tmp_path):
    rng, path, read, refused = random.Random(8), tmp_path / "a.jpg", 0, 0
    wholes = pictures()
    for case in range(3300):
        whole, _ = wholes[case % len(wholes)]
        path.write_bytes(damaged_bytes(rng, whole))
        size = rng.choice(((24, 36), (24, 36), (12, 18), (48, 72), None))
        least = rng.choice((None, (8, 12)))
        with at_most(5), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = read_rgb(path, size, least, scale=bool(case % 2))
            except UserError as error:
                assert "a.jpg" in str(error) and "\n" not in str(error)
                refused += 1
                continue
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert size is None or least is not None or image.shape[:2] == size
        read += 1
    assert read > 500 and refused > 500


def test_names_that_are_no_utf8_reach_every_console_and_file(folder, recipe_for):
    name = "caf\udce9.png"
    spoil(folder, put("images", 1, file_name=name))
    said = "\n".join(data.build(recipe_for(folder)).found)
    assert "1 images whose file is not there" in said and b"caf\\udce9.png" in said.encode()
    (folder / "train" / name).write_bytes(b"no image")
    source = data.build(recipe_for(folder)).train
    with pytest.raises(UserError) as caught:
        source.sample(1)
    assert b"caf\\udce9.png" in lost_images.words([(2, str(caught.value))], set()).encode()
    report = data.check(recipe_for(folder))
    data.check_report.table(report).encode()
    data.check_report.write(report, folder / "out", "x")


def test_the_collector_keeps_few_examples():
    dirt = Dirt("mend")
    for i in range(1000):
        dirt.note("box.flat", f"box {i}")
    assert dirt.counts["box.flat"] == 1000 and dirt.examples["box.flat"] == [f"box {i}" for i in range(5)]
    assert dirt.lines("train") == ["data: train: 1000 boxes without area (left out of the targets), the first: box 0"]
