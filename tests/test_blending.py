"""SASRec ranks with the model, and what was seen costs a penalty: against brute force over the catalogue, under
constraints, and through the commands."""

import json
import os
import random
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import evaluate_flags, read_rows, refused, run_command, succeed, write_rows
from safetensors.torch import save_file

import evaluate
import recommend
from minionerec import InputError, Ranker, blending, sasrec
from minionerec.blending import BEST, PENALTIES, WEIGHTS, Scoring, best_pair, metrics_of_pairs
from minionerec.data.files import read_info_items, read_interactions
from minionerec.data.items import left_out
from minionerec.errors import Problems
from minionerec.metrics import rank_of, ranking_metrics
from minionerec.sasrec_files import fingerprint
from minionerec.serving.requests import RequestReader
from minionerec.training import nodes


def save_sasrec(folder, info_file: str) -> str:
    """A SASRec model that was never trained, and prefers some items by far."""
    items = read_info_items(info_file)
    torch.manual_seed(0)
    model = sasrec.SASRec(list(dict.fromkeys(item.sid for item in items))[::-1], hidden_size=16, length=8)
    model.items.weight.data.mul_(8)
    sasrec.save(model, str(folder), fingerprint((item.id, item.sid) for item in items))
    return str(folder)


@pytest.fixture
def other(files, tmp_path) -> str:
    return save_sasrec(tmp_path / "sasrec", files["info"])


@pytest.fixture
def not_learned(checkpoint, tmp_path) -> str:
    """The checkpoint, with a record of training rows that are gone: those of the tests have the validation rows."""
    copy = shutil.copytree(checkpoint, tmp_path / "not_learned")
    record = json.loads((copy / "minionerec.json").read_text())
    record["flags"]["train_file"] = "gone.csv"
    (copy / "minionerec.json").write_text(json.dumps(record))
    return str(copy)


@pytest.fixture(scope="module")
def plain(files, checkpoint) -> Ranker:
    """Ranks the whole catalogue, without SASRec."""
    return Ranker.load(checkpoint, info_file=files["info"], num_beams=40)


def both_scores(ranker: Ranker, other: str, history: list[str]) -> dict[str, tuple[float, float]]:
    """SID -> its score under the model and under SASRec, for the whole catalogue."""
    alone = {item["sid"]: item["score"] for item in ranker.recommend(history, k=40)}
    model = sasrec.load(other)
    sids = [ranker.items.all[ranker.items.find(text)[0]].sid for text in history]
    logps = dict(zip(model.sids, model(model.encode([sids]))[0].log_softmax(0).tolist(), strict=True))
    return {sid: (score, logps[sid]) for sid, score in alone.items()}


def test_rankings_are_those_of_brute_force_over_the_catalogue(files, checkpoint, plain, other, tmp_path):
    flags = evaluate_flags(files, tmp_path / "r.json", base_model=checkpoint, blend=other, blend_weight=0.7)
    succeed("evaluate.py", **{**flags, "num_beams": 39})
    changed = 0
    rankings = [row["predict"] for row in json.loads((tmp_path / "r.json").read_text())]
    for row, ranking in zip(read_interactions(files["test"], "test_data_path"), rankings, strict=True):
        score_of = both_scores(plain, other, row.sid_history)
        assert ranking == sorted(score_of, key=lambda sid: -score_of[sid][0] - 0.7 * score_of[sid][1])
        changed += ranking != sorted(score_of, key=lambda sid: -score_of[sid][0])
    assert changed
    assert json.loads((tmp_path / "r.metrics.json").read_text())["blend"] == {"folder": other, "weight": 0.7}


