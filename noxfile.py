"""What a contributor runs: `nox -s lint unit`, or `nox -s tests -- -k torchdiffeq`, or `nox` for everything.

The sessions run in the environment that is active (`pip install -e ".[dev,docs]"`), because an environment for each
of them would install torch five times.
"""

import os
import shutil
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"


@nox.session
def lint(session: nox.Session) -> None:
    """Check code, types, imports, spelling, pages and the faults of tests/mutants.py (1 min)."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright")
    session.run("lint-imports")
    session.run("codespell")
    session.run("python", ".ci/pages.py")
    session.run("python", "tests/mutants.py", "--check")
    # git grep prints the lines that name a path of one machine, and returns 1 if there is none.
    session.run("git", "grep", "-nIE", "/(work|root|tmp)/", "--", ".", ":!noxfile.py", success_codes=[1])


@nox.session
def unit(session: nox.Session) -> None:
    """Run the quick tests of core, solvers, fields and flows (1 min of a core)."""
    session.run("pytest", "-q", "-m", "unit and not slow", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all quick tests over all cores (5 min of two cores)."""
    session.run("pytest", "-q", "-n", "auto", "--dist", "loadfile", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site in site/, where every warning is an error."""
    session.run("sphinx-build", "-W", "--keep-going", "--quiet", "docs", "site")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it in an environment that does not see the checkout, and use it there."""
    with tempfile.TemporaryDirectory() as scratch:
        # Build from a copy of what git sees: setuptools packs whatever an earlier build has left in build/.
        source, dist, clean = (Path(scratch) / name for name in ("source", "dist", "clean"))
        files = session.run("git", "ls-files", "--cached", "--others", "--exclude-standard", silent=True)
        for name in str(files).splitlines():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, source / name)
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(dist), str(source), silent=True)
        built = [str(path) for path in dist.iterdir()]
        session.run("twine", "check", "--strict", *built)
        wheels = [path for path in built if path.endswith(".whl")]
        session.run("check-wheel-contents", *wheels)

        # The separate environment sees the installed packages, but not the checkout.
        session.run("python", "-m", "venv", "--without-pip", str(clean))
        python = str(clean / "bin" / "python")
        session.run("pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", *wheels)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = str(session.run(python, "-c", code, silent=True)).strip()
        Path(packages, "dependencies.pth").write_text(str(session.run("python", "-c", code, silent=True)))
        session.run("python", "-m", "pip", "check")
        session.run("bash", ".ci/smoke", env={"PATH": f"{clean / 'bin'}{os.pathsep}{os.environ['PATH']}"})
