"""The reference cache: same numbers as on the fly, and only for the content they belong to."""

import copy
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import trl_toy
from peft import LoraConfig, get_peft_model
from saving_process import lora
from tiny import build, picture

import mmlm
from mmlm.errors import ImageReadError, InputError
from training.preference import precompute
from training.preference.content import (
    processor_facts,
    row_contents,
    tokens_hash,
    weights_hash,
)
from training.preference.precompute import precompute_ref, reference_key, use_reference_cache
from training.preference.reference_cache import (
    CachedReference,
    CacheSettingsError,
    ReferenceCache,
    ReferenceCacheMismatch,
    refuse_trl_cache,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def data(tmp_path):
    return trl_toy.rows(tmp_path)


def toy(data, tmp_path, **options):
    options = {"lora": lora(), **options}
    return trl_toy.trainer(data, tmp_path / "run", **options)


def trained_losses(trainer):
    trainer.train()
    return trl_toy.losses(trainer)


class TestEqual:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"ld_alpha": 0.3},
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
            {"bf16": True},
            {"family": "llava_next"},
        ],
        ids=str,
    )
    def test_acceptance_5_losses_are_those_of_the_reference_on_the_fly(
        self, data, tmp_path, options
    ):
        plain = trained_losses(toy(data, tmp_path, **options))
        cached = toy(data, tmp_path, **options)
        calls = []
        cache = precompute_ref(cached, tmp_path / "cache")
        use_reference_cache(cached, cache)
        cached.compute_ref_log_probs = lambda *args: calls.append(args)
        assert torch.equal(trained_losses(cached), plain)
        assert len(plain) == 3
        assert not calls

    def test_acceptance_5_a_reference_model_is_let_go(self, data, tmp_path):
        options = {"lora": None}
        plain = trained_losses(toy(data, tmp_path, ref_model=build("llava")[0], **options))
        cached = toy(data, tmp_path, ref_model=build("llava")[0], **options)
        use_reference_cache(cached, precompute_ref(cached, tmp_path / "cache"))
        assert cached.ref_model is None
        assert torch.equal(trained_losses(cached), plain)

    def test_an_adapter_that_is_trained_further_is_its_own_reference(self, data, tmp_path):
        def made():
            model, _ = build("llava")
            torch.manual_seed(1)
            wrapped = get_peft_model(model, lora())
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
            return trl_toy.trainer(data, tmp_path / "run", model=wrapped)

        plain = trained_losses(made())
        cached = made()
        cache = precompute_ref(cached, tmp_path / "cache")
        fresh = precompute_ref(toy(data, tmp_path), tmp_path / "other")
        ours, bare = ([r["chosen"] for r in c.records.values()] for c in (cache, fresh))
        assert ours != bare
        use_reference_cache(cached, cache)
        assert torch.equal(trained_losses(cached), plain)

    def test_rows_to_evaluate_on_are_stored_too(self, data, tmp_path):
        made = toy(data[:4], tmp_path, eval_dataset=data[4:])
        expected = made.evaluate()["eval_loss"]
        cache = precompute_ref(made, tmp_path / "cache")
        assert len(cache) == 6
        use_reference_cache(made, cache)
        assert made.evaluate()["eval_loss"] == expected

    def test_shuffled_batches_get_their_own_values(self, data, tmp_path):
        cached = toy(data, tmp_path)
        cache = precompute_ref(cached, tmp_path / "cache")
        collate = CachedReference(cached.data_collator, cache)
        batch = collate([data[4], data[1]])
        values = {record["id"]: record for record in cache.records.values()}
        assert batch["ref_chosen_logps"].tolist() == [values[n]["chosen"] for n in ("r4", "r1")]
        assert batch["ref_rejected_logps"].tolist() == [values[n]["rejected"] for n in ("r4", "r1")]
        assert batch["ref_chosen_logps"].dtype == torch.float32

    def test_the_model_is_left_in_its_mode(self, data, tmp_path):
        made = toy(data, tmp_path)
        made.model.train()
        precompute_ref(made, tmp_path / "cache")
        assert made.model.training


