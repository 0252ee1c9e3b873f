"""verify: are the facts still recalled?"""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import click

from kvedit.cli import common, output
from kvedit.cli.common import Settings, json_lines_option
from kvedit.cli.output import score_text, styled
from kvedit.cli.parameters import COUNT, FILE
from kvedit.cli.progress import JsonReporter, Reporter, make_reporter
from kvedit.cli.tables.facts import first_of, margin_text
from kvedit.errors import GateFailedError, RejectedError
from kvedit.files import require_writable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvedit.editing.verify import BaseKnowledgeReport, VerifyReport
    from kvedit.events import Event, RetentionCheck, Score

SHOWN = 50
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@click.command()
@click.argument("keys", nargs=-1)
@click.option("--sample", type=COUNT, metavar="N",
              help="Check N facts only, those most likely to be lost first.")  # fmt: skip
@click.option("--repair", is_flag=True, help="Train the facts again that are no longer recalled.")
@click.option(
    "--base-knowledge", type=COUNT, is_flag=False, flag_value=300, metavar="[N]",
    help="Also ask N questions that the base model could answer (TRR). [300 if N is left out]",
)  # fmt: skip
@click.option("--fail-under", type=click.FloatRange(0, 100), metavar="P",
              help="Exit with code 4 if less than P percent of the facts are"
              " recalled.")  # fmt: skip
@click.option("--junit", type=FILE, metavar="FILE", help="Also write the results as JUnit XML.")
@json_lines_option
@click.pass_obj
def verify(settings: Settings, keys: tuple[str, ...], sample: int | None, repair: bool,
           base_knowledge: int | None, fail_under: float | None, junit: Path | None,
           as_json: bool) -> None:  # fmt: skip
    """Check what the model still recalls.

    All committed facts are asked again, or only the KEYS, and the results are recorded. With
    --base-knowledge questions are asked as well that the base model answered with confidence before
    the first edit; those that name a fact of the store are left out.

    \b
    Examples:
      kvedit verify
      kvedit verify --base-knowledge 500
      kvedit verify 夢中情爐 Porto
      kvedit verify --sample 100 --repair
      kvedit verify --fail-under 99 --junit report.xml
    """
    common.require_keys(settings, keys)
    if repair:
        common.require_writable(settings)
    if junit is not None and not settings.rank:
        require_writable(junit)
    reporter = make_reporter(quiet=settings.quiet, as_json=as_json)
    watched = common.watched_changes(settings, "verify") if repair else nullcontext()
    with watched, common.knowledge_base(settings, reporter) as knowledge:
        report = knowledge.verify(
            list(keys) or None, sample=sample, repair=repair, base_knowledge=base_knowledge or 0
        )
    if junit is not None and not settings.rank:
        write_junit(junit, report)
    score = report.generated if report.generated.n else report.score
    code = verify_code(report, score, fail_under)
    show_verify(settings, reporter, report, code)
    if code == GateFailedError.exit_code:
        raise _below(settings, score, fail_under or 0)
    click.get_current_context().exit(code)


def verify_code(report: VerifyReport, score: Score, fail_under: float | None) -> int:
    """The exit code: 4 below the gate, 3 if a repair was rejected, else 0."""
    if fail_under is not None and score.n and 100 * score.passed < fail_under * score.n:
        return GateFailedError.exit_code
    refused = any(edit.outcome != "committed" for edit in report.repaired)
    return RejectedError.exit_code if refused else 0


def _below(settings: Settings, score: Score, fail_under: float) -> GateFailedError:
    """The error of a gate that did not pass."""
    recalled = f"recalled {score.passed} of {score.n} ({score.protocol})"
    repair = settings.command("verify", "--repair")
    what = f"{recalled}: less than --fail-under {fail_under:g}%"
    return GateFailedError(what, hint=f"`{repair}` trains again what was lost.")


def show_verify(settings: Settings, reporter: Reporter, report: VerifyReport,
                exit_code: int) -> None:  # fmt: skip
    """The result of a verification: JSON Lines, or text and what to do next."""
    if isinstance(reporter, JsonReporter):
        events: list[Event] = [*report.checks, *report.repaired]
        for event in events:
            reporter(event)
        output.print_json_line({**verify_fields(report), "exit_code": exit_code})
        return
    output.print_parts(*verify_parts(report, verbose=settings.verbosity > 0))
    if not report.repaired and not all(check.passed for check in report.checks):
        common.next_step(settings, "verify", "--repair")


