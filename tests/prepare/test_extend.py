"""New items of an existing data set: old IDs stay, and new ones are of known codes."""

import json
from pathlib import Path

import numpy as np
from helpers import encoded
from raw_bolts import CATEGORY, contents, flags_of, path_of, refused
from raw_files import written

from minionerec.data import files as data_files
from minionerec.prepare import semantic_ids
from scripts.prepare_data import prepare_data


def test_new_items_get_ids_that_a_model_knows(prepared, raw, tmp_path, capsys):
    before = contents(prepared)
    prepare_data(add_items=raw["add_items"], dataset=str(prepared), output_dir=str(tmp_path / "more"))
    assert contents(prepared) == before
    more = tmp_path / "more"
    old = json.loads(Path(path_of(prepared, "index")).read_text())
    new = json.loads(Path(path_of(more, "index")).read_text())
    assert list(new) == [str(i) for i in range(50)] and {item: new[item] for item in old} == old
    assert {token for sid in new.values() for token in sid} == {token for sid in old.values() for token in sid}
    assert len({"".join(sid) for sid in new.values()}) == 50
    # Like N2 there are three old items; it differs from the nearest only in the last code.
    assert new["49"][:-1] in [old[str(i)][:-1] for i in (1, 2, 3)]
    catalogue = data_files.read_catalogue(path_of(more, "index"), path_of(more, "item"))
    assert len(data_files.read_info(path_of(more, "info"), catalogue)) == 50 and catalogue.items["48"].title.endswith(
        "of 900"
    )
    assert np.load(path_of(more, "embeddings")).shape[0] == 50
    for split in ("train", "valid", "test"):
        assert Path(path_of(more, split)).read_bytes() == Path(path_of(prepared, split)).read_bytes()
    assert "1 that exist already, 1 without a title" in capsys.readouterr().out
    # And again on top, where all are there already.
    refused(
        {"add_items": raw["add_items"], "dataset": str(more), "output_dir": str(tmp_path / "most")},
        "none of its 4 rows is a new item with a title",
    )


def test_new_items_are_placed_by_their_texts_in_the_same_codebooks(prepared, raw, tmp_path):
    prepare_data(add_items=raw["add_items"], dataset=str(prepared), output_dir=str(tmp_path / "more"))
    more = tmp_path / "more"
    assert Path(path_of(more, "codebooks")).read_bytes() == Path(path_of(prepared, "codebooks")).read_bytes()
    codebooks = semantic_ids.load_codebooks(path_of(more, "codebooks"))
    embeddings = np.load(path_of(more, "embeddings"))
    width = embeddings.shape[1]
    assert codebooks.shape[2] == width + 48
    codes, _ = semantic_ids.code_with(embeddings[48:49], codebooks[:, :, :width], np.ones((3, 8), bool))
    assert json.loads(Path(path_of(more, "index")).read_text())["48"][:2] == semantic_ids.tokens(codes[0])[:2]
    # A record and codebooks that do not fit together are refused; those of before there were co-purchases fit.
    for share, lacks in ((0.5, True), (0, False)):
        folder = tmp_path / f"old_{share}"
        prepare_data(**flags_of(raw, folder, purchase_share=share))
        record = json.loads((folder / "dataset.json").read_text())
        del record["arguments"]["purchase_share"], record["semantic_ids"]["co_purchases"]
        (folder / "dataset.json").write_text(json.dumps(record))
        add = {"add_items": raw["add_items"], "dataset": str(folder), "output_dir": str(tmp_path / f"new_{share}")}
        if lacks:
            refused(add, "its items cannot be read: the embeddings do not fit")
        else:
            prepare_data(**add)


def test_new_items_that_find_no_room_need_a_new_token(raw, tmp_path, capsys):
    prepare_data(**flags_of(raw, tmp_path / "d", levels=1, codes=48))
    new = [{"asin": f"N{i}", "title": "Steel hex bolt"} for i in range(3)]
    (tmp_path / "new").write_bytes(encoded(new, "json"))
    prepare_data(add_items=str(tmp_path / "new"), dataset=str(tmp_path / "d"), output_dir=str(tmp_path / "e"))
    assert "note: <b_1>" in (printed := capsys.readouterr().out) and "extended" in printed
    index = json.loads(Path(path_of(tmp_path / "e", "index")).read_text())
    assert len({"".join(sid) for sid in index.values()}) == 51


def test_a_changed_dataset_takes_no_items(prepared, raw, tmp_path):
    add = {"add_items": raw["add_items"], "output_dir": str(tmp_path / "more")}
    refused({**add, "dataset": str(tmp_path)}, "has no dataset.json")
    refused({**add, "dataset": str(prepared / "dataset.json")}, "is a file, not a folder")
    broken = tmp_path / "broken"
    for name, content in contents(prepared).items():
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        (broken / name).write_bytes(content)
    with open(path_of(broken, "index"), "a") as file:
        file.write(" ")
    refused({**add, "dataset": str(broken)}, f"changed since prepare_data.py wrote it: index/{CATEGORY}.index.json")
    for content in ("{}", "[]", "nonsense", "[" * 100_000, '{"category": "../x"}', '{"category": "x", "files": 1}'):
        (broken / "dataset.json").write_text(content)
        refused({**add, "dataset": str(broken)}, "dataset.json is not what prepare_data.py wrote")
    record = json.loads((prepared / "dataset.json").read_text())
    record["files"]["../../passwd"] = "x"
    (broken / "dataset.json").write_text(json.dumps(record))
    refused({**add, "dataset": str(broken)}, "changed since")


def test_flags_of_a_new_dataset_do_not_go_with_added_items(raw, prepared, tmp_path):
    flags = {"add_items": raw["add_items"], "dataset": str(prepared), "output_dir": str(tmp_path / "d")}
    refused({**flags, "levels": 4}, "--levels is for a new data set")
    refused({**flags, "embeddings": "x.npy"}, "give neither --encoder nor --embeddings", "--embeddings x.npy: cannot")
    refused({**flags, "dataset": ""}, "--dataset : has no dataset.json")


def test_new_items_take_free_ids_of_known_codes(log, tmp_path, capsys):
    prepare_data(**log, skip_bad_rows=True, min_interactions=2, levels=2)
    new = [("n1", "Red bolt 1"), ("n2", "Zyx"), *((f"m{i}", "Red nut 4") for i in range(2))]
    written(tmp_path / "new.csv", "id,name\n" + "".join(f"{item},{title}\n" for item, title in new))
    capsys.readouterr()
    prepare_data(add_items=str(tmp_path / "new.csv"), dataset=log["output_dir"], output_dir=str(tmp_path / "more"))
    printed = capsys.readouterr().out
    assert "note: 1 new items have no word that the items of the data set have, such as 'Zyx'" in printed
    assert "note: 3 new items have the title of another item, such as 'Red bolt 1'" in printed
    assert "are new tokens" not in printed
    index = json.loads((tmp_path / "more" / "index" / "T.index.json").read_text())
    assert len({"".join(sid) for sid in index.values()}) == len(index) == 16
    assert {len(sid) for item, sid in index.items() if int(item) >= 12} == {2}
