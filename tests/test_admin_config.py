"""The admin API: keys, the configuration, and starting anew."""

import asyncio
import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import daemons
from administering import Administrator, administering, next_event
from engines.real import free_port
from gateway import ADMIN, KEYS, PATIENCE, USER, FakeEngine, Slow
from inferencia.configedit import masked

LOGS = "logs?follow=1"

CONFIG = """\
# Mine.
backends:
  - {name: echo, type: echo, api_key: hush-hush-hush}  # built in
log: {level: info}
"""


# --- keys ------------------------------------------------------------------------


async def opens(admin: Administrator, secret: str) -> bool:
    status, _ = await admin.ask("GET", "/v1/models", key=secret)
    return status == 200


async def test_a_key_lives_from_its_making_to_its_end(tmp_path: Path) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        body = {"name": "bob", "models": ["qwen*", "echo"], "rps": 2.5, "expires": "3d"}
        status, made = await admin.ask("POST", "keys", body)
        assert status == 201
        assert made["key"]["name"] == "bob" and made["key"]["rps"] == 2.5
        assert made["key"]["models"] == ["qwen*", "echo"]
        assert await opens(admin, made["secret"])
        assert made["secret"] not in (tmp_path / "keys.txt").read_text()
        assert made["secret"] not in admin.gateway.log.text

        changes: dict[str, Any] = {"rps": None, "tpm": 1000, "models": []}
        status, changed = await admin.ask("PATCH", "keys/bob", changes)
        assert status == 200
        key = changed["key"]
        assert (key["rps"], key["tpm"], key["models"]) == (None, 1000, [])
        assert key["expires"] == made["key"]["expires"]

        status, rotated = await admin.ask("POST", "keys/bob/rotate")
        assert status == 201 and await opens(admin, rotated["secret"])
        assert not rotated["is_own"]
        assert not await opens(admin, made["secret"])
        assert (await admin.ask("DELETE", "keys/bob"))[1]["key"]["tpm"] == 1000
        assert not await opens(admin, rotated["secret"])
        assert admin.life.keys_changes == 4
        assert (tmp_path / "keys.txt").read_text() == KEYS


async def test_models_of_a_key_may_be_text_as_in_the_keys_file(tmp_path: Path) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        body = {"name": "bob", "models": "qwen*,echo"}
        status, made = await admin.ask("POST", "keys", body)
        assert (status, made["key"]["models"]) == (201, ["qwen*", "echo"])
        for models in ("qwen*,,echo", "a b"):
            body = {"name": "eve", "models": models}
            assert (await admin.ask("POST", "keys", body))[0] == 400


async def test_keys_are_listed_without_secrets(tmp_path: Path) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        found = await admin.get("keys")
        assert [key["name"] for key in found["keys"]] == ["alice", "root", "prom"]
        assert {key["source"] for key in found["keys"]} == {"file"}
        assert found["path"] == str(tmp_path / "keys.txt")
        assert USER not in json.dumps(found) and "digest" not in json.dumps(found)


async def test_who_watches_is_told_when_other_keys_are_in_force(tmp_path: Path) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        before = (await admin.get("state"))["keys"]
        assert (before["count"], before["problem"]) == (3, None)
        assert (await admin.get("state"))["keys"] == before
        await admin.ask("POST", "keys", {"name": "bob"})
        made = (await admin.get("state"))["keys"]
        assert made["count"] == 4 and made["changed"] > before["changed"]
        await admin.ask("PATCH", "keys/bob", {"tpm": 5})
        changed = (await admin.get("state"))["keys"]
        assert changed["count"] == 4 and changed["changed"] > made["changed"]
        keys = tmp_path / "keys.txt"
        keys.write_text("sk-nobody what is this\n")
        assert not admin.gateway.parts.doors.ring.poll()
        broken = (await admin.get("state"))["keys"]
        assert broken["changed"] == changed["changed"]
        assert str(keys) in broken["problem"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "keys", {"name": "alice"}, 409),
        ("POST", "keys", {"name": "a b"}, 400),
        ("POST", "keys", {"name": "x\nsk-evil role=admin"}, 400),
        ("POST", "keys", {"name": "<b>"}, 400),
        ("POST", "keys", {"name": "x", "role": "king"}, 400),
        ("POST", "keys", {"name": "x", "models": ["a b"]}, 400),
        ("POST", "keys", {"name": "x", "models": ["a\nb"]}, 400),
        ("POST", "keys", {"name": "x", "models": [""]}, 400),
        ("POST", "keys", {"name": "x", "models": ["a,*"]}, 400),
        ("POST", "keys", {"name": "x", "rps": -1}, 400),
        ("POST", "keys", {"name": "x", "rps": 1e300}, 400),
        ("POST", "keys", {"name": "x", "burst": 0}, 400),
        ("POST", "keys", {"name": "x", "expires": "soon"}, 400),
        ("POST", "keys", {"name": "x", "expires": "2020-01-01"}, 400),
        ("PATCH", "keys/nobody", {"rps": 1}, 404),
        ("PATCH", "keys/alice", {"name": "eve"}, 400),
        ("POST", "keys/nobody/rotate", None, 404),
        ("DELETE", "keys/nobody", None, 404),
        # Somebody has to be left who may undo it.
        ("DELETE", "keys/root", None, 409),
        ("PATCH", "keys/root", {"role": "user"}, 409),
        ("PATCH", "keys/root", {"role": None}, 409),
        ("PATCH", "keys/root", {"expires": "30d"}, 409),
    ],
)
async def test_keys_that_cannot_be_are_not_made(
    tmp_path: Path, method: str, path: str, body: Any, status: int
) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        found, message = await admin.refused(method, path, body)
        assert (found, bool(message)) == (status, True)
        assert (tmp_path / "keys.txt").read_text() == KEYS


