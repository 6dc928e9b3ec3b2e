"""Every row of a raw file is read as it is meant, the same from every format, or refused and counted; none is lost."""

import gzip
import io
import json
import zipfile

import pytest
from helpers import encoded
from hypothesis import given
from hypothesis import strategies as st
from raw_files import BAD_CSV, T0, problems_of, read, read_items, read_seconds, written

from minionerec.data.files import present
from minionerec.errors import InputError
from minionerec.prepare import sources

GOOD_ROW = st.tuples(st.sampled_from(["a", "b", "ü"]), st.integers(0, 9), st.integers(T0, T0 + 10**8))


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


def test_exports_that_were_joined_repeat_their_header(tmp_path):
    """Its names are no row: an item whose title is `title` would be sold."""
    header, later = "user,item,time\n", f"2,8,{T0 + 1}\n"
    path = written(tmp_path / "file", f"{header}1,7,{T0}\n{header}{later}{header}")
    found, raw, refused = read_seconds(path)
    assert found == [("1", "7", T0), ("2", "8", T0 + 1)] and (raw.num_rows, refused.count) == (2, 0)
    written(path, f"{header}{header}1,7,{T0}\n2,8,soon\n")
    assert "row 2, time: expected a date" in (told := problems_of(read_seconds, path)) and "(line 4)" in told
    items, counts, _ = read_items(written(path, "id\tname\n7\tA\nid\tname\n8\tB\n"))
    assert [item.title for item in items] == ["A", "B"] and counts["rows"] == 2
    assert "has no rows" in problems_of(read_items, written(path, "id\tname\nid\tname\n"))
    # Those of Excel in UTF-8 begin with a mark each.
    items, counts, _ = read_items(written(path, "\ufeffid,name\n7,A\n\ufeffid,name\n8,B\nid,name\n"))
    assert [item.original_id for item in items] == ["7", "8"] and counts["rows"] == 2


@given(st.lists(st.one_of(GOOD_ROW, st.integers(0, 100)), min_size=1, max_size=25), st.booleans())
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
    found, raw, refused = read_seconds(path, sources.Wanted(skip_bad_rows=True))
    assert sorted(found) == sorted(expected)
    assert raw.num_rows == len(rows) and raw.refused == refused.count == len(rows) - len(expected)
    if refused.count:
        told = problems_of(read_seconds, path)
        assert f"leaves such rows out, {refused.count} of {len(rows)}" in told
        first = next(i for i, row in enumerate(rows) if isinstance(row, int)) + 1
        assert f"line {first + (not as_json)}:" in told or f"row {first}, " in told


IDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)


IDS = IDS.map(present).filter(bool)


ROWS = st.lists(st.tuples(IDS, IDS, st.integers(1_000_000_000, 1_900_000_000)), min_size=1, max_size=30)


FORMATS = ["csv", "tsv", "json", "parquet"]


def by_user(rows):
    """The order that a spool keeps: users apart, each one's rows in the order of the file."""
    order: dict[str, list] = {}
    for row in rows:
        order.setdefault(row[0], []).append(row)
    return order


@given(ROWS, st.sampled_from(FORMATS), st.booleans())
def test_every_format_gives_the_same_interactions(tmp_path_factory, rows, form, zipped):
    path = tmp_path_factory.mktemp("raw") / "file"
    cells = [{"user_id": user, "item_id": item, "timestamp": time} for user, item, time in rows]
    path.write_bytes(encoded(cells, form, zipped))
    assert by_user(read(path)) == by_user((user, item, time * 1_000_000) for user, item, time in rows)


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


GOOD = "user,item,time\nu,i,1\n"


def zipped(*names: str) -> bytes:
    """An archive of files with these names."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


REFUSED = [
    (b"", "is empty"),
    (b"  \n", "is empty"),
    (b"\x1f\x8b", "cannot be read"),
    (gzip.compress(GOOD.encode() * 5000)[:-20], "cannot be read"),
    (b"PAR1abc", "cannot be read"),
    (b"\x00\x01\x02", "is neither Parquet nor UTF-8 text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an Excel workbook of before 2007; give a CSV"),
    (zipped("[Content_Types].xml", "xl/workbook.xml"), "is an Excel workbook; save its sheet as CSV"),
    (zipped("a.csv", "b.csv"), "is an archive of 2 files; unpack it and name one of them"),
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
    (b'{\n "1": {"title": "Nut"}\n}\n', "is one JSON object; give an object per row"),
    (b'{"1": {"title": "Nut"}, "2": {"title": "Bolt"}}', "is one JSON object; give an object per row"),
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
