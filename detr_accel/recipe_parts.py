"""What recipe.py is made of: the base of its sections, common ranges, and the section that only hub data sets need."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
NO_STREAM = (
    "data.group_by_shape, data.cache, evaluate.train_images, data.augment.mosaic and data.augment.mixup need to see "
    "all images first, and data.hub.streaming shows them one by one: leave out either"
)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )  # infinity and nan have no place in json, so that a run with one could not be read again


class Hub(Section):
    """A Hugging Face data set, behind ``data.format: hub``."""

    name: Text | None = None
    """A data set on the Hub, such as ``user/set``. One on disk goes into data.root instead: a folder with parquet
    files, or with images and a metadata.jsonl, or one written by save_to_disk, or a .parquet file."""
    config: Text | None = None
    """Which configuration of the set, where it has several."""
    revision: Text | None = None
    """A commit, tag or branch on the Hub; a commit keeps the data the same for ever."""
    train_split: Text = "train"
    """The split to train on. The only one of a set is taken, whatever its name."""
    val_split: Text | None = None
    """The split to validate on; null: ``validation``, ``val``, ``valid`` or ``dev``, whichever is there, else a part of
    the training split (data.val_fraction)."""
    image: Text = "image"
    """The column of the images."""
    objects: Text | None = "objects"
    """The column of the objects, a struct of lists or a list of structs; null: each field is a column of its own."""
    box: Text | None = None
    """The field of the boxes; null: ``bbox``, ``bboxes``, ``boxes`` or ``box``."""
    category: Text | None = None
    """The field of the categories, numbers or names; null: ``category``, ``category_id``, ``label`` or the like."""
    box_format: Literal["xywh_px", "xyxy_px", "cxcywh_px", "xywh_rel", "xyxy_rel", "cxcywh_rel"] = "xywh_px"
    """What the four numbers of a box are: upper left corner and size (the Hub's convention), two corners, or centre and
    size; in pixels, or as fractions of the image's width and height. It is never guessed."""
    class_names: list[Text] = []
    """The class names in order, where the set has numbers and does not name them itself."""
    streaming: bool = False
    """Read the training split while training, instead of downloading it first. The validation split is downloaded."""
    length: Positive | None = None
    """Images of the training split when streaming; null: as the set tells. Fewer than it has: the rest is left out."""
    block: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Images held in memory when streaming. They are shuffled in blocks of block / lanes consecutive rows of a shard,
    and the shards are shuffled each epoch."""
    lanes: Positive | Literal["auto"] = "auto"
    """Into how many groups the shards are dealt when streaming. All are read at the same time, and the order follows
    from them, not from the processes. A process reads only its own lanes where the processes divide them, else all.
    ``auto``: a divisor of the number of shards, 16 at most, with as many factors 2 as possible."""

    @model_validator(mode="after")
    def _names_differ(self) -> Hub:
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names holds a name twice: each class has one name and one place")
        return self
