"""Book-keeping of KV caches: each is made once, belongs to one session, and is released once."""

from collections.abc import Hashable, Iterable
from typing import Any

from attrs import define, field

from inference_session import Session
from inference_session._session import NO_CACHE


@define(eq=False)
class CacheBook:
    """An engine's KV caches still to be released."""

    mistakes: list[str] = field(init=False, factory=list[str])
    """Descriptions of misused KV caches."""
    live: dict[Hashable, object] = field(init=False, factory=dict[Hashable, object])

    def write(self, function: str, args: tuple[Any, ...], result: object) -> None:
        """Record the result of one of the engine's functions."""
        if function == "create":
            self._made(function, result)
        elif function == "truncate":
            gone = self.live.pop(key(args[0]), NO_CACHE) is NO_CACHE
            if gone and key(result) == key(args[0]):
                self.mistakes.append("`truncate` returned a KV cache that was released")
            self._made(function, result)

    def released(self, cache: object) -> None:
        """Record a KV cache about to be released."""
        if self.live.pop(key(cache), NO_CACHE) is NO_CACHE:
            self.mistakes.append("`release` was called for a KV cache that was released before")

    def adopt(self, cache: object) -> None:
        """Record a KV cache returned by a step."""
        self.live[key(cache)] = cache

    def _made(self, function: str, cache: object) -> None:
        if key(cache) in self.live:
            self.mistakes.append(f"`{function}` returned a KV cache that is in use already")
        self.live[key(cache)] = cache

    def left_over(self, sessions: Iterable[Session]) -> bool:
        """Whether there are KV caches without a session."""
        return not self.live.keys() <= {
            key(cache) for session in sessions for cache in held(session)
        }


def key(cache: object) -> Hashable:
    """Return the identity of a KV cache; its value, if it's a handle, as handles can be used again."""
    return cache if isinstance(cache, (int, str, bytes)) else (id(cache),)


def held(session: Session) -> list[object]:
    """Return the KV caches held by a session."""
    caches = session._kv_cache, session._savepoint_cache
    return [cache for cache in caches if cache is not NO_CACHE]
