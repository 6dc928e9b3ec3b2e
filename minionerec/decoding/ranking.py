"""Ranks the catalogue for many prompts, shared out over the processes of a distributed run."""

from collections.abc import Sequence

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from minionerec.data.encoding import left_padded
from minionerec.decoding.beam_search import constrained_beam_search
from minionerec.decoding.probe import prove
from minionerec.decoding.trie import Trie
from minionerec.errors import RunError


def rank_prompts(
    model,
    trie: Trie,
    prompts: Sequence[list[int]],
    pad_token_id: int,
    num_beams: int,
    batch_size: int,
    length_penalty: float = 0.0,
) -> list[list[int]]:
    """For every prompt the best SIDs, best first, as places in what the trie was built of; the same in every process.

    Args:
        prompts: token ids, one list a prompt.
        num_beams: SIDs of a ranking, as far as the trie has that many.
        batch_size: prompts of a forward pass.
        length_penalty: beam scores are divided by their length to this power.
    """
    state = PartialState()
    longest = max(map(len, prompts), default=0)
    if not prove(model, longest, longest + min(num_beams, len(trie)) * trie.depth).padding:
        batch_size = 1  # so that every process runs as many forward passes as the others
    # Prompts of similar length share a batch, the longest first: a run that does not fit says so at once. The processes
    # take turns, so that each gets short and long ones.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    # Where the weights are shared out too, every process must run every forward: those with a batch less repeat one.
    turns = -(-len(batches) // state.num_processes)
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
    # All processes learn of it: one that raised while the others go on would leave them waiting.
    if not all(gather_object([finite])):
        raise RunError(
            f"the model's predictions are not finite in {model.dtype}; no items can be ranked by them", everywhere=True
        )
    ranking_of = dict(gather_object(rankings))
    return [ranking_of[i] for i in range(len(prompts))]
