"""Connections: sockets, TLS, WebSocket, the writer, keepalive and timers."""

from __future__ import annotations
