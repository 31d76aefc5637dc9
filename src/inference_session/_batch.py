"""The batch: several sessions borrowed at once, all or none."""

from types import TracebackType
from typing import Generic, TypeVar, final
from weakref import ref

from attrs import define

from inference_session._borrow import BorrowedState
from inference_session._lease import Keeper, LeasedBlock


KV = TypeVar("KV")


@final
@define(eq=False, repr=False)
class BorrowedBatch(LeasedBlock, Generic[KV]):
    """Borrows of several sessions, which begin and end together."""

    _states: "list[BorrowedState[KV]]"

    def __enter__(self) -> list[BorrowedState[KV]]:
        lease = ref(self._exit)
        self._exit = None
        if lease() is None:  # as in BorrowedState
            self._exit = Keeper()
            lease = ref(self._exit)
        end = lease()
        taken: list[BorrowedState[KV]] = []
        try:
            for state in self._states:
                state._exit = end  # one lease for all
                taken.append(state.__enter__())
        except BaseException:
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
            self._exit = None

    def _commit(self) -> None:
        ledgers = [state._ledger for state in self._states]
        try:
            for ledger in ledgers:
                ledger.check_cache(ledger.kv_length)
            for ledger in ledgers:
                ledger.commit()
        except BaseException as failure:
            self._undo(failure)
            raise
        for state in self._states:
            state._give_back()

    def _undo(self, failure: BaseException | None) -> None:
        for state in self._states:
            state._undo(failure)
