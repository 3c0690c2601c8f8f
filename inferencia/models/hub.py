"""What a server of the Hugging Face layout holds, and the bytes of its files.

    GET /api/models/OWNER/NAME/tree/main?recursive=true    the listing, in pages
    GET /OWNER/NAME/resolve/main/PATH                      a file, by way of redirects

The server is ``$HF_ENDPOINT``, or huggingface.co. A token is sent to that server alone,
never to where it redirects to, and never over a network without TLS. Redirects are
followed by hand for that, are bounded, and never lead from https to http.

Errors are of two kinds: ``Fault`` is over soon, perhaps, and worth another attempt (the
network, a server that is busy); ``DownloadError`` says what a person must do.
"""

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from inferencia import __version__
from inferencia.backends.listing import parse_json
from inferencia.models.choice import DownloadError, Reference, RemoteFile, remote_file
from inferencia.secret import Secret
from inferencia.trust import trusting

DEFAULT_ENDPOINT = "https://huggingface.co"

# Silence for longer than this means that the connection is dead (the client of Hugging
# Face gives up after 10 s, which slow lines do not deserve).
SILENCE_SECONDS = 60.0
CONNECT_SECONDS = 30.0

# A real file is behind two or three.
MAX_REDIRECTS = 10

# A page lists 1,000 files, in about 400 bytes each.
MAX_PAGES = 50
MAX_PAGE_BYTES = 16 * 1024 * 1024

# Whoever asks us to wait for longer is not waited for.
MAX_RETRY_AFTER_SECONDS = 120.0

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


class Fault(Exception):
    """Something went wrong that may not go wrong again; ``str()`` says what."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait  # seconds that the server asked us to stay away


class Refused(DownloadError):
    """The server does not give it: it is not there, or not for us."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Which server, and who we are to it."""

    url: str = DEFAULT_ENDPOINT
    token: Secret | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Endpoint":
        """``$HF_ENDPOINT`` and ``$HF_TOKEN``; each may be missing or empty.

        Raises:
            DownloadError: the address is none.
        """
        text = env.get("HF_ENDPOINT", "").strip().rstrip("/") or DEFAULT_ENDPOINT
        try:
            url = URL(text)
            is_good = url.scheme in ("http", "https") and bool(url.host)
        except ValueError:
            is_good = False
        if not is_good or url.query_string or url.fragment or url.user:
            raise DownloadError(
                f"HF_ENDPOINT: expected an address such as {DEFAULT_ENDPOINT}"
            )
        token = env.get("HF_TOKEN", "").strip()
        if token and not (token.isascii() and token.isprintable()):
            raise DownloadError("HF_TOKEN holds what no token holds")
        return cls(text, Secret(token) if token else None)

    @property
    def shows_token(self) -> bool:
        """Whether a token may be sent: nobody in between can read it."""
        url = URL(self.url)
        return url.scheme == "https" or _is_loopback(url)


