"""Answering composed questions: batches, what is left out, noise, failures one by one."""

from __future__ import annotations

import numpy as np
import pytest
import scenes
import tiny
import torch
from PIL import Image

import data_tools.mia.answer as module
from data_tools.mia import prompting
from data_tools.mia.answer import AnswerSettings, AnswerStage
from data_tools.mia.prompting import check_several_images, noised, prompted
from mmlm.errors import InputError, MmlmError
from mmlm.inputs import prepare, render

SHORT = AnswerSettings(max_new_tokens=5, batch_size=3)


def answer(records, root, settings=SHORT, family="llava", model=None):
    """Outcomes by id."""
    own, processor = tiny.shared(family)
    stage = AnswerStage(model or own, processor, root, settings, "tiny")
    return {outcome.id: outcome for outcome in stage.process(records)}


def line(outcome):
    (own,) = outcome.lines["answers"]
    return own


def test_answers_are_greedy_and_batched_as_alone(tmp_path):
    records = scenes.records(tmp_path, ("sequence", 2), ("grid", 4), ("pip", 2), ("sequence", 3))
    together = answer(records, tmp_path)
    model, processor = tiny.shared("llava")
    for record in records:
        outcome = together[record["id"]]
        assert outcome.status == "ok"
        prompt = prompted(record, tmp_path, None)
        inputs = prepare(processor, [prompt.conversation], [list(prompt.pictures)])
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :].tolist()
        own = line(outcome)
        assert own["tokens"] == new
        assert own["n_tokens"] == len(new)
        assert own["prompt_tokens"] == inputs["input_ids"].shape[1]
        assert own["response"] == processor.decode(new, skip_special_tokens=True).strip()
        assert own["decode"] == {"do_sample": False, "max_new_tokens": 5}
        assert own["corrupt_target"] is None
        assert own["model"] == "tiny"


def test_the_prompt_keeps_its_pictures_in_place(tmp_path):
    (record,) = scenes.records(tmp_path, ("sequence", 2))
    prompt = prompted(record, tmp_path, None)
    text = render(tiny.shared("llava")[1], prompt.conversation)
    assert "Image1:<image>\nImage2:<image>\nIn Image1, " in text


def test_attention_measured_while_answering_is_that_of_scoring(tmp_path):
    from data_tools.mia.score import ScoreSettings, ScoreStage

    records = scenes.records(tmp_path, ("sequence", 2), ("grid", 4), ("pip", 2))
    settings = AnswerSettings(max_new_tokens=5, batch_size=2, attention=True)
    answered = answer(records, tmp_path, settings)
    joined = [record | line(answered[record["id"]]) for record in records]
    model, processor = tiny.shared("llava")
    found = []
    for choice in ("answer", "forward"):
        score = ScoreSettings(attention=choice, perplexity=choice)
        stage = ScoreStage(model, processor, tmp_path, score)
        found.append({o.id: o.lines["scores"][0] for o in stage.process(joined)})
    for name, measured in found[0].items():
        forced = found[1][name]
        assert measured["ratios"] == pytest.approx(forced["ratios"], abs=1e-5)
        assert measured["ppl"] == pytest.approx(forced["ppl"], rel=1e-4)
        assert measured["layer"] == forced["layer"] == 2


def test_what_is_left_is_answered_in_the_batches_of_the_whole_run(tmp_path):
    records = scenes.records(tmp_path, ("sequence", 3), ("sequence", 2), ("pip", 2), ("grid", 4))
    model, processor = tiny.shared("llava")
    settings = AnswerSettings(max_new_tokens=5, batch_size=2)
    stage = AnswerStage(model, processor, tmp_path, settings, "tiny", records)
    whole = {outcome.id: outcome.lines for outcome in stage.process(records)}
    for left in ([records[1]], records[2:], records[:1]):
        again = {outcome.id: outcome.lines for outcome in stage.process(left)}
        assert again == {record["id"]: whole[record["id"]] for record in left}  # to the bit


# ---- failures: one test per row ----


def test_failure_a_ground_truth_of_512_characters_is_left_out(tmp_path):
    records = scenes.records(tmp_path, ("sequence", 2), ("sequence", 2))
    records[0]["answer"], records[1]["answer"] = "x" * 512, "x" * 511
    found = answer(records, tmp_path)
    assert found[records[0]["id"]].status == "long_answer"
    assert found[records[0]["id"]].lines == {}
    assert found[records[1]["id"]].status == "ok"


def test_failure_an_unreadable_picture_costs_its_record_only(tmp_path):
    records = scenes.records(tmp_path, ("sequence", 2), ("sequence", 3), ("sequence", 2))
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / records[1]["images"][0]).read_bytes()[:60])
    records[1]["images"][1] = "broken.png"
    found = answer(records, tmp_path)
    assert [found[r["id"]].status for r in records] == ["ok", "unreadable_image", "ok"]


def test_failure_a_prompt_longer_than_the_context_is_never_cut(tmp_path, monkeypatch):
    model, _ = tiny.build("llava")
    records = scenes.records(tmp_path, ("sequence", 2), ("sequence", 5))
    model.config.text_config.max_position_embeddings = 100
    found = answer(records, tmp_path, model=model)
    assert found[records[0]["id"]].status == "ok"
    assert line(found[records[0]["id"]])["prompt_tokens"] < 100
    assert found[records[1]["id"]].status == "too_long"


