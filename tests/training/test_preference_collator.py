"""Batches of preference rows: equal to TRL's where TRL is right, exact where it is not."""

import functools
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig
from preference_rows import CHOSEN, REJECTED, asked, pair, read, scored, sizes
from tiny import ALL, build, picture, shared
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl_toy import losses, trainer

import mmlm
from data_tools.generators.prompts import CaptionPrompts
from mmlm.engine.anatomy import Anatomy
from mmlm.engine.branches.prompts import encode
from mmlm.inputs import load_image, render, use_chat_template
from training.errors import EqualResponses
from training.preference.collator import VisionPreferenceCollator
from training.preference.features import check_features
from training.preference.rows import PreferenceRow
from training.preference.table import row_table

WITH_TEXT_ROWS = [family for family in ALL if family != "paligemma"]
CONTEXT = "a dog in the picture ."


@functools.cache
def ready(family):
    """A processor whose template ends an answer with the end token, as chat models' do."""
    processor = build(family)[1]
    use_chat_template(processor, "simple")
    return processor


def with_bos(processor):
    """The processor, its tokenizer putting BOS before every text."""
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return processor


# ---- TRL -----------------------------------------------------------------------------------------


def raw(processor, row):
    """A row as TRL's raw strings: prompt and context rendered, answers with their ends."""
    text = render(processor, row.prompt)
    end = processor.tokenizer.eos_token
    if row.context:
        text = f"{text} {row.context}"
    return {
        "images": list(row.images),
        "prompt": text,
        "chosen": f" {row.chosen}{end if row.chosen_ends else ''}",
        "rejected": f" {row.rejected}{end if row.rejected_ends else ''}",
    }


def chat(row):
    return {
        "images": list(row.images),
        "prompt": [dict(one) for one in row.prompt],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": row.chosen}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": row.rejected}]}],
    }


