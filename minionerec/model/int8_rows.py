"""The embedding and the output head of a quantized base, in 8 bits.

bitsandbytes leaves both in 16 bits: 2.2 GB of a 7B model, whose other weights take 3.4 GB in 4 bits. Here a row [H] is
H int8 codes and a float32 scale, its largest absolute value / 127, together H + 4 bytes. Each value is off by half a
scale at most. Tied matrices stay one. An embedding that is not tied stays on the CPU, which looks up the rows of a
batch and sends them to the GPU. The trained SID rows on top are exact (`minionerec.model.sid_rows`).

Dimensions: `N` positions, `H` hidden, `V` vocabulary.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel

from minionerec.model import architecture, device

SCALE = 4  # bytes of a row's scale
# Values that are materialized at a time. On a CPU they fit its cache, on a GPU few kernels are launched.
CHUNK, CHUNK_ON_GPU = 2**20, 2**24


class Rows:
    """What a layer here has as its `weight`: shape, type and device of the matrix, and its rows when they are asked
    for. PEFT initializes trained rows from them."""

    requires_grad = False

    def __init__(self, layer: "Int8Layer"):
        self.layer = layer

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.layer.packed.shape[0], self.layer.width))

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.packed.device if isinstance(self.layer.packed, nn.Parameter) else self.layer.used_on

    def __getitem__(self, ids: torch.Tensor | slice) -> torch.Tensor:
        return unpack(_bytes(self.layer.packed)[ids], self.dtype).to(self.device)


class Int8Layer(nn.Module):
    """What both layers share.

    Attributes:
        packed: int8 [V, H + 4]; if FSDP or ZeRO-3 shards it, the same bytes as 16-bit values, since they shard only
            tensors of a floating dtype. An embedding that stays on the CPU has it as a plain tensor: engines want all
            parameters on one device.
        dtype: of the rows.
        used_on: the device that the model was loaded to.
        rows: what stands for the weight, one object for tied matrices.
    """

    packed: torch.Tensor
    dtype: torch.dtype
    used_on: torch.device
    rows: Rows

    @property
    def width(self) -> int:
        """H."""
        return self.packed.shape[1] * self.packed.element_size() - SCALE

    @property
    def weight(self) -> Rows:
        return self.rows


class Int8Embedding(Int8Layer, nn.Embedding):
    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The rows [..., H] of token ids [...]."""
        packed = self.packed[token_ids.to(self.packed.device)].to(token_ids.device)
        return unpack(_bytes(packed), self.dtype)


class Int8Head(Int8Layer, nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., H], in float32 under any autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = _Int8Linear.apply(hidden, self.packed)
            return logits if self.bias is None else logits + self.bias.float()


