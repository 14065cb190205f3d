# /// script
# dependencies = ["nox[uv]>=2025.5.1"]
# ///
"""
The checks of a change: ``python -m pip install nox && python -m nox``.

By default, the suite runs on the Python that runs nox. ``.ci/run`` adds the other sessions. The
block above lets nox fetch uv for itself, which creates an environment in a second. nox skips the
sessions of an interpreter that is not installed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
OLDEST, NEWEST = PYTHONS[0], PYTHONS[-1]
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
PLATFORMS = {"linux": "Linux", "win32": "Windows", "darwin": "Darwin"}  # mypy's names, pyright's
# Tests and benchmarks need POSIX: pseudo-terminals and the resource usage of a process.
CHECKED = {"win32": ("emitter_anyio", "examples")}
PROJECT = nox.project.load_toml("pyproject.toml")
MEASURED = Path(".nox/measured").absolute()

nox.options.sessions = ["lint", "typing", f"tests-{RUNNING}", "coverage", "build", "docs"]
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, and who may import whom."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache")


@nox.session
def typing(session: nox.Session) -> None:
    """Types, for the oldest Python on Linux, and how complete the public ones are."""
    _install_type_checkers(session)
    _check_types(session, OLDEST, "linux")
    session.run("pyright", "--verifytypes", "emitter_anyio", "--ignoreexternal")


@nox.session(default=False)
def typing_matrix(session: nox.Session) -> None:
    """Types, for the oldest and the newest Python on each platform."""
    _install_type_checkers(session)
    for version in (OLDEST, NEWEST):
        for platform in PLATFORMS:
            if (version, platform) != (OLDEST, "linux"):
                _check_types(session, version, platform)


def _install_type_checkers(session: nox.Session) -> None:
    session.install("-e", ".[test]", *nox.project.dependency_groups(PROJECT, "typing"))


def _check_types(session: nox.Session, version: str, platform: str) -> None:
    files = CHECKED.get(platform, ())
    session.run("mypy", "--python-version", version, "--platform", platform, *files)
    target = ("--pythonversion", version, "--pythonplatform", PLATFORMS[platform])
    session.run("pyright", *target, *files)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test suite."""
    session.install("-e", ".[test]")
    _run_tests(session)


@nox.session(python=OLDEST, default=False)
def tests_oldest(session: nox.Session) -> None:
    """The same with the lowest versions of our dependencies, and asyncio's debug mode."""
    lowest = [
        requirement.split(",")[0].replace(">=", "==")
        for requirement in PROJECT["project"]["dependencies"]
    ]
    session.install("-e", ".[test]", *lowest)
    # Debug mode reports coroutines that are never awaited and calls from a wrong thread.
    session.env["PYTHONASYNCIODEBUG"] = "1"
    _run_tests(session)


def _run_tests(session: nox.Session) -> None:
    """Run the suite; only the session of the default run measures coverage, which takes time."""
    arguments = ("-m", "pytest", "--numprocesses=auto", "--dist=worksteal", *session.posargs)
    if session.name != f"tests-{RUNNING}":
        session.run("python", *arguments)
        return

    shutil.rmtree(MEASURED, ignore_errors=True)
    MEASURED.mkdir(parents=True)
    session.env["COVERAGE_FILE"] = str(MEASURED / ".coverage")
    session.run("coverage", "run", *arguments)


@nox.session
def coverage(session: nox.Session) -> None:
    """Every line and branch of the library, in the session of the default run."""
    if not any(MEASURED.glob(".coverage*")):
        session.error(f"no coverage data: run the session tests-{RUNNING} before this one")

    session.install("coverage")
    session.env["COVERAGE_FILE"] = str(MEASURED / ".coverage")
    if any(MEASURED.glob(".coverage.*")):
        session.run("coverage", "combine", "--quiet")

    session.run("coverage", "report")


