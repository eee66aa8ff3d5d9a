"""What every journal does: starts runs, recovers them, tries them again. Storage is a subclass's."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar, cast

import anyio

from pysagas import (
    AlreadyCommitted,
    CompensationFailed,
    Outcome,
    Saga,
    SagaState,
    StepReport,
    outcome_of,
)

from ._codec import (
    Codec,
    JSONCodec,
    decode_arguments,
    encode_arguments,
    encode_error,
    function_of,
    same_arguments,
)
from ._errors import (
    Interrupted,
    JournalError,
    NotRecordable,
    OtherRun,
    RunInProgress,
    RunInterrupted,
    SagaChanged,
)
from ._events import FROM_COMMIT, Event, EventKind, RunInfo, RunState
from ._middleware import RunMiddleware
from ._recalled import (
    Reported,
    compensated,
    exception_types,
    leaves,
    left_in_doubt,
    recalled,
    taken_back,
)
from ._storage import Claim, Ending, RunGone, Storage, Stored

__all__ = ["Journal", "OnCrash", "Recovered", "RecoveryReport"]

T = TypeVar("T")
AnySaga = Saga[..., Any]
OnCrash = Literal["rollback", "resume"]

STATES = {
    SagaState.COMPLETED: RunState.COMPLETED,
    SagaState.COMPENSATED: RunState.COMPENSATED,
    SagaState.FAILED: RunState.FAILED,
}


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of one unfinished run.

    Attributes:
        run_id: The name of the run.
        saga: The name of its saga.
        state: How it stands now; RUNNING where it could not be gone on with.
        outcome: The report of the run; None where there is none.
        error: What it ended with, or why it could not be gone on with; None for one that completed.
    """

    run_id: str
    saga: str
    state: RunState
    outcome: Outcome[Any] | None = field(default=None, repr=False)
    error: BaseException | None = None

    @property
    def in_doubt(self) -> tuple[StepReport, ...]:
        """The steps that had something to be taken back, and could not be asked: somebody has to look.

        Such is a step with an `undo` alone, whose process died before the result of its action was known.
        """
        return left_in_doubt(self.outcome)


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What `Journal.recover` found, and did.

    Attributes:
        recovered: The runs that were gone on with, and have ended: completed or taken back.
        failed: Those that have ended FAILED: somebody has to look, and then `retry` them.
        left: Those that are as they were, each with the error that says why: no saga of that name
            was given, the saga has changed, the arguments cannot be read, the journal failed.
        in_progress: The ids of runs that a living process has in hand.
    """

    recovered: tuple[Recovered, ...] = ()
    failed: tuple[Recovered, ...] = ()
    left: tuple[Recovered, ...] = ()
    in_progress: tuple[str, ...] = ()

    @property
    def in_doubt(self) -> tuple[Recovered, ...]:
        """Those that have ended, and have left steps in doubt: see their ``in_doubt``."""
        return tuple(one for one in (*self.recovered, *self.failed) if one.in_doubt)

    @property
    def ok(self) -> bool:
        """Whether nothing is left to do for anybody, nor to look at."""
        return not (self.failed or self.left or self.in_doubt)


class Journal(Storage):
    """A durable record of the effects of runs, from which a killed run is recovered.

    `SQLiteJournal` keeps it in a file. Another place is another subclass, with the methods of
    ``Storage``, which know runs and events and nothing of sagas.
    """

    def __init__(self, codec: Codec | None = None) -> None:
        """Makes one; see the subclass."""
        self._codec: Codec = JSONCodec() if codec is None else codec
        # The ids of the runs that this journal has in hand.
        self._in_hand: set[str] = set()

    # --- for users -----------------------------------------------------------------------------

    async def run(
        self,
        saga: Saga[..., T],
        *args: Any,
        run_id: str,
        exceptions: Any = (),
        on_crash: OnCrash = "rollback",
        **kwargs: Any,
    ) -> Outcome[T]:
        """Runs a saga under a name, once.

        Every effect is recorded before it happens, and its result after. If the process is killed,
        `recover` takes the run back, or goes on with it. A second call with the same id does
        nothing: it gives the recorded outcome, or raises the recorded error, as the first did; for
        a run whose process has died meanwhile it does what `recover` would.

        A cancellation that comes while the beginning or the end of the run is being written goes on when
        that is done, as only then is it known what stands in the journal: on a slow disk it waits for that.

        Args:
            saga: The saga.
            *args: What it is called with.
            run_id: The name of the run: an order number, the idempotency key of a request.
            exceptions: As for `Saga.run`.
            on_crash: As for `recover`.
            **kwargs: What it is called with by keyword. (Parameters named ``run_id``, ``exceptions``
                or ``on_crash`` are given by position.)

        Returns:
            The outcome.

        Raises:
            BaseException: As for `Saga.run`.
            RunInProgress: It is under way, here or in another process that lives.
            RunInterrupted: Its process had died, or it had been cancelled, and it has been taken back.
            OtherRun: The id belongs to another saga, or to other arguments.
            SagaChanged: It cannot be gone on with. It is as it was.
            NotRecordable: The arguments cannot be recorded. Nothing has run.
            JournalError: The journal cannot be read or written. What had run is taken back.
        """
        return await self._start(saga, args, kwargs, run_id, exceptions, on_crash)

    async def _start(
        self,
        saga: Saga[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run_id: str,
        exceptions: Any = (),
        on_crash: OnCrash = "rollback",
    ) -> Outcome[T]:
        place = check_run(saga, run_id, exceptions)
        _check_on_crash("run", on_crash)
        _check_text(place, "run_id", run_id)
        _check_text(place, "the name of the saga", saga.name)
        data = encode_arguments(self._codec, args, kwargs, function_of(saga), place)
        saga.check_call(args, kwargs, "{}.run")
        with self._hold(run_id):
            claim = await self._claim_call(saga, args, kwargs, run_id, data)
            if claim.ending is not None:
                take_back = partial(self._take_back_recalled, claim, run_id, saga, (args, kwargs))
                ended = await self._load(claim.key)
                return recalled(claim.ending, ended, self._codec, saga, run_id, exceptions, take_back)
            events: list[Event] = []
            if not claim.is_new:
                async with self._released_if_it_fails(claim.key):
                    stored = await self._stored(run_id)
                    assert stored is not None
                    self._arguments(stored, saga)
                    events = await self._load(claim.key)
            return await self._go(claim, run_id, saga, (args, kwargs), events, exceptions, on_crash)

    async def _claim_call(
        self,
        saga: AnySaga,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run_id: str,
        data: bytes,
    ) -> Claim:
        """Takes the run of a call into hand, whose arguments may have been written otherwise.

        Equal ones need not be written alike: keywords and the keys of a dict stand in the order in
        which they were given, the elements of a set in one that each process chooses anew.
        """
        claim = partial(self._claim, run_id, saga.name, saga.version)
        try:
            return await claim(data, time.time(), create=True)
        except OtherRun:
            stored = await self._stored(run_id)
            if stored is None or stored.saga != saga.name:
                raise
            if not same_arguments(self._codec, stored.args, args, kwargs, function_of(saga)):
                raise
        return await claim(stored.args, time.time(), create=True)

    async def recover(
        self,
        sagas: Iterable[AnySaga],
        *,
        on_crash: OnCrash = "rollback",
        limit: int = 100,
    ) -> RecoveryReport:
        """Goes on with all runs whose process has died.

        Runs of processes that live are not touched. A run that has passed its commit is carried on
        to its end, whatever `on_crash` says. What one run raises does not stop the others; it is in
        the report.

        Args:
            sagas: The definitions; a run finds its own by name and version.
            on_crash: ``"rollback"`` takes runs back. ``"resume"`` goes on with them, and runs
                actions again that were under way; they have to be idempotent.
            limit: How many runs at once.

        Raises:
            JournalError: The journal cannot be read.
        """
        _check_on_crash("recover", on_crash)
        if limit < 1:
            raise ValueError(f"journal.recover: limit must be at least 1, not {limit!r}")
        known = _by_name(sagas)
        unfinished = await self._unfinished()
        results: dict[int, Recovered | None] = {}

        async def recover_some(indexes: Iterable[int]) -> None:
            for index in indexes:
                # It ended in the meantime, and was pruned; its id may name another run by now.
                with suppress(RunGone, OtherRun):
                    results[index] = await self._recover_one(unfinished[index], known, on_crash)

        indexes = iter(range(len(unfinished)))
        async with anyio.create_task_group() as tasks:
            for _ in range(min(limit, len(unfinished))):
                tasks.start_soon(recover_some, indexes)
        found = [(unfinished[index].run_id, results[index]) for index in sorted(results)]
        ended = [one for _, one in found if one is not None]

        def those(*states: RunState) -> tuple[Recovered, ...]:
            return tuple(one for one in ended if one.state in states)

        return RecoveryReport(
            recovered=those(RunState.COMPLETED, RunState.COMPENSATED),
            failed=those(RunState.FAILED),
            left=those(RunState.RUNNING),
            in_progress=tuple(run_id for run_id, one in found if one is None),
        )

    async def retry(self, saga: Saga[..., T], run_id: str, *, exceptions: Any = ()) -> Outcome[T]:
        """Tries a FAILED run again, when the cause has been mended.

        What could not be taken back is tried again. A run that failed past its commit is carried on
        from its commit, once all that came after is taken back; its actions have other keys then.

        Args:
            saga: Its saga.
            run_id: The name of the run.
            exceptions: As for `Saga.run`.

        Returns:
            The outcome.

        Raises:
            BaseException: As for `run`.
            JournalError: There is no such run, or it has not failed.
        """
        _check_text(check_run(saga, run_id, exceptions, "journal.retry"), "run_id", run_id)
        with self._hold(run_id):
            stored = await self._stored(run_id)
            if stored is None or stored.state is not RunState.FAILED:
                state = "is not in the journal" if stored is None else f"is {stored.state.value}"
                raise JournalError(f"run {run_id!r} {state}; only a failed run can be tried again")
            call = self._arguments(stored, saga)
            claim = await self._claim(run_id, saga.name, stored.version, stored.args, time.time())
            try:
                return await self._try_again(claim, run_id, saga, call, exceptions, b"")
            except (CompensationFailed, SagaChanged):
                raise
            except Exception:
                again = await self._stored(run_id)
                if again is None or again.state is not RunState.FAILED:
                    raise
            # It has passed its commit, and all that came after that is taken back now.
            return await self._try_again(claim, run_id, saga, call, exceptions, FROM_COMMIT)

    async def runs(self, *, state: RunState | None = None, since: float | None = None) -> list[RunInfo]:
        """Lists the runs, the oldest first.

        Args:
            state: Only those that stand so.
            since: Only those that had not ended before this time, in seconds since the epoch.
        """
        given: object = state
        if since is not None:
            _check_time("runs: since", since)
        if not isinstance(given, RunState | None):
            states = ", ".join(map(str, RunState))
            raise TypeError(f"journal.runs: state must be one of {states}, not {given!r}")
        runs = await self._list(-math.inf if since is None else since)
        return [info for info in runs if state is None or info.state is state]

    async def info(self, run_id: str) -> RunInfo:
        """Tells how a run stands.

        Raises:
            JournalError: There is no such run.
        """
        _check_id("info", run_id)
        found = await self._list(run_id=run_id)
        if not found:
            raise JournalError(f"run {run_id!r} is not in the journal")
        return found[0]

    async def history(self, run_id: str) -> list[Event]:
        """Gives all that is recorded of a run.

        Raises:
            JournalError: There is no such run.
        """
        _check_id("history", run_id)
        return await self._events(run_id)

    async def prune(self, *, before: float) -> int:
        """Forgets the runs that completed or were taken back before a time.

        A later call with such an id runs the saga anew. Failed runs, and those that have not ended,
        are never forgotten.

        Args:
            before: In seconds since the epoch.

        Returns:
            How many were forgotten.

        Raises:
            TypeError: It is no number. Nothing is forgotten.
        """
        _check_time("prune: before", before)
        return await self._prune(before)

    # --- how -----------------------------------------------------------------------------------

    def _hold(self, run_id: str) -> _Hold:
        return _Hold(self, run_id)

    def _released_if_it_fails(self, key: int) -> _Release:
        return _Release(self, key)

    def _arguments(self, stored: Stored, saga: AnySaga) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gives the arguments of a recorded run.

        Raises:
            JournalError: The saga is not that of the run, or cannot be called so any more.
        """
        if (saga.name, saga.version) != (stored.saga, stored.version):
            raise SagaChanged(
                f"run {stored.run_id!r} is one of saga {stored.saga!r}, version {stored.version!r}, not "
                f"of {saga.name!r}, version {saga.version!r}; give the saga of its name and version"
            )
        place = f"run {stored.run_id!r} of saga {saga.name!r}"
        call = decode_arguments(self._codec, stored.args, function_of(saga), place)
        try:
            saga.check_call(*call, "{}.run")
        except TypeError as error:
            raise SagaChanged(f"{place}: it cannot be called as it was: {error}") from error
        return call

    async def _recover_one(
        self, stored: Stored, known: Mapping[tuple[str, str | None], AnySaga], on_crash: OnCrash
    ) -> Recovered | None:
        """Goes on with one run; gives None for one that somebody has in hand.

        Raises:
            RunGone: It has ended, and was pruned.
            OtherRun: The same, and its id has been given to another one.
        """
        result = partial(Recovered, stored.run_id, stored.saga)
        saga = known.get((stored.saga, stored.version))
        if saga is None:
            return result(RunState.RUNNING, None, JournalError(_missing(stored, known)))
        try:
            with self._hold(stored.run_id):
                call = self._arguments(stored, saga)
                claim = await self._claim(
                    stored.run_id, stored.saga, stored.version, stored.args, time.time()
                )
                if claim.ending is not None:
                    return result(claim.ending.state)  # somebody else was quicker
                async with self._released_if_it_fails(claim.key):
                    events = await self._load(claim.key)
                return await self._carry_on(claim, stored, saga, call, events, on_crash)
        except RunInProgress:
            return None
        except (RunGone, OtherRun):
            raise
        except Exception as error:
            return result(RunState.RUNNING, None, error)

    async def _carry_on(
        self,
        claim: Claim,
        stored: Stored,
        saga: AnySaga,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        events: list[Event],
        on_crash: OnCrash,
    ) -> Recovered:
        """Goes on with a run that is in hand; whatever it raises is in what this gives."""
        result = partial(Recovered, stored.run_id, stored.saga)
        try:
            outcome = await self._go(claim, stored.run_id, saga, call, events, (), on_crash)
        except BaseException as error:
            if _is_for_all(error):
                raise
            if isinstance(error, RunInterrupted):
                ended: Outcome[Any] | None = error.outcome
                _without_traceback(error)
            else:
                # A result that cannot be recorded is the saga's failure, and no failure of the journal.
                unknown = isinstance(error, JournalError) and not isinstance(error, NotRecordable)
                ended = None if unknown else outcome_of(error)
            if ended is None:
                return result(RunState.RUNNING, None, error)
            return result(STATES[ended.state], ended, error)
        return result(STATES[outcome.state], outcome, outcome.error)

    async def _try_again(
        self,
        claim: Claim,
        run_id: str,
        saga: Saga[..., T],
        call: tuple[tuple[Any, ...], Mapping[str, Any]],
        exceptions: Any,
        place: bytes,
    ) -> Outcome[T]:
        """Opens a failed run, and goes on with what holds of it when it is tried again from there."""
        async with self._released_if_it_fails(claim.key):
            await self._reopen(claim.key, RunState.FAILED)
            self._append(claim.key, EventKind.RETRY, (), saga.name, place)
            events = await self._load(claim.key)
        return await self._go(claim, run_id, saga, call, events, exceptions, "rollback")

    async def _go(
        self,
        claim: Claim,
        run_id: str,
        saga: Saga[..., T],
        call: tuple[tuple[Any, ...], Mapping[str, Any]],
        events: list[Event],
        exceptions: Any,
        on_crash: OnCrash,
    ) -> Outcome[T]:
        """Runs the saga, through what is recorded and on from there, and records how that ends."""
        try:  # as `_released_if_it_fails`, which takes each run two coroutines
            middleware = RunMiddleware(
                self,
                claim.key,
                self._codec,
                saga,
                events,
                recovering=not claim.is_new,
                resume=on_crash == "resume",
            )
        except BaseException:
            await self._release(claim.key)
            raise
        replay = middleware.replay
        try:
            try:
                outcome = await saga.run_with(
                    *call,
                    run_id=run_id,
                    carried_on=middleware.carried_on,
                    middleware=[middleware],
                    exceptions=exceptions,
                )
            finally:
                # Before anything is awaited: a task that it has left behind may go on meanwhile.
                middleware.recorder.close()
        except BaseException as error:
            if replay.abandoned is not None:
                await self._leave_as_it_was(claim, replay.abandoned)
                cancelled = _cancellation_in(error)
                raise cancelled or replay.abandoned from None
            await self._ended(claim, middleware, outcome_of(error), error)
            if replay.interrupted is not None and _is_interruption(error):
                if middleware.recorder.broken is not None:
                    raise middleware.recorder.broken from error  # the file does not say so yet
                raise taken_back(run_id, outcome_of(error)) from None
            raise
        if replay.abandoned is not None:  # and took itself for a failure that was expected
            await self._leave_as_it_was(claim, replay.abandoned)
            raise replay.abandoned
        await self._ended(claim, middleware, outcome, outcome.error)
        if outcome.state is not SagaState.COMPLETED:
            return outcome
        later = partial(self._taken_back_later, claim.key, run_id, middleware, outcome)
        return Outcome(Reported(outcome), outcome.state, outcome.value, None, later)

    async def _leave_as_it_was(self, claim: Claim, reason: BaseException) -> None:
        """Lets go of a run that is given up: for a recovery, or as the failed one that it was."""
        if claim.ending is not None and isinstance(reason, SagaChanged):
            await self._end(claim.key, claim.ending)
        else:
            await self._release(claim.key)

    async def _taken_back_later(
        self, key: int, run_id: str, middleware: RunMiddleware, outcome: Outcome[T]
    ) -> Outcome[T]:
        """Takes back a run that had completed, and records how that ends."""
        if middleware.committed or middleware.reopened:
            return await outcome.rollback()  # which refuses, or says again what came of it
        with self._hold(run_id):
            already = await self._taken_back_already(key, run_id, outcome.saga)
            if already is not None:
                return already
            # Before anything is taken back: another process may have done so, or forgotten the run.
            late = await self._open_again(key)
            middleware.reopened = True
            middleware.recorder.open_again()
            later: Outcome[Any] | None = None
            try:
                later = await outcome.rollback()
            except BaseException as error:
                later = outcome_of(error)
                raise
            finally:
                middleware.recorder.close()
                try:
                    await self._ended_later(key, middleware, later)
                except Exception as failure:
                    if late is None:
                        raise
                    raise late from failure
        if late is not None:
            raise late
        assert later is not None
        return later

    async def _ended_later(
        self, key: int, middleware: RunMiddleware, later: Outcome[Any] | None
    ) -> None:
        if later is not None and middleware.recorder.broken is None:
            try:
                await self._end(key, Ending(STATES[later.state], b"", None))
            except BaseException as raised:
                if _failure_in(raised) is not None:
                    await self._release(key, middleware.interruption())
                raise
        else:
            await self._release(key, middleware.interruption())

    async def _taken_back_already(self, key: int, run_id: str, saga: str) -> Outcome[Any] | None:
        """Gives the outcome of a completed run that somebody else has taken back meanwhile."""
        stored = await self._stored(run_id)
        # (One that was pruned, and begun anew by its id, is another run.)
        if stored is None or stored.key != key or stored.state is not RunState.COMPENSATED:
            return None
        return compensated(saga, run_id, await self._load(key), self._codec)

    async def _open_again(self, key: int) -> BaseException | None:
        """Takes a completed run into hand; gives a cancellation that came meanwhile, for later."""
        try:
            await self._reopen(key, RunState.COMPLETED)
        except BaseException as late:
            if isinstance(late, Exception | GeneratorExit) or late.__cause__ is not None:
                raise  # it could not be done
            return late
        return None

    async def _take_back_recalled(
        self,
        claim: Claim,
        run_id: str,
        saga: Saga[..., T],
        call: tuple[tuple[Any, ...], Mapping[str, Any]],
    ) -> Outcome[T]:
        """Takes back a run that had completed in another process, or earlier, by its history."""
        with self._hold(run_id):
            already = await self._taken_back_already(claim.key, run_id, saga.name)
            if already is not None:
                return already
            events = await self._load(claim.key)
            if any(event.kind is EventKind.COMMITTED for event in events):
                raise AlreadyCommitted(f"run {run_id!r} of saga {saga.name!r} has passed its commit")
            late = await self._open_again(claim.key)
            try:
                later = await self._go(claim, run_id, saga, call, events, (), "rollback")
            except RunInterrupted as error:
                later = cast("Outcome[T]", error.outcome)
            await self._end(claim.key, Ending(STATES[later.state], b"", None))
        if late is not None:
            raise late
        return Outcome(Reported(later), later.state, cast("T", None), None)

    async def _ended(
        self,
        claim: Claim,
        middleware: RunMiddleware,
        outcome: Outcome[Any] | None,
        error: BaseException | None,
    ) -> None:
        if outcome is None or middleware.recorder.broken is not None:
            # What is on disk is less than what happened: recovery in the next process ends it.
            await self._release(claim.key, _interruption(middleware))
            return
        value = middleware.value if error is None else b""
        recorded = None if error is None else encode_error(error)
        try:
            await self._end(claim.key, Ending(STATES[outcome.state], value, recorded))
        except BaseException as raised:
            failure = _failure_in(raised)
            if failure is None:
                # It is written. A cancellation that came meanwhile yields to what weighs more (G8).
                is_cancellation = isinstance(raised, anyio.get_cancelled_exc_class())
                if error is None or not is_cancellation or not _weighs_more(error):
                    raise
                error.__context__ = error.__context__ or raised
                return
            middleware.recorder.broken = failure
            interruption = _interruption(middleware)
            try:
                if error is None and interruption is not None:
                    with anyio.CancelScope(shield=True):
                        await outcome.rollback()
            finally:
                await self._release(claim.key, interruption)
            if error is None or isinstance(error, Exception) or raised is not failure:
                raise


