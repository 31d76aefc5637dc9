"""For engine developers: access to the state of sessions, and the interface for applications."""

from inference_session._borrow import BorrowedState
from inference_session._engine import BatchEngine, DecodeResult, Engine, PrefillResult
from inference_session._slot import Slot
from inference_session._slots import StateSlots
from inference_session.exceptions import TORN


__all__ = [
    "TORN",
    "BatchEngine",
    "BorrowedState",
    "DecodeResult",
    "Engine",
    "PrefillResult",
    "Slot",
    "StateSlots",
]