def assert_same_batch(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("family", WITH_TEXT_ROWS)
def test_acceptance_2_same_batch_as_trl(family):
    """In both of TRL's forms; trl-dpo 9.2."""
    processor = ready(family)
    rows = [pair(0), pair(1, 2), pair(2, question="is there a dog ?", rejected="no")]
    ours = VisionPreferenceCollator(processor)(rows)
    trl = DataCollatorForVisionPreference(processor)
    assert_same_batch(ours, trl([raw(processor, row) for row in rows]))
    assert_same_batch(ours, trl([chat(row) for row in rows]))


def on_disk(rows, folder):
    """Rows whose pictures are files."""
    made = []
    for row in rows:
        paths = [folder / f"{row.id}-{n}.png" for n in range(len(row.images))]
        for path, image in zip(paths, row.images, strict=True):
            image.save(path)
        fields = {**vars(row), "images": tuple(map(str, paths))}
        made.append(PreferenceRow(**fields))
    return made


def trained(tmp_path, rows, *, ours, family="llava", **options):
    """TRL's trainer, unmodified, with TRL's collator or ours."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
    made = trainer(
        [raw(ready(family), row) for row in rows],
        tmp_path,
        family=family,
        lora=lora,
        learning_rate=3e-2,
        **options,
    )
    if ours:
        made.train_dataset = row_table(rows)
        made.data_collator = VisionPreferenceCollator(ready(family))
    made.train()
    return losses(made)


MIXED = [pair(n, 1, rejected=f"{REJECTED} a dog" if n % 2 else REJECTED) for n in range(6)]


def test_acceptance_2_same_loss_as_trl(tmp_path):
    """An unmodified DPOTrainer takes our collator, and its losses are the same; trl-dpo 9.2."""
    rows = on_disk(MIXED, tmp_path)
    theirs = trained(tmp_path, rows, ours=False)
    assert len(theirs) == 3
    assert theirs.std() > 1e-3
    assert torch.equal(trained(tmp_path, rows, ours=True), theirs)


@pytest.mark.parametrize("context", ["", CONTEXT])
def test_acceptance_3_c_dpo_is_trls_dpo_with_the_context_in_the_prompt(tmp_path, context):
    """The same floats; trl-dpo 9.3."""
    rows = [
        PreferenceRow(**{**vars(row), "context": context, "chosen_ends": False}) for row in MIXED
    ]
    processor = ready("llava")
    batch = VisionPreferenceCollator(processor)(rows)
    theirs = DataCollatorForVisionPreference(processor)([raw(processor, row) for row in rows])
    assert_same_batch(batch, theirs)
    rows = on_disk(rows, tmp_path)
    assert torch.equal(trained(tmp_path, rows, ours=True), trained(tmp_path, rows, ours=False))


# ---- C-DPO ---------------------------------------------------------------------------------------


def log_probs(model, batch):
    """log p of every token [2B, L - 1], of the formula itself."""
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
    found = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    return found.gather(2, batch["input_ids"][:, 1:, None])[..., 0]


def policy_and_reference():
    policy, _ = build("llava")
    reference, _ = build("llava")
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
        parameter.add_(0.02 * torch.randn_like(parameter))
    return policy, reference


def c_dpo(policy, reference, batch, mask, beta=0.1, nll=0.0):
    """Equation 6 of arXiv 2507.12455, the sum over the positions of a mask."""
    mine = (log_probs(policy, batch) * mask[:, 1:]).sum(1)
    theirs = (log_probs(reference, batch) * mask[:, 1:]).sum(1)
    chosen, rejected = (mine - theirs).chunk(2)
    loss = -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
    return loss - nll * (mine / mask[:, 1:].sum(1)).chunk(2)[0].mean()


def test_sentinel_acceptance_13_2_empty_context_is_sigmoid_dpo(tmp_path):
    """TRL's loss on our batch is the formula of C-DPO."""
    rows = on_disk(MIXED[:2], tmp_path)
    batch = VisionPreferenceCollator(ready("llava"))(rows)
    policy, reference = policy_and_reference()
    expected = c_dpo(policy, reference, batch, batch["completion_mask"])
    made = trainer([raw(ready("llava"), row) for row in rows], tmp_path, ref_model=reference)
    found = made._compute_loss(made.model, batch, return_outputs=False)
    assert abs(expected.item() - torch.log(torch.tensor(2.0)).item()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_sentinel_acceptance_13_3_the_context_cancels():
    """Scored or not, a shared context changes nothing, unless there is a term that is no ratio."""
    context = "a dog ."
    batch = VisionPreferenceCollator(ready("llava"))([pair(0, context=context)])
    masked = batch["completion_mask"]
    begin = len(ready("llava").tokenizer(f" {context}")["input_ids"])
    whole = masked.clone()
    for row in whole:
        start = int(row.argmax())
        row[start - begin : start] = 1
    before = read({**batch, "completion_mask": whole}, ready("llava").tokenizer)
    assert all(text.endswith("ASSISTANT:") for text in before)
    policy, reference = policy_and_reference()
    found = {}
    for name, mask in (("masked", masked), ("whole", whole)):
        for nll in (0.0, 1.0):
            policy.zero_grad()
            loss = c_dpo(policy, reference, batch, mask, nll=nll)
            loss.backward()
            gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
            found[name, nll] = loss.item(), torch.cat(gradients)
    (masked_loss, masked_grad), (whole_loss, whole_grad) = found["masked", 0], found["whole", 0]
    assert abs(masked_loss - whole_loss) < 1e-5
    assert masked_grad.abs().max() > 1e-3
    assert (masked_grad - whole_grad).abs().max() < 1e-6
    assert abs(found["masked", 1][0] - found["whole", 1][0]) > 1e-2


@pytest.mark.parametrize("context", ["", CONTEXT])
def test_sentinel_acceptance_13_4_no_gradient_outside_the_answer(tmp_path, context):
    """Exactly zero on prompt, picture, context and padding, through TRL's own loss."""
    rows = on_disk([pair(0, context=context), pair(1, 2, context=context)], tmp_path)
    made = trainer(
        [raw(ready("llava"), row) for row in rows], tmp_path, ref_model=policy_and_reference()[1]
    )
    states = []

    def keep(module, args, kwargs, output):
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
            states.append(output.last_hidden_state)

    made.model.model.register_forward_hook(keep, with_kwargs=True)
    batch = VisionPreferenceCollator(ready("llava"))(rows)
    made._compute_loss(made.model, batch, return_outputs=False).backward()
    tokenizer = ready("llava").tokenizer
    for n, answer in enumerate([CHOSEN, CHOSEN, REJECTED, REJECTED]):
        length = int(batch["attention_mask"][n].sum())
        n_answer = len(tokenizer(f" {answer}</s>")["input_ids"])
        # The state of a token predicts the next one.
        predicting = torch.arange(length - n_answer - 1, length - 1)
        moved = states[0].grad[n].abs().amax(-1)
        assert (moved[predicting] > 0).all()
        moved[predicting] = 0
        assert not moved.any()


def test_sentinel_acceptance_13_7_a_context_that_stands_in_the_question_too():
    """What the authors' search by ids would find in the question."""
    processor = ready("llava")
    context = "a cat sits on a red couch"
    row = pair(
        question=f"{context} , is it so ? {context}", context=context, chosen="near a dog .",
        rejected=f"{context} .",
    )  # fmt: skip
    batch = VisionPreferenceCollator(processor)([row])
    assert scored(batch, processor.tokenizer) == [" near a dog .</s>", f" {context} .</s>"]
    assert all(t.endswith(f"ASSISTANT: {context}") for t in read(batch, processor.tokenizer))


def merging_processor():
    """A vocabulary of characters, and of ``..`` and of ``.`` with a blank behind it."""
    letters = sorted(set(map(chr, range(32, 127))) | {"\n"})
    specials = ["<unk>", "<pad>", "<s>", "</s>", "<image>"]
    vocabulary = {text: n for n, text in enumerate([*specials, *letters, ". ", ".."])}
    core = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[(".", " "), (".", ".")], unk_token="<unk>")
    )
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    old = build("llava")[1]
    processor = type(old)(
        old.image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    use_chat_template(processor, "simple")
    return processor


@pytest.mark.parametrize("context", ["A lawn.", "A lawn.."])
def test_sentinel_acceptance_13_7_a_context_whose_last_token_merges_with_the_answer(context):
    """A token that straddles the boundary belongs to the answer, and nothing is read twice.

    Alone, the second context ends in one token ``..``; before an answer in ``.`` and ``. ``.
    """
    processor = merging_processor()
    tokenizer = processor.tokenizer
    row = pair(context=context, chosen="A dog.", rejected="A cat.")
    collator = VisionPreferenceCollator(processor)
    batch = collator([row])
    assert scored(batch, tokenizer) == [". A dog.</s>", ". A cat.</s>"]
    assert all(text.endswith(f"ASSISTANT: {context[:-1]}") for text in read(batch, tokenizer))
    text = render(processor, row.prompt).replace("<image>", "<image>" * 16)
    whole = tokenizer(f"{text} {context} A dog.</s>")["input_ids"]
    assert batch["input_ids"][0].tolist() == whole
    assert collator.length(row, sizes(row)).tokens == len(whole)


# ---- what generation sees ------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["", CONTEXT])
@pytest.mark.parametrize("family", [*ALL, "embedded"])
def test_the_prompt_is_that_of_generation(family, context):
    """Token for token, with either template; the answer is what the model would go on with."""
    processor = mmlm.load("embedded")[1] if family == "embedded" else shared(family)[1]
    row = pair(context=context, question="describe the image .", chosen="a cat on a couch .")
    batch = VisionPreferenceCollator(processor)([row])
    made = CaptionPrompts(processor).inputs(row.images[0], "describe the image .", context)
    start = int(batch["completion_mask"][0].argmax())
    assert batch["input_ids"][0, :start].tolist() == made["input_ids"][0].tolist()
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in made and name in batch:
            assert batch[name][0, :start].tolist() == made[name][0].tolist()
    answer = batch["input_ids"][0][batch["completion_mask"][0].bool()]
    said = processor.tokenizer.decode(answer, skip_special_tokens=True)
    assert said.strip() == "a cat on a couch ."
    assert answer[-1] == processor.tokenizer.eos_token_id


def test_pictures_stay_where_the_prompt_has_them():
    """Also with a template that prints them all first, as LLaVA-1.5's does."""
    processor = build("llava")[1]
    processor.chat_template = (
        "{% for m in messages %}{% for p in m['content'] if p['type'] == 'image' %}<image>\n"
        "{% endfor %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}"
        "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    content = [
        *({"type": "text", "text": "first "}, {"type": "image"}),
        *({"type": "text", "text": " second "}, {"type": "image"}),
    ]
    row = pair(0, 2, prompt=({"role": "user", "content": content},))
    [text, _] = read(VisionPreferenceCollator(processor)([row]), processor.tokenizer)
    picture_text = "<image>" * 16
    assert f"first {picture_text} second {picture_text}" in text


# ---- BOS, EOS ------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_acceptance_10_bos_exactly_once(family, written):
    """Whether the template writes it or the tokenizer adds it, or both; trl-dpo 9.10."""
    processor = with_bos(build(family)[1])
    if written:
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    rows = [pair(0), pair(1, 0), pair(2, context=CONTEXT)]
    collator = VisionPreferenceCollator(processor)
    batch = collator(rows)
    bos = processor.tokenizer.bos_token_id
    assert (batch["input_ids"][:, 0] == bos).all()
    assert ((batch["input_ids"] == bos).sum(1) == 1).all()
    longest = batch["attention_mask"].sum(1).view(2, -1).amax(0)
    assert [collator.length(row, sizes(row)).tokens for row in rows] == longest.tolist()
    if "mm_token_type_ids" in batch:
        is_picture = batch["input_ids"] == processor.image_token_id
        assert torch.equal(batch["mm_token_type_ids"].bool(), is_picture)


def test_acceptance_10_a_tokenizer_without_bos_gets_none():
    batch = VisionPreferenceCollator(build("llava")[1])([pair()])
    assert not (batch["input_ids"] == shared("llava")[1].tokenizer.bos_token_id).any()


def test_acceptance_10_two_bos_are_refused():
    processor = with_bos(build("llava")[1])
    processor.chat_template = "<s><s>" + processor.chat_template
    with pytest.raises(mmlm.errors.InputError, match="row 'r0' begins with two '<s>'"):
        VisionPreferenceCollator(processor)([pair()])


@pytest.mark.parametrize(
    ("end_token", "expected"),
    [
        ("own", [False, True, True, False]),
        ("never", [False] * 4),
        ("always", [True] * 4),
    ],
)
def test_acceptance_10_eos_where_the_answer_ends(end_token, expected):
    """The last scored token is EOS then; elsewhere there is none; trl-dpo 9.10."""
    processor = build("llava")[1]
    rows = [
        pair(0, chosen_ends=False, rejected_ends=True),
        pair(1, chosen_ends=True, rejected_ends=False),
    ]
    batch = VisionPreferenceCollator(processor, end_token=end_token)(rows)
    end = processor.tokenizer.eos_token_id
    for ids, mask, ends in zip(batch["input_ids"], batch["completion_mask"], expected, strict=True):
        assert (ids[mask.bool()][-1] == end) == ends
        assert int((ids == end).sum()) == ends


def test_acceptance_10_the_end_is_the_templates_own():
    """Chat models end a turn with another token than the tokenizer's EOS (Gemma, Llama 3)."""
    processor = build("llava")[1]
    processor.tokenizer.add_tokens(["<turn_end>"], special_tokens=True)
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}\n{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
        "<turn_end>\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    batch = VisionPreferenceCollator(processor)([pair()])
    assert scored(batch, processor.tokenizer) == [f"{CHOSEN}<turn_end>", f"{REJECTED}<turn_end>"]


def test_no_end_token_is_known():
    processor = build("llava")[1]
    processor.tokenizer.eos_token = None
    with pytest.raises(mmlm.errors.InputError, match="no end token is known"):
        VisionPreferenceCollator(processor)([pair()])
    VisionPreferenceCollator(processor, end_token="never")([pair()])


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_acceptance_8_rows_with_different_numbers_of_pictures(family, tmp_path):
    """0, 1 and 3 pictures in a batch; features as many as places; one step; trl-dpo 9.8."""
    counts = (1, 3) if family == "paligemma" else (0, 1, 3)
    rows = on_disk([pair(n, count, context=CONTEXT) for n, count in enumerate(counts)], tmp_path)
    model, processor = build(family)
    made = trainer(
        [{"images": [], "prompt": "", "chosen": "", "rejected": ""}] * len(rows),
        tmp_path,
        family=family,
        ref_model=build(family, seed=1)[0],
        per_device_train_batch_size=len(rows),
    )
    made.train_dataset = row_table(rows)
    made.data_collator = collator = VisionPreferenceCollator(processor)
    batch = collator(rows)
    image_ids = torch.tensor(Anatomy(model).image_ids)
    places = torch.isin(batch["input_ids"], image_ids).sum(1)
    assert (places.view(2, -1)[0] > 0).tolist() == [count > 0 for count in counts]
    text = {*collator(rows[:1]), "token_type_ids", "mm_token_type_ids"} - {
        name for name in batch if name.startswith(("pixel", "image", "batch"))
    }
    vision = {name: value for name, value in batch.items() if name not in text}
    with torch.no_grad():
        assert len(encode(Anatomy(model), vision)) == int(places.sum())
    parts = Anatomy(made.model)
    watched = [*parts.tower_blocks[0].parameters(), *parts.layers[0].parameters()]
    before = [p.detach().clone() for p in watched]
    made.train()
    [loss] = losses(made)
    assert loss.isfinite()
    moved = [not torch.equal(a, b) for a, b in zip(before, watched, strict=True)]
    assert moved[0]
    assert moved[-1]
    assert all(p.isfinite().all() for p in made.model.parameters())


@pytest.mark.parametrize("family", ALL)
def test_features_are_as_many_as_places(family):
    """Checked before training, for every number of pictures, each picture counted once."""
    model, processor = shared(family)
    rows = [pair(n, count) for n, count in enumerate((1, 3, 1, 2))]
    check_features(model, VisionPreferenceCollator(processor), rows)


def test_a_processor_of_another_model_is_found_before_training():
    model, processor = build("llava")
    rows = [pair(0, 0), pair(1), pair(2, 2)]
    processor.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="row 'r1' has 17 image tokens, and the model makes 16 f"):
        check_features(model, VisionPreferenceCollator(processor), rows[:2])
    with pytest.raises(ValueError, match="row 'r2' has 34 image tokens, and the model makes 32 f"):
        check_features(model, VisionPreferenceCollator(processor), rows[::2])


