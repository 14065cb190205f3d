"""TLS contexts, and explanations of TLS errors."""

from __future__ import annotations

import ssl
from typing import Final

from anyio import to_thread

_TIME_ERRORS: Final = {9: "is not valid yet", 10: "has expired"}
_NAME_ERRORS: Final = (62, 64)
"""OpenSSL's error codes for a certificate of another host name, and of another IP address."""

_MEANINGS: Final = {
    "CERTIFICATE_REQUIRED": (
        "the server requires a client certificate; load one with ssl_context.load_cert_chain()"
    ),
    "WRONG_VERSION_NUMBER": (
        "the server does not use TLS on this port; use mqtt://, ws:// or secure=False"
    ),
}
"""Explanations by a part of OpenSSL's message."""


async def client_context(given: ssl.SSLContext | None) -> ssl.SSLContext:
    """Return the given context, or one that trusts the system's certificate authorities."""
    if given is not None:
        return given
    # Reading the certificates takes long enough to block the event loop noticeably.
    return await to_thread.run_sync(ssl.create_default_context)


def explain(error: ssl.SSLError) -> None:
    """Add an explanation and advice to the message of an error."""
    if meaning := _meaning(error):
        error.strerror = f"{error} ({meaning})"


def _meaning(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _NAME_ERRORS:
            return "the certificate is for another host; connect to a name that it contains"
        if error.verify_code in _TIME_ERRORS:
            return f"the certificate {_TIME_ERRORS[error.verify_code]}, or the local clock is wrong"
        return (
            "to trust a private certificate authority, use "
            "ssl_context=ssl.create_default_context(cafile=...)"
        )
    return next((words for part, words in _MEANINGS.items() if part in str(error)), "")
