"""A conversation about pictures, as the terminal, the browser and a file hold it.

A :class:`Conversation` never changes: asking, answering and showing a picture give a new one, so
that an error half-way leaves the old one, and two answers to one question start from the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError
from mmlm.images import load_image

if TYPE_CHECKING:
    import os

    import torch
    from PIL import Image

    from mmlm.inputs import Message
    from mmlm.show.truth import Known

__all__ = ["Conversation", "Picture", "Turn"]


@dataclass(frozen=True)
class Picture:
    """A picture, where it came from, and what is known to be in it.

    Attributes:
        name: For people: a file name, or "world natural 3".
        image: The picture, decoded (RGB).
        path: The file it was read from; None if there is none.
        digest: SHA-256 of that file's bytes as they were read, in hexadecimal; "" without a file.
        known: What is known to be in it; None if nothing is.
    """

    name: str
    image: Image.Image
    path: Path | None = None
    digest: str = ""
    known: Known | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str], known: Known | None = None) -> Picture:
        """Reads a file; ``name`` is the path as given.

        Args:
            path: A picture.
            known: What is known to be in it.

        Raises:
            ImageReadError: If it is missing, damaged, too large, or no picture.
        """
        image = load_image(path)  # also refuses what is no regular file, before it is read below
        content = Path(path).read_bytes()
        return cls(
            str(path), image, Path(path).resolve(), hashlib.sha256(content).hexdigest(), known
        )


@dataclass(frozen=True)
class Turn:
    """A question with the pictures shown with it, and the answer.

    Attributes:
        question: What the user asked.
        pictures: Shown with this question, before its text.
        answer: What the model said; "" while it has said nothing.
        methods: The methods in force while it answered, in their text form.
        model: The model that answered, as ``--model`` names it; "" if unknown.
    """

    question: str
    pictures: tuple[Picture, ...] = ()
    answer: str = ""
    methods: tuple[str, ...] = ()
    model: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the pictures that the next question will show.

    At most the last turn is open, i.e. has no answer yet:

        conversation = Conversation().with_pictures(Picture.read("a.png"))
        asked = conversation.with_question("What is this?")
        model.generate(**asked.inputs(model, processor))
        conversation = asked.with_answer("A cat.")

    Attributes:
        turns: The turns.
        pending: Pictures that go with the next question.
    """

    turns: tuple[Turn, ...] = ()
    pending: tuple[Picture, ...] = field(default=())

    @property
    def is_open(self) -> bool:
        """Whether the last question has no answer yet."""
        return bool(self.turns) and not self.turns[-1].answer

    def with_pictures(self, *pictures: Picture) -> Conversation:
        """The next question will show these as well."""
        return replace(self, pending=self.pending + pictures)

    def with_question(self, question: str) -> Conversation:
        """A new turn that shows the pending pictures; an unanswered one before it is replaced.

        A turn that is replaced gives its pictures to the new one: nothing that was shown is lost.
        """
        earlier = self.turns[:-1] if self.is_open else self.turns
        shown = (self.turns[-1].pictures if self.is_open else ()) + self.pending
        return Conversation((*earlier, Turn(question, shown)))

    def with_answer(
        self, answer: str, methods: Sequence[str] = (), model: str = ""
    ) -> Conversation:
        """The last turn with its answer.

        Args:
            answer: The answer.
            methods: Text forms of the methods in force.
            model: The model that answered.

        Raises:
            InputError: If there is no question.
        """
        last = replace(self._last(), answer=answer, methods=tuple(methods), model=model)
        return replace(self, turns=(*self.turns[:-1], last))

    def with_turn(
        self, question: str, answer: str, methods: Sequence[str] = (), model: str = ""
    ) -> Conversation:
        """A question and its answer at once; see :meth:`with_question`, :meth:`with_answer`."""
        return self.with_question(question).with_answer(answer, methods, model)

    def without_answer(self) -> Conversation:
        """The last question asked again.

        Raises:
            InputError: If there is no question.
        """
        last = self._last()
        again = Turn(last.question, last.pictures)
        return replace(self, turns=(*self.turns[:-1], again))

    def restarted(self) -> Conversation:
        """No turns; every picture that was shown or is pending comes with the next question."""
        shown = tuple(picture for turn in self.turns for picture in turn.pictures)
        return Conversation(pending=shown + self.pending)

    @property
    def shown(self) -> tuple[Picture, ...]:
        """The pictures that the model sees, in the order of their placeholders; not the pending."""
        return tuple(picture for turn in self.turns for picture in turn.pictures)

    def pictures(self) -> list[Image.Image]:
        """The pictures behind the placeholders of :meth:`messages`, for ``mmlm.inputs.prepare``."""
        return [picture.image for picture in self.shown]

    def messages(self) -> list[Message]:
        """The turns in Hugging Face chat format; an open turn ends with the user's message."""
        from mmlm.inputs import message

        messages = []
        for turn in self.turns:
            messages.append(message("user", turn.question, len(turn.pictures)))
            if turn.answer:
                messages.append(message("assistant", turn.answer))
        return messages

    def inputs(self, model: Any, processor: Any) -> dict[str, torch.Tensor]:
        """What the model generates the answer to the open turn from, on the model's device.

        Args:
            model: A Hugging Face LVLM.
            processor: Its processor, with a chat template.

        Raises:
            InputError: If no question waits for an answer, or the processor or its template cannot
                take the conversation.
        """
        from mmlm.inputs import prepare

        if not self.is_open:
            raise InputError(
                "No question of the conversation waits for an answer.",
                advice="Add one with Conversation.with_question.",
            )
        messages, pictures = [self.messages()], [self.pictures()]
        return prepare(processor, messages, pictures, device=model.device, dtype=model.dtype)

    @property
    def known(self) -> Known | None:
        """What is known about the pictures that the model sees, all together.

        An object is there if it is in one of them, and absent if it is known to be absent in all.
        None if nothing is known about any of them.
        """
        from mmlm.show.truth import Known

        known = [picture.known for picture in self.shown]
        told = [one for one in known if one is not None]
        if not told:
            return None
        objects = frozenset().union(*(one.objects for one in told))
        source = ", ".join(dict.fromkeys(one.source for one in told))
        if all(one is not None and one.asked is None for one in known):
            return Known(objects, source)
        asked = [one.asked if one is not None else frozenset() for one in known]
        absent_or_seen = frozenset.intersection(*(one for one in asked if one is not None))
        return Known(objects, source, objects | absent_or_seen)

    def save(self, path: str | os.PathLike[str], *, embed: bool = False) -> None:
        """Writes the conversation as JSON; the file is always whole, also after a crash.

        Args:
            path: The file. One that holds something else than a conversation is not replaced.
            embed: Write every picture into the file (PNG, lossless). By default only those that
                were read from no file; the others are named by path, from the folder of ``path``
                if they lie below it, and by the hash of their content.

        Raises:
            InputError: If the folder is missing, or the file is somebody else's.
        """
        from mmlm.show import saved

        saved.write(self, Path(path).expanduser(), embed=embed)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Conversation:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: If the file is missing or holds something else (says where and what), or a
                picture's file has changed since.
            ImageReadError: If a picture cannot be read.
        """
        from mmlm.show import saved

        return saved.read(Path(path).expanduser())

    def _last(self) -> Turn:
        if not self.turns:
            raise InputError("There is no question yet.", advice="Ask one first.")
        return self.turns[-1]