@pytest.mark.parametrize("beams", [3, 12])
def test_under_constraints_the_union_of_both_is_ranked_by_both(files, checkpoint, plain, other, beams):
    """Few beams: what SASRec finds and they do not has its exact score, and nothing is recommended that may not be."""
    ranker = Ranker.load(checkpoint, files["info"], num_beams=beams, blend=other, blend_weight=1.5)
    narrow = Ranker.load(checkpoint, files["info"], num_beams=beams)
    reader, chance, more = RequestReader(ranker.items, None, beams, beams), random.Random(beams), 0
    ids = [item.id for item in ranker.items.all]
    asked = [{"history": chance.choices(ids, k=chance.randint(1, 6)), "K": beams} for _ in range(12)]
    for i, request in enumerate(asked):
        request["exclude_seen"] = chance.random() < 0.5
        if i % 3:
            request["allow" if i % 3 == 1 else "deny"] = chance.sample(ids, chance.choice([1, 2, 30]))
    requests = [reader.read(request) for request in asked]
    alone = narrow.answer(requests)
    for request, found, of_beams in zip(requests, ranker.answer(requests), alone, strict=True):
        score_of = both_scores(plain, other, request.given)
        may = [n for n in range(40) if n not in request.without and all(n in only for only in request.only)]
        allowed = {ranker.items.all[n].sid for n in may}
        best = sorted(allowed, key=lambda sid: -score_of[sid][1])[:BEST]
        union = {item["sid"] for item in of_beams} | set(best)
        ranked = sorted(union, key=lambda sid: -score_of[sid][0] - 1.5 * score_of[sid][1])
        wanted = [n for n in ranker.items.ranked(ranked, 40) if n in may][:beams]
        assert [item["id"] for item in found] == [ranker.items.all[n].id for n in wanted]
        for item in found:
            score, logp = score_of[item["sid"]]
            assert item["score"] == pytest.approx(score + 1.5 * logp, abs=1e-3)
        more += len({item["sid"] for item in found} - {item["sid"] for item in of_beams})
    assert more  # SASRec's own finds were among the best


def test_the_weight_is_chosen_once_and_recorded(files, not_learned, plain, other, tmp_path):
    """On the validation file of the checkpoint's run; recommend.py, a Ranker and a second evaluation take it."""
    request = {"model": not_learned, "info_file": files["info"], "history": "12, 30", "blend": other}
    refused("recommend.py", f"--blend {other}: no weight is recorded for this checkpoint", **request)
    with pytest.raises(InputError, match="no weight is recorded"):
        Ranker.load(not_learned, files["info"], blend=other)
    flags = evaluate_flags(files, tmp_path / "r.json", base_model=not_learned, blend=other, num_beams=39)
    first = succeed("evaluate.py", **{**flags, "num_beams": 39})

    by_hand = {}
    rows = list(read_interactions(files["valid"], "eval_file"))
    scores = [both_scores(plain, other, row.sid_history) for row in rows]
    for weight in WEIGHTS:
        rankings = [sorted(of, key=lambda sid, of=of: -of[sid][0] - weight * of[sid][1]) for of in scores]
        ranks = [rank_of(row.sid, ranking) for row, ranking in zip(rows, rankings, strict=True)]
        by_hand[weight] = ranking_metrics(ranks, 10)["NDCG@10"]
    best = max(by_hand, key=lambda weight: (by_hand[weight], -weight))
    (path,) = (tmp_path / "sasrec").glob("weight-*.json")
    record = json.loads(path.read_text())
    assert record["weight"] == best and record["eval_file"] == files["valid"] and record["rows"] == 10
    assert {float(weight): of["0"] for weight, of in record["tried"].items()} == pytest.approx(by_hand)
    assert f"weight {best:g} is used" in first.stdout

    record["weight"] = 2.5  # what stands there is used
    path.write_text(json.dumps(record))
    again = run_command("evaluate.py", **{**flags, "num_beams": 39})
    assert again.returncode == 0 and "is used" not in again.stdout
    assert f"weight of {other}: 2.5, as recorded in {path}" in again.stdout
    assert json.loads((tmp_path / "r.metrics.json").read_text())["blend"]["weight"] == 2.5
    done = run_command("recommend.py", **request)
    ranker = Ranker.load(not_learned, files["info"], blend=other)
    assert ranker.blend.weight == 2.5 and done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines() if line[:1] == " "] == [
        item["id"] for item in ranker.recommend(["12", "30"])
    ]
    path.write_text('{"weight": -3}')
    refused("recommend.py", f"{path}: weight is -3 and must be a number from 0 to 1000; remove the file", **request)
    with pytest.raises(InputError, match="must be auto or a number from 0 to 1000"):
        Ranker.load(not_learned, files["info"], blend=other, blend_weight=float("nan"))
    path.write_text(json.dumps(record))
    shutil.copytree(not_learned, tmp_path / "copy")  # the weight belongs to the weights, not to their place
    assert Ranker.load(tmp_path / "copy", files["info"], blend=other).blend.weight == 2.5
    run_command("evaluate.py", **{**flags, "num_beams": 39, "eval_file": files["valid"]})  # chosen again
    assert json.loads(path.read_text())["weight"] == best


