"""A set that is streamed: every image once an epoch, the same for any number of processes, at any window at once."""

import itertools
import re
import shutil
import time
from pathlib import Path

import datasets
import datasets.distributed
import numpy as np
import pytest
from shared import load_module

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.data import hub_columns, look, stream
from detr_accel.structures import LoaderTime, UserError

hub_sets = load_module(Path(__file__).with_name("hub_sets.py"))

NUM = 22  # with windows of 8: 8, 8, 6
PER_EPOCH = 3


@pytest.fixture
def coco(hub_coco):
    return hub_coco(NUM, 4)


@pytest.fixture
def make(tmp_path, coco, recipe_for):
    """A recipe and the stream it opens, of a parquet folder whose shards hold a different number of images each."""

    def build(shards: int = 4, length=None, lanes="auto", block: int = 12, folder=None, **more):
        folder = folder or tmp_path / f"set{shards}"
        if not folder.exists():
            hub_sets.parquet(coco, folder, shards=shards, uneven=True)
        hub = {"streaming": True, "length": length, "lanes": lanes, "block": block} | more
        recipe = recipe_for(folder, format="hub", hub=hub)
        return recipe, data.build(recipe)

    return build


def windows(recipe, source, rank=0, num_ranks=1, start=0, end=2 * PER_EPOCH):
    return list(
        data.train_windows(
            recipe, source, rank=rank, num_ranks=num_ranks, start_window=start, end_window=end, mean=(0.5,) * 3,
            std=(0.2,) * 3,
        )
    )  # fmt: skip


def ids(window) -> list[int]:
    return [t.image_id for batch in window for t in batch.targets]


def assert_same(found, wanted):
    assert len(found) == len(wanted) > 0
    for a, b in zip(sum(found, []), sum(wanted, []), strict=True):
        assert a.images.equal(b.images) and a.positions == b.positions and (a.window, a.epoch) == (b.window, b.epoch)
        for s, t in zip(a.targets, b.targets, strict=True):
            assert s.image_id == t.image_id and s.labels.equal(t.labels) and s.boxes_cxcywh.equal(t.boxes_cxcywh)


@pytest.mark.parametrize(("shards", "lanes"), [(4, 1), (4, "auto"), (6, 3), (1, "auto")])
def test_each_epoch_has_each_image_once_in_an_order_of_its_own(make, shards, lanes):
    recipe, splits = make(shards, lanes=lanes)
    assert len(splits.train) == NUM
    found = windows(recipe, splits.train)
    epochs = [sum(map(ids, found[:PER_EPOCH]), []), sum(map(ids, found[PER_EPOCH:]), [])]
    for order in epochs:
        assert sorted(order) == list(range(1, NUM + 1)) and order != sorted(order)
    assert epochs[0] != epochs[1]
    assert [len(ids(w)) for w in found] == [8, 8, 6] * 2
    assert [b.epoch for w in found for b in w] == [0] * 11 + [1] * 11


@pytest.mark.law1
@pytest.mark.parametrize(("shards", "lanes"), [(4, "auto"), (6, 3), (4, 1)])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_a_window_holds_the_same_images_for_any_number_of_processes(make, shards, lanes, num_ranks):
    recipe, splits = make(shards, lanes=lanes)
    alone = windows(recipe, splits.train)
    together = [windows(recipe, splits.train, rank, num_ranks) for rank in range(num_ranks)]
    for w, window in enumerate(alone):
        parts = [ids(together[rank][w]) for rank in range(num_ranks)]
        assert sorted(sum(parts, [])) == sorted(ids(window))
        boxes = {t.image_id: t.boxes_cxcywh for b in window for t in b.targets}
        for rank in range(num_ranks):
            for target in (t for b in together[rank][w] for t in b.targets):
                assert target.boxes_cxcywh.equal(boxes[target.image_id]), "the same plan, wherever it is read"


@pytest.mark.law1
def test_padded_to_the_largest_canvas_images_are_those_of_one_process(make):
    """A process that reads its own lanes knows its own images only; training pads to the largest canvas of all."""
    recipe, splits = make(4)
    alone = windows(recipe, splits.train)
    together = [windows(recipe, splits.train, rank, 2) for rank in range(2)]
    different = 0
    for w, window in enumerate(alone):
        wanted = {t.image_id: (i, m) for b in window for t, i, m in zip(b.targets, b.images, b.mask, strict=True)}
        parts = [b for part in together for b in part[w]]
        canvas_px = tuple(max(b.canvas_px[i] for b in parts) for i in range(2))
        assert canvas_px == window[0].canvas_px
        different += any(b.canvas_px != canvas_px for b in parts)
        for b in (b.padded(canvas_px) for b in parts):
            for target, image, mask in zip(b.targets, b.images, b.mask, strict=True):
                assert image.equal(wanted[target.image_id][0]) and mask.equal(wanted[target.image_id][1])
    assert different > 0


