"""Delimited text: stray quotes, and rows that do not depend on the blocks in which they are read."""

from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import BAD_CSV, T0, problems_of, read_items, read_seconds, written

from minionerec.prepare import delimited, sources


@settings(max_examples=30)
@given(
    st.lists(st.one_of(st.integers(0, 13), st.sampled_from("aqbmu")), min_size=1, max_size=25),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.integers(1, 70),
)
def test_rows_do_not_depend_on_the_blocks_that_are_read(tmp_path_factory, kinds, end, block):
    forms = {"a": "u,{0},{1}", "q": '"u,{0}",{0},"{1}"', "b": "", "m": '"u\n{0}",x,{1}', "u": "ü\u2028{0},\x0b7,{1}"}
    rows = [
        BAD_CSV[kind] if isinstance(kind, int) else forms[kind].format(i, T0 + i).encode()
        for i, kind in enumerate(kinds)
    ]
    content = end.join([b"user,item,time", b"z,0,1500000000", *rows])
    path = written(tmp_path_factory.mktemp("raw") / "file", content)
    found = []
    for size in (delimited.BLOCK, block):
        with mock.patch.object(delimited, "BLOCK", size):
            read, raw, refused = read_seconds(path, sources.Wanted(skip_bad_rows=True))
        found.append((read, raw.num_rows, raw.refused, refused.lines))
    assert found[0] == found[1] and len(found[0][0]) == 1 + sum(isinstance(kind, str) and kind != "b" for kind in kinds)


def test_a_quote_that_is_not_closed_costs_one_row(tmp_path):
    rows = [f"I{i},Red bolt {i}" for i in range(10)]
    rows[4], rows[7] = 'I4,"Heavy duty', 'I7,Red "wide" pad'
    path = written(tmp_path / "items.csv", "\n".join(["item,title", *rows]))
    assert "items.csv, line 6: a quote opens a field" in problems_of(read_items, path)
    items, counts, refused = read_items(path, skip=True)
    assert [item.original_id for item in items] == [f"I{i}" for i in range(10) if i != 4]
    assert items[6].title == 'Red "wide" pad' and counts["rows"] == 10 and refused.count == counts["refused"] == 1
    # Two such quotes make one field of the rows between them.
    rows[7], rows[8] = "I7,Red pad", 'I8,19 inch"'
    written(path, "\n".join(["item,title", *rows]))
    assert "line 6: a quote opens a field, and all lines up to the next quote look like rows" in problems_of(
        read_items, path
    )
    items, counts, _ = read_items(path, skip=True)
    assert len(items) == 9 and counts["rows"] == 10 and items[-2].title == '19 inch"'
    # Texts of several lines are as they were.
    written(path, 'item,title,description\nI1,"One, ""two""","A line,\nand, another\n\nend"\nI2,x,y\n')
    items, _, _ = read_items(path)
    assert [item.title for item in items] == ['One, "two"', "x"] and items[0].description == "A line, and, another end"


def test_a_tab_separated_file_with_stray_quotes_has_no_quoting(tmp_path):
    rows = [f"I{i}\tBolt {i}" for i in range(6)]
    rows[1], rows[4] = 'I1\t"Heavy duty tape', 'I4\t"Last one'
    path = written(tmp_path / "items.tsv", "item\ttitle\n" + "\n".join(rows))
    items, counts, _ = read_items(path)
    assert counts["rows"] == len(items) == 6 and items[1].title == '"Heavy duty tape'
    written(path, 'item\ttitle\nI1\t"Wide ""B"" tape\tof two"\n')  # as programs write it
    assert read_items(path)[0][0].title == 'Wide "B" tape of two'
