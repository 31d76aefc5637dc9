"""An engine over llama.cpp, by its low-level API in llama-cpp-python.

All sequences live in one native context, which one thread at a time may enter. So the KV cache of a
session is no memory of its own but a handle, a sequence id, and there are only so many.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from operator import index
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots
from inference_session.exceptions import SessionClosedError


try:
    import llama_cpp as L  # noqa: N812 short, as every call of the C API is repeated behind it
except ModuleNotFoundError as error:
    msg = "no llama.cpp: install it with `pip install llama-cpp-python==0.3.36`"
    raise ImportError(msg) from error

Logits = NDArray[np.float32]

# It says a lot on standard error, tokens among it. Whoever wants that sets the level before. (In
# this version of the binding, warnings count as errors, and errors as debugging.)
if not (_logger := logging.getLogger("llama-cpp-python")).level:
    _logger.setLevel(logging.CRITICAL)


class OutOfSequencesError(RuntimeError):
    """Every sequence id of the context is taken."""


class KVCacheFullError(MemoryError):
    """The KV cache of the context, which all sequences share, has no room for a batch."""


class KVSequence:
    """A sequence of a context: taken while this object lives and isn't released."""

    __slots__ = ("__weakref__", "id", "released")

    def __init__(self, id: int) -> None:  # noqa: A002 it's what it is
        self.id = id
        self.released = False


