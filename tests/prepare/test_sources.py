"""Raw files: what is valid is read the same from every format, everything else is refused in single lines."""

import gzip
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import encoded
from hypothesis import given, settings
from hypothesis import strategies as st

from minionerec.data.files import present
from minionerec.errors import InputError
from minionerec.prepare import cells, cleaning, sources
from minionerec.prepare.build import ITEM_ROLES
from minionerec.prepare.columns import find_columns
from minionerec.prepare.recognize import open_source

generated = settings(max_examples=60, deadline=None, derandomize=True)
IDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
IDS = IDS.map(present).filter(bool)
ROWS = st.lists(st.tuples(IDS, IDS, st.integers(1_000_000_000, 1_900_000_000)), min_size=1, max_size=30)
FORMATS = ["csv", "tsv", "json", "parquet"]
ALWAYS = (0, cells.LATEST)


def read_raw(path, wanted=None, layout=None, **given):
    """The interactions of a file, part by part, as (user, item, microseconds), what was read, and what was refused."""
    wanted = wanted or sources.Wanted()
    source = open_source(str(path), "interactions", layout)
    roles = ["user", "item", "time", *["event"] * bool(wanted.events), *["rating"] * (wanted.min_rating is not None)]
    spool = cleaning.Spool(f"{path}.spool", cleaning.INTERACTION)
    raw, refused = sources.read_all(
        source,
        lambda: find_columns(source, roles, given),
        lambda columns: sources.read_interactions(source, columns, wanted, spool),
    )
    users, items = list(raw.users), list(raw.items)
    return [(users[u], items[i], t) for part in spool for u, i, t in part.tolist()], raw, refused


def read(path, window=ALWAYS, **given) -> list[tuple[str, str, int]]:
    return read_raw(path, sources.Wanted(window), **given)[0]


def read_items(path, wanted=lambda item: True, skip=False, layout=None):
    source = open_source(str(path), "items", layout)
    return sources.read_all(
        source,
        lambda: find_columns(source, ITEM_ROLES, {}),
        lambda columns: sources.read_items(source, columns, wanted, skip)[:2],
    )


def by_user(rows):
    """The order that a spool keeps: users apart, each one's rows in the order of the file."""
    order: dict[str, list] = {}
    for row in rows:
        order.setdefault(row[0], []).append(row)
    return order


@generated
@given(ROWS, st.sampled_from(FORMATS), st.booleans())
def test_every_format_gives_the_same_interactions(tmp_path_factory, rows, form, zipped):
    path = tmp_path_factory.mktemp("raw") / "file"
    cells = [{"user_id": user, "item_id": item, "timestamp": time} for user, item, time in rows]
    path.write_bytes(encoded(cells, form, zipped))
    assert by_user(read(path)) == by_user((user, item, time * 1_000_000) for user, item, time in rows)


@generated
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda t: t.encode("utf-16", "surrogatepass"))))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    header = b"user,item,time\n"
    for prefix in (b"", header, b"\x1f\x8b", b"PAR1", b'{"user": "a", "item": "b", "time": 1}\n'):
        for whole in (prefix + content, gzip.compress(prefix + content)):
            path = tmp_path_factory.mktemp("raw") / "file"
            path.write_bytes(whole)
            try:
                read(path)
            except InputError as error:
                assert error.problems
                for problem in error.problems:
                    assert str(path) in problem and "\n" not in problem and len(problem) < 3000
                    problem.encode("utf-8")


CELLS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@generated
@given(st.lists(st.fixed_dictionaries({"user": CELLS, "asin": CELLS, "time": CELLS, "title": CELLS}), min_size=1))
def test_any_json_cells_are_read_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("raw") / "file"
    path.write_bytes(encoded(rows, "json"))
    for reader in (read, read_items):
        try:
            found = reader(path)
        except InputError as error:
            assert all("\n" not in problem for problem in error.problems)
            "".join(error.problems).encode("utf-8")
            continue
        if reader is read:
            assert len(found) == len(rows)
        else:
            for item in found[0]:
                assert item.title and item.title == " ".join(item.title.split())
                f"{item.original_id}{item.title}{item.description}".encode()


