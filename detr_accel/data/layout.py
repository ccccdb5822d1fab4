"""Find the jsons and the image folders of a COCO data set, whoever wrote it (COCO, Roboflow, Label Studio, CVAT)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from detr_accel.data.coco_json import Strings
from detr_accel.data.dirt import Dirt
from detr_accel.structures import UserError

_SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_WORD = re.compile(r"(?<![a-z])(train|validation|valid|val|test)(?![a-z])", re.IGNORECASE)
_OTHER_TASKS = ("person_keypoints", "captions", "stuff", "panoptic", "image_info")
_OF_HUB = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # written by save_to_disk
_SHOWN = 6
MOST_MISSING = 0.5  # a larger share of missing images is another folder, or a download that stopped


def find_jsons(root: Path) -> dict[str, list[Path]]:
    """COCO jsons at most two folders deep, by split; those that name no split are under ``""``.

    Raises:
        UserError: the folder is absent or holds none.
    """
    if not root.is_dir():
        what = "is a file, not a folder: give the folder above it" if root.exists() else "does not exist"
        raise UserError(f"the data folder {root} {what}")
    found: dict[str, list[Path]] = {}
    for path in sorted(p for depth in ("*", "*/*", "*/*/*") for p in root.glob(f"{depth}.json")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and not path.name.startswith(_OTHER_TASKS) and path.name not in _OF_HUB:
            found.setdefault(_split_of(path, root), []).append(path)
    found = {split: _only_coco(paths) for split, paths in found.items()}
    found = {split: paths for split, paths in found.items() if paths}
    if not found and _is_hub_set(root):
        raise UserError(
            f"{root} holds a Hugging Face data set and no COCO json: train on it with data.format=hub data.root={root}"
        )
    if not found:
        raise UserError(
            f"no COCO json in {root} (looked two folders deep) and no Hugging Face data set: it should hold "
            "annotations/instances_train.json and the images in train/, or parquet files, or images and a "
            "metadata.jsonl; a json elsewhere is named by data.train_annotations in a recipe"
        )
    return found


def format_of(root: Path) -> str:
    """``data.format`` of a folder or file: ``hub`` where it has a Hugging Face set and no COCO json, else ``coco``."""
    if not _is_hub_set(root):
        return "coco"
    try:
        found = find_jsons(root)
    except UserError:
        return "hub"
    return "coco" if any(_looks_like_coco(path) for paths in found.values() for path in paths) else "hub"


def is_hub_file(path: Path) -> bool:
    """Whether it is a file that is a data set by itself."""
    return path.suffix in (".parquet", ".arrow") and path.is_file()


def _is_hub_set(root: Path) -> bool:
    if not root.is_dir():
        return is_hub_file(root)
    names = ("*.parquet", "*.arrow", "metadata.jsonl", "metadata.csv", "dataset_dict.json")
    return any(next(root.glob(f"{depth}{name}"), None) for depth in ("", "*/") for name in names)


def pick(found: dict[str, list[Path]], split: str, root: Path) -> Path | None:
    """The json of a split; None where there is none.

    Raises:
        UserError: several could be meant.
    """
    paths = found.get(split, [])
    detection = [p for p in paths if p.stem.startswith("instances")]
    for choice in (paths, detection, [p for p in detection or paths if _has_folder(p, root)]):
        if len(choice) == 1:
            return choice[0]
    if not paths:
        return None
    names = ", ".join(str(p.relative_to(root)) for p in paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")
    key = {"val": "data.val_annotations"}.get(split, "data.train_annotations")
    raise UserError(f"{root} has several jsons for one split ({names}): say which with {key}")


def _split_of(path: Path, root: Path) -> str:
    for text in (path.stem, *(p.name for p in path.parents if p != root and root in p.parents)):
        words = _WORD.findall(text)
        if words:
            return _SPLIT_NAMES[words[-1].lower()]
    return ""


def _only_coco(paths: list[Path]) -> list[Path]:
    """Where there are several, leave out those that are something else (settings, one json per image)."""
    return paths if len(paths) == 1 else [p for p in paths if _looks_like_coco(p)]


def _looks_like_coco(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
        if len(head) < 1 << 16:
            tree = json.loads(head)
            return isinstance(tree, dict) and {"images", "annotations", "categories"} <= tree.keys()
    except (OSError, ValueError, RecursionError):
        return False
    # too large to parse twice: the lists' order differs, but one of the names stands near the top of each writer's file
    return head.lstrip().startswith(b"{") and any(k in head for k in (b'"images"', b'"annotations"', b'"categories"'))


def _own_name(path: Path) -> str:
    """The split as the json's name spells it: instances_train2017.json -> train2017."""
    return re.sub(r"^(instances|annotations?)_", "", path.stem)


def _has_folder(path: Path, root: Path) -> bool:
    return any((base / _own_name(path)).is_dir() for base in (root, root / "images"))


