"""What runs in the processes that processes.py starts, one line a mode:

command sft.py --base_model ...             a command
watched FOLDER sft.py --base_model ...      a command, whose weights and counts are left in FOLDER
loss_is_nan FOLDER sft.py --base_model ...  sft.py with a loss that is NaN in the last process only
disk_is_full FOLDER sft.py --base_model ... sft.py whose first process cannot write a checkpoint
stops_in_a_step FOLDER sft.py --base_mod... sft.py whose last process gets SIGTERM in the middle of a step
runs_out FOLDER sft.py --base_model ...     sft.py or rl.py whose last process runs out of memory in a run
finds_less FOLDER rl.py --model_path ...    rl.py whose evaluations find less from step to step
last_steps BASE FOLDER                      an epoch whose last step has few rows, for every method
probe                                       what processes with shards find out about models

As a script it runs one of them under torchrun or `accelerate launch`.
"""

import errno
import gc
import hashlib
import json
import os
import runpy
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import as_on_gpu  # noqa: E402
from helpers import compile_templates_once, curves_undrawn  # noqa: E402

from minionerec import plots  # noqa: E402


def engines_on_cpus() -> None:
    """Lets accelerate and the Trainer start FSDP and DeepSpeed, which they keep for GPUs, on CPUs that talk over gloo.
    They shard, gather and save afterwards as they do on GPUs."""
    import peft.tuners.trainable_tokens.layer as trainable_tokens
    import transformers
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    start, check = PartialState.__init__, transformers.TrainingArguments.__post_init__

    def started(state, cpu=False, backend=None, **kwargs):
        start(state, **kwargs)

    def checked(args):
        args.use_cpu = False
        check(args)

    def on_cpu(state):
        state.device = torch.device("cpu")

    PartialState.__init__, PartialState.set_device = started, on_cpu
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    PartialState.wait_for_everyone = lambda state: dist.barrier()
    transformers.TrainingArguments.__post_init__ = checked
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    trainable_tokens.check_deepspeed_zero3_enabled = lambda: False  # it sends the rows of a new adapter from GPU to GPU
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed  # noqa: F401

        # It compiles a minute, to talk faster than gloo. The attribute `deepspeed.comm.torch` is torch itself.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def waits_end(seconds: int = 120) -> None:
    """A collective that another process never joins fails after `seconds`, not after half an hour."""
    from accelerate import PartialState

    start = PartialState.__init__

    def started(state, *args, **kwargs):
        start(state, *args, **{**kwargs, "timeout": timedelta(seconds=seconds)})

    PartialState.__init__ = started


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def command(script: str, *flags: str) -> None:
    """Runs a command line of the project."""
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def run(folder: str, script: str, flags: tuple[str, ...]) -> None:
    """Runs a command; every process leaves its exit code in `folder`."""
    code = 0
    try:
        command(script, *flags)
    except SystemExit as error:
        code = error.code
        raise
    except BaseException as error:
        code = repr(error)
        raise
    finally:
        Path(folder, f"rank{rank()}.exit").write_text(str(code))


def watched(folder: str, script: str, *flags: str) -> None:
    """Runs a command; every process leaves in `folder` a digest of the weights it trained and, of RL, for every pass
    of the loss how many of its completions counted. A reference that follows the policy does so every 2 steps."""
    from trl import GRPOConfig

    from minionerec.training import finish as end
    from minionerec.training.policy_loss import PolicyLoss

    finish, check, compute = end.finish, GRPOConfig.__post_init__, PolicyLoss.of_pass
    counted: list[int] = []

    def recorded(run, *args, **kwargs):
        digest = hashlib.sha256()
        for _, parameter in sorted(run.accelerator.unwrap_model(run.model).named_parameters()):
            if parameter.requires_grad:
                whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                digest.update(whole.detach().contiguous().view(torch.uint8).numpy().tobytes())
        Path(folder, f"rank{rank()}").write_text(digest.hexdigest())
        Path(folder, f"rank{rank()}.counted").write_text(json.dumps(counted))
        return finish(run, *args, **kwargs)

    def checked(config):
        config.ref_model_sync_steps = 2
        check(config)

    def computed(loss, model, part, *args, **kwargs):
        counted.append(int(part.completion_mask.any(dim=1).sum()))
        return compute(loss, model, part, *args, **kwargs)

    end.finish, GRPOConfig.__post_init__, PolicyLoss.of_pass = recorded, checked, computed
    run(folder, script, flags)


def loss_is_nan(folder: str, script: str, *flags: str) -> None:
    """Runs sft.py with a loss that is NaN at the fifth step, in the last process only."""
    from minionerec.training.sft_trainer import SFTTrainer

    compute = SFTTrainer.compute_loss

    def spoiled(run, *args, **kwargs):
        loss = compute(run, *args, **kwargs)
        bad = rank() == run.args.world_size - 1 and run.model.training and run.state.global_step == 4
        return loss * float("nan") if bad else loss

    SFTTrainer.compute_loss = spoiled
    run(folder, script, flags)


def disk_is_full(folder: str, script: str, *flags: str) -> None:
    """Runs sft.py with a first process that cannot write its second checkpoint."""
    from transformers import Trainer

    save, folders = Trainer._save, set()

    def full(run, output_dir, *args, **kwargs):
        folders.add(output_dir)
        if rank() == 0 and len(folders) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(run, output_dir, *args, **kwargs)

    Trainer._save = full
    run(folder, script, flags)


