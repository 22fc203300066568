"""Exports: what others load is what was trained, nothing is lost silently, folders are whole."""

import json
import os
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from saving_process import lora
from tiny import build, inputs, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

import mmlm
from mmlm.engine.build_in import built_in
from mmlm.errors import InputError, MissingTensors
from mmlm.model.checkpoint import load
from training import export as module
from training.export import check_complete, export
from training.model_card import ModelCard, data_hashes, git_revision

PATTERN = r".*(language_model|text_model).*\.(q_proj|v_proj|down_proj)"


def adapted(family="llava", **options):
    """A tiny model with an adapter that does something, and its processor."""
    model, processor = build(family)
    settings = {"r": 4, "target_modules": PATTERN, **options}
    wrapped = get_peft_model(model, LoraConfig(**settings))
    shake(wrapped)
    return wrapped.eval(), processor


def shake(model):
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def logits(model, processor):
    with torch.no_grad():
        return model(**inputs(processor, ["what is shown here ?"], [[picture(0)]])).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
class TestFamilies:
    def test_merged_is_what_plain_transformers_reads(self, family, tmp_path):
        model, processor = adapted(family)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        export(model, processor, tmp_path / "merged", "merged")
        loaded, info = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "merged", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        own = AutoProcessor.from_pretrained(tmp_path / "merged")
        assert torch.allclose(
            logits(loaded.eval(), own), logits(model, processor), atol=1e-4, rtol=1e-4
        )
        with model.disable_adapter():
            assert not torch.allclose(logits(loaded, own), logits(model, processor), atol=1e-2)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_the_adapter_alone(self, family, tmp_path):
        model, processor = adapted(family)
        export(model, processor, tmp_path / "adapter", "adapter")
        loaded = PeftModel.from_pretrained(build(family)[0], tmp_path / "adapter").eval()
        assert torch.equal(logits(loaded, processor), logits(model, processor))

    def test_a_whole_model(self, family, tmp_path):
        model, processor = build(family)
        shake(model)
        export(model, processor, tmp_path / "model", "model")
        loaded, own = load(tmp_path / "model")
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
        assert torch.equal(logits(loaded, own), logits(model, processor))


class TestAdapters:
    def test_modules_that_learn_as_a_whole(self, tmp_path):
        model, processor = adapted(modules_to_save=["model.multi_modal_projector"])
        for what in ("merged", "adapter"):
            export(model, processor, tmp_path / what, what)
        merged, _ = load(tmp_path / "merged")
        alone = PeftModel.from_pretrained(build("llava")[0], tmp_path / "adapter").eval()
        assert torch.allclose(logits(merged, processor), logits(model, processor), atol=1e-4)
        assert torch.equal(logits(alone, processor), logits(model, processor))
        projector = "model.multi_modal_projector.linear_1.weight"
        assert not torch.equal(merged.state_dict()[projector], build("llava")[0].state_dict()[projector])  # fmt: skip  # noqa: E501

    def test_dora(self, tmp_path):
        model, processor = adapted(use_dora=True)
        export(model, processor, tmp_path / "merged", "merged")
        merged, _ = load(tmp_path / "merged")
        assert torch.allclose(logits(merged, processor), logits(model, processor), atol=1e-4)

    def test_trls_reference_adapter_stays_behind(self, tmp_path):
        model, processor = adapted()
        model.add_adapter("ref", LoraConfig(r=4, target_modules=PATTERN))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".ref." in name:
                    parameter.fill_(9.0)
        export(model, processor, tmp_path / "merged", "merged")
        export(model, processor, tmp_path / "adapter", "adapter")
        merged, _ = load(tmp_path / "merged")
        assert torch.allclose(logits(merged, processor), logits(model, processor), atol=1e-4)
        assert not (tmp_path / "adapter" / "ref").exists()

    def test_an_adapter_of_another_name(self, tmp_path):
        model, processor = build("llava")
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=PATTERN), adapter_name="mine"
        ).eval()
        shake(model)
        for what in ("adapter", "merged"):
            export(model, processor, tmp_path / what, what, adapter="mine")
        loaded = PeftModel.from_pretrained(build("llava")[0], tmp_path / "adapter").eval()
        assert torch.equal(logits(loaded, processor), logits(model, processor))
        merged, _ = load(tmp_path / "merged")
        assert torch.allclose(logits(merged, processor), logits(model, processor), atol=1e-4)

    def test_bfloat16(self, tmp_path):
        model, processor = build("llava")
        model = get_peft_model(model.bfloat16(), lora(0.0)).eval()
        shake(model)
        export(model, processor, tmp_path / "merged", "merged")
        merged, _ = load(tmp_path / "merged", dtype="auto")
        assert {tensor.dtype for tensor in merged.state_dict().values()} == {torch.bfloat16}
        copy = model.merge_and_unload(safe_merge=True)
        for name, tensor in copy.state_dict().items():
            assert torch.equal(merged.state_dict()[name], tensor)


