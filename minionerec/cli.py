"""Fire made strict, and the ways a command ends badly: bad input (exit code 2), a run that cannot continue (1), stopped
by the user (130).

Fire itself forgives too much: an unknown flag fails only after the whole run, `--use_lora false` is the (true) string
'false', `q_proj,v_proj` becomes a tuple, `--output_dir 2018` an int. Here every flag is checked against the signature
and its annotation before the command starts, and Fire receives values that can be read in one way only.
"""

import difflib
import inspect
import math
import os
import re
import sys
import threading
import traceback
import typing
from collections.abc import Callable

from minionerec import world
from minionerec.errors import InputError, RunError
from minionerec.output import hide_noise, why_not_written

# On a CPU, PyTorch and oneDNN each keep 1024 compiled kernels, one for every width a batch has had: 1.2 GB of a QLoRA
# run on a small base, and the older ones save no time. Read when torch is imported.
KERNEL_CACHE_LIMITS = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# Flags that save memory and what to say of them, what costs least first.
SAVES_MEMORY = {
    "micro_batch_size": "a smaller --micro_batch_size",
    "train_batch_size": "a smaller --train_batch_size",
    "eval_batch_size": "a smaller --eval_batch_size",
    "batch_size": "a smaller --batch_size",
    "num_beams": "a smaller --num_beams",
    "num_generations": "a smaller --num_generations",
    "gradient_checkpointing": "--gradient_checkpointing True",
    "cutoff_len": "a smaller --cutoff_len",
    "use_qlora": "--use_qlora True",
    "hidden_size": "a smaller --hidden_size",
}
# OpenMP threads wait for each other at the end of every kernel, by default in a busy loop. On a CPU that other
# processes use too, a thread then spins while the one it waits for has no core: a step takes ten times as long.
# libgomp, which is part of PyTorch's CPU and CUDA wheels, reads it when torch is imported.
THREADS_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}


def parse_value(text: str, annotation: object) -> object:
    """The value of a flag from its text. Raises ValueError, naming what is expected, where the text does not fit.

    `annotation` is bool, int, float or str, or one of them `| None` (then the text None gives None) or `| Literal[...]`
    (then these words are values, too).
    """
    choices = typing.get_args(annotation) or (annotation,)
    words = [word for choice in choices for word in typing.get_args(choice)]
    if text in words:
        return text
    if type(None) in choices and text in ("None", "none"):
        return None
    kind = next(choice for choice in choices if choice is not type(None))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(" or ".join(["True or False", *words]))
        return text.lower() == "true"
    if kind is int:
        try:
            number = int(text)
        except ValueError:
            raise ValueError(" or ".join(["a whole number", *words])) from None
        if abs(number) >= 2**63:  # which the libraries refuse, each in its way
            raise ValueError("a whole number of 64 bits")
        return number
    if kind is float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(" or ".join(["a number", *words])) from None
        if not math.isfinite(value):
            raise ValueError("a finite number")
        return value
    return text


def parse_flags(argv: list[str], parameters: dict[str, inspect.Parameter]) -> dict[str, str]:
    """Flag texts by name from `--name value`, `--name=value` and, for a switch, `--name` alone.

    A flag given twice has its last value, so that scripts can be overridden. Raises InputError with every unknown,
    valueless, positional or mistyped argument.
    """
    values: dict[str, str] = {}
    problems: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--") or word == "--":
            problems.append(f"{word!r} is not a flag; write every value as --name value")
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        parameter = parameters.get(name)
        if not equals:
            if position < len(argv) and not argv[position].startswith("--"):
                text = argv[position]
                position += 1
            elif parameter is not None and parameter.annotation is bool:
                text = "True"
            elif parameter is not None:
                problems.append(f"--{name} needs a value")
                continue
        if parameter is None:
            close = [f"use_{name}"] if f"use_{name}" in parameters else difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean --{close[0]}?" if close else "--help lists the flags"
            problems.append(f"unknown flag --{name}; {hint}")
        else:
            try:
                parse_value(text, parameter.annotation)
                values[name] = text
            except ValueError as expected:
                problems.append(f"--{name} {text!r} is not valid; expected {expected}")
    if problems:
        raise InputError(problems)
    return values


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return (
        type(error).__name__ in ("OutOfMemoryError", "MemoryError")
        or "CUDA out of memory" in text
        or "DefaultCPUAllocator: can't allocate memory" in text
    )


