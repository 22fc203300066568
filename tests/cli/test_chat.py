"""`mmlm chat`: a script on standard input, one question, streaming, comparing, stopping."""

import io
import json
import signal

import pytest
from PIL import Image
from tiny import picture, shared

import mmlm
from mmlm.cli import chat, chat_session, main
from mmlm.cli.frame import Terminal
from mmlm.errors import InputError
from mmlm.inputs import message, prepare
from mmlm.runner import GenerateSettings, Request, generate_all
from mmlm.show.conversation import Conversation, Picture
from mmlm.show.truth import draw_scene
from mmlm.show.words import words
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

    monkeypatch.setattr("mmlm.inputs.prepare", remember)
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
    for command in ("/image", "/add", "/method", "/compare", "/inspect", "/save", "/quit"):
        assert command in out
    assert f"method: none   (there are: {', '.join(mmlm.method_names())})" in err
    assert "method: VHR(alpha=3.0) + VCD\n" in err


def test_unknown_words_are_told(talk, monkeypatch):
    monkeypatch.setattr(chat_session, "unknown_words", lambda processor, text: ["flamingo"])
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
            signal.raise_signal(signal.SIGINT)
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


def test_a_scene_is_known_and_answers_say_so(talk):
    code, out, err = talk(["what is this ?", "/scene natural 8", "/show"], "--scene", "7", "--json")
    assert code == 0
    answer, shown = events(out)
    assert answer["images"] == ["world natural 7"]
    assert not any(answer["objects"].values())  # a random model names nothing
    [pending] = shown["pending"]
    drawn = draw_scene("natural", 0, 8)
    assert pending["name"] == "world natural 8"
    assert pending["known"]["objects"] == sorted(drawn.known.objects)
    assert "world natural 8" in err
    code, out, _ = talk(["what is this ?"], "--image", "0.png", "--json")
    assert events(out)[0]["objects"] is None


def test_any_scene_and_wrong_ones(talk):
    script = ["/scene", "/show", "/scene counterfactual", "/show"]
    wrong = ["/scene x 1", "/scene 1 2", "/scene natural -1", "/scene natural 1 1"]
    code, out, _ = talk([*script, *wrong], "--json")
    assert code == 3
    one, two, *errors = events(out)
    assert one["pending"][0]["name"].startswith("world natural ")
    assert two["pending"][0]["name"].startswith("world counterfactual ")
    assert len(errors) == 4
    assert "There is no split 'x'" in errors[0]["error"]


