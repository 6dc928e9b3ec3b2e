"""Ranks the next item of every row of a test file by constrained beam search: HR@K, NDCG@K and MRR.

Takes the flags of MiniOneRec's evaluate.py. New are adapter checkpoints, a trie in tensors that decodes all beams of a
prompt against one prompt cache, data-parallel evaluation, and MRR.

    python evaluate.py --base_model out/lora/final_checkpoint --info_file info.txt --test_data_path test.csv \\
        --category Industrial_and_Scientific --result_json_data out/lora/result.json
    torchrun --nproc_per_node 2 evaluate.py --base_model ...
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minionerec import cli
from minionerec.checkpoint import Checkpoint, check_model, is_adapter
from minionerec.data.files import Interaction, count_rows, read_info, read_interactions
from minionerec.data.prompts import RECOMMENDATION, Prompts, Task
from minionerec.errors import InputError, Problems
from minionerec.flags import PromptFlags, above_zero, check_writable, command, flag
from minionerec.metrics import format_metrics, popularity, rank_of, ranking_metrics
from minionerec.process_memory import importing
from minionerec.saving import write_json

WITH_BASE = "give the folder of the base as --base_model, and this one as --adapter"


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(PromptFlags):
    """The flags of evaluate.py."""

    base_model: str = flag("", "a whole checkpoint, or an adapter one, whose base is then found from the adapter.")
    adapter: str = flag("", "an adapter checkpoint to load on base_model, instead of on the base it names.")
    train_file: str = flag(
        "",
        "CSV of training interactions; given, the popularity baseline is printed too, and separately the rows whose "
        "target it does not hold.",
    )
    info_file: str = flag("", "the catalogue, one SID, title and item id a line, separated by tabs.")
    test_data_path: str = flag("", "CSV of test interactions.")
    result_json_data: str = flag("", "file for the rankings; the metrics go beside it, as .metrics.json.")
    batch_size: int = flag(4, "prompts of a forward pass.", above_zero)
    K: int = flag(0, "an additional cut-off besides 1, 3, 5, 10, 20, 50; 0 for none (the original ignores the flag).")
    seed: int = flag(42, "kept for MiniOneRec's argument lists; nothing here is random.")
    length_penalty: float = flag(
        0.0, "beam scores are divided by their length to this power; without effect if all SIDs have the same length."
    )
    max_new_tokens: int = flag(256, "the most tokens a SID may have.", above_zero)
    num_beams: int = flag(50, "items ranked per row.", above_zero)

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if not 0 <= self.K <= self.num_beams:
            problems.add(f"--K {self.K}: must be between 0 and --num_beams {self.num_beams}, the length of a ranking")
        if not self.result_json_data or os.path.isdir(self.result_json_data):
            problems.add(f"--result_json_data {self.result_json_data!r}: give the path of a file for the rankings")
        else:
            check_writable(problems, "result_json_data", os.path.dirname(os.path.abspath(self.result_json_data)))


@dataclass(frozen=True)
class EvaluateInput:
    """What is evaluated, checked: the checkpoint, where its base is, the wording, the SIDs and the test rows."""

    checkpoint: Checkpoint
    base: str
    prompts: Prompts
    sids: list[str]
    examples: list[Interaction]
    notes: list[str]

    @property
    def task(self) -> Task:
        """What is asked of every row."""
        return self.prompts.tasks[RECOMMENDATION]


def read_input(flags: EvaluateFlags) -> EvaluateInput:
    """Checks the flags, the checkpoint and every row of the files. Raises InputError with everything that is wrong."""
    problems = Problems()
    check_model(problems, "base_model", flags.base_model)
    flags.check(problems)
    if flags.adapter and not is_adapter(flags.adapter):
        problems.add(
            f"--adapter {flags.adapter}: no adapter_config.json there; give the folder of an adapter checkpoint"
        )
    elif flags.adapter and is_adapter(flags.base_model):
        problems.add(
            f"--base_model {flags.base_model}: is an adapter, not a model; name the base of --adapter {flags.adapter}"
        )
    checkpoint = problems.attempt(Checkpoint.read, flags.adapter or flags.base_model)
    base = prompts = None
    if checkpoint:
        base = flags.base_model if flags.adapter else problems.attempt(checkpoint.base, WITH_BASE)
        prompts = problems.attempt(checkpoint.prompts, flags.category, flags.prompt_file, RECOMMENDATION)
    sids = problems.attempt(read_info, flags.info_file)
    titles = prompts.need_titles if prompts else False
    rows = read_interactions(flags.test_data_path, "test_data_path", sids, titles)
    examples = problems.attempt(list, rows)
    if flags.train_file:
        problems.attempt(count_rows, flags.train_file, "train_file", titles=False)
    problems.check()
    assert checkpoint and base and prompts and sids and examples  # nothing was wrong
    if flags.prompt_file:
        notes = checkpoint.differing_prompts(prompts)
    else:
        notes = checkpoint.differing_flags(flags.to_dict(), ("category",))
    return EvaluateInput(checkpoint, base, prompts, sids, examples, notes)


@command(EvaluateFlags)
def evaluate(flags: EvaluateFlags) -> dict[str, float]:
    """Evaluates a checkpoint on a test file."""
    # Check the flags, the checkpoint and every row of the files, before anything heavy is imported.
    files = read_input(flags)
    checkpoint, sids = files.checkpoint, files.sids

    with importing():
        import lora_utils
        from minionerec.data.encoding import Encoder
        from minionerec.data.sid_tokens import sid_responses
        from minionerec.decoding.probe import prove
        from minionerec.decoding.ranking import rank_prompts
        from minionerec.decoding.trie import Trie
        from minionerec.model import device, loading

    # Make the trie: every SID must become its own tokens.
    started = time.perf_counter()
    state = device.process_state()
    for line in files.notes:
        state.print(line)
    tokenizer = loading.load_tokenizer(checkpoint.path)
    encoder, task = Encoder(tokenizer, files.prompts, checkpoint.flags.get("cutoff_len", 2048)), files.task
    remedy = f"--info_file {flags.info_file} is of another catalogue, or sft.py must make the checkpoint again"
    where = f"{'--adapter' if flags.adapter else '--base_model'} {checkpoint.path}"
    trie = Trie(sid_responses(encoder, sids, task.ending, None, where, remedy), tokenizer.eos_token_id)
    if trie.depth > flags.max_new_tokens:
        raise InputError(
            f"--max_new_tokens {flags.max_new_tokens}: the SIDs of {flags.info_file} have up to {trie.depth} tokens"
        )

    # Load the model, with its base stored as in training.
    if checkpoint.adapter is None:
        model = loading.load_base(checkpoint.path)
    else:
        quantization = lora_utils.quantization_config(checkpoint.adapter_flags)
        model = lora_utils.load_adapted(checkpoint, tokenizer, files.base, quantization)
    model.eval()
    trie.to(model.device)

    # Rank.
    prompts = encoder.encode_prompts(task, files.examples, [encoder.cutoff_len - trie.depth] * len(files.examples))
    longest, length = max(map(len, prompts)), min(flags.num_beams, len(trie))
    state.print(f"decoding: {prove(model, longest, longest + length * trie.depth, f'--base_model {files.base}')}")
    decoding = time.perf_counter()
    ranked = rank_prompts(
        model, trie, prompts, tokenizer.pad_token_id, flags.num_beams, flags.batch_size, flags.length_penalty
    )
    decode_seconds = time.perf_counter() - decoding
    rankings = [[sids[i] for i in row] for row in ranked]
    ranks = [rank_of(example.sid, ranking) for example, ranking in zip(files.examples, rankings, strict=True)]
    metrics = ranking_metrics(ranks, length, flags.K)

    # Write the rankings and metrics, and print them beside popularity.
    if state.is_main_process:
        results = [
            {"input": tokenizer.decode(ids), "output": example.sid, "predict": ranking}
            for ids, example, ranking in zip(prompts, files.examples, rankings, strict=True)
        ]
        os.makedirs(os.path.dirname(os.path.abspath(flags.result_json_data)), exist_ok=True)
        write_json(flags.result_json_data, results)
        seconds = {"decode_seconds": decode_seconds, "seconds": time.perf_counter() - started}
        summary = {**metrics, "rows": len(results), **seconds}
        write_json(os.path.splitext(flags.result_json_data)[0] + ".metrics.json", summary)
        print(format_metrics(metrics))
        if flags.train_file:
            print_beside_popularity(flags, files.examples, ranks, length)
        print(f"{len(results)} rows, {len(results) / decode_seconds:.1f} rows/s; rankings in {flags.result_json_data}")
    return metrics


def print_beside_popularity(
    flags: EvaluateFlags, examples: Sequence[Interaction], ranks: Sequence[int | None], length: int
) -> None:
    """Prints the popularity baseline, and the metrics of the rows whose target was never trained."""
    seen: set[str] = set()

    def targets() -> Iterator[str]:
        for row in read_interactions(flags.train_file, "train_file", titles=False):
            seen.update(row.sid_history, (row.sid,))
            yield row.sid

    top = popularity(targets(), length)
    print("popularity, for comparison:")
    print(format_metrics(ranking_metrics([rank_of(example.sid, top) for example in examples], length, flags.K)))
    unseen = [rank for example, rank in zip(examples, ranks, strict=True) if example.sid not in seen]
    if unseen:
        print(f"{len(unseen)} of {len(examples)} rows have a target that does not occur in the training file:")
        print(format_metrics(ranking_metrics(unseen, length, flags.K)))


if __name__ == "__main__":
    cli.run(evaluate)
