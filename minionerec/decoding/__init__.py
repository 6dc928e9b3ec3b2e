"""Decodes SIDs: the trie of a catalogue, beam search under its constraint, and rankings."""
