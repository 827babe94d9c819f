"""One YAML file and the environment over it: a Settings, or a message that says what to mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.settings import Settings, SettingsError, load_settings, parse_settings
from services.runtime.settings.addresses import is_loopback, split_address


def problem(document: Any, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_settings(document, environ or {}, source="mesh.yaml")
    return str(caught.value)


def outcome_of(read: Callable[[], Any], expected: type[Exception]) -> Any:
    """What comes of it: a value or the expected error; any other error fails the test."""
    try:
        return read()
    except expected as error:
        return error


def load(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> Settings:
    path = tmp_path / "mesh.yaml"
    path.write_text(text)
    return load_settings(path, environ or {})


def test_nothing_given_is_the_demo_model_on_loopback() -> None:
    settings = parse_settings(None, {})
    assert settings.default_model == "smollm2-135m"
    assert settings.engine_models == ("smollm2-135m",)
    for name in ("gateway", "tokenizer", "engine", "cache", "safety"):
        assert is_loopback(settings.server(name).listen)
    listening = [settings.server(name).listen for name in ("gateway", "tokenizer", "engine")]
    assert len(set(listening)) == 3
    assert settings.valkey.effective_url == "redis://127.0.0.1:50056/0"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"gatewy": {}}, "mesh.yaml: gatewy: unknown key; did you mean 'gateway'?"),
        ({"gateway": {"lisen": "x"}}, "gateway.lisen: unknown key; did you mean 'listen'?"),
        (
            {"gateway": {"rate_limit": {"bursts": 1}}},
            "gateway.rate_limit.bursts: unknown key; did you mean 'burst'?",
        ),
        (
            {"models": {"m": {"source": "x", "dtyp": "auto"}}},
            "models.m.dtyp: unknown key; did you mean 'dtype'?",
        ),
        (
            {"gateway": {"auth": {"keys": [{"name": "a", "sha265": "b" * 64}]}}},
            "gateway.auth.keys.0.sha265: unknown key; did you mean 'sha256'?",
        ),
        (
            {"engine": {"tls": {"certificat": "a", "private_key": "b"}}},
            "engine.tls.certificat: unknown key; did you mean 'certificate'?",
        ),
        (
            {"telemetry": {"zzzz": 1}},
            "known keys: otlp_endpoint, sample_ratio, trace_url, openinference, phoenix, ",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_one(document: Any, message: str) -> None:
    assert message in problem(document)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "mesh.yaml: expected a mapping of sections at the top"),
        ("text", "expected a mapping of sections at the top"),
        ({"gateway": 5}, "gateway: "),
        (
            {"gateway": {"listen": 50051}},
            "gateway.listen: input should be a valid string, not 50051",
        ),
        ({"gateway": {"listen": "nowhere"}}, "gateway.listen: 'nowhere' is not HOST:PORT"),
        ({"gateway": {"listen": "a:70000"}}, "gateway.listen: 'a:70000' is not HOST:PORT"),
        ({"gateway": {"listen": ":80"}}, "gateway.listen: ':80' is not HOST:PORT"),
        ({"gateway": {"listen": "http://a:80"}}, "is not HOST:PORT"),
        ({"gateway": {"listen": "::1:80"}}, "is not HOST:PORT"),
        ({"engine": {"metrics_listen": "unix:/tmp/x"}}, "engine.metrics_listen: "),
        ({"engine": {"max_batch_tokens": 0}}, "engine.max_batch_tokens: input should be greater"),
        ({"engine": {"drain_timeout_s": -1}}, "engine.drain_timeout_s: input should be greater"),
        ({"engine": {"drain_timeout_s": float("inf")}}, "engine.drain_timeout_s: "),
        ({"engine": {"drain_timeout_s": float("nan")}}, "engine.drain_timeout_s: "),
        ({"engine": {"max_message_bytes": 2**31}}, "engine.max_message_bytes: "),
        ({"engine": {"kv_cache_memory_fraction": 1.5}}, "engine.kv_cache_memory_fraction: "),
        ({"engine": {"block_tokens": 17}}, "engine.block_tokens: input should be 8, 16, 32"),
        ({"engine": {"model": "absent"}}, "engine.model: 'absent' is not among models"),
        ({"valkey": {"embedded_port": 0}}, "valkey.embedded_port: "),
        ({"telemetry": {"sample_ratio": 2}}, "telemetry.sample_ratio: "),
        ({"telemetry": {"log_level": "loud"}}, "telemetry.log_level: input should be 'debug'"),
        ({"models": {}}, "models: at least one model is needed"),
        ({"models": {"m": {}}}, "models.m.source: required and missing"),
        ({"engine": {"tls": {"certificate": "a"}}}, "engine.tls.private_key: required and missing"),
        (
            {"models": {"a": {"source": "x"}, "b": {"source": "y", "aliases": ["a"]}}},
            "the name 'a' is given to 'a' and to 'b'",
        ),
        (
            {"models": {"a": {"source": "x"}, "b": {"source": "y", "adapters": {"a": "z"}}}},
            "the name 'a' is given to 'a' and to 'b'",
        ),
        (
            {"models": {"a": {"source": "x", "adapters": {"a:b": "z"}}}},
            "models.a.adapters: 'a:b' is not 1 to 128 letters",
        ),
        (
            {"gateway": {"auth": {"keys": [{"name": "t", "sha256": "0" * 64, "models": ["z"]}]}}},
            "key 't' names the unknown model 'z'",
        ),
        (
            {"gateway": {"auth": {"keys": [{"name": n, "sha256": "0" * 64} for n in "tu"]}}},
            "'t' and 'u' have the same key",
        ),
        ({1: 2}, "mesh.yaml: "),
    ],
)
def test_each_mistake_says_where_it_is_and_what_it_is(document: Any, message: str) -> None:
    assert message in problem(document)


def test_all_mistakes_are_told_at_once() -> None:
    lines = problem({"engine": {"threads": -1, "devic": "cpu"}, "cachee": {}}).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("mesh.yaml: ") for line in lines)


def test_a_key_given_for_its_digest_is_not_repeated() -> None:
    document = {"gateway": {"auth": {"keys": [{"name": "t", "sha256": "sk-very-secret"}]}}}
    text = problem(document)
    assert "gateway.auth.keys.0.sha256" in text
    assert "sk-very-secret" not in text


def test_a_message_stays_short_however_large_the_value() -> None:
    assert len(problem({"gateway": {"listen": ["x" * 10**6]}})) < 300
    assert len(problem({"engine": {"device": 10**6000}})) < 300
    assert len(problem({"engine": {"block_tokens": "x" * 10**6}})) < 300


def test_the_environment_lies_over_the_file(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "gateway: {listen: '127.0.0.1:1', default_timeout_s: 7}",
        {
            "MESHSERVE_GATEWAY__LISTEN": "0.0.0.0:2",
            "MESHSERVE_GATEWAY__RATE_LIMIT__BURST": "3",
            "MESHSERVE_ENGINE__THREADS": "4",
            "MESHSERVE_CACHE__ENABLED": "false",
            "MESHSERVE_ENGINE__METRICS_LISTEN": "null",
            "MESHSERVE_MODELS": "{m: {source: x.gguf}}",
        },
    )
    assert settings.gateway.listen == "0.0.0.0:2"
    assert settings.gateway.default_timeout_s == 7
    assert settings.gateway.rate_limit.burst == 3
    assert settings.engine.threads == 4
    assert settings.cache.enabled is False
    assert settings.engine.metrics_listen is None
    assert settings.default_model == "m"


def test_on_and_off_are_words_where_words_are_asked_for_and_else_switches(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("engine: {plan_ahead: on}\ncache: {enabled: off}\nsafety: {enabled: true}\n")
    settings = load_settings(file, {"MESHSERVE_GATEWAY__AUTH__MODE": "off"})
    assert settings.engine.plan_ahead == "on"
    assert settings.gateway.auth.mode == "off"
    assert not settings.cache.enabled
    assert settings.safety.enabled


def test_a_mistake_in_the_environment_names_the_variable() -> None:
    text = problem({}, {"MESHSERVE_ENGINE__TREADS": "4"})
    assert text == ("MESHSERVE_ENGINE__TREADS: engine.treads: unknown key; did you mean 'threads'?")
    assert problem({}, {"MESHSERVE_ENGINE__THREADS": "[1"}).startswith("MESHSERVE_ENGINE__THREADS")
    deep = {"MESHSERVE_GATEWAY__LISTEN__PORT": "1"}
    assert "gateway.listen is not a section" in problem({"gateway": {"listen": "a:1"}}, deep)


def test_variables_of_others_are_left_alone() -> None:
    environ = {
        "PATH": "/bin",
        "MESHSERVE_API_KEY": "sk",
        "MESHSERVE_CACHE": "/var/cache",
        # Kubernetes tells every pod of a Service named `meshserve-gateway`.
        "MESHSERVE_GATEWAY_SERVICE_HOST": "10.0.0.1",
        "MESHSERVE_GATEWAY_SERVICE_PORT": "50051",
        "MESHSERVE_GATEWAY_SERVICE_PORT_GRPC": "50051",
        "MESHSERVE_GATEWAY_PORT": "tcp://10.0.0.1:50051",
        "MESHSERVE_GATEWAY_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "MESHSERVE_GATEWAY_PORT_50051_TCP_ADDR": "10.0.0.1",
    }
    assert parse_settings({}, environ) == parse_settings({}, {})


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text("engine: {threads: 3}")
    assert load_settings(None, {"MESHSERVE_CONFIG": str(path)}).engine.threads == 3
    assert load_settings(None, {}).engine.threads is None


@pytest.mark.parametrize(
    "text",
    [
        "gateway: [",
        "gateway: {listen: a:1\n",
        "a: 2001-99-99",
        "a: 0b",
        "\x00",
        "a: !!python/object:os.system {}",
        "a: !!int x",
        "a: " + "9" * 5000,
        "[" * 5000,
        "engine: {threads: 1}\nengine: {threads: 2}",
        "engine:\n  threads: 1\n  threads: 2",
        "? {a: b}\n: c",
        "&a {x: *a}",
        "gateway: &a {x: *a}",
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_a_settings_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert "mesh.yaml" in str(caught.value)


def test_a_key_that_stands_twice_says_which_and_where(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'threads' stands twice[\s\S]*line 3"):
        load(tmp_path, "engine:\n  threads: 1\n  threads: 2\n")


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path / "absent.yaml", {})
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path, {})
    (tmp_path / "latin1.yaml").write_bytes(b"a: \xff")
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path / "latin1.yaml", {})


def test_settings_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_settings({}, {}).gateway.listen = "0.0.0.0:1"


@pytest.mark.parametrize(
    ("listen", "target"),
    [
        ("0.0.0.0:5", "dns:///127.0.0.1:5"),
        ("[::]:5", "dns:///[::1]:5"),
        ("[::1]:5", "dns:///[::1]:5"),
        ("host:5", "dns:///host:5"),
        ("unix:/run/x", "unix:/run/x"),
    ],
)
def test_a_listening_address_is_a_target_for_the_others(listen: str, target: str) -> None:
    assert parse_settings({"engine": {"listen": listen}}, {}).engine.effective_target == target


@pytest.mark.parametrize(
    "file",
    [
        {"tokenizer": {"target": "tokenizer"}},
        {"tokenizer": {"target": "xds:///tokenizer:50052"}},
        {"models": {"m": {"source": "m", "engine_target": "10.0.0.3:1,10.0.0.4"}}},
    ],
)
def test_a_target_that_names_no_port_or_cannot_be_followed_is_refused(file: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"target: .* is not HOST:PORT"):
        parse_settings(file, {})


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("mesh.example:1", False),
    ],
)
def test_loopback_is_told_from_the_rest(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


@given(st.text())
def test_an_address_is_split_or_refused(text: str) -> None:
    found = outcome_of(lambda: split_address(text), ValueError)
    if isinstance(found, ValueError):
        assert str(found) == f"{text!r} is not HOST:PORT"
    else:
        assert found[0]
        assert 0 <= found[1] <= 65535


def schema_keys() -> list[str]:
    keys = set(Settings.model_fields)
    for name in Settings.model_fields:
        annotation = Settings.model_fields[name].annotation
        keys |= set(getattr(annotation, "model_fields", {}))
    return sorted(keys)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["127.0.0.1:1", "auto", "x.gguf", "cpu", "redis://h"])
    | st.dates()
    | st.binary(max_size=4)
)
keys = st.sampled_from(schema_keys()) | st.text(max_size=10) | st.integers() | st.none()
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=25,
)
variables = st.dictionaries(
    st.sampled_from(schema_keys())
    .flatmap(lambda key: st.sampled_from([key, f"engine__{key}", f"{key}__{key}", f"{key}__"]))
    .map(lambda key: f"MESHSERVE_{key}".upper()),
    st.text(max_size=20).filter(lambda text: "\x00" not in text),
    max_size=3,
)


@given(st.dictionaries(keys, documents, max_size=5) | documents, variables)
def test_any_document_gives_settings_or_a_settings_error(
    document: Any, environ: dict[str, str]
) -> None:
    found = outcome_of(lambda: parse_settings(document, environ), SettingsError)
    if isinstance(found, SettingsError):
        assert str(found)
    else:
        assert set(found.engine_models) <= set(found.models)


@given(st.text() | documents.map(lambda document: yaml.safe_dump(document)))
def test_any_text_in_the_file_gives_settings_or_a_settings_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    found = outcome_of(lambda: load_settings(path, {}), SettingsError)
    assert isinstance(found, Settings) or str(path) in str(found)
