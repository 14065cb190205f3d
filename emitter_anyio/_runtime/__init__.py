"""What every feature needs: the state, the connections, requests, events and tasks."""

from __future__ import annotations
