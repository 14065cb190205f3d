"""Values and rules: errors, channels, messages, requests, routing. No I/O, no clock."""

from __future__ import annotations
