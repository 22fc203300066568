"""``mmlm chat``: talk with a model about pictures in the terminal."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import DONE, SOME_FAILED, Command, Terminal
from mmlm.cli.options import ModelOptions, check_model_name, method_field, open_model, parse_methods
from mmlm.errors import InputError, MmlmError
from mmlm.inputs import load_image, message, prepare, unknown_words
from mmlm.runner import GenerateSettings

if TYPE_CHECKING:
    from PIL import Image

    from mmlm.engine.method import Method
    from mmlm.streaming import AnswerStream

__all__ = ["COMMAND", "Chat", "run"]

HELP = """\
QUESTION            ask; the conversation so far is kept
/image PATH ...     look at other pictures: a new conversation begins
/add PATH ...       show more pictures with the next question; the conversation goes on
/method CALL        answer with a method, e.g. /method VHR(alpha=2.0); several: A() + B()
/method none        answer with the plain model; /method alone shows what is in force
/compare [QUESTION] the same question plain and with the method, side by side (default: the last)
/reset              forget the conversation, keep the pictures
/help  /quit        this text; leave (or Ctrl-D).  Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Chat:
    """Options of ``mmlm chat``.

    Attributes:
        images: A picture for the first question.
        methods: A method, e.g. "VHR(alpha=2.0)"; `none` for the plain model.
        prompt: Ask this one question and leave.
        model: The model.
        generate: How answers are generated (`batch_size` does not matter here).
    """

    images: tuple[str, ...] = field(default=(), metadata={"alias": "--image"})
    methods: tuple[str, ...] = method_field()
    prompt: str | None = None
    model: ModelOptions = field(default_factory=ModelOptions)
    generate: GenerateSettings = field(default_factory=GenerateSettings)


@dataclass(frozen=True)
class _Picture:
    path: str
    image: Image.Image

    @classmethod
    def read(cls, paths: Sequence[str]) -> tuple[_Picture, ...]:
        return tuple(cls(path, load_image(path)) for path in paths)


@dataclass(frozen=True)
class _Turn:
    """A question with the pictures shown with it, and the answer (empty: not yet given)."""

    question: str
    pictures: tuple[_Picture, ...]
    answer: str = ""


@dataclass(frozen=True)
class _Answer:
    text: str
    n_tokens: int
    stopped: bool


def run(settings: Chat, terminal: Terminal) -> int:
    """Holds the conversation until the input ends.

    Returns:
        ``DONE``; with a script as input ``SOME_FAILED`` if a line of it failed.

    Raises:
        MmlmError: If the model, a method or a picture on the command line is impossible, or the
            one question of ``--prompt`` fails.
    """
    check_model_name(settings.model.id)
    pictures = _Picture.read(settings.images)
    methods = parse_methods(settings.methods)
    model, processor = open_model(settings.model, methods, terminal)
    session = _Session(model, processor, methods, settings.generate, terminal, pictures)
    if settings.prompt is not None:
        session.ask(settings.prompt)
        return DONE
    interactive = sys.stdin.isatty()
    if interactive and not terminal.quiet and not terminal.json:
        shown = ", ".join(settings.images) or "none; /image PATH shows one"
        terminal.say(f"model: {settings.model.id}   method: {session.method_text}")
        terminal.say(f"pictures: {shown}   /help lists the commands\n")
    return session.loop(interactive)


