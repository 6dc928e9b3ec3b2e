"""recommend.py ranks as evaluate.py does, and writes what was asked for."""

import json
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from helpers import ROOT, evaluate_flags, read_rows, run_command, succeed, write_rows
from recommended import flags_of, recommended, requests_file

import lora_utils
from minionerec.checkpoint import Checkpoint
from minionerec.data.files import read_info_items, read_interactions
from minionerec.data.items import Items
from minionerec.errors import InputError
from minionerec.model import loading


def one(files, checkpoint, history: str, **more) -> list[list[str]]:
    """Score, id, SID and title of the items for a history on the command line."""
    done = succeed("recommend.py", **flags_of(files, checkpoint, history=history, **more))
    lines = [line.split(maxsplit=4) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(i + 1) for i in range(len(lines))]
    return [line[1:] for line in lines]


def scored_one_by_one(checkpoint: str, text: str, sids: list[str]) -> dict[str, float]:
    """The score of every SID after a prompt: teacher-forced, without a trie, a cache or a batch."""
    read = Checkpoint.read(checkpoint)
    tokenizer = loading.load_tokenizer(checkpoint)
    model = lora_utils.load_checkpoint(read, tokenizer, read.base())
    prompt, scores = tokenizer(text).input_ids, {}
    for sid in sids:
        answer = [*tokenizer(sid, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        scores[sid] = sum(logps[i, token].item() for i, token in enumerate(answer))
    return scores


@pytest.fixture(scope="module")
def merged(checkpoint, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("merged") / "merged"
    succeed("merge_lora.py", adapter=checkpoint, output_dir=folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["lora", "qlora", "merged"])
def test_rankings_and_scores_are_those_of_evaluate(files, sft_run, merged, tmp_path, kind):
    checkpoint = merged if kind == "merged" else str(sft_run(kind) / "final_checkpoint")
    succeed("evaluate.py", **evaluate_flags(files, tmp_path / "r.json", base_model=checkpoint))
    expected = json.loads((tmp_path / "r.json").read_text())
    rows = recommended(files, checkpoint, tmp_path / "out.jsonl", batch_size=4)
    items = {item.id: item for item in read_info_items(files["info"])}
    histories = [row.sid_history for row in read_interactions(files["test"], "test_data_path")]
    assert [row["history"] for row in rows] == histories
    for row, evaluated in zip(rows, expected, strict=True):
        assert len(row["items"]) == 20
        ranked = list(dict.fromkeys(item["sid"] for item in row["items"]))
        assert ranked == evaluated["predict"][: len(ranked)]
        for item in row["items"]:
            assert item["title"] == items[item["id"]].title and item["sid"] == items[item["id"]].sid
    if kind != "qlora":  # on a CPU its matmuls round to 16 bits, differently for other shapes
        scores = scored_one_by_one(checkpoint, expected[0]["input"], expected[0]["predict"])
        assert [item["score"] for item in rows[0]["items"]] == pytest.approx(
            [scores[item["sid"]] for item in rows[0]["items"]], abs=1e-4
        )


def test_items_that_share_a_sid_come_out_by_popularity(files, checkpoint, tmp_path):
    """Items 0 and 1 share theirs: in the order of the info file, or with the more popular one first."""
    (plain,) = [one(files, checkpoint, "12,15", K=39, num_beams=39)]
    ids = [line[1] for line in plain]
    assert ids.index("1") == ids.index("0") + 1 and plain[ids.index("0")][0] == plain[ids.index("1")][0]
    rows = read_rows(files["train"])
    row = {**rows[0], "item_id": "1", "item_sid": "<a_0><b_0><c_0>"}
    train_file = write_rows(tmp_path / "train.csv", [*rows, *[row] * 50])
    popular = one(files, checkpoint, "12,15", K=39, num_beams=39, train_file=train_file)
    ids = [line[1] for line in popular]
    assert ids.index("0") == ids.index("1") + 1
    assert {line[1]: line[0] for line in popular} == {line[1]: line[0] for line in plain}


def test_a_history_may_be_ids_sids_titles_or_a_mixture(files, checkpoint):
    items = Items(read_info_items(files["info"]), files["info"])
    sids = [items.all[i].sid for i in (12, 15)]
    title = items.all[15].title
    expected = one(files, checkpoint, "12,15")
    mixed = json.dumps([12, title])
    for history in (" 12 , 15 ", ",".join(sids), f"12,{sids[1]}", mixed, json.dumps(["12", sids[1]])):
        assert one(files, checkpoint, history) == expected, history
    assert one(files, checkpoint, title) == one(files, checkpoint, "15")


def test_constraints_hold_and_leave_the_best(files, checkpoint, tmp_path):
    """Each row with constraints of its own, in one batch, against the unconstrained ranking of all items."""
    meta = json.loads(Path(files["item"]).read_text(encoding="utf-8"))
    for i, fields in meta.items():
        fields["brand"] = f"Brand {int(i) % 3}"
        fields["categories"] = "Fasteners, Bolts" if int(i) % 2 else ["Fasteners", "Nuts"]
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    (tmp_path / "deny.txt").write_text("3\n4\n\n5\n")
    rows = [
        {"history": ["12", "15"]},
        {"history": ["0", "20"], "exclude_seen": True},
        {"history": ["<a_0><b_0><c_0>", 20], "exclude_seen": True},  # of items 0 and 1
        {"history": ["12"], "allow": ["7", "3", "1"]},
        {"history": ["12", "13", "14"], "deny": [str(i) for i in range(20)], "K": 4},
        {"history": ["12"], "where": "brand=brand 2", "allow": [str(i) for i in range(30)], "exclude_seen": True},
        {"history": ["12"], "where": "categories=Nuts"},
        {"history": ["12"], "where": "categories= bolts "},
        {"history": ["39"], "allow": []},
        {"history": ["15", "20", "15", "30"], "exclude_seen": "earlier"},
        {"history": ["30", "20", "30"], "exclude_seen": "earlier"},
        {"history": ["0", "<a_0><b_0><c_0>"], "exclude_seen": "earlier"},  # the last one may be item 0
    ]
    everything = [{"history": row["history"]} for row in rows]
    shared = {"K": 40, "num_beams": 40, "item_meta_path": tmp_path / "meta.json"}
    plain = recommended(
        files, checkpoint, tmp_path / "a.jsonl", histories=requests_file(tmp_path / "a", everything), **shared
    )
    found = recommended(
        files, checkpoint, tmp_path / "b.jsonl", histories=requests_file(tmp_path / "b", rows),
        deny=tmp_path / "deny.txt", **shared,
    )  # fmt: skip
    numbers = set(range(40)) - {3, 4, 5}
    allowed = [
        *(numbers, numbers - {0, 20}, numbers - {0, 1, 20}, {7, 1}, set(range(20, 40))),
        *({i for i in numbers if i % 3 == 2 and i < 30} - {12}, {i for i in numbers if not i % 2}),
        *({i for i in numbers if i % 2}, set(), numbers - {15, 20}, numbers - {20}, numbers),
    ]
    assert all(len(row["items"]) == 40 for row in plain)
    for row, all_items, result, ids in zip(rows, plain, found, allowed, strict=True):
        wanted = [item for item in all_items["items"] if int(item["id"]) in ids][: row.get("K", 40)]
        assert [item["id"] for item in result["items"]] == [item["id"] for item in wanted]
        assert [item["score"] for item in result["items"]] == pytest.approx([i["score"] for i in wanted], abs=1e-4)


def test_flags_are_the_defaults_of_requests(files, checkpoint, tmp_path):
    rows = requests_file(
        tmp_path / "r", [{"history": ["12", "15"]}, {"history": ["12"], "exclude_seen": False, "K": 2}]
    )
    (tmp_path / "allow.txt").write_text("12\n15\n16\n17\n")
    found = recommended(
        files, checkpoint, tmp_path / "o.jsonl", histories=rows, exclude_seen=True, allow=tmp_path / "allow.txt", K=3
    )
    assert {item["id"] for item in found[0]["items"]} == {"16", "17"}
    assert len(found[1]["items"]) == 2


def test_a_shop_asks_and_is_answered_in_its_own_ids(files, checkpoint, tmp_path):
    """In a CSV file and JSON lines, in lists and on the command line. Here they are the numbers of other items."""
    metadata = json.loads(Path(files["item"]).read_text(encoding="utf-8"))
    shop = {item: {**fields, "original_id": str(39 - int(item))} for item, fields in metadata.items()}
    (tmp_path / "item.json").write_text(json.dumps(shop), encoding="utf-8")
    (tmp_path / "deny.txt").write_text("37\n", encoding="utf-8")
    flags = {"item_meta_path": tmp_path / "item.json", "K": 5}
    theirs = {**flags, "original_ids": True}
    (tmp_path / "h.CSV").write_text("customer,history\na,\"['27', 24]\"\n", encoding="utf-8")
    rows = [{"history": ["27", 24]}, {"history": [27], "deny": ["38"], "exclude_seen": True}]
    lines = requests_file(tmp_path / "h.jsonl", rows)
    (asked,) = recommended(files, checkpoint, tmp_path / "a", **theirs, histories=tmp_path / "h.CSV")
    same, denied = recommended(files, checkpoint, tmp_path / "b", **theirs, histories=lines, deny=tmp_path / "deny.txt")
    lines = requests_file(lines, [{"history": [12, 15]}])
    (plain,) = recommended(files, checkpoint, tmp_path / "c", histories=lines)
    expected = [{**item, "original_id": str(39 - int(item["id"]))} for item in plain["items"]]
    assert asked["items"] == expected[:5] and asked["history"] == ["27", "24"]
    ids = [(item["id"], item["original_id"]) for item in same["items"]]
    assert ids == [(item["id"], item["original_id"]) for item in expected if item["id"] != "2"][:5]
    assert not {item["original_id"] for item in denied["items"]} & {"27", "37", "38"}
    # Without the flag the numbers mean what they always did, and a line says so.
    done = run_command("recommend.py", **flags_of(files, checkpoint, history="12,15", **flags))
    note, first = done.stdout.splitlines()[:2]
    assert "40 original ids could mean two items" in note
    assert first.split()[2:5] == [expected[0]["id"], expected[0]["original_id"], expected[0]["sid"]]


def test_a_line_says_that_nothing_is_left(files, checkpoint, tmp_path):
    (tmp_path / "one.txt").write_text(Path(files["info"]).read_text(encoding="utf-8").splitlines()[0] + "\n")
    flags = {"info_file": tmp_path / "one.txt", "exclude_seen": True}
    done = run_command("recommend.py", **flags_of(files, checkpoint, history="0", **flags))
    assert done.returncode == 0 and "the constraints allow no item of the catalogue" in done.stdout
    rows = requests_file(tmp_path / "r", [{"history": ["0"]}, {"history": ["0"], "exclude_seen": False}])
    more = {"histories": rows, **flags}
    done = run_command("recommend.py", **flags_of(files, checkpoint, tmp_path / "o.jsonl", **more))
    assert done.returncode == 0 and "1 of them have no items: their constraints allow none" in done.stdout


def test_the_example_with_vllm_reads_what_the_command_reads(files, tmp_path):
    """A request may ask for as many items as there are beams; and no input is overwritten."""
    found = ModuleType("vllm")
    for name in ("LLM", "TokensPrompt", "VllmConfig", "BeamSearchParams", "BatchUpdate", "LogitsProcessor"):
        setattr(found, name, type(name, (), {}))
    found.process_dict_updates = None
    names = ["vllm", "vllm.config", "vllm.sampling_params", "vllm.v1.sample.logits_processor"]
    modules = dict.fromkeys([*names, "vllm.v1.sample.logits_processor.builtin"], found)
    with mock.patch.dict(sys.modules, modules), mock.patch.dict(os.environ), mock.patch("sys.path", [*sys.path]):
        example = runpy.run_path(str(ROOT / "examples" / "vllm_recommend.py"))
    items = Items(read_info_items(files["info"]), files["info"])
    path = requests_file(tmp_path / "h.jsonl", [{"history": ["1"], "K": 20}, {"history": ["2"]}])
    assert [request.K for request in example["read_requests"](items, str(path), 10, 20)] == [20, 10]
    with pytest.raises(InputError, match=f"would overwrite --histories {path}"):
        example["recommend"](histories=str(path), output=str(path), info_file=files["info"])