def _what_saves_memory(parameters: dict, values: dict[str, str]) -> str:
    """The advice of a command without memory: flags that it has, that are not set to that already, and that the others
    do not refuse."""
    given = {name for name, text in values.items() if text.lower() == "true"}
    says = {name: text for name, text in SAVES_MEMORY.items() if name in parameters and name not in given}
    if "micro_batch_size" in says:
        del says["batch_size"]  # there the size of an optimizer step, which accumulates
    if given & {"freeze_LLM", "train_from_scratch"}:  # which take no adapter
        says.pop("use_qlora", None)
    replaced = [f"--{name}" for name in ("use_lora", "load_in_8bit") if name in given]
    if replaced and "use_qlora" in says:
        says["use_qlora"] += f" instead of {' and '.join(replaced)}"
    advice = ", ".join(says.values())
    if not advice:  # the command only loads a model
        return "out of memory. To run it on the CPU instead of a GPU, put CUDA_VISIBLE_DEVICES= before the command"
    return f"out of memory. What helps, in this order: {advice}"


def set_environment() -> None:
    """Sets what torch reads when it is imported, here and in child processes; what the user has set stays."""
    for variable, value in {**KERNEL_CACHE_LIMITS, **THREADS_SLEEP}.items():
        os.environ.setdefault(variable, value)


def run(command: Callable[..., object]) -> None:
    """Runs `command` as a Fire command line built from `sys.argv` and exits.

    Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C, 141 standard output was closed. Problems go to
    standard error, one line each. A process of a distributed run that fails ends the others with its exit code.
    """
    import fire

    set_environment()
    threading.excepthook = _in_thread
    hide_noise()
    script = os.path.basename(sys.argv[0])
    parameters = dict(inspect.signature(command).parameters)
    argv = sys.argv[1:]
    try:
        if "--help" in argv or "-h" in argv:
            text = fire.helptext.HelpText(command, trace=fire.trace.FireTrace(command, name=script))
            print(re.sub(r"-\w, (?=--)", "", text), flush=True)  # single letters are not flags here
            return
        values = parse_flags(argv, parameters)
        parsers = {
            name: (lambda text, annotation=parameter.annotation: parse_value(text, annotation))
            for name, parameter in parameters.items()
        }
        # Fire prints whatever a command returns; the commands print for themselves.
        fire.Fire(
            fire.decorators.SetParseFns(**parsers)(command),
            command=[f"--{name}={text}" for name, text in values.items()],
            name=script,
            serialize=lambda result: None,
        )
        _end_together()
        sys.stdout.flush()
    except InputError as error:
        if error.everywhere:
            _complain(script, *error.problems, everywhere=True)
        else:
            if not world.said_by_first(error.problems):
                _complain(script, *[_where() + problem for problem in error.problems])
            world.end_others(2, error.problems)
        sys.exit(2)
    except RunError as error:
        _complain(script, str(error), of_run=True, everywhere=error.everywhere)
        if not error.everywhere:
            world.end_others(error.exit_code, [str(error)])
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain(script, "stopped", everywhere=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.exit(141)
    except Exception as error:
        if why := why_not_written(error):
            _complain(script, f"cannot write: {why}")
        elif _out_of_memory(error):
            _complain(script, _what_saves_memory(parameters, values))
        elif world.lost_a_process(error):
            _complain(script, "another process of the run no longer answers", of_run=True)
        elif world.size() > 1:
            traceback.print_exc()
        else:
            raise
        world.end_others(1, [f"{type(error).__name__}: {error}"])
        sys.exit(1)
    finally:
        _drop_unwritten_output()


def _in_thread(failed: threading.ExceptHookArgs) -> None:
    """As Python's hook, but silent about files that a tracker's thread cannot write: the command says so itself."""
    if failed.exc_value is None or not why_not_written(failed.exc_value):
        threading.__excepthook__(failed)


def _drop_unwritten_output() -> None:
    """Python flushes standard output again at its exit. Where that failed before, it goes nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end_together() -> None:
    """Ends a distributed run: a process that exits while another is still in the last collective may break it off."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        world.stop_watching()
        torch.distributed.destroy_process_group()


def _where() -> str:
    """The process and node that a problem is found on, where others may not have it."""
    if world.on_several_nodes():
        return f"on {world.node()}, process {world.rank()}: "
    return f"process {world.rank()}: " if world.rank() else ""


def _complain(script: str, *problems: str, of_run: bool = False, everywhere: bool = False) -> None:
    """Prints problems: from each process that fails, or where they fail `everywhere`, from the first only."""
    if everywhere and os.environ.get("RANK", "0") != "0":
        return
    if of_run:
        print(file=sys.stderr)  # a progress bar may stand on the line
    for problem in problems:
        print(f"{script}: error: {problem}", file=sys.stderr)
