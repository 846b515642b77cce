"""What a user with types writes: `mypy --strict` and `pyright` know what every form returns."""

import asyncio
from typing import TypedDict, assert_type

from workflows import (
    Engine,
    WorkflowEntrypoint,
    WorkflowEvent,
    WorkflowRollbackContext,
    WorkflowStep,
    WorkflowStepContext,
    WorkflowStepEvent,
)


class Order(TypedDict):
    id: str
    amount: int


class Pay(WorkflowEntrypoint[Order]):
    async def run(self, event: WorkflowEvent[Order], step: WorkflowStep) -> int:
        assert_type(event.payload, Order)

        async def charge() -> int:
            return event.payload["amount"]

        def stamp(ctx: WorkflowStepContext) -> str:
            return ctx.step.name

        async def undo(info: WorkflowRollbackContext) -> None:
            print(info.step_name, info.error)

        config = {"retries": {"limit": 3, "delay": "1 second"}}
        assert_type(await step.do("async", charge), int)
        assert_type(await step.do("plain", stamp), str)
        assert_type(await step.do("lambda", lambda: [1]), list[int])
        assert_type(await step.do("config", config, charge), int)
        assert_type(await step.do("config", {"timeout": "1 minute"}, stamp), str)
        assert_type(await step.do("named", callback=charge, config=config), int)
        assert_type(await step.do("undo", charge, {"rollback": undo}), int)
        assert_type(await step.do("undo", config, stamp, rollback=undo), str)
        both = await asyncio.gather(step.do("a", charge), step.do("b", stamp))
        assert_type(both, tuple[int, str])
        assert_type(await asyncio.create_task(step.do("task", charge)), int)

        @step.do("fetch", config={"timeout": "1 minute"})
        async def fetch() -> list[int]:
            return [1]

        @step.do()
        def total(fetch: list[int], ctx: WorkflowStepContext) -> int:
            return sum(fetch) + ctx.attempt

        assert_type(await fetch(), list[int])
        assert_type(await total(), int)
        await step.sleep_until("then", event.timestamp)
        nap = step.sleep("nap", "1 hour")
        _, approval = await asyncio.gather(nap, step.wait_for_event("approval", "approved"))
        assert_type(approval, WorkflowStepEvent)
        print(approval.approved, approval.payload["by"])
        return await step.do("charge again", charge)


class Untyped(WorkflowEntrypoint):
    async def run(self, event: WorkflowEvent, step: WorkflowStep) -> None:
        await step.do("any params", lambda: event.payload.user.name)


async def main() -> None:
    async with Engine("orders.db") as engine:
        workflow = engine.bind(Pay)
        instance = await workflow.create(id="a", params={"id": "a", "amount": 5})
        print((await instance.status()).status, [event.type for event in await instance.history()])
        print([one.id for one in await workflow.create_batch([{"id": "b"}, {"id": "c"}])])
        print((await workflow.create_batch({"count": 2}))["created"][0].id)
        async for event in instance.subscribe(filter=["step_completed"]):
            print(event["stepName"])
        subscription = await instance.subscribe()
        print((await subscription.next())["done"])
        async for one in workflow.list(status="errored"):
            await one.restart()
