"""Measures SFT steps on real rows whose common beginnings are computed once (minionerec/model/token_trees.py), beside
the same steps with every row by itself, sorted by length: seconds, peak memory in GB, losses.

The model has the shape of Qwen2.5-0.5B with fewer layers, random weights, and a tokenizer that is trained on the data's
own text. Two processes take the same steps in turn, so that whatever else the machine does slows both, after a
micro-batch that is not timed. `trees` cuts them into the micro-batches of sft.py's `--pack_rows`, `rows` into those of
`--pack_rows 0`. Dropout is 0, so that both have the same losses. Memory counts from before that first micro-batch.

    python benchmarks/trees.py --data data/Industrial_and_Scientific
    python benchmarks/trees.py --data data/Industrial_and_Scientific --rows 512 --num_hidden_layers 4 --repeats 2
"""

import glob
import os
import sys
import tempfile
from statistics import median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.common import (
    answer,
    in_fresh_process,
    in_turn,
    peak_memory_gb,
    print_json,
    print_table,
    quiet,
    reset_peak_memory,
    seconds_of,
)
from minionerec import cli
from minionerec.data.files import count_rows, read_catalogue, read_interactions
from minionerec.data.prompts import load_prompts
from minionerec.errors import Problems
from minionerec.flags import AdapterFlags, check_batch, check_positive


