"""Which class builds which architecture: one line per name."""

from __future__ import annotations

from collections.abc import Callable

from services.engine.core.models.base import Model
from services.engine.core.models.config import ModelConfig
from services.engine.core.models.llama import Llama

# HF's class names and GGUF's architecture names.
ARCHITECTURES: dict[str, Callable[[ModelConfig], Model]] = {
    "LlamaForCausalLM": Llama,
    "llama": Llama,
}
