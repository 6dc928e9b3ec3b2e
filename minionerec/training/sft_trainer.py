"""The SFT trainer: a Hugging Face `Trainer` whose loss runs the output head on response positions only. If the model
allows it, the common beginnings of rows are computed once.

Dimensions: `B` rows, `L` tokens, `N` response tokens in the batch, `H` hidden, `V` vocabulary.
"""

import copy
import math
from collections.abc import Callable, Sequence

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import AutocastKwargs
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerControl

from minionerec.data.examples import IGNORE, Collator
from minionerec.decoding.probe import probe
from minionerec.errors import InputError
from minionerec.model import device, graphs
from minionerec.model.device import compute_dtype
from minionerec.model.halving import Halving
from minionerec.model.head import head_on
from minionerec.model.token_trees import TreeCollator, attend_in_blocks, best_width, edge_losses, model_inputs, pad_to
from minionerec.training.durable import DurableRun
from minionerec.training.retrying import EXAMPLES, RetriesMicroBatches, keeping_examples
from minionerec.training.row_batches import RowBatches, StepSampler
from minionerec.training.sid_learning_rate import give_rate
from minionerec.training.tree_batches import GroupSampler, Prefixes, Size, TreeBatches, evaluation_batches


def response_logits(
    model: nn.Module, inputs: dict[str, torch.Tensor], unwrapped: nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] that predict the response tokens of a batch, and those tokens [N].

    No token sees the tokens after it, and the padding comes last. So attention needs no padding mask and can use the
    kernels that support only the causal mask.

    Args:
        model: a causal LM, wrapped for distributed training or not.
        inputs: input_ids, labels [B, L], padded on the right; with what `with_positions` adds, no value of them is
            read, for which the host would wait for a GPU.
        unwrapped: the model inside the wrappers, where there are any.
    """
    if "positions" not in inputs:
        inputs = with_positions(inputs)
    with head_on(unwrapped if unwrapped is not None else model, inputs["positions"]):
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
    return logits, inputs["targets"]


def with_positions(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of rows with, for every response token, its id (`targets`), its row (`row`) and the position that
    predicts it, counted through the flattened rows (`positions`): [N] each."""
    labels = inputs["labels"]
    row, before = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # position t predicts token t + 1
    positions = row * labels.shape[1] + before
    return {**inputs, "positions": positions, "row": row, "targets": labels[row, before + 1]}


