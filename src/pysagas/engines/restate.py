"""Runs sagas on Restate: every effect is durable, and any worker carries a run on.

Needs the extra ``restate``, and for the worker an ASGI server that speaks HTTP/2. The sagas are those
that run in memory and with a journal; what is different here, `RestateEngine` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import quote

import anyio

from pysagas import Outcome, Saga, Step
from pysagas.durable import (
    Codec,
    JSONCodec,
    OtherRun,
    RunState,
    SagaChanged,
)
from pysagas.durable._codec import (
    as_bytes,
    as_text,
    decode_arguments,
    encode_arguments,
    function_of,
    same_arguments,
)
from pysagas.durable._journal import check_run
from pysagas.durable._recalled import recalled
from pysagas.durable._records import Events
from pysagas.durable._storage import Ending

from ._errors import EngineError, EngineUnavailable
from ._limits import as_utf8, refuse_if_large

if TYPE_CHECKING:
    import ssl

    import httpx
    import restate

    from ._worker import ASGIApp

__all__ = ["EngineError", "EngineUnavailable", "RestateEngine"]

T = TypeVar("T")
AnySaga = Saga[..., Any]
OK, NOT_FOUND = 200, 404
NOT_THERE = (502, 503, 504)  # what a proxy answers, and a server that is only starting
NOT_YET = 470  # what Restate answers when asked for the outcome of a run that has not ended
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
# How long a worker may take to tell with which arguments a run was started; and whether it knows a saga.
CALL_TIMEOUT = 5.0
CHECK_TIMEOUT = 2.0
# What Restate takes for the name of a service.
NAME = re.compile(r"([a-zA-Z]|_[a-zA-Z0-9])[a-zA-Z0-9._-]*")


class RestateEngine:
    """Sagas on Restate: the worker's side, and the client's.

    A worker serves `app`, which is registered with the server once. A program starts runs with `run`
    or `submit`; it needs the same definitions, and no worker of its own.

    What is different from a run in memory: the event loop is asyncio's. A step that is under way is
    never cut off: a group whose member fails lets the others end the step that they are at, whatever
    its ``on_failure``. A run whose worker died is carried on, so the step that was under way is run
    again, and has to be idempotent by the key of `current_effect`. As with a journal a saga has to
    be deterministic between its steps, and members of a group must not wait for each other. A saga
    with a ``rollback_timeout`` is refused.
    """

    def __init__(
        self,
        sagas: Iterable[AnySaga],
        *,
        name: str = "pysagas",
        ingress: str = "http://127.0.0.1:8080",
        codec: Codec | None = None,
        retries: Mapping[str, restate.RunOptions[Any]] | None = None,
        invocation_retry_policy: restate.InvocationRetryPolicy | None = None,
        longest_step: timedelta = timedelta(days=1),
        retention: timedelta = timedelta(days=30),
        patience: float = 30.0,
    ) -> None:
        """Makes one; it talks to nobody yet.

        Args:
            sagas: Those that it runs; their names, with their versions, are different.
            name: Of the workflow that it is to Restate. Run ids are unique in it.
            ingress: Where the server takes calls.
            codec: For arguments and results; None: JSON.
            retries: Restate's policies for the actions of steps, by their names: each try, and each
                pause, is durable. What `restate.TerminalError` says is never tried again, nor is what
                an action raises without a policy. (``max_duration`` and serialisation are not used.)
            invocation_retry_policy: Restate's policy for what is no failure of a step: a worker that
                died, or cannot be reached. None: for ever, ten seconds apart at most.
            longest_step: The server takes a step that is longer for one that hangs.
            retention: How long the server remembers the outcome of a run. After that its id runs anew.
            patience: Seconds for which a call waits for a server that does not answer.

        Raises:
            ImportError: restate-sdk or httpx is not installed.
            TypeError: What is given is no saga, no policy, or no length of time.
            ValueError: Two sagas have the same name and version; a policy has a ``max_duration``, or is
                for no step of these sagas; the name, or the ingress, cannot be one.
            SagaDefinitionError: A saga has a limit for its rollback.
        """
        try:
            import_module("httpx")
            from ._attempt import refuse_time_limits  # noqa: PLC0415
            from ._worker import make_app  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(
                f"RestateEngine needs {error.name}, which is not installed: "
                'pip install "pysagas[restate]"'
            ) from error
        whole: object = sagas
        if isinstance(whole, Saga):
            raise TypeError(
                f"RestateEngine: sagas must be a list of sagas, not {sagas!r}; put it in a list"
            )
        _check_options(name, ingress, longest_step, retention, patience)
        self._sagas: dict[tuple[str, str | None], AnySaga] = {}
        for saga in sagas:
            if not isinstance(saga, Saga):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"RestateEngine: sagas must be sagas, and hold {saga!r}")
            if self._sagas.setdefault((saga.name, saga.version), saga) is not saga:
                raise ValueError(
                    f"RestateEngine: two sagas have the name {saga.name!r} and the version "
                    f"{saga.version!r}; a run finds its saga by both"
                )
            refuse_time_limits(saga)
        self._retries = dict(retries or {})
        _check_policies(self._retries, self._sagas.values())
        self._name = name
        self._ingress = ingress.rstrip("/")
        self._codec: Codec = JSONCodec() if codec is None else codec
        self._patience = patience
        self._events = Events()
        # The sagas that a worker has said it knows.
        self._served: set[tuple[str, str | None]] = set()
        self._app = make_app(
            name,
            self._read_call,
            self._codec,
            self._retries,
            invocation_retry_policy,
            longest_step,
            retention,
        )

    def __repr__(self) -> str:
        return f"<RestateEngine {self._name!r} at {self._ingress}>"

    # --- the worker ----------------------------------------------------------------------------------

    @property
    def app(self) -> ASGIApp:
        """The worker, an ASGI application."""
        return self._app

    def _read_call(self, call: bytes) -> tuple[AnySaga, tuple[Any, ...], dict[str, Any]]:
        """Gives the saga and the arguments of a call, for the worker."""
        given = json.loads(call)
        saga = self._sagas.get((given["saga"], given["version"]))
        if saga is None:
            raise SagaChanged(self._unknown(given["saga"], given["version"]))
        args, kwargs = decode_arguments(
            self._codec, as_bytes(given["args"]), function_of(saga), f"saga {saga.name!r}"
        )
        saga.check_call(args, kwargs, "{}.run")
        return saga, args, kwargs

    def _unknown(self, name: str, version: str | None) -> str:
        known = ", ".join(sorted(_identity(*one) for one in self._sagas)) or "none"
        return f"saga {_identity(name, version)} is none of those given to {self!r}: {known}"

    # --- the client ----------------------------------------------------------------------------------

    async def run(
        self,
        saga: Saga[..., T],
        *args: Any,
        run_id: str,
        exceptions: Any = (),
        **kwargs: Any,
    ) -> Outcome[T]:
        """Runs a saga under a name, once, and waits for its end.

        A second call with the same id starts nothing: it waits for the same run, and gives the same
        outcome. Cancelling this call cancels the waiting, and not the run: that is `cancel`.

        Args:
            saga: The saga, one of the engine's.
            *args: What it is called with.
            run_id: The name of the run.
            exceptions: As for `Saga.run`.
            **kwargs: What it is called with by keyword.

        Returns:
            The outcome.

        Raises:
            BaseException: As for `Saga.run`.
            RunInterrupted: It was cancelled, and has been taken back.
            OtherRun: The id belongs to another saga, or to other arguments.
            NotRecordable: The arguments cannot be sent. Nothing has run.
            EngineUnavailable: The server does not answer. If the run has been started it goes on.
            EngineError: The server refuses the call.
        """
        call = await self._start(saga, args, kwargs, run_id, exceptions, "run")
        answer = await self._ask("GET", f"restate/workflow/{self._key(run_id)}/attach", waits=True)
        return self._outcome(answer, run_id, saga, call, exceptions)

    async def submit(self, saga: AnySaga, *args: Any, run_id: str, **kwargs: Any) -> None:
        """Starts a run, as `run` does, and does not wait for it."""
        await self._start(saga, args, kwargs, run_id, (), "submit")

    async def outcome(self, run_id: str, *, exceptions: Any = ()) -> Outcome[Any] | None:
        """Gives the outcome of a run; None where it has not ended.

        Raises:
            BaseException: As for `run`, what the run raised.
            EngineError: There is no run of this id.
        """
        answer = await self._ask("GET", f"restate/workflow/{self._key(run_id)}/output")
        if answer.status_code == NOT_YET:
            return None
        recorded = self._recorded(answer, run_id)
        given = json.loads(as_bytes(recorded["call"]))
        saga = self._sagas.get((given["saga"], given["version"]))
        if saga is None:
            raise EngineError(f"run {run_id!r}: {self._unknown(given['saga'], given['version'])}")
        return self._outcome(answer, run_id, saga, None, exceptions)

    async def cancel(self, run_id: str) -> None:
        """Cancels a run: the steps that are under way end, and all is taken back.

        Returns when the server has been told; one that has ended stays as it is.

        Raises:
            EngineError: There is no run of this id.
            EngineUnavailable: The server does not answer, or no worker begins with the run.
        """
        ends = anyio.current_time() + self._patience
        while True:
            answer = await self._ask("GET", f"restate/workflow/{self._key(run_id)}/output")
            if answer.status_code == NOT_FOUND:
                self._refused(answer, f"run {run_id!r} cannot be cancelled")
            if answer.status_code != NOT_YET:
                self._recorded(answer, run_id)
                return  # it has ended
            answer = await self._ask("POST", f"{self._key(run_id)}/cancel")
            if answer.status_code != OK:
                self._refused(answer, f"run {run_id!r} cannot be cancelled")
            if answer.content:
                return
            if anyio.current_time() > ends:
                raise EngineUnavailable(
                    f"run {run_id!r} cannot be cancelled: no worker has begun with it"
                )
            await anyio.sleep(FIRST_PAUSE)

    # --- how -----------------------------------------------------------------------------------------

    async def _start(
        self,
        saga: AnySaga,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run_id: str,
        exceptions: Any,
        what: str,
    ) -> bytes:
        """Starts a run, or finds it started; gives the call as it is sent."""
        place = check_run(saga, run_id, exceptions, f"engine.{what}")
        if self._sagas.get((saga.name, saga.version)) is not saga:
            raise EngineError(f"{place}: {self._unknown(saga.name, saga.version)}")
        data = encode_arguments(self._codec, args, kwargs, function_of(saga), place)
        saga.check_call(args, kwargs, f"{{}}.{what}")
        refuse_if_large(data, f"{place}: what it is called with")
        call = json.dumps({"saga": saga.name, "version": saga.version, "args": as_text(data)}).encode()
        await self._check_worker(saga, call, run_id, place)
        answer = await self._ask("POST", f"{self._key(run_id)}/run/send", call)
        if answer.status_code not in (200, 202):
            self._refused(answer, f"{place} was not started")
        if answer.json()["status"] == "PreviouslyAccepted":
            with anyio.move_on_after(CALL_TIMEOUT):  # else it is looked at when the run has ended
                known = await self._ask("POST", f"{self._key(run_id)}/call")
                if known.status_code == OK and known.content:
                    self._check_same(run_id, saga, call, known.content)
        return call

    async def _check_worker(self, saga: AnySaga, call: bytes, run_id: str, place: str) -> None:
        """Makes sure, before the first run of a saga, that the workers know it, if there is one.

        A run that no worker knows would wait at the server for one that does, and its caller with it.
        """
        identity = (saga.name, saga.version)
        if identity not in self._served:
            with anyio.move_on_after(CHECK_TIMEOUT):
                answer = await self._ask("POST", f"{self._key(run_id)}/check", call)
                if answer.status_code != OK:
                    self._refused(answer, f"{place} was not started")
                self._served.add(identity)

    def _check_same(self, run_id: str, saga: AnySaga, call: bytes, known: bytes) -> None:
        if call == known:
            return
        one, other = json.loads(call), json.loads(known)
        identity = (other["saga"], other["version"])
        if identity != (saga.name, saga.version):
            raise OtherRun(
                f"run {run_id!r} is one of saga {_identity(*identity)}, not of "
                f"{_identity(saga.name, saga.version)}"
            )
        args, kwargs = decode_arguments(self._codec, as_bytes(one["args"]), function_of(saga), "")
        if not same_arguments(self._codec, as_bytes(other["args"]), args, kwargs, function_of(saga)):
            raise OtherRun(
                f"run {run_id!r} of saga {saga.name!r} has other arguments: recorded are "
                f"{other['args']}, given {one['args']}; a run id belongs to one call"
            )

    def _outcome(
        self,
        answer: httpx.Response,
        run_id: str,
        saga: Saga[..., T],
        call: bytes | None,
        exceptions: Any,
    ) -> Outcome[T]:
        recorded = self._recorded(answer, run_id)
        if call is not None:
            self._check_same(run_id, saga, call, as_bytes(recorded["call"]))
        ending = Ending(RunState(recorded["state"]), as_bytes(recorded["value"]), recorded["error"])
        events = [event for record in recorded["records"] for event in self._events.decode(record)]

        async def take_back() -> Outcome[T]:
            raise EngineError(
                f"run {run_id!r} has completed on Restate, which does not take such a run back; start a "
                "saga that does"
            )

        return recalled(ending, events, self._codec, saga, run_id, exceptions, take_back)

    def _recorded(self, answer: httpx.Response, run_id: str) -> dict[str, Any]:
        """Gives what the worker told of a run that has ended."""
        try:
            said: Any = answer.json()
            if answer.status_code != OK:
                said = json.loads(said["metadata"]["outcome"])
            recorded: dict[str, Any] = said
            _ = recorded["state"]
        except (ValueError, KeyError, TypeError):  # from something else than our worker
            no = "there is no " if answer.status_code == NOT_FOUND else ""
            self._refused(answer, f"{no}run {run_id!r}")
        return recorded

    def _refused(self, answer: httpx.Response, what: str) -> NoReturn:
        try:
            said = answer.json()["message"]
        except (ValueError, KeyError, TypeError):
            said = answer.text or "nothing; is that its ingress, port 8080 by default?"
        raise EngineError(f"{what}: Restate at {self._ingress} answers {answer.status_code}: {said}")

    def _key(self, run_id: str) -> str:
        if run_id in (".", "..") or run_id != as_utf8(run_id):
            raise ValueError(f"run_id cannot be {run_id!r}: it stands in the path of a URL")
        return f"{quote(self._name, safe='')}/{quote(run_id, safe='')}"

    @cached_property
    def _tls(self) -> ssl.SSLContext | bool:
        """The certificates, which take 20 ms to load; False where nothing is encrypted."""
        import httpx  # noqa: PLC0415

        return self._ingress.startswith("https:") and httpx.create_ssl_context()

    async def _ask(
        self, method: str, path: str, content: bytes = b"{}", *, waits: bool = False
    ) -> httpx.Response:
        """Asks the server, again and again while it does not answer; all that is asked is harmless twice.

        Args:
            method: Of HTTP.
            path: What is asked.
            content: What is sent along.
            waits: Whether the answer may take as long as a run does.
        """
        import httpx  # noqa: PLC0415

        body: dict[str, Any] = {}
        if method == "POST":
            body = {"content": content, "headers": {"content-type": "application/json"}}
        pause = FIRST_PAUSE
        ends = anyio.current_time() + self._patience
        timeout = httpx.Timeout(None if waits else max(self._patience, 1.0), connect=10.0)
        async with httpx.AsyncClient(timeout=timeout, verify=self._tls) as client:
            while True:
                asked = anyio.current_time()
                cause: Exception | None = None
                try:
                    answer = await client.request(method, f"{self._ingress}/{path}", **body)
                    if answer.status_code not in NOT_THERE:
                        return answer
                    problem = f"{answer.status_code} {answer.text}"
                except httpx.TransportError as error:
                    problem, cause = f"{type(error).__name__}: {error}", error
                    if waits and anyio.current_time() > asked + LONGEST_PAUSE:
                        ends = anyio.current_time() + self._patience  # it was there until now
                if anyio.current_time() + pause > ends:
                    raise EngineUnavailable(
                        f"Restate at {self._ingress} does not answer: {problem}; a run that has been started "
                        "goes on when it is there again: call again with the same run id"
                    ) from cause
                await anyio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)


def _check_options(
    name: object, ingress: object, longest_step: object, retention: object, patience: object
) -> None:
    """Refuses at once what Restate, or the first call, would refuse later, and elsewhere."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"RestateEngine: name must be a letter, and then letters, digits, '.', '_' or '-', as Restate "
            f"names services; not {name!r}"
        )
    if not isinstance(ingress, str) or not ingress.startswith(("http://", "https://")):
        raise ValueError(
            f"RestateEngine: ingress must be a URL like http://127.0.0.1:8080, not {ingress!r}"
        )
    for what, length in (("longest_step", longest_step), ("retention", retention)):
        if not isinstance(length, timedelta) or length <= timedelta(0):
            raise TypeError(f"RestateEngine: {what} must be a timedelta above 0, not {length!r}")
    if not isinstance(patience, int | float) or isinstance(patience, bool):
        raise TypeError(f"RestateEngine: patience must be a number of seconds, not {patience!r}")


