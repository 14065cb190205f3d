"""Likely reasons for a refusal by the broker."""

from __future__ import annotations

import re
from typing import Final

from .errors import RequestError, make_request_error

_KEY_LENGTH: Final = 32
_KEY = re.compile(r"[-_0-9A-Za-z]{32}")

_PERMISSION: Final = {
    "publish": "permission 'w' (write)",
    "subscribe": "permission 'r' (read)",
    "unsubscribe": "permission 'r' (read)",
    "presence": "permission 'p' (presence)",
    "history": "permission 'l' (load)",
}


def make_refusal(
    status: int | None, message: str, operation: str, key: str | None, channel: str | None
) -> RequestError:
    """Make the error for a refused call, with the likely reasons."""
    hint = None
    if operation == "publish_with_link":
        hint = _hint_for_link(status)
    elif key is not None and (status == 401 or (status, operation) == (404, "keygen")):
        # With another broker's secret key, the contract number is random. If it is the number of
        # an unknown contract, the status is 404.
        hint = _hint_for_key(message, operation, key, channel)
    return make_request_error(status, message, operation=operation, channel=channel, hint=hint)


def _hint_for_link(status: int | None) -> str | None:
    if status == 400:
        return "this connection has no link of this name; create it with link()"
    if status == 401:
        return "the link's key might lack permission 'w' (write), have expired or be banned"
    return None


def _hint_for_key(message: str, operation: str, key: str, channel: str | None) -> str:
    if not _KEY.fullmatch(key):
        if len(key) != _KEY_LENGTH:
            return f"invalid key: expected {_KEY_LENGTH} characters, got {len(key)}"
        return f"invalid key: expected {_KEY_LENGTH} characters of letters, digits, '-' and '_'"
    if "extend" in message:
        return "an extend key can only create private channels; pass it to keygen()"
    if operation == "keygen":
        return "keygen() requires the broker's secret key, or a key with permission 'e' (extend)"
    if operation == "keyban":
        return "keyban() requires the broker's secret key, and a target key of the same broker"
    permission = _PERMISSION.get(operation, "the required permission")
    reasons = (
        f"the key might lack {permission}, have expired, be banned, be for another channel or "
        "broker, or have a target that ends in '+/', which matches no channel"
    )
    if channel is not None and channel.startswith("$share/"):
        return f"a group requires a key for {channel!r} itself; {reasons}"
    return reasons
