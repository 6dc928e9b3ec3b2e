"""Counts kernels and host reads of training and search, on a CPU with the paths that a GPU takes: what
`benchmarks/launches.py` prints."""

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from statistics import median
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from benchmarks import rl_step
from benchmarks.fixtures import save_base
from minionerec.dryrun import passes
from minionerec.flags import AdapterFlags
from minionerec.model import fewer_kernels, graphs
from minionerec.model.graphs import READS, indexes_by_mask

PROMPTS, GENERATIONS, PROMPT_TOKENS = 10, 16, 24  # of an RL step
REQUESTS, BEAMS = 8, 20  # of a search
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}

NO_KERNEL = set(passes.NO_KERNEL)
READ_BY_PYTHON = {"tolist", "numpy", "cpu"}  # of a tensor that would be on the device


class Launches(TorchDispatchMode):
    """While open, counts by phase; `within` sets the phase of the calls of a function."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.read_at: Counter[tuple[str, str]] = Counter()
        self.operators: Counter[tuple[str, str]] = Counter()
        self.phase = "other"
        self.counts = True
        self._seeds: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not self.counts:
            return result
        if name in ("randint", "random_") and not result.dim():  # the seed of a mask, which the CPU makes
            self._seeds.add(result.data_ptr())
        elif name == "_local_scalar_dense" and args[0].data_ptr() in self._seeds:
            self._seeds.clear()
        elif name in NO_KERNEL | {"_local_scalar_dense"}:
            self._read(name in READS, name)
        else:
            self.kernels[self.phase] += 1
            self.operators[self.phase, name] += 1
            shaped_by_values = name in READS and not (kwargs or {}).get("output_size")
            self._read(shaped_by_values or indexes_by_mask(name, args), name)
        return result

    def _read(self, found: bool, name: str) -> None:
        place = _place() if found else ""
        if place and self.counts:
            self.reads[self.phase] += 1
            self.read_at[name, place] += 1

    def within(self, phase: str | Callable[[], str], function: Callable) -> Callable:
        """`function`, whose calls count for `phase`."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase() if callable(phase) else phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return inner


class ReadsByPython(TorchFunctionMode):
    """While open, adds the reads that no operator shows on a CPU."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        self.launches._read(name in READ_BY_PYTHON and isinstance(args[0], torch.Tensor), name)
        return function(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of Python outside torch that is running; empty where the Trainer logs what the host has."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in name and not name.endswith("counting.py"):
            logs = frame.f_code.co_name == "_maybe_log_save_evaluate" and name.endswith("transformers/trainer.py")
            if logs:  # what `DurableRun` has read already
                return ""
            return f"{os.sep.join(name.split(os.sep)[-2:])}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "backward"


class Tape(TorchDispatchMode):
    """A recording on a CPU, with the rules of CUDA graphs: every operator on the tensors that it had, results in their
    places, numbers of the host as they were, and no read by the host. A replay counts as one kernel."""

    launches: Launches | None = None  # that count now

    def __init__(self, _pool: Any = None) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        if name in READS or indexes_by_mask(name, args):
            raise RuntimeError(f"{name}: the host reads a value")
        result = function(*args, **(kwargs or {}))
        views = any(of.alias_info is not None and not of.alias_info.is_write for of in function._schema.returns)
        if not views and name not in NO_KERNEL:
            self.calls.append((function, args, kwargs or {}, result))
        return result

    def record(self) -> "Tape":
        return self

    @torch.no_grad()
    def replay(self) -> None:
        counts = Tape.launches
        if counts is not None and counts.counts:
            counts.kernels[counts.phase] += 1
            counts.operators[counts.phase, "a recording"] += 1
        with mock.patch.object(counts, "counts", False) if counts is not None else nullcontext():
            for function, args, kwargs, result in self.calls:
                for place, value in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(place, torch.Tensor) and place is not value:
                        place.copy_(value)


NORM_BACKWARD = fewer_kernels.norm_backward


def one_kernel(name: str, function: Callable, inplace: bool = False) -> Callable:
    """`function` as an operator that counts as one kernel, as on a GPU; on a CPU it is several."""
    mutated = ("total",) if inplace else ()
    return torch.library.custom_op(f"launches::{name}", function, mutates_args=mutated)


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (left.float() @ right.float()).to(dtype)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    total.add_(left.float() @ right.float())


def _copy_where_dequantized(total: torch.Tensor, values: torch.Tensor) -> None:
    total.copy_(values)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    result, root = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
    return result, root.clone()


def _norm_of_x(
    gradient: torch.Tensor, x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    of_x, of_weight = NORM_BACKWARD(gradient, x, root, weight, wanted)
    return of_x, of_weight


ONE_KERNEL = {
    "product": one_kernel("product", _product),
    "add_product": one_kernel("add_product", _add_product, inplace=True),
    "into": one_kernel("into", _copy_where_dequantized, inplace=True),
    "norm_forward": one_kernel("norm_forward", _norm),
    "norm_backward": one_kernel("norm_backward", _norm_of_x),
}
NO_KERNEL |= {"into"}  # a GPU dequantizes there at once


def _dequantize_into(out: torch.Tensor, weight: Any) -> None:
    import bitsandbytes

    ONE_KERNEL["into"](out, bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """While open, the product takes the paths of a GPU on the CPU, with tapes for CUDA graphs."""
    from torch.utils import _foreach_utils

    from minionerec.decoding import beams
    from minionerec.model import device, groups, head, int8_rows

    supported = _foreach_utils._get_foreach_kernels_supported_devices
    patches = [
        mock.patch.dict(graphs.RECORDINGS, cpu=Tape),
        mock.patch.object(device, "compute_dtype", lambda quantized=False: torch.bfloat16),
        mock.patch.object(device, "starts_kernels", lambda where: where.type != "meta"),
        mock.patch.object(beams, "_shared_beginning", lambda *_: 0),
        mock.patch.object(groups, "product", ONE_KERNEL["product"]),
        mock.patch.object(groups, "add_product", ONE_KERNEL["add_product"]),
        mock.patch.object(groups, "dequantize_into", _dequantize_into),
        mock.patch.object(fewer_kernels, "norm_forward", ONE_KERNEL["norm_forward"]),
        mock.patch.object(fewer_kernels, "norm_backward", ONE_KERNEL["norm_backward"]),
        mock.patch.object(head, "CHUNK", 2**30),
        mock.patch.object(int8_rows, "CHUNK", int8_rows.CHUNK_ON_GPU),
        mock.patch.object(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: [*supported(), "cpu"]),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


@contextmanager
def counting() -> Iterator[Launches]:
    launches = Launches()
    with ReadsByPython(launches), launches, mock.patch.object(Tape, "launches", launches):
        yield launches


def run_settings(folder: str, **more: Any) -> dict[str, Any]:
    """Arguments of a Trainer as the commands give them."""
    from minionerec.training.arguments import shared_arguments

    shared = shared_arguments(_flags(folder))
    return {**shared, "bf16": True, "report_to": "none", "disable_tqdm": True, "use_cpu": True, **more}


def _flags(folder: str) -> Any:
    from minionerec.flags import TrainingFlags

    return TrainingFlags(output_dir=folder)


# --- SFT --------------------------------------------------------------------------------------------------------------


def history_rows(users: int, items: list[list[int]]) -> list[dict[str, Any]]:
    """Rows as SFT has them: an instruction, a history that grows by one item from row to row, and the next item."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(users):
        bought = torch.randint(len(items), (7,), generator=generator).tolist()
        for end in range(2, 6):
            prompt = [*range(2, 14), *(token for item in bought[:end] for token in items[item]), 14]
            ids = [*prompt, *items[bought[end]], 1]
            rows.append({"input_ids": ids, "prompt_length": len(prompt), "length": len(ids)})
    return rows


