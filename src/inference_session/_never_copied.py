"""The base of all classes that hold or reach a conversation's state: never copied, and showing nothing of it."""

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import ClassVar, Final, Never, NoReturn, Protocol, SupportsIndex, TypeVar

from attrs import define, field, fields


Method = TypeVar("Method", bound=Callable[..., None])

_SELF_ALONE: Final = Signature([Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)])


def shown_without_arguments(method: Method) -> Method:
    """Show a method in `help` without its arguments, which only the library itself passes."""
    setattr(method, "__signature__", _SELF_ALONE)  # noqa: B010 it isn't declared
    return method


@define
class _Unreadable:
    _never_copied: Never = field(repr=False)


class _Printer(Protocol):
    def text(self, text: str, /) -> object: ...


class NeverCopied:
    """Refuses to be copied, pickled and subclassed, and lists only its public names.

    `attrs.asdict`, `attrs.astuple` and `attrs.evolve` read the fields of a class one by one. So each class here
    declares one more, which comes first and can't be read. `rich.print` shows all fields with a `repr`, so those with
    contents have none. `rich.inspect` and `inspect.getmembers` read the names listed by `dir`. Hypothesis and IPython
    look for `_repr_pretty_` before they look for fields.
    """

    __slots__ = ()

    _instead: ClassVar[str]
    """Why a copy would be wrong, and what to do instead."""

    @property
    def _never_copied(self) -> NoReturn:
        raise self._refusal()

    @classmethod
    def _refusal(cls) -> TypeError:
        return TypeError(f"{cls.__name__!r} can't be copied or pickled, {cls._instead}")

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise self._refusal()

    def __getstate__(self) -> NoReturn:
        raise self._refusal()

    def __replace__(self, **changes: Never) -> NoReturn:
        raise self._refusal()

    def _repr_pretty_(self, printer: _Printer, cycle: bool) -> None:  # noqa: FBT001 it's IPython's
        printer.text(repr(self))

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name.startswith("__") or name[0] != "_"]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # of Generic
        for base in cls.__bases__:
            if "_instead" in vars(base):
                raise TypeError(
                    f"{base.__name__!r} can't be subclassed, as engines rely on what it is; "
                    "let your class have one instead of being one"
                )
        if "__attrs_attrs__" in vars(cls):  # attrs makes the class twice; this is the second one
            fields_and_one = (*fields(_Unreadable), *vars(cls)["__attrs_attrs__"])
            setattr(cls, "__attrs_attrs__", fields_and_one)  # noqa: B010 it isn't declared
            if "__attrs_init__" in vars(cls):  # `help` would show private fields as its arguments
                delattr(cls, "__attrs_init__")