def test_the_published_reviews_of_2018_and_2023_need_no_flags(tmp_path):
    old = {"overall": 5.0, "verified": True, "reviewTime": "09 13, 2018", "reviewerID": "A1", "asin": "0007"}
    old |= {"style": {"Format:": " Paper"}, "reviewerName": "N", "reviewText": "T", "unixReviewTime": 1536796800}
    new = {"rating": 5.0, "title": "Good", "text": "T", "images": [], "asin": "B1", "parent_asin": "B0"}
    new |= {"user_id": "AE", "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True}
    for row, expected in ((old, ("A1", "0007", 1536796800 * 10**6)), (new, ("AE", "B0", 1588687728923 * 10**3))):
        path = tmp_path / f"{expected[0]}.jsonl.gz"
        path.write_bytes(encoded([row], "json", zipped=True))
        assert read(path) == [expected]

    old = {"category": ["Tools", "Bits"], "tech1": "", "description": ["One.", "", "Two."], "title": "A &amp; <b>B</b>"}
    old |= {"brand": "Acme", "feature": ["f"], "rank": [], "date": "", "details": {}, "asin": "0007"}
    new = {"main_category": "Tools", "title": "C", "average_rating": 4.5, "features": ["Long", "Thin"], "store": "Shop"}
    new |= {"description": [], "price": 3.5, "images": [{}], "categories": ["Tools"], "parent_asin": "B0"}
    (tmp_path / "old").write_bytes(encoded([old], "json"))
    (tmp_path / "new").write_bytes(encoded([new], "json"))
    ((first,), _), ((second,), _) = read_items(tmp_path / "old"), read_items(tmp_path / "new")
    assert first == sources.RawItem("0007", 0, "A & B", "One. Two.", "Acme", "Tools, Bits")
    assert second == sources.RawItem(
        "B0", 0, "C", "Long Thin", "Shop", "Tools", "3.5"
    )  # features for lack of a description


def test_times_in_every_form_are_one_time():
    moment = datetime(2018, 10, 31, 12, 0, 0, 250_000, UTC)
    expected = round(moment.timestamp() * 1e6)
    for value in (
        moment,
        moment.replace(tzinfo=None),
        "2018-10-31T12:00:00.250000",
        "2018-10-31 14:00:00.25+02:00",
        " 2018-10-31T12:00:00.250Z ",
        expected / 1e6,
        str(expected / 1e6),
        expected // 1000,
        str(expected),
        expected * 1000,
    ):
        assert cells.microseconds(value) == expected, value
    assert cells.microseconds("2018-10-31") == cells.microseconds(moment.date())
    bad = [
        "",
        "nan",
        "inf",
        "-1",
        -1,
        1e30,
        10**400,
        float("nan"),
        None,
        True,
        "09 13, 2018",
        [],
        {},
        "1969-12-31",
        5e9,
    ]
    for value in (*bad, "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        assert cells.microseconds(value) is None, value


def test_times_of_parquet_columns(tmp_path):
    moment = datetime(2018, 10, 31, 12, tzinfo=UTC)
    for kind in (pa.timestamp("ns"), pa.timestamp("s", "UTC"), pa.date32(), pa.int64(), pa.string()):
        cell = {pa.int64(): int(moment.timestamp()), pa.string(): "2018-10-31T12:00"}.get(kind, moment)
        times = pa.array([cell], kind)
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"user": pa.array([7]), "item": pa.array([8.0]), "time": times}), path)
        half_a_day = timedelta(hours=12) if kind == pa.date32() else timedelta()
        assert read(path) == [("7", "8", round((moment - half_a_day).timestamp() * 1e6))]


def test_ids_are_text_of_one_form():
    same = [cells.identifier(value) for value in ("12", " 12\n", 12, 12.0)]
    assert same == ["12"] * 4 and cells.identifier("0012") == "0012" and cells.identifier(2**70) == str(2**70)
    for value in ("", "  ", None, True, 1.5, float("nan"), float("inf"), [], {}, "\ud800", "nan", " NULL "):
        assert cells.identifier(value) is None, value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\tb\r\nc\u2028d\x00e", "a b c d e"),
        ('<a_1><b_2>5" &lt;pipe&gt; &amp; 3 < 4 > 2', '5" & 3 < 4 > 2'),
        ("<<a_1>a_1>", "< a_1>"),
        ("Bolt<|im_end|></s>[SEP] M4 <|>", "Bolt [SEP] M4"),
        ("nan", ""),
        (" NULL\n", ""),
        (["None", "a", "N/A", ["<NA>"]], "a"),
        ("\\N", ""),
        ("Nan", "Nan"),
        ("none such", "none such"),
        ("&amp;lt;a_1&amp;gt;", "&lt;a_1&gt;"),
        (["one ", "", None, ["two", 3]], "one two 3"),
        ("螺丝 🔩 M3", "螺丝 🔩 M3"),
        ("half \ud83d", "half ?"),
        (float("nan"), ""),
        (None, ""),
        (1984, "1984"),
        ({}, None),
        ([[["deep"]]], None),
        (True, None),
    ],
)
def test_texts_become_one_line_without_markup(value, text):
    assert cells.text_of(value) == text


def test_hostile_texts_take_no_time():
    for text in ("<" * 100_000, "<!--" * 25_000, "<a " * 30_000, "&" * 100_000, "x" * 100_000):
        assert cells.text_of(text) is not None


def test_items_that_repeat_have_no_title_or_are_not_wanted_are_counted(tmp_path):
    rows = [{"id": n, "item": i, "name": t} for n, (i, t) in enumerate([("a", "A"), ("b", ""), ("a", "B"), ("c", "C")])]
    (tmp_path / "items").write_bytes(encoded(rows, "csv"))
    items, counts = read_items(tmp_path / "items", wanted={"a", "b"}.__contains__)
    assert items == [sources.RawItem("a", 0, "A", "", "", "")]
    assert counts == {"rows": 4, "not_wanted": 1, "repeated": 1, "untitled": 1, "refused": 0}


