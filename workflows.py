# SPDX-License-Identifier: MIT
"""Cloudflare Workflows in one Python file, on nothing but the standard library.

A workflow is a class whose `run` calls steps. What a step returns is stored before `run` goes on,
so that the process may die at any moment: the next one replays `run`, hands every finished step its
stored result, and goes on from there. Steps retry, sleep for months and wait for events, on SQLite.

    import asyncio, workflows

    class Greet(workflows.WorkflowEntrypoint):
        async def run(self, event, step):
            async def fetch():
                return {"name": event.payload["name"].title()}

            user = await step.do("fetch user", fetch)
            await step.sleep("let it rest", "2 seconds")
            return f"Hello, {user['name']}"

    async def main():
        async with workflows.Engine("workflows.db") as engine:
            instance = await engine.bind(Greet).create(params={"name": "ada"})
            print(await instance.result())

    asyncio.run(main())

The file reads downwards; each section begins with what it is for and why it is so:

    vocabulary   statuses, errors, the small records that users see
    durations    "5 minutes" to milliseconds, and the clock
    codec        values and errors to JSON and back, exactly
    limits       what Cloudflare's plans allow
    retry        a step's configuration, and how long it waits before it tries again
    journal      what a recorded history means: pure functions
    store        all SQL, the one writer thread, group commit, who owns the database
    threads      where plain (not async) callbacks run
    run          one life of one instance: replay, attempts, the `step` object
    engine       which instances live now, and what happens when something fails
    binding      `Workflow` and `WorkflowInstance`, the side that callers see
    dialect      the decorator form of `step.do`, and the modules of Cloudflare's Python SDK
    test tools   introspection, and a clock that moves only when told; then the camelCase names
    command line `demo`, which kills a workflow's process and shows that it goes on
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections.abc
import contextlib
import contextvars
import copy
import dataclasses
import functools
import importlib.util
import inspect
import json
import keyword
import logging
import math
import os
import queue
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import types
import unicodedata
import urllib.parse
import uuid
import weakref
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Generic, NamedTuple, NoReturn, Self, TypeVar, dataclass_transform

__all__ = [
    "Clock", "Engine", "InstanceStatus", "Limits", "ManualClock", "NonRetryableError", "Usage",
    "Workflow", "WorkflowDelayContext", "WorkflowEntrypoint", "WorkflowError", "WorkflowEvent",
    "WorkflowFatalError", "WorkflowHistoryEvent", "WorkflowInstance",
    "WorkflowInstanceIntrospector", "WorkflowInstanceModifier", "WorkflowInternalError",
    "WorkflowIntrospector", "WorkflowRollbackContext", "WorkflowStep", "WorkflowStepContext",
    "WorkflowStepEvent", "WorkflowStepInfo", "WorkflowTimeoutError", "install_workers_shim",
    "parse_duration",
]  # fmt: skip

log = logging.getLogger("workflows")

Params = TypeVar("Params")

# --------------------------------------------------------------------------------------------------
# Vocabulary: statuses, errors, and the small records that users see.
#
# An instance moves through eight statuses (Cloudflare's names, also in the database):
#
#     queued ──▶ running ──▶ complete | errored | terminated
#       ▲         │     ╲
#       │         ▼      ▶ waitingForPause ──▶ paused
#       └───── waiting
#
# A caller moves it by `pause` (queued, waiting → paused; running → waitingForPause), `resume`
# (paused → queued or waiting; waitingForPause → running), `terminate` and `restart` (→ queued, from
# anywhere); all other moves are the engine's. What ran when its process ended is queued again.

FINISHED = ("complete", "errored", "terminated")


class WorkflowError(Exception):
    """Base of the module's errors: `code` is stable and meant for programs, `name` is what
    `InstanceStatus.error` shows. Also stands in for a step's error whose own class can't be
    found."""

    code = "workflow.error"

    def __init__(self, message: str = "", *, code: str | None = None, name: str = "") -> None:
        super().__init__(message)
        self.name = name or type(self).__name__
        if code is not None:
            self.code = code


class NonRetryableError(WorkflowError):
    """Raise it in a step's callback to fail the step at once, whatever its retries say.

    developers.cloudflare.com/workflows/build/workers-api/ (NonRetryableError)"""

    code = "step.non_retryable"

    def __init__(self, message: str = "", name: str = "NonRetryableError") -> None:
        super().__init__(message, name=name)


class WorkflowTimeoutError(WorkflowError):
    """An attempt, an event wait or `result(timeout=…)` took longer than it may."""

    code = "workflow.timeout"


class WorkflowFatalError(WorkflowError):
    """Wrong use of the API, or a limit, inside a run. Never retried; `run` may catch it."""

    code = "workflow.fatal"


class WorkflowInternalError(WorkflowError):
    """The engine's own trouble: its storage failed, or it died during an attempt."""

    code = "workflow.internal"


def _refusal(code: str, message: str) -> WorkflowError:
    """Of a caller's call; inside a run it is `_fatal`. What serves both is told which."""
    return WorkflowError(message, code=code)


def _fatal(code: str, message: str) -> WorkflowFatalError:
    return WorkflowFatalError(message, code=code)


Refuse = Callable[[str, str], WorkflowError]


class _Unload(asyncio.CancelledError):
    """Raised by step calls in a run that is being unloaded. A `CancelledError`, so that `finally`
    blocks run, `except Exception` lets it pass, and asyncio logs nothing."""


def _camel(name: str) -> str:
    return re.sub("_([a-z])", lambda match: match[1].upper(), name)


