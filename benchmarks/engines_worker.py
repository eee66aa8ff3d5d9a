"""The worker of ``engines.py``: our sagas on Restate, and beside them what one would write by hand.

``python benchmarks/engines_worker.py OURS BY_HAND INGRESS``: two ports of this machine, one loop.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import restate
import restate.server
from engines import CASES, NAME, QUICK, Shape, action, compensation, slow_action
from hypercorn.asyncio import serve
from hypercorn.config import Config

from pysagas.engines.restate import RestateEngine

by_hand = restate.Workflow("ByHand")


@by_hand.main(name="run")
async def run(ctx: restate.WorkflowContext, given: dict[str, Any]) -> int:
    shape, argument = Shape(**given["shape"]), given["argument"]
    function = slow_action if shape.waits else action
    if shape.grouped:
        return await a_group(ctx, function, shape.steps, argument)
    return await a_sequence(ctx, function, shape.steps, argument)


async def a_sequence(ctx, function, steps, argument):
    done = []
    try:
        for number in range(steps):
            done.append(number)  # before it is done: what failed may have done something
            await ctx.run_typed(f"step {number}", function, restate.RunOptions(), argument)
    except restate.TerminalError:
        for number in reversed(done):
            await ctx.run_typed(f"back {number}", compensation, restate.RunOptions(), argument)
        raise
    return len(done)


async def a_group(ctx, function, steps, argument):
    members = [
        ctx.run_typed(f"step {number}", function, restate.RunOptions(), argument)
        for number in range(steps)
    ]
    await restate.gather(*members)
    try:
        return len([await member for member in members])
    except restate.TerminalError:
        back = [
            ctx.run_typed(f"back {number}", compensation, restate.RunOptions(), argument)
            for number in range(steps)
        ]
        await restate.gather(*back)
        for one in back:
            await one
        raise


async def main(ours: str, hand: str, ingress: str) -> None:
    shapes = dict.fromkeys(case.shape for case in (*CASES, *QUICK))
    engine = RestateEngine([shape.saga() for shape in shapes], name=NAME, ingress=ingress)
    stop = asyncio.Event()
    # Restate's library takes SIGTERM for itself, and Hypercorn would not leave.
    restate.server.install_shutdown_hook(asyncio.get_running_loop(), stop.set)
    serving = []
    for app, port in ((engine.app, ours), (restate.app([by_hand]), hand)):
        config = Config()
        config.bind = [f"127.0.0.1:{port}"]
        config.loglevel = "ERROR"
        serving.append(serve(app, config, shutdown_trigger=stop.wait))
    await asyncio.gather(*serving)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
