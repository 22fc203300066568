"""The compare tab as a visitor uses it."""

import io
import json
import re

import numpy as np
import pytest
import web_pictures as driver
from PIL import Image

from mmlm.show.truth import draw_scene

pytestmark = pytest.mark.browser


def columns(page, turn=0):
    return page.locator(f"#answers .turn[data-turn='{turn}'] .column")


def answer(column):
    return " ".join(column.locator(".answer").inner_text().split())


def method_text(page, slot):
    return page.locator(f"#method-{slot}-text textarea, #method-{slot}-text input").first


def upload(page, content, name="mine.png", kind="image/png"):
    page.locator("#picture").get_by_role("button", name="Remove Image").click()
    page.wait_for_function("() => !document.querySelector('#truth .chip')")
    page.locator("#picture input[type=file]").set_input_files(
        {"name": name, "mimeType": kind, "buffer": content}
    )


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_scene_with_its_truth_is_there_before_anything_is_asked(page):
    chips = page.locator("#truth .chip").all_inner_texts()
    assert set(chips) == set(draw_scene(index=17).known.objects)
    assert page.locator("#answers .turn").count() == 0


def test_answers_stand_side_by_side_with_marks_and_costs(page):
    driver.choose(page, 2, "VCD")
    driver.ask(page, "describe the image .")
    heads = columns(page).locator("header").all_inner_texts()
    assert [head.split("(")[0].strip() for head in heads] == ["Plain model", "VHR", "VCD"]
    assert {one.get_attribute("data-state") for one in columns(page).all()} == {"done"}
    truth = draw_scene(index=17).known.objects
    plain = columns(page).first
    for mark in plain.locator("mark.good").all():
        assert mark.get_attribute("title").partition(":")[0] in truth
    for mark in plain.locator("mark.bad").all():
        assert mark.get_attribute("title").partition(":")[0] not in truth
    assert plain.locator("mark").count() > 0
    for stats in columns(page).locator(".stats").all_inner_texts():
        assert re.search(r"\d+ tokens · \d+\.\d+ s", stats)


def test_a_click_on_a_word_shows_where_every_column_looked(page):
    driver.ask(page, "describe the image .")
    word = columns(page).first.locator("mark .word").first
    word.click()
    columns(page).nth(1).locator("figure.gaze img").wait_for()
    assert page.locator("#answers figure.gaze img").count() == 2
    assert page.locator("#answers .word[aria-pressed=true]").count() >= 1
    maps = page.locator("#answers figure.gaze img").evaluate_all(
        "all => all.map(one => [one.naturalWidth, one.naturalHeight, one.alt])"
    )
    assert all(width > 100 and height > 100 and alt for width, height, alt in maps)
    caption = page.locator("#answers figure.gaze figcaption").first.inner_text()
    assert re.search(r"\d+% of the attention on the picture", caption)


def test_a_word_can_be_asked_with_the_keyboard(page):
    driver.ask(page, "describe the image .")
    columns(page).nth(1).locator(".word").nth(2).focus()
    page.keyboard.press("Enter")
    columns(page).nth(1).locator("figure.gaze img").wait_for()


def test_a_parameter_of_the_form_changes_the_method_and_its_answer(page):
    page.locator("#method-1-form").get_by_text("Parameters").click()
    field = page.locator("#param-1-0-alpha input")
    field.fill("4")
    field.press("Tab")
    page.wait_for_function(
        "() => document.querySelector('#method-1-text textarea, #method-1-text input')"
        ".value.includes('alpha=4')"
    )
    driver.ask(page, "describe the image .")
    assert "alpha=4" in columns(page).nth(1).locator("header").inner_text()


def test_a_parameter_out_of_range_is_refused_at_the_field(page):
    before = method_text(page, 1).input_value()
    page.locator("#method-1-form").get_by_text("Parameters").click()
    field = page.locator("#param-1-0-alpha input")
    field.fill("-3")
    field.press("Tab")
    note = page.locator("#method-1-note .refused")
    note.wait_for()
    assert "alpha" in note.inner_text()
    assert method_text(page, 1).input_value() == before


