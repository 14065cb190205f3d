"""Every example, on both backends, and against a real Emitter where there is one."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import ROOT, run

EXAMPLES = sorted(ROOT.glob("examples/*.py"))
OUTPUT = {
    # The broker sorts by the second only, so the first two may come either way round.
    "quickstart.py": r"""quickstart/kitchen/ (19|20) degrees
quickstart/kitchen/ (19|20) degrees
quickstart/kitchen/ 21 degrees
as it should be: publish 'quickstart/garden/': 401 .+
""",
    "handlers.py": r"""connected
presence: status \['houston'\]
handlers/countdown/ 3
handlers/countdown/ 2
handlers/countdown/ 1
handlers/countdown/ 0
disconnected
""",
    "trio_nursery.py": r"""nursery/steps/ left
nursery/steps/ right
nursery/steps/ stop
everybody is home
""",
}


def test_each_example_is_here() -> None:
    assert [path.name for path in EXAMPLES] == sorted(OUTPUT)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_each_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 100


@pytest.mark.emitter
class TestExamples:
    @pytest.mark.parametrize("name", ["quickstart.py", "handlers.py"])
    async def test_on_both_backends(
        self, name: str, anyio_backend: tuple[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        await runpy.run_path(str(ROOT / "examples" / name))["main"]()
        assert re.fullmatch(OUTPUT[name], capsys.readouterr().out)

    @pytest.mark.parametrize("anyio_backend", ["trio"])
    async def test_on_trio(self, anyio_backend: str, capsys: pytest.CaptureFixture[str]) -> None:
        await runpy.run_path(str(ROOT / "examples" / "trio_nursery.py"))["main"]()
        assert re.fullmatch(OUTPUT["trio_nursery.py"], capsys.readouterr().out)


@pytest.mark.parametrize(
    "command",
    ["quickstart.py", "quickstart.py trio", "handlers.py", "handlers.py trio", "trio_nursery.py"],
)
def test_as_its_first_lines_say(command: str) -> None:
    name, *backend = command.split()
    done = run(f"examples/{name}", *backend)
    assert done.stderr == ""
    assert done.returncode == 0
    assert re.fullmatch(OUTPUT[name], done.stdout)
