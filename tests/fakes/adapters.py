"""Small random adapters, as PEFT makes, saves and computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

ALL_LINEAR: dict[str, Any] = {"target_modules": "all-linear"}


def add_adapters(model: Any, directory: Path, **configs: dict[str, Any]) -> PeftModel:
    """Add an adapter for each configuration to a model of transformers, random and of some weight,
    and write it to the folder of its name. Returns the model, which has them all."""
    adapted: Any = None
    for name, fields in configs.items():
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 8, **fields})
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if "lora_B" in name:
                values.copy_(torch.randn(values.shape, generator=generator) * 0.05)
    adapted.save_pretrained(directory)
    return adapted.eval()


def logits_of(adapted: PeftModel, tokens: list[int], adapter: str | None) -> torch.Tensor:
    """The logits at all tokens through one of a model's adapters, or none."""
    batch = torch.tensor([tokens])
    with torch.no_grad():
        if adapter is None:
            with adapted.disable_adapter():
                return adapted(batch).logits[0]
        adapted.set_adapter(adapter)
        return adapted(batch).logits[0]