def count_sft(method: str, layers: int, users: int = 80, recorded: bool = False) -> dict[str, Any]:
    """SFT of `method` (full, lora or qlora) on token trees: kernels a layer and reads of a micro-batch, reads of the
    rest of a step and of a checkpoint, micro-batches and their distinct shapes. Four rows of each of `users`. Passes
    are `recorded`, or not."""
    from accelerate import PartialState
    from transformers import PrinterCallback, TrainingArguments

    import lora_utils
    from minionerec.model import loading
    from minionerec.model.device import master_dtype
    from minionerec.training.sft_trainer import SFTTrainer, plan_trees

    folder = tempfile.mkdtemp()
    save_base(folder, {**SHAPE, "num_hidden_layers": layers, "vocab_size": 1024}, dtype="bfloat16")
    tokenizer = loading.load_tokenizer(folder)
    flags = AdapterFlags(use_lora=method == "lora", use_qlora=method == "qlora")
    dtype = master_dtype() if method == "full" else None
    model = loading.load_base(folder, lora_utils.quantization_config(flags), dtype=dtype)
    ids = loading.add_sid_tokens(model, tokenizer, [f"<a_{i}>" for i in range(56)])
    if flags.adapted:
        model = lora_utils.add_lora(model, lora_utils.lora_config(model, ids, flags))
    items = torch.tensor(ids)[torch.randint(len(ids), (100, 3), generator=torch.Generator().manual_seed(1))].tolist()
    rows, step_rows = Dataset.from_list(history_rows(users, items)), 32
    trees = plan_trees(model, rows, rows, 1, step_rows, 8, 1, 0, PartialState(cpu=True))
    assert trees
    graphs.record(model, recorded)
    settings = {"gradient_accumulation_steps": trees.accumulation, "num_train_epochs": 1, "save_steps": 0.5}
    trainer = SFTTrainer(
        model=model,
        run={},
        train_batches=trees,
        processing_class=tokenizer,
        data_collator=mock.Mock(pad_token_id=0),
        train_dataset=rows,
        eval_dataset=rows,
        args=TrainingArguments(**run_settings(folder, **settings), per_device_train_batch_size=8),
    )
    trainer.remove_callback(PrinterCallback)
    with counting() as launches:
        trainer.training_step = launches.within("micro-batch", trainer.training_step)  # type: ignore[method-assign]
        trainer._check_losses = launches.within("other", trainer._check_losses)  # type: ignore[method-assign]
        trainer._save_checkpoint = launches.within("checkpoint", trainer._save_checkpoint)  # type: ignore[method-assign]
        micro_batches, shapes = [], set()
        losses = trainer._losses

        def watched(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
            micro_batches.append(launches.kernels["micro-batch"])
            shapes.add((*inputs["input_ids"].shape, *inputs["labels"].shape))
            return losses(model, inputs)

        trainer._losses = watched  # type: ignore[method-assign]
        run_epoch = trainer._run_epoch

        def watched_epoch(*args: Any, **kwargs: Any) -> None:
            launches.kernels.clear(), launches.reads.clear()
            run_epoch(*args, **kwargs)
            launches.phase = "after"

        trainer._run_epoch = watched_epoch  # type: ignore[method-assign]
        trainer.train()
    steps, count = trainer.state.global_step, len(micro_batches)
    kernels = median(after - before for before, after in pairwise(micro_batches))
    return {
        "way": f"SFT, {method}{', recorded' if recorded else ''}",
        "kernels a layer": kernels / layers,
        "reads of a micro-batch": launches.reads["micro-batch"] / count,
        "reads of a step": launches.reads["other"] / steps,
        "reads of a checkpoint": launches.reads["checkpoint"] / 2,
        "micro-batches a step": count / steps,
        "micro-batches": count,
        "shapes": len(shapes),
        "read_at": launches.read_at,
        "operators": launches.operators,
    }


# --- RL ---------------------------------------------------------------------------------------------------------------


def count_rl(layers: int, recorded: bool = False) -> dict[str, Any]:
    """An optimizer step of RL with a new LoRA adapter, in one pass: kernels and reads by phase."""
    from transformers import PrinterCallback

    shape = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 2048}
    parts = rl_step.setting(shape, 400, PROMPTS, PROMPT_TOKENS, 0)
    args = run_settings(tempfile.mkdtemp(), save_strategy="no", max_steps=4)
    trainer = rl_step.our_trainer(parts, GENERATIONS, recorded, times=3, **args)
    with counting() as launches:

        class Steps(TrainerCallback):
            """Counts the third step alone, when everything that is made once has been made."""

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                launches.counts = state.global_step == 2
                if state.global_step != 2:
                    return
                for counts in (launches.kernels, launches.reads, launches.read_at, launches.operators):
                    counts.clear()

        trainer.add_callback(Steps())
        trainer.remove_callback(PrinterCallback)
        within = launches.within
        trainer.__dict__.update(
            complete=within("generation", trainer.complete),
            _score=within("host", trainer._score),
            create_optimizer=_counted_optimizer(trainer, within),
        )
        trainer.loss.logps = within(lambda: "policy" if torch.is_grad_enabled() else "reference", trainer.loss.logps)
        backward = trainer.accelerator.backward
        trainer.accelerator.backward = within("backward", backward)
        trainer.train()
    phases = ("generation", "reference", "policy", "backward", "update", "other")
    return {
        "way": f"RL{', recorded' if recorded else ''}",
        **{phase: launches.kernels[phase] for phase in phases},
        "kernels": sum(launches.kernels[phase] for phase in phases),
        "reads": sum(launches.reads[phase] for phase in phases),
        "read_at": launches.read_at,
        "operators": launches.operators,
    }


