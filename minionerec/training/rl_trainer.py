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
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import is_peft_model, save_fsdp_model
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
from trl.trainer.utils import RepeatSampler, split_tensor_dict, use_adapter

from minionerec.data.encoding import left_padded
from minionerec.decoding.beam_search import constrained_beam_search, constrained_sample
from minionerec.decoding.ranking import rank_prompts
from minionerec.decoding.trie import Trie
from minionerec.errors import InputError
from minionerec.metrics import rank_of, ranking_metrics, watched_cutoff
from minionerec.model import adapters, device
from minionerec.model.sharding import OwnedWeights, gathered, overwrite, whole_tensors
from minionerec.saving import make_readable
from minionerec.training.averaging import WeightAverage
from minionerec.training.durable import DurableRun
from minionerec.training.early_warning import EarlyWarning
from minionerec.training.logprobs import completion_logps, with_targets
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
    _supervised_loss: torch.Tensor  # of the forward pass that was just made
    _silent: torch.Tensor  # of the rewards that were just computed

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
            average_weights: evaluate and save the average of the weights over the steps; the policy itself trains on.
            test_beam, test_batch_size: beams and prompts of a forward pass in `evaluate`.
        """
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
        self._targets_to_learn: tuple[torch.Tensor, torch.Tensor] | None = None  # of the forward pass that is made
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
        self._targets = [self.tokens_of[example["target"]] for example in inputs]
        self._rows = [example["row"] for example in inputs]
        outputs = super()._generate_and_score_completions(inputs)
        if self.sft_weight:
            targets = [torch.tensor(target) for target in self._targets]
            ids = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1).to(self.accelerator.device)
            outputs["target_ids"], outputs["target_mask"] = ids.clamp(min=0), (ids >= 0).long()
        # Where all rewards are equal, rounding leaves advantages that are not quite 0, and TRL sees a deviation.
        own = self._silent.view(-1, len(inputs))[self.accelerator.process_index]
        outputs["advantages"][own] = 0.0
        self._metrics["train"]["frac_reward_zero_std"][-1] = self._silent.float().mean().item()
        if self.mask_all_zero:
            outputs["completion_mask"][own] = 0
        return outputs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As TRL's: [B of all processes, reward functions]. Keeps which completions are of a group that teaches
        nothing."""
        rewards = super()._calculate_rewards(*args, **kwargs)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = math.nan
        self._silent = equal_in_group(total, self.num_generations).repeat_interleave(self.num_generations)
        return rewards

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
        drawn: list[list[tuple[int, ...]]] = []
        training = self.model.training
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            model.eval()
            for start in range(0, len(prompts), self.args.per_device_train_batch_size):
                these = slice(start, start + self.args.per_device_train_batch_size)
                batch = left_padded(prompts[these], self._tokenizer.pad_token_id)
                input_ids, attention_mask = (tensor.to(self.accelerator.device) for tensor in batch)
                with self.autocast():
                    if self.beam_search:
                        rows, _ = constrained_beam_search(model, input_ids, attention_mask, self.trie, count)
                    else:
                        draws = self._draws(rows_of_prompts[these], count)
                        rows = constrained_sample(
                            model, input_ids, attention_mask, self.trie, count, self.args.temperature, draws=draws
                        )
                for row in self.trie.sequences[rows].tolist():
                    drawn.append([tuple(t for t in tokens if t >= 0) for tokens in row])
            model.train(training)
        completions: list[list[int]] = []
        for group, target in zip(drawn, targets, strict=True):
            if self.dynamic_sampling:
                group = choose(group, target, num_generations)
            if self.add_gt:
                group = [*group[:-1], target]
            completions += map(list, group)
        return completions, None

    def _draws(self, rows: list[int], count: int) -> torch.Tensor:
        """The numbers that `count` completions of each prompt are drawn with, [prompts, count, D]. They follow from the
        seed, the step and the prompt's row, so that any number of processes draws the same."""
        seed, step = self.args.seed, self.state.global_step
        shape = count, self.trie.depth
        return torch.from_numpy(np.stack([np.random.default_rng((seed, step, row)).random(shape) for row in rows]))

    def _prepare_inputs(self, generation_batch: list[dict[str, int]]) -> dict[str, Any]:
        """As TRL's, but the shuffle moves whole groups: only consecutive completions of a prompt share its row."""
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(self.look_up(generation_batch))
            group = self.num_generations
            order = torch.randperm(len(batch["advantages"]) // group, device=batch["advantages"].device)
            rows = (order.unsqueeze(1) * group + torch.arange(group, device=order.device)).flatten()
            batch = {name: value[rows] if value.dim() else value for name, value in batch.items()}
            self._buffered_inputs = split_tensor_dict(batch, steps)
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

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.mask_all_zero and not self._passes_are_collective() and self.accelerator.sync_gradients:
            # If all groups were masked, no pass was made. The gradient is then 0, as in a run with several processes.
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """(log-probabilities, entropies, None), [B, C] each; completions that are masked out cost nothing. Targets to
        learn are one more completion of their prompt, in the same pass."""
        width = input_ids.shape[1] - logits_to_keep
        if self._targets_to_learn is not None and torch.is_grad_enabled():
            parts = [tensor.split([width, logits_to_keep], dim=1) for tensor in (input_ids, attention_mask)]
            (prompts, completions), (prompt_mask, completion_mask) = parts
            targets, self._targets_to_learn = self._targets_to_learn, None
            rows, place, share, _ = with_targets(prompts, prompt_mask, completions, completion_mask, *targets)
            count, mask = len(input_ids), rows[3][place]
            ids, mask_of_all = torch.cat(rows[::2], dim=1), torch.cat(rows[1::2], dim=1)
            found = self._get_per_token_logps_and_entropies(model, ids, mask_of_all, rows[2].shape[1])
            logps, entropies = (values[place] for values in found[:2])
            self._supervised_loss = -(share * logps[count:].sum(dim=1) / mask[count:].sum(dim=1)).sum()
            return logps[:count, :logits_to_keep], entropies[:count, :logits_to_keep], None
        mask = attention_mask[:, width:].bool()
        logps = torch.zeros(mask.shape, device=mask.device)
        entropies = torch.zeros_like(logps)
        for rows in torch.arange(len(mask), device=mask.device).split(batch_size or len(mask)):
            kept = rows[mask[rows].any(dim=1)]
            if not len(kept):
                if not self._passes_are_collective():
                    continue
                kept = rows[: self.num_generations]  # masked, so they add nothing; the other processes wait for a pass
            with self.autocast():
                values, entropy = completion_logps(
                    model,
                    input_ids[kept, :width],
                    attention_mask[kept, :width],
                    input_ids[kept, width:],
                    mask[kept],
                    self.temperature,
                    self.unwrapped(model),
                )
            logps = logps.index_copy(0, kept, values)
            entropies = entropies.index_copy(0, kept, entropy)
        if torch.is_grad_enabled() and not logps.requires_grad:  # no pass was made
            logps.requires_grad_()
        return logps, entropies, None

    def _passes_are_collective(self) -> bool:
        """Whether all processes must make the same passes through the model. If weights are sharded, every pass is
        collective. With several processes, passes with a backward pass are, because gradients are averaged. DeepSpeed
        needs a backward pass for every step."""
        several = self.accelerator.num_processes > 1 or self.is_deepspeed_enabled
        return device.weights_are_sharded() or (torch.is_grad_enabled() and several)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """As TRL's, plus the supervised loss on the targets."""
        if not self.sft_weight:
            return self._policy_loss(model, inputs)
        self._targets_to_learn = inputs["target_ids"], inputs["target_mask"]
        loss, supervised = self._policy_loss(model, inputs), self._supervised_loss
        del self._supervised_loss  # its graph is the loss's
        self._metrics["train"]["sft_loss"].append(self.accelerator.gather(supervised.detach()).mean().item())
        return loss + self.sft_weight * supervised / self.current_gradient_accumulation_steps

    def _policy_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """As TRL's, which computes the reference for every completion before the advantages are known. Here it is
        computed now, only for the completions that count, and in the batches of the policy, so that equal models give
        equal values."""
        if not self.args.beta:
            return super()._compute_loss(model, inputs)
        names = ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")
        prompt_ids, completion_ids, prompt_mask, completion_mask = (inputs[name] for name in names)
        with torch.no_grad(), self._reference() as reference:
            logps, _, _ = self._get_per_token_logps_and_entropies(
                reference,
                torch.cat([prompt_ids, completion_ids], dim=1),
                torch.cat([prompt_mask, completion_mask], dim=1),
                completion_ids.shape[1],
            )
        self.beta = self.args.beta
        try:
            return super()._compute_loss(model, {**inputs, "ref_per_token_logps": logps})
        finally:
            self.beta = 0.0

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

    def unlogged(self) -> dict[str, Any]:
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
