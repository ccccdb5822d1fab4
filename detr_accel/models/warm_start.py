"""Start a model from another detector's weights. Whatever does not carry over is told, or refused; nothing is dropped
in silence.

Legend: Q queries, C classes, D hidden_dim.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from detr_accel.models.architecture import count_layers
from detr_accel.models.class_rows import class_entries
from detr_accel.models.keymaps import StateDict, is_counter
from detr_accel.models.weights import Loaded
from detr_accel.structures import Classes, UserError

_QUERIES = ("query_embed.weight", "decoder.tgt_embed.weight")  # DETR's, and RT-DETR's where it learns them
_DISTURBED = "decoder.denoising_class_embed.weight"
_STACKS = {  # detector -> stack -> where its layers are numbered: the layers themselves first, then what goes with them
    "detr": {"encoder": ("transformer.encoder.layers.",), "decoder": ("transformer.decoder.layers.",)},
    "rtdetr": {
        "encoder": ("encoder.encoder.0.layers.",),
        "decoder": ("decoder.decoder.layers.", "decoder.dec_score_head.", "decoder.dec_bbox_head."),
    },
}
_BEHIND = {"detr": " and no-object", "rtdetr": ""}  # what the head says beside the classes


def warm_start(
    model: nn.Module, classes: Classes, loaded: Loaded, head: str, differing: Sequence[str] = ()
) -> list[str]:
    """Copy a detector's weights into a model, in place.

    Args:
        model: freshly made; what the source does not have keeps its fresh values.
        classes: of the data set that the model is for, C labels.
        loaded: the source.
        head: ``match``, ``keep`` or ``reset``, see ``recipe.Model.init_head``.
        differing: settings that would make the model the source's, so that a refusal can name them all at once.
    Returns:
        lines to print: what was and what was not copied.
    Raises:
        UserError: the source is another architecture; the model is left as it was.
    """
    own, source = model.state_dict(), loaded.state_dict
    kind = _kind(own)
    with _telling_all(differing):
        _check_meaning(model, own, kind, loaded)
    lines: list[str] = []
    own_rest, source_rest = set(own), set(source)
    _drop_layers(_STACKS[kind], own, source, own_rest, source_rest, lines)
    _drop_counters(own_rest, source_rest, lines)
    new = _copy_queries(own, source, own_rest, source_rest, lines)
    _drop_denoising(own_rest, source_rest, lines)
    heads = set(class_entries(own_rest & source_rest))
    new |= _copy_head(heads, own, source, classes, loaded.classes, head, _BEHIND[kind], lines)
    own_rest -= new.keys()
    source_rest -= new.keys()
    with _telling_all(differing):
        _check_rest(own, source, own_rest, source_rest, loaded)
    new |= {k: source[k] for k in own_rest}
    model.load_state_dict({**own, **new})
    lines.insert(0, f"initialised from {loaded.folder}: {len(own_rest)} of {len(own)} tensors copied as they are")
    return lines


@contextmanager
def _telling_all(differing: Sequence[str]) -> Iterator[None]:
    """Add every setting that differs to a refusal that names one of them."""
    try:
        yield
    except UserError as error:
        if len(differing) < 2:
            raise
        raise UserError(f"{error}. All that differs: {' '.join(differing)}") from None


def _kind(state: Iterable[str]) -> str:
    return "detr" if "class_embed.bias" in state else "rtdetr"


def _check_meaning(model: nn.Module, own: StateDict, kind: str, loaded: Loaded) -> None:
    """Refuse what no shape would betray, and say in words what a shape says in numbers."""
    source, told = loaded.state_dict, loaded.recipe.model
    needed = {"detr": ("query_embed.weight", "class_embed.weight"), "rtdetr": ("decoder.enc_score_head.weight",)}
    if told.name != kind:
        raise UserError(
            f"model.name is {kind}, but {loaded.folder} holds a {told.name}, whose weights mean other things: set "
            f"model.name={told.name}, or start from a {kind}"
        )
    for key in needed[told.name]:
        if key not in source:
            raise UserError(f"{loaded.folder} has no {key}: it is not a {kind} to start from")
    key = needed[kind][0]
    ours, theirs = own[key].shape[1], source[key].shape[1]
    if ours != theirs:
        raise UserError(f"model.hidden_dim is {ours}, but {theirs} in {loaded.folder}: set model.hidden_dim={theirs}")
    heads = next((m.num_heads for m in _attentions(model)), told.num_heads)
    _same("num_heads", heads, told.num_heads, loaded)
    if kind == "rtdetr":
        shape = model.decoder.shape
        for name in ("activation", "mlp_activation"):
            _same(f"rtdetr.{name}", getattr(shape, name), getattr(told.rtdetr, name), loaded)
        _same("rtdetr.num_points", list(shape.num_points), list(told.rtdetr.num_points), loaded)
    theirs = (0.0,) * 3 if told.backbone.pixels == "unit" else tuple(model.backbone.body.pretrained_cfg["mean"])
    if tuple(model.mean) != theirs:
        pixels = "timm" if told.backbone.pixels == "unit" else "unit"
        _same("backbone.pixels", pixels, told.backbone.pixels, loaded)


def _attentions(model: nn.Module) -> Iterable[nn.Module]:
    parts = (part for name, part in model.parts.items() if name != "backbone")
    return (m for part in parts for m in part.modules() if hasattr(m, "num_heads"))


def _same(key: str, ours: object, theirs: object, loaded: Loaded) -> None:
    if ours != theirs:
        raise UserError(
            f"model.{key} is {ours}, but {loaded.folder} was trained with {theirs}: the shapes agree and the meaning "
            f"does not; set model.{key}={theirs}"
        )


def _drop_layers(
    stacks: dict[str, tuple[str, ...]], own: StateDict, source: StateDict, own_rest: set, source_rest: set,
    lines: list[str],
) -> None:  # fmt: skip
    for stack, prefixes in stacks.items():
        ours, theirs = count_layers(own, prefixes[0]), count_layers(source, prefixes[0])
        least = min(ours, theirs)
        numbered = re.compile(f"({'|'.join(map(re.escape, prefixes))})(\\d+)\\.")
        for rest in (own_rest, source_rest):
            rest -= {k for k in rest if (match := numbered.match(k)) and int(match[2]) >= least}
        if theirs > ours:
            lines.append(f"{stack}: the source's last {theirs - ours} of {theirs} layers left out")
        elif ours > theirs:
            last = f", among them the one that answers; model.num_{stack}_layers={theirs} takes the source's alone"
            told = last * (stack == "decoder")
            lines.append(f"{stack}: the last {ours - theirs} of {ours} layers start fresh{told}")


def _drop_counters(own_rest: set, source_rest: set, lines: list[str]) -> None:
    fresh = {k for k in own_rest - source_rest if is_counter(k)}
    extra = {k for k in source_rest - own_rest if is_counter(k)}
    own_rest -= fresh
    source_rest -= extra
    if fresh:
        lines.append(f"normalisation: {len(fresh)} batch counters start at 0 (the source's normalisation was frozen)")
    if extra:
        lines.append(f"normalisation: {len(extra)} batch counters left out (the model's normalisation is frozen)")


def _copy_queries(own: StateDict, source: StateDict, own_rest: set, source_rest: set, lines: list[str]) -> StateDict:
    """Learned queries as far as both have them. RT-DETR's others come from the image, in any number."""
    key = next((k for k in _QUERIES if k in own_rest | source_rest), None)
    if key is None:
        return {}
    if key not in own or key not in source:
        (own_rest if key in own else source_rest).remove(key)
        lines.append("queries: start fresh (the source has none)" if key in own else "queries: the source's left out")
        return {}
    ours, theirs = own[key], source[key]
    n = min(len(ours), len(theirs))
    new = ours.clone()  # [Q, D]
    new[:n] = theirs[:n].to(ours)
    if len(ours) > n:
        lines.append(f"queries: {n} of {len(ours)} copied, the other {len(ours) - n} start fresh")
    elif len(theirs) > n:
        lines.append(f"queries: the first {n} of the source's {len(theirs)} copied")
    return {key: new}