def test_a_collator_goes_to_other_processes():
    """Workers of a data loader that are spawned."""
    collator = VisionPreferenceCollator(shared("qwen2_5_vl")[1])
    batch = collator([pair()])
    other = pickle.loads(pickle.dumps(collator))([pair()])
    assert all(torch.equal(batch[name], other[name]) for name in batch)


@pytest.mark.parametrize("family", ALL)
def test_lengths_are_known_without_pixels(family):
    processor = shared(family)[1]
    counts = (1, 3, 2) if family == "paligemma" else (0, 1, 3)
    rows = [pair(n, count, rejected=f"{REJECTED} a dog") for n, count in enumerate(counts)]
    collator = VisionPreferenceCollator(processor)
    found = [collator.length(row, sizes(row)).tokens for row in rows]
    batch = collator(rows)
    assert found == batch["attention_mask"].sum(1).view(2, -1).amax(0).tolist()
    assert len(set(found)) == 3


def test_pictures_are_prepared_once_and_stand_twice(monkeypatch):
    processor = build("llava")[1]
    calls = []
    prepare = type(processor.image_processor).preprocess

    def count(self, images, *args, **options):
        calls.append(len(images))
        return prepare(self, images, *args, **options)

    collator = VisionPreferenceCollator(processor)
    rows = [pair(0), pair(1, 2)]
    collator(rows)  # asks for the sizes, once
    monkeypatch.setattr(type(processor.image_processor), "preprocess", count)
    pixels = collator(rows)["pixel_values"]
    assert sum(calls) <= 3
    assert pixels.shape[0] == 6
    assert torch.equal(pixels[:3], pixels[3:])
    assert not torch.equal(pixels[0], pixels[1])