class TestContent:
    def test_acceptance_5_one_byte_of_a_picture_invalidates_its_row(self, data, tmp_path):
        made = toy(data, tmp_path)
        cache = precompute_ref(made, tmp_path / "cache")
        key = reference_key(made)
        file = Path(data[2]["images"][0])
        content = bytearray(file.read_bytes())
        content[-1] ^= 1  # the last byte of the end marker: the same pixels
        file.write_bytes(content)
        with pytest.raises(ReferenceCacheMismatch, match="the images of row 'r2' changed") as e:
            ReferenceCache.open(tmp_path / "cache", key).check(data, row_contents(data))
        assert isinstance(e.value, RuntimeError)
        before = dict(cache.records)
        after = precompute_ref(made, tmp_path / "cache")  # computes that row, and only it
        assert len(after) == len(before) + 1
        assert after.records.keys() > before.keys()

    @pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
    def test_another_text(self, data, tmp_path, field):
        cache = precompute_ref(toy(data, tmp_path), tmp_path / "cache")
        data[3][field] = [{"role": "user", "content": "another"}]
        with pytest.raises(ReferenceCacheMismatch, match="the text of row 'r3' changed"):
            cache.check(data, row_contents(data))

    def test_other_tokens_of_the_same_row(self, data, tmp_path):
        made = toy(data, tmp_path)
        cache = precompute_ref(made, tmp_path / "cache")
        batch = made.data_collator(data[:2])
        batch["completion_mask"][1, batch["completion_mask"][1].argmax()] = 0
        with pytest.raises(ReferenceCacheMismatch, match="the tokens of row 'r1' changed"):
            cache.values(["r0", "r1"], batch)

    def test_a_row_that_is_not_stored(self, data, tmp_path):
        made = toy(data, tmp_path)
        cache = precompute_ref(made, tmp_path / "cache", rows=data[:4])
        with pytest.raises(ReferenceCacheMismatch, match="no reference values of row 'r4'"):
            cache.values(["r4"], made.data_collator(data[4:5]))

    def test_padding_is_no_content(self, data, tmp_path):
        collate = toy(data, tmp_path).data_collator
        alone, together = collate([data[5]]), collate([data[0], data[5]])
        assert alone["input_ids"].shape[1] != together["input_ids"].shape[1]
        assert tokens_hash(alone, 0) == tokens_hash(together, 1)
        assert tokens_hash(together, 0) != tokens_hash(together, 1)

    @pytest.mark.parametrize("side", [0, 1])
    def test_both_sides_are_content(self, data, tmp_path, side):
        batch = toy(data, tmp_path).data_collator(data[:2])
        before = tokens_hash(batch, 1)
        batch["input_ids"][1 + 2 * side, 0] += 1
        assert tokens_hash(batch, 1) != before

    def test_pictures_in_memory(self):
        row = {"id": "a", "images": [picture(0)], "prompt": "p"}
        same = {**row, "images": [picture(0)]}
        other = {**row, "images": [picture(1)]}
        stored = {**row, "image": {"bytes": b"123", "path": None}}
        one, two, three, four = row_contents([row, same, other, stored])
        assert one == two
        assert one["images"] != three["images"]
        assert one["text"] == three["text"] == four["text"]

    def test_order_and_number_of_pictures(self):
        def images(*seeds):
            return row_contents([{"id": "a", "images": [picture(s) for s in seeds]}])[0]["images"]

        assert len({images(0), images(1), images(0, 1), images(1, 0), images()}) == 5

    def test_rows_as_objects(self, tmp_path):
        @dataclass(frozen=True)
        class Row:
            id: str
            images: tuple
            chosen: str
            meta: dict

        picture(0).save(tmp_path / "0.png")
        row = Row("a", (str(tmp_path / "0.png"),), "x", {"score": 1})
        same = {"id": "b", "images": [str(tmp_path / "0.png")], "chosen": "x", "meta": {}}
        assert row_contents([row]) == row_contents([same])

    def test_a_picture_that_is_missing(self):
        with pytest.raises(ImageReadError, match=r"nowhere\.png"):
            row_contents([{"id": "a", "images": ["nowhere.png"]}])

    def test_a_row_without_id(self, data, tmp_path):
        made = toy([{k: v for k, v in row.items() if k != "id"} for row in data], tmp_path)
        with pytest.raises(InputError, match="a row has no id"):
            precompute_ref(made, tmp_path / "cache")


