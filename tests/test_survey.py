"""report/survey.py: figures are those of all rows, and what is shown is chosen in little memory."""

import dataclasses

import numpy as np
import pytest
from samples import draw, requests

from diffumask_fast.dataset.reader import Row
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.report.survey import AREA_EDGES, ENDS, GRID, OTHER, SHOWN, Few, Survey, in_turn, look_at

CLASSES = {12: "dog", 7: "car"}


def survey_of(rows, classes=CLASSES):
    survey = Survey(classes, {name: [name] for name in classes.values()})
    for number, values in enumerate(rows):
        survey.add(look_at(number, Row(values)))
    return survey


def rows(num=30, **keywords):
    return [make_row(draw(request)) for request in requests(num, **keywords)]


def halves(quality=0.5, **changes):
    """Return a row whose left half is dog, and of whose right half a quarter is ignored."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16], mask[:8, 16:] = 12, 255
    sample = dataclasses.replace(draw(requests(1)[0], 32, 32), mask=mask, quality=[quality], accepted=True, reason="")
    return make_row(sample) | changes


def test_figures_are_those_of_the_rows():
    made = rows(30, classes_per_image=2)
    survey = survey_of(made)
    accepted = [row for row in made if row["accepted"]]
    assert (survey.rows, survey.accepted) == (30, len(accepted)) and 0 < len(accepted) < 30
    assert {number: figures.images for number, figures in survey.classes.items()} == {12: 30, 7: 30}
    assert survey.classes[7].accepted == len(accepted) and survey.reasons == {"too small": 30 - len(accepted)}
    place = made[0]["class_ids"].index(7)
    assert survey.classes[7].quality == pytest.approx(sum(row["quality"][place] for row in made), rel=0.5)
    assert sum(map(sum, survey.quality.values())) == 60 and survey.sizes == {(24, 40): 30}


def test_area_and_position():
    survey = survey_of([halves(), halves()])
    dog = survey.classes[12]
    assert dog.area == 1.0 and dog.seen == 2
    assert [index for index, count in enumerate(dog.areas) if count] == [AREA_EDGES.index(0.5) + 1]
    assert (
        np.array_equal(dog.place[:, : GRID // 2], np.full((GRID, GRID // 2), 2.0))
        and dog.place[:, GRID // 2 :].sum() == 0
    )
    assert survey.ignored / 2 == 0.125 and survey.covered / 2 == 0.5


@pytest.mark.parametrize(
    "quality",
    [[], [float("nan")], [float("inf")], None, [None], [0.5, 0.5]],
    ids=["none", "nan", "inf", "null", "", "two"],
)
def test_quality_that_is_none_is_left_out(quality):
    survey = survey_of([halves(quality=0.5), halves() | {"quality": quality}])
    assert sum(map(sum, survey.quality.values())) == 1 and not survey.ranked
    assert survey.views().keys() == {"sample"}


def test_quality_beyond_its_range_is_counted_at_its_end():
    survey = survey_of([halves() | {"quality": [value]} for value in (-3.0, 1.0, 7.0)])
    assert survey.quality[True][0] == 1 and survey.quality[True][-1] == 2


def test_damaged_pictures_are_counted_and_shown():
    made = [halves() for _ in range(4)]
    made[1]["image"] = {"bytes": made[1]["image"]["bytes"][:200], "path": None}
    made[2]["mask"] = make_row(draw(requests(1)[0]))["mask"]
    made[3]["mask"] = {"bytes": None, "path": None}
    survey = survey_of(made)
    assert survey.damaged == 3 and survey.views()["damaged"] == [1, 2, 3] and survey.classes[12].seen == 1


def test_classes_that_nobody_named_and_rows_without_any():
    mask = draw(requests(1)[0]).mask.copy()
    mask[:] = 77
    nameless = make_row(dataclasses.replace(draw(requests(1)[0]), mask=mask))
    empty = halves() | {"classes": [], "class_ids": [], "quality": []}
    survey = survey_of([nameless, empty], {})
    assert survey.classes[77].name == "id 77" and survey.classes[12].name == "dog"
    assert set(survey.views()["sample"]) == {0, 1}


def test_best_and_worst_are_accepted_rows():
    made = [halves(quality=value, key=f"k{value}") for value in np.linspace(0.1, 0.9, 200)]
    made[0]["accepted"] = made[199]["accepted"] = False
    views = survey_of(made).views()
    assert views["best"] == list(range(198, 198 - ENDS, -1)) and views["worst"] == list(range(1, 1 + ENDS))
    assert sorted(views["rejected"]) == [0, 199]


def test_no_accepted_row_has_neither_best_nor_worst():
    views = survey_of([halves(quality=value, accepted=False, reason="no") for value in (0.2, 0.4)]).views()
    assert views.keys() == {"sample", "rejected"}


def test_the_sample_has_each_class_and_does_not_depend_on_the_order():
    made = [halves(key=f"a-{index}") for index in range(600)]
    for number in (3, 77):
        made[number] = made[number] | {"classes": [f"c{number}"], "class_ids": [number]}
    sample = survey_of(made).views()["sample"]
    assert len(sample) == SHOWN == len(set(sample)) and {3, 77} <= set(sample)
    assert max(sample) > 500
    backwards = survey_of(made[::-1]).views()["sample"]
    assert {599 - number for number in backwards} == set(sample)


def test_each_kind_of_reason_is_shown_and_too_many_kinds_are_one():
    made = [halves(key=f"a-{index}", accepted=False, reason=f"dog covers {index}%") for index in range(100)]
    made[60]["reason"] = "the image is of one colour"
    survey = survey_of(made)
    assert survey.reasons == {"… covers …": 99, "the image is of one colour": 1} and 60 in survey.views()["rejected"]
    letters = [chr(ord("a") + index % 26) * (1 + index // 26) for index in range(200)]
    survey = survey_of([row | {"reason": text} for row, text in zip(made * 2, letters, strict=True)])
    assert len(survey.reasons) == 65 and survey.reasons[OTHER] == 136


def test_copies_are_twins_and_augmented_rows_are_not_compared():
    made = rows(10)
    made[7]["image"] = made[2]["image"]
    assert survey_of(made).twins() == [[2, 7]]
    assert (
        survey_of([row | {"augmentation": "blur 3" if index == 7 else ""} for index, row in enumerate(made)]).twins()
        == []
    )


def test_a_few_are_the_lowest():
    few = Few(3)
    for number, rank in enumerate([5.0, 1.0, 4.0, 1.0, 0.5]):
        few.add(rank, number)
    assert few.numbers == [4, 1, 3]


def test_in_turn_takes_none_twice():
    assert in_turn([[1, 2], [1, 3], []], 9) == [1, 3, 2] and in_turn([[5, 6], [7, 8]], 3) == [5, 7, 6]
    assert in_turn([], 3) == []
