"""The project as a whole: version, public names, imports and code comments."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType

import anyio
import pytest

import emitter_anyio

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "emitter_anyio"

CALLS = [
    *["connect", "Emitter", "Entering", "Subscribing", "EventStream", "PresenceFeed", "Consumer"],
    "decode_stats",
]
VALUES = [
    *["Backoff", "Channel", "ConnectOptions", "Gap"],
    *["Will", "EmitterMessage", "DecodedMessage", "StoredMessage", "ChannelKey", "Link", "Me"],
    *[
        "Member",
        "PresenceStatus",
        "PresenceEvent",
        "ConnectionInfo",
        "Statistics",
        "StreamStatistics",
        "NodeStats",
        "NodeMetric",
    ],
]
ERRORS = [
    *["EmitterError", "ConnectError", "ConnectRefusedError", "ConnectionLostError", "ClosedError"],
    *[
        "WrongLoopError",
        "RequestTimeoutError",
        "RemoteProtocolError",
        "SlowConsumerError",
        "HandlerError",
    ],
    *[
        "SubscriptionConflictError",
        "DecodeError",
        "ReplyError",
        "InvalidChannelError",
        "MessageTooLargeError",
    ],
    *["RequestError", "BadRequestError", "UnauthorizedError", "PaymentRequiredError"],
    *["ForbiddenError", "NotFoundError", "ServerError", "HistoryIncompleteError"],
]
PUBLIC_NAMES = [*CALLS, *VALUES, *ERRORS]

# Modules without I/O and without a clock.
PACKAGES = ("_values", "_backend", "_protocol", "_streams", "_net", "_runtime", "_features")

SANS_IO_MODULES = [
    str(path.relative_to(LIBRARY).with_suffix(""))
    for package in ("_values", "_protocol")
    for path in sorted((LIBRARY / package).glob("[a-z]*.py"))
] + [
    *("_features/forward", "_features/position", "_features/stored"),
    *("outbox/_clock", "outbox/_schedule"),
]


def public_names() -> dict[str, object]:
    return {
        name: value
        for name, value in vars(emitter_anyio).items()
        if not name.startswith("_") and name != "annotations" and not isinstance(value, ModuleType)
    }


class TestVersion:
    def test_changelog_starts_with_the_version(self) -> None:
        headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        assert headings[0] in (
            f"Unreleased: {emitter_anyio.__version__}",
            emitter_anyio.__version__,
        )

    def test_package_has_the_version(self) -> None:
        assert metadata.version("emitter_anyio") == emitter_anyio.__version__

    def test_version_is_in_one_file(self) -> None:
        files = [
            path.name
            for path in (*LIBRARY.rglob("*.py"), ROOT / "pyproject.toml", ROOT / "noxfile.py")
            if f'"{emitter_anyio.__version__}"' in path.read_text()
        ]
        assert files == ["_version.py"]


class TestWorkflows:
    def test_every_action_is_pinned_by_hash_with_its_version(self) -> None:
        used = [
            line.strip()
            for path in (ROOT / ".github/workflows").glob("*.yml")
            for line in path.read_text().splitlines()
            if "uses:" in line
        ]
        assert used
        for line in used:
            assert re.fullmatch(r"(- )?uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


class TestPublicNames:
    def test_public_names_are_the_documented_ones(self) -> None:
        assert sorted(public_names()) == sorted(PUBLIC_NAMES)

    @pytest.mark.parametrize("name", PUBLIC_NAMES)
    def test_each_name_has_the_public_module(self, name: str) -> None:
        value = getattr(emitter_anyio, name)
        assert value.__module__ == "emitter_anyio"
        assert value.__qualname__ == name

    @pytest.mark.parametrize("name", PUBLIC_NAMES)
    def test_each_name_has_a_docstring(self, name: str) -> None:
        value = getattr(emitter_anyio, name)
        assert value.__doc__
        if inspect.isclass(value):
            undocumented = [
                member
                for member, found in vars(value).items()
                if not member.startswith("_")
                and (inspect.isfunction(found) or isinstance(found, property))
                and not inspect.getdoc(getattr(value, member))
            ]
            assert not undocumented

    def test_package_has_py_typed(self) -> None:
        assert resources.files("emitter_anyio").joinpath("py.typed").is_file()

    @pytest.mark.parametrize("name", ERRORS)
    def test_every_error_is_an_emitter_error(self, name: str) -> None:
        assert issubclass(getattr(emitter_anyio, name), emitter_anyio.EmitterError)


def modules_loaded_by(program: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport json, sys; print(json.dumps([*sys.modules]))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(run.stdout))


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements_of(distribution: str) -> set[str]:
    """Return the distributions that one requires, extras aside."""
    return {
        normalized(re.split(r"[^\w.-]", requirement)[0])
        for requirement in metadata.requires(distribution) or ()
        if "extra ==" not in requirement
    }


class TestImports:
    def test_import_loads_only_required_modules(self) -> None:
        loaded = modules_loaded_by("import emitter_anyio")
        assert {"anyio", "paho.mqtt.client", "emitter_anyio._client"} <= loaded
        unwanted = {"trio", "wsproto", "rich", "emitter_anyio.testing", "emitter_anyio.outbox"}
        assert not unwanted & loaded
        assert "emitter_anyio._cli" not in loaded
        own_modules = {name for name in loaded if name.startswith("emitter_anyio")}
        files = [path for name in PACKAGES for path in LIBRARY.glob(f"{name}/*.py")]
        loaded_on_demand = ("_backend/trio.py", "_net/websocket.py", "__main__.py")
        assert own_modules == {
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for path in (*LIBRARY.glob("_*.py"), *files)
            if str(path.relative_to(LIBRARY)) not in loaded_on_demand
        }
        started = modules_loaded_by("")
        # AnyIO and Paho import sniffio and PySocks if another package has installed them.
        allowed = {"emitter-anyio", "anyio", "paho-mqtt", "sniffio", "pysocks"}
        allowed |= requirements_of("anyio") | requirements_of("paho-mqtt")
        owners = metadata.packages_distributions()
        for module in {name.split(".")[0] for name in loaded - started} & owners.keys():
            assert {normalized(owner) for owner in owners[module]} & allowed, module

    @pytest.mark.parametrize("module", SANS_IO_MODULES)
    def test_sans_io_modules_import_only_exceptions_from_anyio(self, module: str) -> None:
        # import-linter checks the other import rules, but does not see imported names.
        tree = ast.parse((LIBRARY / f"{module}.py").read_text())
        imported: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "anyio":
                assert node.module == "anyio"
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "anyio":
                imported.add(node.attr)

        for name in imported:
            assert issubclass(getattr(anyio, name), Exception)


class TestCode:
    def test_at_most_10_lines_are_excluded_from_coverage_with_a_reason(self) -> None:
        marked = [
            (path.name, line.strip())
            for path in LIBRARY.rglob("*.py")
            for line in path.read_text().splitlines()
            if "no cover" in line or "no branch" in line
        ]
        assert len(marked) <= 10, marked
        for _, line in marked:
            assert re.search(r"# pragma: no (cover|branch) - \w", line), line

    def test_every_ignore_comment_has_a_reason(self) -> None:
        for path in (*LIBRARY.rglob("*.py"), *ROOT.glob("examples/*.py")):
            for line in path.read_text().splitlines():
                if re.search(r"# (type: ignore|noqa|pyright:)", line):
                    assert re.search(
                        r"# (type: ignore\[[\w, -]+\]|noqa: [\w, ]+) +[-#]+ \w", line
                    ), f"{path.name}: {line.strip()}"
