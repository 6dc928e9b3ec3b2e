"""The tables of scripts/table.py (means, spreads and ratios by hand) and scripts/curves.py."""

import json

import pytest

from minionerec.errors import InputError, Problems
from scripts.curves import curves
from scripts.table import folders_of, read_rankings, table


@pytest.fixture
def make_run(tmp_path):
    def make(name: str, found: list[bool]) -> str:
        """A run whose first place is the target in the rows of `found`, and which misses it in the others."""
        folder = tmp_path / name
        folder.mkdir()
        pairs = zip("ab", found, strict=True)
        rows = [{"input": "", "output": sid, "predict": [sid if hit else "<x>"]} for sid, hit in pairs]
        (folder / "result.json").write_text(json.dumps(rows))
        costs = {"trainable_parameters": 1000, "seconds": 10 * sum(found), "peak_memory_gb": 1.0, "checkpoint_mb": 2.0}
        (folder / "metrics.json").write_text(json.dumps(costs))
        return str(folder)

    return make


def test_the_table_by_hand(tmp_path, make_run, capsys):
    header = "history_item_sid,item_sid,history_item_title,item_title\n"
    for name, sids in (("train", "aab"), ("test", "ab")):
        (tmp_path / f"{name}.csv").write_text(header + "".join(f"\"['a']\",{sid},\"['x']\",x\n" for sid in sids))
    runs = {"full SFT": [[1, 0], [1, 1]], "lora SFT": [[1, 1], [1, 1]]}
    pairs = [f"{name}={make_run(f'{name}{i}', seed)}" for name, seeds in runs.items() for i, seed in enumerate(seeds)]
    arguments = {"train_file": f"{tmp_path}/train.csv", "test_data_path": f"{tmp_path}/test.csv"}
    table(**arguments, runs=",".join(pairs), intervals=True, against="full", figure=f"{tmp_path}/figure.png")
    header, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    rows = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert rows["popularity"]["HR@1"].startswith("0.5000 [0.0000, 1.0000]")
    # Seeds of 0.5 and 1: their standard deviation is 0.3536. Row 1 is found by both, row 2 by one of them.
    assert rows["full SFT"]["HR@1"] == "0.7500 [0.5000, 1.0000] ± 0.3536"
    assert rows["full SFT"]["MRR / full"] == "" and rows["full SFT"]["time (s)"] == "15"
    assert rows["lora SFT"]["HR@1"] == "1.0000 [1.0000, 1.0000] ± 0.0000"
    # Seed by seed 2 and 1; together 1 / 0.75, and with only one row 1 or 2.
    assert rows["lora SFT"]["MRR / full"] == "1.333 [1.000, 2.000] ± 0.707"
    assert "NDCG@10" not in rows["lora SFT"] and rows["lora SFT"]["NDCG@10 / full"] == ""  # rankings of one item
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("info", ["c\tx\t1\nd\tx\t2\n", "c\tx\t1\nd\tx\t2\nd\ty\t3\n", ""])
def test_popularity_ranks_the_catalogue(tmp_path, make_run, capsys, info):
    """What is sold no more does not take the places of what is; with a hit in no row there is no ratio."""
    header = "history_item_sid,item_sid,history_item_title,item_title,item_id\n"
    for name, sids in (("train", "aaabbbccd"), ("test", "cc")):
        (tmp_path / f"{name}.csv").write_text(header + "".join(f"\"['c']\",{sid},\"['x']\",x,1\n" for sid in sids))
    (tmp_path / "info.txt").write_text(info)
    for name in ("full", "lora"):
        make_run(name, [0, 0])
        rows = [{"output": "c", "predict": ["d"]}] * 2
        (tmp_path / name / "result.json").write_text(json.dumps(rows))
    runs = f"full={tmp_path}/full,lora={tmp_path}/lora"
    files = {"train_file": f"{tmp_path}/train.csv", "test_data_path": f"{tmp_path}/test.csv"}
    table(**files, info_file=f"{tmp_path}/info.txt" if info else "", runs=runs, intervals=True, against="full")
    _, _, popular, _, lora = capsys.readouterr().out.splitlines()
    assert popular.startswith(f"| popularity | {1 if info else 0:.4f} ")
    assert "nan" not in lora and "inf" not in lora


