"""Assembling, loading and saving models."""
