"""The collector's configuration holds together, with itself and with the stack that it is part of.

No build of the collector with these components can be had from a package index, so its keys are
held against those that the components document; the image of compose.yaml reads it for real.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.runtime.settings import parse_settings

DEPLOY = Path(__file__).parents[3] / "deploy"
# `${env:NAME:-DEFAULT}`: the collector puts the default in its place, and reads it as YAML.
VARIABLE = re.compile(r"\$\{env:[A-Z_]+:-([^}]*)\}")


class Part(BaseModel):
    """Keys as documented; the collector refuses others, too."""

    model_config = ConfigDict(extra="forbid", strict=True)


Duration = Field(pattern=r"^\d+(ms|s|m)$")


class Grpc(Part):
    endpoint: str


class Protocols(Part):
    grpc: Grpc


class OtlpReceiver(Part):
    protocols: Protocols


class MemoryLimiter(Part):
    check_interval: str = Duration
    limit_percentage: int = Field(gt=0, le=100)
    spike_limit_percentage: int = Field(gt=0, le=100)


class StatusCodes(Part):
    status_codes: list[Literal["ERROR", "OK", "UNSET"]]


class Latency(Part):
    threshold_ms: int = Field(gt=0)


class Probability(Part):
    sampling_percentage: int = Field(ge=0, le=100)


class Policy(Part):
    name: str
    type: Literal["status_code", "latency", "probabilistic"]
    status_code: StatusCodes | None = None
    latency: Latency | None = None
    probabilistic: Probability | None = None


class DecisionCache(Part):
    sampled_cache_size: int


class TailSampling(Part):
    decision_wait: str = Duration
    num_traces: int = Field(gt=0)
    decision_cache: DecisionCache
    policies: list[Policy]


class Batch(Part):
    timeout: str = Duration
    send_batch_size: int


class Processors(Part):
    memory_limiter: MemoryLimiter
    tail_sampling: TailSampling
    batch: Batch


class Tls(Part):
    insecure: bool


class OtlpExporter(Part):
    endpoint: str
    tls: Tls


class Pipeline(Part):
    receivers: list[str]
    processors: list[str]
    exporters: list[str]


class Prometheus(Part):
    host: str
    port: int
    without_type_suffix: bool


class Exporter(Part):
    prometheus: Prometheus


class Pull(Part):
    exporter: Exporter


class Reader(Part):
    pull: Pull


class OwnMetrics(Part):
    level: Literal["none", "basic", "normal", "detailed"]
    readers: list[Reader]


class OwnTelemetry(Part):
    metrics: OwnMetrics


class Service(Part):
    pipelines: dict[str, Pipeline]
    telemetry: OwnTelemetry


class Collector(Part):
    receivers: dict[Literal["otlp"], OtlpReceiver]
    processors: Processors
    exporters: dict[Literal["otlp/jaeger"], OtlpExporter]
    service: Service


def document(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def configuration() -> str:
    text = (DEPLOY / "collector" / "collector.yaml").read_text()
    return VARIABLE.sub(lambda found: found[1], text)


@pytest.fixture(scope="module")
def collector() -> Collector:
    return Collector.model_validate(yaml.safe_load(configuration()))


def test_every_key_is_one_that_the_components_know(collector: Collector) -> None:
    wrong = yaml.safe_load(configuration().replace("decision_wait", "decision_delay"))
    with pytest.raises(ValidationError, match="decision_delay"):
        Collector.model_validate(wrong)


def test_what_is_configured_is_used_in_the_order_that_it_must_have(collector: Collector) -> None:
    pipeline = collector.service.pipelines["traces"]
    assert pipeline.receivers == list(collector.receivers)
    assert pipeline.exporters == list(collector.exporters)
    # Memory is guarded before anything is held, and batches are made of what is kept.
    assert pipeline.processors == ["memory_limiter", "tail_sampling", "batch"]
    assert set(pipeline.processors) == set(Processors.model_fields)


def test_errors_and_slow_ones_are_always_kept_and_a_part_of_the_rest(
    collector: Collector,
) -> None:
    sampling = collector.processors.tail_sampling
    policies = {policy.type: policy for policy in sampling.policies}
    assert policies["status_code"].status_code == StatusCodes(status_codes=["ERROR"])
    assert policies["probabilistic"].probabilistic is not None
    assert 0 < policies["probabilistic"].probabilistic.sampling_percentage < 100
    # A request that counts as slow has ended, and is known to be slow, when the choice is made.
    slow = policies["latency"].latency
    assert slow is not None
    assert slow.threshold_ms < 1000 * int(sampling.decision_wait.removesuffix("s"))
    for policy in sampling.policies:
        assert getattr(policy, policy.type) is not None, policy.name


def test_it_listens_where_the_services_send_and_sends_where_jaeger_listens(
    collector: Collector,
) -> None:
    compose = document("compose.yaml")["services"]
    settings = parse_settings(document("compose/meshserve.yaml"), {})
    assert settings.telemetry.otlp_endpoint is not None
    host, _, port = settings.telemetry.otlp_endpoint.removeprefix("http://").partition(":")
    assert host in compose
    assert collector.receivers["otlp"].protocols.grpc.endpoint == f"0.0.0.0:{port}"
    assert collector.exporters["otlp/jaeger"].endpoint.partition(":")[0] in compose
    assert "contrib" in compose[host]["image"]


def test_prometheus_asks_it_where_it_tells_of_itself(collector: Collector) -> None:
    (reader,) = collector.service.telemetry.metrics.readers
    jobs = {job["job_name"]: job for job in document("prometheus/prometheus.yml")["scrape_configs"]}
    assert reader.pull.exporter.prometheus.host == "0.0.0.0"
    target = f"collector:{reader.pull.exporter.prometheus.port}"
    assert jobs["collector"]["static_configs"] == [{"targets": [target]}]


def test_the_services_leave_the_choice_to_it() -> None:
    assert parse_settings(document("compose/meshserve.yaml"), {}).telemetry.sample_ratio == 1.0
