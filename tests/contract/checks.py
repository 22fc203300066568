"""The contract that every method must keep, as functions that raise AssertionError.

``test_matrix.py`` runs them for every method and family; ``mutants.py`` breaks the engine on
purpose and requires that they notice.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import Counter

import tiny
import torch
from shapes import record_shapes
from transformers import TextIteratorStreamer

from mmlm import TokenLayout, attach
from mmlm.engine.attention import editor as attention

PROMPTS = ["describe the image in detail .", "is there a dog in the picture ?"]
NEW = 6


def batch(processor):
    """Two prompts of different length with pictures of different shape."""
    return tiny.inputs(processor, PROMPTS, [[tiny.picture(1)], [tiny.picture(2, (90, 60))]])


def generate(model, inputs, **options):
    """New tokens only; every sequence gets its full length."""
    ids = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    return ids[:, inputs["input_ids"].shape[1] :]


def next_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def searches(*methods):
    return [m for m in methods if "search" in m.sites]


def plain_options(*methods):
    """How plain ``generate`` does what these methods do at their neutral setting."""
    found = searches(*methods)
    return {"num_beams": found[0].beams} if found else {}


def visible(model, inputs, *methods):
    """What methods change: the next token's logits; for a search the scores of its answers."""
    if not searches(*methods):
        return next_logits(model, inputs)
    result = model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **plain_options(*methods),
    )
    return result.sequences_scores[:, None]


def neutral_is_plain(method, family):
    model, processor = tiny.shared(family)
    inputs = batch(processor)
    single = tiny.inputs(processor, PROMPTS[:1], [[tiny.picture(1)]])
    modes = (
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": False, "num_beams": 3},
    )
    if searches(method):  # brings its beams along and refuses others
        modes = ({"do_sample": False, **plain_options(method)},)
    for given in (inputs, single):
        plain = next_logits(model, given)
        with attach(model, method.neutral(), processor=processor):
            edited = next_logits(model, given)
        if method.neutral_is_exact:
            assert torch.equal(plain, edited)
        else:
            torch.testing.assert_close(plain, edited, atol=1e-5, rtol=0)
        for mode in modes:
            torch.manual_seed(3)
            expected = generate(model, given, **mode)
            torch.manual_seed(3)
            with attach(model, method.neutral(), processor=processor):
                assert torch.equal(generate(model, given, **mode), expected), mode


def changes_logits(method, family):
    model, processor = tiny.shared(family)
    inputs = batch(processor)
    plain = visible(model, inputs, method)
    with attach(model, method, processor=processor):
        edited = visible(model, inputs, method)
    for row in range(2):
        assert not torch.allclose(plain[row], edited[row], atol=1e-4), f"row {row} is unchanged"


def _footprint(model):
    hooks = {
        name: (
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._forward_hooks_with_kwargs),
            len(m._forward_pre_hooks_with_kwargs),
            sorted(k for k in vars(m) if k not in ("rope_deltas",)),
        )
        for name, m in model.named_modules()
    }
    return hooks, model.config.to_json_string(), model.config._attn_implementation


def leaves_no_trace(method, family):
    model, processor = tiny.shared(family)
    inputs = batch(processor)
    plain = next_logits(model, inputs)
    tokens = generate(model, inputs, do_sample=False)
    before = _footprint(model)  # after a first run: the library itself remembers things then
    with attach(model, method, processor=processor):
        assert _footprint(model) != before, "nothing was installed, so nothing is tested"
        generate(model, inputs, do_sample=False)
    assert _footprint(model) == before
    assert torch.equal(next_logits(model, inputs), plain)
    assert torch.equal(generate(model, inputs, do_sample=False), tokens)
    failed = False
    try:
        with attach(model, method, processor=processor):
            next_logits(model, inputs)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        failed = True
    assert failed
    assert _footprint(model) == before
    assert torch.equal(next_logits(model, inputs), plain)


def survives_a_failing_forward(method, family):
    """An exception in the middle of generate leaves the block usable and the model clean."""
    model, processor = tiny.build(family)
    inputs = batch(processor)
    with attach(model, method, processor=processor):
        expected = generate(model, inputs, do_sample=False)
        calls = Counter()

        def stop(module, args):
            calls["n"] += 1
            if calls["n"] == 3:
                raise MemoryError("made up")

        handle = model.get_decoder().layers[-1].register_forward_pre_hook(stop)
        try:
            generate(model, inputs, do_sample=False)
        except MemoryError:
            calls["caught"] += 1
        handle.remove()
        assert calls["caught"] == 1
        assert torch.equal(generate(model, inputs, do_sample=False), expected)


