"""Generated input for the readers: what is valid survives the round trip, everything else is an InputError of single
lines, and nothing is ever executed."""

import csv
import json
import os
import tempfile

import pytest
from helpers import COLUMNS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minionerec.data import files as data_files
from minionerec.data.prompts import load_prompts
from minionerec.errors import InputError

TOKENS = st.builds("<{}_{}>".format, st.sampled_from("abcde"), st.integers(0, 300))
SIDS = st.lists(TOKENS, min_size=1, max_size=5).map("".join)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
HOSTILE = [
    "__import__('pathlib').Path('executed').touch()",
    "[__import__('pathlib').Path('executed').touch()]",
    "[].__class__.__base__.__subclasses__()",
    "['a'] + ['b']",
    '[f\'{open("executed", "w")}\']',
    "['\\ud800']",
    "[b'a']",
    "[['a']]",
    "{'a'}",
    "[" * 2000,
    "-" * 20000 + "1",
    "'" * 5000,
    "['" + "x" * 100_000,
    "\0",
    "nan",
    "",
]
ATTACKS = st.sampled_from(HOSTILE)
CELLS = st.one_of(TEXTS, ATTACKS, st.lists(TEXTS, max_size=3).map(repr), st.integers().map(str))


@pytest.fixture(scope="module", autouse=True)
def in_a_folder_of_its_own(tmp_path_factory):
    """Nothing that stands in the data may leave a file behind."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("hostile")
    os.chdir(folder)
    yield
    os.chdir(before)
    assert not (folder / "executed").exists()


class written:
    """A file with this content, while open."""

    def __init__(self, content: bytes):
        self.content = content

    def __enter__(self) -> str:
        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.write(self.content)
        self.path = file.name
        return self.path

    def __exit__(self, *_):
        os.remove(self.path)


def csv_bytes(rows: list[list[str]], header=COLUMNS) -> bytes:
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
        file.flush()
        file.buffer.seek(0)
        return file.buffer.read()


def read_or_refuse(function, *args, **kwargs):
    """The result, or None where the input was refused, in one complete line per problem."""
    try:
        return function(*args, **kwargs)
    except InputError as error:
        assert error.problems
        for problem in error.problems:
            assert problem and "\n" not in problem and len(problem) < 2000
            problem.encode("utf-8")
        return None


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.lists(st.tuples(SIDS, TEXTS), min_size=1, max_size=6), SIDS, TEXTS), min_size=1, max_size=6)
)
@example([([("<a_0>", "nan")], "<a_0>", " nan ")])
@example([([("<a_0>", " NULL "), ("<a_0>", "null bolt")], "<a_0>", "None")])
def test_valid_interactions_survive_the_round_trip(rows):
    cells = [
        ["u", [title for _, title in past], title, "[]", "0", [sid for sid, _ in past], sid]
        for past, sid, title in rows
    ]
    with written(csv_bytes([[str(cell) for cell in row] for row in cells])) as path:
        read = list(data_files.read_interactions(path, "train_file"))

    def text(title: str) -> str:
        return "" if title.strip() in data_files.MISSING else title

    expected = [
        data_files.Interaction([s for s, _ in past], [text(t) for _, t in past], sid, text(title.strip()))
        for past, sid, title in rows
    ]
    assert read == expected


ROW = ["u", "['t']", "t", "[]", "0", "['<a_1>']", "<a_1>"]
# A good row with one cell changed, or nothing like a row.
ROWS = st.one_of(
    st.builds(lambda i, cell: [*ROW[:i], cell, *ROW[i + 1 :]], st.integers(0, 6), CELLS), st.lists(CELLS, max_size=9)
)


@settings(max_examples=150)
@given(st.lists(ROWS, max_size=5), st.booleans())
def test_any_cells_are_read_or_refused(rows, known):
    with written(csv_bytes(rows)) as path:
        found = read_or_refuse(
            lambda: list(data_files.read_interactions(path, "train_file", {"<a_1>"} if known else None))
        )
    check_rows(found or ())


def check_rows(rows) -> None:
    for row in rows:
        assert row.sid and row.sid_history and len(row.title_history) == len(row.sid_history)
        "".join([row.title, *row.title_history, *row.sid_history]).encode("utf-8")


@pytest.mark.parametrize("cell", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_cells_in_every_column_and_field(cell):
    for column in range(len(ROW)):
        with written(csv_bytes([[*ROW[:column], cell, *ROW[column + 1 :]]])) as path:
            check_rows(read_or_refuse(lambda path=path: list(data_files.read_interactions(path, "train_file"))) or ())
    cell = cell.replace("\\ud800", "\ud800")
    for index, fields in (
        ({"0": [cell]}, {"title": "t"}),
        ({"0": ["<a_1>"]}, {"title": cell}),
        ({"0": ["<a_1>"]}, {"title": "t", "description": cell}),
    ):
        with written(json.dumps(index).encode()) as index_path, written(json.dumps({"0": fields}).encode()) as path:
            catalogue = read_or_refuse(data_files.read_catalogue, index_path, path)
        for item in catalogue.items.values() if catalogue else ():
            f"{item.sid}{item.title}{item.description}".encode()


@settings(max_examples=150)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda t: t.encode("utf-16", "surrogatepass"))))
def test_any_bytes_are_read_or_refused(content):
    header = (",".join(COLUMNS) + "\n").encode()
    for reader, prefix in (
        (lambda path: data_files.count_rows(path, "train_file"), header),
        (lambda path: data_files.count_rows(path, "train_file"), b""),
        (data_files.read_catalogue, b""),
        (data_files.read_titles_and_descriptions, b""),
        (data_files.read_info, b""),
        (lambda path: load_prompts("x", path), b""),
    ):
        with written(prefix + content) as path:
            read_or_refuse(reader, path)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), TEXTS, ATTACKS, st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


FIELDS = st.one_of(
    JSON, st.fixed_dictionaries({"title": st.one_of(TEXTS, JSON), "description": st.one_of(TEXTS, JSON)})
)
SID_LISTS = st.one_of(st.lists(TOKENS, min_size=1, max_size=5), st.lists(JSON, max_size=3), JSON)


@settings(max_examples=150)
@given(st.dictionaries(st.integers(0, 5).map(str), SID_LISTS), FIELDS)
def test_any_catalogue_is_read_or_refused(index, metadata):
    metadata = dict.fromkeys(index, metadata)
    with written(json.dumps(index).encode()) as index_path, written(json.dumps(metadata).encode()) as meta_path:
        catalogue = read_or_refuse(data_files.read_catalogue, index_path, meta_path)
        read_or_refuse(data_files.read_titles_and_descriptions, meta_path)
        read_or_refuse(load_prompts, "x", meta_path)
    for item in catalogue.items.values() if catalogue else ():
        f"{item.sid}{item.title}{item.description}".encode()


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(SIDS, st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]))), min_size=1
    )
)
def test_a_valid_catalogue_and_its_info_file_survive(items):
    index = {str(i): [f"{token}>" for token in sid.split(">")[:-1]] for i, (sid, _) in enumerate(items)}
    lines = "".join(f"{sid}\t{title}\t{i}\n" for i, (sid, title) in enumerate(items))
    with written(json.dumps(index).encode()) as index_path, written(lines.encode()) as info_path:
        catalogue = data_files.read_catalogue(index_path)
        sids = data_files.read_info(info_path, catalogue)
    assert sids == list(dict.fromkeys(sid for sid, _ in items))
    assert [item.sid for item in catalogue.items.values()] == [sid for sid, _ in items]


@settings(max_examples=150)
@given(st.lists(st.text(max_size=60), max_size=8))
def test_any_info_lines_are_read_or_refused(lines):
    with written("\n".join(lines).encode("utf-8", "surrogatepass")) as path:
        sids = read_or_refuse(data_files.read_info, path)
    assert sids is None or (sids and all(sid == sid.strip() != "" for sid in sids))


def test_tens_of_thousands_of_rows_and_a_huge_cell():
    long = [ROW[0], repr(["t" * 5_000_000]), *ROW[2:]]
    with written(csv_bytes([ROW] * 40_000 + [long])) as path:
        assert data_files.count_rows(path, "train_file", {"<a_1>"}) == 40_001
    bad = [*ROW[:5], "5", ROW[6]]
    with written(csv_bytes([bad] * 40_000)) as path, pytest.raises(InputError) as error:
        data_files.count_rows(path, "train_file")
    assert len(error.value.problems) == 6 and "39995 more problems" in error.value.problems[-1]
