"""How many loader processes there may be, and that their queues hold no more than they may."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared import load_module

from detr_accel import data
from detr_accel.data import augment, workers
from detr_accel.data.geometry import Augmentation
from detr_accel.data.workers import GIB, Loading, Machine, Room

hub_sets = load_module(Path(__file__).with_name("hub_sets.py"))
MIB = 2**20


def room_of(queue_bytes: int, cores: float = 8.0, processes: int = 100) -> Room:
    return Room(cores, queue_bytes, processes)


@pytest.mark.parametrize(
    ("count", "prefetch", "tasks", "limit_mib", "expected", "said"),
    [
        (2, 2, 1, 100, Loading(2, 2), None),
        (2, 8, 1, 100, Loading(2, 5), "data.prefetch 8 -> 5"),
        (4, 2, 1, 30, Loading(3, 1), "data.workers 4 -> 3"),
        (4, 2, 1, 9, Loading(0, 1), "data.queue_gib"),
        (0, 2, 1, 9, Loading(0, 1), None),
        (1, "auto", 1, 100, Loading(1, 2), None),
        (1, "auto", 4, 100, Loading(1, 5), None),  # all of the next window, and one in hand
        (4, "auto", 4, 1000, Loading(4, 2), None),
        (2, "auto", 16, 100, Loading(2, 5), "keeps 5 ready and not 9"),
    ],
)
def test_what_waits_stays_below_the_limit(count, prefetch, tasks, limit_mib, expected, said):
    by, note = workers.within(count, prefetch, tasks, 10 * MIB, room_of(limit_mib * MIB))
    assert by == expected
    assert by.workers * by.prefetch * 10 <= limit_mib
    assert (note is None) == (said is None) and (said is None or said in note and "\n" not in note)


def test_the_bytes_of_a_task_are_those_of_the_largest_that_comes(recipe_for):
    recipe = recipe_for(group_by_shape=True)
    source = data.build(recipe).train
    worst = data.task_bytes(recipe, source, 2, torch.device("cpu"))
    seen = 0
    for window in data.train_windows(
        recipe, source, rank=0, num_ranks=1, start_window=0, end_window=20, mean=(0.5,) * 3, std=(0.2,) * 3, micro=2
    ):
        for batch in window:
            seen = max(seen, batch.images.nbytes + batch.mask.nbytes)
    assert 0.5 * worst < seen <= worst


def test_decoded_images_count_as_they_come_out_of_the_decoder():
    policy = Augmentation(0.5, (100,), 200, 0.0, (100,), (50, 100))
    assert workers.decoded_bytes([(50, 100)], policy, None) == 3 * 50 * 100, "the file's size"
    assert workers.decoded_bytes([(700, 1400)], policy, None) == 3 * 175 * 350, "a quarter, as an eighth is too small"
    assert workers.decoded_bytes([(3000, 6000)], policy, None) == 3 * 188 * 375, "always less than twice the sides"
    mosaic = augment.Strong(100, mosaic=augment.Mosaic(0.5, 0.0, 1.0, (0.5, 1.0), 0.1))
    assert workers.decoded_bytes([(50, 100)], policy, mosaic) == 4 * 3 * 50 * 100


def machine(host="a", cpus=range(8), quota=float("inf"), memory=64 * GIB, shared=64 * GIB) -> Machine:
    return Machine(host, frozenset(cpus), quota, memory, shared)


@pytest.mark.parametrize(
    ("machines", "cores", "gib"),
    [
        ([machine()], 8, 2),
        ([machine()] * 4, 2, 2),
        ([machine(cpus=range(4 * i, 4 * i + 4)) for i in range(2)], 4, 2),  # each pinned to its own
        ([machine(quota=2.5)], 2.5, 2),
        ([machine(), machine("b", range(3))], 3, 2),  # the poorest node decides for all
        ([machine(shared=GIB)] * 2, 4, 0.4),
        ([machine(memory=GIB)], 8, 0.5),
    ],
)
def test_processes_of_a_machine_share_it(machines, cores, gib):
    room = workers.room(machines)
    assert (room.cores, room.queue_bytes) == (cores, int(gib * GIB))
    assert workers.room(machines, queue_gib=0.1).queue_bytes == int(0.1 * GIB)


def test_the_limit_of_a_container_or_of_a_group_above_it_counts(tmp_path):
    root, of = tmp_path / "fs", tmp_path / "cgroup"
    (root / "job" / "step").mkdir(parents=True)
    of.write_text("0::/job/step\n")
    assert workers._quota(root, of) == float("inf")
    (root / "job" / "step" / "cpu.max").write_text("max 100000\n")
    assert workers._quota(root, of) == float("inf")
    (root / "job" / "cpu.max").write_text("150000 100000\n")
    assert workers._quota(root, of) == 1.5
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    (root / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert workers._quota(root, of) == 0.5, "the older kind"


@pytest.mark.parametrize(
    ("cores", "processes", "on_gpu", "most", "first"),
    [(8, 99, True, 7, 2), (8, 99, False, 4, 2), (2, 99, False, 1, 1), (1, 99, True, 1, 1), (8, 3, True, 3, 2)],
)
def test_cores_and_memory_bound_the_processes(cores, processes, on_gpu, most, first):
    room = Room(cores, 2 * GIB, processes)
    assert workers.most(room, on_gpu) == most and room.first == first


def test_auto_is_a_few_where_nothing_is_measured(recipe_for):
    recipe = recipe_for(workers="auto")
    by, note = data.loading(
        recipe, data.build(recipe).train, micro=2, num_ranks=1, device="cpu", room=room_of(GIB, cores=8)
    )
    assert by == Loading(2, 3) and note is None, "four micro-batches a window"


def test_what_is_no_file_comes_whole():
    policy = Augmentation(0.5, (320,), 512, 0.0, (400,), (384, 600))
    assert workers.decoded_bytes([(3024, 4032)], policy, None, scaled=False) == 3 * 3024 * 4032
    assert workers.decoded_bytes([(3024, 4032)], policy, None) < 3 * 3024 * 4032 / 4


def test_of_a_stream_that_is_cut_at_its_own_size_a_photograph_is_counted():
    """Nobody knows how large an image of it is: what is counted must leave room for loader processes all the same."""
    policy = Augmentation(0.5, (800,), 1333, 0.5, (400, 600), (384, 600))
    cut = augment.Strong(100, iou_crop=augment.IouCrop(0.5, 0.0, 1.0, (0.3,), 0.5))
    huge = workers.decoded_bytes([(10**6, 10**6)], policy, cut, seen=False)
    assert workers.decoded_bytes([(3000, 4000)], policy, cut) == huge
    assert workers.decoded_bytes([(10**6, 10**6)], policy, None, seen=False) < huge


FILES = {"photograph": ".jpg", "drawing": ".png", "turned": ".jpg"}


@pytest.fixture
def write(tmp_path, hub_coco):
    """A COCO folder of twelve images, far larger than they are used, all of one of FILES."""

    def folder(kind: str, size_px: tuple[int, int]) -> Path:
        coco, (h, w) = hub_coco(12, 2), size_px
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
        exif, stored = Image.Exif(), (h, w) if kind == "turned" else (w, h)
        exif[0x0112] = 6
        more = {"exif": exif} if kind == "turned" else {}
        for split in ("train", "val"):
            file = coco / f"annotations/instances_{split}.json"
            tree = json.loads(file.read_text())
            for row in tree["images"]:
                path = coco / split / Path(row["file_name"]).with_suffix(FILES[kind])
                (coco / split / row["file_name"]).unlink()
                noise.resize(stored, Image.Resampling.BICUBIC).save(path, **more)
                row |= {"file_name": path.name, "height": h, "width": w}
            file.write_text(json.dumps(tree))
        return coco

    return folder


@pytest.mark.parametrize("where", ["folder", "hub", "stream"])
@pytest.mark.parametrize(
    ("kind", "size_px"),
    [("photograph", (300, 400)), ("photograph", (190, 110)), ("drawing", (300, 400)), ("turned", (300, 400))],
)
def test_no_micro_batch_waits_that_is_larger_than_was_counted(write, recipe_for, tmp_path, kind, size_px, where):
    """And not much more is counted than comes, so that enough is kept ready. Of a stream, that nobody has seen yet,
    what any image could bring is counted."""
    coco = write(kind, size_px)
    root, hub = coco, {}
    if where != "folder":
        root = hub_sets.parquet(coco, tmp_path / "set")
        hub = {"format": "hub", "hub": {"streaming": where == "stream"}}
    for crop in (0.0, 0.5):
        recipe = recipe_for(root, pixels="device", **hub)
        recipe.data.augment.crop = crop
        source, seen = data.build(recipe).train, 0
        worst = data.task_bytes(recipe, source, 2, torch.device("cpu"))
        for window in data.train_windows(
            recipe, source, rank=0, num_ranks=1, start_window=0, end_window=12, mean=(0.5,) * 3, std=(0.2,) * 3, micro=2
        ):
            assert all(isinstance(batch, data.PlannedBatch) for batch in window)
            seen = max(seen, *(batch.pixels.nbytes for batch in window))
        assert seen <= worst and (where == "stream" or worst <= 2 * seen), (seen, worst)
