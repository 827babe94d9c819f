"""From traces to figures: percentiles, goodput, and one summary over several rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.load import Run, Trace


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What a request must keep to count as served well (its service level objective)."""

    first_token_s: float
    per_token_s: float

    def kept_by(self, trace: Trace) -> bool:
        """Whether a request was answered in time and then fast enough on average."""
        return trace.first_token_s <= self.first_token_s and trace.per_token_s <= self.per_token_s


# A second to the first token and then 20 tokens a second: several times reading speed.
SERVICE_LEVEL = ServiceLevel(first_token_s=1.0, per_token_s=0.05)


@dataclass(frozen=True, slots=True)
class Summary:
    """One system on one workload. Latencies are in milliseconds over the requests of all rounds;
    rates are medians over rounds, with the least and the most beside the one that counts."""

    rounds: int
    output_tokens_per_s: float
    output_tokens_per_s_range: tuple[float, float]
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    end_to_end_p50_ms: float
    end_to_end_p99_ms: float
    goodput_requests_per_s: float
    kept_service_level: float  # share of requests, 0 to 1


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, linearly, as numpy does it by default.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(runs: Sequence[Run], level: ServiceLevel = SERVICE_LEVEL) -> Summary:
    """Figures of one system on one workload over its rounds.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("no runs, no summary")
    traces = [trace for run in runs for trace in run.traces]
    rates = [run.output_tokens_per_s for run in runs]
    first = [trace.first_token_s for trace in traces]
    # A reader that was given everything at once felt no gap.
    gaps = [gap for trace in traces for gap in trace.gaps_s] or [0.0]
    whole = [trace.end_to_end_s for trace in traces]
    kept = [[level.kept_by(trace) for trace in run.traces] for run in runs]
    return Summary(
        rounds=len(runs),
        output_tokens_per_s=statistics.median(rates),
        output_tokens_per_s_range=(min(rates), max(rates)),
        ttft_p50_ms=1e3 * percentile(first, 50),
        ttft_p99_ms=1e3 * percentile(first, 99),
        itl_p50_ms=1e3 * percentile(gaps, 50),
        itl_p99_ms=1e3 * percentile(gaps, 99),
        end_to_end_p50_ms=1e3 * percentile(whole, 50),
        end_to_end_p99_ms=1e3 * percentile(whole, 99),
        goodput_requests_per_s=statistics.median(
            sum(each) / run.duration_s for each, run in zip(kept, runs, strict=True)
        ),
        kept_service_level=sum(map(sum, kept)) / len(traces),
    )
