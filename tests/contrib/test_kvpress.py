"""The bridge to kvpress: positions in every layer's cache, refusals; presses where it is there."""

from __future__ import annotations

import ast
import copy
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmlm.contrib.kvpress import _with_positions, compat
from mmlm.errors import InputError, UnsupportedModel

ROOT = Path(__file__).parents[2]
NEVER = {"kvpress", "gurobi", "gurobipy", "openai", "anthropic"}
RING = (
    "mmlm/contrib/*.py",
    "mmlm/probes/*.py",
    "mmlm/engine/*.py",
    "mmlm/head_measures/*.py",
    "mmlm/show/*.py",
    "mmlm/cli/bench/*.py",
    "mmlm/cli/calibrate/*.py",
    "decoding/*.py",
    "benchmarks/mmir/*.py",
    "benchmarks/swapmix/*.py",
    "data_tools/world/*.py",
)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes, **heads, **ids)).eval()


def prompt(n=20):
    ids = torch.randint(4, 128, (1, n), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seen_positions(model):
    """What an attention hook finds, layer by layer and pass by pass, as a press would."""
    found, handles = {}, []
    for part in model.modules():
        if isinstance(getattr(part, "layer_idx", None), int) and hasattr(part, "o_proj"):

            def hook(part, args, kwargs, output):
                found.setdefault(part.layer_idx, []).append(kwargs["cache_position"].tolist())

            handles.append(part.register_forward_hook(hook, with_kwargs=True))
    return found, handles


def test_hooks_find_positions(llama):
    with compat(llama):
        found, handles = seen_positions(llama)
        llama.generate(**prompt(), max_new_tokens=4, do_sample=False)
    for handle in handles:
        handle.remove()
    assert found == {layer: [[*range(20)], [20], [21], [22]] for layer in range(3)}


def test_hooks_find_positions_of_a_model_that_sees():
    model, processor = tiny.build("llava")
    inputs = tiny.inputs(processor, ["is there a dog ?"], [[tiny.picture(1)]])
    n = inputs["input_ids"].shape[1]
    with compat(model):
        found, handles = seen_positions(model)
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for handle in handles:
        handle.remove()
    assert found == {layer: [[*range(n)], [n], [n + 1]] for layer in range(4)}


def test_nothing_changes_and_nothing_stays(llama):
    plain = llama.generate(**prompt(), max_new_tokens=6, do_sample=False)
    before = [(len(p._forward_pre_hooks), len(p._forward_hooks)) for p in llama.modules()]
    with compat(llama):
        bridged = llama.generate(**prompt(), max_new_tokens=6, do_sample=False)
        assert sum(len(p._forward_pre_hooks) for p in llama.modules()) == 4
    assert torch.equal(plain, bridged)
    after = [(len(p._forward_pre_hooks), len(p._forward_hooks)) for p in llama.modules()]
    assert after == before


def test_hooks_leave_after_an_exception(llama):
    with pytest.raises(KeyboardInterrupt), compat(llama):
        raise KeyboardInterrupt
    assert not sum(len(p._forward_pre_hooks) for p in llama.modules())


def test_ring_acceptance_3_padding_is_refused(llama):
    padded = prompt()
    padded["attention_mask"] = padded["attention_mask"].clone()
    padded["attention_mask"][0, :3] = 0
    with compat(llama), pytest.raises(InputError, match="cannot run on padding"):
        llama.generate(**padded, max_new_tokens=2)


def test_batches_are_refused(llama):
    two = {name: value.repeat(2, 1) for name, value in prompt().items()}
    with compat(llama), pytest.raises(InputError, match="a batch of 2 rows"):
        llama.generate(**two, max_new_tokens=2)


def test_batches_of_embeddings_are_refused(llama):
    states = llama.get_input_embeddings()(prompt()["input_ids"]).repeat(2, 1, 1)
    with compat(llama), pytest.raises(InputError, match="a batch of 2 rows"):
        llama(inputs_embeds=states)


def test_positions_are_those_of_each_layers_own_cache(llama):
    """A press may shorten some layers only; positions that a caller gives stay."""

    class Cache:
        def get_seq_length(self, layer):
            return (20, 7, 20)[layer]

    given = {"past_key_values": Cache(), "hidden_states": torch.zeros(1, 2, 64)}
    for number, first in enumerate((20, 7, 20)):
        part = llama.model.layers[number].self_attn
        _, found = _with_positions(part, (), given)
        assert found["cache_position"].tolist() == [first, first + 1]
        assert _with_positions(part, (), {**given, "cache_position": torch.tensor([3])}) is None


def test_a_model_without_a_cache_is_refused():
    with (
        pytest.raises(UnsupportedModel, match="no attention modules"),
        compat(torch.nn.Linear(2, 2)),
    ):
        pass


def of_20_tokens():
    """A model that sees, and a picture with four more tokens."""
    model, processor = tiny.build("llava")
    inputs = tiny.inputs(processor, ["is there a dog ?"], [[tiny.picture(1)]])
    ids = inputs["input_ids"]
    assert int((ids[:, :20] == model.config.image_token_id).sum()) == 16
    cut = {"input_ids": ids[:, :20], "attention_mask": inputs["attention_mask"][:, :20]}
    return model, {**inputs, **cut}


@pytest.mark.parametrize("sees", [False, True])
def test_ring_acceptance_3_a_press(llama, sees):
    kvpress = pytest.importorskip("kvpress")
    model, inputs = of_20_tokens() if sees else (copy.deepcopy(llama), prompt())
    positions = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["position_ids"][0, -1].item()),
        with_kwargs=True,
    )
    with compat(model), kvpress.KnormPress(0.5)(model):
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
        )
    handle.remove()
    # Half of the 20 prompt tokens, and the three new ones that were fed back.
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {10 + 3}
    assert positions == [19, 20, 21, 22]


def test_ring_acceptance_6_nothing_is_imported_early():
    files = [path for pattern in RING for path in ROOT.glob(pattern)]
    assert len(files) > 40
    for path in files:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", ())]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {name.split(".")[0] for name in names} & NEVER, path
    if "kvpress" not in sys.modules:  # that of this file's other test
        import mmlm.contrib.kvpress  # noqa: F401

        assert "kvpress" not in sys.modules
