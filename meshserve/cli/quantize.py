"""`meshserve quantize`: a model's matrices in 4 and 8 bits, learned on text, with a report."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from meshserve.cli.exits import CommandError
from meshserve.cli.jsonify import write_json
from meshserve.cli.output import print_table, stderr_console, stdout_console

_MIB = 2**20
# Of a HF directory, what is not weights or their index: as it was, but config.json, which is new.
_NOT_COPIED = ("config.json", "quantization_report.json")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")


@click.command("quantize")
@click.argument("model")
@click.option(
    "--to",
    "target",
    type=click.Choice(["int8", "int4", "mixed"]),
    required=True,
    help="8 bits; 4 bits; or for each projection 4, 8 or 16, within the budget.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Where the quantised model goes; must not be there yet.",
)
@click.option(
    "--budget",
    metavar="0.6x|1.02ppl",
    help="Of mixed: memory of the weights against 16 bits, or perplexity against theirs."
    "  [default: 1.02ppl]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Text like what the model will read.  [default: the Python language reference]",
)
@click.option("--json", "as_json", is_flag=True, help="Write the report as JSON.")
def command(
    model: str,
    target: Literal["int8", "int4", "mixed"],
    output: Path,
    budget: str | None,
    calibration: Path | None,
    as_json: bool,
) -> None:
    """Quantise MODEL, a name, a .gguf file, a directory or a hub id, and measure what it costs.

    What is written is a Hugging Face directory that this mesh, transformers and vLLM load. Half of
    it is never left behind.
    """
    if budget is not None and target != "mixed":
        raise CommandError("--budget is for --to mixed", "leave it out")
    try:
        from meshserve.cli import services
        from services.engine.core.kernels import cpu, select
        from services.engine.core.models import read_config
        from services.engine.core.quantization.allocation import Budget
        from services.engine.core.quantization.quantizer import Texts, quantize
        from services.runtime.modelfiles import locate
        from services.runtime.tokenizerfiles.errors import TokenizerLoadError
    except ImportError as error:
        raise CommandError(
            f"the engine is not installed ({error})", "pip install 'meshserve[all]'"
        ) from None
    if output.exists():
        raise CommandError(f"{output} is there already", "remove it, or give another directory")
    try:
        spent = Budget.parse(budget or "1.02ppl") if target == "mixed" else None
        with services.store_errors(), _progress() as progress:
            path = locate(model, services.model_cache())
            context = read_config(path).max_context_tokens
            texts = Texts.of(_token_ids(path, calibration), context)
            select("cpu")
            cpu.activate("auto", services.model_cache())
            report = quantize(
                path,
                output,
                target,
                texts,
                budget=spent,
                files=lambda directory: _add_files(path, directory),
                progress=progress,
            )
    except TokenizerLoadError as error:
        raise CommandError(str(error), "a model without its tokenizer is of no use") from None
    except ValueError as error:
        raise CommandError(str(error)) from None
    if as_json:
        write_json(report, sys.stdout)
    else:
        _print(report, output)


def _token_ids(path: Path, calibration: Path | None) -> list[int]:
    from services.tokenizer.model_tokenizer import load_model_tokenizer

    if calibration is None:
        from pydoc_data import topics

        text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    else:
        try:
            text = calibration.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{calibration} cannot be read: {error}") from None
    return list(load_model_tokenizer(path).encode(text).token_ids)


def _add_files(path: Path, directory: Path) -> None:
    """The tokenizer, the template and whatever else lies beside a model's weights."""
    if not path.is_dir():
        _write_tokenizer(path, directory)
        return
    for file in sorted(path.iterdir()):
        kept = not file.name.endswith(_WEIGHTS) and file.name not in _NOT_COPIED
        if kept and file.is_file() and not file.name.startswith("."):
            shutil.copyfile(file, directory / file.name)
    if (templates := path / "additional_chat_templates").is_dir():
        shutil.copytree(templates, directory / templates.name)


