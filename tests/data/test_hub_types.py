"""Columns of odd Arrow types: each is read as what it spells, or refused in a sentence with what, where, what to do."""

import io
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from detr_accel import data
from detr_accel.data import hub_types
from detr_accel.structures import UserError

F64, I64, STR, L = pa.float64(), pa.int64(), pa.string(), pa.list_
F64S, F64SS, STRS = L(F64), L(L(F64)), L(STR)
BOXES = [[[1.0, 2, 9, 8]], [[1.0, 2, 9, 8], [3.0, 3, 5, 5]], [], [[4.0, 4, 10, 10]], [[1.0, 1, 9, 9]], [[2.0, 2, 9, 9]]]
CATS = [["cat"], ["cat", "dog"], [], ["dog"], ["cat"], ["dog"]]
NUM, NAMES = len(BOXES), {"class_names": ["cat", "dog"]}
pytestmark = pytest.mark.law8


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), 40 * number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def each(change, rows=BOXES) -> list:
    return [[change(one) for one in row] for row in rows]


def lists(boxes=BOXES, box=F64SS, cats=CATS, category=STRS, **more) -> dict:
    """A struct of lists."""
    fields = {"bbox": _array(boxes, box), "category": _array(cats, category)}
    fields |= {name: pa.array(*given) for name, given in more.items()}
    return {"objects": pa.StructArray.from_arrays(list(fields.values()), list(fields))}


def _array(values, kind):
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


def structs(box=lambda b: b, kind=F64S, outer=L) -> dict:
    """A list of structs."""
    rows = [
        [{"bbox": box(b), "category": c} for b, c in zip(*pair, strict=True)] for pair in zip(BOXES, CATS, strict=True)
    ]
    return {"objects": pa.array(rows, outer(pa.struct([("bbox", kind), ("category", STR)])))}


def dictionary() -> pa.Array:
    names = pa.DictionaryArray.from_arrays(pa.array([0, 0, 1, 1, 0, 1], pa.int32()), pa.array(["cat", "dog"]))
    return pa.ListArray.from_arrays(pa.array([0, 1, 3, 3, 4, 5, 6], pa.int32()), names)


def numbers(kind, of=int) -> dict:
    return lists(cats=each(lambda c: of(c == "dog"), CATS), category=L(kind))


def more(name: str, value, kind) -> dict:
    return lists(**{name: (each(lambda _: value), L(kind))})


def images(cell, kind=None) -> dict:
    return lists() | {"image": pa.array([cell(i) for i in range(NUM)], kind)}


FILE = pa.struct([("bytes", pa.binary()), ("path", STR)])
XYWH = pa.struct([(name, F64) for name in "xywh"])


def as_struct(box: list) -> dict:
    return dict(zip("xywh", box, strict=True))


def as_list(one) -> list:
    return [one]


