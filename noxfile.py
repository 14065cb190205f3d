# /// script
# dependencies = ["nox[uv]>=2025.5.1"]
# ///
"""
The checks of the project. Run them with ``python -m pip install nox && python -m nox``.

By default, the test suite runs on the Python that runs nox, and ``.ci/run`` adds further sessions.
nox skips sessions whose interpreter is not installed. The block above makes nox install uv, which
creates an environment within a second.
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
PLATFORMS = {
    "linux": "Linux",
    "win32": "Windows",
    "darwin": "Darwin",
}  # mypy's name: pyright's name
# The tests and benchmarks require POSIX, for pseudo-terminals and resource usage.
CHECKED = {"win32": ("emitter_anyio", "examples")}
PROJECT = nox.project.load_toml("pyproject.toml")
MEASURED = Path(".nox/measured").absolute()
WORKERS = max(1, (os.cpu_count() or 1) * 3 // 2)  # half of the time, tests wait for something
CLUSTER_SUITE = ("tests/cluster/features.py", "tests/cluster/faults.py")

# Without bytecode, every process that a test starts compiles all that it imports, and every run of
# pytest rewrites every test module.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

nox.options.sessions = ["lint", "typing", f"tests-{RUNNING}", "coverage", "build", "docs"]
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and the layers of imports."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache")


@nox.session
def typing(session: nox.Session) -> None:
    """Check types for the oldest Python on Linux, and that all public names are typed."""
    _install_type_checkers(session)
    _check_types(session, OLDEST, "linux")
    session.run("pyright", "--verifytypes", "emitter_anyio", "--ignoreexternal")


@nox.session(default=False)
def typing_matrix(session: nox.Session) -> None:
    """Check types for the oldest and the newest Python on each platform."""
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
    """Run the test suite."""
    session.install("-e", ".[test]")
    _run_tests(session)


@nox.session(python=OLDEST, default=False)
def tests_oldest(session: nox.Session) -> None:
    """Run the test suite with the lowest versions of the dependencies, in asyncio's debug mode."""
    lowest = [
        requirement.split(",")[0].replace(">=", "==")
        for requirement in PROJECT["project"]["dependencies"]
    ]
    session.install("-e", ".[test]", *lowest)
    # Debug mode reports calls from the wrong thread, and where unawaited coroutines were created.
    session.env["PYTHONASYNCIODEBUG"] = "1"
    _run_tests(session)


def _run_tests(session: nox.Session) -> None:
    """Run pytest. Only the default session measures coverage, because that takes time."""
    arguments = ("-m", "pytest", f"--numprocesses={WORKERS}", "--dist=worksteal", *session.posargs)
    if session.name != f"tests-{RUNNING}":
        session.run("python", *arguments)
        return

    shutil.rmtree(MEASURED, ignore_errors=True)
    MEASURED.mkdir(parents=True)
    session.env["COVERAGE_FILE"] = str(MEASURED / ".coverage")
    session.run("coverage", "run", *arguments)


@nox.session
def coverage(session: nox.Session) -> None:
    """Check that the default test session covered every line and branch of the library."""
    if not any(MEASURED.glob(".coverage*")):
        session.error(f"no coverage data: run the session tests-{RUNNING} before this one")

    session.install("coverage")
    session.env["COVERAGE_FILE"] = str(MEASURED / ".coverage")
    if any(MEASURED.glob(".coverage.*")):
        session.run("coverage", "combine", "--quiet")

    session.run("coverage", "report")


