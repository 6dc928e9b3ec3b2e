"""SIDs that a beam search scores although no beam may lead to them.

What starts them goes on behind the beams, in the same forward passes and on the same prompt cache. Tokens that beams
have anyway are computed once.

Dimensions: `B` prompts, `K` beams, `M` wanted SIDs, `N` nodes that are looked at, `S` SIDs.
"""

import torch

from minionerec.data.sid_tokens import PAD
from minionerec.decoding.trie import Trie


class Wanted:
    """The SIDs of a batch of prompts that are scored together with the beams, and the scores found so far."""

    def __init__(self, trie: Trie, rows: torch.Tensor):
        """`rows` [B, M] of `trie.sequences`, distinct in each prompt, PAD for none."""
        self.rows = torch.where(rows == PAD, len(trie), rows)  # which equals no row, as PAD would
        self.scores = torch.full(rows.shape, -torch.inf, device=rows.device)
        chosen = torch.zeros((len(rows), len(trie) + 1), dtype=torch.bool, device=rows.device)
        self.trie, self.before = trie, trie.count_before(chosen.scatter_(1, self.rows, True)[:, :-1])

    def collect(self, row: torch.Tensor, score: torch.Tensor) -> None:
        """Notes the scores [B, N] of the SIDs `row` [B, N] that end at a depth."""
        same = self.rows.unsqueeze(2) == row.unsqueeze(1)
        self.scores = torch.maximum(self.scores, torch.where(same, score.unsqueeze(1), -torch.inf).amax(dim=2))

    def left_out(self, node: torch.Tensor, score: torch.Tensor, best: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Places [B, ...] of the nodes [B, N] that start a wanted SID and are not at the places `best` [B, K], and
        their scores; -inf where a prompt has fewer of them than another one."""
        starts = self.trie.may_go_on(node, self.before) & (score > -torch.inf)
        starts.scatter_(1, best, False)
        scores, places = torch.where(starts, score, -torch.inf).topk(int(starts.sum(dim=1).max()), dim=1)
        return places, scores

    def behind(self, row: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and scores [B, K + M]: those of the beams [B, K], then the wanted ones that are not among them."""
        known = (self.rows.unsqueeze(2) == row.unsqueeze(1)).any(dim=2)
        scores = torch.cat([score, self.scores.masked_fill(known, -torch.inf)], dim=1)
        return torch.cat([row, self.rows], dim=1), scores
