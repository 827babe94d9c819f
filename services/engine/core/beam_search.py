"""Beam search: the likeliest completions that are found by following several at a time.

Every step of a search is a round of sequences, one after each beam, which compute how likely each
next token is. They are sequences like all others: they wait, are preempted and share blocks with
one another through the prefix cache.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from services.engine.core.clock import now_ns
from services.engine.core.errors import NeverFitsError, QueueFullError
from services.engine.core.messages import (
    Delta,
    Finish,
    FinishReason,
    Sampling,
    SequenceRequest,
    Stopping,
    Timing,
    TokenLogprobs,
)
from services.engine.core.scheduler import Scheduler
from services.engine.core.stopping import StopChecker


@dataclass(frozen=True, slots=True)
class _Beam:
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    score: float = 0.0  # the log-probability of all its tokens; of a finished one, penalised
    finish: Finish | None = None


class BeamSearch:
    """One search. Its answers are what `transformers` gives for the same `num_beams`,
    `length_penalty` and `early_stopping`."""

    def __init__(
        self, requests: list[SequenceRequest], eos_token_ids: tuple[int, ...], max_tokens: int
    ) -> None:
        """requests: one for each completion that is returned, best first."""
        self.requests = requests
        self._request = request = requests[0]
        sampling, stopping = request.sampling, request.stopping
        self._width = sampling.beam_width
        self._max_tokens = max_tokens
        self._stops = StopChecker(stopping, eos_token_ids=eos_token_ids, max_tokens=max_tokens)
        ends = {*stopping.stop_token_ids, *(() if stopping.ignore_eos else eos_token_ids)}
        # So many that `width` are left to go on with, should all others be ends.
        self._num_candidates = max(2, 1 + len(ends)) * self._width
        self._running = [_Beam()]
        self._finished: list[_Beam] = []  # best first

    def round(self, ids: Iterator[int]) -> list[SequenceRequest]:
        """What is to be computed next, in the order of the beams."""
        sampling = Sampling(temperature=0.0, logprobs=self._num_candidates)
        return [
            msgspec.structs.replace(
                self._request,
                sequence_id=next(ids),
                prompt_token_ids=[*self._request.prompt_token_ids, *beam.token_ids],
                sampling=sampling,
                stopping=Stopping(max_tokens=1, ignore_eos=True),
            )
            for beam in self._running
        ]

    def advance(self, following: list[TokenLogprobs]) -> bool:
        """Take in what may follow each beam; returns whether the search goes on."""
        best = heapq.nlargest(
            self._num_candidates,
            (
                (beam.score + logprob, -index, -rank)
                for index, (beam, entry) in enumerate(zip(self._running, following, strict=True))
                for rank, logprob in enumerate(entry.top_logprobs)
                if self._may_follow(beam, entry.top_token_ids[rank])
            ),
        )
        candidates = [
            self._extended(self._running[-index], following[-index], -rank, score)
            for score, index, rank in best
        ]
        ended = [beam for beam in candidates[: self._width] if beam.finish is not None]
        self._finished += map(self._penalised, ended)
        self._finished = sorted(self._finished, key=lambda beam: -beam.score)[: self._width]
        self._running = [beam for beam in candidates if beam.finish is None][: self._width]
        return bool(self._running) and self._may_improve()

    def answers(self) -> list[_Beam]:
        """The completions to return, best first."""
        return self._finished[: len(self.requests)]

    def _may_follow(self, beam: _Beam, token_id: int) -> bool:
        return token_id not in self._stops.barred_token_ids(len(beam.token_ids))

    def _extended(self, beam: _Beam, entry: TokenLogprobs, rank: int, score: float) -> _Beam:
        token_ids = (*beam.token_ids, entry.top_token_ids[rank])
        wanted = self._request.sampling.logprobs
        logprobs = beam.logprobs
        if wanted is not None:
            own = TokenLogprobs(
                entry.top_logprobs[rank], entry.top_token_ids[:wanted], entry.top_logprobs[:wanted]
            )
            logprobs = (*logprobs, own)
        finish = self._stops.check(array("q", token_ids), 0)
        return _Beam(token_ids, logprobs, score, finish)

    def _penalised(self, beam: _Beam) -> _Beam:
        score = beam.score / len(beam.token_ids) ** self._request.sampling.length_penalty
        return _Beam(beam.token_ids, beam.logprobs, score, beam.finish)

    def _may_improve(self) -> bool:
        if len(self._finished) < self._width:
            return True
        if self._request.sampling.early_stopping:
            return False
        # As if it ended here: where longer ones are favoured this is a guess.
        length = len(self._running[0].token_ids)
        best: float = self._running[0].score / length**self._request.sampling.length_penalty
        return best > self._finished[-1].score


class _Search:
    """A search and what is known of its round."""

    def __init__(self, search: BeamSearch, queued_ns: int) -> None:
        self.search = search
        self.live = {request.sequence_id for request in search.requests}
        self.round: list[SequenceRequest] = []
        self.following: dict[int, TokenLogprobs] = {}
        self.queued_ns = queued_ns
        self.first: Timing | None = None
        self.steps = 0
        self.preemptions = 0


class BeamSearches:
    """The searches under way in a scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._ids = iter(range(-1, -(2**62), -1))  # those of the front are not negative
        self._searches: list[_Search] = []
        self._by_sequence: dict[int, _Search] = {}
        self._to_add: list[_Search] = []  # whose rounds the queue had no room for

    def __len__(self) -> int:
        return len(self._searches)

    def uses(self, adapter: str) -> bool:
        """Whether a search goes through an adapter."""
        return any(each.search.requests[0].adapter == adapter for each in self._searches)

    def add(self, requests: list[SequenceRequest]) -> None:
        """Begin a search. Raises AdmissionError as the scheduler does."""
        scheduler = self._scheduler
        max_tokens = scheduler.limits.max_output_tokens(requests[0])
        if requests[0].sampling.beam_width > scheduler.max_waiting_sequences:
            raise NeverFitsError("more beams than sequences may wait")
        search = _Search(BeamSearch(requests, scheduler.eos_token_ids, max_tokens), now_ns())
        self._begin_round(search)
        self._searches.append(search)

    def abort(self, sequence_ids: list[int]) -> list[Delta]:
        """End completions of searches; a search ends with the last of them."""
        deltas: list[Delta] = []
        for search in tuple(self._searches):
            ended = search.live.intersection(sequence_ids)
            search.live -= ended
            deltas += self._ends(search, ended, Finish(FinishReason.ABORTED))
            if not search.live:
                self._forget(search)
        return deltas

    def take(self, deltas: list[Delta]) -> list[Delta]:
        """Of what a step brought, what is to be said; begins the rounds that follow."""
        said: list[Delta] = []
        for delta in deltas:
            search = self._by_sequence.pop(delta.sequence_id, None)
            if search is None:
                said.append(delta)
            else:
                said += self._take(search, delta)
        waiting, self._to_add = self._to_add, []
        for search in waiting:
            self._begin_round(search, continuing=True)
        return said

    def _take(self, search: _Search, delta: Delta) -> list[Delta]:
        assert delta.timing is not None, "a sequence of one token ends at once"
        assert delta.finish is not None, "a sequence of one token ends at once"
        search.first = search.first or delta.timing
        search.steps += delta.timing.steps
        search.preemptions += delta.timing.preemptions
        if delta.finish.reason is FinishReason.ERROR:
            live, search.live = search.live, set()
            self._forget(search)
            return self._ends(search, live, delta.finish)
        assert delta.logprobs is not None, "log-probabilities were asked for"
        search.following[delta.sequence_id] = delta.logprobs[0]
        if len(search.following) < len(search.round):
            return []
        following = [search.following[each.sequence_id] for each in search.round]
        if search.search.advance(following):
            self._to_add.append(search)
            return []
        self._forget(search)
        said: list[Delta] = []
        for request, beam in zip(search.search.requests, search.search.answers(), strict=True):
            if request.sequence_id in search.live:
                timing = self._timing(search)
                said.append(
                    Delta(
                        request.sequence_id,
                        list(beam.token_ids),
                        list(beam.logprobs) or None,
                        timing,
                        beam.finish,
                    )
                )
        return said

    def _begin_round(self, search: _Search, *, continuing: bool = False) -> None:
        requests = search.search.round(self._ids)
        try:
            self._scheduler.add(requests, continuing=continuing)
        except QueueFullError:
            if not continuing:
                raise
            self._to_add.append(search)
            return
        search.round, search.following = requests, {}
        self._by_sequence |= dict.fromkeys((each.sequence_id for each in requests), search)

    def _forget(self, search: _Search) -> None:
        self._searches.remove(search)
        for request in search.round:
            if self._by_sequence.pop(request.sequence_id, None) is not None:
                self._scheduler.abort(request.sequence_id)
        if search in self._to_add:
            self._to_add.remove(search)

    def _ends(self, search: _Search, sequence_ids: set[int], finish: Finish) -> list[Delta]:
        timing = self._timing(search)
        return [Delta(each, [], None, timing, finish) for each in sorted(sequence_ids)]

    def _timing(self, search: _Search) -> Timing:
        first = search.first
        return Timing(
            received_ns=search.search.requests[0].received_ns,
            queued_ns=search.queued_ns,
            prefill_start_ns=0 if first is None else first.prefill_start_ns,
            first_token_ns=0 if first is None else first.first_token_ns,
            finished_ns=now_ns(),
            preemptions=search.preemptions,
            steps=search.steps,
            cached_prompt_tokens=0 if first is None else first.cached_prompt_tokens,
        )