@nox.session
def build(session: nox.Session) -> None:
    """Build and check the distributions, and install them in an empty environment."""
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
    # Leave the checkout, from which Python would import the package.
    with session.chdir(made):
        session.run(python, "-m", "emitter_anyio", "demo", external=True)
        session.run(python, "-m", "tarfile", "-e", str(sdist), external=True)
    with session.chdir(made / sdist.name.removesuffix(".tar.gz")):
        session.run(python, "-m", "pip", "install", "--quiet", ".[test]", external=True)
        session.run(python, "-m", "pytest", "--collect-only", "--quiet", external=True, silent=True)


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Build a release in dist/, and its software bill of materials (CycloneDX) in sbom/."""
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
    """Build the documentation as HTML in docs/_build/html, with warnings as errors."""
    session.install("-e", ".[test]", *nox.project.dependency_groups(PROJECT, "docs"))
    built = Path("docs", "_build", "html")
    session.run("sphinx-build", "-W", "--keep-going", "-n", "-q", "-E", "docs", str(built))
    session.run("pytest", "-q", "tests/built_docs.py")
    session.log(f"open {built / 'index.html'}")


@nox.session(python=OLDEST, default=False)
def fuzz(session: nox.Session) -> None:
    """Fuzz each target for a minute, or as in ``-- codec -max_total_time=600``."""
    session.install("-e", ".[test]", *nox.project.dependency_groups(PROJECT, "fuzz"))
    session.run("python", "-m", "tests.fuzz", *session.posargs)


@nox.session(default=False)
def adversity(session: nox.Session) -> None:
    """Call every method with a connection that fails at every byte, in a few minutes."""
    session.install("-e", ".[test]")
    session.run("pytest", "--numprocesses=auto", "tests/adversity.py", *session.posargs)


@nox.session(name="cluster-dev", default=False)
def cluster_dev(session: nox.Session) -> None:
    """Run the client suite and the cluster suite against clusters of development brokers."""
    session.install("-e", ".[test]")
    session.run("pytest", "--numprocesses=auto", *CLUSTER_SUITE, *session.posargs)
    session.env["EMITTER_NODES"] = "2"
    session.run("pytest", f"--numprocesses={WORKERS}", "-m", "emitter", *session.posargs)


@nox.session(default=False)
def cluster(session: nox.Session) -> None:
    """Run the cluster suite against real nodes: EMITTER_BINARY, or those of EMITTER_CLUSTER."""
    session.install("-e", ".[test]")
    command = ["pytest", *CLUSTER_SUITE, *session.posargs]
    if os.environ.get("EMITTER_CLUSTER"):
        session.run(*command)
    elif binary := os.environ.get("EMITTER_BINARY"):
        session.run("python", "-m", "tests.cluster", "--emitter", binary, "--", *command)
    else:
        session.error(
            "EMITTER_BINARY must be set to Emitter's program, or EMITTER_CLUSTER, EMITTER_SECRET "
            "and EMITTER_CLUSTER_COMMAND to nodes that are running; see CONTRIBUTING.md"
        )


@nox.session(name="plain-engine", default=False)
def plain_engine(session: nox.Session) -> None:
    """Run the client suite without the fast path, so that Paho handles every packet."""
    session.install("-e", ".[test]")
    session.env["EMITTER_PLAIN_ENGINE"] = "1"
    files = ("tests/client", "tests/reconnecting", "tests/test_paho_contract.py")
    session.run(*("pytest", "--numprocesses=auto", "-m", "not fast_path", *files, *session.posargs))


@nox.session(default=False)
def shells(session: nox.Session) -> None:
    """Test the completion of command lines in zsh and fish; the test suite tests bash."""
    missing = [name for name in ("zsh", "fish") if not shutil.which(name)]
    if missing:
        session.error(
            f"cannot find {' and '.join(missing)}; on Debian and Ubuntu, install them with "
            f"apt-get install {' '.join(missing)}"
        )

    session.install("-e", ".[test]")
    session.run("pytest", "tests/shells.py", *session.posargs)


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """Test the web chat of the examples in Chromium, including a lost connection."""
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        session.error(
            f"cannot find {' and '.join(missing)}; on Debian and Ubuntu, install them with "
            "apt-get install chromium chromium-driver"
        )

    session.install("-e", ".[test]", *nox.project.dependency_groups(PROJECT, "browser"))
    session.run("pytest", "tests/browser.py", *session.posargs)


@nox.session(default=False)
def emitter(session: nox.Session) -> None:
    """Run the client suite against a real Emitter, at EMITTER_URL with EMITTER_SECRET."""
    missing = [name for name in ("EMITTER_URL", "EMITTER_SECRET") if not os.environ.get(name)]
    if missing:
        session.error(
            f"{' and '.join(missing)} must be set: EMITTER_URL to the URL of a running Emitter, "
            "such as mqtt://127.0.0.1:8080, and EMITTER_SECRET to its secret key"
        )

    session.install("-e", ".[test]")
    session.run("pytest", "-m", "emitter", *session.posargs)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Run many clients with a failing network and broker for minutes; see ``-- --help``."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "tests.soak", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Compare the client with other MQTT clients; see benchmarks/README.md."""
    session.install("-e", ".[websocket]", *nox.project.dependency_groups(PROJECT, "bench"))
    session.run("python", "-m", "benchmarks", *session.posargs)
