"""The facts of one start, for whoever reads its greeting: ``greeting`` has the form.

Each server of language models that was found or configured has its line, also those
that can't be used and why; then what this gateway starts itself.
"""

import logging
import os
import sys
from collections.abc import Sequence

from inferencia.app import Parts
from inferencia.backends.base import Backend
from inferencia.catalogue.choosing import Catalogue
from inferencia.config import Loaded
from inferencia.discovery import Found, State
from inferencia.firstkeys import FirstKeys
from inferencia.greeting import Greeting, ServerLine, stop_writing
from inferencia.localmodels import LocalModels
from inferencia.neighbours import ECHO
from inferencia.sockets import Opened

log = logging.getLogger(__name__)


def greet(
    loaded: Loaded,
    parts: Parts,
    first: FirstKeys | None,
    found: Sequence[Found],
    opened: Sequence[Opened],
) -> None:
    """Print the greeting on standard output.

    Args:
        loaded: the configuration as it was read.
        parts: what was made of it.
        first: the two keys, if nobody said which there are.
        found: what runs on this machine, if it was looked for.
        opened: where we listen.
    """
    greeting = Greeting(
        base_url=base_url(opened),
        notes=_notes(loaded, opened),
        source=loaded.source,
        servers=[
            _server_line(backend, parts.catalogue)
            for backend in parts.catalogue.backends
            if not backend.lists_itself
        ]
        + _own_models(parts.local)
        + _not_used(found),
        models=[entry["id"] for entry in parts.catalogue.listing(lambda _: True)],
        user_key=first.user_file if first else None,
        admin_key=first.admin_file if first else None,
        is_open=loaded.config.is_open,
        page=next((f"{o.url}/admin/" for o in opened if o.offers("admin")), ""),
    )
    try:
        greeting.print_to(sys.stdout, os.environ)
    except OSError as error:
        # A pipe that nobody reads or a full disk is no reason to serve nobody.
        log.warning("standard output is not written: %s", error.strerror)
        stop_writing(sys.stdout)


def base_url(opened: Sequence[Opened]) -> str:
    """Where this machine's clients of ``/v1`` are sent."""
    return next((o.url for o in opened if o.offers("openai")), opened[0].url)


def _notes(loaded: Loaded, opened: Sequence[Opened]) -> list[str]:
    """Which address offers only some services, and whom we serve as an agent."""
    notes = [
        f"{one.url}: {', '.join(sorted(one.address.services))}"
        for one in opened
        if one.address is not None and one.address.services is not None
    ]
    relays = loaded.config.tunnel.dial.relays
    return notes + [f"serves {relay} as an agent" for relay in relays]


def _server_line(backend: Backend, catalogue: Catalogue) -> ServerLine:
    if backend.type == ECHO.type:
        return ServerLine("echo", "built in", 1, "answers with your own words")
    where = backend.config.url
    if not backend.is_listed:
        trouble = backend.trouble or "no answer yet"
        return ServerLine(backend.name, where, None, trouble, backend.found_loading)
    count = len(catalogue.models_of(backend))
    return ServerLine(backend.name, where, count, backend.trouble)


def _own_models(local: LocalModels) -> list[ServerLine]:
    """What this gateway starts itself, when it is asked for."""
    lines = []
    if local.found:
        files = "1 GGUF file" if local.found == 1 else f"{local.found} GGUF files"
        where = ", ".join(map(str, local.folders))
        remark = "started when asked for"
        lines.append(ServerLine("llama.cpp", f"{files} in {where}", 1, remark))
    if local.idle_folders:
        where = ", ".join(map(str, local.idle_folders))
        remark = f"no llama-server on the PATH to run the GGUF files in {where}"
        lines.append(ServerLine("llama.cpp", "", None, remark))
    if local.written:
        models = "1 model" if local.written == 1 else f"{local.written} models"
        remark = "started when asked for"
        lines.append(ServerLine("llama-swap", f"{models} of its file", 1, remark))
    return lines


def _not_used(discovered: Sequence[Found]) -> list[ServerLine]:
    """The usual servers that are not there, and those that want a key."""
    lines = []
    for found in discovered:
        if found.state is State.NEEDS_A_KEY:
            remark = "wants a key: configure it under backends"
            lines.append(ServerLine(found.type, found.url, None, remark))
        elif found.state is State.MISSING and found.type != "llamacpp":
            lines.append(
                ServerLine(found.type, "", None, f"nothing on port {found.port}")
            )
    return lines