def test_truth_from_a_file(talk, tmp_path):
    instances = {
        "images": [{"id": 1, "file_name": "0.png"}],
        "categories": [{"id": 17, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 17}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    truth = ("--truth", "instances.json", "--image", "0.png", "--json")
    code, out, _ = talk(["what ?", "/image 1.png", "/show"], *truth)
    assert code == 3
    answer, refused, shown = events(out)
    assert answer["objects"].keys() == {"found", "invented", "rightly_denied", "wrongly_denied"}
    assert "no picture with the file name '1.png'" in refused["error"]
    [picture_] = shown["turns"][0]["pictures"]
    assert picture_["known"] == {"objects": ["cat"], "source": "instances.json", "asked": None}
    code, _, err = talk([], "--truth", "none.json")
    assert (code, "no file 'none.json'" in err) == (2, True)


def test_save_and_load(talk, tmp_path):
    script = ["/method VHR(alpha=4.0)", "what is this ?", "/save a.json", "/save b.json embed"]
    code, out, err = talk([*script, "and that ?"], "--image", "0.png", "--json")
    assert code == 0
    _, second = events(out)
    assert "1 turns written to a.json" in err
    for name in ("a.json", "b.json"):
        [turn] = Conversation.load(tmp_path / name).turns
        assert turn.methods == (mmlm.VHR(alpha=4.0).text,)
        again = ["/method VHR(alpha=4.0)", f"/load {name}", "and that ?"]
        code, out, _ = talk(again, "--json")
        assert (code, events(out)[0]["text"]) == (0, second["text"])
    code, out, _ = talk(["/method VHR(alpha=4.0)", "and that ?"], "--load", "a.json", "--json")
    assert (code, events(out)[0]["text"]) == (0, second["text"])


def test_wrong_files_leave_the_conversation(talk, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    script = [
        *("/save mine.json", "/save", "/save a.json inside", "/save none/a.json"),
        *("/load none.json", "/load mine.json", "/load a b", "/load"),
    ]
    code, out, _ = talk([*script, "what is this ?"], "--image", "0.png", "--json")
    assert code == 3
    *errors, answer = events(out)
    assert len(errors) == 8
    assert all(event["error"] and event["advice"] for event in errors)
    assert answer["images"] == ["0.png"]
    assert (tmp_path / "mine.json").read_text() == "{}"
    code, _, err = talk([], "--load", "mine.json")
    assert (code, "lacks 'format'" in err) == (2, True)


class TestInspect:
    def test_the_answer_is_the_same_and_maps_are_those_of_its_words(self, talk, tmp_path):
        script = ["/method VHR(alpha=4.0)", "what is this ?", "/method none", "/inspect > a.png"]
        code, out, _ = talk(script, "--image", "0.png", "--json")
        assert code == 0
        answer, seen = events(out)
        # Measured with the method that the answer was written with, not with the one in force.
        assert (
            seen["answer"] == answer["text"] == expected("what is this ?", 0, mmlm.VHR(alpha=4.0))
        )
        [share], [values] = seen["shares"], seen["maps"]
        assert 0 < share < 1
        assert sum(map(sum, values)) == pytest.approx(share, rel=1e-3)
        assert Image.open(tmp_path / "a.png").size == (480, 480)
        word = answer["text"][slice(*words(answer["text"])[0])]
        code, out, _ = talk([*script[:2], f"/inspect {word}"], "--image", "0.png", "--json")
        one = events(out)[1]
        assert one["word"] == word
        assert one["maps"] != seen["maps"]

    def test_for_people(self, talk):
        code, out, _ = talk(["what is this ?", "/inspect"], "--image", "0.png")
        assert code == 0
        assert "of the attention" in out
        assert "the most seeing words" in out
        assert "█" in out

    def test_refusals(self, talk):
        before = ["/inspect", "/inspect x > a.txt", "/inspect > none/a.png"]
        code, _, err = talk([*before, "what is this ?", "/inspect zebra"], "--json")
        assert code == 3
        assert "There is no answer yet" in err
        assert "no name of a PNG" in err
        assert "no folder 'none'" in err
        assert "There is no picture yet" in err
        _, _, err = talk(["what ?", "/inspect zebra"], "--image", "0.png", "--json")
        assert "has no word 'zebra'" in err
        assert "Its words: " in err

    def test_a_strangers_conversation_imports_no_module(self, talk, tmp_path):
        talked = Conversation().with_pictures(Picture("x", picture()))
        talked.with_turn("what ?", "a .", ["nasty.Module(x=1)"]).save(tmp_path / "a.json")
        code, _, err = talk(["/load a.json", "/inspect"], "--json")
        assert code == 3
        assert "nasty.Module(x=1), which is not part of mmlm" in err
        assert "If you trust it: /method nasty.Module(x=1)" in err


def test_looking_at_pictures_needs_colours(talk):
    code, _, err = talk(["/look"], "--image", "0.png")
    assert code == 3
    assert "cannot be drawn without colours" in err


def test_entries_of_several_lines(talk):
    script = ["what is\\", "this ?", '"""what is', 'this ?"""']
    code, out, _ = talk(script, "--json")
    assert code == 0
    assert [event["question"] for event in events(out)] == ["what is\nthis ?"] * 2


def test_a_stopped_question_of_the_command_line(talk, monkeypatch):
    pieces = AnswerStream.__next__

    def interrupted(stream):
        piece = pieces(stream)
        signal.raise_signal(signal.SIGINT)
        return piece

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(AnswerStream, "__next__", interrupted)
    more = ("--generate.max_new_tokens", "400")
    code, _, err = talk([], "--image", "0.png", "--prompt", "what ?", *more)
    assert code == 130  # the second one is not swallowed where nobody sits at the keyboard
    assert signal.getsignal(signal.SIGINT) is before
    code, _, err = talk([], "--prompt", "  ")
    assert (code, "--prompt is empty" in err) == (2, True)


def test_completions(tiny_folder):
    settings = chat.Chat()
    session = chat_session.Session(
        *shared("llava"), (), settings, Terminal(), Conversation(), patient=True
    )
    assert session.completions("", "/co") == ["/compare"]
    assert session.completions("", "what") == []
    assert session.completions("/method ", "VH") == ["VHR"]
    assert "natural" in session.completions("/scene ", "")
    assert f"{tiny_folder}/config.json" in session.completions("/image ", f"{tiny_folder}/con")
    assert session.completions("what is ", "t") == []


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
