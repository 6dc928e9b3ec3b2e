"""Every row of a raw file is read as it is meant, or refused and counted; none is lost, in any layout."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import signal
import uuid
import zipfile
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from unittest import mock
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minionerec.errors import InputError
from minionerec.prepare import cells, cleaning, delimited, json_rows, semantic_ids, sources, writing
from minionerec.prepare.build import ITEM_ROLES
from minionerec.prepare.columns import find_columns
from minionerec.prepare.recognize import Layout, open_source
from scripts.prepare_data import prepare_data

T0 = 1_500_000_000


def read_raw(path, wanted=None, layout=None, **given):
    """The interactions of a file as (user, item, seconds), what was read, and what was refused."""
    wanted = wanted or sources.Wanted()
    source = open_source(str(path), "interactions", layout)
    roles = ["user", "item", "time", *["event"] * bool(wanted.events), *["rating"] * (wanted.min_rating is not None)]
    spool = cleaning.Spool(f"{path}.{random.random()}", cleaning.INTERACTION)
    raw, refused = sources.read_all(
        source,
        lambda: find_columns(source, roles, given),
        lambda columns: sources.read_interactions(source, columns, wanted, spool),
    )
    users, items = list(raw.users), list(raw.items)
    return [(users[u], items[i], t / 1e6) for part in spool for u, i, t in part.tolist()], raw, refused


def read_items(path, skip=False, layout=None, **given):
    source = open_source(str(path), "items", layout)
    return sources.read_all(
        source,
        lambda: find_columns(source, ITEM_ROLES, given),
        lambda columns: sources.read_items(source, columns, lambda item: True, skip),
    )


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problems_of(function, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    assert all("\n" not in problem and len(problem) < 1000 for problem in error.value.problems)
    return "\n".join(error.value.problems)


# --- Rows read and rows refused are the rows of the file --------------------------------------------------------------

GOOD = st.tuples(st.sampled_from(["a", "b", "ü"]), st.integers(0, 9), st.integers(T0, T0 + 10**8))
BAD_CSV = [
    b'a,"5,1500000000',  # opens a quote
    b'"a,5,1500000000',
    b'a,"5"x,1500000000',
    b"a,5",
    b"a,5,1500000000,9",
    b",5,1500000000",
    b",,",
    b'"","",""',
    b"nan,5,1500000000",
    b"a,,1500000000",
    b"a,1.2345678901234568e+17,1500000000",
    b"a,5,soon",
    b"a,5,",
    b"\xff,5,1500000000",
]
BAD_JSON = [
    b'{"user": "a", "item": 5, "time": 15000',
    b'{"user": null, "item": 5, "time": 1500000000}',
    b'{"user": "a", "item": 5.5, "time": 1500000000}',
    b'{"user": "a", "item": 1e17, "time": 1500000000}',
    b'{"item": 5, "time": 1500000000}',
    b'["a", 5, 1500000000]',
    b"{'user': a, 'item': 5, 'time': 1500000000}",
    b'{"user": "\xff", "item": 5, "time": 1500000000}',
    b"nonsense",
]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.one_of(GOOD, st.integers(0, 100)), min_size=1, max_size=25), st.booleans())
def test_rows_read_and_rows_refused_add_up(tmp_path_factory, rows, as_json):
    bad = BAD_JSON if as_json else BAD_CSV
    rows = [("z", 0, T0), *rows]  # the first one says what the file is
    lines = [
        bad[row % len(bad)]
        if isinstance(row, int)
        else (
            json.dumps(dict(zip(("user", "item", "time"), row, strict=True))) if as_json else ",".join(map(str, row))
        ).encode()
        for row in rows
    ]
    content = b"\n".join(lines if as_json else [b"user,item,time", *lines]) + b"\n"
    path = written(tmp_path_factory.mktemp("raw") / "file", content)
    expected = [(user, str(item), time) for user, item, time in (row for row in rows if not isinstance(row, int))]
    found, raw, refused = read_raw(path, sources.Wanted(skip_bad_rows=True))
    assert sorted(found) == sorted(expected)
    assert raw.num_rows == len(rows) and raw.refused == refused.count == len(rows) - len(expected)
    if refused.count:
        told = problems_of(read_raw, path)
        assert f"leaves such rows out, {refused.count} of {len(rows)}" in told
        first = next(i for i, row in enumerate(rows) if isinstance(row, int)) + 1
        assert f"line {first + (not as_json)}:" in told or f"row {first}, " in told


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.integers(0, 13), st.sampled_from("aqbmu")), min_size=1, max_size=25),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.integers(1, 70),
)
def test_rows_do_not_depend_on_the_blocks_that_are_read(tmp_path_factory, kinds, end, block):
    forms = {"a": "u,{0},{1}", "q": '"u,{0}",{0},"{1}"', "b": "", "m": '"u\n{0}",x,{1}', "u": "ü\u2028{0},\x0b7,{1}"}
    rows = [
        BAD_CSV[kind] if isinstance(kind, int) else forms[kind].format(i, T0 + i).encode()
        for i, kind in enumerate(kinds)
    ]
    content = end.join([b"user,item,time", b"z,0,1500000000", *rows])
    path = written(tmp_path_factory.mktemp("raw") / "file", content)
    found = []
    for size in (delimited.BLOCK, block):
        with mock.patch.object(delimited, "BLOCK", size):
            read, raw, refused = read_raw(path, sources.Wanted(skip_bad_rows=True))
        found.append((read, raw.num_rows, raw.refused, refused.lines))
    assert found[0] == found[1] and len(found[0][0]) == 1 + sum(isinstance(kind, str) and kind != "b" for kind in kinds)


def test_a_quote_that_is_not_closed_costs_one_row(tmp_path):
    rows = [f"I{i},Red bolt {i}" for i in range(10)]
    rows[4], rows[7] = 'I4,"Heavy duty', 'I7,Red "wide" pad'
    path = written(tmp_path / "items.csv", "\n".join(["item,title", *rows]))
    assert "items.csv, line 6: a quote opens a field" in problems_of(read_items, path)
    items, counts, refused = read_items(path, skip=True)
    assert [item.original_id for item in items] == [f"I{i}" for i in range(10) if i != 4]
    assert items[6].title == 'Red "wide" pad' and counts["rows"] == 10 and refused.count == counts["refused"] == 1
    # Two such quotes make one field of the rows between them.
    rows[7], rows[8] = "I7,Red pad", 'I8,19 inch"'
    written(path, "\n".join(["item,title", *rows]))
    assert "line 6: a quote opens a field, and all lines up to the next quote look like rows" in problems_of(
        read_items, path
    )
    items, counts, _ = read_items(path, skip=True)
    assert len(items) == 9 and counts["rows"] == 10 and items[-2].title == '19 inch"'
    # Texts of several lines are as they were.
    written(path, 'item,title,description\nI1,"One, ""two""","A line,\nand, another\n\nend"\nI2,x,y\n')
    items, _, _ = read_items(path)
    assert [item.title for item in items] == ['One, "two"', "x"] and items[0].description == "A line, and, another end"


