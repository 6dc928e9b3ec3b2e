"""Rows that SASRec samples: with its probabilities, next to the rows they belong to, and through sft.py."""

import json

import torch
from helpers import sft_flags, succeed

from minionerec import sasrec
from minionerec.data.files import Interaction, read_info
from minionerec.soft_targets import BEST, with_sampled


def save_sasrec(folder, sids: list[str]) -> sasrec.SASRec:
    """A SASRec model that was never trained, and prefers some items by far."""
    torch.manual_seed(0)
    model = sasrec.SASRec(sids, hidden_size=16, length=8)
    model.items.weight.data.mul_(3)
    sasrec.save(model, str(folder))
    return model


def test_targets_are_sampled_from_the_best_items_by_their_probabilities(tmp_path):
    sids = [f"<a_{i}>" for i in range(30)]
    model, count = save_sasrec(tmp_path, sids), 4000
    histories = [["<a_1>"], ["<a_2>", "<a_3>", "<a_4>"]]
    rows = [Interaction(history, ["old"] * len(history), "<a_0>", "new") for history in histories * count]
    found = list(with_sampled(rows, str(tmp_path), seed=5))
    assert found[::2] == rows
    assert [row.sid_history for row in found[1::2]] == [row.sid_history for row in rows]
    assert {row.title for row in found[1::2]} == {""}
    for i, history in enumerate(histories):
        logps = model.logps([history])[0]
        best = logps.topk(BEST).indices.tolist()
        wanted = {sids[item]: p for item, p in zip(best, logps[best].softmax(0).tolist(), strict=True)}
        sampled = [row.sid for row in found[1 + 2 * i :: 4]]
        assert len(sampled) == count and set(sampled) <= set(wanted)
        for sid, probability in wanted.items():
            deviation = (probability * (1 - probability) / count) ** 0.5
            assert abs(sampled.count(sid) / count - probability) < 5 * deviation + 1e-9
    assert [row.sid for row in with_sampled(rows[:50], str(tmp_path), seed=5)] == [row.sid for row in found[:100]]
    assert [row.sid for row in with_sampled(rows[:50], str(tmp_path), seed=6)] != [row.sid for row in found[:100]]


def test_a_history_of_items_that_sasrec_does_not_know_gets_no_target(tmp_path):
    """The catalogue may have grown since; what a model makes of nothing is not to be learned."""
    save_sasrec(tmp_path, ["<a_0>", "<a_1>"])
    rows = [Interaction(history, [""] * len(history), "<new>", "") for history in (["<new>"], ["<new>", "<a_1>"])]
    found = list(with_sampled(rows, str(tmp_path), seed=5))
    assert found[:2] == rows and len(found) == 3 and found[2].sid in ("<a_0>", "<a_1>")


def test_sft_learns_them_next_to_the_purchases(files, base, tmp_path):
    save_sasrec(tmp_path / "sasrec", read_info(files["info"]))
    counts = {}
    for name, more in {"plain": {}, "taught": {"cf_path": tmp_path / "sasrec"}}.items():
        # A task that writes titles does not get the sampled rows.
        flags = sft_flags(files, base, tmp_path / name, tasks="sid_history_to_sid,sid_history_to_title", **more)
        succeed("sft.py", **{**flags, "num_epochs": 1, "eval_step": 0.5, "use_lora": True})
        counts[name] = json.loads((tmp_path / name / "metrics.json").read_text())["train_examples"]
    assert counts["taught"] * 2 == counts["plain"] * 3
