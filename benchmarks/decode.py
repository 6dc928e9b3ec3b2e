"""Measures constrained beam search: prompts/s against `generate`, and the cost of a catalogue of a million SIDs.

1. `minionerec.decoding.beam_search` against `generate` of transformers with a Python function that looks up the allowed
   tokens of every beam in a dictionary of prefixes. Both must give the same scores and the same beams.
2. The same search in 1,000,000 SIDs and in 4,000: milliseconds per batch; seconds and memory (GB) to build the trie
   from SID texts.
3. The same search where each prompt may get its own half of the SIDs, against the search in all of them. The time to
   turn the constraints into masks counts.

    python -m benchmarks.decode
    python -m benchmarks.decode --hidden_size 896 --num_hidden_layers 24 --num_attention_heads 14 --vocab_size 151936
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.common import in_fresh_process, interleaved_medians, print_json, print_table, quiet
from benchmarks.fixtures import CODES, LEVELS, SmallShapeFlags, random_sids, sid_tokenizer, small_qwen2
from minionerec import cli
from minionerec.flags import Check, above_zero, command, flag
from minionerec.process_memory import peak_rss_gb, reset_peak_rss, rss_gb

if TYPE_CHECKING:  # torch is imported after the trie's memory is measured
    import torch
    from transformers import PreTrainedModel

TOLERANCE = 1e-3  # for a score, a sum of four log-probabilities


def _sids(least: int = 50, most: int = CODES ** len(LEVELS)) -> Check:
    return lambda count: None if least <= count <= most else f"must be between {least} and {most}"


@dataclass(frozen=True, kw_only=True)
class DecodeFlags(SmallShapeFlags):
    """What is searched, in what, and the shape of the model."""

    prompts: int = flag(4, "prompts of a batch, of different lengths.", above_zero)
    prompt_tokens: int = flag(200, "tokens of the longest prompt.", above_zero)
    sids: int = flag(3670, "SIDs of the comparison with `generate`.", _sids())
    small_catalogue: int = flag(4000, "SIDs of the catalogue that the large one is compared with.", _sids())
    large_catalogue: int = flag(1000000, "SIDs of the large catalogue, at most 16,777,216.", _sids())
    repeats: int = flag(5, "timed rounds; the median is reported.", above_zero)


def build_cost(count: int, vocab_size: int) -> dict[str, float]:
    """Seconds and extra resident memory to build the trie of `count` SID texts."""
    from minionerec.data import sid_tokens
    from minionerec.decoding.trie import Trie

    sids, tokenizer = random_sids(count), sid_tokenizer(vocab_size)
    tokenizer.backend_tokenizer.encode_batch_fast(sids[:1000])  # starts the threads
    reset_peak_rss()
    before, started = rss_gb(), time.perf_counter()
    trie = Trie(sid_tokens.sid_sequences(tokenizer, sids), tokenizer.eos_token_id)
    assert len(trie) == count
    return {"seconds": time.perf_counter() - started, "extra_gb": peak_rss_gb() - before}


def prefix_table(sequences: list[list[int]], eos_token_id: int) -> dict[tuple[int, ...], list[int]]:
    """The tokens that may follow each prefix of a SID."""
    allowed: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for sequence in sequences:
        path = [*sequence, eos_token_id]
        for depth, token in enumerate(path):
            allowed[tuple(path[:depth])].add(token)
    return {prefix: list(tokens) for prefix, tokens in allowed.items()}


def generate(
    model: "PreTrainedModel",
    input_ids: "torch.Tensor",
    attention_mask: "torch.Tensor",
    sequences: list[list[int]],
    eos_token_id: int,
    num_beams: int,
) -> "Callable[[], tuple[torch.Tensor, torch.Tensor]]":
    """A search with transformers' `generate`, constrained by a Python function: beams [B, K, D] and scores [B, K]."""
    prompt_tokens = input_ids.shape[1]
    allowed = prefix_table(sequences, eos_token_id)

    def search() -> "tuple[torch.Tensor, torch.Tensor]":
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=len(LEVELS) + 1,
            do_sample=False,
            length_penalty=0.0,
            prefix_allowed_tokens_fn=lambda _, ids: allowed.get(tuple(ids[prompt_tokens:].tolist()), [eos_token_id]),
            return_dict_in_generate=True,
            output_scores=True,
        )
        beams = output.sequences[:, prompt_tokens:].view(len(input_ids), num_beams, -1)
        return beams, output.sequences_scores.view(len(input_ids), num_beams)

    return search


