"""ReReTrainer: TRL's GRPO over items, whose completions are SIDs of the catalogue from constrained beam search.

It differs from `GRPOTrainer` in how completions are generated, how their log-probabilities are computed (each prompt
once, the output head on completion tokens only), where the reference is and when it is computed, and in a shuffle that
keeps the completions of a prompt together.

Dimensions: `B` completions, `G` completions of a prompt, `P` prompt tokens, `C` completion tokens.
"""

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model, save_fsdp_model
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.distributed.fsdp import get_fsdp_ckpt_kwargs
from transformers.trainer_utils import TrainOutput
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import RepeatSampler, use_adapter

from minionerec.data.encoding import left_padded, right_padded
from minionerec.decoding.beam_search import constrained_beam_search, constrained_sample
from minionerec.decoding.ranking import rank_prompts
from minionerec.decoding.trie import Trie
from minionerec.errors import InputError
from minionerec.flags import engine
from minionerec.metrics import rank_of, ranking_metrics, watched_cutoff
from minionerec.model import adapters, device
from minionerec.model.halving import Halving
from minionerec.model.packed_rows import groups_of
from minionerec.model.sharding import OwnedWeights, gathered, overwrite, whole_tensors
from minionerec.saving import make_readable
from minionerec.training.averaging import WeightAverage
from minionerec.training.durable import DurableRun
from minionerec.training.early_warning import EarlyWarning
from minionerec.training.logprobs import completion_logps, with_targets
from minionerec.training.policy_loss import advantages_of, deviation, token_losses
from minionerec.training.retrying import averaged_afterwards
from minionerec.training.rewards import equal_in_group

# In a checkpoint: the weights of a reference that moves with the policy, and those that train on, where the checkpoint
# itself has their average.
REFERENCE_FILE, UNAVERAGED_FILE = "reference.safetensors", "unaveraged.safetensors"


