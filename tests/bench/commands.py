"""The benchmarks as commands, thin over their measurements; tables on stdout, progress on stderr.

Invariant: as everywhere in the command line, what is heavy is imported when a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import KveditGroup, Settings, configure_logging
from kvedit.errors import GateFailedError, UsageError
from tests.bench import options as o


@click.group(cls=KveditGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.pass_context
def bench(ctx: click.Context, quiet: bool) -> None:
    """Measure what kvedit promises, on real facts.

    Each measurement prints tables, and a Markdown block with command, commit and machine for the
    log. `data` says which public files belong into the folder of --data. What --json kept is drawn
    by plot.

    \b
    Examples:
      python -m tests.bench data --data data
      python -m tests.bench retain --data data
      python -m tests.bench plot strategies.json -o strategies.png
    """
    configure_logging(0)
    ctx.obj = Settings(verbosity=-1 if quiet else 0)


class Run:
    """One command: its options, and showing, keeping and drawing what its measurement returns."""

    def __init__(self, settings: Settings, name: str, given: dict[str, Any]) -> None:
        self._settings, self._name, self._began = settings, name, datetime.now(UTC)
        self._json, self._plot = given.pop("json_file", None), given.pop("plot", None)
        self._seed = given.get("seed")
        if not given.pop("baseline", True):
            given["baseline_facts"] = 0
        if given.get("resume") and given["store_dir"] is None:
            raise UsageError("--resume needs the --store-dir of the run that was stopped")

    @property
    def json_file(self) -> Path | None:
        """Where the document is kept."""
        return self._json

    def __call__(
        self,
        measure: Callable[..., Any],
        options: Any,
        tables: Callable[[Any], Sequence[Any]],
        notes: Callable[[Any], str] = lambda result: "",
        line: Callable[[Any], str] | None = None,
    ) -> Any:
        """Measure and show; with ``line`` each point is written and said as soon as it is there."""
        from kvedit.bench.tables import print_tables
        from kvedit.cli.progress import make_reporter
        from tests.bench.documents import markdown

        with make_reporter(quiet=self._settings.quiet) as reporter:

            def tell(result: Any, point: Any) -> None:
                self._keep(self._document(result, tables, notes))
                if point is not None and line is not None:
                    reporter.say(line(point))

            more = {} if line is None else {"tell": tell}
            result = measure(options, emit=reporter, **more)
        document = self._document(result, tables, notes)
        print_tables(document)
        click.echo(markdown(document))
        self._keep(document)
        if self._plot is not None:
            from tests.bench import plots

            plots.draw(document, self._plot)
        return result

    def _document(
        self, result: Any, tables: Callable[[Any], Sequence[Any]], notes: Callable[[Any], str]
    ) -> dict[str, Any]:
        from kvedit.bench.tables import document

        words = ["python", "-m", "tests.bench", *sys.argv[1:]]
        return document(
            self._name, words, self._began, result, tables(result), seed=self._seed,
            notes=notes(result),
        )  # fmt: skip

    def _keep(self, document: dict[str, Any]) -> None:
        if self._json is not None:
            from tests.bench.documents import write

            write(self._json, document)


def require(passed: bool, message: str) -> None:
    """Exit code 4 for a measurement that failed."""
    if not passed:
        raise GateFailedError(message, hint="See the table above.")


def command(*given: o.Option) -> Callable[[Callable[..., None]], click.Command]:
    """A command of the group: its body gets a ``Run`` and the values of these options."""

    def add(body: Callable[..., None]) -> click.Command:
        def call(settings: Settings, /, **values: Any) -> None:
            body(Run(settings, body.__name__, values), values)

        function: Any = click.pass_obj(call)
        for option in reversed(given):
            function = option(function)
        return bench.command(name=body.__name__, help=body.__doc__)(function)

    return add


@command(
    *o.common, o.facts(20), *o.others, o.base_sample, *o.baseline, o.plot,
    o.number("--true-facts", "Add the facts a second time, with N facts of the model's own"
             " pretraining protected.", 0, low=0, metavar="N"),
)  # fmt: skip
def retain(run: Run, given: dict[str, Any]) -> None:
    """Add facts one by one; measure what stays, what it costs, and the baseline beside it.

    What was known before is asked again after 1, 2, 5, 10, 20, ... facts, by free generation. With
    --true-facts there is a second row for a store that protects true facts besides what the model
    says; none of those is asked.

    \b
    Examples:
      python -m tests.bench retain --data data
      python -m tests.bench retain --data data --facts 5 --no-baseline --plot kept.png
    """
    from tests.bench import report
    from tests.bench.retain import BenchOptions, retain

    run(retain, BenchOptions(**given), report.retain_tables, report.retain_notes)


@command(
    *o.common, o.facts(64), *o.others, o.base_sample, *o.baseline, o.plot, o.resume,
    click.option("--group", "groups", callback=o.group_sizes, multiple=True, metavar="N|all|auto",
                 default=("1", "16", "all", "auto"), show_default=True,
                 help="Facts trained together; may be given more than once."),
)  # fmt: skip
def strategies(run: Run, given: dict[str, Any]) -> None:
    """Train the same facts one by one, in groups, all at once, and by the baseline.

    Each strategy is one run of ingest into a new store. What holds is measured in passing, after
    16, 32, 64, 128, 256, 300, 512, 1000, ... facts and after the last; each measurement is said at
    once, and FILE of --json is written. A kvedit.toml in --store-dir is used for every store. With
    --resume a run that was stopped goes on in --store-dir.

    \b
    Examples:
      python -m tests.bench strategies --data data --plot strategies.svg
      python -m tests.bench strategies --data data --facts 1000 --group auto --json auto.json
    """
    from tests.bench import report_strategies as report
    from tests.bench.strategies import StrategyOptions, strategies

    run(strategies, StrategyOptions(**given), report.tables, report.notes, report.line)


@command(
    o.model, o.seed, o.json_file, o.store_dir, o.resume,
    click.option("--facts", metavar="FILE|NAME", default="glossary", show_default=True,
                 help="JSON Lines with key and description, and prompts and paraphrases where there"
                 " are some; or glossary, glossary-zh, glossary-mixed, which come with this."),
    o.number("--limit", "Take the first N facts.", None, metavar="N"),
    click.option("--untaught", type=o.IN,
                 help="JSON Lines with keys that nobody trains. [facts that --limit leaves out]"),
    click.option("--method", "methods", multiple=True, default=("add", "ingest", "lora"),
                 type=click.Choice(["add", "ingest", "lora", "lora-mixed", "plain"]),
                 show_default=True, help="How to train; may be given more than once."),
    o.abilities,
    click.option("--text", type=o.IN, help="Natural text for the perplexity: lines, or JSON Lines"
                 " with description or text."),
    o.number("--text-tokens", "About how much of it to read.", 8000, metavar="N"),
    o.number("--questions", "General questions that are asked before and after.", 300, low=0,
             metavar="N"),
    click.option("--questions-file", "questions_files", type=o.IN, multiple=True,
                 help="More of them: lines, or JSON Lines with prompt, question or questions."),
    o.number("--asked", "Phrasings of each kind that each fact is asked. [all]", None,
             metavar="N"),
    o.number("--mixed-epochs", "Most passes of lora-mixed over all facts.", 12, metavar="N"),
    click.option("--config", type=o.IN, help="A kvedit.toml with settings to use."),
    click.option("--time", type=click.FloatRange(min=1), metavar="SECONDS",
                 help="How long making the store may take. [its default]"),
)  # fmt: skip
def quality(run: Run, given: dict[str, Any]) -> None:
    """What several methods teach a model, what that changes, and what it costs.

    Each method starts from the same base model, in a process of its own: one by one (add), together
    (ingest), LoRA one by one and on all facts mixed, and the plain recipe. Asked by free generation
    are the facts, general questions, and keys never taught; besides, natural text and multiple
    choice before and after. With --store-dir stores and parts are kept there, and a store in its
    folder store is used; with --resume what was measured is not measured again.

    \b
    Examples:
      python -m tests.bench quality --model DIR --limit 20 --questions-file passages.jsonl
      python -m tests.bench quality --model DIR --method lora --abilities abilities.jsonl
    """
    from tests.bench import report_quality as report
    from tests.bench.quality import QualityOptions, quality

    run(quality, QualityOptions(**given), report.tables, report.notes, report.line)


@command(
    click.option("--base", metavar="NAME_OR_DIR", help="Base model. [the embedded one]"),
    click.option("--data", type=o.IN, required=True, help="JSON Lines with records: CounterFact,"
                 " zsRE, HalluEditBench, or key and description."),
    o.number("--n", "Edit the first N records.", 10, metavar="N"),
    click.option("--methods", metavar="NAME,NAME|all", default="all", show_default=True,
                 callback=o.names, help="Which ways of teaching facts."),
    click.option("--set", "settings", multiple=True, metavar="METHOD.NAME=VALUE",
                 callback=o.settings, help="Change a method's setting, as in rome.contexts=1."),
    click.option("--way", "ways", type=click.Choice(["sequential", "batch"]), multiple=True,
                 default=("sequential",), show_default=True, help="One by one or all together; may"
                 " be given twice. A method that has only the other one is run so."),
    o.number("--known", "Questions about keys that nobody edits.", 60, low=0, metavar="N"),
    o.abilities,
    o.number("--ability-questions", "How many of them, evenly of all tasks.", 90, metavar="N"),
    click.option("--minutes", type=click.FloatRange(min=0), metavar="M", help="End a method after"
                 " the edit in which M minutes are over, and ask then. [no limit]"),
    click.option("--config", type=o.IN, help="A kvedit.toml for kvedit's store."),
    click.option("--time", type=click.FloatRange(min=1), metavar="SECONDS",
                 help="How long making kvedit's store may take. [its default]"),
    click.option("--cost", is_flag=True, help="Only say what the methods are expected to take."),
    o.seed, o.json_file, o.plot, o.store_dir, o.resume,
)  # fmt: skip
def field(run: Run, given: dict[str, Any]) -> None:
    """Every way of teaching facts, side by side, by the scores of the knowledge-editing papers.

    Each method starts from the same base model, in a process of its own, and edits the same records
    one by one; all that was edited so far is asked after 1, 10, 30, 100, 300 and the last. What all
    of it is expected to take is said first. With --store-dir and --resume a method that was
    measured is not measured again.

    \b
    Methods: notebook, lora, full, last-blocks, adapter, prompt-tuning, prefix-tuning, p-tuning,
    p-tuning-v2, lora-fixed, ft-l, ft-m, locft-bf, rome, memit, alphaedit, ultraedit, in-context,
    retrieval, kvedit.

    \b
    Examples:
      python -m tests.bench field --base DIR --data counterfact.jsonl --n 10 --cost
      python -m tests.bench field --data zsre.jsonl --n 30 --methods ft-m,memit,kvedit
    """
    from tests.bench.field import table
    from tests.bench.field.method import METHODS
    from tests.bench.field.run import FieldOptions, field_

    given["methods"] = given["methods"] or tuple(METHODS)
    run(field_, FieldOptions(**given), table.tables, table.notes, table.line)


@command(*o.common, o.facts(128), *o.others, o.base_sample, *o.baseline, o.group("64"), o.plot)
def levers(run: Run, given: dict[str, Any]) -> None:
    """Train the same facts with everything, without one part of the method at a time, and by the
    baseline.

    The parts: the Fisher penalty, the replay of protected text, knowledge extraction, the rehearsal
    of earlier facts, the small weight of easy tokens, and compaction. All start from the same store
    and are asked the same questions, as in strategies.

    \b
    Examples:
      python -m tests.bench levers --data data --plot levers.svg
    """
    from tests.bench import report_strategies as report
    from tests.bench.levers import levers
    from tests.bench.strategies import StrategyOptions

    chosen = StrategyOptions(groups=(given.pop("group"),), **given)
    run(levers, chosen, report.tables, report.notes, report.line)


@command(
    o.json_file,
    click.option("--store", type=o.FOLDER, required=True,
                 help="A store, as a rule after init alone; it is copied, not changed."),
    click.option("--facts", metavar="FILE|NAME", default="glossary", show_default=True,
                 help="JSON Lines with key and description, or a name as in quality."),
    o.number("--limit", "Take the first N facts.", 16, metavar="N"),
    click.option("--variant", "variants", multiple=True, callback=o.several_settings,
                 metavar="SECTION.NAME=VALUE", help="Settings, with spaces between them; may be"
                 " given more than once. The defaults come first."),
)  # fmt: skip
def variants(run: Run, given: dict[str, Any]) -> None:
    """Add one group of facts under several settings, each time to a copy of one store.

    Shows what the gate saw of each: how many facts were learned, unseen phrasings, locality, the
    perplexity of ordinary text, steps and seconds.

    \b
    Examples:
      python -m tests.bench variants --store DIR --variant "training.target_rank=24"
      python -m tests.bench variants --store DIR --facts glossary-mixed --limit 8
    """
    from tests.bench import variants as measured

    chosen = (measured.DEFAULTS, *given.pop("variants"))
    options = measured.VariantsOptions(variants=chosen, **given)
    run(measured.variants, options, measured.tables, line=measured.line)


@command(
    o.data, o.models, o.seed, o.json_file, o.facts(300), *o.others, o.base_sample, o.group("auto"),
    o.resume, o.plot,
)  # fmt: skip
def capacity(run: Run, given: dict[str, Any]) -> None:
    """How many facts a model holds, in facts and in bits, and what those that it loses are like.

    Give --model more than once to set models of several sizes side by side. What holds is measured
    in passing, so that groups of a given size show at which number facts begin to be lost or
    rejected. With --resume a run that was stopped goes on in --store-dir.

    \b
    Examples:
      python -m tests.bench capacity --data data --facts 1000 --json capacity.json
      python -m tests.bench capacity --data data --model small --model large --plot both.png
    """
    from tests.bench import report_capacity as report
    from tests.bench.capacity import capacity
    from tests.bench.report_strategies import line
    from tests.bench.strategies import StrategyOptions

    sources = given.pop("sources") or (None,)
    chosen = StrategyOptions(groups=(given.pop("group"),), baseline_facts=0, **given)
    run(partial(capacity, sources=sources), chosen, report.tables, report.notes, line)


@command(
    *o.common, o.facts(20), *o.others, *o.baseline, o.plot,
    o.number("--ingest-facts", "How many facts to ingest.", 64),
)  # fmt: skip
def speed(run: Run, given: dict[str, Any]) -> None:
    """Seconds a fact one by one, by ingest and by the baseline, and where they go.

    Also peak memory, arithmetic against the machine's own matrix product, and verify of all facts.

    \b
    Examples:
      python -m tests.bench speed --data data --plot speed.png
    """
    from tests.bench import report_speed as report
    from tests.bench.speed import SpeedOptions, speed

    run(speed, SpeedOptions(**given), report.tables, report.notes)


@command(
    o.data, o.model, o.json_file, o.facts(1000), o.kind("known", default="known"), o.facts_file,
    o.store_dir,
)  # fmt: skip
def verify(run: Run, given: dict[str, Any]) -> None:
    """How long verify takes, over a store of facts that is made without training.

    Facts are written down as committed, the weights stay as they are. By default they are poets
    that the model learned in pretraining (--kind known), so that the answers, which decide how long
    generation goes on, are those of a model that recalls its facts.

    \b
    Examples:
      python -m tests.bench verify --data data
    """
    from tests.bench import verification
    from tests.bench.retain import BenchOptions

    run(verification.verification, BenchOptions(**given), verification.tables,
        lambda result: verification.NOTES)  # fmt: skip


@command(*o.common, o.base_sample)
def base(run: Run, given: dict[str, Any]) -> None:
    """What the base model recalls of the facts it was pretrained on, and of others.

    \b
    Examples:
      python -m tests.bench base --data data
    """
    from kvedit.bench.tables import BRACKETS
    from tests.bench import report
    from tests.bench.retain import BenchOptions, base

    def tables(result: Any) -> Any:
        return [report.base_table("Exact greedy recall of the base model", result.base)]

    run(base, BenchOptions(**given), tables, lambda result: BRACKETS)


@command(*o.common, o.facts(20), *o.others)
def rollback(run: Run, given: dict[str, Any]) -> None:
    """Add facts, roll back to every revision, compare digests; export and compare answers.

    Exit code 4 if anything is not as it was.

    \b
    Examples:
      python -m tests.bench rollback --data data --facts 20
    """
    from tests.bench import report
    from tests.bench.retain import BenchOptions
    from tests.bench.undo import undo

    result = run(undo, BenchOptions(**given), report.undo_tables)
    require(result.exact, "not everything was as it had been")


@command(
    *o.common, o.facts(300), *o.others,
    o.number("--kills", "How many processes to kill.", 20, low=0),
    click.option("--within", type=click.FloatRange(min=1.0), default=30.0, show_default=True,
                 help="A kill comes up to this many seconds after its share of the facts."),
    o.group("16"),
)  # fmt: skip
def kills(run: Run, given: dict[str, Any]) -> None:
    """Kill an ingest (SIGKILL) at random moments, let it finish, and see what is left.

    The kills are spread over the whole ingest. Exit code 4 if a fact was lost or added twice, or
    doctor finds anything.

    \b
    Examples:
      python -m tests.bench kills --data data --facts 30 --kills 3 --within 20
    """
    from tests.bench import report
    from tests.bench.kills import KillOptions, kills

    result = run(kills, KillOptions(**given), report.kills_tables)
    require(result.sound, "the store is not as it should be")


@command(
    *o.common, o.facts(16), *o.others,
    o.number("--processes", "How many are compared with one.", 2, low=2),
    o.number("--threads", "Of each process, the single one too.", 1), o.group("8"),
)  # fmt: skip
def several(run: Run, given: dict[str, Any]) -> None:
    """Ingest the same facts in one process and in several; kill one of several.

    Exit code 4 if the runs did not commit and recall the same, or a kill left anything behind.

    \b
    Examples:
      python -m tests.bench several --data data --facts 32 --processes 4
    """
    from tests.bench.several import SeveralOptions, several, tables

    result = run(several, SeveralOptions(**given), tables)
    require(result.equal and result.clean, "several processes did not do what one does")


@command(
    click.argument("names", nargs=-1),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
                 default="float32", show_default=True, help="Type of the base weights."),
    o.json_file,
)  # fmt: skip
def architectures(run: Run, given: dict[str, Any]) -> None:
    """Take tiny trained models of every architecture, or of NAMES, through all that a store does.

    Each is built here, without a download: add three facts, recall and retain them, update, remove,
    roll back to the bit, export, reload. Exit code 4 if any of it fails.

    \b
    Examples:
      python -m tests.bench architectures GPT-2 Mixtral --dtype bfloat16
    """
    from tests.bench import architectures

    def measure(names: Sequence[str], emit: Any) -> Any:
        return architectures.run(names, given["dtype"], emit)

    result = run(measure, given["names"], architectures.tables)
    require(result.passed, "not every architecture passed")


@command(
    click.option("--measure", "shapes", multiple=True,
                 type=click.Choice(["0.5B", "1.5B", "3B", "7B", "14B", "32B"]),
                 help="Make a store for a random model of this shape, on the GPU if there is one,"
                 " and edit it; may be given more than once."),
    o.number("--facts", "Facts trained at once; may be given more than once. [1, 16]", None,
             multiple=True),
    o.number("--steps", "Cut each training to so many steps; seconds for the others are"
             " projected. [all]", None, low=8),
    click.option("--operations", "counted", is_flag=True,
                 help="Also count the operations of a step, and set them against a large matrix"
                 " product of the same machine."),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32",
                 show_default=True, help="Type of the base weights of --measure."),
    o.json_file,
)  # fmt: skip
def memory(run: Run, given: dict[str, Any]) -> None:
    """How much memory editing takes, by model size and setting, computed; or, with --measure, how
    much it took, and how long.

    \b
    Examples:
      python -m tests.bench memory
      python -m tests.bench memory --measure 0.5B --dtype bfloat16 --facts 16 --steps 8 --operations
    """
    from tests.bench import footprint

    chosen = footprint.MemoryOptions(**{**given, "facts": given["facts"] or (1, 16)})
    run(footprint.memory, chosen, footprint.tables)


@command(
    click.option("--moves", is_flag=True, help="Also list each move, and whether it climbs."),
    o.json_file,
)  # fmt: skip
def rooms(run: Run, given: dict[str, Any]) -> None:
    """Count the modules of kvedit that a fact, a group and a question go through.

    A move is a call from one module into another, each pair counted once. It climbs if the caller
    does not import what it calls, directly or through others: it was handed down. Measured on the
    small model of the tests, which is trained first.

    \b
    Examples:
      python -m tests.bench rooms
      python -m tests.bench rooms --moves
    """
    from tests.bench import rooms

    def measure(options: None, emit: Any) -> Any:
        return rooms.rooms(emit)

    run(measure, None, partial(rooms.tables, moves=given["moves"]))


@bench.command()
@click.argument("result", type=o.IN)
@o.picture
def plot(result: Path, output: Path) -> None:
    """Draw the RESULT that retain, strategies, levers, capacity or speed kept with --json.

    The same picture as by their --plot, without measuring again; also of a run that was stopped.

    \b
    Examples:
      python -m tests.bench plot auto.json -o auto.png
    """
    from tests.bench import plots
    from tests.bench.documents import read

    plots.draw(read(result), output)


@bench.command()
@click.option("--data", "folder", type=o.FOLDER, help="Check the files in this folder.")
def data(folder: Path | None) -> None:
    """Which public files the benchmarks read: origin, licence, fields, and where to put them.

    With --data the folder is checked; exit code 4 if a file is missing or malformed.

    \b
    Examples:
      python -m tests.bench data
      python -m tests.bench data --data data
    """
    from tests.bench import data as files

    for line in files.lines():
        click.echo(line)
    if folder is not None:
        problems = files.problems(folder)
        for problem in problems:
            click.echo(problem, err=True)
        if problems:
            raise GateFailedError(f"{len(problems)} file(s) missing or malformed")
        click.echo(f"{folder}: all files are there and well formed")


@command(
    click.option("--store", type=o.FOLDER, required=True, help="The store that is asked."),
    click.option("--prompt", default="What is the capital of France?", show_default=True),
    o.number("--limit", "Most tokens of an answer.", 32, metavar="N"),
    o.number("--repeats", "Answers of each way.", 3, metavar="N"),
)
def answer(run: Run, given: dict[str, Any]) -> None:
    """What one answer takes from start to end, beside plain transformers on the base model.

    \b
    Examples:
      python -m tests.bench answer --store store
    """
    from tests.bench import answer as bench_answer

    run(bench_answer.answers, bench_answer.AnswerOptions(**given), bench_answer.tables)


@command(
    click.option("--facts-file", "facts_files", type=o.IN, multiple=True,
                 help="JSON Lines of facts. Repeatable. [the seed facts]"),
    o.number("--facts", "Facts to teach and then erase.", 20, metavar="N"),
    o.number("--others", "Facts to keep beside them.", 8, metavar="N"),
    click.option("--model", help="The base model. [the embedded one]"),
    click.option("--time", type=float, default=60.0, show_default=True,
                 help="Seconds in which the model is asked what it knows."),
    o.json_file,
)  # fmt: skip
def forget(run: Run, given: dict[str, Any]) -> None:
    """Erase facts; look for their texts in every file, and compare with a model never taught them.

    \b
    Examples:
      python -m tests.bench forget
    """
    from tests.bench import forget as bench_forget

    chosen = {name: value for name, value in given.items() if value not in (None, ())}
    result = run(bench_forget.forget, bench_forget.ForgetOptions(**chosen), bench_forget.tables)
    require(not result.files_after, "a text is still in a file of the store")


@command(
    o.model, o.json_file, o.store_dir,
    click.option("--passages", type=o.IN, required=True,
                 help="JSON Lines with key, description and questions (question, answer)."),
    o.number("--limit", "Take the first N passages.", 40, metavar="N"),
    o.number("--taught", "Add the N shortest of them by training first.", 0, low=0, metavar="N"),
    click.option("--form", "forms", multiple=True, type=click.Choice(["named", "as asked"]),
                 default=("named", "as asked"), show_default=True,
                 help="Put the key before each question, or ask it alone; may be given twice."),
    o.number("--max-new-tokens", "Most tokens of an answer.", 48, metavar="N"),
)  # fmt: skip
def recall(run: Run, given: dict[str, Any]) -> None:
    """Questions about passages: base model, text in the prompt, and --recall from both sources.

    Passages are registered in a store without training, which is enough for the store's text; with
    --taught some are trained first, for the model's own recitation. A store in --store-dir is used
    and added to; measured is a copy.

    \b
    Examples:
      python -m tests.bench recall --model DIR --passages passages.jsonl
      python -m tests.bench recall --model DIR --passages passages.jsonl --taught 8
    """
    from tests.bench import recall as bench_recall

    run(bench_recall.recall, bench_recall.RecallOptions(**given), bench_recall.tables,
        bench_recall.notes)  # fmt: skip


@command(
    o.model, o.json_file, o.store_dir,
    click.option("--passages", type=o.IN, required=True,
                 help="JSON Lines with key, description and questions, each with an answer."),
    o.number("--limit", "Take the N shortest passages.", None, metavar="N"),
    click.option("--recipe", "recipes", multiple=True, metavar="NAME",
                 default=("text", "parts", "questions", "parts, questions"), show_default=True,
                 help="What is trained; may be given more than once."),
    click.option("--method", type=click.Choice(["add", "ingest"]), default="add",
                 show_default=True, help="One by one, or all together."),
    o.abilities,
    click.option("--config", type=o.IN, help="A kvedit.toml, without [study], for all recipes."),
    click.option("--time", type=click.FloatRange(min=1), metavar="SECONDS",
                 help="How long making the store may take. [its default]"),
)  # fmt: skip
def answers(run: Run, given: dict[str, Any]) -> None:
    """How many questions about trained texts are answered, by what was trained beside the text.

    Every second question of a passage is never trained. Each recipe adds the passages to a copy of
    one store, one by one or with --method ingest, and is then asked those questions: as they stand,
    and with the key before them without recall and with it. The base model is asked before, without
    the text and with it in the prompt. With --store-dir the stores are kept, and a store in its
    folder store is used.

    \b
    Examples:
      python -m tests.bench answers --passages passages_en.jsonl --limit 10 --model DIR
      python -m tests.bench answers --passages passages_en.jsonl --recipe text --recipe parts
    """
    from tests.bench import answers as bench_answers

    options = bench_answers.AnswersOptions(**given)
    run(
        bench_answers.answers, options, bench_answers.tables, bench_answers.notes,
        bench_answers.line,
    )  # fmt: skip


@command(
    click.option("--part", "parts", multiple=True, metavar="NAME",
                 help="One of the table's parts; may be given more than once. [all]"),
    click.option("--seconds", type=click.FloatRange(min=0), default=5.0, show_default=True,
                 help="How long each part goes on at most."),
    o.number("--limit", "Most cases of each part; 0 is no limit.", 0, low=0, metavar="N"),
    o.number("--first", "Begin at case N. [where --resume stands, else 0]", None, low=0,
             metavar="N"),
    click.option("--resume", "goes_on", is_flag=True,
                 help="Add this slice to those that the file of --json has."),
    o.seed, o.json_file,
)  # fmt: skip
def faults(run: Run, given: dict[str, Any]) -> None:
    """Kills, failing calls, power cuts, hostile stores and random inputs, in one table.

    Every case that is not survived stands with a line that repeats it. With --resume slices add up:
    each part goes on where it stood. Exit code 4 if a case was not survived, or not clean.

    \b
    Examples:
      python -m tests.bench faults
      python -m tests.bench faults --seconds 300 --json faults.json --resume
      python -m tests.bench faults --part readers --limit 100000 --seconds 600
    """
    from tests.bench.faults.run import NAMES, FaultOptions, faults, tables

    if unknown := set(given["parts"]) - set(NAMES):
        raise UsageError(f"there is no part {unknown.pop()!r}", hint=f"Parts: {', '.join(NAMES)}.")
    kept = run.json_file if given.pop("goes_on") else None
    result = run(faults, FaultOptions(**given, kept=kept), tables)
    require(result.sound, "not every case was survived or clean")
