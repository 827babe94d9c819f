"""A device and a host whose times are made up: steps overlap, and their tokens are written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.engine.core.constraints.masks import MaskCounts
from services.engine.core.fault_isolation import IsolatingRunner
from services.engine.core.messages import SequenceRequest, Stopping
from services.engine.core.overlap import OverlappingSteps
from services.engine.core.plan import Plan, SequenceOutput, StepOutputs
from services.engine.core.sampler import SampledTokens
from services.engine.core.speculation.speculator import Speculator
from services.engine.core.speculation.verification import verify
from tests.fakes.engines import make_scheduler


@dataclass
class Launched:
    """A step that the emulated device computes."""

    plan: Plan
    launched_ns: int
    ended_ns: int
    outputs: tuple[SequenceOutput, ...]


@dataclass
class EmulatedRunner:
    """Computes steps in no time at all, and says how long they take.

    texts: what each sequence is going to say. step_ns: of a step, by its number of tokens. host_ns:
    of the host, for each step.
    """

    texts: Mapping[int, list[int]]
    step_ns: Callable[[int], int]
    host_ns: int
    now_ns: int = 0
    launched_behind: int = 0
    mask_counts: MaskCounts = field(default_factory=MaskCounts)
    _free_ns: int = 0  # when the device is through with all that it was told
    _ended_ns: int = 0

    def launch(self, plan: Plan, behind: Launched | None) -> Launched:
        """As DeviceRunner."""
        self.launched_behind += behind is not None
        self.now_ns += self.host_ns // 2
        self._free_ns = max(self._free_ns, self.now_ns) + self.step_ns(plan.num_tokens)
        return Launched(plan, self.now_ns, self._free_ns, self._outputs(plan))

    def choose(self, launched: Launched) -> None:
        """They are chosen."""

    def finish(self, launched: Launched) -> StepOutputs:
        """As DeviceRunner."""
        started_ns = max(launched.launched_ns, self._ended_ns)
        self.now_ns = self._ended_ns = max(self.now_ns, launched.ended_ns)
        self.now_ns += self.host_ns - self.host_ns // 2
        return StepOutputs(launched.plan, launched.outputs, started_ns, self._ended_ns)

    def _outputs(self, plan: Plan) -> tuple[SequenceOutput, ...]:
        drafts = plan.drafts() or [()] * len(plan.sequences)
        outputs = []
        for sequence, count, draft in zip(plan.sequences, plan.token_counts, drafts, strict=True):
            if count < sequence.num_uncomputed_tokens:
                outputs.append(SequenceOutput())
                continue
            said = sequence.num_output_tokens + sequence.num_pending_tokens
            ids = self.texts[sequence.sequence_id][said : said + len(draft) + 1]
            chosen = SampledTokens(ids, [None] * len(ids), [None] * len(ids))
            outputs.append(verify(draft, chosen, 0))
        return tuple(outputs)


def tokens_per_second(
    prompts: list[list[int]],
    texts: list[list[int]],
    speculator: Speculator | None,
    *,
    step_ms: Callable[[int], float],
    host_ms: float,
) -> float:
    """How fast all texts, of one length, are said at once, until the first of them is."""
    runner: Any = EmulatedRunner(
        dict(enumerate(texts)), lambda tokens: int(step_ms(tokens) * 1e6), int(host_ms * 1e6)
    )
    scheduler = make_scheduler(
        num_blocks=100 * len(texts),
        block_size=16,
        max_batch_tokens=8192,
        max_running_sequences=len(texts),
        speculator=speculator,
    )
    steps = OverlappingSteps(scheduler, runner, IsolatingRunner(runner))
    stopping = Stopping(max_tokens=len(texts[0]), ignore_eos=True)
    scheduler.add(
        [SequenceRequest(index, prompt, stopping=stopping) for index, prompt in enumerate(prompts)]
    )
    said: dict[int, list[int]] = {index: [] for index in range(len(texts))}

    def advance() -> None:
        for delta in steps.advance(ahead=True)[1]:
            said[delta.sequence_id] += delta.token_ids

    while not all(said.values()):
        advance()
    started_ns, before = runner.now_ns, sum(map(len, said.values()))
    while scheduler.num_running == len(texts):
        advance()
    assert all(texts[index][: len(tokens)] == tokens for index, tokens in said.items())
    return (sum(map(len, said.values())) - before) / (runner.now_ns - started_ns) * 1e9
