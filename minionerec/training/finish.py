"""The end of a run: final_checkpoint, metrics.json and curves.png."""

import os

import torch
from transformers import Trainer

from minionerec.model import device, loading
from minionerec.model.sharding import with_sid_rows_merged
from minionerec.model_card import write_card
from minionerec.output import whole_folder, writing
from minionerec.saving import make_portable, write_json


def folder_size_mb(path: str) -> float:
    """The size of the files in a folder, in MB (1e6 bytes)."""
    return sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path)) / 1e6


def save_final(trainer: Trainer, path: str, merge: bool = False, dtype: torch.dtype | None = None) -> None:
    """Saves the trainer's model, tokenizer and resolved configuration as a folder, atomically.

    With `merge`, trained rows are written into the base and a standalone model is saved. `dtype` is the precision of
    the saved weights if it differs from that of training: the float32 weights of full fine-tuning stay in the
    checkpoints that a run resumes from. Every process must call it.
    """
    trainer.save_dtype = dtype
    with whole_folder(path, trainer.args.should_save) as partial:
        if merge:
            state = _merge(trainer)
            if trainer.args.should_save and dtype not in (None, trainer.model.dtype):  # loading had rounded the base
                state = state if state is not None else trainer.model.state_dict()
                state = loading.unrounded(state, trainer.model.config._name_or_path, dtype)
            trainer.model.config.use_cache = True
            trainer._save(partial, state)  # not by the engine, which still holds the adapted model
        else:
            trainer.model.config.use_cache = True
            trainer.save_model(partial)
        if trainer.args.should_save:
            make_portable(partial)
    trainer.accelerator.wait_for_everyone()


def _merge(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """Replaces the trainer's adapted model by a plain one with the trained rows. Where weights are sharded, that model
    is without weights, and its whole state is returned in the first process."""
    if not device.weights_are_sharded():
        trainer.model = trainer.model.merge_and_unload()
        return None
    base = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    state = with_sid_rows_merged(base, state) if trainer.args.should_save else {}
    with torch.device("meta"):
        trainer.model = type(base)(base.config).to(base.dtype)
    trainer.model.generation_config = base.generation_config
    return state


def finish(
    trainer: Trainer, counts: dict, panels: dict, merge: bool = False, dtype: torch.dtype | None = None
) -> dict[str, object]:
    """Saves final_checkpoint, metrics.json and curves.png in the run's folder; returns the metrics: `counts`, how well
    the best checkpoint did, and what the run cost.

    Every process must call it; `merge` and `dtype` as in `save_final`.
    """
    metrics = {
        "method": trainer.run["method"],
        **counts,
        "steps": trainer.state.global_step,
        "seconds": trainer.seconds,
        f"best_{trainer.args.metric_for_best_model}": trainer.best_metric,
        "best_checkpoint": trainer.best_checkpoint,
        "peak_memory_gb": trainer.peak_memory_gb,
    }
    output_dir = trainer.args.output_dir
    final = os.path.join(output_dir, "final_checkpoint")
    then = "; make room, then the same command with --resume_from_checkpoint True writes it"
    with writing(final, then):
        save_final(trainer, final, merge, dtype)
    if trainer.args.should_save:
        from minionerec.plots import plot_curves

        print(f"saved {final}")
        metrics["checkpoint_mb"] = folder_size_mb(final)
        history = trainer.state.log_history
        path = os.path.join(output_dir, "metrics.json")
        with writing(path, then):
            write_json(path, {**metrics, "history": history})
        with writing(final, then):
            write_card(final, trainer.run, metrics)
        path = os.path.join(output_dir, "curves.png")
        with writing(path, then):
            plot_curves(history, path, panels)
    return metrics
