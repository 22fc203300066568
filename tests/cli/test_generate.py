"""`mmlm generate` from end to end: answers, refusals before any work, failed records, resuming."""

import json
import zlib

import pytest
from PIL import Image
from test_inputs import bomb, png
from tiny import picture

import mmlm
from mmlm.cli import main

SHORT = ("--generate.max_new_tokens", "4", "--generate.batch_size", "2", "--quiet")


def stored(path):
    """What is on the disk: the lines whose turn has come, and the journal of the others."""
    journal = path.with_name(path.name + ".early")
    return lines(path) + (lines(journal) if journal.exists() else [])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def generate(tiny_folder, tmp_path):
    """Runs the command on a file of questions; returns exit code and output path."""

    def run(source, *argv, output="out.jsonl"):
        path = tmp_path / output
        given = ["generate", "--model", str(tiny_folder), "--input", str(source)]
        return main([*given, "--output", str(path), *SHORT, *argv]), path

    return run


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestAnswers:
    def test_output_and_run_record(self, generate, write_questions, questions):
        questions[2] |= {"label": "yes", "nested": {"a": [1]}}
        source = write_questions(questions)
        code, output = generate(source, "--method", "VHR(alpha=3.0)")
        assert code == 0
        found = lines(output)
        assert [line["id"] for line in found] == [f"q{n}" for n in range(9)]
        assert found[2]["label"] == "yes"
        assert found[2]["nested"] == {"a": [1]}
        assert set(found[0]) == {"id", "image", "prompt", "text", "n_tokens", "templated"}
        assert 1 <= found[0]["n_tokens"] <= 4
        record = json.loads((output.parent / "out.jsonl.run.json").read_text())
        assert record["methods"] == [mmlm.VHR(alpha=3.0).text]
        assert record["generate"]["max_new_tokens"] == 4
        assert record["input_hash"].startswith("sha256:")
        assert record["weights"].startswith("sha256:")
        assert set(record["information"]["versions"]) == {"mmlm", "torch", "transformers"}

    def test_method_none_is_plain(self, generate, write_questions, questions):
        source = write_questions(questions[:3])
        _, plain = generate(source, output="plain.jsonl")
        _, none = generate(source, "--config", "decode/vhr", "--method", "none", output="n.jsonl")
        _, vhr = generate(source, "--config", "decode/vhr", output="vhr.jsonl")
        assert lines(none) == lines(plain)
        assert lines(vhr) != lines(plain)

    def test_pictures_are_relative_to_the_input_file(
        self, generate, write_questions, questions, tmp_path, monkeypatch
    ):
        source = write_questions(questions[:2])
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        code, output = generate(source)
        assert (code, len(lines(output))) == (0, 2)

    def test_several_pictures_none_and_an_absolute_path(self, generate, write_questions, tmp_path):
        source = write_questions(
            [
                {"id": 1, "images": ["0.png", str(tmp_path / "1.png")], "prompt": "two"},
                {"id": 2, "images": [], "prompt": "none"},
            ]
        )
        code, output = generate(source)
        assert code == 0
        two, none = lines(output)
        assert two["templated"].count("<image>") == 2
        assert none["templated"].count("<image>") == 0
        assert two["id"] == 1

    def test_json_summary(self, generate, write_questions, questions, capsys):
        source = write_questions(questions[:3])
        code, output = generate(source, "--json")
        assert code == 0
        assert json.loads(capsys.readouterr().out) == {
            "output": str(output),
            "questions": 3,
            "answered": 3,
            "failed": 0,
            "done_before": 0,
        }

    def test_shards_are_a_partition(self, generate, write_questions, questions):
        source = write_questions(questions)
        whole = lines(generate(source)[1])
        parts = [
            lines(generate(source, "--shard", f"{i}/3", output=f"{i}.jsonl")[1]) for i in range(3)
        ]
        for index, part in enumerate(parts):
            assert all(zlib.crc32(line["id"].encode()) % 3 == index for line in part)
        key = [line["id"] for line in whole].index
        joined = [line for part in parts for line in part]
        assert sorted(joined, key=lambda line: key(line["id"])) == whole