class TestKey:
    def test_every_part_is_named_when_it_differs(self, data, tmp_path):
        made = toy(data, tmp_path)
        precompute_ref(made, tmp_path / "cache")
        key = reference_key(made)
        for change, field in (
            (lambda k: k.update(weights="0"), "weights was"),
            (lambda k: k.update(dtype="torch.bfloat16"), r"dtype was torch\.float32"),
            (lambda k: k.update(ld_alpha=0.5), "ld_alpha was None, now 0.5"),
            (lambda k: k["image_processor"]["size"].update(shortest_edge=28),
             r"image_processor\.size\.shortest_edge was 56, now 28"),
            (lambda k: k.update(chat_template="0"), "chat_template was"),
            (lambda k: k["processor"].update(patch_size=28), r"processor\.patch_size"),
        ):  # fmt: skip
            changed = copy.deepcopy(key)
            change(changed)
            with pytest.raises(ReferenceCacheMismatch, match=field):
                ReferenceCache.open(tmp_path / "cache", changed)
        key["information"] = {"transformers": "6"}
        assert len(ReferenceCache.open(tmp_path / "cache", key)) == 6

    def test_what_the_trainer_changes_is_in_the_key(self, data, tmp_path):
        made = toy(data, tmp_path)
        key = reference_key(made)
        made.ld_alpha = 0.2
        assert reference_key(made)["ld_alpha"] == 0.2
        made.ld_alpha = None
        with torch.no_grad():
            made.model.get_base_model().lm_head.weight[0, 0] += 1e-3
        assert reference_key(made)["weights"] != key["weights"]
        made.processing_class.image_processor.size = {"shortest_edge": 70}
        assert reference_key(made)["image_processor"] != key["image_processor"]
        made.processing_class.chat_template += " "
        assert reference_key(made)["chat_template"] != key["chat_template"]
        made.processing_class.tokenizer.add_tokens(["new"])
        assert reference_key(made)["tokenizer"] != key["tokenizer"]

    def test_a_method_that_is_built_in(self, data, tmp_path):

        model, processor = build("llava")
        plain = trl_toy.trainer(data, tmp_path / "run", model=model, lora=lora())
        assert reference_key(plain)["methods"] == []
        with_method = build("llava")[0]
        mmlm.build_in(with_method, mmlm.VHR(alpha=1.5), processor=processor)
        made = trl_toy.trainer(data, tmp_path / "run", model=with_method, lora=lora())
        assert "alpha=1.5" in reference_key(made)["methods"][0]

    def test_another_model_is_refused_by_precompute(self, data, tmp_path):
        precompute_ref(toy(data, tmp_path), tmp_path / "cache")
        made = toy(data, tmp_path)
        with torch.no_grad():
            made.model.get_base_model().lm_head.weight.mul_(1.5)
        with pytest.raises(ReferenceCacheMismatch, match="weights was"):
            precompute_ref(made, tmp_path / "cache")


