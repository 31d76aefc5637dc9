"""An engine over llama.cpp, by its low-level API in llama-cpp-python.

All sequences live in one native context, which one thread at a time may enter. So the KV cache of a
session is a handle, a sequence id, of which there are only so many.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import blake2b
from operator import index
from pathlib import Path
from struct import Struct
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from inference_session import Session
from inference_session.engine import TORN, BorrowedState, DecodeResult, PrefillResult, StateSlots


try:
    import llama_cpp as L  # noqa: N812 short, as the names of the C API are long
except ModuleNotFoundError as error:
    msg = "no llama.cpp: install it with `pip install llama-cpp-python==0.3.36`"
    raise ImportError(msg) from error

Logits = NDArray[np.float32]

# A checkpoint of a sequence has its recurrent states, and the tokens in its windows.
_ALL = L.llama_state_seq_flags(L.LLAMA_STATE_SEQ_FLAGS_NONE)
_PARTIAL = L.llama_state_seq_flags(L.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)

# In a file, before the bytes of a state: how many tokens it covers, and how many bytes there are.
_PART = Struct("<QQ")

# It writes a lot to standard error, tokens included. To see it, set the level before. (In this
# version of the binding, warnings count as errors, and errors as debugging.)
if not (_logger := logging.getLogger("llama-cpp-python")).level:
    _logger.setLevel(logging.CRITICAL)


class OutOfSequencesError(RuntimeError):
    """Every sequence id of the context is taken."""


class KVCacheFullError(MemoryError):
    """The KV cache of the context, which all sequences share, has no room for a batch."""


class Checkpoint(NamedTuple):
    """A copy of the parts of a sequence that can't be cut: recurrent states and windows."""

    length: int
    state: ctypes.Array[ctypes.c_uint8]


class KVSequence:
    """A sequence of a context: taken while this object lives and isn't released."""

    __slots__ = ("__weakref__", "checkpoints", "id", "length", "released")

    def __init__(self, id: int) -> None:  # noqa: A002 its natural name
        self.id = id
        self.length = 0
        self.checkpoints: list[Checkpoint] = []  # From short to long.
        self.released = False


