"""Several processes that work as one: process 0 says what to do, all do it together.

``accelerate launch`` (or torchrun) starts the same command several times.  Process 0 runs it; the
others wait for its calls and carry them out, each on its own replica of the model.  Within a call
all processes exchange what they found, in lockstep.  Nothing about models or stores is known here.

Invariants:
- What a call decides by is the same in every process: it was exchanged, or comes from process 0.
- A process that fails in a call says so in its next exchange; the others then leave the call too,
  and all are ready for the next one.  (Leaving without a word would pair the next call's messages
  with those of this one.)
- A process that ended is noticed by whoever waits for it: its connections close.  One that hangs is
  given up after ``TIMEOUT``.  Nothing is shared any more from then on.
- Signals reach process 0 between exchanges, never inside one.
- A process may want something that takes all of them (a part of the model that they share, see
  ``shards``) at any time: the others, wherever they are, help at their next exchange and then have
  that exchange.  So it does not matter how often each of them wants something.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kvedit.errors import (
    KveditError,
    ProcessError,
    ProcessesDifferError,
    ProcessLostError,
)

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)
"""How long an exchange within a call waits for a process that is there but does not answer."""
FOREVER = timedelta(days=30)
"""Between calls: process 0 may have much to do alone."""
AGAIN = "Run the same command again: it recovers by itself and goes on where it stopped."
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Call:
    """What all processes are to do: the name of an operation and its arguments (picklable).

    For a ``patient`` one all wait without a limit: loading a large model may take its time.
    """

    name: str
    args: tuple[Any, ...] = ()
    patient: bool = False


@dataclass(frozen=True, slots=True)
class _Message:
    """A process's part of an exchange: a value, why it cannot go on, or what it wants first."""

    value: Any = None
    failure: KveditError | None = None
    want: int | None = None


