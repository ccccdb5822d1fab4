"""Detectors of three formats, read and written: ours, the official ``.pth``, and transformers' folders.

DETR, and RT-DETR (both versions, and DEIM). The weights go there and back unchanged, bit for bit. What a format cannot
hold is told in the report: a ``.pth`` knows neither class names nor DC5 nor the number of heads or queries (where these
are not the published models', an entry ``detr_accel`` beside the weights keeps them; the official code does not look at
it). Nothing is unpickled but tensors and plain values.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from detr_accel import recipe as recipes
from detr_accel.models import (
    architecture,
    class_rows,
    hub,
    rtdetr_folder,
    rtdetr_keymaps,
    rtdetr_official,
    transformers_folder,
    weights,
)
from detr_accel.models.coco_classes import assumed, coco_91
from detr_accel.models.hub import fetch
from detr_accel.models.keymaps import (
    MASKED,
    StateDict,
    from_official,
    is_counter,
    is_masked,
    is_transformers,
    to_official,
)
from detr_accel.models.warm_start import warm_start
from detr_accel.models.weights import Loaded
from detr_accel.structures import Classes, UserError, check_free, writing

__all__ = ["FORMATS", "cut_head", "fetch", "init_from", "read", "write"]

_EXTRA = rtdetr_official.EXTRA


def read(path: str | Path, *, dc5: bool | None = None, num_heads: int | None = None) -> Loaded:
    """Read a detector, whichever of the three formats it is in.

    Args:
        path: a run, checkpoint or model folder; a transformers folder; a ``.pth`` or ``.safetensors`` file.
        dc5: whether the last stage is dilated, where the file does not say (an official ``.pth``): default no.
        num_heads: likewise, default 8.
    Returns:
        the detector under our names, complete; ``report`` says which weights these are and what was left out.
    Raises:
        UserError: not there, damaged, no detector of a known kind, with masks, or contradicting dc5 or num_heads.
    """
    path = Path(path)
    if path.is_file() and path.name == weights.MODEL and any((path.parent / n).exists() for n in _DESCRIBED_BY):
        path = path.parent
    if not path.exists():
        raise UserError(_nothing_at(path))
    described = path.suffix == ".safetensors" and (path.parent / weights.RECIPE).is_file()
    if path.is_file() and not described:
        loaded = _read_file(path, dc5, num_heads)
    elif (path / "config.json").is_file() and not (path / weights.RECIPE).exists():
        loaded = transformers_folder.read(path)
    else:
        loaded = weights.load(path)
    backbone, heads = loaded.recipe.model.backbone, loaded.recipe.model.num_heads
    if dc5 is not None and dc5 != backbone.dc5:
        raise UserError(f"{path} says itself that dc5 is {str(backbone.dc5).lower()}: leave dc5 out")
    if num_heads is not None and num_heads != heads:
        raise UserError(f"{path} says itself that it has {heads} heads, not {num_heads}: leave num_heads out")
    architecture.check(loaded.state_dict, loaded.recipe, len(loaded.classes), path)
    loaded.report.insert(0, weights.which(loaded))
    return loaded


def _nothing_at(path: Path) -> str:
    sentence = f"there is no such run, checkpoint or file: {path}"
    if hub.is_hub_id(str(path)):
        sentence += f"; if it is a model on the Hub, run `detr-accel fetch {path} --out FOLDER` first"
    return sentence + ("" if path.is_absolute() else f" (looked in {Path.cwd()})")


def write(loaded: Loaded, path: str | Path, to: str = "ours", cut_head: bool = False) -> list[str]:
    """Write a detector in one of the three formats; nothing that exists is overwritten.

    Args:
        path: a folder (ours, transformers) or a file (official).
        to: ``ours``, ``official`` or ``transformers``.
        cut_head: keep only the class rows that a category uses (91 published labels -> 80).
    Returns:
        lines to print, those of reading included.
    Raises:
        UserError: the path is taken or cannot be written, or the format cannot hold this detector.
    """
    if to not in FORMATS:
        raise UserError(f"{to!r} is no format: choose one of {', '.join(FORMATS)}")
    path = Path(path)
    if path.resolve() == Path.cwd():
        raise UserError(f"{path} is the folder that you are in: give a new one, such as {path / 'detector'}")
    check_free(path, or_empty=True)
    lines = list(loaded.report)
    if cut_head:
        loaded, line = _cut(loaded)
        lines.append(line)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path, SafetensorError, RuntimeError):  # torch.save says "enforce fail" of a full disk
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)
            lines += FORMATS[to](loaded, partial)
            if path.is_dir():
                path.rmdir()
            os.replace(partial, path)
        finally:
            _remove(partial)
    count = sum(v.numel() for v in loaded.state_dict.values())
    lines.append(f"wrote {path} ({to}): {count:,} numbers, {len(loaded.classes)} labels")
    return lines


def _remove(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    with suppress(OSError):
        partial.unlink()


def cut_head(loaded: Loaded) -> Loaded:
    """The same detector with only the class rows that a category uses; labels become contiguous, category ids stay."""
    return _cut(loaded)[0]


def init_from(
    model: nn.Module, classes: Classes, source: str | Path, head: str = "match", asked: recipes.Model | None = None
) -> list[str]:
    """Start a model from a trained detector, in place (recipe: ``model.init_from``, ``model.init_head``).

    Args:
        source: a path that ``read`` takes, or a hub id such as ``facebook/detr-resnet-101`` (fetched once).
        head: ``match``, ``keep`` or ``reset``.
        asked: the recipe's words for the model, for refusals.
    Returns:
        lines to print: what was and what was not copied.
    Raises:
        UserError: nothing there, not fetched and no network, or it does not fit the model.
    """
    if not Path(source).exists() and hub.is_hub_id(str(source)):
        loaded = read(fetch(str(source)))
        loaded.report.insert(0, f"{source}: from the Hub, kept in {loaded.folder}")
    else:
        loaded = read(source)
    differing = architecture.differing(asked, loaded.recipe.model) if asked is not None else []
    return [*loaded.report, *warm_start(model, classes, loaded, head, differing)]


def _read_file(path: Path, dc5: bool | None, num_heads: int | None) -> Loaded:
    if path.suffix == ".safetensors":
        content: dict[str, Any] = {"model": weights.read_safetensors(path)}
    else:
        content = _unpickle_tensors(path)
    state, place = _weights_in(content)
    twice = {"model"} if place == "ema.module" and _same(content.get("model"), state) else set()
    beside = sorted(set(content) - {place.partition(".")[0], _EXTRA} - twice) if place else []
    if not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise UserError(f"{path} holds no state dict: expected tensors by name, or such a dict under 'model'")
    extra = content.get(_EXTRA) if place else None
    if rtdetr_official.is_official(state):
        loaded = rtdetr_official.read(state, extra, path, place, num_heads)
    else:
        loaded = _official(state, extra, path, dc5, num_heads)
    if beside:
        loaded.report.append(f"left out of {path.name}: {', '.join(beside)} (not part of the model)")
    return loaded


def _same(one: Any, other: dict[str, Any]) -> bool:
    """Whether two entries of a file are one and the same weights, as ``rtdetr_official.content`` writes them."""
    return isinstance(one, dict) and one.keys() == other.keys() and all(
        torch.is_tensor(v) and v.data_ptr() == other[k].data_ptr() for k, v in one.items()
    )


def _weights_in(content: dict[str, Any]) -> tuple[Any, str]:
    """The weights in a file, and where they stand: averaged ones where there are any, as the original takes them."""
    ema = content.get("ema")
    if isinstance(ema, dict) and isinstance(ema.get("module"), dict):
        return ema["module"], "ema.module"
    if isinstance(content.get("model"), dict):
        return content["model"], "model"
    return content, ""


def _unpickle_tensors(path: Path) -> dict[str, Any]:
    if not _may_be_pytorch(path):
        raise UserError(f"{path} is no weights file: give a run, a model folder, a .pth or a .safetensors file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds pickled Python objects beside tensors, and unpickling runs code, so it is refused: where "
            f"you trust the file, keep its weights only, with python -c \"import torch; c = torch.load('{path}', "
            "weights_only=False); torch.save({'model': c['model']}, 'weights_only.pth')\", and give weights_only.pth"
        ) from None
    except Exception as error:  # damaged pickles raise whatever the bytes happen to mean
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no PyTorch file or is cut short ({reason}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: nothing to convert")
    return content


def _may_be_pytorch(path: Path) -> bool:
    """Whether a file is a zip archive or begins with a whole pickle, as torch.save writes them. Nothing is run."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            if head == b"PK\x03\x04":
                return True
            file.seek(0)
            return head[:1] == b"\x80" and sum(1 for _ in pickletools.genops(file)) > 0
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # genops, of bytes that are no pickle
        return False


