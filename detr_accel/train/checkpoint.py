"""Checkpoints: one folder each, whole or not there at all, with nothing in it that could run code when read.

checkpoints/window-00000123/
    model.safetensors      the weights to use: the average if there is one
    raw.safetensors        the trained weights, if an average is kept
    optimizer.safetensors  AdamW's moments, by parameter name
    state.json             counters, schedule position, best value, W&B id
    recipe.yaml classes.json meta.json   what ``detr-accel predict`` needs beside the weights
    split.json             image ids of both splits, where one json was cut in two
    manifest.json          sha256 and size of every file above; written last
checkpoints/last, checkpoints/best       links to the newest and to the best one
checkpoints/damaged-window-00000123      one that was found damaged on resume; safe to delete
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from detr_accel.models import weights
from detr_accel.monitor.alarms import Memory
from detr_accel.structures import UserError
from detr_accel.train.ema import Ema
from detr_accel.train.health import HealthState
from detr_accel.train.patience import Waiting

MANIFEST = "manifest.json"


@dataclass
class State:
    """What a run needs beside its weights to go on as if it had never stopped."""

    window: int = 0
    step: int = 0
    best: float | None = None
    best_window: int | None = None
    threshold: float | None = None
    metrics: dict[str, float] | None = None
    wandb_run_id: str | None = None
    scaler: dict[str, Any] | None = None
    layout: dict[str, Any] | None = None
    fingerprint: str | None = None
    judged_by: list[Any] | None = None  # the validation data's fingerprint, and how many detections count
    evaluated_window: int | None = None  # where metrics and threshold come from: a later evaluation may be owed
    micro: int | None = None  # images per forward in force: what auto chose, or what running out of memory left
    checkpointed: list[str] = field(default_factory=list)  # parts that are computed again in backward
    anchor: str | None = None  # the folder that a rollback goes back to: the last checkpoint that came by counting
    returned_window: int | None = None  # where the weights last became those of the best evaluation
    parent: str | None = None  # the checkpoint that this run branched off
    health: HealthState = field(default_factory=HealthState)
    early_stop: Waiting = field(default_factory=Waiting)
    plateau: Waiting = field(default_factory=Waiting)
    alarms: Memory = field(default_factory=Memory)
    dropped: int = 0  # images whose places in their windows were left empty
    blank_windows: int = 0  # in a row, that had no image at all

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> State:
        kinds = {"health": HealthState, "early_stop": Waiting, "plateau": Waiting, "alarms": Memory}
        return cls(**{**row, **{name: kind(**row.get(name, {})) for name, kind in kinds.items()}})


def save(
    folder: Path,
    *,
    state: State,
    model: nn.Module,
    ema: Ema | None,
    optimizer: torch.optim.Optimizer,
    files: dict[str, str],
    is_best: bool,
    keep: int = 2,
) -> Path:
    """Write a checkpoint under ``folder`` (checkpoints/) and point ``last`` (and ``best``) at it.

    Args:
        model: the bare model; keys carry no wrapper's prefix.
        files: further text files by name (recipe.yaml, classes.json, meta.json).
        keep: how many of the newest stay, the best one aside.
    Raises:
        UserError: the disk is full or the folder cannot be written; the older checkpoints stay as they are.
    """
    name = folder_name(state.window)
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        check_space(folder, num_bytes(model, ema))
        temporary.mkdir()
        _write_weights(temporary, model, ema, optimizer)
        for file_name, text in {**files, "state.json": json.dumps(asdict(state), indent=1)}.items():
            (temporary / file_name).write_text(text, encoding="utf-8")
        manifest = {p.name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for p in sorted(temporary.iterdir())}
        for p in temporary.iterdir():
            _fsync(p)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _fsync(temporary / MANIFEST)
        _fsync(temporary)
        final, old = folder / name, folder / f".old-{name}"
        if final.exists():
            os.replace(final, old)
        os.replace(temporary, final)
        _fsync(folder)
        shutil.rmtree(old, ignore_errors=True)
        _link(folder / "last", name)
        if is_best:
            _link(folder / "best", name)
    except (OSError, SafetensorError) as error:  # safetensors' own error hides the system's: it writes in Rust
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"checkpoint {folder / name} could not be written: {reason}; the one before it is whole: free space or "
            "move the run with --runs, then go on with --resume"
        ) from error
    _prune(folder, keep, state)
    return final


def folder_name(window: int) -> str:
    return f"window-{window:08d}"


def num_bytes(model: nn.Module, ema: Ema | None) -> int:
    """What one checkpoint takes on disk: weights, their average, and AdamW's two moments of what trains."""
    one = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return one * (1 if ema is None else 2) + moments + 2**20


