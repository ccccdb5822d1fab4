"""Is a run that was killed and resumed the run that was never killed? And are W&B's offline rows there?"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from detr_accel.monitor import jsonl
from detr_accel.train.rehearsal_process import Trouble

NEAR = 0.02  # on a GPU without deterministic kernels: by how much the first loss after the resume may differ
_REMEDY = "a resume would not be the same run: please report it with the folder of the rehearsal"


def compare(whole: Path, resumed: Path, window: int, *, exact: bool, loss: float) -> tuple[str, list[str]]:
    """
    Args:
        whole, resumed: run folders.
        window: of the checkpoint that it was resumed from.
        loss: of the window after it, as the killed run itself had it.
        exact: whether the two must be equal bit for bit: on a CPU, or with deterministic kernels.
    Returns:
        what was seen, and warnings.
    Raises:
        Trouble: it is another run.
    """
    differing, tensors, largest = _weights(whole, resumed)
    same_rows = (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    if not differing and same_rows:
        rows = len(jsonl.read(whole / "metrics.jsonl"))
        return f"bit for bit the run that was not killed: {tensors} tensors, {rows} rows of metrics.jsonl", []
    if exact and differing:
        raise Trouble(
            "resume", f"{len(differing)} of {tensors} tensors differ from the run that was not killed, the first "
            f"{differing[0]} (by {largest:.3g} at most)", _REMEDY,
        )  # fmt: skip
    if exact:
        text = f"metrics.jsonl differs from that of the run that was not killed: {_row(whole, resumed)}"
        raise Trouble("resume", text, _REMEDY)
    again = next_loss(resumed, window)
    apart = abs(loss - again) / max(abs(loss), 1e-9)
    if apart > NEAR:
        raise Trouble(
            "resume", f"the first loss after the resume (window {window + 1}) differs by {apart:.1%} from what it was "
            "before the kill", _REMEDY,
        )  # fmt: skip
    return (
        f"not bit for bit (kernels of this device are not deterministic): the first loss after the resume differs by "
        f"{apart:.2g} of itself, weights and moments by {largest:.2g} at the end; deterministic: true makes them equal",
        [],
    )


def _weights(whole: Path, resumed: Path) -> tuple[list[str], int, float]:
    """Names of the tensors that differ, how many there are, and the largest difference."""
    differing, number, largest = [], 0, 0.0
    for file in sorted((whole / "checkpoints" / "last").glob("*.safetensors")):
        one, other = load_file(file), load_file(resumed / "checkpoints" / "last" / file.name)
        number += len(one)
        for name in sorted(one.keys() | other.keys()):
            if name not in one or name not in other:
                differing.append(f"{file.stem}/{name} (missing)")
            elif not torch.equal(one[name], other[name]):
                differing.append(f"{file.stem}/{name}")
                largest = max(largest, (one[name].double() - other[name].double()).abs().max().item())
    return differing, number, largest


def _row(whole: Path, resumed: Path) -> str:
    one, other = (jsonl.read(run / "metrics.jsonl") for run in (whole, resumed))
    if len(one) != len(other):
        return f"{len(one)} rows and {len(other)}"
    row, twin = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
    key = next(k for k in row if row.get(k) != twin.get(k))
    return f"window {row['window']}, {key}: {row.get(key)} and {twin.get(key)}"


def next_loss(run: Path, window: int) -> float:
    """Of the first window after a checkpoint."""
    rows = jsonl.read(run / "metrics.jsonl")
    return next(r["train/loss"] for r in rows if r["window"] > window and "train/loss" in r)


_BLOCK, _HEADER = 32768, 7  # LevelDB's log format; the file's own header of 7 bytes counts in the first block
_FULL, _FIRST, _LAST = 1, 2, 4


def offline_rows(run: Path) -> int:
    """How many rows were logged into the offline W&B files below a run folder, as a reader of them finds them."""
    files = run.glob("wandb/offline-run-*/run-*.wandb")
    return sum(record.WhichOneof("record_type") == "history" for path in files for record in offline_records(path))


def offline_records(path: Path) -> Iterator[Any]:
    """All records of one offline W&B file."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, part, at = path.read_bytes(), b"", _HEADER
    while at + _HEADER <= len(raw):
        if _BLOCK - at % _BLOCK < _HEADER:  # a header is never split: the rest of the block is padding
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + _HEADER])
        part = (b"" if kind in (_FULL, _FIRST) else part) + raw[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(part)