@pytest.mark.parametrize(("blended", "exclude_seen"), [(True, False), (True, "earlier"), (True, True), (False, False)])
def test_numbers_are_tried_on_the_rankings_that_they_give(files, checkpoint, other, blended, exclude_seen):
    blend = {"blend": other, "blend_weight": 0} if blended else {}
    ranker = Ranker.load(checkpoint, files["info"], num_beams=39, **blend)
    rows = [row for file in ("valid", "test") for row in read_interactions(files[file], "eval_file")]
    pairs = [*product((0.0, 0.5, 3.0) if blended else (0.0,), (0.0, 0.5, 1.5, 5.0))]
    tried = ranker.weigh(rows, pairs, exclude_seen=exclude_seen)
    for weight, penalty in pairs:
        ranker.blend, ranker.seen_penalty = ranker.blend and replace(ranker.blend, weight=weight), penalty
        rankings = ranker.rank(ranker.encode(rows), rows=rows, exclude_seen=exclude_seen)
        seen = [left_out([[sid] for sid in row.sid_history], exclude_seen) for row in rows]
        ranks = [
            None if row.sid in of_row else rank_of(row.sid, ranking)
            for row, ranking, of_row in zip(rows, rankings, seen, strict=True)
        ]
        assert tried[weight, penalty] == pytest.approx(ranking_metrics(ranks, 39)["NDCG@10"])
    assert len(set(tried.values())) > 1


@pytest.mark.parametrize(("seed", "beams"), [(0, 30), (1, 30), (2, 12), (3, 7)])
def test_the_best_pair_is_that_of_brute_force_over_the_catalogue(seed, beams):
    """On random scores, of catalogues of 30 SIDs. No penalty brings in what no beam found."""
    chance = random.Random(seed)
    rows = [[{n: chance.gauss(0, scale) for n in range(30)} for scale in (2, 1)] for _ in range(60)]
    seen = [chance.sample(range(30), 4) for _ in rows]
    found = [sorted(scores, key=lambda n, of=scores: -of[n])[:beams] for scores, _ in rows]
    likely = [chance.choice([of_row[0], of_row[1], of_row[2], chance.randrange(30)]) for of_row in found]
    targets = [None if n % 9 == 0 else target for n, target in enumerate(likely)]
    pairs = [*product(WEIGHTS, PENALTIES)]
    by_hand = {}
    for weight, penalty in pairs:
        ranks = []
        for (scores, more), of_row, before, target in zip(rows, found, seen, targets, strict=True):
            total = {n: scores[n] + weight * more[n] - (penalty if n in before else 0) for n in range(30)}
            ranks.append(rank_of(target, [n for n in sorted(total, key=lambda n: -total[n]) if n in of_row]))
        by_hand[weight, penalty] = ranking_metrics(ranks, beams)["NDCG@10" if beams >= 10 else "NDCG@5"]
    candidates = [[(n, scores[n]) for n in of_row] for (scores, _), of_row in zip(rows, found, strict=True)]
    others = [[more[n] for n in of_row] for (_, more), of_row in zip(rows, found, strict=True)]
    tried = metrics_of_pairs(candidates, others, seen, targets, beams, pairs)
    assert tried == pytest.approx(by_hand) and len(set(by_hand.values())) > 50
    best = max(by_hand.values())
    assert by_hand[best_pair(tried)] == pytest.approx(best)


def test_of_equals_the_smallest_numbers_are_taken():
    assert best_pair({(1.0, 0.0): 0.5, (0.5, 2.0): 0.5, (0.5, 1.0): 0.5, (0.0, 0.0): 0.4}) == (0.5, 1.0)


