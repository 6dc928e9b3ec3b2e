"""Items chosen by the columns of an item file: a value of text, or a number to compare with."""

import pytest

from minionerec.data import items as data_items
from minionerec.data.files import InfoItem, notes_on_titles, with_original_ids
from minionerec.data.items import ItemColumns, Items, left_out, read_item_list
from minionerec.errors import InputError

PRICES = ["$3.40", "1,299.00 USD", "3,50 €", 20, 19.99, "$5 - $8.50", "free", None, ["", "7"], "-2", True, "1,234,567"]


@pytest.fixture
def columns() -> ItemColumns:
    rows = {str(i): {"price": price, "brand": "A<B" if i else "3M"} for i, price in enumerate(PRICES)}
    return ItemColumns("item.json", Items([InfoItem(i, "", f"<a_{i}>") for i in rows], "info"), rows)


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


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        (1e-05, 1e-5),
        (1e16, 1e16),
        (5, 5),
        (float("nan"), None),
        (".99", 0.99),
        ("$ .5", 0.5),
        ("No.5", 5),
        ("1e-3", 1e-3),
        ("2E4x4", 2),
        ("1.299,00 €", 1299),
        ("12.345.678,9", 12345678.9),
        ("1,299.50", 1299.5),
        ("1.299", 1.299),
        ("1 299,00 €", 1299),
        ("12\u202f345\xa0678,9 zł", 12345678.9),
        ("R 1 299.50", 1299.5),
        ("1'299.50", 1299.5),
        ("CHF 1\u2019299", 1299),
        ("5 250 ml", 5),
        ("5 1,50", 5),
        ("1 299 kr", 1299),
        ("kr 1 299", 1299),
        ("1 299 - 1 499 kr", 1299),
        ("1 299:-", 1299),
        ("1\u2009299", 1299),
        ("12 345 678", 12345678),
        ("R$ 1.299", 1299),
        ("kr.1.299,-", 1299),
        ("1.299.000", 1299000),
        ("$1.299", 1.299),
        ("Rs. 1,29,900", 129900),
        ("1,29,900", 1),
        ("CHF 1'299.-", 1299),
        ("£5 250ml", 5),
        ("5 250 ft", 5),
        ("3 for 250 kr", 3),
        ("3,50", 3.5),
        ("-7", -7),
    ],
)
def test_numbers_are_read_as_they_are_written(cell, number):
    assert data_items._number(cell) == number


def test_a_mistyped_value_is_not_compared_with_every_value(columns):
    with pytest.raises(InputError, match="no item has this value; did you mean 'a<b'"):
        columns.where("brand=a<c")
    columns._numbers["brand"] = {str(i): {i} for i in range(data_items.MOST_COMPARED + 1)}
    with pytest.raises(InputError, match=r"no item has this value$"):
        columns.where("brand=1000x")


@pytest.mark.parametrize(
    ("history", "earlier"),
    [("", ""), ("a", ""), ("ab", "a"), ("aba", "b"), ("abb", "a"), ("abac", "ab"), (["ab", "bc"], "a")],
)
def test_what_is_not_recommended_again(history, earlier):
    assert left_out(history, False) == set()
    assert left_out(history, True) == set("".join(history))
    assert left_out(history, "earlier") == set(earlier)


def test_targets_that_are_no_items_are_refused(tmp_path):
    listed = [InfoItem("0", "Bolt", "<a_0>"), InfoItem("1", "Nut", "<a_0>"), InfoItem("2", "Cap", "<a_1>")]
    header = "history_item_sid,item_sid,item_id\n"
    test = tmp_path / "test.csv"
    test.write_text(header + "['<a_1>'],<a_0>,1\n['<a_1>'],<a_9>,9\n")  # a new item is none of the catalogue
    assert data_items.read_targets(listed, "info", "", str(test))[1] == [1, None]
    for name in ("B00X", "1.0", ""):
        test.write_text(header + f"['<a_1>'],<a_0>,1\n['<a_0>'],<a_1>,{name}\n")
        with pytest.raises(InputError, match="row 2: item_id is no item of info, where <a_1> is item '2'"):
            data_items.read_targets(listed, "info", "", str(test))


