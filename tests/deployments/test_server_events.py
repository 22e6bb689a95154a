"""An event that the server's database refuses is tried again, on Prefect's broker as it is."""

import asyncio
from pathlib import Path

import pytest
from prefect.server.utilities.messaging.memory import Consumer, MemoryMessage, Subscription, Topic

from deployments import server


async def tries_of(refusals: int, dropped: Path) -> int:
    """How often an event is tried that the database refuses so often, until it is handled or dropped."""
    tries, handled = 0, asyncio.Event()

    async def handle(message: object) -> None:
        nonlocal tries
        tries += 1
        if tries <= refusals:
            raise OSError("database is locked")
        handled.set()

    topic = Topic.by_name(str(dropped))
    consumer = Consumer(topic.name, topic.subscribe(dead_letter_queue_path=dropped))
    running = asyncio.create_task(consumer.run(handle))
    await topic.publish(MemoryMessage(b"{}", {}))
    while not handled.is_set() and not (dropped.exists() and list(dropped.iterdir())):
        await asyncio.sleep(0.01)
    running.cancel()
    return tries


@pytest.mark.parametrize(("refusals", "tries"), [(0, 1), (6, 7), (100, 9)])
def test_an_event_that_is_refused_is_tried_again_for_a_while(
    refusals: int, tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(Subscription, "retry", server.patient(Subscription.retry))
    assert asyncio.run(tries_of(refusals, tmp_path / "dropped")) == tries
    assert (tmp_path / "dropped").exists() == (refusals > tries)