def _counted_optimizer(trainer: Any, within: Callable) -> Callable:
    create = trainer.create_optimizer

    def made(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        optimizer.step = within("update", optimizer.step)
        return optimizer

    return made


# --- Decoding ---------------------------------------------------------------------------------------------------------


def count_decoding(layers: int, merged: bool, recorded: bool = False) -> dict[str, Any]:
    """Constrained beam search: kernels inside the model for a layer and pass, outside it for a level, and reads."""
    import lora_utils
    from minionerec.decoding.beam_search import constrained_beam_search
    from minionerec.decoding.trie import Trie
    from minionerec.model.fewer_kernels import use_fewer_kernels
    from minionerec.model.groups import join_frozen_layers

    shape = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 2048}
    tokenizer, model, adapter, _, sequences, prompts, _ = rl_step.setting(shape, 400, REQUESTS, PROMPT_TOKENS, 0)
    use_fewer_kernels(model)
    trie, model = Trie(sequences, tokenizer.eos_token_id), lora_utils.add_lora(model, adapter).eval()
    if merged:
        model = model.merge_and_unload()
        join_frozen_layers(model)
    graphs.record(model, recorded)
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)
    for _ in range(2 if recorded else 1):
        constrained_beam_search(model, ids, mask, trie, BEAMS)
    with counting() as launches, mock.patch.object(model, "forward", launches.within("model", model.forward)):
        constrained_beam_search(model, ids, mask, trie, BEAMS)
    return {
        "way": f"search, {'merged' if merged else 'adapter'}{', recorded' if recorded else ''}",
        "a layer and pass": launches.kernels["model"] / layers / trie.depth,
        "outside the model, a level": launches.kernels["other"] / trie.depth,
        "reads": sum(launches.reads.values()),
        "read_at": launches.read_at,
        "operators": launches.operators,
    }
