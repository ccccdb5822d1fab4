"""Batches are the same bit for bit however they are cut, loaded or resumed; what goes wrong comes out as a sentence."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from detr_accel import data
from detr_accel.data import loader
from detr_accel.structures import UserError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SHAPES = {"image_size": 64, "num_train": 21, "num_val": 7}


@pytest.fixture
def windows(recipe_for):
    recipe = recipe_for(shapes=SHAPES)
    source = data.build(recipe).train

    def make(rank=0, num_ranks=1, micro=8, start=0, end=5, workers=0, source=source, **more):
        changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers, **more})})
        return data.train_windows(
            changed, source, rank=rank, num_ranks=num_ranks, start_window=start, end_window=end, mean=MEAN, std=STD,
            micro=micro,
        )  # fmt: skip

    make.source = source
    return make


def rows(some_windows):
    """One entry per image: everything that reaches the model."""
    out = {}
    for window in some_windows:
        for batch in window:
            assert batch.images.dtype == torch.float32 and batch.mask.dtype == torch.bool
            for i, (position, t) in enumerate(zip(batch.positions, batch.targets, strict=True)):
                assert (batch.window, position) not in out
                out[batch.window, position] = (batch.images[i].clone(), batch.mask[i].clone(), t, batch.epoch)
    return out


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, (images, mask, t, epoch) in a.items():
        other_images, other_mask, other, other_epoch = b[key]
        assert torch.equal(images, other_images) and torch.equal(mask, other_mask) and epoch == other_epoch
        assert torch.equal(t.labels, other.labels) and torch.equal(t.boxes_cxcywh, other.boxes_cxcywh)
        assert (t.image_id, t.size_px, t.orig_size_px) == (other.image_id, other.size_px, other.orig_size_px)


@pytest.mark.law1
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 3), (2, 4), (2, 2), (3, 2)])
def test_cuts_give_the_same_images_bit_for_bit(windows, num_ranks, micro):
    parts = [list(windows(rank, num_ranks, micro)) for rank in range(num_ranks)]
    assert all(len(part) == 5 for part in parts)  # a window for every rank, even when it is empty
    cut = {}
    for part in parts:
        cut |= rows(part)
    assert len(cut) == 21 + 16
    assert_same(cut, rows(windows()))


@pytest.mark.law2
def test_workers_change_nothing(windows):
    assert_same(rows(windows(micro=3, workers=2)), rows(windows(micro=3)))


@pytest.mark.law2
@pytest.mark.parametrize(("start", "workers"), [(1, 0), (4, 0), (2, 2)])
def test_start_in_the_middle_is_the_tail(windows, start, workers):
    whole = rows(windows(micro=2))
    tail = rows(windows(micro=2, start=start, workers=workers))
    assert_same(tail, {key: row for key, row in whole.items() if key[0] >= start})


@pytest.mark.law2
@pytest.mark.parametrize("workers", [0, 1])
def test_global_generator_is_neither_read_nor_moved(windows, workers):
    before = torch.get_rng_state()
    first = rows(windows(end=1, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(999)
    assert_same(rows(windows(end=1, workers=workers)), first)


def test_padding_is_zero_and_masked(windows):
    padded = 0
    for images, mask, t, _ in rows(windows()).values():
        h, w = t.size_px
        assert not mask[:h, :w].any() and mask[h:].all() and mask[:, w:].all()
        assert (images[:, mask] == 0).all()
        padded += int(mask.sum())
        assert images[:, ~mask].abs().max() < 4
    assert padded > 0


@pytest.mark.law5
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_evaluation_shows_each_image_once_in_its_own_canvas(recipe_for, num_ranks):
    recipe = recipe_for(shapes=SHAPES)
    source = data.build(recipe).val
    make = lambda rank, ranks: data.eval_batches(recipe, source, rank=rank, num_ranks=ranks, mean=MEAN, std=STD)  # noqa: E731
    dealt = [batch for rank in range(num_ranks) for batch in make(rank, num_ranks)]
    assert sorted(t.image_id for b in dealt for t in b.targets) == [source.image_id(i) for i in range(7)]
    assert_same(rows([dealt]), rows([list(make(0, 1))]))
    for batch in dealt:
        sizes = [t.size_px for t in batch.targets]
        assert tuple(batch.images.shape[-2:]) == (max(h for h, _ in sizes), max(w for _, w in sizes))


class Broken:
    """The shapes, with one image that does something else."""

    def __init__(self, source, act):
        self._source, self._act = source, act

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def sample(self, index, at_least_px=None):
        if index == 7:
            self._act()
        return self._source.sample(index)


def refuse():
    raise UserError("record 7 is broken")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def bug():
    raise KeyError("our own mistake")


@pytest.mark.law8
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_record_surfaces_as_its_sentence(windows, workers):
    with pytest.raises(UserError) as caught:
        list(windows(workers=workers, micro=2, source=Broken(windows.source, refuse), on_bad="stop"))
    assert str(caught.value) == "record 7 is broken"
    assert not multiprocessing.active_children()


@pytest.mark.law8
@pytest.mark.parametrize("pixels", ["workers", "device"])
@pytest.mark.parametrize(("workers", "num_ranks", "micro"), [(0, 1, 8), (2, 1, 2), (1, 1, 1), (0, 2, 3)])
def test_an_unreadable_image_leaves_its_place_empty_and_changes_nothing_else(
    windows, workers, num_ranks, micro, pixels
):
    """Place, geometry, canvas and pixels of the others, bit for bit; a micro-batch that loses all is empty."""
    source, found, lost, empty = Broken(windows.source, refuse), {}, [], 0
    for rank in range(num_ranks):
        for window in windows(rank, num_ranks, micro, workers=workers, source=source, pixels=pixels):
            kept, gone = data.without_lost(window)
            assert all(len(b) for b in kept) and (micro > 1 or len(kept) == len(window) - len(gone))
            empty += len(window) - len(kept)
            lost += [(window[0].window, *one) for one in gone]
            found |= rows([[b.to("cpu") for b in kept]])
    whole = rows([[b.to("cpu") for b in window] for window in windows(pixels=pixels)])
    missing = [key for key, (_, _, t, _) in whole.items() if t.image_id == windows.source.image_id(7)]
    assert [key[0] for key in sorted(missing)] == sorted(window for window, *_ in lost) and len(missing) == 2
    assert {(i, why) for _, i, why in lost} == {(windows.source.image_id(7), "record 7 is broken")}
    assert_same(found, {key: row for key, row in whole.items() if key not in missing})
    assert empty == (2 if micro == 1 else 0)


def test_a_killed_worker_is_one_sentence(windows):
    with pytest.raises((UserError, RuntimeError)) as caught:
        list(windows(workers=1, micro=2, source=Broken(windows.source, die)))
    # PyTorch may raise from its signal handler anywhere in the process: worker_death words that one too
    error = caught.value if isinstance(caught.value, UserError) else data.worker_death(caught.value)
    assert "ended from outside" in str(error) and "data.workers" in str(error) and "\n" not in str(error)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_our_own_bug_keeps_its_type_and_traceback(windows, workers):
    with pytest.raises(KeyError, match="our own mistake"):
        list(windows(workers=workers, source=Broken(windows.source, bug)))


def test_other_runtime_errors_are_not_called_a_death():
    assert data.worker_death(RuntimeError("CUDA error: device-side assert triggered")) is None


def test_closing_early_leaves_no_process(windows):
    stream = windows(workers=2, micro=2, end=1000)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()


def test_a_stop_request_to_the_whole_group_does_not_end_the_workers(windows):
    stream = windows(workers=2, micro=2, end=60)
    next(stream)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    assert len([next(stream) for _ in range(40)]) == 40
    stream.close()


def test_a_worker_that_was_told_to_end_and_forgotten_does_not_raise_in_the_training_process(windows):
    stream = windows(workers=1, micro=2, end=60)
    next(stream)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGALRM)  # what it sets itself when it is told to end
    child.join(20)
    time.sleep(0.2)  # a raise would come from the handler of its death, in any line
    assert child.exitcode == 0
    stream.close()


SCRIPT = """
import multiprocessing, sys, time
from detr_accel import data
from detr_accel.recipe import Recipe
recipe = Recipe.model_validate({"data": {"format": "shapes", "workers": 2, "shapes": {"image_size": 64}}})
stream = data.train_windows(recipe, data.build(recipe).train, rank=0, num_ranks=1, start_window=0, end_window=999,
                            mean=(.5,) * 3, std=(.5,) * 3)
next(stream)
print(*[c.pid for c in multiprocessing.active_children()], flush=True)
if sys.argv[1] == "raise":
    raise SystemError("uncaught")
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_workers_do_not_outlive_the_training_process(how):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    command = [sys.executable, "-c", SCRIPT, how]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pids = [int(p) for p in process.stdout.readline().split()]
    assert len(pids) == 2
    if how == "kill":
        process.kill()
    begun = time.monotonic()
    process.wait(timeout=25)
    while any(os.path.exists(f"/proc/{p}") and _state(p) != "Z" for p in pids) and time.monotonic() - begun < 25:
        time.sleep(0.2)
    assert time.monotonic() - begun < 20  # PyTorch's workers look for their parent every five seconds


def test_a_worker_tells_its_own_errors_and_not_that_its_training_process_was_killed():
    said = []
    hook = lambda *error: said.append(error[0])  # noqa: E731
    loader._unless_orphaned(os.getppid() + 1, hook, ConnectionResetError, ConnectionResetError(), None)
    assert not said, "orphaned"
    loader._unless_orphaned(os.getppid(), hook, ConnectionResetError, ConnectionResetError(), None)
    assert said == [ConnectionResetError]


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
