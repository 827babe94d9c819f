"""Fill a model's parameters from a checkpoint, exactly: nothing missing, nothing left over."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from services.engine.core.layers import Experts, MergedLinear
from services.engine.core.weights.checkpoint import Checkpoint
from services.runtime.modelfiles import ModelFileError

_NAMED_IN_ERRORS = 5


def weight_slots(model: nn.Module, stored: Container[str] = ()) -> dict[str, Tensor]:
    """Return where each named tensor of a checkpoint goes: views into the model's parameters.

    stored: the names that the checkpoint has, where a module takes its tensors in several forms.
    """
    slots: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, MergedLinear | Experts):
            slots |= module.slots(path, stored)
            continue
        for kind, parameter in module.named_parameters(recurse=False):
            slots[f"{path}.{kind}"] = parameter.data
    return slots


def check_weights(model: nn.Module, checkpoint: Checkpoint, *, tied: bool) -> None:
    """Raise ModelFileError, naming tensors, unless names and shapes fit the model exactly.

    Works on a model on the meta device, so that a wrong file is refused before any memory is taken
    for it. A tied model's checkpoint may repeat the head.
    """
    wanted = {
        name: tuple(slot.shape) for name, slot in weight_slots(model, checkpoint.shapes).items()
    }
    missing = sorted(wanted.keys() - checkpoint.shapes.keys())
    if missing:
        raise ModelFileError(checkpoint.path, f"lacks {_listed(missing)}")
    allowed = {"head.weight"} if tied else set()
    extra = sorted(
        name
        for name in checkpoint.shapes.keys() - wanted.keys() - allowed
        if not _adds_nothing(checkpoint, name)
    )
    unexpected = checkpoint.unknown + [checkpoint.source_name(name) for name in extra]
    if unexpected:
        problem = f"has {_listed(unexpected)}, which this architecture does not know"
        raise ModelFileError(checkpoint.path, problem)
    for name, shape in wanted.items():
        if checkpoint.shapes[name] != shape:
            problem = f"has shape {list(checkpoint.shapes[name])}, not {list(shape)}"
            source = checkpoint.source_name(name)
            raise ModelFileError(checkpoint.path, problem, what=f"tensor {source!r}")


def _adds_nothing(checkpoint: Checkpoint, name: str) -> bool:
    """Tools that quantise write biases of zeros for projections that have none."""
    is_bias = name.endswith(".bias") and len(checkpoint.shapes[name]) == 1
    return is_bias and not bool(checkpoint.read(name).any())


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy every tensor into its place, converted to the parameter's dtype and device.

    Call `check_weights` first. Raises ModelFileError for a tensor that cannot be read.
    """
    for name, slot in weight_slots(model, checkpoint.shapes).items():
        slot.copy_(checkpoint.read(name))
        checkpoint.release()


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED_IN_ERRORS
    shown = ", ".join(names[:_NAMED_IN_ERRORS])
    return f"tensors {shown}" + (f" and {more} more" if more > 0 else "")
