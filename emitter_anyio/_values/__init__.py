"""Values and rules: errors, channels, messages, requests and routing. No I/O and no clock."""

from __future__ import annotations
