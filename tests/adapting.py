"""New adapters on the rows of `plain.IDS`, trained for a few steps."""

import torch
from plain import IDS

import lora_utils
from minionerec.flags import AdapterFlags


def adapted(model, ids=IDS, **settings):
    """The model with a new adapter, without dropout unless a setting says otherwise."""
    return lora_utils.add_lora(
        model, lora_utils.lora_config(model, ids, AdapterFlags(**{"lora_dropout": 0.0, **settings}))
    )


def train(model, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(3)
    ids = torch.tensor([[1, 90, 5, 7, 91, 3], [2, 5, 90, 91, 8, 4]])
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=getattr(model, "is_quantized", False)):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
