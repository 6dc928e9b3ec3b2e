"""Which column is which, by its name and by what is in it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_files import problems_of, read, read_items, written

from minionerec.errors import InputError
from minionerec.prepare.columns import find_columns
from minionerec.prepare.recognize import open_source


def test_a_key_that_occurs_late_counts_for_all_rows(tmp_path):
    rows = [{"parent_asin": f"I{i}", "title": f"Bolt {i}"} for i in range(1500)]
    for row in rows[-9:]:
        row["description"] = "late"
    path = written(tmp_path / "items.jsonl", "\n".join(map(json.dumps, rows)))
    assert sum(item.description == "late" for item in read_items(path)[0]) == 9
    rows[-1]["name"] = "Also a title"
    written(path, "\n".join(map(json.dumps, rows)))
    assert "title and name could each be the title" in problems_of(read_items, path)
    rows[-1] = {"parent_asin": "I1499", "description": "late"}
    untitled = [{"parent_asin": f"J{i}"} for i in range(1200)]
    written(path, "\n".join(map(json.dumps, untitled + rows)))
    assert len(read_items(path)[0]) == 1499 and read_items(path)[1]["untitled"] == 1201
    array = written(tmp_path / "items.json", json.dumps(rows[:-1]))
    assert sum(item.description == "late" for item in read_items(array)[0]) == 8


def test_a_column_without_values_is_not_the_id(tmp_path):
    rows = [{"asin": "", "kindle_asin": "", "book_id": str(i), "title": f"Book {i}"} for i in range(5)]
    path = written(tmp_path / "books", "\n".join(map(json.dumps, rows)))
    assert [item.original_id for item in read_items(path)[0]] == list("01234")
    written(path, "asin,book_id,title\n" + "".join(f"nan,{i},Book\n" for i in range(5)))
    assert len(read_items(path)[0]) == 5
    pq.write_table(pa.Table.from_pylist([{**row, "asin": None} for row in rows]), path)
    assert len(read_items(path)[0]) == 5


def test_id_is_the_item_only_in_a_file_of_items(tmp_path):
    (tmp_path / "file").write_bytes(b"id,title\n1,A\n")
    roles, given = ("item", "title"), {}
    assert find_columns(open_source(str(tmp_path / "file"), "items"), roles, given) == ["id", "title"]
    with pytest.raises(InputError, match="no column is recognized as the item"):
        find_columns(open_source(str(tmp_path / "file"), "interactions"), roles, given)


def test_a_column_is_named_where_it_is_not_found(tmp_path):
    path = tmp_path / "file"
    path.write_text("who,item,sku,time\nu,i,s,1\n")
    assert read(path, user="who", item="sku") == [("u", "s", 1_000_000)]
    recbole = tmp_path / "file.inter"
    recbole.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t5\t1.0\n")
    assert read(recbole) == [("u", "i", 1_000_000)]
    source = open_source(str(path), "interactions")
    with pytest.raises(InputError, match="--item_column skuu is not a column; the file has 'who', 'item', 'sku'"):
        find_columns(source, ("item",), {"item": "skuu"})
    # The flag may mean the other file.
    path.write_text("who,item,time\nu,i,1\n")
    source = open_source(str(path), "interactions")
    assert find_columns(source, ("item",), {"item": "sku"}, other=["sku"]) == ["item"]
