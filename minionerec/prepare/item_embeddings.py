"""Embeds items: TF-IDF with truncated SVD, the mean of a model's last hidden states, or a file of the user.

d is the width of an embedding; a matrix [items, d] has the items in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from threadpoolctl import threadpool_limits

from minionerec.errors import InputError

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

DIMENSIONS = 128
LARGEST = 1e15  # value of an embedding: its square, summed over a row, is a float32
MOST_WORDS = 50_000
FIT_TEXTS = 100_000  # texts that the words, weights and components are fitted on; others are only embedded
CHUNK = 20_000  # texts embedded at a time
MODEL_TOKENS = 512  # the most tokens of a text that an encoder gets
MODEL_BATCH = 16

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Words, and every two adjacent characters of scripts that are written without spaces.
_WORD = rf"(?=((?<![^\W{_CJK}])[^\W{_CJK}]+|[{_CJK}]{{1,2}}))"


@dataclass(frozen=True)
class TextModel:
    """TF-IDF over `words`, projected on `components` [d, words]; `weights` [words] are inverse document frequencies."""

    words: list[str]
    weights: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, texts: Sequence[str], seed: int) -> "TextModel":
        """Fits on a sample of the texts. Raises InputError if no word occurs in two of them."""
        from sklearn.decomposition import TruncatedSVD

        chosen = np.random.default_rng(seed).permutation(len(texts))[:FIT_TEXTS]
        vectorizer = _vectorizer(min_df=2, max_features=MOST_WORDS)
        try:
            matrix = vectorizer.fit_transform([texts[i] for i in np.sort(chosen)])
        except ValueError:
            raise InputError(
                "--items: no word occurs in two titles or descriptions; give --encoder or --embeddings"
            ) from None
        words = vectorizer.get_feature_names_out().tolist()
        with threadpool_limits(1):  # for the reasons in semantic_ids.py; it works only on libraries already loaded
            if min(matrix.shape) > DIMENSIONS:
                components = TruncatedSVD(DIMENSIONS, random_state=seed).fit(matrix).components_
            else:  # fewer words or items than components
                components = np.linalg.svd(matrix.toarray(), full_matrices=False)[2]
        return cls(words, vectorizer.idf_.astype(np.float32), np.ascontiguousarray(components, np.float32))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, d], float32, of norm 1, or 0 for a text without a known word."""
        vectorizer = _vectorizer(vocabulary=self.words)
        vectorizer.idf_ = self.weights
        embeddings: np.ndarray = np.empty((len(texts), len(self.components)), np.float32)
        for start in range(0, len(texts), CHUNK):
            embeddings[start : start + CHUNK] = vectorizer.transform(texts[start : start + CHUNK]) @ self.components.T
        return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)

    def save(self, path: str) -> None:
        """Writes a safetensors file."""
        words = np.frombuffer("\n".join(self.words).encode(), np.uint8)
        with open(path, "wb") as file:  # `save_file` would make a file that only its owner can read
            file.write(save({"words": words, "weights": self.weights, "components": self.components}))

    @classmethod
    def load(cls, path: str) -> "TextModel":
        """The model in a file. Raises InputError if `save` did not write it."""
        try:
            tensors = load_file(path)
            words = tensors["words"].tobytes().decode().split("\n")
            model = cls(words, tensors["weights"], tensors["components"])
            if model.weights.shape != (len(words),) or model.components.shape[1:] != (len(words),):
                raise ValueError("its parts do not fit together")
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        return model


def _vectorizer(**options: Any) -> "TfidfVectorizer":
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(token_pattern=_WORD, sublinear_tf=True, dtype=np.float32, **options)


def embed_with_model(path: str, texts: Sequence[str]) -> np.ndarray:
    """The mean of a model's last hidden states over the tokens of each text, [texts, d], float32.

    Args:
        path: folder or hub name of any transformers model; of an encoder-decoder, the encoder is used.

    Raises InputError if the model or its tokenizer cannot be loaded, or a value is NaN or infinite.
    """
    import torch
    from safetensors import SafetensorError
    from tqdm import tqdm
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from minionerec.model import device

    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModel.from_pretrained(
            path, dtype=device.compute_dtype(), device_map={"": device.local_device()}
        ).eval()
    except (OSError, ValueError, EOFError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first = (str(error).strip() or "a file ends early").splitlines()[0]
        raise InputError(f"--encoder {path}: cannot be loaded: {first}") from None
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # padding is masked anyway
    tokenizer.padding_side = "right"
    longest = min(MODEL_TOKENS, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 30))
    embeddings: np.ndarray | None = None
    # The longest first: texts that do not fit into memory then fail at the start.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    batches = [order[start : start + MODEL_BATCH] for start in range(0, len(order), MODEL_BATCH)]
    for batch in tqdm(batches, unit="batch", leave=False, disable=None):
        encoded = tokenizer(
            [texts[i] for i in batch],
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
            split_special_tokens=True,  # a text with [SEP] is a text
        ).to(model.device)
        if not encoded.input_ids.shape[1]:  # all texts of the batch are empty
            continue
        with torch.no_grad():
            hidden = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).last_hidden_state
        mask = encoded.attention_mask.unsqueeze(2)  # [B, T, 1]
        mean = hidden.float().masked_fill(mask == 0, 0).sum(1) / mask.sum(1).clamp(min=1)
        if embeddings is None:
            embeddings = np.zeros((len(texts), mean.shape[1]), np.float32)
        embeddings[batch] = mean.cpu().numpy()
    if embeddings is None:
        raise InputError(f"--encoder {path}: its tokenizer gives no token for any title")
    if bad := int((~np.isfinite(embeddings).all(axis=1)).sum()):
        raise InputError(
            f"--encoder {path}: embeds {bad:,} of {len(texts):,} items as NaN or infinity; its weights are damaged, or "
            f"its values too large for {str(model.dtype).removeprefix('torch.')}"
        )
    return embeddings


def open_embeddings(path: str) -> np.ndarray:
    """A `.npy` file of the user, [rows of --items, d], memory-mapped. Nothing is unpickled.

    Raises InputError if it is not a matrix of floats.
    """
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f" or not matrix.shape[1]:
            raise ValueError("expected a matrix of floats, [rows of --items, width]")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"--embeddings {path}: cannot be read: {str(error).splitlines()[0]}") from None
    return matrix


def rows_of_embeddings(path: str, matrix: np.ndarray, num_rows: int, rows: Sequence[int]) -> np.ndarray:
    """The `rows` of a matrix of `open_embeddings`, float32. Raises InputError if the matrix does not have `num_rows`
    rows, or a value is NaN or above LARGEST."""
    if len(matrix) != num_rows:
        raise InputError(
            f"--embeddings {path}: has {len(matrix)} rows, the items file {num_rows}; give one row per item, in the "
            "same order"
        )
    chosen = matrix[np.asarray(rows, int)].astype(np.float32)
    bad = np.flatnonzero(~(np.abs(chosen) <= LARGEST).all(axis=1))
    if len(bad):
        first = rows[int(bad[0])] + 1
        raise InputError(
            f"--embeddings {path}, row {first}: contains NaN or infinity, or a value above {LARGEST:g} "
            f"({len(bad)} such rows)"
        )
    return chosen
