"""Refiners: from activation maps to pseudo masks."""
