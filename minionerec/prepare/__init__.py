"""Turns raw interactions and items into the files that training reads."""