def choose(completions: Sequence[tuple[int, ...]], target: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """`count` of the completions of a prompt, for `dynamic_sampling`: the target if it was drawn, and the most frequent
    others, in the order they were drawn. Completions repeat only if there are too few different ones."""
    frequency = Counter(completions)
    first = {completion: i for i, completion in reversed(list(enumerate(completions)))}
    ranked = sorted(frequency, key=lambda c: (c != target, -frequency[c], first[c]))
    kept = sorted(ranked[:count], key=first.__getitem__)
    return (kept * count)[:count] if len(kept) < count else kept


def disable_dropout(model: nn.Module) -> None:
    """Turns off every dropout of a model, in place: that of modules, and that whose probability is a number of a layer
    (`attention_dropout`, `layerdrop`), which TRL's own function leaves on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class Known(NamedTuple):
    """What the host knows of completions: the tokens of the prompt of each, a number that equal prompts share, and
    whether any token of it counts; [B] each."""

    length: np.ndarray
    prompt: np.ndarray
    learns: np.ndarray

    @classmethod
    def read(cls, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, completion_mask: torch.Tensor) -> "Known":
        """The same from tensors, for which the host waits."""
        groups = np.array(groups_of(prompt_ids, prompt_mask))
        number = np.repeat(np.arange(len(groups)), groups)
        return cls(prompt_mask.sum(dim=1).cpu().numpy(), number, completion_mask.any(dim=1).cpu().numpy())

    @property
    def groups(self) -> list[int]:
        """How many consecutive completions have equal prompts, prompt by prompt."""
        return np.diff(np.flatnonzero(np.diff(self.prompt, prepend=-1, append=-1))).tolist()

    def rows(self, rows: Any) -> "Known":
        return Known(*(values[rows] for values in self))

    def with_targets(self, groups: list[int]) -> "Known":
        """The same with a target after each group, which counts; `groups` are the sizes with it."""
        at = np.cumsum(groups) - np.arange(1, len(groups) + 1)
        last = at - 1
        return Known(
            np.insert(self.length, at, self.length[last]),
            np.insert(self.prompt, at, self.prompt[last]),
            np.insert(self.learns, at, True),
        )


def rows_of(batch: dict[str, Any], rows: Any) -> dict[str, Any]:
    """Some rows of a batch, chosen by a slice or by their numbers on the CPU."""
    on_device = rows if isinstance(rows, slice) else rows.to(batch["advantages"].device)
    on_host = rows if isinstance(rows, slice) else rows.numpy()

    def of(value: Any) -> Any:
        if isinstance(value, Known):
            return value.rows(on_host)
        return value[on_device] if value.dim() else value

    return {name: of(value) for name, value in batch.items()}


def _numbered(prompts: Sequence[np.ndarray], targets: Sequence[tuple[int, ...]]) -> np.ndarray:
    """[B], a number for each prompt with its target, the same for the completions of one: histories may be equal and
    go on differently."""
    numbers: dict[tuple, int] = {}
    pairs = zip(prompts, targets, strict=True)
    return np.array([numbers.setdefault((ids.tobytes(), target), len(numbers)) for ids, target in pairs])


class ReReTrainer(DurableRun, GRPOTrainer):
    """GRPO from an SFT checkpoint.

    The dataset has the columns `prompt` (token ids), `target` (a SID) and others that the rewards use. For every start,
    the policy equals the reference before the first step, and the KL term is exactly 0:

    | start | reference |
    |---|---|
    | a model with a new adapter | the model with that adapter disabled |
    | a model with a trained adapter | a frozen copy of the adapter, `ref` |
    | a whole model, trained in full | a frozen copy of the model, rounded as autocast rounds the policy |
    """

    control: TrainerControl
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward_funcs: list[Callable[..., list[float]]],
        args: GRPOConfig,
        train_dataset: datasets.Dataset,
        *,
        trie: Trie,
        sids: Sequence[str],
        run: dict[str, Any] | None = None,
        new_adapter: bool = False,
        beam_search: bool = True,
        add_gt: bool = False,
        dynamic_sampling: bool = False,
        mask_all_zero: bool = False,
        sft_weight: float = 0.0,
        average_weights: bool = False,
        pass_size: int | None = None,
        test_beam: int = 20,
        test_batch_size: int = 32,
        **kwargs: Any,
    ):
        """Takes GRPOTrainer's arguments, and:

        Args:
            trie, sids: the catalogue; `sids` is the list that the trie was built from, in the same order.
            run: the resolved configuration that every checkpoint records.
            new_adapter: the adapter of `model` is new, so the model without it can be the reference.
            beam_search: the G best items by beam search; False samples them at `args.temperature`.
            add_gt: the last completion of a group is the target.
            dynamic_sampling: draw 1.5 G completions; keep the target, if drawn, and the most frequent others.
            mask_all_zero: groups without any advantage add nothing to the loss, not even KL, and cost nothing.
            sft_weight: weight of the supervised loss: the mean over completions of the mean negative log-probability of
                their target's tokens (nats), at `args.temperature`.
            pass_size: completions of a forward pass at most, and prompts of a search: a micro-batch is made in as many
                passes as it needs, which changes no gradient. None for one pass. Halved when memory runs out.
            average_weights: evaluate and save the average of the weights over the steps; the policy itself trains on.
            test_beam, test_batch_size: beams and prompts of a forward pass in `evaluate`.
        """
        if args.loss_type not in ("grpo", "dapo") or args.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError("ReReTrainer has the losses grpo and dapo, of rewards that are added first")
        adapted = is_peft_model(model)
        adapter = {name: p.detach().clone() for name, p in model.named_parameters() if adapted and p.requires_grad}
        beta, sync = args.beta, args.sync_ref_model
        # Copied before TRL replaces the model's forward method: the copy would have the replaced one.
        reference = copy.deepcopy(model).eval().requires_grad_(False) if beta and not adapted else None
        args.beta, args.sync_ref_model = 0.0, False  # TRL's references handle neither SID rows nor a merged start
        args.router_aux_loss_coef = 0.0  # our passes return no auxiliary loss of routers, which TRL would turn on
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        args.beta, args.sync_ref_model = beta, sync
        # TRL rounds the adapter of a quantized base to bfloat16, where steps of 1e-6 would vanish.
        for name, values in adapter.items():
            self.model.get_parameter(name).data = values
        self.run = run or {}
        self.trie, self.sids = trie.to(self.accelerator.device), sids
        self.tokens_of = {sid: tokens for tokens, sid in trie.sid_of(sids).items()}
        self.beam_search, self.add_gt, self.dynamic_sampling = beam_search, add_gt, dynamic_sampling
        self.mask_all_zero, self.sft_weight = mask_all_zero, sft_weight
        self.pass_size = pass_size or args.per_device_train_batch_size
        self.search_halving = Halving("searches for completions")
        self._pad = self._tokenizer.pad_token_id
        self.test_beam, self.test_batch_size = test_beam, test_batch_size
        self.add_callback(EarlyWarning(self.reward_func_names, beam_search))
        self.reference_adapter: str | None = None
        if beta and adapted and (sync or not new_adapter):
            self.reference_adapter = "ref"
            adapters.copy_adapter(self.model, "default", "ref")
        elif reference is not None:
            # FSDP rounds every weight of the policy, autocast only those of matmuls.
            adapters.round_weights(reference, device.compute_dtype(), all_of_them=self.is_fsdp_enabled)
            if device.weights_are_sharded():  # as those of the policy, because one GPU may not hold them
                prepare = prepare_deepspeed if self.is_deepspeed_enabled else prepare_fsdp
                self.ref_model = prepare(reference, self.accelerator)
            else:
                self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        disable_dropout(self.model)  # with it, the policy would differ from the reference and from itself
        self.average_weights = average_weights
        self.average: WeightAverage | None = None  # once an engine has sharded the weights
        if sync and self.ref_model is not None:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))
        elif sync and self.reference_adapter:
            self.add_callback(_SyncReferenceAdapter(self.reference_adapter))

    # --- Rows ---------------------------------------------------------------------------------------------------------

    def _get_dataloader(
        self, dataset: datasets.Dataset, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        """As TRL's, but in training it loads row numbers. Pinning and moving a batch visit every int of every list in
        it, and a batch would hold each prompt once per completion."""
        rows = _RowNumbers(len(dataset)) if is_training else dataset
        return super()._get_dataloader(rows, *args, is_training=is_training, **kwargs)

    def look_up(self, batch: list[dict[str, int]]) -> list[dict[str, Any]]:
        """The examples for a batch of row numbers, as TRL's methods and the rewards take them; each keeps its number as
        `row`. The completions of a prompt share one example."""
        numbers = list(dict.fromkeys(example["row"] for example in batch))
        columns = {**self.train_dataset[numbers], "row": numbers}
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        example_of = dict(zip(numbers, examples, strict=True))
        return [example_of[example["row"]] for example in batch]

    # --- Completions --------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[np.ndarray], None, dict[str, Any]]:
        """Only converts: the dataset already holds token ids. An array becomes a tensor faster than a list does, and
        the completions of a prompt share one array."""
        array_of = {id(prompt): np.array(prompt, dtype=np.int64) for prompt in prompts}
        return [array_of[id(prompt)] for prompt in prompts], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Completions of examples, group by group, and what they are worth, as TRL's method returns them. What the host
        knows of them stays there, as `known`, so that it need not wait for a GPU to read it; TRL makes two tensors for
        every completion, and reads each number that it logs."""
        self._targets = [self.tokens_of[example["target"]] for example in inputs]
        self._rows = [example["row"] for example in inputs]
        prompt_ids, _, _ = self._tokenize_prompts([example["prompt"] for example in inputs])
        completions, _ = self._generate_single_turn(prompt_ids, None, None, self.num_generations)
        advantages, silent = self._score(inputs, completions)
        self._log_lengths(prompt_ids, completions)
        arrays = dict(zip(("prompt_ids", "prompt_mask"), left_padded(prompt_ids, self._pad), strict=True))
        arrays |= dict(zip(("completion_ids", "completion_mask"), right_padded(completions, self._pad), strict=True))
        arrays["num_items_in_batch"] = arrays["completion_mask"].sum()
        if self.sft_weight:
            arrays |= dict(zip(("target_ids", "target_mask"), right_padded(self._targets, self._pad), strict=True))
        learns = ~silent if self.mask_all_zero else np.ones(len(inputs), dtype=bool)
        arrays["completion_mask"] *= torch.from_numpy(learns).unsqueeze(1)
        outputs: dict[str, Any] = {
            name: tensor.to(self.accelerator.device, non_blocking=True)
            for name, tensor in {**arrays, "advantages": advantages}.items()
        }
        outputs["num_items_in_batch"] = self.accelerator.gather(outputs["num_items_in_batch"]).sum()
        outputs["known"] = Known(
            np.array([len(ids) for ids in prompt_ids]), _numbered(prompt_ids, self._targets), learns
        )
        if self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations):
            # The policy has moved when it learns from them.
            with torch.no_grad():
                outputs["old_per_token_logps"], _, _ = self._logps(
                    self.model, outputs, self.args.per_device_train_batch_size
                )
        return outputs

    def _score(self, inputs: list[dict[str, Any]], completions: list[list[int]]) -> tuple[torch.Tensor, np.ndarray]:
        """The advantage of every completion, [B], and whether all rewards of its group are equal, [B] of bool; both on
        the CPU. Logs them."""
        prompts = [example["prompt"] for example in inputs]
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = self._calculate_rewards(inputs, prompts, texts, completions)
        total = (rewards * self.reward_weights.cpu()).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = math.nan
        # Where all rewards are equal, rounding leaves advantages that are not quite 0.
        silent = equal_in_group(total, self.num_generations).repeat_interleave(self.num_generations)
        advantages = advantages_of(total, self.num_generations, self.scale_rewards).masked_fill(silent, 0.0)

        logged, spread = self._metrics["train"], deviation(torch.cat([rewards.T, total.unsqueeze(0)])).flatten()
        for name, values, std in zip(self.reward_func_names, rewards.T, spread, strict=False):
            logged[f"rewards/{name}/mean"].append(values.nanmean().item())
            logged[f"rewards/{name}/std"].append(std.item())
            self._logs["rewards"][name].extend(values.tolist())
        logged["reward"].append(total.nanmean().item())
        logged["reward_std"].append(spread[-1].item())
        logged["frac_reward_zero_std"].append(silent.float().mean().item())
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(texts))
        self._logs["advantages"].extend(advantages.tolist())
        own = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        return advantages[own], silent[own].numpy()

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list[str], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        """[B of all processes, reward functions], NaN where a function gives no reward; on the CPU."""
        columns = {name: [example[name] for example in inputs] for name in inputs[0] if name != "prompt"}
        columns |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        found = [function(**columns, trainer_state=self.state) for function in self.reward_funcs]
        values = [[math.nan if reward is None else reward for reward in of_function] for of_function in found]
        rewards = torch.tensor(values, dtype=torch.float32).T.contiguous()
        if len(rewards) != len(inputs):
            raise ValueError(f"a reward function returned {len(rewards)} rewards for {len(inputs)} completions")
        if self.accelerator.num_processes > 1:
            return self.accelerator.gather(rewards.to(self.accelerator.device)).cpu()
        return rewards

    def _log_lengths(self, prompts: Sequence[np.ndarray], completions: Sequence[Sequence[int]]) -> None:
        """Logs the tokens of completions as TRL does; all of ours end."""
        lengths = [len(ids) for ids in completions]
        tokens = sum(map(len, prompts)) + sum(lengths)
        if self.accelerator.num_processes > 1:
            lengths = gather_object(lengths)
            tokens = sum(gather_object([tokens]))
        self.state.num_input_tokens_seen += tokens
        logged = self._metrics["train"]
        logged["num_tokens"] = [self.state.num_input_tokens_seen]
        for kind in ("", "terminated_"):
            logged[f"completions/mean_{kind}length"].append(sum(lengths) / len(lengths))
            logged[f"completions/min_{kind}length"].append(float(min(lengths)))
            logged[f"completions/max_{kind}length"].append(float(max(lengths)))
        logged["completions/clipped_ratio"].append(0.0)

    def _generate_single_turn(
        self,
        prompt_ids: list[np.ndarray],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], None]:
        prompts, targets = prompt_ids[::num_generations], self._targets[::num_generations]
        rows_of_prompts = self._rows[::num_generations]
        count = num_generations * 3 // 2 if self.dynamic_sampling else num_generations
        rows: list[list[int]] = []
        training = self.model.training
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            model.eval()
            for start in range(0, len(prompts), self.pass_size):
                these = range(len(prompts))[start : start + self.pass_size]

                def drawn(part: Sequence[int], model: nn.Module = model) -> list[list[int]]:
                    some = slice(part[0], part[-1] + 1)
                    return self._draw(model, prompts[some], rows_of_prompts[some], count)

                parts = [drawn(these)] if device.weights_are_sharded() else self.search_halving(drawn, these)
                rows += [found for part in parts for found in part]
            model.train(training)
        completions: list[list[int]] = []
        for numbers, target in zip(rows, targets, strict=True):
            group = [self.tokens_of[self.sids[self.trie.source[row]]] for row in numbers]
            if self.dynamic_sampling:
                group = choose(group, target, num_generations)
            if self.add_gt:
                group = [*group[:-1], target]
            completions += map(list, group)
        return completions, None

    def _draw(
        self, model: nn.Module, prompts: list[np.ndarray], rows_of_prompts: list[int], count: int
    ) -> list[list[int]]:
        """`count` rows of the trie for each prompt."""
        batch = left_padded(prompts, self._pad)
        input_ids, attention_mask = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in batch)
        with self.autocast():
            if self.beam_search:
                rows, _ = constrained_beam_search(model, input_ids, attention_mask, self.trie, count)
            else:
                draws = self._draws(rows_of_prompts, count)
                rows = constrained_sample(
                    model, input_ids, attention_mask, self.trie, count, self.args.temperature, draws=draws
                )
        return rows.tolist()

    def _draws(self, rows: list[int], count: int) -> torch.Tensor:
        """The numbers that `count` completions of each prompt are drawn with, [prompts, count, D]. They follow from the
        seed, the step and the prompt's row, so that any number of processes draws the same."""
        seed, step = self.args.seed, self.state.global_step
        shape = count, self.trie.depth
        return torch.from_numpy(np.stack([np.random.default_rng((seed, step, row)).random(shape) for row in rows]))

    def _prepare_inputs(self, generation_batch: list[dict[str, int]] | dict[str, Any]) -> dict[str, Any]:
        """As TRL's, but the shuffle moves whole groups: only consecutive completions of a prompt share its row."""
        if isinstance(generation_batch, dict):  # prepared already
            return generation_batch
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(self.look_up(generation_batch))
            group = self.num_generations
            # Drawn in any case, so that what is sampled later does not depend on how a step is split.
            order = torch.randperm(len(batch["advantages"]) // group)
            size = len(batch["advantages"]) // steps
            if steps > 1:
                batch = rows_of(batch, (order.unsqueeze(1) * group + torch.arange(group)).flatten())
            self._buffered_inputs = [rows_of(batch, slice(i * size, (i + 1) * size)) for i in range(steps)]
        return self._buffered_inputs[self._step % steps]

    def _get_train_sampler(self, dataset: datasets.Dataset | None = None) -> RepeatSampler:
        return _PromptSampler(
            self,
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

    # --- Loss ---------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: list[dict[str, int]], *args: Any, **kwargs: Any) -> torch.Tensor:
        # Kept over an attempt that does not fit.
        prepared = self._prepare_inputs(inputs)
        with averaged_afterwards(self, model) if self._goes_back() else nullcontext():
            while (loss := self._attempt(model, prepared, *args, **kwargs)) is None:
                self.pass_size = math.ceil(self.pass_size / 2 / self.num_generations) * self.num_generations
                print(f"out of memory: passes have {self.pass_size} completions from here on", flush=True)
        if self.mask_all_zero and not self._passes_are_collective() and self.accelerator.sync_gradients:
            # If all groups were masked, no pass was made. The gradient is then 0, as in a run with several processes.
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return loss

    def _attempt(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """A training step, or None where it does not fit in memory and smaller passes may. Then no gradient is left of
        it."""
        try:
            return super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError:
            if not self._goes_back() or self.pass_size <= self.num_generations:
                raise
        self.model.zero_grad()
        return None

    def _goes_back(self) -> bool:
        """Whether a step can be computed again: not by an engine, and not in several micro-batches."""
        return not engine() and self.args.gradient_accumulation_steps == 1

    def _logps(
        self, model: nn.Module, inputs: dict[str, Any], batch_size: int | None = None, targets: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`_get_per_token_logps_and_entropies` of the completions of `inputs`."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return self._get_per_token_logps_and_entropies(
            model,
            ids,
            mask,
            inputs["completion_ids"].shape[1],
            batch_size,
            known=inputs.get("known"),
            targets=(inputs["target_ids"], inputs["target_mask"]) if targets else None,
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        known: "Known | None" = None,
        targets: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and entropies, [B, C] each; completions that are masked out cost nothing. With `targets`
        [B, T], which are one more completion of their prompt in the same pass, also their supervised loss, else None.
        Without `known`, the host reads it and waits for a GPU."""
        width = input_ids.shape[1] - logits_to_keep
        if known is None:
            known = Known.read(input_ids[:, :width], attention_mask[:, :width], attention_mask[:, width:])
        if targets is not None:
            parts = [tensor.split([width, logits_to_keep], dim=1) for tensor in (input_ids, attention_mask)]
            (prompts, completions), (prompt_mask, completion_mask) = parts
            rows, place, share, groups = with_targets(
                prompts, prompt_mask, completions, completion_mask, *targets, known.groups
            )
            count, mask = len(input_ids), rows[3].index_select(0, place)
            ids, mask_of_all = torch.cat(rows[::2], dim=1), torch.cat(rows[1::2], dim=1)
            all_known = known.with_targets(groups)
            found = self._get_per_token_logps_and_entropies(
                model, ids, mask_of_all, rows[2].shape[1], batch_size, known=all_known
            )
            logps, entropies = (values.index_select(0, place) for values in found[:2])
            supervised = -(share * logps[count:].sum(dim=1) / mask[count:].sum(dim=1)).sum()
            return logps[:count, :logits_to_keep], entropies[:count, :logits_to_keep], supervised
        mask = attention_mask[:, width:].bool()
        logps = torch.zeros(mask.shape, device=mask.device)
        entropies = torch.zeros_like(logps)
        size = batch_size or len(mask)
        for start in range(0, len(mask), size):
            of_pass = np.arange(start, min(start + size, len(mask)))
            kept = of_pass[known.learns[of_pass]]
            if not len(kept):
                if not self._passes_are_collective():
                    continue
                kept = of_pass[: self.num_generations]  # masked, so they add nothing; other processes wait for a pass
            every = len(kept) == len(mask)
            place = torch.from_numpy(kept).to(mask.device)
            ids, attention, present = (
                tensor if every else tensor.index_select(0, place) for tensor in (input_ids, attention_mask, mask)
            )
            with self.autocast():
                values, entropy = completion_logps(
                    model,
                    ids[:, :width],
                    attention[:, :width],
                    ids[:, width:],
                    present,
                    self.temperature,
                    self.unwrapped(model),
                    width=int(known.length[kept].max()),
                    groups=known.rows(kept).groups,
                )
            logps = values if every else logps.index_copy(0, place, values)
            entropies = entropy if every else entropies.index_copy(0, place, entropy)
        if torch.is_grad_enabled() and not logps.requires_grad:  # no pass was made
            logps.requires_grad_()
        return logps, entropies, None

    def _passes_are_collective(self) -> bool:
        """Whether all processes must make the same passes through the model. If weights are sharded, every pass is
        collective. With several processes, passes with a backward pass are, because gradients are averaged. DeepSpeed
        needs a backward pass for every step."""
        several = self.accelerator.num_processes > 1 or self.is_deepspeed_enabled
        return device.weights_are_sharded() or (torch.is_grad_enabled() and several)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """The loss of a micro-batch, in passes of at most `pass_size` completions: the gradients of all but the last
        are there already when it returns."""
        count = len(inputs["advantages"])
        starts = range(0, count, self.pass_size)
        total = 0.0
        for start in starts:
            if start:
                self.stop_between_passes()
            part = rows_of(inputs, slice(start, start + self.pass_size)) if len(starts) > 1 else inputs
            if start == starts[-1]:
                return self._compute_loss(model, part, count, first=not start) + total
            with self.accelerator.no_sync(model):
                loss = self._compute_loss(model, part, count, first=not start)
                with torch.autocast(self.accelerator.device.type, enabled=False):
                    self.accelerator.backward(loss)
            torch.clear_autocast_cache()  # its copies of weights belong to the pass
            total = total + loss.detach()
        raise ValueError("no completions")

    def _compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], of: int | None = None, first: bool = True
    ) -> torch.Tensor:
        """The loss of completions that are some of a micro-batch with `of`, its `first` or later ones. The reference is
        computed now, only for the completions that count, and in the batches of the policy, so that equal models give
        equal values."""
        reference = None
        if self.args.beta:
            with torch.no_grad(), self._reference() as frozen:
                reference, _, _ = self._logps(frozen, inputs)
        logps, entropies, supervised = self._logps(model, inputs, targets=self.sft_weight > 0)
        mask = inputs["completion_mask"]
        losses, divergence, clipped = token_losses(
            logps,
            inputs.get("old_per_token_logps"),
            reference,
            mask,
            inputs["advantages"],
            beta=self.args.beta,
            clip=(self.epsilon_low, self.epsilon_high),
            by_sequence=self.importance_sampling_level == "sequence",
        )
        accumulation, count = self.current_gradient_accumulation_steps, of or len(mask)
        if self.loss_type == "grpo":
            loss = ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum() / count / accumulation
        else:  # dapo; the tokens are those of all that was generated, of which this may be one of several steps
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            loss = (losses * mask).sum() / (tokens * accumulation / self.args.steps_per_generation)
        found = {f"clip_ratio/{name}": values for name, values in clipped.items()} | {"entropy": entropies}
        if divergence is not None:
            found["kl"] = divergence
        tokens = mask.sum()
        for name, values in found.items():
            self._note(name, (values.detach() * mask).sum(), tokens, first)
        if supervised is not None:
            share = len(mask) / count
            self._note("sft_loss", supervised.detach() * share, torch.full_like(supervised, share), first)
            loss = loss + self.sft_weight * share * supervised / accumulation
        return loss

    def _note(self, name: str, total: torch.Tensor, count: torch.Tensor, first: bool) -> None:
        """Logs the mean total / count of a micro-batch, to which later passes add. The device holds it until `log`."""
        noted, pair = self._metrics["train"][name], torch.stack([total.float(), count.float()])
        if first:
            noted.append(pair)
        else:
            noted[-1] = noted[-1] + pair

    def read_metrics(self) -> None:
        """Reads what `_note` has kept, from all processes and at once."""
        noted = self._metrics["train"]
        places = [(name, i) for name, of in noted.items() for i, v in enumerate(of) if isinstance(v, torch.Tensor)]
        if places:
            pairs = self.accelerator.reduce(torch.stack([noted[name][i] for name, i in places]), reduction="sum")
            for (name, i), (total, count) in zip(places, pairs.tolist(), strict=True):
                noted[name][i] = total / count if count else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.read_metrics()
        super().log(logs, start_time)

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """While open, the model that computes the log-probabilities of the reference."""
        model = self.unwrapped(self.model)
        if self.ref_model is not None:
            yield self.ref_model
        elif self.reference_adapter:
            with use_adapter(model, self.reference_adapter):
                yield model
        else:
            # PEFT's `disable_adapter` describes every layer in words first, which takes 14 ms more at 24 layers.
            model.base_model.disable_adapter_layers()
            try:
                yield model
            finally:
                model.base_model.enable_adapter_layers()

    # --- Evaluation and checkpoints -----------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        result = super().train(*args, **kwargs)
        if self.average and not self.loads_best:  # else the best checkpoint, an average, was loaded
            self.average.swap()
        return result

    def _averaged(self) -> AbstractContextManager[None]:
        """While open, the model has the weights to evaluate and save."""
        return self.average.in_place() if self.average else nullcontext()

    @property
    def unlogged_metrics(self) -> dict[str, list]:
        return self._metrics["train"]

    def unlogged(self) -> dict[str, Any]:
        self.read_metrics()
        values = {name: list(map(_not_nan, values)) for name, values in self._metrics["train"].items() if values}
        return {**super().unlogged(), "metrics": values}

    def continue_log(self, before: dict[str, Any]) -> None:
        super().continue_log(before)
        self.model.train()  # TRL logs by the mode of the model, which a finished run that is resumed never sets
        for name, values in before.get("metrics", {}).items():
            self._metrics["train"][name] += [math.nan if value is None else value for value in values]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._averaged():
            super()._save_checkpoint(model, trial)

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """HR@K, NDCG@K and MRR over the rows of the evaluation dataset, decoded with `test_beam` beams; and `mean@K`,
        the geometric mean of HR@K and NDCG@K, in which 1% of either counts the same."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        training = self.model.training
        self.model.eval()
        with self._averaged(), self.autocast():
            rankings = rank_prompts(
                self.unwrapped(self.model),
                self.trie,
                dataset["prompt"][:],
                self._tokenizer.pad_token_id,
                self.test_beam,
                self.test_batch_size,
            )
        ranks = [
            rank_of(target, [self.sids[i] for i in ranking])
            for target, ranking in zip(dataset["target"], rankings, strict=True)
        ]
        length = min(self.test_beam, len(self.trie))
        metrics, k = ranking_metrics(ranks, length), watched_cutoff(length)
        metrics[f"mean@{k}"] = math.sqrt(metrics[f"HR@{k}"] * metrics[f"NDCG@{k}"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(training)
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's. The model before the first step counts: it is the best one, whose weights are saved as
        checkpoint-0, until a later one has a better metric."""
        metrics = super()._evaluate(*args, **kwargs)
        if self.state.global_step == 0 and self.args.load_best_model_at_end:
            self._determine_best_metric(metrics, None)
            # The Trainer takes a best step of 0 for none.
            self.state.best_model_checkpoint = os.path.join(self.args.output_dir, "checkpoint-0")
            self._save_checkpoint(self.model, None)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the Trainer's, but only at steps that are also saved: a better model without a checkpoint cannot be loaded
        at the end."""
        step = self.state.global_step
        saved = step % self.state.save_steps == 0 or step == self.state.max_steps
        return saved and super()._determine_best_metric(metrics, trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing. TRL would write a model card with every checkpoint; ours is the recorded configuration."""

    def _moving_reference(self) -> dict[str, torch.nn.Parameter]:
        """The parameters of a reference that moves with the policy (`sync_ref_model`); else none."""
        if not self.args.sync_ref_model:
            return {}
        if self.ref_model is not None:
            return dict(self.unwrapped(self.ref_model).named_parameters())
        if self.reference_adapter is None:
            return {}
        return adapters.adapter_parameters(self.unwrapped(self.model), self.reference_adapter)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step == 0 and not self.is_deepspeed_enabled:
            # Before the first step there is nothing to resume. To have a state to save, FSDP would make a step, which
            # AdamW would count.
            if self.is_fsdp_enabled:
                plugin = self.accelerator.state.fsdp_plugin
                save_fsdp_model(plugin, self.accelerator, self.model, output_dir, **get_fsdp_ckpt_kwargs())
            return
        files = {REFERENCE_FILE: whole_tensors(self._moving_reference(), self.args.should_save)}
        if self.average:
            with self.average.in_place():  # the weights that train on, because the model has the average here
                files[UNAVERAGED_FILE] = whole_tensors(self.average.weights.named, self.args.should_save)
        for name, tensors in files.items():
            if tensors:
                with self._writing_checkpoint():
                    save_file(tensors, os.path.join(output_dir, name))
        if self.args.should_save:
            make_readable(output_dir)
        super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        reference = self._moving_reference()
        if reference and resume_from_checkpoint:
            overwrite(reference, _tensors_in(resume_from_checkpoint, REFERENCE_FILE))
        if self.average_weights:
            weights = OwnedWeights(self.unwrapped(self.model), self.model_wrapped)
            self.average = WeightAverage(weights)
            self.add_callback(self.average)
            if resume_from_checkpoint:  # the model has the average now
                weights.overwrite(_tensors_in(resume_from_checkpoint, UNAVERAGED_FILE))
        return prepared


def _not_nan(value: float) -> float | None:
    """A value of a metric as JSON can hold it: null for NaN, which TRL leaves out of the mean."""
    return None if math.isnan(value) else value


def _tensors_in(checkpoint: str, name: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(os.path.join(checkpoint, name))
    except (OSError, SafetensorError):
        raise InputError(
            f"--resume_from_checkpoint: {checkpoint} has lost its {name}, or it is damaged; resume from another "
            "checkpoint"
        ) from None


class _RowNumbers(torch.utils.data.Dataset):
    """`count` rows, each of which holds only its number."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, int]:
        return {"row": row}


class _PromptSampler(RepeatSampler):
    """TRL's sampler with an order that depends only on the seed and the epoch, so a resumed run gets the same
    prompts."""

    def __init__(self, trainer: ReReTrainer, **kwargs: Any):
        super().__init__(**kwargs)
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + int(self.trainer.state.epoch or 0))
        return super().__iter__()


class _SyncReferenceAdapter(TrainerCallback):
    """Moves the reference's adapter towards the policy's, every `ref_model_sync_steps` steps."""

    def __init__(self, reference: str):
        self.reference = reference

    def on_step_end(
        self,
        args: GRPOConfig,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            reference = adapters.adapter_parameters(model, self.reference)
            policy = adapters.adapter_parameters(model, "default")
            with gathered(policy.values()), gathered(reference.values(), write=True):
                for name, parameter in policy.items():
                    reference[name].data.lerp_(parameter.data, args.ref_model_mixup_alpha)
