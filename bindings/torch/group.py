"""A process group of torch.distributed on a communicator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pccl import sync
from pccl.bindings.torch.operations import ALIASES, OPERATIONS, Call, Operation, Plan
from pccl.bindings.torch.work import Work, outlast_callbacks
from pccl.core.errors import InvalidArgument, PcclError

ABBREVIATIONS = {"op": "reduceOp", "root": "rootRank", "timeout": "timeout"}
"""Keyword of a method -> the option that it stands for"""
PATIENCE = 3.0
"""Seconds that a group which is shut down waits for callbacks"""
UNSET = timedelta(milliseconds=-1)
"""What options have for "as the group has it" """


class ProcessGroup(dist.ProcessGroup):
    """The peers of one communicator.

    Ranks and size are those of the communicator's present membership: when a peer is lost, the call that was under way fails, and the next
    ones go on among the survivors.

    No method raises: errors of a call, also of a wrong one, come with its `Work`. An exception out of a method would leave DDP's reducer in
    a state from which it does not recover.

    Args:
        comm: whose calls these are. It belongs to the group from now on.
        end: is called when the group is not needed any more, instead of leaving or closing the communicator: whether to leave.
    """

    def __init__(
        self, comm: sync.Communicator, *, name: str = "", description: str = "", end: Callable[[bool], None] | None = None
    ) -> None:
        super().__init__(comm.rank, comm.world_size)  # type: ignore[call-arg]  # a subclass in Python gives no store
        self.comm = comm
        self.last_error: PcclError | None = None
        """Of the last call that failed: DDP turns it into a RuntimeError that only has its text"""
        self._name = name
        self._description = description
        self._end: Callable[[bool], None] = end or self._end_alone

    # --- what torch's C++ looks up ------------------------------------------------------------------------------------

    def getBackendName(self) -> str:
        """As in `init_process_group`."""
        return "pccl"

    def getRank(self) -> int:
        """This peer's, among those that are left."""
        return self.comm.rank

    def getSize(self) -> int:
        """How many are left."""
        return self.comm.world_size

    def getGroupName(self) -> str:
        """torch's name for it."""
        return self._name

    def setGroupName(self, name: str) -> None:
        """torch names it."""
        self._name = name

    def getGroupDesc(self) -> str:
        """What it is for."""
        return self._description

    def setGroupDesc(self, description: str) -> None:
        """Likewise."""
        self._description = description

    @property
    def _device_types(self) -> list[torch.device]:
        """Where tensors may be; checkpoints ask."""
        return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]

    def _get_backend(self, device: torch.device) -> ProcessGroup:  # type: ignore[override]  # as in torch itself, where it is no Backend
        """What does the work for a device."""
        return self

    # --- calls --------------------------------------------------------------------------------------------------------

    def _issue(self, make: Callable[[], Plan], opts: Any) -> Work:
        """Make the calls of a method. One that its caller waits for anyway is made in this thread."""
        how: dict[str, Any] = {"atomic": False}
        timeout = getattr(opts, "timeout", UNSET)
        if timeout > timedelta(0):
            how["timeout"] = timeout.total_seconds()
        plan = make()
        work = Work(plan.result)
        if not plan.calls:
            work.finish()
        elif len(plan.calls) == 1 and not getattr(opts, "asyncOp", True):
            self._run(work, plan.calls[0], how)
        else:
            self._start(work, plan.calls, how)
        return work

    def _run(self, work: Work, call: Call, how: dict[str, Any]) -> None:
        try:
            getattr(self.comm, call.method)(*call.arguments, **call.options, **how)
        except Exception as e:
            self._finish(work, e)
        else:
            work.finish()

    def _start(self, work: Work, calls: Sequence[Call], how: dict[str, Any]) -> None:
        left = itertools.count(len(calls) - 1, -1)  # next() is one step for all threads
        errors: list[Exception] = []

        def ended(native: sync.Work) -> None:
            try:
                native.wait()
            except Exception as e:
                errors.append(e)
            if not next(left):
                self._finish(work, errors[0] if errors else None)

        for call in calls:
            try:
                native = getattr(self.comm, call.method)(*call.arguments, **call.options, **how, async_op=True)
            except Exception as e:
                errors.append(e)
                if not next(left):
                    self._finish(work, e)
            else:
                native.add_done_callback(ended)

    def _failed(self, error: Exception) -> Work:
        """A call that could not be made."""
        work = Work([])
        self._finish(work, error)
        return work

    def _finish(self, work: Work, error: Exception | None) -> None:
        if isinstance(error, PcclError):
            self.last_error = error
        work.finish(error)

    # --- groups -------------------------------------------------------------------------------------------------------

    def new_group(
        self,
        ranks: Sequence[int],
        timeout: timedelta | None = None,
        pg_options: Any = None,
        group_name: str = "",
        group_desc: str = "",
        **ignored: Any,
    ) -> ProcessGroup | None:
        """`torch.distributed.new_group` asks this of the default group, on all of its ranks: part of it, or None for those outside.

        Raises:
            InvalidArgument: only some ranks are to call it, or there are options.
        """
        if group_name and not group_name.isdigit():  # torch numbers groups that all make, and names others by a hash
            raise InvalidArgument("use_local_synchronization: not supported: new_group has to be called by all ranks of the default group")
        if pg_options is not None:
            raise InvalidArgument(f"pg_options: a part of a group has none of its own, {pg_options!r} is given")
        part = self.comm.subgroup(ranks)
        if part is None:
            return None
        group = ProcessGroup(part, name=group_name, description=group_desc)
        if timeout is not None:
            group.set_timeout(timeout)
        return group

    def splitGroup(
        self, ranks: Sequence[int], timeout: timedelta | None = None, opts: Any = None, name: str = "", description: str = ""
    ) -> ProcessGroup | None:
        """As `new_group`, on all ranks of any group; torch's C++ looks for it by this name."""
        return self.new_group(ranks, timeout, opts, name, description)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Return when all members have come here; who has not is always named, whatever `wait_all_ranks` says.

        Raises:
            CollectiveTimeout: not all have come in time; `missing` has the names of those who have not.
        """
        self.comm.barrier(timeout=self.comm.timeout if timeout is None else timeout.total_seconds())

    def _set_default_timeout(self, timeout: timedelta) -> None:
        """See `set_timeout`; torch has this name for it, too."""
        self.set_timeout(timeout)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> Work:
        """Not supported: whoever sends waits for a receiver that names it.

        Raises (with the work):
            InvalidArgument: always.
        """
        return self._failed(InvalidArgument("src: a receiver has to name the sender: a send waits until it is asked for"))

    def set_timeout(self, timeout: timedelta) -> None:
        """What calls may take that do not say it themselves."""
        self.comm.timeout = timeout.total_seconds()

    # --- the end ------------------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """End calls under way, on all members, and go."""
        self._end(False)

    def shutdown(self) -> None:
        """Leave the group, once no call is under way. `torch.distributed.destroy_process_group` calls this."""
        self._end(True)
        outlast_callbacks(PATIENCE)

    def _end_alone(self, leave: bool) -> None:
        (self.comm.leave if leave else self.comm.close)()


def _method(operation: Operation) -> Callable[..., Work]:
    """The method for an operation. torch gives it options as the last argument, or as ``opts``; people may give what is in them."""
    make, options = operation

    def method(self: ProcessGroup, *arguments: Any, **named: Any) -> Work:
        try:
            if options is None:
                return self._issue(partial(make, self.comm, *_listed(arguments), **named), None)
            given = [x for x in (*arguments, named.pop("opts", None)) if hasattr(x, "asyncOp")]
            opts = given[0] if given else options()
            for name, attribute in ABBREVIATIONS.items():
                if name in named:
                    setattr(opts, attribute, named.pop(name))
            rest = [x for x in arguments if not hasattr(x, "asyncOp")]
            if len(rest) > 1 and isinstance(rest[-1], (int, dist.ReduceOp, dist.ReduceOp.RedOpType)):
                setattr(opts, "rootRank" if isinstance(rest[-1], int) else "reduceOp", rest.pop())
            return self._issue(partial(make, self.comm, *_listed(rest), opts=opts, **named), opts)
        except Exception as e:
            return self._failed(e)

    return method


def _listed(arguments: Sequence[Any]) -> list[Any]:
    """A tensor in front stands for a list of one where it is alone."""
    lone = bool(arguments) and isinstance(arguments[0], torch.Tensor) and not any(isinstance(x, torch.Tensor) for x in arguments[1:])
    return [[arguments[0]], *arguments[1:]] if lone else list(arguments)


for _name, _operation in OPERATIONS.items():
    setattr(ProcessGroup, _name, _method(_operation))
for _name, _new in ALIASES.items():
    setattr(ProcessGroup, _name, getattr(ProcessGroup, _new))
