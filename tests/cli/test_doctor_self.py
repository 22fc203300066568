"""`mmlm doctor --self`: true of this installation, and it notices what is wrong with another."""

import json
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from safetensors import safe_open

import mmlm
from mmlm.cli import doctor_self, doctor_views, main

ROOT = Path(mmlm.__file__).parents[1]


@pytest.fixture
def report(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return doctor_self.installation()


def test_this_installation(report):
    assert report["problems"] == []
    assert report["mmlm"]["version"] == mmlm.__version__
    assert report["packages"]["torch"] == {
        "installed": torch.__version__,
        "wanted": report["packages"]["torch"]["wanted"],
        "ok": True,
    }
    assert report["devices"]["threads"] == torch.get_num_threads()
    assert len(report["devices"]["gpus"]) == torch.cuda.device_count()
    with safe_open(ROOT / "mmlm/assets/model.safetensors", "numpy") as tensors:
        count = len(tensors.keys())
    assert report["assets"]["embedded model"] == {"state": f"{count} tensors", "error": None}
    assert report["folders"]["chat history"]["free_gib"] > 0
    assert json.loads(json.dumps(report)) == report


def test_every_extra_is_explained():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert declared["optional-dependencies"].keys() == doctor_self.EXTRAS.keys()


class TestMetadata:
    """A wheel has no pyproject.toml: the requirements come from its metadata."""

    @pytest.fixture
    def installed(self, monkeypatch, tmp_path):
        monkeypatch.setattr(doctor_self, "_root", lambda: tmp_path)
        lines = [
            "numpy>=2",
            "torch>=99",
            "no-such-package",
            "colorama>=1; sys_platform == 'win32'",
            "no-such-plugin>=3; extra == 'web'",
            "rich>=13; extra == 'serve'",
        ]
        monkeypatch.setattr(metadata, "requires", lambda name: lines)
        return doctor_self.installation()

    def test_missing_and_old_packages_are_told(self, installed):
        assert installed["packages"].keys() == {"numpy", "torch", "no-such-package"}
        first, second = installed["problems"]
        assert first == {
            "problem": f"torch is {torch.__version__}; mmlm needs >=99.",
            "advice": 'pip install "mmlm"',
        }
        assert second["problem"] == "no-such-package is not installed; mmlm needs it."

    def test_missing_extras_have_a_pip_line_and_are_no_problem(self, installed):
        web, serve = installed["extras"]["web"], installed["extras"]["serve"]
        assert (web["missing"], web["install"]) == (["no-such-plugin"], 'pip install "mmlm[web]"')
        assert (serve["missing"], serve["install"]) == ([], None)


def test_a_checkout_is_installed_as_one():
    assert doctor_self._pip("web") == f'pip install -e "{ROOT}[web]"'


def test_broken_assets_are_told(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "mmlm/assets", tmp_path / "mmlm/assets")
    weights = tmp_path / "mmlm/assets/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setattr(mmlm, "__file__", str(tmp_path / "mmlm/__init__.py"))
    monkeypatch.setattr("mmlm.cli.configs.shipped_configs", list)
    [configurations, model] = sorted(
        doctor_self._problems(
            {"packages": {}, "devices": {}, "folders": {}, "assets": doctor_self._assets()}
        ),
        key=lambda one: "embedded" in one["problem"],
    )
    assert "embedded model" in model["problem"]
    assert "no file in the folder `configs`" in configurations["problem"]
    assert model["advice"].startswith("Install mmlm again: pip install")


def test_gpus(monkeypatch):
    card = SimpleNamespace(name="Card 80", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    devices = doctor_self._devices()
    assert devices["gpus"] == [{"name": "Card 80", "memory_gib": 80.0}] * 2
    rows = doctor_views._device_rows(devices)
    assert rows["GPUs"] == "Card 80, 80.0 GiB\nCard 80, 80.0 GiB"
    assert rows["with"].startswith("bfloat16")


def test_a_torch_that_does_not_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch raises ImportError
    devices = doctor_self._devices()
    assert "ModuleNotFoundError" in devices["error"]
    report = {"packages": {}, "assets": {}, "folders": {}, "devices": devices}
    [problem] = doctor_self._problems(report)
    assert problem["problem"].startswith("torch does not start")
    assert "[red]" in doctor_views._device_rows(devices)["torch"]


class TestHub:
    @pytest.fixture(autouse=True)
    def _online(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def test_no_network(self, monkeypatch):
        def refuse(*_, **__):
            raise httpx.ConnectError("no route")

        monkeypatch.setattr(httpx, "head", refuse)
        assert doctor_self._hub()["why"] == "no route"

    def test_a_network(self, monkeypatch):
        monkeypatch.setattr(httpx, "head", lambda *_, **__: httpx.Response(200))
        assert doctor_self._hub()["reachable"] is True

    def test_asked_to_be_offline(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert doctor_self._hub()["why"] == "HF_HUB_OFFLINE is set"


def test_folders_say_what_is_there(monkeypatch, tmp_path):
    hub = tmp_path / "hub"
    (hub / "models--llava-hf--llava-1.5-7b-hf").mkdir(parents=True)
    (tmp_path / "data" / "coco" / "val2014").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("MMLM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != hub)
    folders = doctor_self._folders()
    assert folders["models"]["holds"] == ["llava-hf/llava-1.5-7b-hf"]
    assert "coco-val2014" in folders["official files"]["holds"]
    [problem] = doctor_self._problems(
        {"packages": {}, "devices": {}, "assets": {}, "folders": folders}
    )
    assert str(hub) in problem["problem"]


class TestCommand:
    def test_for_people(self, capsys, monkeypatch):
        monkeypatch.setenv("HF_HOME", "/a/[bold]/home")
        assert main(["doctor", "--self"]) == 0
        shown = capsys.readouterr().out
        assert "Everything that mmlm needs is here." in shown
        assert "HF_HOME=/a/[bold]/home" in shown  # nothing is taken for markup
        for name in doctor_self.EXTRAS:
            assert f" {name} " in shown

    def test_for_programs(self, capsys, monkeypatch):
        problem = {"problem": "torch is gone.", "advice": "Bring it back."}
        monkeypatch.setattr(doctor_self, "_problems", lambda report: iter([problem]))
        assert main(["doctor", "--self", "--json"]) == 3
        shown = capsys.readouterr()
        assert json.loads(shown.out)["problems"] == [problem]
        assert shown.err == "error: torch is gone.\nadvice: Bring it back.\n"

    @pytest.mark.parametrize("more", [["x/y"], ["--load"]])
    def test_a_model_is_another_question(self, capsys, more):
        assert main(["doctor", "--self", *more]) == 2
        assert "--self examines the installation" in capsys.readouterr().err