def _write_tokenizer(path: Path, directory: Path) -> None:
    import json

    from meshserve.cli.model_report.words import catalogue_sampling
    from services.runtime.tokenizerfiles.definition import DEFAULT_TEMPLATE
    from services.runtime.tokenizerfiles.opening import open_definition

    definition = open_definition(path)
    (directory / "tokenizer.json").write_text(json.dumps(definition.document, ensure_ascii=False))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **definition.special_tokens,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, template in definition.chat_templates.items():
        if name == DEFAULT_TEMPLATE:
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        else:
            (directory / "additional_chat_templates").mkdir(exist_ok=True)
            file = directory / "additional_chat_templates" / f"{name}.jinja"
            file.write_text(template, encoding="utf-8")
    generation: dict[str, Any] = {
        "bos_token_id": definition.bos_token_id,
        "eos_token_id": list(definition.eos_token_ids) or None,
    }
    if sampling := catalogue_sampling(path):
        generation |= {"do_sample": True, **sampling}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _print(report: dict[str, Any], output: Path) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("weights")
    for title in ("memory", "perplexity", "against bf16", "prompt tokens/s", "decode tokens/s"):
        table.add_column(title, justify="right")
    for name, found in report["results"].items():
        table.add_row(
            name,
            f"{found['bytes'] / _MIB:,.1f} MiB",
            "too large" if found["perplexity"] is None else f"{found['perplexity']:,.3f}",
            _change(found["perplexity_ratio"]),
            f"{found['prompt_tokens_per_s']:,.0f}",
            f"{found['decode_tokens_per_s']:,.0f}",
        )
    print_table(table)
    stdout_console().print()
    print_table(_layers(report["layers"]))
    for line in _remarks(report):
        stdout_console().print(Text(f"\n{line}"), soft_wrap=True)
    size = report["file_bytes"] / 1e6
    stdout_console().print(Text(f"\n{output}: {size:,.1f} MB of weights"), soft_wrap=True)


def _change(ratio: float | None) -> str:
    return "" if ratio is None else f"{100 * (ratio - 1):+.2f} %"


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    """What is to be said of how it came to this."""
    spread = max(each["speed_spread"] for each in report["results"].values())
    yield f"speeds are the best of rounds in turns, which differed by up to {100 * spread:.0f} %"
    if report["foretold_perplexity_ratio"] is not None:
        foretold = 100 * (report["foretold_perplexity_ratio"] - 1)
        yield f"foretold from single layers: {foretold:+.2f} %"
    if trials := report["trials"]:
        tried = ", ".join(_change(each["perplexity_ratio"]) for each in trials)
        yield f"measured to find it: {tried}"
    if set(report["layers"].values()) == {16}:
        yield "nothing smaller keeps the budget: all of it is in 16 bits, as it was"
    if blindly := report["rounded_blindly"]:
        count = sum(map(len, blindly.values()))
        named = ", ".join(f"{path} {_ranges(experts)}" for path, experts in blindly.items())
        yield (
            f"the calibration text hardly reached {count} matrices of experts, which are rounded "
            f"without it: {named}"
        )


def _layers(layers: dict[str, int]) -> Table:
    """What each kind of projection got: layers by their bits."""
    kinds: dict[str, dict[int, list[int]]] = {}
    for path, bits in layers.items():
        _, index, kind = path.split(".", 2)
        kinds.setdefault(kind, {}).setdefault(bits, []).append(int(index))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    widths = sorted({bits for each in kinds.values() for bits in each})
    table.add_column("layers with")
    for bits in widths:
        table.add_column(f"{bits} bits")
    for kind, by_bits in kinds.items():
        table.add_row(kind, *(_ranges(by_bits.get(bits, [])) for bits in widths))
    return table


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return " ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, a line for each thing done elsewhere."""
    console = stderr_console()
    if not console.is_terminal:
        said: set[str] = set()

        def tell(doing: str, done: int, total: int) -> None:
            if doing not in said:
                said.add(doing)
                console.print(doing, markup=False)

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def draw(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = progress.add_task(doing, total=total)
            progress.update(tasks[doing], completed=done, total=total)

        yield draw
