"""The model folder: what a trained detector is on disk.

``model.safetensors`` (keys free of wrapper prefixes), ``recipe.yaml`` (resolved), ``classes.json`` (label -> name and
category id), ``meta.json`` and, where one json was cut in two, ``split.json`` (the image ids of each part). The meta
say which ``weights`` these are (``ema`` or ``raw``), after which ``window``, by which ``metric`` the best are chosen,
and of the last evaluation the ``metrics``, the ``metrics_window`` and the score ``threshold`` of best F1. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from detr_accel import recipe as recipes
from detr_accel.models.class_rows import num_labels
from detr_accel.models.keymaps import StateDict, strip_wrappers
from detr_accel.structures import Classes, UserError

MODEL, RECIPE, CLASSES, META = "model.safetensors", "recipe.yaml", "classes.json", "meta.json"
SPLIT, MANIFEST = "split.json", "manifest.json"
_NEEDED = (MODEL, RECIPE, CLASSES)
_REMEDY = "copy it again or take another checkpoint"


@dataclass
class Loaded:
    """A detector as read from disk. ``report``: what was and was not read, in lines to print."""

    state_dict: StateDict
    recipe: recipes.Recipe
    classes: Classes
    meta: dict[str, Any]
    folder: Path
    report: list[str] = field(default_factory=list)
    split: dict[str, Any] | None = None  # the image ids that it was trained and validated on, as data.build takes them


def which(loaded: Loaded) -> str:
    """One sentence: which weights these are, of which window, and what they came to by which metric."""
    meta = loaded.meta
    window = f" of window {meta['window']}" if "window" in meta else ""
    return f"weights: {meta.get('weights', 'as converted')}{window} from {loaded.folder}{_measured(meta)}"


def _measured(meta: dict[str, Any]) -> str:
    """What the last evaluation said of weights that a run saved; it may be older than they are."""
    if "window" not in meta:
        return ""
    at = meta.get("metrics_window", "unknown")
    if meta.get("metrics") is None or at is None:
        return ", never evaluated"
    value = meta["metrics"].get(meta["metric"])
    said = f"{meta['metric']} {'undefined' if value is None else format(value, '.4f')} on its validation set"
    if at == meta["window"]:
        return f": {said}"
    return f", at its last evaluation: {said}" if at == "unknown" else f", last evaluated at window {at}: {said}"


def save(
    folder: str | Path,
    model: nn.Module | StateDict,
    recipe_yaml: str,
    classes: Classes,
    meta: dict[str, Any] | None = None,
    split: dict[str, Any] | None = None,
) -> None:
    """Write a model folder.

    Args:
        folder: created where it is missing; files of the same names are replaced.
        model: a module, wrapped or not, or its state dict.
        recipe_yaml: the resolved recipe, ``recipe.dumps``.
        meta: see the module's docstring; anything json can hold.
        split: likewise; None writes no such file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    save_file(_own_memory(state), folder / MODEL, metadata={"format": "pt"})
    (folder / RECIPE).write_text(recipe_yaml, encoding="utf-8")
    (folder / CLASSES).write_text(to_json(classes.to_json()), encoding="utf-8")
    (folder / META).write_text(to_json(meta or {}), encoding="utf-8")
    if split is not None:
        (folder / SPLIT).write_text(to_json(split), encoding="utf-8")


def load(path: str | Path, which: str | None = None) -> Loaded:
    """Read a model folder, or the one inside a run or checkpoint folder, onto the CPU.

    Args:
        path: as ``find`` takes it, or a ``.safetensors`` file beside a recipe.yaml (a checkpoint's raw weights).
    Raises:
        UserError: nothing there, a file missing or damaged, or parts that do not belong together.
    """
    path = Path(path)
    given = path.is_file() and path.suffix == ".safetensors" and path.name != MODEL
    file = path if given else find(path, which) / MODEL
    folder = file.parent
    fault = damage(folder, (file.name, RECIPE, CLASSES, META, SPLIT))
    if fault is not None:
        raise UserError(f"{folder} is damaged: {fault}; {_REMEDY}")
    state = read_safetensors(file)
    recipe = recipes.loads(_read_text(folder / RECIPE), str(folder / RECIPE))
    classes = _read_classes(folder / CLASSES)
    check_head(state, classes, folder)
    meta = _read_meta(folder / META) if (folder / META).exists() else {}
    if given:
        meta |= {"weights": file.stem, "metrics": None, "metrics_window": None, "threshold": None}  # were the others'
    notes = [] if given else _detour(path, folder)
    return Loaded(state, recipe, classes, meta, file if given else folder, notes, _read_split(folder))


