"""The stream: a send end that the client holds, and receive ends that users hold."""

from __future__ import annotations

from ._entering import Entering as Entering
from ._queue import MAX_BYTES as MAX_BYTES
from ._queue import weight_of as weight_of
from ._receive import EventStream as EventStream
from ._receiver import Receiver as Receiver
from ._send import Overflow as Overflow
from ._send import Sender as Sender
from ._send import StreamStatistics as StreamStatistics
from ._send import check_buffer as check_buffer