def test_a_tab_separated_file_with_stray_quotes_has_no_quoting(tmp_path):
    rows = [f"I{i}\tBolt {i}" for i in range(6)]
    rows[1], rows[4] = 'I1\t"Heavy duty tape', 'I4\t"Last one'
    path = written(tmp_path / "items.tsv", "item\ttitle\n" + "\n".join(rows))
    items, counts, _ = read_items(path)
    assert counts["rows"] == len(items) == 6 and items[1].title == '"Heavy duty tape'
    written(path, 'item\ttitle\nI1\t"Wide ""B"" tape\tof two"\n')  # as programs write it
    assert read_items(path)[0][0].title == 'Wide "B" tape of two'


def test_a_key_that_occurs_late_counts_for_all_rows(tmp_path):
    rows = [{"parent_asin": f"I{i}", "title": f"Bolt {i}"} for i in range(1500)]
    for row in rows[-9:]:
        row["description"] = "late"
    path = written(tmp_path / "items.jsonl", "\n".join(map(json.dumps, rows)))
    assert sum(item.description == "late" for item in read_items(path)[0]) == 9
    rows[-1]["name"] = "Also a title"
    written(path, "\n".join(map(json.dumps, rows)))
    assert "title and name could each be the title" in problems_of(read_items, path)
    rows[-1] = {"parent_asin": "I1499", "description": "late"}
    untitled = [{"parent_asin": f"J{i}"} for i in range(1200)]
    written(path, "\n".join(map(json.dumps, untitled + rows)))
    assert len(read_items(path)[0]) == 1499 and read_items(path)[1]["untitled"] == 1201
    array = written(tmp_path / "items.json", json.dumps(rows[:-1]))
    assert sum(item.description == "late" for item in read_items(array)[0]) == 8


