"""What is kept of checks: metrics and log lines. Never text, only what was found and where."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from services.runtime.telemetry import Metrics
from services.safety.verdict import Action, Finding

log = logging.getLogger(__name__)


class Records:
    """Counts checks and findings, and logs what was redacted or blocked."""

    def __init__(self, metrics: Metrics) -> None:
        self._checks = metrics.counter("meshserve_safety_checks")
        self._findings = metrics.counter("meshserve_safety_findings")
        self.sessions = metrics.gauge("meshserve_safety_completion_sessions")

    def checked(self, subject: str, action: Action) -> None:
        """One prompt or completion was judged; `subject` is `prompt` or `completion`."""
        self._checks.labels(subject, action.name.lower()).inc()

    def found(self, subject: str, findings: Iterable[Finding], *, tenant: str) -> None:
        """Findings that were made now."""
        for finding in findings:
            action = finding.action.name.lower()
            self._findings.labels(finding.category, action).inc()
            log.info(
                "safety finding",
                extra={
                    "subject": subject,
                    "category": finding.category,
                    "action": action,
                    "detector": finding.detector,
                    "score": round(finding.score, 3),
                    "tenant": tenant[:100],
                },
            )