def test_failure_out_of_memory_makes_batches_smaller(tmp_path, monkeypatch):
    records = scenes.records(tmp_path, ("sequence", 2), ("sequence", 2), ("sequence", 2))
    expected = answer(records, tmp_path)
    real, sizes = module.generate_batches, []

    def narrow(model, processor, batch, *rest, **options):
        sizes.append(len(batch))
        if len(batch) > 1 or batch[0].id == records[2]["id"]:
            raise MmlmError("no room") from torch.OutOfMemoryError()
        return real(model, processor, batch, *rest, **options)

    monkeypatch.setattr(module, "generate_batches", narrow)
    found = answer(records, tmp_path)
    assert sizes[0] == 3
    statuses = [found[record["id"]].status for record in records]
    assert statuses == ["ok", "ok", "out_of_memory"]
    for record in records[:2]:
        assert line(found[record["id"]])["response"] == line(expected[record["id"]])["response"]


def test_failure_other_errors_are_not_taken_for_lack_of_memory(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise MmlmError("something else")

    monkeypatch.setattr(module, "generate_batches", broken)
    with pytest.raises(MmlmError, match="something else"):
        answer(scenes.records(tmp_path, ("sequence", 2)), tmp_path)


def test_failure_a_picture_that_the_processor_refuses(tmp_path):
    records = scenes.records(tmp_path, ("sequence", 2), ("sequence", 2))
    Image.new("RGB", (1, 900)).save(tmp_path / "thread.png")
    records[0]["images"][0] = "thread.png"
    found = answer(records, tmp_path, family="qwen2_5_vl")
    assert [found[record["id"]].status for record in records] == ["refused", "ok"]


def test_failure_a_template_that_drops_pictures_is_found_at_the_start():
    model, processor = tiny.build("llava")
    check_several_images(model, processor)
    processor.chat_template = (
        "{% for m in messages %}<image> "
        "{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InputError, match="several pictures"):
        check_several_images(model, processor)


def test_failure_two_pictures_in_the_tokens_of_one_are_found_at_the_start(monkeypatch):
    """LLaVA's images are told apart by equal shares, so one placeholder would look like two."""
    counts = iter([[16], [8, 8]])
    monkeypatch.setattr(prompting, "_image_tokens", lambda anatomy, inputs: next(counts))
    with pytest.raises(InputError, match="16 image tokens of 2"):
        check_several_images(*tiny.shared("llava"))


@pytest.mark.parametrize("family", tiny.ALL)
def test_every_family_here_takes_several_pictures(family):
    check_several_images(*tiny.shared(family))


# ---- noise ----


def test_noise_is_added_in_floating_point_and_clipped():
    picture = Image.new("RGB", (40, 30), (250, 5, 128))
    box = (10, 5, 30, 25)
    noisy = np.asarray(noised(picture, box, 20.0, "7\0a")).astype(int)
    plain = np.asarray(picture).astype(int)
    inside = noisy[5:25, 10:30]
    # Nothing wraps round: bright pixels stay bright, dark ones dark.
    assert inside[..., 0].min() > 150
    assert inside[..., 1].max() < 105
    assert 15 < (inside[..., 2] - 128).std() < 25
    outside = np.ones((30, 40), bool)
    outside[5:25, 10:30] = False
    assert (noisy[outside] == plain[outside]).all()


def test_noise_is_seeded_by_the_record():
    picture, box = Image.new("RGB", (20, 20), "grey"), (0, 0, 20, 20)
    first = noised(picture, box, 49.0, "7\0a").tobytes()
    assert first == noised(picture, box, 49.0, "7\0a").tobytes()
    assert first != noised(picture, box, 49.0, "7\0b").tobytes()
    assert picture.tobytes() == Image.new("RGB", (20, 20), "grey").tobytes()


@pytest.mark.parametrize(("kind", "n"), [("sequence", 3), ("grid", 4), ("pip", 2)])
def test_noise_hits_the_target_alone(tmp_path, kind, n):
    (record,) = scenes.records(tmp_path, (kind, n))
    plain, noisy = (prompted(record, tmp_path, std).pictures for std in (None, 225.0))
    changed = [
        np.asarray(a).astype(int) != np.asarray(b).astype(int)
        for a, b in zip(plain, noisy, strict=True)
    ]
    target = record["target_index"] - 1
    if kind == "sequence":
        assert [bool(c.any()) for c in changed] == [i == target for i in range(n)]
    else:
        x0, y0, x1, y1 = record["tiles"][target]
        rows, columns = np.nonzero(changed[0].any(-1))
        assert (rows.min(), columns.min()) == (y0, x0)
        assert (rows.max() + 1, columns.max() + 1) == (y1, x1)


def test_noise_is_recorded(tmp_path):
    records = scenes.records(tmp_path, ("grid", 4))
    noisy = answer(records, tmp_path, AnswerSettings(max_new_tokens=5, corrupt_target=225.0))
    assert line(noisy[records[0]["id"]])["corrupt_target"] == 225.0


# ---- settings ----


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"corrupt_target": 0.0},
        {"corrupt_target": float("nan")},
        {"layer": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AnswerSettings(**wrong)


def test_the_batch_size_is_no_part_of_the_run():
    assert AnswerSettings(batch_size=1).facts == AnswerSettings(batch_size=8).facts
    assert AnswerSettings(max_new_tokens=8).facts != AnswerSettings().facts
