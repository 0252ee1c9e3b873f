"""What each lever is worth: the same facts trained with everything, then without one at a time.

Invariants:
- All begin with the same weights, the same protected text and the same questions; only what a lever
  stands for differs, as a setting.
- What is lost without a lever is repaired like everything that is lost: its harm shows in what the
  base knew, in the facts that were not learned, and in the seconds.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvedit.config import FILE_NAME
from kvedit.errors import UsageError
from kvedit.model import loading
from tests.bench import questions
from tests.bench.retain import Emit
from tests.bench.strategies import StrategiesResult, StrategyOptions, Tell, Ways

SEARCHED = "searched"


@dataclass(frozen=True, slots=True)
class Lever:
    """Something that can be switched off: ``[section] setting = off``."""

    name: str
    section: str
    setting: str
    off: float


SEARCH = Lever("no search for what is known", "protect", "samples_per_fact", 0)
LEVERS = (
    Lever("no penalty", "group", "penalty_scale", 0.0),
    Lever("no replay of protected text", "group", "reference_texts", 0),
    SEARCH,
    Lever("no rehearsal", "group", "rehearsal_ratio", 0.0),
    Lever("every token counts alike", "group", "easy_token_weight", 1.0),
    Lever("no compaction", "group", "compaction_ratio", 1e9),
)
EVERYTHING = "everything"


def levers(
    options: StrategyOptions, emit: Emit, tell: Tell = lambda result, point: None
) -> StrategiesResult:
    """Train the same facts with everything and without each lever, then by the baseline.

    The group size is the first of ``options.groups``.  Raises UsageError where ``store_dir`` has
    the stores of another run.
    """
    data = questions.load(options.data, loading.locate(options.model))
    facts = questions.new_facts(data, options.facts, options.facts_file, options.kind)
    with _home(options.store_dir) as home:
        own = replace(options, store_dir=home, resume=True)
        ways = Ways(own, data, facts, emit, tell)
        ways.make(SEARCHED)
        ways.train(options.groups[0], _store(home, None))
        for lever in LEVERS:
            ways.train(options.groups[0], _store(home, lever))
        ways.baseline()
        return ways.result


@contextmanager
def _home(folder: Path | None) -> Iterator[Path]:
    """Where the stores are, for as long as they are wanted."""
    if folder is None:
        with TemporaryDirectory(prefix="kvedit-bench-") as temporary:
            yield Path(temporary)
    elif (folder / SEARCHED).exists():
        raise UsageError(f"{folder} has the stores of another run", hint="Give a new --store-dir.")
    else:
        yield folder


def _store(home: Path, lever: Lever | None) -> Path:
    """The folder of a store that is ready to be trained, without a lever if one is given.

    What was searched for once serves all but the one that is to do without it.
    """
    folder = home / (EVERYTHING if lever is None else lever.name)
    if lever is SEARCH:
        folder.mkdir()
    else:
        shutil.copytree(home / SEARCHED, folder)
    settings = home / FILE_NAME
    document = tomllib.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if lever is not None:
        document.setdefault(lever.section, {})[lever.setting] = lever.off
    (folder / FILE_NAME).write_text(as_toml(document), encoding="utf-8")
    return folder


def as_toml(document: Mapping[str, Mapping[str, Any]]) -> str:
    """Settings as TOML."""
    lines = []
    for section, table in document.items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {_value(value)}" for name, value in table.items()]
    return "".join(f"{line}\n" for line in lines)


def _value(value: Any) -> str:
    """A setting: text and numbers are written as in JSON."""
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(name)} = {_value(one)}" for name, one in value.items())
        return f"{{ {inner} }}"
    return json.dumps(value)
