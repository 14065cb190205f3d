"""Coverage-guided fuzzing: ``python -m tests.fuzz [TARGET …] [options of libFuzzer …]``.

An input that breaks a target is written to its corpus, which the ordinary suite replays: fix the
bug and commit the file. Each target runs for one minute unless ``-max_total_time`` or ``-runs`` is
given.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

# Imported by name because Atheris is installed only in the nox session that fuzzes.
atheris = importlib.import_module("atheris")

with atheris.instrument_imports(include=["emitter_anyio", "paho", "wsproto", "h11"]):
    from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


def main(arguments: list[str]) -> None:
    options = [argument for argument in arguments if argument.startswith("-")]
    names = [argument for argument in arguments if argument not in options] or [*TARGETS]
    if not any(option.startswith(("-max_total_time=", "-runs=")) for option in options):
        options.append("-max_total_time=60")
    if len(names) > 1:
        # libFuzzer ends its process, so each target needs a separate one.
        for name in names:
            sys.stderr.write(f"fuzzing {name}\n")
            subprocess.run([sys.executable, "-m", "tests.fuzz", name, *options], check=True)
        return
    fuzz(names[0], options)


def fuzz(name: str, options: list[str]) -> None:
    target, corpus = TARGETS[name], CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as found, TemporaryDirectory() as seeds:
        for number, seed in enumerate(target.seeds()):
            Path(seeds, str(number)).write_bytes(seed)
        # libFuzzer writes new inputs to the first directory; failing ones go to the corpus.
        arguments = [found, str(corpus), seeds, f"-artifact_prefix={corpus}/", "-timeout=10"]
        atheris.Setup([sys.argv[0], *arguments, *options], target.check)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
