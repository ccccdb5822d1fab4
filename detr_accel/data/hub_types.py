"""What a column of a Hugging Face data set may hold, by its type: said before a row of it is read.

Lists of any kind (large, of fixed length), integers, floats and decimals of any width, numbers and names as text, and
dictionary-encoded values are read; what cannot be a box, a class or an image is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detr_accel.structures import UserError

_NUMBERS, _TEXT = ("int", "uint", "float", "double", "decimal"), ("string", "large_string")


def inner(kind: Any) -> Any:
    """What a list holds; None for anything else."""
    if isinstance(kind, list):
        return kind[0]
    return getattr(kind, "feature", None)


def told(kind: Any) -> str:
    """A type in words: ``lists of float64``."""
    if isinstance(kind, Mapping):
        return f"structs ({', '.join(list(kind)[:6])})"
    of = inner(kind)
    if of is not None:
        length = getattr(kind, "length", -1)
        return f"lists of {f'{length} ' if length >= 0 else ''}{told(of)}"
    dtype = getattr(kind, "dtype", None)
    if hasattr(kind, "shape"):
        return f"arrays of {dtype}"
    return "nothing but null" if dtype == "null" else str(dtype or type(kind).__name__)


def is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in _TEXT


def is_number(kind: Any) -> bool:
    return str(getattr(kind, "dtype", None)).startswith(_NUMBERS) and not hasattr(kind, "shape")


def refuse_list(kind: Any, name: str, what: str, where: str) -> None:
    """
    Args:
        kind: of a field that was found by its name and is no list.
        what: ``box`` or ``category``.
    Raises:
        UserError: always.
    """
    raise UserError(
        f"{where}: {name!r} holds {told(kind)}, where each image needs a list with one {what} per object: write it so, "
        f"or set data.hub.{what} to what is"
    )


def check_box(kind: Any, name: str, where: str) -> None:
    """
    Raises:
        UserError: what stands for one object is no list of four numbers.
    """
    of = inner(kind)
    if not (is_number(of) or is_text(of)) or getattr(kind, "length", -1) not in (-1, 4):
        raise UserError(
            f"{where}: {name!r} does not hold lists of four numbers, but {told(kind)} for each object: write the boxes "
            "so, or set data.hub.box to what does"
        )


def check_category(kind: Any, name: str, where: str) -> None:
    """
    Raises:
        UserError: what stands for one object is neither a name nor a number.
    """
    if not (is_number(kind) or is_text(kind) or getattr(kind, "dtype", None) == "bool"):
        raise UserError(
            f"{where}: {name!r} holds {told(kind)} for each object, which is neither the name of a class nor its "
            "number: write one of them, or set data.hub.category to what is"
        )


def check_image(kind: Any, name: str, where: str) -> None:
    """
    Raises:
        UserError: no image can be in this column.
    """
    import datasets

    if isinstance(kind, Mapping):
        data, path = kind.get("bytes"), kind.get("path")
        empty = data is None or getattr(data, "dtype", None) == "null"  # so written where every row has a path alone
        fits = _is_bytes(data) or (empty and is_text(path))
    else:
        fits = isinstance(kind, datasets.Image) or is_text(kind) or _is_bytes(kind)
    if not fits:
        raise UserError(
            f"{where}: {name!r} holds {told(kind)}, and neither images, their bytes, nor paths of files: set "
            "data.hub.image to the column that does, or write the images as files are"
        )


def _is_bytes(kind: Any) -> bool:
    return str(getattr(kind, "dtype", None)).endswith("binary") and not hasattr(kind, "shape")
