"""Several processes in one ingest, started by `torchrun` or `accelerate launch`.

Only rank 0 writes the catalog and commits. The other ranks sketch their share and send it the files they wrote.
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
_TIMEOUT = timedelta(hours=2)  # ranks may load a large model at different times
_GROUPS = count(1)  # equal on every rank


class Ranks:
    """The processes of an ingest. For a single process, `size` is 1 and nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @property
    def is_first(self) -> bool:
        """Whether this process commits."""
        return self.rank == 0

    def once(self, work: Callable[[], T]) -> T:
        """Run a function on rank 0; every rank gets its result or error."""
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

    def gather(self, value: T) -> list[T]:
        """Collect every rank's value on rank 0, in rank order; other ranks get an empty list."""
        if self.size == 1:
            return [value]
        from torch import distributed

        everything: list[Any] | None = [None] * self.size if self.is_first else None
        with self._together():
            distributed.gather_object(value, everything, dst=0, group=self._group)
        return everything or []

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # from gloo: connection closed or timeout
            raise StoreError(
                f"another of the {self.size} processes ended",
                "see the error of that process; run the command again to continue",
            ) from error


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes of a launcher, if one set WORLD_SIZE and RANK.

    Raises
    ------
    InputError
        The launcher's variables are incomplete, or processes can't reach each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    from torch import distributed

    is_ours = not distributed.is_initialized()
    try:
        if is_ours:
            _create_group(size)
        group = None if is_ours else distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the {size} processes of this ingest can't connect: {error}", "start them with `torchrun`"
        ) from error
    try:
        yield Ranks(distributed.get_rank(), size, group)
    finally:
        distributed.destroy_process_group(group)


def _create_group(size: int) -> None:
    """Create the group of all processes and assign the machine's GPUs.

    The launcher's key-value store outlives a group, so each group has its own prefix, to avoid stale addresses.
    """
    from torch import cuda, distributed
    from torch.distributed.distributed_c10d import PrefixStore

    store, rank = _launcher()
    names = PrefixStore(f"lark-store/{next(_GROUPS)}", store)
    distributed.init_process_group("gloo", timeout=_TIMEOUT, store=names, rank=rank, world_size=size)
    if cuda.is_available():  # `cuda` refers to this GPU from now on
        cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % cuda.device_count())


@cache
def _launcher() -> tuple[Any, int]:
    """Return the launcher's key-value store and this process's rank."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://", timeout=_TIMEOUT))
    return store, rank
