"""Tokens and chat templates of composed models."""

import pytest
import torch
from jinja2 import TemplateError

from mmlm.errors import InputError
from mmlm.inputs import message
from mmlm.model.chat_templates import vicuna, with_images
from mmlm.model.checkpoint import save
from mmlm.model.compose import compose
from mmlm.model.language_models import add_tokens
from tests.model.towers_and_languages import CHATML, clip, language, tokenizer


def composed(words=None, rows=330, kind="llama", **more):
    return compose(clip(), language(kind, rows=rows), tokenizer=words or tokenizer(), **more)


class TestTokens:
    @pytest.mark.parametrize("kind", ["llama", "qwen2"])  # a head of its own, and a tied one
    def test_new_rows_are_the_mean_of_the_known_ones(self, kind):
        model = language(kind, rows=340)  # ten rows of padding, as Qwen's checkpoints have them
        words = tokenizer()
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            embedding[330:] = 100.0
            head[330:] = 100.0
        means = embedding[:330].mean(0), head[:330].mean(0)
        known = embedding[:330].clone(), head[:330].clone()
        add_tokens(model, words, ["<image>", "<pad>"])
        assert words.convert_tokens_to_ids("<image>") == 330
        assert model.config.vocab_size == 340
        for weight, mean, old in zip((embedding, head), means, known, strict=True):
            torch.testing.assert_close(weight[330], mean)
            assert torch.equal(weight[:330], old)
            assert torch.equal(weight[331:], torch.full_like(weight[331:], 100.0))

    @pytest.mark.parametrize("kind", ["llama", "qwen2"])
    def test_rows_are_made_if_there_are_none(self, kind):
        model, words = language(kind), tokenizer()
        means = [
            module.weight[:330].mean(0)
            for module in (model.get_input_embeddings(), model.get_output_embeddings())
        ]
        add_tokens(model, words, ["<image>"], pad_to_multiple_of=64)
        assert model.config.vocab_size == 384
        for module, mean in zip(
            (model.get_input_embeddings(), model.get_output_embeddings()), means, strict=True
        ):
            assert module.weight.shape[0] == 384
            torch.testing.assert_close(module.weight[330:], mean.expand(54, -1))
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied is (kind == "qwen2")

    def test_a_token_that_is_known_keeps_its_row(self):
        model, words = language(rows=340), tokenizer()
        words.add_tokens(["<image>"], special_tokens=True)
        row = model.get_input_embeddings().weight[330].clone()
        add_tokens(model, words, ["<image>"])
        assert torch.equal(model.get_input_embeddings().weight[330], row)
        assert len(words) == 331

    def test_a_tokenizer_of_another_model(self):
        with pytest.raises(InputError, match="330 tokens, the language model rows for 300"):
            composed(rows=300)

    def test_padding_is_never_the_end_token(self):
        words = tokenizer(pad=False)
        processor = composed(words)[1]
        assert processor.tokenizer.pad_token == "<pad>"
        assert processor.tokenizer.pad_token_id not in (None, processor.tokenizer.eos_token_id)
        assert words.pad_token is None  # the given one stays as it was
        words.pad_token = words.eos_token
        assert composed(words)[1].tokenizer.pad_token == "<pad>"
        own = tokenizer()
        own.pad_token = "<unk>"
        assert composed(own)[1].tokenizer.pad_token == "<unk>"

    def test_another_image_token(self):
        model, processor = composed(image_token="<|picture|>")
        text = processor.apply_chat_template([message("user", "a", 1)])
        assert "<|picture|>" in text
        assert processor.image_token == "<|picture|>"
        assert processor.image_token_id == model.config.image_token_id == 330

    def test_a_tokenizer_with_an_image_token_of_its_own(self):
        import tiny

        words = tiny._tokenizer(image_token="<picture>")
        rows = len(words)
        with pytest.raises(InputError, match="'<picture>', and '<image>' is asked for"):
            composed(words, rows=rows)
        model, processor = composed(words, rows=rows, image_token="<picture>")
        assert processor.image_token_id == model.config.image_token_id == rows - 1