class _Hold:
    """Keeps a run id in hand for the length of a block."""

    __slots__ = ("_journal", "_run_id")

    def __init__(self, journal: Journal, run_id: str) -> None:
        self._journal = journal
        self._run_id = run_id

    def __enter__(self) -> None:
        if self._run_id in self._journal._in_hand:
            raise RunInProgress(f"run {self._run_id!r} is under way in this process")
        self._journal._in_hand.add(self._run_id)

    def __exit__(self, *error: object) -> None:
        self._journal._in_hand.discard(self._run_id)
        if not self._journal._in_hand:
            self._journal._let_go()


class _Release:
    """Lets a run go that has been taken into hand, if a block finds that it cannot be gone on with."""

    __slots__ = ("_journal", "_key")

    def __init__(self, journal: Journal, key: int) -> None:
        self._journal = journal
        self._key = key

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None:
            await self._journal._release(self._key)


def check_run(saga: object, run_id: object, exceptions: Any, call: str = "journal.run") -> str:
    """Refuses what cannot work before it is recorded; gives the place for messages."""
    if not isinstance(saga, Saga):
        raise TypeError(f"{call}: it takes a saga, not {saga!r}")
    place = f"{call} of saga {saga.name!r}"
    if not isinstance(run_id, str) or not run_id:
        raise ValueError(f"{place}: run_id must be a string that is not empty, not {run_id!r}")
    for kind in () if exceptions == () else exception_types(exceptions):
        given: object = kind
        if not (isinstance(given, type) and issubclass(given, Exception)):
            raise TypeError(f"{place}: exceptions must be exception types, and hold {given!r}")
    return place


