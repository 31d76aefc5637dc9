"""Small models with random weights, as GGUF files for llama.cpp.

The weights are large enough for every token, and what every layer keeps of it, to show in the output.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter


VOCAB_SIZE = 128
NUM_LAYERS = 2
HIDDEN_SIZE = 64
CONTEXT_LENGTH = 512


class _Writer(GGUFWriter):
    def __init__(self, path: Path, architecture: str, seed: int) -> None:
        super().__init__(path, architecture)
        self.rng = np.random.default_rng(seed)
        self.add_context_length(CONTEXT_LENGTH)
        self.add_embedding_length(HIDDEN_SIZE)
        self.add_block_count(NUM_LAYERS)
        self.add_vocab_size(VOCAB_SIZE)
        self.add_layer_norm_rms_eps(1e-5)
        self.add_tokenizer_model("no_vocab")
        self.random("token_embd", VOCAB_SIZE, HIDDEN_SIZE, gain=8.0)
        self.norm("output_norm")
        self.random("output", VOCAB_SIZE, HIDDEN_SIZE, gain=4.0)

    def random(self, name: str, *shape: int, gain: float) -> None:
        """Add a matrix (out, in)."""
        numbers = self.rng.standard_normal(shape) * gain * shape[-1] ** -0.5
        self.add_tensor(f"{name}.weight", numbers.astype(np.float32))

    def vector(self, name: str, size: int, low: float, high: float) -> None:
        """Add a vector."""
        self.add_tensor(name, self.rng.uniform(low, high, size).astype(np.float32))

    def norm(self, name: str) -> None:
        """Add the weight of a norm."""
        self.vector(f"{name}.weight", HIDDEN_SIZE, 0.5, 1.5)

    def finish(self) -> None:
        """Write it all to the file."""
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def write_llama(path: Path, seed: int = 0) -> Path:
    """Write a Llama, whose KV cache has an entry for each token."""
    heads, kv_heads, feed_forward = 4, 2, 128
    head_dim = HIDDEN_SIZE // heads
    writer = _Writer(path, "llama", seed)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(100.0)
    for block in (f"blk.{layer}." for layer in range(NUM_LAYERS)):
        writer.norm(f"{block}attn_norm")
        writer.random(f"{block}attn_q", HIDDEN_SIZE, HIDDEN_SIZE, gain=1.5)
        writer.random(f"{block}attn_k", kv_heads * head_dim, HIDDEN_SIZE, gain=1.5)
        writer.random(f"{block}attn_v", kv_heads * head_dim, HIDDEN_SIZE, gain=1.5)
        writer.random(f"{block}attn_output", HIDDEN_SIZE, HIDDEN_SIZE, gain=3.0)
        writer.norm(f"{block}ffn_norm")
        writer.random(f"{block}ffn_gate", feed_forward, HIDDEN_SIZE, gain=1.5)
        writer.random(f"{block}ffn_up", feed_forward, HIDDEN_SIZE, gain=1.5)
        writer.random(f"{block}ffn_down", HIDDEN_SIZE, feed_forward, gain=2.0)
    writer.finish()
    return path


def write_mamba(path: Path, seed: int = 0) -> Path:
    """Write a Mamba: it has one state for all tokens, of which none can be taken out again."""
    inner, kernel, state, rank = 2 * HIDDEN_SIZE, 4, 16, 4
    writer = _Writer(path, "mamba", seed)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    for block in (f"blk.{layer}." for layer in range(NUM_LAYERS)):
        writer.norm(f"{block}attn_norm")
        writer.random(f"{block}ssm_in", 2 * inner, HIDDEN_SIZE, gain=1.5)
        writer.random(f"{block}ssm_conv1d", inner, kernel, gain=1.5)
        writer.vector(f"{block}ssm_conv1d.bias", inner, -0.5, 0.5)
        writer.random(f"{block}ssm_x", rank + 2 * state, inner, gain=1.5)
        writer.random(f"{block}ssm_dt", inner, rank, gain=1.0)
        writer.vector(f"{block}ssm_dt.bias", inner, -4.0, -1.0)
        steps = np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1))
        writer.add_tensor(f"{block}ssm_a", -steps)
        writer.vector(f"{block}ssm_d", inner, 0.5, 1.5)
        writer.random(f"{block}ssm_out", HIDDEN_SIZE, inner, gain=3.0)
    writer.finish()
    return path
