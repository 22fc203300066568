"""One playground and one Chromium for all browser tests, and a page per test that is watched.

Whatever a test does, its pages must ask nobody but the playground, and log no error.
"""

import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import web_pictures as driver

LOOPBACK = {"127.0.0.1", "localhost", ""}  # data: and blob: addresses have no host


@pytest.fixture(scope="session")
def address():
    """Where the playground is; a small upload limit, so that a too large file is a small one."""
    with driver.served("--max_upload_mb", "0.3", "--max_megapixels", "1") as address:
        yield address


@pytest.fixture(scope="session")
def chromium():
    with driver.chromium() as browser:
        yield browser


@pytest.fixture
def visit(chromium, address):
    """Opens the playground as a new visitor; at the end says what went wrong behind the page."""
    contexts, abroad, errors = [], [], []

    def seen(request):
        if urlsplit(request.url).hostname not in LOOPBACK and not request.url.startswith("data:"):
            abroad.append(request.url)

    def raised(error):
        # Gradio says so of its own requests when a page is left in the middle of one.
        if not error.startswith("AbortError: signal is aborted"):
            errors.append(error)

    def logged(message):
        if message.type == "error":
            raised(message.text)

    def visit(path="/", *, across=1280, down=900, shade="light", asked=None, **options):
        context = chromium.new_context(
            viewport={"width": across, "height": down},
            color_scheme=shade,
            reduced_motion="reduce",
            **options,
        )
        contexts.append(context)
        context.on("request", seen)
        if asked is not None:
            context.on("request", lambda request: asked.append(request.url))
        context.on("console", logged)
        context.on("weberror", lambda error: raised(str(error.error)))
        page = context.new_page()
        page.set_default_timeout(driver.PATIENCE)
        page.goto(address.rstrip("/") + path)
        driver.begin(page)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert abroad == []
    assert not errors, "\n".join(errors)


@pytest.fixture
def page(visit):
    return visit()


@pytest.fixture
def told():
    """Waits for a message of the page that holds some words, and closes it."""

    def told(page, words):
        message = page.get_by_test_id("toast-body").filter(has_text=words).first
        message.wait_for(state="visible")
        text = message.inner_text()
        message.get_by_role("button").first.click()
        return text

    return told