def _drop_denoising(own_rest: set, source_rest: set, lines: list[str]) -> None:
    if (_DISTURBED in own_rest) == (_DISTURBED in source_rest):
        return
    if _DISTURBED in own_rest:
        lines.append("denoising: the embeddings of labels start fresh (the source has none)")
    else:
        lines.append("denoising: the source's embeddings of labels left out (model.rtdetr.num_denoising is 0)")
    own_rest.discard(_DISTURBED)
    source_rest.discard(_DISTURBED)


def _copy_head(
    keys: set[str], own: StateDict, source: StateDict, ours: Classes, theirs: Classes, rule: str, behind: str,
    lines: list[str],
) -> StateDict:  # fmt: skip
    """keys: the entries with a row for each class, [C + rows behind, D] or [C + rows behind]."""
    if rule == "reset":
        lines.append(f"class head: starts fresh ({len(ours)} classes{behind}), as model.init_head: reset asks")
        return {k: own[k] for k in keys}
    if rule == "keep":
        _check_equal_tables(ours, theirs)
        lines.append(f"class head: copied whole ({len(ours)} classes{behind})")
        return {k: source[k] for k in keys}
    if rule != "match":
        raise UserError(f"model.init_head: {rule!r} is not one of match, keep, reset")
    rows = match_rows(ours, theirs)
    new = {k: own[k].clone() for k in keys}
    for key, more in class_entries(keys).items():
        targets = [*rows, *range(len(ours), len(ours) + more)]  # what stands behind the classes is the last in both
        sources = [*rows.values(), *range(len(theirs), len(theirs) + more)]
        new[key][targets] = source[key][sources].to(own[key])
    fresh = [name for i, name in enumerate(ours.names) if i not in rows and name is not None]
    copied = [ours.names[i] for i in rows]
    also = "no-object and " if behind else ""
    lines.append(f"class head: {also}{len(copied)} of {len(ours)} class rows copied by name{_listing(copied)}")
    if fresh:
        lines.append(f"class head: {len(fresh)} class rows start fresh{_listing(fresh)}")
    return new


