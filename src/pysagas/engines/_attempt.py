"""One attempt of Restate at carrying out a run: what is recorded is given, all else done and recorded.

Restate calls the handler of a run again, from its beginning, until it has ended: each attempt replays
what the earlier ones recorded, and goes on from there. It knows what is recorded by its number. So the
effects of a run have to be asked for in the same order in each attempt, though branches of a group
run at the same time, and a replay is faster than what it replays.

The rules:

- One task talks to Restate: the handler's. The saga runs in another; each of its effects *parks*, with
  a request for the handler.
- The handler waits until every branch is parked. Then it sends the new requests, in the order of their
  paths, and takes one answer: the next one in the order in which Restate has them. It gives it to its
  branch, and begins anew. So what a branch does depends on nothing but the answers before.
- An action runs in the task of its branch. What came of it is recorded before its branch goes on.
- What is under way is never cut off but by the end of the attempt: Restate cannot cancel one step.
- An attempt that has ended (the connection is lost, the history is another one) lets nothing more
  happen: compensations neither.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import anyio
import anyio.lowlevel
import restate
from restate.serde import BytesSerde

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
from pysagas.durable._codec import Codec, as_bytes, as_text, decode_error, encode_error, encode_result
from pysagas.durable._ends import Ends, undo_is_lost
from pysagas.durable._errors import NotRecordable, SagaChanged
from pysagas.durable._events import Event, EventKind, RunState
from pysagas.durable._recalled import value_type
from pysagas.durable._storage import Ending

__all__ = ["Attempt", "Retries", "refuse_time_limits"]

Path = tuple[int, ...]
Written = tuple[EventKind, bytes]
Retries = Mapping[str, "restate.RunOptions[Any]"]

CANCELLED = 409
MEMBERS = ("action", "saga", "group")

# Rounds of the event loop until the tasks of a group have begun; and until those that take a group
# back have, which are no effects and cannot be counted.
ROUNDS_FORWARD = 2
ROUNDS_BACK = 10
# Seconds after which somebody should be told that a branch waits for something that is no effect.
LONG = 60.0

logger = logging.getLogger("pysagas")


class Cancelled(BaseException):
    """Raised in a run that somebody has cancelled, where it would go forward. Sticky."""


class Abandoned(BaseException):
    """Raised wherever something would happen in an attempt that has ended. Sticky."""


class _Go:
    """The answer that there is nothing recorded."""


GO = _Go()


class Request:
    """What a parked branch wants: that something is done, or to know what came of it."""

    __slots__ = ("answer", "branch", "ended", "kept", "make", "order", "scope")

    def __init__(self, branch: Path, order: tuple[Any, ...], make: Callable[[Request], Any]) -> None:
        loop = asyncio.get_running_loop()
        self.branch = branch
        # Among those that are new: by their paths.
        self.order = order
        # Asks Restate for it; gives Restate's future.
        self.make = make
        # What is recorded, or GO.
        self.answer: asyncio.Future[bytes | _Go] = loop.create_future()
        # What came of it, to be recorded; and whether it is.
        self.ended: asyncio.Future[bytes] = loop.create_future()
        self.kept: asyncio.Future[bytes] | None = None
        self.scope: anyio.CancelScope | None = None


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
        self._ends = Ends(codec, saga.name)
        # What has happened, as a journal would have it.
        self.events: list[Event] = []
        self._new: list[Request] = []
        self._in_flight: dict[Any, Request] = {}
        # The run itself, and the members that are under way: how many requests are parked in each,
        # and how many members in its groups.
        self._parked: dict[Path, int] = {(): 0}
        self._members: dict[Path, int] = {}
        # The groups that are open; those of which all members are under way at once.
        self._groups: set[Path] = set()
        self._unlimited: set[Path] = set()
        self._takes_groups_back = False
        # Steps whose action returned what could not be recorded, and only an undo takes it back.
        self._lost: set[Path] = set()
        self._moved = asyncio.Event()
        self._cancelled: Cancelled | None = None
        self._abandoned: Abandoned | None = None
        # Why this attempt cannot go on.
        self._problem: BaseException | None = None

    # --- in the task of the handler ------------------------------------------------------------------

    async def carry_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ending:
        """Carries out the run, from what is recorded on; gives how it ended.

        Raises:
            BaseException: What ended this attempt, and not the run.
        """
        task = asyncio.ensure_future(self._run(args, kwargs))
        task.add_done_callback(lambda _: self._moved.set())
        try:
            while True:
                await self._all_parked(task)
                if task.done():
                    break
                self._send()
                await self._take_answer()
        except BaseException:
            self._abandon()
            task.cancel()
            while not task.done():
                # An action in a worker thread runs to its end: a later attempt must not meet it.
                await asyncio.wait({task})
            raise
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

    async def _all_parked(self, task: asyncio.Future[Any]) -> None:
        """Waits until each branch is parked, or waits for its members; or until the run has ended."""
        rounds = ROUNDS_FORWARD
        while True:
            while not self._is_quiet(task):
                self._moved.clear()
                late = asyncio.get_running_loop().call_later(LONG, self._tell_who_is_not_parked)
                try:
                    await self._moved.wait()
                finally:
                    late.cancel()
            if self._takes_groups_back:
                rounds, self._takes_groups_back = ROUNDS_BACK, False
            elif len(self._parked) == 1 and rounds == ROUNDS_FORWARD:
                return
            for _ in range(rounds):
                await asyncio.sleep(0)
            if self._is_quiet(task):
                return

    def _is_quiet(self, task: asyncio.Future[Any]) -> bool:
        if self._problem is not None:
            raise self._problem
        return task.done() or all(
            count or self._members.get(branch) for branch, count in self._parked.items()
        )

    def _tell_who_is_not_parked(self) -> None:
        waits = [
            path for path, count in self._parked.items() if not count and not self._members.get(path)
        ]
        logger.warning(
            "%s: nothing goes on for %s s, as the code at %s waits for something that is no step; let "
            "it wait in a step, and members of a group for nothing but their own steps",
            self._run_id,
            LONG,
            ", ".join(map(str, waits)),
        )

    def _send(self) -> None:
        for request in sorted(self._new, key=lambda request: request.order):
            self._in_flight[request.make(request)] = request
        self._new.clear()

    async def _take_answer(self) -> None:
        """Waits for the next answer, and gives it to its branch.

        Where all that is in flight are steps of one group, they are waited for together, which costs
        Restate's library less: nothing can come of one of them before the others have ended, too.
        """
        in_flight = self._in_flight
        try:
            if self._is_one_layer():
                await restate.gather(*in_flight)
                done = list(in_flight)
            else:
                done, _ = await restate.wait_completed(*in_flight)
        except restate.TerminalError as error:
            if error.status_code != CANCELLED:
                raise
            self._cancelled = self._cancelled or Cancelled(f"run {self._run_id!r} was cancelled")
            return
        for future in done:
            request = in_flight.pop(future)
            answer = await future
            self._parked[request.branch] -= 1
            if request.order[1] == "compensation" and len(request.order[0]) > 1:
                self._takes_groups_back = True
            (request.answer if request.kept is None else request.kept).set_result(answer)

    def _is_one_layer(self) -> bool:
        if len(self._in_flight) < 2 or self._retries:
            return False
        orders = [request.order for request in self._in_flight.values()]
        group, kind = orders[0][0][:-1], orders[0][1]
        return group in self._unlimited and all(
            path[:-1] == group and its_kind == kind for path, its_kind, _ in orders
        )

    def _abandon(self) -> None:
        """Lets nothing more happen in this attempt."""
        self._abandoned = Abandoned("this attempt at the run has ended")
        for request in [*self._new, *self._in_flight.values()]:
            if request.scope is not None:
                request.scope.cancel()
            for future in (request.answer, request.kept):
                if future is not None and not future.done():
                    future.set_exception(self._abandoned)
                    future.exception()  # whoever waited for it may have gone

    # --- in the branches -----------------------------------------------------------------------------

    async def _middleware(self, effect: Effect, call_next: CallNext) -> object:
        if self._abandoned is not None:
            raise self._abandoned
        if effect.kind not in MEMBERS or effect.path[:-1] not in self._groups:
            return await self._handle(effect, call_next)
        around = self._branch_of(effect.path[:-1])
        self._parked[effect.path] = 0
        self._members[around] = self._members.get(around, 0) + 1
        try:
            return await self._handle(effect, call_next)
        finally:
            del self._parked[effect.path]
            self._members[around] -= 1
            self._moved.set()

    async def _handle(self, effect: Effect, call_next: CallNext) -> object:
        match effect.kind:
            case "action":
                assert call_next.step is not None
                return await self._action(effect, call_next, call_next.step)
            case "compensation":
                return await self._compensation(effect, call_next)
            case "group":
                return await self._group(effect, call_next)
            case "saga":
                return await self._whole(effect, call_next)
            case "commit":
                result = await call_next()
                self._note(effect, [(EventKind.COMMITTED, b"")], time.time())
                return result
            case _:
                return await call_next()

    async def _group(self, effect: Effect, call_next: CallNext) -> object:
        group = call_next.definition
        assert isinstance(group, Parallel)
        self._groups.add(effect.path)
        if group.limit is None:
            self._unlimited.add(effect.path)
        try:
            return await call_next()
        finally:
            self._groups.discard(effect.path)

    async def _whole(self, effect: Effect, call_next: CallNext) -> object:
        refuse_time_limits(call_next.definition)
        result = await call_next()
        if self._abandoned is not None:
            raise self._abandoned
        if self._cancelled is not None:
            raise self._cancelled  # it had nothing more to do, or has swallowed it
        if not effect.path:
            place = f"saga {self._saga.name!r}"
            self._value = encode_result(self._codec, result, value_type(self._saga), lambda: place)
        return result

    # --- actions and compensations ---------------------------------------------------------------------

    async def _action(self, effect: Effect, call_next: CallNext, step: StepInHand) -> object:
        options = self._retries.get(effect.name)
        in_doubt = False
        number = 0
        while True:
            number += 1
            await anyio.lowlevel.checkpoint_if_cancelled()
            if self._cancelled is not None:
                raise self._cancelled
            try:
                return await self._try(effect, call_next, step, number)
            except Exception as error:
                pause = _pause(options, number, error)
                if pause is None:
                    if in_doubt and step.state is StepState.NOT_APPLIED:
                        step.recall(StepState.UNKNOWN, error=error)  # an earlier try may have done it
                    raise
                in_doubt = in_doubt or step.state is StepState.UNKNOWN
                await self._sleep(effect, pause, number)

    async def _try(self, effect: Effect, call_next: CallNext, step: StepInHand, number: int) -> object:
        answer: object = None
        raised: BaseException | None = None

        async def call() -> list[Written]:
            nonlocal answer, raised
            try:
                answer = await call_next()
                return [self._ends.returned(effect, step, answer)]
            except BaseException as error:
                if not self._is_its_own(error):
                    raise
                raised = error
                return [self._ends.failed(effect, step, error)]

        recorded = await self._durably(effect, number, EventKind.STARTED, call)
        if recorded is not None:
            return self._recall(effect, step, recorded[0])
        if raised is not None:
            try:
                raise raised
            finally:
                del raised
        return answer

    def _recall(self, effect: Effect, step: StepInHand, written: Written) -> object:
        kind, data = written
        try:
            ended = self._ends.read(effect, step, Event(kind, effect.path, effect.name, data))
        except SagaChanged as changed:
            self._fail(changed)
        state = ended.state
        if ended.is_lost:
            # Its undo had what is lost now. It is met again where it has run; else nobody can run it.
            if step.compensation is not None:
                state = StepState.UNKNOWN
            else:
                self._lost.add(effect.path)
        step.recall(state, result=ended.result, error=ended.error)
        if ended.error is not None:
            raise ended.error
        return ended.value

    async def _compensation(self, effect: Effect, call_next: CallNext) -> object:
        result: object = None
        raised: BaseException | None = None

        async def call() -> list[Written]:
            nonlocal result, raised
            try:
                if effect.path in self._lost:
                    raise undo_is_lost(effect)
                result = await call_next()
            except BaseException as error:
                if not self._is_its_own(error):
                    raise
                raised = error
                return [(EventKind.NOT_COMPENSATED, json.dumps(encode_error(error)).encode())]
            return [(EventKind.COMPENSATED, b"")]

        recorded = await self._durably(effect, 1, EventKind.COMPENSATING, call)
        if recorded is not None and recorded[0][0] is EventKind.NOT_COMPENSATED:
            raised = decode_error(json.loads(recorded[0][1]))
        if raised is not None:
            try:
                raise raised
            finally:
                del raised
        return result

    def _is_its_own(self, error: BaseException) -> bool:
        """Tells whether a step has raised it by itself; then its run fails by it.

        A SystemExit is no order to this worker. A cancellation may be that of a future that was
        awaited, and of nobody else.
        """
        if not isinstance(error, asyncio.CancelledError):
            return isinstance(error, Exception | SystemExit)
        task = asyncio.current_task()
        assert task is not None
        return self._abandoned is None and not task.cancelling()

    # --- parking ---------------------------------------------------------------------------------------

    async def _durably(
        self,
        effect: Effect,
        number: int,
        begins: EventKind,
        call: Callable[[], Awaitable[list[Written]]],
    ) -> list[Written] | None:
        """Does something and has it recorded, and gives None; or gives what is recorded of it."""
        place = ".".join(map(str, effect.path))
        name = f"{effect.kind} {effect.name} [{place}]{f' attempt {number}' if number > 1 else ''}"

        def make(request: Request) -> Any:
            async def run() -> bytes:
                if not request.answer.done():
                    request.answer.set_result(GO)
                return await request.ended

            return self._context.run_typed(name, run, restate.RunOptions(serde=BytesSerde()))

        request = self._park(effect, number, make)
        # A sibling that fails does not cut this off; the end of the attempt does.
        with anyio.CancelScope(shield=True) as request.scope:
            answer = await request.answer
            if not isinstance(answer, _Go):
                began, ended, written = _read(answer)
                self.events.append(Event(begins, effect.path, effect.name, at=began))
                self._note(effect, written, ended)
                return written
            request.kept = asyncio.get_running_loop().create_future()
            began = time.time()
            written = await call()
            if self._abandoned is None:
                ended = time.time()
                request.ended.set_result(_write(began, ended, written))
                await request.kept
                self.events.append(Event(begins, effect.path, effect.name, at=began))
                self._note(effect, written, ended)
                return None
        raise self._abandoned or Abandoned

    async def _sleep(self, effect: Effect, pause: timedelta, number: int) -> None:
        place = ".".join(map(str, effect.path))

        def make(request: Request) -> Any:
            del request
            return self._context.sleep(pause, name=f"before attempt {number + 1} [{place}]")

        request = self._park(effect, number, make)
        with anyio.CancelScope(shield=True) as request.scope:
            await request.answer
            return
        raise self._abandoned or Abandoned

    def _park(self, effect: Effect, number: int, make: Callable[[Request], Any]) -> Request:
        branch = self._branch_of(effect.path)
        request = Request(branch, (effect.path, effect.kind, number - 1), make)
        self._parked[branch] += 1
        self._new.append(request)
        self._moved.set()
        return request

    def _branch_of(self, path: Path) -> Path:
        while path not in self._parked:
            path = path[:-1]
        return path

    def _note(self, effect: Effect, written: list[Written], at: float) -> None:
        self.events += [Event(kind, effect.path, effect.name, data, at) for kind, data in written]

    def _fail(self, problem: BaseException) -> NoReturn:
        """Ends this attempt, from a branch."""
        self._problem = problem
        self._abandon()
        self._moved.set()
        assert self._abandoned is not None
        raise self._abandoned


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


def _write(began: float, ended: float, written: list[Written]) -> bytes:
    return json.dumps([began, ended, [[kind.value, as_text(data)] for kind, data in written]]).encode()


def _read(data: bytes) -> tuple[float, float, list[Written]]:
    began, ended, written = json.loads(data)
    return began, ended, [(EventKind(kind), as_bytes(text)) for kind, text in written]
