"""What a request to an encoder carries through its stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from meshserve.v1 import engine_pb2, gateway_pb2, types_pb2
from services.gateway.context import CallContext, Operation
from services.gateway.encoding.validation import validate_encoding

EncodingRequest = gateway_pb2.EmbedRequest | gateway_pb2.ClassifyRequest | gateway_pb2.ScoreRequest


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked of an encoder, `texts` being the field that holds one text per input."""

    operation: Operation
    capability: types_pb2.ModelCapability.ValueType
    texts: str = "texts"


EMBED = Task("embeddings", types_pb2.MODEL_CAPABILITY_EMBED)
CLASSIFY = Task("classify", types_pb2.MODEL_CAPABILITY_CLASSIFY)
SCORE = Task("score", types_pb2.MODEL_CAPABILITY_SCORE, "documents")


@dataclass(slots=True, kw_only=True)
class EncodingContext(CallContext):
    """A request to an encoder. An input is named by its index, also in the lists below."""

    task: Task
    request: EncodingRequest
    # The texts as they may be used; redaction changes them, and the request stays as it came.
    texts: list[str]
    query: str = ""
    # look_up: what names each vector in the cache, if it is used at all
    cache_keys: list[bytes] = field(default_factory=list)
    # look_up, encode: an Embedding, a Classification or a score of each input; None: not yet
    answers: list[Any] = field(default_factory=list)
    # look_up, tokenize: the tokens of each input
    tokens: list[int] = field(default_factory=list)
    # look_up: the inputs that the engine computes
    uncached: list[int] = field(default_factory=list)
    # tokenize: these inputs' tokens, in the order of `uncached`
    inputs: list[engine_pb2.EncoderInput] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [None] * len(self.texts)
        self.tokens = [0] * len(self.texts)
        self.uncached = list(range(len(self.texts)))

    @property
    def cached(self) -> bool:
        """Whether the whole answer came from the response cache."""
        return not self.uncached and self.answers != []

    def path(self, index: int) -> str:
        """The field of an input's text."""
        return f"{self.task.texts}[{index}]"

    def validate(self, max_prompt_bytes: int) -> None:
        """Raises ServiceError with every field of the request that is wrong."""
        validate_encoding(self.request, self.task.texts, max_prompt_bytes)