def test_a_process_reads_its_own_shards_where_they_divide(make, monkeypatch):
    recipe, splits = make(4)
    opened, plain = [], datasets.distributed.split_dataset_by_node

    def record(dataset, rank, world_size):
        opened.append(rank)
        return plain(dataset, rank=rank, world_size=world_size)

    monkeypatch.setattr(datasets.distributed, "split_dataset_by_node", record)
    windows(recipe, splits.train, 1, 2, end=PER_EPOCH)
    assert sorted(opened) == [1, 3]
    opened.clear()
    windows(recipe, splits.train, 1, 3, end=PER_EPOCH)
    assert sorted(opened) == [0, 1, 2, 3]
    assert data.who_reads_what(splits.train, 2) == ["stream: each of 2 processes reads its own 2 of 4 lanes"]
    assert "reads everything and keeps its part" in data.who_reads_what(splits.train, 3)[0]
    assert data.who_reads_what(splits.train, 1) == []
    opened.clear()
    windows(recipe, splits.train, start=2, end=3)
    assert 0 < len(opened) <= 4, "what lies behind is not read again"


@pytest.mark.law2
@pytest.mark.parametrize(("lanes", "block"), [(1, 4), (2, 5), ("auto", 1000), (1, 1)])
def test_any_window_is_found_at_once(make, lanes, block):
    recipe, splits = make(4, lanes=lanes, block=block)
    whole = windows(recipe, splits.train)
    for start in range(2 * PER_EPOCH):
        assert_same(windows(recipe, splits.train, start=start), whole[start:])


@pytest.mark.law2
def test_a_stream_that_does_not_tell_its_length_is_asked_for_it_and_goes_on_exactly(tmp_path, coco, make):
    folder = hub_sets.imagefolder(coco, tmp_path / "folder")
    names = {"class_names": ["cat", "dog"], "folder": folder}
    with pytest.raises(UserError, match="does not tell how many images it has: set data.hub.length"):
        make(**names)
    recipe, splits = make(length=NUM, **names)
    whole = windows(recipe, splits.train)
    assert sorted(sum(map(ids, whole[:PER_EPOCH]), [])) == list(range(1, NUM + 1))
    for start in (1, 2, 4):
        assert_same(windows(recipe, splits.train, start=start), whole[start:])
    both = [sum(map(ids, windows(recipe, splits.train, r, 2)), []) for r in range(2)]
    assert sorted(both[0] + both[1]) == sorted(2 * list(range(1, NUM + 1)))
    recipe, splits = make(length=NUM + 5, **names)
    with pytest.raises(UserError, match=f"ended after {NUM} images, data.hub.length says {NUM + 5}: set"):
        windows(recipe, splits.train)


@pytest.mark.parametrize("layout", ["lists", "structs"])
@pytest.mark.parametrize("sizes", [hub_sets.SIZES, {}], ids=["told", "headers"])
def test_images_and_boxes_are_those_of_the_set_read_whole(tmp_path, coco, make, recipe_for, layout, sizes):
    folder = hub_sets.parquet(coco, tmp_path / "set", layout, shards=4, uneven=True, sizes=sizes)
    recipe, splits = make(folder=folder)
    whole = data.build(recipe_for(Path(recipe.data.root), format="hub")).train
    place = {whole.image_id(i): i for i in range(len(whole))}
    rows = list(splits.train.rows(5, 0, 2, 0)) + list(splits.train.rows(5, 0, 3, 0))
    assert len(rows) > 8
    for row in rows:
        mine, theirs = splits.train.sample(row), whole.sample(place[row.image_id])
        assert np.array_equal(mine.image, theirs.image) and mine.labels.tolist() == theirs.labels.tolist()
        assert mine.boxes_xyxy_px.tolist() == theirs.boxes_xyxy_px.tolist()
    assert splits.train.classes == whole.classes == splits.val.classes and len(splits.val) == 4


def test_workers_and_pixels_on_the_device_give_the_same(make):
    recipe, splits = make(4)
    wanted = windows(recipe, splits.train)
    assert_same(windows(recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 2})}),
                        splits.train, start=1), wanted[1:])  # fmt: skip
    there = recipe.model_copy(update={"data": recipe.data.model_copy(update={"pixels": "device"})})
    moved = [[b.to("cpu") for b in w] for w in windows(there, splits.train)]
    for a, b in zip(sum(moved, []), sum(wanted, []), strict=True):
        assert a.positions == b.positions and float((a.images - b.images).abs().max()) < 3.1 / 255 / 0.2