def check_space(folder: Path, needed_bytes: int) -> None:
    """
    Raises:
        UserError: less is free than the next checkpoint takes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"a checkpoint takes {needed_bytes / 2**20:,.0f} MiB and {folder} has {free / 2**20:,.0f} MiB free: free "
            "space there, lower checkpoint.keep, or move the run with --runs"
        )


def load_last(folder: Path, mend: bool = True) -> tuple[Path, list[str]]:
    """The newest whole checkpoint. Newer ones that are damaged are set aside, and the links mended.

    Args:
        mend: False passes over damaged ones and changes nothing: the run may still be training.
    Returns:
        its folder, and one sentence for every damaged one.
    Raises:
        UserError: there is none.
    """
    notes = []
    # killed between the two renames of one that was written again
    for old in folder.glob(".old-window-*") if mend else ():
        final = folder / old.name.removeprefix(".old-")
        shutil.rmtree(old) if final.exists() else os.replace(old, final)
    for path in sorted(folder.glob("window-*"), reverse=True):
        fault = damage(path)
        if fault is None:
            if mend:
                _mend_links(folder, path.name)
            return path, notes
        if not mend:
            notes.append(f"checkpoint {path.name} is passed over: {fault}")
            continue
        aside = path.with_name(f"damaged-{path.name}")
        notes.append(f"checkpoint {path.name} is passed over and set aside as {aside.name}: {fault}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    remedy = "start without --resume" if not notes else "start under another name (name=...), or copy one back"
    raise UserError(". ".join([f"no whole checkpoint in {folder} to resume from; {remedy}", *notes]))


def _mend_links(folder: Path, newest: str) -> None:
    """``last`` shows the newest whole one, and ``best`` what that one remembers as the best: a kill may have come
    between the checkpoint and its links, and the best may have been set aside."""
    _link(folder / "last", newest)
    best = folder / "best"
    window = json.loads((folder / newest / "state.json").read_text(encoding="utf-8")).get("best_window")
    if window is not None and (folder / folder_name(window)).is_dir():
        _link(best, folder_name(window))
    elif best.is_symlink() and not best.exists():
        best.unlink()


def best_there(folder: Path) -> tuple[float | None, int | None]:
    """Value and window of the checkpoint that ``best`` shows; None, None where it shows none."""
    try:
        told = json.loads((folder / "best" / "state.json").read_text(encoding="utf-8"))
        return told["best"], told["best_window"]
    except (OSError, ValueError, KeyError):
        return None, None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file is as its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not {"model.safetensors", "state.json"} <= manifest.keys():
            raise ValueError
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable (it was never finished)"
    return next((fault for name, row in manifest.items() if (fault := weights.file_fault(path / name, row))), None)


def load(path: Path, *, model: nn.Module, ema: Ema | None, optimizer: torch.optim.Optimizer) -> State:
    """Put a checkpoint back into the live objects, on whatever device they are.

    Raises:
        UserError: the checkpoint belongs to another model or optimizer; the keys that differ are named.
    """
    state = State.from_json(json.loads((path / "state.json").read_text(encoding="utf-8")))
    average = load_file(path / "model.safetensors")
    raw = load_file(path / "raw.safetensors") if (path / "raw.safetensors").exists() else average
    _load_weights(model, raw, path)
    if ema is not None:
        _load_weights(ema.module, average, path)
        ema.updates = state.step
    _load_optimizer(optimizer, model, load_file(path / "optimizer.safetensors"), path)
    return state


def _write_weights(folder: Path, model: nn.Module, ema: Ema | None, optimizer: torch.optim.Optimizer) -> None:
    raw = _plain(model.state_dict())
    save_file(raw if ema is None else _plain(ema.module.state_dict()), folder / "model.safetensors")
    if ema is not None:
        save_file(raw, folder / "raw.safetensors")
    names = {p: n for n, p in model.named_parameters()}
    moments = {
        f"{names[p]}/{key}": value
        for p, rows in optimizer.state.items()
        for key, value in rows.items()
        if torch.is_tensor(value)
    }
    save_file(_plain(moments), folder / "optimizer.safetensors")


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # clones: safetensors refuses tensors that share memory, and stores channels-last ones only when contiguous
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint {path} holds another model than the recipe builds: {detail}") from None


def _load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor], path: Path
) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        if name not in parameters:
            raise UserError(f"checkpoint {path} has optimizer state of {name}, which the model does not have")
        p = parameters[name]
        # AdamW keeps its step counter on the host unless it is fused
        value = value if field == "step" and not optimizer.defaults.get("fused") else value.to(p.device)
        optimizer.state[p][field] = value.clone(memory_format=torch.preserve_format)
        if value.shape == p.shape and value.dim() == 4:
            optimizer.state[p][field] = torch.empty_like(p).copy_(value)


def _prune(folder: Path, keep: int, state: State) -> None:
    whole = sorted(folder.glob("window-*"), reverse=True)
    spared = (
        {p.name for p in whole[:keep]}
        | {state.anchor, None if state.best_window is None else folder_name(state.best_window)}
        | {os.readlink(link) for link in (folder / "last", folder / "best") if link.is_symlink()}
    )
    for path in whole:
        if path.name not in spared:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".window-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _link(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, link)
    _fsync(link.parent)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
