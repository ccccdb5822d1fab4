"""``detr-accel check-data``: everything about a data set that can be known before a training, and what training does
about it. Every record is read, and every file decoded, as training would.

Legend: I images, A annotations, C categories of one split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from detr_accel.data.check_files import FileFacts, look_at_all
from detr_accel.data.coco import CocoSource, clip
from detr_accel.data.dirt import EXAMPLES, KINDS, Dirt, Kind
from detr_accel.data.geometry import resized

_KEPT = "kept as it is"

# what only a look at the whole, or at the pixels, can tell; the kinds of dirt.py come first
CHECKS: dict[str, Kind] = {
    "json": Kind("faults of the json or the set", "training does not start", harm=True),
    "image.exif": Kind(
        "images with an EXIF rotation", "applied where the json gives the rotated size, else as stored", stops=False
    ),
    "image.mode": Kind("images in an odd pixel format", "made RGB", stops=False),
    "image.named": Kind("files that are not what their name says", "read as what they are", stops=False),
    "image.huge": Kind("images far larger than the rest", "read whole and resized, slowly", stops=False),
    "image.blank": Kind("images of one colour", _KEPT, stops=False),
    "image.copy": Kind("images that are the same, pixel for pixel, as another", _KEPT, stops=False),
    "image.leak": Kind(
        "images that are in the training split, too", "both used: the figures flatter", stops=False, harm=True
    ),
    "image.queries": Kind("images with more objects than queries", "some cannot be found", stops=False, harm=True),
    "box.small": Kind("boxes smaller than half of the model's stride", "kept, though hard to find", stops=False),
    "box.overlap": Kind("boxes nearly on top of one of their class (IoU above 0.9)", _KEPT, stops=False),
    "category.names": Kind(
        "category names that the training split lacks, or has alone", "training does not start", harm=True
    ),
    "category.absent": Kind(
        "categories of the training split without a box here", "no figure tells of them", stops=False
    ),
    "category.unused": Kind("categories without a box", "learned as never there", stops=False),
    "category.one_box": Kind("categories with one box", _KEPT, stops=False),
    "category.unseen": Kind("categories that only another split shows", "never learned", stops=False, harm=True),
    "category.balance": Kind("boxes of the largest class for one of the smallest", "learned so", stops=False),
}  # fmt: skip
ALL = KINDS | CHECKS
HUGE = 10  # times the pixels of the median image
OVERLAP = 0.9
UNEVEN = 100  # boxes of one class for each of another, from which on it is told


@dataclass
class Finding:
    """One kind of dirt in one split."""

    kind: str
    split: str
    count: int
    training: str  # what it does about it
    harm: bool
    examples: list[str] = field(default_factory=list)
    places: list[tuple[str, tuple[float, ...] | None]] = field(default_factory=list)  # file, box xywh px

    @property
    def words(self) -> str:
        return ALL[self.kind].words


@dataclass
class Split:
    """One json with its images, as it was opened, or why it could not be."""

    name: str
    source: CocoSource | None
    dirt: Dirt
    fault: str | None = None


@dataclass
class Report:
    """Everything that was found; ``harm`` first."""

    splits: dict[str, dict]
    classes: list[dict]  # name, and boxes by split
    findings: list[Finding]
    policy: str
    assumed: str  # which model the figures about sizes are for
    sources: dict[str, CocoSource] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """Clean, or training mends it without losing anything."""
        return not any(f.harm for f in self.findings)

    def to_json(self) -> dict:
        rows = [
            {
                "kind": f.kind, "split": f.split, "count": f.count, "words": f.words, "training": f.training,
                "harm": f.harm, "examples": f.examples,
            }
            for f in self.findings
        ]  # fmt: skip
        return {
            "ok": self.ok, "on_bad": self.policy, "assumed": self.assumed, "splits": self.splits,
            "classes": self.classes, "findings": rows,
        }  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What sizes are measured by: stride px, and the resize of evaluation."""

    stride_px: int = 32
    num_queries: int = 100
    short_px: int = 800
    max_px: int = 1333
    square: bool = False

    def words(self) -> str:
        side = min(self.short_px, self.max_px)
        sizes = f"squeezed to {side}x{side}" if self.square else f"resized to {self.short_px}/{self.max_px}"
        return f"stride {self.stride_px} px, {self.num_queries} queries, images {sizes}"


