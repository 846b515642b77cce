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

The whole idea fits into a few lines. Whatever `run` does outside of steps it does again in each
life; what a step did is done once:

    journal = []                              # on disk, in real life: what has happened, in order

    def replay(run):
        recorded = dict(journal)              # step → result

        def do(step, callback):
            if step not in recorded:          # it has not finished yet: so it runs, and what it
                result = callback()           # returns is appended before anybody sees it
                journal.append((step, result))
                recorded[step] = result
            return recorded[step]

        return run(do)                        # always from the top, however often the process died

Below is the same, but stored, concurrent, and asleep most of the time.

    Part I, the heart      the words; the journal; the database; transactions; scheduling; lives;
                           replay; a run; attempts; what a run records; news
    Part II, the rules     the machinery: writing; the engine; executions; and the rules: durations
                           and the clock; records; codec (values and errors); limits; arguments;
                           retries
    Part III, the sides    the API; files; operations; binding; cancelled and nested calls;
                           rollback; replay reports; history; usage; the Python dialect;
                           introspection and the clock of tests; aliases; schedules; configuration;
                           showing; resources; HTTP and its page; the demo; the command line

Whoever reads the first part knows how durable execution works. Each section of the second can be
read alone. Each section of the third could be left out: the heart calls it in one place or two.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import builtins
import contextlib
import contextvars
import copy
import dataclasses
import functools
import hmac
import http.client
import http.server
import importlib
import importlib.abc
import importlib.machinery
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import types
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import uuid
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from datetime import UTC, date, datetime, timedelta
from keyword import iskeyword
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    NamedTuple,
    NoReturn,
    Self,
    cast,
    dataclass_transform,
    overload,
)

__all__ = [
    "Clock", "Engine", "InstanceStatus", "Limits", "ManualClock", "NonRetryableError", "Usage",
    "Workflow", "WorkflowDelayContext", "WorkflowEntrypoint", "WorkflowError", "WorkflowEvent",
    "WorkflowFatalError", "WorkflowHistoryEvent", "WorkflowInstance",
    "WorkflowInstanceIntrospector", "WorkflowInstanceModifier", "WorkflowInternalError",
    "WorkflowIntrospector", "WorkflowReplay", "WorkflowRollbackContext", "WorkflowSchedule",
    "WorkflowStep", "WorkflowStepContext", "WorkflowStepEvent", "WorkflowStepInfo",
    "WorkflowSubscription", "WorkflowTimeoutError", "install_workers_shim", "parse_duration",
]  # fmt: skip

log = logging.getLogger("workflows")
changes = log.getChild("changes")  # each change of an instance, at DEBUG: see "HTTP"

if TYPE_CHECKING:  # so that `WorkflowEntrypoint` alone is one of any params, for type checkers
    from typing_extensions import TypeVar

    Params = TypeVar("Params", default=Any)
else:
    from typing import TypeVar

    Params = TypeVar("Params")
Result = TypeVar("Result")
AsyncFunction = Callable[..., Awaitable[Result]]
Pending = Coroutine[object, None, Result]  # (`Any` here would make mypy give up on `gather`)

# ==================================================================================================
# Part I: the heart
# ==================================================================================================
#
# --------------------------------------------------------------------------------------------------
# The words: statuses and errors.
#
# An instance moves through eight statuses (Cloudflare's names, also in the database):
#
#     queued ──▶ running ──▶ complete | errored | terminated
#       ▲         │     ╲
#       │         ▼      ▶ waitingForPause ──▶ paused
#       └───── waiting
#
# A caller moves it by `pause` (queued, waiting → paused; running → waitingForPause), `resume`
# (paused → queued or waiting; waitingForPause → running), `terminate`, and `restart` (→ queued,
# from anywhere). All other moves are the engine's. What ran when its process ended is queued again;
# what was about to pause is paused. A status says nothing about memory: an instance that waits or
# is queued may still be loaded, and its `run` may go on by itself, and finish.
#
# Every duration, here and in the whole file, is a number of milliseconds, and every moment one
# since 1970, unless something else is said.

FINISHED = ("complete", "errored", "terminated")
LIVE = ("running", "waiting", "queued", "waitingForPause")  # in these a run may write
STATUSES = (*LIVE, "paused", *FINISHED)


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


class Unreadable(WorkflowInternalError):
    """A stored record was damaged on the disk, where SQLite could not see it. Its instance stops
    where it is, and no error is recorded for it."""


class LeaseLost(WorkflowError):
    """What a run wanted to write is not written, because it may not write any more: see `Lease`."""


NOT_RETRIED = (NonRetryableError, WorkflowFatalError)
ErrorMaker = Callable[[str, str], WorkflowError]  # of a code and a message


def refusal(code: str, message: str) -> WorkflowError:
    """What a caller's call raises."""
    return WorkflowError(message, code=code)


def fatal(code: str, message: str) -> WorkflowFatalError:
    """What a step call raises."""
    return WorkflowFatalError(message, code=code)


# --------------------------------------------------------------------------------------------------
# The journal: what is recorded, and what it means.
#
# The journal of an instance is the only thing that a replay knows. Rows are appended to it, and
# never changed; only a restart takes some away. An instance is in memory from time to time. Each of
# these stays is a life (see "Lives"), and what happens in a life is recorded as it happens. (A step
# is a call of `step.do`, `step.sleep` or `step.wait_for_event` in `run`; a `do` has a callback,
# which is attempted, and attempted again if it fails.)
#
#     type                               step    what has happened
#     queued running waiting             –       The instance has this status now. The first row of
#       waitingForPause paused                   all, `queued`, holds the params, `complete` holds
#       complete errored terminated              the output, `errored` the error.
#     started                            –       It is `running` for the first time.
#     start                              do      An attempt began.
#     done | failed | error              do      The attempt ended: with a result, with a failure
#                                                that is retried, with a failure for good. If the
#                                                attempt has no row `start`, the column `began`
#                                                says when it began. The first of all these rows of
#                                                a step holds its configuration in `extra`.
#     due                                do      The delay before the next attempt is over.
#     sleep → slept                      sleep   `sleep_until` is a sleep, too.
#     wait → event | timeout             wait    The event is consumed in this very row; `extra`
#                                                says where it came from.
#     cancel                             any     `run` itself has cancelled the call; `extra` is
#                                                the key of the step whose end it had come to know
#                                                last, or null.
#     stop                               any     A clean stop, a restart, or the callback around the
#                                                call has interrupted the step: the attempt, the
#                                                sleep or the wait that was under way counts as not
#                                                begun. (What has failed before still counts.)
#     sent                               –       An event was put into the instance's buffer.
#     rollback                           –       From here on only rollback handlers run; `data` is
#                                                the error that they undo.
#
# A step's key is its kind, its name and its count. The key of a step that the callback of another
# step calls begins with the key of that other step. A rollback handler is a step of the kind
# "rollback": its key is that word, followed by the key of the step that it undoes.
#
# The functions of this section are pure: they read rows, and touch nothing else.


class Row(NamedTuple):
    """A row of the journal. `data` and `extra` are JSON (or empty), `began` is a moment; `seq` and
    `at` (a moment, too) are given to it when it is appended."""

    type: str
    step: str | None = None
    attempt: int | None = None
    data: str | None = None
    extra: str | None = None
    began: int | None = None
    seq: int = 0
    at: int = 0


STEP_KINDS = ("do", "sleep", "wait_for_event")
SEPARATOR = "\n"  # between the parts of a key: names hold no control characters
ROLLBACK = "rollback" + SEPARATOR


def step_label(key: str | None) -> str:
    """`<name>-<count>`, as Cloudflare shows a step."""
    return "-".join((key or "").split(SEPARATOR)[-2:])


# Slots, here and elsewhere: what there are many of costs the garbage collector time.
@dataclasses.dataclass(slots=True, eq=False)
class Step:
    """What the journal says about one step."""

    key: str
    state: str = "new"  # → pending → done | error | cancelled
    attempts: int = 0
    open: bool = False  # the last attempt has begun, and has no end
    asleep: bool = False  # in a sleep, an event wait or a retry delay
    config: str | None = None  # as it was when the first attempt began
    data: str | None = None  # the result, or the error
    extra: str | None = None

    @property
    def nested(self) -> bool:
        """Whether its result does not go to `run`: a callback has called it, or it is a rollback
        handler. (Then its key has more than the three parts kind, name and count.)"""
        return self.key.count(SEPARATOR) > 2


ENDED = ("done", "error")  # the states of a step that has a result, or has failed for good

# What a row says about its step from then on: open, asleep, and its state. (`stop`: see `apply`.)
_MEANING = {
    "start": (True, False, "pending"),
    "done": (False, False, "done"),
    "failed": (False, True, "pending"),
    "error": (False, False, "error"),
    "due": (False, False, "pending"),
    "sleep": (False, True, "pending"),
    "slept": (False, False, "done"),
    "wait": (False, True, "pending"),
    "event": (False, False, "done"),
    "timeout": (False, False, "error"),
    "cancel": (False, False, "cancelled"),
}


def apply(steps: dict[str, Step], row: Row) -> Step | None:
    """Takes one row into account. Returns the step if the row is a result for `run`, or says that
    `run` has cancelled the call: what `run` has seen of these, it must see again in the same
    order."""
    if row.step is None:
        return None
    if (step := steps.get(row.step)) is None:
        step = steps[row.step] = Step(row.step)
    if row.type == "stop":
        step.attempts -= 1 if step.open else 0
        step.open = step.asleep = False
        if step.config is None:  # a sleep, a wait, or a step without any attempt
            del steps[row.step]
        return None
    if row.attempt is not None:
        step.attempts = row.attempt
        if step.config is None:
            step.config = row.extra or ""  # "" is the default configuration
    step.open, step.asleep, state = _MEANING[row.type]
    if step.state in (*ENDED, "cancelled") and state != "cancelled":
        return None  # the first end counts (but `run` may cancel what it has never seen the end of)
    step.state = state
    if state == "pending":
        return None
    if state in ENDED:
        step.data, step.extra = row.data, row.extra
    return None if step.nested else step


def fold(rows: Iterable[Row]) -> tuple[dict[str, Step], OrderedDict[str, Step]]:
    """The steps of a history; and those of them that have a result for `run`, or were cancelled by
    it, in the order in which `run` came to know of that. (What it had not seen yet when it
    cancelled a call comes behind the cancellation, although it may have been recorded before.)"""
    steps: dict[str, Step] = {}
    inbox: OrderedDict[str, Step] = OrderedDict()
    unseen: OrderedDict[str, Step] = OrderedDict()  # what no cancellation so far has come behind
    for row in rows:
        if (step := apply(steps, row)) is None:
            continue
        if row.type != "cancel":
            unseen[step.key] = step
            continue
        unseen.pop(step.key, None)  # a step can be cancelled when it already has a result
        last: str | None = next(reversed(unseen), None)
        if row.extra is not None:
            last = read_back(row.extra, f"row {row.seq}")
        while last in unseen:
            key, seen = unseen.popitem(last=False)
            inbox[key] = seen
        inbox[step.key] = step
    if not inbox:  # nothing was cancelled
        return steps, unseen
    inbox.update(unseen)
    return steps, inbox


class Wait(NamedTuple):
    """What an instance waits for: the end of a sleep or of a retry delay (then `event` is None), or
    an event of that type until `due`. `kind` is "sleep", "retry" or "wait"."""

    kind: str
    step: str
    event: str | None
    due: int
    fixed: bool = False  # a pause does not move `due` (`sleep_until`)
    seq: int = 0  # of its row in the journal
    at: int = 0


class WaitEnd(NamedTuple):
    """When a wait ended, and (seq, at) of the buffered event that ended it, if one did."""

    at: int
    wait: Wait
    event: tuple[int, int] | None


def end_waits(
    waits: Iterable[Wait], events: Mapping[str | None, Sequence[tuple[int, int]]], now: int
) -> list[WaitEnd]:
    """Which waits have ended by now, in the order in which they did, however late we look. Each
    waiter, first come first served, takes the oldest event of its type, if that came by the
    waiter's deadline."""
    buffered = {type: deque(queue) for type, queue in events.items()}
    ended = []
    for wait in waits:
        mine = buffered.get(wait.event)
        if mine and mine[0][1] <= wait.due:
            event = mine.popleft()
            ended.append(WaitEnd(max(event[1], wait.at), wait, event))
        elif wait.due <= now:
            ended.append(WaitEnd(wait.due, wait, None))
    return sorted(ended, key=lambda end: (end.at, end.wait.seq))


# --------------------------------------------------------------------------------------------------
# The database: one file, one connection, one process that runs the instances.
#
# The rows are the truth; nobody's memory is. Every write of a run checks, in the same transaction,
# that the instance still has the generation that the run began with, and a status of `LIVE`: when
# an instance has finished, is paused, or has begun anew, by whichever process, its old run writes
# nothing more.
#
# Any number of processes may use the file. One of them, the owner, runs the instances: the one that
# holds an exclusive transaction on a second, empty database. SQLite knows how to lock on every
# platform; a process that is slow keeps the lock, and one that dies lets go of it.

APPLICATION_ID = 0x57664C77  # "WfLw"
KNOWN = 10_000  # so many instances are remembered at most: see `Database.known`
_SCHEMA = (  # by version: what leads to it from the one before
    """
CREATE TABLE numbers (             -- counts keys and places in the queue
    last INTEGER NOT NULL);
INSERT INTO numbers VALUES (0);
CREATE TABLE workflows (           -- the names that were bound, for clients without the classes
    key INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, binding TEXT NOT NULL, class TEXT NOT NULL,
    script TEXT, steps INTEGER, created INTEGER NOT NULL, modified INTEGER NOT NULL);
CREATE TABLE instances (
    key INTEGER PRIMARY KEY, workflow INTEGER NOT NULL,
    id TEXT,                       -- NULL once deleted, until the owner has cleared it away
    trigger TEXT NOT NULL, created INTEGER NOT NULL,
    success_retention INTEGER, error_retention INTEGER,
    status TEXT NOT NULL,
    generation INTEGER NOT NULL,   -- raised by restart, rollback, terminate and delete: see `Lease`
    careful INTEGER NOT NULL,      -- it was running when its process died: see "Attempts"
    place INTEGER,                 -- in the queue; of a paused one, where it goes back to
    wake INTEGER,                  -- when the owner must attend to it: see "Scheduling"
    started INTEGER, ended INTEGER, paused INTEGER,
    termination TEXT, rollback TEXT,               -- see "Rollback"
    counted_bytes INTEGER NOT NULL, counted_steps INTEGER NOT NULL,  -- see "Usage"
    UNIQUE (workflow, id));
CREATE INDEX queue ON instances (workflow, status, place);
CREATE INDEX due ON instances (workflow, wake) WHERE wake IS NOT NULL;
CREATE INDEX listing ON instances (workflow, key);
CREATE TABLE journal (
    instance INTEGER NOT NULL, seq INTEGER NOT NULL,
    bytes INTEGER NOT NULL,        -- of params, outputs and buffered events, as of this row
    steps INTEGER NOT NULL,        -- that have begun up to this row, before restarts, too
    at INTEGER NOT NULL, type TEXT NOT NULL, step TEXT, attempt INTEGER, data TEXT, extra TEXT,
    began INTEGER,
    PRIMARY KEY (instance, seq)) WITHOUT ROWID;
CREATE TABLE waits (               -- each with the number of its row in the journal, like events
    instance INTEGER NOT NULL, kind TEXT NOT NULL, step TEXT NOT NULL, event TEXT,
    due INTEGER NOT NULL, fixed INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL,
    PRIMARY KEY (instance, seq)) WITHOUT ROWID;
CREATE TABLE events (              -- the buffer: sent, and not consumed
    instance INTEGER NOT NULL, type TEXT NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL,
    payload TEXT NOT NULL,
    PRIMARY KEY (instance, type, seq)) WITHOUT ROWID;
CREATE TABLE schedules (           -- see "Schedules"
    workflow INTEGER NOT NULL, cron TEXT NOT NULL, next INTEGER NOT NULL,
    PRIMARY KEY (workflow, cron)) WITHOUT ROWID;
CREATE TABLE usage (               -- see "Usage"
    month TEXT PRIMARY KEY, requests INTEGER, steps INTEGER, cpu_ms REAL,
    storage_bytes INTEGER) WITHOUT ROWID;
""",
)
SCHEMA_VERSION = len(_SCHEMA)


class Database:
    """The file and its lock. Two threads use them, one at a time: see "Writing"."""

    owned: ClassVar[set[str]] = set()  # the paths of all that this process owns

    def __init__(self, path: str) -> None:
        self.path = path
        self.owner = False  # whether this process runs the instances
        self.files: Files | None = None
        # Instances as the last transaction left them, by key, as long as nobody else writes.
        self.known: dict[int, Instance] = {}
        self._data_version = 0  # what SQLite said when we last asked whether others wrote
        self._others_wrote = False

    def open(self) -> None:
        """Opens or makes the file, in one transaction, so that it always says whose it is."""
        if sqlite3.sqlite_version_info < (3, 35):  # the first that knows RETURNING
            raise WorkflowInternalError(f"needs SQLite 3.35, and this is {sqlite3.sqlite_version}")
        on_disk = self.path != ":memory:"
        if on_disk:
            refuse_what_is_not_ours(self.path)
        paths = [self.path, self.path + "-owner" if on_disk else self.path]
        self._db, self._ownership = (
            sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
            for path in paths
        )
        self.execute, self.executemany = self._db.execute, self._db.executemany
        self._insist("PRAGMA synchronous = FULL")
        self._insist("PRAGMA fullfsync = 1")
        self.begin(patient=True)
        version = schema_version(self._db)
        for script in _SCHEMA[version:]:
            for statement in script.split(";\n"):
                self.execute(statement)
        if version < SCHEMA_VERSION:
            self.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._insist("COMMIT")
        if on_disk:
            if self._insist("PRAGMA journal_mode = WAL") != [("wal",)]:
                raise WorkflowInternalError("the file system does not support SQLite's WAL mode")
            # A commit that overwrites the log takes half as long as one that makes it longer, and
            # so few pages are written back in less than a millisecond.
            self.execute("PRAGMA wal_autocheckpoint = 100")
            self.execute(f"PRAGMA journal_size_limit = {LONG_LOG}")
            self.others_wrote()  # the first read makes the log
            self.files = Files(self.path)

    def close(self) -> None:
        """Closes the file, and lets go of the lock."""
        if self.owner:
            self.owned.discard(self.path)
        self.owner = False
        with contextlib.suppress(AttributeError, sqlite3.Error):  # not open yet, or it has failed
            self._ownership.close()
            self._db.close()

    def rows(self, sql: str, *args: Any) -> list[Any]:
        """The rows of a query."""
        try:
            return self.execute(sql, args).fetchall()
        except sqlite3.OperationalError as error:
            if hasattr(error, "sqlite_errorcode"):
                raise
            raise Unreadable(str(error)) from None  # by Python, not by SQLite: it is no UTF-8

    def one(self, sql: str, *args: Any) -> Any:
        """The row of a query that has one."""
        (row,) = self.rows(sql, *args)
        return row

    def begin(self, patient: bool) -> bool:
        """Begins a transaction that may write. False if another process is in one, and we are not
        patient."""
        if patient:
            self._insist("BEGIN IMMEDIATE")
            return True
        return _get_lock(self._db, "BEGIN IMMEDIATE") is not None

    def _insist(self, sql: str) -> list[Any]:
        """Waits for a lock that another process holds, but not for long without notice. (SQLite's
        own way to wait sleeps too long to be fair, and gives up.)"""
        began = time.monotonic()
        while (rows := _get_lock(self._db, sql)) is None:
            if time.monotonic() > began + 5:
                began = math.inf
                log.warning("%s: another process has held a lock for 5 s; waiting", self.path)
            time.sleep(0.001)
        return rows

    def contend(self) -> bool:
        """Tries to become the owner; says whether this process is the owner now."""
        if not self.owner and _get_lock(self._ownership, "BEGIN EXCLUSIVE") is not None:
            self.owner = True
            self.owned.add(self.path)
        return self.owner

    def refresh(self) -> bool:
        """Each transaction begins with this. Forgets the instances that it remembers, if another
        connection has written, or if there are too many of them. Returns whether another one has
        written."""
        before = self._data_version
        (self._data_version,) = self.execute("PRAGMA data_version").fetchone()
        others_wrote: bool = self._data_version != before
        self._others_wrote |= others_wrote
        if others_wrote or len(self.known) > KNOWN:
            self.known.clear()
        return others_wrote

    def others_wrote(self) -> bool:
        """Whether another connection has written since we last asked."""
        self.refresh()
        answer, self._others_wrote = self._others_wrote, False
        return answer


def _get_lock(db: sqlite3.Connection, sql: str) -> list[Any] | None:
    """What a statement gives; None if another process holds the lock that it needs."""
    try:
        return db.execute(sql).fetchall()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return None


@dataclasses.dataclass(slots=True, eq=False)
class Instance:
    """A row of `instances`, its columns in their order; and of its newest row in the journal the
    number, and the bytes and steps as of that row."""

    key: int
    workflow: int
    id: str | None
    trigger: str
    created: int
    success_retention: int | None
    error_retention: int | None
    status: str
    generation: int = 1
    careful: int = 0
    place: int | None = None
    wake: int | None = None
    started: int | None = None
    ended: int | None = None
    paused: int | None = None
    termination: str | None = None
    rollback: str | None = None
    counted_bytes: int = 0
    counted_steps: int = 0
    seq: int = 0
    bytes: int = 0
    steps: int = 0

    def copy(self) -> Instance:
        """The instance as it is now: what leaves a transaction is one of these."""
        return Instance(*_all_values_of(self))

    def expiry(self) -> int | None:
        """When a finished instance is deleted. Cloudflare keeps a terminated one as long as one
        that has succeeded."""
        kept = self.error_retention if self.status == "errored" else self.success_retention
        return None if self.ended is None or kept is None else self.ended + kept

    def is_over(self, now: int) -> bool:
        """Whether nobody may see it any more: it was deleted, or has expired."""
        expiry = self.expiry()
        return self.id is None or (expiry is not None and expiry <= now)


_FIELDS = [field.name for field in dataclasses.fields(Instance)]
_COLUMNS = _FIELDS[: _FIELDS.index("seq")]
_CHANGING = _COLUMNS[_COLUMNS.index("status") :]  # the others stay as they were inserted
_values_of, _all_values_of = operator.attrgetter(*_COLUMNS), operator.attrgetter(*_FIELDS)
# Each instance with the newest row of its journal. (CROSS: first the instance, then its row.)
_WITH_NEWEST = """instances CROSS JOIN journal
    ON instance = key AND seq = (SELECT max(seq) FROM journal WHERE instance = key)"""
_SELECT = f"SELECT {', '.join(_FIELDS)} FROM {_WITH_NEWEST}"
_ROWS = f"SELECT {', '.join(Row._fields)} FROM journal WHERE instance = ?"
_WAITS = f"SELECT {', '.join(Wait._fields)} FROM waits WHERE instance = ? ORDER BY seq"
_NEW_VALUES = ", ".join(f"{name} = excluded.{name}" for name in _CHANGING)
_UPSERT = f"""INSERT INTO instances VALUES ({", ".join("?" * len(_COLUMNS))})
    ON CONFLICT (key) DO UPDATE SET {_NEW_VALUES}"""
_AMONG = "IN (SELECT value FROM json_each(?))"
_OF_NAMED = "workflow = (SELECT key FROM workflows WHERE name = ?)"


# --------------------------------------------------------------------------------------------------
# Transactions: the unit of work.
#
# Callers and runs post operations: functions whose first argument is the transaction. All that is
# posted within one turn of the loop shares a transaction and its one commit (group commit), and
# nobody is told of a result before that commit: what a caller has seen is on disk. An operation
# checks first and writes last, so that one that refuses (by raising a `WorkflowError`) leaves no
# trace. Any other error undoes the whole transaction and stops the engine, as does a commit that
# fails, or a `WorkflowInternalError` of no subclass (an `Unreadable` is about one instance only):
# nobody has been told anything, and the next engine replays. (A transaction is carried out at the
# end of the turn, on the loop itself; or by a thread, if the disk is slow or another process is
# writing. See "Writing" in the second part.)
#
# After the operations the scheduler does what is due by then, in the same transaction. So a run
# that is just being loaded hears of every row exactly once: what was there before is in the journal
# that `load` reads, and what comes later is in the news, which follow the answer of `load`.

_TAKES_A_SLOT = "status IN ('running', 'waitingForPause')"
BATCH = 256  # at most so many operations, and so many due instances, are taken at once

Operation = Callable[..., Any]
# Gets an operation's result, or why there is none: a refusal, or that storage has failed.
Then = Callable[[Any, BaseException | None], None]
Posted = tuple[Operation, tuple[Any, ...], Then]  # an operation, its arguments, and who asks
Reply = tuple[Then, Any, BaseException | None]  # who has asked, and the result or the refusal


class Lease(NamedTuple):
    """A run's right to write: until its instance has finished or is paused, or its generation is
    raised."""

    key: int
    generation: int


class News(NamedTuple):
    """What a transaction tells the engine about an instance: who may write now, its status, and
    the number of its newest row. `rows` are those that its run, if it is in memory, has not seen;
    `admitted` says that it has a slot: a life begins, if none is in memory, or follows."""

    lease: Lease
    status: str
    seq: int
    rows: Sequence[Row]
    admitted: bool
    damage: str | None


# What is watched: the key of an instance, for its end; or an id, for every row of the instances
# that have it, in whichever workflow.
Topic = int | str
WOKEN = -(2**62)  # where the places begin of those that wake up; all others count up from 1


def nothing(tx: Transaction) -> None:
    """An operation that lets the scheduler do what is due."""


def ignore(*_: Any) -> None:
    """What to do with a result that nobody needs."""


def resolve(
    future: asyncio.Future[Any] | None, value: Any = None, error: BaseException | None = None
) -> None:
    """Ends a future, unless it has ended."""
    if future is not None and not future.done():
        future.set_result(value) if error is None else future.set_exception(error)


class Transaction:
    """What operations read and change: instances (the ones that the database remembers) and rows,
    which are written in bulk before a query and before the commit; and what the engine must be told
    after that."""

    def __init__(self, database: Database, scheduler: Scheduler, cpu_ns: int) -> None:
        self.db, self.scheduler, self.now = database, scheduler, scheduler.clock.now()
        # What the month's row of `usage` will get with this transaction: see "Usage".
        self.requests = self.steps = self.storage = 0
        self.cpu_ns = cpu_ns  # of callbacks
        self.written = 0  # rows
        self.news: list[News] = []
        self.touched: set[Topic] = set()
        self.requeued: list[Instance] = []  # those that get no slot at once need a row `queued`
        self._instances = database.known
        self._reports = changes.isEnabledFor(logging.DEBUG)
        self._changed: set[int] = set()
        self._rows: list[tuple[Any, ...]] = []

    def carry_out(self, batch: Iterable[Posted]) -> list[Reply]:
        """All that is done between the begin of a transaction and its commit."""
        results: list[Reply] = []
        for operation, args, then in batch:
            try:
                results.append((then, operation(self, *args), None))
            except WorkflowError as refused:
                if type(refused) is WorkflowInternalError:
                    raise
                results.append((then, None, refused))
        self.scheduler.schedule(self)
        self.write()
        add_usage(self)
        return results

    def select(self, where: str, *args: Any) -> list[Instance]:
        """Instances, each as one object, however often it is read."""
        self.write()
        rows = self.db.rows(f"{_SELECT} WHERE {where}", *args)
        for row in rows:
            if row[0] not in self._instances:
                self._instances[row[0]] = Instance(*row)
        return [self._instances[row[0]] for row in rows]

    def mine(self, lease: Lease) -> Instance:
        """The instance of a run that may still write. It raises `LeaseLost` otherwise."""
        if lease.key not in self._instances:
            self.select("key = ?", lease.key)
        inst = self._instances.get(lease.key)
        if inst is None or inst.generation != lease.generation or inst.status not in LIVE:
            raise LeaseLost("this run may not write any more")
        return inst

    def find(self, workflow: str, ids: Sequence[str]) -> dict[str, Instance]:
        """The instances with these ids; of those that have expired nobody hears any more."""
        found = self.select(f"{_OF_NAMED} AND id {_AMONG}", workflow, json.dumps(ids))
        return {inst.id or "": inst for inst in found if not inst.is_over(self.now)}

    def journal(self, inst: Instance, where: str = "true", *args: Any) -> list[Row]:
        """The rows of an instance's journal, in order."""
        self.write()
        sql = f"{_ROWS} AND {where} ORDER BY seq"
        try:
            return [Row(*row) for row in self.db.rows(sql, inst.key, *args)]
        except Unreadable as damage:
            raise Unreadable(f"a row of instance {inst.id!r}: {damage}") from None

    def take_numbers(self, count: int = 1) -> int:
        """Keys and places in the queue are numbers of one sequence, and never given twice. Returns
        the last of those that are taken."""
        (last,) = self.db.one("UPDATE numbers SET last = last + ? RETURNING last", count)
        return int(last)

    def append(self, inst: Instance, row: Row, size: int = 0) -> None:
        """Appends a row to an instance's journal, which grows by so many bytes that count."""
        inst.seq += 1
        inst.bytes += size
        self.touched.add(inst.id or "")
        self._rows.append((inst.key, inst.seq, inst.bytes, inst.steps, self.now, *row[:6]))
        if row.step is None and self._reports:
            report_change(self, inst, row)

    def change(self, inst: Instance, **columns: Any) -> None:
        """Changes columns of an instance. The scheduler hears of a new status, and of a new moment
        to attend to it."""
        for name, value in columns.items():
            setattr(inst, name, value)
        self._instances[inst.key] = inst
        self._changed.add(inst.key)
        self.scheduler.stirred |= "status" in columns
        if inst.wake is not None:
            self.scheduler.next_wake = min(self.scheduler.next_wake, inst.wake)

    def move(self, inst: Instance, row: Row, size: int = 0, **columns: Any) -> None:
        """Changes an instance's status to what the row says."""
        self.append(inst, row, size)
        if row.type in FINISHED:
            inst.status, inst.ended, inst.place = row.type, self.now, None
            inst.wake = inst.expiry()
            self.touched.add(inst.key)
        self.change(inst, status=row.type, **columns)

    def requeue(self, inst: Instance) -> None:
        """Puts an instance that has run at its place in the queue: ahead of those that have not run
        yet, and among its like by when it fell due, however late that was noticed."""
        place = self._place_of(inst)
        self.change(inst, status="queued", place=place)
        self.requeued.append(inst)

    def leave_slot(self, inst: Instance) -> None:
        """Takes an instance out of its slot. One that was about to pause is paused; it goes to its
        place in the queue when it is resumed."""
        if inst.status == "waitingForPause":
            place = self._place_of(inst)
            self.move(inst, Row("paused"), paused=self.now, place=place, wake=None)
            self.tell(inst)
        else:
            self.requeue(inst)

    def _place_of(self, inst: Instance) -> int:
        if inst.place is not None:
            return inst.place
        # Of those that wake up in the same millisecond, the first comes first. (The counter starts
        # over after a million.)
        self.scheduler.woken = (self.scheduler.woken + 1) % 2**20
        moment = self.now if inst.wake is None else min(inst.wake, self.now)
        return min(WOKEN + moment * 2**20 + self.scheduler.woken, 0)  # 0 from the year 2109 on

    def tell(
        self,
        inst: Instance,
        rows: Sequence[Row] = (),
        admitted: bool = False,
        damage: str | None = None,
    ) -> None:
        """Adds news of an instance; the engine hears them after the commit."""
        lease = Lease(inst.key, inst.generation)
        self.news.append(News(lease, inst.status, inst.seq, rows, admitted, damage))

    def call_on(self, inst: Instance) -> None:
        """The owner must attend to it at once, if not since earlier."""
        self.change(inst, wake=self.now if inst.wake is None else min(inst.wake, self.now))

    def buffer(self, inst: Instance, type: str, payload: str) -> None:
        """Adds an event to those that the instance has not consumed; the owner delivers it, usually
        in this very transaction."""
        self.append(inst, Row("sent"), size_of(payload))
        self.call_on(inst)
        event = (inst.key, type, inst.seq, self.now, payload)
        self.db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", event)

    def purge(self, inst: Instance) -> None:
        """Clears away an instance and all its rows."""
        self.write()
        self.storage -= inst.counted_bytes
        del self._instances[inst.key]
        for table in ("journal", "waits", "events"):
            self.db.execute(f"DELETE FROM {table} WHERE instance = ?", (inst.key,))
        self.db.execute("DELETE FROM instances WHERE key = ?", (inst.key,))

    def write(self) -> None:
        """Writes what has been appended and changed."""
        if self._rows:
            sql = "INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            self.db.executemany(sql, self._rows)
            self.written += len(self._rows)
            self._rows.clear()
        if self._changed:
            self.written += len(self._changed)
            changed = [self._instances[key] for key in self._changed]
            for inst in changed:
                count_used(self, inst)
            self.db.executemany(_UPSERT, map(_values_of, changed))
            self._changed.clear()


# --------------------------------------------------------------------------------------------------
# Scheduling: what is due, and who may run.
#
# The column `wake` says when the owner must attend to an instance: because something falls due,
# because a caller has changed it (then `wake` is that moment), or because it expires. So waiting,
# recovery, retention and news from other processes are one index scan. That scan is part of every
# transaction that may have made something due, and its cost depends on what is due, not on what is
# there. Only `queued` instances are found otherwise: by their place in the queue.
#
# An instance that runs, or is about to pause, takes a slot; one that waits takes none. When it
# wakes up it goes through the queue again, ahead of those that have never started.

DAMAGED = 3_600_000  # ms until it is tried again to read waits that could not be read back


class Scheduler:
    """The owner's part of a transaction."""

    def __init__(self, database: Database, clock: Clock, limits: Limits) -> None:
        self.database, self.clock, self.limits = database, clock, limits
        self.bound: dict[int, Workflow] = {}  # by the workflow's key
        self.blocks: list[WorkflowInstanceModifier] = []  # see "Introspection"
        self.next_wake: float = math.inf  # nothing is due before
        self.stirred = False  # something may be due, or a slot may be free
        self.closing = False  # no instance begins any more
        self.queue_room = 0  # so many may be created before the queue must be counted again
        self.woken = 0  # counts the instances that have woken up
        self.warned: set[int] = set()  # workflows that are not bound, and have been warned about
        self._inherited: list[int] = []  # workflows whose last owner may have left something

    def is_due(self, now: int) -> bool:
        """Whether there is reason to attend to the database."""
        return (self.stirred or self.next_wake <= now) and self.database.owner

    def take_up(self, key: int, workflow: Workflow) -> None:
        """From now on this process runs a workflow's instances, whenever it is the owner."""
        self.bound[key] = workflow
        self._inherited.append(key)
        self.stirred = True
        path = self.database.path
        if not self.database.contend() and path in Database.owned and len(self.bound) == 1:
            log.warning("%s: another engine of this process runs it; this one is a client", path)

    def schedule(self, tx: Transaction) -> None:
        """What is due, then the queue."""
        if self.is_due(tx.now):
            self._inherit(tx)
            due = self._of_bound(tx, "wake <= ? ORDER BY wake LIMIT ?", tx.now, BATCH)
            if len(due) >= BATCH:  # then a fresh one need not wait behind a million expired ones
                last = [self._one(tx, "max(wake)", key, f"wake <= {tx.now}") for key in self.bound]
                latest = max(at for at in last if at is not None)
                due += self._of_bound(tx, "wake = ? ORDER BY key LIMIT ?", latest, BATCH)
            for inst in dict.fromkeys(due):
                self._attend(tx, inst)
            due_next: list[int | None] = []
            self.stirred = len(due) >= BATCH
            if not self.closing:
                due_next += fire_schedules(tx)
                self.stirred |= self._admit(tx)
            due_next += [self._one(tx, "min(wake)", key, "wake IS NOT NULL") for key in self.bound]
            self.next_wake = min((at for at in due_next if at is not None), default=math.inf)
        for inst in tx.requeued:
            if inst.status == "queued":  # it found no free slot
                tx.append(inst, Row("queued"))

    def _inherit(self, tx: Transaction) -> None:
        """What took a slot when its process died is queued again, or paused."""
        inherited, self._inherited = self._inherited, []
        for key in inherited:
            keep_schedules(tx, key, self.bound[key])
            for inst in tx.select(f"workflow = ? AND {_TAKES_A_SLOT}", key):
                tx.change(inst, careful=1)
                tx.leave_slot(inst)

    def _attend(self, tx: Transaction, inst: Instance) -> None:
        """Ends what an instance has waited for, or clears it away; and tells the engine."""
        rows: list[Row] = []
        damage = None
        if inst.is_over(tx.now):
            tx.purge(inst)
        else:
            due = inst.expiry()
            if inst.status in LIVE:
                try:
                    rows, due = self._end_waits(tx, inst)
                except Unreadable as error:
                    damage, due = f"instance {inst.id!r}: {error}", tx.now + DAMAGED
            if rows and inst.status == "waiting":
                tx.requeue(inst)
            tx.change(inst, wake=due)
        # A rollback that begins is a new life in the same slot.
        begun = inst.status == "running" and inst.rollback == "begun"
        tx.tell(inst, rows, begun, damage)

    def _end_waits(self, tx: Transaction, inst: Instance) -> tuple[list[Row], int | None]:
        """Ends the waits of an instance that are over; returns the rows that say so, and when the
        next one is over."""
        undoing = inst.rollback == "begun"  # then only the waits of handlers count
        found = [Wait(*row) for row in tx.db.rows(_WAITS, inst.key)]
        waits = [wait for wait in found if wait.step.startswith(ROLLBACK) == undoing]
        ended = end_waits(waits, self._buffered(tx, inst, waits), tx.now)
        over = {end.wait for end in ended}
        rows = [self._end_wait(tx, inst, end) for end in ended]
        return rows, min((wait.due for wait in waits if wait not in over), default=None)

    def _buffered(
        self, tx: Transaction, inst: Instance, waits: list[Wait]
    ) -> dict[str | None, list[tuple[int, int]]]:
        """By type: (seq, at) of the events in the buffer that may end one of these waits."""
        sql = "SELECT seq, at FROM events WHERE instance = ? AND type = ? ORDER BY seq LIMIT ?"
        types = {wait.event for wait in waits if wait.event is not None}
        return {type: tx.db.rows(sql, inst.key, type, len(waits)) for type in types}

    def _end_wait(self, tx: Transaction, inst: Instance, end: WaitEnd) -> Row:
        """Records the end of a wait; the event that ended it is consumed with that."""
        wait, event = end.wait, end.event
        row = Row("due" if wait.kind == "retry" else "slept", wait.step)
        if event is not None:
            where = "FROM events WHERE instance = ? AND type = ? AND seq = ?"
            (payload,) = tx.db.one(f"SELECT payload {where}", inst.key, wait.event, event[0])
            tx.db.execute(f"DELETE {where}", (inst.key, wait.event, event[0]))
            extra = json.dumps({"type": wait.event, "seq": event[0], "at": event[1]})
            row = Row("event", wait.step, None, payload, extra)
        elif wait.event is not None:
            (began,) = tx.journal(inst, "seq = ?", wait.seq)
            ms = read_back(began.data or "null", f"row {began.seq}")["timeout"]
            row = Row("timeout", wait.step, None, encode_error(timed_out(ms)))
        tx.db.execute("DELETE FROM waits WHERE instance = ? AND seq = ?", (inst.key, wait.seq))
        tx.append(inst, row)
        return Row(*row[:6], inst.seq, tx.now)

    def _admit(self, tx: Transaction) -> bool:
        """Gives free slots to the queue, first come first served. Returns whether that must go on
        in another transaction."""
        queued = []
        for key, workflow in self.bound.items():
            first = "workflow = ? AND status = 'queued' ORDER BY place LIMIT ?"
            head = tx.select(first, key, BATCH)
            queued += head[: self.free(tx, workflow.running, [key])] if head else []
        most = min(BATCH, self.free(tx, self.limits.running, self.bound)) if queued else 0
        queued.sort(key=lambda inst: (inst.place, inst.key))
        for inst in queued[:most]:
            first_time = inst.started is None
            row = Row("started" if first_time else "running")
            tx.append(inst, row)
            started = tx.now if first_time else inst.started
            tx.change(inst, status="running", place=None, started=started)
            if first_time:
                for block in self.blocks:
                    block.instance_starts(tx, inst)
            tx.tell(inst, admitted=True)
        return len(queued) >= BATCH and most == BATCH  # the batch is full, not the slots

    def free(self, tx: Transaction, limit: int | None, workflows: Iterable[int]) -> int:
        """How many more may run."""
        if limit is None:
            return 10**9
        taken: int = sum(self._one(tx, "count(*)", key, _TAKES_A_SLOT) for key in workflows)
        return max(0, limit - taken)

    def _of_bound(self, tx: Transaction, where: str, *args: Any) -> list[Instance]:
        where = f"workflow = ? AND {where}"
        return [inst for key in self.bound for inst in tx.select(where, key, *args)]

    def _one(self, tx: Transaction, aggregate: str, workflow: int, where: str) -> Any:
        tx.write()
        sql = f"SELECT {aggregate} FROM instances WHERE workflow = ? AND {where}"
        return tx.db.one(sql, workflow)[0]


