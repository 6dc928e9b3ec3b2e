"""GPUs by name, for `--gpu`.

The figures are those known of the vendors' data sheets; not each was looked up again, so check the sheet of a card that
you buy by an estimate.

The rates are those of dense matmuls in bfloat16 with float32 sums, without sparsity; float16 on cards that have no
bfloat16 (T4, V100). GeForce cards compute at half their float16 rate with float32 sums. Written on 2026-11-29.
"""

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU: memory in GB, bandwidth in GB/s, and TFLOP/s of matmuls in 16 bits."""

    name: str
    memory: float
    bandwidth: float
    tflops: float


CARDS = (
    Card("RTX 3060 12GB", 12, 360, 25.5),
    Card("RTX 3080 10GB", 10, 760, 59.5),
    Card("RTX 3090", 24, 936, 71),
    Card("RTX 3090 Ti", 24, 1008, 80),
    Card("RTX 4060 Ti 16GB", 16, 288, 44),
    Card("RTX 4070", 12, 504, 58),
    Card("RTX 4070 Ti", 12, 504, 80),
    Card("RTX 4070 Ti SUPER", 16, 672, 88),
    Card("RTX 4080", 16, 717, 97.5),
    Card("RTX 4080 SUPER", 16, 736, 104),
    Card("RTX 4090", 24, 1008, 165),
    Card("RTX 4090 D", 24, 1008, 147),
    Card("RTX 5070 Ti", 16, 896, 88),
    Card("RTX 5080", 16, 960, 113),
    Card("RTX 5090", 32, 1792, 210),
    Card("RTX A6000", 48, 768, 155),
    Card("RTX 6000 Ada", 48, 960, 364),
    Card("T4", 16, 320, 65),
    Card("V100 16GB", 16, 900, 125),
    Card("V100 32GB", 32, 900, 125),
    Card("L4", 24, 300, 121),
    Card("A10", 24, 600, 125),
    Card("A30", 24, 933, 165),
    Card("A40", 48, 696, 150),
    Card("L40S", 48, 864, 362),
    Card("A100 40GB", 40, 1555, 312),
    Card("A100 80GB", 80, 2039, 312),
    Card("A800 80GB", 80, 2039, 312),
    Card("H20", 96, 4000, 148),
    Card("H100", 80, 3350, 989),
    Card("H100 PCIe", 80, 2000, 756),
    Card("H800", 80, 3350, 989),
    Card("H200", 141, 4800, 989),
)


def find_card(name: str) -> Card | None:
    """The card of a name as users write it, such as `rtx4090` or `A100 80GB`; None for one that is not in the table."""
    return next((card for card in CARDS if _letters(card.name) == _letters(name)), None)


def unknown_card(name: str) -> str | None:
    """What is wrong with a name; None for that of a card, and for no name."""
    if not name or find_card(name):
        return None
    spelled = {_letters(card.name): card.name for card in CARDS}
    written = _letters(name)
    close = [card for letters, card in spelled.items() if len(written) > 1 and letters.startswith(written)]
    close = close or [spelled[letters] for letters in difflib.get_close_matches(written, spelled, n=2)]
    known = ", ".join(card.name for card in CARDS)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"is not in the table of cards; {hint}choose from {known}, or give its memory: --gpu_memory 12GB"


def _letters(name: str) -> str:
    """A name without what people write differently."""
    return re.sub(r"[^a-z0-9]|nvidia|geforce|tesla", "", name.lower())
