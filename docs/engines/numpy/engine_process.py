"""An engine in a process of its own: for examples that need two, or kill one."""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from numpy_llama import LlamaEngine


P = ParamSpec("P")
T = TypeVar("T")


class EngineProcess:
    """Makes an engine in another process, and calls functions there, one after the other.

    The process ends with the `with` block, and with this process, however that ends.
    """

    def __init__(self, make_engine: Callable[[], LlamaEngine]) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make_engine, theirs), daemon=True)
        # Ctrl-C is for this process, which then ends the other. That inherits what is ignored.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()

    @property
    def pid(self) -> int | None:
        """The id of the process."""
        return self._process.pid

    def call(
        self,
        function: Callable[Concatenate[LlamaEngine, P], T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Return what a function returns there, given the engine; or raise what it raises."""
        self._connection.send((function, args, kwargs))
        result, error = self._connection.recv()
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def kill(self) -> None:
        """Kill the process at once, by SIGKILL where there are signals, and wait for its end."""
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        self._process.close()
        self._connection.close()


def _serve(make_engine: Callable[[], LlamaEngine], connection: Connection) -> None:
    engine = make_engine()
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:  # It has ended.
            return
        result: tuple[Any, Exception | None]
        try:
            result = function(engine, *args, **kwargs), None
        except Exception as error:  # noqa: BLE001  It is raised there.
            result = None, error
        connection.send(result)
