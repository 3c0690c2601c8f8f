"""Whose certificates are trusted: the same on every Python."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from inferencia.trust import trusting

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="no openssl here"
)

NAME = "gpu.home"
PACKAGE = Path(__file__).resolve().parent.parent / "inferencia"


def openssl(folder: Path, command: str) -> None:
    subprocess.run(
        ["openssl", *command.split()], check=True, capture_output=True, cwd=folder
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority and a server's certificate, made as the tutorials make them.

    No configuration of openssl's adds anything: the authority is without the extension
    "key usage", the server's certificate without "authority key identifier".
    """
    made = tmp_path_factory.mktemp("home")
    (made / "plain.conf").write_text(
        "[req]\ndistinguished_name=d\n[d]\n"
        "[authority]\nbasicConstraints=CA:TRUE\nsubjectKeyIdentifier=hash\n"
        f"[server]\nsubjectAltName=DNS:{NAME}\n"
    )
    new = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config plain.conf"
    authority = "-x509 -days 2 -subj /CN=Home -extensions authority"
    openssl(made, f"req {authority} {new} -keyout ca.key -out ca.pem")
    openssl(made, f"req {new} -subj /CN={NAME} -keyout key.pem -out request.pem")
    openssl(
        made,
        "x509 -req -days 2 -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial "
        "-extfile plain.conf -extensions server -out cert.pem",
    )
    openssl(made, f"req {authority} {new} -keyout other.key -out other.pem")
    return made


def agreed(client: ssl.SSLContext, folder: Path, name: str) -> str | None:
    """Shake hands in memory; the version that both ends agree on.

    Raises:
        ssl.SSLCertVerificationError: the client refuses the certificate.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(down, up, server_hostname=name)
    far = server.wrap_bio(up, down, server_side=True)
    for end in (near, far, near, far):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return near.version()


def test_a_home_made_authority_is_good_enough(folder: Path) -> None:
    assert agreed(trusting(folder / "ca.pem"), folder, NAME) == "TLSv1.3"


def test_a_servers_own_certificate_can_be_trusted_alone(folder: Path) -> None:
    assert agreed(trusting(folder / "cert.pem"), folder, NAME) == "TLSv1.3"


def test_another_name_is_refused(folder: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        agreed(trusting(folder / "ca.pem"), folder, "other.home")


def test_another_authority_of_the_same_name_is_refused(folder: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        agreed(trusting(folder / "other.pem"), folder, NAME)


def test_the_system_does_not_trust_a_home_made_authority(folder: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        agreed(trusting(), folder, NAME)


def test_everybody_asks_here_for_trust() -> None:
    asking = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if "create_default_context" in path.read_text(encoding="utf-8")
    ]
    assert asking == ["trust.py"]