def save_base(folder: str, item_file: str, shape: dict[str, int]) -> None:
    """Writes a Qwen2 model with random weights, in the precision of matmuls here, and a tokenizer trained on the
    catalogue's text."""
    from transformers import AutoModelForCausalLM, Qwen2Config, set_seed

    from minionerec.model.device import compute_dtype, local_device
    from scripts.make_base import make_base

    make_base(item_file, folder, vocab_size=32768, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    set_seed(42)
    with local_device():
        config = Qwen2Config(**shape, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config, dtype=compute_dtype()).save_pretrained(folder)


def train(
    connection,
    way: str,
    method: str,
    base: str,
    files: tuple[str, str, str],
    category: str,
    tasks: str,
    rows: int,
    micro_batch_size: int,
    pack_rows: int,
    cutoff_len: int,
) -> None:
    """Takes a step whenever asked, answers with its seconds, at the end with peak memory in GB, the losses, and tokens
    and nodes of the timed steps."""
    quiet()
    import numpy as np
    import torch

    import lora_utils
    from minionerec.data.encoding import Encoder
    from minionerec.data.examples import Collator, tokenized_dataset
    from minionerec.model import loading
    from minionerec.model.device import compute_dtype, local_device, master_dtype
    from minionerec.training.sft_trainer import row_losses, step_order, tree_collator, tree_losses
    from minionerec.training.tree_batches import Prefixes, TreeBatches

    train_file, sid_index_path, item_meta_path = files
    catalogue = read_catalogue(sid_index_path, item_meta_path)
    prompts = load_prompts(category, None, tasks)

    def rows_of(kind: str):
        if kind == "item":
            return catalogue.items_with_text()
        return read_interactions(train_file, "train_file", catalogue.sids, prompts.need_titles)

    torch.manual_seed(0)
    tokenizer = loading.load_tokenizer(base)
    flags = AdapterFlags(use_lora=method == "lora", use_qlora=method == "qlora", lora_dropout=0.0)
    quantization = lora_utils.quantization_config(flags)
    model = loading.load_base(base, quantization, dtype=master_dtype() if method == "full" else None)
    ids = loading.add_sid_tokens(model, tokenizer, catalogue.sid_tokens)
    model = lora_utils.adapt(model, flags, ids).train()
    device, dtype = local_device(), compute_dtype(method == "qlora")
    dataset = tokenized_dataset(Encoder(tokenizer, prompts, cutoff_len), rows_of, list(files))
    prefixes = Prefixes(dataset)
    plan = TreeBatches(prefixes, step_order(prefixes, pack_rows, rows, 42), 1, micro_batch_size, rows)
    if way == "trees":
        collate, losses_of = tree_collator(model, tokenizer.pad_token_id, device), tree_losses
    else:
        collate, losses_of = Collator(tokenizer.pad_token_id), row_losses
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    responses = np.array(dataset["length"][:]) - np.array(dataset["prompt_length"][:])
    steps, step_losses, counts = plan.steps(), [], []

    def micro_batches() -> list[np.ndarray]:
        parts = next(steps)
        of_step = np.concatenate(parts)
        if way == "rows":
            of_step = of_step[np.argsort(-prefixes.length[of_step], kind="stable")]
            parts = np.split(of_step, range(micro_batch_size, len(of_step), micro_batch_size))
        counts.append((int(prefixes.length[of_step].sum()), sum(prefixes.size(part).nodes for part in parts)))
        return parts

    def losses_on(part: np.ndarray) -> torch.Tensor:
        batch = {name: tensor.to(device) for name, tensor in collate(dataset.__getitems__(part.tolist())).items()}
        more = {"dtype": dtype} if way == "trees" else {}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return losses_of(model, batch, **more)[0]

    def step() -> None:
        total = found = 0
        parts = micro_batches()
        labels = int(responses[np.concatenate(parts)].sum())
        for part in parts:
            losses = losses_on(part)
            loss = losses.sum() / labels
            loss.backward()
            total, found = total + loss.item(), found + len(losses)
        if found != labels:
            raise RuntimeError(f"{found} of {labels} response tokens were learnt from")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_losses.append(total)

    def warm_up() -> None:
        """One micro-batch, whose gradients are dropped."""
        losses_on(next(plan.steps())[0][:micro_batch_size]).sum().backward()
        optimizer.zero_grad()

    reset_peak_memory()
    warm_up()

    def end() -> dict:
        tokens, nodes = (sum(count[i] for count in counts) / len(counts) for i in (0, 1))
        return {"peak_gb": peak_memory_gb(), "losses": step_losses, "tokens": tokens, "nodes": nodes}

    answer(connection, lambda: seconds_of(step), end)


def trees(
    data: str = "",
    category: str = "Industrial_and_Scientific",
    tasks: str = "all",
    methods: str = "lora,full",
    rows: int = 256,
    micro_batch_size: int = 8,
    pack_rows: int = -1,
    cutoff_len: int = 512,
    num_hidden_layers: int = 6,
    hidden_size: int = 896,
    num_attention_heads: int = 14,
    num_key_value_heads: int = 2,
    intermediate_size: int = 4864,
    vocab_size: int = 151936,
    repeats: int = 1,
) -> None:
    """Prints seconds, peak memory and losses of SFT steps with shared beginnings beside rows one by one.

    Args:
        data: folder that holds train.csv, an .index.json and an .item.json file.
        category: what the items are, for the prompts.
        tasks: all, or task names separated by commas.
        methods: some of lora, full, qlora, separated by commas.
        rows: rows of an optimizer step.
        micro_batch_size: rows of a forward pass, where they go one by one.
        pack_rows: rows that share much, such as a user's, in one step at most; -1 for a 32nd of rows, as in sft.py.
        cutoff_len: tokens of a row at most.
        num_hidden_layers: decoder layers; Qwen2.5-0.5B has 24.
        hidden_size: width of the model.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        intermediate_size: width of the feed-forward layers.
        vocab_size: rows of the embedding.
        repeats: timed steps of a process; medians count.
    """
    problems = Problems()
    check_positive(problems, rows=rows, micro_batch_size=micro_batch_size, repeats=repeats)
    check_batch(problems, rows, micro_batch_size)
    chosen = [name.strip() for name in methods.split(",")]
    problems += [
        f"--methods {name!r}: there are lora, full, qlora" for name in chosen if name not in ("lora", "full", "qlora")
    ]
    found = [
        sorted(glob.glob(os.path.join(glob.escape(data), name)))
        for name in ("train.csv", "*.index.json", "*.item.json")
    ]
    if not all(found):
        problems.add(f"--data {data}: must hold train.csv, an .index.json and an .item.json file")
    if pack_rows < 1 and pack_rows != -1:
        problems.add(f"--pack_rows {pack_rows}: must be above 0, or -1")
    problems.check()
    pack_rows = max(rows // 32, 1) if pack_rows == -1 else pack_rows
    files = tuple(paths[0] for paths in found)
    catalogue = problems.attempt(read_catalogue, *files[1:])
    problems.attempt(count_rows, files[0], "data", catalogue.sids if catalogue else None)
    problems.check()

    shape = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
    }
    table, record = [], {}
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(save_base, folder, files[2], shape)
        for method in chosen:
            settings = (method, folder, files, category, tasks, rows, micro_batch_size, pack_rows, cutoff_len)
            pair = in_turn(train, ["rows", "trees"], repeats, *settings)
            one_by_one = pair["rows"]
            for way, run in pair.items():
                ratios = [a / b for a, b in zip(one_by_one["steps"], run["steps"], strict=True)]
                differences = [abs(a - b) / b for a, b in zip(run["losses"], one_by_one["losses"], strict=True)]
                table.append(
                    {
                        "method": method,
                        "way": way,
                        "s/step": median(run["steps"]),
                        "times rows": median(ratios),
                        "tokens a step": round(run["tokens"]),
                        "of them computed": round(run["tokens"] if way == "rows" else run["nodes"]),
                        "peak GB": run["peak_gb"],
                        "first loss": run["losses"][0],
                        "losses differ by": f"{max(differences):.0e}",
                    }
                )
            print(f"{method}: {table[-1]['times rows']:.2f} times as fast", file=sys.stderr)
            record[f"speedup_{method}"] = table[-1]["times rows"]
            record |= {"tokens": table[-1]["tokens a step"], "nodes": table[-1]["of them computed"]}
    print_table(table)
    print_json(
        "trees", table=table, shape=shape, rows=rows, micro_batch_size=micro_batch_size, repeats=repeats, **record
    )


if __name__ == "__main__":
    cli.run(trees)
