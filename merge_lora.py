"""Turns an adapter checkpoint into a standalone one: base, LoRA updates and SID rows in one model.

MiniOneRec has no adapters and so no such command. The merged checkpoint needs only `transformers` (4 or 5) to load, so
an unmodified MiniOneRec checkout and vLLM load it.

    python merge_lora.py --adapter out/lora/final_checkpoint --output_dir out/merged
    python merge_lora.py --adapter out/qlora/final_checkpoint --output_dir out/merged --into original
"""

import gc
import os
import re
from dataclasses import dataclass
from itertools import islice

from minionerec import cli
from minionerec.checkpoint import RUN_FILE, Checkpoint, check_adapter, check_base, is_adapter
from minionerec.data.files import Catalogue, Interaction, read_catalogue, read_interactions
from minionerec.data.prompts import RECOMMENDATION, Prompts
from minionerec.errors import InputError, Problems
from minionerec.flags import Flags, above_zero, check_new_folder, command, flag, one_of
from minionerec.locks import hold, lock_of_new
from minionerec.model_card import write_card
from minionerec.output import whole_folder, writing
from minionerec.process_memory import importing
from minionerec.saving import make_portable, make_readable, write_json

COMPARED = 10  # the best items of a row that are compared


@dataclass(frozen=True, kw_only=True)
class MergeFlags(Flags):
    """The flags of merge_lora.py."""

    adapter: str = flag("", "folder of an adapter checkpoint.")
    output_dir: str = flag("", "folder for the standalone checkpoint; it must not exist, and is written atomically.")
    base_model: str = flag("", "where the base is, if it is not where the adapter says.")
    into: str = flag(
        "trained",
        "what to merge into: trained (the weights that the adapter was trained on; of a quantized base, its "
        "dequantized 4-bit or 8-bit weights) or original (the base as published, which an adapter of a quantized base "
        "fits slightly less well).",
        one_of("trained", "original"),
    )
    dtype: str = flag(
        "auto",
        "precision of the saved weights: auto (that of the saved base), float32, bfloat16 or float16.",
        one_of("auto", "float32", "bfloat16", "float16"),
    )
    max_shard_size: str = flag(
        "5GB",
        "largest size of a weight file.",
        lambda value: None if re.fullmatch(r"[1-9]\d*[KMG]B", value) else "must be a size such as 5GB",
    )
    eval_file: str = flag(
        "",
        "rows on which the rankings of adapter and merged checkpoint are compared; by default the file that the "
        "adapter records.",
    )
    sid_index_path: str = flag("", "the catalogue to rank; by default the file that the adapter records.")
    sample: int = flag(100, "number of rows to compare on.", above_zero)

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if not self.adapter:
            problems.add("--adapter is missing; give the folder of an adapter checkpoint")
        else:
            check_adapter(problems, self.adapter)
        check_new_folder(problems, self.output_dir)


@dataclass(frozen=True)
class MergeInput:
    """What is merged, checked. Rankings are compared where `unread` is empty; else it says what is missing for that."""

    checkpoint: Checkpoint
    base: str
    prompts: Prompts | None
    catalogue: Catalogue | None
    rows: list[Interaction] | None
    unread: list[str]


def read_input(flags: MergeFlags) -> MergeInput:
    """Checks the flags, the adapter and the rows to compare on. Raises InputError with everything that is wrong."""
    problems = flags.problems()
    checkpoint, base = None, flags.base_model
    if is_adapter(flags.adapter):
        checkpoint = problems.attempt(Checkpoint.read, flags.adapter)
    if checkpoint:
        base = base or problems.attempt(checkpoint.base) or ""
        if base:
            check_base(problems, base)
    # Rankings are compared wherever the recorded files still exist; files that were named must.
    unread = problems if flags.eval_file or flags.sid_index_path else Problems()
    recorded = checkpoint.flags if checkpoint else {}
    prompts = None
    if checkpoint:
        prompts = unread.attempt(checkpoint.prompts, recorded.get("category", ""), None, RECOMMENDATION)
    catalogue = unread.attempt(read_catalogue, flags.sid_index_path or recorded.get("sid_index_path", ""))
    titles = prompts.need_titles if prompts else False
    interactions = read_interactions(
        flags.eval_file or recorded.get("eval_file", ""), "eval_file", catalogue.sids if catalogue else None, titles
    )
    rows = unread.attempt(lambda: list(islice(interactions, max(flags.sample, 0))))
    problems.check()
    assert checkpoint  # nothing was wrong
    return MergeInput(checkpoint, base, prompts, catalogue, rows, unread)


