"""Auxiliary prompts: what they are, how they are made and run."""
