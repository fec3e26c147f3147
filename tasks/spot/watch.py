"""The watch for notices: a thread that finds the machine's metadata service, and asks it time and again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal

import httpx

from tasks.spot.clouds import CLOUDS
from tasks.spot.drain import Drain
from tasks.spot.metadata import find_source, metadata_url, open_metadata
from tasks.spot.notice import Notice, NoticeSource

Wanted = Literal["none", "interruption", "rebalance"]

# The longest that any cloud gives before an interruption: what is announced earlier leaves time to score on.
_HORIZON_SECONDS = 120.0


def presses(notice: Notice, wanted: Wanted) -> bool:
    """Return whether a notice ends the work by now: it is certain, or forecasts are wanted too, and it is near."""
    return (notice.certain or wanted == "rebalance") and notice.seconds_left <= _HORIZON_SECONDS


@contextmanager
def watching(drain: Drain, wanted: Wanted, say: Callable[[str], None]) -> Generator[None]:
    """Tell `drain` what the machine's cloud announces while the block runs.

    It does not hold up what goes on beside it: a machine without a metadata service costs nothing but a thread for
    half a second.
    """
    url = None if wanted == "none" else metadata_url()
    if url is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(url, drain, wanted, say, done), name="notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        # Not waited for: a look that is under way ends within its short time-out, and tells nobody.
        done.set()


def _watch(url: str, drain: Drain, wanted: Wanted, say: Callable[[str], None], done: threading.Event) -> None:
    try:
        client = open_metadata(url)
    except (httpx.InvalidURL, ValueError) as error:
        say(str(error))
        return
    with client:
        source = find_source(client, CLOUDS)
        if source is None:
            return
        ear = Ear(source, drain, wanted, lambda words: None if done.is_set() else say(words))
        while not done.is_set():
            ear.listen()
            done.wait(source.every_seconds)


class Ear:
    """Listens to one source, and passes on what is new."""

    def __init__(self, source: NoticeSource, drain: Drain, wanted: Wanted, say: Callable[[str], None]) -> None:
        self._source, self._drain, self._wanted, self._say = source, drain, wanted, say
        self._told: set[tuple[str, bool]] = set()

    def listen(self) -> None:
        """Look once; where the source can't say, what it said before holds."""
        try:
            notice = self._source.look()
        except (httpx.HTTPError, ValueError):
            return
        if notice is None:
            if self._told:
                self._say(f"{self._source.name} has withdrawn its notice.")
            self._told.clear()
            self._drain.withdraw(self._source.name)
            return
        pressing = presses(notice, self._wanted)
        if pressing:
            self._drain.hear(notice)
        else:
            self._drain.withdraw(self._source.name)
        if (notice.action, pressing) not in self._told:
            self._told.add((notice.action, pressing))
            self._say(announced(notice, pressing=pressing))


def announced(notice: Notice, *, pressing: bool = True) -> str:
    """Return the sentence that tells a person of a notice, and what is done about it."""
    if pressing:
        return f"{notice.words}: chunks in hand are finished where they fit, and nothing new is begun."
    return f"{notice.words}: work goes on for now; each finished chunk stays."
