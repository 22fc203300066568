"""CrossLMM: operations and memory, counted (acceptance 9)."""

import pytest
import torch
from shapes import record_shapes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from mmlm.engine.flops import prefill
from mmlm.methods.cross_blocks import CrossAttention, Shape, operations

SEVEN_B = Shape(width=4096, heads=32, kv_heads=32, head_dim=128, bias=False, out_bias=False)
LLAMA = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
BLOCKS = 8  # every fourth of 32 layers


@pytest.mark.parametrize(
    ("pooled", "originals", "source", "expected"),
    [
        (9, 576, 1024, (0.947, 0.155, 0.039, 0.006, 1.146)),
        (9, 576, 4096, (0.947, 0.618, 0.039, 0.006, 1.61)),
        (45, 2880, 1024, (1.415, 0.773, 0.059, 0.041, 2.29)),
        (45, 2880, 4096, (1.415, 3.09, 0.059, 0.041, 4.61)),
    ],
)
def test_acceptance_9_operations_of_a_7b_model(pooled, originals, source, expected):
    """TFLOP of a prefill with 64 text tokens, both kinds in eight layers."""
    n = pooled + 64
    decoder = prefill(LLAMA, [n] * 32, causal=True, logits=0)
    sums = {"keys_values": 0, "queries": 0, "attention": 0}
    for queries in (pooled, 64):
        for name, count in operations(SEVEN_B, source, originals, queries).items():
            sums[name] += BLOCKS * count
    found = (decoder, *sums.values(), decoder + sum(sums.values()))
    for tera, given in zip(found, expected, strict=True):
        places = len(str(given).partition(".")[2])
        assert abs(tera / 1e12 - given) <= 0.005 * given + 0.5 * 10**-places


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_acceptance_9_a_block_runs_what_is_counted(kv_heads):
    shape = Shape(width=64, heads=8, kv_heads=kv_heads, head_dim=8, bias=True, out_bias=False)
    block = CrossAttention(shape, 48, eps=1e-6, std=0.1, gate=1.0, frames=0)
    x, z = torch.randn(1, 10, 64), torch.randn(1, 33, 48)
    # Only the plain kernel shows its products to the counter.
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        block(x, *block.keys_values(z, torch.zeros(1, 33, dtype=torch.long)))
    expected = sum(operations(shape, 48, 33, 10).values())
    assert abs(counter.get_total_flops() - expected) <= 0.005 * expected


def test_acceptance_9_memory_is_linear_in_the_originals():
    """Twice the originals: no more than twice the bytes, and no tensor of queries x originals."""
    shape = Shape(width=32, heads=4, kv_heads=2, head_dim=8, bias=False, out_bias=False)
    block = CrossAttention(shape, 24, eps=1e-6, std=0.1, gate=1.0, frames=0)
    made, queries = {}, 300
    for count in (2000, 4000, 8000):
        x, z = torch.randn(1, queries, 32), torch.randn(1, count, 24)
        keys = torch.rand(1, count) < 0.9
        number = torch.zeros(1, count, dtype=torch.long)
        with torch.no_grad(), record_shapes() as shapes:
            block(x, *block.keys_values(z, number), keys)
        made[count] = sum(
            torch.Size(shape).numel() * dtype.itemsize * n
            for (_, shape, dtype), n in shapes.items()
        )
        wide = [shape for _, shape, _ in shapes if queries in shape and count in shape]
        assert not wide
        assert max(torch.Size(shape).numel() for _, shape, _ in shapes) <= count * 24 * 2
    assert made[8000] - made[4000] == 2 * (made[4000] - made[2000])
