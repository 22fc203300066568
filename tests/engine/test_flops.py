"""The FLOP model against torch's counter and against published shapes."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from mmlm.engine.flops import decode_step, decoder_layer, head, prefill

LLAMA_7B = SimpleNamespace(
    hidden_size=4096,
    num_attention_heads=32,
    intermediate_size=11008,
    num_hidden_layers=32,
    vocab_size=32000,
)


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=80,
        num_hidden_layers=3,
        vocab_size=50,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def counted(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


def test_a_prompt_and_a_step_are_what_torch_counts(model):
    ids = torch.arange(17)[None]
    flops, output = counted(lambda: model(input_ids=ids, use_cache=True))
    assert flops == prefill(model.config, [17] * 3, logits=17)
    step, _ = counted(lambda: model(input_ids=ids[:, :1], past_key_values=output.past_key_values))
    assert step == decode_step(model.config, [18] * 3)


def test_a_7b_llama():
    # 12.952 GFLOP a position without attention, and 8.40 TFLOP for 576 + 64 positions.
    layer = decoder_layer(LLAMA_7B, 1, keys=0)
    assert layer == 404_750_336
    assert head(LLAMA_7B) == 262_144_000
    assert prefill(LLAMA_7B, [640] * 32, causal=True) / 1e12 == pytest.approx(8.40, abs=0.005)
    assert prefill(LLAMA_7B, [2944] * 32, causal=True) / 1e12 == pytest.approx(40.4, abs=0.05)


def test_what_is_refused():
    with pytest.raises(ValueError, match="neither may be negative"):
        decoder_layer(LLAMA_7B, -1)
    with pytest.raises(ValueError, match="3 rows and 4 keys"):
        decoder_layer(LLAMA_7B, 3, keys=4, causal=True)
    with pytest.raises(ValueError, match="31 entries, the decoder 32 layers"):
        prefill(LLAMA_7B, [1] * 31)
