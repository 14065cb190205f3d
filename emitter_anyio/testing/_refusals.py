"""Emitter's error messages."""

from __future__ import annotations

_MESSAGES = {
    400: "the request was invalid or cannot be otherwise served",
    401: "the security key provided is not authorized to perform this operation",
    403: "the request is understood, but it has been refused or access is not allowed",
    404: "the resource requested does not exist",
}

EXTEND_KEY = "the security key with extend permission can only be used for private links"
LINK_NAME = "the link must be an alphanumeric string of 1 or 2 characters"
TARGET = "channel should end with `/` for strict types or `/#/` for wildcards"
TARGET_TOO_DEEP = "channel can not have more than 23 parts"


class RefusedError(Exception):
    """
    A refusal of the broker.

    :param status: the status, as in HTTP
    :param message: the broker's message, or ``None`` for the default of the status
    """

    def __init__(self, status: int, message: str | None = None) -> None:
        self.status = status
        self.message = _MESSAGES[status] if message is None else message
        super().__init__(self.status, self.message)