@command(DecodeFlags)
def decode(flags: DecodeFlags) -> None:
    """Prints the speed-up over `generate` with 16 and 50 beams, and what a large catalogue and constraints cost."""
    flags.problems().check()
    prompts, prompt_tokens, repeats = flags.prompts, flags.prompt_tokens, flags.repeats
    small_catalogue, large_catalogue = flags.small_catalogue, flags.large_catalogue
    build = in_fresh_process(build_cost, large_catalogue, flags.vocab_size)

    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from minionerec.data import sid_tokens
    from minionerec.decoding import beam_search
    from minionerec.decoding.ranking import masks_of
    from minionerec.decoding.trie import Trie
    from minionerec.model import device

    quiet()
    set_seed(0)
    tokenizer = sid_tokenizer(flags.vocab_size)
    config = small_qwen2(**replace(flags, vocab_size=len(tokenizer)).shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device.local_device()).eval()
    input_ids = torch.randint(2, flags.vocab_size, (prompts, prompt_tokens))
    attention_mask = torch.ones_like(input_ids)
    for row in range(prompts):
        attention_mask[row, : row * prompt_tokens // (4 * prompts)] = 0  # padded on the left
    input_ids[attention_mask == 0] = 0
    batch = input_ids.to(model.device), attention_mask.to(model.device)

    def trie_of(count: int) -> tuple[Trie, list[list[int]]]:
        sequences = sid_tokens.sid_sequences(tokenizer, random_sids(count))
        return Trie(sequences, tokenizer.eos_token_id).to(model.device), sequences.tolist()

    trie, sequences = trie_of(flags.sids)
    small, large = trie_of(small_catalogue)[0], trie_of(large_catalogue)[0]
    halves = {
        catalogue: [np.random.default_rng(row).random(len(catalogue)) < 0.5 for row in range(prompts)]
        for catalogue in (small, large)
    }
    against_generate, catalogues, constrained, results = [], [], [], {}
    for beams in (16, 50):
        reference = generate(model, *batch, sequences, tokenizer.eos_token_id, beams)

        def search(trie: Trie = trie, beams: int = beams) -> tuple[torch.Tensor, torch.Tensor]:
            return beam_search.constrained_beam_search(model, *batch, trie, beams)

        def masked(trie: Trie, beams: int = beams) -> tuple[torch.Tensor, torch.Tensor]:
            allowed = masks_of(halves[trie], trie)
            return beam_search.constrained_beam_search(model, *batch, trie, beams, allowed=allowed)

        rows, scores = search()
        expected, expected_scores = reference()
        difference = (scores - expected_scores).abs().max().item()
        assert difference < TOLERANCE, f"scores differ by {difference}"
        equal = (trie.sequences[rows] == expected).all(dim=2).float().mean().item()
        seconds = interleaved_medians({"generate": reference, "minionerec": search}, repeats)
        ratio = seconds["generate"] / seconds["minionerec"]
        against_generate.append(
            {
                "beams": beams,
                "generate prompts/s": prompts / seconds["generate"],
                "minionerec prompts/s": prompts / seconds["minionerec"],
                "times as fast": ratio,
                "equal beams": f"{equal:.1%}",
                "largest score difference": f"{difference:.0e}",
            }
        )
        search(large)
        for trie_of_half, chosen in halves.items():  # what comes out is allowed
            rows = masked(trie_of_half)[0].cpu().numpy()
            assert all(mask[row].all() for mask, row in zip(chosen, rows, strict=True))
        ways = {"small": lambda: search(small), "large": lambda: search(large)}
        ways |= {"small, masked": lambda: masked(small), "large, masked": lambda: masked(large)}
        seconds = interleaved_medians(ways, 3 * repeats)
        growth = seconds["large"] / seconds["small"]
        catalogues.append(
            {
                "beams": beams,
                f"ms/batch, {small_catalogue:,} SIDs": 1000 * seconds["small"],
                f"ms/batch, {large_catalogue:,} SIDs": 1000 * seconds["large"],
                "ratio": growth,
            }
        )
        costs = {name: seconds[f"{name}, masked"] / seconds[name] for name in ("small", "large")}
        constrained.append(
            {
                "beams": beams,
                f"constrained / all, {small_catalogue:,} SIDs": costs["small"],
                f"constrained / all, {large_catalogue:,} SIDs": costs["large"],
            }
        )
        results[beams] = {"speed_up": ratio, "equal_beams": equal, "large_over_small": growth, "constrained": costs}
    print_table(against_generate)
    print()
    print_table(catalogues)
    print()
    print_table(constrained)
    print(f"\ntrie of {large_catalogue:,} SIDs: {build['seconds']:.1f} s, {build['extra_gb']:.2f} GB extra\n")
    print_json("decode", **flags.to_dict(), results=results, build=build)


if __name__ == "__main__":
    cli.run(decode)