class LlamaContext:
    """A model and one context of llama.cpp, divided into sequences.

    Every native call is made under a lock, as a context is not thread-safe. Only `release`, which
    may come from any thread at any instant, makes no native call: it leaves a mark, and the next
    call clears up. Sessions keep the context alive, through their `StateSlots`; it is freed when it
    becomes garbage, or at the interpreter's exit.
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
        swa_full: bool = False,
        checkpoints: int = 8,
        exact: bool = False,
    ) -> None:
        """Load a GGUF file.

        `n_ctx` is the number of tokens in the KV cache, for all sequences together, and `n_batch`
        the most tokens fed in one call. `swa_full` gives sliding layers as much memory as the
        others, instead of a window for each sequence. `checkpoints` is the most that are kept of a
        sequence, if the model has a recurrent state or such windows. `exact` keeps keys and values
        in float32, as computed, so that results don't depend on whether they come from the cache.
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
        params.swa_full = swa_full
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
        self._stateful = L.llama_model_is_recurrent(model) or L.llama_model_is_hybrid(model)
        self._window = 0 if self._stateful else L.llama_model_n_swa(model)
        self._spacing = max(32, self._window // 4)  # Of checkpoints, in tokens.
        self._partial = self._stateful or (self._window > 0 and not swa_full)
        self._checkpoints = checkpoints if self._partial else 0
        self._identity = _identify(path, exact, swa_full)

    def create(self) -> KVSequence:
        """Take a free sequence; raise `OutOfSequencesError` if there is none."""
        with self._lock:
            self._clear_up()
            for number in range(self.max_sequences):
                if number not in self._holders:
                    sequence = KVSequence(number)
                    # If Ctrl-C arrives here, the object dies, and the id is free again.
                    self._holders[number] = weakref.ref(sequence)
                    return sequence
        msg = (
            f"all {self.max_sequences} sequences are taken: close a session, or free the KV cache "
            "of one with engine.slots.evict(session), and try again"
        )
        raise OutOfSequencesError(msg)

    def length(self, sequence: KVSequence) -> int:
        """Return how many tokens of a sequence are in the KV cache; `TORN` after a failed step."""
        with self._lock:
            self._check_alive()
            return self._length(sequence)

    def truncate(self, sequence: KVSequence, length: int) -> KVSequence:
        """Keep the first `length` tokens of a sequence, or fewer if it can't be cut there.

        It then goes back to the last checkpoint, or to nothing.
        """
        with self._lock:
            self._check_alive()
            sequence.checkpoints = [it for it in sequence.checkpoints if it.length <= length]
            if not self._cut(sequence, length):
                self._restore(sequence)
        return sequence

    def share(self, sequence: KVSequence, length: int) -> KVSequence:
        """Return another sequence that has the first `length` tokens, or fewer, as `truncate`.

        They are in the same cells of the KV cache. States and windows are copied: llama.cpp never
        overwrites the cells of a window that two sequences share, and would soon have no room.
        """
        other = self.create()
        with self._lock:
            L.llama_memory_seq_cp(self._memory, sequence.id, other.id, -1, -1)
            other.length = sequence.length
            other.checkpoints = [it for it in sequence.checkpoints if it.length <= length]
            whole = self._cut(other, length)
            if whole and self._partial:
                self._add_checkpoint(other)
            if self._partial or not whole:
                self._restore(other)
        return other

    def dump(self, sequence: KVSequence, file: BinaryIO) -> None:
        """Write what the KV cache depends on, the checkpoints of a sequence, and all of it."""
        with self._lock:
            self._check_alive()
            everything = Checkpoint(sequence.length, self._copy(sequence, _ALL))
        file.write(self._identity)
        for length, state in [*sequence.checkpoints, everything]:
            file.write(_PART.pack(length, len(state)))
            file.write(state)

    def load(self, file: BinaryIO) -> KVSequence:
        """Read a sequence back; raise `ValueError` if it was written with another model."""
        if file.read(len(self._identity)) != self._identity:
            msg = "the KV cache is that of another model, kind of context or version of llama.cpp"
            raise ValueError(msg)
        *checkpoints, (length, state) = _read_parts(file)
        sequence = self.create()  # If anything fails, the object dies, and the id is free again.
        with self._lock:
            number = L.llama_seq_id(sequence.id)
            if not L.llama_state_seq_set_data_ext(self._context, state, len(state), number, _ALL):
                raise KVCacheFullError(self._no_room(f"the {length} tokens of a file"))
            sequence.length, sequence.checkpoints = length, checkpoints
        return sequence

    def release(self, sequence: KVSequence) -> None:
        """Give a sequence back, from any thread, without waiting."""
        sequence.released = True

    def nbytes(self, sequence: KVSequence) -> int:
        """Return the bytes of a sequence in the KV cache, and of its checkpoints."""
        with self._lock:
            self._check_alive()
            size = int(L.llama_state_seq_get_size(self._context, L.llama_seq_id(sequence.id)))
            return size + sum(len(it.state) for it in sequence.checkpoints)

    def feed(self, parts: Sequence[tuple[KVSequence, Sequence[int]]]) -> list[Logits]:
        """Feed each sequence its next tokens, all in one batch, and return the logits after each.

        Raises `KVCacheFullError` if there is no room. After any other error of llama.cpp, sequences
        are torn: `truncate` repairs them.
        """
        if (count := sum(len(tokens) for _, tokens in parts)) > self.n_batch:
            msg = f"{count} tokens are too many for a batch of {self.n_batch}"
            raise ValueError(msg)  # llama.cpp would abort the process.
        with self._lock:
            self._clear_up()
            if TORN in (self._length(sequence) for sequence, _ in parts):
                msg = "a sequence is torn, by a batch that failed: truncate it first"
                raise RuntimeError(msg)
            for sequence, tokens in parts:
                self._save(sequence, len(tokens))
            ends = self._fill_batch(parts)
            self._decode(parts)
            found = [L.llama_get_logits_ith(self._context, end) for end in ends]
            return [np.ctypeslib.as_array(row, (self.vocab_size,)).copy() for row in found]

    def _fill_batch(self, parts: Sequence[tuple[KVSequence, Sequence[int]]]) -> list[int]:
        """Put tokens into the batch, and return the row of each sequence's last."""
        batch, row, ends = self._batch, 0, list[int]()
        for sequence, tokens in parts:
            for position, token in enumerate(tokens, sequence.length):
                batch.token[row], batch.pos[row], batch.logits[row] = token, position, False
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence.id
                row += 1
            ends.append(row - 1)
            batch.logits[row - 1] = True
        batch.n_tokens = row
        return ends

    def _decode(self, parts: Sequence[tuple[KVSequence, Sequence[int]]]) -> None:
        touched = [sequence for sequence, _ in parts]
        if self._stateful and len(parts) > 1:
            # To put the states of a batch side by side, llama.cpp moves others, too.
            found = (holder() for holder in self._holders.values())
            touched = [sequence for sequence in found if sequence is not None]
        lengths = [sequence.length for sequence in touched]
        for sequence in touched:
            sequence.length = TORN
        code = L.llama_decode(self._context, self._batch)
        if code in {0, 1}:
            for sequence, length in zip(touched, lengths, strict=True):
                sequence.length = length
        if code == 0:
            for sequence, tokens in parts:
                sequence.length += len(tokens)
        elif code == 1:
            raise KVCacheFullError(self._no_room(f"{self._batch.n_tokens} more tokens"))
        else:
            reason = {2: "was aborted", -1: "refused the batch"}.get(code, "failed")
            msg = f"llama_decode {reason} (code {code})"
            raise RuntimeError(msg)

    def _no_room(self, tokens: str) -> str:
        return (
            f"no room for {tokens} in a KV cache of {self.n_ctx}: close a session, or free the KV "
            "cache of one with engine.slots.evict(session), and try again"
        )

    def _length(self, sequence: KVSequence) -> int:
        length = int(L.llama_memory_seq_pos_max(self._memory, sequence.id)) + 1
        return length if length == sequence.length else TORN

    def _cut(self, sequence: KVSequence, length: int) -> bool:
        """Remove all but the first `length` tokens; return False if too few are left to go on."""
        if self._stateful:
            return self._length(sequence) <= length
        # This succeeds in any case.
        L.llama_memory_seq_rm(self._memory, sequence.id, length, -1)
        sequence.length = end = int(L.llama_memory_seq_pos_max(self._memory, sequence.id)) + 1
        # Tokens that left this sequence's window may have been overwritten by any other.
        begin = int(L.llama_memory_seq_pos_min(self._memory, sequence.id))
        return end > 0 and begin <= max(0, end + 1 - self._window)

    def _restore(self, sequence: KVSequence) -> None:
        """Go back to the last checkpoint, or to nothing."""
        sequence.length = TORN
        number = L.llama_seq_id(sequence.id)
        while sequence.checkpoints:
            length, state = sequence.checkpoints[-1]
            if L.llama_state_seq_set_data_ext(self._context, state, len(state), number, _PARTIAL):
                L.llama_memory_seq_rm(self._memory, sequence.id, length, -1)
                sequence.length = length
                if self._length(sequence) == length:
                    return
            sequence.checkpoints.pop()  # There is no room for its windows.
        L.llama_memory_seq_rm(self._memory, sequence.id, -1, -1)
        sequence.length = 0

    def _save(self, sequence: KVSequence, count: int) -> None:
        """Make a checkpoint, if it is time, of a sequence about to be fed `count` tokens."""
        points = sequence.checkpoints
        since = sequence.length - (points[-1].length if points else 0)
        soon = self._stateful and count > 1  # A draft may be rejected, or a prompt edited.
        if self._checkpoints and since >= (1 if soon else self._spacing):
            self._add_checkpoint(sequence)

    def _add_checkpoint(self, sequence: KVSequence) -> None:
        points = sequence.checkpoints
        if points and points[-1].length == sequence.length:
            return
        points.append(Checkpoint(sequence.length, self._copy(sequence, _PARTIAL)))
        if len(points) > max(1, self._checkpoints):
            # The older they are, the farther apart: so the cost of a rewind grows with its length.
            ends = [0, *(it.length for it in points)]
            gaps = [
                (ends[i + 2] - ends[i]) / (ends[-1] - ends[i + 1]) for i in range(len(points) - 1)
            ]
            del points[gaps.index(min(gaps))]

    def _copy(
        self, sequence: KVSequence, flags: L.llama_state_seq_flags
    ) -> ctypes.Array[ctypes.c_uint8]:
        number = L.llama_seq_id(sequence.id)
        size = int(L.llama_state_seq_get_size_ext(self._context, number, flags))
        state = (ctypes.c_uint8 * size)()
        copied = L.llama_state_seq_get_data_ext(self._context, state, size, number, flags)
        if copied != size:
            msg = "llama.cpp can't copy the state of a sequence"
            raise RuntimeError(msg)
        return state

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


def _identify(path: Path, *settings: bool) -> bytes:
    """Return a digest of what a KV cache depends on. Of large weights, it takes samples."""
    size = path.stat().st_size
    digest = blake2b(repr((L.__version__, size, settings)).encode(), digest_size=16)
    with path.open("rb") as file:
        for start in range(0, size, max(4096, size // 256)):
            file.seek(start)
            digest.update(file.read(4096))
    return digest.digest()


def _read_parts(file: BinaryIO) -> list[Checkpoint]:
    parts: list[Checkpoint] = []
    while head := file.read(_PART.size):
        length, size = _PART.unpack(head)
        state = file.read(size)
        parts.append(Checkpoint(length, (ctypes.c_uint8 * size).from_buffer_copy(state)))
    return parts


def _free(native: ExitStack, lock: threading.Lock, pid: int) -> None:
    if os.getpid() == pid:  # In a fork, the memory is the parent's, and the lock may be taken.
        with lock:
            native.close()


class LlamaCppEngine:
    """An `inference_session.engine.Engine`: sessions of one context, stepped alone or together.

    Every call feeds all pending tokens, for whatever reason they are pending, and leaves the last
    token of a session pending, to decode from. A call without enough room is refused, and changes
    nothing.
    """

    def __init__(self, context: LlamaContext, *, chunk: int = 512) -> None:
        """Serve `context`; `chunk` is the most tokens of a session fed at once."""
        self.context = context
        self.chunk = min(chunk, context.n_batch)
        self.slots = StateSlots(
            create=context.create,
            length=context.length,
            truncate=context.truncate,
            share=context.share,
            dump=context.dump,
            load=context.load,
            release=context.release,
            nbytes=context.nbytes,
        )

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens and fill the KV cache with all but the last."""
        new = self._check(tokens)
        with self.slots.borrow(session) as state:
            self._check_room(len(state.token_history) + len(new))
            state.append(new)
            self._feed_all_but_last(state)
        return PrefillResult(tokens_processed=len(new))

    def prompt(self, session: Session, tokens: Sequence[int], /) -> int:
        """Make `tokens` the whole history; return how many were in the KV cache already."""
        history = self._check(tokens)
        self._check_room(len(history))
        with self.slots.borrow(session) as state:
            reused = state.reuse_prefix(history)
            self._feed_all_but_last(state)
        return reused

    def decode(self, session: Session, /) -> DecodeResult:
        """Add the likeliest next token."""
        return self.decode_batch([session])[0]

    def decode_batch(self, sessions: Sequence[Session], /) -> list[DecodeResult]:
        """Add the likeliest next token of each session, by one `llama_decode`: all or none."""
        with self.slots.borrow_all(sessions) as states:
            for state in states:
                if not state.token_history:
                    msg = "nothing to decode from: the session is empty, prefill it first"
                    raise ValueError(msg)
                self._check_room(len(state.token_history) + 1)
                self._feed_all_but_last(state)
            results: list[DecodeResult] = []
            if states:
                batch = self.context.feed([(state.kv_cache, state.pending) for state in states])
                for state, logits in zip(states, batch, strict=True):
                    state.advance(1)
                    results.append(DecodeResult(token=int(logits.argmax())))
                    state.append([results[-1].token])
        return results

    def _feed_all_but_last(self, state: BorrowedState[KVSequence]) -> None:
        for tokens in state.chunks(self.chunk):
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
