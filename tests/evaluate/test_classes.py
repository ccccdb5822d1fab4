import pytest

from detr_accel.evaluate import match_classes
from detr_accel.structures import Classes, UserError

MODEL = Classes((None, "Person", "fire  hydrant", "dog"), (None, 1, 11, 18))


def test_names_decide_whatever_ids_and_case_are():
    to_category, report = match_classes(MODEL, Classes(("DOG", "person", "cat"), (5, 9, 2)))
    assert to_category == {1: 9, 3: 5}
    assert report == [
        "2 of the data set's 3 classes matched by name",
        "in the data set but unknown to the model, so never found: cat",
        "known to the model but not in the data set, so dropped: fire  hydrant",
    ]


def test_equal_tables_match_whole():
    to_category, report = match_classes(MODEL, MODEL)
    assert to_category == {1: 1, 2: 11, 3: 18} and len(report) == 1


def test_a_shared_name_prefers_the_labels_own_category():
    twins = Classes(("cell", "cell"), (3, 8))
    assert match_classes(twins, twins)[0] == {0: 3, 1: 8}
    assert match_classes(Classes(("cell",), (5,)), twins)[0] == {0: 3}


def test_no_shared_name_is_refused_with_both_lists():
    with pytest.raises(UserError, match="Person, .*data set has platelet"):
        match_classes(MODEL, Classes(("platelet",), (0,)))


def test_names_that_differ_in_case_only_are_told_apart():
    to_category, _ = match_classes(Classes(("Car", "car"), (1, 2)), Classes(("car", "Car"), (1, 2)))
    assert to_category == {0: 2, 1: 1}
    assert match_classes(Classes(("CAR",), (9,)), Classes(("car", "Car"), (1, 2)))[0] == {0: 1}
