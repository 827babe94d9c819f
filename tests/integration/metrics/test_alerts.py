"""The rules for Prometheus: each alert fires when it should and is silent when it should be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from services.runtime.reasons import REASONS, Reason
from tests.support.programs import require_program

ROOT = Path(__file__).parents[3]
PROMETHEUS = ROOT / "deploy" / "prometheus"
CASES = sorted((Path(__file__).parent / "alerts").glob("*.yml"))


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules" / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def promtool(*arguments: str) -> str:
    program = require_program("promtool", "prometheus")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_configuration_and_its_rules_are_valid() -> None:
    assert "FAILED" not in promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_alerts_fire_and_are_silent_as_their_cases_say(cases: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(cases))


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for path in CASES:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case["alert_rule_test"]:
                (fires if check.get("exp_alerts") else silent).add(check["alertname"])
    assert fires == silent == set(alerts())


def test_every_alert_says_what_happened_and_leads_to_its_section_of_the_runbook() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    assert re.findall(r"^## (MeshServe\w+)$", runbook, re.MULTILINE) == list(alerts())
    for name, rule in alerts().items():
        annotations = rule["annotations"]
        assert set(annotations) == {"summary", "description", "runbook_url"}, name
        assert annotations["runbook_url"].endswith(f"/docs/runbook.md#{name.lower()}")
        assert rule["labels"]["severity"] in ("critical", "warning")
        section = runbook.partition(f"## {name}\n")[2].partition("\n## ")[0].lower()
        assert "*look at*" in section, name
        assert re.search(r"\*do:?\*", section), name


def test_failures_of_the_mesh_are_told_from_mistakes_of_callers_by_their_code() -> None:
    codes = (
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
    own = {reason for reason, entry in REASONS.items() if entry.code in codes} | {Reason.QUEUE_FULL}
    rules = (PROMETHEUS / "rules" / "recording.yml").read_text()
    (listed,) = re.findall(r'reason=~"([A-Z_|]+)"', rules)
    assert set(listed.split("|")) == {reason.value for reason in own}
