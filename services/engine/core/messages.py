"""What the engine core and its front say to each other, one msgpack frame per message.

Times are nanoseconds since the Unix epoch (see `clock`); 0 means "has not happened".
"""

from __future__ import annotations

import enum
from typing import Literal, TypeAlias

import msgspec

from services.engine.core.settings import CoreSettings


class FinishReason(enum.IntEnum):
    """Why a sequence ended."""

    STOP = 1  # end-of-sequence token, stop token, or stop sequence
    LENGTH = 2  # max_tokens or the context limit
    ABORTED = 3  # the client asked, or went away
    ERROR = 4  # the sequence failed; see Finish.error


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen. The defaults sample from the model's own distribution."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1]
    seed: int = 0  # [0, 2**64)
    repetition_penalty: float = 1.0  # over prompt and output; 1 is off
    presence_penalty: float = 0.0  # taken off once if in the output
    frequency_penalty: float = 0.0  # taken off per occurrence in the output
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    banned_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # report log-probabilities, with this many likeliest tokens
    prompt_logprobs: int | None = None  # the same of the prompt
    beam_width: int = 0  # beams that are followed instead of sampling; 0 is off
    length_penalty: float = 1.0  # of beams: log-probability / number of tokens to this power
    early_stopping: bool = False  # of beams: as soon as `beam_width` have ended
    logits_processors: tuple[tuple[str, str], ...] = ()  # (name, arguments as JSON), in this order


class Stopping(msgspec.Struct, frozen=True, omit_defaults=True):
    """When the sequence ends, besides reaching the context limit."""

    max_tokens: int | None = None  # None: up to the context limit
    min_tokens: int = 0  # no end-of-sequence or stop token is sampled before this many
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()


class Constraint(msgspec.Struct, frozen=True):
    """A rule that the output follows."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str  # choice: a JSON list of strings


class SequenceRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence to generate: one choice of one request."""

    sequence_id: int
    prompt_token_ids: list[int]
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    choice_index: int = 0
    priority: int = 0  # larger goes first
    request_id: str = ""  # for log lines only
    received_ns: int = 0
    tenant: str = ""  # fairness is kept between tenants, and their prefixes are kept apart
    cache_salt: bytes = b""  # prefixes are shared under the same salt only
    constraint: Constraint | None = None
    adapter: str = ""  # the name of a loaded one; empty: none


class EncodeTask(msgspec.Struct, frozen=True, array_like=True):
    """What is wanted of a sequence that an encoder reads."""

    kind: Literal["embed", "classify", "score"]
    pooling: Literal["mean", "first", "last"] | None = None  # None: the model's own
    normalize: bool | None = None  # None: as the model does
    dimensions: int | None = None  # components kept; None: all


class EncodeRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence for an encoder to read."""

    sequence_id: int
    token_ids: list[int]
    task: EncodeTask
    second_text_start: int | None = None  # None: there is one text
    request_id: str = ""  # for log lines only


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first command: what to load and the limits to hold."""

    settings: CoreSettings


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Generate these sequences: all of them or, where one is refused, none."""

    sequences: list[SequenceRequest]


class Encode(msgspec.Struct, frozen=True, tag="encode"):
    """Read these sequences: all of them or, where one is refused, none."""

    sequences: list[EncodeRequest]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these sequences; unknown ids are ignored, for they may have just finished."""

    sequence_ids: list[int]


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """Load an adapter beside what runs; answered by an AdapterChanged."""

    number: int
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter"):
    """Refuse new sequences for an adapter, and unload it once none uses it; answered then by an
    AdapterChanged."""

    number: int
    name: str


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take nothing new from here on; finish what there is."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Answered by a Pong from the step loop itself, so it proves that the loop turns."""

    number: int


Command: TypeAlias = Start | Add | Encode | Abort | LoadAdapter | UnloadAdapter | Drain | Ping


class ModelFacts(msgspec.Struct, frozen=True):
    """What the core loaded, and how much it can hold."""

    architecture: str
    num_layers: int
    num_parameters: int
    vocab_size: int
    max_context_tokens: int  # what the engine accepts: the model's, or less if the cache is small
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    block_size: int
    num_blocks: int
    kv_cache_memory_bytes: int
    load_time_s: float
    kernels: dict[str, str] = {}  # op -> implementation that runs
    default_sampling: dict[str, float] = {}  # the model's own, by field of SamplingParams
    tasks: tuple[str, ...] = ()  # of an encoder: kinds of EncodeTask; empty: it generates
    embedding_size: int = 0  # of an encoder that makes embeddings
    labels: tuple[str, ...] = ()  # of an encoder that classifies, in order
    adapters: dict[str, int] = {}  # those that are there from the start, and their bytes
    takes_adapters: bool = False
    memory: dict[str, int] = {}  # of a GPU, in bytes, by what takes it


