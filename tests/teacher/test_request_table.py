"""Who waits for which request: at the instants that a real engine would rarely meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import numpy as np
import pytest

from lynearm.teacher.engine_loop import EngineLoop, EngineRequest
from lynearm.teacher.request_table import RequestContent, RequestTable
from lynearm.teacher.score_calls import ScoreCall
from lynearm.teacher.scoring import Score
from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.wire.errors import RequestConflictError, TeacherError
from lynearm.wire.scoring import ScoreSettings, StudentCompletion, TeacherInfo, completion_to_proto
from lynearm.wire.scoring import settings_to_proto as settings_message
from lynearm.wire.specs import TeacherSpec, TokenizerSpec
from lynearm.wire.traces import TopK

TEACHER = TeacherInfo(
    TeacherSpec("t", "r", "e", "float32", 100, 64), TokenizerSpec("t", bytes(32), b"", 100, (2,))
)


class Engine:
    """In place of `EngineLoop`: notes what it is told, and does nothing."""

    def __init__(self) -> None:
        self.requests: dict[str, EngineRequest] = {}
        self.aborted: list[str] = []

    def submit(self, request: EngineRequest) -> None:
        self.requests[request.request_id] = request

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def make_table(max_in_flight: int = 4, recent_bytes: int = 1 << 20) -> tuple[RequestTable, Engine]:
    engine = Engine()
    table = RequestTable(cast("EngineLoop", engine), max_in_flight=max_in_flight, recent_bytes=recent_bytes)
    return table, engine


def content(digest: bytes = b"d") -> RequestContent:
    return RequestContent(digest, lambda engine, key: None)


def make_score(positions: int = 3) -> Score:
    rows = np.zeros((positions, 2), np.float32)
    top_k = TopK(np.zeros((positions, 2), np.int32), rows, rows[:, 0])
    return Score("s", rows[:, 0], top_k, rows)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_last_to_leave_aborts_and_makes_room() -> None:
    async def work() -> None:
        table, engine = make_table(max_in_flight=1)
        first = await table.join(("s", "a"), content())
        second = await table.join(("s", "a"), content())
        assert first is second
        waiting = asyncio.create_task(table.join(("s", "b"), content()))
        table.leave(first)
        await settle()
        assert not engine.aborted
        assert not waiting.done()
        table.leave(second)
        await settle()
        assert engine.aborted == ["r0"]
        assert waiting.done()
        # What the engine says of the aborted one comes too late, and makes no room twice.
        engine.requests["r0"].on_end(make_score())
        await settle()
        assert table._room.locked()

    asyncio.run(work())


def test_a_name_that_was_left_may_stand_for_something_else() -> None:
    async def work() -> None:
        table, _ = make_table()
        table.leave(await table.join(("s", "a"), content(b"one")))
        assert await table.join(("s", "a"), content(b"two"))
        with pytest.raises(RequestConflictError):
            await table.join(("s", "a"), content(b"one"))

    asyncio.run(work())


def test_who_waited_for_room_joins_what_began_meanwhile() -> None:
    async def work() -> None:
        table, engine = make_table(max_in_flight=1)
        blocking = await table.join(("s", "x"), content())
        joins = [asyncio.create_task(table.join(("s", "a"), content())) for _ in range(3)]
        conflict = asyncio.create_task(table.join(("s", "a"), content(b"other")))
        await settle()
        table.leave(blocking)
        await settle()
        # The first has taken the room that there is; the others come when it has ended, and begin nothing.
        engine.requests["r1"].on_end(make_score())
        await settle()
        await settle()
        assert len({id(one.result()) for one in joins}) == 1
        with pytest.raises(RequestConflictError):
            await conflict
        assert list(engine.requests) == ["r0", "r1"]
        assert not table._room.locked()

    asyncio.run(work())


def test_what_failed_is_tried_again_and_what_succeeded_is_not() -> None:
    async def work() -> None:
        table, engine = make_table(recent_bytes=1 << 20)
        failing = await table.join(("s", "a"), content())
        engine.requests["r0"].on_end(TeacherError("no"))
        await settle()
        with pytest.raises(TeacherError):
            await failing.result
        again = await table.join(("s", "a"), content())
        engine.requests["r1"].on_end(make_score())
        await settle()
        assert again.result.done()
        table.leave(again)
        assert (await table.join(("s", "a"), content())) is again
        assert table.begun == 2

    asyncio.run(work())


def test_results_above_the_bound_are_forgotten() -> None:
    async def work() -> None:
        table, engine = make_table(recent_bytes=3000)
        for number in range(5):
            table.leave(await _finished(table, engine, f"r{number}", str(number)))
        assert len(table._requests) == len(table._recent) == 2
        assert table._recent_bytes <= 3000

    asyncio.run(work())


async def _finished(table: RequestTable, engine: Engine, key: str, name: str) -> Any:
    request = await table.join(("s", name), content())
    engine.requests[key].on_end(make_score())
    await settle()
    return request


def test_a_call_that_ends_as_a_request_begins_leaves_nothing_behind() -> None:
    ids = np.asarray([3, 4], np.int32)
    batch = pb.CompletionBatch(completions=[completion_to_proto(StudentCompletion("a", ids, ids))])

    async def work() -> None:
        table, engine = make_table(max_in_flight=1)
        call = ScoreCall(table, TEACHER, buffer_bytes=1 << 20)

        async def requests() -> AsyncIterator[pb.ScoreRequest]:
            yield pb.ScoreRequest(open=settings_message(ScoreSettings(session="s", top_k=4)))
            serving.cancel()
            yield pb.ScoreRequest(completions=batch)
            await asyncio.sleep(60)

        async def serve() -> None:
            async with aclosing(call.serve(requests())) as responses:
                async for _ in responses:
                    pass

        serving = asyncio.create_task(serve())
        with pytest.raises(asyncio.CancelledError):
            await serving
        await settle()
        assert list(engine.requests) == engine.aborted == ["r0"]
        assert not table._room.locked()

    asyncio.run(work())
