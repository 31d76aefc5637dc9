"""What the page says about each measurement: every number is its results', and every statement is checked."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from attrs import frozen
from tests.benchmarks.comparison.records import Record
from tests.benchmarks.comparison.units import duration, megabytes, percent, short, times


# What must hold, here and in any run.
LARGEST_SHARE, LARGEST_SHARE_RANDOM = 0.01, 0.15
LEAST_GAIN = 10
FLAT, FLAT_VISITS, SLOWEST_TOKEN = 1.5, 2.5, 4e-9
LEAST_COPY, MOST_OWNED = 0.95, 0.5
SLOWEST_RECOVERY, LEAST_ANEW = 3, 5


@frozen
class Claim:
    """A statement with the numbers that it is about."""

    text: str
    holds: bool
    always: bool = True
    """Whether it must hold in a short run on a busy machine, too."""


@frozen
class Section:
    """What the page says about a measurement."""

    title: str
    question: str
    claims: Sequence[Claim]
    table: str
    how: str


def bookkeeping(records: Sequence[Record]) -> Section:
    """Tell what a session adds to a step."""
    share = {(r["engine"], r["model"]): r["session_seconds"] / r["step_seconds"] for r in records}
    trained = {name: value for name, value in share.items() if name[1] != "random"}
    most, most_trained = max(share, key=share.__getitem__), max(trained, key=trained.__getitem__)
    return Section(
        title="What a session adds to a decode step",
        question="How much of a decode step is the session's bookkeeping, with each engine?",
        claims=[
            Claim(
                f"With a trained model, small as it is, a session adds {percent(trained[most_trained])} "
                f"of a step at most ({most_trained[0]}): less than {percent(LARGEST_SHARE)}.",
                trained[most_trained] < LARGEST_SHARE,
            ),
            Claim(
                f"With random models that are as small as makes sense in a test, it adds "
                f"{percent(share[most])} at most ({most[0]}): less than {percent(LARGEST_SHARE_RANDOM)}.",
                share[most] < LARGEST_SHARE_RANDOM,
                always=False,
            ),
        ],
        table=table(
            [
                "engine, model",
                "step",
                "session adds",
                "share",
                "engine adds, session included",
                "share",
            ],
            [
                [
                    f"{r['engine']}, {r['model']}",
                    duration(r["step_seconds"]),
                    duration(r["session_seconds"]),
                    percent(r["session_seconds"] / r["step_seconds"]),
                    duration(r["engine_seconds"]),
                    percent(r["engine_seconds"] / r["step_seconds"]),
                ]
                for r in records
            ],
        ),
        how="""Three conversations take turns with the same call of the model on a KV cache of the same kind: one
by hand with a list, one by hand in a session, as in the README, and one by the `decode` of the engine in the
documentation, which also checks for room, for an empty session and the like. One step of a model differs from
the next by more than a session costs, so whole steps can't be subtracted from each other. Instead, a clock
around the model's call splits each step in two: what the rest takes longer in a session is what the session
adds (medians). It is taken between calls of the model, with the processor's caches as those leave them; in a
loop without a model it would look cheaper.""",
    )


def prefix(records: Sequence[Record]) -> Section:
    """Tell how fast a prefix is found."""
    found: dict[tuple[int, str, str, str], float] = {
        (r["length"], r["place"], r["kind"], r["subject"]): r["seconds"] for r in records
    }
    keys = list(dict.fromkeys((r["length"], r["place"], r["kind"]) for r in records))
    longest = max(length for length, _, _ in keys)
    peers = ("llama-cpp-python", "mlx-lm")

    def ratio(key: tuple[int, str, str], peer: str) -> float:
        return found[*key, peer] / found[*key, "session"]

    claims: list[Claim] = []
    for peer in peers:
        far = {kind: ratio((longest, "end", kind), peer) for kind in ("list", "array", "NumPy")}
        claims.append(
            Claim(
                f"At {longest:,} tokens that differ near the end, {peer} takes {times(far['list'])} "
                f"times as long as a session for a list, {times(far['array'])} times for an `array` "
                f"and {times(far['NumPy'])} times for a NumPy array: more for each, and for buffers "
                f"at least {LEAST_GAIN} times.",
                far["list"] > 1 and min(far["array"], far["NumPy"]) >= LEAST_GAIN,
            )
        )
    slower = [(key, peer) for key in keys for peer in peers if ratio(key, peer) < 1]
    if slower:
        worst = min(slower, key=lambda item: ratio(*item))
        (length, _, kind), peer = worst
        claims.append(
            Claim(
                "A session is slower where the first tokens differ already: there, a peer has nothing "
                "to look at, but a session checks and copies all of the prompt. At worst it takes "
                f"{times(1 / ratio(*worst))} times as long as {peer} ({length:,} tokens, {kind}). "
                "Where half of the tokens or more are reused it never is.",
                {place for (_, place, _), _ in slower} == {"start"},
                always=False,
            )
        )
    else:
        claims.append(Claim("A session is never slower.", holds=True))
    quadratic = found[longest, "start", "list", "mlx-lm"] / found[longest, "end", "list", "mlx-lm"]
    claims.append(
        Claim(
            "mlx-lm's trie then walks down what is left of the other conversation, and copies a growing "
            f"list at each token of it: at {longest:,} tokens, a prompt that differs at the start takes "
            f"it {times(quadratic)} times as long as one that differs near the end.",
            quadratic > 1,
            always=False,
        )
    )
    return Section(
        title="Reuse of a common prefix",
        question="How long does it take to find out what of a prompt is cached, and to keep that?",
        claims=claims,
        table=table(
            ["tokens, differing, input", "session", *(f"{peer}, times that" for peer in peers)],
            [
                [
                    f"{key[0]:,}, {key[1]}, {key[2]}",
                    duration(found[*key, "session"]),
                    *(times(ratio(key, peer)) for peer in peers),
                ]
                for key in keys
            ],
        ),
        how="""What runs is the peers' own code: `Llama.generate` up to where it would feed the model, and
