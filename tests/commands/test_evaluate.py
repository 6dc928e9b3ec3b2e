import json
import shutil
from pathlib import Path

import pytest
from helpers import evaluate_flags, read_rows, refused, run_command, succeed, write_rows
from processes import start_command
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
from minionerec.data.files import read_info, read_interactions
from minionerec.metrics import format_metrics, popularity, rank_of, ranking_metrics


def evaluated(files, result, **more) -> tuple[list, dict, str]:
    done = succeed("evaluate.py", **evaluate_flags(files, result, **more))
    metrics = json.loads(result.with_suffix(".metrics.json").read_text())
    return json.loads(result.read_text()), metrics, done.stdout


RANKING = ("HR@1", "HR@10", "NDCG@10", "HR@20", "MRR")


def test_rankings_and_metrics_of_an_adapter(files, base, checkpoint, tmp_path):
    rows, metrics, printed = evaluated(files, tmp_path / "r.json", base_model=checkpoint, train_file=files["train"])
    sids = set(read_info(files["info"]))
    assert len(rows) == 10
    for row in rows:
        assert set(row) == {"input", "output", "predict"}
        assert row["output"] in sids and row["input"].startswith("A customer bought these bolts")
        assert len(row["predict"]) == len(set(row["predict"])) == 20 and set(row["predict"]) <= sids
    expected = ranking_metrics([rank_of(row["output"], row["predict"]) for row in rows], 20)
    assert {name: metrics[name] for name in expected} == expected
    assert "popularity" in printed and "HR@K" in printed

    # The same adapter on a base it is told, and on one whose recorded place is gone.
    again, _, _ = evaluated(files, tmp_path / "b.json", base_model=base, adapter=checkpoint)
    assert again == rows
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/base"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    lost = run_command("evaluate.py", **evaluate_flags(files, tmp_path / "l.json", base_model=moved))
    assert lost.returncode == 2
    assert "its base /nowhere/base was not found; give the folder of the base as --base_model" in lost.stderr


@pytest.mark.parametrize("exclude_seen", [True, "earlier"])
def test_what_was_seen_is_not_ranked_before_anything_else(files, checkpoint, tmp_path, exclude_seen):
    """Here all SIDs are ranked, so that what is left out stands at the end."""
    flags = {"base_model": checkpoint, "train_file": files["train"], "num_beams": 39}
    plain, _, _ = evaluated(files, tmp_path / "p.json", **flags)
    found, metrics, printed = evaluated(files, tmp_path / "r.json", **flags, exclude_seen=exclude_seen)
    rows, lost = list(read_interactions(files["test"], "test_data_path")), 0
    for row, of_all, ranked in zip(rows, plain, found, strict=True):
        seen = list(dict.fromkeys(row.sid_history))
        if exclude_seen == "earlier":
            seen.remove(row.sid_history[-1])
        assert ranked["predict"] == [sid for sid in of_all["predict"] if sid not in seen] + seen
        lost += row.sid in seen
    assert metrics["exclude_seen"] == exclude_seen
    assert (f"{lost} of 10 rows have a target that --exclude_seen leaves out" in printed) == bool(lost)
    # Popularity leaves the same out.
    bought = popularity((row.sid for row in read_interactions(files["train"], "train_file")), 39)
    ranks = []
    for row in rows:
        seen = set(row.sid_history) - ({row.sid_history[-1]} if exclude_seen == "earlier" else set())
        ranks.append(None if row.sid in seen else rank_of(row.sid, [sid for sid in bought if sid not in seen]))
    shown = printed.partition("popularity, for comparison:\n")[2]
    assert shown.startswith(format_metrics(ranking_metrics(ranks, 39)))


def test_a_target_that_was_seen_is_a_miss(files, checkpoint, tmp_path):
    """Each row asks for the first item of its history, which stands at the end of a ranking of all SIDs."""
    cells = read_rows(files["test"])
    for row, past in zip(cells, read_interactions(files["test"], "test_data_path"), strict=True):
        row |= {"item_sid": past.sid_history[0], "item_id": json.loads(row["history_item_id"])[0]}
        row["item_title"] = past.title_history[0]
    asked = write_rows(tmp_path / "test.csv", cells)
    flags = {"base_model": checkpoint, "test_data_path": asked, "num_beams": 39, "exclude_seen": True}
    found, metrics, printed = evaluated(files, tmp_path / "r.json", **flags)
    assert all(row["output"] in row["predict"] for row in found)
    assert metrics["MRR"] == metrics["HR@20"] == metrics["items"]["MRR"] == 0
    assert "10 of 10 rows have a target that --exclude_seen leaves out" in printed


