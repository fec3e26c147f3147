"""Money, as people write it."""

from __future__ import annotations

_DOLLARS, _CENTS = 1000, 1


def usd(amount: float) -> str:
    """Return an amount in US dollars: without cents from a thousand on, and to three digits below a dollar."""
    if amount >= _DOLLARS:
        return f"${amount:,.0f}"
    return f"${amount:,.2f}" if amount >= _CENTS else f"${amount:.3g}"
