"""ReReTrainer: TRL's GRPO over items. Completions are SIDs of the catalogue, found by constrained beam search.

What differs from `GRPOTrainer`: how completions are drawn, how their log-probabilities are computed (each prompt once,
the output head on completion tokens only), where the reference is, when it is asked, and that a shuffle keeps the
completions of a prompt together.

Dimensions: `B` completions, `G` completions of a prompt, `P` prompt tokens, `C` completion tokens.
"""

import copy
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import RepeatSampler, disable_dropout_in_model, split_tensor_dict, use_adapter

from minionerec.data.encoding import left_padded
from minionerec.decoding.beam_search import constrained_beam_search, constrained_sample
from minionerec.decoding.ranking import rank_prompts
from minionerec.decoding.trie import Trie
from minionerec.metrics import rank_of, ranking_metrics
from minionerec.model import adapters, device
from minionerec.model.sharding import gathered, overwrite, whole_tensors
from minionerec.training.durable import DurableRun
from minionerec.training.logprobs import completion_logps

REFERENCE_FILE = "reference.safetensors"  # in a checkpoint, the reference where it moves


def choose(completions: Sequence[tuple[int, ...]], target: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """`count` of the completions of a prompt, for `dynamic_sampling`: the target where it was drawn, then the most
    frequent others, in the order they were drawn; repeats only where there are too few different ones."""
    frequency = Counter(completions)
    first = {completion: i for i, completion in reversed(list(enumerate(completions)))}
    ranked = sorted(frequency, key=lambda c: (c != target, -frequency[c], first[c]))
    kept = sorted(ranked[:count], key=first.__getitem__)
    return (kept * count)[:count] if len(kept) < count else kept


class ReReTrainer(DurableRun, GRPOTrainer):
    """GRPO from an SFT checkpoint.

    The dataset has the columns `prompt` (token ids), `target` (a SID) and what else the rewards ask for. Whatever the
    start, the policy equals the reference before the first step and the KL term is exactly 0:

    | start | reference |
    |---|---|
    | a model with a new adapter | the model with that adapter off |
    | a model that has a trained adapter | a frozen copy of the adapter, `ref` |
    | a whole model, trained in full | a frozen copy of the model, rounded as autocast rounds the policy |
    """

    def __init__(
        self,
        model,
        reward_funcs,
        args,
        train_dataset,
        *,
        trie: Trie,
        sids: Sequence[str],
        run: dict | None = None,
        new_adapter: bool = False,
        beam_search: bool = True,
        add_gt: bool = False,
        dynamic_sampling: bool = False,
        mask_all_zero: bool = False,
        test_beam: int = 20,
        test_batch_size: int = 32,
        **kwargs,
    ):
        """Takes GRPOTrainer's arguments, and:

        Args:
            trie, sids: the catalogue; `sids` is what the trie was built of, in the same order.
            run: the resolved configuration that every checkpoint records.
            new_adapter: the adapter of `model` is new, so that the model without it can be the reference.
            beam_search: the G best items by beam search; False samples them at `args.temperature`.
            add_gt: the last completion of a group is the target.
            dynamic_sampling: draw 1.5 G completions, keep the target, if drawn, and the most frequent.
            mask_all_zero: groups without any advantage add nothing to the loss, not even KL, and cost nothing.
            test_beam, test_batch_size: beams and prompts of a forward pass in `evaluate`.
        """
        adapted = is_peft_model(model)
        adapter = {name: p.detach().clone() for name, p in model.named_parameters() if adapted and p.requires_grad}
        beta, sync = args.beta, args.sync_ref_model
        # Copied before TRL replaces the forward of the model, which the copy would share.
        reference = copy.deepcopy(model).eval().requires_grad_(False) if beta and not adapted else None
        args.disable_dropout = True  # it would make the policy differ from the reference, and from itself
        args.beta, args.sync_ref_model = 0.0, False  # TRL's references fit neither SID rows nor a merged start
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        args.beta, args.sync_ref_model = beta, sync
        # TRL rounds the adapter of a quantized base to bfloat16, where steps of 1e-6 would vanish.
        for name, values in adapter.items():
            self.model.get_parameter(name).data = values
        self.run = run or {}
        self.trie, self.sids = trie.to(self.accelerator.device), sids
        self.tokens_of = {sid: tokens for tokens, sid in trie.sid_of(sids).items()}
        self.beam_search, self.add_gt, self.dynamic_sampling = beam_search, add_gt, dynamic_sampling
        self.mask_all_zero = mask_all_zero
        self.test_beam, self.test_batch_size = test_beam, test_batch_size
        self.reference_adapter = None
        if beta and adapted and (sync or not new_adapter):
            self.reference_adapter = "ref"
            adapters.copy_adapter(self.model, "default", "ref")
            disable_dropout_in_model(self.model)
        elif reference is not None:
            # FSDP rounds every weight of the policy, autocast those of matmuls. DeepSpeed's is in 16 bits already.
            if not self.is_deepspeed_enabled:
                adapters.round_weights(reference, device.compute_dtype(), all_of_them=self.is_fsdp_enabled)
            if device.shares_weights_out():  # as the policy's: one card may not hold them
                prepare = prepare_deepspeed if self.is_deepspeed_enabled else prepare_fsdp
                self.ref_model = prepare(reference, self.accelerator)
            else:
                self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if sync and self.ref_model is not None:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))
        elif sync and self.reference_adapter:
            self.add_callback(_SyncReferenceAdapter(self.reference_adapter))

    # --- Rows ---------------------------------------------------------------------------------------------------------

    def _get_dataloader(self, dataset, *args, is_training: bool = False, **kwargs):
        """TRL's, of row numbers in training: pinning and moving a batch walk through every list in it, int by int, and
        each prompt is there once for every completion."""
        rows = _RowNumbers(len(dataset)) if is_training else dataset
        return super()._get_dataloader(rows, *args, is_training=is_training, **kwargs)

    def look_up(self, batch: list[dict]) -> list[dict]:
        """The examples that TRL's methods and the rewards take, for a batch of the training's data loader. The
        completions of a prompt share one."""
        numbers = list(dict.fromkeys(example["row"] for example in batch))
        columns = self.train_dataset[numbers]
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        example_of = dict(zip(numbers, examples, strict=True))
        return [example_of[example["row"]] for example in batch]

    # --- Completions --------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list):
        """The dataset holds token ids already. As arrays, which become tensors at once; the completions of a prompt
        share its list."""
        array_of = {id(prompt): np.array(prompt, dtype=np.int64) for prompt in prompts}
        return [array_of[id(prompt)] for prompt in prompts], None, {}

    def _generate_and_score_completions(self, inputs):
        self._targets = [self.tokens_of[example["target"]] for example in inputs]
        outputs = super()._generate_and_score_completions(inputs)
        if self.mask_all_zero:
            # Where any reward differs, some advantage is about 1 or more; where none does, rounding may leave a trace.
            silent = (outputs["advantages"].view(-1, self.num_generations).abs() < 1e-3).all(dim=1)
            outputs["completion_mask"][silent.repeat_interleave(self.num_generations)] = 0
        return outputs

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        prompts, targets = prompt_ids[::num_generations], self._targets[::num_generations]
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
                batch = left_padded(
                    prompts[start : start + self.args.per_device_train_batch_size], self._tokenizer.pad_token_id
                )
                input_ids, attention_mask = (tensor.to(self.accelerator.device) for tensor in batch)
                with self.accelerator.autocast():
                    if self.beam_search:
                        rows, _ = constrained_beam_search(model, input_ids, attention_mask, self.trie, count)
                    else:
                        rows = constrained_sample(
                            model, input_ids, attention_mask, self.trie, count, self.args.temperature
                        )
                for row in self.trie.sequences[rows].tolist():
                    drawn.append([tuple(t for t in tokens if t >= 0) for tokens in row])
            model.train(training)
        completions = []
        for group, target in zip(drawn, targets, strict=True):
            if self.dynamic_sampling:
                group = choose(group, target, num_generations)
            if self.add_gt:
                group = [*group[:-1], target]
            completions += map(list, group)
        return completions, None

    def _prepare_inputs(self, generation_batch):
        """TRL's, with a shuffle that moves whole groups: scattered ones would share no prompt."""
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(self.look_up(generation_batch))
            group = self.num_generations
            order = torch.randperm(len(batch["advantages"]) // group, device=batch["advantages"].device)
            rows = (order.unsqueeze(1) * group + torch.arange(group, device=order.device)).flatten()
            batch = {name: value[rows] if value.dim() else value for name, value in batch.items()}
            self._buffered_inputs = split_tensor_dict(batch, steps)
        return self._buffered_inputs[self._step % steps]

    def _get_train_sampler(self, dataset=None):
        return _PromptSampler(
            self,
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

    # --- Loss ---------------------------------------------------------------------------------------------------------

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.mask_all_zero and not self._passes_are_collective() and self.accelerator.sync_gradients:
            # Where no group counted, no pass was made: the gradient is zero, as it is in a run of several processes.
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return loss

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        """(log-probabilities, entropies, None), [B, C] each; rows whose completion is masked out cost nothing."""
        width = input_ids.shape[1] - logits_to_keep
        mask = attention_mask[:, width:].bool()
        logps = torch.zeros(mask.shape, device=mask.device)
        entropies = torch.zeros_like(logps)
        for rows in torch.arange(len(mask), device=mask.device).split(batch_size or len(mask)):
            kept = rows[mask[rows].any(dim=1)]
            if not len(kept):
                if not self._passes_are_collective():
                    continue
                kept = rows[: self.num_generations]  # masked: they add nothing, but the other processes wait
            with self.accelerator.autocast():
                values, entropy = completion_logps(
                    model,
                    input_ids[kept, :width],
                    attention_mask[kept, :width],
                    input_ids[kept, width:],
                    mask[kept],
                    self.temperature,
                    self.accelerator.unwrap_model(model),
                )
            logps = logps.index_copy(0, kept, values)
            entropies = entropies.index_copy(0, kept, entropy)
        if torch.is_grad_enabled() and not logps.requires_grad:  # no pass was made
            logps.requires_grad_()
        return logps, entropies, None

    def _passes_are_collective(self) -> bool:
        """Whether all processes must make the same passes through the model: every one where weights are sharded, and
        those with a backward pass, whose gradients are averaged, wherever there are several processes. DeepSpeed steps
        with gradients only."""
        several = self.accelerator.num_processes > 1 or self.is_deepspeed_enabled
        return device.shares_weights_out() or (torch.is_grad_enabled() and several)

    def _compute_loss(self, model, inputs):
        """TRL's, which asks the reference for every completion before it knows the advantages; here it is asked now,
        for the completions that count and in the batches of the policy, so that equal models give equal numbers."""
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
    def _reference(self):
        """The model to ask for the reference's log-probabilities."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, self.reference_adapter):
                yield model

    # --- Evaluation and checkpoints -----------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """HR@K, NDCG@K and MRR over the rows of the evaluation dataset, decoded with `test_beam` beams."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            rankings = rank_prompts(
                self.accelerator.unwrap_model(self.model),
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
        metrics = ranking_metrics(ranks, min(self.test_beam, len(self.trie)))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(training)
        return metrics

    def _determine_best_metric(self, metrics, trial):
        """The Trainer's, for models that are also saved: a better one that is gone cannot be loaded."""
        step = self.state.global_step
        saved = step > 0 and (step % self.state.save_steps == 0 or step == self.state.max_steps)
        return saved and super()._determine_best_metric(metrics, trial)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL writes one into the output folder with every checkpoint; ours is the recorded configuration."""

    def _moving_reference(self) -> dict[str, torch.nn.Parameter]:
        """The reference where it moves with the policy (`sync_ref_model`), else nothing."""
        if not self.args.sync_ref_model:
            return {}
        if self.ref_model is not None:
            return dict(self.accelerator.unwrap_model(self.ref_model).named_parameters())
        return adapters.adapter_parameters(self.accelerator.unwrap_model(self.model), self.reference_adapter)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        tensors = whole_tensors(self._moving_reference())
        if tensors and self.args.should_save:
            with self._writing_checkpoint():
                save_file(tensors, os.path.join(output_dir, REFERENCE_FILE))
        super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        reference = self._moving_reference()
        if reference and resume_from_checkpoint:
            overwrite(reference, load_file(os.path.join(resume_from_checkpoint, REFERENCE_FILE)))
        return prepared


class _RowNumbers(torch.utils.data.Dataset):
    """`count` rows, of which each holds its number only."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, int]:
        return {"row": row}


class _PromptSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the epoch alone, so that a resumed run meets the same prompts."""

    def __init__(self, trainer: ReReTrainer, **kwargs):
        super().__init__(**kwargs)
        self.trainer = trainer

    def __iter__(self):
        self.generator.manual_seed(self.seed + int(self.trainer.state.epoch or 0))
        return super().__iter__()


class _SyncReferenceAdapter(TrainerCallback):
    """Mixes the policy's adapter into the reference's every `ref_model_sync_steps` steps."""

    def __init__(self, reference: str):
        self.reference = reference

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            reference = adapters.adapter_parameters(model, self.reference)
            policy = adapters.adapter_parameters(model, "default")
            with gathered(policy.values()), gathered(reference.values(), write=True):
                for name, parameter in policy.items():
                    reference[name].data.lerp_(parameter.data, args.ref_model_mixup_alpha)
