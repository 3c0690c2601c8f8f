"""The page at /admin/, driven in headless Chromium against a real daemon.

The models' server is ``fakeserver.py``; the last test uses a real llama-server where
there is one. After each test the browser's console must be empty: an error in a script
or anything that the page's policy refuses would stand there. ``test_page_access.py``
has what must hold in every view.
"""

import contextlib
import http.client
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import ENTER, Browser
from engines.real import Installed, until
from ggufs import write_gguf
from hubserver import REPOSITORY, Hub, hub_running, stall_at
from pages import (
    ADMIN,
    USER,
    Daemon,
    answer_yes,
    daemon_running,
    enter,
    press_in_row,
    row,
    row_says,
    tasks,
)

pytestmark = pytest.mark.e2e

DOWNLOADS = "[aria-label=Downloads]"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with daemon_running(tmp_path) as daemon:
        yield daemon


def told_on_top(browser: Browser) -> list[str]:
    """The names of what the line of truth shows."""
    shown = (
        "[...document.querySelectorAll('#truth dt')].filter((dt) => dt.offsetParent)"
    )
    names: list[str] = browser.script(f"return {shown}.map((dt) => dt.innerText)")
    return names


# --- coming in ------------------------------------------------------------------------


def test_the_first_visit_asks_for_a_key_and_explains_a_wrong_one(
    browser: Browser, daemon: Daemon
) -> None:
    browser.open(daemon.page)
    browser.sees("Which key is yours?")
    browser.sees("ready", "#truth")  # the line of truth does not wait for a key
    browser.sees("0.1.0", "#truth")
    assert told_on_top(browser) == ["health", "version"]
    assert browser.count("#views a") == 0

    browser.type("#key", "sk-wrong")
    browser.press("Open", "main")
    browser.sees("this API key is not known here", "#key-error")
    refused = browser.complaints()  # the browser notes each 401 by itself
    assert all("401" in one for one in refused)

    browser.type("#key", ADMIN)
    browser.press("Open", "main")
    browser.sees("All is ready. Say hello")
    browser.sees("0.1.0", "#truth")
    browser.sees("curl -N")


def test_the_key_is_kept_in_this_tab_and_nowhere_else(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon)
    kept = browser.script("return Object.values(sessionStorage)")
    assert kept == [ADMIN]
    assert browser.script("return [localStorage.length, document.cookie]") == [0, ""]
    assert ADMIN not in browser.url()

    browser.open(f"{daemon.page}#keys")  # a reload does not ask again
    browser.sees("alice")
    assert "in flight" in told_on_top(browser)
    browser.press("Forget the key")
    browser.sees("Which key is yours?")
    assert told_on_top(browser) == ["health", "version"]
    assert browser.script("return sessionStorage.length") == 0


def test_a_link_opens_its_view_with_its_filter_after_the_key(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "models?filter=bet&sort=-id")
    row_says(browser, "beta", "stopped")
    assert browser.count("tbody tr") == 1
    browser.type("[data-filter]", "alp")
    row_says(browser, "alpha", "stopped")
    assert "filter=alp" in browser.url()


def test_a_users_key_sees_its_own_usage_and_the_playground(
    browser: Browser, daemon: Daemon
) -> None:
    assert daemon.chat() == 200
    enter(browser, daemon, "config", USER)  # a view that is not for users
    refused = browser.complaints()
    assert all("403" in one for one in refused)
    links = "return [...document.querySelectorAll('#views a')].map((a) => a.innerText)"
    assert browser.script(links) == ["Usage", "Playground"]
    browser.sees("Key alice: 1 request")
    browser.sees("By day (UTC)")
    browser.sees("tokens per day (UTC)", "figcaption")
    browser.sees("tokens today", "#truth")
    assert told_on_top(browser) == ["health", "tokens today", "version"]
    row_says(browser, "alpha", "1")
    browser.press("Playground")
    browser.type("#say", "hello")
    browser.press("Send")
    browser.sees("tokens/s", "article.assistant .stats")


def test_a_revoked_key_leads_back_to_the_entrance(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "usage", USER)
    (daemon.folder / "keys.txt").write_text(f"{ADMIN} name=root role=admin\n")
    until(lambda: daemon.models_as(USER) == 401, 10, "the key is void")
    browser.open(f"{daemon.page}#playground")
    browser.sees("Which key is yours?")
    browser.sees("not known here")
    assert all("40" in one for one in browser.complaints())


