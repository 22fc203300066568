"""`mmlm completion`: what TAB says in a real bash and a real zsh."""

import argparse
import json
import re
import shutil
import subprocess
import sys

import pexpect
import pytest

import mmlm
from mmlm.cli import SUMMARIES, completion, main
from mmlm.cli.configs import shipped_configs

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\r]")
CASES = [
    (["ch"], {"chat"}),
    (["data", "mia", "f"], {"filter"}),
    (["bench", "pope", "--met"], {"--method"}),
    (["chat", "--method", "VC"], {"VCD"}),
    (["chat", "--model.dtype", "bf"], {"bfloat16"}),
    (["generate", "--config", "decode/vh"], {"decode/vhr"}),
    (["generate", "--model", "emb"], {"embedded"}),
    (["doctor", "--s"], {"--self"}),
    (["methods", "VH"], {"VHR"}),
    (["data", "fetch", "coco-v"], {"coco-val2014"}),
    (["train", "--conf"], {"--config"}),
    (["completion", "z"], {"zsh"}),
    (["demo", "--split", "cou"], {"counterfactual"}),
    (["generate", "--input", "quest"], {"questions.jsonl"}),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    (folder / "questions.jsonl").touch()
    (folder / "bash").write_text(completion.script("bash"))
    (folder / "zsh").mkdir()
    (folder / "zsh" / "_mmlm").write_text(completion.script("zsh"))
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(("given", "expected"), CASES, ids=lambda x: " ".join(x))
def test_bash(scripts, given, expected):
    asks = """
source ./bash
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_mmlm mmlm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", asks, "bash", "mmlm", *given],
        capture_output=True,
        text=True,
        cwd=scripts,
    )
    assert done.stderr == ""
    assert set(done.stdout.split()) == expected


def test_bash_offers_every_command(scripts):
    asks = "source ./bash; printf '%s ' \"${_shtab_mmlm_subparsers[@]}\"; echo; complete -p mmlm"
    done = subprocess.run(
        ["bash", "--norc", "-c", asks], capture_output=True, text=True, cwd=scripts
    )
    commands, registered = done.stdout.splitlines()
    assert set(commands.split()) == set(SUMMARIES)
    assert registered.endswith("-F _shtab_mmlm mmlm")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh(scripts, tmp_path):
    """One shell for all cases: keys in, the completed line out."""
    shell = pexpect.spawn(
        "zsh",
        ["-f", "-i"],
        cwd=str(scripts),
        env={"TERM": "dumb", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        encoding="utf-8",
        timeout=60,
        dimensions=(50, 200),
    )
    shell.sendline(
        "PS1='ready> '; unsetopt zle_bracketed_paste; setopt no_beep; fpath=($PWD/zsh $fpath)"
    )
    shell.sendline("autoload -Uz compinit && compinit -u -d $HOME/dump; echo loaded-$((40 + 2))")
    shell.expect_exact("loaded-42")
    for given, expected in CASES:
        # The line is completed, then printed: to its start, a command before it, and return.
        shell.send(" ".join(["mmlm", *given]) + "\t")
        shell.send("\x01print -r -- got: \r")
        shell.expect(r"\ngot: (.*?)\s*\n")
        assert shell.match[1].split()[-1] == next(iter(expected)), given
    shell.close(force=True)


def test_the_tree_holds_what_the_command_line_holds():
    """Every leaf of the tree is a command, and its flags are those that `--help` shows."""
    leaves = dict(_leaves(completion.tree(), ()))
    assert {path[0] for path in leaves} == set(SUMMARIES)
    for path in (("chat",), ("data", "mia", "run"), ("bench", "pope"), ("train",)):
        shown = subprocess.run(
            [sys.executable, "-m", "mmlm", *path, "--help"], capture_output=True, text=True
        ).stdout
        flags = {flag for action in leaves[path]._actions for flag in action.option_strings}
        # Options of a line, not those that texts mention; jsonargparse's own sub-helps left out.
        listed = set(re.findall(r"^  (?:-h, )?(--[\w.]+)", shown, re.M))
        assert listed <= flags | {"--recipe.help"}, path


def _leaves(parser, path):
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield path, parser
    for group in groups:
        for name, below in group.choices.items():
            yield from _leaves(below, (*path, name))


def test_values_are_those_of_the_program():
    leaves = dict(_leaves(completion.tree(), ()))
    method = next(a for a in leaves["chat",]._actions if "--method" in a.option_strings)
    assert set(method.choices) == {*mmlm.method_names(), "none"}
    for name in shipped_configs():
        assert name in completion.script("zsh")


def test_the_command(capsys):
    assert main(["completion", "bash", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"shell": "bash", "script": completion.script("bash")}
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef mmlm")
    assert main(["completion", "fish"]) == 2
    assert "one of bash, zsh" in capsys.readouterr().err