class _Int8Linear(torch.autograd.Function):
    """hidden [..., H] times the rows of packed [V, H + 4], in float32. No matrix of more than a chunk of the rows is
    made, in either pass, and only `hidden` has a gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.dtype = hidden.dtype
        rows, flat = _bytes(packed), hidden.flatten(0, -2)
        # Codes are exact in 16 bits, and tensor cores accumulate in float32.
        on_tensor_cores = flat.is_cuda and flat.dtype != torch.float32
        flat = flat if on_tensor_cores else flat.float()
        result = flat.new_empty(len(flat), len(rows), dtype=torch.float32)
        for part in _chunks(rows):
            codes, scales = _split(rows[part])
            if on_tensor_cores:
                result[:, part] = torch.mm(flat, codes.to(flat.dtype).T, out_dtype=torch.float32)
            else:
                result[:, part] = flat @ codes.float().T
            result[:, part] *= scales.T
        return result.view(*hidden.shape[:-1], len(rows))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        (packed,) = ctx.saved_tensors
        rows, flat = _bytes(packed), gradient.flatten(0, -2).float()
        result = flat.new_zeros(len(flat), rows.shape[1] - SCALE)
        # The gradient of a bfloat16 head, too, is rounded to bfloat16. float16 has no range for a gradient x scale.
        dtype = torch.bfloat16 if ctx.dtype == torch.bfloat16 else torch.float32
        with torch.autocast(flat.device.type, enabled=False):
            for part in _chunks(rows):
                codes, scales = _split(rows[part])
                scaled = flat[:, part] * scales.T
                result += scaled.to(dtype) @ codes.to(dtype)
        return result.to(ctx.dtype).view(*gradient.shape[:-1], result.shape[1]), None


# --- The stored bytes -------------------------------------------------------------------------------------------------


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The bytes [V, H + 4] (int8) of a matrix [V, H]."""
    packed = torch.empty(len(weight), weight.shape[1] + SCALE, dtype=torch.int8, device=weight.device)
    for part in _chunks(weight):
        values = weight[part].float()
        scale = (values.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        packed[part, :-SCALE] = (values / scale).round().to(torch.int8)
        packed[part, -SCALE:] = scale.view(torch.int8)
    return packed


def unpack(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values [..., H] of bytes [..., H + 4]."""
    codes, scales = _split(rows)
    return (codes * scales).to(dtype)


def _split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., H] (int8) and scales [..., 1] (float32) of rows of bytes."""
    scales = rows[..., -SCALE:].clone(memory_format=torch.contiguous_format)  # at an address that float32 takes
    return rows[..., :-SCALE], scales.view(torch.float32)


def _chunks(rows: torch.Tensor) -> Iterator[slice]:
    step = max((CHUNK_ON_GPU if rows.is_cuda else CHUNK) // rows.shape[1], 1)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _bytes(packed: torch.Tensor) -> torch.Tensor:
    return packed.detach().view(torch.int8)


# --- In a model -------------------------------------------------------------------------------------------------------


def quantize_embeddings(model: PreTrainedModel, used_on: torch.device) -> None:
    """Stores the embedding and the output head of a frozen model in 8 bits, in place: packed where they are, then moved
    to `used_on`. If other code reads one of them by its `weight`, both stay as they are, and are only moved."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    sharing = {
        end: [m for m in model.modules() if m._parameters.get("weight") is end.weight] for end in (embedding, head)
    }
    fit = all(module in sharing and _fits(model, module) for modules in sharing.values() for module in modules)
    if not fit:
        embedding.to(used_on)
        head.to(used_on)
    elif head.weight is embedding.weight:
        _store(sharing[head], used_on, used_on)
        for module in model.modules():  # PEFT finds by the names of parameters what is tied
            tied = getattr(module, "_tied_weights_keys", None)
            if isinstance(tied, dict):
                module.__dict__["_tied_weights_keys"] = {
                    _renamed(module, k): _renamed(module, v) for k, v in tied.items()
                }
    else:
        looked_up_on = embedding.weight.device if embedding.weight.is_meta else torch.device("cpu")
        _store([embedding], used_on, looked_up_on)
        _store([head], used_on, used_on)


def _renamed(model: nn.Module, name: str) -> str:
    """The name of a weight after it was packed."""
    owner, _, leaf = name.rpartition(".")
    packed = any(isinstance(module, Int8Layer) for found, module in model.named_modules() if found == owner)
    return f"{owner}.packed" if packed and leaf == "weight" else name


def _fits(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module is an embedding or linear layer whose weight only its own forward pass reads."""
    kind: type = type(module)
    name = next(name for name, found in model.named_modules() if found is module)
    owner, _, leaf = name.rpartition(".")
    # Gemma's embedding is of a class of its own, which scales what it looks up.
    own = isinstance(module, nn.Embedding) and not architecture.reads(kind, "weight")
    even = module.weight.shape[1] % 2 == 0  # `_store` may show two bytes as one value
    return (
        even
        and (kind in (nn.Linear, nn.Embedding) or own)
        and not architecture.reads(type(model.get_submodule(owner)), f"{leaf}.weight")
    )


def _store(layers: list[nn.Module], used_on: torch.device, stored_on: torch.device) -> None:
    """Turns layers with one common weight into layers with one common packed matrix, in place."""
    weight = layers[0].weight
    packed = pack(weight.detach()).to(stored_on)
    if device.weights_are_sharded():
        packed = packed.view(torch.bfloat16 if weight.dtype == torch.float32 else weight.dtype)
    if stored_on == used_on:
        packed = nn.Parameter(packed, requires_grad=False)
    rows = None
    for layer in layers:
        del layer._parameters["weight"]
        kind: type = type(layer)
        layer.__class__ = Int8Head if isinstance(layer, nn.Linear) else _int8_embedding(kind)
        layer.packed = packed
        layer.dtype, layer.used_on = weight.dtype, used_on
        layer.rows = rows = rows or Rows(layer)
        layer.to(used_on)  # a bias


@cache
def _int8_embedding(kind: type) -> type:
    return Int8Embedding if kind is nn.Embedding else type(kind.__name__, (kind, Int8Embedding), {})


def int8_layers(model: nn.Module) -> list[Int8Layer]:
    return [module for module in model.modules() if isinstance(module, Int8Layer)]


def grow(model: PreTrainedModel, count: int) -> None:
    """Gives the embedding and the output head in 8 bits `count` rows, in place. As in `resize_token_embeddings`, new
    ones are random."""
    grown: dict[int, torch.Tensor] = {}
    for layer in int8_layers(model):
        packed, old = layer.packed, len(layer.packed)
        if id(packed) not in grown:
            std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
            new = pack(torch.empty(count - old, layer.width).normal_(0, std)).to(packed.device)
            rows = torch.cat([_bytes(packed), new]).view(packed.dtype)
            grown[id(packed)] = nn.Parameter(rows, requires_grad=False) if isinstance(packed, nn.Parameter) else rows
        layer.packed = grown[id(packed)]
        if isinstance(layer, nn.Embedding):
            layer.num_embeddings = count
            continue
        layer.out_features = count
        if layer.bias is not None:
            bias = torch.cat([layer.bias.detach(), layer.bias.new_zeros(count - old)])
            layer.bias = nn.Parameter(bias, requires_grad=False)
    model.config.get_text_config().vocab_size = model.vocab_size = count


def set_rows(layer: Int8Layer, ids: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrites the rows `ids` [N] of a layer by values [N, H], in place."""
    stored = _bytes(layer.packed)
    stored[ids.to(stored.device)] = pack(values).to(stored.device)


def dequantize_embeddings(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns the layers in 8 bits into plain ones, in place, with the values that their bytes stand for."""
    weights: dict[int, nn.Parameter] = {}
    for module in model.modules():
        module.__dict__.pop("_tied_weights_keys", None)
    for layer in int8_layers(model):
        key = id(layer.packed)
        if key not in weights:
            weights[key] = nn.Parameter(unpack(_bytes(layer.packed), dtype).to(layer.used_on), requires_grad=False)
        for name in ("packed", "dtype", "used_on", "rows"):
            delattr(layer, name)
        kind: type = type(layer)
        plain: type = nn.Linear if kind is Int8Head else nn.Embedding if kind is Int8Embedding else kind.__mro__[1]
        layer.__class__ = plain
        layer.register_parameter("weight", weights[key])