class _Session:
    """A conversation about pictures; an error leaves it as it was."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        methods: tuple[Method, ...],
        settings: GenerateSettings,
        terminal: Terminal,
        pictures: tuple[_Picture, ...],
    ) -> None:
        self.model = model
        self.processor = processor
        self.methods = methods
        self.settings = settings
        self.terminal = terminal
        self.turns: list[_Turn] = []
        self.pending = pictures
        self.commands = {
            "/image": self.show_pictures,
            "/add": self.add_pictures,
            "/method": self.set_method,
            "/compare": self.compare,
            "/reset": self.reset,
            "/help": lambda _: terminal.say(HELP),
        }

    @property
    def method_text(self) -> str:
        """The methods in force, without the parameters that have their default value."""
        return " + ".join(method.label for method in self.methods) or "none"

    def loop(self, interactive: bool) -> int:
        """Answers lines from standard input until it ends or ``/quit``."""
        failed = False
        for line in _lines(interactive):
            if line == "/quit":
                break
            try:
                self.handle(line)
            # ValueError and RuntimeError: what processors, models and torch raise for a request
            # that they cannot carry out. The session must outlive any request.
            except (MmlmError, OSError, ValueError, RuntimeError) as error:
                failed = True
                self.report(error)
        return SOME_FAILED if failed and not interactive else DONE

    def report(self, error: Exception) -> None:
        """Shows an error; the session goes on."""
        advice = getattr(error, "advice", "") or "The conversation is unchanged; try another line."
        if self.terminal.json:
            self.terminal.emit({"error": str(error), "advice": advice})
        self.terminal.error(str(error), advice)

    def handle(self, line: str) -> None:
        """Carries out one line of the user."""
        if not line.startswith("/"):
            self.ask(line)
            return
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            raise InputError(f"There is no command {name!r}.", advice="/help lists the commands.")
        self.commands[name](rest.strip())

    def ask(self, question: str) -> None:
        """Answers a question and adds both to the conversation."""
        turn = _Turn(question, self.pending)
        unknown = self.warn_unknown(question)
        answer = self.answer([*self.turns, turn], self.methods, stream=not self.terminal.json)
        self.turns.append(dataclasses.replace(turn, answer=answer.text))
        self.pending = ()
        if self.terminal.json:
            self.terminal.emit(
                {
                    "question": question,
                    **dataclasses.asdict(answer),
                    "methods": [method.text for method in self.methods],
                    "images": [picture.path for picture in turn.pictures],
                    "unknown_words": unknown,
                }
            )

    def warn_unknown(self, question: str) -> list[str]:
        """Tells the user which words of the question the model cannot read; returns them."""
        unknown = unknown_words(self.processor, question)
        if unknown:
            self.terminal.note(
                f"note: the model has no word for {', '.join(map(repr, unknown))}; "
                "it reads them all as one unknown word."
            )
        return unknown

    def answer(self, turns: Sequence[_Turn], methods: Sequence[Method], *, stream: bool) -> _Answer:
        """Answers the last of the turns; prints the answer as it comes if ``stream``."""
        from mmlm.streaming import AnswerStream

        conversation = []
        for turn in turns:
            conversation.append(message("user", turn.question, len(turn.pictures)))
            if turn.answer:
                conversation.append(message("assistant", turn.answer))
        pictures = [picture.image for turn in turns for picture in turn.pictures]
        inputs = prepare(
            self.processor,
            [conversation],
            [pictures],
            device=self.model.device,
            dtype=self.model.dtype,
        )
        with AnswerStream(self.model, self.processor, inputs, methods, self.settings) as pieces:
            self._show(pieces, stream)
        return _Answer(pieces.text, pieces.n_tokens, pieces.stopped)

    @staticmethod
    def _show(pieces: AnswerStream, stream: bool) -> None:
        """Reads an answer to its end; the first Ctrl-C ends it early, the second one leaves."""
        interrupted = False
        while True:
            try:
                for piece in pieces:
                    if stream:
                        print(piece, end="", flush=True)
                break
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                pieces.stop()
        if stream:
            print(" [stopped]" if pieces.stopped else "", flush=True)

    def show_pictures(self, rest: str) -> None:
        """``/image``: other pictures, new conversation."""
        self.pending = _Picture.read(_paths(rest))
        self.turns.clear()
        self.terminal.note("A new conversation begins. (/add PATH adds a picture to the old one.)")

    def add_pictures(self, rest: str) -> None:
        """``/add``: more pictures with the next question."""
        self.pending += _Picture.read(_paths(rest))

    def set_method(self, rest: str) -> None:
        """``/method``: shows or changes the methods in force."""
        import mmlm

        if rest:
            methods = parse_methods([part.strip() for part in rest.split(" + ")])
            with mmlm.attach(self.model, *methods, processor=self.processor):
                pass  # refuses what this model cannot do, before it is needed
            self.methods = methods
        known = "" if rest else f"   (there are: {', '.join(mmlm.method_names())})"
        self.terminal.note(f"method: {self.method_text}{known}")

    def compare(self, rest: str) -> None:
        """``/compare``: the same question plain and with the methods; not kept."""
        if not self.methods:
            raise InputError(
                "There is no method to compare with.", advice="Choose one: /method VHR(alpha=2.0)"
            )
        if rest:
            self.warn_unknown(rest)
            turns = [*self.turns, _Turn(rest, self.pending)]
        elif self.turns:
            turns = [*self.turns[:-1], dataclasses.replace(self.turns[-1], answer="")]
        else:
            raise InputError("There is no question yet.", advice="Write: /compare QUESTION")
        plain = self.answer(turns, (), stream=False)
        changed = self.answer(turns, self.methods, stream=False)
        if self.terminal.json:
            self.terminal.emit(
                {
                    "question": turns[-1].question,
                    "plain": dataclasses.asdict(plain),
                    "with_methods": dataclasses.asdict(changed),
                    "methods": [method.text for method in self.methods],
                }
            )
        else:
            self.terminal.table(_side_by_side(plain, changed, self.method_text))

    def reset(self, _: str) -> None:
        """``/reset``: forgets the conversation; its pictures come with the next question."""
        shown = tuple(picture for turn in self.turns for picture in turn.pictures)
        self.pending = shown + self.pending
        self.turns.clear()


def _paths(rest: str) -> list[str]:
    try:
        paths = shlex.split(rest)
    except ValueError as error:
        raise InputError(f"{rest!r}: {error}.", advice="Close the quotes.") from error
    if not paths:
        raise InputError("No picture was named.", advice="Write: /image PATH")
    return paths


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of the user, without blank ones."""
    if not interactive:
        yield from filter(None, map(str.strip, sys.stdin))
        return
    import readline  # noqa: F401  (gives input() line editing and history)

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit leaves)")
            continue
        if line:
            yield line


def _side_by_side(plain: _Answer, changed: _Answer, method: str) -> Any:
    """A table of two answers; words that the other one does not have there are marked."""
    import difflib

    from rich.table import Table
    from rich.text import Text

    words = plain.text.split(), changed.text.split()
    marked = Text(), Text()
    for kind, *spans in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        style = "" if kind == "equal" else "bold yellow"
        for text, of, (start, end) in zip(marked, words, (spans[:2], spans[2:]), strict=True):
            text.append("".join(f"{word} " for word in of[start:end]), style)
    table = Table("plain", method, show_lines=True)
    table.add_row(*marked)
    table.add_row(*(f"{answer.n_tokens} tokens" for answer in (plain, changed)))
    return table


COMMAND = Command(
    summary="talk with a model about pictures in the terminal",
    settings=Chat,
    run=run,
    example=(
        'mmlm chat --image photo.jpg --method "VHR(alpha=2.0)"\n'
        'mmlm chat --image photo.jpg --prompt "Is there a dog in the image?" --json'
    ),
)
