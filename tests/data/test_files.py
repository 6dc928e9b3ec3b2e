import csv
import json
import os

import pytest
from helpers import COLUMNS

from minionerec.data import files as data_files
from minionerec.errors import InputError


def write(path, rows, header=COLUMNS):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def row(titles="['x']", title="y", sids="['<a>']", sid="<b>"):
    return ["u", titles, title, "[1]", "2", sids, sid]


def problem(function, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    return str(error.value)


def test_cells_survive_the_round_trip(tmp_path):
    titles = ["a, \"b\" 'c'", "line\nbreak", "Été {x}"]
    path = write(tmp_path / "t.csv", [row(str(titles), "it's, “new”", "['<a>', '<b>', '<a>']")])
    (read,) = data_files.read_interactions(path, "train_file", ["<a>", "<b>"])
    assert read == data_files.Interaction(["<a>", "<b>", "<a>"], titles, "<b>", "it's, “new”")


def test_lists_may_be_json(tmp_path):
    titles = ["a \U0001f600", "it's", 'say "x"\n']
    for cell in (json.dumps(titles), json.dumps(titles, ensure_ascii=False), str(titles)):
        path = write(tmp_path / "t.csv", [row(cell, "x", "['<a>', '<b>', '<a>']")])
        (read,) = data_files.read_interactions(path, "train_file")
        assert read.title_history == titles
    half = write(tmp_path / "t.csv", [row('["\\ud83d", "b", "c"]', "x", "['<a>', '<b>', '<a>']")])
    assert "must be a list of texts" in problem(data_files.count_rows, half, "train_file")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(sids="__import__('os').system('touch hacked')"), "history_item_sid must be a list of texts"),
        (row(sids="[" * 5000), "history_item_sid must be a list of texts"),
        (row(sids="['<a>' '<b>']"), "history_item_sid must be a list of texts with commas"),
        (row(titles="['x'  \"y\"]"), "history_item_title must be a list of texts with commas"),
        (row(titles="5"), "history_item_title must be a list of texts"),
        (row(sids="[]", titles="[]"), "history_item_sid is empty"),
        (row(titles="['x', 'y']"), "history_item_title has 2 entries, history_item_sid 1"),
        (row(sid="<z>"), "SID '<z>' is not in the index"),
        (["u", "['x']"], "the row ends before column"),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    path = write(tmp_path / "t.csv", [row(), bad])
    text = problem(data_files.count_rows, path, "train_file", ["<a>", "<b>"])
    assert text.startswith(f"--train_file {path}, line 3: {message}")
    assert not (tmp_path / "hacked").exists()


def test_many_problems_are_counted(tmp_path):
    path = write(tmp_path / "t.csv", [row(sid="<z>")] * 9)
    lines = problem(data_files.count_rows, path, "train_file", ["<a>"]).splitlines()
    assert len(lines) == 6
    assert lines[-1].endswith("4 more problems like these")


def test_bad_files_are_named(tmp_path):
    assert "no such file" in problem(data_files.count_rows, str(tmp_path / "none.csv"), "train_file")
    assert "--train_file is missing" in problem(data_files.count_rows, "", "train_file")
    assert "has no rows" in problem(data_files.count_rows, write(tmp_path / "e.csv", []), "train_file")
    path = write(tmp_path / "c.csv", [row()], [*COLUMNS[:-1], "sid"])
    assert "column item_sid is missing" in problem(data_files.count_rows, path, "train_file")
    (tmp_path / "latin.csv").write_bytes(",".join(COLUMNS).encode() + b"\nu,\xe9\n")
    assert "is not UTF-8" in problem(data_files.count_rows, str(tmp_path / "latin.csv"), "train_file")


def test_titles_are_not_needed_where_no_task_reads_them(tmp_path):
    path = write(tmp_path / "t.csv", [["['<a>']", "<b>"]], ["history_item_sid", "item_sid"])
    assert data_files.count_rows(path, "test_data_path", titles=False) == 1


def test_catalogue(files):
    catalogue = data_files.read_catalogue(files["index"], files["item"])
    assert len(catalogue.items) == 40
    assert len(catalogue.sids) == 39
    assert catalogue.items["0"].description == "A bolt. Number 0."
    assert "<a_0>" in catalogue.sid_tokens
    assert data_files.read_info(files["info"], catalogue) == list(
        dict.fromkeys(i.sid for i in catalogue.items.values())
    )


