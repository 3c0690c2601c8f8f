"""The certificate that clients see, followed while the daemon runs.

``Certificate`` reads its two PEM files again when they change, as certbot and acme.sh
change them. New connections get the new certificate; a broken pair leaves the old one
in force and says so.
"""

import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

_Signature = tuple[tuple[int, int, int], ...]


class CertificateError(Exception):
    """The files hold no usable pair. ``str()`` names the file and the fault."""


class Certificate:
    """A certificate with its key, and the context for connections that use it."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Read both files.

        Args:
            cert: PEM, the server's own certificate first, then the chain.
            key: PEM, not encrypted.

        Raises:
            CertificateError: they cannot be used.
        """
        self._cert = cert
        self._key = key
        self._seen = self._signature()
        self.context = self._load(_new_context())

    def poll(self) -> bool:
        """Take over changed files; to be called every few seconds.

        Returns:
            True if another certificate is in force now.
        """
        seen = self._signature()
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            # Tried on a context of its own: half a pair must not get into force.
            self._load(_new_context())
            self._load(self.context)
        except CertificateError as error:
            log.error("%s; the certificate from before stays in force", error)
            return False
        log.info("the certificate in %s was read again", self._cert)
        return True

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or str(error)
            files = f"{self._cert} and {self._key}"
            raise CertificateError(f"cannot use {files}: {reason}") from error
        except ValueError as error:
            raise CertificateError(f"cannot use {self._key}: {error}") from error
        return context

    def _signature(self) -> _Signature:
        stats = []
        for path in (self._cert, self._key):
            try:
                stat = path.stat()
            except OSError:
                stats.append((0, 0, 0))
            else:
                stats.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return tuple(stats)


def _new_context() -> ssl.SSLContext:
    """TLS 1.2 and newer with the library's own choice of ciphers (RFC 9325)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _no_password() -> str:
    # Without this, OpenSSL would ask on the terminal and wait for an answer.
    raise ValueError("the key is encrypted; a daemon needs one that is not")
