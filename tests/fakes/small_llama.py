"""A checkpoint that is small, random and sure of itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 97


def save_small_llama(path: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """A small random Llama whose likeliest tokens stand out, so that rounding decides nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).float().save_pretrained(path)
