"""Fairness between tenants: whoever of those who wait has been served least is next.

This is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models"
(OSDI '24, arXiv:2401.00588): each tenant has a counter of the service that its tokens have cost,
and a tenant that begins to wait is lifted to the least of those who wait already, so that nobody
saves up service while not asking for it. Two tenants that both always wait differ by no more than
a batch's worth of service, whatever the lengths of their requests.
"""

from __future__ import annotations

from collections.abc import Collection

# What a token costs, as in the paper. Computing a prompt's tokens together takes about half as
# long per token as generating them one by one. Tokens found in the KV cache cost nothing.
PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2

# Counters of tenants that neither wait nor run are forgotten when there are more than this.
_MAX_COUNTERS = 1024


class TenantCounters:
    """The service that each tenant has had, comparable between tenants that wait."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._last_entered = 0  # the counter of the tenant that entered last, when it did

    def __len__(self) -> int:
        return len(self._served)

    @property
    def contended(self) -> bool:
        """Whether counting makes a difference: there is more than one tenant."""
        return len(self._served) > 1

    def served(self, tenant: str) -> int:
        """What the tokens of a known tenant have cost."""
        return self._served[tenant]

    def begin_waiting(self, tenant: str, others: Collection[str]) -> None:
        """Lift a tenant that begins to wait beside `others`, who wait already."""
        if len(self._served) >= _MAX_COUNTERS:
            self._forget_all_but(others)
        least = min((self._served[other] for other in others), default=self._last_entered)
        self._served[tenant] = max(self._served.get(tenant, 0), least)

    def enter(self, tenant: str) -> None:
        """Note that a sequence of a tenant enters."""
        self._last_entered = self._served[tenant]

    def charge(self, tenant: str, cost: int) -> None:
        """Add what tokens of a tenant have cost."""
        self._served[tenant] = self._served.get(tenant, self._last_entered) + cost

    def reset(self) -> None:
        """Forget everything: an engine without work owes nobody."""
        self._served.clear()
        self._last_entered = 0

    def _forget_all_but(self, tenants: Collection[str]) -> None:
        # Who comes back is lifted to the least of those who wait, hence loses a debt at most.
        self._served = {tenant: self._served[tenant] for tenant in tenants}
