"""The harness against itself, by the numbers of the evaluation protocol's last section.

1 (batches) also in `test_bench_runs.py`, 4 (neutral methods) in the contract matrix, 5 (kills) in
`test_kill.py`, 6 (scorers) in `tests/benchmarks`.
"""

import dataclasses

import pytest
import torch
from tiny import FAMILIES, build, picture, shared

from mmlm.inputs import message, prepare
from mmlm.runner import GenerateSettings, Request, generate_all, generation_config

SETTINGS = GenerateSettings(max_new_tokens=6, batch_size=4)
QUESTIONS = ["what is this ?", "is there a dog in the picture ? answer yes or no .", "a cat", "why"]


def requests():
    return [Request(f"q{n}", (picture(n % 3),), text) for n, text in enumerate(QUESTIONS)]


def inputs(model, processor, rows=4):
    return prepare(
        processor,
        [[message("user", text, n_images=1)] for text in QUESTIONS[:rows]],
        [[picture(n % 3)] for n in range(rows)],
        dtype=model.dtype,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_10_1_batch_1_equals_a_left_padded_batch_of_4(family):
    single = dataclasses.replace(SETTINGS, batch_size=1)
    together = list(generate_all(*shared(family), requests(), settings=SETTINGS))
    assert together == list(generate_all(*shared(family), requests(), settings=single))


@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_10_2_cache_and_kernel_change_nothing(family):
    model, processor = shared(family)
    given = inputs(model, processor)
    config = generation_config(model, SETTINGS)
    cached = model.generate(**given, generation_config=config)
    again = model.generate(**given, generation_config=config, use_cache=False)
    assert torch.equal(cached, again)
    other, _ = build(family)
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation("eager")
    with torch.no_grad():
        seen = given["attention_mask"].bool()
        difference = (model(**given).logits - other(**given).logits)[seen]
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_10_3_our_loop_is_the_library_s(family):
    model, processor = shared(family)
    results = generate_all(model, processor, requests()[:1], settings=SETTINGS)
    given = inputs(model, processor, rows=1)
    tokens = model.generate(
        **given,
        max_new_tokens=6,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=generation_config(model, SETTINGS).pad_token_id,
    )
    answer = tokens[0, given["input_ids"].shape[1] :]
    [result] = results
    assert result.text == processor.decode(answer, skip_special_tokens=True).strip()
