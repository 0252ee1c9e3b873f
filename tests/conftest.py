"""A small base model and stores made with it, once for each test run; heavy imports inside."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_engine import StoreTemplate, make_engine, random_train

if TYPE_CHECKING:
    from kvedit import KnowledgeBase
    from kvedit.model.loading import BaseModel
    from kvedit.training.engine import Engine


def pytest_configure() -> None:
    """Make processes that tests start stoppable: a shell's background job ignores Ctrl-C, and so
    does all it starts; a test that interrupts a command would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def settings_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Consent that a test gives is not this user's."""
    folder = tmp_path_factory.mktemp("settings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVEDIT_CONFIG_DIR", str(folder))
        yield folder


@pytest.fixture
def ram_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: thousands of fsyncs take minutes on a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the small model: ``fp32`` and ``bf16``."""
    from small_model import build

    return build(tmp_path_factory.mktemp("small"))


@pytest.fixture
def load(small: dict[str, Path]) -> Callable[[str], BaseModel]:
    """Load the small model, by dtype; a new copy each time."""
    from kvedit.model import loading

    return lambda dtype: loading.load(str(small[dtype]))


@pytest.fixture
def base(load: Callable[[str], BaseModel]) -> BaseModel:
    """The small model in fp32, this test's own."""
    return load("fp32")


@pytest.fixture
def engine(load: Callable[[str], BaseModel]) -> Engine:
    """An engine over the small model as it is served, in bf16, that protects what it knows."""
    return make_engine(load("bf16"))


@pytest.fixture(scope="session")
def empty_template(
    small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> StoreTemplate:
    """A store for the small model (bf16) without facts."""
    from small_model import settings

    from kvedit.editing.knowledge_base import KnowledgeBase

    path = tmp_path_factory.mktemp("template") / "store"
    path.mkdir()
    (path / "kvedit.toml").write_text(settings(), encoding="utf-8")
    events: list[Any] = []
    with KnowledgeBase.create(path, small["bf16"], on_event=events.append) as knowledge:
        digests = tuple(row.weights_digest for row in knowledge.store.revisions())
    return StoreTemplate(path, (), digests, tuple(events))


@pytest.fixture(scope="session")
def trained_template(
    empty_template: StoreTemplate, tmp_path_factory: pytest.TempPathFactory
) -> StoreTemplate:
    """A store with the first three facts, added one by one."""
    from small_model import FREE

    from kvedit.editing.knowledge_base import KnowledgeBase

    path = tmp_path_factory.mktemp("template") / "trained"
    shutil.copytree(empty_template.path, path)
    events: list[Any] = []
    with KnowledgeBase.open(path, on_event=events.append) as knowledge:
        reports = tuple(knowledge.add(*fact) for fact in FREE[:3])
        digests = tuple(row.weights_digest for row in knowledge.store.revisions())
    return StoreTemplate(path, reports, digests, tuple(events))


@pytest.fixture
def empty_store(empty_template: StoreTemplate, tmp_path: Path) -> Path:
    """A store without facts, this test's own."""
    return Path(shutil.copytree(empty_template.path, tmp_path / "store"))


@pytest.fixture
def trained_store(trained_template: StoreTemplate, tmp_path: Path) -> Path:
    """A store with three facts, this test's own."""
    return Path(shutil.copytree(trained_template.path, tmp_path / "store"))


@pytest.fixture
def events() -> list[Any]:
    """The events of the stores that ``empty`` and ``trained`` opened."""
    return []


@pytest.fixture
def empty(empty_store: Path, events: list[Any]) -> Iterator[KnowledgeBase]:
    """``empty_store``, opened."""
    from kvedit import KnowledgeBase

    with KnowledgeBase.open(empty_store, on_event=events.append) as knowledge:
        yield knowledge


@pytest.fixture
def trained(trained_store: Path, events: list[Any]) -> Iterator[KnowledgeBase]:
    """``trained_store``, opened."""
    from kvedit import KnowledgeBase

    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        yield knowledge


@pytest.fixture
def random_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace training by a small random delta, another one each time: it takes no time."""
    from kvedit.training.engine import Engine

    monkeypatch.setattr(Engine, "train", random_train())
