"""The session of an LLM inference engine: one conversation's KV cache and tokens, exclusive, atomic, never copied."""

from inference_session._registry import SessionRegistry
from inference_session._session import Session


__all__ = ["Session", "SessionRegistry"]