def check(
    splits: Sequence[Split],
    model: Model,
    *,
    policy: str = "mend",
    workers: int = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Report:
    """Look at every record and file.

    Args:
        splits: ``train`` is compared with all others; one alone counts as it.
        policy: ``data.on_bad`` of the training to come.
        workers: processes that decode.
        progress: wraps the loop over the files.
    """
    opened = [s for s in splits if s.source is not None]
    findings = [f for s in splits for f in _read(s, policy)]
    facts: dict[str, list[FileFacts]] = {}
    everything = [(n, i) for n, s in enumerate(opened) for i in range(len(s.source))]
    files = look_at_all([s.source for s in opened], everything, workers)
    for (n, _), found in zip(everything, progress(files, len(everything)), strict=True):
        facts.setdefault(opened[n].name, []).append(found)
    for s in opened:
        findings += _files(s, facts[s.name], policy)
        findings += _boxes(s, model)
    findings += _copies(opened, facts)
    train = next((s for s in opened if s.name == "train" or len(splits) == 1), None)
    if train is not None:
        findings += _categories(train, [s for s in opened if s is not train])
    order = list(ALL)
    findings.sort(key=lambda f: (not f.harm, order.index(f.kind)))
    return Report(
        {s.name: _about(s, facts.get(s.name, [])) for s in splits}, _class_table(opened), findings, policy,
        model.words(), {s.name: s.source for s in opened},
    )  # fmt: skip


def _finding(kind: str, split: str, count: int, policy: str, examples: Sequence[str] = (), places=()) -> Finding:
    row = ALL[kind]
    stops = policy == "stop" and row.stops
    does = row.drop if policy == "drop" and row.drop is not None else row.mend
    does = "training does not start, or ends there" if stops else does
    return Finding(kind, split, count, does, row.harm or stops, list(examples)[:EXAMPLES], list(places)[:EXAMPLES])


def _read(split: Split, policy: str) -> list[Finding]:
    """What reading the json and looking for its files has told."""
    found = [_finding("json", split.name, 1, policy, [split.fault])] if split.fault else []
    for kind, count in split.dirt.counts.items():
        if kind in ("image.scaled", "image.other_size"):
            continue  # some of them: the files tell of all
        places = [(_path(split.source, name), box) for name, box in split.dirt.places.get(kind, ())]
        found.append(_finding(kind, split.name, count, policy, split.dirt.examples[kind], places))
    return found


def _path(source: CocoSource | None, name: str) -> str:
    if source is None:
        return name
    row = next((i for i in range(len(source)) if source.name(i) == name), None)
    return name if row is None else source.file(row)


def _files(split: Split, facts: Sequence[FileFacts], policy: str) -> list[Finding]:
    """What each file has told: faults, and what is odd about it."""
    source, found = split.source, {}
    pixels = np.array([h * w for f in facts for h, w in [f.stored_px]] or [0])
    typical = float(np.median(pixels[pixels > 0])) if (pixels > 0).any() else 0.0
    for i, f in enumerate(facts):
        name = source.name(i)
        h, w = f.stored_px
        notes = {
            f.fault if f.fault != "image.missing" else "": f.why or name,  # missing ones are told already
            "image.exif": f"{name}: orientation {f.orientation}" if f.orientation not in (0, 1) else "",
            "image.mode": f"{name}: {f.mode}" if f.mode else "",
            "image.named": f"{name}: it is a {f.format}" if f.misnamed else "",
            "image.huge": f"{name}: {w}x{h}" if len(facts) >= 10 and h * w > HUGE * typical > 0 else "",
            "image.blank": name if f.blank else "",
        }
        for kind, text in notes.items():
            if kind and text:
                worse = -h * w if kind == "image.huge" else 0
                found.setdefault(kind, []).append((worse, text, (source.file(i), None)))
    return [
        _finding(kind, split.name, len(rows), policy, *zip(*_worst(rows), strict=True)) for kind, rows in found.items()
    ]


def _copies(splits: Sequence[Split], facts: dict[str, list[FileFacts]]) -> list[Finding]:
    """Equal pixels: within a split, and between the training split and another."""
    first: dict[bytes, tuple[str, str, str]] = {}  # digest -> split, name, path
    rows: dict[tuple[str, str], list] = {}
    for split in sorted(splits, key=lambda s: s.name != "train"):
        for i, f in enumerate(facts[split.name]):
            if not f.digest or f.blank:
                continue
            name, path = split.source.name(i), split.source.file(i)
            where, other, other_path = first.setdefault(f.digest, (split.name, name, path))
            if other_path == path and where == split.name:
                continue
            kind = "image.copy" if where == split.name else "image.leak"
            row = (f"{name} is {other}" + (f" of {where}" if where != split.name else ""), [path, other_path])
            rows.setdefault((kind, split.name), []).append(row)
    found = []
    for (kind, name), pairs in rows.items():
        places = [(path, None) for _, paths in pairs[:EXAMPLES] for path in paths]
        found.append(_finding(kind, name, len(pairs), "mend", [text for text, _ in pairs], places))
    return found


def _boxes(split: Split, model: Model) -> list[Finding]:
    """Boxes against the model, and against each other."""
    source, small, overlaps, crowded = split.source, [], [], []
    for i in range(len(source)):
        boxes, labels, _ = source._targets(source._rows[i], source.size_px(i))
        name, path, size = source.name(i), source.file(i), source.size_px(i)
        if len(boxes) > model.num_queries:
            crowded.append((-len(boxes), f"{name}: {len(boxes)} objects", (path, None)))
        if not len(boxes):
            continue
        seen = resized(size, model.short_px, model.max_px, model.square)
        scale = np.sqrt(np.prod(seen) / np.prod(size, dtype=np.float64))
        sides = np.sqrt((boxes[:, 2] - boxes[:, 0]).astype(np.float64) * (boxes[:, 3] - boxes[:, 1])) * scale
        tiny = np.flatnonzero(sides < model.stride_px / 2)
        small += [(sides[k], f"{name}: {sides[k]:.1f} px as the model sees it", _place(path, boxes[k])) for k in tiny]
        on_top = _on_top(boxes, labels)
        overlaps += [(0, f"{name}: {source.classes.names[labels[k]]}", _place(path, boxes[k])) for k in on_top]
    kinds = {"box.small": small, "box.overlap": overlaps, "image.queries": crowded}
    return [
        _finding(kind, split.name, len(rows), "mend", *zip(*_worst(rows), strict=True))
        for kind, rows in kinds.items()
        if rows
    ]  # fmt: skip


def _worst(rows: list[tuple[float, str, tuple]]) -> list[tuple[str, tuple]]:
    """Text and place of the first few by their number, in the order of the split where it is the same."""
    return [row[1:] for row in sorted(rows, key=lambda row: row[0])[:EXAMPLES]]


def _place(path: str, box_xyxy: np.ndarray) -> tuple[str, tuple[float, ...]]:
    x0, y0, x1, y1 = box_xyxy.tolist()
    return path, (x0, y0, x1 - x0, y1 - y0)


def _on_top(boxes: np.ndarray, labels: np.ndarray) -> list[int]:
    """Boxes [N, 4] of one image that nearly cover an earlier one of their class."""
    found = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        if 1 < len(mine) <= 2000:
            b = boxes[mine].astype(np.float64)
            area = (b[:, 2:] - b[:, :2]).prod(1)
            wh = np.minimum(b[:, None, 2:], b[None, :, 2:]) - np.maximum(b[:, None, :2], b[None, :, :2])
            both = wh.clip(0).prod(-1)
            iou = both / (area[:, None] + area[None] - both)
            found += mine[np.tril(iou > OVERLAP, -1).any(1)].tolist()
    return found


def _counts(split: Split) -> Counter[str]:
    """Boxes that can be learned from, by class."""
    source, t = split.source, split.source.table
    rows = np.repeat(np.arange(len(t)), np.diff(t.offsets))
    keep = clip(t.boxes_xywh_px, t.sizes_px[rows])[1] & ~t.crowd & ~t.again
    keep &= np.isin(rows, source._rows)
    ids, numbers = np.unique(t.category_ids[keep], return_counts=True)
    return Counter({t.categories[c]: n for c, n in zip(ids.tolist(), numbers.tolist(), strict=True)})


def _categories(train: Split, others: Sequence[Split]) -> list[Finding]:
    names, counts = list(train.source.table.categories.values()), _counts(train)
    kinds = {
        "category.unused": [n for n in names if counts[n] == 0],
        "category.one_box": [n for n in names if counts[n] == 1],
    }
    found = [_finding(kind, train.name, len(rows), "mend", rows) for kind, rows in kinds.items() if rows]
    used = [c for c in counts.values() if c]
    if used and max(used) > UNEVEN * min(used):
        most, least = max(counts, key=counts.get), min((n for n in counts if counts[n]), key=counts.get)
        text = f"{most}: {counts[most]} boxes, {least}: {counts[least]}"
        found.append(_finding("category.balance", train.name, max(used) // min(used), "mend", [text]))
    for split in others:
        theirs = list(split.source.table.categories.values())
        own, seen = _counts(split), getattr(split.source, "seen", False)
        lists = ": mend it, or list every class in data.hub.class_names" if seen else ""
        apart = [f"only here: {n}{lists}" for n in theirs if n not in names]
        apart += [f"not here: {n}" for n in names if n not in theirs and not seen]
        absent = [f"{n}: {counts[n]} in {train.name}, none here" for n in names if counts[n] and not own[n]]
        unseen = [n for n, c in own.items() if c and n in names and counts[n] == 0]
        if apart:
            found.append(_finding("category.names", split.name, len(apart), "mend", apart))
        if absent and (seen or not apart):
            absent[0] += ": move some of its images over from there, where there are more"
            found.append(_finding("category.absent", split.name, len(absent), "mend", absent))
        if unseen:
            found.append(_finding("category.unseen", split.name, len(unseen), "mend", unseen))
    return found


def _class_table(splits: Sequence[Split]) -> list[dict]:
    counts = {s.name: _counts(s) for s in splits}
    names = dict.fromkeys(n for s in splits for n in s.source.table.categories.values())
    rows = [{"name": n, **{split: c[n] for split, c in counts.items()}} for n in names]
    return sorted(rows, key=lambda row: -sum(v for v in row.values() if isinstance(v, int)))


def _about(split: Split, facts: Sequence[FileFacts]) -> dict:
    if split.source is None:
        return {"fault": split.fault}
    source, t = split.source, split.source.table
    return {
        "json": str(t.path), "images_in": source.folder, "images": len(source), "boxes": len(t.category_ids),
        "targets": source.num_targets(), "categories": len(t.categories), "most_boxes": source.most_boxes(),
        "read": sum(not f.fault for f in facts),
    }  # fmt: skip
