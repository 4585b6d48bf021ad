"""Recipes of 8-bit training."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