async def test_the_last_admin_key_may_be_rotated(tmp_path: Path) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        status, made = await admin.ask("POST", "keys/root/rotate")
        assert (status, made["is_own"]) == (201, True)
        assert (await admin.ask("GET", "keys", key=made["secret"]))[0] == 200
        assert (await admin.ask("GET", "keys", key=ADMIN))[0] == 401


async def test_keys_of_the_configuration_are_changed_there(tmp_path: Path) -> None:
    text = "server: {api_key: {user: sk-config-user-0123456789}}\n" + CONFIG
    async with administering(tmp_path, text) as admin:
        # (Its ring is made of the file alone; what the configuration says is known.)
        status, message = await admin.refused("DELETE", "keys/user")
        assert (status, "config" in message) == (409, True)
        assert (await admin.refused("POST", "keys", {"name": "user"}))[0] == 409


async def test_a_keys_file_that_is_broken_is_not_edited(tmp_path: Path) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        (tmp_path / "keys.txt").write_text(KEYS + "sk-x rps=fast\n")
        status, message = await admin.refused("POST", "keys", {"name": "x"})
        assert (status, "rps must be" in message) == (409, True)
        admin.gateway.parts.doors.ring.poll()
        assert "rps must be" in (await admin.get("keys"))["problem"]


# --- the configuration -----------------------------------------------------------


async def test_the_text_is_shown_without_secrets_and_saved_with_them(
    tmp_path: Path,
) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        path = tmp_path / "config.yaml"
        path.chmod(0o640)
        found = await admin.get("config")
        assert found["path"] == str(path) and found["can_save"] is True
        assert found["text"] == CONFIG.replace("hush-hush-hush", '"***"')
        text = found["text"].replace("{level: info}", "{level: warn}  # quiet")
        body = {"text": text, "revision": found["revision"]}
        status, saved = await admin.ask("PUT", "config", body)
        assert (status, saved["reloaded"], saved["restart"]) == (200, False, [])
        after = CONFIG.replace("{level: info}", "{level: warn}  # quiet")
        assert path.read_text() == after
        backup = tmp_path / "config.yaml.bak"
        assert saved["backup"] == str(backup) and backup.read_text() == CONFIG
        assert [stat.S_IMODE(p.stat().st_mode) for p in (path, backup)] == [0o640] * 2
        assert sorted(os.listdir(tmp_path)) == sorted(
            ["config.yaml", "config.yaml.bak", "keys.txt"]
        )
        # Somebody who still has the old text must not undo this.
        status, message = await admin.refused("PUT", "config", body)
        assert (status, "changed since" in message) == (409, True)
        body = {"text": text, "revision": saved["revision"], "reload": True}
        status, saved = await admin.ask("PUT", "config", body)
        assert (saved["reloaded"], admin.life.reloads) == (True, 1)


async def test_a_text_with_errors_is_told_what_they_are_and_not_saved(
    tmp_path: Path,
) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        text = CONFIG.replace("log:", "lgo:").replace("type: echo", "type: ehco")
        found = (await admin.ask("POST", "config/check", {"text": text}))[1]
        assert found["ok"] is False
        errors = {one["path"]: one["message"] for one in found["errors"]}
        assert errors["backends[0].type"].endswith("did you mean echo?")
        assert errors["lgo"].startswith("unknown key")
        status, answer = await admin.ask("PUT", "config", {"text": text})
        assert (status, answer["error"]["code"]) == (400, "invalid_config")
        assert {one["path"] for one in answer["error"]["problems"]} == set(errors)
        assert (tmp_path / "config.yaml").read_text() == CONFIG
        lines = {one["path"]: one["line"] for one in found["errors"]}
        there = {
            "backends[0].type": text[: text.index("type: ehco")].count("\n") + 1,
            "lgo": text[: text.index("lgo:")].count("\n") + 1,
        }
        assert lines | there == lines
        # Also where half a text has stars in it that would mean nothing there.
        text = masked(CONFIG) + "\nqueue: ["
        (error,) = (await admin.ask("POST", "config/check", {"text": text}))[1][
            "errors"
        ]
        assert (error["path"], error["line"]) == ("", text.count("\n") + 1)
        text = "a: [\nb: c"
        (error,) = (await admin.ask("POST", "config/check", {"text": text}))[1][
            "errors"
        ]
        assert (error["path"], error["line"]) == ("", 2)