def valid_file(path: Path, files, ranker: Ranker, weight: float, penalty: float) -> str:
    """The rows of the test file, asking for the first SID that the penalty brings up, or what comes first anyhow."""
    cells = read_rows(files["test"])
    rows, rankings = list(read_interactions(files["test"], "eval_file")), []
    ranker.blend = ranker.blend and replace(ranker.blend, weight=weight)
    for ranker.seen_penalty in (0.0, penalty):
        rankings.append(ranker.rank(ranker.encode(rows), rows=rows))
    asked = []
    for row, *both in zip(cells, *rankings, strict=True):
        up = next((b for a, b in zip(*both, strict=True) if a != b), both[0][0])
        asked.append({**row, "item_sid": up})
    return str(write_rows(path, asked))


def tried_by_hand(scores: list[dict], rows: list, weights, penalties) -> dict[tuple[float, float], float]:
    """The NDCG of each pair, from both scores of the whole catalogue for each row."""
    found = {}
    for weight, penalty in product(weights, penalties):
        totals = [
            {sid: a + weight * b - penalty * (sid in row.sid_history) for sid, (a, b) in of_row.items()}
            for of_row, row in zip(scores, rows, strict=True)
        ]
        rankings = [sorted(total, key=lambda sid, of=total: -of[sid]) for total in totals]
        ranks = [rank_of(row.sid, ranking) for row, ranking in zip(rows, rankings, strict=True)]
        found[weight, penalty] = ranking_metrics(ranks, 10)["NDCG@10"]
    return found


def tried_in(record: dict) -> dict[tuple[float, float], float]:
    return {(float(w), float(p)): value for w, of_weight in record["tried"].items() for p, value in of_weight.items()}


def ids_of(printed: str) -> list[str]:
    """The item ids that recommend.py printed for a history."""
    return [line.split()[2] for line in printed.splitlines() if line[:1] == " "]


def reloaded(**flags) -> recommend.RecommendInput:
    """What a server reads at every reload, before it loads the model."""
    return recommend.read_files(Problems(), recommend.RecommendFlags(**flags, serve=1))


def test_the_penalty_is_chosen_once_and_recorded(files, not_learned, plain, tmp_path):
    """For a checkpoint that ranks alone, in its own folder; recommend.py, its server and a Ranker take it."""
    asked = {"model": not_learned, "info_file": files["info"], "num_beams": 39, "seen_penalty": "auto"}
    missing = "--seen_penalty auto: no penalty is recorded for this checkpoint; evaluate.py with --seen_penalty auto"
    refused("recommend.py", missing, **asked, history="12, 30")
    with pytest.raises(InputError, match="no penalty is recorded for this checkpoint"):
        Ranker.load(not_learned, files["info"], seen_penalty="auto")
    given = Ranker.load(not_learned, files["info"], num_beams=39)
    valid = valid_file(tmp_path / "valid.csv", files, given, 0.0, 1.5)
    flags = evaluate_flags(files, str(tmp_path / "r.json"), base_model=not_learned, seen_penalty="auto", num_beams=39)
    printed = succeed("evaluate.py", **flags, eval_file=valid).stdout

    rows = list(read_interactions(valid, "eval_file"))
    scores = [{item["sid"]: (item["score"], 0.0) for item in plain.recommend(row.sid_history, k=40)} for row in rows]
    by_hand = tried_by_hand(scores, rows, (0.0,), PENALTIES)
    _, best = best_pair(by_hand)
    (path,) = Path(not_learned).glob("penalty-*.json")
    record = json.loads(path.read_text())
    assert record["seen_penalty"] == best > 0 and (record["num_beams"], record["rows"]) == (39, 10)
    assert (record["exclude_seen"], record["length_penalty"]) == (False, 0)
    assert tried_in(record) == pytest.approx(by_hand) and f"seen_penalty {best:g} is used" in printed
    assert json.loads((tmp_path / "r.metrics.json").read_text())["seen_penalty"] == best
    given.seen_penalty = best
    expected = [item["id"] for item in given.recommend(["12", "30"])]
    assert ids_of(succeed("recommend.py", **asked, history="12, 30").stdout) == expected
    ranker = Ranker.load(not_learned, files["info"], num_beams=39, seen_penalty="auto")
    assert ranker.seen_penalty == best and [item["id"] for item in ranker.recommend(["12", "30"])] == expected

    path.write_text(json.dumps({**record, "seen_penalty": 0.6}))  # what stands there is used, after a reload too
    assert reloaded(**asked).scoring.numbers == (0.0, 0.6)
    again = evaluate.read_input(evaluate.EvaluateFlags(**flags))
    assert not again.weighed and f"seen_penalty: 0.6, as recorded in {path}" in again.notes
    note = f"{path} was chosen with --num_beams 39, not --num_beams 20; evaluate.py with --eval_file chooses it again"
    assert note in evaluate.read_input(evaluate.EvaluateFlags(**{**flags, "num_beams": 20})).notes
    note_on_seen = f"{path} was chosen with --exclude_seen False, not --exclude_seen earlier; evaluate.py with"
    (told,) = [line for line in reloaded(**asked, exclude_seen="earlier").notes if str(path) in line]
    assert told.startswith(note_on_seen)
    assert note in reloaded(**{**asked, "num_beams": 20}).notes and note not in reloaded(**asked).notes
    path.write_text('{"seen_penalty": -1, "chosen": ["seen_penalty"]}')
    refused("recommend.py", f"{path}: seen_penalty is -1 and must be a number from 0", **asked, history="12")


