"""Run the command line as ``python -m emitter_anyio``."""

from __future__ import annotations

import sys

from ._cli import main

sys.exit(main())
