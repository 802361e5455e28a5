from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.errors import UserError
from trainer.measures import fields

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def test_json_match_compares_values() -> None:
    reference = '{"a": 1, "b": [true, null]}'
    right = ['{"b":[true,null],"a":1.0}', " " + reference + "\n"]
    wrong = [
        '{"a": true, "b": [true, null]}',  # true is not 1
        '{"a": "1", "b": [true, null]}',
        '{"a": 1, "b": [null, true]}',
        '{"a": 1}',
        '{"a": 1, "b": [true, null]',  # cut
        f"```json\n{reference}\n```",
        '{"a": 2, "a": 1, "b": [true, null]}',  # says two things
        '{"a": NaN, "b": [true, null]}',
        "",
        "[" * 100_000,
        "1" * 10_000,
    ]
    assert fields.json_match(right, [reference] * 2) == [1.0, 1.0]
    assert fields.json_match(wrong, [reference] * len(wrong)) == [0.0] * len(wrong)


def test_json_containers_differ() -> None:
    assert fields.json_match(["{}", "[]", '{"0": 1}', "0"], ["[]", "[]", "[1]", "false"]) == [0.0, 1.0, 0.0, 0.0]


def test_a_reference_that_is_not_json_is_an_error_of_the_data() -> None:
    for measure in (fields.json_match, fields.field_f1, fields.field_accuracy, fields.field_scores):
        with pytest.raises(UserError, match=r"references\[1\]: 'billing': not JSON"):
            measure(["{}", "{}"], ["{}", "billing"])


def test_field_f1_by_hand() -> None:
    reference = '{"name": "Ada", "age": 36, "tags": ["x", "y"]}'
    # 3 of 4 leaves right (tags in any order, age wrong), one leaf too many: precision 3/5, recall 3/4.
    prediction = '{"name": "Ada", "age": 37, "tags": ["y", "x"], "city": "Paris"}'
    assert fields.field_f1([prediction, "oops"], [reference] * 2) == pytest.approx([2 / 3, 0.0])
    assert fields.field_accuracy([prediction, "oops"], [reference] * 2) == pytest.approx([3 / 4, 0.0])
    # A dotted key is not a path.
    assert fields.field_f1(['{"a.b": 1}'], ['{"a": {"b": 1}}']) == [0.0]
    # An element said three times is right once.
    assert fields.field_f1(['{"t": ["x", "x", "x"]}'], ['{"t": ["x"]}']) == pytest.approx([0.5])


def test_field_scores_by_hand() -> None:
    table = fields.field_scores(
        ['{"a": 1, "b": 2}', '{"a": 5}', "broken"], ['{"a": 1}', '{"a": 2, "c": {"d": 3}}', "7"]
    )
    assert table["a"] == fields.FieldScore(correct=1, predicted=2, expected=2)
    assert table["b"].precision == 0.0 and table["b"].recall == 0.0 and table["b"].f1 == 0.0
    assert table["c.d"].expected == 1 and table["$"].expected == 1
    assert table[""].precision == pytest.approx(1 / 3)
    assert table[""].recall == pytest.approx(1 / 4)
    assert table[""].f1 == pytest.approx(2 / 7)


@given(JSON, JSON)
def test_equal_values_score_one_and_a_match_implies_all_fields(left: object, right: object) -> None:
    first, second = json.dumps(left), json.dumps(right, indent=2)
    assert fields.json_match([first], [json.dumps(left, indent=1)]) == [1.0]
    assert fields.field_f1([first], [first]) == [1.0]
    matched, share = fields.json_match([first], [second])[0], fields.field_f1([first], [second])[0]
    assert 0.0 <= share <= 1.0
    assert share == 1.0 or matched == 0.0
    assert fields.field_f1([second], [first])[0] == share
