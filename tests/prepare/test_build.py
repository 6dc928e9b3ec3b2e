"""scripts/prepare_data.py as a whole: what it writes is what training reads, twice the same, or nothing at all."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, encoded, run_command
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import sft
from minionerec.data import files as data_files
from minionerec.errors import InputError, RunError
from minionerec.prepare import semantic_ids, writing
from minionerec.prepare.settings import COLLISIONS
from minionerec.training.rewards import read_embeddings
from scripts.prepare_data import prepare_data

KINDS = ["hex bolt", "wood screw", "lock nut", "flat washer", "epoxy resin", "super glue", "masking tape", "wire brush"]
ADJECTIVES = ["steel", "brass", "nylon", "zinc", "heavy", "small"]
CATEGORY = "Nuts & Bolts"


def item_rows() -> list[dict]:
    """48 items in the form of the Amazon metadata of 2018, some hostile, and four that must go."""
    items = [
        {
            "asin": f"B{i:03d}",
            "title": f"{a.title()} {k}, pack of {i}",
            "description": [f"A {k}.", f"Of {a}."],
            "brand": "O'D",
        }
        for i, (k, a) in enumerate((k, a) for k in KINDS for a in ADJECTIVES)
    ]
    items[0]["title"] = 'Tab\there, line\nthere, 5" "quoted" d\'Été <a_1><b_2><c_3> 🔩 螺丝'
    items[1]["title"] = items[2]["title"] = items[3]["title"]
    items[1]["description"] = items[2]["description"] = items[3]["description"]
    items[4]["description"] = "long " * 20_000
    items[5]["description"] = None
    items[7]["title"] = "Escaped &amp;lt;twice&amp;gt;"
    return [
        *items,
        {"asin": "B000", "title": "Again"},
        {"asin": "B900", "title": "Nobody bought it"},
        {"asin": "B901", "title": " "},
        {"asin": "B902"},
    ]


def review_rows() -> list[dict]:
    """60 users with 6 to 12 purchases, with duplicates and items that are not described."""
    rng = random.Random(0)
    reviews = []
    for user in range(60):
        for step in range(rng.randint(6, 12)):
            item = (user * 5 + step * rng.choice([1, 1, 2])) % 48
            when = 1_500_000_000 + rng.randrange(10**7)
            reviews.append({"reviewerID": f"A{user}", "asin": f"B{item:03d}", "unixReviewTime": when, "overall": 5.0})
    reviews += [*reviews[:5], {**reviews[0], "asin": "B901"}, {**reviews[0], "asin": "B999"}]
    return reviews


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> dict[str, str]:
    """Raw reviews, items and new items."""
    folder = tmp_path_factory.mktemp("raw")
    new = [
        {"asin": "N1", "title": "Steel hex bolt, pack of 900", "description": ["A hex bolt.", "Of steel."]},
        {"asin": "N2", "title": item_rows()[3]["title"], "description": item_rows()[3]["description"]},
        {"asin": "B005", "title": "There already"},
        {"asin": "N3", "title": ""},
    ]
    contents = {"interactions": review_rows(), "items": item_rows(), "add_items": new}
    paths = {}
    for name, rows in contents.items():
        paths[name] = str(folder / f"{name}.json.gz")
        Path(paths[name]).write_bytes(encoded(rows, "json", zipped=True))
    return paths


def flags_of(raw, output_dir, **more) -> dict:
    paths = {name: raw[name] for name in ("interactions", "items")}
    return {**paths, "output_dir": str(output_dir), "category": CATEGORY, "codes": 8, "min_interactions": 3, **more}


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data" / "bolts"
    prepare_data(**flags_of(raw, folder))
    return folder


def path_of(folder: Path, name: str) -> str:
    return str(folder / writing.files_of(CATEGORY)[name])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def csv_rows(folder: Path, split: str) -> list[dict]:
    with open(path_of(folder, split), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_readers_read_what_was_written(prepared):
    catalogue = data_files.read_catalogue(path_of(prepared, "index"), path_of(prepared, "item"))
    assert list(catalogue.items) == [str(i) for i in range(48)] and len(catalogue.sids) == 48
    assert catalogue.items["0"].title == 'Tab here, line there, 5" "quoted" d\'Été 🔩 螺丝'
    assert set(data_files.read_info(path_of(prepared, "info"), catalogue)) == catalogue.sids
    embeddings = read_embeddings(path_of(prepared, "embeddings"), {i: it.sid for i, it in catalogue.items.items()})
    assert len(embeddings) == 48
    record = json.loads((prepared / "dataset.json").read_text())
    for split in ("train", "valid", "test"):
        assert data_files.count_rows(path_of(prepared, split), split, catalogue.sids) == record["rows"][split]
    metadata = json.loads(Path(path_of(prepared, "item")).read_text(encoding="utf-8"))
    assert [fields["original_id"] for fields in metadata.values()] == [f"B{i:03d}" for i in range(48)]
    assert metadata["6"]["brand"] == "O'D" and metadata["5"]["description"] == ""


def test_rows_are_what_was_bought(prepared):
    """Every cell follows from the raw files by the plainest of loops."""
    index = json.loads(Path(path_of(prepared, "index")).read_text())
    metadata = json.loads(Path(path_of(prepared, "item")).read_text(encoding="utf-8"))
    bought: dict[str, list] = {}
    for review in review_rows()[:-7]:
        bought.setdefault(review["reviewerID"], []).append((review["unixReviewTime"], int(review["asin"][1:])))
    expected = []
    for user, events in bought.items():
        events.sort(key=lambda event: event[0])
        items = [item for _, item in events]
        for place in range(1, len(items)):
            past, item = items[max(0, place - 10) : place], items[place]
            titles, sids = ([metadata[str(i)]["title"] for i in past], ["".join(index[str(i)]) for i in past])
            cells = [user, titles, metadata[str(item)]["title"], past, item, sids, "".join(index[str(item)])]
            expected.append((events[place][0], [str(cell) for cell in cells]))
    expected.sort(key=lambda row: row[0])
    rows = [list(row.values()) for split in ("train", "valid", "test") for row in csv_rows(prepared, split)]
    assert rows == [row for _, row in expected]


def test_the_record_says_what_was_done(prepared, raw):
    record = json.loads((prepared / "dataset.json").read_text())
    reviews = len(review_rows())
    assert [(step["step"], step["interactions"]) for step in record["interactions"]] == [
        ("read", reviews),
        ("in the time window", reviews),
        ("without duplicates", reviews - 5),
        ("of items with a title", reviews - 7),
        ("3-core", reviews - 7),
    ]
    assert record["items"] == {"rows": 52, "not_wanted": 2, "repeated": 1, "untitled": 1, "refused": 0, "kept": 48}
    assert record["inputs"]["interactions"]["columns"] == {
        "user": "reviewerID",
        "item": "asin",
        "time": "unixReviewTime",
    }
    assert record["inputs"]["items"]["sha256"] == writing.digest(raw["items"])
    assert record["arguments"]["seed"] == 42 and len(record["semantic_ids"]["levels"]) == 3
    assert {*record["files"], "dataset.json"} == set(contents(prepared))
    text = json.dumps(record)
    assert str(prepared) not in text and os.path.dirname(raw["items"]) not in text


def test_two_runs_give_the_same_files(prepared, raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_data(**flags_of(raw, "again"))
    assert contents(tmp_path / "again") == contents(prepared)
    assert os.listdir(tmp_path) == ["again"]
    prepare_data(**flags_of(raw, "other", seed=7))
    assert (
        contents(tmp_path / "other")[f"index/{CATEGORY}.index.json"]
        != contents(prepared)[f"index/{CATEGORY}.index.json"]
    )


def test_sft_takes_the_files(prepared, base, tmp_path, capsys):
    sft.train(
        base_model=base,
        train_file=path_of(prepared, "train"),
        eval_file=path_of(prepared, "valid"),
        sid_index_path=path_of(prepared, "index"),
        item_meta_path=path_of(prepared, "item"),
        output_dir=str(tmp_path / "run"),
        category=CATEGORY,
        batch_size=8,
        micro_batch_size=4,
        dry_run=True,
    )
    assert "examples;" in capsys.readouterr().out


def test_the_pipeline_finds_the_files(prepared, tmp_path):
    environment = {**os.environ, "PYTHON": "echo", "DATA": str(prepared), "CATEGORY": CATEGORY, "OUT": str(tmp_path)}
    result = subprocess.run(["bash", "scripts/pipeline.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    for name in ("train", "valid", "test", "info", "index", "item"):
        assert path_of(prepared, name) in result.stdout, result.stderr


@pytest.mark.parametrize("split", ["time", "last"])
def test_splits(raw, tmp_path, split):
    prepare_data(**flags_of(raw, tmp_path / "d", split=split, max_history=4, collisions="keep", levels=1))
    parts = {name: csv_rows(tmp_path / "d", name) for name in ("train", "valid", "test")}
    users = {name: {row["user_id"] for row in rows} for name, rows in parts.items()}
    if split == "last":
        assert len(users["test"]) == len(parts["test"]) == len(parts["valid"]) == 60
    assert max(len(json.loads(row["history_item_id"])) for row in parts["test"]) == 4
    assert data_files.count_rows(path_of(tmp_path / "d", "train"), "train_file") == len(parts["train"])


def test_collisions_and_levels_are_printed(raw, tmp_path, capsys):
    prepare_data(**flags_of(raw, tmp_path / "d", levels=2, collisions="extend"))
    printed = capsys.readouterr().out
    assert "3-core" in printed and "a             8 of 8" in printed and "collisions (extend): " in printed
    index = json.loads(Path(path_of(tmp_path / "d", "index")).read_text())
    assert len({"".join(sid) for sid in index.values()}) == 48
    assert {len(sid) for sid in index.values()} == {2, 3}
    assert data_files.read_catalogue(path_of(tmp_path / "d", "index")).sids


def test_other_embeddings(raw, tmp_path, base):
    rows = np.random.default_rng(0).normal(size=(52, 6))
    np.save(tmp_path / "own.npy", rows)
    prepare_data(**flags_of(raw, tmp_path / "own", embeddings=str(tmp_path / "own.npy")))
    saved = np.load(path_of(tmp_path / "own", "embeddings"))
    np.testing.assert_array_equal(saved, rows[:48].astype(np.float32))
    prepare_data(**flags_of(raw, tmp_path / "encoded", encoder=base))
    assert np.load(path_of(tmp_path / "encoded", "embeddings")).shape == (48, 64)
    record = json.loads((tmp_path / "encoded" / "dataset.json").read_text())
    assert record["embeddings"].keys() == {"kind", "name", "weights", "width"} and base not in json.dumps(record)

    add = {"add_items": raw["add_items"], "output_dir": str(tmp_path / "more")}
    refused({**add, "dataset": str(tmp_path / "own")}, "were embedded by embeddings; give --embeddings")
    refused({**add, "dataset": str(tmp_path / "encoded")}, "were embedded by encoder; give --encoder")
    np.save(tmp_path / "new.npy", rows[:4, :5])
    refused(
        {**add, "dataset": str(tmp_path / "own"), "embeddings": str(tmp_path / "new.npy")},
        f"has width 5, but the embeddings of {tmp_path / 'own'} have 6",
    )
    np.save(tmp_path / "new.npy", rows[:4])
    prepare_data(**{**add, "dataset": str(tmp_path / "own"), "embeddings": str(tmp_path / "new.npy")})
    np.testing.assert_array_equal(np.load(path_of(tmp_path / "more", "embeddings"))[48:], rows[:2].astype(np.float32))


def test_new_items_get_ids_that_a_model_knows(prepared, raw, tmp_path, capsys):
    before = contents(prepared)
    prepare_data(add_items=raw["add_items"], dataset=str(prepared), output_dir=str(tmp_path / "more"))
    assert contents(prepared) == before
    more = tmp_path / "more"
    old = json.loads(Path(path_of(prepared, "index")).read_text())
    new = json.loads(Path(path_of(more, "index")).read_text())
    assert list(new) == [str(i) for i in range(50)] and {item: new[item] for item in old} == old
    assert {token for sid in new.values() for token in sid} == {token for sid in old.values() for token in sid}
    assert len({"".join(sid) for sid in new.values()}) == 50
    # Like N2 there are three old items; it differs from the nearest only in the last code.
    assert new["49"][:-1] in [old[str(i)][:-1] for i in (1, 2, 3)]
    catalogue = data_files.read_catalogue(path_of(more, "index"), path_of(more, "item"))
    assert len(data_files.read_info(path_of(more, "info"), catalogue)) == 50 and catalogue.items["48"].title.endswith(
        "of 900"
    )
    assert np.load(path_of(more, "embeddings")).shape[0] == 50
    for split in ("train", "valid", "test"):
        assert Path(path_of(more, split)).read_bytes() == Path(path_of(prepared, split)).read_bytes()
    assert "1 that exist already, 1 without a title" in capsys.readouterr().out
    # And again on top, where all are there already.
    refused(
        {"add_items": raw["add_items"], "dataset": str(more), "output_dir": str(tmp_path / "most")},
        "none of its 4 rows is a new item with a title",
    )


def test_what_is_bought_together_shapes_the_ids_and_not_the_text_embeddings(prepared, raw, tmp_path, capsys):
    prepare_data(**flags_of(raw, tmp_path / "texts", purchase_share=0))
    assert "IDs: from texts only\n" in capsys.readouterr().out
    records = [json.loads((folder / "dataset.json").read_text()) for folder in (prepared, tmp_path / "texts")]
    assert [record["arguments"]["purchase_share"] for record in records] == [0.5, 0]
    with_purchases, without = (record["semantic_ids"] for record in records)
    assert without["co_purchases"] is None and with_purchases["co_purchases"] == {"items": 48, "width": 48}
    assert all(
        0.5 < part["explained"]["after_collisions"] <= part["explained"]["before_collisions"] < 1
        for part in (with_purchases, without)
    )
    same = {name for name, content in contents(prepared).items() if content == contents(tmp_path / "texts")[name]}
    assert same == {f"index/{CATEGORY}.{name}" for name in ("embeddings.npy", "item.json", "tfidf.safetensors")}


def test_without_co_purchases_ids_are_of_texts(raw, tmp_path, capsys):
    reviews = [
        {"reviewerID": f"A{user}", "asin": f"B{user % 48:03d}", "unixReviewTime": 1_500_000_000 + step * 10_000 + user}
        for user in range(96)
        for step in range(4)
    ]
    alone = str(tmp_path / "alone.json")
    Path(alone).write_bytes(encoded(reviews, "json"))
    for share in (0.5, 0):
        prepare_data(**flags_of({**raw, "interactions": alone}, tmp_path / str(share), purchase_share=share))
    assert "IDs: from texts only, because no training row has two different items" in capsys.readouterr().out
    assert [part for part in contents(tmp_path / "0.5") if part != "dataset.json"]
    for name, content in contents(tmp_path / "0").items():
        assert name == "dataset.json" or contents(tmp_path / "0.5")[name] == content


def test_new_items_are_placed_by_their_texts_in_the_same_codebooks(prepared, raw, tmp_path):
    prepare_data(add_items=raw["add_items"], dataset=str(prepared), output_dir=str(tmp_path / "more"))
    more = tmp_path / "more"
    assert Path(path_of(more, "codebooks")).read_bytes() == Path(path_of(prepared, "codebooks")).read_bytes()
    codebooks = semantic_ids.load_codebooks(path_of(more, "codebooks"))
    embeddings = np.load(path_of(more, "embeddings"))
    width = embeddings.shape[1]
    assert codebooks.shape[2] == width + 48
    codes, _ = semantic_ids.code_with(embeddings[48:49], codebooks[:, :, :width], np.ones((3, 8), bool))
    assert json.loads(Path(path_of(more, "index")).read_text())["48"][:2] == semantic_ids.tokens(codes[0])[:2]
    # A record and codebooks that do not fit together are refused; those of before there were co-purchases fit.
    for share, lacks in ((0.5, True), (0, False)):
        folder = tmp_path / f"old_{share}"
        prepare_data(**flags_of(raw, folder, purchase_share=share))
        record = json.loads((folder / "dataset.json").read_text())
        del record["arguments"]["purchase_share"], record["semantic_ids"]["co_purchases"]
        (folder / "dataset.json").write_text(json.dumps(record))
        add = {"add_items": raw["add_items"], "dataset": str(folder), "output_dir": str(tmp_path / f"new_{share}")}
        if lacks:
            refused(add, "its items cannot be read: the embeddings do not fit")
        else:
            prepare_data(**add)


def test_many_items_that_share_an_id_are_warned_of(raw, tmp_path, capsys):
    items = [{"asin": f"B{i:03d}", "title": f"Steel {KINDS[i % 6]}"} for i in range(48)]
    Path(tmp_path / "items.json").write_bytes(encoded(items, "json"))
    alike = {**raw, "items": str(tmp_path / "items.json")}
    prepare_data(**flags_of(alike, tmp_path / "alike", purchase_share=0))
    printed = capsys.readouterr().out
    moved = json.loads((tmp_path / "alike" / "dataset.json").read_text())["semantic_ids"]["moved"]
    assert (
        moved > 10 and f"warning: {moved} of 48 items ({moved / 48:.1%}) have a code that is not the nearest" in printed
    )
    assert "more --text_columns, --codes or --levels" in printed and "after collisions are resolved" in printed
    prepare_data(**flags_of(raw, tmp_path / "different"))
    assert "warning" not in capsys.readouterr().out


def test_new_items_that_find_no_room_need_a_new_token(raw, tmp_path, capsys):
    prepare_data(**flags_of(raw, tmp_path / "d", levels=1, codes=48))
    new = [{"asin": f"N{i}", "title": "Steel hex bolt"} for i in range(3)]
    (tmp_path / "new").write_bytes(encoded(new, "json"))
    prepare_data(add_items=str(tmp_path / "new"), dataset=str(tmp_path / "d"), output_dir=str(tmp_path / "e"))
    assert "note: <b_1>" in (printed := capsys.readouterr().out) and "extended" in printed
    index = json.loads(Path(path_of(tmp_path / "e", "index")).read_text())
    assert len({"".join(sid) for sid in index.values()}) == 51


def test_a_changed_dataset_takes_no_items(prepared, raw, tmp_path):
    add = {"add_items": raw["add_items"], "output_dir": str(tmp_path / "more")}
    refused({**add, "dataset": str(tmp_path)}, "has no dataset.json")
    broken = tmp_path / "broken"
    for name, content in contents(prepared).items():
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        (broken / name).write_bytes(content)
    with open(path_of(broken, "index"), "a") as file:
        file.write(" ")
    refused({**add, "dataset": str(broken)}, f"changed since prepare_data.py wrote it: index/{CATEGORY}.index.json")
    for content in ("{}", "[]", "nonsense", "[" * 100_000, '{"category": "../x"}', '{"category": "x", "files": 1}'):
        (broken / "dataset.json").write_text(content)
        refused({**add, "dataset": str(broken)}, "dataset.json is not what prepare_data.py wrote")
    record = json.loads((prepared / "dataset.json").read_text())
    record["files"]["../../passwd"] = "x"
    (broken / "dataset.json").write_text(json.dumps(record))
    refused({**add, "dataset": str(broken)}, "changed since")


def refused(flags: dict, *messages: str) -> None:
    """The command refuses, in as many lines as messages, and leaves nothing."""
    output = Path(flags["output_dir"])
    there = sorted(os.listdir(output.parent))
    with pytest.raises(InputError) as error:
        prepare_data(**flags)
    problems = error.value.problems
    assert len(problems) == len(messages), problems
    for message, problem in zip(messages, problems, strict=True):
        assert message in problem and "\n" not in problem
    assert sorted(os.listdir(output.parent)) == there


BAD = [
    ({"category": ""}, "--category is missing"),
    ({"category": "../x"}, "--category '../x': is used in file names"),
    ({"min_interactions": 0}, "--min_interactions 0: must be above 0"),
    ({"max_history": 0}, "--max_history 0: must be above 0"),
    ({"levels": 0}, "--levels 0: must be between 1 and 8"),
    ({"codes": 1}, "--codes 1: must be between 2 and 65536"),
    ({"purchase_share": 1.0}, "--purchase_share 1.0: must be at least 0 and below 1"),
    ({"purchase_share": float("nan")}, "--purchase_share nan: must be at least 0 and below 1"),
    ({"split": "random"}, "--split 'random': must be time or last"),
    ({"collisions": "drop"}, "--collisions 'drop': must be one of move, extend, keep"),
    ({"seed": -1}, "--seed -1: must be between 0"),
    ({"start_date": "May"}, "--start_date 'May': expected a year, a month or a day"),
    (
        {"start_date": "2019"},
        "none of its 546 rows is between --start_date and --end_date; they are from 2017-07-14 to",
    ),
    ({"min_interactions": 50}, "--min_interactions 50: leaves nothing of 539 interactions of 60 users with 48 items"),
    ({"interactions": ""}, "--interactions is missing"),
    ({"items": "nowhere.csv"}, "--items nowhere.csv: no such file"),
    ({"encoder": "./nowhere"}, "--encoder ./nowhere: no such folder"),
    ({"embeddings": "nowhere.npy"}, "--embeddings nowhere.npy: cannot be read"),
    ({"output_dir": str(ROOT)}, "exists already; name another folder"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[next(iter(flags)) for flags, _ in BAD])
def test_bad_flags(raw, tmp_path, flags, message):
    refused({**flags_of(raw, tmp_path / "d"), **flags}, message)


def test_all_problems_come_together(tmp_path):
    (tmp_path / "reviews").write_text("who,item,time\nu,i,1\n")
    (tmp_path / "items").write_text('{"item": "i", "title": {"en": "T"}}\n{"item": null, "title": "T"}\n')
    np.save(tmp_path / "e.npy", np.ones(3))
    flags = {
        "interactions": str(tmp_path / "reviews"),
        "items": str(tmp_path / "items"),
        "output_dir": str(tmp_path / "d"),
    }
    refused(
        {**flags, "embeddings": str(tmp_path / "e.npy"), "encoder": "./nowhere", "levels": 9},
        "--encoder ./nowhere",
        "exclude each other",
        "--category is missing",
        "--levels 9",
        "no column is recognized as the user",
        "row 1, title: expected text or a list of texts, found {'en': 'T'}",
        "row 2, item: expected an item id, text or a whole number, found None",
        "e.npy: cannot be read",
    )


def test_files_that_do_not_belong_together(raw, tmp_path):
    (tmp_path / "items").write_text("item,title\nX1,Something\n")
    refused(
        flags_of({**raw, "items": str(tmp_path / "items")}, tmp_path / "d"),
        "has a title for none of the 50 items of",
    )


def test_too_few_rows_for_three_splits(tmp_path):
    (tmp_path / "reviews").write_text("user,item,time\n" + "".join(f"u,i{n},{n}\n" for n in range(4)))
    (tmp_path / "items").write_text("item,title\n" + "".join(f"i{n},Title {n}\n" for n in range(4)))
    raw = {"interactions": str(tmp_path / "reviews"), "items": str(tmp_path / "items")}
    refused(flags_of(raw, tmp_path / "d", min_interactions=1), "--split time: of 3 rows none is left for valid")


def test_flags_of_a_new_dataset_do_not_go_with_added_items(raw, prepared, tmp_path):
    flags = {"add_items": raw["add_items"], "dataset": str(prepared), "output_dir": str(tmp_path / "d")}
    refused({**flags, "levels": 4}, "--levels is for a new data set")
    refused({**flags, "embeddings": "x.npy"}, "give neither --encoder nor --embeddings", "--embeddings x.npy: cannot")
    refused({**flags, "dataset": ""}, "--dataset : has no dataset.json")


def test_the_command_line(raw, tmp_path):
    result = run_command("scripts/prepare_data.py", **flags_of(raw, tmp_path / "d"))
    assert result.returncode == 0, result.stderr
    assert f"DATA={tmp_path / 'd'} CATEGORY='{CATEGORY}' bash scripts/pipeline.sh" in result.stdout
    again = run_command("scripts/prepare_data.py", "--levls", "3", **flags_of(raw, tmp_path / "d"))
    assert again.returncode == 2 and "unknown flag --levls; did you mean --levels?" in again.stderr
    again = run_command("scripts/prepare_data.py", **flags_of(raw, tmp_path / "d", levels=0))
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 2
    assert all(line.startswith("prepare_data.py: error: ") for line in again.stderr.splitlines())
    # Neither torch nor transformers are needed for the default.
    code = (
        f"import sys; from scripts.prepare_data import prepare_data; prepare_data(**{flags_of(raw, tmp_path / 'e')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_full_disk_leaves_nothing(raw, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(semantic_ids, "fit", lambda *args: full())
    with pytest.raises(RunError, match=r"a/d cannot be written: .*No space"):
        prepare_data(**flags_of(raw, tmp_path / "a" / "d"))
    assert os.listdir(tmp_path) == []


def test_the_benchmark_rebuilds_what_a_release_was_made_from(tmp_path):
    """The prepared demo as a release: its raw form gives the same purchases again, and the benchmark measures them."""
    demo, release = ROOT / "examples" / "demo", tmp_path / "release"
    files = {"interactions": str(demo / "purchases.csv"), "items": str(demo / "items.csv")}
    prepare_data(**files, output_dir=str(tmp_path / "demo"), category=CATEGORY, codes=16)
    release.mkdir()
    for split in ("train", "valid", "test"):
        os.rename(path_of(tmp_path / "demo", split), release / f"{split}.csv")
    os.rename(path_of(tmp_path / "demo", "item"), release / "demo.item.json")
    result = run_command(
        "benchmarks/prepare.py", release_dir=release, raw_dir=tmp_path / "raw", min_interactions=1, codes=16
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["benchmark"] == "prepare" and record["table"][0]["seconds"] > 0
    made = {}
    for path in (tmp_path / "raw" / "prepared").glob("*/*.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            made.update(
                ((row["user_id"], row["history_item_title"]), row["item_title"]) for row in csv.DictReader(file)
            )
    with open(release / "test.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 543 and all(
        made[row["user_id"], row["history_item_title"]] == row["item_title"] for row in rows
    )


HOSTILE = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        ["['a', \"b\"]", "__import__('os').system('x')", "\t", "a\tb\nc", '"""', "<a_1><b_2>", "\\", "\ud800", "[]"]
    ),
    st.lists(st.text(max_size=5), max_size=3),
)
HOSTILE_IDS = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4), st.integers(0, 5))