@dataclass(slots=True)
class Body:
    """The answer to a request for a file: where its bytes begin, and they."""

    start: int
    response: aiohttp.ClientResponse
    etag: str | None  # a strong one, to ask for the rest of exactly this

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes, as they come.

        Raises:
            Fault: the connection broke, or nothing came for too long.
        """
        try:
            while data := await self.response.content.readany():
                yield data
        except _BROKEN as error:
            raise _fault(error, self.response.url) from error


# What aiohttp raises when the network fails. A TimeoutError among them is the silence.
_BROKEN = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError)


class Hub:
    """One server; ``async with`` opens and closes its connections."""

    def __init__(self, endpoint: Endpoint, *, silence: float = SILENCE_SECONDS) -> None:
        self._endpoint = endpoint
        self._base = URL(endpoint.url)
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=min(silence, CONNECT_SECONDS), sock_read=silence
        )
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=trusting()),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={
                "User-Agent": f"inferencia/{__version__}",
                "Accept-Encoding": "identity",
            },
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def files(self, reference: Reference) -> list[RemoteFile]:
        """The GGUF files of a repository.

        Raises:
            Fault: try again.
            DownloadError: there is no such repository, or it is closed to us.
        """
        path = f"/api/models/{reference.repository}/tree/main"
        query: Mapping[str, str] | None = {"recursive": "true"}
        found: list[RemoteFile] = []
        for _ in range(MAX_PAGES):
            url = self._url(path).with_query(query)
            async with self._get(url, {}, f"{reference.repository}") as response:
                entries = await _json(response)
                query = _next_query(response)
            if not isinstance(entries, list):
                raise DownloadError(
                    f"{self._base} does not answer as Hugging Face does; "
                    "is HF_ENDPOINT right?"
                )
            found += [file for entry in entries if (file := remote_file(entry))]
            if query is None:
                return found
        raise DownloadError(f"{reference.repository} has too many files")

    @contextlib.asynccontextmanager
    async def open(
        self, reference: Reference, file: RemoteFile, start: int, etag: str | None
    ) -> AsyncIterator[Body]:
        """A file's bytes, from ``start`` if the server can do that, else all.

        Args:
            etag: of what we have already, if nothing better tells one content from
                another; with it, a file that has changed comes from its beginning.

        Raises:
            Fault: try again.
            DownloadError: it cannot be had, or is not what was listed.
        """
        headers = {}
        if start:
            headers["Range"] = f"bytes={start}-"
            if etag:
                headers["If-Range"] = etag
        url = self._url(f"/{reference.repository}/resolve/main/{quote(file.path)}")
        async with self._get(url, headers, file.name) as response:
            begins = _start_of(response, file, start)
            tag = response.headers.get("ETag", "")
            yield Body(begins, response, tag if tag.startswith('"') else None)

    def _url(self, path: str) -> URL:
        return URL(f"{self._endpoint.url}{path}", encoded=True)

    @contextlib.asynccontextmanager
    async def _get(
        self, url: URL, headers: Mapping[str, str], what: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer of whichever server has it in the end."""
        assert self._session is not None, "used outside of async with"
        for _ in range(MAX_REDIRECTS + 1):
            try:
                response = await self._session.get(
                    url,
                    headers={**headers, **self._credentials(url)},
                    allow_redirects=False,
                    proxy=_proxy(url),
                )
            except (aiohttp.ClientConnectorCertificateError, ssl.SSLError) as error:
                raise DownloadError(f"{url.host}: {error}") from error
            except _BROKEN as error:
                raise _fault(error, url) from error
            except (aiohttp.ClientError, ValueError) as error:
                raise DownloadError(f"{url.host}: {_words(error)}") from error
            try:
                if response.status not in _REDIRECTS:
                    self._refuse(response, what)
                    yield response
                    return
                url = redirected(url, response.headers.get("Location", ""))
            finally:
                # What has not been read is of no use, and may be gigabytes.
                response.close()
        raise DownloadError(f"{what}: more than {MAX_REDIRECTS} redirects")

    def _credentials(self, url: URL) -> dict[str, str]:
        token = self._endpoint.token
        if token and url.origin() == self._base.origin() and self._endpoint.shows_token:
            return {"Authorization": f"Bearer {token.reveal()}"}
        return {}

    def _refuse(self, response: aiohttp.ClientResponse, what: str) -> None:
        """Raise what an answer's status means, unless it is good."""
        status, host = response.status, response.url.host
        if status in (200, 206):
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise DownloadError(f"{host} sends {what} compressed, unasked")
            return
        if status in _BUSY:
            wait = _retry_after(response)
            if wait > MAX_RETRY_AFTER_SECONDS:
                raise Refused(f"{host} answers {status}: try again in {wait:.0f} s")
            raise Fault(f"{host} answers {status}", wait)
        raise Refused(self._reason(response, what))

    def _reason(self, response: aiohttp.ClientResponse, what: str) -> str:
        status, host = response.status, response.url.host
        if response.url.origin() != self._base.origin():
            return f"{host}, where {what} is kept, answers {status}"
        if response.headers.get("X-Error-Code") == "GatedRepo":
            page = f"{self._endpoint.url}/{what}" if "/" in what else self._endpoint.url
            remedy = "set HF_TOKEN to your token" if status == 401 else "ask for access"
            return f"{what} is only for those who were let in: see {page} and {remedy}"
        if status in (401, 403):
            if self._endpoint.token is None:
                said = "or set HF_TOKEN if it is private"
            elif not self._endpoint.shows_token:
                said = "HF_TOKEN was not sent, because the address is not https"
            else:
                said = "or HF_TOKEN is not good for it"
            return f"{what} is not at {host} ({status}), {said}"
        if status == 416:
            return f"{what} is not what was listed; it may just have been replaced"
        if status == 404:
            return f"{what} is not at {host} (404)"
        return f"{host} answers {status} for {what}"


