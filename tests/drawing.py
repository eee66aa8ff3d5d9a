"""What the tests of pictures and of times share: names that are hard to show, a clock, golden files."""

from __future__ import annotations

from pathlib import Path

from pysagas import Step

GOLDEN = Path(__file__).parent / "golden"

HOSTILE = [
    "\"quotes\" and 'quotes'",
    "[brackets] (round) {curly} <angle> |bar|",
    "two\nlines\r\nand a tab\t",
    "end",
    "subgraph",
    "style n_0 fill:#f00",
    "ünïcode 日本 😀",
    "<b>bold</b><script>alert(1)</script>",
    "very long: " + 200 * "x",
    "**bold** `code` _it_ ~~gone~~ $$x^2$$",
    "%% comment",
    "%%{init: {}}%%",
    "1. list",
    "- item",
    "# head",
    "__init__",
    "a;b &amp; #35; #quot;",
    "</br>\\n",
    "fa:fa-car",
    "A-->B",
    '"]; click n_0 call alert()',
    "@{ shape: circle }",
    "http://example.org",
    "\x1b[31m\u202ereversed\ud800",
    "_",
]


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def step(self, name, took=1.0, back=0.5, fails=None, back_fails=None):
        """A step that takes so many seconds each way."""

        def act():
            self.now += took
            if fails is not None:
                raise fails

        def cancel():
            self.now += back
            if back_fails is not None:
                raise back_fails

        return Step(act, cancel, name=name)
