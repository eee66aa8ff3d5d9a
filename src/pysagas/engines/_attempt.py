"""One attempt of Restate at carrying out a run: what is recorded is given, all else done and recorded.

Restate calls the handler of a run again, from its beginning, until it has ended: each attempt replays
what the earlier ones recorded, and goes on from there. It knows what is recorded by its number. So the
effects of a run have to be asked for in the same order in each attempt, though branches of a group
run at the same time, and a replay is faster than what it replays.

The rules:

- One task at a time talks to Restate: the handler's. The saga runs in another; each of its effects *parks*,
  with a request for the handler. Only while there is one branch it asks for itself, since nobody else would.
- The handler waits until every branch is parked. Then it sends the new requests, in the order of their
  paths, and takes one answer: the next one in the order in which Restate has them. It gives it to its
  branch, and begins anew. So what a branch does depends on nothing but the answers before.
- An action runs in a task that Restate's library starts for it, and what came of it is recorded before
  its branch goes on (see ``_requests``).
- What is under way is never cut off but by the end of the attempt: Restate cannot cancel one step.
- An attempt that has ended (the connection is lost, the history is another one) lets nothing more
  happen: compensations neither.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import anyio
import anyio.lowlevel
import restate

from pysagas import (
    CallNext,
    Effect,
    Outcome,
    Parallel,
    Saga,
    SagaDefinitionError,
    StepInHand,
    StepState,
    outcome_of,
)
from pysagas.durable._codec import Codec, decode_error, encode_error, encode_result
from pysagas.durable._ends import Ends
from pysagas.durable._errors import NotRecordable, SagaChanged
from pysagas.durable._events import Event, EventKind, Path, RunState
from pysagas.durable._recalled import value_type
from pysagas.durable._storage import Ending

from ._limits import as_utf8, refuse_if_large
from ._requests import Pause, Request, Work, read, write

__all__ = ["Attempt", "Retries", "refuse_time_limits"]

Retries = Mapping[str, "restate.RunOptions[Any]"]

CANCELLED = 409
MEMBERS = ("action", "saga", "group")

# Rounds of the event loop until the tasks of a group have begun; and until those that take a group
# back have, which are no effects and cannot be counted: some, and some for each group around them.
ROUNDS_FORWARD = 2
ROUNDS_BACK = 10
ROUNDS_A_LEVEL = 6
# Seconds after which somebody should be told that a branch waits for something that is no effect.
LONG = 60.0

logger = logging.getLogger("pysagas")


class Cancelled(BaseException):
    """Raised in a run that somebody has cancelled, where it would go forward. Sticky."""


class Abandoned(BaseException):
    """Raised wherever something would happen in an attempt that has ended. Sticky."""


class Attempt:
    """One attempt at a run."""

    def __init__(
        self,
        context: restate.WorkflowContext,
        saga: Saga[..., Any],
        run_id: str,
        codec: Codec,
        retries: Retries,
    ) -> None:
        """Begins.

        Args:
            context: Restate's.
            saga: What is run.
            run_id: The name of the run.
            codec: For results.
            retries: How often steps are tried, by their names.
        """
        self._context = context
        self._saga = saga
        self._run_id = run_id
        self._codec = codec
        self._retries = retries
        self.ends = Ends(codec, saga.name)
        # What has happened, as it is recorded.
        self.records: list[bytes] = []
        self._new: list[Request] = []
        self._in_flight: dict[Any, Request] = {}
        # The tasks in which something is done.
        self.acting: set[asyncio.Task[Any]] = set()
        # The run itself, and the members that are under way: how many requests are parked in each,
        # and how many members in its groups.
        self._parked: dict[Path, int] = {(): 0}
        self._members: dict[Path, int] = {}
        # The groups that are open; those of which all members are under way at once.
        self._groups: set[Path] = set()
        self._unlimited: set[Path] = set()
        self._takes_groups_back = False
        # How deep in the tree the deepest group is.
        self._depth = 0
        # Whether the only branch talks to Restate itself.
        self._is_alone = False
        # Whether the saga has ended; calls that it has begun in other tasks may still go on.
        self._has_ended = False
        # Steps whose action returned what could not be recorded, and only an undo takes it back.
        self.lost: set[Path] = set()
        # Set, and counted, when something has happened in a branch.
        self._moved = asyncio.Event()
        self._moves = 0
        self._cancelled: Cancelled | None = None
        # Raised wherever something would happen, once this attempt has ended.
        self.abandoned: Abandoned | None = None
        # Why this attempt cannot go on; found in a branch, which then cancels the handler's task.
        self._problem: BaseException | None = None
        self._handler = asyncio.current_task()

    # --- in the task of the handler ------------------------------------------------------------------

    async def carry_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ending:
        """Carries out the run, from what is recorded on; gives how it ended.

        Raises:
            BaseException: What ended this attempt, and not the run.
        """
        task = asyncio.ensure_future(self._run(args, kwargs))
        task.add_done_callback(self._note_end)
        self._watch_for_standstill(-1)
        try:
            while True:
                await self._all_parked(task)
                if task.done() and not await self._is_work_left():
                    break
                self._send()
                if self._in_flight:
                    await self._take_answer()
        except BaseException:
            self._abandon()
            under_way: set[asyncio.Future[Any]] = {task, *self.acting}
            for one in under_way:
                one.cancel()
            while not all(one.done() for one in under_way):
                # An action in a worker thread runs to its end: a later attempt must not meet it.
                await asyncio.wait(under_way)
            if self._problem is None:
                raise
            assert self._handler is not None
            self._handler.uncancel()
            raise self._problem from None
        finally:
            self._watch.cancel()
        return self._ending(*task.result())

    async def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Outcome[Any] | None, BaseException | None]:
        """Runs the saga; gives its outcome, and what it raised.

        That is not raised: asyncio would end the whole worker by a SystemExit.
        """
        try:
            outcome = await self._saga.run_with(
                args, kwargs, run_id=self._run_id, middleware=[self._middleware]
            )
        except BaseException as error:
            return outcome_of(error), error
        return outcome, outcome.error

    def _ending(self, outcome: Outcome[Any] | None, error: BaseException | None) -> Ending:
        if outcome is None:
            assert error is not None
            raise error
        state = RunState[outcome.state.name]
        return Ending(state, b"", encode_error(error)) if error else Ending(state, self._value, None)

    async def _is_work_left(self) -> bool:
        """Tells whether a call on the saga's scope has outlived the saga; it takes itself back.

        A function can have begun it in a task of its own, with `asyncio.gather` or the like.
        """
        for _ in range(self._rounds_back):
            await asyncio.sleep(0)
        return bool(self._is_alone or self._new or self._in_flight)

    @property
    def _rounds_back(self) -> int:
        return ROUNDS_BACK + ROUNDS_A_LEVEL * self._depth

    @property
    def is_stopped(self) -> bool:
        """Whether the task of the handler is cancelled, or has ended."""
        assert self._handler is not None
        return self._handler.done() or self._handler.cancelling() > 0

    def _note_end(self, _: object) -> None:
        self._has_ended = True
        self._move()

    async def _all_parked(self, task: asyncio.Future[Any]) -> None:
        """Waits until each branch is parked, or waits for its members; or until the run has ended."""
        rounds = ROUNDS_FORWARD
        while True:
            while not self._is_quiet(task):
                self._moved.clear()
                await self._moved.wait()
            if self._takes_groups_back:
                rounds, self._takes_groups_back = self._rounds_back, False
            elif len(self._parked) == 1 and rounds == ROUNDS_FORWARD:
                return
            for _ in range(rounds):
                await asyncio.sleep(0)
            if self._is_quiet(task):
                return

    def _is_quiet(self, task: asyncio.Future[Any]) -> bool:
        return not self._is_alone and (
            task.done()
            or all(count or self._members.get(branch) for branch, count in self._parked.items())
        )

    def _move(self) -> None:
        """Notes that something has happened in a branch."""
        self._moves += 1
        self._moved.set()

    def _watch_for_standstill(self, moves: int) -> None:
        """Looks now and then whether a branch waits, and for no step; `moves` is from the last look."""
        waits = [
            path for path, count in self._parked.items() if not count and not self._members.get(path)
        ]
        if waits and moves == self._moves:
            logger.warning(
                "%s: nothing goes on for %s s, as the code at %s waits for something that is no step; let "
                "it wait in a step, and members of a group for nothing but their own steps",
                self._run_id,
                LONG,
                ", ".join(map(str, waits)),
            )
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(LONG, self._watch_for_standstill, self._moves)

    def _send(self) -> None:
        for request in sorted(self._new, key=lambda request: request.order):
            self._in_flight[request.ask(self._context)] = request
        self._new.clear()

    async def _take_answer(self) -> None:
        """Waits for the next answer, and gives it to its branch.

        Where all that is in flight are steps of one group, they are waited for together, which costs
        Restate's library less: nothing can come of one of them before the others have ended, too.
        """
        in_flight = self._in_flight
        for future in await self._completed(*in_flight, together=self._is_one_layer()):
            request = in_flight.pop(future)
            await self._keep(request, future)
            self._parked[request.branch] -= 1
            if request.order[1] == "compensation" and self._depth:
                self._takes_groups_back = True
            request.is_kept = True
            if not request.kept.done():  # else its branch is just being cancelled
                request.kept.set_result(None)

    async def _keep(self, request: Request, future: Awaitable[Any]) -> None:
        """Takes what Restate has recorded of a request; what was done in this attempt is known."""
        if request.record is None:
            request.record = await future
        if request.record is not None:
            self.records.append(request.record)

    async def _completed(self, *futures: Any, together: bool = False) -> list[Any]:
        """Waits for the next of Restate's futures, or for all; gives none where the run is cancelled."""
        try:
            if together:
                return await restate.gather(*futures)
            done, _ = await restate.wait_completed(*futures)
        except restate.TerminalError as error:
            if error.status_code != CANCELLED:
                raise
            self._cancelled = self._cancelled or Cancelled(f"run {self._run_id!r} was cancelled")
            return []
        return done

    def _is_one_layer(self) -> bool:
        if len(self._in_flight) < 2 or self._retries:
            return False
        orders = [request.order for request in self._in_flight.values()]
        group, kind = orders[0][0][:-1], orders[0][1]
        return group in self._unlimited and all(
            path[:-1] == group and its_kind == kind for path, its_kind, _ in orders
        )

    def _abandon(self) -> Abandoned:
        """Lets nothing more happen in this attempt."""
        self.abandoned = self.abandoned or Abandoned("this attempt at the run has ended")
        for request in [*self._new, *self._in_flight.values()]:
            if not request.kept.done():
                request.kept.set_exception(self.abandoned)
                request.kept.exception()  # whoever waited for it may have gone
        return self.abandoned

    # --- in the branches -----------------------------------------------------------------------------

    # Not async, as a coroutine more would stand around all that a run awaits. (Type checkers do not agree
    # on what that gives.)
    def _middleware(self, effect: Effect, call_next: CallNext) -> Any:
        if self.abandoned is not None:
            raise self.abandoned
        if effect.kind in MEMBERS and effect.path[:-1] in self._groups:
            return self._member(effect, call_next)
        return self._handle(effect, call_next)

    async def _member(self, effect: Effect, call_next: CallNext) -> object:
        around = self._branch_of(effect.path[:-1])
        self._parked[effect.path] = 0
        self._members[around] = self._members.get(around, 0) + 1
        try:
            return await self._handle(effect, call_next)
        finally:
            del self._parked[effect.path]
            self._members[around] -= 1
            self._move()

    def _handle(self, effect: Effect, call_next: CallNext) -> Awaitable[object]:
        match effect.kind:
            case "action":
                assert call_next.step is not None
                options = self._retries.get(effect.name)
                if options is None:
                    return self._action(effect, call_next, call_next.step)
                return self._tried_again(effect, call_next, call_next.step, options)
            case "compensation":
                assert call_next.step is not None
                return self._action(effect, call_next, call_next.step)
            case "group":
                return self._group(effect, call_next)
            case "saga":
                return self._whole(effect, call_next)
            case "commit":
                return self._commit(effect, call_next)
            case _:  # a rollback
                self._takes_groups_back = self._depth > 0
                return call_next()

    async def _commit(self, effect: Effect, call_next: CallNext) -> object:
        result = await call_next()
        event = Event(EventKind.COMMITTED, effect.path, as_utf8(effect.name), at=time.time())
        self.records.append(write(event))
        return result

    async def _group(self, effect: Effect, call_next: CallNext) -> object:
        group = call_next.definition
        assert isinstance(group, Parallel)
        self._groups.add(effect.path)
        self._depth = max(self._depth, len(effect.path) + 1)
        if group.limit is None:
            self._unlimited.add(effect.path)
        try:
            return await call_next()
        finally:
            self._groups.discard(effect.path)

    async def _whole(self, effect: Effect, call_next: CallNext) -> object:
        refuse_time_limits(call_next.definition)
        result = await call_next()
        if self.abandoned is not None:
            raise self.abandoned
        if self._cancelled is not None:
            raise self._cancelled  # it had nothing more to do, or has swallowed it
        if not effect.path:
            place = f"saga {self._saga.name!r}"
            self._value = encode_result(self._codec, result, value_type(self._saga), lambda: place)
            refuse_if_large(self._value, f"{place}: its value")
        return result

    # --- actions and compensations ---------------------------------------------------------------------

    def _action(
        self, effect: Effect, call_next: CallNext, step: StepInHand, number: int = 1
    ) -> Awaitable[object]:
        return self._done(Work(self, self._branch_of(effect.path), effect, call_next, number), step)

    async def _tried_again(
        self, effect: Effect, call_next: CallNext, step: StepInHand, options: restate.RunOptions[Any]
    ) -> object:
        """Does an action for which there is one of Restate's policies."""
        in_doubt = False
        number = 0
        while True:
            number += 1
            try:
                return await self._action(effect, call_next, step, number)
            except Exception as error:
                pause = _pause(options, number, error)
                if pause is None:
                    if in_doubt and step.state is StepState.NOT_APPLIED:
                        step.recall(StepState.UNKNOWN, error=error)  # an earlier try may have done it
                    raise
                in_doubt = in_doubt or step.state is StepState.UNKNOWN
                branch = self._branch_of(effect.path)
                await self._recorded(Pause(branch, (effect.path, effect.kind, number), pause), effect)

    async def _done(self, work: Work, step: StepInHand) -> object:
        """Has something done and recorded, and gives what it returned, or raises; or recalls that."""
        effect = work.effect
        if effect.kind == "action":
            await anyio.lowlevel.checkpoint_if_cancelled()
            if self._cancelled is not None:
                raise self._cancelled
        await self._recorded(work, effect)
        assert work.record is not None
        if not work.ran:
            return self._recall(effect, step, read(work.record)[-1])
        raised, work.raised = work.raised, None  # its traceback holds what holds it
        if raised is not None:
            try:
                raise raised
            finally:
                del raised
        return work.value

    def _recall(self, effect: Effect, step: StepInHand, event: Event) -> object:
        if effect.kind == "compensation":
            if event.kind is EventKind.NOT_COMPENSATED:
                raise decode_error(json.loads(event.data))
            return None
        try:
            ended = self.ends.read(effect, step, event)
        except SagaChanged as changed:
            self._fail(changed)
        state = ended.state
        if ended.is_lost:
            # Its undo had what is lost now. It is met again where it has run; else nobody can run it.
            if step.compensation is not None:
                state = StepState.UNKNOWN
            else:
                self.lost.add(effect.path)
        step.recall(state, result=ended.result, error=ended.error)
        if ended.error is not None:
            raise ended.error
        return ended.value

    async def _recorded(self, request: Request, effect: Effect) -> None:
        """Waits until what is asked for is recorded; a sibling that fails does not cut that off."""
        is_alone = not (request.branch or self._groups) and effect.kind == "action"
        try:
            if is_alone:
                with anyio.CancelScope(shield=True):
                    await self._ask_alone(request)
            else:
                await self._park(request)
        except asyncio.CancelledError:
            if is_alone or self.abandoned is not None or not _is_cancelled_by_scope():
                self._cut_off(effect)
            await self._recorded_all_the_same(request, effect)

    async def _recorded_all_the_same(self, request: Request, effect: Effect) -> None:
        """Waits for what is asked for, though a sibling has failed.

        The shield comes now, and not before: most members have no sibling that fails, and for each of
        them it would be a tenth of what a step costs this worker.
        """
        if not request.is_kept:
            request.kept = asyncio.get_running_loop().create_future()  # the other one is cancelled
            try:
                with anyio.CancelScope(shield=True):
                    await request.kept
            except asyncio.CancelledError:
                self._cut_off(effect)

    async def _ask_alone(self, request: Request) -> None:
        """Asks Restate for what the only branch there is wants, while the handler's task waits.

        To park, and to be told by that task, would give the same, and take longer.
        """
        self._parked[()] = 1
        self._is_alone = True
        try:
            future = request.ask(self._context)
            while not await self._completed(future):
                pass
            await self._keep(request, future)
        except asyncio.CancelledError:
            raise
        except BaseException as problem:
            self._fail(problem)
        finally:
            self._parked[()] = 0
            self._is_alone = False
            if self._has_ended:
                self._move()

    def _park(self, request: Request) -> asyncio.Future[None]:
        """Hands a request to the handler; gives what waits until Restate has recorded what it asks for."""
        request.kept = asyncio.get_running_loop().create_future()
        self._parked[request.branch] += 1
        self._new.append(request)
        self._move()
        return request.kept

    def _cut_off(self, effect: Effect) -> NoReturn:
        """Ends this attempt, where something has cancelled a branch that waits for Restate."""
        if self.abandoned is not None:
            raise self.abandoned
        self._fail(
            SagaDefinitionError(
                f"saga {effect.saga!r} was cancelled while it waited for {effect.kind} {effect.name!r} at "
                f"{effect.path}, by asyncio.timeout or the like: a replay could not keep such a limit; give "
                "the step a timeout"
            )
        )

    def _branch_of(self, path: Path) -> Path:
        while path not in self._parked:
            path = path[:-1]
        return path

    def _fail(self, problem: BaseException) -> NoReturn:
        """Ends this attempt, from a branch."""
        if self.abandoned is None:
            self._problem = problem
            assert self._handler is not None
            self._handler.cancel()  # it may wait for a step that takes long
        raise self._abandon()


