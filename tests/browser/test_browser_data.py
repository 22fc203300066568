"""The data tab as a visitor uses it."""

import io
import json

import pytest
import web_pictures as driver

from mmlm.show.truth import draw_scene

pytestmark = pytest.mark.browser


@pytest.fixture
def page(visit):
    page = visit()
    driver.tab(page, "Data")
    return page


def test_sentences_are_sampled_labelled_and_paired_one_by_one(page, tmp_path):
    assert page.locator("#data-next").is_disabled()
    page.locator("#data-start").click()
    page.wait_for_selector("#data-steps [data-step='0']")
    assert page.locator("#data-steps .step").count() == 1
    assert page.locator("#data-steps .candidate").count() > 1
    assert page.locator("#data-objects .scene img").evaluate("one => one.naturalWidth") == 80
    page.locator("#data-next").click()
    page.wait_for_selector("#data-steps [data-step='1'] .pair")
    step = page.locator("#data-steps [data-step='1']")
    assert step.locator(".candidate.next").count() == 1
    assert step.locator(".candidate[data-class=hallucinated] mark.bad").count() > 0
    pair = step.locator(".pair").first
    assert pair.locator("p").nth(0).locator("mark.bad").count() == 0
    assert pair.locator("p").nth(1).locator("mark.bad").count() > 0
    detectors = page.locator("#data-objects thead th").all_inner_texts()
    assert detectors[-2:] == ["WorldTruth-1", "WorldTruth-2"]
    page.locator("#data-rest").click()
    page.wait_for_selector("#data-steps [data-state=complete]")
    page.wait_for_selector("#data-next[disabled]")
    with page.expect_download() as caught:
        page.locator("#data-pairs").click()
    caught.value.save_as(tmp_path / "pairs.jsonl")
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == page.locator("#data-steps .pair").count() > 0
    assert {"context", "chosen", "rejected"} <= pairs[0].keys()


def test_an_upload_is_judged_by_what_its_owner_sees(page, told):
    drawn = draw_scene(index=17)
    buffer = io.BytesIO()
    drawn.image.save(buffer, "PNG")
    page.get_by_label("My picture").click()
    page.locator("#data-picture input[type=file]").set_input_files(
        {"name": "mine.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    )
    page.wait_for_selector("#data-picture img")
    page.locator("#data-start").click()
    assert "what you see" in told(page, "Nobody says")
    page.locator("#data-seen textarea, #data-seen input").first.fill(", ".join(drawn.known.objects))
    page.locator("#data-start").click()
    page.wait_for_selector("#data-steps [data-step='0']")
    assert page.locator("#data-objects thead th").all_inner_texts()[-1] == "you"


def test_a_picture_that_is_none_gets_a_friendly_message(page, told):
    page.get_by_label("My picture").click()
    page.locator("#data-picture input[type=file]").set_input_files(
        {"name": "words.png", "mimeType": "image/png", "buffer": b"just some words " * 9}
    )
    page.locator("#data-seen textarea, #data-seen input").first.fill("dog")
    page.locator("#data-start").click()
    text = told(page, "words.png")
    assert "/tmp" not in text
    assert "Traceback" not in text
