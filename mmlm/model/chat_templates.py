"""Chat templates of composed models: the language model's own with pictures added, or LLaVA's.

Messages are those of transformers: a role and a content, which is a text or a list of parts
`{"type": "image"}` and `{"type": "text", "text": ...}`. A language model's template mostly knows
texts only; `with_images` makes it read parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmlm.errors import InputError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["check_template", "vicuna", "with_images"]

_PARTS_TO_TEXT = """\
{#- Contents that are lists of parts become texts, each picture IMAGE and a new line. -#}
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is defined and message['content'] is iterable
        and message['content'] is not string and message['content'] is not mapping -%}
        {%- set written = namespace(text='') -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set written.text = written.text ~ 'IMAGE\\n' -%}
            {%- elif part['type'] == 'text' -%}
                {%- set written.text = written.text ~ part['text'] -%}
            {%- else -%}
                {{- raise_exception('a part is ' ~ part['type'] ~ ': use image or text') -}}
            {%- endif -%}
        {%- endfor -%}
        {%- set flat.messages = flat.messages + [dict(message, content=written.text)] -%}
    {%- else -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

_VICUNA = """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- message['content'] ~ ' ' -}}
    {%- elif message['role'] == 'user' -%}
        {{- 'USER: ' ~ message['content'] ~ ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT: ' -}}
        {%- generation -%}{{- message['content'] ~ END -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('role ' ~ message['role'] ~ ' is unknown: use user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}
"""


def with_images(template: str, image_token: str) -> str:
    """A chat template of texts, extended to read parts: a picture is the image token and a newline.

    LLaVA-1.5 (arXiv 2310.03744) writes pictures so, before the question's text. The template
    itself is left as it is; it sees messages whose contents are texts.

    Args:
        template: Jinja source of a language model's chat template.
        image_token: the placeholder, e.g. "<image>".
    """
    return _PARTS_TO_TEXT.replace("IMAGE", _quoted(image_token)) + template


def vicuna(image_token: str, end: str) -> str:
    r"""LLaVA-1.5's template: `USER: <image>\nQUESTION ASSISTANT: ANSWER</s>`, turns in a row.

    Answers and their end token stand in a `generation` block, so assistant masks are exact.

    Args:
        image_token: the placeholder.
        end: the token that ends an answer, "" for none.
    """
    return with_images(_VICUNA.replace("END", f"'{_quoted(end)}'"), image_token)


def check_template(processor: ProcessorMixin, image_token: str) -> None:
    """Raises unless a rendered conversation shows each picture once, and all of its text.

    Raises:
        InputError: what is missing or there too often, with the rendered text.
    """
    from jinja2 import TemplateError

    from mmlm.inputs import message

    turns = [message("user", "zqaxj", 2), message("assistant", "zqbxj"), message("user", "zqcxj")]
    try:
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        raise InputError(
            f"the chat template fails on messages with pictures: {error}",
            advice="Give another one: a template's text, or 'vicuna' for LLaVA-1.5's.",
        ) from error
    wrong = [f"{text.count(word)} x {word}" for word in ("zqaxj", "zqbxj", "zqcxj")
             if text.count(word) != 1]  # fmt: skip
    if text.count(image_token) != 2:
        wrong.append(f"{text.count(image_token)} x {image_token} for two pictures")
    if wrong:
        raise InputError(
            f"the chat template writes {', '.join(wrong)}: {text!r}",
            advice="It must print every text once and the image token once per picture.",
        )


def _quoted(text: str) -> str:
    """Text inside a Jinja string with single quotes."""
    return text.replace("\\", "\\\\").replace("'", "\\'")
