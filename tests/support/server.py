"""The broker that a test talks to: the development broker, or a real Emitter."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from emitter_anyio.testing import Broker


@dataclass(frozen=True, slots=True)
class Server:
    """
    Where a broker listens, and its secret.

    ``other_url`` is another node of the broker if it is a cluster, otherwise the same one.
    ``broker`` is the development broker itself, or ``None`` when a real one is used: a test of the
    client suite does without it.
    """

    url: str
    host: str
    port: int
    secure: bool
    secret: str = field(repr=False)
    other_url: str
    broker: Broker | None = None


def runs_cluster() -> bool:
    """Say whether ``EMITTER_NODES`` asks for a development broker of two nodes."""
    return os.environ.get("EMITTER_NODES") == "2"


def real_server() -> Server | None:
    """
    The Emitter of ``EMITTER_URL`` and ``EMITTER_SECRET``, or ``None`` when neither is set.

    ``EMITTER_OTHER_URL`` is that of another node of its cluster, if it has one.

    :raises RuntimeError: when they say only half of what is needed

    """
    url, secret = os.environ.get("EMITTER_URL"), os.environ.get("EMITTER_SECRET")
    if not url and not secret:
        return None

    if not url or not secret:
        missing = "EMITTER_SECRET" if url else "EMITTER_URL"
        raise RuntimeError(
            f"{missing} is not set: the client suite needs both EMITTER_URL (such as "
            "mqtt://127.0.0.1:8080) and EMITTER_SECRET, the secret key of that broker's licence"
        )

    parts = urlsplit(url)
    secure = parts.scheme in ("mqtts", "wss")
    if parts.hostname is None or parts.scheme not in ("mqtt", "mqtts", "ws", "wss"):
        raise RuntimeError("EMITTER_URL is no mqtt, mqtts, ws or wss URL with a host")

    port = parts.port or (443 if secure else 8080)
    other_url = os.environ.get("EMITTER_OTHER_URL") or url
    return Server(url, parts.hostname, port, secure, secret, other_url)
