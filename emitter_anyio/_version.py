from __future__ import annotations

# The only place that holds the version: the build reads it, and a test holds CHANGELOG.md to it.
__version__ = "0.1.0"
