"""What all commands share: help without torch, exit codes, errors, configuration files."""

import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

import mmlm.cli
from mmlm.cli import SUMMARIES, arguments, configs, frame, main
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.generate import Generate
from mmlm.cli.options import ModelOptions, method_field, parse_methods
from mmlm.errors import InputError
from mmlm.runner import GenerateSettings


def explained(capsys):
    """What was printed on standard error, after checking its form."""
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    *_, error, advice = shown.err.strip().splitlines()
    assert error.startswith("error: ")
    assert advice.startswith("advice: ")
    assert len(advice) > len("advice: ")
    return shown.err


def test_help_of_every_command_leaves_torch_out():
    """In a new process: import, the help of the program and of all its commands."""
    script = """
import importlib, sys
from mmlm.cli import SUMMARIES, main
assert main(["--help"]) == 0
for name in SUMMARIES:
    module = importlib.import_module(f"mmlm.cli.{name}")
    for sub in getattr(module, "COMMANDS", {None: None}):
        try:
            assert main([name, *([sub] if sub else []), "--help"]) == 0
        except SystemExit as leaving:  # the training program's own parser
            assert name == "train" and leaving.code == 0
heavy = {"torch", "transformers", "torchvision", "nltk", "rich"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in SUMMARIES.values():
        assert line in done.stdout


def test_python_m_mmlm():
    done = subprocess.run(
        [sys.executable, "-m", "mmlm", "nonsense"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no command `mmlm nonsense`")


@pytest.mark.parametrize("name", SUMMARIES)
def test_summaries_are_those_of_the_commands(name):
    module = __import__(f"mmlm.cli.{name}", fromlist=["COMMAND"])
    assert hasattr(module, "COMMANDS") or module.COMMAND.summary == SUMMARIES[name]


def test_nothing_is_misuse_and_version_is_not(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err
    assert main(["data"]) == 2
    assert "world" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmlm {mmlm.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generat"], "Did you mean 'generate'?"),
        (["data", "wrld"], "Did you mean 'world'?"),
        (["methods", "vhr", "more"], "`mmlm methods` does not know 'more'"),
        (["methods", "VRH"], "Did you mean 'VHR'?"),
        (["generate"], "needs --input, --output"),
        (["generate", "--inptu", "x"], "Did you mean '--input'?"),
        (["generate", "--method"], "--method needs a value"),
        (["chat", "--generate.max_new_tokens", "many"], "expected a whole number"),
        (["chat", "--generate.max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (["chat", "--generate.temperature", "nan"], "expected a finite number"),
        (["chat", "--generate.do_sample", "--generate.top_p", "1.5"], "top_p must be in (0, 1]"),
        (["chat", "--model.dtype", "float8"], "expected one of float32, bfloat16"),
        (["chat", "--config", "decode/vrh"], "Did you mean 'decode/vhr'?"),
    ],
)
def test_misuse(capsys, argv, words):
    assert main(argv) == 2
    assert words in explained(capsys)


@dataclass(frozen=True)
class Options:
    """Options of a command made for these tests.

    Attributes:
        word: A word.
        methods: Methods.
        strict: A switch.
        generate: Generation.
        model: Model.
    """

    word: str = "default"
    methods: tuple[str, ...] = method_field()
    strict: bool = False
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    model: ModelOptions = field(default_factory=ModelOptions)


COMMAND = Command("try options", Options, lambda settings, terminal: 0)


def parsed(*argv):
    return arguments.parse("mmlm try", COMMAND, argv)[0]


class TestSettings:
    def test_defaults_file_command_line(self, tmp_path):
        """Each wins over the one before it; a list is replaced, not extended."""
        path = tmp_path / "c.yaml"
        path.write_text(
            "word: file\nmethods: ['VHR(alpha=3.0)']\nstrict: true\nmodel: {id: a/b}\n"
            "generate: {max_new_tokens: 7, seed: 5}\n"
        )
        assert parsed() == Options()
        from_file = parsed("--config", str(path))
        assert from_file == Options(
            word="file",
            methods=("VHR(alpha=3.0)",),
            strict=True,
            model=ModelOptions(id="a/b"),
            generate=GenerateSettings(max_new_tokens=7, seed=5),
        )
        over = parsed(
            *("--method", "VCD", "--method", "VHR", "--strict", "false"),
            *(f"--config={path}", "--generate.seed", "6", "--model=c/d"),
        )
        assert over.methods == ("VCD", "VHR")
        assert over.model.id == "c/d"
        assert over.strict is False
        assert over.generate == GenerateSettings(max_new_tokens=7, seed=6)
        assert over.word == "file"

    def test_switches(self):
        assert parsed("--strict").strict is True
        assert parsed("--strict", "--word", "x") == Options(strict=True, word="x")
        assert parsed("--strict=false").strict is False

    def test_text_stays_text(self):
        assert parsed("--word", "7").word == "7"
        assert parsed("--word", "{a: b}").word == "{a: b}"
        assert parsed("--word", "null").word == "null"
        assert parsed("--method", "VHR(layers=(1, 2))").methods == ("VHR(layers=(1, 2))",)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("wrd: 1\n", "There is no setting 'wrd'"),
            ("generate: {max_tokens: 1}\n", "There is no setting 'generate.max_tokens'"),
            ("generate: {max_new_tokens: 1.5}\n", "--generate.max_new_tokens does not take '1.5'"),
            ("generate: {temperature: .nan}\n", "temperature"),
            ("methods: VHR\n", "--method"),
            ("model: [}\n", "parsing"),
        ],
    )
    def test_strict_keys_and_types_of_a_file(self, tmp_path, text, words):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            parsed("--config", str(path))
        assert words in str(caught.value)
        assert caught.value.advice

    def test_printed_configuration_can_be_read_back(self, tmp_path, capsys):
        given = ["--word", "x", "--method", "VHR(alpha=3.0)", "--generate.seed", "4"]
        assert arguments.parse("mmlm try", COMMAND, [*given, "--print_config"]) is None
        path = tmp_path / "printed.yaml"
        path.write_text(capsys.readouterr().out)
        assert parsed("--config", str(path)) == parsed(*given)

    def test_help_shows_aliases_defaults_and_requirements(self, capsys):
        assert arguments.parse("mmlm try", COMMAND, ["--help"]) is None
        shown = capsys.readouterr().out
        assert "--method METHOD (repeatable)" in shown
        assert "--model ID" in shown
        assert "(default: 512)" in shown
        assert "--model CONFIG" not in shown


def test_every_shipped_decode_preset_loads():
    names = [name for name in configs.shipped_configs() if name.startswith("decode/")]
    assert {"decode/plain", "decode/vcd", "decode/vhr"} <= set(names)
    command = Command("x", Generate, lambda settings, terminal: 0)
    for name in names:
        argv = ["--config", name, "--input", "i", "--output", "o"]
        settings, _ = arguments.parse("mmlm generate", command, argv)
        methods = parse_methods(settings.methods)
        assert len(methods) == (name != "decode/plain")
        lines = configs.find_config(name).read_text().splitlines()
        header = "\n".join(line for line in lines if line.startswith("#"))
        assert f"mmlm generate --config {name} " in header


def test_configurations_are_found_by_path_and_by_name(tmp_path):
    (tmp_path / "own.yaml").write_text("")
    assert configs.find_config(str(tmp_path / "own.yaml")) == tmp_path / "own.yaml"
    assert configs.find_config("decode/vhr") == configs.FOLDER / "decode" / "vhr.yaml"
    assert configs.find_config("decode/vhr.yaml") == configs.FOLDER / "decode" / "vhr.yaml"
    assert configs.with_config_paths(["--config", "decode/vhr", "--x"]) == [
        f"--config={configs.FOLDER / 'decode' / 'vhr.yaml'}",
        "--x",
    ]


class TestErrors:
    """Errors that arise while a command runs."""

    def run(self, monkeypatch, error, *argv):
        def run(settings, terminal):
            raise error

        command = Command("fails", Options, run)
        monkeypatch.setattr(frame, "_find", lambda name, summaries: command)
        return main(["try", *argv])

    def test_ours(self, monkeypatch, capsys):
        assert self.run(monkeypatch, InputError("bad", advice="do this")) == 2
        assert explained(capsys) == "error: bad\nadvice: do this\n"

    def test_debug_shows_where(self, monkeypatch, capsys):
        assert self.run(monkeypatch, InputError("bad", advice="do this"), "--debug") == 2
        assert "Traceback" in capsys.readouterr().err

    def test_operating_system(self, monkeypatch, capsys):
        assert self.run(monkeypatch, PermissionError(13, "Permission denied", "a.txt")) == 2
        assert "a.txt: Permission denied" in explained(capsys)

    def test_interrupt(self, monkeypatch, capsys):
        assert self.run(monkeypatch, KeyboardInterrupt()) == 130
        assert "Stopped" in capsys.readouterr().err

    def test_a_bug_reaches_the_caller(self, monkeypatch):
        with pytest.raises(ZeroDivisionError):
            self.run(monkeypatch, ZeroDivisionError())

    def test_a_bug_of_the_console_script(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        frame.explain_bugs(debug=False)
        sys.excepthook(KeyError, KeyError("x"), None)
        shown = capsys.readouterr().err
        assert shown.startswith("internal error: KeyError: 'x'\nadvice: ")


def test_reader_that_goes_away():
    script = "from mmlm.cli import main; import sys; sys.exit(main(['methods', '--json']))"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{script}" | true; exit ${{PIPESTATUS[0]}}'],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


class TestTerminal:
    def test_json_mode_has_json_only_on_standard_output(self, capsys):
        terminal = Terminal(json=True)
        terminal.say("for people")
        terminal.table("a table")
        terminal.note("a remark")
        terminal.emit({"text": "dög"})
        shown = capsys.readouterr()
        assert json.loads(shown.out) == {"text": "dög"}
        assert shown.err == "a remark\n"

    def test_quiet(self, capsys):
        terminal = Terminal(quiet=True)
        terminal.note("a remark")
        terminal.say("the answer")
        assert capsys.readouterr() == ("the answer\n", "")

    def test_no_bar_without_a_terminal(self):
        assert Terminal().progress is False
