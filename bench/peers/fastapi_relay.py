"""FastAPI and httpx: a StreamingResponse over a streamed call, and a map of tasks to cancel."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

app = FastAPI()
# httpx allows 100 connections and 5 seconds of silence unless it is told otherwise.
client = httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_keepalive_connections=64))
tasks: dict[str, asyncio.Task[object]] = {}


@app.post("/api/chat/stream")
async def stream(request: Request) -> StreamingResponse:
    body = await request.json()
    session = body.get("sessionId") or str(uuid.uuid4())

    async def events() -> AsyncIterator[bytes]:
        task = asyncio.current_task()
        assert task is not None
        tasks[session] = task
        try:
            async with client.stream("POST", os.environ["UPSTREAM_URL"], json=body) as answer:
                async for chunk in answer.aiter_raw():
                    yield chunk
        except asyncio.CancelledError:
            if session in tasks:  # the client has gone; else it was the cancel, and the body ends
                raise
        finally:
            if tasks.get(session) is task:
                del tasks[session]

    return StreamingResponse(events(), media_type="text/event-stream")


@app.post("/api/chat/cancel/{session}")
async def cancel(session: str) -> JSONResponse:
    task = tasks.pop(session, None)
    if task is None:
        return JSONResponse({"ok": False}, 404)
    task.cancel()
    return JSONResponse({"ok": True})
