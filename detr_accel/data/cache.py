"""Decoded images in one memory-mapped file per split: read once, then shared by all workers and processes.

FOLDER/KEY.pixels   uint8, all images one after the other, each [h, w, 3]
FOLDER/KEY.npz      where each begins, its size (0 x 0: it could not be decoded), its boxes and labels, and how many
                    boxes were cut; written last
FOLDER/KEY.lock     held by the process that builds, or that removes

Whoever uses a cache in memory holds a shared lock on its pixels, which the kernel frees however a process ends, in
whatever container: what nobody holds is left over, and is removed.

KEY is a hash of the data (annotations, and size and time of every file) and of the sizes asked for, so whatever changes
there makes another cache. An image is kept no larger than any plan of the recipe can need.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from detr_accel import host
from detr_accel.data import pixels
from detr_accel.data.geometry import Size
from detr_accel.data.loader import start_worker, worker_death
from detr_accel.data.source import Source
from detr_accel.structures import Sample, UserError, writing

VERSION = 3
RAM = Path(f"/dev/shm/detr_accel-{getattr(os, 'getuid', int)()}")  # a file system in memory; a user's own
_SPARE = 0.9  # of what is free, at most


class CachedSource:
    """A source whose images come from a cache; everything else, and what the cache has not, from the source itself.

    Args:
        source: what was cached.
        path: FOLDER/KEY, without an ending.
    """

    def __init__(self, source: Source, path: Path) -> None:
        with np.load(path.with_suffix(".npz")) as index:
            self._sizes, self._starts = index["sizes_px"], index["starts"]
            self._boxes, self._labels, self._ends = index["boxes_xyxy_px"], index["labels"], index["ends"]
            self._num_cut = index["num_cut"]
        self.path, self.source = path, source
        self._map()

    def _map(self) -> None:
        # "c": writable for torch's sake, and nothing written would reach the file
        self._pixels = np.memmap(self.path.with_suffix(".pixels"), np.uint8, mode="c")

    def __getstate__(self) -> dict:
        """Without the pixels, which a process that is started anew maps for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int, at_least_px: Size | None = None) -> Sample:
        h, w = self._sizes[index]
        if h == 0:
            return self.source.sample(index, at_least_px)  # says what is wrong, or works by now
        start = self._starts[index]
        image = self._pixels[start : start + 3 * int(h) * int(w)].reshape(h, w, 3)
        cut = slice(self._ends[index - 1] if index else 0, self._ends[index])
        boxes, labels = self._boxes[cut].copy(), self._labels[cut].copy()
        return Sample(np.asarray(image), self.source.image_id(index), boxes, labels, int(self._num_cut[index]))

    def __getattr__(self, name: str):
        if name in ("source", "path", "_pixels"):  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.source, name)


