"""Turns an adapter checkpoint into a standalone one: base, LoRA updates and SID rows in one model.

MiniOneRec has no adapters and so no such command. What comes out loads with `transformers` alone (4 or 5), and so in
an unmodified MiniOneRec checkout, and in vLLM.

    python merge_lora.py --adapter out/lora/final_checkpoint --output_dir out/merged
    python merge_lora.py --adapter out/qlora/final_checkpoint --output_dir out/merged --into original
"""

import os
import re
import shutil
from itertools import islice

from minionerec import checks, cli
from minionerec.checkpoint import (
    RUN_FILE,
    base_of_adapter,
    is_adapter,
    make_portable,
    read_adapter,
    read_run,
    write_json,
)
from minionerec.data.files import Interaction, read_catalogue, read_interactions
from minionerec.data.prompts import RECOMMENDATION, recorded_prompts
from minionerec.errors import Problems

COMPARED = 10  # the best items of a row that are compared


def merge(
    adapter: str = "",
    output_dir: str = "",
    base_model: str = "",
    into: str = "trained",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    eval_file: str = "",
    sid_index_path: str = "",
    sample: int = 100,
) -> dict:
    """Merges an adapter into its base and saves a standalone checkpoint. The adapter and the base stay as they are.

    Args:
        adapter: folder of an adapter checkpoint.
        output_dir: folder for the standalone checkpoint; it must not exist, and appears whole or not at all.
        base_model: where the base is, if not where the adapter says.
        into: trained (the weights that the adapter was trained on; for a quantized base those are what its 4 or 8 bits
            stand for) or original (the base as published, which an adapter of a quantized base fits a little less).
        dtype: of the saved weights: auto (as the base was saved), float32, bfloat16 or float16.
        max_shard_size: the largest file of weights.
        eval_file: rows to compare the rankings of adapter and merged checkpoint on; the one recorded in the adapter if
            not given.
        sid_index_path: the catalogue to rank; the one recorded in the adapter if not given.
        sample: rows to compare on.
    """
    problems = Problems()
    if not adapter:
        problems.add("--adapter is missing; give the folder of an adapter checkpoint")
    elif not is_adapter(adapter):
        problems.add(f"--adapter {adapter}: no adapter_config.json there; give the folder of an adapter checkpoint")
    else:
        if base_model:
            problems.attempt(read_adapter, adapter)
        base_model = base_model or problems.attempt(base_of_adapter, adapter) or ""
        if base_model:
            checks.check_base(problems, base_model)
    if into not in ("trained", "original"):
        problems.add(f"--into {into!r}: must be trained or original")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        problems.add(f"--dtype {dtype!r}: must be auto, float32, bfloat16 or float16")
    if not re.fullmatch(r"[1-9]\d*[KMG]B", max_shard_size):
        problems.add(f"--max_shard_size {max_shard_size!r}: must be a size such as 5GB")
    checks.check_positive(problems, sample=sample)
    checks.check_new_folder(problems, output_dir)
    run = problems.attempt(read_run, adapter) or {}
    flags = run.get("flags", {})
    quantized = flags.get("use_qlora", False) or flags.get("load_in_8bit", False)
    # Rankings are compared wherever their files are still there; files that were named must be.
    unread = problems if eval_file or sid_index_path else Problems()
    prompts = unread.attempt(recorded_prompts, adapter, flags.get("category", ""), None, RECOMMENDATION)
    catalogue = unread.attempt(read_catalogue, sid_index_path or flags.get("sid_index_path", ""))
    sids = sorted(catalogue.sids) if catalogue else None
    titles = bool(prompts) and prompts.need_titles
    rows = unread.attempt(_first_rows, eval_file or flags.get("eval_file", ""), sids, sample, titles)
    problems.check()

    import torch
    from transformers.trainer_utils import align_special_tokens

    import lora_utils
    from minionerec.data import sid_tokens
    from minionerec.data.encoding import Encoder
    from minionerec.decoding.ranking import rank_prompts
    from minionerec.decoding.trie import Trie
    from minionerec.model import loading
    from minionerec.model.merging import merge_and_count
    from minionerec.training.durable import writing

    tokenizer = loading.load_tokenizer(adapter)
    quantization = lora_utils.quantization_config(flags.get("use_qlora", False), flags.get("load_in_8bit", False))
    wanted = loading.saved_dtype(base_model) if dtype == "auto" else getattr(torch, dtype)

    def rankings(model) -> list[list[int]]:
        encoder, task = Encoder(tokenizer, prompts, flags.get("cutoff_len", 512)), prompts.tasks[RECOMMENDATION]
        remedy = "give the --sid_index_path it was trained with"
        sequences = sid_tokens.sid_responses(encoder, sids, task.ending, catalogue, f"--adapter {adapter}", remedy)
        trie = Trie(sequences, tokenizer.eos_token_id).to(model.device)
        encoded = encoder.encode_prompts(task, rows, [encoder.cutoff_len - trie.depth] * len(rows))
        return rank_prompts(model.eval(), trie, encoded, tokenizer.pad_token_id, COMPARED, batch_size=8)

    # One model at a time: the adapter on its base, the merged one, what was saved of it.
    before = None if unread else rankings(lora_utils.load_adapted(base_model, adapter, tokenizer, quantization))
    model, changed, updated = lora_utils.load_adapted(
        base_model,
        adapter,
        tokenizer,
        None if into == "original" else quantization,
        merge_in=wanted,
        merge=merge_and_count,
    )
    align_special_tokens(model, tokenizer)
    precision = str(wanted).removeprefix("torch.")
    report = {"adapter": adapter, "base_model": base_model, "into": into, "saved": output_dir, "dtype": precision}
    report |= {"updated_weights": updated, "changed_weights": changed}

    partial = f"{output_dir.rstrip(os.sep)}.partial"
    with writing(output_dir):
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(partial)
        make_portable(partial)
    del model
    if before is not None:
        pairs = list(zip(before, rankings(loading.load_base(partial)), strict=True))
        report["compared_rows"] = len(pairs)
        report["same_first"] = sum(old[0] == new[0] for old, new in pairs) / len(pairs)
        report["same_of_10"] = sum(len({*old} & {*new}) / len(old) for old, new in pairs) / len(pairs)
    with writing(output_dir):
        write_json(os.path.join(partial, RUN_FILE), {**run, "method": "full", "merged": report})
        os.replace(partial, output_dir)

    if before is None:
        print(f"rankings are not compared with the adapter's: {'; '.join(unread)}")
    else:
        base = "quantized base" if quantized else "base"
        print(
            f"against the adapter on its {base}, {len(pairs)} rows: the same first item in "
            f"{report['same_first']:.1%}, and {report['same_of_10']:.1%} of the first {COMPARED} items shared"
        )
    if updated:
        print(f"of {updated:,} weights that the adapter updates, {changed / updated:.1%} changed in {precision}")
    if changed < updated / 2 and wanted != torch.float32:
        print(f"the other updates are lost, smaller than a step of {precision}; recommended: --dtype float32")
    print(f"saved {output_dir}")
    return report


def _first_rows(path: str, sids: list[str] | None, count: int, titles: bool) -> list[Interaction]:
    return list(islice(read_interactions(path, "eval_file", sids, titles), count))


if __name__ == "__main__":
    cli.run(merge)
