"""The trie that holds the SIDs of a catalogue as token sequences.

Dimensions: `S` SIDs, `D` tokens of the longest SID with its end-of-sequence token, `C` children of the widest trie node
at one depth.
"""

from collections.abc import Sequence

import numpy as np
import torch

from minionerec.data.sid_tokens import PAD


class Trie:
    """All SIDs of a catalogue as a trie of token ids, held in tensors.

    Nodes are numbered breadth-first from the root, 0, so that siblings stand side by side: the children of node n are
    the nodes `first_child[n]` to `first_child[n + 1] - 1`, each reached by its own `token`. Every path ends with the
    end-of-sequence token, so a SID may be the beginning of another one.

    Attributes:
        token: [nodes], the token that leads to a node (PAD for the root).
        first_child: [nodes + 1].
        row: [nodes], at a leaf the row of its SID in `sequences`, elsewhere PAD.
        sequences: [S, D], the distinct SIDs with their end-of-sequence token, sorted, padded with PAD.
        source: [S], for every row of `sequences` the place it had in the input.
        widths: C at every depth.
    """

    def __init__(self, sequences: Sequence[Sequence[int]] | np.ndarray, eos_token_id: int):
        """Builds the trie of `sequences` (token ids without the end-of-sequence token; duplicates count once).

        An array is taken as padded with PAD already. Raises ValueError for no sequences, an empty one, or one that
        contains the end-of-sequence token.
        """
        rows = _padded(sequences, eos_token_id)
        order = np.lexsort(rows.T[::-1])
        rows = rows[order]
        distinct = np.ones(len(rows), dtype=bool)
        distinct[1:] = (rows[1:] != rows[:-1]).any(axis=1)
        rows = rows[distinct]
        self.source = order[distinct]

        token = [np.array([PAD])]
        row_of = [np.array([PAD])]
        parents = []
        self.widths: list[int] = []
        node = np.zeros(len(rows), dtype=np.int64)  # of every row, the node its first tokens lead to
        count = 1
        changed = np.zeros(len(rows), dtype=bool)  # whether a row's first tokens differ from the row's above
        changed[0] = True
        for depth in range(rows.shape[1]):
            alive = rows[:, depth] != PAD
            changed[1:] |= rows[1:, depth] != rows[:-1, depth]
            new = np.flatnonzero(changed & alive)
            parents.append(node[new])
            token.append(rows[new, depth])
            row_of.append(np.where(rows[new, depth] == eos_token_id, new, PAD))
            self.widths.append(int(np.bincount(node[new]).max()))
            node = np.where(alive, count + np.cumsum(changed & alive) - 1, node)
            count += len(new)
        children = np.bincount(np.concatenate(parents), minlength=count)
        self.token = torch.from_numpy(np.concatenate(token))
        self.first_child = torch.from_numpy(np.concatenate([[1], 1 + np.cumsum(children)]))
        self.row = torch.from_numpy(np.concatenate(row_of))
        self.sequences = torch.from_numpy(rows)

    def to(self, device: torch.device | str) -> "Trie":
        """Moves the tensors to `device`, in place, and returns the trie."""
        for name in ("token", "first_child", "row", "sequences"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def depth(self) -> int:
        return self.sequences.shape[1]

    def sid_of(self, sids: Sequence[str]) -> dict[tuple[int, ...], str]:
        """The SID of every token sequence, its end-of-sequence token included. `sids`: what the trie was built of, as
        text and in the same order."""
        rows = zip(self.sequences.tolist(), self.source.tolist(), strict=True)
        return {tuple(token for token in row if token != PAD): sids[i] for row, i in rows}

    def children(self, node: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The children of nodes [...] as [..., width], and which of them exist; the rest point at the root."""
        first = self.first_child[node].unsqueeze(-1)
        child = first + torch.arange(width, device=node.device)
        exists = child < self.first_child[node + 1].unsqueeze(-1)
        return torch.where(exists, child, 0), exists


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
