"""Ranks the catalogue for many prompts, which are divided among the processes of a distributed run."""

import math
from collections.abc import Sequence

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from minionerec.data.encoding import left_padded
from minionerec.decoding.beam_search import constrained_beam_search
from minionerec.decoding.probe import prove
from minionerec.decoding.trie import Trie
from minionerec.errors import RunError


def rank_prompts(
    model: nn.Module,
    trie: Trie,
    prompts: Sequence[list[int]],
    pad_token_id: int,
    num_beams: int,
    batch_size: int,
    length_penalty: float = 0.0,
) -> list[list[int]]:
    """The best SIDs of every prompt, best first, as indices into the list the trie was built from; all processes return
    the same.

    Args:
        prompts: token ids, one list per prompt.
        num_beams: SIDs in a ranking, or all of them if the trie has fewer.
        batch_size: prompts of a forward pass.
        length_penalty: beam scores are divided by their length to this power.

    Raises RunError, in all processes, if a score is NaN.
    """
    state = PartialState()
    longest = max(map(len, prompts), default=0)
    if not prove(model, longest, longest + min(num_beams, len(trie)) * trie.depth).padding:
        batch_size = 1  # so that all processes run the same number of forward passes
    # Prompts of similar length are in one batch. The longest come first, so a run that does not fit into memory fails
    # at its start. Batches go to the processes in turn, so each process gets short and long ones.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    # If the weights are sharded, all processes must take part in every forward pass: those with one batch fewer repeat
    # the last one.
    turns = math.ceil(len(batches) / state.num_processes)
    rankings: list[tuple[int, list[int]]] = []
    finite = True
    with tqdm(total=sum(map(len, mine)), unit="row", leave=False, disable=not state.is_main_process) as progress:
        for batch in [*mine, *batches[-1:]][:turns]:
            input_ids, attention_mask = left_padded([prompts[i] for i in batch], pad_token_id)
            beams, scores = constrained_beam_search(
                model, input_ids.to(model.device), attention_mask.to(model.device), trie, num_beams, length_penalty
            )
            finite = finite and not bool(scores.isnan().any())
            rankings += zip(batch, trie.source[beams.cpu().numpy()].tolist(), strict=True)
            progress.update(len(batch))
    # All processes raise together: if only one did, the others would wait for it forever.
    if not all(gather_object([finite])):
        raise RunError(
            f"the model's predictions are NaN or infinite in {model.dtype}; items cannot be ranked", everywhere=True
        )
    ranking_of = dict(gather_object(rankings))
    return [ranking_of[i] for i in range(len(prompts))]
