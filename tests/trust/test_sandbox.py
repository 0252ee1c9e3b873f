"""A template cannot take gigabytes, in one step or in many, and sound ones are left as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from kvedit.trust.sandbox import MOST_IN_ONE_STEP, bounded_templates
from tests.trust.test_chat_template import apply

BIG = "{% set big = 'x' * 10 ** 7 %}"
ONE_STEP = [
    "{{ 'x' * 10 ** 10 }}", "{{ 10 ** 10 * 'x' }}", "{{ ([1] * 10 ** 10) | length }}",
    "{{ 10 ** (10 ** 10) }}", BIG + "{{ big * 1000 }}",
    "{{ 'x' | center(10 ** 10) }}", "{{ 'x'.ljust(10 ** 10) }}", "{{ '1'.zfill(10 ** 10) }}",
    "{{ 'x' | attr('rjust')(10 ** 10) }}", "{{ ['x'] | map('center', 10 ** 10) | list }}",
    "{{ '\\t'.expandtabs(10 ** 10) }}", "{{ 'x\\nx' | indent(10 ** 10) }}",
    "{{ [1] | batch(10 ** 10, 0) | list }}", "{{ [1] | tojson(indent=10 ** 10) }}",
    "{{ '%010000000000d' % 1 }}", "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%010000000000d' | format(1) }}", "{{ '{:>10000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 10 ** 10) }}", "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    BIG + "{{ big.replace('x', big) }}", BIG + "{{ big | replace('x', big) }}",
    BIG + "{{ range(99999) | join(big) }}", BIG + "{{ big.join(range(99999) | map('string')) }}",
    BIG + "{{ 'xxxx'.translate({120: big * 9}) }}", BIG + "{{ ([big] * 1000) | string }}",
    BIG + "{{ [big] * 1000 }}", BIG + "{{ ([big] * 1000) | tojson }}",
    BIG + "{{ " + " ~ ".join(["big"] * 300) + " }}",
    BIG + "{{ namespace(a=[big] * 1000) ~ '' }}",
    BIG + "{% for i in range(1000) %}{{ big }}{% endfor %}",
    BIG + "{% macro f() %}{% for i in range(1000) %}{{ big }}{% endfor %}{% endmacro %}{{ f() }}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
    "{{ n.a }}",
]  # fmt: skip
MANY_STEPS = [
    BIG + "{% set n = namespace(a=[]) %}{% for i in range(99999) %}{% set n.a = [n.a, big[i:]] %}"
    "{% endfor %}",
    BIG + "{% set a %}{% for i in range(99999) %}{{ big[i:] }}{% endfor %}{% endset %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 99 ~ i }}{% endfor %}"
    "{% endfor %}",
]
PROBE = """
import gc, resource, sys
sys.path[:0] = ["tests"]
from kvedit.errors import UsageError
from kvedit.trust import chat_template
from tests.trust.test_chat_template import apply

apply("hello")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for template in eval(sys.stdin.read()):
    try:
        apply(template)
    except UsageError as error:
        print(error.message)
    gc.collect()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > float(sys.argv[1]):
        sys.exit(f"{template}: {grown:.0f} MiB")
"""


def messages(templates: list[str], most_mib: float) -> list[str]:
    """What is said of each in a process of its own, whose peak memory is looked at after each."""
    command = [sys.executable, "-c", PROBE, str(most_mib)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, input=repr(templates), capture_output=True, text=True, cwd=root, timeout=300
    )
    assert done.returncode == 0, done.stderr[-600:]
    return done.stdout.splitlines()


def test_no_single_step_takes_gigabytes() -> None:
    said = messages(ONE_STEP, 900)
    assert len(said) == len(ONE_STEP), said
    for template, message in zip(ONE_STEP, said, strict=True):
        assert "makes a text that does not fit into memory" in message, (template, message)


def test_many_steps_end_before_they_take_much_more_than_a_gibibyte() -> None:
    said = messages(MANY_STEPS, 1536)
    assert [line.split(" makes a text ")[0] for line in said] == ["the model's chat template"] * 3


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ [1] + [2] }}{{ 7 % 4 }}", "ababab1024[1, 2]3"),
        ("{{ 'a' ~ 1 ~ none ~ 2.5 }}", "a1None2.5"),
        ("{{ '%s-%03d' % ('a', 10 ** 8) }}", "a-100000000"),
        ("{{ '**{}**'.format(10 ** 12) }}", "**1000000000000**"),
        ("{{ 'a-b' | replace('-', '+') | center(7) }}|", "  a+b  |"),
        ("{{ messages | map(attribute='content') | join(', ') }}", "What is Porto?"),
        ("{{ {'a': [1, 'é']} | tojson(indent=1) }}", '{\n "a": [\n  1,\n  "é"\n ]\n}'),
        ("{{ namespace(count=10 ** 12).count }}", "1000000000000"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ m(1) }}", "<a><1>"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x | length }}{{ missing ~ 'z' }}", "2z"),
        ("{{ 'a, b'.split(', ') | join('|') | upper }}", "A|B"),
        ("{{ 'x' | indent(2, true) }}", "  x"),
    ],
)  # fmt: skip
def test_a_sound_template_gives_what_it_gives_without_bounds(template: str, text: str) -> None:
    assert apply(template) == text
    chat_template_utils._compile_jinja_template.cache_clear()
    assert chat_template_utils._compile_jinja_template(template).render(
        messages=[{"role": "user", "content": "What is Porto?"}]
    ) == text  # fmt: skip
    chat_template_utils._compile_jinja_template.cache_clear()


def test_only_templates_that_kvedit_applies_are_bounded() -> None:
    with bounded_templates(), bounded_templates():
        pass
    template = "{{ ('x' * many) | length }}"
    bare = chat_template_utils._compile_jinja_template(template)
    assert type(bare.environment) is ImmutableSandboxedEnvironment
    assert int(bare.render(many=MOST_IN_ONE_STEP + 1)) == MOST_IN_ONE_STEP + 1
