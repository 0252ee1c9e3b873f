"""Deltas and the fp32 master: the bits that must not be lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kvedit.adapter import deltas, split
from kvedit.adapter.deltas import Factors, Master, from_bytes, to_bytes
from kvedit.errors import CorruptStoreError, ModelMismatchError
from kvedit.files import write_manifest

NAMES = ["first", "second"]
SHAPES = {"first": (24, 16), "second": (8, 24)}


def model(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.ModuleDict:
    generator = torch.Generator().manual_seed(seed)
    layers = nn.ModuleDict({n: nn.Linear(i, o, bias=False) for n, (o, i) in SHAPES.items()})
    for layer in layers.values():
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator).to(dtype)
    return layers


def delta(seed: int, size: float = 0.01, names: list[str] = NAMES) -> dict[str, Factors]:
    """A delta whose norm is ``size`` of that of a matrix of standard normal entries."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        out, into = SHAPES[name]
        b, a = (torch.randn(s, generator=generator) for s in ((out, 3), (3, into)))
        change = b @ a
        made[name] = Factors(b, a * size * (out * into) ** 0.5 / change.norm())
    return made


def bits(module: nn.ModuleDict) -> list[bytes]:
    return [
        layer.weight.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for layer in module.values()
    ]


def test_the_same_deltas_in_the_same_order_give_the_same_bits() -> None:
    first, second = model(), model()
    one, two = Master(first, NAMES), Master(second, NAMES)
    for seed in range(50):
        one.add(delta(seed))
    for seed in range(50):
        two.add(from_bytes(to_bytes(delta(seed))))
    assert bits(first) == bits(second)
    assert one.digest() == two.digest()
    assert all(torch.equal(one.matrices[n], two.matrices[n]) for n in NAMES)


def test_the_served_weights_are_the_master_cast_once() -> None:
    layers = model()
    master = Master(layers, NAMES)
    for seed in range(5):
        master.add(delta(seed))
    for name in NAMES:
        assert torch.equal(layers[name].weight, master.matrices[name].bfloat16())


def test_restore_is_exact_and_covers_every_matrix() -> None:
    layers = model()
    master = Master(layers, NAMES)
    master.add(delta(1))
    before, digest, state = bits(layers), master.digest(), master.snapshot()
    master.add(delta(2))
    master.add(delta(3, names=["second"]))
    assert master.digest() != digest
    master.restore(state)
    assert (bits(layers), master.digest()) == (before, digest)
    # A snapshot is not worn out by its first use, nor changed by what comes after it.
    master.add(delta(4))
    master.restore(state)
    assert bits(layers) == before


def test_matrices_left_by_an_interrupted_restore_are_served_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = model()
    master = Master(layers, NAMES)
    before, state = bits(layers), master.snapshot()
    master.add(delta(1))

    set_weight = deltas._set

    def broken(weight: torch.Tensor, served: torch.Tensor) -> None:
        if weight is layers["second"].weight:
            raise KeyboardInterrupt
        set_weight(weight, served)

    monkeypatch.setattr(deltas, "_set", broken)
    with pytest.raises(KeyboardInterrupt):
        master.restore(state)
    monkeypatch.setattr(deltas, "_set", set_weight)
    assert bits(layers) != before
    master.restore(state)
    assert bits(layers) == before


