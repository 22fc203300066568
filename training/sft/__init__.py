"""Supervised fine-tuning: conversations, exact labels, packing, buckets, and the recipe."""