def _is_cancelled_by_scope() -> bool:
    """Tells whether a cancellation is that of a scope of AnyIO around; else it is one of asyncio's."""
    return anyio.current_effective_deadline() == -math.inf


def refuse_time_limits(part: Any) -> None:
    """Refuses what a replay could not keep: how far a rollback comes in a given time.

    Raises:
        SagaDefinitionError: A saga has a limit for its rollback.
    """
    limit = getattr(part, "rollback_timeout", None)
    if limit is not None:
        raise SagaDefinitionError(
            f"{part!r} has rollback_timeout={limit}, which Restate cannot keep: after a "
            "crash the rollback is replayed faster than it was, and would come to other compensations; "
            "give the steps a compensation_timeout instead"
        )
    for inner in getattr(part, "parts", ()):
        refuse_time_limits(getattr(inner, "definition", inner))


def _pause(options: restate.RunOptions[Any] | None, number: int, error: Exception) -> timedelta | None:
    """Says how long to wait for the next try of an action; None where there is none."""
    if options is None or isinstance(error, restate.TerminalError | NotRecordable):
        return None
    if options.max_attempts is not None and number >= options.max_attempts:
        return None
    first = options.initial_retry_interval or timedelta(milliseconds=50)
    pause = first * (options.retry_interval_factor or 2.0) ** (number - 1)
    return min(pause, options.max_retry_interval or timedelta(seconds=10))
