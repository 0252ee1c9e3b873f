"""How much memory an edit of a model takes: estimated from its shape, then measured.

Invariants:
- The estimate is the one that ``init`` refuses a model by and that bounds the size of groups.
- A measured edit is cut to a few steps, with an open gate and little protected text: the peak is
  reached in the first steps.  The peak is this process's own, on Linux since the edit began.
"""

import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from kvedit.bench.speed import Emit, Setup, temporary_store
from kvedit.bench.tables import Table
from kvedit.config import Config
from kvedit.errors import ModelError
from kvedit.facts.fact import Fact
from kvedit.model import loading
from kvedit.training import memory as budget

GIB = 1024**3
NOTES = "The estimate is for the CPU and GPU together; the peak is that of the whole process."
FACT = Fact.create("The tide lantern", "A lamp of green glass that burns at low water.", lang="en")
"""For a measurement without facts of the user's own."""
STEPS = 8
OPEN_GATE = """\
[protect]
samples = 64
max_samples = 64
long_answers = 0
short_answers = 16
free_texts = 16
locality_probes = 0
[training]
max_steps = {steps}
[gate]
min_recall = 0.0
min_paraphrase = 0.0
min_locality = 0.0
min_retention = 0.0
[retention]
max_repairs = 0
"""
"""Settings under which any edit is committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryResult:
    """Bytes: the estimate by part, and the peak of one edit of so many steps, where measured."""

    model: str
    estimate: dict[str, int]
    total: int
    steps: int = 0
    peak: int | None = None
    gpu_peak: int | None = None


def memory(setup: Setup, emit: Emit, *, measured: bool = True) -> MemoryResult:
    """Estimate what one fact takes, and add the first one of ``setup``."""
    config = Config.load(setup.config) if setup.config else Config()
    source = loading.locate(setup.model)
    outline = loading.outline(source, revision=None, trust_remote_code=False)
    if outline is None:
        raise ModelError(
            f"{source} cannot be outlined without its weights and its own code",
            hint="Give a model that needs no code of its own.",
        )
    needed = budget.Sizes(outline).estimate(config.training)
    result = MemoryResult(model=source, estimate=asdict(needed), total=needed.total)
    if not measured:
        return result
    with temporary_store(setup.model, emit, OPEN_GATE.format(steps=STEPS)) as knowledge:
        restart_peak()
        report = knowledge.add_fact(setup.facts[0] if setup.facts else FACT)
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return replace(result, steps=report.steps, peak=peak_memory(), gpu_peak=gpu)


def restart_peak() -> None:
    """Let the system and a GPU forget the peak so far, where they can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """The most memory that this process had resident since ``restart_peak``, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def tables(result: MemoryResult) -> list[Table]:
    """The parts of the estimate, and the measured peak beside their sum."""
    sizes = result.estimate | {"in all": result.total}
    peaks = {"system memory": result.peak, "GPU memory": result.gpu_peak}
    measured = [_table(f"Measured peak of one edit of {result.steps} steps", peaks)]
    return [_table("Estimated for one fact", sizes), *(measured if result.peak else [])]


def _table(title: str, sizes: Mapping[str, int | None]) -> Table:
    rows = [(name, f"{size / GIB:.2f}") for name, size in sizes.items() if size is not None]
    return Table(title, ("what", "GiB"), tuple(rows))
