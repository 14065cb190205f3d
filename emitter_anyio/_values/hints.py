"""Why the broker may have refused: the likely reasons for one very call."""

from __future__ import annotations

import re
from typing import Final

from .errors import RequestError, make_request_error

_KEY = re.compile(r"[-_0-9A-Za-z]{32}")

_PERMISSION: Final = {
    "publish": "'w' (write)",
    "subscribe": "'r' (read)",
    "unsubscribe": "'r' (read)",
    "presence": "'p' (presence)",
    "history": "'l' (load)",
}


def make_refusal(
    status: int | None, message: str, operation: str, key: str | None, channel: str | None
) -> RequestError:
    """Make the error for a refusal, with the likely reasons for this very call."""
    hint = None
    if operation == "publish_with_link":
        hint = _hint_for_a_link(status)
    elif key is not None and (status == 401 or (status, operation) == (404, "keygen")):
        # A secret of another licence is noise, or, now and then, of an unknown contract: a 404.
        hint = _hint_for_a_key(message, operation, key, channel)
    return make_request_error(status, message, operation=operation, channel=channel, hint=hint)


def _hint_for_a_link(status: int | None) -> str | None:
    if status == 400:
        return "this connection has no link of that name: link() makes one for as long as it lasts"
    if status == 401:
        return "the link was made with a key that lacks 'w', has expired or is banned"
    return None


def _hint_for_a_key(message: str, operation: str, key: str, channel: str | None) -> str:
    if not _KEY.fullmatch(key):
        return (
            f"the key of {len(key)} characters is none: "
            "keys have 32, of letters, digits, '-' and '_'"
        )
    if "extend" in message:
        return "an extend key serves only to make a private channel: keygen() with it"
    if operation == "keygen":
        return "keygen takes the broker's master secret, or a key with the permission 'e' (extend)"
    if operation == "keyban":
        return "keyban takes the broker's master secret, and a key of the same broker"
    permission = _PERMISSION.get(operation, "it needs")
    reasons = (
        f"the key may lack the permission {permission}, have expired, be banned, be for another "
        "channel or broker, or be for a target that ends in '+/', which opens nothing"
    )
    if channel is not None and channel.startswith("$share/"):
        return f"a group needs a key made for {channel!r} itself; {reasons}"
    return reasons
