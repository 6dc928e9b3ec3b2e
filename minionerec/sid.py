"""Semantic IDs as token sequences: the trie that holds a catalogue, and beam search confined to it.

Dimensions: `B` prompts, `K` beams, `P` prompt tokens, `V` vocabulary, `S` SIDs, `D` tokens of the longest SID with its
end-of-sequence token, `C` children of the widest trie node at one depth, `T` tokens written by all beams so far.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
import torch

from minionerec.beams import CopiedBeams, TreeBeams
from minionerec.probe import prove

PAD = -1  # after the end of a sequence that is shorter than D


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


def token_rows(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids of texts as [S, tokens of the longest], padded with PAD; one row a text, in order. Works through a
    million of them flat."""
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), 10_000):
        batch = tokenizer.encode_batch_fast(list(texts[start : start + 10_000]), add_special_tokens=False)
        rows = np.full((len(batch), max(len(encoding.ids) for encoding in batch)), PAD, dtype=np.int32)
        for row, encoding in zip(rows, batch, strict=True):
            row[: len(encoding.ids)] = encoding.ids
        ids.append(rows)
    width = max(rows.shape[1] for rows in ids)
    return np.concatenate([np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=PAD) for rows in ids])


def sid_sequences(tokenizer, sids: Sequence[str]) -> np.ndarray:
    """Token ids of SIDs as [S, D - 1], padded with PAD; one row a SID, in order. `vocabulary` checks them."""
    return token_rows(tokenizer.backend_tokenizer, sids)


def _way(model, prompt: int, row: int, tree: bool | None) -> tuple[type, bool]:
    """How beams go on from prompts of `prompt` tokens, in rows of `row`, and whether the prompts may be padded."""
    if tree is not None:
        return TreeBeams if tree else CopiedBeams, True
    proof = prove(model, prompt, row)
    return proof.beams, proof.padding


def _alone(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every prompt of a batch as a batch of its own, without padding."""
    for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
        yield ids[mask].unsqueeze(0), attention_mask.new_ones((1, int(mask.sum())))


@torch.no_grad()  # inference mode would leave weights that FSDP gathers unfit for training
def constrained_beam_search(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: Trie,
    num_beams: int,
    length_penalty: float = 0.0,
    tree: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `num_beams` best SIDs of every prompt, best first.

    A beam's score is the sum of its tokens' log-probabilities under the whole vocabulary, end-of-sequence token
    included, divided by its length to the power of `length_penalty`. The prompt runs through the model once. Every
    beam is a distinct SID of the trie, which a step costs no more for being larger.

    Args:
        model: a causal LM in evaluation mode.
        input_ids, attention_mask: [B, P], padded on the left.
        trie: on the model's device.
        tree: under a tree mask, or with copies of the cache; None takes the first way that is proven of the model.

    Returns:
        rows [B, K] into `trie.sequences`, and scores [B, K]; K is `num_beams`, or the number of SIDs where the
        catalogue is smaller.
    """
    beams = min(num_beams, len(trie))
    prompts, device = len(input_ids), input_ids.device
    way, padding = _way(model, input_ids.shape[1], input_ids.shape[1] + beams * trie.depth, tree)
    if not padding and (prompts > 1 or not attention_mask.all()):
        found = [
            constrained_beam_search(model, *one, trie, num_beams, length_penalty)
            for one in _alone(input_ids, attention_mask)
        ]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    state = way(model, input_ids, attention_mask)
    logits = state.logits
    node = torch.zeros((prompts, 1), dtype=torch.long, device=device)
    score = torch.zeros((prompts, 1), device=device)
    finished_row = torch.full((prompts, beams), PAD, device=device)
    finished_score = torch.full((prompts, beams), -torch.inf, device=device)
    for depth, width in enumerate(trie.widths):
        logits = logits.float()
        child, exists = trie.children(node, width)  # [B, K, C]
        token = trie.token[child].clamp(min=0)
        score_of = logits.gather(2, token) - logits.logsumexp(dim=2, keepdim=True) + score.unsqueeze(2)
        score_of = score_of.masked_fill(~exists, -torch.inf).flatten(1)
        child = child.flatten(1)

        # SIDs that end here compete with those that ended before; the others run on.
        row = trie.row[child]
        ended = torch.where(row == PAD, -torch.inf, score_of / (depth + 1) ** length_penalty)
        finished_score, best = torch.cat([finished_score, ended], dim=1).topk(beams, dim=1)
        finished_row = torch.cat([finished_row, row], dim=1).gather(1, best)
        if depth + 1 == trie.depth:
            break
        running = torch.where(row == PAD, score_of, -torch.inf)
        score, best = running.topk(min(beams, running.shape[1]), dim=1)
        node = child.gather(1, best)
        logits = state.step(best // width, trie.token[node].clamp(min=0), depth)
    return finished_row, finished_score


@torch.no_grad()
def constrained_sample(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: Trie,
    count: int,
    temperature: float = 1.0,
    tree: bool | None = None,
) -> torch.Tensor:
    """`count` SIDs a prompt, drawn with replacement from the model's distribution over the trie.

    Every token is drawn from the softmax of logits / `temperature` over the tokens that continue a SID.

    Args:
        input_ids, attention_mask: [B, P], padded on the left.
        tree: as in `constrained_beam_search`.

    Returns:
        [B, count], rows of `trie.sequences` in the order they were drawn.
    """
    way, padding = _way(model, input_ids.shape[1], input_ids.shape[1] + count * trie.depth, tree)
    if not padding and (len(input_ids) > 1 or not attention_mask.all()):
        return torch.cat(
            [constrained_sample(model, *one, trie, count, temperature) for one in _alone(input_ids, attention_mask)]
        )
    state = way(model, input_ids, attention_mask)
    logits = state.logits
    node = torch.zeros((len(input_ids), count), dtype=torch.long, device=input_ids.device)
    itself = torch.arange(count, device=node.device).expand_as(node)
    for depth, width in enumerate(trie.widths):
        child, exists = trie.children(node, width)  # [B, count, C]
        token = trie.token[child].clamp(min=0)
        scores = logits.float().expand(-1, count, -1).gather(2, token) / temperature
        ended = trie.row[node] != PAD  # these have no children; they stay where they are
        scores = scores.masked_fill(~exists, -torch.inf).masked_fill(ended.unsqueeze(2), 0.0)
        drawn = torch.multinomial(scores.softmax(dim=2).flatten(0, 1), 1).view_as(node)
        node = torch.where(ended, node, child.gather(2, drawn.unsqueeze(2)).squeeze(2))
        if depth + 1 < trie.depth:
            parent = itself if depth else torch.zeros_like(itself)
            logits = state.step(parent, trie.token[node].clamp(min=0), depth)
    return trie.row[node]
