"""Who waits for SQLite's lock keeps nobody else waiting, with the driver of Prefect's server."""

import asyncio
import gc
import threading
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from deployments import server


async def fail(connection: AsyncConnection) -> IntegrityError:
    with pytest.raises(IntegrityError) as failed:
        await connection.execute(text("INSERT INTO one VALUES (1)"))
    await connection.rollback()
    return failed.value


async def write_while_another_collects(database: Path) -> None:
    """A connection waits for the lock that another has, whose thread collects what an earlier error has left."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{database}", connect_args={"timeout": 5})
    is_waiting = threading.Event()
    async with engine.connect() as waiting, engine.connect() as holding:
        await holding.execute(text("CREATE TABLE one (number INTEGER PRIMARY KEY)"))
        await holding.execute(text("INSERT INTO one VALUES (1)"))
        await holding.commit()
        left: list[Any] = [await fail(waiting)]
        left.append(left)  # a cycle, as tracebacks are

        await holding.execute(text("INSERT INTO one VALUES (2)"))
        driver = (await waiting.get_raw_connection()).driver_connection
        assert driver is not None

        def trace(statement: str) -> None:
            """SQLite calls it when it has begun with a statement."""
            if "INSERT" in statement:
                is_waiting.set()

        await driver.set_trace_callback(trace)
        writing = asyncio.create_task(waiting.execute(text("INSERT INTO one VALUES (3)")))
        await asyncio.to_thread(is_waiting.wait)
        del left
        gc.collect()
        await holding.commit()
        await writing
    await engine.dispose()


def test_a_statement_that_failed_before_does_not_stop_the_server_while_another_waits_for_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiosqlite.Cursor, "_execute", server.closing(aiosqlite.Cursor._execute))
    asyncio.run(write_while_another_collects(tmp_path / "database"))
