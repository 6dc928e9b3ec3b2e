"""The reference of an RL run: the model that the KL term holds the policy to."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from trl import GRPOConfig
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import use_adapter

from minionerec.flags import engine
from minionerec.model import adapters, device
from minionerec.model.fewer_kernels import refresh_frozen_norms
from minionerec.model.sharding import gathered, overwrite, whole_tensors
from minionerec.training.resume import load_tensors

REFERENCE_FILE = "reference.safetensors"  # in a checkpoint: the weights of a reference that moves with the policy
COPY = "ref"  # the name of a frozen copy of the policy's adapter


@contextmanager
def as_given(model: PreTrainedModel | PeftModel, args: GRPOConfig) -> Iterator[None]:
    """While open, GRPOTrainer can be built around a model; at the end both arguments are what they were. TRL would make
    a reference of its own, which handles neither SID rows nor a merged start; round the adapter of a quantized base to
    bfloat16, where steps of 1e-6 would vanish; and put a head that we do not use around the model's forward method."""
    adapted = is_peft_model(model)
    inner = vars(model.get_base_model() if adapted else model)
    forward = {name: inner[name] for name in ("forward",) if name in inner}
    trained = [(parameter, parameter.data) for parameter in model.parameters() if adapted and parameter.requires_grad]
    beta, sync = args.beta, args.sync_ref_model
    args.beta, args.sync_ref_model = 0.0, False
    try:
        yield
    finally:
        args.beta, args.sync_ref_model = beta, sync
        for parameter, values in trained:
            parameter.data = values.to(parameter.device)
        inner.pop("forward", None)
        inner.update(forward)


def disable_dropout(model: nn.Module) -> None:
    """Turns off every dropout of a model, in place: that of modules, and that whose probability is a number of a layer
    (`attention_dropout`, `layerdrop`), which TRL's own function leaves on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class Reference(TrainerCallback):
    """The policy as it was at the start, so that the KL term is exactly 0 before the first step; with `sync_ref_model`
    it then follows the policy, every `ref_model_sync_steps` steps.

    | the policy | the reference |
    |---|---|
    | a model with a new adapter | the model with that adapter disabled; a copy of the adapter if it is to follow |
    | a model with a trained adapter | a frozen copy of the adapter |
    | a whole model, trained in full | a frozen copy of the model, rounded as autocast rounds the policy |

    Attributes:
        whole: the frozen copy of a whole model, as accelerate prepared it; else None.
        adapter: the name of the frozen copy of an adapter; else None.
        follows: whether it moves.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, new_adapter: bool, follows: bool, accelerator: Accelerator):
        self.policy, self.follows, self.accelerator = policy, follows, accelerator
        self.whole: nn.Module | None = None
        self.adapter: str | None = None
        if not is_peft_model(policy):
            self.whole = self._prepare(copy.deepcopy(policy).eval().requires_grad_(False))
        elif follows or not new_adapter:
            self.adapter = COPY
            adapters.copy_adapter(policy, "default", COPY)

    def _prepare(self, model: PreTrainedModel) -> nn.Module:
        # FSDP rounds every weight of the policy, autocast only those of matmuls.
        adapters.round_weights(model, device.compute_dtype(), all_of_them=engine() == "FSDP")
        if device.weights_are_sharded():  # as those of the policy, because one GPU may not hold them
            prepare = prepare_fsdp if engine() == "FSDP" else prepare_deepspeed
            return prepare(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """While open, the model that computes the log-probabilities of the reference."""
        if self.whole is not None:
            yield self.whole
        elif self.adapter:
            with use_adapter(self.policy, self.adapter):
                yield self.policy
        else:
            # PEFT's `disable_adapter` describes every layer in words first, which takes 14 ms more at 24 layers.
            self.policy.base_model.disable_adapter_layers()
            try:
                yield self.policy
            finally:
                self.policy.base_model.enable_adapter_layers()

    def on_step_end(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Moves the reference towards the policy."""
        if not self.follows or state.global_step % args.ref_model_sync_steps:
            return
        if self.whole is not None:
            SyncRefModelCallback.sync_target_model(self.policy, self.whole, args.ref_model_mixup_alpha)
            refresh_frozen_norms(self.accelerator.unwrap_model(self.whole))
            return
        reference, policy = self._moving(), adapters.adapter_parameters(self.policy, "default")
        with gathered(policy.values()), gathered(reference.values(), write=True):
            for name, parameter in policy.items():
                reference[name].data.lerp_(parameter.data, args.ref_model_mixup_alpha)

    def _moving(self) -> dict[str, nn.Parameter]:
        """Its parameters if it moves, else none."""
        if not self.follows:
            return {}
        if self.whole is not None:
            return dict(self.accelerator.unwrap_model(self.whole).named_parameters())
        return adapters.adapter_parameters(self.policy, COPY)

    def state(self, keep: bool) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of it, in the processes that `keep` it. All processes must call it."""
        return whole_tensors(self._moving(), keep)

    def resume(self, checkpoint: str) -> None:
        """Takes over what `state` gave. Raises InputError if the checkpoint has lost it."""
        if self.follows:
            overwrite(self._moving(), load_tensors(checkpoint, REFERENCE_FILE))
