"""What must hold in every view of the page, for everybody who uses it.

Names that are data stay text; the keyboard is enough; whoever hears the page, sees
little of it or holds it in one hand gets the same. See ``test_page.py`` for what the
page does.
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

import localengine
from browser import ENTER, ESCAPE, TAB, Browser
from pages import (
    VIEWS,
    Daemon,
    daemon_running,
    enter,
    press_in_row,
    row,
    row_says,
    tasks,
)

pytestmark = pytest.mark.e2e

MARKUP = "<img src=x onerror=alert(1)>"
CHECKS = (Path(__file__).parent / "access.js").read_text(encoding="utf-8")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with daemon_running(tmp_path) as daemon:
        yield daemon


def at(browser: Browser, view: str) -> None:
    """Wait until a view is shown."""
    browser.until(lambda: f"#{view}" in browser.url(), f"{view} is shown")


def check(browser: Browser, name: str) -> list[str]:
    """What a function of ``access.js`` finds wrong."""
    found: list[str] = browser.script(f"{CHECKS}\nreturn {name}();")
    return found


def test_names_full_of_markup_and_control_characters_show_as_text(
    browser: Browser, tmp_path: Path
) -> None:
    wicked = f"{MARKUP}\u202eevil\x1b[31m"
    command = shlex.join([str(localengine.llama_server(tmp_path)), "--port", "${PORT}"])
    swap = {"models": {MARKUP: {"cmd": command, "name": MARKUP}}}
    with daemon_running(tmp_path, config=f"swap: {json.dumps(swap)}\n") as daemon:
        enter(browser, daemon, "models")
        row_says(browser, MARKUP, "stopped")
        # No model may have such a name, but anybody may make a link with it.
        browser.open(f"{daemon.page}#playground?model={quote(wicked)}")
        browser.sees(f"{MARKUP}<U+202E>evil^[[31m", "#model")
        browser.type("#say", MARKUP)
        browser.press("Send")
        browser.sees("is not known", "article.assistant .bad")
        assert browser.text("article.user > .content") == MARKUP
        refused = browser.complaints()
        assert all("404" in one for one in refused)
        for view in VIEWS.values():
            browser.open(f"{daemon.page}#{view}")
            browser.until(lambda: browser.count("main h1, main .unseen"), "it is there")
            assert browser.script("return document.images.length") == 0
        browser.open(f"{daemon.page}#models")
        press_in_row(browser, MARKUP, "Load")
        row_says(browser, MARKUP, "ready")


def test_the_keyboard_alone_is_enough(browser: Browser, daemon: Daemon) -> None:
    enter(browser, daemon)
    for letter, view in VIEWS.items():
        browser.keys("g", letter)
        at(browser, view)
    browser.keys("g", "m")
    row_says(browser, "alpha", "stopped")
    browser.keys("/")
    assert browser.script("return document.activeElement.type") == "search"
    browser.keys(*"alpha", ESCAPE)
    assert browser.count("tbody tr") == 1
    browser.keys("?")
    browser.sees("Keyboard", "#help")
    browser.sees("Configuration", "#help")
    browser.keys(ESCAPE)
    assert browser.count("#help") == 0
    for _ in range(40):
        browser.keys(TAB)
        words = browser.script("return document.activeElement.innerText ?? ''")
        if words == "Load":
            break
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.script(outline) == "solid", "the focus can be seen"
    browser.keys(ENTER)
    row_says(browser, "alpha", "ready")


def test_rows_keep_their_place_under_the_pointer(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "models?sort=state")
    row_says(browser, "beta", "stopped")
    order = "return [...document.querySelectorAll('tbody tr')].map((r) => r.innerText)"
    first = [text.split()[0] for text in browser.script(order)]
    browser.script(f"{row(first[-1])}.querySelector('.press button').focus()")
    press_in_row(browser, first[-1], "Load")
    row_says(browser, first[-1], "ready")
    assert [text.split()[0] for text in browser.script(order)] == first


def every_view(browser: Browser, daemon: Daemon) -> Iterator[str]:
    for view in VIEWS.values():
        browser.open(f"{daemon.page}#{view}")
        browser.until(
            lambda: browser.count("#views [aria-current]"), "the view is there"
        )
        # What is fetched has come when nothing changes any more.
        settled = "return document.querySelector('main').innerText.length"
        last = [-1]

        def is_settled(last: list[int] = last, settled: str = settled) -> bool:
            before, last[0] = last[0], browser.script(settled)
            return before == last[0]

        browser.until(is_settled, "the view has settled")
        yield view


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with something to show in each view."""
    with daemon_running(tmp_path, config=tasks(tmp_path)) as daemon:
        (daemon.models / "torn.gguf").write_bytes(b"GGUF" + bytes(5000))
        assert daemon.chat("alpha") == 200
        yield daemon


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_control_has_a_name_and_every_text_can_be_read(
    browser: Browser, busy: Daemon, scheme: str
) -> None:
    browser.prefer(color_scheme=scheme)
    enter(browser, busy)
    found = {
        view: faults
        for view in every_view(browser, busy)
        if (faults := check(browser, "faults") + check(browser, "faint"))
    }
    assert found == {}