@pytest.mark.parametrize(("target", "shared"), [("1", True), ("5", False)])
def test_targets_that_recommend_py_would_not_leave_out_are_counted(files, base, tmp_path, target, shared):
    """Where a SID is left out, so are all its items: here item 1 after item 0."""
    cells = read_rows(files["test"])
    sid = {"1": "<a_0><b_0><c_0>", "5": "<a_0><b_1><c_2>"}[target]
    asked = {"history_item_sid": str([sid]), "history_item_title": "['x']", "item_sid": sid, "item_id": target}
    path = str(write_rows(tmp_path / "test.csv", [{**cells[0], **asked}, *cells[1:]]))
    flags = evaluate_flags(files, str(tmp_path / "r.json"), base_model=base, category="bolts", test_data_path=path)
    notes = evaluate.read_input(evaluate.EvaluateFlags(**flags, exclude_seen=True)).notes
    (note,) = [note for note in notes if "a target that --exclude_seen leaves out" in note]
    of_several = "1 have a SID of several items, of which recommend.py leaves out only those of the history"
    assert note.endswith(of_several) == shared


@pytest.mark.slow
def test_two_processes_give_the_same_rankings(files, checkpoint, tmp_path):
    rows, metrics, _ = evaluated(files, tmp_path / "one.json", base_model=checkpoint, batch_size=2)
    flags = evaluate_flags(files, tmp_path / "two.json", base_model=checkpoint, batch_size=2)
    started = start_command("evaluate.py", flags, ranks=2)
    assert started.wait() == [0, 0], started.errors[-3000:]
    assert json.loads((tmp_path / "two.json").read_text()) == rows
    two = json.loads((tmp_path / "two.metrics.json").read_text())
    assert {name: two[name] for name in RANKING} == {name: metrics[name] for name in RANKING}


def test_a_whole_checkpoint_without_a_record(files, base, tmp_path):
    # Its tokenizer knows no SID tokens: they take many tokens each, and still every beam is a SID.
    rows, _, _ = evaluated(files, tmp_path / "r.json", base_model=base, category="bolts", num_beams=100)
    assert all(sorted(row["predict"]) == sorted(read_info(files["info"])) for row in rows)


