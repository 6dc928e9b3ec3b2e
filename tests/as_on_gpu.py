"""The commands as on a GPU: they load and train in 16 bits, on the CPU, and compute together what a GPU does. Only the
functions that say what a device computes in, and how, are replaced.

    python tests/as_on_gpu.py sft.py --base_model ...
    AS_ON_GPU=float16 python tests/as_on_gpu.py evaluate.py --base_model ...
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def answer(name: str = "bfloat16"):
    """What stands in for `device.compute_dtype`."""
    import torch

    return lambda quantized=False: getattr(torch, name)


def starts_kernels(where) -> bool:
    """What stands in for `device.starts_kernels`."""
    return where.type != "meta"


def switch() -> None:
    """Turns this process into one on a GPU that computes in AS_ON_GPU."""
    from minionerec.model import device

    device.compute_dtype = answer(os.environ.get("AS_ON_GPU", "bfloat16"))
    device.starts_kernels = starts_kernels


def main() -> None:
    switch()
    sys.argv = sys.argv[1:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
