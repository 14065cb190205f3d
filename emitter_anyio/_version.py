from __future__ import annotations

# The build reads the version from this file, and a test compares it with CHANGELOG.md.
__version__ = "0.1.0"