`LRUPromptCache.fetch_nearest_cache`, which mlx-lm's server calls, with a KV cache that is empty, so that the
copy that it makes of it costs nothing here (it does below). Both take lists; what else a prompt may be is made
one, in the time that is shown (for mlx-lm it is added: its search is measured once, as it is slow). A session's
time is that of `reuse_prefix`: it compares, checks the new tokens, truncates the KV cache and replaces the
history. CPU time, a tenth percentile of rounds that take turns.""",
    )


def growth(records: Sequence[Record]) -> Section:
    """Tell what does not grow, and what does."""
    cost: dict[tuple[str, str, int], float] = {
        (r["by"], r["call"], r["count"]): r["seconds"] for r in records
    }
    counts = {
        by: sorted({r["count"] for r in records if r["by"] == by}) for by in ("tokens", "sessions")
    }
    tokens, sessions = counts["tokens"], counts["sessions"]
    constant = ("borrow", "append", "advance", "rewind")

    def grown(by: str, call: str) -> float:
        return cost[by, call, counts[by][-1]] / cost[by, call, counts[by][0]]

    def more(call: str) -> str:
        return duration(cost["sessions", call, sessions[-1]] - cost["sessions", call, sessions[0]])

    flat = {call: grown("tokens", call) for call in constant}
    worst = max(flat, key=flat.__getitem__)
    calls = [call for by, call, _ in cost if by == "sessions"]
    visits = {call: grown("sessions", call) for call in dict.fromkeys(calls)}
    worst_visit = max((call for call in visits if call != "by hand"), key=visits.__getitem__)
    rate = cost["tokens", "reuse_prefix", tokens[-1]] / tokens[-1]
    return Section(
        title="Long histories and many sessions",
        question="What do a borrow and its calls cost with ever longer histories, and with ever more sessions?",
        claims=[
            Claim(
                "A borrow and the calls `append`, `advance` and `rewind` of one token are flat: with "
                f"{tokens[-1]:,} tokens they take at most {times(flat[worst])} times (`{worst}`) what "
                f"they take with {tokens[0]:,}, less than {FLAT}.",
                flat[worst] < FLAT,
            ),
            Claim(
                f"`reuse_prefix` looks at every token, so it is not: at {tokens[-1]:,} it takes "
                f"{duration(rate)} a token, less than {duration(SLOWEST_TOKEN)}, as it compares memory.",
                rate < SLOWEST_TOKEN,
            ),
            Claim(
                f"With {sessions[-1]:,} sessions, visited at random, a borrow with a call in it takes "
                f"at most {times(visits[worst_visit])} times (`{worst_visit}`) what it takes with one, "
                f"less than {FLAT_VISITS}: a session that was not visited for long is not in the "
                "processor's caches any more. Nothing is searched: the same by hand, a lock and two "
                f"lists, takes {times(visits['by hand'])} times as long, {more('by hand')} more to a "
                f"decode step's {more('step')}.",
                visits[worst_visit] < FLAT_VISITS,
            ),
        ],
        table="\n\n".join(
            table(
                [f"{by}", *(short(count) for count in counts[by])],
                [
                    [call, *(duration(cost[by, call, count]) for count in counts[by])]
                    for call in dict.fromkeys(call for other, call, _ in cost if other == by)
                ],
            )
            for by in counts
        ),
        how="""Above, one session with a growing history, and the calls in one borrow (a borrow by itself
for `borrow`; a rewind by one token with all that puts it back). Below, sessions of ten tokens, visited
at random, each in a borrow of its own with one call in it; the garbage collector is told not to look at them.
The KV cache is a list in place of a real one. CPU time, a tenth percentile of rounds that take turns.""",
    )


def memory(records: Sequence[Record]) -> Section:
    """Tell what a copy costs."""
    longest = max(r["tokens"] for r in records)
    taken = {
        (r["peer"], r["way"]): r["peak_bytes"] / r["cache_bytes"]
        for r in records
        if r["tokens"] == longest
    }
    copied = {peer: size for (peer, way), size in taken.items() if way == "deepcopy"}
    owned = {peer: size for (peer, way), size in taken.items() if way == "session"}
    bare = {peer: size for (peer, way), size in taken.items() if way == "bare cache"}
    size = next(r["cache_bytes"] for r in records if r["tokens"] == longest)

    def each(sizes: Mapping[str, float]) -> str:
        return " and ".join(f"{value:.2f} ({peer})" for peer, value in sizes.items())

    return Section(
        title="Memory to go on with a conversation",
        question="How much memory does it take at most to go on with a conversation whose KV cache is kept?",
        claims=[
            Claim(
                f"`copy.deepcopy` takes the KV cache a second time: at {longest:,} tokens, "
                f"{megabytes(size)} of it, the most that is taken on top is {each(copied)} times its "
                f"size, at least {LEAST_COPY}.",
                min(copied.values()) >= LEAST_COPY,
            ),
            Claim(
                f"A session takes {each(owned)} times its size: what the library needs for a step, and "
                f"less than {MOST_OWNED}.",
                max(owned.values()) < MOST_OWNED,
            ),
            Claim(
                "That is what the bare cache takes when nothing protects it, to within a tenth of its size: "
                f"{each(bare)} times.",
                all(abs(owned[peer] - bare[peer]) < 0.1 for peer in owned),
            ),
        ],
        table=table(
            ["library, way, tokens", "KV cache", "taken on top", "of its size"],
            [
                [
                    f"{r['peer']}, {r['way']}, {r['tokens']:,}",
                    megabytes(r["cache_bytes"]),
                    megabytes(r["peak_bytes"]),
                    f"{r['peak_bytes'] / r['cache_bytes']:.2f}",
                ]
                for r in records
            ],
        ),
        how="""A cache that is kept must not be gone on in by one user of it, as all others would see it change.
