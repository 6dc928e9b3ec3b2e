"""The places of test rows' targets are kept, and give the metrics that they came from."""

import json
import random

from helpers import run_command, succeed

from minionerec.metrics import ranking_metrics

# Items 2 and 3 share a SID; the second of them is bought more often.
SIDS = ["<a_1><b_1><c_1>", "<a_1><b_2><c_1>", "<a_2><b_1><c_1>", "<a_2><b_1><c_1>"]
COLUMNS = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"


def write_rows(path, targets):
    rows = [f"u{user},['x'],x,[0],{item},['{SIDS[0]}'],{SIDS[item]}" for user, item in enumerate(targets)]
    path.write_text("\n".join([COLUMNS, *rows]) + "\n")
    return path


def run_places(**flags):
    return succeed("benchmarks/places.py", **flags).stdout


def test_places_of_sids_and_items_are_kept_and_compared(tmp_path):
    info = tmp_path / "info.txt"
    info.write_text("".join(f"{sid}\titem {item}\t{item}\n" for item, sid in enumerate(SIDS)))
    rng, distinct = random.Random(0), sorted(set(SIDS))
    targets = [rng.randrange(4) for _ in range(40)]
    files = {
        "test_data_path": write_rows(tmp_path / "test.csv", targets),
        "train_file": write_rows(tmp_path / "train.csv", [0, 3, 3, 2, 1]),
        "info_file": info,
    }
    path, ranked = tmp_path / "places.csv", {}
    for name in ("one", "other, later"):
        ranked[name] = [rng.sample(distinct, 3) for _ in targets]
        rows = zip(targets, ranked[name], strict=True)
        result = tmp_path / "result.json"
        result.write_text(json.dumps([{"output": SIDS[item], "predict": ranking} for item, ranking in rows]))
        run_places(add=f"{name}={result}", path=path, **files)

    table = [line.strip("| ").split(" | ") for line in run_places(path=path, against="one").splitlines()]
    for name, cells in zip(ranked, table[2:], strict=True):
        assert cells[0] == name
        rows = list(zip(targets, ranked[name], strict=True))
        of_sids = ranking_metrics([ranking.index(SIDS[item]) for item, ranking in rows], 50)
        expected = [of_sids[metric] for metric in ("HR@1", "HR@10", "NDCG@10", "MRR", "HR@50")]
        items = {SIDS[0]: [0], SIDS[1]: [1], SIDS[2]: [3, 2]}
        places = [[one for sid in ranking for one in items[sid]].index(item) for item, ranking in rows]
        of_items = ranking_metrics(places, 50)
        expected += [of_items["HR@10"], of_items["NDCG@10"]]
        assert cells[1:8] == [f"{value:.4f}" for value in expected]
    assert table[2][8:] == ["1.000 [1.000, 1.000]"] * 5 and table[3][8] != table[2][8]


def test_a_ranking_of_other_rows_is_refused(tmp_path):
    (tmp_path / "info.txt").write_text("".join(f"{sid}\titem {item}\t{item}\n" for item, sid in enumerate(SIDS)))
    (tmp_path / "result.json").write_text(json.dumps([{"output": SIDS[0], "predict": SIDS[:3]}]))
    flags = {"info_file": tmp_path / "info.txt", "path": tmp_path / "places.csv"}
    for others in ([0, 1], [1]):
        flags["test_data_path"] = write_rows(tmp_path / "test.csv", others)
        result = run_command("benchmarks/places.py", add=f"x={tmp_path / 'result.json'}", **flags)
        assert result.returncode == 2 and "does not rank" in result.stderr
