"""Certificates that tests make, and which one a server shows."""

import asyncio
import ssl
import subprocess
from pathlib import Path


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