async def test_what_would_change_is_shown_before_it_is_saved(tmp_path: Path) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        text = CONFIG.replace("level: info", "level: info, format: text").replace(
            "hush-hush-hush", "another-secret"
        )
        found = (await admin.ask("POST", "config/check", {"text": text}))[1]
        assert (found["ok"], found["restart"]) == (True, ["log.format"])
        assert "+log: {level: info, format: text}" in found["diff"]
        assert "another-secret" not in json.dumps(found)
        assert "hush-hush-hush" not in json.dumps(found)


@pytest.mark.parametrize(
    ("change", "protected"),
    [
        ("server: {port: 1234}", "server.port"),
        ("admin: {tasks: {x: rm -rf /}}", "admin.tasks.x"),
        ("admin: {edit_commands: true}", "admin.edit_commands"),
        ("llama: {exe: /bin/sh}", "llama.exe"),
    ],
)
async def test_protected_parts_are_changed_only_where_that_is_allowed(
    tmp_path: Path, change: str, protected: str
) -> None:
    body = {"text": f"{CONFIG}{change}\n"}
    async with administering(tmp_path, CONFIG) as admin:
        found = (await admin.ask("POST", "config/check", body))[1]
        assert (found["ok"], found["protected"]) == (True, [protected])
        status, answer = await admin.ask("PUT", "config", body)
        assert (status, answer["error"]["protected"]) == (403, [protected])
        assert (tmp_path / "config.yaml").read_text() == CONFIG
    allowed = f"{CONFIG}admin: {{edit_commands: true}}\n"
    if "admin:" not in change:
        async with administering(tmp_path, allowed) as admin:
            body = {"text": f"{allowed}{change}\n"}
            assert (await admin.ask("PUT", "config", body))[0] == 200


@pytest.mark.parametrize(
    ("change", "protected"),
    [
        ("swap: SECRETS", "swap"),
        ("auth: {keys_file: SECRETS}", "auth.keys_file"),
        ('queue: {timeout: "${env.WORD}"}', "queue.timeout"),
        ('swap: {models: {x: {cmd: c, proxy: "${env.WORD}"}}}', "swap.models"),
    ],
)
async def test_no_file_or_variable_is_read_out_where_none_may_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, protected: str
) -> None:
    monkeypatch.setenv("WORD", "open-sesame")
    secrets = tmp_path / "token"
    secrets.write_text("rumpelstilzchen=1: open-sesame open-sesame\n")
    async with administering(tmp_path, CONFIG) as admin:
        body = {"text": f"{CONFIG}{change.replace('SECRETS', str(secrets))}\n"}
        status, found = await admin.ask("POST", "config/check", body)
        assert (status, found["errors"]) == (200, [])
        assert found["protected"][0].startswith(protected)
        assert "open-sesame" not in json.dumps(found)
        status, refused = await admin.ask("PUT", "config", body)
        assert status == 403 and "open-sesame" not in json.dumps(refused)


async def test_stars_where_no_secret_was_are_told(tmp_path: Path) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        text = CONFIG.replace("name: echo", "name: other").replace(
            "hush-hush-hush", '"***"'
        )
        status, answer = await admin.ask("PUT", "config", {"text": text})
        assert status == 400
        assert answer["error"]["problems"][0]["path"] == "backends[other].api_key"


async def test_a_link_stays_and_its_target_is_saved(tmp_path: Path) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        real = tmp_path / "real"
        real.mkdir()
        path = tmp_path / "config.yaml"
        path.rename(real / "mine.yaml")
        path.symlink_to(real / "mine.yaml")
        text = CONFIG.replace("info", "debug")
        status, saved = await admin.ask("PUT", "config", {"text": text})
        assert (status, saved["backup"]) == (200, str(real / "mine.yaml.bak"))
        assert path.is_symlink() and (real / "mine.yaml").read_text() == text


async def test_odd_texts_are_refused_in_words(tmp_path: Path) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        for text in ("\0", "x: \ue000", "a: " + "[" * 100, "- " * 9, "x" * 600_000):
            status, answer = await admin.ask("PUT", "config", {"text": text})
            assert (status, answer["error"]["code"]) == (400, "invalid_config"), text
        assert (await admin.refused("PUT", "config", {}))[0] == 400
        assert (tmp_path / "config.yaml").read_text() == CONFIG


