"""Token trees: rows that share beginnings go through the model together, and each common beginning is computed once.

The rows of an optimizer step share the instruction of their task, and a user's history is the beginning of that user's
next row. In the tree, each token is computed once, sees only its ancestors, and its position is its depth. Where rows
part, one hidden state predicts the next token of each. Three rows, with a bar where the response begins, and their
tree, with positions:

    A B C | D E
    A B C | D F        A0 - B1 - C2 - D3
    A B | G H                  \\ G2

B1 predicts G; C2 predicts D, for two rows; D3 predicts E and F; G2 predicts H: five nodes for eleven tokens. A row's
last token is predicted and predicts nothing, so it is not part of the input. Loss and gradients are those of separate
rows.

Dimensions: `n` rows, `D` tokens of the longest row, `R` tensor rows of a micro-batch, `L` nodes of a tensor row after
padding, `N` response tokens, `P` nodes that predict any of them, `V` vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minionerec.data.examples import IGNORE
from minionerec.model import device
from minionerec.model.packed_rows import Packed, attention_masks

# --- Merging ----------------------------------------------------------------------------------------------------------


@dataclass
class Tree:
    """Rows merged into one tree, its nodes in depth-first order.

    Attributes:
        token, depth: [nodes].
        end: [nodes], one past the last descendant: node j is node i itself or an ancestor of it where j <= i < end[j].
        node: [n, D], the node of every token of a row; arbitrary past the row's end.
    """

    token: np.ndarray
    depth: np.ndarray
    end: np.ndarray
    node: np.ndarray


def in_order(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows (int32) in lexicographic order, in which those that begin alike are neighbours: their tokens [n, D], padded
    with -1, and their numbers [n]."""
    order = sorted(range(len(rows)), key=[row.astype(">i4").tobytes() for row in rows].__getitem__)  # as numbers sort
    size = np.array([len(rows[i]) for i in order], dtype=np.int64)
    tokens = np.full((len(rows), max(size, default=1)), -1, dtype=np.int64)
    if rows:
        tokens[np.arange(tokens.shape[1]) < size[:, None]] = np.concatenate([rows[i] for i in order])
    return tokens, np.array(order, dtype=np.int64)


