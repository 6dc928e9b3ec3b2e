"""Items chosen by the columns of an item file: a value of text, or a number to compare with."""

import json

import pytest

from minionerec.data.files import InfoItem
from minionerec.data.items import ItemColumns, Items
from minionerec.errors import InputError

PRICES = ["$3.40", "1,299.00 USD", "3,50 €", 20, 19.99, "$5 - $8.50", "free", None, ["", "7"], "-2", True, "1,234,567"]


@pytest.fixture
def columns(tmp_path) -> ItemColumns:
    rows = {str(i): {"price": price, "brand": "A<B" if i else "3M"} for i, price in enumerate(PRICES)}
    (tmp_path / "item.json").write_text(json.dumps(rows))
    return ItemColumns(str(tmp_path / "item.json"), Items([InfoItem(i, "", f"<a_{i}>") for i in rows], "info"))


@pytest.mark.parametrize(
    ("condition", "items"),
    [
        ("price<20", [0, 2, 4, 5, 8, 9]),
        ("price <= 20", [0, 2, 3, 4, 5, 8, 9]),
        ("price>1000", [1, 11]),
        ("price >= 3.5", [1, 2, 3, 4, 5, 8, 11]),
        ("price<$3.41", [0, 9]),
        ("price=20", [3]),
        ("brand=a<b", list(range(1, 12))),
    ],
)
def test_numbers_are_compared_and_texts_are_equal(columns, condition, items):
    assert sorted(columns.where(condition)) == items


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("price<cheap", "where 'price<cheap': 'cheap' is not a number"),
        ("price<-9", "where 'price<-9': no item; 9 of 12 have a number there"),
        ("cost<20", "has no column 'cost'; it has brand, price"),
        ("price<", "give column=value, such as brand=3M, or price<20"),
        ("price", "give column=value"),
    ],
)
def test_a_condition_that_chooses_nothing_is_refused(columns, condition, message):
    with pytest.raises(InputError) as error:
        columns.where(condition)
    assert message in str(error.value)
