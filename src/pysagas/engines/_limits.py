"""What Restate can take: how much at once, and which text."""

from __future__ import annotations

from pysagas.durable import NotRecordable

__all__ = ["LARGEST", "as_utf8", "refuse_if_large"]

# The server takes messages of 32 MiB, if it is not told otherwise; and the message in which a run ends
# has its arguments as well as its value, each of which may grow by being quoted.
LARGEST = 30 * 1024 * 1024
LARGEST_VALUE = 7 * 1024 * 1024


def refuse_if_large(data: bytes, what: str) -> None:
    """Refuses arguments, or the value of a saga, that Restate would not take.

    Raises:
        NotRecordable: They are too large.
    """
    if len(data) > LARGEST_VALUE:
        raise NotRecordable(
            f"{what} is {len(data):,} bytes, and on Restate at most {LARGEST_VALUE:,} are possible: keep it "
            "elsewhere, and give its name"
        )


def as_utf8(text: str) -> str:
    """Gives a text that can be written: what is no character of one stands with a backslash."""
    return text.encode(errors="backslashreplace").decode()
