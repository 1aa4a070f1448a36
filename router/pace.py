"""Saying no in time: what a queue cannot hold, or get to soon enough, is refused at once."""

from __future__ import annotations

from router.errors import OverloadedError

# Of so many last timings the upper quartile says how fast the work goes: it follows a machine that
# gets slower within a few batches, while one or two that stalled say nothing.
_TIMED = 9
_LEAST_TIMED = 3
# What is admitted must rarely be refused later, after a long wait and for nothing. The pace varies,
# and a batch in work is counted as a whole: only so much of the longest wait is given away.
_ADMITTED_SHARE = 0.7
_MOST_RETRY_SECONDS = 5.0
_REMEDY = "try again a little later"


class Pace:
    """How fast a queue of at most `queue_items` is worked on, and what that makes it refuse.

    Nothing may have to wait over `queue_seconds`. Two threads may use it.
    """

    def __init__(self, name: str, queue_items: int, queue_seconds: float) -> None:
        """`name` is the queue's, for errors."""
        self._field = f"{name} queue"
        self._queue_items = queue_items
        self._queue_seconds = queue_seconds
        # Seconds per item of late. Replaced as a whole: two threads look at it.
        self._timed: tuple[float, ...] = ()

    def note(self, seconds: float) -> None:
        """An item took so long: its share, where several were worked on together.

        0 where nothing waits that could not be worked on together with what comes.
        """
        self._timed = (*self._timed[1 - _TIMED :], seconds)

    def admit(self, items: int, unfinished: int) -> None:
        """Raises OverloadedError: `items` more than `unfinished` ones are too many, or too slow.

        Too slow are those that are before them; how long they take themselves is for their caller
        to judge.
        """
        wait = unfinished * self._seconds_per_item()
        too_slow = wait > _ADMITTED_SHARE * self._queue_seconds
        if too_slow or unfinished + items > self._queue_items:
            found = f"{unfinished} waiting" + (f", for {wait:.1f} s" if too_slow else "")
            # By then half of them are done, if nobody else comes.
            retry_after = min(max(wait / 2, 0.1), _MOST_RETRY_SECONDS)
            raise OverloadedError(self._field, found, _REMEDY, retry_after)

    def is_stale(self, waited: float) -> bool:
        """Whether an item that waited so long is refused, so that those behind it need not."""
        return waited >= self._queue_seconds

    def stale(self) -> OverloadedError:
        """The error of an item that waited too long."""
        return OverloadedError(self._field, f"waited over {self._queue_seconds:g} s", _REMEDY)

    def _seconds_per_item(self) -> float:
        """How long an item takes of late; 0 while nobody can tell."""
        timed = sorted(self._timed)
        if len(timed) < _LEAST_TIMED:
            return 0.0
        return timed[min(3 * len(timed) // 4, len(timed) - 2)]
