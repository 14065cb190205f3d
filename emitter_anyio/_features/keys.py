"""Making and banning keys."""

from __future__ import annotations

from emitter_anyio._runtime.requester import Requester, Timeout, check_timeout
from emitter_anyio._values import requests
from emitter_anyio._values.channels import ChannelKey, Key, check_key_source
from emitter_anyio._values.checks import check_flag, check_int, check_text
from emitter_anyio._values.templates import Channel, check_target_pattern

_PERMISSIONS = frozenset("rwslpex")


class Keys:
    """
    The methods that make and ban keys.

    :param requester: sends requests
    """

    def __init__(self, requester: Requester) -> None:
        self._requester = requester

    async def keygen(
        self, key: Key, channel: str | Channel, permissions: str, ttl: int, timeout: Timeout
    ) -> ChannelKey:
        """Make a key."""
        key = check_key_source(key)
        target = check_target_pattern(channel)
        ttl = check_int("ttl", ttl, 0)
        timeout = check_timeout(timeout)
        permissions = check_text("permissions", permissions, " such as 'rw'")
        if unknown := set(permissions) - _PERMISSIONS:
            raise ValueError(
                f"invalid permissions: unknown {', '.join(sorted(map(repr, unknown)))}; use the "
                "letters r, w, s, l, p, e and x"
            )

        async def ask(text: str) -> ChannelKey:
            request = requests.keygen(text, target, permissions, ttl)
            return await self._requester.request(request, timeout)

        return await self._requester.with_key(key, ask)

    async def keyban(self, secret: Key, target: Key, banned: bool, timeout: Timeout) -> bool:
        """Ban a key, or lift the ban."""
        secret, target = check_key_source(secret), check_key_source(target)
        banned, timeout = check_flag("banned", banned), check_timeout(timeout)
        banning = await self._requester.key_of(target)

        async def ask(text: str) -> bool:
            request = requests.keyban(text, banning, banned)
            return await self._requester.request(request, timeout)

        return await self._requester.with_key(secret, ask)
