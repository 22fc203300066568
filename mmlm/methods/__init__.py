"""Model-side methods: those that change which positions a model computes, or need training."""

__all__: list[str] = []
