"""The SFT trainer: a Hugging Face `Trainer` whose loss runs the output head on response positions only.

Dimensions: `B` rows, `L` tokens, `N` response tokens in the batch, `H` hidden, `V` vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import AutocastKwargs
from torch.utils.data import Sampler
from transformers import Trainer

from minionerec.data.examples import IGNORE
from minionerec.model.head import head_on
from minionerec.training.durable import DurableRun


def response_logits(model, inputs: dict[str, torch.Tensor], unwrapped=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] that predict the response tokens of a batch, and those tokens [N].

    No token sees what stands behind it, so none sees the padding, and attention needs no mask for it: it runs in the
    kernels that know the causal one alone.

    Args:
        model: a causal LM, wrapped for distributed training or not.
        inputs: input_ids, labels [B, L], padded on the right.
        unwrapped: the model inside the wrappers, where there are any.
    """
    targets = inputs["labels"][:, 1:]
    predicts = F.pad(targets != IGNORE, (0, 1))  # position t predicts token t + 1; the last one predicts none
    with head_on(unwrapped if unwrapped is not None else model, predicts):
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
    return logits, targets[targets != IGNORE]


class StepSampler(Sampler):
    """A random order of the examples, in which those of an optimizer step stand from the longest to the shortest.

    A step's gradient does not depend on how its examples are spread over micro-batches; its padding does, and so does
    the time it takes. What needs the most memory comes first. The order follows from the seed and the epoch only, so
    that a resumed run meets the same steps.

    Args:
        lengths: tokens of every example.
        step_rows: examples of an optimizer step, over all processes.
        seed: of the order, which is another one every epoch.
        group_by_length: sort the examples of up to 50 steps, but at most a quarter of all, together: those of a step
            are then of similar length. The longest example comes first of all.
    """

    def __init__(self, lengths: Sequence[int], step_rows: int, seed: int, group_by_length: bool = False):
        self.lengths, self.seed = np.asarray(lengths), seed
        steps = min(50, len(self.lengths) // (4 * step_rows)) if group_by_length else 1
        self.sorted_rows, self.group_by_length = step_rows * max(steps, 1), group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self))
        if self.group_by_length:
            longest = int(self.lengths[order].argmax())
            order[[0, longest]] = order[[longest, 0]]
        for start in range(0, len(order), self.sorted_rows):
            rows = order[start : start + self.sorted_rows]
            yield from rows[np.argsort(-self.lengths[rows], kind="stable")].tolist()


class SFTTrainer(DurableRun, Trainer):
    """Supervised fine-tuning on prompts and responses.

    The loss of an optimizer step is the mean cross-entropy over its response tokens, however they are spread over
    micro-batches and processes.
    """

    def __init__(self, *args, run: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.run = run
        # The Trainer then counts the response tokens of an accumulated batch and leaves the division to compute_loss.
        self.model_accepts_loss_kwargs = True

    def _build_accelerator_args(self, **kwargs) -> dict:
        args = super()._build_accelerator_args(**kwargs)
        # Autocast would keep its 16-bit copy of all weights to the end of a forward pass, which uses each once.
        if self.args.activation_checkpointing:
            args["kwargs_handlers"].append(AutocastKwargs(cache_enabled=False))
        return args

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        args = self.args
        if args.train_sampling_strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        grouped = args.train_sampling_strategy == "group_by_length"
        return StepSampler(self.train_dataset["length"][:], step_rows, args.seed, grouped)

    def _get_eval_sampler(self, eval_dataset) -> Sampler:
        """From the longest to the shortest: little padding, and rows that do not fit are met first."""
        return StepSampler(eval_dataset["length"][:], len(eval_dataset), self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        unwrapped = self.accelerator.unwrap_model(model)
        logits, targets = response_logits(model, inputs, unwrapped)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        if not unwrapped.training:
            # The mean over rows of each one's mean: it does not depend on which rows share a batch.
            answered = inputs["labels"][:, 1:] != IGNORE
            weights = 1 / answered.sum(dim=1, keepdim=True).expand_as(answered)[answered]
            loss = (losses * weights).sum() / len(answered)
        else:
            # Gradients are averaged over processes; the count is that of all of them.
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss
