"""`mmlm chat`: a script on standard input, one question, streaming, comparing, stopping."""

import io
import json

import pytest
from tiny import picture, shared

import mmlm
from mmlm.cli import chat, main
from mmlm.errors import InputError
from mmlm.inputs import message, prepare
from mmlm.runner import GenerateSettings, Request, generate_all
from mmlm.streaming import AnswerStream

SHORT = ("--generate.max_new_tokens", "6")
SETTINGS = GenerateSettings(max_new_tokens=6)


@pytest.fixture
def talk(tiny_folder, tmp_path, monkeypatch, capsys):
    """Runs a script of lines; returns exit code, standard output and standard error."""
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    monkeypatch.chdir(tmp_path)

    def run(script, *argv):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(script) + "\n"))
        code = main(["chat", "--model", str(tiny_folder), *SHORT, *argv])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run


def events(out):
    return [json.loads(line) for line in out.splitlines()]


def expected(question, image, *methods):
    """The answer that the batched runner gives to a first question."""
    request = Request("x", (picture(image),), question)
    [result] = generate_all(*shared("llava"), [request], methods, SETTINGS)
    return result.text


def test_a_script(talk):
    code, out, err = talk(
        [
            "what is this ?",
            "",
            "/method VHR(alpha=4.0)",
            "and that ?",
            "/image 1.png",
            "what is this ?",
            "/method none",
            "/reset",
            "what is this ?",
            "/quit",
            "never asked",
        ],
        *("--image", "0.png", "--json"),
    )
    assert code == 0
    first, second, third, fourth = events(out)
    assert first["text"] == expected("what is this ?", 0)
    assert first["methods"] == []
    assert first["images"] == ["0.png"]
    assert (first["stopped"], first["unknown_words"]) == (False, [])
    assert second["methods"] == [mmlm.VHR(alpha=4.0).text]
    assert second["images"] == []
    # /image begins a new conversation; the method stays.
    assert third["text"] == expected("what is this ?", 1, mmlm.VHR(alpha=4.0))
    assert third["images"] == ["1.png"]
    # /reset keeps the picture.
    assert fourth["text"] == expected("what is this ?", 1)
    assert fourth["images"] == ["1.png"]
    assert "A new conversation begins" in err


def test_the_conversation_is_kept(talk, monkeypatch):
    given = []

    def remember(processor, conversations, images, **options):
        given.append((conversations[0], images[0]))
        return prepare(processor, conversations, images, **options)

    monkeypatch.setattr(chat, "prepare", remember)
    code, out, _ = talk(["one", "/add 1.png 2.png", "two"], "--image", "0.png", "--json")
    assert code == 0
    answer = events(out)[0]["text"]
    assert given[1][0] == [
        message("user", "one", 1),
        message("assistant", answer),
        message("user", "two", 2),
    ]
    assert [image.tobytes() for image in given[1][1]] == [picture(n).tobytes() for n in range(3)]


def test_plain_output_is_the_answers(talk):
    code, out, _ = talk(["what is this ?"], "--image", "0.png")
    assert code == 0
    assert out.strip() == expected("what is this ?", 0)


def test_one_question(talk):
    code, out, _ = talk([], "--image", "0.png", "--prompt", "what is this ?", "--json")
    assert code == 0
    assert events(out)[0]["text"] == expected("what is this ?", 0)
    code, out, err = talk([], "--image", "none.png", "--prompt", "what ?")
    assert (code, out) == (2, "")
    assert "no such file" in err


def test_errors_do_not_end_the_session(talk, monkeypatch):
    script = [
        "/nonsense",
        "/image none.png",
        '/image "0.png',
        "/image",
        "/method VHR(alpha=nan)",
        "/method VRH",
        "/compare",
        "what is this ?",
    ]
    code, out, err = talk(script, "--image", "0.png", "--json")
    assert code == 3
    *errors, answer = events(out)
    assert len(errors) == 7
    assert all(event["error"] and event["advice"] for event in errors)
    assert answer["text"] == expected("what is this ?", 0)
    assert err.count("error: ") == err.count("advice: ") == 7


def test_a_failure_of_the_model_leaves_the_conversation(talk, monkeypatch):
    load = mmlm.load

    def broken(*args, **kwargs):
        model, processor = load(*args, **kwargs)
        original = model.generate
        calls = iter([RuntimeError("the first call fails")])

        def generate(**inputs):
            for error in calls:
                raise error
            return original(**inputs)

        model.generate = generate
        return model, processor

    monkeypatch.setattr(mmlm, "load", broken)
    code, out, _ = talk(["what is this ?"] * 2, "--image", "0.png", "--json")
    assert code == 3
    failed, answer = events(out)
    assert failed["error"] == "the first call fails"
    assert answer["images"] == ["0.png"]
    assert answer["text"] == expected("what is this ?", 0)


def test_compare(talk):
    script = ["/method VHR(alpha=4.0)", "what is this ?", "/compare", "/compare and that ?"]
    code, out, _ = talk(script, "--image", "0.png", "--json")
    assert code == 0
    answer, last, new = events(out)
    assert last["question"] == "what is this ?"
    assert last["plain"]["text"] == expected("what is this ?", 0)
    assert last["with_methods"]["text"] == answer["text"]
    assert last["plain"]["text"] != answer["text"]
    assert new["question"] == "and that ?"
    code, out, _ = talk([*script[:3], "/compare"], "--image", "0.png")
    assert code == 0
    assert out.count("VHR(alpha=4.0)") == 2
    assert out.count("6 tokens") >= 2


def test_help_and_method_in_force(talk):
    _, out, err = talk(["/help", "/method", "/method VHR(alpha=3.0) + VCD", "/method"])
    for command in ("/image", "/add", "/method", "/compare", "/reset", "/quit"):
        assert command in out
    assert f"method: none   (there are: {', '.join(mmlm.method_names())})" in err
    assert "method: VHR(alpha=3.0) + VCD\n" in err


def test_unknown_words_are_told(talk, monkeypatch):
    monkeypatch.setattr(chat, "unknown_words", lambda processor, text: ["flamingo"])
    _, out, err = talk(["a flamingo ?"], "--image", "0.png", "--json")
    assert events(out)[0]["unknown_words"] == ["flamingo"]
    assert "no word for 'flamingo'" in err


def test_ctrl_c_stops_the_answer_and_not_the_session(talk, monkeypatch):
    pieces = AnswerStream.__next__
    pressed = []

    def interrupted(stream):
        piece = pieces(stream)
        if not pressed:
            pressed.append(piece)
            raise KeyboardInterrupt
        return piece

    monkeypatch.setattr(AnswerStream, "__next__", interrupted)
    code, out, _ = talk(
        ["what is this ?", "what is this ?"],
        *("--image", "0.png", "--json", "--generate.max_new_tokens", "400"),
    )
    assert code == 0
    first, second = events(out)
    assert first["stopped"] is True
    assert first["n_tokens"] < 400
    assert second["stopped"] is False
    assert second["n_tokens"] == 400


class TestStream:
    def inputs(self, question="what is this ?", rows=1):
        _, processor = shared("llava")
        return prepare(processor, [[message("user", question, 1)]] * rows, [[picture()]] * rows)

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_equals_the_runner(self, num_beams):
        settings = GenerateSettings(max_new_tokens=6, num_beams=num_beams)
        with AnswerStream(*shared("llava"), self.inputs(), (), settings) as stream:
            pieces = list(stream)
        request = Request("x", (picture(),), "what is this ?")
        [result] = generate_all(*shared("llava"), [request], (), settings)
        assert "".join(pieces).strip() == stream.text == result.text
        assert stream.n_tokens == result.n_tokens
        assert len(pieces) > 1 or num_beams > 1

    def test_methods_work_in_the_thread_and_are_removed(self):
        model, processor = shared("llava")
        with AnswerStream(model, processor, self.inputs(), [mmlm.VHR(alpha=4.0)], SETTINGS) as one:
            list(one)
        assert one.text == expected("what is this ?", 0, mmlm.VHR(alpha=4.0))
        assert "generate" not in vars(model)
        with AnswerStream(model, processor, self.inputs(), (), SETTINGS) as two:
            list(two)
        assert two.text == expected("what is this ?", 0) != one.text

    def test_stop(self):
        long = GenerateSettings(max_new_tokens=500)
        with AnswerStream(*shared("llava"), self.inputs(), (), long) as stream:
            next(iter(stream))
            stream.stop()
            list(stream)
        assert stream.stopped
        assert 0 < stream.n_tokens < 500

    def test_leaving_the_block_stops(self):
        long = GenerateSettings(max_new_tokens=500)
        with AnswerStream(*shared("llava"), self.inputs(), [mmlm.VHR()], long) as stream:
            next(iter(stream))
        assert "generate" not in vars(shared("llava")[0])

    def test_an_error_in_the_thread_is_raised_here(self, monkeypatch):
        model, processor = shared("llava")

        def generate(**_):
            raise RuntimeError("in the thread")

        monkeypatch.setattr(model, "generate", generate)
        with (
            pytest.raises(RuntimeError, match="in the thread"),
            AnswerStream(model, processor, self.inputs(), (), SETTINGS) as stream,
        ):
            list(stream)

    def test_more_than_one_row(self):
        with pytest.raises(InputError, match="2 conversations"):
            AnswerStream(*shared("llava"), self.inputs(rows=2))