def test_an_image_without_an_id_has_a_name_all_the_same(tmp_path, coco, make):
    images = {"image": datasets.Image()}
    folder = hub_sets.parquet(coco, tmp_path / "anonymous", shards=4, uneven=True, images=images)
    known = make(folder=folder)[1].train
    unknown = stream.open_stream(known.dataset, hub_columns.Columns(), None, NUM, 4, "auto", known.title)
    for source in (known, unknown):
        rows = [row for lane in range(source.lanes) for row in source.rows(5, 0, lane, 0)]
        assert len({row.image_id for row in rows}) == NUM
        assert source.names_of([row.image_id for row in rows]) == {row.image_id: row.name for row in rows}


def test_a_shorter_length_leaves_the_rest_out(make):
    recipe, splits = make(4, length=10)
    found = windows(recipe, splits.train, end=2)
    assert [len(ids(w)) for w in found] == [8, 2]
    with pytest.raises(UserError, match=f"has {NUM} images, data.hub.length asks for 99"):
        make(4, length=99)


@pytest.mark.law8
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: row["image"].update(bytes=b"no image"), "row 3 cannot be decoded"),
        (lambda row: row.update(image=None), "row 3 has no image: remove the row"),
        (lambda row: row.update(objects=None), "row 3: its objects are null"),
        (lambda row: row["objects"]["category"].pop(), "row 3: its objects' fields differ in length"),
    ],
)
def test_a_broken_row_is_named_in_its_turn(tmp_path, coco, make, change, told):
    rows = hub_sets.records(coco, "train", "lists")
    change(rows[3])
    kinds = hub_sets.IMAGES | hub_sets.SIZES | {"objects": hub_sets.lists_of()}
    folder = hub_sets.write_rows(tmp_path / "broken", rows, kinds)
    hub_sets.write_rows(folder, hub_sets.records(coco, "val", "lists"), kinds, "validation")
    recipe, splits = make(folder=folder)
    found = windows(recipe, splits.train, end=3)
    assert sorted(sum(map(ids, found), [])) == [i for i in range(1, NUM + 1) if i != 4]
    ((image_id, why),) = [lost for w in found for b in w for lost in b.lost]
    assert image_id == 4 and re.search(f"^[^:]*split train, shard 0, {told}", why), why
    stop = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_bad": "stop"})})
    seen = []
    with pytest.raises(UserError, match=f"^[^:]*split train, shard 0, {told}"):
        for window in data.train_windows(
            stop, splits.train, rank=0, num_ranks=1, start_window=0, end_window=3, mean=(0.5,) * 3, std=(0.2,) * 3
        ):
            seen.append(window)
    assert all(i != 4 for w in seen for i in ids(w))


def test_a_shard_that_breaks_off_is_one_sentence(make):
    recipe, splits = make(4)
    (Path(recipe.data.root) / "train-00001-of-00004.parquet").write_bytes(b"cut off")
    with pytest.raises(UserError, match="shard 1 cannot be read on: .*--resume") as told:
        windows(recipe, splits.train)
    assert "\n" not in str(told.value)


def test_what_a_stream_cannot_know_is_asked_for_in_one_sentence(tmp_path, coco, make):
    with pytest.raises(UserError, match="'category' holds numbers without names: .*data.hub.class_names"):
        make(length=NUM, folder=hub_sets.imagefolder(coco, tmp_path / "folder"))
    rows = hub_sets.records(coco, "train", "lists")
    kinds = hub_sets.IMAGES | {"objects": hub_sets.lists_of()}
    with pytest.raises(UserError, match="single split 'train'.*data.hub.val_split"):
        make(folder=hub_sets.write_rows(tmp_path / "one", rows, kinds))
    for row in rows:
        row["objects"]["category"] = [("cat", "dog")[c] for c in row["objects"]["category"]]
    named = hub_sets.IMAGES | {"objects": hub_sets.lists_of(datasets.Value("string"))}
    folder = hub_sets.write_rows(tmp_path / "named", rows, named)
    hub_sets.write_rows(folder, rows[:3], named, "validation")
    with pytest.raises(UserError, match="is streamed, so that its class names .*data.hub.class_names"):
        make(folder=folder)
    assert make(folder=folder, class_names=["cat", "dog"])[1].val.classes.names == ("cat", "dog")
    with pytest.raises(UserError, match="data.hub.lanes is 9, but .* has 4 shards"):
        make(4, lanes=9)


