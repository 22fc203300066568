"""Benchmarks with the official scorers' numbers, and speed measurements."""