def image_folders(json_path: Path, root: Path, split: str) -> list[Path]:
    """Existing folders where the images of a json may be, likeliest first."""
    names = [_own_name(json_path), *(word for word, known in _SPLIT_NAMES.items() if split and known == split)]
    beside = [] if json_path.parent.name.lower().startswith("annotation") else [json_path.parent]
    above = json_path.parent.parent
    folders = [p / "images" for p in beside]
    for name in names:
        folders += [root / name / "images", root / name, root / "images" / name, above / "images" / name]
    folders += [*beside, above / "images", root / "images", root]
    return [p for p in dict.fromkeys(folders) if p.is_dir()]


class Folder:
    """The files below an image folder, listed once: one look at a directory is cheaper than one at each file."""

    def __init__(self, path: Path):
        self.path, self.files, self._by_name = path, set[str](), dict[str, list[str]]()
        seen: set[str] = set()
        for here, folders, files in os.walk(path, followlinks=True):
            real = os.path.realpath(here)
            folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
            seen.add(real)
            below = os.path.relpath(here, path).replace(os.sep, "/")
            self.files.update(name if below == "." else f"{below}/{name}" for name in files)
        for file in sorted(self.files):
            self._by_name.setdefault(file.rpartition("/")[2], []).append(file)

    def has(self, file_name: str) -> bool:
        """Whether ``find`` finds exactly one file."""
        try:
            return self.find(file_name) is not None
        except UserError:
            return False

    def find(self, file_name: str) -> str | None:
        """The file that a json means, relative to the folder; None when it is not there.

        A name may carry folders that the writer had and we have not (Label Studio's ``../../media/upload/1/x.jpg``,
        backslashes, ``?d=`` addresses), or lack some that we have (CVAT's ``images/default``); not both at once.

        Raises:
            UserError: several files fit.
        """
        name = _plain_name(file_name)
        for text in dict.fromkeys((name, unquote(name))):
            parts = PurePosixPath(text).parts
            for start in range(len(parts)):
                tail = "/".join(parts[start:])
                if tail in self.files:
                    return tail
            deeper = [f for f in self._by_name.get(parts[-1], []) if f.endswith("/" + text)] if parts else []
            if len(deeper) > 1:
                raise UserError(
                    f"{file_name!r} may be {deeper[0]} or {deeper[1]} in {self.path}: write the folder into file_name"
                )
            if deeper:
                return deeper[0]
        return None


def _plain_name(file_name: str) -> str:
    name = file_name.rpartition("?d=")[2].replace("\\", "/")
    name = re.sub(r"^([A-Za-z]:|file://)", "", name)
    return "/".join(p for p in name.split("/") if p not in ("", ".", ".."))


def one_name(first: str, second: str) -> bool:
    """Whether two file names of a json can mean one file: the same, or one with more folders before it."""
    one, other = (f"/{_plain_name(unquote(name))}" for name in (first, second))
    return one.endswith(other) or other.endswith(one)


def locate(json_path: Path, file_names: Strings, folders: list[Path], dirt: Dirt | None = None) -> tuple[Path, Strings]:
    """Find every image of a json.

    Args:
        folders: candidates, likeliest first; the first that has the json's first images is taken.
        dirt: counts and decides; None refuses whatever is odd.
    Returns:
        the folder, and each image's path relative to it; "" where the file is not there.
    Raises:
        UserError: more than half of the images are missing, as in another folder.
    """
    dirt = Dirt("stop") if dirt is None else dirt
    if not folders:
        raise UserError(f"{json_path}: no image folder beside it: set data.train_images or data.val_images")
    probe = [file_names[i] for i in range(min(50, len(file_names)))]
    best, most = None, -1
    for path in folders:
        folder = Folder(path)
        hits = sum(folder.has(name) for name in probe)
        if hits > most:
            best, most = folder, hits
        if hits == len(probe):
            break
    assert best is not None
    paths, missing, unclear = [], [], []
    for i in range(len(file_names)):
        try:
            paths.append(best.find(file_names[i]) or "")
            missing += [] if paths[-1] else [file_names[i]]
        except UserError as error:
            paths.append("")
            unclear.append(str(error))
    looked = best.path if most > 0 else " and ".join(map(str, folders[:3]))
    for kind, names in (("image.missing", missing), ("image.unclear", unclear)):
        text = unclear[0] if unclear else ""
        if kind == "image.missing" and missing:
            text = (
                f"{json_path}: {len(missing)} of {len(paths)} images are not in {looked}, the first is {missing[0]!r}: "
                "put them there, remove their records, or set data.train_images / data.val_images"
            )
        if len(names) > MOST_MISSING * len(paths) and not dirt.look:
            raise UserError(text)
        if names:
            dirt.note(kind, text, len(names), names)
    return best.path, Strings(paths)
