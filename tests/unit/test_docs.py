"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from services.runtime.errors import Reason
from services.runtime.settings import parse_settings
from services.runtime.telemetry.metrics import METRICS
from services.runtime.telemetry.spans import SPANS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["configuration.md", "errors.md", "telemetry.md"])
def test_a_page_is_what_the_generator_writes(generate: ModuleType, page: str) -> None:
    assert (DOCS / page).read_text() == generate.rendered(page), "run `make docs`"


def test_the_tables_have_a_row_for_everything(generate: ModuleType) -> None:
    errors = generate.rendered("errors.md")
    assert [reason for reason in Reason if f"| `{reason.value}` |" not in errors] == []
    telemetry = generate.rendered("telemetry.md")
    assert [row.name for row in METRICS if f"| `{row.name}" not in telemetry] == []
    assert [span.name for span in SPANS if f"| `{span.name}` |" not in telemetry] == []


def test_every_key_of_the_settings_is_described(generate: ModuleType) -> None:
    rows = [
        line
        for line in generate.rendered("configuration.md").splitlines()
        if re.match(r"\| `\w+` \| [^|]+ \| [^|]+ \| ", line)
    ]
    keys = re.findall(r"^\s+(\w+): ", example(), re.MULTILINE)
    names = {row.split("`")[1] for row in rows}
    assert {"kv_cache_bytes", "otlp_endpoint", "client_ca", "sha256"} <= names
    assert set(keys) - names <= {"rate_limit", "auth", "tls", "default", "name"}
    assert [row for row in rows if row.endswith("|  |")] == []


def example() -> str:
    page = (DOCS / "configuration.md").read_text()
    found = re.search(r"<!-- example.*?-->\n```yaml\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_is_a_valid_file_that_sets_what_it_seems_to() -> None:
    settings = parse_settings(yaml.safe_load(example()), {})
    assert settings.gateway.auth.keys[0].name == "acme"
    assert settings.engine.device == "cuda:0"
    assert settings.telemetry.sample_ratio == 0.1
