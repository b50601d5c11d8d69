"""The whole proxy in the process of the tests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

from opendify import Dify, Server, Settings, Site, open_conversations, open_wire


@contextlib.asynccontextmanager
async def listening(
    settings: Settings, connect: Any = open_wire, **options: Any
) -> AsyncIterator[tuple[Site, Server, int]]:
    """Give what is served on loopback, the server and its port; all ids are numbers.

    Args:
        settings: of the proxy.
        connect: opens its connections to Dify.
        options: of the site.
    """
    store, ttl_s = settings.conversation_store, settings.conversation_ttl
    conversations, complaint = open_conversations(store, ttl_s)
    assert not complaint
    dify = Dify(settings, connect)
    ids = itertools.count(1)
    site = Site(dify, conversations, lambda: str(next(ids)), **options)
    server = Server(site)
    ((_, port),) = await server.listen("127.0.0.1", 0)
    try:
        yield site, server, port
    finally:
        await server.drain(0)
        dify.close()
        conversations.close()
        await asyncio.sleep(0)
