"""What goes on beside something, and ends with it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from anyio.abc import TaskGroup

from ._backend import task_starter


class Tasks:
    """
    A task group in which often there is nobody.

    :param group: the one that the calling task has entered last
    :ivar start: starts a task that ends by itself
    :ivar used: whether there has been anybody else; if not, nobody is left who would have to be
        cancelled, and that costs, even so
    """

    def __init__(self, group: TaskGroup) -> None:
        self.start = task_starter(group)
        self._scope = group.cancel_scope
        self.used = False

    def start_soon(
        self,
        function: Callable[..., Coroutine[Any, Any, None]],
        *arguments: object,
        name: object = None,
    ) -> None:
        """Start a task that nobody waits for."""
        self.used = True
        self.start(function, *arguments, name=name)

    def cancel(self) -> None:
        """Cancel all of them, and what the group is around."""
        self._scope.cancel()
