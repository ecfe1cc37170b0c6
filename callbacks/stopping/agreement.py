"""All ranks stop after the same step, although a signal may reach only one of them, and each at another step.

While nothing happens, this costs a step nothing: no collective, no message, no look at the GPU. In a thread, each rank
looks into the store of the process group now and then. Once a rank has asked there, it goes like this:

1. The thread of each rank writes down the last *gate* that its main thread has passed. A gate is a place where a run
   can stop, such as the end of a step; all ranks come through the same gates. From then on the main thread waits at
   its next gate for what follows.
2. Rank 0 writes down the furthest of these gates.
3. Each rank stops at its first gate behind that one. A rank that is further back goes on until it gets there.

No main thread is needed for 1 and 2. So a rank that waits for another one in a collective holds up nothing.
"""

import os
import threading
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

_IDLE = 0.5  # seconds between two looks into the store
_BUSY = 0.02  # likewise, once a rank has asked
_NOW = "now"


class Gate(NamedTuple):
    """A place where a run can stop: the number of steps, and of validation batches after the last of them."""

    step: int
    validation_batch: int


class Agreement:
    """What the ranks agree on.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        store: Where they meet; only a single rank needs none.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: Store | None = None) -> None:
        if world_size > 1 and store is None:
            raise ValueError("several ranks need a store")
        self.rank, self.world_size = rank, world_size
        self._store = store
        self._round = 0
        self._wishes: list[int] = []  # signals that this rank has received, and that are not dealt with
        self._changed = threading.Condition()
        self._passed = Gate(0, 0)
        self._signum: int | None = None
        self._last: Gate | None = None

    @classmethod
    def in_group(cls, run: int) -> "Agreement | None":
        """Make the agreement of the process group; ``None`` if it has no store.

        Args:
            run: A number that is the same on all ranks, and another one for each run of a program.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        try:
            store = dist.distributed_c10d._get_default_store()
        except (RuntimeError, ValueError):
            return None
        if hasattr(store, "clone"):
            store = store.clone()  # a connection of its own: the main thread may wait for others in the group's
        # Torchrun may keep the store, with what the processes had agreed on that it has just restarted.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"lightning_muon/stop/{attempt}/{run}", store)
        return cls(dist.get_rank(), dist.get_world_size(), store)

    # ---- in the thread

    def ask(self, signum: int) -> None:
        """Ask all ranks to act on a signal."""
        with self._changed:
            self._wishes.append(signum)
            if self._store is None:
                self._begin_alone()

    def poll(self) -> float:
        """Look into the store, and write there what is due.

        Returns:
            Seconds until the next look.
        """
        if self._store is None:
            return float("inf")
        # A rank that has ended takes the store with it; what that means is found out elsewhere.
        with suppress(RuntimeError):
            self._look(self._store)
        return _IDLE if self._signum is None else _BUSY

    def end_all_now(self) -> None:
        """Tell all ranks to end at once."""
        if self._store is not None:
            self._store.set(_NOW, "1")

    def must_end_now(self) -> bool:
        """Return whether a rank has told all others to end at once."""
        with suppress(RuntimeError):
            return self._store is not None and self._store.check([_NOW])
        return False

    def _look(self, store: Store) -> None:
        with self._changed:
            number, begun, decided = self._round, self._signum is not None, self._last is not None
            wish = self._wishes[0] if self._wishes else None
        if decided:
            return
        asked, last = f"{number}/asked", f"{number}/last"
        everywhere = [f"{number}/passed/{rank}" for rank in range(self.world_size)]
        if not begun:
            if wish is not None:
                store.compare_set(asked, "", str(wish))
            elif not store.check([asked]):
                return
            signum = int(store.get(asked))
            with self._changed:
                self._signum = signum
                passed = self._passed
            store.set(everywhere[self.rank], " ".join(map(str, passed)))
        if self.rank == 0 and store.check(everywhere):
            store.set(last, " ".join(map(str, max(_gate(store.get(key)) for key in everywhere))))
        if store.check([last]):
            with self._changed:
                self._last = _gate(store.get(last))
                self._changed.notify_all()

    def _begin_alone(self) -> None:
        if self._wishes and self._signum is None:
            self._signum, self._last = self._wishes[0], self._passed
            self._changed.notify_all()

    # ---- in the main thread

    @property
    def signum(self) -> int | None:
        """The signal that the ranks act on, as soon as this rank knows of it."""
        return self._signum

    def at(self, gate: Gate) -> int | None:
        """Return the signal to act on here, on all ranks; ``None`` to go on. Called with each gate, in their order."""
        with self._changed:
            if self._signum is None:
                self._passed = gate
                return None
            while self._last is None:
                self._changed.wait()
            if gate <= self._last:
                return None
            return self._signum

    def done(self, gate: Gate) -> None:
        """Go on after a signal that did not end the run: the next one counts anew."""
        with self._changed:
            if self._signum in self._wishes:
                self._wishes.remove(self._signum)
            self._round += 1
            self._passed, self._signum, self._last = gate, None, None
            if self._store is None:
                self._begin_alone()


def _gate(text: bytes) -> Gate:
    return Gate(*map(int, text.split()))
