"""A development broker with Emitter's semantics, simulated network failures, and virtual time."""

from __future__ import annotations

from ._blocking import BlockingBroker as BlockingBroker
from ._blocking import ClientSnapshot as ClientSnapshot
from ._broker import Broker as Broker
from ._configured import ConfiguredBroker as ConfiguredBroker
from ._connection import Client as Client
from ._proxy import Direction as Direction
from ._proxy import FaultProxy as FaultProxy
from ._virtual_time import VirtualTimeLoop as VirtualTimeLoop
from ._virtual_time import run_virtual as run_virtual
from ._virtual_time import virtual_backend as virtual_backend

# Show the public import path in reprs, tracebacks and the documentation.
for _value in (
    *(BlockingBroker, Broker, Client, ClientSnapshot, ConfiguredBroker, FaultProxy),
    *(VirtualTimeLoop, run_virtual, virtual_backend),
):
    _value.__module__ = __name__