def _check_policies(policies: Mapping[str, Any], sagas: Iterable[AnySaga]) -> None:
    """Refuses policies that are none, cannot be kept, or are for no step."""
    from restate import RunOptions  # noqa: PLC0415 - an extra

    steps = {step for saga in sagas for step in _steps_of(saga)}
    for step, options in policies.items():
        if not isinstance(options, RunOptions):
            raise TypeError(
                f"RestateEngine: the policy of step {step!r} must be restate.RunOptions, not {options!r}"
            )
        if step not in steps and None not in steps:
            there = ", ".join(sorted(map(repr, steps))) or "none"
            raise ValueError(
                f"RestateEngine: retries has a policy for {step!r}, which is no step; steps there: {there}"
            )
        if options.max_duration is not None or options.max_retry_duration is not None:
            raise ValueError(
                f"RestateEngine: the policy of step {step!r} has a max_duration, which a replay could "
                "not keep; give it max_attempts"
            )


def _steps_of(part: Any) -> Iterator[str | None]:
    """Yields the names of the steps in a saga; None where a function chooses them."""
    if isinstance(part, Step):
        yield part.name
        return
    if getattr(part, "function", None) is not None:
        yield None
    for inner in getattr(part, "parts", ()):
        yield from _steps_of(getattr(inner, "definition", inner))


def _identity(name: str, version: str | None) -> str:
    return repr(name) if version is None else f"{name!r}, version {version!r}"
