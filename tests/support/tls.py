"""Certificates for loopback, issued by an authority that no system trusts."""

from __future__ import annotations

import ssl
from functools import cache

import trustme


@cache
def authority() -> trustme.CA:
    return trustme.CA()


@cache
def certificate(*names: str) -> trustme.LeafCert:
    return authority().issue_cert(*names)


def server_context(*names: str) -> ssl.SSLContext:
    """Return a server's context for these names, by default ``127.0.0.1`` and ``localhost``."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate(*(names or ("127.0.0.1", "localhost"))).configure_cert(context)
    return context


def client_context() -> ssl.SSLContext:
    """Return a client's context that trusts the authority."""
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return context
