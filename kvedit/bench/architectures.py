"""Whether models of an architecture can be edited, tried on a small one with random weights.

Invariants:
- Nothing is downloaded: a model is made from its configuration, shrunk to two narrow blocks.
- A model that breaks is a row that says why; the others go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvedit.bench.memory import FACT, OPEN_GATE
from kvedit.bench.speed import Emit, temporary_store
from kvedit.bench.tables import Table
from kvedit.events import Status
from kvedit.model.loading import EMBEDDED_PATH
from kvedit.model.targets import TARGETS

SMALL = {
    "hidden_size": 64, "n_embd": 64, "word_embed_proj_dim": 64, "intermediate_size": 128,
    "ffn_dim": 128, "ffn_hidden_size": 128, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "rotary_dim": 8, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "query_pre_attn_scalar": 16,
    "max_position_embeddings": 512, "n_positions": 512,
    "attention_types": [[["global", "local"], 1]], "layer_types": None, "sliding_window": None,
}  # fmt: skip
"""What a configuration is shrunk to, where it has a value of the name."""
_DERIVED = ("attention_layers", "layer_types")  # computed from what is shrunk
_SPECIAL = ("bos", "eos", "pad")
NOTES = "An architecture passes if an edit changes its weights, and undo and export are exact."


@dataclass(slots=True, kw_only=True)
class ArchitectureRow:
    """What one architecture did; None: not reached. ``matrices``: how many an edit touches."""

    name: str
    matrices: int = 0
    edited: bool | None = None
    exported: bool | None = None
    undone: bool | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitecturesResult:
    """A row for each architecture."""

    model: str
    rows: tuple[ArchitectureRow, ...]

    @property
    def passed(self) -> bool:
        """Whether all of them could be edited, exported and undone."""
        return all(row.edited and row.exported and row.undone for row in self.rows)


def architectures(
    model: str | None, families: Sequence[str], emit: Emit, *, trust: bool = False
) -> ArchitecturesResult:
    """Try the architecture of a model, the named families, or all that are known."""
    rows = []
    for name in [model] if model else families or sorted(TARGETS):
        emit(Status(phase=f"trying {name}"))
        rows.append(row := ArchitectureRow(name=name))
        with TemporaryDirectory(prefix="kvedit-bench-") as folder:
            try:
                build(Path(folder), model or EMBEDDED_PATH, None if model else name, trust)
                _try(row, Path(folder), trust, emit)
            except Exception as error:  # the border of one row: however it breaks is the finding
                row.problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ArchitecturesResult(model=model or "random weights", rows=tuple(rows))


def build(folder: Path, source: str | Path, family: str | None, trust: bool) -> None:
    """Save a small random model of a family, or of the architecture of ``source``, with the
    tokenizer of ``source``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    auto_config: Any = AutoConfig
    auto_model: Any = AutoModelForCausalLM
    tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
    if family:
        config = auto_config.for_model(family)
    else:
        config = auto_config.from_pretrained(source, trust_remote_code=trust)
    given = config.to_dict()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
    small = {name: value for name, value in SMALL.items() if name in given}
    other = {} if family else {n: value for n, value in given.items() if n not in _DERIVED}
    config = type(config)(**{**other, **small, **ids, "vocab_size": len(tokenizer)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_model.from_config(config, trust_remote_code=trust, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _try(row: ArchitectureRow, folder: Path, trust: bool, emit: Emit) -> None:
    """An edit, an export and an undo."""
    settings = OPEN_GATE.format(steps=20)
    with temporary_store(str(folder), emit, settings, trust=trust) as knowledge:
        master = knowledge.engine.master
        row.matrices, before = len(knowledge.engine.names), master.digest()
        report = knowledge.add_fact(FACT)
        row.edited = report.outcome == "committed" and master.digest() != before
        probes = knowledge.export(folder / "export").probes
        row.exported = probes.passed == probes.n > 0
        knowledge.rollback(0)
        row.undone = master.digest() == before


def tables(result: ArchitecturesResult) -> list[Table]:
    """A row for each architecture."""
    words = {None: "-", True: "yes", False: "NO"}
    rows = tuple(
        (row.name, str(row.matrices), words[row.edited], words[row.exported], words[row.undone],
         row.problem or "-")
        for row in result.rows
    )  # fmt: skip
    columns = ("architecture", "matrices", "edit", "export", "undo", "problem")
    return [Table("Architectures, small models with random weights", columns, rows)]
