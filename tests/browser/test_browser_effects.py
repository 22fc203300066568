"""The effects tab as a visitor uses it."""

import json
import re

import pytest
import web_pictures as driver

pytestmark = pytest.mark.browser


@pytest.fixture
def page(visit):
    page = visit()
    driver.tab(page, "Effects")
    return page


def scenes(page, count):
    page.locator("#effects-count input[type=number]").fill(str(count))
    page.keyboard.press("Tab")


def add_method(page, text):
    field = page.locator("#effects-methods input")
    field.click()
    field.fill(text)
    field.press("Enter")
    field.press("Tab")  # closes the list of choices, which lies over the buttons
    page.locator("#effects-methods [role=listbox]").wait_for(state="hidden")


def state(page):
    return page.locator("#effects-progress .run-progress").get_attribute("data-state")


def test_the_numbers_grow_and_end_with_every_picture(page, tmp_path):
    scenes(page, 36)
    page.locator("#effects-start").click()
    page.wait_for_selector("#effects-progress [data-state=running]")
    assert page.locator("#effects-start").is_disabled()
    page.wait_for_selector("#effects-numbers .curves svg")
    page.wait_for_selector("#effects-progress [data-state=done]")
    assert "72 of 72 captions, 36 pictures" in page.locator("#effects-progress").inner_text()
    assert page.locator("#effects-numbers .curves svg").count() == 4
    assert page.locator("#effects-numbers .forest .track-row .number").count() > 3
    heads = page.locator("#effects-numbers thead th").all_inner_texts()
    assert heads == ["", "plain", "VHR(alpha=2.0)"]
    first = page.locator("#effects-numbers tbody tr").first.inner_text()
    assert re.search(r"CHAIR_s\s+\d+\.\d\s+\[\d+\.\d, \d+\.\d\]\s+\d+ / 36", first)
    page.wait_for_selector("#effects-start:not([disabled])")
    with page.expect_download() as caught:
        page.locator("#effects-json").click()
    caught.value.save_as(tmp_path / "numbers.json")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["pictures"], numbers["baseline"]) == (36, "plain")


def test_the_picture_of_what_was_found_and_invented_is_shown(page):
    scenes(page, 6)
    page.locator("#effects-start").click()
    page.wait_for_selector("#effects-progress [data-state=done]")
    card = page.locator("#effects-numbers article.card")
    assert card.locator("img").evaluate("one => one.naturalWidth") == 80
    assert card.locator(".who-name").all_inner_texts() == ["plain", "VHR(alpha=2.0)"]
    assert card.locator("mark").count() > 0


def test_a_stop_keeps_what_is_there(page):
    scenes(page, 500)
    page.locator("#effects-start").click()
    page.wait_for_selector("#effects-numbers .curves svg")
    page.locator("#effects-stop").click()
    page.wait_for_selector("#effects-progress [data-state=stopped]")
    page.wait_for_selector("#effects-start:not([disabled])")
    assert page.locator("#effects-stop").is_disabled()
    assert page.locator("#effects-numbers .curves svg").count() == 4
    # And another run starts afresh.
    scenes(page, 2)
    page.locator("#effects-start").click()
    page.wait_for_selector("#effects-progress [data-state=done]")
    assert "4 of 4 captions" in page.locator("#effects-progress").inner_text()


def test_a_typed_method_is_measured_too(page):
    add_method(page, "PAI(alpha=0.3, gamma=1.2)")
    scenes(page, 2)
    page.locator("#effects-start").click()
    page.wait_for_selector("#effects-progress [data-state=done]")
    heads = page.locator("#effects-numbers thead th").all_inner_texts()
    assert heads == ["", "plain", "VHR(alpha=2.0)", "PAI(alpha=0.3, gamma=1.2)"]


@pytest.mark.parametrize(
    ("text", "words"), [("Nonsense()", "Nonsense"), ("VHR(alpha=-1)", "alpha"), ("VHR(", "VHR")]
)
def test_a_method_that_is_none_is_refused_and_the_page_goes_on(page, told, text, words):
    add_method(page, text)
    page.locator("#effects-start").click()
    assert "Traceback" not in told(page, words)
    page.wait_for_selector("#effects-start:not([disabled])")


def test_the_methods_of_the_compare_tab_can_be_taken(page):
    driver.tab(page, "Compare")
    driver.choose(page, 2, "PAI")
    driver.tab(page, "Effects")
    page.locator("#effects-take").click()
    chosen = page.locator("#effects-methods .token")
    chosen.nth(1).wait_for()
    assert [one.split("(")[0] for one in chosen.all_inner_texts()] == ["VHR", "PAI"]
