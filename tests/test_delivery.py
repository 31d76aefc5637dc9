"""Where CPython delivers signals and when it collects garbage: what `_lease` relies on, version by version.

These are facts of the interpreter that no manual promises. One that changes is found here, before it costs anybody a
session.
"""

import json
import sys
from typing import Any, Final

import pytest
from tests.processes import run_script


VERSION: Final = sys.version_info[:2]

FACTS: Final = {
    # Signals are delivered after the call of a C function, when jumping backwards, on entering a Python function ...
    "a_call_is_torn_from_its_assignment": True,
    "a_jump_backwards_is_struck": True,
    "the_entry_of_exit_is_struck": True,
    # ... and nowhere else.
    "an_instant_is_interrupted": False,
    # A turn of an iterator that is written in C belongs to the instant.
    "a_turn_of_iter_is_torn": False,
    "a_turn_of_starmap_is_torn": False,
    "a_turn_of_map_is_torn": False,
    "an_unpacked_result_is_torn": False,
    "a_turn_of_a_generator_is_torn": True,
    # The call of `__enter__` is a call as any other, in one version.
    "a_with_statement_leaks": VERSION == (3, 14),
    # What a `with` statement holds, and for how long.
    "exit_is_asked_for_first": True,
    "an_exit_stack_asks_the_class": VERSION <= (3, 14),
    "a_partial_dies_before_its_end": False,
    "a_traceback_keeps_a_partial": False,
    "a_traceback_keeps_a_callable_in_python": True,
    # When the garbage collector clears weak references, and when it comes in.
    "weak_references_live_until_the_finalizers": VERSION >= (3, 15),
    "a_generator_ends_after_its_lease": VERSION <= (3, 14),
    "the_collector_comes_in_where_a_container_is_made": VERSION <= (3, 11),
    # So this library keeps its lock and its KV caches.
    "a_struck_replacement_is_torn": False,
    "a_struck_cache_is_lost": False,
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Have the interpreter looked at, in a process of its own."""
    done = run_script("delivery", measured=False)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact(found: dict[str, Any], fact: str) -> None:
    """Find each fact of this version of CPython as `_lease` tells it."""
    assert found[fact] is FACTS[fact]


def test_all_facts_are_told(found: dict[str, Any]) -> None:
    """Compare everything that the script finds out."""
    assert set(found) - {"loop", "with"} == set(FACTS)


def test_a_lock_taken_in_a_loop(found: dict[str, Any]) -> None:
    """Leak no lock that is taken by a turn of a loop, whenever a signal of a timer strikes."""
    if "loop" not in found:
        pytest.skip("no interval timers here")
    strikes, leaks = found["loop"]
    assert strikes > 1000, "the signals are too rare"
    assert leaks == 0


def test_a_lock_taken_by_a_with_statement(found: dict[str, Any]) -> None:
    """Leak locks that are taken by a `with` statement in one version, which is why there is none here."""
    if "with" not in found:
        pytest.skip("no interval timers here")
    strikes, leaks = found["with"]
    assert strikes > 1000, "the signals are too rare"
    assert (leaks > 0) == (VERSION == (3, 14))