def test_a_second_question_continues_the_talk(page):
    driver.ask(page, "describe the image .")
    first = answer(columns(page).first)
    driver.ask(page, "is there a truck in the image ?")
    assert page.locator("#answers .turn").count() == 2
    assert answer(columns(page).first) == first
    assert re.match(r"(yes|no)\b", answer(columns(page, 1).first))
    page.locator("#new-talk").click()
    page.locator("#answers .empty").wait_for()
    assert page.locator("#answers .turn").count() == 0


def test_a_question_without_words_is_refused(page, told):
    page.locator("#question textarea, #question input").first.fill("   ")
    page.locator("#ask").click()
    assert "There is no question" in told(page, "no question")
    driver.ask(page, "describe the image .")  # the button is there again


def test_an_upload_is_described_and_nothing_is_claimed_about_it(page):
    upload(page, png(draw_scene(index=3).image))
    page.wait_for_function("() => !document.querySelector('#truth .chip')")
    driver.ask(page, "describe the image .")
    assert len(answer(columns(page).first)) > 20
    assert columns(page).locator("mark").count() == 0


def too_many_pixels():
    return png(Image.new("RGB", (1500, 1000)))


def too_many_bytes():
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    return png(Image.fromarray(noise))


BROKEN = {
    "cut off": (lambda: png(draw_scene(index=3).image)[:900], "cut.png", r"cut\.png"),
    "no picture": (lambda: b"just some words " * 20, "words.png", r"words\.png"),
    "too many pixels": (too_many_pixels, "huge.png", "pixel"),
    "too many bytes": (too_many_bytes, "noise.png", "[Ss]ize|large"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_picture_that_cannot_be_taken_gets_a_friendly_message(page, told, kind):
    content, name, words = BROKEN[kind]
    upload(page, content(), name)
    text = told(page, re.compile(words))
    assert "Traceback" not in text
    assert "/tmp" not in text
    # The page still works.
    page.locator("#draw").click()
    page.wait_for_selector("#truth .chip")
    driver.ask(page, "describe the image .")
    assert columns(page).first.get_attribute("data-state") == "done"


def set_up(page):
    """Choices other than the first ones."""
    driver.choose(page, 2, "PAI")
    page.locator("#scene-number input").fill("23")
    page.locator("#scene-number input").press("Enter")
    wanted = sorted(draw_scene(index=23).known.objects)
    page.wait_for_function(
        """wanted => JSON.stringify([...document.querySelectorAll('#truth .chip')]
          .map(one => one.textContent).sort()) === JSON.stringify(wanted)""",
        arg=wanted,
    )
    page.locator("#question textarea, #question input").first.fill("what is in the image ?")


def is_set_up(page):
    page.wait_for_function("() => document.querySelector('#scene-number input').value === '23'")
    assert method_text(page, 1).input_value() == "VHR(alpha=2.0)"
    assert method_text(page, 2).input_value().startswith("PAI(")
    question = page.locator("#question textarea, #question input").first
    assert question.input_value() == "what is in the image ?"
    chips = page.locator("#truth .chip").all_inner_texts()
    assert set(chips) == set(draw_scene(index=23).known.objects)


def test_a_link_carries_everything_that_was_chosen(page, visit):
    set_up(page)
    page.locator("#link").click()
    page.wait_for_url("**settings=**")
    is_set_up(visit("/?" + page.url.partition("?")[2]))


def load_settings(page, path):
    with page.expect_file_chooser() as caught:
        page.locator("#load-settings").click()
    caught.value.set_files(path)


def test_settings_are_saved_and_loaded_as_a_file(page, visit, tmp_path):
    set_up(page)
    with page.expect_download() as caught:
        page.locator("#save-settings").click()
    caught.value.save_as(tmp_path / "settings.json")
    saved = json.loads((tmp_path / "settings.json").read_text())
    assert saved["scene"] == 23
    other = visit()
    load_settings(other, tmp_path / "settings.json")
    is_set_up(other)


@pytest.mark.parametrize(
    "text",
    ["no JSON", '{"format": "mmlm web 1", "methods": ["VHR(alpha=-1)"]}', '{"other": 1}'],
)
def test_settings_that_are_none_are_refused(page, told, tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    load_settings(page, tmp_path / "settings.json")
    assert "Traceback" not in told(page, re.compile("."))
    assert method_text(page, 1).input_value() == "VHR(alpha=2.0)"
