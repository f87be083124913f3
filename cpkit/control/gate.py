"""A TCP listener in front of ZeroMQ that limits what a peer without a key can make rank 0 hold.

Until a peer is authenticated, ZeroMQ stores what it sends, up to the size limit of messages, and it
accepts connections until no file descriptor is free. Therefore ZeroMQ has only a Unix socket here.

    peer ── TCP ──▶ gate ── Unix socket ──▶ ZeroMQ
             greeting, HELLO, INITIATE: checked by size, and forwarded when complete
             all other bytes: forwarded, because ZeroMQ reads no further without a valid key

ZeroMQ ends the process when it accepts a connection and no file descriptor is free. Therefore the
gate disconnects peers while few are free, the last ones with a descriptor that is reserved for it.

While `MAX_UNKNOWN` peers have not completed their handshake, a new one replaces the oldest one. A
valid client needs milliseconds for its handshake, so other peers do not keep it out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections import deque
from pathlib import Path
from typing import BinaryIO, cast

from cpkit.os_errors import SPARE_DESCRIPTORS, lacks_descriptors, require_descriptors

MAX_UNKNOWN = 64
_HANDSHAKE_S = 5.0
_BACKLOG = 1024
# Sizes of ZMTP 3 (RFC 23) and CURVE (RFC 25), in bytes.
_SIGNATURE, _GREETING = 10, 64
_MECHANISM = b"CURVE".ljust(20, b"\0")
_COMMAND, _LONG_COMMAND = 0x04, 0x06  # flags of a frame
_HELLO = 200
_MAX_INITIATE = 1024  # 257, and metadata with an identity of up to 255
_CHUNK = 1 << 16
_SPARE = SPARE_DESCRIPTORS // 2  # fewer than the server needs to reject a client with a reason
_log = logging.getLogger("cpkit")


def _any_file() -> BinaryIO:
    return Path(os.devnull).open("rb")


class Gate:
    """Forwards connections to a free TCP port of `address` to the Unix socket `path`, in a thread.

    `self.endpoint` is the ZeroMQ address of the port.
    """

    def __init__(self, address: str, path: str) -> None:
        self._path = path
        self._listener = socket.create_server((address, 0), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._reserve = _any_file()
        self.endpoint = "tcp://{}:{}".format(*self._listener.getsockname())
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        # Those whose handshake is incomplete, oldest first.
        self._unknown: deque[asyncio.Task[None]] = deque()
        self._accepting = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._run, name="cpkit gate", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and forward what ZeroMQ has sent. Call it after ZeroMQ has closed."""
        self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join(timeout=2)

    def _run(self) -> None:
        with contextlib.closing(self._loop), self._listener:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._accepting)
            remaining = [*self._connections]  # a copy: those that end now leave the set first
            if remaining:
                self._loop.run_until_complete(asyncio.wait(remaining, timeout=1))
        self._reserve.close()

    async def _accept(self) -> None:
        while True:
            try:
                peer, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:  # no descriptor is free, or the peer has disconnected
                _log.warning("cannot accept a connection: %s", error)
                if lacks_descriptors(error):
                    self._turn_away()
                await asyncio.sleep(0.1)
                continue
            if len(self._unknown) >= MAX_UNKNOWN:
                self._unknown.popleft().cancel()
            task = self._loop.create_task(self._serve(peer))
            self._connections.add(task)
            self._unknown.append(task)
            task.add_done_callback(self._forget)
            await asyncio.sleep(0)  # an accept that does not wait does not let other tasks run

    def _turn_away(self) -> None:
        """Disconnect the next peer, which would otherwise wait for an answer until its deadline."""
        self._reserve.close()
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        with contextlib.suppress(OSError):
            self._reserve = _any_file()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        with contextlib.suppress(ValueError):
            self._unknown.remove(task)

    async def _serve(self, peer: socket.socket) -> None:
        """Forward one connection in both directions until either end closes it."""
        replies: asyncio.Task[None] | None = None
        with contextlib.suppress(OSError, ValueError), peer, socket.socket(socket.AF_UNIX) as inner:
            peer.setblocking(False)
            inner.setblocking(False)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                async with asyncio.timeout(_HANDSHAKE_S):
                    signature = await self._receive_signature(peer)
                    require_descriptors(_SPARE)
                    await self._loop.sock_connect(inner, self._path)
                    replies = self._loop.create_task(self._forward(inner, peer))
                    await self._loop.sock_sendall(inner, signature)
                    await self._forward_handshake(peer, inner)
                self._unknown.remove(cast("asyncio.Task[None]", asyncio.current_task()))
                await self._forward(peer, inner)
            finally:
                if replies is not None:
                    replies.cancel()

    async def _receive_signature(self, peer: socket.socket) -> bytes:
        """Return the start of a greeting. Raises ValueError for any other protocol."""
        signature = await self._receive(peer, _SIGNATURE)
        if (signature[0], signature[-1]) != (0xFF, 0x7F):
            raise ValueError("this is not ZeroMQ's protocol")
        return signature

    async def _forward_handshake(self, peer: socket.socket, inner: socket.socket) -> None:
        """Forward the rest of a CURVE handshake. Raises ValueError for any other mechanism."""
        greeting = await self._receive(peer, _GREETING - _SIGNATURE)
        if greeting[0] < 3 or greeting[2 : 2 + len(_MECHANISM)] != _MECHANISM:
            raise ValueError("this is not a CURVE handshake")
        await self._loop.sock_sendall(inner, greeting)
        for least, most in ((_HELLO, _HELLO), (0, _MAX_INITIATE)):
            header = await self._receive(peer, 2)
            if header[0] == _LONG_COMMAND:
                header += await self._receive(peer, 7)
            size = int.from_bytes(header[1:])
            if header[0] not in (_COMMAND, _LONG_COMMAND) or not least <= size <= most:
                raise ValueError("this is not a command of a CURVE handshake")
            await self._loop.sock_sendall(inner, header + await self._receive(peer, size))

    async def _receive(self, source: socket.socket, count: int) -> bytes:
        """Return `count` bytes. Raises ConnectionError when the connection ends before them."""
        data = b""
        while len(data) < count:
            more = await self._loop.sock_recv(source, count - len(data))
            if not more:
                raise ConnectionError("the connection has ended")
            data += more
        return data

    async def _forward(self, source: socket.socket, target: socket.socket) -> None:
        """Copy bytes until the source ends; then end the target, whose other direction ends too."""
        with contextlib.suppress(OSError):
            while data := await self._loop.sock_recv(source, _CHUNK):
                await self._loop.sock_sendall(target, data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
