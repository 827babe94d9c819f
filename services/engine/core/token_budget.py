"""How many tokens a step computes, and how prefills share them.

A step lasts as long as all it computes, and everybody who decodes waits that long for the next
token. So the prefill tokens that may join a step with decodes are limited, to what by experience
keeps the step within a target. Where nobody decodes, nobody waits between tokens, and a step takes
all it can.
"""

from __future__ import annotations

from services.engine.core.sequence import Sequence

# Weight of the latest step in the running averages: a change of load is followed in a few steps,
# and one slow step (another process had the cores) does not throw the budget off.
_WEIGHT = 0.2
# Steps of fewer prefill tokens say more about the cost of a step than about that of a token.
_MIN_SAMPLE_TOKENS = 16
# However slow the decodes are, this part of a full step's tokens goes to prefills, or prompts
# would starve.
_LEAST_SHARE = 1 / 16


class TokenBudget:
    """Learns what a step of decodes and a prefill token cost, from the steps as they come.

    The model is: duration = decode step + prefill tokens x cost of one. Both are running averages;
    what of it is wrong (attention to long contexts, a larger batch) ends up in the cost of a
    token, which then is what it has to be for steps of the present kind to meet the target.
    """

    def __init__(self, max_tokens: int, latency_target_ns: int) -> None:
        self._max_tokens = max_tokens
        self._latency_target_ns = latency_target_ns
        self._least_tokens = max(1, int(max_tokens * _LEAST_SHARE))
        self._decode_step_ns = 0.0
        self._prefill_token_ns = 0.0

    def prefill_tokens(self, num_decode_tokens: int) -> int:
        """Prefill tokens that may join a step of so many decode tokens."""
        room = self._max_tokens - num_decode_tokens
        if num_decode_tokens == 0 or self._prefill_token_ns == 0:
            return room
        left_ns = max(0.0, self._latency_target_ns - self._decode_step_ns)
        affordable = int(left_ns / self._prefill_token_ns)
        return max(0, min(room, max(affordable, self._least_tokens)))

    def observe(self, num_decode_tokens: int, num_prefill_tokens: int, duration_ns: int) -> None:
        """Learn from a step."""
        if num_prefill_tokens == 0:
            self._decode_step_ns = _blend(self._decode_step_ns, duration_ns)
        elif num_prefill_tokens >= _MIN_SAMPLE_TOKENS:
            decode_ns = min(self._decode_step_ns, duration_ns / 2) if num_decode_tokens else 0.0
            self._prefill_token_ns = _blend(
                self._prefill_token_ns, (duration_ns - decode_ns) / num_prefill_tokens
            )


# Tokens of prompts that are scored in a step: each takes the logits of a whole vocabulary.
MAX_SCORED_TOKENS = 256


def share(num_tokens: int, prefills: list[Sequence]) -> dict[Sequence, int]:
    """How many of `num_tokens` each of the prefills under way (best rank first) computes now.

    Within the highest priority the earliest arrival is sure of half; all that is left goes to the
    shortest remainders first, the earliest arrival included. So the short ones, which get through
    in a step or two, never wait for a long one (shortest first gives the least mean wait), and the
    long one, which is the earliest sooner or later, advances by half a budget per step at least.
    Lower priorities get what higher ones leave.

    Of prompts that are scored, `MAX_SCORED_TOKENS` are computed at most.
    """
    shares = _share(num_tokens, prefills)
    num_scored = 0
    for sequence in list(shares):
        if sequence.num_unscored_tokens:
            shares[sequence] = min(shares[sequence], MAX_SCORED_TOKENS - num_scored)
            num_scored += shares[sequence]
            if not shares[sequence]:
                del shares[sequence]
    return shares


def _share(num_tokens: int, prefills: list[Sequence]) -> dict[Sequence, int]:
    shares: dict[Sequence, int] = {}
    if not prefills or num_tokens <= 0:
        return shares
    first = prefills[0]
    sure = min(first.num_uncomputed_tokens, -(-num_tokens // 2))
    left = num_tokens - sure
    by_length = sorted(
        prefills,
        key=lambda each: (
            -each.priority,
            each.num_uncomputed_tokens - (sure if each is first else 0),
            each.arrival,
        ),
    )
    shares[first] = sure
    for sequence in by_length:
        if left == 0:
            break
        given = shares.get(sequence, 0)
        more = min(left, sequence.num_uncomputed_tokens - given)
        if more:
            shares[sequence] = given + more
            left -= more
    return shares


def _blend(average: float, latest: float) -> float:
    return latest if average == 0 else average + _WEIGHT * (latest - average)
