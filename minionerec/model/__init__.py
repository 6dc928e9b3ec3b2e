"""Loads models, wraps them with adapters, and computes less than a plain forward pass would."""