@dataclass_transform(frozen_default=True, eq_default=False)
class _Record(Mapping[str, Any]):
    """Its subclasses are frozen dataclasses that can also be read as mappings with Cloudflare's
    (camelCase) keys."""

    _keys: ClassVar[dict[str, str]]  # Cloudflare's key → attribute

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, eq=False)(cls)
        cls._keys = {_camel(name): name for name in cls.__annotations__}

    def __getitem__(self, key: str) -> Any:
        return getattr(self, self._keys[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class WorkflowEvent(_Record, Generic[Params]):
    """What `run` gets: the params that the instance was created with (read-only, all the way down),
    the time of its creation, its id, and the name of its workflow."""

    payload: Params
    timestamp: datetime
    instance_id: str
    workflow_name: str


class WorkflowStepEvent(_Record):
    """What `step.wait_for_event` returns. What it lacks is looked up in its payload, so that
    `event.payload["approved"]`, `event["approved"]` and `event.approved` are one."""

    payload: Any
    timestamp: datetime
    type: str

    def __getitem__(self, key: str) -> Any:
        inner = self.payload if isinstance(self.payload, dict) else {}
        return super().__getitem__(key) if key in self._keys else inner[key]

    def __getattr__(self, name: str) -> Any:
        payload = self.__dict__.get("payload")
        if isinstance(payload, dict) and name in payload:
            return payload[name]
        raise AttributeError(f"neither the event nor its payload has {name!r}")


class WorkflowStepInfo(_Record):
    """Which step a callback belongs to: its name, and how often that name was used so far."""

    name: str
    count: int


class WorkflowStepContext(_Record):
    """What a callback with one parameter (or one named `ctx`) gets: the step, the number of this
    attempt from 1, and the step's config with the defaults merged in."""

    step: WorkflowStepInfo
    attempt: int
    config: dict[str, Any]


class WorkflowDelayContext(_Record):
    """What a function for `retries.delay` gets: the context of the attempt that failed, and its
    error."""

    ctx: WorkflowStepContext
    error: BaseException


class WorkflowRollbackContext(_Record):
    """What a step's rollback handler gets: the context of the step's last attempt, the error that
    started the rollback, the step's output (None if it failed), and `<name>-<count>`."""

    ctx: WorkflowStepContext
    error: Exception
    output: Any
    step_name: str


class InstanceStatus(_Record):
    """`status` is one of the eight statuses, `output` what `run` returned (when complete), `error`
    `{"name", "message"}` (when errored)."""

    status: str
    output: Any = None
    error: dict[str, str] | None = None


class Usage(_Record):
    """Of the current calendar month (UTC): `requests` (one for each instance created and each
    wake-up) and `cpu_ms` of callbacks; the `storage_bytes` of now; and `cost_usd`, what that comes
    to on Cloudflare's paid plan beyond what it includes, with this storage held for the month.

    developers.cloudflare.com/workflows/reference/pricing/"""

    requests: int
    cpu_ms: float
    storage_bytes: int
    cost_usd: float


class _Attributes(dict[str, Any]):
    """A dict whose keys can also be read as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            kind = type(self).__name__
            raise AttributeError(f"{kind} has no {name!r}; it has {', '.join(self) or 'nothing'}")
        return self[name]


class WorkflowHistoryEvent(_Attributes):
    """Something that happened to an instance, as `subscribe` tells it: `type`, `event_id`,
    `timestamp`, `instance_id`, and what the type brings (`step_name`, `output`, `error`, …)."""


# --------------------------------------------------------------------------------------------------
# Durations and the clock. Inside the module every time is a whole number of milliseconds, every
# moment one since the Unix epoch, read from a `Clock`. (Elsewhere only real spans are measured: CPU
# time, and patience with locks and threads.)

_UNITS = {"second": 1_000, "minute": 60_000, "hour": 3_600_000, "day": 86_400_000}
_UNITS |= {n: d * _UNITS["day"] for n, d in (("week", 7), ("month", 30), ("year", 365))}
_DURATION = re.compile(rf"([0-9]+(?:\.[0-9]+)?) ({'|'.join(_UNITS)})s?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_YEAR = _UNITS["year"]  # Cloudflare's longest sleep


def _show(value: Any) -> str:
    """A value in an error message: never too long, and never another error."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else text[:100] + "…"


def parse_duration(value: float | str | timedelta) -> int:
    """Milliseconds of a duration as Cloudflare writes it: a number of milliseconds, a `timedelta`,
    or `"<number> <unit>"` with second, minute, hour, day, week, month (30 d) or year (365 d),
    singular or plural. Anything else is a `ValueError`.

    developers.cloudflare.com/workflows/build/sleeping-and-retrying/"""
    ms: Any = value
    if isinstance(value, timedelta):
        ms = value / timedelta(milliseconds=1)
    elif isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        ms = float(match[1]) * _UNITS[match[2]]
    if isinstance(ms, (int, float)) and not isinstance(ms, bool) and 0 <= ms < math.inf:
        return round(ms)
    text = f"'<number> <unit>' with one of {', '.join(_UNITS)} (or the plural)"
    expected = f"milliseconds (0 or more), a timedelta, or {text}"
    raise ValueError(f"{_show(value)} is not a duration: expected {expected}")


def _parse_moment(value: float | datetime) -> int:
    """Milliseconds since the epoch. A number below 1e11 means seconds (Cloudflare's docs), from
    there on milliseconds (its engine): 1e11 s is the year 5138, 1e11 ms is 1973."""
    if isinstance(value, datetime) and value.utcoffset() is not None:
        return (value - _EPOCH) // timedelta(milliseconds=1)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return max(0, round(value * 1000 if abs(value) < 1e11 else value))
    expected = "an aware datetime, or seconds or milliseconds since 1970"
    raise ValueError(f"{_show(value)} is not a moment: expected {expected}")


def _to_datetime(ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=ms)


class Clock:
    """Where all time comes from: the wall clock for moments that are stored (a machine that was
    suspended must notice), the event loop's monotonic clock for timers."""

    # Whether the loop waits for the writer after each operation: then histories are the same in
    # every run of a test.
    exact = False

    def __init__(self) -> None:
        self.engines: list[Engine] = []  # the open ones that go by it

    def now(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def call_later(self, ms: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        """Calls back on the running loop after so many milliseconds, unless cancelled.
        (More than asyncio can take is cut to 100 years.)"""
        return asyncio.get_running_loop().call_later(min(ms, 100 * _YEAR) / 1000, callback)


# --------------------------------------------------------------------------------------------------
# Codec: values and errors to JSON and back. What persists is JSON plus aware datetimes and bytes,
# as Cloudflare's structured clone has them, and never pickle: opening a database must not run
# code.
#
# A value is stored as plain JSON if reading that back gives an equal value. Where it would not, the
# odd part is written as an object with the one key "$datetime", "$bytes", "$str" (base64, for text
# with surrogates, which UTF-8 doesn't have) or "$dict" (a list of pairs, for a dict that has one of
# these keys, or such text as a key).

DEEPEST = 300  # levels of nesting
_TAGS: dict[str, Callable[[Any], Any]] = {
    "$datetime": datetime.fromisoformat,
    "$bytes": base64.b64decode,
    "$str": lambda text: base64.b64decode(text).decode("utf-8", "surrogatepass"),
    "$dict": dict,
}
_to_json = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode
_parse: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode
# (`_parse` is json.loads without its search for blanks, which we don't write.)
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Unserializable(ValueError):
    """A value that can't be stored; the message is its path and type."""


def encode(value: Any) -> tuple[str, Any]:
    """The JSON text of a value, and what decoding that text gives: fresh, and equal to the
    value."""
    try:
        text = _to_json(value)
        deep = text.count("[") + text.count("{") > DEEPEST and _is_deep(value)
        if '"$' not in text and not deep and size_of(text):  # which fails for surrogates
            decoded = _parse(text, 0)[0]
            if decoded == value:
                return text, decoded
    except Exception:
        pass  # the slow way finds out what, and where
    try:
        text = _to_json(_tagged(value, "$", frozenset()))
        return text, decode(text)
    except _Unserializable:
        raise
    except Exception as error:  # the value's own methods may raise anything
        raise _Unserializable(f"$: {type(error).__name__}: {_message(error)}") from None


def _is_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Whether it is nested deeper than `DEEPEST`, where code with less of the stack left might not
    be able to read it back."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list, tuple)) and (levels == 1 or _is_deep(item, levels - 1)):
            return True
    return False


def decode(text: str) -> Any:
    """The value of a text made by `encode`."""
    return json.loads(text, object_hook=_untag) if '"$' in text else _parse(text, 0)[0]


def _tagged(value: Any, path: str, above: frozenset[int]) -> Any:
    """The same value as JSON with tags, or `_Unserializable` with the path of what can't be.
    `above` is what it lies in: the ids of dicts and lists."""
    if isinstance(value, str) and _SURROGATE.search(value):
        return {"$str": base64.b64encode(str.encode(value, "utf-8", "surrogatepass")).decode()}
    if isinstance(value, (int, float)) and not -1e300 < value < 1e300:  # nan isn't, either
        try:
            _to_json(value)
        except ValueError as error:  # not finite, or too many digits
            raise _Unserializable(f"{path}: {_show(value)}: {error}") from None
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise _Unserializable(f"{path}: datetime without a time zone")
        return {"$datetime": datetime.isoformat(value)}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode()}
    if not isinstance(value, (dict, list, tuple)):
        raise _Unserializable(f"{path}: {type(value).__name__}")
    if id(value) in above:
        raise _Unserializable(f"{path}: a cycle")
    if len(above) >= DEEPEST:
        raise _Unserializable(f"$: nested too deep (more than {DEEPEST} levels)")
    above |= {id(value)}
    if not isinstance(value, dict):
        return [_tagged(item, f"{path}[{n}]", above) for n, item in enumerate(value)]
    if odd := [key for key in value if not isinstance(key, str)]:
        raise _Unserializable(f"{path}: a key of type {type(odd[0]).__name__}")
    pairs = [(_tagged(k, path, above), _tagged(v, f"{path}.{k}", above)) for k, v in value.items()]
    plain = all(isinstance(key, str) and key not in _TAGS for key, _ in pairs)
    return dict(pairs) if plain else {"$dict": pairs}


def _untag(pairs: dict[str, Any]) -> Any:
    tag = next(iter(pairs)) if len(pairs) == 1 else ""
    return _TAGS[tag](pairs[tag]) if tag in _TAGS else pairs


def size_of(text: str) -> int:
    """Bytes that a stored text takes."""
    return len(text) if text.isascii() else len(text.encode())


def _read_only(*_: Any, **__: Any) -> NoReturn:
    instead = "changes would be lost at the next replay; copy it, and return state from a step"
    raise TypeError(f"an event's payload is read-only: {instead}")


class _FrozenDict(dict[str, Any]):
    """Still a dict for `isinstance`, `json` and `==`; copies of it are plain dicts."""

    __setitem__ = __delitem__ = __ior__ = _read_only
    clear = pop = popitem = setdefault = update = _read_only

    def __reduce__(self) -> Any:  # what `copy` and `pickle` go by
        return dict, (dict(self),)


class _FrozenList(list[Any]):
    """Still a list for `isinstance`, `json` and `==`; copies of it are plain lists."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _read_only
    append = clear = extend = insert = pop = remove = reverse = sort = _read_only

    def __reduce__(self) -> Any:
        return list, (list(self),)


def freeze(value: Any) -> Any:
    """The same value, deeply read-only."""
    if isinstance(value, dict):
        return _FrozenDict((key, freeze(item)) for key, item in value.items())
    if isinstance(value, list):
        return _FrozenList(freeze(item) for item in value)
    return value


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except (Exception, SystemExit):  # a user's `__str__` may do anything; the rest is recorded
        return ""


def encode_error(error: BaseException, **more: Any) -> str:
    """An error as JSON: where its class is, its name and message, and its args, attributes and
    group members as far as these are allowed values."""
    try:
        return encode(_describe(error) | more)[0]
    except Exception:  # an error whose attributes or arguments can't even be looked at
        return encode_error(WorkflowError(_message(error), name=type(error).__name__), **more)


def _describe(error: BaseException) -> dict[str, Any]:
    cls = type(error)
    members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    message = error.message if isinstance(error, BaseExceptionGroup) else _message(error)
    # `OSError.filename` and the like aren't in `__dict__`, but in slots.
    names = [name for base in cls.__mro__ for name in vars(base) if _is_slot(base, name)]
    slots = {name: value for name in names if (value := getattr(error, name, None)) is not None}
    kept = {}
    for name, value in {**slots, **vars(error), "args": list(error.args)}.items():
        with contextlib.suppress(_Unserializable):
            kept[name] = encode(value)[1]
    label = getattr(error, "name", None) if isinstance(error, WorkflowError) else None
    return {
        "module": cls.__module__,
        "class": cls.__qualname__,
        "name": label if isinstance(label, str) else cls.__name__,
        "message": message,
        "args": kept.pop("args", [message]),
        "attributes": kept,
        "members": [_describe(member) for member in members],
    }


def _is_slot(cls: type, name: str) -> bool:
    if name.startswith("__") or (cls, name) == (AttributeError, "obj"):  # which pickle drops, too
        return False
    slot = vars(cls)[name]
    return inspect.ismemberdescriptor(slot) or inspect.isgetsetdescriptor(slot)


def rebuild_error(record: dict[str, Any]) -> Exception:
    """The error that `encode_error` described, with its own class if that is an `Exception` which
    is already imported; else a `WorkflowError` with its name."""
    found: Any = sys.modules.get(record["module"])
    for part in record["class"].split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        return WorkflowError(record["message"], name=record["name"])
    # The nearest built-in base keeps the args; the class's own `__init__` is not called.
    native: Any = next(base for base in found.__mro__ if base.__module__ == "builtins")
    members = [rebuild_error(member) for member in record["members"]]
    args = (record["message"], members) if members else tuple(record["args"])
    try:
        error: Exception = native.__new__(found, *args)
        native.__init__(error, *args)
    except Exception:  # args of another version of the class: keep what can be kept
        error = found.__new__(found)
        error.args = (record["message"],)
    for name, value in record["attributes"].items():
        try:
            object.__setattr__(error, name, value)
        except AttributeError:  # a property without a setter
            error.__dict__[name] = value
    return error


# --------------------------------------------------------------------------------------------------
# Limits: what Cloudflare's plans allow, each enforced where it applies, with an error that names
# it.


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine allows; None lifts a limit. The default is the paid plan without its creation
    rate, which is an account's quota. Times are milliseconds; 1 MB is 10⁶ bytes, 1 MiB 2²⁰.

    developers.cloudflare.com/workflows/reference/limits/"""

    cpu_ms: int | None = 30_000
    step_bytes: int | None = 2**20
    payload_bytes: int | None = 2**20
    instance_bytes: int | None = 10**9
    max_sleep: int = _YEAR
    steps: int = 1024
    running: int | None = 10_000
    creations_per_second: int | None = None
    queued: int | None = 1_000_000
    batch: int = 100
    id_length: int = 100
    success_retention: int | None = 30 * _UNITS["day"]
    error_retention: int | None = 30 * _UNITS["day"]

    _needed = {"max_sleep", "steps", "batch", "id_length"}  # can't be lifted

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            lifted = value is None and name not in self._needed
            if not lifted and (type(value) is not int or value < 0):
                raise ValueError(f"Limits.{name} is {_show(value)}: expected a whole number from 0")
        if self.steps > 25_000 or self.max_sleep > _YEAR:
            raise ValueError("Limits: steps is at most 25,000 and max_sleep at most 365 days")

    FREE: ClassVar[Limits]
    PAID: ClassVar[Limits]
    UNLIMITED: ClassVar[Limits]


Limits.PAID = Limits(creations_per_second=100)
_FREE: dict[str, int] = {"cpu_ms": 10, "instance_bytes": 10**8, "running": 25, "queued": 100_000}
_FREE |= dict.fromkeys(("success_retention", "error_retention"), 3 * _UNITS["day"])
Limits.FREE = dataclasses.replace(Limits.PAID, **_FREE)
_LIFTED: dict[str, Any] = dict.fromkeys(vars(Limits()).keys() - Limits._needed)
Limits.UNLIMITED = Limits(steps=25_000, **_LIFTED)

_OVER = {"payload_bytes": "limit.event_payload", "step_bytes": "limit.step_output"}


def checked(
    value: Any,
    what: str,
    code: str,
    limits: Limits = Limits.UNLIMITED,
    limit: str = "step_bytes",
    refuse: Refuse = _refusal,
) -> tuple[str, Any]:
    """What `encode` gives; a refusal with that code if the value can't be stored, or if it takes
    more bytes than the limit of that name."""
    try:
        text, fresh = encode(value)
    except _Unserializable as bad:
        raise refuse(code, f"{what} can't be stored: {bad}") from None
    size, most = size_of(text), getattr(limits, limit)
    if most is not None and size > most:
        raise refuse(_OVER[limit], f"{what} has {size} bytes: at most {most} (limit {limit})")
    return text, fresh


# --------------------------------------------------------------------------------------------------
# Retry: a step's configuration, and how long it waits before it tries again.

_RETRIES: dict[str, Any] = {"limit": 5, "delay": 10_000, "backoff": "exponential"}
DEFAULT_CONFIG: dict[str, Any] = {"retries": _RETRIES, "timeout": "10 minutes"}
_config_to_json = json.JSONEncoder(default=parse_duration).encode  # with infinity
_BACKOFF: dict[str, Callable[[int], int]] = {
    "constant": lambda attempts: 1,
    "linear": lambda attempts: attempts,
    "exponential": lambda attempts: 2 ** min(attempts - 1, 64),
}


class StepConfig:
    """A step's checked configuration. `raw` is what the user wrote, with the defaults merged in
    (without a delay that is a function); `text` is what is stored: that, and the same for the
    rollback handler, if there is one.

    `limit` counts retries, as Cloudflare's engine does: `limit: 5` is at most 6 attempts.
    developers.cloudflare.com/workflows/build/sleeping-and-retrying/"""

    def __init__(
        self, config: Any, max_sleep: int = _YEAR, undo: Any = None, what: str = "config"
    ) -> None:
        given = _options({} if config is None else config, [*DEFAULT_CONFIG, "sensitive"], what)
        retries = _RETRIES | _options(given.get("retries", {}), [*_RETRIES], f"{what}['retries']")
        merged = DEFAULT_CONFIG | given | {"retries": retries}
        limit, delay, backoff = retries.values()
        self.limit: float = limit
        self.delay: Any = delay if callable(delay) else _config_ms(retries, "delay", what)
        self.timeout = _config_ms(merged, "timeout", what)
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        whole = number and limit >= 0 and limit in (math.inf, limit // 1)
        for legal, part, key, expected in (
            (whole, retries, "limit", "0, 1, 2, … or inf"),
            (backoff in list(_BACKOFF), retries, "backoff", f"one of {', '.join(_BACKOFF)}"),
            (0 < self.timeout <= max_sleep, merged, "timeout", f"over 0 and up to {max_sleep} ms"),
            (given.get("sensitive", "output") == "output", merged, "sensitive", "'output'"),
        ):
            if not legal:
                raise ValueError(f"{what} key {key!r}: {_show(part[key])}: expected {expected}")
        self.backoff = _BACKOFF[backoff]
        if callable(delay):
            del retries["delay"]
        stored = {"config": merged}
        if undo is not None:
            stored["rollback"] = StepConfig(undo, max_sleep, None, "rollbackConfig").raw
        text = _config_to_json(stored)
        self.text = "" if stored == {"config": DEFAULT_CONFIG} else text  # which most steps have
        self.raw: dict[str, Any] = json.loads(text)["config"]  # as it is in every life

    @classmethod
    def load(cls, text: str, given: Any = None, undo: bool = False) -> StepConfig:
        """The configuration that a step was started with, or that of its rollback handler. A
        function for a delay is not stored: it is that of the present call."""
        if not text:
            return _DEFAULT_CONFIG
        config = json.loads(text)["rollback" if undo else "config"]
        config["retries"].setdefault("delay", _gone if given is None else cls(given).delay)
        return cls(config)


def _gone(_: WorkflowDelayContext) -> NoReturn:
    raise LookupError("config['retries']['delay'] is no function any more")


def _config_ms(part: Mapping[str, Any], key: str, what: str) -> int:
    try:
        return parse_duration(part[key])
    except ValueError as error:
        raise ValueError(f"{what} key {key!r}: {error}") from None


def _options(given: Mapping[str, Any], known: Sequence[str], what: str) -> dict[str, Any]:
    """A copy of an options object in which every key is known."""
    keys = ", ".join(known)
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} is {type(given).__name__}: expected a dict with {keys}")
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{what} has the unknown key {_show(unknown[0])}: expected {keys}")
    return dict(given)


_DEFAULT_CONFIG = StepConfig(None)
_ASKING = StepConfig({"timeout": 5000})  # how long a delay function may take to answer

# --------------------------------------------------------------------------------------------------
# Journal: what a recorded history means. The journal of an instance is append-only; its rows are
# the only thing that a replay knows. These functions are pure: they read rows and touch nothing
# else.
#
# An instance is in memory only from time to time; each of these stays is a life (see "Run"), and
# what a life does is recorded as it happens:
#
#     type                               step    what happened
#     queued started running waiting     –       the instance changed its status; the first row
#       waitingForPause paused complete          of all, `queued`, holds the params, `complete`
#       errored terminated                       the output, `errored` the error; after a rollback
#                                                `extra` says how that went: null, or what failed
#     start                              do      an attempt began
#     done | failed | error              do      it ended: a result, a failure with a retry to
#                                                follow, one for good. Without a `start` row,
#                                                it has the time of its start. A step's first
#                                                row has its config in `extra`
#     sleep → slept                      sleep   sleep_until is a sleep too
#     wait → event | timeout             wait    the event is consumed in this very row
#     cancel                             any     `run` itself cancelled the call: never again
#     stop                               any     interrupted by a clean stop or a restart, or
#                                                broken off by the callback around it: as if
#                                                not begun
#     due                                do      its retry delay is over
#     sent                               –       an event was put into the instance's buffer
#     rollback                           –       `run` has failed, or is told to roll back: from
#                                                here on only handlers run; the error that
#                                                started it
#
# A step's key is its kind, name and count, behind the key of the step whose callback calls it. A
# rollback handler is a step too: of kind "rollback", with the key of its `do` step behind that.


class Row(NamedTuple):
    """One journal row. `at` and `started` are moments, `data` and `extra` JSON."""

    seq: int
    at: int
    type: str
    step: str | None
    attempt: int | None
    started: int | None
    data: str | None
    extra: str | None


RowTail = tuple[str, str | None, int | None, int | None, str | None, str | None]  # Row from `type`
STEP_KINDS = ("do", "sleep", "wait_for_event")
ROLLBACK = "rollback\n"  # what the key of a rollback handler begins with
SEPARATOR = "\n"  # between the parts of a key: names hold no control characters


def step_label(key: str | None) -> str:
    """`<name>-<count>`, as Cloudflare shows a step."""
    return "-".join((key or "").split(SEPARATOR)[-2:])


# Slots, here and elsewhere: what there are many of costs the garbage collector time.
@dataclasses.dataclass(slots=True, eq=False)
class Step:
    """What is known of one step: recorded facts, and while its run lives, who waits for it."""

    key: str
    state: str = "new"  # → pending → done | error | cancelled
    attempts: int = 0
    open: bool = False  # an attempt of an earlier life, or of a cancelled call, has no end
    waiting: bool = False  # in a sleep, an event wait or a retry delay
    config: str | None = None
    data: str | None = None
    extra: str | None = None
    # In this life:
    called: bool = False
    queued: bool = False  # its result has not been handed to `run` yet
    waiter: asyncio.Future[None] | None = None  # done when the call in `task` may go on
    task: asyncio.Task[Any] | None = None
    freed: asyncio.Future[None] | None = None  # done when that call has ended
    alone: bool = False  # nothing else of the run was under way when its call began to wait
    running: Attempt | None = None  # until its end is committed
    fresh: Any = None  # its value or error itself, if made in this life

    @property
    def nested(self) -> bool:
        """Whether a step's callback has called it, or it is a rollback handler: its result doesn't
        go to `run`, and need not wait for a turn."""
        return self.key.count(SEPARATOR) > 2


_ENDS = {"done": "done", "slept": "done", "event": "done", "error": "error", "timeout": "error"}


def apply(steps: dict[str, Step], row: RowTail) -> Step | None:
    """Takes one row into account; returns the step if the row is its result, or its cancellation:
    `run` must cancel it again before it gets what was recorded later."""
    type, key, attempt, _, data, extra = row
    if key is None:
        return None
    if (step := steps.get(key)) is None:
        step = steps[key] = Step(key)
    live = step.state in ("new", "pending")  # the first end counts
    step.waiting = type in ("sleep", "wait", "failed")
    if attempt is not None:
        step.attempts = attempt
        if step.config is None:
            step.config = extra or ""  # "": the defaults
    if type == "stop":
        step.attempts -= step.open
        step.open = False
        if step.config is None:
            del steps[key]  # a wait, or an attempt that had not even begun
    elif type == "cancel":
        step.state, step.open, step.queued = "cancelled", False, not step.nested
        return step
    elif live:
        step.state, step.open = _ENDS.get(type, "pending"), type == "start"
        if type in _ENDS:
            step.data, step.extra, step.queued = data, extra, not step.nested
            return step
    return None


def fold(rows: Iterable[Row]) -> tuple[dict[str, Step], deque[Step]]:
    """The steps of a history, and those that have a result or were cancelled, in the order in which
    `run` gets that."""
    steps: dict[str, Step] = {}
    inbox: dict[str, Step] = {}
    for row in rows:
        if (step := apply(steps, row[2:])) and step.queued:
            inbox.pop(step.key, None)  # one that was cancelled when it had a result
            inbox[step.key] = step
    return steps, deque(inbox.values())


def cut(rows: Sequence[Row], name: str, count: int, kind: str | None) -> list[Row]:
    """What is left of a history when it begins again from a step: what began before that. (Nothing,
    if there is no such step.) What `run` cancelled later begins anew: the reason may be gone."""
    began = {row.step: row.seq for row in reversed(rows)}  # the rows with which steps began
    keys = [SEPARATOR.join((kind, name, str(count))) for kind in ([kind] if kind else STEP_KINDS)]
    first = next((began[key] for key in keys if key in began), 0)
    began |= {row.step: row.seq for row in rows if row.type == "cancel"}
    return [row for row in rows if (began[row.step] if row.step else row.seq) < first]


_STATUSES = "queued started running waiting waiting_for_pause paused errored terminated"
# By a row's type: the events that it is shown as, beside the beginnings that it implies.
_TOLD = {_camel(status): [f"workflow_{status}"] for status in _STATUSES.split()}
_TOLD |= {"complete": ["workflow_completed"], "rollback": ["rollback_started"]}
_TOLD |= {"start": ["attempt_started"], "done": ["attempt_completed", "step_completed"]}
_TOLD |= {"failed": ["attempt_errored"], "error": ["attempt_errored", "step_errored"]}
_TOLD |= {"sleep": ["sleep_started"], "slept": ["sleep_completed"]}
_TOLD |= {"wait": ["wait_started"], "event": ["wait_completed"], "timeout": ["wait_timed_out"]}
EVENT_TYPES = {"step_started", "rollback_completed", "rollback_errored"}.union(*_TOLD.values())
EVENT_TYPES |= {f"rollback_{t}" for t in EVENT_TYPES if t.startswith(("step_", "attempt_"))}


class History:
    """Shows journal rows as the events of `subscribe`: one or more for a row, none for the
    engine's own affairs. Their ids grow in journal order."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._configs: dict[str | None, str] = {}  # of the steps that have begun

    def events(self, row: Row) -> list[WorkflowHistoryEvent]:
        """What the next row is shown as: rows come in order, from the first."""
        types = list(_TOLD.get(row.type, ()))
        if row.started is not None:
            types.insert(0, "attempt_started")
        if row.step is None and row.extra is not None:  # how the rollback went
            types.insert(0, "rollback_completed" if row.extra == "null" else "rollback_errored")
        elif row.attempt is not None and row.extra is not None:
            types.insert(0, "step_started")
            self._configs[row.step] = row.extra
        if row.step is not None and row.step.startswith(ROLLBACK):
            types = [f"rollback_{type}" for type in types]
        data = None if row.data is None else decode(row.data)
        return [self._event(row, type, n, data) for n, type in enumerate(types)]

    def _event(self, row: Row, type: str, n: int, data: Any) -> WorkflowHistoryEvent:
        began = row.started if row.started is not None and type.endswith("_started") else row.at
        event = WorkflowHistoryEvent(type=type, event_id=row.seq * 10 + n)
        event |= {"timestamp": _to_datetime(began), "instance_id": self._instance_id}
        if row.step is not None:
            event["step_name"] = step_label(row.step)
        if "attempt_" in type:
            event["attempt"] = row.attempt
        if type in ("workflow_completed", "wait_completed") or type.endswith("step_completed"):
            sensitive = '"sensitive"' in self._configs.get(row.step, "")
            event["output"] = "[REDACTED]" if sensitive else data
        if type.endswith(("_errored", "timed_out")) or type == "rollback_started":
            event["error"] = _brief(decode(row.extra or "") if type == "rollback_errored" else data)
        if type.endswith("attempt_errored"):
            event["retry_delay_ms"] = data.get("retry_delay_ms")
        if type == "sleep_started":
            event["duration_ms"] = data
        if type == "wait_started":
            event["event_type"] = data["type"]
        return event


def _brief(error: dict[str, Any]) -> dict[str, str]:
    """What users see of a recorded error."""
    return {"name": error["name"], "message": error["message"]}


class Wait(NamedTuple):
    """Something an instance waits for: the end of a sleep or of a retry delay (`event` is None), or
    an event of that type until `due`. `kind` is "sleep", "retry" or "wait"."""

    seq: int
    at: int
    kind: str
    step: str
    event: str | None
    due: int


def end_waits(
    waits: Iterable[Wait], events: Mapping[str | None, Sequence[tuple[int, int]]], now: int
) -> list[tuple[int, Wait, tuple[int, int] | None]]:
    """Which waits have ended by now, in the order in which they did, however late we look, as
    (moment, wait, (seq, at) of the buffered event that ends it): the oldest event that came at or
    before the deadline of the first waiter of its type is that waiter's."""
    buffered = {type: deque(queue) for type, queue in events.items()}
    ended: list[tuple[int, Wait, tuple[int, int] | None]] = []
    for wait in waits:
        mine = buffered.get(wait.event)
        if mine and mine[0][1] <= wait.due:
            event = mine.popleft()
            ended.append((max(event[1], wait.at), wait, event))
        elif wait.due <= now:
            ended.append((wait.due, wait, None))
    return sorted(ended, key=lambda end: (end[0], end[1].seq))


# --------------------------------------------------------------------------------------------------
# Store: all SQL, and the one thread that speaks it.
#
# Callers hand operations to the writer thread. It takes everything that is queued, runs it in one
# transaction, commits once, and only then resolves the callers (group commit): what a caller has
# seen is on disk. An operation checks first and writes last, so that one that refuses leaves no
# trace; any error of SQLite itself undoes the whole batch and stops the engine.
#
# One process, the owner, runs the instances; all others are clients (`_contend` decides).
#
# The rows are the truth; nobody's memory is. `status` and `generation` guard every write of a run,
# and `wake` says when the owner must look at an instance: something falls due, a caller changed it,
# or it has expired. So waiting, recovery, retention and news from other processes are one index
# scan, made in the same transaction as the batch that caused it, and its cost depends on what is
# due, not on what is there. Only `queued` instances are found otherwise: by their place in the
# queue.
#
# Operations change instances in memory (`_change`), and what they have changed is written before
# the commit, many rows in one statement. Steps only append to the journal, whose newest row says
# how large the instance's state is by now. So a step costs one row.

APPLICATION_ID = 0x57664C77  # "WfLw"
_SCHEMA = (  # by version: what leads to it from the one before
    """
CREATE TABLE workflows (           -- the bound names, for clients without the classes
    key INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, binding TEXT NOT NULL, class TEXT NOT NULL,
    script TEXT, steps INTEGER, created INTEGER NOT NULL, modified INTEGER NOT NULL);
CREATE TABLE instances (           -- its columns are those of `Instance`
    key INTEGER PRIMARY KEY AUTOINCREMENT, workflow INTEGER NOT NULL,
    id TEXT,                       -- NULL once deleted, until the owner has cleared it away
    trigger TEXT NOT NULL, created INTEGER NOT NULL,
    success_retention INTEGER, error_retention INTEGER,
    status TEXT NOT NULL,
    place INTEGER,                 -- in the queue; of a paused one, where it goes back to. A new
                                   -- one has its key, a restarted one the next number after that
    generation INTEGER NOT NULL,   -- raised by restart, rollback, terminate, delete
    careful INTEGER NOT NULL,      -- its process died: commit each start before the callback
    wake INTEGER,                  -- when the owner must look
    started INTEGER, ended INTEGER, paused INTEGER,
    termination TEXT,              -- who has terminated it
    rollback TEXT,                 -- begun, complete or failed
    UNIQUE (workflow, id));
CREATE INDEX queue ON instances (workflow, status, place);
CREATE INDEX due ON instances (workflow, wake) WHERE wake IS NOT NULL;
CREATE TABLE journal (
    instance INTEGER NOT NULL, seq INTEGER NOT NULL,
    state INTEGER NOT NULL,        -- bytes of params, outputs and buffered events, as of this row
    at INTEGER NOT NULL, type TEXT NOT NULL, step TEXT, attempt INTEGER, started INTEGER,
    data TEXT, extra TEXT,
    PRIMARY KEY (instance, seq)) WITHOUT ROWID;
CREATE TABLE waits (               -- with the number of their journal rows, like events
    instance INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL, kind TEXT NOT NULL,
    step TEXT NOT NULL, event TEXT, due INTEGER NOT NULL,
    fixed INTEGER NOT NULL,        -- a pause does not move `due` (sleep_until)
    PRIMARY KEY (instance, seq)) WITHOUT ROWID;
CREATE TABLE events (
    instance INTEGER NOT NULL, type TEXT NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL,
    payload TEXT NOT NULL,
    PRIMARY KEY (instance, type, seq)) WITHOUT ROWID;
CREATE TABLE usage (
    month TEXT PRIMARY KEY, requests INTEGER, cpu_ms REAL, storage_bytes INTEGER) WITHOUT ROWID;
""",
)

SCHEMA_VERSION = len(_SCHEMA)
TICK = 0.05  # seconds between looks at what other processes did
BATCH = 256  # instances that one transaction wakes at most
WOKEN = -(2**53)  # added to a place: ahead of those that never started


class Instance(NamedTuple):
    """A row of `instances`: what it was created with; from `status` on, what changes."""

    key: int
    workflow: int
    id: str | None
    trigger: str
    created: int
    success_retention: int | None
    error_retention: int | None
    status: str
    place: int | None
    generation: int = 1
    careful: int = 0
    wake: int | None = None
    started: int | None = None
    ended: int | None = None
    paused: int | None = None
    termination: str | None = None
    rollback: str | None = None
    # Not in the table, but of its newest journal row:
    seq: int = 0
    state: int = 0

    def expiry(self) -> int | None:
        """When a finished instance is deleted."""
        kept = self.success_retention if self.status == "complete" else self.error_retention
        return None if self.ended is None or kept is None else self.ended + kept

    def is_over(self, now: int) -> bool:
        """Whether nobody may see it any more: it is deleted, or has expired."""
        expiry = self.expiry()
        return self.id is None or (expiry is not None and expiry <= now)


# Of an `Instance`: what changes, and what is read.
_CHANGES = ", ".join(f"{name} = excluded.{name}" for name in Instance._fields[7:-2])
_NEWEST = "FROM journal WHERE instance = key ORDER BY seq DESC LIMIT 1"
_NEWER = (f"(SELECT {name} {_NEWEST})" for name in Instance._fields[-2:])
_READ = ", ".join((*Instance._fields[:-2], *_NEWER))
_MONTH = "strftime('%Y-%m', ? / 1000, 'unixepoch')"
_AMONG = "IN (SELECT value FROM json_each(?))"
_OF = "workflow = (SELECT key FROM workflows WHERE name = ?)"
LIVE = ("running", "waiting", "queued", "waitingForPause")  # in these a run may write


def _row(
    type: str, step: str | None = None, data: str | None = None, extra: str | None = None
) -> RowTail:
    return type, step, None, None, data, extra


class News(NamedTuple):
    """What the writer tells the engine about one instance; `rows` is what a live run hasn't seen,
    `admitted` that a life must be loaded: it has got a slot, or its rollback begins."""

    instance: Instance
    rows: list[Row]
    admitted: bool = False


Topic = int | str  # what is watched: a key for the end of that instance, an id for all its rows
Then = Callable[[Any, BaseException | None], None]  # gets an operation's result or refusal
Op = tuple[Callable[..., Any], tuple[Any, ...], Then]
Entry = tuple[str, str, int | None, int | None]  # id, params, retention of success and of errors


class Store:
    """The database, as seen from its own thread. After each commit `deliver(results, news,
    touched)` is called on the loop, with None for `touched` when another process wrote: then there
    may be news on anything. When storage fails, it is `broke(error, callbacks)`."""

    def __init__(
        self, path: str, clock: Clock, limits: Limits, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.path, self.clock, self.limits, self.loop = path, clock, limits, loop
        self.deliver: Callable[[list[Any], list[News], set[Topic] | None], None]
        self.broke: Callable[[BaseException, list[Any]], None]
        self.ops: queue.SimpleQueue[Op | None] = queue.SimpleQueue()
        self.pending = 0  # operations whose results have not been delivered; the loop's count
        self.failure: BaseException | None = None
        self.closing = False  # nothing new begins
        self.owner = False
        self.bound: dict[int, str] = {}  # workflow key → name
        self.introspections: list[WorkflowInstanceModifier] = []  # open blocks: see "Test tools"
        self.next_wake: float = math.inf  # nothing is due before
        self._inherited: set[int] = set()  # workflows whose last owner may have left something
        self._look_again = False  # something may be due, or a slot free
        self._woken: list[int] = []  # by this transaction; they may have found no free slot
        self._others_wrote = False  # another process wrote
        self._rows: list[tuple[Any, ...]] = []  # journal rows of this transaction, not yet written
        # Instances, until the next tick or until another process has written; and which of them
        # must be written before the commit.
        self._present: dict[int, Instance] = {}
        self._changed: set[int] = set()
        self._touched: set[Topic] = set()
        self._news: list[News] = []
        self.cpu_ns = 0  # of all callbacks so far; the loop's count
        self._requests = self._storage = self._cpu_counted = 0  # what usage must still be told
        self._room = 0  # so many may be created before the queue must be counted again
        self._answered = threading.Semaphore(0)  # counts operations, for an exact clock
        self._warned: set[str] = set()
        self._version = 0  # of the data, as of our last look
        self._looked = self._checked = time.monotonic()

    # -- the thread

    def start(self) -> asyncio.Future[None]:
        """Opens the database in a new thread; the future fails if that is refused."""
        opened: asyncio.Future[None] = self.loop.create_future()
        self.closed: asyncio.Future[None] = self.loop.create_future()
        self.thread = threading.Thread(target=self._main, args=(opened,), daemon=True)
        self.thread.start()
        return opened

    def post(self, op: Callable[..., Any], *args: Any, then: Then) -> None:
        """Queues an operation; `then(result, error)` runs on the loop once it is committed."""
        self.pending += 1
        self.ops.put((op, args, then))
        if self.clock.exact:
            self._answered.acquire(timeout=10)

    def nothing(self) -> None:
        """An operation that is done when all before it are."""

    def _main(self, opened: asyncio.Future[None]) -> None:
        try:
            self._open()
            self._tell(_resolve, opened)
            self._work()
        except Exception as error:
            self._tell(_resolve, opened, None, _storage_error(self.path, error))
        finally:
            self._close()
            self._tell(_resolve, self.closed)

    def _tell(self, callback: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, and the engine forgotten
            self.loop.call_soon_threadsafe(callback, *args)

    def _work(self) -> None:
        stop = False
        while not (stop or self.loop.is_closed()):
            batch, stop = self._gather()
            asked = len(batch)
            try:
                if self.failure is None:
                    self._turn(batch)
                elif batch:
                    self._tell(self.broke, self.failure, [then for _, _, then in batch])
            except Exception as error:
                self._fail(error, [then for _, _, then in batch])
            if asked and self.clock.exact:
                self._answered.release(asked)

    def _gather(self) -> tuple[list[Op], bool]:
        """Everything that is queued; waits for it until the next tick or the next wake."""
        patience = TICK
        if self.owner:
            patience = max(0.0, min(TICK, (self.next_wake - self.clock.now()) / 1000))
        batch: list[Op] = []
        with contextlib.suppress(queue.Empty):
            while op := self.ops.get(timeout=0 if batch else patience):
                batch.append(op)
                if self.clock.exact:
                    return batch, False
            return batch, True
        return batch, False

    def _turn(self, batch: list[Op]) -> None:
        """One round of the thread: a transaction if there is reason for one, and the regular
        looks."""
        moment = time.monotonic()
        tick = not batch or moment > self._looked + TICK
        if tick:
            self._looked = moment
            self._present.clear()
            self._see_others()
        outside = tick and self._others_wrote  # not more often: those who hear it look, too
        if batch or outside or (self._is_due() and not self.clock.exact):
            self._transact(batch)
        if outside:
            self._others_wrote = False
            self._tell(self.deliver, [], [], None)
        if self.bound and not self.owner:
            self._contend()
        if moment > self._checked + 1:
            self._checked = moment
            self._look_around()

    def _is_due(self) -> bool:
        soon = self._look_again or self.next_wake <= self.clock.now()
        return self.owner and soon and not self.closing

    def _see_others(self) -> None:
        """If another process wrote, what is in memory is worth nothing."""
        version, ((self._version,),) = self._version, self._insist("PRAGMA data_version")
        if version != self._version:
            self._others_wrote = self._look_again = True
            self._present.clear()

    def _transact(self, batch: list[Op]) -> None:
        results: list[Any] = []
        self._insist("BEGIN IMMEDIATE")
        self._see_others()
        # All that the operations of runs need (they begin with a key), in one query.
        self._read([args[0] for _, args, _ in batch if args and isinstance(args[0], int)])
        for op, args, then in batch:
            try:
                results.append((then, op(*args), None))
            except WorkflowError as refused:
                results.append((then, None, refused))
        if self._is_due():
            self._schedule()
        for inst in self._read([*dict.fromkeys(self._woken)]):
            if inst.status == "queued":  # it has to wait for a slot
                self._change(inst.key, [_row("queued")])
        self._woken.clear()
        self._write()
        self._count_usage()
        self._db.execute("COMMIT")
        batch.clear()  # committed: an error from here on must not reject them
        news, self._news = self._news, []
        touched, self._touched = self._touched, set()
        if results or news or touched:
            self._tell(self.deliver, results, news, touched)

    def _count_usage(self) -> None:
        cpu = self.cpu_ns
        if self._requests or self._storage or cpu != self._cpu_counted:
            sql = f"""INSERT INTO usage VALUES ({_MONTH}, ?, ?, ?) ON CONFLICT (month) DO UPDATE SET
                      requests = requests + excluded.requests, cpu_ms = cpu_ms + excluded.cpu_ms,
                      storage_bytes = storage_bytes + excluded.storage_bytes"""
            cpu_ms = (cpu - self._cpu_counted) / 1e6
            self._db.execute(sql, (self.clock.now(), self._requests, cpu_ms, self._storage))
            self._requests, self._storage, self._cpu_counted = 0, 0, cpu

    def usage(self) -> Any:
        """Requests and CPU time of this month, and the bytes that are stored now."""
        self._count_usage()
        sql = f"""SELECT sum(requests * (month = now)), sum(cpu_ms * (month = now)),
                  sum(storage_bytes) FROM usage, (SELECT {_MONTH} AS now)"""
        return [total or 0 for total in self._one(sql, self.clock.now())]

    def _insist(self, sql: str, *args: Any) -> list[Any]:
        """Waits for a lock that another process holds, but not for long without notice; SQLite's
        own way to wait sleeps too long to be fair, and gives up."""
        began = time.monotonic()
        while True:
            try:
                return self._db.execute(sql, args).fetchall()
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise
            if time.monotonic() > began + 5:
                began = math.inf
                log.warning("%s: another process has held a lock for 5 s; waiting", self.path)
            time.sleep(0.001)

    def _fail(self, error: BaseException, callbacks: list[Then]) -> None:
        """Storage failed: nothing of the batch is stored, and nothing more will be."""
        self.failure = _storage_error(self.path, error)
        log.critical("%s; the engine stops here", self.failure, exc_info=error)
        self._close()
        self._tell(self.broke, self.failure, callbacks)

    # -- the file

    def _open(self) -> None:
        if sqlite3.sqlite_version_info < (3, 35):  # UPDATE … RETURNING
            raise WorkflowInternalError(f"needs SQLite 3.35, and this is {sqlite3.sqlite_version}")
        memory = self.path == ":memory:"
        paths = [self.path, ":memory:" if memory else self.path + "-owner"]
        if not memory and os.path.exists(self.path) and os.path.getsize(self.path) > 0:
            # Refuses a file that isn't ours, without locks or side files. Through SQLite: closing a
            # plain file of our own would drop the locks that another engine of this process holds.
            uri = f"file:{urllib.parse.quote(self.path)}?mode=ro&immutable=1"
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as self._db:
                # Tolerates a broken schema: what a process that died inside a checkpoint left makes
                # sense only with its WAL, which is not read here.
                self._db.execute("PRAGMA writable_schema = ON")
                if self._one("PRAGMA application_id") != (APPLICATION_ID,):
                    raise WorkflowInternalError("not a database of this module")
                self._schema_version()
        self._db, self._lock = (sqlite3.connect(p, timeout=0, isolation_level=None) for p in paths)
        self._insist("PRAGMA synchronous = FULL")
        self._insist("PRAGMA fullfsync = 1")
        self._insist("BEGIN IMMEDIATE")
        version = self._schema_version()
        # In one transaction, and before WAL mode: so the main file always says whose it is.
        for script in _SCHEMA[version:]:
            for statement in script.split(";\n"):
                self._db.execute(statement)
        if version < SCHEMA_VERSION:
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._insist("COMMIT")
        if not memory and self._insist("PRAGMA journal_mode = WAL") != [("wal",)]:
            raise WorkflowInternalError("the file system does not support SQLite's WAL mode")
        self._files = {} if memory else {path: os.stat(path) for path in paths}

    def _schema_version(self) -> int:
        version: int = self._one("PRAGMA user_version")[0]
        if version > SCHEMA_VERSION:
            raise WorkflowInternalError(f"written by a newer version (schema {version})")
        return version

    def _close(self) -> None:
        self.owner = False
        with contextlib.suppress(AttributeError, sqlite3.Error):  # not open yet, or it failed
            self._lock.close()
            self._db.close()

    def _look_around(self) -> None:
        """The look once a second. SQLite goes on writing into a file that was removed or replaced,
        where nobody would read it; and the owner may be asked for what it can't do."""
        for path, was in self._files.items():
            if not (os.path.exists(path) and os.path.samestat(os.stat(path), was)):
                raise WorkflowInternalError(f"{path} was removed or replaced")
        if not self.owner:
            return
        sql = """SELECT key, name FROM workflows AS w WHERE
                 EXISTS (SELECT 1 FROM instances WHERE workflow = w.key AND status = 'queued')
                 OR EXISTS (SELECT 1 FROM instances WHERE workflow = w.key AND wake <= ?)"""
        for key, name in self._insist(sql, self.clock.now()):
            if key not in self.bound and name not in self._warned:
                self._warned.add(name)
                log.warning("%s: there is work for %r, which is not bound here", self.path, name)

    # -- the owner

    def _contend(self) -> None:
        """Tries to become the one that runs instances: the holder of an exclusive transaction on a
        second, empty database. A process that dies lets go of it on every platform."""
        try:
            self._lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if not _is_busy(error):
                raise
        else:
            self.owner = True
            self._transact([])

    # -- scheduling: what is due, and who may run

    def _schedule(self) -> None:
        """The owner's look at the database: everything whose `wake` has come, then the queue."""
        now = self.clock.now()
        self.requeue_all(self._inherited, careful=1)  # of an owner that died
        self._inherited.clear()
        due = self._of_bound("wake <= ? ORDER BY wake LIMIT ?", now, BATCH)
        if len(due) >= BATCH:  # so that a fresh one need not wait behind a million expired ones
            due += self._of_bound("wake <= ? ORDER BY wake DESC LIMIT ?", now, BATCH)
        for inst in dict.fromkeys(due):
            self._look_at(inst, now)
        self._admit()
        self.next_wake = min(self._each("min(wake)", "wake IS NOT NULL"), default=math.inf)

    def requeue_all(self, workflows: Iterable[int], **columns: Any) -> None:
        """For the next owner: what was running in a process that has ended, or is about to."""
        for workflow in workflows if self.owner else ():
            where = "workflow = ? AND status IN ('running', 'waitingForPause')"
            for inst in self._instances(where, workflow):
                self._requeue(self._change(inst.key, **columns))

    def _look_at(self, inst: Instance, now: int) -> None:
        rows: list[Row] = []
        due = inst.expiry()
        if inst.status in LIVE:
            # While a rollback runs, all other waits stand still: `restart` may need them.
            sql = f"""SELECT {", ".join(Wait._fields)} FROM waits
                      WHERE instance = ? AND (step LIKE '{ROLLBACK}%') = ? ORDER BY seq"""
            found = self._db.execute(sql, (inst.key, inst.rollback is not None))
            waits = [Wait._make(row) for row in found]
            rows = self._end_waits(inst, waits, now)
            ended = {row.step for row in rows}
            due = min((wait.due for wait in waits if wait.step not in ended), default=None)
            if rows and inst.status == "waiting":
                self._requests += 1
                self._requeue(inst)
        if inst.is_over(now):
            self._purge(inst)
        else:
            inst = self._change(inst.key, wake=due)
        # A rollback is another life: of a running instance, whose slot it keeps.
        begun = inst.status == "running" and inst.rollback == "begun"
        self._news.append(News(inst, rows, admitted=begun))

    def _end_waits(self, inst: Instance, waits: list[Wait], now: int) -> list[Row]:
        """Records the end of each wait that has ended; an event is consumed in the same
        transaction."""
        events = {}
        for type in {wait.event for wait in waits} - {None}:
            sql = "SELECT seq, at FROM events WHERE instance = ? AND type = ? ORDER BY seq LIMIT ?"
            events[type] = self._db.execute(sql, (inst.key, type, len(waits))).fetchall()
        rows = []
        for _, wait, event in end_waits(waits, events, now):
            where = (inst.key, wait.seq)
            self._db.execute("DELETE FROM waits WHERE instance = ? AND seq = ?", where)
            row = _row("due" if wait.kind == "retry" else "slept", wait.step)
            if event is not None:
                sql = "DELETE FROM events WHERE instance = ? AND seq = ? AND type = ? RETURNING *"
                *_, data = self._one(sql, inst.key, event[0], wait.event)
                extra = _to_json({"type": wait.event, "at": event[1], "seq": event[0]})
                row = _row("event", wait.step, data, extra)
            elif wait.event is not None:
                (began,) = self._journal(inst.key, "seq = ?", wait.seq)
                ms = json.loads(began.data or "")["timeout"]
                error = WorkflowTimeoutError(f"Execution timed out after {ms}ms")
                row = _row("timeout", wait.step, encode_error(error))
            seq = self._change(inst.key, [row]).seq
            rows.append(Row(seq, now, *row))
        return rows

    def _admit(self) -> None:
        """Gives free slots to the queue: woken instances first, then first come first served."""
        now = self.clock.now()
        queued = self._of_bound("status = 'queued' ORDER BY place, key LIMIT ?", BATCH)
        free = int(min(BATCH, self._free_slots())) if queued else 0
        queued.sort(key=lambda inst: (inst.place, inst.key))
        for inst in queued[:free]:
            first = inst.started is None
            row = _row("started" if first else "running")
            started = now if first else inst.started
            inst = self._change(inst.key, [row], status="running", place=None, started=started)
            for block in self.introspections if first else ():
                for event in block.events if block.covers(self.bound[inst.workflow], inst) else ():
                    inst = self._buffer(inst, *event)
            self._news.append(News(inst, [], True))
        self._look_again = free == BATCH <= len(queued)  # in the next transaction

    def _free_slots(self) -> float:
        taken = sum(self._each("count(*)", "status IN ('running', 'waitingForPause')"))
        return math.inf if self.limits.running is None else max(0, self.limits.running - taken)

    def _check_queue(self, new: int) -> None:
        """Refuses what would be queued beyond the limit. Counting takes time with a long queue, so
        that it is done again only when a tenth of the room is used up."""
        limit = self.limits.queued
        if limit is not None and new > self._room:
            room = limit + self._free_slots() - sum(self._each("count(*)", "status = 'queued'"))
            if new > room:
                what = f"more than {limit} instances would be queued (limit queued)"
                raise _refusal("limit.queued_instances", what)
            self._room = int(min(room, 10**9) - new) // 10 + new
        self._room -= new

    def _requeue(self, inst: Instance) -> None:
        """Puts an instance that has already run at its place in the queue, ahead of all new ones;
        one that was pausing goes there on `resume`."""
        now = self.clock.now()
        # Among those, first woken first: by when it fell due, not by when that was noticed.
        place = WOKEN + min(inst.wake or now, now) if inst.place is None else inst.place
        if inst.status == "waitingForPause":
            inst = self._move(inst.key, _row("paused"), paused=now, place=place, wake=None)
            self._news.append(News(inst, []))
        else:
            self._change(inst.key, status="queued", place=place)
            self._woken.append(inst.key)

    # -- building blocks

    def _one(self, sql: str, *args: Any) -> Any:
        (row,) = self._db.execute(sql, args).fetchall()
        return row

    def _instances(self, where: str, *args: Any) -> list[Instance]:
        """Brings instances into memory, in one row (see `_insert`)."""
        self._write()
        of = f"(SELECT * FROM instances WHERE {where})"
        sql = f"SELECT json_group_array(json_array({_READ})) FROM {of}"
        found = [Instance(*row) for row in json.loads(self._one(sql, *args)[0])]
        self._present.update((inst.key, inst) for inst in found)
        return found

    def _read(self, keys: Sequence[int]) -> list[Instance]:
        """These instances, as far as they exist."""
        if missing := [key for key in keys if key not in self._present]:
            self._instances(f"key {_AMONG}", str(missing))
        return [self._present[key] for key in keys if key in self._present]

    def _of_bound(self, where: str, *args: Any) -> list[Instance]:
        where = f"workflow = ? AND {where}"
        return [inst for workflow in self.bound for inst in self._instances(where, workflow, *args)]

    def _each(self, aggregate: str, where: str) -> list[int]:
        """An aggregate of instances for each bound workflow, if it isn't NULL."""
        self._write()
        sql = f"SELECT {aggregate} FROM instances WHERE workflow = ? AND {where}"
        values = [self._one(sql, workflow)[0] for workflow in self.bound]
        return [value for value in values if value is not None]

    def _find(self, workflow: str, ids: Sequence[str]) -> dict[str, Instance]:
        """The instances with these ids, except those that have expired: they are cleared away (and
        so never seen, however late the owner is)."""
        found = {}
        for inst in self._instances(f"{_OF} AND id {_AMONG}", workflow, _to_json(ids)):
            if inst.is_over(self.clock.now()):
                self._purge(inst)
            else:
                found[inst.id or ""] = inst
        return found

    def _mine(self, key: int, generation: int, *statuses: str) -> Instance | None:
        """The instance of a run (in memory by now), if that still is its, with such a status."""
        inst = self._present.get(key)
        if inst is None or inst.generation != generation:
            return None
        return inst if inst.status in (statuses or LIVE) else None

    def _journal(self, key: int, where: str = "true ORDER BY seq", *args: Any) -> list[Row]:
        self._write()
        sql = f"SELECT {', '.join(Row._fields)} FROM journal WHERE instance = ? AND {where}"
        return [Row._make(row) for row in self._db.execute(sql, (key, *args))]

    def _change(
        self, key: int, rows: Sequence[RowTail] = (), size: int = 0, **columns: Any
    ) -> Instance:
        """Appends journal rows, and changes columns of the instance with them; in memory."""
        was, now = self._present[key], self.clock.now()
        state = was.state + size
        self._storage += size
        inst = Instance._make((*was[:-2], was.seq + len(rows), state))  # faster than `_replace`
        if columns:
            inst = inst._replace(**columns)
            self._changed.add(key)
            self.next_wake = min(self.next_wake, math.inf if inst.wake is None else inst.wake)
            self._look_again = self._look_again or "status" in columns
        self._present[key] = inst
        for n, row in enumerate(rows, was.seq + 1):
            self._rows.append((key, n, state, now, *row))
        if rows:
            self._touched.add(was.id or "")
            if rows[-1][0] in FINISHED:
                self._touched.add(key)
        return inst

    def _move(self, key: int, row: RowTail, size: int = 0, **columns: Any) -> Instance:
        """Changes the status to what the row says."""
        if row[0] in FINISHED:
            ended = self._present[key]._replace(status=row[0], ended=self.clock.now())
            columns = {"ended": ended.ended, "wake": ended.expiry(), "place": None} | columns
        return self._change(key, [row], size, status=row[0], **columns)

    def _write(self) -> None:
        """Writes what has changed: before a query, and before the commit."""
        rows, self._rows = self._rows, []
        self._insert("journal", rows)
        changed = [self._present[key][:-2] for key in self._changed]
        self._changed.clear()
        self._insert("instances", changed, f" ON CONFLICT (key) DO UPDATE SET {_CHANGES}")

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]], after: str = "") -> None:
        """Few statements for many rows: at each, this thread lets the loop's thread run, and must
        then wait for its turn."""
        for n in range(0, len(rows), 32):
            part = rows[n : n + 32]
            values = ", ".join([f"(?{', ?' * (len(rows[0]) - 1)})"] * len(part))
            args = [value for row in part for value in row]
            self._db.execute(f"INSERT INTO {table} VALUES {values}{after}", args)

    def _purge(self, inst: Instance) -> None:
        """Clears away an instance and all its rows."""
        self._write()
        self._storage -= self._present.pop(inst.key).state
        for table in ("journal", "waits", "events"):
            self._db.execute(f"DELETE FROM {table} WHERE instance = ?", (inst.key,))
        self._db.execute("DELETE FROM instances WHERE key = ?", (inst.key,))

    def _buffer(self, inst: Instance, type: str, payload: str) -> Instance:
        """Adds an event to those that the instance has not consumed."""
        now = self.clock.now()
        inst = self._change(inst.key, [_row("sent")], size_of(payload), wake=now)
        self._insert("events", [(inst.key, type, inst.seq, now, payload)])
        return inst

    def _check_state(self, present: int, size: int, refuse: Refuse) -> None:
        limit = self.limits.instance_bytes
        if size and limit is not None and present + size > limit:
            what = f"the instance's state would exceed {limit} bytes (limit instance_bytes)"
            raise refuse("limit.instance_state", what)

    # -- operations of callers, in any process

    def define(self, name: str, binding: str, class_name: str, steps: int) -> None:
        """Records a bound name; from here on this process wants to own the database."""
        now = self.clock.now()
        sql = """INSERT INTO workflows (name, binding, class, steps, created, modified)
                 VALUES (?, ?, ?, ?, ?, ?)
                 ON CONFLICT (name) DO UPDATE SET binding = excluded.binding,
                 class = excluded.class, steps = excluded.steps, modified = excluded.modified
                 RETURNING key"""
        (key,) = self._one(sql, name, binding, class_name, steps, now, now)
        self.bound[key] = name
        self._inherited.add(key)
        self._look_again = True

    def create(self, workflow: str, entries: Sequence[Entry], trigger: str) -> list[str]:
        """Stores instances, in order; returns the ids of those that are new."""
        now = self.clock.now()
        (of,) = self._one("SELECT key FROM workflows WHERE name = ?", workflow)
        for _, params, *_ in entries:
            self._check_state(0, size_of(params), _refusal)
        taken = self._find(workflow, [entry[0] for entry in entries])
        self._check_queue(len({entry[0] for entry in entries} - taken.keys()))
        (key,) = self._one("SELECT coalesce(max(seq), 0) FROM sqlite_sequence")
        made = []
        for id, params, success, error in entries:
            if id not in taken:
                key += 1
                inst = Instance(key, of, id, trigger, now, success, error, "new", place=key)
                self._present[key] = taken[id] = inst
                made.append(id)
                self._move(key, _row("queued", None, params), size_of(params))
        self._requests += len(made)
        return made

    def which_changed(self, topics: list[Topic]) -> list[Topic]:
        """On which of these there may be news, when another process wrote."""
        self._write()
        sql = """SELECT asked.value FROM json_each(?) AS asked LEFT JOIN instances AS i
                 ON i.key = asked.value AND asked.type = 'integer'
                 WHERE i.id IS NULL OR i.ended IS NOT NULL"""
        return [topic for (topic,) in self._db.execute(sql, (_to_json(topics),))]

    def look(
        self, workflow: str, id: str, key: int, seen: int
    ) -> tuple[Instance | None, list[Row]]:
        """The instance with that id, if there is one, and its rows: only those after `seen`, if
        it still is the one with that key."""
        inst = self._find(workflow, [id]).get(id)
        if inst is None:
            return None, []
        seen = seen if inst.key == key else 0
        return inst, self._journal(inst.key, "seq > ? ORDER BY seq", seen)

    def created(self, workflow: str, after: int = 0) -> list[Instance]:
        """A workflow's instances with a key above `after`, oldest first."""
        return self._instances(f"{_OF} AND key > ? ORDER BY key", workflow, after)

    def mock_event(self, block: WorkflowInstanceModifier, type: str, payload: str) -> None:
        """Buffers an event for each instance of a block: now if it has started, else when it
        does."""
        block.events.append((type, payload))
        for inst in self._of_bound("started IS NOT NULL AND ended IS NULL AND id IS NOT NULL"):
            if block.covers(self.bound[inst.workflow], inst):
                self._buffer(inst, type, payload)

    def on(self, workflow: str, id: str, op: str, *args: Any) -> Any:
        """Carries out one of the next operations, on the instance with that id."""
        inst = self._find(workflow, [id]).get(id)
        if inst is None:
            raise _not_found(workflow, id)
        return getattr(self, op)(inst, *args)

    def status(self, inst: Instance) -> tuple[int, str, str | None]:
        """(key, status, data of the row that ended it)."""
        rows = self._journal(inst.key, "seq = ?", inst.seq) if inst.status in FINISHED else []
        return inst.key, inst.status, rows[0].data if rows else None

    def pause(self, inst: Instance) -> None:
        """At once, or when its run has nothing in flight any more; not during a rollback."""
        now = self.clock.now()
        if inst.rollback == "begun":
            return
        if inst.status == "running":
            self._move(inst.key, _row("waitingForPause"), wake=now)
        elif inst.status in ("waiting", "queued"):
            self._move(inst.key, _row("paused"), paused=now, wake=now)

    def resume(self, inst: Instance) -> None:
        """A paused one goes back to where it was: to its place in the queue, if it had one."""
        now = self.clock.now()
        if inst.status == "waitingForPause":
            self._move(inst.key, _row("running"), wake=now)
        elif inst.status == "paused":
            self._unpause(inst)
            row = _row("waiting" if inst.place is None else "queued")
            self._move(inst.key, row, paused=None, wake=now)

    def _unpause(self, inst: Instance) -> None:
        """What fell due before the pause, and wasn't noticed, stays due: only the rest stood
        still."""
        if inst.paused is not None:
            sql = "UPDATE waits SET due = due + ? WHERE instance = ? AND NOT fixed AND due > ?"
            self._db.execute(sql, (self.clock.now() - inst.paused, inst.key, inst.paused))

    def terminate(self, inst: Instance, source: str, rollback: bool = False) -> None:
        """At once; or, with a rollback that has anything to undo, at the end of that."""
        if inst.status in FINISHED:
            what = f"instance {inst.id!r} is {inst.status}: it can't be terminated any more"
            raise _refusal("instance.cannot_terminate", what)
        if rollback and inst.rollback == "begun" and inst.termination is None:
            self._change(inst.key, termination=source)  # by the one that is under way
            return
        ended: dict[str, Any] = {"termination": source, "generation": inst.generation + 1}
        ended["wake"] = self.clock.now()
        if inst.rollback == "begun":
            ended["rollback"] = "failed"
        if rollback:
            message = f"instance {inst.id!r} was terminated"
            error = WorkflowError(message, code="instance.terminated", name="Terminated")
            if self._roll_back(inst, encode_error(error), **ended):
                return
        self._move(inst.key, _row("terminated"), **ended)

    def _roll_back(self, inst: Instance, error: str, **columns: Any) -> bool:
        """Begins a rollback, if it hasn't begun, and a step that has started has a handler."""
        where = """attempt IS NOT NULL AND instr(extra, '"rollback":') LIMIT 1"""
        if inst.rollback is not None or not self._journal(inst.key, where):
            return False
        self._unpause(inst)
        columns |= {"rollback": "begun", "paused": None, "wake": self.clock.now()}
        row = _row("rollback", None, error)
        if inst.status in ("running", "waitingForPause"):
            self._change(inst.key, [row], status="running", **columns)
        else:
            self._requeue(self._change(inst.key, [row], **columns))
        return True

    def restart(self, inst: Instance, start: tuple[str, int, str | None] | None) -> None:
        """From the top, or from a step: then what started before that step is kept."""
        rows, kept = self._journal(inst.key), []
        fresh: dict[str, Any] = dict.fromkeys(("ended", "paused", "termination", "rollback"))
        if start is None:
            fresh["started"] = None
            self._db.execute("DELETE FROM events WHERE instance = ?", (inst.key,))
        elif not (kept := cut(rows, *start)):
            name, count, kind = start
            what = f"{kind or 'step'} {name!r} with count {count}"
            raise _refusal("instance.cannot_restart", f"instance {inst.id!r} has no {what}")
        for table in ("journal", "waits"):
            sql = f"DELETE FROM {table} WHERE instance = ? AND seq NOT {_AMONG}"
            self._db.execute(sql, (inst.key, str([row.seq for row in kept])))
        self._unpause(inst)
        # What it had in flight is as after a clean stop.
        steps = fold(kept)[0].values()
        stopped = [_row("stop", step.key) for step in steps if step.open]
        sql = "SELECT payload FROM events WHERE instance = ?"
        left = [rows[0].data, *(payload for (payload,) in self._db.execute(sql, (inst.key,)))]
        left += [step.data for step in steps if step.state == "done"]
        state = sum(size_of(text or "") for text in left)
        self._change(inst.key, stopped, state - inst.state)
        fresh |= {"generation": inst.generation + 1, "careful": 0, "wake": self.clock.now()}
        (fresh["place"],) = self._one("UPDATE sqlite_sequence SET seq = seq + 1 RETURNING seq")
        self._move(inst.key, _row("queued", None, None if kept else rows[0].data), **fresh)

    def delete(self, inst: Instance) -> None:
        """Frees the id; the owner clears the rest away when it has stopped the run."""
        gone: dict[str, Any] = {"id": None, "status": "terminated", "wake": self.clock.now()}
        self._change(inst.key, generation=inst.generation + 1, **gone)
        # (`_write` leaves ids alone: to write one costs an index, too.)
        self._db.execute("UPDATE instances SET id = NULL WHERE key = ?", (inst.key,))
        self._touched |= {inst.key, inst.id or ""}

    def delete_batch(self, workflow: str, ids: list[str]) -> dict[str, list[dict[str, Any]]]:
        """Cloudflare's answer: what was deleted and what was not, in the order of the ids."""
        known = self._find(workflow, ids)
        for inst in known.values():
            self.delete(inst)
        error = {"code": 10400, "message": "workflows.api.error.instance.not_found"}
        return {
            "deleted": [{"id": id} for id in ids if id in known],
            "errors": [{"id": id, **error} for id in ids if id not in known],
        }

    def send_event(self, inst: Instance, type: str, payload: str) -> None:
        """Buffers an event; the owner's next look, usually in this very transaction, delivers
        it."""
        if inst.status in FINISHED:
            what = f"instance {inst.id!r} is {inst.status}: it takes no more events"
            raise _refusal("instance.not_running", what)
        self._check_state(inst.state, size_of(payload), _refusal)
        self._buffer(inst, type, payload)

    # -- operations of a run: each is guarded, and does nothing for an outdated run. The answer None
    #    ends a life. A run whose instance was running when its process died is `careful`: it
    #    commits each start before the callback, until one more step has finished, so that a step
    #    which kills its process is noticed.

    def load(self, lives: list[Instance]) -> list[tuple[Instance, list[Row], str]]:
        """What lives begin with: the instance, its whole journal (in one query), and the workflow's
        name. Those that are outdated are left out."""
        loaded = []
        self._read([life.key for life in lives])
        for life in lives:
            if inst := self._mine(life.key, life.generation, "running", "waitingForPause"):
                loaded.append((inst, self._journal(inst.key), self.bound[inst.workflow]))
        return loaded

    def record(
        self, key: int, generation: int, rows: list[RowTail], size: int = 0, wait: Any = None
    ) -> int | None:
        """Appends what a run did, and what it waits for from then on: the end of a sleep or of a
        retry delay, or an event. This is the hot path."""
        inst = self._mine(key, generation)
        if inst is None:
            return None
        self._check_state(inst.state, size, _fatal)
        columns: dict[str, Any] = {}
        if inst.careful and any(type in ("done", "error") for type, *_ in rows):
            columns["careful"] = 0
        if wait is not None:
            _, _, event, due, _ = wait
            now = self.clock.now()
            look = due if event is None else now  # its event may be here already
            columns["wake"] = look if inst.wake is None else min(look, inst.wake)
        seq = self._change(key, rows, size, **columns).seq
        if wait is not None:
            self._insert("waits", [(key, seq, now, *wait)])
        return seq

    def give_up(self, key: int, generation: int, kind: str, steps: Sequence[str]) -> int | None:
        """Records that calls were cancelled or interrupted. An event that one of them had been
        given but `run` never saw goes back to its place in the buffer."""
        if self._mine(key, generation) is None:
            return None
        for step in steps:
            self._db.execute("DELETE FROM waits WHERE instance = ? AND step = ?", (key, step))
            for row in self._journal(key, "step = ? ORDER BY seq DESC LIMIT 1", step):
                if row.type == "event":
                    was = json.loads(row.extra or "")
                    self._insert("events", [(key, was["type"], was["seq"], was["at"], row.data)])
                    self._change(key, wake=self.clock.now())
        return self.record(key, generation, [_row(kind, step) for step in steps])

    def go_idle(self, key: int, generation: int, seq: int) -> bool:
        """running → waiting, unless something happened that the run hasn't seen yet."""
        inst = self._mine(key, generation, "running")
        idle = inst is not None and inst.seq == seq
        if idle:
            self._move(key, _row("waiting"))
        return idle

    def requeue(self, key: int, generation: int, *statuses: str) -> bool:
        """A pausing run has nothing in flight any more, or a waiting one wants to go on by itself
        (if it still is that)."""
        if inst := self._mine(key, generation, *statuses):
            self._requeue(inst)
        return True

    def finish(
        self, key: int, generation: int, status: str, data: str | None, size: int = 0
    ) -> Instance | None:
        """`run` has ended, or (then `data` is what failed, if anything) its rollback. Returns the
        instance if it isn't finished yet, because a rollback begins."""
        if inst := self._mine(key, generation):
            outcome: str | None = None
            columns = {}
            if inst.rollback == "begun":
                outcome, size = data, 0
                columns["rollback"] = "complete" if outcome == "null" else "failed"
                (begun,) = self._journal(key, "type = 'rollback'")
                status, data = "errored", begun.data
                if inst.termination is not None:
                    status, data = "terminated", None
            try:
                self._check_state(inst.state, size, _fatal)
            except WorkflowFatalError as too_large:
                status, data, size = "errored", encode_error(too_large), 0
            if status == "errored" and self._roll_back(inst, data or "", generation=generation + 1):
                return self._mine(key, generation + 1)
            self._move(key, _row(status, None, data, outcome), size, **columns)
        return None

    def hand_back(self, key: int, generation: int, interrupted: Sequence[str]) -> None:
        """A clean stop: no attempt counts, and whoever owns the database next goes on."""
        self.give_up(key, generation, "stop", interrupted)
        self.requeue(key, generation, "running", "waitingForPause")


def _not_found(workflow: str, id: str) -> WorkflowError:
    return _refusal("instance.not_found", f"workflow {workflow!r} has no instance {id!r}")


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY


def _storage_error(path: str, error: BaseException) -> WorkflowError:
    if isinstance(error, WorkflowInternalError):
        return WorkflowInternalError(f"{path}: {error}")
    if isinstance(error, sqlite3.DatabaseError) and "not a database" in str(error):
        return WorkflowInternalError(f"{path}: not a database")
    return WorkflowInternalError(f"{path}: storage failed: {type(error).__name__}: {error}")


def _resolve(
    future: asyncio.Future[Any], value: Any = None, error: BaseException | None = None
) -> None:
    if not future.done():
        future.set_result(value) if error is None else future.set_exception(error)


# --------------------------------------------------------------------------------------------------
# Threads: where plain (not async) callbacks run, so that they never block the loop. A thread cannot
# be cancelled; one whose attempt has ended is abandoned, which frees its slot but not the thread.
# They are daemons of our own, because an executor's threads would hold up the interpreter's exit.


class Threads:
    """Used from the loop only; whoever wants a thread takes one of the `slots` first."""

    LIMIT = 64

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.slots = asyncio.Semaphore(self.LIMIT)
        self._jobs: queue.SimpleQueue[tuple[Any, Any] | None] = queue.SimpleQueue()
        self._threads = 0
        self._began: dict[asyncio.Future[Any], float] = {}  # the jobs that have not ended, and when

    def execute(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Runs it in a thread; the result is (value, error, CPU time in ns)."""
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._began[reply] = time.monotonic()
        if len(self._began) > self._threads:
            self._threads += 1
            threading.Thread(target=self._work, daemon=True, name="workflows-callback").start()
        self._jobs.put((function, reply))
        return reply

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, reply = job
            began = time.thread_time_ns()
            value, error = None, None
            try:
                value = function()
            except BaseException as raised:
                error = raised
            outcome = (value, error, time.thread_time_ns() - began)
            try:
                self._loop.call_soon_threadsafe(self._done, reply, outcome)
            except RuntimeError:  # the loop is gone, and so is whoever asked
                _discard(value)
            del job, function, reply, outcome, value, error  # or it keeps them until the next job

    def _done(self, reply: asyncio.Future[Any], outcome: tuple[Any, Any, int]) -> None:
        del self._began[reply]
        if reply.done():  # abandoned
            _discard(outcome[0])
        _resolve(reply, outcome)

    def may_end_soon(self) -> bool:
        """Whether a callback may end any moment: it has been running for less than 100 ms."""
        now = time.monotonic()
        return any(now < began + 0.1 for began in self._began.values())

    def close(self) -> None:
        """Lets every thread end, at once or when its callback does."""
        for _ in range(self._threads):
            self._jobs.put(None)


# --------------------------------------------------------------------------------------------------
# Run: one life of one instance, from its loading to its unloading.
#
# A life begins with the folded journal and calls `run` from the top. A step call looks its identity
# up: a recorded result is handed over, in the order in which results were recorded; anything else
# begins, or goes on, for real. What is recorded from then on comes back the same way: through
# `_inbox`, one result at a time, each only after the run has settled down from the one before. So
#
#     done, _ = await asyncio.wait({a, b}, return_when=asyncio.FIRST_COMPLETED)
#
# finds the same task done in every life.
#
# A life ends in one way, `unload`: because `run` ended, the instance is paused, waits long enough,
# was restarted, terminated or deleted by anybody, or the engine stops. Nothing in memory is worth
# keeping: another life begins with the journal.

SETTLED = 10  # turns of the loop without a step call or a result
GRACE = 1.0  # seconds that cancelled code gets to end

_attempt: contextvars.ContextVar[Attempt | None] = contextvars.ContextVar("workflows", default=None)


class StepCall(Coroutine[Any, Any, Any]):
    """What `step.do(…)` and its siblings return: counted when made, begun when first awaited."""

    step: Step  # from when it begins

    def __init__(
        self, run: Run, kind: str, name: Any, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.run, self.kind, self.name, self.args, self.options = run, kind, name, args, options
        self.function: StepFunction | None = None  # whose call it is, in the decorator form
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        attempt = _attempt.get()
        # In whose callback it is made, if that belongs to this run.
        self.attempt = attempt if attempt is not None and attempt.run is run else None
        scope: Run | Attempt = self.attempt or run
        counts = scope.counts = scope.counts or {}
        self.key = f"{kind}\n{name}"
        self.count = counts[self.key] = counts.get(self.key, 0) + 1
        self.key += f"\n{self.count}"
        if self.attempt is None:
            run.unawaited.add(self)
        else:
            self.key = self.attempt.call.key + SEPARATOR + self.key

    def _begin(self) -> Coroutine[Any, Any, Any]:
        if self._coroutine is None:
            self.run.unawaited.discard(self)
            performer = self.run if self.function is None else self.function
            self._coroutine = performer.perform(self)
        return self._coroutine

    def __await__(self) -> Any:
        return self._begin().__await__()

    def send(self, value: Any) -> Any:
        return self._begin().send(value)

    def throw(self, *error: Any) -> Any:
        return self._begin().throw(*error)

    def close(self) -> None:
        self._begin().close()


class WorkflowStep:
    """The `step` of `run(event, step)`. Each method returns something to await, once.

    developers.cloudflare.com/workflows/build/workers-api/ (WorkflowStep)"""

    def __init__(self, run: Run) -> None:
        self._run = run

    def do(self, name: Any = None, *args: Any, **options: Any) -> StepCall:
        """`do(name, callback)` or `do(name, config, callback)`: runs the callback, stores what it
        returns, and returns that, now and in every replay.

        The callback is async, or plain, which runs in a thread; if it has one required parameter,
        or one named `ctx`, it gets a `WorkflowStepContext`. It is retried by `config["retries"]`
        (`limit`, `delay`, `backoff`; `delay` may be a function of a `WorkflowDelayContext`), each
        attempt bounded by `config["timeout"]`; then its last error is raised. Names are up to 256
        characters. `config["sensitive"] = "output"` hides the result from `subscribe`.

        `rollback=handler`, with `rollback_config=…`, or both in a dict behind the callback: called
        with a `WorkflowRollbackContext` if the step has started and an error leaves `run`.

        `@step.do(name, config=…, depends=[…], concurrent=…)`, or `@step.do()`, decorates a
        function: see `StepFunction`.

        Errors, beside the callback's own: `step.invalid_name`, `step.invalid_config`,
        `step.invalid_callback`, `step.not_serializable`, `workflow.timeout`, `workflow.fatal` (a
        delay function failed), `limit.steps`, `limit.step_output`, `limit.cpu`,
        `limit.instance_state`."""
        if "callback" in options or any(map(callable, args)):
            return StepCall(self._run, "do", name, args, options)
        return StepDecorator(self._run, name, args, options)

    def sleep(
        self, name: Any = None, duration: Any = None, *surplus: Any, **unknown: Any
    ) -> StepCall:
        """Waits for a duration, at most 365 days, across restarts.

        developers.cloudflare.com/workflows/build/sleeping-and-retrying/
        Errors: `step.invalid_name`, `step.invalid_duration`, `limit.sleep`."""
        return StepCall(self._run, "sleep", name, (parse_duration, duration, *surplus), unknown)

    def sleep_until(
        self, name: Any = None, when: Any = None, *surplus: Any, **unknown: Any
    ) -> StepCall:
        """Waits for a moment: an aware datetime, or seconds (below 1e11) or milliseconds since
        1970. One that has passed returns at once. It is a sleep: both share the counts of a name,
        and the errors."""
        return StepCall(self._run, "sleep", name, (_parse_moment, when, *surplus), unknown)

    def wait_for_event(self, name: Any = None, *args: Any, **options: Any) -> StepCall:
        """`wait_for_event(name, type, timeout="24 hours")`, or `(name, {"type": …, "timeout": …})`:
        takes the oldest buffered event of that type, or waits for one. Beyond the timeout (0 to 365
        days) it raises `WorkflowTimeoutError`.

        developers.cloudflare.com/workflows/build/events-and-parameters/
        Errors: `step.invalid_name`, `step.invalid_config`, `event.invalid_type`, `limit.sleep`."""
        return StepCall(self._run, "wait_for_event", name, args, options)


Work = Coroutine[Any, Any, None]


@dataclasses.dataclass(slots=True, eq=False)
class Attempt:
    """One execution of a step's callback; also the scope of the step calls that it makes."""

    run: Run
    call: StepCall
    config: StepConfig
    number: int
    started: int = 0  # ms
    cpu: int = 0  # ns
    recorded: bool = False  # its start has been handed to the writer
    ended: bool = False  # and its end
    extra: str | None = None  # the config, with which a step's first row begins
    slot: bool = False  # it has one of the threads' slots
    task: asyncio.Task[Any] | None = None  # of the callback
    outcome: tuple[Any, BaseException | None] | None = None  # of that
    over: Any = None  # a future: done when it has ended, or is abandoned
    timer: Any = None
    verdict: BaseException | None = None  # decided before the callback ended
    # Of nested calls:
    counts: dict[str, int] | None = None
    outcomes: dict[StepFunction, asyncio.Future[Any]] = dataclasses.field(default_factory=dict)

    async def execute(self, callback: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """What the callback returned or raised, or what else became of it. It has a task of its
        own, so that a timeout or a cancellation reaches it and nothing else. Most end in the task's
        first step, which is taken at once."""
        run, outer = self.run, self.call.attempt
        task = _eager_task(self._perform(callback), run.loop)
        if outer is not None and outer.task is asyncio.current_task():
            outer.cpu -= self.cpu  # it ran inside that
        try:
            if not task.done():
                self.over = run.loop.create_future()
                run.tasks[task] = None
                task.add_done_callback(self._task_ended)
                await self.over
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            if self.timer is not None:
                self.timer.cancel()
            run.engine.store.cpu_ns += self.cpu
            self.task = None  # whose context leads back to here
        value, error = self.outcome or (None, asyncio.CancelledError())
        return value, self.verdict or self._excess() or error

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self.run.task_ended(task)
        _resolve(self.over)

    async def _perform(self, callback: Callable[[], Any]) -> None:
        self.task = asyncio.current_task()
        _attempt.set(self)  # in the task's own context
        try:
            coroutine = self._in_thread(callback) if self.slot else callback()
            self.outcome = await self._drive(coroutine), None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.outcome = None, error

    async def _in_thread(self, callback: Callable[[], Any]) -> Any:
        function = functools.partial(contextvars.copy_context().run, callback)
        reply = self.run.engine.threads.execute(function)
        try:
            value, error, cpu = await reply
        except asyncio.CancelledError:
            if not reply.cancelled():
                _discard(reply.result()[0])
            raise
        finally:
            self.free_slot()
        self.cpu += cpu
        if isinstance(error, StopIteration):  # which a coroutine can't raise
            error = RuntimeError(_message(error))
        if error is not None:
            raise error
        return await value if inspect.isawaitable(value) else value

    @types.coroutine
    def _drive(self, coroutine: Any) -> collections.abc.Generator[Any, Any, Any]:
        """Awaits it, and adds up its CPU time."""
        resume, given = coroutine.send, None
        while True:
            self.run.engine.activity += 1
            began = time.thread_time_ns()
            try:
                awaited = resume(given)
            except StopIteration as stop:
                return stop.value
            finally:
                self.cpu += time.thread_time_ns() - began
            self.suspended()
            try:
                resume, given = coroutine.send, (yield awaited)
            except BaseException as raised:
                resume, given = coroutine.throw, raised

    def free_slot(self) -> None:
        """Gives its thread's place to the next, if it has one."""
        if self.slot:
            self.slot = False
            self.run.engine.threads.slots.release()

    def suspended(self) -> None:
        """The callback has not ended by itself: from now on its start is a fact of its own, and its
        timeout runs. (A plain one is suspended while its thread runs.)"""
        clock = self.run.engine.clock
        if not self.recorded:
            self.run.record_start(self)
        if self.timer is None:
            left = max(0, self.config.timeout - (clock.now() - self.started))
            self.timer = clock.call_later(left, lambda: self._expire(self.timeout_error()))
        self._expire(self._excess())

    def timeout_error(self) -> WorkflowTimeoutError:
        """What it fails with when its time is up."""
        return WorkflowTimeoutError(f"Execution timed out after {self.config.timeout}ms")

    def _excess(self) -> WorkflowError | None:
        limit = self.run.engine.limits.cpu_ms
        if limit is None or self.cpu <= limit * 1_000_000:
            return None
        return _refusal("limit.cpu", f"the attempt used over {limit} ms of CPU time (limit cpu_ms)")

    def _expire(self, verdict: BaseException | None) -> None:
        """Decides that the attempt has failed, whatever its callback does from now on."""
        if verdict is not None and self.verdict is None and self.task is not None:
            self.verdict = verdict
            self.task.cancel()
            self.timer.cancel()
            self.timer = self.run.loop.call_later(GRACE, self._give_up)

    def _give_up(self) -> None:
        log.warning("%s: step %r ignores its cancellation; abandoned", self.run, self.call.name)
        for step in self.run.active.values():
            if step.task is not None and step.key.startswith(self.call.key + SEPARATOR):
                step.task.cancel()
        _resolve(self.over)


def _eager_task(coroutine: Coroutine[Any, Any, Any], loop: Any) -> asyncio.Task[Any]:
    """A task that has taken its first step. Python 3.11 needs help for that: if the loop shows what
    it will run next."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, eager_start=True)
    task = asyncio.Task(coroutine, loop=loop)
    caller = asyncio.current_task(loop)
    if isinstance(ready := getattr(loop, "_ready", None), deque) and caller is not None:
        step = ready.pop()
        if getattr(step._callback, "__self__", None) is not task:
            ready.append(step)  # another thread was quicker
            return task
        asyncio.tasks._leave_task(loop, caller)
        try:
            step._run()
        finally:
            asyncio.tasks._enter_task(loop, caller)
    return task


def _discard(value: Any) -> None:
    """Of what nobody will await."""
    if inspect.iscoroutine(value):
        value.close()


class Run:
    """One life of one instance."""

    # What only the end changes has its beginning here: with more than 30 attributes of its own, an
    # object is slow.
    dead = orphan = _collected = False  # being unloaded; cancelled by others; garbage
    successor: Instance | None = None  # what the next life begins with, if one follows
    interrupted: Sequence[str] = ()  # steps with attempts that the end of this life cut off
    _timer: Any = None  # to hibernate, to end a search, or to give up on tasks

    def __init__(
        self, engine: Engine, bound: Workflow, inst: Instance, rows: list[Row], previous: Run | None
    ) -> None:
        self.engine, self.loop, self.bound, self.instance = engine, engine.loop, bound, inst
        self.key, self.generation, self.id = inst.key, inst.generation, inst.id or ""
        self.seq, self.careful = inst.seq, bool(inst.careful)
        # "idling" while it is not certain that it may wait, "ended" when `run` has.
        self.status = inst.status
        self.steps, self._inbox = fold(rows)
        self.event = WorkflowEvent(
            freeze(decode(rows[0].data or "null")), _to_datetime(inst.created), self.id, bound.name
        )
        self.counts: dict[str, int] = {}
        self.unawaited: set[StepCall] = set()  # those of `run` itself
        self.active: dict[str, Step] = {}  # the steps whose calls are under way
        self.ended: asyncio.Future[None] = self.loop.create_future()
        # Of callbacks; at the end, all that must end before the next life.
        self.tasks: dict[Any, None] = {}
        self._cancelled: list[str] = []  # steps that `run` cancelled since it last did something
        self._steps_left = bound.step_limit
        self._writing = 0  # operations that the store has not answered yet
        self.last_move = 0  # the turn of the loop in which it last did something
        self._settling = False  # the engine is going to call `settled`
        # Of the decorator form: what is declared, and what has come of it.
        self.functions: dict[tuple[str, str], StepFunction] = {}
        self.outcomes: dict[StepFunction, asyncio.Future[Any]] = {}
        # By step: its rollback handler, and the configuration of that as it was given.
        self.handlers: dict[str, tuple[Any, Any]] = {} if previous is None else previous.handlers
        # The error that started the rollback, if one has begun, as it is stored.
        self._rollback_error = next((row.data for row in rows if row.type == "rollback"), None)
        searched = previous is not None and previous.searching
        self.searching: bool = self._rollback_error is not None and not searched
        if self.searching:  # for rollback handlers: results don't wait behind cancelled calls
            self._inbox = deque(step for step in self._inbox if step.state != "cancelled")

    def begin(self) -> None:
        """Calls `run`, or the handlers of its rollback."""
        # Not by `loop.create_task`, whose factory may begin it before we know it.
        name = f"workflows:{self.bound.name}:{self.id}"
        self.task = asyncio.Task(self._main(), loop=self.loop, name=name)
        self.task.add_done_callback(self._main_ended)
        self._check_pause()
        if self.searching:
            self._search()

    async def _main(self) -> tuple[str, BaseException | None]:
        """The output of `run` (or what its rollback has to say), as it is stored, or the error that
        has left it."""
        try:
            if self._rollback_error is not None and not self.searching:
                output = await self._roll_back(self._rollback_error)
            else:
                info = types.SimpleNamespace(instance_id=self.id, workflow_name=self.bound.name)
                output = self.bound.cls(info, self.engine.env).run(self.event, WorkflowStep(self))
                if inspect.isawaitable(output):
                    output = await output
            what, code = "the output of run", "output.not_serializable"
            return checked(output, what, code, refuse=_fatal)[0], None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            by_others = self.dead or self.task.cancelling()
            if isinstance(error, asyncio.CancelledError) and by_others:
                raise
            return "", error

    # -- step calls

    async def perform(self, call: StepCall) -> Any:
        """The way of every step call: look it up, carry it out if need be, wait for its turn."""
        if self.dead:
            await self._leave()
        self.last_move = self.engine.turn
        _check_name(call.name)
        step = self.steps.get(call.key)
        if step is None:
            step = self.steps[call.key] = Step(call.key)
        while step.task is not None:  # a nested one, called by the attempt before, which failed
            step.freed = step.freed or self.loop.create_future()
            await asyncio.shield(step.freed)
        call.step, step.task = step, asyncio.current_task(self.loop)
        self.active[step.key] = step
        try:
            if call.kind == "do":
                self._note(call)
            step.called = True
            if self.searching:
                self._search()
            if step.state in ("new", "pending") and not self.searching:
                _note_attempt()
                if call.attempt is None and self._cancelled:
                    self._record_cancelled()
                if (attempts := self._plan(call)) is not None:
                    await attempts
            elif self._is_next(step) and self._is_alone(step):
                self._inbox.popleft().queued = False
            if step.state == "cancelled" and not self.searching:
                log.info("%s: step %r waits until run cancels it again", self, call.name)
            while step.queued or step.state not in ("done", "error"):
                await self._wait(step)
            return self._value(call)
        except asyncio.CancelledError:
            if not (self.dead or self.searching):
                self._abandon_call(step)
            raise
        finally:
            del self.active[step.key]
            step.task = None
            if step.freed is not None:
                _resolve(step.freed)
                step.freed = None
            if self.active and not self.loop.is_closed():
                self._arm()

    def _note(self, call: StepCall) -> None:
        """Counts a `do`, and notes its rollback handler, if it has one."""
        if not call.step.called:
            self._steps_left -= 1
            if self._steps_left < 0:
                limit = self.bound.step_limit
                raise _fatal("limit.steps", f"the run calls more than {limit} steps (limit steps)")
        if call.options or len(call.args) > 1:
            with contextlib.suppress(TypeError, ValueError):  # which `_plan` refuses, if need be
                *_, handler, config = _do_arguments(*call.args, **call.options)
                if handler is not None:
                    self.handlers[call.key] = handler, config

    def _is_next(self, step: Step) -> bool:
        return bool(self._inbox) and self._inbox[0] is step and step.state != "cancelled"

    def _is_alone(self, step: Step) -> bool:
        """Whether nothing of the run can happen before the task that calls a step goes on: it is
        that of `run` itself, there is no other call, and no task is ready to make one. Then a
        result that comes without a pause changes nothing."""
        return (
            len(self.active) == 1
            and len(self.engine.ready) <= self.engine.ticking  # our own tick doesn't count
            and step.task is self.task
        )

    async def _wait(self, step: Step) -> None:
        """Suspends a call until something has happened to its step."""
        step.waiter = self.loop.create_future()
        step.alone = self._is_alone(step)
        self._arm()
        try:
            await step.waiter
        finally:
            step.waiter = None

    async def _leave(self) -> None:
        """Ends the task that called a step of a dead run. If it comes back after that, it ignores
        everything: it is left suspended, and nobody will look for it."""
        attempt = _attempt.get()
        if attempt is not None and attempt.run is not self:
            raise _fatal("workflow.fatal", "a rollback handler can't call steps: `run` has ended")
        task = None if self._collected else asyncio.current_task(self.loop)
        if task is not None and task not in self.engine.told:
            self.engine.told.add(task)
            raise _Unload
        if task is not None:
            asyncio.tasks._unregister_task(task)
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            self.task_ended(task)
        try:
            await self.loop.create_future()
        finally:
            self._collected = True  # by the garbage collector, in whatever task

    def _value(self, call: StepCall) -> Any:
        """What the caller gets: always from what was stored, also the first time."""
        step = call.step
        fresh, step.fresh, data = step.fresh, None, step.data
        if not step.nested:
            step.data = None  # nobody asks again; the next attempt of an outer step does
        if step.state == "error":
            error = rebuild_error(decode(data or "null"))
            raise error.with_traceback(None if fresh is None else fresh.__traceback__)
        if fresh is not None or data is None:
            return fresh
        return _step_event(data, step.extra) if call.kind == "wait_for_event" else decode(data)

    # -- what a call asks for

    def _plan(self, call: StepCall) -> Work | None:
        """Checks a call that has no result yet, and begins its wait, or returns its attempts.
        Nothing is stored for one that is refused: wrong arguments are wrong as for any Python
        function."""
        plan: Callable[..., Work | None] = getattr(self, f"_plan_{call.kind}")
        try:
            return plan(call, *call.args, **call.options)
        except (TypeError, ValueError, OverflowError) as error:
            code = "step.invalid_duration" if call.kind == "sleep" else "step.invalid_config"
            # Not our function's name and numbers.
            what = re.sub(r"^[\w.]+\(\)", f"{call.kind}()", str(error))
            what = re.sub(r"takes .* positional .* given", "takes fewer arguments", what)
            raise _fatal(code, f"{call.kind} {call.name!r}: {what}") from None

    def _plan_do(self, call: StepCall, *args: Any, **options: Any) -> Work:
        given, callback, handler, given_rollback = _do_arguments(*args, **options)
        if not callable(callback):
            what = f"{_show(callback)} is no callback" if callback else "the callback is missing"
            message = f"step {call.name!r}: {what}: expected an async or plain function"
            raise _fatal("step.invalid_callback", message)
        if call.step.config is not None:
            config = StepConfig.load(call.step.config, given)
        elif given is None and handler is None:
            config = _DEFAULT_CONFIG
        else:
            longest = self.engine.limits.max_sleep
            undo = {} if handler is not None and given_rollback is None else given_rollback
            config = StepConfig(given, longest, undo)
        return self._try(call, config, callback)

    def _plan_rollback(self, call: StepCall, undone: Step, _: object) -> Work:
        handler, given = self.handlers.get(undone.key, (None, None))
        if handler is None:
            message = f"the rollback handler of step {call.name!r} was not found by replay"
            raise _fatal("workflow.fatal", message)
        config = StepConfig.load(undone.config or "", given, undo=True)
        return self._try(call, config, handler)

    def _plan_sleep(self, call: StepCall, parse: Any, given: Any) -> None:
        moment = parse(given)
        if parse is parse_duration:
            self._begin_wait(call, None, moment)
        else:
            left = max(0, moment - self.engine.clock.now())
            self._begin_wait(call, None, left, until=moment)

    def _plan_wait_for_event(  # `event_type` is the Python SDK's name
        self, call: StepCall, type: Any = None, timeout: Any = "24 hours", *, event_type: Any = None
    ) -> None:
        if isinstance(type, Mapping):
            given = _options(type, ("type", "timeout"), "options")
            type, timeout = given.get("type"), given.get("timeout", timeout)
        type = _check_event_type(type if event_type is None else event_type, _fatal)
        self._begin_wait(call, type, parse_duration(timeout))

    def _begin_wait(
        self, call: StepCall, event: str | None, ms: int, until: int | None = None
    ) -> None:
        longest, kind = self.engine.limits.max_sleep, "sleep" if event is None else "wait"
        if ms > longest:
            message = f"{call.kind} {call.name!r} is longer than {longest} ms (limit max_sleep)"
            raise _fatal("limit.sleep", message)
        if call.attempt is not None:
            log.warning("%s: %s %r inside a step's callback", self, call.kind, call.name)
        if call.step.state == "new":
            due = self.engine.clock.now() + ms if until is None else until
            if self._is_skipped(kind, call):
                due = 0  # 1970: long ago, and before any event
            data = ms if event is None else {"type": event, "timeout": ms}
            row = _row(kind, call.key, _to_json(data))
            apply(self.steps, row)
            wait = (kind, call.key, event, due, int(until is not None))
            self._post(self.engine.store.record, [row], 0, wait)

    def _is_skipped(self, kind: str, call: StepCall) -> bool:
        """Whether a test wants a sleep, an event wait or a retry delay to be over at once."""
        return any(block.skips(kind, self, call) for block in self.engine.store.introspections)

    # -- attempts

    async def _try(self, call: StepCall, config: StepConfig, callback: Any) -> None:
        """A step's attempts, up to the last one, whose end is on its way to the store then."""
        wants, step = _wants_context(call.name, callback), call.step
        step.state = "pending"
        delay: int | None = 0
        while delay is not None:
            attempt = Attempt(self, call, config, step.attempts, recorded=step.open)
            result, error = await self._execute(attempt, callback, wants)
            delay = None
            if error is not None:
                what = (attempt.number, call.name)
                log.info("%s: attempt %d of step %r failed", self, *what, exc_info=error)
                delay, error = await self._delay(attempt, error)
            self._record_end(attempt, result, error, delay)

    async def _execute(
        self, attempt: Attempt, callback: Any, wants: Any
    ) -> tuple[Any, BaseException | None]:
        """One attempt, when it may begin. The result is the one to store."""
        step = attempt.call.step
        if attempt.recorded:  # but no end is: the engine died
            step.running = attempt
            return None, WorkflowInternalError("attempt failed: the engine stopped")
        try:
            plain = not _is_async(callback)
            while step.waiting:  # for the end of its retry delay
                await self._wait(step)
            # Then until the instance doesn't pause; and if the callback is plain, for a thread.
            while not (may_start := self._may_start(step)) or attempt.slot is not plain:
                if may_start:
                    attempt.slot = await self.engine.threads.slots.acquire()
                    continue
                attempt.free_slot()
                if self.status in ("idling", "waiting"):
                    self._post(self.engine.store.requeue, "waiting")
                await self._wait(step)
            step.running = attempt
            attempt.number = step.attempts = step.attempts + 1
            attempt.started = self.engine.clock.now()
            if step.config is None:
                step.config = attempt.extra = attempt.config.text
            if self.careful:
                self.record_start(attempt, lambda *_: self._poke(step))
                await self._wait(step)
            value, error = await attempt.execute(self._bind(attempt, callback, wants))
            if error is None and attempt.call.kind == "rollback":
                value = (None, None)  # it is ignored
            elif error is None:
                what, code = f"the result of step {attempt.call.name!r}", "step.not_serializable"
                value = checked(value, what, code, self.engine.limits, "step_bytes", _fatal)
            return value, error
        except WorkflowFatalError as refused:
            return None, refused
        finally:
            attempt.free_slot()

    def _may_start(self, step: Step) -> bool:
        # A nested one also while it's pausing, or the outer callback could not finish.
        return self.status == "running" or (step.nested and self.status == "waitingForPause")

    def _bind(self, attempt: Attempt, callback: Any, wants: Any) -> Any:
        """The callback with the argument that it wants, or what a test has put in its place."""
        for block in reversed(self.engine.store.introspections):
            if (mock := block.substitute(attempt)) is not None:
                return mock
        if isinstance(callback, functools.partial) and attempt.call.function is not None:
            # Each attempt has its own arguments.
            args, named = copy.deepcopy((callback.args, callback.keywords))
            callback = functools.partial(callback.func, *args, **named)
        if not wants:
            return callback
        argument = _context(attempt) if attempt.call.kind == "do" else attempt.call.args[1]
        if wants == "ctx":
            return functools.partial(callback, ctx=argument)
        return functools.partial(callback, argument)

    async def _delay(
        self, attempt: Attempt, error: BaseException
    ) -> tuple[int | None, BaseException]:
        """How long to wait before the next attempt, or None if this was the last. A function may
        say that; its failure is that of the step."""
        call, config = attempt.call, attempt.config
        fatal = isinstance(error, (NonRetryableError, WorkflowFatalError))
        if fatal or attempt.number > config.limit:
            return None, error
        delay = config.delay
        if callable(delay):
            ask = functools.partial(delay, WorkflowDelayContext(_context(attempt), error))
            asked = Attempt(self, call, _ASKING, attempt.number, recorded=True)
            if not _is_async(delay):
                asked.slot = await self.engine.threads.slots.acquire()
            asked.started = self.engine.clock.now()
            try:
                answer, failure = await asked.execute(ask)
                delay = parse_duration(answer) if failure is None else 0
            except ValueError as wrong:
                failure = wrong
            finally:
                asked.free_slot()
            if failure is not None:
                what = f"{type(failure).__name__}: {_message(failure)}"
                message = f"the delay function of step {call.name!r} failed: {what}"
                return None, WorkflowFatalError(message, name="NonRetryableDelayError")
        longest = 0 if self._is_skipped("retry", call) else self.engine.limits.max_sleep
        return min(delay * config.backoff(attempt.number), longest), error

    def record_start(self, attempt: Attempt, then: Then | None = None) -> None:
        """Hands an attempt's start to the store, as a row of its own."""
        attempt.recorded = True
        row = ("start", attempt.call.key, attempt.number, None, None, attempt.extra)
        self._post(self.engine.store.record, [row], then=then)

    def _record_end(
        self, attempt: Attempt, result: Any, error: BaseException | None, delay: int | None = None
    ) -> None:
        """Hands the end of an attempt to the store, with the wait before the next one: a result, or
        the error that it failed with."""
        step, size, fresh, wait = attempt.call.step, 0, error, None
        if error is None:
            type, (text, fresh) = "done", result
            size = size_of(text or "")
        elif delay is None:
            type, text = "error", encode_error(error)
        else:
            type, text = "failed", encode_error(error, retry_delay_ms=delay)
            wait = ("retry", step.key, None, self.engine.clock.now() + delay, 0)
            step.waiting = True
        # A row stands for the attempt's start, too, if that has none.
        started, extra = (None, None) if attempt.recorded else (attempt.started, attempt.extra)
        row = (type, step.key, attempt.number, started, text, extra)
        attempt.ended, step.open = True, False
        then = functools.partial(self._stored, attempt, row, fresh)
        self._post(self.engine.store.record, [row], size, wait, then=then)

    def _stored(
        self, attempt: Attempt, row: RowTail, fresh: Any, _: Any, refused: BaseException | None
    ) -> None:
        """The store's answer to the end of an attempt; it may refuse one that is over a limit."""
        if refused is not None:
            self._record_end(attempt, None, refused)
            return
        if attempt.call.step.running is attempt:
            attempt.call.step.running = None
        self.careful = self.careful and row[0] == "failed"
        if step := apply(self.steps, row):
            step.fresh = fresh
            self._finished(step)
        self._check_pause()

    # -- results, one at a time

    def _finished(self, step: Step) -> None:
        if step.queued:
            self._inbox.append(step)
        else:
            self._poke(step)

    def _poke(self, step: Step) -> None:
        if step.waiter is not None:
            _resolve(step.waiter)

    def _arm(self) -> None:
        """Delivers the next result if that can disturb nobody; otherwise, or if the run may be
        idle, looks again when it has settled."""
        if self._settling or self.dead or self.status not in ("running", "waitingForPause"):
            return
        if self._inbox:
            step = self._inbox[0]
            if step.waiter and step.alone and len(self.active) == 1 and self._is_next(step):
                self._deliver()
                return
        elif not (self._cancelled or (self.status == "running" and self._is_idle())):
            return
        self._settling = True
        self.last_move = self.engine.turn
        self.engine.when_settled(self)

    def settled(self) -> None:
        """Ten turns of the loop went by without a step call or a result."""
        self._settling = False
        if self.dead or self.status not in ("running", "waitingForPause"):
            return
        if self._cancelled and self.active:
            self._record_cancelled()  # it goes on with another call
        if (step := next((step for step in self._inbox if step.waiter), None)) is not None:
            while self._inbox[0] is not step:
                self._inbox.popleft().queued = False  # its call never came
            if self._is_next(step):
                self._deliver()
        elif self.status == "running" and self._is_idle():
            self.status = "idling"  # until we know better: no callback may start now
            self._post(self.engine.store.go_idle, self.seq, then=self._idled)

    def _deliver(self) -> None:
        step = self._inbox.popleft()
        step.queued = False
        self.last_move = self.engine.turn
        self._poke(step)

    def _is_idle(self) -> bool:
        """Whether all that is under way are sleeps, event waits and retry delays."""
        if self._writing or not self.active or self._rollback_error is not None:
            return False
        return all(step.waiting for step in self.active.values())

    def _idled(self, idle: bool, _: BaseException | None) -> None:
        if idle:
            self.status = "waiting"
            self._timer = self.engine.clock.call_later(self.engine.hibernate_after, self._hibernate)
        elif self.status == "idling":
            self._become("running")

    def _hibernate(self) -> None:
        if self.status == "waiting" and self._is_idle():
            self.unload()

    # -- news from the store

    def on_news(self, inst: Instance, rows: list[Row], admitted: bool) -> None:
        """What the writer has recorded by itself, or somebody else has done to the instance."""
        outdated = inst.generation != self.generation or inst.status in (*FINISHED, "paused")
        if self.dead or outdated:
            self.unload()
            self.successor = inst if admitted else self.successor
            return
        self.seq = max(self.seq, inst.seq)
        for row in rows:
            if row.step not in self.steps:  # `_abandon_call` has stopped it meanwhile
                continue
            if step := apply(self.steps, row[2:]):
                self._finished(step)
            elif row.type == "due":
                self._poke(self.steps[row.step])
        # What was written before it went idle is old; the answer to that will say.
        if self.status != "ended" and (self.status, inst.status) != ("idling", "running"):
            self._become(inst.status)

    def _become(self, status: str) -> None:
        self.status = status
        if status != "waiting" and self._timer is not None:
            self._timer.cancel()
        for step in self.active.values():
            if not (step.waiting or step.running):  # its next attempt may begin now
                self._poke(step)
        self._check_pause()
        self._arm()

    def _check_pause(self) -> None:
        pausing = self.status == "waitingForPause"
        if pausing and not any(step.running for step in self.active.values()):
            if self._cancelled:
                self._record_cancelled()
            self._post(self.engine.store.requeue, "waitingForPause")

    def _post(self, op: Callable[..., Any], *args: Any, then: Then | None = None) -> None:
        self._writing += 1
        written = functools.partial(self._written, then)
        self.engine.store.post(op, self.key, self.generation, *args, then=written)

    def _written(self, then: Then | None, result: Any, error: BaseException | None) -> None:
        self._writing -= 1
        if result is None and error is None:
            self.unload()  # it has finished, or somebody else has changed it: there will be news
        elif type(result) is int:
            self.seq = max(self.seq, result)
        if not self.dead:
            if then is not None:
                then(result, error)
            self._arm()

    # -- cancelled calls

    def _abandon_call(self, step: Step) -> None:
        """`run` (or the callback around the call) has cancelled it."""
        self.last_move = self.engine.turn
        attempt, step.running = step.running, None
        step.open = attempt is not None and attempt.recorded and not attempt.ended
        step.waiting = False
        if step.queued:
            step.queued = False
            self._inbox.remove(step)
        if not step.nested and step.state != "cancelled":
            step.state = "cancelled"
            self._cancelled.append(step.key)
        elif step.state == "pending":
            # A callback is repeated as a whole: what it broke off is as if it had not been called.
            apply(self.steps, _row("stop", step.key))
            self._post(self.engine.store.give_up, "stop", [step.key])
        self._check_pause()

    def _record_cancelled(self) -> None:
        cancelled, self._cancelled = self._cancelled, []
        self._post(self.engine.store.give_up, "cancel", cancelled)

    # -- the end of a life

    def _main_ended(self, task: asyncio.Task[Any]) -> None:
        if self.dead:
            return
        if self.searching:
            self._end_search()
            return
        if task.cancelled() or task.exception() is not None:
            self.orphan = True  # cancelled from outside: usually the loop is being torn down
            self.unload()
            self.loop.call_later(1, self.engine.adopt, self)
            return
        text, error = task.result()
        if self._rollback_error is None:
            self._warn_about_calls()
        if self._cancelled:
            self._record_cancelled()
        end = ("complete", text, size_of(text))
        if error is not None:
            log.warning("%s: an error has left run", self, exc_info=error)
            end = ("errored", encode_error(error), 0)
        self.status = "ended"  # nothing else begins
        self._post(self.engine.store.finish, *end, then=self._end_rolled_back)

    def _end_rolled_back(self, successor: Instance | None, _: BaseException | None) -> None:
        """`run` has ended, but not the instance: a rollback has begun, or storage has failed."""
        self.successor = self.successor or successor
        self.unload()

    # -- rollback: another life, which begins when `run` has failed, or is told to. Before it comes
    #    a life that only searches for the handlers, by replay; it ends at once if the one before
    #    it, in this process, has met them all.

    def _undoable(self) -> list[Step]:
        """The steps that have started, in that order, and have a rollback handler."""
        return [step for step in self.steps.values() if '"rollback":' in (step.config or "")]

    def _search(self) -> None:
        """Goes on until every handler has been seen, `run` has ended, or is idle for 5 s."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.engine.clock.call_later(5000, self._end_search)
        if all(step.key in self.handlers for step in self._undoable()):
            self._end_search()

    def _end_search(self) -> None:
        self.successor = self.instance
        self.unload()

    async def _roll_back(self, started: str) -> Any:
        """Runs the handlers, the last step's first; returns the record of what failed, if
        anything."""
        error = rebuild_error(decode(started))
        for step in reversed(self._undoable()):
            *_, name, count = step.key.split(SEPARATOR)
            call = StepCall(self, "rollback", name, (), {})
            call.key, call.count = ROLLBACK + step.key, int(count)
            config = StepConfig.load(step.config or "")
            ctx = _context(Attempt(self, call, config, max(1, step.attempts)))
            output = decode(step.data) if step.state == "done" and step.data else None
            info = WorkflowRollbackContext(ctx, error, output, step_label(step.key))
            call.args = (step, info)
            try:
                await call
            except Exception as failure:
                log.warning("%s: a rollback handler failed", self, exc_info=failure)
                return decode(encode_error(failure))
        return None

    def _warn_about_calls(self) -> None:
        for call in self.unawaited:
            log.warning("%s: step %r was called but never awaited", self, call.name)
        steps = [step for step in self.steps.values() if step.state != "new"]
        if not any(step.state == "cancelled" for step in steps):
            what = "%s: replay never reached the recorded step %r; is its name deterministic?"
            for step in (step for step in steps if not (step.called or step.nested)):
                log.warning(what, self, step_label(step.key))

    def unload(self) -> None:
        """Ends this life: cancels the run, then the tasks of its calls. Whatever they do is
        ignored; `ended` is done when they are, or after a second."""
        if self.dead:
            return
        self.dead = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(GRACE, self._give_up_on_tasks)
        cut_off = (step.running for step in self.active.values() if step.running is not None)
        attempts = [a.call.key for a in cut_off if a.recorded and not a.ended]
        self.interrupted = attempts + [key for key in self._cancelled if self.steps[key].open]
        calling = (step.task for step in self.active.values() if step.task is not None)
        tasks = dict.fromkeys((self.task, *calling, *self.tasks))
        self.tasks = {task: None for task in tasks if not task.done()}
        for task in self.tasks:
            task.add_done_callback(self.task_ended)
            task.cancel()
        self.task_ended()

    def task_ended(self, task: asyncio.Task[Any] | None = None) -> None:
        """One less to wait for; with the last one of a dead run, its life is over."""
        self.tasks.pop(task, None)
        if self.dead and not (self.tasks or self.ended.done()):
            self._timer.cancel()
            self.ended.set_result(None)
            self.engine.unloaded(self)

    def _give_up_on_tasks(self) -> None:
        if self.tasks:
            log.warning("%s: %d tasks ignore their cancellation; abandoned", self, len(self.tasks))
        self.tasks.clear()
        self.task_ended()

    def busy(self) -> bool:
        """Whether it will go on by itself, as far as we can see."""
        return self._settling or self.dead

    def __str__(self) -> str:
        return f"{self.bound.name} {self.id}"


def _step_event(data: str | None, extra: str | None) -> WorkflowStepEvent:
    origin = json.loads(extra or "")
    payload = freeze(decode(data or "null"))
    return WorkflowStepEvent(payload, _to_datetime(origin["at"]), origin["type"])


def _ignore(*_: Any) -> None:
    pass


def _note_attempt() -> None:
    """Before what a callback does to the history: that it has begun comes first."""
    attempt = _attempt.get()
    if attempt is not None and not attempt.recorded:
        attempt.run.record_start(attempt)


def _context(attempt: Attempt) -> WorkflowStepContext:
    info = WorkflowStepInfo(attempt.call.name, attempt.call.count)
    return WorkflowStepContext(info, attempt.number, copy.deepcopy(attempt.config.raw))


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise _fatal("step.invalid_name", f"a step's name is {_show(name)}: expected a str")
    if len(name) > 256:
        raise _fatal("step.invalid_name", f"a step's name has {len(name)} characters: at most 256")
    if not name.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        what = "holds a control character or a lone surrogate"
        raise _fatal("step.invalid_name", f"the step name {_show(name)} {what}")


_NAME = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9-_]*")
_NAME_RULE = "letters, digits, '_' and '-', not beginning with '-'"


def _check_event_type(type: Any, refuse: Refuse) -> str:
    if isinstance(type, str) and len(type) <= 100 and _NAME.fullmatch(type):
        return type
    what = f"{_show(type)} is not an event type: expected 1 to 100 {_NAME_RULE}"
    raise refuse("event.invalid_type", what)


def _do_arguments(*args: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Config, callback, rollback handler and its config, of any form of `step.do`."""
    one = len(args) == 1
    if (args and callable(args[0])) or (one and not isinstance(args[0], (Mapping, type(None)))):
        args = (options.pop("config", None), *args)
    return _in_order(*args, **options)


def _in_order(  # Python itself refuses what doesn't fit
    config: Any = None,
    callback: Any = None,
    options: Any = None,
    *,
    rollback: Any = None,
    rollback_config: Any = None,
) -> tuple[Any, Any, Any, Any]:
    if options is not None:
        options = _options(options, ("rollback", "rollbackConfig"), "options")
        rollback = options.get("rollback", rollback)
        rollback_config = options.get("rollbackConfig", rollback_config)
    if not callable(rollback) and (options, rollback, rollback_config) != (None, None, None):
        raise ValueError(f"rollback is {_show(rollback)}: expected a function")
    if rollback_config is not None:
        _options(rollback_config, ("retries", "timeout"), "rollbackConfig")
    return config, callback, rollback, rollback_config


def _is_async(function: Callable[..., Any]) -> bool:
    if type(function) is types.FunctionType:  # the most common, and the fastest to see
        return bool(function.__code__.co_flags & inspect.CO_COROUTINE)
    called = getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _wants_context(name: str, function: Callable[..., Any]) -> Any:
    """How a callback takes the step context: "ctx" by that name, True by position, False not at
    all."""
    if type(function) is types.FunctionType and function.__code__.co_varnames == ():
        return False  # most common, again
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False  # a built-in that doesn't say
    ways: list[Any] = [(False, (), {}), (True, (None,), {})]
    if "ctx" in signature.parameters:
        ways.insert(0, ("ctx", (), {"ctx": None}))
    for way, args, named in ways:
        with contextlib.suppress(TypeError):
            signature.bind(*args, **named)
            return way
    message = f"step {name!r}: the callback takes {signature}: it gets the step context at most"
    raise _fatal("step.invalid_callback", message)


# --------------------------------------------------------------------------------------------------
# Engine: which instances live now. It turns the store's news into lives, and knows what to do when
# something fails: storage (stop in place), the loop (unload), the whole process (nothing at all,
# the next one recovers).


class Env(_Attributes):
    """`self.env`: the engine's `env` and its bindings, as attributes and as a mapping."""


class WorkflowEntrypoint(Generic[Params]):
    """Extend it, and define `async def run(self, event, step)`. A new object is made for each life
    of each instance; `self.env` has the engine's `env` and bindings.

    developers.cloudflare.com/workflows/build/workers-api/ (WorkflowEntrypoint)"""

    def __init__(self, ctx: Any, env: Any) -> None:
        self.ctx, self.env = ctx, env

    async def run(self, event: WorkflowEvent[Params], step: WorkflowStep) -> Any:
        """The workflow. What it returns becomes the output, an error that leaves it the error."""
        raise NotImplementedError


class Engine:
    """Runs workflows on a database file (or ":memory:").

    Enter it with `async with`. Any number of processes may open one file: one of them runs the
    instances, the others are full clients, and one of those takes over when it goes away.

    `env` is what workflows see as `self.env`; `limits` a `Limits`; `clock` a `Clock`;
    `hibernate_after` how long a waiting instance stays in memory."""

    def __init__(
        self,
        database: str | os.PathLike[str] = "workflows.db",
        *,
        env: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        clock: Clock | None = None,
        hibernate_after: float | str | timedelta = "1 second",
    ) -> None:
        path = os.fspath(database) if isinstance(database, (str, os.PathLike)) else None
        if not isinstance(path, str) or not path:
            raise TypeError(f"database is {_show(database)}: expected a path")
        kinds = {"env": (env, Mapping), "limits": (limits, Limits), "clock": (clock, Clock)}
        for name, (given, kind) in kinds.items():
            if not isinstance(given, (kind, type(None))):
                raise TypeError(f"{name} is {type(given).__name__}: expected a {kind.__name__}")
        self.path = path if path == ":memory:" else os.path.realpath(path)
        self.env = Env(env or {})
        self.limits = limits or Limits()
        self.clock = clock or Clock()
        self.hibernate_after = parse_duration(hibernate_after)
        self.turn = 0  # of the loop, counted while somebody needs to know
        self._settling: deque[tuple[int, Run]] = deque()  # whom to ask again, and in which turn
        self.ticking = False  # whether `_next_turn` is about to be called
        self.activity = 0  # counts what callbacks do
        self.runs: dict[int, Run] = {}  # by the instance's key
        self.told: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()  # that their run is dead
        self._workflows: dict[str, Workflow] = {}
        self._state = "not open yet"  # → open → closed
        self._created: deque[int] = deque(maxlen=self.limits.creations_per_second or 0)  # when
        self._watchers = weakref.WeakValueDictionary[Topic, asyncio.Future[None]]()

    # -- bindings

    def bind(
        self,
        cls: type[WorkflowEntrypoint[Any]],
        name: str | None = None,
        binding: str | None = None,
        *,
        steps: int | None = None,
    ) -> Workflow:
        """Makes a workflow known, before entering the engine or later. `name` defaults to the
        class's in kebab-case, `binding` (its name in `env`) to that in upper snake case; `steps` is
        the most steps that a run may call, up to 25,000."""
        extends = isinstance(cls, type) and issubclass(cls, WorkflowEntrypoint)
        if not extends or cls.run is WorkflowEntrypoint.run or not callable(cls.run):
            expected = "a class that extends WorkflowEntrypoint and has run(self, event, step)"
            raise TypeError(f"{_show(cls)} can't be bound: expected {expected}")
        name = _kebab(cls.__name__) if name is None else name
        if not isinstance(name, str) or len(name) > 64 or not _NAME.fullmatch(name):
            raise ValueError(f"{_show(name)} is no workflow name: expected 1 to 64 {_NAME_RULE}")
        binding = name.upper().replace("-", "_") if binding is None else binding
        if not isinstance(binding, str) or not binding.isidentifier() or keyword.iskeyword(binding):
            raise ValueError(f"{_show(binding)} is not a binding: expected one like MY_WORKFLOW")
        if steps is not None and (type(steps) is not int or not 0 < steps <= 25_000):
            raise ValueError(f"steps is {_show(steps)}: expected a whole number from 1 to 25,000")
        if name in self._workflows:
            raise ValueError(f"workflow {name!r} is bound already")
        if binding in self.env:
            raise ValueError(f"env has {binding!r} already: give another binding")
        workflow = Workflow(self, name, cls, steps or self.limits.steps)
        if self._state != "not open yet":
            self._check_open()
            self._define(workflow, binding)
        self._workflows[name] = workflow
        self.env[binding] = workflow
        return workflow

    def _define(self, workflow: Workflow, binding: str) -> None:
        args = (workflow.name, binding, workflow.cls.__name__, workflow.step_limit)
        self.store.post(self.store.define, *args, then=_ignore)

    # -- opening and closing

    async def __aenter__(self) -> Engine:
        if self._state != "not open yet":
            raise RuntimeError("an engine can be entered once; make a new one")
        self.loop = asyncio.get_running_loop()
        # What the loop will run next; a loop that doesn't show it is taken to be busy always.
        self.ready: Sequence[Any] = getattr(self.loop, "_ready", (None, None))
        self.threads = Threads(self.loop)
        self.store = Store(self.path, self.clock, self.limits, self.loop)
        self.store.deliver, self.store.broke = self._deliver, self._broke
        try:
            await self.store.start()
        except asyncio.CancelledError:
            self.store.ops.put(None)
            raise
        self._state = "open"
        self.clock.engines.append(self)
        for binding, workflow in self.env.items():
            if isinstance(workflow, Workflow) and workflow.engine is self:
                self._define(workflow, binding)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.loop.is_closed():  # without leaving: the writer notices
            return
        leaving = self.loop.create_task(self._leave())
        try:
            await asyncio.shield(leaving)
        finally:
            await leaving  # also when cancelled: it takes a second at most

    async def _leave(self) -> None:
        self._state = "closed"
        self.store.closing = True
        self.clock.engines.remove(self)
        runs = list(self.runs.values())
        for run in runs:
            run.unload()
        await asyncio.gather(*(asyncio.shield(run.ended) for run in runs))
        for run in runs:
            self._hand_back(run)
        self.store.post(self.store.requeue_all, self.store.bound, then=_ignore)
        self.store.ops.put(None)
        await self.store.closed
        self.store.thread.join()
        self.threads.close()
        self._wake(list(self._watchers))

    def _hand_back(self, run: Run) -> None:
        life = (run.key, run.generation)
        self.store.post(self.store.hand_back, *life, run.interrupted, then=_ignore)

    def _check_open(self) -> None:
        if self._state != "open":
            raise RuntimeError(f"the engine is {self._state}: use it inside `async with Engine(…)`")
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("the engine was entered in another event loop")
        if self.store.failure is not None:
            raise WorkflowInternalError(str(self.store.failure))

    async def call(self, op: str, *args: Any) -> Any:
        """The result of one of the store's operations, once it is committed."""
        self._check_open()
        _note_attempt()
        future: asyncio.Future[Any] = self.loop.create_future()
        self.store.post(getattr(self.store, op), *args, then=functools.partial(_resolve, future))
        return await future

    async def create_instances(self, workflow: str, entries: list[Entry]) -> list[str]:
        """Stores instances, but refuses a call too many within a second; the ids of the new."""
        limit, now = self.limits.creations_per_second, self.clock.now()
        if len(self._created) == limit and all(at > now - 1000 for at in self._created):
            what = f"more than {limit} creations within a second (limit creations_per_second)"
            raise _refusal("limit.creation_rate", what)
        self._created.append(now)
        return await self.call("create", workflow, entries, "binding")  # type: ignore[no-any-return]

    async def usage(self) -> Usage:
        """What Cloudflare's pricing is based on, and what it would come to; cheap to ask."""
        requests, cpu_ms, storage_bytes = await self.call("usage")
        cost = max(0, requests - 10_000_000) * 0.30e-6 + max(0, cpu_ms - 30_000_000) * 0.02e-6
        cost += max(0, storage_bytes - 10**9) * 0.20e-9
        return Usage(requests, round(cpu_ms, 3), storage_bytes, round(cost, 6))

    # -- what the store tells, on the loop

    def _deliver(self, results: list[Any], news: list[News], touched: set[Topic] | None) -> None:
        self.store.pending -= len(results)
        for then, result, error in results:
            try:
                then(result, error)
            except Exception:
                log.exception("a bug in workflows.py: please report it")
        admitted = []
        for item in news:
            if (run := self.runs.get(item.instance.key)) is not None:
                run.on_news(*item)
            elif item.admitted:
                admitted.append(item.instance)
        self._load(admitted)
        if touched is not None:
            self._wake(touched)
        elif self._state == "open" and (topics := list(self._watchers)):  # another process wrote
            self.store.post(self.store.which_changed, topics, then=self._wake)

    def _load(self, lives: list[Instance], previous: Run | None = None) -> None:
        if lives and self._state == "open":
            self.store.post(self.store.load, lives, then=functools.partial(self._begin, previous))

    def _begin(self, previous: Run | None, loaded: Any, _: BaseException | None) -> None:
        for inst, rows, workflow in loaded or ():
            if self._state == "open" and inst.key not in self.runs:
                bound = self._workflows[workflow]
                self.runs[inst.key] = run = Run(self, bound, inst, rows, previous)
                run.begin()

    def unloaded(self, run: Run) -> None:
        """A life has ended; the next one may begin."""
        if self.runs.get(run.key) is run and self._state == "open" and not run.orphan:
            del self.runs[run.key]
            if run.successor is not None:
                self._load([run.successor], run)

    def adopt(self, run: Run) -> None:
        """Somebody has cancelled a run's task, but the loop goes on, and so does the instance."""
        if self._state == "open":
            run.orphan = False
            self._hand_back(run)
            self.unloaded(run)

    def _broke(self, error: BaseException, callbacks: list[Then]) -> None:
        """Storage failed: nothing goes on, and everybody who waits is told."""
        self.store.pending -= len(callbacks)
        for run in list(self.runs.values()):
            run.unload()
        for then in callbacks:
            then(None, error)
        self._wake(list(self._watchers))

    def busy(self) -> bool:
        """Whether anything will happen by itself, without an event, a timer or the world
        outside."""
        pending = self.store.pending > 0 or self.threads.may_end_soon()
        return pending or any(run.busy() for run in self.runs.values())

    def when_settled(self, run: Run) -> None:
        """Tells a run when it has done nothing for `SETTLED` turns of the loop."""
        self._settling.append((self.turn + SETTLED, run))
        if not self.ticking:
            self.ticking = True
            self.loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self.turn += 1
        self.ticking = bool(self._settling)
        if self.ticking:
            self.loop.call_soon(self._next_turn)
        while self._settling and self._settling[0][0] <= self.turn:
            _, run = self._settling.popleft()
            if run.last_move + SETTLED > self.turn and not run.dead:
                self._settling.append((run.last_move + SETTLED, run))
            else:
                run.settled()

    def watch(self, topic: Topic) -> asyncio.Future[None]:
        """A future that is done when there may be news; kept by those who wait for it."""
        return self._watchers.setdefault(topic, self.loop.create_future())

    def _wake(self, topics: Iterable[Topic] | None, _: BaseException | None = None) -> None:
        for topic in topics or ():
            if (watched := self._watchers.pop(topic, None)) is not None:
                _resolve(watched)


def _kebab(name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return words.replace("_", "-").strip("-").lower()


# --------------------------------------------------------------------------------------------------
# Binding: the side that callers see, in any process.


Options = Mapping[str, Any] | None  # a dict with Cloudflare's keys, or keyword arguments


class Workflow:
    """A bound workflow: creates instances and finds them again.

    developers.cloudflare.com/workflows/build/workers-api/ (Workflow)"""

    def __init__(
        self, engine: Engine, name: str, cls: type[WorkflowEntrypoint[Any]], step_limit: int
    ) -> None:
        self.engine, self.name, self.cls, self.step_limit = engine, name, cls, step_limit

    async def create(self, options: Options = None, /, **given: Any) -> WorkflowInstance:
        """`create(id=…, params=…, retention=…)`, or a dict of these: returns when the new instance
        is durably stored. `id` is up to 100 letters, digits, '_' and '-' (default: a UUID4),
        `params` any value that can be stored (default `{}`), `retention` how long it is kept when
        it has ended: `{"successRetention": …, "errorRetention": …}`, up to the limits'.

        Errors: `instance.invalid_id`, `instance.already_exists`, `params.not_serializable`,
        `limit.event_payload`, `limit.instance_state`, `limit.creation_rate`,
        `limit.queued_instances`, `limit.retention`."""
        entry = self._entry(_merge(options, given, (*_CREATE,), "create"), "create")
        if not await self.engine.create_instances(self.name, [entry]):
            what = f"workflow {self.name!r} has an instance {entry[0]!r} already"
            raise _refusal("instance.already_exists", what)
        return WorkflowInstance(self, entry[0])

    async def create_batch(self, batch: Iterable[Mapping[str, Any]]) -> list[WorkflowInstance]:
        """Creates 1 to 100 instances in one transaction, in order. Ids that exist already, or
        repeat, are skipped and left out of the result. Errors as in `create`, and
        `limit.batch_size`."""
        entries = self._batch(batch, "batch", self._entry)
        made = await self.engine.create_instances(self.name, entries)
        return [WorkflowInstance(self, id) for id in made]

    async def get(self, id: str) -> WorkflowInstance:
        """The instance with that id. Errors: `instance.not_found`, `instance.invalid_id`."""
        await self.engine.call("on", self.name, self._check_id(id), "status")
        return WorkflowInstance(self, id)

    async def delete_batch(self, ids: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """Deletes 1 to 100 instances in one transaction. Returns `{"deleted": [{"id"}], "errors":
        [{"id", "code", "message"}]}`, with one entry for each id.

        Errors: `instance.invalid_id`, `limit.batch_size`; then none is deleted."""
        legal = self._batch(ids, "ids", self._check_id)
        return await self.engine.call("delete_batch", self.name, legal)  # type: ignore[no-any-return]

    def _batch(self, given: Any, what: str, check: Callable[[Any, str], Any]) -> list[Any]:
        """What `check` makes of each entry of a caller's list, if there aren't too many."""
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
            raise TypeError(f"{what} is {type(given).__name__}: expected a list")
        entries = [check(entry, f"{what}[{n}]") for n, entry in enumerate(given)]
        limit = self.engine.limits.batch
        if not 0 < len(entries) <= limit:
            what = f"{what} has {len(entries)} entries: expected 1 to {limit} (limit batch)"
            raise _refusal("limit.batch_size", what)
        return entries

    def _entry(self, given: Any, where: str) -> Entry:
        options, limits = _CREATE | _options(given, (*_CREATE,), where), self.engine.limits
        id = str(uuid.uuid4()) if options["id"] is None else self._check_id(options["id"], where)
        what, code = f"{where}: params", "params.not_serializable"
        text, _ = checked(options["params"], what, code, limits, "payload_bytes")
        names = ("successRetention", "errorRetention")
        kept = [limits.success_retention, limits.error_retention]
        retention = {} if options["retention"] is None else options["retention"]
        for name in _options(retention, names, f"{where}: retention"):
            n, ms = names.index(name), _config_ms(retention, name, f"{where}: retention")
            longest = kept[n]
            if longest is not None and ms > longest:
                what = f"{where}: {name} is longer than {longest} ms (limit retention)"
                raise _refusal("limit.retention", what)
            kept[n] = ms
        return id, text, kept[0], kept[1]

    def _check_id(self, id: Any, where: str = "id") -> str:
        limit = self.engine.limits.id_length
        if isinstance(id, str) and len(id) <= limit and _NAME.fullmatch(id):
            return id
        what = f"{where}: {_show(id)} is not an instance id: expected 1 to {limit} {_NAME_RULE}"
        raise _refusal("instance.invalid_id", what)

    def introspect(self) -> WorkflowIntrospector:
        """`async with workflow.introspect() as all_instances`, for tests: to look into the
        instances that are created inside the block, and to change what happens to them. The
        engine must be the one that runs them."""
        return WorkflowIntrospector(self)

    def introspect_instance(self, id: str) -> WorkflowInstanceIntrospector:
        """`async with workflow.introspect_instance(id) as one`: the same for one instance, which
        may also be created inside the block. Error: `instance.invalid_id`."""
        return WorkflowInstanceIntrospector(self, self._check_id(id))

    def _event(self, options: Any, given: dict[str, Any], what: str) -> tuple[str, str]:
        event = {"payload": None} | _merge(options, given, ("type", "payload"), what)
        if "type" not in event:
            raise TypeError(f"{what} needs a type")
        type = _check_event_type(event["type"], _refusal)
        code, limits = "event.not_serializable", self.engine.limits
        return type, checked(event["payload"], "payload", code, limits, "payload_bytes")[0]


_CREATE: dict[str, Any] = {"id": None, "params": {}, "retention": None}  # options and defaults


def _merge(options: Any, given: dict[str, Any], known: Sequence[str], what: str) -> dict[str, Any]:
    """An options object, or keyword arguments, or both; every key known."""
    options = _options({} if options is None else options, known, what)
    for key in options.keys() & given:
        raise TypeError(f"{what}: {key!r} is given twice")
    return _options({**options, **given}, known, what)


_KINDS = {_camel(kind): kind for kind in STEP_KINDS}


def _start(given: Any) -> tuple[str, int, str | None]:
    """The step that a restart begins from: name, count, and kind if that is given."""
    step = _options(given, ("name", "count", "type"), "from")
    kind = step.pop("type", None)
    if kind is not None and kind not in [*_KINDS]:
        raise ValueError(f"from: the type is {_show(kind)}: expected one of {', '.join(_KINDS)}")
    return *_named(step, "count"), kind and _KINDS[kind]


def _named(step: Any, index: str = "index") -> tuple[str, int]:
    """The name and the count of a step."""
    given = step if isinstance(step, Mapping) else {"name": step}
    _options(given, ("name", index), "step")
    name, count = given.get("name"), given.get(index, 1)
    if isinstance(name, str) and type(count) is int and count > 0:
        return name, count
    expected = f'its name, or {{"name": …, "{index}": …}} with a number from 1'
    raise ValueError(f"{_show(step)} is not a step: expected {expected}")


class WorkflowInstance:
    """One instance of a workflow: ask it, steer it, send it events. What a call changes is visible
    to `status()` in every process when it returns. Every method may raise `instance.not_found`.

    developers.cloudflare.com/workflows/build/workers-api/ (WorkflowInstance)"""

    def __init__(self, workflow: Workflow, id: str) -> None:
        self.workflow, self.id = workflow, id

    def __repr__(self) -> str:
        return f"<WorkflowInstance {self.workflow.name} {self.id}>"

    async def _call(self, op: str, *args: Any) -> Any:
        return await self.workflow.engine.call("on", self.workflow.name, self.id, op, *args)

    async def status(self) -> InstanceStatus:
        """Status, output and error as they are now."""
        _, status, data = await self._call("status")
        output = decode(data) if status == "complete" else None
        error = _brief(decode(data)) if status == "errored" else None
        return InstanceStatus(status, output, error)

    async def subscribe(
        self, cursor: int | None = None, filter: Iterable[str] | None = None
    ) -> collections.abc.AsyncGenerator[WorkflowHistoryEvent, None]:
        """`async for event in instance.subscribe()`: its history, then live what happens, until the
        instance ends. To go on after a break, give the last `event_id` as `cursor`; `filter` is a
        list of the types to show. Each event comes once, in order.

        Errors: `instance.not_found`, also when it is deleted meanwhile."""
        if not isinstance(cursor, (int, type(None))) or isinstance(cursor, bool):
            raise TypeError(f"cursor is {_show(cursor)}: expected an event_id or None")
        shown = EVENT_TYPES if filter is None else {*filter}
        if unknown := shown - EVENT_TYPES:
            known = ", ".join(sorted(EVENT_TYPES))
            raise ValueError(f"filter has {_show(unknown)}: expected some of {known}")
        history, key = History(self.id), None
        async with contextlib.aclosing(self.follow()) as news:
            async for inst, rows in news:
                if inst is None or key not in (None, inst.key):
                    raise _not_found(self.workflow.name, self.id)
                key = inst.key
                for row in rows:
                    for event in history.events(row):
                        if event.event_id > (cursor or -1) and event.type in shown:
                            yield event
                if inst.status in FINISHED:
                    return

    async def follow(
        self,
    ) -> collections.abc.AsyncGenerator[tuple[Instance | None, list[Row]], None]:
        """The instance with this id, if there is one, and the rows that are new: now, and again
        whenever something has changed."""
        engine, key, seq = self.workflow.engine, 0, 0
        while True:
            changed = engine.watch(self.id)  # before the look, so that nothing is missed
            inst, rows = await engine.call("look", self.workflow.name, self.id, key, seq)
            yield inst, rows
            if inst is not None:
                key, seq = inst.key, inst.seq
            await asyncio.wait({changed})

    async def pause(self) -> None:
        """Pauses it: at once if it is waiting or queued, else (`waitingForPause`) when the
        callbacks in flight have finished. Sleeps, retry delays and event timeouts stand still while
        paused."""
        await self._call("pause")

    async def resume(self) -> None:
        """Goes on from a pause, or cancels one that hasn't taken effect."""
        await self._call("resume")

    async def terminate(self, options: Options = None, /, **given: Any) -> None:
        """Stops it for good, at once. With `rollback=True` (or a dict with that) the rollback
        handlers of its steps run first: it returns when their beginning is recorded, and another
        `terminate()` ends that at once.

        Error: `instance.cannot_terminate` if it has finished."""
        rollback = _merge(options, given, ("rollback",), "terminate").get("rollback", False)
        if not isinstance(rollback, bool):
            raise TypeError(f"rollback is {_show(rollback)}: expected True or False")
        await self._call("terminate", "binding", rollback)

    async def restart(self, options: Options = None, /, **given: Any) -> None:
        """Begins again with the same id, params and timestamp; everything else is erased. With
        `{"from": {"name": …, "count": 1, "type": "do" | "sleep" | "waitForEvent"}}` it begins from
        that step: what started before it is kept (but what `run` cancelled after it begins anew),
        and so are buffered events.

        Error: `instance.cannot_restart` if its history has no such step."""
        start = _merge(options, given, ("from",), "restart").get("from")
        await self._call("restart", None if start is None else _start(start))

    async def delete(self) -> None:
        """Deletes it, in any state, with all that is stored of it. Its id is free at once."""
        await self._call("delete")

    async def send_event(self, options: Options = None, /, **given: Any) -> None:
        """`send_event(type=…, payload=…)`, or a dict of these: stored durably when it returns, and
        delivered to exactly one `wait_for_event` of that type, now or later.

        Errors: `event.invalid_type`, `event.not_serializable`, `instance.not_running`,
        `limit.event_payload`, `limit.instance_state`."""
        await self._call("send_event", *self.workflow._event(options, given, "send_event"))

    async def result(self, timeout: float | str | timedelta | None = None) -> Any:
        """Waits for the end. Returns the output; raises the error that left `run`, or
        `WorkflowError` (`instance.terminated`, `instance.not_found`), or `WorkflowTimeoutError`
        after `timeout`."""
        patience = math.inf if timeout is None else parse_duration(timeout)
        key, status, data = await self._call("status")
        engine = self.workflow.engine
        late: asyncio.Future[None] = engine.loop.create_future()
        timer = engine.clock.call_later(patience, functools.partial(_resolve, late))
        try:
            while status not in FINISHED:
                ended = engine.watch(key)
                present, status, data = await self._call("status")
                if present != key:  # deleted, and its id is used again
                    raise _not_found(self.workflow.name, self.id)
                if status not in FINISHED and late.done():
                    raise WorkflowTimeoutError(f"no result of {self.id!r} within {patience}ms")
                if status not in FINISHED:
                    await asyncio.wait({ended, late}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
        if status == "complete":
            return decode(data)
        if status == "errored":
            raise rebuild_error(decode(data))
        raise _refusal("instance.terminated", f"instance {self.id!r} was terminated")


# --------------------------------------------------------------------------------------------------
# Cloudflare's Python dialect: the decorator form of `step.do`, and the modules that a workflow
# written for Cloudflare's SDK imports.


class StepDecorator(StepCall):
    """`step.do(…)` without a callback: it awaits a function to decorate. If it is itself awaited,
    the callback was forgotten, which the call says then."""

    def __init__(self, *declared: Any) -> None:
        self._declared = declared
        self._coroutine = None

    def __call__(self, function: Callable[..., Any]) -> StepFunction:
        return StepFunction(function, *self._declared)

    def _begin(self) -> Coroutine[Any, Any, Any]:
        if self._coroutine is None:
            run, name, args, _ = self._declared
            super().__init__(run, "do", "" if name is None else name, args[:1], {})
        return super()._begin()


class StepFunction:
    """What the decorator form of `step.do` makes of a function: called without arguments, it is the
    step. Other steps may depend on it: they get its last result, and run it only if there is none.

    developers.cloudflare.com/workflows/python/"""

    def __init__(self, function: Any, run: Run, name: Any, args: Any, options: Any) -> None:
        self._function, self._run, self._args, self._options = function, run, args, dict(options)
        own = getattr(function, "__name__", "step")
        self.__name__ = own if name is None else name
        if args and not isinstance(args[0], Mapping) and (args[0] is not None or len(args) > 1):
            # Cloudflare's first form: (name, depends, concurrent, config)
            self._options |= zip(("depends", "concurrent", "config"), args, strict=False)
            self._args = args[3:]
        self._depends = self._options.pop("depends", None)
        self._concurrent = self._options.pop("concurrent", False)
        self._signature = inspect.Signature()
        with contextlib.suppress(TypeError, ValueError):  # no function, or it doesn't say
            self._signature = inspect.signature(function)
        self._names = [name for name in self._signature.parameters if name != "ctx"]
        latest = run.functions  # by the name of the step, and by that of the function
        known = {n: latest.get(("step", n)) or latest.get(("function", n)) for n in self._names}
        self._by_name = {name: step for name, step in known.items() if step is not None}
        latest["step", str(self.__name__)] = latest["function", own] = self

    def __call__(self, *args: Any, **named: Any) -> StepCall:
        if args or named:
            what = "is called without arguments: it gets its dependencies' results"
            raise _fatal("step.invalid_callback", f"step {self.__name__!r} {what}")
        call = StepCall(self._run, "do", self.__name__, self._args, self._options)
        call.function = self
        return call

    async def perform(self, call: StepCall) -> Any:
        """The dependencies, then the step itself. What it gives is kept for those that depend on
        it in the same scope: that of `run`, or of an attempt whose callback calls steps."""
        outcomes = (call.attempt or self._run).outcomes
        before = outcomes.get(self)
        outcome = outcomes[self] = self._run.loop.create_future()
        try:
            callback = await self._bind(call)
            call.options = call.options | {"callback": callback}
            value = await self._run.perform(call)
        except BaseException as error:
            failed = before and before.done() and (before.cancelled() or before.exception())
            if before and not failed and outcomes[self] is outcome:
                outcomes[self] = before  # a good one, or one that may become it
            if isinstance(error, Exception):
                outcome.set_exception(error)
                outcome.exception()  # whether or not anybody depends on it
            else:
                outcome.cancel()
            raise
        outcome.set_result(copy.deepcopy(value))
        return value

    async def _result(self, scope: Attempt | Run) -> Any:
        """For a step that depends on this one."""
        while (outcome := scope.outcomes.get(self)) is not None and not outcome.cancelled():
            try:
                return copy.deepcopy(await asyncio.shield(outcome))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not outcome.cancelled() or (task is not None and task.cancelling()):
                    raise  # it was us, and not the one who had called it
        return await self()

    async def _bind(self, call: StepCall) -> Any:
        """The function, with the results of its dependencies as arguments."""
        names, depends, found = self._names, self._depends, self._by_name
        if depends is not None:
            legal = isinstance(depends, (list, tuple)) and len(depends) <= len(names)
            if not legal or not all(isinstance(step, StepFunction) for step in depends):
                what = f"depends is {_show(depends)}: expected up to {len(names)} steps, decorated"
                raise _fatal("step.invalid_config", f"step {call.name!r}: {what} with step.do")
            found = dict(zip(names, depends, strict=False))
        if not isinstance(self._concurrent, bool):
            what = f"concurrent is {_show(self._concurrent)}: expected True or False"
            raise _fatal("step.invalid_config", f"step {call.name!r}: {what}")
        for name in names:
            empty = self._signature.parameters[name].default is inspect.Parameter.empty
            if empty and name not in found:
                what = f"the parameter {name!r} is neither `ctx` nor an earlier step"
                raise _fatal("step.invalid_callback", f"step {call.name!r}: {what}")
        scope = call.attempt or self._run
        if self._concurrent:
            results = await asyncio.gather(*(step._result(scope) for step in found.values()))
        else:
            results = [await step._result(scope) for step in found.values()]
        if not found:
            return self._function
        bound = self._signature.bind_partial()
        bound.arguments.update(zip(found, results, strict=True))
        return functools.partial(self._function, *bound.args, **bound.kwargs)


def install_workers_shim() -> None:
    """Makes `from workers import WorkflowEntrypoint` and `from workers.workflows import
    NonRetryableError` find this module, unless a real `workers` package is there. What a Worker
    has beside workflows imports as an inert placeholder.

    developers.cloudflare.com/workflows/python/"""
    if "workers" in sys.modules or getattr(importlib.util.find_spec("workers"), "origin", None):
        return  # (one without an origin is just a folder of that name)
    package, module = types.ModuleType("workers"), types.ModuleType("workers.workflows")
    for name in _INERT.split():
        setattr(package, name, type(name, (_Placeholder,), {}))
    vars(package).update(WorkflowEntrypoint=WorkflowEntrypoint, workflows=module, __path__=[])
    vars(module).update(NonRetryableError=NonRetryableError)
    sys.modules |= {"workers": package, "workers.workflows": module}


_INERT = """Blob DurableObject FetchResponse File FormData Headers Request Response WorkerEntrypoint
    env fetch handler patch_env python_from_rpc python_to_rpc waitUntil wait_until"""


class _Placeholder:
    """Takes anything, does nothing."""

    def __init__(self, ctx: Any = None, env: Any = None, *_: Any, **__: Any) -> None:
        self.ctx, self.env = ctx, env


# --------------------------------------------------------------------------------------------------
# Test tools: introspection, which looks into the instances of a test and changes what happens to
# them, without a change to their workflow; and a clock that moves only when told, so that a year of
# sleeps is tested in milliseconds.
#
# The engine asks the open blocks at four points: when an instance starts (for its events), when a
# wait begins, when a retry delay does, and when an attempt is launched.


class WorkflowInstanceModifier:
    """What `modify` hands to its function. A method acts at once, on all that begins from then on,
    and may also be awaited. A step is its name, or `{"name": …, "index": 2}` for the second of that
    name.

    developers.cloudflare.com/workers/testing/vitest-integration/test-apis/"""

    def __init__(self, workflow: Workflow, id: str | None = None) -> None:
        self.workflow, self.id = workflow, id
        self.after = 0  # the key of the last instance that is too old
        self.events: list[tuple[str, str]] = []  # types and payloads; the writer's
        self._skipped: set[tuple[Any, ...]] = set()  # (kind of wait,), or (kind, name, count)
        # By step, and by what is set for it: the last attempt that it is for, and how that ends.
        self._mocks: dict[tuple[str, int], dict[str, tuple[float, Callable[[Attempt], Any]]]] = {}
        self._sending: list[asyncio.Future[Any]] = []
        self._parts: dict[str, WorkflowInstanceIntrospector] = {}

    def __await__(self) -> Any:
        yield from asyncio.gather(*self._sending).__await__()

    def disable_sleeps(self, steps: Iterable[Any] | None = None) -> Self:
        """Sleeps are over at once: all, or those in a list of steps."""
        return self._skip("sleep", steps)

    def disable_retry_delays(self, steps: Iterable[Any] | None = None) -> Self:
        """Retries follow at once: of all steps, or of those in a list."""
        return self._skip("retry", steps)

    def force_event_timeout(self, step: Any) -> Self:
        """This `wait_for_event` times out at once, whatever events there are."""
        return self._skip("wait", [step])

    def mock_step_result(self, step: Any, value: Any) -> Self:
        """The step returns this value, without running its callback.

        Error: `step.not_serializable`."""
        text, _ = checked(value, "the result", "step.not_serializable")
        return self._mock(step, "a result", None, lambda _: decode(text))

    def mock_step_error(self, step: Any, error: Any, times: int | None = None) -> Self:
        """Each attempt, or each of the first `times`, fails with this error instead of running the
        callback. Retries go on as configured."""
        if not isinstance(error, Exception):
            raise TypeError(f"{_show(error)} is not an error: expected an Exception object")
        return self._mock(step, "an error", times, lambda _: error.with_traceback(None))

    def force_step_timeout(self, step: Any, times: int | None = None) -> Self:
        """Each attempt, or each of the first `times`, times out at once, without running the
        callback. Retries go on as configured."""
        return self._mock(step, "a timeout", times, Attempt.timeout_error)

    def mock_event(self, options: Any = None, /, **given: Any) -> Self:
        """Sends an event as `send_event` does: to each instance, now or when it starts, and again
        when it starts anew."""
        self._check_open()
        event = self.workflow._event(options, given, "mock_event")
        sending = self.workflow.engine.call("mock_event", self, *event)
        self._sending.append(asyncio.ensure_future(sending))
        return self

    def _skip(self, kind: str, steps: Iterable[Any] | None) -> Self:
        if isinstance(steps, (str, Mapping)):
            raise TypeError(f"steps is {_show(steps)}: expected a list of steps, or None for all")
        self._skipped |= {(kind, *_named(s)) for s in steps} if steps is not None else {(kind,)}
        return self._check_open()

    def _mock(self, step: Any, what: str, times: Any, end: Callable[..., Any]) -> Self:
        if times is not None and (type(times) is not int or times < 1):
            raise ValueError(f"times is {_show(times)}: expected a whole number from 1, or None")
        mocks = self._mocks.setdefault(_named(step), {})
        for other, (last, _) in mocks.items():
            if other != what and (last == math.inf) == (times is None):
                both = f"both {other} and {what}, unless just one of them has `times`"
                raise ValueError(f"a contradiction: step {_show(step)} can't have {both}")
        mocks[what] = (times or math.inf, end)
        return self._check_open()

    def _check_open(self) -> Self:
        if self not in self.workflow.engine.store.introspections:
            raise RuntimeError("only inside the block: `async with workflow.introspect…() as …`")
        return self

    # -- what the engine asks

    def covers(self, workflow: str, inst: Instance | Run) -> bool:
        """Whether this block is about that instance."""
        mine = workflow == self.workflow.name and inst.key > self.after
        return mine and self.id in (None, inst.id)

    def skips(self, kind: str, run: Run, call: StepCall) -> bool:
        """Whether this wait or retry delay is over at once."""
        asked = {(kind,), (kind, call.name, call.count)}
        return bool(asked & self._skipped) and self.covers(run.bound.name, run)

    def substitute(self, attempt: Attempt) -> Callable[[], Coroutine[Any, Any, Any]] | None:
        """What runs instead of the callback, if anything does."""
        run, step = attempt.run, (attempt.call.name, attempt.call.count)
        mocks = [mock for mock in self._mocks.get(step, {}).values() if attempt.number <= mock[0]]
        if not mocks or attempt.call.kind != "do" or not self.covers(run.bound.name, run):
            return None
        _, end = min(mocks, key=lambda mock: mock[0])
        return functools.partial(_give, end(attempt))


async def _give(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


class _Introspector(WorkflowInstanceModifier):
    """A block of a test. It is the modifier that it hands out."""

    async def __aenter__(self) -> Self:
        self.workflow.engine._check_open()
        self.workflow.engine.store.introspections.append(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        blocks = self.workflow.engine.store.introspections
        blocks[:] = [block for block in blocks if block not in (self, *self._parts.values())]
        for state in (self.events, self._skipped, self._mocks, self._parts):
            state.clear()

    async def modify(self, function: Callable[[WorkflowInstanceModifier], Any]) -> Self:
        """Calls a function (sync or async) with a `WorkflowInstanceModifier`. What it sets survives
        restarts and hibernation, and ends with the block. Blocks add up; where two set different
        ends of a step, the inner one counts."""
        self._check_open()
        result = function(self)
        if inspect.isawaitable(result):
            await result
        await self
        return self


class WorkflowInstanceIntrospector(_Introspector):
    """One instance, for a test: `async with workflow.introspect_instance(id) as one`. The waits
    also wait for its creation.

    developers.cloudflare.com/workers/testing/vitest-integration/test-apis/"""

    async def wait_for_step_result(self, step: Any) -> Any:
        """Waits until a `do` or a `wait_for_event` has ended; returns its result, or raises its
        error. `WorkflowError` if the instance finishes without."""
        types = ("done", "error", "event", "timeout")
        row = await self._row("{}-{}".format(*_named(step)), types, f"step {_show(step)} ended")
        if row.type in ("error", "timeout"):
            raise rebuild_error(decode(row.data or ""))
        return _step_event(row.data, row.extra) if row.type == "event" else decode(row.data or "")

    async def wait_for_status(self, status: str) -> None:
        """Waits until the instance has this status, or has had it since the call. `WorkflowError`
        if it finishes in another one."""
        known = (*LIVE, "paused", *FINISHED)
        if status not in known:
            raise ValueError(f"{_show(status)} is not a status: expected one of {', '.join(known)}")
        await self._reach(status)

    async def get_output(self) -> Any:
        """Waits for the end; returns the output. `WorkflowError` if there is none."""
        return await self._reach("complete")

    async def get_error(self) -> dict[str, str]:
        """Waits for the end; returns the error, `{"name", "message"}`. `WorkflowError` if there is
        none."""
        return _brief(await self._reach("errored"))

    async def _reach(self, status: str) -> Any:
        types = ("started", "running", "rollback") if status == "running" else (status,)
        return decode((await self._row("", types, f"it became {status}")).data or "null")

    async def _row(self, label: str, types: Sequence[str], what: str) -> Row:
        """The first row of these types, of a step or (without a label) of the instance. Of its past
        statuses, only the present one counts."""
        instance, present = WorkflowInstance(self.workflow, self.id or ""), not label
        async with contextlib.aclosing(instance.follow()) as news:
            async for inst, rows in news:
                rows = [r for r in rows if step_label(r.step) == label and r.type != "sent"]
                for row in rows[-1:] if present else rows:
                    if row.type in types and not (row.step or "").startswith(ROLLBACK):
                        return row
                if inst is not None and inst.status in FINISHED:
                    raise WorkflowError(f"{self.id!r} is {inst.status} before {what}")
                present = False
        raise AssertionError  # it is followed until we go


class WorkflowIntrospector(_Introspector):
    """All instances of a workflow that are created inside the block, for a test:
    `async with workflow.introspect() as all_instances`.

    developers.cloudflare.com/workers/testing/vitest-integration/test-apis/"""

    async def __aenter__(self) -> Self:
        older = await self.workflow.engine.call("created", self.workflow.name)
        self.after = older[-1].key if older else 0
        return await super().__aenter__()

    async def get(self) -> list[WorkflowInstanceIntrospector]:
        """An introspector for each instance, oldest first; what they modify ends with this
        block."""
        self._check_open()
        made = await self.workflow.engine.call("created", self.workflow.name, self.after)
        ids = [inst.id for inst in made if inst.id is not None]
        for id in ids:
            if id not in self._parts:
                one = WorkflowInstanceIntrospector(self.workflow, id)
                self._parts[id] = await one.__aenter__()
        return [self._parts[id] for id in ids]


class _Timer:
    """A timer of a `ManualClock`; cancelled like any of asyncio's."""

    def __init__(self, clock: ManualClock, due: float, callback: Callable[[], object]) -> None:
        self.clock, self.due, self.callback = clock, due, callback

    def cancel(self) -> None:
        self.clock.timers.pop(self, None)


class ManualClock(Clock):
    """A clock for tests: `Engine(clock=ManualClock())`, then `await clock.advance("3 days")`.

    What falls due on the way happens in its order, and after each moment every instance runs until
    it waits again. Sleeps, retry delays, event and attempt timeouts, hibernation, retention and
    `result(timeout=…)` go by it. It never waits for a callback that is blocked on something
    real."""

    exact = True

    def __init__(self, start: datetime | float | None = None) -> None:
        super().__init__()
        self._now = Clock.now(self) if start is None else _parse_moment(start)
        self.timers: dict[_Timer, None] = {}  # a set in the order in which they were made
        self._lock = asyncio.Lock()  # one `advance` after the other

    def now(self) -> int:
        return self._now

    def call_later(self, ms: float, callback: Callable[[], object]) -> Any:
        timer = _Timer(self, self._now + ms, callback)
        self.timers[timer] = None
        return timer

    async def advance(self, duration: float | str | timedelta) -> None:
        """Moves the time on; returns when nothing more happens by itself."""
        ms = parse_duration(duration)
        if _attempt.get() is not None:
            raise RuntimeError("advance() inside a step's callback would wait for itself")
        async with self._lock:
            target = self._now + ms
            await self.settle()
            while (due := self._next_due()) <= target or self._now < target:
                self._now = max(self._now, math.ceil(min(due, target)))
                await self.settle()
                self._fire()
                await self.settle()

    def _next_due(self) -> float:
        wakes = (engine.store.next_wake for engine in self.engines if engine.store.owner)
        return min((*wakes, *(timer.due for timer in self.timers)), default=math.inf)

    def _fire(self) -> None:
        for timer in sorted(self.timers, key=lambda timer: timer.due):
            if timer.due <= self._now and timer in self.timers:  # not cancelled by one before it
                timer.cancel()
                timer.callback()

    async def settle(self) -> None:
        """Returns when every instance waits: for ten turns of the loop nothing has happened."""
        for engine in self.engines:
            with contextlib.suppress(WorkflowInternalError):
                await engine.call("nothing")
        quiet, seen = 0, -1
        while quiet <= SETTLED:
            activity = sum(engine.activity for engine in self.engines)
            busy = any(engine.busy() for engine in self.engines)
            quiet = quiet + 1 if activity == seen and not busy else 0
            seen = activity
            await asyncio.sleep(0.0002 if busy else 0)


# Cloudflare's own spellings: createBatch, sendEvent, sleepUntil, waitForEvent, getOutput, …
_api: tuple[type, ...] = (Workflow, WorkflowInstance, WorkflowStep, WorkflowInstanceModifier)
for _class in (*_api, WorkflowInstanceIntrospector):
    for _name in [name for name in vars(_class) if "_" in name and name[0] != "_"]:
        setattr(_class, _camel(_name), getattr(_class, _name))
WorkflowEvent.instanceId = property(lambda event: event.instance_id)  # type: ignore[attr-defined]
WorkflowEvent.workflowName = property(lambda event: event.workflow_name)  # type: ignore[attr-defined]
WorkflowRollbackContext.stepName = property(lambda info: info.step_name)  # type: ignore[attr-defined]
WorkflowIntrospector.modifyAll = WorkflowIntrospector.modify  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------
# Command line: `python3 workflows.py demo`.


class _MyWorkflow(WorkflowEntrypoint[dict[str, str]]):
    """The Quick Start of Cloudflare's documentation, with a retry and an approval."""

    async def run(self, event: WorkflowEvent[dict[str, str]], step: WorkflowStep) -> Any:
        async def fetch() -> dict[str, Any]:
            return {"id": event.payload["userId"], "process": os.getpid()}

        user = await step.do("fetch user", fetch)
        await step.sleep("wait before processing", "1 second")

        async def process(ctx: WorkflowStepContext) -> dict[str, Any]:
            if ctx.attempt == 1:
                await asyncio.sleep(3600)  # its process is killed here
            return {"processed": True, "user": user["id"], "process": os.getpid()}

        once_more = {"retries": {"limit": 3, "delay": "1 second"}}
        result = await step.do("process action", once_more, process)
        approval = await step.wait_for_event("wait for approval", "user_approval", timeout="7 days")
        return result | {"approved": approval.approved}


_SHOWN = ("attempt", "error", "retry_delay_ms", "output")


async def _run_demo(database: str) -> None:
    """What both processes of the demo do: create the instance, or go on with it, to the end."""
    async with Engine(database) as engine:
        workflow = engine.bind(_MyWorkflow)
        await workflow.create_batch([{"id": "demo", "params": {"userId": "123"}}])  # only once
        instance = await workflow.get("demo")
        events = []
        async for event in instance.subscribe():
            events.append(event)
            at = (event.timestamp - events[0].timestamp).total_seconds()
            told = [f"{key}: {event[key]}" for key in _SHOWN if event.get(key) is not None]
            line = f"{at:7.3f} s  {event.get('step_name', ''):25}{event.type:20}{', '.join(told)}"
            print(line, flush=True)
            if event.type == "wait_started":
                await instance.send_event(type="user_approval", payload={"approved": True})
        print(f"\noutput: {await instance.result()}")
        runs = Counter(event.step_name for event in events if event.type == "step_completed")
        print(*(f"finished {count} time: {label}" for label, count in runs.items()), sep="\n")
        if set(runs.values()) != {1}:
            raise SystemExit("a finished step ran again: this must not happen")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="workflows.py", description="Durable workflows.")
    parser.add_argument("command", choices=["demo"], help="kills a workflow's process; it goes on")
    parser.add_argument("--engine", metavar="DATABASE", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        if given.engine:
            asyncio.run(_run_demo(given.engine))
            return
        with tempfile.TemporaryDirectory() as folder:
            database = os.path.join(folder, "demo.db")
            command = [sys.executable, __file__, "demo", "--engine", database]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                print(f"process {child.pid} runs the workflow …\n", flush=True)
                try:
                    for line in child.stdout or ():
                        print(line, end="", flush=True)
                        if "attempt_started" in line and "process action" in line:
                            break
                finally:
                    child.kill()
            killed = f"process {child.pid} was killed (SIGKILL) in the middle of 'process action'"
            print(f"\n{killed}; another one replays and goes on …\n", flush=True)
            sys.exit(subprocess.run(command).returncode)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
