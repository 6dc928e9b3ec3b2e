"""A trie holds each SID once, and knows what is allowed below its nodes."""

import ast

import pytest
import torch
from helpers import line_of
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import EOS

from minionerec.data.sid_tokens import PAD
from minionerec.decoding.trie import Trie


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=40))
def test_a_trie_holds_each_sid_once(sids):
    trie = Trie(sids, EOS)
    held = [[t for t in row if t != PAD] for row in trie.sequences.tolist()]
    assert held == sorted([*sid, EOS] for sid in {*map(tuple, sids)}) == [[*sids[i], EOS] for i in trie.source]
    # Walking from every leaf's row back down the trie spells that row.
    for row, sequence in enumerate(trie.sequences.tolist()):
        node = 0
        for depth, token in enumerate(t for t in sequence if t != PAD):
            child, exists = trie.children(torch.tensor([node]), trie.widths[depth])
            (node,) = [c for c in child[exists].tolist() if trie.token[c] == token]
        assert trie.row[node] == row


@pytest.mark.parametrize("sids", [[], [()], [(1, EOS)]])
def test_sids_that_cannot_be_decoded_are_refused(sids):
    with pytest.raises(ValueError):
        Trie(sids, EOS)


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=20), st.data())
@settings(max_examples=100)
def test_a_node_may_be_entered_where_an_allowed_sid_is_below(sids, data):
    trie = Trie(sids, EOS)
    allowed = torch.tensor([data.draw(st.lists(st.booleans(), min_size=len(trie), max_size=len(trie)))])
    every = torch.arange(len(trie.token))[None]
    found = trie.may_go_on(every, trie.count_before(allowed))[0].tolist()
    below = [set() for _ in trie.token]
    for node in reversed(range(len(trie.token))):
        below[node] |= {trie.row[node].item()} - {PAD}
        for child in range(trie.first_child[node], trie.first_child[node + 1] if node + 1 < len(below) else 0):
            below[node] |= below[child]
    assert [sorted(rows) for rows in below] == [
        list(range(a, b)) for a, b in zip(trie.first_row.tolist(), trie.end_row.tolist(), strict=True)
    ]
    assert found == [any(allowed[0, row] for row in rows) for rows in below]


def test_the_arrays_of_three_sids():
    trie = Trie([[11], [10, 21], [10, 20]], eos_token_id=2)
    for name in ("token", "first_child", "row", "first_row", "end_row"):
        assert getattr(trie, name).tolist() == [int(value) for value in line_of(Trie.__doc__, name).split()], name
    for name in ("sequences", "source", "widths", "ends"):
        value = getattr(trie, name)
        value = value if isinstance(value, list) else value.tolist()
        assert value == ast.literal_eval(line_of(Trie.__doc__, name).strip()), name
    # The drawing: every node with its token and, for a leaf, its row.
    drawn = Trie.__doc__[Trie.__doc__.index("root 0") : Trie.__doc__.index("node          0")]
    for node in range(1, len(trie.token)):
        assert f"{trie.token[node]}: node {node} " in drawn or f"{trie.token[node]}: node {node}, row" in drawn
        assert (f"node {node}, row {trie.row[node]}\n" in drawn) == (trie.row[node] >= 0)
