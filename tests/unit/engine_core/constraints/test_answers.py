"""What comes out under a rule follows it, whatever else goes on in the engine."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from services.engine.core.constraints.masks import StepMasks
from services.engine.core.messages import (
    Constraint,
    Finish,
    FinishReason,
    Sampling,
    SequenceRequest,
    Stopping,
)
from services.engine.core.sequence import Sequence
from services.engine.core.speculation.speculator import Speculator, room_for_draft
from tests.fakes.json_schemas import random_schema
from tests.fakes.paged_step import libraries
from tests.fakes.spelling_llama import EOS_TOKEN_ID, spelled, tokens_of

MAX_TOKENS = 120
PROMPT = tokens_of("A record: ")
REGEXES = [
    r"[0-9]{3}-[0-9]{4}",
    r"(?:yes|no|maybe not)",
    r"[a-z]+@[a-z]{2,8}\.(com|org)",
    r"(ab|xy){2,5}",
    r"\d{1,3}(\.\d{1,3}){3}",
    r"né+ ?[^a-zA-Z\\]{0,4}",
    r"日本|[A-Z]{2,}-\d",
    r"a/b|\{\"a\"\}",
]
CHOICES = ["red", "green", "green-blue", 'a "quoted"\nline', "é\\n", "{}"]
# Dyck words: what no regular expression describes.
EBNF = 'root ::= pair | pair root\npair ::= "(" root? ")" | "[" root? "]"'

BACKENDS: dict[str, dict[str, Any]] = {
    "torch": {"cpu_kernels": "off"},
    "native": {},
    "planned ahead": {"plan_ahead": "on"},
    "overlapping": {"overlaps": True},
}
if not libraries():
    del BACKENDS["native"]

Answers = dict[int, tuple[list[int], Finish]]
Build = Callable[..., Any]


def rules(seed: int) -> list[Constraint]:
    chance = random.Random(seed)
    made = [
        Constraint("json_schema", json.dumps(random_schema(chance), ensure_ascii=False))
        for _ in range(24)
    ]
    made += [Constraint("regex", regex) for regex in REGEXES]
    made.append(Constraint("choice", json.dumps(CHOICES)))
    made.append(Constraint("grammar", EBNF))
    chance.shuffle(made)
    return made


def request(number: int, rule: Constraint | None, **fields: Any) -> SequenceRequest:
    """Every other one is sampled, and each has penalties, bars and reports of its own."""
    chance = random.Random(number)
    sampling = Sampling(
        temperature=chance.choice([0.0, 0.8, 1.5]),
        top_p=chance.choice([1.0, 0.95]),
        seed=number,
        presence_penalty=chance.choice([0.0, 0.7]),
        logprobs=chance.choice([None, 2]),
    )
    stopping = Stopping(
        max_tokens=MAX_TOKENS,
        min_tokens=chance.choice([0, 3]),
        ignore_eos=chance.choice([False, False, True]),
    )
    return SequenceRequest(number, PROMPT, sampling, stopping, constraint=rule, **fields)


def answers(core: Any, requests: list[SequenceRequest], *, at_once: int = 1000) -> Answers:
    """What each request is answered; they arrive in groups of `at_once`, a few steps apart."""
    tokens: dict[int, list[int]] = {each.sequence_id: [] for each in requests}
    ends: dict[int, Finish] = {}
    left = [*requests]
    while left or core.has_work:
        core.add(left[:at_once])
        del left[:at_once]
        for _ in range(3):
            if not core.has_work:
                break
            for delta in core.step().deltas:
                tokens[delta.sequence_id] += delta.token_ids
                if delta.finish is not None:
                    ends[delta.sequence_id] = delta.finish
        core.check_integrity()
    return {number: (tokens[number], ends[number]) for number in tokens}


def check(rule: Constraint, tokens: list[int], finish: Finish) -> bool:
    """Asserts that an answer is right; returns whether it came to its end."""
    assert finish.reason in (FinishReason.STOP, FinishReason.LENGTH), finish
    if finish.reason is FinishReason.LENGTH:
        assert len(tokens) == MAX_TOKENS
        return False
    text = spelled(tokens).decode()
    match rule.kind:
        case "json_schema":
            schema = json.loads(rule.text)
            jsonschema.validate(
                json.loads(text),
                schema,
                jsonschema.Draft202012Validator,
                format_checker=jsonschema.FormatChecker(),
            )
        case "regex":
            assert re.fullmatch(rule.text, text), (rule.text, text)
        case "choice":
            assert text in json.loads(rule.text)
        case "grammar":
            while text != (shorter := text.replace("()", "").replace("[]", "")):
                text = shorter
            assert text == ""
    return True


@pytest.mark.parametrize("fields", BACKENDS.values(), ids=BACKENDS.keys())
def test_every_answer_follows_its_rule_in_a_batch_with_others(
    engine: Build, fields: dict[str, Any]
) -> None:
    made = [request(number, rule) for number, rule in enumerate(rules(seed=1))]
    free = [request(number, None) for number in range(100, 108)]

    found = answers(engine(**fields), made + free, at_once=7)

    ended = sum(check(each.constraint, *found[each.sequence_id]) for each in made)
    assert ended > len(made) * 0.7  # a random model does not end every string it begins
    unmixed = answers(engine(**fields), free)
    assert {each.sequence_id: found[each.sequence_id] for each in free} == unmixed


class HalfRight(Speculator):
    """Drafts what the sequence has said in an earlier run, with a wrong token here and there."""

    def __init__(self, said: Answers) -> None:
        super().__init__()
        self._said = said
        self._chance = random.Random(0)

    def propose(self, sequences: list[Sequence], max_tokens: int) -> list[tuple[int, ...]]:
        drafts = []
        for sequence in sequences:
            length = min(self._chance.randint(0, 5), room_for_draft(sequence), max_tokens)
            start = sequence.num_output_tokens
            ahead = self._said[sequence.sequence_id][0][start : start + length]
            if ahead and self._chance.random() < 0.3:
                ahead[self._chance.randrange(len(ahead))] = self._chance.choice(PROMPT)
            max_tokens -= len(ahead)
            drafts.append(tuple(ahead))
        return drafts

    def awaits(self, sequences: list[Sequence]) -> bool:
        return self._chance.random() < 0.8

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize("fields", BACKENDS.values(), ids=BACKENDS.keys())
def test_choices_guesses_and_preemption_all_at_once_change_nothing(
    engine: Build, fields: dict[str, Any]
) -> None:
    """Three choices of a request share its prompt, guesses at their tokens are verified, and the
    cache is too small for all who run."""
    made = []
    for number, rule in enumerate(rules(seed=2)[:12]):
        rule = None if number % 4 == 3 else rule
        made += [choice_of(request(10 * number, rule), choice_index=index) for index in range(3)]
    plain = answers(engine(speculation="off", **fields), made)
    core = engine(num_blocks=40, speculation="off", **fields)
    core._scheduler._speculator = HalfRight(plain)

    found = answers(core, made, at_once=9)

    assert found == plain
    for each in made:
        if each.constraint is not None:
            check(each.constraint, *found[each.sequence_id])
    load = core.load()
    assert load.preemptions > 0
    assert load.accepted_draft_tokens > 100
    assert load.drafted_tokens > load.accepted_draft_tokens


def test_masks_are_filled_while_the_step_computes_whose_logits_they_are_for(
    engine: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device: once the tokens before are known, and not before the model has been launched."""
    core = engine(overlaps=True, speculation="off")
    runner = core._overlapping._runner
    entries: list[str] = []

    def noting(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            entries.append(name)
            return inner(*args)

        return call

    monkeypatch.setattr(runner, "_model", noting("model", runner._model))
    monkeypatch.setattr(runner, "finish", noting("finish", runner.finish))
    monkeypatch.setattr(StepMasks, "fill", noting("masks", StepMasks.fill))
    rule = Constraint("regex", "[a-z]{4}")
    made = SequenceRequest(1, PROMPT, Sampling(), Stopping(max_tokens=9), constraint=rule)
    tokens, _ = answers(core, [made])[1]
    assert len(tokens) >= 4
    assert entries[:8] == ["model", "masks", "model", "finish", "masks", "model", "finish", "masks"]


def choice_of(made: SequenceRequest, choice_index: int) -> SequenceRequest:
    return request(made.sequence_id + choice_index, made.constraint, choice_index=choice_index)


def test_the_same_seed_gives_the_same_answer_and_rules_are_compiled_once(engine: Build) -> None:
    core = engine()
    made = [request(number, Constraint("regex", "[a-z]{5,20}")) for number in range(8)]
    first = answers(core, made)
    assert answers(core, made, at_once=3) == first
    assert len({tuple(tokens) for tokens, _ in first.values()}) > 3
    counts = core._scheduler._compiler.counts
    assert (counts.compiled, counts.found) == (1, 15)


def test_the_end_of_sequence_is_chosen_only_where_the_rule_may_end(engine: Build) -> None:
    sampling = Sampling(logit_bias={EOS_TOKEN_ID: 100.0})
    core = engine()
    for regex, text in (("ab+c", None), ("[ab]{4}[cd]*", None), ("(ab)?", "")):
        made = SequenceRequest(
            1, PROMPT, sampling, Stopping(max_tokens=50), constraint=Constraint("regex", regex)
        )
        tokens, finish = answers(core, [made])[1]
        said = spelled(tokens).decode()
        assert finish.reason is FinishReason.STOP
        assert re.fullmatch(regex, said)
        assert text is None or said == text
    # Once it may end, it does: the rule's shortest texts.
    assert len(said) == 0


def test_a_completion_that_can_only_end_takes_no_further_step(engine: Build) -> None:
    made = SequenceRequest(
        1, PROMPT, Sampling(), Stopping(max_tokens=3), constraint=Constraint("choice", '["+++"]')
    )
    tokens, finish = answers(engine(), [made])[1]
    assert spelled(tokens) == b"+++"
    # Not LENGTH, although that was reached as well, and without an end-of-sequence token.
    assert finish == Finish(FinishReason.STOP)
    assert EOS_TOKEN_ID not in tokens


def test_a_rule_that_is_not_valid_ends_its_request_and_no_other(engine: Build) -> None:
    core = engine()
    made = [
        request(1, Constraint("regex", "(")),
        request(2, Constraint("regex", "[a-z]{3}")),
        request(3, None),
    ]
    found = answers(core, made)
    assert found[1][1].reason is FinishReason.ERROR
    assert found[1][1].error_kind == "InvalidConstraintError"
    assert "unclosed group" in found[1][1].error
    assert check(made[1].constraint, *found[2])
    assert found[3][0]


def test_a_request_can_be_aborted_while_its_rule_is_compiled(engine: Build) -> None:
    core = engine()
    slow = json.dumps({"enum": [f"value {number}" for number in range(20_000)]})
    core.add([request(1, Constraint("json_schema", slow))])
    core.check_integrity()
    assert core.load().waiting_sequences == 1
    assert core.due_in_s > 0
    (delta,) = core.abort([1])
    assert delta.finish is not None
    assert delta.finish.reason is FinishReason.ABORTED
    assert not core.has_work
    assert core.due_in_s is None