@command(MergeFlags)
def merge(flags: MergeFlags) -> dict:
    """Merges an adapter into its base and saves a standalone checkpoint. The adapter and the base stay as they are."""
    # Check the flags, the adapter and the rows to compare on, before anything heavy is imported.
    inputs = read_input(flags)
    checkpoint = inputs.checkpoint
    hold("output_dir", flags.output_dir, lock_of_new)

    with importing():
        import torch
        from transformers.trainer_utils import align_special_tokens

        import lora_utils
        from minionerec.model import loading
        from minionerec.model.merging import CountingMerge
        from minionerec.ranking import Ranker

    bits = loading.stored_bits(loading.load_config(inputs.base))
    if flags.into == "original" and bits < 16:
        raise InputError(
            f"--into original: the base {inputs.base} is published in {bits} bits, on which the adapter was trained; "
            "drop the flag"
        )
    tokenizer = loading.load_tokenizer(checkpoint.path)
    quantization = lora_utils.quantization_config(checkpoint.adapter_flags)
    dtype = loading.saved_dtype(inputs.base) if flags.dtype == "auto" else getattr(torch, flags.dtype)

    def rankings(model: torch.nn.Module) -> list[list[str]]:
        assert inputs.prompts and inputs.catalogue and inputs.rows  # nothing is unread
        ranker = Ranker(
            checkpoint,
            inputs.prompts,
            sorted(inputs.catalogue.sids),
            f"--adapter {flags.adapter}",
            "give the --sid_index_path it was trained with",
            catalogue=inputs.catalogue,
            num_beams=COMPARED,
        ).use(model)
        return ranker.rank(ranker.encode(inputs.rows))

    # Merge. One model at a time: the adapter on its base, the merged one, what was saved of it. Adapters are in
    # cycles, which keep the weights until they are collected.
    before = None
    if not inputs.unread:
        before = rankings(lora_utils.load_adapted(checkpoint, tokenizer, inputs.base, quantization))
        gc.collect()
    counting = CountingMerge()
    model = lora_utils.load_adapted(
        checkpoint,
        tokenizer,
        inputs.base,
        None if flags.into == "original" else quantization,
        merge_in=dtype,
        merge=counting,
    )
    changed, updated = counting.changed, counting.updated
    align_special_tokens(model, tokenizer)
    precision = str(dtype).removeprefix("torch.")
    report: dict[str, object] = {
        "adapter": flags.adapter,
        "base_model": inputs.base,
        "into": flags.into,
        "saved": flags.output_dir,
    }
    report |= {"dtype": precision, "updated_weights": updated, "changed_weights": changed}

    # Save next to the output folder, compare, and put it in its place.
    with writing(flags.output_dir), whole_folder(flags.output_dir) as partial:
        model.save_pretrained(partial, max_shard_size=flags.max_shard_size)
        tokenizer.save_pretrained(partial)
        make_portable(partial)
        del model
        gc.collect()
        if before is not None:
            pairs = list(zip(before, rankings(loading.load_base(partial)), strict=True))
            report["compared_rows"] = len(pairs)
            report["same_first"] = sum(old[0] == new[0] for old, new in pairs) / len(pairs)
            report["same_of_10"] = sum(len({*old} & {*new}) / len(old) for old, new in pairs) / len(pairs)
        run = {**checkpoint.run, "method": "full", "merged": report}
        write_json(os.path.join(partial, RUN_FILE), run)
        write_card(partial, {**run, "method": checkpoint.run.get("method", "lora")}, report)
        make_readable(partial)

    # Say how well the merged model stands for the adapter.
    if before is None:
        print(f"rankings are not compared with the adapter's: {'; '.join(inputs.unread)}")
    else:
        base = "quantized base" if quantization else "base"
        print(
            f"against the adapter on its {base}, {len(pairs)} rows: the same first item in "
            f"{report['same_first']:.1%}, and {report['same_of_10']:.1%} of the first {COMPARED} items shared"
        )
    if updated:
        print(f"of {updated:,} weights that the adapter updates, {changed / updated:.1%} changed in {precision}")
    if changed < updated / 2 and dtype != torch.float32:
        print(f"the other updates are smaller than a step of {precision} and are lost; recommended: --dtype float32")
    print(f"saved {flags.output_dir}")
    return report


if __name__ == "__main__":
    cli.run(merge)
