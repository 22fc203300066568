"""Training programs on transformers, TRL and DeepSpeed."""
