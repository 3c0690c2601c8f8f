"""The service of the machine under a systemd that runs: docs/service.md, tried.

It takes root on Linux (see ``systemdbox``); elsewhere these tests are skipped.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.real import Installed, Server, free_port, until
from systemdbox import PATIENCE, PREFIX, Box, NoBox, boxed

pytestmark = pytest.mark.e2e

UNIT = "inferencia.service"
DROP_INS = f"/etc/systemd/system/{UNIT}.d"
CONFIG = "/etc/inferencia/config.yaml"
ADMIN = "sk-systemd-admin-4b0c9e7d21"
TASKS = Path(__file__).parent.parent / "deploy" / "systemd" / "tasks.conf"


@pytest.fixture(scope="module")
def box(
    installed: Installed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Box]:
    try:
        with boxed(tmp_path_factory.mktemp("systemd")) as box:
            yield box
    except NoBox as reason:
        pytest.skip(str(reason))


class Service:
    """The service, installed as the documentation says."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.http = Server(free_port(), {"Authorization": f"Bearer {ADMIN}"})
        self.configure()
        box.did(f"{PREFIX}/bin/inferencia", "service", "install", "--force")
        box.did("systemctl", "daemon-reload")

    def configure(self, *lines: str) -> None:
        backend = "backends: [{name: words, type: echo}]"
        server = f"{{port: {self.http.port}, api_key: {{admin: {ADMIN}}}}}"
        text = [f"server: {server}", backend, *lines]
        self.box.write(CONFIG, "".join(f"{line}\n" for line in text))

    def drop_in(self, name: str, text: str) -> None:
        self.box.write(f"{DROP_INS}/{name}.conf", text)
        self.box.did("systemctl", "daemon-reload")

    def shows(self, name: str) -> str:
        return self.box.shows(UNIT, name)

    def ask(self, method: str, path: str) -> Any:
        headers = {"Content-Type": "application/json"}
        body = b"{}" if method == "POST" else None
        reply = self.http.request(method, f"/admin/api/{path}", body, **headers)
        assert reply.status < 300, reply.body
        return reply.json()

    def runs(self, task: str) -> tuple[Any, str]:
        """How a task ended, and what it printed."""
        self.ask("POST", f"tasks/{task}")
        path = f"/admin/api/tasks/{task}/output?follow=1"
        output = self.http.get(path).body.decode()
        (found,) = (t for t in self.ask("GET", "tasks")["tasks"] if t["name"] == task)
        return found, output


@pytest.fixture
def service(box: Box) -> Iterator[Service]:
    service = Service(box)
    box.did("systemctl", "start", UNIT)
    yield service
    box.did("systemctl", "stop", UNIT)
    box.run("systemctl", "reset-failed", UNIT)
    box.did("rm", "-rf", DROP_INS, CONFIG)


def test_it_is_up_when_systemd_says_so_as_a_user_of_its_own(service: Service) -> None:
    assert service.http.get("/health").status == 200
    assert service.shows("StatusText") == f"listens on {service.http.url}"
    pid = service.shows("MainPID")
    owner = service.box.did("stat", "-c", "%u", f"/proc/{pid}").strip()
    assert int(owner) >= 61184  # systemd.exec(5), DynamicUser=
    state = service.box.did("stat", "-L", "-c", "%u %a", "/var/lib/inferencia")
    assert state.split() == [owner, "700"]


def test_without_a_configuration_the_keys_that_were_made_work(service: Service) -> None:
    service.box.did("rm", CONFIG)
    service.box.did(f"{PREFIX}/bin/inferencia", "service", "install", "--force")
    port = free_port()
    variables = f"[Service]\nEnvironment=INFERENCIA_PORT={port}\n"
    service.drop_in("port", variables)
    service.box.did("systemctl", "restart", UNIT)
    key = service.box.did("cat", "/var/lib/inferencia/key")
    server = Server(port, {"Authorization": f"Bearer {key.strip()}"})
    assert server.get("/v1/models").status == 200


def test_a_reload_takes_effect_and_a_broken_one_changes_nothing(
    service: Service,
) -> None:
    def knows_the_alias() -> bool:
        return service.http.get("/v1/models/parrot").status == 200

    pid = service.shows("MainPID")
    service.configure("routing: {aliases: {parrot: echo}}")
    service.box.did("systemctl", "reload", UNIT)
    until(knows_the_alias, PATIENCE, "the alias is known")
    service.configure("rooting: {}")
    service.box.did("systemctl", "reload", UNIT)
    assert service.http.post("/admin/api/reload", {}).status == 400  # it was read
    assert knows_the_alias()
    assert (service.shows("MainPID"), service.shows("ActiveState")) == (pid, "active")


def test_an_administrators_restart_cuts_nothing_and_is_none_to_systemd(
    service: Service,
) -> None:
    began = service.ask("GET", "state")["started"]
    words = " ".join(["word"] * 50)
    asked = {"stream": True, "messages": [{"role": "user", "content": words}]}
    body = json.dumps(asked).encode()
    pid = service.shows("MainPID")
    sent = service.http.send("POST", "/v1/chat/completions", body)
    with contextlib.closing(sent) as connection:
        answer = connection.getresponse()
        service.ask("POST", "restart")
        assert answer.read().endswith(b"data: [DONE]\n\n")

    def is_new() -> bool:
        with contextlib.suppress(OSError, AssertionError):
            return bool(service.ask("GET", "state")["started"] > began)
        return False

    until(is_new, PATIENCE, "the program is started anew")
    assert service.shows("MainPID") == pid
    assert (service.shows("NRestarts"), service.shows("ActiveState")) == ("0", "active")


def test_a_task_that_leaves_the_sandbox_is_refused_there(service: Service) -> None:
    service.configure(
        "admin: {tasks: {hello: echo hi, file: touch /root/x /usr/x, "
        "reboot: systemctl reboot}}"
    )
    service.ask("POST", "reload")
    found, output = service.runs("hello")
    assert (found["exit_status"], "\nhi\n" in output) == (0, True)
    found, output = service.runs("file")
    assert found["exit_status"] == 1
    assert "Permission denied" in output and "Read-only file system" in output
    assert service.runs("reboot")[0]["exit_status"] == 1
    assert service.shows("ActiveState") == "active"


def test_the_drop_in_for_tasks_lets_its_user_work_at_home(service: Service) -> None:
    service.box.run("useradd", "--create-home", "ada")
    service.drop_in("tasks", TASKS.read_text())
    service.configure("admin: {tasks: {build: [touch ~/built, ls /home/ada]}}")
    service.box.did("systemctl", "restart", UNIT)
    found, output = service.runs("build")
    assert (found["exit_status"], "\nbuilt\n" in output) == (0, True), output


def test_one_whose_event_loop_stands_still_is_started_again(service: Service) -> None:
    service.drop_in("watchdog", "[Service]\nWatchdogSec=1\nRestartSec=0\n")
    service.box.did("systemctl", "restart", UNIT)
    service.box.did("kill", "-STOP", service.shows("MainPID"))
    service.box.until(UNIT, NRestarts="1", ActiveState="active")
    assert service.http.get("/health").status == 200


def test_a_wrong_configuration_is_not_tried_again_and_again(service: Service) -> None:
    service.configure("rooting: {}")
    assert service.box.run("systemctl", "restart", UNIT).returncode != 0
    service.box.until(UNIT, ActiveState="failed", NRestarts="0", ExecMainStatus="2")