@pytest.mark.parametrize("more", [
    "data.group_by_shape=true", "data.cache=ram", "evaluate.train_images=9",
    "data.augment.mosaic={probability: 0.5}", "data.augment.mixup={probability: 0.5}",
])
def test_what_needs_all_images_first_is_refused(tmp_path, more):
    path = tmp_path / "a.yaml"
    path.write_text("data: {format: hub, root: x, hub: {streaming: true}}\n")
    recipes.load(path)
    with pytest.raises(UserError, match=f"{more.partition('=')[0]}.*need to see all images first"):
        recipes.load(path, [more])


def test_the_doctor_takes_its_time_too(make):
    recipe, splits = make(4)
    spent = [b.spent for w in itertools.islice(windows(recipe, splits.train), 3) for b in w]
    cost = sum(spent, LoaderTime()).per_image()
    assert cost.read < 1e-4 < cost.total and cost.pixels > 0


def test_what_a_slow_stream_is_waited_for_travels_with_the_batches(make, monkeypatch):
    """It is the training process that waits, whatever loader processes there are."""
    recipe, splits = make(4)
    plain = stream.StreamSource.rows

    def slow(self, *args):
        for row in plain(self, *args):
            time.sleep(0.02)
            yield row

    monkeypatch.setattr(stream.StreamSource, "rows", slow)
    for workers in (0, 1):
        recipe.data.workers, begun = workers, time.perf_counter()
        spent = [b.spent for w in windows(recipe, splits.train) for b in w]
        cost, seconds = sum(spent, LoaderTime()).per_image(), time.perf_counter() - begun
        assert 0.01 < cost.stream <= seconds / (2 * NUM) and cost.stream not in (cost.read, cost.total)
        assert cost.total < 0.02, "of a loader process, which waits for nothing"


def test_memory_is_planned_for_what_the_recipe_allows(make):
    """``batch.micro: auto`` asks for the worst window before the first image has been seen."""
    recipe, splits = make(4)
    (height, width), boxes = data.worst_window(recipe, splits.train)
    assert (height, width) == (64, 64) and boxes == recipe.model.num_queries
    for window in windows(recipe, splits.train):
        assert all(b.images.shape[2] <= height and b.images.shape[3] <= width for b in window)


@pytest.mark.parametrize(
    ("shards", "lanes"), [(1, 1), (7, 7), (8, 8), (10, 10), (24, 8), (330, 10), (4096, 16), (17, 1)]
)
def test_lanes_divide_the_shards_and_suit_numbers_of_processes(shards, lanes):
    assert stream._lanes(shards) == lanes


def test_a_stream_is_closed_with_its_windows(make):
    import threading

    recipe, splits = make(4)
    some = data.train_windows(
        recipe, splits.train, rank=0, num_ranks=1, start_window=0, end_window=99, mean=(0.5,) * 3, std=(0.2,) * 3
    )  # fmt: skip
    next(some)
    assert any(t.name == "stream" for t in threading.enumerate())
    some.close()
    assert not any(t.name == "stream" for t in threading.enumerate())


def test_row_counts_are_read_from_any_file_system(make):
    import fsspec

    from detr_accel.data import hub_files

    def rows(names):
        return hub_files.shard_rows(hub_files.look_at(names))

    recipe, splits = make(4)
    files = sorted(Path(recipe.data.root).glob("train-*"))
    for file in files:
        with fsspec.open(f"memory://set/{file.name}", "wb") as out:
            out.write(file.read_bytes())
    remote = [f"memory://set/{file.name}" for file in files]
    assert rows(remote) == rows(list(map(str, files))) == splits.train.shard_rows
    assert rows([*remote, "memory://set/im1.jpg"]) is None and rows([]) is None


def test_a_shard_that_is_cut_off_is_named_at_the_start(make):
    recipe, _ = make(4)
    file = Path(recipe.data.root) / "train-00002-of-00004.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"^{file} cannot be read as parquet: .*write the file anew$"):
        make(4)


def test_the_files_know_better_than_the_card_how_many_images_there_are(make):
    train = make(4)[1].train
    for card in (NUM - 4, NUM + 4):
        source = stream.open_stream(
            train.dataset, hub_columns.Columns(), train.shard_rows, None, 12, "auto", "set", card=card
        )
        assert len(source) == NUM
    untold = stream.open_stream(train.dataset, hub_columns.Columns(), None, None, 12, 1, "set", card=NUM + 4)
    recipe, _ = make(4)
    with pytest.raises(UserError, match=f"after {NUM} images, its card says {NUM + 4}: set data.hub.length={NUM}"):
        windows(recipe, untold)