class Crew:
    """This process among the others of its group; one is made once, at the start of a program."""

    def __init__(self, timeout: timedelta = TIMEOUT) -> None:
        """Meet the others; raises ProcessError if they do not come."""
        self.rank, self.count = _meet(timeout)
        self._calls = dist.new_group(backend="gloo", timeout=FOREVER)
        self._steps = dist.new_group(backend="gloo", timeout=timeout)
        self._group = self._steps  # of the call at hand
        self.lost = False
        self._inside = False  # a call is being carried out
        self._talking = False
        self._signal: int | None = None
        self._stopped = False
        self._lend: Callable[[int], object] = lambda part: None
        if self.rank == 0:
            self._listen((signal.SIGINT, signal.SIGTERM), self._on_signal)
        else:  # Ctrl-C reaches every process of a terminal; what comes of it, process 0 decides
            self._listen((signal.SIGINT,), signal.SIG_IGN)

    # ---- calls

    def lead(self, call: Call, work: Callable[[], _T]) -> _T:
        """In process 0: have a call carried out by all; ``work`` is what this process does.

        Raises what any of them raised, ProcessLostError if one has ended.
        """
        if self._inside:  # a part of what all are doing already
            return work()
        if self.lost:
            raise self._lost_error()
        try:
            with self._undisturbed():
                self._announce(call)
                self._enter(call)
            found = work()
            self._finish()
        except BaseException as error:
            self._tell(error)
            raise
        return found

    def mirror(self, call: Call, work: Callable[[], _T]) -> _T:
        """As ``lead``, but done here all the same when the others are gone: to put things back."""
        return work() if self.lost else self.lead(call, work)

    def follow(self, carry_out: Callable[[Call], object]) -> None:
        """In the other processes: carry out calls until process 0 ends; raises ProcessLostError."""
        while (call := self._next_call()) is not None:
            self._enter(call)
            try:
                carry_out(call)
                self._finish()
            except ProcessLostError:
                raise
            except Exception as error:  # the border of one call: process 0 is told and decides
                self._tell(error)

    def end(self) -> None:
        """Leave the group; process 0 lets the others end.  Never raises for those that are gone."""
        if self.rank == 0 and not self.lost:
            with suppress(ProcessLostError), self._noticing():
                self._announce(None)
        if not self.lost:
            dist.destroy_process_group()  # else its threads abort a process that exits

    def exit(self, code: int) -> NoReturn:
        """End this process, after ``end``.

        Connections to a process that is gone cannot be closed in order: torch's threads would keep
        this one for seconds, or abort it.  All that Python has to do at its end is done here.
        """
        if not self.lost:
            sys.exit(code)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)

    def _enter(self, call: Call) -> None:
        self._inside, self._group = True, self._calls if call.patient else self._steps

    def _announce(self, call: Call | None) -> None:
        with self._noticing():
            dist.broadcast_object_list([call], src=0, group=self._calls)

    def _next_call(self) -> Call | None:
        box: list[Call | None] = [None]
        with self._noticing():
            dist.broadcast_object_list(box, src=0, group=self._calls)
        return box[0]

    # ---- within a call

    def exchange(self, value: Any) -> list[Any]:
        """What each process has, in their order; raises if any of them failed."""
        with self._undisturbed():
            return self._gather(_Message(value))

    def require_alike(self, own: Hashable, else_: str, *, hint: str) -> None:
        """Raise ProcessesDifferError, which says ``else_``, unless all processes have the same."""
        if len(set(self.exchange(own))) > 1:
            raise ProcessesDifferError(f"{else_}; nothing was committed", hint=hint)

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Put into each tensor the sum over all processes; fp32, same shapes everywhere."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._undisturbed():
            self._gather(_Message())  # all have come so far: what follows cannot be left halfway
            with self._noticing():
                dist.all_reduce(flat)
        _spread(flat, tensors)

    @torch.no_grad()
    def align(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the values that process 0 has."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._undisturbed():
            self._gather(_Message())
            with self._noticing():
                dist.broadcast(flat, src=0)
        _spread(flat, tensors)

    def lends(self, lend: Callable[[int], object]) -> None:
        """What all processes do together when one of them wants a part."""
        self._lend = lend

    def want(self, part: int) -> None:
        """Have all processes lend a part; outside of a call, process 0 makes one for it."""
        if not self._inside:
            self.lead(Call("lend"), lambda: self.want(part))
            return
        with self._undisturbed():
            self._gather(_Message(want=part))

    def _finish(self) -> None:
        """Wait until all have carried out the call."""
        with self._undisturbed():
            self._gather(_Message())
            self._inside = False

    def _tell(self, error: BaseException) -> None:
        """Let the others know that this process leaves the call, unless they do already."""
        if not self._inside:
            return
        if not isinstance(error, KveditError | KeyboardInterrupt) and self.rank:
            log.error("process %d of %d failed", self.rank, self.count, exc_info=error)
        with suppress(KveditError), self._undisturbed():
            self._inside = False
            self._gather(_Message(failure=self._failure(error)))

    def _failure(self, error: BaseException) -> KveditError:
        if isinstance(error, KveditError):
            return error
        return ProcessError(
            f"process {self.rank} of {self.count} failed: {type(error).__name__}: {error}",
            hint="If it ran out of memory: a smaller [group] batch, fewer --targets, or fewer"
            " processes on one device.",
        )

    def _gather(self, message: _Message) -> list[Any]:
        """The messages of all; before they count, everyone gets what it wants."""
        while True:
            found = self._messages(message)
            wants = [one.want for one in found if one.want is not None]
            if not wants:
                return [one.value for one in found]
            with self._noticing():
                self._lend(wants[0])
            if message.want == wants[0]:
                return []

    def _messages(self, message: _Message) -> list[_Message]:
        found: list[Any] = [None] * self.count
        with self._noticing():
            dist.all_gather_object(found, message, group=self._group)
        failures = [one.failure for one in found if one.failure is not None]
        if failures:
            self._inside = False  # everyone has heard it and leaves
            raise failures[0]
        return found

    # ---- processes that end, and signals

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Around every message: torch says with a RuntimeError that another process is gone."""
        try:
            yield
        except RuntimeError as error:
            self.lost, self._inside = True, False
            raise self._lost_error() from error

    def _lost_error(self) -> ProcessLostError:
        return ProcessLostError(
            f"process {self.rank} of {self.count}: another process of the group has ended or does"
            " not answer; what was committed stands, the rest did not happen",
            hint=AGAIN,
        )

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Inside, a signal waits: a message that is broken off would leave the others hanging."""
        self._talking = True
        try:
            yield
        finally:
            self._talking = False
            if self._signal is not None:
                self._stop(self._signal)

    def _listen(self, numbers: Sequence[int], handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._talking:
            self._signal = number
        else:
            self._stop(number)

    def _stop(self, number: int) -> None:
        """Raise what a signal means, once: a launcher repeats the user's Ctrl-C, and the second one
        would break off the putting back that the first one began.
        """
        self._signal = None
        if self._stopped:
            return
        self._stopped = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise ProcessLostError(
            "this process was told to end (SIGTERM), as launchers do when another one has ended;"
            " what was committed stands, the rest did not happen",
            hint=AGAIN,
        )


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    at = 0
    for tensor in tensors:
        tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
        at += tensor.numel()


def _meet(timeout: timedelta) -> tuple[int, int]:
    """Join the group that the launcher made; this process's number, and how many there are."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    cpu = True if not torch.accelerator.is_available() else None  # torchrun does not say it
    try:
        met = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the processes did not find each other: {error}",
            hint="Start them with: accelerate launch --num_processes N -m kvedit COMMAND",
        ) from error
    if met.num_processes < 2:
        raise ProcessError(
            "several processes were started, but this one is alone",
            hint="Start them with: accelerate launch --num_processes N -m kvedit COMMAND",
        )
    return met.process_index, met.num_processes
