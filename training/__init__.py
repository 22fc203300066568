"""Training programs on transformers, TRL and DeepSpeed."""

import mmlm  # noqa: F401  (its guard must be there before transformers asks for torchvision)
