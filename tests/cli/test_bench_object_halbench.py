"""`mmlm bench object-halbench` and `mmlm score object-halbench`, with and without a judge."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import picture

from mmlm.cli import main

IMAGES = (42, 73, 74)  # in COCO val2014
SHORT = ("--generate.max_new_tokens", "6", "--quiet")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    with path.open("w") as stream:
        for number, image in enumerate(IMAGES):
            buffer = io.BytesIO()
            picture(number).save(buffer, "PNG")
            encoded = base64.b64encode(buffer.getvalue()).decode()
            record = {"image_id": image, "question": "what is this ?", "image": encoded}
            stream.write(json.dumps(record) + "\n")
    return path


@pytest.fixture
def answers(tmp_path):
    """Stored answers, as a model that can speak would give them."""
    texts = ("A dog sits on the floor.", "A motorcycle and a dog stand outside.", "Two dogs.")
    path = tmp_path / "answers.jsonl"
    lines = [
        {"id": str(n), "image_id": image, "question": "what is this ?", "text": text, "n_tokens": 3}
        for n, (image, text) in enumerate(zip(IMAGES, texts, strict=True))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def chat_server():
    """A server that lists a dog for everything, and counts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            server.bodies.append(json.loads(self.rfile.read(length)))
            message = {"role": "assistant", "content": '["dog"]'}
            body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.bodies = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_run_resume_score_and_export(tiny_folder, questions, tmp_path, capsys):
    def bench(output):
        command = ["bench", "object-halbench", "--model", str(tiny_folder), "--data"]
        command += [str(questions), "--output", str(tmp_path / output), *SHORT, "--json"]
        assert main(command) == 0
        return json.loads(capsys.readouterr().out)

    scores = bench("whole")
    assert scores["metric"] == "object-halbench/words/val2014-table"
    assert scores["counts"]["answers"] == 3
    whole = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    (tmp_path / "cut").mkdir()
    for name in ("answers.jsonl", "answers.jsonl.run.json"):
        (tmp_path / "cut" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "cut" / "answers.jsonl").write_bytes(whole[: len(whole) // 2])
    bench("cut")
    assert (tmp_path / "cut" / "answers.jsonl").read_bytes() == whole
    exported = tmp_path / "official.jsonl"
    stored = str(tmp_path / "whole" / "answers.jsonl")
    assert main(["score", "object-halbench", stored, "--export", str(exported), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == scores["metrics"]
    official = ["score", "object-halbench", str(exported), "--official", "--json"]
    assert main([*official, "--data", str(questions)]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == scores["metrics"]


def test_a_judge_is_asked_once_and_only_when_named(
    answers, chat_server, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    command = ["score", "object-halbench", str(answers), "--json", "--quiet"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "object-halbench/words/val2014-table"
    assert chat_server.bodies == []
    judge = ["--judge", "openai", "--judge.model", "judge-1", "--judge.key_variable", "JUDGE_KEY"]
    judge += ["--judge.base_url", f"http://127.0.0.1:{chat_server.server_port}/v1"]
    judge += ["--judge.cache", str(tmp_path / "replies")]
    assert main([*command, *judge]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert asked["metric"] == (
        "object-halbench/judge-1(max_tokens=1024,temperature=0.2)/mmlm-prompt/rules/val2014-table"
    )
    assert len(chat_server.bodies) == 2  # two words are not sent
    assert {body["temperature"] for body in chat_server.bodies} == {0.2}
    assert main([*command, *judge, "--judge.offline"]) == 0
    assert json.loads(capsys.readouterr().out) == asked
    assert main(command) == 0  # the verdicts stand beside the answers
    assert json.loads(capsys.readouterr().out) == asked
    assert len(chat_server.bodies) == 2
    assert main([*command, "--extraction", "words"]) == 0
    assert json.loads(capsys.readouterr().out)["metric"].startswith("object-halbench/words")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"sk-secret" in path.read_bytes()]


def test_a_scripted_judge_and_answers_it_does_not_know(answers, tmp_path, capsys):
    replies = tmp_path / "replies.jsonl"
    replies.write_text(json.dumps({"id": "1", "reply": '["motorcycle", "dog"]'}) + "\n")
    command = ["score", "object-halbench", str(answers), "--json", "--judge", "scripted"]
    assert main([*command, "--judge.replies", str(replies)]) == 3
    scores = json.loads(capsys.readouterr().out)
    assert scores["statuses"] == {
        "not judged: no reply in the script": 1,
        "short: the judge was not asked": 1,
    }
    assert scores["counts"]["mentions"] == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--judge", "openai"], "--judge.model"),
        (["--judge", "hf"], "--judge.model"),
        (["--judge", "scripted"], "--judge.replies"),
        (["--judge", "openai", "--judge.model", "m", "--judge.base_url", "here"], "no address"),
        (["--judge", "openai", "--judge.model", "m", "--judge.timeout", "0"], "timeout"),
        (["--judge", "openai", "--judge.model", "m", "--judge.temperature", "-1"], "temperature"),
        (["--judge", "hf", "--judge.model", "m", "--judge.temperature", "1"], "greedily"),
        (["--judge", "hf", "--judge.model", "m", "--judge.max_tokens", "0"], "max_tokens"),
        (["--extraction", "words", "--judge", "hf", "--judge.model", "m"], "asks no judge"),
        (["--data", "x.jsonl"], "--official"),
        (["--references", "captions.json"], "no annotations"),
        (["--phrases", "spacy", "--spacy_model", "no_such_pipeline"], "spaCy"),
    ],
)
def test_requests_that_cannot_be_are_refused(answers, arguments, text, capsys):
    assert main(["score", "object-halbench", str(answers), *arguments]) == 2
    assert text in capsys.readouterr().err
    assert [path.name for path in answers.parent.iterdir()] == ["answers.jsonl"]


def test_a_run_without_its_files_is_refused_before_any_work(
    questions, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("MMLM_DATA_DIR", str(tmp_path / "nothing"))
    command = ["bench", "object-halbench", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "obj_halbench_300_with_image.jsonl" in capsys.readouterr().err
    (tmp_path / "pictures").mkdir()
    command += ["--data", str(questions)]
    assert main([*command, "--images", str(tmp_path / "pictures")]) == 2
    assert "3 of 3 pictures are missing" in capsys.readouterr().err
    assert main([*command, "--count", "0"]) == 2
    assert not (tmp_path / "out").exists()