class TestMethods:
    def built(self):
        model, processor = build("llava")
        mmlm.build_in(model, mmlm.VHR(alpha=1.5), processor=processor)
        return model, processor

    @pytest.mark.parametrize("what", ["model", "merged"])
    def test_built_in_methods_are_kept(self, tmp_path, what):
        model, processor = self.built()
        if what == "merged":
            model = get_peft_model(model, lora(0.0)).eval()
            shake(model)
        export(model, processor, tmp_path / what, what)
        loaded, _ = load(tmp_path / what)
        assert list(built_in(loaded)) == [mmlm.VHR(alpha=1.5)]
        if what == "merged":
            model = model.merge_and_unload(safe_merge=True)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
        check_complete(tmp_path / what)

    def test_beside_an_adapter_too(self, tmp_path):
        model, processor = self.built()
        export(get_peft_model(model, lora(0.0)), processor, tmp_path / "a", "adapter")
        assert "VHR(alpha=1.5" in (tmp_path / "a" / "methods.yaml").read_text()


class TestWhole:
    def test_weights_that_would_not_be_read_are_an_error(self, tmp_path, monkeypatch):
        """The trap: the library would draw them at random and only log it."""
        model, processor = build("llava")
        plain = module.gathered_state

        def lossy(model, *rest):
            state = plain(model, *rest)
            del state["lm_head.weight"]
            state["something.else"] = torch.zeros(2)
            return state

        monkeypatch.setattr(module, "gathered_state", lossy)
        with pytest.raises(MissingTensors, match=r"missing lm_head\.weight; unexpected something"):
            export(model, processor, tmp_path / "model", "model")
        assert not (tmp_path / "model").exists()

    def test_tensors_of_an_adapter_that_are_not_written(self, tmp_path, monkeypatch):
        model, processor = adapted()
        plain = PeftModel.save_pretrained

        def lossy(self, folder, state_dict, **more):
            few = dict(list(state_dict.items())[:2])
            plain(self, folder, state_dict=few, **more)

        monkeypatch.setattr(PeftModel, "save_pretrained", lossy)
        with pytest.raises(MissingTensors, match="24 tensors, 2 were written"):
            export(model, processor, tmp_path / "adapter", "adapter")
        assert not (tmp_path / "adapter").exists()

    def test_a_folder_is_replaced_in_one_step(self, tmp_path, monkeypatch):
        model, processor = build("llava")
        folder = tmp_path / "model"
        export(model, processor, folder, "model")
        (folder / "left_over").write_text("x")
        with pytest.raises(InputError, match="exists already"):
            export(model, processor, folder, "model")

        def fails(*args, **more):
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(module, "save", fails)
            with pytest.raises(OSError, match="disk full"):
                export(model, processor, folder, "model", replace=True)
        assert (folder / "left_over").exists()
        load(folder)
        export(model, processor, folder, "model", replace=True)
        assert not (folder / "left_over").exists()
        assert os.listdir(tmp_path) == ["model"]


class TestRefused:
    @pytest.mark.parametrize("what", ["adapter", "merged"])
    def test_without_adapter(self, tmp_path, what):
        model, processor = build("llava")
        with pytest.raises(InputError, match="has no adapter"):
            export(model, processor, tmp_path / "x", what)

    def test_with_adapter(self, tmp_path):
        with pytest.raises(InputError, match="has an adapter"):
            export(*adapted(), tmp_path / "x", "model")

    def test_an_unknown_adapter(self, tmp_path):
        with pytest.raises(InputError, match="no adapter 'other'; there are default"):
            export(*adapted(), tmp_path / "x", "merged", adapter="other")

    def test_trained_weights_outside_the_adapter_would_be_lost(self, tmp_path):
        model, processor = adapted()
        model.get_base_model().model.multi_modal_projector.requires_grad_(True)
        with pytest.raises(InputError, match="4 trained parameters are no part of the adapter"):
            export(model, processor, tmp_path / "x", "adapter")
        export(model, processor, tmp_path / "x", "merged")

    def test_a_quantised_base(self, tmp_path):
        model, processor = adapted()
        model.get_base_model().config.quantization_config = {"quant_method": "bitsandbytes"}
        with pytest.raises(InputError, match="quantised"):
            export(model, processor, tmp_path / "x", "merged")


class TestCard:
    def test_what_is_on_it(self, tmp_path):
        (tmp_path / "pairs.jsonl").write_text("{}\n")
        card = ModelCard(
            base_model="llava-hf/llava-1.5-7b-hf",
            configuration={"recipe": {"beta": 0.1}},
            data=data_hashes([tmp_path / "pairs.jsonl"]),
            numbers={"loss": 0.31},
            revision="abc",
            command="--config x.yaml",
        )
        export(*adapted(), tmp_path / "mine", "adapter", card)
        text = (tmp_path / "mine" / "README.md").read_text()
        header = text.split("---\n")[1]
        assert "base_model: llava-hf/llava-1.5-7b-hf\nlibrary_name: peft\n" in header
        for part in ("# mine", '"beta": 0.1', "pairs.jsonl` (sha256:ca3d163b", "| loss | 0.31 |",
                     "`abc`", "`--config x.yaml`"):  # fmt: skip
            assert part in text

    def test_a_folder_is_no_base_for_the_hub(self, tmp_path):
        text = ModelCard(base_model=str(tmp_path)).text("x", "merged")
        assert "base_model:" not in text
        assert str(tmp_path) in text
        assert "library_name: transformers" in text

    @pytest.mark.skipif(not shutil.which("git"), reason="needs git")
    def test_revision(self):
        revision = git_revision()
        assert len(revision.removesuffix("-dirty")) in (0, 40)


def test_the_processor_is_written_for_plain_transformers(tmp_path):
    model, processor = adapted()
    export(model, processor, tmp_path / "merged", "merged")
    loaded = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert loaded.chat_template == processor.chat_template
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == 3
