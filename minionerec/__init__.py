"""Generative recommendation with semantic IDs: data, prompts, constrained decoding, training, metrics."""

from typing import TYPE_CHECKING

from minionerec.version import __version__

__all__ = ["InputError", "RLFlags", "Ranker", "RunError", "SFTFlags", "__version__"]

if TYPE_CHECKING:
    from minionerec.errors import InputError, RunError
    from minionerec.flags.rl import RLFlags
    from minionerec.flags.sft import SFTFlags
    from minionerec.ranking import Ranker

_HOME = {
    "InputError": "minionerec.errors",
    "RLFlags": "minionerec.flags.rl",
    "Ranker": "minionerec.ranking",
    "RunError": "minionerec.errors",
    "SFTFlags": "minionerec.flags.sft",
}

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> object:
        """Imports what is asked for: the command lines check their input before torch is imported."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        if name == "Ranker":
            import_module("minionerec.output").hide_noise()
        return getattr(import_module(_HOME[name]), name)
