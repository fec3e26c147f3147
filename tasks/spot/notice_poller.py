"""A thread that finds the machine's metadata service, and polls it for notices of an interruption."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal

import httpx

from tasks.spot.cloud_notices import CLOUDS, detect_source, find_metadata_url, open_metadata
from tasks.spot.drain import Drain, Notice, NoticeSource

NoticeLevel = Literal["none", "interruption", "rebalance"]

# The longest notice that any cloud gives: an earlier announcement leaves time to go on scoring.
_HORIZON_SECONDS = 120.0


@contextmanager
def poll_notices(drain: Drain, level: NoticeLevel, log: Callable[[str], None]) -> Generator[None]:
    """Pass what the machine's cloud announces on to `drain` while the block runs.

    The block is not delayed: without a metadata service this costs a thread for half a second.
    """
    url = None if level == "none" else find_metadata_url()
    if url is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_poll, args=(url, drain, level, log, done), name="notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        # Not waited for: a request that is under way ends within its short time-out, and logs nothing.
        done.set()


def _poll(url: str, drain: Drain, level: NoticeLevel, log: Callable[[str], None], done: threading.Event) -> None:
    try:
        client = open_metadata(url)
    except (httpx.InvalidURL, ValueError) as error:
        log(str(error))
        return
    with client:
        source = detect_source(client, CLOUDS)
        if source is None:
            return
        poller = NoticePoller(source, drain, level, lambda message: None if done.is_set() else log(message))
        while not done.is_set():
            poller.poll()
            done.wait(source.poll_seconds)


class NoticePoller:
    """Polls one source, and passes on what is new."""

    def __init__(self, source: NoticeSource, drain: Drain, level: NoticeLevel, log: Callable[[str], None]) -> None:
        self._source, self._drain, self._level, self._log = source, drain, level, log
        self._logged: set[tuple[str, bool]] = set()

    def poll(self) -> None:
        """Read the source once; where it does not answer, its last answer holds."""
        try:
            notice = self._source.read_notice()
        except (httpx.HTTPError, ValueError):
            return
        except Exception as error:  # noqa: BLE001 - a thread that ended would see no notice any more
            self._log(f"{self._source.name} must answer as its documentation says, got {error!r}. It is asked again.")
            return
        if notice is None:
            if self._logged:
                self._log(f"{self._source.name} has withdrawn its notice.")
            self._logged.clear()
            self._drain.withdraw_notice(self._source.name)
            return
        drains = requires_drain(notice, self._level)
        if drains:
            self._drain.add_notice(notice)
        else:
            self._drain.withdraw_notice(self._source.name)
        if (notice.action, drains) not in self._logged:
            self._logged.add((notice.action, drains))
            self._log(describe_notice(notice, drains=drains))


def requires_drain(notice: Notice, level: NoticeLevel) -> bool:
    """Return whether a notice ends the work now: it is near, and certain unless forecasts count too."""
    return (notice.certain or level == "rebalance") and notice.seconds_left <= _HORIZON_SECONDS


def describe_notice(notice: Notice, *, drains: bool = True) -> str:
    """Return the sentence that is logged for a notice: what is announced, and what is done about it."""
    if drains:
        return f"{notice.description}: chunks in progress are finished where they fit, and no other is begun."
    return f"{notice.description}: work goes on for now; each finished chunk is kept."
