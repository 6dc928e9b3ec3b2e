"""Ranks the next item of every row of a test file by constrained beam search: HR@K, NDCG@K and MRR.

Takes the flags of MiniOneRec's evaluate.py. New are adapter checkpoints, a trie in tensors that decodes all beams of a
prompt against one prompt cache, sharding over processes, and MRR.

    python evaluate.py --base_model out/lora/final_checkpoint --info_file info.txt --test_data_path test.csv \\
        --category Industrial_and_Scientific --result_json_data out/lora/result.json
    torchrun --nproc_per_node 2 evaluate.py --base_model ...
"""

import os
import time

from minionerec import checks, cli
from minionerec.checkpoint import base_of_adapter, is_adapter, mismatches, read_adapter, read_run, write_json
from minionerec.data.files import count_rows, read_info, read_interactions
from minionerec.data.prompts import RECOMMENDATION, differing_prompts, recorded_prompts
from minionerec.errors import InputError, Problems
from minionerec.metrics import format_metrics, popularity, rank_of, ranking_metrics

WITH_BASE = "give the folder of the base as --base_model, and this one as --adapter"


def evaluate(
    base_model: str = "",
    train_file: str = "",
    info_file: str = "",
    category: str = "",
    test_data_path: str = "",
    result_json_data: str = "",
    batch_size: int = 4,
    K: int = 0,
    seed: int = 42,
    length_penalty: float = 0.0,
    max_new_tokens: int = 256,
    num_beams: int = 50,
    adapter: str = "",
    prompt_file: str | None = None,
) -> dict[str, float]:
    """Evaluates a checkpoint on a test file.

    Args:
        base_model: a whole checkpoint, or an adapter one, whose base is then found from the adapter.
        train_file: CSV of training interactions; given, the popularity baseline is printed too, and apart from the
            rest the rows whose target it does not hold.
        info_file: the catalogue, one SID, title and item id a line, separated by tabs.
        category: what the items are; a checkpoint that recorded its prompts needs none.
        test_data_path: CSV of test interactions.
        result_json_data: file for the rankings; the metrics go beside it, as .metrics.json.
        batch_size: prompts of a forward pass.
        K: one more cut-off beside 1, 3, 5, 10, 20, 50; 0 for none (the original ignores the flag).
        seed: kept for MiniOneRec's argument lists; nothing here is random.
        length_penalty: beam scores are divided by their length to this power.
        max_new_tokens: the most tokens a SID may have.
        num_beams: items to rank a row.
        adapter: an adapter checkpoint to put on base_model, in place of the base it names.
        prompt_file: JSON that replaces the wording of the prompts, also that of the checkpoint.
    """
    problems = Problems()
    checks.check_model(problems, "base_model", base_model)
    if adapter and not is_adapter(adapter):
        problems.add(f"--adapter {adapter}: no adapter_config.json there; give the folder of an adapter checkpoint")
    checks.check_positive(problems, batch_size=batch_size, num_beams=num_beams, max_new_tokens=max_new_tokens)
    if not 0 <= K <= num_beams:
        problems.add(f"--K {K}: must be between 0 and --num_beams {num_beams}, the length of a ranking")
    if not result_json_data or os.path.isdir(result_json_data):
        problems.add(f"--result_json_data {result_json_data!r}: give the path of a file for the rankings")
    else:
        checks.check_writable(problems, "result_json_data", os.path.dirname(os.path.abspath(result_json_data)))
    checkpoint = adapter or base_model
    if not adapter and is_adapter(base_model):
        base_model, adapter = problems.attempt(base_of_adapter, base_model, WITH_BASE) or "", base_model
    elif adapter and is_adapter(base_model):
        problems.add(f"--base_model {base_model}: is an adapter, not a model; name the base of --adapter {adapter}")
    elif adapter and is_adapter(adapter):
        problems.attempt(read_adapter, adapter)
    prompts = problems.attempt(recorded_prompts, checkpoint, category, prompt_file, RECOMMENDATION)
    sids = problems.attempt(read_info, info_file)
    titles = bool(prompts) and prompts.need_titles
    rows = problems.attempt(count_rows, test_data_path, "test_data_path", sids, titles)
    if train_file:
        problems.attempt(count_rows, train_file, "train_file", titles=False)
    problems.check()

    import lora_utils
    from minionerec.data import sid_tokens
    from minionerec.data.encoding import Encoder
    from minionerec.decoding.probe import prove
    from minionerec.decoding.ranking import rank_prompts
    from minionerec.decoding.trie import Trie
    from minionerec.model import device, loading

    started = time.perf_counter()
    state = device.process_state()
    flags = read_run(checkpoint).get("flags", {})
    given = {"category": category}
    for line in differing_prompts(checkpoint, prompts) if prompt_file else mismatches(checkpoint, given, ("category",)):
        state.print(line)
    tokenizer = loading.load_tokenizer(checkpoint)
    encoder, task = Encoder(tokenizer, prompts, flags.get("cutoff_len", 2048)), prompts.tasks[RECOMMENDATION]
    remedy = f"--info_file {info_file} is of another catalogue, or sft.py must make the checkpoint again"
    where = f"{'--adapter' if adapter else '--base_model'} {checkpoint}"
    sequences = sid_tokens.sid_responses(encoder, sids, task.ending, None, where, remedy)
    trie = Trie(sequences, tokenizer.eos_token_id)
    if trie.depth > max_new_tokens:
        raise InputError(f"--max_new_tokens {max_new_tokens}: the SIDs of {info_file} have up to {trie.depth} tokens")
    quantization = lora_utils.quantization_config(flags.get("use_qlora", False), flags.get("load_in_8bit", False))
    if adapter:
        model = lora_utils.load_adapted(base_model, adapter, tokenizer, quantization)
    else:
        model = loading.load_base(base_model)
    model.eval()
    trie.to(model.device)

    examples = list(read_interactions(test_data_path, "test_data_path", sids, titles))
    encoded = encoder.encode_prompts(task, examples, [encoder.cutoff_len - trie.depth] * rows)
    longest = max(map(len, encoded))
    proof = prove(model, longest, longest + min(num_beams, len(trie)) * trie.depth, f"--base_model {base_model}")
    state.print(f"decoding: {proof}")
    decoding = time.perf_counter()
    ranked = rank_prompts(model, trie, encoded, tokenizer.pad_token_id, num_beams, batch_size, length_penalty)
    decoded = time.perf_counter() - decoding
    rankings = [[sids[i] for i in row] for row in ranked]
    ranks = [rank_of(example.sid, ranking) for example, ranking in zip(examples, rankings, strict=True)]
    length = min(num_beams, len(trie))
    metrics = ranking_metrics(ranks, length, K)

    if state.is_main_process:
        results = [
            {"input": tokenizer.decode(ids), "output": example.sid, "predict": ranking}
            for ids, example, ranking in zip(encoded, examples, rankings, strict=True)
        ]
        os.makedirs(os.path.dirname(os.path.abspath(result_json_data)), exist_ok=True)
        write_json(result_json_data, results)
        summary = {**metrics, "rows": rows, "decode_seconds": decoded, "seconds": time.perf_counter() - started}
        write_json(os.path.splitext(result_json_data)[0] + ".metrics.json", summary)
        print(format_metrics(metrics))
        if train_file:
            seen: set[str] = set()

            def trained():
                for row in read_interactions(train_file, "train_file", titles=False):
                    seen.update(row.sid_history, (row.sid,))
                    yield row.sid

            top = popularity(trained(), length)
            print("popularity, for comparison:")
            print(format_metrics(ranking_metrics([rank_of(example.sid, top) for example in examples], length, K)))
            unseen = [rank for example, rank in zip(examples, ranks, strict=True) if example.sid not in seen]
            if unseen:
                print(f"{len(unseen)} of the {rows} rows, whose target the training file does not hold:")
                print(format_metrics(ranking_metrics(unseen, length, K)))
        print(f"{rows} rows, {rows / decoded:.1f} rows/s; rankings in {result_json_data}")
    return metrics


if __name__ == "__main__":
    cli.run(evaluate)
