"""Which family reads and computes which architecture: one line per name."""

from __future__ import annotations

from dataclasses import replace

from services.engine.core.models.family import Family
from services.engine.core.models.gemma import GEMMA2, GEMMA3
from services.engine.core.models.gpt2 import GPT2_FAMILY
from services.engine.core.models.llama import LLAMA, MISTRAL, PHI3, QWEN2, QWEN3
from services.engine.core.models.mixture import (
    GGUF_EXPERTS,
    MIXTRAL,
    QWEN3_MOE,
    gguf_experts,
)
from services.engine.core.weights.names import FROM_GGUF, decoder_names

# HF's class names.
HF_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Phi3ForCausalLM": PHI3,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3,
    "GPT2LMHeadModel": GPT2_FAMILY,
}
# GGUF's architecture names. Its `llama` is Llama, Mistral and Mixtral.
GGUF_FAMILIES: dict[str, Family] = {
    "llama": replace(
        LLAMA, gguf_names=decoder_names(FROM_GGUF | GGUF_EXPERTS), gguf_config=gguf_experts
    ),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3moe": QWEN3_MOE,
    "phi3": PHI3,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gpt2": GPT2_FAMILY,
}
