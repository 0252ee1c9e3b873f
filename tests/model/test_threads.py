"""How many threads compute: measured, unless the user has said it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from kvedit.model import devices


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in devices.CHOSEN_BY_USER:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("alone", "best"), [(0.5, 1), (2.0, 2)])
def test_the_quicker_number_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, alone: float, best: int
) -> None:
    monkeypatch.setattr(devices, "_product_seconds", {1: alone, 2: 1.0}.__getitem__)
    with caplog.at_level(logging.INFO, "kvedit"):
        devices.choose_threads()
    assert torch.get_num_threads() == best
    assert f"threads: {best} " in caplog.text and "1000.0 ms with 2" in caplog.text


def test_what_the_user_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_product_seconds", {1: 0.5, 2: 1.0}.__getitem__)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    devices.choose_threads()
    assert torch.get_num_threads() == 2


def test_a_product_is_timed_with_so_many_threads() -> None:
    assert 0 < devices._product_seconds(1) < 10
    assert torch.get_num_threads() == 1
