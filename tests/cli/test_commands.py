"""The small commands: methods, doctor, data world, train."""

import json
import re

import pytest
import torch
from tiny import FAMILIES, build, shared

import mmlm
from mmlm.cli import main
from mmlm.cli.doctor import examine
from mmlm.cli.methods import describe
from mmlm.errors import IncompatibleMethods, UnsupportedModel


class TestMethods:
    def test_table_names_every_method(self, capsys):
        assert main(["methods"]) == 0
        shown = capsys.readouterr().out
        for name in mmlm.method_names():
            assert name in shown
        assert "arXiv 2412.13949" in shown

    def test_json_is_complete(self, capsys):
        assert main(["methods", "--json"]) == 0
        described = json.loads(capsys.readouterr().out)
        assert [one["name"] for one in described] == mmlm.method_names()
        for one in described:
            assert one["summary"]
            assert one["sites"]
            assert one["cost"]
            assert one["paper"]["arxiv"]
            assert all(parameter["meaning"] for parameter in one["parameters"])

    def test_one_method_in_full(self, capsys):
        assert main(["methods", "VHR"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("Amplifies the attention heads")
        assert "Equations:" in shown

    def test_values_come_from_the_class(self):
        described = describe(mmlm.VHR)
        assert described["sites"] == ["heads"]
        alpha = described["parameters"][0]
        assert (alpha["name"], alpha["default"]) == ("alpha", 2.0)
        assert alpha["meaning"].startswith("Gain of the chosen heads")


class TestDoctor:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_families(self, family):
        report = examine(*shared(family))
        assert report["family_known"]
        assert (report["layers"], report["heads"], report["key_value_heads"]) == (4, 8, 2)
        assert report["chat_template"]
        assert set(report["methods"]) == set(mmlm.method_names())
        assert report["methods"]["VHR"] == report["methods"]["VCD"] == []
        assert all(part["class"] for part in report["parts"].values())
        assert report["parts"]["tower blocks"]["count"] == 3

    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_it_refuses_attach_refuses_with_the_same_words(self, family):
        model, processor = shared(family)
        for name, reasons in examine(model, processor)["methods"].items():
            method = getattr(mmlm, name)()
            if reasons:
                refusals = (UnsupportedModel, IncompatibleMethods, ValueError)
                with pytest.raises(refusals, match=re.escape("; ".join(reasons))):
                    mmlm.attach(model, method, processor=processor).__enter__()
            else:
                with mmlm.attach(model, method, processor=processor):
                    pass

    def test_an_unknown_model_type(self):
        model, processor = build("llava")
        model.config.model_type = "brand_new_vl"
        del model.model.vision_tower
        report = examine(model, processor)
        assert not report["family_known"]
        assert report["parts"]["vision tower"]["class"] is None
        assert "LlavaModel (brand_new_vl)" in report["parts"]["vision tower"]["missing"]
        assert (
            "no vision tower: tried vision_tower, visual"
            in (report["parts"]["vision tower"]["missing"])
        )
        assert "brand_new_vl" in report["methods"]["VCD"][0]
        assert report["methods"]["VHR"] == []

    def test_no_chat_template(self):
        model, processor = build("llava")
        processor.chat_template = None
        report = examine(model, processor)
        assert not report["chat_template"]
        assert "no chat template" in report["methods"]["ICD"][0]
        assert report["methods"]["VCD"] == []

    def test_from_a_folder_without_its_weights(self, tiny_folder, tmp_path, capsys):
        for path in tiny_folder.iterdir():
            if path.suffix != ".safetensors":
                (tmp_path / path.name).write_bytes(path.read_bytes())
        assert main(["doctor", str(tmp_path), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["class"] == "LlavaForConditionalGeneration"
        n_numbers = sum(p.numel() for p in shared("llava")[0].parameters())
        assert report["parameters"] == n_numbers
        assert main(["doctor", str(tmp_path), "--load"]) == 2
        assert "cannot be read" in capsys.readouterr().err

    def test_tables(self, tiny_folder, capsys):
        assert main(["doctor", str(tiny_folder), "--load"]) == 0
        shown = capsys.readouterr().out
        assert "4 layers of 8 heads, 2 for keys and values" in shown
        assert "complete" in shown

    def test_reasons_are_shown(self, tiny_folder, monkeypatch, capsys):
        monkeypatch.setattr(mmlm.Anatomy, "supports", lambda self, method: ["it has no such part"])
        assert main(["doctor", str(tiny_folder)]) == 0
        shown = capsys.readouterr().out
        assert "it has no such part" in shown
        assert "yes" not in shown.partition("why not")[2]

    def test_incomplete_weights(self, tmp_path, capsys):
        from safetensors.torch import load_file, save_file

        model, processor = build("llava")
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        name = next(name for name in tensors if "lm_head" in name)
        del tensors[name]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert main(["doctor", str(tmp_path), "--load"]) == 2
        shown = capsys.readouterr().err
        assert "1 missing" in shown
        assert "lm_head.weight" in shown

    def test_no_model(self, capsys):
        assert main(["doctor", "no-such-model"]) == 2
        assert main(["doctor", "embeded"]) == 2
        assert "Did you mean 'embedded'?" in capsys.readouterr().err


class TestDataWorld:
    def test_writes_a_split(self, tmp_path, capsys):
        folder = tmp_path / "world"
        argv = ["data", "world", "--count", "3", "--seed", "7", "--output", str(folder), "--json"]
        assert main(argv) == 0
        summary = json.loads(capsys.readouterr().out)
        assert (summary["pictures"], summary["output"]) == (3, str(folder))
        assert len(list((folder / "images").iterdir())) == 3
        for name in ("instances.json", "captions.json", "conversations.jsonl"):
            assert (folder / name).stat().st_size > 0

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--count", "0"], "0 pictures"),
            (["--split", "nature"], "nature"),
            (["--seed", "-1"], "seed"),
        ],
    )
    def test_refusals(self, tmp_path, capsys, argv, words):
        folder = tmp_path / "world"
        assert main(["data", "world", "--output", str(folder), *argv]) == 2
        shown = capsys.readouterr().err
        assert words in shown
        assert "advice: " in shown
        assert not folder.exists()

    def test_a_folder_with_something_else(self, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("irreplaceable")
        assert main(["data", "world", "--output", str(tmp_path), "--count", "2"]) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_train_hands_its_arguments_over(monkeypatch):
    import training.__main__

    given = []
    monkeypatch.setattr(training.__main__, "main", lambda argv: given.append(argv) or 0)
    assert main(["train", "--config", "train/world/seed0", "--seed", "4"]) == 0
    [[config, *rest]] = given
    assert config.startswith("--config=")
    assert config.endswith("seed0.yaml")
    assert rest == ["--seed", "4"]
    assert main(["train", "--config", "train/wrld/seed0"]) == 2


def test_device_is_chosen_if_there_is_one(monkeypatch):
    from mmlm.cli.options import _device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _device("auto") == "cpu"
    assert _device("cuda:1") == "cuda:1"
