"""Generative recommendation with semantic IDs: data, prompts, constrained decoding, training, metrics."""

__version__ = "0.1.0"
