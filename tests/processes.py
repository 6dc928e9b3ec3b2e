"""Commands in processes of their own, for what only those show: signals, several ranks, engines.

The libraries take a new process 6 s to import. So one process imports them, once for all tests, and each process that a
test asks for is a fork of it. `torchrun` and `launch` start the launchers as a user does.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
import workers
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from helpers import ROOT, flag_words
from safetensors.torch import load_file

PAUSE = 0.02  # seconds between two looks at what a process has done
PRELOADED = ["workers", "lora_utils", "minionerec.dryrun.report", "minionerec.training.rl_trainer"]
PRELOADED += ["minionerec.training.sft_trainer", "minionerec.training.finish", "bitsandbytes", "matplotlib.pyplot"]
PRELOADED += ["deepspeed"] if find_spec("deepspeed") else []

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed")
ENGINES = [
    pytest.param("fsdp", marks=pytest.mark.engine),
    *(pytest.param(name, marks=[pytest.mark.engine, needs_deepspeed]) for name in ("zero2", "zero3")),
]
# A start, an adapter or a whole model, for each engine; both for plain data parallelism.
ENGINES_AND_STARTS = [("torchrun", "lora"), ("torchrun", "full")]
ENGINES_AND_STARTS += [
    pytest.param(*engine.values, start, marks=engine.marks)
    for engine, start in zip(ENGINES, ("lora", "lora", "full"), strict=True)
]


@cache
def start_fork_server() -> multiprocessing.context.ForkServerContext:
    """Starts the process that all others are forks of. There is one, which imports what the first to start it says."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}
    with mock.patch.dict(os.environ, PYTHONPATH=path, **one_thread):
        forkserver.ensure_running()
    return context


@cache
def _logs() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="minionerec-logs-")


@dataclass
class Started:
    """Processes of one command, rank by rank."""

    processes: list[BaseProcess]
    log: Path

    @property
    def errors(self) -> str:
        """What they wrote to standard error."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes; negative for a signal that ended a process."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, f"still there after {seconds} s: {self.errors[-3000:]}"
        return [process.exitcode for process in self.processes]

    def wait_for_checkpoint(self, output: Path, seconds: float = 200, count: int = 1) -> None:
        """Returns as soon as a running command has saved `count` checkpoints of a step in `output`. Several processes
        may still remove the last one: until all of them know that it is complete."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and len(list(output.glob("checkpoint-[1-9]*/trainer_state.json"))) < count:
            assert all(process.is_alive() for process in self.processes), self.errors[-3000:]
            time.sleep(PAUSE)


