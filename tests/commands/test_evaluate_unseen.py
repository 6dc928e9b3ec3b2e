"""evaluate.py prints the rows whose target was never trained apart from the rest."""

import csv
import json

import pytest
from helpers import COLUMNS

import evaluate
from minionerec.data.files import read_interactions
from minionerec.metrics import format_metrics, rank_of, ranking_metrics


@pytest.mark.parametrize("kept", [2, 30])
def test_rows_with_targets_outside_the_training_file(files, base, tmp_path, capsys, kept):
    """A training file of few rows lacks some targets; one of many lacks none."""
    with open(files["train"], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:kept]
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
    trained = list(read_interactions(str(tmp_path / "train.csv"), "train_file"))
    seen = {sid for row in trained for sid in [row.sid, *row.sid_history]}
    results = json.loads((tmp_path / "result.json").read_text())
    unseen = [rank_of(row["output"], row["predict"]) for row in results if row["output"] not in seen]
    assert bool(unseen) == (kept == 2) and len(unseen) < len(results)
    assert ("have a target that does not occur in the training file" in printed) == (kept == 2)
    if unseen:
        table = format_metrics(ranking_metrics(unseen, 20))
        assert f"{len(unseen)} of 10 rows have a target that does not occur in the training file:\n{table}\n" in printed