def test_paligemma_reads_its_prompt_both_ways_and_the_answer_not():
    processor = shared("paligemma")[1]
    row = pair(context=CONTEXT, rejected="no")
    batch = VisionPreferenceCollator(processor)([row, pair(1, 2)])
    types, seen = batch["token_type_ids"], batch["attention_mask"]
    begun = len(processor.tokenizer(CONTEXT)["input_ids"])
    for n in (0, 2):
        start = int(batch["completion_mask"][n].argmax()) - begun
        assert not types[n, :start].any()
        assert types[n, start : int(seen[n].sum())].all()
    with pytest.raises(mmlm.errors.InputError, match="row 'r1' has no picture, and PaliGemma"):
        VisionPreferenceCollator(processor)([row, pair(1, 0)])


def test_padding_is_on_the_right_and_to_a_multiple():
    processor = shared("qwen2_5_vl")[1]
    rows = [pair(0), pair(1, 0, question="what ?")]
    plain = VisionPreferenceCollator(processor)(rows)
    batch = VisionPreferenceCollator(processor, pad_to_multiple_of=16)(rows)
    length = plain["input_ids"].shape[1]
    assert batch["input_ids"].shape[1] == -(-length // 16) * 16 > length
    for name in ("attention_mask", "completion_mask", "mm_token_type_ids", "input_ids"):
        assert torch.equal(batch[name][:, :length], plain[name])
        filling = processor.tokenizer.pad_token_id if name == "input_ids" else 0
        assert (batch[name][:, length:] == filling).all()
    seen = batch["attention_mask"]
    assert (seen[:, :-1] >= seen[:, 1:]).all()
    assert (batch["input_ids"][seen == 0] == processor.tokenizer.pad_token_id).all()


def test_token_types_of_a_tokenizer_that_makes_them_for_nothing():
    """Most models refuse them."""
    processor = build("llava")[1]
    processor.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in processor.tokenizer("a")
    assert "token_type_ids" not in VisionPreferenceCollator(processor)([pair()])


# ---- rows that cannot be used --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"overlong": "cut"},
        {"on_bad_image": "skip"},
        {"end_token": "eos"},
        {"max_length": 0},
        {"pad_to_multiple_of": 0},
    ],
)
def test_unknown_options(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        VisionPreferenceCollator(shared("llava")[1], **options)


def test_a_slow_tokenizer_is_refused():
    processor = build("llava")[1]

    class Slow:
        is_fast = False

    processor.tokenizer = Slow()
    with pytest.raises(mmlm.errors.InputError, match="does not say which characters"):
        VisionPreferenceCollator(processor)


def test_stored_reference_values_come_along():
    rows = [
        {**vars(pair(n)), "ref_chosen_logps": -1.5 * n, "ref_rejected_logps": -2.0}
        for n in range(2)
    ]
    batch = VisionPreferenceCollator(shared("llava")[1])(rows)
    assert batch["ref_chosen_logps"].tolist() == [0.0, -1.5]
    assert batch["ref_rejected_logps"].tolist() == [-2.0, -2.0]


def test_ids_only_where_they_are_asked_for():
    rows = [pair(0), pair(1)]
    assert "ids" not in VisionPreferenceCollator(shared("llava")[1])(rows)
    assert VisionPreferenceCollator(shared("llava")[1], with_ids=True)(rows)["ids"] == ["r0", "r1"]


def test_left_out_rows_take_their_pictures_and_reference_values_along(tmp_path):
    """And the rows that stay are those of a batch without them."""
    path = tmp_path / "cut.png"
    picture(5).save(path)
    path.write_bytes(path.read_bytes()[:200])
    rows = [
        {**vars(row), "ref_chosen_logps": float(n), "ref_rejected_logps": 0.0}
        for n, row in enumerate(
            [pair(0), pair(4, 2), pair(1, images=(str(path),)), pair(3, rejected=CHOSEN), pair(2)]
        )
    ]
    limit = VisionPreferenceCollator(shared("llava")[1]).length(pair(0), sizes(pair(0))).tokens
    options = {"on_bad_image": "drop", "overlong": "drop", "max_length": limit, "with_ids": True}
    collator = VisionPreferenceCollator(shared("llava")[1], **options)
    batch = collator(rows)
    assert batch["ids"] == ["r0", "r2"]
    assert batch["ref_chosen_logps"].tolist() == [0.0, 4.0]
    assert dict(collator.dropped) == {"unreadable picture": 1, "equal answers": 1, "too long": 1}
    alone = VisionPreferenceCollator(shared("llava")[1])([rows[0], rows[4]])
    assert all(torch.equal(batch[name], alone[name]) for name in alone)


def test_equal_answers_are_never_trained_on():
    """Also where they differ in words only that the vocabulary does not know."""
    processor = mmlm.load("embedded")[1]
    row = pair(question="describe the image .", chosen="a zyx .", rejected="a qrk .")
    with pytest.raises(EqualResponses, match="row 'r0': `chosen` and `rejected` are equal"):
        VisionPreferenceCollator(processor).length(row, sizes(row))
    assert load_image(row.images[0]).size == sizes(row)[0]


def test_no_warning_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VisionPreferenceCollator(shared("idefics3")[1])([pair(0), pair(1, 0), pair(2, 3)])


def test_a_text_only_batch(tmp_path):
    """No pixel inputs at all, so that the tower is not run."""
    batch = VisionPreferenceCollator(shared("llava")[1])([pair(0, 0), pair(1, 0, context="a")])
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}
    assert asked("a", 0)[0]["content"] == [{"type": "text", "text": "a"}]


def test_blanks_around_answers_and_behind_a_context_do_not_count():
    collator = VisionPreferenceCollator(shared("llava")[1])
    plain = collator([pair(context=CONTEXT)])
    wide = collator([pair(context=f"{CONTEXT} ", chosen=f" {CHOSEN}\n", rejected=f"{REJECTED} ")])
    assert_same_batch(wide, plain)
