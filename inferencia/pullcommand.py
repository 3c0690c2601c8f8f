"""``inferencia models pull``: a download as a person sees it.

A terminal gets a bar that moves, with rate and time left; anything else gets a plain
line every few seconds. Ctrl-C ends it and says what is kept and how to go on. The
work itself is ``models.download``.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from inferencia import folders
from inferencia.config import Loaded
from inferencia.keycommands import BAD_USAGE, DONE, FAILED
from inferencia.localmodels import model_folders
from inferencia.models.choice import NoSuchModel, parse_reference
from inferencia.models.download import (
    Download,
    Downloaded,
    DownloadError,
    Endpoint,
    Phase,
    Progress,
    size_text,
)
from inferencia.models.finding import find_models
from inferencia.models.naming import PARTIAL_SUFFIX

# A bar that moves five times a second looks alive; a log needs a line now and then.
BAR_SECONDS = 0.2
LINE_SECONDS = 5.0

_BAR_WIDTH = 24
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def run(
    reference: str,
    loaded: Loaded,
    env: Mapping[str, str],
    *,
    out: TextIO,
    err: TextIO,
) -> int:
    """Download a model and say where it is; returns the exit code.

    Args:
        reference: ``OWNER/NAME[:QUANT]``.
        loaded: the configuration; the first ``models_dir`` is used, else ~/models.
        env: for ``HF_ENDPOINT``, ``HF_TOKEN`` and the home folder.
        out: gets the model's name and path.
        err: gets everything else.

    Raises:
        OSError: nobody reads ``out``, or this user has no home.
    """
    try:
        asked = parse_reference(reference)
        endpoint = Endpoint.from_env(env)
    except DownloadError as error:
        err.write(f"inferencia: {error}\n")
        return BAD_USAGE
    into = target_folder(loaded, env)
    download = Download(asked, into=into, endpoint=endpoint)
    try:
        done = asyncio.run(_watched(download, Display(err)))
    except NoSuchModel as error:
        err.write(f"inferencia: {error}\n")
        width = max((len(name) for name, _ in error.choices), default=0)
        for name, size in error.choices:
            err.write(f"  {name:<{width}}  {size_text(size)}\n")
        return FAILED
    except DownloadError as error:
        err.write(f"inferencia: {error}\n")
        return FAILED
    except asyncio.CancelledError:
        again = f"inferencia models pull {asked}{_named(loaded, env)}"
        err.write(_stopped(download.progress, into, again))
        return FAILED
    out.write(_said(done, into))
    err.write(_hint(done, into, loaded, env))
    return DONE


def target_folder(loaded: Loaded, env: Mapping[str, str]) -> Path:
    """The first ``models_dir``, else ``~/models``.

    Raises:
        OSError: this user has no home.
    """
    configured = loaded.config.models_dir
    return configured[0] if configured else folders.home(env) / "models"


async def _watched(download: Download, display: "Display") -> Downloaded:
    """Run a download and show how it goes; a signal ends it as a cancellation."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(download.run())
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        while not task.done():
            display.show(download.progress)
            await asyncio.wait([task], timeout=display.seconds)
        return await task
    finally:
        display.clear()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _said(done: Downloaded, into: Path) -> str:
    """The name under which the model can be asked for, and where it is."""
    # A folder of the user's is searched itself; see ``naming``.
    found = find_models([into]).models
    named = [model for model in found if model.path == done.model]
    name = named[0].name if named else done.model.name
    lines = f"{name}  {size_text(done.size)}  {done.model}\n"
    if named and named[0].error:
        lines += f"but: {named[0].error}\n"
    return lines


def _hint(done: Downloaded, into: Path, loaded: Loaded, env: Mapping[str, str]) -> str:
    """What to do to use it."""
    lines = "" if done.fetched else "it was here already, and is as it should be\n"
    if not done.is_verified:
        lines += "the server gave no checksum; only the sizes were compared\n"
    if into in model_folders(loaded.config, env):
        lines += "a running gateway that looks there offers it within 5 seconds\n"
    elif loaded.source is not None:
        lines += f"to serve it, put this into {loaded.source}: models_dir: [{into}]\n"
    else:
        lines += "to serve it, install llama-server (of llama.cpp) on PATH\n"
    return lines


