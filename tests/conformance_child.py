"""A process that runs a saga of the conformance suite, and is killed; started by ``places.py``.

``python conformance_child.py JOURNAL BACKEND`` waits for a line of JSON, the run to start. The journal is
a file, or "" for none.
"""

from __future__ import annotations

import sys

import anyio
import msgspec

from pysagas.durable import SQLiteJournal
from pysagas.testing.conformance import SAGAS, OnCrash, Order

KNOWN = {saga.name: saga for saga in SAGAS}


class Start(msgspec.Struct):
    saga: str
    order: Order
    run_id: str
    on_crash: OnCrash


async def runs(journal: str) -> None:
    start = msgspec.json.decode(await anyio.to_thread.run_sync(sys.stdin.readline), type=Start)
    saga = KNOWN[start.saga]
    if not journal:
        await saga.run(start.order)
        return
    async with SQLiteJournal(journal) as opened:
        await opened.run(saga, start.order, run_id=start.run_id, on_crash=start.on_crash)


if __name__ == "__main__":
    anyio.run(runs, sys.argv[1], backend=sys.argv[2])