def test_a_catalogue_with_fewer_items_than_the_histories_hold(files, checkpoint, tmp_path):
    """Rankings hold only its items; a target that it lacks is a miss; an unknown SID in a history is refused."""
    rows = list(read_interactions(files["test"], "test_data_path"))
    lines = Path(files["info"]).read_text(encoding="utf-8").splitlines()
    targets = {row.sid for row in rows[:4]}
    kept = [line for line in lines if line.split("\t")[0] in targets]
    (tmp_path / "info.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
    flags = {"base_model": checkpoint, "info_file": tmp_path / "info.txt"}
    found, metrics, printed = evaluated(files, tmp_path / "r.json", **flags, K=15)
    assert f"--K 15 has no metrics: {tmp_path}/info.txt has {len(targets)} SIDs to rank" in printed
    missing = sum(row.sid not in targets for row in rows)
    assert missing and f"{missing} of 10 rows have a target that --info_file lacks; they count as misses" in printed
    assert not {sid for row in rows for sid in row.sid_history} <= targets
    assert all(sorted(row["predict"]) == sorted(targets) for row in found)
    ranks = [rank_of(row["output"], row["predict"]) for row in found]
    assert ranks.count(None) == missing
    expected = ranking_metrics(ranks, len(targets))
    assert {name: metrics[name] for name in expected} == expected
    # The prompts are those of the whole catalogue.
    whole, _, _ = evaluated(files, tmp_path / "w.json", base_model=checkpoint)
    assert [row["input"] for row in found] == [row["input"] for row in whole]

    text = Path(files["test"]).read_text(encoding="utf-8").replace(rows[0].sid_history[0], "<z_9>")
    (tmp_path / "test.csv").write_text(text, encoding="utf-8")
    flags = evaluate_flags(files, tmp_path / "z.json", base_model=checkpoint, test_data_path=tmp_path / "test.csv")
    refused("evaluate.py", "SID '<z_9>' becomes", **flags)


@pytest.mark.parametrize("popular", ["0", "1"])
def test_items_that_share_a_sid_have_metrics_of_their_own(files, checkpoint, tmp_path, popular):
    """Ten rows with the targets 0 and 1, which share a SID: the popular one is ranked first."""
    rows = read_rows(files["test"])
    sid = "<a_0><b_0><c_0>"

    def write(name: str, items: list[str]) -> Path:
        changed = [{**row, "item_id": i, "item_sid": sid} for row, i in zip(rows, items, strict=True)]
        return write_rows(tmp_path / name, changed)

    targets = ["0", "1"] * 5
    flags = {"base_model": checkpoint, "test_data_path": write("t.csv", targets), "num_beams": 39}
    flags["train_file"] = write("train.csv", [popular] * 9 + ["1"])
    found, metrics, printed = evaluated(files, tmp_path / "r.json", **flags)
    assert [set(row) for row in found] == [{"input", "output", "predict"}] * 10
    sid_ranks = [rank_of(sid, row["predict"]) for row in found]
    item_ranks = [rank + (target != popular) for rank, target in zip(sid_ranks, targets, strict=True)]
    item_ranks = [rank if rank < 39 else None for rank in item_ranks]
    by_sid, by_item = ranking_metrics(sid_ranks, 39), ranking_metrics(item_ranks, 39)
    assert metrics["items"] == by_item and {name: metrics[name] for name in by_sid} == by_sid
    table = format_metrics(by_item)
    rule = "items instead of SIDs, 2 of 40 share theirs and follow each other, the most bought first:"
    assert f"{format_metrics(by_sid)}\n{rule}\n{table}" in printed


def test_items_cannot_be_told_apart_without_their_ids(files, checkpoint, tmp_path):
    """SIDs are evaluated all the same, and a line says why there is no more."""
    rows = read_rows(files["test"])
    without = [{name: cell for name, cell in row.items() if name != "item_id"} for row in rows]
    renumbered = [{**row, "item_id": str((int(row["item_id"]) + 7) % 40)} for row in rows]
    for name, changed, reason in (
        ("without.csv", without, "column item_id is missing"),
        ("renumbered.csv", renumbered, f"in {files['info']} and {rows[0]['item_sid']} in"),
    ):
        flags = {"base_model": checkpoint, "test_data_path": write_rows(tmp_path / name, changed)}
        _, metrics, printed = evaluated(files, tmp_path / "r.json", **flags)
        (line,) = [line for line in printed.splitlines() if "share SIDs" in line]
        assert line.startswith("items share SIDs, and metrics are those of SIDs only: ") and reason in line
        assert "items" not in metrics and "HR@10" in metrics


def test_a_base_of_the_same_shape_with_other_weights_is_refused(files, base, checkpoint, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(base)
    other.get_input_embeddings().weight.data[3] += 0.1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    flags = evaluate_flags(files, tmp_path / "r.json", base_model=tmp_path / "other", adapter=checkpoint)
    refused("evaluate.py", f"{checkpoint} does not fit the base {tmp_path}/other: these are not the weights", **flags)


def test_what_differs_from_the_training_is_named(files, checkpoint, tmp_path):
    wording = {"tasks": {"sid_history_to_sid": {"instruction": "Which of the {category} comes next?"}}}
    (tmp_path / "prompts.json").write_text(json.dumps(wording))
    _, _, printed = evaluated(files, tmp_path / "r.json", base_model=checkpoint, category="nuts")
    assert f"warning: --category nuts is ignored: {checkpoint} was trained with bolts" in printed
    rows, _, printed = evaluated(
        files, tmp_path / "r.json", base_model=checkpoint, category="bolts", prompt_file=tmp_path / "prompts.json"
    )
    assert "warning: the wording of --prompt_file differs" in printed and "tasks sid_history_to_sid" in printed
    assert rows[0]["input"].startswith("Which of the bolts comes next?")
