"""
Compare the client with an earlier commit: ``python -m benchmarks.against COMMIT``.

With ``--python PATH``, compare this interpreter with a different one, in whose environment the
client is installed. Both are measured in turn, several times. The smallest CPU time of each counts,
because other processes can only increase it. A ratio above 1 means that the present client or the
other interpreter takes longer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final, TypeAlias

from benchmarks.rows import CLIENTS, CPU, ROWS, Row
from benchmarks.running import ROOT, run

COMPARED: Final = {
    "receive": 60_000,
    "thin": 1_000,
    "handler": 60_000,
    "round-trip": 2_000,
    "publish": 60_000,
    "confirmed-20": 10_000,
    "confirmed-100": 10_000,
    "connect": 200,
    "receive-256k": 500,
    "publish-256k": 500,
}
"""The number of messages per run of each row."""


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """
    Check out a commit, and remove it when the block is left.

    :return: a directory that contains only its client, because the present benchmarks measure both
    """
    with tempfile.TemporaryDirectory() as directory:
        path, library = Path(directory, "checkout"), Path(directory, "library")
        git = ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
        library.mkdir()
        (library / "emitter_anyio").symlink_to(path / "emitter_anyio")
        try:
            yield library
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


Side: TypeAlias = tuple[str, Path]
"""An interpreter, and the directory that contains the client."""


def compare(row: Row, variant: str, before: Side, after: Side, rounds: int) -> tuple[float, float]:
    """Return the smallest CPU time per message on each side, in µs."""
    (client,) = (one for one in CLIENTS if one.ours and one.variant == variant)
    least = {before: float("inf"), after: float("inf")}
    for number in range(rounds):
        # Each goes first as often as the other.
        for side in sorted(least, reverse=number % 2 == 0):
            python, library = side
            figures = run(row, client, python, COMPARED[row.name], library=library)
            least[side] = min(least[side], figures[CPU.key])
    return least[before], least[after]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.add_argument("commit", nargs="?", default="HEAD", help="the earlier commit")
    parser.add_argument("--python", metavar="PATH", help="the other interpreter")
    parser.add_argument("--rows", help="names of rows, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="the number of rounds; default: 7")
    options = parser.parse_args()
    wanted = options.rows.split(",") if options.rows else list(COMPARED)
    rows = {row.name: row for row in ROWS}
    print(f"{'row':16}{'backend':10}{'before':>10}{'after':>10}{'ratio':>8}   CPU µs each")
    with nullcontext(ROOT) if options.python else checkout(options.commit) as library:
        before, after = (sys.executable, library), (options.python or sys.executable, ROOT)
        for name in wanted:
            for variant in ("asyncio", "trio"):
                was, now = compare(rows[name], variant, before, after, options.rounds)
                print(
                    f"{name:16}{variant:10}{was:10.2f}{now:10.2f}{now / was:8.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
