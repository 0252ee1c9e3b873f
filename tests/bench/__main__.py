"""The project's own measurements: `python -m tests.bench NAME`."""

from tests.bench.commands import bench

bench(prog_name="python -m tests.bench")