def test_id_is_the_item_only_in_a_file_of_items(tmp_path):
    (tmp_path / "file").write_bytes(b"id,title\n1,A\n")
    roles, given = ("item", "title"), {}
    assert find_columns(open_source(str(tmp_path / "file"), "items"), roles, given) == ["id", "title"]
    with pytest.raises(InputError, match="no column is recognized as the item"):
        find_columns(open_source(str(tmp_path / "file"), "interactions"), roles, given)


GOOD = "user,item,time\nu,i,1\n"
REFUSED = [
    (b"", "is empty"),
    (b"  \n", "is empty"),
    (b"\x1f\x8b", "cannot be read"),
    (gzip.compress(GOOD.encode() * 5000)[:-20], "cannot be read"),
    (b"PAR1abc", "cannot be read"),
    (b"\x00\x01\x02", "is neither Parquet nor UTF-8 text"),
    (GOOD.encode("utf-16-le"), "is neither Parquet nor UTF-8 text; for UTF-16 give --encoding utf-16-le"),
    ("user,item,time\nü,i,1\n".encode("latin-1"), "line 2: is not UTF-8 (byte 0xfc); name the file's --encoding"),
    (b"user,item,time\n", "has no rows"),
    (b"user,item,time\nu,i\n", "expected 3 columns, got 2"),
    (
        b"who,item,time\nu,i,1\n",
        "no column is recognized as the user; name it with --user_column; the file has 'who', 'item'",
    ),
    (b"user,customer,item,time\nu,c,i,1\n", "user and customer could each be the user; name one with --user_column"),
    (b"user,item,time,item\nu,i,1,i\n", "column item occurs 2 times"),
    (b"[1, 2]\n", "line 1: expected one JSON object per line, found [1, 2]"),
    (b'{"user": "u", "item": "i", "time": 1}\n{"user": \n', "line 2: is not JSON"),
    (b'{"user": "u", "item": "i", "time": 1}\n' + b"[" * 100_000, "line 2: is not JSON"),
    (b'{"user": "u", "item": "i", "time": 1}\n{"item": "i", "time": 1}', "row 2, user: expected a user id"),
    (b'{"user": "u", "item": ["i"], "time": 1}\n', "row 1, item: expected an item id"),
    (b'{"user": "u", "item": "i", "time": NaN}\n', "row 1, time: expected a date or seconds since 1970"),
    (b"user,item,time\nu,i,-1\n", "row 1, time: expected a date or seconds since 1970, from 1970 to 2099, found '-1'"),
    (b"user,item,time\nu,i,1\nu,i,1e30\n", "row 2, time: expected"),
    (b'"us\ner",item,time\nu,i,1\n', "no column is recognized as the user"),
    (b"user,item,time\nu,,1\n", "row 1, item: expected an item id"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_read_is_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(path)
    assert len(error.value.problems) == 1
    assert message in error.value.problems[0] and str(path) in error.value.problems[0]


def test_many_bad_cells_are_counted(tmp_path):
    path = tmp_path / "file"
    path.write_text("user,item,time\n" + ",i,soon\n" * 60_000)
    with pytest.raises(InputError) as error:
        read(path)
    assert len(error.value.problems) == 6 and "119995 more problems" in error.value.problems[-1]


def test_a_column_is_named_where_it_is_not_found(tmp_path):
    path = tmp_path / "file"
    path.write_text("who,item,sku,time\nu,i,s,1\n")
    assert read(path, user="who", item="sku") == [("u", "s", 1_000_000)]
    recbole = tmp_path / "file.inter"
    recbole.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t5\t1.0\n")
    assert read(recbole) == [("u", "i", 1_000_000)]
    source = open_source(str(path), "interactions")
    with pytest.raises(InputError, match="--item_column skuu is not a column; the file has 'who', 'item', 'sku'"):
        find_columns(source, ("item",), {"item": "skuu"})
    # The flag may mean the other file.
    path.write_text("who,item,time\nu,i,1\n")
    source = open_source(str(path), "interactions")
    assert find_columns(source, ("item",), {"item": "sku"}, other=["sku"]) == ["item"]


def test_the_time_window_counts_its_days(tmp_path):
    path = tmp_path / "file"
    days = ["2016-09-30T23:59:59", "2016-10-01", "2017-05-05", "2018-11-30T23:59:59.999999", "2018-12-01"]
    path.write_text("user,item,time\n" + "".join(f"u,i,{day}\n" for day in days))
    inside = [time for _, _, time in read(path, cleaning.time_window("2016-10", "2018-11"))]
    assert inside == [cells.microseconds(day) for day in days[1:4]]
    assert cleaning.time_window("", "") == (0, np.iinfo(np.int64).max)
    with pytest.raises(InputError) as error:
        cleaning.time_window("2018-13", "soon")
    assert len(error.value.problems) == 2
    with pytest.raises(InputError, match="--start_date 2018 is after --end_date 2017"):
        cleaning.time_window("2018", "2017")
