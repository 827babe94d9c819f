"""From a path to an encoder that can run a batch."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from services.engine.core.encoding.config import architecture_of
from services.engine.core.encoding.families import ARCHITECTURES
from services.engine.core.encoding.heads import ClassificationHead
from services.engine.core.encoding.model import Encoder, EncoderShape
from services.engine.core.encoding.native import NativeEncoder, WeightChoice
from services.engine.core.encoding.outputs import OutputConfig, read_outputs, served_tokens
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.loading import check_weights, load_weights, weight_slots
from services.engine.core.weights.names import Names
from services.engine.core.weights.opening import open_checkpoint
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.fields import Fields, read_json

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
# What checkpoints hold beside an encoder: heads of other tasks, poolers that nobody asks, and
# tables that follow from the configuration.
_NEEDLESS = re.compile(
    r"^(\w+\.)?(pooler|cls|lm_head|head|decoder|mask_predictions|lm_predictions|classifier)\."
    r"|(^|\.)(position_ids|inv_freq)$"
)
# Old checkpoints have the names of another framework.
_KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


@dataclass(frozen=True, slots=True)
class OpenedEncoder:
    """An encoder that was found fit for its architecture, and no memory taken for it yet."""

    skeleton: Encoder  # on the meta device
    checkpoint: Checkpoint
    outputs: OutputConfig
    max_tokens: int

    @property
    def shape(self) -> EncoderShape:
        """What the engine says of it."""
        config = self.skeleton.config
        return EncoderShape(
            config.architecture,
            config.num_layers,
            config.hidden_size,
            config.vocab_size,
            self.max_tokens,
            config.labels,
        )

    def load(
        self, dtype: torch.dtype, device: torch.device | str, *, batch_tokens: int = 0
    ) -> Encoder:
        """Load it for inference on plain torch, its head in float32, for batches of any size."""
        model = _build(type(self.skeleton), self.skeleton.config, dtype, device)
        if model.head is not None:
            model.head.float()
        load_weights(model, self.checkpoint)
        return model.eval().requires_grad_(False)

    def load_natively(
        self, team: Team, weights: WeightChoice, *, batch_tokens: int = 0
    ) -> tuple[NativeEncoder, dict[str, int]]:
        """Load it for the native kernels, for batches of any size."""
        model = NativeEncoder(self.skeleton, self.checkpoint, team, weights)
        return model, model.weight_bytes

    def load_head(self, device: torch.device | str) -> ClassificationHead | None:
        """Load its classification head alone, in float32; None where it has none."""
        if self.skeleton.head is None:
            return None
        head = copy.deepcopy(self.skeleton.head).to_empty(device=device)
        with torch.no_grad():
            for name, slot in weight_slots(head).items():
                slot.copy_(self.checkpoint.read(f"head.{name}"))
        return head.eval().requires_grad_(False)


def is_encoder(path: Path | str) -> bool:
    """Whether a model is a directory with an encoder's config.json; one that cannot be read is
    left to whoever opens it."""
    config = Path(path) / "config.json"
    try:
        return architecture_of(Fields(config, read_json(config))) in ARCHITECTURES
    except ModelFileError:
        return False


def open_encoder(
    path: Path | str, *, max_context_tokens: int | None = None, allow_pickled: bool = False
) -> OpenedEncoder:
    """Open an encoder and check names and shapes of its weights.

    `max_context_tokens`: the longest sequence that it is to take; None: as it was made for.
    `allow_pickled` is as for `open_checkpoint`.

    Raises ModelFileError for files that are missing, damaged or do not fit the architecture.
    """
    directory = Path(path)
    config_path = directory / "config.json"
    fields = Fields(config_path, read_json(config_path))
    architecture = architecture_of(fields)
    family = ARCHITECTURES.get(architecture)
    if family is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelFileError(
            config_path, f"architecture {architecture!r} is not supported, only {known} are"
        )
    config = family.read_config(fields)
    names = _names(family, has_head=bool(config.labels))
    checkpoint = open_checkpoint(directory, names, allow_pickled=allow_pickled)
    if config.num_layers > len(checkpoint.shapes):
        problem = f"claims {config.num_layers} layers but has {len(checkpoint.shapes)} tensors"
        raise ModelFileError(directory, problem)
    # Without memory, so that a wrong file is refused before any is taken.
    skeleton = _build(family, config, torch.float32, "meta")
    check_weights(skeleton, checkpoint, tied=False)
    outputs = read_outputs(directory, fields, config.hidden_size, labels=config.labels)
    max_tokens = served_tokens(directory, config.max_tokens, outputs.max_tokens, max_context_tokens)
    return OpenedEncoder(skeleton, checkpoint, outputs, max_tokens)


def _names(family: type[Encoder], *, has_head: bool) -> Names:
    table = dict(family.NAMES)
    table |= {f"{family.PREFIX}.{theirs}": ours for theirs, ours in family.NAMES.items()}
    if has_head:
        table |= family.HEAD_NAMES

    def name_of(source: str) -> str | None:
        module, _, kind = source.rpartition(".")
        layer = _LAYER.search(module)
        known = table.get(_LAYER.sub("{}", module, count=1))
        if known is None or kind not in _KINDS:
            return None
        return f"{known.format(layer.group() if layer else '')}.{_KINDS[kind]}"

    return Names(name_of, lambda source: _NEEDLESS.search(source) is not None)


def _build(
    family: type[Encoder], config: object, dtype: torch.dtype, device: torch.device | str
) -> Encoder:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return family(config)  # type: ignore[arg-type]  # its own read_config made it
    finally:
        torch.set_default_dtype(previous)
