"""Kill edits at every point where the disk or the journal changes, then open the store again.

    python -m tests.crash_rounds --points add remove    at each fsync, rename and transaction
    python -m tests.crash_rounds --quick                all commands, at each step of the journal
    python -m tests.crash_rounds --rounds 100           at random moments, in real edits

A process with the small model loaded makes a store, and for each round forks a child that runs one
command on a copy and is killed with SIGKILL.  Then the store is opened, judged and the command run
again.  With ``--quick`` training is replaced by small random deltas that the gate lets pass.  One
line of JSON a round, a summary last; the exit status is 1 if any promise was broken.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE.parent), str(HERE)) if path not in sys.path]

import torch  # noqa: E402
from small_engine import configure, open_gate, random_train  # noqa: E402
from small_model import FREE, OTHER, build  # noqa: E402

from kvedit import KnowledgeBase  # noqa: E402
from kvedit.errors import NoStoreError  # noqa: E402
from kvedit.events import Warning_  # noqa: E402
from kvedit.facts.fact import Fact  # noqa: E402
from kvedit.model import loading  # noqa: E402
from kvedit.revisions import session  # noqa: E402
from kvedit.store.database import StoreBase  # noqa: E402
from kvedit.store.store import Store  # noqa: E402
from kvedit.training.engine import Engine  # noqa: E402

Texts = dict[str, str]
NAMES = ("init", "add", "update", "remove", "rollback", "compaction", "erase", "prune")
JOURNAL = (
    "put_pending", "plan_edit", "mark_trained", "commit_edit", "finish_edit", "add_checkpoint",
    "remove_checkpoint", "set_protected", "add_protected", "set_metas", "mark_pruned", "unlink",
    "VACUUM",
)  # fmt: skip
"""The transactions at which ``--quick`` kills."""


@dataclass(frozen=True)
class Command:
    """One edit, and the texts of the committed facts before and after it.

    ``forgets``: what it removes from files is watched too, and ``gone`` is then in none of them.
    ``commits``: it makes a revision.
    """

    name: str
    run: Callable[[KnowledgeBase], object]
    before: Texts
    after: Texts
    forgets: bool = False
    gone: str = ""
    commits: bool = True


def commands() -> list[Command]:
    """For a store with the first two facts."""
    two = dict(FREE[:2])
    key = FREE[0][0]
    return [
        Command("add", lambda k: k.add(*FREE[2]), two, {**two, FREE[2][0]: FREE[2][1]}),
        Command("update", lambda k: k.update(key, OTHER), two, {**two, key: OTHER}),
        Command("remove", lambda k: k.remove(FREE[1][0]), two, {key: FREE[0][1]}),
        Command("rollback", lambda k: k.rollback(1), two, {key: FREE[0][1]}),
        Command("compaction", _two_more, two, dict(FREE[:4])),
        Command("erase", lambda k: k.erase(key), two, dict(FREE[1:2]), True, FREE[0][1]),
        Command("prune", lambda k: k.prune(2), two, two, forgets=True, commits=False),
    ]


def _two_more(knowledge: KnowledgeBase) -> None:
    """As many as are committed: all four are trained from the base model on."""
    facts = [Fact.create(*pair) for pair in FREE[2:4]]
    report = knowledge.add_group(facts, carry=True)[0]
    if report.retrained != 2:
        raise RuntimeError(f"there was no compaction: {report.reasons}")


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
def training_replaced(substitute: Callable[..., Any]) -> Iterator[None]:
    """Train with something quicker: what is killed is not training."""
    real = Engine.train
    Engine.train = substitute  # type: ignore[method-assign]
    try:
        yield
    finally:
        Engine.train = real  # type: ignore[method-assign]


def cached_train() -> Callable[..., Any]:
    """``Engine.train``, once for the same task on the same weights."""
    real, results = Engine.train, {}

    def train(engine: Engine, task: Any, config: Any = None, *more: Any) -> Any:
        tokens = [[example.ids for example in fact] for fact in task.new]
        name = (engine.master.digest(), repr(tokens), repr(config))
        if name not in results:
            results[name] = real(engine, task, config, *more)
        return results[name]

    return train


@dataclass
class Points:
    """Counts the moments at which a child may be killed; kills itself at ``fatal``."""

    fatal: int = -1
    journal_only: bool = False
    removals: bool = False
    labels: list[str] = field(default_factory=list)

    def reach(self, label: str) -> None:
        if self.journal_only and label.split()[-1] not in JOURNAL:
            return
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

    def unlinked(path: Any, **options: Any) -> None:
        plain = Path(path).name not in ("lock", "lock.json") and ".tmp-" not in str(path)
        if points.removals and plain and os.path.lexists(path):
            points.reach("before unlink")
        unlink(path, **options)

    def vacuumed(store: Store) -> bool:
        connection = store.connection

        class Watched:
            def execute(self, sql: str) -> Any:
                points.reach(f"before {sql.split()[0]}")
                result = connection.execute(sql)
                points.reach(f"after {sql.split()[0]}")
                return result

        store.connection = Watched()  # type: ignore[assignment]
        try:
            return bool(scrub(store))
        finally:
            store.connection = connection

    unlink, scrub = os.unlink, session.scrub
    os.fsync, os.replace, StoreBase._transaction = sync, move, counted  # type: ignore[assignment]
    os.unlink, session.scrub = unlinked, vacuumed
    try:
        yield
    finally:
        os.fsync, os.replace, os.unlink, session.scrub = fsync, rename, unlink, scrub
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


def texts(store: Store) -> Texts:
    return {row.fact.key: row.fact.description for row in store.facts("committed")}


def judge(
    path: Path,
    command: Command,
    old: int,
    seen: set[tuple[str, str, bool]] | None = None,
    quick: bool = False,
) -> tuple[dict[str, object], list[str]]:
    """Open a store whose last edit was killed; its state, and every promise broken.

    With ``seen`` the command is run again only where no round before left the same state.  In
    ``quick`` rounds the facts were not really trained: nothing is asked.
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
        done = head == old + 1 or bool(store.gaps())
        expect(head in (old, old + command.commits), f"the head is {head}")
        expect(done or texts(store) == command.before, "a committed fact was changed")
        expect(not done or texts(store) == command.after, "not all of the commit is visible")
        expect(head == old + (journal == "committed"), f"the edit was {journal}")
        served = knowledge.engine.master.digest()
        expect(served == store.revision(head).weights_digest, "the weights are not the head's")
        recovered = [e.text for e in events if isinstance(e, Warning_) and e.code == "recovered"]
        expect(len(recovered) == len(left), f"of {len(left)} edits it named {recovered}")
        open_ones = [r for r in store.history() if r.state in ("planned", "trained")]
        expect(not open_ones, "an edit is still open")
        kind = (command.name, journal, bool(left) or (done and not command.commits))
        expect(not store.needs_scrub, "the files were not cleaned")
        rest = [p.name for p in path.rglob("*") if p.is_file() and _has(p, command.gone)]
        expect(not (done and command.gone and rest), f"the text is still in {rest}")
        problems = [f.what for f in knowledge.doctor(deep=not quick) if f.level != "ok"]
        expect(not problems, f"doctor: {problems}")
        for key, text in {} if quick else texts(store).items():
            expect(knowledge.ask(f"What is {key}?") == text, f"{key} is not answered")
        if head == old and (seen is None or kind not in seen):
            if seen is not None:
                seen.add(kind)
            command.run(knowledge)
            again = store.head() == old + 1 if command.commits else store.gaps() == {1: "pruned"}
            expect(again, "it could not be done again")
            expect(texts(store) == command.after, "done again, it did something else")
    return {"journal": journal, "head": "new" if done else "old"}, wrong


