"""While a device computes a step, the next is launched behind it: the answers are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from services.engine.core import device_runner, device_sampling, logit_edits
from services.engine.core.batch import CapturedShape
from services.engine.core.device_runner import DeviceRunner, LaunchedStep
from services.engine.core.engine import EngineCore
from services.engine.core.errors import FatalEngineError
from services.engine.core.messages import FinishReason, Sampling, SequenceRequest, Stopping
from services.engine.core.plan import Plan, StepOutputs
from services.engine.core.preparation import LatestTokens
from services.engine.core.sequence import Sequence
from services.engine.core.speculation.speculator import NgramSpeculator, Speculator
from tests.fakes.engines import make_engine, reference_output
from tests.fakes.hash_model import NAN_TOKEN_ID, RAISING_TOKEN_ID
from tests.fakes.speculators import HalfRightSpeculator

CONTEXT_TOKENS = 96
# What a runner does about three tokens of one sequence.
OVERLAPPED = [
    ("launch", 1), ("choose", 1), ("launch", 2), ("choose", 2), ("finish", 1),
    ("launch", 3), ("choose", 3), ("finish", 2),
    ("finish", 3),
]  # fmt: skip
SHAPES = (CapturedShape(2, 1), CapturedShape(4, 1), CapturedShape(12, 4))


def overlapping(**limits: Any) -> EngineCore:
    limits.setdefault("num_blocks", 24)
    return make_engine(overlaps=True, **limits)


def request(sequence_id: int, max_tokens: int = 10, **sampling: Any) -> SequenceRequest:
    stopping = Stopping(max_tokens=max_tokens, ignore_eos=True)
    return SequenceRequest(sequence_id, [1, 2, sequence_id], Sampling(**sampling), stopping)


class Journal:
    """What a runner was told to do, in order."""

    def __init__(self, engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: list[tuple[str, int]] = []
        assert engine._overlapping is not None
        self.runner = runner = engine._overlapping._runner
        launch, finish, choose = runner.launch, runner.finish, runner.choose

        def launching(plan: Plan, behind: LaunchedStep | None) -> LaunchedStep:
            self.entries.append(("launch", plan.step))
            return launch(plan, behind)

        def finishing(launched: LaunchedStep) -> StepOutputs:
            self.entries.append(("finish", launched.plan.step))
            return finish(launched)

        def choosing(launched: LaunchedStep, latest: LatestTokens | None = None) -> None:
            if launched.logits is not None:
                self.entries.append(("choose", launched.plan.step))
            choose(launched, latest)

        monkeypatch.setattr(runner, "launch", launching)
        monkeypatch.setattr(runner, "finish", finishing)
        monkeypatch.setattr(runner, "choose", choosing)


def run(engine: EngineCore) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}
    for _ in range(1000):
        if not engine.has_work:
            return answers
        for delta in engine.step().deltas:
            answers.setdefault(delta.sequence_id, []).extend(delta.token_ids)
        engine.check_integrity()
    raise AssertionError("it does not come to an end")


def test_a_step_is_launched_before_the_one_before_it_is_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = overlapping()
    journal = Journal(engine, monkeypatch)
    engine.add([request(0, max_tokens=4)])
    run(engine)
    # Nothing is launched behind the last: it is known to be that.
    assert journal.entries == [
        ("launch", 1), ("choose", 1), ("launch", 2), ("choose", 2), ("finish", 1),
        ("launch", 3), ("choose", 3), ("finish", 2),
        ("launch", 4), ("choose", 4), ("finish", 3),
        ("finish", 4),
    ]  # fmt: skip


# Of the two likeliest tokens neither is said twice, if it is counted.
BIAS = {5: 60.0, 6: 58.0}
EDITS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 30.0, "logit_bias": BIAS},
    "frequency": {"frequency_penalty": 30.0, "logit_bias": BIAS},
    "repetition": {"repetition_penalty": 1.7, "allowed_token_ids": (5, 6)},
    "bias": {"logit_bias": {5: 3.0}},
    "allowed": {"allowed_token_ids": (3, 4, 5, 6, 7)},
    "banned": {"banned_token_ids": (3, 4, 5, 6, 7)},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_what_a_device_counts_and_what_hangs_on_no_token_holds_nothing_up(
    edit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(0, max_tokens=3, temperature=0.0, **edit)]
    engine = overlapping(samples_there=True)
    journal = Journal(engine, monkeypatch)
    engine.add(requests)
    answers = run(engine)
    assert journal.entries == OVERLAPPED
    plain = make_engine(num_blocks=24)
    plain.add(requests)
    assert answers == run(plain)


def test_how_many_tokens_there_will_be_is_known_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = Stopping(max_tokens=3, min_tokens=2, stop_token_ids=(*range(3, 40),))
    long = SequenceRequest(0, [1, 2, 0], Sampling(temperature=0.0), stopping)
    engine = overlapping()
    journal = Journal(engine, monkeypatch)
    engine.add([long])
    answers = run(engine)
    assert answers[0] == reference_output(long, CONTEXT_TOKENS)
    assert journal.entries[: len(OVERLAPPED) - 1] == OVERLAPPED[:-1]


def test_what_a_processor_makes_of_the_text_is_chosen_once_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edit = {"presence_penalty": 1.0, "logits_processors": (("any", "{}"),)}
    monkeypatch.setattr(
        logit_edits, "process", lambda calls, prompt, output, logits: logits.roll(sum(output) % 7)
    )
    engine, plain = overlapping(samples_there=True), make_engine(num_blocks=24)
    journal = Journal(engine, monkeypatch)
    for each in (engine, plain):
        each.add([request(0, max_tokens=3, **edit)])
    assert run(engine) == run(plain)
    assert journal.entries == [
        ("launch", 1), ("choose", 1), ("launch", 2), ("finish", 1), ("choose", 2),
        ("launch", 3), ("finish", 2), ("choose", 3),
        ("finish", 3),
    ]  # fmt: skip


def test_counts_that_the_host_keeps_are_those_of_all_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_runner, "MOST_DISTINCT", 4)
    monkeypatch.setattr(device_sampling, "MOST_DISTINCT", 4)
    requests = [request(0, presence_penalty=2.0), request(1, temperature=0.0)]
    engine, plain = overlapping(samples_there=True), make_engine(num_blocks=24)
    journal = Journal(engine, monkeypatch)
    for each in (engine, plain):
        each.add(requests)
    assert run(engine) == run(plain)
    order = journal.entries
    # Three tokens of the prompt and one said; then two.
    assert order.index(("choose", 2)) < order.index(("finish", 1))
    assert order.index(("choose", 6)) > order.index(("finish", 5))


def test_chunks_of_a_prompt_and_arrivals_are_launched_ahead_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = overlapping(max_batch_tokens=8)
    journal = Journal(engine, monkeypatch)
    stopping = Stopping(max_tokens=2, ignore_eos=True)
    long = SequenceRequest(0, [*range(20)], stopping=stopping)
    engine.add([long])
    engine.step()
    engine.add([late := request(1)])
    answers = run(engine)
    assert answers[0] == reference_output(long, CONTEXT_TOKENS)
    assert answers[1] == reference_output(late, CONTEXT_TOKENS)
    finished = [entry for entry in journal.entries if entry[0] == "finish"]
    for number in range(2, len(finished)):
        order = journal.entries
        assert order.index(("launch", number)) < order.index(("finish", number - 1))


@pytest.mark.parametrize("shapes", [(), SHAPES], ids=["as it is", "padded"])
@pytest.mark.parametrize(
    "make_speculator", [lambda: None, NgramSpeculator, lambda: HalfRightSpeculator(96, seed=1)]
)
def test_answers_are_the_same(
    make_speculator: Callable[[], Speculator | None], shapes: tuple[CapturedShape, ...]
) -> None:
    requests = [
        SequenceRequest(
            index,
            [1, 2, 3, index, NAN_TOKEN_ID if index == 4 else 9],
            Sampling(
                temperature=index % 2,
                seed=index,
                presence_penalty=1.0 if index == 5 else 0.0,
                logprobs=2 if index == 6 else None,
                prompt_logprobs=1 if index == 3 else None,
            ),
            Stopping(max_tokens=5 + 3 * index, min_tokens=index % 3, ignore_eos=index != 2),
        )
        for index in range(7)
    ]

    def answers(**how: Any) -> dict[int, list[int]]:
        engine = make_engine(num_blocks=24, speculator=make_speculator(), **how)
        engine.add(requests)
        return run(engine)

    assert answers(overlaps=True, captured_shapes=shapes) == answers()


class DraftsWhen(HalfRightSpeculator):
    """Awaits the outputs of steps when it is told to."""

    def __init__(self) -> None:
        super().__init__(CONTEXT_TOKENS, seed=3)
        self.wanted = False

    def propose(self, sequences: list[Sequence], max_tokens: int) -> list[tuple[int, ...]]:
        drafts = super().propose(sequences, max_tokens) if self.wanted else []
        return drafts or [()] * len(sequences)

    def awaits(self, sequences: list[Sequence]) -> bool:
        return self.wanted


def test_steps_are_launched_ahead_as_long_as_nothing_is_to_be_drafted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speculator = DraftsWhen()
    engine = overlapping(speculator=speculator)
    journal = Journal(engine, monkeypatch)
    each = request(0, max_tokens=30)
    engine.add([each])
    answer = [token for _ in range(4) for token in engine.step().deltas[0].token_ids]
    order = journal.entries
    assert order.index(("launch", 4)) < order.index(("finish", 3))
    speculator.wanted = True
    while engine.load().drafted_tokens == 0:
        answer += [token for delta in engine.step().deltas for token in delta.token_ids]
    # Where there are drafts, how many of them stand is known before the next step is planned.
    verifying = engine.load().steps
    assert order.index(("finish", verifying - 1)) < order.index(("launch", verifying))
    assert order[-1] == ("finish", verifying)
    answer += run(engine)[0]
    assert answer == reference_output(each, CONTEXT_TOKENS)


def test_who_is_aborted_while_others_have_drafts_leaves_nothing_behind() -> None:
    speculator = HalfRightSpeculator(CONTEXT_TOKENS, seed=4)
    engine = overlapping(speculator=speculator, num_blocks=80)
    requests = [request(index, max_tokens=60) for index in range(4)]
    engine.add(requests)
    answers: dict[int, list[int]] = {index: [] for index in range(4)}
    for leaving in (3, 2, 1):
        for _ in range(3):
            for delta in engine.step().deltas:
                answers[delta.sequence_id] += delta.token_ids
        engine.abort([leaving])
        engine.check_integrity()
    answers[0] += run(engine)[0]
    assert engine.load().drafted_tokens > 0
    for each in requests:
        said = answers[each.sequence_id]
        assert reference_output(each, CONTEXT_TOKENS)[: len(said)] == said
    assert len(answers[0]) == 60
    assert engine.load().used_blocks == 0
    assert not speculator.tracked


def test_steps_that_are_graphs_are_launched_ahead_like_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = [request(0, 12, temperature=0.0), request(1, seed=4), request(2)]
    engine, plain = overlapping(samples_there=True, captured_shapes=SHAPES), make_engine()
    journal = Journal(engine, monkeypatch)
    for each in (engine, plain):
        each.add(requests)
    assert run(engine) == run(plain)
    order = journal.entries
    # Graphs choose; nothing else is told to.
    assert not [entry for entry in order if entry[0] == "choose"]
    for number in range(2, 12):
        assert order.index(("launch", number)) < order.index(("finish", number - 1))


def test_beams_are_the_same() -> None:
    def beams(*, overlaps: bool) -> dict[int, list[int]]:
        engine = make_engine(num_blocks=64, overlaps=overlaps)
        engine.add([request(0, beam_width=3)])
        return run(engine)

    assert beams(overlaps=True) == beams(overlaps=False)


def test_who_is_aborted_in_the_middle_of_a_step_leaves_nothing_behind() -> None:
    engine = overlapping()
    engine.add([request(0), request(1)])
    engine.step()
    engine.step()
    (delta,) = engine.abort([0])
    assert delta.finish is not None
    assert delta.finish.reason is FinishReason.ABORTED
    engine.check_integrity()
    answers = run(engine)
    assert 0 not in answers
    engine.add([request(2)])
    assert run(engine)[2] == reference_output(request(2), CONTEXT_TOKENS)
    assert engine.load().used_blocks == 0


def test_a_step_that_nobody_awaits_any_more_is_forgotten() -> None:
    engine = overlapping()
    engine.add([request(0)])
    engine.step()
    engine.step()
    engine.abort([0])
    assert not engine.has_work
    engine.add([request(1)])
    assert run(engine)[1] == reference_output(request(1), CONTEXT_TOKENS)


def test_an_arrival_whose_step_cannot_be_launched_fails_alone() -> None:
    engine = overlapping()
    engine.add([request(0, max_tokens=20)])
    answers = [token for _ in range(2) for token in engine.step().deltas[0].token_ids]
    poisoned = SequenceRequest(1, [5, RAISING_TOKEN_ID])
    engine.add([poisoned])
    while engine.has_work:
        for delta in engine.step().deltas:
            if delta.sequence_id == 0:
                answers += delta.token_ids
            else:
                assert delta.finish is not None
                assert delta.finish.error_kind == "RuntimeError"
        engine.check_integrity()
    assert answers == reference_output(request(0, max_tokens=20), CONTEXT_TOKENS)
    assert engine.load().failed_sequences == 1


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("call", ["launch", "choose", "finish"])
def test_a_step_that_fails_for_no_sequences_sake_is_computed_again(
    call: str, drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = overlapping(speculator=HalfRightSpeculator(CONTEXT_TOKENS, seed=2) if drafts else None)
    requests = [request(0, presence_penalty=0.5), request(1, temperature=1.0, seed=3)]
    engine.add(requests)
    done = [engine.step(), engine.step()]
    runner = engine._overlapping._runner  # type: ignore[union-attr]
    inner, failed = getattr(runner, call), []

    def failing_once(step: Plan | LaunchedStep, *args: Any) -> Any:
        plan = step if isinstance(step, Plan) else step.plan
        if not failed and (not drafts or plan.num_tokens > len(plan.sequences)):
            failed.append(plan)
            raise RuntimeError("a moment of weakness")
        return inner(step, *args)

    monkeypatch.setattr(runner, call, failing_once)
    answers = run(engine)
    for step in reversed(done):
        for delta in reversed(step.deltas):
            answers[delta.sequence_id] = [*delta.token_ids, *answers[delta.sequence_id]]
    assert answers[1] == reference_output(requests[1], CONTEXT_TOKENS)
    plain = make_engine(num_blocks=24)
    plain.add(requests)
    assert answers == run(plain)
    assert failed
    assert engine.load().failed_sequences == 0


def test_a_broken_device_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = overlapping()
    engine.add([request(0)])
    engine.step()

    def broken(self: DeviceRunner, launched: LaunchedStep) -> StepOutputs:
        raise FatalEngineError("the device is gone")

    monkeypatch.setattr(DeviceRunner, "finish", broken)
    with pytest.raises(FatalEngineError, match="the device is gone"):
        engine.step()


def test_where_somebody_has_to_go_the_outputs_are_awaited() -> None:
    engine = overlapping(num_blocks=5)
    requests = [request(0), request(1), request(2)]
    engine.add(requests)
    answers = run(engine)
    assert engine.load().preemptions > 0
    for each in requests:
        assert answers[each.sequence_id] == reference_output(each, 20)


def test_a_higher_priority_does_not_wait_for_room_for_ever() -> None:
    engine = overlapping(num_blocks=8, max_running_sequences=1)
    engine.add([request(0, max_tokens=24)])
    engine.step()
    urgent = SequenceRequest(1, [7], stopping=Stopping(max_tokens=2), priority=1)
    engine.add([urgent])
    finished: list[int] = []
    while engine.has_work:
        finished += [each.sequence_id for each in engine.step().deltas if each.finish]
    assert finished == [1, 0]
