"""Book-keeping of KV caches: each is made once, is one session's only, and is released once."""

from collections.abc import Hashable, Iterable
from typing import Any

from attrs import define, field

from inference_session import Session
from inference_session._session import NO_CACHE


@define(eq=False)
class CacheBook:
    """The KV caches of an engine that must still be released."""

    mistakes: list[str] = field(init=False, factory=list[str])
    """What should never happen to a KV cache, in words."""
    live: dict[Hashable, object] = field(init=False, factory=dict[Hashable, object])

    def write(self, function: str, args: tuple[Any, ...], result: object) -> None:
        """Take note of what one of the engine's functions returned."""
        if function == "create":
            self._made(function, result)
        elif function == "truncate":
            gone = self.live.pop(key(args[0]), NO_CACHE) is NO_CACHE
            if gone and key(result) == key(args[0]):
                self.mistakes.append("`truncate` returned a KV cache that was released")
            self._made(function, result)

    def released(self, cache: object) -> None:
        """Take note of a KV cache that is about to be released."""
        if self.live.pop(key(cache), NO_CACHE) is NO_CACHE:
            self.mistakes.append("`release` was called for a KV cache that was released before")

    def adopt(self, cache: object) -> None:
        """Take note of a KV cache that a step returned."""
        self.live[key(cache)] = cache

    def _made(self, function: str, cache: object) -> None:
        if key(cache) in self.live:
            self.mistakes.append(f"`{function}` returned a KV cache that is in use already")
        self.live[key(cache)] = cache

    def left_over(self, sessions: Iterable[Session]) -> bool:
        """Whether there are KV caches that none of the sessions has."""
        return not self.live.keys() <= {
            key(cache) for session in sessions for cache in held(session)
        }


def key(cache: object) -> Hashable:
    """Return what tells a KV cache from others: its value, if it's a handle, which can be used again."""
    return cache if isinstance(cache, (int, str, bytes)) else (id(cache),)


def held(session: Session) -> list[object]:
    """Return the KV caches that a session holds."""
    caches = session._kv_cache, session._savepoint_cache
    return [cache for cache in caches if cache is not NO_CACHE]
