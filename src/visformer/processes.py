"""The processes that train together: who this one is, and how they talk.

They may be started by torchrun, by OpenMPI's or MPICH's mpirun, by Slurm's srun, or by `visformer train` itself; each
leaves the same facts in the environment under names of its own, and neither mpi4py nor an MPI library is needed. They
talk through torch.distributed: NCCL between CUDA devices, HCCL between Ascends, Gloo between CPUs. What is written here
does nothing in a process that is alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from visformer import console
from visformer.errors import RunError, UsageError, VisformerError

# Names of (rank, size, local rank), by launcher; the first whose size is set counts. Slurm's are those of a step,
# which srun sets; a batch script that starts one process has only the job's.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "OpenMPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
BACKENDS = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl"}
T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # for a process that waits for others, who may be reading a slow disk
_FIRST_PORT, _PORTS = 29_500, 20_000


@dataclass(frozen=True)
class Place:
    """This process among those launched together: `rank` of `size`, and `local_rank` among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = ""

    @property
    def is_first(self) -> bool:
        """True for the process that writes files and speaks."""
        return self.rank == 0


def place() -> Place:
    """What the launcher says. Raises `UsageError` when it says half of it."""
    for launcher, names in LAUNCHERS.items():
        rank, size, local = (os.environ.get(name) for name in names)
        if size is None or (size == "1" and launcher != "torchrun"):
            continue
        if rank is None:
            raise UsageError(f"{names[1]} is set to {size}, but {names[0]} is not; start with {launcher}, or unset it")
        if local is None:
            local = os.environ.get("PALS_LOCAL_RANKID", rank if launcher == "MPICH" else "0")
        try:
            found = Place(int(rank), int(size), int(local), launcher)
        except ValueError:
            raise UsageError(f"{', '.join(names)}: {rank!r}, {size!r}, {local!r} are not whole numbers") from None
        if not 0 <= found.rank < found.size:
            raise UsageError(f"{names[0]}: {rank} is out of range; it must be at least 0 and below {names[1]}, {size}")
        return found
    return Place()


@contextmanager
def joined(device: torch.device, use: bool | None = None) -> Iterator[Place]:
    """Join the others for as long as the context is open; alone, nothing happens.

    `use` False: refuse to be one of several. Others than the first say nothing on stderr but warnings of errors.
    """
    here = place()
    if here.size == 1:
        yield Place()
        return
    if use is False:
        raise UsageError(
            f"distribute: False, but {here.launcher} started {here.size} processes; start one, or leave distribute out"
        )
    os.environ.setdefault("MASTER_ADDR", _address(here))
    os.environ.setdefault("MASTER_PORT", str(_port()))
    if device.type != "cpu":
        torch.accelerator.set_device_index(here.local_rank)
    console.set_quiet(not here.is_first)
    try:
        backend = f"cpu:gloo,{device.type}:{BACKENDS[device.type]}" if device.type in BACKENDS else "gloo"
        dist.init_process_group(backend, store=_store(here), rank=here.rank, world_size=here.size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"process {here.rank} of {here.size} could not join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield here
    finally:
        console.set_quiet(False)
        dist.destroy_process_group()


def _store(here: Place) -> Any:
    """Where the processes find one another's addresses.

    torchrun keeps one store through all its restarts, and an address that a lost process has left there would be waited
    for in vain; so each attempt has names of its own.
    """
    store, _, _ = next(rendezvous("env://", rank=here.rank, world_size=here.size, timeout=TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"attempt_{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]


def _address(here: Place) -> str:
    """Where the first process is, when MASTER_ADDR does not say."""
    if here.launcher == "srun":
        return first_host(os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1")))
    on_this_machine = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", os.environ.get("MPI_LOCALNRANKS", str(here.size)))
    if int(on_this_machine) != here.size:
        raise UsageError(
            f"{here.launcher} started processes on several machines, which need to know where the first one is; "
            "pass its host's name, as in mpirun -x MASTER_ADDR=node1"
        )
    return "127.0.0.1"


def first_host(nodes: str) -> str:
    """The first name in Slurm's short form: gpu[03-05,9],other -> gpu03."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    return f"{match[1]}{match[2] or ''}{match[3] or ''}" if match else nodes


def _port() -> int:
    """A port that all processes of one job agree on and two jobs on one machine rarely share."""
    names = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PBS_JOBID")
    job = next((os.environ[name] for name in names if name in os.environ), "0")
    number = 0
    for byte in job.encode():
        number = (number * 257 + byte) % _PORTS
    return _FIRST_PORT + number


# --- what the processes do together; alone, each gives back what it got ----------------------------------------------


def several() -> bool:
    """True between the opening and the closing of `joined` with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def add_up(*tensors: Tensor) -> None:
    """Sum each tensor over the processes, in place."""
    if several():
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """What the first process has for `value`, on all of them."""
    if not several():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_first(function: Callable[[], T]) -> T:
    """Run `function` in the first process alone; all get its result, or raise the error that it raised."""
    if not several():
        return function()
    outcome: Any = None
    if dist.get_rank() == 0:
        try:
            outcome = (function(), None)
        except VisformerError as error:
            outcome = (None, error)
    value, error = from_first(outcome)
    if error is not None:
        error.told = dist.get_rank() > 0
        raise error
    return value


def anywhere(flag: bool) -> bool:
    """True if `flag` is True in any of the processes."""
    if not several():
        return flag
    tensor = torch.tensor(int(flag))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())


def wait_for_all() -> None:
    """Return when every process has come this far."""
    if several():
        dist.barrier()


def share_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers, such as running statistics, which each moves by its own batches."""
    if several():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
