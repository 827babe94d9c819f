"""Step times of each family of decoders, in the widths of a published model, beside transformers.

    python -m benchmarks.families
    python -m benchmarks.families --models Qwen3-0.6B gemma-3-1b --layers 4

Weights are random. Layers are few, and the vocabulary is as much smaller, so that the head has
about the share of a step that it has in the whole model. transformers computes in bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.floors import STEPS, Served
from services.engine.core.kernels import cpu
from services.engine.core.kernels.cpu.team import Team

Step = tuple[int, int, int]
WEIGHTS = ("bfloat16", "int4")
VOCAB_SIZE = 16384
# As config.json has them, but for the number of layers and the vocabulary.
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "Mistral-7B": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Phi-3-mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "sliding_window": 2047,
        "pad_token_id": 0,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_head": 12,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
}


def make_model(fields: dict[str, Any], layers: int) -> Any:
    """A model of transformers with random weights in bfloat16."""
    fields = dict(fields)
    layers_field = "n_layer" if fields["model_type"] == "gpt2" else "num_hidden_layers"
    config = transformers.AutoConfig.for_model(
        fields.pop("model_type"), **{layers_field: layers}, vocab_size=VOCAB_SIZE, **fields
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.copy_(torch.empty_like(weight).uniform_(-0.02, 0.02, generator=generator))
    # What is computed from the configuration was not made on the meta device.
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config)
            for name, buffer in fresh.named_buffers():
                module.register_buffer(name, buffer, persistent=False)
                setattr(module, f"original_{name}", buffer)
    model.tie_weights()
    return model.eval()


class Eager:
    """The model as transformers runs it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None)
        self._shape = heads, head_dim or config.hidden_size // config.num_attention_heads
        self._layers = config.num_hidden_layers

    @torch.inference_mode()
    def seconds(self, step: Step) -> float:
        """What one step takes, of sequences whose earlier tokens are in the cache."""
        sequences, tokens, context = step
        heads, head_dim = self._shape
        cache = transformers.DynamicCache(config=self._model.config)
        if context > tokens:
            for layer in range(self._layers):
                past = torch.randn(
                    sequences, heads, context - tokens, head_dim, dtype=torch.bfloat16
                )
                cache.update(past, past.clone(), layer)
        ids: Tensor = torch.randint(0, self._model.config.vocab_size, (sequences, tokens))
        started = time.perf_counter()
        self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - started


def measure(name: str, options: argparse.Namespace, team: Team) -> None:
    """Print a line for each step of one model."""
    model = make_model(MODELS[name], options.layers)
    eager = Eager(model)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(Path(directory))
        served = [Served(directory, team, weights) for weights in WEIGHTS]
    for _ in range(options.rounds):
        for each in served:
            each.measure(options.repeats)
    for step in STEPS:
        eager_ms = 1e3 * min(eager.seconds(step) for _ in range(options.rounds + 1))
        times = [float(np.min(each.rounds_ms[step])) for each in served]
        shown = " | ".join(f"{ms:.2f} | {eager_ms / ms:.1f}" for ms in times)
        sequences, tokens, context = step
        print(f"| {name} | {sequences} x {tokens} of {context} | {eager_ms:.2f} | {shown} |")


def main() -> None:
    """Print a table of all models and steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="of a step, in each round")
    options = parser.parse_args()
    library = cpu.activate("auto")
    if library is None:
        parser.error("the native kernels are not available here")
    transformers.utils.logging.disable_progress_bar()
    team = Team(library, options.threads)
    columns = " | ".join(f"{weights} | ratio" for weights in WEIGHTS)
    print(f"{options.threads} threads, {library.isa}; {options.layers} layers, ms a step\n")
    print(f"| model | step | transformers | {columns} |")
    print("| --- | --- | ---: |" + " ---: |" * 2 * len(WEIGHTS))
    for name in options.models:
        measure(name, options, team)


if __name__ == "__main__":
    main()