def batch_equals_single_rows(method, family):
    model, processor = tiny.shared(family)
    pictures = [[tiny.picture(1)], [tiny.picture(2, (90, 60))]]
    inputs = batch(processor)
    with attach(model, method, processor=processor):
        together = generate(model, inputs, do_sample=False)
        logits = visible(model, inputs, method)
        for row, prompt in enumerate(PROMPTS):
            alone = tiny.inputs(processor, [prompt], [pictures[row]])
            torch.testing.assert_close(
                visible(model, alone, method)[0], logits[row], atol=2e-4, rtol=1e-4
            )
            assert torch.equal(generate(model, alone, do_sample=False)[0], together[row])


def _stepwise(model, inputs):
    """Greedy decoding with a cache that the caller holds, step by step."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if not hasattr(model.model, "rope_deltas"):  # such models make 3-D positions by themselves
        inputs = {**inputs, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    output = model(**inputs, use_cache=True)
    tokens = []
    for _ in range(NEW):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        positions = (mask.cumsum(-1) - 1)[:, -1:]
        deltas = getattr(model.model, "rope_deltas", None)
        if deltas is not None:
            positions = (positions + deltas).expand(3, -1, -1)
        output = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return torch.cat(tokens, dim=1)


def cache_paths_agree(method, family):
    """generate (fused rows), a static cache (own caches) and a caller's loop: the same tokens."""
    model, processor = tiny.shared(family)
    inputs = batch(processor)
    suppress = {"suppress_tokens": [3]}
    with attach(model, method, processor=processor), torch.no_grad():
        fused = generate(model, inputs, do_sample=False, **suppress)
        if searches(method):  # needs a cache from which positions can be taken
            return
        if not method.riders and not method.needs_dynamic_cache:
            static = generate(
                model,
                inputs,
                do_sample=False,
                cache_implementation="static",
                disable_compile=True,
                **suppress,
            )
            assert torch.equal(static, fused)
        stepwise = _stepwise(model, inputs)
        same = (fused == stepwise) | (stepwise == 3).cumsum(-1).bool()
        assert bool(same.all())


def beams_equal_static_beams(method, family):
    """Three beams with fused rows equal three beams with separate caches."""
    if method.riders or searches(method) or method.needs_dynamic_cache:
        return
    model, processor = tiny.shared(family)
    inputs = batch(processor)
    with attach(model, method, processor=processor):
        fused = generate(model, inputs, do_sample=False, num_beams=3)
        separate = generate(
            model,
            inputs,
            do_sample=False,
            num_beams=3,
            cache_implementation="static",
            disable_compile=True,
        )
    assert torch.equal(fused, separate)


def sdpa_equals_eager(method, family):
    model, processor = tiny.build(family)
    inputs = batch(processor)
    with attach(model, method, processor=processor):
        sdpa = visible(model, inputs, method)
    model.set_attn_implementation("eager")
    with attach(model, method, processor=processor):
        eager = visible(model, inputs, method)
    torch.testing.assert_close(sdpa, eager, atol=1e-4, rtol=1e-4)