# --- models ---------------------------------------------------------------------------


def test_a_model_is_loaded_and_unloaded(browser: Browser, daemon: Daemon) -> None:
    enter(browser, daemon, "models")
    row_says(browser, "alpha", "stopped")
    press_in_row(browser, "alpha", "Load")
    row_says(browser, "alpha", "ready")
    press_in_row(browser, "alpha", "Unload")
    row_says(browser, "alpha", "stopped")


def test_a_model_that_cannot_load_says_why(browser: Browser, tmp_path: Path) -> None:
    with daemon_running(tmp_path, "--crash-on-start", "no such <b>GPU</b>") as daemon:
        enter(browser, daemon, "models")
        press_in_row(browser, "alpha", "Load")
        row_says(browser, "alpha", "failed")
        row_says(browser, "alpha", "no such <b>GPU</b>")


def test_a_model_that_failed_says_so_until_it_is_tried_again(
    browser: Browser, tmp_path: Path
) -> None:
    """The gateway calls it stopped as soon as another attempt is allowed."""
    with daemon_running(tmp_path, "--crash-on-start", "no such GPU") as daemon:
        enter(browser, daemon, "models")
        press_in_row(browser, "alpha", "Load")
        row_says(browser, "alpha", "failed")
        headers = {"Authorization": f"Bearer {ADMIN}"}

        def is_stopped() -> bool:
            models = daemon.engine.get("/admin/api/models", **headers).json()["models"]
            return any(m["state"] == "stopped" and m["error"] for m in models)

        until(is_stopped, 20, "it may be tried again")
        browser.open("about:blank")
        browser.open(f"{daemon.page}#models")
        row_says(browser, "alpha", "no such GPU")
        row_says(browser, "alpha", "Try again")


def test_a_row_opens_what_its_file_says(browser: Browser, daemon: Daemon) -> None:
    enter(browser, daemon, "models")
    row_says(browser, "alpha", "stopped")
    browser.press("Details of alpha")
    browser.sees("Architecture\nllama", ".extra")
    browser.sees(str(daemon.models / "alpha.gguf"), ".extra")


def test_a_file_is_uploaded_and_deleted_again(browser: Browser, daemon: Daemon) -> None:
    enter(browser, daemon, "models")
    row_says(browser, "alpha", "stopped")
    source = daemon.folder / "gamma.gguf"
    write_gguf(source, name="gamma")
    browser.attach("#upload", source)
    row_says(browser, "gamma", "stopped")
    assert (daemon.models / "gamma.gguf").read_bytes() == source.read_bytes()

    browser.press("Details of gamma")
    browser.press("Delete gamma")
    browser.sees("for good?", ".extra")
    browser.press("No", ".extra")
    assert (daemon.models / "gamma.gguf").exists()
    browser.press("Delete gamma")
    answer_yes(browser, "Yes, delete")
    browser.until(lambda: not browser.script(f"return {row('gamma')}"), "it is gone")
    assert not (daemon.models / "gamma.gguf").exists()


def test_an_upload_that_meets_a_file_offers_to_replace_it(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "models")
    row_says(browser, "alpha", "stopped")
    source = daemon.folder / "alpha.gguf"
    write_gguf(source, name="another alpha")
    before = (daemon.models / "alpha.gguf").read_bytes()
    browser.attach("#upload", source)
    browser.sees("is there already", ".drop .downloads")
    assert (daemon.models / "alpha.gguf").read_bytes() == before
    browser.press("Replace it")
    browser.sees("done", ".drop .downloads")
    assert (daemon.models / "alpha.gguf").read_bytes() == source.read_bytes()
    assert all("409" in one for one in browser.complaints())


def test_what_is_no_model_is_refused_where_one_looks(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "models")
    source = daemon.folder / "song.gguf"
    source.write_bytes(b"ID3" + bytes(4000))
    browser.attach("#upload", source)
    browser.sees("GGUF", ".drop .downloads")
    browser.sees("failed", ".drop .downloads")
    assert not (daemon.models / "song.gguf").exists()
    assert all("400" in one for one in browser.complaints())


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_running() as hub:
        yield hub


