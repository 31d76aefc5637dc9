"""For engine developers: access to the state of sessions, and the interface that applications see."""

from inference_session._borrow import BorrowedState
from inference_session._engine import DecodeResult, Engine, PrefillResult
from inference_session._slots import StateSlots


__all__ = ["BorrowedState", "DecodeResult", "Engine", "PrefillResult", "StateSlots"]
