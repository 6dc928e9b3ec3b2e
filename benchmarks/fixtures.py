"""What benchmarks start from: models with random weights, tokenizers, made-up SIDs, and the files of a data set."""

import glob
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from minionerec.data.files import Catalogue, count_rows, read_catalogue, read_interactions
from minionerec.data.prompts import Prompts
from minionerec.errors import Problems
from minionerec.flags import Check, Flags, above_zero, flag

if TYPE_CHECKING:  # torch is imported after the memory of a trie is measured
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

    from minionerec.training.tree_batches import TreeBatches

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SPARE_ROWS = 271  # how many more rows than tokens Qwen2-0.5B has
LEVELS = "abc"
CODES = 256  # per level


def some_of(*choices: str) -> Check:
    """A check that a text is some of `choices`, separated by commas."""

    def check(text: str) -> str | None:
        unknown = [name for name in text.split(",") if name not in choices]
        return f"{unknown[0]!r} is unknown; choose from {', '.join(choices)}" if unknown else None

    return check


# --- Models and tokenizers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShapeFlags(Flags):
    """The shape of a Qwen2 model; that of Qwen2-0.5B where nothing is said."""

    hidden_size: int = flag(896, "width of the model.", above_zero)
    num_hidden_layers: int = flag(24, "decoder layers.", above_zero)
    num_attention_heads: int = flag(14, "query heads.", above_zero)
    num_key_value_heads: int = flag(2, "key and value heads.", above_zero)
    intermediate_size: int = flag(4864, "width of the feed-forward layers.", above_zero)
    vocab_size: int = flag(151936, "rows of the embedding, before SID tokens are added.", above_zero)

    @property
    def shape(self) -> dict[str, int]:
        """The arguments of a `Qwen2Config`."""
        return {name: getattr(self, name) for name in ShapeFlags.__dataclass_fields__}


@dataclass(frozen=True, kw_only=True)
class SmallShapeFlags(Flags):
    """The shape of a small Qwen2 model for decoding and RL."""

    hidden_size: int = flag(256, "width of the model, a Qwen2 with random weights.", above_zero)
    num_hidden_layers: int = flag(6, "decoder layers.", above_zero)
    num_attention_heads: int = flag(4, "query heads; half as many key and value heads.", above_zero)
    vocab_size: int = flag(32000, "tokens next to those of the SIDs.", above_zero)

    @property
    def shape(self) -> dict[str, int]:
        """The arguments of `small_qwen2`."""
        return {name: getattr(self, name) for name in SmallShapeFlags.__dataclass_fields__}


