"""Certificates: what is served, and what changing the files does."""

import asyncio
import ssl
from pathlib import Path

import pytest

from certificates import make_pair, served_name
from inferencia.tls import Certificate, CertificateError


async def test_a_changed_certificate_is_served_to_new_connections(
    tmp_path: Path,
) -> None:
    cert, key = make_pair(tmp_path, "old.example")
    certificate = Certificate(cert, key)
    server = await asyncio.start_server(
        lambda reader, writer: writer.close(),
        "127.0.0.1",
        0,
        ssl=certificate.context,
    )
    port = server.sockets[0].getsockname()[1]
    async with server:
        assert await served_name(port) == "old"
        assert not certificate.poll()
        make_pair(tmp_path, "new.example")
        assert certificate.poll()
        assert await served_name(port) == "new"
        for broken in (b"", b"-----BEGIN CERTIFICATE-----\nxx\n"):
            cert.write_bytes(broken)
            assert not certificate.poll()
            assert await served_name(port) == "new"
        cert.unlink()
        assert not certificate.poll()
        assert await served_name(port) == "new"


def test_a_pair_that_does_not_match_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    cert, _ = make_pair(tmp_path / "a", "a.example")
    _, key = make_pair(tmp_path / "b", "b.example")
    with pytest.raises(CertificateError, match=r"cert\.pem"):
        Certificate(cert, key)


def test_an_encrypted_key_is_refused_instead_of_asking(tmp_path: Path) -> None:
    cert, key = make_pair(tmp_path, "a.example", "-passout", "pass:secret")
    with pytest.raises(CertificateError, match="encrypted"):
        Certificate(cert, key)


def test_old_versions_of_tls_are_not_spoken(tmp_path: Path) -> None:
    context = Certificate(*make_pair(tmp_path, "a.example")).context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
