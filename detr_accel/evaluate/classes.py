"""Which of the model's labels stands for which category of a data set: decided by name."""

from __future__ import annotations

from detr_accel.structures import Classes, UserError


def match_classes(model_classes: Classes, data_classes: Classes) -> tuple[dict[int, int], list[str]]:
    """The model's label -> the data set's category id, matched by name, upper and lower case alike.

    Labels without a counterpart are left out: their detections are dropped. When several categories of the data set
    share a name, the one written alike is taken, then the one with the label's own category id, then the first.

    Returns:
        The map, and the sentences that tell the person what was matched and what was not.
    Raises:
        UserError: not one name is shared.
    """
    by_name: dict[str, list[tuple[str, int]]] = {}
    for name, category in zip(data_classes.names, data_classes.category_ids, strict=True):
        if name is not None and category is not None:
            by_name.setdefault(_key(name), []).append((name, category))
    to_category: dict[int, int] = {}
    dropped: list[str] = []
    for label, (name, own) in enumerate(zip(model_classes.names, model_classes.category_ids, strict=True)):
        if name is None:
            continue
        alike = by_name.get(_key(name), [])
        candidates = [c for other, c in alike if other == name] or [c for _, c in alike]
        if candidates:
            to_category[label] = own if own in candidates else candidates[0]
        else:
            dropped.append(name)
    wanted = [pair for pairs in by_name.values() for pair in pairs]
    if not to_category:
        raise UserError(
            f"the model and the data set share no class name: the model knows {_some(dropped)}, the data set has "
            f"{_some([n for n, _ in wanted])}; give a data set with these names, train on this one, or write the right "
            "names into the model's classes.json (after detr-accel convert, where it has none)"
        )
    found = set(to_category.values())
    missed = [name for name, category in wanted if category not in found]
    report = [f"{len(found)} of the data set's {len(wanted)} classes matched by name"]
    if missed:
        report.append(f"in the data set but unknown to the model, so never found: {_some(missed)}")
    if dropped:
        report.append(f"known to the model but not in the data set, so dropped: {_some(dropped)}")
    return to_category, report


def _key(name: str) -> str:
    return " ".join(name.casefold().split())


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
