"""What can be wrong with a data set, and what training does about it: a table, and who counts it while reading.

Whatever ends up as a target was written so by a person. A record is mended only where nothing has to be guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from detr_accel.structures import UserError

EXAMPLES = 5  # of each kind that are kept
Place = tuple[str, tuple[float, ...] | None]  # the file name in a json, and the box xywh px, where there is one


@dataclass(frozen=True)
class Kind:
    """One sort of dirt.

    Args:
        words: for the plural, after a number.
        mend: what training does under ``data.on_bad: mend``.
        drop: the same under ``drop``; None: as under mend.
        stops: ``data.on_bad: stop`` ends with a sentence about the first one.
        harm: training loses something to learn from, or learns something wrong, unless the data are put right.
    """

    words: str
    mend: str
    drop: str | None = None
    stops: bool = True
    harm: bool = False


_OUT, _TARGETS, _EMPTY = "left out", "left out of the targets", "its place in the window stays empty"
_WITH = "left out, with their annotations"

KINDS: dict[str, Kind] = {
    # records, as they are read
    "image.record": Kind("image records without a usable id or file name", _WITH, harm=True),
    "image.id_twice": Kind("image ids used for two files", "both left out, with their annotations", harm=True),
    "image.record_twice": Kind("image records given twice", "one of each kept"),
    "image.file_twice": Kind(
        "image records of a file that another record has, too", "their annotations joined", "both left out"
    ),
    "image.file_conflict": Kind(
        "image records of one file with different sizes or folders", "left out, with their annotations", harm=True
    ),
    "image.size": Kind("image records with an absurd size", "the size is read from the file", _WITH),
    "image.objects": Kind(
        "images without objects, or with boxes and categories that differ in number", "left out", harm=True
    ),
    "image.no_size": Kind("images without a size, in the json or in the file", _WITH, harm=True),
    "category.head": Kind("categories that only stand above one of the same name", _OUT, stops=False),
    "annotation.record": Kind("annotations that are no objects", _OUT, harm=True),
    "annotation.image": Kind("annotations of an image that is not listed", _OUT, harm=True),
    "annotation.category": Kind("annotations of a category that is not listed", _OUT, harm=True),
    "annotation.box": Kind("boxes that are not four finite numbers", _OUT, harm=True),
    "annotation.ids": Kind("annotation ids missing or used twice", "numbered anew", stops=False),
    "number.text": Kind("numbers written as text", "read as the number they spell", _OUT),
    "box.format": Kind("boxes in another format", "training does not start", harm=True),
    "box.twice": Kind("boxes given twice (same image, category and box)", "one of each is a target"),
    "box.inverted": Kind("boxes with a negative width or height", _TARGETS, harm=True),
    "box.flat": Kind("boxes without area", _TARGETS),
    "box.outside": Kind("boxes outside their image", _TARGETS, harm=True),
    "box.cut": Kind("boxes that reach out of their image", "cut at the border", stops=False),
    # files
    "image.missing": Kind("images whose file is not there", _EMPTY, harm=True),
    "image.unclear": Kind("images whose name fits several files", _EMPTY, harm=True),
    "image.unreadable": Kind("images that cannot be read", _EMPTY, harm=True),
    "image.scaled": Kind(
        "images of the shape that the json says, in another size", "read in the size of the json", _EMPTY
    ),
    "image.other_size": Kind("images of another shape than the json says", _EMPTY, harm=True),
}


class Dirt:
    """Counts what is odd, keeps a few examples, and decides as the policy says.

    Args:
        policy: ``mend``, ``drop`` or ``stop`` (``data.on_bad``).
        look: nothing ends here, so that all there is can be told.
    """

    def __init__(self, policy: str = "mend", look: bool = False) -> None:
        assert policy in ("mend", "drop", "stop"), policy
        self.policy, self.look = policy, look
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.places: dict[str, list[Place]] = {}  # where to look, for some of the examples

    def note(
        self, kind: str, text: object, num: int = 1, examples: Sequence[str] = (), places: Sequence[Place] = ()
    ) -> bool:
        """Something odd; returns whether it is to be mended (False: left out).

        Args:
            text: where, what and the remedy; put into words only when it is shown.
            num: how many at once; ``examples`` names some of them, ``places`` says where they are.
        Raises:
            UserError: the policy is to stop, or training cannot begin with it.
        """
        row = KINDS[kind]
        fatal = kind == "box.format"
        if not self.look and (fatal or (self.policy == "stop" and row.stops)):
            raise UserError(str(text))
        kept = self.examples.setdefault(kind, [])
        kept += list(examples or [str(text)] if len(kept) < EXAMPLES else ())[: EXAMPLES - len(kept)]
        self.counts[kind] += num
        seen = self.places.setdefault(kind, [])
        seen += list(places)[: EXAMPLES - len(seen)]
        return self.policy != "drop" or row.drop is None

    def does(self, kind: str) -> str:
        """What training does about it under this policy."""
        row = KINDS[kind]
        if self.policy == "stop" and row.stops:
            return "training does not start"
        return row.drop if self.policy == "drop" and row.drop is not None else row.mend

    def lines(self, split: str, but: Sequence[str] = ()) -> list[str]:
        """One line a kind for the console, in the order of the table.

        Args:
            but: kinds that somebody else tells.
        """
        told = {k: self.examples[k][0] for k in KINDS if self.counts[k] and k not in but}
        return [
            f"data: {split}: {self.counts[k]} {KINDS[k].words} ({self.does(k)}), the first: {_short(first)}"
            for k, first in told.items()
        ]


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 200 else f"{text[:197]}..."


def printable(text: str) -> str:
    """A name on disk may hold bytes that are no UTF-8, which no console and no json file takes."""
    return text.encode("utf-8", "backslashreplace").decode()