def test_a_model_is_fetched_cancelled_and_gone_on_with(
    browser: Browser, hub: Hub, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "source.gguf", name="tiny")
    data = source.read_bytes() + bytes(400_000)
    hub.add("tiny-Q4_K_M.gguf", data)
    hub.faults.append(stall_at(200_000))
    with daemon_running(tmp_path, env={"HF_ENDPOINT": hub.url}) as daemon:
        enter(browser, daemon, "models")
        row_says(browser, "alpha", "stopped")
        browser.type("#fetch", f"{REPOSITORY}:Q4_K_M")
        browser.press("Fetch")
        name = f"Cancel or clear the download of {REPOSITORY}:Q4_K_M"
        share = (
            f"return Number(document.querySelector('{DOWNLOADS} [role=progressbar]')"
            "?.getAttribute('aria-valuenow') ?? 0)"
        )
        browser.until(lambda: 20 < browser.script(share) < 80, "a part has come")
        browser.press(name)
        browser.sees("it can go on from there", DOWNLOADS)
        browser.press("Go on")
        row_says(browser, "tiny-Q4_K_M", "stopped")
        assert (daemon.models / "tiny-Q4_K_M.gguf").read_bytes() == data


# --- asking ---------------------------------------------------------------------------


def test_a_chat_is_streamed_and_says_how_fast_it_was(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "playground?model=beta&temperature=0.2")
    browser.type("#say", "hello")
    browser.keys(ENTER)
    browser.sees("first token after", "article.assistant .stats")
    browser.sees("out", "article.assistant .stats")
    said = browser.text("article.assistant > .content")
    assert said.strip()
    browser.press("New chat")
    assert browser.count("article") == 0
    browser.press("Take the old one back")
    assert browser.text("article.assistant > .content") == said


def test_an_image_goes_with_the_message(browser: Browser, tmp_path: Path) -> None:
    picture = tmp_path / "dot.png"
    browser.open("about:blank")
    browser.screenshot(picture)
    with daemon_running(tmp_path) as daemon:
        enter(browser, daemon, "playground?model=alpha")
        browser.attach("#image", picture)
        browser.until(lambda: browser.count(".say .pictures img"), "it is shown")
        browser.type("#say", "what is this?")
        browser.press("Send")
        browser.sees("out", "article.assistant .stats")
        assert browser.count("article.user img") == 1


def test_an_answer_is_stopped_by_its_reader(browser: Browser, tmp_path: Path) -> None:
    until_file = tmp_path / "finish"
    with daemon_running(tmp_path, "--chunk-until", str(until_file)) as daemon:
        enter(browser, daemon, "playground?model=alpha")
        browser.type("#say", "hello")
        browser.press("Send")
        browser.until(
            lambda: browser.text("article.assistant > .content"), "it has begun"
        )
        browser.press("Stop")
        browser.sees("stopped", "article.assistant .stats")


def test_an_answer_that_breaks_off_keeps_what_was_said_and_says_why(
    browser: Browser, tmp_path: Path
) -> None:
    until_file = tmp_path / "finish"
    with daemon_running(tmp_path, "--chunk-until", str(until_file)) as daemon:
        enter(browser, daemon, "playground?model=alpha")
        browser.type("#say", "hello")
        browser.press("Send")
        said = browser.until(
            lambda: browser.text("article.assistant > .content"), "it has begun"
        )
        assert daemon.engine.process is not None
        daemon.engine.process.signal(signal.SIGKILL)
        daemon.engine.process.wait(10)
        browser.sees("the connection broke", "article.assistant .bad")
        assert browser.text("article.assistant > .content") == said
        daemon.engine.start()  # it ends what the killed one has left behind
        browser.sees("ready", "#t-health")
        browser.complaints()  # refused connections, noted by the browser


def test_a_request_in_flight_is_cancelled_after_one_question(
    browser: Browser, tmp_path: Path
) -> None:
    until_file = tmp_path / "finish"
    with daemon_running(tmp_path, "--chunk-until", str(until_file)) as daemon:
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": "alpha", "stream": True, "messages": messages}
        headers = {"Authorization": f"Bearer {USER}"}
        connection = daemon.engine.send(
            "POST", "/v1/chat/completions", json.dumps(body).encode(), **headers
        )
        with contextlib.closing(connection):
            enter(browser, daemon)
            row_says(browser, "alice", "answering")
            browser.sees("1", "#t-flight")
            press_in_row(browser, "alice", "Cancel")
            browser.sees("Cut this answer?")
            answer_yes(browser, "Yes, cancel")
            answer = connection.getresponse().read()
            assert b"[DONE]" not in answer
            assert b"request_aborted" in answer
        browser.sees("Nobody asks anything")