def match_rows(ours: Classes, theirs: Classes) -> dict[int, int]:
    """Our label -> their label of the same name: as written, or else case, underscores and outer spaces aside."""
    place: dict[str, int] = {}
    for key in (str, plain):
        for i, name in enumerate(theirs.names):
            if name is not None:
                place.setdefault(key(name), i)
    found = {}
    for i, name in enumerate(ours.names):
        if name is not None and (there := place.get(name, place.get(plain(name)))) is not None:
            found[i] = there
    return found


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
    raise UserError(f"model.init_head is keep, which needs equal class tables, but {what}: {_remedy(theirs)}")


def _remedy(theirs: Classes) -> str:
    if all(name == f"category {i}" for i, name in enumerate(theirs.names)):  # ``coco_classes.assumed``
        return (
            "the source has no names, so convert it (detr-accel convert), write the names into the new classes.json, "
            "and start from that"
        )
    return "use init_head: match"


def _check_rest(own: StateDict, source: StateDict, own_rest: set, source_rest: set, loaded: Loaded) -> None:
    faults = [f"{k} is not in the source" for k in sorted(own_rest - source_rest)]
    faults += [f"the source's {k} is not in the model" for k in sorted(source_rest - own_rest)]
    wrong = sorted(k for k in own_rest & source_rest if own[k].shape != source[k].shape)
    faults += [f"{k} is {list(own[k].shape)} in the model and {list(source[k].shape)} in the source" for k in wrong]
    if not faults:
        return
    more = f" (and {len(faults) - 2} more)" if len(faults) > 2 else ""
    hint = _hint(faults, loaded)
    raise UserError(f"{loaded.folder} does not fit this model ({hint}): {'; '.join(faults[:2])}{more}")


def _hint(faults: list[str], loaded: Loaded) -> str:
    """The recipe's keys that would make the model the source's."""
    told = loaded.recipe.model
    if any("backbone." in fault for fault in faults):
        also = " with first_shortcut=true" if told.backbone.first_shortcut else ""
        return f"its backbone is model.backbone.name={told.backbone.name}{also}"
    if told.name == "detr":
        return f"it has model.dim_feedforward={told.dim_feedforward}"
    r = told.rtdetr
    if any(" encoder." in f" {fault}" or "decoder.input_proj" in fault for fault in faults):
        return (
            f"it has model.rtdetr.encoder_dim={r.encoder_dim}, encoder_feedforward={r.encoder_feedforward}, "
            f"expansion={r.expansion}, num_blocks={r.num_blocks}"
        )
    return (
        f"it has model.dim_feedforward={told.dim_feedforward} and model.rtdetr.query_pos_layers={r.query_pos_layers}"
    )


def _listing(names: Iterable[str | None], most: int = 20) -> str:
    names = [str(n) for n in names]
    if not names:
        return ""
    return ": " + ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
