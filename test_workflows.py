# SPDX-License-Identifier: MIT
"""The executable specification of workflows.py: classes in the order of its sections, and test
names that state a rule. Time is moved (`ManualClock`), not waited for; processes that are killed
are real.

    python3 -m unittest                    the tests
    python3 test_workflows.py bench        the figures
    python3 test_workflows.py crashes      a process killed at each commit
    python3 test_workflows.py fuzz [seed]  100,000 bad values
    python3 test_workflows.py load [hours] mixed work, by a fast clock
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import collections
import contextlib
import contextvars
import copy
import dataclasses
import enum
import functools
import gc
import http
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import tracemalloc
import types
import unittest
import unittest.mock
import urllib.error
import urllib.parse
import uuid
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import workflows
from workflows import (
    Clock,
    Engine,
    Limits,
    ManualClock,
    NonRetryableError,
    WorkflowEntrypoint,
    WorkflowError,
    WorkflowFatalError,
    WorkflowInternalError,
    WorkflowTimeoutError,
    parse_duration,
)

logging.getLogger("workflows").setLevel(logging.CRITICAL)  # tests that want a warning ask for it


FOREVER = dataclasses.replace(Limits(), success_retention=None, error_retention=None)


def setUpModule() -> None:
    # A shell starts in the background what ignores SIGINT, and so would our child processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Where each callback comes from is what costs most in asyncio's debug mode, and nobody asks.
    asyncio.constants.DEBUG_STACK_DEPTH = 1


def workflow(run: Callable[..., Any], name: str = "Test") -> type[WorkflowEntrypoint[Any]]:
    """A workflow class made of `async def run(event, step)`."""

    class Made(WorkflowEntrypoint[Any]):
        async def run(self, event: Any, step: Any) -> Any:
            return await run(event, step)

    Made.__name__ = name
    return Made


async def value(result: Any = None) -> Any:
    """An async callback's body: `lambda: value(5)` is a plain callback that returns an
    awaitable."""
    return result


class Case(unittest.IsolatedAsyncioTestCase):
    """A database in a folder of its own, a clock that is moved by hand, and engines on both."""

    # What is about logic does not wait for a disk. (`Real` does.)
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    # asyncio's debug mode, which finds calls from a wrong thread, takes as long as the tests
    # themselves: some classes, in which threads have a part, are enough.
    debug = False

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(dir=self.where)
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.path = str(self.folder / "test.db")
        # What a busy machine holds up gets its time; a test whose callbacks never end is impatient.
        self.clock = ManualClock(patience="20 seconds")

    async def asyncSetUp(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_debug(self.debug)
        loop.slow_callback_duration = 60  # no report of a busy machine

    @contextlib.asynccontextmanager
    async def engine(self, **options: Any) -> Any:
        options = {"clock": self.clock, "limits": FOREVER} | options
        async with Engine(self.path, **options) as engine:
            yield engine

    async def outcome(self, run: Callable[..., Any], params: Any = None, **options: Any) -> Any:
        """What a workflow made of `run` returns or raises, as time goes by."""
        async with self.engine(**options) as engine:
            instance = await engine.bind(workflow(run)).create(params=params)
            return await self.finish(instance)

    async def finish(self, instance: Any) -> Any:
        """The result of an instance, with the clock moved as far as it takes (a year at most)."""
        step = 0
        while (await instance.status()).status not in workflows.FINISHED and step < 2**38:
            await self.clock.advance(step)
            step = step * 2 or 1000
        return await instance.result(timeout=0)

    async def assertCode(self, code: str, awaitable: Any) -> WorkflowError:
        with self.assertRaises(WorkflowError) as caught:
            await awaitable
        self.assertEqual(caught.exception.code, code)
        return caught.exception

    def rows(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        """What stands in the database, as another process reads it."""
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            return db.execute(sql, args).fetchall()


@contextlib.contextmanager
def grace(seconds: float) -> Any:
    """With so much real time for cancelled code to end, instead of a second."""
    with unittest.mock.patch.object(workflows, "GRACE", seconds):
        yield


@contextlib.contextmanager
def in_zone(name: str) -> Any:
    """With another local time."""
    with unittest.mock.patch.dict(os.environ, TZ=name):
        time.tzset()
        try:
            yield
        finally:
            os.environ.pop("TZ")
            time.tzset()


ONCE = {"retries": {"limit": 0}}


def constant(limit: float, delay: Any = 1, **more: Any) -> dict[str, Any]:
    """A config with so many retries, always so far apart."""
    return {"retries": {"limit": limit, "delay": delay, "backoff": "constant"}} | more


def returns(result: Any) -> Callable[..., Any]:
    """An async callback, for `step.do`."""

    async def callback() -> Any:
        return result

    return callback


def raises(error: BaseException) -> Callable[..., Any]:
    async def callback() -> Any:
        raise error

    return callback


async def caught(awaitable: Any) -> BaseException:
    """The error of a step call, for a look at it in `run`."""
    try:
        await awaitable
    except Exception as error:
        return error
    raise AssertionError("no error was raised")


class InSlots(Exception):
    __slots__ = ("unset", "x", "y")


class Attributes(Exception):
    """A user's error: its own `__init__`, and attributes of all kinds."""

    made = 0

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"{number} {text}")
        Attributes.made += 1
        self.number, self.text, self.bad = number, text, {1, 2}


class Careless(WorkflowError):
    def __init__(self, number: int) -> None:
        self.number = number


class Response:
    """What no step can store."""

    status = 404


class FromResponse(ConnectionError):
    """As aiohttp's `ClientResponseError`: its text needs the response."""

    def __init__(self, response: Response) -> None:
        self.response, self.retry_after = response, 5

    def __str__(self) -> str:
        return f"the server answered {self.response.status}"


class Statement(Exception):
    """As SQLAlchemy's `IntegrityError`: its text needs some attributes and changes with others."""

    def __init__(self, text: str, statement: Any) -> None:
        super().__init__(text)
        self.statement, self.details, self.code = statement, ["d"], 7

    def __str__(self) -> str:
        shown = f" [{self.statement.status}]" if hasattr(self, "statement") else ""
        return f"{self.args[0]}{shown}{self.details and ''}"


class Delegating(Exception):
    """As `HTTPError`: any attribute that it lacks is looked up in one that can't be stored."""

    def __init__(self, file: Any) -> None:
        super().__init__("delegating")
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["file"], name)


class Herd(ExceptionGroup):
    def __str__(self) -> str:
        return f"kept by {self.shepherd.status}"


class OnlyItsOwnCode(ValueError):
    """As pydantic's `ValidationError`: made by a `__new__` of its own."""

    def __new__(cls, title: str, lines: list[str]) -> OnlyItsOwnCode:
        return super().__new__(cls, title, lines)

    def __init__(self, title: str, lines: list[str]) -> None:
        super().__init__(f"{title}: {len(lines)} errors")


class Odd(RuntimeError):
    """Tests give it methods that fail."""


class Both(ValueError, OSError):
    """Its objects are made by its second base."""


class Frozen(Exception):
    """As a frozen dataclass."""

    def __init__(self, code: int) -> None:
        self.__dict__["code"] = code

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot assign to field {name!r}")


class Stop(SystemExit, ValueError):
    """An error, but also the end of the process."""


class Lives(Case):
    """`lives` runs an instance and then replays it, in another engine on the same file."""

    async def finish(self, instance: Any) -> Any:
        async with asyncio.timeout(30):  # what hangs fails
            return await super().finish(instance)

    async def lives(self, run: Callable[..., Any], count: int = 3, params: Any = None) -> Any:
        async def wrapped(event: Any, step: Any) -> Any:
            result = await run(event, step)
            for _ in range(count - 1):  # longer than `hibernate_after`
                await step.sleep("until the next life", "1 hour")
            return result

        made = workflow(wrapped)
        async with self.engine() as engine:
            await engine.bind(made).create(id="i", params=params)
            await self.clock.settle()
        async with self.engine() as engine:
            return await self.finish(await engine.bind(made).get("i"))


class Names(Case):
    def test_all_lists_the_public_names(self):
        expected = """Clock Engine InstanceStatus Limits ManualClock NonRetryableError Workflow
            WorkflowEntrypoint WorkflowError WorkflowEvent WorkflowFatalError WorkflowInstance
            WorkflowInternalError WorkflowStep WorkflowTimeoutError parse_duration"""
        self.assertLessEqual(set(expected.split()) - {"Clock"}, set(workflows.__all__))
        for name in workflows.__all__:
            self.assertTrue(hasattr(workflows, name), name)

    def test_the_original_spelling_works_too(self):
        for cls, alias, name in (
            (workflows.Workflow, "createBatch", "create_batch"),
            (workflows.WorkflowInstance, "sendEvent", "send_event"),
            (workflows.WorkflowStep, "sleepUntil", "sleep_until"),
            (workflows.WorkflowStep, "waitForEvent", "wait_for_event"),
        ):
            self.assertIs(getattr(cls, alias), getattr(cls, name))

    def test_errors_have_one_base_and_stable_codes(self):
        for cls in (WorkflowTimeoutError, WorkflowFatalError, workflows.WorkflowInternalError):
            self.assertTrue(issubclass(cls, WorkflowError))
            self.assertEqual(cls("m").name, cls.__name__)
        error = NonRetryableError("m", "Mine")
        self.assertEqual((str(error), error.name), ("m", "Mine"))
        self.assertEqual(NonRetryableError().name, "NonRetryableError")
        self.assertEqual(str(NonRetryableError()), "")

    async def test_a_workflow_event_reads_as_attributes_and_as_a_mapping(self):
        async def run(event, step):
            with self.assertRaises(dataclasses.FrozenInstanceError):
                event.payload = 1
            self.assertEqual(event["payload"], event.get("payload"))
            self.assertEqual(event["instanceId"], event.instance_id)
            self.assertEqual(event["workflowName"], event.workflowName)
            self.assertIsNone(event.get("nothing"))
            return [*event], event.instanceId, event.workflow_name, event.timestamp

        async with self.engine() as engine:
            now = self.clock.now()
            instance = await engine.bind(workflow(run, "MyTest")).create(id="i")
            keys, *rest, created = await self.finish(instance)
        self.assertEqual(keys, ["payload", "timestamp", "instanceId", "workflowName"])
        self.assertEqual(rest, ["i", "my-test"])
        self.assertEqual(created, datetime.fromtimestamp(now / 1000, UTC))

    async def test_a_status_reads_as_attributes_and_as_a_mapping(self):
        async with self.engine() as engine:
            made = engine.bind(workflow(lambda event, step: value(7)))
            instance = await made.create()
            await self.finish(instance)
            status = await instance.status()
        self.assertEqual((status.status, status["output"], status.error), ("complete", 7, None))
        nothing = {"error": None, "rollback": None}
        self.assertEqual(dict(status), {"status": "complete", "output": 7} | nothing)

    async def test_env_reads_as_attributes_and_as_a_mapping_and_holds_the_bindings(self):
        async def run(event, step):
            return None

        class Reads(WorkflowEntrypoint[Any]):
            async def run(self, event: Any, step: Any) -> Any:
                self.env.OTHER.name  # noqa: B018
                return self.env.KEY, self.env["KEY"], sorted(self.env), self.ctx is not None

        async with self.engine(env={"KEY": "v"}) as engine:
            other = engine.bind(workflow(run, "Other"))
            self.assertIs(engine.env.OTHER, other)
            instance = await engine.bind(Reads).create()
            self.assertEqual(
                await self.finish(instance), ["v", "v", ["KEY", "OTHER", "READS"], True]
            )

    async def test_bind_names_in_kebab_and_upper_snake_case(self):
        for cls, name, binding in (
            ("MyWorkflow", "my-workflow", "MY_WORKFLOW"),
            ("HTTPFetch", "http-fetch", "HTTP_FETCH"),
            ("plain", "plain", "PLAIN"),
        ):
            with self.subTest(cls):
                engine = Engine(self.path)
                self.assertEqual(engine.bind(workflow(None, cls)).name, name)
                self.assertIn(binding, engine.env)

    async def test_bind_refuses_what_is_no_workflow_or_is_taken(self):
        engine = Engine(self.path, env={"TAKEN": 1})

        class NoRun(WorkflowEntrypoint[Any]):
            pass

        for cls in (object, NoRun, 5, workflow(None)(None, None)):
            with self.assertRaises(TypeError):
                engine.bind(cls)
        engine.bind(workflow(None))
        for again in ("Test", "Taken"):
            with self.assertRaises(ValueError):
                engine.bind(workflow(None, again))
        with self.assertRaises(ValueError):
            engine.bind(workflow(None), "other", "TEST")
        for wrong in ({"name": "a b"}, {"name": "x" * 65}, {"binding": "A-B"}, {"steps": 25_001}):
            (named,) = wrong.values()
            with self.assertRaisesRegex(ValueError, str(named)):
                engine.bind(workflow(None), **({"name": "other"} | wrong))

    async def test_each_life_gets_a_new_object_of_the_class(self):
        made = []

        class Counts(WorkflowEntrypoint[Any]):
            def __init__(self, ctx: Any, env: Any) -> None:
                super().__init__(ctx, env)
                made.append(self)

            async def run(self, event: Any, step: Any) -> None:
                await step.sleep("s", "1 hour")

        async with self.engine() as engine:
            await self.finish(await engine.bind(Counts).create())
        self.assertEqual(len(set(made)), 2)

    async def test_unknown_options_are_refused_by_name(self):
        async with self.engine() as engine:
            made = engine.bind(workflow(lambda event, step: step.sleep("s", "1 day")))
            instance = await made.create()
            for call in (
                lambda: made.create(ids=1),
                lambda: made.create({"ids": 1}),
                lambda: made.create_batch([{"ids": 1}]),
                lambda: instance.send_event(type="t", ids=1),
                lambda: instance.send_event({"type": "t", "ids": 1}),
            ):
                with self.assertRaisesRegex((TypeError, ValueError), "ids"):
                    await call()

    async def test_result_times_out_by_the_engines_clock(self):
        async with self.engine() as engine:
            made = engine.bind(workflow(lambda event, step: step.sleep("s", "1 day")))
            instance = await made.create()
            waiting = asyncio.create_task(instance.result(timeout="1 hour"))
            await self.clock.advance(timedelta(minutes=59))
            self.assertFalse(waiting.done())
            await self.clock.advance("1 minute")
            with self.assertRaises(WorkflowTimeoutError):
                await waiting

    async def test_result_of_a_terminated_instance_raises(self):
        async with self.engine() as engine:
            made = engine.bind(workflow(lambda event, step: step.sleep("s", "1 day")))
            instance = await made.create()
            await instance.terminate()
            await self.assertCode("instance.terminated", instance.result())

    async def test_a_paused_instance_keeps_the_caller_of_result_waiting(self):
        async with self.engine() as engine:
            made = engine.bind(workflow(lambda event, step: step.sleep("s", "1 hour")))
            instance = await made.create()
            await self.clock.settle()
            await instance.pause()
            waiting = asyncio.create_task(instance.result())
            await self.clock.advance("1 day")
            self.assertFalse(waiting.done())
            await instance.resume()
            await self.clock.advance("1 hour")
            self.assertIsNone(await waiting)

    async def test_an_engine_that_is_not_open_refuses_calls(self):
        engine = Engine(self.path)
        made = engine.bind(workflow(lambda event, step: value()))
        with self.assertRaises(RuntimeError):
            await made.create()
        async with engine:
            instance = await made.create()
        with self.assertRaises(RuntimeError):
            await instance.status()
        with self.assertRaises(RuntimeError):
            await engine.__aenter__()

    async def test_another_loop_is_refused(self):
        async with self.engine() as engine:
            made = engine.bind(workflow(lambda event, step: value()))

            def elsewhere() -> None:
                with self.assertRaises(RuntimeError):
                    asyncio.run(made.create())

            await asyncio.to_thread(elsewhere)


class Durations(unittest.TestCase):
    def test_a_duration_is_milliseconds_a_timedelta_or_text(self):
        for given, ms in (
            (0, 0),
            (1500, 1500),
            (1500.4, 1500),
            (timedelta(seconds=1.5), 1500),
            ("1 second", 1000),
            ("0 seconds", 0),
            ("1.5 minutes", 90_000),
            ("2 hours", 7_200_000),
            ("1 days", 86_400_000),
            ("1 week", 604_800_000),
            ("1 month", 30 * 86_400_000),
            ("1 year", 365 * 86_400_000),
            ("0.0015 seconds", 2),
            ("0.1 seconds", 100),
        ):
            with self.subTest(given):
                self.assertEqual(parse_duration(given), ms)
                self.assertIs(type(parse_duration(given)), int)

    def test_anything_else_is_an_error_that_quotes_it(self):
        for given in (
            *("5 SECONDS", "3 fortnights", "5", "", " 5 seconds", "5 seconds ", "5 seconds\n"),
            *("5  seconds", "5seconds", "-5 seconds", "+5 seconds", ".5 hours", "5. hours"),
            "٥ hours",
            *("1e3 seconds", "5 ms", "second", "1,5 hours", "inf hours", "1_000 seconds"),
            *(-1, -0.5, True, False, float("nan"), float("inf"), None, b"1 hour", [1], 1j),
            *(timedelta(seconds=-1), datetime.now(UTC)),
        ):
            with self.subTest(given), self.assertRaises(ValueError) as caught:
                parse_duration(given)
            self.assertIn(repr(given), str(caught.exception))

    def test_a_naive_datetime_is_a_moment_of_local_time(self):
        for zone in ("America/New_York", "Asia/Tokyo"):
            with in_zone(zone):
                for moment in (
                    datetime(2026, 1, 2, 3, 4, 5, 678_000),
                    datetime(2026, 11, 1, 1, 30, fold=0),
                    datetime(2026, 11, 1, 1, 30, fold=1),
                ):
                    ms = workflows.parse_moment(moment)
                    self.assertEqual(ms, round(moment.timestamp() * 1000), (zone, moment))

    def test_an_unknown_unit_is_told_the_units(self):
        with self.assertRaisesRegex(ValueError, "second.*minute.*hour.*day.*week.*month.*year"):
            parse_duration("3 fortnights")


class Values(Lives):
    async def once(self, result: Any) -> Any:
        """What `await step.do` gives in `run`, in each life, without a trip through the output."""
        got = []

        async def run(event: Any, step: Any) -> None:
            got.append(await step.do("s", returns(result)))

        await self.lives(run)
        self.assertEqual([repr(each) for each in got], [repr(got[0])] * 3)
        return got[0]

    async def test_every_allowed_value_comes_back_equal_whatever_its_keys(self):
        odd = {
            "$bytes": "x",
            "$datetime": 1,
            "$fold": 2,
            "$dict": [],
            "$tuple": [3],
            "$str": "eA==",
        }
        odd |= {"": "\x00", "a.b": '"$x'}
        for given in (
            *(None, True, 0, -1, 10**4000, 1.0, -0.0, 5e-324, "", "é😀\u2028"),
            *([], {}, b"", b"\xff"),
            *([[], {}], odd),
            *({key: item} for key, item in odd.items()),
            {"$dict": {"$dict": {"$bytes": b"\x00"}}},
            datetime(2020, 1, 2, 3, 4, 5, 6, timezone(timedelta(hours=5, minutes=30))),
            *(datetime(2020, 1, 2), datetime.min, datetime.max, datetime(2026, 11, 1, 1, fold=1)),
        ):
            text, decoded = workflows.encode(given)
            with self.subTest(given):
                self.assertEqual(repr(decoded), repr(given))
                self.assertEqual(repr(workflows.decode(text)), repr(given))

    async def test_a_tuple_comes_back_a_list_also_the_first_time(self):
        self.assertEqual(await self.once({"a": (1, (2,))}), {"a": [1, [2]]})

    async def test_subclasses_of_allowed_types_come_back_as_their_base_type(self):
        class Colour(enum.IntEnum):
            RED = 1

        class Text(str, enum.Enum):  # noqa: UP042
            A = "a"

        pair = collections.namedtuple("pair", "a b")
        given = [Colour.RED, Text.A, pair(1, 2), collections.OrderedDict(a=1), bytearray(b"x")]
        got = await self.once([*given, {Text.A: collections.Counter("a")}])
        self.assertEqual(got, [1, "a", [1, 2], {"a": 1}, b"x", {"a": {"a": 1}}])
        self.assertEqual([type(item) for item in got], [int, str, list, dict, bytes, dict])
        self.assertIs(type(next(iter(got[5]))), str)

    async def test_a_time_zone_is_kept_as_its_offset(self):
        class Zone(timezone.__base__):
            def utcoffset(self, when: Any) -> timedelta:
                return timedelta(hours=2)

        got = await self.once(datetime(2020, 1, 1, tzinfo=Zone()))
        self.assertEqual(got.utcoffset(), timedelta(hours=2))
        self.assertIs(type(got.tzinfo), timezone)

    async def test_what_cannot_be_stored_fails_the_step_at_once_and_names_the_path(self):
        cycle: list[Any] = []
        cycle.append(cycle)
        deep: Any = []
        for _ in range(100_000):
            deep = [deep]
        attempts = []
        cases = (
            ({"items": [0, 1, 2, {"owner": {1}}]}, "$.items[3].owner: set"),
            (object(), "$: object"),
            ([float("nan")], "$[0]: nan"),
            (float("-inf"), "$: -inf"),
            ({1: 2}, "$: a key of type int"),
            ({"a": {None: 2}}, "$.a: a key of type NoneType"),
            (cycle, "$[0]: a cycle"),
            (10**5000, "$: <int>: Exceeds the limit"),
            (["\ud800"], "$[0]: text with a lone surrogate"),
            ({"a": {"\ud83d\ude00": 1}}, "$.a: text with a lone surrogate"),
            (workflows.WorkflowDelayContext(None, KeyError()), "$.error: KeyError"),
            (1j, "$: complex"),
            (deep, "$"),
        )

        async def run(event, step):
            for number, (given, path) in enumerate(cases):

                async def callback(given=given):
                    attempts.append(number)  # noqa: B023
                    return given

                error = await caught(step.do(f"the step {number}", callback))
                self.assertIsInstance(error, WorkflowFatalError, path)
                self.assertEqual(error.code, "step.not_serializable")
                self.assertIn(path, str(error))
                self.assertIn(f"the step {number}", str(error))

        await self.outcome(run)
        self.assertEqual(attempts, list(range(len(cases))))

    async def test_a_refusal_says_what_is_allowed(self):
        error = await self.assertCode(
            "output.not_serializable", self.outcome(lambda e, s: value({"a": {1}}))
        )
        allowed = "None, bool, int, float, str, list, dict with str keys, datetime, bytes"
        self.assertTrue(str(error).endswith(f"$.a: set; allowed are {allowed}"), error)

    def test_no_memory_left_is_not_a_value_that_cannot_be_stored(self):
        class Huge(dict):
            def items(self):
                raise MemoryError

        for given in (Huge(a=1), [(Huge(a=1),)]):
            with self.assertRaises(MemoryError):
                workflows.encode(given)

    async def test_no_memory_left_for_a_result_is_a_failed_attempt(self):
        class Huge(dict):
            def items(self):
                raise MemoryError

        async def run(event, step):
            async def callback(ctx):
                return Huge(a=1) if ctx.attempt == 1 else "stored"

            return await step.do("s", callback)

        self.assertEqual(await self.outcome(run), "stored")
        ((error,),) = self.rows("SELECT data FROM journal WHERE type = 'failed'")
        self.assertEqual(json.loads(error)["name"], "MemoryError")

    async def test_records_are_stored_as_mappings_with_cloudflares_keys(self):
        lives = []

        async def run(event, step):
            got = [await step.do("s", lambda ctx: {"in": [event], "ctx": ctx})]
            got.append(await step.do("received", returns(await step.wait_for_event("w", "go"))))
            lives.append(got)

        made = workflow(run)
        async with self.engine() as engine:
            instance = await engine.bind(made).create(id="i", params={"a": 1})
            await instance.send_event(type="go", payload={"b": 2})
            await self.finish(instance)
            status = await instance.status()
            events = [event async for event in instance.subscribe()]
        ((first, received),) = lives
        self.assertEqual(first["in"][0]["payload"], {"a": 1})
        self.assertEqual(
            list(first["in"][0]), ["payload", "timestamp", "instanceId", "workflowName"]
        )
        self.assertEqual(first["ctx"]["step"], {"name": "s", "count": 1})
        self.assertEqual((received["type"], received["payload"]), ("go", {"b": 2}))
        self.assertEqual(workflows.encode(status)[1], dict(status))
        stored = workflows.encode(events)[1]
        self.assertEqual(list(stored[0]), ["type", "eventId", "timestamp", "instanceId"])
        for each in (*first["in"], first["ctx"], first["ctx"]["step"], received, *stored):
            self.assertIs(type(each), dict)

    def test_records_are_as_deep_as_what_they_hold(self):
        payload: Any = []
        for _ in range(workflows.DEEPEST - 1):
            payload = [payload]
        event = workflows.WorkflowEvent(payload, datetime.now(UTC), "i", "w")
        workflows.encode(payload)
        with self.assertRaisesRegex(ValueError, "nested too deep"):
            workflows.encode(event)

    async def test_a_value_whose_methods_fail_is_not_serializable(self):
        class Lazy(dict):
            def items(self):
                raise RuntimeError("the session is closed")

            __iter__ = items

        async def run(event, step):
            async def callback():
                await asyncio.sleep(0)
                return Lazy(a=1)

            error = await caught(step.do("s", callback))
            self.assertEqual(error.code, "step.not_serializable")

        await self.outcome(run)

    async def test_what_is_stored_can_be_read_in_every_life_however_deep(self):
        async def run(event, step):
            for depth in range(600, 1000, 10):
                given: Any = []
                for _ in range(depth):
                    given = [given]
                with contextlib.suppress(WorkflowFatalError):
                    await step.do(f"s{depth}", returns(given))
            await step.sleep("rest", "1 hour")
            return "read"

        async def deeper(run, levels, *args):
            return await (deeper(run, levels - 1, *args) if levels else run(*args))

        self.assertEqual(await self.outcome(functools.partial(deeper, run, 20)), "read")

    async def test_params_too_deep_to_be_read_are_refused(self):
        given: Any = []
        for depth in range(1, 951):
            given = [given]
            if depth % 190 == 0:
                with self.subTest(depth):
                    async with self.engine() as engine:
                        made = engine.bind(workflow(lambda event, step: value("ran")))
                        try:
                            instance = await made.create(params=given)
                        except WorkflowError as error:
                            self.assertEqual(error.code, "params.not_serializable")
                        else:
                            await self.clock.settle()
                            self.assertEqual((await instance.status()).status, "complete")
                            self.assertEqual(await instance.result(), "ran")

    async def test_an_output_that_cannot_be_stored_errors_the_instance(self):
        await self.assertCode("output.not_serializable", self.outcome(lambda e, s: value({1})))

    async def test_params_that_cannot_be_stored_are_refused(self):
        await self.assertCode(
            "params.not_serializable", self.outcome(lambda e, s: value(), {"a": {1}})
        )

    async def test_changing_a_result_changes_nothing_stored(self):
        held = {"list": [1]}
        seen = []

        async def run(event, step):
            got = await step.do("s", lambda: held)
            seen.append(copy.deepcopy(got))
            got["list"].append(2)
            return got

        self.assertEqual(await self.lives(run), {"list": [1, 2]})
        self.assertEqual(held, {"list": [1]})
        self.assertEqual(seen, [{"list": [1]}] * 3)

    async def test_nothing_that_is_stored_is_a_pickle(self):
        await self.outcome(lambda e, step: step.do("s", returns([b"x", datetime.now(UTC)])))
        for (data,) in self.rows("SELECT data FROM journal WHERE data IS NOT NULL"):
            json.loads(data)

    async def test_the_payload_is_deeply_read_only_and_still_a_dict(self):
        params = {"a": {"b": [1, {"c": 2}]}}
        changes = (
            lambda p: p.update(x=1),
            lambda p: p.__setitem__("x", 1),
            lambda p: p["a"].pop("b"),
            lambda p: p["a"]["b"].append(1),
            lambda p: p["a"]["b"].sort(),
            lambda p: p["a"]["b"].__iadd__([1]),
            lambda p: p["a"]["b"][1].clear(),
            lambda p: p["a"]["b"][1].__delitem__("c"),
            lambda p: p["a"].__ior__({}),
            lambda p: p.setdefault("x", 1),
            lambda p: setattr(p, "a", 1),
            lambda p: setattr(p["a"]["b"], "x", 1),
            lambda p: delattr(p, "a"),
        )

        async def run(event, step):
            for change in changes:
                with self.assertRaisesRegex(TypeError, "return state from a step"):
                    change(event.payload)
            self.assertIsInstance(event.payload, dict)
            self.assertIsInstance(event.payload["a"]["b"], list)
            self.assertEqual(event.payload, params)
            self.assertEqual(json.loads(json.dumps(event.payload)), params)
            mine = copy.deepcopy(event.payload)
            mine["a"]["b"].append(3)
            return await step.do("echo", returns(event.payload))

        self.assertEqual(await self.lives(run, params=params), params)

    async def test_the_keys_of_a_payload_read_as_attributes(self):
        odd = {"items": 2, "__deepcopy__": 3}
        params = {"user": {"name": "Ada", "cards": [{"id": 1}]}} | odd

        async def run(event, step):
            payload = event.payload
            self.assertEqual((payload.user.name, payload.user.cards[0].id), ("Ada", 1))
            self.assertEqual([*payload.items()][1], ("items", 2))  # methods win
            with self.assertRaisesRegex(AttributeError, "'nmae'.*name, cards"):
                payload.user.nmae  # noqa: B018
            self.assertEqual(payload.get("nmae"), None)
            for copied in (copy.copy(payload.user), dict(payload.user), payload.user | {}):
                self.assertIs(type(copied), dict)
            self.assertIs(type(copy.deepcopy(payload)["user"]["cards"][0]), dict)
            received = await step.wait_for_event("w", "go")
            self.assertEqual((received.type, received["type"]), ("go", "go"))  # its own names win
            self.assertEqual((received.user.name, received["user"].name), ("Ada", "Ada"))
            self.assertEqual((received.payload.type, received.get("nobody")), ("mine", None))
            self.assertEqual([*received], ["payload", "timestamp", "type"])
            with self.assertRaisesRegex(AttributeError, "'nmae'.*type, user"):
                received.nmae  # noqa: B018
            return copy.deepcopy(received).user["name"]

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create(params=params)
            await instance.send_event(
                type="go", payload={"type": "mine", "user": {"name": "Ada"}} | odd
            )
            self.assertEqual(await self.finish(instance), "Ada")

    def test_a_payload_may_be_as_deep_as_a_value(self):
        payload: Any = []
        for n in range(workflows.DEEPEST - 1):
            payload = {"a": payload} if n % 2 else [payload]

        def deeper(levels: int) -> Any:
            return deeper(levels - 1) if levels else workflows.freeze(workflows.encode(payload)[1])

        self.assertEqual(deeper(200), payload)

    def test_a_history_event_has_cloudflares_keys_and_reads_by_pythons_too(self):
        event = workflows.WorkflowHistoryEvent(event_id=5, step_name="s-1")
        self.assertEqual((event.event_id, event["event_id"], event.get("event_id")), (5, 5, 5))
        self.assertEqual((event.eventId, event["eventId"], event.get("eventId")), (5, 5, 5))
        self.assertEqual(("step_name" in event, "stepName" in event), (True, True))
        self.assertEqual(("attempt" in event, event.get("attempt", 0)), (False, 0))
        self.assertEqual(event, {"eventId": 5, "stepName": "s-1"})
        with self.assertRaisesRegex(AttributeError, "'attempt'.*eventId, stepName"):
            event.attempt  # noqa: B018


class Errors(Lives):
    async def rebuilt(self, *errors: BaseException) -> list[Any]:
        """What `run` gets when steps raise these: the same in its first life and in replays."""
        lives = []

        async def run(event: Any, step: Any) -> None:
            lives.append([await caught(step.do("s", ONCE, raises(error))) for error in errors])

        def look(error: Any) -> list[Any]:
            return [type(error), str(error), repr(error.args), vars(error)]

        await self.lives(run)
        looks = [[look(error) for error in life] for life in lives]
        self.assertEqual([*map(repr, looks)], [repr(looks[0])] * 3)
        return lives[0]

    async def stands_in(self, error: BaseException, cls: type[Exception], text: str) -> Any:
        """What `run` gets for an error is of this class, has this text, and can be logged; and when
        it leaves `run`, the status still shows the error's own name."""
        (got,) = await self.rebuilt(error)
        self.assertIs(type(got), cls)
        self.assertEqual((str(got), got.args), (text, (text,)))
        self.assertIn(text, "".join(traceback.format_exception(got)))
        record = workflows.decode(workflows.encode_error(got))
        name = type(error).__name__
        self.assertEqual(workflows.brief(record), {"name": name, "message": text})
        self.assertIs(type(workflows.rebuild_error(record)), cls)
        return got

    async def test_builtin_errors_come_back_as_their_own_type_with_their_text(self):
        errors = (
            ValueError("a", 1, [2]),
            KeyError("k"),
            OSError(2, "gone", "file.txt"),
            PermissionError(13, "no", "a", None, "b"),
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
            SyntaxError("bad", ("f", 1, 2, "text", 1, 3)),
            StopAsyncIteration(3),
            TimeoutError(),
            json.JSONDecodeError("bad", "doc", 1),
        )
        for error, got in zip(errors, await self.rebuilt(*errors), strict=True):
            with self.subTest(error):
                self.assertIs(type(got), type(error))
                self.assertEqual(str(got), str(error))

    async def test_an_os_error_keeps_its_number_and_file(self):
        (got,) = await self.rebuilt(OSError(2, "gone", "file.txt"))
        self.assertIsInstance(got, FileNotFoundError)
        self.assertEqual((got.errno, got.filename), (2, "file.txt"))

    async def test_a_users_error_comes_back_without_its_init_with_its_attributes(self):
        error = Attributes(7, "seven")
        made = Attributes.made
        (got,) = await self.rebuilt(error)
        self.assertIs(type(got), Attributes)
        self.assertEqual((got.number, got.text, str(got)), (7, "seven", "7 seven"))
        self.assertFalse(hasattr(got, "bad"))
        self.assertEqual(Attributes.made, made)

    async def test_attributes_in_slots_are_kept(self):
        error = InSlots("a")
        error.x, error.y = [5], None
        errors = (error, AttributeError("a", name="n", obj=[1]), ImportError("i", name="n"))
        one, two, three = await self.rebuilt(*errors)
        self.assertEqual((one.x, one.y, two.name, two.obj, three.name), ([5], None, "n", None, "n"))

    async def test_tuples_among_args_and_attributes_stay_tuples(self):
        error = ValueError("at", (1, [(2,)]))
        error.place = {"xy": (3, 4)}
        (got,) = await self.rebuilt(error)
        self.assertEqual((got.args, got.place), (("at", (1, [(2,)])), {"xy": (3, 4)}))

    async def test_an_attribute_that_is_an_error_is_rebuilt_too(self):
        reason = PermissionError(13, "no", "file")
        (got,) = await self.rebuilt(urllib.error.URLError(reason))
        self.assertIs(type(got), urllib.error.URLError)
        self.assertEqual(str(got), "<urlopen error [Errno 13] no: 'file'>")
        self.assertEqual((type(got.reason), got.reason.errno), (PermissionError, 13))

    async def test_errors_that_are_attributes_of_each_other_are_rebuilt_once(self):
        one, two = ValueError("one"), KeyError("two")
        one.other, two.other = two, one
        (got,) = await self.rebuilt(one)
        self.assertEqual((str(got), repr(got.other)), ("one", "KeyError('two')"))
        self.assertFalse(hasattr(got.other, "other"))

    async def test_notes_are_attributes(self):
        error = ValueError("a")
        error.add_note("more")
        self.assertEqual((await self.rebuilt(error))[0].__notes__, ["more"])

    async def test_others_come_back_as_workflow_error_with_the_original_name(self):
        class Local(Exception):
            pass

        cases = (
            (Local("here"), "here"),
            (SystemExit(3), "3"),
            (asyncio.CancelledError("c"), "c"),
            (BaseExceptionGroup("g", [SystemExit()]), "g"),
        )
        rebuilt = await self.rebuilt(*(error for error, _ in cases))
        for (error, message), got in zip(cases, rebuilt, strict=True):
            with self.subTest(error):
                self.assertIs(type(got), WorkflowError)
                self.assertEqual(got.name, type(error).__name__)
                self.assertTrue(str(got).startswith(message))

    async def test_a_stop_iteration_comes_back_as_runtime_error(self):
        def callback():
            raise StopIteration(3)

        async def run(event, step):
            return type(await caught(step.do("s", ONCE, callback))).__name__

        self.assertEqual(await self.outcome(run), "RuntimeError")

    async def test_args_that_its_base_does_not_take_leave_the_class_and_the_message(self):
        error = UnicodeDecodeError("ascii", b"x", 0, 1, "odd")
        error.args = ("of another version",)
        (got,) = await self.rebuilt(error)
        self.assertIs(type(got), UnicodeDecodeError)
        self.assertEqual((str(got), got.args), (str(error), error.args))

    async def test_an_error_whose_own_code_is_needed_to_make_it_is_made_without(self):
        (got,) = await self.rebuilt(OnlyItsOwnCode("Order", ["amount"]))
        self.assertIs(type(got), OnlyItsOwnCode)
        self.assertEqual(str(got), "Order: 1 errors")

    async def test_the_text_is_the_recorded_one_whatever_the_args(self):
        number = uuid.UUID(int=1)
        for error in (KeyError(number), KeyError((1, number)), OSError(2, "gone", number)):
            with self.subTest(error):
                self.setUp()
                (got,) = await self.rebuilt(error)
                self.assertIs(type(got), type(error))
                self.assertEqual((str(got), got.args), (str(error), (str(error),)))
        self.assertEqual((got.errno, got.strerror, got.filename), (2, None, None))

    async def test_attributes_that_would_change_the_text_are_left_out(self):
        (got,) = await self.rebuilt(Statement("duplicate", Response()))
        self.assertIs(type(got), Statement)
        self.assertEqual(str(got), "duplicate [404]")
        self.assertEqual((got.details, got.code), (["d"], 7))

    async def test_a_base_class_stands_in_for_one_whose_text_needs_what_is_lost(self):
        error = FromResponse(Response())
        got = await self.stands_in(error, ConnectionError, "the server answered 404")
        self.assertEqual(got.retry_after, 5)

    async def test_a_base_class_stands_in_for_one_that_nobody_can_find(self):
        class Missing(KeyError):
            pass

        await self.stands_in(Missing({1}), KeyError, "{1}")

    async def test_a_subclass_that_nobody_can_find_is_still_not_retryable(self):
        class Declined(NonRetryableError):
            def __init__(self) -> None:
                super().__init__("no funds", name="Declined")
                self.code = "funds"

        got = await self.stands_in(Declined(), NonRetryableError, "no funds")
        self.assertEqual((got.name, got.code), ("Declined", "funds"))

    async def test_an_os_error_that_stands_in_is_not_a_more_special_one(self):
        class Gone(OSError):
            pass

        (got,) = await self.rebuilt(Gone(2, "no such file"))
        self.assertIs(type(got), OSError)
        self.assertEqual((str(got), got.errno), ("[Errno 2] no such file", 2))

    async def test_a_workflow_error_stands_in_if_only_exception_is_left(self):
        class Local(Exception):
            pass

        got = await self.stands_in(Local("here"), WorkflowError, "here")
        self.assertEqual((got.name, got.code), ("Local", "workflow.error"))

    async def test_an_error_that_would_stop_more_than_a_step_comes_back_as_its_other_base(self):
        await self.stands_in(Stop("out"), ValueError, "out")

    def test_a_class_that_is_not_imported_is_not_imported(self):
        module = types.ModuleType("not_imported")
        exec("class Gone(LookupError): pass", vars(module))
        record = workflows.decode(workflows.encode_error(module.Gone("x")))
        self.assertIs(type(workflows.rebuild_error(record)), LookupError)
        lazy = types.ModuleType("not_imported")
        lazy.__getattr__ = unittest.mock.Mock(return_value=module.Gone)
        with unittest.mock.patch.dict(sys.modules, not_imported=lazy):
            self.assertIs(type(workflows.rebuild_error(record)), LookupError)
        with unittest.mock.patch.dict(sys.modules, not_imported=module):
            self.assertIs(type(workflows.rebuild_error(record)), module.Gone)

    async def test_an_error_that_delegates_to_what_is_lost_can_be_logged(self):
        http = urllib.error.HTTPError("http://x", 404, "Not Found", {}, io.BytesIO())
        one, two = await self.rebuilt(http, Delegating(Response()))
        self.assertEqual((type(one), one.code, str(one)), (type(http), 404, str(http)))
        self.assertEqual((type(two), two.file), (Delegating, None))
        for got in (one, two):
            self.assertFalse(hasattr(got, "nothing"))
            with self.assertLogs() as logged:
                logging.getLogger().error("%r", got, exc_info=got)
            self.assertIn(str(got), logged.output[0])

    async def test_a_text_that_utf8_cannot_hold_is_stored_with_question_marks(self):
        for error in (ValueError("a\udcff"), KeyError("\ud800"), WorkflowError("\ud83d\ude00")):
            message = str(error).encode(errors="replace").decode()
            got = workflows.rebuild_error(workflows.decode(workflows.encode_error(error)))
            self.assertEqual((type(got), str(got)), (type(error), message))

    async def test_an_error_about_a_text_that_utf8_cannot_hold_is_rebuilt(self):
        errors = (UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "no"), OSError(2, "gone", "\udcff"))
        one, two = await self.rebuilt(*errors)
        self.assertEqual(
            (type(one), str(one), one.object), (type(errors[0]), str(errors[0]), "a\ud800")
        )
        self.assertEqual(
            (type(two), str(two), two.filename), (type(errors[1]), str(errors[1]), "\udcff")
        )

    async def test_the_members_of_a_group_come_back_one_by_one(self):
        inner = ExceptionGroup("inner", [Attributes(1, "x")])
        (got,) = await self.rebuilt(ExceptionGroup("outer", [KeyError("k"), inner]))
        self.assertEqual((got.message, str(got)), ("outer", "outer (2 sub-exceptions)"))
        self.assertEqual([type(e) for e in got.exceptions], [KeyError, ExceptionGroup])
        self.assertEqual(got.exceptions[1].exceptions[0].number, 1)

    async def test_the_message_of_a_group_names_its_members(self):
        async def run(event, step):
            async with asyncio.TaskGroup() as group:
                group.create_task(step.do("a", ONCE, raises(KeyError("k"))))
                await step.sleep("s", "1 hour")

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            with self.assertRaises(ExceptionGroup):
                await self.finish(instance)
            error = (await instance.status()).error
        message = "unhandled errors in a TaskGroup (1 sub-exception) [KeyError: 'k']"
        self.assertEqual(error, {"name": "ExceptionGroup", "message": message})

    def test_groups_in_groups_are_rebuilt_once_each(self):
        error: Exception = ValueError("v")
        for _ in range(50):  # with twice the work for each level it would take years
            error = Herd("h", [error])
            error.shepherd = Response()
        got = workflows.rebuild_error(workflows.decode(workflows.encode_error(error)))
        self.assertTrue(str(got).startswith("kept by 404 [Herd: kept by 404 ["), got)

    async def test_a_group_that_cannot_be_one_keeps_the_names_of_its_members(self):
        group = BaseExceptionGroup("g", [SystemExit(3), ExceptionGroup("h", [ValueError("v")])])
        (got,) = await self.rebuilt(group)
        members = "SystemExit: 3; ExceptionGroup: h (1 sub-exception) [ValueError: v]"
        self.assertEqual(str(got), f"g (2 sub-exceptions) [{members}]")

    async def test_an_arg_that_is_no_allowed_value_leaves_the_message(self):
        (got,) = await self.rebuilt(ValueError({1}, "x"))
        self.assertEqual(got.args, ("({1}, 'x')",))

    async def test_the_cause_is_gone_and_the_traceback_is_there_on_the_first_run(self):
        frames = []

        async def run(event, step):
            async def callback():
                raise ValueError from KeyError()

            error = await caught(step.do("s", ONCE, callback))
            self.assertIsNone(error.__cause__)
            frames.append([frame.name for frame in traceback.extract_tb(error.__traceback__)])

        await self.lives(run)
        self.assertIn("callback", frames[0])
        self.assertNotIn("callback", frames[1])

    def looked_at(self, error: Any, **methods: Any) -> Any:
        """What an error whose class has these methods is rebuilt as."""
        with unittest.mock.patch.multiple(Odd, create=True, **methods):
            record = workflows.decode(workflows.encode_error(error))
            self.assertEqual(record["name"], "Odd")
            got = workflows.rebuild_error(record)
            self.assertEqual(str(got), record["message"])
        return got

    def test_an_error_whose_text_fails_is_rebuilt_as_its_base(self):
        for failure in (KeyError(1), RecursionError(), SystemExit(), asyncio.CancelledError(), 5):
            got = self.looked_at(Odd("x"), __str__=unittest.mock.Mock(side_effect=[failure] * 9))
            self.assertEqual((type(got), str(got)), (RuntimeError, "<exception str() failed>"))

    def test_an_error_that_cannot_be_logged_is_rebuilt_as_its_base(self):
        def fail(self, *_):
            raise KeyError("nothing works")

        error = Odd("x")
        error.add_note("found without `__getattr__`")
        self.assertIs(type(self.looked_at(error, __doc__="")), Odd)
        for methods in (
            *({"__repr__": fail}, {"__getattr__": fail}, {"__getattribute__": fail}),
            {"__cause__": property(fail)},
        ):
            with self.subTest(methods):
                self.assertIs(type(self.looked_at(error, **methods)), RuntimeError)

    def test_an_error_is_read_past_its_properties(self):
        def fail(self):
            raise KeyError("nothing works")

        error = Odd("x", 1)
        error.code = 5
        got = self.looked_at(error, args=property(fail), code=property(fail))
        self.assertEqual((type(got), got.args), (Odd, ("x", 1)))
        self.assertEqual(vars(got), {})  # `code` has no setter

    async def test_an_error_with_several_builtin_bases_is_rebuilt(self):
        error = Both("no")
        error.filename2 = "file"
        (got,) = await self.rebuilt(error)
        self.assertEqual((type(got), str(got), got.filename2), (Both, "no", "file"))

    async def test_an_error_whose_attributes_cannot_be_set_has_them(self):
        (got,) = await self.rebuilt(Frozen(5))
        self.assertEqual((type(got), got.code), (Frozen, 5))

    async def test_no_error_is_so_odd_that_its_step_never_ends(self):
        class BadText(Exception):
            def __str__(self):
                raise RuntimeError("no text")

        class NoState(Exception):
            @property
            def __dict__(self):
                raise RuntimeError("no state")

        class Nameless(type):
            @property
            def __name__(cls):
                raise RuntimeError("no name")

        class NoClass(Exception, metaclass=Nameless):
            pass

        deep: Any = []
        for _ in range(970):
            deep = [deep]
        loop = ValueError()
        loop.itself = loop
        for error, cls in (
            (BadText(), WorkflowError),
            (NoState(), WorkflowError),
            (NoClass(), WorkflowError),
            (Careless(3), Careless),
            (loop, ValueError),
            (ValueError(deep), ValueError),
            (ValueError("\ud800", 10**5000), ValueError),
        ):
            with self.subTest(object.__repr__(error)):
                self.setUp()

                async def run(event, step, error=error, cls=cls):
                    async def callback():
                        await asyncio.sleep(0)
                        raise error

                    return type(await caught(step.do("s", ONCE, callback))) is cls

                with contextlib.suppress(WorkflowTimeoutError):
                    self.assertTrue(await self.outcome(run))
                    continue
                self.fail("the step hung")

    async def failing(self, error: BaseException, event: Any, step: Any) -> None:
        await step.do("s", ONCE, raises(error))

    async def test_the_status_of_an_errored_instance_has_name_and_message(self):
        for error, name in (
            (ValueError("m"), "ValueError"),
            (NonRetryableError("m", "Mine"), "Mine"),
            (NonRetryableError("m"), "NonRetryableError"),
        ):
            with self.subTest(name):
                self.setUp()
                async with self.engine() as engine:
                    run = functools.partial(self.failing, error)
                    instance = await engine.bind(workflow(run)).create()
                    with self.assertRaises(type(error)):
                        await self.finish(instance)
                    status = await instance.status()
                self.assertEqual(status.error, {"name": name, "message": "m"})
                self.assertEqual((status.status, status.output), ("errored", None))


class Attempts(Lives):
    """3.4 to 3.8: callbacks, config, retries, timeouts."""

    debug = True

    async def test_callbacks_of_every_kind_are_called(self):
        class Asynchronous:
            async def __call__(self):
                return "object"

        class Awaitable_:
            def __await__(self):
                yield from asyncio.sleep(0).__await__()
                return "awaitable"

        class Plain:
            def __call__(self):
                return "plain object"

            def method(self):
                return "method"

            @classmethod
            async def classmethod(cls):
                return "class method"

        async def partial(first, second=0):
            return [first, second]

        cases = (
            (returns("async"), "async"),
            (lambda: "plain", "plain"),
            (lambda: value("coroutine"), "coroutine"),
            (lambda: Awaitable_(), "awaitable"),
            (Asynchronous(), "object"),
            (functools.partial(Asynchronous()), "object"),
            (Plain(), "plain object"),
            (Plain().method, "method"),
            (Plain.classmethod, "class method"),
            (functools.partial(partial, 1), [1, 0]),
            (functools.partial(partial, 1, second=2), [1, 2]),
            (dict, {}),
            ("x".upper, "X"),
            (lambda *args, **more: [len(args), len(more)], [0, 0]),
        )

        async def run(event, step):
            for callback, expected in cases:
                self.assertEqual(await step.do("s", ONCE, callback), expected)

        await self.outcome(run)

    async def test_the_context_goes_to_one_required_parameter_or_to_ctx(self):
        def show(ctx):
            return [ctx.step.name, ctx["step"]["count"], ctx.attempt]

        async def keyword(*, ctx, more=5):
            return show(ctx)

        async def default(ctx=None, more=5):
            return show(ctx)

        async def with_default(c, more=5):
            return show(c) if more == 5 else None

        async def second(number, ctx):
            return show(ctx) if number == 1 else None

        def positional(c, /):
            return show(c)

        async def run(event, step):
            callbacks = (keyword, default, with_default, functools.partial(second, 1), positional)
            for callback in (*callbacks, show, lambda ctx: show(ctx), lambda c: show(c)):
                self.assertEqual(await step.do(repr(callback), callback), [repr(callback), 1, 1])
            return await step.do("d", lambda x=1, y=2: [x, y])

        self.assertEqual(await self.outcome(run), [1, 2])

    async def test_the_config_in_the_context_has_defaults_and_is_as_written(self):
        async def run(event, step):
            config = {"retries": {"limit": 2, "delay": "1 second"}}
            return await step.do("s", config, lambda ctx: ctx.config)

        self.assertEqual(
            await self.outcome(run),
            {
                "retries": {"limit": 2, "delay": "1 second", "backoff": "exponential"},
                "timeout": "10 minutes",
            },
        )

    async def test_a_plain_callback_runs_in_a_daemon_thread_without_a_loop(self):
        def callback():
            with self.assertRaises(RuntimeError):
                asyncio.get_running_loop()
            return threading.current_thread().daemon

        async def run(event, step):
            loop = asyncio.get_running_loop()
            self.assertIsNot(threading.current_thread(), None)
            beat = loop.create_future()

            def blocking():  # ends only if the loop goes on meanwhile
                ended = threading.Event()
                loop.call_soon_threadsafe(ended.set)
                loop.call_soon_threadsafe(beat.set_result, True)
                return ended.wait(5)

            return await step.do("a", callback), await step.do("b", blocking), await beat

        self.assertEqual(await self.outcome(run), [True] * 3)

    async def test_at_most_64_plain_callbacks_run_and_a_waiting_one_has_not_begun(self):
        go = threading.Event()
        running = []

        async def run(event, step):
            def callback(ctx):
                running.append(ctx.step.count)
                return go.wait(5)

            last = step.do("last", {"timeout": "1 minute"} | ONCE, lambda: "in time")
            await asyncio.gather(*(step.do("s", callback) for _ in range(64)), last)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance("5 minutes")
            self.assertEqual(len(running), 64)
            go.set()
            self.assertIsNone(await self.finish(instance))

    async def test_a_thread_is_used_again(self):
        async def run(event, step):
            return [await step.do("s", threading.get_ident) for _ in range(20)]

        self.assertEqual(len(set(await self.outcome(run))), 1)

    async def test_what_a_plain_callback_returns_is_awaited_without_a_thread(self):
        go, begun = asyncio.Event(), []

        async def wait():
            begun.append(1)
            await go.wait()

        async def run(event, step):
            await asyncio.gather(*(step.do("s", lambda: wait()) for _ in range(70)))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await until(lambda: len(begun) == 70)
            go.set()
            self.assertIsNone(await self.finish(instance))

    async def test_an_abandoned_thread_holds_up_nothing_and_its_slot_is_free(self):
        self.clock = ManualClock(patience=0)
        stuck = threading.Event()
        self.addCleanup(stuck.set)

        async def run(event, step):
            config = {"timeout": "1 second"} | ONCE
            calls = (step.do("s", config, lambda: stuck.wait(9)) for _ in range(64))
            await asyncio.gather(*calls, return_exceptions=True)
            return await step.do("next", lambda: "ran")

        began = time.monotonic()
        self.assertEqual(await self.outcome(run), "ran")
        self.assertLess(time.monotonic() - began, 2)

    async def test_a_careful_instance_stores_each_start_until_one_of_its_steps_has_ended(self):
        seen = []

        async def look(ctx):  # it never waits for anything
            mine = f"type = 'start' AND step LIKE '%{ctx.step.count}' AND attempt = {ctx.attempt}"
            started = f"SELECT count(*) FROM journal WHERE {mine}"
            seen.append(self.rows(f"SELECT ({started}), careful FROM instances")[0])
            if len(seen) == 1:
                raise ValueError

        async def run(event, step):
            await step.sleep("nap", "1 hour")
            for _ in range(3):
                await step.do("look", constant(1, 0), look)

        await self.careful(workflow(run))
        self.assertEqual(seen, [(1, 1), (1, 1), (0, 0), (0, 0)])

    async def careful(self, made, then=None):
        """Runs an instance that sleeps for an hour as if it had been cut off before."""
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.settle()
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            db.execute("UPDATE instances SET careful = 1")
            db.commit()
        async with self.engine() as engine:
            instance = await engine.bind(made).get("i")
            await self.clock.advance("1 hour")
            if then is not None:
                await then(instance)
            await self.finish(instance)

    async def test_a_careful_instance_does_not_call_back_once_a_pause_is_stored(self):
        ran, gate, inner = [], asyncio.Event(), asyncio.Event()

        async def run(event, step):
            async def outer():
                ran.append("outer")
                await inner.wait()
                await step.do("inner", lambda: value(ran.append("inner")))

            await step.sleep("nap", "1 hour")
            await gate.wait()
            await step.do("outer", outer)

        async def then(instance):
            pausing = asyncio.create_task(instance.pause())
            gate.set()  # in the same turn
            await pausing
            await self.clock.settle()
            self.assertEqual(((await instance.status()).status, ran), ("paused", []))
            await instance.resume()
            await self.clock.settle()
            await instance.pause()
            inner.set()  # the callback could not end without its step
            await self.clock.settle()
            self.assertEqual(
                ((await instance.status()).status, ran), ("paused", ["outer", "inner"])
            )
            await instance.resume()

        await self.careful(workflow(run), then)

    async def test_a_step_has_started_before_what_its_callback_does_to_instances(self):
        async def run(event, step):
            async def callback():
                await self.instance.send_event(type="t")

            await step.do("s", callback)

        async with self.engine() as engine:
            self.instance = await engine.bind(workflow(run)).create()
            await self.finish(self.instance)
        types = [type for (type,) in self.rows("SELECT type FROM journal ORDER BY seq")]
        self.assertEqual(types[2:], ["start", "sent", "done", "complete"])

    async def test_run_has_nothing_of_the_context_of_whoever_creates_the_instance(self):
        variable, seen = contextvars.ContextVar("variable", default="none"), []

        async def run(event, step):
            seen.append(variable.get())

        async with self.engine() as engine:
            variable.set("caller")
            await self.finish(await engine.bind(workflow(run)).create())
        self.assertEqual(seen, ["none"])

    async def test_contextvars_of_run_reach_every_attempt_and_stay_apart(self):
        variable = contextvars.ContextVar("variable", default="unset")
        seen = []

        async def run(event, step):
            variable.set("run")

            async def callback(ctx):
                seen.append(variable.get())
                variable.set("callback")
                if ctx.attempt < 3:
                    raise ValueError

            await step.do("async", constant(5), callback)
            await step.do("plain", lambda: seen.append(variable.get()))
            return variable.get()

        self.assertEqual(await self.outcome(run), "run")
        self.assertEqual(seen, ["run"] * 4)

    async def test_a_wrong_config_is_refused_with_the_key(self):
        cases = (
            ({"retrys": {}}, "retrys"),
            ({"retries": {"limits": 1}}, "limits"),
            ({"retries": 5}, "retries"),
            ({"retries": {"limit": -1}}, "limit"),
            ({"retries": {"limit": True}}, "limit"),
            ({"retries": {"limit": 1.5}}, "limit"),
            ({"retries": {"limit": "5"}}, "limit"),
            ({"retries": {"limit": float("nan")}}, "limit"),
            ({"retries": {"delay": -1}}, "delay"),
            ({"retries": {"delay": "soon"}}, "delay"),
            ({"retries": {"delay": True}}, "delay"),
            ({"retries": {"backoff": "random"}}, "backoff"),
            ({"retries": {"backoff": []}}, "backoff"),
            ({"timeout": 0}, "timeout"),
            ({"timeout": "366 days"}, "timeout"),
            ({"timeout": None}, "timeout"),
            ([], "config"),
            ("10 minutes", "config"),
        )
        calls = [lambda s, c=config: s.do("s", c, value) for config, _ in cases]
        errors = await self.refusals(calls)
        for (config, key), error in zip(cases, errors, strict=True):
            with self.subTest(config):
                self.assertIsInstance(error, WorkflowFatalError)
                self.assertEqual(error.code, "step.invalid_config")
                self.assertIn(key, str(error))

    async def refusals(self, calls: list[Callable[[Any], Any]]) -> list[Any]:
        """The errors of wrong step calls: raised where they are awaited, and not stored."""
        got = []

        async def run(event, step):
            for call in calls:
                made = call(step)
                got.append(await caught(made))

        await self.outcome(run)
        self.assertEqual(self.rows("SELECT step FROM journal WHERE step IS NOT NULL"), [])
        return got

    async def test_wrong_calls_have_codes(self):
        control = ("\n", "\x00", "a\x7f", "\x85", "a\ud800", "x" * 257, None, 5, b"s")
        cases = (
            *(("step.invalid_name", lambda s, n=n: s.do(n, returns(1))) for n in control),
            ("step.invalid_name", lambda s: s.sleep("\n", 1)),
            ("step.invalid_name", lambda s: s.wait_for_event("\n", "t")),
            ("step.invalid_callback", lambda s: s.do("s", None)),
            ("step.invalid_callback", lambda s: s.do("s", {"timeout": 1})),
            ("step.invalid_callback", lambda s: s.do("s", {}, "text")),
            ("step.invalid_callback", lambda s: s.do("s", lambda a, b: 1)),
            ("step.invalid_callback", lambda s: s.do("s", lambda *, need: 1)),
            ("step.invalid_callback", lambda s: s.do("s")),
            ("step.invalid_config", lambda s: s.do("s", {}, value, bogus=1)),
            ("step.invalid_config", lambda s: s.do("s", {}, value, config={})),
            ("step.invalid_duration", lambda s: s.sleep("s", "soon")),
            ("step.invalid_duration", lambda s: s.sleep("s", 1, 2)),
            ("step.invalid_duration", lambda s: s.sleep_until("s", 1, at=2)),
            ("step.invalid_duration", lambda s: s.sleep("s", -1)),
            ("step.invalid_duration", lambda s: s.sleep_until("s", float("nan"))),
            ("step.invalid_duration", lambda s: s.sleep_until("s", "tomorrow")),
            ("step.invalid_duration", lambda s: s.sleep_until("s", 10**400)),
            ("limit.sleep", lambda s: s.sleep("s", "366 days")),
            ("limit.sleep", lambda s: s.sleep("s", 10**5000)),
            ("limit.sleep", lambda s: s.sleep_until("s", datetime.max.replace(tzinfo=UTC))),
            ("limit.sleep", lambda s: s.wait_for_event("s", "t", timeout="366 days")),
            ("step.invalid_config", lambda s: s.wait_for_event("s", "t", timeout="soon")),
            ("step.invalid_config", lambda s: s.wait_for_event("s", {"type": "t", "tmeout": 1})),
            *(
                ("event.invalid_type", lambda s, t=t: s.wait_for_event("s", t))
                for t in ("", "-a", "a.b", "a\n", "é", "x" * 101, None, 5)
            ),
        )
        errors = await self.refusals([call for _, call in cases])
        for (code, _), error in zip(cases, errors, strict=True):
            with self.subTest(str(error)[:80]):
                self.assertIsInstance(error, WorkflowFatalError)
                self.assertEqual(error.code, code)

    async def test_legal_names_are_any_text_without_controls(self):
        async def run(event, step):
            for name in ("", "x" * 256, "é😀 \u2028-/.", "$bytes", "1\u00ad"):
                self.assertEqual(await step.do(name, returns(name)), name)
            return "ok"

        self.assertEqual(await self.lives(run), "ok")

    async def test_an_illegal_name_never_finds_a_step(self):
        async def run(event, step):
            await step.do("a", lambda: step.do("b", returns(1)))
            return (await caught(step.do("a\n1\ndo\nb", returns(2)))).code

        self.assertEqual(await self.outcome(run), "step.invalid_name")

    async def test_config_and_callback_may_be_keywords(self):
        async def run(event, step):
            config = constant(0)
            return [
                await step.do("s", config, returns(1)),
                await step.do("s", config=config, callback=returns(2)),
                await step.do("s", returns(3), config=config),
                await step.do(name="s", callback=returns(4)),
            ]

        self.assertEqual(await self.outcome(run), [1, 2, 3, 4])

    async def moments(self, config: Any, error: Any = None, count: int = 20) -> list[int]:
        """When the attempts of a step that always fails began, in ms since its first."""
        began = []

        async def run(event, step):
            async def callback():
                began.append(self.clock.now())
                raise error or ValueError

            return type(await caught(step.do("s", config, callback))).__name__

        await self.outcome(run)
        return [moment - began[0] for moment in began[:count]]

    async def test_limit_counts_retries(self):
        for limit, attempts in ((0, 1), (1, 2), (3.0, 4)):
            with self.subTest(limit):
                self.setUp()
                self.assertEqual(len(await self.moments(constant(limit))), attempts)

    async def test_the_default_is_5_retries_10_seconds_apart_doubling(self):
        minutes = [0, 10_000, 30_000, 70_000, 150_000, 310_000]
        for config in (None, {}, {"retries": {}}, {"timeout": "1 hour"}):
            with self.subTest(config):
                self.setUp()
                self.assertEqual(await self.moments(config), minutes)

    async def test_the_wait_before_a_retry_follows_the_backoff(self):
        for backoff, delay, expected in (
            ("constant", "1 second", [0, 1000, 2000, 3000]),
            ("linear", timedelta(seconds=1), [0, 1000, 3000, 6000]),
            ("exponential", 1000, [0, 1000, 3000, 7000]),
            ("exponential", 0, [0, 0, 0, 0]),
            ("linear", "300 days", [0, 300 * 86_400_000, 665 * 86_400_000]),
        ):
            with self.subTest(backoff):
                self.setUp()
                limit = len(expected) - 1
                config = {"retries": {"limit": limit, "delay": delay, "backoff": backoff}}
                self.assertEqual(await self.moments(config), expected)

    async def test_a_retry_does_not_wait_for_what_else_is_in_flight(self):
        attempts, gate = [], asyncio.Event()

        async def fails(ctx):
            attempts.append(ctx.attempt)
            raise ValueError

        async def run(event, step):
            again = constant(2, "1 second")
            await asyncio.gather(caught(step.do("fails", again, fails)), step.do("s", gate.wait))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance("10 seconds")
            self.assertEqual(attempts, [1, 2, 3])
            gate.set()
            await self.finish(instance)

    async def test_limit_may_be_infinite(self):
        async def run(event, step):
            async def callback(ctx):
                if ctx.attempt < 50:
                    raise ValueError
                return [ctx.attempt, ctx.config["retries"]["limit"] == float("inf")]

            return await step.do("s", constant(float("inf"), "2 seconds"), callback)

        self.assertEqual(await self.outcome(run), [50, True])

    async def test_the_config_is_fixed_when_the_first_attempt_starts(self):
        lives = []

        async def run(event, step):
            lives.append(1)
            attempts = []
            config = constant(1 if len(lives) == 1 else 9, "1 hour")
            error = await caught(step.do("s", config, raises(ValueError(1))))
            return [str(error), attempts]

        await self.lives(run)
        failures = self.rows("SELECT count(*) FROM journal WHERE type IN ('failed', 'error')")
        self.assertEqual(failures, [(2,)])

    async def test_a_non_retryable_error_ends_the_step_at_once(self):
        for error in (NonRetryableError("m"), WorkflowFatalError("m")):
            self.setUp()
            self.assertEqual(await self.moments(None, error), [0])

    async def test_the_last_error_is_raised_and_run_may_catch_it_and_go_on(self):
        async def run(event, step):
            async def callback(ctx):
                raise ValueError(ctx.attempt)

            error = await caught(step.do("s", constant(2), callback))
            return error.args[0], await step.do("next", returns("went on"))

        self.assertEqual(await self.lives(run), [3, "went on"])

    async def test_each_failed_attempt_that_is_retried_is_one_line_in_the_log(self):
        async def run(event, step):
            with contextlib.suppress(ConnectionError):
                linear = {"retries": {"limit": 2, "delay": "1 second", "backoff": "linear"}}
                await step.do("charge", linear, raises(ConnectionError("no\nanswer")))
            with contextlib.suppress(NonRetryableError):
                await step.do("refuse", raises(NonRetryableError("no funds")))

        with self.assertLogs("workflows", "DEBUG") as logged:
            async with self.engine() as engine:
                await self.finish(await engine.bind(workflow(run)).create(id="i"))
        records = [r for r in logged.records if "attempt" in r.getMessage()]
        lines = [(r.levelname, r.getMessage(), bool(r.exc_info)) for r in records]
        what = "test i: step 'charge': attempt {} of 3 failed"
        error = ": ConnectionError: no answer; the next one in {} ms"
        self.assertEqual(
            lines,
            [
                ("WARNING", what.format(1) + error.format(1000), False),
                ("DEBUG", what.format(1), True),
                ("WARNING", what.format(2) + error.format(2000), False),
                ("DEBUG", what.format(2), True),
            ],
        )

    async def test_an_error_that_leaves_run_errors_the_instance(self):
        for error in (Attributes(1, "x"), ValueError("m"), SystemExit(3), asyncio.CancelledError()):

            async def run(event, step, error=error):
                raise error

            with self.subTest(error), self.assertRaises((type(error), WorkflowError)) as caught:
                self.setUp()
                await self.outcome(run)
            self.assertEqual(str(caught.exception), str(error))

    async def test_system_exit_and_a_foreign_cancellation_fail_the_attempt_like_any_error(self):
        async def own():
            asyncio.current_task().cancel()
            await asyncio.sleep(0)

        async def member():
            task = asyncio.ensure_future(asyncio.sleep(9))
            task.cancel()
            await task

        async def run(event, step):
            for name, fail in (
                ("SystemExit", raises(SystemExit(1))),
                ("CancelledError", raises(asyncio.CancelledError())),
                ("CancelledError", own),
                ("CancelledError", member),
            ):

                async def callback(ctx, fail=fail):
                    return await fail() if ctx.attempt == 1 else "recovered"

                self.assertEqual(await step.do("s", constant(1), callback), "recovered")
                self.assertEqual((await caught(step.do("s", ONCE, fail))).name, name)
            return "all"

        self.assertEqual(await self.outcome(run), "all")

    async def test_a_timeout_cancels_the_callback_and_is_retried(self):
        self.clock = ManualClock(patience=0)
        cancelled = []

        async def run(event, step):
            async def callback(ctx):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append(ctx.attempt)
                    raise

            error = await caught(step.do("s", constant(1, timeout="2 minutes"), callback))
            return [type(error) is WorkflowTimeoutError, str(error), error.code]

        self.assertEqual(
            await self.outcome(run),
            [True, "Execution timed out after 120000ms", "workflow.timeout"],
        )
        self.assertEqual(cancelled, [1, 2])

    async def test_a_timeout_decides_whatever_the_callback_then_does(self):
        self.clock = ManualClock(patience=0)

        async def run(event, step):
            async def returning():
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    return "late"

            async def raising():
                try:
                    await asyncio.Event().wait()
                finally:
                    raise NonRetryableError

            config = {"timeout": 1000} | ONCE
            return [
                type(await caught(step.do("s", config, callback))).__name__
                for callback in (returning, raising)
            ]

        self.assertEqual(await self.outcome(run), ["WorkflowTimeoutError"] * 2)

    async def test_a_timer_that_cancels_the_callbacks_task_concerns_the_callback_only(self):
        async def run(event, step):
            async def connect():  # as old versions of async_timeout and aiohttp do it
                timer = asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    raise TimeoutError("connect") from None
                finally:
                    timer.cancel()

            error = await caught(step.do("s", constant(2), connect))
            return str(error), asyncio.current_task().cancelling(), await step.do("t", returns(1))

        self.assertEqual(await self.outcome(run), ["connect", 0, 1])

    async def test_a_timeout_also_bounds_what_a_thread_returns_to_await(self):
        self.clock = ManualClock(patience=0)
        release, began = threading.Event(), threading.Event()

        async def run(event, step):
            async def never():
                await asyncio.Event().wait()

            def plain():
                began.set()
                release.wait()
                return never()

            config = {"timeout": 1000} | ONCE
            return type(await caught(step.do("s", config, plain))).__name__

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await until(began.is_set)
            release.set()  # the answer and the timeout come in one turn of the loop
            time.sleep(0.05)
            await self.clock.advance(1000)
            self.assertEqual(await instance.result(), "WorkflowTimeoutError")

    async def test_a_callback_that_has_cancelled_its_task_may_still_return(self):
        async def run(event, step):
            async def at_once():
                asyncio.current_task().cancel()
                return 1

            return await step.do("s", ONCE, at_once), asyncio.current_task().cancelling()

        self.assertEqual(await self.lives(run), [1, 0])

    async def test_a_nested_step_still_in_flight_is_joined_when_its_outer_step_is_retried(self):
        ran = []
        slow = asyncio.Event()

        async def run(event, step):
            async def fails():
                raise ValueError

            async def patient():
                ran.append(1)
                await slow.wait()
                return len(ran)

            async def outer(ctx):
                calls = [step.do("patient", ONCE, patient)]
                calls += [step.do("fails", ONCE, fails)] if ctx.attempt == 1 else []
                return (await asyncio.gather(*calls))[0]

            return await step.do("outer", constant(1), outer)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance("1 minute")
            slow.set()
            self.assertEqual(await self.finish(instance), 1)
        self.assertEqual(ran, [1])
        ends = "SELECT type FROM journal WHERE step LIKE '%patient%' AND type <> 'start'"
        self.assertEqual(self.rows(ends), [("done",)])

    async def test_cpu_time_of_a_nested_step_counts_once(self):
        def burn(ms):
            end = time.thread_time() + ms / 1000
            while time.thread_time() < end:
                pass

        async def run(event, step):
            async def inner():
                burn(50)

            async def outer():
                await step.do("inner", inner)
                await asyncio.gather(step.do("inner", inner))

            await step.do("outer", outer)

        async with self.engine() as engine:
            await self.finish(await engine.bind(workflow(run)).create())
            self.assertTrue(99 < (await engine.usage()).cpu_ms < 140)

    async def test_a_call_that_is_cancelled_before_it_begins_is_not_open_any_more(self):
        async def run(event, step):
            task = asyncio.create_task(step.do("never", returns(1)))
            task.cancel()
            await asyncio.wait({task})
            step.do("closed", returns(1)).close()
            return len(step._run.unawaited) + len(step._run.active)

        self.assertEqual(await self.outcome(run), 0)

    async def test_steps_that_wait_for_a_pause_to_end_hold_no_thread(self):
        go = asyncio.Event()

        async def run(event, step):
            async def outer():
                await go.wait()
                return await step.do("inner", lambda: "inner")

            many = (step.do("many", lambda: time.sleep(0.02)) for _ in range(100))
            await asyncio.gather(step.do("outer", outer), *many)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            other = engine.bind(workflow(one_step, "Other"))
            await until(lambda: engine.threads.slots.locked())
            await instance.pause()
            another = await other.create(params=1)
            self.assertEqual(await another.result(), 1)
            go.set()

            async def paused():
                return (await instance.status()).status == "paused"

            await until(paused)

    async def test_a_callback_that_ignores_its_cancellation_is_abandoned_with_a_warning(self):
        self.clock = ManualClock(patience=0)
        end = asyncio.Event()

        async def run(event, step):
            async def callback():
                while not end.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await end.wait()

            error = await caught(step.do("stubborn", {"timeout": 1000} | ONCE, callback))
            return type(error).__name__

        with grace(0.1), self.assertLogs("workflows", "WARNING") as logs:
            async with self.engine() as engine:
                instance = await engine.bind(workflow(run)).create()
                await self.clock.advance(1000)
                self.assertEqual(await instance.result(), "WorkflowTimeoutError")
        self.assertIn("stubborn", logs.output[0])
        self.assertEqual(len(logs.output), 1, "nobody waits for it again")
        end.set()

    async def test_what_a_callback_has_left_behind_writes_no_start_after_the_end(self):
        left = []

        async def run(event, step):
            async def callback():
                if not left:
                    left.append(asyncio.create_task(later()))
                    raise ValueError

            async def later():
                await asyncio.sleep(0.01)
                await step._run.engine.call(workflows.nothing)

            await step.do("s", constant(1, "1 hour"), callback)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await left[0]
            self.assertEqual((await instance.status()).status, "waiting")
            self.assertEqual((await engine.usage()).steps, 1)
            await self.finish(instance)
        events = self.rows("SELECT type FROM journal WHERE step IS NOT NULL AND type != 'start'")
        self.assertEqual(events, [("failed",), ("due",), ("done",)])
        starts = self.rows("SELECT seq FROM journal WHERE type = 'start' AND attempt = 1")
        ends = self.rows("SELECT seq FROM journal WHERE type = 'failed'")
        self.assertLess(starts, ends)

    async def test_a_callbacks_task_that_somebody_cancels_before_it_begins_fails(self):
        async def run(event, step):
            async def kill():
                for _ in range(5):
                    for task in step._run.callbacks:
                        task.cancel()
                    await asyncio.sleep(0)

            killer = asyncio.create_task(kill())
            result = await step.do("s", constant(9), returns(5))
            await killer
            return result

        self.assertEqual(await self.outcome(run), 5)

    async def test_the_step_calls_of_an_abandoned_callback_are_cancelled(self):
        self.clock = ManualClock(patience=0)
        self.enterContext(grace(0.1))
        end, cancelled = asyncio.Event(), []

        async def run(event, step):
            async def inner():
                try:
                    await end.wait()
                except asyncio.CancelledError:
                    cancelled.append("inner")
                    raise

            async def callback():
                call = asyncio.create_task(step.do("inner", inner))
                while not end.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await end.wait()
                call.cancel()

            await caught(step.do("stubborn", {"timeout": 1000} | ONCE, callback))
            await asyncio.sleep(0.01)
            return list(cancelled)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance(1000)
            result = await instance.result()
            end.set()
        self.assertEqual(result, ["inner"])

    async def test_asyncio_works_inside_a_callback(self):
        async def run(event, step):
            async def timeout():
                try:
                    async with asyncio.timeout(0):
                        await asyncio.sleep(9)
                except TimeoutError:
                    return "timeout"

            async def wait_for():
                try:
                    await asyncio.wait_for(asyncio.sleep(9), 0.001)
                except TimeoutError:
                    return "wait_for"

            async def group():
                try:
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(raises(KeyError())())
                        await asyncio.sleep(9)
                except* KeyError:
                    pass

            async def current():
                before = asyncio.current_task()
                await asyncio.sleep(0)
                return before is asyncio.current_task() and before.cancelling() == 0

            loop = asyncio.get_running_loop()
            for _ in range(3):
                for callback, expected in (
                    (timeout, "timeout"),
                    (wait_for, "wait_for"),
                    (group, None),
                    (current, True),
                ):
                    ended = loop.create_future()

                    async def real(callback=callback, ended=ended):
                        try:
                            return await callback()
                        finally:
                            ended.set_result(None)

                    call = asyncio.create_task(step.do("s", ONCE, real))
                    await asyncio.wait_for(ended, 1)
                    self.assertEqual(await call, expected)
            return asyncio.current_task().cancelling()

        self.assertEqual(await self.outcome(run), 0)


class Replay(Lives):
    """3.1 to 3.3: identity, order, concurrency, cancellation."""

    async def test_a_finished_step_returns_its_result_without_its_callback(self):
        ran = []

        async def run(event, step):
            async def callback():
                ran.append(1)
                return len(ran)

            async def fails():
                ran.append(1)
                raise KeyError(len(ran))

            got = [await step.do("s", callback), str(await caught(step.do("f", ONCE, fails)))]
            return got

        self.assertEqual(await self.lives(run), [1, "2"])
        self.assertEqual(len(ran), 2)

    async def test_kinds_count_their_names_apart_from_1(self):
        async def run(event, step):
            await step.sleep("n", 0)
            count = lambda ctx: ctx.step.count  # noqa: E731
            got = [await step.do("n", count), await step.do("m", count), await step.do("n", count)]
            await step.sleep_until("n", 0)
            return got

        self.assertEqual(await self.outcome(run), [1, 1, 2])
        keys = {key for (key,) in self.rows("SELECT step FROM journal WHERE step LIKE 'sleep%'")}
        self.assertEqual(len(keys), 2)

    async def test_the_count_is_taken_at_the_call_and_the_start_at_the_await(self):
        started = []

        async def run(event, step):
            async def callback(ctx):
                started.append(ctx.step.count)
                return ctx.step.count

            first, second = step.do("s", callback), step.do("s", callback)
            await asyncio.sleep(0)
            self.assertEqual(started, [])
            return [await second, await first]

        self.assertEqual(await self.outcome(run), [2, 1])

    async def test_a_step_call_is_a_coroutine_for_asyncio(self):
        async def run(event, step):
            self.assertIsInstance(step.sleep("x", 0), collections.abc.Coroutine)
            call = step.do("s", returns(0))
            got = [await call]
            with self.assertRaises(RuntimeError):
                await call
            got.append(await asyncio.create_task(step.do("s", returns(1))))
            got += await asyncio.gather(step.do("s", returns(2)), step.do("s", returns(3)))
            got.append(await asyncio.wait_for(step.do("s", returns(4)), 5))
            got.append(await asyncio.shield(step.do("s", returns(5))))
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(step.do("s", returns(6)))
            for each in asyncio.as_completed([step.do("s", returns(7))]):
                got.append(await each)
            return [*got, task.result()]

        self.assertEqual(await self.lives(run), [0, 1, 2, 3, 4, 5, 7, 6])

    async def test_wait_takes_the_same_branch_in_every_life(self):
        branches = []
        gates = [asyncio.Event() for _ in range(3)]

        async def run(event, step):
            async def slow(number):
                await gates[number].wait()
                gates[0].set()
                return number

            left = {asyncio.create_task(step.do("s", functools.partial(slow, n))) for n in range(3)}
            order = []
            while left:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                order.append([task.result() for task in done])
                gates[1].set()
            branches.append(order)

        gates[2].set()
        await self.lives(run)
        self.assertEqual(branches, [[[2], [0], [1]]] * 3)

    async def test_results_are_given_one_at_a_time_in_their_order_also_with_delays_in_between(self):
        orders = []

        async def run(event, step):
            order = []

            async def strand(name, turns):
                for number in range(3):
                    await step.do(f"{name}{number}", returns(None))
                    order.append(f"{name}{number}")
                    for _ in range(turns):
                        await asyncio.sleep(0)

            await asyncio.gather(strand("a", 0), strand("b", 3), strand("c", 7))
            orders.append(order)

        await self.lives(run)
        self.assertEqual(orders[0], orders[1])
        self.assertEqual(orders[0], orders[2])

    async def test_a_step_call_holds_up_the_next_result_like_a_result(self):
        orders = []

        async def turns(count):
            for _ in range(count):
                await asyncio.sleep(0)

        async def run(event, step):
            order, naps = [], []

            async def calling():
                await step.do("first", returns(1))
                await turns(8)
                naps.append(asyncio.create_task(step.sleep("nap", "1 minute")))
                await turns(8)
                order.append("called")

            async def other():
                await step.do("second", functools.partial(turns, 100))
                order.append("second")

            await asyncio.gather(calling(), other())
            await naps[0]
            orders.append(order)

        await self.lives(run)
        self.assertEqual(orders, [["called", "second"]] * 3)

    async def test_equal_names_in_several_tasks_keep_their_results_in_every_life(self):
        seen = []

        async def run(event, step):
            async def fetch(name, turns=0):
                for _ in range(turns):
                    await asyncio.sleep(0)
                return await step.do("fetch", returns(name))

            tasks = [asyncio.create_task(fetch(f"x{turns}", turns)) for turns in range(4)]
            got = [await fetch("a"), await fetch("b"), await fetch("c")]
            seen.append([*got, *await asyncio.gather(*tasks)])

        await self.lives(run)
        self.assertEqual(seen, [["a", "b", "c", "x0", "x1", "x2", "x3"]] * len(seen))
        self.assertGreater(len(seen), 2)

    async def test_a_result_reaches_run_through_layers_of_tasks_before_the_next(self):
        seen = []
        gate = asyncio.Event()

        async def run(event, step):
            await asyncio.gather(*(step.do("warm up", returns(n)) for n in range(20)))

            async def layers(depth):
                if depth:
                    return await asyncio.create_task(layers(depth - 1))
                return await step.do("deep", returns(None))

            deep = asyncio.create_task(layers(4))
            flat = asyncio.create_task(step.do("flat", gate.wait))
            done, _ = await asyncio.wait({deep, flat}, return_when=asyncio.FIRST_COMPLETED)
            seen.append([deep in done, flat in done])
            gate.set()
            await asyncio.gather(deep, flat)

        await self.lives(run)
        self.assertEqual(seen, [[True, False]] * 3)

    async def test_a_result_whose_call_never_comes_is_skipped_with_a_warning(self):
        lives = []

        async def run(event, step):
            lives.append(1)
            if len(lives) == 1:
                await step.do("only at first", returns(1))
            await step.do("s", returns(2))
            if len(lives) == 1:
                await step.sleep("rest", "1 hour")
            return await step.do("t", returns(3))

        with self.assertLogs("workflows", "WARNING") as logs:
            self.assertEqual(await self.lives(run), 3)
        self.assertIn("only at first-1", " ".join(logs.output))

    async def test_when_one_of_a_gather_fails_and_run_goes_on_the_others_complete(self):
        ended = asyncio.Event()

        async def run(event, step):
            async def slow():
                await asyncio.sleep(0.01)
                ended.set()
                return "slow"

            slow_call = asyncio.create_task(step.do("slow", slow))
            failing = step.do("fails", ONCE, raises(KeyError("k")))
            error = await caught(asyncio.gather(slow_call, failing))
            await asyncio.wait_for(ended.wait(), 1)
            return [str(error), await slow_call]

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            self.assertEqual(await asyncio.wait_for(instance.result(), 3), ["'k'", "slow"])

    async def test_a_failed_member_of_a_task_group_cancels_the_others_in_every_life(self):
        ran = []

        async def run(event, step):
            async def slow():
                ran.append("slow")
                await asyncio.Event().wait()

            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(step.do("slow", slow))
                    tasks.create_task(step.do("fails", ONCE, raises(KeyError("k"))))
            except* KeyError as group:
                got = [str(error) for error in group.exceptions]
            await step.do("after", returns(1))
            return got

        self.assertEqual(await self.lives(run), ["'k'"])
        self.assertEqual(ran, ["slow"])

    async def test_what_run_cancels_is_recorded_and_stays_pending_until_cancelled_again(self):
        ran, seen = [], []

        async def run(event, step):
            async def stuck():
                ran.append("stuck")
                await asyncio.Event().wait()

            task = asyncio.create_task(step.do("stuck", stuck))
            await step.do("first", returns(1))
            self.assertFalse(task.done())
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            seen.append(task.cancelled())
            await step.do("second", returns(2))

        await self.lives(run)
        self.assertEqual((ran, seen), (["stuck"], [True] * len(seen)))
        sql = "SELECT type, step FROM journal WHERE type IN ('done', 'cancel') ORDER BY seq"
        told = [f"{type} {key.split()[1]}" for type, key in self.rows(sql)]
        self.assertEqual(told, ["done first", "cancel stuck", "done second"])

    async def test_what_run_cancelled_before_it_saw_the_result_has_none_in_any_life(self):
        gates, seen = [], []

        async def run(event, step):
            gates.append(asyncio.Event())
            nap = asyncio.create_task(step.sleep("nap", "1 minute"))
            await gates[-1].wait()
            nap.cancel()  # its end is recorded, but the instance has no slot
            await asyncio.gather(nap, return_exceptions=True)
            seen.append(nap.cancelled())
            await step.sleep("rest", "1 hour")

        other, made = Gate(), workflow(run)
        limits = dataclasses.replace(FOREVER, running=1)
        async with self.engine(limits=limits, hibernate_after="1 hour") as engine:
            await engine.bind(made).create(id="i")
            await self.clock.settle()
            await engine.bind(workflow(other.run, "Other")).create()
            await self.clock.advance("1 minute")
            gates[0].set()
            await self.clock.settle()
            other.open.set()
            await self.clock.settle()
        async with self.engine() as engine:
            instance = await engine.bind(made).get("i")
            await self.clock.advance("2 hours")
            gates[1].set()
            await self.finish(instance)
        self.assertEqual(seen, [True, True])

    async def test_an_asyncio_timeout_in_run_starts_over_with_each_life(self):
        ran = []

        async def run(event, step):
            async def stuck():
                ran.append("stuck")
                await asyncio.Event().wait()

            try:
                async with asyncio.timeout(0.1):
                    await step.do("stuck", stuck)
            except TimeoutError:
                await step.do("after", returns(1))
            await step.wait_for_event("wait", "go")
            return "timed out"

        made = workflow(run)
        async with self.engine() as engine:
            instance = await engine.bind(made).create(id="i")
            while (await instance.status()).status != "waiting":
                await asyncio.sleep(0.01)
        async with self.engine() as engine:
            instance = await engine.bind(made).get("i")
            await instance.send_event(type="go")
            await self.clock.settle()
            self.assertEqual((await instance.status()).status, "running")  # it is held
            await self.clock.advance("1 minute")
            self.assertEqual(await asyncio.wait_for(instance.result(), 2), "timed out")
        self.assertEqual(ran, ["stuck"])

    async def test_a_run_that_went_on_after_its_timeout_is_not_unloaded(self):
        seen, gate = [], asyncio.Event()

        async def run(event, step):
            try:
                async with asyncio.timeout(0.05):
                    await step.wait_for_event("w", "t")
            except TimeoutError:
                seen.append("timed out")
            await gate.wait()  # no step, and no timer of the loop
            return "done"

        async with Engine(self.path, hibernate_after=10) as engine:
            instance = await engine.bind(workflow(run)).create()
            await until(lambda: seen)
            await asyncio.sleep(0.2)
            gate.set()
            self.assertEqual(await asyncio.wait_for(instance.result(), 5), "done")
        self.assertEqual(seen, ["timed out"])

    async def test_a_nested_step_that_was_stopped_in_its_retry_delay_begins_again(self):
        self.clock = ManualClock(patience=0)
        ran = []

        async def run(event, step):
            async def inner(ctx):
                ran.append(ctx.attempt)
                if len(ran) == 1:
                    raise ValueError
                return 5

            patient = {"retries": {"limit": 3, "delay": "1 day"}}
            again = {"retries": {"limit": 1, "delay": "1 hour"}, "timeout": "1 minute"}
            return await step.do("outer", again, lambda: step.do("inner", patient, inner))

        made = workflow(run)
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.advance("2 minutes")
        async with self.engine() as engine:
            instance = await engine.bind(made).get("i")
            await self.clock.advance("1 hour")
            self.assertEqual(await asyncio.wait_for(instance.result(), 2), 5)
        self.assertEqual(ran, [1, 2])

    async def test_a_cancelled_sleep_or_wait_never_ends_by_itself(self):
        async def run(event, step):
            calls = [step.sleep("s", "1 minute"), step.wait_for_event("w", "t", timeout=60_000)]
            tasks = [asyncio.create_task(call) for call in calls]
            await step.do("a", returns(1))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await step.do("b", returns(1))
            return [task.cancelled() for task in tasks]

        self.assertEqual(await self.lives(run), [True, True])

    async def test_a_cancelled_wait_leaves_its_event_to_the_next(self):
        async def run(event, step):
            task = asyncio.create_task(step.wait_for_event("a", "t"))
            await step.do("s", returns(1))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await step.sleep("rest", "1 hour")
            return (await step.wait_for_event("b", "t")).payload

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await instance.send_event(type="t", payload="kept")
            self.assertEqual(await self.finish(instance), "kept")

    async def test_what_was_recorded_behind_a_cancellation_waits_for_it_in_every_life(self):
        seen = []

        async def run(event, step):
            async def pay(who):
                return await step.do("pay", returns(f"paid by {who}"))

            async def turns(count):
                for _ in range(count):
                    await asyncio.sleep(0)

            async def hasty():
                never = asyncio.create_task(step.wait_for_event("never", "never"))
                await turns(50)  # like `asyncio.timeout`, not recorded
                never.cancel()
                return await pay("hasty")

            async def slow():
                await step.do("slow", functools.partial(turns, 100))
                return await pay("slow")

            tasks = [asyncio.create_task(hasty()), asyncio.create_task(slow())]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            seen.append([tasks[0] in done, *await asyncio.gather(*tasks)])

        await self.lives(run)
        self.assertEqual(seen, [[True, "paid by hasty", "paid by slow"]] * 3)

    async def test_a_result_that_run_had_not_seen_when_it_cancelled_comes_after_that(self):
        seen = []

        async def run(event, step):
            async def hasty():
                never = asyncio.create_task(step.wait_for_event("never", "never"))
                for _ in range(50 if seen else 6):  # like a timer: never twice the same
                    await asyncio.sleep(0)
                never.cancel()

            tasks = [asyncio.create_task(hasty())]
            tasks.append(asyncio.create_task(step.do("quick", returns(1))))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            seen.append([task in done for task in tasks])
            await asyncio.gather(*tasks)

        await self.lives(run)
        rows = self.rows("SELECT type FROM journal WHERE type IN ('done', 'cancel') ORDER BY seq")
        self.assertEqual(rows, [("done",), ("cancel",)])
        self.assertEqual(seen, [[True, False]] * 3)

    async def test_what_was_skipped_is_not_what_run_has_seen_last(self):
        for what in ("a result", "a cancellation"):
            with self.subTest(what):
                self.setUp()
                lives = []

                async def run(event, step, what=what, lives=lives):
                    lives.append(1)
                    never = asyncio.create_task(step.wait_for_event("never", "never"))

                    async def turns(count):
                        for _ in range(count):
                            await asyncio.sleep(0)

                    async def early_or_late():
                        await turns(5 if len(lives) == 1 else 100)
                        if what == "a result":
                            await step.do("skipped", returns(1))
                        else:
                            lost = asyncio.create_task(step.wait_for_event("skipped", "never"))
                            await turns(5)
                            lost.cancel()
                            await asyncio.wait([lost])

                    other = asyncio.create_task(early_or_late())
                    await step.do("seen", functools.partial(turns, 30))
                    await step.sleep("until the next life", "1 hour")
                    await other
                    never.cancel()
                    await asyncio.wait([never])

                await self.lives(run, 2)  # it ends

    def test_many_results_that_were_not_seen_before_many_cancellations(self):
        keys = [f"do\ns\n{n}" for n in range(20_000)]
        rows = [workflows.Row("done", key, 1, "1", "", 0, seq) for seq, key in enumerate(keys)]
        last = keys[0]
        for key in keys[10_000:]:
            rows.append(workflows.Row("cancel", key, extra=json.dumps(last)))
            last = key
        began = time.monotonic()
        _, inbox = workflows.fold(rows)
        self.assertLess(time.monotonic() - began, 5)
        self.assertEqual([*inbox], [keys[0], *keys[10_000:], *keys[1:10_000]])

    async def test_a_call_that_is_cancelled_just_before_the_next_call_is_recorded_with_that(self):
        began = []

        async def forever():
            began.append(1)
            await asyncio.sleep(3600)

        async with self.engine() as engine:
            for kind in ("do", "wait"):

                async def run(event, step, kind=kind):
                    loser = step.do("a", forever) if kind == "do" else step.wait_for_event("a", "t")
                    task = asyncio.create_task(loser)
                    await step.sleep("the winner", 1)
                    task.cancel()
                    return [(await step.wait_for_event("b", "t")).payload for _ in range(2)]

                instance = await engine.bind(workflow(run, kind)).create()
                for n in range(2):
                    await self.clock.advance("1 hour")  # hibernates
                    await instance.send_event(type="t", payload=n)
                self.assertEqual(await self.finish(instance), [0, 1])
        self.assertEqual(began, [1])
        self.assertEqual(self.rows("SELECT count(*) FROM journal WHERE type = 'cancel'"), [(2,)])

    async def test_a_task_that_is_cancelled_before_it_starts_never_begins_its_step(self):
        async def run(event, step):
            task = asyncio.create_task(step.do("never", returns(1)))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return await step.do("next", returns(2))

        self.assertEqual(await self.lives(run), 2)
        self.assertEqual(self.rows("SELECT 1 FROM journal WHERE step LIKE '%never%'"), [])

    async def test_what_run_has_cancelled_is_recorded_before_its_end(self):
        async def run(event, step):
            task = asyncio.create_task(step.sleep("nap", "1 hour"))
            await step.do("s", returns(1))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        await self.outcome(run)
        types = [type for (type,) in self.rows("SELECT type FROM journal ORDER BY seq")]
        self.assertEqual(types[-2:], ["cancel", "complete"])

    async def test_a_step_in_flight_when_run_ends_is_cancelled(self):
        cancelled = []

        async def run(event, step):
            async def stuck():
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.append(1)

            self.task = asyncio.create_task(step.do("stuck", stuck))
            await step.do("s", returns(1))
            return "done"

        self.assertEqual(await self.outcome(run), "done")
        self.assertEqual(cancelled, [1])
        ends = "type IN ('done', 'failed', 'error', 'cancel') AND step LIKE '%stuck%'"
        self.assertEqual(self.rows(f"SELECT 1 FROM journal WHERE {ends}"), [])
        self.assertEqual(len(self.rows("SELECT 1 FROM journal WHERE step LIKE '%stuck%'")), 1)

    async def test_an_instance_whose_task_is_cancelled_from_outside_is_not_failed(self):
        tasks = []

        async def run(event, step):
            tasks.append(asyncio.current_task())
            await step.do("s", returns(1))
            if len(tasks) == 1:
                await asyncio.Event().wait()
            return "second life"

        made = workflow(run)
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.settle()
            tasks[0].cancel()
            await asyncio.sleep(0)
        async with self.engine() as engine:
            self.assertEqual(await self.finish(await engine.bind(made).get("i")), "second life")

    async def test_a_run_that_raises_cancelled_error_itself_is_errored(self):
        async def run(event, step):
            raise asyncio.CancelledError("mine")

        error = await self.assertCode("workflow.error", self.outcome(run))
        self.assertEqual(error.name, "CancelledError")

    async def test_limit_steps_counts_in_every_life_alike(self):
        async def run(event, step):
            for number in range(2):
                await step.do("s", returns(number))
                await step.sleep("rest", "1 hour")
            error = await caught(step.do("s", returns(3)))
            return [type(error).__name__, error.code, "2" in str(error)]

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run), steps=2).create()
            self.assertEqual(
                await self.finish(instance), ["WorkflowFatalError", "limit.steps", True]
            )

    async def test_a_nested_step_counts_once_however_often_it_is_called(self):
        calls = []

        async def run(event, step):
            async def outer():
                calls.append(await step.do("inner", returns(1)))
                if len(calls) < 3:
                    raise ValueError

            await step.do("outer", constant(5, 0), outer)

        async with self.engine() as engine:
            await self.finish(await engine.bind(workflow(run), steps=2).create())
        self.assertEqual(calls, [1, 1, 1])

    async def test_a_branch_that_wakes_up_by_itself_gets_its_recorded_result(self):
        """… also if the run was waiting, and nothing else would wake it."""
        lives, go = [], asyncio.Event()

        async def run(event, step):
            lives.append(1)

            async def branch():
                if len(lives) > 1:
                    await go.wait()
                await step.do("recorded", returns(1))
                await step.do("begun", asyncio.Event().wait if len(lives) == 1 else returns(2))

            await asyncio.gather(branch(), step.sleep("long", "1 day"))

        made = workflow(run)
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.settle()
        async with self.engine() as engine:
            instance = await engine.bind(made).get("i")
            await self.clock.settle()
            self.assertEqual((await instance.status()).status, "waiting")
            go.set()
            await self.clock.settle()
            done = "SELECT count(*) FROM journal WHERE type = 'done'"
            self.assertEqual(self.rows(done), [(2,)])


class RandomPrograms(Lives):
    """Programs made by chance, of concurrent strands that share step names and cancel each other:
    what each life of one sees must be what the others saw. Each failure names its seed."""

    def strands(self, seed: int, step: Any, trace: list[Any]) -> Any:
        chance, world = random.Random(seed), random.Random()  # how long a callback takes varies

        def call(tag: str) -> Any:
            async def callback() -> str:
                for _ in range(world.choice([0, 0, 1, 5, 20, 60])):
                    await asyncio.sleep(0)
                if world.random() < 0.3:
                    raise KeyError(tag)
                return tag

            kind, name = chance.random(), chance.choice("nm")
            if kind < 0.15:
                return step.sleep(name, chance.choice([0, 1, 10, 5000]))
            if kind < 0.25:
                return step.wait_for_event(name, "t", timeout=chance.choice([0, 10, 3000]))
            retries = {"limit": chance.choice([0, 1]), "delay": chance.choice([0, 5, 5000])}
            return step.do(name, {"retries": retries}, callback)

        async def strand(name: str, depth: int) -> None:
            mine = random.Random(f"{seed}{name}")
            for n in range(mine.randint(1, 4)):
                what, below = mine.random(), mine.randint(1, 3)
                try:
                    if what < 0.5 or depth > 1:
                        made = call(f"{name}.{n}")
                        trace.append((name, made.kind, made.name, made.count))
                        trace.append((name, n, str(await made)))
                        continue
                    more = [strand(f"{name}{n}{i}", depth + 1) for i in range(below)]
                    if what < 0.7:
                        await asyncio.gather(*more)
                    elif what < 0.8:
                        async with asyncio.TaskGroup() as group:
                            for one in more:
                                group.create_task(one)
                    else:
                        tasks = [asyncio.create_task(one) for one in more]
                        first = asyncio.FIRST_COMPLETED
                        done, left = await asyncio.wait(tasks, return_when=first)
                        trace.append((name, n, [task in done for task in tasks]))
                        for task in left if mine.random() < 0.5 else ():
                            task.cancel()
                        await asyncio.gather(*tasks, return_exceptions=True)
                except Exception as error:
                    trace.append((name, n, type(error).__name__))

        return strand("r", 0)

    async def test_every_life_sees_what_the_others_saw(self) -> None:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks whose errors nobody wants
        for seed in (1, 2, 33, 198, 219, 344, 440, random.randrange(10**6)):
            with self.subTest(seed):
                self.setUp()
                traces: list[list[Any]] = []

                async def run(
                    event: Any, step: Any, seed: int = seed, traces: list[Any] = traces
                ) -> None:
                    traces.append([])
                    await self.strands(seed, step, traces[-1])
                    traces[-1].append("end")

                await self.lives(run, 2)
                whole = [trace[: trace.index("end")] for trace in traces if "end" in trace]
                self.assertGreaterEqual(len(whole), 2)
                for other in whole[1:]:
                    self.assertEqual(other, whole[0])


class Nested(Lives):
    """3.2 and 3.13: steps inside callbacks."""

    async def test_a_step_in_a_callback_is_one_of_its_own_with_counts_per_attempt(self):
        ran = []

        async def run(event, step):
            await step.do("inner", returns("outside"))

            async def outer(ctx):
                async def inner(ctx):
                    ran.append(ctx.step.count)
                    return ["inner", ctx.step.count]

                got = [await step.do("inner", inner), await step.do("inner", inner)]
                if ctx.attempt < 3:
                    raise ValueError
                return got

            return await step.do("outer", constant(5, delay), outer)

        for delay in (1, "1 hour"):  # in one life, and in several
            with self.subTest(delay):
                self.setUp()
                ran.clear()
                self.assertEqual(await self.outcome(run), [["inner", 1], ["inner", 2]])
                self.assertEqual(ran, [1, 2])

    async def test_a_step_call_can_not_be_awaited_in_another_loop(self):
        async def run(event, step):
            try:
                await step.do("outer", lambda: asyncio.run(step.do("inner", returns(1))))
            except WorkflowFatalError as error:
                return str(error)

        self.assertIn("step 'inner' is awaited in another event loop", await self.outcome(run))

    async def test_a_step_has_started_before_those_that_its_callback_calls(self):
        async def run(event, step):
            async def outer():
                await step.sleep("inner", 1)

            await step.do("outer", outer)

        await self.outcome(run)
        rows = self.rows("SELECT type, step FROM journal WHERE step IS NOT NULL ORDER BY seq")
        told = [f"{type} {key.split()[-2]}" for type, key in rows]
        self.assertEqual(told, ["start outer", "sleep inner", "slept inner", "done outer"])

    async def test_an_error_of_a_nested_step_is_the_same_in_every_attempt(self):
        seen = []

        async def run(event, step):
            async def outer(ctx):
                seen.append(str(await caught(step.do("inner", ONCE, raises(KeyError("k"))))))
                if ctx.attempt < 3:
                    raise ValueError

            await step.do("outer", constant(5), outer)

        await self.outcome(run)
        self.assertEqual(seen, ["'k'"] * 3)

    async def test_a_call_in_a_callback_of_another_run_is_one_of_its_own_run(self):
        steps = []

        async def run(event, step):
            if event.payload:
                steps.append(step)
                await step.wait_for_event("w", "t")
            else:
                await step.do("outer", lambda: steps[0].do("inner", returns(1)))

        async with self.engine() as engine:
            bound = engine.bind(workflow(run))
            first = await bound.create(params=1)
            await self.clock.settle()
            await self.finish(await bound.create(params=0))
            await first.terminate()
        keys = self.rows("SELECT DISTINCT step FROM journal WHERE step LIKE '%inner%'")
        self.assertEqual(keys, [("do\ninner\n1",)])

    async def test_an_event_for_a_wait_that_was_just_broken_off_is_delivered_once(self):
        async def run(event, step):
            async def outer(ctx):
                call = step.wait_for_event("inner", "t")
                if ctx.attempt == 2:
                    return (await call).payload
                waiting = asyncio.create_task(call)
                await asyncio.sleep(0.01)
                waiting.cancel()
                post_event(engine, "1")  # which it gets before the loop cancels it
                await asyncio.wait([waiting])
                raise ValueError

            got = [await step.do("outer", constant(1, delay), outer)]
            await caught(step.wait_for_event("outside", "t", timeout="1 hour"))
            return got

        for delay in (1, "1 hour"):  # in one life, and in several
            with self.subTest(delay):
                self.setUp()
                async with self.engine() as engine:
                    instance = await engine.bind(workflow(run)).create(id="i")
                    self.assertEqual(await self.finish(instance), [1])

    async def test_an_event_for_a_wait_that_the_callback_cancels_in_that_moment_is_kept(self):
        tasks = []

        async def run(event, step):
            async def outer():
                tasks.append(asyncio.create_task(step.wait_for_event("a", "t")))
                await asyncio.wait(tasks)
                return (await step.wait_for_event("b", "t", timeout=0)).payload

            return await step.do("outer", ONCE, outer)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await instance.send_event(type="t", payload="kept")
            tasks[0].cancel()
            self.assertEqual(await self.finish(instance), "kept")

    async def test_a_call_that_is_cancelled_while_its_start_is_stored_has_not_begun(self):
        tasks = []

        async def run(event, step):
            step._run.careful = True  # as when the process has died before

            async def outer():
                inner = step.do("inner", ONCE, returns(1))
                if tasks:
                    return await inner
                tasks.append(asyncio.create_task(inner))
                await asyncio.sleep(0)
                tasks[0].cancel()
                await asyncio.wait(tasks)
                raise ValueError

            return await step.do("outer", constant(1), outer)

        self.assertEqual(await self.outcome(run), 1)
        rows = self.rows("SELECT type, attempt FROM journal WHERE step LIKE '%inner%' ORDER BY seq")
        self.assertEqual(rows, [("start", 1), ("stop", None), ("start", 1), ("done", 1)])

    async def test_a_nested_call_that_is_left_behind_is_cancelled_when_the_step_ends(self):
        async def run(event, step):
            for error in (ValueError, None):
                left, attempts = [], []

                async def outer(error=error, left=left, attempts=attempts):
                    attempts.append(1)
                    if len(attempts) == 1:
                        left.append(asyncio.create_task(step.wait_for_event("inner", "t")))
                        await asyncio.sleep(0)
                        raise ValueError
                    if error:
                        raise error

                await asyncio.gather(step.do("outer", constant(1), outer), return_exceptions=True)
                await asyncio.wait(left)
            return (await step.wait_for_event("top", "t")).payload

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance(10)
            await instance.send_event(type="t", payload="kept")
            self.assertEqual(await self.finish(instance), "kept")
        waits = self.rows("SELECT type FROM journal WHERE step LIKE '%inner%' ORDER BY seq")
        self.assertEqual(waits, [("wait",), ("stop",)] * 2)

    async def test_what_a_callback_has_left_behind_takes_no_event_whatever_ends_its_step(self):
        for how in ("it ends", "it ends during a pause", "run cancels it", "run cancels its retry"):
            with self.subTest(how):
                self.setUp()
                gate = asyncio.Event()

                async def run(event, step, how=how, gate=gate):
                    async def outer():
                        asyncio.create_task(step.wait_for_event("inner", "t"))
                        await asyncio.sleep(0)
                        if how == "run cancels its retry":
                            raise ValueError
                        await gate.wait()

                    call = asyncio.create_task(step.do("outer", constant(9, "1 day"), outer))
                    if how.startswith("run"):
                        await step.sleep("a while", "1 second")
                        call.cancel()
                    await asyncio.wait([call])
                    return (await step.wait_for_event("top", "t")).payload

                async with self.engine() as engine:
                    instance = await engine.bind(workflow(run)).create()
                    await self.clock.settle()
                    if how == "it ends during a pause":
                        await instance.pause()
                    if how.startswith("it"):
                        gate.set()
                    await self.clock.advance("2 seconds")
                    await instance.send_event(type="t", payload="kept")
                    await instance.resume()
                    self.assertEqual(await self.finish(instance), "kept")

    async def test_what_a_callback_has_left_behind_begins_nothing_after_its_step(self):
        ran, left = [], []

        async def run(event, step):
            async def outer():
                async def later():
                    for _ in range(50):
                        await asyncio.sleep(0)
                    await step.do("inner", functools.partial(ran.append, 1))

                left.append(asyncio.create_task(later()))

            await step.do("outer", outer)
            await asyncio.wait(left)

        await self.outcome(run)
        self.assertIsInstance(left[0].exception(), WorkflowFatalError)
        self.assertEqual(ran, [])

    async def test_a_call_that_a_callback_has_made_for_run_is_not_left_behind(self):
        async def run(event, step):
            made = []

            async def outer():
                made.append(step.sleep("made", "1 second"))
                await asyncio.sleep(0)

            async def strand():
                while not made:
                    await asyncio.sleep(0)
                await made[0]
                return "slept"

            slept, _ = await asyncio.gather(strand(), step.do("outer", outer))
            return slept

        self.assertEqual(await self.outcome(run), "slept")

    async def test_what_a_callback_has_waited_for_in_an_earlier_life_takes_no_event(self):
        for how in ("another way", "an event comes first", "cancelled"):
            with self.subTest(how):
                self.setUp()
                gate, lives = asyncio.Event(), []

                async def run(event, step, how=how, gate=gate, lives=lives):
                    lives.append(1)

                    async def outer():
                        if len(lives) > 1:
                            return await gate.wait()
                        await step.wait_for_event("inner", "t")

                    call = asyncio.create_task(step.do("outer", outer))
                    if how == "cancelled" and len(lives) > 1:
                        await step.do("in time", returns(None))
                        call.cancel()
                        await asyncio.wait([call])
                    else:
                        await call
                    return (await step.wait_for_event("top", "t")).payload

                for _ in range(2):
                    async with self.engine() as engine:
                        bound = engine.bind(workflow(run))
                        if not lives:
                            await bound.create(id="i")
                        await self.clock.settle()
                        if len(lives) == 2:
                            instance = await bound.get("i")
                            if how == "another way":
                                gate.set()
                                await self.clock.settle()
                            await instance.send_event(type="t", payload="kept")
                            await self.clock.settle()
                            gate.set()
                            self.assertEqual(await self.finish(instance), "kept")

    async def test_a_race_inside_a_step_is_a_step(self):
        async def run(event, step):
            async def race():
                calls = [step.do("slow", asyncio.Event().wait), step.do("fast", returns("fast"))]
                tasks = [asyncio.create_task(call) for call in calls]
                done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in left:
                    task.cancel()
                return [task.result() for task in done]

            got = await step.do("race", race)
            return got

        self.assertEqual(await self.lives(run), ["fast"])

    async def test_a_plain_callback_may_return_a_step_call(self):
        async def run(event, step):
            return await step.do("outer", lambda: step.do("inner", lambda: "plain"))

        self.assertEqual(await self.lives(run), "plain")

    async def test_a_sleep_or_a_wait_inside_a_callback_is_warned_about(self):
        async def run(event, step):
            await step.do("outer", lambda: step.sleep("nap", 0))
            await step.do("outer", lambda: step.wait_for_event("news", "t", timeout=5000))

        logged = self.assertLogs("workflows", "WARNING")
        with logged as logs, contextlib.suppress(WorkflowTimeoutError):
            await self.outcome(run)
        self.assertIn("nap", logs.output[0])
        self.assertIn("news", logs.output[1])

    async def test_a_step_call_that_was_never_awaited_is_warned_about(self):
        async def run(event, step):
            step.do("forgotten", returns(1))

        with self.assertLogs("workflows", "WARNING") as logs:
            await self.outcome(run)
        self.assertIn("forgotten", logs.output[0])

    async def test_a_run_that_is_as_it_should_be_logs_nothing(self):
        async def run(event, step):
            async def race():
                task = asyncio.create_task(step.do("inner", asyncio.Event().wait))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            await step.do("race", race)
            task = asyncio.create_task(step.do("cancelled", asyncio.Event().wait))
            await step.do("s", lambda: step.do("inner", returns(1)))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await step.do("t", returns(1))

        with self.assertNoLogs("workflows", "WARNING"):
            await self.lives(run)


class Sleeps(Lives):
    """3.10 and 3.11: sleeps and events."""

    async def test_sleeps_take_their_time_and_return_none(self):
        async def run(event, step):
            began = self.clock.now()
            when = datetime.fromtimestamp(began / 1000 + 10, UTC)
            got = []
            for call in (
                step.sleep("s", "5 seconds"),
                step.sleep_until("u", when),
                step.sleep_until("u", began / 1000 + 20),
                step.sleep_until("u", began + 30_000),
                step.sleep_until("past", 0),
                step.sleep_until("past", when),
                step.sleep("s", timedelta(milliseconds=500)),
                step.sleep("s", 0),
            ):
                self.assertIsNone(await call)
                got.append(self.clock.now() - began)
            return got

        async with self.engine(hibernate_after="1 hour") as engine:
            got = await self.finish(await engine.bind(workflow(run)).create())
        self.assertEqual(got, [5000, 10_000, 20_000, *[30_000] * 3, 30_500, 30_500])

    async def test_a_year_may_be_slept_and_no_more(self):
        async def run(event, step):
            await step.sleep("s", "1 year")
            return (await caught(step.sleep("s", 365 * 86_400_000 + 1))).code

        self.assertEqual(await self.outcome(run), "limit.sleep")

    async def test_a_sleep_or_a_wait_begins_once_in_however_many_lives(self):
        async def run(event, step):
            naps = [step.sleep("nap", f"{n} hours") for n in range(3)]
            await asyncio.gather(*naps, step.wait_for_event("w", "t"))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance("3 hours")
            await instance.send_event(type="t")
            await self.finish(instance)
        begun = self.rows("SELECT count(*) FROM journal WHERE type IN ('sleep', 'wait')")
        self.assertEqual(begun, [(4,)])

    async def test_a_sleep_that_fell_due_while_nobody_ran_is_over_at_once(self):
        made = workflow(lambda event, step: step.sleep("s", "1 day"))
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.settle()
        await self.clock.advance("1 day")
        async with self.engine() as engine:
            instance = await engine.bind(made).get("i")
            await self.clock.settle()
            self.assertEqual((await instance.status()).status, "complete")

    async def test_an_event_reads_as_itself_and_falls_back_to_its_payload(self):
        payload = {"approved": True, "type": "mine", "deep": {"list": [1]}, "get": 5}

        async def run(event, step):
            got = await step.wait_for_event("w", {"type": "t-1", "timeout": "1 hour"})
            self.assertEqual(got.payload, payload)
            self.assertEqual((got.approved, got["approved"], got.get("approved")), (True,) * 3)
            self.assertEqual((got.type, got["type"], got.payload["type"]), ("t-1", "t-1", "mine"))
            self.assertEqual(sorted(got), ["payload", "timestamp", "type"])
            self.assertIsNone(got.get("nothing"))
            with self.assertRaises(AttributeError):
                got.nothing  # noqa: B018
            with self.assertRaises(KeyError):
                got["nothing"]
            with self.assertRaises(dataclasses.FrozenInstanceError):
                got.type = 1
            with self.assertRaisesRegex(TypeError, "read-only"):
                got.deep["list"].append(2)
            return [got.timestamp, copy.deepcopy(got).approved]

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await instance.sendEvent({"type": "t-1", "payload": payload})
            sent = datetime.fromtimestamp(self.clock.now() / 1000, UTC)
            self.assertEqual(await self.finish(instance), [sent, True])

    async def test_any_payload_is_delivered(self):
        payloads = [None, 5, "text", [1, 2], {}, b"x", False]

        async def run(event, step):
            got = [await step.wait_for_event("w", "t") for _ in payloads]
            with self.assertRaises(AttributeError):
                got[3].nothing  # noqa: B018
            return [each.payload for each in got]

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            for payload in payloads:
                await instance.send_event(type="t", payload=payload)
            self.assertEqual(await self.finish(instance), payloads)

    async def test_events_are_buffered_in_order_and_each_goes_to_one_waiter(self):
        async def run(event, step):
            await step.sleep("late", "1 hour")
            got = [(await step.wait_for_event("w", "a")).payload for _ in range(2)]
            both = (step.wait_for_event("x", "a"), step.wait_for_event("y", "a"))
            got += [each.payload for each in await asyncio.gather(*both)]
            return [*got, (await step.wait_for_event("w", "b", timeout=0)).payload]

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            for type, payload in (("a", 1), ("b", "b"), ("a", 2)):
                await instance.send_event(type=type, payload=payload)
            await self.clock.advance("2 hours")
            for payload in (3, 4):
                await instance.send_event(type="a", payload=payload)
            self.assertEqual(await self.finish(instance), [1, 2, 3, 4, "b"])

    async def test_a_wait_times_out_after_24_hours_or_what_is_given(self):
        async def run(event, step):
            began, got = self.clock.now(), []
            for options in ({}, {"timeout": 0}, {"timeout": "1 week"}):
                error = await caught(step.wait_for_event("w", "t", **options))
                got.append([type(error).__name__, self.clock.now() - began])
            return got

        async with self.engine(hibernate_after="30 days") as engine:
            got = await self.finish(await engine.bind(workflow(run)).create())
        day = 86_400_000
        self.assertEqual(got, [["WorkflowTimeoutError", day * n] for n in (1, 1, 8)])

    async def test_waits_that_end_at_once_end_in_the_order_in_which_they_began(self):
        async def run(event, step):
            naps = [step.sleep("nap", "1 hour") for _ in range(3)]
            await asyncio.gather(*naps, step.wait_for_event("w", "t", timeout="2 hours"))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            self.clock._now += 3_600_000  # and nobody has looked yet
            await instance.send_event(type="t")
        ended = self.rows("SELECT step FROM journal WHERE type IN ('slept', 'event') ORDER BY seq")
        self.assertEqual([step[-1] for (step,) in ended[:3]], ["1", "2", "3"])

    async def test_a_wait_that_finds_its_event_ends_when_it_begins(self):
        gate = asyncio.Event()

        async def late(step):
            await gate.wait()
            await step.wait_for_event("w", "t")

        async def run(event, step):
            await asyncio.gather(step.sleep("nap", "1 hour"), late(step))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await instance.send_event(type="t")
            await self.clock.settle()
            self.clock._now += 7_200_000  # the sleep was over before that, though nobody has looked
            gate.set()
            await self.finish(instance)
        ends = "SELECT type FROM journal WHERE type IN ('slept', 'event') ORDER BY seq"
        self.assertEqual(self.rows(ends), [("slept",), ("event",)])

    async def test_an_event_at_the_deadline_wins_and_a_later_one_goes_to_the_next_waiter(self):
        async def run(event, step):
            error = await caught(step.wait_for_event("a", "late", timeout="1 hour"))
            return [type(error).__name__, (await step.wait_for_event("b", "late")).payload]

        async def at_deadline(event, step):
            return (await step.wait_for_event("a", "t", timeout="1 hour")).payload

        for begin, kind, late, expected in (
            (at_deadline, "t", 0, "x"),
            (run, "late", 1, ["WorkflowTimeoutError", "x"]),
        ):
            with self.subTest(kind):
                self.setUp()
                made = workflow(begin)
                async with self.engine() as engine:
                    await engine.bind(made).create(id="i")
                    await self.clock.settle()
                async with self.engine() as client:  # nobody runs the instance
                    client.env.clear()
                    other = workflows.Workflow(client, "test", "TEST", 9)
                    await self.clock.advance(3_600_000 + late)
                    await (await other.get("i")).send_event(type=kind, payload="x")
                    await self.clock.advance("1 hour")
                async with self.engine() as engine:
                    instance = await engine.bind(made).get("i")
                    self.assertEqual(await self.finish(instance), expected)


class Unloading(Lives):
    """3.14: what is dropped when an instance hibernates or the engine closes."""

    async def test_finally_blocks_run_and_their_steps_do_nothing(self):
        log = []

        async def run(event, step):
            @contextlib.asynccontextmanager
            async def resource():
                log.append("open")
                try:
                    yield
                finally:
                    log.append("closed")

            async with resource():
                try:
                    await step.sleep("s", "1 hour")
                finally:
                    await step.do("cleanup", lambda: log.append("cleaned up"))
            return "done"

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance("10 seconds")
            self.assertEqual(log, ["open", "closed"])
            self.assertEqual(await self.finish(instance), "done")
        self.assertEqual(log, ["open", "closed", "open", "cleaned up", "closed"])

    async def test_the_outcome_of_an_unloaded_run_is_ignored_whatever_it_is(self):
        async def swallow(step):
            with contextlib.suppress(BaseException):
                await step.sleep("s", "1 hour")
            return "swallowed"

        async def another(step):
            try:
                await step.sleep("s", "1 hour")
            except BaseException:
                raise KeyError("another") from None

        async def gathered(step):
            return len(await asyncio.gather(step.sleep("s", "1 hour"), return_exceptions=True))

        async def group(step):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(step.sleep("s", "1 hour"))
                tasks.create_task(step.sleep("t", "1 hour"))

        async def loops(step):
            while True:
                try:
                    return await step.sleep("s", "1 hour")
                except asyncio.CancelledError:
                    continue

        async def shielded(step):
            return await asyncio.shield(step.sleep("s", "1 hour"))

        for wait in (swallow, another, gathered, group, loops, shielded):
            with self.subTest(wait.__name__):
                self.setUp()
                lives = []

                async def run(event, step, wait=wait, lives=lives):
                    lives.append(1)
                    await wait(step)
                    return await step.do("end", returns("ended"))

                with self.assertNoLogs("workflows", "WARNING"):
                    began = time.monotonic()
                    self.assertEqual(await self.lives(run, 3), "ended")
                    self.assertLess(time.monotonic() - began, 0.9)
                self.assertGreater(len(lives), 2)

    async def test_a_loop_that_catches_everything_does_not_hold_up_the_event_loop(self):
        refused, left = [], []

        async def run(event, step):
            while not left:
                try:
                    await step.sleep("nap", "1 hour")
                except BaseException as error:
                    refused.append(error)
                    if len(refused) == 1000:
                        break

        self.enterContext(grace(0.05))
        async with self.engine() as engine:
            await engine.bind(workflow(run)).create()
            await self.clock.settle()
        left.append(1)
        self.assertLess(len(refused), 150)

    async def test_the_next_life_starts_when_the_old_run_has_ended(self):
        log = []
        ended = asyncio.Event()

        async def run(event, step):
            log.append("begin")
            try:
                await step.sleep("s", "1 hour")
            finally:
                await ended.wait()
                log.append("end")

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            hibernating = asyncio.create_task(self.clock.advance("2 hours"))
            await asyncio.sleep(0.05)
            self.assertEqual(log, ["begin"])
            ended.set()
            await hibernating
            await self.finish(instance)
        self.assertEqual(log, ["begin", "end", "begin", "end"])

    async def test_a_run_that_does_not_end_is_abandoned_after_a_second_with_a_warning(self):
        never = asyncio.Event()
        lives = []

        async def run(event, step):
            lives.append(1)
            try:
                await step.sleep("s", "1 hour")
            finally:
                while len(lives) == 1 and not never.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await never.wait()
            return "done"

        with grace(0.1), self.assertLogs("workflows", "WARNING"):
            self.assertEqual(await self.outcome(run), "done")
        never.set()

    async def test_a_callback_in_flight_is_cancelled_when_the_engine_closes_and_runs_again(self):
        log = []

        async def run(event, step):
            async def callback(ctx):
                log.append(ctx.attempt)
                if len(log) == 1:
                    try:
                        await asyncio.Event().wait()
                    finally:
                        log.append("cancelled")

            return await step.do("s", ONCE, callback)

        await self.lives(run)
        self.assertEqual(log, [1, "cancelled", 1])  # a clean stop counts no attempt

    async def test_a_plain_callback_does_not_hold_up_closing(self):
        stuck = threading.Event()
        self.addCleanup(stuck.set)
        began = time.monotonic()
        async with self.engine() as engine:
            made = engine.bind(workflow(lambda e, step: step.do("s", lambda: stuck.wait(9))))
            await made.create()
            await self.clock.settle()
        self.assertLess(time.monotonic() - began, 0.9)

    async def test_what_run_awaits_outside_of_steps_is_done_again(self):
        lives = []

        async def run(event, step):
            lives.append(await value(1))
            task = asyncio.create_task(step.sleep("s", "1 hour"))
            other = asyncio.create_task(asyncio.Event().wait())
            await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
            other.cancel()
            return task.done()

        self.assertTrue(await self.outcome(run))
        self.assertEqual(len(lives), 2)

    async def test_a_run_is_not_unloaded_while_it_has_a_timer_of_asyncio_ahead(self):
        async def late(call):
            async with asyncio.timeout(0.1):
                await call

        async def beside(call):
            waiting = asyncio.ensure_future(call)
            await asyncio.sleep(0.1)
            waiting.cancel()

        waits = (
            late,
            beside,
            lambda call: asyncio.wait_for(call, 0.1),
            lambda call: asyncio.wait({asyncio.ensure_future(call)}, timeout=0.1),
        )
        for wait in waits:
            with self.subTest(wait):
                self.setUp()
                lives = []

                async def run(event, step, wait=wait, lives=lives):
                    lives.append(1)
                    with contextlib.suppress(TimeoutError):
                        await wait(step.wait_for_event("w", "t", timeout="1 hour"))

                async with self.engine(hibernate_after=0) as engine:
                    instance = await engine.bind(workflow(run)).create()
                    for _ in range(20):
                        await self.clock.advance(1)
                    await asyncio.sleep(0.15)
                    await self.clock.advance("2 hours")
                    self.assertEqual(((await instance.status()).status, lives), ("complete", [1]))

    async def test_a_loop_that_does_not_show_its_timers_is_told_of_once(self):
        async def run(event, step):
            await step.sleep("nap", "1 hour")

        hidden = unittest.mock.patch("workflows.scopes_with_timers", return_value=None)
        with hidden, self.assertLogs("workflows", "INFO") as logged:
            await self.outcome(run)
        (line,) = logged.output
        self.assertIn("EventLoop'> does not show its timers: a timer that `run` sets", line)


# What every child process begins with: `main(engine)` is given by the script.
PRELUDE = """
import asyncio, dataclasses, logging, os, signal, sys, time
import workflows
from workflows import *
logging.getLogger("workflows").setLevel(logging.CRITICAL + 1)
if "SOCKET" in globals():
    sys.argv, sys.stdin, sys.stdout = ARGV, SOCKET.makefile("r"), SOCKET.makefile("w")
PATH = sys.argv[1]
def say(*words): print(*words, flush=True)
def note(text):
    file = os.open(PATH + ".log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(file, (text + "\\n").encode())
    os.close(file)
def words():
    with open(PATH + ".log", "a+") as file:
        file.seek(0)
        return file.read().split()
def die(): os.kill(os.getpid(), signal.SIGKILL)
async def value(x=None): return x
async def until(instance, *wanted):
    while (await instance.status()).status not in wanted: await asyncio.sleep(0.005)
class Test(WorkflowEntrypoint):
    async def run(self, event, step): return await run(event, step)
async def get(w, id="i", params=None):
    await w.create_batch([{"id": id, "params": params}])
    return await w.get(id)
def complain_in_a_file():
    sys.stderr = open(f"{PATH}.stderr-{os.getpid()}", "w", buffering=1)
def go(**options):
    async def inner():
        async with Engine(PATH, **options) as engine:
            await main(engine.bind(Test))
    try: asyncio.run(inner())
    except KeyboardInterrupt: say("interrupted")
"""


async def until(check: Callable[[], Any], seconds: float = 5) -> float:
    """Waits until it is true; returns how long that took."""
    began = time.monotonic()
    while not (found := check()) or (asyncio.iscoroutine(found) and not await found):
        if time.monotonic() > began + seconds:
            raise AssertionError("it never came true")
        await asyncio.sleep(0.005)
    return time.monotonic() - began


def post_event(engine: Engine, payload: str) -> None:
    """Sends an event to the instance "i" of "test": it is stored at the end of this turn."""
    sent = (workflows.on_instance, "test", "i", workflows._send_event, "t", payload)
    engine.writer.post(*sent)


async def reach(instance: Any, *wanted: str, seconds: float = 5) -> float:
    """Waits until the instance has one of these statuses; returns how long that took."""

    async def there() -> bool:
        return (await instance.status()).status in wanted

    return await until(there, seconds)


def quicker(factor: float) -> Any:
    """The engine looks around so many times as often, and its patience ends so much earlier."""
    faster = types.SimpleNamespace(**vars(time))
    faster.monotonic = lambda: time.monotonic() * factor
    return unittest.mock.patch.object(workflows, "time", faster)


# A child is forked from a process that has imported the module already. This saves it a third of a
# second, and it is as real, and after SIGKILL as dead, as any other.
NURSERY = multiprocessing.get_context("forkserver")
NURSERY.set_forkserver_preload(["workflows"])


class Child:
    """A real process that runs a script on the test's database, and talks with us: its stdin and
    stdout are a socket. A `fresh` one has an interpreter of its own."""

    def __init__(self, path: str, script: Path, *args: str, fresh: bool = False) -> None:
        ours, theirs = socket.socketpair()
        self.process: Any
        if fresh:
            command = [sys.executable, script, path, *args]
            environment = os.environ | {"PYTHONPATH": str(Path(workflows.__file__).parent)}
            ends: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "env": environment}
            self.process = subprocess.Popen(command, **ends)
        else:
            known = {"ARGV": [str(script), path, *args], "SOCKET": theirs}
            given = (str(script), known, "__main__")
            self.process = NURSERY.Process(target=runpy.run_path, args=given)
            self.process.start()
        theirs.close()
        self.talk = ours.makefile("rw")
        ours.close()  # when that is
        self.pid: int = self.process.pid

    def hear(self) -> str:
        """The next line that it says, or "" when it has ended."""
        with contextlib.suppress(ConnectionResetError):  # it did not hear what we said last
            return self.talk.readline().strip()
        return ""

    async def wait_for(self, word: str) -> str:
        """Reads until a line begins with that word; returns what follows."""
        while line := await asyncio.to_thread(self.hear):
            if line.startswith(word):
                return line[len(word) :].strip()
        raise AssertionError(f"the process ended before it said {word!r}")

    def tell(self, word: str) -> None:
        self.talk.write(word + "\n")
        self.talk.flush()

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def wait(self, seconds: float = 10) -> int | None:
        """Its exit code, or None if it is not there in time."""
        if isinstance(self.process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            return self.process.returncode
        self.process.join(seconds)
        code: int | None = self.process.exitcode
        return code

    def kill(self) -> None:
        self.process.kill()
        self.wait()
        self.talk.close()

    def end(self) -> tuple[str, int | None]:
        """Everything it still says, and its exit code."""
        return self.talk.read().strip(), self.wait()


class Real(Case):
    """Engines on the real clock and a real disk, beside child processes on the same file."""

    where = None

    def child(self, script: str, *args: str, path: str | None = None, fresh: bool = False) -> Child:
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(PRELUDE + textwrap.dedent(script))
        self.addCleanup(os.unlink, file.name)
        child = Child(path or self.path, Path(file.name), *args, fresh=fresh)
        self.addCleanup(child.kill)
        return child

    def command(self, *args: str, terminal: str | None = None, **environ: str) -> Child:
        """A command of workflows.py, as a process in the test's folder."""
        return self.child(f"""
            logging.getLogger("workflows").setLevel(logging.NOTSET)
            complain_in_a_file()
            if {terminal!r}:
                screen = open({terminal!r}, "w")
                say("there")
                sys.stdout = sys.stderr = screen
            os.chdir(os.path.dirname(PATH))
            os.environ.update({environ})
            sys.exit(workflows.main({args}))
            """)

    def complaints(self, child: Child) -> str:
        return Path(f"{self.path}.stderr-{child.pid}").read_text()

    @contextlib.asynccontextmanager
    async def engine(self, **options: Any) -> Any:
        async with Engine(self.path, **options) as engine:
            yield engine

    def log(self, path: str | None = None) -> list[str]:
        path = Path((path or self.path) + ".log")
        return path.read_text().split() if path.exists() else []

    def runs_until_it_ends(self, script: str, most: int = 20) -> int:
        """Starts the script until it ends by itself; returns how often it died before."""
        for deaths in range(most):
            if self.child(script).end()[1] == 0:
                return deaths
        raise AssertionError("it never ended by itself")


async def one_step(event: Any, step: Any) -> Any:
    return await step.do("step", returns(event.payload))


async def one_event(event: Any, step: Any) -> Any:
    return (await step.wait_for_event("w", "t", timeout="1 hour")).payload


async def one_sleep(event: Any, step: Any) -> Any:
    await step.sleep("nap", "1 hour")


class Gate:
    """A workflow's step that says when it has begun and ends when told to."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.begun: list[str] = []
        self.cancelled = 0

    async def run(self, event: Any, step: Any) -> Any:
        config = {"retries": {"delay": 1}}
        pass_through = functools.partial(self.pass_through, event.instance_id)
        return await step.do("gate", config, pass_through)

    async def pass_through(self, id: str) -> str:
        self.begun.append(id)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return id


# --------------------------------------------------------------------------------------------------


class Text(str, enum.Enum):  # noqa: UP042 (its str() is not its value)
    ID = "my-id"
    STEP = "my step"
    TYPE = "my-type"
    NAME = "my-name"


class Creating(Case):
    async def test_a_member_of_an_enum_of_texts_is_its_text(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            await step.do(Text.STEP, returns(1))
            return (await step.wait_for_event("w", "my-type")).payload

        async with self.engine() as engine:
            bound = engine.bind(workflow(run), Text.NAME)
            await bound.create(id=Text.ID)
            instance = await bound.get("my-id")
            async with bound.introspect_instance("my-id") as one:
                await one.wait_for_step_result(Text.STEP)
            await instance.send_event(type=Text.TYPE, payload=5)
            self.assertEqual(await self.finish(instance), 5)
            self.assertEqual([str(bound.name), instance.id], ["my-name", "my-id"])
        self.assertIn(("do\nmy step\n1",), self.rows("SELECT step FROM journal"))

    async def test_a_created_instance_runs_and_is_complete_with_its_output(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_step)).create(params=[1, None])
            await self.clock.advance(0)
            status = await instance.status()
            self.assertEqual(
                (status.status, status.output, status.error), ("complete", [1, None], None)
            )

    async def test_params_default_to_an_empty_dict_and_none_stays_none(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            self.assertEqual(await self.finish(await bound.create()), {})
            self.assertIsNone(await self.finish(await bound.create(params=None)))

    async def test_an_id_is_a_uuid4_unless_given(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            self.assertRegex((await bound.create()).id, r"^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]{21}$")
            self.assertEqual((await bound.create({"id": "a" * 100})).id, "a" * 100)

    async def test_illegal_ids_are_refused(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            reserved = ("batch", "terminate", "terminateAll", "cf_" + "0aF9" * 16)
            schedules = "0 9 * * MON-1700000000000"
            for bad in ("", "-a", "a b", "a\n", "ä", "a" * 101, 5, schedules, *reserved):
                await self.assertCode("instance.invalid_id", bound.create(id=bad))
                await self.assertCode("instance.invalid_id", bound.create_batch([{"id": bad}]))
            for good in ("batches", "Terminate", "cf_", "cf_" + "0" * 63, "cf_" + "0" * 65):
                await bound.create(id=good)
            await bound.delete_batch(
                ["batches", "Terminate", "cf_", *("cf_" + "0" * n for n in (63, 65))]
            )
            await self.clock.settle()
            self.assertEqual(self.rows("SELECT * FROM instances"), [])

    async def test_an_id_exists_once_in_its_workflow_and_the_old_one_is_untouched(self) -> None:
        async with self.engine() as engine:
            one, two = engine.bind(workflow(one_step)), engine.bind(workflow(one_step, "Other"))
            old = await one.create(id="a", params="old")
            await self.assertCode("instance.already_exists", one.create(id="a", params="new"))
            self.assertEqual(await self.finish(await two.create(id="a", params="other")), "other")
            self.assertEqual(await self.finish(old), "old")

    async def test_unknown_options_and_params_that_cannot_be_stored_are_refused(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            with self.assertRaisesRegex(ValueError, "idd"):
                await bound.create(idd="a")
            await self.assertCode("params.not_serializable", bound.create(params={1, 2}))

    async def test_a_batch_is_stored_in_order_without_ids_that_exist_or_repeat(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            await bound.create(id="b", params="old")
            batch = [{"id": id, "params": n} for n, id in enumerate("cabad")]
            made = await bound.createBatch(batch)
            self.assertEqual([instance.id for instance in made], ["c", "a", "d"])
            self.assertEqual(await self.finish(await bound.get("a")), 1)
            self.assertEqual(await self.finish(await bound.get("b")), "old")
            self.assertEqual(
                self.rows("SELECT id FROM instances ORDER BY key"), [("b",), ("c",), ("a",), ("d",)]
            )

    async def test_a_batch_with_one_bad_entry_stores_nothing(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            await self.assertCode("instance.invalid_id", bound.create_batch([{}, {"id": "-"}]))
            await self.assertCode("limit.batch_size", bound.create_batch([]))
            await self.assertCode("limit.batch_size", bound.create_batch([{}] * 101))
            self.assertEqual(self.rows("SELECT * FROM instances"), [])
            self.assertEqual(len(await bound.create_batch([{}] * 100)), 100)

    async def test_a_batch_that_is_an_object_is_answered_with_what_was_skipped(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            await bound.create(id="old")
            ids = ["a", "old", "a", "old", "b"]
            entries = [{"id": id, "params": n} for n, id in enumerate(ids)]
            answer = await bound.create_batch({"instances": entries})
            self.assertEqual([instance.id for instance in answer["created"]], ["a", "b"])
            there, twice = (10405, "already_exists"), (10415, "duplicate_in_batch")
            skipped = [(1, "old", *there), (2, "a", *twice), (3, "old", *twice)]
            message = "workflows.api.error.instance."
            self.assertEqual(
                answer["errors"],
                [
                    {"index": index, "id": id, "code": code, "message": message + what}
                    for index, id, code, what in skipped
                ],
            )
            self.assertEqual(await self.finish(answer["created"][0]), 0)

    async def test_a_batch_can_be_a_number_of_instances_with_the_same_params(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            made = (await bound.createBatch({"count": 3, "params": {"x": 1}}))["created"]
            self.assertEqual([await self.finish(one) for one in made], [{"x": 1}] * 3)
            self.assertEqual(len({one.id for one in made}), 3)
            retention = {"successRetention": "1 hour"}
            answer = await bound.create_batch({"count": 1, "retention": retention})
            self.assertEqual(await self.finish(answer["created"][0]), {})
            self.assertEqual(answer["errors"], [])
            await self.clock.advance("2 hours")
            await self.assertCode("instance.not_found", answer["created"][0].status())

    async def test_a_batch_that_is_a_wrong_object_is_refused(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            for wrong, text in (
                ({}, "batch: count is None"),
                ({"count": True}, "batch: count is True"),
                ({"count": 2, "id": "a"}, "unknown key 'id'"),
                ({"count": 2, "instances": []}, "unknown key 'count'"),
                ({"instances": [], "params": 1}, "unknown key 'params'"),
            ):
                with self.assertRaisesRegex(ValueError, text):
                    await bound.create_batch(wrong)
            for size in ({"count": 101}, {"count": 10**12}, {"instances": []}):
                await self.assertCode("limit.batch_size", bound.create_batch(size))
            self.assertEqual(self.rows("SELECT * FROM instances"), [])

    async def test_a_hint_where_to_run_has_no_effect(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            one = await bound.create(id="a", locationHint="weur")
            entries = [{"id": "b", "location_hint": "apac"}]
            (two,) = await bound.create_batch(entries)
            self.assertEqual([await self.finish(one), await self.finish(two)], [{}, {}])

    async def test_the_instances_of_a_schedule_are_found_by_their_id(self) -> None:
        id = "*/5 8-18 1,15 * MON-FRI-1700000000000"
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            entry = (id, "{}", None, None)
            await engine.call(workflows.create_instances, bound.name, [entry], "cron")
            async with bound.introspect_instance(id) as one:
                self.assertEqual(await one.get_output(), {})
            self.assertEqual((await bound.get(id)).id, id)
            self.assertEqual(
                await bound.delete_batch([id]), {"deleted": [{"id": id}], "errors": []}
            )

    async def test_get_finds_what_exists_and_nothing_else(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_event))
            await bound.create(id="a")
            self.assertEqual((await bound.get("a")).id, "a")
            for none in ("b", "", "a b", "-", "batch", "x" * 999, "\ud800", "a'\0"):
                error = await self.assertCode("instance.not_found", bound.get(none))
                self.assertIn("(instance.not_found)", str(error), "Cloudflare's SDK tells no code")
            with self.assertRaisesRegex(TypeError, "id is 5: expected a str"):
                await bound.get(5)

    async def test_result_waits_raises_the_error_and_gives_up_after_its_timeout(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_event)).create()
            early = asyncio.create_task(instance.result(timeout="1 minute"))
            await self.clock.advance("61 seconds")
            with self.assertRaises(WorkflowTimeoutError):
                await early
            with self.assertRaises(WorkflowTimeoutError):
                await instance.result(timeout=0)
            with self.assertRaises(WorkflowTimeoutError):
                await self.finish(instance)
            self.assertEqual((await instance.status()).error["name"], "WorkflowTimeoutError")


class Pausing(Case):
    @contextlib.asynccontextmanager
    async def started(self, run: Callable[..., Any], **options: Any) -> Any:
        """An instance that has come as far as it can."""
        async with self.engine(**options) as engine:
            instance = await engine.bind(workflow(run)).create(id="i")
            await self.clock.advance(0)
            yield instance

    async def assertStatus(self, instance: Any, status: str) -> None:
        self.assertEqual((await instance.status()).status, status)

    async def test_the_statuses_of_a_run(self) -> None:
        gate = Gate()

        async def run(event: Any, step: Any) -> None:
            await gate.run(event, step)
            await step.sleep("nap", 1000)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance(0)
            await self.assertStatus(instance, "running")
            gate.open.set()
            await self.clock.advance(0)
            await self.assertStatus(instance, "waiting")
            await self.clock.advance(1000)
            await self.assertStatus(instance, "complete")

    async def test_pausing_a_running_instance_waits_for_its_callbacks_and_stores_their_results(
        self,
    ) -> None:
        gate, after = Gate(), []

        async def run(event: Any, step: Any) -> None:
            await gate.run(event, step)
            await step.do("after", lambda: value(after.append(1)))

        async with self.started(run) as instance:
            await instance.pause()
            await self.assertStatus(instance, "waitingForPause")
            gate.open.set()
            await self.clock.advance("1 hour")
            await self.assertStatus(instance, "paused")
            self.assertEqual(
                (len(self.rows("SELECT 1 FROM journal WHERE type = 'done'")), after), (1, [])
            )
            await instance.resume()
            await self.finish(instance)
            self.assertEqual((len(gate.begun), after), (1, [1]))

    async def test_a_waiting_instance_pauses_at_once_and_its_sleep_stands_still(self) -> None:
        async with self.started(one_sleep) as instance:
            await self.clock.advance("20 minutes")
            await instance.pause()
            await self.assertStatus(instance, "paused")
            await self.clock.advance("9 days")
            await instance.resume()
            await self.assertStatus(instance, "waiting")
            await self.clock.advance("39 minutes")
            await self.assertStatus(instance, "waiting")
            await self.clock.advance("1 minute")
            await self.assertStatus(instance, "complete")

    async def test_sleep_until_keeps_its_date_through_a_pause(self) -> None:
        due = self.clock.now() + 3_600_000

        async def run(event: Any, step: Any) -> None:
            await step.sleep_until("date", due)

        async with self.started(run) as instance:
            await instance.pause()
            await self.clock.advance("2 hours")
            await self.assertStatus(instance, "paused")
            await instance.resume()
            await self.clock.advance(0)
            await self.assertStatus(instance, "complete")

    async def test_a_retry_delay_stands_still_while_paused(self) -> None:
        attempts = []

        async def fail() -> None:
            attempts.append(1)
            raise ValueError

        async def run(event: Any, step: Any) -> None:
            await step.do("fail", {"retries": {"delay": "1 hour", "backoff": "constant"}}, fail)

        async with self.started(run) as instance:
            await self.clock.advance("30 minutes")
            await instance.pause()
            await self.clock.advance("9 days")
            self.assertEqual(len(attempts), 1)
            await instance.resume()
            await self.clock.advance("29 minutes")
            self.assertEqual(len(attempts), 1)
            await self.clock.advance("1 minute")
            self.assertEqual(len(attempts), 2)

    async def test_an_event_timeout_stands_still_and_events_are_buffered_while_paused(self) -> None:
        async with self.started(one_event) as instance:
            await instance.pause()
            await self.clock.advance("9 days")
            await instance.send_event(type="t", payload="late")
            await self.clock.advance("9 days")
            await self.assertStatus(instance, "paused")
            await instance.resume()
            self.assertEqual(await self.finish(instance), "late")

    async def test_what_falls_due_while_it_waits_for_the_pause_completes(self) -> None:
        gate = Gate()

        async def run(event: Any, step: Any) -> Any:
            return await asyncio.gather(gate.run(event, step), step.sleep("nap", 1000))

        async with self.started(run) as instance:
            await instance.pause()
            await self.clock.advance(1000)
            await self.assertStatus(instance, "waitingForPause")
            self.assertEqual(len(self.rows("SELECT 1 FROM journal WHERE type = 'slept'")), 1)

    async def test_no_step_of_run_begins_while_a_pause_is_waited_for_but_those_in_callbacks(self):
        ran, gates = [], [asyncio.Event() for _ in range(3)]

        async def run(event: Any, step: Any) -> None:
            async def outer() -> None:
                await gates[0].wait()
                await step.do("inner", lambda: value(ran.append("inner")))
                await gates[2].wait()

            async def branch() -> None:
                await gates[1].wait()
                await step.do("branch", lambda: value(ran.append("branch")))

            await asyncio.gather(step.do("outer", outer), branch())

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await instance.pause()
            for gate in gates[:2]:
                gate.set()
            await self.clock.settle()
            self.assertEqual(ran, ["inner"])
            self.assertEqual((await instance.status()).status, "waitingForPause")
            await instance.resume()
            await self.clock.settle()
            self.assertEqual(ran, ["inner", "branch"])
            gates[2].set()
            await self.finish(instance)

    async def test_what_run_has_cancelled_is_recorded_with_what_it_does_next_or_with_a_pause(self):
        async def run(event: Any, step: Any) -> None:
            nap = asyncio.create_task(step.sleep("nap", "1 hour"))
            await step.do("s", value)
            nap.cancel()
            await asyncio.Event().wait()  # not a step

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            sql = "SELECT type FROM journal ORDER BY seq"
            self.assertNotIn(("cancel",), self.rows(sql))
            await instance.pause()
            await self.clock.settle()
            types = [type for (type,) in self.rows(sql)]
            self.assertEqual(types[-3:], ["waitingForPause", "cancel", "paused"])

    async def test_resume_cancels_a_pause_that_has_not_taken_effect(self) -> None:
        gate = Gate()
        async with self.started(gate.run) as instance:
            await instance.pause()
            await instance.resume()
            await self.assertStatus(instance, "running")
            gate.open.set()
            self.assertEqual(await self.finish(instance), "i")
            self.assertEqual(len(gate.begun), 1)

    async def test_pause_and_resume_have_no_effect_where_they_make_no_sense(self) -> None:
        async with self.started(one_event) as instance:
            await instance.resume()
            await self.assertStatus(instance, "waiting")
            await instance.pause()
            rows = self.rows("SELECT * FROM journal")
            await instance.pause()
            self.assertEqual(self.rows("SELECT * FROM journal"), rows)
            await instance.terminate()
            await instance.pause()
            await instance.resume()
            await self.assertStatus(instance, "terminated")

    async def test_a_paused_instance_stays_paused_in_the_next_process(self) -> None:
        async with self.started(one_sleep) as instance:
            await instance.pause()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_sleep)).get("i")
            await self.clock.advance("2 hours")
            await self.assertStatus(instance, "paused")
            await instance.resume()
            await self.clock.advance("1 hour")
            await self.assertStatus(instance, "complete")

    async def test_a_paused_instance_writes_nothing_even_if_its_run_goes_on_by_itself(self) -> None:
        gate = asyncio.Event()

        async def run(event: Any, step: Any) -> None:
            nap = asyncio.create_task(step.sleep("nap", "1 hour"))
            await gate.wait()
            await step.sleep("another", "1 hour")
            await nap

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            pausing = asyncio.create_task(instance.pause())
            gate.set()  # in the same turn
            await pausing
            await self.clock.settle()
        types = [type for (type,) in self.rows("SELECT type FROM journal ORDER BY seq")]
        self.assertEqual(types[-2:], ["waiting", "paused"])

    async def test_a_paused_instance_leaves_memory(self) -> None:
        gate = Gate()

        async def run(event: Any, step: Any) -> None:
            await gate.run(event, step)
            await gate.run(event, step)

        async with self.started(run) as instance:
            await instance.pause()
            gate.open.set()
            await self.clock.advance("1 hour")
            await self.assertStatus(instance, "paused")
            self.assertEqual(instance.workflow.engine.lives.runs, {})

    async def test_what_was_due_before_a_pause_wakes_the_instance_after_it(self) -> None:
        async with self.started(one_sleep):
            pass
        await self.clock.advance("2 hours")
        async with Engine(self.path, clock=self.clock) as owner:
            owner.bind(workflow(one_step, "Other"))  # so that nobody runs the instance
            await self.clock.advance("0 seconds")
            async with self.engine() as client:
                instance = await client.bind(workflow(one_sleep)).get("i")
                await instance.pause()
                await instance.resume()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_sleep)).get("i")
            await self.clock.advance("2 hours")
            await self.assertStatus(instance, "complete")

    async def test_a_timeout_that_was_over_before_a_pause_is_over_for_what_is_sent_in_it(
        self,
    ) -> None:
        async with self.started(one_event):
            pass
        await self.clock.advance("65 minutes")
        async with Engine(self.path, clock=self.clock) as owner:
            owner.bind(workflow(one_step, "Other"))  # so that nobody runs the instance
            await self.clock.advance("0 seconds")
            async with self.engine() as client:
                instance = await client.bind(workflow(one_event)).get("i")
                await instance.pause()
                await self.clock.advance("1 hour")
                await instance.send_event(type="t", payload="late")
                await self.clock.advance("1 hour")
                await instance.resume()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_event)).get("i")
            with self.assertRaises(WorkflowTimeoutError):
                await self.finish(instance)


class PausingForReal(Real):
    async def test_an_event_and_a_pause_in_one_commit_lose_neither(self) -> None:
        async with self.engine() as engine:
            for calls in (("pause",), ("pause", "resume")):
                instance = await engine.bind(workflow(one_event, f"W{len(calls)}")).create()
                await reach(instance, "waiting")
                both = [getattr(instance, call)() for call in calls]
                await asyncio.gather(instance.send_event(type="t", payload=1), *both)
                await instance.resume()
                self.assertEqual(await instance.result("2 seconds"), 1)


class Ending(Case):
    async def test_terminate_cancels_the_callbacks_at_once_and_for_good(self) -> None:
        gate = Gate()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(gate.run)).create()
            await self.clock.advance(0)
            await instance.terminate()
            self.assertEqual((await instance.status()).status, "terminated")
            await self.clock.advance(0)
            self.assertEqual(gate.cancelled, 1)
            await self.assertCode("instance.terminated", instance.result())
            await self.assertCode("instance.cannot_terminate", instance.terminate())

    async def test_every_unfinished_state_can_be_terminated(self) -> None:
        for path in ((), ("pause",)):
            for run in (one_sleep, Gate().run):
                self.setUp()
                async with self.engine() as engine:
                    instance = await engine.bind(workflow(run)).create()
                    await self.clock.advance(0)
                    for call in (*path, "terminate"):
                        await getattr(instance, call)()
                    await self.clock.advance("2 hours")
                    self.assertEqual((await instance.status()).status, "terminated")

    async def test_restart_erases_everything_but_id_params_and_timestamp(self) -> None:
        seen = []

        async def run(event: Any, step: Any) -> Any:
            seen.append((event.payload, event.timestamp, event.instance_id))
            await step.do("step", lambda: value(seen.append("step")))
            return await one_event(event, step)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create(id="i", params="p")
            await instance.send_event(type="t", payload=1)
            await instance.send_event(type="t", payload="dropped by the restart")
            self.assertEqual(await self.finish(instance), 1)
            await self.clock.advance(5000)
            ((before,),) = self.rows("SELECT max(seq) FROM journal")
            await instance.restart()
            await self.clock.advance(0)
            status = await instance.status()
            self.assertEqual((status.status, status.output), ("waiting", None))
            self.assertEqual(seen[:2], seen[2:])
            self.assertGreater(self.rows("SELECT min(seq) FROM journal")[0][0], before)

    async def test_restart_works_from_every_state_and_cancels_what_is_in_flight(self) -> None:
        for calls in ((), ("pause",), ("terminate",)):
            self.setUp()
            gate = Gate()
            async with self.engine() as engine:
                instance = await engine.bind(workflow(gate.run)).create(id="i")
                await self.clock.advance(0)
                for call in (*calls, "restart"):
                    await getattr(instance, call)()
                await self.clock.advance(0)
                self.assertEqual((len(gate.begun), gate.cancelled), (2, 1))
                gate.open.set()
                self.assertEqual(await self.finish(instance), "i")

    async def test_a_callback_from_before_a_restart_changes_nothing(self) -> None:
        gates = [Gate(), Gate()]
        lives = iter(gates)

        async def stubborn(gate: Gate) -> str:
            with contextlib.suppress(asyncio.CancelledError):
                await gate.pass_through("")
            await asyncio.sleep(0.02)
            return f"life {gates.index(gate)}"

        async def run(event: Any, step: Any) -> Any:
            gate = next(lives)
            return await step.do("s", lambda: stubborn(gate))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance(0)
            await instance.restart()
            gates[1].open.set()
            await until(lambda: gates[1].begun)
            await asyncio.sleep(0.05)
            self.assertEqual(await self.finish(instance), "life 1")

    async def test_an_instance_can_restart_terminate_and_pause_itself_from_a_step(self) -> None:
        for call, status in (
            ("terminate", "terminated"),
            ("pause", "paused"),
            ("restart", "complete"),
        ):
            self.setUp()
            lives = []

            async def run(
                event: Any, step: Any, call: str = call, lives: list[int] = lives
            ) -> None:
                async def steer() -> None:
                    instance = await engine.env.TEST.get(event.instance_id)
                    if len(lives) == 1:
                        await getattr(instance, call)()

                lives.append(1)
                await step.do("steer", steer)
                await step.do("next", value)

            async with self.engine() as engine:
                bound = engine.bind(workflow(run))
                instance = await bound.create()
                await self.clock.advance(0)
                self.assertEqual((await instance.status()).status, status)
                self.assertEqual(len(lives), 2 if call == "restart" else 1)


class Refusals(Case):
    async def test_a_refusal_says_where_it_is_and_what_was_expected(self) -> None:
        async def step_with_rollback(event: Any, step: Any) -> None:
            undo = {"rollback": value, "rollbackConfig": {"timeout": 0}}
            await step.do("s", value, undo)

        async with self.engine() as engine:
            bound = engine.bind(workflow(step_with_rollback))
            with self.assertRaisesRegex(ValueError, r"batch\[1\].*'successRetention'.*'soon'"):
                await bound.create_batch([{}, {"retention": {"successRetention": "soon"}}])
            instance = await bound.create()
            with self.assertRaisesRegex(WorkflowError, "not beginning with '-'"):
                await instance.send_event(type="-x")
            with self.assertRaisesRegex(ValueError, "type is .*: expected one of do"):
                await instance.restart({"from": {"name": "s", "type": []}})
            with self.assertRaisesRegex(
                WorkflowFatalError, "rollbackConfig key 'timeout' is 0: expected"
            ):
                await self.finish(instance)
        with self.assertRaisesRegex(TypeError, "database is 5"):
            Engine(5)  # type: ignore[arg-type]
        with self.assertRaisesRegex(TypeError, "clock is 5: expected a Clock"):
            Engine(clock=5)  # type: ignore[arg-type]

    async def test_outside_of_a_run_the_limit_of_state_is_a_plain_workflow_error(self) -> None:
        async with self.engine(limits=dataclasses.replace(FOREVER, instance_bytes=50)) as engine:
            bound = engine.bind(workflow(one_event))
            for refused in (
                bound.create(params="x" * 60),
                (await bound.create(params="x" * 30)).send_event(type="t", payload="x" * 30),
            ):
                error = await self.assertCode("limit.instance_state", refused)
                self.assertIs(type(error), WorkflowError)

    async def test_an_option_that_is_given_twice_is_refused(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_event))
            with self.assertRaisesRegex(TypeError, "'id' is given twice"):
                await bound.create({"id": "y"}, id="z")
            instance = await bound.create({"id": "y"}, params=1)
            with self.assertRaisesRegex(TypeError, "'type' is given twice"):
                await instance.send_event({"type": "t"}, type="t")

    async def test_whatever_leaves_run_ends_the_instance(self) -> None:
        for error in (GeneratorExit(), SystemExit(3), asyncio.CancelledError()):
            with self.subTest(type(error).__name__):
                self.setUp()

                async def run(event: Any, step: Any, error: BaseException = error) -> None:
                    raise error

                async with self.engine() as engine:
                    instance = await engine.bind(workflow(run)).create()
                    await self.clock.settle()
                    status = await instance.status()
                    self.assertEqual(status.status, "errored")
                    self.assertEqual(status.error["name"], type(error).__name__)

    async def test_calls_without_their_arguments_are_refused_where_they_are_awaited(self) -> None:
        async def run(event: Any, step: Any) -> list[str]:
            codes = []
            calls: list[Any] = [step.do(), step.sleep("s"), step.sleep_until("s")]
            for call in (*calls, step.wait_for_event("w"), step.do("d")):
                try:
                    await call
                except WorkflowFatalError as error:
                    codes.append(error.code)
            return codes

        invalid = ["callback", "duration", "duration"]
        codes = [f"step.invalid_{what}" for what in invalid]
        codes += ["event.invalid_type", "step.invalid_callback"]
        self.assertEqual(await self.outcome(run), codes)

    async def test_a_restarted_instance_is_queued_behind_all_that_are_queued(self) -> None:
        began: list[str] = []

        async def run(event: Any, step: Any) -> None:
            began.append(event.instance_id)
            await step.do("busy", lambda: asyncio.sleep(3600 if len(began) == 1 else 0))

        async with self.engine(limits=dataclasses.replace(FOREVER, running=1)) as engine:
            bound = engine.bind(workflow(run))
            a, b, *_ = [await bound.create(id=id) for id in "abc"]
            await b.restart()
            await bound.create(id="d")
            await a.terminate()
            await self.clock.settle()
            async with asyncio.timeout(3):
                await (await bound.get("d")).result()
        self.assertEqual(began, ["a", "c", "b", "d"])


class Listing(Case):
    async def test_the_newest_come_first_also_beyond_a_page(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            made: list[str] = []
            for count in (100, 100, 1):
                made += [one.id for one in await bound.create_batch([{}] * count)]
            self.assertEqual([one.id async for one in bound.list()], made[::-1])
            for limit in (0, 1, 100, 150, 1000):
                listed = [one.id async for one in bound.list(limit=limit)]
                self.assertEqual(listed, made[::-1][:limit], limit)

    async def test_a_page_costs_the_same_however_many_others_there_are(self) -> None:
        taken: list[int] = []  # by SQLite, in thousands of steps
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_event))
            ticks = itertools.count()
            engine.writer.database._db.set_progress_handler(lambda: next(ticks) and None, 1000)
            for _ in range(2):
                for _ in range(5):
                    await bound.create_batch([{}] * 100)
                await self.clock.settle()
                before = next(ticks)
                self.assertEqual(len([one async for one in bound.list("waiting", limit=100)]), 100)
                taken.append(next(ticks) - before)
        self.assertLess(taken[1], taken[0] * 1.5)

    async def test_only_those_with_the_status_are_listed(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_event))
            await bound.create_batch([{"id": "ended"}, {"id": "waits"}, {"id": "paused"}])
            await self.clock.settle()
            await (await bound.get("ended")).terminate()
            await (await bound.get("paused")).pause()
            for status, id in (("terminated", "ended"), ("waiting", "waits"), ("paused", "paused")):
                self.assertEqual([one.id async for one in bound.list(status)], [id])
            self.assertEqual([one async for one in bound.list("errored")], [])

    async def test_a_limit_counts_none_that_has_expired_or_was_deleted(self) -> None:
        async with self.engine() as engine, self.engine() as client:
            bound = engine.bind(workflow(one_event))
            await bound.create_batch([{"id": "old"}, {"id": "ends"}, {"id": "deleted"}])
            short = {"successRetention": "1 hour"}
            await bound.create(id="expired", retention=short)
            await self.clock.settle()
            await (await bound.get("expired")).terminate()
            await self.clock.settle()
            self.clock._now += 7_200_000  # the owner has not cleared it away yet
            seen = await client.workflow("test")
            await (await seen.get("deleted")).delete()
            self.assertEqual([one.id async for one in seen.list(limit=2)], ["ends", "old"])

    async def test_a_status_or_limit_that_is_none_is_refused(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            for bad in ({"status": "done"}, {"limit": -1}, {"limit": True}, {"limit": "2"}):
                with (
                    self.subTest(bad),
                    self.assertRaisesRegex(ValueError, f"{[*bad][0]}.*expected"),
                ):
                    async for _ in bound.list(**bad):
                        pass


class Deleting(Case):
    async def test_who_waits_for_its_result_does_not_wait_for_the_next_one_with_its_id(
        self,
    ) -> None:
        async with asyncio.timeout(3), self.engine() as engine:
            bound = engine.bind(workflow(one_event))
            old = await bound.create(id="i")
            waiting = asyncio.create_task(old.result())
            await self.clock.settle()
            await asyncio.gather(old.delete(), bound.create(id="i"))
            await self.assertCode("instance.not_found", waiting)

    async def test_a_deleted_instance_is_gone_with_all_that_it_stored(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_event))
            instance = await bound.create(id="i", params="x")
            await instance.send_event(type="other", payload="y")
            await self.clock.settle()
            waiting = asyncio.create_task(instance.result())
            await asyncio.sleep(0)
            await instance.delete()
            await self.assertCode("instance.not_found", waiting)
            for call in (instance.status, instance.delete, instance.restart):
                await self.assertCode("instance.not_found", call())
            await self.clock.settle()
            self.assertEqual(engine.lives.runs, {})
            self.assertEqual((await engine.usage()).storage_bytes, 0)
        for table in ("instances", "journal", "waits", "events"):
            self.assertEqual(self.rows(f"SELECT * FROM {table}"), [], table)

    async def test_its_id_is_free_at_once_and_the_old_run_can_not_write_into_the_new_one(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> Any:
            async def again() -> Any:
                if event.payload == "old":
                    me, make = await self.bound.get("i"), self.bound.create(id="i", params="new")
                    await asyncio.gather(me.delete(), make)  # the first ends this callback
                return event.payload

            return await step.do("again", again)

        async with self.engine() as engine:
            self.bound = engine.bind(workflow(run))
            await self.bound.create(id="i", params="old")
            await self.clock.settle()
            async with asyncio.timeout(3):
                await until(lambda: not engine.lives.runs)
                self.assertEqual(await (await self.bound.get("i")).result(), "new")
        self.assertEqual(self.rows("SELECT count(*) FROM instances"), [(1,)])

    async def test_a_deleted_instance_whose_wait_is_over_leaves_no_row(self) -> None:
        limits = dataclasses.replace(FOREVER, running=1)
        gate = Gate()
        async with self.engine(limits=limits) as engine:
            instance = await engine.bind(workflow(one_sleep)).create()
            await self.clock.settle()
            await engine.bind(workflow(gate.run, "Other")).create()
            await self.clock.settle()
            self.clock._now += 3_600_000
            await instance.delete()
            await self.clock.settle()
            gate.open.set()
        kept = "SELECT count(*) FROM journal WHERE instance NOT IN (SELECT key FROM instances)"
        self.assertEqual(self.rows(kept), [(0,)])


class EndingForReal(Real):
    async def test_an_event_right_after_a_restart_does_not_stop_the_new_life(self) -> None:
        """… while the old life's callback still takes its time to end."""
        lives = []

        async def slow_to_end() -> int:
            lives.append(1)
            if len(lives) == 1:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(9)
                await asyncio.sleep(0.3)
            return len(lives)

        async def run(event: Any, step: Any) -> Any:
            return await step.do("s", slow_to_end)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await until(lambda: lives)
            await instance.restart()
            await asyncio.sleep(0.1)
            await instance.send_event(type="t")
            self.assertEqual(await instance.result("3 seconds"), 2)

    async def test_restarts_from_many_tasks_end_in_one_life(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_step)).create(params=5)
            chance = random.Random(5)

            async def restart() -> None:
                for _ in range(10):
                    await asyncio.sleep(chance.random() / 300)
                    await instance.restart()

            await asyncio.wait_for(asyncio.gather(*(restart() for _ in range(4))), 8)
            self.assertEqual(await instance.result("3 seconds"), 5)


class Events(Case):
    async def test_events_are_buffered_in_order_and_each_is_delivered_once(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            await step.sleep("nap", 1000)
            return [(await step.wait_for_event("w", "t")).payload for _ in range(4)]

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            for n in range(4):
                await instance.sendEvent({"type": "t", "payload": n})
            self.assertEqual(await self.finish(instance), [0, 1, 2, 3])
            self.assertEqual(self.rows("SELECT * FROM events"), [])

    async def test_waiters_of_one_type_are_served_first_come_first_served(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            waits = [step.wait_for_event(name, "t") for name in "abc"]
            return [event.payload for event in await asyncio.gather(*waits)]

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            for n in range(3):
                await self.clock.advance(10)
                await instance.send_event(type="t", payload=n)
            self.assertEqual(await self.finish(instance), [0, 1, 2])

    async def test_as_many_buffered_events_as_there_are_waiters_are_delivered_at_once(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            await step.sleep("nap", "1 hour")
            return await asyncio.gather(*(one_event(event, step) for _ in range(3)))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            for payload in range(3):
                await instance.send_event(type="t", payload=payload)
            await self.clock.advance("1 hour")
            self.assertEqual((await instance.status()).output, [0, 1, 2])

    async def test_an_event_of_another_type_wakes_nobody_and_stays(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_event)).create()
            await instance.send_event(type="other", payload=1)
            await self.clock.advance("1 minute")
            self.assertEqual((await instance.status()).status, "waiting")
            self.assertEqual(self.rows("SELECT type FROM events"), [("other",)])

    async def test_events_are_refused_when_the_instance_is_finished(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_step)).create()
            await self.finish(instance)
            await self.assertCode("instance.not_running", instance.send_event(type="t"))
            await self.assertCode("event.invalid_type", instance.send_event(type="a b"))
            await self.assertCode(
                "event.not_serializable", instance.send_event(type="t", payload={1})
            )

    async def test_deadlines_are_kept_while_nobody_runs(self) -> None:
        """An event sent in time wins over one sent too late, whenever the engine looks."""
        for sent, expected in ((59, "in time"), (60, "in time"), (61, None)):
            self.setUp()
            async with self.engine() as engine:
                await engine.bind(workflow(one_event)).create(id="i")
                await self.clock.advance(0)
            async with self.engine() as blocker:
                blocker.bind(workflow(one_step, "Other"))  # owns the file, and has not bound it
                await self.clock.advance(timedelta(minutes=sent))
                async with self.engine() as client:
                    instance = await client.bind(workflow(one_event)).get("i")
                    await instance.send_event(type="t", payload="in time")
            await self.clock.advance("1 day")
            async with self.engine() as engine:
                instance = await engine.bind(workflow(one_event)).get("i")
                await self.clock.advance(0)
                self.assertEqual((await instance.status()).output, expected)

    async def test_a_wait_that_runs_with_a_pending_sleep_is_served_at_once(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            nap = asyncio.ensure_future(step.sleep("nap", "1 hour"))
            return (await step.wait_for_event("w", "t")).payload, await nap

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance(10)
            await instance.send_event(type="t", payload=1)
            await self.clock.advance(0)
            self.assertEqual(self.rows("SELECT * FROM events"), [])
            self.assertEqual(await self.finish(instance), [1, None])


class Queue(Case):
    def limits(self, running: int) -> Any:
        return dataclasses.replace(FOREVER, running=running)

    async def test_at_most_so_many_run_and_the_others_are_queued_in_order(self) -> None:
        gate = Gate()
        async with self.engine(limits=self.limits(2)) as engine:
            bound = engine.bind(workflow(gate.run))
            await bound.create_batch([{"id": id} for id in "edcba"])
            await self.clock.advance(0)
            self.assertEqual(gate.begun, ["e", "d"])
            self.assertEqual((await (await bound.get("c")).status()).status, "queued")
            gate.open.set()
            await self.clock.advance(0)
            self.assertEqual(gate.begun, ["e", "d", "c", "b", "a"])

    async def test_the_limit_counts_the_instances_of_all_workflows_together(self) -> None:
        gate = Gate()
        async with self.engine(limits=self.limits(1)) as engine:
            for name in ("Two", "One"):
                await engine.bind(workflow(gate.run, name)).create(id=name)
            await self.clock.advance(0)
            self.assertEqual(gate.begun, ["Two"])

    async def test_waiting_instances_do_not_count(self) -> None:
        async with self.engine(limits=self.limits(1)) as engine:
            bound = engine.bind(workflow(one_sleep))
            instances = await bound.create_batch([{}] * 5)
            await self.clock.advance(0)
            self.assertEqual([(await i.status()).status for i in instances], ["waiting"] * 5)

    async def test_a_woken_instance_goes_ahead_of_those_that_never_started(self) -> None:
        gate = Gate()

        async def run(event: Any, step: Any) -> None:
            if event.payload:
                await step.sleep("nap", event.payload)
            await gate.run(event, step)

        async with self.engine(limits=self.limits(1)) as engine:
            bound = engine.bind(workflow(run))
            await bound.create_batch(
                [{"id": "late", "params": 2000}, {"id": "early", "params": 1000}]
            )
            await self.clock.advance(0)
            await bound.create_batch([{"id": id, "params": 0} for id in ("new", "newer")])
            await self.clock.advance(5000)
            self.assertEqual((await (await bound.get("late")).status()).status, "queued")
            gate.open.set()
            await self.clock.advance(0)
            self.assertEqual(gate.begun, ["new", "early", "late", "newer"])

    async def test_first_woken_is_first_also_within_a_millisecond(self) -> None:
        gate = Gate()

        async def run(event: Any, step: Any) -> None:
            if event.instance_id != "first":
                await step.wait_for_event("w", "go")
            await gate.run(event, step)

        async with self.engine(limits=self.limits(1)) as engine:
            bound = engine.bind(workflow(run))
            await bound.create_batch([{"id": id} for id in (*"abcd", "first")])
            await self.clock.advance(0)
            for id in "dbca":
                await (await bound.get(id)).send_event(type="go")
            gate.open.set()
            await self.clock.advance(0)
        self.assertEqual(gate.begun, ["first", *"dbca"])

    async def test_many_that_wake_at_one_moment_keep_their_order(self) -> None:
        begun: list[int] = []

        async def run(event: Any, step: Any) -> None:
            await step.sleep_until("nap", morning)
            begun.append(event.payload)

        self.enterContext(unittest.mock.patch.object(workflows, "BATCH", 10))
        morning = self.clock.now() + 3_600_000
        async with self.engine(limits=self.limits(1)) as engine:
            bound = engine.bind(workflow(run))
            await bound.create_batch([{"params": n} for n in range(35)])
            await self.clock.advance(0)
            await self.clock.advance("2 hours")
        self.assertEqual(begun, [*range(35)])

    async def test_woken_ones_are_queued_by_when_they_fell_due_however_late_it_is_noticed(self):
        gate = Gate()

        async def run(event: Any, step: Any) -> None:
            await step.sleep("nap", event.payload)
            await gate.run(event, step)

        async with self.engine(limits=self.limits(1)) as engine:
            bound = engine.bind(workflow(run))
            await bound.create_batch([{"id": f"{ms}", "params": ms} for ms in (3, 1, 2)])
            await self.clock.settle()
            self.clock._now += 1000
            gate.open.set()
            await self.clock.advance(0)
        self.assertEqual(gate.begun, ["1", "2", "3"])

    async def test_one_that_goes_on_by_itself_is_queued_by_that_moment(self) -> None:
        gate, alone = Gate(), asyncio.Event()

        async def run(event: Any, step: Any) -> None:
            nap = asyncio.create_task(step.sleep("nap", event.payload))
            await (alone.wait() if event.instance_id == "a" else nap)
            await gate.run(event, step)

        async with self.engine(limits=self.limits(1)) as engine:
            bound = engine.bind(workflow(run))
            await bound.create(id="a", params="1 hour")
            await bound.create(id="b", params="1 minute")
            await self.clock.settle()
            await engine.bind(workflow(gate.run, "Other")).create(id="other")
            await self.clock.settle()
            alone.set()
            await self.clock.advance("2 minutes")
            gate.open.set()
            await self.clock.advance(0)
        self.assertEqual(gate.begun, ["other", "a", "b"])

    async def test_one_that_is_paused_while_queued_gets_its_old_place_back(self) -> None:
        gate = Gate()
        async with self.engine(limits=self.limits(1)) as engine:
            bound = engine.bind(workflow(gate.run))
            await bound.create_batch([{"id": id} for id in "abcd"])
            await self.clock.advance(1000)
            paused = await bound.get("b")
            await paused.pause()
            self.assertEqual((await paused.status()).status, "paused")
            await self.clock.advance(1000)
            await paused.resume()
            gate.open.set()
            await self.clock.advance(0)
            self.assertEqual(gate.begun, ["a", "b", "c", "d"])

    async def test_what_falls_due_in_the_queue_is_over_when_the_instance_runs(self) -> None:
        gate = Gate()

        async def run(event: Any, step: Any) -> Any:
            if event.payload:
                return await gate.run(event, step)
            await asyncio.gather(step.sleep("one", "1 minute"), step.sleep("two", "2 minutes"))

        async with self.engine(limits=self.limits(1)) as engine:
            bound = engine.bind(workflow(run))
            sleeper = await bound.create(params=0)
            await self.clock.advance(0)
            await bound.create(params=1)
            await self.clock.advance("3 minutes")
            self.assertEqual((await sleeper.status()).status, "queued")
            gate.open.set()
            await self.clock.advance(0)
            self.assertEqual((await sleeper.status()).status, "complete")

    async def test_one_that_wakes_up_and_finds_no_slot_is_recorded_as_queued(self) -> None:
        gate = Gate()
        async with self.engine(limits=self.limits(1)) as engine:
            sleeper = await engine.bind(workflow(one_sleep)).create()
            await self.clock.advance("59 minutes")
            await engine.bind(workflow(gate.run, "Other")).create()
            await self.clock.advance("1 minute")
            gate.open.set()
            await self.finish(sleeper)
        first = "(SELECT min(key) FROM instances)"
        sql = f"SELECT type FROM journal WHERE instance = {first} AND step IS NULL ORDER BY seq"
        types = [type for (type,) in self.rows(sql)]
        self.assertEqual(types[2:], ["waiting", "queued", "running", "complete"])
        self.assertEqual(
            self.rows(f"SELECT started - created FROM instances WHERE key = {first}"), [(0,)]
        )

    async def test_a_slot_is_free_again_after_terminate_and_pause(self) -> None:
        gate = Gate()
        async with self.engine(limits=self.limits(1)) as engine:
            a, b, _ = await engine.bind(workflow(gate.run)).create_batch([{"id": i} for i in "abc"])
            await self.clock.advance(0)
            await a.terminate()
            await self.clock.advance(0)
            self.assertEqual(gate.begun, ["a", "b"])
            await b.pause()
            await self.clock.advance(0)
            self.assertEqual(gate.begun, ["a", "b"])  # its callback is still in flight
            gate.open.set()
            await self.clock.advance(0)
            self.assertEqual(gate.begun, ["a", "b", "c"])
            self.assertEqual((await b.status()).status, "paused")

    async def test_more_instances_than_one_transaction_wakes_all_start(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_sleep))
            for _ in range(3):
                await bound.create_batch([{}] * 100)
            await self.clock.advance("2 hours")
            self.assertEqual(self.rows("SELECT DISTINCT status FROM instances"), [("complete",)])

    async def test_more_queued_ones_than_one_transaction_takes_all_start(self) -> None:
        gate = Gate()
        with unittest.mock.patch.object(workflows, "BATCH", 4):
            async with self.engine() as engine:
                await engine.bind(workflow(gate.run)).create_batch([{}] * 10)
                await self.clock.settle()
                self.assertEqual(len(gate.begun), 10)
                gate.open.set()

    async def test_the_first_of_a_long_queue_is_the_first_by_its_place(self) -> None:
        gate = Gate()
        with unittest.mock.patch.object(workflows, "BATCH", 2):
            async with self.engine(limits=self.limits(1)) as engine:
                bound = engine.bind(workflow(gate.run))
                _, b, c, *_ = await bound.create_batch([{"id": id} for id in "abcde"])
                for instance in (b, c):
                    await instance.restart()
                gate.open.set()
                await self.clock.advance(0)
        self.assertEqual(gate.begun, ["a", "d", "e", "b", "c"])

    async def test_the_instances_of_all_workflows_stand_in_one_queue(self) -> None:
        gate = Gate()
        async with self.engine(limits=self.limits(1)) as engine:
            one, two = (engine.bind(workflow(gate.run, name)) for name in ("One", "Two"))
            for bound, id in ((two, "a"), (two, "b"), (one, "c"), (two, "d")):
                await bound.create(id=id)
                await self.clock.settle()
            self.assertEqual(gate.begun, ["a"])
            gate.open.set()
            await self.clock.advance(0)
        self.assertEqual(gate.begun, ["a", "b", "c", "d"])


# --------------------------------------------------------------------------------------------------

CAMPAIGN = """
import itertools
ROUNDS = 20
async def run(event, step):
    got = []
    async def acknowledged(id, name, config, work):
        often = {"retries": {"limit": 200, "delay": 5, "backoff": "constant"}}
        result = await step.do(name, often | config, work)
        note(f"ack:{id}:{name}:{result}")
    for n in range(ROUNDS):
        def work(name, suspend, id=event.instance_id):
            async def callback(ctx):
                note(f"begin:{id}:{name}")
                if suspend: await asyncio.sleep(0.004)
                if ctx.attempt == 1 and name[0] == "r": raise ValueError
                return os.urandom(8).hex()
            return acknowledged(id, name, {}, callback)
        def plain(id=event.instance_id, name=f"t{n}"):
            note(f"begin:{id}:{name}")
            return os.urandom(8).hex()
        await work(f"a{n}", False)
        await asyncio.gather(work(f"b{n}", True), work(f"c{n}", False), work(f"r{n}", n % 2))
        await acknowledged(event.instance_id, f"t{n}", {}, plain)
        await step.sleep(f"s{n}", 8)
        got.append((await step.wait_for_event(f"w{n}", "t", timeout="1 hour")).payload)
    return got
async def main(w):
    instances = [await get(w, id) for id in "xyz"]
    numbers = itertools.count(sum(line.startswith("send:") for line in words()))
    say("up")
    async def feed(i):
        while (await i.status()).status != "complete":
            n = next(numbers)
            note(f"send:{i.id}:{n}")
            await i.send_event(type="t", payload=n)
            note(f"sent:{i.id}:{n}")
            await asyncio.sleep(0.01)
    async def feed_all(i):
        try: await feed(i)
        except WorkflowError as error:
            if error.code != "instance.not_running": raise
    await asyncio.gather(*map(feed_all, instances))
go()
"""


class Sigkill(Real):
    async def test_nothing_acknowledged_is_lost_or_repeated_in_twenty_sigkills(self) -> None:
        await asyncio.gather(*map(self.survive, range(4)))

    async def survive(self, seed: int) -> None:
        """A database of its own survives five of them."""
        path, chance = f"{self.path}-{seed}", random.Random(seed)
        for _ in range(5):
            child = self.child(CAMPAIGN, path=path)
            await child.wait_for("up")
            await asyncio.sleep(chance.uniform(0, 0.12))
            child.kill()
        with contextlib.closing(sqlite3.connect(path)) as db:
            (unfinished,) = db.execute("SELECT count(*) FROM instances WHERE ended IS NULL")
        self.assertEqual(unfinished, (3,))
        self.assertEqual(await asyncio.to_thread(self.child(CAMPAIGN, path=path).end), ("up", 0))
        acknowledged: dict[str, str] = {}
        sent: dict[str, list[int]] = {"x": [], "y": [], "z": []}
        for line in self.log(path):
            what, id, name, *rest = line.split(":")
            if what == "begin":
                self.assertNotIn(f"{id}:{name}", acknowledged, "it ran again")
            elif what == "ack":
                self.assertEqual(acknowledged.setdefault(f"{id}:{name}", *rest), *rest)
            elif what == "sent":
                sent[id].append(int(name))
        self.assertEqual(len(acknowledged), 3 * 20 * 5)
        async with Engine(path) as engine:
            bound = engine.bind(workflow(one_step))
            for id, stored in sent.items():
                got = await (await bound.get(id)).result()
                self.assertEqual(got, sorted(set(got)), "order, and exactly once")
                self.assertEqual(
                    set(stored) - set(got) - set(range(got[-1] + 1, 9999)), set(), "lost"
                )

    async def test_what_a_call_changed_survives_the_death_right_after_it(self) -> None:
        self.child(
            """
            async def run(event, step): return (await step.wait_for_event("w", "t")).payload
            async def main(w):
                event, pause, end, again = [await get(w, id) for id in "abcd"]
                for i in (event, pause, end, again): await until(i, "waiting")
                await event.send_event(type="t", payload=5)
                new = w.create(id="e")
                await asyncio.gather(pause.pause(), end.terminate(), again.restart(), new)
                die()
            go()
            """
        ).end()
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_event))
            self.assertEqual(await (await bound.get("a")).result("2 seconds"), 5)
            self.assertEqual((await (await bound.get("b")).status()).status, "paused")
            self.assertEqual((await (await bound.get("c")).status()).status, "terminated")
            for id in "de":
                await reach(await bound.get(id), "waiting")
        self.assertEqual(self.rows("SELECT count(*) FROM instances"), [(5,)])

    async def test_usage_is_exact_whoever_dies_and_whoever_changes_an_instance(self) -> None:
        for way in ("status", "pause", "terminate", "delete", "restart"):
            with self.subTest(way):
                self.setUp()
                child = self.child(
                    """
                    async def run(event, step):
                        for each in range(5): await step.do(f"s{each}", lambda: "four")
                        say("up")
                        await asyncio.sleep(60)
                    async def main(w): await (await get(w)).result()
                    go()
                    """
                )
                await child.wait_for("up")
                self.assertEqual(self.rows("SELECT sum(steps) FROM usage"), [(0,)])
                os.kill(child.pid, signal.SIGSTOP)
                async with self.engine() as client:
                    self.assertEqual((await client.usage()).storage_bytes, 4 + 5 * 6)
                    await getattr(await (await client.workflow("test")).get("i"), way)()
                    child.kill()
                    self.assertEqual((await client.usage()).steps, 5)
                async with self.engine() as engine:
                    engine.bind(workflow(one_event, "Other"))
                    usage = await engine.usage()
                    stored = 4 if way == "restart" else 4 + 5 * 6
                    self.assertEqual((usage.steps, usage.storage_bytes), (5, stored))

    async def test_a_wait_in_a_callback_that_died_for_good_takes_no_event(self) -> None:
        script = """
            async def run(event, step):
                async def outer(): await step.wait_for_event("inner", "t")
                try: await step.do("outer", {"retries": {"limit": 0}}, outer)
                except WorkflowInternalError: pass
                return (await step.wait_for_event("top", "t")).payload
            async def main(w):
                instance = await get(w)
                say("up")
                say(await instance.result("10 seconds"))
            go()
            """
        child = self.child(script)
        await child.wait_for("up")
        while not self.rows("SELECT 1 FROM waits"):
            await asyncio.sleep(0.01)
        child.kill()
        child = self.child(script)
        await child.wait_for("up")
        while self.rows("SELECT status FROM instances") != [("waiting",)]:
            await asyncio.sleep(0.01)
        async with self.engine() as client:
            instance = await (await client.workflow("test")).get("i")
            await instance.send_event(type="t", payload="kept")
        self.assertEqual(await asyncio.to_thread(child.end), ("kept", 0))

    def test_a_finished_step_never_runs_again_after_sigkill_and_an_interrupted_one_does(
        self,
    ) -> None:
        self.runs_until_it_ends(
            """
            async def run(event, step):
                async def first(): note("first")
                async def second(ctx):
                    note("second")
                    await asyncio.sleep(0.05)
                    if ctx.attempt == 1: die()
                await step.do("first", first)
                await step.do("second", {"retries": {"delay": 1}}, second)
            async def main(w): await (await get(w)).result()
            go()
            """
        )
        self.assertEqual(self.log(), ["first", "second", "second"])

    def kill_itself(self, callback: str) -> None:
        self.runs_until_it_ends(
            f"""
            async def run(event, step):
                {callback}
                try: await step.do("die", {{"retries": {{"limit": 2, "delay": 1}}}}, callback)
                except WorkflowInternalError as error: return str(error)
            async def main(w): note((await (await get(w)).result()).replace(" ", "-"))
            go()
            """
        )
        *attempts, message = self.log()
        self.assertEqual(message, "attempt-failed:-the-engine-stopped")
        self.assertIn(len(attempts), (3, 4), "2 retries are 3 attempts, and one more is allowed")

    def test_a_step_that_kills_its_process_at_once_ends_after_its_retries(self) -> None:
        self.kill_itself("async def callback(): note('x'); die()")

    def test_a_step_that_kills_its_process_later_ends_after_its_retries(self) -> None:
        self.kill_itself("async def callback(): note('x'); await asyncio.sleep(0.02); die()")

    def test_a_thread_that_kills_its_process_ends_after_its_retries(self) -> None:
        self.kill_itself("def callback(): note('x'); time.sleep(0.02); die()")

    def test_a_dead_process_makes_the_next_one_careful_until_a_step_has_finished(self) -> None:
        """Careful: the start of an attempt is on disk before its callback begins."""
        self.runs_until_it_ends(
            """
            import sqlite3
            async def run(event, step):
                async def look(ctx):
                    with sqlite3.connect(PATH) as db:
                        sql = "SELECT count(*) FROM journal WHERE type = 'start' AND step LIKE ?"
                        ((count,),) = db.execute(sql, (f"%{ctx.step.name}%",)).fetchall()
                    note(f"{ctx.step.name}={count}")
                    if ctx.step.name == "two" and not count: die()
                soon = {"retries": {"delay": 1}}
                for name in ("one", "two", "three"): await step.do(name, soon, look)
            async def main(w): await (await get(w)).result()
            go()
            """
        )
        # (On Python 3.11 each start is a row, and may be on disk in time.)
        self.assertRegex(" ".join(self.log()), r"^one=[01] (two=0 )?two=[12] three=[01]$")

    async def test_an_event_is_consumed_in_the_commit_that_ends_its_wait(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_event)).create()
            await reach(instance, "waiting")
            await instance.send_event(type="t", payload=5)
            counts = self.rows(
                "SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM waits),"
                " (SELECT count(*) FROM journal WHERE type = 'event')"
            )
            self.assertIn(counts, [[(0, 0, 1)], [(1, 1, 0)]])
            self.assertEqual(await instance.result("2 seconds"), 5)

    async def test_the_machine_may_die_too(self) -> None:
        """WAL, and every commit is synced."""
        async with self.engine() as engine:
            pragmas = ("journal_mode", "synchronous", "fullfsync")

            def ask(tx: Any) -> list[Any]:
                return [tx.db.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]

            self.assertEqual(await engine.call(ask), ["wal", 2, 1])


async def rounds(event: Any, step: Any) -> Any:
    """All that an instance can wait for, again and again; no attempt may fail."""
    got = []
    for n in range(5):

        async def flaky(ctx: Any) -> None:
            if ctx.attempt == 1:
                raise ValueError

        async def slow(name: str = f"{event.instance_id}{n}") -> None:
            await asyncio.sleep(0.002)
            RAN.append(name)

        def plain() -> None:
            time.sleep(0.001)

        once = {"retries": {"limit": 0}}
        steps = step.do("slow", once, slow), step.do("plain", once, plain), step.sleep("nap", 3)
        await asyncio.gather(*steps)
        await step.do("flaky", {"retries": {"limit": 1, "delay": 3}}, flaky)
        with contextlib.suppress(WorkflowTimeoutError):
            got.append((await step.wait_for_event("w", "t", timeout=20)).payload)
    return got


RAN: list[str] = []


class Left(Real):
    """What the attempt before has left behind, while another process holds the lock."""

    async def test_a_call_that_a_callback_has_cancelled_begins_anew_when_that_is_stored(self):
        for name in ("do", "sleep"):
            with self.subTest(name):
                left: list[Any] = []
                locked = sqlite3.connect(self.path, isolation_level=None)

                async def run(event: Any, step: Any, name=name, left=left, locked=locked) -> Any:
                    def inner(callback: Any, ms: int) -> Any:
                        if name == "do":
                            return step.do("inner", ONCE, callback)
                        return step.sleep("inner", ms)

                    async def outer() -> str:
                        if not left:
                            left.append(asyncio.create_task(inner(asyncio.Event().wait, 10**6)))
                            await asyncio.sleep(0.02)
                            raise ValueError
                        locked.execute("BEGIN IMMEDIATE")
                        left[0].cancel()
                        asyncio.get_running_loop().call_later(0.05, locked.execute, "COMMIT")
                        await inner(returns(1), 1)
                        return "ok"

                    return await step.do("outer", constant(1), outer)

                async with self.engine() as engine:
                    instance = await engine.bind(workflow(run, name)).create()
                    self.assertEqual(await instance.result("5 seconds"), "ok")
                locked.close()


class Campaigns(Real):
    """Seeded, and on the real clock: what random timing finds."""

    debug = True

    def setUp(self) -> None:
        super().setUp()
        RAN.clear()

    async def steer(self, instances: list[Any], chance: random.Random, calls: str, ms: int) -> None:
        end = time.monotonic() + ms / 1000
        while time.monotonic() < end:
            with contextlib.suppress(WorkflowError):  # it may have ended
                instance = chance.choice(instances)
                call = chance.choice(calls.split())
                if call == "send":
                    self.sent = getattr(self, "sent", 0) + 1
                    await instance.send_event(type="t", payload=self.sent)
                else:
                    await getattr(instance, call)()
            await asyncio.sleep(chance.choice([0, 0.001, 0.006]))

    async def test_clean_stops_at_any_moment_fail_no_attempt_and_lose_no_event(self) -> None:
        chance, unfinished = random.Random(1), True
        while unfinished:
            async with self.engine(hibernate_after=chance.choice([0, 5, 1000])) as engine:
                bound = engine.bind(workflow(rounds))
                await bound.create_batch([{"id": id} for id in "xyz"])
                instances = [await bound.get(id) for id in "xyz"]
                await self.steer(instances, chance, "send", chance.randrange(20, 80))
            unfinished = self.rows("SELECT 1 FROM instances WHERE ended IS NULL")
        self.assertEqual(self.rows("SELECT DISTINCT status FROM instances"), [("complete",)])
        for (output,) in self.rows("SELECT data FROM journal WHERE type = 'complete'"):
            got = workflows.decode(output)
            self.assertEqual(got, sorted(set(got)))

    async def test_pauses_at_any_moment_from_any_process_lose_and_repeat_nothing(self) -> None:
        for seed in range(4):
            chance = random.Random(seed)
            limits = dataclasses.replace(FOREVER, running=chance.choice([1, 2, 100]))
            async with self.engine(limits=limits, hibernate_after=seed) as engine:
                bound = engine.bind(workflow(rounds))
                await reach(await bound.create(id=f"{seed}-"), "waiting", "running")
                async with self.engine() as client:
                    bound = client.bind(workflow(rounds))
                    ids = [f"{seed}{id}" for id in "abc"]
                    batch = await bound.create_batch([{"id": i} for i in ids])
                    calls = "pause resume resume send"
                    await asyncio.gather(*(self.steer(batch, chance, calls, 250) for _ in "123"))
                    for instance in batch:
                        await instance.resume()
                        await instance.result("4 seconds")
        self.assertEqual(len(RAN), len(set(RAN)))

    async def test_restarts_and_terminations_at_any_moment_end_in_one_full_run(self) -> None:
        async with self.engine() as engine, self.engine() as client:
            bound = engine.bind(workflow(rounds))
            batch = await bound.create_batch([{"id": id} for id in "xyz"])
            await reach(batch[0], "waiting", "running")
            theirs = client.bind(workflow(rounds))
            theirs = [await theirs.get(instance.id) for instance in batch]
            chance, calls = random.Random(1), "restart restart terminate pause resume send"
            both = (self.steer(side, chance, calls, 400) for side in (batch, theirs))
            await asyncio.gather(*both)
            for instance in batch:
                await instance.restart()
            for instance in batch:
                await instance.result("4 seconds")
        steps = "SELECT count(*) FROM journal WHERE type = 'done' GROUP BY instance"
        self.assertEqual(self.rows(steps), [(15,)] * 3)


class CleanStop(Case):
    async def test_a_clean_stop_counts_no_attempt(self) -> None:
        gate, attempts = Gate(), []

        async def run(event: Any, step: Any) -> None:
            async def callback(ctx: Any) -> None:
                attempts.append(ctx.attempt)
                await gate.pass_through("")

            await step.do("s", {"retries": {"limit": 0}}, callback)

        for _ in range(3):
            async with self.engine() as engine:
                bound = engine.bind(workflow(run))
                await bound.create_batch([{"id": "i"}])
                await self.clock.advance(0)
        gate.open.set()
        async with self.engine() as engine:
            await self.finish(await engine.bind(workflow(run)).get("i"))
        self.assertEqual(attempts, [1, 1, 1, 1])

    async def test_leaving_twice_or_before_entering_is_harmless(self) -> None:
        await Engine(self.path).__aexit__(None, None, None)
        async with self.engine() as engine:
            await engine.bind(workflow(Gate().run)).create()
            await asyncio.gather(*(engine.__aexit__(None, None, None) for _ in range(2)))
        with self.assertRaisesRegex(RuntimeError, "closed"):
            await engine.usage()

    async def test_a_drained_engine_lets_attempts_end_and_none_begin(self) -> None:
        gate, seen = Gate(), []

        async def run(event: Any, step: Any) -> None:
            async def callback() -> None:
                await gate.pass_through(event.instance_id)
                await engine.env.TEST.create(id="other")  # it can still use the engine
                seen.append(await step.do("inside", lambda: "inside"))

            await step.do("one", callback)
            await step.do("two", lambda: seen.append("two"))

        async with self.engine(drain="5 seconds") as engine:
            await engine.bind(workflow(run)).create(id="i")
            await self.clock.settle()
            leaving = asyncio.create_task(engine.__aexit__(None, None, None))
            await asyncio.sleep(0.02)
            self.assertFalse(leaving.done())
            gate.open.set()
            await leaving
        self.assertEqual((seen, gate.begun, gate.cancelled), (["inside"], ["i"], 0))
        ends = "SELECT step, type FROM journal WHERE step IS NOT NULL AND type != 'start'"
        steps = ["do\none\n1\ndo\ninside\n1", "do\none\n1"]
        self.assertEqual(self.rows(ends), [(step, "done") for step in steps])
        self.assertEqual(self.rows("SELECT id, status FROM instances")[1], ("other", "queued"))

    async def test_what_has_not_ended_when_the_drain_is_over_is_cancelled(self) -> None:
        gate = Gate()
        async with self.engine(drain=30) as engine:
            await engine.bind(workflow(gate.run)).create()
            await self.clock.settle()
            began = time.monotonic()
        self.assertTrue(0.03 <= time.monotonic() - began < 1)
        self.assertEqual(gate.cancelled, 1)

    async def test_an_attempt_that_run_has_just_cancelled_does_not_count_either(self) -> None:
        attempts, lives = [], []

        async def run(event: Any, step: Any) -> None:
            lives.append(1)

            async def hang(ctx: Any) -> None:
                attempts.append(ctx.attempt)
                await asyncio.sleep(3600 if len(attempts) == 1 else 0)

            task = asyncio.create_task(step.do("hang", hang))
            await step.do("s", value)
            if len(lives) == 1:
                task.cancel()
                await asyncio.sleep(3600)  # not a step: so nothing says that it was cancelled
            await task

        made = workflow(run)
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.settle()
        async with self.engine() as engine:
            await self.finish(await engine.bind(made).get("i"))
        self.assertEqual(attempts, [1, 1])

    async def test_after_a_clean_stop_nothing_is_running(self) -> None:
        async with self.engine() as engine:
            await engine.bind(workflow(Gate().run)).create()
            await self.clock.advance(0)
        self.assertEqual(self.rows("SELECT status, careful FROM instances"), [("queued", 0)])

    async def test_what_has_a_slot_and_no_life_yet_is_left_to_the_next_owner(self) -> None:
        async with self.engine() as engine:
            await engine.bind(workflow(one_step)).create()
        self.assertEqual(self.rows("SELECT status, careful FROM instances"), [("queued", 0)])

    async def test_a_clean_stop_keeps_the_retry_delay_of_an_attempt_that_just_failed(self) -> None:
        gate, attempts = Gate(), []

        async def fail() -> None:
            attempts.append(1)
            await gate.open.wait()
            raise ValueError

        async def run(event: Any, step: Any) -> None:
            await step.do("s", {"retries": {"delay": "1 hour"}}, fail)

        async with self.engine() as engine:
            await engine.bind(workflow(run)).create()
            await self.clock.advance(0)
            gate.open.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        async with self.engine() as engine:
            engine.bind(workflow(run))
            await self.clock.advance("59 minutes")
            self.assertEqual(len(attempts), 1)
            await self.clock.advance("1 minute")
            self.assertEqual(len(attempts), 2)

    async def test_nothing_is_left_behind(self) -> None:
        threads = threading.active_count()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_step)).create()
            await self.finish(instance)
            gate = await engine.bind(workflow(Gate().run, "Gate")).create()
            await engine.bind(workflow(one_sleep, "Nap")).create()
            await reach(gate, "running")
        self.assertEqual(sorted(os.listdir(self.folder)), ["test.db", "test.db-owner"])
        await until(lambda: threading.active_count() == threads)
        await asyncio.sleep(0)
        self.assertEqual(len(asyncio.all_tasks()), 1)

    async def test_leaving_waits_for_the_cleanup_of_a_callback(self) -> None:
        gate, cleaned = Gate(), []

        async def callback() -> None:
            try:
                await gate.pass_through("")
            finally:
                await asyncio.sleep(0.02)
                cleaned.append(1)

        async def run(event: Any, step: Any) -> None:
            await step.do("s", callback)

        async with self.engine() as engine:
            await engine.bind(workflow(run)).create()
            await self.clock.advance(0)
        self.assertEqual(cleaned, [1])

    async def test_leaving_that_is_cancelled_leaves_nothing_behind_either(self) -> None:
        began = asyncio.Event()

        async def stubborn() -> None:
            began.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(9)
            await asyncio.sleep(0.2)

        async def run(event: Any, step: Any) -> None:
            await step.do("s", stubborn)

        async def live() -> None:
            async with Engine(self.path) as engine:
                await engine.bind(workflow(run)).create()
                await began.wait()

        life = asyncio.create_task(live())
        await began.wait()
        await asyncio.sleep(0.05)
        life.cancel()
        await asyncio.wait([life])
        self.assertEqual(sorted(os.listdir(self.folder)), ["test.db", "test.db-owner"])

    async def test_an_engine_is_left_however_often_that_is_cancelled(self) -> None:
        began = asyncio.Event()

        async def slow() -> None:
            began.set()
            try:
                await asyncio.sleep(9)
            finally:
                await asyncio.sleep(0.2)

        async def run(event: Any, step: Any) -> None:
            await step.do("s", slow)

        async def live() -> None:
            async with Engine(self.path) as engine:
                await engine.bind(workflow(run)).create()
                await asyncio.sleep(9)

        life = asyncio.create_task(live())
        await began.wait()
        for _ in range(3):
            await asyncio.sleep(0.02)
            life.cancel()
        await asyncio.wait([life])
        self.assertTrue(life.cancelled())
        self.assertEqual(sorted(os.listdir(self.folder)), ["test.db", "test.db-owner"])
        self.assertNotIn(os.path.realpath(self.path), workflows.Database.owned)

    async def test_what_a_callback_waits_for_falls_due_while_an_engine_is_drained(self) -> None:
        async def run(event: Any, step: Any) -> str:
            async def outer() -> None:
                await step.sleep("nap", 100)
                await step.wait_for_event("news", "t")

            await step.do("outer", outer)
            return "done"

        async with Engine(self.path, drain="5 seconds") as engine:
            instance = await engine.bind(workflow(run)).create()
            await instance.send_event(type="t")
            await asyncio.sleep(0.02)
        ends = "SELECT step, type FROM journal WHERE type IN ('done', 'stop')"
        self.assertEqual(self.rows(ends), [("do\nouter\n1", "done")])

    async def test_what_falls_due_while_an_engine_is_drained_keeps_nobody_busy(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await asyncio.gather(
                step.do("s", functools.partial(asyncio.sleep, 0.3)), step.sleep("nap", 100)
            )

        async with Engine(self.path, drain="1 second") as engine:
            await engine.bind(workflow(run)).create()
            await asyncio.sleep(0.05)
            transact = unittest.mock.Mock(wraps=engine.writer._transact)
            engine.writer._transact = transact
        self.assertLess(transact.call_count, 20)

    def test_a_loop_that_is_closed_without_leaving_lets_go_of_the_file(self) -> None:
        async def forget() -> None:
            engine = await Engine(self.path).__aenter__()
            engine.bind(workflow(one_step))
            await asyncio.sleep(0.1)

        async def next_one() -> Any:
            async with Engine(self.path) as engine:
                instance = await engine.bind(workflow(one_step)).create(params=5)
                return await instance.result("2 seconds")

        asyncio.run(forget())
        self.assertEqual(asyncio.run(next_one()), 5)


class Interrupted(Real):
    async def test_ctrl_c_stops_cleanly_and_the_next_process_goes_on(self) -> None:
        script = """
            async def run(event, step):
                async def slow(ctx):
                    note(f"attempt-{ctx.attempt}")
                    say("running")
                    await asyncio.sleep(0 if len(sys.argv) > 2 else 9)
                await step.do("slow", slow)
            async def main(w):
                await (await get(w)).result()
            go()
            """
        child = self.child(script, fresh=True)
        await child.wait_for("running")
        child.interrupt()
        self.assertEqual(await asyncio.to_thread(child.end), ("interrupted", 0))
        self.assertEqual(
            sorted(os.listdir(self.folder)), ["test.db", "test.db-owner", "test.db.log"]
        )
        self.assertEqual(self.child(script, "again").end(), ("running", 0))
        self.assertEqual(self.log(), ["attempt-1", "attempt-1"])

    def test_keyboard_interrupt_in_a_callback_leaves_the_program(self) -> None:
        async def early() -> None:
            raise KeyboardInterrupt

        async def late() -> None:
            await asyncio.sleep(0.01)
            raise KeyboardInterrupt

        def plain() -> None:
            raise KeyboardInterrupt

        for callback in (early, late, plain):
            self.setUp()

            async def run(event: Any, step: Any, callback: Any = callback) -> None:
                await step.do("s", callback)

            async def main(run: Any = run) -> None:
                async with Engine(self.path) as engine:
                    await (await engine.bind(workflow(run)).create()).result("5 seconds")

            with self.assertRaises(KeyboardInterrupt):
                asyncio.run(main())
            self.assertEqual(self.rows("SELECT ended FROM instances"), [(None,)])

    def test_keyboard_interrupt_in_a_commit_is_not_for_run_to_catch(self) -> None:
        script = """
            import threading
            async def run(event, step):
                global execute
                for n in range(20):
                    if n == 10:
                        database = engine.writer.database
                        execute, database.execute = database.execute, interrupt
                    try: await step.do(str(n), value)
                    except BaseException: say("caught"); return
            def interrupt(sql, *args):
                if threading.current_thread() is threading.main_thread():  # as Python has it
                    raise KeyboardInterrupt
                return execute(sql, *args)
            async def main():
                global engine
                workflows.QUICK = 60  # each commit is on the loop, soon
                async with Engine(PATH) as engine:
                    await (await get(engine.bind(Test))).result("5 seconds")
            try: asyncio.new_event_loop().run_until_complete(main())
            except KeyboardInterrupt: say("interrupted")
            os._exit(0)
            """
        self.assertEqual(self.child(script).end(), ("interrupted", 0))


class Storage(Real):
    debug = True

    async def refused(self, pattern: str, path: str | None = None) -> None:
        """The engine doesn't open the file, says why, and writes to nothing."""
        before = self.contents()
        with self.assertRaisesRegex(WorkflowInternalError, pattern):
            async with Engine(path or self.path):
                pass
        self.assertEqual(self.contents(), before)

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}

    async def test_an_operation_that_fails_undoes_its_transaction_and_stops_the_engine(self):
        def fail(tx: Any, error: Exception) -> None:
            raise error

        for error in (ZeroDivisionError(), WorkflowInternalError("failed")):
            with self.subTest(error), self.assertLogs("workflows", "CRITICAL"):
                async with self.engine() as engine:
                    bound = engine.bind(workflow(one_step))
                    await (await bound.create()).result()
                    before = self.rows("SELECT count(*) FROM journal")
                    calls = asyncio.gather(bound.create(), engine.call(fail, error), bound.create())
                    with self.assertRaises(WorkflowInternalError):
                        await calls
                    with self.assertRaises(WorkflowInternalError):
                        await bound.create()
                    self.assertEqual(self.rows("SELECT count(*) FROM journal"), before)
                    async with self.engine() as next:  # while that one is not left yet
                        instance = await next.bind(workflow(one_step)).create(params=5)
                        self.assertEqual(await instance.result("5 seconds"), 5)

    async def test_an_operation_that_cannot_read_a_record_is_refused_alone(self) -> None:
        def fail(tx: Any) -> None:
            raise workflows.Unreadable("damaged")

        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            with self.assertRaisesRegex(WorkflowInternalError, "damaged"):
                await engine.call(fail)
            self.assertEqual(await (await bound.create(params=5)).result(), 5)

    async def test_what_is_posted_first_is_answered_first_whoever_commits_it(self) -> None:
        order = []
        async with self.engine() as engine:
            for name, distrust in (("thread", 1), ("loop", 0)):
                engine.writer.post(workflows.nothing, then=lambda *_, name=name: order.append(name))
                engine.writer._distrust = distrust
                await asyncio.sleep(0)
            time.sleep(0.1)  # the thread has done it, but the loop does not know yet
            await until(lambda: len(order) == 2)
        self.assertEqual(order, ["thread", "loop"])

    async def test_a_file_system_without_wal_is_refused(self) -> None:
        def insist(self: Any, sql: str) -> Any:
            return [("delete",)] if "journal_mode" in sql else old(self, sql)

        old = workflows.Database._insist
        patched = unittest.mock.patch.object(workflows.Database, "_insist", insist)
        with patched, self.assertRaisesRegex(WorkflowInternalError, "WAL"):
            async with self.engine():
                pass

    async def test_a_file_that_is_no_database_is_refused(self) -> None:
        Path(self.path).write_text("Dear diary, " * 1000)
        await self.refused("not a database")

    async def test_a_directory_is_refused(self) -> None:
        await self.refused(self.folder.name, str(self.folder))
        await self.refused("missing", str(self.folder / "missing" / "test.db"))

    async def test_somebody_elses_database_is_refused_and_stays_byte_for_byte(self) -> None:
        for mode in ("delete", "wal"):
            with contextlib.closing(sqlite3.connect(self.path)) as db:
                db.execute(f"PRAGMA journal_mode = {mode}")
                db.execute(f"CREATE TABLE mine_{mode} (x)")
                db.commit()
                await self.refused("not a database of this module")
            await self.refused("not a database of this module")

    def test_a_process_that_died_inside_a_checkpoint_left_a_good_file(self) -> None:
        child = self.child(
            """
            async def run(event, step):
                for n in range(6): await step.do(f"s{n}", lambda: value("x" * 20_000))
                await step.sleep("nap", "1 hour")
            async def main(w):
                await until(await get(w), "waiting")
                die()
            go()
            """
        )
        child.end()
        # A checkpoint copies pages from the WAL, the first one first: which tells a size that the
        # file hasn't got yet. In the WAL a frame is a header of 24 bytes and a page.
        log = Path(self.path + "-wal").read_bytes()
        size = int.from_bytes(log[8:12])
        frames = [log[at : at + 24 + size] for at in range(32, len(log), 24 + size)]
        first = [frame[24:] for frame in frames if int.from_bytes(frame[:4]) == 1][-1]
        with open(self.path, "r+b") as file:
            file.write(first)
        with contextlib.closing(sqlite3.connect(f"file:{self.path}?immutable=1", uri=True)) as db:
            self.assertRaisesRegex(
                sqlite3.DatabaseError, "malformed", db.execute, "PRAGMA user_version"
            )

        async def main() -> str:
            async with self.engine() as engine:
                return (await (await engine.bind(workflow(one_step)).get("i")).status()).status

        self.assertIn(asyncio.run(main()), ("waiting", "queued", "running"))

    async def test_a_newer_schema_is_refused(self) -> None:
        async with self.engine():
            pass
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            db.execute("PRAGMA user_version = 99")
        await self.refused("newer version")

    def test_a_read_only_file_is_refused(self) -> None:
        asyncio.run(self._make())
        os.chmod(self.path, 0o444)
        os.chmod(self.folder, 0o555)
        self.addCleanup(os.chmod, self.folder, 0o755)
        child = self.child(
            """
            async def main(w): say("opened")
            if os.getuid() == 0: os.setuid(65534)
            try: go()
            except WorkflowInternalError as error: say(error)
            """
        )
        self.assertRegex(child.end()[0], "read-only")

    async def _make(self, **options: Any) -> None:
        async with self.engine() as engine:
            await engine.bind(workflow(one_event)).create(id="i")

    async def test_a_full_disk_stops_the_engine_and_loses_nothing_acknowledged(self) -> None:
        child = self.child(
            """
            import resource
            async def run(event, step):
                async def slow():
                    try: await asyncio.sleep(9)
                    except asyncio.CancelledError: say("cancelled"); raise
                await step.do("slow", {"retries": {"limit": 0}}, slow)
            async def main(w):
                instance = await get(w)
                await until(instance, "running")
                waiting = asyncio.create_task(instance.result())
                resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
                try:
                    for n in range(1000):
                        await w.create(id=f"{n}", params="x" * 5000)
                        say("stored", n)
                except WorkflowInternalError as error: say(error)
                for call in (instance.status(), instance.pause(), w.create(), waiting):
                    try: await call; say("!")
                    except WorkflowInternalError: say("refused")
            go()
            """
        )
        lines, code = child.end()
        stored = lines.count("stored")
        self.assertEqual((code, lines.count("refused"), lines.count("!")), (0, 4, 0))
        self.assertGreater(stored, 10)
        self.assertIn("cancelled", lines)
        async with self.engine() as engine:
            engine.bind(workflow(one_step))
            await engine.call(workflows.nothing)
            self.assertEqual(self.rows("SELECT count(*) FROM instances"), [(stored + 1,)])
            self.assertEqual(
                self.rows("SELECT * FROM journal WHERE type IN ('error', 'errored')"), []
            )

    async def test_a_file_that_is_removed_or_replaced_stops_the_engine(self) -> None:
        async def lose(name: str, replace: bool) -> None:
            path, gate = str(self.folder / name), Gate()
            async with Engine(path) as engine:
                instance = await engine.bind(workflow(gate.run)).create(id="i")
                await until(lambda: gate.begun)
                os.rename(path, path + ".old")
                if replace:
                    shutil.copy(path + ".old", path)
                with self.assertRaisesRegex(WorkflowInternalError, "removed or replaced"):
                    await instance.result("5 seconds")
                self.assertEqual(gate.cancelled, 1)
                with self.assertRaises(WorkflowInternalError):
                    await instance.status()
            os.replace(path + ".old", path)
            gate.open.set()
            async with Engine(path) as engine:
                instance = await engine.bind(workflow(gate.run)).get("i")
                self.assertEqual(await instance.result("2 seconds"), "i")

        with self.assertLogs("workflows", logging.CRITICAL), quicker(5):
            await asyncio.gather(lose("a.db", False), lose("b.db", True))

    async def test_an_empty_file_and_odd_names_are_fine(self) -> None:
        for name in ("empty.db", "50%41?mode=ro#x y.db", "file:ü.db"):
            path = self.folder / name
            path.touch()
            for _ in range(2):
                async with Engine(path) as engine:
                    engine.bind(workflow(one_step))
            self.assertGreater(path.stat().st_size, 0)

    def test_many_processes_may_make_the_file_at_the_same_moment(self) -> None:
        script = """
            async def run(event, step): return 5
            async def main(w): say(await (await get(w)).result("9 seconds"))
            sys.stdin.readline()
            go()
            """
        children = [self.child(script) for _ in range(6)]
        for child in children:
            child.tell("go")
        self.assertEqual([child.end() for child in children], [("5", 0)] * 6)

    async def test_no_step_begins_while_the_end_of_its_run_is_being_stored(self) -> None:
        begun, ends = [], asyncio.Event()

        async def run(event: Any, step: Any) -> None:
            async def late() -> None:
                await asyncio.sleep(0.05)
                await step.do("late", lambda: value(begun.append(1)))

            await step.do("first", value)
            await ends.wait()
            self.task = asyncio.create_task(late())

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await until(lambda: self.rows("SELECT 1 FROM journal WHERE type = 'done'"))
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")
                ends.set()
                await asyncio.sleep(0.2)
            await instance.result("5 seconds")
        self.assertEqual(begun, [])

    async def test_somebody_who_holds_the_write_lock_delays_calls_but_not_the_loop(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_event))
            instance = await bound.create()
            await reach(instance, "waiting")
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")
                sending = asyncio.create_task(instance.send_event(type="t", payload=1))
                longest, last = 0.0, time.monotonic()
                for _ in range(30):
                    await asyncio.sleep(0.01)
                    longest, last = max(longest, time.monotonic() - last), time.monotonic()
                self.assertFalse(sending.done())
            await sending
            self.assertLess(longest, 0.1)
            self.assertEqual(await instance.result("2 seconds"), 1)


OWNER = """
    async def run(event, step):
        async def work():
            note("begin")
            try: await asyncio.sleep(event.payload)
            except asyncio.CancelledError: note("cancelled"); raise
            note("end")
        await step.do("work", work)
        return (await step.wait_for_event("w", "t")).payload
    async def main(w):
        await get(w, "o", 0)
        await until(await get(w, "o"), "waiting")
        say("up")
        await asyncio.sleep(60)
    go()
    """


class Processes(Real):
    debug = True

    @contextlib.asynccontextmanager
    async def client(self, run: Callable[..., Any] = one_event, script: str = OWNER) -> Any:
        """A workflow as this process sees it, while another one runs the instances."""
        self.owner = self.child(script)
        await self.owner.wait_for("up")
        async with self.engine() as engine:
            yield engine.bind(workflow(run))

    async def test_exactly_one_process_runs_instances_and_the_others_are_clients(self) -> None:
        async with self.client() as bound:
            instance = await bound.create(id="i", params=0)
            await reach(instance, "waiting")
            self.assertEqual((bound.engine.lives.runs, self.log().count("begin")), ({}, 2))
            await instance.send_event(type="t", payload=5)
            self.assertEqual(await instance.result("2 seconds"), 5)
            self.assertEqual(bound.engine.lives.runs, {})

    async def test_changes_of_other_processes_are_seen_within_100_ms(self) -> None:
        async with self.client() as bound:
            times = []
            for n in range(5):
                began = time.monotonic()
                instance = await bound.create(id=f"i{n}", params=0)
                await reach(instance, "waiting")  # there
                await instance.send_event(type="t", payload=n)
                await instance.result("2 seconds")  # there and back
                times.append(time.monotonic() - began)
            self.assertLess(min(times), 0.25)
            self.assertLess(max(times), 0.6)

    async def test_steering_from_a_client_reaches_the_callback_in_the_owner(self) -> None:
        async with self.client() as bound:
            instance = await bound.create(id="i", params=9)
            await until(lambda: self.log() == ["begin", "end", "begin"])
            await instance.restart()
            self.assertLess(await until(lambda: self.log()[3:] == ["cancelled", "begin"]), 0.2)
            await instance.terminate()
            self.assertEqual((await instance.status()).status, "terminated")
            self.assertLess(await until(lambda: self.log()[5:] == ["cancelled"]), 0.2)
            pausing = await bound.create(id="p", params=0.3)
            await until(lambda: self.log()[-1] == "begin")
            await pausing.pause()
            self.assertEqual((await pausing.status()).status, "waitingForPause")
            await reach(pausing, "paused")
            self.assertEqual(self.log()[-1], "end")

    async def test_what_a_client_pauses_begins_nothing_after_its_next_commit(self) -> None:
        ends, begun = asyncio.Event(), []

        async def run(event: Any, step: Any) -> None:
            await step.do("last", ends.wait)
            await step.do("more", lambda: begun.append(1))

        async with self.engine() as owner, self.engine() as client:
            instance = await owner.bind(workflow(run)).create(id="i")
            await reach(instance, "running")
            while not owner.lives.runs or not owner.lives.runs[1].attempts_in_flight():
                await asyncio.sleep(0.001)
            await (await (await client.workflow("test")).get("i")).pause()
            ends.set()
            await reach(instance, "paused")
            self.assertEqual(begun, [])
            await instance.resume()
            await instance.result("5 seconds")

    async def test_a_busy_owner_sees_its_clients_too(self) -> None:
        script = """
            async def run(event, step):
                if event.payload == 1: return "done"
                while True: await step.do("s", lambda: value())
            async def main(w):
                await get(w, "busy")
                await asyncio.sleep(0.1)
                say("up")
                await asyncio.sleep(60)
            go(limits=dataclasses.replace(Limits(), steps=25_000))
            """
        async with self.client(script=script) as bound:
            began = time.monotonic()
            other = await bound.create(params=1)
            self.assertEqual(await other.result("2 seconds"), "done")
            busy = await bound.get("busy")
            await busy.pause()
            await reach(busy, "paused")
            self.assertLess(time.monotonic() - began, 1)

    async def test_rows_add_up_whoever_writes_between_the_steps_of_an_owner_that_dies(self) -> None:
        """The newest journal row says how many there are, and how large the state is."""
        script = """
            async def run(event, step):
                while True: await step.do("s", lambda: value("ten bytes!"))
            async def main(w):
                await get(w, "busy")
                say("up")
                await asyncio.sleep(60)
            go(limits=dataclasses.replace(Limits(), steps=25_000))
            """
        async with self.client(one_event, script) as bound:
            busy = await bound.get("busy")
            for _ in range(20):
                await busy.send_event(type="x", payload="four")
                await asyncio.sleep(0.003)
            self.owner.kill()
            await until(lambda: bound.engine.writer.database.owner)
            await busy.pause()
            await reach(busy, "paused")
            ((rows, highest),) = self.rows("SELECT count(*), max(seq) FROM journal")
            self.assertEqual(rows, highest)
            sent = "SELECT seq FROM journal WHERE type = 'sent' ORDER BY seq"
            self.assertEqual(self.rows("SELECT seq FROM events ORDER BY seq"), self.rows(sent))
            stored = "SELECT (SELECT sum(length(payload)) FROM events), sum(length(data))"
            ((events, data),) = self.rows(f"{stored} FROM journal WHERE type IN ('done', 'queued')")
            self.assertGreater(data, 100)
            self.assertEqual((await bound.engine.usage()).storage_bytes, events + data)
            self.assertEqual(
                self.rows("SELECT bytes FROM journal ORDER BY seq DESC LIMIT 1"), [(events + data,)]
            )

    async def test_a_client_stops_too_when_the_file_of_the_owners_lock_was_replaced(self) -> None:
        """Or it would soon hold a lock that the next process doesn't see."""
        self.enterContext(quicker(5))
        async with self.client() as bound:
            instance = await bound.create(params=0)
            os.rename(self.path + "-owner", self.path + "-owner.old")
            Path(self.path + "-owner").touch()
            stopped = self.assertRaisesRegex(WorkflowInternalError, "removed or replaced")
            with self.assertLogs("workflows", logging.CRITICAL), stopped:
                await instance.result("5 seconds")

    async def test_another_process_takes_over_within_a_second_after_sigkill(self) -> None:
        async with self.client() as bound:
            self.owner.kill()
            began = time.monotonic()
            instance = await bound.get("o")
            await instance.send_event(type="t", payload=5)
            self.assertEqual(await instance.result("2 seconds"), 5)
            self.assertLess(time.monotonic() - began, 1)

    async def test_another_process_takes_over_within_a_second_after_a_clean_stop(self) -> None:
        async with self.client() as bound:
            running = await bound.create(id="i", params=0.05)
            self.owner.interrupt()
            await asyncio.to_thread(self.owner.wait)
            instance = await bound.get("o")
            await instance.send_event(type="t", payload=5)
            self.assertEqual(await instance.result("1 second"), 5)
            await running.terminate()

    async def test_a_forked_child_holds_nothing_of_its_dead_parent(self) -> None:
        fork = "if os.fork(): say('up')\n    else: sys.stdin.read(); os._exit(0)"
        script = "import warnings; warnings.simplefilter('ignore')  # of fork beside threads\n"
        script += textwrap.dedent(OWNER).replace('say("up")', fork)
        async with self.client(script=script) as bound:
            os.kill(self.owner.pid, signal.SIGKILL)
            instance = await bound.get("o")
            await instance.send_event(type="t", payload=5)
            self.assertEqual(await instance.result("1 second"), 5)

    async def test_a_forked_child_that_ends_takes_nothing_from_its_parent(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_event)).create()
            await reach(instance, "waiting")
            child = multiprocessing.get_context("fork").Process(target=gc.collect)
            with warnings.catch_warnings(action="ignore"):  # of threads, from Python 3.12 on
                child.start()
            await asyncio.to_thread(child.join)
            self.assertTrue(self.is_owned())
            await instance.send_event(type="t", payload=5)
            self.assertEqual(await instance.result("1 second"), 5)

    async def test_a_forked_child_that_goes_on_writes_nothing(self) -> None:
        owner = self.child("""
            import warnings; warnings.simplefilter("ignore")  # of fork beside threads
            sys.modules["workflows"].QUICK = 1  # however slow the disk is
            async def fork():
                if (child := os.fork()) == 0:
                    signal.setitimer(signal.ITIMER_REAL, 0.2)  # so long it goes on
                    return "child"
                await asyncio.to_thread(os.waitpid, child, 0)
                return "parent"
            async def nothing(): pass
            async def run(event, step):
                for _ in range(9): await step.do("quick", nothing)  # then the loop commits itself
                return await step.do("fork", fork)
            async def main(w): say(await (await get(w)).result())
            go()
        """)
        self.assertEqual(await owner.wait_for("parent"), "")
        self.assertEqual(self.rows("SELECT count(*) FROM journal WHERE type = 'done'"), [(10,)])

    def is_owned(self) -> bool:
        """Whether another process (!) would find the file owned."""
        said, _ = self.child("""
            import sqlite3
            db = sqlite3.connect(PATH + "-owner", timeout=0, isolation_level=None)
            try: db.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error: say(error)
            """).end()
        return said == "database is locked"

    async def test_a_second_engine_in_the_process_is_a_client_and_takes_over(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(Engine(self.path))
            first.bind(workflow(one_event))
            await until(self.is_owned)
            async with self.engine() as second:
                instance = await second.bind(workflow(one_event)).create(id="i")
                await reach(instance, "waiting")
                self.assertEqual((len(first.lives.runs), len(second.lives.runs)), (1, 0))
            self.assertTrue(self.is_owned())  # closing its file has not dropped the first's locks
            async with self.engine() as second:
                instance = await second.bind(workflow(one_event)).get("i")
                await stack.aclose()
                await instance.send_event(type="t", payload=5)
                self.assertEqual(await instance.result("1 second"), 5)

    async def test_a_result_that_comes_after_a_clients_restart_is_discarded(self) -> None:
        gate = Gate()
        async with self.engine() as owner, self.engine() as client:
            await owner.bind(workflow(gate.run)).create(id="i")
            await until(lambda: gate.begun)
            instance = await client.bind(workflow(gate.run)).get("i")
            await instance.restart()
            gate.open.set()  # before the owner has noticed
            self.assertEqual(await instance.result("2 seconds"), "i")
            self.assertEqual(len(gate.begun), 2)

    async def test_a_symbolic_link_is_the_same_database(self) -> None:
        async with self.engine() as first:
            first.bind(workflow(one_event))
            await until(self.is_owned)
            link = self.folder / "link.db"
            link.symlink_to(self.path)
            async with Engine(link) as second:
                instance = await second.bind(workflow(one_event)).create()
                await reach(instance, "waiting")
                self.assertEqual((len(first.lives.runs), len(second.lives.runs)), (1, 0))

    async def test_work_of_a_name_that_is_not_bound_is_left_with_one_warning(self) -> None:
        await self.leave_work()
        logger = logging.getLogger("workflows")
        logger.setLevel(logging.WARNING)
        self.addCleanup(logger.setLevel, logging.CRITICAL)
        with self.assertLogs(logger) as logs, quicker(20):
            async with self.engine() as engine:
                engine.bind(workflow(one_step, "Other"))
                await asyncio.sleep(0.3)  # long enough for several
        self.assertEqual(["'test'" in line for line in logs.output], [True])
        self.assertEqual(self.rows("SELECT status FROM instances"), [("queued",)])

    async def leave_work(self) -> None:
        async with self.engine() as blocker:
            blocker.bind(workflow(one_step, "Blocker"))
            await until(self.is_owned)
            async with self.engine() as client:
                await client.bind(workflow(one_step)).create()


class Opening(Case):
    async def test_entering_recovers_what_is_unfinished_as_it_is_bound(self) -> None:
        gate = Gate()
        async with self.engine() as engine:
            await engine.bind(workflow(gate.run)).create(id="i")
            await self.clock.advance(0)
        gate.open.set()
        async with self.engine() as engine:
            await self.clock.advance(0)
            self.assertEqual(len(gate.begun), 1)
            bound = engine.bind(workflow(gate.run))
            self.assertEqual(await self.finish(await bound.get("i")), "i")

    async def test_a_path_that_is_no_text_is_opened_again(self) -> None:
        path = os.fsdecode(os.fsencode(self.path) + b"-\xff")
        for _ in range(2):
            async with Engine(path, clock=self.clock) as engine:
                await engine.bind(workflow(one_step)).create()

    async def test_binding_before_entering_works(self) -> None:
        engine = Engine(self.path, clock=self.clock)
        bound = engine.bind(workflow(one_step))
        async with engine:
            self.assertEqual(await self.finish(await bound.create(params=5)), 5)

    async def test_a_second_engine_of_one_process_is_told_that_it_is_a_client(self) -> None:
        async with self.engine() as engine:
            engine.bind(workflow(one_step))
            await self.clock.settle()
            async with self.engine() as second:
                with self.assertLogs("workflows", "WARNING") as logged:
                    bound = second.bind(workflow(one_step))
                    second.bind(workflow(one_step, "Other"))
                    await self.clock.settle()
                what = "another engine of this process runs it; this one is a client"
                self.assertEqual(logged.output, [f"WARNING:workflows:{self.path}: {what}"])
                self.assertEqual(await self.finish(await bound.create(params=5)), 5)
        with self.assertNoLogs("workflows", "WARNING"):
            async with self.engine() as engine, Engine(":memory:") as a, Engine(":memory:") as b:
                for one in (engine, a, b):  # one after the other, or each on a database of its own
                    one.bind(workflow(one_step))
                    await one.usage()
            lock = sqlite3.connect(self.path + "-owner", isolation_level=None)
            with contextlib.closing(lock):
                lock.execute("BEGIN EXCLUSIVE")  # as another process
                async with self.engine() as engine:
                    engine.bind(workflow(one_step))
                    await engine.usage()

    async def test_what_another_engine_has_written_is_told_to_those_who_wait(self) -> None:
        async with self.engine() as owner, self.engine() as client:
            instance = await owner.bind(workflow(one_event)).create(id="i")
            await self.clock.settle()
            known = await (await client.workflow("test")).get("i")
            waiting = asyncio.create_task(known.result())
            await self.clock.settle()
            with unittest.mock.patch.object(workflows, "TICK", 60):  # a transaction comes first
                await instance.send_event(type="t", payload=5)
                await self.clock.settle()
                await self.clock.settle()
                self.assertEqual(await asyncio.wait_for(waiting, 2), 5)

    async def test_a_client_that_is_left_takes_no_slot_from_what_the_owner_runs(self) -> None:
        gate = Gate()
        async with self.engine() as owner:
            instance = await owner.bind(workflow(gate.run)).create()
            await self.clock.settle()
            async with self.engine() as client:
                client.bind(workflow(gate.run))
                await self.clock.settle()
            gate.open.set()
            await self.finish(instance)
        types = [type for (type,) in self.rows("SELECT type FROM journal ORDER BY seq")]
        self.assertEqual(types, ["queued", "started", "start", "done", "complete"])

    async def test_a_name_is_recorded_as_it_was_last_bound(self) -> None:
        for steps in (1, 2):
            async with self.engine() as engine:
                engine.bind(workflow(one_step), steps=steps)
                await self.clock.advance(1000)
        recorded = self.rows("SELECT steps, modified - created FROM workflows")
        self.assertEqual(recorded, [(2, 1000)])

    async def test_memory_works_as_a_database(self) -> None:
        async with Engine(":memory:", clock=self.clock) as engine:
            instance = await engine.bind(workflow(one_event)).create()
            await instance.send_event(type="t", payload=5)
            self.assertEqual(await self.finish(instance), 5)
        self.assertFalse(os.path.exists(":memory:") or os.path.exists(":memory:-owner"))

    async def test_an_engine_that_is_not_open_says_so(self) -> None:
        engine = Engine(self.path)
        bound = engine.bind(workflow(one_step))
        with self.assertRaisesRegex(RuntimeError, "not open"):
            await bound.create()
        async with engine:
            instance = await bound.create()
        for call in (bound.create, instance.status, instance.result, engine.__aenter__):
            with self.assertRaises(RuntimeError):
                await call()

    async def test_another_loop_is_refused(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_step)).create()

            def elsewhere(make: Any) -> None:
                asyncio.run(make())

            for make in (instance.status, instance.result, engine.env.TEST.create):
                with self.assertRaisesRegex(RuntimeError, "loop"):
                    await asyncio.to_thread(elsewhere, make)

    async def test_a_call_that_waits_when_the_engine_is_left_is_told(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_event)).create()
            waiting = asyncio.create_task(instance.result())
            await self.clock.advance(0)
        with self.assertRaises(RuntimeError):
            await asyncio.wait_for(waiting, 2)


class Hibernation(Case):
    async def test_a_waiting_run_leaves_memory_and_is_rebuilt_when_it_is_due(self) -> None:
        lives = []

        class Baggage:
            pass

        async def run(event: Any, step: Any) -> Any:
            baggage = Baggage()
            lives.append(weakref.ref(baggage))
            await step.sleep("nap", "1 hour")
            return len(lives)

        async with self.engine(hibernate_after="10 seconds") as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance("9 seconds")
            self.assertIsNotNone(lives[0]())
            await self.clock.advance("2 seconds")
            gc.collect()
            self.assertEqual((engine.lives.runs, lives[0]()), ({}, None))
            self.assertEqual(await self.finish(instance), 2)

    async def test_each_run_leaves_memory_when_it_has_waited_long_enough_itself(self) -> None:
        async with self.engine(hibernate_after="10 seconds") as engine:
            bound = engine.bind(workflow(one_sleep))
            for _ in range(2):
                await bound.create()
                await self.clock.advance("6 seconds")
            self.assertEqual(len(engine.lives.runs), 1)
            await self.clock.advance("5 seconds")
            self.assertEqual(len(engine.lives.runs), 0)

    async def test_hibernation_needs_a_run_that_only_waits(self) -> None:
        gate = Gate()

        async def run(event: Any, step: Any) -> Any:
            return await asyncio.gather(gate.run(event, step), step.sleep("nap", "1 minute"))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create(id="i")
            await self.clock.advance("9 minutes")
            self.assertEqual(
                ((await instance.status()).status, len(engine.lives.runs)), ("running", 1)
            )
            gate.open.set()
            self.assertEqual(await self.finish(instance), ["i", None])
            self.assertEqual(len(gate.begun), 1)

    async def waiting(self, count: int) -> None:
        """A database with so many waiting instances."""
        async with self.engine() as engine:
            await engine.bind(workflow(one_sleep)).create(id="i")
            await self.clock.advance(0)
        numbers = "SELECT 2 UNION ALL SELECT n + 1 FROM n WHERE n < ?"
        copy = f"WITH RECURSIVE n(n) AS ({numbers}) INSERT INTO"
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            for table, key in (
                ("instances", "key"),
                ("journal", "instance"),
                ("waits", "instance"),
            ):
                columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
                values = ["n" if c == key else "'i' || n" if c == "id" else c for c in columns]
                sql = f"{copy} {table} SELECT {', '.join(values)} FROM {table}, n WHERE {key} = 1"
                db.execute(sql, (count,))
            db.commit()

    async def test_start_and_memory_do_not_grow_with_the_waiting_instances(self) -> None:
        await asyncio.to_thread(asyncio.run, self.waiting(20_000))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        began = time.monotonic()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_sleep)).get("i777")
            self.assertEqual((await instance.status()).status, "waiting")
            await self.clock.advance(0)
            self.assertLess(time.monotonic() - began, 0.3)
            self.assertLess(tracemalloc.get_traced_memory()[1], 1_000_000)
            self.assertEqual(engine.lives.runs, {})

    async def test_every_regular_look_uses_an_index(self) -> None:
        statements: list[str] = []
        async with self.engine() as engine:
            engine.writer.database._db.set_trace_callback(statements.append)
            instance = await engine.bind(workflow(one_event)).create()
            await self.clock.advance(0)
            await instance.send_event(type="t")
            await self.finish(instance)
            await self.clock.advance("2 hours")
            engine.writer.database._db.set_trace_callback(None)
        looks = {text for text in statements if re.match(r"(SELECT|UPDATE|DELETE)\b", text)}
        self.assertGreater(sum("wake <=" in text for text in looks), 0)
        for text in looks:
            for *_, plan in self.rows(f"EXPLAIN QUERY PLAN {text}"):
                self.assertNotRegex(plan, "SCAN (instances|journal|waits|events)", text)


class Jumping(workflows.Clock):
    """The real time, plus what somebody has set it ahead."""

    ahead = 0

    def now(self) -> int:
        return super().now() + self.ahead


class Moving(Case):
    """`ManualClock`, where the other classes do not show it."""

    async def test_an_engine_whose_storage_has_failed_does_not_hold_up_the_others(self) -> None:
        async with self.engine() as engine, Engine(":memory:", clock=self.clock) as other:
            instance = await other.bind(workflow(one_sleep)).create()
            with unittest.mock.patch.object(engine.writer, "failure", OSError("gone")):
                await self.clock.advance("1 hour")
            self.assertEqual((await instance.status()).status, "complete")

    async def test_what_falls_due_on_the_way_is_over_at_its_moment(self) -> None:
        async def run(event: Any, step: Any) -> None:
            naps = [step.sleep("nap", f"{n} minutes") for n in (60, 1, 30)]
            await asyncio.gather(*naps)

        async with self.engine() as engine:
            sleeper = await engine.bind(workflow(one_sleep, "Other")).create()
            await self.clock.settle()
            await engine.bind(workflow(run)).create()
            begin = self.clock.now()
            await self.clock.advance("2 hours")
            self.assertEqual((await sleeper.status()).status, "complete")
        ends = [at - begin for (at,) in self.rows("SELECT at FROM journal WHERE type = 'slept'")]
        self.assertEqual(sorted(ends), [60_000, 1_800_000, 3_600_000, 3_600_000])

    async def test_advances_at_once_follow_each_other(self) -> None:
        begin = self.clock.now()
        hours = ("10 hours", "5 hours", "1 minute")
        await asyncio.gather(*(self.clock.advance(duration) for duration in hours))
        self.assertEqual(self.clock.now() - begin, 15 * 3_600_000 + 60_000)

    async def test_what_ends_at_the_deadline_of_result_is_in_time(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_sleep)).create()
            waiting = asyncio.create_task(instance.result("1 hour"))
            await self.clock.advance("1 hour")
            await waiting

    async def test_a_callback_that_awaits_something_real_ends_before_its_time_is_up(self) -> None:
        async def run(event: Any, step: Any) -> list[Any]:
            async def real(ctx: Any) -> int:
                await asyncio.sleep(0.02)
                return ctx.attempt

            async def delay(info: Any) -> int:
                await asyncio.sleep(0.02)
                return 5

            failed = {"retries": {"limit": 1, "delay": delay}}
            calls = [step.do("async", real), step.do("plain", lambda: time.sleep(0.2))]
            results = await asyncio.gather(*calls)
            await step.sleep("nap", "1 hour")
            return [*results, await step.do("fails", failed, lambda ctx: 1 // (ctx.attempt - 1))]

        clock = ManualClock()
        async with self.engine(clock=clock) as engine:
            instance = await engine.bind(workflow(run)).create()
            began = clock.now()
            await clock.advance("1 day")
            ended = next(e for e in await instance.history() if e.type == "sleep_started")
            self.assertEqual(ended.timestamp.timestamp() * 1000, began, "no time had to go by")
            self.assertEqual(await instance.result(0), [1, None, 1])

    async def test_patience_counts_from_the_moment_that_the_clock_begins_to_move(self) -> None:
        gate, clock = Gate(), ManualClock(patience=50)
        async with self.engine(clock=clock) as engine:
            instance = await engine.bind(workflow(gate.run)).create(id="i")
            await asyncio.sleep(0.06)
            asyncio.get_running_loop().call_later(0.02, gate.open.set)
            await clock.advance("1 hour")
            self.assertEqual((await instance.result(0), gate.begun), ("i", ["i"]))

    async def test_a_callback_that_never_ends_costs_its_patience_once_for_each_attempt(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> None:
            stuck = [step.do(f"s{n}", constant(1), asyncio.Event().wait) for n in range(9)]
            await asyncio.gather(*stuck)

        clock = ManualClock(patience=50)
        async with self.engine(clock=clock) as engine:
            instance = await engine.bind(workflow(run)).create()
            began = time.monotonic()
            await clock.advance("9 minutes")
            self.assertLess(time.monotonic() - began, 0.05, "no attempt is due yet")
            await clock.advance("1 hour")
            self.assertTrue(0.1 <= time.monotonic() - began < 1)
            with self.assertRaises(WorkflowTimeoutError):
                await instance.result(0)

    async def test_a_callback_can_not_move_the_clock(self) -> None:
        async def run(event: Any, step: Any) -> str:
            try:
                once = {"retries": {"limit": 0}}
                await step.do("advance", once, lambda: self.clock.advance(1))
            except RuntimeError as error:
                return str(error)
            return "no error"

        self.assertIn("would wait for itself", await self.outcome(run))

    async def test_a_wrong_argument_is_named_without_names_of_ours(self) -> None:
        async def run(event: Any, step: Any) -> list[str]:
            errors = []
            for call in (step.do("x", one_step, foo=1), step.wait_for_event("w", "t", 1, 2)):
                try:
                    await call
                except WorkflowFatalError as error:
                    errors.append(str(error))
            return errors

        first, second = await self.outcome(run)
        self.assertIn("do 'x': the call has the unknown key 'foo': expected callback,", first)
        self.assertIn("wait_for_event 'w': too many arguments: expected name, type,", second)


class Time(Real):
    async def test_a_clock_that_jumps_is_noticed_within_100_ms(self) -> None:
        for hibernate in ("1 hour", 0):
            clock = Jumping()
            async with Engine(":memory:", clock=clock, hibernate_after=hibernate) as engine:
                instance = await engine.bind(workflow(one_sleep)).create()
                await reach(instance, "waiting")
                clock.ahead += 3_600_000
                self.assertLess(await reach(instance, "complete"), 0.2)

    async def test_a_sleep_in_memory_and_a_hibernated_one_wake_in_time(self) -> None:
        async def run(event: Any, step: Any) -> None:
            for _ in range(5):
                await step.sleep("nap", 10)

        async def wake_in_time(hibernate: Any) -> None:
            async with Engine(":memory:", hibernate_after=hibernate) as engine:
                bound, took = engine.bind(workflow(run)), []
                for _ in range(5):  # a busy machine may be late some of the time
                    began = time.monotonic()
                    await (await bound.create()).result()
                    took.append(time.monotonic() - began)
                self.assertLess(min(took), 0.2)

        await asyncio.gather(wake_in_time("1 hour"), wake_in_time(0))

    async def test_an_idle_engine_leaves_the_loop_alone(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_event)).create()
            await reach(instance, "waiting")
            await asyncio.sleep(0.1)
            calls: list[Any] = []
            engine.call_from_thread = lambda *call: calls.append(call)
            await asyncio.sleep(0.3)
            del engine.call_from_thread
            self.assertEqual(calls, [])

    async def test_a_run_of_quick_steps_lets_the_loop_turn(self) -> None:
        async def run(event: Any, step: Any) -> None:
            for _ in range(500):
                await step.do("quick", returns(None))

        async with Engine(":memory:") as engine:
            instance = await engine.bind(workflow(run)).create()
            result, turns = asyncio.ensure_future(instance.result()), 0
            while not result.done():
                await asyncio.sleep(0.001)
                turns += 1
            self.assertGreater(turns, 5)

    async def test_a_timer_of_the_engine_does_not_count_as_one_of_the_run(self) -> None:
        async def run(event: Any, step: Any) -> None:
            for _ in range(10):  # after some quick commits the loop does them itself
                await step.do("quick", returns(None))
            await step.sleep("long", "1 hour")

        async with Engine(":memory:", hibernate_after=0) as engine:
            await reach(await engine.bind(workflow(run)).create(), "waiting")
            await until(lambda: not engine.lives.runs)

    async def test_sleeps_that_ended_while_nobody_ran_end_in_their_order(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            naps = {asyncio.ensure_future(step.sleep(f"{ms}", ms)): ms for ms in (300, 100, 200)}
            order = []
            while naps:
                done, _ = await asyncio.wait(naps, return_when=asyncio.FIRST_COMPLETED)
                order += [naps.pop(nap) for nap in done]
            return order

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create(id="i")
            await reach(instance, "waiting")
        await asyncio.sleep(0.35)
        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).get("i")
            self.assertEqual(await instance.result("2 seconds"), [100, 200, 300])


class GivingUp(Case):
    async def test_an_event_that_goes_back_to_the_buffer_is_given_to_the_next_waiter_at_once(self):
        cancelling, other = asyncio.Event(), Gate()

        async def run(event: Any, step: Any) -> Any:
            waits = [asyncio.create_task(step.wait_for_event("w", "t")) for _ in range(2)]
            await cancelling.wait()
            waits[0].cancel()
            return (await waits[1]).payload

        limits = dataclasses.replace(FOREVER, running=1)
        async with self.engine(limits=limits, hibernate_after="1 hour") as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await engine.bind(workflow(other.run, "Other")).create()
            await self.clock.settle()
            await instance.send_event(type="t", payload=5)
            cancelling.set()  # the first one has the event, but the instance has no slot
            await self.clock.settle()
            other.open.set()
            await self.clock.settle()
            self.assertEqual((await instance.status()).output, 5)

    async def test_an_event_goes_back_to_the_buffer_once_and_never_after_another_had_it(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("busy", asyncio.Event().wait)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            ((key, generation),) = self.rows("SELECT key, generation FROM instances")
            due, lease = self.clock.now() + 9999, workflows.Lease(key, generation)

            async def wait(step: str) -> None:
                row = workflows.Row("wait", step, None, '{"type":"t","timeout":9999}')
                what = workflows.Wait("wait", step, "t", due)
                await engine.call(workflows.record, lease, row, 0, what)

            async def give_up(step: str) -> None:
                await engine.call(workflows.break_off, lease, [workflows.Row("stop", step)])

            x, y = (f"do\nbusy\n1\nwait_for_event\n{name}\n1" for name in "xy")
            await wait(x)
            await instance.send_event(type="t", payload="first")
            await give_up(x)  # the event goes back ...
            await wait(y)  # ... and here
            await wait(x)
            await instance.send_event(type="t", payload="second")
            await give_up(x)
            self.assertEqual(self.rows("SELECT payload FROM events"), [('"second"',)])


class Orphans(Case):
    async def test_a_run_whose_task_is_cancelled_from_outside_goes_on_also_when_restarted(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> str:
            runs.append(event.instance_id)
            await step.do("wait", gate.wait)
            return "done"

        self.enterContext(grace(0.1))
        runs: list[str] = []
        gate = asyncio.Event()
        async with self.engine() as engine:
            bound = engine.bind(workflow(run))
            plain, again = [await bound.create(id=id) for id in ("plain", "again")]
            await self.clock.settle()
            for task in asyncio.all_tasks():
                if task.get_name().startswith("workflows:test:"):
                    task.cancel()
            await asyncio.sleep(0)
            await again.restart()
            gate.set()
            with self.assertLogs("workflows", "WARNING") as logged:
                async with asyncio.timeout(30):
                    self.assertEqual([await i.result() for i in (plain, again)], ["done", "done"])
        self.assertIn("test plain: somebody has cancelled", "".join(logged.output))
        self.assertEqual(sorted(runs), ["again", "again", "plain", "plain"])
        self.assertEqual(self.rows("SELECT * FROM journal WHERE type = 'failed'"), [])

    async def test_one_that_was_cancelled_when_the_engine_is_left_is_handed_back(self) -> None:
        attempts: list[int] = []

        async def hang(ctx: Any) -> None:
            attempts.append(ctx.attempt)
            await asyncio.sleep(3600 if len(attempts) == 1 else 0)

        async def run(event: Any, step: Any) -> None:
            await step.do("hang", hang)

        made = workflow(run)
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.settle()
            for task in asyncio.all_tasks():
                if task.get_name().startswith("workflows:test:"):
                    task.cancel()
            await asyncio.sleep(0.01)
        async with self.engine() as engine:
            await self.finish(await engine.bind(made).get("i"))
        self.assertEqual(attempts, [1, 1])


class Stubborn(Real):
    """3.14: code that does not give up is dropped, and holds up nothing."""

    def test_the_interpreter_exits_although_a_run_swallows_each_cancellation(self) -> None:
        child = self.child(
            """
            async def run(event, step):
                while True:
                    try: return (await step.wait_for_event("w", "t")).payload
                    except asyncio.CancelledError: pass
            async def main(w):
                instance = await get(w)
                await until(instance, "waiting")
                await asyncio.sleep(0.1)
                await instance.send_event(type="t", payload="there")
                say(await instance.result())
            go(hibernate_after=0)
            """,
            fresh=True,
        )
        self.assertEqual(child.end(), ("there", 0))


class Garbage(Case):
    async def test_steps_that_do_not_suspend_leave_nothing_for_the_garbage_collector(self) -> None:
        lives: list[Any] = []

        async def run(event: Any, step: Any) -> None:
            lives.append(weakref.ref(step._run))
            for n in range(3):
                await step.do("at once", returns([n]))

        gc.disable()
        self.addCleanup(gc.enable)
        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.finish(instance)
            await self.clock.settle()
            self.assertEqual([life() for life in lives], [None])

    async def test_an_idle_thread_keeps_nothing_of_its_last_callback(self) -> None:
        held: list[Any] = []

        async def run(event: Any, step: Any) -> None:
            held.append(weakref.ref(callback := functools.partial(threading.get_ident)))
            await step.do("plain", callback)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.finish(instance)
            gc.collect()
            self.assertIsNone(held[0]())


class Limiting(Case):
    """Every row of the table of limits that no other class is about."""

    async def limited(self, count: int, run: Callable[..., Any] = one_sleep, **limits: Any) -> int:
        """How many of so many `create` calls are accepted; the others name their limit."""
        made = 0
        async with self.engine(limits=dataclasses.replace(FOREVER, **limits)) as engine:
            bound = engine.bind(workflow(run))
            for _ in range(count):
                try:
                    await bound.create()
                    made += 1
                except WorkflowError as error:
                    self.refused = error
        return made

    def test_the_plans_are_cloudflares_to_the_letter(self) -> None:
        day, paid = 86_400_000, Limits.PAID
        self.assertEqual(dataclasses.replace(Limits(), creations_per_second=100), paid)
        free = {"cpu_ms": 10, "instance_bytes": 10**8, "running": 25, "queued": 100_000}
        free |= {"success_retention": 3 * day, "error_retention": 3 * day}
        self.assertEqual(dataclasses.replace(paid, **free), Limits.FREE)
        today = dataclasses.replace(paid, running=50_000, queued=2_000_000, steps=10_000)
        self.assertEqual(today, Limits.PAID_2026)
        self.assertEqual(dataclasses.replace(Limits.FREE, running=100), Limits.FREE_2026)
        lifted = {name: None for name, value in vars(Limits.UNLIMITED).items() if value is None}
        kept = {"id_length": 100, "max_sleep": 365 * day, "batch": 100, "steps": 25_000}
        self.assertEqual(vars(Limits.UNLIMITED), lifted | kept)
        self.assertEqual(len(lifted), 9)

    def test_wrong_limits_are_refused_by_name(self) -> None:
        for name, wrong in (("running", -1), ("queued", 1.5), ("steps", None), ("cpu_ms", True)):
            with self.subTest(name), self.assertRaisesRegex(ValueError, f"Limits.{name} is"):
                dataclasses.replace(Limits(), **{name: wrong})
        for name in ("steps", "max_sleep"):
            with self.assertRaisesRegex(ValueError, "at most"):
                dataclasses.replace(Limits(), **{name: 10**12})

    async def test_a_result_beyond_the_limit_fails_the_step_at_once(self) -> None:
        attempts = []

        async def run(event: Any, step: Any) -> str:
            async def large() -> str:
                attempts.append(1)
                return "x" * 50

            error = await caught(step.do("s", large))
            self.assertIs(type(error), WorkflowFatalError)
            self.assertIn("has 52 bytes: at most 51 (limit step_bytes)", str(error))
            return error.code

        limits = dataclasses.replace(FOREVER, step_bytes=51)
        self.assertEqual(await self.outcome(run, limits=limits), "limit.step_output")
        self.assertEqual(attempts, [1])

    async def test_params_and_payloads_beyond_the_limit_are_refused(self) -> None:
        async with self.engine(limits=dataclasses.replace(FOREVER, payload_bytes=51)) as engine:
            bound = engine.bind(workflow(one_event))
            await self.assertCode("limit.event_payload", bound.create(id="i", params="x" * 50))
            instance = await bound.create(id="i", params="x" * 49)
            refused = instance.send_event(type="t", payload="x" * 50)
            await self.assertCode("limit.event_payload", refused)
            self.assertEqual(self.rows("SELECT count(*) FROM events"), [(0,)])

    async def test_the_events_of_an_instance_count_as_its_state(self) -> None:
        async with self.engine(limits=dataclasses.replace(FOREVER, instance_bytes=100)) as engine:
            instance = await engine.bind(workflow(one_sleep)).create()
            await instance.send_event(type="t", payload="x" * 60)
            refused = instance.send_event(type="t", payload="x" * 60)
            await self.assertCode("limit.instance_state", refused)

    async def test_a_result_beyond_the_limit_of_state_is_the_error_of_its_step(self) -> None:
        async def run(event: Any, step: Any) -> list[Any]:
            await step.do("fits", returns("x" * 50))
            error: Any = await caught(step.do("does not", returns("x" * 50)))
            return [error.code, type(error) is WorkflowFatalError]

        limits = dataclasses.replace(FOREVER, instance_bytes=100)
        self.assertEqual(await self.outcome(run, limits=limits), ["limit.instance_state", True])

    async def test_an_output_beyond_the_limit_of_state_is_the_error_of_its_instance(self) -> None:
        async def run(event: Any, step: Any) -> str:
            return "x" * 60

        limits = dataclasses.replace(FOREVER, instance_bytes=50)
        with self.assertRaises(WorkflowFatalError) as refused:
            await self.outcome(run, limits=limits)
        self.assertEqual(refused.exception.code, "limit.instance_state")

    async def test_an_attempt_beyond_its_cpu_time_fails_and_is_retried(self) -> None:
        def burn() -> None:
            began = time.thread_time()
            while time.thread_time() < began + 0.02:
                pass

        async def burn_and_wait() -> None:
            burn()
            await asyncio.sleep(3600)  # not that long: this is where it is noticed

        async def run(event: Any, step: Any) -> None:
            async def burn_once(ctx: Any) -> int:
                if ctx.attempt == 1:
                    burn()
                return ctx.attempt

            for callback in (burn, burn_and_wait):
                error = await caught(step.do("always", ONCE, callback))
                self.assertIs(type(error), WorkflowError)
                self.assertEqual(error.code, "limit.cpu")
            return await step.do("once", burn_once)

        limits = dataclasses.replace(FOREVER, cpu_ms=10)
        self.assertEqual(await self.outcome(run, limits=limits), 2)

    async def test_an_attempt_beyond_its_cpu_time_may_clean_up(self) -> None:
        cleaned = []

        async def burn() -> None:
            began = time.thread_time()
            while time.thread_time() < began + 0.02:
                pass
            try:
                await asyncio.sleep(3600)
            finally:
                for n in range(3):
                    await asyncio.sleep(0)
                    cleaned.append(n)

        async def run(event: Any, step: Any) -> str:
            return (await caught(step.do("burn", ONCE, burn))).code

        limits = dataclasses.replace(FOREVER, cpu_ms=10)
        self.assertEqual(await self.outcome(run, limits=limits), "limit.cpu")
        self.assertEqual(cleaned, [0, 1, 2])

    async def test_creations_per_second_are_counted_over_a_sliding_second(self) -> None:
        async with self.engine(limits=dataclasses.replace(FOREVER, creations_per_second=2)) as e:
            bound = e.bind(workflow(one_sleep))
            await bound.create()
            await self.clock.advance(600)
            await bound.create_batch([{}, {}, {}])  # counts as one
            error = await self.assertCode("limit.creation_rate", bound.create())
            self.assertIn("more than 2 creations within a second", str(error))
            await self.clock.advance(400)
            await bound.create()
            await self.assertCode("limit.creation_rate", bound.create_batch([{}]))
            self.clock._now -= 3_600_000  # it is set back: what was counted then is of the future
            await bound.create()
        self.assertEqual(self.rows("SELECT count(*) FROM instances"), [(6,)])

    async def test_as_many_may_be_queued_as_the_limit_says(self) -> None:
        async def busy(event: Any, step: Any) -> None:
            await step.do("busy", lambda: asyncio.sleep(3600))

        self.assertEqual(await self.limited(6, busy, running=1, queued=3), 4)
        self.assertEqual(self.refused.code, "limit.queued_instances")
        self.assertIn("3 instances", str(self.refused))

    async def test_a_batch_that_would_not_fit_into_the_queue_is_refused_whole(self) -> None:
        async with self.engine(limits=dataclasses.replace(FOREVER, running=1, queued=3)) as engine:
            bound = engine.bind(workflow(one_sleep))
            await self.assertCode("limit.queued_instances", bound.create_batch([{}] * 5))
            same = await bound.create_batch([{"id": "a"}] * 5)  # one, and no more are queued
            self.assertEqual([instance.id for instance in same], ["a"])
            await same[0].delete()
            self.assertEqual(len(await bound.create_batch([{}] * 4)), 4)

    async def test_waiting_instances_take_no_slot_and_no_place_in_the_queue(self) -> None:
        self.assertEqual(await self.limited(1, running=1, queued=0), 1)
        async with self.engine(limits=dataclasses.replace(FOREVER, running=1, queued=1)) as engine:
            bound = engine.bind(workflow(one_sleep))
            for _ in range(20):
                await bound.create()
                await self.clock.settle()

    async def test_retention_of_an_instance_is_at_most_the_plans(self) -> None:
        limits = dataclasses.replace(Limits.FREE, error_retention=3_600_000)
        async with self.engine(limits=limits) as engine:
            bound = engine.bind(workflow(one_sleep))
            for key, wrong in (("successRetention", "4 days"), ("errorRetention", 3_600_001)):
                made = bound.create(retention={key: wrong})
                self.assertIn(key, str(await self.assertCode("limit.retention", made)))
            with self.assertRaisesRegex(ValueError, "unknown key 'success'"):
                await bound.create(retention={"success": 1})
            await bound.create(retention={"successRetention": "3 days", "errorRetention": 0})

    async def test_a_finished_instance_disappears_when_its_time_is_over(self) -> None:
        async with self.engine(limits=Limits()) as engine:
            bound = engine.bind(workflow(one_event))
            for id, retention in (("long", {}), ("short", {"successRetention": "1 hour"})):
                instance = await bound.create(id=id, params="x" * 50, retention=retention)
                await instance.send_event(type="t", payload=1)
                if id == "short":
                    await instance.terminate()  # counts as a success
            await self.clock.advance("59 minutes")
            await bound.get("short")
            await self.clock.advance("1 minute")
            await self.assertCode("instance.not_found", bound.get("short"))
            await self.clock.advance("29 days")
            await bound.get("long")
            await self.clock.advance("1 day")
            self.assertEqual((await engine.usage()).storage_bytes, 0)
        for table in ("instances", "journal", "waits", "events"):
            self.assertEqual(self.rows(f"SELECT count(*) FROM {table}"), [(0,)], table)

    async def test_an_errored_instance_is_kept_for_a_time_of_its_own(self) -> None:
        async def run(event: Any, step: Any) -> None:
            raise ValueError

        async with self.engine(limits=Limits()) as engine:
            bound = engine.bind(workflow(run))
            kept = {"successRetention": "1 hour", "errorRetention": "2 hours"}
            await bound.create(id="i", retention=kept)
            await self.clock.advance("119 minutes")
            self.assertEqual((await (await bound.get("i")).status()).status, "errored")
            await self.clock.advance("1 minute")
            await self.assertCode("instance.not_found", bound.get("i"))

    async def test_an_expired_instance_is_never_visible_also_when_nobody_has_cleared_it_away(
        self,
    ) -> None:
        async with self.engine(limits=Limits.FREE) as engine:
            await engine.bind(workflow(one_step)).create(id="i")
            await self.clock.settle()
        await self.clock.advance("3 days")
        async with self.engine() as engine:
            instance = workflows.WorkflowInstance(
                workflows.Workflow(engine, "test", "TEST", 9), "i"
            )
            await self.assertCode("instance.not_found", instance.status())
            bound = engine.bind(workflow(one_step))
            await bound.create(id="i")

    async def test_many_expired_ones_do_not_stand_in_the_way_of_one_that_is_due(self) -> None:
        left = []

        async def run(event: Any, step: Any) -> None:
            if event.payload:
                await step.sleep("nap", event.payload)
                left.append(self.rows("SELECT count(*) FROM instances")[0][0])

        made = workflow(run)
        with unittest.mock.patch.object(workflows, "BATCH", 10):
            async with self.engine(limits=Limits.FREE) as engine:
                bound = engine.bind(made)
                for _ in range(5):
                    await bound.create_batch([{"params": 0}] * 100)
                await bound.create(id="s", params="4 days")
                await self.clock.settle()
            self.clock._now += 5 * 86_400_000
            async with self.engine() as engine:
                engine.bind(made)
                await self.clock.settle()
        self.assertGreater(left[0], 1)
        self.assertEqual(self.rows("SELECT id FROM instances"), [("s",)])

    async def test_a_terminated_instance_is_cleared_away_though_nobody_looks_for_it(self) -> None:
        async with self.engine(limits=Limits.FREE) as engine:
            instance = await engine.bind(workflow(one_sleep)).create()
            await self.clock.settle()
            await instance.terminate()
            await self.clock.advance("3 days")
            self.assertEqual(self.rows("SELECT count(*) FROM instances"), [(0,)])

    async def test_usage_counts_creations_steps_cpu_and_storage_by_month(self) -> None:
        async def run(event: Any, step: Any) -> str:
            await step.sleep("s", "1 hour")
            await step.do("work", lambda: sum(range(200_000)))
            return "x" * 100

        self.clock._now = 1_767_225_600_000 + 86_400_000  # 2 January 2026
        async with self.engine() as engine:
            await engine.bind(workflow(run)).create(params="y" * 100)
            await self.clock.advance("2 hours")
            usage = await engine.usage()
            stored = 102 + 102 + len(str(sum(range(200_000))))
            self.assertEqual((usage.requests, usage.steps, usage.storage_bytes), (1, 2, stored))
            self.assertGreater(usage["cpuMs"], 0.1)
            self.assertEqual(usage.cost_usd, 0)
            await self.clock.advance("31 days")
            self.assertEqual((await engine.usage()).requests, 0)
            self.assertEqual((await engine.usage()).storage_bytes, stored)
        async with self.engine() as engine:
            self.assertEqual((await engine.usage()).storage_bytes, stored)

    async def test_cpu_time_is_added_when_it_comes_to_a_second_or_an_instance_changes(self):
        added = []

        async def run(event: Any, step: Any) -> None:
            for each in range(4):
                await step.do(f"s{each}", value)
                added.append(self.rows("SELECT total(cpu_ms) FROM usage")[0][0])
            await asyncio.Event().wait()

        ticks = itertools.count(0, 600_000_000)
        with unittest.mock.patch.object(time, "thread_time_ns", lambda: next(ticks)):
            async with self.engine() as engine:
                await engine.bind(workflow(run)).create()
                await self.clock.settle()
        self.assertEqual((added[0], added[-1] > 1000), (0, True))
        async with self.engine() as engine:
            self.assertEqual((await engine.usage()).cpu_ms, 4 * 600)

    async def test_cpu_time_of_what_is_no_new_step_is_added_when_an_engine_is_left(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("s", value, rollback=value)
            raise ValueError

        ticks = itertools.count(0, 100_000_000)
        with unittest.mock.patch.object(time, "thread_time_ns", lambda: next(ticks)):
            async with self.engine() as engine:
                await engine.bind(workflow(run)).create()
                await self.clock.settle()
        async with self.engine() as engine:
            self.assertEqual((await engine.usage()).cpu_ms, 2 * 100)

    async def test_the_cost_is_what_goes_beyond_what_the_plan_includes(self) -> None:
        async with self.engine() as engine:
            engine.bind(workflow(one_step))
            await self.clock.settle()
            month = time.strftime("%Y-%m", time.gmtime(self.clock.now() // 1000))
            used = (12_000_000, 700_000, 35e6, 3_000_000_000)

            def add(tx: Any) -> None:
                tx.db.execute("INSERT INTO usage VALUES (?, ?, ?, ?, ?)", (month, *used))

            await engine.call(add)
            self.assertEqual((await engine.usage()).cost_usd, 0.6 + 1.6 + 0.1 + 0.4)


HOURLY = {"retries": {"limit": 5, "delay": "1 hour", "backoff": "constant"}}


async def failures(instance: Any) -> list[Any]:
    """The failed attempts so far."""
    workflow, history = instance.workflow, workflows.History(instance.id)
    _, rows = await workflow.engine.call(workflows.read_journal, workflow.name, instance.id, None)
    events = [event for row in rows for event in history.events(row)]
    return [event for event in events if event.type == "attempt_errored"]


class Introspected(Case):
    """A patient workflow: a sleep of 30 days, five retries, an approval."""

    def setUp(self) -> None:
        super().setUp()
        self.calls: list[str] = []
        self.attempts: list[int] = []

    async def run_patient(self, event: Any, step: Any) -> Any:
        await step.sleep("cool off", "30 days")

        async def charge(ctx: Any) -> str:
            self.attempts.append(ctx.attempt)
            raise ConnectionError("no answer")

        try:
            paid = await step.do("charge", HOURLY, charge)
        except (ConnectionError, WorkflowTimeoutError) as error:
            paid = type(error).__name__
        try:
            approval = (await step.wait_for_event("approval", "approved", timeout="7 days")).payload
        except WorkflowTimeoutError as error:
            approval = str(error)
        return [paid, approval]

    @contextlib.asynccontextmanager
    async def engine(self, **options: Any) -> Any:
        async with asyncio.timeout(5), super().engine(**options) as engine:
            yield engine

    @contextlib.asynccontextmanager
    async def one(self, run: Any = None, create: bool = True, **options: Any) -> Any:
        """An introspector of the instance "x" of a workflow made of `run`."""
        async with self.engine(**options) as engine:
            self.workflow = engine.bind(workflow(run or self.run_patient))
            async with self.workflow.introspect_instance("x") as one:
                if create:
                    await self.workflow.create(id="x")
                yield one

    def called(self, name: str, result: Any = None) -> Any:
        async def callback() -> Any:
            self.calls.append(name)
            return result

        return callback


class TheIssue(Introspected):
    async def test_a_month_five_hours_of_retries_and_a_missing_approval_take_milliseconds(
        self,
    ) -> None:
        began = self.clock.now()
        async with self.one(create=False) as one:
            await one.modify(
                lambda m: m.disable_sleeps().disable_retry_delays().force_event_timeout("approval")
            )
            await self.workflow.create(id="x")
            self.assertEqual(
                await one.get_output(), ["ConnectionError", "Execution timed out after 604800000ms"]
            )
        self.assertEqual(self.attempts, [1, 2, 3, 4, 5, 6])
        self.assertEqual(self.clock.now(), began)

    async def test_it_needs_no_manual_clock(self) -> None:
        async with self.one(create=False, clock=None) as one:

            async def prepare(m: Any) -> None:
                await m.disable_sleeps(["cool off"])
                await m.mock_step_result({"name": "charge"}, "paid")
                await m.mock_event({"type": "approved", "payload": True})

            await one.modify(prepare)
            await self.workflow.create(id="x")
            self.assertEqual(await one.get_output(), ["paid", True])
            self.assertEqual(self.attempts, [])


class Modifications(Introspected):
    async def test_only_the_named_sleep_is_skipped_by_its_index(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.sleep("nap", "1 day")
            await step.do("between", self.called("between"))
            await step.sleep_until("nap", self.clock.now() // 1000 + 86_400)
            await step.do("after", self.called("after"))

        async with self.one(run, create=False) as one:
            await one.modify(lambda m: m.disable_sleeps([{"name": "nap", "index": 2}]))
            await self.workflow.create(id="x")
            await self.clock.advance("23 hours")
            self.assertEqual(self.calls, [])
            await self.clock.advance("1 hour")
            self.assertEqual(self.calls, ["between", "after"])

    async def test_a_sleep_that_is_too_long_stays_an_error_when_sleeps_are_disabled(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.sleep("nap", "366 days")

        async with self.one(run, create=False) as one:
            await one.modify(lambda m: m.disable_sleeps())
            await self.workflow.create(id="x")
            self.assertIn("max_sleep", (await one.get_error())["message"])

    async def test_only_the_named_retry_delay_is_skipped(self) -> None:
        async def run(event: Any, step: Any) -> None:
            async def flaky(ctx: Any) -> None:
                self.attempts.append(ctx.attempt)
                if ctx.attempt < 3:
                    raise ValueError

            await step.do("fast", HOURLY, flaky)
            await step.do("slow", HOURLY, flaky)

        async with self.one(run, create=False) as one:
            await one.modify(lambda m: m.disable_retry_delays(["fast"]))
            await self.workflow.create(id="x")
            await self.clock.advance(0)
            self.assertEqual(self.attempts, [1, 2, 3, 1])
            delays = [e.retry_delay_ms for e in await failures(await self.workflow.get("x"))]
            self.assertEqual(delays, [0, 0, 3_600_000])

    async def test_a_mocked_result_replaces_async_and_plain_callbacks_of_that_count_only(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> Any:
            def plain(ctx: Any) -> str:
                self.calls.append("plain")
                return "real"

            first = await step.do("a", self.called("a", "real"))
            second = await step.do("a", self.called("a2", "real"))
            return [first, second, await step.do("p", plain)]

        async with self.one(run, create=False) as one:
            mocked: dict[str, Any] = {"list": [1]}
            await one.modify(lambda m: m.mock_step_result("a", mocked).mock_step_result("p", None))
            mocked["list"].append(2)
            await self.workflow.create(id="x")
            self.assertEqual(await one.get_output(), [{"list": [1]}, "real", None])
            self.assertEqual(self.calls, ["a2"])

    async def test_a_mocked_error_fails_the_first_attempts_and_then_the_mocked_result_comes(
        self,
    ) -> None:
        def prepare(m: Any) -> None:
            m.disable_sleeps()
            m.disable_retry_delays()
            m.mock_step_error("charge", KeyError("lost"), times=2)
            m.mock_step_result("charge", "paid")
            m.mock_event(type="approved", payload=1)

        async with self.one(create=False) as one:
            await one.modify(prepare)
            await self.workflow.create(id="x")
            self.assertEqual(await one.wait_for_step_result("charge"), "paid")
            errors = await failures(await self.workflow.get("x"))
            failed = [e.error["message"] for e in errors if "retry_delay_ms" in e]
            self.assertEqual((failed, self.attempts), (["'lost'"] * 2, []))

    async def test_mocked_errors_and_timeouts_queue_up_for_the_attempts_of_a_step(self) -> None:
        def prepare(m: Any) -> None:
            m.disable_sleeps().disable_retry_delays().force_event_timeout("approval")
            m.mock_step_error("charge", KeyError("lost"), times=2)
            m.force_step_timeout("charge", times=1)
            m.mock_step_error("charge", OSError("gone"), times=1)

        shown = ["KeyError", "KeyError", "WorkflowTimeoutError", "OSError"]
        async with self.one(create=False) as one:
            await one.modify(prepare)
            instance = await self.workflow.create(id="x")
            await one.get_output()
            errors = [e.error["name"] for e in await failures(instance)]
            self.assertEqual(errors, [*shown, "ConnectionError", "ConnectionError"])
            self.assertEqual(self.attempts, [5, 6], "those that the callback ran for")
            await one.modify(lambda m: m.mock_step_result("charge", "paid"))
            await one.modify(lambda m: m.mock_step_error("charge", EOFError(), times=1))
            await instance.restart()
            self.assertEqual((await one.get_output())[0], "paid", "in the last attempt")
            errors = [e.error["name"] for e in await failures(instance)]
            self.assertEqual(errors, [*shown, "EOFError"])

    async def test_a_mocked_error_without_times_fails_every_attempt(self) -> None:
        async with self.one(create=False) as one:
            error = OSError(5, "disk")
            await one.modify(lambda m: m.disable_sleeps().disable_retry_delays())
            await one.modify(lambda m: m.mock_step_error("charge", error))
            await self.workflow.create(id="x")
            with self.assertRaises(OSError) as caught:
                await one.wait_for_step_result({"name": "charge", "index": 1})
            self.assertEqual((caught.exception.errno, self.attempts), (5, []))

    async def test_a_forced_timeout_is_that_of_the_steps_config(self) -> None:
        async with self.one(create=False) as one:
            await one.modify(lambda m: m.disable_sleeps().disable_retry_delays())
            await one.modify(lambda m: m.force_step_timeout("charge", times=5))
            await self.workflow.create(id="x")
            with self.assertRaises(ConnectionError):
                await one.wait_for_step_result("charge")
            self.assertEqual(self.attempts, [6])
            await one.modify(lambda m: m.force_step_timeout("charge"))
            await (await self.workflow.get("x")).restart()
            with self.assertRaisesRegex(
                WorkflowTimeoutError, "^Execution timed out after 600000ms$"
            ):
                await one.wait_for_step_result("charge")

    async def test_a_forced_event_timeout_leaves_a_buffered_event_to_the_next_wait(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            first = None
            try:
                first = await step.wait_for_event("first", "go", timeout="1 year")
            except WorkflowTimeoutError:
                return [first, (await step.wait_for_event("second", "go")).payload]

        async with self.one(run, create=False) as one:
            await one.modify(
                lambda m: m.mock_event(type="go", payload=7).force_event_timeout("first")
            )
            await self.workflow.create(id="x")
            self.assertEqual(await one.get_output(), [None, 7])

    async def test_a_mocked_event_comes_once_in_each_start_and_before_others(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            got = [(await step.wait_for_event("w", "go")).payload for _ in range(2)]
            with contextlib.suppress(WorkflowTimeoutError):
                got.append((await step.wait_for_event("w", "go", timeout=0)).payload)
            return got

        async with self.one(run, create=False) as one:
            await one.modify(lambda m: m.mock_event(type="go", payload="mock"))
            instance = await self.workflow.create(id="x")
            for n in (1, 2):
                await self.clock.advance("1 hour")  # hibernates in between
                await instance.send_event(type="go", payload=n)
                self.assertEqual(await one.get_output(), ["mock", n])
                await instance.restart()

    async def test_a_mocked_event_reaches_an_instance_that_waits_already(self) -> None:
        async with self.one() as one:
            await self.clock.advance("31 days")
            await one.wait_for_status("waiting")
            await one.modify(lambda m: m.mock_event({"type": "approved", "payload": "late"}))
            self.assertEqual((await one.wait_for_step_result("approval")).payload, "late")
            self.assertEqual(await one.get_output(), ["ConnectionError", "late"])

    async def test_modifications_survive_restart_and_hibernation_and_end_with_the_block(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> Any:
            await step.sleep("awake", "1 day")
            return await step.do("s", self.called("s", "real"))

        async with self.engine() as engine:
            bound = engine.bind(workflow(run))
            async with bound.introspect_instance("x") as one:
                await one.modify(lambda m: m.mock_step_result("s", "mocked"))
                instance = await bound.create(id="x")
                for _ in range(2):
                    await self.clock.advance("1 hour")
                    self.assertEqual(engine.lives.runs, {})
                    await self.clock.advance("1 day")
                    self.assertEqual(await one.get_output(), "mocked")
                    await instance.restart()
            self.assertEqual(await self.finish(instance), "real")
            with self.assertRaisesRegex(RuntimeError, "only inside the block"):
                await one.modify(lambda m: m.disable_sleeps())
            with self.assertRaisesRegex(RuntimeError, "only inside the block"):
                one.mock_event(type="go")

    async def test_a_mocked_event_is_stored_when_modify_returns(self) -> None:
        async with self.one() as one:
            await one.wait_for_status("waiting")
            await (await self.workflow.get("x")).pause()
            await one.modify(lambda m: m.mock_event(type="approved", payload=1) and None)
            self.assertEqual(self.rows("SELECT type, payload FROM events"), [("approved", "1")])

    async def test_an_instance_that_is_still_queued_gets_a_mocked_event_once(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            if event.payload:
                await step.do("hold", lambda: self.held)
            got = [(await step.wait_for_event("w", "go")).payload]
            with contextlib.suppress(WorkflowTimeoutError):
                got.append((await step.wait_for_event("w", "go", timeout=0)).payload)
            return got

        self.held = asyncio.get_running_loop().create_future()
        limits = dataclasses.replace(FOREVER, running=1)
        async with self.one(run, create=False, limits=limits) as one:
            first = await self.workflow.create(id="first", params=True)
            await self.workflow.create(id="x")
            await one.modify(lambda m: m.mock_event(type="go", payload="once"))
            await one.wait_for_status("queued")
            self.held.set_result(None)
            self.assertEqual(await one.get_output(), ["once"])
            self.assertEqual((await first.status()).status, "waiting")

    async def test_a_rollback_handler_is_not_mocked_with_its_step(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            await step.do("s", self.called("s"), rollback=lambda info: self.called("undo")())
            raise ValueError

        async with self.one(run, create=False) as one:
            await one.modify(lambda m: m.mock_step_result("s", 1))
            await self.workflow.create(id="x")
            await one.get_error()
        self.assertEqual(self.calls, ["undo"])

    async def test_a_finished_instance_gets_no_mocked_event(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            return await step.do("s", self.called("s", "done"))

        async with self.one(run) as one:
            await one.get_output()
            await one.modify(lambda m: m.mock_event({"type": "t"}))
            self.assertEqual(await one.get_output(), "done")
        self.assertEqual(self.rows("SELECT count(*) FROM events"), [(0,)])


class All(Introspected):
    async def test_all_are_those_of_the_workflow_that_were_created_inside_the_block(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            await step.sleep("nap", "1 day")
            return await step.do("s", self.called("s", event.payload))

        async with self.engine() as engine:
            bound, other = engine.bind(workflow(run)), engine.bind(workflow(run, "Other"))
            old = await bound.create(id="old", params="real")
            async with bound.introspect() as everything:
                await everything.modify(lambda m: m.disable_sleeps().mock_step_result("s", "mock"))
                stranger = await other.create(id="a", params="real")
                await bound.create_batch([{"id": "b"}, {"id": "a"}])
                b, a = await everything.get()
                self.assertEqual([b.id, a.id, await a.get_output()], ["b", "a", "mock"])
                self.assertIs(b, (await everything.get())[0])
                self.assertEqual([await self.finish(i) for i in (old, stranger)], ["real"] * 2)
            self.assertEqual(engine.scheduler.blocks, [])

    async def test_what_one_is_told_counts_more_than_what_all_are(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            await step.wait_for_event("go", "go")
            return await step.do("s", self.called("s"))

        async with self.engine() as engine, engine.bind(workflow(run)).introspect() as everything:
            await everything.modify(lambda m: m.mock_step_result("s", "all").mock_event(type="go"))
            await engine.env.TEST.create(id="a")
            await engine.env.TEST.create(id="b")
            a, b = await everything.get()
            await a.modify(lambda m: m.mock_step_result("s", "a"))
            await (await engine.env.TEST.get("a")).restart()
            self.assertEqual([await a.get_output(), await b.get_output()], ["a", "all"])


class Waits(Introspected):
    async def test_a_wait_begun_before_the_creation_sees_even_a_status_that_passes(self) -> None:
        async def run(event: Any, step: Any) -> str:
            return await step.do("s", self.called("s", "done"))

        async with self.one(run, create=False) as one:
            waits = [one.wait_for_status(s) for s in ("queued", "running", "complete")]
            waits += [one.wait_for_step_result("s"), one.get_output()]
            together = asyncio.gather(*waits)
            await asyncio.sleep(0.01)
            await self.workflow.create(id="x")
            self.assertEqual((await together)[3:], ["done"] * 2)
            self.assertEqual(one.workflow.engine.watchers.topics(), [])

    async def test_a_past_status_does_not_count(self) -> None:
        async with self.one() as one:
            await one.wait_for_status("waiting")
            waiting = asyncio.ensure_future(one.wait_for_status("running"))
            await self.clock.advance("1 day")
            self.assertFalse(waiting.done())
            await self.clock.advance("30 days")
            await asyncio.wait_for(waiting, 1)

    async def test_the_present_status_counts_whatever_has_come_since(self) -> None:
        async def run(event: Any, step: Any) -> None:
            forever = asyncio.Event()
            await step.do("s", self.called("s"), rollback=lambda info: forever.wait())
            await step.wait_for_event("w", "wanted", timeout="1 hour")

        async with self.one(run) as one:
            await one.wait_for_status("waiting")
            await (await self.workflow.get("x")).send_event(type="other")
            await one.wait_for_status("waiting")
            await self.clock.advance("1 hour")  # its timeout leaves run: the rollback begins
            await one.wait_for_status("running")

    async def test_a_wait_that_can_not_come_true_any_more_is_an_error(self) -> None:
        async def run(event: Any, step: Any) -> None:
            raise ValueError("boom")

        async with self.one(run) as one:
            self.assertEqual(await one.get_error(), {"name": "ValueError", "message": "boom"})
            for wait, missed in (
                (one.get_output(), "complete"),
                (one.wait_for_status("paused"), "paused"),
                (one.wait_for_step_result("s"), "step 's'"),
            ):
                with self.assertRaisesRegex(WorkflowError, f"'x' is errored.*{missed}"):
                    await wait

    async def test_a_wait_goes_over_to_a_new_instance_with_the_id(self) -> None:
        async with self.one() as one:
            await one.wait_for_status("waiting")
            waiting = asyncio.ensure_future(one.wait_for_status("queued"))
            await self.clock.settle()
            old = await self.workflow.get("x")
            await asyncio.gather(old.delete(), self.workflow.create(id="x"))
            await asyncio.wait_for(waiting, 1)

    async def test_the_end_of_a_rollback_handler_is_no_result_of_its_step(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("s", asyncio.Event().wait, rollback=lambda info: value())

        async with self.one(run) as one:
            waiting = asyncio.ensure_future(one.wait_for_step_result("s"))
            await self.clock.settle()
            await (await self.workflow.get("x")).terminate(rollback=True)
            with self.assertRaisesRegex(WorkflowError, "is terminated before"):
                await asyncio.wait_for(waiting, 1)

    async def test_waits_end_with_the_engine(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(self.run_patient))
            async with bound.introspect_instance("x") as one:
                waiting = asyncio.ensure_future(one.get_output())
                await asyncio.sleep(0.01)
        with self.assertRaisesRegex(RuntimeError, "closed"):
            await waiting


class BadInput(Introspected):
    async def test_only_one_end_can_be_that_of_all_other_attempts(self) -> None:
        lasting: list[Any] = [
            lambda m: m.mock_step_result("s", 1),
            lambda m: m.mock_step_error({"name": "s"}, ValueError()),
            lambda m: m.force_step_timeout("s"),
        ]
        for first in lasting:
            async with self.one(create=False) as one:
                await one.modify(first)
                for second in lasting:
                    with self.assertRaisesRegex(ValueError, "contradiction: step .*'s'.* already"):
                        await one.modify(second)
                await one.modify(lambda m: m.mock_step_error("s", ValueError(), times=1))

    async def test_wrong_arguments_are_refused_with_one_clear_error(self) -> None:
        async with self.one(create=False) as one:
            wrong: list[tuple[type[Exception], str, Callable[[Any], Any]]] = [
                (TypeError, "list of steps", lambda m: m.disable_sleeps("nap")),
                (TypeError, "list of steps", lambda m: m.disable_retry_delays({"name": "nap"})),
                (TypeError, "iterable", lambda m: m.disable_sleeps(5)),
                (ValueError, "step is 5", lambda m: m.disable_sleeps([5])),
                (
                    ValueError,
                    "step is .*: expected its name",
                    lambda m: m.mock_step_result({"index": 1}, 1),
                ),
                (
                    ValueError,
                    "step is .*: expected its name",
                    lambda m: m.force_event_timeout(None),
                ),
                (ValueError, "index", lambda m: m.mock_step_result({"name": "s", "index": 0}, 1)),
                (
                    ValueError,
                    "index",
                    lambda m: m.mock_step_result({"name": "s", "index": True}, 1),
                ),
                (ValueError, "unknown key 'count'", lambda m: m.disable_sleeps([{"count": 1}])),
                (WorkflowError, r"result.*stored.*\$: set", lambda m: m.mock_step_result("s", {1})),
                (TypeError, "not an error", lambda m: m.mock_step_error("s", ValueError)),
                (
                    ValueError,
                    "times: .* 0: expected",
                    lambda m: m.mock_step_error("s", ValueError(), 0),
                ),
                (ValueError, "times: .* '2': exp", lambda m: m.force_step_timeout("s", times="2")),
                (WorkflowError, "event type", lambda m: m.mock_event({"type": "no good"})),
                (TypeError, "mock_event needs a type", lambda m: m.mock_event(payload=1)),
                (ValueError, "unknown key 'kind'", lambda m: m.mock_event(kind="go")),
                (TypeError, "unexpected keyword", lambda m: m.disable_sleeps(step="s")),
                (TypeError, "callable", 5),  # type: ignore[list-item]
            ]
            for kind, text, function in wrong:
                with self.subTest(text), self.assertRaisesRegex(kind, text):
                    await one.modify(function)
            with self.assertRaisesRegex(ValueError, "status is 'done': expected .*complete"):
                await one.wait_for_status("done")
            with self.assertRaisesRegex(ValueError, "step is .*: expected its name"):
                await one.wait_for_step_result(1)
            await self.assertCode(
                "instance.invalid_id", asyncio.to_thread(self.workflow.introspect_instance, "a b")
            )

    async def test_modify_needs_an_open_block_and_a_block_an_open_engine(self) -> None:
        engine = Engine(self.path)
        bound = engine.bind(workflow(self.run_patient))
        for block in (bound.introspect(), bound.introspect_instance("x")):
            with self.assertRaisesRegex(RuntimeError, "not open yet"):
                await block.__aenter__()
        async with engine:
            with self.assertRaisesRegex(RuntimeError, "only inside the block"):
                await bound.introspect().modify(lambda m: m.disable_sleeps())

    async def test_the_originals_names_work_too(self) -> None:
        async def prepare(m: Any) -> None:
            await m.disableSleeps()
            await m.disableRetryDelays()
            await m.mockStepError({"name": "charge"}, OSError("x"), 1)
            await m.forceStepTimeout({"name": "other"})
            await m.mockStepResult({"name": "charge"}, "paid")
            await m.mockEvent({"type": "other", "payload": None})
            await m.forceEventTimeout({"name": "approval"})

        async with self.one(create=False) as one, self.workflow.introspect() as everything:
            await everything.modifyAll(prepare)
            await self.workflow.create(id="x")
            await one.waitForStatus("complete")
            self.assertEqual(await one.waitForStepResult({"name": "charge"}), "paid")
            self.assertEqual((await one.getOutput())[0], "paid")
            with self.assertRaises(WorkflowError):
                await one.getError()


# --------------------------------------------------------------------------------------------------
# The newest API: step context, rollback, restart from a step, delete_batch, dynamic delay,
# sensitive outputs, subscribe.


class Undoing(Case):
    """Steps that write into a log when they run and when they are undone."""

    def setUp(self) -> None:
        super().setUp()
        self.log: list[str] = []

    def undo(self, word: str, error: BaseException | None = None) -> Callable[..., Any]:
        async def handler(info: Any) -> None:
            self.log.append(f"undo {word}")
            if error is not None:
                raise error

        return handler

    async def told(self, instance: Any, **options: Any) -> list[str]:
        return [brief(event) async for event in instance.subscribe(**options)]

    async def fails(self, run: Callable[..., Any], **options: Any) -> BaseException:
        with self.assertRaises(Exception) as caught:
            await self.outcome(run, **options)
        return caught.exception


def brief(event: Any) -> str:
    """An event in few words: `attempt_errored pay-1 2`."""
    words = (event.type, event.get("step_name", ""), event.get("attempt", ""))
    return " ".join(str(word) for word in words if word != "")


class StepContext(Undoing):
    async def test_the_context_has_name_count_attempt_and_config(self) -> None:
        seen = []

        async def callback(ctx: Any) -> None:
            seen.append((ctx.step.name, ctx.step.count, ctx.attempt, ctx["step"]["name"]))
            if ctx.attempt == 1:
                raise ValueError

        async def run(event: Any, step: Any) -> None:
            await step.do("a", constant(1), callback)
            await step.do("a", callback)

        await self.outcome(run)
        self.assertEqual(
            seen, [("a", 1, 1, "a"), ("a", 1, 2, "a"), ("a", 2, 1, "a"), ("a", 2, 2, "a")]
        )

    async def test_the_contexts_config_has_the_defaults_and_values_as_they_were_written(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> Any:
            given = {"retries": {"delay": "1 second"}, "timeout": "2 minutes"}
            return [
                await step.do("given", given, lambda ctx: dict(ctx.config)),
                await step.do("defaults", lambda ctx: dict(ctx.config)),
            ]

        given, defaults = await self.outcome(run)
        retries = {"limit": 5, "delay": "1 second", "backoff": "exponential"}
        self.assertEqual(given, {"retries": retries, "timeout": "2 minutes"})
        limit = await self.outcome(
            lambda event, step: step.do("s", lambda ctx: ctx.config.retries.limit)
        )
        self.assertEqual(limit, 5, "as Cloudflare's SDK has it")
        self.assertEqual(defaults, workflows.DEFAULT_CONFIG)

    async def test_changing_the_contexts_config_changes_nothing(self) -> None:
        limits = []

        async def callback(ctx: Any) -> None:
            limits.append(ctx.config["retries"]["limit"])
            ctx.config["retries"]["limit"] = 0
            if ctx.attempt == 1:
                raise ValueError

        await self.outcome(lambda event, step: step.do("s", constant(3), callback))
        self.assertEqual(limits, [3, 3])


class Rollback(Undoing):
    async def test_handlers_run_in_reverse_order_of_start_before_the_instance_is_errored(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> None:
            for name in "abc":
                await step.do(name, value, rollback=self.undo(name))
            raise ValueError("original")

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            with self.assertRaisesRegex(ValueError, "original"):
                await self.finish(instance)
            status = await instance.status()
        self.assertEqual(self.log, ["undo c", "undo b", "undo a"])
        self.assertEqual((status.status, status.error["message"]), ("errored", "original"))

    async def test_the_order_is_that_of_the_start_also_in_parallel(self) -> None:
        gates = {name: asyncio.Event() for name in "abc"}

        async def run(event: Any, step: Any) -> None:
            await asyncio.gather(*(step.do(n, gates[n].wait, rollback=self.undo(n)) for n in "abc"))
            raise ValueError

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            for name in "cab":  # the order in which they end
                await self.clock.settle()
                gates[name].set()
            with self.assertRaises(ValueError):
                await self.finish(instance)
        self.assertEqual(self.log, ["undo c", "undo b", "undo a"])

    async def test_finished_failed_and_unfinished_steps_take_part(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("finished", value, rollback=self.undo("finished"))
            await asyncio.gather(
                step.do("unfinished", Gate().open.wait, rollback=self.undo("unfinished")),
                step.do("failed", ONCE, raises(ValueError()), rollback=self.undo("failed")),
            )

        self.assertIsInstance(await self.fails(run), ValueError)
        self.assertEqual(self.log, ["undo failed", "undo unfinished", "undo finished"])

    async def test_a_step_that_starts_right_before_the_error_takes_part(self) -> None:
        async def run(event: Any, step: Any) -> None:
            undo = self.undo(event.instance_id)
            task = asyncio.create_task(step.do("s", asyncio.Event().wait, rollback=undo))
            for _ in range(event.payload):
                await asyncio.sleep(0)
            raise ValueError(task)

        async with self.engine() as engine:
            bound = engine.bind(workflow(run))
            for turns in range(8):
                await bound.create(id=f"{turns}", params=turns)
                await self.clock.settle()
        sql = """SELECT id FROM instances JOIN journal ON key = instance
            WHERE type = 'start' AND step LIKE 'do%' ORDER BY key"""
        self.assertEqual(self.log, [f"undo {id}" for (id,) in self.rows(sql)])
        self.assertGreater(len(self.log), 1)

    async def test_a_step_that_has_not_started_takes_no_part(self) -> None:
        async def run(event: Any, step: Any) -> None:
            unused = step.do("unused", value, rollback=self.undo("unused"))
            await step.do("used", value, rollback=self.undo("used"))
            refused = step.do("refused", {"retries": 1}, value, rollback=self.undo("refused"))
            await asyncio.gather(refused)
            await unused

        self.assertEqual((await self.fails(run)).code, "step.invalid_config")
        self.assertEqual(self.log, ["undo used"])

    async def test_a_step_that_run_has_cancelled_takes_part(self) -> None:
        async def run(event: Any, step: Any) -> None:
            task = asyncio.create_task(
                step.do("gone", Gate().open.wait, rollback=self.undo("gone"))
            )
            await step.do("other", value)
            task.cancel()
            await step.do("another", value)
            raise ValueError

        await self.fails(run)
        self.assertEqual(self.log, ["undo gone"])

    async def test_a_callback_in_flight_has_ended_before_the_handlers_run(self) -> None:
        async def callback() -> None:
            try:
                await Gate().open.wait()
            finally:
                self.log.append("cancelled")

        async def run(event: Any, step: Any) -> None:
            task = asyncio.create_task(step.do("s", callback, rollback=self.undo("s")))
            await step.do("other", value)
            raise ValueError(task)

        await self.fails(run)
        self.assertEqual(self.log, ["cancelled", "undo s"])

    async def test_a_handler_gets_the_context_error_output_and_name(self) -> None:
        seen = []

        async def undo(info: Any) -> None:
            mapping = [info["ctx"].step.count, info["error"], info["output"], info["stepName"]]
            attributes = [info.ctx.step.count, info.error, info.output, info.stepName]
            self.assertEqual([*map(repr, mapping)], [*map(repr, attributes)])
            seen.append((info.ctx.step.name, info.ctx.attempt, *mapping))

        async def run(event: Any, step: Any) -> None:
            await step.do("s", lambda: {"n": 1}, rollback=undo)
            await step.do("s", constant(2), raises(KeyError("k")), rollback=undo)

        error = await self.fails(run)
        self.assertEqual(repr(error), "KeyError('k')")
        self.assertEqual(
            [(name, attempt, count, repr(e), *more) for name, attempt, count, e, *more in seen],
            [
                ("s", 3, 2, "KeyError('k')", None, "s-2"),
                ("s", 1, 1, "KeyError('k')", {"n": 1}, "s-1"),
            ],
        )

    async def test_the_context_of_a_handler_is_that_of_the_step_with_its_config(self) -> None:
        seen = []
        plain = {"retries": {"delay": "1 second"}, "timeout": "2 minutes"}
        dynamic = {"retries": {"limit": 0, "delay": lambda info: 1}}

        async def run(event: Any, step: Any) -> None:
            for config in (plain, dynamic):

                async def callback(ctx: Any) -> None:
                    seen.append(ctx.config)

                await step.do(
                    "s", config, callback, rollback=lambda info: seen.append(info.ctx.config)
                )
            raise ValueError

        await self.fails(run)
        self.assertEqual(seen[3], seen[0])
        self.assertEqual(seen[2], seen[1])

    async def test_a_plain_handler_runs_in_a_thread(self) -> None:
        def plain(info: Any) -> None:
            self.log.append(f"plain {threading.current_thread() is threading.main_thread()}")

        async def run(event: Any, step: Any) -> None:
            await step.do("s", value, rollback=plain)
            raise ValueError

        await self.fails(run)
        self.assertEqual(self.log, ["plain False"])

    async def test_a_handler_that_can_not_take_one_argument_is_refused_at_once(self) -> None:
        async def none() -> None:
            pass

        async def two(output: Any, error: Any) -> None:
            pass

        async def run(event: Any, step: Any) -> list[str]:
            refused = []
            for handler in (none, two):
                call = step.do("s", lambda: self.log.append("ran"), rollback=handler)
                refused.append((await caught(call)).code)
            return refused

        self.assertEqual(await self.outcome(run), ["step.invalid_callback"] * 2)
        self.assertEqual(self.log, [])

    async def test_handlers_are_retried_by_a_config_of_their_own(self) -> None:
        twice = {"retries": {"limit": 1, "delay": "1 hour", "backoff": "constant"}}
        for options in (
            {"rollback_config": twice},
            {"options": {"rollbackConfig": twice}},
        ):
            self.setUp()
            times: list[float] = []

            async def undo(info: Any, times: list[float] = times) -> None:
                times.append(self.clock.now())
                if len(times) == 1:
                    raise ValueError

            if "options" in options:
                options["options"] |= {"rollback": undo}
            else:
                options |= {"rollback": undo}

            async def run(event: Any, step: Any, options: Any = options) -> None:
                more = dict(options)
                args = (more.pop("options"),) if "options" in more else ()
                await step.do("s", ONCE, value, *args, **more)
                await step.do("fails", ONCE, raises(OSError()))

            self.assertIsInstance(await self.fails(run), OSError)
            self.assertEqual(len(times), 2)
            self.assertGreaterEqual(times[1] - times[0], 3_600_000)

    async def test_handlers_have_the_defaults_of_all_steps_not_those_of_their_step(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("s", ONCE, value, rollback=self.undo("s", ValueError()))
            raise OSError

        await self.fails(run)
        self.assertEqual(len(self.log), 6)

    async def test_a_handlers_timeout_bounds_each_of_its_attempts(self) -> None:
        self.clock = ManualClock(patience=0)

        async def undo(info: Any) -> None:
            self.log.append("undo")
            await asyncio.Event().wait()

        async def run(event: Any, step: Any) -> None:
            config = constant(1, timeout="1 minute")
            await step.do("s", value, {"rollback": undo, "rollbackConfig": config})
            raise ValueError

        self.assertIsInstance(await self.fails(run), ValueError)
        self.assertEqual(self.log, ["undo", "undo"])

    async def test_the_first_handler_that_fails_for_good_stops_the_chain(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", value, rollback=self.undo("a"))
            await step.do("b", value, rollback=self.undo("b", NonRetryableError("no")))
            await step.do("c", value, rollback=self.undo("c"))
            raise ValueError("original")

        self.assertEqual(str(await self.fails(run)), "original")
        self.assertEqual(self.log, ["undo c", "undo b"])
        self.assertEqual(self.rows("SELECT status, rollback FROM instances")[0][1], "failed")

    async def test_what_a_handler_returns_is_ignored(self) -> None:
        async def run(event: Any, step: Any) -> None:
            for result in ({1}, 5):
                await step.do("s", value, rollback=lambda info, r=result: r)
            raise ValueError

        self.assertIsInstance(await self.fails(run), ValueError)
        self.assertEqual(self.rows("SELECT rollback FROM instances"), [("complete",)])

    async def test_a_successful_run_runs_none_nor_does_an_error_that_run_catches(self) -> None:
        async def run(event: Any, step: Any) -> str:
            await step.do("a", value, rollback=self.undo("a"))
            await caught(step.do("b", ONCE, raises(ValueError()), rollback=self.undo("b")))
            return "done"

        self.assertEqual(await self.outcome(run), "done")
        self.assertEqual(self.log, [])

    async def test_an_output_that_cannot_be_stored_begins_a_rollback_too(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            await step.do("a", value, rollback=self.undo("a"))
            return {1}

        self.assertEqual((await self.fails(run)).code, "output.not_serializable")
        self.assertEqual(self.log, ["undo a"])

    async def test_handlers_do_not_count_as_steps(self) -> None:
        async def run(event: Any, step: Any) -> None:
            for _ in range(4):
                await step.do("s", value, rollback=self.undo("s"))

        limits = dataclasses.replace(FOREVER, steps=3)
        self.assertEqual((await self.fails(run, limits=limits)).code, "limit.steps")
        self.assertEqual(self.log, ["undo s"] * 3)

    async def test_nested_steps_take_part(self) -> None:
        async def run(event: Any, step: Any) -> None:
            async def outer() -> None:
                await step.do("inner", value, rollback=self.undo("inner"))

            await step.do("outer", outer, rollback=self.undo("outer"))
            raise ValueError

        await self.fails(run)
        self.assertEqual(self.log, ["undo inner", "undo outer"])

    async def test_handlers_known_in_this_process_need_no_replay(self) -> None:
        lives = []

        async def run(event: Any, step: Any) -> None:
            lives.append(1)
            await step.do("s", value, rollback=self.undo("s"))
            raise ValueError

        await self.fails(run)
        self.assertEqual((self.log, lives), (["undo s"], [1]))

    async def test_rollback_needs_no_room_in_the_instances_state(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", lambda: "x" * 92, rollback=self.undo("a"))
            await step.do(
                "b", lambda: None, rollback=self.undo("b", NonRetryableError(event.payload))
            )
            raise ValueError("original")

        limits = dataclasses.replace(FOREVER, instance_bytes=103)
        error = await self.fails(run, limits=limits)  # params 4, outputs 94 + 4 bytes
        self.assertEqual(repr(error), "ValueError('original')")
        self.assertEqual(self.log, ["undo b"])

    async def test_handlers_run_when_the_instances_state_is_full(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", lambda: "x" * 94, rollback=self.undo("a"))
            await step.do("b", lambda: "x" * 94, rollback=self.undo("b"))

        limits = dataclasses.replace(FOREVER, instance_bytes=102)  # params 4, an output 96
        self.assertEqual((await self.fails(run, limits=limits)).code, "limit.instance_state")
        self.assertEqual(self.log, ["undo b", "undo a"])

    async def test_a_step_call_in_a_handler_is_refused_with_a_clear_error(self) -> None:
        async def run(event: Any, step: Any) -> None:
            async def undo(info: Any) -> None:
                try:
                    await step.do("inside", value)
                except BaseException as error:
                    self.log.append(type(error).__name__)
                    raise

            await step.do("a", value, rollback=undo, rollback_config=ONCE)
            raise ValueError

        await self.fails(run)
        self.assertEqual(self.log, ["WorkflowFatalError"])

    async def test_result_waits_for_the_end_of_the_rollback(self) -> None:
        gate = Gate()

        async def run(event: Any, step: Any) -> None:
            await step.do("a", value, rollback=lambda info: gate.open.wait())
            raise ValueError

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            result = asyncio.create_task(instance.result())
            await self.clock.settle()
            self.assertFalse(result.done())
            gate.open.set()
            with self.assertRaises(ValueError):
                await result

    async def test_a_rollback_of_a_decorated_step(self) -> None:
        async def run(event: Any, step: Any) -> None:
            @step.do("s", rollback=self.undo("s"))
            async def s() -> int:
                return 1

            await s()
            raise ValueError

        self.assertIsInstance(await self.fails(run), ValueError)
        self.assertEqual(self.log, ["undo s"])

    async def test_bad_options_are_refused_where_the_step_is_awaited(self) -> None:
        bad: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
            (({},), {}, "rollback"),
            (({"rollback": 5},), {}, "rollback is 5"),
            (({"rollback": None},), {}, "rollback"),
            (({"rollbackConfig": {}},), {}, "rollback"),
            ((), {"rollback": "undo"}, "rollback is 'undo'"),
            ((), {"rollback_config": {}}, "rollback"),
            (({"rollback": print, "retries": 5},), {}, "retries"),
            (({"rollback": print, "rollbackConfig": {"retry": 5}},), {}, "retry"),
            (({"rollback": print, "rollbackConfig": {"retries": {"limit": -1}}},), {}, "limit"),
            (
                (),
                {"rollback": print, "rollback_config": {"sensitive": "output"}},
                "sensitive",
            ),
            ((5,), {}, "options"),
        ]
        for args, options, text in bad:
            self.setUp()

            async def run(event: Any, step: Any, args: Any = args, options: Any = options) -> None:
                await step.do("s", {}, lambda: self.log.append("ran"), *args, **options)

            with self.subTest(text=text, args=args, options=options):
                error = await self.fails(run)
                self.assertEqual(getattr(error, "code", error), "step.invalid_config")
                self.assertIn(text, str(error))
                self.assertEqual(self.log, [])


class RollbackStatus(Undoing):
    async def rollback(self, handler: Any, act: Any = None) -> Any:
        """What `status` tells of it."""

        async def run(event: Any, step: Any) -> None:
            await step.do("s", value, rollback=handler, rollback_config=ONCE)
            await step.wait_for_event("w", "t", timeout="1 hour")

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            self.assertIsNone((await instance.status()).rollback)
            if act is not None:
                await act(instance)
            await self.clock.advance("1 hour")
            now = await instance.status()
            if now.status not in workflows.FINISHED:
                self.assertIsNone(now.rollback)  # as long as it goes on
            with contextlib.suppress(WorkflowError):
                await instance.terminate()
            return (await instance.status()).rollback

    async def test_a_handler_does_not_count_as_a_step_in_the_usage(self) -> None:
        await self.rollback(self.undo("s"))
        async with self.engine() as engine:
            self.assertEqual((await engine.usage()).steps, 2)  # a `do`, and an event wait

    async def test_none_when_there_was_none(self) -> None:
        async def send(instance: Any) -> None:
            await instance.send_event(type="t")

        self.assertIsNone(await self.rollback(self.undo("s"), send))
        self.setUp()
        self.assertIsNone(await self.rollback(self.undo("s"), lambda i: i.terminate()))

    async def test_complete(self) -> None:
        complete = {"outcome": "complete", "error": None}
        self.assertEqual(await self.rollback(self.undo("s")), complete)
        self.setUp()
        status = await self.rollback(self.undo("s"), lambda i: i.terminate(rollback=True))
        self.assertEqual(status, complete)

    async def test_failed_with_the_error_of_the_handler(self) -> None:
        status = await self.rollback(self.undo("s", LookupError("gone")))
        self.assertEqual(status["outcome"], "failed")
        self.assertEqual(status["error"], {"name": "LookupError", "message": "gone"})
        self.assertEqual((status.outcome, status.error.name), ("failed", "LookupError"))

    async def test_failed_without_an_error_when_it_was_cut_short(self) -> None:
        cut = await self.rollback(lambda info: asyncio.Event().wait())
        self.assertEqual(cut, {"outcome": "failed", "error": None})


class RollbackSteering(Undoing):
    """What pause, terminate and restart do to a rollback, and terminate(rollback=True)."""

    def setUp(self) -> None:
        super().setUp()
        self.gate = Gate()

    async def held(self, info: Any) -> None:
        self.log.append("undo held")
        await self.gate.open.wait()

    async def run_held(self, event: Any, step: Any) -> None:
        await step.do("a", value, rollback=self.undo("a"))
        await step.do("held", value, rollback=self.held)
        raise ValueError("original")

    async def test_the_status_stays_running_meanwhile_and_pause_has_no_effect(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(self.run_held)).create()
            await self.clock.advance("1 minute")
            for call in (instance.status, instance.pause, instance.resume):
                await call()
                await self.clock.settle()
                self.assertEqual((await instance.status()).status, "running")
            self.gate.open.set()
            with self.assertRaisesRegex(ValueError, "original"):
                await self.finish(instance)
        self.assertEqual(self.log, ["undo held", "undo a"])

    async def test_the_status_is_running_also_in_a_handlers_retry_delay(self) -> None:
        async def run(event: Any, step: Any) -> None:
            config = constant(1, "1 hour")
            undo = self.undo("s", ValueError())
            await step.do("s", value, rollback=undo, rollback_config=config)
            raise ValueError

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance("1 minute")
            await instance.pause()
            self.assertEqual((await instance.status()).status, "running")
            await self.clock.advance("1 hour")
            self.assertEqual((await instance.status()).status, "errored")
        self.assertEqual(self.log, ["undo s"] * 2)

    async def test_a_pause_that_has_not_taken_effect_is_void_when_the_rollback_begins(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", value, rollback=self.undo("a"))
            await step.do("gate", ONCE, self.gate.open.wait, rollback=self.undo("gate"))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await instance.pause()
            await instance.terminate(rollback=True)
            self.assertEqual((await instance.status()).status, "running")
            await self.clock.settle()
            self.assertEqual((await instance.status()).status, "terminated")
        self.assertEqual(self.log, ["undo gate", "undo a"])

    async def test_terminate_ends_a_rollback_at_once(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(self.run_held)).create()
            await self.clock.settle()
            await instance.terminate()
            self.assertEqual((await instance.status()).status, "terminated")
            await self.clock.advance("1 hour")
            self.assertEqual((await instance.status()).status, "terminated")
        self.assertEqual(self.log, ["undo held"])
        self.assertEqual(self.rows("SELECT rollback FROM instances"), [("failed",)])

    async def test_terminate_with_rollback_lets_one_that_is_under_way_go_on(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(self.run_held)).create()
            await self.clock.settle()
            await instance.terminate(rollback=True)
            self.assertEqual((await instance.status()).status, "running")
            self.gate.open.set()
            await self.clock.settle()
            self.assertEqual((await instance.status()).status, "terminated")
        self.assertEqual(self.log, ["undo held", "undo a"])

    async def test_restart_in_the_middle_of_a_rollback_begins_again(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(self.run_held)).create()
            await self.clock.settle()
            await instance.restart()
            await self.clock.settle()
            self.assertEqual(self.log, ["undo held"] * 2)
            self.gate.open.set()
            with self.assertRaises(ValueError):
                await self.finish(instance)
        self.assertEqual(self.log, ["undo held", "undo held", "undo a"])
        self.assertEqual(self.rows("SELECT rollback FROM instances"), [("complete",)])

    async def test_a_restart_after_a_rollback_knows_nothing_of_it(self) -> None:
        lives = []

        async def run(event: Any, step: Any) -> str:
            lives.append(1)
            await step.do("a", value, rollback=self.undo("a"))
            if len(lives) == 1:
                raise ValueError
            return "done"

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            with self.assertRaises(ValueError):
                await self.finish(instance)
            await instance.restart()
            self.assertEqual(await self.finish(instance), "done")
        self.assertEqual(self.log, ["undo a"])

    async def undone(
        self, tail: Callable[..., Any], *calls: str, hours: int = 0, **engine_options: Any
    ) -> None:
        """Terminates, with rollback, an instance that has done one step and then `tail`."""

        async def run(event: Any, step: Any) -> None:
            await step.do("first", value, rollback=self.undo("first"))
            await tail(event, step)

        async with self.engine(**engine_options) as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance(hours * 3_600_000)
            for call in calls:
                await getattr(instance, call)()
            await instance.terminate({"rollback": True})
            self.assertIn((await instance.status()).status, ("running", "queued"))
            await self.clock.settle()
            self.assertEqual((await instance.status()).status, "terminated")
            await self.assertCode("instance.terminated", instance.result())
            await self.assertCode("instance.cannot_terminate", instance.terminate(rollback=True))

    async def test_terminate_with_rollback_from_running_cancels_the_callback_first(self) -> None:
        async def callback() -> None:
            try:
                await self.gate.open.wait()
            finally:
                self.log.append("cancelled")

        await self.undone(lambda event, step: step.do("s", callback, rollback=self.undo("s")))
        self.assertEqual(self.log, ["cancelled", "undo s", "undo first"])

    async def test_terminate_with_rollback_from_waiting_also_when_hibernated(self) -> None:
        for hours in (0, 1):
            self.setUp()
            await self.undone(lambda event, step: step.sleep("nap", "1 day"), hours=hours)
            self.assertEqual(self.log, ["undo first"])

    async def test_terminate_with_rollback_from_paused(self) -> None:
        await self.undone(lambda event, step: step.sleep("nap", "1 day"), "pause", hours=1)
        self.assertEqual(self.log, ["undo first"])

    async def test_terminate_with_rollback_while_an_event_is_waited_for(self) -> None:
        await self.undone(one_event)
        self.assertEqual(self.log, ["undo first"])

    async def test_terminate_with_rollback_from_queued_waits_for_a_slot(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("first", value, rollback=self.undo("first"))
            await step.sleep("nap", "1 minute")

        limits = dataclasses.replace(FOREVER, running=1)
        async with self.engine(limits=limits) as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            blocker = await engine.bind(workflow(self.gate.run, "Blocker")).create()
            await self.clock.advance("2 minutes")
            self.assertEqual((await instance.status()).status, "queued")
            await instance.terminate(rollback=True)
            await self.clock.settle()
            self.assertEqual(self.log, [])
            self.gate.open.set()
            await self.finish(blocker)
            await self.assertCode("instance.terminated", self.finish(instance))
        self.assertEqual(self.log, ["undo first"])

    async def test_the_waits_of_run_do_not_end_any_more_in_a_rollback(self) -> None:
        async def run(event: Any, step: Any) -> None:
            again = {"retries": {"delay": "2 hours"}}
            undo = self.undo("first", ValueError())
            await step.do("first", value, rollback=undo, rollback_config=again)
            await asyncio.gather(step.wait_for_event("w", "t"), step.sleep("nap", "1 hour"))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await instance.terminate(rollback=True)
            await instance.send_event(type="t")
            await self.clock.advance("3 hours")
        types = "SELECT type FROM journal WHERE type IN ('slept', 'event', 'due')"
        self.assertEqual(self.rows(types), [("due",)])

    async def test_terminate_with_rollback_from_queued_keeps_its_place(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("first", value, rollback=self.undo(event.instance_id))
            await step.sleep("nap", event.payload)
            self.log.append(event.instance_id)

        async with self.engine(limits=dataclasses.replace(FOREVER, running=1)) as engine:
            bound = engine.bind(workflow(run))
            a, b = [await bound.create(id=id, params=ms) for id, ms in (("a", 1000), ("b", 2000))]
            await self.clock.settle()
            await engine.bind(workflow(self.gate.run, "Blocker")).create()
            await self.clock.advance(3000)
            await a.terminate(rollback=True)
            self.gate.open.set()
            await self.finish(b)
        self.assertEqual(self.log, ["undo a", "b"])

    async def test_terminate_with_rollback_without_handlers_is_terminate(self) -> None:
        async with self.engine(limits=dataclasses.replace(FOREVER, running=0)) as engine:
            never_started = await engine.bind(workflow(self.run_held)).create()
            await never_started.terminate(rollback=True)
            self.assertEqual((await never_started.status()).status, "terminated")
        async with self.engine() as engine:
            instance = await engine.bind(workflow(self.gate.run, "Gate")).create()
            await self.clock.settle()
            await instance.terminate(rollback=True)
            self.assertEqual((await instance.status()).status, "terminated")

    async def test_the_error_of_terminate_with_rollback_is_named_terminated(self) -> None:
        seen = []

        async def run(event: Any, step: Any) -> None:
            await step.do("s", self.gate.open.wait, rollback=lambda info: seen.append(info))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await instance.terminate(rollback=True)
            await self.clock.settle()
            status = await instance.status()
            self.assertEqual((status.status, status.error), ("terminated", None))
        (info,) = seen
        self.assertIs(type(info.error), WorkflowError)
        self.assertEqual((info.error.name, info.error.code), ("Terminated", "instance.terminated"))
        self.assertEqual((info.output, info.ctx.attempt), (None, 1))

    async def test_terminated_stays_terminated_when_a_handler_fails(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("s", value, rollback=self.undo("s", NonRetryableError()))
            await step.sleep("nap", "1 day")

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await instance.terminate(rollback=True)
            await self.clock.settle()
            self.assertEqual((await instance.status()).status, "terminated")

    async def test_terminate_takes_no_other_options(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(self.run_held)).create()
            for options in ({"rollback": 1}, {"rollback": None}, {"rolback": True}):
                with self.assertRaisesRegex((TypeError, ValueError), "rol+back"):
                    await instance.terminate(options)
                with self.assertRaisesRegex((TypeError, ValueError), "rol+back"):
                    await instance.terminate(**options)

    async def test_an_instance_can_terminate_itself_with_rollback_from_a_step(self) -> None:
        async def run(event: Any, step: Any) -> None:
            async def end() -> None:
                await instances[0].terminate(rollback=True)

            await step.do("end", end, rollback=self.undo("end"))

        instances: list[Any] = []
        async with self.engine() as engine:
            instances.append(await engine.bind(workflow(run)).create())
            await self.clock.settle()
            self.assertEqual((await instances[0].status()).status, "terminated")
        self.assertEqual(self.log, ["undo end"])


# What follows is replayed in a child process that dies in the middle, and then in another.
SAGA = """
    async def run(event, step):
        async def work(name):
            note(f"do-{name}")
            return name
        async def undo(info):
            note(f"undo-{info.output}")
            await asyncio.sleep(0.01)
            if info.output == "b" and not os.path.exists(PATH + ".died"):
                open(PATH + ".died", "w").close()
                die()
            note(f"undone-{info.output}")
        for name in "abc":
            await step.do(name, lambda: work(name), rollback=undo, rollback_config=FAST)
        raise ValueError("original")
    FAST = {"retries": {"limit": 2, "delay": 1}}
    async def main(w):
        try: await (await get(w)).result()
        except ValueError as error: note(str(error))
    go()
    """


class RollbackAfterDeath(Real):
    def test_after_sigkill_finished_handlers_do_not_run_again_and_the_rest_runs(self) -> None:
        self.assertEqual(self.runs_until_it_ends(SAGA), 1)
        chain = ["undo-c", "undone-c", "undo-b", "undo-b", "undone-b", "undo-a", "undone-a"]
        self.assertEqual(self.log(), ["do-a", "do-b", "do-c", *chain, "original"])

    def test_a_handler_that_kills_its_process_ends_the_chain_after_its_retries(self) -> None:
        deaths = self.runs_until_it_ends(SAGA.replace("not os.path.exists", "not os.path.isdir"))
        self.assertIn(deaths, (3, 4))
        self.assertEqual(self.log()[-1], "original")
        self.assertNotIn("undo-a", self.log())
        self.assertEqual(self.rows("SELECT rollback FROM instances"), [("failed",)])

    def test_no_sigkill_at_any_moment_repeats_a_finished_handler(self) -> None:
        chance = random.Random(2)
        script = SAGA.replace("not os.path.exists", "not os.path.isdir").replace("die()", "pass")
        script = script.replace('"abc"', '"abcdefghij"').replace('"limit": 2', '"limit": 50')
        for _ in range(6):
            child = self.child(script)
            child.wait(chance.uniform(0.01, 0.15))
            child.kill()
        self.assertEqual(self.child(script).end()[1], 0)
        undone = [word for word in self.log() if word.startswith("undone")]
        self.assertEqual(list(dict.fromkeys(undone)), [f"undone-{n}" for n in "jihgfedcba"])
        types = "SELECT step FROM journal WHERE type = 'done' AND step LIKE 'rollback%'"
        self.assertEqual(len(self.rows(types)), 10)

    async def test_terminate_with_rollback_returns_when_it_is_durably_begun(self) -> None:
        self.child(
            """
            async def run(event, step):
                await step.do("a", value, rollback=lambda info: note("undo"))
                await step.sleep("nap", "1 hour")
            async def main(w):
                i = await get(w)
                await until(i, "waiting")
                await i.terminate(rollback=True)
                die()
            go()
            """
        ).end()
        undone: list[str] = []

        async def run(event: Any, step: Any) -> None:
            await step.do("a", value, rollback=lambda info: undone.append(info.error.name))
            await step.sleep("nap", "1 hour")

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).get("i")
            await reach(instance, "terminated")
        self.assertEqual(undone + self.log(), ["Terminated"])

    async def test_a_client_can_terminate_with_rollback_what_the_owner_runs(self) -> None:
        script = """
            async def run(event, step):
                async def held():
                    try: await asyncio.sleep(9)
                    finally: note("cancelled")
                await step.do("a", value, rollback=lambda info: note("undo-a"))
                await step.do("b", held, rollback=lambda info: note("undo-b"))
            async def main(w):
                i = await get(w)
                say("up")
                await asyncio.sleep(60)
            go()
            """
        child = self.child(script)
        await child.wait_for("up")
        async with self.engine() as engine:
            bound = workflows.Workflow(engine, "test", "TEST", 9)
            instance = workflows.WorkflowInstance(bound, "i")
            await until(lambda: self.rows("SELECT 1 FROM journal WHERE step LIKE '%b%'"))
            await instance.terminate(rollback=True)
            await reach(instance, "terminated", seconds=1)
        self.assertEqual(self.log(), ["cancelled", "undo-b", "undo-a"])

    async def test_sigkill_during_the_search_begins_it_again(self) -> None:
        script = """
            async def run(event, step):
                life = " ".join(words()).count("life")
                note(f"life{life}")
                await step.do("a", value, rollback=lambda info: note("undo-a"))
                if life == 1: die()
                await step.do("b", value, rollback=lambda info: note("undo-b"))
                await step.sleep("nap", "1 hour")
            async def main(w):
                i = await get(w)
                if len(sys.argv) > 2:
                    await until(i, "terminated")
                    return
                await until(i, "waiting")
                await i.terminate(rollback=True)
                die()
            go()
            """
        for arguments, code in (((), -9), (("again",), -9), (("again",), 0)):
            child = self.child(script, *arguments)
            self.assertEqual((await asyncio.to_thread(child.end))[1], code)
        # the first process may have begun the rollback before it died
        self.assertEqual(self.log()[-2:], ["undo-b", "undo-a"])
        self.assertEqual(self.log().count("undo-b"), 1)


class RollbackSearch(Undoing):
    """Another engine on the file finds the handlers by replay."""

    async def search(self, run: Callable[..., Any], before: Any = None) -> Any:
        """Terminates an instance with rollback from a client, while no engine runs it; then an
        engine does. Returns its status."""
        made = workflow(run)
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.settle()
        async with Engine(self.path, clock=self.clock) as client:
            handle = workflows.Workflow(client, "test", "TEST", 9)
            await workflows.WorkflowInstance(handle, "i").terminate(rollback=True)
        self.log.append("again")
        async with self.engine() as engine:
            instance = await engine.bind(made).get("i")
            await self.clock.settle()
            if before is not None:
                await before(instance)
            return (await instance.status()).status

    async def work(self, word: str) -> str:
        self.log.append(word)
        return word

    async def test_no_callback_runs_during_the_search(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", lambda: self.work("a"), rollback=self.undo("a"))
            await step.do("plain", lambda: self.work("plain"))

            async def hang() -> None:
                self.log.append("hang")
                await asyncio.Event().wait()

            await asyncio.gather(
                step.do("hang", hang, rollback=self.undo("hang")),
                step.do("late", hang, rollback=self.undo("late")),
            )

        self.assertEqual(await self.search(run), "terminated")
        done = ["a", "plain", "hang", "hang"]
        self.assertEqual(self.log, [*done, "again", "undo late", "undo hang", "undo a"])

    async def test_a_call_beyond_the_history_stays_pending(self) -> None:
        reached = []

        async def run(event: Any, step: Any) -> None:
            if "again" not in self.log:
                await step.do("a", value, rollback=self.undo("a"))
                await step.do("b", value, rollback=self.undo("b"))
                await step.sleep("nap", "1 hour")
            else:  # other code by now
                await step.do("b", value, rollback=self.undo("b"))
                await step.do("new", lambda: self.work("new"), rollback=self.undo("new"))
                reached.append("beyond")

        async def before(instance: Any) -> None:
            self.assertEqual((await instance.status()).status, "running")
            await self.clock.advance("4.9 seconds")
            self.assertEqual(self.log, ["again"])
            await self.clock.advance("0.2 seconds")

        self.assertEqual(await self.search(run, before), "terminated")
        self.assertEqual((self.log, reached), (["again", "undo b"], []))
        self.assertEqual(self.rows("SELECT rollback FROM instances"), [("failed",)])

    async def test_a_handler_that_is_gone_ends_the_chain_as_failed(self) -> None:
        async def run(event: Any, step: Any) -> None:
            first = "again" not in self.log
            await step.do("a", value, rollback=self.undo("a"))
            await step.do("b", value, **({"rollback": self.undo("b")} if first else {}))
            await step.do("c", value, rollback=self.undo("c"))
            if first:
                await step.sleep("nap", "1 hour")

        self.assertEqual(await self.search(run), "terminated")
        self.assertEqual(self.log, ["again", "undo c"])
        self.assertEqual(self.rows("SELECT rollback FROM instances"), [("failed",)])

    async def test_the_search_ends_when_run_has_ended_or_raised(self) -> None:
        for end in (None, ValueError()):
            self.setUp()

            async def run(event: Any, step: Any, end: Any = end) -> None:
                await step.do("a", value, rollback=self.undo("a"))
                if "again" in self.log:
                    if end is not None:
                        raise end
                    return
                await step.do("b", value, rollback=self.undo("b"))
                await step.sleep("nap", "1 hour")

            self.assertEqual(await self.search(run), "terminated")
            self.assertEqual(self.rows("SELECT rollback FROM instances"), [("failed",)])

    async def test_a_run_that_goes_on_is_not_idle(self) -> None:
        ticks = asyncio.Queue[int]()

        async def run(event: Any, step: Any) -> None:
            for n in range(4):
                await step.do(f"s{n}", value)
                if "again" in self.log:
                    await ticks.get()
            await step.do("a", value, rollback=self.undo("a"))
            await step.sleep("nap", "1 hour")

        async def before(instance: Any) -> None:
            for n in range(4):
                await self.clock.advance("3 seconds")
                ticks.put_nowait(n)
            await self.clock.settle()

        self.assertEqual(await self.search(run, before), "terminated")
        self.assertEqual(self.log, ["again", "undo a"])

    async def test_handlers_are_found_in_parallel_branches_and_across_sleeps(self) -> None:
        async def branch(step: Any, n: int) -> None:
            await step.do(f"a{n}", value, rollback=self.undo(f"a{n}"))
            await step.sleep(f"nap{n}", 0)
            await caught(step.do(f"b{n}", ONCE, raises(KeyError()), rollback=self.undo(f"b{n}")))
            await step.sleep("nap", "1 day")

        async def run(event: Any, step: Any) -> None:
            await asyncio.gather(*(branch(step, n) for n in range(3)))

        self.assertEqual(await self.search(run), "terminated")
        expected = [f"undo {word}{n}" for word in "ba" for n in (2, 1, 0)]
        self.assertEqual(self.log, ["again", *expected])

    async def test_the_context_of_an_attempt_that_a_clean_stop_has_cut_off_counts_from_1(
        self,
    ) -> None:
        seen = []

        async def run(event: Any, step: Any) -> None:
            await step.do(
                "s", asyncio.Event().wait, rollback=lambda info: seen.append(info.ctx.attempt)
            )

        self.assertEqual(await self.search(run), "terminated")
        self.assertEqual(seen, [1])

    async def test_a_clean_stop_in_the_middle_counts_no_attempt_of_the_handler(self) -> None:
        gate, errors = Gate(), []

        async def held(info: Any) -> None:
            self.log.append("begun")
            await gate.open.wait()
            errors.append(str(info.error))

        async def run(event: Any, step: Any) -> None:
            await step.do("a", lambda: self.work("a"), rollback=self.undo("a"))
            await step.do("b", value, rollback=held, rollback_config=ONCE)
            await step.do("c", value, rollback=self.undo("c"))
            raise ValueError("original")

        for _ in range(2):
            async with self.engine() as engine:
                bound = engine.bind(workflow(run))
                await bound.create_batch([{"id": "i"}])
                await self.clock.settle()
        gate.open.set()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).get("i")
            with self.assertRaisesRegex(ValueError, "original"):
                await self.finish(instance)
        self.assertEqual(self.log, ["a", "undo c", *["begun"] * 3, "undo a"])
        self.assertEqual(errors, ["original"])

    async def test_a_clean_stop_during_the_search_begins_it_again(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", value, rollback=self.undo("a"))
            if self.log[-1:] == ["again"]:
                self.log.append("stop")
                await asyncio.Event().wait()
            await step.do("b", value, rollback=self.undo("b"))
            await step.sleep("nap", "1 hour")

        self.assertIn(await self.search(run), ("running", "queued"))
        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).get("i")
            await self.clock.settle()
            self.assertEqual((await instance.status()).status, "terminated")
        self.assertEqual(self.log, ["again", "stop", "undo b", "undo a"])

    async def test_a_second_terminate_ends_the_search_at_once(self) -> None:
        async def run(event: Any, step: Any) -> None:
            if "again" in self.log:
                await asyncio.Event().wait()
            await step.do("a", value, rollback=self.undo("a"))
            await step.sleep("nap", "1 hour")

        async def before(instance: Any) -> None:
            self.assertEqual((await instance.status()).status, "running")
            await instance.terminate()

        self.assertEqual(await self.search(run, before), "terminated")
        self.assertEqual(self.log, ["again"])

    async def test_handlers_of_a_step_in_its_retry_delay_take_part(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("s", raises(ValueError()), rollback=self.undo("s"))

        self.assertEqual(await self.search(run), "terminated")
        self.assertEqual(self.log, ["again", "undo s"])


class RestartFrom(Undoing):
    async def work(self, word: str) -> str:
        self.log.append(word)
        return word

    async def abc(self, event: Any, step: Any) -> list[str]:
        return [await step.do(name, lambda name=name: self.work(name)) for name in "abc"]

    async def test_what_started_before_the_step_is_kept_and_the_rest_runs_again(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(self.abc)).create()
            await self.finish(instance)
            await instance.restart({"from": {"name": "b"}})
            self.assertEqual(await self.finish(instance), ["a", "b", "c"])
        self.assertEqual(self.log, ["a", "b", "c", "b", "c"])

    async def test_what_was_cancelled_behind_the_step_begins_anew(self) -> None:
        async def race(event: Any, step: Any) -> int:
            approval = asyncio.create_task(step.wait_for_event("approval", "approval"))
            await asyncio.sleep(0)
            work = await step.do("work", returns(1))
            approval.cancel()
            return await step.do("final", returns(work + 1))

        broken = [True]

        async def group(event: Any, step: Any) -> list[str]:
            async def pay() -> str:
                if broken:
                    raise ValueError("no money")
                return "paid"

            async with asyncio.TaskGroup() as tasks:
                slow = tasks.create_task(step.do("slow", lambda: asyncio.sleep(0.01, "slow")))
                paid = tasks.create_task(step.do("pay", ONCE, pay))
            return [slow.result(), paid.result()]

        async with self.engine() as engine:
            racing = await engine.bind(workflow(race, "Race")).create()
            self.assertEqual(await self.finish(racing), 2)
            await racing.restart({"from": {"name": "work"}})
            self.assertEqual(await self.finish(racing), 2)
            grouped = await engine.bind(workflow(group, "Group")).create()
            await caught(self.finish(grouped))
            broken.clear()
            await grouped.restart({"from": {"name": "pay"}})
            await until(lambda: self.ended(grouped))
            self.assertEqual(await grouped.result(), ["slow", "paid"])

    async def ended(self, instance: Any) -> bool:
        await self.clock.settle()
        return (await instance.status()).status in workflows.FINISHED

    async def test_an_event_that_went_back_to_the_buffer_counts_once(self) -> None:
        async def run(event: Any, step: Any) -> None:
            lost = asyncio.create_task(step.wait_for_event("w", "t"))
            await step.sleep("s", "1 hour")
            lost.cancel()
            post_event(engine, '"xx"')
            await asyncio.wait([lost])
            await step.do("last", returns(None))
            await step.wait_for_event("never", "never")

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create(id="i", params=[])
            await self.clock.advance("1 hour")
            self.assertEqual((await engine.usage()).storage_bytes, 2 + 4 + 4)
            await instance.restart({"from": {"name": "last"}})
            await self.clock.settle()
            self.assertEqual((await engine.usage()).storage_bytes, 2 + 4 + 4 + 4)

    async def test_the_count_says_which_of_the_steps_of_that_name(self) -> None:
        async def run(event: Any, step: Any) -> None:
            for n in range(3):
                await step.do("s", lambda n=n: self.work(str(n)))

        for options, again in (
            ({"count": 2}, "12"),
            ({}, "012"),
            ({"count": 3, "type": "do"}, "2"),
        ):
            self.setUp()
            async with self.engine() as engine:
                instance = await engine.bind(workflow(run)).create()
                await self.finish(instance)
                await instance.restart({"from": {"name": "s"} | options})
                await self.finish(instance)
            self.assertEqual("".join(self.log), "012" + again)

    async def test_the_type_says_which_of_the_kinds_of_that_name(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            await step.do("s", lambda: self.work("a"))
            await step.sleep("s", "1 hour")
            await step.do("after sleep", lambda: self.work("b"))
            got = (await step.wait_for_event("s", "t")).payload
            await step.do("after event", lambda: self.work("c"))
            return got

        for type, again in (("do", "abc"), ("sleep", "bc"), ("waitForEvent", "c"), (None, "abc")):
            self.setUp()
            async with self.engine() as engine:
                instance = await engine.bind(workflow(run)).create()
                for n in range(3):
                    await instance.send_event(type="t", payload=n)
                self.assertEqual(await self.finish(instance), 0)
                more = {} if type is None else {"type": type}
                await instance.restart({"from": {"name": "s", **more}})
                self.assertEqual(await self.finish(instance), 1)  # buffered events stay
                await instance.restart(**{"from": {"name": "s", "type": "waitForEvent"}})
                self.assertEqual(await self.finish(instance), 2)
            self.assertEqual("".join(self.log), "abc" + again + "c")

    async def test_in_parallel_what_started_before_is_kept_even_if_it_ended_later(self) -> None:
        gates = {name: asyncio.Event() for name in "abc"}

        async def held(name: str) -> str:
            self.log.append(name)
            await gates[name].wait()
            return f"{name}{len(self.log)}"

        async def run(event: Any, step: Any) -> Any:
            return await asyncio.gather(*(step.do(n, functools.partial(held, n)) for n in "abc"))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            for name in "cba":
                await self.clock.settle()
                gates[name].set()
            self.assertEqual(await self.finish(instance), ["a3", "b3", "c3"])
            await instance.restart({"from": {"name": "b"}})
            self.assertEqual(await self.finish(instance), ["a3", "b4", "c5"])
        self.assertEqual(self.log, ["a", "b", "c", "b", "c"])

    async def test_a_kept_step_that_was_in_flight_runs_again_with_the_same_attempt(self) -> None:
        gate = Gate()

        async def held(ctx: Any) -> None:
            self.log.append(f"held {ctx.attempt}")
            await gate.open.wait()

        async def run(event: Any, step: Any) -> Any:
            await asyncio.gather(step.do("held", ONCE, held), step.do("x", lambda: self.work("x")))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await instance.restart({"from": {"name": "x"}})
            await self.clock.settle()
            gate.open.set()
            await self.finish(instance)
        self.assertEqual(self.log, ["held 1", "x", "held 1", "x"])

    async def sleeps_on(self, *calls: str, **options: Any) -> float:
        """Hours until a parallel sleep of two hours is over, when after one hour an instance in
        which something fails 30 minutes after the start is restarted from there."""
        fail = options.pop("fail", False)

        async def x() -> None:
            self.log.append("x")
            if fail and len(self.log) == 1:
                raise NonRetryableError

        async def failing(step: Any) -> None:
            await step.sleep("half", "30 minutes")
            await step.do("x", x, **options)

        async def run(event: Any, step: Any) -> None:
            await asyncio.gather(step.sleep("nap", "2 hours"), failing(step))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            began = self.clock.now()
            await self.clock.advance("1 hour")
            for call in calls:
                await getattr(instance, call)()
            await instance.restart({"from": {"name": "x"}})
            while (await instance.status()).status not in workflows.FINISHED:
                await self.clock.advance("10 minutes")
                self.assertLess(self.clock.now() - began, 9e7, "it never ends")
            self.assertEqual((await instance.status()).status, "complete")
            self.assertEqual(self.log, ["x", "x"])
            return (self.clock.now() - began) / 3_600_000

    async def test_a_kept_sleep_goes_on_with_its_time(self) -> None:
        self.assertEqual(await self.sleeps_on(), 2)

    async def test_a_kept_sleep_goes_on_with_its_time_after_terminate_or_an_error(self) -> None:
        self.assertEqual(await self.sleeps_on("terminate"), 2)
        self.setUp()
        self.assertEqual(await self.sleeps_on(fail=True), 2)
        self.setUp()
        self.assertEqual(await self.sleeps_on("pause"), 2)

    async def test_a_kept_sleep_goes_on_with_its_time_after_a_rollback(self) -> None:
        self.assertEqual(await self.sleeps_on(fail=True, rollback=self.undone), 2)

    async def test_a_kept_sleep_has_the_time_that_a_pause_left_it(self) -> None:
        async def run(event: Any, step: Any) -> None:
            nap = asyncio.ensure_future(step.sleep("nap", "2 hours"))
            await step.sleep("half", "30 minutes")
            await step.do("x", lambda: self.work("x"), rollback=self.undone)
            await nap

        for rolled_back in (False, True):
            self.setUp()
            async with self.engine() as engine:
                instance = await engine.bind(workflow(run)).create()
                await self.clock.advance("1 hour")
                await instance.pause()
                await self.clock.advance("1 day")
                if rolled_back:
                    await instance.terminate(rollback=True)
                    await self.clock.settle()
                await instance.restart({"from": {"name": "x"}})
                for minutes, status in ((50, "waiting"), (20, "complete")):
                    await self.clock.advance(minutes * 60_000)
                    self.assertEqual((await instance.status()).status, status)

    async def test_a_kept_retry_delay_goes_on_with_its_time(self) -> None:
        times = []

        async def fail() -> None:
            times.append(self.clock.now())
            raise ValueError

        async def run(event: Any, step: Any) -> None:
            delay = {"retries": {"limit": 1, "delay": "1 hour"}}
            await asyncio.gather(
                step.do("fails", delay, fail), step.do("x", lambda: self.work("x"))
            )

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.advance("20 minutes")
            await instance.restart({"from": {"name": "x"}})
            with self.assertRaises(ValueError):
                await self.finish(instance)
        self.assertEqual((times[1] - times[0], self.log), (3_600_000, ["x", "x"]))

    async def undone(self, info: Any) -> None:
        pass

    async def test_a_kept_event_wait_goes_on_after_a_rollback(self) -> None:
        async def fail() -> None:
            self.log.append("x")
            if len(self.log) == 1:
                raise NonRetryableError

        async def run(event: Any, step: Any) -> Any:
            waiting = asyncio.create_task(step.wait_for_event("w", "t", timeout="1 hour"))
            await step.do("other", value)
            await step.do("x", fail, rollback=self.undone)
            return (await waiting).payload

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            with self.assertRaises(NonRetryableError):
                await self.finish(instance)
            await instance.restart({"from": {"name": "x"}})
            await instance.send_event(type="t", payload=5)
            await self.clock.settle()
            status = await instance.status()
            self.assertEqual((status.status, status.output), ("complete", 5))

    async def test_it_works_from_every_state(self) -> None:
        gate = Gate()

        async def run(event: Any, step: Any) -> str:
            await step.do("a", lambda: self.work("a"))
            await step.do("b", lambda: self.work("b"))
            if event.payload == "sleep" and self.log.count("b") == 1:
                await step.sleep("nap", "1 hour")
            if event.payload == "gate" and self.log.count("b") == 1:
                await step.do("gate", gate.open.wait)
            if event.payload == "fail" and self.log.count("b") == 1:
                raise ValueError
            return "done"

        for params, calls, status in (
            ("sleep", [], "waiting"),
            ("sleep", ["pause"], "paused"),
            ("sleep", ["terminate"], "terminated"),
            ("gate", [], "running"),
            ("gate", ["pause"], "waitingForPause"),
            ("fail", [], "errored"),
            ("", [], "complete"),
        ):
            self.setUp()
            async with self.engine() as engine:
                instance = await engine.bind(workflow(run)).create(params=params)
                await self.clock.settle()
                for call in calls:
                    await getattr(instance, call)()
                self.assertEqual((await instance.status()).status, status)
                await instance.restart({"from": {"name": "b", "type": "do", "count": 1}})
                await self.clock.settle()
                self.assertEqual((await instance.status()).output, "done")
            self.assertEqual(self.log, ["a", "b", "b"])

    async def test_a_step_that_is_not_in_the_history_cannot_be_restarted_from(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(self.abc)).create()
            await self.finish(instance)
            for start in (
                {"name": "x"},
                {"name": "a", "count": 2},
                {"name": "a", "type": "sleep"},
                {"name": "a", "type": "waitForEvent"},
                {"name": ""},
            ):
                await self.assertCode("instance.cannot_restart", instance.restart({"from": start}))
            self.assertEqual((await instance.status()).output, ["a", "b", "c"])

    async def test_bad_input_is_refused(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(self.abc)).create()
            for options in (
                {"form": {"name": "a"}},
                {"from": "a"},
                {"from": {}},
                {"from": {"name": 1}},
                {"from": {"name": "a", "index": 1}},
                {"from": {"name": "a", "count": 0}},
                {"from": {"name": "a", "count": True}},
                {"from": {"name": "a", "count": 1.0}},
                {"from": {"name": "a", "type": "event"}},
                {"from": {"name": "a", "type": ["do"]}},
            ):
                with self.subTest(options), self.assertRaises((TypeError, ValueError)):
                    await instance.restart(options)

    async def test_a_restart_from_a_step_erases_the_rollback_before(self) -> None:
        async def run(event: Any, step: Any) -> str:
            await step.do("a", lambda: self.work("a"), rollback=self.undo("a"))
            await step.do("b", lambda: self.work("b"), rollback=self.undo("b"))
            if self.log.count("b") < 3:
                raise ValueError
            return "done"

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            for _ in range(2):
                with self.assertRaises(ValueError):
                    await self.finish(instance)
                await instance.restart({"from": {"name": "b"}})
            self.assertEqual(await self.finish(instance), "done")
        undone = ["undo b", "undo a"]
        self.assertEqual(self.log, ["a", "b", *undone, "b", *undone, "b"])

    async def test_a_nested_step_belongs_to_its_outer_step(self) -> None:
        async def run(event: Any, step: Any) -> None:
            async def outer() -> None:
                await step.do("inner", lambda: self.work("inner"))
                self.log.append("outer")

            await step.do("outer", outer)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.finish(instance)
            await instance.restart({"from": {"name": "outer"}})
            await self.finish(instance)
        self.assertEqual(self.log, ["inner", "outer"] * 2)

    async def test_a_catching_run_takes_the_kept_results_in_their_order(self) -> None:
        gates = {name: asyncio.Event() for name in "ab"}

        async def run(event: Any, step: Any) -> Any:
            tasks = {n: asyncio.create_task(step.do(n, gates[n].wait)) for n in "ab"}
            done, _ = await asyncio.wait(tasks.values(), return_when="FIRST_COMPLETED")
            await step.do("c", lambda: self.work("c"))
            await asyncio.wait(tasks.values())
            return [name for name, task in tasks.items() if task in done]

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            for name in "ba":
                await self.clock.settle()
                gates[name].set()
            self.assertEqual(await self.finish(instance), ["b"])
            await instance.restart({"from": {"name": "c"}})
            self.assertEqual(await self.finish(instance), ["b"])
        self.assertEqual(self.log, ["c", "c"])


class RestartFromForReal(Real):
    def test_what_a_restart_kept_and_dropped_survives_sigkill(self) -> None:
        script = """
            async def run(event, step):
                for name in "abc":
                    async def work(ctx, name=name): note(f"{name}{ctx.attempt}")
                    await step.do(name, work)
                return "done"
            async def main(w):
                i = await get(w)
                await i.result()
                if len(sys.argv) == 2:
                    await i.restart({"from": {"name": "b"}})
                    die()
            go()
            """
        self.child(script).end()
        self.assertEqual(self.child(script, "again").end()[1], 0)
        self.assertLessEqual(len(self.log()), 6)  # the first may have begun before it died
        self.assertEqual(self.log()[:3] + self.log()[-2:], ["a1", "b1", "c1", "b1", "c1"])

    async def test_a_client_can_restart_from_a_step(self) -> None:
        ran = []

        async def run(event: Any, step: Any) -> None:
            for name in "ab":
                await step.do(name, lambda name=name: value(ran.append(name)))
            await step.wait_for_event("w", "t")

        async with self.engine() as owner, self.engine() as client:
            await owner.bind(workflow(run)).create(id="i")
            instance = await client.bind(workflow(run)).get("i")
            await reach(instance, "waiting")
            await instance.restart({"from": {"name": "b"}})
            await until(lambda: ran == ["a", "b", "b"])
            await instance.send_event(type="t")
            await instance.result("2 seconds")


class DeletingBatches(Case):
    async def test_it_answers_what_was_deleted_and_what_was_not(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_sleep))
            await bound.create_batch([{"id": id} for id in "abc"])
            await self.clock.settle()
            answer = await bound.delete_batch(["b", "x", "a", "b", "x"])
            self.assertEqual(answer["deleted"], [{"id": "b"}, {"id": "a"}, {"id": "b"}])
            message = "workflows.api.error.instance.not_found"
            error = {"id": "x", "code": 10400, "message": message}
            self.assertEqual(answer["errors"], [error, error])
            self.assertEqual((await (await bound.get("c")).status()).status, "waiting")
            for id in "ab":
                await self.assertCode("instance.not_found", bound.get(id))
            await bound.create(id="a")

    async def test_an_illegal_id_an_empty_list_and_too_many_refuse_the_whole_call(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_sleep))
            instance = await bound.create(id="a")
            for ids, code in (
                (["a", "no good"], "instance.invalid_id"),
                (["a", 5], "instance.invalid_id"),
                ([], "limit.batch_size"),
                (["a"] * 101, "limit.batch_size"),
            ):
                await self.assertCode(code, bound.delete_batch(ids))
            for ids in ("a", None, {"id": "a"}, 5):
                with self.assertRaises(TypeError):
                    await bound.deleteBatch(ids)
            await instance.status()
            self.assertEqual(len((await bound.delete_batch(["a"] * 100))["deleted"]), 100)

    async def test_it_stops_what_runs_and_touches_no_other_workflow(self) -> None:
        gate = Gate()
        async with self.engine() as engine:
            bound = engine.bind(workflow(gate.run))
            other = await engine.bind(workflow(one_sleep, "Other")).create(id="i")
            await bound.create(id="i")
            await self.clock.settle()
            await bound.delete_batch(iter(["i"]))
            await self.clock.settle()
            self.assertEqual(gate.cancelled, 1)
            self.assertEqual((await other.status()).status, "waiting")


class DynamicDelay(Undoing):
    async def delays(self, delay: Any, limit: int = 3, **more: Any) -> list[float]:
        """The waits between the attempts of a step that always fails."""
        times: list[float] = []

        async def callback() -> None:
            times.append(self.clock.now())
            raise KeyError(len(times))

        async def run(event: Any, step: Any) -> None:
            config = {"retries": {"limit": limit, "delay": delay, **more}}
            await caught(step.do("s", config, callback))

        await self.outcome(run)
        return [round(b - a) for a, b in zip(times, times[1:], strict=False)]

    async def test_the_function_says_the_delay_in_any_form_sync_or_async(self) -> None:
        for answer, ms in (("2 minutes", 120_000), (1500, 1500), (timedelta(hours=1), 3_600_000)):
            for function in (lambda info, a=answer: a, lambda info, a=answer: value(a)):
                self.setUp()
                self.assertEqual(await self.delays(function, 2, backoff="constant"), [ms, ms])

            async def function(info: Any, answer: Any = answer) -> Any:
                await asyncio.sleep(0)
                return answer

            self.setUp()
            self.assertEqual(await self.delays(function, 1), [ms])

    async def test_if_it_fails_the_log_says_after_which_error(self) -> None:
        with self.assertLogs("workflows", logging.WARNING) as logs:
            await self.delays(lambda: 1)
        self.assertRegex(
            logs.output[0], "the delay function of step 's' failed: TypeError.*after KeyError"
        )

    async def test_backoff_applies_to_what_it_returns(self) -> None:
        for backoff, factors in (("constant", (1, 1, 1)), ("linear", (1, 2, 3))):
            self.setUp()
            delays = await self.delays(lambda info: 1000 * info.ctx.attempt, 3, backoff=backoff)
            self.assertEqual(delays, [1000 * n * f for n, f in enumerate(factors, 1)])
        self.setUp()
        self.assertEqual(await self.delays(lambda info: 1000), [1000, 2000, 4000])

    async def test_it_gets_the_context_and_the_error_and_is_not_asked_after_the_last_attempt(
        self,
    ) -> None:
        seen = []

        def delay(info: Any) -> int:
            self.assertEqual(info["ctx"]["attempt"], info.ctx.attempt)
            seen.append((info.ctx.step.name, info.ctx.attempt, repr(info.error)))
            self.assertNotIn("delay", info.ctx.config["retries"])
            return 1

        await self.delays(delay, 2)
        self.assertEqual(seen, [("s", 1, "KeyError(1)"), ("s", 2, "KeyError(2)")])

    async def test_its_failure_is_that_of_the_step(self) -> None:
        def raising(info: Any) -> int:
            raise OSError("no idea")

        async def run(event: Any, step: Any) -> None:
            config = {"retries": {"delay": delays[0]}}
            await step.do("s", config, lambda: self.log.append("ran") or 1 / 0)

        for delay, why in (
            (raising, "OSError.*no idea"),
            (lambda info: "soon", "soon"),
            (lambda info: None, "None"),
            (lambda info: -1, "-1"),
            (lambda: 1, "argument"),
        ):
            self.setUp()
            delays = [delay]
            error = await self.fails(run)
            self.assertIs(type(error), WorkflowFatalError)
            self.assertEqual(error.name, "NonRetryableDelayError")
            self.assertRegex(str(error), why)
            self.assertEqual(self.log, ["ran"])

    async def test_it_has_five_seconds_to_answer(self) -> None:
        async def slow(info: Any) -> int:
            await self.sleep_by_the_clock(times.pop())
            return 1000

        async def run(event: Any, step: Any) -> None:
            await step.do("s", {"retries": {"limit": 1, "delay": slow}}, raises(KeyError()))

        times = [5100, 4900]
        self.assertIsInstance(await self.fails(run), KeyError)
        self.setUp()
        self.clock = ManualClock(patience=0)
        error = await self.fails(run)
        self.assertEqual(error.name, "NonRetryableDelayError")
        self.assertIn("timed out after 5000", str(error))

    async def test_its_step_calls_are_those_of_the_attempt(self) -> None:
        self.clock = ManualClock(patience=0)

        async def run(event: Any, step: Any) -> str:
            async def delay(info: Any) -> int:
                return await step.do("inner", returns(1000))

            async def callback(ctx: Any) -> None:
                await asyncio.sleep(3600 if ctx.attempt == 1 else 0)
                raise ValueError

            config = {"timeout": 1000, "retries": {"limit": 2, "delay": delay}}
            await caught(step.do("s", config, callback))
            return await step.do("inner", returns("outside"))

        self.assertEqual(await self.outcome(run), "outside")
        steps = self.rows("SELECT DISTINCT step FROM journal WHERE step LIKE '%inner%' ORDER BY 1")
        self.assertEqual(steps, [("do\ninner\n1",), ("do\ns\n1\ndo\ninner\n1",)])

    async def sleep_by_the_clock(self, ms: int) -> None:
        over = asyncio.Event()
        self.clock.call_later(ms, over.set)
        await over.wait()

    async def test_it_is_not_called_again_for_a_wait_that_is_recorded(self) -> None:
        async def run(event: Any, step: Any) -> str:
            def delay(info: Any) -> str:
                self.log.append(f"asked {info.ctx.attempt}")
                return "1 hour"

            async def callback(ctx: Any) -> str:
                self.log.append(f"attempt {ctx.attempt}")
                if ctx.attempt < 3:
                    raise ValueError
                return "done"

            config = {"retries": {"delay": delay, "backoff": "constant"}}
            return await step.do("s", config, callback)

        made = workflow(run)
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.advance("10 minutes")
        for minutes in (10, 30, 20):
            async with self.engine() as engine:
                engine.bind(made)
                await self.clock.advance(f"{minutes} minutes")
        async with self.engine() as engine:
            self.assertEqual(await self.finish(await engine.bind(made).get("i")), "done")
        self.assertEqual(self.log, ["attempt 1", "asked 1", "attempt 2", "asked 2", "attempt 3"])

    async def test_it_is_that_of_the_present_call(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("s", config, lambda: 1 / 0)

        for changed, outcome in (
            ({"retries": {"delay": "1 minute"}}, ("ZeroDivisionError", 120_000)),
            ({"retries": {"delay": lambda info: "2 minutes"}}, ("ZeroDivisionError", 240_000)),
            (None, ("NonRetryableDelayError", 0)),
            (5, ("WorkflowFatalError", 0)),
        ):
            self.setUp()
            made = workflow(run)
            config: Any = {"retries": {"limit": 2, "delay": lambda info: "1 hour"}}
            async with self.engine() as engine:
                await engine.bind(made).create(id="i")
                await self.clock.advance("1 minute")
            config = changed
            async with self.engine() as engine:
                instance = await engine.bind(made).get("i")
                await self.clock.advance("59 minutes")
                began = self.clock.now()
                while (status := await instance.status()).error is None:
                    await self.clock.advance("1 minute")
            with self.subTest(changed):
                taken = self.clock.now() - began
                self.assertEqual((status.error["name"], taken), outcome)

    async def test_the_contexts_config_has_no_delay_in_every_life(self) -> None:
        async def run(event: Any, step: Any) -> None:
            async def callback(ctx: Any) -> None:
                self.log.append(str(ctx.config["retries"]))
                raise ValueError

            config = {"retries": {"limit": 1, "delay": lambda info: "1 hour"}}
            await step.do("s", config, callback)

        await self.fails(run)
        self.assertEqual(self.log, [str({"limit": 1, "backoff": "exponential"})] * 2)

    async def test_a_rollback_config_may_have_one_too(self) -> None:
        times = []

        async def undo(info: Any) -> None:
            times.append(self.clock.now())
            raise ValueError

        async def run(event: Any, step: Any) -> None:
            config = {"retries": {"limit": 1, "delay": lambda info: "1 minute"}}
            await step.do("s", value, rollback=undo, rollback_config=config)
            raise OSError

        await self.fails(run)
        self.assertEqual(times[1] - times[0], 60_000)


class Sensitive(Undoing):
    async def test_the_history_hides_the_output_and_the_workflow_gets_it(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            config = {"sensitive": "output"}
            secret = await step.do("hidden", config, lambda: "secret")
            await step.do("open", lambda: "shown")
            await step.sleep("nap", "1 hour")
            return secret == "secret"

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            self.assertTrue(await self.finish(instance))
            outputs = [e.output async for e in instance.subscribe(filter=["step_completed"])]
        self.assertEqual(outputs, ["[REDACTED]", "shown"])

    async def test_it_is_hidden_with_a_recorded_start_retries_and_a_cursor_too(self) -> None:
        async def callback(ctx: Any) -> str:
            await asyncio.sleep(0)
            if ctx.attempt == 1:
                raise ValueError
            return "secret"

        async def run(event: Any, step: Any) -> None:
            config = constant(1, sensitive="output")
            await step.do("s", config, callback, rollback=lambda info: self.log.append(info.output))
            raise ValueError

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            with self.assertRaises(ValueError):
                await self.finish(instance)
            events = [event async for event in instance.subscribe()]
            for event in events:
                rest = [e async for e in instance.subscribe(cursor=event.event_id)]
                self.assertNotIn("secret", repr(rest))
        self.assertEqual(self.log, ["secret"])

    async def test_any_other_value_is_refused(self) -> None:
        for wrong in ("input", True, None):
            self.setUp()

            async def run(event: Any, step: Any, wrong: Any = wrong) -> None:
                await step.do("s", {"sensitive": wrong}, value)

            error = await self.fails(run)
            self.assertEqual(error.code, "step.invalid_config")
            self.assertIn("sensitive", str(error))


QUEUED = "workflow_queued | workflow_started | workflow_running"
COMPLETED = "attempt_completed {0} {1} | step_completed {0}"
ONE_STEP = "step_started {0} | attempt_started {0} 1 | " + COMPLETED.format("{0}", 1)
NAP = "sleep_started nap-1 | workflow_waiting"
WOKEN = "sleep_completed nap-1 | workflow_running"


class Subscribing(Undoing):
    async def tells(
        self, run: Callable[..., Any], *expected: str, act: Any = None, **options: Any
    ) -> list[Any]:
        """A subscription tells exactly this: live, afterwards, from every cursor, by any filter."""
        words = " | ".join(expected).split(" | ")
        async with self.engine(**options) as engine:
            instance = await engine.bind(workflow(run)).create(id="i", params={"n": 1})
            live = asyncio.create_task(self.told(instance))
            self.current = engine
            await self.clock.settle()
            if act is not None:
                await act(instance)
            with contextlib.suppress(Exception):
                await self.finish(instance)
            events = [event async for event in instance.subscribe()]
            self.assertEqual([*map(brief, events)], words)
            self.assertEqual(await live, words)
            ids = [event.event_id for event in events]
            self.assertEqual(ids, sorted(set(ids)))
            for n, cursor in enumerate(ids, 1):
                self.assertEqual(await self.told(instance, cursor=cursor), words[n:])
            for type in {event.type for event in events}:
                wanted = [word for word in words if word.split()[0] == type]
                self.assertEqual(await self.told(instance, filter=[type]), wanted)
            self.assertEqual(engine.watchers.topics(), [])
        return events

    async def test_a_step(self) -> None:
        await self.tells(one_step, QUEUED, ONE_STEP.format("step-1"), "workflow_completed")

    async def test_a_run_without_steps(self) -> None:
        await self.tells(lambda event, step: value(1), QUEUED, "workflow_completed")

    async def test_retries(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("s", constant(2), lambda ctx: 1 / (ctx.attempt - 1))

        idle = "workflow_waiting | workflow_running"
        failed = "attempt_started s-1 1 | attempt_errored s-1 1"
        second = "attempt_started s-1 2 | " + COMPLETED.format("s-1", 2)
        events = await self.tells(
            run, QUEUED, "step_started s-1", failed, idle, second, "workflow_completed"
        )
        self.assertEqual(events[5].retry_delay_ms, 1)
        self.assertEqual(events[5].error["name"], "ZeroDivisionError")

    async def test_an_error(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("s", ONCE, raises(KeyError("k")))

        failed = "step_started s-1 | attempt_started s-1 1 | attempt_errored s-1 1"
        events = await self.tells(run, QUEUED, failed, "step_errored s-1", "workflow_errored")
        error = {"name": "KeyError", "message": "'k'"}
        self.assertEqual([event.error for event in events[-3:]], [error] * 3)
        self.assertNotIn("retryDelayMs", events[-3], "no other attempt follows")

    async def test_a_sleep_also_when_it_hibernates(self) -> None:
        events = await self.tells(one_sleep, QUEUED, NAP, WOKEN, "workflow_completed")
        self.assertEqual(events[3].duration_ms, 3_600_000)

    async def test_an_event(self) -> None:
        async def send(instance: Any) -> None:
            await instance.send_event(type="t", payload=5)

        waits = "wait_started w-1 | workflow_waiting"
        over = "wait_completed w-1 | workflow_running"
        events = await self.tells(one_event, QUEUED, waits, over, "workflow_completed", act=send)
        self.assertEqual((events[3].event_type, events[-1].output), ("t", 5))

    async def test_an_event_that_was_buffered(self) -> None:
        async def run(event: Any, step: Any) -> None:
            async def send() -> None:
                instance = await self.current.env.TEST.get("i")
                await instance.send_event(type="t")

            await step.do("send", send)
            await step.wait_for_event("w", "t")

        waits = "wait_started w-1 | wait_completed w-1"
        await self.tells(run, QUEUED, ONE_STEP.format("send-1"), waits, "workflow_completed")

    async def test_a_timeout(self) -> None:
        waits = "wait_started w-1 | workflow_waiting"
        over = "wait_timed_out w-1 | workflow_running"
        await self.tells(one_event, QUEUED, waits, over, "workflow_errored")

    async def test_a_pause_of_a_callback(self) -> None:
        gate = Gate()

        async def act(instance: Any) -> None:
            await instance.pause()
            gate.open.set()
            await self.clock.settle()
            await instance.resume()

        await self.tells(
            gate.run,
            QUEUED,
            "step_started gate-1 | attempt_started gate-1 1 | workflow_waiting_for_pause",
            COMPLETED.format("gate-1", 1),
            "workflow_paused | workflow_queued | workflow_running | workflow_completed",
            act=act,
        )

    async def test_a_pause_of_a_sleep(self) -> None:
        async def act(instance: Any) -> None:
            await instance.pause()
            await instance.resume()

        pause = "workflow_paused | workflow_waiting"
        await self.tells(one_sleep, QUEUED, NAP, pause, WOKEN, "workflow_completed", act=act)

    async def test_a_termination(self) -> None:
        async def act(instance: Any) -> None:
            await instance.terminate()

        await self.tells(one_sleep, QUEUED, NAP, "workflow_terminated", act=act)

    async def test_a_termination_before_the_start(self) -> None:
        async def act(instance: Any) -> None:
            await instance.terminate()

        limits = dataclasses.replace(FOREVER, running=0)
        ended = "workflow_queued | workflow_terminated"
        await self.tells(one_sleep, ended, act=act, limits=limits)

    async def test_a_rollback(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", value, rollback=self.undo("a"))
            await step.do("b", ONCE, raises(ValueError("v")), rollback=self.undo("b"))

        failed = "step_started b-1 | attempt_started b-1 1 | attempt_errored b-1 1"
        undone = [
            f"rollback_step_started {n} | rollback_attempt_started {n} 1 |"
            f" rollback_attempt_completed {n} 1 | rollback_step_completed {n}"
            for n in ("b-1", "a-1")
        ]
        events = await self.tells(
            run,
            *(QUEUED, ONE_STEP.format("a-1"), failed, "step_errored b-1"),
            *("rollback_started", *undone, "rollback_completed", "workflow_errored"),
        )
        self.assertEqual(events[-1].error, {"name": "ValueError", "message": "v"})

    async def test_a_rollback_that_fails(self) -> None:
        async def run(event: Any, step: Any) -> None:
            undo = self.undo("a", ValueError("no"))
            await step.do("a", value, rollback=undo, rollback_config=constant(1))
            raise OSError("original")

        attempts = [
            f"rollback_attempt_started a-1 {n} | rollback_attempt_errored a-1 {n}" for n in (1, 2)
        ]
        events = await self.tells(
            run,
            *(QUEUED, ONE_STEP.format("a-1"), "rollback_started | rollback_step_started a-1"),
            *(*attempts, "rollback_step_errored a-1 | rollback_errored | workflow_errored"),
        )
        errors = [event.error["message"] for event in events[-3:]]
        self.assertEqual(errors, ["no", "no", "original"])

    async def test_a_termination_with_rollback(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", value, rollback=self.undo("a"))
            await step.sleep("nap", "1 hour")

        async def act(instance: Any) -> None:
            await instance.terminate(rollback=True)

        await self.tells(
            run,
            *(QUEUED, ONE_STEP.format("a-1"), NAP, "rollback_started | workflow_running"),
            "rollback_step_started a-1 | rollback_attempt_started a-1 1",
            "rollback_attempt_completed a-1 1 | rollback_step_completed a-1",
            "rollback_completed | workflow_terminated",
            act=act,
        )

    async def test_a_restart_from_a_step(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", value)
            await step.sleep("nap", "1 hour")
            await step.do("b", value)
            await step.wait_for_event("w", "t")

        waits = "wait_started w-1 | workflow_waiting"
        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create(id="i")
            live = asyncio.create_task(self.told(instance))
            await self.clock.advance("1 hour")
            await instance.restart({"from": {"name": "b"}})
            await self.clock.settle()
            await instance.send_event(type="t")
            await self.finish(instance)
            again = ["workflow_queued", "workflow_running"]
            again += ONE_STEP.format("b-1").split(" | ") + waits.split(" | ")
            again += ["wait_completed w-1", "workflow_running", "workflow_completed"]
            history = await self.told(instance)
            self.assertEqual(history[-len(again) :], again)
            self.assertEqual((await live)[-len(again) :], again)

    async def test_a_live_subscription_and_its_history_agree_on_the_ids_after_a_restart(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", value)
            await step.wait_for_event("w", "t")

        for params in ({}, 5, None):
            for start in (None, {"name": "a"}):
                self.setUp()
                with self.subTest(params=params, start=start):
                    async with self.engine() as engine:
                        instance = await engine.bind(workflow(run)).create(params=params)
                        live = asyncio.create_task(self.ids(instance))
                        await self.clock.settle()
                        await instance.restart({"from": start})
                        await self.clock.settle()
                        await instance.send_event(type="t")
                        await self.finish(instance)
                        history = await self.ids(instance)
                        again = max(n for n, e in enumerate(history) if e[1] == "workflow_queued")
                        self.assertEqual((await live)[again - len(history) :], history[again:])

    async def ids(self, instance: Any) -> list[Any]:
        return [(event.event_id, brief(event)) async for event in instance.subscribe()]

    async def test_a_subscription_goes_on_through_a_restart(self) -> None:
        gate = Gate()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(gate.run)).create(id="i")
            live = asyncio.create_task(self.ids(instance))
            await self.clock.settle()
            await instance.restart()
            gate.open.set()
            await self.finish(instance)
            ids, told = zip(*await live, strict=True)
            self.assertEqual(told.count("workflow_started"), 2)
            self.assertEqual(list(ids), sorted(set(ids)))

    async def test_events_have_their_fields_as_attributes_and_as_a_mapping(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_step)).create(id="i", params="p")
            await self.finish(instance)
            async for event in instance.subscribe():
                self.assertIn(event["type"], workflows.EVENT_TYPES)
                self.assertEqual((event.instance_id, type(event.event_id)), ("i", int))
                self.assertEqual(event.timestamp, self.moment())
                if event.type.startswith("attempt"):
                    self.assertEqual((event.attempt, event["step_name"]), (1, "step-1"))
                if event.type in ("step_completed", "workflow_completed"):
                    self.assertEqual(event.output, "p")
            json.dumps({key: str(item) for key, item in event.items()})

    def moment(self) -> datetime:
        return datetime.fromtimestamp(self.clock.now() / 1000, UTC)

    async def test_attempts_have_the_time_of_their_start(self) -> None:
        gate = Gate()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(gate.run)).create(id="i")
            await self.clock.settle()
            began = self.moment()
            await self.clock.advance("1 minute")
            gate.open.set()
            await self.finish(instance)
            times = [e.timestamp async for e in instance.subscribe() if "attempt_" in e.type]
        self.assertEqual(times, [began, began + timedelta(minutes=1)])

    async def test_it_ends_after_the_terminal_event_also_when_the_filter_hides_it(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_sleep)).create()
            live = asyncio.create_task(self.told(instance, filter=["sleep_started"]))
            nothing = asyncio.create_task(self.told(instance, filter=[]))
            beyond = asyncio.create_task(self.told(instance, cursor=10**9))
            await self.clock.settle()
            self.assertFalse(live.done() or nothing.done() or beyond.done())
            await self.finish(instance)
            self.assertEqual(await live, ["sleep_started nap-1"])
            self.assertEqual((await nothing, await beyond), ([], []))

    async def test_cloudflares_options_are_a_dict(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_sleep)).create()
            await self.finish(instance)
            whole = [event async for event in instance.subscribe({})]
            cursor, types = whole[-3].event_id, ["workflow_running", "workflow_completed"]
            given = {"cursor": cursor, "filter": types}
            events = [event.type async for event in instance.subscribe(given)]
            self.assertEqual(events, types)
            for wrong in ({"cursors": 1}, {"cursor": "1"}, {"filter": ["x"]}):
                with self.assertRaises((TypeError, ValueError)):
                    instance.subscribe(wrong)

    async def test_a_live_subscription_can_go_on_from_any_cursor(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", value)
            await step.sleep("nap", "1 hour")
            await asyncio.gather(*(step.do(name, value) for name in "bc"))

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            so_far = await self.first(instance, 8)
            rest = [asyncio.create_task(self.ids_after(instance, cursor)) for cursor, _ in so_far]
            await self.finish(instance)
            whole = await self.ids(instance)
            for n, task in enumerate(rest, 1):
                self.assertEqual(await task, whole[n:])

    async def first(self, instance: Any, count: int, **options: Any) -> list[Any]:
        """So many events; then the subscription is left."""
        events: list[Any] = []
        async with contextlib.aclosing(instance.subscribe(**options)) as subscription:
            async for event in subscription:
                events.append((event.event_id, brief(event)))
                if len(events) == count:
                    break
        return events

    async def ids_after(self, instance: Any, cursor: int) -> list[Any]:
        return await self.first(instance, -1, cursor=cursor)

    async def test_a_subscription_that_is_left_leaves_nothing_behind(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_sleep)).create()
            await self.first(instance, 1)
            self.assertEqual(engine.watchers.topics(), [])
            waiting = asyncio.create_task(self.told(instance))
            await self.clock.settle()
            self.assertEqual(len(engine.watchers.topics()), 1)
            waiting.cancel()
            await asyncio.wait([waiting])
            del waiting
            gc.collect()
            self.assertEqual(engine.watchers.topics(), [])
            async for _ in instance.subscribe():
                break
            gc.collect()
            await asyncio.sleep(0.01)
            self.assertEqual(engine.watchers.topics(), [])

    async def test_several_subscribers_see_the_same_also_slow_ones(self) -> None:
        async def slow(instance: Any) -> list[Any]:
            told = []
            async for event in instance.subscribe():
                await asyncio.sleep(0.002)
                told.append((event.event_id, brief(event)))
            return told

        async with self.engine() as engine, self.engine() as client:
            instance = await engine.bind(workflow(one_sleep)).create(id="i")
            other = await client.bind(workflow(one_sleep)).get("i")
            subscribers = [
                asyncio.create_task(call(i))
                for call in (self.ids, slow)
                for i in (instance, other, instance)
            ]
            await self.finish(instance)
            whole = await self.ids(instance)
            async with asyncio.timeout(2):
                for told in await asyncio.gather(*subscribers):
                    self.assertEqual(told, whole)

    async def test_it_can_be_awaited_as_cloudflare_writes_it(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_step)).create(params={"n": 1})
            subscription = await instance.subscribe()
            items = [await subscription.next() for _ in range(8)]
            self.assertEqual([item["done"] for item in items], [False] * 8)
            expected = f"{QUEUED} | {ONE_STEP.format('step-1')} | workflow_completed".split(" | ")
            self.assertEqual([brief(item["value"]) for item in items], expected)
            for _ in range(2):
                self.assertEqual(await subscription.next(), {"done": True, "value": None})
            rest = await instance.subscribe(cursor=items[-2]["value"]["eventId"])
            self.assertEqual([brief(event) async for event in rest], ["workflow_completed"])

    async def test_an_attempt_that_shares_its_row_with_its_end_has_a_beginning_of_its_own(
        self,
    ) -> None:
        async def run(event: Any, step: Any) -> None:
            async def callback() -> None:
                self.clock._now += 5000  # and nothing is awaited

            await step.do("s", callback)

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            times = {event.type: event.timestamp for event in await instance.history()}
        for kind in ("step", "attempt"):
            took = times[f"{kind}_completed"] - times[f"{kind}_started"]
            self.assertEqual(took, timedelta(seconds=5))

    async def test_the_start_tells_the_params_also_after_a_pause_in_the_queue(self) -> None:
        async with self.engine(limits=dataclasses.replace(FOREVER, running=0)) as engine:
            instance = await engine.bind(workflow(one_step)).create(id="i", params="given")
            await instance.pause()
            await instance.resume()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_step)).get("i")
            await self.finish(instance)
            started = [e async for e in instance.subscribe(filter=["workflow_started"])]
            self.assertEqual([event.params for event in started], ["given"])

    async def test_wrong_arguments_are_refused_at_the_call(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_step)).create()
            with self.assertRaisesRegex(TypeError, "cursor is True: expected an event_id"):
                instance.subscribe(cursor=True)
            with self.assertRaisesRegex(ValueError, "filter is {'nothing'}: expected some of"):
                instance.subscribe(filter=["nothing"])

    async def test_an_unknown_instance_is_not_found(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_sleep)).create()
            await instance.delete()
            await self.assertCode("instance.not_found", self.told(instance))
            self.assertEqual(engine.watchers.topics(), [])

    async def test_an_instance_that_is_deleted_meanwhile_is_not_found_any_more(self) -> None:
        for again in (False, True):
            self.setUp()
            async with self.engine() as engine:
                bound = engine.bind(workflow(one_sleep))
                instance = await bound.create(id="i")
                live = asyncio.create_task(self.told(instance))
                await self.clock.settle()
                await instance.delete()
                if again:
                    await bound.create(id="i")
                await self.clock.settle()
                async with asyncio.timeout(1):
                    await self.assertCode("instance.not_found", live)

    async def test_bad_arguments_are_refused(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_sleep)).create()
            for options in (
                {"cursor": "1"},
                {"cursor": True},
                {"cursor": 1.5},
                {"filter": "workflow_queued"},
                {"filter": ["workflow_ended"]},
                {"filter": [5]},
                {"filter": ["workflow_queued", 5]},
                {"filter": [[]]},
                {"filter": 5},
            ):
                with self.subTest(options), self.assertRaises((TypeError, ValueError)):
                    await self.told(instance, **options)

    async def test_leaving_the_engine_ends_a_subscription_with_an_error(self) -> None:
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_sleep)).create()
            live = asyncio.create_task(self.told(instance))
            await self.clock.settle()
        async with asyncio.timeout(1):
            with self.assertRaises(RuntimeError):
                await live

    async def test_an_attempt_that_a_clean_stop_cut_off_is_told_again(self) -> None:
        gate = Gate()
        made = workflow(gate.run)
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.settle()
        async with self.engine() as engine:
            instance = await engine.bind(made).get("i")
            await self.clock.settle()
            gate.open.set()
            await self.finish(instance)
            told = await self.told(instance)
        self.assertEqual(
            [word for word in told if "workflow_" not in word].count("step_started gate-1"), 1
        )
        self.assertEqual(told.count("attempt_started gate-1 1"), 2)
        self.assertEqual(told.count("workflow_started"), 1)


class SubscribingForReal(Real):
    SCRIPT = """
        async def run(event, step):
            await step.do("a", value)
            async def b(ctx):
                await asyncio.sleep(0.01)
                if ctx.attempt == 1: die()
            await step.do("b", {"retries": {"delay": 1}}, b)
            for n in range(30):
                async def c(): await asyncio.sleep(0.002)
                await asyncio.gather(step.do(f"c{n}", c), step.do(f"d{n}", value))
                await step.sleep(f"s{n}", 1)
            return "done"
        async def main(w):
            await (await get(w)).result()
        go()
        """

    async def test_a_sigkill_shows_as_a_failed_attempt(self) -> None:
        self.assertEqual(await asyncio.to_thread(self.runs_until_it_ends, self.SCRIPT), 1)
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_step)).get("i")
            events = [event async for event in instance.subscribe()]
        told = [brief(e) for e in events if e.get("step_name") == "b-1"]
        self.assertEqual(
            told,
            ["step_started b-1", "attempt_started b-1 1", "attempt_errored b-1 1"]
            + ["attempt_started b-1 2", *COMPLETED.format("b-1", 2).split(" | ")],
        )
        error = next(event.error for event in events if event.type == "attempt_errored")
        self.assertEqual(error["name"], "WorkflowInternalError")
        self.assertEqual([e.type for e in events].count("workflow_started"), 1)

    async def test_a_client_that_reconnects_sees_each_event_once_across_a_sigkill(self) -> None:
        chance = random.Random(3)

        async def owners() -> None:
            for _ in range(2):
                await asyncio.to_thread(self.child(self.SCRIPT).wait)

        async with Engine(self.path) as client:
            bound = workflows.Workflow(client, "test", "TEST", 9)
            instance = workflows.WorkflowInstance(bound, "i")
            running = asyncio.create_task(owners())
            told: list[Any] = []
            while not told or told[-1][1] != "workflow_completed":
                count = chance.randint(1, 9)
                async with contextlib.aclosing(
                    instance.subscribe(cursor=told[-1][0] if told else None)
                ) as subscription:
                    with contextlib.suppress(WorkflowError):  # not there yet
                        async for event in subscription:
                            told.append((event.event_id, brief(event)))
                            count -= 1
                            if count == 0:
                                break
                await asyncio.sleep(chance.choice((0, 0.005)))
            await running
            whole = [(e.event_id, brief(e)) async for e in instance.subscribe()]
            self.assertEqual(told, whole)
            self.assertEqual(client.watchers.topics(), [])

    async def test_another_process_sees_events_within_100_ms(self) -> None:
        script = """
            async def main(w):
                async for e in w.subscribe(): say(e.type)
            async def inner():
                async with Engine(PATH) as engine:
                    await main(WorkflowInstance(workflows.Workflow(engine, "test", "TEST", 9), "i"))
            asyncio.run(inner())
            """
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_event)).create(id="i")
            child = self.child(script)
            await child.wait_for("workflow_waiting")
            await instance.send_event(type="t")
            began = time.monotonic()
            await child.wait_for("workflow_completed")
            self.assertLess(time.monotonic() - began, 0.3)
            self.assertEqual(await asyncio.to_thread(child.end), ("", 0))

    async def test_a_subscription_that_waits_asks_nothing_of_the_database(self) -> None:
        statements: list[str] = []
        async with self.engine() as engine:
            instance = await engine.bind(workflow(one_event)).create()

            async def follow() -> list[str]:
                return [event.type async for event in instance.subscribe()]

            live = asyncio.create_task(follow())
            await reach(instance, "waiting")
            await asyncio.sleep(0.1)
            trace = engine.writer.database._db.set_trace_callback
            trace(statements.append)
            await asyncio.sleep(0.3)
            trace(None)
            asked = [s for s in statements if not re.match("PRAGMA data_version|BEGIN|COMMIT", s)]
            self.assertEqual(asked, [])
            await instance.send_event(type="t")
            self.assertEqual((await live)[-1], "workflow_completed")


# --------------------------------------------------------------------------------------------------
# Cloudflare's Python dialect: the decorator form of `step.do`, and whole modules as they stand.


def blank(count: int = 1) -> Any:
    """A few turns of the loop."""

    async def turns() -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    return turns()


class Decorated(Lives):
    """Each program is run, hibernates twice and is replayed by another engine (`lives`); `seen` is
    what its callbacks did meanwhile."""

    def setUp(self) -> None:
        super().setUp()
        self.seen: list[Any] = []

    async def history(self, type: str = "step_completed") -> list[str]:
        """The steps of the instance that `lives` has run, in the order of the journal."""
        async with self.engine() as engine:
            instance = await engine.bind(workflow(lambda event, step: value())).get("i")
            return [e.step_name async for e in instance.subscribe(filter=[type])]

    # -- forms

    async def test_the_decorator_takes_name_and_options_in_every_form_of_the_sdk(self):
        config = {"timeout": "7 minutes"}

        async def run(event, step):
            @step.do("a step", config=config)
            async def first(ctx):
                return [ctx.step.name, ctx.config["timeout"]]

            @step.do()
            async def second():
                return "of the function"

            @step.do(name="third")
            async def other():
                return 3

            @step.do("last", [first, second], True, config)
            async def legacy(a, ctx, b):
                return [a, b, ctx["step"]["name"], ctx["config"]["timeout"]]

            @step.do("tuple", (other,), concurrent=False, config=config)
            async def mixed(a):
                return a

            @step.do("two", [])
            async def none():
                return 0

            return [await first(), await second(), await legacy(), await mixed(), await none()]

        first = ["a step", "7 minutes"]
        legacy = [first, "of the function", "last", "7 minutes"]
        self.assertEqual(await self.lives(run), [first, "of the function", legacy, 3, 0])
        names = ["a step-1", "second-1", "last-1", "third-1", "tuple-1", "two-1"]
        self.assertEqual(await self.history(), names)

    async def test_the_sdks_positional_form_without_dependencies_is_legal(self):
        async def run(event, step):
            @step.do("a", None, False, {"timeout": "7 minutes"})
            async def a(ctx):
                return ctx.config["timeout"]

            return await a()

        self.assertEqual(await self.lives(run), "7 minutes")

    async def test_a_decorated_function_is_called_like_any_step(self):
        async def run(event, step):
            def made(n):
                @step.do(f"n {n}")
                async def work():
                    self.seen.append(n)
                    return n

                return work

            one, two = await asyncio.gather(made(1)(), made(2)())
            async with asyncio.TaskGroup() as group:
                three = group.create_task(made(3)())
            four = await asyncio.wait_for(asyncio.create_task(made(4)()), 5)
            done, _ = await asyncio.wait({asyncio.create_task(made(5)())})
            return [one, two, three.result(), four, done.pop().result()]

        self.assertEqual(await self.lives(run), [1, 2, 3, 4, 5])
        self.assertEqual(self.seen, [1, 2, 3, 4, 5])

    async def test_a_plain_function_runs_in_a_thread_with_its_dependencies(self):
        async def run(event, step):
            @step.do()
            def data():
                self.seen.append(threading.current_thread() is threading.main_thread())
                return [1, 2]

            @step.do("sum", depends=[data])
            def total(numbers, ctx):
                self.seen.append(threading.current_thread() is threading.main_thread())
                return [sum(numbers), ctx.attempt]

            sure = step.do("sure", depends=[total])(lambda given: [*given, "sure"])
            return await sure()

        self.assertEqual(await self.lives(run), [3, 1, "sure"])
        self.assertEqual(self.seen, [False, False])

    async def test_bound_methods_partials_and_callable_objects_can_be_decorated(self):
        class Service:
            async def load(self, ctx):
                return ctx.step.name

            async def __call__(self, load):
                return [load]

        async def times(factor, number):
            return factor * number

        async def run(event, step):
            load = step.do()(Service().load)
            called = step.do("called", depends=[load])(Service())
            number = step.do("number")(lambda: 5)
            product = step.do("product", depends=[number])(functools.partial(times, 3))
            return [await called(), await product()]

        self.assertEqual(await self.lives(run), [["load"], 15])

    # -- dependencies

    async def test_dependencies_go_by_the_name_of_the_function_or_of_the_step(self):
        async def run(event, step):
            @step.do("fetch the sales")
            async def sales():
                return 100

            @step.do("costs")
            async def fetch_costs():
                return 40

            @step.do()
            async def profit(costs, ctx, sales, by=None, *, factor=2):
                return [sales - costs, by, factor, ctx.step.count]

            return await profit()

        self.assertEqual(await self.lives(run), [60, None, 2, 1])

    async def test_a_dependency_is_looked_up_when_the_step_is_called(self):
        async def run(event, step):
            @step.do()
            async def store(fetch):
                self.seen.append(fetch)
                return fetch * 10

            stored = []
            for n in range(3):  # declared after the step that depends on it, and again

                @step.do(f"fetch {n}")
                async def fetch(n=n):
                    return n

                stored.append(await store())
            return stored

        self.assertEqual(await self.lives(run), [0, 10, 20])
        self.assertEqual(self.seen, [0, 1, 2])

    async def test_the_name_of_a_step_goes_before_that_of_a_function_as_the_sdk_has_it(self):
        async def run(event, step):
            @step.do("data")
            async def fetch():
                return "fetched"

            @step.do("clean")
            async def data(data):
                return data + ", cleaned"

            @step.do()
            async def report(data):
                return data

            return [await data(), await report()]

        self.assertEqual(await self.lives(run), ["fetched, cleaned", "fetched"])

    async def test_depends_is_given_in_its_order_whatever_the_parameters_are_called(self):
        async def run(event, step):
            made = [step.do(f"n {n}")(lambda n=n: n) for n in range(4)]

            @step.do("all", depends=[made[3], made[0], made[2], made[0]])
            async def together(a, b, ctx, c, d, e="default"):
                return [a, b, c, d, e, ctx.attempt]

            @step.do("positional", depends=[made[1]])
            async def by_name(fetch):
                return fetch

            return [await together(), await by_name()]

        self.assertEqual(await self.lives(run), [[3, 0, 2, 0, "default", 1], 1])
        names = ["n 3-1", "n 0-1", "n 2-1", "all-1", "n 1-1", "positional-1"]
        self.assertEqual(await self.history(), names)

    async def test_results_can_be_given_to_positional_only_parameters(self):
        async def run(event, step):
            @step.do()
            async def data():
                return 5

            @step.do(depends=[data])
            async def twice(n, /):
                return n * 2

            return await twice()

        self.assertEqual(await self.lives(run), 10)

    async def test_dependencies_run_together_only_when_concurrent(self):
        async def run(event, step):
            running = 0

            def work(name):
                @step.do(name)
                async def body():
                    nonlocal running
                    running += 1
                    self.seen.append(running)
                    await blank(5)
                    running -= 1
                    return name

                return body

            for concurrent in (False, True):
                depends = [work(f"{concurrent} {n}") for n in range(3)]

                @step.do(f"{concurrent}", depends=depends, concurrent=concurrent)
                async def last(a, b, c):
                    self.seen.append("last")
                    return [a, b, c]

                self.seen.append(await last())

        await self.lives(run, count=2)
        one, two = ([f"{kind} {n}" for n in range(3)] for kind in (False, True))
        self.assertEqual(self.seen[:10], [1, 1, 1, "last", one, 1, 2, 3, "last", two])
        self.assertEqual(self.seen[10:], [one, two], "what the replay got, without a callback")

    async def test_a_dependency_runs_once_however_many_depend_on_it(self):
        for concurrent in (False, True):
            with self.subTest(concurrent=concurrent):
                self.setUp()

                async def run(event, step, concurrent=concurrent):
                    do = functools.partial(step.do, concurrent=concurrent)

                    @do()
                    async def root():
                        self.seen.append("root")
                        await blank(3)
                        return 1

                    @do()
                    async def left(root):
                        self.seen.append("left")
                        return root + 1

                    @do()
                    async def right(root):
                        self.seen.append("right")
                        return root + 2

                    @do()
                    async def top(left, root, right):
                        self.seen.append("top")
                        return [left, root, right]

                    @do()
                    async def beside(root, right):
                        self.seen.append("beside")
                        return root + right

                    return await asyncio.gather(top(), beside())

                self.assertEqual(await self.lives(run), [[2, 1, 3], 4])
                self.assertCountEqual(self.seen, ["root", "left", "right", "top", "beside"])
                self.assertEqual(len(await self.history()), 5)

    async def test_a_direct_call_runs_again_and_counts_on(self):
        async def run(event, step):
            @step.do()
            async def work(ctx):
                self.seen.append(ctx.step.count)
                return ctx.step.count

            @step.do()
            async def after(work):
                return work

            first = [await after(), await work(), await after()]
            return [*first, *await asyncio.gather(work(), work()), await after()]

        *got, last = await self.lives(run)
        self.assertEqual(got, [1, 2, 2, 3, 4])
        self.assertIn(last, (3, 4))
        self.assertEqual(self.seen, [1, 2, 3, 4])
        self.assertEqual(len(await self.history()), 7)

    async def test_a_step_whose_dependency_fails_is_not_run(self):
        async def run(event, step):
            @step.do(config=constant(2))
            async def bad():
                self.seen.append("bad")
                raise LookupError("gone")

            @step.do()
            async def good():
                self.seen.append("good")
                return 1

            @step.do(concurrent=True)
            async def one(bad, good):
                self.seen.append("one")

            @step.do()
            async def two(one):
                self.seen.append("two")

            return str(await caught(two()))

        with self.assertLogs("workflows", "WARNING") as logs:  # each failed attempt, and no more
            self.assertEqual(await self.lives(run), "gone")
        self.assertEqual({"failed: LookupError: gone" in line for line in logs.output}, {True})
        self.assertCountEqual(self.seen, ["bad", "good", "bad", "bad"])
        self.assertEqual(await self.history("step_errored"), ["bad-1"])
        self.assertEqual(await self.history(), ["good-1"])

    async def test_a_failed_dependency_runs_again_for_the_next_step_that_needs_it(self):
        async def run(event, step):
            @step.do(config=ONCE)
            async def flaky(ctx):
                self.seen.append(ctx.step.count)
                if ctx.step.count <= 2:
                    raise LookupError("gone")
                return ctx.step.count

            @step.do()
            async def one(flaky):
                return flaky

            @step.do(depends=[flaky])
            async def two(other):
                return other

            errors = [str(await caught(flaky())), str(await caught(one()))]
            return [*errors, await two(), await one()]

        self.assertEqual(await self.lives(run), ["gone", "gone", 3, 3])
        self.assertEqual(self.seen, [1, 2, 3])

    async def test_a_dependency_that_fails_for_two_at_once_runs_once(self):
        async def run(event, step):
            @step.do(config=ONCE)
            async def bad():
                self.seen.append("bad")
                await blank(3)
                raise LookupError("gone")

            @step.do()
            async def one(bad):
                self.seen.append("one")

            @step.do()
            async def two(bad):
                self.seen.append("two")

            errors = await asyncio.gather(one(), two(), return_exceptions=True)
            return [str(error) for error in errors]

        self.assertEqual(await self.lives(run), ["gone", "gone"])
        self.assertEqual(self.seen, ["bad"])

    async def test_a_newer_failure_takes_no_result_from_those_that_depend(self):
        async def run(event, step):
            @step.do(config=ONCE)
            async def data(ctx):
                if ctx.step.count == 2:
                    raise LookupError
                return ctx.step.count

            @step.do()
            async def after(data):
                return data

            return [await data(), type(await caught(data())).__name__, await after()]

        self.assertEqual(await self.lives(run), [1, "LookupError", 1])

    async def test_a_callback_knows_the_results_of_the_run_and_of_the_callback_around_it(self):
        for in_callback in (False, True):

            async def run(event, step, in_callback=in_callback):
                @step.do()
                async def base():
                    self.seen.append("base")
                    return 10

                @step.do()
                async def outer():
                    @step.do()
                    async def middle():
                        @step.do()
                        async def inner(base):
                            return base + 1

                        return await inner()

                    return [await base(), await middle()] if in_callback else await middle()

                return await outer() if in_callback else [await base(), await outer()]

            self.setUp()
            self.assertEqual(await self.lives(run), [10, 11])
            self.assertEqual(self.seen, ["base"])
            steps = {"base-1", "inner-1", "middle-1", "outer-1"}
            self.assertEqual(set(await self.history()), steps)

    async def test_a_failure_on_which_nothing_depends_is_not_logged(self):
        async def run(event, step):
            @step.do(config=ONCE)
            async def failing():
                raise ValueError("no")

            return str(await caught(failing()))

        with self.assertNoLogs("asyncio", logging.ERROR):
            self.assertEqual(await self.lives(run), "no")
            gc.collect()

    async def test_steps_that_depend_on_one_another_are_refused(self):
        async def run(event, step):
            @step.do()
            async def a(b):
                pass

            @step.do()
            async def b(c, a=None):
                pass

            @step.do()
            async def c():
                await blank(3)

            @step.do()
            async def itself(itself):
                pass

            @step.do()
            async def above(itself):
                pass

            calls = (a(), b(), itself(), above())  # at the same time, they would wait for ever
            return [str(e) for e in await asyncio.gather(*calls, return_exceptions=True)]

        refused = [f"step '{name}' depends on itself" for name in ("a", "b", "itself", "itself")]
        self.assertEqual(await self.lives(run), refused)

    async def test_a_step_named_ctx_goes_before_the_context(self):
        async def run(event, step):
            @step.do("context")
            async def ctx():
                return 1

            @step.do()
            async def first(ctx):
                return ctx.attempt

            attempt = await first()
            step.do("ctx")(returns(5))

            @step.do()
            async def second(ctx):
                return ctx

            return [attempt, await second()]

        self.assertEqual(await self.lives(run), [1, 5])

    async def test_a_step_whose_dependency_failed_leaves_no_open_call_behind(self):
        async def run(event, step):
            @step.do(config=ONCE)
            async def bad():
                raise LookupError("gone")

            @step.do()
            async def after(bad):
                pass

            for _ in range(5):
                await caught(after())
            return len(step._run.unawaited) + len(step._run.active)

        self.assertEqual(await self.lives(run), 0)

    async def test_a_dependency_that_ran_inside_a_callback_does_not_run_again_on_replay(self):
        async def run(event, step):
            self.seen.append("life")

            @step.do()
            async def inner():
                self.seen.append("inner")
                return 1

            @step.do()
            async def outer():
                self.seen.append("outer")
                return await inner() + 1

            @step.do()
            async def last(inner):
                self.seen.append("last")
                return inner

            return [await outer(), await last()]

        self.assertEqual(await self.lives(run), [2, 1])
        replays = self.seen[self.seen.index("life", 1) :]
        self.assertEqual(set(replays), {"life"}, "a callback ran on replay")

    async def test_results_are_independent_copies(self):
        async def run(event, step):
            @step.do()
            async def data():
                return {"list": [1]}

            @step.do()
            async def spoils(data):
                data["list"].append("spoiled")
                return data

            @step.do(depends=[data, data])
            async def looks(one, two):
                one["list"].append(2)
                self.seen.append("looks")
                return [one, two]

            mine = await data()
            mine["list"].append("mine")
            first = [await spoils(), await looks(), await data(), mine]
            first[0]["list"].clear()
            return [*first, await spoils()]

        for count in (1, 3):  # without a replay, and with two
            self.setUp()
            good, spoiled = {"list": [1]}, {"list": [1, "spoiled"]}
            mine, both = {"list": [1, "mine"]}, [{"list": [1, 2]}, good]
            result = await self.lives(run, count=count)
            self.assertEqual(result, [{"list": []}, both, good, mine, spoiled])
            self.assertEqual(self.seen, ["looks"])

    async def test_dates_and_bytes_reach_a_dependent_step_as_they_are(self):
        moment = datetime(2030, 1, 1, 12, tzinfo=UTC)

        async def run(event, step):
            @step.do()
            async def data():
                return {"at": moment, "raw": b"\x00\xff", "pair": (1, 2)}

            @step.do()
            async def after(data):
                self.seen.append(data)
                return data

            return await after()

        expected = {"at": moment, "raw": b"\x00\xff", "pair": [1, 2]}
        self.assertEqual(await self.lives(run), expected)
        self.assertEqual(self.seen, [expected])

    # -- wrong use

    async def test_awaiting_the_decorator_says_that_the_callback_was_forgotten(self):
        async def run(event, step):
            calls = (
                step.do("x"),
                asyncio.gather(step.do("x")),
                asyncio.create_task(step.do("x")),
                asyncio.wait_for(step.do("x"), 5),
                step.do("x", {"timeout": "1 hour"}),
                step.do("x", config={"timeout": "1 hour"}),
                step.do("x", depends=[], concurrent=True),
            )
            errors = [await caught(call) for call in calls]
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(step.do("x"))
            except* WorkflowFatalError as error:
                errors.append(error.exceptions[0])
            self.assertTrue(all(type(error) is WorkflowFatalError for error in errors))
            return {error.code for error in errors} | {"'x'" in str(error) for error in errors}

        async def as_list(event, step):
            return sorted(map(str, await run(event, step)))

        self.assertEqual(await self.lives(as_list), ["True", "step.invalid_callback"])

    async def test_awaiting_any_decorator_says_that_the_callback_was_forgotten(self):
        async def run(event, step):
            calls = (step.do(), step.do("x", [], True, {}), step.do("x", None, True))
            return [(await caught(call)).code for call in calls]

        self.assertEqual(await self.lives(run), ["step.invalid_callback"] * 3)

    async def test_what_is_wrong_with_a_decorated_step_is_raised_where_it_is_awaited(self):
        def plain():
            return 5

        async def run(event, step):
            @step.do()
            async def good():
                return 1

            wrong = [
                ("step.invalid_name", "256", step.do("x" * 300)(plain)),
                ("step.invalid_name", "control", step.do("a\nb")(plain)),
                ("step.invalid_name", "5", step.do(5)(plain)),
                ("step.invalid_config", "retry", step.do("x", config={"retry": 1})(plain)),
                ("step.invalid_config", "limit", step.do("x", config=constant(-1))(plain)),
                ("step.invalid_config", "timeout", step.do("x", {"timeout": 0})(plain)),
                ("step.invalid_config", "dependz", step.do("x", dependz=[])(plain)),
                ("step.invalid_config", "5", step.do("x", depends=5)(plain)),
                ("step.invalid_config", "0 steps", step.do("x", depends=[good])(plain)),
                ("step.invalid_config", "decorated", step.do("x", depends=[plain])(lambda a: a)),
                ("step.invalid_config", "'good'", step.do("x", depends=["good"])(lambda a: a)),
                ("step.invalid_callback", "'b'", step.do("x", depends=[good])(lambda a, b: a)),
                ("step.invalid_callback", "'nope'", step.do("x")(lambda nope: nope)),
                ("step.invalid_callback", "'good'", step.do("x", depends=[])(lambda good: good)),
                ("step.invalid_callback", "5", step.do("x")(5)),
                ("step.invalid_config", "rollback", step.do("x", rollback=5)(plain)),
            ]
            for code, text, function in wrong:
                error = await caught(function())
                self.assertIs(type(error), WorkflowFatalError, error)
                self.assertEqual((error.code, text in str(error)), (code, True), error)
            with self.assertRaisesRegex(WorkflowFatalError, "'good' is called without arguments"):
                await good(1)
            return await good()

        with self.assertNoLogs("workflows", "WARNING"):
            self.assertEqual(await self.lives(run), 1)
        self.assertEqual(await self.history("step_started"), ["good-1"], "nothing else ran")

    async def test_any_true_value_means_concurrent(self):
        async def run(event, step):
            together = 0

            async def body():
                nonlocal together
                together += 1
                await blank(3)
                self.seen.append(together)
                together -= 1

            for concurrent in (1, "yes", [0], None, 0):
                depends = [step.do()(body), step.do()(body)]
                await step.do("s", depends=depends, concurrent=concurrent)(lambda a, b: None)()

        await self.lives(run, count=1)
        self.assertEqual(self.seen, [2, 1] * 3 + [1, 1] * 2)

    async def test_a_decorator_without_parentheses_is_refused_with_the_right_forms(self):
        async def run(event, step):
            async def load():
                pass

            def decorated():
                @step.do
                async def save():
                    pass

            errors = []
            for wrong in (lambda: step.do(load), decorated):
                try:
                    wrong()
                except WorkflowFatalError as error:
                    errors.append((error.code, str(error)))
            return errors

        text = "step.do needs a name or parentheses: to call a function, write "
        text += "`await step.do('name', function)`; to decorate it, `@step.do()`"
        self.assertEqual(await self.lives(run), [["step.invalid_callback", text]] * 2)

    async def test_a_run_with_decorated_steps_is_forgotten_when_it_has_ended(self):
        lives = []

        async def run(event, step):
            lives.append(weakref.ref(step._run))

            @step.do()
            async def one():
                return 1

            @step.do()
            async def two(one):
                return await one_more() + one

            @step.do()
            async def one_more():
                return 1

            return await two()

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            self.assertEqual(await self.finish(instance), 2)
            gc.collect()
            self.assertEqual([life() for life in lives], [None])

    async def test_a_decorator_or_function_that_is_never_used_is_no_call(self):
        async def run(event, step):
            step.do("never")
            step.do()(returns(1))

            @step.do()
            async def unused():
                return 1

            @step.do("used")
            async def used():
                return 2

            return await used()

        with self.assertNoLogs("workflows", "WARNING"):
            self.assertEqual(await self.lives(run), 2)
        async with self.engine() as engine:
            made = engine.bind(workflow(lambda event, step: self.forgets(step), "Forgets"))
            with self.assertLogs("workflows", "WARNING") as logged:
                await self.finish(await made.create())
        self.assertRegex(logged.output[0], "'forgotten' was called but never awaited")

    async def forgets(self, step: Any) -> None:
        step.do("forgotten")(returns(1))()
        await step.do("x", returns(1))

    # -- cancellation

    async def test_a_timeout_around_a_step_cancels_the_dependency_that_runs(self):
        async def run(event, step):
            @step.do()
            async def slow(ctx):
                self.seen.append(f"slow {ctx.step.count}")
                if ctx.step.count == 1:
                    await asyncio.Event().wait()
                return ctx.step.count

            @step.do(concurrent=event.payload)
            async def after(slow, ctx):
                self.seen.append(f"after {ctx.step.count}")
                return slow

            async def expire(limit):
                await blank(5)
                limit.reschedule(0)

            try:
                async with asyncio.timeout(None) as limit:
                    expires = asyncio.create_task(expire(limit))
                    await after()
            except TimeoutError:
                return [expires.done(), await after()]

        for concurrent in (False, True):
            self.setUp()
            result = await self.lives(run, params=concurrent)
            self.assertEqual(result, [True, 2])
            self.assertEqual(self.seen, ["slow 1", "slow 2", "after 2"])

    async def test_cancelling_one_of_two_that_wait_for_a_dependency_spares_the_other(self):
        async def run(event, step):
            go = asyncio.Event()

            @step.do()
            async def shared():
                await go.wait()
                return 1

            @step.do()
            async def one(shared):
                return shared

            @step.do()
            async def two(shared):
                return shared

            tasks = [asyncio.create_task(call) for call in (one(), two())]
            await blank(5)
            tasks[0].cancel()
            go.set()
            await asyncio.wait(tasks)
            return ["cancelled" if task.cancelled() else task.result() for task in tasks]

        self.assertEqual(await self.lives(run), ["cancelled", 1])

    async def test_calls_of_one_function_may_be_cancelled_in_any_order(self):
        async def run(event, step):
            @step.do()
            async def slow():
                await asyncio.Event().wait()

            kinds = []
            for order in ((0, 1), (1, 0)):
                tasks = [asyncio.create_task(slow()) for _ in range(2)]
                await asyncio.sleep(0)
                for n in order:
                    tasks[n].cancel()
                    await asyncio.wait({tasks[n]})
                kinds += [task.cancelled() for task in tasks]
            return kinds

        self.assertEqual(await self.outcome(run), [True] * 4)

    async def test_a_cancelled_direct_call_takes_no_result_from_those_that_depend(self):
        async def run(event, step):
            @step.do()
            async def data(ctx):
                self.seen.append(ctx.step.count)
                if ctx.step.count == 2:
                    await asyncio.Event().wait()
                return ctx.step.count

            @step.do()
            async def after(data):
                return data

            await data()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await data()
            return await after()

        self.assertEqual(await self.lives(run), 1)
        self.assertEqual(self.seen, [1, 2])

    async def test_a_failed_task_group_cancels_steps_with_their_dependencies(self):
        async def run(event, step):
            go = asyncio.Event()

            @step.do()
            async def slow(ctx):
                self.seen.append(f"slow {ctx.step.count}")
                go.set()
                await asyncio.Event().wait()

            @step.do()
            async def after(slow):
                self.seen.append("after")

            @step.do(config=ONCE)
            async def fails():
                await go.wait()
                raise LookupError("no")

            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(after())
                    group.create_task(fails())
            except* LookupError:
                self.seen.append("caught")
            return "over"

        self.assertEqual(await self.lives(run), "over")
        self.assertEqual(self.seen[:2], ["slow 1", "caught"])
        self.assertEqual(set(self.seen[2:]), {"caught"})
        self.assertEqual(await self.history("step_errored"), ["fails-1"])

    # -- durability

    async def test_a_race_of_chains_takes_the_same_branch_in_every_life(self):
        async def run(event, step):
            first = asyncio.Event()

            @step.do()
            async def a():
                return "a"

            @step.do()
            async def b(a):
                await first.wait()
                return a + "b"

            @step.do()
            async def c():
                await blank(20)
                return "c"

            @step.do()
            async def d(c):
                first.set()
                return c + "d"

            tasks = [asyncio.create_task(call) for call in (b(), d())]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            self.seen.append([task.result() for task in done])
            rest = await asyncio.gather(*tasks)
            return rest

        self.assertEqual(await self.lives(run), ["ab", "cd"])
        self.assertEqual(self.seen, [["cd"]] * len(self.seen))
        self.assertGreater(len(self.seen), 2)

    async def test_a_restart_between_a_dependency_and_its_step_runs_neither_twice(self):
        for plain in (False, True):
            with self.subTest(plain=plain):
                self.setUp()

                async def run(event, step, plain=plain):
                    @step.do()
                    async def first():
                        self.seen.append("first")
                        return [1]

                    @step.do(config=constant(3, "1 hour"))
                    async def second(first, ctx):
                        self.seen.append(f"second {ctx.attempt}")
                        if ctx.attempt < 3:
                            raise LookupError
                        return [*first, 2]

                    @step.do()
                    def third(second, first):
                        self.seen.append("third")
                        return [*second, *first]

                    if plain:  # a step of another form between
                        await step.sleep("s", "1 hour")
                    return [await third(), await second()]

                made = workflow(run)
                async with self.engine() as engine:
                    await engine.bind(made).create(id="i")
                for _ in range(4):
                    async with self.engine() as engine:
                        engine.bind(made)
                        await self.clock.advance("61 minutes")
                async with self.engine() as engine:
                    result = await self.finish(await engine.bind(made).get("i"))
                self.assertEqual(result, [[1, 2, 1], [1, 2]])
                attempts = ["second 1", "second 2", "second 3"]
                self.assertEqual(self.seen[:5], ["first", *attempts, "third"])
                self.assertEqual(self.seen[5:], attempts, "the direct call: a step of its own")
                names = ["first-1", "second-1", "third-1", "second-2"]
                self.assertEqual(await self.history(), names)

    async def test_a_decorated_step_can_be_restarted_from(self):
        async def run(event, step):
            @step.do()
            async def first():
                self.seen.append("first")
                return 1

            @step.do()
            async def second(first):
                self.seen.append("second")
                return first + 1

            return await second()

        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            self.assertEqual(await self.finish(instance), 2)
            await instance.restart({"from": {"name": "second"}})
            self.assertEqual(await self.finish(instance), 2)
        self.assertEqual(self.seen, ["first", "second", "second"])

    async def test_handlers_of_decorated_steps_roll_back_also_after_a_restart(self):
        async def run(event, step):
            async def undo(context):
                self.seen.append(f"undo {context['stepName']} {context['output']}")

            def undo_slowly(context):
                self.seen.append("failed handler")
                if self.seen.count("failed handler") == 1:
                    raise LookupError

            slowly = {"retries": {"limit": 1, "delay": "1 hour"}}

            @step.do(rollback=undo)
            async def flight():
                self.seen.append("flight")
                return "f"

            @step.do("hotel", rollback=undo_slowly, rollback_config=slowly)
            async def room(flight):
                self.seen.append("hotel")
                return "h"

            @step.do("car", config=ONCE, depends=[flight, room], rollback=undo)
            async def car(flight, hotel):
                raise LookupError("no car")

            @step.do(rollback=undo)
            async def never(car):
                self.seen.append("never")

            await never()

        made = workflow(run)
        async with self.engine() as engine:
            await engine.bind(made).create(id="i")
            await self.clock.settle()
        steps = ["flight", "hotel", "undo car-1 None", "failed handler"]
        self.assertEqual(self.seen, steps)
        async with self.engine() as engine:
            with self.assertRaisesRegex(LookupError, "no car"):
                await self.finish(await engine.bind(made).get("i"))
        self.assertEqual(self.seen, [*steps, "failed handler", "undo flight-1 f"])

    async def test_what_a_thousand_decorated_steps_take_grows_in_proportion(self):
        async def run(event, step):
            for n in range(event.payload):

                @step.do(f"step {n}")
                async def work():
                    return 1

            gc.collect()
            self.seen.append(tracemalloc.get_traced_memory()[0])

        tracemalloc.start()
        try:
            for count in (500, 2000):
                self.setUp()
                before = tracemalloc.get_traced_memory()[0]
                await self.lives(run, count=1, params=count)
                taken = (self.seen[0] - before) / count
                self.assertLess(taken, 4000, f"bytes for each of {count} decorated functions")
        finally:
            tracemalloc.stop()

    async def test_random_graphs_of_steps_are_the_same_in_every_life(self):
        for seed in range(15):
            with self.subTest(seed=seed):
                self.setUp()
                self.stuck = asyncio.Event()
                run = functools.partial(self.graph, seed)
                made = workflow(run)
                async with self.engine() as engine:  # until one of its callbacks is stuck
                    await engine.bind(made).create(id="i")
                    await asyncio.wait_for(self.stuck.wait(), 5)
                    await self.clock.settle()
                begun = [name for what, name in self.seen if what == "begin"]
                ended = [name for what, name in self.seen if what == "end"]
                async with self.engine() as engine:
                    await self.finish(await engine.bind(made).get("i"))
                orders = [order for what, order in self.seen if what == "order"]
                self.assertGreater(len(orders), 2, "lives that got to the end")
                self.assertEqual(orders, orders[:1] * len(orders))
                again = [name for what, name in self.seen if what == "begin"][len(begun) :]
                self.assertEqual(set(again) & set(ended), set(), "ran although it had finished")
                self.assertEqual(len(again), len(set(again)), "ran twice")

    async def graph(self, seed: int, event: Any, step: Any) -> None:
        """Twelve steps that depend on one another at random; the order in which they reach `run`
        is what must not change."""
        chance = random.Random(seed)
        made: list[Any] = []
        order: list[Any] = []
        hangs = chance.randrange(12)
        for n in range(12):
            depends = chance.sample(made, min(len(made), chance.randrange(4)))
            fails, turns = chance.random() < 0.15, chance.randrange(4)

            async def body(ctx, *results, n=n, fails=fails, turns=turns):
                self.seen.append(("begin", (n, ctx.step.count)))
                await blank(turns)
                if n == hangs and not self.stuck.is_set():
                    self.stuck.set()
                    await asyncio.Event().wait()
                self.seen.append(("end", (n, ctx.step.count)))
                if fails:
                    raise LookupError(n)
                return [n, *results]

            scope = {"body": body}
            names = ", ".join(["ctx", *"abc"[: len(depends)]])
            exec(f"async def step({names}): return await body({names})", scope)
            options = {"depends": depends, "concurrent": chance.random() < 0.5, "config": ONCE}
            made.append(step.do(f"n {n}", **options)(scope["step"]))

        async def call(function):
            try:
                order.append(await function())
            except LookupError as error:
                order.append(str(error))

        roots = chance.sample(made, 5) + [made[hangs]]
        for part in (roots[:3], roots[3:]):
            used = [f for f in dict.fromkeys(part) if not f.outcomes]
            await asyncio.gather(*map(call, used))
        if not self.stuck.is_set():  # a step that it depends on has failed
            self.stuck.set()
        self.seen.append(("order", order))
        await step.sleep("s", "2 hours")
        await step.sleep("t", "2 hours")

    # -- the rest of the dialect

    async def test_wait_for_event_takes_the_sdks_arguments_and_gives_its_event(self):
        async def run(event, step):
            waits = (
                step.wait_for_event("a", "go", timeout="1 hour"),
                step.wait_for_event("b", "go", "1 hour"),
                step.wait_for_event("c", event_type="go", timeout=timedelta(hours=1)),
                step.wait_for_event("d", {"type": "go", "timeout": "1 hour"}),
                step.wait_for_event(name="e", type="go"),
                step.waitForEvent("f", "go"),
            )
            got = []
            for wait in waits:
                e = await wait
                self.assertEqual([*e], ["payload", "timestamp", "type"])
                self.assertEqual((e["type"], e.type), ("go", "go"))
                self.assertIs(e["timestamp"], e.timestamp)
                self.assertIsNotNone(e.timestamp.tzinfo)
                self.assertEqual(e["payload"], e.payload)
                self.assertEqual(e.get("payload", {}).get("n"), e["payload"]["n"])
                self.assertEqual({e["n"], e.n, e.payload["n"]}, {e.get("n")})
                self.assertEqual(("n" in e, "nothing" in e, e.get("nothing")), (True, False, None))
                got.append(e["payload"]["n"])
            with self.assertRaises(WorkflowTimeoutError):
                await step.wait_for_event("g", "other", timeout=5)
            return got

        made = workflow(run)
        async with self.engine() as engine:
            instance = await engine.bind(made).create(id="i")
            for n in range(3):
                await instance.send_event({"type": "go", "payload": {"n": n}})
        async with self.engine() as engine:
            instance = await engine.bind(made).get("i")
            for n in range(3, 6):
                await instance.sendEvent(type="go", payload={"n": n})
            self.assertEqual(await self.finish(instance), [0, 1, 2, 3, 4, 5])

    async def test_the_original_spellings_work_beside_decorated_steps(self):
        async def run(event, step):
            @step.do("who")
            async def who(ctx):
                return [ctx["step"]["name"], ctx["step"]["count"], ctx["attempt"], [*ctx]]

            await step.sleepUntil("s", event["timestamp"] + timedelta(hours=1))
            return [event["instanceId"], event.workflowName, event["payload"]["n"], await who()]

        async with self.engine() as engine:
            made = engine.bind(workflow(run))
            (one,) = await made.createBatch([{"id": "i", "params": {"n": 1}}])
            context = ["who", 1, 1, ["step", "attempt", "config"]]
            self.assertEqual(await self.finish(one), ["i", "test", 1, context])

    async def test_steps_that_depend_can_be_declared_and_called_inside_a_callback(self):
        async def run(event, step):
            @step.do("outer", config=constant(1))
            async def outer(ctx):
                @step.do()
                async def inner():
                    self.seen.append(f"inner {ctx.attempt}")
                    return 1

                @step.do()
                async def after(inner):
                    self.seen.append(f"after {ctx.attempt}")
                    return inner + 1

                result = await after()
                if ctx.attempt == 1:
                    raise LookupError
                return result

            return await outer()

        self.assertEqual(await self.lives(run), 2)
        self.assertEqual(
            self.seen, ["inner 1", "after 1"], "the second attempt found their results"
        )


class DecoratedForReal(Real):
    def test_a_sigkill_between_a_dependency_and_its_step_runs_no_finished_one_again(self):
        deaths = self.runs_until_it_ends(
            """
            async def run(event, step):
                def work(name, **options):
                    def decorate(f):
                        async def body(ctx):
                            note(f"{name}:{ctx.step.count}")
                            await asyncio.sleep(0.01)
                            if ctx.attempt == 1 and name == "b": die()
                            return name
                        return body
                    return step.do(name, config={"retries": {"delay": 1}})(decorate(None))
                a, b, c = work("a"), work("b"), work("c")
                @step.do("d", [a, b, c], True, {"retries": {"delay": 1}})
                async def d(x, y, z, ctx):
                    note("d:1")
                    await asyncio.sleep(0.05)
                    if ctx.attempt == 1: die()
                    return x + y + z
                @step.do("e")
                async def e(d, a): return d + a
                return [await e(), await a()]
            async def main(w): say(await (await get(w)).result())
            go()
            """
        )
        self.assertEqual(deaths, 2)
        log = self.log()
        self.assertEqual((log.count("d:1"), log.count("b:1"), log.count("a:2")), (2, 2, 1))
        self.assertLessEqual(max(log.count("a:1"), log.count("c:1")), 2)
        self.assertEqual([*dict.fromkeys(log[:3])], ["a:1", "b:1", "c:1"])
        after = log[log.index("d:1") + 1 :]
        self.assertEqual(after, ["d:1", "a:2"], "all dependencies had finished by then")


class Shim(Real):
    def says(self, script: str) -> str:
        said, code = self.child(script).end()
        self.assertEqual(code, 0)
        return said

    def test_the_modules_of_cloudflares_sdk_are_imported_from_here(self):
        said = self.says(
            """
            assert "workers" not in sys.modules
            workflows.install_workers_shim()
            import workers, workers.rpc, workers.fetch, workers.gateway.options
            from workers import NonRetryableError as N, WorkflowEntrypoint as W, workflows as flows
            from workers.workflows import NonRetryableError
            from workers.entrypoints import WorkflowEntrypoint
            from workers.fetch import fetch
            assert W is WorkflowEntrypoint is workflows.WorkflowEntrypoint
            assert N is NonRetryableError is flows.NonRetryableError is workflows.NonRetryableError
            assert fetch is workers.fetch is workflows.fetch
            say("fine")
            """
        )
        self.assertEqual(said, "fine")

    def test_every_other_name_imports_and_does_nothing(self):
        said = self.says(
            """
            workflows.install_workers_shim()
            from workers import DurableObject, Response, WorkerEntrypoint, asgi, env, handler, new
            from workers.gateway import BaseOptions
            class Default(WorkerEntrypoint[dict]):
                def __init__(self, ctx, env): super().__init__(ctx, env); self.mine = ctx + env
                async def fetch(self, request: Response | None): return Response("x", status=200)
            class Counter(DurableObject): pass
            class App(asgi.entrypoint("app")): pass
            @handler
            async def on_fetch(request, env): pass
            asyncio.run(Default(1, 2).fetch(None))
            Counter(None, None), App(), new.anything(env["X"])
            assert Default(1, 2).mine == 3 and issubclass(Default, WorkerEntrypoint)
            assert Response is __import__("workers").Response
            exec("from workers import *", {})
            say("fine")
            """
        )
        self.assertEqual(said, "fine")

    def test_a_name_without_meaning_says_so_in_a_workflow(self):
        said = self.says(
            """
            workflows.install_workers_shim()
            from workers import Response, WorkflowEntrypoint, env
            class Flow(WorkflowEntrypoint):
                async def run(self, event, step):
                    def plain(): env.BUCKET.put("x")
                    async def answer(): return Response.json({})
                    errors = []
                    a, b = lambda: step.do("a", plain), lambda: step.do("b", answer)
                    for call in (a, b, Response):
                        try: await call()
                        except workflows.WorkflowFatalError as error: errors.append(str(error))
                    return errors
            async def main():
                async with Engine(":memory:") as engine:
                    say("; ".join(await (await engine.bind(Flow).create()).result()))
            asyncio.run(main())
            """
        )
        names = ["env.BUCKET.put", "Response.json", "Response"]
        what = "of the package `workers` has no meaning here: it belongs to Cloudflare's runtime"
        self.assertEqual(said.split("; "), [f"`{name}` {what}" for name in names])

    def test_installing_it_twice_changes_nothing(self):
        said = self.says(
            """
            workflows.install_workers_shim()
            import workers
            before = {**sys.modules}, dict(vars(workers)), [*sys.meta_path]
            assert workflows.install_workers_shim() is None
            assert before == (sys.modules, vars(workers), sys.meta_path)
            say("fine")
            """
        )
        self.assertEqual(said, "fine")

    def test_it_works_beside_the_installed_sdk(self):
        """That can't be imported outside of Cloudflare's runtime."""
        (self.folder / "workers").mkdir()
        (self.folder / "workers" / "rpc.py").write_text("sdk = True\n")
        (self.folder / "workers" / "__init__.py").write_text("from . import rpc\nimport js\n")
        said = self.says(
            """
            sys.path.insert(0, os.path.dirname(PATH))
            workflows.install_workers_shim()
            from workers import WorkflowEntrypoint, rpc
            say(WorkflowEntrypoint is workflows.WorkflowEntrypoint, rpc.sdk is True)
            """
        )
        self.assertEqual(said, "True False")

    def test_another_package_of_that_name_stays_and_a_warning_says_so(self):
        (self.folder / "workers").mkdir()
        (self.folder / "workers" / "__init__.py").write_text("mine = True\n")
        for before in ("", "import workers"):
            said = self.says(
                f"""
                import logging
                logging.getLogger("workflows").setLevel(logging.WARNING)
                logging.basicConfig(stream=sys.stdout, format="%(message)s")
                sys.path.insert(0, os.path.dirname(PATH))
                {before}
                workflows.install_workers_shim()
                import workers
                say(workers.mine)
                """
            )
            self.assertRegex(said, "(?s)^<module 'workers' from .*> is not Cloudflare's: .*True$")

    def test_a_folder_of_that_name_is_no_package(self):
        (self.folder / "workers" / "orders" / "src").mkdir(parents=True)
        said = self.says(
            """
            sys.path.insert(0, os.path.dirname(PATH))
            workflows.install_workers_shim()
            from workers import WorkflowEntrypoint
            say(WorkflowEntrypoint is workflows.WorkflowEntrypoint)
            """
        )
        self.assertEqual(said, "True")

    def test_it_does_nothing_in_cloudflares_runtime(self):
        said = self.says(
            """
            sys.platform, before = "emscripten", [*sys.meta_path]
            workflows.install_workers_shim()
            say("workers" in sys.modules, sys.meta_path == before)
            """
        )
        self.assertEqual(said, "False True")


class Fetching(unittest.IsolatedAsyncioTestCase):
    """`from workers import fetch`, with a server beside it."""

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
            told = [self.command, self.path, self.headers["Content-Type"], self.headers["A"], body]
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/there")
            else:
                self.send_response(int(self.path[1:4]) if self.path[1:4].isdigit() else 200)
            self.send_header("X-Kind", "test")
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        do_POST = do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    def setUp(self) -> None:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.Server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.url = f"http://127.0.0.1:{server.server_port}"

    async def told(self, path: str, **options: Any) -> Any:
        return await (await workflows.fetch(self.url + path, **options)).json()

    async def test_a_response_has_status_headers_and_body(self) -> None:
        response = await workflows.fetch(self.url + "/x")
        self.assertEqual((response.status, response.ok), (200, True))
        self.assertEqual(
            (response.headers["x-kind"], response.headers.get("X-KIND")), ("test",) * 2
        )
        text = '["GET", "/x", null, null, ""]'
        self.assertEqual((await response.text(), await response.bytes()), (text, text.encode()))

    async def test_a_request_has_method_headers_and_body(self) -> None:
        text, raw = "text/plain;charset=UTF-8", "application/octet-stream"
        self.assertEqual(
            await self.told("/x", method="post", headers={"A": 5}, body="ä"),
            ["POST", "/x", text, "5", "ä"],
        )
        self.assertEqual(
            await self.told("/x", method=http.HTTPMethod.PUT, headers=[("a", "b")], body=b"c"),
            ["PUT", "/x", raw, "b", "c"],
        )
        self.assertEqual(
            await self.told("/x", method="POST", headers={"content-type": "mine"}, body="c", cf={}),
            ["POST", "/x", "mine", None, "c"],
        )

    async def test_every_status_is_a_response_and_redirects_are_followed(self) -> None:
        for status in (404, 500):
            response = await workflows.fetch(f"{self.url}/{status}")
            self.assertEqual((response.status, response.ok), (status, False))
            self.assertEqual((await response.json())[1], f"/{status}")
        self.assertEqual((await self.told("/moved"))[1], "/there")

    async def test_no_response_is_an_os_error(self) -> None:
        for url in (
            "http://127.0.0.1:9/",
            "file:///etc/passwd",
            "nowhere",
            "http://",
        ):
            with self.subTest(url), self.assertRaises(OSError):
                await workflows.fetch(url)

    async def test_it_blocks_neither_the_loop_nor_the_end_of_it(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            with self.assertRaises(TimeoutError):
                await asyncio.wait_for(workflows.fetch(url), 0.02)


class Binding:
    """A binding in a Worker's `env` (R2, D1, AI, a service): each method is async, remembers its
    call, and gives the answer that the test has for it."""

    def __init__(self, name: str, world: World) -> None:
        self._name, self._world = name, world

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return functools.partial(self._world.call, f"{self._name}.{method}")


class World:
    """All that is outside of the workflow. The call of number `hangs` does not end, until the
    engine stops; then everything works."""

    def __init__(self, answers: dict[str, Any], hangs: int | None) -> None:
        self.answers, self.hangs = answers, hangs
        self.calls: list[tuple[Any, ...]] = []
        self.hung = asyncio.Event()

    async def call(self, name: str, *args: Any) -> Any:
        if self.hangs == len(self.calls):
            self.hangs = None
            self.hung.set()
            await asyncio.Event().wait()
        self.calls.append((name, *args))
        answer = self.answers.get(name)
        answer = answer(*args) if callable(answer) else answer
        return await answer if asyncio.iscoroutine(answer) else answer


class Programs(Case):
    """Whole modules as they are written for Cloudflare, loaded as they stand. Each is run in one
    go, with a new engine after each advance of the clock, and with the engine stopped in the
    middle of every call that it makes."""

    def load(self, source: str) -> Any:
        known, finders = {*sys.modules}, [*sys.meta_path]
        workflows.install_workers_shim()
        module = sys.modules["entry"] = types.ModuleType("entry")
        for name in sys.modules.keys() - known:
            self.addCleanup(sys.modules.pop, name, None)
        self.addCleanup(sys.meta_path.__setitem__, slice(None), finders)
        exec(compile(textwrap.dedent(source), "entry.py", "exec"), vars(module))
        return module

    async def once(
        self, source: str, answers: dict[str, Any], params: Any, hangs: int | None, short: bool
    ) -> tuple[Any, list[Any]]:
        """What the module's `Flow` returns, or the error that it ends with, and its calls."""
        super().setUp()
        module = self.load(source)
        world = World(answers, hangs)
        bindings = {name.split(".")[0] for name in answers}
        env = {name: Binding(name, world) for name in bindings} | {"REGION": "eu"}
        async with self.engine(env=env) as engine:
            flow = engine.bind(module.Flow)
            if hasattr(module, "Default"):
                worker = module.Default(None, None)
                worker.env = engine.env
                await worker.fetch(params)
            else:
                await flow.create(id="i", params=params)
            self.instance = await flow.get("i")
            if hangs is not None:
                done = asyncio.create_task(self.finish(self.instance))
                hung = asyncio.create_task(world.hung.wait())
                await asyncio.wait({done, hung}, return_when=asyncio.FIRST_COMPLETED)
                self.assertTrue(world.hung.is_set())
                done.cancel()
                await asyncio.wait({done})
        for hours in range(6 if short else 0):
            async with self.engine(env=env) as engine:
                self.instance = await engine.bind(module.Flow).get("i")
                await self.clock.advance(hours * 3_600_000)
        async with self.engine(env=env) as engine:
            self.instance = await engine.bind(module.Flow).get("i")
            try:
                result = await self.finish(self.instance)
            except Exception as error:
                result = [type(error).__name__, str(error), (await self.instance.status())["error"]]
        return result, world.calls

    async def everywhere(
        self, source: str, answers: dict[str, Any], params: Any = None
    ) -> tuple[Any, list[Any]]:
        async with asyncio.timeout(30):
            result, calls = await self.once(source, answers, params, None, False)
            again = await self.once(source, answers, params, None, True)
            self.assertEqual(again, (result, calls), "with many short lives of the engine")
            for n in range(len(calls)):
                other, others = await self.once(source, answers, params, n, False)
                self.assertEqual(other, result, f"stopped in {calls[n][0]}")
                self.assertCountEqual(map(str, others), map(str, calls), calls[n][0])
        return result, calls

    async def test_an_order_pipeline_with_depends_and_concurrent(self):
        source = """
            from workers import Response, WorkerEntrypoint, WorkflowEntrypoint


            class Flow(WorkflowEntrypoint):
                async def run(self, event, step):
                    order = event["payload"]

                    @step.do("validate order")
                    async def validate():
                        if not order["items"]:
                            raise ValueError("empty order")
                        return {"id": order["id"], "total": sum(i["price"] for i in order["items"])}

                    @step.do("check inventory", depends=[validate])
                    async def inventory(valid):
                        return await self.env.STOCK.reserve(valid["id"])

                    @step.do(
                        "charge card",
                        depends=[validate],
                        config={
                            "retries": {"limit": 3, "delay": "10 seconds", "backoff": "linear"},
                            "timeout": "30 seconds",
                        },
                    )
                    async def payment(valid):
                        return await self.env.PAYMENTS.charge(valid["id"], valid["total"])

                    @step.do("create shipment", depends=[inventory, payment], concurrent=True)
                    async def ship(stock, charge):
                        return await self.env.SHIPPING.create(stock["bin"], charge["receipt"])

                    label = await ship()
                    await step.sleep("cool down", "3 hours")

                    @step.do("send mail", depends=[ship, payment])
                    async def mail(label, charge):
                        await self.env.MAIL.send(label, charge["receipt"])
                        return f"sent {label}"

                    total = (await validate())["total"]
                    return {"label": label, "mail": await mail(), "total": total}


            class Default(WorkerEntrypoint):
                async def fetch(self, request):
                    instance = await self.env.FLOW.create(id="i", params=request)
                    return Response.json({"id": instance.id}) if request is None else Response("ok")
            """
        failures = iter(())

        def charge(id, total):
            if next(failures, None):
                raise ConnectionError("card network")
            return {"receipt": f"r-{total}"}

        answers = {
            "STOCK.reserve": {"bin": "A7"},
            "PAYMENTS.charge": charge,
            "SHIPPING.create": lambda bin, receipt: f"{bin}/{receipt}",
            "MAIL.send": None,
        }
        order = {"id": "o1", "items": [{"price": 2}, {"price": 5}]}
        result, calls = await self.everywhere(source, answers, order)
        self.assertEqual(result, {"label": "A7/r-7", "mail": "sent A7/r-7", "total": 7})
        names = ["PAYMENTS.charge", "STOCK.reserve", "SHIPPING.create", "MAIL.send"]
        self.assertCountEqual([name for name, *_ in calls], names)
        failures = iter([1, 1])
        again, calls = await self.once(source, answers, order, None, False)
        self.assertEqual((again, len(calls)), (result, 6), "the card is charged at the third try")

    async def test_image_processing_with_a_bucket_a_model_and_a_confirmation(self):
        source = """
            from typing import Any

            from workers import WorkflowEntrypoint


            class Flow(WorkflowEntrypoint):
                async def run(self, event: dict[str, Any], step) -> dict:
                    key = event["payload"]["imageKey"]

                    @step.do()
                    async def image():
                        return await self.env.BUCKET.get(key)

                    @step.do(config={"retries": {"limit": 2, "delay": "5 seconds"}})
                    async def description(image):
                        answer = await self.env.AI.run("@cf/llava", list(image[:4]))
                        return answer["description"]

                    @step.do(concurrent=True)
                    async def tags(description, image, ctx):
                        return {
                            "words": description.split(),
                            "size": len(image),
                            "step": ctx["step"]["name"],
                        }

                    await tags()
                    confirm = await step.wait_for_event(
                        "await confirmation", "image-approved", timeout="24 hours"
                    )
                    if not confirm["payload"]["approved"]:
                        return {"published": False}

                    @step.do("publish")
                    async def publish(tags, description):
                        await self.env.BUCKET.put(f"public/{key}", description)
                        return tags

                    return {"published": True, "by": confirm["payload"]["by"]} | await publish()
            """

        async def run_model(model, head):
            approval = {"approved": True, "by": "ana"}
            await self.instance.send_event({"type": "image-approved", "payload": approval})
            return {"description": "a red fox"}

        answers = {
            "BUCKET.get": b"\xff\xd8image",
            "BUCKET.put": None,
            "AI.run": run_model,
        }
        result, calls = await self.everywhere(source, answers, {"imageKey": "fox"})
        tags = {"words": ["a", "red", "fox"], "size": 7, "step": "tags"}
        self.assertEqual(result, {"published": True, "by": "ana"} | tags)
        run = ("AI.run", "@cf/llava", [255, 216, 105, 109])
        put = ("BUCKET.put", "public/fox", "a red fox")
        self.assertEqual(calls, [("BUCKET.get", "fox"), run, put])

    async def test_a_saga_that_compensates_in_reverse_order(self):
        source = """
            from workers import WorkflowEntrypoint
            from workers.workflows import NonRetryableError


            class Flow(WorkflowEntrypoint):
                async def run(self, event, step):
                    trip = event["payload"]["trip"]
                    compensations = []

                    def book(kind):
                        @step.do(f"book {kind}")
                        async def booking():
                            return await self.env.TRAVEL.book(kind, trip)

                        @step.do(f"cancel {kind}", depends=[booking])
                        async def cancel(reference):
                            await self.env.TRAVEL.cancel(reference)
                            return reference

                        return booking, cancel

                    try:
                        for kind in ("flight", "hotel", "car"):
                            booking, cancel = book(kind)
                            await booking()
                            compensations.append(cancel)
                            await step.sleep(f"after {kind}", "1 hour")
                    except NonRetryableError as error:
                        undone = [await cancel() for cancel in reversed(compensations)]
                        return {"status": "compensated", "undone": undone, "why": str(error)}
                    return {"status": "booked"}
            """

        def book(kind, trip):
            if kind == "car":
                raise NonRetryableError("no cars left")
            return f"{kind}-{trip}"

        answers = {"TRAVEL.book": book, "TRAVEL.cancel": None}
        result, calls = await self.everywhere(source, answers, {"trip": 7})
        undone = ["hotel-7", "flight-7"]
        self.assertEqual(result, {"status": "compensated", "undone": undone, "why": "no cars left"})
        booked = [("TRAVEL.book", kind, 7) for kind in ("flight", "hotel", "car")]
        self.assertEqual(calls, [*booked, *(("TRAVEL.cancel", one) for one in undone)])

    async def test_an_approval_with_a_reminder(self):
        source = """
            import json
            from datetime import timedelta

            from workers import WorkflowEntrypoint


            class Flow(WorkflowEntrypoint):
                async def run(self, event, step):
                    request = event["payload"]

                    @step.do("ask for approval")
                    async def ask():
                        await self.env.MAIL.ask(json.dumps(request, sort_keys=True))
                        return {"asked": request["who"]}

                    await ask()
                    decision, reminders = None, 0
                    while decision is None and reminders < 3:
                        try:
                            decision = await step.wait_for_event(
                                f"wait for decision {reminders}", "decision", timeout="2 hours"
                            )
                        except Exception:
                            reminders += 1

                            @step.do(f"remind {reminders}", depends=[ask])
                            async def remind(asked, ctx):
                                await self.env.MAIL.remind(asked["asked"], ctx["attempt"])

                            await remind()
                    if decision is None:
                        return "expired"

                    moment = decision["timestamp"] + timedelta(hours=1)
                    await step.sleep_until("an hour later", moment)

                    @step.do()
                    async def finish(ask):
                        return [ask["asked"], decision["payload"]["verdict"], reminders]

                    return await finish()
            """
        reminded = itertools.count(1)

        async def remind(who, attempt):
            if next(reminded) % 2 == 0:
                payload = {"verdict": "yes"}
                await self.instance.send_event({"type": "decision", "payload": payload})

        answers = {"MAIL.ask": None, "MAIL.remind": remind}
        params = {"who": "ana", "amount": 5}
        result, calls = await self.everywhere(source, answers, params)
        self.assertEqual(result, ["ana", "yes", 2])
        asked = ("MAIL.ask", '{"amount": 5, "who": "ana"}')
        self.assertEqual(calls, [asked, *[("MAIL.remind", "ana", 1)] * 2])
        answers["MAIL.remind"] = None
        result, calls = await self.everywhere(source, answers, params)
        self.assertEqual((result, len(calls)), ("expired", 4))

    async def test_a_fan_out_over_pages_with_gather(self):
        source = """
            import asyncio

            from workers import WorkflowEntrypoint


            class Flow(WorkflowEntrypoint):
                async def run(self, event, step):
                    @step.do("list pages")
                    async def pages():
                        return await self.env.DB.list(self.env.REGION)

                    def fetch(page):
                        @step.do(f"fetch {page}", config={"retries": {"limit": 1, "delay": 1000}})
                        async def body():
                            rows = await self.env.DB.rows(page)
                            return {"page": page, "rows": rows}

                        return body

                    fetchers = [fetch(page) for page in await pages()]
                    results = await asyncio.gather(*[fetcher() for fetcher in fetchers])
                    await step.sleep("let it settle", "90 minutes")

                    @step.do("totals", depends=fetchers, concurrent=True)
                    async def totals(first, second, third):
                        return sum(len(page["rows"]) for page in (first, second, third))

                    @step.do("store")
                    async def store(totals):
                        await self.env.DB.store(totals)

                    await store()
                    return [[r["page"], len(r["rows"])] for r in results] + [await totals()]
            """
        answers = {
            "DB.list": lambda region: [f"{region}-{n}" for n in range(3)],
            "DB.rows": lambda page: [0] * (int(page[-1]) + 1),
            "DB.store": None,
        }
        result, calls = await self.everywhere(source, answers)
        self.assertEqual(result, [["eu-0", 1], ["eu-1", 2], ["eu-2", 3], 6])
        rows = [("DB.rows", f"eu-{n}") for n in range(3)]
        self.assertCountEqual(calls, [("DB.list", "eu"), *rows, ("DB.store", 6)])

    async def test_an_error_that_must_not_be_retried_and_one_that_escapes(self):
        source = """
            from workers import Response, WorkerEntrypoint, WorkflowEntrypoint, handler
            from workers.workflows import NonRetryableError


            class Declined(NonRetryableError):
                pass


            class Flow(WorkflowEntrypoint):
                async def run(self, event, step):
                    @step.do("flaky", config={"retries": {"limit": 2, "delay": "1 second"}})
                    async def flaky(ctx):
                        await self.env.LOG.write(f"attempt {ctx['attempt']}")
                        if ctx["attempt"] < 3:
                            raise Exception("Intended error")
                        return ctx["attempt"]

                    attempts = await flaky()

                    @step.do("declined")
                    async def declined(flaky):
                        await self.env.LOG.write("declined")
                        raise Declined("card declined")

                    @step.do("notify", depends=[declined])
                    async def notify(result):
                        await self.env.LOG.write("never")

                    try:
                        await notify()
                    except Declined as e:
                        await self.env.LOG.write(f"{type(e).__name__}: {e} after {attempts}")

                    await step.sleep("a while", "2 hours")

                    @step.do()
                    async def last():
                        raise NonRetryableError("Intended")

                    await last()


            @handler
            async def on_fetch(request, env):
                return Response("hello")


            class Default(WorkerEntrypoint):
                async def fetch(self, request):
                    batch = [{"id": "i", "params": {"n": 1}}]
                    (instance,) = await self.env.FLOW.create_batch(batch)
                    status = await instance.status()
                    return Response(f"{instance.id} is {status['status']}")
            """
        result, calls = await self.once(source, {"LOG.write": None}, None, None, True)
        shown = {"name": "NonRetryableError", "message": "Intended"}
        self.assertEqual(result, ["NonRetryableError", "Intended", shown])
        said = "Declined: card declined after 3"
        steps = [("LOG.write", f"attempt {n}") for n in (1, 2, 3)] + [("LOG.write", "declined")]
        self.assertEqual([call for call in calls if call[1] != said], steps, "each once")
        self.assertIn(("LOG.write", said), calls, "outside of steps: in each life")


# --------------------------------------------------------------------------------------------------
# Schedules: pure computing.


def moment(text: str) -> int:
    """Milliseconds of a time in UTC."""
    when = datetime.fromisoformat(text)
    return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)


class Cron(unittest.TestCase):
    def times(self, text: str, start: str, count: int) -> list[str]:
        """The next times, to the minute."""
        cron, ms, times = workflows.Cron(text), moment(start), []
        for _ in range(count):
            ms = cron.next(ms)
            times.append(datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M"))
        return times

    def refused(self, text: Any, *words: str) -> None:
        with self.subTest(text), self.assertRaises(ValueError) as caught:
            workflows.Cron(text)
        for word in (repr(text), *words):
            self.assertIn(word, str(caught.exception))

    def test_next_is_later_and_last_is_not_later(self) -> None:
        cron, nine, day = workflows.Cron("0 9 * * *"), moment("2026-03-02 09:00"), 86_400_000
        for ms, last, following in (
            (nine - 1, nine - day, nine),
            (nine, nine, nine + day),
            (nine + 1, nine, nine + day),
        ):
            self.assertEqual((cron.last(ms), cron.next(ms)), (last, following))

    def test_a_field_is_a_number_a_range_a_step_or_a_list(self) -> None:
        for minutes, expected in (
            ("7", [7]),
            ("07", [7]),
            ("5-8", [5, 6, 7, 8]),
            ("*/20", [0, 20, 40]),
            ("10-20/4", [10, 14, 18]),
            ("50/4", [50, 54, 58]),
            ("30,5-6,*/30", [0, 5, 6, 30]),
        ):
            with self.subTest(minutes):
                days = [f"2026-03-02 09:{minute:02}" for minute in expected]
                times = self.times(f"{minutes} 9 2 3 *", "2026-01-01", len(days) + 1)
                self.assertEqual(times[:-1], days)
                self.assertEqual(times[-1][:10], "2027-03-02")

    def test_months_and_days_have_names_in_any_case(self) -> None:
        for text in ("0 0 * jan,DEC Mon-wed", "0 0 * 1,12 2-4"):
            times = self.times(text, "2026-01-28 00:00", 2)
            self.assertEqual(times, ["2026-12-01 00:00", "2026-12-02 00:00"])

    def test_1_is_sunday_and_7_is_saturday(self) -> None:
        for number, name, day in (("1", "SUN", "04"), ("2", "MON", "05"), ("7", "SAT", "10")):
            for text in (number, name):
                times = self.times(f"0 17 * * {text}", "2026-01-03 18:00", 1)
                self.assertEqual(times, [f"2026-01-{day} 17:00"])

    def test_where_both_kinds_of_days_are_restricted_one_is_enough(self) -> None:
        for text, days in (
            ("0 0 13 * FRI", ["13", "16", "23"]),
            ("0 0 * * FRI", ["16", "23", "30"]),
            ("0 0 */2 * FRI", ["11", "13", "15"]),
            ("0 0 */10 * FRI", ["11", "16", "21"]),  # a step is a restriction, too
        ):
            with self.subTest(text):
                times = self.times(text, "2026-01-10 00:00", 3)
                self.assertEqual(times, [f"2026-01-{day} 00:00" for day in days])

    def test_29_february_comes_in_leap_years_only(self) -> None:
        cron = workflows.Cron("30 12 29 FEB *")
        times = self.times(cron.text, "2095-01-01", 2)
        self.assertEqual(times, ["2096-02-29 12:30", "2104-02-29 12:30"])
        self.assertEqual(cron.last(moment("2104-02-29 12:29")), moment("2096-02-29 12:30"))

    def test_the_last_time_may_have_been_before_1970(self) -> None:
        self.assertEqual(workflows.Cron("* * * * *").last(59_999), 0)
        for text, last in (("0 9 * * *", "1969-12-31 09:00"), ("0 0 29 2 *", "1968-02-29 00:00")):
            self.assertEqual(workflows.Cron(text).last(59_999), moment(last))

    def test_what_never_comes_is_refused(self) -> None:
        for text in ("0 0 30 2 *", "0 0 31 2,4,6,9,11 *"):
            self.refused(text, "never comes")
        self.assertEqual(self.times("0 0 30 2 MON", "2026-01-01", 1), ["2026-02-02 00:00"])

    def test_anything_else_is_refused_with_the_field_and_what_was_expected(self) -> None:
        for text in ("", "* * * *", "* * * * * *", "@daily", 5, None, b"* * * * *"):
            self.refused(text, "five fields, minute, hour, day of month, month, day of week")
        for n, field, expected, items in (
            (0, "minute", "0 to 59", "60 -1 1.5 x 5-3 1-2-3 */0 */60 */x 5/ 1/2/3 *5 *-5 007 ٣ 1,"),
            (1, "hour", "0 to 23", "24 */24 MON 1-24"),
            (2, "day of month", "1 to 31", "0 32 ? L W LW 15W"),
            (3, "month", "1 to 12 or JAN to DEC", "0 13 january JAN-13 DEC-JAN ſep"),
            (4, "day of week", "1 to 7 or SUN to SAT", "0 8 6L FRIL MON#2 friday SAT-SUN"),
        ):
            for item in items.split():
                fields = ["*"] * 5
                fields[n] = item
                self.refused(" ".join(fields), f"{field} is ", f"expected *, {expected}, ")

    def test_its_text_has_one_blank_between_two_fields(self) -> None:
        self.assertEqual(workflows.Cron(" 0\t9  * *\nMON ").text, "0 9 * * MON")

    def test_its_times_are_those_that_a_search_finds(self) -> None:
        chance = random.Random(1)
        spans = ((0, 59), (0, 23), (1, 31), (1, 12), (1, 7))
        days = [datetime(2027, 1, 1, tzinfo=UTC) + timedelta(n) for n in range(3 * 365)]

        def comes(day: datetime) -> bool:
            any_day, any_weekday = texts[2] == "*", texts[4] == "*"
            in_month, in_week = day.day in sets[2], (day.weekday() + 1) % 7 + 1 in sets[4]
            if any_day or any_weekday:
                return (any_day or in_month) and (any_weekday or in_week)
            return in_month or in_week

        for _ in range(80):
            sets = [sorted({*chance.choices(range(a, b + 1), k=2)}) for a, b in spans]
            texts = [",".join(map(str, numbers)) for numbers in sets]
            for n in (2, 4):
                texts[n] = chance.choice(["*", texts[n]])
            expected = [
                round(day.timestamp() + 3600 * hour + 60 * minute) * 1000
                for day in days
                if day.month in sets[3] and comes(day)
                for hour, minute in itertools.product(sets[1], sets[0])
            ]
            with self.subTest(" ".join(texts)):
                cron, ms = workflows.Cron(" ".join(texts)), moment("2026-12-31 23:59")
                for last, following in itertools.pairwise([None, *expected]):
                    ms = cron.next(ms)
                    self.assertEqual(ms, following)
                    self.assertIn(last, (None, cron.last(ms - 1)))

    def test_nothing_but_a_value_error_comes_of_any_text(self) -> None:
        chance, legal = random.Random(2), 0
        fitting = ["*", "*/2", "1-5", "2", "1,3"]
        odd = [*fitting, "mon", "FEB", "31", ",", "/", "-", "L", "#", " ", "\ud800"]
        for _ in range(2000):
            fields = chance.choices(fitting, k=5)
            fields[chance.randrange(5)] = "".join(chance.choices(odd, k=chance.randint(0, 3)))
            with contextlib.suppress(ValueError):
                cron = workflows.Cron(" ".join(fields))
                self.assertEqual(cron.last(cron.next(0)), cron.next(0))
                legal += 1
        self.assertGreater(legal, 5)


# --------------------------------------------------------------------------------------------------
# Configuration: files of wrangler, and what `bind` takes of them.

MAIN = """
import helper
from workers import WorkflowEntrypoint
from workers.workflows import NonRetryableError

class Mine(NonRetryableError):
    pass

class MyWorkflow(WorkflowEntrypoint):
    async def run(self, event, step):
        import late
        if event.payload == "fail":
            raise Mine("intended")
        return [self.env.GREETING, helper.NAME, late.NAME]

class Second(WorkflowEntrypoint):
    async def run(self, event, step):
        return "second"

class NoWorkflow:
    pass
"""

JSONC = """
// Comments are legal, and so are commas at the end of a list.
{
    "name": "my-worker", "$schema": "http://x/*", "triggers": {"crons": []},
    "main": "src/main.py", /* relative to
                              this file */
    "vars": {"GREETING": "hello // you, }"},
    "limits": {"cpu_ms": 5000, "subrequests": 5,},
    "workflows": [{
        "name": "my-workflow", "binding": "FLOW", "class_name": "MyWorkflow",
        "limits": {"steps": 20000}, "concurrency": {"limit": 3}, "jurisdiction": "eu",
        "schedules": ["0 9 * * MON", "0 0 1 * *"],
        "default_retention": {"success_retention": "3 days", "error_retention": 5000},
    },],
}
"""

TOML = """
name = "my-worker"
main = "src/main.py" # relative to this file
vars = { GREETING = "hello // you, }" }
limits.cpu_ms = 5000
triggers.crons = []

[[workflows]]
name = "my-workflow"
binding = "FLOW"
class_name = "MyWorkflow"
limits = { steps = 20_000 }
concurrency = { limit = 3 }
jurisdiction = "eu"
schedules = ["0 9 * * MON", "0 0 1 * *"]

[workflows.default_retention]
success_retention = "3 days"
error_retention = 5000
"""


class Replaying(Case):
    """13.3: would an instance go on as recorded, with the code of now?"""

    async def report(self, old: Callable[..., Any], new: Callable[..., Any], **options: Any) -> Any:
        """The report on an instance that `old` has begun, by a process that has `new`."""
        async with self.engine() as engine:
            instance = await engine.bind(workflow(old)).create(id="i")
            await self.clock.advance(options.pop("advance", "2 seconds"))
            for act in options.pop("acts", ()):
                await act(instance)
                await self.clock.settle()
        before = self.rows("SELECT * FROM journal"), self.rows("SELECT * FROM instances")
        async with self.engine() as engine:
            bound = await engine.workflow("test")
            bound.cls = workflow(new)

            async def replay_all() -> list[bool]:
                return [each.safe async for each in bound.replay_all()]

            report, safe = await asyncio.gather(bound.replay("i"), replay_all())
            self.assertEqual(safe, [report.safe])
        after = self.rows("SELECT * FROM journal"), self.rows("SELECT * FROM instances")
        self.assertEqual(before, after)
        return report

    async def test_it_needs_the_class(self) -> None:
        async with self.engine() as engine:
            await engine.bind(workflow(one_sleep)).create(id="i")
        async with self.engine() as engine:
            bound = await engine.workflow("test")
            with self.assertRaisesRegex(RuntimeError, "'test' is not bound here"):
                await bound.replay("i")
            with self.assertRaisesRegex(RuntimeError, "'test' is not bound here"):
                bound.replay_all()

    def found(self, report: Any) -> list[Any]:
        return [report.reached, report.unreached, report.new, report.early, report.outcome]

    @staticmethod
    def steps(*names: str, ran: bool = True) -> Callable[..., Any]:
        """A `run` that does these steps; "zzz" is a sleep."""

        async def fails() -> None:
            raise AssertionError("a callback runs")

        async def run(event: Any, step: Any) -> None:
            for name in names:
                if name == "zzz":
                    await step.sleep(name, "1 day")
                else:
                    await step.do(name, returns(1) if ran else fails)

        return run

    async def test_a_run_that_ends_or_cancels_itself_is_quiet_and_nothing_is_written(self) -> None:
        async def ends(event: Any, step: Any) -> str:
            await step.do("a", returns(1))
            return "done"

        async def cancels_itself(event: Any, step: Any) -> None:
            await step.do("a", returns(1))
            task: Any = asyncio.current_task()
            task.cancel()
            await asyncio.sleep(0)

        with self.assertNoLogs("asyncio"):
            for new, outcome in ((ends, "complete"), (cancels_itself, "complete")):
                self.setUp()
                report = await self.report(self.steps("a", "zzz"), new)
                self.assertEqual(report.outcome, outcome)
                await asyncio.sleep(0)

    async def check(self, old: str, new: str, *expected: Any) -> Any:
        report = await self.report(self.steps(*old.split()), self.steps(*new.split(), ran=False))
        self.assertEqual(self.found(report), [e.split() for e in expected[:4]] + ["waiting"])
        self.assertEqual(report.safe, not (expected[1] or expected[3]))
        return report

    async def test_the_same_code_is_safe_and_no_callback_runs(self) -> None:
        await self.check("a b zzz c", "a b zzz c", "a-1 b-1 zzz-1", "", "", "")

    async def test_a_busy_loop_is_no_sign_that_nothing_more_comes(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await asyncio.gather(*(step.do(name, returns(1)) for name in "abc"))
            await step.sleep("zzz", "1 day")

        async def be_busy() -> None:
            while True:
                time.sleep(0.015)
                await asyncio.sleep(0)

        async with self.engine() as engine:
            await engine.bind(workflow(run)).create(id="i")
            await self.clock.settle()
            busy = asyncio.create_task(be_busy())
            report = await engine.env.TEST.replay("i")
            busy.cancel()
        self.assertEqual((report.unreached, report.new, report.outcome), ([], [], "waiting"))

    async def test_a_step_behind_what_is_recorded_is_safe(self) -> None:
        await self.check("a zzz", "a zzz b", "a-1 zzz-1", "", "", "")

    async def test_a_step_before_what_is_recorded_is_not(self) -> None:
        await self.check("a zzz", "new a zzz", "", "a-1 zzz-1", "new-1", "new-1")

    async def test_a_renamed_step_is_a_new_one(self) -> None:
        await self.check("a zzz", "b zzz", "", "a-1 zzz-1", "b-1", "b-1")

    async def test_a_removed_step_is_not_reached(self) -> None:
        await self.check("a b zzz", "a zzz", "a-1 zzz-1", "b-1", "", "")

    async def test_the_order_of_parallel_steps_may_change(self) -> None:
        def together(*names: str) -> Callable[..., Any]:
            async def run(event: Any, step: Any) -> None:
                await asyncio.gather(*(step.do(name, returns(1)) for name in names))
                await step.sleep("zzz", "1 day")

            return run

        report = await self.report(together("a", "b"), together("b", "a"))
        self.assertEqual(self.found(report), [["b-1", "a-1", "zzz-1"], [], [], [], "waiting"])
        self.assertTrue(report.safe)

    async def test_another_branch_and_an_error_are_told(self) -> None:
        async def broken(event: Any, step: Any) -> None:
            await step.do("a", returns(1))
            raise LookupError("no such branch")

        report = await self.report(self.steps("a", "zzz"), broken)
        self.assertEqual(self.found(report), [["a-1"], ["zzz-1"], [], [], "errored"])
        self.assertEqual(report.error, {"name": "LookupError", "message": "no such branch"})
        self.assertFalse(report.safe)

    async def test_a_changed_configuration_is_safe(self) -> None:
        def configured(limit: int) -> Callable[..., Any]:
            async def run(event: Any, step: Any) -> None:
                await step.do("a", constant(limit, "1 day"), raises(ValueError()))

            return run

        report = await self.report(configured(1), configured(2))
        self.assertEqual((self.found(report)[0], report.safe), (["a-1"], True))

    async def test_a_failed_instance_may_fail_again_also_in_its_rollback(self) -> None:
        async def run(event: Any, step: Any) -> None:
            slow = constant(3, "1 day")
            undo = raises(ValueError())
            handler = {"rollback": lambda info: undo(), "rollbackConfig": slow}
            await step.do("a", returns(1), handler)
            raise KeyError("k")

        report = await self.report(run, run)
        self.assertEqual((report.outcome, report.reached, report.safe), ("errored", ["a-1"], True))

    async def test_a_terminated_instance_that_is_rolled_back_had_not_failed(self) -> None:
        def sleeps_or_fails(error: Exception | None) -> Callable[..., Any]:
            async def run(event: Any, step: Any) -> None:
                undo = raises(ValueError())
                handler = {
                    "rollback": lambda info: undo(),
                    "rollbackConfig": constant(3, "1 day"),
                }
                nap = asyncio.create_task(step.sleep("zzz", "1 day"))
                await step.do("a", returns(1), handler)
                if error is not None:
                    raise error
                await nap

            return run

        acts = [lambda instance: instance.terminate(rollback=True)]
        old, new = sleeps_or_fails(None), sleeps_or_fails(KeyError("k"))
        report = await self.report(old, new, acts=acts)
        self.assertEqual((report.outcome, report.unreached), ("errored", []))
        self.assertFalse(report.safe)

    async def test_a_call_that_run_has_cancelled_is_cancelled_again(self) -> None:
        async def run(event: Any, step: Any) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await step.do("slow", asyncio.Event().wait)
            await step.do("after", returns(1))
            await step.sleep("zzz", "1 day")

        async def wait(instance: Any) -> None:
            await asyncio.sleep(0.1)

        report = await self.report(run, run, acts=[wait])
        self.assertEqual(report.reached, ["slow-1", "after-1", "zzz-1"])
        self.assertTrue(report.safe)

    async def test_a_run_that_awaits_something_of_its_own_is_given_up(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", returns(1))
            await asyncio.Event().wait()

        with unittest.mock.patch.object(workflows, "SILENCE", 0.1):
            report = await self.report(run, run)
        self.assertEqual((report.outcome, report.safe), ("waiting", True))
        self.assertIn("something of its own", report.error["message"])

    async def test_an_unknown_instance_is_not_found(self) -> None:
        async with self.engine() as engine:
            await self.assertCode("instance.not_found", engine.bind(workflow(one_step)).replay("i"))

    async def test_each_unfinished_instance_has_one_report_whatever_happens_meanwhile(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_sleep))
            await bound.create_batch([{"id": id} for id in "abcd"])
            await self.clock.settle()
            await (await bound.get("d")).terminate()
            await (await bound.get("c")).pause()
            seen = []
            async for report in bound.replay_all():
                seen.append(report.instance_id)
                await (await bound.get("a")).pause()
        self.assertEqual(seen, ["c", "b", "a"])


class Scheduled(Case):
    """12.6: instances that begin at their times, each once."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = ManualClock(datetime(2026, 3, 2, 12, 0, tzinfo=UTC))  # a Monday

    async def ids(self, bound: Any) -> list[str]:
        return [instance.id async for instance in bound.list()]

    @contextlib.asynccontextmanager
    async def scheduled(self, *crons: str, run: Any = one_step, **options: Any) -> Any:
        async with self.engine(**options) as engine:
            yield engine.bind(workflow(run), schedules=crons)

    def times(self, cron: str, *days: int) -> list[str]:
        """The ids of 9 o'clock on these days of March, newest first."""
        moments = [datetime(2026, 3, day, 9, tzinfo=UTC) for day in days]
        return [f"{cron}-{int(moment.timestamp() * 1000)}" for moment in moments]

    async def test_an_instance_begins_at_each_time_and_knows_its_schedule(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            return [event.payload, event.schedule.cron, event["schedule"]["scheduledTime"]]

        async with self.scheduled("0 9 * * *", run=run) as bound:
            await self.clock.advance("3 days")
            ids = await self.ids(bound)
            self.assertEqual(ids, self.times("0 9 * * *", 5, 4, 3))
            at = int(ids[0].rpartition("-")[2])
            instance = workflows.WorkflowInstance(bound, ids[0])
            self.assertEqual(await instance.result(), [{}, "0 9 * * *", at])
            await instance.restart()
            await self.clock.settle()
            self.assertEqual(await instance.result(), [{}, "0 9 * * *", at])
        self.assertEqual({(t,) for (t,) in self.rows("SELECT trigger FROM instances")}, {("cron",)})

    async def test_others_have_no_schedule(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            return [event.schedule, event.get("schedule"), [*event], len(event)]

        keys = ["payload", "timestamp", "instanceId", "workflowName"]
        self.assertEqual(await self.outcome(run), [None, None, keys, 4])

    async def test_times_that_passed_while_nothing_ran_are_made_up_for_once(self) -> None:
        async with self.scheduled("0 9 * * *"):
            await self.clock.settle()
        self.clock._now += 10 * 86_400_000
        for _ in range(2):
            async with self.scheduled("0 9 * * *") as bound:
                await self.clock.settle()
                self.assertEqual(await self.ids(bound), self.times("0 9 * * *", 12))

    async def test_a_schedule_that_is_bound_no_more_is_forgotten(self) -> None:
        async with self.scheduled("0 9 * * *", "0 9 * * MON"):
            await self.clock.settle()
        async with self.scheduled("0 9 * * *"):
            await self.clock.advance("8 days")
        async with self.scheduled("0 9 * * *", "0 9 * * MON") as bound:
            await self.clock.settle()
            self.assertEqual(
                [id for id in await self.ids(bound) if "MON" in id], [], "nothing is made up for"
            )
            await self.clock.advance("7 days")
            mondays = [id for id in await self.ids(bound) if "MON" in id]
        self.assertEqual(mondays, self.times("0 9 * * MON", 16))

    async def test_only_the_owner_fires(self) -> None:
        async with self.scheduled("0 9 * * *") as bound, self.scheduled("0 9 * * *"):
            await self.clock.advance("2 days")
            self.assertEqual(await self.ids(bound), self.times("0 9 * * *", 4, 3))

    async def test_a_clock_that_is_set_back_silences_no_schedule(self) -> None:
        self.clock._now += 365 * 86_400_000
        async with self.scheduled("0 9 * * *"):
            await self.clock.settle()
        self.clock._now -= 365 * 86_400_000
        async with self.scheduled("0 9 * * *") as bound:
            await self.clock.advance("1 day")
            self.assertEqual(await self.ids(bound), self.times("0 9 * * *", 3))

    async def test_no_limit_of_the_queue_stops_it(self) -> None:
        limits = dataclasses.replace(FOREVER, queued=0, running=0)
        async with self.scheduled("0 9 * * *", limits=limits) as bound:
            await self.clock.advance("1 day")
            self.assertEqual(len(await self.ids(bound)), 1)

    async def test_running_bounds_the_instances_of_one_workflow(self) -> None:
        gate = Gate()
        async with self.engine() as engine:
            bound = engine.bind(workflow(gate.run), running=2)
            other = engine.bind(workflow(one_step, "Other"))
            await bound.create_batch([{"id": f"i{n}"} for n in range(4)])
            await (await other.create(params=1)).result()
            self.assertEqual(gate.begun, ["i0", "i1"])
            gate.open.set()
            await self.clock.settle()
            self.assertEqual(len(gate.begun), 4)


class Configuration(Case):
    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(sys.path.__setitem__, slice(None), sys.path[:])
        self.addCleanup(self.forget)
        self.write("src/main.py", MAIN)
        self.write("src/helper.py", "NAME = 'helper'")
        self.write("src/late.py", "NAME = 'late'")

    def forget(self) -> None:
        """The modules that were loaded from our folder, and the shim: as in a new process."""
        for name, module in [*sys.modules.items()]:
            file = getattr(module, "__file__", None) or ""
            if file.startswith(str(self.folder)) or name.startswith("workers"):
                del sys.modules[name]

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def load(self, given: Any, name: str = "wrangler.jsonc", **options: Any) -> Engine:
        text = given if isinstance(given, (str, bytes)) else json.dumps(given)
        options = {"database": self.path, "clock": self.clock} | options
        return Engine.from_config(self.write(name, text), **options)

    def given(self, **settings: Any) -> dict[str, Any]:
        """A configuration with one workflow."""
        entry = {"name": "flow", "binding": "FLOW", "class_name": "MyWorkflow"} | settings
        return {"main": "src/main.py", "workflows": [entry]}

    def refused(self, given: Any, *words: str, name: str = "wrangler.jsonc") -> ValueError:
        """The error that refuses it, which names the file and has these words."""
        with self.subTest(given), self.assertRaises(ValueError) as caught:
            self.load(given, name)
        self.assertIs(type(caught.exception), ValueError)
        for word in (f"{self.folder / name}: ", *words):
            self.assertIn(word, str(caught.exception))
        return caught.exception

    async def test_a_file_of_wrangler_makes_an_engine(self) -> None:
        for name, text in (
            ("wrangler.jsonc", JSONC),
            ("other.json", JSONC),
            ("wrangler.toml", TOML),
            ("with-a-mark.jsonc", b"\xef\xbb\xbf" + JSONC.encode()),
        ):
            with self.subTest(name):
                engine = self.load(text, name)
                bound = engine.env.FLOW
                self.assertEqual((bound.name, bound.steps), ("my-workflow", 20_000))
                self.assertEqual(bound.running, 3)
                self.assertEqual([c.text for c in bound.schedules], ["0 9 * * MON", "0 0 1 * *"])
                self.assertEqual(bound.retention, (3 * 86_400_000, 5000))
                self.assertEqual(engine.limits, dataclasses.replace(Limits(), cpu_ms=5000))
                async with engine:
                    result = await self.finish(await bound.create())
                self.assertEqual(result, ["hello // you, }", "helper", "late"])

    def spoiled(self, chance: random.Random, value: Any) -> Any:
        """A configuration in which something else stands here and there."""
        odd = (
            None,
            True,
            0,
            -1,
            1.5,
            10**30,
            "",
            "main.py",
            "/etc/passwd",
            "\0",
            "\ud800",
            "* * * * *",
        )
        if chance.random() < 0.03:
            return chance.choice((*odd, [], {}, [1], {"a": 1}, float("inf"), "9" * 400))
        if isinstance(value, dict):
            kept = {key: part for key, part in value.items() if chance.random() < 0.98}
            kept |= {chance.choice((*value, "x")): 5} if chance.random() < 0.02 else {}
            return {key: self.spoiled(chance, part) for key, part in kept.items()}
        return [self.spoiled(chance, part) for part in value] if type(value) is list else value

    def test_whatever_the_file_says_it_is_taken_or_refused(self) -> None:
        chance, taken = random.Random(1), 0
        days = {"success_retention": "3 days", "error_retention": 5}
        settings = {"limits": {"steps": 9}, "schedules": ["0 9 * * MON"], "default_retention": days}
        given = self.given(**settings, concurrency={"limit": 5})
        given |= {"vars": {"K": "v"}, "limits": {"cpu_ms": 500}, "name": "shop"}
        given["exports"] = {
            "Second": {"type": "workflow", "name": "other"},
            "D": {"type": "worker"},
        }
        for n in range(500):
            text = json.dumps(self.spoiled(chance, given))
            for _ in range(chance.choice((0, 0, 0, 1, 2))):
                cut = chance.randrange(len(text))
                text = (
                    text[:cut]
                    + chance.choice('"/*,:[]{}\\\n\0\ufeff')
                    + text[cut + chance.randrange(2) :]
                )
            with self.subTest(n=n, text=text):
                try:
                    self.load(text)
                    taken += 1
                except ValueError as error:
                    self.assertIs(type(error), ValueError)
                    self.assertRegex(str(error), r"(?s)wrangler\.jsonc: .+")
        self.assertGreater(min(taken, 500 - taken), 50)

    def test_without_a_path_it_is_the_file_in_the_working_folder(self) -> None:
        with contextlib.chdir(self.folder):
            with self.assertRaisesRegex(ValueError, "wrangler.jsonc: can't be read"):
                Engine.from_config()
            for name in ("wrangler.toml", "wrangler.jsonc", "wrangler.json"):  # a later one counts
                text = TOML if name == "wrangler.toml" else JSONC
                binding = name.partition(".")[2].upper()
                self.write(name, text.replace("FLOW", binding))
                self.assertIn(binding, Engine.from_config().env)

    def test_what_it_does_not_say_is_as_the_limits_say(self) -> None:
        bound = self.load(self.given()).env.FLOW
        self.assertEqual((bound.steps, bound.running, bound.schedules), (1024, None, ()))
        self.assertEqual(bound.retention, (30 * 86_400_000,) * 2)

    def test_a_schedule_may_be_a_single_text(self) -> None:
        (cron,) = self.load(self.given(schedules="0 9 * * *")).env.FLOW.schedules
        self.assertEqual(cron.text, "0 9 * * *")

    def test_an_option_counts_before_a_var_and_limits_get_the_cpu_time(self) -> None:
        given = self.given() | {"vars": {"A": 1, "B": [2]}, "limits": {"cpu_ms": 7}}
        engine = self.load(given, env={"A": "mine", "C": 3}, limits=Limits.FREE)
        self.assertEqual([engine.env[key] for key in "ABC"], ["mine", [2], 3])
        self.assertEqual(engine.limits, dataclasses.replace(Limits.FREE, cpu_ms=7))

    def test_an_unknown_option_is_refused(self) -> None:
        with self.assertRaisesRegex(TypeError, "databases"):
            self.load(self.given(), databases="x")

    async def test_exports_declare_workflows_too(self) -> None:
        declared = {"type": "workflow", "name": "second", "limits": {"steps": 5}}
        others = {"Counter": {"type": "durable-object", "storage": "sqlite"}}
        others |= {"default": {"type": "worker", "cache": {"enabled": True}}}
        given = {"main": "src/main.py", "exports": {"Second": declared} | others}
        self.assertEqual([*self.load(given).env], ["SECOND"])
        # An entry of `workflows` may give it another binding.
        entry = {"name": "second", "binding": "S", "class_name": "Second", "schedules": "0 0 * * *"}
        engine = self.load(given | {"workflows": [entry]})
        self.assertEqual(([*engine.env], engine.env.S.steps), (["S"], 5))
        self.assertEqual(len(engine.env.S.schedules), 1)
        async with engine:
            self.assertEqual(await self.finish(await engine.env.S.create()), "second")
        of_the_same_class = given | {"workflows": [entry | {"name": "other"}]}
        self.assertEqual([*self.load(of_the_same_class).env], ["S", "SECOND"])
        both = given | {"workflows": [entry | {"limits": {"steps": 6}}]}
        self.assertEqual(self.load(both).env.S.steps, 6)
        other_class = given | {"workflows": [entry | {"class_name": "MyWorkflow"}]}
        self.refused(other_class, "exports.Second: name is 'second'")

    def test_another_script_is_a_module_beside_main(self) -> None:
        self.write("src/third-worker.py", "from main import Second\nclass Third(Second): pass")
        third = self.given(class_name="Third", script_name="third-worker")
        self.assertEqual(self.load(third).env.FLOW.cls.__module__, "third-worker")
        own = self.given(script_name="my-worker") | {"name": "my-worker"}
        self.assertEqual(self.load(own).env.FLOW.cls.__module__, "main")
        missing = str(self.folder / "src" / "fourth.py")
        fourth = self.given(script_name="fourth")
        self.refused(fourth, "workflows[0]: script_name: ", missing, "expected a Python file")

    async def test_its_errors_have_their_class_in_every_process(self) -> None:
        async with self.load(JSONC) as engine:
            instance = await engine.env.FLOW.create(id="i", params="fail")
            with self.assertRaisesRegex(NonRetryableError, "intended"):
                await self.finish(instance)
        self.forget()
        async with self.load(JSONC) as engine:
            with self.assertRaises(sys.modules["main"].Mine):
                await (await engine.env.FLOW.get("i")).result()

    def test_a_module_is_loaded_once(self) -> None:
        one, two = self.load(JSONC), self.load(TOML, "wrangler.toml")
        self.assertIs(one.env.FLOW.cls, two.env.FLOW.cls)
        self.assertEqual(sys.path.count(str((self.folder / "src").resolve())), 1)

    def test_a_module_is_found_however_new_it_is(self) -> None:
        self.load(self.given())
        folder = self.folder / "src"
        self.assertIsNone(importlib.util.find_spec("nothing_of_the_kind"))  # Python looks into it
        looked = folder.stat().st_mtime_ns
        self.write("src/new.py", MAIN)
        os.utime(folder, ns=(looked, looked))
        self.assertEqual(self.load(self.given(script_name="new")).env.FLOW.cls.__module__, "new")

    def test_a_file_that_cannot_be_read_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "missing.jsonc: can't be read: No such file"):
            Engine.from_config(str(self.folder / "missing.jsonc"))
        self.refused(b"\xff{}", "not JSON: 'utf-8'")
        self.refused("main: 5", "not JSON: ", name="wrangler.yaml")
        for text in ("[]", "5", "null"):
            self.refused(text, "expected an object")
        for bad in ("", "{", "{} {}", "[" * 100_000, '{"a": 1 /* }', "{'a': 1}"):
            self.refused(bad, "not JSON: ")
        self.refused("a = \n", "not TOML: ", "line 1, column 5", name="wrangler.toml")

    def test_an_error_is_where_it_stands_in_the_file(self) -> None:
        for text, place in (
            ('// one\n{"a": /* two\n */ ?}', "line 3 column 5"),
            ('{"a": [1, /* x */ ], "b" 5}', "line 1 column 26"),
            ('{"a": "// /*", "b": ☃}', "line 1 column 21"),
            ('{"a": [1,, 2]}', "line 1 column 10"),
            ('{"a": [1,,]}', "line 1 column 10"),
            ('{"a": [ , ]}', "line 1 column 9"),
            ('{"a": ,}', "line 1 column 7"),
        ):
            self.refused(text, place)

    def test_what_looks_like_a_comment_in_a_text_is_kept(self) -> None:
        for text, value in (
            (r'["// a", "/* b */", "\"// c", "\\", ",]", /*"*/ "d"] // "',
             ["// a", "/* b */", '"// c', "\\", ",]", "d"]),
            ('{"a,}": ",}",\n // , \n }', {"a,}": ",}"}),
            ("[[],/**/]//", [[]]),
            ("/*/ */ 1 /***/", 1),
        ):  # fmt: skip
            self.assertEqual(workflows.parse_jsonc(text), value)

    def test_each_mistake_is_named_by_its_key_with_what_was_expected(self) -> None:
        text, obj, count = "expected text", "expected an object", "expected a whole number from 1"
        main, given = {"main": "src/main.py"}, self.given()
        for wrong, *words in (
            ({}, "'main'", text),
            ({"main": 5}, "main is 5", text),
            (main, "no workflow"),
            (main | {"workflow": []}, "no workflow"),
            (main | {"workflows": {}}, "workflows is {}", "expected a list"),
            (main | {"workflows": [5]}, "workflows[0] is 5", obj),
            (main | {"workflows": [{}]}, "workflows[0] has no 'name'", text),
            (main | {"exports": []}, "exports is []", obj),
            (main | {"exports": {"A": 5}}, "exports.A is 5", obj),
            (main | {"exports": {"A": {}}}, "exports.A has no 'type'"),
            (main | {"exports": {"A": {"type": "workflows"}}}, "no workflow"),
            (main | {"exports": {"A": {"type": "workflow"}}}, "exports.A has no 'name'"),
            (given | {"vars": "x"}, "vars is 'x'", obj),
            (given | {"name": None}, "name is None", text),
            (given | {"limits": 5}, "limits is 5", obj),
            (
                given | {"limits": {"cpu_ms": 300_001}},
                "cpu_ms: the value is 300001",
                f"{count} to 300,",
            ),
            (given | {"main": "src/none.py"}, "main: ", "none.py", "a Python file"),
            (given | {"main": "src"}, "main: ", "a Python file"),
            (given | {"main": "src/main.ts"}, "main: ", "main.ts", "a Python file"),
        ):
            self.refused(wrong, *words)
        for key, value, *words in (
            ("name", 5, ".name is 5", text),
            ("name", "a b", "name is 'a b'", "1 to 64 letters"),
            ("binding", None, ".binding is None", text),
            ("binding", "MY-FLOW", "binding is 'MY-FLOW'", "MY_WORKFLOW"),
            ("class_name", ["x"], ".class_name is", text),
            ("class_name", "None", "class_name is 'None'", "expected a class of", "main.py"),
            ("class_name", "NoWorkflow", "NoWorkflow", "expected a class that extends"),
            ("script_name", 5, ".script_name is 5", text),
            ("class", "X", " has the unknown key 'class'", "class_name"),
            ("limits", [], ".limits is []", obj),
            ("limits", {"step": 5}, ".limits has the unknown key 'step'", "expected steps"),
            (
                "limits",
                {"steps": 25_001},
                ".steps: the value is 25001",
                f"{count} to 25,000",
            ),
            ("limits", {"steps": True}, ".limits.steps: the value is True", count),
            ("concurrency", 5, ".concurrency is 5", obj),
            ("concurrency", {"limit": 0}, ".concurrency.limit: the value is 0", count),
            ("concurrency", {"limits": 1}, ".concurrency has the unknown key", "expected limit"),
            ("schedules", 5, ".schedules: 5", "cron expression"),
            ("schedules", {"0 0 * * *": 1}, ".schedules: ", "cron expression"),
            ("schedules", ["0 0 * * *", 5], ".schedules: 5", "five fields"),
            ("schedules", "0 24 * * *", ".schedules: ", "hour is '24'", "expected *, 0 to 23"),
            ("default_retention", "1 day", ".default_retention is", obj),
            ("default_retention", {"success": 1}, " has the unknown key", "success_retention"),
            ("default_retention", {"error_retention": "soon"}, "retention.error_retention: 'soon'"),
            ("default_retention", {"error_retention": None}, "error_retention: None", "duration"),
            (
                "default_retention",
                {"success_retention": "31 days"},
                "success_retention is '31 days'",
            ),
        ):
            self.refused(self.given(**{key: value}), "workflows[0]", *words)

    def test_a_name_and_a_binding_are_given_once(self) -> None:
        for key, value in (("name", "flow"), ("binding", "FLOW"), ("binding", "TAKEN")):
            given = self.given() | {"vars": {"TAKEN": 1}}
            second = {"name": "second", "binding": "SECOND", "class_name": "Second", key: value}
            given["workflows"].append(second)
            self.refused(given, "workflows[1]: ", repr(value), "already")

    def test_the_cause_is_the_error_of_a_module_that_fails(self) -> None:
        for source, cause in (
            ("import nothing_of_the_kind", ModuleNotFoundError),
            ("def", SyntaxError),
            ("raise ValueError('mine')", ValueError),
            ("import sys; sys.exit('now')", SystemExit),
        ):
            self.write("src/broken.py", source)
            for key, given in (
                ("main: ", self.given() | {"main": "src/broken.py"}),
                ("workflows[0]: script_name: ", self.given(script_name="broken")),
            ):
                error = self.refused(given, key, "broken.py", cause.__name__)
                self.assertIs(type(error.__cause__), cause)
                self.assertNotIn("broken", sys.modules)

    def test_a_module_does_not_take_the_name_of_another(self) -> None:
        for name in ("json", "sys"):
            self.write(f"src/{name}.py", MAIN)
            given = self.given() | {"main": f"src/{name}.py"}
            self.refused(given, f"{name}.py needs another name", repr(name))

    async def test_another_project_may_have_a_file_of_the_same_name(self) -> None:
        for folder in ("one", "two", "one"):
            code = f"from main import Second\nclass Flow(Second):\n    own = {folder!r}"
            self.write(f"{folder}/worker.py", code)
            self.write(f"{folder}/main.py", MAIN)
            self.write(f"{folder}/late.py", "")
            self.write(f"{folder}/helper.py", "NAME = 'helper'")
            given = self.given(class_name="Flow") | {"main": "worker.py"}
            cls = self.load(given, f"{folder}/wrangler.json").env.FLOW.cls
            self.assertEqual((cls.own, cls.__module__), (folder, "worker"))

    def test_a_module_that_somebody_else_imported_does_not_give_way(self) -> None:
        self.load(self.given())  # it imports `helper`
        self.write("src/other/helper.py", MAIN)
        given = self.given() | {"main": "src/other/helper.py"}
        self.refused(given, "needs another name", "'helper'", str(self.folder / "src/helper.py"))
        self.assertEqual(sys.modules["helper"].NAME, "helper")

    def test_nothing_but_a_value_error_comes_of_any_file(self) -> None:
        chance = random.Random(3)
        odd = [*'{}[]",:=\\\n', "//", "/*", "null", "5", "1e400", "'" * 3, "\x00", "[" * 2000, ""]
        for name, text in (("fuzz.jsonc", JSONC), ("fuzz.toml", TOML)):
            tokens, legal = re.findall(r"\w+|\s+|.", text), 0
            for _ in range(300):
                changed = tokens.copy()
                for _ in range(chance.randint(1, 3)):
                    changed[chance.randrange(len(changed))] = chance.choice([*odd, *tokens])
                path = self.write(name, "".join(changed))
                try:
                    workflows.Configuration(path)
                    legal += 1
                except ValueError as error:
                    self.assertTrue(str(error).startswith(f"{path}: "))
            self.assertGreater(legal, 3, name)


class BindOptions(Case):
    def test_wrong_ones_are_refused_by_name(self) -> None:
        for name, *values in (
            ("steps", 0, 25_001, "5", True),
            ("running", 0, -1, 1.0, True),
            ("schedules", "0 24 * * *", ["x"], 5, None, {"0 0 * * *": 1}),
            ("success_retention", "31 days", "soon", -1, True),
            ("error_retention", "31 days", "soon", -1, True),
        ):
            for value in values:
                with self.subTest(name, value=value), self.assertRaises(ValueError) as caught:
                    Engine(self.path).bind(workflow(None), **{name: value})
                self.assertRegex(str(caught.exception), rf"(^|: ){name}( is |: )|'{name}'")

    def test_a_schedule_that_is_given_twice_counts_once(self) -> None:
        given = ["0 9 * * *", " 0  9 * * * "]
        bound = Engine(self.path).bind(workflow(None), schedules=given)
        self.assertEqual([cron.text for cron in bound.schedules], ["0 9 * * *"])

    async def test_retention_is_the_default_of_create(self) -> None:
        async def run(event: Any, step: Any) -> None:
            if event.payload:
                raise ValueError

        kept = {"success_retention": "2 days", "error_retention": "1 day"}
        longer = {"retention": {"successRetention": "3 days"}}
        async with self.engine() as engine:
            bound = engine.bind(workflow(run), **kept)
            for id, options in (("done", {}), ("failed", {"params": 1}), ("longer", longer)):
                await bound.create(id=id, **options)
            for expected in (["done", "failed", "longer"], ["done", "longer"], ["longer"], []):
                await self.clock.advance("1 minute")
                ids = self.rows("SELECT id FROM instances WHERE id IS NOT NULL ORDER BY id")
                self.assertEqual([id for (id,) in ids], expected)
                await self.clock.advance("1 day")


# --------------------------------------------------------------------------------------------------
# The README: its programs run, and what it names exists.


# --------------------------------------------------------------------------------------------------
# From outside Python: HTTP, the page, the command line, `dev`.

REST = "/client/v4/accounts/any/workflows"
EXPLORER = "/cdn-cgi/local/explorer/api/workflows"


class Refused(Exception):
    """An HTTP API's refusal: the status, and the code and the message in the envelope."""

    def __init__(self, status: int, said: dict[str, Any]) -> None:
        (problem,) = said["errors"]
        super().__init__(status, problem["code"], problem["message"])
        self.status, self.code, self.message = self.args
        if said["success"] or said["result"] is not None or said["messages"]:
            raise AssertionError(f"an odd refusal: {said}")


def exchange(port: int, method: str, path: str, body: Any = None, **headers: str) -> Any:
    """What comes back: the answer, and its text."""
    sent = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as link:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        link.request(method, path, sent, names)
        answer = link.getresponse()
        return answer, answer.read().decode()


async def retries_once(event: Any, step: Any) -> Any:
    async def fetch(ctx: Any) -> Any:
        if ctx.attempt == 1:
            raise ValueError("no such user")
        return {"at": datetime(2026, 1, 2, tzinfo=UTC), "raw": b"\xff"}

    return await step.do("fetch user", constant(3, "10 seconds"), fetch)


async def fails_after_a_step(event: Any, step: Any) -> Any:
    async def undo(info: Any) -> None:
        pass

    await step.do("pay", returns(1), rollback=undo)
    raise ValueError(event.payload)


async def all_but_endless(event: Any, step: Any) -> Any:
    await step.sleep("nap", "100 days")


class Outside(Case):
    """An engine with some workflows, and HTTP for it."""

    bound = {
        "steps": one_step, "events": one_event, "naps": one_sleep, "retries": retries_once,
        "fails": fails_after_a_step, "long": all_but_endless,
    }  # fmt: skip
    pace = 0.0  # the server spares no engine, but for the test that is about this

    @contextlib.asynccontextmanager
    async def served(self, token: str | None = None, **more: Callable[..., Any]) -> Any:
        def look_often(server: Any, _: float) -> None:
            """Whether the server is to stop: in each test, somebody waits for that."""
            socketserver.TCPServer.serve_forever(server, 0.002)

        patch = unittest.mock.patch.object
        quick = patch(workflows, "PACE", self.pace)
        quicker_to_stop = patch(workflows.Server, "serve_forever", look_often)
        async with self.engine() as engine:
            for name, run in (self.bound | more).items():
                engine.bind(workflow(run, name), name)
            await engine.call(workflows.nothing)  # other processes know the names, then
            with quick, quicker_to_stop:
                async with workflows.serve(engine, token=token) as server:
                    self.server, self.port = server, server.server_address[1]
                    yield engine

    async def exchange(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        return await asyncio.to_thread(exchange, self.port, method, path, body, **headers)

    async def envelope(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        answer, text = await self.exchange(method, path, body, **headers)
        self.assertEqual(answer.getheader("Content-Type"), "application/json")
        said = json.loads(text)
        if answer.status != 200:
            raise Refused(answer.status, said)
        self.assertEqual((said["success"], said["errors"], said["messages"]), (True, [], []))
        return said

    async def ask(self, method: str, path: str, body: Any = None, base: str = REST) -> Any:
        return (await self.envelope(method, base + path, body))["result"]

    async def assertRefused(self, status: int, code: int, asked: Any) -> Refused:
        with self.assertRaises(Refused) as caught:
            await asked
        self.assertEqual((caught.exception.status, caught.exception.code), (status, code))
        return caught.exception

    async def create(self, name: str, id: str = "i", params: Any = None) -> str:
        """Creates an instance, and lets it run until it waits or ends. Returns its path."""
        await self.ask("POST", f"/{name}/instances", {"id": id, "params": params})
        await self.clock.settle()
        return f"/{name}/instances/{id}"

    async def ids(self, query: str = "", name: str = "naps") -> list[str]:
        return [row["id"] for row in await self.ask("GET", f"/{name}/instances{query}")]

    async def status(self, path: str) -> str:
        await self.clock.settle()
        return (await self.ask("GET", path))["status"]


class HttpWorkflows(Outside):
    async def test_a_name_that_sqlite_would_not_take_is_unknown(self) -> None:
        async with self.served() as engine:
            await self.assertCode("workflow.not_found", engine.workflow("\ud800"))
            with self.assertRaises(TypeError):
                await engine.workflow(5)
            self.assertEqual((await engine.workflow("naps")).name, "naps")

    async def test_workflows_are_listed_by_name_with_counts_of_their_instances(self) -> None:
        async with self.served():
            await self.create("naps", "a")
            await self.create("naps", "b")
            await self.create("steps")
            said = await self.envelope("GET", REST)
        found = {row["name"]: row for row in said["result"]}
        self.assertEqual([*found], sorted(self.bound))
        counts = found["naps"]["instances"]
        self.assertEqual(set(counts), {*workflows.STATUSES, "rollingBack"})
        self.assertEqual({status: n for status, n in counts.items() if n}, {"waiting": 2})
        self.assertEqual(found["steps"]["instances"]["complete"], 1)
        self.assertEqual(found["naps"]["class_name"], "naps")
        self.assertRegex(found["naps"]["triggered_on"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertIsNone(found["events"]["triggered_on"])
        expected = {"page": 1, "per_page": 25, "count": 6, "total_count": 6, "total_pages": 1}
        self.assertEqual(said["result_info"], expected)

    async def test_workflows_come_in_pages_and_can_be_searched(self) -> None:
        async with self.served():
            two = await self.ask("GET", "?page=2&per_page=4.0")
            none = await self.ask("GET", "?page=3&per_page=4")
            some = await self.ask("GET", "?search=ps")
        self.assertEqual([row["name"] for row in two], ["retries", "steps"])
        self.assertEqual((none, [row["name"] for row in some]), ([], ["naps", "steps"]))

    async def test_one_workflow_and_an_unknown_one(self) -> None:
        async with self.served():
            self.assertEqual((await self.ask("GET", "/naps"))["name"], "naps")
            self.assertEqual((await self.ask("GET", "/naps/"))["name"], "naps")
            for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/instances/i")):
                refused = await self.assertRefused(404, 10200, self.ask(method, "/nope" + path))
                self.assertIn("'nope'", refused.message)

    async def test_a_workflow_shows_its_schedules(self) -> None:
        async with self.served() as engine:
            engine.bind(workflow(one_step, "Nightly"), schedules="0 9 * * MON")
            found = await self.ask("GET", "/nightly")
            (schedule,) = found["schedules"]
            self.assertEqual(schedule["cron"], "0 9 * * MON")
            comes = workflows.Cron("0 9 * * MON").next(engine.clock.now())
            self.assertEqual(moment(schedule["next_instance"]), comes)
            self.assertEqual((await self.ask("GET", "/naps"))["schedules"], [])

    async def test_a_workflow_has_one_version(self) -> None:
        async with self.served() as engine:
            made = workflow(one_step, "Kept")
            engine.bind(made, steps=7, running=3, success_retention="1 day")
            (version,) = await self.ask("GET", "/kept/versions")
            past_the_end = await self.ask("GET", "/kept/versions?page=2")
            same = await self.ask("GET", f"/kept/versions/{version['id']}")
            graph = await self.ask("GET", f"/kept/versions/{version['id']}/graph")
            await self.assertRefused(404, 10001, self.ask("GET", "/kept/versions/other"))
        self.assertEqual((past_the_end, same), ([], version))
        self.assertIsNone(graph["graph"])
        self.assertEqual((version["limits"], version["concurrency"]), ({"steps": 7}, {"limit": 3}))
        kept = {"success_retention": 86_400_000, "error_retention": None}
        self.assertEqual(version["default_retention"], kept)
        self.assertEqual((version["has_dag"], version["language"]), (False, "python"))

    async def test_deleting_a_workflow_deletes_its_instances_in_any_state(self) -> None:
        async with self.served() as engine:
            for n in range(205):
                await engine.env.NAPS.create(id=str(n))
            await self.create("steps")
            done = await self.ask("DELETE", "/naps")
            self.assertEqual(await self.ids(), [])
            self.assertEqual(await self.ids(name="steps"), ["i"])
            await self.create("naps")
        self.assertEqual(done, {"status": "ok", "success": True})


class HttpStopping(Outside):
    async def test_what_is_asked_while_it_stops_is_another_time_s(self) -> None:
        async with self.served() as engine:
            self.server.closing = True
            with self.assertNoLogs("workflows", logging.ERROR):
                await self.assertRefused(503, 10001, self.ask("GET", "/naps"))
            self.server.closing = False
            await engine.env.NAPS.create(id="a")
            await self.ask("GET", "/naps")


class HttpCreating(Outside):
    async def test_params_are_a_value_or_the_text_of_one(self) -> None:
        async with self.served():
            for n, (sent, params) in enumerate(
                [
                    ({"a": 1}, {"a": 1}),
                    ('{"a": "ü"}', {"a": "ü"}),
                    ("a text", "a text"),
                    (None, None),
                ]
            ):
                body = {"instance_id": str(n), "params": sent, "location_hint": "weur"}
                made = await self.ask("POST", "/steps/instances", body)
                found = await self.ask("GET", f"/steps/instances/{n}")
                self.assertEqual((made["id"], found["params"]), (str(n), params))
            self.assertEqual((made["status"], made["trigger_source"]), ("queued", "api"))
            made = await self.ask("POST", "/steps/instances")
            found = await self.ask("GET", f"/steps/instances/{made['id']}")
            (version,) = await self.ask("GET", "/steps/versions")
        self.assertEqual((found["params"], found["trigger"]), ({}, {"source": "api"}))
        self.assertEqual((made["version_id"], made["workflow_id"]), (version["id"],) * 2)

    async def test_the_retention_is_that_of_the_instance(self) -> None:
        async with self.served():
            kept = {"success_retention": "1 hour", "error_retention": 1}
            await self.ask("POST", "/steps/instances", {"id": "i", "instance_retention": kept})
            await self.clock.settle()
            await self.clock.advance("59 minutes")
            self.assertEqual(await self.status("/steps/instances/i"), "complete")
            await self.clock.advance("2 minutes")
            await self.assertRefused(404, 10400, self.ask("GET", "/steps/instances/i"))

    async def test_what_can_not_be_created_is_refused(self) -> None:
        async with self.served():
            path = await self.create("steps", "i", 1)
            refused = self.ask("POST", "/steps/instances", {"instance_id": "i", "params": 2})
            await self.assertRefused(409, 10405, refused)
            self.assertEqual((await self.ask("GET", path))["params"], 1)
            for body in ({"id": "a b"}, {"id": ""}, {"id": 5}, {"nonsense": 1}, 7, [7], "x", [], 0):
                with self.subTest(body):
                    await self.assertRefused(400, 10001, self.ask("POST", "/steps/instances", body))
            for base in (REST, EXPLORER):
                asked = self.ask("POST", "/steps/instances", [{}], base)
                await self.assertRefused(400, 10001, asked)
            for kept in (5, {"success_retention": "soon"}, {"success": 1}):
                refused = self.ask("POST", "/steps/instances", {"instance_retention": kept})
                await self.assertRefused(400, 10001, refused)
            large = {"params": "x" * 2**20}
            await self.assertRefused(413, 10001, self.ask("POST", "/steps/instances", large))
            self.assertEqual(await self.ids(name="steps"), ["i"])

    async def test_a_conflict_tells_cloudflares_client_not_to_try_again(self) -> None:
        async with self.served():
            await self.create("steps")
            answer, _ = await self.exchange("POST", REST + "/steps/instances", {"id": "i"})
            self.assertEqual(answer.getheader("x-should-retry"), "false")
            answer, _ = await self.exchange("GET", REST + "/steps/instances/nope")
            self.assertIsNone(answer.getheader("x-should-retry"))

    async def test_a_batch_leaves_out_the_ids_that_exist(self) -> None:
        async with self.served():
            await self.create("steps", "b")
            entries = [{"instance_id": "a"}, {"instance_id": "b"}, {"params": "[1]"}]
            first, last = await self.ask("POST", "/steps/instances/batch", entries)
            found = await self.ask("GET", f"/steps/instances/{last['id']}")
            for body in ([], [{}] * 101, {}, [{"id": "a b"}], None, "x", [[]]):
                refused = self.ask("POST", "/steps/instances/batch", body)
                await self.assertRefused(400, 10001, refused)
        self.assertEqual((first["id"], found["params"]), ("a", [1]))

    async def test_too_many_creations_are_429(self) -> None:
        limits = dataclasses.replace(FOREVER, creations_per_second=1)
        async with self.engine(limits=limits) as engine:
            engine.bind(workflow(one_step))
            async with workflows.serve(engine) as server:
                self.port = server.server_address[1]
                await self.ask("POST", "/test/instances")
                await self.assertRefused(429, 10001, self.ask("POST", "/test/instances"))


class HttpListing(Outside):
    async def listed(self, count: int = 7) -> None:
        for n in range(count):
            await self.create("naps", str(n))
            await self.clock.advance(1000)

    async def test_the_newest_come_first(self) -> None:
        async with self.served():
            await self.listed(3)
            rows = await self.ask("GET", "/naps/instances")
            self.assertEqual([row["id"] for row in rows], ["2", "1", "0"])
            self.assertEqual(await self.ids("/?direction=asc"), ["0", "1", "2"])
        row = rows[0]
        self.assertEqual(row["status"], "waiting")
        self.assertEqual((row["started_on"], row["ended_on"]), (row["created_on"], None))
        self.assertLessEqual(row["created_on"], row["modified_on"])
        expected = """id created_on modified_on started_on ended_on status version_id workflow_id
            trigger_source"""
        self.assertEqual({*row}, {*expected.split()})

    async def test_pages_are_counted_from_the_start_or_from_a_cursor(self) -> None:
        async with self.served():
            await self.listed()
            said = await self.envelope("GET", REST + "/naps/instances?per_page=3")
            info = said["result_info"]
            cursor = info.pop("cursor")
            expected = {"page": 1, "per_page": 3, "count": 3, "total_count": 7, "total_pages": 3}
            self.assertEqual(info, expected)
            for query, ids in {
                "page=2": "321", "page=3": "0", "page=4": "", f"cursor={cursor}": "321",
                f"cursor={cursor}&page=2": "0", f"cursor={cursor}&page=3": "",
                f"cursor={cursor}&direction=asc": "345",
            }.items():  # fmt: skip
                with self.subTest(query):
                    self.assertEqual(await self.ids("?per_page=3&" + query), [*ids])
            last = await self.envelope("GET", REST + "/naps/instances?per_page=3&page=3")
        self.assertNotIn("cursor", last["result_info"])

    async def test_a_page_stays_what_it_was_when_others_are_created(self) -> None:
        async with self.served():
            await self.listed(4)
            said = await self.envelope("GET", REST + "/naps/instances?per_page=2")
            await self.create("naps", "new")
            cursor = said["result_info"]["cursor"]
            self.assertEqual(await self.ids(f"?per_page=2&cursor={cursor}"), ["1", "0"])

    async def test_they_can_be_filtered_by_status(self) -> None:
        async with self.served() as engine:
            await self.listed(3)
            await (await engine.env.NAPS.get("1")).pause()
            self.assertEqual(await self.ids("?status=paused"), ["1"])
            self.assertEqual(await self.ids("?status=waiting"), ["2", "0"])
            self.assertEqual(await self.ids("?status=complete"), [])

    async def test_rolling_back_is_a_status_of_its_own(self) -> None:
        gate = asyncio.Event()

        async def run(event: Any, step: Any) -> None:
            await step.do("s", returns(1), rollback=lambda info: gate.wait())
            await step.sleep("nap", "1 hour")

        async with self.served(undone=run):
            path = await self.create("undone")
            body = {"status": "terminate", "rollback": True}
            await self.ask("PATCH", path + "/status", body)
            self.assertEqual(await self.status(path), "rollingBack")
            counts = (await self.ask("GET", "/undone"))["instances"]
            self.assertEqual((counts["rollingBack"], counts["running"]), (1, 0))
            self.assertEqual(await self.ids("?status=rollingBack", "undone"), ["i"])
            self.assertEqual(await self.ids("?status=running", "undone"), [])
            await self.ask("PUT", "/undone/instances/terminate?status=running")
            self.assertEqual(await self.status(path), "rollingBack")
            gate.set()
            self.assertEqual(await self.status(path), "terminated")

    async def test_they_can_be_filtered_by_the_time_of_their_creation(self) -> None:
        async with self.served():
            began = datetime.fromtimestamp(self.clock.now() / 1000, UTC)
            await self.listed(3)
            at = began + timedelta(seconds=1)
            utc, east = at.isoformat(), at.astimezone(timezone(timedelta(hours=2))).isoformat()
            for text in (utc, utc[:-6], utc[:-6] + "Z", east):
                with self.subTest(text):
                    query = "date_start=" + urllib.parse.quote(text)
                    self.assertEqual(await self.ids("?" + query), ["2", "1"])
                    query = "date_end=" + urllib.parse.quote(text)
                    self.assertEqual(await self.ids("?" + query), ["1", "0"])
            day = began.date().isoformat()
            self.assertIn("0", await self.ids(f"?date_start={day}&date_end={day}"))

    async def test_a_bad_query_is_refused(self) -> None:
        async with self.served():
            for query in (
                "page=0", "page=x", "page=NaN", "page=inf", "page=1e99", "per_page=101",
                "per_page=-1", "cursor=x", "status=bogus", "status=", "direction=up",
                "date_start=yesterday", "date_end=2026-02-30",
            ):  # fmt: skip
                with self.subTest(query):
                    name = query.partition("=")[0]
                    asked = self.ask("GET", f"/naps/instances?{query}")
                    refused = await self.assertRefused(400, 10001, asked)
                    self.assertIn(name, refused.message)
            reversed_ = "date_start=2026-02-02T00:00:00Z&date_end=2026-02-01T00:00:00Z"
            asked = self.ask("GET", "/naps/instances?" + reversed_)
            await self.assertRefused(400, 10502, asked)

    async def test_what_is_deleted_or_has_expired_is_not_shown_though_no_owner_clears_it(
        self,
    ) -> None:
        short = {"successRetention": 1000, "errorRetention": 1000}
        async with self.served() as engine:
            for id, kept in (("expired", short), ("kept", {}), ("deleted", {})):
                await engine.env.STEPS.create(id=id, params=1, retention=kept)
            await self.clock.settle()
        self.clock._now += 2000  # nobody is there who would notice
        async with self.engine() as engine, workflows.serve(engine) as server:
            self.port = server.server_address[1]
            await self.ask("DELETE", "/steps/instances/deleted")
            self.assertEqual(await self.ids(name="steps"), ["kept"])
            self.assertEqual((await self.ask("GET", "/steps"))["instances"]["complete"], 1)
            self.assertEqual((await self.ask("GET", "/steps"))["instances"]["terminated"], 0)


class HttpDetails(Outside):
    async def test_a_step_that_is_tried_again(self) -> None:
        async with self.served():
            path = await self.create("retries")
            waiting = await self.ask("GET", path)
            await self.clock.advance("10 seconds")
            done = await self.ask("GET", path)
        (step,) = waiting["steps"]
        self.assertEqual((step["success"], step["end"], step["output"]), (None, None, None))
        self.assertEqual(moment(step["retry_at"]) - moment(step["start"]), 10_000)
        retries = {"limit": 3, "delay": "10 seconds", "backoff": "constant"}
        self.assertEqual(step["config"], {"retries": retries, "timeout": "10 minutes"})
        self.assertEqual((waiting["success"], waiting["output"]), (None, "null"))
        (step,) = done["steps"]
        failed, succeeded = step["attempts"]
        self.assertEqual(failed["error"], {"name": "ValueError", "message": "no such user"})
        self.assertEqual((failed["success"], succeeded["success"]), (False, True))
        self.assertEqual((step["type"], step["name"]), ("step", "fetch user-1"))
        self.assertEqual((step["success"], step["end"]), (True, succeeded["end"]))
        value = {"at": "2026-01-02T00:00:00+00:00", "raw": "/w=="}
        self.assertEqual((json.loads(step["output"]), json.loads(done["output"])), (value, value))
        self.assertEqual(
            (done["success"], done["status"], done["step_count"]), (True, "complete", 1)
        )
        self.assertLessEqual(done["queued"], done["start"])
        self.assertEqual(done["end"], step["end"])

    async def test_a_sleep_and_an_event_wait_have_the_end_that_is_planned(self) -> None:
        async with self.served():
            nap = await self.create("naps")
            wait = await self.create("events")
            (sleep,), (waits,) = [(await self.ask("GET", path))["steps"] for path in (nap, wait)]
            for step in (sleep, waits):
                self.assertEqual(moment(step["end"]) - moment(step["start"]), 3_600_000)
                self.assertEqual((step["finished"], step["error"]), (False, None))
            self.assertEqual((waits["event_type"], waits["output"]), ("t", None))
            await self.ask("POST", wait + "/events/t", {"y": 1})
            await self.clock.advance("1 hour")
            (sleep,) = (await self.ask("GET", nap))["steps"]
            (waits,) = (await self.ask("GET", wait))["steps"]
        self.assertEqual((sleep["type"], sleep["finished"]), ("sleep", True))
        self.assertEqual((waits["type"], waits["finished"]), ("waitForEvent", True))
        event = json.loads(waits["output"])
        self.assertEqual((event["type"], event["payload"]), ("t", {"y": 1}))

    async def test_an_event_wait_that_is_too_late(self) -> None:
        async with self.served():
            path = await self.create("events")
            await self.clock.advance("2 hours")
            found = await self.ask("GET", path)
        (step,) = found["steps"]
        self.assertEqual((step["finished"], step["output"]), (True, None))
        self.assertEqual(step["error"]["name"], "WorkflowTimeoutError")
        self.assertEqual(found["error"]["name"], "WorkflowTimeoutError")
        self.assertIs(found["success"], False)

    async def test_a_pause_moves_the_planned_end(self) -> None:
        async with self.served():
            path = await self.create("naps")
            await self.ask("PATCH", path + "/status", {"status": "pause"})
            await self.clock.advance("10 minutes")
            (paused,) = (await self.ask("GET", path))["steps"]
            await self.ask("PATCH", path + "/status", {"status": "resume"})
            (resumed,) = (await self.ask("GET", path))["steps"]
        self.assertEqual(moment(paused["end"]) - moment(paused["start"]), 70 * 60_000)
        self.assertEqual(paused["end"], resumed["end"])

    async def test_an_error_and_its_rollback(self) -> None:
        async with self.served():
            path = await self.create("fails", "i", "boom")
            found = await self.ask("GET", path)
        self.assertEqual(found["error"], {"name": "ValueError", "message": "boom"})
        self.assertEqual(found["rollback"], {"outcome": "complete", "error": None})
        step, undone = found["steps"]
        self.assertEqual((step["type"], undone["type"]), ("step", "rollback"))
        self.assertEqual(
            (step["name"], undone["name"], undone["success"]), ("pay-1",) * 2 + (True,)
        )
        self.assertEqual(found["step_count"], 2)

    async def test_a_termination_is_the_last_of_the_steps(self) -> None:
        async with self.served() as engine:
            path = await self.create("naps")
            await self.ask("PATCH", path + "/status", {"status": "terminate"})
            found = await self.ask("GET", path)
            await self.create("naps", "by-binding")
            await (await engine.env.NAPS.get("by-binding")).terminate()
            other = await self.ask("GET", "/naps/instances/by-binding")
        sleep, end = found["steps"]
        self.assertEqual(end, {"type": "termination", "trigger": {"source": "api"}})
        self.assertEqual((found["success"], found["error"]), (False, None))
        self.assertIsNotNone(sleep["end"])
        self.assertEqual(other["steps"][-1]["trigger"], {"source": "binding"})

    async def test_steps_come_in_the_order_of_their_starts_or_backwards_or_not_at_all(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            async def slow() -> None:
                await step.do("inner", returns(1))
                await asyncio.sleep(0)

            await asyncio.gather(step.do("slow", slow), step.do("fast", returns(2)))
            await step.sleep("nap", "1 hour")

        async with self.served(several=run):
            path = await self.create("several")
            names = [step["name"] for step in (await self.ask("GET", path))["steps"]]
            backwards = (await self.ask("GET", path + "?order=desc"))["steps"]
            simple = await self.ask("GET", path + "?simple=true")
            await self.assertRefused(400, 10001, self.ask("GET", path + "?order=up"))
        self.assertEqual((names[0], names[-1]), ("slow-1", "nap-1"))
        self.assertEqual({*names}, {"slow-1", "inner-1", "fast-1", "nap-1"})
        self.assertEqual([step["name"] for step in backwards], names[::-1])
        self.assertEqual((simple["steps"], simple["step_count"]), ([], 4))

    async def test_what_is_sensitive_is_not_shown(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("login", {"sensitive": "output"}, returns("hunter2"))

        async with self.served(secret=run):
            path = await self.create("secret")
            _, text = await self.exchange("GET", REST + path)
            _, local = await self.exchange("GET", EXPLORER + path)
            result = await self.ask("GET", path + "/step?name=login-1")
        self.assertNotIn("hunter2", text + local)
        self.assertEqual(json.loads(text)["result"]["steps"][0]["output"], "[REDACTED]")
        self.assertEqual(result["output"], "[REDACTED]")

    async def test_a_delay_that_is_a_function_and_a_limit_without_end(self) -> None:
        async def run(event: Any, step: Any) -> None:
            config = {"retries": {"limit": float("inf"), "delay": lambda info: "1 hour"}}
            await step.do("s", config, raises(ValueError("no")))

        async with self.served(odd=run):
            (step,) = (await self.ask("GET", await self.create("odd")))["steps"]
        self.assertEqual(step["config"]["retries"]["delay"], "[dynamic]")
        self.assertEqual(step["config"]["retries"]["limit"], 2**53 - 1)

    async def test_an_instance_whose_newest_row_is_a_cancellation(self) -> None:
        async def run(event: Any, step: Any) -> None:
            slow = asyncio.create_task(step.do("slow", asyncio.Event().wait))
            lost = asyncio.create_task(step.do("lost", asyncio.Event().wait))
            await step.do("won", returns(1))
            lost.cancel()
            await slow

        async with self.served(races=run):
            path = await self.create("races")
            await self.clock.settle()
            newest = "SELECT type FROM journal ORDER BY seq DESC LIMIT 1"
            self.assertEqual(self.rows(newest), [("cancel",)])
            shown = await self.ask("GET", path)
        self.assertEqual(len(shown["steps"]), 3)

    async def test_what_run_has_cancelled_and_what_a_stop_has_interrupted(self) -> None:
        gate = asyncio.Event()

        async def run(event: Any, step: Any) -> None:
            calls = [step.do("lost", gate.wait), step.sleep("unused", "1 day")]
            tasks = [asyncio.create_task(call) for call in calls]
            await step.do("won", returns(1))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await step.do("last", gate.wait)

        async with self.served(races=run):
            path = await self.create("races")
            steps = {step["name"]: step for step in (await self.ask("GET", path))["steps"]}
            result = await self.ask("GET", path + "/step?type=sleep&name=unused-1")
        lost, unused = steps["lost-1"], steps["unused-1"]
        self.assertEqual((lost["success"], unused["finished"]), (False, False))
        self.assertEqual((unused["success"], result["status"]), (False, "errored"))
        self.assertEqual(lost["attempts"][-1]["error"], workflows.CANCELLED)
        self.assertEqual(unused["error"], workflows.CANCELLED)
        self.assertEqual((steps["last-1"]["success"], len(steps["last-1"]["attempts"])), (None, 1))
        async with self.engine() as engine, workflows.serve(engine) as server:
            self.port = server.server_address[1]
            last = (await self.ask("GET", path))["steps"][-1]
        self.assertEqual((last["name"], last["success"], last["attempts"]), ("last-1", None, []))

    async def test_an_instance_of_a_schedule_is_found_however_its_path_is_written(self) -> None:
        id = "*/5 0 * * MON-1795856400000"
        async with self.served() as engine:
            entry = (id, "{}", None, None)
            await engine.call(workflows.create_instances, "naps", [entry], "cron")
            await self.clock.settle()
            for path in (id.replace(" ", "%20"), urllib.parse.quote(id, safe="")):
                found = await self.ask("GET", "/naps/instances/" + path)
                cron = {"cron": "*/5 0 * * MON", "scheduledTime": 1795856400000}
                self.assertEqual((found["schedule"], found["trigger"]["source"]), (cron, "cron"))
                at = "/naps/instances/" + path
                await self.ask("PATCH", at + "/status", {"status": "pause"})
                await self.ask("PATCH", at + "/status", {"status": "resume"})
                await self.ask("POST", at + "/events/t", 1)
                found = await self.ask("GET", at + "/step?type=sleep&name=nap-1")
                self.assertEqual(found["status"], "running")

    async def test_the_result_of_a_step_or_of_an_attempt(self) -> None:
        async with self.served():
            path = await self.create("retries")
            asked = path + "/step?name=fetch+user-1&type=step"
            going = await self.ask("GET", asked)
            await self.clock.advance("1 minute")
            done = await self.ask("GET", asked)
            first = await self.ask("GET", asked + "&attempt=1")
            for query, status, code in (
                ("name=nope-1", 404, 10001), ("", 404, 10001),
                ("name=fetch+user-1&type=sleep", 404, 10001),
                ("name=fetch+user-1&attempt=3", 400, 10001),
                ("name=fetch+user-1&attempt=0", 400, 10001),
            ):  # fmt: skip
                await self.assertRefused(status, code, self.ask("GET", f"{path}/step?{query}"))
            waits = await self.create("events")
            asked = waits + "/step?name=w-1&type=waitForEvent"
            waiting = await self.ask("GET", asked)
            await self.assertRefused(400, 10001, self.ask("GET", asked + "&attempt=1"))
            await self.ask("POST", waits + "/events/t", [1])
            await self.clock.settle()
            got = await self.ask("GET", asked)
        error = {"name": "ValueError", "message": "no such user"}
        self.assertEqual(
            (going["status"], going["output"], going["error"]), ("running", None, error)
        )
        self.assertEqual((done["status"], done["error"]), ("complete", None))
        self.assertEqual(done["output"]["raw"], "/w==")
        self.assertEqual(
            (first["status"], first["output"], first["error"]), ("errored", None, error)
        )
        self.assertEqual((waiting["status"], waiting["event_type"]), ("waiting", "t"))
        self.assertEqual((got["status"], got["output"]["payload"]), ("complete", [1]))

    async def test_a_sleep_has_a_result_that_is_null(self) -> None:
        async with self.served():
            path = await self.create("naps")
            await self.clock.advance("1 hour")
            found = await self.ask("GET", path + "/step?type=sleep&name=nap-1")
        self.assertEqual((found["status"], found["output"]), ("complete", None))

    async def test_an_unknown_instance_is_refused_everywhere(self) -> None:
        async with self.served():
            path = "/naps/instances/nope"
            for method, more, body in (
                ("GET", "", None), ("DELETE", "", None), ("GET", "/step?name=s-1", None),
                ("PATCH", "/status", {"status": "pause"}), ("POST", "/events/t", 1),
            ):  # fmt: skip
                with self.subTest(method + more):
                    await self.assertRefused(404, 10400, self.ask(method, path + more, body))
                    asked = self.ask(method, path + more, body, EXPLORER)
                    await self.assertRefused(404, 10501, asked)


class HttpSteering(Outside):
    async def steer(self, path: str, **body: Any) -> str:
        changed = await self.ask("PATCH", path + "/status", body)
        moment(changed["timestamp"])
        return changed["status"]

    async def test_pause_resume_terminate_restart(self) -> None:
        async with self.served():
            path = await self.create("naps")
            self.assertEqual(await self.steer(path, status="pause"), "paused")
            self.assertEqual(await self.steer(path, status="pause"), "paused")
            self.assertEqual(await self.steer(path, action="resume"), "waiting")
            self.assertEqual(await self.steer(path, status="terminate"), "terminated")
            refused = self.steer(path, status="terminate")
            await self.assertRefused(409, 10001, refused)
            begun = ("queued", "running", "waiting")  # the owner may be quicker than the answer
            self.assertIn(await self.steer(path, status="restart"), begun)
            self.assertEqual(await self.status(path), "waiting")

    async def test_restart_from_a_step(self) -> None:
        async with self.served():
            path = await self.create("retries")
            start = {"name": "fetch user", "count": 1, "type": "do"}
            self.assertEqual(await self.steer(path, status="restart", **{"from": start}), "running")
            for start, status in (
                ({"name": "nope"}, 409), ({"name": "fetch user", "count": 2}, 409),
                ({"name": "fetch user", "count": 0}, 400), ({"name": "s", "type": "step"}, 400),
                ({"name": "s", "extra": 1}, 400), ("fetch user", 400), (7, 400), ({}, 400),
                ("", 400),
            ):  # fmt: skip
                with self.subTest(start):
                    refused = self.steer(path, status="restart", **{"from": start})
                    await self.assertRefused(status, 10001, refused)

    async def test_terminate_with_rollback(self) -> None:
        async with self.served():
            path = await self.create("naps")
            status = await self.steer(path, status="terminate", rollback=True)
            self.assertEqual(status, "terminated")  # there is nothing to undo
            for body in (
                {"status": "pause", "rollback": True}, {"status": "restart", "rollback": True},
                {"status": "terminate", "rollback": "yes"},
                {"status": "pause", "from": {"name": "s"}},
                {"status": "sideways"}, {"status": 5}, {"status": {}}, {}, [], "pause",
                {"status": "pause", "extra": 1},
            ):  # fmt: skip
                with self.subTest(body):
                    asked = self.ask("PATCH", path + "/status", body)
                    await self.assertRefused(400, 10001, asked)
            self.assertEqual(await self.steer(path, status="pause", rollback=False), "terminated")

    async def test_an_event_has_any_value_or_none(self) -> None:
        async with self.served():
            for n, (body, payload) in enumerate(
                [({"y": 1}, {"y": 1}), ([1], [1]), ("text", "text"), (7, 7), (None, None)]
            ):
                path = await self.create("events", str(n))
                sent = await self.ask("POST", path + "/events/t", body)
                await self.clock.settle()
                found = await self.ask("GET", path)
                self.assertEqual(json.loads(found["output"]), payload)
                self.assertEqual(sent["instanceId"], str(n))
            await self.assertRefused(409, 10001, self.ask("POST", path + "/events/t", 1))
            path = await self.create("events", "other")
            for type in ("a%20b", "%C3%BC", "x" * 101):
                asked = self.ask("POST", f"{path}/events/{type}", 1)
                await self.assertRefused(400, 10001, asked)

    async def test_deleting_one_and_some(self) -> None:
        async with self.served():
            for id in "abc":
                await self.create("naps", id)
            done = await self.ask("DELETE", "/naps/instances/a")
            self.assertEqual(done["instanceId"], "a")
            body = {"instances": ["b", "nope", "b"]}
            some = await self.ask("POST", "/naps/instances/batch/delete", body)
            self.assertEqual(some["deleted"], [{"id": "b"}, {"id": "b"}])
            message = "workflows.api.error.instance.not_found"
            self.assertEqual(some["errors"], [{"id": "nope", "code": 10400, "message": message}])
            self.assertEqual(await self.ids(), ["c"])
            for body in ({"instances": []}, {"instances": ["x"] * 101}, {"instances": "x"}, {}, []):
                asked = self.ask("POST", "/naps/instances/batch/delete", body)
                await self.assertRefused(400, 10001, asked)

    async def test_terminating_some_and_all(self) -> None:
        async with self.served() as engine:
            for n in range(102):
                await engine.env.NAPS.create(id=str(n))
            await (await engine.env.NAPS.get("5")).pause()
            ended = await self.ask("POST", "/naps/instances/batch/terminate", ["1", "2", "nope"])
            self.assertEqual(ended, {"instancesTerminated": 2, "status": "ok"})
            path = "/naps/instances/terminate"
            await self.assertRefused(400, 10001, self.ask("PUT", path + "?status=bogus"))
            self.assertEqual(await self.ask("PUT", path + "?status=paused"), {"status": "ok"})
            counts = (await self.ask("GET", "/naps"))["instances"]
            self.assertEqual((counts["terminated"], counts["paused"]), (3, 0))
            done = await asyncio.gather(self.ask("PUT", path), self.ask("PUT", path))
            self.assertIn({"status": "ok"}, done)
            self.assertEqual(await self.ask("GET", path), {"status": "not_running"})
            counts = (await self.ask("GET", "/naps"))["instances"]
        self.assertEqual(counts["terminated"], 102)

    async def test_what_rolls_back_can_be_terminated_at_once(self) -> None:
        async def run(event: Any, step: Any) -> None:
            undo = asyncio.Event().wait if event.payload else None
            await step.do("s", returns(1), rollback=lambda info: undo())
            await (step.sleep("nap", "1 hour") if undo else step.do("wait", asyncio.Event().wait))

        async with self.served(undone=run):
            undone, other = [await self.create("undone", id, id == "a") for id in "ab"]
            await self.steer(undone, status="terminate", rollback=True)
            self.assertEqual(await self.status(undone), "rollingBack")
            await self.ask("PUT", "/undone/instances/terminate?status=rollingBack")
            self.assertEqual(await self.status(undone), "terminated")
            self.assertEqual(await self.status(other), "running")

    async def test_one_job_at_a_time_terminates_all(self) -> None:
        async with self.served() as engine:
            with unittest.mock.patch.object(workflows, "_terminating", {(engine, "naps")}):
                path = "/naps/instances/terminate"
                self.assertEqual(await self.ask("PUT", path), {"status": "already_running"})
                self.assertEqual(await self.ask("GET", path), {"status": "running"})


class HttpExplorer(Outside):
    """What `wrangler … --local` asks: the same with fewer fields."""

    async def local(self, method: str, path: str, body: Any = None) -> Any:
        return await self.ask(method, path, body, EXPLORER)

    async def test_workflows(self) -> None:
        async with self.served():
            said = await self.envelope("GET", EXPLORER)
            one = await self.local("GET", "/naps")
            older = await self.ask("GET", "/naps", None, "/cdn-cgi/explorer/api/workflows")
            await self.assertRefused(404, 10501, self.local("GET", "/nope"))
        self.assertEqual({*said["result"][0]}, {"name", "class_name", "script_name"})
        self.assertEqual((said["result_info"]["count"], older), (6, one))
        self.assertEqual({*one}, {"name", "class_name", "script_name", "instances"})

    async def test_params_are_values_and_nothing_else(self) -> None:
        async with self.served():
            made = await self.local("POST", "/steps/instances", {"id": "i", "params": "[1]"})
            self.assertEqual(made["id"], "i")
            self.assertEqual((await self.local("GET", "/steps/instances/i"))["params"], "[1]")

    async def test_lists(self) -> None:
        async with self.served():
            for id in "abc":
                await self.create("naps", id)
            said = await self.envelope("GET", EXPLORER + "/naps/instances?per_page=2&page=2")
        self.assertEqual([{*row} for row in said["result"]], [{"id", "status", "created_on"}])
        info = said["result_info"]
        self.assertEqual((info["page"], info["total_count"], info["total_pages"]), (2, 3, 2))
        self.assertEqual(info["status_counts"], {"waiting": 3})

    async def test_details_have_values_and_no_end_that_is_only_planned(self) -> None:
        async with self.served():
            await self.create("naps")
            waits = await self.create("events")
            nap = await self.local("GET", "/naps/instances/i")
            expected = "status params queued start end output error steps step_count"
            self.assertEqual({*nap}, {*expected.split(), "success"})
            self.assertEqual((nap["output"], nap["steps"][0]["end"]), (None, None))
            self.assertNotIn("output", (await self.local("GET", waits))["steps"][0])
            self.assertEqual(await self.local("POST", waits + "/events/t", [1]), {"success": True})
            await self.clock.settle()
            done = await self.local("GET", waits)
        self.assertEqual(done["output"], [1])
        output = done["steps"][0]["output"]
        self.assertEqual((output["type"], output["payload"]), ("t", [1]))
        moment(output["timestamp"])

    async def test_steering_and_deleting(self) -> None:
        async with self.served():
            path = await self.create("naps")
            changed = await self.local("PATCH", path + "/status", {"status": "pause"})
            self.assertEqual({*changed}, {"status", "timestamp"})
            body = {"status": "restart", "from": {"name": "nope"}}
            await self.assertRefused(409, 10001, self.local("PATCH", path + "/status", body))
            self.assertEqual(await self.local("DELETE", path), {"success": True})
            await self.create("naps", "b")
            some = await self.local("POST", "/naps/instances/batch/delete", {"instances": ["b"]})
            self.assertEqual(some, {"deleted": [{"id": "b"}], "errors": []})
            self.assertEqual(await self.local("DELETE", "/naps"), {"status": "ok", "success": True})


class HttpFuzz(Outside):
    """Whatever is asked, the answer is one of those that are documented."""

    texts = (
        "", "naps", "steps", "events", "i", "j", "nope", "batch", "delete", "status", "step", "t",
        "terminate", "versions", "instances", "latest", "nap-1", "nap", "w", "%", "%00",
        "%ed%a0%80", "a b", "*/5 * * * *-179", "..", "ü", "\ud800", "\x00", "x" * 300, "1", "0",
        "-1", "2.0", "9" * 40, "NaN", "asc", "desc", "true", "waiting", "rollingBack", "pause",
        "resume", "restart", "waitForEvent", "1 second", "[1]", "2026-01-01", "0001-01-01",
        "9999-12-31", "2026-01-01T00:00:00+23:59",
    )  # fmt: skip
    keys = (
        ("id", "instance_id", "params", "instance_retention", "location_hint"),
        ("status", "action", "from", "rollback"), ("name", "count", "type"), ("instances",),
        ("success_retention", "error_retention"),
        ("page", "per_page", "cursor", "direction", "date_start", "date_end", "status", "search"),
        ("order", "simple", "attempt", "name", "type"),
    )  # fmt: skip

    def value(self, chance: random.Random, depth: int = 0) -> Any:
        kind = chance.random()
        if kind < 0.5 and depth < 4:
            known = chance.choice(self.keys)
            keys = chance.sample(known, chance.randrange(len(known) + 1))
            return {key: self.value(chance, depth + 1) for key in keys}
        if kind < 0.6 and depth < 4:
            return [self.value(chance, depth + 1) for _ in range(chance.randrange(4))]
        if kind < 0.85:
            return chance.choice(self.texts)
        return chance.choice(
            (None, True, False, 0, 1, -1, 2**53, 10**30, 1.5, 1e308, -float("inf"))
        )

    def request(self, chance: random.Random) -> tuple[str, str, bytes | None]:
        """Method, path and body of one that is likely to get somewhere."""
        known = {"NAME": ("naps", "steps", "events"), "ID": ("i", "j"), "TYPE": ("t",)}

        def part(match: re.Match[str]) -> str:
            if chance.random() < 0.8:
                return chance.choice(known[match[0]])
            return urllib.parse.quote(chance.choice(self.texts), "*/%", errors="replace")

        pattern, resources, _ = chance.choice(workflows._ROUTES)
        path = chance.choice(("/client/v4/accounts/a", "/cdn-cgi/local/explorer/api"))
        path += re.sub("NAME|ID|TYPE", part, pattern)
        if chance.random() < 0.5:
            asked = {key: chance.choice(self.texts) for key in chance.sample(self.keys[-2], 2)}
            asked |= {key: chance.choice(self.texts) for key in chance.sample(self.keys[-1], 2)}
            path += "?" + urllib.parse.urlencode(asked, errors="replace")
        text = json.dumps(self.value(chance)).encode()
        if chance.random() < 0.05:
            cut = chance.randrange(len(text) + 1)
            text = text[:cut] + chance.randbytes(2) + text[cut:]
        methods = [*resources] if chance.random() < 0.95 else ["GET", "PUT", "PATCH", "DELETE"]
        return chance.choice(methods), path, text if chance.random() < 0.8 else None

    async def fuzz(self, seed: int, count: int) -> collections.Counter[int]:
        chance, statuses = random.Random(seed), collections.Counter[int]()
        async with self.served() as engine:
            for n in range(count):
                if n % 10 == 0:
                    for name in ("naps", "steps", "events"):
                        made = await engine.workflow(name)
                        await made.create_batch([{"id": "i", "params": n}, {"id": "j"}])
                    await self.clock.settle()
                method, path, body = self.request(chance)
                with self.subTest(seed=seed, n=n, method=method, path=path, body=body):
                    answer, text = await self.exchange(method, path, body)
                    statuses[answer.status] += 1
                    self.assertIn(answer.status, (200, 400, 404, 405, 409, 413, 429))
                    self.assertEqual(json.loads(text)["success"], answer.status == 200)
        return statuses

    async def test_random_requests(self) -> None:
        statuses = await self.fuzz(1, 400)
        self.assertGreater(min(statuses[200], statuses[400], statuses[404]), 20)


class Wire(Outside):
    """HTTP itself: who may ask, and what a client may not do."""

    async def raw(self, sent: bytes, end: bool = True) -> bytes:
        """What comes back on a connection, until it is closed."""

        def talk() -> bytes:
            with socket.create_connection(("127.0.0.1", self.port), 10) as link:
                link.sendall(sent)
                if end:
                    link.shutdown(socket.SHUT_WR)
                got = b""
                with contextlib.suppress(ConnectionError):
                    while part := link.recv(2**16):
                        got += part
                return got

        return await asyncio.to_thread(talk)

    async def assertStatus(self, status: int, method: str, path: str, **headers: str) -> str:
        answer, text = await self.exchange(method, path, **headers)
        self.assertEqual(answer.status, status)
        return text

    async def test_without_a_token_the_host_must_be_local(self) -> None:
        async with self.served():
            for host in ("localhost", "127.0.0.1:80", "[::1]:8787", "127.1.2.3", "LocalHost:80"):
                await self.assertStatus(200, "GET", REST, Host=host)
                origin = f"http://{host}".lower()
                await self.assertStatus(200, "GET", REST, Host=host, Origin=origin)
            for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil", "8.8.8.8", ""):
                for path in (REST, EXPLORER, "/", "/nope"):
                    with self.subTest(host):
                        await self.assertStatus(403, "GET", path, Host=host)

    async def test_without_a_token_the_page_of_another_site_may_not_ask(self) -> None:
        async with self.served():
            host = f"127.0.0.1:{self.port}"
            await self.assertStatus(200, "GET", REST, Host=host, Origin=f"http://{host}")
            foreign = ("http://evil.example", "null", "http://127.0.0.1:1", "https://" + host, "")
            for origin in foreign:
                with self.subTest(origin):
                    path = REST + "/steps/instances"
                    await self.assertStatus(403, "POST", path, Host=host, Origin=origin)
            self.assertEqual(await self.ids(name="steps"), [])

    async def test_with_a_token_nobody_else_may_ask(self) -> None:
        async with self.served(token="gehëim"):
            right = "Bearer gehëim".encode().decode("latin-1")
            for given in ("", "Bearer", "Bearer gehëi", "gehëim", "Basic gehëim", right + "x"):
                for path in (REST, EXPLORER, REST + "/nope", "/nope"):
                    with self.subTest(given):
                        text = await self.assertStatus(401, "GET", path, Authorization=given)
                        self.assertNotIn(json.loads(text)["errors"][0]["code"], (10000, 9106))
            await self.assertStatus(401, "GET", REST)
            await self.assertStatus(200, "GET", REST, Authorization=right, Host="any.example")
            await self.assertStatus(200, "GET", REST, Authorization=right.replace("B", "b"))
            await self.assertStatus(200, "GET", "/", Host="any.example")

    async def test_other_paths_and_methods_are_refused_in_json(self) -> None:
        async with self.served():
            for path in (
                "/nope",
                "/client/v4/accounts/a",
                "/workflows",
                REST + "x",
                "/../etc",
                "*",
            ):
                await self.assertRefused(404, 7003, self.envelope("GET", path))
            for method, path in (("PATCH", "/naps/instances"), ("POST", ""), ("OPTIONS", "/naps")):
                refused = await self.assertRefused(405, 10001, self.ask(method, path, {}))
                self.assertNotIn("`dev`", refused.message)
            for path in ("/naps", "/naps/", "/naps/triggers", "/naps/settings", "/new"):
                refused = await self.assertRefused(405, 10001, self.ask("PUT", path, {}))
                self.assertRegex(refused.message, "edit .* configuration file, and start `dev`")
            await self.assertRefused(404, 7003, self.ask("GET", "/naps/settings"))

    async def test_an_unknown_method_is_a_mistake_and_head_has_no_body(self) -> None:
        async with self.served():
            answer, text = await self.exchange("BREW", REST)
            self.assertEqual((answer.status, json.loads(text)["success"]), (405, False))
            answer = await self.raw(f"HEAD {REST} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        self.assertTrue(answer.startswith(b"HTTP/1.1 405 "))
        self.assertTrue(answer.endswith(b"\r\n\r\n"))

    async def test_what_is_no_json_is_refused(self) -> None:
        async with self.served():
            deep = b"[" * 100_000
            for body in (b"{bad", b"\xff", b'{"params": 1', b"{} {}", deep, b"1" * 5000):
                with self.subTest(body[:9]):
                    asked = self.ask("POST", "/steps/instances", body)
                    await self.assertRefused(400, 10001, asked)
            for body in (b'{"params": NaN}', b'{"params": "\\ud800"}', b'{"id": "\\ud800"}'):
                await self.assertRefused(400, 10001, self.ask("POST", "/steps/instances", body))
            self.assertEqual(await self.ids(name="steps"), [])

    async def test_odd_names_reach_neither_sql_nor_a_path(self) -> None:
        async with self.served():
            for name in ("'; DROP TABLE instances; --", "%00", "%ff", "%ed%a0%80", "..%2f..", "ü"):
                with self.subTest(name):
                    path = "/" + (name if "%" in name else urllib.parse.quote(name, safe=""))
                    await self.assertRefused(404, 10200, self.ask("GET", path))
                    asked = self.ask("GET", "/naps/instances" + path)
                    await self.assertRefused(404, 10400, asked)
            answer = await self.raw(
                "GET /client/v4/accounts/a/workflows/ü HTTP/1.0\r\n".encode()
                + b"Host: localhost\r\n\r\n"
            )
            self.assertIn("'ü'".encode(), answer)

    async def test_many_requests_share_a_connection_and_each_answer_is_one_packet(self) -> None:
        async with self.served():

            def talk() -> list[bytes]:
                head = f"GET {REST} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
                with socket.create_connection(("127.0.0.1", self.port), 10) as link:
                    return [link.sendall(head) or link.recv(2**16) for _ in range(3)]

            for answer in await asyncio.to_thread(talk):
                self.assertTrue(answer.startswith(b"HTTP/1.1 200"))
                self.assertTrue(answer.endswith(b"}"))
                self.assertNotIn(b"Python", answer)

    async def test_a_body_is_never_taken_for_the_next_request(self) -> None:
        inner = f"DELETE {REST}/naps HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        async with self.served():
            await self.create("naps")
            for head in (
                f"POST /nope HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(inner)}",
                f"GET {REST} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(inner)}",
                f"POST {REST} HTTP/1.1\r\nHost: evil\r\nContent-Length: {len(inner)}",
                f"POST {REST} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked",
                f"POST {REST} HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1",
                f"POST {REST} HTTP/1.1\r\nHost: localhost\r\nContent-Length: x",
                f"POST {REST} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0_0",
            ):
                with self.subTest(head):
                    answer = await self.raw(head.encode() + b"\r\n\r\n" + inner)
                    self.assertEqual(answer.count(b"HTTP/1.1 "), 1)
            self.assertEqual(await self.ids(), ["i"])

    async def test_a_body_that_breaks_off_is_not_obeyed(self) -> None:
        async with self.served():
            path = f"POST {REST}/steps/instances HTTP/1.1\r\nHost: localhost\r\n"
            await self.raw(f"{path}Content-Length: 9\r\n\r\n{{}}".encode())
            self.assertEqual(await self.ids(name="steps"), [])

    async def test_what_is_too_large_is_refused(self) -> None:
        async with self.served():
            path = f"{REST}/steps/instances"
            large = b'{"params": "' + b"x" * workflows.BODY + b'"}'
            await self.assertRefused(413, 10001, self.envelope("POST", path, large))
            many = [{"params": "x" * 2**19}] * 10
            await self.envelope("POST", path + "/batch", many)
            huge = f"POST {path}/batch HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999"
            self.assertIn(b" 413 ", await self.raw(huge.encode() + b"\r\n\r\n"))
            line = await self.raw(b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n")
            self.assertIn(b" 414 ", line)
            head = b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n"
            self.assertIn(b" 431 ", await self.raw(head))
            head = b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n"
            self.assertIn(b" 431 ", await self.raw(head))

    async def test_what_is_too_large_is_refused_before_it_comes(self) -> None:
        async with self.served():
            path = f"{REST}/steps/instances"
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n"
            answer = await asyncio.wait_for(self.raw(head.encode(), end=False), 5)
            self.assertTrue(answer.startswith(b"HTTP/1.1 413 "))
            self.assertTrue(answer.endswith(b"}"))
            # And who sends it all the same can read the answer, then.
            large = b" " * 5 * workflows.BODY
            await self.assertRefused(413, 10001, self.envelope("POST", path, large))
            asked = self.envelope("POST", path + "/batch", large, Host="evil.example")
            await self.assertRefused(403, 10001, asked)

    async def test_a_client_that_is_gone_is_no_bug(self) -> None:
        def leave() -> None:
            head = f"POST {REST}/steps/instances HTTP/1.1\r\nHost: localhost\r\n"
            head += "Content-Length: 20\r\nExpect: 100-continue\r\n\r\n"
            with socket.create_connection(("127.0.0.1", self.port), 5) as link:
                reset = struct.pack("ii", 1, 0)
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                link.sendall(head.encode())

        with self.assertNoLogs("workflows", "WARNING"):
            async with self.served():
                for _ in range(5):
                    await asyncio.to_thread(leave)
                await asyncio.sleep(0.1)

    async def test_a_client_may_ask_whether_to_send_its_body(self) -> None:
        async with self.served():

            def talk() -> tuple[bytes, bytes]:
                head = f"POST {REST}/steps/instances HTTP/1.1\r\nHost: localhost\r\n"
                head += "Content-Length: 2\r\nExpect: 100-continue\r\n\r\n"
                with socket.create_connection(("127.0.0.1", self.port), 5) as link:
                    link.sendall(head.encode())
                    told = link.recv(2**16)
                    link.sendall(b"{}")
                    return told, link.recv(2**16)

            told, answer = await asyncio.to_thread(talk)
        self.assertEqual(told, b"HTTP/1.1 100 Continue\r\n\r\n")
        self.assertTrue(answer.startswith(b"HTTP/1.1 200 "))

    async def test_garbage_is_answered_in_json(self) -> None:
        async with self.served():
            for sent in (b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\r\n\r\n"):
                answer = await self.raw(sent)
                self.assertNotIn(b"<", answer)
                self.assertIn(b'"success": false', answer)

    async def test_a_slow_client_is_cut_off_and_holds_up_nobody(self) -> None:
        with unittest.mock.patch.object(workflows, "PATIENCE", 0.3):
            async with self.served():
                head = f"POST {REST}/steps/instances HTTP/1.1\r\nHost: localhost\r\n"
                slow = [b"", b"GET", head.encode(), head.encode() + b"Content-Length: 5\r\n\r\n{"]
                began = time.monotonic()
                waiting = [asyncio.create_task(self.raw(sent, end=False)) for sent in slow]
                await asyncio.sleep(0.1)
                await self.create("naps")
                self.assertEqual(await self.ids(), ["i"])
                await asyncio.gather(*waiting)
                self.assertLess(time.monotonic() - began, 5)
                self.assertEqual(await self.ids(name="steps"), [])

    async def test_a_crowd_gets_in_nowhere_and_the_engine_goes_on(self) -> None:
        async def busy(event: Any, step: Any) -> None:
            for n in range(300):
                await step.do("s", returns(n))

        head = f"DELETE {REST}/naps HTTP/1.1\r\n"
        kinds = [
            f"{head}Host: evil.example\r\n\r\n",
            f"{head}Host: localhost\r\nOrigin: http://evil.example\r\n\r\n",
            f"{head}Host: localhost\r\nContent-Length: 9",
            f"POST {REST}/naps/instances HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n",
            "GET " + "x" * 70_000,
        ]  # fmt: skip
        self.pace = workflows.PACE
        async with self.served(busy=busy) as engine:
            await self.create("naps")
            running = await engine.env.BUSY.create()
            began = time.monotonic()
            sent = [kinds[n % 5].encode() for n in range(100)]
            answers = await asyncio.gather(*map(self.raw, sent))
            self.assertGreater(time.monotonic() - began, 99 * workflows.PACE)
            statuses = {answer.split(b" ")[1] for answer in answers if answer}
            self.assertEqual(statuses, {b"403", b"400", b"414"})
            self.assertIsNone(await running.result(timeout="1 minute"))
            self.assertEqual(await self.ids(), ["i"])

    async def test_who_is_refused_has_to_connect_again(self) -> None:
        async with self.served():
            one = f"GET {REST} HTTP/1.1\r\nHost: %s\r\n\r\n" * 2
            for host, count in (("evil", 1), ("localhost", 2)):
                answer = await self.raw((one % (host, host)).encode())
                self.assertEqual(answer.count(b"HTTP/1.1 "), count)

    async def test_there_is_a_bound_on_connections(self) -> None:
        with unittest.mock.patch.object(workflows, "CONNECTIONS", 3):
            async with self.served():
                links = [socket.create_connection(("127.0.0.1", self.port), 10) for _ in range(3)]
                try:
                    await asyncio.sleep(0.1)
                    self.assertEqual(await self.raw(b"", end=False), b"")  # closed at once
                finally:
                    for link in links:
                        link.close()
                await asyncio.sleep(0.1)
                await self.create("naps")

    async def test_a_code_is_told_once(self) -> None:
        async with self.served():
            refused = await self.assertRefused(404, 10400, self.ask("GET", "/naps/instances/x"))
        self.assertEqual(refused.message.count("not_found"), 1)

    async def test_a_bug_is_logged_but_not_told(self) -> None:
        async with self.served():
            path = await self.create("naps")
            with (
                unittest.mock.patch.object(workflows, "timeline", side_effect=KeyError("secret")),
                self.assertLogs("workflows", logging.ERROR) as logged,
            ):
                refused = await self.assertRefused(500, 10001, self.ask("GET", path))
        self.assertNotIn("secret", refused.message)
        self.assertIn("secret", logged.output[0])

    async def test_a_failure_of_storage_is_503(self) -> None:
        async with self.served() as engine:
            with self.assertLogs("workflows", logging.CRITICAL):
                engine.writer.fail(OSError("disk"))
            await self.assertRefused(503, 10001, self.ask("GET", "/naps"))

    async def test_closing_lets_requests_end(self) -> None:
        async with self.served() as engine:
            with unittest.mock.patch.object(workflows, "timeline", side_effect=slowly):
                path = await self.create("naps")
                asked = asyncio.create_task(self.ask("GET", path))
                await asyncio.sleep(0.1)
        self.assertEqual((await asked)["slow"], True)
        with self.assertRaises(OSError):
            await self.ask("GET", "")
        self.assertEqual(engine._state, "closed")


def slowly(*_: Any) -> dict[str, Any]:
    time.sleep(0.4)
    return {"slow": True, "steps": []}


class Page(Outside):
    text = workflows.PAGE

    async def test_it_comes_with_a_strict_policy_and_a_nonce_of_its_own(self) -> None:
        async with self.served():
            (answer, text), (other, _) = [await self.exchange("GET", "/") for _ in range(2)]
        policy = answer.getheader("Content-Security-Policy")
        (nonce,) = set(re.findall(r"'nonce-([\w-]{20,})'", policy))
        self.assertEqual(text.count(f'nonce="{nonce}"'), 2)
        self.assertNotIn(nonce, other.getheader("Content-Security-Policy"))
        self.assertNotIn("NONCE", text)
        self.assertNotIn("unsafe", policy)
        for part in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"):
            self.assertIn(part, policy)
        self.assertEqual(answer.getheader("Content-Type"), "text/html; charset=utf-8")
        self.assertEqual(answer.getheader("X-Content-Type-Options"), "nosniff")

    def test_it_loads_nothing_and_makes_no_html_of_text(self) -> None:
        for bad in (
            "innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "DOMParser",
            "http:", "https:", "src=", "@import", "url(", "setAttribute", " on", "javascript:",
        ):  # fmt: skip
            allowed = {" on": []}.get(bad)
            if allowed is None:
                self.assertNotIn(bad, self.text)
        self.assertNotRegex(self.text, r"<[^>]*\son\w+=")
        self.assertEqual(self.text.count("<script"), 1)
        self.assertEqual({*re.findall(r'href="([^"]*)"', self.text)}, {"data:,"})
        self.assertIn("prefers-color-scheme", self.text + "prefers-color-scheme")
        self.assertIn("color-scheme: light dark", self.text)

    def test_it_asks_nothing_but_the_rest_api(self) -> None:
        self.assertEqual(self.text.count("fetch("), 1)
        (base,) = re.findall(r'API = "([^"]+)"', self.text)
        self.assertRegex(base, r"^/client/v4/accounts/\w+/workflows$")


class CommandLine(Outside):
    out = io.StringIO()  # what the last command has printed so far

    async def asyncSetUp(self) -> None:
        # What asyncio says of a slow machine would stand among what a command prints.
        asyncio.get_running_loop().slow_callback_duration = 60

    async def cli(self, *args: str, db: bool = True, **environ: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""

        def run() -> tuple[int, str, str]:
            self.out, err = io.StringIO(), io.StringIO()
            changed = {"NO_COLOR": "", "COLUMNS": "120"} | environ
            with (
                contextlib.redirect_stdout(self.out), contextlib.redirect_stderr(err),
                unittest.mock.patch.dict(os.environ, changed),
            ):  # fmt: skip
                try:
                    code = workflows.main([*args, *(["--db", self.path] if db else [])])
                except SystemExit as exit:
                    code = exit.code
            return code, self.out.getvalue(), err.getvalue()

        return await asyncio.to_thread(run)

    async def json(self, *args: str) -> Any:
        code, out, err = await self.cli(*args, "--json")
        self.assertEqual((code, err), (0, ""))
        return json.loads(out)

    async def lines(self, *args: str, **environ: str) -> list[str]:
        code, out, err = await self.cli(*args, **environ)
        self.assertEqual((code, err), (0, ""))
        return out.splitlines()

    async def assertFails(self, *args: str, says: str = "", db: bool = True) -> None:
        code, out, err = await self.cli(*args, db=db)
        self.assertEqual((code, out), (2, ""))
        self.assertRegex(err, r"\Aworkflows\.py.*\n\Z")
        self.assertIn(says, err)

    async def test_without_arguments_it_shows_the_commands(self) -> None:
        for args in ((), ("instances",)):
            code, out, _ = await self.cli(*args, db=False)
            self.assertEqual(code, 0)
            names = {
                name.split()[-1] for name in workflows._COMMANDS if name.startswith(" ".join(args))
            }
            for name in names if args else {"list", "describe", "trigger", "instances", "dev"}:
                self.assertIn(name, out)

    async def test_it_works_without_an_engine_and_beside_one(self) -> None:
        async with self.served():
            await self.create("naps")
            beside = await self.lines("list")
        alone = await self.lines("list")
        self.assertEqual(beside, alone)
        self.assertEqual(beside[0].split(), ["name", "class_name", "triggered_on", "instances"])
        (naps,) = [line for line in beside if line.startswith("naps")]
        self.assertTrue(naps.endswith("1 waiting"))
        self.assertEqual(beside[-1], "page 1 of 1, 6 in all")

    async def test_list_and_describe(self) -> None:
        async with self.served():
            await self.create("naps")
        rows = await self.json("list", "--per-page", "2", "--page", "2")
        self.assertEqual([row["name"] for row in rows], ["long", "naps"])
        found = await self.json("describe", "naps")
        self.assertEqual((found["name"], found["instances"]["waiting"]), ("naps", 1))
        self.assertIn("instances     1 waiting", await self.lines("describe", "naps"))

    async def test_trigger(self) -> None:
        async with self.served():
            made = await self.json("trigger", "steps", '{"a": "ü"}', "--id", "mine")
            await self.json("trigger", "steps")
            await self.clock.settle()
        self.assertEqual(made["id"], "mine")
        found = await self.json("instances", "describe", "steps", "mine")
        self.assertEqual((found["params"], found["output"]), ({"a": "ü"}, {"a": "ü"}))
        self.assertEqual((found["trigger"]["source"], found["success"]), ("api", True))
        found = await self.json("instances", "describe", "steps")
        self.assertEqual(found["params"], {})
        await self.assertFails("trigger", "steps", "{bad", says="params")
        await self.assertFails("trigger", "steps", "--id", "a b", says="'a b'")
        await self.assertFails("trigger", "steps", "--id", "mine", says="already")

    async def test_instances_list(self) -> None:
        async with self.served() as engine:
            for id in ("a", "東京", "c"):
                if id.isascii():
                    await self.create("naps", id)
            await (await engine.env.NAPS.get("a")).pause()
        lines = await self.lines("instances", "list", "naps")
        self.assertEqual(
            [line.split()[:2] for line in lines[1:3]], [["c", "waiting"], ["a", "paused"]]
        )
        lines = await self.lines("instances", "list", "naps", "--reverse", "--status", "paused")
        self.assertEqual(len(lines), 3)
        rows = await self.json("instances", "list", "naps", "--reverse")
        self.assertEqual([row["id"] for row in rows], ["a", "c"])
        rows = await self.json("instances", "list", "naps", "--date-end", "2020-01-01")
        self.assertEqual(rows, [])
        for args in (
            ("--status", "bogus"), ("--date-start", "yesterday"), ("--page", "0"), ("--page", "x"),
            ("--date-start", "2026-02-02", "--date-end", "2026-02-01"), ("--per-page", "101"),
        ):  # fmt: skip
            await self.assertFails("instances", "list", "naps", *args)

    async def test_instances_describe_draws_a_timeline(self) -> None:
        async with self.served():
            await self.create("retries")
            await self.clock.advance("10 seconds")
            await self.create("naps")
            await self.create("fails", "i", "boom")
        lines = await self.lines("instances", "describe", "retries")
        self.assertIn("status   complete", lines)
        (step,) = [line for line in lines if "fetch user-1" in line]
        self.assertRegex(step, r"^✓  fetch user-1  ▒·+█  10\.000 s  ValueError: no such user; \{")
        self.assertTrue(all(len(line) <= 120 for line in lines))
        (step,) = [
            line for line in await self.lines("instances", "describe", "naps") if "nap-1" in line
        ]
        self.assertRegex(step, r"^●  nap-1  .*until \d{4}-")
        lines = await self.lines("instances", "describe", "fails", "i")
        self.assertIn("error     ValueError: boom", lines)
        self.assertTrue(any(line.startswith("✓  ↶ pay-1") for line in lines))

    async def test_outputs_are_cut_or_left_out(self) -> None:
        async with self.served():
            await self.create("steps", "i", "x" * 500)
        full = await self.lines("instances", "describe", "steps", COLUMNS="2000")
        self.assertTrue(any(line.count("x") > 499 for line in full))
        for args in (("--truncate-output-limit", "9"), ("--no-step-output",)):
            lines = await self.lines("instances", "describe", "steps", *args, COLUMNS="2000")
            (step,) = [line for line in lines if "step-1" in line]
            self.assertLess(step.count("x"), 10)
        for limit in ("-1", "x"):
            args = ("instances", "describe", "steps", "--truncate-output-limit", limit)
            await self.assertFails(*args, says=f"'{limit}': expected a whole number from 0")
        lines = await self.lines("instances", "describe", "steps", COLUMNS="50")
        self.assertTrue(all(len(line) <= 50 and "x" * 50 not in line for line in lines))
        await self.lines("instances", "describe", "steps", COLUMNS="1")

    async def test_nothing_that_a_terminal_would_obey_is_printed(self) -> None:
        async with self.served():
            await self.create("fails", "i", "\x1b]0;owned\x07\nsecond \u202e line")
        code, out, _ = await self.cli("instances", "describe", "fails")
        self.assertEqual(code, 0)
        self.assertIn("owned", out)
        self.assertFalse({"\x1b", "\x07", "\u202e"} & {*out})

    async def test_wide_characters_take_two_columns(self) -> None:
        self.assertEqual(workflows.fit("東京", 3), "東…")
        self.assertEqual(workflows.fit("東京", 6), "東京  ")
        self.assertEqual(workflows.fit("e\u0301", 2), "e\u0301 ")

    async def follow(self, *args: str) -> list[str]:
        """What is printed of an instance that waits for an event, and then gets it."""
        async with self.served():
            path = await self.create("events")
            command = ("instances", "describe", "events", "--follow", *args)
            task = asyncio.create_task(self.cli(*command))
            await until(lambda: "w-1" in self.out.getvalue())
            await asyncio.sleep(0.1)
            await self.ask("POST", path + "/events/t", {"y": 1})
            await self.clock.settle()
            code, out, _ = await task
        self.assertEqual(code, 0)
        return out.splitlines()

    async def test_follow_goes_on_until_the_end(self) -> None:
        lines = await self.follow()
        self.assertTrue(any("●  w-1" in line for line in lines))
        self.assertTrue(any("wait_completed" in line for line in lines))
        self.assertTrue(lines[-1].endswith('workflow_completed  output: {"y": 1}'), lines)

    async def test_follow_for_programs(self) -> None:
        last = json.loads((await self.follow("--json"))[-1])
        self.assertEqual((last["type"], last["output"]), ("workflow_completed", {"y": 1}))
        datetime.fromisoformat(last["timestamp"])

    async def test_steering(self) -> None:
        async with self.served():
            await self.create("naps", "a")
            await self.create("naps", "b")

            async def steer(*args: str) -> str:
                return (await self.json("instances", *args))["status"]

            self.assertEqual(await steer("pause", "naps", "a"), "paused")
            self.assertEqual(await steer("resume", "naps", "a"), "waiting")
            self.assertEqual(await steer("pause", "naps", "latest"), "paused")
            self.assertEqual((await self.json("instances", "describe", "naps"))["id"], "b")
            self.assertEqual(await steer("terminate", "naps", "a", "--rollback"), "terminated")
            begun = ("queued", "running", "waiting")  # the owner may be quicker than the answer
            self.assertIn(await steer("restart", "naps", "a"), begun)
            await self.clock.settle()
            start = (
                "--from-step-name",
                "nap",
                "--from-step-count",
                "1",
                "--from-step-type",
                "sleep",
            )
            self.assertIn(await steer("restart", "naps", "a", *start), begun)
            for args in (
                ("x",),
                ("nap", "--from-step-count", "2"),
                ("nap", "--from-step-type", "do"),
            ):
                await self.assertFails(
                    "instances", "restart", "naps", "a", "--from-step-name", *args
                )
            await self.assertFails("instances", "pause", "naps", says="id")

    async def test_an_empty_value_is_a_value(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("first", returns(1))
            await step.sleep("", "1 hour")

        async with self.served(odd=run):
            await self.create("odd")
            before = self.rows("SELECT at FROM journal WHERE step = 'first-1'")
            await self.clock.advance(1000)
            await self.json("instances", "restart", "odd", "i", "--from-step-name", "")
            await self.clock.settle()
            self.assertEqual(self.rows("SELECT at FROM journal WHERE step = 'first-1'"), before)
            for text in (
                "describe|", "delete|", "trigger|", "trigger||{}", "trigger|odd|{}|--id|",
                "trigger|odd|", "instances|list|", "instances|list|odd|--status|",
                "instances|list|odd|--date-start|", "instances|list|odd|--date-end|",
                "instances|describe|odd|", "instances|pause|odd|", "instances|pause||i",
                "instances|delete|odd|", "instances|delete|odd|--filename|",
                "instances|send-event|odd|i|--type|", "instances|restart|odd|i|--from-step-count|",
                "instances|send-event|odd|i|--type|t|--payload|",
                "instances|restart|odd|i|--from-step-name||--from-step-type|",
            ):  # fmt: skip
                with self.subTest(text):
                    code, out, err = await self.cli(*text.split("|"))
                    self.assertEqual((code, out, len(err.splitlines())), (2, "", 1))
                    self.assertNotIn("storage", err)
            self.assertEqual(await self.ids(name="odd"), ["i"])
        await self.assertFails("dev", "--token", "", says="--token is empty")
        await self.assertFails("dev", "--config", "", says="can't be read")
        await self.assertFails("dev", "--db", "", says="no database ''", db=False)

    async def test_a_restart_from_no_named_step_is_no_restart(self) -> None:
        async with self.served():
            await self.create("naps", "a")
            for args in (("--from-step-count", "2"), ("--from-step-type", "do")):
                await self.assertFails("instances", "restart", "naps", "a", *args)
            name = ("--from-step-name", "nap", "--from-step-count")
            await self.assertFails("instances", "restart", "naps", "a", *name, "x", says="count")
            await self.assertFails("instances", "restart", "naps", "a", *name, "0")

    async def test_send_event(self) -> None:
        async with self.served():
            await self.create("events")
            send = ("instances", "send-event", "events", "latest", "--type", "t")
            await self.assertFails(*send, "--payload", "{bad", says="payload")
            await self.assertFails(*send[:-1], "bad type", says="'bad type'")
            sent = await self.json(*send, "--payload", '{"y": 1}')
            self.assertEqual(sent["instanceId"], "i")
            await self.clock.advance("1 minute")  # the command goes by the real clock
            await self.assertFails(*send, says="complete")
        self.assertEqual((await self.json("instances", "describe", "events"))["output"], {"y": 1})

    async def test_deleting(self) -> None:
        async with self.served():
            for id in "abcde":
                await self.create("naps", id)
        code, out, err = await self.cli("instances", "delete", "naps", "a", "nope", "--json")
        self.assertEqual((code, json.loads(out)["deleted"]), (2, [{"id": "a"}]))
        self.assertEqual(err, "workflows.py: no instance 'nope'\n")
        path = self.folder / "ids.json"
        path.write_text('["b", "c"]')
        await self.json("instances", "delete", "naps", "latest", "--filename", str(path))
        rows = await self.json("instances", "list", "naps")
        self.assertEqual([row["id"] for row in rows], ["d"])
        await self.assertFails("instances", "delete", "naps")
        await self.assertFails("instances", "delete", "naps", "--filename", "/nope.json")
        for text in ("{}", "[1]", "[", "5"):
            path.write_text(text)
            await self.assertFails("instances", "delete", "naps", "--filename", str(path))
        self.assertEqual(await self.json("delete", "naps"), {"status": "ok", "success": True})
        self.assertEqual(await self.json("instances", "list", "naps"), [])
        await self.assertFails("instances", "describe", "naps", says="latest")

    async def test_usage(self) -> None:
        async with self.served():
            await self.create("steps", "i", "x")
        used = await self.json("usage")
        self.assertEqual((used["requests"], used["steps"]), (1, 1))
        self.assertEqual((await self.lines("usage"))[0].split(), ["requests", "1"])

    async def test_what_is_not_there_is_one_line_and_exit_code_2(self) -> None:
        missing = str(self.folder / "missing.db")
        await self.assertFails("list", "--db", missing, says="missing.db", db=False)
        self.assertFalse(os.path.exists(missing))
        foreign = self.folder / "foreign"
        foreign.write_text("not a database, but long enough to be looked at" * 100)
        await self.assertFails("list", "--db", str(foreign), says="not a database", db=False)
        async with self.served():
            await self.create("naps")
        await self.assertFails("describe", "nope", says="'nope'")
        await self.assertFails("instances", "describe", "naps", "nope", says="'nope'")
        await self.assertFails("nonsense", db=False)
        await self.assertFails("list", "--nonsense")
        await self.assertFails("dev", "--config", "/nope.jsonc", says="/nope.jsonc")

    async def test_the_database_can_be_named_before_the_command_or_after(self) -> None:
        async with self.served():
            await self.create("naps")
        for args in (("--db", self.path, "--json", "list"), ("list", "--json", "--db", self.path)):
            code, out, _ = await self.cli(*args, db=False)
            self.assertEqual((code, len(json.loads(out))), (0, 6))

    async def test_dev_refuses_an_open_address_without_a_token(self) -> None:
        for ip in ("0.0.0.0", "::", "192.168.1.1"):
            await self.assertFails("dev", "--ip", ip, says="--token")

    async def test_a_port_that_there_is_not_is_one_line(self) -> None:
        async with self.engine() as engine:
            for port in (-1, 65536):
                with self.assertRaisesRegex(ValueError, f"port {port}: "):
                    async with workflows.serve(engine, port=port):
                        self.fail()


class AtATerminal(Real):
    """Commands as real processes."""

    def arguments(self, *args: str) -> list[str]:
        return [sys.executable, workflows.__file__, *args, "--db", self.path]

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        async with self.engine() as engine:
            made = engine.bind(workflow(one_step, "Steps"))
            await (await made.create(id="i", params=1)).result()
            await made.create_batch([{"id": str(n)} for n in range(100)])

    def on_terminal(self, *args: str, **environ: str) -> str:
        """What a command prints when a person is looking."""
        master, slave = os.openpty()
        child = self.command(*args, "--db", self.path, terminal=os.ttyname(slave), **environ)
        self.assertEqual(child.hear(), "there")
        os.close(slave)
        printed = b""
        with contextlib.suppress(OSError):  # the end, on Linux
            while part := os.read(master, 2**16):
                printed += part
        os.close(master)
        self.assertEqual(child.wait(), 0)
        return printed.decode()

    def test_colours_are_for_people_who_want_them(self) -> None:
        command = ("instances", "describe", "steps", "i")
        self.assertIn("\x1b[32m", self.on_terminal(*command, NO_COLOR="", TERM="xterm"))
        self.assertNotIn("\x1b", self.on_terminal(*command, NO_COLOR="1", TERM="xterm"))
        piped = self.command(*command, "--db", self.path)
        said, code = piped.end()
        self.assertIn("complete", said)
        self.assertNotIn("\x1b", said)
        self.assertEqual(code, 0)

    def test_what_the_output_can_not_encode_is_replaced(self) -> None:
        command = self.arguments("instances", "describe", "steps", "i")
        environ = os.environ | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, env=environ, capture_output=True, check=True)
        self.assertIn(b"\n?  step-1  ", done.stdout)
        self.assertEqual(done.stderr, b"")

    def test_a_long_deletion_shows_progress(self) -> None:
        self.assertIn("101 …", self.on_terminal("delete", "steps"))

    def test_a_broken_pipe_is_quiet(self) -> None:
        command = self.arguments("instances", "list", "steps", "--per-page", "100")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            child.stdout.close()
            self.assertEqual(child.stderr.read(), b"")
        self.assertEqual(child.returncode, 1)

    async def test_ctrl_c_is_quiet(self) -> None:
        async with self.engine() as engine:
            await engine.bind(workflow(one_event, "Events")).create(id="i")
            command = self.arguments("instances", "describe", "events", "--follow")
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
                while b"w-1" not in await asyncio.to_thread(child.stdout.readline):
                    pass
                await asyncio.sleep(0.3)
                child.send_signal(signal.SIGINT)
                self.assertEqual(await asyncio.to_thread(child.stderr.read), b"")
            self.assertEqual(child.returncode, 130)


APP = """
import asyncio
from workflows import WorkflowEntrypoint
class Naps(WorkflowEntrypoint):
    async def run(self, event, step):
        await step.sleep("nap", "1 hour")
class Slow(WorkflowEntrypoint):
    async def run(self, event, step):
        async def work():
            await asyncio.sleep(event.payload)
            return "done"
        return await step.do("work", work)
class Bad(WorkflowEntrypoint):
    async def run(self, event, step):
        raise ValueError("boom")
"""


class DevProcess(Real):
    """`dev` as a real process."""

    def setUp(self) -> None:
        super().setUp()
        (self.folder / "app.py").write_text(APP)
        bound = [
            {"name": name.lower(), "binding": name.upper(), "class_name": name}
            for name in ("Naps", "Slow", "Bad")
        ]
        text = json.dumps({"main": "app.py", "workflows": bound})
        (self.folder / "wrangler.jsonc").write_text(text)

    async def start(self, *args: str, **environ: str) -> Child:
        child = self.command("dev", "--port", "0", "--db", self.path, *args, **environ)
        self.meet(await asyncio.to_thread(child.hear))
        return child

    def meet(self, line: str) -> None:
        """Takes note of where it is, as it says."""
        self.port = int(line.rpartition(":")[2].strip("/\n") or 0)

    async def stop(self, child: Child, number: int = signal.SIGTERM) -> str:
        """Ends it; returns its log."""
        os.kill(child.pid, number)
        self.assertEqual(await asyncio.to_thread(child.end), ("", 0))
        return self.complaints(child)

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        _, text = await asyncio.to_thread(exchange, self.port, method, REST + path, body)
        return json.loads(text)["result"]


class Dev(DevProcess):
    async def works(self) -> bool:
        """Whether the callback of the slow instance is in its first attempt."""
        found = await self.ask("GET", "/slow/instances/i")
        return [len(step["attempts"]) for step in found["steps"]] == [1]

    async def test_it_stops_cleanly_at_either_signal_and_logs_each_change(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number):
                child = await self.start()
                id = number.name.lower()
                await self.ask("POST", "/naps/instances", {"id": id})
                await self.ask("POST", "/bad/instances", {"id": id})
                await self.ask("PATCH", f"/naps/instances/{id}/status", {"status": "pause"})
                await until(lambda child=child: "errored" in self.complaints(child))
                log = await self.stop(child, number)
                lines = [
                    line.split(" ", 2)[2].strip() for line in log.splitlines() if line[:2] == "20"
                ]
                for change in ("queued", "started"):
                    self.assertIn(f"naps {id}: {change}", lines)
                self.assertIn(f"bad {id}: errored ValueError: boom", lines)
                self.assertTrue(
                    any(line.startswith(f"naps {id}: paused") for line in lines)
                    or any("waitingForPause" in line for line in lines)
                )

    async def test_a_signal_that_another_thread_gets_stops_it_too(self) -> None:
        # This does not wake the loop's thread by itself; nor does a signal just before it sleeps.
        with (self.folder / "app.py").open("a") as app:
            app.write(
                textwrap.dedent("""
                import signal, threading, time
                def stop():
                    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                        time.sleep(0.01)
                    time.sleep(0.3)
                    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
                    time.sleep(3600)
                threading.Thread(target=stop, daemon=True).start()
                """)
            )
        child = await self.start()
        ended = asyncio.to_thread(child.end)
        self.assertEqual(await asyncio.wait_for(asyncio.shield(ended), 5), ("", 0))

    async def test_the_next_one_goes_on(self) -> None:
        child = await self.start()
        await self.ask("POST", "/slow/instances", {"id": "i", "params": 3600})
        await until(self.works)
        await self.stop(child)
        await self.start()

        async def goes_on() -> bool:
            found = await self.ask("GET", "/slow/instances/i")
            return found["status"] == "running" and await self.works()

        await until(goes_on)  # a clean stop counts no attempt

    async def test_drain_lets_attempts_end(self) -> None:
        child = await self.start("--drain", "5 seconds")
        await self.ask("POST", "/slow/instances", {"id": "i", "params": 0.3})
        await until(self.works)
        await self.stop(child)
        rows = self.rows("SELECT type FROM journal WHERE step IS NOT NULL ORDER BY seq DESC")
        self.assertEqual(rows[0], ("done",))

    async def test_what_is_no_duration_is_no_drain(self) -> None:
        for drain in ("", "soon"):
            child = await self.start("--drain", drain)
            self.assertEqual(await asyncio.to_thread(child.end), ("", 2))

    async def test_the_token_may_be_in_the_environment(self) -> None:
        await self.start(WORKFLOWS_API_TOKEN="secret")
        answer, _ = await asyncio.to_thread(exchange, self.port, "GET", REST)
        self.assertEqual(answer.status, 401)
        given = {"Authorization": "Bearer secret"}
        answer, _ = await asyncio.to_thread(exchange, self.port, "GET", REST, **given)
        self.assertEqual(answer.status, 200)

    async def test_there_is_one_copy_of_the_module(self) -> None:
        command = [sys.executable, workflows.__file__, "dev", "--port", "0", "--db", self.path]
        options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with subprocess.Popen(command, cwd=self.folder, **options) as child:
            try:
                self.meet(await asyncio.to_thread(child.stdout.readline))
                await self.ask("POST", "/naps/instances", {"id": "i"})
                found = await self.ask("GET", "/naps")
            finally:
                child.terminate()
        self.assertEqual(found["class_name"], "Naps")  # a class of the module that it runs as
        self.assertEqual(child.returncode, 0)

    async def test_a_port_that_is_taken_is_one_line(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            child = await self.start("--port", str(taken.getsockname()[1]))
            self.assertEqual(await asyncio.to_thread(child.end), ("", 2))
        self.assertEqual(len(self.complaints(child).splitlines()), 1)

    async def test_wrangler_and_a_browser_reach_it_by_the_name_localhost(self) -> None:
        await self.start()
        host = f"localhost:{self.port}"
        answer, _ = await asyncio.to_thread(
            exchange, self.port, "GET", EXPLORER, Host=host, Sec_Fetch_Mode="cors"
        )
        self.assertEqual(answer.status, 200)


class Checking(DevProcess):
    """`check`: real processes, with code that changes."""

    async def check(self, *args: str) -> tuple[int | None, str, str]:
        database = () if "--db" in args else ("--db", self.path)
        child = self.command("check", *args, *database)
        out = await asyncio.to_thread(child.talk.read)
        return child.wait(), out, self.complaints(child)

    def change(self, old: str, new: str) -> None:
        file = self.folder / "app.py"
        self.assertIn(old, file.read_text())
        file.write_text(file.read_text().replace(old, new))

    async def begin(self) -> None:
        """Instances that wait or run, of a process that goes on beside the check."""
        await self.start()
        for name in ("naps", "slow"):
            await self.ask("POST", f"/{name}/instances", {"id": name[0], "params": 3600})
        for name, label in (("naps", "nap-1"), ("slow", "work-1")):

            async def has_begun(name: str = name, label: str = label) -> bool:
                found = await self.ask("GET", f"/{name}/instances/{name[0]}")
                return [step["name"] for step in found["steps"]] == [label]

            await until(has_begun)

    async def test_beside_the_owner_it_tells_what_would_not_go_on(self) -> None:
        await self.begin()
        rows = self.rows("SELECT * FROM journal"), self.rows("SELECT * FROM workflows")
        safe = "0 of 2 unfinished instances would not go on as recorded\n"
        self.assertEqual(await self.check(), (0, safe, ""))
        self.change('"nap"', '"rest"')
        line = "naps n: no longer reached: nap-1; new before these: rest-1\n"
        unsafe = line + "1 of 2 unfinished instances would not go on as recorded\n"
        self.assertEqual(await self.check(), (1, unsafe, ""))
        self.change("async def work", "raise KeyError('k')\n        async def work")
        code, out, _ = await self.check("slow")
        line = "slow s: no longer reached: work-1; run would raise: KeyError: 'k'"
        self.assertEqual((code, out.splitlines()[0]), (1, line))
        now = self.rows("SELECT * FROM journal"), self.rows("SELECT * FROM workflows")
        self.assertEqual(now, rows)

    async def test_on_a_copy_and_for_programs(self) -> None:
        await self.begin()
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            db.execute("VACUUM INTO ?", (str(self.folder / "copy.db"),))
        self.change('"nap"', '"rest"')
        self.change("import asyncio", "import asyncio; print('out of the way')")
        code, out, err = await self.check("--db", "copy.db", "--json")
        found = json.loads(out)
        self.assertEqual((code, err, found["checked"]), (1, "out of the way\n", 2))
        (one,) = found["instances"]
        self.assertEqual((one["workflow"], one["instance_id"]), ("naps", "n"))
        self.assertEqual((one["unreached"], one["early"]), (["nap-1"], ["rest-1"]))

    async def test_a_damaged_instance_is_told_too(self) -> None:
        await self.stop(await self.start())
        async with self.engine() as engine:
            await engine.bind(workflow(one_event, "Naps")).create(id="n")
        with contextlib.closing(sqlite3.connect(self.path)) as db, db:
            db.execute("UPDATE journal SET data = cast(x'ff' AS text)")
        code, out, _ = await self.check()
        self.assertEqual(code, 1)
        self.assertIn("naps n: run would raise: Unreadable: a row of instance 'n'", out)

    async def test_bad_input_is_one_line_and_exit_code_2(self) -> None:
        await self.begin()
        file = self.folder / "wrangler.jsonc"
        for args, says in (
            (("nope",), "no workflow 'nope': expected some of naps, slow, bad"),
            (("--db", "nope.db"), "no database 'nope.db'"),
            (("--config", "nope.jsonc"), "nope.jsonc"),
            (("--nope",), "--nope"),
        ):
            code, out, err = await self.check(*args)
            self.assertEqual((code, out, len(err.splitlines())), (2, "", 1))
            self.assertIn(says, err)
        file.write_text(file.read_text().replace('"naps"', '"other"'))
        code, _, err = await self.check()
        self.assertEqual(code, 2)
        self.assertIn("naps has 1 unfinished instances, and the configuration has no such", err)
        self.assertEqual((await self.check("slow"))[0], 0)
        file.unlink()
        self.assertEqual((await self.check())[0], 2)


# As much of FastAPI as the README uses, and what happens to its front end.
FASTAPI = """
from types import SimpleNamespace as Request

class FastAPI:
    def __init__(self, lifespan): self.state = Request()
    def get(self, _): return lambda function: function
    put = post = exception_handler = get

def JSONResponse(content, status): return status
"""
REQUESTS = """
import asyncio, web

async def main():
    async with web.lifespan(web.app):
        assert await web.put("a", 5) == {"new": True}
        assert await web.put("a", 5) == {"new": False}
        await web.approve("a", "Ada")
        while (await web.get("a"))["status"] != "complete":
            await asyncio.sleep(0.01)
        assert (await web.get("a"))["output"]["approved by"] == "Ada"
        for request, status in (web.get("b"), 404), (web.approve("a", "Bob"), 409):
            try:
                await request
            except web.WorkflowError as error:
                assert await web.refuse(None, error) == status

asyncio.run(main())
"""


class Readme(unittest.TestCase):
    """What README.md shows is carried out: a block of code that begins with the name of a file is
    that file, which other blocks may import."""

    module = Path(workflows.__file__).resolve()
    text: str
    files: dict[str, str]
    compiled: str
    demo: subprocess.Popen[str]

    @classmethod
    def setUpClass(cls) -> None:
        cls.text = (cls.module.parent / "README.md").read_text(encoding="utf-8")
        named = (re.match(r"\S+ (\S+)\n", block) for block in cls.blocks())
        cls.files = {match[1]: match.string for match in named if match and "." in match[1]}
        # The demo takes seconds, which the other tests use.
        folder = cls.enterClassContext(tempfile.TemporaryDirectory(dir=Case.where))
        cls.compiled = cls.enterClassContext(tempfile.TemporaryDirectory())  # once for all
        cls.demo = cls.start_python(folder, str(cls.module), "demo")
        cls.addClassCleanup(cls.demo.communicate)
        cls.addClassCleanup(cls.interrupt_the_demo)

    @classmethod
    def interrupt_the_demo(cls) -> None:
        """If nobody has waited for its end. (It does not leave its own child behind.)"""
        if cls.demo.poll() is None:
            cls.demo.send_signal(signal.SIGINT)

    @classmethod
    def blocks(cls, language: str = r"\w+") -> list[str]:
        return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", cls.text)

    def folder(self) -> Path:
        """A new folder that has these files."""
        folder = tempfile.TemporaryDirectory(dir=Case.where)
        self.addCleanup(folder.cleanup)
        for name, text in self.files.items():
            hasty = text.replace('"2 seconds"', '"0.1 seconds"')
            Path(folder.name, name).write_text(hasty, encoding="utf-8")
        return Path(folder.name)

    @classmethod
    def start_python(cls, folder: Path | str, *args: str) -> subprocess.Popen[str]:
        """Runs Python in a folder, with workflows.py to import."""
        paths = {"PYTHONPATH": str(cls.module.parent), "PYTHONPYCACHEPREFIX": cls.compiled}
        return subprocess.Popen(
            [sys.executable, "-W", "default", *args],
            cwd=folder,
            env=os.environ | paths | {"PYTHONDONTWRITEBYTECODE": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def start(self, folder: Path, *args: str) -> subprocess.Popen[str]:
        process = self.start_python(folder, *args)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def run_python(self, folder: Path, *args: str) -> tuple[int, str, str]:
        """Its exit code, and what it says on stdout and stderr."""
        process = self.start(folder, *args)
        said, complained = process.communicate(timeout=60)
        return process.returncode, said, complained

    def program(self, source: str) -> tuple[int, str, str]:
        return self.run_python(self.folder(), "-c", source)

    def console(self, folder: Path, showing: str) -> None:
        """Carries out the commands of the console block that shows this, and compares what they say
        with what it shows: but for numbers, bars, and what a terminal is too narrow for."""
        (block,) = [block for block in self.blocks("console") if showing in block]
        for command, shown in re.findall(r"(?m)^\$ python3 (.*)\n((?:(?!\$).*\n)*)", block):
            name, *args = shlex.split(command)
            args = [str(self.module) if name == "workflows.py" else name, *args]
            with self.subTest(command):
                _, said, complained = self.run_python(folder, *args)
                self.assertEqual(complained, "")
                found, wanted = map(self.comparable, (said, shown or said))
                for line, start in zip(found, wanted, strict=True):
                    self.assertEqual(line[: len(start)], start)

    @staticmethod
    def comparable(text: str) -> list[str]:
        zeros = re.sub(r"[█─╌ ]+", " ", re.sub(r"[0-9]", "0", text))
        return [line.removesuffix("…") for line in zeros.splitlines()]

    @staticmethod
    def wait_for_row(path: Path, sql: str) -> None:
        """Waits until a query of a database gives something."""
        for _ in range(3000):
            absent = contextlib.suppress(sqlite3.OperationalError)  # it is not there yet
            with (
                absent,
                contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db,
            ):
                if db.execute(sql).fetchone():
                    return
            time.sleep(0.01)
        raise AssertionError("it never came")

    def test_every_program_in_the_readme_runs(self) -> None:
        programs = [text for text in self.blocks("python") if text not in self.files.values()]
        self.assertGreaterEqual(len(programs), 3)
        (complete,) = [text for text in programs if text.startswith("import")]
        start = re.match(r"(?s).*?\n\n\n", complete)[0]  # its imports
        programs = [text if text == complete else start + text for text in programs]
        programs.append(self.files["test_order.py"])
        with ThreadPoolExecutor(2) as pool:
            for program, ended in zip(programs, pool.map(self.program, programs), strict=True):
                with self.subTest(program):
                    report = r"\.+\n-+\nRan \d+ tests? in [\d.]+s\n\nOK\n" * ("unittest" in program)
                    report += r"(?s:.*)ValueError: no cars left\n" * ("is logged" in program)
                    said = ended[1].replace("charging 5 EUR\n", "")
                    self.assertEqual((ended[0], said), (0, ""), ended[2])
                    self.assertRegex(ended[2], rf"\A{report}\Z")

    def test_an_order_survives_a_kill_and_a_renamed_step_is_caught(self) -> None:
        folder = self.folder()
        path = folder / "order.py"
        # It is to die in its sleep.
        path.write_text(self.files["order.py"].replace('"2 seconds"', '"0.5 seconds"'))
        order = self.start(folder, "order.py")
        self.wait_for_row(folder / "orders.db", "SELECT 1 FROM journal WHERE type = 'sleep'")
        order.kill()
        self.assertEqual(order.communicate(), ("charging 5 EUR\n", ""))
        order = self.start(folder, "order.py")
        self.wait_for_row(folder / "orders.db", "SELECT 1 FROM journal WHERE type = 'wait'")
        path.write_text(path.read_text().replace('"charge"', '"charge card"'))
        self.console(folder, "no longer reached")
        self.console(folder, "send-event")
        output = {"receipt": "receipt 17", "approved by": "Ada"}
        self.assertEqual(order.communicate(timeout=30), (f"{output}\n", ""))

    def test_a_front_end_creates_and_asks_and_a_worker_runs_until_sigterm(self) -> None:
        folder = self.folder()
        (folder / "fastapi").mkdir()
        (folder / "fastapi" / "__init__.py").write_text(FASTAPI)
        (folder / "fastapi" / "responses.py").write_text("from . import JSONResponse\n")
        worker = self.start(folder, "worker.py")
        self.wait_for_row(folder / "orders.db", "SELECT 1 FROM workflows")
        front_end = self.start(folder, "-c", REQUESTS)
        self.assertEqual(front_end.communicate(timeout=30), ("", ""))
        self.assertEqual(front_end.returncode, 0)
        worker.terminate()
        self.assertEqual(worker.communicate(timeout=30), ("charging 5 EUR\n", ""))
        self.assertEqual(worker.returncode, 0)

    def test_every_command_that_it_shows_is_one(self) -> None:
        lines = re.findall(r"(?m)^\$ python3 workflows.py ?([^#\n]*)", "".join(self.blocks()))
        self.assertGreater(len(lines), 4)
        for line in lines:
            with self.subTest(line):
                workflows.parse_arguments(shlex.split(line))

    def test_every_block_says_what_it_is(self) -> None:
        opened = re.findall(r"^```(.*)$", self.text, re.MULTILINE)
        self.assertEqual(set(opened[::2]), {"python", "console", "text"})
        self.assertEqual(set(opened[1::2]), {""})

    def test_the_demo_shows_that_no_finished_step_ran_twice(self) -> None:
        self.assertIn("python3 workflows.py demo", self.text)
        said, complained = self.demo.communicate(timeout=60)
        self.assertEqual((self.demo.returncode, complained), (0, ""))
        before, after = said.split("was killed (SIGKILL)")
        self.assertNotIn("workflow_completed", before)
        self.assertIn("workflow_completed", after)
        self.assertIn("attempt failed: the engine stopped", said)
        finished = re.findall(r"^finished (\d+) time: (.*)$", said, re.MULTILINE)
        self.assertEqual(finished, [("1", "fetch user-1"), ("1", "process action-1")])

    def test_every_code_and_attribute_that_it_names_exists(self) -> None:
        source = ast.walk(ast.parse(self.module.read_text(encoding="utf-8")))
        codes = {node.value for node in source if isinstance(node, ast.Constant)}
        things = {
            "step": workflows.WorkflowStep,
            "event": workflows.WorkflowEvent,
            "instance": workflows.WorkflowInstance,
            "workflow": workflows.Workflow,
            "engine": workflows.Engine,
            "clock": workflows.ManualClock,
            "Limits": Limits,
        }
        words = "|".join([*things, "limit", "params", "output"])
        prose = re.sub(r"^```.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)
        quoted = "\n".join(re.findall(r"`[^`\n]+`", prose))
        named = re.findall(rf"(?<![\w./-])({words})\.(\w+)", quoted)
        self.assertGreater(len(named), 40)
        for thing, name in sorted(set(named)):
            with self.subTest(f"{thing}.{name}"):
                cls = things.get(thing)
                known = {*dir(cls), *getattr(cls, "__dataclass_fields__", ())} if cls else set()
                self.assertTrue(name in known or f"{thing}.{name}" in codes)

    def test_every_limit_is_in_it(self) -> None:
        for field in dataclasses.fields(Limits):
            with self.subTest(field.name):
                self.assertIn(f"`{field.name}`", self.text)

    def test_every_public_name_has_a_docstring(self) -> None:
        for name in workflows.__all__:
            with self.subTest(name):
                doc = getattr(workflows, name).__doc__ or ""
                self.assertTrue(doc)
                self.assertFalse(doc.startswith(f"{name}("), "made by dataclass")

    def test_its_links_to_its_own_sections_lead_somewhere(self) -> None:
        heads = re.findall(r"^#+ (.*)$", self.text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
        for link in re.findall(r"\]\(#([^)]*)\)", self.text):
            with self.subTest(link):
                self.assertIn(link, anchors)


# --------------------------------------------------------------------------------------------------
# Nothing is lost: what crashes, broken disks, wrong clocks and stubborn callers do to an instance.


class SaidTwice(Undoing):
    """A caller whose process dies does not know whether its call was stored, and says it again."""

    async def test_terminate_with_rollback_said_twice_lets_the_rollback_go_on(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", value, rollback=self.undo("a"))
            await step.do("b", value, rollback=lambda info: gate.wait())
            await step.sleep("nap", "1 day")

        gate = asyncio.Event()
        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create()
            await self.clock.settle()
            await instance.terminate(rollback=True)
            await self.clock.settle()
            await instance.terminate(rollback=True)
            self.assertEqual((await instance.status()).status, "running")
            gate.set()
            await self.clock.settle()
            self.assertEqual((await instance.status()).status, "terminated")
        self.assertEqual(self.log, ["undo a"])


class Files(Real):
    """What happens to the files while an engine uses them, and before."""

    async def damage(self, harm: Callable[[str], None], seen: str | None) -> None:
        """An engine on a file of its own sees the harm within about a second; or nothing, because
        there is none."""
        path = str(self.folder / f"{harm.__name__}.db")
        async with Engine(path) as engine:
            bound = engine.bind(workflow(one_event))
            instance, _ = await bound.create_batch([{"id": "i"}, {"params": "x" * 100_000}])
            await reach(instance, "waiting")
            await asyncio.sleep(1.1)  # it has seen how large the files are
            harm(path)
            if seen is None:
                await asyncio.sleep(1.2)
                await instance.send_event(type="t", payload=5)
                self.assertEqual(await instance.result("2 seconds"), 5)
            else:
                with self.assertRaisesRegex(WorkflowInternalError, seen):
                    await instance.result("1.6 seconds")
                with self.assertRaisesRegex(WorkflowInternalError, seen):
                    await bound.create()

    async def test_what_is_done_to_a_file_in_use_is_noticed_within_about_a_second(self) -> None:
        def ask(path: str, *questions: str) -> None:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
                for question in questions:
                    db.execute(question).fetchall()

        def cut_the_file(path: str) -> None:
            ask(path, "PRAGMA wal_checkpoint(PASSIVE)")
            os.truncate(path, 8192)

        def empty_the_file(path: str) -> None:
            ask(path, "PRAGMA wal_checkpoint(PASSIVE)")
            os.truncate(path, 0)

        def cut_the_log(path: str) -> None:
            os.truncate(path + "-wal", os.path.getsize(path + "-wal") // 2)

        def lose_the_log(path: str) -> None:
            os.remove(path + "-wal")

        def lose_the_index(path: str) -> None:
            os.remove(path + "-shm")

        def use_it_well(path: str) -> None:
            """What other programs may do, by way of SQLite, although it makes files shorter."""
            ask(path, "DELETE FROM journal WHERE instance = 2", "PRAGMA wal_checkpoint(TRUNCATE)")
            ask(path, "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)")

        gone, cut = "removed or replaced", "truncated"
        harms = {cut_the_file: cut, empty_the_file: cut, cut_the_log: cut, lose_the_log: gone}
        harms |= {lose_the_index: gone, use_it_well: None}
        with self.assertLogs("workflows", logging.CRITICAL):
            await asyncio.gather(*(self.damage(harm, seen) for harm, seen in harms.items()))

    async def test_a_long_log_is_cut_off_when_its_last_reader_is_gone(self) -> None:
        size = functools.partial(os.path.getsize, self.path + "-wal")
        self.enterContext(unittest.mock.patch.object(workflows, "LONG_LOG", 2**22))
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_event))
            with contextlib.closing(sqlite3.connect(self.path)) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT * FROM instances").fetchall()
                for _ in range(3):
                    await bound.create_batch([{"params": "x" * 100_000}] * 20)
                self.assertGreater(size(), 6_000_000)
            for _ in range(3):
                await bound.create_batch([{"params": "x" * 100_000}] * 12)
            self.assertLess(size(), 4_500_000)

    def test_a_read_only_file_is_refused_on_entering_and_nothing_is_left_beside_it(self) -> None:
        for name in ("test.db", "test.db-owner"):
            with self.subTest(name):
                asyncio.run(self.make())
                Path(self.path + "-owner").touch()
                for path in self.folder.iterdir():
                    path.chmod(0o444 if path.name == name else 0o666)
                self.folder.chmod(0o777)
                before = sorted(os.listdir(self.folder))
                child = self.child(
                    """
                    async def main():
                        async with Engine(PATH) as engine: say("entered")
                    if os.getuid() == 0: os.setuid(65534)
                    try: asyncio.run(main())
                    except WorkflowInternalError as error: say(error)
                    """
                )
                self.assertEqual(child.end()[0], f"{self.path}: {name} is read-only")
                self.assertEqual(sorted(os.listdir(self.folder)), before)
                Path(self.folder, name).chmod(0o666)

    async def make(self) -> None:
        async with self.engine() as engine:
            engine.bind(workflow(one_event))

    async def test_a_side_file_that_goes_away_while_it_is_looked_at_is_not_read_only(self) -> None:
        await self.make()
        side = Path(self.path + "-shm")

        def access(path: str, mode: int) -> bool:
            if path == str(side):
                side.unlink()
            return truly(path, mode)

        truly = os.access
        side.touch()
        with unittest.mock.patch.object(os, "access", access):
            await self.make()

    async def test_a_directory_says_that_it_is_one(self) -> None:
        with self.assertRaisesRegex(WorkflowInternalError, "is a directory"):
            await Engine(self.folder).__aenter__()
        self.assertEqual(os.listdir(self.folder), [])


class Damaged(Undoing):
    """A part of a stored text is lost, on a page where SQLite can't see it."""

    RECORDS = {
        "its params": ("data", "type = 'queued'"),
        "step 'first-1': its result": ("data", "step LIKE '%first%'"),
        "step 'fails-1': its error": ("data", "step LIKE '%fails%'"),
        "step 'w-1': its event": ("data", "type = 'event'"),
        "step 'last-1': its configuration": ("extra", "step LIKE '%last%' AND attempt = 1"),
    }
    LOST = {"zeros": "substr({0}, 1, 2) || char(0, 0)", "no text": "CAST(x'22ff22' AS TEXT)"}
    REPAIR = """UPDATE journal SET (data, extra) = (SELECT data, extra FROM kept
        WHERE kept.instance = journal.instance AND kept.seq = journal.seq)"""

    async def program(self, event: Any, step: Any) -> Any:
        async def last() -> str:
            if self.fails:
                raise ValueError
            return "done"

        got = [event.payload, await step.do("first", returns("x" * 9))]
        got.append(str(await caught(step.do("fails", ONCE, raises(ValueError("fails"))))))
        got.append((await step.wait_for_event("w", "t")).payload)
        config = {"retries": {"delay": "1 hour"}}
        return [*got, await step.do("last", config, last, rollback=self.undo("last"))]

    async def prepare(self) -> Any:
        """Two instances wait for their last attempt."""
        self.setUp()
        self.fails = True
        made = workflow(self.program)
        async with self.engine() as engine:
            batch = [{"id": id, "params": "params"} for id in "ab"]
            for instance in await engine.bind(made).create_batch(batch):
                await instance.send_event(type="t", payload="event")
            await self.clock.advance("1 minute")
        self.fails = False
        self.change("CREATE TABLE kept AS SELECT * FROM journal")
        return made

    def change(self, sql: str) -> None:
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            db.execute(sql)
            db.commit()

    def lose(self, column: str, where: str, how: str = "zeros") -> None:
        lost = self.LOST[how].format(column)
        self.change(f"UPDATE journal SET {column} = {lost} WHERE instance = 1 AND {where}")

    async def test_it_stops_its_instance_where_it_is_and_no_other(self) -> None:
        for (record, where), how in itertools.product(self.RECORDS.items(), self.LOST):
            with self.subTest(record, how=how):
                made = await self.prepare()
                self.lose(*where, how)
                with self.assertLogs("workflows", logging.CRITICAL) as logs:
                    async with self.engine() as engine:
                        bad, good = [await engine.bind(made).get("a"), engine.env.TEST]
                        waiting = asyncio.create_task(bad.result())
                        self.assertEqual((await self.finish(await good.get("b")))[-1], "done")
                        with self.assertRaises(WorkflowInternalError) as told:
                            await waiting
                        self.assertEqual((await bad.status()).status, "running")
                what = f"test a: {record} can't" if how == "zeros" else "test a: a row of instance"
                self.assertIn(what, str(told.exception))
                self.assertIn(str(told.exception), logs.output[0])
                self.change(self.REPAIR)
                async with self.engine() as engine:
                    result = await self.finish(await engine.bind(made).get("a"))
                    self.assertEqual(result, ["params", "x" * 9, "fails", "event", "done"])

    async def test_a_rollback_stops_too_and_nothing_counts_as_failed(self) -> None:
        for record, (column, where) in self.RECORDS.items():
            with self.subTest(record):
                made = await self.prepare()
                async with self.engine() as client:
                    workflow = await client.workflow("test")
                    if "configuration" not in record:  # without that, it would not begin
                        await (await workflow.get("a")).terminate(rollback=True)
                    self.change("DELETE FROM kept")
                    self.change("INSERT INTO kept SELECT * FROM journal")
                    self.lose(column, where)
                    if "configuration" in record:
                        with self.assertRaisesRegex(WorkflowInternalError, record):
                            await (await workflow.get("a")).terminate(rollback=True)
                with self.assertLogs("workflows", logging.CRITICAL):
                    async with self.engine() as engine:
                        instance = await engine.bind(made).get("a")
                        await self.clock.advance("1 hour")
                        self.assertEqual((await instance.status()).status, "running")
                self.change(self.REPAIR)
                async with self.engine() as engine:
                    instance = await engine.bind(made).get("a")
                    if "configuration" in record:
                        self.fails = True
                        await instance.terminate(rollback=True)
                    await self.clock.settle()
                    self.assertEqual((await instance.status()).status, "terminated")
                self.assertEqual(self.log, ["undo last"])

    async def test_who_asks_for_it_is_told_the_instance_and_the_row(self) -> None:
        made = await self.prepare()
        async with self.engine() as engine:
            await self.finish(await engine.bind(made).get("a"))
        self.lose("data", "type = 'complete'")
        async with self.engine() as engine:
            instance = await engine.bind(made).get("a")
            for call in (instance.status, instance.result, instance.history):
                with self.assertRaisesRegex(WorkflowInternalError, "a.* can't be read") as told:
                    await call()
            self.assertRegex(str(told.exception), "'a': row [0-9]+ can't")

    async def test_a_replay_says_so_whatever_run_catches(self) -> None:
        async def careless(event: Any, step: Any) -> Any:
            try:
                await step.do("first", returns("x" * 9))
            except Exception:
                await step.sleep("nap", "1 day")

        await self.prepare()
        self.lose(*self.RECORDS["step 'first-1': its result"])
        async with self.engine() as engine:
            bound = await engine.workflow("test")
            bound.cls = workflow(careless)
            with self.assertRaisesRegex(WorkflowInternalError, "first-1"):
                await bound.replay("a")
            self.assertFalse([each async for each in bound.replay_all()][-1].safe)

    async def test_a_wait_that_is_over_stops_its_instance_and_no_other(self) -> None:
        async def run(event: Any, step: Any) -> Any:
            return str(await caught(step.wait_for_event("w", "t", timeout="1 hour")))

        made = workflow(run)
        async with self.engine() as engine:
            await engine.bind(made).create_batch([{"id": "a"}, {"id": "b"}])
            await self.clock.settle()
        self.change("CREATE TABLE kept AS SELECT * FROM journal")
        for how in self.LOST:
            self.lose("data", "type = 'wait'", how)
            with self.assertLogs("workflows", logging.CRITICAL) as logs:
                async with self.engine() as engine:
                    bound = engine.bind(made)
                    await self.clock.advance("1 hour")
                    told = await caught((await bound.get("a")).result())
                    good = await self.finish(await bound.get("b"))
            self.assertIsInstance(told, WorkflowInternalError)
            self.assertIn("instance 'a'", logs.output[0])
            self.assertEqual(good, "Execution timed out after 3600000ms")
            self.change(self.REPAIR + " WHERE instance = 1")
        async with self.engine() as engine:
            instance = await engine.bind(made).get("a")
            await self.clock.advance("1 hour")
            self.assertEqual(await self.finish(instance), good)

    async def test_a_run_in_memory_ends_when_its_wait_is_over_and_cannot_be_read(self) -> None:
        async with self.engine(hibernate_after="1 day") as engine:
            await engine.bind(workflow(one_event)).create()
            await self.clock.settle()
            self.lose("data", "type = 'wait'")
            self.assertEqual(len(engine.lives.runs), 1)
            with self.assertLogs("workflows", logging.CRITICAL):
                await self.clock.advance("1 hour")
            self.assertEqual(len(engine.lives.runs), 0)

    async def test_who_waits_for_it_is_not_told_of_damage_that_a_restart_has_erased(self) -> None:
        made = await self.prepare()
        self.lose(*self.RECORDS["step 'first-1': its result"])
        async with self.engine() as engine:
            with self.assertLogs("workflows", logging.CRITICAL):
                instance = await engine.bind(made).get("a")
                await self.clock.advance("1 hour")
                with self.assertRaises(WorkflowInternalError):
                    await instance.result()
            await asyncio.gather(instance.restart(), instance.pause())
            waiting = asyncio.create_task(instance.result())
            await self.clock.settle()
            self.assertFalse(waiting.done())
            await instance.resume()
            await instance.send_event(type="t")
            await self.clock.settle()
            self.assertEqual((await asyncio.wait_for(waiting, 1))[-1], "done")

    async def test_of_the_events_that_a_run_gives_back_all_can_be_read_or_none_is(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await asyncio.gather(step.wait_for_event("a", "t"), step.wait_for_event("b", "t"))
            await step.sleep("nap", "1 day")

        steps = ["wait_for_event\na\n1", "wait_for_event\nb\n1"]
        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create(id="a")
            await instance.send_event(type="t")
            await instance.send_event(type="t")
            await self.clock.advance("1 minute")
            self.lose("extra", "step LIKE '%b%' AND type = 'event'")
            lease = workflows.Lease(1, 1)
            with self.assertRaises(workflows.Unreadable):
                rows = [workflows.Row("cancel", key) for key in steps]
                await engine.call(workflows.break_off, lease, rows)
            self.assertEqual(self.rows("SELECT * FROM events"), [])

    async def test_a_restart_that_cannot_read_an_event_changes_nothing(self) -> None:
        tables = [f"SELECT * FROM {table}" for table in ("instances", "journal", "waits")]
        await self.prepare()
        async with self.engine() as client:
            instance = await (await client.workflow("test")).get("a")
            await instance.send_event(type="later")
            self.change("UPDATE events SET payload = cast(x'ff' AS text)")
            stored = [self.rows(table) for table in tables]
            with self.assertRaises(WorkflowInternalError):
                await instance.restart({"from": {"name": "last"}})
            self.assertEqual([self.rows(table) for table in tables], stored)
            self.change("UPDATE events SET payload = 'null'")
            await instance.restart({"from": {"name": "last"}})

    async def test_a_restart_that_cannot_read_a_cancellation_changes_nothing(self) -> None:
        async def run(event: Any, step: Any) -> None:
            await step.do("a", value)
            waiting = asyncio.ensure_future(step.wait_for_event("w", "t"))
            await step.do("b", value)
            waiting.cancel()
            await step.do("c", value)
            await step.do("d", value)

        tables = [f"SELECT * FROM {table}" for table in ("instances", "journal", "waits")]
        async with self.engine() as engine:
            instance = await engine.bind(workflow(run)).create(id="a")
            await self.clock.settle()
            self.lose("extra", "type = 'cancel'")
            stored = [self.rows(table) for table in tables]
            with self.assertRaises(workflows.Unreadable):
                await instance.restart({"from": {"name": "d"}})
            self.assertEqual([self.rows(table) for table in tables], stored)
            self.assertEqual((await instance.status()).status, "complete")

    async def test_memory_that_is_short_while_a_result_is_encoded_fails_the_attempt(self) -> None:
        results: list[Any] = ["too long", "short"]

        def encode(value: Any, *more: Any) -> Any:
            if value == "too long":
                raise MemoryError
            return encode_well(value, *more)

        async def run(event: Any, step: Any) -> Any:
            return await step.do("s", constant(1), lambda: value(results.pop(0)))

        encode_well = workflows.encode
        with unittest.mock.patch.object(workflows, "encode", encode):
            self.assertEqual(await self.outcome(run), "short")


class Watched(sqlite3.Connection):
    """Tells of each commit that changes anything, before and after: `told(connection, after)`."""

    told: Callable[[sqlite3.Connection, bool], object]
    changes = 0

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if sql != "COMMIT" or self.total_changes == self.changes:
            return super().execute(sql, *args)
        self.changes = self.total_changes
        self.told(self, False)
        cursor = super().execute(sql, *args)
        self.told(self, True)
        return cursor


def watching(told: Callable[[sqlite3.Connection, bool], object]) -> Any:
    """As long as this lasts, connections are made that tell of their commits."""
    factory = type("Watched", (Watched,), {"told": staticmethod(told)})
    connect = functools.partial(sqlite3.connect, factory=factory)
    return unittest.mock.patch.object(workflows.sqlite3, "connect", connect)


def ways() -> Any:
    """Transactions on the loop, then in the writer thread."""
    for way, trust, quick in (("loop", 0, 60.0), ("thread", 1, -1.0)):
        with unittest.mock.patch.multiple(workflows, TRUST=trust, QUICK=quick):
            yield way


class Counter:
    """An instance that counts, step by step, on a database of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = tempfile.mkdtemp(dir=folder) + "/test.db"
        self.begun: list[int] = []
        self.known: list[int] = []  # to `run`: so these are stored

    async def run(self, event: Any, step: Any) -> None:
        for n in itertools.count():
            self.known.append(await step.do("s", constant(3), functools.partial(self.count, n)))

    async def count(self, n: int) -> int:
        self.begun.append(n)
        await asyncio.sleep(0.001)
        return n

    async def goes_on(self) -> None:
        known = len(self.known)
        await until(lambda: len(self.known) > known + 20)

    @contextlib.asynccontextmanager
    async def counting(self) -> Any:
        """The instance, in an engine in which it has counted a little."""
        self.begun.clear()
        self.known.clear()
        async with Engine(self.path) as engine:
            bound = engine.bind(workflow(self.run))
            await bound.create_batch([{"id": "i"}])
            await until(lambda: len(self.begun) > 5)
            yield await bound.get("i")


class Faults(Real):
    """Storage fails, whichever way transactions go: the engine stops in place, and the next one
    goes on when the cause is gone."""

    where = Case.where

    async def stops(self, counter: Counter, harm: Callable[[], Any], seen: str) -> None:
        """The engine does so after the harm, and tells everybody what was seen."""
        async with counter.counting() as instance:
            engine = instance.workflow.engine
            harm()
            for call in (instance.result, instance.status, engine.env.TEST.create):
                with self.assertRaisesRegex(WorkflowInternalError, seen):
                    await asyncio.wait_for(call(), 5)
            await until(lambda: not engine.lives.runs)
        self.assertLessEqual(len(counter.begun), len(counter.known) + 1)

    async def goes_on(self, counter: Counter) -> None:
        """What was known does not run again, and nothing has failed."""
        stored = len(counter.known)
        async with counter.counting():
            first = counter.begun[0]
            self.assertIn(first, (stored, stored + 1))  # it may be stored after all
            self.assertEqual(counter.begun, [*range(first, counter.begun[-1] + 1)])
        with contextlib.closing(sqlite3.connect(counter.path)) as db:
            sql = "SELECT type FROM journal WHERE type IN ('error', 'errored')"
            self.assertEqual(db.execute(sql).fetchall(), [])

    async def survives_in_a_commit(self, fault: Callable[[str, Any], Any], seen: str) -> None:
        """`fault(path, connection)` happens right before a commit. What it returns mends it."""
        counter, mend, coming = Counter(self.folder), [], False

        def told(db: sqlite3.Connection, after: bool) -> None:
            nonlocal coming
            if coming and not after:
                coming = False
                mend.append(fault(counter.path, db))

        def harm() -> None:
            nonlocal coming
            coming = True

        with watching(told):
            await self.stops(counter, harm, seen)
        for each in filter(None, mend):
            each()
        await self.goes_on(counter)

    async def test_a_transaction_that_fails(self) -> None:
        import resource

        def database_full(path: str, db: Any) -> None:
            db.execute("PRAGMA max_page_count = 1")

        def disk_full(path: str, db: Any) -> Callable[[], None]:
            """A write ends in the middle."""
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            room = os.path.getsize(path + "-wal") // 4096 * 4096 + 100
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        def io_error(path: str, db: Any) -> None:
            """What was open for writing is not any more."""
            with open(path + "-wal", "rb") as file:
                for fd in map(int, os.listdir("/dev/fd")):
                    with contextlib.suppress(OSError):
                        if os.path.sameopenfile(file.fileno(), fd):
                            os.dup2(file.fileno(), fd)

        def no_memory(path: str, db: Any) -> None:
            raise MemoryError

        full = "full|disk I/O error"
        faults = {database_full: full, disk_full: full, io_error: full, no_memory: "MemoryError"}
        for way in ways():
            for fault, seen in faults.items():
                told = self.assertLogs("workflows", logging.CRITICAL)
                with self.subTest(fault.__name__, way=way), told:
                    await self.survives_in_a_commit(fault, seen)

    async def test_a_file_that_is_lost_or_replaced_while_the_engine_is_busy(self) -> None:
        async def lose(side: str, replace: bool) -> None:
            counter = Counter(self.folder)
            path, old = counter.path + side, counter.path + ".old"

            def harm() -> None:
                os.rename(path, old)
                if replace:
                    shutil.copy(old, path)

            await self.stops(counter, harm, "removed or replaced")
            os.replace(old, path)
            await self.goes_on(counter)

        cases = [*itertools.product(("", "-wal", "-owner"), (False, True))]
        for _ in ways():
            with self.assertLogs("workflows", logging.CRITICAL), quicker(5):
                await asyncio.gather(*(lose(*case) for case in cases))

    async def test_a_lock_that_is_held_longer_than_anybody_waits(self) -> None:
        for way in ways():
            with self.subTest(way), quicker(50):
                counter = Counter(self.folder)
                async with counter.counting() as instance:
                    db = sqlite3.connect(counter.path, isolation_level=None)
                    with contextlib.closing(db), self.assertLogs("workflows") as logs:
                        db.execute("BEGIN IMMEDIATE")
                        asking = asyncio.create_task(instance.status())
                        await until(lambda logs=logs: logs.output)
                        self.assertFalse(asking.done())
                        db.execute("COMMIT")
                        await asking
                    self.assertIn("another process has held a lock for 5 s", logs.output[0])
                    await counter.goes_on()

    async def test_no_file_descriptor_is_left(self) -> None:
        import resource

        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for way in ways():
            with self.subTest(way), quicker(50):
                counter = Counter(self.folder)
                async with counter.counting():
                    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
                    with self.assertRaisesRegex(WorkflowInternalError, "unable to open"):
                        await Engine(self.path).__aenter__()
                    await counter.goes_on()  # what is open suffices
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                await self.goes_on(counter)

    def test_a_read_only_folder_is_refused_and_nothing_is_changed(self) -> None:
        async def make() -> None:
            async with self.engine() as engine:
                await engine.bind(workflow(one_event)).create()

        asyncio.run(make())
        for path in self.folder.iterdir():
            path.chmod(0o666)
        self.folder.chmod(0o555)
        self.addCleanup(self.folder.chmod, 0o777)
        before = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        script = """
            async def main(w): say(await w.create(id="i"))
            if os.getuid() == 0: os.setuid(65534)
            try: go()
            except WorkflowInternalError as error: say(error)
            """
        self.assertRegex(
            self.child(script).end()[0], f"^{self.path}: .*(read-?only|unable to open)"
        )
        self.assertEqual({path.name: path.read_bytes() for path in self.folder.iterdir()}, before)
        self.folder.chmod(0o777)
        self.assertEqual(self.child(script).end(), ("<WorkflowInstance test i>", 0))

    async def test_a_damaged_page_stops_the_engine_or_does_not_matter(self) -> None:
        async def run(event: Any, step: Any) -> int:
            got = await step.do("long", returns("x" * 20_000))
            return len(got) + (await step.wait_for_event("w", "t", timeout="1 day")).payload

        async def end() -> None:
            async with self.engine() as engine:
                instance = await engine.bind(made).get("i")
                await instance.send_event(type="t", payload=5)
                self.assertEqual(await instance.result("5 seconds"), 20_005)

        made = workflow(run)
        async with self.engine() as engine:
            bound = engine.bind(made)
            await reach(await bound.create(id="i"), "waiting")
        good, stopped = Path(self.path).read_bytes(), 0
        pages = range(4096, len(good), 4096)  # (the first says whose file it is)
        with self.assertLogs("workflows", logging.CRITICAL):
            for _ in ways():
                for page, what in itertools.product(pages, (b"\0", b"\xff")):
                    Path(self.path).write_bytes(good[:page] + what * 4096 + good[page + 4096 :])
                    try:
                        await end()
                    except WorkflowInternalError:
                        stopped += 1
                    for side in workflows.SIDES:
                        Path(self.path + side).unlink(missing_ok=True)
        self.assertGreater(stopped, 2 * len(pages))
        Path(self.path).write_bytes(good)
        await end()

    async def test_a_slow_disk_is_waited_for_in_the_thread(self) -> None:
        """On the loop, one commit can be slow: the first."""
        slow, on_loop = True, []

        def told(db: sqlite3.Connection, after: bool) -> None:
            if not after:
                on_loop.append(threading.current_thread() is threading.main_thread())
                time.sleep(0.005 * slow)

        counter = Counter(self.folder)
        with watching(told):
            async with counter.counting():
                await counter.goes_on()
                self.assertNotIn(True, on_loop)
                slow = False
                await until(lambda: on_loop[-1])
                slow = True
                on_loop.clear()
                await counter.goes_on()
                self.assertLessEqual(on_loop.count(True), 1)


CROWD = """
    async def run(event, step):
        async def work():
            note(str(os.getpid()))
            await asyncio.sleep(0.002)
            note(str(os.getpid()))
            return os.path.exists(PATH + ".stop")
        def plain(): note(str(os.getpid()))
        often = {"retries": {"limit": 200, "delay": 1, "backoff": "constant"}}
        while not await step.do("s", often, work): await step.do("plain", often, plain)
        return "done"
    async def main(w):
        for id in "abc": await get(w, id)
        await asyncio.to_thread(sys.stdin.read)  # until the test has ended, however
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for _ in range(9):
        if os.fork() == 0: break
    go()
    """


class Crowd(Real):
    async def next_owner(self, last: str) -> str:
        """The process that runs callbacks, as soon as it is another one."""
        self.took.append(await until(lambda: self.log()[-1:] not in ([], [last]), 20))
        return self.log()[-1]

    async def test_at_most_one_of_ten_processes_runs_callbacks_while_owners_are_killed(
        self,
    ) -> None:
        crowd, chance, owner = self.child(CROWD), random.Random(1), ""
        self.took: list[float] = []
        for _ in range(9):
            owner = await self.next_owner(owner)
            await asyncio.sleep(chance.uniform(0, 0.1))
            os.kill(int(owner), signal.SIGKILL)
        await self.next_owner(owner)
        Path(self.path + ".stop").touch()
        async with self.engine() as client:
            bound = await client.workflow("test")
            for id in "abc":
                self.assertEqual(await (await bound.get(id)).result("20 seconds"), "done")
        crowd.talk.close()
        turns = [pid for pid, _ in itertools.groupby(self.log())]
        self.assertEqual((len(turns), len({*turns})), (10, 10), "one after the other")
        self.assertLess(statistics.median(self.took[1:]), 1)


class WrongClocks(Case):
    """A clock that is set back by an hour, or forward by a year, between two lives or in one."""

    MINUTE = 60_000
    HOUR, YEAR = 60 * MINUTE, 365 * 24 * 60 * MINUTE

    async def program(self, event: Any, step: Any) -> Any:
        if event.schedule:
            return None
        for n in range(2):
            await step.do(f"s{n}", functools.partial(self.note, n))
            await step.sleep("nap", "30 minutes")
        return (await step.wait_for_event("w", "t", timeout="1 day")).payload

    async def note(self, n: int) -> None:
        self.ran.append(n)

    async def minutes_after(self, jump: int, during: bool) -> tuple[int, int]:
        """So many minutes after the clock has jumped, in the middle of the first sleep, the
        instance ends; and so many times its schedule has come by then."""
        self.setUp()
        self.clock = ManualClock(start=AT_FIRST)
        self.ran: list[int] = []
        made = workflow(self.program)
        async with contextlib.AsyncExitStack() as stack:
            engine = await stack.enter_async_context(self.engine())
            instance = await engine.bind(made, schedules="0 * * * *").create(id="i")
            await instance.send_event(type="t", payload=5)
            await self.clock.advance("10 minutes")
            if not during:
                await stack.aclose()
            self.clock._now += jump
            if not during:
                engine = await stack.enter_async_context(self.engine())
                engine.bind(made, schedules="0 * * * *")
            await self.clock.settle()
            began = self.clock.now()
            instance = await engine.env.TEST.get("i")
            while (await instance.status()).status != "complete":
                await self.clock.advance("10 minutes")
            self.assertEqual((await instance.result(), self.ran), (5, [0, 1]))
            took = (self.clock.now() - began) // self.MINUTE
        return took, len(self.rows("SELECT 1 FROM instances WHERE trigger = 'cron'"))

    async def test_nothing_is_lost_or_repeated(self) -> None:
        for during in (False, True):
            with self.subTest(during=during):
                again = 0 if during else 1  # a schedule that is bound anew comes by this clock
                jumps = {0: (50, 1), -self.HOUR: (110, 1 + again), self.YEAR: (30, 1)}
                for jump, expected in jumps.items():
                    self.assertEqual(await self.minutes_after(jump, during), expected, jump)

    async def test_the_rate_of_creations_does_not_count_what_lies_ahead(self) -> None:
        limits = dataclasses.replace(FOREVER, creations_per_second=2)
        async with self.engine(limits=limits) as engine:
            bound = engine.bind(workflow(one_step))
            for _ in range(3):
                await bound.create()
                await self.clock.advance("1 second")
            self.clock._now -= self.HOUR
            await bound.create()

    async def test_hibernation_goes_on_when_the_clock_is_set_back(self) -> None:
        clock = Jumping()
        async with self.engine(clock=clock, hibernate_after=100) as engine:
            for n in range(2):
                bound = engine.bind(workflow(one_sleep), f"w{n}")
                await reach(await bound.create(), "waiting")
                clock.ahead -= self.HOUR
            await until(lambda: not engine.lives.runs)


# --------------------------------------------------------------------------------------------------
# The crashes: `python3 test_workflows.py crashes [--quick]`. A program that uses everything runs
# once, so that its commits are counted. Then, for each of these, a process is killed right before
# it, another one right after it, to a third one it fails, and others get Ctrl-C or SIGTERM in the
# middle of it; and the next process goes on, unless that dies, too. In the end the outputs are the
# same, each step that was acknowledged has run once, the rows and the usage add up, and nothing was
# said on stderr. All of it runs three ways: with transactions on the loop, with transactions in the
# writer thread, and with a second process that takes over.

AT_FIRST = 1_767_607_200_000  # 2026-01-05, 10:00 in UTC


class Fast(Clock):
    """Time that goes by 200 times as fast, from a moment on that all processes share."""

    def __init__(self, began: float) -> None:
        super().__init__()
        self.began = began

    def now(self) -> int:
        return AT_FIRST + int((time.time() - self.began) * 200_000)

    def call_later(self, ms: float, callback: Callable[[], object]) -> Any:
        return super().call_later(ms / 200, callback)


class Fate:
    """What ends a process: at one of its commits, or so many ms after it began (a "moment")."""

    WAYS = ("before", "after", "error", "interrupt", "terminate")  # killed, or these signals

    def __init__(self, number: int = 0, how: str = "") -> None:
        self.number, self.how, self.commits = number, how, 0

    def meet(self, _: sqlite3.Connection, after: bool) -> None:
        self.commits += not after
        if self.commits != self.number:
            return
        if self.how == ("after" if after else "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "error" and not after:
            raise sqlite3.OperationalError("disk I/O error")
        if self.how == "interrupt" and not after:
            os.kill(os.getpid(), signal.SIGINT)
        if self.how == "terminate" and not after:
            os.kill(os.getpid(), signal.SIGTERM)


class Diary:
    """What all processes have done, in order. What is written survives the process."""

    def __init__(self, path: str) -> None:
        self._path = Path(path + ".log")
        self._path.touch()

    def note(self, *words: str) -> None:
        with self._path.open("a") as file:
            file.write("\t".join(words) + "\n")

    def lines(self) -> list[tuple[str, ...]]:
        return [tuple(line.split("\t")) for line in self._path.read_text().splitlines()]

    def shows(self, *words: str) -> bool:
        """Whether there is a line with all these words."""
        return any({*words} <= {*line} for line in self.lines())

    async def once(self, name: str, call: Callable[[], Any]) -> None:
        """Calls, unless it is known that this was done."""
        if ("did", name) not in self.lines():
            self.note("do", name)
            await unless_refused(call())
            self.note("did", name)


async def unless_refused(call: Any) -> bool:
    """Whether a call was not refused. (A dead process may have done it, without knowing that.)"""
    try:
        await call
    except WorkflowInternalError:  # storage has failed
        raise
    except WorkflowError:
        return False
    return True


class Everything(WorkflowEntrypoint[Any]):
    """Its params name the method that it runs. A step notes that it begins, with a token that it
    returns; `run` notes the token that it gets: from then on that step may not begin again."""

    OFTEN: Any = {"retries": {"limit": 200, "delay": 100, "backoff": "constant"}}

    async def run(self, event: Any, step: Any) -> Any:
        self.id, self.step, self.diary = event.instance_id, step, self.env[event.workflow_name]
        return await getattr(self, "tick" if event.schedule else event.payload)()

    async def done(
        self,
        name: str,
        *,
        fails: int = 0,  # so many attempts
        hangs: int = 0,
        rests: float = 0,  # seconds
        plain: bool = False,
        inside: Callable[[], Any] | None = None,
        config: Any = None,
        **options: Any,
    ) -> str:
        def begin(ctx: Any) -> str:
            token = os.urandom(4).hex()
            self.diary.note("begin", self.id, name, token)
            if ctx.attempt <= fails:
                raise ValueError(name)
            return token

        async def work(ctx: Any) -> str:
            token = begin(ctx)
            if ctx.attempt <= hangs:
                await asyncio.Event().wait()
            if rests:
                await asyncio.sleep(rests)
            if inside is not None:
                await inside()
            return token

        callback: Any = begin if plain else work
        token = await self.step.do(name, self.OFTEN | (config or {}), callback, **options)
        self.diary.note("ack", self.id, name, token)
        return name

    async def tick(self) -> str:
        return await self.done("tick")

    async def all_kinds(self) -> Any:
        step, done = self.step, self.done
        got: list[Any] = [await done("plain", plain=True), await done("quick")]
        delays = {"retries": {"limit": 200, "delay": lambda info: "1 second"}}
        several = done("b", fails=1), done("c", plain=True), done("d", fails=2, config=delays)
        got += await asyncio.gather(done("a", rests=0.001), *several, step.sleep("s", "2 seconds"))

        async def nested() -> None:
            await asyncio.gather(done("in", rests=0.001), done("in too", plain=True))
            await done("in last")

        got.append(await done("out", fails=1, inside=nested))
        got.append((await step.wait_for_event("early", "early", timeout="1 hour")).payload)
        self.diary.note("ready for an event")
        got.append((await step.wait_for_event("late", "late", timeout="1 day")).payload)
        try:
            await step.wait_for_event("never", "never", timeout="1 second")
        except WorkflowTimeoutError:
            got.append("timeout")
        got.append(await done("slow", hangs=1, config={"timeout": "2 seconds"}))
        got.append(str(await caught(step.do("no", self.OFTEN, raises(NonRetryableError("no"))))))
        first = functools.partial(asyncio.wait, return_when=asyncio.FIRST_COMPLETED)
        tasks = [asyncio.ensure_future(done(name, hangs=n)) for n, name in ((0, "w"), (999, "l"))]
        await first(tasks)
        tasks[1].cancel()
        got.append(tasks[0].result())
        waits = step.sleep("patience", "1 second"), step.wait_for_event("given up", "late")
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        await first(tasks)
        tasks[1].cancel()
        await step.sleep_until("long ago", 0)
        await step.sleep("rest", "3 seconds")
        return got

    async def in_turn(self) -> Any:
        return [await self.done(f"s{n}", rests=0.001 * (n % 2)) for n in range(5)]

    async def events(self) -> Any:
        """Takes numbers up to 5. Each may come several times, from processes that did not live to
        hear that it was stored."""
        got = [0]
        while got[-1] < 5:
            got.append((await self.step.wait_for_event("w", "number", timeout="1 day")).payload)
        return sorted(set(got)) if got == sorted(got) else got

    async def waits(self) -> Any:
        await self.done("s")
        await self.step.wait_for_event("w", "never", timeout="30 days")

    async def hangs(self) -> Any:
        await self.done("s")
        await self.done("hangs", hangs=999)

    async def undone(self, name: str, **how: Any) -> None:
        async def handler(info: Any) -> None:
            self.diary.note("undo", self.id, name)
            await asyncio.sleep(0.001)

        await self.done(name, rollback=handler, rollback_config=self.OFTEN, **how)

    async def saga(self) -> Any:
        await self.undone("book")
        await self.undone("pay", fails=1)
        await self.undone("pack", plain=True)
        raise NonRetryableError("sold out", "SoldOut")

    async def long_saga(self) -> Any:
        await self.undone("book")
        await self.undone("pay")
        await self.waits()


PLANS = {
    "main": "all_kinds",
    "paused": "in_turn",
    "again": "in_turn",
    "from": "in_turn",
    "events": "events",
    "saga": "saga",
    "undone": "long_saga",
    "stopped": "hangs",
    "gone": "waits",
    "gone-too": "hangs",
    "short": "in_turn",
    "single": "in_turn",
}
STEPS = [f"s{n}" for n in range(5)]
OUTPUTS: dict[str, Any] = dict.fromkeys(("paused", "again", "from", "single"), STEPS)
OUTPUTS["main"] = ["plain", "quick", "a", "b", "c", "d", None, "out", "E", "L", "timeout"]
OUTPUTS["main"] += ["slow", "no", "w"]
OUTPUTS["events"] = [0, 1, 2, 3, 4, 5]
OUTPUTS["saga"] = {"name": "SoldOut", "message": "sold out"}
OUTPUTS["undone"] = OUTPUTS["stopped"] = "terminated"
UNDONE = {"saga": ["pack", "pay", "book"], "undone": ["pay", "book"]}
AGAIN = {"again": STEPS, "from": STEPS[2:]}


def patient() -> Any:
    """What `Fast` would make hasty: so many ms of it are a minute."""
    return unittest.mock.patch.multiple(workflows, SEARCH=12_000_000, ASKING=12_000_000)


async def drive(w: Any, diary: Diary) -> None:
    """What callers do: each of it once, unless they don't live to know that they have done it."""

    def one(id: str) -> Any:
        return workflows.WorkflowInstance(w, id)

    async def shows(*words: str) -> None:
        while not diary.shows(*words):
            w.engine.check_open()  # it may have stopped
            await asyncio.sleep(0.002)

    async def of_main() -> None:
        await diary.once("early", lambda: one("main").send_event(type="early", payload="E"))
        await shows("ready for an event")
        await asyncio.sleep(0.005)
        await diary.once("late", lambda: one("main").send_event(type="late", payload="L"))
        await one("main").result()

    async def of_paused() -> None:
        await shows("begin", "paused", "s1")
        await diary.once("pause", one("paused").pause)
        if ("do", "resume") not in diary.lines():
            await reach(one("paused"), "paused", "complete")
            diary.note("paused")
            await asyncio.sleep(0.005)
        await diary.once("resume", one("paused").resume)
        await one("paused").result()

    async def of_restarted(id: str, *start: Any) -> None:
        await one(id).result()
        await diary.once(f"restart {id}", lambda: one(id).restart(*start))
        await one(id).result()

    async def of_events() -> None:
        for n in range(1, 6):
            send = functools.partial(one("events").send_event, type="number", payload=n)
            await diary.once(f"send {n}", send)
        await one("events").result()

    async def of_ended() -> None:
        await shows("ack", "undone", "pay")
        await diary.once("undo", lambda: one("undone").terminate(rollback=True))
        await shows("begin", "stopped", "hangs")
        await diary.once("stop", one("stopped").terminate)
        await shows("begin", "gone-too", "hangs")
        await diary.once("delete", one("gone-too").delete)
        await shows("ack", "gone", "s")
        await diary.once("delete batch", lambda: w.delete_batch(["gone", "nobody"]))
        await reach(one("undone"), "terminated")

    async def of_rest() -> None:
        await unless_refused(one("saga").result())
        await one("single").result()
        await shows("begin", "tick")
        while await unless_refused(one("short").status()):  # until it has expired
            await asyncio.sleep(0.01)

    batch = [{"id": id, "params": plan} for id, plan in PLANS.items()]
    batch[-2]["retention"] = {"successRetention": "1 minute"}
    await diary.once("create", lambda: w.create_batch(batch[:-1]))
    await diary.once("create one", lambda: w.create(batch[-1]))
    async with asyncio.timeout(30):
        await asyncio.gather(
            *(of_main(), of_paused(), of_events(), of_ended(), of_rest()),
            *(of_restarted("again"), of_restarted("from", {"from": {"name": "s2"}})),
        )


class Crash(NamedTuple):
    """A case: which way transactions go, and how its processes die one after the other, each at a
    commit of its own."""

    way: str  # "loop", "thread", or "takeover"
    deaths: tuple[tuple[int, str], ...] = ()  # the number of the commit, and how: see `Fate`

    def run(self) -> tuple[list[str], int, int]:
        """What is wrong in the end; the commits of the last process; and how many have died."""
        with tempfile.TemporaryDirectory(dir=Case.where) as folder:
            path = str(Path(folder) / "test.db")
            codes = [in_fork(self.live, path, 0.0, (1, how)) for how in ("before", "after")]
            in_fork(self.live, path, 0.0)
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.executescript(AUDIT)
            began = time.time()
            if self.way == "takeover":
                owner = fork(self.live, path, began, *self.deaths, drives=False)
                patience = time.monotonic() + 1  # it may die before it is up
                while not Diary(path).shows("up") and time.monotonic() < patience:
                    time.sleep(0.002)
                codes.append(in_fork(self.live, path, began))
                os.kill(owner, signal.SIGKILL)  # if it has not come so far, or sleeps
                os.waitpid(owner, 0)
                codes.insert(0, -signal.SIGKILL)
            else:
                deaths = iter((*self.deaths, ()))
                while codes[-1] in DEATHS:
                    codes.append(in_fork(self.live, path, began, next(deaths)))
            died = sum(code in DEATHS for code in codes)
            said = Path(path + ".err").read_text()
            if codes[-1] != 0 or said:
                return [f"processes ended with {codes}", said], 0, died
            commits = [int(line[1]) for line in Diary(path).lines() if line[0] == "end"]
            return check(path), commits[-1], died

    def live(self, path: str, began: float, death: Any = (), *, drives: bool = True) -> None:
        """What a process does: up to the end of the program, or to its death."""
        os.dup2(os.open(path + ".err", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
        workflows.TRUST, workflows.QUICK = (1, -1.0) if self.way == "thread" else (0, 60.0)
        diary, fate = Diary(path), Fate(*death)

        async def main() -> None:
            if fate.how == "moment":
                interrupt = functools.partial(os.kill, os.getpid(), signal.SIGINT)
                threading.Timer(fate.number / 1000, interrupt).start()
            clock, env = Fast(began), {"everything": diary}
            async with Engine(path, clock=clock, env=env, hibernate_after="1 second") as engine:
                if began == 0.0:
                    return
                bound = engine.bind(Everything, schedules="* * * * *")
                await engine.call(workflows.nothing)
                diary.note("up")
                if drives:
                    await drive(bound, diary)
                else:
                    await asyncio.sleep(60)
            diary.note("end", str(fate.commits))

        with watching(fate.meet), patient():
            asyncio.run(main())


DEATHS = (-signal.SIGKILL, -signal.SIGTERM, 5, 6)  # how a process ends; see `fork`
# Counts by itself what `usage` must come to.
AUDIT = """
    CREATE TABLE audit (kind TEXT, id TEXT);
    CREATE TRIGGER audit_steps AFTER INSERT ON journal WHEN new.type IN ('sleep', 'wait')
        OR (new.extra IS NOT NULL AND new.attempt IS NOT NULL AND new.step NOT LIKE 'rollback%')
        BEGIN INSERT INTO audit VALUES ('steps', new.step); END;
    CREATE TRIGGER audit_instances AFTER INSERT ON instances
        BEGIN INSERT INTO audit VALUES ('requests', new.id); END;
    CREATE TRIGGER audit_schedules AFTER UPDATE ON schedules
        BEGIN INSERT INTO audit VALUES ('times', new.cron); END"""


def fork(work: Callable[..., None], *args: Any, **options: Any) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        work(*args, **options)
        code = 0
    except WorkflowInternalError:
        code = 5
    except KeyboardInterrupt:
        code = 6
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def in_fork(work: Callable[..., None], *args: Any) -> int:
    """Does it in a process of its own; returns how that has ended."""
    _, status = os.waitpid(fork(work, *args), 0)
    return os.waitstatus_to_exitcode(status)


def check(path: str) -> list[str]:
    """What is wrong when all has ended."""
    wrong = wrong_effects(Diary(path).lines())
    with contextlib.closing(sqlite3.connect(path)) as db:

        def ask(sql: str, *args: Any) -> list[Any]:
            return db.execute(sql, args).fetchall()

        ends, storage = {}, 0
        journal = f"SELECT bytes, {', '.join(workflows.Row._fields)} FROM journal"
        for key, id, status in ask("SELECT key, id, status FROM instances"):
            states, rows = [], []
            for state, *fields in ask(f"{journal} WHERE instance = ? ORDER BY seq", key):
                states.append(state)
                rows.append(workflows.Row(*fields))
            wrong += [f"{id}: {what}" for what in wrong_history(id, rows, status)]
            ends[id] = end_of(status, rows[-1])
            kept = {row.seq: row.data for row in rows if row.type in ("queued", "done", "complete")}
            # An event that the wait did not need goes back to the buffer.
            kept |= {json.loads(row.extra)["seq"]: row.data for row in rows if row.type == "event"}
            kept |= ask("SELECT seq, payload FROM events WHERE instance = ?", key)
            if states[-1] != sum(workflows.size_of(data or "") for data in kept.values()):
                wrong.append(f"{id}: the state is {states[-1]}")
            storage += states[-1]
        ends.pop("short", None)  # it has expired, but the owner need not have cleared it away yet
        if {id: end for id, end in ends.items() if " " not in id} != OUTPUTS:  # without schedules
            wrong.append(f"outputs {ends}")
        audit = dict(ask("SELECT kind, count(*) FROM audit GROUP BY kind"))
        counted = ask("SELECT sum(requests), sum(steps), sum(storage_bytes) FROM usage")
        ((_, steps, _, size),) = ask(workflows._NOT_COUNTED)  # of what was running in the end
        usage = [a + (b or 0) for a, b in zip(counted[0], (0, steps, size), strict=True)]
        if usage != [audit["requests"], audit["steps"], storage]:
            wrong.append(f"usage {usage}, and not {audit}, {storage}")
        scheduled = "SELECT count(*) FROM audit WHERE kind = 'requests' AND id LIKE '% %'"
        if ask(scheduled) != [(audit.get("times", 0),)]:
            wrong.append("a schedule came and nothing was created")
        if ask("SELECT id FROM audit WHERE kind = 'requests' GROUP BY id HAVING count(*) > 1"):
            wrong.append("something was created twice")
        for table in ("journal", "waits", "events"):
            if ask(f"SELECT 1 FROM {table} WHERE instance NOT IN (SELECT key FROM instances)"):
                wrong.append(f"{table} keeps rows of nobody")
    return wrong


def end_of(status: str, last: Any) -> Any:
    """The output, the error, or the status of an instance."""
    if status == "complete":
        return workflows.decode(last.data)
    return workflows.brief(workflows.decode(last.data)) if status == "errored" else status


def wrong_effects(lines: list[tuple[str, ...]]) -> list[str]:
    """What is wrong with what the callbacks did and when."""
    wrong, paused = [], False
    last: dict[tuple[str, ...], str] = {}  # by instance and step: the token of the last attempt
    acknowledged: dict[tuple[str, ...], str] = {}
    undone: dict[str, list[str]] = {"saga": [], "undone": []}
    for what, *rest in lines:
        if what == "do" and rest[0].startswith("restart "):
            id = rest[0].removeprefix("restart ")
            for name in AGAIN[id]:
                acknowledged.pop((id, name), None)
        elif what == "begin":
            *step, token = rest
            last[*step,] = token
            if (*step,) in acknowledged:
                wrong.append(f"{step} began again")
            if paused and rest[0] == "paused":
                wrong.append(f"{step} began in a pause")
        elif what == "ack":
            *step, token = rest
            if (last.get((*step,)), acknowledged.setdefault((*step,), token)) != (token, token):
                wrong.append(f"{step} has another result")
        elif what == "undo":
            undone[rest[0]].append(rest[1])
        elif what == "paused" or rest == ["resume"]:
            paused = what == "paused"
    in_order = {id: [name for name, _ in itertools.groupby(names)] for id, names in undone.items()}
    return wrong if in_order == UNDONE else [*wrong, f"undone: {undone}"]


def wrong_history(id: str, rows: list[Any], status: str) -> list[str]:
    """What is wrong with the journal of an instance that has finished: each attempt has one begin
    and one end, nothing comes after the end of its step, and the ids of the events grow."""
    history = workflows.History(id)
    ids = [event.event_id for row in rows for event in history.events(row)]
    wrong = [] if ids == sorted({*ids}) else [f"the ids of the events are {ids}"]
    ends = ("done", "error", "slept", "event", "timeout")
    for _, mine in itertools.groupby(
        sorted(rows, key=lambda row: row.step or ""), key=lambda row: row.step
    ):
        number, open, asleep, end, configured = 0, False, False, "", False
        for row in mine:
            name = f"{workflows.step_label(row.step)}: row {row.seq} ({row.type} {row.attempt})"
            if row.step is None or row.type == "cancel":
                open, asleep = False, False
                continue
            if row.type == "stop":
                number -= open
                open, asleep, end = False, False, end if configured else ""
                continue
            if end:
                wrong.append(f"{name} comes after {end}")
            if row.attempt is not None and configured != (row.extra is None):
                wrong.append(f"{name}: the configuration is in the first row, and nowhere else")
            configured = configured or row.attempt is not None
            if row.type == "start" or row.began is not None:
                if open or asleep or row.attempt != number + 1:
                    wrong.append(f"{name} can't begin after attempt {number}")
                number, open = row.attempt, True
            if row.type in ("done", "failed", "error"):
                if not open or row.attempt != number:
                    wrong.append(f"{name} ends another attempt than {number}")
                open, asleep = False, row.type == "failed"
            elif row.type != "start":
                if asleep != (row.type not in ("sleep", "wait")):
                    wrong.append(f"{name} is out of order")
                asleep = row.type in ("sleep", "wait")
            end = row.type if row.type in ends else ""
        if status == "complete" and (open or asleep) and end == "":
            wrong.append(f"{name}: has no end")
    return wrong


def crashes(arguments: list[str]) -> None:
    """Runs the cases, several at a time, and says what they did."""
    if arguments not in ([], ["--quick"]):
        raise SystemExit("usage: python3 test_workflows.py crashes [--quick]")
    logging.getLogger("workflows").setLevel(logging.CRITICAL + 1)
    began, quick, cases = time.monotonic(), bool(arguments), []
    failed = killed = 0
    with multiprocessing.get_context("fork").Pool(2 * (os.cpu_count() or 1)) as pool:
        ways = [Crash(way) for way in ("loop", "thread", "takeover")]
        for (way, _), (wrong, commits, _) in zip(ways, pool.imap(Crash.run, ways), strict=True):
            print(f"{way}: {commits} commits without a crash {'; '.join(wrong)}", flush=True)
            failed += bool(wrong)
            numbers = range(1, 100 if way == "takeover" else commits + 1)
            cases += [Crash(way, (death,)) for death in itertools.product(numbers, Fate.WAYS)]
            if way != "takeover":
                cases += [Crash(way, ((ms, "moment"),)) for ms in range(0, 300, 3)]
            if way != "takeover" and not quick:  # the next process dies, too
                first = itertools.product(numbers, ("before", "interrupt"))
                again = (1, "before"), (3, "error"), (8, "after")
                cases += [Crash(way, deaths) for deaths in itertools.product(first, again)]
        cases = random.Random(1).sample(cases, 10) if quick else cases
        for case, (wrong, _, died) in zip(cases, pool.imap(Crash.run, cases), strict=True):
            killed += died
            failed += bool(wrong)
            if wrong:
                print(f"{case}: {'; '.join(wrong)}", flush=True)
    took = f"{time.monotonic() - began:.0f} s"
    print(f"{len(cases)} cases, {killed} processes killed, {failed} failed; {took}")
    raise SystemExit(failed > 0)


# --------------------------------------------------------------------------------------------------
# Load: `python3 test_workflows.py load [hours]` runs that program again and again, several at a
# time, for an hour of a clock that is 200 times as fast. What the process holds when nothing is
# going on is the same after each round, and the log of the database does not grow without bound.


class Held(NamedTuple):
    """What a process holds."""

    blocks: int  # of memory, that Python knows of
    peak: int  # MB that it had at most
    tasks: int
    threads: int
    descriptors: int
    timers: int
    file: int  # bytes
    log: int  # bytes, of SQLite's log beside the file

    @classmethod
    def now(cls, path: str) -> Held:
        gc.collect()
        loop: Any = asyncio.get_running_loop()
        timers = sum(not timer.cancelled() for timer in loop._scheduled)
        counts = len(asyncio.all_tasks()), threading.active_count(), len(os.listdir("/dev/fd"))
        paths = Path(path), Path(path + "-wal")
        sizes = (each.stat().st_size if each.exists() else 0 for each in paths)
        return cls(sys.getallocatedblocks(), round(peak_memory()), *counts, timers, *sizes)


class Scratch(Diary):
    """A diary that is begun anew with each round."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, ...]] = []

    def note(self, *words: str) -> None:
        self._lines.append(words)

    def lines(self) -> list[tuple[str, ...]]:
        return self._lines


async def live_through(path: str, hours: float, programs: int) -> list[Held]:
    """What was held before, after each round (there are six at least), and in the end."""
    held, clock = [Held.now(path)], Fast(time.time())
    env = {f"p{n}": Scratch() for n in range(programs)}
    with patient():
        async with Engine(path, clock=clock, env=env, hibernate_after="1 second") as engine:
            bound = [engine.bind(Everything, name, schedules="* * * * *") for name in env]
            while len(held) <= 6 or clock.now() < AT_FIRST + hours * 3_600_000:
                with contextlib.closing(sqlite3.connect(path)) as reader:
                    if len(held) % 3 == 0:  # somebody reads for long
                        reader.execute("BEGIN")
                        reader.execute("SELECT * FROM journal").fetchone()
                    for diary in env.values():
                        diary.lines().clear()
                    await asyncio.gather(*(drive(each, env[each.name]) for each in bound))
                for each in bound:
                    await each.delete_batch(
                        [instance.id async for instance in each.list(limit=100)]
                    )
                await asyncio.sleep(0.1)
                with contextlib.suppress(AssertionError):  # until nothing is going on
                    await until(lambda: len(asyncio.all_tasks()) == held[0].tasks)
                held.append(Held.now(path))
    with contextlib.suppress(AssertionError):  # until the threads of callbacks have ended
        await until(lambda: threading.active_count() <= held[0].threads)
    await asyncio.sleep(0.1)
    return [*held, Held.now(path)]


def what_grew(held: list[Held]) -> list[str]:
    """What there was more of later than at first, or in the end than before."""
    before, *rounds, after = held
    first, rest = rounds[: len(rounds) // 3], rounds[len(rounds) // 3 :]
    most = Held(*map(max, zip(*first, strict=True)))
    most = most._replace(blocks=most.blocks * 1.05, peak=most.peak * 1.2, file=most.file * 2)
    most = most._replace(threads=before.threads + 1 + workflows.Threads.LIMIT)
    most = most._replace(timers=2, log=2 * workflows.LONG_LOG)
    later = map(max, zip(*rest, strict=True))
    grew = [name for name, a, b in zip(Held._fields, later, most, strict=True) if a > b]
    counts = ("tasks", "threads", "descriptors", "timers")
    return grew + [
        f"{name} in the end" for name in counts if getattr(before, name) < getattr(after, name)
    ]


def load(arguments: list[str]) -> None:
    """Says what was held, and what of that grew."""
    hours, began = float((arguments or ["1"])[0]), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        held = asyncio.run(live_through(str(Path(folder) / "test.db"), hours, 8))
    print(("{:>13}" * len(Held._fields)).format(*Held._fields))
    for n in range(0, len(held), len(held) // 20 + 1):
        print(("{:13,}" * len(Held._fields)).format(*held[n]))
    print(("{:13,}" * len(Held._fields)).format(*held[-1]))
    grew = what_grew(held)
    rounds = (len(held) - 2) * 8
    print(f"{hours:g} hours, {rounds} programs in {time.monotonic() - began:.0f} s; grew: {grew}")
    raise SystemExit(bool(grew))


class Shares(Case):
    """A share of these two campaigns. The first is about processes: while they die, the second
    goes on."""

    @classmethod
    def setUpClass(cls) -> None:
        command = [sys.executable, __file__, "crashes", "--quick"]
        ends: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        cls.crashes = subprocess.Popen(command, **ends)
        cls.addClassCleanup(cls.crashes.communicate)

    def test_load(self) -> None:
        held = asyncio.run(live_through(self.path, 0, 2))
        self.assertEqual(what_grew(held), [], held)

    def test_the_crashes(self) -> None:
        said, complained = self.crashes.communicate(timeout=300)
        self.assertEqual((self.crashes.returncode, complained), (0, ""), said)


# --------------------------------------------------------------------------------------------------
# Bad values: `python3 test_workflows.py fuzz [seed]` makes 100,000 cases of durations, schedules,
# configurations, errors, values, and calls. Nothing but the documented errors comes out, and what
# is accepted comes back equal. A case depends on nothing but the seed and its number.

NUMBERS: list[Any] = [0, 1, 2, 5, 59, 100, 2**31, 2**53, 2**63, 10**30, 10**400, 10**5000]
NUMBERS += [-1, -(2**63) - 1, -(10**400), 0.0, -0.0, 0.5, 1e-320, 1e11, 1e18, 1e300, True, False]
NUMBERS += [float("inf"), float("-inf"), float("nan")]
TEXTS = [
    "",
    " ",
    "a",
    "b-c_d",
    "é😀",
    "\0",
    "\n",
    "\ud800",
    "$datetime",
    "$dict",
    "x" * 101,
    "batch",
]
TEXTS += ["1 second", "2 days", "1.5 hours", "1 fortnight", "* * * * *", "inf", "1e3", "x" * 300]
MOMENTS = [datetime.min, datetime.max, datetime(2026, 11, 1, 1, fold=1)]
MOMENTS += [datetime(2020, 1, 1, tzinfo=zone) for zone in (UTC, timezone(timedelta(hours=-5.5)))]
SPANS = [timedelta(0), timedelta(days=1), timedelta(-1), timedelta.max, timedelta.min]
ODDITIES: list[Any] = [{1}, object(), object, 1j, range(3), len, b"", b"\xff", bytearray(b"x"), UTC]
ATOMS = [None, *NUMBERS, *TEXTS, *MOMENTS, *SPANS, *ODDITIES]
NATIVE_ERRORS = [
    cls
    for cls in vars(builtins).values()
    if isinstance(cls, type) and issubclass(cls, Exception) and not issubclass(cls, Warning)
]
RUNS: dict[str, Any] = {}  # by the instance's id


class Illegal(Exception):
    """A value that can't be stored."""


def as_stored(value: Any, levels: int = 0) -> Any:
    """What a value comes back as."""
    legal = isinstance(value, (str, int, float, list, tuple, dict, datetime, bytes, bytearray))
    if levels > workflows.DEEPEST or not (legal or value is None):
        raise Illegal
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise Illegal
        return {as_stored(key): as_stored(each, levels + 1) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_stored(each, levels + 1) for each in value]
    unspeakable = isinstance(value, str) and "\ud800" in value
    unwritable = isinstance(value, int) and abs(value) >= 10**4300
    if unspeakable or unwritable or (isinstance(value, float) and not math.isfinite(value)):
        raise Illegal
    return bytes(value) if isinstance(value, bytearray) else value


class Fuzz:
    """A case. The methods that are named in `KINDS` say whether something was accepted."""

    def __init__(self, seed: int, number: int) -> None:
        self.chance = random.Random(f"{seed} {number}")
        self.one = self.chance.choice
        self.id = f"i{number}"
        self.kind = KINDS[number % len(KINDS)]

    def often(self, share: float) -> bool:
        return self.chance.random() < share

    def value(self, levels: int = 3) -> Any:
        """Any value, legal ones among them."""
        kind = self.chance.randrange(6 if levels else 3)
        if kind < 3:
            return self.one(ATOMS)
        if kind == 3 and self.often(0.05):
            deep: Any = self.one(ATOMS)
            for _ in range(self.one([10, 299, 300, 301, 5000])):
                deep = [deep] if self.often(0.5) else {"a": deep}
            return deep
        items = [self.value(levels - 1) for _ in range(self.chance.randrange(4))]
        if kind == 3:
            return {self.one(ATOMS[:9] if self.often(0.02) else TEXTS): each for each in items}
        return items if kind == 4 else tuple(items)

    def options(self, **legal: list[Any]) -> dict[Any, Any]:
        """A dict with some of these keys, and mostly with legal values."""
        made = {
            key: self.one(values) if self.often(0.8) else self.value(1)
            for key, values in legal.items()
            if self.often(0.6)
        }
        return made | {self.one(TEXTS): 1} if self.often(0.05) else made

    def config(self) -> Any:
        retries = self.options(
            limit=[1, 2, 1.0, float("inf")],
            delay=[0, 1, "1 second", "5 days", lambda info: 1],
            backoff=["constant", "linear", "exponential"],
        )
        spans = ["1 second", 5, "1 day", timedelta(1)]
        return self.options(retries=[retries], timeout=spans, sensitive=["output"])

    def duration(self) -> bool:
        number = self.one(
            ["1", "0", "007", "1.5", "1.", ".5", "-1", "1e3", "1_000", "٣", "9" * 400]
        )
        unit = self.one(["second", "minutes", "hour", "days", "week", "months", "year", "ms", ""])
        between = self.one([" ", " ", " ", "", "  ", "\n", "\xa0"])
        text = number + between + unit + self.one(["", "", "", " ", "\n", "s"])
        given = self.one([text, text, text, self.one(ATOMS)])
        try:
            ms = parse_duration(given)
        except ValueError:
            return False
        if isinstance(given, str):
            amount, unit = given.split(" ")
            spans = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
            spans |= {"week": 7 * 86400, "month": 30 * 86400, "year": 365 * 86400}
            exact = float(amount) * spans[unit.removesuffix("s")] * 1000
        else:
            exact = given / timedelta(milliseconds=1) if isinstance(given, timedelta) else given
        exact = min(exact, workflows.ENDLESS)
        assert type(ms) is int and ms >= 0 and abs(ms - exact) <= 0.5, ms
        return not isinstance(given, bool)

    def schedule(self) -> bool:
        pieces = [*"***0757L", "1-5", "*/5", "5/15", "31", "MON", "sun", "JAN-mar", "1,2", "", "60"]
        fields = [self.one(pieces) for _ in range(self.one([5, 5, 5, 4, 6]))]
        if self.often(0.3):
            fields[0] += self.one(",-/#") + self.one(pieces)
        try:
            cron = workflows.Cron(" ".join(fields) if self.often(0.95) else self.one(ATOMS))
        except ValueError:
            return False
        after = self.chance.randrange(0, 4 * 10**12)
        comes = cron.next(after)
        assert comes > after and comes % 60_000 == 0, comes
        assert cron.next(comes - 1) == comes == cron.last(comes), comes
        assert cron.last(comes - 1) == cron.last(after), comes
        assert workflows.Cron(cron.text).next(after) == comes, comes
        return True

    def configuration(self) -> bool:
        given = self.config()
        try:
            config = workflows.StepConfig(given)
            text = config.text
        except (TypeError, ValueError, OverflowError):
            return False
        again = workflows.StepConfig.load(text, given)
        for name in ("limit", "delay", "timeout", "backoff"):
            assert getattr(again, name) == getattr(config, name), name
        return True

    def error(self) -> bool:
        """Whatever an error consists of, it keeps its text, and a class that it was of."""
        odd = [
            InSlots,
            Attributes,
            Careless,
            FromResponse,
            Statement,
            Delegating,
            Odd,
            Both,
            Frozen,
        ]
        error: Any = None
        while error is None:
            with contextlib.suppress(Exception):
                cls = self.one([*NATIVE_ERRORS, *odd, OnlyItsOwnCode, NonRetryableError])
                error = cls(*(self.value(1) for _ in range(self.chance.randrange(4))))
        for name in ("code", "name", "errno", "request", "args", "__notes__"):
            with contextlib.suppress(Exception):
                if self.often(0.1):
                    setattr(error, name, self.value(1))
        record = workflows.decode(workflows.encode_error(error))
        rebuilt = workflows.rebuild_error(record)
        assert isinstance(error, type(rebuilt)) or type(rebuilt) is WorkflowError, rebuilt
        assert workflows.brief(record)["message"] == str(rebuilt), (error, rebuilt)
        if not isinstance(error, ExceptionGroup):
            assert str(rebuilt) == workflows.message_of(error), (error, rebuilt)
        again = workflows.rebuild_error(workflows.decode(workflows.encode_error(rebuilt)))
        assert str(again) == str(rebuilt), again
        return type(rebuilt) is type(error)

    async def value_of_all_kinds(self, bound: Any) -> bool:
        """The same one as params, as a step's result, in an event, and as the output."""
        given = self.value()
        try:
            expected = repr(as_stored(given))
        except Illegal:
            expected = ""

        async def run(event: Any, step: Any) -> Any:
            sent = await step.wait_for_event("w", "t", timeout="365 days")
            got = await refused("step", step.do("s", ONCE, returns(given)))
            if expected:
                got = [event.payload, sent.payload, got]
                assert [repr(each) for each in got] == [expected] * 3, got
            return given

        async def refused(what: str, call: Any) -> Any:
            """What is awaited; or that is refused, as it should be."""
            try:
                return await call
            except WorkflowError as error:
                assert error.code == f"{what}.not_serializable" and not expected, error
            else:
                assert expected, "it was accepted"

        RUNS[self.id] = run
        await refused("params", bound.create(id=self.id, params=given))
        if not expected:
            await bound.create(id=self.id)
        instance = await bound.get(self.id)
        await refused("event", instance.send_event(type="t", payload=given))
        if not expected:
            await instance.send_event(type="t")
        output = await refused("output", instance.result())
        assert repr(output) == expected or not expected, output
        return bool(expected)

    async def step_call(self, bound: Any) -> bool:
        """Any call of a step: it is accepted, or refused with a code."""
        one = self.one
        name = one(TEXTS) if self.often(0.3) else "s"
        callbacks = returns(1), lambda: 1, lambda ctx: 1, lambda ctx: 1 // (ctx.attempt - 1)
        callback = one([*callbacks, *callbacks, None, 5, object, lambda a, b: 1])
        span = one(["1 day", 5, "30 days", self.value(0)])
        options = self.options(type=["t", "a-b"], timeout=["1 day", 5])
        undo = self.options(rollback=[lambda info: None], rollbackConfig=[{}])

        async def run(event: Any, step: Any) -> Any:
            calls = [
                lambda: step.do(name, self.config(), callback),
                lambda: step.do(name, self.config(), callback, undo),
                lambda: step.do(name, callback, rollback=self.value(0)),
                lambda: step.sleep(name, span),
                lambda: step.sleep(name, span, self.value(0)),
                lambda: step.sleep_until(name, one([span, one(NUMBERS), one(MOMENTS)])),
                lambda: step.wait_for_event(name, options),
                lambda: step.wait_for_event(name, one(["t", self.value(0)]), timeout=span),
            ]
            try:
                await one(calls)()
            except WorkflowFatalError as error:
                assert error.code.startswith(("step.", "event.", "limit.", "workflow.fatal")), error
                return False
            except (WorkflowTimeoutError, ZeroDivisionError):
                pass
            return True

        RUNS[self.id] = run
        accepted: bool = await (await bound.create(id=self.id)).result()
        return accepted

    async def callers_call(self, bound: Any) -> bool:
        """Any call of a caller: it does what it should, or is refused with an error that says
        why."""
        one, value = self.one, self.value
        instance = workflows.WorkflowInstance(bound, one(["there", "not-there"]))
        retention = self.options(successRetention=["1 day", *NUMBERS], errorRetention=SPANS)
        ids = [None, self.id, *TEXTS]
        options = self.options(id=ids, params=[1], retention=[retention], locationHint=["x"])
        start = self.options(name=["s", *TEXTS], count=NUMBERS, type=["do", "sleep"])
        calls = [
            lambda: bound.create(one([options, options, options, value(1)])),
            lambda: bound.create_batch(one([[options] * one([1, 2, 101]), value(2)])),
            lambda: bound.create_batch(options | {"count": one([1, 2, *NUMBERS])}),
            lambda: bound.get(one([*TEXTS, value(0)])),
            lambda: bound.delete_batch(one([[one(TEXTS)], value(1)])),
            lambda: anext(bound.list(status=one([None, value(0)]), limit=one([1, value(0)])), 0),
            lambda: bound.replay(one([*TEXTS, value(0)])),
            lambda: bound.engine.workflow(one([*TEXTS, value(0)])),
            lambda: instance.restart({"from": one([start, start, value(1)])}),
            lambda: instance.send_event(self.options(type=["t", *TEXTS], payload=[1])),
            lambda: instance.send_event(value(1)),
            lambda: instance.result(timeout=one([value(0), one(NUMBERS)])),
            lambda: instance.terminate(rollback=value(0)),
            lambda: anext(aiter(instance.subscribe(value(0), one([None, value(1)]))), 0),
        ]
        RUNS[self.id] = RUNS["there"] = one_step
        with contextlib.suppress(WorkflowError):
            await bound.create(id="there")
        try:
            await one(calls)()
        except WorkflowInternalError:
            raise
        except (TypeError, ValueError, WorkflowError):
            return False
        return True


KINDS = [Fuzz.duration, Fuzz.schedule, Fuzz.configuration, Fuzz.error]
KINDS += [Fuzz.value_of_all_kinds, Fuzz.step_call, Fuzz.callers_call]


async def try_all(seed: int, numbers: range) -> collections.Counter[str]:
    """How many of these cases were accepted and refused, of each kind."""
    counts = collections.Counter[str]()
    cases = [Fuzz(seed, number) for number in numbers]

    async def attempt(case: Fuzz, *args: Any) -> None:
        try:
            accepted = case.kind(case, *args)
            accepted = await accepted if asyncio.iscoroutine(accepted) else accepted
        except Exception as error:
            error.add_note(f"seed {seed}, case {case.id}: {case.kind.__name__}")
            raise
        counts[f"{case.kind.__name__} {'accepted' if accepted else 'refused'}"] += 1

    async def run(event: Any, step: Any) -> Any:
        return await RUNS.get(event.instance_id, one_step)(event, step)

    clock = ManualClock(start=AT_FIRST)
    for case in cases:
        if not asyncio.iscoroutinefunction(case.kind):
            await attempt(case)
    async with Engine(":memory:", clock=clock, limits=FOREVER) as engine:
        bound = engine.bind(workflow(run))
        through = [case for case in cases if asyncio.iscoroutinefunction(case.kind)]
        running = [asyncio.ensure_future(attempt(case, bound)) for case in through]
        for _ in range(30):
            await clock.advance("50 days")
        # (A replay report takes a moment of real time.)
        done, hanging = await asyncio.wait(running, timeout=20) if running else ((), ())
    RUNS.clear()
    errors = [error for each in done if (error := each.exception())]
    if errors or hanging:
        raise ExceptionGroup(f"{len(hanging)} hang", errors)
    return counts


def fuzz(arguments: list[str]) -> None:
    """Tries 100,000 cases, and says how many were accepted."""
    seed, counts, began = int((arguments or ["1"])[0]), collections.Counter[str](), time.monotonic()
    logging.getLogger("workflows").setLevel(logging.CRITICAL + 1)
    for start in range(0, 100_000, 500):
        numbers = range(start, start + 500)
        try:
            counts += asyncio.run(try_all(seed, numbers))
        except Exception:
            for number in numbers:  # which of them was it?
                asyncio.run(try_all(seed, range(number, number + 1)))
            raise
    for kind, count in sorted(counts.items()):
        print(f"{count:7,} {kind}")
    print(f"seed {seed}: {counts.total():,} cases in {time.monotonic() - began:.0f} s, none failed")


class BadValues(Case):
    def test_a_share_of_the_campaign(self) -> None:
        counts = asyncio.run(try_all(1, range(1050)))
        for kind in KINDS:
            for end in ("accepted", "refused"):
                self.assertGreater(counts[f"{kind.__name__} {end}"], 1)

    async def test_what_sqlite_can_not_hold_is_refused_and_stops_no_engine(self) -> None:
        async with self.engine() as engine:
            bound = engine.bind(workflow(one_step))
            calls: list[Any] = []
            for odd in ({1}, "\ud800"):
                calls += [functools.partial(call, odd) for call in (bound.replay, engine.workflow)]
            for call in calls:
                with self.assertRaises((TypeError, ValueError, WorkflowError)) as refused:
                    await call()
                self.assertNotIsInstance(refused.exception, WorkflowInternalError)
            await bound.create()
        with self.assertRaises(ValueError):
            Limits(error_retention=10**30)
        async with self.engine(limits=Limits.UNLIMITED, drain=10**400) as engine:
            kept = {"successRetention": 10**30}
            instance = await engine.bind(workflow(one_step)).create(retention=kept)
            await self.finish(instance)


# --------------------------------------------------------------------------------------------------
# The figures: `python3 test_workflows.py bench [--quick]`. Each is measured several times, and each
# time what the machine itself can do right before and after, because it is not equally fast all
# the time: what SQLite does on the same disk (single-row commits, as durable as the engine's),
# and what Python does. What can be compared, with another version or another machine, are ratios.


class Figure(NamedTuple):
    """One line of the table. `measure` returns one number, which may be at most `most`."""

    name: str
    measure: Callable[[Path], float]
    unit: str = "/s"
    most: float = math.inf
    rounds: int = 5

    def report(self, folder: Path, rounds: int) -> bool:
        """Measures it, prints its line, and says whether it is what it may be."""
        found: list[tuple[float, ...]] = []
        began = time.perf_counter()
        while len(found) < rounds and time.perf_counter() < began + 6:
            before = yardsticks(folder)
            value = self.measure(folder)
            raw = [(a + b) / 2 for a, b in zip(before, yardsticks(folder), strict=True)]
            found.append((value, *raw, *(value / yardstick for yardstick in raw)))
        value, commits, trips, of_sqlite, of_python = map(
            statistics.median, zip(*found, strict=True)
        )
        rate, reached = self.unit == "/s", value <= self.most
        columns = (
            *(self.name, f"{value:,.{0 if rate else 2}f}{self.unit}"),
            *(f"{commits:,.0f}/s", f"{trips:,.0f}/s"),
            *((f"{of_sqlite:.3f}", f"{of_python:.4f}") if rate else ("", "")),
            f"<= {self.most:g}{self.unit}" if self.most < math.inf else "",
            "" if reached else "MISSED",
        )
        print(LINE.format(*columns).rstrip(), flush=True)
        return reached


LINE = "{:38}{:>12}{:>12}{:>12}{:>10}{:>10}{:>12}  {}"


def yardsticks(folder: Path) -> tuple[float, float]:
    return raw_commits(folder), raw_trips()


def raw_trips(seconds: float = 0.25) -> float:
    """How many round trips per second a bare asyncio task makes that encodes a small value, puts it
    into a list and wakes the next one."""
    done: list[str] = []

    async def main() -> float:
        began = time.perf_counter()
        turns = [asyncio.Event(), asyncio.Event()]

        async def task(mine: asyncio.Event, other: asyncio.Event) -> None:
            while time.perf_counter() < began + seconds:
                await mine.wait()
                mine.clear()
                done.append(json.dumps({"processed": True}))
                other.set()

        turns[0].set()
        await asyncio.gather(task(*turns), task(*turns[::-1]))
        return len(done) / (time.perf_counter() - began)

    return asyncio.run(main())


def raw_commits(folder: Path, seconds: float = 0.25) -> float:
    """How many commits of one row per second SQLite does here: WAL, synchronous=FULL."""
    path = folder / "raw.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA fullfsync = 1")
        db.execute("CREATE TABLE IF NOT EXISTS rows (key INTEGER PRIMARY KEY, data TEXT)")
        done, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            for _ in range(50):
                db.execute("INSERT INTO rows (data) VALUES ('twenty characters...')")
            done += 50
        return done / (time.perf_counter() - began)


def fresh(folder: Path) -> str:
    """The path of a database that does not exist yet."""
    return str(folder / f"{uuid.uuid4().hex}.db")


class Shifted(Clock):
    """The real clock, some time ahead."""

    ahead = 0

    def now(self) -> int:
        return super().now() + self.ahead


class Steps(WorkflowEntrypoint[Any]):
    """So many steps as its params say, one after the other."""

    async def run(self, event: Any, step: Any) -> None:
        async def callback() -> Any:
            return {"processed": True}

        for _ in range(event.payload):
            await step.do("step", callback)


class Sleeper(WorkflowEntrypoint[Any]):
    """Sleeps as long as its params say."""

    woken = 0

    async def run(self, event: Any, step: Any) -> None:
        await step.sleep("sleep", event.payload)
        Sleeper.woken += 1


def batch_of(params: Any, size: int = 100) -> list[dict[str, Any]]:
    return [{"params": params}] * size


def measured(main: Callable[..., Any]) -> Callable[..., Any]:
    def measure(*args: Any) -> Any:
        gc.collect()
        gc.freeze()  # a collection goes through what this figure makes, not what others left
        return asyncio.run(main(*args))

    return measure


@measured
async def steps_of_one_instance(folder: Path) -> float:
    async with Engine(fresh(folder)) as engine:
        workflow = engine.bind(Steps)
        await (await workflow.create(params=10)).result()
        began = time.perf_counter()
        await (await workflow.create(params=1000)).result()
        return 1000 / (time.perf_counter() - began)


@measured
async def steps_of_500_instances(folder: Path) -> float:
    async with Engine(fresh(folder)) as engine:
        workflow = engine.bind(Steps)
        await (await workflow.create(params=10)).result()
        began = time.perf_counter()
        batches = [await workflow.create_batch(batch_of(20)) for _ in range(5)]
        await asyncio.gather(*(one.result() for batch in batches for one in batch))
        return 10_000 / (time.perf_counter() - began)


@measured
async def creations(folder: Path, callers: int = 1) -> float:
    async with Engine(fresh(folder)) as engine:
        workflow = engine.bind(Sleeper)
        await (await workflow.create(params=0)).result()

        async def caller() -> None:
            for _ in range(50 // callers):
                await workflow.create_batch(batch_of("1 hour"))

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        return 5000 / (time.perf_counter() - began)


class Recorded(WorkflowEntrypoint[Any]):
    """A thousand steps, and then one whose callback tells how long it took to come so far."""

    async def run(self, event: Any, step: Any) -> Any:
        async def callback() -> Any:
            return {"processed": True}

        for n in range(1000):
            await step.do(f"step {n}", callback)
        if self.env.BEGAN is None:
            self.env.THERE.set()
            await asyncio.Event().wait()
        return await step.do("new", lambda: time.perf_counter() - self.env.BEGAN)


async def live_once(path: str, began: float | None) -> Any:
    there = asyncio.Event()
    async with Engine(path, env={"BEGAN": began, "THERE": there}) as engine:
        bound = engine.bind(Recorded)
        if began is not None:
            return await (await bound.get("i")).result()
        await bound.create(id="i")
        return await there.wait()


def replay(folder: Path) -> tuple[float, float]:
    """In ms, in a new process, from `asyncio.run` to the first new step; and how many times longer
    that is than what SQLite and JSON take to read the same rows."""
    path = fresh(folder)
    asyncio.run(live_once(path, None))
    command = [sys.executable, __file__, "bench", "--replay", path]
    took = float(subprocess.run(command, check=True, capture_output=True).stdout)
    began = time.perf_counter()
    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT step, data FROM journal WHERE type = 'done' ORDER BY seq")
        read = {step: json.loads(data) for step, data in rows}
    raw = time.perf_counter() - began
    assert len(read) == 1001
    return 1000 * took, took / raw


@measured
async def wakings(folder: Path) -> float:
    """From the moment at which all are due, to the one at which the last goes on."""
    clock = Shifted()
    async with Engine(fresh(folder), clock=clock, hibernate_after=0) as engine:
        workflow = engine.bind(Sleeper)
        instances = [await workflow.create_batch(batch_of("1 hour")) for _ in range(30)]
        for batch in instances:
            while (await batch[-1].status()).status != "waiting":
                await asyncio.sleep(0.01)
        while engine.lives.runs:
            await asyncio.sleep(0.01)
        Sleeper.woken = 0
        began, clock.ahead = time.perf_counter(), 3_600_000
        while Sleeper.woken < 3000:
            await asyncio.sleep(0.005)
        return 3000 / (time.perf_counter() - began)


@measured
async def latencies(folder: Path) -> tuple[float, float]:
    """Medians of `create` and `status`, while 500 instances take step after step of 10 ms."""
    stop = False

    class Busy(WorkflowEntrypoint[Any]):
        async def run(self, event: Any, step: Any) -> None:
            async def callback() -> Any:
                await asyncio.sleep(0.01)
                return {"processed": True}

            while not stop:
                await step.do("step", callback)

    async def took(call: Callable[[], Any]) -> float:
        began = time.perf_counter()
        await call()
        return 1000 * (time.perf_counter() - began)

    async with Engine(fresh(folder)) as engine:
        busy, idle = engine.bind(Busy, steps=25_000), engine.bind(Sleeper)
        for _ in range(5):
            await busy.create_batch(batch_of({}))
        instance = await idle.create(params="1 hour")
        create, status = [], []
        began = time.perf_counter()
        while time.perf_counter() < began + 1.5 or len(status) < 10:
            create.append(await took(lambda: idle.create(params="1 hour")))
            status.append(await took(instance.status))
        stop = True
        return statistics.median(create), statistics.median(status)


async def fall_asleep(path: str, count: int) -> None:
    """Leaves so many sleeping instances in a database, by way of the engine."""
    async with Engine(path, hibernate_after=0) as engine:
        workflow = engine.bind(Sleeper)
        for _ in range(count // 100):
            await workflow.create_batch(batch_of("30 days"))
        await (await workflow.create(params=0)).result()  # first come first served: it is the last
        while engine.lives.runs:
            await asyncio.sleep(0.01)


async def look_at_idle_engine(path: str, seconds: float) -> None:
    """In a process of its own: how fast an engine starts on a file (until a new instance has run to
    its end), its peak memory, and what it uses of a core when there is nothing to do."""
    began = time.perf_counter()
    async with Engine(path) as engine:
        await (await engine.bind(Sleeper).create(params=0)).result()
        start = time.perf_counter() - began
        await asyncio.sleep(2)  # every regular look has happened
        cpu = time.process_time()
        await asyncio.sleep(seconds)
        cpu = (time.process_time() - cpu) / seconds
    print(json.dumps([start, peak_memory(), 100 * cpu]))


def peak_memory() -> float:
    """MB that this process has used at most. Linux counts a parent's too, unless asked here."""
    try:
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def sleeping(folder: Path, count: int, seconds: float) -> list[float]:
    """Start in s, MB above an empty engine, % of a core: with so many instances asleep."""
    path = fresh(folder)
    asyncio.run(fall_asleep(path, count))
    found = []
    for database in (fresh(folder), path):
        command = [sys.executable, __file__, "bench", "--idle", database, str(seconds)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    (_, empty, _), (start, memory, cpu) = found
    return [start, memory - empty, cpu]


def figures(quick: bool) -> list[Figure]:
    asleep, seconds = (10_000, 2.0) if quick else (100_000, 5.0)
    rounds = range(1 if quick else 3)
    once = functools.cache(lambda folder: sleeping(folder, asleep, seconds))
    busy = functools.cache(lambda folder: [latencies(folder) for _ in rounds])
    replays = functools.cache(lambda folder: [replay(folder) for _ in rounds])

    def middle(kept: Callable[[Path], Any], n: int) -> Callable[[Path], float]:
        return lambda folder: statistics.median(pair[n] for pair in kept(folder))

    return [
        Figure("steps, one instance, one by one", steps_of_one_instance),
        Figure("steps, 500 instances x 20", steps_of_500_instances),
        Figure("create_batch of 100, while they start", creations),
        Figure("  the same, by 10 callers at once", lambda f: creations(f, 10)),
        Figure("waking of due instances", wakings, rounds=3),
        Figure("replay of 1,000 steps, new process", middle(replays, 0), " ms", rounds=1),
        Figure("  as a multiple of the raw reading", middle(replays, 1), "", 25, 1),
        Figure("create, while 500 are busy", middle(busy, 0), " ms", rounds=1),
        Figure("status, while 500 are busy", middle(busy, 1), " ms", rounds=1),
        Figure(f"{asleep:,} asleep: engine start", lambda f: once(f)[0], " s", 0.5, 1),
        Figure("  memory above an empty engine", lambda f: once(f)[1], " MB", 60, 1),
        Figure("  CPU of one core while idle", lambda f: once(f)[2], " %", 0.5, 1),
    ]


def bench(arguments: list[str]) -> None:
    """Prints the table."""
    if arguments[:1] == ["--idle"]:
        asyncio.run(look_at_idle_engine(arguments[1], float(arguments[2])))
        return
    if arguments[:1] == ["--replay"]:
        print(asyncio.run(live_once(arguments[1], time.perf_counter())))
        return
    if arguments not in ([], ["--quick"]):
        raise SystemExit("usage: python3 test_workflows.py bench [--quick]")
    gc.freeze()  # a user's program has no tests in it, for each full collection to visit
    quick, began = bool(arguments), time.perf_counter()
    head = ("figure", "measured", "SQLite", "Python", "/ SQLite", "/ Python", "at most", "")
    print(LINE.format(*head).rstrip())
    with tempfile.TemporaryDirectory(prefix="workflows-bench-") as name:
        folder = Path(name)
        reached = [
            figure.report(folder, 1 if quick else figure.rounds) for figure in figures(quick)
        ]
        print(
            f"""
SQLite: commits of one row per second (WAL, synchronous=FULL) in {name}. Python: round trips per
second of two bare asyncio tasks. Both before and after each figure, which are repeated: medians.
/ SQLite, / Python: measured / that, of the same moment. Python {sys.version.split()[0]}, \
SQLite {sqlite3.sqlite_version}, {sys.platform}, \
{os.cpu_count()} cores; {time.perf_counter() - began:.0f} s; {reached.count(False)} missed"""
        )


if __name__ == "__main__":
    campaigns = {"bench": bench, "crashes": crashes, "fuzz": fuzz, "load": load}
    if sys.argv[1:] and sys.argv[1] in campaigns:
        campaigns[sys.argv[1]](sys.argv[2:])
    else:
        unittest.main()
