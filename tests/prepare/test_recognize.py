"""Layouts of raw files are recognized, or refused where they could be two."""

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile

import pytest
from raw_files import ROWS, problems_of, read, read_seconds, table, written

from minionerec.prepare import delimited, json_rows
from minionerec.prepare.recognize import Layout


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
        *((json.dumps(objects(), indent=indent), {"delimiter": ","}, {}) for indent in (None, 1)),  # of the other file
        ("\n".join(map(json.dumps, objects())), {"delimiter": ","}, {}),
        ("\n".join(repr(row).replace("{'", "{ u'", 1) for row in objects()), {}, {}),
    ],
    ids=range(32),
)
def test_layouts_are_recognized_or_named(tmp_path, content, layout, given):
    path = written(tmp_path / "file", content)
    found, raw, _ = read_seconds(path, layout=Layout(**layout), **given)
    assert sorted((u, i, t) for u, i, t in found) == sorted(ROWS) and raw.num_rows == 3 and not raw.refused


def test_a_chinese_file_is_not_called_latin_1(tmp_path):
    found = problems_of(read_seconds, written(tmp_path / "file", "user,item,time\n1,螺丝刀,3\n".encode("gbk")))
    assert "is not UTF-8 (byte 0xc2); name the file's --encoding, such as gb18030 or cp1252" in found
    found = problems_of(read_seconds, written(tmp_path / "file", "user,item,time\n1,é,3\n".encode("latin-1")))
    assert "--encoding, such as cp1252 or latin-1" in found


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device, and has to be read more than once" in problems_of(read, tmp_path / "pipe")


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
    assert message in problems_of(read_seconds, written(tmp_path / "file", content))
