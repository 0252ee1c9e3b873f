"""How many threads a CPU computes with: where cores are shared with others, one is often quicker.

All threads of a product wait for the slowest: one that has to wait for its core stops the others,
and two threads were five to ten times slower than one.
"""

import logging
import os
import time
from statistics import median

import torch

log = logging.getLogger(__name__)

TIMED_ROWS, TIMED_SIZE = 64, 1024  # of a product that takes some milliseconds
TIMED_PRODUCTS = 9
CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def choose() -> None:
    """Let this process compute with all threads or with one, whichever is quicker now; not where
    the environment says how many.
    """
    count = torch.get_num_threads()
    if count == 1 or any(name in os.environ for name in CHOSEN_BY_USER):
        return
    seconds = {threads: _seconds(threads) for threads in (count, 1)}
    best = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(best)
    times = ", ".join(f"{1e3 * spent:.1f} ms with {n}" for n, spent in seconds.items())
    log.info("threads: %d (a product takes %s)", best, times)


def _seconds(threads: int) -> float:
    """The median time of a product: the shortest would not show that others use the cores too."""
    torch.set_num_threads(threads)
    rows, matrix = torch.ones(TIMED_ROWS, TIMED_SIZE), torch.ones(TIMED_SIZE, TIMED_SIZE)
    times = []
    for _ in range(TIMED_PRODUCTS):
        start = time.perf_counter()
        rows @ matrix
        times.append(time.perf_counter() - start)
    return median(times)
