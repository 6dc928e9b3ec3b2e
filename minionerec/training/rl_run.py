"""An RL run around its steps: its log, its evaluations and its checkpoints."""

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import datasets
from accelerate.utils import save_fsdp_model
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerControl
from transformers.distributed.fsdp import get_fsdp_ckpt_kwargs
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from minionerec.checkpoint import Checkpoint
from minionerec.decoding.ranking import score_prompts
from minionerec.decoding.trie import Trie
from minionerec.metrics import rank_of, ranking_metrics, watched_cutoff
from minionerec.model.sharding import OwnedWeights
from minionerec.saving import make_readable
from minionerec.training.averaging import UNAVERAGED_FILE, WeightAverage
from minionerec.training.durable import DurableRun
from minionerec.training.reference import REFERENCE_FILE, Reference
from minionerec.training.rl_log import RLLog


class RLRun(DurableRun, GRPOTrainer):
    """GRPO whose model is evaluated by how it ranks the catalogue. The weights to evaluate and save may be an average
    of those it trains, and a checkpoint holds a reference that moves."""

    control: TrainerControl
    trie: Trie
    sids: Sequence[str]
    reference: Reference | None = None
    step_log: RLLog
    average_weights: bool
    average: WeightAverage | None = None  # once an engine has sharded the weights
    test_beam: int
    test_batch_size: int

    def train(self, resume: Checkpoint | None = None, **kwargs: object) -> TrainOutput:
        result = super().train(resume, **kwargs)
        if self.average and not self.loads_best:  # else the best checkpoint, an average, was loaded
            self.average.swap()
        return result

    def _averaged(self) -> AbstractContextManager[None]:
        """While open, the model has the weights to evaluate and save."""
        return self.average.in_place() if self.average else nullcontext()

    # --- The log ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.step_log.read()
        super().log(logs, start_time)

    @property
    def unlogged_metrics(self) -> dict[str, list]:
        return self.step_log.metrics

    def unlogged(self) -> dict[str, object]:
        return {**super().unlogged(), "metrics": self.step_log.state()}

    def continue_log(self, before: dict) -> None:
        super().continue_log(before)
        self.model.train()  # TRL logs by the mode of the model, which a finished run that is resumed never sets
        self.step_log.resume(before.get("metrics", {}))

    # --- Evaluations and the best model -------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """HR@K, NDCG@K and MRR over the rows of the evaluation dataset, decoded with `test_beam` beams; and `mean@K`,
        the geometric mean of HR@K and NDCG@K, in which 1% of either counts the same."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        training, model = self.model.training, self.unwrapped(self.model)
        self.model.eval()
        sizes = self._tokenizer.pad_token_id, self.test_beam, self.test_batch_size
        with self._averaged(), self.autocast():
            rankings = score_prompts(model, self.trie, dataset["prompt"][:], *sizes)
        ranked = zip(dataset["target"], rankings, strict=True)
        ranks = [rank_of(target, [self.sids[index] for index, _ in ranking]) for target, ranking in ranked]
        length = min(self.test_beam, len(self.trie))
        metrics, k = ranking_metrics(ranks, length), watched_cutoff(length)
        metrics[f"mean@{k}"] = math.sqrt(metrics[f"HR@{k}"] * metrics[f"NDCG@{k}"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(training)
        return metrics

    def _evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """As the Trainer's. The model before the first step counts: it is the best one, whose weights are saved as
        checkpoint-0, until a later one has a better metric."""
        metrics = super()._evaluate(*args, **kwargs)
        if self.state.global_step == 0 and self.args.load_best_model_at_end:
            self._determine_best_metric(metrics, None)
            # The Trainer takes a best step of 0 for none.
            self.state.best_model_checkpoint = os.path.join(self.args.output_dir, "checkpoint-0")
            self._save_checkpoint(self.model, None)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: None) -> bool:
        """As the Trainer's, but only at steps that are also saved: a better model without a checkpoint cannot be loaded
        at the end."""
        step = self.state.global_step
        saved = step % self.state.save_steps == 0 or step == self.state.max_steps
        return saved and super()._determine_best_metric(metrics, trial)

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def create_model_card(self, **kwargs: object) -> None:
        """Does nothing. TRL would write a model card with every checkpoint; ours is the recorded configuration."""

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        with self._averaged():
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step == 0 and not self.is_deepspeed_enabled:
            # Before the first step there is nothing to resume. To have a state to save, FSDP would make a step, which
            # AdamW would count.
            if self.is_fsdp_enabled:
                plugin = self.accelerator.state.fsdp_plugin
                save_fsdp_model(plugin, self.accelerator, self.model, output_dir, **get_fsdp_ckpt_kwargs())
            return
        files, keep = {}, self.args.should_save
        if self.reference:
            files[REFERENCE_FILE] = self.reference.state(keep)
        if self.average:
            files[UNAVERAGED_FILE] = self.average.state(keep)
        for name, tensors in files.items():
            if tensors:
                with self._writing_checkpoint():
                    save_file(tensors, os.path.join(output_dir, name))
        if keep:
            make_readable(output_dir)
        super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.reference and resume_from_checkpoint:
            self.reference.resume(resume_from_checkpoint)
        if self.average_weights:
            self.average = WeightAverage(OwnedWeights(self.unwrapped(self.model), self.model_wrapped))
            self.add_callback(self.average)
            if resume_from_checkpoint:
                self.average.resume(resume_from_checkpoint)
        return prepared