def test_what_was_chosen_for_other_rankings_is_named():
    """A penalty for the last item alone, as where the others are left out, is none for the whole history; and scores
    that were divided by their length take a smaller one."""
    recorded = {"num_beams": 50, "seen_penalty": 0.5, "exclude_seen": "earlier", "length_penalty": 1.0}
    scoring = Scoring(None, 0.5, "penalty-1.json", recorded)
    (note,) = scoring.notes(50, False)
    was = "--length_penalty 1 --exclude_seen earlier, not --length_penalty 0 --exclude_seen False"
    assert note == f"penalty-1.json was chosen with {was}; evaluate.py with --eval_file chooses it again"
    assert scoring.notes(50, "earlier", 1.0) == scoring.notes(50, None, 1.0) == []
    old = {name: value for name, value in recorded.items() if name in ("num_beams", "seen_penalty")}  # without these
    assert replace(scoring, recorded=old).notes(50, True, 2.0) == []


def test_weight_and_penalty_are_chosen_together(files, not_learned, plain, other, tmp_path):
    """On one search, for the pair of both models; what is chosen for it is used as a pair."""
    given = Ranker.load(not_learned, files["info"], num_beams=39, blend=other, blend_weight=0)
    valid = valid_file(tmp_path / "valid.csv", files, given, 0.1, 1.5)
    asked = {"model": not_learned, "info_file": files["info"], "num_beams": 39, "blend": other, "seen_penalty": "auto"}
    flags = evaluate_flags(files, str(tmp_path / "r.json"), base_model=not_learned, blend=other, num_beams=39)
    succeed("evaluate.py", **flags, eval_file=valid)  # a weight for the penalty that is given, here none
    (path,) = (tmp_path / "sasrec").glob("weight-*.json")
    assert json.loads(path.read_text())["seen_penalty"] == 0
    pair = f"--seen_penalty auto: no penalty is recorded for this checkpoint with --blend {other}; evaluate.py"
    with pytest.raises(InputError, match=pair):  # nobody chose it
        reloaded(**asked)
    searches, real = [], Ranker._score.fget
    with mock.patch.object(Ranker, "_score", property(lambda self: searches.append(1) or real(self))):
        printed = succeed("evaluate.py", **flags, eval_file=valid, seen_penalty="auto").stdout
    assert len(searches) == 2  # of the validation rows and the test rows

    rows = list(read_interactions(valid, "eval_file"))
    by_hand = tried_by_hand([both_scores(plain, other, row.sid_history) for row in rows], rows, WEIGHTS, PENALTIES)
    record = json.loads(path.read_text())
    chosen = record["weight"], record["seen_penalty"]
    assert tried_in(record) == pytest.approx(by_hand) and by_hand[chosen] == pytest.approx(max(by_hand.values()))
    assert record["chosen"] == ["blend_weight", "seen_penalty"] and record["num_beams"] == 39 and chosen[1] > 0
    assert f"weight {chosen[0]:g} is used" in printed and f"seen_penalty {chosen[1]:g} is used" in printed
    metrics = json.loads((tmp_path / "r.metrics.json").read_text())
    assert (metrics["blend"]["weight"], metrics["seen_penalty"]) == chosen
    assert reloaded(**asked).scoring.numbers == chosen
    given.blend, given.seen_penalty = replace(given.blend, weight=chosen[0]), chosen[1]
    expected = [item["id"] for item in given.recommend(["12", "30"])]
    assert ids_of(succeed("recommend.py", **asked, history="12, 30").stdout) == expected

    note = f"{path} was chosen with --seen_penalty {chosen[1]:g} --num_beams 39, not --seen_penalty 0 --num_beams 20;"
    notes = evaluate.read_input(evaluate.EvaluateFlags(**{**flags, "num_beams": 20})).notes
    assert any(line.startswith(note) for line in notes)
    with pytest.raises(
        InputError, match="no penalty is recorded for this checkpoint;"
    ):  # that of the pair is no other's
        reloaded(**{**asked, "blend": ""})
    # A penalty for a weight that is given: the pair is recorded.
    succeed("evaluate.py", **flags, eval_file=valid, seen_penalty="auto", blend_weight=2)
    of_two = {pair: value for pair, value in by_hand.items() if pair[0] == 2}
    record = json.loads(path.read_text())
    assert (record["weight"], record["chosen"]) == (2, ["seen_penalty"]) and tried_in(record) == pytest.approx(of_two)
    assert reloaded(**asked).scoring.numbers == (2, record["seen_penalty"])


