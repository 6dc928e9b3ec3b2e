"""The arguments that both trainers share, from the flags."""

import os

import torch

from minionerec.flags import TrainingFlags
from minionerec.model import device

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
_LOGGED: list[str] = []  # folders that runs of this process have put there


def shared_arguments(flags: TrainingFlags) -> dict[str, object]:
    """Arguments of `transformers.TrainingArguments` and `trl.GRPOConfig`: device, precision, logs and checkpoints.

    The trackers take the project and the folder from the environment, which is set here.
    """
    if flags.wandb_project:
        os.environ["WANDB_PROJECT"] = flags.wandb_project
    if os.environ.get(_TENSORBOARD) in (None, *_LOGGED):  # not the user's
        os.environ[_TENSORBOARD] = os.path.join(flags.output_dir, "tensorboard")
        _LOGGED.append(os.environ[_TENSORBOARD])
    return {
        "output_dir": flags.output_dir,
        "run_name": flags.wandb_run_name or None,
        "report_to": flags.tracker,
        "seed": flags.seed,
        "optim": flags.optim,
        **device.mixed_precision(quantized=flags.bits < 16),
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": device.local_device().type == "cuda",
        "ddp_find_unused_parameters": False,
        "activation_checkpointing": flags.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if flags.gradient_checkpointing else None,
        "remove_unused_columns": False,
        "logging_steps": 0.01,
        "logging_nan_inf_filter": False,  # waits for the device in every micro-batch; `DurableRun` watches the losses
        "save_strategy": "steps",
        # With 1, the Trainer keeps only the best checkpoint and deletes the newest, which resuming needs.
        "save_total_limit": 2,
    }
