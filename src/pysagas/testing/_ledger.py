"""A fake world that keeps books: what was made stands, until it is taken back, once and in order."""

from __future__ import annotations

from typing import Any, NamedTuple

from anyio.lowlevel import checkpoint

from pysagas import CallNext, Effect, Step, current_effect

__all__ = ["EffectsLedger", "LedgerError"]

# A place in a run: its run id, and its path. None outside of sagas.
_Place = tuple[str, tuple[int, ...]] | None


class LedgerError(AssertionError):
    """An effect was made twice, taken back twice, taken back out of order, or made too late."""


class _Effect(NamedTuple):
    name: str
    place: _Place
    key: str | None


class EffectsLedger:
    """A fake world for tests of sagas: effects have names, are made, and are taken back.

    It fails, with a `LedgerError`, on an effect that is made twice or taken back twice, unless it is
    the same request by its idempotency key; on one that is made by an action that has been taken
    back already; and on one that is taken back while an effect made after it still stands. The last
    does not hold between members of a parallel group, and needs `watch` as a middleware of the saga
    to know which ones those are.

    That an effect is taken back which was never made is no mistake: a compensation runs when nobody
    knows how far its action came.

    Attributes:
        history: All that happened, in its order: ``"make flight"``, ``"take back flight"``.
    """

    history: list[str]

    def __init__(self) -> None:
        """Starts with nothing made."""
        self.history = []
        self._standing: dict[str, _Effect] = {}
        self._taken_back: dict[str, _Effect] = {}
        self._groups: set[_Place] = set()
        self._tried: set[_Place] = set()
        self._refused: set[_Place] = set()
        self._watching = False

    def snapshot(self) -> tuple[str, ...]:
        """Gives the names of the effects that stand, sorted: the ``state`` of a `Trial`."""
        return tuple(sorted(self._standing))

    def make(self, name: str, *, key: str | None = None) -> None:
        """Makes an effect.

        Args:
            name: Its name; one effect of a name stands at a time.
            key: The idempotency key of the request. A second request with the same key changes
                nothing, as with a service that knows such keys.

        Raises:
            LedgerError: It stands already; or the same action was taken back before.
        """
        new = _Effect(name, _here(), key)
        known = self._standing.get(name)
        if known is not None:
            if key is not None and key == known.key:
                return
            self._refused.add(new.place)
            raise LedgerError(
                f"{name!r} is made twice{_at(new)}; a request that may be repeated is told by its key: "
                "make(name, key=current_effect().key)"
            )
        gone = self._taken_back.get(name)
        if gone is not None and new.place is not None and new.place == gone.place:
            raise LedgerError(f"{name!r} is made{_at(new)} after it was taken back: it came too late")
        self.history.append(f"make {name}")
        self._standing[name] = new

    def take_back(self, name: str, *, key: str | None = None) -> bool:
        """Takes an effect back.

        Args:
            name: Its name.
            key: The idempotency key of the request, as for `make`.

        Returns:
            Whether there was something to take back.

        Raises:
            LedgerError: It was taken back before; or an effect that was made after it still stands.
        """
        place = _here()
        known = self._standing.get(name)
        if known is None:
            gone = self._taken_back.get(name)
            if gone is not None and gone.place == place and (key is None or key != gone.key):
                raise LedgerError(
                    f"{name!r} is taken back twice{_at(gone)}; a request that may be repeated is told "
                    "by its key: take_back(name, key=current_effect().key)"
                )
            # So that an effect which comes after this is known to be late.
            self._taken_back[name] = _Effect(name, place, key)
            return False
        if place is not None and place in self._refused:
            return False  # it is not this one's: what that made was refused
        names = list(self._standing)
        for later in names[names.index(name) + 1 :]:
            if self._in_order(known, self._standing[later]):
                raise LedgerError(self._out_of_order(known, self._standing[later]))
        self.history.append(f"take back {name}")
        del self._standing[name]
        self._taken_back[name] = _Effect(name, known.place, key)
        return True

    def _in_order(self, earlier: _Effect, later: _Effect) -> bool:
        """Tells whether the later one has to be taken back first."""
        one, other = earlier.place, later.place
        if other in self._tried:
            return False  # that was tried, and failed; or it is in doubt, and cannot be
        if one is None or other is None or one[0] != other[0]:
            return True
        common = 0
        for left, right in zip(one[1], other[1], strict=False):
            if left != right:
                break
            common += 1
        return (one[0], one[1][:common]) not in self._groups

    def _out_of_order(self, earlier: _Effect, later: _Effect) -> str:
        hint = ""
        if not self._watching and earlier.place and later.place:
            hint = "; if they are members of a parallel group, give the saga middleware=[ledger.watch]"
        return (
            f"{earlier.name!r}{_at(earlier)} is taken back while {later.name!r}{_at(later)}, made after "
            f"it, stands{hint}"
        )

    async def watch(self, effect: Effect, call_next: CallNext) -> object:
        """A middleware by which the ledger knows the groups, and which compensations were tried."""
        self._watching = True
        if effect.kind == "group":
            self._groups.add((effect.run_id, effect.path))
        try:
            return await call_next()
        except BaseException:
            self._tried.add((effect.run_id, effect.path))
            raise

    def step(
        self,
        name: str,
        *,
        checkpoints: tuple[int, int] = (1, 1),
        undo: bool = False,
        **options: Any,
    ) -> Step[..., str]:
        """Makes a step whose action makes an effect, and whose way back takes it back.

        Both take any arguments, and tell a repeated request by its key.

        Args:
            name: Of the effect, and of the step.
            checkpoints: How often the action waits before its effect, and after it.
            undo: Taken back by an undo, not by a compensation.
            **options: More options of the `Step`.

        Returns:
            The step; its action returns the name.
        """
        before, after = checkpoints

        async def action(*_args: Any, **_kwargs: Any) -> str:
            for _ in range(before):
                await checkpoint()
            self.make(name, key=_key())
            for _ in range(after):
                await checkpoint()
            return name

        async def back(*_args: Any, **_kwargs: Any) -> None:
            await checkpoint()
            self.take_back(name, key=_key())

        return Step(action, None if undo else back, undo=back if undo else None, name=name, **options)


def _here() -> _Place:
    effect = current_effect()
    return None if effect is None else (effect.run_id, effect.path)


def _key() -> str | None:
    effect = current_effect()
    return None if effect is None else effect.key


def _at(effect: _Effect) -> str:
    return "" if effect.place is None else f" at {effect.place[1]}"
