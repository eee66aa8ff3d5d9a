"""The one door: everything that watches or changes how things run goes through here.

An *effect* is about to run; a middleware is a callable around it. Tracing, logging, fault
injection, a journal are middleware, in files that the engine does not know. Without middleware no
effect is made, except for who asks for it with `current_effect`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar, Token
from functools import wraps
from typing import Any, Literal, NamedTuple, Protocol

from ._errors import MiddlewareError, SagaDefinitionError
from ._outcome import StepState

__all__ = [
    "CallNext",
    "Effect",
    "EffectKind",
    "Middleware",
    "StepInHand",
    "current_effect",
    "note_time",
    "observer",
]

EffectKind = Literal["saga", "group", "action", "rollback", "compensation", "commit"]

_REPEATABLE = frozenset({"action", "compensation"})


class Effect(NamedTuple):
    """One thing that the engine is about to run.

    Attributes:
        kind: What it is.
        saga: The name of the saga that it is part of; for an inner saga's effects the inner one's.
        run_id: The name of the run: the caller's, or a random one.
        name: The name of the step, group or saga. A rollback has the name of what it takes back.
        path: The place in the tree of the run, the same in every run and on every loop. Retries
            share it, and so do a step's action and its compensation.
        carried_on: How often the run was carried on from its commit, after what came after that had
            been taken back.
    """

    kind: EffectKind
    saga: str
    run_id: str
    name: str
    path: tuple[int, ...]
    carried_on: int = 0

    @property
    def key(self) -> str:
        """An idempotency key to hand to a service: run id, path and kind.

        The same each time this effect of this run is tried; different for everything else, so that
        a refund is not sent under the key of its charge, nor a new charge under that of one refunded.
        """
        return self._key(self.kind)

    @property
    def action_key(self) -> str | None:
        """For a compensation, the key of the action that it takes back; None for the others."""
        return self._key("action") if self.kind == "compensation" else None

    def _key(self, kind: str) -> str:
        run = f"{self.run_id}~{self.carried_on}" if self.carried_on else self.run_id
        return f"{run}/{'.'.join(map(str, self.path))}/{kind}"


class StepInHand(Protocol):
    """What the engine knows of the step whose action, or compensation, is the effect."""

    @property
    def action(self) -> Callable[..., Any]:
        """The step's action, as it was given."""
        ...

    @property
    def args(self) -> tuple[Any, ...]:
        """What the action is called with."""
        ...

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """What the action is called with by keyword."""
        ...

    @property
    def compensation(self) -> Callable[..., object] | None:
        """What takes it back while it is in doubt; None where nothing does."""
        ...

    @property
    def state(self) -> StepState:
        """How far it has come."""
        ...

    @property
    def result(self) -> Any:
        """What the action returned; None until it has."""
        ...

    def recall(
        self, state: StepState, *, result: object = None, error: BaseException | None = None
    ) -> None:
        """Tells the engine how far the action had come when it ran before, in another process.

        For a middleware that remembers, such as a journal: an action that it does not run may be in
        doubt all the same, and then has to be compensated.

        Args:
            state: How far it had come.
            result: What it had returned, for an undo.
            error: What it had raised, for the report.
        """
        ...


class CallNext(Protocol):
    """What a middleware awaits, to let the effect run."""

    @property
    def step(self) -> StepInHand | None:
        """The step, for an action or a compensation; None for the other kinds of effects."""
        ...

    @property
    def definition(self) -> object | None:
        """The `Parallel` of a group, the `Saga` of a saga; None for the other kinds of effects."""
        ...

    async def __call__(self) -> object:
        """Runs the effect, through the middleware that stands further in."""
        ...


class Middleware(Protocol):
    """A callable around effects.

    It awaits ``call_next()`` to let the effect run, and returns what that returned, or something
    else. What it raises before is the failure of a step that never started; what it raises after,
    the failure of a completed one. Returning without ``call_next`` completes the step with the
    value returned. A second call, after the first has ended, is allowed for actions and
    compensations: the step runs twice.
    """

    async def __call__(self, effect: Effect, call_next: CallNext, /) -> object:
        """Runs the effect, by awaiting ``call_next()``."""
        ...


class Place(Protocol):
    """Where the engine stands: it can say which effect runs there, and has the run in hand."""

    def current_effect(self) -> Effect | None: ...

    def note_time(self, effect: Effect, began: float, ended: float) -> None: ...


# The place of the code that runs in this context. Set once for a whole run, and in each member of a
# group: a set and a reset for each step would be a tenth of its cost.
current_place: ContextVar[Place | None] = ContextVar("pysagas_place", default=None)


def reset_place(token: Token[Place | None] | None) -> None:
    """Ends what ``current_place.set`` began, if anything."""
    try:
        if token is not None:
            current_place.reset(token)
    except ValueError:
        # Another context: the coroutine was closed, or collected, by somebody else.
        pass


