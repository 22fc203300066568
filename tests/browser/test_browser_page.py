"""The page itself: phone and desk, light and dark, several visitors, nothing from elsewhere."""

import functools
from urllib.parse import urlsplit

import pytest
import web_pictures as driver

pytestmark = pytest.mark.browser

SCRIPTS = """() => [...document.querySelectorAll('[src], link[href]')]
  .map(one => one.src || one.href).filter(address => address && !address.startsWith('data:'))"""


def test_everything_comes_from_the_playground_itself(visit, address):
    asked = []
    page = visit(asked=asked)
    driver.compare(page)
    hosts = {urlsplit(url).netloc for url in [*asked, *page.evaluate(SCRIPTS)]}
    assert hosts - {""} == {urlsplit(address).netloc}
    assert len(asked) > 10


@pytest.mark.parametrize("across", [400, 1280])
@pytest.mark.parametrize("shade", ["light", "dark"])
def test_the_page_fits_and_can_be_read(visit, across, shade):
    page = visit(across=across, shade=shade)
    for drive in (driver.compare, functools.partial(driver.effects, scenes=12), driver.data):
        drive(page)
        # Wide tables scroll inside of their frames; the page itself never does.
        assert page.evaluate("() => document.documentElement.scrollWidth") <= across
        assert page.evaluate(OVERHANGING, across) == []
    background, ink = page.evaluate(
        "() => ['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
    )
    assert (brightness(background) > brightness(ink)) is (shade == "light")


OVERHANGING = """across => [...document.querySelectorAll('h1, h2, p, button, input, label')]
  .filter(one => one.offsetParent && !one.closest('.scroll, [role=tablist], .overflow-menu'))
  .filter(one => one.getBoundingClientRect().right > across + 1)
  .map(one => one.outerHTML.slice(0, 120))"""


def brightness(colour):
    return sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])


def test_two_visitors_at_once_get_their_own_answers(visit):
    first, second = visit(), visit()
    second.locator("#scene-number input").fill("23")
    second.locator("#scene-number input").press("Enter")
    second.wait_for_function("() => !document.querySelector('#truth').innerText.includes('truck')")
    for page in (first, second):
        page.locator("#question textarea, #question input").first.fill("describe the image .")
    first.locator("#ask").click()
    second.locator("#ask").click()
    texts = []
    for page in (first, second):
        page.wait_for_function(
            """() => { const all = [...document.querySelectorAll('#answers .column')];
              return all.length === 2 && all.every(one => one.dataset.state === 'done'); }"""
        )
        assert page.locator("#answers .turn").count() == 1
        texts.append(page.locator("#answers .column .answer").all_inner_texts())
    assert texts[0] != texts[1]
    alone = visit("/")
    driver.ask(alone, "describe the image .")
    assert alone.locator("#answers .column .answer").all_inner_texts() == texts[0]


def test_two_measurements_wait_for_one_another(visit):
    pages = [visit(), visit()]
    for page in pages:
        driver.tab(page, "Effects")
        page.locator("#effects-count input[type=number]").fill("12")
        page.keyboard.press("Tab")
        page.locator("#effects-start").click()
    for page in pages:
        page.wait_for_selector("#effects-progress [data-state=done]")
    rows = [page.locator("#effects-numbers tbody tr").first.inner_text() for page in pages]
    assert rows[0] == rows[1]