def _failure_in(raised: BaseException) -> JournalError | None:
    """Gives why something was not written: an interruption that came meanwhile goes over that."""
    failure = raised if isinstance(raised, JournalError) else raised.__cause__
    return failure if isinstance(failure, JournalError) else None


def _weighs_more(error: BaseException) -> bool:
    """Tells whether an error goes on to the caller rather than a cancellation."""
    return any(
        isinstance(leaf, CompensationFailed | KeyboardInterrupt | SystemExit) for leaf in leaves(error)
    )


def _interruption(middleware: RunMiddleware) -> Event | None:
    """Gives what a run leaves for its recovery that was taken back, which could not be recorded.

    Of one that a recovery would carry on nothing has been taken back: see the middleware.
    """
    return None if middleware.goes_on else middleware.interruption()


def _check_on_crash(call: str, on_crash: object) -> None:
    if on_crash not in ("rollback", "resume"):
        raise ValueError(f'journal.{call}: on_crash must be "rollback" or "resume", not {on_crash!r}')


def _check_time(what: str, given: object) -> None:
    if not isinstance(given, int | float) or isinstance(given, bool) or math.isnan(given):
        raise TypeError(
            f"journal.{what} must be a number, in seconds since the epoch, not {given!r}; of a datetime, "
            "that is its timestamp()"
        )


