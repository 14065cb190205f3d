"""Opening connections, with the key of the will."""

from __future__ import annotations

import anyio

from emitter_anyio._backend.tasks import Tasks
from emitter_anyio._net.connection import Connection
from emitter_anyio._net.opening import open_connection
from emitter_anyio._net.options import Options, check_connect_size
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values.channels import check_key_source
from emitter_anyio._values.errors import ConnectError

from .key_ring import KeyRing
from .trace import Trace


class Opener:
    """
    Opens the connections of a client.

    :param options: the options of the client
    :param keys: returns the key of the will
    :param wants: the subscriptions and presence feeds of the client
    :param trace: gets each attempt
    """

    def __init__(self, options: Options, keys: KeyRing, wants: Wants, trace: Trace) -> None:
        self._options = options
        self._trace = trace
        self._keys = keys
        self._wants = wants
        self._will_key: str | None = None

    async def open(self, last: Connection | None, tasks: Tasks) -> Connection:
        """
        Open a connection.

        :param last: the connection that was lost, if any; the server after its server is tried
            first
        :param tasks: runs the attempts to connect to several addresses of a server
        :return: the connection
        :raises ConnectError: if no server could be reached
        """
        will = self._options.will
        if will is not None:
            source = check_key_source(will.key)
            # Call a key function only for the first connection. Later it might use the client,
            # and would wait for the connection that waits for it.
            self._will_key = self._keys.known(source) or self._will_key
            try:
                with anyio.fail_after(self._options.connect_timeout):
                    self._will_key = self._will_key or await self._keys.get(source)
                check_connect_size(self._options, self._will_key)
            except Exception as exc:
                raise ConnectError(f"could not connect: no key for the will: {exc!r}") from exc
        after = None if last is None else last.server
        with self._trace.span("connect" if last is None else "reconnect"):
            return await open_connection(
                self._options, self._wants, tasks, will_key=self._will_key, after=after
            )