So transformers' documentation copies it by `copy.deepcopy`, and so does mlx-lm's server at every hit. A session
is borrowed instead, and gone on in by one at a time. The kernel is asked for the highest resident memory of the
process (Linux's `VmHWM`, set back at the start), each way in a process of its own, whose allocator gives large
blocks back at once, so that a copy can't hide in what was freed before. `tracemalloc` would see none of it. KV
caches are filled with random numbers; then the real model is fed a short prompt and two more tokens. Sizes
leave room in mlx-lm's buffers, as there is at all but one of 256 tokens.""",
    )


def recovery(records: Sequence[Record]) -> Section:
    """Tell how long a failed step is felt."""
    steps = {
        (r["engine"], r["tokens"], r["truncate"]): r["recovery_seconds"] / r["step_seconds"]
        for r in records
    }
    longest = max(r["tokens"] for r in records)
    engines = list(dict.fromkeys(r["engine"] for r in records))
    worst = max((key for key in steps if key[2]), key=steps.__getitem__)
    without = {engine: steps[engine, longest, False] for engine in engines}
    return Section(
        title="Recovery from a failed step",
        question="How long does it take from a failure in mid-step to the next right token?",
        claims=[
            Claim(
                f"With `truncate` it takes {times(steps[worst])} times a step at most ({worst[0]}, "
                f"{worst[1]:,} tokens), however long the history is: less than {SLOWEST_RECOVERY} "
                "times, rollback included.",
                steps[worst] < SLOWEST_RECOVERY,
            ),
            Claim(
                f"Without, the KV cache is computed anew. At {longest:,} tokens that takes "
                + " and ".join(
                    f"{times(value)} times a step ({engine})" for engine, value in without.items()
                )
                + f", more than {LEAST_ANEW} times what it takes with `truncate`.",
                all(
                    value > LEAST_ANEW * steps[engine, longest, True]
                    for engine, value in without.items()
                ),
            ),
        ],
        table=table(
            ["engine, tokens", "step", "with truncate", "in steps", "without", "in steps"],
            [
                [
                    f"{r['engine']}, {r['tokens']:,}",
                    duration(r["step_seconds"]),
                    duration(r["recovery_seconds"]),
                    f"{steps[r['engine'], r['tokens'], True]:.2g}",
                    duration(other["recovery_seconds"]),
                    times(steps[r["engine"], r["tokens"], False]),
                ]
                for r, other in zip(records[::2], records[1::2], strict=True)
            ],
        ),
        how="""`MemoryError` is raised within the model: with transformers in the middle layer, so that the
layers' caches are of two lengths; with NumPy after all layers. The clock runs from that instant: it counts the
rollback and the step that is tried again, and the best of a few counts. The token is compared with that of a
session that nothing disturbed. Models are random and small.""",
    )


SECTIONS: dict[str, Callable[[Sequence[Record]], Section]] = {
    "bookkeeping": bookkeeping,
    "prefix": prefix,
    "growth": growth,
    "memory": memory,
    "recovery": recovery,
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
