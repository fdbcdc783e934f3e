"""Benchmarks against the published ways and against other packages: ``make bench``."""
