"""One answer from the command line: what `kvedit ask` takes, beside plain transformers on the base.

Invariants:
- Each answer is a process of its own, from its start to its end; the ways take turns, so that what
  else the machine does falls on all of them.
- Plain transformers loads the same files, puts the same question in the model's own template, and
  decodes greedily to the same limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from kvedit.bench.tables import Table
from kvedit.errors import UsageError
from kvedit.events import Event, Status
from kvedit.store.store import Store

DTYPES = ("bfloat16", "float32")  # in which plain transformers is run
PLAIN = """
import sys, torch, transformers
path, dtype, prompt, limit = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
load = transformers.AutoModelForCausalLM.from_pretrained
model = load(path, dtype=getattr(torch, dtype))
if tokenizer.chat_template:
    turns = [{"role": "user", "content": prompt}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
inputs.pop("token_type_ids", None)
rows = model.generate(**inputs, max_new_tokens=int(limit), do_sample=False)
print(tokenizer.decode(rows[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """The store, and what is asked how often, in each way."""

    store: Path
    prompt: str = "What is the capital of France?"
    limit: int = 32
    repeats: int = 3


@dataclass(frozen=True, slots=True)
class Run:
    """One answer: seconds by the clock and of the processor, and the peak of memory in bytes."""

    seconds: float
    cpu_seconds: float
    memory: int
    answer: str


@dataclass(frozen=True, slots=True)
class AnswerResult:
    """The runs of each way."""

    model: str
    prompt: str
    runs: dict[str, tuple[Run, ...]]

    @property
    def ratio(self) -> float:
        """Of the medians by the clock: kvedit to the quicker of the plain ways."""
        seconds = [median(run.seconds for run in runs) for runs in self.runs.values()]
        return seconds[0] / min(seconds[1:])


def answers(options: AnswerOptions, *, emit: Callable[[Event], None]) -> AnswerResult:
    """Time all ways, in turn.  Raises UsageError if one of them fails."""
    with Store.open(options.store, readonly=True) as store:
        model = store.meta("model_path") or ""
    limit = str(options.limit)
    ask = ["-m", "kvedit", "--store", str(options.store), "ask", options.prompt]
    ways = {"kvedit ask": [*ask, "--max-new-tokens", limit]}
    for dtype in DTYPES:
        ways[f"transformers, {dtype}"] = ["-c", PLAIN, model, dtype, options.prompt, limit]
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for turn in range(options.repeats):
        for name, words in ways.items():
            emit(Status(phase=f"{name}, {turn + 1} of {options.repeats}"))
            runs[name].append(_run(words))
    return AnswerResult(model, options.prompt, {name: tuple(one) for name, one in runs.items()})


def _run(words: Sequence[str]) -> Run:
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        answer = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UsageError(f"{' '.join(words[:2])} ended with exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    spent = usage.ru_utime + usage.ru_stime
    return Run(time.perf_counter() - began, spent, unit * usage.ru_maxrss, answer.strip())


def tables(result: AnswerResult) -> list[Table]:
    """One row for each way: medians, and the answer of the last run."""
    rows = [
        (
            name,
            str(len(runs)),
            f"{median(run.seconds for run in runs):.1f}",
            f"{median(run.cpu_seconds for run in runs):.1f}",
            f"{max(run.memory for run in runs) / 2**30:.2f}",
            runs[-1].answer[:60],
        )
        for name, runs in result.runs.items()
    ]
    columns = ("way", "n", "seconds", "CPU seconds", "peak GiB", "answer")
    return [Table(f"{result.prompt} (ratio {result.ratio:.2f})", columns, tuple(rows))]