def test_items_that_share_a_sid_are_ranked_apart(tmp_path, make_run, capsys):
    """Items 1 and 2 are <a>, and 2 is bought more often, so it comes first; both rows rank <a>, then <b>."""
    (tmp_path / "info.txt").write_text("<a>\tx\t1\n<a>\tx\t2\n<b>\tx\t3\n")
    header = "history_item_sid,item_sid,item_id\n"
    for name, items in (("train", "223"), ("test", "12")):
        lines = [f"\"['<a>']\",{'<b>' if item == '3' else '<a>'},{item}\n" for item in items]
        (tmp_path / f"{name}.csv").write_text(header + "".join(lines))
    run = make_run("r", [1, 1])
    rows = [{"input": "", "output": '"<a>"\n', "predict": ["<a>", "<b>", *(f"<{i}>" for i in range(8))]}] * 2
    (tmp_path / "info.txt").open("a").writelines(f"<{i}>\tx\t{i + 10}\n" for i in range(8))
    (tmp_path / "r" / "blended.json").write_text(json.dumps(rows))
    arguments = {"train_file": f"{tmp_path}/train.csv", "test_data_path": f"{tmp_path}/test.csv"}
    table(**arguments, info_file=f"{tmp_path}/info.txt", runs=f"x={run}/blended.json")
    header, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    row = dict(zip(header, lines[-1], strict=True))
    assert row["HR@10"] == row["NDCG@10"] == row["HR@1"] == "1.0000" and "HR@50" not in row
    assert row["items HR@10"] == "1.0000" and row["items NDCG@10"] == "0.8155"  # (1 + 1 / log2(3)) / 2
    rows[1]["predict"][5] = "<new>"
    (tmp_path / "r" / "blended.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="ranks <new>, which --info_file lacks"):
        table(**arguments, info_file=f"{tmp_path}/info.txt", runs=f"x={run}/blended.json")


def test_rows_that_treat_what_was_seen_otherwise_are_told_from_others(tmp_path, make_run, capsys):
    """As in compare.sh with EVAL_FLAGS="--exclude_seen earlier", where SASRec and popularity leave nothing out."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("history_item_sid,item_sid\n\"['a']\",a\n\"['a']\",b\n")
    runs = {name: make_run(name, [1, 0]) for name in ("SASRec", "full", "lora")}
    arguments = {"train_file": f"{tmp_path}/train.csv", "test_data_path": f"{tmp_path}/test.csv"}
    arguments["runs"] = ",".join(f"{name}={folder}" for name, folder in runs.items())
    for name in runs:
        (tmp_path / name / "result.metrics.json").write_text("{}")
    table(**arguments)
    assert not capsys.readouterr().err
    for name in ("full", "lora"):
        (tmp_path / name / "result.metrics.json").write_text('{"exclude_seen": "earlier"}')
    table(**arguments)
    line = "note: rows that do not compare: full, lora with --exclude_seen earlier; popularity, SASRec without it"
    assert capsys.readouterr().err == f"table.py: {line}\n"
    for name, penalty in (("full", 1.0), ("lora", 1.5), ("SASRec", 1.0)):
        (tmp_path / name / "result.metrics.json").write_text(json.dumps({"seen_penalty": penalty}))
    table(**arguments)
    line = "SASRec, full with --seen_penalty 1; lora with --seen_penalty 1.5; popularity without it"
    assert capsys.readouterr().err == f"table.py: note: rows that do not compare: {line}\n"


@pytest.mark.parametrize(("result", "metrics"), [("result.json", "result.metrics.json"), ("0.json", "0.metrics")])
@pytest.mark.parametrize(("exclude_seen", "found"), [(True, 0.5), ("earlier", 1.0), (False, 1.0)])
def test_a_target_that_was_seen_is_a_miss_as_in_evaluate(
    tmp_path, make_run, capsys, result, metrics, exclude_seen, found
):
    """In a catalogue hardly larger than a ranking it stands there all the same."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("history_item_sid,item_sid\n\"['a']\",a\n\"['a']\",b\n")
    run = make_run("r", [1, 1])
    (tmp_path / "r" / "result.json").rename(tmp_path / "r" / result)
    (tmp_path / "r" / metrics).write_text(json.dumps({"exclude_seen": exclude_seen}))
    table(f"{tmp_path}/train.csv", f"{tmp_path}/test.csv", runs=f"x={run}/{result}")
    printed, errors = capsys.readouterr()
    assert printed.splitlines()[-1].startswith(f"| x | {found:.4f} |")
    assert ("x with --exclude_seen" in errors) == bool(exclude_seen)


