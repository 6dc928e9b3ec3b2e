"""The peak of memory, with and without a GPU, and pauses of garbage collection."""

import gc
import sys

import pytest
import torch

from minionerec.process_memory import forget_peak_of_loading, importing, peak_memory_gb


def test_the_peak_of_loading_is_forgotten():
    loaded = torch.ones(100_000_000)
    before = peak_memory_gb()
    del loaded
    forget_peak_of_loading()
    assert peak_memory_gb() < before - 0.3


def test_the_collector_pauses_for_imports_and_then_skips_what_the_first_ones_made(monkeypatch):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled() and not frozen  # torch was imported before, so other objects may be garbage
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
    with importing():
        pass
    assert frozen == [True]


def test_the_peak_of_loading_on_a_card_is_forgotten(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(True))
    forget_peak_of_loading()
    assert reset == [True]
