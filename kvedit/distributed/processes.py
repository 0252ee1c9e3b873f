"""The group of processes that run one command together, and how they stay in step.

Every process runs the same program.  Texts are dealt out and results gathered (see ``worker``), so
all of them take the same decisions.  What depends on time, free memory or signals is decided on
rank 0 and broadcast.

Invariants:
- Every collective operation begins with an ``exchange``, which names what it is for: processes
  that are at different points of the program notice it and stop.
- A failure or Ctrl-C is raised in all processes at the same exchange, so they go on in step.
- A process that ended is noticed by whoever waits for it, because its connections close; one that
  hangs is given up after ``TIMEOUT``.
"""

import signal
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, gather_object, reduce
from torch import Tensor

from kvedit.errors import (
    KveditError,
    OutOfMemoryError,
    ProcessError,
    ProcessesDifferError,
    ProcessLostError,
)
from kvedit.training import memory

TIMEOUT = timedelta(days=1)
"""How long to wait for a process that is there but does not answer: rank 0 may extract knowledge
from a large model for hours while the others wait."""
LAUNCH = "Start them with: accelerate launch --num_processes N -m kvedit COMMAND"
AGAIN = "Run the same command again: it recovers by itself and goes on where it stopped."
END = "end"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Message:
    """A process's part of an exchange: what it is for, a value, or why the process cannot go on."""

    purpose: str
    value: Any = None
    failure: BaseException | None = None


class ProcessGroup:
    """This process among the others; made once in a program, by ``join``."""

    def __init__(self) -> None:
        """Meet the others; raises ProcessError if they do not come."""
        self.rank, self.count = _meet()
        self.lost = False  # another process has ended: nothing can be exchanged any more
        self._in_step = self._alone = self._interrupted = False
        self._shared: BaseException | None = None  # the last failure that all processes got
        if threading.current_thread() is threading.main_thread():
            # A terminal and a launcher send Ctrl-C to every process; rank 0 decides about it.
            handler: Any = signal.SIG_IGN if self.rank else self._interrupt
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Raised at the next exchange, in all processes, or at once while the others wait."""
        if self._alone:
            raise KeyboardInterrupt
        self._interrupted = True

    def exchange(
        self, purpose: str, value: Any = None, failure: BaseException | None = None
    ) -> list[Any]:
        """The values of all processes, by rank; raises the first failure among them."""
        if self.lost:
            raise self._lost_error()
        if self._interrupted and failure is None:
            self._interrupted, failure = False, KeyboardInterrupt()
        with self._noticing():
            messages = self._gather(_Message(purpose, value, failure))
        failures = [message.failure for message in messages if message.failure is not None]
        if failures:
            self._shared = failures[0]
            raise failures[0]
        purposes = {message.purpose for message in messages}
        if len(purposes) > 1:
            self.lost = True
            if END in purposes:
                raise self._lost_error()
            where = ", ".join(sorted(purposes))
            raise _differ(f"the processes are at different points ({where})", AGAIN)
        return [message.value for message in messages]

    def _gather(self, message: _Message) -> list[_Message]:
        messages: list[_Message] = gather_object([message])
        return messages

    def on_main(self, work: Callable[[], _T]) -> _T:
        """Do something on rank 0; all processes get its result or its failure."""
        result, failure = None, None
        if self.rank == 0:
            self._alone = True
            try:
                result = work()
            except BaseException as error:
                failure = self._portable(error)
            finally:
                self._alone = False
        answer: _T = self.exchange("rank 0", result, failure)[0]
        return answer

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside, a failure of one process is raised in all of them, at their next exchange."""
        if self._in_step:
            yield
            return
        self._in_step = True
        try:
            yield
            self.exchange("done")
        except BaseException as error:
            if not self.lost and error is not self._shared:
                self.exchange("failed", failure=self._portable(error))
            raise
        finally:
            self._in_step = False

    def _portable(self, error: BaseException) -> BaseException:
        """The error as all processes can raise it."""
        if isinstance(error, KveditError | KeyboardInterrupt):
            return error
        first = (str(error).strip().splitlines() or [""])[0]
        if memory.ran_out(error):
            traceback.clear_frames(error.__traceback__)  # they hold the attempt's tensors
            return OutOfMemoryError(f"memory ran out: {first}", hint=memory.LESS)
        who = f"process {self.rank} of {self.count}"
        what = f"{who} failed: {type(error).__name__}: {first}"
        return ProcessError(what, hint="Look at what that process has printed, and try again.")

    def require_alike(self, value: Hashable, message: str, *, hint: str) -> None:
        """Raise ProcessesDifferError unless all processes have the same."""
        if len(set(self.exchange("comparison", value))) > 1:
            raise _differ(message, hint)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Put into each tensor the sum over all processes; fp32, same shapes everywhere."""
        self._replace("sum", tensors, partial(reduce, reduction="sum"))  # default: mean

    def align(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the values that rank 0 has."""
        self._replace("alignment", tensors, broadcast)

    @torch.no_grad()
    def _replace(self, purpose: str, tensors: Sequence[Tensor], operation: Any) -> None:
        """Put into each tensor what a collective operation of accelerate returns for it."""
        self.exchange(purpose)
        with self._noticing():
            flat = operation(torch.cat([tensor.flatten() for tensor in tensors]))
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def end(self) -> None:
        """Leave the group, at the end of the program; the others notice if it is not theirs."""
        self._interrupted = False
        with suppress(KveditError, KeyboardInterrupt):
            self.exchange(END)
        if not self.lost:
            dist.destroy_process_group()

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Around every collective: torch raises RuntimeError when another process is gone."""
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            raise self._lost_error() from error

    def _lost_error(self) -> ProcessLostError:
        return ProcessLostError(
            f"process {self.rank} of {self.count}: another process of the group has ended or does"
            " not answer; what was committed stands, the rest did not happen",
            hint=AGAIN,
        )


def _differ(message: str, hint: str) -> ProcessesDifferError:
    return ProcessesDifferError(f"{message}; the edit at hand did not happen", hint=hint)


def _meet() -> tuple[int, int]:
    """Join the group that the launcher made: this process's rank, and the number of processes."""
    cpu = True if not torch.accelerator.is_available() else None  # torchrun does not say it
    try:
        met = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    except (RuntimeError, ValueError) as error:
        text = f"the processes did not find each other: {error}"
        raise ProcessError(text, hint=LAUNCH) from error
    if met.num_processes < 2:
        raise ProcessError("several processes were started, but this one is alone", hint=LAUNCH)
    return met.process_index, met.num_processes


_joined: ProcessGroup | None = None


def join() -> ProcessGroup:
    """Make the group of this program."""
    global _joined
    _joined = ProcessGroup()
    return _joined


def joined() -> ProcessGroup | None:
    """The group of this program, if it runs in several processes."""
    return _joined
