"""Measures what bounds a step on this machine: what the host needs to start a kernel, and how fast the device computes
and copies.

A small model on a GPU waits for the host: its step takes about the number of kernels times the time to start one
(`benchmarks/launches.py` counts them). A large one is bound by matmuls or by memory. `--dry_run` estimates seconds from
these three.

    python -m benchmarks.card
"""

import time
from collections.abc import Callable

from benchmarks.common import print_json, print_table, quiet, seconds_of
from minionerec import cli

WIDTH, COPIED = 8192, 2**30  # of a matmul; elements of a copy


def card(width: int = WIDTH, copied: int = COPIED, calls: int = 2000) -> None:
    """Prints microseconds of the host for each kind of call, then TFLOP/s of a matmul and TB/s of a copy.

    Args:
        width: rows and columns of the matrices of a matmul.
        copied: elements of a copy.
        calls: calls of each kind that are timed.
    """
    quiet()
    import torch

    from minionerec.model.device import compute_dtype, local_device

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    device, dtype = local_device(), compute_dtype()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    small = torch.randn(16, 16, device=device)
    trained, linear = small.clone().requires_grad_(), torch.nn.Linear(16, 16, device=device)
    kinds: dict[str, Callable[[], object]] = {
        "a product of elements": lambda: small * small,
        "a matmul": lambda: small @ small,
        "a cast": lambda: small.to(torch.bfloat16),
        "a linear layer that trains": lambda: linear(trained),
        "an autograd function": lambda: Twice.apply(trained),
        "a read of a value": lambda: small[0, 0].item(),
    }

    # The host: how long a call keeps it, not the device.
    table = []
    for name, call in kinds.items():
        for _ in range(50):
            call()
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        table.append({"call": name, "host (us)": 1e6 * (time.perf_counter() - started) / calls})
        wait()
    print_table(table)

    # The device.
    matrix = torch.randn(width, width, device=device).to(dtype)
    source = torch.randn(copied, device=device, dtype=dtype)
    target = torch.empty_like(source)
    works: dict[str, Callable[[], object]] = {"matmul": lambda: matrix @ matrix, "copy": lambda: target.copy_(source)}
    seconds = {}
    for name, work in works.items():
        work()
        seconds[name] = seconds_of(lambda work=work: [work() for _ in range(5)]) / 5
    tflops, bandwidth = 2 * width**3 / seconds["matmul"] / 1e12, 2 * source.nbytes / seconds["copy"] / 1e12
    print(f"\n{dtype}: {tflops:.3g} TFLOP/s in a matmul, {bandwidth:.3g} TB/s in a copy\n")
    print_json("card", host=table, tflops=tflops, tb_per_second=bandwidth)


if __name__ == "__main__":
    cli.run(card)
