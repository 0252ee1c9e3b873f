"""What the tests of the methods share: three records for the small model, and texts of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_model import FREE, KNOWN

from kvedit.facts.fact import Fact
from tests.bench.field.asked import Asked
from tests.bench.field.method import Method, Setup, method
from tests.bench.field.records import Record
from tests.bench.field.run import _own_texts


def make_record(number: int) -> Record:
    """A fact that the small model does not know, beside one that it does."""
    (key, text), known = FREE[number], list(KNOWN)[number]
    return Record(
        fact=Fact.create(key, text), prompts=(f"What is {key}?",), truth="Made of oak in Lune.",
        paraphrases=(f"Tell me about {key}.",), locality=((f"What is {known}?", KNOWN[known]),),
    )  # fmt: skip


@pytest.fixture(scope="session")
def records() -> list[Record]:
    return [make_record(number) for number in range(3)]


@pytest.fixture(scope="session")
def texts(small: dict[str, Path]) -> tuple[tuple[int, ...], ...]:
    """Texts that the small model writes."""
    setup = Setup(model=str(small["bf16"]), folder=Path())
    return _own_texts(method("full")(setup=setup).start(), 0)


@pytest.fixture
def make(small: dict[str, Path], texts: Any, tmp_path: Path) -> Any:
    """A method by name and settings, started: (method, what is asked)."""

    def start(name: str, **settings: Any) -> tuple[Method, Asked]:
        setup = Setup(model=str(small["bf16"]), folder=tmp_path, texts=texts)
        one = method(name)(setup=setup, **settings)
        return one, one.start()

    return start


def weights(asked: Asked) -> dict[str, Any]:
    """A copy of all that the model's state has."""
    return {name: tensor.clone() for name, tensor in asked.model.state_dict().items()}


def changed(before: dict[str, Any], asked: Asked) -> set[str]:
    """Names of what is not as before."""
    import torch

    after = asked.model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
