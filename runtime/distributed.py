"""Several processes that train one model, as torchrun starts them: one for each GPU, or for some cores.

    world = join()                 # of one process, unless torchrun has started this one
    world.sum_in_place(gradients)  # over all processes

They run the same program on different batches. What only one of them may do, such as writing files, the main one does.
"""
import atexit
import functools
import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.config import BadInput

TIMEOUT = timedelta(minutes=30)  # a process that waits so long for the others ends: one of them hangs


class OtherProcessEnded(OSError):
    """Nothing can be agreed on any more."""


@dataclass(frozen=True)
class World:
    """The processes of a run. rank: of this one, from 0; local_rank, local_size: among those of its machine. n_restarts: how
    often torchrun has started all of them again."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    n_restarts: int = 0

    @contextmanager
    def failing_together(self):
        """Where one process finds bad input, or a file that cannot be read, all end: the first of them says why. Inside,
        they communicate only after an inner block of this kind, whose end finds one that has failed until then."""
        try:
            yield
            error = None
        except OtherProcessEnded:
            raise
        except (BadInput, OSError) as found:
            error = found
        if self.size > 1:
            failed = [rank for rank, other in enumerate(self.gather(error is not None)) if other]
            if failed and self.rank != failed[0]:
                raise SystemExit(2)
        if error is not None:
            raise error

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_in_place(self, tensors: list[Tensor]):
        """Replaces tensors on one device, which are added in fp32, by their sums over all processes. One call of all of
        them, whose order of adding is fixed."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        with explained():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.detach().copy_(part.view_as(tensor))

    def exchange(self, tensors: list[list[Tensor]]):
        """tensors: of each process, on one device. Those of other processes get the values that they have there."""
        for rank, parts in enumerate(tensors if self.size > 1 else []):
            if not parts:
                continue
            flat = torch.cat([part.reshape(-1) for part in parts])
            with explained():
                dist.broadcast(flat, rank)
            if rank != self.rank:
                for part, values in zip(parts, flat.split([part.numel() for part in parts])):
                    part.copy_(values.view_as(part))

    def largest(self, *values: float) -> tuple[float, ...]:
        """The largest of each over all processes, on the host."""
        if self.size == 1:
            return values
        largest = torch.tensor(values, dtype=torch.float64)
        with explained():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return tuple(largest.tolist())

    def sum(self, value: int) -> int:
        """Over all processes, on the host."""
        if self.size == 1:
            return value
        total = torch.tensor(value)
        with explained():
            dist.all_reduce(total)
        return int(total)

    def gather(self, value: Any) -> list:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with explained():
            dist.all_gather_object(values, value)
        return values

    def gather_to_main(self, value: Any) -> list:
        """The values of all processes, by rank, in the main process; [] elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else []
        with explained():
            dist.gather_object(value, values if self.is_main else None)
        return values

    def map_in_order(self, function: Callable[[Any], Any], items: Iterable) -> Iterator[tuple[Any, Any]]:
        """Each item with function(item), in their order, computed by the processes in turn; all of them get all."""
        items = iter(items)
        while part := list(itertools.islice(items, self.size)):
            own = function(part[self.rank]) if self.rank < len(part) else None
            yield from zip(part, self.gather(own))


ALONE = World()


@contextmanager
def explained():
    """A process that waits for one that has ended gets a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessEnded(f"another process of this run has ended ({str(error).splitlines()[0][:200]})") from None


def store_of_this_start(store: dist.Store, world: World) -> dist.Store:
    """A part of `store` that only the processes now running use, to be called in all of them.

    torchrun has one store for all its restarts, so a process might find the address of one that is dead. Therefore the main
    one names the part, and tells each of the others until it has confirmed it: what another start has left never does."""
    own = uuid.uuid4().hex
    if not world.is_main:
        store.set(f"joins/{world.rank}", own)
        name = store.get(f"{own}/name").decode()
        store.set(f"{own}/knows/{name}", "")
        return dist.PrefixStore(name, store)
    for rank in range(1, world.size):
        while not store.check([f"{(other := store.get(f'joins/{rank}').decode())}/knows/{own}"]):
            store.set(f"{other}/name", own)
            time.sleep(0.005)
    return dist.PrefixStore(own, store)


@functools.cache
def join() -> World:
    """Joins the processes that torchrun has started, once; the device is still to be chosen, see `local_device`."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    world = World(*(int(os.environ[name]) for name in (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")))
    if world.size > 1:
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        with explained():
            store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=TIMEOUT))
            dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=TIMEOUT, rank=world.rank,
                                    world_size=world.size, store=store_of_this_start(store, world))
        world = replace(world, n_restarts=int(world.largest(world.n_restarts)[0]))  # each machine counts its own
        atexit.register(dist.destroy_process_group)  # its threads, if they outlive the interpreter, may end it in a crash
    return world
