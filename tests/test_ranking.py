"""`from minionerec import Ranker`: what evaluation and recommendations share, from Python."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from helpers import evaluate_flags, succeed

from minionerec import InputError, Ranker, ranking


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_ranker_recommends_what_the_command_does(files, sft_run, tmp_path, method):
    checkpoint, history = sft_run(method) / "final_checkpoint", ["12", "30", "7"]
    (tmp_path / "requests.jsonl").write_text(json.dumps({"history": history, "K": 5, "exclude_seen": True}) + "\n")
    succeed(
        "recommend.py",
        model=checkpoint,
        info_file=files["info"],
        histories=tmp_path / "requests.jsonl",
        output=tmp_path / "out.jsonl",
    )
    ranker = Ranker.load(checkpoint, info_file=files["info"])
    found = ranker.recommend(history, k=5, exclude_seen=True)
    assert found == json.loads((tmp_path / "out.jsonl").read_text())["items"]
    assert len(found) == 5 and not {item["id"] for item in found} & set(history)
    assert ranker.recommend([found[0]["sid"]], k=2) == ranker.recommend([found[0]["id"]], k=2)


def test_what_was_seen_counts_for_less(files, sft_run, tmp_path):
    """The scores of SIDs in the history fall by the penalty, by every way of asking."""
    checkpoint, result, output = sft_run("lora") / "final_checkpoint", tmp_path / "r.json", tmp_path / "out.jsonl"
    more = {"num_beams": 40, "seen_penalty": 0.75}
    asked = {"model": checkpoint, "info_file": files["info"], "histories": files["test"], "output": output, "K": 5}
    succeed("recommend.py", **asked, **more)
    succeed("evaluate.py", **evaluate_flags(files, result, base_model=checkpoint, **more))
    assert json.loads((tmp_path / "r.metrics.json").read_text())["seen_penalty"] == 0.75
    plain = Ranker.load(checkpoint, info_file=files["info"], num_beams=40)
    ranker = Ranker.load(checkpoint, info_file=files["info"], **more)
    moved = 0
    lines = map(json.loads, output.read_text().splitlines())
    for line, row in zip(lines, json.loads(result.read_text()), strict=True):
        before = _score_of_sid(plain.recommend(line["history"], k=40))
        expected = {sid: score - 0.75 * (sid in line["history"]) for sid, score in before.items()}
        order = sorted(expected, key=lambda sid: -expected[sid])
        found = _score_of_sid(ranker.recommend(line["history"], k=40))
        assert found == pytest.approx(expected, abs=1e-5) and list(found) == order == row["predict"]
        asked_by_file = list(_score_of_sid(line["items"]))
        assert asked_by_file == order[: len(asked_by_file)]
        moved += order != list(before)
    assert moved > 3


def test_an_item_that_was_seen_before_what_the_model_reads_counts_for_less(files, sft_run):
    """As in evaluate.py, and as exclude_seen leaves it out."""
    ranker = Ranker.load(sft_run("lora") / "final_checkpoint", info_file=files["info"], num_beams=40)
    first = next(item for item in ranker.recommend(["7"], k=40) if item["id"] == "12")["sid"]
    history = ["12", *["7"] * ranker.encoder.cutoff_len]
    before = _score_of_sid(ranker.recommend(history, k=40))[first]
    ranker.seen_penalty = 0.75
    assert _score_of_sid(ranker.recommend(history, k=40))[first] == pytest.approx(before - 0.75, abs=1e-5)


def _score_of_sid(items: list[dict]) -> dict[str, float]:
    """The scores of the SIDs of items, in their order. Items 0 and 1 share one."""
    return {item["sid"]: item["score"] for item in items}


def test_a_ranker_says_what_is_wrong(files, sft_run):
    checkpoint = sft_run("lora") / "final_checkpoint"
    ranker = Ranker.load(checkpoint, info_file=files["info"], num_beams=10)
    with pytest.raises(InputError, match="'x' is no item id, SID or title"):
        ranker.recommend(["x"])
    with pytest.raises(InputError, match='"history" must be a list of items'):
        ranker.recommend("12")
    with pytest.raises(InputError, match="whole number from 1 to 10"):
        ranker.recommend(["12"], k=11)
    with pytest.raises(InputError, match="no such file"):
        Ranker.load(checkpoint, info_file="nowhere.txt")
    for name, wrong in (
        ("seen_penalty", (-1, float("nan"), float("inf"), "Auto", "1", None)),
        ("num_beams", (0, -1, 2.5, "10", True)),
        ("batch_size", (0, "8", None)),
        ("blend_weight", (-1, "0.5")),
    ):
        for value in wrong:
            with pytest.raises(InputError, match=f"^{name} .*: must be "):
                Ranker.load(checkpoint, info_file=files["info"], **{name: value})


def test_conditions_are_remembered_up_to_a_size(files, sft_run, monkeypatch):
    ranker = Ranker.load(sft_run("lora") / "final_checkpoint", info_file=files["info"], num_beams=10)
    monkeypatch.setattr(ranking, "MOST_NUMBERS", 30)
    for first in range(20):
        numbers = frozenset(range(first, first + 20))
        for _ in range(2):  # the second is the remembered one
            allowed = {
                ranker.sids[i] for i, a in zip(ranker.trie.source, ranker._rows_of((numbers,)), strict=True) if a
            }
            assert allowed == {ranker.items.all[number].sid for number in numbers}
        assert len(ranker._only) <= 2


def test_a_ranker_asks_a_checkpoint_of_another_tool_in_its_words(files, sft_run, tmp_path):
    """It records no wording, here because the record is gone."""
    checkpoint = shutil.copytree(sft_run("full") / "final_checkpoint", tmp_path / "theirs")
    expected = Ranker.load(checkpoint, info_file=files["info"], num_beams=5).recommend(["12", "7"], k=3)
    recorded = json.loads((checkpoint / "minionerec.json").read_text())["prompts"]
    (checkpoint / "minionerec.json").unlink()
    words = {task["name"]: {"instruction": task["instruction"]} for task in recorded["tasks"]}
    (tmp_path / "words.json").write_text(json.dumps({"template": recorded["template"], "tasks": words}))
    load = {"info_file": files["info"], "num_beams": 5, "category": "bolts"}
    with warnings.catch_warnings(action="error", category=UserWarning):
        ranker = Ranker.load(checkpoint, prompt_file=tmp_path / "words.json", **load)
    assert ranker.recommend(["12", "7"], k=3) == expected
    with pytest.warns(UserWarning, match="does not record the wording it was trained with"):
        Ranker.load(checkpoint, **load)


def test_a_ranker_names_a_catalogue_that_the_checkpoint_was_not_trained_on(files, sft_run, tmp_path):
    checkpoint, turned = sft_run("lora") / "final_checkpoint", tmp_path / "info.txt"
    lines = [line.split("\t") for line in Path(files["info"]).read_text(encoding="utf-8").splitlines(keepends=True)]
    sids = [line[0] for line in lines]
    turned.write_text(
        "".join("\t".join([sid, *line[1:]]) for sid, line in zip(sids[1:] + sids[:1], lines, strict=True))
    )
    with pytest.warns(UserWarning, match="belongs to a different catalogue than"):
        Ranker.load(checkpoint, info_file=turned, num_beams=5)
    with warnings.catch_warnings(action="error", category=UserWarning):
        Ranker.load(checkpoint, info_file=files["info"], num_beams=5)
