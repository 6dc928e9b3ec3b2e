"""What a request may say, in a body and in a file: each problem is named, and all together stay small."""

import pytest
from helpers import run_command
from recommended import flags_of, recommended

from minionerec.errors import InputError

BAD = [
    (b"", "the body is not JSON"),
    (b"\xff\xfe", "the body is not JSON"),
    (b'{"history": [', "the body is not JSON"),
    (b"[" * 100_000, "the body is not JSON"),
    (b"[1]", "expected an object"),
    (b'{"history": ["1"], "deny": ["2"], "deny": ["3"]}', "the body is not JSON: 'deny' occurs twice in an object"),
    (b"{}", '"history" is missing or empty'),
    (b'{"history": ["nowhere"]}', "\"history\": 'nowhere' is no item id, SID or title of the info file"),
    (b'{"history": ["\\ud800"]}', '"history" must be a list of item ids, SIDs or titles, found '),
    (b'{"history": ["1"], "K": 21}', '"K" must be a whole number from 1 to 20'),
    (b'{"history": ["1"], "K": 1e400}', '"K" must be a whole number from 1 to 20 (--num_beams), found inf'),
    (b'{"history": ["1"], "where": "a=b"}', '"where" needs --item_meta_path'),
    (b'{"history": ["1"], "\\ud800": 1}', "is unknown; a request may have K, allow"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_bad_bodies_are_named(ask, model, body, message):
    async def steps(post, get):
        return await post(body)

    answer = ask(steps)
    assert answer.status_code == 422 and message in answer.json()["detail"][0]
    assert not model.batches


@pytest.mark.parametrize("name", ["K", "exclude_seen", "allow", "deny", "where"])
def test_null_stands_for_what_is_not_given(reader, name):
    assert reader.read({"history": ["1", "2"], name: None}) == reader.read({"history": ["1", "2"]})


HUGE = {
    "items that are not known": {"history": ["1"], "deny": ["zz"] * 15_000},
    "keys that are not known": {"history": ["1"], **{f"k{i}": 1 for i in range(15_000)}},
    "items of other types": {"history": ["1"], "allow": [[1.5] * 5000] * 10},
    "a long text": {"history": ["z" * 400_000], "where": "z" * 400_000},
}


@pytest.mark.parametrize("kind", HUGE)
def test_errors_have_a_bounded_size(ask, kind):
    async def steps(post, get):
        return await post(HUGE[kind])

    answer = ask(steps)
    assert answer.status_code == 422 and len(answer.content) < 2_000
    if len(answer.json()["detail"]) > 5:
        assert answer.json()["detail"][5:] == ["14,995 more problems like these"]


def test_lists_and_searches_are_limited(ask):
    async def steps(post, get):
        lists = [await post({"history": ["1"], name: ["1"] * 20_001}) for name in ("allow", "deny")]
        searches = [await get("/items", params={"title": text}) for text in ("a " * 21, "a" * 1001, "a " * 20)]
        return lists, searches

    lists, searches = ask(steps)
    for answer, name in zip(lists, ("allow", "deny"), strict=True):
        assert answer.json() == {"detail": [f'"{name}" has 20,001 items; at most 20,000 are allowed']}
    assert [answer.status_code for answer in searches] == [422, 422, 200]
    assert searches[0].json() == {"detail": ["title: at most 20 words are allowed"]} and len(searches[1].content) < 200


CSV = {
    "no target column": ("h.csv", "history_item_sid\n", ""),
    "empty targets": ("h.csv", "history_item_sid,item_sid\n", ","),
    "capitals": ("H.CSV", "history_item_sid,item_sid\n", ",<a_1><b_0><c_1>"),
}


@pytest.mark.parametrize("kind", CSV)
def test_a_csv_file_needs_histories_only(files, checkpoint, tmp_path, kind):
    name, header, target = CSV[kind]
    histories = [["<a_0><b_0><c_0>"], ["<a_1><b_2><c_2>", "<a_2><b_2><c_0>"]]
    lines = "".join(f'"{history}"{target}\n' for history in histories)
    (tmp_path / name).write_text(header + lines)
    found = recommended(files, checkpoint, tmp_path / "o.jsonl", histories=tmp_path / name)
    assert [row["history"] for row in found] == histories and all(len(row["items"]) == 20 for row in found)


def test_columns_that_a_csv_file_cannot_have_are_refused(files, checkpoint, tmp_path):
    (tmp_path / "h.csv").write_text('history,K,exclude_seen\n"[12, 40]",2,True\n')
    done = run_command("recommend.py", **flags_of(files, checkpoint, tmp_path / "o", histories=tmp_path / "h.csv"))
    assert done.returncode == 2 and "only the histories are read, not K, exclude_seen; give JSON lines" in done.stderr


def test_a_history_on_the_command_line(reader):
    titled = reader.items.all[0].title
    for text, history in (
        ("12, 30", ["12", "30"]),
        ('["12", 30]', ["12", 30]),
        (titled, [titled]),
        ("[2-Pack] Glue, 25 ml", ["[2-Pack] Glue, 25 ml"]),
    ):
        reader.items.of_title["[2-Pack] Glue, 25 ml"] = [3, 4]  # of two items: asked for by id, and not split
        assert reader.parse_history(text) == history
    del reader.items.of_title["[2-Pack] Glue, 25 ml"]
    with pytest.raises(InputError, match="is not a JSON list"):
        reader.parse_history("[2-Pack] Glue")


def test_bad_histories_of_a_csv_file_are_named_with_their_lines(files, checkpoint, tmp_path):
    cells = ["\"['<a_0><b_0><c_0>']\"", "[]", "'x'", "\"['<a_0>\n']\"", "\"['<a_0><b_0><c_0>']\""]
    (tmp_path / "h.csv").write_text("user,history_item_sid\n" + "".join(f"u,{cell}\n" for cell in cells) + "u\n")
    done = run_command("recommend.py", **flags_of(files, checkpoint, tmp_path / "o", histories=tmp_path / "h.csv"))
    places = [line.split("h.csv")[1] for line in done.stderr.strip().splitlines()]
    assert done.returncode == 2 and [place[:9] for place in places] == [f", line {line}:" for line in (3, 4, 6, 8)]
    assert "history_item_sid is empty" in places[0] and "the row ends before it" in places[3]