@pytest.mark.parametrize("width", [320, 360, 768, 1024, 1280, 1440, 2560])
def test_nothing_is_wider_than_the_window(
    browser: Browser, busy: Daemon, width: int
) -> None:
    browser.resize(width, 800)
    enter(browser, busy)
    over = (
        "return Math.max(document.documentElement.scrollWidth - innerWidth,"
        " ...[...document.querySelectorAll('.table')]"
        ".map((one) => one.scrollWidth - one.clientWidth))"
    )
    wide = {
        view: more
        for view in every_view(browser, busy)
        if (more := browser.script(over)) > 0
    }
    assert wide == {}


def test_what_is_pressed_on_a_phone_is_40_pixels_high(
    browser: Browser, busy: Daemon
) -> None:
    browser.resize(360, 740)
    enter(browser, busy)
    small = {
        view: found
        for view in every_view(browser, busy)
        if (found := check(browser, "small"))
    }
    assert small == {}


def test_a_table_that_became_a_list_can_still_be_sorted(
    browser: Browser, daemon: Daemon
) -> None:
    browser.resize(360, 740)
    enter(browser, daemon, "models")
    row_says(browser, "alpha", "stopped")
    assert browser.count(".table.list") == 1
    names = "return [...document.querySelectorAll('tbody th')].map((h) => h.innerText)"
    assert browser.script(names) == ["alpha", "beta"]
    browser.press("Model", "thead")
    browser.until(lambda: browser.script(names) == ["beta", "alpha"], "it is sorted")
    assert "sort=-id" in browser.url()


def test_the_page_is_painted_in_under_a_second(
    browser: Browser, daemon: Daemon
) -> None:
    browser.open(daemon.page)
    painted = (
        "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    )
    milliseconds = browser.until(lambda: browser.script(painted), "it is painted")
    assert milliseconds < 1000
    asked = "return performance.getEntriesByType('resource').map((one) => one.name)"
    outside = [one for one in browser.script(asked) if daemon.engine.url not in one]
    assert outside == []


def test_a_gateway_that_goes_away_is_said_to_be_and_comes_back_by_itself(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon)
    browser.sees("ready", "#t-health")
    daemon.engine.stop()
    browser.sees("no connection", "#t-health")
    daemon.engine.start()
    browser.sees("ready", "#t-health")
    browser.complaints()  # refused connections, noted by the browser


def test_a_view_opened_while_the_gateway_was_away_fills_when_it_is_back(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon)
    browser.sees("ready", "#t-health")
    daemon.engine.stop()
    browser.sees("no connection", "#t-health")
    browser.keys("g", "c")
    browser.sees("no connection to the gateway")
    daemon.engine.start()
    browser.sees("as saved")
    browser.complaints()


def test_models_stand_beside_the_requests_where_there_is_room(
    browser: Browser, busy: Daemon
) -> None:
    tops = (
        "return [...document.querySelectorAll('.columns h2')]"
        ".filter((one) => ['Requests', 'Models'].includes(one.innerText))"
        ".map((one) => one.getBoundingClientRect().top)"
    )
    enter(browser, busy)
    row_says(browser, "alpha", "ready")
    for width, is_beside in ((1280, True), (2560, True), (768, False)):
        browser.resize(width, 800)
        requests, models = browser.script(tops)
        assert (abs(requests - models) < 4) == is_beside, width
