"""The models that the mesh serves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from services.runtime.settings.section import Fraction, Positive, Seconds, Section, TargetText

DEMO_MODEL = "smollm2-135m"

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SamplingDefaults(Section):
    """How tokens are drawn for requests that leave it open."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Divides the logits; 0 is greedy choice."
    )
    top_p: Fraction | None = Field(
        None, description="Keeps the smallest set of tokens whose probabilities reach this sum."
    )
    top_k: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Keeps this many of the likeliest tokens; 0 keeps all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Drops tokens less likely than this share of the likeliest one."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="Divides or multiplies logits of tokens seen so far; 1 does nothing."
    )


class SparseAttentionSettings(Section):
    """What tokens see of a long context, in layers that would show them all of it."""

    window: Positive = Field(description="How many tokens back a token sees, its own included.")
    global_tokens: Annotated[int, Field(ge=0)] = Field(
        64, description="How many tokens at the beginning of its sequence it sees besides."
    )


class PriceSettings(Section):
    """What a million of its tokens cost, in `gateway.currency`; without it no cost is counted."""

    prompt: Price = Field(description="Price of a million prompt tokens.")
    cached_prompt: Price | None = Field(
        None,
        description="Price of a million prompt tokens that were in the prefix cache. Default: "
        "`prompt`.",
    )
    completion: Price = Field(description="Price of a million completion tokens.")


class ModelSettings(Section):
    """One model that the mesh serves."""

    source: str = Field(
        description="A name from the catalogue, a local directory, a `.gguf` file or a hub id "
        "(`org/name` or `org/name@revision`)."
    )
    aliases: tuple[str, ...] = Field((), description="Other names that requests may use.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the weights as they run."
    )
    weights: Literal["auto", "bfloat16", "int8", "int4", "fp8", "w8a8"] = Field(
        "auto",
        description="How matrices are stored: as the dtype, or rounded to 8 or 4 bits in groups of "
        "32. On a GPU also by output, with activations rounded to the same 8 bits: floats (`fp8`) "
        "or integers (`w8a8`). Default: a quantised file's own precision, else the dtype.",
    )
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="Low-rank adapters that are loaded with it: sources by the names that requests "
        "use, each a local directory or a hub id.",
    )
    allow_pickled: bool = Field(
        False,
        description="Whether weights are loaded that are there as pickled Python objects alone "
        "(`pytorch_model.bin`). Only what makes tensors is called while they are; convert what you "
        "do not trust elsewhere.",
    )
    context_tokens: Positive | None = Field(
        None, description="Largest number of prompt and completion tokens. Default: the model's."
    )
    sparse_attention: SparseAttentionSettings | None = Field(
        None, description="Attention to part of a long context. Default: as the model was trained."
    )
    sampling: SamplingDefaults = Field(
        default_factory=lambda: SamplingDefaults.model_validate({}),
        description="Sampling of requests that leave it open. What is not set here comes from the "
        "catalogue or the model's own generation configuration.",
    )
    load: Literal["at_start", "on_request", "by_operator"] = Field(
        "at_start",
        description="When an engine brings it into memory: as the engine starts, with the first "
        "request for it, or when an operator loads it.",
    )
    sleep_after_s: Seconds | None = Field(
        None,
        description="An engine takes it out of memory after this time without a request, in "
        "seconds; the next request brings it back. Default: never.",
    )
    kv_cache_bytes: Positive | None = Field(
        None, description="Size of its KV cache in bytes. Default: `engine.kv_cache_bytes`."
    )
    engine_target: TargetText | None = Field(
        None, description="Target of the engines that run it. Default: `engine.target`."
    )
    activation_timeout_s: Seconds | None = Field(
        None,
        description="For a model whose engines run only while they are asked for: how long a "
        "request waits for one, in seconds. Default: it fails at once.",
    )
    price: PriceSettings | None = Field(None, description="What its tokens cost. Default: nothing.")