@nox.session
def build(session: nox.Session) -> None:
    """What is released: built, checked, and installed where nothing else is."""
    session.install(*nox.project.dependency_groups(PROJECT, "build"))
    made = Path(session.create_tmp()).absolute()
    shutil.rmtree(made, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(made))
    (wheel,), (sdist,) = made.glob("*.whl"), made.glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))

    empty = made / "empty"
    session.run("python", "-m", "venv", str(empty))
    python = str(empty / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    session.run(python, "-m", "pip", "install", "--quiet", str(wheel), external=True)
    session.run(python, "-m", "pip", "list", external=True)
    # Away from the checkout, which Python would find first.
    with session.chdir(made):
        session.run(python, "-m", "emitter_anyio", "demo", external=True)
        session.run(python, "-m", "tarfile", "-e", str(sdist), external=True)
    with session.chdir(made / sdist.name.removesuffix(".tar.gz")):
        session.run(python, "-m", "pip", "install", "--quiet", ".[test]", external=True)
        session.run(python, "-m", "pytest", "--collect-only", "--quiet", external=True, silent=True)


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """What is released, in dist/; and in sbom/ a list of what it runs with (CycloneDX)."""
    session.install(*nox.project.dependency_groups(PROJECT, "build"))
    for made in ("dist", "sbom"):
        shutil.rmtree(made, ignore_errors=True)
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))

    (wheel,) = Path("dist").glob("*.whl")
    alone = Path(session.create_tmp(), "alone").absolute()
    session.run("python", "-m", "venv", "--clear", "--without-pip", str(alone))
    session.run("python", "-m", "pip", "--python", str(alone), "install", "--quiet", str(wheel))
    Path("sbom").mkdir()
    version = wheel.name.split("-")[1]
    session.run(
        *("cyclonedx-py", "environment", "--mc-type", "library", "--output-reproducible"),
        *("--output-file", f"sbom/emitter_anyio-{version}.cdx.json", str(alone)),
    )


@nox.session
def docs(session: nox.Session) -> None:
    """The pages of docs/, as HTML in docs/_build/html; a warning is an error."""
    session.install("-e", ".[test]", *nox.project.dependency_groups(PROJECT, "docs"))
    built = Path("docs", "_build", "html")
    session.run("sphinx-build", "-W", "--keep-going", "-n", "-q", "-E", "docs", str(built))
    session.run("pytest", "-q", "tests/built_docs.py")
    session.log(f"open {built / 'index.html'}")


@nox.session(python=OLDEST, default=False)
def fuzz(session: nox.Session) -> None:
    """Any bytes, guided by coverage, for a minute each: -- codec -max_total_time=600."""
    session.install("-e", ".[test]", *nox.project.dependency_groups(PROJECT, "fuzz"))
    session.run("python", "-m", "tests.fuzz", *session.posargs)


@nox.session(default=False)
def adversity(session: nox.Session) -> None:
    """A session of every verb, with the link failing at every single byte, in a few minutes."""
    session.install("-e", ".[test]")
    session.run("pytest", "--numprocesses=auto", "tests/adversity.py", *session.posargs)


@nox.session(name="cluster-dev", default=False)
def cluster_dev(session: nox.Session) -> None:
    """The client suite against two nodes of the development broker, its clients on both."""
    session.install("-e", ".[test]")
    session.env["EMITTER_NODES"] = "2"
    session.run("pytest", "--numprocesses=auto", "-m", "emitter", *session.posargs)


@nox.session(name="plain-engine", default=False)
def plain_engine(session: nox.Session) -> None:
    """The client suite without the client's fast path, so that Paho carries every packet."""
    session.install("-e", ".[test]")
    session.env["EMITTER_PLAIN_ENGINE"] = "1"
    files = ("tests/client", "tests/reconnecting", "tests/test_paho_contract.py")
    session.run(*("pytest", "--numprocesses=auto", "-m", "not fast_path", *files, *session.posargs))


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """The web chat of the examples, in Chromium: two talk, are cut off, and come back."""
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        session.error(
            f"there is no {' and no '.join(missing)}: this session drives a browser. On Debian and "
            "Ubuntu: apt-get install chromium chromium-driver"
        )

    session.install("-e", ".[test]", *nox.project.dependency_groups(PROJECT, "browser"))
    session.run("pytest", "tests/browser.py", *session.posargs)


@nox.session(default=False)
def emitter(session: nox.Session) -> None:
    """The client suite against a real Emitter: EMITTER_URL and EMITTER_SECRET say which."""
    missing = [name for name in ("EMITTER_URL", "EMITTER_SECRET") if not os.environ.get(name)]
    if missing:
        session.error(
            f"set {' and '.join(missing)}: this session talks to a running Emitter, at a URL such "
            "as mqtt://127.0.0.1:8080, with the secret key of its licence"
        )

    session.install("-e", ".[test]")
    session.run("pytest", "-m", "emitter", *session.posargs)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Many clients, a network that fails and a broker that dies, for minutes: see --help."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "tests.soak", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure us beside other MQTT clients: -- --quick, or see benchmarks/README.md."""
    session.install("-e", ".[websocket]", *nox.project.dependency_groups(PROJECT, "bench"))
    session.run("python", "-m", "benchmarks", *session.posargs)
