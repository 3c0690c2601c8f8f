"""What the certificates of others are held against: backends, relays, ourselves.

The same certificates are good on every Python. Of its own, 3.13 began to refuse those
that are not in RFC 5280's form to the letter (``VERIFY_X509_STRICT``), above all any
that a home-made authority has signed: ``openssl req -x509`` makes it without the key
usage extension. curl and browsers do not ask for it, and what is gained is form only:
names, dates and signatures are always verified.
"""

import ssl
from pathlib import Path


def trusting(ca_file: Path | None = None) -> ssl.SSLContext:
    """A context for the client's end of TLS 1.2 or newer, with HTTP/1.1 in it.

    Args:
        ca_file: certificates (PEM) to trust in place of the system's. Each is trusted
            as it is: an authority, one that another authority has signed, or the
            server's own.

    Raises:
        OSError: it cannot be read, or holds no certificate.
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the default since 3.13
    return context
