"""A COCO json opened as a source, one json cut into two splits, and what there is to say about them at the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from detr_accel.data import coco_json, layout
from detr_accel.data import source as seeds
from detr_accel.data.check import Split
from detr_accel.data.coco import CocoSource, classes_like, classes_of
from detr_accel.data.dirt import Dirt
from detr_accel.data.hub import HubSource
from detr_accel.data.settle import settle
from detr_accel.data.source import Source
from detr_accel.data.stream import StreamSource
from detr_accel.structures import Classes, UserError

DESCRIBED = ("box.flat", "box.outside", "box.cut")  # in a source's own line


@dataclass(frozen=True)
class Splits:
    """Both splits, and what to tell and to keep about them."""

    train: Source
    val: Source
    found: list[str]  # lines for the console
    split_json: dict | None = None  # the image ids of each split, where one json was cut in two


def explicit(root: Path, path: str | None) -> Path | None:
    if path is None:
        return None
    full = root / Path(path).expanduser()
    if not full.exists():
        raise UserError(f"{full} does not exist (from {path!r} in the recipe)")
    return full


def open_split(
    json_path: Path, root: Path, split: str, images: Path | None, dirt: Dirt, like: Classes | None = None
) -> CocoSource:
    table = coco_json.read(json_path, dirt)
    folders = [images] if images is not None else layout.image_folders(json_path, root, split)
    folder, paths = layout.locate(json_path, table.file_names, folders, dirt)
    table, paths = settle(table, folder, paths, dirt)
    classes = classes_of(table) if like is None else classes_like(like, table)
    return CocoSource(table, folder, paths, classes, scale=dirt.policy == "mend")


def to_check(root: Path, given: Mapping[str, tuple[str | None, str | None]], on_bad: str) -> list[Split]:
    """Every split that there is, opened as far as can be; one json that names no split is ``all``.

    Args:
        given: json and image folder of ``train`` and ``val``, None where they are to be found.
    Raises:
        UserError: there is no data set.
    """
    found: dict[str, Path | None] = {s: explicit(root, json_path) for s, (json_path, _) in given.items()}
    whole = False
    if found["train"] is None:  # as a training finds them, and then whatever else names a split
        there = layout.find_jsons(root)
        found["val"] = found["val"] or layout.pick(there, "val", root)
        found["train"] = layout.pick(there, "train", root)
        if found["train"] is None and "" in there:
            found["train"], whole = layout.pick(there, "", root), found["val"] is None
        found |= {s: layout.pick(there, s, root) for s in there if s not in ("", "train", "val")}
    images = {s: explicit(root, folder) for s, (_, folder) in given.items()}
    rows = [(s, path, images.get(s)) for s, path in found.items() if path is not None]
    rows = [("all" if s == "train" and whole else s, *rest) for s, *rest in rows]
    return [looked_at(s, on_bad, partial(open_split, path, root, s, folder)) for s, path, folder in rows]


def looked_at(split: str, on_bad: str, open_it: Callable[[Dirt], CocoSource]) -> Split:
    """A split with all its dirt, or why it cannot be opened."""
    dirt = Dirt("mend" if on_bad == "stop" else on_bad, look=True)
    try:
        return Split(split, open_it(dirt), dirt)
    except UserError as error:
        return Split(split, None, dirt, str(error))


def draw_split(source: CocoSource, val_fraction: float, seed: int) -> dict:
    """A function of the seed and the set of image ids, whatever their order in the file. Versions of one picture
    (``versions``) come into one part."""
    ids = np.sort(source.table.image_ids)
    if len(ids) < 2:
        raise UserError(f"{source.table.path} lists one image: a training and a validation split need two")
    groups = versions(source)
    num_val, val = min(max(1, round(len(ids) * val_fraction)), len(ids) - 1), set[int]()
    order = seeds.generator(seed, seeds.SPLIT).permutation(len(groups)).tolist()
    for number in order:
        if len(val) + len(groups[number]) <= num_val:
            val.update(groups[number])
    if not val:  # each is larger than that
        least = min(groups, key=len)
        val.update(least if len(groups) > 1 else least[:num_val])
    parts = {"train": sorted(set(ids.tolist()) - val), "val": sorted(val)}
    return {"seed": seed, "val_fraction": val_fraction, **parts}


def versions(source: CocoSource) -> list[list[int]]:
    """Ids of images that are versions of one picture, as Roboflow's augmentation writes them (``a.rf.HASH.jpg``);
    all others alone. In the order of their least ids."""
    names, groups = source.table.file_names, dict[object, list[int]]()
    for row, image_id in sorted(enumerate(source.table.image_ids.tolist()), key=lambda pair: pair[1]):
        stem, version, _ = names[row].rpartition(".rf.")
        groups.setdefault(stem if version else image_id, []).append(image_id)
    return list(groups.values())


def cut(source: CocoSource, split_json: dict) -> Splits:
    row_of = {image_id: row for row, image_id in enumerate(source.table.image_ids.tolist())}
    gone = [i for name in ("train", "val") for i in split_json[name] if i not in row_of]
    if gone:
        raise UserError(f"{source.table.path} no longer has image {gone[0]} of the saved split ({len(gone)} are gone)")
    train, val = (source.subset(sorted(row_of[i] for i in split_json[name])) for name in ("train", "val"))
    check_targets(train)
    new = len(row_of) - len(train) - len(val)
    whole = "split" if isinstance(source, HubSource) else "json"
    lines = [
        f"data: one {whole}, cut by seed {split_json['seed']} into train and val (the split is saved with the run)"
        + _of_versions(source, set(split_json["val"])),
        line("train", train), line("val", val), *unused(train), *no_boxes(val),
    ]  # fmt: skip
    if new:
        lines.append(f"data: {new} images came after the split was saved; they are in neither part")
    return Splits(train, val, lines, split_json)


def _of_versions(source: CocoSource, val: set[int]) -> str:
    groups = [set(group) for group in versions(source) if len(group) > 1]
    parted = sum(len(group & val) for group in groups if group & val and group - val)
    if parted:
        return f"; beware: {parted} images of val are versions of images of train, so its figures flatter"
    num = sum(map(len, groups))
    return f"; {num} images are versions of others (.rf. in their names) and stay with them" if num else ""


def line(split: str, source: CocoSource) -> str:
    return f"data: {split}: {describe(source)}"


def describe(source: Source) -> str:
    """Which images these are, in one line."""
    if isinstance(source, StreamSource):
        return source.describe()
    if isinstance(source, HubSource):
        return f"{source.describe()}; {source.table.path}"
    if isinstance(source, CocoSource):
        return f"{source.describe()}; {source.table.path}, images in {source.folder}"
    return f"{len(source)} procedural shapes"


def unused(train: CocoSource) -> list[str]:
    used = set(train.target_categories().tolist())
    names = [n for c, n in train.table.categories.items() if c not in used]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return [f"data: {len(names)} classes have no box in the training split: {shown}"] if names else []


def check_targets(train: CocoSource) -> None:
    """
    Raises:
        UserError: not one box to learn from.
    """
    if train.num_targets() == 0:
        raise UserError(
            f"{train.table.path}: no image of the training split has a box that could be learned from "
            f"({train.describe()}): add annotations, or set data.train_annotations (data.hub.train_split) anew"
        )


def check_readable(source: CocoSource, split: str) -> None:
    """Decode images until one can be read: the first, as a rule.

    Raises:
        UserError: not one can.
    """
    first = None
    for index in range(len(source)):
        try:
            source.sample(index)
            return
        except UserError as error:
            first = first or error
    raise UserError(
        f"{source.table.path}: not one of the {len(source)} images of the {split} split can be read, the first: {first}"
    )


def no_boxes(val: CocoSource) -> list[str]:
    if val.num_targets():
        return []
    return [f"data: warning: the validation split has no boxes ({val.table.path}), so its metrics will be empty"]


def shared_files(train: CocoSource, val: CocoSource) -> list[str]:
    one, other = Path(train.folder).resolve(), Path(val.folder).resolve()
    if one != other and one not in other.parents and other not in one.parents:
        return []
    seen, again = (
        {f"{at}{s.file(i).removeprefix(s.folder)}" for i in range(len(s))} for at, s in ((one, train), (other, val))
    )
    num = len(seen & again)
    return [f"data: warning: {num} images are in both splits, so the validation figures will flatter"] if num else []
