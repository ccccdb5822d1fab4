"""The cache gives what the source gives, once decoded; it survives kills, rivals and changes."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.data import cache
from detr_accel.data.cache import CachedSource
from detr_accel.data.shapes import ShapesSource
from detr_accel.structures import UserError

COCO_FREE = Path(__file__).parents[3] / "shared/data/coco_free"
needs_data = pytest.mark.skipif(not COCO_FREE.is_dir(), reason=f"{COCO_FREE} is absent")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def recipe_for(folder: Path, kind: str = "disk", root: Path = COCO_FREE, **more):
    more = {"workers": 1, "cache": kind, "cache_folder": str(folder), "root": str(root)} | more
    return recipes.Recipe.model_validate({"data": more, "batch": {"size": 4, "micro": 4}})


def build(recipe) -> data.Splits:
    return data.with_cache(recipe, data.build(recipe), quiet=True)


def first_windows(recipe, source, number=6):
    windows = data.train_windows(
        recipe, source, rank=0, num_ranks=1, start_window=0, end_window=number, mean=MEAN, std=STD
    )
    return [batch for window in windows for batch in window]


def no_decoding(*args):
    raise AssertionError("decoded again")


@needs_data
def test_batches_are_those_without_a_cache_and_nothing_is_decoded_again(tmp_path, monkeypatch):
    """No image of coco_free is larger than DETR's largest scale, so all are kept as they are."""
    recipe = recipe_for(tmp_path, workers=0)
    plain, splits = data.build(recipe), build(recipe)
    assert isinstance(splits.train, CachedSource) and "built in" in splits.found[-1]
    wanted = first_windows(recipe, plain.train)
    evaluated = data.eval_batches(recipe, plain.val, rank=0, num_ranks=1, mean=MEAN, std=STD)
    evaluated = [next(evaluated) for _ in range(5)]
    monkeypatch.setattr("detr_accel.data.coco.read_rgb", no_decoding)
    for one, other in zip(wanted, first_windows(recipe, splits.train), strict=True):
        assert (one.images == other.images).all() and (one.mask == other.mask).all()
        for a, b in zip(one.targets, other.targets, strict=True):
            assert (a.boxes_cxcywh == b.boxes_cxcywh).all() and (a.labels == b.labels).all()
            assert (a.image_id, a.size_px, a.orig_size_px) == (b.image_id, b.size_px, b.orig_size_px)
    stream = data.eval_batches(recipe, splits.val, rank=0, num_ranks=1, mean=MEAN, std=STD)
    for one, other in zip(evaluated, stream, strict=False):
        assert (one.images == other.images).all()
    again = build(recipe)
    assert "found" in again.found[-1] and "found" in again.found[-2]
    assert again.train.ground_truth() == plain.train.ground_truth() and len(again.train) == len(plain.train)