class TestWeights:
    def wrapped(self, **options):
        return get_peft_model(build("llava")[0], LoraConfig(**options))

    def test_the_adapter_is_no_part_of_the_reference(self):
        bare = weights_hash(build("llava")[0])
        pattern = r".*language_model.*\.(q_proj|v_proj)"
        assert weights_hash(self.wrapped(r=4, target_modules=pattern)) == bare
        assert weights_hash(self.wrapped(r=8, target_modules=["down_proj"], use_dora=True)) == bare
        whole = self.wrapped(
            r=8, target_modules=pattern, modules_to_save=["model.multi_modal_projector"]
        )
        with torch.no_grad():
            for parameter in whole.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        assert weights_hash(whole) == bare

    def test_unless_it_is_asked_for(self):
        model = self.wrapped(r=4, target_modules=["q_proj"])
        assert weights_hash(model, "default") != weights_hash(model)

    def test_every_tensor_counts(self):
        model = build("llava")[0]
        hashes = {weights_hash(model)}
        for parameter in list(model.parameters())[::9]:
            with torch.no_grad():
                parameter.view(-1)[-1] += 1
            hashes.add(weights_hash(model))
        assert len(hashes) == len(list(model.parameters())[::9]) + 1

    def test_precision_counts(self):
        assert weights_hash(build("llava")[0].bfloat16()) != weights_hash(build("llava")[0])

    def test_what_was_tokenised_last_does_not(self):
        _, processor = build("llava")
        before = processor_facts(processor)
        processor.tokenizer(["a", "a cat"], padding=True, truncation=True, max_length=3)
        assert processor_facts(processor) == before


class TestRefused:
    def test_trls_own_cache_points_here(self, data, tmp_path):
        made = toy(data, tmp_path)
        made.args.precompute_ref_log_probs = True
        with pytest.raises(ValueError, match="precompute_ref_log_probs=True") as caught:
            refuse_trl_cache(made.args)
        assert "precompute_ref" in caught.value.advice

    def test_a_reference_that_moves(self, data, tmp_path):
        made = toy(data, tmp_path)
        made.args.sync_ref_model = True
        with pytest.raises(CacheSettingsError, match="sync_ref_model=True changes the reference"):
            precompute_ref(made, tmp_path / "cache")

    def test_dropout(self, data, tmp_path):
        made = toy(data, tmp_path, disable_dropout=False)
        with pytest.raises(CacheSettingsError, match="dropout is on in 8 places"):
            precompute_ref(made, tmp_path / "cache")

    def test_dropout_of_attention_which_trl_does_not_switch_off(self, data, tmp_path):
        made = toy(data, tmp_path)
        made.model.get_base_model().model.language_model.layers[1].self_attn.attention_dropout = 0.1
        with pytest.raises(CacheSettingsError, match=r"layers\.1\.self_attn"):
            use_reference_cache(made, ReferenceCache(tmp_path, {}))

    def test_losses_that_need_every_token(self, data, tmp_path):
        class Needy:
            needs_reference_tokens = True

        class Modest:
            needs_reference_tokens = False

        made = toy(data, tmp_path)
        precompute_ref(made, tmp_path / "cache", extra_losses=[Modest()])
        with pytest.raises(CacheSettingsError, match="Needy needs the reference's"):
            precompute_ref(made, tmp_path / "cache", extra_losses=[Modest(), Needy()])


class Dropping(trl_toy.PathCollator):
    """Leaves rows out, and says which are in the batch if asked to."""

    def __init__(self, processor, out, says):
        super().__init__(processor)
        self.out, self.says = out, says

    def __call__(self, examples):
        kept = [row for row in examples if row["id"] not in self.out]
        batch = dict(super().__call__(kept))
        return {**batch, "ids": [row["id"] for row in kept]} if self.says else batch


class TestLeftOut:
    def test_rows_that_the_collator_leaves_out(self, data, tmp_path):
        made = toy(data, tmp_path)
        made.data_collator = Dropping(made.processing_class, {"r1", "r2"}, says=True)
        cache = precompute_ref(made, tmp_path / "cache")
        left_out = {r["id"] for r in cache.records.values() if r["chosen"] is None}
        assert left_out == {"r1", "r2"}
        batch = CachedReference(made.data_collator, cache)(data[:2])
        assert len(batch["ref_chosen_logps"]) == 1
        assert "ids" not in batch

    def test_a_collator_that_does_not_say_which(self, data, tmp_path):
        made = toy(data, tmp_path)
        made.data_collator = Dropping(made.processing_class, {"r1"}, says=False)
        with pytest.raises(InputError, match="made 2 sequences of 2 pairs"):
            precompute_ref(made, tmp_path / "cache")


