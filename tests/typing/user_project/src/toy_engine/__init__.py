"""A toy language model, an engine for it, and a server of many chats."""

from toy_engine.engine import VOCABULARY, ToyEngine
from toy_engine.server import Server


__all__ = ["VOCABULARY", "Server", "ToyEngine"]
