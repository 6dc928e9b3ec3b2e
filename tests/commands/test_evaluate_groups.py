"""evaluate.py tells where a model is weak: by how often targets were bought, and by how long histories are."""

import json
import math
from types import SimpleNamespace

import pytest
from helpers import evaluate_flags, read_rows, strings, write_rows

import evaluate
from minionerec.data.files import read_info_items, read_interactions
from minionerec.data.items import read_targets
from minionerec.metrics import format_groups, rank_of, ranking_metrics


@pytest.mark.parametrize("kept", [2, 40])
def test_rows_are_grouped_by_target_and_history(files, base, tmp_path, capsys, kept):
    """A training file of few rows lacks some targets; one of many lacks none. Some are in histories only."""
    cells = (read_rows(files["train"]) * 7)[:: 40 // kept]
    write_rows(tmp_path / "train.csv", cells)
    flags = {"base_model": base, "category": "bolts", "train_file": tmp_path / "train.csv"}
    evaluate.evaluate(**strings(evaluate_flags(files, tmp_path / "result.json", **flags)))
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "result.metrics.json").read_text())
    trained = list(read_interactions(str(tmp_path / "train.csv"), "train_file"))
    bought = [row.sid for row in trained], [row["item_id"] for row in cells]
    seen = (
        {sid for row in trained for sid in row.sid_history},
        {str(item) for row in cells for item in json.loads(row["history_item_id"])},
    )
    tests = list(read_interactions(files["test"], "test_data_path"))
    listed = read_info_items(files["info"])
    items, targets = read_targets(listed, files["info"], str(tmp_path / "train.csv"), files["test"])
    rankings = [row["predict"] for row in json.loads((tmp_path / "result.json").read_text())]
    expected = {"targets": {}, "histories": {}}
    for row, target, ranking in zip(tests, targets, rankings, strict=True):
        length = len(row.sid_history)
        history = "1 item" if length == 1 else "2 or 3 items" if length < 4 else "4 or more items"
        ranks = {"": rank_of(row.sid, ranking), "items ": items.rank_of(target, ranking, 20)}
        for i, (prefix, rank) in enumerate(ranks.items()):
            name = (row.sid, items.all[target].id)[i]
            times = bought[i].count(name)
            group = "more often" if times > 5 else "1 to 5 times" if times or name in seen[i] else "never"
            for kind, one in (("targets", group), ("histories", history)):
                expected[kind].setdefault(one, {}).setdefault(prefix, []).append(rank)
    assert ("never" in expected["targets"]) == (kept == 2) and len(expected["histories"]) == 3
    for kind, groups in expected.items():
        assert set(metrics[kind]) == set(groups)
        for group, ranks in groups.items():
            by_hand = {}
            for prefix in ("", "items "):
                by_hand[f"{prefix}rows"] = len(ranks.get(prefix, []))
                found = ranking_metrics(ranks[prefix], 10) if prefix in ranks else {}
                by_hand |= {prefix + name: found[name] for name in ("HR@10", "NDCG@10") if found}
            assert metrics[kind][group] == by_hand and list(metrics[kind][group]) == list(by_hand)
        assert format_groups({"targets": "targets, bought"}.get(kind, kind), metrics[kind]) in printed


@pytest.mark.parametrize("column", [True, False])
def test_items_go_by_their_own_purchases(tmp_path, column):
    """Four items of one SID: bought six times, bought once, only in a history, never; and one that is sold no more."""
    lines = [f"<a>\tBolt\t{item}\n" for item in ("x-1", "x-2", "x-3", "x-4")]
    (tmp_path / "info.txt").write_text("".join(lines))
    header = f"history_item_sid,item_sid,item_id{',history_item_id' if column else ''}\n"
    for name, targets in (("train", ["x-1"] * 6 + ["x-2"]), ("test", ["x-1", "x-2", "x-3", "x-4", "gone"])):
        rows = [f"['<a>'],{'<b>' if i == 'gone' else '<a>'},{i}" + ",['x-3']" * column for i in targets]
        (tmp_path / f"{name}.csv").write_text(header + "\n".join(rows) + "\n")
    train, test, info = (str(tmp_path / name) for name in ("train.csv", "test.csv", "info.txt"))
    items, targets = read_targets(read_info_items(info), info, train, test)
    examples = list(read_interactions(test, "test_data_path", titles=False))
    inputs = SimpleNamespace(examples=examples, items=items, targets=targets)
    ranks, of_items = [0, 0, 0, 0, None], [0, 1, 2, 3, None]
    found = evaluate.groups_of(inputs, ranks, of_items, evaluate.read_purchases(train, items), 5)["targets"]
    rows = {group: (values["rows"], values["items rows"]) for group, values in found.items()}
    if column:
        assert rows == {"never": (1, 2), "1 to 5 times": (0, 2), "more often": (4, 1)}
        assert found["1 to 5 times"]["items NDCG@5"] == pytest.approx((1 / math.log2(3) + 0.5) / 2)
        assert "HR@5" not in found["1 to 5 times"]
        lines = [line.split() for line in format_groups("bought", found).splitlines()]
        assert lines[0] == ["bought", "rows", "HR@5", "NDCG@5", "items", "rows", "items", "HR@5", "items", "NDCG@5"]
        assert lines[2] == ["1", "to", "5", "times", "0", "2", "1.0000", "0.5655"]
    else:  # the histories may mean any item of the SID
        assert rows == {"never": (1, 1), "1 to 5 times": (0, 3), "more often": (4, 1)}