def _has(path: Path, text: str) -> bool:
    return text.encode() in path.read_bytes()


class Bench:
    """A folder with a store of two facts, and copies of it to be killed in."""

    def __init__(self, folder: Path, model: Path, quick: bool = False) -> None:
        self.folder, self.model, self.quick = folder, model, quick
        self.two = folder / "two"
        self.create(self.two)
        with KnowledgeBase.open(self.two) as knowledge:
            for fact in FREE[:2]:
                knowledge.add(*fact)
            self.head = knowledge.store.head()
            if texts(knowledge.store) != dict(FREE[:2]):
                raise RuntimeError("the small model could not be trained on two facts")

    def create(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        if self.quick:
            open_gate(path, checkpoint_every=1, samples=12, max_samples=12)
        else:
            configure(path, checkpoint_every=1)
        KnowledgeBase.create(path, self.model).close()

    def copy(self) -> Path:
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "store"
        shutil.copytree(self.two, path)
        return path


def points_of(
    action: Callable[[], object], journal_only: bool, removals: bool = False
) -> list[str]:
    """The points that an action passes when nothing happens to it."""
    points = Points(journal_only=journal_only, removals=removals)
    with watched(points):
        action()
    return points.labels


def fatal(
    action: Callable[[], object], number: int, journal_only: bool, removals: bool = False
) -> Callable[[], None]:
    def run() -> None:
        with watched(Points(number, journal_only, removals)):
            action()

    return run


def every_point(bench: Bench, names: Sequence[str]) -> Iterator[dict[str, object]]:
    """One round for each point of each command named."""
    seen: set[tuple[str, str, bool]] = set()
    for command in commands():
        if command.name not in names:
            continue
        spare = bench.copy()
        forgets = command.forgets
        labels = points_of(lambda c=command, s=spare: edit(s, c), bench.quick, forgets)
        for number, label in enumerate(labels):
            path = bench.copy()
            action = fatal(lambda c=command, p=path: edit(p, c), number, bench.quick, forgets)
            killed, _ = in_child(action)
            state, wrong = judge(path, command, bench.head, seen, bench.quick)
            if not killed:
                wrong.append("the child was not killed")
            yield {"command": command.name, "point": label, **state, "wrong": wrong}
            shutil.rmtree(path.parent)


def every_point_of_create(bench: Bench) -> Iterator[dict[str, object]]:
    labels = points_of(lambda: bench.create(bench.folder / "spare"), bench.quick)
    for number, label in enumerate(labels):
        path = bench.folder / f"created-{number}"
        in_child(fatal(lambda p=path: bench.create(p), number, bench.quick))
        yield {"command": "init", "point": label, **_judge_created(bench, path)}


def _judge_created(bench: Bench, path: Path) -> dict[str, object]:
    """There is no store, and one can be made; or there is one, and it takes a fact."""
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
        answered = bench.quick or knowledge.ask(f"What is {FREE[0][0]}?") == FREE[0][1]
        if report.outcome != "committed" or not answered:
            wrong.append(f"the new store took no fact: {report.reasons}")
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
        state, wrong = judge(path, command, bench.head)
        where = {"command": command.name, "point": f"after {delay:.2f} s", "killed": killed}
        yield {"round": number, **where, **state, "wrong": wrong}
        shutil.rmtree(path.parent)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill edits and check what is left.")
    parser.add_argument(
        "--points", nargs="+", default=[],
        choices=NAMES,
        help="commands to kill before and after every fsync, rename and transaction",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="random deltas for training, and kills only at the steps of the journal",
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
        names = options.points or (NAMES if options.quick else [])
        with training_replaced(random_train() if options.quick else cached_train()):
            bench = Bench(Path(folder), model, options.quick)
            runs: list[Iterator[dict[str, object]]] = []
            if names:
                runs = [every_point(bench, names)]
                runs += [every_point_of_create(bench)] if "init" in names else []
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