def _stopped(progress: Progress, into: Path, again: str) -> str:
    if progress.done == 0:
        return "stopped; nothing was downloaded yet\n"
    return (
        f"stopped; {size_text(progress.done)} of {size_text(progress.size)} are kept "
        f"in {into} (*{PARTIAL_SUFFIX})\n"
        f"go on with: {again}\n"
    )


def _named(loaded: Loaded, env: Mapping[str, str]) -> str:
    """``-c FILE``, if the configuration is not the one that is found by itself."""
    if loaded.source in (None, folders.find_config(None, env)):
        return ""
    return f" -c {loaded.source}"


@dataclass(slots=True)
class Display:
    """Progress, as whoever reads ``stream`` can use it."""

    stream: TextIO
    _shown: str = ""  # the last line, without the numbers that always change

    @property
    def is_terminal(self) -> bool:
        return self.stream.isatty()

    @property
    def seconds(self) -> float:
        """How long to wait until the next look."""
        return BAR_SECONDS if self.is_terminal else LINE_SECONDS

    def show(self, progress: Progress) -> None:
        """Show it, unless it is what was shown last."""
        if self.is_terminal:
            width = _terminal_width(self.stream) - 1
            line = bar(progress, width, can_draw=_can_draw(self.stream))
            self.stream.write(f"\r{line[:width]:<{width}}")
        elif (line := plain(progress)) != self._shown:
            self._shown = line
            self.stream.write(f"{line}\n")
        self.stream.flush()

    def clear(self) -> None:
        """Take the bar away."""
        if self.is_terminal:
            width = _terminal_width(self.stream) - 1
            self.stream.write(f"\r{'':<{width}}\r")
            self.stream.flush()


def bar(progress: Progress, width: int, *, can_draw: bool) -> str:
    """One line of at most ``width`` columns, as far as that can be."""
    if progress.phase is Phase.LISTING:
        return "asking what there is ..."
    if progress.phase is Phase.WAITING:
        return f"{progress.note} ..."
    share = progress.done / progress.size if progress.size else 1.0
    figures = _figures(progress)
    drawn = _drawn(share) if can_draw else f"[{_plain_bar(share)}]"
    room = width - len(figures) - len(drawn) - 2
    if room < 8:  # narrow: the figures matter most
        return figures
    name = _name(progress)
    if len(name) > room:
        name = f"{name[: room - 3]}..."
    return f"{name} {drawn} {figures}"


def plain(progress: Progress) -> str:
    """The same for a log."""
    if progress.phase is Phase.LISTING:
        return "asking what there is"
    if progress.phase is Phase.WAITING:
        return progress.note
    return f"{_name(progress)}: {_figures(progress)}"


def _name(progress: Progress) -> str:
    number = f"{progress.number}/{progress.files} " if progress.files > 1 else ""
    doing = "checking " if progress.phase is Phase.CHECKING else ""
    return f"{number}{doing}{progress.file}"


def _figures(progress: Progress) -> str:
    share = int(100 * progress.done / progress.size) if progress.size else 100
    text = f"{share:3} %  {size_text(progress.done)} of {size_text(progress.size)}"
    if progress.rate:
        text += f"  {size_text(progress.rate)}/s"
    if progress.seconds_left is not None:
        text += f"  {_left(progress.seconds_left)} left"
    return text


def _left(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    if hours > 99:
        return "days"
    if hours:
        return f"{hours}:{rest // 60:02} h"
    return f"{rest // 60}:{rest % 60:02}"


def _drawn(share: float) -> str:
    eighths = round(share * _BAR_WIDTH * 8)
    full, part = divmod(eighths, 8)
    return f"▕{('█' * full + _EIGHTHS[part] * (part > 0)):<{_BAR_WIDTH}}▏"


def _plain_bar(share: float) -> str:
    return f"{'#' * round(share * _BAR_WIDTH):<{_BAR_WIDTH}}"


def _can_draw(stream: TextIO) -> bool:
    try:
        "█▏".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _terminal_width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns
