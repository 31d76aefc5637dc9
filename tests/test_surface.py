"""The public interface: what can be imported from where, and what the package needs."""

import ast
import importlib
import inspect
import pkgutil
import pydoc
import re
import subprocess
import sys
from importlib.metadata import metadata, requires
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import ModuleType

import pytest

import inference_session


SURFACE = {
    "inference_session": ["Session", "SessionRegistry"],
    "inference_session.engine": [
        "TORN",
        "BatchEngine",
        "BorrowedState",
        "DecodeResult",
        "Engine",
        "PrefillResult",
        "Slot",
        "StateSlots",
    ],
    "inference_session.exceptions": [
        "BorrowExpiredError",
        "RegistryFullError",
        "SessionBusyError",
        "SessionClosedError",
        "SessionError",
        "SessionExistsError",
        "SessionFileError",
        "SessionForkedError",
        "SessionNotFoundError",
        "SessionOwnerError",
        "StateMismatchError",
    ],
    "inference_session.testing": ["check_engine", "parametrize_with_checks"],
}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(inference_session.__path__, "inference_session.")
]
public_modules = pytest.mark.parametrize("name", SURFACE)


def public_names(module: ModuleType) -> set[str]:
    """Return what a module shows without an underscore, but for other modules."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


@public_modules
def test_all(name: str) -> None:
    """`__all__` is what was promised, sorted; a change of the interface is a change of this test."""
    assert importlib.import_module(name).__all__ == SURFACE[name]


@pytest.mark.parametrize(
    "name", ["inference_session", "inference_session.engine", "inference_session.testing"]
)
def test_nothing_else_is_there(name: str) -> None:
    """Completion in an editor offers exactly what is public."""
    assert public_names(importlib.import_module(name)) == set(SURFACE[name])


def test_no_other_public_modules() -> None:
    """All other modules are private by their names."""
    private = {name for name in MODULES if name.rpartition(".")[2].startswith("_")}
    assert set(MODULES) - private == set(SURFACE) - {"inference_session"}


@public_modules
def test_modules_are_documented(name: str) -> None:
    """`help` and the reference tell what each module, class, function and member is for."""
    module = importlib.import_module(name)
    assert module.__doc__
    for public in SURFACE[name]:
        documented: object = getattr(module, public)
        if public == "TORN":  # a constant: the reference tells
            continue
        assert inspect.getdoc(documented)
        if inspect.isfunction(documented):
            continue
        for member, value in vars(documented).items():
            if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{public}.{member}"


@public_modules
def test_help_shows_what_users_pass(name: str) -> None:
    """`help` shows no private arguments, whether of calls, of patterns or by what stands for a default."""
    for public in SURFACE[name]:
        documented: object = getattr(importlib.import_module(name), public)
        if not inspect.isclass(documented):
            continue
        assert not [field for field in getattr(documented, "__match_args__", ()) if field[0] == "_"]
        shown = pydoc.plain(pydoc.render_doc(documented))
        for arguments in re.findall(r"^ \|  [\w. =]+\((.*)\)", shown, re.MULTILINE):
            assert not re.search(r"\b_[a-z]|args: Never|getpid| at 0x", arguments), arguments


def test_star_import() -> None:
    """A star import brings what is public, and nothing private."""
    for name, public in SURFACE.items():
        namespace: dict[str, object] = {}
        exec(f"from {name} import *", namespace)
        assert set(namespace) - {"__builtins__"} == set(public)


def test_finality() -> None:
    """What must not be subclassed says so to type checkers: engines and the library rely on what these classes are."""
    engine = importlib.import_module("inference_session.engine")
    for public_class in (
        inference_session.Session,
        inference_session.SessionRegistry,
        engine.BorrowedState,
        engine.Slot,
        engine.StateSlots,
    ):
        assert getattr(public_class, "__final__", False)


def test_only_dependency() -> None:
    """The package needs attrs, and nothing else; extras may need more."""
    needed = [r for r in requires("inference-session") or [] if "extra ==" not in r]
    assert [requirement.split(">")[0].strip() for requirement in needed] == ["attrs"]


def imported(node: ast.AST) -> list[str]:
    """Return the top-level packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0
        return [(node.module or "").partition(".")[0]]
    return []


def sources(package: str) -> list[Traversable]:
    """Return the Python files of a package, but not those of packages in it."""
    return [it for it in files(package).iterdir() if it.name.endswith(".py")]


def test_only_imports() -> None:
    """What isn't declared isn't imported: only `testing` needs its extra, and `_typeshed` is for type checkers only."""
    allowed = {*sys.stdlib_module_names, "attrs", "inference_session", "_typeshed"}
    extra = {"hypothesis", "pytest"}
    package, testing = sources("inference_session"), sources("inference_session.testing")
    assert len(package) + len(testing) == len(MODULES) + 1
    for source in package + testing:
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            needed = set(imported(node))
            assert needed <= (allowed | extra if source in testing else allowed), source.name


def test_import_is_light() -> None:
    """To import the package doesn't import what is slow, or what an engine alone should decide about."""
    code = "import sys; before = set(sys.modules); import inference_session.engine; print(*set(sys.modules) - before)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    modules = set(result.stdout.split())
    assert "inference_session.engine" in modules
    heavy = {"asyncio", "hypothesis", "multiprocessing", "numpy", "pytest", "torch"}
    assert modules.isdisjoint({*heavy, "typing_extensions"})


def test_typed() -> None:
    """Type checkers take the annotations for what they are."""
    assert files("inference_session").joinpath("py.typed").is_file()
    assert "Typing :: Typed" in (metadata("inference-session").get_all("Classifier") or [])
