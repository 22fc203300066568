"""Preference training: rows, batches, TRL's trainer and what it lacks."""