# --------------------------------------------------------------------------------------------------
# Lives: an instance is in memory from time to time, and each of these stays is a life.
#
# A life begins with the folded journal, and calls `run` from the top. Each step call is looked up:
# if the journal has its result, it gets that, and nothing else happens; otherwise the step begins,
# or goes on, for real.
#
# Results reach `run` one at a time, in the order in which they were recorded, each only when the
# run has settled down from the one before: when ten turns of the loop went by without a step call.
# (What `run` itself has cancelled by then it cancels first in later lives, too.) Therefore
#
#     done, _ = await asyncio.wait({a, b}, return_when=asyncio.FIRST_COMPLETED)
#
# finds the same task done in every life. What happens for the first time goes the same way:
#
#     the callback returns → its end is posted → committed → `take` → the inbox → `hand_over`
#
# (Ten turns are more than `gather`, `wait` and TaskGroups need between a result and the next step
# call. Code that needs more of them may see two results at once in one life, and one after the
# other in another. A result that can disturb nobody, because nothing else of `run` is under way, is
# handed over at once.)
#
# When all that is under way waits for a moment or an event, the instance is `waiting`, and some
# time later its life ends; only rows remain, and the scheduler begins another life when it is due.
# A life also ends because `run` has ended, because the instance was paused, restarted, terminated
# or deleted by whomever, or because the engine stops. It always ends in one way, `unload`, and
# nothing in memory is worth keeping.
#
# Each of the next sections is about one class: a `Life` has tasks, and ends them; a `Replay` is a
# life that calls `run`, and gives it what is recorded; a `Run` is a replay that goes on, and
# records what happens; an `Attempt` is what it does for a `do`.

SETTLED = 10  # turns of the loop without a step call or a result
GRACE = 1.0  # seconds that cancelled code gets to end

# Whose code this is: that of an attempt's callback, or of `run` (then it is the life's `ended`).
_scope: contextvars.ContextVar[Any] = contextvars.ContextVar("scope", default=None)


def current_attempt() -> Attempt | None:
    """The attempt whose callback this code belongs to."""
    scope = _scope.get()
    return scope if isinstance(scope, Attempt) else None


class Unload(asyncio.CancelledError):
    """What step calls raise in a run that is being unloaded. A `CancelledError`: so `finally`
    blocks run, `except Exception` lets it pass, and asyncio logs nothing."""


class Loaded(NamedTuple):
    """What a life begins with."""

    instance: Instance
    rows: list[Row]
    damage: Unreadable | None = None  # why there are no rows


class Life:
    """The tasks of one life of an instance, and how they end."""

    # How many step calls came too late, by task, in all lives.
    refused: ClassVar[MutableMapping[Any, int]] = weakref.WeakKeyDictionary()

    # (What most lives never set stands here: CPython is slow with more than 30 attributes.)
    orphan = False  # its task was cancelled by somebody else
    successor: Lease | None = None  # that of the next life, if one follows
    interrupted: Sequence[str] = ()  # the steps whose attempts its end has cut off
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, engine: Core, workflow: Workflow, inst: Instance) -> None:
        self.engine, self.loop, self.workflow = engine, engine.loop, workflow
        self.lease, self.id = Lease(inst.key, inst.generation), inst.id or ""
        self.callbacks: set[asyncio.Task[Any]] = set()  # the tasks of attempts
        self.dead = False  # whatever its code does is ignored
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self._ending: set[asyncio.Task[Any]] = set()  # the tasks that `ended` waits for

    def __str__(self) -> str:
        return f"{self.workflow.name} {self.id}"

    def begin(self) -> None:
        """Calls `main` in a task."""
        # Not by `loop.create_task`, whose factory may begin it before we know it.
        name = f"workflows:{self.workflow.name}:{self.id}"
        self.task = asyncio.Task(self.main(), loop=self.loop, name=name)
        self.task.add_done_callback(self._main_ended)

    async def main(self) -> Any:
        """What its task does."""
        raise NotImplementedError

    def conclude(self, result: Any) -> None:
        """What to do when `main` has returned: here, the life just ends."""
        self.unload()

    def calling(self) -> list[asyncio.Task[Any]]:
        """The tasks that await step calls."""
        raise NotImplementedError

    def _main_ended(self, task: asyncio.Task[Any]) -> None:
        if self.dead:
            return
        if task.cancelled() or task.exception() is not None:
            self.orphan = True  # usually the loop is being torn down
            self.unload()
            self.loop.call_later(GRACE, self.engine.lives.adopt, self)
        else:
            self.conclude(task.result())

    def on_news(self, news: News) -> None:
        """The instance has changed: if that ends this life, another one may follow."""
        ended = news.lease != self.lease or news.status in (*FINISHED, "paused")
        if news.damage is not None:
            self.stop_in_place(news.damage)
        elif self.dead or ended:
            self.successor = news.lease if news.admitted else self.successor
            self.unload()

    def unload(self) -> None:
        """Ends this life by cancelling its tasks. `ended` is done when all have ended, or after a
        second."""
        if self.dead:
            return
        self.dead = True
        for task in {self.task, *self.calling(), *self.callbacks}:
            if not task.done():
                self._ending.add(task)
                task.add_done_callback(self._one_has_ended)
                task.cancel()
        if self._ending:
            self._timer = self.loop.call_later(GRACE, self._abandon)
        self._check_ended()

    def _one_has_ended(self, task: asyncio.Task[Any]) -> None:
        self._ending.discard(task)
        self._check_ended()

    def _abandon(self) -> None:
        log.warning("%s: %d tasks ignore their cancellation; abandoned", self, len(self._ending))
        self._ending.clear()
        self._check_ended()

    def _check_ended(self) -> None:
        if not (self._ending or self.ended.done()):
            if self._timer is not None:
                self._timer.cancel()
            self.ended.set_result(None)
            self.engine.lives.life_ended(self)

    def stop_in_place(self, damage: str) -> None:
        """Ends it because a record can't be read back; no other life follows."""
        self.engine.lives.give_up(self.lease.key, f"{self}: {damage}")
        self.successor = None
        self.unload()

    async def refuse(self) -> NoReturn:
        """Ends code that calls a step when this life is over. Code that catches that and goes on is
        told more plainly, and slowed down if it never stops: a loop that catches everything does no
        harm."""
        attempt, task = current_attempt(), asyncio.current_task() or self
        if attempt is not None and attempt.run is not self:
            raise fatal("workflow.fatal", "a rollback handler can't call steps: `run` has ended")
        self.refused[task] = self.refused.get(task, 0) + 1
        if self.refused[task] == 1:
            raise Unload
        if self.refused[task] > 100:
            await asyncio.sleep(GRACE)
        raise RuntimeError(f"{self}: this run was unloaded, and can call no more steps")


# --------------------------------------------------------------------------------------------------
# Replay: step calls, and the results that they get.


