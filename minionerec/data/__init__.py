"""Reads the input files, writes prompts and turns rows into token ids."""
