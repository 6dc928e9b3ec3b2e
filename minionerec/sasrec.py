"""SASRec, the classical sequential recommender: a baseline for the tables, a source of rewards, and a second opinion
when items are ranked.

A causal Transformer over item embeddings, trained with a softmax over the whole catalogue to predict the item after
each history. Items are SIDs here, as in the metrics. Several that differ by their seed rank better together than any of
them. Source: Kang and McAuley, Self-Attentive Sequential Recommendation (2018); the full softmax: Klenitskiy and
Vasilev, Turning Dross Into Gold Loss (2023).

Dimensions: `B` rows, `L` items of a history, `S` items, `H` hidden.
"""

import json
import math
import os
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from minionerec.errors import InputError, RunError
from minionerec.sasrec_files import RECORD, WEIGHTS_FILE

PATIENCE = 5  # training ends after this many epochs without a gain
MOST_SCORES = 16_000_000  # at once while histories are ranked: 64 MB, whatever the catalogue
_UNREADABLE = ValueError, KeyError, TypeError, ArithmeticError, AssertionError  # what a damaged configuration raises


class Recommender(nn.Module):
    """Scores all items after a history. `sids` names the items; item i is number i + 1, number 0 pads."""

    def __init__(self, sids: Sequence[str], length: int):
        super().__init__()
        self.sids, self.length = list(sids), length
        self.number = {sid: i + 1 for i, sid in enumerate(self.sids)}

    def encode(self, histories: Sequence[Sequence[str]]) -> torch.Tensor:
        """[B, L], the latest items of histories, padded on the right to the longest; unknown SIDs are skipped."""
        known = [[self.number[sid] for sid in history if sid in self.number] for history in histories]
        known = [numbers[-self.length :] for numbers in known]
        ids = torch.zeros((len(known), max(map(len, known)) or 1), dtype=torch.long)
        for row, numbers in zip(ids, known, strict=True):
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        return ids.to(next(self.parameters()).device)

    @torch.inference_mode()
    def scores(self, histories: Sequence[Sequence[str]], items: Sequence[str]) -> list[float]:
        """The score of each item after the history at the same index; equal histories are computed once."""
        distinct = {history: i for i, history in enumerate(dict.fromkeys(map(tuple, histories)))}
        table = self.eval()(self.encode(list(distinct)))
        rows = torch.tensor([distinct[tuple(history)] for history in histories])
        columns = torch.tensor([self.number[item] - 1 for item in items])
        return table[rows.to(table.device), columns.to(table.device)].tolist()

    @torch.inference_mode()
    def logps(self, histories: Sequence[Sequence[str]]) -> torch.Tensor:
        """Log-probabilities [B, S] (nats) of all items, in the order of `sids`, to follow the histories."""
        return self.eval()(self.encode(histories)).log_softmax(dim=1)

    @torch.inference_mode()
    def rankings(self, histories: Sequence[Sequence[str]], length: int) -> list[list[str]]:
        """The `length` best items after each history, best first."""
        self.eval()
        ranked, batch_size = [], max(min(MOST_SCORES // len(self.sids), 1024), 1)
        for start in range(0, len(histories), batch_size):
            table = self(self.encode(histories[start : start + batch_size]))
            best = table.topk(min(length, len(self.sids)), dim=1).indices
            ranked += [[self.sids[i] for i in row] for row in best.tolist()]
        return ranked


class SASRec(Recommender):
    """One model."""

    def __init__(
        self,
        sids: Sequence[str],
        hidden_size: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.3,
        length: int = 20,
    ):
        super().__init__(sids, length)
        self.settings: dict[str, int | float] = {
            "hidden_size": hidden_size,
            "layers": layers,
            "heads": heads,
            "dropout": dropout,
            "length": length,
        }
        self.items = nn.Embedding(len(self.sids) + 1, hidden_size, padding_idx=0)
        self.positions = nn.Embedding(length, hidden_size)
        layer = nn.TransformerEncoderLayer(
            hidden_size, heads, hidden_size * 4, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(hidden_size), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        for embedding in (self.items, self.positions):
            nn.init.normal_(embedding.weight, std=hidden_size**-0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Scores [B, S] of all items after histories [B, L]; after one of padding only, all score alike."""
        hidden = self.dropout(self.items(ids) + self.positions.weight[: ids.shape[1]])
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        items = (ids > 0).sum(dim=1)
        last = self.blocks(hidden, mask=mask, is_causal=True)[torch.arange(len(ids)), items.clamp(min=1) - 1]
        return last @ self.items.weight[1:].T * (items > 0).unsqueeze(1)


class Ensemble(Recommender):
    """Several models of the same settings: the mean of their scores, and so, up to a constant for each history, of
    their log-probabilities."""

    def __init__(self, models: Sequence[SASRec]):
        super().__init__(models[0].sids, models[0].length)
        self.models = nn.ModuleList(models)
        self.settings = {**models[0].settings, "models": len(models)}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """As of one model."""
        scores = self.models[0](ids)
        for model in self.models[1:]:
            scores = scores + model(ids)
        return scores / len(self.models)


def loss_of(model: SASRec, histories: Sequence[Sequence[str]], targets: Sequence[str]) -> torch.Tensor:
    """Mean cross-entropy (nats) of the items that followed the histories."""
    wanted = torch.tensor([model.number[target] - 1 for target in targets])
    return F.cross_entropy(model(model.encode(histories)), wanted.to(model.items.weight.device))


def train(
    model: SASRec,
    histories: Sequence[Sequence[str]],
    targets: Sequence[str],
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    end_of_epoch: Callable[[int, float], float],
) -> int:
    """Trains a model with Adam, and leaves it with the weights of its best epoch, whose number is returned.

    Args:
        histories, targets: the SIDs of the training rows.
        num_epochs: at most; it ends sooner after PATIENCE epochs without a gain.
        batch_size: rows of an optimizer step.
        seed: of the order of the rows.
        end_of_epoch: called with the number of an epoch, from 1, and its last loss; returns what the best epoch has
            most of.

    Raises RunError if weights are NaN or infinite.
    """
    rng, optimizer = random.Random(seed), torch.optim.Adam(model.parameters(), lr=learning_rate)
    best, best_epoch = -math.inf, 0
    for epoch in range(1, num_epochs + 1):
        model.train()
        order = rng.sample(range(len(targets)), len(targets))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            optimizer.zero_grad()
            loss = loss_of(model, [histories[i] for i in rows], [targets[i] for i in rows])
            loss.backward()
            optimizer.step()
        if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
            raise RunError(f"weights are NaN or infinite after epoch {epoch}; take a smaller --learning_rate")
        value = end_of_epoch(epoch, loss.item())
        if value > best:
            best, best_epoch = value, epoch
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if epoch - best_epoch == PATIENCE:
            break
    model.load_state_dict(weights)
    return best_epoch


def save(model: SASRec | Ensemble, folder: str, catalogue: str | None = None, train_file: str = "") -> None:
    """Writes the model to a folder; the configuration last, so a folder with a configuration is complete. `catalogue`
    is the fingerprint of its items (`sasrec_files.fingerprint`), `train_file` what it was trained on."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, WEIGHTS_FILE), "wb") as file:  # one of `save_file` could be read by its owner only
        file.write(to_bytes({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    with open(os.path.join(folder, RECORD), "w", encoding="utf-8") as file:
        known = {"catalogue": catalogue, "train_file": train_file, "sids": model.sids}
        json.dump({"settings": model.settings, **known}, file)


def load(folder: str, flag: str = "cf_path") -> SASRec | Ensemble:
    """The model in the folder that a flag names, in evaluation mode. Raises InputError if there is none, or its
    settings do not fit the weights; nothing is allocated for a size that only the settings claim."""
    try:
        with open(os.path.join(folder, RECORD), encoding="utf-8") as file:
            data = json.load(file)
        sids, settings = data["sids"], dict(data["settings"])
        weights, models = load_file(os.path.join(folder, WEIGHTS_FILE)), settings.pop("models", None)
        if not isinstance(sids, list) or not all(isinstance(sid, str) for sid in sids):
            raise ValueError("sids must be a list of texts")
        if not 0 < settings["layers"] * (models or 1) <= len(weights):
            raise ValueError(f"the weights do not have {settings['layers']} layers")
        if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
            raise ValueError("weights are NaN or infinite")
        with torch.device("meta"):
            one = [SASRec(sids, **settings) for _ in range(models or 1)]
            model = one[0] if models is None else Ensemble(one)
        model.load_state_dict(weights, assign=True)
    except (*_UNREADABLE, OSError, RuntimeError, SafetensorError) as error:
        missing = f"{RECORD} has no " if isinstance(error, KeyError) else ""
        reason = missing + " ".join(str(error).split())[:300]
        raise InputError(f"--{flag} {folder}: no SASRec model can be loaded: {reason}; train it again") from None
    return model.eval()
