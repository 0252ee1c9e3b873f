"""The whole journal as one LoRA adapter over the untouched base model.

The sum of all deltas is decomposed matrix by matrix (SVD) and cut to one rank for all of them, the
smallest multiple of 8 with which every probe that the store's model passes still passes.

Invariants:
- The folder holds no weights of the base model; PEFT alone loads it over them.
- What is reported was computed by the adapter as PEFT loads it from the folder, not by our sums.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvedit.adapter.deltas import Factors, leading
from kvedit.errors import UsageError
from kvedit.model import loading, scoring
from kvedit.model.prompts import Example
from kvedit.revisions.export import peft_format
from kvedit.revisions.export.hf import ExportReport, building, compare, save_tokenizer
from kvedit.training.engine import Engine

FULL_SVD = 2048
"""Matrices whose smaller side is wider are decomposed up to ``MAX_RANK`` terms only."""
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as the largest
MAX_RANK = SERVED_RANKS[-1]
RANK_STEP = 8
"""Ranks are multiples of it: kernels of servers take no other ones, or are slow at them."""
ASKED_TOGETHER = 32  # probes
_NOISE = 1e-5  # singular values below this share of the largest are rounding


def write(
    engine: Engine,
    examples: Sequence[Example],
    others: Sequence[Example],
    directory: Path,
    *,
    revision: int,
    progress: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Find the smallest rank that holds, write the adapter, load it with PEFT and compare answers.

    ``examples`` must all be answered; of ``others`` (unseen phrasings, locality probes) those that
    the store's model answers.  Raises UsageError when nothing differs from the base model.
    """
    progress("decomposing the edits")
    deltas = {n: d for n, d in engine.master.accumulated_delta().items() if bool(d.any())}
    if not deltas:
        raise UsageError(
            f"revision {revision} has the weights of the base model: there is no change to export",
            hint="Add a fact first: kvedit add KEY FILE",
        )
    terms = {name: decompose(change) for name, change in deltas.items()}
    probes = [*examples, *others]
    outcomes = engine.recall(probes)
    passing = [probe for probe, outcome in zip(probes, outcomes, strict=True) if outcome.passed]
    rank = _smallest_rank(engine, terms, passing, progress)
    cut = {name: _cut(factors, rank) for name, factors in terms.items()}
    with building(directory) as folder:
        _write(engine, folder, cut)
        save_tokenizer(engine, folder)
    progress("loading the adapter and asking it again")
    report = compare(engine, loaded(engine, directory), examples, directory, revision)
    serve = _server_command(engine.base.path, directory, rank)
    return replace(report, rank=rank, error=_error(deltas, cut), serve=serve)


def _server_command(base: str, directory: Path, rank: int) -> str:
    """vLLM takes a few values as the largest rank: the least that is enough."""
    largest = next((most for most in SERVED_RANKS if most >= rank), rank)
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(largest)]
    return shlex.join([*words, "--lora-modules", f"edited={directory}"])


def decompose(change: Tensor) -> Factors:
    """A change of a matrix, (out, in), as its singular terms, the largest first; fp32."""
    if min(change.shape) <= FULL_SVD:
        u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    else:
        left, right, _ = leading(change, MAX_RANK)
        s = torch.einsum("or,oi,ir->r", left, change, right)
        u, v = left, right.T
    count = max(1, int((s > _NOISE * s[0]).sum()))
    root = s[:count].clamp_min(0).sqrt()
    return Factors((u[:, :count] * root).float(), (root[:, None] * v[:count]).float())


def _cut(factors: Factors, rank: int) -> Factors:
    """The first ``rank`` terms, filled up with zeros, so that all matrices have one rank."""
    missing = max(0, rank - factors.rank)
    b, a = factors.b[:, :rank], factors.a[:rank]
    return Factors(functional.pad(b, (0, missing)), functional.pad(a, (0, 0, 0, missing)))


def _smallest_rank(
    engine: Engine,
    terms: Mapping[str, Factors],
    passing: Sequence[Example],
    progress: Callable[[str], None],
) -> int:
    """By bisection, the smallest multiple of ``RANK_STEP`` with which every passing probe still
    passes; the largest if none is enough.
    """
    most = -(-max(factors.rank for factors in terms.values()) // RANK_STEP)
    largest = most * RANK_STEP
    full = {name: _cut(factors, largest) for name, factors in terms.items()}
    with TemporaryDirectory(prefix="kvedit-") as folder:
        _write(engine, Path(folder), full)
        wrapped = loaded(engine, Path(folder))
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        progress(f"trying rank {middle * RANK_STEP} of {largest}")
        peft_format.cut(wrapped, full, middle * RANK_STEP)
        if _all_pass(wrapped, passing):
            high = middle
        else:
            low = middle + 1
    return high * RANK_STEP


def _all_pass(model: Any, probes: Sequence[Example]) -> bool:
    """Whether every probe passes; asked until one does not."""
    starts = range(0, len(probes), ASKED_TOGETHER)
    parts = (probes[at : at + ASKED_TOGETHER] for at in starts)
    return all(one.passed for part in parts for one in scoring.recall(model, part))


def _write(engine: Engine, folder: Path, factors: Mapping[str, Factors]) -> None:
    modules = [engine.base.model.get_submodule(name) for name in factors]
    layers = [getattr(module, "base_layer", module) for module in modules]  # without an adapter
    conv = not all(isinstance(layer, torch.nn.Linear) for layer in layers)
    peft_format.write(folder, factors, base=engine.base.path, conv=conv)


def loaded(engine: Engine, folder: Path) -> Any:
    """A fresh base model under the adapter, as transformers' own class: PEFT wraps it in place."""
    fresh = loading.reload(engine.base)
    peft_format.load(fresh.model, folder)
    return fresh.model


def _error(deltas: Mapping[str, Tensor], cut: Mapping[str, Factors]) -> float:
    """The share of the change that is left out, in the Frobenius norm over all matrices."""
    lost = sum(float((deltas[n] - f.b @ f.a).square().sum()) for n, f in cut.items())
    total = sum(float(change.square().sum()) for change in deltas.values())
    return float((lost / total) ** 0.5)