def photo(path: Path, h: int, w: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((w, h), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten photographs of 320 x 400, some boxes."""
    root = tmp_path / "set"
    truth = ShapesSource(1, "train", 10, 400).ground_truth()
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        for i, record in enumerate(truth["images"]):
            record |= {"file_name": f"{i}.jpg", "height": 320, "width": 400}
            photo(root / split / f"{i}.jpg", 320, 400, i)
        for a in truth["annotations"]:
            a["bbox"] = [10, 20, 100, 90]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))
    return root


SMALL = {"augment": {"scales": [80, 120], "max_size": 200, "crop": 0.0}, "eval_size": 100, "eval_max_size": 160}


def test_large_images_are_kept_no_larger_than_needed(folder, tmp_path):
    recipe = recipe_for(tmp_path / "c", root=folder, **SMALL)
    plain, splits = data.build(recipe), build(recipe)
    assert splits.train.sample(0).image.shape == (120, 150, 3) and splits.val.sample(0).image.shape == (100, 125, 3)
    assert splits.train.size_px(0) == (320, 400), "the file's, which plans start from"
    for one, other in zip(first_windows(recipe, plain.train, 3), first_windows(recipe, splits.train, 3), strict=True):
        assert (one.mask == other.mask).all()
        assert (one.targets[0].boxes_cxcywh == other.targets[0].boxes_cxcywh).all()
        off = ((one.images - other.images) * 0.225 * 255).abs()
        assert off.mean() < 3, "two resizes in the place of one"


def test_a_change_of_pixels_sizes_or_boxes_makes_another(folder, tmp_path):
    recipe = recipe_for(tmp_path / "c", root=folder, **SMALL)
    kept = build(recipe).train.sample(3).image.copy()
    assert "found" in build(recipe).found[-2]
    photo(folder / "train/3.jpg", 320, 400, 99)
    os.utime(folder / "train/3.jpg", ns=(1, 1))
    changed = build(recipe)
    assert "built" in changed.found[-2] and (changed.train.sample(3).image != kept).any()
    other = recipe_for(tmp_path / "c", root=folder, **SMALL | {"eval_size": 90})
    train, val = build(other).found[-2:]
    assert "found" in train and "built" in val
    text = (folder / "annotations/instances_train.json").read_text()
    (folder / "annotations/instances_train.json").write_text(text.replace("[10, 20, 100, 90]", "[10, 20, 100, 80]"))
    assert "built" in build(recipe).found[-2]


def test_an_image_that_cannot_be_decoded_is_the_sources_business(folder, tmp_path):
    whole = (folder / "train/5.jpg").read_bytes()
    (folder / "train/5.jpg").write_bytes(whole[:300])
    splits = build(recipe_for(tmp_path / "c", root=folder, **SMALL))
    with pytest.raises(UserError, match="5.jpg cannot be decoded"):
        splits.train.sample(5)
    assert len(splits.train.sample(6).image)
    (folder / "train/5.jpg").write_bytes(whole)
    assert splits.train.sample(5).image.shape == (320, 400, 3)


def build_slowly(recipe, delay: float, out) -> None:
    plain = cache._Images.__getitem__

    def slow(self, index):
        time.sleep(delay)
        return plain(self, index)

    cache._Images.__getitem__ = slow
    splits = build(recipe)
    out.put((splits.found[-2], int(splits.train.sample(4).image.sum())))


def test_a_killed_builder_leaves_nothing_that_is_believed(folder, tmp_path):
    recipe = recipe_for(tmp_path / "c", root=folder, **SMALL)
    fork = multiprocessing.get_context("fork")
    builder = fork.Process(target=build_slowly, args=(recipe, 0.2, fork.Queue()))
    builder.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "c").glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    for child in psutil.Process(builder.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    builder.kill()
    builder.join()
    splits = build(recipe)
    assert "built" in splits.found[-2]
    plain = data.build(recipe).train
    assert splits.train.sample(4).boxes_xyxy_px.tolist() == plain.sample(4).boxes_xyxy_px.tolist()
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_two_builders_at_once_make_one_cache(folder, tmp_path):
    recipe = recipe_for(tmp_path / "c", root=folder, **SMALL)
    fork = multiprocessing.get_context("fork")
    out = fork.Queue()
    builders = [fork.Process(target=build_slowly, args=(recipe, 0.02, out)) for _ in range(2)]
    for builder in builders:
        builder.start()
    told = [out.get(timeout=60) for _ in builders]
    for builder in builders:
        builder.join()
    assert sorted("built" in line for line, _ in told) == [False, True]
    assert told[0][1] == told[1][1]


def test_memory_is_given_back_when_the_process_ends(folder, tmp_path):
    fork = multiprocessing.get_context("fork")
    out = fork.Queue()

    def use() -> None:
        recipe = recipe_for(tmp_path / "c", "ram", folder, **SMALL)
        splits = build(recipe)
        keys = [p.stem for p in cache.RAM.glob("*.pixels")]
        out.put((keys, splits.train.sample(1).image.shape, "memory" in splits.found[-1]))
        cache.atexit._run_exitfuncs()

    before = {p.stem for p in cache.RAM.glob("*.pixels")}
    process = fork.Process(target=use)
    process.start()
    keys, shape, told = out.get(timeout=60)
    process.join()
    assert shape == (120, 150, 3) and told
    mine = set(keys) - before
    assert len(mine) == 2 and not any((cache.RAM / f"{k}.pixels").exists() for k in mine)


@pytest.fixture
def runs(folder, tmp_path, monkeypatch):
    """Starts a run that has a cache in memory and lives until it is told to end; gets the size of its images."""
    monkeypatch.setattr(cache, "RAM", tmp_path / "ram")
    fork, started = multiprocessing.get_context("fork"), []

    def use(size: int, delay: float, out, end) -> None:
        plain = cache._Images.__getitem__
        cache._Images.__getitem__ = lambda self, index: (time.sleep(delay), plain(self, index))[1]
        augment = SMALL["augment"] | {"scales": [size]}
        splits = build(recipe_for(tmp_path / "c", "ram", folder, **SMALL | {"augment": augment, "workers": 0}))
        out.put(splits.found[-2])
        end.wait(60)
        cache.atexit._run_exitfuncs()

    def start(size: int, delay: float = 0.0, wait: bool = True):
        out, end = fork.Queue(), fork.Event()
        started.append(fork.Process(target=use, args=(size, delay, out, end)))
        started[-1].start()
        return started[-1], out.get(timeout=60) if wait else "", end

    yield start
    for process in started:
        process.kill()
        process.join()


def kept() -> int:
    return len(list(cache.RAM.glob("*.pixels")))


def test_what_a_killed_run_left_in_memory_is_removed_and_nothing_that_is_used(runs):
    killed, _, _ = runs(60)
    living, _, _ = runs(80)
    assert kept() == 3, "both validate on the same images"
    killed.kill()
    killed.join()
    assert cache.sweep() > 0 and kept() == 2 and cache.sweep() == 0
    living.kill()
    living.join()
    cache.sweep()
    assert list(cache.RAM.iterdir()) == []


def test_the_last_of_two_runs_that_share_a_cache_removes_it(runs):
    (one, first, end_one), (two, second, end_two) = runs(60), runs(60)
    assert "built" in first and "found" in second
    end_one.set()
    one.join(30)
    assert kept() == 2
    end_two.set()
    two.join(30)
    assert list(cache.RAM.iterdir()) == []


def test_of_two_that_end_at_once_one_removes_it(runs, monkeypatch):
    """One looks whether the other still uses it, which lets it go meanwhile."""
    plain = cache._unused

    def slow(path: Path) -> bool:
        found = plain(path)
        time.sleep(0.4)
        return found

    monkeypatch.setattr(cache, "_unused", slow)
    (one, _, end_one), (two, _, end_two) = runs(60), runs(60)
    end_one.set()
    time.sleep(0.2)
    end_two.set()
    one.join(30)
    two.join(30)
    assert list(cache.RAM.iterdir()) == []


def test_a_run_goes_on_with_the_cache_that_it_was_killed_with(runs):
    killed, _, _ = runs(60)
    killed.kill()
    killed.join()
    assert "found" in runs(60)[1]


def test_reckoning_the_room_leaves_what_the_run_will_go_on_with(runs, folder, tmp_path):
    killed, _, _ = runs(60)
    killed.kill()
    killed.join()
    first, _ = sorted(cache.RAM.glob("*.npz"))
    first.unlink()  # as of a run that was killed before its second split was built
    augment = SMALL["augment"] | {"scales": [60]}
    recipe = recipe_for(tmp_path / "c", "ram", folder, **SMALL | {"augment": augment, "workers": 0})
    assert data.cache_room(recipe, data.build(recipe)) > 0 and len(list(cache.RAM.glob("*.npz"))) == 1


def test_what_is_being_built_is_left_alone_until_its_builder_is_gone(runs):
    builder, _, _ = runs(60, delay=0.3, wait=False)
    deadline = time.monotonic() + 30
    while not list(cache.RAM.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert cache.sweep() == 0 and list(cache.RAM.glob("*.tmp"))
    builder.kill()
    builder.join()
    cache.sweep()
    assert list(cache.RAM.iterdir()) == []


def test_who_waited_for_a_lock_that_was_removed_takes_the_new_one(tmp_path):
    """Else two would build at once, one of them under a lock that nobody can find."""
    path, fork = tmp_path / "key", multiprocessing.get_context("fork")
    waits, inside, told = fork.Event(), fork.Event(), fork.Queue()

    def wait() -> None:
        waits.set()
        with cache._locked(path):
            told.put(path.with_suffix(".lock").exists())
            inside.wait(30)

    with cache._locked(path):
        process = fork.Process(target=wait)
        process.start()
        assert waits.wait(30)
        time.sleep(0.3)  # it has opened the file by now, and waits for the lock
        cache._remove(path)
    assert told.get(timeout=30)
    with cache._locked(path, wait=False) as mine:
        assert not mine
    inside.set()
    process.join()


def test_no_room_is_one_sentence(folder, tmp_path, monkeypatch):
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: nearly_full)
    with pytest.raises(UserError, match=r"data.cache=disk needs 0.00 GiB .* set data.cache=none"):
        build(recipe_for(tmp_path / "c", root=folder, **SMALL))


@needs_data
def test_a_workers_memory_does_not_grow_over_epochs(tmp_path):
    """Annotations lie in arrays and images in a mapping: nothing that a forked worker looks at is copied into it."""
    recipe = recipe_for(tmp_path, augment={"scales": [64], "crop": 0.0, "max_size": 96})
    splits = build(recipe)
    per_epoch = data.windows_per_epoch(len(splits.train), 4)
    windows = data.train_windows(
        recipe, splits.train, rank=0, num_ranks=1, start_window=0, end_window=12 * per_epoch, mean=MEAN, std=STD
    )
    own = []
    for number, _ in enumerate(windows, start=1):
        if number in (3 * per_epoch, 11 * per_epoch):
            (worker,) = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE][-1:]
            own.append(worker.memory_full_info().uss / 2**20)
    assert own[1] - own[0] < 20, own  # the interpreter's own heap, copied page by page, would be a hundred


def test_boxes_that_were_cut_are_counted_from_a_cache_too(folder, tmp_path):
    recipe = recipe_for(tmp_path / "c", root=folder, **SMALL)
    path = folder / "annotations/instances_train.json"
    truth = json.loads(path.read_text())
    image = truth["images"][4]
    mine = [a for a in truth["annotations"] if a["image_id"] == image["id"]] or truth["annotations"][:1]
    mine[0] |= {"image_id": image["id"], "bbox": [image["width"] - 30, 10, 60, 40]}
    path.write_text(json.dumps(truth))
    for splits in (data.build(recipe), build(recipe), build(recipe)):  # without, building, found
        assert splits.train.sample(4).num_cut == 1


@pytest.mark.parametrize("damage", [b"", b"\x80\x04cos\nsystem\n", b"PK\x03\x04 and no more"])
def test_a_damaged_index_is_built_anew(folder, tmp_path, damage):
    recipe = recipe_for(tmp_path / "c", root=folder, **SMALL)
    wanted = build(recipe).train.sample(4)
    for index in (tmp_path / "c").glob("*.npz"):
        index.write_bytes(damage)
    splits = build(recipe)
    assert "built in" in splits.found[-2]
    assert (splits.train.sample(4).image == wanted.image).all()


def test_what_a_killed_build_left_does_not_take_the_room_of_the_next(folder, tmp_path, monkeypatch):
    recipe = recipe_for(tmp_path / "c", root=folder, **SMALL)
    build(recipe)
    path = next((tmp_path / "c").glob("*.npz"))
    path.unlink()
    path.with_suffix(".tmp").write_bytes(b"x" * 1000)
    seen = []

    def look(*_):
        seen.append([p.name for p in path.parent.glob(path.stem + ".*")])

    monkeypatch.setattr(cache, "_check_room", look)
    assert any("built" in line for line in build(recipe).found[-2:])
    assert seen[0] == [path.with_suffix(".lock").name]


def test_a_cached_source_travels_to_a_process_that_is_started_anew(folder, tmp_path):
    train = build(recipe_for(tmp_path / "c", root=folder, **SMALL)).train
    travels = pickle.dumps(train)
    assert len(travels) < 100_000 < train._pixels.nbytes
    back = pickle.loads(travels)
    assert (back.sample(3).image == train.sample(3).image).all()
    pickle.dumps(cache._as_it_is)


def test_a_disk_that_fills_up_while_it_is_built_says_so(folder, tmp_path, monkeypatch):
    plain = np.ascontiguousarray

    def full(image):
        if plain(image).dtype == np.uint8:
            raise OSError(28, "No space left on device")
        return plain(image)

    monkeypatch.setattr(cache.np, "ascontiguousarray", full)
    for workers in (0, 1):
        with pytest.raises(UserError, match="No space left on device"):
            build(recipe_for(tmp_path / f"c{workers}", root=folder, **(SMALL | {"workers": workers})))