# --- keys and usage -------------------------------------------------------------------


def test_a_key_is_created_shown_once_changed_rotated_and_revoked(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "keys")
    row_says(browser, "alice", "user")
    browser.press("New key")
    browser.type("form input", "bob")
    browser.press("Create")
    browser.sees("The secret of bob")
    first = browser.text("#secret")
    until(lambda: daemon.models_as(first) == 200, 10, "the key is good")

    browser.press("Details of bob")
    field = ".extra input[type=number]"
    browser.type(field, "7")
    browser.press("Save", ".extra")
    row_says(browser, "bob", "7")
    assert "rps=7" in (daemon.folder / "keys.txt").read_text()

    browser.press("Rotate the key bob")
    answer_yes(browser, "Yes, rotate")
    browser.until(
        lambda: browser.text("#secret") not in ("", first), "another is shown"
    )
    second = browser.text("#secret")
    until(lambda: daemon.models_as(second) == 200, 10, "the new secret is good")
    assert daemon.models_as(first) == 401

    browser.press("I have it")
    assert second not in browser.script("return document.documentElement.innerHTML")
    browser.press("Revoke the key bob")
    answer_yes(browser, "Yes, revoke")
    browser.until(lambda: not browser.script(f"return {row('bob')}"), "it is gone")
    until(lambda: daemon.models_as(second) == 401, 10, "the key is void")


def test_whoever_rotates_the_key_of_this_tab_goes_on_with_the_new_one(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "keys")
    browser.press("Rotate the key root")
    answer_yes(browser, "Yes, rotate")
    browser.until(lambda: browser.text("#secret") not in ("", ADMIN), "it is shown")
    secret = browser.text("#secret")
    assert daemon.models_as(ADMIN) == 401
    browser.script("location.reload()")
    row_says(browser, "root", "admin")
    assert not browser.script("return document.querySelector('#key')")
    assert browser.script("return Object.values(sessionStorage)") == [secret]


def test_a_key_that_cannot_be_says_why(browser: Browser, daemon: Daemon) -> None:
    enter(browser, daemon, "keys")
    browser.press("New key")
    browser.type("form input", "alice")
    browser.press("Create")
    browser.sees("alice", "form .bad")
    assert all("409" in one or "400" in one for one in browser.complaints())


def test_usage_is_drawn_and_summed_by_key_and_by_model(
    browser: Browser, daemon: Daemon
) -> None:
    assert daemon.chat("alpha") == daemon.chat("beta") == 200
    enter(browser, daemon, "usage")
    browser.sees("2 requests")
    row_says(browser, "alice", "2")
    bars = ".bars rect:not(.whole)"
    assert browser.script(f"return document.querySelectorAll('{bars}').length") == 1
    browser.open(f"{daemon.page}#usage?by=model&since=24h")
    row_says(browser, "alpha", "1")
    row_says(browser, "beta", "1")
    assert browser.script(f"return document.querySelectorAll('{bars}').length") == 2


# --- logs, configuration, tasks -------------------------------------------------------


def test_logs_are_followed_and_filtered(browser: Browser, daemon: Daemon) -> None:
    enter(browser, daemon, "logs")
    browser.sees("live")
    assert daemon.chat() == 200
    browser.sees("path=/v1/chat/completions", ".lines")
    browser.type("[data-filter]", "no such line")
    browser.until(lambda: browser.text(".lines").strip() == "", "nothing is left")
    browser.open(f"{daemon.page}#logs?source=alpha")
    browser.sees("live")
    browser.until(
        lambda: browser.text(".lines").strip(), "the model has said something"
    )


def type_configuration(browser: Browser, text: str) -> None:
    browser.until(
        lambda: browser.script(
            "const field = document.getElementById('config');"
            "if (!field || field.disabled) return false;"
            "field.value = arguments[0];"
            "field.dispatchEvent(new Event('input', {bubbles: true})); return true;",
            text,
        ),
        "the configuration can be typed",
    )


