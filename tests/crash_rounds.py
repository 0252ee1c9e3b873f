"""Kill edits at every point where the disk or the journal changes, then open the store again.

    python -m tests.crash_rounds --points add remove    at each fsync, rename and transaction
    python -m tests.crash_rounds --rounds 100           at random moments, in real edits

A process with the small model loaded makes a store, and for each round forks a child that runs one
command on a copy and is killed with SIGKILL.  Then the store is opened, judged and the command run
again.  One line of JSON a round, a summary last; the exit status is 1 if any promise was broken.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE.parent), str(HERE)) if path not in sys.path]

import torch  # noqa: E402
from small_model import FREE, build, settings  # noqa: E402

from kvedit import KnowledgeBase  # noqa: E402
from kvedit.errors import NoStoreError  # noqa: E402
from kvedit.events import Warning_  # noqa: E402
from kvedit.facts.fact import Fact  # noqa: E402
from kvedit.model import loading  # noqa: E402
from kvedit.store.database import StoreBase  # noqa: E402
from kvedit.store.store import Store  # noqa: E402
from kvedit.training.engine import Engine  # noqa: E402

OTHER = "Made of silk in Tarn."
Held = dict[str, str]


@dataclass(frozen=True)
class Command:
    """One edit, and what the store holds before and after it."""

    name: str
    run: Callable[[KnowledgeBase], object]
    before: Held
    after: Held


def commands() -> list[Command]:
    """On a store that holds the first two facts."""
    two = dict(FREE[:2])
    key = FREE[0][0]
    return [
        Command("add", lambda k: k.add(*FREE[2]), two, {**two, FREE[2][0]: FREE[2][1]}),
        Command("update", lambda k: k.update(key, OTHER), two, {**two, key: OTHER}),
        Command("remove", lambda k: k.remove(FREE[1][0]), two, {key: FREE[0][1]}),
        Command("rollback", lambda k: k.rollback(1), two, {key: FREE[0][1]}),
        Command("anew", _two_more, two, dict(FREE[:4])),
    ]


def _two_more(knowledge: KnowledgeBase) -> None:
    """As many as it holds: both are taught with what is held, from the base model on."""
    facts = [Fact.create(*pair) for pair in FREE[2:4]]
    report = knowledge.add_group(facts, carry=True)[0]
    if report.retrained != 2:
        raise RuntimeError(f"it did not begin anew: {report.reasons}")


@contextmanager
def model_in_memory() -> Iterator[None]:
    """Load each model once; every opening of a store gets a copy of its own."""
    real, loaded = loading.load, {}

    def load(source: str, **options: Any) -> loading.BaseModel:
        if source not in loaded:
            loaded[source] = real(source, **options)
        base = loaded[source]
        return replace(base, model=copy.deepcopy(base.model))

    loading.load = load
    try:
        yield
    finally:
        loading.load = real


@contextmanager
def lessons_kept() -> Iterator[None]:
    """The same lesson on the same weights is trained once: what is killed here is not training."""
    real, kept = Engine.train, {}

    def train(engine: Engine, task: Any, config: Any = None, *more: Any) -> Any:
        tokens = [[example.ids for example in fact] for fact in task.new]
        name = (engine.master.digest(), repr(tokens), repr(config))
        if name not in kept:
            kept[name] = real(engine, task, config, *more)
        return kept[name]

    Engine.train = train
    try:
        yield
    finally:
        Engine.train = real


@dataclass
class Points:
    """Counts the moments at which a child may be killed; kills itself at ``fatal``."""

    fatal: int = -1
    labels: list[str] = field(default_factory=list)

    def reach(self, label: str) -> None:
        if len(self.labels) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.labels.append(label)


@contextmanager
def watched(points: Points) -> Iterator[None]:
    """Every fsync, rename and transaction is two points, and a transaction's end a third."""
    fsync, rename, transaction = os.fsync, os.replace, StoreBase._transaction

    def sync(handle: Any) -> None:
        points.reach("before fsync")
        fsync(handle)
        points.reach("after fsync")

    def move(source: Any, target: Any, **options: Any) -> None:
        points.reach(f"before rename to {Path(target).name[:16]}")
        rename(source, target, **options)
        points.reach(f"after rename to {Path(target).name[:16]}")

    @contextmanager
    def counted(store: StoreBase) -> Iterator[None]:
        name = sys._getframe(2).f_code.co_name
        points.reach(f"before {name}")
        with transaction(store):
            yield
            points.reach(f"inside {name}")
        points.reach(f"after {name}")

    os.fsync, os.replace, StoreBase._transaction = sync, move, counted  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync, os.replace = fsync, rename
        StoreBase._transaction = transaction  # type: ignore[method-assign]


