"""The conversation behind `mmlm chat`: what a question and what each command does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mmlm.cli import chat_views as views
from mmlm.cli.chat_answer import Answer, answer
from mmlm.cli.chat_files import drawn, names, read
from mmlm.cli.chat_lines import Script, paths
from mmlm.cli.frame import DONE, SOME_FAILED, Terminal, closest
from mmlm.cli.options import parse_methods
from mmlm.errors import InputError, MmlmError
from mmlm.inputs import unknown_words
from mmlm.show.conversation import Conversation

if TYPE_CHECKING:
    from mmlm.cli.chat import Chat
    from mmlm.engine.method import Method

__all__ = ["Session"]

HELP = '''\
QUESTION             ask; the conversation so far is kept. Several lines: end a line with \\, or
                     begin with """ and end with """
/image PATH ...      look at other pictures: a new conversation begins
/add PATH ...        show more pictures with the next question; the conversation goes on
/scene [SPLIT] [N]   look at scene N of the embedded world, or at any; what is in it is known
/method CALL         answer with a method, e.g. /method VHR(alpha=2.0); several: A() + B()
/method none         answer with the plain model; /method alone shows what is in force
/compare [QUESTION]  the same question plain and with the method, side by side (default: the last)
/inspect [WORD]      where the model looked while it wrote the last answer, or a word of it;
                     /inspect WORD > FILE.png lays it over the picture
/show                the conversation so far; /look draws its pictures in the terminal
/save FILE [embed]   write the conversation as JSON (embed: pictures inside); /load FILE reads it
/reset               forget the conversation, keep the pictures
/help  /quit         this text; leave (or Ctrl-D).  Ctrl-C stops an answer, TAB completes'''


class Session:
    """A conversation about pictures; an error leaves it as it was.

    Args:
        model: A Hugging Face LVLM.
        processor: Its processor.
        methods: Methods in force at first.
        settings: The options of the command.
        terminal: Where answers go.
        talk: What it begins with.
        patient: Somebody sits at the keyboard: remarks on time are shown, and Ctrl-C never leaves.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        methods: tuple[Method, ...],
        settings: Chat,
        terminal: Terminal,
        talk: Conversation,
        *,
        patient: bool,
    ) -> None:
        self.model = model
        self.processor = processor
        self.methods = methods
        self.settings = settings
        self.terminal = terminal
        self.talk = talk
        self.patient = patient
        self.commands: dict[str, Callable[[str], object]] = {
            "/image": self.show_pictures,
            "/add": self.add_pictures,
            "/scene": self.show_scene,
            "/method": self.set_method,
            "/compare": self.compare,
            "/inspect": self.inspect,
            "/show": self.show,
            "/look": self.look,
            "/save": self.save,
            "/load": self.load,
            "/reset": self.reset,
            "/help": lambda _: terminal.say(HELP),
        }

    @property
    def method_text(self) -> str:
        """The methods in force, without the parameters that have their default value."""
        return " + ".join(method.label for method in self.methods) or "none"

    def greet(self) -> None:
        """Says what is loaded."""
        shown = ", ".join(picture.name for picture in self.talk.pending)
        self.terminal.say(f"model: {self.settings.model.id}   method: {self.method_text}")
        shown = shown or "none; /image PATH shows one, /scene draws one"
        self.terminal.say(f"pictures: {shown}   /help lists the commands\n")
        if self.talk.turns:
            self.show("")

    def loop(self, entries: Script) -> int:
        """Answers entries until they end or ``/quit``."""
        failed = False
        while True:
            try:
                entry = entries.read()
                if entry is None or entry == "/quit":
                    break
                self.handle(entry)
            # ValueError and RuntimeError: what processors, models and torch raise for a request
            # that they cannot carry out. The session must outlive any request.
            except (MmlmError, OSError, ValueError, RuntimeError) as error:
                failed = True
                self.report(error)
            except KeyboardInterrupt:
                if not self.patient:
                    raise
                self.terminal.note("\nStopped. The conversation is unchanged.")
        return SOME_FAILED if failed and not self.patient else DONE

    def report(self, error: Exception) -> None:
        """Shows an error; the session goes on."""
        advice = getattr(error, "advice", "") or "The conversation is unchanged; try another line."
        if self.terminal.json:
            self.terminal.emit({"error": str(error), "advice": advice})
        self.terminal.error(str(error), advice)

    def handle(self, entry: str) -> None:
        """Carries out one entry of the user."""
        if not entry.startswith("/"):
            self.ask(entry)
            return
        name, *rest = entry.split(maxsplit=1)
        if name not in self.commands:
            advice = closest(name, [*self.commands, "/quit"]) or "/help lists the commands."
            raise InputError(f"There is no command {name!r}.", advice=advice)
        self.commands[name](rest[0].strip() if rest else "")

    def completions(self, before: str, word: str) -> list[str]:
        """What may stand where a word is begun; see `mmlm.cli.chat_lines.Editor`."""
        import mmlm

        command = before.split(maxsplit=1)[0] if before.strip() else ""
        if not command:
            known = [*self.commands, "/quit"] if word.startswith("/") else []
        elif command in ("/image", "/add", "/save", "/load"):
            return list(paths(word))
        elif command == "/method":
            known = [*mmlm.method_names(), "none"]
        elif command == "/scene":
            from data_tools.world import SPLITS

            known = list(SPLITS)
        else:
            known = []
        return [name for name in known if name.startswith(word)]

    def ask(self, question: str) -> Answer:
        """Answers a question and adds both to the conversation."""
        asked = self.talk.with_question(question)
        unknown = self.warn_unknown(question)
        answer = self.answer(asked, self.methods, stream=not self.terminal.json)
        methods = [method.text for method in self.methods]
        self.talk = asked.with_answer(answer.text, methods, self.settings.model.id)
        named = views.named(answer.text, asked.known)
        if self.terminal.json:
            self.terminal.emit(
                {
                    "question": question,
                    **asdict(answer),
                    "methods": methods,
                    "images": [picture.name for picture in asked.turns[-1].pictures],
                    "unknown_words": unknown,
                    "objects": named,
                }
            )
        elif self.patient:
            self.remark(answer, named)
        return answer

    def remark(self, answer: Answer, named: dict[str, list[str]] | None) -> None:
        """Time, and what is right and wrong, below an answer."""
        said = [answer.remark]
        for verdict, words in (named or {}).items():
            said += [f"{verdict.replace('_', ' ')}: {', '.join(words)}"] if words else []
        self.terminal.note(f"  [{'; '.join(said)}]")

    def warn_unknown(self, question: str) -> list[str]:
        """Tells the user which words of the question the model cannot read; returns them."""
        unknown = unknown_words(self.processor, question)
        if unknown:
            self.terminal.note(
                f"note: the model has no word for {', '.join(map(repr, unknown))}; "
                "it reads them all as one unknown word."
            )
        return unknown

    def answer(
        self, talk: Conversation, methods: Sequence[Method], *, stream: bool = False
    ) -> Answer:
        """Answers the open turn; prints the answer as it comes if ``stream``."""
        shown = views.Written(self.terminal.console(), talk.known) if stream else None
        settings = self.settings.generate
        return answer(
            self.model, self.processor, talk, methods, settings, shown, patient=self.patient
        )

    def show_pictures(self, rest: str) -> None:
        """``/image``: other pictures, new conversation."""
        self.talk = Conversation(pending=read(names(rest, "/image PATH"), self.settings.truth))
        self.terminal.note("A new conversation begins. (/add PATH adds a picture to the old one.)")

    def add_pictures(self, rest: str) -> None:
        """``/add``: more pictures with the next question."""
        more = read(names(rest, "/add PATH"), self.settings.truth)
        self.talk = self.talk.with_pictures(*more)

    def show_scene(self, rest: str) -> None:
        """``/scene``: a drawn picture, new conversation."""
        *split, number = rest.split() or [""]
        if not number.isdecimal():
            split, number = [*split, number] if number else split, str(random.randrange(10**6))
        if len(split) > 1:
            raise InputError(f"{rest!r} is no scene.", advice="Write: /scene [SPLIT] [NUMBER]")
        picture = drawn(split[0] if split else "natural", int(number))
        self.talk = Conversation(pending=(picture,))
        self.terminal.note(f"picture: {picture.name}   (a new conversation; /look draws it here)")

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
            asked = self.talk.with_question(rest)
        elif self.talk.turns:
            asked = self.talk.without_answer()
        else:
            raise InputError("There is no question yet.", advice="Write: /compare QUESTION")
        plain = self.answer(asked, ())
        # One Ctrl-C stops both: half a comparison is of no use.
        changed = plain if plain.stopped else self.answer(asked, self.methods)
        if plain.stopped or changed.stopped:
            raise InputError("The comparison was stopped.", advice="Try it again: /compare")
        known = asked.known
        if self.terminal.json:
            self.terminal.emit(
                {
                    "question": asked.turns[-1].question,
                    "plain": asdict(plain) | {"objects": views.named(plain.text, known)},
                    "with_methods": asdict(changed) | {"objects": views.named(changed.text, known)},
                    "methods": [method.text for method in self.methods],
                }
            )
            return
        titles = ("plain", self.method_text)
        both = [
            (title, one.text, one.remark)
            for title, one in zip(titles, (plain, changed), strict=True)
        ]
        self.terminal.table(views.side_by_side(both, known))

    def inspect(self, rest: str) -> None:
        """``/inspect``: where the model looked; the last answer is written again, and measured."""
        from mmlm.cli.chat_inspect import inspect

        word, _, file = (part.strip() for part in rest.partition(">"))
        inspect(self, word, file)

    def show(self, _: str) -> None:
        """``/show``: the conversation so far."""
        from mmlm.show.saved import as_json

        if self.terminal.json:
            self.terminal.emit(as_json(self.talk))
        self.terminal.table(views.transcript(self.talk))

    def look(self, _: str) -> None:
        """``/look``: the pictures, drawn in the terminal."""
        console = self.terminal.console()
        if console.no_color or not console.is_terminal:
            raise InputError(
                "A picture cannot be drawn without colours.",
                advice="Use a terminal with colours, without NO_COLOR; or open the file.",
            )
        for picture in (*self.talk.shown, *self.talk.pending):
            self.terminal.table(views.drawn(picture.image, min(console.width, 80)))
            self.terminal.say(picture.name)

    def save(self, rest: str) -> None:
        """``/save``: writes the conversation."""
        file, *more = names(rest, "/save FILE [embed]")
        if more not in ([], ["embed"]):
            raise InputError(
                f"/save takes one file, not {rest!r}.", advice="Write: /save FILE [embed]"
            )
        self.talk.save(file, embed=bool(more))
        self.terminal.note(f"{len(self.talk.turns)} turns written to {file}")

    def load(self, rest: str) -> None:
        """``/load``: goes on with a stored conversation."""
        file, *more = names(rest, "/load FILE")
        if more:
            raise InputError(f"/load takes one file, not {rest!r}.", advice="Write: /load FILE")
        self.talk = Conversation.load(file)
        self.terminal.note(f"{len(self.talk.turns)} turns read from {file}")
        if self.patient:
            self.terminal.table(views.transcript(self.talk))

    def reset(self, _: str) -> None:
        """``/reset``: forgets the conversation; its pictures come with the next question."""
        self.talk = self.talk.restarted()
