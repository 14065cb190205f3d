"""TLS: whom a client trusts, and what the errors mean."""

from __future__ import annotations

import ssl
from typing import Final

from anyio import to_thread

_CLOCK: Final = {9: "is not valid yet", 10: "has expired"}
_OTHER_NAME: Final = (62, 64)
"""OpenSSL's codes for a certificate of another host name, and of another address."""

_MEANINGS: Final = {
    "CERTIFICATE_REQUIRED": (
        "the server wants a certificate of the client's: ssl_context.load_cert_chain() takes one"
    ),
    "WRONG_VERSION_NUMBER": (
        "the peer does not speak TLS there: mqtt:// and ws://, or secure=False, do without"
    ),
}
"""What it means that OpenSSL's words have this in them."""


async def client_context(given: ssl.SSLContext | None) -> ssl.SSLContext:
    """Give the context for a link: one that trusts the system's authorities, if none is given."""
    if given is not None:
        return given
    # Reading the authorities takes long enough to hold up the loop.
    return await to_thread.run_sync(ssl.create_default_context)


def explain(error: ssl.SSLError) -> None:
    """Add to OpenSSL's words what they mean, and what can be done."""
    if meaning := _meaning(error):
        error.strerror = f"{error} ({meaning})"


def _meaning(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _OTHER_NAME:
            return "connect to a name that is in the certificate"
        if error.verify_code in _CLOCK:
            return f"the certificate {_CLOCK[error.verify_code]}, or this clock is wrong"
        return (
            "if the server's authority is one of your own, give "
            "ssl_context=ssl.create_default_context(cafile=...)"
        )
    return next((words for part, words in _MEANINGS.items() if part in str(error)), "")
