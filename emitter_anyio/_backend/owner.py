"""The ownership of objects by a thread and an event loop."""

from __future__ import annotations

from threading import get_ident

from emitter_anyio._values.errors import WrongLoopError

from .current import current_backend
from .interface import Backend


class Owner:
    """
    The thread and event loop that own an object while it is in use.

    For code outside event loops, such as callbacks, only the thread is checked: such code cannot
    wait.

    :ivar thread: the identifier of the thread. Hot paths compare only this, and call :meth:`check`
        if it differs
    """

    __slots__ = ("_backend", "_uses", "thread")

    def __init__(self) -> None:
        self.thread: int = 0
        self._backend: Backend | None = None
        self._uses = 0

    def claim(self) -> None:
        """
        Begin a use in the running event loop.

        :raises WrongLoopError: if the object is in use in another thread or event loop
        """
        if self._uses:
            self.check()
        self._uses += 1
        self.thread, self._backend = get_ident(), _backend_or_none()

    def release(self) -> None:
        """End a use."""
        self._uses -= 1

    def check(self) -> None:
        """
        Check that the calling code may use the object.

        :raises WrongLoopError: if the object is in use in another thread or event loop
        """
        if not self._uses:
            return
        owner = self._backend
        if get_ident() == self.thread:
            if owner is None or owner.runs_task():
                return
            # This check is last, because it takes five times as long as runs_task().
            other = _backend_or_none()
            if other is None or other.token is owner.token:
                return
        raise WrongLoopError(
            "wrong thread or event loop: a client and its streams can be used only where "
            "the client was entered; from other threads, use anyio.from_thread.run() or a portal"
        )


def _backend_or_none() -> Backend | None:
    try:
        return current_backend()
    except RuntimeError:
        return None
