"""What the filter says: actions, findings and verdicts, free of any wire format."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

MAX_LISTED_FINDINGS = 100


class Action(IntEnum):
    """What is done with a finding, weakest first."""

    ALLOW = 0
    FLAG = 1
    REDACT = 2
    BLOCK = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Something the policy names, found in original code points [start, end) of a text.

    It never holds the text that was found.
    """

    category: str
    score: float
    action: Action
    detector: str
    start: int
    end: int
    text_index: int = 0


@dataclass(slots=True)
class Verdict:
    """The strongest action yet, and the findings in order of appearance."""

    action: Action = Action.ALLOW
    findings: list[Finding] = field(default_factory=list)

    def add(self, finding: Finding) -> bool:
        """Takes a finding in; whether that is to be seen.

        Of more than MAX_LISTED_FINDINGS only those are listed that make the action stronger: each
        takes the place of the last.
        """
        is_stronger = finding.action > self.action
        self.action = max(self.action, finding.action)
        if len(self.findings) < MAX_LISTED_FINDINGS:
            self.findings.append(finding)
            return True
        if is_stronger:
            self.findings[-1] = finding
        return is_stronger
