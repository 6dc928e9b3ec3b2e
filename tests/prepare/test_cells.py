"""What a cell means: ids, times and texts."""

import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_files import T0, problems_of, read, read_seconds, table, written

from minionerec.prepare import cells, cleaning, sources
from minionerec.prepare.formats import values_of


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
        users = {user for user, _, _ in read_seconds(path)[0]}
        assert len(users) == (1 if kind == pa.string() else 2), kind
    for kind, value in ((pa.float64(), 2.0**53), (pa.float32(), 2.0**24), (pa.float16(), 2.0**11)):
        pq.write_table(pa.table({"user": pa.array([np.float16(value) if value < 4096 else value], kind), "item": [1],
                                 "time": [T0]}), path)  # fmt: skip
        assert "lost digits when it was stored as a float" in problems_of(read_seconds, path)
    assert [cells.identifier(text) for text in ("7.0", "-7.00", "07.0", "7.5", "1e5", "7.")] == [
        "7", "-7", "07.0", "7.5", "1e5", "7."]  # fmt: skip
    assert cells.identifier("9.007199254740992e+15") is None and cells.identifier("9007199254740993.0") is None


def test_ids_written_both_ways_are_one(tmp_path):
    path = written(tmp_path / "file", table(rows=[("7", "1.0", T0), ("7.0", "1", T0 + 5)]))
    assert {row[:2] for row in read_seconds(path)[0]} == {("7", "1")}


def test_ids_of_a_country_with_decimal_commas_are_read_as_others(tmp_path):
    path = written(tmp_path / "file", table(";", rows=[("7", "1,0", T0), ("7,0", "1", T0 + 5), ("8,00", "1,5", T0)]))
    assert {row[:2] for row in read_seconds(path)[0]} == {("7", "1"), ("8,00", "1,5")}
    assert cells.identifier("9,007199254740992e+15") is None


def times_of(path, *values, form="", zone=UTC):
    wanted = sources.Wanted(time_format=form, zone=zone)
    return [
        row[2] for row in read_seconds(written(path, table(rows=[("u", "i", value) for value in values])), wanted)[0]
    ]


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
    assert "found '2018_10_14'; give --time_format, such as" in problems_of(times_of, path, "2018_10_14", T0)
    assert times_of(path, "2018-01-01_12:00", f"{noon:.0f}") == times_of(path, "2018_01_01 12", form="%Y_%m_%d %H") * 2
    assert "expected a time of the form %Y" in problems_of(times_of, path, "2018-10", form="%Y")
    for form in ("", "ms"):
        problem = problems_of(times_of, path, "1538340000000", "1.53834E+12", form=form)
        assert "row 2, time: lost digits when a spreadsheet shortened it" in problem
    assert times_of(path, "1.53834e+09", "1.53834e+18", "1.53834E+18") == [1538340000] * 3
    assert cells.microseconds(Decimal(T0)) == T0 * 10**6 and cells.microseconds(date(2018, 1, 1))


@pytest.mark.parametrize("cell", ["4.00638E+12", "1.23457E+11", " 5E+12 ", "4,00638E+12"])
def test_an_id_that_a_spreadsheet_shortened_is_refused(cell):
    """Several barcodes begin with the six digits that are left."""
    assert cells.identifier(cell) is None and cells.identifier(cell.encode()) is None
    assert cells.not_an_id("item", cell).startswith("lost digits when a spreadsheet shortened it")
    assert cells.identifier("1.2e+15") == "1200000000000000"  # as pandas writes a whole float


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


def test_parquet_values_that_python_cannot_hold(tmp_path):
    rows = {"user": ["7", "7"], "item": ["8", "9"], "time": [T0, T0 + 1]}
    never = {
        "seen": pa.array([2**62, 0], pa.timestamp("us")),
        "day": pa.array([2**31 - 1, 0], pa.int32()).cast(pa.date32()),
        "took": pa.array([2**62, 0], pa.duration("ms")),
    }
    for name, column in never.items():
        pq.write_table(pa.table({**rows, name: column}), tmp_path / "other.parquet")
        assert read(tmp_path / "other.parquet") == [("7", "8", T0 * 10**6), ("7", "9", (T0 + 1) * 10**6)]
    pq.write_table(pa.table({**rows, "time": never["seen"]}), tmp_path / "time.parquet")
    assert "row 1, time: expected a date or seconds" in problems_of(read, tmp_path / "time.parquet")


def test_parquet_prices_are_as_they_were_written():
    for kind in (pa.float32(), pa.float64()):
        assert values_of(pa.array([19.99, None, 1e-7, 3.0, float("inf")], kind)) == [
            19.99,
            None,
            1e-7,
            3.0,
            float("inf"),
        ]
    (large,) = values_of(pa.array([2.0**25], pa.float32()))
    assert isinstance(large, cells.Rounded) and np.isnan(values_of(pa.array([float("nan")], pa.float32()))[0])


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
        ("Pens&notebooks &copy DVD &copy; &#x41;&#66;", "Pens&notebooks &copy DVD © AB"),
        ("螺丝 🔩 M3", "螺丝 🔩 M3"),
        ("half \ud83d", "half ?"),
        ("\u200b", ""),
        ("\u202e \u202c", ""),
        (["\ufeff", "\u200fa"], "\u200fa"),
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