def cached(
    source: Source,
    kind: str,
    folder: Path,
    largest: Callable[[Size], Size],
    *,
    exact: bool,
    settings: object,
    workers: int,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> tuple[CachedSource, str]:
    """Open the cache of a split, and build it first where it is not there. Safe against a kill, and against others that
    build the same one: they wait.

    Args:
        kind: ``disk``, or ``ram`` (a file in memory that is removed when the last process that uses it ends).
        folder: of the caches on disk.
        largest: size of an image -> the largest that it is ever resized to first.
        exact: resize with DETR's own kernel.
        settings: what ``largest`` depends on; a part of the key.
        workers: processes that build.
        progress: wraps the loop over the images.
    Returns:
        the source, and a line about it.
    Raises:
        UserError: no room, or the folder cannot be written.
    """
    folder = RAM if kind == "ram" else folder.expanduser()
    path, sizes, gib = _plan(source, folder, largest, exact, settings)
    begun = time.monotonic()
    with writing(folder), _locked(path):
        there = _whole(path, sizes)
        if not there:
            if kind == "ram":
                sweep(but=[path])
            _remove_parts(path)  # of a build that was killed: they would take the room that it needs
            _check_room(folder, kind, gib)
            _build(source, path, sizes, exact, workers, progress)
        if kind == "ram":
            _hold(path)
    how = "found" if there else f"built in {time.monotonic() - begun:.0f} s"
    where = "memory" if kind == "ram" else path.with_suffix(".pixels")
    return CachedSource(source, path), f"cache: {len(source)} images, {gib:.2f} GiB in {where}, {how}"


def sweep(but: Iterable[Path] = ()) -> float:
    """Remove what runs that were killed left in memory: caches that no living process uses, whole or half built.

    Args:
        but: RAM/KEY of those that stay: that the caller will use, or whose lock it has, as to open that here would
            lose it.
    Returns:
        GiB that were removed.
    """
    freed = 0
    for path in sorted({RAM / p.name.partition(".")[0] for p in RAM.glob("*.*")}.difference(but)):
        with suppress(OSError), _locked(path, wait=False) as mine:
            if mine and _unused(path):
                size = sum(p.stat().st_blocks * 512 for p in RAM.glob(f"{path.name}.*"))
                _remove(path)
                freed += size
    return freed / 2**30


_held: dict[int, tuple[int, Path]] = {}  # by file descriptor: the process that opened it, and the cache


def _hold(path: Path) -> None:
    """Use a cache in memory until this process ends; called by who has its lock."""
    pixels_ = os.open(path.with_suffix(".pixels"), os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(pixels_, fcntl.LOCK_SH)
    _held[pixels_] = os.getpid(), path


@atexit.register
def _let_go() -> None:
    """The last one to go removes the cache; loader processes, which are about to end, do not count."""
    mine = {file: path for file, (pid, path) in _held.items() if pid == os.getpid()}  # not a parent's
    for file in mine:
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)
        del _held[file]
    for path in set(mine.values()):
        with suppress(OSError), _locked(path):  # who has it looks only: nobody builds what is there
            if _unused(path):
                _remove(path)


def _unused(path: Path) -> bool:
    """Whether no process holds the pixels of a cache, whose lock the caller has."""
    try:
        with open(path.with_suffix(".pixels"), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:  # half built
        return True
    except BlockingIOError:
        return False


def room(splits: Iterable[tuple[Source, dict]], kind: str, folder: Path) -> float:
    """GiB that are still to be written for some splits; nothing is built, but room is made (``sweep``).

    Args:
        splits: each with its ``largest``, ``exact`` and ``settings``, as for ``cached``.
    Raises:
        UserError: no room for them.
    """
    folder, wanted, there = RAM if kind == "ram" else folder.expanduser(), 0.0, []
    for source, how in splits:
        path, sizes, gib = _plan(source, folder, **how)
        if _whole(path, sizes):
            there.append(path)
        else:
            wanted += gib
    if wanted:
        if kind == "ram":
            sweep(but=there)
        place = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
        _check_room(place, kind, wanted)
    return wanted


def _plan(
    source: Source, folder: Path, largest: Callable[[Size], Size], exact: bool, settings: object
) -> tuple[Path, np.ndarray, float]:
    """FOLDER/KEY, the sizes that are kept [N, 2], and their GiB."""
    sizes = np.array([_kept(source.size_px(i), largest) for i in range(len(source))], np.int32).reshape(-1, 2)
    gib = 3 * int(np.prod(sizes, axis=1, dtype=np.int64).sum()) / 2**30
    return folder / _key(source, settings, exact), sizes, gib


def _kept(size_px: Size, largest: Callable[[Size], Size]) -> Size:
    wanted = largest(size_px)
    return wanted if wanted[0] <= size_px[0] and wanted[1] <= size_px[1] else size_px


def _key(source: Source, settings: object, exact: bool) -> str:
    stamp = getattr(source, "stamp", lambda: "")()
    text = repr((VERSION, source.fingerprint(), stamp, settings, exact))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _whole(path: Path, sizes: np.ndarray) -> bool:
    try:
        expected = 3 * int(np.prod(sizes, axis=1, dtype=np.int64).sum())
        with np.load(path.with_suffix(".npz")) as index:  # reads all of it, against its checksums
            whole = {name: len(index[name]) for name in index.files}
        same = whole["ends"] == whole["num_cut"] == len(sizes)
        return same and path.with_suffix(".pixels").stat().st_size == expected
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or damaged: built anew
        return False


def _check_room(folder: Path, kind: str, gib: float) -> None:
    free = shutil.disk_usage(folder).free
    if kind == "ram":
        free = min(free, host.free_bytes())
    if gib * 2**30 > _SPARE * free:
        place = "memory" if kind == "ram" else str(folder)
        other = "data.cache=disk or none" if kind == "ram" else "data.cache=none, or data.cache_folder on a larger disk"
        raise UserError(
            f"data.cache={kind} needs {gib:.2f} GiB and {place} has {free / 2**30:.2f} GiB free: set {other}"
        )


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """One builder at a time; the kernel frees the lock of one that was killed. ``wait``: else False is given where
    another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path.with_suffix(".lock"), "a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except (BlockingIOError, PermissionError):  # the latter on some file systems
                if wait:
                    raise
                yield False
                return
            if not _is_still(path.with_suffix(".lock"), file.fileno()):
                continue  # removed while this one waited: the lock of a file that nobody finds is none
            yield True
            return


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


class _Images(Dataset):
    """Decodes an image into its place in the file; hands back what the index needs."""

    def __init__(self, source: Source, file: Path, sizes: np.ndarray, starts: np.ndarray, exact: bool) -> None:
        self.source, self.file, self.sizes, self.starts, self.exact = source, file, sizes, starts, exact

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray, np.ndarray, int] | OSError | None:
        h, w = map(int, self.sizes[index])
        try:
            sample = self.source.sample(index, None if self.exact else (h, w))
        except UserError:
            return None
        image = pixels.resized(sample.image, (h, w), exact=self.exact)
        start = int(self.starts[index])
        try:
            with open(self.file, "r+b") as file:  # not a mapping: a full disk is an error, not a signal
                file.seek(start)
                file.write(np.ascontiguousarray(image).tobytes())
        except OSError as error:  # raised here it would lose its reason on the way
            return error
        return index, sample.boxes_xyxy_px, sample.labels, sample.num_cut


def _as_it_is(row: Any) -> Any:
    return row


def _build(source: Source, path: Path, sizes: np.ndarray, exact: bool, workers: int, progress: Callable) -> None:
    counts = 3 * np.prod(sizes, axis=1, dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(counts)))[:-1]
    temporary = path.with_suffix(".tmp")
    with suppress(FileNotFoundError):
        path.with_suffix(".npz").unlink()
    with open(temporary, "wb") as file:
        file.truncate(int(counts.sum()))
    boxes = [np.zeros((0, 4), np.float32)] * len(source)
    labels = [np.zeros(0, np.int64)] * len(source)
    num_cut = np.zeros(len(source), np.int32)
    sizes = sizes.copy()
    images = DataLoader(
        _Images(source, temporary, sizes.copy(), starts, exact), batch_size=None, num_workers=workers,
        worker_init_fn=start_worker, collate_fn=_as_it_is, generator=torch.Generator(),
    )  # fmt: skip
    try:
        for index, row in enumerate(progress(images, len(source))):
            if isinstance(row, OSError):
                raise row
            if row is None:
                sizes[index] = 0
            else:
                _, boxes[index], labels[index], num_cut[index] = row
    except RuntimeError as error:
        raise worker_death(error) or error from None
    os.replace(temporary, path.with_suffix(".pixels"))
    beside = path.with_suffix(".index.tmp")
    with open(beside, "wb") as file:
        np.savez(
            file, sizes_px=sizes, starts=starts, boxes_xyxy_px=np.concatenate(boxes), labels=np.concatenate(labels),
            ends=np.cumsum([len(rows) for rows in labels]), num_cut=num_cut,
        )  # fmt: skip
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path.with_suffix(".npz"))


def _remove(path: Path) -> None:
    """The lock last, which the caller has: who comes then makes another."""
    _remove_parts(path)
    with suppress(OSError):
        path.with_suffix(".lock").unlink()


def _remove_parts(path: Path) -> None:
    for ending in (".npz", ".pixels", ".tmp", ".index.tmp"):
        with suppress(OSError):
            path.with_suffix(ending).unlink()
