"""Small models with random weights, as GGUF files for llama.cpp.

The weights are large enough for every token, and what every layer keeps of it, to show in the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFWriter


VOCAB_SIZE = 128
NUM_LAYERS = 2
HIDDEN_SIZE = 64
CONTEXT_LENGTH = 512
WINDOW = 8
"""How many tokens a sliding layer sees, the one that attends among them."""

_HEADS, _KV_HEADS, _HEAD_DIM, _FEED_FORWARD = 4, 2, 16, 128
_INNER, _KERNEL, _STATE, _RANK = 2 * HIDDEN_SIZE, 4, 16, 4


class _Writer(GGUFWriter):
    def __init__(
        self,
        path: Path,
        architecture: str,
        seed: int,
        *,
        embedding: float = 1.0,
        output_norm: str = "output_norm",
    ) -> None:
        super().__init__(path, architecture)
        self.rng = np.random.default_rng(seed)
        self.add_context_length(CONTEXT_LENGTH)
        self.add_embedding_length(HIDDEN_SIZE)
        self.add_block_count(NUM_LAYERS)
        self.add_vocab_size(VOCAB_SIZE)
        self.add_layer_norm_rms_eps(1e-5)
        self.add_tokenizer_model("no_vocab")
        self.random("token_embd", VOCAB_SIZE, HIDDEN_SIZE, gain=8.0 * embedding)
        self.norm(output_norm)
        self.random("output", VOCAB_SIZE, HIDDEN_SIZE, gain=4.0)

    def random(self, name: str, *shape: int, gain: float) -> None:
        """Add a matrix (out, in)."""
        numbers = self.rng.standard_normal(shape) * gain * shape[-1] ** -0.5
        self.add_tensor(f"{name}.weight", numbers.astype(np.float32))

    def vector(self, name: str, size: int, low: float, high: float) -> None:
        """Add a vector."""
        self.add_tensor(name, self.rng.uniform(low, high, size).astype(np.float32))

    def norm(self, name: str, size: int = HIDDEN_SIZE) -> None:
        """Add the weight of a norm."""
        self.vector(f"{name}.weight", size, 0.5, 1.5)

    def describe_attention(self, kv_heads: int | Sequence[int] = _KV_HEADS) -> None:
        """Add the sizes of attention and feed-forward layers."""
        self.add_feed_forward_length(_FEED_FORWARD)
        self.add_head_count(_HEADS)
        self.add_head_count_kv(kv_heads)
        self.add_rope_dimension_count(_HEAD_DIM)
        self.add_rope_freq_base(100.0)

    def attention(self, block: str) -> None:
        """Add an attention layer."""
        self.norm(f"{block}attn_norm")
        self.random(f"{block}attn_q", _HEADS * _HEAD_DIM, HIDDEN_SIZE, gain=1.5)
        self.random(f"{block}attn_k", _KV_HEADS * _HEAD_DIM, HIDDEN_SIZE, gain=1.5)
        self.random(f"{block}attn_v", _KV_HEADS * _HEAD_DIM, HIDDEN_SIZE, gain=1.5)
        self.random(f"{block}attn_output", HIDDEN_SIZE, _HEADS * _HEAD_DIM, gain=3.0)

    def feed_forward(self, block: str) -> None:
        """Add a feed-forward layer."""
        self.norm(f"{block}ffn_norm")
        self.random(f"{block}ffn_gate", _FEED_FORWARD, HIDDEN_SIZE, gain=1.5)
        self.random(f"{block}ffn_up", _FEED_FORWARD, HIDDEN_SIZE, gain=1.5)
        self.random(f"{block}ffn_down", HIDDEN_SIZE, _FEED_FORWARD, gain=2.0)

    def describe_mamba(self) -> None:
        """Add the sizes of Mamba layers."""
        self.add_ssm_conv_kernel(_KERNEL)
        self.add_ssm_inner_size(_INNER)
        self.add_ssm_state_size(_STATE)
        self.add_ssm_time_step_rank(_RANK)

    def mamba(self, block: str) -> None:
        """Add a Mamba layer."""
        self.norm(f"{block}attn_norm")
        self.random(f"{block}ssm_in", 2 * _INNER, HIDDEN_SIZE, gain=1.5)
        self.random(f"{block}ssm_conv1d", _INNER, _KERNEL, gain=1.5)
        self.vector(f"{block}ssm_conv1d.bias", _INNER, -0.5, 0.5)
        self.random(f"{block}ssm_x", _RANK + 2 * _STATE, _INNER, gain=1.5)
        self.random(f"{block}ssm_dt", _INNER, _RANK, gain=1.0)
        self.vector(f"{block}ssm_dt.bias", _INNER, -4.0, -1.0)
        steps = np.tile(np.arange(1, _STATE + 1, dtype=np.float32), (_INNER, 1))
        self.add_tensor(f"{block}ssm_a", -steps)
        self.vector(f"{block}ssm_d", _INNER, 0.5, 1.5)
        self.random(f"{block}ssm_out", HIDDEN_SIZE, _INNER, gain=3.0)

    def finish(self) -> None:
        """Write it all to the file."""
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def _blocks() -> list[str]:
    return [f"blk.{layer}." for layer in range(NUM_LAYERS)]


def write_llama(path: Path, seed: int = 0) -> Path:
    """Write a Llama, whose KV cache has an entry for each token."""
    writer = _Writer(path, "llama", seed)
    writer.describe_attention()
    for block in _blocks():
        writer.attention(block)
        writer.feed_forward(block)
    writer.finish()
    return path


def write_gemma(path: Path, seed: int = 0) -> Path:
    """Write a Gemma 3: its first layer sees `WINDOW` tokens only, and the second one all."""
    # Its code multiplies embeddings by the root of their size, and normalizes what layers add to them.
    writer = _Writer(path, "gemma3", seed, embedding=HIDDEN_SIZE**-0.5 / 4)
    writer.describe_attention()
    writer.add_key_length(_HEAD_DIM)
    writer.add_value_length(_HEAD_DIM)
    writer.add_sliding_window(WINDOW)
    writer.add_sliding_window_pattern([True, False])
    for block in _blocks():
        writer.attention(block)
        writer.norm(f"{block}attn_q_norm", _HEAD_DIM)
        writer.norm(f"{block}attn_k_norm", _HEAD_DIM)
        writer.norm(f"{block}post_attention_norm")
        writer.feed_forward(block)
        writer.norm(f"{block}post_ffw_norm")
    writer.finish()
    return path


def write_mamba(path: Path, seed: int = 0) -> Path:
    """Write a Mamba: it has one state for all tokens, of which none can be taken out again."""
    writer = _Writer(path, "mamba", seed)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.describe_mamba()
    for block in _blocks():
        writer.mamba(block)
    writer.finish()
    return path


def write_jamba(path: Path, seed: int = 0) -> Path:
    """Write a Jamba, a hybrid: its first layer is that of a Mamba, and the second attends."""
    writer = _Writer(path, "jamba", seed)
    writer.describe_attention(kv_heads=[0, _KV_HEADS])
    writer.describe_mamba()
    recurrent, attends = _blocks()
    writer.mamba(recurrent)
    writer.norm(f"{recurrent}ssm_dt_norm", _RANK)
    writer.norm(f"{recurrent}ssm_b_norm", _STATE)
    writer.norm(f"{recurrent}ssm_c_norm", _STATE)
    writer.attention(attends)
    for block in (recurrent, attends):
        writer.feed_forward(block)
    writer.finish()
    return path


def write_lfm2(path: Path, seed: int = 0) -> Path:
    """Write an LFM2, a hybrid: its first layer is a short convolution, the second sees `WINDOW` tokens."""
    writer = _Writer(path, "lfm2", seed, output_norm="token_embd_norm")
    writer.describe_attention(kv_heads=[0, _KV_HEADS])
    writer.add_shortconv_l_cache(_KERNEL)
    writer.add_sliding_window(WINDOW)
    convolves, attends = _blocks()
    writer.norm(f"{convolves}attn_norm")
    writer.random(f"{convolves}shortconv.conv", HIDDEN_SIZE, _KERNEL, gain=1.5)
    writer.random(f"{convolves}shortconv.in_proj", 3 * HIDDEN_SIZE, HIDDEN_SIZE, gain=1.5)
    writer.random(f"{convolves}shortconv.out_proj", HIDDEN_SIZE, HIDDEN_SIZE, gain=3.0)
    writer.attention(attends)
    writer.norm(f"{attends}attn_q_norm", _HEAD_DIM)
    writer.norm(f"{attends}attn_k_norm", _HEAD_DIM)
    for block in (convolves, attends):
        writer.feed_forward(block)
    writer.finish()
    return path
