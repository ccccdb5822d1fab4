"""A Hugging Face data set opened as both splits, whole or with a streamed training split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from detr_accel.data import hub, hub_names, opening, stream
from detr_accel.data.check import Split
from detr_accel.data.dirt import Dirt
from detr_accel.data.hub import HubSource, Where
from detr_accel.data.hub_columns import Columns
from detr_accel.data.opening import Splits
from detr_accel.structures import UserError


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

    def split_names(self, splits: Mapping[str, Any]) -> tuple[str, str | None]:
        hub_names.check(self.where, splits, self.columns)
        return hub.split_names(splits, self.train_split, self.val_split, self.where)

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
    splits = hub.load(asked.where)
    train_name, val_name = asked.split_names(splits)
    found, more = Dirt(asked.on_bad), Dirt(asked.on_bad)
    train = hub.open_split(splits[train_name], asked.columns, asked.title(train_name), found)
    odd = hub.reaches_out(train, asked.columns.box_format)
    if val_name is None:
        cut = opening.cut(train, split_json or opening.draw_split(train, val_fraction, seed))
        return replace(cut, found=[*cut.found, *odd, *found.lines("both", opening.DESCRIBED)])
    val = hub.open_split(splits[val_name], asked.columns, asked.title(val_name), more, train.classes)
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
    splits = hub.load(where, streaming=True)
    train_name, val_name = asked.split_names(splits)
    if val_name is None:
        raise UserError(
            f"{where} has the single split {train_name!r}, and a stream cannot be cut in two: set data.hub.val_split, "
            "or data.hub.streaming=false"
        )
    dataset, found = splits[train_name], Dirt(asked.on_bad)
    train = stream.open_stream(
        dataset, asked.columns, stream.parquet_rows(hub.files(where, train_name)),
        length or hub.told_length(dataset, train_name), block, lanes, asked.title(train_name),
    )  # fmt: skip
    whole = hub.load_one(where, val_name)
    val = hub.open_split(whole, asked.columns, asked.title(val_name), found, train.classes)
    lines = [opening.line("train", train), opening.line("val", val), *opening.no_boxes(val)]
    return Splits(train, val, [*lines, *found.lines("val", opening.DESCRIBED)])


def split_named(asked: Asked, wanted: str) -> HubSource:
    """A split whole, streamed in training or not.

    Args:
        wanted: ``train`` and ``val`` are the ones that a training uses.
    Raises:
        UserError: it is not there; names those that are.
    """
    splits = hub.load(asked.where)
    train_name, val_name = asked.split_names(splits)
    name = {"train": train_name, "val": val_name}.get(wanted, wanted)
    if name not in splits:
        raise UserError(f"{asked.where} has no split {wanted!r} ({', '.join(splits)}); choose with --split")
    return hub.open_split(splits[name], asked.columns, asked.title(name), Dirt(asked.on_bad))


def to_check(asked: Asked) -> list[Split]:
    """The splits of a training, opened as far as can be.

    Raises:
        UserError: there is no data set.
    """
    splits = hub.load(asked.where)
    names = zip(("train", "val"), asked.split_names(splits), strict=True)
    rows = [(split, splits[name], asked.title(name)) for split, name in names if name is not None]
    return [
        opening.looked_at(split, asked.on_bad, partial(hub.open_split, one, asked.columns, title))
        for split, one, title in rows
    ]
