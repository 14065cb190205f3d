"""Streams: the client holds the send end, users hold the receive ends."""

from __future__ import annotations

from .entering import Entering as Entering
from .queue import MAX_BYTES as MAX_BYTES
from .queue import weight_of as weight_of
from .receive import SKIPPED as SKIPPED
from .receive import EventStream as EventStream
from .receiver import Receiver as Receiver
from .send import Overflow as Overflow
from .send import Sender as Sender
from .send import StreamStatistics as StreamStatistics
from .send import check_buffer as check_buffer
