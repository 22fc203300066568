"""The programs in examples/: their own parts here, the whole where lmms-eval is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import build

import mmlm
from mmlm.errors import InputError
from mmlm.runner import GenerateSettings, Request, generate_all

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "lmms_eval_with_vhr.py"
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed; docs/evaluation.md says how both fit into one environment",
)


def imported(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = imported(PROGRAM, "lmms_eval_with_vhr")
scoring = imported(PROGRAM.parent / "lmms_eval_task" / "scoring.py", "lmms_eval_task_scoring")


def user(*parts):
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


ONE, TWO = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


class TestRequests:
    def test_pictures_first(self):
        request = example.request_of("1", user(ONE, TWO, "Which <image 1> ", "is red?"))
        assert request == Request("1", (ONE, TWO), "Which <image 1> is red?")

    def test_pictures_between_words(self):
        request = example.request_of("1", user("Is ", ONE, " like ", TWO, "?"))
        assert request == Request("1", (ONE, TWO), "Is <image 1> like <image 2>?", marked=True)

    def test_only_text(self):
        assert example.request_of("1", user("Hello")) == Request("1", (), "Hello")

    @pytest.mark.parametrize(
        ("messages", "told"),
        [
            ([{"role": "system", "content": []}, *user("x")], "turns system, user"),
            ([*user("x"), {"role": "assistant", "content": []}], "turns user, assistant"),
            ([], "has the turns ;"),
            ([{"role": "user", "content": [{"type": "video", "url": "v"}]}], "holds video"),
        ],
    )
    def test_what_would_be_lost_is_refused(self, messages, told):
        with pytest.raises(InputError, match=told):
            example.request_of("7", messages)


class TestSettings:
    def test_greedy_as_lmms_eval_writes_it(self):
        options = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1}
        settings, ends = example.settings_of(options | {"do_sample": False}, 4)
        assert (settings, ends) == (GenerateSettings(max_new_tokens=16, batch_size=4), [])
        assert options["temperature"] == 0  # the task's own dictionary stays as it is

    def test_sampling_and_ends(self):
        settings, ends = example.settings_of({"temperature": 0.2, "until": "\n\n"}, 1)
        assert settings.do_sample
        assert settings.temperature == 0.2
        assert ends == ["\n\n"]
        assert example.settings_of({"until": ["a", "b"]}, 1)[1] == ["a", "b"]

    def test_unknown_option(self):
        with pytest.raises(InputError, match="sets penalty"):
            example.settings_of({"penalty": 3}, 1)

    @pytest.mark.parametrize(
        ("text", "ends", "left"),
        [("yes\n\nno", ["\n\n"], "yes"), ("a b c", ["c", "b"], "a "), ("abc", [], "abc")],
    )
    def test_cut(self, text, ends, left):
        assert example.cut(text, ends) == left


class TestTask:
    @pytest.mark.parametrize(
        ("label", "answer", "accuracy", "yes"),
        [("yes", "Yes.", 1, 1), ("no", "Yes.", 0, 1), ("no", "no, never", 1, 0),
         ("yes", "perhaps", 0, 0), ("no", "perhaps", 0, 0)],
    )  # fmt: skip
    def test_score(self, label, answer, accuracy, yes):
        assert scoring.score({"label": label}, [answer]) == {
            "accuracy": accuracy,
            "yes_ratio": yes,
        }

    def test_files(self, tmp_path):
        import yaml

        task = example.prepare_task(tmp_path, 2)
        loader = type("Loader", (yaml.SafeLoader,), {})
        loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
        written = yaml.load((task / "world_pope.yaml").read_text(), loader)
        questions = Path(written["dataset_kwargs"]["data_files"]["test"])
        documents = [json.loads(line) for line in questions.read_text().splitlines()]
        assert {document["label"] for document in documents} == {"yes", "no"}
        assert scoring.pictures(documents[0])[0].mode == "RGB"
        for name in ("doc_to_visual", "doc_to_text", "process_results"):
            module, _, function = written[name].partition(".")
            assert module == "scoring"
            assert callable(getattr(scoring, function))


def direct_answers(model, processor, task_folder, method):
    """The same questions through mmlm alone."""
    lines = (task_folder / "questions.jsonl").read_text().splitlines()
    requests = []
    for number, line in enumerate(lines):
        asked = json.loads(line)
        requests.append(Request(str(number), (asked["image"],), asked["text"]))
    methods = [] if method == "none" else [mmlm.parse_method(method)]
    settings = GenerateSettings(max_new_tokens=16)
    return [result.text for result in generate_all(model, processor, requests, methods, settings)]


@needs_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ours", "llava_hf"])
def test_inside_lmms_eval(tmp_path, wrapper):
    if wrapper == "llava_hf" and importlib.util.find_spec("decord") is None:
        pytest.skip("lmms-eval's llava_hf needs decord")
    model, processor = build("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    methods = ["VHR(alpha=4.0)", "PAI(alpha=0.8)"]
    command = [sys.executable, str(PROGRAM), "--model", str(tmp_path / "model"), "--pictures", "3",
               "--wrapper", wrapper, "--output", str(tmp_path / "out")]  # fmt: skip
    for method in methods:
        command += ["--method", method]
    # A process of its own: lmms-eval sets up logging and patches libraries when imported.
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(report) == ["none", *methods]
    assert any(report[method]["changed"] for method in methods)
    for method, row in report.items():
        expected = direct_answers(model, processor, tmp_path / "out" / "task", method)
        assert row["questions"] == len(expected)
        # Our runner cuts blanks around an answer, lmms-eval does not.
        assert [answer.strip() for answer in row["answers"]] == expected
