"""The package's own names arrive when they are asked for, and not before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvedit
from kvedit.facts import Fact
from kvedit.store import Store


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