def _is_loopback(url: URL) -> bool:
    host = url.host or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _proxy(url: URL) -> str | None:
    """The proxy that the environment names for an address.

    Not aiohttp's ``trust_env``, which sends passwords of ~/.netrc along, too.
    """
    if _is_loopback(url) or not url.host or proxy_bypass(url.host):
        return None
    proxies = getproxies()
    return proxies.get(url.scheme) or proxies.get("all")


def redirected(url: URL, location: str) -> URL:
    """Where ``location``, said by ``url``, leads.

    Raises:
        DownloadError: to nowhere, or out of the protection of TLS.
    """
    try:
        # A signed address counts as it is written.
        target = url.join(URL(location, encoded=True))
        is_good = bool(location) and target.scheme in ("http", "https")
    except ValueError:
        is_good = False
    if not is_good or not target.host:
        raise DownloadError(f"{url.host} redirects to nowhere")
    if url.scheme == "https" and target.scheme != "https":
        raise DownloadError(
            f"{url.host} redirects to {target.host} without TLS, which is not followed"
        )
    return target


def _retry_after(response: aiohttp.ClientResponse) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if re.fullmatch("[0-9]{1,6}", text) else 0.0


async def _json(response: aiohttp.ClientResponse) -> Any:
    try:
        body = await response.content.readexactly(MAX_PAGE_BYTES + 1)
    except asyncio.IncompleteReadError as whole:
        body = whole.partial
    except _BROKEN as error:
        raise _fault(error, response.url) from error
    if len(body) > MAX_PAGE_BYTES:
        raise DownloadError(f"{response.url.host} sends a list that does not end")
    try:
        return parse_json(body)
    except ValueError:
        return None


def _next_query(response: aiohttp.ClientResponse) -> Mapping[str, str] | None:
    """The query of the next page; host and path stay ours, whatever a mirror says."""
    try:
        link = response.links.get("next")
        return None if link is None else dict(URL(str(link["url"])).query)
    except (KeyError, ValueError):
        return None


def _start_of(response: aiohttp.ClientResponse, file: RemoteFile, asked: int) -> int:
    """Which byte of the file an answer begins with.

    Raises:
        DownloadError: it is no part of the file that was listed.
    """
    changed = f"{file.name} is not what was listed; it may just have been replaced"
    if response.status == 200:
        length = response.content_length
        if length is not None and length != file.size:
            raise DownloadError(f"{changed} ({length} bytes, not {file.size})")
        return 0
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != asked or not asked:
        raise DownloadError(
            f"{response.url.host} sends another part than was asked for"
        )
    if found[3] not in ("*", str(file.size)):
        raise DownloadError(f"{changed} ({found[3]} bytes, not {file.size})")
    return asked


def _fault(error: Exception, url: URL) -> Fault:
    if isinstance(error, TimeoutError):
        return Fault(f"{url.host} is silent")
    return Fault(f"{url.host}: {_words(error)}")


def _words(error: Exception) -> str:
    """What happened, without the names of Python's classes around it."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    text = getattr(cause, "strerror", None) or str(cause)
    return text or "the connection broke"
