"""One sequence on its way through the engine: its tokens, its blocks, its state."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass

from services.engine.core.adapters.identity import LoadedAdapter
from services.engine.core.constraints.compilation import Compilation
from services.engine.core.constraints.grammar import Matcher
from services.engine.core.errors import IntegrityError
from services.engine.core.messages import (
    MAX_INTERRUPTIONS,
    Delta,
    Finish,
    FinishReason,
    Sampling,
    SequenceRequest,
    Timing,
    TokenLogprobs,
)
from services.engine.core.stopping import StopChecker
from services.engine.core.table_shape import TableShape

# In place of a block that a sequence has given back, or never had, since it sees none of it.
NO_BLOCK = -1


class SequenceState(enum.Enum):
    """Where a sequence is. WAITING ⇄ RUNNING → FINISHED, and WAITING → FINISHED when aborted."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SavedBlocks:
    """Copies of a sequence's blocks that are kept beside the KV cache.

    Attributes:
        ticket: by which they are known there.
        num_tokens: that they hold.
    """

    ticket: int
    num_tokens: int


class Sequence:
    """One sequence, from admission to finish.

    Invariants (see `check_integrity`):
      - tokens [0, num_computed_tokens) have their K and V in the blocks of `block_table`, as far
        as tokens to come see them. It is a list of rows, one after the other, each with a block
        for each group of layers (see TableShape);
      - num_computed_tokens < len(token_ids) while the sequence lives: the token sampled last has
        been computed by no step yet;
      - the logits before a prompt token that is to be scored have not been computed, or its
        log-probability is known;
      - a RUNNING sequence owns a row and the blocks in its table; a sequence in any other state
        owns neither.
    """

    __slots__ = (
        "accepted_draft_tokens",
        "adapter",
        "admissions",
        "arrival",
        "awaits",
        "block_hashes",
        "block_table",
        "cached_prompt_tokens",
        "compilation",
        "draft_token_ids",
        "drafted_tokens",
        "finish",
        "finished_ns",
        "first_token_ns",
        "fork_of",
        "interruptions_ns",
        "matcher",
        "max_tokens",
        "num_computed_tokens",
        "num_launched_tokens",
        "num_pending_tokens",
        "num_prompt_tokens",
        "num_published_rows",
        "preemptions",
        "prefill_start_ns",
        "priority",
        "prompt_logprobs",
        "queued_ns",
        "rank",
        "request",
        "reserved_blocks",
        "retired_blocks",
        "row",
        "saved",
        "slid_ends",
        "state",
        "steps",
        "stops",
        "tenant",
        "token_ids",
    )

    def __init__(
        self,
        request: SequenceRequest,
        *,
        arrival: int,
        eos_token_ids: tuple[int, ...],
        max_tokens: int,
        queued_ns: int,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        self.request = request
        self.adapter = adapter  # that it goes through
        self.arrival = arrival
        # What is served first and preempted last: the smallest rank.
        self.rank = (-request.priority, arrival)
        self.priority = request.priority
        self.tenant = request.tenant
        self.token_ids = array("q", request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_tokens = max_tokens
        # Of the prompt's tokens from the second on, as far as they are known; None: not wanted.
        self.prompt_logprobs: list[TokenLogprobs] | None = (
            None if request.sampling.prompt_logprobs is None else []
        )
        self.num_computed_tokens = 0
        # Of steps under way, whose outputs are not there: tokens behind those that are computed
        # which they compute, and tokens that they bring.
        self.num_launched_tokens = 0
        self.num_pending_tokens = 0
        self.block_table: list[int] = []
        # Of a model with windows: blocks for rows to come, by window the first rows of the table
        # that are given back, and those blocks of them that could not be published yet.
        self.reserved_blocks: list[int] = []
        self.slid_ends: list[int] = []
        self.retired_blocks: list[tuple[int, bytes]] = []
        # Of the blocks that known tokens fill, as far as they were wanted; see PrefixCache.
        self.block_hashes: list[bytes] = []
        self.num_published_rows = 0  # the first so many of block_table can be found by hash
        # What it had computed when it was preempted, if that is kept beside the KV cache.
        self.saved: SavedBlocks | None = None
        self.cached_prompt_tokens = 0  # prompt tokens that the KV cache held on first entry
        # Guesses at what follows token_ids, to be verified in the next step it decodes in.
        self.draft_token_ids: tuple[int, ...] = ()
        # The choice of the same request that computes the prompt for both, until this one enters.
        self.fork_of: Sequence | None = None
        self.awaits: Sequence | None = None  # whose prefill it waits for beside the queue
        # The rule its output follows, if any, and what follows it: not before that is compiled.
        self.compilation: Compilation | None = None
        self.matcher: Matcher | None = None
        self.row = -1  # where the runner keeps this sequence's buffers, while RUNNING
        self.admissions = 0  # how often it has entered RUNNING
        self.preemptions = 0
        # When it was preempted, when it was resumed, and so on.
        self.interruptions_ns: list[int] = []
        self.drafted_tokens = 0  # verified so far
        self.accepted_draft_tokens = 0
        self.steps = 0
        self.state = SequenceState.WAITING
        self.stops = StopChecker(
            request.stopping, eos_token_ids=eos_token_ids, max_tokens=max_tokens
        )
        self.finish: Finish | None = None
        self.queued_ns = queued_ns
        self.prefill_start_ns = 0
        self.first_token_ns = 0
        self.finished_ns = 0

    @property
    def sequence_id(self) -> int:
        """The id its front gave it."""
        return self.request.sequence_id

    @property
    def sampling(self) -> Sampling:
        """How its next token is chosen."""
        return self.request.sampling

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_expected_tokens(self) -> int:
        """Tokens known, and those that steps under way bring."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Expected tokens that no step has put into the KV cache or is about to: 1 while decoding,
        more while prefilling."""
        expected = len(self.token_ids) + self.num_pending_tokens
        return expected - self.num_computed_tokens - self.num_launched_tokens

    @property
    def is_complete(self) -> bool:
        """Whether steps under way bring the last token that it may have."""
        num_output_tokens = self.num_expected_tokens - self.num_prompt_tokens
        return self.num_pending_tokens > 0 and num_output_tokens >= self.max_tokens

    @property
    def num_unscored_tokens(self) -> int:
        """Tokens of the prompt whose log-probabilities are wanted and not known."""
        if self.prompt_logprobs is None:
            return 0
        return self.num_prompt_tokens - 1 - len(self.prompt_logprobs)

    @property
    def held_blocks(self) -> list[int]:
        """All blocks that it holds."""
        if not self.slid_ends:
            return self.block_table
        table = [block for block in self.block_table if block != NO_BLOCK]
        return table + self.reserved_blocks

    @property
    def most_cached_tokens(self) -> int:
        """Tokens that it may have from the KV cache on entry, so that all logits that are wanted
        are computed: those before the next token, and those before tokens to be scored."""
        if self.num_unscored_tokens:
            return self.num_prompt_tokens - 1 - self.num_unscored_tokens
        return len(self.token_ids) - 1

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, however that came."""
        return self.state is SequenceState.FINISHED

    def take(self, token_id: int) -> Finish | None:
        """Append a token that was sampled; returns how the sequence ends with it, or None.

        Raises:
            ConstraintFailedError: its rule cannot be followed any further.
        """
        self.token_ids.append(token_id)
        finish = self.stops.check(self.token_ids, self.num_prompt_tokens)
        if self.matcher is None or (finish is not None and finish.reason is FinishReason.STOP):
            return finish
        self.matcher.advance(token_id)
        return Finish(FinishReason.STOP) if self.matcher.ended else finish

    def interrupt(self, at_ns: int) -> None:
        """Note that it was preempted."""
        self.preemptions += 1
        if self.preemptions <= MAX_INTERRUPTIONS:
            self.interruptions_ns.append(at_ns)

    def resume(self, at_ns: int) -> None:
        """Note that it runs again."""
        if self.preemptions <= MAX_INTERRUPTIONS:
            self.interruptions_ns.append(at_ns)

    def may_fork(self, request: SequenceRequest) -> bool:
        """Whether a sequence of `request`, arriving with this one, may share all of its prompt."""
        own = self.request
        return (
            own.prompt_token_ids == request.prompt_token_ids
            and own.priority == request.priority
            and (own.tenant, own.cache_salt) == (request.tenant, request.cache_salt)
            and own.adapter == request.adapter
        )

    def timing(self) -> Timing:
        """The timing facts so far."""
        return Timing(
            received_ns=self.request.received_ns,
            queued_ns=self.queued_ns,
            prefill_start_ns=self.prefill_start_ns,
            first_token_ns=self.first_token_ns,
            finished_ns=self.finished_ns,
            preemptions=self.preemptions,
            steps=self.steps,
            cached_prompt_tokens=self.cached_prompt_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_draft_tokens=self.accepted_draft_tokens,
            interruptions_ns=[*self.interruptions_ns],
        )

    def delta(
        self, token_ids: tuple[int, ...] = (), logprobs: tuple[TokenLogprobs, ...] = ()
    ) -> Delta:
        """What has just changed: the last of its tokens are new, or it has ended."""
        is_first = self.num_output_tokens == len(token_ids) > 0
        return Delta(
            self.sequence_id,
            list(token_ids),
            list(logprobs) or None,
            self.timing() if is_first or self.finish is not None else None,
            self.finish,
            self.prompt_logprobs if is_first else None,
        )

    def check_integrity(self, shape: TableShape) -> None:
        """Check the invariants of the class docstring.

        Raises:
            IntegrityError: one does not hold.
        """
        name = f"sequence {self.sequence_id} ({self.state.value})"
        if self.state is SequenceState.RUNNING:
            if self.row < 0:
                raise IntegrityError(f"{name} has no row")
            if not 0 <= self.num_computed_tokens < self.num_tokens:
                raise IntegrityError(
                    f"{name} computed {self.num_computed_tokens} of {self.num_tokens} tokens"
                )
            if self.num_unscored_tokens and self.num_computed_tokens > self.most_cached_tokens:
                raise IntegrityError(f"{name} has passed a prompt token without scoring it")
            self._check_table(shape)
            if self.num_published_rows * shape.block_size > self.num_computed_tokens:
                raise IntegrityError(f"{name} published a block that it has not computed")
        elif self.block_table or self.reserved_blocks or self.row >= 0 or self.num_published_rows:
            raise IntegrityError(f"{name} still owns blocks or a row")
        if (self.finish is not None) != self.is_finished:
            raise IntegrityError(f"{name} and its finish contradict each other")

    def _check_table(self, shape: TableShape) -> None:
        name, width = f"sequence {self.sequence_id}", shape.num_groups
        num_rows, rest = divmod(len(self.block_table), width)
        if rest or num_rows * shape.block_size < self.num_computed_tokens:
            raise IntegrityError(f"{name} computed more tokens than its blocks hold")
        slid = dict.fromkeys(shape.full_groups, (0, 0))
        for sliding, end in zip(shape.slidings, self.slid_ends, strict=True):
            if end > sliding.slid_end(self.num_computed_tokens):
                raise IntegrityError(f"{name} gave back blocks that it sees")
            slid |= dict.fromkeys(sliding.groups, (sliding.kept_rows, end))
        for group, (begin, end) in slid.items():
            column = self.block_table[group::width]
            given_back = column[begin:end]
            if (
                given_back != [NO_BLOCK] * (end - begin)
                or NO_BLOCK in column[:begin] + column[end:]
            ):
                raise IntegrityError(f"{name} lacks a block that it sees, or keeps one for nothing")
