"""Verdicts as the contract writes them."""

from __future__ import annotations

from meshserve.v1 import types_pb2
from services.safety.verdict import Action, Verdict

_ACTIONS = {
    Action.ALLOW: types_pb2.SAFETY_ACTION_ALLOW,
    Action.FLAG: types_pb2.SAFETY_ACTION_FLAG,
    Action.REDACT: types_pb2.SAFETY_ACTION_REDACT,
    Action.BLOCK: types_pb2.SAFETY_ACTION_BLOCK,
}


def action_to_proto(action: Action) -> types_pb2.SafetyAction.ValueType:
    """The contract's name of an action."""
    return _ACTIONS[action]


def verdict_to_proto(verdict: Verdict, revision: str) -> types_pb2.SafetyVerdict:
    """A verdict on the wire; its action is unspecified when nothing was found."""
    return types_pb2.SafetyVerdict(
        action=_ACTIONS[verdict.action]
        if verdict.findings
        else types_pb2.SAFETY_ACTION_UNSPECIFIED,
        findings=[
            types_pb2.SafetyFinding(
                category=finding.category,
                score=finding.score,
                action=_ACTIONS[finding.action],
                detector=finding.detector,
                text_index=finding.text_index,
                start=finding.start,
                end=finding.end,
            )
            for finding in verdict.findings
        ],
        policy_revision=revision,
    )
