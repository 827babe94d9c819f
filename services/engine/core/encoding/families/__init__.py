"""Families of encoders, one file each, and which class builds which architecture."""

from __future__ import annotations

from services.engine.core.encoding.families.bert import Bert, Roberta
from services.engine.core.encoding.families.deberta_v2 import DebertaV2
from services.engine.core.encoding.families.modernbert import ModernBert
from services.engine.core.encoding.model import Encoder

_HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification")


def _architectures(names: tuple[str, ...], family: type[Encoder]) -> dict[str, type[Encoder]]:
    return {name + head: family for name in names for head in _HEADS}


# HF's class names.
ARCHITECTURES: dict[str, type[Encoder]] = {
    **_architectures(("Bert",), Bert),
    "BertForPreTraining": Bert,
    **_architectures(("Roberta", "XLMRoberta", "Camembert"), Roberta),
    **_architectures(("DebertaV2",), DebertaV2),
    **_architectures(("ModernBert",), ModernBert),
}
