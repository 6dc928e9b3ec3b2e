"""Generative recommendation with semantic IDs: data, prompts, constrained decoding, training, metrics."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["InputError", "Ranker", "RunError", "__version__"]

if TYPE_CHECKING:
    from minionerec.errors import InputError, RunError
    from minionerec.ranking import Ranker

_HOME = {"Ranker": "minionerec.ranking", "InputError": "minionerec.errors", "RunError": "minionerec.errors"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: the command lines check their input before torch is imported."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
