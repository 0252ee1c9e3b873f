"""Documents of benchmarks as files and as Markdown for the log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kvedit.bench.tables import SCHEMA, Document
from kvedit.errors import UsageError
from kvedit.files import write_atomic


def write(path: Path, result: Document) -> None:
    """Write a document whole or not at all."""
    write_atomic(path, (json.dumps(result, ensure_ascii=False, indent=2) + "\n").encode())


def read(path: Path) -> Document:
    """A document that was written; raises UsageError for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UsageError(f"{path} is no result of a benchmark", hint=f"Its schema is {SCHEMA}.")
    return result


def markdown(result: Document) -> str:
    """A section with command, versions and machine, then every table."""
    ran = result["machine"]
    lines = [
        f"## {result['started'][:10]}: {result['benchmark']}", "", f"`{result['command']}`", "",
        f"Model {result['model']}; kvedit {result['kvedit']}, commit {result['commit']};"
        f" {ran['gpu'] or ran['processor']}, {ran['cores']} cores, {ran['processes']} process(es)"
        f" of {ran['threads']} thread(s); torch {ran['torch']}. {result['notes']}".rstrip(),
    ]  # fmt: skip
    for table in result["tables"]:
        lines += ["", f"**{table['title']}**", ""]
        lines += map(_row, (table["columns"], ["---"] * len(table["columns"]), *table["rows"]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