KILLED = """
import os, signal, sys
sys.path[:0] = {paths}
import mmlm, json, trl_toy
from pathlib import Path
from saving_process import lora
from training.preference import precompute

plain, passes = precompute._values, []

def deadly(*args):
    passes.append(1)
    if len(passes) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args)

precompute._values = deadly
data = json.loads(Path({data!r}).read_text())
precompute.precompute_ref(trl_toy.trainer(data, {run!r}, lora=lora()), Path({cache!r}))
"""


class TestResume:
    def test_a_killed_run_goes_on(self, data, tmp_path, monkeypatch):
        (tmp_path / "data.json").write_text(json.dumps(data))
        here = Path(__file__).parent
        script = KILLED.format(
            paths=[str(here), str(here.parent), str(here.parents[1])],
            data=str(tmp_path / "data.json"),
            run=str(tmp_path / "run"),
            cache=str(tmp_path / "cache"),
        )
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        part = tmp_path / "cache" / "part-0-of-1.jsonl"
        assert len(part.read_text().splitlines()) == 4
        with part.open("a") as file:
            file.write('{"key": "half a li')
        seen = []
        plain = precompute._values
        monkeypatch.setattr(
            precompute, "_values", lambda t, m, batch: seen.append(batch) or plain(t, m, batch)
        )
        made = toy(data, tmp_path)
        cache = precompute_ref(made, tmp_path / "cache")
        assert len(seen) == 1  # two of six rows were missing
        assert len(cache) == 6
        assert precompute_ref(made, tmp_path / "cache").records == cache.records
        assert len(seen) == 1
        whole = precompute_ref(toy(data, tmp_path), tmp_path / "other")
        assert whole.records == cache.records

    def test_parts_of_several_processes_are_one_cache(self, data, tmp_path, monkeypatch):
        """What two processes wrote serves one, and each computes its share only."""
        whole = precompute_ref(toy(data, tmp_path), tmp_path / "whole")
        for rank in (1, 0):  # the second process waits for nobody here: one after the other
            made = toy(data, tmp_path)
            monkeypatch.setattr(type(made.accelerator), "process_index", rank)
            monkeypatch.setattr(type(made.accelerator), "num_processes", 2)
            contents = row_contents(data)
            monkeypatch.setattr(
                precompute, "all_gathered", lambda value, c=contents: [c[0::2], c[1::2]]
            )
            monkeypatch.setattr(ReferenceCache, "check", lambda self, rows, contents: None)
            if rank == 0:  # as at the same time: it has not seen what the other wrote
                monkeypatch.setattr(
                    ReferenceCache, "open", classmethod(lambda cls, path, key: cls(path, {}))
                )
            precompute_ref(made, tmp_path / "parts")
        monkeypatch.undo()
        made = toy(data, tmp_path)
        assert sorted(p.name for p in (tmp_path / "parts").glob("*.jsonl")) == [
            "part-0-of-2.jsonl",
            "part-1-of-2.jsonl",
        ]
        cache = ReferenceCache.open(tmp_path / "parts", reference_key(made))
        assert cache.records.keys() == whole.records.keys()
        for name, record in cache.records.items():
            assert record["chosen"] == pytest.approx(whole.records[name]["chosen"], rel=1e-5)
        lines = [
            len((tmp_path / "parts" / f"part-{rank}-of-2.jsonl").read_text().splitlines())
            for rank in (0, 1)
        ]
        assert lines == [3, 3]

    def test_a_progress_bar_only_if_wanted(self, data, tmp_path, capfd):
        precompute_ref(toy(data, tmp_path), tmp_path / "quiet")
        assert "reference values" not in capfd.readouterr().err
        precompute_ref(toy(data, tmp_path), tmp_path / "shown", show=True)
        assert "6/6" in capfd.readouterr().err
