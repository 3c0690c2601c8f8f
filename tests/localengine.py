"""A folder of models and a ``llama-server`` for them, both of them false."""

import shlex
from pathlib import Path

from fakeserver import COMMAND
from ggufs import write_gguf


def llama_server(folder: Path, *options: str) -> Path:
    """An executable that takes llama-server's arguments and is ``fakeserver.py``.

    Args:
        folder: where it is written.
        options: more of ``fakeserver.py``'s.
    """
    path = folder / "llama-server"
    path.write_text(f'#!/bin/sh\nexec {shlex.join([*COMMAND, *options])} "$@"\n')
    path.chmod(0o755)
    return path


def models(folder: Path, *names: str) -> Path:
    """A folder with GGUF files of these names."""
    folder.mkdir(exist_ok=True)
    for name in names:
        write_gguf(folder / f"{name}.gguf", name=name)
    return folder
