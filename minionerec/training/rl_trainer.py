"""ReReTrainer: TRL's GRPO over items, whose completions are SIDs of the catalogue from constrained beam search.

It differs from `GRPOTrainer` in how completions are made (`completions`), how their log-probabilities are computed
(`logprobs`: each prompt once, the output head on completion tokens only), where the reference is and when it is asked
(`reference`), and in a shuffle that keeps the completions of a prompt together.

Dimensions: `B` completions, `C` completion tokens.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import datasets
import numpy as np
import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import GRPOConfig
from trl.models import unwrap_model_for_generation

from minionerec.decoding.probe import probe
from minionerec.decoding.trie import Trie
from minionerec.flags import engine
from minionerec.model import device
from minionerec.model.halving import Halving
from minionerec.model.token_trees import attend_in_blocks
from minionerec.training.completions import Completions, Tokens
from minionerec.training.early_warning import EarlyWarning
from minionerec.training.logprobs import completion_logps, logps_in_passes
from minionerec.training.policy_loss import PolicyLoss
from minionerec.training.prompts import Columns, PromptSampler, look_up
from minionerec.training.reference import Reference, as_given, disable_dropout
from minionerec.training.retrying import averaged_afterwards, recordings
from minionerec.training.rewards import advantages_of, equal_in_group, rewards_of
from minionerec.training.rl_log import RLLog
from minionerec.training.rl_run import RLRun
from minionerec.training.rollouts import Completed, Rollouts


class ReReTrainer(RLRun):
    """GRPO from an SFT checkpoint, whose policy equals the `Reference` before the first step.

    The dataset has the columns `prompt` (token ids), `target` (a SID) and others that the rewards use. The methods are
    in the order of a step: prompts, completions and their advantages, the loss in passes.
    """

    _buffered_inputs: list[Rollouts] | None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward_funcs: list[Callable[..., list[float]]],
        args: GRPOConfig,
        train_dataset: datasets.Dataset,
        *,
        trie: Trie,
        sids: Sequence[str],
        run: dict[str, object] | None = None,
        new_adapter: bool = False,
        beam_search: bool = True,
        add_gt: bool = False,
        dynamic_sampling: bool = False,
        mask_all_zero: bool = False,
        sft_weight: float = 0.0,
        listwise: bool = False,
        average_weights: bool = False,
        pass_size: int | None = None,
        test_beam: int = 20,
        test_batch_size: int = 32,
        **kwargs: object,
    ):
        """Takes GRPOTrainer's arguments, and:

        Args:
            trie, sids: the catalogue; `sids` is the list that the trie was built from, in the same order.
            run: the resolved configuration that every checkpoint records.
            new_adapter: the adapter of `model` is new, so the model without it can be the reference.
            beam_search, add_gt, dynamic_sampling: as in `Completions`, which samples at `args.temperature`.
            mask_all_zero: groups without any advantage add nothing to the loss, not even KL, and cost nothing.
            sft_weight: weight of the supervised loss: the mean over completions of the mean negative log-probability of
                their target's tokens (nats), at `args.temperature`.
            listwise: the loss is `policy_loss.listwise_loss` of each group of beams, instead of GRPO's; rewards must
                not be negative, and a micro-batch must have whole groups.
            average_weights: evaluate and save the average of the weights over the steps; the policy itself trains on.
            pass_size: completions of a forward pass at most, and prompts of a search: a micro-batch is made in as many
                passes as it needs, which changes no gradient. None for one pass. Halved when memory runs out.
            test_beam, test_batch_size: beams and prompts of a forward pass in `evaluate`.
        """
        if args.loss_type not in ("grpo", "dapo") or args.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError("ReReTrainer has the losses grpo and dapo, of rewards that are added first")
        if probe(model).shared:
            attend_in_blocks(model)  # before the reference is copied: both compute alike
        args.router_aux_loss_coef = 0.0  # our passes return no auxiliary loss of routers, which TRL would turn on
        with as_given(model, args):
            super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        if args.beta:
            new_adapter = new_adapter or not is_peft_model(model)  # TRL makes one of a `peft_config`
            self.reference = Reference(self.model, new_adapter, args.sync_ref_model, self.accelerator)
        disable_dropout(self.model)  # with it, the policy would differ from the reference and from itself

        sid_of = trie.sid_of(sids)
        self.trie, self.sids, self.run = trie.to(self.accelerator.device), sids, run or {}
        self.tokens_of = {sid: tokens for tokens, sid in sid_of.items()}
        self._pad = self._tokenizer.pad_token_id
        switches = beam_search, add_gt, dynamic_sampling
        self.completions = Completions(
            trie, list(sid_of), self.num_generations, *switches, args.temperature, args.seed, self._pad
        )
        self.mask_all_zero, self.pass_size = mask_all_zero, pass_size or args.per_device_train_batch_size
        if listwise:  # a pass has whole groups
            self.pass_size = max(self.pass_size // self.num_generations, 1) * self.num_generations
        self.search_halving = Halving("searches for completions")
        self.step_log = RLLog(self._metrics["train"], self._logs, self.reward_func_names, self.accelerator)
        processes = self.accelerator.num_processes
        self.loss = PolicyLoss(args, self.logps, self.reference, sft_weight, self.step_log, processes, listwise)
        self.test_beam, self.test_batch_size = test_beam, test_batch_size
        self.average_weights = average_weights
        self.add_callback(EarlyWarning(self.reward_func_names, beam_search and not listwise, sft_weight > 0))
        if self.reference and self.reference.follows:
            self.add_callback(self.reference)

    # --- Prompts ------------------------------------------------------------------------------------------------------

    def _get_dataloader(
        self, dataset: datasets.Dataset, *args: object, is_training: bool = False, **kwargs: object
    ) -> DataLoader:
        # Row numbers only: pinning and moving a batch visit every int of every list in it, and a batch would hold each
        # prompt once per completion.
        rows = range(len(dataset)) if is_training else dataset
        return super()._get_dataloader(rows, *args, is_training=is_training, **kwargs)

    def _get_train_sampler(self, dataset: datasets.Dataset | None = None) -> PromptSampler:
        return PromptSampler(
            lambda: self.state.epoch,
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

    def _prepare_inputs(self, generation_batch: list[int] | Rollouts) -> Rollouts:
        """As TRL's, but the shuffle moves whole groups: only consecutive completions of a prompt share its row."""
        if isinstance(generation_batch, Rollouts):  # prepared already
            return generation_batch
        steps, group = self.args.steps_per_generation, self.num_generations
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            rollouts = self.roll_out(look_up(self.train_dataset, generation_batch))
            count = len(rollouts.advantages)
            # In any case, so that what is sampled later does not depend on how a step is split.
            order = torch.randperm(count // group)
            if steps > 1:
                rollouts = rollouts.rows((order.unsqueeze(1) * group + torch.arange(group)).flatten())
            size = count // steps
            self._buffered_inputs = [rollouts.rows(slice(i * size, (i + 1) * size)) for i in range(steps)]
        return self._buffered_inputs[self._step % steps]

    # --- Completions and their advantages -----------------------------------------------------------------------------

    def roll_out(self, columns: Columns) -> Rollouts:
        """Completes prompts, of which each comes `num_generations` times, and scores the completions."""
        distinct = {id(prompt): prompt for prompt in columns["prompt"]}
        array_of = {key: np.array(prompt, dtype=np.int64) for key, prompt in distinct.items()}
        prompts = [array_of[id(prompt)] for prompt in columns["prompt"]]
        targets = [self.tokens_of[target] for target in columns["target"]]
        completions = self.complete(prompts, targets, columns["row"])
        advantages, silent = self._score(columns, completions)
        seen = self.state.num_input_tokens_seen
        self.state.num_input_tokens_seen = self.step_log.add_lengths(prompts, completions, seen)
        learns = ~silent if self.mask_all_zero else np.ones(len(prompts), dtype=bool)
        learned = self.loss.sft_weight > 0
        rollouts = Rollouts.build(prompts, completions, targets, advantages, learns, self._pad, learned)
        rollouts = rollouts.to(self.accelerator.device)
        rollouts.tokens = self.accelerator.gather(rollouts.tokens).sum()
        if self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations):
            # The policy has moved when it learns from them.
            with torch.no_grad():
                rollouts.old_logps, _ = self.logps(self.model, rollouts, self.args.per_device_train_batch_size)
        return rollouts

    def complete(
        self, prompts: Sequence[np.ndarray], targets: Sequence[Tokens], rows: Sequence[int]
    ) -> list[list[int]]:
        """The tokens of the completions of prompts, group by group."""
        size, training = self.num_generations, self.model.training
        completions: list[list[int]] = []
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            model.eval()
            firsts = range(0, len(prompts), size)
            for start in range(0, len(firsts), self.pass_size):

                def completed(part: Sequence[int], model: nn.Module = model) -> list[list[int]]:
                    these, step = slice(part[0], part[-1] + 1, size), self.state.global_step
                    with self.autocast():
                        return self.completions(model, prompts[these], targets[these], rows[these], step)

                of_pass = firsts[start : start + self.pass_size]
                sharded = device.weights_are_sharded()  # then all processes take part in every pass
                parts = [completed(of_pass)] if sharded else self.search_halving(completed, of_pass)
                completions += [completion for part in parts for completion in part]
            model.train(training)
        return completions

    def _score(self, columns: Columns, completions: list[list[int]]) -> tuple[torch.Tensor, np.ndarray]:
        """The advantage of every completion, [B], which in lists is the reward; and whether all rewards of its group
        are equal, [B] of bool. Both on the CPU. Logs them."""
        prompts, count, group = columns["prompt"], len(completions), self.num_generations
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        given = {name: values for name, values in columns.items() if name != "prompt"}
        given |= {"prompts": prompts, "completions": texts, "completion_ids": completions}
        rewards = rewards_of(self.reward_funcs, given, count, trainer_state=self.state)
        if self.accelerator.num_processes > 1:
            rewards = self.accelerator.gather(rewards.to(self.accelerator.device)).cpu()
        total = (rewards * self.reward_weights.cpu()).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = math.nan
        # Where all rewards are equal, rounding leaves advantages that are not quite 0.
        silent = equal_in_group(total, group).repeat_interleave(group)
        worth = total.nan_to_num() if self.loss.listwise else advantages_of(total, group, self.scale_rewards)
        advantages = worth.masked_fill(silent, 0.0)
        self.step_log.add_rewards(rewards, total, silent)
        self.step_log.add_samples(prompts, texts, advantages)
        own = slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)
        return advantages[own], silent[own].numpy()

    # --- The loss in passes -------------------------------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: list[int],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        # Kept over an attempt that does not fit.
        rollouts = self._prepare_inputs(inputs)
        with averaged_afterwards(self, model) if self._goes_back() else nullcontext():
            while (loss := self._attempt(model, rollouts, num_items_in_batch)) is None:
                recorded = recordings(self.model)
                if self.pass_size <= self.num_generations:
                    assert recorded  # or the attempt has raised
                    recorded.give_up("memory ran out")
                    continue
                self.pass_size = math.ceil(self.pass_size / 2 / self.num_generations) * self.num_generations
                if recorded:
                    recorded.release()  # those of larger passes hold memory, and will not come again
                print(f"out of memory: passes have {self.pass_size} completions from here on", flush=True)
        if self.mask_all_zero and not self._passes_are_collective() and self.accelerator.sync_gradients:
            # If all groups were masked, no pass was made. The gradient is then 0, as in a run with several processes.
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return loss

    def _attempt(self, *args: object) -> torch.Tensor | None:
        """A training step, or None where it does not fit in memory, and smaller passes or those without recordings may.
        Then no gradient is left of it, and nothing in the log."""
        logged = self.step_log.sizes()
        try:
            return super().training_step(*args)
        except torch.OutOfMemoryError:
            if not self._goes_back() or (self.pass_size <= self.num_generations and not recordings(self.model)):
                raise
        self.model.zero_grad()
        self.step_log.cut(logged)
        return None

    def _goes_back(self) -> bool:
        """Whether a step can be recomputed: not by an engine, and not in several micro-batches."""
        return not engine() and self.args.gradient_accumulation_steps == 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Rollouts,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss of a micro-batch, in passes of at most `pass_size` completions: the gradients of all but the last
        are there already when it returns."""
        count, size, accumulation = len(inputs.advantages), self.pass_size, self.current_gradient_accumulation_steps
        starts = range(0, count, size)
        *earlier, last = [inputs.rows(slice(i, i + size)) for i in starts] if len(starts) > 1 else [inputs]
        before: torch.Tensor | float = 0.0
        for i, part in enumerate(earlier):
            with self.accelerator.no_sync(model):
                loss = self.loss.of_pass(model, part, count, accumulation, first=not i)
                with torch.autocast(self.accelerator.device.type, enabled=False):
                    self.accelerator.backward(loss)
            torch.clear_autocast_cache()  # its copies of weights belong to the pass
            before = before + loss.detach()
            del loss  # its graph, which the recording of the next pass may not find
            self.stop_between_passes()
        return self.loss.of_pass(model, last, count, accumulation, first=not earlier) + before

    def logps(
        self, model: nn.Module, completed: Completed, size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of completions, [B, C] each, in passes of `size` or one; see
        `logps_in_passes`."""

        def of_pass(part: Completed) -> tuple[torch.Tensor, torch.Tensor]:
            width = int(part.known.length.max())
            with self.autocast():
                return completion_logps(
                    model, *part.tensors, self.temperature, self.unwrapped(model), width=width, groups=part.known.groups
                )

        least = self.num_generations if self._passes_are_collective() else 0
        return logps_in_passes(of_pass, completed, size or len(completed.completion_ids), least)

    def _passes_are_collective(self) -> bool:
        """Whether all processes must make the same passes through the model. If weights are sharded, every pass is
        collective. With several processes, passes with a backward pass are, because gradients are averaged. DeepSpeed
        needs a backward pass for every step."""
        several = self.accelerator.num_processes > 1 or self.is_deepspeed_enabled
        return device.weights_are_sharded() or (torch.is_grad_enabled() and several)