def _official(state: StateDict, extra: Any, path: Path, dc5: bool | None, num_heads: int | None) -> Loaded:
    if is_masked(state):
        raise UserError(MASKED.format(path))
    named = from_official(state)
    if is_transformers(named) or rtdetr_keymaps.is_transformers(named):
        raise UserError(
            f"{path} has transformers' key names: give the folder that holds model.safetensors and config.json"
        )
    state = {k: v for k, v in named.items() if not is_counter(k)}
    report = [f"{path.name}: official key names, {len(state)} tensors"]
    if len(named) > len(state):
        report.append(f"left out: {len(named) - len(state)} batch counters, which frozen normalisation does not use")
    if extra:
        recipe, classes = weights.read_extra(extra, f"{path}: entry {_EXTRA}")
        report.append(f"class table and recipe: as kept in the file's entry {_EXTRA}")
    else:
        recipe = architecture.infer(state, path.stem, path, dc5=bool(dc5), num_heads=num_heads or 8)
        classes = assumed(len(state["class_embed.bias"]) - 1, coco_91(), "at their category ids (91 labels)", report)
        report += _assumed_lines(recipe, dc5, num_heads)
    weights.check_head(state, classes, path)
    meta = {"weights": "raw", "source": path.name, "format": "official"}
    return Loaded(state, recipe, classes, meta, path, report)


