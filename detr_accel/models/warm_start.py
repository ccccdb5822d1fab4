"""Start a model from another detector's weights. Whatever does not carry over is told, or refused; nothing is dropped
in silence.

Legend: Q queries, C classes, D hidden_dim.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from detr_accel.models.architecture import count_layers
from detr_accel.models.keymaps import StateDict, is_counter
from detr_accel.models.weights import Loaded
from detr_accel.structures import Classes, UserError

_HEAD = ("class_embed.weight", "class_embed.bias")
_QUERIES = "query_embed.weight"


def warm_start(model: nn.Module, classes: Classes, loaded: Loaded, head: str) -> list[str]:
    """Copy a detector's weights into a model, in place.

    Args:
        model: freshly made; what the source does not have keeps its fresh values.
        classes: of the data set that the model is for, C labels.
        loaded: the source.
        head: ``match``, ``keep`` or ``reset``, see ``recipe.Model.init_head``.
    Returns:
        lines to print: what was and what was not copied.
    Raises:
        UserError: the source is another architecture; the model is left as it was.
    """
    own, source = model.state_dict(), loaded.state_dict
    _check_sizes(model, own, loaded)
    lines: list[str] = []
    own_rest, source_rest = set(own), set(source)
    new: StateDict = {}
    _drop_layers(own, source, own_rest, source_rest, lines)
    _drop_counters(own_rest, source_rest, lines)
    new[_QUERIES] = _copy_queries(own[_QUERIES], source[_QUERIES], lines)
    new |= _copy_head(own, source, classes, loaded.classes, head, lines)
    own_rest -= new.keys()
    source_rest -= new.keys()
    _check_rest(own, source, own_rest, source_rest, loaded)
    new |= {k: source[k] for k in own_rest}
    model.load_state_dict({**own, **new})
    lines.insert(0, f"initialised from {loaded.folder}: {len(own_rest)} of {len(own)} tensors copied as they are")
    return lines


def _check_sizes(model: nn.Module, own: StateDict, loaded: Loaded) -> None:
    source, told = loaded.state_dict, loaded.recipe.model
    for key in (_QUERIES, *_HEAD):
        if key not in source:
            raise UserError(f"{loaded.folder} has no {key}: it is not a DETR to start from")
    ours, theirs = own[_QUERIES].shape[1], source[_QUERIES].shape[1]
    if ours != theirs:
        raise UserError(
            f"model.hidden_dim is {ours}, but {theirs} in {loaded.folder}: set model.hidden_dim={theirs}"
        )
    heads = next((m.num_heads for m in model.transformer.modules() if hasattr(m, "num_heads")), told.num_heads)
    if heads != told.num_heads:
        raise UserError(
            f"model.num_heads is {heads}, but {loaded.folder} was trained with {told.num_heads}: the shapes agree and "
            f"the meaning does not; set model.num_heads={told.num_heads}"
        )


def _drop_layers(own: StateDict, source: StateDict, own_rest: set, source_rest: set, lines: list[str]) -> None:
    for stack in ("encoder", "decoder"):
        prefix = f"transformer.{stack}.layers."
        ours, theirs = count_layers(own, prefix), count_layers(source, prefix)
        least = min(ours, theirs)
        for rest in (own_rest, source_rest):
            rest -= {k for k in rest if k.startswith(prefix) and int(k.removeprefix(prefix).split(".")[0]) >= least}
        if theirs > ours:
            lines.append(f"{stack}: the source's last {theirs - ours} of {theirs} layers left out")
        elif ours > theirs:
            lines.append(f"{stack}: the last {ours - theirs} of {ours} layers start fresh")


def _drop_counters(own_rest: set, source_rest: set, lines: list[str]) -> None:
    fresh = {k for k in own_rest - source_rest if is_counter(k)}
    extra = {k for k in source_rest - own_rest if is_counter(k)}
    own_rest -= fresh
    source_rest -= extra
    if fresh:
        lines.append(f"normalisation: {len(fresh)} batch counters start at 0 (the source's normalisation was frozen)")
    if extra:
        lines.append(f"normalisation: {len(extra)} batch counters left out (the model's normalisation is frozen)")


def _copy_queries(own: torch.Tensor, source: torch.Tensor, lines: list[str]) -> torch.Tensor:
    n = min(len(own), len(source))
    new = own.clone()  # [Q, D]
    new[:n] = source[:n].to(own)
    if len(own) > n:
        lines.append(f"queries: {n} of {len(own)} copied, the other {len(own) - n} start fresh")
    elif len(source) > n:
        lines.append(f"queries: the first {n} of the source's {len(source)} copied")
    return new


def _copy_head(
    own: StateDict, source: StateDict, ours: Classes, theirs: Classes, rule: str, lines: list[str]
) -> StateDict:
    if rule == "reset":
        lines.append(f"class head: starts fresh ({len(ours)} classes and no-object), as model.init_head: reset asks")
        return {k: own[k] for k in _HEAD}
    if rule == "keep":
        _check_equal_tables(ours, theirs)
        lines.append(f"class head: copied whole ({len(ours)} classes and no-object)")
        return {k: source[k] for k in _HEAD}
    if rule != "match":
        raise UserError(f"model.init_head: {rule!r} is not one of match, keep, reset")
    rows = match_rows(ours, theirs)
    targets = [*rows, len(ours)]  # the no-object row is the last in both
    sources = [*rows.values(), len(theirs)]
    new = {k: own[k].clone() for k in _HEAD}  # [C + 1, D], [C + 1]
    for key in _HEAD:
        new[key][targets] = source[key][sources].to(own[key])
    fresh = [name for i, name in enumerate(ours.names) if i not in rows and name is not None]
    copied = [ours.names[i] for i in rows]
    lines.append(f"class head: no-object and {len(copied)} of {len(ours)} class rows copied by name{_listing(copied)}")
    if fresh:
        lines.append(f"class head: {len(fresh)} class rows start fresh{_listing(fresh)}")
    return new


def match_rows(ours: Classes, theirs: Classes) -> dict[int, int]:
    """Our label -> their label of the same name; case, underscores and outer spaces aside."""
    place: dict[str, int] = {}
    for i, name in enumerate(theirs.names):
        if name is not None:
            place.setdefault(plain(name), i)
    return {i: place[plain(name)] for i, name in enumerate(ours.names) if name is not None and plain(name) in place}


def plain(name: str) -> str:
    """A class name as it is compared: lower case, underscores as spaces."""
    return " ".join(name.replace("_", " ").lower().split())


def _check_equal_tables(ours: Classes, theirs: Classes) -> None:
    mine = [None if n is None else plain(n) for n in ours.names]
    yours = [None if n is None else plain(n) for n in theirs.names]
    if mine == yours:
        return
    if len(mine) != len(yours):
        what = f"the data set has {len(mine)} labels and the source {len(yours)}"
    else:
        i = next(i for i, (a, b) in enumerate(zip(mine, yours, strict=True)) if a != b)
        what = f"label {i} is {ours.names[i]!r} in the data set and {theirs.names[i]!r} in the source"
    raise UserError(f"model.init_head is keep, which needs equal class tables, but {what}: use init_head: match")


def _check_rest(own: StateDict, source: StateDict, own_rest: set, source_rest: set, loaded: Loaded) -> None:
    faults = [f"{k} is not in the source" for k in sorted(own_rest - source_rest)]
    faults += [f"the source's {k} is not in the model" for k in sorted(source_rest - own_rest)]
    wrong = sorted(k for k in own_rest & source_rest if own[k].shape != source[k].shape)
    faults += [f"{k} is {list(own[k].shape)} in the model and {list(source[k].shape)} in the source" for k in wrong]
    if not faults:
        return
    told = loaded.recipe.model
    hint = f"it has model.dim_feedforward={told.dim_feedforward}"
    if any("backbone." in fault for fault in faults):
        hint = f"its backbone is model.backbone.name={told.backbone.name}"
    more = f" (and {len(faults) - 2} more)" if len(faults) > 2 else ""
    raise UserError(f"{loaded.folder} does not fit this model ({hint}): {'; '.join(faults[:2])}{more}")


def _listing(names: Iterable[str | None], most: int = 20) -> str:
    names = [str(n) for n in names]
    if not names:
        return ""
    return ": " + ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