def test_bad_catalogues_are_named(tmp_path):
    path = tmp_path / "index.json"
    for content, message in (
        ("{", "is not JSON"),
        ('{"1": ["<a_1>"], "2": ["<a_2>"], "1": ["<a_3>"]}', "is not JSON: '1' occurs twice in an object"),
        ("{}", "non-empty object"),
        ('{"7": []}', "item '7': expected a list of SID tokens"),
        ('{"7": "<a_1>"}', "item '7': expected a list of SID tokens"),
    ):
        path.write_text(content)
        text = problem(data_files.read_catalogue, str(path))
        assert text.startswith(f"--sid_index_path {path}") and message in text


def test_the_flag_of_swapped_files_is_named(tmp_path):
    """Each file is good by itself, so only the flag says what is wrong."""
    index, texts, info = (str(tmp_path / name) for name in ("index.json", "item.json", "info.txt"))
    for path, content in ((index, '{"7": ["<a>"]}'), (texts, '{"7": {"title": "Bolt"}}'), (info, "<a>\tBolt\t7\n")):
        with open(path, "w") as file:
            file.write(content)
    assert problem(data_files.read_catalogue, texts, index).startswith(f"--sid_index_path {texts}, item '7': ")
    assert problem(data_files.read_catalogue, index, index).startswith(f"--item_meta_path {index}, item '7': ")
    assert problem(data_files.read_info_items, index).startswith(f"--info_file {index}, line 1: ")
    assert problem(data_files.read_info, info, data_files.Catalogue({}, [], {})).startswith(f"--info_file {info}, line")


def test_the_header_of_a_long_line_is_cut(tmp_path):
    """As where an index, JSON in one line, is given for rows."""
    path = tmp_path / "index.json"
    path.write_text(json.dumps({str(number): ["<a_1>", "<b_1>"] for number in range(10_000)}))
    for read in (data_files.count_rows, lambda *args: list(data_files.read_interactions(*args))):
        text = problem(read, str(path), "train_file")
        assert text.startswith(f"--train_file {path}: column ") and len(text) < 500


def test_both_files_of_a_catalogue_are_missed_together():
    with pytest.raises(InputError) as error:
        data_files.read_catalogue("here", "there")
    assert error.value.problems == ["--sid_index_path here: no such file", "--item_meta_path there: no such file"]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text("{}")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(InputError, match="may not be read; its permissions forbid it"):
        data_files.read_json_object(str(tmp_path / "index.json"), "sid_index_path")


def test_info_and_index_that_disagree(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"1": ["<a>"], "2": ["<b>"]}))
    catalogue = data_files.read_catalogue(str(tmp_path / "index.json"))
    info = tmp_path / "info.json"
    info.write_text("<b>\tt\t1\n<a>\tt\t9\nbroken\n")
    text = problem(data_files.read_info, str(info), catalogue)
    assert "line 1: item '1' is <b> here and <a> in the index" in text
    assert "line 2: item '9' is not in the index file" in text
    assert "line 3: expected SID<tab>title<tab>item id" in text


def test_samples_are_the_same_for_the_same_seed():
    samples = [list(data_files.sample_rows(iter(range(100)), 100, 10, seed)) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] == sorted(samples[0])
    assert samples[0] != samples[2]
    assert list(data_files.sample_rows(range(5), 5, -1, 1)) == [0, 1, 2, 3, 4]


def test_info_files_that_cannot_be_read(tmp_path):
    info = tmp_path / "info.txt"
    for content, message in (
        (b"\n", "is empty"),
        (b"<a>\t\xe9\t1\n", "is not UTF-8"),
        (b"<a> t 1\n", "expected SID<tab>"),
    ):
        info.write_bytes(content)
        assert message in problem(data_files.read_info, str(info))
    assert "no such file" in problem(data_files.read_info, str(tmp_path / "none.txt"))


def test_bad_metadata_is_named(tmp_path):
    (tmp_path / "index.json").write_text('{"1": ["<a>"]}')
    path = tmp_path / "item.json"
    for content, message in (
        ('{"1": "Bolt"}', "item '1': expected an object with a title"),
        ('{"1": {"title": 5}}', "item '1': title must be text"),
        ('{"2": {"title": "Bolt"}}', "do the two files belong together?"),
    ):
        path.write_text(content)
        assert message in problem(data_files.read_catalogue, str(tmp_path / "index.json"), str(path))
