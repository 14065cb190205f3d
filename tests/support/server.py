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
    The address of a broker, and its secret key.

    :ivar other_url: the URL of another node if the broker is a cluster, otherwise ``url``
    :ivar broker: the development broker, or ``None`` for a real Emitter; tests of the client
        suite do not use it
    """

    url: str
    host: str
    port: int
    secure: bool
    secret: str = field(repr=False)
    other_url: str
    broker: Broker | None = None


def runs_cluster() -> bool:
    """Return whether ``EMITTER_NODES`` requests a development broker with two nodes."""
    return os.environ.get("EMITTER_NODES") == "2"


def real_server() -> Server | None:
    """
    Return the Emitter of ``EMITTER_URL`` and ``EMITTER_SECRET``, or ``None`` if neither is set.

    ``EMITTER_OTHER_URL`` can name another node of the same cluster. ``EMITTER_CLUSTER``, with the
    URLs of all nodes, replaces both.

    :raises RuntimeError: if only one of the two is set, or the URL is malformed

    """
    first, other, *_ = [*os.environ.get("EMITTER_CLUSTER", "").split(), "", ""]
    url, secret = os.environ.get("EMITTER_URL") or first, os.environ.get("EMITTER_SECRET")
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
        raise RuntimeError("EMITTER_URL must be an mqtt, mqtts, ws or wss URL with a host")

    port = parts.port or (443 if secure else 8080)
    other_url = os.environ.get("EMITTER_OTHER_URL") or other or url
    return Server(url, parts.hostname, port, secure, secret, other_url)