def test_a_penalty_is_recorded_in_a_folder_only_and_where_something_is_lowered(files, checkpoint, base, tmp_path):
    flags = evaluate_flags(files, str(tmp_path / "r.json"), seen_penalty="auto", eval_file=files["valid"])
    hub = "hub/name"  # refused before it is asked for
    message = f"--base_model {hub}: is no folder, where the penalty is to be recorded; or give --seen_penalty 1"
    refused("evaluate.py", message, **flags, base_model=hub, category="bolts")
    message = "--seen_penalty auto: --exclude_seen True leaves out all that it lowers; give one of them"
    refused("evaluate.py", message, **flags, base_model=checkpoint, exclude_seen=True)
    del flags["eval_file"]
    message = f"--seen_penalty auto: {base} recorded no validation file; give --eval_file, or numbers such as --seen"
    refused("evaluate.py", message, **flags, base_model=base, category="bolts")
    del flags["seen_penalty"]
    for number in (-1, float("inf"), float("nan")):  # of a call from Python
        with pytest.raises(InputError, match=r"--seen_penalty .*: must be a number from 0"):
            evaluate.evaluate(**flags, base_model=checkpoint, seen_penalty=number)


def test_a_weight_that_is_chosen_on_learned_rows_is_warned_of(files, checkpoint, other, tmp_path):
    """The validation rows of the tests are among those of training, as after a training for good."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    record = json.loads((copy / "minionerec.json").read_text())
    warning = f"warning: {copy} was trained on 10 of 10 rows of --eval_file {files['valid']}, so SASRec counts for too"
    small = warning.replace("so SASRec counts for too", "so the penalty is too small, and nothing is recorded; give")
    for train_file, warned in ((files["train"], True), (files["test"], False), ("gone.csv", False)):
        record["flags"]["train_file"] = train_file
        (copy / "minionerec.json").write_text(json.dumps(record))
        flags = evaluate_flags(files, str(tmp_path / "r.json"), base_model=str(copy))
        for more, start in (({"blend": other}, warning), ({"seen_penalty": "auto"}, small)):
            inputs = evaluate.read_input(evaluate.EvaluateFlags(**flags, **more))
            assert any(note.startswith(start) for note in inputs.notes) == warned != inputs.recordable


def test_what_is_chosen_on_learned_rows_is_not_recorded(files, checkpoint, tmp_path):
    """No later command takes it without a word."""
    copy = str(shutil.copytree(checkpoint, tmp_path / "copy"))
    flags = evaluate_flags(files, str(tmp_path / "r.json"), base_model=copy, seen_penalty="auto")
    evaluate.evaluate(**flags, eval_file=files["valid"])
    assert (tmp_path / "r.json").exists() and not list((tmp_path / "copy").glob("penalty-*.json"))
    missing = "--seen_penalty auto: no penalty is recorded for this checkpoint"
    refused("recommend.py", missing, model=copy, info_file=files["info"], history="12, 30", seen_penalty="auto")


def test_rows_that_sasrec_has_learned_are_warned_of(files, base, tmp_path):
    """As where SASRec was trained for good, and the model was not: it would count for too much."""
    flags = {"eval_file": files["valid"], "info_file": files["info"], "num_epochs": 1, "hidden_size": 4}
    for train_file, warned in (("train", True), ("test", False)):
        folder = tmp_path / train_file
        succeed("scripts/train_sasrec.py", train_file=files[train_file], output_dir=folder, **flags)
        more = {"base_model": base, "category": "bolts", "eval_file": files["valid"], "blend": str(folder)}
        flags_read = evaluate.EvaluateFlags(**evaluate_flags(files, str(tmp_path / "r.json"), **more))
        warning = (
            f"warning: {folder} was trained on 10 of 10 rows of --eval_file {files['valid']}, so SASRec counts for"
        )
        notes = evaluate.read_input(flags_read).notes
        assert any(note.startswith(f"{warning} too much") for note in notes) == warned


def test_the_first_process_decides_how_much_sasrec_counts(files, checkpoint, other, tmp_path, monkeypatch, capsys):
    """The others may have found another weight, and must rank what it ranks."""

    def first_has(weight):
        def decided(decide):
            found = decide()
            if isinstance(found, tuple):  # of recommendations the numbers, of an evaluation them and the rows
                return ((weight, 0.0), []) if isinstance(found[1], list) else (weight, 0.0)
            return found

        monkeypatch.setattr(nodes, "first_decides", decided)

    first_has(3.0)
    flags = evaluate_flags(files, str(tmp_path / "r.json"), base_model=checkpoint, blend=other)
    evaluate.evaluate(**flags)
    assert json.loads((tmp_path / "r.metrics.json").read_text())["blend"]["weight"] == 3
    model = {"model": checkpoint, "info_file": files["info"], "blend": other, "history": "12, 30"}
    recommend.recommend(**model, blend_weight=0.1)
    told = capsys.readouterr().out.splitlines()[-10:]
    assert [line.split()[2] for line in told] == [
        item["id"]
        for item in Ranker.load(checkpoint, files["info"], blend=other, blend_weight=3).recommend(["12", "30"])
    ]


def test_a_model_that_differs_between_nodes_is_told_by_its_weights(tmp_path):
    folders = [str(tmp_path / name) for name in ("one", "copy", "two")]
    for seed, folder in zip((0, 0, 1), folders, strict=True):
        torch.manual_seed(seed)
        sasrec.save(sasrec.SASRec(["<a>", "<b>"], hidden_size=4), folder)
    for flag in ("blend", "cf_path"):
        one, copy, two = (nodes._content(flag, folder) for folder in folders)
        assert one == copy != two


def test_runs_that_trained_only_rows_in_the_middle_of_their_weights_have_weights_of_their_own(tmp_path):
    """As --freeze_LLM: the ends of the file are those of the base."""
    rows = torch.zeros(20_000, 64)
    for name, seed in (("one", 1), ("two", 2)):
        rows[-50:] = seed  # those of the SIDs
        (tmp_path / name).mkdir()
        tensors = {"model.embed_tokens.weight": rows, "model.layers.0.mlp.up_proj.weight": torch.zeros(8_000, 64)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "minionerec.json").write_text(json.dumps({"flags": {"seed": seed}}))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    one, two, copy = (blending._digest(str(tmp_path / name)) for name in ("one", "two", "copy"))
    assert one == copy != two


def test_a_file_of_requests_is_blended_too(files, checkpoint, other, tmp_path):
    (tmp_path / "requests.jsonl").write_text('{"history": ["12", "30"], "deny": ["7"]}\n{"history": ["3"]}\n')
    flags = {"model": checkpoint, "info_file": files["info"], "histories": tmp_path / "requests.jsonl"}
    succeed("recommend.py", **flags, output=tmp_path / "out.jsonl", blend=other, blend_weight=3)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ranker = Ranker.load(checkpoint, files["info"], blend=other, blend_weight=3)
    ids = [[item["id"] for item in items] for items in (rows[1]["items"], ranker.recommend(["3"]))]
    assert ids[0] == ids[1]
    assert "7" not in [item["id"] for item in rows[0]["items"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fewer", "was trained on a different catalogue: 3 SIDs of"),
        ("swapped", "was trained on a different catalogue: the SIDs of"),
        ("weights", "no SASRec model is there; train one with scripts/train_sasrec.py"),
        ("text", "does not list SIDs; train it again"),
        ("negative", "--blend_weight -1.0: must be from 0 to 1000"),
        ("huge", "--blend_weight 1e+300: must be from 0 to 1000"),
        ("alone", "--blend_weight has no effect without --blend"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(files, checkpoint, tmp_path, change, message):
    lines = Path(files["info"]).read_text(encoding="utf-8").splitlines(keepends=True)
    if change == "fewer":
        lines = lines[:-3]
    elif change == "swapped":  # items 5 and 6 have each other's SIDs
        (a, rest_a), (b, rest_b) = (lines[i].split("\t", 1) for i in (5, 6))
        lines[5:7] = [f"{b}\t{rest_a}", f"{a}\t{rest_b}"]
    (tmp_path / "info.txt").write_text("".join(lines), encoding="utf-8")
    folder = save_sasrec(tmp_path / "sasrec", str(tmp_path / "info.txt"))
    if change == "weights":
        (tmp_path / "sasrec" / "sasrec.safetensors").unlink()
    elif change == "text":
        (tmp_path / "sasrec" / "sasrec.json").write_text('{"sids": 3}')
    blend = {"blend": folder, "blend_weight": {"negative": -1, "huge": 1e300}.get(change, 0.5)}
    if change == "alone":
        del blend["blend"]
    for script, flags in (
        ("evaluate.py", evaluate_flags(files, tmp_path / "r.json", base_model=checkpoint, **blend)),
        ("recommend.py", {"model": checkpoint, "info_file": files["info"], "history": "12", **blend}),
    ):
        result = run_command(script, **flags)
        assert result.returncode == 2
        (line,) = result.stderr.strip().splitlines()
        assert message in line


def test_a_weight_is_not_chosen_on_the_test_rows(files, base, checkpoint, other, tmp_path, monkeypatch):
    flags = evaluate_flags(files, tmp_path / "r.json", base_model=checkpoint, blend=other)
    refused("evaluate.py", "a weight that is chosen on the test rows says nothing", **flags, eval_file=files["test"])
    refused("evaluate.py", "--eval_file nowhere: no such file", **flags, eval_file="nowhere")
    lines = Path(files["valid"]).read_text(encoding="utf-8").replace("<a_", "<z_")
    (tmp_path / "valid.csv").write_text(lines, encoding="utf-8")
    refused("evaluate.py", "has the target of no row of --eval_file", **flags, eval_file=tmp_path / "valid.csv")
    with monkeypatch.context() as patch:  # nothing is ranked before the weight cannot be recorded
        patch.setattr(os, "access", lambda path, mode: path != os.path.realpath(other) or not mode & os.W_OK)
        refused("evaluate.py", f"--blend {other}: {other} cannot be written to, where the weight is to be", **flags)
    flags = evaluate_flags(files, tmp_path / "r.json", base_model=base, category="bolts", blend=other)
    refused("evaluate.py", f"{base} recorded no validation file; give --eval_file", **flags)