def stops_in_a_step(folder: str, script: str, *flags: str) -> None:
    """Runs sft.py whose last process gets SIGTERM in the second micro-batch of the third step."""
    from minionerec.training.sft_trainer import SFTTrainer

    compute, passes = SFTTrainer.compute_loss, []

    def stopped(trainer, *args, **kwargs):
        if trainer.model.training and trainer.state.global_step == 2:
            passes.append(trainer)
            if len(passes) == 2 and rank() == trainer.args.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return compute(trainer, *args, **kwargs)

    SFTTrainer.compute_loss = stopped
    run(folder, script, flags)


def runs_out(folder: str, script: str, *flags: str) -> None:
    """Runs sft.py or rl.py whose last process runs out of memory once, in the third step; leaves into how many parts
    each process splits its micro-batches then, or how large its passes are."""
    from minionerec.training.rl_trainer import ReReTrainer
    from minionerec.training.sft_trainer import SFTTrainer

    kind = SFTTrainer if script == "sft.py" else ReReTrainer
    compute, ran_out = kind.compute_loss, []

    def limited(trainer, *args, **kwargs):
        loss = compute(trainer, *args, **kwargs)
        late = trainer.state.global_step == 2 and trainer.accelerator.sync_gradients
        if late and rank() == trainer.args.world_size - 1 and not ran_out:
            ran_out.append(True)
            raise torch.OutOfMemoryError
        parts = trainer.halving.parts if kind is SFTTrainer else trainer.pass_size
        Path(folder, f"rank{rank()}.parts").write_text(str(parts))
        return loss

    kind.compute_loss = limited
    run(folder, script, flags)


def finds_less(folder: str, script: str, *flags: str) -> None:
    """Runs rl.py with evaluations that find less from step to step."""
    from minionerec.training import rl_run

    evaluate, measure = rl_run.RLRun.evaluate, rl_run.ranking_metrics

    def evaluated(run, *args, **kwargs):
        found = 1 / (1 + run.state.global_step)
        rl_run.ranking_metrics = lambda *ranks: {name: found * value for name, value in measure(*ranks).items()}
        return evaluate(run, *args, **kwargs)

    rl_run.RLRun.evaluate = evaluated
    run(folder, script, flags)


def last_steps(base: str, folder: str) -> None:
    """An epoch whose last step has fewer rows than micro-batches, for every method, against rows one by one."""
    from models import METHODS, check_last_step

    for method in METHODS:
        check_last_step(base, Path(folder, method), method)


def probe() -> None:
    """Ranks five prompts of different lengths, in batches of two and with weights sharded over two processes. Under
    FSDP every forward pass is a collective: all processes must try the same ways and run as many passes."""
    from architectures import build
    from plain import EOS, SIDS
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.models.bamba import modeling_bamba

    from minionerec.decoding import probe as probing
    from minionerec.decoding.beams import CopiedBeams, RereadBeams, TreeBeams
    from minionerec.decoding.probe import probe
    from minionerec.decoding.ranking import score_prompts
    from minionerec.decoding.trie import Trie

    modeling_bamba.apply_mask_to_padding_states = lambda states, _mask: states
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    prompts = [list(range(1, 1 + length)) for length in (9, 4, 17, 26, 5)]
    for architecture, beams in (("qwen2", TreeBeams), ("bamba", CopiedBeams), ("rwkv", RereadBeams)):
        found = {}
        for sharded in (False, True):
            model = build(architecture)
            if sharded:
                fully_shard(model, mesh=mesh)
                if dist.get_rank():  # what it finds out does not count
                    probing._distance = lambda *_: torch.tensor(torch.nan)
            scored = score_prompts(model, Trie(SIDS, EOS), prompts, 0, 4, batch_size=2)
            found[sharded] = [[index for index, _ in ranking] for ranking in scored]
            assert probe(model).beams is beams and probe(model).padding == (architecture == "qwen2")
        assert found[True] == found[False]
    dist.destroy_process_group()


MODES = (command, watched, loss_is_nan, disk_is_full, stops_in_a_step, runs_out, finds_less, last_steps, probe)
MODES = {mode.__name__: mode for mode in MODES}


def main(mode: str, *argv: str) -> None:
    compile_templates_once()
    plots.plot_curves = curves_undrawn
    waits_end()
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        engines_on_cpus()
    if "AS_ON_GPU" in os.environ:
        as_on_gpu.switch()
    MODES[mode](*argv)


def fork(environment: dict[str, str], log: str, mode: str, argv: list[str]) -> None:
    """Makes this fork a process as the shell would have started it, but for what is imported, and runs a mode."""
    gc.freeze()  # as conftest.py does
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with open(log, "ab", buffering=0) as errors, open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(errors.fileno(), sys.stderr.fileno())
    main(mode, *argv)


def as_python(streams: list, environment: dict[str, str], folder: str, words: list[str]) -> None:
    """Makes this fork what `python WORDS` starts in a folder, but for the libraries, which are imported: a script, a
    module after -m or a program after -c, with its flags, on the code of its own checkout."""
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("minionerec", "lora_utils", "helpers", "as_on_gpu"):
            del sys.modules[name]
    if words[0] == "-u":  # from torchrun
        del words[0]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, folder)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).absolute().parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