class TestTemplates:
    def test_the_language_models_own_sees_pictures(self):
        processor = composed(tokenizer(CHATML))[1]
        turns = [message("user", "two ?", 2), message("assistant", "yes .")]
        assert processor.apply_chat_template(turns) == (
            "<|im_start|>user\n<image>\n<image>\ntwo ?<|im_end|>\n"
            "<|im_start|>assistant\nyes .<|im_end|>\n"
        )

    def test_texts_are_rendered_as_before(self):
        words = tokenizer(CHATML)
        turns = [{"role": "user", "content": "a ' b"}, {"role": "assistant", "content": "c"}]
        want = words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        processor = composed(words)[1]
        assert processor.apply_chat_template(turns, add_generation_prompt=True) == want

    def test_pictures_stand_where_they_were_put(self):
        processor = composed(tokenizer(CHATML))[1]
        text = processor.apply_chat_template(
            [message("user", "first <image 1> then <image 2> .", 2, marked=True)]
        )
        assert "first <image>\n then <image>\n ." in text

    def test_a_template_that_reassigns_messages(self):
        # As Llama 3's does with its system message.
        template = (
            "{%- if messages[0]['role'] == 'system' -%}{{- '[' + messages[0]['content'] + ']' -}}"
            "{%- set messages = messages[1:] -%}{%- endif -%}" + CHATML
        )
        processor = composed(tokenizer(template))[1]
        text = processor.apply_chat_template([message("system", "s"), message("user", "u", 1)])
        assert text == "[s]<|im_start|>user\n<image>\nu<|im_end|>\n"

    @pytest.mark.parametrize("template", [None, "vicuna"])
    def test_vicuna_by_hand(self, template):
        processor = composed(tokenizer(CHATML if template else None), chat_template=template)[1]
        turns = [
            message("user", "what ?", 1),
            message("assistant", "a dog ."),
            message("user", "sure ?"),
        ]
        assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
            "USER: <image>\nwhat ? ASSISTANT: a dog .</s>USER: sure ? ASSISTANT:"
        )
        turns[0] = message("user", "what ?")
        out = processor.apply_chat_template(
            [turns[:2]], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = torch.as_tensor(out["assistant_masks"]).bool()
        answer = torch.as_tensor(out["input_ids"])[mask].tolist()
        assert processor.decode(answer) == " a dog .</s>"

    def test_vicuna_without_an_end_token_and_with_quotes(self):
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [{"role": "assistant", "content": "a"}]
        [text], _ = render_jinja_template([turns], chat_template=vicuna("<image>", ""))
        assert text == "ASSISTANT: a"
        template = with_images("{{ messages[0]['content'] }}", "<'i\\'>")
        [text], _ = render_jinja_template([[message("user", "q", 1)]], chat_template=template)
        assert text == "<'i\\'>\nq"

    def test_roles_and_parts_that_are_unknown(self):
        processor = composed()[1]
        with pytest.raises(TemplateError, match="role tool is unknown"):
            processor.apply_chat_template([message("tool", "x")])
        with pytest.raises(TemplateError, match="a part is video"):
            processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])

    def test_a_given_template_is_taken_as_it_is(self):
        given = (
            "{% for m in messages %}{% for p in m['content'] %}"
            "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}|{% endfor %}"
        )
        processor = composed(tokenizer(CHATML), chat_template=given)[1]
        assert processor.chat_template == given
        assert processor.apply_chat_template([message("user", "q", 1)]) == "<image>q|"

    def test_a_template_with_a_name(self):
        words = tokenizer()
        words.chat_template = {"tool_use": "no", "default": CHATML}
        assert "<|im_start|>" in composed(words)[1].apply_chat_template([message("user", "q")])


class TestEnds:
    def test_the_templates_end_of_turn_ends_an_answer(self, tmp_path):
        words = tokenizer(CHATML)
        words.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        model, processor = composed(words, rows=332)
        assert words.convert_tokens_to_ids("<|im_end|>") == 331
        assert model.generation_config.eos_token_id == [3, 331]
        save(model, processor, tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert again.generation_config.eos_token_id == [3, 331]

    def test_the_language_models_ends_are_kept(self):
        text = language()
        text.generation_config.eos_token_id = [3, 7]
        model, _ = compose(clip(), text, tokenizer=tokenizer())
        assert model.generation_config.eos_token_id == [3, 7]

    def test_one_end(self):
        assert composed()[0].generation_config.eos_token_id == 3
