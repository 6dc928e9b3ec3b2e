"""Passes kernel by kernel against the same passes recorded as CUDA graphs: seconds, and how far results are apart.

- SFT: losses and gradients of a token tree, LoRA with dropout 0 and all weights.
- RL: log-probabilities of completions and their gradients, LoRA.
- constrained beam search, with the adapter and merged.

    python -m benchmarks.graphs                                                   # the shape of Qwen2.5-0.5B, on a GPU
    python -m benchmarks.graphs --hidden_size 64 --num_hidden_layers 2 --num_attention_heads 4 --vocab_size 2048

Without a GPU, tapes that keep the rules of CUDA graphs take their place: results count there, seconds do not.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from benchmarks.common import interleaved_medians, print_json, print_table, quiet
from benchmarks.fixtures import SmallShapeFlags
from minionerec import cli
from minionerec.flags import above_zero, command, flag

PROMPTS, GENERATIONS, BEAMS = 8, 16, 20


def compare(way: str, adapted: str, shape: dict[str, int], tokens: int, repeats: int) -> dict[str, Any]:
    """A row of the table: one `way` (sft, rl or search) of a model that is adapted, merged or trained in full."""
    import torch

    import lora_utils
    from benchmarks.rl_step import setting
    from minionerec.decoding.beam_search import constrained_beam_search
    from minionerec.decoding.trie import Trie
    from minionerec.model import device, graphs
    from minionerec.model.fewer_kernels import use_fewer_kernels
    from minionerec.model.groups import join_frozen_layers
    from minionerec.model.token_trees import TreeCollator
    from minionerec.training.logprobs import completion_logps
    from minionerec.training.sft_trainer import tree_losses

    tokenizer, model, adapter, _, sequences, prompts, _ = setting(shape, 3000, PROMPTS, tokens, 0)
    dtype = model.dtype
    if adapted == "full":
        model.to(device.master_dtype())
    use_fewer_kernels(model)
    if adapted != "full":
        model = lora_utils.add_lora(model, adapter)
    if adapted == "merged":
        model = model.merge_and_unload()
        join_frozen_layers(model)
    model.train(way != "search")
    where, trie = device.local_device(), Trie(sequences, tokenizer.eos_token_id).to(device.local_device())
    ids, mask = torch.tensor(prompts, device=where), torch.ones(PROMPTS, tokens, dtype=torch.long, device=where)
    answers = trie.sequences[: PROMPTS * GENERATIONS].clamp(min=0)
    repeated = [of.repeat_interleave(GENERATIONS, dim=0) for of in (ids, mask)]
    rows = [{"input_ids": [*ids, *sids.tolist()], "prompt_length": tokens} for ids, sids in zip(prompts, answers)]  # noqa: B905
    tree = {name: of.to(where) for name, of in TreeCollator(0, shape["hidden_size"], 16)(rows).items()}
    names = tuple(tree)

    def losses_of(*tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (tree_losses(model, dict(zip(names, tensors, strict=True)), dtype=dtype)[0],)

    def losses() -> torch.Tensor:
        with torch.autocast(where.type, dtype, enabled=dtype != torch.float32):
            if way == "sft":
                recorded = graphs.of(model)
                return (recorded(("trees",), losses_of, *tree.values()) if recorded else losses_of(*tree.values()))[0]
            groups = [GENERATIONS] * PROMPTS
            present = torch.ones_like(answers)
            return completion_logps(model, *repeated, answers, present, shared=True, width=tokens, groups=groups)[0]

    def one() -> torch.Tensor:
        """A pass as the product makes it: its results and, in training, its gradients, in one tensor."""
        if way == "search":
            return constrained_beam_search(model, ids, mask, trie, BEAMS)[1].flatten()
        model.zero_grad()
        found = losses()
        found.sum().backward()
        norms = torch._foreach_norm([p.grad.float() for p in model.parameters() if p.grad is not None])
        return torch.cat([found.detach().flatten(), torch.stack(norms)])

    said: list[str] = []
    eager = one()
    graphs.record(model, True, said.append)
    recorded = vars(graphs._base_of(model)).get("_graphs")

    def switched(on: bool) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            if recorded is not None and not said:
                recorded.on = on
            return one()

        return run

    for _ in range(3):
        found = switched(True)()
    seconds = interleaved_medians({"eager": switched(False), "recorded": switched(True)}, repeats)
    apart = (found - eager).abs().max() / eager.abs().max()
    return {
        "pass": f"{way}, {adapted}",
        "eager (ms)": 1000 * seconds["eager"],
        "recorded (ms)": 1000 * seconds["recorded"],
        "times": seconds["eager"] / seconds["recorded"],
        "apart": f"{apart:.0e}",
        "recorded": said[0] if said else "yes" if recorded is not None else "no recordings here",
    }


@dataclass(frozen=True, kw_only=True)
class GraphFlags(SmallShapeFlags):
    """The shape of the model, that of Qwen2.5-0.5B where nothing is said, and what runs through it."""

    hidden_size: int = flag(896, "width of the model.", above_zero)
    num_hidden_layers: int = flag(24, "decoder layers.", above_zero)
    num_attention_heads: int = flag(14, "query heads.", above_zero)
    vocab_size: int = flag(151936, "rows of the embedding.", above_zero)
    prompt_tokens: int = flag(120, "tokens of a prompt.", above_zero)
    repeats: int = flag(5, "timed passes; medians count.", above_zero)


@command(GraphFlags)
def graphs(flags: GraphFlags) -> None:
    """Prints seconds of passes, kernel by kernel and recorded, and how far their results are apart."""
    flags.problems().check()
    import torch

    from benchmarks.counting import as_on_gpu

    quiet()
    ways = [("search", "lora"), ("search", "merged"), ("rl", "lora"), ("sft", "lora"), ("sft", "full")]
    with nullcontext() if torch.cuda.is_available() else as_on_gpu():
        table = [compare(*of, flags.shape, flags.prompt_tokens, flags.repeats) for of in ways]
    print_table(table)
    print_json("graphs", table=table, shape=flags.shape)


if __name__ == "__main__":
    cli.run(graphs)