async def test_a_file_that_was_spoiled_by_hand_can_be_seen_and_mended(
    tmp_path: Path,
) -> None:
    async with administering(tmp_path, CONFIG) as admin:
        path = tmp_path / "config.yaml"
        path.write_bytes(CONFIG.encode() + b"\xff: [")
        found = await admin.get("config")
        assert "hush-hush-hush" not in found["text"]
        status, message = await admin.refused("POST", "reload")
        assert (status, "UTF-8" in message) == (400, True)
        # Nothing can be compared with it, so whoever may not change all of it may
        # change nothing of it that is protected.
        text = CONFIG.replace("hush-hush-hush", "typed")
        assert (await admin.ask("PUT", "config", {"text": text}))[0] == 200
        assert path.read_text() == text


# --- a life of its own -----------------------------------------------------------


async def _ask(
    daemon: daemons.Daemon, method: str, path: str, body: Any = None
) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    url = f"{daemon.url}/admin/api/{path}"
    async with daemon.client.request(method, url, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


def _keys(folder: Path) -> None:
    keys = folder / "keys.txt"
    keys.touch(mode=0o600)
    keys.write_text(f"{daemons.KEY} name=alice\n{ADMIN} name=root role=admin\n")


async def test_who_watches_with_a_key_that_is_revoked_sees_no_more(
    tmp_path: Path,
) -> None:
    _keys(tmp_path)
    async with FakeEngine("m") as engine:
        daemons.write_config(tmp_path, engine)
        async with (
            daemons.running(tmp_path) as daemon,
            contextlib.AsyncExitStack() as s,
        ):
            body = {"name": "guest", "role": "admin"}
            secret = (await _ask(daemon, "POST", "keys", body))[1]["secret"]

            async def watch(path: str, key: str) -> aiohttp.StreamReader:
                url = f"{daemon.url}/admin/api/{path}"
                headers = {"Authorization": f"Bearer {key}"}
                answer = daemon.client.get(url, headers=headers)
                stream = (await s.enter_async_context(answer)).content
                await stream.readany()
                return stream

            guests = [await watch("events", secret), await watch(LOGS, secret)]
            ours = await watch("events", ADMIN)
            assert (await _ask(daemon, "DELETE", "keys/guest"))[0] == 200
            for stream in guests:
                async with asyncio.timeout(PATIENCE):
                    with pytest.raises(aiohttp.ClientError):
                        while await stream.readany():
                            pass
            # Others watch on, and who makes his own key void gets his answer.
            await next_event(ours)
            assert "secret" in (await _ask(daemon, "POST", "keys/root/rotate"))[1]
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(aiohttp.ClientError):
                    while await ours.readany():
                        pass


async def test_a_daemon_is_reconfigured_and_starts_itself_anew(tmp_path: Path) -> None:
    """Open requests are finished, and process, command and addresses stay."""
    _keys(tmp_path)
    async with FakeEngine("m") as engine, FakeEngine("n") as other:
        slow = Slow()
        engine.behave = slow
        port = free_port()
        daemons.write_config(tmp_path, engine, server={"port": port})
        async with daemons.running(tmp_path) as daemon:
            pid = daemon.process.pid
            _, found = await _ask(daemon, "GET", "config")
            text = found["text"].replace(engine.url, other.url)
            assert text != found["text"]
            body = {"text": text, "reload": True}
            status, saved = await _ask(daemon, "PUT", "config", body)
            assert (status, saved["reloaded"]) == (200, True)
            assert await daemon.models() == ["n"]
            (tmp_path / "config.yaml").write_text("server: {prot: 1}")
            for path in ("reload", "restart"):
                status, answer = await _ask(daemon, "POST", path)
                assert (status, answer["error"]["code"]) == (400, "invalid_config")
                assert answer["error"]["problems"][0]["path"] == "server.prot"
            daemons.write_config(tmp_path, engine, server={"port": port})
            assert (await _ask(daemon, "POST", "reload"))[0] == 200
            async with daemon.post(daemons.STREAM) as streamed:
                assert streamed.status == 200
                assert (await _ask(daemon, "POST", "restart"))[0] == 202
                await daemon.says("restart: 1 open requests may finish")
                slow.go_on.set()
                text = (await streamed.read()).decode()
                assert text.rstrip().endswith("[DONE]")
            await daemon.says("listens on", times=2)
            assert (daemon.process.pid, daemon.process.returncode) == (pid, None)
            assert (await _ask(daemon, "GET", "state"))[1]["health"] == "ready"
            assert await daemon.models() == ["m"]
            daemon.process.terminate()
            assert await daemon.ended() == 0
