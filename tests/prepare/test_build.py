"""scripts/prepare_data.py as a whole: what it writes is what training reads, twice the same, or nothing at all."""

import ast
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, encoded, read_rows, run_command, sft_flags, succeed
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from raw_bolts import CATEGORY, KINDS, contents, csv_rows, flags_of, path_of, refused, review_rows
from raw_files import T0, problems_of, written

import sft
from minionerec.data import files as data_files
from minionerec.errors import InputError
from minionerec.prepare import build
from minionerec.prepare.settings import COLLISIONS
from minionerec.training.rewards import read_embeddings
from scripts.prepare_data import prepare_data


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
    files = {name: path_of(prepared, name) for name in ("train", "valid", "index", "item")}
    sft.train(**sft_flags(files, base, str(tmp_path / "run"), category=CATEGORY, dry_run=True))
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
    single = str(tmp_path / "single.json")
    Path(single).write_bytes(encoded(reviews, "json"))
    for share in (0.5, 0):
        prepare_data(**flags_of({**raw, "interactions": single}, tmp_path / str(share), purchase_share=share))
    assert "IDs: from texts only, because no training row has two different items" in capsys.readouterr().out
    assert [part for part in contents(tmp_path / "0.5") if part != "dataset.json"]
    for name, content in contents(tmp_path / "0").items():
        assert name == "dataset.json" or contents(tmp_path / "0.5")[name] == content


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


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_fewer_codes_are_advised_only_where_all_items_have_room(capsys, levels):
    for num_items in (5, 30, 60, 100, 300, 1000):
        for codes in (4, 8, 32, 256):
            build._print_advice(levels, codes, num_items, {})
            said = capsys.readouterr().out
            if said:
                better = int(said.split()[-1])
                assert better < codes and better**levels >= 2 * num_items
    build._print_advice(3, 8, 30, {"extended": 22})
    assert capsys.readouterr().out.startswith("note: more --text_columns, --codes or --levels")


def test_files_that_do_not_belong_together(raw, tmp_path):
    (tmp_path / "items").write_text("item,title\nX1,Something\n")
    refused(
        flags_of({**raw, "items": str(tmp_path / "items")}, tmp_path / "d"),
        "has a title for none of the 50 items of",
    )


def test_ids_that_lost_leading_zeros_in_one_file_are_named(tmp_path, capsys):
    """A program that takes ids for numbers writes 00012 as 12: those purchases would be dropped as without a title."""
    items = ["00012", "00007", "71234", "80000"]
    purchases = [f"u{user},{items[(user + step) % 4]},{T0 + step}" for user in range(9) for step in range(4)]
    written(tmp_path / "log.csv", "\n".join(["user,item,time", *purchases]))
    bare = "\n".join(re.sub(",0+", ",", line) for line in purchases)
    written(tmp_path / "bare_log.csv", f"user,item,time\n{bare}")
    named = {
        "log": "id,title\n00012,A nut\n00007,B nut\n71234,C nut\n80000,D nut\n",
        "bare": "id,title\n12,A nut\n7,B nut\n",
    }
    for name, text in named.items():
        written(tmp_path / f"{name}_items.csv", text)
    flags = {"category": "T", "codes": 2, "min_interactions": 1, "output_dir": str(tmp_path / "out")}

    def files(log: str, items: str) -> dict[str, str]:
        return {"interactions": str(tmp_path / f"{log}.csv"), "items": str(tmp_path / f"{items}_items.csv")}

    told = problems_of(prepare_data, **flags, **files("log", "bare"))
    assert told.endswith("such as '00012'; 2 differ by leading zeros only, such as '00012' and '12'; write them alike")
    prepare_data(**{**flags, **files("bare_log", "log"), "output_dir": str(tmp_path / "some")})
    assert "2 differ by leading zeros only, such as '12' and '00012'; write them alike" in capsys.readouterr().out
    prepare_data(**flags, **files("log", "log"))
    assert "leading zeros" not in capsys.readouterr().out


