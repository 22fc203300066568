"""How many floating-point operations a decoder needs: whole numbers, from its configuration alone.

A multiplication and an addition count as two. Norms, rotations, softmax and activations are left
out, as :class:`torch.utils.flop_counter.FlopCounterMode` leaves them out: under eager attention it
counts exactly these numbers. (Its count of sdpa on a CPU lacks the attention products.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["decode_step", "decoder_layer", "head", "prefill"]


def decoder_layer(config: Any, new: int, *, keys: int | None = None, causal: bool = False) -> int:
    """Operations of one decoder layer over ``new`` positions of one row.

    ``2 n (2 h q + 2 h kv + 3 h i) + 4 n k q`` with width h, query width q, key and value width kv,
    MLP width i and k keys; for a 7B LLaMA 0.405 GFLOP a position, plus attention.

    Args:
        config: A text decoder's configuration: ``hidden_size``, ``num_attention_heads``,
            ``num_key_value_heads`` (default: all), ``head_dim`` (default: width / heads),
            ``intermediate_size``. Gated MLPs (three matrices).
        new: Positions that run through the layer.
        keys: Positions that they attend to; None: themselves.
        causal: Whether the kernel skips what lies above the diagonal, which halves the products.
            Only for a whole prompt.

    Raises:
        ValueError: If a count is negative, or ``causal`` comes with other keys than the rows.
    """
    keys = new if keys is None else keys
    if new < 0 or keys < 0:
        raise ValueError(f"new = {new}, keys = {keys}: neither may be negative")
    if causal and keys != new:
        raise ValueError(f"causal counts a whole prompt, but there are {new} rows and {keys} keys")
    width, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    q, kv = heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size
    matrices = 2 * new * (2 * width * q + 2 * width * kv + 3 * width * config.intermediate_size)
    products = 4 * new * keys * q
    return matrices + (products // 2 if causal else products)


def head(config: Any, rows: int = 1) -> int:
    """Operations of the language-modelling head over ``rows`` positions."""
    return 2 * rows * int(config.hidden_size) * int(config.vocab_size)


def prefill(config: Any, lengths: Sequence[int], *, causal: bool = False, logits: int = 1) -> int:
    """Operations of a prompt's first pass, one row.

    Args:
        config: As for :func:`decoder_layer`.
        lengths: Positions in each layer, one number per layer; they shrink where a method removes
            some.
        causal: As for :func:`decoder_layer`.
        logits: Positions that run through the head.

    Raises:
        ValueError: If there is not one length per layer.
    """
    if len(lengths) != config.num_hidden_layers:
        raise ValueError(
            f"lengths has {len(lengths)} entries, the decoder {config.num_hidden_layers} layers"
        )
    return sum(decoder_layer(config, n, causal=causal) for n in lengths) + head(config, logits)


def decode_step(config: Any, lengths: Sequence[int]) -> int:
    """Operations of one generated token, one row.

    Args:
        config: As for :func:`decoder_layer`.
        lengths: Keys in each layer, the new one included.
    """
    return sum(decoder_layer(config, 1, keys=n) for n in lengths) + head(config)
