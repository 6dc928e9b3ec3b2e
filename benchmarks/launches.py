"""Counts what bounds a small model on a GPU: kernels, and reads in which the host waits for a value on the device.

A kernel is a dispatched operator that would start one on a GPU; views and allocations start none. Counted on a CPU, on
models of width 64, with the paths that a GPU takes. The counts do not depend on the machine:

- SFT by `SFTTrainer` on token trees: kernels of a micro-batch (both passes), reads of a micro-batch, a step and a
  checkpoint, and the distinct shapes of the micro-batches of an epoch.
- RL by `ReReTrainer`: kernels and reads of an optimizer step of 10 prompts with 16 completions each, by phase.
- constrained beam search: kernels inside the model for a layer and pass, kernels outside it for a level, reads.

Each also with passes that are recorded as CUDA graphs; starting one counts as a kernel.

    python -m benchmarks.launches
    python -m benchmarks.launches --num_hidden_layers 4 --parts sft,decode
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.common import print_json, print_table, quiet
from benchmarks.fixtures import some_of
from minionerec import cli
from minionerec.flags import Flags, above_zero, command, flag


@dataclass(frozen=True, kw_only=True)
class LaunchFlags(Flags):
    """What is counted."""

    num_hidden_layers: int = flag(24, "decoder layers of the models.", above_zero)
    parts: str = flag("sft,rl,decode", "some of sft, rl, decode, separated by commas.", some_of("sft", "rl", "decode"))
    detail: bool = flag(False, "also print where the host reads, and the most frequent operators.")


@command(LaunchFlags)
def launches(flags: LaunchFlags) -> None:
    """Prints kernels and host reads of training and search, as on a GPU."""
    flags.problems().check()
    from benchmarks.counting import as_on_gpu, count_decoding, count_rl, count_sft

    quiet()
    layers, chosen, detail, results = flags.num_hidden_layers, flags.parts.split(","), flags.detail, {}
    with as_on_gpu():
        if "sft" in chosen:
            found = {method: count_sft(method, layers) for method in ("full", "lora", "qlora")}
            recorded = count_sft("lora", layers, recorded=True)
            say([*found.values(), recorded], detail)
            results |= {f"sft_{method}": counts["kernels a layer"] for method, counts in found.items()}
            results |= {"sft_reads": found["lora"]["reads of a micro-batch"], "shapes": recorded["shapes"]}
            results |= {"sft_recorded": recorded["kernels a layer"] * layers}
            results |= {f"{part}_reads": found["lora"][f"reads of a {part}"] for part in ("step", "checkpoint")}
        if "rl" in chosen:
            counts, recorded = count_rl(layers), count_rl(layers, recorded=True)
            say([counts, recorded], detail)
            results |= {"rl_kernels": counts["kernels"], "rl_reads": counts["reads"]}
            results |= {"rl_recorded": recorded["kernels"]}
        if "decode" in chosen:
            table = [count_decoding(layers, merged) for merged in (False, True)]
            say([*table, count_decoding(layers, merged=True, recorded=True)], detail)
            results |= {"decode": table[-1]["a layer and pass"], "decode_reads": table[-1]["reads"]}
            results |= {"decode_level": table[-1]["outside the model, a level"]}
    print_json("launches", layers=layers, **results)


def say(table: list[dict[str, Any]], detail: bool) -> None:
    hidden = ("read_at", "operators")
    print_table([{name: value for name, value in row.items() if name not in hidden} for row in table])
    print()
    for row in table if detail else ():
        print(row["way"])
        for name in hidden:
            print(*(f"    {count:6} {what}" for what, count in row[name].most_common(40)), sep="\n")


if __name__ == "__main__":
    cli.run(launches)
