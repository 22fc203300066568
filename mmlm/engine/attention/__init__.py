"""Attention rows that methods read and edit, beside the model's own kernel."""
