"""Finds the sagas that ``--app module:name`` means."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import AsyncGenerator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from pathlib import Path
from typing import Any, cast

from pysagas import Saga

__all__ = ["AnySaga", "BadApp", "open_app"]

AnySaga = Saga[..., Any]


class BadApp(Exception):
    """What was given as ``--app`` leads to no sagas; the message says at what it ends."""


@asynccontextmanager
async def open_app(place: str) -> AsyncGenerator[list[AnySaga]]:
    """Gives the sagas that a place names, for the length of a block.

    Args:
        place: ``module:name``; the name of a saga, of a list of them, or of a function that gives
            one of these. The function may be async, and may give a context manager, which is
            entered around the block: for what the sagas need open.

    Raises:
        BadApp: There are none.
    """
    found: Any = _look_up(place)
    async with AsyncExitStack() as stack:
        if _is_function(found):
            try:
                found = found()
                if inspect.isawaitable(found):
                    found = await found
                if isinstance(found, AbstractAsyncContextManager):
                    manager = cast("AbstractAsyncContextManager[object]", found)
                    found = await stack.enter_async_context(manager)
                elif isinstance(found, AbstractContextManager):
                    found = stack.enter_context(cast("AbstractContextManager[object]", found))
            except Exception as error:
                raise BadApp(f"{place}: calling it raised {_told(error)}") from error
        yield _checked(place, found)


def _look_up(place: str) -> Any:
    module_name, _, name = place.partition(":")
    if not module_name or not name:
        raise BadApp(f"it must be module:name, such as shop.sagas:SAGAS, not {place!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        named = error.name if isinstance(error, ModuleNotFoundError) else None
        if named is not None and f"{module_name}.".startswith(f"{named}."):
            raise BadApp(
                f"there is no module {named!r}, in {here} or among what is installed"
            ) from error
        raise BadApp(f"importing {module_name!r} raised {_told(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            sagas = [known for known in dir(found) if isinstance(getattr(found, known, None), Saga)]
            hint = f"; sagas there: {', '.join(sagas)}" if sagas else ""
            raise BadApp(f"{module_name!r} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def _is_function(found: object) -> bool:
    return callable(found) and not isinstance(found, Saga)


def _checked(place: str, found: object) -> list[AnySaga]:
    sagas: list[Any] = list(cast("list[Any]", found)) if isinstance(found, list | tuple) else [found]
    if not sagas:
        raise BadApp(f"{place} is empty: there must be a saga in it")
    known: set[tuple[str, str | None]] = set()
    for one in sagas:
        if not isinstance(one, Saga):
            raise BadApp(
                f"{place} must be a saga, a list of sagas, or a function that gives one of these; "
                f"it leads to {one!r}"
            )
        identity = (one.name, one.version)
        if identity in known:
            raise BadApp(
                f"{place} has two sagas of the name {one.name!r} and the version {one.version!r}; a run "
                "finds its saga by both"
            )
        known.add(identity)
    return sagas


def _told(error: BaseException) -> str:
    """Says what was raised, and by which line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