def start(mode: str, *argv: object, ranks: int = 1, engine: str = "torchrun") -> Started:
    """Starts a mode of workers.py with these arguments in as many processes as `ranks`; several, and those of
    an engine, are told what torchrun, or `accelerate launch` with the file of configs/ that `engine` names, would tell
    them."""
    environments = [{**os.environ}]
    if ranks > 1 or engine != "torchrun":
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        address |= {"LOCAL_WORLD_SIZE": str(ranks), **({} if engine == "torchrun" else engine_environment(engine))}
        environments = [{**os.environ, **address, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]
    return _start(mode, [[str(word) for word in argv]] * ranks, environments)


def start_nodes(mode: str, *argv: list[object]) -> Started:
    """Starts a mode of workers.py on as many nodes of one process as there are lists of arguments, told of each other
    as Slurm's scripts do: without torchrun's agents."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(argv))}
    address |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environments = [{**os.environ, **address, "RANK": str(i)} for i in range(len(argv))]
    return _start(mode, [[str(word) for word in words] for words in argv], environments)


def _start(mode: str, argv: list[list[str]], environments: list[dict[str, str]]) -> Started:
    log = Path(_logs().name) / f"{len(os.listdir(_logs().name))}.log"
    log.touch()
    processes = [
        start_fork_server().Process(target=workers.fork, args=(environment, str(log), mode, words), daemon=True)
        for environment, words in zip(environments, argv, strict=True)
    ]
    for process in processes:
        process.start()
    return Started(processes, log)


def start_command(script: str, flags: dict[str, object], **more) -> Started:
    """Starts a command line of the project in a process of its own."""
    return start("command", script, *flag_words(flags), **more)


# Stands in for a Python: asks quick_python for a process, lends it its own streams, passes signals on, and ends as that
# does.
CLIENT = """#!{python} -S
import json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"3"], [0, 1, 2])
    server.sendall(json.dumps([dict(os.environ), os.getcwd(), sys.argv[1:]]).encode() + b"\\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    sys.exit(int(server.recv(8)))
"""


@cache
def quick_python() -> str:
    """A command that shell scripts and launchers may take for Python: `COMMAND script.py --flags` runs in a fork, and
    `COMMAND -m module --flags`. A signal that ends the command ends the fork."""
    folder = Path(_logs().name)
    address, command = str(folder / "python.socket"), folder / "python"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    command.write_text(CLIENT.format(python=sys.executable, address=address))
    command.chmod(0o755)

    def answer(client: socket.socket) -> None:
        _, descriptors, *_ = socket.recv_fds(client, 1, 3)
        streams = [Connection(descriptor) for descriptor in descriptors]
        with client, client.makefile("rb", buffering=0) as asked:
            words = json.loads(asked.readline())
            process = start_fork_server().Process(target=workers.as_python, args=(streams, *words), daemon=True)
            process.start()
            for stream in streams:
                stream.close()
            while process.sentinel not in wait([process.sentinel, client]):
                number = asked.read(1)  # nothing once the command has been killed
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number[0] if number else signal.SIGKILL)
                if not number:
                    break
            process.join()
            with contextlib.suppress(OSError):
                client.sendall(str(process.exitcode % 256).encode())

    def listen() -> None:
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    return str(command)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@cache
def engine_environment(engine: str) -> dict[str, str]:
    """What `accelerate launch` tells the processes it starts with a file of configs/."""
    words = ["--config_file", str(ROOT / "configs" / f"{engine}.yaml"), "--main_process_port", "0", "script.py"]
    args = accelerate_launch._validate_launch_command(accelerate_launch.launch_command_parser().parse_args(words))[0]
    args.deepspeed_fields_from_accelerate_config = ""  # the command itself fills this in
    before = dict(os.environ)
    told = prepare_deepspeed_cmd_env(args)[1] if engine.startswith("zero") else prepare_multi_gpu_env(args)
    return {name: text for name, text in told.items() if name not in before}


def launcher_environment() -> dict[str, str]:
    """Of torchrun and `accelerate launch`, which start what PYTHON_EXEC names: forks, unless that is set."""
    settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}
    return {"PYTHON_EXEC": quick_python(), **os.environ, **settings}


def launch(module: str, *argv: object, code: int = 0) -> str:
    """Runs a launcher in a new process, checks its exit code and returns what it wrote to standard error. One that
    hangs ends with all the processes it started."""
    environment = launcher_environment()
    command = [sys.executable, "-m", module, *map(str, argv)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **streams) as process:
        try:
            _, errors = process.communicate(timeout=300)
        except BaseException:
            for started in [*psutil.Process(process.pid).children(recursive=True), process]:
                started.kill()
            raise
    assert process.returncode == code, errors[-3000:]
    return errors


def torchrun(*argv: object, **more) -> str:
    return launch("torch.distributed.run", "--standalone", "--nproc_per_node", 2, *argv, **more)


def two_processes(
    engine: str, folder: Path, script: str, flags: dict, mode: str = "watched", code: int = 0, launched: bool = False
) -> str:
    """Runs a command in two processes, as a mode of workers.py; returns what they wrote to standard error.

    `launched`: by torchrun or `accelerate launch` itself.
    """
    argv = [mode, folder, script, *flag_words(flags)]
    if launched and engine == "torchrun":
        errors = torchrun("tests/workers.py", *argv, code=code)
    elif launched:
        config = ["--config_file", f"configs/{engine}.yaml", "--main_process_port", free_port()]
        errors = launch("accelerate.commands.launch", *config, "tests/workers.py", *argv, code=code)
    else:
        started = start(*argv, ranks=2, engine=engine)
        codes, errors = started.wait(), started.errors
        assert codes == [code, code], errors[-3000:]
    if mode == "watched" and engine != "zero3":  # where each process holds its shard only
        assert (folder / "rank0").read_text() == (folder / "rank1").read_text()
    return errors


def assert_same_run(one: Path, two: Path, atol: float) -> None:
    """The same curve, and the same weights in final_checkpoint up to `atol`."""
    curves = []
    for run in (one, two):
        history = json.loads((run / "metrics.json").read_text())["history"]
        curves.append([entry[key] for entry in history for key in ("loss", "eval_loss", "eval_HR@10") if key in entry])
    assert len(curves[0]) > 10 and curves[1] == pytest.approx(curves[0], rel=1e-3, abs=1e-4)
    weights = [load_file(next((run / "final_checkpoint").glob("*model.safetensors"))) for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name].to(tensor.dtype), tensor, atol=atol, rtol=1e-3)


# Flags of a small LoRA run without chance, which several processes share.
ONE = {"use_lora": True, "lora_dropout": 0.0, "micro_batch_size": 4, "learning_rate": 1e-3}


def errors_of(started: Started) -> list[str]:
    return [line for line in started.errors.splitlines() if line.startswith(("sft.py: error: ", "process "))]