def shared_with_previous(tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
    """[n], how many of the first `length` [n] tokens of every row of `tokens` [n, D] equal those of the row before it;
    0 for the first row. No row may be longer than D - 1."""
    shared = np.zeros(len(tokens), dtype=np.int64)
    common = np.minimum(length[1:], length[:-1])[:, None]
    shared[1:] = ((tokens[1:] != tokens[:-1]) | (np.arange(tokens.shape[1]) >= common)).argmax(axis=1)
    return shared


def merge(tokens: np.ndarray, length: np.ndarray, shared: np.ndarray) -> Tree:
    """The tree of sorted rows: of the first `length` [n] tokens of `tokens` [n, D]; `shared` as above."""
    depth = np.arange(tokens.shape[1])
    made = (depth >= shared[:, None]) & (depth < length[:, None])  # the nodes that a row adds
    before = np.concatenate([[0], np.cumsum(length - shared)])  # how many nodes the rows before it have
    maker = np.maximum.accumulate(np.where(made, np.arange(len(length))[:, None], 0), axis=0)
    # A subtree ends with the nodes made before the first later row that leaves it.
    left_at = np.where(depth >= shared[:, None], before[:-1, None], before[-1])
    end = np.full_like(left_at, before[-1])
    end[:-1] = np.minimum.accumulate(left_at[:0:-1], axis=0)[::-1]
    return Tree(
        token=tokens[made],
        depth=np.broadcast_to(depth, made.shape)[made],
        end=end[made],
        node=before[maker] + depth - shared[maker],
    )


def split(cost: np.ndarray, extra: np.ndarray, parts: int) -> np.ndarray:
    """Cuts rows into `parts` contiguous parts, no more than there are rows, of which the most expensive costs as little
    as possible.

    Args:
        cost: [kinds, n], whole numbers; a part costs the largest of its sums over each kind.
        extra: [kinds, n], what a row costs in addition where it is the first of a part.

    Returns:
        [parts + 1], where each part begins; the last entry is n.
    """
    n = cost.shape[1]
    total = np.cumsum(cost, axis=1)
    before = total - cost - extra  # what to subtract where a part begins at a row

    def cut(most: int) -> list[int] | None:
        """The beginnings of parts that cost `most` or less, or None where there are not enough parts."""
        starts = [0]
        for part in range(1, parts + 1):
            start = starts[-1]
            end = min(
                int(np.searchsorted(row, row_before[start] + most, side="right"))
                for row, row_before in zip(total, before, strict=True)
            )
            starts.append(min(end, n - (parts - part)))  # every later part needs a row
        return starts if starts[-1] == n else None

    low, high = int((cost + extra).max()), int((cost + extra).sum(axis=1).max())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cut(middle) else (middle + 1, high)
    return np.array(cut(low))


# --- A micro-batch ----------------------------------------------------------------------------------------------------


def best_width(hidden_size: int) -> int:
    """About how many nodes a tensor row should have: attention costs a node in proportion to them, the other layers in
    proportion to `hidden_size`, and every tensor row computes again what it shares with the one before it."""
    return round(32 * hidden_size**0.5)


class TreeCollator:
    """Merges a batch of examples into token trees.

    Returns:
        input_ids, position_ids: [R, L], nodes in depth-first order, padded on the right.
        subtree_end: [R, L], for every node one past its last descendant, in its tensor row.
        labels, shift_labels: [N], the response tokens of all rows; the Trainer counts `shift_labels` as they are.
        row: [N], the row of each, numbered in lexicographic order.
        predicting: [P], the nodes that predict any of them, numbered through all tensor rows, in ascending order.
        predicted_by: [N], which of these predicts each of them.

    A batch without examples becomes one node that predicts nothing.

    Args:
        hidden_size: of the model; None puts all nodes into one tensor row, for attention in blocks.
        pad_to_multiple_of: of L. CUDA's kernels copy a mask in every layer where L is not a multiple of 16.

    Attributes:
        parts: how many tensor rows to make, where there are as many rows; None for what suits their number.
    """

    def __init__(self, pad_token_id: int, hidden_size: int | None, pad_to_multiple_of: int = 1):
        self.pad_token_id, self.width = pad_token_id, best_width(hidden_size) if hidden_size else math.inf
        self.multiple = pad_to_multiple_of
        self.parts: int | None = None

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        tokens, order = in_order([np.asarray(example["input_ids"], dtype=np.int32) for example in examples])
        size = (tokens >= 0).sum(axis=1)
        prompt = np.array([examples[i]["prompt_length"] for i in order], dtype=np.int64)
        column = np.arange(tokens.shape[1])

        # One tree a tensor row.
        shared = shared_with_previous(tokens, size - 1)
        starts = self.tensor_rows(size - 1, shared) if examples else np.zeros(1, dtype=np.int64)
        shared[starts[:-1]] = 0
        cuts = [slice(start, end) for start, end in pairwise(starts)]
        trees = [merge(tokens[cut], size[cut] - 1, shared[cut]) for cut in cuts]
        widest = max([len(tree.token) for tree in trees] + [1])
        shape = max(len(trees), 1), math.ceil(widest / self.multiple) * self.multiple
        input_ids = np.full(shape, self.pad_token_id)
        position_ids = np.zeros(shape, dtype=np.int64)
        subtree_end = np.broadcast_to(np.arange(1, shape[1] + 1), shape).copy()  # padding sees itself
        for row, tree in enumerate(trees):
            place = row, slice(len(tree.token))
            input_ids[place], position_ids[place], subtree_end[place] = tree.token, tree.depth, tree.end

        # A row's token at depth d is predicted by its node at depth d - 1.
        predicted = (column >= np.maximum(prompt, 1)[:, None]) & (column < size[:, None])
        nodes = [tree.node + row * shape[1] for row, tree in enumerate(trees)]
        node = np.concatenate(nodes) if nodes else np.zeros(tokens.shape, dtype=np.int64)
        labels = torch.from_numpy(tokens[predicted])
        predicting, predicted_by = np.unique(node[:, :-1][predicted[:, 1:]], return_inverse=True)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "subtree_end": torch.from_numpy(subtree_end),
            "labels": labels,
            "shift_labels": labels,
            "row": torch.from_numpy(predicted.nonzero()[0]),
            "predicting": torch.from_numpy(predicting),
            "predicted_by": torch.from_numpy(predicted_by),
        }

    def tensor_rows(self, length: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """Where the tensor rows of sorted rows begin, as `split` returns it: of about `width` nodes each, or as many
        as the longest row has."""
        nodes, longest = int((length - shared).sum()), int(length.max())
        parts = min(len(length), self.parts or round(nodes / max(self.width, longest, 1)))
        if parts > 1:
            starts = split((length - shared)[None], shared[None], parts)
            # With padding no more than the rows one by one.
            if self.parts or parts * widest(length, shared, starts) <= len(length) * longest:
                return starts
        return np.array([0, len(length)])


def widest(length: np.ndarray, shared: np.ndarray, starts: np.ndarray) -> int:
    """The nodes of the largest tensor row of sorted rows that are cut at `starts`."""
    return int((np.add.reduceat(length - shared, starts[:-1]) + shared[starts[:-1]]).max())


PER_NODE = ("input_ids", "position_ids")


class Shape(NamedTuple):
    """Of a micro-batch: R, L and N."""

    rows: int
    nodes: int
    responses: int


def pad_to(batch: dict[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """A batch of `TreeCollator`, no larger than `shape`, with nodes of padding that nothing sees, and with response
    tokens of padding whose losses `counted` [N] multiplies by 0. Values and gradients are those without padding."""
    rows, nodes = batch["input_ids"].shape
    node, more = batch["predicting"], shape.responses - len(batch["labels"])
    end = torch.arange(1, shape.nodes + 1).repeat(shape.rows, 1)  # padding sees itself
    end[:rows, :nodes] = batch["subtree_end"]

    def padded(name: str, value: int = 0) -> torch.Tensor:
        return F.pad(batch[name], (0, shape.responses - len(batch[name])), value=value)

    extended = {name: F.pad(batch[name], (0, shape.nodes - nodes, 0, shape.rows - rows)) for name in PER_NODE}
    batch = {**batch, "predicting": node // nodes * shape.nodes + node % nodes}
    return {
        **extended,
        "subtree_end": end,
        **{name: padded(name) for name in ("labels", "row", "predicting", "predicted_by")},
        "shift_labels": padded("shift_labels", IGNORE),  # the Trainer does not count these
        "counted": F.pad(torch.ones(shape.responses - more), (0, more)),
    }


# --- Completions ------------------------------------------------------------------------------------------------------


def tree_rows(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    _groups: Sequence[int] | None = None,
) -> Packed:
    """What `packed_rows.shared_rows` returns, for one tree of all prompts and completions: they share the instruction,
    and beams share codes. Takes what that takes, on the CPU."""
    ids = torch.cat([prompt_ids, completion_ids], dim=1).numpy().astype(np.int32)
    present = torch.cat([prompt_mask, completion_mask], dim=1).bool().numpy()
    present[:, prompt_ids.shape[1]] = True  # a completion that does not count still stands after its prompt
    tokens, order = in_order([row[here] for row, here in zip(ids, present, strict=True)])
    inner = (tokens >= 0).sum(axis=1) - 1
    tree = merge(tokens, inner, shared_with_previous(tokens, inner))

    # A completion's token at depth d is predicted by its node at depth d - 1.
    node = np.empty_like(tree.node)
    node[order] = tree.node
    first = present[:, : prompt_ids.shape[1]].sum(axis=1, keepdims=True) - 1
    last = present.sum(axis=1, keepdims=True) - 2
    before = np.take_along_axis(node, np.minimum(first + np.arange(completion_ids.shape[1]), last), axis=1)
    wanted, row = np.unique(before, return_inverse=True)
    batch = {"input_ids": tree.token, "position_ids": tree.depth, "subtree_end": tree.end}
    inputs = model_inputs(model, {name: torch.from_numpy(values[None]) for name, values in batch.items()})
    return inputs, torch.from_numpy(wanted), torch.from_numpy(row.reshape(before.shape))


# --- The model's side -------------------------------------------------------------------------------------------------


def model_inputs(
    model: nn.Module, batch: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """What a model takes for a batch of `TreeCollator`.

    `dtype` is the one that attention computes in, None for the model's.
    """
    end, positions = batch["subtree_end"], batch["position_ids"]
    node = torch.arange(end.shape[1], device=end.device)
    blocks = None
    if len(end) == 1 and attends_in_blocks(model):
        blocks = []
        for start in range(0, end.shape[1], BLOCK):
            queries = node[start : start + BLOCK]
            # What a node of the block sees before the block are ancestors of its first node, too.
            keys = torch.cat([(end[0, :start] > start).nonzero()[:, 0], queries])
            blocks.append((queries, keys, _masks(model, end, queries, keys, positions[:, keys], dtype)))
        masks = torch.empty(1, 1, 0, 0, device=end.device)  # fits nothing: a layer that the blocks do not reach fails
    else:
        masks = _masks(model, end, node, node, positions, dtype)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": masks, "position_ids": positions}
    if blocks:
        inputs["tree_blocks"] = blocks
    return inputs


def _masks(
    model: nn.Module,
    end: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    dtype: torch.dtype | None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask [R, 1, queries, keys] of some nodes, as `attention_masks` returns it. `queries`
    are the last of `keys`, whose positions are [R, keys]."""
    seen_until = end[:, keys].unsqueeze(1)
    visible = (keys <= queries.unsqueeze(1)) & (queries.unsqueeze(1) < seen_until)  # [R, queries, keys]
    return attention_masks(model, visible, positions, dtype)


# --- Attention in blocks ----------------------------------------------------------------------------------------------

BLOCKWISE = "token_trees"  # the name of this attention in transformers
BLOCK = 128  # nodes whose attention is computed together


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tree_blocks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None,
    **settings: object,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention in which nodes meet only those that one of their block sees: a dense mask costs a
    node all nodes of its tensor row, most of which it does not see. Without `tree_blocks` the ordinary one."""
    if tree_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if torch.finfo(dtype).bits == 16 and not settings.get("dropout"):
        scale = settings.get("scaling") or query.shape[-1] ** -0.5
        result = _MatmulAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), scale, tree_blocks)
        return result.transpose(1, 2), None
    results = []
    for queries, keys, mask in tree_blocks:
        of_block = _of_block(query, queries), key.index_select(2, keys), value.index_select(2, keys)
        results.append(sdpa_attention_forward(module, *of_block, mask, **settings)[0])
    return torch.cat(results, dim=1), None


def _of_block(query: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The queries [R, heads, Q, D] of a block, whose nodes are adjacent, in [R, heads, L, D]."""
    return query[:, :, queries[0] : queries[-1] + 1]


class _MatmulAttention(torch.autograd.Function):
    """Attention in blocks by plain float32 matmuls, for query [R, heads, L, D], key and value [R, key heads, L, D] in
    16 bits on a CPU: torch's fused kernel takes longer there, and rounds probabilities and gradients of scores. The
    backward pass recomputes the probabilities, so only the inputs are saved."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, blocks: list[tuple]
    ) -> torch.Tensor:
        ctx.scale, ctx.blocks = scale, blocks
        ctx.save_for_backward(query, key, value)
        rows, heads, nodes, _ = query.shape
        result = query.new_empty(rows, nodes, heads, value.shape[3]).transpose(1, 2)  # models join the heads of a node
        key, value = key.float(), value.float()
        with torch.autocast(query.device.type, enabled=False):
            for queries, keys, mask in blocks:
                of_block, part = _of_block(query, queries), _of_block(result, queries)
                probabilities = _probabilities(of_block.float(), key.index_select(2, keys), mask, scale)
                part.copy_((probabilities @ value.index_select(2, keys)).view(part.shape))
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        dtype, key, value = query.dtype, key.float(), value.float()
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        with torch.autocast(query.device.type, enabled=False):
            for queries, keys, mask in ctx.blocks:
                q, k, v = _of_block(query, queries).float(), key.index_select(2, keys), value.index_select(2, keys)
                probabilities = _probabilities(q, k, mask, ctx.scale)
                of_block = _by_key_head(_of_block(gradient, queries).float(), v)
                grad_value.index_add_(2, keys, probabilities.mT @ of_block)
                grad_scores = torch._softmax_backward_data(of_block @ v.mT, probabilities, -1, torch.float32)
                grad_scores.mul_(ctx.scale)
                _of_block(grad_query, queries).copy_((grad_scores @ k).view(q.shape))
                grad_key.index_add_(2, keys, grad_scores.mT @ _by_key_head(q, k))
        return grad_query, grad_key.to(dtype), grad_value.to(dtype), None, None


def _by_key_head(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[R, key heads, heads / key heads * Q, D]: the query heads that share a key head one after another."""
    return query.reshape(*key.shape[:2], query.shape[1] // key.shape[1] * query.shape[2], query.shape[3])


def _probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """[R, key heads, heads / key heads * Q, K], of float32 query and key and a mask [R, 1, Q, K] that is added to
    scores."""
    scores = (_by_key_head(query, key) * scale) @ key.mT
    scores.unflatten(2, (query.shape[1] // key.shape[1], query.shape[2])).add_(mask.unsqueeze(1))
    return scores.softmax(dim=-1)


AttentionInterface.register(BLOCKWISE, _attention)
AttentionMaskInterface.register(BLOCKWISE, sdpa_mask)


def attend_in_blocks(model: nn.Module) -> bool:
    """Makes token trees in one tensor row attend in blocks, if `model` can, which is tried. Says whether it can; where
    it cannot, nothing changes. For a CPU: on a GPU, many small kernels take longer than one dense mask.

    Args:
        model: a causal LM that follows a tree mask, wrapped by PEFT or not.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.device.type != "cpu" or device.starts_kernels(base.device):
        return False
    if base.config.get_text_config()._attn_implementation != "sdpa":
        return False
    rows = [{"input_ids": [1, *[token] * 15], "prompt_length": 8} for token in range(2, 2 + BLOCK // 8)]
    batch = TreeCollator(0, None)(rows)
    one_mask = torch.ones(1, 1, 1, dtype=torch.bool)
    if isinstance(attention_masks(base, one_mask, batch["position_ids"][:, :1]), dict):
        return False
    training = model.training
    base.set_attn_implementation(BLOCKWISE)
    try:
        with torch.no_grad():
            model.eval()(**model_inputs(base, batch), use_cache=False)
    except Exception:  # whatever an architecture raises for an argument that it does not know, or a mask of no size
        base.set_attn_implementation("sdpa")
        return False
    finally:
        model.train(training)
    return True


def attends_in_blocks(model: nn.Module) -> bool:
    """Whether `attend_in_blocks` has changed it."""
    return model.config.get_text_config()._attn_implementation == BLOCKWISE


# --- The loss ---------------------------------------------------------------------------------------------------------


def edge_losses(logits: torch.Tensor, predicted_by: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy (nats, float32) of every label [N] under the row `predicted_by` [N] of logits [P, V].

    A label that several rows share stands there several times: its edge has that weight. In memory it keeps the logits
    and nothing else of their size: the backward pass overwrites them with their gradient, a few rows at a time, which
    a CPU's cache holds.
    """
    return _EdgeLosses.apply(logits, predicted_by, labels)


class _EdgeLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: torch.Tensor, predicted_by: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        total = torch.empty(len(logits), device=logits.device)  # log-sum-exp; torch's own takes ten times as long
        for block in _blocks(logits):
            scores = logits[block].float()
            total[block] = scores.amax(dim=1) - scores.log_softmax(dim=1).amax(dim=1)
        ctx.save_for_backward(logits, total, predicted_by, labels)
        return total[predicted_by] - logits[predicted_by, labels].float()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, total, predicted_by, labels = ctx.saved_tensors
        weight = torch.zeros_like(total).index_add_(0, predicted_by, gradient)
        # At the labels, in float32: a probability near 1 less what all equal edges want, which may be nearly as much.
        same = (predicted_by.unsqueeze(1) == predicted_by) & (labels.unsqueeze(1) == labels)
        probability = (logits[predicted_by, labels].float() - total[predicted_by]).exp_()
        at_labels = probability * weight[predicted_by] - same.to(gradient.dtype) @ gradient
        for block in _blocks(logits):
            result = logits[block].float()  # float32 logits themselves
            result.sub_(total[block, None]).exp_().mul_(weight[block, None])
            if result.dtype != logits.dtype:
                logits[block] = result
        logits[predicted_by, labels] = at_labels.to(logits.dtype)
        return logits, None, None


def _blocks(logits: torch.Tensor) -> list[slice]:
    """The rows of logits [P, V] to compute at a time: what each core's cache holds, or on a GPU 32 MB."""
    values, cores = (2**23, 1) if logits.is_cuda else (2**19, torch.get_num_threads())
    rows = max(values // logits.shape[1], 1) * cores
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
