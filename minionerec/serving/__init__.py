"""Recommends items for histories: requests and what they allow, many from a file, or over HTTP."""
