"""SENTINEL: sentence-level preference pairs from the model's own captions (arXiv 2507.12455)."""