def test_a_user_who_may_be_all_guests_is_named(tmp_path, capsys):
    """WooCommerce writes 0 for everyone who buys without an account."""
    rng = random.Random(0)
    bought = [("0", T0 + time) for time in range(1100)] + [(f"u{n % 300}", T0 + n * 60) for n in range(900)]
    rows = "".join(f"{user},i{rng.randrange(20)},{time}\n" for user, time in bought)
    items = "".join(f"i{n},Red nut {n}\n" for n in range(20))
    for user in ("0", "u1"):
        alike = rows if user == "0" else re.sub("^0,", lambda _: f"u{rng.randrange(300)},", rows, flags=re.M)
        files = {
            "interactions": str(written(tmp_path / "log.csv", f"user,item,time\n{alike}")),
            "items": str(written(tmp_path / "items.csv", f"id,title\n{items}")),
        }
        flags = {"category": "T", "codes": 4, "levels": 2, "min_interactions": 2, "output_dir": str(tmp_path / user)}
        prepare_data(**files, **flags)
        assert ("note: 1,100 of 2,000 interactions are of user '0'; " in capsys.readouterr().out) is (user == "0")


def test_too_few_rows_for_three_splits(tmp_path):
    (tmp_path / "reviews").write_text("user,item,time\n" + "".join(f"u,i{n},{n}\n" for n in range(4)))
    (tmp_path / "items").write_text("item,title\n" + "".join(f"i{n},Title {n}\n" for n in range(4)))
    raw = {"interactions": str(tmp_path / "reviews"), "items": str(tmp_path / "items")}
    refused(flags_of(raw, tmp_path / "d", min_interactions=1), "--split time: of 3 rows none is left for valid")


