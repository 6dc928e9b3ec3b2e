"""The trie of a catalogue: its SIDs as token sequences, held in tensors.

Dimensions: `B` prompts, `S` SIDs, `D` tokens of the longest SID with its end-of-sequence token, `C` the most children
that a node has at one depth.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from minionerec.data.sid_tokens import PAD


class Trie:
    """All SIDs of a catalogue as a trie of token ids, held in tensors.

    Nodes are numbered breadth-first from the root, 0, so siblings are consecutive: the children of node n are the nodes
    `first_child[n]` to `first_child[n + 1] - 1`. Every path ends with the end-of-sequence token, so one SID may be the
    start of another.

    Attributes:
        token: [nodes], the token on the edge into a node (PAD for the root).
        first_child: [nodes + 1].
        row: [nodes], for a leaf the row of its SID in `sequences`, for any other node PAD.
        first_row, end_row: [nodes], the SIDs under a node are the rows `first_row` to `end_row - 1` of `sequences`.
        sequences: [S, D], the distinct SIDs with their end-of-sequence token, sorted, padded with PAD.
        source: [S], for every row of `sequences` its index in the input.
        widths: C at every depth.
        ends: for every depth, whether a path ends there.

    Three SIDs as an example, `Trie([[11], [10, 21], [10, 20]], eos_token_id=2)`, with PAD = -1:

        root 0 ─┬─ 10: node 1 ─┬─ 20: node 3 ── 2: node 6, row 0
                │              └─ 21: node 4 ── 2: node 7, row 1
                └─ 11: node 2 ──── 2: node 5, row 2

        node          0   1   2   3   4   5   6   7   8
        token        -1  10  11  20  21   2   2   2
        first_child   1   3   5   6   7   8   8   8   8
        row          -1  -1  -1  -1  -1   2   0   1
        first_row     0   0   2   0   1   2   0   1
        end_row       3   2   3   1   2   3   1   2

        sequences    [[10, 20, 2], [10, 21, 2], [11, 2, -1]]
        source       [2, 1, 0]
        widths       [2, 2, 1]
        ends         [False, True, True]

    The children of node 1 are `first_child[1]` = 3 to `first_child[2] - 1` = 4. Node 5 has none: `first_child[5]` and
    `first_child[6]` are equal. Entry 8 of `first_child` closes the range of the last node.
    """

    def __init__(self, sequences: Sequence[Sequence[int]] | np.ndarray, eos_token_id: int):
        """Builds the trie of `sequences` (token ids without the end-of-sequence token; duplicates count once).

        An array must already be padded with PAD. Raises ValueError for no sequences, an empty sequence, or one that
        contains the end-of-sequence token.
        """
        rows = _padded(sequences, eos_token_id)
        order = np.lexsort(rows.T[::-1])
        rows = rows[order]
        distinct: np.ndarray = np.ones(len(rows), dtype=bool)
        distinct[1:] = (rows[1:] != rows[:-1]).any(axis=1)
        rows = rows[distinct]
        self.source = order[distinct]

        token = [np.array([PAD])]
        row_of = [np.array([PAD])]
        first_row, end_row = [np.array([0])], [np.array([len(rows)])]
        parents = []
        self.widths: list[int] = []
        self.ends: list[bool] = []
        # One depth at a time. Rows are sorted, so a row starts a new node where its tokens so far differ from those of
        # the row above.
        node: np.ndarray = np.zeros(len(rows), dtype=np.int64)  # for every row, the node that its tokens so far lead to
        changed: np.ndarray = np.zeros(len(rows), dtype=bool)  # whether they differ from those of the row above
        changed[0] = True
        count = 1
        for depth in range(rows.shape[1]):
            alive = rows[:, depth] != PAD
            changed[1:] |= rows[1:, depth] != rows[:-1, depth]
            new = np.flatnonzero(changed & alive)
            parents.append(node[new])
            token.append(rows[new, depth])
            row_of.append(np.where(rows[new, depth] == eos_token_id, new, PAD))
            self.widths.append(int(np.bincount(node[new]).max()))
            ended = rows[new, depth] == eos_token_id
            self.ends.append(bool(ended.any()))
            node = np.where(alive, count + np.cumsum(changed & alive) - 1, node)
            first_row.append(new)
            end_row.append(
                new + np.bincount(node[alive] - count, minlength=len(new))
            )  # the rows of a node are adjacent
            count += len(new)
        children = np.bincount(np.concatenate(parents), minlength=count)
        self.token = torch.from_numpy(np.concatenate(token))
        self.first_child = torch.from_numpy(np.concatenate([[1], 1 + np.cumsum(children)]))
        self.after_children = self.first_child[1:]  # of a node, one past its last child
        self.token_id = self.token.clamp(min=0)  # to look up with; the root's is never wanted
        self.column = torch.arange(max(self.widths))
        self.row = torch.from_numpy(np.concatenate(row_of))
        self.first_row = torch.from_numpy(np.concatenate(first_row))
        self.end_row = torch.from_numpy(np.concatenate(end_row))
        self.sequences = torch.from_numpy(rows)

    def to(self, device: torch.device | str) -> "Trie":
        """Moves the tensors to `device`, in place, and returns the trie."""
        for name, value in list(vars(self).items()):
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        return self

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def depth(self) -> int:
        """D, the tokens of the longest SID with its end-of-sequence token."""
        return self.sequences.shape[1]

    def sid_of(self, sids: Sequence[str]) -> dict[tuple[int, ...], str]:
        """The SID of every token sequence, which ends with the end-of-sequence token. `sids` are the SIDs that the trie
        was built from, as text and in the same order."""
        rows = zip(self.sequences.tolist(), self.source.tolist(), strict=True)
        return {tuple(token for token in row if token != PAD): sids[i] for row, i in rows}

    def children(self, node: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The children of nodes [...] as [..., width], and which of them exist [..., width]; the others are 0."""
        child = self.first_child[node].unsqueeze(-1) + self.column[:width]
        exists = child < self.after_children[node].unsqueeze(-1)
        return torch.where(exists, child, 0), exists

    def count_before(self, allowed: torch.Tensor) -> torch.Tensor:
        """[B, S + 1]: for every row of `sequences`, how many of those above it are allowed; `allowed` is [B, S]."""
        return nn.functional.pad(allowed.cumsum(dim=1, dtype=torch.int32), (1, 0))

    def may_go_on(self, node: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Which of the nodes [B, ...] have an allowed SID under them; `before` is what `count_before` returned."""
        flat = node.flatten(1)
        return (before.gather(1, self.end_row[flat]) > before.gather(1, self.first_row[flat])).view_as(node)


def _padded(sequences: Sequence[Sequence[int]] | np.ndarray, eos_token_id: int) -> np.ndarray:
    """[S, D], every sequence followed by the end-of-sequence token and PAD."""
    if len(sequences) == 0:
        raise ValueError("a trie needs at least one sequence")
    if isinstance(sequences, np.ndarray):
        rows = np.concatenate([sequences, np.full((len(sequences), 1), PAD)], axis=1).astype(np.int64)
        lengths = (rows != PAD).sum(axis=1)
    else:
        lengths = np.fromiter((len(sequence) for sequence in sequences), np.int64, len(sequences))
        rows = np.full((len(sequences), lengths.max() + 1), PAD, dtype=np.int64)
        flat = np.fromiter((token for sequence in sequences for token in sequence), np.int64, lengths.sum())
        rows[np.arange(rows.shape[1]) < lengths[:, None]] = flat
    if (lengths == 0).any():
        raise ValueError("a SID without tokens cannot be decoded")
    if (rows == eos_token_id).any():
        raise ValueError("a SID contains the end-of-sequence token")
    rows[np.arange(len(rows)), lengths] = eos_token_id
    return rows
