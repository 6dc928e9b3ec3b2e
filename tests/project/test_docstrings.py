"""The worked examples in docstrings show what the code computes."""

import ast
from types import SimpleNamespace

import torch

from minionerec.decoding.trie import Trie
from minionerec.model import packed_rows


def line_of(docstring: str, name: str) -> str:
    """What follows a name at the start of a line of a docstring."""
    (line,) = [line.strip() for line in docstring.splitlines() if line.split()[:1] == [name]]
    return line.removeprefix(name)


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


def test_the_packed_row_of_two_completions():
    names = ["p0", "p1", "a0", "a1", "b0", "b1"]
    ids = {name: i for i, name in enumerate([*names, "a2", "b2"])}
    config = SimpleNamespace(_attn_implementation="sdpa")
    config.get_text_config = lambda: config
    inputs, wanted, row = packed_rows.shared_rows(
        SimpleNamespace(config=config, dtype=torch.float32),
        torch.tensor([[ids["p0"], ids["p1"]]] * 2),
        torch.ones(2, 2, dtype=torch.bool),
        torch.tensor([[ids[f"{completion}{i}"] for i in range(3)] for completion in "ab"]),
        torch.ones(2, 3, dtype=torch.bool),
    )
    drawing = packed_rows.__doc__
    assert line_of(drawing, "sees").split() == [*names, "predicts"]
    assert inputs["input_ids"].tolist() == [[ids[name] for name in names]]
    assert inputs["position_ids"].tolist() == [[int(value) for value in line_of(drawing, "position").split()]]
    sources = wanted[row].tolist()
    predicted = {f"{name}{i}": source for name, of in zip("ab", sources, strict=True) for i, source in enumerate(of)}
    for query, name in enumerate(names):
        cells = line_of(drawing, name).replace(",", "").split()
        assert [cell == "x" for cell in cells[:6]] == (inputs["attention_mask"][0, 0, query] == 0).tolist(), name
        assert cells[6:] == [token for token, source in predicted.items() if source == query], name
        assert (query in wanted) == bool(cells[6:])