def test_the_command_line(raw, tmp_path):
    result = succeed("scripts/prepare_data.py", **flags_of(raw, tmp_path / "d"))
    assert f"DATA={tmp_path / 'd'} CATEGORY='{CATEGORY}' bash scripts/pipeline.sh" in result.stdout
    again = run_command("scripts/prepare_data.py", "--levls", "3", **flags_of(raw, tmp_path / "d"))
    assert again.returncode == 2 and "unknown flag --levls; did you mean --levels?" in again.stderr
    again = run_command("scripts/prepare_data.py", **flags_of(raw, tmp_path / "d", levels=0))
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 2
    assert all(line.startswith("prepare_data.py: error: ") for line in again.stderr.splitlines())
    # Elsewhere the line that trains has absolute paths, because relative ones start at the root.
    argv = [f"--{name}={value}" for name, value in flags_of(raw, "own data").items()]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/prepare_data.py"), *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"DATA='{tmp_path}/own data' CATEGORY='{CATEGORY}' bash {ROOT}/scripts/pipeline.sh" in done.stdout
    # Neither torch nor transformers are needed for the default.
    code = (
        f"import sys; from scripts.prepare_data import prepare_data; prepare_data(**{flags_of(raw, tmp_path / 'e')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_benchmark_rebuilds_what_a_release_was_made_from(tmp_path):
    """The prepared demo as a release: its raw form gives the same purchases again, and the benchmark measures them."""
    demo, release = ROOT / "examples" / "demo", tmp_path / "release"
    files = {"interactions": str(demo / "purchases.csv"), "items": str(demo / "items.csv")}
    prepare_data(**files, output_dir=str(tmp_path / "demo"), category=CATEGORY, codes=16)
    release.mkdir()
    for split in ("train", "valid", "test"):
        os.rename(path_of(tmp_path / "demo", split), release / f"{split}.csv")
    os.rename(path_of(tmp_path / "demo", "item"), release / "demo.item.json")
    result = succeed(
        "benchmarks/prepare.py", release_dir=release, raw_dir=tmp_path / "raw", min_interactions=1, codes=16
    )
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["benchmark"] == "prepare" and record["table"][0]["seconds"] > 0
    made = {}
    for path in (tmp_path / "raw" / "prepared").glob("*/*.csv"):
        made.update(((row["user_id"], row["history_item_title"]), row["item_title"]) for row in read_rows(path))
    rows = read_rows(release / "test.csv")
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
@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
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


def test_a_log_becomes_sessions_of_purchases(log, tmp_path, capsys):
    flags = {
        "events": "buy",
        "event_column": "what",
        "min_rating": 2.0,
        "rating_column": "stars",
        "min_interactions": 2,
    }
    assert "row 321, item: expected an item id" in problems_of(prepare_data, **log, **flags)
    prepare_data(**log, **flags, skip_bad_rows=True, session_gap=30.0, drop_repeats=True)
    printed = capsys.readouterr().out
    assert "321 rows, 320 read, 1 left out" in printed and "left out: " in printed and "12 rows, 12 read" in printed
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    steps = {step["step"]: step["interactions"] for step in record["interactions"]}
    assert steps["read"] == 320 and steps["events buy"] == 161 and steps["rated 2 or more"] == 121
    assert record["interactions"][0]["refused"] == 1 and record["arguments"]["session_gap"] == 30
    rows = [line.split(",")[0] for line in (tmp_path / "out" / "train" / "T.csv").read_text().splitlines()[1:]]
    assert {user.split("/")[1] for user in rows} == {"1", "2"}


def test_a_gap_of_any_length_ends_no_session_where_none_is_that_long(log):
    spelled = {**log, "skip_bad_rows": True, "events": "buy", "event_column": "what", "min_interactions": 2}
    prepare_data(**spelled, session_gap=1e303)
    train = Path(log["output_dir"], "train", "T.csv").read_text().splitlines()[1:]
    assert train and all(row.split(",")[0].endswith("/1") for row in train)


def test_an_item_that_follows_itself_counts_once_in_a_session(tmp_path):
    """Also where it ended the session before, or where only an item that is too rare stood between."""
    minute, lines = 60, ["user,item,ts"]
    for user in range(8):
        bought = [("A", 0), ("A", 25), ("B", 50), ("B", 500), ("C", 505), (f"rare{user}", 510), ("C", 515), ("D", 520)]
        lines += [f"u{user},{item},{T0 + user * 10**6 + at * minute}" for item, at in bought]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    titled = ["A", "B", "C", "D", *(f"rare{user}" for user in range(8))]
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{item},Thing {item}\n" for item in titled))
    files = {"interactions": str(tmp_path / "log.csv"), "items": str(tmp_path / "items.csv")}
    out = tmp_path / "out"
    prepare_data(
        **files, output_dir=str(out), category="T", codes=4, min_interactions=2, session_gap=30.0, drop_repeats=True
    )
    sessions = {}
    for split in ("train", "valid", "test"):
        for row in read_rows(out / split / "T.csv"):
            history = [*ast.literal_eval(row["history_item_title"]), row["item_title"]]
            user = row["user_id"]
            sessions[user] = max(sessions.get(user, []), history, key=len)
    assert {user.split("/")[1]: history for user, history in sessions.items()} == {
        "1": ["Thing A", "Thing B"],
        "2": ["Thing B", "Thing C", "Thing D"],
    }


def test_ids_may_be_made_of_brand_and_price(tmp_path, capsys):
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
    assert "made from the price, too; " in capsys.readouterr().out  # of which the new file has none
    told = problems_of(prepare_data, **files, **flags, output_dir=str(tmp_path / "x"), text_columns="title,colour")
    assert "--text_columns 'title,colour': must be some of title, description, brand" in told


def test_a_text_that_ids_are_to_be_made_of_needs_its_column(log, tmp_path):
    """IDs would be those of the other texts, without a word."""
    told = problems_of(prepare_data, **log, text_columns="title,description,brand")
    assert f"{log['items']} has no column that is recognized as the brand; call the column brand" in told
    assert (
        "recognized as the description; name it with --description_column" in told and told.count("text_columns") == 2
    )
    rows = "\n".join(f"{i}\tRed {i}\tSteel" for i in range(12))
    written(tmp_path / "items.tsv", f"id\tname\tstore\n{rows}")  # as in the metadata of Amazon of 2023
    prepare_data(**log, text_columns="title,brand", skip_bad_rows=True)


def test_new_items_without_the_descriptions_that_old_ids_are_made_of_are_warned_of(log, tmp_path, capsys):
    rows = "\n".join(f"{i}\tRed nut {i}\tSteel, {i % 3} mm" for i in range(12))
    written(tmp_path / "items.tsv", f"id\tname\tText\n{rows}")
    prepare_data(**log, description_column="Text", skip_bad_rows=True)
    written(tmp_path / "new.tsv", "id\tname\tText\n99\tRed nut 99\tSteel, 2 mm\n")
    add = {"add_items": str(tmp_path / "new.tsv"), "dataset": log["output_dir"]}
    capsys.readouterr()
    for columns, warned in (({}, 1), ({"description_column": "Text"}, 0)):
        prepare_data(**add, **columns, output_dir=str(tmp_path / f"more{warned}"))
        assert capsys.readouterr().out.count("warning: IDs of old items are made from the description") == warned
