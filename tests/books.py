"""The books of a registry, for tests that look inside."""

from inference_session import Session, SessionRegistry, _registry


def entries(registry: SessionRegistry) -> list[_registry._Entry]:
    """Return the entries in the order of use, the oldest first; the links must be whole."""
    found: list[_registry._Entry] = []
    link = registry._order
    marks = 0
    while True:
        assert link.newer.older is link
        link = link.newer
        if link is registry._order:
            break
        if link is registry._passed:
            marks += 1
        else:
            assert isinstance(link, _registry._Entry)
            found.append(link)
    assert marks == 1
    return found


def in_order(registry: SessionRegistry) -> list[Session]:
    """Return the sessions in the order of use, the oldest first."""
    return [registry._sessions[entry.key] for entry in entries(registry)]


def sizes(registry: SessionRegistry) -> dict[int, int]:
    """Return how many bytes the sessions have that hold some."""
    return dict(registry._kv_bytes)


def check_books(registry: SessionRegistry, limit: float = float("inf")) -> None:
    """Require the books of a registry to be true."""
    assert registry._room == limit - len(registry) or limit == float("inf")
    assert len(registry) <= limit
    assert list(registry) == [session.id for session in registry.values()]
    assert registry._kv_total == sum(sizes(registry).values())
    assert set(registry._kv_bytes) <= set(registry._sessions)
    assert {entry.key for entry in entries(registry)} == set(registry._sessions)
    for entry in entries(registry):
        session = registry._sessions[entry.key]
        assert entry.key == session.id.int
        assert not session.closed
        assert session._observer is entry
