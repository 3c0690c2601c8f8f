"""Certificates: what is served, and what changing the files does."""

import asyncio
import ssl
import subprocess
from pathlib import Path

import pytest

from inferencia.tls import Certificate, CertificateError


def make_pair(folder: Path, name: str, *extra: str) -> tuple[Path, Path]:
    """A self-signed certificate for ``name``, made by openssl."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 "
        f"-subj /CN={name} -addext subjectAltName=DNS:{name}"
    )
    subprocess.run(
        [*command.split(), *(extra or ("-nodes",)), "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )
    return cert, key


async def served_name(port: int) -> str:
    """The subject of the certificate that a new connection gets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    # Waiting for the close would wait for the peer's; the test is done with it.
    return "new" if b"new.example" in der else "old"


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
