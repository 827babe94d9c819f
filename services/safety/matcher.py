"""A policy made ready to look at texts in one direction: prompts or completions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache

from services.safety import injection
from services.safety.detectors import DETECTORS
from services.safety.detectors.base import Detector, detector
from services.safety.policy import Category, PatternTerm, Policy
from services.safety.sources import PatternRule, PatternSource, Source, Term, TermSource
from services.safety.verdict import Action


class RuleKind(Enum):
    """What a match of a rule means."""

    FINDING = auto()
    EVIDENCE = auto()  # adds to the injection score of its category
    ENCODED = auto()  # may hold evidence once decoded
    ALLOWED = auto()  # what lies within is no finding


@dataclass(frozen=True, slots=True)
class Rule:
    """Whose a match is and what follows from it."""

    kind: RuleKind
    category: str = ""
    detector: str = ""
    action: Action = Action.ALLOW
    threshold: float = 0.0
    evidence: str = ""


class Matcher:
    """Sources and rules of one policy in one direction. Immutable, shared by all its sessions."""

    def __init__(self, policy: Policy, *, completion: bool) -> None:
        self.policy = policy
        self.rules: list[Rule] = []
        self._builder = _SourceBuilder()
        for name, category in sorted(policy.categories.items()):
            action = category.completion if completion else category.prompt
            if action is not Action.ALLOW:
                self._add_category(name, category, action)
        if self.rules:
            allowed = self._rule(Rule(RuleKind.ALLOWED))
            for pattern in policy.allow_patterns:
                self._builder.pattern(_own_detector(pattern), allowed, holds_back=False)
            for text in policy.allow_terms:
                self._builder.term(Term(text, allowed), leet=False, holds_back=False)
        self.sources: tuple[Source, ...] = self._builder.build()

    def _rule(self, rule: Rule) -> int:
        self.rules.append(rule)
        return len(self.rules) - 1

    def _add_category(self, name: str, category: Category, action: Action) -> None:
        holds_back = action >= Action.REDACT

        def rule(detector_name: str, kind: RuleKind = RuleKind.FINDING, evidence: str = "") -> int:
            return self._rule(Rule(kind, name, detector_name, action, category.threshold, evidence))

        if category.terms:
            index = rule("terms")
            for text in category.terms:
                term = Term(text, index, category.term_score)
                self._builder.term(term, leet=category.leet, holds_back=holds_back)
        for pattern in category.patterns:
            index = rule(pattern.name)
            self._builder.pattern(_own_detector(pattern), index, holds_back, pattern.score)
        for detector_name in category.detectors:
            if detector_name != injection.NAME:
                self._builder.pattern(DETECTORS[detector_name], rule(detector_name), holds_back)
                continue
            for kind in injection.EVIDENCE:
                index = rule(f"{injection.NAME}.{kind.kind}", RuleKind.EVIDENCE, kind.kind)
                _add_evidence(self._builder, kind, index, holds_back)
            index = rule(injection.BLOB.name, RuleKind.ENCODED, injection.ENCODED_KIND)
            self._builder.pattern(injection.BLOB, index, holds_back)


def _own_detector(pattern: PatternTerm) -> Detector:
    return detector(pattern.name, pattern.pattern, ignore_case=pattern.ignore_case)


class _SourceBuilder:
    """Gathers terms and patterns that can be looked for together."""

    def __init__(self) -> None:
        self._terms: dict[tuple[bool, bool], list[Term]] = {}
        self._patterns: dict[bool, list[PatternRule]] = {}

    def term(self, term: Term, *, leet: bool, holds_back: bool) -> None:
        self._terms.setdefault((leet, holds_back), []).append(term)

    def pattern(
        self, made: Detector, rule: int, holds_back: bool, score: float | None = None
    ) -> None:
        self._patterns.setdefault(holds_back, []).append(PatternRule(made, rule, score))

    def build(self) -> tuple[Source, ...]:
        sources: list[Source] = [
            TermSource(terms, leet=leet, holds_back=holds_back)
            for (leet, holds_back), terms in sorted(self._terms.items())
        ]
        sources += [
            PatternSource(rules, holds_back=holds_back)
            for holds_back, rules in sorted(self._patterns.items())
        ]
        return tuple(sources)


def _add_evidence(
    builder: _SourceBuilder, kind: injection.Evidence, rule: int, holds_back: bool
) -> None:
    for made in kind.patterns:
        builder.pattern(made, rule, holds_back)
    for text in kind.terms:
        builder.term(Term(text, rule), leet=False, holds_back=holds_back)


@lru_cache(maxsize=1)
def evidence_sources() -> tuple[Source, ...]:
    """Sources whose rule numbers index injection.EVIDENCE, for decoded text."""
    builder = _SourceBuilder()
    for index, kind in enumerate(injection.EVIDENCE):
        _add_evidence(builder, kind, index, False)
    return builder.build()


EVIDENCE_WEIGHTS: dict[str, float] = {
    kind.kind: kind.weight for kind in (*injection.EVIDENCE, injection.ENCODED)
}
