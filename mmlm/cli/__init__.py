"""The command line ``mmlm``: one file per command, imported only when that command runs.

How to add a command (nothing else has to be touched):

1. Write ``mmlm/cli/<name>.py``. At module level import nothing heavy (no torch, no transformers):
   ``mmlm <name> --help`` imports the module and must stay below half a second.
2. Describe its options as a frozen dataclass. Every field becomes an option ``--field``, a nested
   dataclass becomes a group ``--group.field``, the ``Attributes:`` section of the docstring becomes
   the help text, a field without default is required, ``metadata={"alias": "--method"}`` gives an
   option a second name (repeatable if the field is a tuple). :class:`mmlm.cli.options.ModelOptions`
   is the shared group behind ``--model``.
3. Write ``run(settings, terminal) -> int``; import the heavy things inside. Return ``DONE`` or
   ``SOME_FAILED``; raise :class:`mmlm.errors.MmlmError` with an ``advice`` for a request that
   cannot be carried out (exit code 2, no traceback). Results go through
   :class:`mmlm.cli.frame.Terminal`: ``terminal.json`` says whether a program reads the answer,
   ``terminal.quiet`` whether to be silent.
4. Export ``COMMAND = Command("one line", Settings, run, positional=("file",))``, or for a command
   with sub-commands ``COMMANDS = {"chair": Command(...), "pope": Command(...)}``.
5. Add the name and its one line to ``SUMMARIES`` below.

Every command gets ``--config`` (a YAML file, or the name of a shipped one such as ``decode/vhr``),
``--print_config``, ``--json``, ``--quiet`` and ``--debug``. Unknown keys are refused; values on the
command line win over the configuration file, and the file wins over the defaults.

Exit codes: 0 done; 1 a bug of ours; 2 misuse or an impossible request, found before any work;
3 done, but some records failed; 130 stopped with Ctrl-C. Every error ends with a line of advice;
tracebacks only with ``--debug``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmlm.cli import frame

__all__ = ["SUMMARIES", "main"]

SUMMARIES = {
    "demo": "caption, mitigate, score: the main job on the embedded world, with a report",
    "chat": "talk with a model about pictures in the terminal",
    "web": "the playground in a browser: what the model invents, and what methods do about it",
    "serve": "a model behind HTTP that answers like OpenAI's chat completions, with methods",
    "inspect": "what a model looks at while it answers: maps, layers, heads, before and after",
    "generate": "answer a file of questions about pictures: JSON lines in, JSON lines out",
    "assemble": "a new LLaVA from any vision tower and language model",
    "train": "train or fine-tune from a configuration file",
    "export": "write a checkpoint of a training as a folder that plain transformers reads",
    "data": "preference pairs (sentinel, mia), tasks (micl), the world; official files",
    "bench": "run a benchmark and score it (chair, pope)",
    "score": "score stored answers again without the model (chair, pope)",
    "compare": "compare runs of one benchmark with a baseline, in numbers and in pictures",
    "methods": "list the methods with their parameters",
    "calibrate": "measure what a method must know about a model (heads, inter-k, ...)",
    "doctor": "what a model is, which methods it supports, and why not; --self: what is missing",
    "completion": "what TAB completes: a script for bash or zsh",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (the console script ``mmlm``).

    Args:
        argv: The arguments after the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit code; see the module's docstring.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if argv is None:
        frame.explain_bugs(debug="--debug" in arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return frame.DONE if arguments else frame.MISUSE
    if arguments[0] == "--version":
        from mmlm import __version__

        print(f"mmlm {__version__}")
        return frame.DONE
    return frame.run_guarded(arguments, SUMMARIES)


def _help() -> str:
    width = max(map(len, SUMMARIES))
    commands = "\n".join(f"  {name:<{width}}  {line}" for name, line in SUMMARIES.items())
    return (
        "usage: mmlm COMMAND [options]\n\n"
        "Stop vision-language models from describing what is not in the image.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n"
        "  --help     this text; `mmlm COMMAND --help` for one command\n"
        "  --version  the version\n\n"
        'examples:\n  mmlm demo\n  mmlm chat --image photo.jpg --method "VHR(alpha=2.0)"\n'
        "  mmlm generate --model llava-hf/llava-1.5-7b-hf --input in.jsonl --output out.jsonl"
    )
