"""Send a command to the nodes that ``python -m tests.cluster`` runs."""

from __future__ import annotations

import socket
import sys


def main(path: str, *words: str) -> int:
    """Send the words, and return 0 once the nodes have obeyed; otherwise print the reason."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(" ".join(words).encode() + b"\n")
        error = sock.makefile().read()
    sys.stderr.write(error)
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