def test_ids_that_are_not_separated_by_commas():
    listed = [InfoItem(str(i), "Bolt M4", f"<a_{i}>") for i in range(3)]
    with pytest.raises(
        InputError, match=r"'0 2' is no item id, SID or title of the info file; separate items by commas$"
    ):
        Items(listed, "info").find("0 2")
    with pytest.raises(InputError, match=r"info file$"):
        Items(listed, "info").find("0 Bolt")


def with_originals(*originals: object, only: bool = False) -> Items:
    """Items 0, 1 and so on, with these original ids."""
    listed = [InfoItem(str(i), "Bolt", f"<a_{i}>") for i in range(len(originals))]
    metadata = {str(i): {"original_id": original} for i, original in enumerate(originals)}
    return Items(with_original_ids(listed, metadata), "info", only_original_ids=only)


def test_an_item_file_with_the_items_of_other_data_is_named():
    """Its original ids are those of other products. Some titles may have changed, or be missing."""
    listed = [InfoItem(str(i), f"Bolt  {i}", f"<a_{i}>") for i in range(10)]
    for num_moved, warned in ((0, 0), (5, 0), (6, 1), (10, 1)):
        metadata = {str(i): {"title": f"Bolt {i + (i < num_moved)}", "original_id": f"B{i}"} for i in range(10)}
        assert len(notes := notes_on_titles(listed, metadata, "--item_meta_path items.json")) == warned
        assert all(
            f"items.json belongs to a different catalogue than the info file: {num_moved} of 10" in n for n in notes
        )
    for title in (None, "", "NaN", 5, ["Nut"], "\ud800"):
        assert not notes_on_titles(listed, {str(i): {"title": title} for i in range(10)}, "items.json")
    assert not notes_on_titles(listed, {"0": "Nut", "x": {"title": "Nut"}}, "items.json")


def test_requests_name_items_by_either_id_where_no_text_means_two(tmp_path):
    items = with_originals("B07", 90, None, ["x"], "4")
    assert [items.find(text) for text in ("B07", "0", "90", "1", "2", "4")] == [[0], [0], [1], [1], [2], [4]]
    assert not items.notes and [item.original_id for item in items.all] == ["B07", "90", "", "", "4"]
    (tmp_path / "deny.txt").write_text("B07\n2\n")
    assert read_item_list(str(tmp_path / "deny.txt"), "deny", items) == {0, 2}
    assert [item.id for item in items.search("90", 5)] == ["1"]
    assert [item.id for item in items.search("bolt", 2)] == ["0", "1"]


@pytest.mark.parametrize("originals", [("1", "0"), ("B1", "B1"), ("2", "1", "B2")])
def test_original_ids_that_mean_two_items_are_not_taken(originals):
    """A shop whose ids are numbers: what they name is what they named before, unless the shop says otherwise."""
    items = with_originals(*originals)
    (note,) = items.notes
    assert "original ids could mean two items, such as" in note and "--original_ids True" in note
    assert [items.find(str(i)) for i in range(len(originals))] == [[i] for i in range(len(originals))]
    assert items.search("B1", 5)
    with pytest.raises(InputError, match="is no item id"):
        items.find("B2" if len(originals) == 3 else "B1")


def test_original_ids_alone_can_be_asked_for():
    items = with_originals("1", "0", "B2", only=True)
    assert [items.find(text) for text in ("1", "0", "B2", "<a_0>")] == [[0], [1], [2], [0]] and not items.notes
    with pytest.raises(InputError, match=r"'2' is no item id, .*; items are named by their original_id"):
        items.find("2")
    with pytest.raises(InputError, match="'Bolt' is the title of several items; give an id: 1, 0, B2"):
        items.find("Bolt")
    with pytest.raises(InputError, match="1 items have no original_id in --item_meta_path, such as '1'"):
        with_originals("7", None, only=True)
    with pytest.raises(InputError, match="1 belong to several items, such as 'B'"):
        with_originals("B", "B", only=True)