def current_effect() -> Effect | None:
    """Gives the effect inside of which this is called: an action or a compensation.

    Its `Effect.key` is the idempotency key to hand to a service.

    Returns:
        The effect, made on request; None outside of actions and compensations.
    """
    place = current_place.get()
    return None if place is None else place.current_effect()


def note_time(effect: Effect, began: float, ended: float) -> None:
    """Tells the engine when an effect ran, for `Outcome.times`.

    For a middleware that has a clock, such as ``pysagas.observe.timing.record_times``, when
    ``call_next()`` has ended. Only actions and compensations have times: for other kinds, and for an
    effect of another run, nothing is noted.

    Args:
        effect: What ran.
        began: When it began, in seconds of whatever clock, the same for the whole run.
        ended: When it ended.
    """
    place = current_place.get()
    if place is not None and effect.kind in ("action", "compensation"):
        place.note_time(effect, began, ended)


class CallRest:
    """The rest of a chain, from one middleware on."""

    __slots__ = (
        "_begun",
        "_effect",
        "_innermost",
        "_middleware",
        "_running",
        "definition",
        "ended",
        "step",
    )

    def __init__(
        self,
        middleware: tuple[Middleware, ...],
        effect: Effect,
        innermost: Callable[[], Awaitable[object]],
        step: StepInHand | None,
        definition: object | None,
    ) -> None:
        self.step = step
        self.definition = definition
        self._middleware = middleware
        self._effect = effect
        self._innermost = innermost
        self._begun = False
        self._running = False
        # Whether its middleware has.
        self.ended = False

    async def __call__(self) -> object:
        effect = self._effect
        if self.ended:
            self._refuse("after its middleware had ended")
        if self._running:
            self._refuse("while an earlier call was running; calls go one after the other")
        if self._begun and effect.kind not in _REPEATABLE:
            self._refuse("a second time; only actions and compensations can be repeated")
        self._begun = self._running = True
        try:
            if not self._middleware:
                return await self._innermost()
            return await through(self._middleware, effect, self._innermost, self.step, self.definition)
        finally:
            self._running = False

    def _refuse(self, how: str) -> None:
        effect = self._effect
        raise MiddlewareError(
            f"call_next of the effect {effect.kind} {effect.name!r} at {effect.path} was called {how}"
        )


async def through(
    middleware: tuple[Middleware, ...],
    effect: Effect,
    innermost: Callable[[], Awaitable[object]],
    step: StepInHand | None = None,
    definition: object | None = None,
) -> object:
    """Runs an effect through a chain of middleware, outermost first."""
    if not middleware:
        return await innermost()
    rest = CallRest(middleware[1:], effect, innermost, step, definition)
    try:
        return await middleware[0](effect, rest)
    finally:
        rest.ended = True


def observer(middleware: Middleware) -> Middleware:
    """Makes a middleware that only watches harmless.

    What it returns is ignored. An exception of its own is logged (logger ``pysagas``) and goes no
    further; where it came before ``call_next()`` was awaited, the effect runs all the same. A
    cancellation that arrives while it awaits something of its own is passed on, as anywhere.

    Args:
        middleware: Called with the effect and ``call_next``, as any middleware. It may swallow or
            replace what ``call_next`` raises: the caller sees the true result nevertheless.

    Raises:
        SagaDefinitionError: It is not callable.
    """
    if not callable(middleware):
        raise SagaDefinitionError(
            f"observer: it takes an async callable of (effect, call_next), not {middleware!r}"
        )

    @wraps(middleware)
    async def observe(effect: Effect, call_next: CallNext, /) -> object:
        watched = _Watched(call_next)
        try:
            await middleware(effect, watched)
        except Exception as error:
            if error is not watched.raised:
                _warn(middleware, effect, error)
        if not watched.called:
            return await call_next()
        if watched.raised is None:
            return watched.seen
        try:
            raise watched.raised
        finally:
            watched.raised = None  # its traceback holds this frame

    return observe


def _warn(observer: object, effect: Effect, error: Exception) -> None:
    import logging  # noqa: PLC0415 - only who has a failing observer pays for it

    # A handler's filter may be what fails, here as in the observer; then nobody can be told.
    with suppress(Exception):
        logging.getLogger("pysagas").warning(
            "observer %r failed on effect %s %r at %s; the saga is not affected",
            observer,
            effect.kind,
            effect.name,
            effect.path,
            exc_info=error,
        )


class _Watched:
    """The rest of a chain, for a middleware that only watches; it keeps the true result."""

    __slots__ = ("_call_next", "called", "raised", "seen")

    def __init__(self, call_next: CallNext) -> None:
        self._call_next = call_next
        self.called = False
        self.seen: object = None
        self.raised: BaseException | None = None

    @property
    def step(self) -> StepInHand | None:
        return self._call_next.step

    @property
    def definition(self) -> object | None:
        return self._call_next.definition

    async def __call__(self) -> object:
        if self.called:
            raise MiddlewareError("an observer awaits call_next once: it only watches")
        self.called = True
        try:
            self.seen = await self._call_next()
        except BaseException as error:
            self.raised = error
            raise
        return self.seen