@pytest.mark.parametrize("numbers", [1, 40, 64, 10_000])
def test_a_sum_in_blocks_is_the_sum(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Formed in fp64 and rounded once, however many rows a block has; so is how far it moved."""
    monkeypatch.setattr(split, "BLOCK", numbers)
    layers = model(torch.float32)
    master = Master(layers, NAMES)
    base, change = dict(master.matrices), delta(1, size=0.25)
    master.add(change)
    for name, (b, a) in {n: (f.b.double(), f.a.double()) for n, f in change.items()}.items():
        assert torch.equal(master.matrices[name], (base[name].double() + b @ a).float())
        moved = float((b @ a).norm() / base[name].double().norm())
        assert master.norms()[name] == pytest.approx(moved, rel=1e-5)


def test_reset_is_the_base_model() -> None:
    layers = model()
    before = bits(layers)
    master = Master(layers, NAMES)
    master.add(delta(1, size=0.5))
    assert bits(layers) != before
    master.reset()
    assert bits(layers) == before
    assert master.norms() == {"first": 0.0, "second": 0.0}


def test_the_master_keeps_small_deltas_that_merging_in_place_loses() -> None:
    small = [delta(seed, size=1e-4) for seed in range(400)]
    kept = model()
    start = {n: kept[n].weight.detach().double().clone() for n in NAMES}
    wanted = {n: sum(d[n].b.double() @ d[n].a.double() for d in small) for n in NAMES}
    master = Master(kept, NAMES)
    in_place = model()
    for each in small:
        master.add(each)
        for n in NAMES:
            in_place[n].weight.data += (each[n].b @ each[n].a).bfloat16()
    for n in NAMES:
        size = wanted[n].norm()
        exact = master.matrices[n].double() - start[n]
        lost = in_place[n].weight.detach().double() - start[n]
        assert (exact - wanted[n]).norm() < 1e-3 * size
        assert (lost - wanted[n]).norm() > 0.3 * size


def test_norms_are_the_distance_from_the_base() -> None:
    layers = model(torch.float32)
    base = layers["first"].weight.detach().clone()
    master = Master(layers, NAMES)
    master.add(delta(1, size=0.25, names=["first"]))
    moved = (layers["first"].weight.detach() - base).norm() / base.norm()
    assert master.norms()["first"] == pytest.approx(float(moved), rel=1e-5)
    assert master.norms()["second"] == 0.0


def test_bytes_come_back_and_depend_on_the_factors_alone() -> None:
    made = delta(7)
    back = from_bytes(to_bytes(made))
    assert back.keys() == made.keys()
    for name, factors in made.items():
        assert torch.equal(back[name].a, factors.a)
        assert torch.equal(back[name].b, factors.b)
        assert back[name].rank == factors.rank == 3
    turned = {n: Factors(f.b.T.contiguous().T, f.a) for n, f in made.items()}
    assert to_bytes(turned) == to_bytes(made)
    assert to_bytes(delta(8)) != to_bytes(made)


@pytest.mark.parametrize("cut", [0, 7, 40, -1])
def test_broken_bytes_are_a_corrupt_store(cut: int) -> None:
    with pytest.raises(CorruptStoreError):
        from_bytes(to_bytes(delta(1))[:cut])


def test_half_of_a_pair_is_a_corrupt_store() -> None:
    from safetensors.torch import save

    with pytest.raises(CorruptStoreError):
        from_bytes(save({"first.a": torch.zeros(1, 16)}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"third": Factors(torch.zeros(8, 1), torch.zeros(1, 24))},
        {"second": Factors(torch.ones(8, 1), torch.ones(1, 25))},
        {"second": Factors(torch.ones(24, 1), torch.ones(1, 8))},
    ],
    ids=["unknown", "too wide", "turned"],
)
def test_a_delta_for_other_matrices_is_refused(wrong: dict[str, Factors]) -> None:
    master = Master(model(), NAMES)
    with pytest.raises(ModelMismatchError):
        master.add(wrong)


def test_a_refused_delta_changes_nothing() -> None:
    layers = model()
    master = Master(layers, NAMES)
    before = dict(master.matrices)
    with pytest.raises(ModelMismatchError):
        master.add({**delta(1, names=["first"]), "third": delta(1)["second"]})
    assert all(torch.equal(before[n], master.matrices[n]) for n in NAMES)


def test_another_copy_gets_the_weights_in_its_own_dtype() -> None:
    master = Master(model(), NAMES)
    master.add(delta(1))
    other = model(torch.float32, seed=9)
    master.write_into(other)
    for name in NAMES:
        assert torch.equal(other[name].weight.detach(), master.matrices[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_checkpoint_brings_the_master_back(tmp_path: Path, dtype: torch.dtype) -> None:
    master = Master(model(dtype), NAMES)
    for seed in range(3):
        master.add(delta(seed, size=1e-4))
    digest = master.write_checkpoint(tmp_path / "one")
    other = Master(model(dtype), NAMES)
    other.read_checkpoint(tmp_path / "one", digest)
    assert other.digest() == master.digest()
    # What lies below the served dtype's grain is in it too: the next delta lands on the same bits.
    assert all(torch.equal(other.matrices[n], master.matrices[n]) for n in NAMES)


@pytest.mark.parametrize("harm", ["weights", "manifest", "missing", "digest"])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "one"
    edited = Master(model(), NAMES)
    edited.add(delta(1))
    digest = edited.write_checkpoint(folder)
    file = folder / ("manifest.json" if harm == "manifest" else "master.safetensors")
    if harm == "missing":
        file.unlink()
    elif harm == "digest":
        digest = "0" * 64
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    master = Master(model(), NAMES)
    before = master.digest()
    with pytest.raises(CorruptStoreError):
        master.read_checkpoint(folder, digest)
    assert master.digest() == before


def test_a_checkpoint_has_the_changed_matrices_alone(tmp_path: Path) -> None:
    master = Master(model(), NAMES)
    master.add(delta(1, names=["second"]))
    digest = master.write_checkpoint(tmp_path / "one")
    with safe_open(tmp_path / "one" / "master.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"second", "second.remainder", "second.ties"}
    other = Master(model(), NAMES)
    other.add(delta(2, names=["first"]))
    other.read_checkpoint(tmp_path / "one", digest)
    assert other.digest() == master.digest()


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    """All matrices, in fp32."""
    master = Master(model(), NAMES)
    master.add(delta(1, size=1e-4))
    save_file(dict(master.matrices), tmp_path / "master.safetensors")
    other = Master(model(), NAMES)
    other.read_checkpoint(tmp_path, write_manifest(tmp_path))
    assert other.digest() == master.digest()
    assert all(torch.equal(other.matrices[n], master.matrices[n]) for n in NAMES)


def test_the_model_serves_the_masters_memory_and_the_base_is_kept() -> None:
    layers = model()
    base = layers["first"].weight.data_ptr()
    master = Master(layers, NAMES)
    assert master.snapshot()["first"].served.data_ptr() == base
    master.add(delta(1))
    state = master.snapshot()["first"]
    assert layers["first"].weight.data_ptr() == state.served.data_ptr() != base
    master.reset()
    assert layers["first"].weight.data_ptr() == base


def test_what_is_accumulated_is_formed_when_asked_for() -> None:
    layers = model()
    base = layers["first"].weight.detach().float()
    master = Master(layers, NAMES)
    master.add(delta(1, names=["first"]))
    moved = master.accumulated_delta()
    assert list(moved) == NAMES and len(moved) == 2
    assert torch.equal(moved["first"], master.matrices["first"] - base)
    assert not moved["second"].any()
    with pytest.raises(KeyError):
        moved["third"]
    assert master.shapes == SHAPES


def test_a_checkpoint_of_other_matrices_is_refused(tmp_path: Path) -> None:
    digest = Master(model(), ["first"]).write_checkpoint(tmp_path / "one")
    with pytest.raises(CorruptStoreError):
        Master(model(), NAMES).read_checkpoint(tmp_path / "one", digest)


def test_conv1d_is_turned_the_right_way() -> None:
    from transformers.pytorch_utils import Conv1D

    layers = nn.ModuleDict({"first": Conv1D(24, 16)})
    before = layers["first"].weight.detach().clone()
    made = delta(1, size=0.5, names=["first"])
    Master(layers, ["first"]).add(made)
    moved = (layers["first"].weight.detach() - before).T
    assert torch.allclose(moved, made["first"].b @ made["first"].a, atol=1e-6)


def test_a_checkpoint_of_a_conv1d_model(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    master = Master(nn.ModuleDict({"first": Conv1D(24, 16)}), ["first"])
    untouched = master.write_checkpoint(tmp_path / "one")
    master.add(delta(1, names=["first"]))
    digest = master.write_checkpoint(tmp_path / "two")
    wanted = master.digest()
    master.read_checkpoint(tmp_path / "one", untouched)
    assert master.digest() != wanted
    master.read_checkpoint(tmp_path / "two", digest)
    assert master.digest() == wanted
