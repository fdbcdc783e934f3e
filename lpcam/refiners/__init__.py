"""Refiners: from activation maps to pseudo masks."""

from lpcam.refiners.random_walk import random_walk

__all__ = ["random_walk"]
