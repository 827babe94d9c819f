"""The policies that this process applies, by name, ready for both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.runtime.errors import Reason, ServiceError
from services.safety.matcher import Matcher
from services.safety.policy import DEFAULT_POLICY, Policy, load_policy


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """A policy with what was made of it."""

    policy: Policy
    revision: str
    prompts: Matcher
    completions: Matcher


class PoliciesInForce:
    """Empty until `load`, which replaces all policies or none."""

    def __init__(self) -> None:
        self._policies: Mapping[str, PolicyInForce] = {}

    def load(self, files: Mapping[str, Path]) -> None:
        """Reads the files, and the policy that ships with the mesh unless `default` names another.

        Raises PolicyError.
        """
        sources: dict[str, Path | None] = {DEFAULT_POLICY: None, **files}
        loaded = {name: make_ready(load_policy(name, path)) for name, path in sources.items()}
        self._policies = loaded

    def find(self, name: str) -> PolicyInForce:
        """A policy by name, the default for an empty one. Raises ServiceError POLICY_NOT_FOUND."""
        found = self._policies.get(name or DEFAULT_POLICY)
        if found is None:
            raise ServiceError(
                Reason.POLICY_NOT_FOUND,
                f"no safety policy is named {name[:100]!r}",
                metadata={"known": ", ".join(sorted(self._policies))[:500]},
            )
        return found


def make_ready(policy: Policy) -> PolicyInForce:
    """Builds what a policy needs to look at texts."""
    return PolicyInForce(
        policy,
        policy.revision,
        Matcher(policy, completion=False),
        Matcher(policy, completion=True),
    )