class StepCall(Coroutine[Any, Any, Any]):
    """What `step.do(…)` and its siblings return: counted when made, begun when first awaited. It is
    a coroutine for asyncio: `create_task`, `gather` and `TaskGroup` take it. While it is under way,
    it holds what there is only then."""

    step: Step

    def __init__(
        self,
        run: Replay,
        kind: str,
        plan: Callable[[Any], DoPlan | WaitPlan],
        name: Any,
        args: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        if type(name) is not str and isinstance(name, str):
            name = str.__str__(name)  # an enum is its value
        self.run, self.kind, self.plan = run, kind, plan
        self.name, self.args, self.options = name, args, options
        self.task: asyncio.Task[Any] | None = None  # the one that awaits it
        self.attempt: Attempt | None = None  # from when it may begin until its end is committed
        self.waiter: asyncio.Future[None] | None = None  # done when it should look again
        self.alone = False  # nothing else of the run was under way when it began to wait
        self.fresh: Any = None  # its value or its error itself, if that was made in this life
        self.stopping = False  # its callback has cancelled it; under way until that is stored
        self.inside = False  # code of the callback that has made it awaits it, too
        self.nests = False  # its own callback has made step calls
        self.over = False  # its own callback can make no more of them
        self._over: asyncio.Future[None] | None = None
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        outer = current_attempt()
        # The attempt in whose callback it is made, if that belongs to this run.
        self.outer = outer if outer is not None and outer.run is run else None
        counts, named = (self.outer or run).counts, f"{kind}{SEPARATOR}{name}"
        self.count = counts[named] = counts.get(named, 0) + 1
        self.key = f"{named}{SEPARATOR}{self.count}"
        if self.outer is None:
            run.unawaited.add(self)
        else:
            self.key = self.outer.call.key + SEPARATOR + self.key
            self.outer.call.nests = True

    def way(self) -> Coroutine[Any, Any, Any]:
        """What awaiting it does."""
        return self.run.perform(self)

    def _begin(self) -> Coroutine[Any, Any, Any]:
        if self._coroutine is None:
            self.run.unawaited.discard(self)
            self._coroutine = self.way()
        return self._coroutine

    def __await__(self) -> Any:
        return self._begin().__await__()

    def send(self, value: Any) -> Any:
        return self._begin().send(value)

    def throw(self, *error: Any) -> Any:
        return self._begin().throw(*error)

    def close(self) -> None:
        self._begin().close()

    def wake(self) -> None:
        """Something has happened to its step."""
        resolve(self.waiter)

    async def join(self) -> None:
        """Waits until it is under way no more."""
        self._over = self._over or self.run.loop.create_future()
        await asyncio.wait({self._over, self.run.ended}, return_when=asyncio.FIRST_COMPLETED)

    def end(self) -> None:
        """It is under way no more."""
        self.task = None
        if self._over is not None:
            resolve(self._over)


class Replay(Life):
    """A life that calls `run`, and gives its step calls what is recorded. What `run` would do
    beyond that never begins: so this is all there is of a life that only looks."""

    def __init__(self, engine: Core, workflow: Workflow, loaded: Loaded) -> None:
        inst, rows, damage = loaded
        if damage is not None:
            raise damage
        super().__init__(engine, workflow, inst)
        self.steps, self.inbox = fold(rows)
        payload = freeze(read_back(rows[0].data or "null", "its params"))
        about = (to_datetime(inst.created), self.id, workflow.name, schedule_of(inst))
        self.event = WorkflowEvent(payload, *about)
        self.counts: dict[str, int] = {}  # of the step calls that `run` itself makes, by name
        self.unawaited: set[StepCall] = set()  # those calls that were not awaited yet
        self.called: set[str] = set()  # the keys of those that were
        self.active: dict[str, StepCall] = {}  # the calls that are under way, nested ones, too
        self.seen: str | None = None  # the step whose end `run` has come to know last
        # The steps that `run` has cancelled, and no row says so yet; and what it had seen by then.
        self.cancelled: dict[str, str | None] = {}
        self.handlers: dict[str, Any] = {}  # see "Rollback"
        self.last_move = 0  # the turn of the loop in which it last did something
        self._dos_left = workflow.steps
        self._settling = False  # `settled` will be called

    async def main(self) -> Any:
        """Calls `run`. Returns its output, as it is stored, or the error that has left it."""
        _scope.set(self.ended)
        try:
            info = types.SimpleNamespace(instance_id=self.id, workflow_name=self.workflow.name)
            output = self.workflow.cls(info, self.engine.env).run(self.event, WorkflowStep(self))
            if inspect.isawaitable(output):
                output = await output
            what, code = "the output of run", "output.not_serializable"
            return checked(output, what, code, refuse=fatal)[0]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            by_others = self.dead or self.task.cancelling()
            if isinstance(error, asyncio.CancelledError) and by_others:
                raise
            return error

    def calling(self) -> list[asyncio.Task[Any]]:
        return [call.task for call in self.active.values() if call.task is not None]

    # -- a step call

    async def perform(self, call: StepCall) -> Any:
        """The way of every step call: look it up, carry it out if need be, wait for its turn."""
        if asyncio.get_running_loop() is not self.loop:
            raise fatal("workflow.fatal", f"step {call.name!r} is awaited in another event loop")
        self.last_move = self.engine.turns.now
        check_name(call.name)
        while not self.dead and (other := self.active.get(call.key)) is not None:
            await other.join()  # a task that the attempt before has left behind is still at it
        if self.dead:
            await self.refuse()
        if call.outer is not None:
            check_scope(call)
            call.inside = call.outer is _scope.get()
        step = call.step = self.steps.get(call.key) or Step(call.key)
        call.task = asyncio.current_task(self.loop)
        self.active[call.key], self.steps[call.key] = call, step
        try:
            self.note(call)
            # Whether `hand_over` has skipped its result, because this call came late.
            skipped = step.state in ENDED and call.key not in self.inbox
            if step.state in ("new", "pending"):
                await self.carry_out(call)
            elif self._is_next(step) and self._is_alone(call):  # saves a fifth of a replay's time
                del self.inbox[call.key]
            if step.state == "cancelled":
                log.info("%s: step %r waits until run cancels it again", self, call.name)
            while call.key in self.inbox or step.state not in ENDED:
                await self.wait(call)
            if not (skipped or step.nested):
                self.seen = call.key
            return self._value(call)
        except asyncio.CancelledError:
            if not self.dead:
                self.on_cancellation(call)
            raise
        except Unreadable as damage:
            self.stop_in_place(f"step {step_label(call.key)!r}: {damage}")
            raise Unload from None
        finally:
            if not call.stopping:
                self.drop(call)

    def drop(self, call: StepCall) -> None:
        """A call is under way no more."""
        del self.active[call.key]
        call.end()
        if (self.active or self.cancelled) and not self.loop.is_closed():
            self.move_on()

    def note(self, call: StepCall) -> None:
        """Notes that a step was called: counts it, if it is a `do`, and keeps its handler."""
        if call.kind == "do":
            if call.key not in self.called:
                self._dos_left -= 1
                if self._dos_left < 0:
                    what = f"the run calls more than {self.workflow.steps} steps (limit steps)"
                    raise fatal("limit.steps", what)
            note_handler(self, call)
        self.called.add(call.key)

    async def carry_out(self, call: StepCall) -> None:
        """Begins a step, or goes on with it. (Here the call just stays pending.)"""

    def on_cancellation(self, call: StepCall) -> None:
        """`run`, or the callback around it, has cancelled a call: see "Cancelled and nested
        calls"."""

    async def wait(self, call: StepCall) -> None:
        """Suspends a call until something has happened to its step."""
        call.waiter = self.loop.create_future()
        call.alone = self._is_alone(call)
        self.move_on()
        if call.alone:
            self.engine.writer.hurry()
        try:
            await call.waiter
        finally:
            call.waiter = None

    def _value(self, call: StepCall) -> Any:
        """What the caller gets: the record read back, or what is equal to it (`call.fresh`)."""
        step, fresh, data = call.step, call.fresh, call.step.data
        if not step.nested:
            step.data = None  # nobody asks again; the next attempt around a nested step does
        if step.state == "error":
            error = rebuild_error(read_back(data or "null", "its error"))
            trace = None if fresh is None else fresh.__traceback__
            raise BaseException.with_traceback(error, trace)
        if fresh is not None or data is None:
            return fresh
        if call.kind == "wait_for_event":
            return step_event(data, step.extra)
        return read_back(data, "its result")

    # -- results, one at a time

    def _is_next(self, step: Step) -> bool:
        return next(iter(self.inbox), None) == step.key and step.state != "cancelled"

    def _is_alone(self, call: StepCall) -> bool:
        """Whether nothing else of `run` can happen before this call goes on: it is made by the task
        of `run` itself, no other call is under way, and no task is about to make one."""
        return len(self.active) == 1 and call.task is self.task and self.engine.nothing_else_ready()

    def move_on(self) -> None:
        """Decides what comes next; called after whatever has happened. That is the next result: at
        once, if it can disturb nothing, else when the run has settled. Or, when there is none and
        all that is under way is asleep, the question whether the instance may wait."""
        if self.dead or self._settling or not self.active:
            return
        if not (self.inbox or self.cancelled or self.is_idle()):
            return
        call = self.active.get(next(iter(self.inbox), ""))
        if call and call.waiter and call.alone and len(self.active) == 1:
            self._deliver(call)
        else:
            self._settling = True
            self.last_move = self.engine.turns.now
            self.engine.turns.when_settled(self)

    def is_idle(self) -> bool:
        """Whether all that is under way are sleeps, event waits and retry delays."""
        return False

    def settled(self) -> None:
        """Ten turns of the loop went by without a step call or a result."""
        self._settling = False
        if not self.dead:
            self.hand_over()

    def hand_over(self) -> bool:
        """Hands over the first result that a call waits for. Those before it are skipped, because
        their calls never came. Returns whether there was one."""
        for skipped, key in enumerate(self.inbox):
            call = self.active.get(key)
            if call is not None and call.waiter is not None:
                for _ in range(skipped):
                    self.inbox.popitem(last=False)
                self._deliver(call)
                return True
        return False

    def _deliver(self, call: StepCall) -> None:
        """Lets a call have its result. (One that was cancelled waits until `run` cancels it.)"""
        if call.step.state in ENDED:
            del self.inbox[call.key]
            self.last_move = self.engine.turns.now
            call.wake()

    def attempts_in_flight(self) -> bool:
        """Whether an attempt has begun whose end is not stored yet, or one has ended, and what it
        has left behind has not."""
        return any(
            call.attempt or (call.outer is not None and call.outer.call.over)
            for call in self.active.values()
        )

    def busy(self) -> bool:
        """Whether it will go on by itself, as far as we can see."""
        return self._settling or (self.dead and not self.ended.done())


# --------------------------------------------------------------------------------------------------
# A run: what happens for the first time, and what it waits for.
#
# What a run may do depends on the status of its instance, and on `asked`: what it has posted that
# will change its status, and that has no answer yet. (The gate at which attempts wait is
# `lets_begin`.)
#
#     status            asked   what may begin                    what it asks for next
#     running           –       everything                        "idle", when all of it waits
#     waitingForPause   –       nested attempts; sleeps, waits    "pause", when no attempt is left
#     waiting           –       sleeps and waits, no attempt      "wake", when it has gone on itself
#     queued            –       sleeps and waits, no attempt      nothing: it gets a slot
#     any of these      any     sleeps and waits, no attempt      nothing
#     any of these      "end"   nothing: `run` has ended


class Run(Replay):
    """A replay that goes on where the record ends: it carries steps out, records what happens, and
    follows what is done to its instance."""

    def __init__(self, engine: Core, workflow: Workflow, loaded: Loaded) -> None:
        super().__init__(engine, workflow, loaded)
        self.careful = bool(loaded.instance.careful)  # see `Attempt`
        self.status = loaded.instance.status  # as recorded, as far as it knows
        self.asked: str | None = None
        self.seq = loaded.instance.seq  # of the newest row that it knows of
        self._writing = 0  # operations that have no answer yet
        # The keys of nested steps that were asleep when earlier lives ended.
        self.left_asleep = [key for key, step in self.steps.items() if step.asleep and step.nested]

    def begin(self) -> None:
        super().begin()
        over = (*ENDED, "cancelled")
        stop_inside(self, (key for key, step in self.steps.items() if step.state in over))

    def post(self, operation: Operation, *args: Any, then: Then | None = None) -> None:
        """Posts one of the operations below, whose first argument is the lease."""
        self._writing += 1
        written = functools.partial(self._written, then or self.saw)
        self.engine.writer.post(operation, self.lease, *args, then=written)

    def _written(self, then: Then, result: Any, error: BaseException | None) -> None:
        self._writing -= 1
        if isinstance(error, LeaseLost):
            self.unload()  # somebody has changed the instance, and there will be news of that
        elif isinstance(error, Unreadable):
            self.stop_in_place(str(error))
        elif not self.dead:
            then(result, error)
            self.move_on()

    def saw(self, seq: int, _: BaseException | None = None) -> None:
        """A row of its own is stored."""
        self.seq = seq

    def unload(self) -> None:
        if not self.dead:
            cut_off = [call.key for call in self.active.values() if call.attempt]
            self.interrupted = [key for key in [*cut_off, *self.cancelled] if self.steps[key].open]
        super().unload()

    # -- how it ends

    def conclude(self, result: Any) -> None:
        warn_about_calls(self)
        record_cancelled(self)
        if isinstance(result, BaseException):
            self.end(finish, Row("errored", data=encode_error(result)), 0)
            log_error(logging.WARNING, result, "%s: an error has left run", self)
        else:
            self.end(finish, Row("complete", data=result), size_of(result))

    def end(self, operation: Operation, *args: Any) -> None:
        """Posts what the last row says. If the instance does not end with that, because its steps
        are undone, the answer is the lease of its next life."""
        self.asked = "end"
        self.post(operation, *args, then=self._go_on_as)

    def _go_on_as(self, successor: Lease | None, _: BaseException | None) -> None:
        self.successor = successor
        self.unload()

    # -- carrying out

    async def carry_out(self, call: StepCall) -> None:
        """Begins a step, or goes on with it: a `do` up to the end of its last attempt."""
        if call.outer is None:
            record_cancelled(self)
        else:
            call.outer.post_start()  # comes first in the history
        plan = plan_of(call)
        if not isinstance(plan, DoPlan):
            self._begin_wait(call, plan)
            return
        while await Attempt(self, call, plan.config).make(plan):
            pass
        stop_inside(self, [call.key])

    def _begin_wait(self, call: StepCall, plan: WaitPlan) -> None:
        """Begins a sleep or an event wait, unless an earlier life has done so."""
        if call.outer is not None:
            log.warning("%s: %s %r inside a step's callback", self, call.kind, call.name)
        if call.step.state == "new":
            wait, data = plan
            if is_skipped(wait.kind, call):
                wait = wait._replace(due=0)  # before any event
            row = Row(wait.kind, call.key, None, data)
            apply(self.steps, row)
            self.post(record, row, 0, wait)

    def take(self, row: Row) -> None:
        """Takes a row into account that was recorded in this life."""
        if (step := apply(self.steps, row)) is not None:
            self.inbox[step.key] = step
        elif (call := self.active.get(row.step or "")) is not None:
            call.wake()

    # -- its status

    def on_news(self, news: News) -> None:
        """The scheduler has recorded something, or somebody has changed the instance."""
        super().on_news(news)
        if self.dead:
            return
        self.seq = max(self.seq, news.seq)
        for row in news.rows:
            self.take(row)
        status = news.status
        # If it has asked to be idle, news that say `running` were committed before that was
        # decided; the answer comes by `_idled`.
        if self.asked != "end" and (self.asked, status) != ("idle", "running"):
            self._become(status)

    def _become(self, status: str) -> None:
        self.status, self.asked = status, None
        for call in self.active.values():
            if not (call.step.asleep or call.attempt):
                call.wake()  # it may stand at the gate
        self.move_on()

    def lets_begin(self, nested: bool) -> bool:
        """The gate that a pause closes: whether an attempt may begin. A nested one may also while
        the instance is about to pause or the engine is left, because the callback around it could
        not end otherwise."""
        if self.asked is not None:
            return False
        if nested:
            return self.status in ("running", "waitingForPause")
        return self.status == "running" and not self.engine.scheduler.closing

    def move_on(self) -> None:
        if self.dead or self.asked:
            return
        if self.status == "waitingForPause" and not self.attempts_in_flight():
            record_cancelled(self)
            self._ask("pause", pause_now)
        elif self.status in ("running", "waitingForPause"):
            super().move_on()
        elif self.status == "waiting" and not self.still_waits():
            self._ask("wake", wake_up)  # `run` has gone on by itself

    def hand_over(self) -> bool:
        if self.asked or self.status not in ("running", "waitingForPause"):
            return False
        if self.active:
            record_cancelled(self)
        if super().hand_over():
            return True
        if self.is_idle():
            self._ask("idle", go_idle, self.seq, then=self._idled)
        return False

    def _ask(self, what: str, operation: Operation, *args: Any, then: Then = ignore) -> None:
        self.asked = what
        self.post(operation, *args, then=then)

    def is_idle(self) -> bool:
        return self.status == "running" and not self._writing and self._all_asleep()

    def _all_asleep(self) -> bool:
        return bool(self.active) and all(call.step.asleep for call in self.active.values())

    def _idled(self, idle: bool, _: BaseException | None) -> None:
        if idle:
            self.status, self.asked = "waiting", None
            self.engine.lives.drowse(self)
        elif self.asked == "idle":
            self._become("running")

    def on_cancellation(self, call: StepCall) -> None:
        call_cancelled(self, call)

    def still_waits(self) -> bool:
        """Whether it may be unloaded: not if `run` has gone on meanwhile."""
        busy = self.asked or self.cancelled
        return self.status == "waiting" and not busy and self._all_asleep()


# --------------------------------------------------------------------------------------------------
# Attempts, of steps with a callback.
#
# The start of an attempt is a row of its own as soon as the callback waits for anything, or does
# anything to the history itself. It is on disk at the end of that turn, or somewhat later if the
# disk is slow or another process is writing: the callback does not wait for that. Most callbacks
# wait for nothing: then one row, written with one commit, stands for the start and the end. (That
# saves a seventh of a step's time, and half of the journal. Before Python 3.12, where a task can't
# begin at once, each attempt has both rows.) An attempt that has a start and no end was cut off by
# the death of its process, and counts as failed.
#
# That leaves the callback that kills its process before its start is on disk, which would do so for
# ever. Therefore an instance that was running when its process died is `careful`: until one more of
# its steps has ended, it waits for the commit of a start before it calls the callback.


class Attempt:
    """One attempt of a step: when it may begin, and what is recorded of it. It is also the scope of
    the step calls that the callback makes. (How the callback is called: see `Execution`.)"""

    def __init__(self, run: Run, call: StepCall, config: StepConfig) -> None:
        self.run, self.call, self.config, self.outer = run, call, config, call.outer
        self.execution = Execution(run, config.timeout, self, self.ends)
        self.number = self.began = 0
        self.recorded = False  # a row says that it has begun
        self.has_ended = False  # a row says, or is about to say, that it has ended
        self._unanswered: BaseException | None = None  # the delay function must be asked
        self._again = False  # another attempt follows
        self.counts: dict[str, int] = {}

    def __str__(self) -> str:
        return f"step {self.call.name!r}"

    def context(self) -> WorkflowStepContext:
        """What the callback gets."""
        return step_context(self.call, self.number, self.config)

    async def make(self, plan: DoPlan) -> bool:
        """Calls the callback when it may; returns whether another attempt follows. `execute` calls
        `post_start` when the callback first waits for something, and `ends` when it has ended."""
        if self.call.step.open:  # this attempt has begun in another process, which died
            self.call.attempt, self.recorded = self, True
            self.number = self.call.step.attempts
            self.ends(None, WorkflowInternalError("attempt failed: the engine stopped"))
        else:
            try:
                await self._pass_gate(plan.plain)
                await self.execution.execute(mocked(self) or plan.bind(self))
            finally:
                self.execution.free_thread()
        if self._unanswered is not None:
            await self._ask_for_delay(self._unanswered)
        return self._again

    def _row(self, type: str, data: str | None = None) -> Row:
        """A row about it. Its first one says when it has begun, and the first one of the step has
        the configuration."""
        key = self.call.step.key
        if self.recorded:
            return Row(type, key, self.number, data)
        config = self.config.text if self.call.step.config is None else None
        return Row(type, key, self.number, data, config, self.began)

    # -- its beginning

    async def _pass_gate(self, plain: bool) -> None:
        """Returns when it may begin: the retry delay is over, the run lets it, and a plain callback
        has a thread. From then on a pause waits for it."""
        run, call, step = self.run, self.call, self.call.step
        while True:
            if step.asleep or not run.lets_begin(nested=self.outer is not None):
                self.execution.free_thread()
                await run.wait(call)
            elif plain and not self.execution.thread:
                await self.execution.take_thread()
            else:
                call.attempt, self.number = self, step.attempts + 1
                self.began = run.engine.clock.now()
                if not run.careful or await self._store_start():
                    return
                call.attempt = None

    def post_start(self) -> None:
        """Records that it has begun, unless that was done. (When it has ended, a task that its
        callback has left behind may still ask for that.)"""
        if not (self.recorded or self.has_ended):
            row = self._row("start")
            self.recorded = True
            apply(self.run.steps, row)
            # Nobody need wait for the answer: the end, which comes behind it, has one.
            self.run.engine.writer.post(record, self.run.lease, row)

    async def _store_start(self) -> bool:
        """Waits until its start is stored; False if a pause was stored before."""
        run, step = self.run, self.call.step
        stored, row = run.loop.create_future(), self._row("start")
        step.open, step.attempts = True, self.number  # a stop counts from here on
        run.post(record_start, row, self.outer is not None, then=functools.partial(resolve, stored))
        seq = await stored
        self.recorded = seq is not None
        if self.recorded:
            run.saw(seq)
            apply(run.steps, row)
        else:
            step.open, step.attempts = False, self.number - 1
        return self.recorded

    # -- its end

    def ends(self, value: Any, error: BaseException | None) -> None:
        """Posts its end. (After a failure a delay function may have to be asked first.)"""
        config, text, fresh, size = self.config, None, None, 0
        if error is None and self.call.kind == "do":  # what a rollback handler returns is ignored
            what, code = f"the result of step {self.call.name!r}", "step.not_serializable"
            try:
                most = self.run.engine.limits.step_bytes
                text, fresh, size = checked(value, what, code, fatal, step_bytes=most)
            except (WorkflowFatalError, MemoryError) as refused:
                error = refused
        if error is None:
            self._post(self._row("done", text), fresh, size)
        elif issubclass(type(error), NOT_RETRIED) or self.number > config.limit:
            self._fail_for_good(error)
        elif callable(config.delay):
            self._unanswered = error
        else:
            self._retry(error, config.delay)

    async def _ask_for_delay(self, error: BaseException) -> None:
        """Asks the delay function, which has five seconds. If it fails, so does the step."""
        function, info = self.config.delay, WorkflowDelayContext(self.context(), error)
        asked = Execution(self.run, ASKING, self, ignore)
        if not is_async(function):
            await asked.take_thread()
        answer, failure = await asked.execute(functools.partial(function, info))
        try:
            if failure is None:
                self._retry(error, parse_duration(answer))
                return
        except ValueError as wrong:
            failure = wrong
        message = f"the delay function of {self} failed: {show_error(failure)}"
        log.warning("%s: %s: %s, after %s", self.run, self, message, show_error(error))
        self._fail_for_good(WorkflowFatalError(message, name="NonRetryableDelayError"))

    def _retry(self, error: BaseException, delay: int) -> None:
        """Posts that it has failed, and that another one follows after a delay, to which the
        backoff applies."""
        run, config, step = self.run, self.config, self.call.step
        longest = 0 if is_skipped("retry", self.call) else run.engine.limits.max_sleep
        delay = min(delay * config.backoff(self.number), longest)
        self._again = step.asleep = True
        wait = Wait("retry", step.key, None, run.engine.clock.now() + delay)
        self._post(self._row("failed", encode_error(error, retry_delay_ms=delay)), None, 0, wait)
        what = f"{run}: {self}: attempt {self.number} of {config.limit + 1} failed"
        why = " ".join(show_error(error).split())  # one line
        log.warning("%s: %s; the next one in %d ms", what, why, delay)
        log_error(logging.DEBUG, error, "%s", what)

    def _fail_for_good(self, error: BaseException) -> None:
        """Posts that the step has failed for good."""
        self._again = self.call.step.asleep = False
        self._post(self._row("error", encode_error(error)), error)

    def _post(self, row: Row, fresh: Any, size: int = 0, wait: Wait | None = None) -> None:
        self.call.step.open, self.has_ended = False, True
        self.run.post(record, row, size, wait, then=functools.partial(self._end_stored, row, fresh))

    def _end_stored(self, row: Row, fresh: Any, seq: int, refused: BaseException | None) -> None:
        """Its end is committed; or refused, because the result is beyond a limit."""
        run, call = self.run, self.call
        if refused is not None:
            self._fail_for_good(refused)
            return
        run.saw(seq)
        if call.attempt is self:
            call.attempt = None
        call.fresh = fresh
        run.careful = run.careful and row.type == "failed"
        run.take(row)
        if row.type != "failed":
            close_call(run, call)


# --------------------------------------------------------------------------------------------------
# What a run records: the operations that it posts. Each is guarded by the run's lease. If that is
# lost, nothing is written, and the life ends.


def load(tx: Transaction, leases: list[Lease]) -> list[Loaded]:
    """What lives begin with. Those that have lost their lease meanwhile are left out."""
    loaded = []
    for lease in leases:
        with contextlib.suppress(LeaseLost):
            loaded.append(load_one(tx, tx.mine(lease)))
    return loaded


def load_one(tx: Transaction, inst: Instance) -> Loaded:
    """An instance and its journal, or why that can't be read back."""
    try:
        return Loaded(inst.copy(), tx.journal(inst))
    except Unreadable as damage:
        return Loaded(inst.copy(), [], damage)


def record(tx: Transaction, lease: Lease, row: Row, size: int = 0, wait: Wait | None = None) -> int:
    """Appends what a run did, and what it waits for from then on. Returns the row's number."""
    inst = tx.mine(lease)
    check_state(tx, inst.bytes, size, fatal)
    if begins_step(row):
        inst.steps += 1
    tx.append(inst, row, size)
    if inst.careful and row.type in ("done", "error"):
        tx.change(inst, careful=0)
    if wait is not None:
        values = (inst.key, *wait[:5], inst.seq, tx.now)
        tx.db.execute("INSERT INTO waits VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        due = wait.due if wait.event is None else tx.now  # its event may be there already
        tx.change(inst, wake=due if inst.wake is None else min(due, inst.wake))
    return inst.seq


def record_start(tx: Transaction, lease: Lease, row: Row, nested: bool) -> int | None:
    """Appends the start of an attempt that has not called its callback yet: not if the instance is
    about to pause, because then it must not be called."""
    if tx.mine(lease).status == "waitingForPause" and not nested:
        return None
    return record(tx, lease, row)


def break_off(tx: Transaction, lease: Lease, rows: Sequence[Row]) -> int:
    """Records that calls were cancelled, or stopped. An event that one of them was given, but that
    nobody has seen, goes back to its place in the buffer."""
    inst = tx.mine(lease)
    newest = [row for new in rows for row in tx.journal(inst, "step = ?", new.step)[-1:]]
    given = [row for row in newest if row.type == "event"]
    sent = [read_back(row.extra or "null", f"row {row.seq}") for row in given]
    for row, was in zip(given, sent, strict=True):
        event = (inst.key, was["type"], was["seq"], was["at"], row.data)
        tx.db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", event)
        tx.call_on(inst)
    for row in rows:
        tx.db.execute("DELETE FROM waits WHERE instance = ? AND step = ?", (inst.key, row.step))
        tx.append(inst, row)
    return inst.seq


def go_idle(tx: Transaction, lease: Lease, seq: int) -> bool:
    """running → waiting, unless the run does not know the newest row yet: the scheduler's, or that
    of a caller."""
    inst = tx.mine(lease)
    if inst.status != "running" or inst.seq != seq:
        return False
    tx.move(inst, Row("waiting"))
    return True


def wake_up(tx: Transaction, lease: Lease) -> None:
    """waiting → queued, because `run` goes on by itself."""
    inst = tx.mine(lease)
    if inst.status == "waiting":
        tx.requeue(inst)


def pause_now(tx: Transaction, lease: Lease) -> None:
    """waitingForPause → paused: nothing is in flight any more."""
    inst = tx.mine(lease)
    if inst.status == "waitingForPause":
        tx.leave_slot(inst)


def finish(tx: Transaction, lease: Lease, row: Row, size: int) -> Lease | None:
    """`run` has ended, and the instance with it; unless it has failed and a rollback begins: then
    this is the lease of its next life."""
    inst = tx.mine(lease)
    try:
        check_state(tx, inst.bytes, size, fatal)
    except WorkflowFatalError as too_large:
        row, size = Row("errored", data=encode_error(too_large)), 0
    if row.type == "errored" and begin_rollback(tx, inst, row.data or ""):
        return Lease(inst.key, inst.generation)
    tx.move(inst, row, size)
    return None


def hand_back(tx: Transaction, lease: Lease, interrupted: Sequence[str]) -> None:
    """A clean stop: no attempt counts, and whoever owns the database next goes on."""
    break_off(tx, lease, [Row("stop", key) for key in interrupted])
    inst = tx.mine(lease)
    if inst.status in ("running", "waitingForPause"):
        tx.leave_slot(inst)


def check_state(tx: Transaction, present: int, size: int, refuse: ErrorMaker) -> None:
    """Refuses what would make an instance's state too large."""
    limit = tx.scheduler.limits.instance_bytes
    if size and limit is not None and present + size > limit:
        what = f"the instance's state would exceed {limit} bytes (limit instance_bytes)"
        raise refuse("limit.instance_state", what)


# --------------------------------------------------------------------------------------------------
# News: what a committed transaction tells about an instance goes to its life, or begins one. This
# section also says when a run has settled, and when one that waits is unloaded.


class Turns:
    """Counts the turns of the loop while somebody needs to know, and tells runs when they have
    settled."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self.now = 0
        self.ticking = False  # whether the next turn will be counted
        self._waiting: deque[tuple[int, Replay]] = deque()  # whom to ask again, not before when

    def when_settled(self, run: Replay) -> None:
        """Calls `run.settled` when the run has done nothing for `SETTLED` turns."""
        self._waiting.append((self.now + SETTLED, run))
        if not self.ticking:
            self.ticking = True
            self._call_soon(self._next)

    def _next(self) -> None:
        self.now += 1
        self.ticking = bool(self._waiting)
        if self.ticking:
            self._call_soon(self._next)
        while self._waiting and self._waiting[0][0] <= self.now:
            _, run = self._waiting.popleft()
            if run.last_move + SETTLED > self.now and not run.dead:
                self._waiting.append((run.last_move + SETTLED, run))
            else:
                run.settled()


class Lives:
    """The instances that are in memory."""

    def __init__(self, engine: Core) -> None:
        self.engine = engine
        self.runs: dict[int, Replay] = {}  # by the instance's key
        self.damaged: dict[int, str] = {}  # those that can't be read back, and why
        self._drowsy: dict[Run, float] = {}  # those that wait, and when they are unloaded
        self._sweeping: Any = None  # the timer for that

    def hear(self, news: Iterable[News]) -> None:
        """Passes on what transactions tell about instances."""
        admitted = []
        for item in news:
            run = self.runs.get(item.lease.key)
            if run is not None:
                run.on_news(item)
            elif item.damage is not None:
                self.give_up(item.lease.key, item.damage)
            elif item.admitted:
                admitted.append(item.lease)
        if admitted:
            self._load(admitted)

    def _load(self, leases: list[Lease], previous: Replay | None = None) -> None:
        if not self.engine.scheduler.closing:
            begin = functools.partial(self._begin_lives, previous)
            self.engine.writer.post(load, leases, then=begin)

    def _begin_lives(self, previous: Replay | None, loaded: Any, _: BaseException | None) -> None:
        for found in loaded or ():
            inst = found.instance
            if not self.engine.scheduler.closing and inst.key not in self.runs:
                workflow = self.engine.scheduler.bound[inst.workflow]
                try:
                    run = next_life(self.engine, workflow, found, previous)
                except Unreadable as damage:
                    self.give_up(inst.key, f"{workflow.name} {inst.id}: {damage}")
                    continue
                self.runs[inst.key] = run
                self.damaged.pop(inst.key, None)
                run.begin()

    def give_up(self, key: int, damage: str) -> None:
        """An instance that can't be read back stays as it is stored, for the next owner to try;
        whoever waits for it here is told."""
        self.damaged[key] = f"{self.engine.path}: {damage}; the instance stops here"
        log.critical(self.damaged[key])
        self.engine.watchers.tell([key])

    def life_ended(self, run: Life) -> None:
        """The next life of its instance may begin."""
        key = run.lease.key
        if self.runs.get(key) is run and not (self.engine.scheduler.closing or run.orphan):
            del self.runs[key]
            if run.successor is not None:
                self._load([run.successor], run)

    def adopt(self, run: Life) -> None:
        """Somebody has cancelled a run's task, but the loop goes on, and so does the instance."""
        if not self.engine.scheduler.closing and self.runs.get(run.lease.key) is run:
            log.warning("%s: somebody has cancelled the task of its run; it begins again", run)
            run.orphan = False
            self.engine.writer.post(hand_back, run.lease, run.interrupted)
            self.life_ended(run)

    def drowse(self, run: Run) -> None:
        """Sees to it that a run is unloaded when it has waited for `hibernate_after`."""
        if not run.still_waits():
            return
        self._drowsy.pop(run, None)
        self._drowsy[run] = self.engine.clock.now() + self.engine.hibernate_after
        self._set_sweep(self.engine.hibernate_after)

    def _set_sweep(self, ms: float) -> None:
        if self._sweeping is None:
            self._sweeping = self.engine.clock.call_later(ms, self._sweep)

    def _sweep(self) -> None:
        """Unloads those that have waited long enough, but no run whose own code has a timer ahead:
        `asyncio.timeout` in `run` must fire. (One look at all timers for many runs.)"""
        self._sweeping, now, patience = None, self.engine.clock.now(), self.engine.hibernate_after
        early = now + patience  # nobody has longer to wait, unless the clock was set back
        due = [run for run, at in self._drowsy.items() if not now < at <= early]
        busy = (scopes_with_timers(self.engine.loop) if due else None) or ()
        for run in due:
            del self._drowsy[run]
            if run.still_waits():
                if run.ended in busy:  # asyncio's timers go by the real time
                    self.engine.loop.call_later(max(0.05, patience / 1000), self.drowse, run)
                else:
                    run.unload()
        if self._drowsy:
            self._set_sweep(max(50, next(iter(self._drowsy.values())) - now))


# ==================================================================================================
# Part II: the rules
# ==================================================================================================
#
# --------------------------------------------------------------------------------------------------
# Writing: who runs a transaction, and when.
#
# On the loop itself, at the end of the turn in which something was posted, as long as a commit
# takes about a millisecond at most: so a step needs no hand-over between threads. (If a run waits,
# and nothing else happens in that turn, it need not even wait for the end of it.) On a slow disk,
# or while another process holds the write lock, in the writer thread: so the loop never waits for
# either. (With a `ManualClock` always on the loop: then all that happens has an exact order.)
# Both take the same `_transact`, one at a time. What was posted first is committed first, so that
# everything goes through the thread as long as the thread has anything.
#
# Beside that, the thread looks every 50 to 100 ms (a tick) whether another process has written,
# whether something has fallen due by the wall clock, which may jump, whether the owner is gone, and
# every second whether the file is still there. What it finds it tells the loop, which posts.

TICK = 0.05  # seconds
QUICK, PER_ROW = 0.001, 5e-6  # seconds that a commit may take to be quick
LONG_TURN = 0.002  # seconds; a turn of the loop is not drawn out for longer
TRUST = 3  # after so many quick commits in a row in the thread, the loop commits again


def _raise(error: BaseException) -> NoReturn:
    raise error


class Answer(NamedTuple):
    """What came of a transaction. `touched` is None if another process has written: then anything
    may have changed."""

    results: list[Reply]
    news: list[News]
    touched: set[Topic] | None


class Writer:
    """Runs what is posted, and then tells the engine."""

    def __init__(self, engine: Core, database: Database) -> None:
        self.engine, self.database, self.scheduler = engine, database, engine.scheduler
        self.exact = engine.clock.exact  # everything on the loop
        self.failure: WorkflowInternalError | None = None
        self.flushing = False  # the loop is about to run what was posted
        self._posted: list[Posted] = []
        self._turn_began: float = 0  # when something was posted first in this turn
        self._batches: queue.SimpleQueue[list[Posted] | None] = queue.SimpleQueue()
        self._handed = 0  # batches of the thread that have not been answered yet
        self._lock = threading.RLock()  # whoever uses the database holds it
        self._distrust = TRUST  # so many quick commits must still be seen in the thread
        self._timer: Any = None
        self._armed: float = math.inf  # when the timer goes off
        self._ticked = self._checked = time.monotonic()
        self._process = os.getpid()
        self._closed = False
        self._cpu_counted = 0  # of the engine's `cpu_ns`

    def start(self) -> asyncio.Future[None]:
        """Opens the database in the thread; the future fails if that is refused."""
        opened: asyncio.Future[None] = self.engine.loop.create_future()
        self.closed: asyncio.Future[None] = self.engine.loop.create_future()
        self.thread = threading.Thread(target=self._main, args=(opened,), daemon=True)
        self.thread.start()
        return opened

    def post(self, operation: Operation, *args: Any, then: Then = ignore) -> None:
        """Asks for an operation. `then(result, refusal)` is called on the loop when it has been
        committed, or refused, or has failed with the storage."""
        self._posted.append((operation, args, then))
        self._flush_later()

    def hurry(self) -> None:
        """Does now what would be done at the end of this turn: for a run that waits, when nothing
        else is left to do in this turn. But not if this turn has lasted for `LONG_TURN` already,
        because the loop must look at its timers and sockets."""
        if time.monotonic() < self._turn_began + LONG_TURN:
            try:
                self.engine.context.run(self._carry_out)
            except BaseException as error:  # Ctrl-C, or a bug: not for the code of `run` to catch
                self.engine.call_soon(functools.partial(_raise, error))

    def close(self) -> None:
        """Runs what is posted, and lets the thread close the database."""
        posted, self._posted = self._posted, []
        self._closed = True
        self._give_to_thread(posted)
        self._batches.put(None)
        if self._timer is not None:
            self._timer.cancel()

    @property
    def busy(self) -> bool:
        """Whether something was posted that has no answer yet."""
        return bool(self._posted or self._handed)

    # -- on the loop

    def _flush_later(self) -> None:
        if not self.flushing:
            self.flushing = True
            self._turn_began = time.monotonic()
            self.engine.call_soon(self._flush)

    def _flush(self) -> None:
        self.flushing = False
        self._carry_out()

    def _carry_out(self) -> None:
        batch, self._posted = self._posted[:BATCH], self._posted[BATCH:]
        if self._posted:
            self._flush_later()
        if not batch or self._closed or self._process != os.getpid():
            return  # (a forked child must not write over our connection)
        answer = None
        if self.exact or (self._distrust == 0 and self._handed == 0):
            try:
                if self._lock.acquire(blocking=self.exact):
                    answer = self._answer(batch, patient=self.exact)
            finally:  # Ctrl-C may come in between: then nobody knows whether it is ours
                try:  # noqa: SIM105 (`contextlib.suppress` costs 1.4 % of a step)
                    self._lock.release()
                except RuntimeError:
                    pass
        if answer is None:
            self._give_to_thread(batch)
        else:
            self._receive(answer)

    def _give_to_thread(self, batch: list[Posted]) -> None:
        self._handed += 1
        self._batches.put(batch)

    def _receive(self, answer: Answer, batches: int = 0) -> None:
        self._handed -= batches
        if self.failure is not None:
            self.engine.storage_failed()
        self.engine.deliver(answer)
        self._set_timer()

    def _set_timer(self) -> None:
        """Sees to it that what is due is attended to in time."""
        if self._closed:
            return
        if self.scheduler.stirred and self.scheduler.is_due(0):  # one transaction was not enough
            self.post(nothing)
        elif self.scheduler.next_wake < self._armed and self.database.owner:
            if self._timer is not None:
                self._timer.cancel()
            self._armed, clock = self.scheduler.next_wake, self.scheduler.clock
            self._timer = clock.call_later(max(0, self._armed - clock.now()), self._go_off)

    def _go_off(self) -> None:
        self._armed = math.inf
        self.post(nothing)

    def _hear(self, others_wrote: bool) -> None:
        """What the thread has found at a tick."""
        if others_wrote:
            self.scheduler.stirred = True
            self.engine.deliver(Answer([], [], None))
        self.post(nothing)

    # -- on either thread, with the lock

    def _answer(self, batch: list[Posted], patient: bool) -> Answer | None:
        """Carries out a batch, or says that storage has failed; None if another process holds the
        lock and we are not patient."""
        try:
            if self.failure is None:
                return self._transact(batch, patient)
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):  # Ctrl-C, in the middle of it
                raise
        return Answer([(then, None, self.failure) for _, _, then in batch], [], set())

    def _transact(self, batch: list[Posted], patient: bool) -> Answer | None:
        """The transaction, from its begin to its commit."""
        if not self.database.begin(patient):
            return None
        self.scheduler.stirred |= self.database.refresh()
        outside = self.exact and self.database.others_wrote()  # else the tick notices that
        cpu_ns = self.engine.cpu_ns
        tx = Transaction(self.database, self.scheduler, cpu_ns - self._cpu_counted)
        results = tx.carry_out(batch)
        began = time.perf_counter()
        self.database.execute("COMMIT")
        self._cpu_counted = cpu_ns - tx.cpu_ns
        if tx.written:
            quick = time.perf_counter() - began < QUICK + tx.written * PER_ROW
            self._distrust = max(0, self._distrust - 1) if quick else TRUST
        return Answer(results, tx.news, None if outside else tx.touched)

    def fail(self, error: BaseException) -> None:
        """Storage has failed: nothing of this transaction is stored, and nothing more will be."""
        self.failure = storage_error(self.database.path, error)
        if isinstance(error, Exception):
            log.critical("%s; the engine stops here", self.failure, exc_info=error)
        self.database.close()

    # -- in the thread

    def _main(self, opened: asyncio.Future[None]) -> None:
        call = self.engine.call_from_thread
        try:
            self.database.open()
            call(resolve, opened)
            self._work()
        except Exception as error:  # of opening: all else is told by `_answer` and `_tick`
            call(resolve, opened, None, storage_error(self.database.path, error))
        with self._lock:
            self.database.close()
        call(resolve, self.closed)

    def _work(self) -> None:
        batches: list[list[Posted] | None] = []
        # (If the loop is closed, somebody has forgotten to leave the engine.)
        while None not in batches and not self.engine.loop.is_closed():
            batches.clear()
            with contextlib.suppress(queue.Empty):
                batches.append(self._batches.get(timeout=TICK))
                while True:
                    batches.append(self._batches.get_nowait())
            if any(batches):
                batch = [posted for part in batches for posted in part or ()]
                with self._lock:
                    answer = self._answer(batch, patient=True)
                done = len(batches) - batches.count(None)
                self.engine.call_from_thread(self._receive, answer, done)
            if time.monotonic() > self._ticked + TICK:
                self._tick()

    def _tick(self) -> None:
        """Looks for what nobody tells us."""
        with self._lock:
            self._ticked = time.monotonic()
            if self.failure is not None:
                return
            try:
                others_wrote = self.database.others_wrote()
                if self.scheduler.bound and not self.database.owner:
                    self.scheduler.stirred |= self.database.contend()
                if self._ticked > self._checked + 1:
                    self._checked = self._ticked
                    if self.database.files is not None:
                        self.database.files.check()
                    warn_about_unbound_work(self.scheduler)
                if others_wrote or self.scheduler.is_due(self.scheduler.clock.now()):
                    self.engine.call_from_thread(self._hear, others_wrote)
            except Exception as error:
                self.fail(error)
                self.engine.call_from_thread(self._receive, Answer([], [], set()))


# --------------------------------------------------------------------------------------------------
# The engine: opens and closes, and knows what to do when something fails: storage (stop in place),
# the loop (unload), the whole process (nothing at all: the next one finds what was running).


class Watchers:
    """Those who wait for news, by topic."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._futures = weakref.WeakValueDictionary[Topic, asyncio.Future[None]]()

    def watch(self, topic: Topic) -> asyncio.Future[None]:
        """A future that is done when there may be news; it is kept by those who wait for it."""
        return self._futures.setdefault(topic, self._loop.create_future())

    def topics(self) -> list[Topic]:
        """What somebody waits for."""
        return list(self._futures)

    def tell(self, topics: Iterable[Topic] | None, _: BaseException | None = None) -> None:
        """Tells those who wait for one of these."""
        for topic in topics or ():
            if (future := self._futures.pop(topic, None)) is not None:
                resolve(future)


class Core:
    """The engine, without what its users call (see "The API"): it opens and closes, turns what
    transactions tell into lives, and stops when storage fails."""

    path: str
    env: Env
    limits: Limits
    clock: Clock
    hibernate_after: int
    drain: int

    def __init__(self) -> None:
        self._workflows: dict[str, Workflow] = {}  # that are bound, by name
        self.cpu_ns = 0  # of all callbacks
        self.activity = 0  # counts what callbacks do: see `ManualClock`
        self._state = "not open yet"  # → open → closed

    async def __aenter__(self) -> Self:
        if self._state != "not open yet":
            raise RuntimeError("an engine can be entered once; make a new one")
        self.loop = asyncio.get_running_loop()
        self._ready: Sequence[Any] | None = getattr(self.loop, "_ready", None)
        if scopes_with_timers(self.loop) is None:
            what = "a timer that `run` sets (asyncio.timeout) is lost when an instance hibernates"
            log.info("%r does not show its timers: %s", type(self.loop), what)
        # What the engine does it does in this context, not in that of whoever caused it.
        self.context = contextvars.copy_context()
        self.threads, self.watchers = Threads(self.loop), Watchers(self.loop)
        self.turns, self.lives = Turns(self.call_soon), Lives(self)
        database = Database(self.path)
        self.scheduler = Scheduler(database, self.clock, self.limits)
        self.writer = Writer(self, database)
        try:
            await self.writer.start()
        except asyncio.CancelledError:
            self.writer.close()
            raise
        self._state = "open"
        self.clock.engines.append(self)
        for workflow in self._workflows.values():
            self.writer.post(define, workflow)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._state != "open" or self.scheduler.closing or self.loop.is_closed():
            return  # it was never entered, or is left already; or the thread notices that
        self.scheduler.closing = True
        leaving, cancelled = self.loop.create_task(self._leave()), None
        while not leaving.done():
            # Whoever is cancelled waits all the same, a second longer than `drain` at most: an
            # engine that is half left would keep the lock.
            try:
                await asyncio.shield(leaving)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        leaving.result()

    async def _leave(self) -> None:
        runs, until = self.lives.runs, self.loop.time() + self.drain / 1000
        while any(run.attempts_in_flight() for run in runs.values()) and self.loop.time() < until:
            await asyncio.sleep(0.01)
        self._state = "closed"
        self.clock.engines.remove(self)
        for run in list(runs.values()):
            run.unload()
        await asyncio.gather(*(asyncio.shield(run.ended) for run in runs.values()))
        for run in runs.values():
            self.writer.post(hand_back, run.lease, run.interrupted)
        self.writer.post(leave)
        self.writer.close()
        await self.writer.closed
        self.writer.thread.join()
        self.threads.close()
        self.watchers.tell(self.watchers.topics())

    def check_open(self) -> None:
        """Refuses what needs an open engine."""
        if self._state != "open":
            raise RuntimeError(f"the engine is {self._state}: use it inside `async with Engine(…)`")
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("the engine was entered in another event loop")
        if self.writer.failure is not None:
            raise WorkflowInternalError(str(self.writer.failure))

    # -- what the rest of this file asks of it

    async def call(self, operation: Operation, *args: Any) -> Any:
        """The result of an operation, once it is committed."""
        self.check_open()
        if (attempt := current_attempt()) is not None:
            attempt.post_start()  # comes before what its callback does
        future: asyncio.Future[Any] = self.loop.create_future()
        self.writer.post(operation, *args, then=functools.partial(resolve, future))
        return await future

    def call_soon(self, callback: Callable[..., object]) -> None:
        """Calls back in the next turn of the loop."""
        self.loop.call_soon(callback, context=self.context)

    def call_from_thread(self, callback: Callable[..., object], *args: Any) -> None:
        """Calls back on the loop."""
        with contextlib.suppress(RuntimeError):  # it was closed, and the engine forgotten
            self.loop.call_soon_threadsafe(callback, *args, context=self.context)

    def nothing_else_ready(self) -> bool:
        """Whether the loop has nothing to do but what the engine itself has asked for. (A loop that
        does not show what it will do next is taken to be busy.)"""
        ready, ours = self._ready, self.turns.ticking + self.writer.flushing
        return ready is not None and len(ready) <= ours

    def deliver(self, answer: Answer) -> None:
        """Passes on what a transaction tells."""
        for then, result, error in answer.results:
            try:
                then(result, error)
            except Exception:
                log.exception("a bug in workflows.py: please report it")
        self.lives.hear(answer.news)
        if answer.touched is not None:
            self.watchers.tell(answer.touched)
        elif topics := self.watchers.topics():
            self.writer.post(which_changed, topics, then=self.watchers.tell)

    def storage_failed(self) -> None:
        """Nothing goes on, and everybody who waits is told."""
        for run in list(self.lives.runs.values()):
            run.unload()
        self.watchers.tell(self.watchers.topics())

    def busy(self) -> bool:
        """Whether anything will happen without an event, a timer or the world outside."""
        runs = self.lives.runs.values()
        return self.writer.busy or self.threads.may_end_soon() or any(run.busy() for run in runs)


def define(tx: Transaction, workflow: Workflow) -> None:
    """Records a bound name. From here on this process wants to own the database."""
    sql = """INSERT INTO workflows (name, binding, class, script, steps, created, modified)
             VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET
             binding = excluded.binding, class = excluded.class, script = excluded.script,
             steps = excluded.steps, modified = excluded.modified RETURNING key"""
    cls = workflow.cls
    described = (workflow.name, workflow.binding, cls.__name__, cls.__module__, workflow.steps)
    (key,) = tx.db.one(sql, *described, tx.now, tx.now)
    tx.written += 1
    tx.scheduler.take_up(key, workflow)


def leave(tx: Transaction) -> None:
    """What has a slot, but no life yet, is left to the next owner, too."""
    add_usage(tx, 0)
    if tx.db.owner:
        for inst in tx.select(f"workflow {_AMONG} AND {_TAKES_A_SLOT}", str([*tx.scheduler.bound])):
            tx.leave_slot(inst)


# --------------------------------------------------------------------------------------------------
# Executions: how a function of the user is called, with a timeout, in a task of its own or in a
# thread.
#
# A plain function runs in a thread, so that it never blocks the loop. A thread cannot be cancelled;
# one whose time is up is abandoned, which frees its slot but not the thread. They are daemons of
# our own, because those of an executor would hold up the interpreter's exit.


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
            threading.Thread(target=self._serve, daemon=True, name="workflows-callback").start()
        self._jobs.put((function, reply))
        return reply

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(*job)
            del job  # or it is kept until the next one

    def _do(self, function: Callable[[], Any], reply: asyncio.Future[Any]) -> None:
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

    def _done(self, reply: asyncio.Future[Any], outcome: tuple[Any, Any, int]) -> None:
        del self._began[reply]
        if reply.done():  # its caller was cancelled
            _discard(outcome[0])
        resolve(reply, outcome)

    def may_end_soon(self) -> bool:
        """Whether a callback may end any moment: it has been running for less than 100 ms."""
        now = time.monotonic()
        return any(now < began + 0.1 for began in self._began.values())

    def close(self) -> None:
        """Lets every thread end, at once or when its callback does."""
        for _ in range(self._threads):
            self._jobs.put(None)


Outcome = tuple[Any, BaseException | None]  # what a function has returned, or what it has raised
# From Python 3.12 on a new task can take its first step at once; most callbacks end with that.
_EAGERLY: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


class Execution:
    """One call of a function of the user: the callback of an attempt, or its delay function. It has
    a task of its own, so that a timeout or a cancellation reaches that and nothing else. The step
    calls that the function makes belong to the attempt. When its callback has ended, the attempt is
    told at once.

    What comes first decides the outcome: the function ends; or its time, or its CPU time, is up,
    and it is cancelled. If the step call is cancelled before that, there is no outcome."""

    def __init__(self, run: Run, patience: int, attempt: Attempt, tell: Then) -> None:
        self.run, self.patience, self._attempt, self._tell = run, patience, attempt, tell
        self.cpu = 0  # ns
        self.thread = False  # it has one of the threads
        self.task: asyncio.Task[Any] | None = None
        self._outcome: Any = None  # → an `Outcome`
        self._failed = False  # it was decided before the function has ended
        self._decided: asyncio.Future[None] | None = None  # done when there is an outcome

    async def execute(self, function: Callable[[], Any]) -> Outcome:
        """Calls the function; returns the outcome."""
        run, outer = self.run, self._attempt.outer
        task = asyncio.Task(self._perform(function), loop=run.loop, **_EAGERLY)
        if outer is not None and outer.execution.task is asyncio.current_task(run.loop):
            outer.execution.cpu -= self.cpu  # the first step of the task was taken inside that
        try:
            if not task.done():
                run.callbacks.add(task)
                task.add_done_callback(self._has_ended)
                self._attempt.post_start()
                await self._supervise(task)
            if task.done() and not task.cancelled():
                task.result()  # raises what `ends` has raised
            outcome: Outcome = self._outcome
            return outcome
        except asyncio.CancelledError:
            if not run.dead:  # else it was cancelled already, and may be cleaning up
                task.cancel()
                close = functools.partial(close_call, run, self._attempt.call)
                task.add_done_callback(lambda _: close())
            raise
        finally:
            run.engine.cpu_ns += self.cpu
            self.free_thread()
            self.task = None  # its context leads back to here, and so does the attempt
            del self._attempt, self._tell

    async def _supervise(self, task: asyncio.Task[None]) -> None:
        """Waits until the task has ended. If its time is up, it is cancelled; and if it has not
        ended a second later, it is abandoned."""
        clock, time_out = self.run.engine.clock, lambda: self._fail(timed_out(self.patience))
        timer = clock.limit(self.patience, time_out)
        self._decided = self.run.loop.create_future()
        try:
            if self._outcome is None:
                await self._decided
        finally:
            timer.cancel()
        if self._failed:
            task.cancel()
            await asyncio.wait({task}, timeout=GRACE)
            if not task.done():
                log.warning("%s: %s ignores its cancellation; abandoned", self.run, self._attempt)
                cancel_inside(self.run, self._attempt.call)
                self.run.callbacks.discard(task)
            self._tell(*self._outcome)

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        self.run.callbacks.discard(task)
        if not task.cancelled():
            resolve(self._decided, error=task.exception())  # a KeyboardInterrupt, or a bug
        elif self._decide(outcome := (None, asyncio.CancelledError())):  # before its first step
            self._tell(*outcome)

    async def _perform(self, function: Callable[[], Any]) -> None:
        self.task = asyncio.current_task(self.run.loop)
        _scope.set(self._attempt)
        outcome = await self._drive(function)
        if self._decide(outcome):
            self._tell(*outcome)

    def _decide(self, outcome: Outcome) -> bool:
        """The first outcome counts; returns whether this is it."""
        if self._outcome is not None or (self._decided is not None and self._decided.cancelled()):
            return False
        self._outcome = outcome
        resolve(self._decided)
        return True

    def _fail(self, failure: WorkflowError) -> None:
        """Decides that it has failed, whatever the function does from now on. (The task that waits
        for the outcome cancels that of the function.)"""
        if self._decide((None, failure)):
            self._failed = True

    @types.coroutine
    def _drive(self, function: Callable[[], Any]) -> Generator[Any, Any, Outcome]:
        """Does what `await` does, and measures CPU time while the function's own code runs."""
        value, error, given = None, None, None
        try:
            coroutine: Any = self._in_thread(function) if self.thread else function()
            resume = coroutine.send
            while True:
                self.run.engine.activity += 1
                began = time.thread_time_ns()
                try:
                    awaited = resume(given)
                finally:
                    self.cpu += time.thread_time_ns() - began
                if (excess := self._excess()) is not None:
                    self._fail(excess)
                try:
                    resume, given = coroutine.send, (yield awaited)
                except BaseException as raised:
                    resume, given = coroutine.throw, raised
        except StopIteration as stop:
            value = stop.value
        except KeyboardInterrupt:
            raise
        except BaseException as raised:
            error = raised
        return value, self._excess() or error

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        in_context = functools.partial(contextvars.copy_context().run, function)
        reply = self.run.engine.threads.execute(in_context)
        try:
            value, error, cpu = await reply
        except asyncio.CancelledError:
            if not reply.cancelled():
                _discard(reply.result()[0])
            raise
        finally:
            self.free_thread()
        self.cpu += cpu
        if error is not None:
            raise error
        return await value if inspect.isawaitable(value) else value

    async def take_thread(self) -> None:
        """Waits until one of the threads is free."""
        self.thread = await self.run.engine.threads.slots.acquire()

    def free_thread(self) -> None:
        """Leaves its thread to the next, if it has one."""
        if self.thread:
            self.thread = False
            self.run.engine.threads.slots.release()

    def _excess(self) -> WorkflowError | None:
        limit = self.run.engine.limits.cpu_ms
        if limit is None or self.cpu <= limit * 1_000_000:
            return None
        return refusal("limit.cpu", f"the attempt used over {limit} ms of CPU time (limit cpu_ms)")


def _discard(value: Any) -> None:
    """Closes what nobody will await."""
    if inspect.iscoroutine(value):
        value.close()


def timed_out(ms: int) -> WorkflowTimeoutError:
    """What fails because its time is up."""
    return WorkflowTimeoutError(f"Execution timed out after {ms}ms")


def scopes_with_timers(loop: asyncio.AbstractEventLoop) -> set[object] | None:
    """The scopes (see `_scope`) whose own code has a timer ahead; None if the loop does not show
    its timers. A timer runs in a copy of the context it was made in."""
    timers = getattr(loop, "_scheduled", None)
    if timers is None:
        return None
    return {timer._context.get(_scope) for timer in timers if not timer.cancelled()}


# --------------------------------------------------------------------------------------------------
# Durations and the clock. Inside the module every time is a whole number of milliseconds, every
# moment one since the Unix epoch, read from a `Clock`. (Elsewhere only real spans are measured: CPU
# time, and patience with locks and threads.)

_UNITS = {"second": 1_000, "minute": 60_000, "hour": 3_600_000, "day": 86_400_000}
_UNITS |= {n: d * _UNITS["day"] for n, d in (("week", 7), ("month", 30), ("year", 365))}
_DURATION = re.compile(rf"([0-9]+(?:\.[0-9]+)?) ({'|'.join(_UNITS)})s?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
YEAR = _UNITS["year"]  # Cloudflare's longest sleep
ENDLESS = 2**62  # no duration is longer: SQLite's numbers have 64 bits


Duration = float | str | timedelta  # see `parse_duration`


def safely(otherwise: Any, function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives, or `otherwise` if it fails: a user's class may raise anything."""
    try:
        return function(*args)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return otherwise


def log_error(level: int, error: BaseException, message: str, *args: object) -> None:
    """Logs a user's error with its traceback, if its class lets us."""
    trace = type(error), error, error.__traceback__
    safely(None, functools.partial(log.log, level, message, *args, exc_info=trace, stacklevel=3))


def show(value: Any) -> str:
    """A value in an error message: never too long, and never another error."""
    text: str = safely(f"<{type(value).__name__}>", repr, value)
    return text if len(text) <= 100 else text[:100] + "…"


def show_error(error: BaseException) -> str:
    """An error in a log line, or in the message of another one."""
    return f"{type(error).__name__}: {message_of(error)}"


def parse_duration(value: Duration) -> int:
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
        return min(round(ms), ENDLESS)
    text = f"'<number> <unit>' with one of {', '.join(_UNITS)} (or the plural)"
    expected = f"milliseconds (0 or more), a timedelta, or {text}"
    raise ValueError(f"{show(value)} is not a duration: expected {expected}")


def parse_moment(value: Any) -> int:
    """Milliseconds since the epoch. A number below 1e11 means seconds (Cloudflare's docs), from
    there on milliseconds (its engine): 1e11 s is the year 5138, 1e11 ms is 1973. A naive `datetime`
    is local time, as everywhere in Python."""
    if isinstance(value, datetime):
        return round(value.timestamp() * 1000)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return max(0, round(value * 1000 if abs(value) < 1e11 else value))
    expected = "a datetime, or seconds or milliseconds since 1970"
    raise ValueError(f"{show(value)} is not a moment: expected {expected}")


def to_datetime(ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=ms)


class Clock:
    """Where all time comes from: the wall clock for moments that are stored (a machine that was
    suspended must notice), the event loop's monotonic clock for timers."""

    exact = False  # whether tests rely on the order of all that happens: see `ManualClock`

    def __init__(self) -> None:
        self.engines: list[Core] = []  # the open ones that go by it

    def now(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def call_later(self, ms: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        """Calls back on the running loop after so many milliseconds, unless cancelled.
        (More than asyncio can take is cut to 100 years.)"""
        return asyncio.get_running_loop().call_later(min(ms, 100 * YEAR) / 1000, callback)

    def limit(self, ms: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        """The same, for the time that a function of the user may take: a `ManualClock` gives it
        patience."""
        return self.call_later(ms, callback)


# --------------------------------------------------------------------------------------------------
# Records: the small objects that users see.


def camel(name: str) -> str:
    """A name in Cloudflare's spelling: `event_type` is `eventType`."""
    return re.sub("_([a-z])", lambda match: match[1].upper(), name)


def _by_name(values: dict[str, Any], name: str) -> Any:
    """What a key that is read as an attribute gives."""
    if name.startswith("__") or name not in values:
        there = ", ".join(map(str, values)) or "none"
        raise AttributeError(f"there is no key {name!r}; the keys are: {there:.1000}")
    return values[name]


@dataclass_transform(frozen_default=True, eq_default=False)
class _Record(Mapping[str, Any]):
    """Its subclasses are frozen dataclasses that can also be read as mappings with Cloudflare's
    (camelCase) keys."""

    _keys: ClassVar[dict[str, str]]  # Cloudflare's key → attribute

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, eq=False)(cls)
        cls._keys = {camel(name): name for name in cls.__annotations__}

    def __getitem__(self, key: str) -> Any:
        return getattr(self, self._keys[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class WorkflowSchedule(_Record):
    """What a scheduled instance was created for: the cron expression, and its time in ms since the
    epoch."""

    cron: str
    scheduled_time: int


class WorkflowEvent(_Record, Generic[Params]):
    """What `run` gets: the params that the instance was created with (read-only, all the way down),
    the time of its creation, its id, the name of its workflow, and its schedule, if it has one."""

    payload: Params
    timestamp: datetime
    instance_id: str
    workflow_name: str
    schedule: WorkflowSchedule | None = None

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._keys if key != "schedule" or self.schedule is not None)


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
        return _by_name(payload if isinstance(payload, dict) else {}, name)


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
    `{"name", "message"}` (when errored), `rollback` how that went, if there was one: `{"outcome":
    "complete" | "failed", "error"}`, with the error of the handler that has failed."""

    status: str
    output: Any = None
    error: dict[str, str] | None = None
    rollback: dict[str, Any] | None = None


class Usage(_Record):
    """Of the current calendar month (UTC): `requests` (instances created), `steps` (without retries
    and rollback handlers) and `cpu_ms` of callbacks; the `storage_bytes` of now; and `cost_usd`,
    what that comes to on Cloudflare's paid plan beyond what it includes, with this storage held for
    the month.

    developers.cloudflare.com/workflows/reference/pricing/"""

    requests: int
    steps: int
    cpu_ms: float
    storage_bytes: int
    cost_usd: float


class _Attributes(dict[str, Any]):
    """A dict whose keys can also be read as attributes, except those that are named like a dict's
    method (`items`), or like Python's own (`__deepcopy__`)."""

    def __getattr__(self, name: str) -> Any:
        return _by_name(self, name)


class WorkflowHistoryEvent(_Attributes):
    """Something that happened to an instance, as `subscribe` tells it: `type`, `event_id`,
    `timestamp`, `instance_id`, and what the type brings (`step_name`, `output`, `error`, …). Its
    keys are Cloudflare's (`eventId`), and can be asked for in Python's spelling, too."""

    def __init__(self, **known: Any) -> None:
        super().__init__({camel(name): value for name, value in known.items()})

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(camel(key))

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(camel(key))

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(camel(key), default)


class Env(_Attributes):
    """`self.env`: the engine's `env` and its bindings, as attributes and as a mapping."""


def step_event(data: str | None, extra: str | None) -> WorkflowStepEvent:
    """What `wait_for_event` returns, of the row that ended it."""
    origin = read_back(extra or "", "its event")
    payload = read_back(data or "null", "its event")
    return WorkflowStepEvent(freeze(payload), to_datetime(origin["at"]), origin["type"])


# --------------------------------------------------------------------------------------------------
# Codec: values and errors to JSON and back. What persists is JSON plus datetimes and bytes, as
# Cloudflare's structured clone has them, and never pickle: opening a database must not run code.
#
# A value is stored as plain JSON if reading that back gives an equal value. What JSON lacks is
# written as an object with one key, a tag: "$datetime" ("$fold" for the second of two equal local
# times, when clocks are set back), "$bytes" (base64), or "$dict" (a list of pairs, for a dict that
# itself has a tag as a key). Only errors may hold a "$tuple". Their JSON is ASCII, so that it can
# hold lone surrogates, too, which UTF-8 can't.

DEEPEST = 300  # levels of nesting
ALLOWED = "None, bool, int, float, str, list, dict with str keys, datetime, bytes"
_TAGS: dict[str, Callable[[Any], Any]] = {
    "$datetime": datetime.fromisoformat,
    "$fold": lambda text: datetime.fromisoformat(text).replace(fold=1),
    "$bytes": base64.b64decode,
    "$dict": dict,
    "$tuple": tuple,
}


def _tag(value: Any) -> dict[str, Any]:
    """What `json` asks for when it meets a value that it doesn't know."""
    if isinstance(value, datetime):
        return {"$fold" if value.fold else "$datetime": datetime.isoformat(value)}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} is no value")


def _untag(pairs: dict[str, Any]) -> Any:
    tag = next(iter(pairs)) if len(pairs) == 1 else ""
    return _TAGS[tag](pairs[tag]) if tag in _TAGS else pairs


_FORMAT: dict[str, Any] = {"allow_nan": False, "separators": (",", ":"), "default": _tag}
_to_json = json.JSONEncoder(ensure_ascii=False, **_FORMAT).encode
_to_ascii = json.JSONEncoder(**_FORMAT).encode
_parse: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode
# (`_parse` is json.loads without its search for blanks, which we don't write.)


class _Unserializable(ValueError):
    """A value that can't be stored; the message is the path of what can't, and what that is."""


def encode(value: Any, of_error: bool = False) -> tuple[str, Any]:
    """The JSON text of a value, and what decoding that text gives: an equal value, except that a
    tuple comes back as a list (not `of_error`), a record as a dict, and a subclass of an allowed
    type as that type. What can't be stored is an `_Unserializable`."""
    to_json = _to_ascii if of_error else _to_json
    try:
        text = to_json(value)
        if text.isascii() or _utf8(text) == text:
            decoded = decode(text)
            many = text.count("[") + text.count("{") > DEEPEST
            if decoded == value and not (many and _is_deep(decoded)):
                return text, decoded
    except Exception:
        pass  # the slow way finds out what can't be stored, and where
    try:
        text = to_json(_plain(value, "$", frozenset(), of_error))
        return text, decode(text)
    except (_Unserializable, MemoryError):
        raise
    except Exception as error:  # the value's own methods may raise anything
        raise _Unserializable(f"$: {show_error(error)}") from None


def decode(text: str) -> Any:
    """The value of a text made by `encode`."""
    return json.loads(text, object_hook=_untag) if '"$' in text else _parse(text, 0)[0]


def read_back(text: str, what: str) -> Any:
    """The value of a text that was stored."""
    try:
        return decode(text)
    except (TypeError, ValueError, MemoryError) as error:
        raise Unreadable(f"{what} can't be read back: {show_error(error)}") from None


def size_of(text: str) -> int:
    """Bytes that a stored text takes."""
    return len(text) if text.isascii() else len(text.encode())


def _utf8(text: str) -> str:
    """The same text, with "?" for lone surrogates, which UTF-8 can't hold."""
    return str.encode(text, errors="replace").decode()


def _is_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Whether it is nested deeper than `DEEPEST`, where code with less of the stack left might not
    be able to read it back."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list)) and (levels == 1 or _is_deep(item, levels - 1)):
            return True
    return False


def _plain(value: Any, path: str, above: frozenset[int], of_error: bool) -> Any:
    """The same value with nothing in it that `_to_json` would change or refuse, or
    `_Unserializable` with the path of what can't be stored. `above` is what the value lies in: the
    ids of dicts and lists."""
    if isinstance(value, str) and not of_error and _utf8(value) != value:
        raise _Unserializable(f"{path}: text with a lone surrogate, which UTF-8 can't hold")
    if isinstance(value, (int, float)) and not -1e300 < value < 1e300:  # nan isn't, either
        try:
            _to_json(value)
        except ValueError as error:  # not finite, or too many digits
            raise _Unserializable(f"{path}: {show(value)}: {error}") from None
    if value is None or isinstance(value, (str, int, float, datetime, bytes, bytearray)):
        return value
    if not isinstance(value, (dict, list, tuple, _Record)):
        raise _Unserializable(f"{path}: {type(value).__name__}")
    if id(value) in above:
        raise _Unserializable(f"{path}: a cycle")
    if len(above) >= DEEPEST:
        raise _Unserializable(f"$: nested too deep (more than {DEEPEST} levels)")
    above |= {id(value)}
    if isinstance(value, (list, tuple)):
        items = [_plain(each, f"{path}[{n}]", above, of_error) for n, each in enumerate(value)]
        return {"$tuple": items} if of_error and isinstance(value, tuple) else items
    if odd := [key for key in value if not isinstance(key, str)]:
        raise _Unserializable(f"{path}: a key of type {type(odd[0]).__name__}")
    pairs = [
        (_plain(key, path, above, of_error), _plain(item, f"{path}.{key}", above, of_error))
        for key, item in value.items()
    ]
    return {"$dict": pairs} if any(key in _TAGS for key, _ in pairs) else dict(pairs)


def _read_only(*_: Any, **__: Any) -> NoReturn:
    instead = "changes would be lost at the next replay; copy it, and return state from a step"
    raise TypeError(f"an event's payload is read-only: {instead}")


class _FrozenDict(_Attributes):
    """Still a dict for `isinstance`, `json` and `==`; copies of it are plain dicts."""

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _read_only
    clear = pop = popitem = setdefault = update = _read_only

    def __reduce__(self) -> Any:  # what `copy` and `pickle` go by
        return dict, (dict(self),)


class _FrozenList(list[Any]):
    """Still a list for `isinstance`, `json` and `==`; copies of it are plain lists."""

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __iadd__ = __imul__ = _read_only
    append = clear = extend = insert = pop = remove = reverse = sort = _read_only

    def __reduce__(self) -> Any:
        return list, (list(self),)


def freeze(value: Any) -> Any:
    """The same value, deeply read-only."""
    if isinstance(value, dict):
        return _FrozenDict(zip(value, map(freeze, value.values()), strict=True))
    if isinstance(value, list):
        return _FrozenList(map(freeze, value))
    return value


# Errors. The record of an error holds what it shows (name and text), what it consists of (args,
# attributes, the members of a group), and where its class and the bases of that are found. What is
# raised is always rebuilt from the record, also the first time, so that `except` does the same in
# every life. None of the code that makes an object of the class is called. Instead the result is
# looked at: if it lacks the recorded text (because the class's `__str__` needs what couldn't be
# stored, say), or can't be logged, the nearest base takes the place of the class.

_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_LOGGED = ("__class__", "__cause__", "__context__", "__notes__", "?")  # the last, no error has
# What these do to a coroutine or to the event loop is more than to raise an error.
_STEERING = (StopIteration, asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)


class _Text(str):
    """The text of an error as its only argument. It is its own `repr`, because a `KeyError` shows
    the `repr` of its argument."""

    __repr__ = str.__str__


def message_of(error: BaseException) -> str:
    """What an error says, if its class lets it."""
    return _utf8(safely("<exception str() failed>", str, error))


def encode_error(error: BaseException, **more: Any) -> str:
    """The record of an error, and `more`, as JSON."""
    text: str | None = safely(None, lambda: encode(_describe(error) | more, True)[0])
    if text is not None:
        return text
    # Its class lets us have no more than its text and name, or it is nested too deep as a whole.
    bare = WorkflowError(message_of(error), name=safely("", getattr, type(error), "__name__"))
    return encode(_describe(bare) | more)[0]


def _describe(error: BaseException, inner: bool = False) -> dict[str, Any]:
    """The record of an error. Errors among its attributes get records of their own, but not those
    of an `inner` error, which is an attribute itself: they might lead in a circle."""
    cls, message, state = type(error), message_of(error), _state(error)
    args, members = state.pop("args"), []
    if issubclass(cls, BaseExceptionGroup):
        args, members = [_utf8(state.pop("message"))], state.pop("exceptions")
    label = state.get("_recorded_name") or (issubclass(cls, WorkflowError) and state.get("name"))
    classes = [each for each in cls.__mro__ if issubclass(each, Exception)]
    kept = {name: safely(None, encode, value, True) for name, value in state.items()}
    lost = [name for name, pair in kept.items() if pair is None]
    errors = [n for n in lost if issubclass(type(state[n]), BaseException) and not inner]
    return {
        "classes": [[str(each.__module__), each.__qualname__] for each in classes[:-1] or classes],
        "name": _utf8(label) if isinstance(label, str) else cls.__name__,
        "message": message,
        "args": safely(("", [message]), encode, list(args), True)[1],
        "attributes": {name: pair[1] for name, pair in kept.items() if pair is not None},
        "errors": {name: _describe(state[name], inner=True) for name in errors},
        "lost": lost,
        "members": [_describe(member, inner) for member in members],
    }


def _state(error: BaseException) -> dict[str, Any]:
    """The args and attributes of an error, also those in slots (`OSError.filename`), which are read
    past whatever the class has put before them."""
    state = {**safely({}, vars, error)}
    for base in type(error).__mro__:
        for name, slot in vars(base).items():
            if not isinstance(slot, _SLOTS) or name.startswith("__") or slot is AttributeError.obj:
                continue
            value = safely(None, slot.__get__, error)
            if value is not None or "__slots__" in vars(base):  # one of CPython's is None if unset
                state[name] = value
    return state


def brief(record: dict[str, Any]) -> dict[str, str]:
    """What users see of a recorded error: its name and text, with those of a group's members."""
    members = [f"{each['name']}: {each['message']}" for each in map(brief, record["members"])]
    text = f"{record['message']} [{'; '.join(members)}]" if members else record["message"]
    return {"name": record["name"], "message": text}


def rebuild_error(record: dict[str, Any]) -> Exception:
    """The error that `encode_error` recorded, of the first of its classes that can show its text;
    if only `Exception` is left, a `WorkflowError` with its name. This never fails."""
    inner = {name: rebuild_error(each) for name, each in record["errors"].items()}
    members = [rebuild_error(each) for each in record["members"]]
    parts = {"attributes": record["attributes"] | inner}
    parts["args"] = [*record["args"], members] if members else record["args"]
    for module, qualname in record["classes"]:
        error: Exception | None = safely(None, _rebuild_as, module, qualname, record | parts)
        if error is not None:
            return error
    return WorkflowError(brief(record)["message"], name=record["name"])


def _rebuild_as(module: str, qualname: str, record: dict[str, Any]) -> Exception | None:
    """The error as an object of this class, or None if that can't show the recorded text. (Fails
    if the class isn't imported.)"""
    cls: Any = sys.modules[module]
    for part in qualname.split("."):
        cls = vars(cls)[part]
    text, known = record["message"], record["attributes"]
    if hasattr(cls, "__getattr__"):  # which may need what was lost, if only as None
        known = dict.fromkeys(record["lost"]) | known
    if [module, qualname] != record["classes"][0]:  # the status shows it, if it leaves `run`
        known = known | {"_recorded_name": record["name"]}
    make = functools.partial(safely, None, _make, cls, text)
    error: Exception | None = make(record["args"], known)
    if error is not None:
        return error
    # Perhaps with its text as the only argument, and those attributes that don't change the text.
    fitting: dict[str, Any] = {}
    for name, value in known.items():
        if make([_Text(text)], fitting | {name: value}) is not None:
            fitting[name] = value
    return _make(cls, text, [_Text(text)], fitting)


def _make(cls: Any, text: str, args: list[Any], attributes: dict[str, Any]) -> Exception | None:
    """An error as the built-in base of its class makes it, or None if it doesn't show that text.
    (Fails if it can't be logged: a half-made object may raise when asked for any attribute.)"""
    native = _native(cls)
    error = native.__new__(cls, *args)
    safely(None, native.__init__, error, *args)
    for name, value in attributes.items():
        safely(None, object.__setattr__, error, name, value)
    seen = str(error), repr(error), [hasattr(error, name) for name in _LOGGED]
    ordinary = issubclass(cls, Exception) and not issubclass(cls, _STEERING)
    return error if ordinary and type(error) is cls and seen[0] == text else None


def _native(cls: Any) -> Any:
    """The built-in class that the objects of an error's class are made of."""
    return cls if vars(builtins).get(cls.__name__) is cls else _native(cls.__base__)


# --------------------------------------------------------------------------------------------------
# Limits: what Cloudflare's plans allow, each enforced where it applies, with an error that names
# it.


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine allows; None lifts a limit. The default is the paid plan without its creation
    rate, which is an account's quota. Times are milliseconds; 1 MB is 10⁶ bytes, 1 MiB 2²⁰.
    `Limits.FREE` and `Limits.PAID` are Cloudflare's plans of 2025, `Limits.FREE_2026` and
    `Limits.PAID_2026` those of today; `Limits.UNLIMITED` has lifted what can be lifted.

    developers.cloudflare.com/workflows/reference/limits/"""

    cpu_ms: int | None = 30_000
    step_bytes: int | None = 2**20
    payload_bytes: int | None = 2**20
    instance_bytes: int | None = 10**9
    max_sleep: int = YEAR
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
            if not lifted and (type(value) is not int or not 0 <= value < ENDLESS):
                raise ValueError(f"Limits.{name} is {show(value)}: expected a whole number from 0")
        if self.steps > 25_000 or self.max_sleep > YEAR:
            raise ValueError("Limits: steps is at most 25,000 and max_sleep at most 365 days")

    FREE: ClassVar[Limits]
    PAID: ClassVar[Limits]
    FREE_2026: ClassVar[Limits]
    PAID_2026: ClassVar[Limits]
    UNLIMITED: ClassVar[Limits]


Limits.PAID = Limits(creations_per_second=100)
_FREE: dict[str, int] = {"cpu_ms": 10, "instance_bytes": 10**8, "running": 25, "queued": 100_000}
_FREE |= dict.fromkeys(("success_retention", "error_retention"), 3 * _UNITS["day"])
Limits.FREE = dataclasses.replace(Limits.PAID, **_FREE)
# What Cloudflare allows today.
Limits.FREE_2026 = dataclasses.replace(Limits.FREE, running=100)
Limits.PAID_2026 = dataclasses.replace(Limits.PAID, running=50_000, queued=2_000_000, steps=10_000)
_LIFTED: dict[str, Any] = dict.fromkeys(vars(Limits()).keys() - Limits._needed)
Limits.UNLIMITED = Limits(steps=25_000, **_LIFTED)

_OVER = {"payload_bytes": "limit.event_payload", "step_bytes": "limit.step_output"}


def checked(
    value: Any, what: str, code: str, refuse: ErrorMaker = refusal, **limit: int | None
) -> tuple[str, Any, int]:
    """What `encode` gives, and how many bytes the text takes; a refusal with that code if the value
    can't be stored, or one that names the limit (`step_bytes=…`) if it takes more than that."""
    try:
        text, fresh = encode(value)
    except _Unserializable as bad:
        raise refuse(code, f"{what} can't be stored: {bad}; allowed are {ALLOWED}") from None
    size = size_of(text)
    for name, most in limit.items():
        if most is not None and size > most:
            raise refuse(_OVER[name], f"{what} has {size} bytes: at most {most} (limit {name})")
    return text, fresh, size


# --------------------------------------------------------------------------------------------------
# Arguments: what step calls are given, checked. All that is wrong with a step call is a
# `WorkflowFatalError` where it is awaited, and nothing is stored of it; all that is wrong with a
# caller's call is a `TypeError` or a `ValueError`, or a `WorkflowError` if it has a code.

_NAME = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9-_]*")
_NAME_RULE = "letters, digits, '_' and '-', not beginning with '-'"
_STEP_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{0,256}")


def expect(
    legal: object, what: str, value: Any, expected: str, error: type[Exception] = ValueError
) -> None:
    """Refuses an argument that is not legal."""
    if not legal:
        raise error(f"{what} is {show(value)}: expected {expected}")


def require(legal: object, code: str, message: str, refuse: ErrorMaker = refusal) -> None:
    """Refuses what is against a rule that has a code."""
    if not legal:
        raise refuse(code, message)


def is_name(value: Any, longest: int) -> bool:
    """Whether it may be an id, a workflow's name, or an event's type."""
    return isinstance(value, str) and len(value) <= longest and _NAME.fullmatch(value) is not None


def options_of(given: Any, known: Sequence[str], what: str) -> dict[str, Any]:
    """A copy of an options object in which every key is known."""
    keys = ", ".join(known)
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} is {type(given).__name__}: expected a dict with {keys}")
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{what} has the unknown key {show(unknown[0])}: expected {keys}")
    return dict(given)


def merge(given: Any, named: dict[str, Any], known: Sequence[str], what: str) -> dict[str, Any]:
    """An options object, or keyword arguments, or both; every key known, and none given twice."""
    options = options_of({} if given is None else given, known, what)
    for key in options.keys() & named:
        raise TypeError(f"{what}: {key!r} is given twice")
    return options | options_of(named, known, what)


def duration_of(part: Mapping[str, Any], key: str, what: str) -> int:
    """The milliseconds of a duration in an options object."""
    with naming(f"{what} key {key!r}"):
        return parse_duration(part[key])


def read_count(value: Any, most: float = math.inf, what: str = "the value") -> int:
    """A whole number from 1 (to `most`). Anything else is a `ValueError`."""
    expected = "a whole number from 1" + (f" to {most:,}" if most < math.inf else "")
    expect(type(value) is int and 0 < value <= most, what, value, expected)
    return int(value)


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Makes an error about an argument or a configuration say which one it is about. It becomes a
    `ValueError`."""
    try:
        yield
    except (TypeError, ValueError, WorkflowError) as error:
        raise ValueError(f"{what}: {error}") from error.__cause__


def check_name(name: Any) -> None:
    """Refuses what is no name of a step."""
    if not isinstance(name, str) or not _STEP_NAME.fullmatch(name):
        expected = "a str of at most 256 characters without control characters and lone surrogates"
        raise fatal("step.invalid_name", f"a step's name is {show(name)}: expected {expected}")


def check_event_type(type: Any, refuse: ErrorMaker) -> str:
    """Refuses what is no type of an event."""
    what = f"{show(type)} is not an event type: expected 1 to 100 {_NAME_RULE}"
    require(is_name(type, 100), "event.invalid_type", what, refuse)
    return str.__str__(type)  # of an enum, too


def step_named(step: Any, index: str = "index") -> tuple[str, int]:
    """The name and the count of a step, from its name, or a dict with both."""
    given = step if isinstance(step, Mapping) else {"name": step}
    given = {"name": None, index: 1} | options_of(given, ("name", index), "step")
    name, count = given["name"], given[index]
    legal = isinstance(name, str) and type(count) is int and count > 0
    expect(legal, "step", step, f'its name, or {{"name": …, "{index}": …}} with a number from 1')
    return str.__str__(name), count  # of an enum, too


def _arguments(call: StepCall, names: Sequence[str], more: Sequence[str] = ()) -> dict[str, Any]:
    """A call's arguments by name, whether they were given by position or by name."""
    if len(call.args) > len(names):
        raise TypeError(f"too many arguments: expected name, {', '.join(names)}")
    given = dict(zip(names, call.args, strict=False))
    return merge(given, call.options, (*names, *more), "the call")


Bind = Callable[["Attempt"], Callable[[], Any]]  # gives the callback of an attempt


class DoPlan(NamedTuple):
    """What a `step.do` asks for. A plain callback is one that is not async: it runs in a thread."""

    config: StepConfig
    bind: Bind
    plain: bool


WaitPlan = tuple[Wait, str]  # of a sleep or an event wait; and what its row holds


def plan_of(call: StepCall) -> DoPlan | WaitPlan:
    """Reads a call that has no result yet, by one of the functions below."""
    try:
        return call.plan(call)
    except (TypeError, ValueError, OverflowError) as error:
        code = "step.invalid_duration" if call.kind == "sleep" else "step.invalid_config"
        raise fatal(code, f"{call.kind} {call.name!r}: {error}") from None


def step_context(call: StepCall, attempt: int, config: StepConfig) -> WorkflowStepContext:
    """What the callback of an attempt gets."""
    info = WorkflowStepInfo(call.name, call.count)
    return WorkflowStepContext(info, attempt, copy.deepcopy(config.raw))


def plan_do(call: StepCall) -> DoPlan:
    """Reads a `step.do`, in any of its forms."""
    given, callback, handler, undo_config = do_arguments(call)
    if call.step.config is not None:
        config = StepConfig.load(call.step.config, given)
    elif given is None and handler is None:
        config = NO_CONFIG
    else:
        longest = call.run.engine.limits.max_sleep
        config = StepConfig(given, longest)
        if handler is not None:
            config.undo = StepConfig(undo_config, longest, "rollbackConfig")
    if not callable(callback):
        what = f"{show(callback)} is no callback" if callback else "the callback is missing"
        raise _bad_callback(call.name, f"{what}: expected an async or plain function")
    if handler is not None and not _takes(handler, None):
        raise _bad_callback(call.name, "the rollback handler must take one argument")
    return DoPlan(config, bind_context(call.name, callback), not is_async(callback))


def do_arguments(call: StepCall) -> tuple[Any, Any, Any, Any]:
    """Config, callback, rollback handler and its config, of any form of `step.do`."""
    names, args = ["config", "callback", "options"], call.args
    if len(args) == 1 and callable(args[0]) and not call.options:
        return None, args[0], None, None  # most calls
    if args and callable(args[0]):
        names.remove("config")
    given = _arguments(call, names, ("config", "rollback", "rollback_config"))
    if (options := given.get("options")) is not None:
        given |= options_of(options, ("rollback", "rollbackConfig"), "options")
    handler = given.get("rollback")
    undo_config = given.get("rollbackConfig", given.get("rollback_config"))
    unused = (options, handler, undo_config) == (None, None, None)
    expect(unused or callable(handler), "rollback", handler, "a function")
    return given.get("config"), given.get("callback"), handler, undo_config


def plan_sleep(call: StepCall) -> WaitPlan:
    """Reads `sleep(name, duration)`."""
    given: dict[str, Any] = {"duration": None} | _arguments(call, ["duration"])
    ms = parse_duration(given["duration"])
    return Wait("sleep", call.key, None, _due(call, ms)), str(ms)


def plan_sleep_until(call: StepCall) -> WaitPlan:
    """Reads `sleep_until(name, when)`; Cloudflare's SDK says `timestamp`."""
    given = _arguments(call, ["when"], ["timestamp"])
    moment = parse_moment(given.get("when", given.get("timestamp")))
    left = max(0, moment - call.run.engine.clock.now())
    _due(call, left)  # refuses one that is too long
    return Wait("sleep", call.key, None, moment, fixed=True), str(left)


def plan_wait_for_event(call: StepCall) -> WaitPlan:
    """Reads `wait_for_event(name, type, timeout=…)`, or with a dict of both; Cloudflare's SDK says
    `event_type`."""
    given = _arguments(call, ["type", "timeout"], ["event_type"])
    if isinstance(given.get("type"), Mapping):
        given |= options_of(given.pop("type"), ("type", "timeout"), "options")
    ms = parse_duration(given.get("timeout", "24 hours"))
    type = check_event_type(given.get("event_type", given.get("type")), fatal)
    data = json.dumps({"type": type, "timeout": ms})
    return Wait("wait", call.key, type, _due(call, ms)), data


def _due(call: StepCall, ms: int) -> int:
    """When a wait of that length ends."""
    longest = call.run.engine.limits.max_sleep
    message = f"{call.kind} {call.name!r} is longer than {longest} ms (limit max_sleep)"
    require(ms <= longest, "limit.sleep", message, fatal)
    return call.run.engine.clock.now() + ms


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine."""
    if type(function) is types.FunctionType and function.__code__.co_flags & inspect.CO_COROUTINE:
        return True  # most are, and this saves 1 % of a step
    called = getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _bad_callback(name: str, what: str) -> WorkflowFatalError:
    return fatal("step.invalid_callback", f"step {name!r}: {what}")


def _takes(function: Callable[..., Any], *args: Any, **named: Any) -> bool:
    """Whether a function can be called like that; a built-in that doesn't say takes nothing."""
    try:
        inspect.signature(function).bind(*args, **named)
    except TypeError:
        return False
    except ValueError:
        return not (args or named)
    return True


_VARIABLE = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS  # it takes *args or **kwargs


def bind_context(name: str, callback: Any) -> Bind:
    """How a callback gets the step context: as `ctx`, if it has a parameter of that name, or as its
    one argument, or not at all."""
    if type(callback) is types.FunctionType and not callback.__defaults__:
        code = callback.__code__  # this costs least, too
        others = code.co_kwonlyargcount or code.co_flags & _VARIABLE
        if code.co_argcount == 0 and not others:
            return lambda attempt: callback
        if code.co_argcount == 1 and not others:
            return lambda attempt: functools.partial(callback, attempt.context())
    if _takes(callback, ctx=None) and "ctx" in inspect.signature(callback).parameters:
        return lambda attempt: functools.partial(callback, ctx=attempt.context())
    if _takes(callback):
        return lambda attempt: callback
    if _takes(callback, None):
        return lambda attempt: functools.partial(callback, attempt.context())
    what = f"the callback takes {inspect.signature(callback)}: it gets the step context at most"
    raise _bad_callback(name, what)


# --------------------------------------------------------------------------------------------------
# Retries: a step's configuration, and how long it waits before it tries again.

_RETRIES: dict[str, Any] = {"limit": 5, "delay": 10_000, "backoff": "exponential"}
DEFAULT_CONFIG: dict[str, Any] = {"retries": _RETRIES, "timeout": "10 minutes"}
_CONFIG_KEYS = {"config": [*DEFAULT_CONFIG, "sensitive"], "rollbackConfig": [*DEFAULT_CONFIG]}
_BACKOFF: dict[Any, Callable[[int], int]] = {
    "constant": lambda attempts: 1,
    "linear": lambda attempts: attempts,
    "exponential": lambda attempts: 2 ** min(attempts - 1, 64),
}
_config_to_json = json.JSONEncoder(default=parse_duration).encode  # it knows infinity
ASKING = 5000  # ms that a delay function may take


class StepConfig:
    """A step's checked configuration. `raw` is what the user wrote, with the defaults merged in, as
    it is read back in a later life. It lacks a delay that is a function: each life has that of its
    own call.

    `limit` counts retries, as Cloudflare's engine does: `limit: 5` is at most 6 attempts.
    developers.cloudflare.com/workflows/build/sleeping-and-retrying/"""

    def __init__(self, given: Any = None, max_sleep: int = YEAR, what: str = "config") -> None:
        given = options_of({} if given is None else given, _CONFIG_KEYS[what], what)
        retries = _RETRIES | options_of(given.get("retries", {}), [*_RETRIES], f"{what}['retries']")
        merged = DEFAULT_CONFIG | given | {"retries": retries}
        self.limit: float = retries["limit"]
        asked = callable(retries["delay"])
        self.delay: Any = retries.pop("delay") if asked else duration_of(retries, "delay", what)
        self.timeout = duration_of(merged, "timeout", what)
        is_number = isinstance(self.limit, (int, float)) and not isinstance(self.limit, bool)
        whole = is_number and self.limit in (math.inf, self.limit // 1)
        expect(whole and self.limit >= 0, f"{what} key 'limit'", self.limit, "0, 1, 2, … or inf")
        known = retries["backoff"] in [*_BACKOFF]
        expect(known, f"{what} key 'backoff'", retries["backoff"], f"one of {', '.join(_BACKOFF)}")
        legal, up_to = 0 < self.timeout <= max_sleep, f"over 0 and up to {max_sleep} ms"
        expect(legal, f"{what} key 'timeout'", merged["timeout"], up_to)
        sensitive = merged.get("sensitive", "output")
        expect(sensitive == "output", f"{what} key 'sensitive'", sensitive, "'output'")
        self.backoff = _BACKOFF[retries["backoff"]]
        self.raw = json.loads(_config_to_json(merged), object_hook=_Attributes)
        self.undo: StepConfig | None = None  # that of the rollback handler, if there is one

    @functools.cached_property
    def text(self) -> str:
        """What is stored of it: nothing of the one that most steps have."""
        if self.raw == DEFAULT_CONFIG and self.undo is None:
            return ""
        undo = {} if self.undo is None else {"rollback": self.undo.raw}
        return _config_to_json({"config": self.raw, **undo})

    @classmethod
    def load(cls, text: str, given: Any = None, part: str = "config") -> StepConfig:
        """The configuration that a step was started with, or its part "rollback"; a delay that is a
        function is the one that is given now."""
        if not text:
            return NO_CONFIG
        raw = read_back(text, "its configuration")[part]
        if "delay" not in raw["retries"]:
            raw["retries"]["delay"] = _gone if given is None else cls(given).delay
        return cls(raw)


def _gone(_: WorkflowDelayContext) -> NoReturn:
    raise LookupError("config['retries']['delay'] is no function any more")


NO_CONFIG = StepConfig()


# ==================================================================================================
# Part III: the sides
# ==================================================================================================
#
# --------------------------------------------------------------------------------------------------
# The API: engines, workflows, and the steps that they are made of. (What callers do to instances is
# in "Binding".)


class Engine(Core):
    """Runs workflows on a database file (or ":memory:").

    Enter it with `async with`. Any number of processes may open one file: one of them runs the
    instances, the others are full clients, and one of those takes over when it goes away.

    `env` is what workflows see as `self.env`; `limits` a `Limits`; `clock` a `Clock`;
    `hibernate_after` how long a waiting instance stays in memory; `drain` how long attempts that
    are in flight may take to end when it is left."""

    def __init__(
        self,
        database: str | os.PathLike[str] = "workflows.db",
        *,
        env: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        clock: Clock | None = None,
        hibernate_after: Duration = "1 second",
        drain: Duration = 0,
    ) -> None:
        super().__init__()
        path: Any = os.fspath(database) if isinstance(database, (str, os.PathLike)) else None
        expect(isinstance(path, str) and path != "", "database", database, "a path", TypeError)
        # (What `env` holds may be secret.)
        expect(isinstance(env, Mapping | None), "env", type(env), "a mapping", TypeError)
        expect(isinstance(limits, Limits | None), "limits", limits, "Limits", TypeError)
        expect(isinstance(clock, Clock | None), "clock", clock, "a Clock", TypeError)
        self.path = path if path == ":memory:" else os.path.realpath(path)
        self.env = Env(env or {})
        self.limits, self.clock = limits or Limits(), clock or Clock()
        self.hibernate_after, self.drain = parse_duration(hibernate_after), parse_duration(drain)
        # When the last calls were made that create instances.
        self.creations: deque[int] = deque(maxlen=self.limits.creations_per_second or 0)

    @classmethod
    def from_config(cls, path: str | os.PathLike[str] | None = None, **options: Any) -> Engine:
        """An engine in which the workflows of a configuration file of Cloudflare's `wrangler` are
        bound: `wrangler.jsonc`, `.json` or `.toml`; without a path, the one in the working folder.

        The file's `vars` become `env`, and its `limits.cpu_ms` that of the `limits`. The options
        are those of `Engine(…)`; of a name that both `vars` and `env` have, `env`'s value counts.

        Error: `ValueError` for whatever is wrong with the file, or a module that it names."""
        config = Configuration(path)
        engine = cls(**config.options(options))
        config.bind_workflows(engine)
        return engine

    def bind(
        self,
        cls: type[WorkflowEntrypoint[Any]],
        name: str | None = None,
        binding: str | None = None,
        *,
        steps: int | None = None,
        running: int | None = None,
        schedules: str | Iterable[str] = (),
        success_retention: Duration | None = None,
        error_retention: Duration | None = None,
    ) -> Workflow:
        """Makes a workflow known, before entering the engine or later. `name` defaults to the
        class's in kebab-case, `binding` (its name in `env`) to that in upper snake case.

        `steps` is the most steps that a run may call, up to 25,000; `running` the most instances of
        this workflow that run at once; `schedules` a cron expression or several (see `Cron`);
        `success_retention` and `error_retention` how long an instance is kept when it has ended,
        unless `create` says something else. The defaults are the engine's limits."""
        extends = isinstance(cls, type) and issubclass(cls, WorkflowEntrypoint)
        legal = extends and callable(cls.run) and cls.run is not WorkflowEntrypoint.run
        what = "a class that extends WorkflowEntrypoint and has run(self, event, step)"
        expect(legal, "the class", cls, what, TypeError)
        name = _kebab(cls.__name__) if name is None else name
        expect(is_name(name, 64), "name", name, f"1 to 64 {_NAME_RULE}")
        expect(name not in self._workflows, "name", name, "one that is not bound already")
        binding = name.upper().replace("-", "_") if binding is None else binding
        legal = isinstance(binding, str) and binding.isidentifier() and not iskeyword(binding)
        expect(legal, "binding", binding, "one like MY_WORKFLOW")
        expect(binding not in self.env, "binding", binding, "one that env doesn't have already")
        steps = self.limits.steps if steps is None else read_count(steps, 25_000, "steps")
        workflow = Workflow(self, str.__str__(name), binding, steps)
        workflow.cls = cls
        workflow.running = None if running is None else read_count(running, what="running")
        with naming("schedules"):
            workflow.schedules = read_schedules(schedules)
        kept = {"success_retention": success_retention, "error_retention": error_retention}
        given = {key: value for key, value in kept.items() if value is not None}
        with naming("bind"):
            workflow.retention = workflow.read_retention(given, [*kept], name)
        if self._state != "not open yet":
            self.check_open()
            self.writer.post(define, workflow)
        self._workflows[workflow.name] = self.env[workflow.binding] = workflow
        return workflow

    async def workflow(self, name: str) -> Workflow:
        """The workflow of a name that some process has bound, for one that has not its class: to
        create instances and to steer them. Error: `workflow.not_found`."""
        expect(isinstance(name, str), "name", name, "a str", TypeError)
        if name in self._workflows:
            return self._workflows[name]
        return Workflow(self, name, *await self.call(find_workflow, name))

    async def usage(self) -> Usage:
        """What Cloudflare's pricing is based on, and what it would come to; cheap to ask."""
        return cast(Usage, await self.call(read_usage))


def warn_about_unbound_work(scheduler: Scheduler) -> None:
    """All processes that run a file bind the same workflows: the owner says so, once for each name,
    if that is not so."""
    sql = """SELECT key, name FROM workflows AS w WHERE
             EXISTS (SELECT 1 FROM instances WHERE workflow = w.key AND status = 'queued')
             OR EXISTS (SELECT 1 FROM instances WHERE workflow = w.key AND wake <= ?)"""
    db, now = scheduler.database, scheduler.clock.now()
    for key, name in db.rows(sql, now) if db.owner else ():
        if key not in scheduler.bound and key not in scheduler.warned:
            scheduler.warned.add(key)
            log.warning("%s: there is work for %r, which is not bound here", db.path, name)


def find_workflow(tx: Transaction, name: str) -> tuple[str, int]:
    """Binding and limit of steps of a name that some process has bound."""
    sql = "SELECT binding, steps FROM workflows WHERE name = ?"
    found = tx.db.rows(sql, name) if is_name(name, 64) else []  # SQLite takes no surrogates
    require(found, "workflow.not_found", f"no process has bound a workflow {name!r}")
    return tuple(found[0])


class WorkflowEntrypoint(Generic[Params]):
    """Extend it, and define `async def run(self, event, step)`. A new object is made for each life
    of each instance; `self.env` has the engine's `env` and bindings.

    developers.cloudflare.com/workflows/build/workers-api/ (WorkflowEntrypoint)"""

    def __init__(self, ctx: Any, env: Any) -> None:
        self.ctx, self.env = ctx, env

    async def run(self, event: WorkflowEvent[Params], step: WorkflowStep) -> Any:
        """The workflow. What it returns becomes the output, an error that leaves it the error."""
        raise NotImplementedError


class WorkflowStep:
    """The `step` of `run(event, step)`. Each method returns something to await, once.

    developers.cloudflare.com/workflows/build/workers-api/ (WorkflowStep)"""

    def __init__(self, run: Replay) -> None:
        self._run = run
        self.declared: dict[tuple[str, str], StepFunction[Any]] = {}  # see the Python dialect

    @overload
    def do(
        self, name: str, callback: AsyncFunction[Result], options: Options = None, **more: Any
    ) -> Pending[Result]: ...
    @overload
    def do(
        self, name: str, callback: Callable[..., Result], options: Options = None, **more: Any
    ) -> Pending[Result]: ...
    @overload
    def do(
        self, name: str, config: Options, callback: AsyncFunction[Result], *more: Any, **named: Any
    ) -> Pending[Result]: ...
    @overload
    def do(
        self, name: str, config: Options, callback: Callable[..., Result], *more: Any, **named: Any
    ) -> Pending[Result]: ...
    @overload
    def do(self, name: str | None = None, *args: Any, **options: Any) -> StepDecorator: ...
    def do(self, name: Any = None, *args: Any, **options: Any) -> Any:
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
            return StepCall(self._run, "do", plan_do, name, args, options)
        return StepDecorator(self, name, args, options)

    def sleep(self, name: Any = None, *args: Any, **options: Any) -> Pending[None]:
        """`sleep(name, duration)`: waits for a duration, at most 365 days, across restarts.

        developers.cloudflare.com/workflows/build/sleeping-and-retrying/
        Errors: `step.invalid_name`, `step.invalid_duration`, `limit.sleep`."""
        return StepCall(self._run, "sleep", plan_sleep, name, args, options)

    def sleep_until(self, name: Any = None, *args: Any, **options: Any) -> Pending[None]:
        """`sleep_until(name, when)`: waits for a moment, a `datetime`, or seconds (below 1e11) or
        milliseconds since 1970. One that has passed returns at once. It is a sleep: both share the
        counts of a name, and the errors."""
        return StepCall(self._run, "sleep", plan_sleep_until, name, args, options)

    def wait_for_event(
        self, name: Any = None, *args: Any, **options: Any
    ) -> Pending[WorkflowStepEvent]:
        """`wait_for_event(name, type, timeout="24 hours")`, or `(name, {"type": …, "timeout": …})`:
        takes the oldest buffered event of that type, or waits for one. Beyond the timeout (0 to 365
        days) it raises `WorkflowTimeoutError`.

        developers.cloudflare.com/workflows/build/events-and-parameters/
        Errors: `step.invalid_name`, `step.invalid_config`, `event.invalid_type`, `limit.sleep`."""
        return StepCall(self._run, "wait_for_event", plan_wait_for_event, name, args, options)


# --------------------------------------------------------------------------------------------------
# Files: which of them are refused, and what is noticed that happens to them. SQLite goes on writing
# into a file that was removed, replaced or cut short, where nobody would ever read it.

SIDES = ("-owner", "-wal", "-shm")  # the files beside it: the lock, and SQLite's log with its index
LONG_LOG = 2**24  # bytes; SQLite cuts off the rest when it begins the log (-wal) anew


class Files:
    """The files of an open database."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._found = {each: os.stat(each) for each in [path, *(path + side for side in SIDES)]}

    def check(self) -> None:
        """Fails if they are not what they were, or less."""
        shorter = False
        for path, was in self._found.items():
            if not os.path.exists(path) or not os.path.samestat(is_now := os.stat(path), was):
                raise WorkflowInternalError(f"{path} was removed or replaced")
            ours = LONG_LOG if path.endswith("-wal") else math.inf
            shorter = shorter or is_now.st_size < min(was.st_size, ours)
            self._found[path] = is_now
        if shorter and not self._is_whole():  # else somebody has called VACUUM, for example
            raise WorkflowInternalError("the file, or its log beside it, was truncated")

    def _is_whole(self) -> bool:
        """Whether every page is there, as a new connection sees it."""
        if os.path.getsize(self._path) == 0:  # SQLite would now delete the log
            return False
        with contextlib.closing(sqlite3.connect(self._path)) as db:
            return db.execute("PRAGMA quick_check(1)").fetchall() == [("ok",)]


def refuse_what_is_not_ours(path: str) -> None:
    """Refuses a file that isn't ours, or not to be written, before any lock or side file is made.
    It is read through SQLite, because closing a plain file would drop the locks that another engine
    of this process holds on it."""
    if os.path.isdir(path):
        raise WorkflowInternalError("is a directory")
    for each in [path + side for side in ("", *SIDES)]:
        # SQLite removes side files when another process leaves, so one may vanish before the end.
        if os.path.exists(each) and not os.access(each, os.W_OK) and os.path.exists(each):
            raise WorkflowInternalError(f"{os.path.basename(each)} is read-only")
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        return
    uri = f"file:{urllib.parse.quote(os.fsencode(path))}?mode=ro&immutable=1"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        # A process may have died while SQLite wrote its log back: then the schema makes sense only
        # together with the log, which is not read here.
        db.execute("PRAGMA writable_schema = ON")
        if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            raise WorkflowInternalError("not a database of this module")
        schema_version(db)


def schema_version(db: sqlite3.Connection) -> int:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise WorkflowInternalError(f"written by a newer version (schema {version})")
    return version


def storage_error(path: str, error: BaseException) -> WorkflowInternalError:
    if isinstance(error, WorkflowInternalError):
        return WorkflowInternalError(f"{path}: {error}")
    return WorkflowInternalError(f"{path}: storage failed: {type(error).__name__}: {error}")


# --------------------------------------------------------------------------------------------------
# Operations: what callers do to instances, each within a transaction. The next section posts these,
# in whichever process; where that is not the owner, the owner hears of it by `wake`.
#
# Whatever raises an instance's generation ends the lease of its run.

Retention = tuple[int | None, int | None]  # after a success or a termination, and after an error
Entry = tuple[str, str, int | None, int | None]  # id, params, and retention
Ids = list[str]
Snapshot = tuple[Instance | None, list[Row]]  # an instance, if there is one, and rows of it


def not_found(workflow: str, id: str) -> WorkflowError:
    # Cloudflare's Python SDK passes on nothing but the text.
    what = f"(instance.not_found) workflow {workflow!r} has no instance {id!r}"
    return refusal("instance.not_found", what)


def create_instances(tx: Transaction, workflow: str, entries: Sequence[Entry], trigger: str) -> Ids:
    """Stores instances, in order; returns the ids of those that are new."""
    (key,) = tx.db.one("SELECT key FROM workflows WHERE name = ?", workflow)
    there = tx.select(f"workflow = ? AND id {_AMONG}", key, json.dumps([id for id, *_ in entries]))
    over = [inst for inst in there if inst.is_over(tx.now)]  # not cleared away yet
    taken = {inst.id for inst in there if inst not in over}
    new: dict[str, Entry] = {}
    for entry in entries:
        if entry[0] not in taken:
            new.setdefault(entry[0], entry)
    if not new:
        return []
    if trigger != "cron":  # nobody would hear of the refusal
        for _, params, *_ in entries:
            check_state(tx, 0, size_of(params), refusal)
        check_queue(tx, len(new))
    for inst in over:
        tx.purge(inst)
    first = tx.take_numbers(len(new)) - len(new) + 1
    for number, (id, params, success, error) in enumerate(new.values(), first):
        inst = Instance(number, key, id, trigger, tx.now, success, error, "new", place=number)
        tx.move(inst, Row("queued", data=params), size_of(params))
    tx.requests += len(new)
    return [*new]


def list_instances(tx: Transaction, workflow: str, status: str | None, before: int) -> list[Any]:
    """Key and id of up to a hundred of a workflow's instances with a key below `before`, newest
    first; None instead of the id of one that has expired."""
    where = "key < ? AND status = coalesce(?, status) ORDER BY key DESC LIMIT 100"
    found = tx.select(f"{_OF_NAMED} AND {where}", workflow, before, status)
    return [(inst.key, None if inst.is_over(tx.now) else inst.id) for inst in found]


def delete_instances(tx: Transaction, workflow: str, ids: Ids) -> dict[str, list[Any]]:
    """Cloudflare's answer: what was deleted and what was not, in the order of the ids."""
    known = tx.find(workflow, ids)
    for inst in known.values():
        _delete(tx, inst)
    error = {"code": 10400, "message": "workflows.api.error.instance.not_found"}
    deleted = [{"id": id} for id in ids if id in known]
    return {"deleted": deleted, "errors": [{"id": id, **error} for id in ids if id not in known]}


def read_journal(tx: Transaction, workflow: str, id: str, known: Instance | None) -> Snapshot:
    """The instance with that id, if there is one, and its rows: only the new ones, if it is still
    the one that is known."""
    inst = tx.find(workflow, [id]).get(id)
    if inst is None:
        return None, []
    seen = known.seq if known is not None and known.key == inst.key else 0
    return inst.copy(), tx.journal(inst, "seq > ?", seen)


def which_changed(tx: Transaction, topics: list[Topic]) -> list[Topic]:
    """On which of these there may be news, when another process wrote."""
    sql = """SELECT asked.value FROM json_each(?) AS asked LEFT JOIN instances AS i
             ON i.key = asked.value AND asked.type = 'integer'
             WHERE i.id IS NULL OR i.ended IS NOT NULL"""
    return [topic for (topic,) in tx.db.rows(sql, json.dumps(topics))]


def on_instance(tx: Transaction, workflow: str, id: str, operation: Operation, *args: Any) -> Any:
    """Carries out one of the operations below on the instance with that id."""
    inst = tx.find(workflow, [id]).get(id)
    if inst is None:
        raise not_found(workflow, id)
    return operation(tx, inst, *args)


def read_end(tx: Transaction, inst: Instance) -> tuple[Instance, Any, Any]:
    """The instance as it is now; and if it has finished, its output or (the record of) its error,
    and that of the rollback handler that has failed."""
    if inst.status not in FINISHED:
        return inst.copy(), None, None
    (last,) = tx.journal(inst, "seq = ?", inst.seq)
    what = f"the end of instance {inst.id!r} (row {inst.seq})"
    return inst.copy(), read_back(last.data or "null", what), read_back(last.extra or "null", what)


def _send_event(tx: Transaction, inst: Instance, type: str, payload: str) -> None:
    what = f"instance {inst.id!r} is {inst.status}: it takes no more events"
    require(inst.status not in FINISHED, "instance.not_running", what)
    check_state(tx, inst.bytes, size_of(payload), refusal)
    tx.buffer(inst, type, payload)


def _pause(tx: Transaction, inst: Instance) -> None:
    if inst.rollback == "begun":
        return
    if inst.status == "running":
        tx.move(inst, Row("waitingForPause"), wake=tx.now)
    elif inst.status in ("waiting", "queued"):
        tx.move(inst, Row("paused"), paused=tx.now, wake=tx.now)


def _resume(tx: Transaction, inst: Instance) -> None:
    """A paused one goes back to where it was: to its place in the queue, if it had one."""
    if inst.status == "waitingForPause":
        tx.move(inst, Row("running"), wake=tx.now)
    elif inst.status == "paused":
        unpause(tx, inst)
        status = "waiting" if inst.place is None else "queued"
        tx.move(inst, Row(status), paused=None, wake=tx.now)


def unpause(tx: Transaction, inst: Instance) -> None:
    """What fell due before the pause, and wasn't noticed, stays due: only the rest stood still."""
    if inst.paused is not None:
        sql = "UPDATE waits SET due = due + ? WHERE instance = ? AND NOT fixed AND due > ?"
        tx.db.execute(sql, (tx.now - inst.paused, inst.key, inst.paused))


def _terminate(tx: Transaction, inst: Instance, source: str, rollback: bool) -> None:
    """At once; or, with a rollback that has anything to undo, at the end of that."""
    what = f"instance {inst.id!r} is {inst.status}: it can't be terminated any more"
    require(inst.status not in FINISHED, "instance.cannot_terminate", what)
    if rollback:
        message = f"instance {inst.id!r} was terminated"
        error = WorkflowError(message, code="instance.terminated", name="Terminated")
        # (If one is under way, that will do.)
        if inst.rollback == "begun" or begin_rollback(tx, inst, encode_error(error)):
            tx.change(inst, termination=inst.termination or source)
            return
    if inst.rollback == "begun":
        inst.rollback = "failed"
    inst.generation += 1
    tx.move(inst, Row("terminated"), termination=source, wake=tx.now)


def cut(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """What a restart from a step keeps of a history: what began before that step. `keys` are those
    that the step may have; the first that the history knows counts, and if it knows none, nothing
    is kept. What `run` cancelled later begins anew, because the reason for that may be gone."""
    first = next((row.seq for key in keys for row in rows if row.step == key), 0)
    counts_from = {row.step: row.seq for row in reversed(rows)}
    counts_from |= {row.step: row.seq for row in rows if row.type == "cancel"}
    return [row for row in rows if (counts_from[row.step] if row.step else row.seq) < first]


def _restart(tx: Transaction, inst: Instance, steps: Sequence[str]) -> None:
    """From the step with the first of these keys that there is: then what started before that step
    is kept. Without any keys from the top."""
    rows = tx.journal(inst)
    kept, texts = cut(rows, steps), [rows[0].data]
    known = fold(kept)[0]  # before anything is dropped, because a row may be unreadable
    if steps:
        what = f"instance {inst.id!r} has no such step {step_label(steps[0])!r}"
        require(kept, "instance.cannot_restart", what)
        payloads = tx.db.rows("SELECT payload FROM events WHERE instance = ?", inst.key)
        texts += [payload for (payload,) in payloads]
    else:
        tx.db.execute("DELETE FROM events WHERE instance = ?", (inst.key,))
        inst.started = None
    for table in ("journal", "waits"):
        sql = f"DELETE FROM {table} WHERE instance = ? AND seq NOT {_AMONG}"
        tx.db.execute(sql, (inst.key, str([row.seq for row in kept])))
    unpause(tx, inst)
    for step in known.values():
        if step.state == "done":
            texts.append(step.data)
        if step.open:  # it was in flight: that is as after a clean stop
            tx.append(inst, Row("stop", step.key))
    size = sum(size_of(text or "") for text in texts) - inst.bytes
    inst.generation += 1
    inst.ended = inst.paused = inst.termination = inst.rollback = None
    inst.careful, inst.place = 0, tx.take_numbers()
    tx.move(inst, Row("queued", data=None if kept else rows[0].data), size, wake=tx.now)


def _delete(tx: Transaction, inst: Instance) -> None:
    """Frees the id; the owner clears the rest away when it has stopped the run."""
    tx.touched |= {inst.key, inst.id or ""}
    tx.db.execute("UPDATE instances SET id = NULL WHERE key = ?", (inst.key,))
    inst.id = None
    inst.generation += 1
    tx.change(inst, status="terminated", wake=tx.now)


# --------------------------------------------------------------------------------------------------
# Binding: the objects that callers hold, and how what they are given is checked.

Options = Mapping[str, Any] | None  # a dict with Cloudflare's keys, or keyword arguments
HistoryEvents = AsyncGenerator[WorkflowHistoryEvent, None]
# What `create` takes beside an id. (A hint where to run has no effect here.)
_CREATE = ("params", "retention", "locationHint", "location_hint")
# Why `create_batch` has left an entry out, in Cloudflare's words.
_EXISTS = {"code": 10405, "message": "workflows.api.error.instance.already_exists"}
_REPEATED = {"code": 10415, "message": "workflows.api.error.instance.duplicate_in_batch"}
_KEPT_FOR = ("successRetention", "errorRetention")
_RESERVED = re.compile(r"batch|terminate|terminateAll|cf_[0-9a-fA-F]{64}")  # by Cloudflare
_SCHEDULED = re.compile(r"[^ ]+( [^ ]+){4}-[0-9]+")  # the ids that schedules give: "<cron>-<ms>"
_KINDS = {camel(kind): kind for kind in STEP_KINDS}


class Workflow:
    """A workflow as callers see it: creates instances and finds them again.

    developers.cloudflare.com/workflows/build/workers-api/ (Workflow)"""

    cls: type[WorkflowEntrypoint[Any]]  # in a process that has bound it
    running: int | None = None  # the most instances that run at once
    schedules: tuple[Cron, ...] = ()
    source = "binding"  # who asks, in Cloudflare's words: see "HTTP"

    def __init__(self, engine: Engine, name: str, binding: str, steps: int) -> None:
        self.engine, self.name, self.binding, self.steps = engine, name, binding, steps
        # How long an instance is kept that has succeeded or was terminated, or that has failed.
        self.retention = engine.limits.success_retention, engine.limits.error_retention

    async def create(self, options: Options = None, /, **given: Any) -> WorkflowInstance:
        """`create(id=…, params=…, retention=…)`, or a dict of these: returns when the new instance
        is durably stored. `id` is up to 100 letters, digits, '_' and '-' (default: a UUID4),
        `params` any value that can be stored (default `{}`), `retention` how long it is kept when
        it has ended: `{"successRetention": …, "errorRetention": …}`, up to the limits'.
        `locationHint` has no effect.

        Errors: `instance.invalid_id`, `instance.already_exists`, `params.not_serializable`,
        `limit.event_payload`, `limit.instance_state`, `limit.creation_rate`,
        `limit.queued_instances`, `limit.retention`."""
        entry = self._entry(merge(options, given, ("id", *_CREATE), "create"), "create")
        created = await self._create([entry])
        what = f"workflow {self.name!r} has an instance {entry[0]!r} already"
        require(created, "instance.already_exists", what)
        return created[0]

    @overload
    async def create_batch(self, batch: Iterable[Mapping[str, Any]]) -> list[WorkflowInstance]: ...
    @overload
    async def create_batch(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]: ...
    async def create_batch(self, batch: Any) -> Any:
        """Creates 1 to 100 instances in one transaction, in order. Ids that exist already, or
        repeat, are skipped and left out of the result. Errors as in `create`, and
        `limit.batch_size`.

        In Cloudflare's newer form the batch is `{"instances": […]}`, or `{"count": n}` with other
        options of `create` but no id. The result is `{"created": […], "errors": […]}` then, with
        `{"index", "id", "code", "message"}` for each that was skipped."""
        if not isinstance(batch, Mapping):
            return await self._create(self._batch(batch, "batch", self._entry))
        if "instances" in batch:
            given = options_of(batch, ["instances"], "batch")["instances"]
        else:
            options = options_of(batch, ("count", *_CREATE), "batch")
            count = read_count(options.pop("count", None), what="batch: count")
            given = [options] * min(count, self.engine.limits.batch + 1)
        entries = self._batch(given, "batch", self._entry)
        created = await self._create(entries)
        new, seen, errors = {instance.id for instance in created}, set[str](), []
        for index, (id, *_) in enumerate(entries):
            if id in seen or id not in new:
                errors.append({"index": index, "id": id, **(_REPEATED if id in seen else _EXISTS)})
            seen.add(id)
        return {"created": created, "errors": errors}

    async def _create(self, entries: Sequence[Entry]) -> list[WorkflowInstance]:
        count_creation(self.engine)
        made = await self.engine.call(create_instances, self.name, entries, self.source)
        return [WorkflowInstance(self, id) for id in made]

    async def get(self, id: str) -> WorkflowInstance:
        """The instance with that id. Error: `instance.not_found`."""
        expect(isinstance(id, str), "id", id, "a str", TypeError)
        await self.engine.call(on_instance, self.name, id, ignore)
        return WorkflowInstance(self, id)

    async def delete_batch(self, ids: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """Deletes 1 to 100 instances in one transaction. Returns `{"deleted": [{"id"}], "errors":
        [{"id", "code", "message"}]}`, with one entry for each id.

        Errors: `instance.invalid_id`, `limit.batch_size`; then none is deleted."""
        legal = self._batch(ids, "ids", self.check_id)
        return cast(dict[str, Any], await self.engine.call(delete_instances, self.name, legal))

    # (From here on, `list` is this method in the class, and the built-in one inside of methods.)

    async def list(
        self, status: str | None = None, limit: int | None = None
    ) -> AsyncGenerator[WorkflowInstance, None]:
        """`async for instance in workflow.list(status="errored", limit=100)`: the instances, newest
        first."""
        if status is not None:
            check_status(status)
        legal = limit is None or (type(limit) is int and limit >= 0)
        expect(legal, "limit", limit, "a whole number from 0")
        left = math.inf if limit is None else limit
        async for page in pages(self, status):
            for id in page:
                if left == 0:
                    return
                yield WorkflowInstance(self, id)
                left -= 1

    async def replay(self, id: str) -> WorkflowReplay:
        """Whether an instance would go on as recorded, with the class that this process has bound:
        calls `run` with what is recorded, up to where it would do something new. No callback runs,
        and nothing is written, so that this is safe beside the process that runs the instance. (An
        engine that has bound the class may itself become the owner, and run instances with it. The
        command `check` never does.)

        Error: `instance.not_found`."""
        expect(isinstance(id, str), "id", id, "a str", TypeError)
        self._need_class()
        loaded = await self.engine.call(on_instance, self.name, id, load_one)
        return await ReplayRun(self.engine, self, loaded).report()

    def replay_all(self) -> AsyncGenerator[WorkflowReplay, None]:
        """`async for report in workflow.replay_all()`: the same for each unfinished instance."""
        self._need_class()
        return report_on_unfinished(self)

    def _need_class(self) -> None:
        if not hasattr(self, "cls"):
            raise RuntimeError(f"workflow {self.name!r} is not bound here: replay needs its class")

    def introspect(self) -> WorkflowIntrospector:
        """`async with workflow.introspect() as all_instances`, for tests: to look into the
        instances that are created inside the block, and to change what happens to them. The
        engine must be the one that runs them."""
        return WorkflowIntrospector(self)

    def introspect_instance(self, id: str) -> WorkflowInstanceIntrospector:
        """`async with workflow.introspect_instance(id) as one`: the same for one instance, which
        may also be created inside the block. Error: `instance.invalid_id`."""
        return WorkflowInstanceIntrospector(self, self.check_id(id))

    # -- what it is given, checked

    def _batch(self, given: Any, what: str, check: Callable[[Any, str], Any]) -> Any:
        """What `check` makes of each entry of a caller's list, if there aren't too many."""
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
            raise TypeError(f"{what} is {type(given).__name__}: expected a list")
        entries = [check(entry, f"{what}[{n}]") for n, entry in enumerate(given)]
        limit = self.engine.limits.batch
        what = f"{what}: expected 1 to {limit} entries (limit batch)"
        require(0 < len(entries) <= limit, "limit.batch_size", what)
        return entries

    def _entry(self, given: Any, where: str) -> Entry:
        options, most = options_of(given, ("id", *_CREATE), where), self.engine.limits.payload_bytes
        id, what, code = options.get("id"), f"{where}: params", "params.not_serializable"
        id = str(uuid.uuid4()) if id is None else self.check_id(id, where, new=True)
        text, *_ = checked(options.get("params", {}), what, code, payload_bytes=most)
        kept = self.read_retention(options.get("retention"), _KEPT_FOR, f"{where}: retention")
        return id, text, *kept

    def read_retention(self, given: Any, names: Sequence[str], where: str) -> Retention:
        """How long an instance is kept that has succeeded or was terminated, or that has failed:
        what is given by these names, or else what holds for all of the workflow."""
        given, limits = options_of({} if given is None else given, names, where), self.engine.limits
        kept, plan = [*self.retention], (limits.success_retention, limits.error_retention)
        for n, name in enumerate(names):
            if name in given:
                ms, most, asked = duration_of(given, name, where), plan[n], show(given[name])
                what = f"{where}: {name} is {asked}: expected at most {most} ms (limit retention)"
                require(most is None or ms <= most, "limit.retention", what)
                kept[n] = ms
        return kept[0], kept[1]

    def check_id(self, id: Any, where: str = "id", new: bool = False) -> str:
        """Refuses what is no instance id; for a new instance, also one that schedules give."""
        limit = self.engine.limits.id_length
        scheduled = not new and isinstance(id, str) and _SCHEDULED.fullmatch(id)
        legal = scheduled or (is_name(id, limit) and not _RESERVED.fullmatch(id))
        what = f"1 to {limit} {_NAME_RULE}, and none that Cloudflare keeps for itself"
        require(legal, "instance.invalid_id", f"{where}: {show(id)} is no id: expected {what}")
        return str.__str__(id)  # of an enum, too

    def event_of(self, options: Any, given: dict[str, Any], what: str) -> tuple[str, str]:
        """Type and payload of an event that somebody sends."""
        event = {"payload": None} | merge(options, given, ("type", "payload"), what)
        if "type" not in event:
            raise TypeError(f"{what} needs a type")
        type = check_event_type(event["type"], refusal)
        code, most = "event.not_serializable", self.engine.limits.payload_bytes
        return type, checked(event["payload"], "payload", code, payload_bytes=most)[0]


async def pages(
    workflow: Workflow, status: str | None, progress: Callable[[int], object] = ignore
) -> AsyncGenerator[Ids, None]:
    """The ids of a workflow's instances, newest first, up to a hundred at a time; `progress` is
    told how many that were."""
    before, done = 2**62, 0
    while page := await workflow.engine.call(list_instances, workflow.name, status, before):
        yield [id for _, id in page if id is not None]
        before, done = page[-1][0], done + len(page)
        progress(done)


def check_status(status: Any) -> None:
    """Refuses what is no status of an instance."""
    expect(status in STATUSES, "status", status, f"one of {', '.join(STATUSES)}")


def _kebab(name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return words.replace("_", "-").strip("-").lower()


def count_creation(engine: Engine) -> None:
    """Counts a call that creates instances, or refuses it: so many may be made within a second by
    this process. (That is an account's quota.)"""
    limit, now = engine.limits.creations_per_second, engine.clock.now()
    recent = [at for at in engine.creations if now - 1000 < at <= now]  # a clock may be set back
    what = f"more than {limit} creations within a second (limit creations_per_second)"
    require(len(recent) != limit, "limit.creation_rate", what)
    engine.creations.append(now)


def check_queue(tx: Transaction, new: int) -> None:
    """Refuses so many new instances if too many would be queued. Counting takes time with a long
    queue, so that it is done again only when a tenth of the room is used up."""
    scheduler, limit = tx.scheduler, tx.scheduler.limits.queued
    if limit is not None and new > scheduler.queue_room:
        queued = "status = 'queued' AND workflow IN (SELECT key FROM workflows)"
        (length,) = tx.db.one(f"SELECT count(*) FROM instances WHERE {queued}")
        room = limit + scheduler.free(tx, scheduler.limits.running, scheduler.bound) - length
        what = f"more than {limit} instances would be queued (limit queued)"
        require(new <= room, "limit.queued_instances", what)
        scheduler.queue_room = (room - new) // 10 + new
    scheduler.queue_room -= new


class WorkflowInstance:
    """One instance of a workflow: ask it, steer it, send it events. What a call changes is visible
    to `status()` in every process when it returns. Every method may raise `instance.not_found`.

    developers.cloudflare.com/workflows/build/workers-api/ (WorkflowInstance)"""

    def __init__(self, workflow: Workflow, id: str) -> None:
        self.workflow, self.id = workflow, id

    def __repr__(self) -> str:
        return f"<WorkflowInstance {self.workflow.name} {self.id}>"

    async def _call(self, operation: Operation, *args: Any) -> Any:
        engine, name = self.workflow.engine, self.workflow.name
        return await engine.call(on_instance, name, self.id, operation, *args)

    async def status(self) -> InstanceStatus:
        """Status, output and error as they are now, and how a rollback went."""
        inst, end, failure = await self._call(read_end)
        output = end if inst.status == "complete" else None
        error = _Attributes(brief(end)) if inst.status == "errored" else None
        rollback = None
        if inst.rollback not in (None, "begun"):
            failure = failure and _Attributes(brief(failure))
            rollback = _Attributes(outcome=inst.rollback, error=failure)
        return InstanceStatus(inst.status, output, error, rollback)

    async def history(self) -> list[WorkflowHistoryEvent]:
        """What has happened so far: the events of `subscribe` up to now."""
        rows, history = await self._call(Transaction.journal), History(self.id)
        return [event for row in rows for event in history.events(row)]

    async def pause(self) -> None:
        """Pauses it: at once if it is waiting or queued, else (`waitingForPause`) when the
        callbacks in flight have finished. Sleeps, retry delays and event timeouts stand still while
        paused."""
        await self._call(_pause)

    async def resume(self) -> None:
        """Goes on from a pause, or cancels one that hasn't taken effect."""
        await self._call(_resume)

    async def terminate(self, options: Options = None, /, **given: Any) -> None:
        """Stops it for good, at once. With `rollback=True` (or a dict with that) the rollback
        handlers of its steps run first: it returns when their beginning is recorded, and another
        `terminate()` ends that at once.

        Error: `instance.cannot_terminate` if it has finished."""
        rollback = merge(options, given, ("rollback",), "terminate").get("rollback", False)
        expect(isinstance(rollback, bool), "rollback", rollback, "True or False", TypeError)
        await self._call(_terminate, self.workflow.source, rollback)

    async def restart(self, options: Options = None, /, **given: Any) -> None:
        """Begins again with the same id, params and timestamp; everything else is erased. With
        `{"from": {"name": …, "count": 1, "type": "do" | "sleep" | "waitForEvent"}}` it begins from
        that step: what started before it is kept (but what `run` cancelled after it begins anew),
        and so are buffered events.

        Error: `instance.cannot_restart` if its history has no such step."""
        start = merge(options, given, ("from",), "restart").get("from")
        await self._call(_restart, () if start is None else _keys_of(start))

    async def delete(self) -> None:
        """Deletes it, in any state, with all that is stored of it. Its id is free at once."""
        await self._call(_delete)

    async def send_event(self, options: Options = None, /, **given: Any) -> None:
        """`send_event(type=…, payload=…)`, or a dict of these: stored durably when it returns, and
        delivered to exactly one `wait_for_event` of that type, now or later.

        Errors: `event.invalid_type`, `event.not_serializable`, `instance.not_running`,
        `limit.event_payload`, `limit.instance_state`."""
        await self._call(_send_event, *self.workflow.event_of(options, given, "send_event"))

    async def result(self, timeout: Duration | None = None) -> Any:
        """Waits for the end. Returns the output; raises the error that left `run`, or
        `WorkflowError` (`instance.terminated`, `instance.not_found`), or `WorkflowTimeoutError`
        after `timeout`."""
        patience = None if timeout is None else parse_duration(timeout)
        engine = self.workflow.engine
        late: asyncio.Future[None] = engine.loop.create_future()
        timer = engine.clock.call_later(patience, late.cancel) if patience else None
        try:
            inst, end, _ = await self._call(read_end)
            key = inst.key
            while inst.status not in FINISHED:
                ended = engine.watchers.watch(key)  # before it is read, so that nothing is missed
                inst, end, _ = await self._call(read_end)
                if inst.key != key:  # deleted, and its id is used again
                    raise not_found(self.workflow.name, self.id)
                if key in engine.lives.damaged and inst.status not in ("paused", "queued"):
                    raise WorkflowInternalError(engine.lives.damaged[key])
                if inst.status not in FINISHED:
                    if late.done() or patience == 0:  # (no clock need be moved for that)
                        raise WorkflowTimeoutError(f"no result of {self.id!r} within {patience}ms")
                    await asyncio.wait({ended, late}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if timer is not None:
                timer.cancel()
        if inst.status == "complete":
            return end
        if inst.status == "errored":
            raise rebuild_error(end)
        raise refusal("instance.terminated", f"instance {self.id!r} was terminated")

    def subscribe(
        self, cursor: int | Options = None, filter: Iterable[str] | None = None
    ) -> WorkflowSubscription:
        """`async for event in instance.subscribe()`: its history, then live what happens, until the
        instance ends. To go on after a break, give the last `event_id` as `cursor`; `filter` is a
        list of the types to show. (Or give a dict of both.) Each event comes once, in order.

        Errors: `instance.not_found`, also when it is deleted meanwhile."""
        if isinstance(cursor, Mapping):
            named = {} if filter is None else {"filter": filter}
            options = merge(cursor, named, ("cursor", "filter"), "subscribe")
            cursor, filter = options.get("cursor"), options.get("filter")
        legal = cursor is None or type(cursor) is int
        expect(legal, "cursor", cursor, "an event_id or None", TypeError)
        shown = EVENT_TYPES if filter is None else {*filter}
        known = f"some of {', '.join(sorted(EVENT_TYPES))}"
        expect(shown <= EVENT_TYPES, "filter", shown - EVENT_TYPES, known)
        return WorkflowSubscription(self._events(cursor or -1, shown))

    async def _events(self, cursor: int, shown: Collection[str]) -> HistoryEvents:
        history, key = History(self.id), None
        async with contextlib.aclosing(self.follow()) as news:
            async for inst, rows in news:
                if inst is None or key not in (None, inst.key):
                    raise not_found(self.workflow.name, self.id)
                key = inst.key
                for row in rows:
                    for event in history.events(row):
                        if event.event_id > cursor and event.type in shown:
                            yield event
                if inst.status in FINISHED:
                    return

    async def follow(self) -> AsyncGenerator[Snapshot, None]:
        """The instance with this id, if there is one, and the rows that are new: now, and again
        whenever something has changed."""
        engine, inst = self.workflow.engine, None
        while True:
            changed = engine.watchers.watch(self.id)  # before it is read, so that nothing is missed
            inst, rows = await engine.call(read_journal, self.workflow.name, self.id, inst)
            yield inst, rows
            await asyncio.wait({changed})


class WorkflowSubscription:
    """What `subscribe` returns: to go through with `async for`; or, as Cloudflare writes it, to be
    awaited, and asked for one event after the other."""

    def __init__(self, events: HistoryEvents) -> None:
        self._events = events

    def __aiter__(self) -> HistoryEvents:
        return self._events

    def __await__(self) -> Generator[None, None, Self]:
        yield from ()  # there is nothing to wait for
        return self

    async def next(self) -> dict[str, Any]:
        """`{"done": False, "value": event}`; or `{"done": True, "value": None}`, when no other one
        will come."""
        event = await anext(self._events, None)
        return {"done": event is None, "value": event}

    async def aclose(self) -> None:
        """Ends it early: `async with contextlib.aclosing(instance.subscribe()) as subscription`."""
        await self._events.aclose()


def _keys_of(given: Any) -> Ids:
    """The keys that the step may have from which a restart begins: one for each kind, unless the
    kind is given."""
    step = options_of(given, ("name", "count", "type"), "from")
    kind = step.pop("type", None)
    expect(kind in (None, *_KINDS), "from: the type", kind, f"one of {', '.join(_KINDS)}")
    name, count = step_named(step, "count")
    kinds = STEP_KINDS if kind is None else [_KINDS[kind]]
    return [SEPARATOR.join((kind, name, str(count))) for kind in kinds]


# --------------------------------------------------------------------------------------------------
# Cancelled and nested calls: what `run` or a callback wants no more, and what callbacks call.
#
# When `run` cancels a call, it knows that at once, but a row says so together with the next thing
# that `run` does: a run that is being torn down records nothing. In a later life that call does not
# begin again: it stays pending until `run` cancels it again, and what `run` saw after the
# cancellation waits for that.
#
# When a callback cancels a call, that is as if the call had not been made, because a callback is
# repeated as a whole. (But the stored result of a `do` is kept, and an event that nobody has seen
# goes back to the buffer.) A row `stop` says so at once; until it is stored, no other call of that
# key begins.


def call_cancelled(run: Run, call: StepCall) -> None:
    """`run`, or the callback around it, has cancelled a call."""
    step = call.step
    if call.attempt is None or call.attempt.has_ended:  # else when its callback ends
        close_call(run, call)
    run.last_move = run.engine.turns.now
    in_turn = run.inbox.pop(call.key, None) is not None
    if not step.nested:
        if step.state != "cancelled":
            step.state, in_turn = "cancelled", True
            run.cancelled[call.key] = run.seen
        if in_turn:  # not skipped by `hand_over`
            run.seen = call.key
    elif step.open or step.state != "new":
        row = Row("stop", call.key)

        def stopped(seq: int, _: BaseException | None) -> None:
            run.saw(seq)
            apply(run.steps, row)
            run.drop(call)

        call.stopping, call.task, call.attempt = True, None, None
        run.post(break_off, [row], then=stopped)


def record_cancelled(run: Run) -> None:
    """Records which calls `run` has cancelled."""
    if run.cancelled:
        cancelled = run.cancelled.items()
        run.post(break_off, [Row("cancel", key, extra=json.dumps(seen)) for key, seen in cancelled])
        stop_inside(run, run.cancelled)
        run.cancelled.clear()


def check_scope(call: StepCall) -> None:
    """Refuses a call if a step around it has ended: what a callback has left behind begins nothing
    any more."""
    outer = call.outer
    while outer is not None:
        if outer.call.over:
            what = f"{outer} has ended: its callback calls no more steps"
            raise fatal("workflow.fatal", what)
        outer = outer.outer


def close_call(run: Run, call: StepCall) -> None:
    """A step and its callback have ended, and so have the calls that the callback has left
    behind."""
    call.over = True
    if call.nests:
        cancel_inside(run, call)


def cancel_inside(run: Run, call: StepCall) -> None:
    """Cancels the step calls that a callback has left behind, as those of `run` are when `run`
    ends."""
    for key, inner in run.active.items():
        if inner.inside and inner.task and key.startswith(call.key + SEPARATOR):
            inner.task.cancel()


def stop_inside(run: Run, keys: Iterable[str]) -> None:
    """Records that with these steps ends what their callbacks have waited for in earlier lives,
    except for the calls that this life has made again."""
    if run.left_asleep:
        inside = tuple(key + SEPARATOR for key in keys)
        over = [key for key in run.left_asleep if key.startswith(inside)]
        run.left_asleep = [key for key in run.left_asleep if key not in over]
        if rows := [Row("stop", key) for key in over if key not in run.called]:
            run.post(break_off, rows)
            for row in rows:
                apply(run.steps, row)


# --------------------------------------------------------------------------------------------------
# Rollback: what steps have done is undone, the last step first, by the handlers that they were
# given, when an error leaves `run` or somebody terminates the instance like that.
#
# A row says that it has begun, and the instance's generation is raised: so the run that was there
# writes nothing more, and what follows are lives of another kind. One that undoes needs handlers,
# which are functions and can't be stored. The life before it, in the same process, has met them
# all; after the death of a process, a life that only searches comes first: it replays `run`, and no
# call begins anything new.
#
# Three columns of an instance together say what is being done to it:
#
#     status                rollback            termination   meaning
#     any but the finished  NULL                NULL          `run` runs, or will
#     queued, running       begun               NULL          `run` has failed: its steps are undone
#     queued, running       begun               by whom       terminated: its steps are undone first
#     complete              NULL                NULL          the output is in the newest row
#     errored               NULL                NULL          failed; there was nothing to undo
#     errored               complete | failed   NULL          failed, and the undoing went like that
#     terminated            NULL                by whom       terminated at once
#     terminated            complete | failed   by whom       the undoing went like that, or was cut
#
# developers.cloudflare.com/workflows/build/rollback/

SEARCH = 5000  # ms without a step call, after which a search gives up


def begin_rollback(tx: Transaction, inst: Instance, error: str) -> bool:
    """Begins a rollback, unless there was one, or no step that has started has a handler."""
    configured = tx.journal(inst, "attempt IS NOT NULL AND extra != ''")
    if inst.rollback is not None or not undoable(fold(configured)[0]):
        return False
    unpause(tx, inst)
    tx.append(inst, Row("rollback", data=error))
    inst.generation += 1
    tx.change(inst, rollback="begun", paused=None, wake=tx.now)
    if inst.status in ("running", "waitingForPause"):
        tx.change(inst, status="running")
    else:
        tx.requeue(inst)
    return True


def end_rollback(tx: Transaction, lease: Lease, failure: str) -> None:
    """All handlers have run (then `failure` is "null"), or one of them has failed."""
    inst = tx.mine(lease)
    (begun,) = tx.journal(inst, "type = 'rollback'")
    row = Row("errored", data=begun.data, extra=failure)
    if inst.termination is not None:
        row = Row("terminated", extra=failure)
    tx.move(inst, row, rollback="complete" if failure == "null" else "failed")


def undoable(steps: Mapping[str, Step]) -> list[Step]:
    """The steps that have started and have a handler, in the order of their start."""
    return [step for step in steps.values() if "rollback" in _configuration_of(step)]


def _configuration_of(step: Step) -> Any:
    """What is recorded of a step's configuration, and of its handler's."""
    what = f"step {step_label(step.key)!r}: its configuration"
    return read_back(step.config, what) if step.config else {}


def note_handler(run: Replay, call: StepCall) -> None:
    """Keeps the rollback handler of a step call, with the configuration that it was given."""
    if call.options or len(call.args) > 1:
        # (What is wrong with them `plan_do` refuses, if need be.)
        *_, handler, config = safely((None, None), do_arguments, call)
        if handler is not None:
            run.handlers[call.key] = handler, config


def next_life(engine: Core, workflow: Workflow, loaded: Loaded, previous: Replay | None) -> Replay:
    """The life that an instance needs now."""
    if loaded.instance.rollback != "begun":
        return Run(engine, workflow, loaded)
    handlers = {} if previous is None else previous.handlers
    wanted = [step.key for step in undoable(fold(loaded.rows)[0])]
    searched = isinstance(previous, SearchRun) or all(key in handlers for key in wanted)
    run: Replay = (UndoRun if searched else SearchRun)(engine, workflow, loaded)
    run.handlers |= handlers
    return run


class SearchRun(Replay):
    """A life that looks for rollback handlers: until it has found them all, `run` has ended, or
    nothing has happened for a while."""

    def __init__(self, engine: Core, workflow: Workflow, loaded: Loaded) -> None:
        super().__init__(engine, workflow, loaded)
        self.successor = self.lease
        self._wanted = {step.key for step in undoable(self.steps)}
        for key in [key for key in self.inbox if self.steps[key].state == "cancelled"]:
            del self.inbox[key]  # no result need wait for that here
        self._silence = self.engine.clock.call_later(SEARCH, self.unload)

    def note(self, call: StepCall) -> None:
        super().note(call)
        self._silence.cancel()
        self._silence = self.engine.clock.call_later(SEARCH, self.unload)
        if self._wanted <= self.handlers.keys():
            self.unload()


class UndoRun(Run):
    """A life that runs the rollback handlers, each as a step."""

    def __init__(self, engine: Core, workflow: Workflow, loaded: Loaded) -> None:
        super().__init__(engine, workflow, loaded)
        self.inbox.clear()  # `run` does not run here
        cause = next(row.data for row in loaded.rows if row.type == "rollback")
        self._cause = rebuild_error(read_back(cause or "", "the error that is undone"))

    async def main(self) -> str:
        """Runs them; returns the record of what failed, or "null"."""
        for step in reversed(undoable(self.steps)):
            *_, name, count = step.key.split(SEPARATOR)
            call = StepCall(self, "rollback", functools.partial(self._plan, step), name, (), {})
            call.key, call.count = ROLLBACK + step.key, int(count)
            try:
                await call
            except Exception as failure:
                log_error(logging.WARNING, failure, "%s: a rollback handler failed", self)
                return encode_error(failure)
        return "null"

    def conclude(self, result: Any) -> None:
        self.end(end_rollback, result)

    def is_idle(self) -> bool:
        return False

    def _plan(self, step: Step, call: StepCall) -> DoPlan:
        """The handler of a step, with its argument."""
        what = f"the rollback handler of step {call.name!r} was not found by replay"
        require(step.key in self.handlers, "workflow.fatal", what, fatal)
        handler, given = self.handlers[step.key]
        last = step_context(call, max(1, step.attempts), StepConfig.load(step.config or ""))
        output = read_back(step.data, "its result") if step.state == "done" and step.data else None
        info = WorkflowRollbackContext(last, self._cause, output, step_label(step.key))
        config = StepConfig.load(step.config or "", given, "rollback")
        return DoPlan(config, lambda _: functools.partial(handler, info), not is_async(handler))


# --------------------------------------------------------------------------------------------------
# Replay reports: would an instance go on as recorded, with the code of now? `run` is replayed, as
# at the beginning of a life, until it would do something new. Nothing is written and no callback
# runs.

SILENCE = 5.0  # seconds after which a `run` is given up that awaits something of its own
PAUSE = 0.005  # seconds between two looks at a `run` that is replayed: a turn of the loop at least


class WorkflowReplay(_Record):
    """What a replay has found: the recorded steps that `run` has `reached`, and those that it has
    not (`unreached`); the `new` steps that it would begin, and which of these it called while there
    were unreached ones (`early`); what it came to (`outcome`: "waiting", "complete" or "errored"),
    and its `error`. It is `safe` to go on if nothing is unreached or early, and `run` has failed
    only if it had failed before."""

    instance_id: str
    reached: list[str]
    unreached: list[str]
    new: list[str]
    early: list[str]
    outcome: str
    error: dict[str, str] | None
    safe: bool


class ReplayRun(Replay):
    """A life that only looks. The engine knows nothing of it."""

    def __init__(self, engine: Core, workflow: Workflow, loaded: Loaded) -> None:
        super().__init__(engine, workflow, loaded)
        self._unreached = {k: step_label(k) for k, step in self.steps.items() if not step.nested}
        self._found: dict[str, list[str]] = {"reached": [], "new": [], "early": []}
        self._damage: str | None = None
        inst = loaded.instance
        self._has_failed = inst.status == "errored" or (inst.rollback and not inst.termination)

    def note(self, call: StepCall) -> None:
        super().note(call)
        label, recorded = step_label(call.key), self._unreached.pop(call.key, None)
        self._found["reached" if recorded else "new"].append(label)
        if self._unreached and not recorded:
            self._found["early"].append(label)

    def stop_in_place(self, damage: str) -> None:
        self._damage = damage
        self.unload()

    async def report(self) -> WorkflowReplay:
        """Replays `run`, as far as it comes by itself."""
        self.begin()
        quiet, called = 0.0, 0
        while not self.task.done() and quiet < self._patience():
            moves = self.busy() or len(self.called) > called
            quiet, called = 0 if moves else quiet + PAUSE, len(self.called)
            await asyncio.sleep(PAUSE)
        outcome, error = "waiting", None
        if self.task.done():
            result: Any = None if self.task.cancelled() else self.task.result()
            outcome = "errored" if isinstance(result, BaseException) else "complete"
            error = brief(json.loads(encode_error(result))) if outcome == "errored" else None
        elif not self.active:
            what = f"run awaits something of its own; given up after {SILENCE:.0f} s"
            error = {"name": "WorkflowTimeoutError", "message": what}
        self.unload()
        await asyncio.shield(self.ended)
        if self._damage is not None:
            raise Unreadable(self._damage)
        found = self._found | {"unreached": [*self._unreached.values()]}
        fails = outcome == "errored" and not self._has_failed
        safe = not (found["unreached"] or found["early"] or fails)
        return WorkflowReplay(self.id, outcome=outcome, error=error, safe=safe, **found)

    def _patience(self) -> float:
        """How many seconds `run` may go without a step call or a result: few, if it waits for a
        step. (Counted in pauses, not by the clock, because a busy loop may need seconds for what it
        has to do.)"""
        timers = scopes_with_timers(self.loop) or ()
        return SILENCE if not self.active or self.ended in timers else 20 * PAUSE


def warn_about_calls(run: Run) -> None:
    """Says at the end of `run` which calls were never awaited, and which recorded steps it has not
    reached."""
    for call in run.unawaited:
        log.warning("%s: step %r was called but never awaited", run, call.name)
    if not any(step.state == "cancelled" for step in run.steps.values()):
        what = "%s: replay never reached the recorded step %r; is its name deterministic?"
        for key, step in run.steps.items():
            if key not in run.called and step.state != "new" and not step.nested:
                log.warning(what, run, step_label(key))


async def report_on_unfinished(workflow: Workflow) -> AsyncGenerator[WorkflowReplay, None]:
    before = 2**62
    while page := await workflow.engine.call(load_unfinished, workflow.name, before):
        for report in await asyncio.gather(*(report_or_damage(workflow, each) for each in page)):
            yield report
        before = page[-1].instance.key


async def report_or_damage(workflow: Workflow, loaded: Loaded) -> WorkflowReplay:
    """One that can't be read back says so, and spares the others."""
    try:
        return await ReplayRun(workflow.engine, workflow, loaded).report()
    except Unreadable as damage:
        error = {"name": "Unreadable", "message": str(damage)}
        return WorkflowReplay(loaded.instance.id or "", [], [], [], [], "errored", error, False)


def load_unfinished(tx: Transaction, workflow: str, before: int) -> list[Loaded]:
    """Up to a hundred instances with a key below `before`, newest first."""
    where = "key < ? AND ended IS NULL AND id IS NOT NULL ORDER BY key DESC LIMIT 100"
    found = tx.select(f"{_OF_NAMED} AND {where}", workflow, before)
    return [load_one(tx, inst) for inst in found]


# --------------------------------------------------------------------------------------------------
# History: journal rows as the events of `subscribe`.

# By a row's type: the events that it is shown as.
_TOLD = {status: [f"workflow_{status}"] for status in STATUSES}
_TOLD |= {"waitingForPause": ["workflow_waiting_for_pause"], "complete": ["workflow_completed"]}
_TOLD |= {"started": ["workflow_started", "workflow_running"], "rollback": ["rollback_started"]}
_TOLD |= {"failed": ["attempt_errored"], "error": ["attempt_errored", "step_errored"]}
_TOLD |= {"done": ["attempt_completed", "step_completed"]}
_TOLD |= {"sleep": ["sleep_started"], "slept": ["sleep_completed"]}
_TOLD |= {"wait": ["wait_started"], "event": ["wait_completed"], "timeout": ["wait_timed_out"]}
EVENT_TYPES = {"step_started", "attempt_started", "rollback_completed", "rollback_errored"}
EVENT_TYPES = EVENT_TYPES.union(*_TOLD.values())
EVENT_TYPES |= {f"rollback_{t}" for t in EVENT_TYPES if t.startswith(("step_", "attempt_"))}


class History:
    """Shows journal rows, given in order from the first one on, as events: one or more for a row,
    none for the engine's own affairs. Their ids grow in journal order."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._params: Any = None
        self._configs: dict[str | None, dict[str, Any]] = {}  # of the steps that have begun

    def events(self, row: Row) -> list[WorkflowHistoryEvent]:
        """What the next row is shown as."""
        types, what = [], f"{self._instance_id!r}: row {row.seq}"
        data = read_back(row.data or "null", what)
        if row.type == "queued" and row.data is not None:
            self._params = data
        if row.attempt is not None and row.extra is not None:
            config = read_back(row.extra, what)["config"] if row.extra else DEFAULT_CONFIG
            self._configs[row.step] = config
            types.append("step_started")
        if row.began is not None:
            types.append("attempt_started")
        if row.step is None and row.extra is not None:  # how the rollback went
            types.append("rollback_completed" if row.extra == "null" else "rollback_errored")
        types += _TOLD.get(row.type, ())
        prefix = "rollback_" if (row.step or "").startswith(ROLLBACK) else ""
        return [self._event(row, prefix + type, n, data) for n, type in enumerate(types)]

    def _event(self, row: Row, type: str, n: int, data: Any) -> WorkflowHistoryEvent:
        event: dict[str, Any] = {"type": type, "event_id": row.seq * 10 + n}
        began = row.began if row.began is not None and type.endswith("_started") else row.at
        event |= {"timestamp": to_datetime(began), "instance_id": self._instance_id}
        if row.step is not None:
            event["step_name"] = step_label(row.step)
        if "attempt_" in type:
            event["attempt"] = row.attempt
        if type == "workflow_started":
            event["params"] = self._params
        if type.endswith("step_started"):
            event["config"] = self._configs[row.step]
        if type in ("workflow_completed", "wait_completed") or type.endswith("step_completed"):
            sensitive = "sensitive" in self._configs.get(row.step, {})
            event["output"] = "[REDACTED]" if sensitive else data
        if type.endswith(("_errored", "timed_out")) or type == "rollback_started":
            event["error"] = brief(decode(row.extra or "") if type == "rollback_errored" else data)
        if type.endswith("attempt_errored") and "retry_delay_ms" in data:
            event["retry_delay_ms"] = data["retry_delay_ms"]
        if type == "sleep_started":
            event["duration_ms"] = data
        if type == "wait_started":
            event["event_type"] = data["type"]
        return WorkflowHistoryEvent(**event)


# --------------------------------------------------------------------------------------------------
# Usage: what Cloudflare's pricing is based on.
#
# What an instance has used stands in its journal: each row says what that comes to so far, over all
# restarts. Whenever the row of the instance is written, the month's row of `usage` gets what is new
# since then; a step alone writes neither of the two. (To write one with each step would cost a
# tenth of its time.) So after a crash there is nothing to make good: the row of an instance says
# what of its journal was counted. A step counts in the month in which that happens.
#
# CPU time is counted in memory. It is added along with the rest, when it comes to a second, when
# somebody asks, or when the engine is left; until then, only this process knows of it.

_MONTH = "strftime('%Y-%m', ? / 1000, 'unixepoch')"
_ADD = f"""INSERT INTO usage VALUES ({_MONTH}, ?, ?, ?, ?) ON CONFLICT (month) DO UPDATE SET
    requests = requests + excluded.requests, steps = steps + excluded.steps,
    cpu_ms = cpu_ms + excluded.cpu_ms, storage_bytes = storage_bytes + excluded.storage_bytes"""

# What runs have used since the rows of their instances were written. (What has no slot uses
# nothing unless the row of its instance is written, too.)
_NOT_COUNTED = f"""SELECT 0, sum(steps - counted_steps), 0, sum(bytes - counted_bytes)
    FROM {_WITH_NEWEST} WHERE workflow IN (SELECT key FROM workflows) AND {_TAKES_A_SLOT}"""


def begins_step(row: Row) -> bool:
    """Whether a row counts as a step: the first one of each, but not of rollback handlers."""
    if row.attempt is None:
        return row.type in ("sleep", "wait")
    return row.extra is not None and not (row.step or "").startswith(ROLLBACK)


def count_used(tx: Transaction, inst: Instance) -> None:
    """Counts what an instance has used since its row was written."""
    tx.storage += inst.bytes - inst.counted_bytes
    tx.steps += inst.steps - inst.counted_steps
    inst.counted_bytes, inst.counted_steps = inst.bytes, inst.steps


def add_usage(tx: Transaction, least_ns: int = 10**9) -> None:
    """Adds what a transaction has counted to the row of the month, unless that is nothing but CPU
    time, and no more of it than `least_ns`."""
    if tx.requests or tx.steps or tx.storage or tx.cpu_ns > least_ns:
        used = (tx.requests, tx.steps, tx.cpu_ns / 1e6, tx.storage)
        tx.db.execute(_ADD, (tx.now, *used))
        tx.requests = tx.steps = tx.cpu_ns = tx.storage = 0


def read_usage(tx: Transaction) -> Usage:
    """What was used this month, what is stored now, and what that would cost on the paid plan."""
    tx.write()
    add_usage(tx, 0)
    this_month = "FILTER (WHERE month = now)"
    sql = f"""SELECT sum(requests) {this_month}, sum(steps) {this_month}, sum(cpu_ms) {this_month},
              sum(storage_bytes) FROM usage, (SELECT {_MONTH} AS now)"""
    counted, more = tx.db.one(sql, tx.now), tx.db.one(_NOT_COUNTED)
    used = [(total or 0) + (new or 0) for total, new in zip(counted, more, strict=True)]
    requests, steps, cpu_ms, storage_bytes = used
    cost = max(0, requests - 10_000_000) * 0.30e-6 + max(0, cpu_ms - 30_000_000) * 0.02e-6
    cost += max(0, steps - 500_000) * 0.80e-5 + max(0, storage_bytes - 10**9) * 0.20e-9
    return Usage(requests, steps, round(cpu_ms, 3), storage_bytes, round(cost, 6))


# --------------------------------------------------------------------------------------------------
# Cloudflare's Python dialect: the decorator form of `step.do`, and the package `workers`, which a
# workflow written for Cloudflare's SDK imports. The code of that SDK (on PyPI:
# `workers-runtime-sdk`) decides what is right here.
#
# developers.cloudflare.com/workflows/python/


class StepDecorator(StepCall):
    """`step.do(…)` without a callback: it waits for a function to decorate. Awaited itself, it says
    that the callback was forgotten."""

    def __init__(self, step: WorkflowStep, name: Any, args: Any, options: dict[str, Any]) -> None:
        what = "step.do needs a name or parentheses: to call a function, write"
        forms = "`await step.do('name', function)`; to decorate it, `@step.do()`"
        require(not callable(name), "step.invalid_callback", f"{what} {forms}", fatal)
        if args and not isinstance(args[0], Mapping):  # the SDK's first form
            options = options | dict(zip(("depends", "concurrent", "config"), args, strict=False))
            args = args[3:]
        # `StepCall.__init__` is left out: it would count this as a call.
        self.run, self._coroutine, self.declared = step._run, None, step.declared
        self.name, self.args, self.options = name, args, dict(options)
        self.depends = self.options.pop("depends", None)
        self.concurrent = self.options.pop("concurrent", False)

    @overload
    def __call__(self, function: AsyncFunction[Result]) -> StepFunction[Result]: ...
    @overload
    def __call__(self, function: Callable[..., Result]) -> StepFunction[Result]: ...
    def __call__(self, function: Any) -> Any:
        return StepFunction(self, function)

    async def way(self) -> NoReturn:
        what = "the callback is missing: expected an async or plain function"
        raise _bad_callback(self.name, what)


class DecoratedCall(StepCall):
    """A call of a decorated function: the dependencies, then the step itself."""

    def __init__(self, function: StepFunction[Any]) -> None:
        form, self.function = function.form, function
        super().__init__(form.run, "do", plan_do, function.__name__, form.args, dict(form.options))

    async def way(self) -> Any:
        outcomes, outcome = self.function.outcomes, self.run.loop.create_future()
        outcomes.setdefault(self.outer, outcome)  # a success stays until there is a newer one
        try:
            self.options["callback"] = await self.function.with_dependencies(self)
            value = await self.run.perform(self)
            outcome.set_result(copy.deepcopy(value))
        except BaseException as error:
            if outcomes.get(self.outer) is outcome:
                del outcomes[self.outer]  # so the next step that depends on it runs it again
            if isinstance(error, Exception):
                outcome.set_exception(error)
                outcome.exception()  # asyncio logs an error that nobody has asked for
            else:
                outcome.cancel()
            raise
        outcomes[self.outer] = outcome
        return value


class StepFunction(Generic[Result]):
    """What the decorator form of `step.do` makes of a function: called without arguments, it is the
    step. A parameter named like another decorated step (or like its function) gets the last result
    of that one, which runs first if it has none yet."""

    def __init__(self, form: StepDecorator, function: Any) -> None:
        self.form, self._function = form, function
        own = getattr(function, "__name__", "step")
        self.__name__ = own if form.name is None else form.name
        unknown = inspect.Signature()  # of what is no function, or doesn't say
        self._signature: inspect.Signature = safely(unknown, inspect.signature, function)
        # By the attempt in whose callback it was called, None for `run`: a call that is in flight,
        # or the last one that has succeeded.
        self.outcomes: dict[Attempt | None, asyncio.Future[Any]] = {}
        form.declared["step", str(self.__name__)] = form.declared["function", own] = self

    def __call__(self, *args: Any, **named: Any) -> Pending[Result]:
        if args or named:
            what = "is called without arguments: it gets its dependencies' results"
            raise fatal("step.invalid_callback", f"step {self.__name__!r} {what}")
        return DecoratedCall(self)

    async def with_dependencies(self, call: DecoratedCall) -> Any:
        """The function, given the results of the steps that it depends on."""
        found = self._dependencies()
        needed = [*found.values()]
        for step in needed:  # this list grows
            needed += [other for other in step._dependencies().values() if other not in needed]
        if self in needed:  # it would wait for ever
            raise fatal("step.invalid_config", f"step {self.__name__!r} depends on itself")
        asked = (step._result_for(call) for step in found.values())
        results = await asyncio.gather(*asked) if self.form.concurrent else [await r for r in asked]
        if not results:
            return self._function
        given = self._signature.bind_partial()
        given.arguments.update(zip(found, results, strict=True))
        return functools.partial(self._function, *given.args, **given.kwargs)

    async def _result_for(self, dependent: DecoratedCall) -> Any:
        """A copy of the result of this step, for a call that depends on it."""
        while (outcome := self._recall(dependent.outer)) is not None:
            await asyncio.wait({outcome})
            if not outcome.cancelled():  # else it must be called again
                return copy.deepcopy(outcome.result())
        return await self()

    def _recall(self, scope: Attempt | None) -> asyncio.Future[Any] | None:
        """What is known of it where a step is called, or around that. (Not inside another step's
        callback: a replay, which doesn't call that, would not know it.)"""
        while scope is not None and scope not in self.outcomes:
            scope = scope.outer
        return self.outcomes.get(scope)

    def _dependencies(self) -> dict[str, StepFunction[Any]]:
        """The steps that it depends on, by parameter, as of now."""
        known, depends = self.form.declared, self.form.depends
        parameters = self._signature.parameters
        names = [p for p in parameters if p != "ctx" or ("step", "ctx") in known]
        found = {p: known.get(("step", p)) or known.get(("function", p)) for p in names}
        if depends is not None:
            legal = isinstance(depends, (list, tuple)) and len(depends) <= len(found)
            if not legal or not all(isinstance(step, StepFunction) for step in depends):
                what = f"depends is {show(depends)}: expected up to {len(found)} steps, decorated"
                raise fatal("step.invalid_config", f"step {self.__name__!r}: {what} with step.do")
            found = dict.fromkeys(found) | dict(zip(found, depends, strict=False))
        for parameter, step in found.items():
            if step is None and parameters[parameter].default is inspect.Parameter.empty:
                what = f"the parameter {parameter!r} is neither `ctx` nor a decorated step"
                raise _bad_callback(self.__name__, what)
        return {parameter: step for parameter, step in found.items() if step is not None}


class FetchResponse:
    """What `fetch` gives. (Its methods are async because they are so in Cloudflare's SDK.)"""

    def __init__(self, status: int, headers: http.client.HTTPMessage, body: bytes) -> None:
        self.status, self.ok, self.headers, self._body = status, 200 <= status < 300, headers, body

    async def text(self) -> str:
        return self._body.decode("utf-8-sig", "replace")

    async def json(self, **options: Any) -> Any:
        return json.loads(self._body, **options)

    async def bytes(self) -> bytes:
        return self._body


async def fetch(
    url: str, *, method: str = "GET", headers: Any = (), body: Any = None, **_: Any
) -> FetchResponse:
    """`from workers import fetch`: makes an HTTP request, in a thread. Whatever its status, an
    answer is a response; without an answer, there is an `OSError`, or what `urllib` says of a URL
    that is none. `body` is text or bytes. What else the SDK's `fetch` takes has no effect here."""
    threads = Threads(asyncio.get_running_loop())
    request = functools.partial(_request, str(url), method.upper(), dict(headers or ()), body)
    reply = threads.execute(request)
    threads.close()  # when it has answered
    response, error, _cpu = await reply
    if error is not None:
        raise error
    return cast(FetchResponse, response)


def _request(url: str, method: str, headers: dict[str, str], body: Any) -> FetchResponse:
    if not url.lower().startswith(("http:", "https:")):
        raise OSError(f"fetch: {show(url)}: expected an http or https URL")
    kind = "text/plain;charset=UTF-8" if isinstance(body, str) else "application/octet-stream"
    headers = headers if body is None else {"Content-Type": kind, **headers}
    data = body.encode() if isinstance(body, str) else body
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        answer = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return FetchResponse(answer.status, answer.headers, answer.read())


class _Inert(type):
    """The kind of a name that means nothing here. A Worker's module may extend it, call it,
    decorate with it and ask it for attributes, without effect; a workflow that calls it is told."""

    def __getattr__(cls, name: str) -> Any:
        return _any_name(f"{cls.__name__}.{name}")

    def __getitem__(cls, _: Any) -> Any:
        return cls

    def __call__(cls, *args: Any, **named: Any) -> Any:
        if _scope.get() is not None:
            what = f"`{cls.__name__}` of the package `workers` has no meaning here"
            raise fatal("workflow.fatal", f"{what}: it belongs to Cloudflare's runtime")
        users = cls.__base__ is not _Placeholder
        return super().__call__(*args, **named) if users else _any_name(f"{cls.__name__}()")


class _Placeholder(metaclass=_Inert):
    def __init__(self, ctx: Any = None, env: Any = None, *_: Any, **__: Any) -> None:
        self.ctx, self.env = ctx, env


@functools.cache
def _any_name(name: str) -> Any:
    """What stands for a name that only Cloudflare's runtime knows."""
    if name.rpartition(".")[2].startswith("__"):
        raise AttributeError(name)
    return _Inert(name, (_Placeholder,), {})


class _WorkersImporter(importlib.abc.Loader):
    """Finds and makes the package `workers`, and any module in it. Each of them has every name."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        ours = name.split(".")[0] == "workers"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def exec_module(self, module: types.ModuleType) -> None:
        ours = {"WorkflowEntrypoint": WorkflowEntrypoint, "NonRetryableError": NonRetryableError}
        vars(module).update(ours, fetch=fetch, __getattr__=_any_name)


_importer = _WorkersImporter()


def install_workers_shim() -> None:
    """Makes `from workers import WorkflowEntrypoint` and `from workers.workflows import
    NonRetryableError` find this module, also where Cloudflare's SDK is installed, which works only
    in its own runtime. `fetch` works, too; any other name imports, and has no meaning."""
    if sys.platform == "emscripten" or _importer in sys.meta_path:  # that runtime; done already
        return
    other = safely(None, importlib.import_module, "workers")  # (the installed SDK fails)
    if getattr(other, "__file__", None) is not None:  # else it is just a folder of that name
        log.warning("%r is not Cloudflare's: it stays, and has nothing from workflows.py", other)
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "workers"]:
        del sys.modules[name]
    sys.meta_path.insert(0, _importer)
    for name in ("workers.workflows", "workers.fetch"):
        importlib.import_module(name)
    vars(sys.modules["workers"])["fetch"] = fetch  # the import has put the module in its place


# --------------------------------------------------------------------------------------------------
# Introspection: a test looks into instances and changes what happens to them, without a change to
# their workflow.
#
# The engine asks the open blocks at four points: when an instance starts (for its events), when a
# wait begins, when a retry delay does, and when an attempt is launched.


class WorkflowInstanceModifier:
    """A block of a test, and what its `modify` hands to a function. A method acts at once, on all
    that begins from then on, and may also be awaited. A step is its name, or `{"name": …, "index":
    2}` for the second of that name.

    developers.cloudflare.com/workers/testing/vitest-integration/test-apis/"""

    def __init__(self, workflow: Workflow, id: str | None = None) -> None:
        self.workflow, self.engine, self.id = workflow, workflow.engine, id
        self.after = 0  # instances with a key up to this one are too old
        self.events: list[tuple[str, str]] = []  # types and payloads; only operations use this
        # The waits that are over at once: (kind,) for all of a kind, or (kind, name, count).
        self.skipped: set[tuple[Any, ...]] = set()
        # By step: how its attempts end, by the number of the last attempt that ends like this.
        self.ends: dict[tuple[str, int], dict[float, Callable[[Attempt], Any]]] = {}
        self._sending: list[asyncio.Future[Any]] = []
        self._parts: dict[str, WorkflowInstanceIntrospector] = {}

    async def __aenter__(self) -> Self:
        self.engine.check_open()
        self.engine.scheduler.blocks.append(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        scheduler, ended = self.engine.scheduler, (self, *self._parts.values())
        # A new list, because the writer thread may be in the middle of the old one.
        scheduler.blocks = [block for block in scheduler.blocks if block not in ended]

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
        """The step returns this value, without running its callback: its first attempt that is to
        have no error or timeout.

        Error: `step.not_serializable`."""
        text, *_ = checked(value, "the result", "step.not_serializable")
        return self._mock(step, None, lambda _: decode(text))

    def mock_step_error(self, step: Any, error: Any, times: int | None = None) -> Self:
        """Each attempt, or each of the next `times`, fails with this error instead of running the
        callback. Retries go on as configured. The next attempts are those after the ones that have
        an error or a timeout already."""
        if not isinstance(error, Exception):
            raise TypeError(f"{show(error)} is not an error: expected an Exception object")
        return self._mock(step, times, lambda _: _raise(error.with_traceback(None)))

    def force_step_timeout(self, step: Any, times: int | None = None) -> Self:
        """The same with a timeout: each of these attempts times out at once."""
        return self._mock(step, times, lambda attempt: _raise(timed_out(attempt.config.timeout)))

    def mock_event(self, options: Any = None, /, **given: Any) -> Self:
        """Sends an event as `send_event` does: to each instance, now or when it starts, and again
        when it starts anew."""
        self._check_open()
        event = self.workflow.event_of(options, given, "mock_event")
        self._sending.append(asyncio.ensure_future(self.engine.call(_mock_event, self, *event)))
        return self

    def _skip(self, kind: str, steps: Iterable[Any] | None) -> Self:
        if isinstance(steps, (str, Mapping)):
            raise TypeError(f"steps is {show(steps)}: expected a list of steps, or None for all")
        self.skipped |= {(kind, *step_named(s)) for s in steps} if steps is not None else {(kind,)}
        return self._check_open()

    def _mock(self, step: Any, times: int | None, end: Callable[[Attempt], Any]) -> Self:
        ends = self.ends.setdefault(step_named(step), {})
        if times is None and math.inf in ends:
            twice = "has a result already, or an error or timeout without `times`"
            raise ValueError(f"a contradiction: step {show(step)} {twice}")
        with naming("times"):
            count = math.inf if times is None else read_count(times)
        before = max((last for last in ends if last < math.inf), default=0)
        ends[before + count] = end  # comes after the others that have a number
        return self._check_open()

    def _check_open(self) -> Self:
        if self not in self.engine.scheduler.blocks:
            raise RuntimeError("only inside the block: `async with workflow.introspect…() as …`")
        return self

    # -- what the engine asks

    def covers(self, workflow: str, key: int, id: str | None) -> bool:
        """Whether this block is about that instance."""
        return workflow == self.workflow.name and key > self.after and self.id in (None, id)

    def instance_starts(self, tx: Transaction, inst: Instance) -> None:
        """Sends it the events that it is to get."""
        if self.covers(tx.scheduler.bound[inst.workflow].name, inst.key, inst.id):
            for event in self.events:
                tx.buffer(inst, *event)


def _mock_event(tx: Transaction, block: WorkflowInstanceModifier, type: str, payload: str) -> None:
    """Buffers an event for each instance of a block: now if it has started, else when it does."""
    block.events.append((type, payload))
    there = "started IS NOT NULL AND ended IS NULL AND id IS NOT NULL"
    for inst in tx.select(f"{_OF_NAMED} AND {there}", block.workflow.name):
        if block.covers(block.workflow.name, inst.key, inst.id):
            tx.buffer(inst, type, payload)


def _created(tx: Transaction, workflow: str, after: int) -> Ids:
    """The ids of a workflow's instances with a key above `after`, oldest first."""
    made = tx.select(f"{_OF_NAMED} AND key > ? ORDER BY key", workflow, after)
    return [inst.id for inst in made if inst.id is not None]


class WorkflowInstanceIntrospector(WorkflowInstanceModifier):
    """One instance, for a test: `async with workflow.introspect_instance(id) as one`. The waits
    also wait for its creation.

    developers.cloudflare.com/workers/testing/vitest-integration/test-apis/"""

    async def wait_for_step_result(self, step: Any) -> Any:
        """Waits until a `do` or a `wait_for_event` has ended; returns its result, or raises its
        error. `WorkflowError` if the instance finishes without."""
        types = ("done", "error", "event", "timeout")
        row = await self._find("{}-{}".format(*step_named(step)), types, f"step {show(step)} ended")
        if row.type in ("error", "timeout"):
            raise rebuild_error(decode(row.data or ""))
        return step_event(row.data, row.extra) if row.type == "event" else decode(row.data or "")

    async def wait_for_status(self, status: str) -> None:
        """Waits until the instance has this status, or has had it since the call. `WorkflowError`
        if it finishes in another one."""
        check_status(status)
        await self._reach(status)

    async def get_output(self) -> Any:
        """Waits for the end; returns the output. `WorkflowError` if there is none."""
        return await self._reach("complete")

    async def get_error(self) -> dict[str, str]:
        """Waits for the end; returns the error, `{"name", "message"}`. `WorkflowError` if there is
        none."""
        return brief(await self._reach("errored"))

    async def _reach(self, status: str) -> Any:
        types = ("started", "running", "rollback") if status == "running" else (status,)
        return decode((await self._find("", types, f"it became {status}")).data or "null")

    async def _find(self, label: str, types: Sequence[str], what: str) -> Row:
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


class WorkflowIntrospector(WorkflowInstanceModifier):
    """All instances of a workflow that are created inside the block, for a test:
    `async with workflow.introspect() as all_instances`.

    developers.cloudflare.com/workers/testing/vitest-integration/test-apis/"""

    async def __aenter__(self) -> Self:
        self.after = await self.engine.call(Transaction.take_numbers)
        return await super().__aenter__()

    async def get(self) -> list[WorkflowInstanceIntrospector]:
        """An introspector for each instance, oldest first; what they modify ends with this
        block."""
        self._check_open()
        ids = await self.engine.call(_created, self.workflow.name, self.after)
        for id in ids:
            if id not in self._parts:
                self._parts[id] = await WorkflowInstanceIntrospector(self.workflow, id).__aenter__()
        return [self._parts[id] for id in ids]


def _blocks_about(call: StepCall) -> list[WorkflowInstanceModifier]:
    """The blocks that are about the instance of a call, the inner ones first."""
    run, blocks = call.run, reversed(call.run.engine.scheduler.blocks)
    return [each for each in blocks if each.covers(run.workflow.name, run.lease.key, run.id)]


def is_skipped(kind: str, call: StepCall) -> bool:
    """Whether a test wants a sleep, an event wait or a retry delay to be over at once."""
    asked = {(kind,), (kind, call.name, call.count)}
    return any(asked & block.skipped for block in _blocks_about(call))


def mocked(attempt: Attempt) -> Callable[[], Any] | None:
    """What a test has put in the place of an attempt's callback."""
    call = attempt.call
    if call.kind != "do" or not call.run.engine.scheduler.blocks:
        return None
    for block in _blocks_about(call):
        ends = block.ends.get((call.name, call.count), {})
        if ahead := [last for last in ends if attempt.number <= last]:
            return functools.partial(_give, ends[min(ahead)], attempt)
    return None


async def _give(end: Callable[[Attempt], Any], attempt: Attempt) -> Any:
    return end(attempt)


# --------------------------------------------------------------------------------------------------
# The clock of tests: it moves only when told, so that a year of sleeps takes milliseconds. After
# each moment it asks its engines whether they have come to rest.


class _Timer:
    """A timer of a `ManualClock`; cancelled like any of asyncio's."""

    def __init__(self, clock: ManualClock, due: float, callback: Callable[[], object]) -> None:
        self.clock, self.due, self.callback = clock, due, callback

    def cancel(self) -> None:
        self.clock.timers.pop(self, None)
        self.clock.limits.pop(self, None)


class ManualClock(Clock):
    """A clock for tests: `Engine(clock=ManualClock())`, then `await clock.advance("3 days")`.

    What falls due on the way happens in its order, and after each moment every instance runs until
    it waits again. Sleeps, retry delays, event and attempt timeouts, hibernation, retention and
    `result(timeout=…)` go by it. It does not wait for callbacks that are blocked on something real,
    with one exception: before it times an attempt out, the callback gets `patience` (one second) of
    real time to end by itself."""

    exact = True

    def __init__(self, start: datetime | float | None = None, patience: Duration = 1000) -> None:
        super().__init__()
        self._now = Clock.now(self) if start is None else parse_moment(start)
        self._patience = parse_duration(patience) / 1000
        self.timers: dict[_Timer, None] = {}  # a set in the order in which they were made
        # Those for callbacks, and since when, in real time, we are patient with these.
        self.limits: dict[_Timer, float] = {}
        self._lock = asyncio.Lock()  # one `advance` after the other

    def now(self) -> int:
        return self._now

    def call_later(self, ms: float, callback: Callable[[], object]) -> Any:
        timer = _Timer(self, self._now + ms, callback)
        self.timers[timer] = None
        return timer

    def limit(self, ms: float, callback: Callable[[], object]) -> Any:
        timer = self.call_later(ms, callback)
        self.limits[timer] = time.monotonic()
        return timer

    async def advance(self, duration: Duration) -> None:
        """Moves the time on; returns when nothing more happens by itself."""
        ms = parse_duration(duration)
        if current_attempt() is not None:
            raise RuntimeError("advance() inside a step's callback would wait for itself")
        async with self._lock:
            target = self._now + ms
            self.limits = dict.fromkeys(self.limits, time.monotonic())
            while True:
                await self.settle()
                due = min((timer.due for timer in self.timers), default=math.inf)
                if due > target and self._now >= target:
                    return
                moment = max(self._now, math.ceil(min(due, target)))
                if self._may_end_before(moment):
                    await asyncio.sleep(0.001)
                else:
                    self._now = moment
                    await self.settle()
                    self._fire()

    def _may_end_before(self, moment: float) -> bool:
        """Whether a callback whose time will be up at that moment may yet end by itself."""
        over = time.monotonic() - self._patience
        return any(t.due <= moment and began > over for t, began in self.limits.items())

    def _fire(self) -> None:
        for timer in sorted(self.timers, key=lambda timer: timer.due):
            if timer.due <= self._now and timer in self.timers:  # not cancelled by one before it
                timer.cancel()
                timer.callback()

    async def settle(self) -> None:
        """Returns when every instance waits: for ten turns of the loop nothing has happened."""
        for engine in [*self.engines]:
            if engine in self.engines:  # it has not been left meanwhile
                with contextlib.suppress(WorkflowInternalError):
                    await engine.call(nothing)
        quiet, seen = 0, -1
        while quiet <= SETTLED:
            activity = sum(engine.activity for engine in self.engines)
            busy = any(engine.busy() for engine in self.engines)
            quiet = quiet + 1 if activity == seen and not busy else 0
            seen = activity
            await asyncio.sleep(0.0002 if busy else 0)


# --------------------------------------------------------------------------------------------------
# Aliases: Cloudflare's own spellings (createBatch, sendEvent, sleepUntil, waitForEvent, …).

_api: tuple[type, ...] = (Workflow, WorkflowInstance, WorkflowStep, WorkflowInstanceModifier)
for _class in (*_api, WorkflowInstanceIntrospector):
    for _name in [name for name in vars(_class) if "_" in name and name[0] != "_"]:
        setattr(_class, camel(_name), getattr(_class, _name))
WorkflowEvent.instanceId = property(lambda event: event.instance_id)  # type: ignore[attr-defined]
WorkflowEvent.workflowName = property(lambda event: event.workflow_name)  # type: ignore[attr-defined]
WorkflowRollbackContext.stepName = property(lambda info: info.step_name)  # type: ignore[attr-defined]
WorkflowIntrospector.modifyAll = WorkflowIntrospector.modify  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------
# Schedules: the times at which a workflow begins by itself, as cron expressions. Each time fires
# once: the instance and the next time of the schedule are stored in one transaction of the owner.

# Of each field: what it is called, its least and its greatest number, and names for its numbers.
_CRON_FIELDS = (
    ("minute", 0, 59, ""),
    ("hour", 0, 23, ""),
    ("day of month", 1, 31, ""),
    ("month", 1, 12, "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC"),
    ("day of week", 1, 7, "SUN MON TUE WED THU FRI SAT"),
)


class Cron:
    """A cron expression as Cloudflare has it: five fields, in UTC. Its times are milliseconds since
    the epoch.

    The fields are minute (0 to 59), hour (0 to 23), day of month (1 to 31), month (1 to 12, or JAN
    to DEC) and day of week (1 to 7, or SUN to SAT: 1 is Sunday). A field is `*`, a number or name,
    a range (`8-18`), any of these with a step (`*/15`, `8-18/2`, or `5/15`, which goes from 5 to
    the end), or a list of such items. Anything else is a `ValueError`, Cloudflare's `L`, `W` and
    `#` too, and so is an expression that never comes.

    developers.cloudflare.com/workers/configuration/cron-triggers/"""

    def __init__(self, text: str) -> None:
        fields = text.split() if isinstance(text, str) else []
        if len(fields) != len(_CRON_FIELDS):
            expected = f"five fields, {', '.join(name for name, *_ in _CRON_FIELDS)}"
            raise ValueError(f"{show(text)} is not a cron expression: expected {expected}")
        self.text = " ".join(fields)
        with naming(show(self.text)):
            numbers = map(_read_cron_field, fields, _CRON_FIELDS)
            minutes, hours, self._days, self._months, self._weekdays = numbers
        # Where the day of the month and the day of the week are both restricted, one of them is
        # enough: this is the rule of standard cron, and Cloudflare's. `*` alone is no restriction.
        self._all_or_any = all if "*" in (fields[2], fields[4]) else any
        # Its times on a day on which it comes, in milliseconds since that day's midnight.
        self._times = sorted((60 * h + m) * _UNITS["minute"] for h in hours for m in minutes)
        if not any(map(self._times_on, range(4 * 366))):  # one of the four years is a leap year
            raise ValueError(f"{show(self.text)} never comes: no such month has such a day")

    def _times_on(self, day: int) -> list[int]:
        """Its times on a day, which is counted from the epoch."""
        on = date.fromordinal(_EPOCH.toordinal() + day)
        in_month, in_week = on.day in self._days, on.isoweekday() % 7 + 1 in self._weekdays
        comes = on.month in self._months and self._all_or_any((in_month, in_week))
        return [day * _UNITS["day"] + time for time in self._times] if comes else []

    def next(self, after: int) -> int:
        """The first time that is later than a moment."""
        days = itertools.count(after // _UNITS["day"])  # 8 years of these at most
        return next(time for day in days for time in self._times_on(day) if time > after)

    def last(self, before: int) -> int:
        """The last time that is not later than a moment."""
        days = itertools.count(before // _UNITS["day"], -1)
        return next(time for day in days for time in self._times_on(day)[::-1] if time <= before)


def _read_cron_field(text: str, field: tuple[str, int, int, str]) -> set[int]:
    """The numbers that a field of a cron expression stands for."""
    what, low, high, names = field
    span = f"{low} to {high}" + (f" or {names[:3]} to {names[-3:]}" if names else "")
    ways = f"a range like {low}-{high}, one of these with a step like */2, or a list"
    counts = {spelling: n for n in range(high + 1) for spelling in (str(n), f"{n:02}")}
    # (In lower case, because "ſep" in upper case would be SEP.)
    known = counts | {name: low + n for n, name in enumerate(names.lower().split())}
    numbers: set[int] = set()
    for item in text.split(","):
        part, slash, step = item.partition("/")
        first, dash, last = (f"{low}-{high}" if part == "*" else part.lower()).partition("-")
        start = known.get(first, -1)
        end = known.get(last, -1) if dash else high if slash else start
        every = counts.get(step, 0) if slash else 1
        expect(low <= start <= end and every > 0, what, item, f"*, {span}, {ways}")
        numbers.update(range(start, end + 1, every))
    return numbers


def read_schedules(given: str | Iterable[str]) -> tuple[Cron, ...]:
    """One cron expression, or several; each counts once."""
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise TypeError(f"{show(given)} is not a cron expression, and no list of these")
    crons = [Cron(text) for text in ([given] if isinstance(given, str) else given)]
    return tuple({cron.text: cron for cron in crons}.values())


def keep_schedules(tx: Transaction, key: int, workflow: Workflow) -> None:
    """Stores when each schedule of a workflow comes next, and forgets those that are bound no more.
    A time that has passed was missed. (A stored time that is later than the next one comes from a
    clock that was set back.)"""
    known = dict(tx.db.rows("SELECT cron, next FROM schedules WHERE workflow = ?", key))
    tx.db.execute("DELETE FROM schedules WHERE workflow = ?", (key,))
    for cron in workflow.schedules:
        comes = cron.next(tx.now)
        comes = min(comes, known.get(cron.text, comes))
        tx.db.execute("INSERT INTO schedules VALUES (?, ?, ?)", (key, cron.text, comes))


def fire_schedules(tx: Transaction) -> list[int]:
    """Creates an instance for each schedule whose time has come, in the transaction that stores its
    next time; returns these. Of the times that were missed it makes up for the last."""
    next_times = []
    for key, workflow in tx.scheduler.bound.items():
        for cron in workflow.schedules:
            where = "WHERE workflow = ? AND cron = ?"
            (due,) = tx.db.one(f"SELECT next FROM schedules {where}", key, cron.text)
            if due <= tx.now:
                at, due = cron.last(tx.now), cron.next(tx.now)
                tx.db.execute(f"UPDATE schedules SET next = ? {where}", (due, key, cron.text))
                entry = (f"{cron.text}-{at}", "{}", *workflow.retention)
                create_instances(tx, workflow.name, [entry], "cron")
            next_times.append(due)
    return next_times


def schedule_of(inst: Instance) -> WorkflowSchedule | None:
    """What an instance was scheduled for: its id says so, which begins with the expression."""
    cron, _, at = (inst.id or "").rpartition("-")
    return WorkflowSchedule(cron, int(at)) if " " in cron else None


# --------------------------------------------------------------------------------------------------
# Configuration: an engine from the file that Cloudflare's `wrangler` reads, so that one description
# of the workflows serves both here and there. Whatever is wrong with the file is one `ValueError`
# that names the file, the key and what was expected. What is not about workflows is ignored.
#
# developers.cloudflare.com/workers/wrangler/configuration/

_CONFIG_FILES = ("wrangler.json", "wrangler.jsonc", "wrangler.toml")  # `wrangler` has this order

# What the file may say: by key, the kind of its value. A kind is a type, a function that can read
# the value, or again such a dict.
_SETTINGS: dict[str, Any] = {
    "name": str,
    "limits": {"steps": functools.partial(read_count, most=25_000)},
    "concurrency": {"limit": read_count},
    "schedules": read_schedules,
    "default_retention": {"success_retention": parse_duration, "error_retention": parse_duration},
    "jurisdiction": ignore,
}
_EXPORT = {"type": str, **_SETTINGS}
_ENTRY = {**_SETTINGS, "binding": str, "class_name": str, "script_name": str}
_CPU = {"cpu_ms": functools.partial(read_count, most=300_000)}
_FILE = {"main": str, "name": str, "vars": dict, "limits": _CPU, "workflows": list, "exports": dict}
_WORDS: dict[Any, str] = {str: "text", dict: "an object", list: "a list"}

# A string, which is kept; or a comment.
_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
# A string, or a comma that nothing precedes, which are kept; or a comma that nothing follows.
_LAST_COMMA = re.compile(r'("(?:\\.|[^"\\])*"|[\[{:,]\s*,)|,(?=\s*[\]}])', re.DOTALL)


class Configuration:
    """A configuration file: what it says about workflows, and the modules that it names."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        found = [name for name in _CONFIG_FILES if os.path.exists(name)] or ["wrangler.jsonc"]
        self.file = Path(found[0] if path is None else path)
        with naming(self.file):
            self.given = _read_config(self.file)
            _check(self.given, _FILE, "", ["main"], strict=False)
            self.entries = self._entries()
            if not self.entries:
                raise ValueError("no workflow: expected one in `workflows` or `exports`")

    def _entries(self) -> dict[str, dict[str, Any]]:
        """What the file says about each workflow, by where it does."""
        exports, entries = {}, {}
        for name, export in self.given.get("exports", {}).items():
            where = f"exports.{name}"
            _check(export, {"type": str}, where, ["type"], strict=False)
            if export["type"] == "workflow":
                _check(export, _EXPORT, where, ["name"])
                exports[where] = {"class_name": name, **export}
        for n, entry in enumerate(self.given.get("workflows", [])):
            where = f"workflows[{n}]"
            _check(entry, _ENTRY, where, ["name", "binding", "class_name"])
            other = f"exports.{entry['class_name']}"
            if exports.get(other, {}).get("name") == entry["name"]:  # here it gets its binding
                entry = exports.pop(other) | entry
            entries[where] = entry
        return entries | exports

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Those for the engine: a caller's, and what the file adds to them."""
        env = {**self.given.get("vars", {}), **(given.get("env") or {})}
        limits = given.get("limits") or Limits()
        if "cpu_ms" in self.given.get("limits", {}):
            limits = dataclasses.replace(limits, cpu_ms=self.given["limits"]["cpu_ms"])
        return {**given, "env": env, "limits": limits}

    def bind_workflows(self, engine: Engine) -> None:
        """Loads the modules, and binds each workflow."""
        install_workers_shim()
        main = self.file.parent / self.given["main"]
        with naming(f"{self.file}: main"):
            load_module(main)
        for where, entry in self.entries.items():
            settings = {"steps": entry.get("limits", {}).get("steps")}
            settings["running"] = entry.get("concurrency", {}).get("limit")
            settings["schedules"] = entry.get("schedules", ())
            settings |= entry.get("default_retention", {})
            with naming(f"{self.file}: {where}"):
                cls = self._find_class(main, entry)
                engine.bind(cls, entry["name"], entry.get("binding"), **settings)

    def _find_class(self, main: Path, entry: dict[str, Any]) -> Any:
        """The class of an entry: of `main`, or of another script, which is a module beside that."""
        own, name = self.given.get("name"), entry["class_name"]
        script = entry.get("script_name", own)
        with naming("script_name"):
            module = load_module(main if script == own else main.parent / f"{script}.py")
        expect(hasattr(module, name), "class_name", name, f"a class of {module.__file__}")
        return getattr(module, name)


def _check(value: Any, kind: Any, what: str, needed: Any = (), strict: bool = True) -> None:
    """Refuses a value that is not of a kind (see above), and an object that lacks a needed key or,
    if this is `strict`, has an unknown one."""
    if not isinstance(kind, (type, dict)):
        with naming(what):
            kind(value)
        return
    expected: Any = dict if isinstance(kind, dict) else kind
    expect(isinstance(value, expected), what or "it", value, _WORDS[expected])
    if isinstance(kind, dict):
        if strict:
            options_of(value, [*kind], what)
        for key, part in kind.items():
            if key in value:
                _check(value[key], part, f"{what}.{key}" if what else key, strict=strict)
            elif key in needed:
                raise ValueError(f"{what or 'it'} has no {key!r}: expected {_WORDS[part]}")


def _read_config(file: Path) -> Any:
    kind, parse = ("TOML", tomllib.loads) if file.suffix == ".toml" else ("JSON", parse_jsonc)
    try:
        return parse(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not {kind}: {error}") from None


def parse_jsonc(text: str) -> Any:
    """The value of JSON with comments and trailing commas. Both are replaced by as many blanks, so
    that a position in an error is one in the text."""
    for superfluous in (_COMMENT, _LAST_COMMA):
        text = superfluous.sub(lambda match: match[1] or re.sub(r"[^\n]", " ", match[0]), text)
    return json.loads(text)


_loaded: weakref.WeakSet[types.ModuleType] = weakref.WeakSet()  # what `load_module` has imported


def load_module(file: Path) -> types.ModuleType:
    """The module of a file, imported as its neighbours import it: by its name, from its folder. So
    there is one of it, and what it defines has the same name in every process. One that was loaded
    like this from another folder (another project's, or the last test's) leaves it the name.

    Its folder stays on `sys.path`, as that of a script does: functions may import, too."""
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"{file}: expected a Python file (.py) there")
    folder, known = str(file.parent.resolve()), sys.modules.get(file.stem)
    sys.path[:] = [folder, *(other for other in sys.path if other != folder)]
    if known in _loaded and not is_from(known, file):
        del sys.modules[file.stem]
    importlib.invalidate_caches()  # the file may be newer than what Python knows of the folder
    try:
        module = importlib.import_module(file.stem)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file} can't be imported: {show_error(error)}") from error
    if not is_from(module, file):
        found = getattr(module, "__file__", None) or "Python itself"
        raise ValueError(f"{file} needs another name: there is a module {file.stem!r} of {found}")
    if module is not known:
        _loaded.add(module)
    return module


def is_from(module: types.ModuleType | None, file: Path) -> bool:
    return Path(getattr(module, "__file__", None) or "").resolve() == file.resolve()


# --------------------------------------------------------------------------------------------------
# Showing: an instance as people outside of Python see it. The command line, both HTTP APIs and the
# page use what is made here, and differ only in what they leave out. Outside of Python a moment is
# ISO 8601 text, always equally long because clients compare it as text, and bytes are base64.

_SHOWN_KINDS = {"do": "step", "sleep": "sleep", "wait_for_event": "waitForEvent"}
_UNLIMITED = 2**53 - 1  # JSON has no infinity
CANCELLED = {"name": "Cancelled", "message": "run has cancelled this call"}
# The types of the rows that end a step.
_ENDINGS = {type for type, (*_, state) in _MEANING.items() if state != "pending"}
Say = Callable[[Any], Any]  # gives an output as it is shown


def moment(ms: int | None) -> str | None:
    """A moment as text."""
    return None if ms is None else to_datetime(ms).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def to_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON for others."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_to_others)


def _to_others(value: datetime | bytes) -> str:
    return value.isoformat() if isinstance(value, datetime) else base64.b64encode(value).decode()


def shown_status(_: Transaction | None, inst: Instance) -> str:
    """One of the eight statuses, or Cloudflare's word for an instance whose steps are undone."""
    undone = (inst.status, inst.rollback) == ("running", "begun")
    return "rollingBack" if undone else inst.status


def read_details(tx: Transaction, inst: Instance) -> tuple[Instance, list[Row], dict[str, int]]:
    """What `timeline` needs: the instance, its journal, and when its waits will end."""
    since = tx.now if inst.paused is None else inst.paused  # what was not due stands still
    sql = "SELECT step, due + iif(fixed OR due <= ?, 0, ?) FROM waits WHERE instance = ?"
    return inst.copy(), tx.journal(inst), dict(tx.db.rows(sql, since, tx.now - since, inst.key))


def timeline(inst: Instance, rows: list[Row], dues: dict[str, int], say: Say) -> dict[str, Any]:
    """An instance with its steps, in the order of their starts; `say` is applied to outputs. A
    sleep or an event wait that has not `finished` has the end that is planned, if that is known."""
    steps: dict[str, Step] = {}
    rows_of: dict[str | None, list[Row]] = {}  # of each step, for the times: `apply` keeps none
    for row in rows:
        apply(steps, row)
        if row.step in steps:
            rows_of.setdefault(row.step, []).append(row)
        else:  # it is about no step, or that is as if it had not begun
            rows_of.pop(row.step, None)
    shown = [_shown_step(steps[key], rows_of[key], moment(dues.get(key)), say) for key in steps]
    shown.sort(key=lambda step: step["start"])
    if inst.status == "terminated":
        shown.append({"type": "termination", "trigger": {"source": inst.termination}})
    last, undoing = decode(rows[-1].data or "null"), decode(rows[-1].extra or "null")
    complete, rolled = inst.status == "complete", inst.rollback in ("complete", "failed")
    schedule = schedule_of(inst)
    rollback = {"outcome": inst.rollback, "error": undoing and brief(undoing)} if rolled else None
    return (
        {"status": shown_status(None, inst), "params": decode(rows[0].data or "null")}
        | {"queued": moment(rows[0].at), "start": moment(inst.started), "end": moment(inst.ended)}
        | {"success": complete if inst.status in FINISHED else None, "rollback": rollback}
        | {"error": brief(last) if inst.status == "errored" else None}
        | {"output": say(last if complete else None), "trigger": {"source": inst.trigger}}
        | {"schedule": schedule and dict(schedule), "step_count": len(steps), "steps": shown}
    )


def _attempts_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the rows of a step tell of its attempts."""
    attempts: list[dict[str, Any]] = []
    for row in rows:
        opened = bool(attempts) and attempts[-1]["end"] is None
        if row.type == "stop" and opened:
            attempts.pop()
        if row.attempt is not None and not opened:
            attempts.append({"start": _began(row), "end": None, "success": None, "error": None})
        if row.type == "done":
            attempts[-1] |= {"end": moment(row.at), "success": True}
        elif row.type in ("failed", "error") or (row.type == "cancel" and opened):
            error = CANCELLED if row.data is None else brief(decode(row.data))
            attempts[-1] |= {"end": moment(row.at), "success": False, "error": error}
    return attempts


def _began(row: Row) -> str | None:
    return moment(row.at if row.began is None else row.began)


def _shown_step(step: Step, rows: list[Row], due: str | None, say: Say) -> dict[str, Any]:
    kind, attempts = step.key.split(SEPARATOR)[-3], _attempts_of(rows)
    end = next((moment(row.at) for row in rows if row.type in _ENDINGS), None)
    type = "rollback" if step.key.startswith(ROLLBACK) else _SHOWN_KINDS[kind]
    shown: dict[str, Any] = {"type": type, "name": step_label(step.key)}
    shown |= {"start": _began(rows[0]), "end": end}
    data, failed = decode(step.data or "null"), step.state == "error"
    if kind == "do":
        config = json.loads(step.config)["config"] if step.config else DEFAULT_CONFIG
        retries = {"delay": "[dynamic]"} | config["retries"]  # a function is not stored
        retries["limit"] = min(retries["limit"], _UNLIMITED)
        shown |= {"config": config | {"retries": retries}, "attempts": attempts, "retry_at": due}
        success = bool(attempts) and attempts[-1]["success"] if end else None
        output = "[REDACTED]" if "sensitive" in config else say(data)
        return shown | {"success": success, "output": output if success else None}
    error = CANCELLED if step.state == "cancelled" else brief(data) if failed else None
    finished, success = step.state in ENDED, (error is None if end else None)
    shown |= {"end": end or due, "finished": finished, "success": success, "error": error}
    if kind == "sleep":
        return shown
    asked, sent = decode(rows[0].data or "null"), json.loads(step.extra or "{}")
    output = sent and {"type": sent["type"], "payload": data, "timestamp": moment(sent["at"])}
    return shown | {"event_type": asked["type"], "output": say(output) if output else None}


# --------------------------------------------------------------------------------------------------
# Resources: what can be asked from outside, one function for each. The command line calls them
# directly; `dev` answers HTTP with them, in the words of Cloudflare's REST API and of the explorer
# in Cloudflare's local development server, which has fewer of them. (Cloudflare gives workflows and
# their versions UUIDs; here the name serves for both, as there is one version of each.)
#
# developers.cloudflare.com/api/resources/workflows/

SHOWN_STATUSES = (*STATUSES, "rollingBack")
_VERBS = {"pause": "", "resume": "", "restart": "from", "terminate": "rollback"}  # and options
_NEW = ("id", "instance_id", "params", "instance_retention", "location_hint")
_KEPT = ("success_retention", "error_retention")
# What nobody may see any more of a workflow, though the owner has not cleared it away yet.
_GONE = """SELECT key FROM instances WHERE workflow = :key AND wake <= :now AND (id IS NULL OR
    ended + iif(status = 'errored', error_retention, success_retention) <= :now)"""
_VISIBLE = f"workflow = :key AND key NOT IN ({_GONE})"
_STATUS = "iif(status = 'running' AND rollback IS 'begun', 'rollingBack', status)"
_WANTED = {"start": "created >= :start", "end": "created <= :end", "status": f"{_STATUS} = :status"}
# (The status itself, unlike that expression, is in an index.)
_WANTED["status"] += " AND status = iif(:status = 'rollingBack', 'running', :status)"
_terminating: set[tuple[Engine, str | None]] = set()  # the workflows whose instances are terminated


@dataclasses.dataclass
class Request:
    """What somebody asks: the parts of the path, the query, the body. In Cloudflare's REST API
    values are the text of JSON within JSON."""

    engine: Engine
    name: str | None = None  # of the workflow, if it is about one
    id: str = ""  # of the instance, or of a version
    type: str = ""  # of an event
    query: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: Any = None
    api: str = ""  # "rest" or "explorer"
    progress: Callable[[int], object] = ignore  # is told how many are done, when there are many
    info: dict[str, Any] | None = None  # of the answer, if that is a list: what belongs to it
    seen = 0  # the last event that the answer knows of

    async def answer(self, resource: Callable[[Request], Any]) -> Any:
        """What a resource says, if there is such a workflow."""
        if self.name is not None:
            self.workflow = copy.copy(await self.engine.workflow(self.name))
            self.workflow.source = "api"
            self.instance = WorkflowInstance(self.workflow, self.id)
        return await resource(self)

    async def call(self, operation: Operation, *args: Any) -> Any:
        """The result of an operation on the workflow."""
        return await self.engine.call(operation, self.name, *args)

    def done(self) -> dict[str, Any]:
        now = moment(self.engine.clock.now())
        return {"instanceId": self.id, "timestamp": now, "success": True}

    def word(self, key: str, *known: str) -> str | None:
        """The value of a key of the query that takes one of these words."""
        word = self.query.get(key)
        expect(word in (None, *known), key, word, f"one of {', '.join(known)}")
        return word

    def number(self, key: str, default: int, most: int = 2**53) -> int:
        """A number of the query, from 1. (Cloudflare's Python client writes `2.0`.)"""
        text = self.query.get(key, str(default)).removesuffix(".0")
        return read_count(int(text) if text.isdecimal() else text, most, key)

    def moment(self, key: str) -> int | None:
        """A moment of the query: ISO 8601, in UTC unless it says something else. A date as the end
        of a range includes that day."""
        if (text := self.query.get(key)) is None:
            return None
        with naming(key):
            when = datetime.fromisoformat(text)
        ms = parse_moment(when if when.tzinfo else when.replace(tzinfo=UTC))
        return ms + _UNITS["day"] - 1 if key == "date_end" and len(text) == 10 else ms

    def listed(self, rows: list[Any], total: int | None = None, **more: Any) -> list[Any]:
        """A page of a list: these rows of so many, or without a total some of them."""
        page, size = self.number("page", 1, 10**9), self.number("per_page", 25, 100)
        if total is None:
            total, rows = len(rows), rows[(page - 1) * size : page * size]
        self.info = {"page": page, "per_page": size, "count": len(rows), "total_count": total}
        self.info |= {"total_pages": max(1, math.ceil(total / size)), **more}
        return rows


def read_rows(tx: Transaction, sql: str, **values: Any) -> list[dict[str, Any]]:
    """The rows of a query by the names of their columns; a moment's ends with _on."""
    tx.write()
    cursor = tx.db.execute(sql, values)
    cursor.row_factory = sqlite3.Row
    rows = [dict(row) for row in cursor]
    return [{n: moment(v) if n.endswith("_on") else v for n, v in row.items()} for row in rows]


def read_workflows(tx: Transaction, name: str | None) -> list[dict[str, Any]]:
    """The workflows, or the one of that name, with the numbers of their instances by status."""
    sql = """SELECT name AS id, name, class AS class_name, coalesce(script, name) AS script_name,
             created AS created_on, modified AS modified_on, (SELECT created FROM instances WHERE
             key = (SELECT max(key) FROM instances WHERE workflow = w.key)) AS triggered_on, key
             FROM workflows AS w WHERE name = coalesce(:name, name) ORDER BY name"""
    found = read_rows(tx, sql, name=name)
    for row in found:
        key = row.pop("key")
        crons = tx.db.rows("SELECT cron, next FROM schedules WHERE workflow = ?", key)
        row["schedules"] = [{"cron": cron, "next_instance": moment(ms)} for cron, ms in crons]
        sql = f"SELECT {_STATUS}, count(*) FROM instances WHERE {_VISIBLE} GROUP BY 1"
        counts = dict(tx.db.execute(sql, {"key": key, "now": tx.now}))
        row["instances"] = dict.fromkeys(SHOWN_STATUSES, 0) | counts
    return found


def find_instances(tx: Transaction, workflow: str, wanted: dict[str, Any]) -> tuple[list[Any], int]:
    """A page of a workflow's instances, and how many there are. `wanted` may restrict them by
    `start`, `end` and `status`; the page begins at the key `first`, goes `upwards` or not, after
    `skip` others, and has `size` instances at most."""
    (key,) = tx.db.one("SELECT key FROM workflows WHERE name = ?", workflow)
    values = {"key": key, "now": tx.now, **wanted}
    asked = [sql for name, sql in _WANTED.items() if wanted[name] is not None]
    where = " AND ".join([_VISIBLE, *asked])
    (counted,) = read_rows(tx, f"SELECT count(*) AS n FROM instances WHERE {where}", **values)
    than, order = (">=", "ASC") if wanted["upwards"] else ("<=", "DESC")
    keys = f"SELECT key FROM instances WHERE {where} AND key {than} :first ORDER BY key {order}"
    sql = f"""SELECT id, {_STATUS} AS status, trigger AS trigger_source, created AS created_on,
              at AS modified_on, started AS started_on, ended AS ended_on, key
              FROM {_WITH_NEWEST} WHERE key IN ({keys} LIMIT :skip, :size) ORDER BY key {order}"""
    return read_rows(tx, sql, **values), counted["n"]


def terminate_instances(tx: Transaction, workflow: str, ids: Ids, status: str | None = None) -> int:
    """Terminates those that have not finished, or the ones of these with a status. Returns their
    number."""
    found = [inst for inst in tx.find(workflow, ids).values() if inst.status not in FINISHED]
    going = [inst for inst in found if status in (None, shown_status(tx, inst))]
    for inst in going:
        _terminate(tx, inst, "api", False)
    return len(going)


async def show_workflows(ask: Request) -> list[Any]:
    found, part = await ask.engine.call(read_workflows, None), ask.query.get("search", "")
    return ask.listed([row for row in found if part in row["name"]])


async def show_workflow(ask: Request) -> Any:
    return (await ask.call(read_workflows))[0]


async def drop_workflow(ask: Request) -> dict[str, Any]:
    """Deletes all its instances. Its name stays: some process may be about to run more of them."""
    async for ids in pages(ask.workflow, None, ask.progress):
        await ask.call(delete_instances, ids)
    return {"status": "ok", "success": True}


async def show_versions(ask: Request) -> Any:
    """A workflow has one version, the one that was bound last; and that has no graph."""
    shown, limits = await show_workflow(ask), ask.workflow
    version = {key: shown[key] for key in ("id", "created_on", "modified_on", "class_name")}
    version |= {"workflow_id": ask.name, "has_dag": False, "language": "python", "graph": None}
    version |= {"limits": {"steps": limits.steps}, "concurrency": {"limit": limits.running}}
    version["default_retention"] = dict(zip(_KEPT, limits.retention, strict=True))
    if ask.id.removesuffix("/graph") not in ("", ask.name):
        raise refusal("version.not_found", f"workflow {ask.name!r} has no version {ask.id!r}")
    return version if ask.id else ask.listed([version])


async def show_instances(ask: Request) -> list[Any]:
    """The newest first, unless `direction` is asc."""
    start, end = ask.moment("date_start"), ask.moment("date_end")
    if start is not None and end is not None and start > end:
        raise refusal("request.dates", "'date_start' must not be after 'date_end'")
    upwards, size = ask.word("direction", "asc", "desc") == "asc", ask.number("per_page", 25, 100)
    wanted = {"start": start, "end": end, "status": ask.word("status", *SHOWN_STATUSES)}
    wanted |= {"upwards": upwards, "first": ask.number("cursor", 1 if upwards else 2**53)}
    # (One more than the page has: is there another page?)
    wanted |= {"skip": (ask.number("page", 1, 10**9) - 1) * size, "size": size + 1}
    found, total = await ask.call(find_instances, wanted)
    keys = [row.pop("key") for row in found]
    more: dict[str, Any] = {"cursor": str(keys[size])} if len(keys) > size else {}
    if ask.api == "explorer":
        counts = (await show_workflow(ask))["instances"]
        more["status_counts"] = {status: count for status, count in counts.items() if count}
    rows = [row | {"version_id": ask.name, "workflow_id": ask.name} for row in found[:size]]
    return ask.listed(rows, total, **more)


def read_new(ask: Request, body: Any) -> dict[str, Any]:
    """What `create` takes, from what is asked for."""
    given = options_of(body, _NEW, "the body")
    params, id = given.get("params", {}), given.get("instance_id", given.get("id"))
    with contextlib.suppress(ValueError):  # the REST API's may be the text of JSON
        params = json.loads(params) if type(params) is str and ask.api == "rest" else params
    kept = options_of(given.get("instance_retention", {}), _KEPT, "instance_retention")
    retention = {camel(key): value for key, value in kept.items()}
    return {"id": id, "params": params, "retention": retention}


def show_new(ask: Request, instance: WorkflowInstance) -> dict[str, Any]:
    told = {"status": "queued", "version_id": ask.name, "workflow_id": ask.name}
    return {"id": instance.id, "trigger_source": "api", **told}


async def add_instance(ask: Request) -> dict[str, Any]:
    entry = read_new(ask, {} if ask.body is None else ask.body)
    return show_new(ask, await ask.workflow.create(entry))


async def add_instances(ask: Request) -> list[Any]:
    """Creates those of a list, without the ones whose ids exist already."""
    _check(ask.body, list, "the body")
    made = await ask.workflow.create_batch([read_new(ask, entry) for entry in ask.body])
    return [show_new(ask, instance) for instance in made]


async def drop_instances(ask: Request) -> Any:
    given = options_of(ask.body, ["instances"], "the body")
    return await ask.workflow.delete_batch(given.get("instances", []))


async def end_instances(ask: Request) -> dict[str, Any]:
    ids = ask.workflow._batch(ask.body, "the body", ask.workflow.check_id)
    return {"instancesTerminated": await ask.call(terminate_instances, ids), "status": "ok"}


async def end_all(ask: Request) -> dict[str, Any]:
    """Terminates all instances, or those with a status."""
    status, job = ask.word("status", *SHOWN_STATUSES), (ask.engine, ask.name)
    stored = "running" if status == "rollingBack" else status
    if job in _terminating:
        return {"status": "already_running"}
    _terminating.add(job)
    try:
        async for ids in pages(ask.workflow, stored, ask.progress):
            await ask.call(terminate_instances, ids, status)
    finally:
        _terminating.discard(job)
    return {"status": "ok"}


async def show_ending(ask: Request) -> dict[str, Any]:
    return {"status": "running" if (ask.engine, ask.name) in _terminating else "not_running"}


async def show_instance(ask: Request) -> dict[str, Any]:
    """The timeline. It is made in a thread, because it may be long. The explorer's has no ends that
    are only planned and no output that is null; in Cloudflare's API outputs are JSON as text."""
    inst, rows, dues = await ask.call(on_instance, ask.id, read_details)
    dues, say = {} if ask.api == "explorer" else dues, to_text if ask.api == "rest" else copy.copy
    ask.seen = inst.seq * 10 + 9
    shown = await asyncio.to_thread(timeline, inst, rows, dues, say)
    for step in shown["steps"] if ask.api == "explorer" else ():
        if step.get("output", "") is None:
            del step["output"]
    if ask.word("order", "asc", "desc") == "desc":
        shown["steps"].reverse()
    if ask.query.get("simple") == "true":
        shown["steps"] = []
    return {"id": ask.id, **shown, "versionId": ask.name}


async def show_step(ask: Request) -> dict[str, Any]:
    """The result of a step, of one of its attempts, or of an event wait."""
    kind, name, ask.api = ask.query.get("type", "step"), ask.query.get("name", ""), ""
    if kind == "waitForEvent" and "attempt" in ask.query:
        raise ValueError("attempt does not go with waitForEvent")
    for step in (await show_instance(ask))["steps"]:
        if (step["type"], step.get("name")) == (kind, name):
            tried = step.get("attempts") or [step]
            attempt = tried[ask.number("attempt", len(tried), len(tried)) - 1]
            success = (attempt if "attempt" in ask.query else step)["success"]
            going = "waiting" if kind == "waitForEvent" else "running"
            status = {None: going, True: "complete", False: "errored"}[success]
            told = {"status": status, "output": step.get("output") if success else None}
            return told | {"error": attempt.get("error"), "event_type": step.get("event_type")}
    raise refusal("step.not_found", f"instance {ask.id!r} has no {kind} {name!r}")


async def drop_instance(ask: Request) -> dict[str, Any]:
    await ask.instance.delete()
    return ask.done()


async def steer(ask: Request) -> dict[str, Any]:
    """Pauses, resumes, restarts or terminates an instance."""
    given = options_of(ask.body, ("status", "action", "from", "rollback"), "the body")
    options = {key: value for key, value in given.items() if value not in (None, False)}
    verb = options.pop("status", options.pop("action", None))
    expect(verb in [*_VERBS], "status", verb, f"one of {', '.join(_VERBS)}")
    if wrong := options.keys() - {_VERBS[verb]}:
        raise ValueError(f"{min(wrong)!r} does not go with {verb}")
    await getattr(ask.instance, verb)(**options)
    return ask.done() | {"status": await ask.call(on_instance, ask.id, shown_status)}


async def send(ask: Request) -> dict[str, Any]:
    await ask.instance.send_event(type=ask.type, payload=ask.body)
    return ask.done()


async def show_usage(ask: Request) -> dict[str, Any]:
    return dataclasses.asdict(await ask.engine.usage())


# --------------------------------------------------------------------------------------------------
# HTTP: the resources for other programs, and a page for people. Each connection has a thread, and
# each request is handed to the engine's loop, so that a slow client holds up nobody. Bounds are set
# to what a client may take of lines, bytes, seconds and connections.
#
# Without a token only this machine is served: the socket is a local one, `Host` must be local (a
# name that leads here by DNS rebinding is not), and `Origin`, which a browser adds to whatever the
# page of another site makes it ask, must be our own.

PATIENCE = 30.0  # seconds that a client may take to ask, and again to take the answer
CONNECTIONS = 64
PACE = 0.004  # seconds from one new connection to the next, to spare the engine
BODY = 2**21  # bytes: a payload has up to 1 MiB, and more as text within JSON
_BASE = "(?:/client/v4/accounts/[^/]+|/cdn-cgi/(?:local/)?explorer/api)"
_LOCAL_HOST = re.compile(r"(?:localhost|127\.[0-9.]+|\[::1\])(?::[0-9]+)?", re.IGNORECASE)
_PARTS = {"NAME": "(?P<name>[^/]+)", "ID": "(?P<id>.+)", "TYPE": "(?P<type>[^/]+)"}
_WORKFLOW = "name class_name script_name instances status success"
_INSTANCE = "id status created_on"
_DETAILS = "status params queued start end output error steps step_count success"
# What answers below the bases, special paths first, and the fields that the explorer has of it. (An
# id may hold slashes: `wrangler` sends them as they are.)
_ROUTES: list[tuple[str, dict[str, Callable[[Request], Any]], str]] = [
    ("/workflows", {"GET": show_workflows}, "name class_name script_name"),
    ("/workflows/NAME", {"GET": show_workflow, "DELETE": drop_workflow}, _WORKFLOW),
    ("/workflows/NAME/versions", {"GET": show_versions}, ""),
    ("/workflows/NAME/versions/ID", {"GET": show_versions}, ""),
    ("/workflows/NAME/instances", {"GET": show_instances, "POST": add_instance}, _INSTANCE),
    ("/workflows/NAME/instances/batch", {"POST": add_instances}, "id"),
    ("/workflows/NAME/instances/batch/delete", {"POST": drop_instances}, ""),
    ("/workflows/NAME/instances/batch/terminate", {"POST": end_instances}, ""),
    ("/workflows/NAME/instances/terminate", {"GET": show_ending, "PUT": end_all}, ""),
    ("/workflows/NAME/instances/ID/status", {"PATCH": steer}, "status timestamp"),
    ("/workflows/NAME/instances/ID/events/TYPE", {"POST": send}, "success"),
    ("/workflows/NAME/instances/ID/step", {"GET": show_step}, ""),
    ("/workflows/NAME/instances/ID", {"GET": show_instance, "DELETE": drop_instance}, _DETAILS),
]
# What Cloudflare's clients ask to deploy a workflow, which is done in another way here.
_DEPLOYING = re.compile(_BASE + "/workflows/[^/]+(?:/triggers|/settings)?/?")
# By the last part of a refusal's code: its HTTP status; and the numbers that Cloudflare gives some.
# (None may be 10000 or 9106: with these `wrangler` looks for a broken login.)
_STATUS_OF = {
    "not_found": 404, "already_exists": 409, "not_running": 409, "cannot_terminate": 409,
    "cannot_restart": 409, "creation_rate": 429, "queued_instances": 429, "event_payload": 413,
    "too_large": 413, "unauthorized": 401, "forbidden": 403, "no_method": 405, "internal": 503,
    "bug": 500,
}  # fmt: skip
_NUMBERS = {"workflow.not_found": 10200, "instance.not_found": 10400, "request.dates": 10502}
_NUMBERS |= {"instance.already_exists": 10405, "request.not_found": 7003}


def find_route(method: str, path: str) -> tuple[Callable[[Request], Any], dict[str, Any], str]:
    """What answers a request, the parts of its path, and the fields that the explorer has of it."""
    deploys = method == "PUT" and _DEPLOYING.fullmatch(path)
    what = "to change a workflow, edit its code or the configuration file, and start `dev` again"
    require(not deploys, "request.no_method", what)
    for pattern, resources, fields in _ROUTES:
        regex = re.sub("NAME|ID|TYPE", lambda part: _PARTS[part[0]], pattern)
        if match := re.fullmatch(_BASE + regex + "/?", path):
            what = f"{method} is not possible here: expected {' or '.join(resources)}"
            require(method in resources, "request.no_method", what)
            parts = {name: urllib.parse.unquote(text) for name, text in match.groupdict().items()}
            return resources[method], parts, fields
    raise refusal("request.not_found", "nothing is here")


def failure(error: Exception, api: str) -> tuple[int, dict[str, Any]]:
    """The HTTP status of an error, and what is said of it: its message, and no more."""
    code = getattr(error, "code", "bad_request")
    text = str(error).removeprefix(f"({code}) ")
    if not isinstance(error, (WorkflowError, ValueError, TypeError, RecursionError)):
        log.error("a bug in workflows.py: please report it", exc_info=error)
        code, text = "request.bug", "see the log of `dev`"
    status = _STATUS_OF.get(code.rpartition(".")[2], 400)
    number = 10501 if (api, status) == ("explorer", 404) else _NUMBERS.get(code, 10001)
    problem = {"code": number, "message": f"workflows.api.error.{code}: {text}"}
    return status, {"success": False, "errors": [problem], "messages": [], "result": None}


class Server(socketserver.ThreadingTCPServer):
    """Listens, and bounds how many connections there are and how long they take."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = CONNECTIONS  # with less, who has to wait waits for a second

    def __init__(self, engine: Engine, host: str, port: int, token: str | None) -> None:
        self.engine, self.token = engine, token
        self.deadlines: dict[socket.socket, float] = {}  # of the connections
        self.closing = False  # nothing more is begun
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        time.sleep(PACE)
        if len(self.deadlines) >= CONNECTIONS:
            return False
        self.deadlines[request] = time.monotonic() + PATIENCE
        return True

    def shutdown_request(self, request: Any) -> None:
        self.deadlines.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection failed", exc_info=True)

    def service_actions(self) -> None:
        """Ends what takes too long; called many times a second."""
        for connection, deadline in [*self.deadlines.items()]:
            if deadline < time.monotonic():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "workflows.py", ""
    wbufsize = -1  # headers and a short answer are one packet: two would cost 40 ms
    disable_nagle_algorithm = True

    def answer(self) -> None:
        """Answers a request."""
        if self.server.deadlines[self.connection] < time.monotonic():
            return  # this is what had come when it was cut off
        self.server.deadlines[self.connection] = time.monotonic() + PATIENCE
        path, _, query = self.path.encode("latin-1").decode("utf-8", "replace").partition("?")
        api, unread = "explorer" if path.startswith("/cdn-cgi/") else "rest", True
        try:
            self._check_sender(path)
            text = self._read_body(100 * BODY if "/batch" in path else BODY)
            unread = False
            if (self.command, path) == ("GET", "/"):
                return self._send_page()
            require(not self.server.closing, "request.internal", "`dev` is about to stop")
            resource, parts, fields = find_route(self.command, path)
            body = json.loads(text) if text else None
            asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
            ask = Request(self.server.engine, **parts, query=asked, body=body, api=api)
            self.server.deadlines[self.connection] = math.inf
            coming = asyncio.run_coroutine_threadsafe(ask.answer(resource), ask.engine.loop)
            status, result = 200, coming.result()
            if api == "explorer" and fields:
                rows = result if isinstance(result, list) else [result]
                rows = [{key: row[key] for key in fields.split() if key in row} for row in rows]
                result = rows if isinstance(result, list) else rows[0]
            said = {"success": True, "errors": [], "messages": [], "result": result}
            said |= {"result_info": ask.info} if ask.info else {}
        except ConnectionError:  # the client is gone
            self.close_connection = True
            return
        except Exception as error:
            status, said = failure(error, api)
        self.server.deadlines[self.connection] = time.monotonic() + PATIENCE
        # Behind a body that was not read is no request: the client must connect again.
        self.close_connection |= unread
        self._send(status, to_text(said))
        if unread and ("Content-Length" in self.headers or "Transfer-Encoding" in self.headers):
            self._drop_the_rest()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def _read_body(self, most: int) -> bytes:
        """The body, if it has up to so many bytes, and the client tells beforehand how many."""
        self.wfile.flush()  # the answer to a client that asks first whether to send the body
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]+", length):  # `int` would take more
            raise ValueError(f"Content-Length is {show(length)}")
        if "Transfer-Encoding" in self.headers or int(length) > most:
            what = f"expected a body with a Content-Length up to {most}"
            raise refusal("request.too_large", what)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ValueError("the body is shorter than its Content-Length")
        return body

    def _drop_the_rest(self) -> None:
        """Reads the body that a refused client still sends (within bounds): only then it sees the
        answer."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        for _ in range(100):
            if len(self.rfile.read(BODY)) < BODY:
                break

    def _check_sender(self, path: str) -> None:
        """Refuses a sender without the token; if there is no token, one that is not local."""
        token, host = self.server.token, self.headers.get("Host", "")
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(given.encode("latin-1"), str(token).encode())
        if token and path != "/" and not (same and scheme.lower() == "bearer"):
            raise refusal("request.unauthorized", "expected Authorization: Bearer <token>")
        origin = self.headers.get("Origin", f"http://{host}")
        ours = _LOCAL_HOST.fullmatch(host) and origin.lower() == f"http://{host}".lower()
        if not token and not ours:
            raise refusal("request.forbidden", "Host is not local, or another site's page asks")

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe()
        own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        policy = f"default-src 'none'; {own}; img-src data:; base-uri 'none'; form-action 'none'"
        headers = {"Content-Security-Policy": policy + "; frame-ancestors 'none'"}
        self._send(200, PAGE.replace("NONCE", nonce), "text/html; charset=utf-8", headers)

    def _send(self, status: int, text: str, type: str = "application/json", more: Any = ()) -> None:
        content = text.encode("utf-8", "replace")
        headers = {"Content-Type": type, "Content-Length": str(len(content)), **dict(more)}
        headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        headers |= {"Connection": "close"} if self.close_connection else {}
        # Cloudflare's Python client would try a conflict again.
        headers |= {"x-should-retry": "false"} if status == 409 else {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What `http.server` refuses by itself."""
        self.close_connection = True
        code = 405 if code == 501 else code  # it does not know the method
        self._send(code, to_text(failure(ValueError(message), "rest")[1]))

    def log_message(self, *_: Any) -> None:
        """What happens to instances is logged instead."""


@contextlib.asynccontextmanager
async def serve(
    engine: Engine, host: str = "127.0.0.1", port: int = 0, token: str | None = None
) -> AsyncGenerator[Server, None]:
    """Answers HTTP as long as it is open; then the requests that are under way get a second."""
    try:
        server = Server(engine, host, port, token)
    except (OSError, OverflowError) as error:
        raise ValueError(f"can't listen at {host}, port {port}: {error}") from error
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.closing = True
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        for _ in range(100):
            if math.inf in server.deadlines.values():
                await asyncio.sleep(0.01)


def report_change(tx: Transaction, inst: Instance, row: Row) -> None:
    """Logs what happens to an instance as a whole."""
    bound = tx.scheduler.bound.get(inst.workflow)
    error = " " + cell(brief(decode(row.data or "")), "error") if row.type == "errored" else ""
    changes.debug("%s %s: %s%s", bound.name if bound else "", inst.id, row.type, error)


# The page. It asks the REST API, and makes elements of what that says, never HTML of text.

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Workflows</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --soft: #8882; --ok: light-dark(#1a7f37, #3fb950);
  --bad: light-dark(#cf222e, #ff7b72); --run: light-dark(#0969da, #58a6ff);
  --idle: light-dark(#8250df, #bc8cff); --undo: light-dark(#9a6700, #d29922) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem }
* { overflow-wrap: anywhere } a { color: var(--run) } b { color: var(--bad) } i { min-width: 3px }
table { width: 100%; border-spacing: 0 } th, small { font-weight: 400; opacity: .7 }
th, time, .chip { overflow-wrap: normal } td + td { min-width: 3.6em }
td, th { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--soft) }
button, input, textarea { font: inherit; margin: 2px } label { display: block }
.chip { border: 1px solid; border-radius: 6px; padding: 0 8px; color: var(--c); margin: 2px;
  display: inline-block; white-space: nowrap }
pre { background: var(--soft); padding: 8px; overflow: auto; white-space: pre-wrap }
.row { display: grid; grid-template-columns: minmax(6rem, 14rem) 1fr 5rem; gap: 10px; width: 100%;
  text-align: left; background: none; border: 0; border-bottom: 1px solid var(--soft) }
.track { position: relative; height: 24px } .bar { position: absolute; top: 6px; height: 12px;
  border-radius: 2px; background: var(--c); box-sizing: border-box } .whole { opacity: .4 }
.complete, .true { --c: var(--ok) } .errored, .false { --c: var(--bad) } .step { --c: gray }
.running, .null { --c: var(--run) } .waiting, .sleep, .waitForEvent { --c: var(--idle) }
.paused, .waitingForPause, .terminated, .rollingBack, .rollback .bar { --c: var(--undo) }
@media (max-width: 40rem) { .row { grid-template-columns: 1fr 5rem } .track { grid-area: 2/1/2/3 } }
</style><b role="status"></b><main></main>
<script nonce="NONCE">
const API = "/client/v4/accounts/local/workflows", $ = encodeURIComponent, chosen = new Set();
const fault = document.querySelector("b"), pretty = value => JSON.stringify(value, null, 2);
let main = document.querySelector("main"), stretched = false;

function h(tag, properties, ...children) { // An element. What is text stays text.
  const node = Object.assign(document.createElement(tag), properties);
  return node.append(...children.flat(9).filter(child => child || child === 0)), node;
}
async function api(path, method = "GET", body) {
  const headers = { Authorization: "Bearer " + sessionStorage.getItem("token") };
  const answer = await fetch(API + path, { method, headers, body }), said = await answer.json();
  if (said.success) return said;
  if (answer.status === 401 && !document.querySelector("dialog"))
    ask("Token", given => sessionStorage.setItem("token", given.token), { token: "" });
  throw new Error(said.errors[0].message.replace("workflows.api.error.", ""));
}
function ask(title, act, fields = {}) { // A dialog, which stays open as long as the act fails.
  const problem = h("b", { role: "alert" }), inputs = Object.entries(fields).map(([name, value]) =>
    h(value ? "textarea" : "input", { name, value, autocomplete: "off" }));
  const dialog = h("dialog", { onclose: () => dialog.remove() }, h("h3", {}, title), h("form", {
    onsubmit: event => {
      event.preventDefault();
      Promise.resolve(Object.fromEntries(inputs.map(input => [input.name, input.value]))).then(act)
        .then(() => (dialog.close(), draw()), error => problem.textContent = error.message);
    } }, inputs.map(input => h("label", {}, input.name, h("br"), input)), h("button", {}, "OK"),
    h("button", { type: "button", onclick: () => dialog.close() }, "Cancel")), problem);
  document.body.append(dialog), dialog.showModal();
}
const button = ([label, ...rest]) => h("button", { id: label, onclick: () => ask(...rest) }, label);
const link = (href, text, className = "") => h("a", { href, id: href, className }, text);
const chip = status => h("span", { className: "chip " + status }, status);
const chips = w => Object.entries(w.instances).map(([status, n]) => n ?
  [link(`#/${$(w.name)}?status=${status}`, `${n} ${status}`, "chip " + status), " "] : null);
const block = (title, text) => [h("h3", {}, title), h("pre", { tabIndex: 0, id: title }, text)];
const typed = text => (JSON.parse(text), text); // as it was typed: its numbers keep their digits
const failure = error => error && `${error.name}: ${error.message}`;
const time = text => text && h("time", { title: text }, new Date(text).toLocaleString());
const table = (heads, rows) => h("table", {}, [heads.map(text => h("th", {}, text)),
  ...rows.map(row => row.map(cell => h("td", {}, cell ?? "–")))].map(row => h("tr", {}, row)));
const UNITS = [[864e5, "d"], [36e5, "h"], [6e4, "min"], [1e3, "s"]];
function took(start, end, ms = (Date.parse(end) || Date.now()) - Date.parse(start)) {
  const [size, unit] = UNITS.find(([size]) => ms >= size) ?? [1, "ms"];
  return `${+(ms / size).toFixed(1)}\xa0${unit}`;
}
async function workflows() {
  return table(["Name", "Instances", "Last created"], (await api("?per_page=100")).result.map(w => [
    [link("#/" + $(w.name), w.name), " ", h("small", {}, w.class_name, w.schedules.map(s =>
      [", ", s.cron, " next ", time(s.next_instance)]))], chips(w), time(w.triggered_on)]));
}
async function instances(name, query = "") {
  const path = "/" + $(name), { result: w } = await api(path), asked = new URLSearchParams(query);
  const { result, result_info: info } = await api(`${path}/instances?${query}`);
  const go = (page, text) => (asked.set("page", page), link(`#${path}?${asked}`, text));
  return [h("h2", {}, name, " ", chip(asked.get("status") ?? "all")),
    button(["Create…", "Create an instance", ({ params, id }) => api(path + "/instances", "POST",
      `{"params": ${typed(params)}, "id": ${pretty(id || null)}}`), { params: "{}", id: "" }]),
    button(["Delete all…", "Delete all its instances?", () => api(path, "DELETE")]),
    h("p", {}, link("#" + path, "all", "chip"), " ", chips(w)),
    table(["Instance", "Status", "Created", "Took"], result.map(it => [link(`#${path}/${$(it.id)}`,
      it.id), chip(it.status), time(it.created_on), took(it.created_on, it.ended_on)])),
    h("p", {}, info.page > 1 ? go(info.page - 1, "← newer") : "", ` page ${info.page} of ${
      info.total_pages} `, info.page < info.total_pages ? go(info.page + 1, "older →") : "")];
}
async function instance(name, id) {
  const path = `/${$(name)}/instances/${$(id)}`, { result: it } = await api(path);
  const steer = (status, more) => () => api(path + "/status", "PATCH", pretty({ status, ...more }));
  const is = (...statuses) => statuses.includes(it.status), live = it.success === null;
  return [h("h2", {}, id, " ", chip(it.status)), [
    is("running", "waiting", "queued") && ["Pause…", "Pause it?", steer("pause")],
    is("paused", "waitingForPause") && ["Resume…", "Go on with it?", steer("resume")],
    live && ["Send event…", "Send an event", given => api(`${path}/events/${$(given.type)}`, "POST",
      typed(given.payload)), { type: "", payload: "{}" }],
    live && ["Terminate…", "Stop it for good?", steer("terminate")],
    live && ["Roll back…", "Undo its steps, then stop it?", steer("terminate", { rollback: true })],
    ["Restart…", "Forget its steps, and begin again?", steer("restart")],
    ["Delete…", "Delete it?", () => api(path, "DELETE").then(() => location.hash = "/" + $(name))],
  ].filter(Boolean).map(button), table(["Created", "Took", "Trigger", "Rollback"], [[
    time(it.queued), took(it.queued, it.end), it.schedule?.cron ?? it.trigger.source,
    it.rollback?.outcome]]), it.error && block("Error", failure(it.error)), timeline(it, steer),
    it.success && block("Output", pretty(JSON.parse(it.output))),
    block("Params", pretty(it.params))];
}
function timeline(it, steer) { // A row for each step: what it did, from left to right.
  const now = Date.parse(it.end) || Date.now(), at = text => Math.min(Date.parse(text) || now, now);
  const steps = it.steps.filter(step => step.name), places = new Map();
  const parts = [{ start: it.queued }, ...steps.flatMap(step => [step, ...step.attempts ?? []])];
  const moments = parts.flatMap(part => [at(part.start), at(part.end)]).sort((a, b) => a - b);
  let whole = 0;
  moments.forEach((moment, n) => {
    const gap = moment - (moments[n - 1] ?? moment);
    places.set(moment, whole += stretched ? Math.log1p(gap) : gap);
  });
  const percent = text => 100 * places.get(at(text)) / (whole || 1);
  const bar = (part, kind) => h("i", { className: "bar " + kind, style: `left: min(${percent(
    part.start)}%, 100% - 3px); width: ${percent(part.end) - percent(part.start)}%` });
  return [h("h3", {}, "Steps"), h("label", {}, h("input", { type: "checkbox", checked: stretched,
    id: "stretch", onchange: () => (stretched = !stretched, draw()) }), "shorten long waits"),
    steps.map((step, n) => [h("button", { className: "row", id: "step" + n, ariaExpanded:
      chosen.has(n), onclick: () => (chosen.delete(n) || chosen.add(n), draw()) },
    h("span", {}, step.type === "rollback" ? "↶ " : "", step.name),
    h("span", { className: "track " + step.type }, bar(step, "whole " + step.type),
      (step.attempts ?? []).map(attempt => bar(attempt, attempt.success))),
    h("small", {}, took(0, 0, at(step.end) - at(step.start)))),
    chosen.has(n) ? details(step, steer) : null])];
}
function details(step, steer) {
  const [, name, count] = step.name.match(/(.*)-(\d+)$/s), type = step.type.replace("step", "do");
  return [table(["#", "Began", "Took", "Error"], (step.attempts ?? [step]).map((part, n) => [
    n + 1, time(part.start), part.finished ?? part.end ? took(part.start, part.end) : null,
    failure(part.error)])), h("p", {}, h("small", {}, step.type, [step.event_type,
    pretty(step.config), step.finished === false && ["until ", time(step.end)],
    step.retry_at && ["again at ", time(step.retry_at)]].map(part => part && [" · ", part]))),
    step.output && h("pre", {}, step.output), type !== "rollback" && button(["Restart from here…",
      "Begin again from here?", steer("restart", { from: { name, count: +count, type } })])];
}
async function draw() {
  const { hash } = location, [path, query] = hash.slice(2).split("?");
  try {
    const [name, id] = path.split("/").map(decodeURIComponent), focus = document.activeElement.id;
    const view = await (id ? instance(name, id) : name ? instances(name, query) : workflows());
    const up = name && [" / ", link("#/" + $(name), name)];
    const next = h("main", {}, link("#/", "Workflows"), up, view);
    fault.textContent = "";
    if (hash === location.hash && !next.isEqualNode(main)) main.replaceWith(main = next);
    const same = focus && (document.getElementById(focus) ?? main.querySelector("button"));
    if (same) same.focus({ preventScroll: true });
  } catch (error) { fault.textContent = error.message; }
}
onhashchange = () => (chosen.clear(), draw());
setInterval(() => document.hidden || getSelection().toString() || draw(), 2000);
draw();
</script>
"""


# --------------------------------------------------------------------------------------------------
# Demo: a workflow whose process is killed in the middle, and goes on in another one.


class _MyWorkflow(WorkflowEntrypoint[dict[str, str]]):
    """The Quick Start of Cloudflare's documentation, with a retry and an approval."""

    async def run(self, event: WorkflowEvent[dict[str, str]], step: WorkflowStep) -> Any:
        async def fetch() -> dict[str, Any]:
            return {"id": event.payload["userId"], "process": os.getpid()}

        user = await step.do("fetch user", fetch)
        await step.sleep("wait before processing", "1 second")

        async def process(ctx: WorkflowStepContext) -> dict[str, Any]:
            if ctx.attempt == 1:
                await asyncio.sleep(0.5)  # until the timeline up to here is printed
                os.kill(os.getpid(), 9)  # SIGKILL
            return {"processed": True, "user": user["id"], "process": os.getpid()}

        once_more = {"retries": {"limit": 3, "delay": "1 second"}}
        result = await step.do("process action", once_more, process)
        approval = await step.wait_for_event("wait for approval", "user_approval", timeout="7 days")
        return result | {"approved": approval.approved}


async def run_demo(database: str) -> int:
    """What both processes of the demo do: create the instance, or go on with it, to the end."""
    print(f"process {os.getpid()} runs the workflow …\n", flush=True)
    async with Engine(database) as engine:
        workflow = engine.bind(_MyWorkflow)
        await workflow.create_batch([{"id": "demo", "params": {"userId": "123"}}])  # only once
        instance = await workflow.get("demo")
        events: list[WorkflowHistoryEvent] = []
        async for event in instance.subscribe():
            events.append(event)
            print_event(event, events[0].timestamp)
            if event.type == "wait_started":
                await instance.send_event(type="user_approval", payload={"approved": True})
        print(f"\noutput: {to_text(await instance.result())}")
        runs = Counter(event.step_name for event in events if event.type == "step_completed")
        print(*(f"finished {count} time: {label}" for label, count in runs.items()), sep="\n")
    return 0 if set(runs.values()) == {1} else 1  # no finished step ran again


def demo(given: argparse.Namespace) -> int:
    """Runs a workflow in a process that is killed, and then in another one. Returns the exit
    code."""
    if given.engine:
        return asyncio.run(run_demo(given.engine))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "demo", "--engine", os.path.join(folder, "demo.db")]
        if (code := subprocess.run(command).returncode) not in (-9, 9):  # on Windows it is 9
            return code
        print("\nit was killed (SIGKILL) in the middle; another one goes on …\n", flush=True)
        return subprocess.run(command).returncode


# --------------------------------------------------------------------------------------------------
# Command line: the resources for somebody at a terminal, in the words of `wrangler workflows`. All
# commands but `dev`, which runs an engine, are clients of the database, whether or not an engine
# runs on it, and need no classes.
#
# developers.cloudflare.com/workers/wrangler/commands/workflows/

_PAGE, _DATES = "--page= --per-page=", "--date-start= --date-end="
_FROM = "--from-step-name= --from-step-count= --from-step-type="
_SHOW = "--step-output --no-step-output --truncate-output-limit=5000 --follow"
# By name: what it does; its arguments, of which those with a `=` have that default, and of those
# with a `*` there may be any number; and the resource.
_COMMANDS: dict[str, tuple[str, str, Callable[[Request], Any]]] = {
    "list": ("list the workflows", _PAGE, show_workflows),
    "describe": ("describe a workflow", "name", show_workflow),
    "trigger": ("create an instance", "name params={} --id=", add_instance),
    "delete": ("delete all instances of a workflow", "name", drop_workflow),
    "instances list": ("list some", f"name {_PAGE} {_DATES} --status= --reverse", show_instances),
    "instances describe": ("show one and its steps", f"name id=latest {_SHOW}", show_instance),
    "instances send-event": ("send it an event", "name id --type= --payload={}", send),
    "instances pause": ("stop it for a while", "name id", steer),
    "instances resume": ("let it go on", "name id", steer),
    "instances restart": ("begin again, from a step or all", f"name id {_FROM}", steer),
    "instances terminate": ("stop it for good", "name id --rollback", steer),
    "instances delete": ("delete some", "name ids* --filename=", drop_instances),
    "usage": ("show what this month would cost at Cloudflare", "", show_usage),
    "check": ("ask whether instances would go on with the code of now", "names*", ignore),
    "dev": ("run workflows", "--ip=127.0.0.1 --port=8787 --token= --drain=", ignore),
    "demo": ("kill a workflow's process, and see another go on", "--engine=", ignore),
}
_LISTED = {"list": "name class_name triggered_on instances"}
_LISTED |= {"instances list": "id status created_on ended_on trigger_source"}
_FACTS = "id status queued start end trigger schedule params output error rollback"
_COLOURS = {"complete": 32, "✓": 32, "errored": 31, "✗": 31, "running": 36, "●": 36, "waiting": 34}
_COLOURS |= dict.fromkeys(("paused", "waitingForPause", "terminated", "rollingBack"), 33)
_BARS = {True: "█", False: "▒", None: "▓", "sleep": "─", "waitForEvent": "╌"}  # see `draw_bar`


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says in one line what is wrong."""
        self.exit(2, f"{self.prog}: {message}\n")


def natural(text: str) -> int:
    """A number of the command line, from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{show(text)}: expected a whole number from 0")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--db", metavar="FILE", help="the database (default: workflows.db)")
    common.add_argument("--config", metavar="FILE", help="of dev and check (wrangler.jsonc, …)")
    common.add_argument("--json", action="store_true", help="for programs")
    root = Parser(prog="workflows.py", description="Durable workflows.", parents=[common])
    groups = {"": root.add_subparsers(metavar="COMMAND")}
    for command, (help, words, _) in _COMMANDS.items():
        group, _, verb = command.rpartition(" ")
        if group not in groups:
            parser = groups[""].add_parser(group, help=f"list, describe, steer and delete {group}")
            parser.set_defaults(parser=parser)
            groups[group] = parser.add_subparsers(metavar="COMMAND")
        parser = groups[group].add_parser(verb, help=help, description=help, parents=[common])
        parser.set_defaults(command=command)
        for word in words.split():
            name, equals, default = word.partition("=")
            kind = natural if default.isdecimal() else str  # of the default, too
            more: dict[str, Any] = {"type": kind, "default": default or None}
            if not name.startswith("--"):
                more["nargs"] = "*" if name.endswith("*") else "?" if equals else None
            elif not equals:
                more = {"action": "store_true"}
            parser.add_argument(name.removesuffix("*"), **more)
    defaults = {"parser": root, "command": None, "db": "workflows.db", "config": None}
    return root.parse_args(arguments, argparse.Namespace(**defaults, json=False))


def width_of(text: str) -> int:
    """How many columns of a terminal it takes."""
    wide = [c for c in text if unicodedata.east_asian_width(c) in "WF"]
    return len(text) + len(wide) - len([c for c in text if unicodedata.combining(c)])


def fit(text: str, width: int) -> str:
    """Text, cut or filled to a width, and without what a terminal might obey."""
    text = "".join(c if c.isprintable() else "·" for c in text[: width + 1])
    while (excess := width_of(text) - width) > 0:
        text = text.removesuffix("…")[: -max(1, excess // 2)] + "…"
    return text + " " * (width - width_of(text))


def room() -> int:
    """How many columns the terminal has, but some at least; as many as can be used, if there is
    none."""
    return max(20, shutil.get_terminal_size((10_000, 24)).columns)


def paint(text: str) -> str:
    """A word in its colour, if it has one and somebody is looking."""
    code = None if os.environ.get("NO_COLOR") else _COLOURS.get(text.strip())
    return f"\033[{code}m{text}\033[0m" if code and sys.stdout.isatty() else text


def cell(value: Any, name: str = "") -> str:
    """The field of that name in one line."""
    if name == "error" and value is not None:
        return f"{value['name']}: {value['message']}"
    if name == "instances":
        return ", ".join(f"{n} {status}" for status, n in value.items() if n) or "none"
    return value if isinstance(value, str) else "–" if value is None else to_text(value)


def print_table(rows: list[list[str]]) -> None:
    """In columns, of which the last one takes what is left of the terminal."""
    widths = [max(map(width_of, column)) for column in zip(*rows, strict=True)]
    widths[-1:] = [max(10, room() - sum(widths[:-1]) - 2 * len(widths))]
    for row in rows:
        print("  ".join(paint(fit(*pair)) for pair in zip(row, widths, strict=True)).rstrip())


def print_timeline(shown: dict[str, Any], given: argparse.Namespace) -> None:
    """An instance, with a bar for each of its steps: time goes from left to right."""
    began, now = _ms(shown["queued"]), _ms(shown["end"]) or time.time_ns() // 1_000_000
    print_table([[n, cell(shown[n], n)] for n in _FACTS.split() if shown[n] is not None])
    rows = []
    for step in [step for step in shown["steps"] if "name" in step]:
        tried = step.get("attempts", [step])
        ms = min(_ms(step["end"]) or now, now) - _ms(step["start"])
        took = f"{ms / 1000:.3f} s" if ms < 60_000 else str(timedelta(seconds=ms // 1000))
        notes = [cell(part["error"], "error") for part in tried if part["error"]]
        notes += [f"again at {step['retry_at']}"] if step.get("retry_at") else []
        notes += [f"until {step['end']}"] if _ms(step["end"]) > now and not shown["end"] else []
        notes += [cell(step["output"])] if not given.no_step_output and step.get("output") else []
        mark = {True: "✓", False: "✗", None: "●"}[step["success"]]
        name = ("↶ " if step["type"] == "rollback" else "") + step["name"]
        name = fit(name, min(width_of(name), room() // 3))
        bar = draw_bar(step, began, now, min(40, room() // 3))
        rows.append([mark, name, bar, took, "; ".join(notes)[: given.truncate_output_limit]])
    print_table(rows)


def _ms(text: str | None) -> int:
    return 0 if text is None else parse_moment(datetime.fromisoformat(text))


def draw_bar(step: dict[str, Any], began: int, now: int, width: int) -> str:
    """When a step did what. (Between the attempts are the retry delays.)"""
    cells, whole = [" "] * width, max(1, now - began)
    parts = [(step, _BARS.get(step["type"], "·"))]
    parts += [(attempt, _BARS[attempt["success"]]) for attempt in step.get("attempts", [])]
    for part, character in parts:
        times = _ms(part["start"]), min(_ms(part["end"]) or now, now)
        first, last = (min((ms - began) * width // whole, width - 1) for ms in times)
        cells[first : last + 1] = character * (last + 1 - first)
    return "".join(cells)


def print_event(event: WorkflowHistoryEvent, began: datetime) -> None:
    """What has happened to an instance, in one line."""
    names = ("attempt", "error", "retryDelayMs", "output")
    told = [f"{n}: {cell(event[n], n)}" for n in names if event.get(n) is not None]
    at, step = (event.timestamp - began).total_seconds(), fit(event.get("step_name", ""), 25)
    print(fit(f"{at:7.3f} s  {step}{event.type:20}{', '.join(told)}", room()).rstrip(), flush=True)


async def make_request(engine: Engine, given: argparse.Namespace) -> Request:
    """What a command asks for."""
    options, verb = vars(given), given.command.split()[-1]
    query = {n: str(v) for n, v in options.items() if v is not None and v is not False}
    ask = Request(engine, query.get("name"), type=query.get("type", ""), query=query)
    ids = [*options.get("ids", [query.get("id", "")])]
    if "filename" in query:
        with naming(given.filename):
            more = json.loads(Path(given.filename).read_text())
        _check(more, list, given.filename)
        ids += more
    if "latest" in ids and verb != "trigger":
        async for newest in (await engine.workflow(given.name)).list(limit=1):
            ids = [newest.id if id == "latest" else id for id in ids]
    data = "payload" if verb == "send-event" else "params"
    with naming(data):
        value = json.loads(query.get(data, "{}"))
    start: dict[str, Any] = {n[10:]: query[n] for n in query if n.startswith("from_step_")}
    if "count" in start:
        with naming("--from-step-count"):
            start["count"] = int(start["count"])
    body = {"status": verb, "rollback": options.get("rollback"), "from": start or None}
    sent = {"trigger": {"id": query.get("id"), "params": value}, "send-event": value}
    sent["delete"] = {"instances": ids}
    ask.id, ask.body = ids[0] if ids else "", sent.get(verb, body)
    if sys.stderr.isatty():
        ask.progress = lambda done: print(f"\r{done} … ", end="", file=sys.stderr, flush=True)
    return ask


async def run_command(given: argparse.Namespace) -> int:
    """Carries out a command that needs nothing but the database. Returns the exit code."""
    async with Engine(given.db) as engine:
        ask = await make_request(engine, given)
        answer = await ask.answer(_COMMANDS[given.command][2])
        answer = answer[::-1] if "reverse" in ask.query else answer
        if given.json:
            print(to_text(answer, 2))
        elif given.command == "instances describe":
            print_timeline(answer, given)
        elif ask.info:
            names = _LISTED[given.command].split()
            print_table([names, *([cell(row[name], name) for name in names] for row in answer)])
            print("page {page} of {total_pages}, {total_count} in all".format(**ask.info))
        else:
            print_table([[name, cell(value, name)] for name, value in answer.items()])
        if "follow" in ask.query:
            async for event in ask.instance.subscribe(ask.seen):
                if given.json:
                    print(to_text(dict(event)), flush=True)
                else:
                    print_event(event, datetime.fromisoformat(answer["queued"]))
    if isinstance(answer, dict) and (failed := answer.get("errors")):
        raise ValueError(f"no instance {', '.join(show(error['id']) for error in failed)}")
    return 0


async def check(given: argparse.Namespace) -> int:
    """Replays the unfinished instances of a configuration's workflows, or of some of these, and
    tells which would not go on as recorded. Returns the exit code."""
    with contextlib.redirect_stdout(sys.stderr):  # what `run` prints
        engine = Engine.from_config(given.config, database=given.db)
        # Here they are known, but not in the database: a process that binds wants to be its owner.
        bound, engine._workflows = engine._workflows, {}
        if unknown := [name for name in given.names if name not in bound]:
            raise ValueError(f"no workflow {unknown[0]!r}: expected some of {', '.join(bound)}")
        checked, told = 0, []
        async with engine:
            for row in await engine.call(read_workflows, None):
                count = sum(n for status, n in row["instances"].items() if status not in FINISHED)
                if row["name"] in (given.names or bound):
                    async for report in bound[row["name"]].replay_all():
                        checked += 1
                        if not report.safe or (report.error and report.outcome == "waiting"):
                            told.append({"workflow": row["name"], **dataclasses.asdict(report)})
                elif count and not given.names:
                    what = f"{row['name']} has {count} unfinished instances"
                    raise ValueError(f"{what}, and the configuration has no such workflow")
    unsafe = len([found for found in told if not found["safe"]])
    if given.json:
        print(to_text({"checked": checked, "unsafe": unsafe, "instances": told}, 2))
    else:
        for found in told:
            line = f"{found['workflow']} {found['instance_id']}: {verdict(found)}"
            print(fit(line, room()).rstrip())
        print(f"{unsafe} of {checked} unfinished instances would not go on as recorded")
    return 1 if unsafe else 0


def verdict(report: dict[str, Any]) -> str:
    """What a replay has found wrong."""
    said = {"no longer reached": report["unreached"], "new before these": report["early"]}
    if report["error"]:
        key = "run would raise" if report["outcome"] == "errored" else "replay stopped"
        said[key] = [cell(report["error"], "error")]
    return "; ".join(f"{what}: {', '.join(told)}" for what, told in said.items() if told)


async def dev(given: argparse.Namespace) -> int:
    """Runs the workflows of a configuration, and answers HTTP, until a signal comes."""
    if given.token == "":
        raise ValueError("--token is empty: expected a secret")
    token = given.token or os.environ.get("WORKFLOWS_API_TOKEN") or None
    host = f"[{given.ip}]" if ":" in given.ip else given.ip
    if token is None and not _LOCAL_HOST.fullmatch(host):
        raise ValueError(f"{given.ip} can be reached from outside: that needs --token")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    changes.setLevel(logging.DEBUG)
    drain = "0" if given.drain is None else given.drain
    drain = int(drain) if drain.isdecimal() else drain
    engine = Engine.from_config(given.config, database=given.db, drain=drain)
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stopped.set)  # which wakes a loop that sleeps
        except NotImplementedError:  # Windows: there, each signal does
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stopped.set))
    async with engine, serve(engine, given.ip, given.port, token) as server:
        print(f"{engine.path}: http://{host}:{server.server_address[1]}/", flush=True)
        await stopped.wait()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0; 1 if `check` has found something, or nobody
    reads; 2 if what was asked can't be done; 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # it may not know all characters
    given = parse_arguments(arguments)
    log.addHandler(logging.NullHandler())  # a refusal is one line
    if given.command is None:
        given.parser.print_help()
        return 0
    run = {"dev": dev, "check": check}.get(given.command, run_command)
    try:
        made = given.command in ("dev", "demo") and given.db != ""
        if not made and not os.path.exists(given.db):
            raise ValueError(f"there is no database {given.db!r}: give --db, or start dev")
        code = demo(given) if given.command == "demo" else asyncio.run(run(given))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (WorkflowError, ValueError, OSError, RecursionError) as error:
        print(f"workflows.py: {fit(str(error), 1000).rstrip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    # As a module, so that there is one copy of it: what it loads imports it, too.
    sys.exit(importlib.import_module(__spec__.name if __spec__ else Path(__file__).stem).main())