def find(path: str | Path, which: str | None = None) -> Path:
    """The model folder that ``path`` means.

    Args:
        path: a run (``checkpoints/best``, else ``checkpoints/last``, else, where these links were lost, its newest
            whole checkpoint), a checkpoint, or a model folder.
        which: ``best`` or ``last``, to insist on one of a run's checkpoints.
    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.name == MODEL and path.is_file():
        path = path.parent
    if not path.exists():
        raise UserError(f"nothing at {path}: give a run folder (runs/NAME), a checkpoint or a model folder")
    folders = [path / "checkpoints" / name for name in ([which] if which else ["best", "last"])]
    if which is None or not (path / "checkpoints").is_dir():
        folders.insert(0, path)
    for folder in folders:
        for candidate in (folder, folder / "model"):
            if (candidate / MODEL).is_file():
                return candidate
        if folder != path and folder.is_dir():
            raise UserError(f"{folder / MODEL} is missing: give another checkpoint of {path}/checkpoints")
    if which != "best" and (newest := _newest_whole(path / "checkpoints")) is not None:
        return newest
    if (path / "checkpoints").is_dir():
        wanted = which or "best or last"
        raise UserError(f"run {path} has no finished checkpoint ({wanted}) yet: let it reach its first one")
    raise UserError(f"no {MODEL} in {path}: give a run folder (runs/NAME), a checkpoint or a model folder")


def _newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is as its manifest says; one without a manifest was never finished.

    Raises:
        UserError: there are checkpoints, and all are damaged; what is wrong with the newest is named.
    """
    faults = []
    for folder in sorted(checkpoints.glob("window-*"), reverse=True):
        fault = damage(folder, _NEEDED) if (folder / MANIFEST).is_file() else f"{MANIFEST} is missing"
        if fault is None:
            return folder
        faults.append(f"{folder}: {fault}")
    if faults:
        raise UserError(f"no checkpoint in {checkpoints} is whole ({faults[0]}): {_REMEDY}")
    return None


def _detour(path: Path, found: Path) -> list[str]:
    """Say so where a run's checkpoint is not the one that its links should show."""
    checkpoints = path / "checkpoints"
    if found.parent == checkpoints and found.name.startswith("window-"):
        return [f"{checkpoints} has lost its links best and last: its newest whole checkpoint, {found.name}, is taken"]
    best = checkpoints / "best"
    if best.is_symlink() and not best.exists() and found == checkpoints / "last":
        return [f"{best} points to nothing: the last checkpoint is taken"]
    return []


def damage(folder: Path, names: tuple[str, ...]) -> str | None:
    """What is wrong with some files of a checkpoint, in words; None when they are as the manifest says.

    A folder without a manifest (a converted one) is taken as it is; so are files that only some checkpoints have.
    """
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return f"{MANIFEST} cannot be read"
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is no table of files"
    for name in names:
        if name not in manifest and name in (names[0], *_NEEDED[1:]):
            return f"{MANIFEST} does not list {name}"
        fault = file_fault(folder / name, manifest[name]) if name in manifest else None
        if fault is not None:
            return fault
    return None


def file_fault(file: Path, row: Any) -> str | None:
    """What is wrong with a file, in words; None where it is as its row of the manifest says."""
    if not isinstance(row, dict) or not {"bytes", "sha256"} <= row.keys():
        return f"{MANIFEST} has no size and sha256 of {file.name}"
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != row["bytes"]:
        return f"{file.name} has {file.stat().st_size} bytes instead of {row['bytes']}"
    with open(file, "rb") as content:
        same = hashlib.file_digest(content, "sha256").hexdigest() == row["sha256"]
    return None if same else f"{file.name} was changed after it was written (sha256 differs)"


