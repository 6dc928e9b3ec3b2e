"""The release, which checkpoints and data sets record."""

__version__ = "0.2.0"
