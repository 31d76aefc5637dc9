"""The batch: several sessions borrowed at once, all or none."""

from collections import deque
from itertools import repeat
from types import TracebackType
from typing import Generic, TypeVar, final

from attrs import define

from inference_session._borrow import BorrowedState
from inference_session._lease import LeasedBlock, no_exit


KV = TypeVar("KV")


@final
@define(eq=False, repr=False)
class BorrowedBatch(LeasedBlock, Generic[KV]):
    """Borrows of several sessions, which begin and end together."""

    _states: "list[BorrowedState[KV]]"

    def __enter__(self) -> list[BorrowedState[KV]]:
        lease = self._begin()
        taken: list[BorrowedState[KV]] = []
        try:
            for state in self._states:
                state._take(lease)
                taken.append(state)
        except BaseException:
            self._exit = no_exit
            for state in taken:
                state._give_back()
            raise
        return taken

    def _end(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        try:
            for state in self._states:
                state._current()
            if any(state._session._is_forked() for state in self._states):
                for state in self._states:
                    state._leave(exc_type)
            elif exc_type is not None:
                self._undo(exc)
            else:
                self._commit()
        finally:
            self._exit = no_exit

    def _commit(self) -> None:
        ledgers = [state._ledger for state in self._states]
        try:
            for ledger in ledgers:
                ledger.check_cache(ledger.kv_length)
            savepoints = [ledger.new_savepoint() for ledger in ledgers]
            # All at once: a call that stays within C code is one instant.
            deque(map(setattr, ledgers, repeat("savepoint"), savepoints), maxlen=0)
        except BaseException as failure:
            self._undo(failure)
            raise
        error = None
        for state in self._states:
            try:
                state._give_back()
            except Exception as raised:  # noqa: BLE001 of the release of a session closed meanwhile
                error = raised
        if error is not None:
            raise error

    def _undo(self, failure: BaseException | None) -> None:
        for state in self._states:
            state._undo(failure)
