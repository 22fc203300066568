"""Data generation: the embedded world and, later, the preference-data pipelines."""