def test_a_configuration_is_checked_as_one_types_saved_and_in_force(
    browser: Browser, daemon: Daemon
) -> None:
    before = daemon.config.read_text()
    enter(browser, daemon, "config")
    browser.sees("as saved")
    type_configuration(browser, before + "routing: {default_modell: alpha}\n")
    browser.sees("unknown key; did you mean", ".findings")
    browser.sees("line 8", ".findings")
    can_save = "return !document.querySelector('main button.strong').disabled"
    assert not browser.script(can_save)

    after = before + "routing: {aliases: {gpt-4o: alpha}}\n"
    type_configuration(browser, after)
    browser.sees("+routing: {aliases: {gpt-4o: alpha}}", ".diff")
    browser.sees("it can be saved")
    assert daemon.config.read_text() == before, "nothing is saved by typing"
    browser.until(lambda: browser.script(can_save), "it can be saved")
    browser.press("Save and reload")
    browser.sees("in force")
    assert daemon.config.read_text() == after
    assert daemon.chat("gpt-4o") == 200


def test_a_file_that_somebody_else_changed_is_replaced_only_knowingly(
    browser: Browser, daemon: Daemon
) -> None:
    before = daemon.config.read_text()
    enter(browser, daemon, "config")
    browser.sees("as saved")
    type_configuration(browser, before + "# mine\n")
    browser.sees("it can be saved")
    daemon.config.write_text(before + "# theirs\n")
    browser.press("Only save")
    browser.sees("The file has changed since you began")
    browser.sees("-# theirs", ".diff")
    assert daemon.config.read_text() == before + "# theirs\n"
    browser.press("Only save")
    browser.sees("as saved")
    assert daemon.config.read_text() == before + "# mine\n"
    assert all("409" in one for one in browser.complaints())


def test_a_broken_file_is_not_reloaded_and_says_why(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "config")
    browser.sees("as saved")
    daemon.config.write_text(daemon.config.read_text() + "queue: {max_waiting: lots}\n")
    browser.press("Reload")
    browser.sees("max_waiting")
    assert daemon.chat() == 200
    assert all("400" in one for one in browser.complaints())


def test_a_restart_asks_once_and_the_page_comes_back_by_itself(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "config")
    browser.sees("as saved")
    headers = {"Authorization": f"Bearer {ADMIN}"}

    def started() -> float:
        with contextlib.suppress(OSError, http.client.HTTPException):
            state = daemon.engine.get("/admin/api/state", **headers)
            return float(state.json().get("started", 0))
        return 0

    before = started()
    browser.press("Restart")
    browser.sees("Restart?")
    assert started() == before
    answer_yes(browser, "Yes, restart")
    browser.until(lambda: started() > before, "another daemon has started")
    browser.sees("ready", "#t-health")


def test_a_task_is_started_watched_and_cancelled(
    browser: Browser, tmp_path: Path
) -> None:
    with daemon_running(tmp_path, config=tasks(tmp_path)) as daemon:
        enter(browser, daemon, "tasks")
        browser.press("Start greet", ".tasks")
        answer_yes(browser, "Yes, start")
        browser.sees("hello <b>there</b>", ".output")
        browser.sees("done")
        browser.press("Start wait", ".tasks")
        answer_yes(browser, "Yes, start")
        browser.sees("running")
        browser.press("Cancel wait", ".tasks")
        answer_yes(browser, "Yes, end it")
        browser.sees("cancelled")


def test_a_gateway_without_tasks_shows_how_to_have_some(
    browser: Browser, daemon: Daemon
) -> None:
    enter(browser, daemon, "tasks")
    browser.sees("update llama.cpp:")


# --- a real engine --------------------------------------------------------------------


def test_a_real_model_is_loaded_chatted_with_and_unloaded(
    browser: Browser, installed: Installed, llama_server: Path, tmp_path: Path
) -> None:
    if not (installed.folder / "chat.gguf").exists():
        pytest.skip(f"no chat.gguf in {installed.folder}")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "gemma.gguf").symlink_to(installed.folder / "chat.gguf")
    with daemon_running(tmp_path, llama=llama_server) as daemon:
        enter(browser, daemon, "models")
        press_in_row(browser, "gemma", "Load")
        row_says(browser, "gemma", "ready")
        browser.open(f"{daemon.page}#playground?model=gemma&max_tokens=16")
        browser.type("#say", "hello")
        browser.press("Send")
        browser.sees("first token after", "article.assistant .stats")
        browser.sees("out", "article.assistant .stats")
        browser.open(f"{daemon.page}#models")
        browser.sees("0", "#t-flight")  # else it asks
        press_in_row(browser, "gemma", "Unload")
        row_says(browser, "gemma", "stopped")
