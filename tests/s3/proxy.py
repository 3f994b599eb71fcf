"""A proxy before an S3 gateway that spoils what is read through it: slow, refused, unanswered, cut short, or with flipped bits.

It runs in a process of its own: loader workers that fork would inherit its connections, and one that it closes would stay open.
`python tests/s3/proxy.py PORT` serves on a free port of loopback, which it prints; `Proxy` starts and steers it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from typing import Any

FAULTS = ("latency", "500", "503", "timeout", "truncated", "flipped", "reset")
"""What can happen to the answer to a GET of a shard: it comes `delay_s` late; 500; 503 SlowDown; never; half of it under the
length of the whole; one bit flipped in the right length; the connection is reset."""
REASONS = {"500": ("500 Internal Server Error", "InternalError"), "503": ("503 Slow Down", "SlowDown")}
STEER = "/-/"


class Proxy:
    """A running proxy; `port` takes the place of the gateway's."""

    def __init__(self, upstream: int) -> None:
        self._process = subprocess.Popen([sys.executable, __file__, str(upstream)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def plan(
        self, faults: dict[int, str] | None = None, *, share: float = 0.0, of: tuple[str, ...] = (), seed: int = 0, delay_s: float = 0.2, only: str = ".mds"
    ) -> None:
        """Forget what happened, and say what shall.

        Args:
            faults: number of the GET, from 0 → fault; −1 = every one.
            share: of the GETs that get a fault of `of`, from the stream `seed`: each once in a random order, then again; never twice in a row for
                one object.
            delay_s: of `latency`.
            only: GETs of objects whose names end so are counted and spoilt, others pass.
        """
        told = {"faults": {str(k): v for k, v in (faults or {}).items()}, "share": share, "of": of, "seed": seed, "delay_s": delay_s, "only": only}
        self._steer("plan", json.dumps(told).encode())

    def events(self) -> list[dict[str, Any]]:
        """Give what happened to each GET since `plan`: its object, what was done (empty: nothing), when it came and when it was answered."""
        return json.loads(self._steer("events"))

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _steer(self, what: str, data: bytes | None = None) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(f"http://127.0.0.1:{self.port}{STEER}{what}", data=data), timeout=10) as answer:
            return answer.read()


class _Server:
    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.events: list[dict[str, Any]] = []
        self.set({"faults": {}, "share": 0.0, "of": [], "seed": 0, "delay_s": 0.0, "only": ".mds"})

    def set(self, plan: dict[str, Any]) -> None:
        self.plan, self.events, self.draw, self.spared, self.bag = plan, [], random.Random(plan["seed"]), set(), []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, each through a connection of its own to the gateway."""
        try:
            while request := await _message(reader):
                if not await self._answer(*request, writer):
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; give whether the connection stays."""
        method, path = head.split(b" ", 2)[:2]
        name = path.decode().partition("?")[0]
        if name.startswith(STEER):
            return await self._steered(name, body, writer)
        if method != b"GET" or not name.endswith(self.plan["only"]):
            writer.write(b"".join(await self._forward(head, body)))
            await writer.drain()
            return True
        fault = self._next(name)
        event = {"object": name, "fault": fault, "came": time.time(), "answered": None, "bytes": 0}
        self.events.append(event)
        stays = await self._spoilt(fault, head, body, writer, event)
        event["answered"] = time.time()
        return stays

    def _next(self, name: str) -> str:
        number = str(len(self.events))
        fault = self.plan["faults"].get(number) or self.plan["faults"].get("-1", "")
        if not fault and name in self.spared:
            self.spared.discard(name)
        elif not fault and self.draw.random() < self.plan["share"]:
            self.bag = self.bag or self.draw.sample(self.plan["of"], len(self.plan["of"]))
            fault = self.bag.pop()
            self.spared.add(name)
        return fault

    async def _spoilt(self, fault: str, head: bytes, body: bytes, writer: asyncio.StreamWriter, event: dict[str, Any]) -> bool:
        if fault in REASONS:
            status, code = REASONS[fault]
            told = f'<?xml version="1.0"?><Error><Code>{code}</Code></Error>'.encode()
            writer.write(f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(told)}\r\n\r\n".encode() + told)
            await writer.drain()
            return True
        if fault == "timeout":
            await asyncio.sleep(3600)
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault == "latency":
            await asyncio.sleep(self.plan["delay_s"])
        front, content = await self._forward(head, body)
        event["bytes"] = len(content)
        if fault == "truncated":
            content = content[: len(content) // 2]
        if fault == "flipped":
            place = self.draw.randrange(len(content))
            content = content[:place] + bytes([content[place] ^ 1 << self.draw.randrange(8)]) + content[place + 1 :]
        writer.write(front + content)
        await writer.drain()
        return fault != "truncated"

    async def _forward(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            writer.write(head + body)
            await writer.drain()
            return await _message(reader, bodiless=head.startswith(b"HEAD")) or (b"", b"")
        finally:
            writer.close()

    async def _steered(self, name: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        if name == f"{STEER}plan":
            self.set(json.loads(body))
        told = json.dumps(self.events).encode()
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(told)}\r\nConnection: close\r\n\r\n".encode() + told)
        await writer.drain()
        return False


async def _message(reader: asyncio.StreamReader, bodiless: bool = False) -> tuple[bytes, bytes] | None:
    """Read a request or an answer: head and body; None where the connection ends."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:-2])
    if bodiless or head.split(b" ", 2)[1] in (b"204", b"304"):
        return head, b""
    if fields.get(b"transfer-encoding", b"").strip() == b"chunked":
        parts = []
        while True:
            size = await reader.readuntil(b"\r\n")
            chunk = await reader.readexactly(int(size, 16) + 2)
            parts += [size, chunk]
            if int(size, 16) == 0:
                return head, b"".join(parts)
    return head, await reader.readexactly(int(fields.get(b"content-length", b"0")))


async def _main(upstream: int) -> None:
    server = await asyncio.start_server(_Server(upstream).serve, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until who started it is gone
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
