"""The metadata service of the machine's cloud: found once, then asked for notices.

OVERNIGHT_METADATA_URL names it where it is not at the address that AWS, GCP and Azure share; `off` for none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Protocol

import httpx

from tasks.spot.notice import NoticeSource

METADATA_URL = "OVERNIGHT_METADATA_URL"
_LINK_LOCAL = "http://169.254.169.254"
# It answers within milliseconds where there is one; where there is none, this is all that finding out costs.
_SECONDS = 0.5


class Cloud(Protocol):
    """A kind of metadata service."""

    def find(self, client: httpx.Client) -> NoticeSource | None:
        """Return the source of notices where the client's service is of this kind, None where it is another."""
        ...


def metadata_url() -> str | None:
    """Return where the metadata service would be, None where none is to be asked."""
    url = os.environ.get(METADATA_URL, _LINK_LOCAL).strip()
    return None if url.lower() in {"", "off"} else url


def open_metadata(url: str) -> httpx.Client:
    """Return a client for a metadata service; it heeds no proxy, which could only answer for another machine.

    Raises ValueError where the address is none.
    """
    if not url.startswith(("http://", "https://")):
        message = f"{METADATA_URL} must be an http:// address or 'off', got {url!r}. No notices are read."
        raise ValueError(message)
    return httpx.Client(base_url=url, timeout=_SECONDS, trust_env=False)


def find_source(client: httpx.Client, clouds: Sequence[Cloud]) -> NoticeSource | None:
    """Ask once for each cloud, all side by side, and return the first that answers as it should.

    None, and silent, where none does: most machines are in no cloud.
    """
    found: list[NoticeSource | None] = [None] * len(clouds)

    def ask(at: int) -> None:
        try:
            found[at] = clouds[at].find(client)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return

    # Daemons: a process that ends meanwhile waits for none of them.
    threads = [threading.Thread(target=ask, args=(at,), daemon=True) for at in range(len(clouds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next((source for source in found if source is not None), None)


def seconds_until(when: datetime, response: httpx.Response) -> float:
    """Return the seconds until then, 0 where it is past, by the clock of the server that told it.

    This machine's own may be off by more than a notice is long.
    """
    told = response.headers.get("date")
    now = parsedate_to_datetime(told) if told else datetime.now(UTC)
    return max(0.0, (when - now).total_seconds())
