"""The package's own names arrive when they are asked for, and not before."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvedit
from kvedit.facts.fact import Fact
from kvedit.store.store import Store

ROOT = Path(__file__).resolve().parents[1]


def locked() -> dict[str, str]:
    """The versions that ``make`` installs, by name as the index spells it."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").split()
    return {name.lower().replace("_", "-"): at for name, at in (x.split("==") for x in lines)}


def declared(group: str = "") -> list[Requirement]:
    """What the package needs, or one of its groups."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = project["optional-dependencies"][group] if group else project["dependencies"]
    return [Requirement(text) for text in texts]


def test_names_lead_to_their_modules() -> None:
    assert kvedit.Fact is Fact
    assert kvedit.Store is Store
    assert set(kvedit.__all__) == set(dir(kvedit))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvedit.nothing


def test_importing_the_package_loads_none_of_its_modules() -> None:
    code = "import sys, kvedit; print([m for m in sys.modules if m.startswith('kvedit.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"


@pytest.mark.parametrize("group", ["", "serving", "dev"])
def test_the_lock_file_has_what_the_package_and_its_tests_need(group: str) -> None:
    pins = locked()
    for need in declared(group):
        if need.name != "kvedit":  # a group that names another one
            assert need.specifier.contains(pins[need.name.lower()]), need


def test_nothing_that_is_locked_asks_for_cuda() -> None:
    assert [name for name in locked() if name.startswith(("nvidia", "cuda", "triton"))] == []
