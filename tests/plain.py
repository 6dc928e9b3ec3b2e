"""The plain twins of what is fast: SIDs and completions scored one by one, without cache, padding or trie; and checks
that compare a model with them."""

import os
from collections import defaultdict

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_utils
from minionerec.data.sid_tokens import PAD
from minionerec.decoding.beam_search import constrained_beam_search, constrained_sample
from minionerec.decoding.trie import Trie
from minionerec.flags import AdapterFlags
from minionerec.training.logprobs import completion_logps

EOS = 0
SIDS = [(1,), (1, 2), (3, 4), (3, 4, 5), (3, 6, 7), (8, 2)]
LENGTHS = (5, 31, 42)  # of prompts in one batch
# Two prompts of different lengths with three completions each, and one with a single completion; of 1 to 3 tokens.
PROMPTS = [[5, 6, 7, 90, 8]] * 3 + [[9, 10, 91]] * 3 + [[11, 12, 13, 14]]
COMPLETIONS = [[90, 5, 1], [91, 1], [90, 6, 1], [90, 5, 1], [1], [91, 6, 1], [91, 91, 1]]
IDS = [90, 91, 5]  # of SID rows
TOKENS = torch.tensor([[1, 90, 5, 7, 91, 3, 8, 9, 10], [2, 5, 90, 91, 8, 4, 3, 2, 1]])


class Copies(TorchFunctionMode):
    """While open, notes for every copy from the CPU to another device whether the host goes on meanwhile. A GPU makes
    it wait, otherwise, until all that it started before is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on: list[bool] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") == "to" and args[0].device.type == "cpu" != result.device.type:
            self.go_on.append(bool((kwargs or {}).get("non_blocking")))
        return result


def fuzz_seeds(count: int) -> range:
    """The seeds of a test with random settings: the first `count`, or those that FUZZ_SEEDS names: 500, or 100:500."""
    return range(*map(int, os.environ.get("FUZZ_SEEDS", str(count)).split(":")))


def batch(rows=slice(None)):
    """prompt_ids, prompt_mask, completion_ids, completion_mask, with more padding than they need."""

    def padded(sequences, width, left):
        ids = torch.zeros((len(sequences), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            place = slice(width - len(sequence), None) if left else slice(len(sequence))
            ids[row, place], mask[row, place] = torch.tensor(sequence), 1
        return ids, mask

    return *padded(PROMPTS[rows], 7, True), *padded(COMPLETIONS[rows], 4, False)


def one_by_one(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature=1.0):
    """The plain way: every completion separately after its prompt, without padding, with all logits."""
    logps, entropies = torch.zeros(completion_ids.shape), torch.zeros(completion_ids.shape)
    for row in range(len(prompt_ids)):
        prompt = prompt_ids[row][prompt_mask[row].bool()]
        answer = completion_ids[row][completion_mask[row].bool()]
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        every = logits.log_softmax(dim=1)
        logps[row, : len(answer)] = every[torch.arange(len(answer)), answer]
        entropies[row, : len(answer)] = -(every.exp() * every).sum(dim=1).detach()
    return logps, entropies


def moved(model, seed: int = 1, by: float = 0.05):
    """The model, of which all that trains has moved a little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def with_adapter(model, dropout=0.0):
    torch.manual_seed(4)
    flags = AdapterFlags(lora_r=4, lora_dropout=dropout)
    model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, flags))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def gradients(model, logps):
    weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
    (logps * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def random_sids(count: int, lengths: tuple[int, ...], seed: int = 0) -> list[tuple[int, ...]]:
    chance = np.random.default_rng(seed)
    sids = {tuple(map(int, chance.integers(1, 9, chance.choice(lengths)))) for _ in range(count * 3)}
    return sorted(sids)[:count]


def exhaustive(model, ids, mask, sids, length_penalty=0.0) -> list[list[tuple[tuple[int, ...], float]]]:
    """Every SID with its teacher-forced score, best first, for every prompt: no trie, no cache."""
    ranked = []
    for row, row_mask in zip(ids, mask, strict=True):
        prompt = row[row_mask.bool()]
        scores = []
        for sid in sids:
            answer = torch.tensor([*sid, EOS])
            with torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0].float()
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, answer[:, None])
            scores.append((sid, logps.sum().item() / len(answer) ** length_penalty))
        ranked.append(sorted(scores, key=lambda pair: -pair[1]))
    return ranked


def sids_of(trie: Trie, rows: torch.Tensor) -> list[list[tuple[int, ...]]]:
    return [[tuple(t for t in trie.sequences[i].tolist() if t not in (PAD, EOS)) for i in row] for row in rows.tolist()]


def prompts(lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths, padded on the left."""
    ids = torch.randint(1, 92, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids * mask, mask


class Made(TorchDispatchMode):
    """The sizes of all tensors that are made while it is on, by dtype."""

    def __init__(self):
        super().__init__()
        self.sizes = defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.sizes[tensor.dtype].append(tensor.numel())
        return result


def check_beams(model):
    """Beams are scored and ranked as one by one, and samples are SIDs of the catalogue."""
    ids, mask = prompts()
    trie = Trie(SIDS, EOS)
    rows, scores = constrained_beam_search(model, ids, mask, trie, 4 * len(SIDS))
    expected = exhaustive(model, ids, mask, SIDS)
    torch.testing.assert_close(scores, torch.tensor([[s for _, s in r] for r in expected]), atol=1e-4, rtol=1e-4)
    assert sids_of(trie, rows) == [[sid for sid, _ in ranking] for ranking in expected]
    few, _ = constrained_beam_search(model, ids, mask, Trie(SIDS, EOS), 3)  # no room for all: beams die
    assert few.shape == (3, 3) and all(len(set(row)) == 3 for row in few.tolist())
    drawn = constrained_sample(model, ids, mask, trie, 7)
    assert drawn.shape == (3, 7) and {sid for row in sids_of(trie, drawn) for sid in row} <= set(SIDS)


def completions():
    """Two prompts, the shorter one first, with three completions each."""
    ids, mask = (tensor[:2].repeat_interleave(3, dim=0) for tensor in prompts(LENGTHS[:2]))
    answers = torch.tensor([[1, 0, 0], [3, 4, 0], [8, 2, 0], [3, 6, 7], [1, 2, 0], [3, 4, 5]])
    present = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]])
    return ids, mask, answers, present


def check_logps(model, with_gradients: bool):
    inputs = completions()
    with torch.set_grad_enabled(with_gradients):
        logps, entropies = completion_logps(model, *inputs)
        expected, expected_entropies = one_by_one(model, *inputs)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-3, rtol=0)
    if with_gradients:
        found, wanted = gradients(model, logps), gradients(model, expected)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            scale = max(1, gradient.abs().max().item())
            torch.testing.assert_close(found[name], gradient, atol=1e-4 * scale, rtol=1e-3)
