"""Builds a small base model for a catalogue, for machines without a model hub, for tests and for first steps.

It is a Qwen2 model with random weights, and a byte-level BPE tokenizer trained on the texts of the catalogue.

    python scripts/make_base.py --item_meta_path item.json --output_dir out/base
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli, locks
from minionerec.data.files import read_titles_and_descriptions
from minionerec.data.prompts import TASKS
from minionerec.errors import Problems
from minionerec.flags import Flags, above_zero, check_writable, command, flag, seed_range
from minionerec.output import writing
from minionerec.saving import make_readable


@dataclass(frozen=True, kw_only=True)
class BaseFlags(Flags):
    """Where the base is written, and its size."""

    item_meta_path: str = flag("", "JSON of item id to title and description; the tokenizer is trained on their text.")
    output_dir: str = flag("", "folder to write; it must not contain a model yet.")
    vocab_size: int = flag(4096, "largest size of the vocabulary.", above_zero)
    hidden_size: int = flag(128, "width of the model.", above_zero)
    num_hidden_layers: int = flag(4, "decoder layers.", above_zero)
    num_attention_heads: int = flag(4, "query heads.", above_zero)
    num_key_value_heads: int = flag(2, "key and value heads.", above_zero)
    intermediate_size: int = flag(512, "width of the feed-forward layers.", above_zero)
    tie_word_embeddings: bool = flag(True, "one matrix for input embedding and output head.")
    seed: int = flag(42, "seed of the weights.", seed_range)

    def check(self, problems: Problems) -> None:
        super().check(problems)
        width, heads, shared_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if 0 < self.vocab_size < 300:
            problems.add(f"--vocab_size {self.vocab_size}: must be 300 or more; the bytes of all texts take 256")
        if heads > 0 and width % (2 * heads):
            problems.add(f"--hidden_size {width}: must be a multiple of twice --num_attention_heads")
        if shared_heads > 0 and heads % shared_heads:
            problems.add(f"--num_attention_heads {heads}: must be a multiple of --num_key_value_heads")
        if not self.output_dir:
            problems.add("--output_dir is missing; give a folder for the model")
        elif os.path.exists(os.path.join(self.output_dir, "config.json")):
            problems.add(f"--output_dir {self.output_dir}: already contains a model; name another folder")
        else:
            locks.check_free(problems, "output_dir", self.output_dir, locks.lock_of_folder)
            check_writable(problems, self.output_dir)


@command(BaseFlags)
def make_base(flags: BaseFlags) -> None:
    """Writes a small Qwen2 with random weights, and a tokenizer trained on the catalogue, as a model folder."""
    problems = Problems()
    texts = problems.attempt(read_titles_and_descriptions, flags.item_meta_path)
    flags.check(problems)
    problems.check()
    assert texts  # nothing was wrong
    output_dir = flags.output_dir
    locks.hold("output_dir", output_dir, locks.lock_of_folder)

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, set_seed

    end = "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=flags.vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    instructions = [f"{task.instruction}\n{task.input}\nAnswer:\n" for task in TASKS.values()]
    bpe.train_from_iterator([*texts, *instructions * 10], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end)
    set_seed(flags.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=flags.hidden_size,
        num_hidden_layers=flags.num_hidden_layers,
        num_attention_heads=flags.num_attention_heads,
        num_key_value_heads=flags.num_key_value_heads,
        intermediate_size=flags.intermediate_size,
        tie_word_embeddings=flags.tie_word_embeddings,
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