def load_into(model: nn.Module, state: StateDict, source: str | Path) -> None:
    """Fill a model with weights that must fit it exactly.

    Raises:
        UserError: names the first keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    faults = [f"{k} is missing" for k in own if k not in state]
    faults += [f"{k} is not known to the model" for k in state if k not in own]
    faults += [
        f"{k} is {tuple(state[k].shape)} and should be {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        first = "; ".join(faults[:3]) + more
        raise UserError(f"the weights in {source} do not fit the model that the recipe describes: {first}")
    model.load_state_dict(state)


def read_safetensors(path: Path) -> StateDict:
    """Tensors of a safetensors file, by names free of wrapper prefixes."""
    if not path.is_file():
        raise UserError(f"{path} is missing: the folder is not a whole model; take another checkpoint")
    try:
        return {strip_wrappers(k): v for k, v in load_file(path, device="cpu").items()}
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged or cut short ({reason}): {_REMEDY}") from None


def check_head(state: StateDict, classes: Classes, where: str | Path) -> None:
    """Refuse a class table that does not belong to the class head."""
    labels = num_labels(state)
    if labels is not None and labels != len(classes):
        detr = "class_embed.bias" in state
        outputs = f"{labels + 1} outputs ({labels} labels and no-object)" if detr else f"{labels} outputs"
        raise UserError(
            f"{where}: the class table names {len(classes)} labels, but the head has {outputs}: they are from "
            "different models"
        )


def _own_memory(state: StateDict) -> StateDict:
    """Contiguous CPU tensors that share no memory, which safetensors insists on."""
    seen: set[int] = set()
    out: StateDict = {}
    for key, value in state.items():
        value = value.detach().to("cpu").contiguous()
        pointer = value.untyped_storage().data_ptr()
        if pointer in seen:
            value = value.clone()
        seen.add(pointer)
        out[strip_wrappers(key)] = value
    return out


def _read_classes(path: Path) -> Classes:
    return classes_from(read_json(path), str(path))


def classes_from(data: Any, where: str) -> Classes:
    """
    Raises:
        UserError: no class table; ``where`` is named.
    """
    lists = [data.get(key) for key in ("names", "category_ids")] if isinstance(data, dict) else [None]
    if all(isinstance(items, list) for items in lists) and len(lists[0]) == len(lists[1]):
        names, ids = lists
        if all(n is None or isinstance(n, str) for n in names) and all(i is None or type(i) is int for i in ids):
            return Classes(tuple(names), tuple(ids))
    raise UserError(f"{where} is no class table: it needs names and category_ids, lists of equal length")


def _read_meta(path: Path) -> dict[str, Any]:
    meta = read_json(path)
    metrics = meta.get("metrics") if isinstance(meta, dict) else 0
    threshold = meta.get("threshold") if isinstance(meta, dict) else 0
    whole = metrics is None or (isinstance(metrics, dict) and isinstance(meta.get("metric"), str))
    if not whole or not (threshold is None or type(threshold) in (int, float)):
        raise UserError(f"{path} does not describe weights as a checkpoint's {META} does: {_REMEDY}")
    return meta


def _read_split(folder: Path) -> dict[str, Any] | None:
    """The split in the folder itself, or else in the run whose checkpoint it is."""
    runs = [p.parent for p in folder.resolve().parents[:2] if p.name == "checkpoints"]
    path = next((p / SPLIT for p in (folder, *runs) if (p / SPLIT).is_file()), None)
    if path is None:
        return None
    split = read_json(path)
    parts = [split.get(name) for name in ("train", "val")] if isinstance(split, dict) and "seed" in split else [None]
    if not all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in parts):
        raise UserError(f"{path} is no saved split (a seed, and the image ids of train and val): {_REMEDY}")
    return split


def read_extra(extra: Any, where: str) -> tuple[recipes.Recipe, Classes]:
    """Recipe and class table out of a .pth's own entry, ``where``.

    Raises:
        UserError: it is damaged.
    """
    if not isinstance(extra, dict) or not isinstance(extra.get("recipe"), str):
        raise UserError(f"{where} is damaged (a recipe and a class table belong there)")
    return recipes.loads(extra["recipe"], where), classes_from(extra.get("classes"), where)


def read_json(path: Path) -> Any:
    text = _read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid json (line {error.lineno}): {_REMEDY}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or nesting without end
        raise UserError(f"{path} is not valid json: {_REMEDY}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the folder is not a whole model; take another checkpoint") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def to_json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
