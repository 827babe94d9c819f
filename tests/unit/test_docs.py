"""The reference pages say what the code says."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from meshserve import v1
from services.runtime.errors import Reason
from services.runtime.settings import parse_settings
from services.runtime.telemetry.metrics import METRICS
from services.runtime.telemetry.spans import SPANS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page", ["configuration.md", "errors.md", "parameters.md", "support.md", "telemetry.md"]
)
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


def methods() -> set[str]:
    """The full names of all methods of the contracts."""
    modules = [
        importlib.import_module(f"{v1.__name__}.{module.name}")
        for module in pkgutil.iter_modules(v1.__path__)
        if module.name.endswith("_pb2")
    ]
    return {
        f"{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    called = set(re.findall(r"\bmeshserve\.v1\.\w+/\w+", text))
    assert called - methods() == set()
    shown = set(re.findall(r"\bmeshserve_[a-z_]+", text))
    declared = {row.name for row in METRICS}
    suffixes = re.compile(r"_(total|bucket|sum|count)$")
    assert {name for name in shown if suffixes.sub("", name) not in declared} - declared == set()


def anchors(page: Path) -> set[str]:
    """What a link may name within a page, as GitHub makes it from headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_within_the_project_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target