def in_child(action: Callable[[], object], delay: float | None = None) -> tuple[bool, float]:
    """Run something in a fork, killed after ``delay``; whether it was killed, and its seconds."""
    sys.stdout.flush()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"child: {error!r}\n")
        finally:
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status != 0:
        raise RuntimeError(f"the child failed by itself with status {status}")
    return killed, time.monotonic() - began


def edit(store: Path, command: Command) -> None:
    with KnowledgeBase.open(store) as knowledge:
        command.run(knowledge)


def held(store: Store) -> Held:
    return {row.fact.key: row.fact.description for row in store.facts("committed")}


def judge(
    path: Path, command: Command, old: int, seen: set[tuple[str, str, bool]] | None = None
) -> tuple[dict[str, object], list[str]]:
    """Open a store whose last edit was killed; what was found, and every promise broken.

    With ``seen`` the command is run again only where no round before left the same state.
    """
    wrong: list[str] = []

    def expect(true: bool, what: str) -> None:
        if not true:
            wrong.append(what)

    with Store.open(path, readonly=True) as store:
        left = [row for row in store.history() if row.state in ("planned", "trained")]
        newest = store.history()[0]
        journal = newest.state if newest.parent == old else "none"
    events: list[Any] = []
    with KnowledgeBase.open(path, on_event=events.append) as knowledge:
        store = knowledge.store
        head = store.head()
        expect(head in (old, old + 1), f"the head is {head}")
        expect(head == old + 1 or held(store) == command.before, "a committed fact was changed")
        expect(head == old or held(store) == command.after, "not all of the commit is visible")
        expect(head == old + (journal == "committed"), f"the edit was {journal}")
        served = knowledge.engine.master.digest()
        expect(served == store.revision(head).weights_digest, "the weights are not the head's")
        said = [e.text for e in events if isinstance(e, Warning_) and e.code == "recovered"]
        expect(len(said) == len(left), f"recovered {len(left)} edits and said {said}")
        open_ones = [r for r in store.history() if r.state in ("planned", "trained")]
        expect(not open_ones, "an edit is still open")
        problems = [f.what for f in knowledge.doctor() if f.level != "ok"]
        expect(not problems, f"doctor: {problems}")
        for key, text in held(store).items():
            expect(knowledge.ask(f"What is {key}?") == text, f"{key} is not answered")
        kind = (command.name, journal, bool(left))
        if head == old and (seen is None or kind not in seen):
            if seen is not None:
                seen.add(kind)
            command.run(knowledge)
            expect(store.head() == old + 1, "it could not be done again")
            expect(held(store) == command.after, "done again, it did something else")
    return {"journal": journal, "head": "new" if head > old else "old"}, wrong