class TestRefusals:
    """Exit code 2 before any work: no model is loaded, no file is made or changed."""

    @pytest.fixture
    def refused(self, generate, tmp_path, monkeypatch, capsys):
        def check(source, words, *argv, loads=False, output="out.jsonl"):
            if not loads:
                monkeypatch.setattr(mmlm, "load", lambda *_, **__: pytest.fail("model loaded"))
            before = snapshot(tmp_path)
            code, _ = generate(source, *argv, output=output)
            shown = capsys.readouterr()
            assert code == 2, shown
            assert snapshot(tmp_path) == before
            assert words in shown.err
            assert shown.err.splitlines()[-1].startswith("advice: ")
            assert "Traceback" not in shown.err
            assert shown.out == ""

        return check

    def test_missing_input(self, refused, tmp_path):
        refused(tmp_path / "none.jsonl", "There is no file")

    def test_empty_input(self, refused, write_questions):
        refused(write_questions([]), "holds no question")

    def test_input_that_is_no_json(self, refused, tmp_path):
        (tmp_path / "in.jsonl").write_text('{"id": 1\n')
        refused(tmp_path / "in.jsonl", "line 1 is no JSON")

    @pytest.mark.parametrize(
        ("question", "words"),
        [
            ({"image": "0.png", "prompt": "x"}, "`id` must be text or a whole number"),
            ({"id": True, "image": "0.png", "prompt": "x"}, "`id` must be"),
            ({"id": "", "image": "0.png"}, "`prompt` must be text"),
            ({"id": 1, "image": "0.png", "prompt": " "}, "`prompt` must be text"),
            ({"id": 1, "prompt": "x"}, "either `image` or `images`"),
            ({"id": 1, "image": "0.png", "images": [], "prompt": "x"}, "either `image` or"),
            ({"id": 1, "image": ["0.png"], "prompt": "x"}, "`image` must be one path"),
            ({"id": 1, "images": "0.png", "prompt": "x"}, "`images` must be a list"),
            ({"id": 1, "image": "0.png", "prompt": "x", "text": "y"}, "`text` is a field of the"),
        ],
    )
    def test_question_with_a_wrong_field(self, refused, write_questions, question, words):
        refused(write_questions([{"id": 0, "image": "0.png", "prompt": "x"}, question]), words)

    def test_duplicate_ids(self, refused, write_questions):
        same = [{"id": i, "image": "0.png", "prompt": "x"} for i in (1, "1", 2)]
        refused(write_questions(same), "the id '1' is there 2 times")

    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("VRH", "There is no method 'VRH'"),
            ("VHR(alhpa=2.0)", "no parameter 'alhpa'"),
            ("VHR(alpha=nan)", "got nan"),
            ("VHR(alpha=inf)", "got inf"),
            ("VHR(alpha=-1.0)", "got -1.0"),
            ("VCD(beta=2.0)", "got 2.0"),
            ("VHR(alpha=2.0", "is not a method"),
            ("VHR(alpha=__import__('os'))", "not a literal"),
            ("os.system", "not a subclass"),
        ],
    )
    def test_method(self, refused, write_questions, questions, method, words):
        refused(write_questions(questions), words, "--method", method)

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (("--model", "no-such-model"), "There is no model 'no-such-model'"),
            (("--shard", "3/3"), "--shard does not take '3/3'"),
            (("--shard", "first"), "--shard does not take"),
            (("--generate.temperature", "nan", "--generate.do_sample"), "expected a finite number"),
            (("--generate.max_new_tokens", "-3"), "at least 1"),
            (("--colour", "red"), "does not know '--colour'"),
        ],
    )
    def test_option(self, refused, write_questions, questions, argv, words):
        refused(write_questions(questions), words, *argv)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"model_type": "no-such-family"}, "architecture unknown"),
            ({"model_type": "llama"}, "does not turn images and text into text"),
            (None, "no config.json"),
        ],
    )
    def test_family(self, refused, write_questions, questions, tmp_path, config, words):
        folder = tmp_path / "model"
        folder.mkdir()
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        refused(write_questions(questions), words, "--model", str(folder), loads=True)

    def test_model_id_that_is_not_here(self, refused, write_questions, questions):
        source = write_questions(questions)
        refused(source, "no model 'nobody/nothing'", "--model", "nobody/nothing", loads=True)

    def test_chat_template_that_is_not_there(self, refused, write_questions, questions):
        argv = ("--model.chat_template", "nowhere.jinja")
        refused(write_questions(questions), "nowhere.jinja", *argv, loads=True)

    @pytest.mark.parametrize(
        "argv",
        [
            ("--method", "VHR"),
            ("--generate.seed", "1"),
            ("--generate.num_beams", "2"),
            ("--model.dtype", "bfloat16"),
            ("--shard", "0/2"),
        ],
    )
    def test_output_of_another_run(self, refused, generate, write_questions, questions, argv):
        source = write_questions(questions[:2])
        generate(source)
        refused(source, "belongs to another run", *argv)

    def test_sampled_output_with_other_batches(self, refused, generate, write_questions, questions):
        source = write_questions(questions[:2])
        generate(source, "--generate.do_sample")
        argv = ("--generate.do_sample", "--generate.batch_size", "3")
        refused(source, "generate.batch_size was 2, now 3", *argv)

    def test_output_of_other_questions(self, refused, generate, write_questions, questions):
        generate(write_questions(questions[:2]))
        refused(write_questions(questions[1:3]), "input_hash was")

    def test_output_of_another_model(
        self, refused, generate, write_questions, questions, tiny_folder, monkeypatch
    ):
        """The same name, other weights: found after loading, before anything is written."""
        source = write_questions(questions[:4])
        _, output = generate(source)
        output.write_bytes(output.read_bytes().splitlines(keepends=True)[0])
        load = mmlm.load

        def other(*args, **kwargs):
            model, processor = load(*args, **kwargs)
            model.get_output_embeddings().weight.data[0] += 1
            return model, processor

        monkeypatch.setattr(mmlm, "load", other)
        refused(source, "weights was", loads=True)

    def test_output_that_is_not_ours(self, refused, write_questions, questions, tmp_path):
        (tmp_path / "notes.txt").write_text("irreplaceable")
        refused(write_questions(questions), "without its run record", output="notes.txt")
        refused(write_questions(questions), "without its run record", output="in.jsonl")
        refused(write_questions(questions), "There is no folder", output="none/out.jsonl")


