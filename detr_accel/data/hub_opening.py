"""A Hugging Face data set opened as both splits, whole or with a streamed training split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from detr_accel.data import hub, hub_files, hub_names, hub_where, opening, stream, stream_rows
from detr_accel.data.check import Split
from detr_accel.data.dirt import Dirt
from detr_accel.data.hub import HubSource
from detr_accel.data.hub_columns import Columns
from detr_accel.data.hub_where import Opened, Where
from detr_accel.data.opening import Splits
from detr_accel.structures import Classes, UserError


@dataclass(frozen=True)
class Asked:
    """A set as the recipe names it.

    Args:
        train_split, val_split: None takes the usual name.
        on_bad: ``mend``, ``drop`` or ``stop``.
    """

    where: Where
    columns: Columns
    train_split: str
    val_split: str | None
    on_bad: str

    @cached_property
    def found(self) -> Opened:
        """What is there, asked for once."""
        return Opened(self.where)

    def split_names(self, splits: Mapping[str, Any]) -> tuple[str, str | None]:
        hub_names.check(self.found, splits, self.columns)
        return hub_where.split_names(splits, self.train_split, self.val_split, self.where)

    def open(self, dataset: Any, split: str, dirt: Dirt, classes: Classes | None = None) -> HubSource:
        return hub.open_split(dataset, self.columns, self.title(split), dirt, classes, self.where.folder)

    def title(self, split: str) -> str:
        return f"{self.where}, split {split}"


def whole(asked: Asked, split_json: dict | None, val_fraction: float, seed: int) -> Splits:
    """Both splits, or a single one cut in two.

    Args:
        split_json: a cut made before.
        val_fraction, seed: of a new one.
    Raises:
        UserError: as ``hub.open_split``; or there is nothing to learn from.
    """
    splits = asked.found.splits()
    train_name, val_name = asked.split_names(splits)
    found, more = Dirt(asked.on_bad), Dirt(asked.on_bad)
    train = asked.open(splits[train_name], train_name, found)
    odd = hub.reaches_out(train, asked.columns.box_format)
    if val_name is None:
        cut = opening.cut(train, split_json or opening.draw_split(train, val_fraction, seed))
        return replace(cut, found=[*cut.found, *odd, *found.lines("both", opening.DESCRIBED)])
    val = asked.open(splits[val_name], val_name, more, train.classes)
    opening.check_targets(train)
    lines = [
        opening.line("train", train), opening.line("val", val), *odd, *opening.unused(train), *opening.no_boxes(val),
        *found.lines("train", opening.DESCRIBED), *more.lines("val", opening.DESCRIBED),
    ]  # fmt: skip
    return Splits(train, val, lines)


def streamed(asked: Asked, length: int | None, block: int, lanes: int | str) -> Splits:
    """The training split as a stream, the other one whole.

    Args:
        length, block, lanes: as ``stream.open_stream``; a length of None is the one that the set tells.
    Raises:
        UserError: what a stream cannot know is told by nobody; or as ``hub.open_split``.
    """
    where = asked.where
    splits = asked.found.splits(streaming=True)
    train_name, val_name = asked.split_names(splits)
    if val_name is None:
        raise UserError(
            f"{where} has the single split {train_name!r}, and a stream cannot be cut in two: set data.hub.val_split, "
            "or data.hub.streaming=false"
        )
    dataset, found = splits[train_name], Dirt(asked.on_bad)
    files = hub_files.look_at(asked.found.files(train_name))
    train = stream.open_stream(
        dataset, asked.columns, hub_files.shard_rows(files), length, block, lanes, asked.title(train_name),
        card=hub_where.told_length(dataset, train_name), on_bad=asked.on_bad, folder=where.folder,
        stamp=hub_files.fingerprint(train_name, files),
    )  # fmt: skip
    first = train.first_block()
    odd = stream_rows.look(first, asked.columns) if first is not None else []
    val = asked.open(asked.found.one(val_name), val_name, found, train.classes)
    lines = [opening.line("train", train), opening.line("val", val), *odd, *opening.no_boxes(val)]
    return Splits(train, val, [*lines, *found.lines("val", opening.DESCRIBED)])


def split_named(asked: Asked, wanted: str, only: bool) -> HubSource:
    """A split whole, streamed in training or not.

    Args:
        wanted: ``train`` and ``val`` are the ones that a training uses.
        only: fetch no file of another one.
    Raises:
        UserError: it is not there; names those that are.
    """
    splits = asked.found.names() if only else asked.found.splits()
    train_name, val_name = asked.split_names(splits)
    name = {"train": train_name, "val": val_name}.get(wanted, wanted)
    if name not in splits:
        raise UserError(f"{asked.where} has no split {wanted!r} ({', '.join(splits)}); choose with --split")
    dataset = asked.found.one(name) if only else splits[name]
    return asked.open(dataset, name, Dirt(asked.on_bad))


def to_check(asked: Asked) -> list[Split]:
    """The splits of a training, opened as far as can be.

    Raises:
        UserError: there is no data set.
    """
    splits = asked.found.splits()
    names = zip(("train", "val"), asked.split_names(splits), strict=True)
    rows = [(split, name) for split, name in names if name is not None]
    return [opening.looked_at(split, asked.on_bad, partial(asked.open, splits[name], name)) for split, name in rows]