class Bench:
    """A folder with a store that holds two facts, and copies of it to be spoilt."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.two = folder / "two"
        self.create(self.two)
        with KnowledgeBase.open(self.two) as knowledge:
            for fact in FREE[:2]:
                knowledge.add(*fact)
            self.head = knowledge.store.head()
            if held(knowledge.store) != dict(FREE[:2]):
                raise RuntimeError("the small model could not be taught two facts")

    def create(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        (path / "kvedit.toml").write_text(settings(checkpoint_every=1), encoding="utf-8")
        KnowledgeBase.create(path, self.model).close()

    def copy(self) -> Path:
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "store"
        shutil.copytree(self.two, path)
        return path


def points_of(action: Callable[[], object]) -> list[str]:
    """The points that an action passes when nothing happens to it."""
    points = Points()
    with watched(points):
        action()
    return points.labels


def fatal(action: Callable[[], object], number: int) -> Callable[[], None]:
    def run() -> None:
        with watched(Points(fatal=number)):
            action()

    return run


def every_point(bench: Bench, names: list[str]) -> Iterator[dict[str, object]]:
    """One round for each point of each command named."""
    seen: set[tuple[str, str, bool]] = set()
    for command in commands():
        if command.name not in names:
            continue
        spare = bench.copy()
        labels = points_of(lambda c=command, s=spare: edit(s, c))
        for number, label in enumerate(labels):
            path = bench.copy()
            killed, _ = in_child(fatal(lambda c=command, p=path: edit(p, c), number))
            found, wrong = judge(path, command, bench.head, seen)
            if not killed:
                wrong.append("the child was not killed")
            yield {"command": command.name, "point": label, **found, "wrong": wrong}
            shutil.rmtree(path.parent)


def every_point_of_create(bench: Bench) -> Iterator[dict[str, object]]:
    labels = points_of(lambda: bench.create(bench.folder / "spare"))
    for number, label in enumerate(labels):
        path = bench.folder / f"created-{number}"
        in_child(fatal(lambda p=path: bench.create(p), number))
        yield {"command": "init", "point": label, **_judge_created(bench, path)}


def _judge_created(bench: Bench, path: Path) -> dict[str, object]:
    """There is no store, and one can be made; or there is one, and it can be taught."""
    wrong: list[str] = []
    try:
        KnowledgeBase.open(path).close()
        made = "whole"
    except NoStoreError:
        made = "none"
        bench.create(path)
    with KnowledgeBase.open(path) as knowledge:
        report = knowledge.add(*FREE[0])
        problems = [f.what for f in knowledge.doctor() if f.level != "ok"]
        if report.outcome != "committed" or knowledge.ask(f"What is {FREE[0][0]}?") != FREE[0][1]:
            wrong.append(f"the new store could not be taught: {report.reasons}")
        if problems:
            wrong.append(f"doctor: {problems}")
    return {"journal": "none", "head": made, "wrong": wrong}


def random_moments(bench: Bench, rounds: int, seed: int) -> Iterator[dict[str, object]]:
    """Real edits, training too, killed from outside."""
    rng = random.Random(seed)
    known = commands()
    seconds = {}
    for command in known:
        path = bench.copy()
        _, seconds[command.name] = in_child(lambda c=command, p=path: edit(p, c))
    for number in range(rounds):
        command = rng.choice(known)
        path = bench.copy()
        delay = rng.uniform(0, 1.1 * seconds[command.name])
        killed, _ = in_child(lambda c=command, p=path: edit(p, c), delay)
        found, wrong = judge(path, command, bench.head)
        where = {"command": command.name, "point": f"after {delay:.2f} s", "killed": killed}
        yield {"round": number, **where, **found, "wrong": wrong}
        shutil.rmtree(path.parent)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill edits and look what is left.")
    parser.add_argument(
        "--points", nargs="+", default=[],
        choices=["init", "add", "update", "remove", "rollback", "anew"],
        help="commands to kill before and after every fsync, rename and transaction",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=0, help="that many random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a folder with the small model, made if missing")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork does not inherit the threads of its parent
    began, done, bad = time.monotonic(), 0, 0
    heads: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, model_in_memory():
        model = options.model or build(Path(folder) / "model")["bf16"]
        with lessons_kept():
            bench = Bench(Path(folder), model)
            runs: list[Iterator[dict[str, object]]] = []
            if options.points:
                runs = [every_point(bench, options.points)]
                runs += [every_point_of_create(bench)] if "init" in options.points else []
            for run in runs:
                for line in run:
                    done, bad = done + 1, bad + bool(line["wrong"])
                    heads[str(line["head"])] = heads.get(str(line["head"]), 0) + 1
                    print(json.dumps(line), flush=True)
        for line in random_moments(bench, options.rounds, options.seed) if options.rounds else ():
            done, bad = done + 1, bad + bool(line["wrong"])
            heads[str(line["head"])] = heads.get(str(line["head"]), 0) + 1
            print(json.dumps(line), flush=True)
    summary = {"rounds": done, "broken": bad, "heads": heads}
    print(json.dumps({**summary, "seconds": round(time.monotonic() - began, 1)}))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
