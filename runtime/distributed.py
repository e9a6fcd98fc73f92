"""The ranks of a job: how they meet, exchange tensors and fail together. On the wire: torch.distributed, with gloo for
tensors on the CPU and NCCL for those on GPUs.

Ranks meet at a store that rank 0 keeps. Its address goes round through MPI where MPI started the ranks (`mpirun -n 4 ...`),
else through a file that `runtime.launcher` names. From then on `Heartbeat` watches over all of them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ..core.errors import TargetError, TrtcError
from .cpu_threads import limit_threads
from .gpus import set_defaults
from .heartbeat import Heartbeat
from .placement import INTERFACE, Placement, require_interface

JOIN_S = 60
"""How long a rank waits for the others to start."""
STALL_S = 60
"""How late a rank may come to an exchange within a step. All compute the same, so that none should be late at all."""
PIPELINE_S = 600
"""How long the computation of a step may take in the stages that a rank waits for."""
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name from torch 2.13 on, and before."""
_UNLIMITED = timedelta(days=3650)
_LOOPBACK = "lo"
_numbers = count()


class RankGroup:
    """One rank's view of the job; a `Communicator`. Made by `join`."""

    def __init__(
        self,
        place: Placement,
        store: Store,
        names: Sequence[str],
        heartbeat: Heartbeat,
        local_rank: int,
        one_host: bool,
    ) -> None:
        self.rank, self.size, self.local_rank, self.one_host = place.rank, place.size, local_rank, one_host
        self.name = names[place.rank]
        self._names, self._store, self._heartbeat = names, store, heartbeat
        try:
            dist.init_process_group(
                "gloo",
                store=PrefixStore("gloo", store),
                rank=self.rank,
                world_size=self.size,
                timeout=_UNLIMITED,
            )
        except RuntimeError as error:  # with a stack of C++ behind the first line
            reason = str(error).partition("\n")[0]
            raise TargetError(f"{self.name}: cannot reach the other ranks by gloo: {reason}") from None
        self._peers = self._pipeline = dist.new_group(backend="gloo", timeout=timedelta(seconds=STALL_S))
        self.num_peers, self.member = self.size, self.rank
        self._gpus: dist.ProcessGroup | None = None
        self._gpu_pipeline: dist.ProcessGroup | None = None
        self._sends: list[tuple[Any, torch.Tensor]] = []

    def divide(self, tp_size: int) -> None:
        """From now on each `tp_size` ranks in a row are the stage of a pipeline, and sums and gathers are theirs alone: of its
        `num_peers` ranks this is number `member`. Every rank calls it, before `connect_gpus`."""
        if tp_size == self.size:
            return
        self.num_peers, self.member = tp_size, self.rank % tp_size
        limit = timedelta(seconds=STALL_S)
        groups = [dist.new_group(stage, backend="gloo", timeout=limit) for stage in self._stages()]
        self._peers = groups[self.rank // tp_size]
        self._pipeline = dist.new_group(backend="gloo", timeout=timedelta(seconds=PIPELINE_S))

    def connect_gpus(self, device: torch.device) -> None:
        """From now on tensors on `device`, this rank's, are exchanged too: by NCCL, on the current stream, where a CUDA graph
        may capture it. Every rank calls it."""
        set_defaults()

        def communicator(ranks: list[int] | None = None) -> dist.ProcessGroup:
            # Made here and now (device_id), not within the first exchange, which may be captured.
            made: dist.ProcessGroup = dist.new_group(
                ranks, backend="nccl", timeout=_UNLIMITED, device_id=device
            )
            return made

        with self._exchange():
            self._gpu_pipeline = self._gpus = communicator()
            if 1 < self.num_peers < self.size:
                self._gpus = [communicator(stage) for stage in self._stages()][self.rank // self.num_peers]

    def nccl_communicator(self) -> int:
        """Address of the `ncclComm_t` of this rank's stage; after `connect_gpus`."""
        backend = self.gpus._get_backend(torch.device("cuda"))
        return int(backend._comm_ptr())  # type: ignore[attr-defined]  # ProcessGroupNCCL's own

    @property
    def gpus(self) -> dist.ProcessGroup:
        """torch's group of the GPUs of this rank's stage; after `connect_gpus`."""
        assert self._gpus is not None, "no communicator before connect_gpus"
        return self._gpus

    def _stages(self) -> list[list[int]]:
        count = self.num_peers
        return [list(range(first, first + count)) for first in range(0, self.size, count)]

    def least(self, value: int) -> int:
        """The smallest of what the ranks bring."""
        found = torch.tensor([value], dtype=torch.int64)
        with self._exchange():
            dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def agree(self, identity: Mapping[str, str]) -> None:
        """Returns when every rank has said the same `identity`: what it is by what it has.

        Raises TargetError on rank 0, naming rank, host and what differs. The other ranks wait for rank 0, which ends them.
        """
        self._store.set(f"identity/{self.rank}", json.dumps(identity))
        if self.rank == 0:
            for other, name in enumerate(self._names):
                theirs: dict[str, str] = json.loads(self._wait(f"identity/{other}"))
                for what, value in identity.items():
                    if theirs[what] != value:
                        raise TargetError(
                            f"{name} has {what} {theirs[what]}, {self.name} has {value}: every rank needs the same "
                            f"trtc, the same engine and the same options"
                        )
            self._store.set("agreed", "yes")
        self._wait("agreed")

    def all_reduce(self, x: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
        """The sum over the ranks of a stage, the same bits on every rank. Raises TargetError when a rank does not come.

        overwrite: nobody reads `x` any more, so that the sum may take its place.
        """
        result = x if overwrite and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        if result.numel():
            with self._exchange():
                dist.all_reduce(result, group=self._group(x))
        return result

    def all_gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The parts of all ranks of a stage, in rank order along `axis`. Raises TargetError when a rank does not come."""
        part = x.contiguous()
        parts = part.new_empty(self.num_peers, *part.shape)
        if part.numel():
            with self._exchange():
                _all_gather(parts.view(-1), part.view(-1), group=self._group(x))
        return join_parts(parts, axis)

    def _group(self, x: torch.Tensor) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self._peers if x.device.type == "cpu" else self.gpus
        return group

    def broadcast(self, x: torch.Tensor) -> None:
        """Fills `x` on every rank with what it holds on rank 0, which may take its time."""
        self._heartbeat.next_round()
        with self._exchange():
            dist.broadcast(x, src=0)

    def spread(self, x: torch.Tensor, rank: int) -> None:
        """Fills `x` on every rank, of all stages, with what it holds on `rank`."""
        with self._exchange():
            dist.broadcast(x, src=rank, group=self._between(x))

    def _between(self, x: torch.Tensor) -> dist.ProcessGroup:
        """What carries tensors from stage to stage."""
        group = self._pipeline if x.device.type == "cpu" else self._gpu_pipeline
        assert group is not None, "no communicator before connect_gpus"
        return group

    def start_send(self, x: torch.Tensor, rank: int) -> None:
        """Begins to give `x`, which must not change, to a rank of another stage, which calls `receive`. What a rank is sent
        arrives in order. Between GPUs all of it is work on a stream, in the order of these calls on each rank."""
        x = x.contiguous()
        with self._blaming():
            self._sends.append((dist.isend(x, rank, group=self._between(x)), x))

    def finish_sends(self) -> None:
        """Waits until all is received; between GPUs, the current stream does. Raises TargetError when a rank does not come."""
        for work, _ in self._sends:
            with self._waiting():
                work.wait()
        self._sends.clear()

    def receive(self, x: torch.Tensor, rank: int) -> None:
        """Fills `x` with what `rank` sends. Raises TargetError when nothing comes."""
        with self._waiting():
            dist.recv(x, rank, group=self._between(x))

    @contextmanager
    def device_work(self) -> Iterator[None]:
        """Inside, this rank may wait for its GPU, which may wait for other ranks; the job ends when that takes too long."""
        with self._heartbeat.limit(STALL_S):
            yield

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error inside ends the job: it leaves the block, naming this rank, and the other ranks end."""
        try:
            yield
        except TrtcError as error:
            if self.rank > 0:
                self._heartbeat.let_others_speak()
            self.fail()
            if self.rank == 0:
                raise
            raise type(error)(f"{self.name}: {error}") from error
        except BaseException:
            print(f"trtc: error on {self.name}:", file=sys.stderr, flush=True)
            self.fail()
            raise

    def fail(self) -> None:
        """Ends the other ranks. Where this one cannot end, because its GPU waits for one of them, the launcher ends it."""
        self._heartbeat.fail()

    def close(self) -> None:
        """Leaves the job in good order; every rank calls it."""
        self._heartbeat.stop()
        dist.destroy_process_group()

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        self._heartbeat.progress += 1
        with self._blaming():
            yield

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        with self._heartbeat.waiting(), self._blaming():
            yield

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Inside, ranks are waited for. When that fails, the process ends, naming the lost rank, or TargetError does."""
        try:
            yield
        except RuntimeError as error:
            behind = self._heartbeat.wait_for_verdict()
            reason = str(error).partition(". ")[0]
            raise TargetError(
                f"{self.name}: an exchange failed; furthest behind is {behind}: {reason}"
            ) from error

    def _wait(self, key: str) -> bytes:
        """The value of `key`, once some rank has set it; lost ranks are the heartbeat's business."""
        with self._blaming():
            self._store.wait([key], _UNLIMITED)
            value: bytes = self._store.get(key)
        return value


def join(place: Placement) -> RankGroup:
    """Meets the other ranks of the job; every rank calls it, and as often as the others.

    Raises TargetError when they do not come within `JOIN_S` seconds, or when MPI or the network cannot be used.
    """
    require_interface()
    try:
        rendezvous, hosts = _rendezvous(place)
        prefix = f"job{next(_numbers)}"
        store = PrefixStore(prefix, rendezvous)
        host = socket.gethostname()
        mine = {"host": host, "process": os.getpid(), "processors": sorted(os.sched_getaffinity(0))}
        store.set(f"rank/{place.rank}", json.dumps(mine))
        ranks: list[dict[str, Any]] = [json.loads(store.get(f"rank/{r}")) for r in range(place.size)]
    except dist.DistError as error:
        raise TargetError(
            f"rank {place.rank} on {socket.gethostname()}: not all {place.size} ranks came within {JOIN_S} s: {error}"
        ) from None
    local = hosts[: place.rank].count(host) if place.local_rank is None else place.local_rank
    names = [f"rank {r} on {who['host']} (process {who['process']})" for r, who in enumerate(ranks)]
    limit_threads([who["processors"] for who in ranks if who["host"] == host])
    if len(set(hosts)) == 1 and _LOOPBACK in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault(INTERFACE, _LOOPBACK)  # one host: nothing leaves it
    watched = rendezvous.clone()  # type: ignore[attr-defined]  # torch's stubs do not have it
    heartbeat = Heartbeat(PrefixStore(prefix, watched), place.rank, names, place.launcher_pid)
    heartbeat.start()
    return RankGroup(place, store, names, heartbeat, local, len(set(hosts)) == 1)


def join_parts(parts: torch.Tensor, axis: int) -> torch.Tensor:
    """[N, *shape] -> the N parts one after the other along `axis`; a view where there is nothing to move."""
    count, *shape = parts.shape
    axis %= len(shape)
    shape[axis] *= count
    return parts.movedim(0, axis).reshape(shape)


@cache
def _rendezvous(place: Placement) -> tuple[TCPStore, list[str]]:
    """The store that rank 0 keeps as long as its process lives, and the host of every rank."""
    if place.rendezvous is None:
        return _meet_through_mpi(place)
    file = FileStore(place.rendezvous, place.size)
    file.set_timeout(timedelta(seconds=JOIN_S))
    if place.rank == 0:
        store = _store("127.0.0.1", 0, keep=True)
        file.set("port", str(store.port))
    else:
        store = _store("127.0.0.1", int(file.get("port")))
    return store, [socket.gethostname()] * place.size


def _meet_through_mpi(place: Placement) -> tuple[TCPStore, list[str]]:
    first_use = "mpi4py.MPI" not in sys.modules
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise TargetError(
            f"MPI started {place.size} ranks and mpi4py cannot be used ({error}): pip install 'trtc[mpi]'"
        ) from None
    world = MPI.COMM_WORLD
    if world.Get_size() != place.size:
        raise TargetError(
            f"mpirun started {place.size} ranks and mpi4py sees {world.Get_size()}: they are of different MPIs; use the "
            f"mpirun of the MPI that mpi4py was built for"
        )
    hosts: list[str] = world.allgather(socket.gethostname())
    address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    if place.rank == 0:
        store = _store(address, 0, keep=True)
        world.bcast(store.port)
    else:
        store = _store(address, world.bcast(None))
    if first_use:
        MPI.Finalize()  # or a rank that fails would wait for the others when it exits
    return store, hosts


def _store(address: str, port: int, *, keep: bool = False) -> TCPStore:
    timeout = timedelta(seconds=JOIN_S)
    return TCPStore(address, port, is_master=keep, wait_for_workers=False, timeout=timeout)
