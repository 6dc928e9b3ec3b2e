"""Interactions and items of raw files: which rows count, and what they become."""

from helpers import encoded
from raw_files import problems_of, read, read_items, read_seconds, written

from minionerec.prepare import cleaning, sources
from minionerec.prepare.columns import find_columns
from minionerec.prepare.formats import BATCH_ROWS
from minionerec.prepare.recognize import open_source
from scripts.prepare_data import prepare_data


def test_the_published_reviews_of_2018_and_2023_need_no_flags(tmp_path):
    old = {"overall": 5.0, "verified": True, "reviewTime": "09 13, 2018", "reviewerID": "A1", "asin": "0007"}
    old |= {"style": {"Format:": " Paper"}, "reviewerName": "N", "reviewText": "T", "unixReviewTime": 1536796800}
    new = {"rating": 5.0, "title": "Good", "text": "T", "images": [], "asin": "B1", "parent_asin": "B0"}
    new |= {"user_id": "AE", "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True}
    for row, expected in ((old, ("A1", "0007", 1536796800 * 10**6)), (new, ("AE", "B0", 1588687728923 * 10**3))):
        path = tmp_path / f"{expected[0]}.jsonl.gz"
        path.write_bytes(encoded([row], "json", zipped=True))
        assert read(path) == [expected]

    old = {"category": ["Tools", "Bits"], "tech1": "", "description": ["One.", "", "Two."], "title": "A &amp; <b>B</b>"}
    old |= {"brand": "Acme", "feature": ["f"], "rank": [], "date": "", "details": {}, "asin": "0007"}
    new = {"main_category": "Tools", "title": "C", "average_rating": 4.5, "features": ["Long", "Thin"], "store": "Shop"}
    new |= {"description": [], "price": 3.5, "images": [{}], "categories": ["Tools"], "parent_asin": "B0"}
    (tmp_path / "old").write_bytes(encoded([old], "json"))
    (tmp_path / "new").write_bytes(encoded([new], "json"))
    ((first,), *_), ((second,), *_) = read_items(tmp_path / "old"), read_items(tmp_path / "new")
    assert first == sources.RawItem("0007", 0, "A & B", "One. Two.", "Acme", "Tools, Bits")
    assert second == sources.RawItem(
        "B0", 0, "C", "Long Thin", "Shop", "Tools", "3.5"
    )  # features for lack of a description


def test_items_that_repeat_have_no_title_or_are_not_wanted_are_counted(tmp_path):
    rows = [{"id": n, "item": i, "name": t} for n, (i, t) in enumerate([("a", "A"), ("b", ""), ("a", "B"), ("c", "C")])]
    (tmp_path / "items").write_bytes(encoded(rows, "csv"))
    items, counts, _ = read_items(tmp_path / "items", wanted={"a", "b"}.__contains__)
    assert items == [sources.RawItem("a", 0, "A", "", "", "")]
    assert counts == {"rows": 4, "not_wanted": 1, "repeated": 1, "untitled": 1, "refused": 0}


def test_events_and_ratings_are_chosen_and_counted(tmp_path):
    lines = [
        "user,item,ts,event,rating",
        "a,1,100,view,",
        ",2,200,view,",
        "a,3,300,buy,5",
        "b,3,300, buy,3.5",
        "b,4,9,cart,4",
    ]
    path = written(tmp_path / "file", "\n".join(lines))
    found, raw, _ = read_seconds(path, sources.Wanted(events=frozenset({"buy", "cart"})))
    assert len(found) == 3 and raw.num_rows == 5 and raw.steps == {"events buy, cart": 3}
    found, raw, _ = read_seconds(path, sources.Wanted(events=frozenset({"buy", "cart"}), min_rating=4))
    assert sorted(row[0] for row in found) == ["a", "b"] and list(raw.steps.values()) == [3, 2]
    assert "events buyy; it has view 2, buy 2, cart 1" in problems_of(
        read_seconds, path, sources.Wanted(events=frozenset({"buyy"}))
    )
    assert "row 1, rating: expected a number, found ''" in problems_of(read_seconds, path, sources.Wanted(min_rating=4))


def test_returns_are_no_purchases(tmp_path):
    """A quantity below 0, in whatever way it is written. Without a number a row counts, and so it does with 0, which
    YooChoose has where the quantity is not known."""
    bought = ["1", "2,5", "1.000", ".5", "", "NULL", "2 pcs", "0", "0,00", "-0"]
    returned = ["-12", "-1,234.50", "\u22123", "(3)", "3-", " - 1", "-.5"]
    for name in ("Quantity", "Lineitem quantity", "qty_ordered"):
        rows = [f"u;{i};{100 + i};{quantity}" for i, quantity in enumerate([*returned, *bought])]
        path = written(tmp_path / "file", f"user;item;ts;{name}\n" + "\n".join(rows) + "\n;;soon;-1")
        found, raw, _ = read_seconds(path)
        assert [int(item) for _, item, _ in found] == list(range(len(returned), len(rows)))
        assert raw.steps == {f"with {name} of 0 or more": len(bought)} and raw.num_rows == len(rows) + 1
    typed = [{"user": "u", "item": 1, "ts": 100 + i, "qty": quantity} for i, quantity in enumerate([-1, 0.0, 2, None])]
    (tmp_path / "file").write_bytes(encoded([*typed, {"user": "u", "item": 2, "ts": 200}], "json"))
    assert len(read_seconds(tmp_path / "file")[0]) == 4
    written(tmp_path / "file", "user,item,ts,qty\nu,1,100,-1\n")
    assert "none of its 1 rows is left: with qty of 0 or more" in problems_of(read_seconds, tmp_path / "file")


def test_returns_are_left_out_among_chosen_events(tmp_path):
    lines = [
        "user,item,ts,event,qty,rating",
        "a,1,100,view,0,5",
        "a,2,200,buy,1,5",
        "a,3,300,buy,-1,",
        "a,4,400,back,-1,5",
    ]
    path = written(tmp_path / "file", "\n".join(lines))
    found, raw, _ = read_seconds(path, sources.Wanted(events=frozenset({"view", "buy"}), min_rating=4))
    assert [item for _, item, _ in found] == ["1", "2"] and list(raw.steps.values()) == [3, 2, 2]


def test_lines_of_an_order_that_lack_its_status_are_named(tmp_path, capsys):
    """Shopify writes it in the first line of an order only, so the choice leaves one item of each."""
    lines = ["Name,Email,Financial Status,Created at,Lineitem sku"]
    for line in range(12):
        status = "" if line % 2 else "paid"
        lines.append(f"#{line // 2},a@b.c,{status},2023-01-{line // 2 + 10} 10:33:20 -0500,0{line}")
    files = {
        "interactions": str(written(tmp_path / "orders.csv", "\n".join(lines))),
        "items": str(written(tmp_path / "items.csv", "id,title\n" + "".join(f"0{i},Nut {i}\n" for i in range(12)))),
    }
    columns = {"user_column": "Email", "item_column": "Lineitem sku", "event_column": "Financial Status"}
    flags = {"category": "T", "codes": 2, "min_interactions": 1, "split": "last", "output_dir": str(tmp_path / "out")}
    prepare_data(**files, **columns, **flags, events="paid", time_column="Created at")
    assert "orders.csv: 6 rows without Financial Status are left out" in capsys.readouterr().out


def test_rows_without_an_event_are_counted_among_many_kinds(tmp_path):
    """Kinds beyond the first are no longer counted, but these are."""
    events = [*(f"e{i}" for i in range(sources.MOST_EVENTS)), *["", "buy"] * BATCH_ROWS]
    rows = [{"user": "u", "item": i % 9, "time": 1000 + i, "event": event} for i, event in enumerate(events)]
    (tmp_path / "log").write_bytes(encoded(rows, "json"))
    source, wanted = open_source(str(tmp_path / "log"), "interactions"), sources.Wanted(events=frozenset({"buy"}))
    spool = cleaning.Spool(str(tmp_path / "spool"), cleaning.INTERACTION)
    sources.read_interactions(source, find_columns(source, wanted.roles, {}), wanted, spool)
    assert f"{BATCH_ROWS:,} rows without event are left out" in source.notes[0]