class TestFailedRecords:
    """Exit code 3: the record has an error, the run goes on."""

    def bad(self, folder):
        (folder / "empty.png").touch()
        (folder / "text.png").write_text("no picture")
        (folder / "cut.png").write_bytes(png(picture())[:200])
        (folder / "bomb.png").write_bytes(bomb())
        return {
            "none.png": "no such file",
            "empty.png": "0 bytes",
            "text.png": "no picture in a known format",
            "cut.png": "cut off",
            "bomb.png": "too large",
        }

    def test_bad_pictures(self, generate, write_questions, tmp_path, capsys):
        bad = self.bad(tmp_path)
        names = ["0.png", *bad, "1.png"]
        source = write_questions([{"id": n, "image": n, "prompt": "what ?"} for n in names])
        code, output = generate(source)
        assert code == 3
        found = lines(output)
        assert [line["id"] for line in found] == names
        for line in found[1:-1]:
            assert bad[line["id"]] in line["error"]
            assert line["id"] in line["error"]
            assert line["text"] is None
        for line in (found[0], found[-1]):
            assert "error" not in line
            assert line["n_tokens"] >= 1
        assert "Traceback" not in capsys.readouterr().err
        # Again: nothing is left to do, and the failures are still reported.
        before = output.read_bytes()
        assert generate(source)[0] == 3
        assert output.read_bytes() == before

    def test_unusual_pictures_are_no_failures(self, generate, write_questions, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
        Image.new("L", (20, 20), 77).save(tmp_path / "grey.png")
        Image.new("I;16", (20, 20), 30_000).save(tmp_path / "deep.png")
        Image.new("RGBA", (20, 20), (1, 2, 3, 99)).save(tmp_path / "alpha.png")
        picture(size=(20, 30)).save(tmp_path / "turned.jpg", exif=exif)
        Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
        names = ["cmyk.jpg", "grey.png", "deep.png", "alpha.png", "turned.jpg", "dot.png"]
        source = write_questions([{"id": n, "image": n, "prompt": "what ?"} for n in names])
        code, output = generate(source)
        assert code == 0
        assert all("error" not in line for line in lines(output))

    def test_strict_stops(self, generate, write_questions, questions, tmp_path, capsys):
        questions[3]["image"] = "none.png"
        source = write_questions(questions)
        code, output = generate(source, "--strict")
        assert code == 3
        assert len(stored(output)) == 2  # what cannot be read is tried first; its batch was stored
        assert "Stopped at question 'q3'" in capsys.readouterr().err
        # Without --strict the same output goes on.
        assert generate(source)[0] == 3
        assert [line["id"] for line in lines(output)] == [f"q{n}" for n in range(9)]


class TestResume:
    @pytest.mark.parametrize("sampled", [False, True])
    def test_cut_anywhere_ends_like_an_uninterrupted_run(
        self, generate, write_questions, questions, sampled
    ):
        argv = ("--generate.do_sample", "--generate.batch_size", "4") if sampled else ()
        source = write_questions(questions)
        _, output = generate(source, *argv)
        whole = output.read_bytes()
        for share in (0.01, 0.3, 0.5, 0.81, 0.999):
            output.write_bytes(whole[: int(len(whole) * share)])
            assert generate(source, *argv)[0] == 0
            assert output.read_bytes() == whole

    def test_ctrl_c_keeps_whole_batches(
        self, generate, write_questions, questions, monkeypatch, capsys
    ):
        source = write_questions(questions)
        _, expected = generate(source, output="whole.jsonl")
        load = mmlm.load
        calls = []

        def interrupted(*args, **kwargs):
            model, processor = load(*args, **kwargs)
            original = model.generate

            def generate(**inputs):
                calls.append(1)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return original(**inputs)

            model.generate = generate
            return model, processor

        monkeypatch.setattr(mmlm, "load", interrupted)
        code, output = generate(source)
        assert code == 130
        assert len(stored(output)) == 4
        assert "Traceback" not in capsys.readouterr().err
        monkeypatch.setattr(mmlm, "load", load)
        assert generate(source)[0] == 0
        assert output.read_bytes() == expected.read_bytes()

    def test_greedy_runs_may_go_on_with_other_batches(self, generate, write_questions, questions):
        source = write_questions(questions)
        _, output = generate(source)
        whole = output.read_bytes()
        output.write_bytes(whole[: len(whole) // 2])
        assert generate(source, "--generate.batch_size", "1")[0] == 0
        assert output.read_bytes() == whole

    def test_nothing_left_to_do_loads_no_model(
        self, generate, write_questions, questions, monkeypatch
    ):
        source = write_questions(questions[:2])
        generate(source)
        monkeypatch.setattr(mmlm, "load", lambda *_, **__: pytest.fail("model loaded"))
        assert generate(source)[0] == 0
