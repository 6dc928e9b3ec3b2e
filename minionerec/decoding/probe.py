"""Finds out how a loaded model can be decoded, by comparing it with itself on a few random tokens.

With a tree mask, the beams of a prompt share its cache, and completions share a row with their prompt. Layers that do
not follow a 4-D mask (recurrent and convolution layers, ALiBi, windows that count places in the row) silently give
wrong scores; others ignore padding, or give other scores with a cache than without. No configuration tells this for
certain. So each way is tried on two prompts with four beams each and compared with plain rows: no cache, no padding, no
mask. The first way that gives the log-probabilities of plain rows is used, and the result is cached on the model.

Dimensions: `K` beams; for 2 prompts, 4 of their beams and 3 predictions of each are compared; `V` vocabulary.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig

from minionerec.decoding.beams import SHARED, CopiedBeams, RereadBeams, TreeBeams
from minionerec.errors import InputError, RunError
from minionerec.model.head import float32_head, head_on
from minionerec.model.packed_rows import shared_rows
from minionerec.model.token_trees import attends_in_blocks

# Tokens of the longer prompt, and of a row with all its beams, unless a window is longer. With 16 beams, a usual
# number, the place in the row differs enough from the position, by which ALiBi and windows should count.
PROMPT, ROW = 9, 9 + 2 * 16
IGNORE_MASKS = {"bloom", "gpt_neo", "mpt", "rwkv"}  # model types that ignore a 4-D mask without a sign in their config
DRAWS = 3  # of random tokens, for a model that does not look causal with the first ones
MASKED = {"full_attention", "sliding_attention", "chunked_attention"}  # layer types that can follow a 4-D mask


@dataclass(frozen=True)
class DecodingSupport:
    """How a model can be decoded.

    Attributes:
        beams: the class of `minionerec.decoding.beams` to use.
        padding: whether the prompts of a batch may be padded; else they are decoded one at a time.
        shared: whether completions may share a row with their prompt.
        why: why beams cannot share the prompt's cache; empty if they can.
    """

    beams: type
    padding: bool
    shared: bool
    why: str = ""

    def __str__(self) -> str:
        if self.beams is TreeBeams:
            return "beams share the prompt's cache under a tree mask"
        if self.beams is CopiedBeams:
            return f"beams are copied with the cache{'' if self.padding else ', one prompt at a time'}: {self.why}"
        return f"every step recomputes the whole beams, which is slow: {self.why}, and no cache gives the same scores"


def probe(model: nn.Module, prompt: int = PROMPT, row: int = ROW, name: str = "") -> DecodingSupport:
    """How `model` can be decoded with prompts of up to `prompt` tokens, in rows of up to `row` with all their beams.

    The model is tried once and the result cached; it is tried again only for longer rows that reach a window named in
    its configuration. The first process decides for all, so all processes must call this with the same lengths.

    Raises InputError, starting with `name`, if no way gives the log-probabilities of plain rows, and RunError if those
    are NaN.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    # Attention in blocks is sdpa where no tree is given, so what is known of the model stays true.
    attention = "sdpa" if attends_in_blocks(base) else config._attn_implementation
    known = vars(base).setdefault("_decoding_support", {}).setdefault(attention, {})
    if "short" not in known:
        known["short"] = _try_all(model, PROMPT, ROW, name)
    if known["short"].beams is not TreeBeams or not any(PROMPT < window <= row for window in _windows(config)):
        return known["short"]
    tried = known.get("lengths", (PROMPT, 0))
    if prompt > tried[0] or row > tried[1]:
        lengths = max(prompt, tried[0]), max(row, tried[1])
        known["long"] = _try_all(model, *lengths, name)
        known["lengths"] = lengths
    return known["long"]


def may_share_rows(config: PreTrainedConfig) -> bool:
    """Whether completions are expected to share a row with their prompt, judged by the configuration only: for the dry
    run, which has no weights to probe. A run itself calls `probe`."""
    text = config.get_text_config()
    if _non_attention_layers(text):
        return False
    return text.model_type not in IGNORE_MASKS and not getattr(text, "alibi", False)


def _non_attention_layers(config: PreTrainedConfig) -> set[str]:
    """The types of layers in a configuration that do not follow a 4-D mask, such as recurrent ones."""
    return set(getattr(config, "layer_types", None) or ()) - MASKED


