"""What KEDA and prometheus-adapter ask Prometheus says how many engines a model needs."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import EXAMPLES, NAMESPACE, example, of_kind, render
from tests.support.programs import require_program

pytestmark = pytest.mark.slow

MODEL = "smollm2-360m"
OF = f'namespace="{NAMESPACE}",model="{MODEL}"'
NOT_MINE = f'namespace="{NAMESPACE}",model="smollm2-135m"'

# Series of one engine after the other, from the first minute on.
IDLE: dict[str, str] = {f"meshserve_gateway_requests_awaiting_engine{{{OF}}}": "0x9"}
AWAITED = {f"meshserve_gateway_requests_awaiting_engine{{{OF}}}": "3x9"}
BUSY = {
    f'meshserve_engine_running_sequences{{{OF},pod="a"}}': "60x9",
    f'meshserve_engine_running_sequences{{{OF},pod="b"}}': "4x9",
    f'meshserve_engine_waiting_sequences{{{OF},pod="a"}}': "10x9",
    f'meshserve_engine_waiting_sequences{{{OF},pod="b"}}': "2x9",
    f'meshserve_engine_kv_blocks_used{{{OF},pod="a"}}': "90x9",
    f'meshserve_engine_kv_blocks_used{{{OF},pod="b"}}': "10x9",
    f'meshserve_engine_kv_blocks{{{OF},pod="a"}}': "100x9",
    f'meshserve_engine_kv_blocks{{{OF},pod="b"}}': "100x9",
    # Nearly all of a hundred first tokens a minute within a second, the rest within five.
    f'meshserve_gateway_time_to_first_token_seconds_bucket{{{OF},le="1"}}': "0+90x9",
    f'meshserve_gateway_time_to_first_token_seconds_bucket{{{OF},le="5"}}': "0+100x9",
    f'meshserve_gateway_time_to_first_token_seconds_bucket{{{OF},le="+Inf"}}': "0+100x9",
    # Another model's.
    f"meshserve_engine_running_sequences{{{NOT_MINE}}}": "1000x9",
    f"meshserve_engine_waiting_sequences{{{NOT_MINE}}}": "1000x9",
}


@functools.cache
def queries() -> dict[str, str]:
    """The queries of the triggers that scale the model to none, by their names."""
    (scaled,) = (
        each
        for each in of_kind(render(example("keda")), "ScaledObject")
        if each["spec"]["minReplicaCount"] == 0
    )
    return {each["name"]: each["metadata"]["query"] for each in scaled["spec"]["triggers"]}


def check(folder: Path, series: dict[str, str], wanted: dict[str, float]) -> None:
    """Holds promtool's answers to queries after five minutes against what is wanted."""
    cases: dict[str, Any] = {
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": v} for name, v in series.items()],
                "promql_expr_test": [
                    {
                        "expr": f"round({query}, 0.001)",
                        "eval_time": "5m",
                        "exp_samples": [{"labels": "{}", "value": value}],
                    }
                    for query, value in wanted.items()
                ],
            }
        ],
    }
    path = folder / "cases.yaml"
    path.write_text(yaml.safe_dump(cases))
    program = require_program("promtool", "prometheus")
    ran = subprocess.run([program, "test", "rules", str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("series", "wanted"),
    [
        pytest.param({}, (0, 0, 0, 0), id="a mesh that nobody scrapes yet"),
        pytest.param(IDLE, (0, 0, 0, 0), id="no engine, and nobody asks"),
        pytest.param(AWAITED, (3, 0, 0, 0), id="no engine, and three wait for one"),
        pytest.param(IDLE | BUSY, (76, 12, 50, 3), id="two engines with much to do"),
    ],
)
def test_keda_is_told(
    series: dict[str, str], wanted: tuple[float, float, float, float], tmp_path: Path
) -> None:
    names = ("in-use", "waiting-sequences", "kv-cache", "time-to-first-token")
    assert set(names) == queries().keys()
    answers = dict(zip((queries()[name] for name in names), wanted, strict=True))
    check(tmp_path, series, answers)


def test_the_adapter_tells_an_hpa_of_each_pod_and_of_the_model(tmp_path: Path) -> None:
    values = yaml.safe_load((EXAMPLES / "prometheus-adapter.yaml").read_text())
    kinds = [each for each in values["rules"].values() if each]
    rules = {each["name"]["as"]: each for kind in kinds for each in kind}

    def query(name: str, matchers: str) -> str:
        """As prometheus-adapter fills in the template of a rule."""
        rule = rules[name]
        text = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].split("{")[0])
        filled: str = text.replace("<<.LabelMatchers>>", matchers).replace("<<.GroupBy>>", "pod")
        return f"sum({filled})"

    pod = f'namespace="{NAMESPACE}",pod="a"'
    check(
        tmp_path,
        BUSY,
        {
            query("meshserve_engine_waiting_sequences", pod): 10,
            query("meshserve_engine_kv_cache_percent", pod): 90,
            query("meshserve_time_to_first_token_seconds_p95", OF): 3,
        },
    )
    metrics = [
        each.get("pods", each.get("external"))["metric"]["name"]
        for hpa in of_kind(render(example("production")), "HorizontalPodAutoscaler")
        for each in hpa["spec"]["metrics"]
        if each["type"] != "Resource"
    ]
    assert set(metrics) == rules.keys()
