"""evaluate.py tells where a model is weak: by how often targets were bought, and by how long histories are."""

import csv
import json

import pytest
from helpers import COLUMNS

import evaluate
from minionerec.data.files import read_interactions
from minionerec.metrics import format_groups, rank_of, ranking_metrics


@pytest.mark.parametrize("kept", [2, 40])
def test_rows_are_grouped_by_target_and_history(files, base, tmp_path, capsys, kept):
    """A training file of few rows lacks some targets; one of many lacks none. Some are in histories only."""
    with open(files["train"], encoding="utf-8", newline="") as file:
        rows = (list(csv.DictReader(file)) * 7)[:: 40 // kept]
    with open(tmp_path / "train.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    evaluate.evaluate(
        base_model=base,
        train_file=str(tmp_path / "train.csv"),
        info_file=files["info"],
        category="bolts",
        test_data_path=files["test"],
        result_json_data=str(tmp_path / "result.json"),
        num_beams=20,
    )
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "result.metrics.json").read_text())
    trained = list(read_interactions(str(tmp_path / "train.csv"), "train_file"))
    bought = [row.sid for row in trained]
    seen = {sid for row in trained for sid in row.sid_history}
    tests = list(read_interactions(files["test"], "test_data_path"))
    rankings = [row["predict"] for row in json.loads((tmp_path / "result.json").read_text())]
    expected = {"targets": {}, "histories": {}}
    for row, ranking in zip(tests, rankings, strict=True):
        times, length = bought.count(row.sid), len(row.sid_history)
        target = "more often" if times > 5 else "1 to 5 times" if times or row.sid in seen else "never"
        history = "1 item" if length == 1 else "2 or 3 items" if length < 4 else "4 or more items"
        for kind, group in (("targets", target), ("histories", history)):
            expected[kind].setdefault(group, []).append(rank_of(row.sid, ranking))
    assert ("never" in expected["targets"]) == (kept == 2) and len(expected["histories"]) == 3
    for kind, groups in expected.items():
        assert set(metrics[kind]) == set(groups)
        for group, ranks in groups.items():
            by_hand = ranking_metrics(ranks, 10)
            found = metrics[kind][group]
            assert list(found) == ["rows", "HR@10", "NDCG@10", "items HR@10", "items NDCG@10"]
            assert (found["rows"], found["HR@10"], found["NDCG@10"]) == (
                len(ranks),
                by_hand["HR@10"],
                by_hand["NDCG@10"],
            )
        assert format_groups({"targets": "targets, bought"}.get(kind, kind), metrics[kind]) in printed
