"""What an adapter's adapter_config.json says, as PEFT writes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from services.engine.core.adapters.patterns import ModulePatterns
from services.runtime.modelfiles.fields import Fields, read_json

CONFIG_NAME = "adapter_config.json"
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8.0
# What changes the computation beyond a pair of matrices for each projection, and how it is set.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a bias of the adapter's own",
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "embeddings of single tokens",
    "target_parameters": "adapters of bare parameters, such as those of experts,",
    "layer_replication": "layers that are there several times",
    "alora_invocation_tokens": "an adapter that begins at certain tokens",
    "arrow_config": "routing between adapters",
    "megatron_config": "Megatron's layers",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Other ways to begin take something off the model's own weights, which a served model keeps.
_BEGINNINGS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Ranks and scales, by the name that the adapter gives a module."""

    path: Path
    rank: int
    alpha: float
    stabilised: bool  # Kalajdzievski, arXiv:2312.03732
    ranks: ModulePatterns
    alphas: ModulePatterns

    def rank_of(self, module: str) -> int:
        """The rank of a module's matrices."""
        return int(self.ranks.value(module, self.rank))

    def scale_of(self, module: str, rank: int) -> float:
        """What they are multiplied with."""
        alpha = self.alphas.value(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Read it.

    Raises:
        ModelFileError: it is missing or damaged, or says what is not supported, by its name.
    """
    path = directory / CONFIG_NAME
    fields = Fields(path, read_json(path))
    kind = fields.text("peft_type")
    if kind != "LORA":
        raise fields.error("peft_type", f"{kind!r} is not supported, only LORA is")
    for name, what in _UNSUPPORTED.items():
        if fields.raw.get(name):
            raise fields.error(name, f"{what} is not supported")
    bias = fields.raw.get("bias")
    if bias not in (None, "none"):
        raise fields.error(
            "bias", f"{bias!r} is not supported: the model's biases stay as they are"
        )
    beginning = fields.raw.get("init_lora_weights")
    if isinstance(beginning, str) and beginning not in _BEGINNINGS:
        problem = (
            f"{beginning!r} changes the model's own weights; save the adapter converted to LoRA"
        )
        raise fields.error("init_lora_weights", problem)
    _check_targets(fields)
    rank = fields.integer("r", DEFAULT_RANK)
    if rank < 1:
        raise fields.error("r", f"{rank} is no rank")
    return AdapterConfig(
        path,
        rank,
        fields.number("lora_alpha", DEFAULT_ALPHA),
        fields.flag("use_rslora"),
        ModulePatterns.read(fields, "rank_pattern", whole=True),
        ModulePatterns.read(fields, "alpha_pattern"),
    )


def _check_targets(fields: Fields) -> None:
    """They are not looked for: what was adapted is what there are tensors of."""
    targets = fields.raw.get("target_modules")
    names = targets if isinstance(targets, list) else [targets or ""]
    if not all(isinstance(each, str) for each in names):
        raise fields.error("target_modules", "is neither text nor a list of names")