def row_losses(
    model: nn.Module, inputs: dict[str, torch.Tensor], unwrapped: nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy (nats) of every response token of a batch, as for `response_logits`, and its row: [N] each."""
    if "positions" not in inputs:
        inputs = with_positions(inputs)
    logits, targets = response_logits(model, inputs, unwrapped)
    return F.cross_entropy(logits.float(), targets, reduction="none"), inputs["row"]


def tree_losses(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    unwrapped: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a batch of `TreeCollator`. `dtype`: what attention computes in, None for the model's own dtype."""
    unwrapped = unwrapped if unwrapped is not None else model
    tree = model_inputs(unwrapped, inputs, dtype)
    with head_on(unwrapped, inputs["predicting"]):
        logits = model(**tree, use_cache=False).logits
    losses = edge_losses(logits, inputs["predicted_by"], inputs["labels"])
    return losses * inputs["counted"] if "counted" in inputs else losses, inputs["row"]


def recorded_tree_losses(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    unwrapped: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `tree_losses`; of a batch that `pad_to` has padded recorded or replayed, where passes of the model are."""
    unwrapped = unwrapped if unwrapped is not None else model
    recorded = graphs.of(unwrapped) if "counted" in inputs else None
    if recorded is None:
        return tree_losses(model, inputs, unwrapped, dtype)
    names = tuple(inputs)

    def losses_of(*tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (tree_losses(model, dict(zip(names, tensors, strict=True)), unwrapped, dtype)[0],)

    return recorded(("trees", *names), losses_of, *inputs.values())[0], inputs["row"]


def tree_collator(model: nn.Module, pad_token_id: int, where: torch.device) -> TreeCollator:
    """The collator of token trees for `model`, which attends in blocks if it can."""
    hidden_size = None if attend_in_blocks(model) else model.config.get_text_config().hidden_size
    return TreeCollator(pad_token_id, hidden_size, 16 if device.starts_kernels(where) else 1)


def in_few_shapes(
    model: nn.Module, collate: TreeCollator, trees: TreeBatches, say: Callable[[str], None]
) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """The collator of the micro-batches of `trees`, which pads them to few shapes as long as passes of the model are
    recorded: each recording is for one shape."""
    recorded = graphs.of(model)
    if recorded is None or not recorded.possible():
        return collate
    collate = copy.copy(collate)  # evaluations are not padded
    shapes, more = trees.few_shapes(collate)
    say(f"micro-batches are padded to {len(shapes)} shapes, by {more:.0%}, and recorded as CUDA graphs")

    def padded(examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        rows, nodes = batch["input_ids"].shape
        size = rows, nodes, len(batch["labels"])
        fitting = (shape for shape in shapes if all(a >= b for a, b in zip(shape, size, strict=True)))
        shape = next(fitting, None) if graphs.of(model) else None
        return batch if shape is None else pad_to(batch, shape)

    return padded


def step_order(prefixes: Prefixes, pack_rows: int, batch_size: int, seed: int) -> Sampler:
    """The order of the rows of token trees: at most `pack_rows` rows that share much, such as a user's, are in the same
    optimizer step; with 1 the steps are those of `StepSampler`."""
    if pack_rows == 1:
        return StepSampler(prefixes.length, batch_size, seed)
    return GroupSampler(prefixes.groups(batch_size, pack_rows), seed)


def plan_trees(
    model: nn.Module,
    train_dataset: datasets.Dataset,
    eval_dataset: datasets.Dataset,
    pack_rows: int,
    batch_size: int,
    micro_batch_size: int,
    num_epochs: int,
    seed: int,
    state: PartialState,
) -> TreeBatches | None:
    """The micro-batches of a training on token trees; None if `pack_rows` is 0, or if the probe finds that the model
    does not follow a tree mask. Prints which way the run takes. Every process must call it.

    Arguments are as in `sft.train`. Raises what `probe` does.
    """
    if not pack_rows:
        state.print("token trees: off; every row is computed by itself")
        return None
    longest = max(max(dataset["length"][:]) for dataset in (train_dataset, eval_dataset))
    width = 2 * max(best_width(model.config.get_text_config().hidden_size), longest)
    # A window counts positions; whether it does is tried in rows as long as there may be.
    support = probe(model, longest, max(min(width, micro_batch_size * longest), longest + 2))
    if not support.shared:
        why = support.why or "rows that share a beginning get other scores"
        state.print(f"token trees: off; every row is computed by itself, since {why}")
        return None
    prefixes = Prefixes(train_dataset)
    order = step_order(prefixes, pack_rows, batch_size, seed)
    sizes = num_epochs, micro_batch_size, batch_size
    batches = TreeBatches(prefixes, order, *sizes, state.num_processes, state.process_index)
    state.print(batches.summary())
    return batches


def fits(
    model: nn.Module, dataset: datasets.Dataset, trees: TreeBatches | None, micro_batch_size: int, pad_token_id: int
) -> bool:
    """Whether the micro-batch that needs the most memory can be computed, both passes. Leaves no gradient, and the
    random state as it was. Arguments are as in `plan_trees`, and what that returned."""
    longest = np.argsort(-np.array(dataset["length"][:]), kind="stable")[:micro_batch_size]
    examples = dataset.__getitems__((longest if trees is None else trees.survey()[2]).tolist())
    if trees is None:
        batch = with_positions(Collator(pad_token_id)(examples))
    else:
        batch = tree_collator(model, pad_token_id, model.device)(examples)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    dtype, kind, training = compute_dtype(), model.device.type, model.training
    try:
        with torch.random.fork_rng([model.device] if kind == "cuda" else []):
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                losses, _ = (row_losses if trees is None else tree_losses)(model.train(), batch)
            losses.sum().backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        model.train(training)
    return True


class SFTTrainer(DurableRun, RetriesMicroBatches, Trainer):
    """Supervised fine-tuning on prompts and responses.

    The loss of an optimizer step is the mean cross-entropy over its response tokens, however they are spread over
    micro-batches and processes.

    With `train_batches` the rows of every micro-batch, also of evaluations, are merged into token trees. The arguments
    must then have `gradient_accumulation_steps=train_batches.accumulation`. The parameters `sid_weights` train at
    `sid_learning_rate`, if that is not 0. When memory runs out, micro-batches and batches of evaluations are split, in
    several processes only with `goes_back`.
    """

    data_collator: Callable
    control: TrainerControl

    def __init__(
        self,
        *args: object,
        run: dict,
        data_collator: Collator,
        train_batches: TreeBatches | None = None,
        sid_weights: Sequence[nn.Parameter] = (),
        sid_learning_rate: float = 0.0,
        goes_back: bool = False,
        **kwargs: object,
    ):
        super().__init__(*args, data_collator=data_collator, **kwargs)
        self.goes_back, self.eval_halving = goes_back, Halving("batches of an evaluation")
        self.run, self.train_batches = run, train_batches
        self.sid_weights, self.sid_learning_rate = sid_weights, sid_learning_rate
        if train_batches is not None:
            self.collate = tree_collator(self.unwrapped(self.model), data_collator.pad_token_id, self.args.device)
        else:
            self.collate = lambda examples: with_positions(data_collator(examples))
        self.data_collator = keeping_examples(self.collate)
        # The Trainer then counts the response tokens of an accumulated batch and leaves the division to compute_loss.
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.sid_learning_rate:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise InputError(
                    f"--sid_learning_rate {self.sid_learning_rate}: the DeepSpeed file names an optimizer, which has "
                    "one rate; remove its section, and --optim chooses one"
                )
            give_rate(optimizer, self.sid_weights, self.sid_learning_rate)
        return optimizer

    def _build_accelerator_args(self, **kwargs: object) -> dict:
        args = super()._build_accelerator_args(**kwargs)
        # Autocast would keep its 16-bit copies of all weights until the forward pass ends, which uses each only once.
        if self.args.activation_checkpointing:
            args["kwargs_handlers"].append(AutocastKwargs(cache_enabled=False))
        return args

    def _micro_batches_are_collective(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler:
        args = self.args
        if args.train_sampling_strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        grouped = args.train_sampling_strategy == "group_by_length"
        return StepSampler(self.train_dataset["length"][:], step_rows, args.seed, grouped)

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        batches: Sampler | None = self.train_batches
        if batches is None:
            own = args.world_size, args.process_index
            batches = RowBatches(self._get_train_sampler(), args.train_batch_size, *own)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self._training_collator(),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        # These are this process's batches already; accelerate's `prepare` would shard them once more. They are pinned:
        # the host need not wait until they are copied, after all that a GPU still has to do.
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
        )

    def _training_collator(self) -> Callable[[list[dict]], dict]:
        if self.train_batches is None:
            return self.data_collator
        assert isinstance(self.collate, TreeCollator)
        model = self.unwrapped(self.model)
        return keeping_examples(in_few_shapes(model, self.collate, self.train_batches, self.accelerator.print))

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The mean over rows of each row's mean cross-entropy (nats). It does not depend on how rows are split into
        batches and over processes, as the Trainer's does."""
        dataset, args = self.eval_dataset if eval_dataset is None else eval_dataset, self.args
        batches = self._eval_batches(dataset)
        own = batches[args.process_index :: args.world_size]
        # Where weights are sharded, every process must make every pass: one with a batch less repeats one, uncounted.
        turns = math.ceil(len(batches) / args.world_size)
        loader = DataLoader(dataset, batch_sampler=[*own, *batches[-1:]][:turns], collate_fn=self.data_collator)
        model = self._wrap_model(self.model, training=False)
        self.callback_handler.eval_dataloader = loader
        training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=args.device)  # losses, rows
        for turn, batch in enumerate(loader):
            found = self._evaluated(model, batch)
            if turn < len(own):
                total += found
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        model.train(training)
        loss, rows = self.accelerator.reduce(total, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / rows}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def _evaluated(self, model: nn.Module, batch: dict) -> torch.Tensor:
        """The sum of the mean losses of the rows of a batch, and how many rows have one, [2]."""

        def of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            with torch.no_grad(), self.compute_loss_context_manager():
                losses, row = self._losses(model, self._prepare_inputs(inputs))
            tokens = row.bincount()
            return torch.stack([(losses / tokens[row]).sum().double(), (tokens > 0).sum().double()])

        rows = batch.pop(EXAMPLES).rows
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # all processes take part in every pass
            return of(batch)
        sums = self.eval_halving(lambda part: of(batch if len(part) == len(rows) else self.collate(list(part))), rows)
        return torch.stack(sums).sum(dim=0)

    def _eval_batches(self, dataset: datasets.Dataset) -> list[list[int]]:
        """As token trees, those of training at most. Otherwise `per_device_eval_batch_size` rows, from the longest to
        the shortest: little padding, and rows that do not fit come first."""
        size = self.args.per_device_eval_batch_size
        if self.train_batches is not None:
            longest = self.train_batches.prefixes.longest
            return evaluation_batches(Prefixes(dataset), Size(size * longest.nodes, size * longest.responses))
        order = list(StepSampler(dataset["length"][:], len(dataset), self.args.seed))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _losses(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The cross-entropy of every response token, and its row: [N] each."""
        unwrapped = self.unwrapped(model)
        if self.train_batches is None:
            return row_losses(model, inputs, unwrapped)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return recorded_tree_losses(model, inputs, unwrapped, dtype)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses, _ = self._losses(model, inputs)
        # Gradients are averaged over processes; the count is that of all of them.
        loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss
