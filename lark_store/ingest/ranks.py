"""Several processes at one ingest, as `torchrun` and `accelerate launch` start them.

Rank 0 alone writes the catalog and commits; the others sketch their share and hand over what they wrote.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from lark_store.errors import InputError, LarkStoreError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
_PATIENCE = timedelta(hours=2)  # one rank may load a large model long after another
_MEETINGS = count(1)  # every rank counts the same


class Ranks:
    """The processes of this ingest; alone, `size` is 1 and nothing is sent anywhere."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @property
    def is_first(self) -> bool:
        """Whether this process commits."""
        return self.rank == 0

    def once(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 alone; every rank gets its result, or its error."""
        if self.size == 1:
            return work()
        from torch import distributed

        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = work()
            except LarkStoreError as error:
                box[1] = error
        with self._together():
            distributed.broadcast_object_list(box, src=0, group=self._group)
        if box[1] is not None:
            box[1].is_shared = True
            raise box[1]
        result: T = box[0]
        return result

    def gather(self, mine: T) -> list[T]:
        """Return what every rank has, in their order, on rank 0; elsewhere nothing."""
        if self.size == 1:
            return [mine]
        from torch import distributed

        everything: list[Any] | None = [None] * self.size if self.is_first else None
        with self._together():
            distributed.gather_object(mine, everything, dst=0, group=self._group)
        return everything or []

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of gloo: a connection was closed, or nobody answered
            raise StoreError(
                f"another of the {self.size} processes ended",
                "its own message says why; run the command again to go on",
            ) from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that a launcher started, if one did (it sets WORLD_SIZE and RANK).

    Raises
    ------
    InputError
        The launcher's variables are incomplete, or the processes can't reach each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    from torch import distributed

    ours = not distributed.is_initialized()
    try:
        if ours:
            _meet(size)
        group = None if ours else distributed.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"this is one of {size} processes, and they can't join: {error}", "start them with `torchrun`"
        ) from error
    try:
        yield Ranks(distributed.get_rank(), size, group)
    finally:
        distributed.destroy_process_group(group)


def _meet(size: int) -> None:
    """Make the group of all processes, and share the machine's GPUs out.

    What the launcher keeps outlives a group: under the same names the next one would look for the last one's addresses.
    """
    from torch import cuda, distributed
    from torch.distributed.distributed_c10d import PrefixStore

    store, rank = _launcher()
    names = PrefixStore(f"lark-store/{next(_MEETINGS)}", store)
    distributed.init_process_group("gloo", timeout=_PATIENCE, store=names, rank=rank, world_size=size)
    if cuda.is_available():  # `cuda` means this one from now on
        cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % cuda.device_count())


@cache
def _launcher() -> tuple[Any, int]:
    """Return the launcher's key-value store and this process's rank."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://", timeout=_PATIENCE))
    return store, rank
