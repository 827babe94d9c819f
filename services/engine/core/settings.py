"""What the engine core can be told at start-up."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from services.engine.core.model_config import SparseAttention

# How keys and values are kept; "auto": in the precision that a model computes in.
KVCacheFormat: TypeAlias = Literal["auto", "int8", "fp8"]


class BatcherSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How an encoder's batches are made.

    Raises:
        ValueError: a limit is out of range.
    """

    max_sequences: int = 256  # of a batch
    max_tokens: int = 4096  # of a batch, unless one sequence has more
    longest_wait_ms: float = 0.0  # of a sequence, for others that would make a fuller batch
    preferred_sizes: tuple[int, ...] = ()  # in sequences: such a batch waits for no further ones
    max_waiting_sequences: int = 16384

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_tokens", "max_waiting_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"batcher.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.longest_wait_ms < float("inf"):
            raise ValueError(
                f"batcher.longest_wait_ms must not be negative, but is {self.longest_wait_ms}"
            )
        for size in self.preferred_sizes:
            if not 1 <= size <= self.max_sequences:
                raise ValueError(
                    f"batcher.preferred_sizes must lie in [1, {self.max_sequences}], not {size}"
                )


class CoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one engine core. Sizes of the KV cache are in bytes, limits in tokens.

    Raises:
        ValueError: a limit is out of range or two limits contradict each other.
    """

    model_path: str
    device: str = "auto"  # "auto" (CUDA where there is a card), "cpu", "cuda:1"
    dtype: str = "auto"  # "auto", "float32", "bfloat16", "float16"
    # How matrices are stored; "auto" keeps the precision of a quantised file, else bfloat16. With
    # "fp8" and "w8a8", for a GPU, activations are rounded to eight bits too.
    weights: Literal["auto", "bfloat16", "int8", "int4", "fp8", "w8a8"] = "auto"
    allow_pickled: bool = False  # whether weights may be pickled, where there are no others
    kv_cache_format: KVCacheFormat = "auto"
    threads: int | None = None  # CPU threads of one step; None: see processors.py
    tensor_parallel: int = 1  # ranks that share each layer
    pipeline_parallel: int = 1  # stages of layers, each of so many ranks
    # Instruction set of the C++ kernels; "auto" is the best the machine has, "off" plain torch.
    cpu_kernels: Literal["auto", "amx", "avx512bf16", "avx512", "avx2", "off"] = "auto"
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None  # None: by kv_cache_memory_fraction
    # On a GPU: the share of its memory that the engine may take in all; None: see gpu_memory.py.
    # On a CPU: the share that the cache may take of what is free; None: half.
    kv_cache_memory_fraction: float | None = None
    memory_share: float = 1.0  # on a CPU: of what that fraction allows; the rest is for others'
    # Other models of the engine that are yet to be loaded: how many, how many of these size their
    # caches by what is left, and what their weights, and caches of a chosen size, will take.
    waiting_models: int = 0
    waiting_caches: int = 0
    waiting_weights_bytes: int = 0
    waiting_cache_bytes: int = 0
    kv_cache_limit_bytes: int | None = None  # what the cache on a GPU is not to exceed
    max_context_tokens: int | None = None  # None: the model's own
    sparse_attention: SparseAttention | None = None  # None: layers see what they were trained to
    max_batch_tokens: int = 512  # tokens computed per step, over all sequences
    max_running_sequences: int = 64
    max_waiting_sequences: int = 1024
    max_waiting_tokens: int = 1 << 18  # beyond it newcomers are refused; 256 for each of 1,024
    # Prefills join a step with decodes as long as the step stays within this. Ten tokens a second
    # are more than anybody reads.
    step_latency_target_ms: float = 100.0
    # Whether a step is planned while the one before it is computed; "auto": where a device of its
    # own computes, or a processor is left beside those that do.
    plan_ahead: Literal["auto", "on", "off"] = "auto"
    # Implementations of a GPU's operations that are not used, by their names.
    excluded_kernels: tuple[str, ...] = ()
    # Memory of the host for what preempted sequences have computed; 0: they compute it again.
    swap_memory_bytes: int = 0
    # Whether steps that decode are captured as CUDA graphs when the engine starts.
    cuda_graphs: Literal["auto", "off"] = "auto"
    prefix_cache: bool = True  # whether blocks are kept and found by what they contain
    # What drafts tokens; "auto" is the draft model where there is one, else prompt look-up.
    speculation: Literal["auto", "ngram", "draft", "off"] = "auto"
    draft_model_path: str | None = None
    # Adapters that are there from the start, by name: directories.
    adapters: dict[str, str] = {}
    # Whether one of these that cannot be loaded is left out, and no reason not to start.
    adapters_may_fail: bool = False
    max_adapters: int = 8  # at a time; 0: none
    max_adapter_rank: int = 64
    # How long tokens may wait in the core for those of further steps, so as to be sent together.
    event_hold_ms: float = 0.0
    # By field of SamplingParams; laid over the defaults that the model brings itself.
    default_sampling: dict[str, float] = {}
    batcher: BatcherSettings = BatcherSettings()  # of a model that is an encoder

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "tensor_parallel",
            "pipeline_parallel",
            "max_batch_tokens",
            "max_running_sequences",
            "max_waiting_sequences",
            "max_waiting_tokens",
            "max_adapter_rank",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("threads", "kv_cache_memory_bytes", "max_context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.max_adapters < len(self.adapters):
            raise ValueError(
                f"max_adapters must be at least {len(self.adapters)}: so many are there from the "
                f"start, and it is {self.max_adapters}"
            )
        if not self.step_latency_target_ms > 0:
            raise ValueError(
                f"step_latency_target_ms must be positive, not {self.step_latency_target_ms}"
            )
        if self.speculation == "draft" and self.draft_model_path is None:
            raise ValueError("speculation with a draft model needs one: set draft_model")
        fraction = self.kv_cache_memory_fraction
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"kv_cache_memory_fraction must lie in (0, 1], not {fraction}")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share must lie in (0, 1], not {self.memory_share}")
        if self.max_batch_tokens < self.max_running_sequences:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least "
                f"max_running_sequences ({self.max_running_sequences}): every running sequence "
                "decodes one token per step"
            )