READ = {  # columns, data.hub
    "box_text": (lists(each(lambda b: [str(v) for v in b]), L(L(STR))), {}),
    "box_decimal": (lists(each(lambda b: [Decimal(v) for v in b]), L(L(pa.decimal128(9, 3)))), {}),
    "box_half": (lists(each(lambda b: [np.float16(v) for v in b]), L(L(pa.float16()))), {}),
    "box_fixed": (lists(box=L(L(F64, 4))), {}),
    "box_fixed_in_structs": (structs(kind=L(F64, 4)), {}),
    "large_lists": (lists(box=pa.large_list(pa.large_list(F64)), category=pa.large_list(pa.large_string())), {}),
    "large_list_of_structs": (structs(outer=pa.large_list), {}),
    "category_dictionary": (lists(cats=dictionary()), {}),
    "category_float": (numbers(F64, float), NAMES),
    "category_decimal": (numbers(pa.decimal128(5, 1), Decimal), NAMES),
    "category_uint8": (numbers(pa.uint8()), NAMES),
    "category_bool": (numbers(pa.bool_(), bool), NAMES),
    "columns": ({"bbox": pa.array(BOXES, L(L(F64, 4))), "category": dictionary()}, {"objects": None}),
    "area_deep": (more("area", [5.0], L(F64)), {}),
    "area_null": (more("area", None, pa.null()), {}),
    "area_one": (lists(area=([5.0] * NUM,)), {}),
    "crowd_text": (more("iscrowd", "no", STR), {}),
    "crowd_struct": (more("iscrowd", {"a": 1}, pa.struct([("a", I64)])), {}),
    "id_text": (more("id", "1", STR), {}),
    "size_text": (lists() | {"width": pa.array(["30"] * NUM), "height": pa.array(["20"] * NUM)}, {}),
    "size_list": (lists() | {"width": pa.array([[30]] * NUM), "height": pa.array([[20]] * NUM)}, {}),
    "size_null": (lists() | {"width": pa.nulls(NUM), "height": pa.nulls(NUM)}, {}),
    "image_id_null": (lists() | {"image_id": pa.nulls(NUM)}, {}),
    "image_path": (images("{}.png".format), {}),
    "image_path_dictionary": (lists() | {"image": pa.array([f"{i}.png" for i in range(NUM)]).dictionary_encode()}, {}),
    "image_bytes": (images(png, pa.large_binary()), {}),
    "image_without_path": (images(lambda i: {"bytes": png(i)}), {}),
    "image_without_bytes": (images(lambda i: {"path": f"{i}.png"}), {}),
    "image_bytes_null": (images(lambda i: {"bytes": None, "path": f"{i}.png"}), {}),
}
REFUSED = {  # columns, data.hub, what is said
    "box_is_text": (lists(each(str), L(STR)), {}, "'bbox' does not hold lists of four numbers, but string .*hub.box"),
    "box_flat": (lists([sum(row, []) for row in BOXES], L(F64)), {}, "lists of four numbers, but float64 for each"),
    "box_deep": (lists(each(as_list), L(F64SS)), {}, "but lists of lists of float64 for each object"),
    "box_struct": (lists(each(as_struct), L(XYWH)), {}, r"but structs .x, y, w, h. for each"),
    "box_struct_in_structs": (structs(as_struct, XYWH), {}, "but structs .*: write the boxes so"),
    "box_five": (lists(each(lambda b: [*b, 0]), L(L(F64, 5))), {}, "but lists of 5 float64"),
    "box_five_long": (lists(each(lambda b: [*b, 0])), {}, "not one of its 6 boxes can be read.*mend or remove it"),
    "box_words": (lists(each(lambda b: ["a"] * 4), L(L(STR))), {}, "not one of its 6 boxes can be read"),
    "box_bool": (lists(each(lambda b: [True] * 4), L(L(pa.bool_()))), {}, "but lists of bool"),
    "box_date": (lists(each(lambda b: [1] * 4), L(L(pa.timestamp("s")))), {}, "but lists of timestamp"),
    "box_null": (lists(each(lambda b: None), L(pa.null())), {}, "but nothing but null"),
    "box_column_null": (lists([None] * NUM, pa.null()), {}, "'bbox' holds nothing but null, where .* one box"),
    "box_column_text": (lists([str(b) for b in BOXES], STR), {}, "'bbox' holds string, where each image needs a list"),
    "objects_null": ({"objects": pa.nulls(NUM)}, {}, "'objects' holds nothing but null and is neither .*hub.objects"),
    "objects_text": ({"objects": pa.array(["x"] * NUM)}, {}, "'objects' holds string and is neither"),
    "objects_deep": ({"objects": pa.array([[[{"bbox": [1.0], "category": "a"}]]] * NUM)}, {}, "lists of lists of str"),
    "objects_one": ({"objects": pa.array([{"bbox": [1.0] * 4, "category": "cat"}] * NUM)}, {}, "'category' holds str"),
    "category_one": (lists(cats=["cat"] * NUM, category=STR), {}, "'category' holds string, where .*hub.category"),
    "category_deep": (lists(cats=each(as_list, CATS), category=L(STRS)), NAMES, "lists of string for each"),
    "category_bytes": (lists(cats=each(str.encode, CATS), category=L(pa.binary())), NAMES, "'category' holds binary"),
    "category_null": (lists(cats=each(lambda c: None, CATS), category=L(pa.null())), NAMES, "nothing but null for"),
    "category_date": (numbers(pa.timestamp("s")), NAMES, "timestamp.* neither the name of a class nor its number"),
    "category_length": (numbers(pa.duration("s")), NAMES, "duration.* neither the name of a class nor its number"),
    "category_text_number": (numbers(STR, lambda c: str(int(c))), NAMES, "category '0' is none of the 2 classes"),
    "columns_flat": ({"bbox": pa.array([[1.0] * 4] * NUM), "category": dictionary()}, {"objects": None}, "but float64"),
    "image_number": (images(int), {}, "'image' holds int64, and neither images.*set data.hub.image"),
    "image_null": (lists() | {"image": pa.nulls(NUM)}, {}, "'image' holds nothing but null"),
    "image_pixels": (images(lambda i: [[[i]]]), {}, "'image' holds lists of lists of lists of int64"),
    "image_struct": (images(lambda i: {"a": i}), {}, r"'image' holds structs .a., and neither"),
    "image_list": (images(lambda i: [png(i)]), {}, "'image' holds lists of binary"),
    "image_struct_null": (images(lambda i: {"bytes": None, "path": None}), {}, r"'image' holds structs .bytes, path."),
    "image_empty": (images(lambda i: {"bytes": None, "path": ""}, FILE), {}, "none of its images .* has no image"),
    "image_encoded_as_text": (images(lambda i: "aGVsbG8=" * 999), {}, "6 of 6 image files looked at are not there"),
}  # fmt: skip


