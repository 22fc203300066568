"""Which tokens of a prompt the user wrote, and which belong to the chat template.

A chat template writes fixed text around messages: role headers, a default system message, the
generation prompt. :class:`Template` learns that text by rendering messages of its own with a
processor, finds it again in the token ids of a prompt, and so knows the user's words. Nothing is
guessed: a prompt that its processor's template could not have written is an error.

Comparison ignores blanks. Tokenizers disagree about them (a sentence-piece decoder moves them, a
byte-level one merges them into the next word), and no template rests on them alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import LayoutError

__all__ = ["Template", "known_processor", "remember_processor"]

_PROCESSORS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_TEMPLATES: weakref.WeakKeyDictionary[Any, Template] = weakref.WeakKeyDictionary()

#: Words that stand for messages while a template is learned; no template contains them.
_SENTINELS = tuple(f"zq{letter}xjqz" for letter in "abcde")


def remember_processor(model: Any, processor: Any) -> None:
    """Notes which processor belongs to a model, for as long as both live.

    Kept beside the model, not on it: attaching and saving must not find anything new there.
    """
    _PROCESSORS[model] = processor


def known_processor(model: Any) -> Any:
    """The processor noted for a model, or None."""
    return _PROCESSORS.get(model)


@dataclass(frozen=True)
class _Frames:
    """A template's own text, blanks removed.

    Attributes:
        lead: Before the first question.
        system: Before and after a system message that replaces ``lead``; None without such.
        answer: Between a question and its answer.
        question: Between an answer and the next question.
        prompt: After the last question, with the generation prompt.
        close: After the last question, without generation prompt.
        blank: Whether blanks behind an assistant's header are the template's; else the answer's.
    """

    lead: str
    system: tuple[str, str] | None
    answer: str
    question: str
    prompt: str
    close: str
    blank: bool


@dataclass(frozen=True)
class _Found:
    """Where the parts of one prompt are, in characters of its text without blanks.

    Attributes:
        lead: End of everything before the first question.
        questions: Start and end of each question.
    """

    lead: int
    questions: tuple[tuple[int, int], ...]


class Template:
    """A processor's chat template, as text and as tokens.

    Args:
        processor: A processor, or a tokenizer, with a chat template.

    Raises:
        LayoutError: If there is no chat template, or it does not show the messages' text.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer: Any = getattr(processor, "tokenizer", processor)
        self._text = processor.chat_template or getattr(self._tokenizer, "chat_template", None)
        if not self._text:
            raise LayoutError(
                f"{type(processor).__name__} has no chat template, so the user's words cannot be "
                "told from the rest of the prompt.",
                advice="Set processor.chat_template (mmlm.inputs.use_chat_template).",
            )
        self._spelling: dict[int, str] = {}
        self._bos: int | None = self._tokenizer.bos_token_id
        unknown = self._tokenizer.unk_token_id  # a word that the tokenizer lacks is still a word
        self._special = {*self._tokenizer.get_added_vocab().values()} - {unknown}
        self._frames = self._learn()

    @classmethod
    def of(cls, processor: Any) -> Template:
        """The template of a processor, learned once; None raises with advice.

        Raises:
            LayoutError: If no processor is known, or it has no usable chat template.
        """
        if processor is None:
            raise LayoutError(
                "A method needs to know which tokens are the user's words, and no processor is "
                "known for this model.",
                advice="Pass it: attach(model, ..., processor=processor); mmlm.load does it.",
            )
        found = _TEMPLATES.get(processor)
        tokenizer = getattr(processor, "tokenizer", processor)
        if found is None or found._text != (processor.chat_template or tokenizer.chat_template):
            found = _TEMPLATES[processor] = cls(processor)
        return found

    # ---- reading prompts -----------------------------------------------------------------------

    def words(self, ids: Tensor, readable: Tensor) -> Tensor:
        """Which positions hold words that the user wrote, in any of the prompt's questions.

        A token that also holds characters of the template is not a word.

        Args:
            ids: int [B, N].
            readable: bool [B, N]; False on padding, visual tokens and their frames.

        Returns:
            bool [B, N].

        Raises:
            LayoutError: If a prompt does not follow the template.
        """
        words = torch.zeros_like(readable)
        for row in range(ids.shape[0]):
            line = _Line(self, ids[row].tolist(), readable[row].tolist())
            found = self._parse(line.text, row)
            words[row, line.words(found.questions)] = True
        return words

    def system(self, text: str, ids: Tensor, readable: Tensor) -> list[tuple[int, int, list[int]]]:
        """How each prompt changes when ``text`` becomes its system message.

        Args:
            text: The system message; it replaces the prompt's own, or the template's default one.
            ids: int [B, N].
            readable: bool [B, N], as in :meth:`words`.

        Returns:
            Per row ``(start, stop, new)``: positions start to stop - 1 are replaced by the tokens
            ``new``.

        Raises:
            LayoutError: If the template has no system message, or a prompt does not follow it.
        """
        if self._frames.system is None:
            raise LayoutError(
                "This model's chat template has no system message.",
                advice="Put the instruction before the question instead.",
            )
        start, _ = self._split([_message("system", text), _message("user", _SENTINELS[0])], 1)
        new = [i for i in self._encode(start.rstrip()) if i != self._bos]
        edits = []
        for row in range(ids.shape[0]):
            line = _Line(self, ids[row].tolist(), readable[row].tolist())
            columns = line.inside(0, self._parse(line.text, row).lead)
            first, last = (columns[0], columns[-1]) if columns else (line.first, line.first - 1)
            if not bool(readable[row, first : last + 1].all()):
                raise LayoutError(
                    f"Row {row} has an image inside the text before its first question.",
                    advice="Put the instruction before the question instead.",
                )
            edits.append((first, last + 1, new))
        return edits

    def question(
        self, text: str, ids: Tensor, readable: Tensor
    ) -> list[tuple[int, int, list[int]]]:
        """How each prompt changes when ``text`` is put before its last question's words.

        Args:
            text: What is put there.
            ids: int [B, N].
            readable: bool [B, N], as in :meth:`words`.

        Returns:
            As :meth:`system`, with start = stop: nothing is taken away.

        Raises:
            LayoutError: If a prompt does not follow the template, or its question has no words.
        """
        edits = []
        for row in range(ids.shape[0]):
            line = _Line(self, ids[row].tolist(), readable[row].tolist())
            columns = line.words(self._parse(line.text, row).questions[-1:])
            if not columns:
                raise LayoutError(
                    f"The last question of row {row} has no words.",
                    advice="Ask a question with the image.",
                )
            token = self._tokenizer.convert_ids_to_tokens(int(ids[row, columns[0]]))
            if token.startswith(("Ġ", "▁", " ")):  # the blank before the question is in its word
                new = self._encode(f" {text}")
            else:
                new = self._encode(text) + self._encode("\n")
            edits.append((columns[0], columns[0], new))
        return edits

    def turns(
        self, ids: Sequence[int], readable: Sequence[bool], row: int, *, header: bool
    ) -> tuple[list[tuple[int, int]], list[int], list[tuple[int, int]]]:
        """The conversation that a prompt goes on.

        Args:
            ids: Of one prompt.
            readable: As in :meth:`words`.
            row: Its number, for errors.
            header: Whether headers of the assistant are wanted.

        Returns:
            Columns of the answers given so far, as ``(start, stop)``, each with the one special
            token that closes it (also of an answer that has only begun); the columns at which the
            second turn and each later one begin (also behind a last answer); and of every
            assistant's header what stands behind its first token, as ``(start, stop)``.

        Raises:
            LayoutError: If the prompt does not follow the template, or headers are wanted and the
                template writes none.
        """
        line, frames = _Line(self, ids, readable), self._frames
        questions = self._parse(line.text, row).questions
        answers: list[tuple[int, int]] = []
        begins: list[int] = []
        headers: list[tuple[int, int]] = []
        for n, (_, stop) in enumerate(questions):
            rest = line.text[stop:]
            last = n + 1 == len(questions)
            end = len(line.text) if last else questions[n + 1][0] - len(frames.question)
            frame = frames.answer
            if last and (rest == frames.prompt or not rest.startswith(frame)):
                frame = frames.prompt if rest == frames.prompt else ""
            said = line.touching(stop + len(frame), end) if frame else []
            after = line.after(end)
            if said:
                closed = not last and after < len(ids) and not self.is_word(ids[after])
                if not frames.blank:
                    said[:0] = line.blanks_before(said[0])
                # Blanks behind an answer are the next turn's.
                after = after + 1 if closed else said[-1] + 1
                answers.append((said[0], after))
            if said or not last:
                begins.append(after)
            if header and frame:
                headers.append(self._behind_marker(line, row, stop, frame, said, after))
        return answers, begins, headers

    def _behind_marker(
        self, line: _Line, row: int, stop: int, frame: str, said: list[int], after: int
    ) -> tuple[int, int]:
        """What stands behind the first token of an assistant's header."""
        close = self._frames.close
        tokens = line.touching(stop + len(close), stop + len(frame))
        if not frame.startswith(close) or not tokens:
            raise LayoutError(
                f"The chat template writes no header of the assistant of its own in row {row}, so "
                "its first token (the marker) is not known.",
                advice="Use prompt_end='header'.",
            )
        return tokens[0] + 1, said[0] if said else after

    @property
    def has_system(self) -> bool:
        """Whether the template has a place for a system message."""
        return self._frames.system is not None

    def spell(self, token: int) -> str:
        """A token's characters without blanks; halves of a character count as one sign each."""
        if token not in self._spelling:
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self._spelling[token] = "".join(text.split())
        return self._spelling[token]

    def is_word(self, token: int) -> bool:
        """Whether a token can be a word at all; added tokens (ends of turns, tiles) cannot."""
        return token not in self._special

    def is_start(self, token: int) -> bool:
        """Whether a token marks the start of a text; some tokenizers add it, some templates do."""
        return token == self._bos

    def _parse(self, text: str, row: int) -> _Found:
        """Finds the questions in a prompt's text, from its start to its end."""
        frames = self._frames
        lead = self._lead(text)
        if lead is None:
            wanted = f"{frames.lead!r}" if frames.lead else "a system message"
            raise self._stranger(row, f"it does not begin with {wanted}, but {text[:40]!r}")
        questions: list[tuple[int, int]] = []
        start = lead
        while True:
            stop = text.find(frames.answer, start) if frames.answer else -1
            follow = text.find(frames.question, stop + len(frames.answer)) if stop >= 0 else -1
            if stop >= 0 and follow >= 0 and frames.question:
                questions.append((start, stop))
                start = follow + len(frames.question)
                continue
            # The last question. What looks like the start of an answer is the user's own words
            # if the prompt also ends as a prompt does.
            for end in (frames.prompt, frames.close):
                if end and text.endswith(end) and len(text) - len(end) >= start:
                    stop = len(text) - len(end)
                    break
                if stop >= 0:  # an answer has begun
                    break
            if stop < 0 and frames.close:
                raise self._stranger(row, f"it ends with {text[-40:]!r}")
            stop = stop if stop >= 0 else len(text)
            return _Found(lead, (*questions, (start, stop)))

    def _lead(self, text: str) -> int | None:
        """End of what stands before the first question; None if the text begins otherwise.

        One beginning may be the start of the other, so the longer one is tried first.
        """
        lead, system = self._frames.lead, self._frames.system
        plain = len(lead) if text.startswith(lead) else None
        if system is None or not text.startswith(system[0]):
            return plain
        before, after = system
        stop = text.find(after, len(before)) if after else -1
        with_system = stop + len(after) if stop >= 0 else None
        first, second = plain, with_system
        if len(before) > len(lead):
            first, second = with_system, plain
        return first if first is not None else second

    def _stranger(self, row: int, what: str) -> LayoutError:
        return LayoutError(
            f"The prompt of row {row} was not written by the chat template of "
            f"{type(self._processor).__name__}: {what} (blanks left out).",
            advice="Make the prompt with processor.apply_chat_template, or pass the processor "
            "that made it: attach(model, ..., processor=processor).",
        )

    # ---- learning the template -----------------------------------------------------------------

    def _learn(self) -> _Frames:
        """Renders conversations of sentinels and cuts the result at them."""
        a, b, c = _SENTINELS[:3]
        raw = self._split([_message("user", a)], 1)
        lead, end = (self._bare(t) for t in raw)
        _, close = (self._bare(t) for t in self._split([_message("user", a)], 1, prompt=False))
        answer, question = end, ""
        talk = [_message("user", a), _message("assistant", b), _message("user", c)]
        parts = self._try_split(talk, 3)
        if parts is not None:
            answer, question = (self._bare(t) for t in parts[1:3])
        parts = self._try_split([_message("system", b), _message("user", a)], 2)
        system = None if parts is None else (self._bare(parts[0]), self._bare(parts[1]))
        return _Frames(lead, system, answer, question, end, close, raw[1][-1:].isspace())

    def _split(
        self, messages: list[dict[str, Any]], n: int, *, prompt: bool = True
    ) -> tuple[str, ...]:
        parts = self._try_split(messages, n, prompt=prompt)
        if parts is None:
            raise LayoutError(
                f"The chat template of {type(self._processor).__name__} does not show the text of "
                "a plain conversation.",
                advice="Pass the processor that made the prompts.",
            )
        return parts

    def _try_split(
        self, messages: list[dict[str, Any]], n: int, *, prompt: bool = True
    ) -> tuple[str, ...] | None:
        """The n + 1 texts around the last n messages' sentinels; None if the template refuses."""
        from jinja2.exceptions import TemplateError

        for shown in (messages, [{**m, "content": m["content"][0]["text"]} for m in messages]):
            try:
                text = self._processor.apply_chat_template(
                    shown,
                    chat_template=self._text,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            except (TemplateError, TypeError):  # a template may take only one form of content
                continue
            parts = _cut(text, [m["content"][0]["text"] for m in messages[-n:]])
            if parts is not None and "'type'" not in text:
                return parts
        return None

    def _bare(self, text: str) -> str:
        """A text as its tokens spell it, as prompts are read."""
        return "".join(self.spell(i) for i in self._encode(text) if i != self._bos)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class _Line:
    """One prompt's readable tokens as text without blanks, and back."""

    def __init__(self, template: Template, ids: Sequence[int], readable: Sequence[bool]) -> None:
        self._template = template
        self._ids = ids
        self._readable = readable
        self._spans: list[tuple[int, int, int]] = []  # column, start, end of its characters
        pieces, length = [], 0
        for column, token in enumerate(ids):
            if not readable[column] or template.is_start(token):
                continue
            piece = template.spell(token)
            self._spans.append((column, length, length + len(piece)))
            pieces.append(piece)
            length += len(piece)
        self.text = "".join(pieces)

    @property
    def first(self) -> int:
        """Column of the first token that can be read; the number of columns if none can."""
        return self._spans[0][0] if self._spans else len(self._ids)

    def inside(self, start: int, stop: int) -> list[int]:
        """Columns of the tokens that have characters, all of them within [start, stop)."""
        return [c for c, a, b in self._spans if start <= a < b <= stop]

    def touching(self, start: int, stop: int) -> list[int]:
        """Columns of the tokens that have a character within [start, stop)."""
        return [c for c, a, b in self._spans if a < stop and b > start and a < b]

    def after(self, place: int) -> int:
        """Column of the first token that begins at or behind a character; all columns if none."""
        found = (c for c, a, b in self._spans if a >= place and a < b)
        return next(found, len(self._ids))

    def blanks_before(self, column: int) -> list[int]:
        """Columns of the blanks that stand directly before a token."""
        first = column
        while first > 0 and self._is_blank(first - 1):
            first -= 1
        return list(range(first, column))

    def words(self, questions: Sequence[tuple[int, int]]) -> list[int]:
        """Columns of the words of some questions, with the blanks between them."""
        chosen: list[int] = []
        for start, stop in questions:
            columns = [c for c in self.inside(start, stop) if self._template.is_word(self._ids[c])]
            for last, column in zip([None, *columns], columns, strict=False):
                between = range(column if last is None else last + 1, column)
                if all(self._is_blank(c) for c in between):
                    chosen.extend(between)
                chosen.append(column)
        return chosen

    def _is_blank(self, column: int) -> bool:
        return self._readable[column] and not self._template.spell(self._ids[column])


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _cut(text: str, words: list[str]) -> tuple[str, ...] | None:
    """The texts around words that stand in a text once each, in this order."""
    parts = []
    for word in words:
        if text.count(word) != 1:
            return None
        before, text = text.split(word)
        parts.append(before)
    return (*parts, text)