@pytest.mark.law2
def test_a_stream_is_known_by_its_files_and_not_by_where_they_lie(tmp_path, coco, make):
    recipe, splits = make(4)
    folder, known = Path(recipe.data.root), splits.train.fingerprint()
    shutil.copytree(folder, tmp_path / "moved")
    assert make(folder=tmp_path / "moved")[1].train.fingerprint() == known
    first = folder / "train-00002-of-00004.parquet"
    rows = datasets.Dataset.from_parquet(str(first), cache_dir=str(tmp_path / "some"))

    def shifted(row):
        return row | {"objects": row["objects"] | {"bbox": [[x + 1, *more] for x, *more in row["objects"]["bbox"]]}}

    rows.map(shifted, features=rows.features).to_parquet(first)
    assert make(4)[1].train.shard_rows == splits.train.shard_rows
    assert make(4)[1].train.fingerprint() != known


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_split_of_a_stream_is_evaluated_without_the_files_of_another(make, split):
    recipe, splits = make(4)
    kept = data.eval_source(recipe, split=split)
    assert len(kept) == {"val": len(splits.val), "train": NUM}[split]
    for file in Path(recipe.data.root).glob("validation-*" if split == "train" else "train-*"):
        held = file.read_bytes()  # the footers are read, to know the columns; no image is
        footer = int.from_bytes(held[-8:-4], "little") + 8
        file.write_bytes(held[:4] + bytes(len(held) - footer - 4) + held[-footer:])
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE)
    assert len(data.eval_source(recipe, split=split)) == len(kept)


def test_lanes_end_together(make):
    """Shards of 1, 3, 7 and 11 images: a short lane is spread over the epoch, not used up at its beginning."""
    _, splits = make(4)
    lane_of, rows = splits.train.lane_of, splits.train.shard_rows
    assert np.bincount(lane_of).tolist() == rows and len(set(rows)) == 4
    for lane, num in enumerate(rows):
        at = np.flatnonzero(lane_of == lane)
        assert np.abs((at + 0.5) / NUM - (np.arange(num) + 0.5) / num).max() < 4 / NUM


@pytest.mark.law8
def test_the_doctor_the_preview_and_a_rehearsal_see_a_stream_too(make):
    recipe, splits = make(4)
    sheet, line = data.preview(recipe, splits.train, epoch=1, images=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert sheet.width > 3 * 360 and line.startswith("epoch 1 of ")
    some = data.in_any_order(recipe, splits.train, 6)
    first = sum(map(ids, windows(recipe, splits.train, end=1)), [])
    assert [some.image_id(i) for i in range(len(some))] == first[:6]
    for i in range(6):
        sample = some.sample(i)
        assert sample.image.shape[:2] == some.size_px(i) and len(sample.labels) <= some.most_boxes()
        boxes, category_ids = look.truth(some, i)
        assert boxes.tolist() == sample.boxes_xyxy_px.tolist() and category_ids.tolist() == sample.labels.tolist()
    assert data.in_any_order(recipe, splits.val) is splits.val


@pytest.mark.law1
def test_no_window_of_a_stream_is_taken_for_one_that_all_processes_share(make):
    """A reduction during backward would wait for ever for a process whose lanes bring nothing to a small window."""
    _, splits = make(4, lanes=4)
    assert not data.all_share(splits.train, 8, 2) and data.all_share(splits.train, 8, 3)
    assert data.all_share(splits.val, 2, 2) and not data.all_share(splits.val, 1, 2)
    assert data.all_share(splits.train, 1, 1)


@pytest.mark.parametrize("name", ["photometric", "zoom_out", "iou_crop", "large_scale_jitter"])
def test_augmentation_of_one_image_works_on_a_stream(make, name):
    recipe, splits = make(4)
    on, off = (f"{name}:\n      probability: {p}" for p in (1.0, 0.0))
    changed = recipes.loads(recipes.dumps(recipe).replace(off, on))
    assert getattr(changed.data.augment, name).probability == 1
    plain, found = (windows(r, splits.train, end=PER_EPOCH) for r in (recipe, changed))
    assert [ids(w) for w in found] == [ids(w) for w in plain]
    assert not any(a.images.equal(b.images) for a, b in zip(sum(plain, []), sum(found, []), strict=True))
    together = [windows(changed, splits.train, rank, 2, end=PER_EPOCH) for rank in range(2)]
    boxes = {t.image_id: t.boxes_cxcywh for w in found for b in w for t in b.targets}
    assert all(t.boxes_cxcywh.equal(boxes[t.image_id]) for part in together for w in part for b in w for t in b.targets)
