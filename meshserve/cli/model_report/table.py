"""A model's report for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from meshserve.cli.output import print_table, stdout_console
from meshserve.supervisor.logview import printable

_MIB = 2**20
_GIB = 2**30


def print_report(report: dict[str, Any]) -> None:
    """Print what was found out, the memory needed, and the verdict."""
    table = Table.grid(padding=(0, 2))
    for name, value in _rows(report):
        table.add_row(Text(name, style="dim"), Text(printable(value), overflow="fold"))
    print_table(table)
    if report["memory"] is not None:
        stdout_console().print()
        print_table(_memory_table(report["memory"]))
    stdout_console().print()
    stdout_console().print(_verdict(report["verdict"]), soft_wrap=True)


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "name", report["name"]
    yield "architecture", _architecture(report)
    if report["num_parameters"] is not None:
        yield "parameters", _parameters(report)
    if report["precision"]:
        yield (
            "stored as",
            "; ".join(f"{kind} {', '.join(types)}" for kind, types in report["precision"].items()),
        )
    if report["pickled"] is not None:
        yield "pickled", _pickled(report["pickled"])
    if report["kept"] is not None:
        yield "kept on a CPU", report["kept"]
    if report["kept_on_gpu"] is not None:
        yield "kept on a GPU", report["kept_on_gpu"]
    yield "context", _context(report)
    if report["shape"] is not None:
        yield "layers", _shape(report["shape"])
    if report["vocab_size"] is not None:
        yield "vocabulary", f"{report['vocab_size']:,} tokens"
    yield "tokenizer", report["tokenizer"]["kind"] or report["tokenizer"]["problem"]
    yield "chat template", _template(report["chat_template"])
    if report["generation"]:
        values = ", ".join(f"{name} {value:g}" for name, value in report["generation"].items())
        yield "sampling", values
    yield "licence", report["licence"] or "not stated"
    if report["size_bytes"] is not None:
        yield "size", f"{report['size_bytes'] / 1e6:,.1f} MB"
    yield "path", report["path"]


def _parameters(report: dict[str, Any]) -> str:
    count = f"{report['num_parameters'] / 1e6:,.1f} million"
    pickled = report["pickled"]
    if pickled is None:
        return f"{count}, {report['dtype']}"
    each = pickled["tensor_bytes"] / max(report["num_parameters"], 1)
    return f"{count} by config.json; {each:.1f} bytes for each in the files"


def _pickled(pickled: dict[str, Any]) -> str:
    files = ", ".join(pickled["files"])
    if pickled["tensors"] is None:
        return f"{files}: no archive, so that nothing can be told of it unless it is unpickled"
    size = _size(pickled["tensor_bytes"])
    return f"{files}: {pickled['tensors']} tensors, {size}; their names and types are in the pickle"


def _architecture(report: dict[str, Any]) -> str:
    name = report["architecture"] or "unknown"
    return name if report["role"] is None else f"{name}: {report['family']}, {report['role']}"


def _context(report: dict[str, Any]) -> str:
    tokens = report["max_context_tokens"]
    if tokens is None:
        return "not stated"
    context = report["context"]
    if context is None or context["scaling"] == "none":
        return f"{tokens:,} tokens"
    trained = f" from {context['trained_tokens']:,}" if context["trained_tokens"] else ""
    factor = f" by {context['factor']:g}" if context["factor"] != 1 else ""
    return f"{tokens:,} tokens, stretched{trained}{factor} ({context['scaling']})"


def _shape(shape: dict[str, Any]) -> str:
    heads = f"{shape['heads']} heads"
    if shape.get("kv_heads"):
        heads += f" over {shape['kv_heads']} of keys and values"
    parts = [
        f"{shape['layers']}, {heads}, {shape['head_dim']} wide",
        f"hidden {shape['hidden_size']}",
    ]
    parts.append(f"feed-forward {shape['intermediate_size']}")
    if shape.get("experts"):
        parts.append(f"{shape['experts']} experts, {shape['experts_per_token']} for each token")
    for window in shape.get("windows", ()):
        layers = f"{window['layers']} layer{'s' if window['layers'] > 1 else ''}"
        parts.append(f"{layers} with a window of {window['tokens']:,} tokens")
    if (sparse := shape.get("sparse_attention")) is not None:
        layers = f"{sparse['layers']} layer{'s' if sparse['layers'] > 1 else ''}"
        seen = f"{sparse['window']:,} tokens back and the first {sparse['global_tokens']:,}"
        parts.append(f"{layers} with attention to {seen}")
    if shape.get("labels"):
        parts.append(f"{len(shape['labels'])} classes")
    return "; ".join(parts)


def _template(template: dict[str, Any] | None) -> str:
    if template is None:
        return "none: for completions, not for chats"
    if template["problem"] is not None:
        return f"cannot be used: {template['problem']}"
    tools = "tools" if template["tools"] else "no tools"
    return f"{', '.join(template['roles']) or 'no roles'}; {tools}; from {template['source']}"


def _memory_table(memory: dict[str, Any]) -> Table:
    choices = list(memory["weights"])
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("memory")
    for choice in choices:
        table.add_column(choice, justify="right")
    weights = [_size(memory["weights"][choice]["bytes"]) for choice in choices]
    table.add_row("weights", *weights)
    for row in memory["kv_cache"]:
        if row["bytes"] == 0:
            continue
        count = row["sequences"]
        label = f"and {count} sequence{'s' if count > 1 else ''} of {memory['tokens']:,} tokens"
        table.add_row(label, *(_size(row["total_bytes"][choice]) for choice in choices))
    table.add_row("free", _size(memory["free_bytes"]))
    return table


def _verdict(verdict: dict[str, Any]) -> Text:
    if not verdict["runs"]:
        return Text.assemble(("does not run here: ", "bold red"), printable(verdict["reason"]))
    if verdict["on"] == "native":
        kernels = f"on the native kernels of this processor ({verdict['instruction_set']})"
        return Text.assemble(("runs ", "bold green"), kernels)
    where = f"on plain torch, on {verdict['device']}: {verdict['reason']}"
    return Text.assemble(("runs ", "bold yellow"), where)


def _size(num_bytes: int) -> str:
    if num_bytes >= _GIB:
        return f"{num_bytes / _GIB:,.1f} GiB"
    return f"{num_bytes / _MIB:,.0f} MiB"