def _check_id(call: str, run_id: object) -> None:
    if not isinstance(run_id, str):
        raise TypeError(f"journal.{call}: run_id must be a string, not {run_id!r}")
    _check_text(f"journal.{call}", "run_id", run_id)


def _check_text(place: str, what: str, text: str) -> None:
    """Refuses lone surrogates, which no file can hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: {what} is no text that can be stored: {error}") from error


def _without_traceback(error: RunInterrupted) -> None:
    """Lets go of the frames of an interruption.

    Where it came up is of no interest; and with the frames of thousands of runs alive, recovery is
    mostly the garbage collector going through them again and again.
    """
    error.__traceback__ = None
    ended = None if error.outcome is None else error.outcome.error
    inner = () if ended is None else leaves(ended)
    for interrupted in (leaf for leaf in inner if isinstance(leaf, Interrupted)):
        interrupted.__traceback__ = interrupted.__context__ = None


def _is_interruption(error: BaseException) -> bool:
    return not isinstance(error, Exception) and any(
        isinstance(leaf, Interrupted) for leaf in leaves(error)
    )


def _is_for_all(error: BaseException) -> bool:
    """Tells whether what one run raised ends the others too: an order to stop, no fault of that run.

    A cancellation may be either. An action can raise one by itself, as does a future that somebody
    has cancelled.
    """
    if isinstance(error, Exception):
        return False
    orders = (KeyboardInterrupt, SystemExit, GeneratorExit)
    cancelled = anyio.current_effective_deadline() == -math.inf
    return cancelled or any(isinstance(leaf, orders) for leaf in leaves(error))


def _cancellation_in(error: BaseException) -> BaseException | None:
    """Gives the cancellation that ended a run which was given up, or yielded to that."""
    started = error.error if isinstance(error, CompensationFailed) else error
    cancelled = anyio.get_cancelled_exc_class()
    return started if isinstance(started, cancelled) else None


def _by_name(sagas: Iterable[AnySaga]) -> dict[tuple[str, str | None], AnySaga]:
    known: dict[tuple[str, str | None], AnySaga] = {}
    whole: object = sagas
    if isinstance(whole, Saga):
        raise TypeError(
            f"journal.recover: sagas must be a list of sagas, not {sagas!r}; put it in a list"
        )
    for saga in sagas:
        given: object = saga
        if not isinstance(given, Saga):
            raise TypeError(f"journal.recover: sagas must be a list of sagas, and holds {given!r}")
        other = known.setdefault((saga.name, saga.version), saga)
        if other is not saga:
            raise ValueError(
                f"journal.recover: two sagas have the name {saga.name!r} and the version "
                f"{saga.version!r}; a run finds its saga by both"
            )
    return known


def _missing(stored: Stored, known: Mapping[tuple[str, str | None], AnySaga]) -> str:
    versions = [version for name, version in known if name == stored.saga]
    what = f"run {stored.run_id!r} is one of saga {stored.saga!r}, version {stored.version!r}"
    if versions:
        return f"{what}; of that saga only these versions were given: {versions}"
    given = ", ".join(sorted({name for name, _ in known})) or "none"
    return f"{what}, which was not given; give it to recover([...]). Given: {given}"
