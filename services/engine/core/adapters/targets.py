"""Which projections of a model adapters may change, and what checkpoints call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.engine.core.layers import MergedLinear
from services.engine.core.models.base import Model
from services.engine.core.models.registry import GGUF_FAMILIES, HF_FAMILIES


@dataclass(frozen=True, slots=True)
class Target:
    """Some outputs of a module of the model, which a checkpoint may hold as one matrix."""

    module: str
    first: int
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Targets:
    """By the name that HF gives them, whatever file the model itself is from."""

    of: Mapping[str, Target]
    model_name: Callable[[str], str | None]

    @classmethod
    def of_model(cls, skeleton: Model) -> Targets:
        """Those of a model: the projections of its attention and its feed-forward layers."""
        architecture = skeleton.config.architecture
        names = (HF_FAMILIES | GGUF_FAMILIES)[architecture].hf_names
        found: dict[str, Target] = {}
        for path, module in skeleton.projections().items():
            outputs, inputs = module.weight.shape
            found[path] = Target(path, 0, outputs, inputs)
            if isinstance(module, MergedLinear):
                parent, first = path.rpartition(".")[0], 0
                for part, size in module.sizes.items():
                    found[f"{parent}.{part}"] = Target(path, first, size, inputs)
                    first += size
        return cls(found, names.of)

    def find(self, module: str) -> Target | None:
        """The target of a module by HF's name."""
        for name in (module, module.replace("model.language_model.", "model.", 1)):
            own = self.model_name(f"{name}.weight")
            if own is not None and (found := self.of.get(own.removesuffix(".weight"))) is not None:
                return found
        return None