class Load(msgspec.Struct, frozen=True, array_like=True):
    """How busy the core is, after a step."""

    waiting_sequences: int = 0
    running_sequences: int = 0
    used_blocks: int = 0
    num_blocks: int = 0
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0  # computed since start, recomputation included
    sampled_tokens: int = 0  # since start
    failed_sequences: int = 0
    last_step_us: int = 0
    draining: bool = False
    cache_queried_tokens: int = 0  # of sequences that entered since start, re-entries included
    cache_hit_tokens: int = 0  # of these, found in the KV cache
    drafted_tokens: int = 0  # verified since start
    accepted_draft_tokens: int = 0  # of these, found to be what the model says
    compiled_constraints: int = 0  # since start, faulty ones included
    found_constraints: int = 0  # that had been compiled, or were being so, when they were sent
    constraint_compile_us: int = 0  # spent on those that were not
    masks: int = 0  # made since start, one for each token of an output that follows a rule
    mask_us: int = 0  # spent on them


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities under the model's own distribution, before any sampling edit."""

    logprob: float
    top_token_ids: list[int] = []  # likeliest first
    top_logprobs: list[float] = []


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """How a sequence ended."""

    reason: FinishReason
    stop_token_id: int | None = None
    stop_sequence_index: int | None = None
    error: str = ""  # for people; ERROR only
    error_kind: str = ""  # the error's type name; ERROR only


# Further interruptions of a sequence are counted, but their times are not kept.
MAX_INTERRUPTIONS = 8


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """When what happened to a sequence; sent with its first token and its finish."""

    received_ns: int  # by the front
    queued_ns: int  # by the core
    prefill_start_ns: int = 0  # first scheduled
    first_token_ns: int = 0
    finished_ns: int = 0
    preemptions: int = 0
    steps: int = 0  # engine steps this sequence took part in
    cached_prompt_tokens: int = 0  # found in the KV cache when the sequence first entered
    drafted_tokens: int = 0  # guesses of it that were verified
    accepted_draft_tokens: int = 0  # of these, found to be what the model says
    # When it was preempted, when it was resumed, and so on: of the first MAX_INTERRUPTIONS.
    interruptions_ns: list[int] = []


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought one sequence."""

    sequence_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    timing: Timing | None = None
    finish: Finish | None = None
    # Of the prompt's tokens from the second on, with the first token; None: not asked for.
    prompt_logprobs: list[TokenLogprobs] | None = None


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded and the core takes sequences."""

    facts: ModelFacts


class Step(msgspec.Struct, frozen=True, tag="step"):
    """All that one engine step brought, in one frame."""

    number: int
    batch_size: int
    num_tokens: int
    ended_ns: int
    deltas: list[Delta]
    load: Load

    @property
    def brought_only_tokens(self) -> bool:
        """Whether no sequence began or ended with this step: each merely got further tokens."""
        return all(delta.timing is None for delta in self.deltas)


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What a batch brought one sequence."""

    sequence_id: int
    values: bytes = b""  # float32, little-endian: a vector, or scores in the order of the classes
    queued_ns: int = 0  # by the core
    started_ns: int = 0  # of its batch
    error: str = ""  # for people; it failed, or was aborted
    error_kind: str = ""  # the error's type name; empty: it did not fail


class Encoded(msgspec.Struct, frozen=True, tag="encoded"):
    """All that one batch of an encoder brought, in one frame."""

    number: int
    batch_size: int
    num_tokens: int
    ended_ns: int
    answers: list[Answer]
    load: Load


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """Sequences ended between steps (an abort); their blocks are free already."""

    deltas: list[Delta]
    load: Load


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """An Add was refused as a whole."""

    sequence_ids: list[int]
    error_kind: str  # the type name of the AdmissionError
    error: str


class AdapterChanged(msgspec.Struct, frozen=True, tag="adapter"):
    """What came of a LoadAdapter or an UnloadAdapter."""

    number: int
    size_bytes: int = 0  # of one that is loaded
    error_kind: str = ""  # the error's type name; empty: it was done
    error: str = ""  # for people
    setting: str = ""  # the limit that was reached, as CoreSettings has it


class LoadChanged(msgspec.Struct, frozen=True, tag="load"):
    """The load changed without a step (a drain)."""

    load: Load


class GpuUse(msgspec.Struct, frozen=True):
    """How busy the GPU is that the core computes on, other processes on it included."""

    memory_used_bytes: int
    memory_bytes: int
    utilization: float | None  # share of the time in which a kernel ran; None: nobody tells


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The answer to a Ping."""

    number: int
    load: Load
    gpu_use: GpuUse | None = None  # None on a CPU


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The last event of a core that gives up."""

    reason: str
    starting: bool = False  # before Ready: restarting with the same settings will not help


class Log(msgspec.Struct, frozen=True, tag="log"):
    """A log record of the core, for the front to write in its own form."""

    level: int  # as in the standard library's logging
    logger: str
    message: str
    progress: float | None = None  # share of the weights that is read, where it tells that


Event: TypeAlias = (
    Ready | Step | Encoded | Ended | Refused | AdapterChanged | LoadChanged | Pong | Log | Fatal
)
