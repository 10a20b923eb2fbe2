"""The tiles that a head has given to other edge nodes: who has which, who gave up, until when to wait."""

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from runtime.node.chain import Out, Parcel
from runtime.node.job import Job
from runtime.node.state import Key
from runtime.wire.channel import Hub
from runtime.wire.events import Peer
from runtime.wire.messages import Cancel, Submit, TileRef
from runtime.wire.pack import Packed

PATIENCE = 3.0
"""A tile is given up when it has taken this many times as long as the head's own, transfers apart: tiles are cut to take
equally long. Guess."""

SLACK_S = 0.25
"""Added to it: two processes on a busy machine are woken late. Guess."""

PROTECTION_FACTOR = 1.5
"""The head stops waiting when the deadline is this many times the seconds away that it needs to do without."""


@dataclass(slots=True)
class _Tile:
    """One tile on another node."""

    key: Key
    out: Out
    run: int  # number of the message that began its chain
    peer: Peer
    sent_at_s: float
    transfer_s: float  # expected, both ways


class Scatter:
    """Tiles that are out. `post` may be called from any thread, everything else from the loop's.

    Args:
        hub: sends.
        jobs: the requests on this node.
        next_number: gives a number for a message that no other message to a node has.
    """

    def __init__(self, hub: Hub, jobs: Mapping[Key, Job], next_number: Callable[[], int]) -> None:
        self._hub = hub
        self._jobs = jobs
        self._next_number = next_number
        self._posted: deque[tuple[Key, tuple[Parcel, ...], threading.Event]] = deque()
        self._out: dict[int, _Tile] = {}
        self._runs: dict[Key, dict[int, tuple[Peer, int]]] = {}  # by tile: who has it, our number for its first part
        self._give_up_at_s: dict[Key, float] = {}

    def post(self, key: Key, parcels: tuple[Parcel, ...]) -> threading.Event:
        """Have tiles sent by the loop; the event is set when it has.

        Who posts computes next, and had better wait for that: on a machine whose processors are all busy a thread that is
        woken may stand behind such a computation for milliseconds, and the other nodes would begin that much later.
        """
        is_sent = threading.Event()
        self._posted.append((key, parcels, is_sent))
        self._hub.wake()
        return is_sent

    def send_posted(self, peers: Mapping[str, Peer], now_s: float) -> list[Key]:
        """Send what was posted; return requests that wait for no tile any more, because nobody was there."""
        ended = []
        while self._posted:
            key, parcels, is_sent = self._posted.popleft()
            job = self._jobs.get(key)
            if job is not None and job.tiled is not None:  # else cancelled meanwhile
                for parcel in parcels:
                    name = job.submit.plan.edge_nodes[parcel.out[1]]
                    peer = peers.get(name)
                    if peer is None or not peer.is_up:
                        ended += self._end(key, parcel.out, f"{name} is not connected")
                    else:
                        self._send(key, job, parcel, peer, now_s)
            is_sent.set()
        return ended

    def _send(self, key: Key, job: Job, parcel: Parcel, peer: Peer, now_s: float) -> None:
        assert job.tiled is not None  # or nothing was posted
        number = self._next_number()
        index, tile = parcel.out
        if parcel.is_first:
            self._forget_run(key, tile)
            self._runs.setdefault(key, {})[tile] = peer, number
        elif tile not in self._runs.get(key, {}):
            job.tiled.waiting.discard(parcel.out)  # given up meanwhile: the head will see to it
            return
        _, run = self._runs[key].pop(tile) if parcel.is_last else self._runs[key][tile]
        transfer_s = self._transfer_s(peer, parcel.packed.nbytes + parcel.back_bytes)
        self._out[number] = _Tile(key, parcel.out, run, peer, now_s, transfer_s)
        left_s = job.arrived_at_s + job.submit.remaining_s - now_s
        submit = Submit(
            number,
            job.submit.model_id,
            job.submit.plan,
            job.submit.input_kind,
            left_s,
            parcel.packed.headers,
            tile=TileRef(index, tile, run),
        )
        self._hub.send_data(peer, submit, parcel.packed.frames, number)

    def _transfer_s(self, peer: Peer, nbytes: float) -> float:
        link = self._hub.link_state(peer)
        rtt_s = 0.0 if math.isnan(link.rtt_s) else link.rtt_s
        bandwidth_bps = link.samples[0].bandwidth_bps if link.samples else math.inf
        return rtt_s + (nbytes + link.backlog_bytes) * 8.0 / bandwidth_bps

    # --- what becomes of them; each returns the requests that wait for no tile any more --------------------------------

    def take(self, number: int, packed: Packed) -> list[Key]:
        """A node has answered."""
        tile = self._out.pop(number, None)
        if tile is None:
            return []  # given up or cancelled meanwhile
        job = self._jobs[tile.key]
        assert job.tiled is not None  # or nothing of it would be out
        job.tiled.back[tile.out] = packed
        return self._end(tile.key, tile.out, "")

    def fail(self, number: int, why: str) -> list[Key]:
        """A node will not answer."""
        tile = self._out.pop(number, None)
        return [] if tile is None else self._end(tile.key, tile.out, f"{tile.peer.name}: {why}")

    def lose(self, peer: Peer, reason: str) -> list[Key]:
        """The link to a node is gone."""
        numbers = [number for number, tile in self._out.items() if tile.peer is peer]
        return [key for number in numbers for key in self.fail(number, f"lost ({reason})")]

    def give_up(self, now_s: float) -> list[Key]:
        """Stop waiting where that has taken too long."""
        due = [key for key, at_s in self._give_up_at_s.items() if now_s >= at_s]
        ended = []
        for key in due:
            del self._give_up_at_s[key]
            for number, tile in self._waited_for(key):
                self._recall(number, tile)
                ended += self.fail(number, "late")
        return ended

    def _end(self, key: Key, out: Out, why: str) -> list[Key]:
        """A tile is out no more; with a reason its node is asked for nothing else of this chain."""
        tiled = self._jobs[key].tiled
        assert tiled is not None  # or nothing of it would be out
        tiled.waiting.discard(out)
        if why:
            tiled.lost.setdefault(out[1], why)
            tiled.waiting -= self._leave(key, {out[1]})
        if tiled.is_waiting:
            return []
        self._give_up_at_s.pop(key, None)
        return [key]

    def _forget_run(self, key: Key, tile: int) -> None:
        """Tell a node that what it keeps of a tile is wanted no more."""
        peer, number = self._runs.get(key, {}).pop(tile, (None, 0))
        if peer is not None and peer.is_up:
            self._hub.send(peer, Cancel(number))

    # --- waiting ------------------------------------------------------------------------------------------------------

    def wait(self, key: Key, deadline_at_s: float, now_s: float) -> None:
        """The head's own tile is done: from here on other nodes are waited for, and for how long."""
        job = self._jobs[key]
        if job.tiled is None:
            return
        job.tiled.waiting -= self._leave(key, job.tiled.own)
        out = [tile for _, tile in self._waited_for(key)]
        if not out:
            return
        own_s = now_s - min(tile.sent_at_s for tile in out)
        at_s = max(tile.sent_at_s + PATIENCE * (own_s + tile.transfer_s) + SLACK_S for tile in out)
        self._give_up_at_s[key] = min(at_s, deadline_at_s - PROTECTION_FACTOR * job.tiled.remainder_s)

    @property
    def next_due_s(self) -> float:
        """When `give_up` has something to do; inf when nothing is waited for."""
        return min(self._give_up_at_s.values(), default=math.inf)

    def _waited_for(self, key: Key) -> list[tuple[int, _Tile]]:
        """The tiles that are out without which a head cannot go on, and their numbers."""
        tiled = self._jobs[key].tiled
        at = None if tiled is None else tiled.at
        return [(number, tile) for number, tile in self._out.items() if tile.key == key and tile.out[0] == at]

    def _leave(self, key: Key, tiles: Set[int] | None = None) -> set[Out]:
        """Nothing more is wanted of some tiles of a request, or of all; return those that were out."""
        for index in list(self._runs.get(key, ())):
            if tiles is None or index in tiles:
                self._forget_run(key, index)
        left = set()
        for number, tile in list(self._out.items()):
            if tile.key == key and (tiles is None or tile.out[1] in tiles):
                del self._out[number]
                self._recall(number, tile)
                left.add(tile.out)
        return left

    def drop(self, key: Key) -> None:
        """A request has ended: its tiles are wanted no more."""
        self._give_up_at_s.pop(key, None)
        self._leave(key)
        self._runs.pop(key, None)

    def _recall(self, number: int, tile: _Tile) -> None:
        """A message is wanted no more, nor what its node keeps of the chain."""
        self._hub.withdraw(tile.peer, number)
        for each in {number, tile.run}:
            self._hub.send(tile.peer, Cancel(each))
