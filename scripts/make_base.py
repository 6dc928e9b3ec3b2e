"""Builds a small base model for a catalogue, for machines without a model hub, for tests and for first steps.

It is a Qwen2 model with random weights, and a byte-level BPE tokenizer trained on the texts of the catalogue.

    python scripts/make_base.py --item_meta_path item.json --output_dir out/base
"""

import json
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli, locks
from minionerec.data.files import read_titles_and_descriptions
from minionerec.data.prompts import TASKS
from minionerec.errors import Problems
from minionerec.flags import check_positive, check_writable, seed_range
from minionerec.output import writing
from minionerec.saving import make_readable


@locks.releasing()
def make_base(
    item_meta_path: str = "",
    output_dir: str = "",
    vocab_size: int = 4096,
    hidden_size: int = 128,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate_size: int = 512,
    tie_word_embeddings: bool = True,
    seed: int = 42,
) -> None:
    """Writes a small Qwen2 with random weights, and a tokenizer trained on the catalogue, as a model folder.

    Args:
        item_meta_path: JSON of item id to title and description; the tokenizer is trained on their text.
        output_dir: folder to write; it must not contain a model yet.
        vocab_size: largest size of the vocabulary.
        hidden_size: width of the model.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        intermediate_size: width of the feed-forward layers.
        tie_word_embeddings: one matrix for input embedding and output head.
        seed: seed of the weights.
    """
    problems = Problems()
    texts = problems.attempt(read_titles_and_descriptions, item_meta_path)
    check_positive(
        problems,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        intermediate_size=intermediate_size,
    )
    if 0 < vocab_size < 300:
        problems.add(f"--vocab_size {vocab_size}: must be 300 or more; the bytes of all texts take 256")
    if num_attention_heads > 0 and hidden_size % (2 * num_attention_heads):
        problems.add(f"--hidden_size {hidden_size}: must be a multiple of twice --num_attention_heads")
    if num_key_value_heads > 0 and num_attention_heads % num_key_value_heads:
        problems.add(f"--num_attention_heads {num_attention_heads}: must be a multiple of --num_key_value_heads")
    if not output_dir:
        problems.add("--output_dir is missing; give a folder for the model")
    elif os.path.exists(os.path.join(output_dir, "config.json")):
        problems.add(f"--output_dir {output_dir}: already contains a model; name another folder")
    else:
        locks.check_free(problems, "output_dir", output_dir, locks.lock_of_folder)
        check_writable(problems, output_dir)
    if wrong := seed_range(seed):
        problems.add(f"--seed {seed}: {wrong}")
    problems.check()
    assert texts  # nothing was wrong
    locks.hold("output_dir", output_dir, locks.lock_of_folder)

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, set_seed

    end = "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    instructions = [f"{task.instruction}\n{task.input}\nAnswer:\n" for task in TASKS.values()]
    bpe.train_from_iterator([*texts, *instructions * 10], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end)
    set_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        intermediate_size=intermediate_size,
        tie_word_embeddings=tie_word_embeddings,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    with writing(output_dir):
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".base-", dir=output_dir) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            make_readable(partial)
            for name in sorted(os.listdir(partial), key="config.json".__eq__):  # last, because it says "a model"
                os.replace(os.path.join(partial, name), os.path.join(output_dir, name))
    print(json.dumps({"parameters": model.num_parameters(), "vocabulary": len(tokenizer), "saved": output_dir}))


if __name__ == "__main__":
    cli.run(make_base)