@pytest.mark.parametrize("repeated", [True, False])
def test_items_that_cannot_be_told_apart_leave_the_metrics_of_sids(tmp_path, make_run, capsys, repeated):
    """The files have no item ids. A line that the catalogue repeats is no item that shares a SID."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("history_item_sid,item_sid\n\"['a']\",a\n\"['a']\",b\n")
    (tmp_path / "info.txt").write_text(f"a\tx\t1\nb\tx\t2\nb\tx\t{2 if repeated else 3}\n<x>\tx\t4\n")
    arguments = {"train_file": f"{tmp_path}/train.csv", "test_data_path": f"{tmp_path}/test.csv"}
    arguments["info_file"] = f"{tmp_path}/info.txt"
    table(**arguments, runs=f"x={make_run('r', [1, 0])}")
    printed, errors = capsys.readouterr()
    assert printed.splitlines()[-1].startswith("| x | 0.5000 |") and "items" not in printed
    assert repeated == (not errors)
    assert repeated or ("metrics are those of SIDs only: --train_file" in errors and "item_id is missing" in errors)
    (tmp_path / "info.txt").write_text("a\tx\t1\nb\tx\t2\n")
    with pytest.raises(InputError, match="ranks <x>, which --info_file lacks"):
        table(**arguments, runs=f"x={tmp_path}/r")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "b"}, "has the target 'b' in row 1, "),
        ({"output": 3}, "holds no rankings of evaluate.py"),
        ({"predict": []}, "holds no rankings of evaluate.py"),
        ({"predict": [1, [2]]}, "holds no rankings of evaluate.py"),
        ({"predict": ["a", "b"]}, "ranks 1 to 2 items a row"),
        ({"seconds": float("nan")}, "does not say what the training cost"),
    ],
)
def test_the_table_refuses_damaged_runs(tmp_path, make_run, change, message):
    for name, sids in (("train", "aab"), ("test", "ab")):
        rows = "".join(f"\"['x']\",{sid},\"['old']\",new\n" for sid in sids)
        (tmp_path / f"{name}.csv").write_text("history_item_sid,item_sid,history_item_title,item_title\n" + rows)
    folder = tmp_path / "run"
    make_run("run", [1, 1])
    name = "metrics.json" if "seconds" in change else "result.json"
    data = json.loads((folder / name).read_text())
    (data if "seconds" in change else data[0]).update(change)
    (folder / name).write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        table(f"{tmp_path}/train.csv", f"{tmp_path}/test.csv", runs=f"x={folder}")


def test_equal_sids_of_rankings_are_one_text(tmp_path):
    rows = [{"output": "<a_1>", "predict": [f"<a_{(row + i) % 7}>" for i in range(5)]} for row in range(9)]
    (tmp_path / "result.json").write_text(json.dumps(rows))
    rankings = read_rankings(str(tmp_path / "result.json"), None, "")
    assert rankings == [row["predict"] for row in rows]
    assert len({id(sid) for ranking in rankings for sid in ranking}) == 7


def test_what_the_table_refuses(tmp_path, make_run, files):
    """Problems of all runs together, those of their files too."""
    good, folders = make_run("good", [1, 1]), [tmp_path / name for name in ("none", "odd", "other")]
    for folder, metrics, result in zip(folders[1:], ('{"seconds": "x"}', "[]"), ('[{"output": 1}]', "{"), strict=True):
        folder.mkdir()
        (folder / "metrics.json").write_text(metrics)
        (folder / "result.json").write_text(result)
    runs = ",".join(f"a={folder}" for folder in (good, *folders))
    with pytest.raises(InputError) as error:
        table(
            train_file=files["train"], test_data_path=files["test"], runs=f"{runs},b", against="full,a",
            figure=f"{files['train']}/figure.png",
        )  # fmt: skip
    cost, ranks = "does not say what the training cost", "holds no rankings of evaluate.py"
    wanted = ["'b' is not a name=folder pair", "ranks 2 rows", "--figure", "--against 'full'"]
    wanted += [f"{folder}/metrics.json: {cost}; train the run first" for folder in folders]
    wanted += [f"{folder}/result.json: {ranks}; evaluate the run first" for folder in folders[:2]]
    wanted += [f"{folders[2]}/result.json: cannot be read as JSON"]
    problems = error.value.problems
    assert [sum(what in problem for problem in problems) for what in wanted] == [1] * len(problems)


def test_curves_are_means_over_seeds(tmp_path, capsys):
    runs = {"LoRA": [{0.5: 2.0, 1.0: 1.0}, {0.498: 3.0, 1.0: 2.0}], "full": [{0.25: 4.0, 0.5: 2.5, 1.0: 0.5}]}
    pairs = []
    for name, seeds in runs.items():
        for i, losses in enumerate(seeds):
            folder = tmp_path / f"{name}{i}"
            folder.mkdir()
            history = [{"loss": 9.0, "epoch": 0.1}, *({"eval_loss": loss, "epoch": at} for at, loss in losses.items())]
            (folder / "metrics.json").write_text(json.dumps({"history": history}))
            pairs.append(f"{name}={folder}")
    curves(runs=",".join(pairs), figure=str(tmp_path / "curves.png"))
    assert capsys.readouterr().out.splitlines() == [
        "| after epochs | 0.2 | 0.5 | 1 |",
        "|---|---|---|---|",
        "| LoRA |  | 2.500 | 1.500 |",
        "| full | 4.000 | 2.500 | 0.500 |",
    ]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_curves_keep_the_evaluations_of_a_run_apart(tmp_path, capsys):
    history = [{"eval_loss": 3.0, "epoch": 0.051}, {"eval_loss": 2.0, "epoch": 0.102}]
    (tmp_path / "metrics.json").write_text(json.dumps({"history": history}))
    curves(runs=f"a={tmp_path}")
    assert capsys.readouterr().out.splitlines()[0] == "| after epochs | 0.05 | 0.1 |"


def test_seeds_without_an_epoch_together_have_no_mean(tmp_path):
    for name, epoch in (("a", 0.25), ("b", 0.5)):
        (tmp_path / name).mkdir()
        history = [{"eval_loss": 3.0, "epoch": epoch}]
        (tmp_path / name / "metrics.json").write_text(json.dumps({"history": history}))
    with pytest.raises(InputError, match="the seeds of 'x' were evaluated at no epoch together; name them apart"):
        curves(runs=f"x={tmp_path}/a,x={tmp_path}/b")


@pytest.mark.parametrize(
    "metrics",
    ["[]", '{"history": 3}', '{"history": [3, {"eval_loss": "x", "epoch": 1}, {"eval_loss": NaN, "epoch": 2}]}'],
)
def test_curves_refuse_a_file_that_is_none_of_a_run(tmp_path, metrics):
    (tmp_path / "metrics.json").write_text(metrics)
    with pytest.raises(InputError, match="holds no validation loss"):
        curves(runs=f"a={tmp_path}")


def test_what_curves_refuse(tmp_path, make_run, files):
    with pytest.raises(InputError) as error:
        curves(runs=f"a={make_run('a', [1, 1])},b,c={tmp_path}", figure=f"{files['train']}/figure.png")
    assert [problem.split(" ")[0] for problem in error.value.problems] == [
        "--runs:", "--runs:", "--runs:", "--figure"
    ]  # fmt: skip
    with pytest.raises(InputError, match="give name=folder pairs"):
        curves()


def test_names_that_a_table_cannot_hold_are_refused():
    problems = Problems()
    assert folders_of(problems, "a|b=x,popularity=y,c=z") == {"c": ["z"]}
    assert [problem.split(":")[1] for problem in problems] == [
        " a run cannot be called 'a|b'",
        " a run cannot be called 'popularity'",
    ]