# To shrink a failure would take minutes.
@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    st.lists(
        st.tuples(HOSTILE_IDS, HOSTILE, HOSTILE), min_size=1, max_size=8, unique_by=lambda row: str(row[0]).strip()
    ),
    st.lists(st.tuples(HOSTILE_IDS, st.integers(0, 7), st.integers(0, 9)), min_size=15, max_size=40),
    st.sampled_from(["time", "last"]),
    st.sampled_from(COLLISIONS),
    st.integers(1, 3),
)
def test_any_texts_and_ids_are_written_for_the_readers_or_refused(
    tmp_path_factory, items, purchases, split, collisions, levels
):
    folder = tmp_path_factory.mktemp("any")
    sold = [{"item": item, "title": title, "description": text} for item, title, text in items]
    bought = [{"user": user, "item": items[i % len(items)][0], "time": time} for user, i, time in purchases]
    (folder / "sold").write_bytes(encoded([*sold, {"item": "known", "title": "steel bolt steel bolt"}] * 2, "json"))
    (folder / "bought").write_bytes(encoded([*bought, {**bought[0], "item": "known"}], "json"))
    try:
        prepare_data(
            interactions=str(folder / "bought"),
            items=str(folder / "sold"),
            output_dir=str(folder / "d"),
            category="any",
            min_interactions=1,
            split=split,
            collisions=collisions,
            levels=levels,
            codes=2,
        )
    except InputError as error:
        assert all("\n" not in problem for problem in error.problems) and not (folder / "d").exists()
        return
    index = folder / "d" / "index"
    catalogue = data_files.read_catalogue(str(index / "any.index.json"), str(index / "any.item.json"))
    assert all(item.title for item in catalogue.items.values())
    assert set(data_files.read_info(str(folder / "d" / "info" / "any.txt"), catalogue)) == catalogue.sids
    assert collisions == "keep" or len(catalogue.sids) == len(catalogue.items)
    for name in ("train", "valid", "test"):
        rows = list(data_files.read_interactions(str(folder / "d" / name / "any.csv"), "train_file", catalogue.sids))
        titles = {item.title for item in catalogue.items.values()}
        assert rows and all({row.title, *row.title_history} <= titles for row in rows)


def test_what_is_missing_in_exports_is_missing_here_and_in_training(tmp_path):
    inter = [{"user_id": f"U{n % 12}", "item_id": f"I{n * 7 % 10}", "timestamp": 10**9 + n * 3600} for n in range(144)]
    titles = {2: "nan", 5: " NaN", 7: "None"}
    items = [{"item_id": f"I{n}", "title": titles.get(n, f"Red {n} drill"), "description": "nan"} for n in range(10)]
    (tmp_path / "inter.csv").write_bytes(encoded(inter, "csv"))
    (tmp_path / "items.csv").write_bytes(encoded(items, "csv"))
    out = tmp_path / "out"
    files = {"interactions": str(tmp_path / "inter.csv"), "items": str(tmp_path / "items.csv")}
    prepare_data(**files, output_dir=str(out), category="T", codes=4, min_interactions=2)
    assert json.loads((out / "dataset.json").read_text())["items"]["untitled"] == 3
    catalogue = data_files.read_catalogue(str(out / "index/T.index.json"), str(out / "index/T.item.json"))
    assert len(catalogue.items) == 7
    assert all(item.title.startswith("Red ") and item.description == "" for item in catalogue.items.values())