def small_qwen2(vocab_size: int, hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> "Qwen2Config":
    """A small Qwen2: half as many key and value heads as query heads, an MLP four times as wide, tied embeddings. Its
    random weights are large, so that scores differ by more than rounding."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=max(num_attention_heads // 2, 1),
        intermediate_size=4 * hidden_size,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def save_base(
    folder: str, shape: dict[str, int], tied: bool = True, dtype: str | None = None, item_file: str = ""
) -> None:
    """Writes a Qwen2 model with random weights, and a tokenizer: one trained on the text of `item_file`, or words
    without text that leave as many spare rows as Qwen2-0.5B has. `dtype`: that of matmuls here if not given."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, set_seed

    from minionerec.model.device import compute_dtype, local_device

    if item_file:
        small = {"vocab_size": 32768, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        make_base(item_file, folder, **small)
    else:
        entries = {f"t{i}": i for i in range(max(shape["vocab_size"] - SPARE_ROWS, 2))}
        tokenizer = Tokenizer(models.WordLevel(entries, unk_token="t1"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t0").save_pretrained(folder)
    set_seed(42)
    config = Qwen2Config(**shape, tie_word_embeddings=tied)
    with local_device():  # a CPU needs minutes for the random weights of a large model
        AutoModelForCausalLM.from_config(config, dtype=dtype or compute_dtype()).save_pretrained(folder)


def make_base(item_file: str, folder: str, **flags: int) -> None:
    """Writes what scripts/make_base.py does: a small base whose tokenizer is trained on the text of `item_file`."""
    from scripts import make_base as script

    script.make_base(item_meta_path=item_file, output_dir=folder, **flags)


def random_sids(count: int) -> list[str]:
    """Distinct SIDs of three levels."""
    codes = random.Random(0).sample(range(CODES ** len(LEVELS)), count)
    return [f"<a_{code >> 16}><b_{code >> 8 & 255}><c_{code & 255}>" for code in codes]


def sid_tokenizer(vocab_size: int) -> "PreTrainedTokenizerFast":
    """A tokenizer of `vocab_size` entries, and after them the tokens of all SIDs."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    entries = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=entries, eos_token="t0", pad_token="t0")
    tokenizer.add_tokens([f"<{level}_{code}>" for level in LEVELS for code in range(CODES)])
    return tokenizer


# --- Files ------------------------------------------------------------------------------------------------------------


def find_files(problems: Problems, data: str, *names: str) -> list[str]:
    """The first file of each name or pattern in the folder `data`; with all of them, their rows and the catalogue are
    checked. Raises InputError with all problems so far if one is missing."""
    found = [sorted(glob.glob(os.path.join(glob.escape(data), name))) for name in names]
    if not all(found):
        problems.add(f"--data {data}: must hold {', '.join(names)}")
    problems.check()
    files = {name: os.path.abspath(paths[0]) for name, paths in zip(names, found, strict=True)}
    catalogue = problems.attempt(read_catalogue, files["*.index.json"], files["*.item.json"])
    for name, file in files.items():
        if name.endswith(".csv"):
            sids = catalogue.sids if catalogue and name != "test.csv" else None
            problems.attempt(count_rows, file, "data", sids, titles=sids is not None)
    problems.check()
    return list(files.values())


@dataclass
class Trained:
    """A model that trains on the rows of files, as sft.py sets it up."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    catalogue: Catalogue
    index_files: list[str]
    cutoff_len: int
    device: "torch.device"
    dtype: "torch.dtype"

    def dataset(self, file: str, prompts: Prompts) -> "Dataset":
        """The tokenized rows of a file."""
        from minionerec.data.encoding import Encoder
        from minionerec.data.examples import tokenized_dataset

        def rows_of(kind: str):
            if kind == "item":
                return self.catalogue.items_with_text()
            return read_interactions(file, "data", self.catalogue.sids, prompts.need_titles)

        encoder = Encoder(self.tokenizer, prompts, self.cutoff_len)
        return tokenized_dataset(encoder, rows_of, [file, *self.index_files])

    def losses_of(self, collate: Callable, losses: Callable) -> Callable:
        """A function of examples: their batch is moved and computed as a Trainer does it. Gives the `losses` of the
        response tokens, and how many tokens that are."""
        import torch

        from minionerec.data.examples import IGNORE

        where, dtype = self.device, self.dtype

        def found(examples: list[dict]) -> tuple[torch.Tensor, int]:
            batch = collate(examples)
            count = int((batch.get("shift_labels", batch["labels"]) != IGNORE).sum())
            if where.type == "cuda":  # pinned, so that the host does not wait for the card
                batch = {name: tensor.pin_memory().to(where, non_blocking=True) for name, tensor in batch.items()}
            with torch.autocast(where.type, dtype, enabled=dtype != torch.float32):
                return losses(self.model, batch)[0], count

        return found

    def tree_losses_of(self, trees: "TreeBatches") -> Callable:
        """The same for the micro-batches of token trees, as sft.py trains on them: a GPU pads them to few shapes, and
        records passes as CUDA graphs."""
        from minionerec.model import graphs
        from minionerec.training.sft_trainer import in_few_shapes, recorded_tree_losses, tree_collator

        graphs.record(self.model, True)
        collate = tree_collator(self.model, self.tokenizer.pad_token_id, self.device)
        collate = in_few_shapes(self.model, collate, trees, print)
        return self.losses_of(collate, partial(recorded_tree_losses, dtype=self.dtype))


def set_up(base: str, index_files: list[str], method: str, cutoff_len: int, dropout: float = 0.05) -> Trained:
    """Loads a base and wraps it for `method`: full, lora or qlora, with the SID tokens of a catalogue."""
    import torch

    import lora_utils
    from minionerec.flags import AdapterFlags
    from minionerec.model import loading
    from minionerec.model.device import compute_dtype, local_device, master_dtype

    torch.manual_seed(0)
    catalogue = read_catalogue(*index_files)
    tokenizer = loading.load_tokenizer(base)
    flags = AdapterFlags(use_lora=method == "lora", use_qlora=method == "qlora", lora_dropout=dropout)
    quantization = lora_utils.quantization_config(flags)
    model = loading.load_base(base, quantization, dtype=master_dtype() if method == "full" else None)
    ids = loading.add_sid_tokens(model, tokenizer, catalogue.sid_tokens)
    model = lora_utils.adapt(model, flags, ids).train()
    dtype = compute_dtype(quantization is not None)
    return Trained(model, tokenizer, catalogue, index_files, cutoff_len, local_device(), dtype)
