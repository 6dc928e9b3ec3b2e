"""Rows of JSON objects."""

from helpers import encoded
from hypothesis import given
from hypothesis import strategies as st
from raw_files import read, read_items

from minionerec.errors import InputError

CELLS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@given(st.lists(st.fixed_dictionaries({"user": CELLS, "asin": CELLS, "time": CELLS, "title": CELLS}), min_size=1))
def test_any_json_cells_are_read_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("raw") / "file"
    path.write_bytes(encoded(rows, "json"))
    for reader in (read, read_items):
        try:
            found = reader(path)
        except InputError as error:
            assert all("\n" not in problem for problem in error.problems)
            "".join(error.problems).encode("utf-8")
            continue
        if reader is read:
            assert len(found) == len(rows)
        else:
            for item in found[0]:
                assert item.title and item.title == " ".join(item.title.split())
                f"{item.original_id}{item.title}{item.description}".encode()