class LlamaContext:
    """A model and one context of llama.cpp, divided into sequences.

    Every native call is made under a lock, as a context is not thread-safe. Only `release`, which
    may come from any thread at any instant, touches nothing native: it leaves a mark, and whoever
    enters next clears up. Sessions keep the context alive, by their KV cache's `StateSlots`; it is
    freed when it is garbage, or at the interpreter's exit.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_sequences: int = 8,
        n_ctx: int = 2048,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int = os.cpu_count() or 1,
        exact: bool = False,
    ) -> None:
        """Load a GGUF file.

        `n_ctx` is the number of tokens that the KV cache holds, for all sequences together, and
        `n_batch` how many go through the model in one call. `exact` keeps keys and values as they
        were computed, in float32, so that it doesn't show whether they come from the cache.
        """
        most = min(n_batch, L.llama_max_parallel_sequences())
        if not 1 <= max_sequences <= most:
            msg = f"max_sequences must be from 1 to {most} here, got {max_sequences}"
            raise ValueError(msg)
        self.max_sequences, self.n_batch = max_sequences, n_batch
        self._holders: dict[int, weakref.ref[KVSequence]] = {}
        self._lock = threading.Lock()
        native = ExitStack()
        self._freed = weakref.finalize(self, _free, native, self._lock, os.getpid())
        model = L.llama_model_load_from_file(os.fsencode(path), L.llama_model_default_params())
        if model is None:
            msg = f"llama.cpp cannot load {path}: is it a GGUF file of a model that it knows?"
            raise ValueError(msg)
        native.callback(L.llama_model_free, model)
        params = L.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, min(n_ubatch, n_batch)
        params.n_seq_max = max_sequences
        params.kv_unified = True  # Else each sequence gets an equal, small part of n_ctx.
        params.n_threads = params.n_threads_batch = n_threads
        if exact:
            params.type_k = params.type_v = L.GGML_TYPE_F32
            params.flash_attn_type = L.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = L.llama_init_from_model(model, params)
        if context is None:
            msg = f"llama.cpp cannot make a context of {n_ctx} tokens: is there enough memory?"
            raise MemoryError(msg)
        native.callback(L.llama_free, context)
        memory, vocabulary = L.llama_get_memory(context), L.llama_model_get_vocab(model)
        assert memory is not None
        assert vocabulary is not None
        self._context, self._memory = context, memory
        self._batch = L.llama_batch_init(n_batch, 0, 1)
        native.callback(L.llama_batch_free, self._batch)
        self.n_ctx = L.llama_n_ctx_seq(context)  # Rounded up.
        self.vocab_size = L.llama_vocab_n_tokens(vocabulary)
        self.truncatable = not (L.llama_model_is_recurrent(model) or L.llama_model_is_hybrid(model))

    def create(self) -> KVSequence:
        """Take a free sequence; `OutOfSequencesError` if there is none."""
        with self._lock:
            self._clear_up()
            for number in range(self.max_sequences):
                if number not in self._holders:
                    sequence = KVSequence(number)
                    # Should Ctrl-C strike here, the object dies, and the id is free again.
                    self._holders[number] = weakref.ref(sequence)
                    return sequence
        msg = (
            f"all {self.max_sequences} sequences are taken: close a session, or free the KV cache "
            "of one with engine.slots.evict(session), and try again"
        )
        raise OutOfSequencesError(msg)

    def length(self, sequence: KVSequence) -> int:
        """Return how many tokens the KV cache has of a sequence."""
        with self._lock:
            self._check_alive()
            return int(L.llama_memory_seq_pos_max(self._memory, sequence.id)) + 1

    def truncate(self, sequence: KVSequence, length: int) -> KVSequence:
        """Keep the first `length` tokens of a sequence."""
        with self._lock:
            self._check_alive()
            # It says True even if there is no such sequence; False is for models with a state.
            if not L.llama_memory_seq_rm(self._memory, sequence.id, length, -1):
                msg = "llama.cpp cannot remove a part of a sequence of this model"
                raise RuntimeError(msg)
        return sequence

    def release(self, sequence: KVSequence) -> None:
        """Give a sequence back, from any thread, without waiting for any."""
        sequence.released = True

    def nbytes(self, sequence: KVSequence) -> int:
        """Return the bytes of a sequence in the KV cache."""
        with self._lock:
            self._check_alive()
            return int(L.llama_state_seq_get_size(self._context, L.llama_seq_id(sequence.id)))

    def feed(self, parts: Sequence[tuple[KVSequence, Sequence[int]]]) -> list[Logits]:
        """Feed each sequence its next tokens, all in one batch, and return the logits after each.

        `KVCacheFullError` if there is no room. After any other error, a part may be in the cache.
        """
        if (count := sum(len(tokens) for _, tokens in parts)) > self.n_batch:
            msg = f"{count} tokens are too many for a batch of {self.n_batch}"
            raise ValueError(msg)  # llama.cpp would abort the process.
        with self._lock:
            self._clear_up()
            batch, row, ends = self._batch, 0, list[int]()
            for sequence, tokens in parts:
                start = L.llama_memory_seq_pos_max(self._memory, sequence.id) + 1
                for position, token in enumerate(tokens, start):
                    batch.token[row], batch.pos[row], batch.logits[row] = token, position, False
                    batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence.id
                    row += 1
                ends.append(row - 1)
                batch.logits[row - 1] = True
            batch.n_tokens = row
            code = L.llama_decode(self._context, batch)
            if code == 1:
                msg = (
                    f"no room for {count} more tokens in a KV cache of {self.n_ctx}: close a session, "
                    "or free the KV cache of one with engine.slots.evict(session), and try again"
                )
                raise KVCacheFullError(msg)
            if code != 0:
                reason = {2: "was aborted", -1: "refused the batch"}.get(code, "failed")
                msg = f"llama_decode {reason} (code {code})"
                raise RuntimeError(msg)
            found = [L.llama_get_logits_ith(self._context, end) for end in ends]
            return [np.ctypeslib.as_array(row, (self.vocab_size,)).copy() for row in found]

    def _clear_up(self) -> None:
        self._check_alive()
        for number, holder in list(self._holders.items()):
            sequence = holder()
            if sequence is None or sequence.released:
                L.llama_memory_seq_rm(self._memory, number, -1, -1)
                del self._holders[number]

    def _check_alive(self) -> None:
        if not self._freed.alive:
            msg = "the interpreter is about to exit, and llama.cpp is freed"
            raise RuntimeError(msg)


def _free(native: ExitStack, lock: threading.Lock, pid: int) -> None:
    if os.getpid() == pid:  # It is the parent's; and a lock may have been forked while taken.
        with lock:
            native.close()


class LlamaCppEngine:
    """An `inference_session.engine.Engine`: sessions of one context, stepped alone or together.

    Every call feeds all that is pending, whyever it is, and leaves the last token of a session
    pending, so that there is something to decode from. What no call has room for is refused, and
    changes nothing.
    """

    def __init__(self, context: LlamaContext, *, chunk: int = 512) -> None:
        """Serve `context`; `chunk` is the most tokens of a session that go through it at once."""
        self.context = context
        self.chunk = min(chunk, context.n_batch)
        self.slots = StateSlots(
            create=context.create,
            length=context.length,
            truncate=context.truncate if context.truncatable else None,
            release=context.release,
            nbytes=context.nbytes,
        )

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens and fill the KV cache with all but the last."""
        new = self._check(tokens)
        with self.slots.borrow(session) as state:
            self._check_room(len(state.token_history) + len(new))
            state.append(new)
            self._feed_all_but_last(session, state)
        return PrefillResult(tokens_processed=len(new))

    def prompt(self, session: Session, tokens: Sequence[int], /) -> int:
        """Make `tokens` the whole history; return how many of them the KV cache had already."""
        history = self._check(tokens)
        self._check_room(len(history))
        with self.slots.borrow(session) as state:
            reused = state.reuse_prefix(history)
            self._feed_all_but_last(session, state)
        return reused

    def decode(self, session: Session, /) -> DecodeResult:
        """Add the likeliest next token."""
        return self.decode_batch([session])[0]

    def decode_batch(self, sessions: Sequence[Session], /) -> list[DecodeResult]:
        """Add the likeliest next token of each session, by one `llama_decode`: all or none."""
        with self.slots.borrow_all(sessions) as states:
            for session, state in zip(sessions, states, strict=True):
                if not state.token_history:
                    msg = "nothing to decode from: the session is empty, prefill it first"
                    raise ValueError(msg)
                self._check_room(len(state.token_history) + 1)
                self._feed_all_but_last(session, state)
            results: list[DecodeResult] = []
            if states:
                batch = self.context.feed([(state.kv_cache, state.pending) for state in states])
                for state, logits in zip(states, batch, strict=True):
                    state.advance(1)
                    results.append(DecodeResult(token=int(logits.argmax())))
                    state.append([results[-1].token])
        return results

    def _feed_all_but_last(self, session: Session, state: BorrowedState[KVSequence]) -> None:
        pending = state.pending[:-1]
        for start in range(0, len(pending), self.chunk):
            if session.closed:  # Nobody waits for the rest.
                raise SessionClosedError(session.id)
            tokens = pending[start : start + self.chunk]
            self.context.feed([(state.kv_cache, tokens)])
            state.advance(len(tokens))

    def _check(self, tokens: Sequence[int]) -> list[int]:
        ids = [index(token) for token in tokens]
        for place, token in enumerate(ids):
            if not 0 <= token < self.context.vocab_size:
                msg = f"token {place} (from 0) isn't in the vocabulary of {self.context.vocab_size}"
                raise ValueError(msg)
        return ids

    def _check_room(self, length: int) -> None:
        if length > self.context.n_ctx:
            msg = f"{length} tokens do not fit in a context of {self.context.n_ctx}"
            raise ValueError(msg)