@pytest.fixture
def opened(tmp_path, recipe_for, monkeypatch):
    """Write the columns as both splits, and open them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def build(columns: dict, hub: dict, streaming: bool):
        root = tmp_path / "set"
        root.mkdir()
        held = pa.array([{"bytes": png(i), "path": None} for i in range(NUM)], FILE)
        for i in range(NUM):
            (root / f"{i}.png").write_bytes(png(i))
        for split in ("train", "validation"):
            pq.write_table(pa.table({"image": held} | columns), root / f"{split}.parquet")
        known = NAMES if streaming else {}
        recipe = recipe_for(root, format="hub", hub=known | hub | {"streaming": streaming, "block": 4})
        return recipe, data.build(recipe)

    return build


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", READ)
def test_a_column_of_an_odd_type_is_read_as_what_it_spells(opened, case, streaming):
    columns, hub = READ[case]
    recipe, splits = opened(columns, hub, streaming)
    assert splits.train.classes.names == ("cat", "dog") and splits.val.num_targets() == 6
    if streaming:
        rows = sorted(splits.train.rows(5, 0, 0, 0), key=lambda row: row.image_id)
        found = [(row.labels, row.boxes_xyxy_px) for row in rows]
    else:
        found = [(one.labels, one.boxes_xyxy_px) for one in map(splits.train.sample, range(NUM))]
    for (labels, boxes), cats, written in zip(found, CATS, BOXES, strict=True):
        assert labels.tolist() == [int(c == "dog") for c in cats]
        assert boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in written]
    windows = data.train_windows(
        recipe, splits.train, rank=0, num_ranks=1, start_window=0, end_window=1, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    assert sum(len(batch) for batch in next(windows)) == NUM and not windows.close()


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_column_that_cannot_be_meant_is_refused_in_one_sentence(opened, case, streaming):
    columns, hub, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as refused:
        opened(columns, hub, streaming)
    text = str(refused.value)
    assert "/set, split " in text and "\n" not in text and len(text) < 900


def test_a_crowd_said_in_words_is_one(opened):
    crowd = lists(iscrowd=(each(lambda box: "True" if box[0] == 4 else "False"), STRS))
    _, splits = opened(crowd, {}, False)
    assert splits.val.table.crowd.tolist() == [False, False, False, True, False, False]


def test_an_array_is_told_from_a_number():
    import datasets

    assert hub_types.told(datasets.Array2D((1, 4), "float32")) == "arrays of float32"
