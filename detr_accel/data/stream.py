"""A data set that is read while it trains. Where a run is in it is arithmetic on (epoch, window), as everywhere else.

The shards are dealt to a few lanes (shard s to lane s mod L), and the positions of an epoch are dealt to the lanes once
and for all, evenly. A lane's order in an epoch is that of its shards, shuffled, each in blocks of consecutive rows that
are shuffled inside. All of it follows from (seed, epoch, shard, block): there is no buffer whose content could be lost.

Legend: L lanes, S shards, K rows of a block.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from detr_accel.data import hub_columns, hub_where
from detr_accel.data import source as seeds
from detr_accel.data.augment import Strong
from detr_accel.data.decode import read_rgb
from detr_accel.data.dirt import Dirt
from detr_accel.data.geometry import canvas
from detr_accel.data.hub import undecoded
from detr_accel.data.hub_columns import Columns
from detr_accel.data.sampler import Planner, Task, Windows, share, windows_per_epoch
from detr_accel.data.stream_rows import LOOKED_AT, Block, Reading, Row
from detr_accel.structures import Classes, Sample, UserError

MOST_LANES = 16


class StreamSource:
    """A split that is read in order.

    Args:
        dataset: ``datasets.IterableDataset``.
        columns: resolved.
        shard_rows: rows of each of S shards; None where only reading tells, and then there is one lane.
        length: images of an epoch, at most as many as there are.
        block: images in memory, over all lanes.
        how: what its rows have in common.
        stamp: of its files, as ``hub_files.fingerprint``.
        told: who says how long it is.
    """

    def __init__(
        self, dataset: Any, how: Reading, shard_rows: list[int] | None, length: int, block: int, lanes: int,
        stamp: str, told: str,
    ) -> None:  # fmt: skip
        assert lanes == 1 or shard_rows is not None
        columns = how.columns
        self.dataset, self.how, self.columns, self.title = undecoded(dataset, columns.image), how, columns, how.title
        self.shard_rows, self.length, self.lanes = shard_rows, length, lanes
        self.stamp, self.told, self._odd = stamp, told, {}
        self.block = max(1, block // lanes)
        self.num_shards = dataset.num_shards
        self.classes = Classes(columns.class_names, tuple(range(len(columns.class_names))))
        self.lane_of = self._deal()
        self._first = None if shard_rows is None else np.cumsum([0, *shard_rows])  # row of the set, of each shard

    def __len__(self) -> int:
        return self.length

    def _deal(self) -> np.ndarray:
        """int16 [length]: the lane of each position; every lane ends at the end of the epoch."""
        if self.shard_rows is None or self.lanes == 1:
            return np.zeros(self.length, np.int16)
        rows = [sum(self.shard_rows[lane :: self.lanes]) for lane in range(self.lanes)]
        place = np.concatenate([(np.arange(n) + 0.5) / n for n in rows if n])
        of = np.repeat(np.arange(self.lanes, dtype=np.int16), rows)
        return of[np.argsort(place, kind="stable")][: self.length]

    def own_lanes(self, rank: int, num_ranks: int) -> list[int] | None:
        """The lanes that this process reads; None: all of them, because they cannot be divided."""
        return list(range(rank, self.lanes, num_ranks)) if self.lanes % num_ranks == 0 else None

    def names_of(self, image_ids: Iterable[int]) -> dict[int, str]:
        """What stands for an image in messages."""
        return {i: f"{self.title}, {self._place(i)}" for i in image_ids}

    def _place(self, image_id: int) -> str:
        if self.columns.image_ids:
            return f"image_id {image_id}"
        if self._first is None:
            return f"shard {image_id >> 32}, row {image_id & (2**32 - 1)}"
        shard = int(np.searchsorted(self._first, image_id, side="right")) - 1
        return f"shard {shard}, row {image_id - self._first[shard]}"

    def _image_id(self, shard: int, row: int) -> int:
        """Of sets that give none."""
        return (shard << 32) + row if self._first is None else int(self._first[shard]) + row

    def size_px(self, index: Row) -> tuple[int, int]:
        return index.size_px

    def image_id(self, index: Row) -> int:
        return index.image_id

    def name(self, index: Row) -> str:
        return f"{self.title}, {self._place(index.image_id)}"

    def sample(self, index: Row, at_least_px: tuple[int, int] | None = None) -> Sample:
        """As of any source; the index is the row itself."""
        if index.fault is not None:
            raise UserError(index.fault)
        size_px = None if index.turned else index.size_px
        image = read_rgb(index.name, size_px, at_least_px, index.data, scale=self.how.on_bad == "mend")
        return Sample(image, index.image_id, index.boxes_xyxy_px, index.labels, index.num_cut)

    def fingerprint(self) -> str:
        """Of what a stream tells without being read: its files (not where they lie), columns, classes and order."""
        known = (
            self.stamp, self.columns, self.num_shards, self.shard_rows, self.length, self.block, self.lanes,
            self.how.on_bad == "drop",
        )  # fmt: skip
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def describe(self) -> str:
        """One line for the console."""
        many = f"{self.num_shards} shard{'s' * (self.num_shards > 1)} in {self.lanes} lane{'s' * (self.lanes > 1)}"
        return f"{len(self)} images, {len(self.classes)} classes, streamed from {self.title}, {many}"

    # --- reading

    def rows(self, seed: int, epoch: int, lane: int, start: int) -> Iterator[Row]:
        """A lane's images in an epoch, from the ``start``-th on.

        Raises:
            UserError: the set cannot be read on.
        """
        shards = np.arange(lane, self.num_shards, self.lanes)
        for shard in shards[seeds.generator(seed, seeds.SHARDS, epoch, lane).permutation(len(shards))].tolist():
            known = None if self.shard_rows is None else self.shard_rows[shard]
            if known is not None and start >= known:
                start -= known
                continue
            first = 0 if known is None else start // self.block
            for number, table in enumerate(self._blocks(shard, first), start=first):
                skip = min(start - first * self.block * (number == first), table.num_rows)
                start, first = (0, -1) if known is not None else (start - skip, -1)
                if skip == table.num_rows:
                    continue
                yield from self._shuffled(table, seed, epoch, shard, number, skip)

    def _blocks(self, shard: int, first: int, size: int | None = None) -> Iterator[Any]:
        """Arrow tables of K (or ``size``) rows of one shard, the last one shorter, from block ``first`` on."""
        from datasets.distributed import split_dataset_by_node

        size = size or self.block
        only = split_dataset_by_node(self.dataset, rank=shard, world_size=self.num_shards)  # a node a shard
        try:
            if self.shard_rows is None:
                yield from self._tables(iter(only), size)
            else:
                only = only.with_format("arrow")
                yield from (only.skip(first * size) if first else only).iter(batch_size=size)
        except Exception as error:  # of the network, the file system, Arrow or the library
            reason, remedy = hub_where.why(error)
            what = remedy or "go on with --resume once it can"
            raise UserError(f"{self.title}: shard {shard} cannot be read on: {reason}; {what}") from error

    def _tables(self, rows: Iterator[dict], size: int) -> Iterator[Any]:
        """Of sets that are no tables, such as folders of images."""
        import pyarrow as pa

        schema = self.dataset.features.arrow_schema if self.dataset.features is not None else None
        while some := list(itertools.islice(rows, size)):
            yield pa.Table.from_pylist(some, schema=schema)

    def _shuffled(self, table: Any, seed: int, epoch: int, shard: int, number: int, skip: int) -> Iterator[Row]:
        block = Block(table, self.how, shard, number * self.block)
        order = seeds.generator(seed, seeds.BLOCK, epoch, (number << 32) + shard).permutation(len(block))
        for row in order[skip:].tolist():
            known = int(block.flat.image_ids[row]) if self.columns.image_ids else -1
            yield block.row(row, known if known >= 0 else self._image_id(shard, block.first + row))

    def first_block(self) -> Block | None:
        """The first rows of the set; None where it has none."""
        for shard in range(self.num_shards):
            for table in self._blocks(shard, 0, LOOKED_AT):
                return Block(table, self.how, shard, 0)
        return None

    # --- what was odd

    def note(self, window: int, rows: Iterable[Row]) -> None:
        """Keep what is odd about the rows of a window; reading it again changes nothing."""
        odd: dict[str, tuple[int, str]] = {}
        for kind, text in (one for row in rows for one in row.dirt):
            num, first = odd.get(kind, (0, text))
            odd[kind] = num + 1, first
        if odd:
            self._odd[window] = odd

    def odd(self, start_window: int, end_window: int, name: str) -> list[str]:
        """A line for each kind of dirt in these windows, in the rows that this process has read; forgets all before."""
        dirt = Dirt(self.how.on_bad, look=True)
        for window in sorted(w for w in list(self._odd) if w < end_window):  # another thread may add to it
            for kind, (num, text) in self._odd.pop(window).items():
                if window >= start_window:
                    dirt.note(kind, text, num)
        return dirt.lines(name)


class FirstRows:
    """The first images of a stream's first epoch, held in memory, for those who look at images in any order. It is a
    source; the same on every process.

    Args:
        num: at most so many; rows that are broken are left out.
    """

    def __init__(self, source: StreamSource, seed: int, num: int) -> None:
        lanes = {lane: source.rows(seed, 0, lane, 0) for lane in range(source.lanes)}
        rows = [next(lanes[int(lane)], None) for lane in source.lane_of[:num]]
        self.source, self.classes = source, source.classes
        self.rows = [row for row in rows if row is not None and row.fault is None]

    def __len__(self) -> int:
        return len(self.rows)

    def size_px(self, index: int) -> tuple[int, int]:
        return self.rows[index].size_px

    def image_id(self, index: int) -> int:
        return self.rows[index].image_id

    def name(self, index: int) -> str:
        return self.source.name(self.rows[index])

    def most_boxes(self) -> int:
        return max((len(row.labels) for row in self.rows), default=0)

    def boxes_xyxy_px(self, index: int) -> np.ndarray:
        return self.rows[index].boxes_xyxy_px

    def labels(self, index: int) -> np.ndarray:
        return self.rows[index].labels

    def sample(self, index: int, at_least_px: tuple[int, int] | None = None) -> Sample:
        return self.source.sample(self.rows[index], at_least_px)


class _Read:
    """The rows of a window as a source, by their positions in the epoch: what a plan asks of an image."""

    def __init__(self, rows: dict[int, Row]) -> None:
        self.rows = rows

    def size_px(self, position: int) -> tuple[int, int]:
        return self.rows[position].size_px

    def boxes_xyxy_px(self, position: int) -> np.ndarray:
        return self.rows[position].boxes_xyxy_px


@dataclass(frozen=True)
class StreamTasks(Windows):
    """The micro-batches of one rank, in order, as TrainTasks for a stream.

    Which images a window holds follows from the lanes alone. The canvas is that of the images this process reads: of
    the whole window where it reads all of them, of its own part where it reads its own lanes. Training then pads all
    to the largest one (``Batch.padded``).
    """

    strong: Strong | None = None  # as of TrainTasks, without what needs a second image

    def _mine(self, positions: range) -> list[int]:
        lanes = self.source.own_lanes(self.rank, self.num_ranks)
        if lanes is None:
            return [positions[i] for i in share(len(positions), self.rank, self.num_ranks)]
        return [p for p in positions if self.source.lane_of[p] in lanes]

    def num_tasks(self, window: int) -> int:
        """Micro-batches of this rank in a window."""
        return -(-len(self._mine(self.window_positions(window))) // self.micro)

    def __iter__(self) -> Iterator[Task]:
        per_epoch = windows_per_epoch(len(self.source), self.batch_size)
        known_epoch, readers = -1, {}
        for window in range(self.start_window, self.end_window):
            epoch = window // per_epoch
            if epoch != known_epoch:
                known_epoch, readers = epoch, self._readers(epoch, self.window_positions(window).start)
            yield from self._cut(window, epoch, readers)

    def _readers(self, epoch: int, position: int) -> dict[int, Iterator[Row]]:
        """An iterator for each lane that this process reads, at its place."""
        lanes = self.source.own_lanes(self.rank, self.num_ranks)
        done = np.bincount(self.source.lane_of[:position], minlength=self.source.lanes)
        lanes = range(self.source.lanes) if lanes is None else lanes
        return {lane: self.source.rows(self.seed, epoch, lane, int(done[lane])) for lane in lanes}

    def _cut(self, window: int, epoch: int, readers: dict[int, Iterator[Row]]) -> Iterator[Task]:
        positions = [p for p in self.window_positions(window) if int(self.source.lane_of[p]) in readers]
        rows = {p: self._next(readers[int(self.source.lane_of[p])], p) for p in positions}
        self.source.note(window, rows.values())
        plan, read = Planner(self.policy, self.strong, self.seed, window, epoch), _Read(rows)
        plans = {p: plan(read, p, p) for p in rows}
        mine = self._mine(self.window_positions(window))
        size = canvas(list(plans.values()), self.policy.canvas_step) if plans else (1, 1)
        for start in range(0, len(mine), self.micro):
            part = tuple(mine[start : start + self.micro])
            yield Task(window, epoch, part, tuple(rows[p] for p in part), tuple(plans[p] for p in part), size)

    def _next(self, reader: Iterator[Row], position: int) -> Row:
        row = next(reader, None)
        if row is None:
            raise UserError(
                f"{self.source.title} ended after {position} images, {self.source.told} {len(self.source)}: set "
                f"data.hub.length={position} and start anew"
            )
        return row


# --- opening


def open_stream(
    dataset: Any, asked: Columns, shard_rows: list[int] | None, length: int | None, block: int, lanes: int | str,
    name: str, *, card: int | None = None, on_bad: str = "mend", folder: str | None = None, stamp: str = "",
) -> StreamSource:  # fmt: skip
    """
    Args:
        length: the recipe's; None takes what the files tell, or else the set's card.
        lanes: a number, or ``auto``.
        card: images that the set says it has.
        on_bad, folder: as ``Reading``.
        stamp: as ``StreamSource``.
    Raises:
        UserError: what a stream cannot know is not told: class names, length.
    """
    if length == 0 or (shard_rows is not None and not sum(shard_rows)):
        raise hub_columns.no_rows(name)
    columns = hub_columns.resolve(_features(dataset), asked, name)
    if not columns.class_names:
        raise UserError(
            f"{name} is streamed, so that its class names would be known at the end of the first epoch: list them in "
            "data.hub.class_names"
        )
    if shard_rows is not None and len(shard_rows) != dataset.num_shards:
        shard_rows = None  # not a shard a file
    known = None if shard_rows is None else sum(shard_rows)
    told = "data.hub.length says" if length is not None else "its files say" if known is not None else "its card says"
    if known is not None and length is not None and length > known:
        raise UserError(f"{name} has {known} images, data.hub.length asks for {length}: lower it or leave it out")
    length = next((n for n in (length, known, card) if n is not None), None)
    if length is None:
        raise UserError(f"{name} does not tell how many images it has: set data.hub.length to their number")
    if not length:
        raise hub_columns.no_rows(name)
    num = 1 if shard_rows is None else _lanes(dataset.num_shards) if lanes == "auto" else int(lanes)
    if num > dataset.num_shards:
        raise UserError(f"data.hub.lanes is {num}, but {name} has {dataset.num_shards} shards: lower it")
    how = Reading(columns, name, on_bad, folder)
    return StreamSource(dataset, how, shard_rows, length, block, num, stamp, told)


def _features(dataset: Any) -> Any:
    """Told by the set, or seen in its first rows: more than one, which may hold no object."""
    import datasets

    if dataset.features is not None:
        return dataset.features
    first = next(iter(dataset.with_format("arrow").iter(batch_size=LOOKED_AT)), None)
    return {} if first is None else datasets.Features.from_arrow_schema(first.schema)


def _lanes(num_shards: int) -> int:
    """The divisor, MOST_LANES at most, with the most factors of two; the greatest of those."""
    divisors = [d for d in range(1, MOST_LANES + 1) if num_shards % d == 0]
    return max(divisors, key=lambda d: (d & -d, d))


def sharing(source: StreamSource, num_ranks: int) -> str:
    """The line that says who reads what."""
    if num_ranks == 1 or source.own_lanes(0, num_ranks) is not None:
        return (
            f"stream: each of {num_ranks} processes reads its own {source.lanes // num_ranks} of {source.lanes} lanes"
        )
    return (
        f"stream: each of {num_ranks} processes reads everything and keeps its part, as {source.lanes} lanes cannot be "
        f"divided: with a number of shards, and data.hub.lanes, that is a multiple of {num_ranks}, it would not"
    )