def _windows(config: PreTrainedConfig) -> list[int]:
    """Every number in a configuration that may limit how far back an attention layer looks."""
    reach = re.compile("window(?!_layers|_pattern)|chunk|local_attention|topk")
    return [value for key, value in config.to_dict().items() if reach.search(key) and type(value) is int]


def _try_all(model: nn.Module, prompt: int, row: int, name: str) -> DecodingSupport:
    training, tf32 = model.training, torch.backends.cudnn.allow_tf32
    model.eval()
    torch.backends.cudnn.allow_tf32 = False  # its rounding in convolutions would hide small leaks
    try:
        name = name or "decoding"
        return _first_that_holds(_causal_trial(model, prompt, row, name), name)
    finally:
        model.train(training)
        torch.backends.cudnn.allow_tf32 = tf32


def _causal_trial(model: nn.Module, prompt: int, row: int, name: str) -> "_Trial":
    """A trial in which no token saw the tokens after it. Rounding may send a token to other experts, which looks as if
    it did; a model that is not causal shows it in every trial, with whatever tokens."""
    kind = type(model).__name__
    for draw in range(DRAWS):
        trial = _Trial(model, prompt, row, draw)
        if not trial.holds(trial.run_plain_rows):
            raise InputError(f"{name}: {kind} cannot be run: {trial.error}; {_remedy(model)}")
        if not trial.holds(trial.is_finite):
            raise RunError(
                f"{name}: the model's predictions are NaN or infinite in {model.dtype}; items cannot be ranked"
            )
        if trial.holds(trial.is_causal):
            return trial
    raise InputError(f"{name}: {kind} is not causal, its scores change with the tokens that follow; {_remedy(model)}")


def _remedy(model: nn.Module) -> str:
    """On a CPU, bitsandbytes computes layers in 8 bits for fewer architectures than in 4."""
    in_8_bits = getattr(model, "is_loaded_in_8bit", False)
    return "leave out --load_in_8bit" if in_8_bits else "choose another model"


def _first_that_holds(trial: "_Trial", name: str) -> DecodingSupport:
    kind = type(trial.model).__name__
    leaks_show = trial.holds(trial.leaks_exceed_rounding)
    if leaks_show and trial.holds(partial(trial.beams_match, TreeBeams)):
        return DecodingSupport(TreeBeams, padding=True, shared=trial.holds(trial.shared_rows_match))
    why = _why_no_tree(trial.model.config.get_text_config(), trial.row, leaks_show)
    for beams, padding in ((CopiedBeams, True), (CopiedBeams, False), (RereadBeams, False)):
        if trial.holds(partial(trial.beams_match, beams, padding)):
            return DecodingSupport(beams, padding, shared=False, why=why)
    raise InputError(f"{name}: {kind} gives different scores for the same tokens; {_remedy(trial.model)}")


def _why_no_tree(config: PreTrainedConfig, row: int, leaks_show: bool) -> str:
    """The clause that says why beams cannot share a cache."""
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} attention does not take a tree mask"
    layers = " and ".join(sorted(_non_attention_layers(config))) or config.model_type
    if not leaks_show:
        return f"rounding hides whether {layers} layers follow a tree mask"
    if row > ROW:
        return f"a window of {min(w for w in _windows(config) if w > PROMPT)} tokens does not follow a tree mask"
    return f"{layers} layers ignore a tree mask"