def _assumed_lines(recipe: recipes.Recipe, dc5: bool | None, num_heads: int | None) -> list[str]:
    model = recipe.model
    lines = [
        f"architecture: {model.backbone.name}, {model.num_encoder_layers} + {model.num_decoder_layers} layers, width "
        f"{model.hidden_dim}, {model.num_queries} queries"
    ]
    if dc5 is None:
        lines.append("dc5: the weights do not show it; taken as false (say dc5 if the last stage is dilated)")
    if num_heads is None:
        lines.append(f"num_heads: the weights do not show it; taken as {model.num_heads}")
    return lines


def _cut(loaded: Loaded) -> tuple[Loaded, str]:
    used = [i for i, name in enumerate(loaded.classes.names) if name is not None]
    state = loaded.state_dict | class_rows.pick(loaded.state_dict, used, len(loaded.classes))
    names = tuple(loaded.classes.names[i] for i in used)
    ids = tuple(loaded.classes.category_ids[i] for i in used)
    line = f"class head: cut from {len(loaded.classes)} labels to the {len(used)} that a category uses"
    return replace(loaded, state_dict=state, classes=Classes(names, ids)), line


def _write_ours(loaded: Loaded, path: Path) -> list[str]:
    weights.save(path, loaded.state_dict, recipes.dumps(loaded.recipe), loaded.classes, loaded.meta, loaded.split)
    if loaded.recipe.data.root == architecture.DATA_ROOT and "format" in loaded.meta:
        return [f"recipe.yaml: data.root is {architecture.DATA_ROOT}, a stand-in; the file knows no data set"]
    return []


def _write_official(loaded: Loaded, path: Path) -> list[str]:
    told = loaded.recipe.model
    if told.name == "rtdetr":
        content, lines = rtdetr_official.content(loaded)
        torch.save(content, path)
        return lines
    resnet = architecture.name_resnet(loaded.state_dict)
    if resnet is None or resnet.split(".")[0] != told.backbone.name.split(".")[0]:
        raise UserError(
            f"the official DETR has torchvision's ResNets only, not {told.backbone.name}: keep this detector in our "
            "format"
        )
    content = {"model": to_official(loaded.state_dict)}
    lines = _counter_lines(loaded)
    if loaded.recipe.data.square:
        lines.append("beware: this detector was trained on squares, and the original keeps an image's shape")
    if told.backbone.pixels == "unit":
        lines.append("beware: this detector's images are not normalised, the original's are: take that out there")
    if loaded.classes != coco_91() or told.backbone.dc5 or told.num_heads != 8:
        content[_EXTRA] = {"classes": loaded.classes.to_json(), "recipe": recipes.dumps(loaded.recipe)}
        lines.append(f"class table and recipe: kept in the entry {_EXTRA}, which the official code does not read")
    if told.backbone.dc5:
        lines.append("dc5: the official code must be told, with --dilation")
    torch.save(content, path)
    return lines


def _write_transformers(loaded: Loaded, path: Path) -> list[str]:
    if loaded.recipe.model.name == "rtdetr":
        return rtdetr_folder.write(loaded, path)
    transformers_folder.write(loaded, path)
    return _counter_lines(loaded)


def _counter_lines(loaded: Loaded) -> list[str]:
    counters = sum(is_counter(k) for k in loaded.state_dict)
    if not counters:
        return []
    return [f"left out: {counters} batch counters; there the normalisation is frozen with the statistics reached here"]


_DESCRIBED_BY = ("config.json", weights.RECIPE)
FORMATS = {"ours": _write_ours, "official": _write_official, "transformers": _write_transformers}
