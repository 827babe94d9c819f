"""Which tokens of a draft stand, given what was sampled after each of them.

At every position the target's own token is sampled with that position's own noise, and a drafted
token is accepted while it is the token that was sampled. That is the rejection sampling of
Leviathan et al. (2211.17192) for a proposal that puts all its mass on one token: a token d is
accepted with the probability p(d) that the target gives it, and what is emitted in its place
otherwise is p without d, made whole again. And because the noise of a position does not depend on
how many tokens a step verifies, the answer is the very same with and without speculation, greedy
or sampled.
"""

from __future__ import annotations

from services.engine.core.messages import TokenLogprobs
from services.engine.core.plan import SequenceOutput
from services.engine.core.sampler import SampledTokens


def num_accepted(draft: tuple[int, ...], sampled: list[int]) -> int:
    """How many tokens of `draft` were sampled in their places; `sampled` has one more."""
    for index, token_id in enumerate(draft):
        if sampled[index] != token_id:
            return index
    return len(draft)


def verify(draft: tuple[int, ...], tokens: SampledTokens, first_row: int) -> SequenceOutput:
    """What a step brings a sequence whose tokens were sampled in rows `first_row` onwards.

    A row whose logits cannot be sampled from ends what is accepted. It fails the sequence only if
    it comes first: otherwise the next step meets the same logits, with nothing lost before them.
    """
    rows = slice(first_row, first_row + len(draft) + 1)
    sampled = tokens.token_ids[rows]
    fine = next(
        (index for index, error in enumerate(tokens.errors[rows]) if error is not None),
        len(sampled),
    )
    if fine == 0:
        return SequenceOutput(error=tokens.errors[first_row])
    accepted = num_accepted(draft[:fine], sampled)
    emitted = min(accepted + 1, fine)
    logprobs: tuple[TokenLogprobs, ...] = tuple(
        entry for entry in tokens.logprobs[rows][:emitted] if entry is not None
    )
    return SequenceOutput(tuple(sampled[:emitted]), logprobs, num_accepted=accepted)
