"""Measurements of diffgan_fast. Run as modules from the repository root: `python -m benchmarks --help`."""