class _Trial:
    """Two random prompts of different lengths, four beams of two tokens each, and the log-probabilities of plain rows.

    Attributes:
        prompts: two tensors of token ids.
        paths: [2, 4, 2], the tokens of the four beams that are compared.
        filling: [2, K, 2], random tokens for the beams of a long row that are not compared.
        plain: [2, 4, 3, V], log-probabilities of plain rows.
        noise: how far equal log-probabilities are apart because other tokens are in the batch.
        later: how far they are apart because of the tokens after them; rounding, if the model is causal.
        leak: how far they are apart if a beam sees the others.
        rounding: how far two exact ways may be apart in the precision of the model.
        tolerance: how far a way may be from plain rows and still count as exact.
    """

    plain: torch.Tensor
    noise: torch.Tensor
    later: torch.Tensor
    leak: torch.Tensor
    rounding: torch.Tensor
    tolerance: torch.Tensor

    def __init__(self, model: nn.Module, prompt: int, row: int, seed: int = 0):
        self.model, self.row, self.error = model, row, ""
        config = model.config.get_text_config()
        # A placeholder token of an image would make the model look for an image among its inputs.
        special = [value for key, value in model.config.to_dict().items() if key.endswith(("token_id", "token_index"))]
        ids = torch.tensor([i for i in range(min(config.vocab_size, 5000)) if i not in special])
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return ids[torch.randint(len(ids), shape, generator=generator)].to(model.device)

        self.prompts = [draw(prompt), draw(math.ceil(prompt * 2 / 3))]
        self.prompts[1][:SHARED] = self.prompts[0][:SHARED]  # as prompts with one instruction
        self.paths = draw(2, 4, 2)
        self.paths[:, 1, 0] = self.paths[:, 0, 0]  # two beams have the same parent
        count = max(4, math.ceil((row - prompt) / 2))
        self.filling = draw(2, count, 2)

    def holds(self, check: Callable[[], bool]) -> bool:
        """Whether a check succeeds in the first process. An exception counts as a failure: a model may not take a mask
        or a cache, or return none."""
        try:
            with torch.no_grad():
                found = check()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.error, found = f"{type(error).__name__}: {error}".splitlines()[0][:200], False
        if dist.is_available() and dist.is_initialized():
            decided = [found]
            dist.broadcast_object_list(decided, device=self.model.device)
            found = decided[0]
        return found

    def run_plain_rows(self) -> bool:
        """Runs the plain rows, then runs them with tokens after them and with the other beams in between.

        Tokens after a row change only the rounding, and so does running a row of a quantized model alone: on a GPU,
        bitsandbytes multiplies few tokens with another kernel. Their effect is how exact another way can be. Beams in
        between change what is predicted: their effect is how exact another way must be.
        """
        start = len(self.prompts[0]) - 1
        self.plain = torch.stack([self._run(self._rows(i), len(self.prompts[i]) - 1 + torch.arange(3)) for i in (0, 1)])
        longer = torch.cat([self._rows(0), self._rows(1)[:, -PROMPT:]], dim=1)
        self.later = _distance(self._run(longer, start + torch.arange(3)), self.plain[0])
        self.noise = self.later
        if getattr(self.model, "is_quantized", False):
            alone = self._run(self._rows(0)[:1], start + torch.arange(3)).expand(4, -1, -1)
            self.noise = torch.maximum(self.later, _distance(alone, self.plain[0, :1].expand(4, -1, -1)))

        first, second, _ = self._written(self.filling.shape[1])
        places = start + 1 + _compared(len(first[0]))
        every = torch.cat([self.prompts[0], first[0], second[0]]).unsqueeze(0)
        seen = self._run(every, torch.cat([places, places + len(first[0])]))[0]
        self.leak = _distance(torch.stack([seen[:4], seen[4:].flip(0)], dim=1), self.plain[0, :, 1:])

        self.rounding = _rounding(self.model) * self.plain.std(dim=-1).median()
        self.tolerance = (4 * self.noise).clamp(self.rounding, 4 * self.rounding)
        return True

    def is_finite(self) -> bool:
        return not self.plain.isnan().any()

    def is_causal(self) -> bool:
        """Whether no token saw the tokens after it."""
        return bool(self.later <= 5 * self.rounding)

    def leaks_exceed_rounding(self) -> bool:
        """Whether the scores of a beam that sees the others differ by more than rounding explains."""
        return bool(self.leak > 2 * self.tolerance)

    def beams_match(self, beams: type, padding: bool = True) -> bool:
        """Whether beams of a kind give the scores of plain rows, for both prompts in one batch (padded) or for each
        prompt in a batch of its own."""
        first, second, parent = self._written(self.filling.shape[1] if beams is TreeBeams else 4)
        place = _compared(first.shape[1])

        def scores(ids: torch.Tensor, mask: torch.Tensor, of: slice) -> torch.Tensor:
            state = beams(self.model, ids, mask)
            before = state.logits.expand(-1, 4, -1)
            after_first = state.step(torch.zeros_like(first[of]), first[of], 0)[:, parent[place.flip(0)]]
            after_second = state.step(parent.expand_as(second[of]), second[of], 1)[:, place.flip(0)]
            return torch.stack([before, after_first, after_second], dim=2).float().log_softmax(-1)

        if padding:
            return self._is_plain(scores(*self._padded(), slice(2)))
        single = [scores(ids[None], torch.ones_like(ids)[None], slice(i, i + 1)) for i, ids in enumerate(self.prompts)]
        return self._is_plain(torch.cat(single))

    def shared_rows_match(self) -> bool:
        """Whether completions that share a row with their prompt get the scores of plain rows."""
        completions = torch.cat([self.filling, self.filling[:, :, :1]], dim=2)  # [2, K, 3]
        place = _compared(completions.shape[1])
        completions[:, place, :2] = self.paths
        present = torch.zeros_like(completions, dtype=torch.bool)
        present[:, :, 0] = present[:, place] = True
        ids, mask = (tensor.repeat_interleave(len(completions[0]), dim=0) for tensor in self._padded())
        inputs, wanted, source = shared_rows(
            self.model, ids, mask.bool(), completions.flatten(0, 1), present.flatten(0, 1)
        )
        with head_on(self.model, wanted), float32_head(self.model):
            logits = self.model(**inputs, use_cache=False).logits
        row = source.view(completions.shape)[:, place]  # [2, 4, 3]
        return self._is_plain(logits.float().log_softmax(-1)[row])

    def _rows(self, i: int) -> torch.Tensor:
        """Prompt `i` with each of its beams, [4, P + 2]."""
        return torch.cat([self.prompts[i].expand(4, -1), self.paths[i]], dim=1)

    def _padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both prompts, padded on the left, and their mask: [2, P]."""
        ids, mask = self.prompts[0].repeat(2, 1), torch.ones(2, len(self.prompts[0]), dtype=torch.long)
        missing = len(self.prompts[0]) - len(self.prompts[1])
        ids[1, missing:], mask[1, :missing] = self.prompts[1], 0
        return ids, mask.to(ids.device)

    def _written(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tokens that `count` beams write in two steps, [2, K] each, and their parents in the second step, [K]. In
        the second step, the four beams that are compared are in reverse order."""
        place = _compared(count)
        first, second = self.filling[:, :count, 0].clone(), self.filling[:, :count, 1].clone()
        first[:, place], second[:, place.flip(0)] = self.paths[:, :, 0], self.paths[:, :, 1]
        parent = torch.zeros(count, dtype=torch.long, device=first.device)
        parent[place.flip(0)] = place[[0, 0, 2, 3]].to(parent.device)
        return first, second, parent

    def _run(self, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [rows, columns, V] after the tokens in some columns of plain rows [rows, tokens]."""
        first = torch.arange(len(ids)).unsqueeze(1) * ids.shape[1]
        with head_on(self.model, (first + columns).flatten().to(ids.device)), float32_head(self.model):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return logits.float().log_softmax(-1).view(len(ids), len(columns), -1)

    def _is_plain(self, scores: torch.Tensor) -> bool:
        """Whether log-probabilities [2, 4, 3, V] are those of the plain rows."""
        return bool(_distance(scores, self.plain) <= self.tolerance)


def _compared(count: int) -> torch.Tensor:
    """The indices of the four beams that are compared among `count`."""
    return torch.tensor([0, 1, count // 2, count - 1])


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How far log-probabilities [..., 4 beams, steps, V] are apart: the second largest distance of a beam at the worst
    step, because rounding may send a token of one beam to another expert. NaN if any value is."""
    apart = (one - other).square().mean(dim=-1).sqrt()
    return apart.sort(dim=-2).values[..., 2, :].max() + 0 * apart.max()


def _rounding(model: nn.Module) -> float:
    """How far two exact ways may be apart, as a fraction of the standard deviation of the log-probabilities."""
    exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if not exact or torch.is_autocast_enabled(model.device.type):  # 16 bits or fewer: errors grow with the depth
        return 0.005 * (2 * model.config.get_text_config().num_hidden_layers) ** 0.5
    # Kernels of recurrent layers may use TF32 on a GPU, whatever torch is told.
    return 2e-3 if model.device.type == "cuda" and _non_attention_layers(model.config.get_text_config()) else 2e-5
