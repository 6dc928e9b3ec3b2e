"""What a Trainer needs under each engine: DDP, FSDP, DeepSpeed or none. What trains is float32 and computes under
autocast, because steps of AdamW are below the resolution of 16 bits."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from bitsandbytes.optim import GlobalOptimManager
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from minionerec.model import adapters

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer  # what `AnyEngine` is mixed into
else:
    _Trainer = object


class AnyEngine(_Trainer):
    """A mixin for a Trainer that computes the same under every engine."""

    def __init__(self, *positional: object, args: TrainingArguments, **named: object):
        # Without a launcher, transformers would wrap the model in nn.DataParallel for all visible GPUs and multiply the
        # batch size; for a quantized model it would only multiply the batch size.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(*positional, args=args, **named)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin and plugin.mixed_precision_policy:  # accelerate would reduce gradients and return logits in 16 bits
            policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None)
            plugin.mixed_precision_policy = policy
        if self.is_deepspeed_enabled and self.args.bf16:
            # DeepSpeed would round what trains to bfloat16, compute and save that, and keep float32 to itself. Its
            # float16 stays, because its autocast clips gradients before it unscales them.
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["bf16"] = {"enabled": False}
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}

    def _build_accelerator_args(self, **kwargs: object) -> dict:
        """As the Trainer's. Under DDP, gradients are views of its buckets instead of a second copy."""
        args = super()._build_accelerator_args(**kwargs)
        args["kwargs_handlers"][0].gradient_as_bucket_view = True
        return args

    def autocast(self) -> AbstractContextManager[None]:
        """While open, matmuls compute in 16 bits, as in training. Under DeepSpeed accelerate leaves that to the engine,
        which evaluations and decoding do not go through."""
        if self.is_deepspeed_enabled:
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[None]:
        """As the Trainer's, which opens it around every loss and leaves autocast to accelerate."""
        return self.autocast() if self.is_deepspeed_enabled else super().autocast_smart_context_manager(cache_enabled)

    def unwrapped(self, model: nn.Module) -> nn.Module:
        """The model inside what accelerate has wrapped it in. accelerate visits every module to find it, which takes
        milliseconds in each micro-batch, so it is asked once."""
        known = self.__dict__.setdefault("_unwrapped", {})
        if model not in known:
            known[model] = self.accelerator.unwrap_model(model)
        return known[model]

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        with adapters.ready_for_fsdp(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        """As the Trainer's. It has bitsandbytes keep the states of every embedding in 32 bits, also of frozen ones, of
        which those in 8 bits have no weight to register, and of earlier models in this process."""
        manager = GlobalOptimManager.get_instance()
        manager.initialize()
        optimizer = super().create_optimizer(*args, **kwargs)
        registered = manager.module_weight_config_triple
        manager.module_weight_config_triple = [entry for entry in registered if entry[0].weight.requires_grad]
        return optimizer

    def float32_weights(self) -> dict[str, torch.Tensor]:
        """What trains, whole and in float32, which DeepSpeed rounds to float16 for the passes. All processes must call
        it."""
        from deepspeed.utils import safe_get_full_fp32_param

        named = ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)
        whole = ((name, safe_get_full_fp32_param(parameter)) for name, parameter in named)
        return {name: tensor.cpu() for name, tensor in whole if self.args.should_save}


@contextmanager
def bfloat16_files(with_deepspeed: bool) -> Iterator[None]:
    """While open, DeepSpeed also finds the files of a checkpoint of 0.1.0, whose names say that it was in bfloat16."""
    if not with_deepspeed:
        yield
        return
    from deepspeed import DeepSpeedEngine

    names = DeepSpeedEngine._get_all_zero_checkpoint_names

    def found(engine: object, folder: str, tag: str, bf16_mode: bool) -> list[str]:
        either = [names(engine, folder, tag, mode) for mode in (bf16_mode, not bf16_mode)]
        return next((files for files in either if all(map(os.path.exists, files))), either[0])

    DeepSpeedEngine._get_all_zero_checkpoint_names = found
    try:
        yield
    finally:
        DeepSpeedEngine._get_all_zero_checkpoint_names = names