def test_a_column_without_values_is_not_the_id(tmp_path):
    rows = [{"asin": "", "kindle_asin": "", "book_id": str(i), "title": f"Book {i}"} for i in range(5)]
    path = written(tmp_path / "books", "\n".join(map(json.dumps, rows)))
    assert [item.original_id for item in read_items(path)[0]] == list("01234")
    written(path, "asin,book_id,title\n" + "".join(f"nan,{i},Book\n" for i in range(5)))
    assert len(read_items(path)[0]) == 5
    pq.write_table(pa.Table.from_pylist([{**row, "asin": None} for row in rows]), path)
    assert len(read_items(path)[0]) == 5


# --- Layouts ----------------------------------------------------------------------------------------------------------

ROWS = [("1", "Ä", T0), ("2", "7", T0 + 60), ("1", "9", T0 + 86400)]


def table(delimiter=",", header=True, rows=ROWS, end="\n") -> str:
    lines = [("user", "item", "time")] * header + rows
    return "".join(delimiter.join(map(str, row)) + end for row in lines)


def zipped(content: bytes, *names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return file.getvalue()


def objects(rows=ROWS) -> list[dict]:
    return [dict(zip(("user", "item", "time"), row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    ("content", "layout", "given"),
    [
        *((table(delimiter), {}, {}) for delimiter in ("\t", ";", "|", "::", " ; ")),
        (table("^"), {"delimiter": "^"}, {}),
        (table("~~"), {"delimiter": "~~"}, {}),
        (table(end="\r\n"), {}, {}),
        (table(end="\r"), {}, {}),
        ("\ufeff" + table(), {}, {}),
        ("\n\n" + table() + "\n \n", {}, {}),
        (table().encode("utf-16"), {}, {}),
        (table().encode("utf-16-le"), {"encoding": "utf-16-le"}, {}),
        (table().encode("latin-1"), {"encoding": "latin-1"}, {}),
        (table().encode(), {"encoding": "latin-1"}, {}),  # for the other file
        (table("::", header=False), {"no_header": True}, {"user": "1", "item": "2,9", "time": "3"}),
        (table(), {"no_header": True}, {}),  # of the other file
        ("user,item,time,1,2,3\n" + table(header=False, end=",4,5,6\n"), {}, {}),
        (
            "who,what,time,2018\n" + table(header=False, end=",4\n"),
            {"names": frozenset(["who"])},
            {"user": "who", "item": "what"},
        ),
        (table().encode("utf-16"), {"encoding": "latin-1"}, {}),
        (gzip.compress(table().encode()), {}, {}),
        (bz2.compress(table().encode()), {}, {}),
        (lzma.compress(table().encode()), {}, {}),
        (zipped(table().encode(), "a.csv"), {}, {}),
        (json.dumps(objects(), indent=1), {}, {}),
        ("[\n" + ",\n".join(map(json.dumps, objects())) + "\n]\n", {}, {}),
        ("\n".join(map(repr, objects())), {}, {}),
        (gzip.compress("\n".join(map(repr, objects())).encode()), {}, {}),
    ],
    ids=range(28),
)
def test_layouts_are_recognized_or_named(tmp_path, content, layout, given):
    path = written(tmp_path / "file", content)
    found, raw, _ = read_raw(path, layout=Layout(**layout), **given)
    assert sorted((u, i, t) for u, i, t in found) == sorted(ROWS) and raw.num_rows == 3 and not raw.refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table(header=False), "line 1 looks like a row, not like the names of columns: '1', 'Ä', '1500000000'; give"),
        ("u,i,2018-01-02\n", "line 1 looks like a row"),
        ("u\ti\t01/02/2018 10:00\n", "line 1 looks like a row"),
        ("user;name,item;time|x\nu;i,j;1\nv,w;i;1|x\n", "could each separate its columns; name one with --delimiter"),
        ("x,Nut,new\n", "the file has 'x', 'Nut', 'new'; if that is a row, give --no_header True"),
        (table().encode("latin-1"), "is not UTF-8 (byte 0xc4); name the file's --encoding"),
        (zipped(b"x", "a", "b"), "is an archive of 2 files; unpack it and name one of them"),
        (b"\x28\xb5\x2f\xfd0000", "is compressed by zstd"),
        ('[{"user": 1}, {"user"', "row 2 is not JSON, or the array does not end"),
        ("[1] x", "line 1: is not JSON"),
        ("user,item,time\nu,i," + "x" * 5000, "has more than 2,000 characters; is it a file of rows?"),
        (json.dumps({"user": "x" * 5000}), "has more than 2,000 characters"),
        (json.dumps([{"user": "x" * 5000}]), "row 1 has more than 2,000 characters; is it an array of rows?"),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_is_not_safe_to_find_out_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(delimited, "MOST_LINE", 2000)
    monkeypatch.setattr(json_rows, "MOST_LINE", 2000)
    assert message in problems_of(read_raw, written(tmp_path / "file", content))


def test_ids_keep_their_digits(tmp_path):
    path = tmp_path / "file"
    for kind, values in (
        (pa.decimal128(20), [Decimal(7), Decimal(2**60)]),
        (pa.float64(), [7.0, 2.0**52]),
        (pa.float32(), [7.0, 2.0**23]),
        (pa.string(), ["7", "7.0"]),
        (pa.binary(), [b"7", b"\xff7"]),
        (pa.binary(16), [uuid.UUID(int=7).bytes, uuid.UUID(int=2**127 + 8).bytes]),
        (pa.dictionary(pa.int32(), pa.string()), ["7", "8"]),
    ):
        pq.write_table(pa.table({"user": pa.array(values, kind), "item": [1, 1], "time": [T0, T0 + 9]}), path)
        users = {user for user, _, _ in read_raw(path)[0]}
        assert len(users) == (1 if kind == pa.string() else 2), kind
    for kind, value in ((pa.float64(), 2.0**53), (pa.float32(), 2.0**24), (pa.float16(), 2.0**11)):
        pq.write_table(pa.table({"user": pa.array([np.float16(value) if value < 4096 else value], kind), "item": [1],
                                 "time": [T0]}), path)  # fmt: skip
        assert "lost digits when it was stored as a float" in problems_of(read_raw, path)
    assert [cells.identifier(text) for text in ("7.0", "-7.00", "07.0", "7.5", "1e5", "7.")] == [
        "7", "-7", "07.0", "7.5", "1e5", "7."]  # fmt: skip
    assert cells.identifier("9.007199254740992e+15") is None and cells.identifier("9007199254740993.0") is None


def test_ids_written_both_ways_are_one(tmp_path):
    path = written(tmp_path / "file", table(rows=[("7", "1.0", T0), ("7.0", "1", T0 + 5)]))
    assert {row[:2] for row in read_raw(path)[0]} == {("7", "1")}


# --- Times ------------------------------------------------------------------------------------------------------------


def times_of(path, *values, form="", zone=UTC):
    wanted = sources.Wanted(time_format=form, zone=zone)
    return [row[2] for row in read_raw(written(path, table(rows=[("u", "i", value) for value in values])), wanted)[0]]


def test_times_that_are_dates_as_numbers_are_not_seconds(tmp_path):
    path = tmp_path / "file"
    for form, values in {
        "%Y": (2018, 2019),
        "%Y%m": (201810, 201901),
        "%Y%m%d": (20181014, 20190101),
        "%Y%m%d%H": (2018101412, 2019010100),
        "%Y%m%d%H%M": (201810141230, 201901010000),
    }.items():
        assert f"give --time_format {form}, or" in problems_of(times_of, path, *values)
        expected = [datetime.strptime(str(value), form).replace(tzinfo=UTC).timestamp() for value in values]
        assert times_of(path, *values, form=form) == expected
    assert "1 of 2 times are numbers that look like dates, such as '20181014'" in problems_of(
        times_of, path, 20181014, T0
    )
    assert "1 of 2 times are" in problems_of(times_of, path, "20181014.0", "2018-10-15")
    assert times_of(path, 20181014, form="s") == [20181014]
    assert times_of(path, 20181014, 20181399, 5) == [20181014, 20181399, 5]  # count from the start of a log
    assert times_of(path, 1500, 2, form="ms") == [1.5, 0.002]


def test_times_in_common_forms(tmp_path):
    path, noon = tmp_path / "file", datetime(2018, 1, 1, 12, tzinfo=UTC).timestamp()
    assert times_of(path, "2018-01-01 14:00:00 +0200", "2018-01-01 12:00:00.123456789 +0000 UTC") == [
        noon,
        noon + 0.123456,
    ]
    forms = ["2018-01-01 12:00:00 UTC", "2018-01-01 12:00:00.000 GMT", "2018-01-01T12:00Z", "2018-01-01 12:00:00+0000"]
    assert times_of(path, *forms) == [noon] * 4
    assert times_of(path, "01/13/2018 09:30", form="%m/%d/%Y %H:%M") == [
        datetime(2018, 1, 13, 9, 30, tzinfo=UTC).timestamp()
    ]
    assert times_of(path, "Mon Jan 01 05:00:00 -0700 2018", form="%a %b %d %H:%M:%S %z %Y") == [noon]
    berlin = ZoneInfo("Europe/Berlin")
    assert times_of(path, "2018-01-01 13:00", "2018-01-01 12:00Z", zone=berlin) == [noon, noon]
    assert times_of(path, "01.01.2018 13:00", form="%d.%m.%Y %H:%M", zone=berlin) == [noon]
    assert cleaning.time_window("2018-07", "2018", berlin)[0] == datetime(2018, 6, 30, 22, tzinfo=UTC).timestamp() * 1e6
    assert "found '13/01/2018'; give --time_format, such as" in problems_of(times_of, path, "13/01/2018")
    assert "expected a time of the form %Y" in problems_of(times_of, path, "2018-10", form="%Y")
    assert cells.microseconds(Decimal(T0)) == T0 * 10**6 and cells.microseconds(date(2018, 1, 1))


# --- What counts ------------------------------------------------------------------------------------------------------


def test_events_and_ratings_are_chosen_and_counted(tmp_path):
    lines = [
        "user,item,ts,event,rating",
        "a,1,100,view,",
        ",2,200,view,",
        "a,3,300,buy,5",
        "b,3,300, buy,3.5",
        "b,4,9,cart,4",
    ]
    path = written(tmp_path / "file", "\n".join(lines))
    found, raw, _ = read_raw(path, sources.Wanted(events=frozenset({"buy", "cart"})))
    assert len(found) == 3 and raw.num_rows == 5 and raw.steps == {"events buy, cart": 3}
    found, raw, _ = read_raw(path, sources.Wanted(events=frozenset({"buy", "cart"}), min_rating=4))
    assert sorted(row[0] for row in found) == ["a", "b"] and list(raw.steps.values()) == [3, 2]
    assert "events buyy; it has view 2, buy 2, cart 1" in problems_of(
        read_raw, path, sources.Wanted(events=frozenset({"buyy"}))
    )
    assert "row 1, rating: expected a number, found ''" in problems_of(read_raw, path, sources.Wanted(min_rating=4))


def spool_of(tmp_path, rows) -> cleaning.Spool:
    spool = cleaning.Spool(str(tmp_path / "spool"), cleaning.INTERACTION)
    records = np.array(rows, cleaning.INTERACTION)
    spool.append(records["user"] % spool.parts, records)
    return spool


def test_repeats_and_sessions(tmp_path):
    minute = 60 * 10**6
    spool = spool_of(
        tmp_path, [(0, 5, 0), (0, 5, minute), (0, 6, 2 * minute), (0, 5, 40 * minute), (64, 5, 41 * minute)]
    )
    cleaning.drop_repeats(spool)
    assert [record["item"] for records in spool for record in records] == [5, 6, 5, 5]
    sessions = cleaning.split_sessions(spool, 30 * minute)
    users = [record["user"] for records in spool for record in records]
    assert users == [0, 0, 1, 2] and sessions.tolist() == [0, 0, 64]
    names = [f"u{i}" for i in range(65)]
    assert cleaning.session_names(names, sessions) == ["u0/1", "u0/2", "u64/1"]


@pytest.fixture
def raw(tmp_path) -> dict[str, str]:
    """Views and purchases of 20 users, each item viewed before it is bought, in two sessions."""
    rng = random.Random(0)
    lines = ["user;item;when;what;stars"]
    for user in range(20):
        for step in range(8):
            day = datetime(2018, 1, 1 + step // 4, 10, step % 4 * 5, tzinfo=UTC)
            item = (user + step * rng.choice([1, 2])) % 12
            lines += [f"u{user};{item};{day:%m/%d/%Y %H:%M};{what};{1 + step % 5}" for what in ("view", "buy")]
    lines.append("u0;;01/01/2018 09:00;buy;5")
    written(tmp_path / "log.csv", "\n".join(lines))
    written(
        tmp_path / "items.tsv",
        "id\tname\n" + "\n".join(f"{i}\tRed {['nut', 'bolt'][i % 2]} {i}" for i in range(12)),
    )
    files = {"interactions": str(tmp_path / "log.csv"), "items": str(tmp_path / "items.tsv")}
    times = {"time_column": "when", "time_format": "%m/%d/%Y %H:%M"}
    return {**files, **times, "category": "T", "codes": 4, "output_dir": str(tmp_path / "out")}


def test_a_log_becomes_sessions_of_purchases(raw, tmp_path, capsys):
    flags = {
        "events": "buy",
        "event_column": "what",
        "min_rating": 2.0,
        "rating_column": "stars",
        "min_interactions": 2,
    }
    assert "row 321, item: expected an item id" in problems_of(prepare_data, **raw, **flags)
    prepare_data(**raw, **flags, skip_bad_rows=True, session_gap=30.0, drop_repeats=True)
    printed = capsys.readouterr().out
    assert "321 rows, 320 read, 1 left out" in printed and "left out: " in printed and "12 rows, 12 read" in printed
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    steps = {step["step"]: step["interactions"] for step in record["interactions"]}
    assert steps["read"] == 320 and steps["events buy"] == 161 and steps["rated 2 or more"] == 121
    assert record["interactions"][0]["refused"] == 1 and record["arguments"]["session_gap"] == 30
    rows = [line.split(",")[0] for line in (tmp_path / "out" / "train" / "T.csv").read_text().splitlines()[1:]]
    assert {user.split("/")[1] for user in rows} == {"1", "2"}


def test_flags_that_do_nothing_are_refused(raw):
    told = problems_of(
        prepare_data,
        **raw,
        time_zone="Mars/Base",
        event_column="what",
        delimiter='"',
        encoding="klingon",
        session_gap=-1.0,
    )
    for message in (
        "--time_zone 'Mars/Base': is no time zone",
        "--event_column: without --events it does nothing",
        "--delimiter '\"': must not contain quotes",
        "--encoding klingon: is unknown",
        "--session_gap -1.0: must be 0 or more",
    ):
        assert message in told


# --- What is written --------------------------------------------------------------------------------------------------


def test_a_dangling_link_and_a_lost_race_are_refused(raw, tmp_path, monkeypatch):
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    assert "exists already" in problems_of(prepare_data, **{**raw, "output_dir": str(tmp_path / "link")})
    (tmp_path / "made").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "came into being in the meantime" in problems_of(
        writing.publish, str(tmp_path / "made"), str(tmp_path / "other")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_ended_leaves_no_scratch_folder(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, writing.scratch_folder(str(tmp_path / "out")) as folder:
        assert os.path.isdir(folder)
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # again, while it is removed
    assert end.value.code == 128 + number and os.listdir(tmp_path) == [] and signal.getsignal(number) == before


def test_new_items_take_free_ids_of_known_codes(raw, tmp_path, capsys):
    prepare_data(**raw, skip_bad_rows=True, min_interactions=2, levels=2)
    new = [("n1", "Red bolt 1"), ("n2", "Zyx"), *((f"m{i}", "Red nut 4") for i in range(2))]
    written(tmp_path / "new.csv", "id,name\n" + "".join(f"{item},{title}\n" for item, title in new))
    capsys.readouterr()
    prepare_data(add_items=str(tmp_path / "new.csv"), dataset=raw["output_dir"], output_dir=str(tmp_path / "more"))
    printed = capsys.readouterr().out
    assert "note: 1 new items have no word that the items of the data set have, such as 'Zyx'" in printed
    assert "note: 3 new items have the title of another item, such as 'Red bolt 1'" in printed
    assert "are new tokens" not in printed
    index = json.loads((tmp_path / "more" / "index" / "T.index.json").read_text())
    assert len({"".join(sid) for sid in index.values()}) == len(index) == 16
    assert {len(sid) for item, sid in index.items() if int(item) >= 12} == {2}


def test_ids_may_be_made_of_brand_and_price(tmp_path):
    files = {"interactions": str(tmp_path / "log.csv"), "items": str(tmp_path / "items.csv")}
    log = [f"u{i % 10},{i * 3 % 7},{T0 + i}" for i in range(60)]
    written(tmp_path / "log.csv", "\n".join(["user,item,ts", *log]))
    rows = [f"{i},Thing {chr(97 + i) * 3},{'Acme' if i % 2 else 'Best'},{3 + i % 2}.50" for i in range(7)]
    written(tmp_path / "items.csv", "\n".join(["id,title,brand,price", *rows]))
    flags = {"category": "T", "codes": 2, "levels": 1, "collisions": "keep", "min_interactions": 1}
    prepare_data(**files, **flags, output_dir=str(tmp_path / "out"), text_columns="brand,price")
    index = json.loads((tmp_path / "out" / "index" / "T.index.json").read_text())
    assert len({(i % 2, *index[str(i)]) for i in range(7)}) == 2  # the brand is the code
    written(tmp_path / "new.csv", "id,title,brand\n9,Other,Acme\n")
    prepare_data(add_items=str(tmp_path / "new.csv"), dataset=str(tmp_path / "out"), output_dir=str(tmp_path / "more"))
    items = json.loads((tmp_path / "more" / "index" / "T.item.json").read_text())
    brands = {item: fields["brand"] for item, fields in items.items()}
    index = json.loads((tmp_path / "more" / "index" / "T.index.json").read_text())
    assert index["7"] in [index[item] for item, brand in brands.items() if brand == "Acme" and item != "7"]
    assert items["0"]["price"] in ("3.50", "4.50") and "price" not in items["7"]
    told = problems_of(prepare_data, **files, **flags, output_dir=str(tmp_path / "x"), text_columns="title,colour")
    assert "--text_columns 'title,colour': must be some of title, description, brand" in told


def test_the_nearest_free_id_is_found_where_one_is_left():
    books = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    known = np.ones((3, 4), bool)
    known[1, 3] = False
    used: set[tuple[int, ...]] = set()
    free = semantic_ids.FreeIds(books, known)
    while (codes := free.nearest(books[0, 0], used)) is not None:
        assert codes not in used and codes[1] != 3
        used.add(codes)
    assert len(used) == 4 * 3 * 4
