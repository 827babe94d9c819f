"""A draft stands as far as it is what was sampled."""

from __future__ import annotations

from services.engine.core.messages import TokenLogprobs
from services.engine.core.plan import SequenceOutput
from services.engine.core.sampler import LogitsError, SampledTokens
from services.engine.core.speculation.verification import verify


def sampled(*token_ids: int, broken: int | None = None) -> SampledTokens:
    """Rows 1 onwards are the sequence's; row 0 is another's, and broken."""
    errors: list[LogitsError | None] = [LogitsError("other")] + [None] * len(token_ids)
    if broken is not None:
        errors[broken + 1] = LogitsError("broken")
    logprobs = [TokenLogprobs(-float(token)) for token in (0, *token_ids)]
    return SampledTokens([0, *token_ids], list(logprobs), errors)


def test_tokens_up_to_the_first_that_differs_are_taken_and_the_sampled_one_in_its_place() -> None:
    output = verify((4, 5, 6), sampled(4, 5, 9, 7), 1)
    assert output.token_ids == (4, 5, 9)
    assert output.num_accepted == 2
    assert [entry.logprob for entry in output.logprobs] == [-4.0, -5.0, -9.0]


def test_a_draft_that_is_right_throughout_brings_one_token_more() -> None:
    output = verify((4, 5), sampled(4, 5, 6), 1)
    assert (output.token_ids, output.num_accepted) == ((4, 5, 6), 2)


def test_a_draft_that_is_wrong_at_once_costs_nothing_but_its_computation() -> None:
    output = verify((4, 5), sampled(1, 5, 6), 1)
    assert (output.token_ids, output.num_accepted) == ((1,), 0)


def test_broken_logits_fail_the_sequence_only_once_they_come_first() -> None:
    late = verify((4, 5), sampled(4, 5, 6, broken=1), 1)
    assert (late.token_ids, late.error) == ((4,), None)
    first = verify((4, 5), sampled(4, 5, 6, broken=0), 1)
    assert isinstance(first, SequenceOutput)
    assert isinstance(first.error, LogitsError)
    beyond = verify((4, 5), sampled(4, 9, 6, broken=2), 1)
    assert (beyond.token_ids, beyond.error) == ((4, 9), None)
