"""What encoders answer: vectors, classes and scores, as plain values without protobuf or numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshserve.types import SafetyVerdict, Usage


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors of texts, in their order; iterating gives the vectors."""

    request_id: str
    model: str
    vectors: list[list[float]]
    usage: Usage
    cached: int = 0
    """How many of the vectors came from the response cache."""
    prompt_safety: SafetyVerdict | None = None

    @property
    def vector(self) -> list[float]:
        """The vector of the first text."""
        return self.vectors[0]

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[list[float]]:
        return iter(self.vectors)


@dataclass(frozen=True, slots=True)
class ClassScore:
    """A class and how likely it is."""

    label: str
    score: float
    """In [0, 1]; of a model that regresses, any number."""


@dataclass(frozen=True, slots=True)
class Classifications:
    """The classes of texts, in their order."""

    request_id: str
    model: str
    results: tuple[tuple[ClassScore, ...], ...]
    """For each text its classes, likeliest first."""
    usage: Usage
    prompt_safety: SafetyVerdict | None = None

    @property
    def labels(self) -> list[str]:
        """The likeliest class of each text."""
        return [scores[0].label for scores in self.results]

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[tuple[ClassScore, ...]]:
        return iter(self.results)


@dataclass(frozen=True, slots=True)
class Scores:
    """How well documents fit a query, in the order of the documents."""

    request_id: str
    model: str
    scores: list[float]
    """The larger, the better."""
    usage: Usage
    prompt_safety: SafetyVerdict | None = None

    @property
    def ranking(self) -> list[int]:
        """The documents by their index, the best one first."""
        return sorted(range(len(self.scores)), key=self.scores.__getitem__, reverse=True)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[float]:
        return iter(self.scores)