def image_free_row_is_unchanged(method, family):
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, PROMPTS, [[tiny.picture(1)], []])
    plain = visible(model, inputs, method)
    tokens = generate(model, inputs, do_sample=False, **plain_options(method))
    with attach(model, method, processor=processor):
        edited = visible(model, inputs, method)
        mixed = generate(model, inputs, do_sample=False)
    if method.edits_without_image:  # changes the model: such a row is edited, like any other
        alone = tiny.inputs(processor, PROMPTS[1:], [[]])
        with attach(model, method, processor=processor):
            own = visible(model, alone, method)
            expected = generate(model, alone, do_sample=False)
        torch.testing.assert_close(edited[1], own[0], atol=2e-4, rtol=1e-4)
        assert torch.equal(mixed[1], expected[0])
        assert not torch.allclose(edited[1], plain[1], atol=1e-4)
        return
    torch.testing.assert_close(edited[1], plain[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(edited[0], plain[0], atol=1e-4)
    assert torch.equal(mixed[1], tokens[1])
    text = tiny.inputs(processor, PROMPTS, [[], []])
    expected = generate(model, text, do_sample=False, **plain_options(method))
    with attach(model, method, processor=processor):
        assert torch.equal(generate(model, text, do_sample=False), expected)


def two_images(method, family):
    """Two pictures in one prompt run, and their order matters."""
    model, processor = tiny.shared(family)
    a, b = tiny.picture(1), tiny.picture(2)
    with attach(model, method, processor=processor):
        ab = visible(model, tiny.inputs(processor, PROMPTS[:1], [[a, b]]), method)
        ba = visible(model, tiny.inputs(processor, PROMPTS[:1], [[b, a]]), method)
        ragged = tiny.inputs(processor, PROMPTS, [[a, b], [b]])
        rows = visible(model, ragged, method)
    assert not torch.allclose(ab, ba, atol=1e-4)
    torch.testing.assert_close(rows[0], ab[0], atol=2e-4, rtol=1e-4)


def streams_from_a_thread(method, family):
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, PROMPTS[:1], [[tiny.picture(1)]])
    with attach(model, method, processor=processor):
        expected = generate(model, inputs, do_sample=False)
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(
            target=model.generate,
            kwargs={
                **inputs,
                "max_new_tokens": NEW,
                "min_new_tokens": NEW,
                "do_sample": False,
                "streamer": streamer,
            },
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == processor.tokenizer.decode(expected[0])


def counted_cost(method, family):
    model, processor = tiny.shared(family)
    inputs = batch(processor)
    rows = inputs["input_ids"].shape[0]

    def count():
        seen = []

        def note(module, args, kwargs):
            rows, new = kwargs["inputs_embeds"].shape[:2]
            past, session = kwargs.get("past_key_values"), getattr(model, "_mmlm_session", None)
            # Several new positions behind a cache are as many rows of a decoding step, unless
            # they are the rest of an auxiliary prompt whose beginning was known.
            step = past is not None and past.get_seq_length() and not (session and session.quiet)
            seen.append(rows * new if step else rows)

        handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        generate(model, inputs, do_sample=False)
        handle.remove()
        return sum(seen)

    plain = count()
    with attach(model, method, processor=processor):
        ours = count()
    declared = method.cost
    assert plain == rows * NEW
    assert ours - plain == rows * (declared.prompt + declared.token * (NEW - 1))


def _squares(shapes, n, *, masks=False):
    """How often each operator made a tensor with two sides of ``n``; ``masks``: may be allowed."""
    found = Counter()
    for (name, shape, dtype), count in shapes.items():
        # On a CPU sdpa makes an additive mask of a bool one.
        mask = shape[1] == 1 if len(shape) == 4 else dtype == torch.bool
        if shape.count(n) >= 2 and not (masks and mask):
            found[name] += count
    return found


@contextlib.contextmanager
def short_chunks():
    """Attention rows one by one, as in a prompt that fills a chunk with each of its rows."""
    before, attention._CHUNK = attention._CHUNK, 1
    try:
        yield
    finally:
        attention._CHUNK = before


def no_square_tensor(method, family):
    """No tensor with two dimensions of the prompt's length beyond what the plain model has.

    Families with attention in both directions make a mask in every pass: one per auxiliary prompt.
    Attention rows come in chunks, which a prompt as short as this one would fit into whole. What
    opens attention needs the mask itself, one for all heads.
    """
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, PROMPTS[:1], [[tiny.picture(1)]])
    passes = 1 + method.cost.prompt
    n = inputs["input_ids"].shape[1]
    with torch.no_grad():
        with record_shapes() as plain:
            model(**inputs)
        with short_chunks(), attach(model, method, processor=processor), record_shapes() as ours:
            model(**inputs)
    allowed = Counter({name: passes * count for name, count in _squares(plain, n).items()})
    assert _squares(ours, n, masks="mask" in method.sites) - allowed == Counter()


def inputs_stay_untouched(method, family):
    """Site functions must not write into the tensors they are given."""
    model, processor = tiny.shared(family)
    inputs = batch(processor)
    cls, checked = type(method), Counter()
    originals = {site: getattr(cls, site) for site in method.sites}

    def watched(site, function):
        signature = inspect.signature(function)

        def call(self, *args):
            bound = signature.bind(self, *args).arguments
            tensors = [t for a in bound.values() for t in _tensors(a)]
            versions = [t._version for t in tensors]
            result = function(self, *args)
            assert [t._version for t in tensors] == versions, f"{site} wrote into its input"
            checked[site] += len(tensors)
            return result

        return call

    try:
        for site, function in originals.items():
            setattr(cls, site, watched(site, function))
        with attach(model, method, processor=processor), torch.no_grad():
            visible(model, inputs, method)
    finally:
        for site, function in originals.items():
            setattr(cls, site, function)
    assert set(checked) == set(method.sites)
    without = {"search", "keys"}  # which get no tensor beside the state
    assert all(count for site, count in checked.items() if site not in without)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, TokenLayout):
        return list(vars(value).values())
    return []


CHECKS = (
    neutral_is_plain,
    changes_logits,
    leaves_no_trace,
    survives_a_failing_forward,
    batch_equals_single_rows,
    cache_paths_agree,
    beams_equal_static_beams,
    sdpa_equals_eager,
    image_free_row_is_unchanged,
    two_images,
    streams_from_a_thread,
    counted_cost,
    no_square_tensor,
    inputs_stay_untouched,
)
