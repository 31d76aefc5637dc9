"""OpenAI's chat protocol, as far as `server.py` speaks it, independent of engines and sessions.

In addition to OpenAI's fields, requests and answers have a `session_id`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self, cast
from uuid import UUID, uuid4

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


END_OF_STREAM = "data: [DONE]\n\n"
MAX_CHARACTERS = 1_000_000
"""The limit of a conversation: no model here has room for more, and tokenizing it would take long."""


class Strict(BaseModel):
    """Part of a request. Fields unknown to the server are refused, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        """Treat null as absent, as many clients send every field."""
        if not isinstance(data, dict):
            return data
        values = cast("dict[str, object]", data)
        return {name: value for name, value in values.items() if value is not None}


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # Its message would show the text.
        msg = "half a character is no text"
        raise ValueError(msg) from None
    return text


Text = Annotated[str, AfterValidator(_check_text)]
"""JSON can hold halves of characters; a tokenizer can't."""


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        """The whole text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool = False


class ChatRequest(Strict):
    """A request for an answer."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    session_id: Annotated[UUID, Field(strict=False)] | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    """The old name of `max_completion_tokens`."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.max_completion_tokens is not None and self.max_tokens is not None:
            msg = "max_tokens is the old name of max_completion_tokens, send one of them"
            raise ValueError(msg)
        if self.stream_options is not None and not self.stream:
            msg = "stream_options are for a stream"
            raise ValueError(msg)
        if sum(len(message.text) for message in self.messages) > MAX_CHARACTERS:
            msg = f"the messages have more than {MAX_CHARACTERS} characters"
            raise ValueError(msg)
        return self


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The numbers of tokens of an answer."""

    prompt: int
    cached: int
    """Tokens of the prompt that were in the KV cache already."""
    completion: int

    def as_dict(self) -> dict[str, object]:
        """Return it in the protocol's form."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Makes the parts of an answer."""

    model: str
    session_id: UUID
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, text: str, finish_reason: str, usage: Usage) -> dict[str, object]:
        """Return the whole of it."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        return self._object("chat.completion", choice, usage=usage.as_dict())

    def chunk(self, delta: Mapping[str, str], finish_reason: str | None = None) -> str:
        """Return an event with the new part."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return event(self._object("chat.completion.chunk", choice))

    def usage_chunk(self, usage: Usage) -> str:
        """Return an event with the usage alone."""
        return event(self._object("chat.completion.chunk", usage=usage.as_dict()))

    def _object(self, kind: str, *choices: object, **more: object) -> dict[str, object]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "session_id": str(self.session_id),
            "choices": choices,
            **more,
        }


def model_list(model: str) -> dict[str, object]:
    """Return the list of the one model there is."""
    entry = {"id": model, "object": "model", "created": 0, "owned_by": "inference-session"}
    return {"object": "list", "data": [entry]}


def error(status: int, code: str, message: str, param: str | None = None) -> dict[str, object]:
    """Return the body of an error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(data: Mapping[str, object]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data)}\n\n"