def verify_fields(report: VerifyReport) -> dict[str, Any]:
    """The summary of a verification."""
    base = report.base
    known = base and {
        **_scores(base),
        "lost": list(base.lost), "fluency": base.fluency, "base_fluency": base.base_fluency,
    }  # fmt: skip
    return {
        "message_type": "summary", "kind": "verify", "revision": report.revision,
        "checked": len(report.checks), "passed": sum(check.passed for check in report.checks),
        **_scores(report),
        "recites": report.score.to_json(), "answers": report.answers.to_json(),
        "perturbation_gap": report.perturbation_gap,
        "base_knowledge": known,
        "repaired": sum(edit.outcome == "committed" for edit in report.repaired),
        "seconds": round(report.seconds, 3),
    }  # fmt: skip


def _scores(report: VerifyReport | BaseKnowledgeReport) -> dict[str, Any]:
    return {"generated": report.generated.to_json(), "teacher_forced": report.score.to_json()}


def verify_parts(report: VerifyReport, *, verbose: bool = False) -> list[RenderableType]:
    """What a verification measured, the facts and answers that were lost first."""
    parts = _lost_facts(report, verbose)
    for edit in report.repaired:
        parts += output.edit_parts(edit)
    if not report.checks and report.base is None:
        return [*parts, "no committed facts to check"]
    rows = [("facts recalled (ERR)", score) for score in (report.generated, report.score)]
    rows.append(("held-out questions answered", report.answers))
    if report.base is not None:
        parts += _lost_answers(report.base, verbose)
        scores = (report.base.generated, report.base.score)
        rows += [("base knowledge kept (TRR)", score) for score in scores]
    lines = [(label, score_text(score)) for label, score in rows if score.n]
    if report.perturbation_gap is not None:
        lines.append(("perturbation gap", output.gap_text(report.perturbation_gap)))
    if report.base is not None and report.base.fluency is not None:
        fluency = f"{report.base.fluency:.2f} bits (base model: {report.base.base_fluency:.2f})"
        lines.append(("fluency of these answers", fluency))
    parts.append(f"revision {report.revision}, {output.seconds_text(report.seconds)}")
    return parts + ([output.pairs(lines, 2)] if lines else [])


def _lost_facts(report: VerifyReport, verbose: bool) -> list[RenderableType]:
    lost = [check for check in report.checks if not check.passed]
    checks = report.checks if verbose else lost[:SHOWN]
    if not checks:
        return []
    rows = [
        (styled("recalled" if one.passed else "lost"), margin_text(one.margin), one.key)
        for one in checks
    ]
    more = [] if verbose else first_of([one.key for one in lost], SHOWN)[SHOWN:]
    return [output.table(("result", "margin", "key"), rows), *more, ""]


def _lost_answers(base: BaseKnowledgeReport, verbose: bool) -> list[RenderableType]:
    lost = first_of(base.lost, len(base.lost) if verbose else SHOWN)
    lines = [f"  {question}" for question in lost]
    return ["answers that differ from the base model's:", *lines, ""] if lines else []


def write_junit(path: Path, report: VerifyReport) -> None:
    """JUnit XML, whole or not at all: one `testcase` for each check, so that CI systems show lost
    facts as failed tests.
    """
    from kvedit.files import write_atomic

    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root, "testsuite", name=f"kvedit verify, revision {report.revision}",
        tests=str(len(report.checks)), errors="0", time=f"{report.seconds:.3f}",
        failures=str(sum(not check.passed for check in report.checks)),
    )  # fmt: skip
    _add_properties(suite, report)
    for check in report.checks:
        _add_case(suite, check)
    ElementTree.indent(root)
    xml: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    write_atomic(path, xml + b"\n")


def _add_properties(suite: ElementTree.Element, report: VerifyReport) -> None:
    """The scores of all facts together, with their n, interval and protocol."""
    scores = {"recites": report.score, "recites, generated": report.generated}
    values = {name: score_text(score) for name, score in scores.items()}
    if report.answers.n:
        values["answers"] = score_text(report.answers)
    if report.perturbation_gap is not None:
        values["perturbation gap"] = f"{report.perturbation_gap:.3f}"
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in values.items():
        ElementTree.SubElement(properties, "property", name=name, value=value)


def _add_case(suite: ElementTree.Element, check: RetentionCheck) -> None:
    name = NOT_XML.sub("\ufffd", check.key)
    case = ElementTree.SubElement(suite, "testcase", classname=f"kvedit.{check.kind}", name=name)
    if not check.passed:
        margin = "" if check.margin is None else f" (margin {check.margin:.3f})"
        message = f"no longer recalled at revision {check.revision}{margin}"
        ElementTree.SubElement(case, "failure", message=message)
    if check.answers.n:
        text = f"held-out questions answered: {score_text(check.answers)}"
        ElementTree.SubElement(case, "system-out").text = text
