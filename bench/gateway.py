"""The gateway under test, with everything on that costs something per request.

``python -m bench.gateway [--uvloop] serve -c FILE`` is ``python -m inferencia`` with
the event loop decided here: the gateway takes uvloop when it is installed, and a
comparison is fair only if yardstick and gateway run on the same loop.
"""

import os
import runpy
import secrets
import socket
import sys
from pathlib import Path

from bench import machine

#: Keys beside the one that is used, as an installation for a small firm has them.
OTHER_KEYS = 100

_CONFIG = """\
server:
  host: 127.0.0.1
  port: {port}
  shutdown_timeout: 2s
auth: {{keys_file: ./keys.txt}}
ratelimit: {{requests_per_second: 1000000, burst: 1000000}}
backends:
  - name: mock
    type: openai
    url: http://127.0.0.1:{mock_port}
routing:
  aliases: {{"gpt-*": bench-model}}
watchdog: {{interval: 5s}}
log: {{level: info, format: json}}
"""

#: The name of a gateway that does not record usage.
WITHOUT_USAGE = "without usage"

#: Limits that are never reached but have to be kept books about.
_LIMITS = (
    "rps=1000000 burst=1000000 tpm=1000000000 concurrency=100000"
    " daily_tokens=100000000000"
)


def new_key() -> str:
    """A key that looks like a real one."""
    return "sk-" + secrets.token_hex(24)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_config(
    folder: Path, *, port: int, mock_port: int, key: str, usage: bool = True
) -> Path:
    """Configuration and keys for one run; the path of the former.

    Args:
        folder: where both go, and the record of usage.
        port: where it is to listen.
        mock_port: of its backend.
        key: the one that will be used.
        usage: whether usage is recorded, as it is unless somebody says otherwise.
    """
    lines = [f"{key} name=bench role=user models=bench-* {_LIMITS}"]
    lines += [f"{new_key()} name=other-{n} role=user" for n in range(OTHER_KEYS)]
    keys = folder / "keys.txt"
    keys.touch(mode=0o600)
    keys.write_text("\n".join(lines) + "\n")
    config = folder / "config.yaml"
    text = _CONFIG.format(port=port, mock_port=mock_port)
    config.write_text(text if usage else f"{text}usage: {{path: off}}\n")
    return config


def environment(folder: Path) -> dict[str, str]:
    """Ours without what would change the gateway's configuration."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("INFERENCIA_", "GI_"))
    }
    env["INFERENCIA_STATE"] = str(folder)
    return env


def logged_requests(folder: Path) -> int:
    """How many JSON lines about chat requests the gateways of a run have written."""
    found = 0
    for log in folder.glob("*/log"):
        with log.open(errors="replace") as lines:
            found += sum(
                line.startswith("{") and "/v1/chat/completions" in line
                for line in lines
            )
    return found


def _main() -> None:
    arguments = sys.argv[1:]
    if "--uvloop" in arguments:
        arguments.remove("--uvloop")
    elif machine.has_uvloop():
        # ``None`` makes an import fail as if the package were not installed.
        sys.modules["uvloop"] = None  # type: ignore[assignment]
    sys.argv = ["inferencia", *arguments]
    runpy.run_module("inferencia", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
