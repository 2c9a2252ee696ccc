"""The socket-offload device: sockets of a guest become sockets of the host, as policy says.

Division of work.  The engine (C, a thread of its own) owns rings and sockets from the moment they are set up and moves all
bytes. It hands over what needs a decision as events; here each is decided by the policy, carried out by a handler, answered.
CONNECT, BIND and DGRAM_DEST get exactly one answer: connected, bound, refused, a destination. A flow that the guest closes
before that comes back as CANCEL, and an answer that crosses it finds nobody, which is fine.

An engine lives as long as a front-end's session. When the front-end goes, its guest's memory goes, and with it every flow.

Log lines of one flow start with the device's name and the flow's number: ``vm1 #17 tcp://10.0.0.5:5432 ...``.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, ClassVar, Final

from .._core import lib
from ..errors import RequestError, UsageError
from . import abi, groups
from . import uri as uris
from .engine import Engine, Event
from .engine_device import EngineDevice
from .errnos import errno_name, guest_errno
from .flows import Flow, ended_text
from .hairpin import HostNamespace, finish
from .handlers import Connection, Handler, Request, StreamFunction
from .handlers.direct import open_datagram
from .handlers.listen import Listeners
from .handlers.named import named_handlers
from .hints import hints_of, pack_hints
from .ipx import IpxNode
from .policy import INITIAL, Decision, Guest, Policy
from .routes import pack_routes, routes_of
from .uri import URI, InetURI, IpxURI, URIError

__all__ = ["OffloadDevice"]

log = logging.getLogger("vhostsock.offload")

_OFFLOAD: Final[int] = lib.VSO_OFFLOAD
_REFUSALS: Final = {"native": lib.VSO_NATIVE, "deny": lib.VSO_DENY}


class OffloadDevice(EngineDevice):
    """Serve one guest's sockets.

    name         who this guest is, in policies (``device``) and in the log
    policy       what is served; without one nothing is (``Policy()`` leaves every socket native)
    pairs        ring pairs, 1..64; the driver spreads its flows over them
    handlers     names for policies (``handler = "..."``): Handler objects, or ``async def f(reader, writer, request)``
    max_flows    sockets at once, listeners included; one more gets ENFILE
    max_pending  connections being made at once; one more gets ENOBUFS
    buffer       bytes that a flow may hold for a host socket that does not take them; also the guest's send window. Up to
                 four times as many for one that has its ring pair to itself, and a quarter of ``buffers`` for all such flows
    buffers      bytes of such buffers over all flows; the flow that would exceed it gets ENOBUFS
    busy_poll    microseconds for which the engine's thread may wait awake where that is faster; 0: not at all

    PolicyError: the policy names a handler that is not there. UsageError: a limit is out of range.
    """

    virtio_id: ClassVar[int] = 39  # of the generic carrier; the fs carrier has QEMU's own (26). See vhostsock/qemu.py

    def __init__(self, *, name: str = "guest", policy: Policy | None = None, pairs: int = 1,
                 handlers: Mapping[str, Handler | StreamFunction] | None = None, max_flows: int = 4096, max_pending: int = 1024,
                 buffer: int = 512 << 10, buffers: int = 128 << 20, busy_poll: int = 50) -> None:  # fmt: skip
        if not 1 <= pairs <= 64:
            raise UsageError(f"{pairs} ring pairs; there can be 1 to 64")
        self.policy = policy or Policy()
        self.num_queues = 2 * pairs
        self._handlers = named_handlers(self.policy, handlers or {})
        limits: dict[str, Any] = {
            "pairs": pairs, "max_flows": max_flows, "buf_alloc": buffer, "buf_total": buffers, "busy_poll": busy_poll,
        }  # fmt: skip
        self._max_pending = max_pending
        self._max_tasks = max_pending + max_flows  # functions that serve connections may outlive them, but not without end
        self._flows: dict[int, Flow] = {}
        self._connecting: set[asyncio.Task[None]] = set()  # that have not answered their request
        self._serving: set[asyncio.Task[None]] = set()  # that serve a connection in this process
        self._listeners = Listeners()
        if self.policy.hairpin:
            limits["hairpin"] = self.policy.hairpin.netns
            HostNamespace().close()  # complains now
        if hints := hints_of(self.policy, name):
            limits["hints"] = pack_hints(hints)
        limits["routes"] = pack_routes(routes_of(self.policy, name))
        self._namespace: HostNamespace | None = None  # of a session, if the policy has hairpin
        table = self.policy.ipx_of(name)
        self._ipx = IpxNode(table) if table else None
        self._ipx_open = False  # the engine has its socket
        super().__init__(name, log, limits)

    async def connected(self) -> None:
        if self.policy.hairpin:
            self._namespace = HostNamespace()
        await super().connected()

    async def disconnected(self) -> None:
        await super().disconnected()
        self._ipx_open = False
        if self._namespace:
            self._namespace.close()
            self._namespace = None

    def _answer(self, event: Event) -> None:
        _ANSWERS[event.kind](self, event)

    def _forget_flows(self) -> None:
        self._flows.clear()

    def _unanswered(self, event: Event) -> None:
        if event.kind == "GROUP" and self._engine:
            self._engine.group(event.handle, _OFFLOAD, errno.ECONNABORTED)
        if event.kind == "DGRAM_DEST" and self._engine:
            self._engine.destination(event.handle, event.payload.decode("ascii", "replace"), b"", _OFFLOAD, errno.ECONNABORTED)
        if event.kind in ("CONNECT", "BIND"):
            assert self._engine is not None
            self._engine.refuse(event.handle, _OFFLOAD, errno.ECONNABORTED)
            flow = self._flows.get(event.handle)
            if flow and not flow.open:
                self._forget(flow)

    # ---- events

    def _say(self, flow: Flow, text: str, *, level: int = logging.INFO) -> None:
        self._log(level, "%s %s", flow, text)

    def _age(self, flow: Flow) -> float:
        return time.monotonic() - flow.since

    def _hello(self, event: Event) -> None:
        hello = abi.HELLO.parse(event.payload)
        self._log(logging.INFO, "driver started, protocol %d.%d, epoch %016x", hello.abi_major, hello.abi_minor, hello.epoch)

    def _connect(self, event: Event) -> None:
        opened = self._opened(event)
        if opened is None:
            return
        flow, wanted = opened
        if not isinstance(flow.uri, InetURI):
            self._refuse(flow, _OFFLOAD, errno.EINVAL, "EINVAL: a socket of IPX is bound, not connected", logging.WARNING)
            return
        local = flow.listener.shown if flow.listener else None
        try:
            local = uris.parse_inet(wanted.local) if wanted.local else local
            decision = self.policy.decide(flow.uri, flow.guest)
        except URIError as error:
            self._refuse(flow, _OFFLOAD, errno.EINVAL, f"EINVAL: {error}", logging.WARNING)
            return
        if decision.action != "offload":
            code = errno_name(decision.errno) + " " if decision.errno else ""
            text = f"{decision.action} {code}({decision.why})"
            level = logging.INFO if decision.errno else logging.DEBUG
            self._refuse(flow, _REFUSALS[decision.action], decision.errno, text, level)
            return
        assert decision.target is not None
        assert self._engine is not None
        bound = partial(self._engine.duplicate, flow.handle) if flow.open else None
        request = Request(flow.uri, decision.target, flow.guest, local, wanted.opts, flow.id, wanted.pid, wanted.comm,
                          partial(self._reset_flow, flow), self._settle, bound=bound,
                          dialed=partial(self._engine.dialed, flow.handle))  # fmt: skip
        if wanted.flags & lib.VSO_OPEN_ADDR_ONLY:
            self._open_datagram(flow, decision, request)
        elif (making := len(self._connecting)) >= self._max_pending or making + len(self._serving) >= self._max_tasks:
            text = f"ENOBUFS: {making} connections are being made, {len(self._serving)} served"
            self._refuse(flow, _OFFLOAD, errno.ENOBUFS, text, logging.WARNING)
        elif decision.hairpin:
            self._connect_hairpin(flow, decision, request)
        else:
            self._start(flow, decision, self._handlers[decision.handler].connect(request))

    def _routed(self, event: Event) -> None:
        """The engine has connected what a rule connects directly (routes.py)."""
        asked = uris.parse_inet(event.payload.decode("ascii"))
        rule = self.policy.rules[event.error]
        flow = Flow(event.handle, event.flow, asked, Guest(self.name), time.monotonic(), open=True)
        self._flows[event.handle] = flow
        self._say(flow, f"offload direct -> {rule.rewrite.text if rule.rewrite else asked} ({rule})")

    def _start(self, flow: Flow, decision: Decision, connecting: Coroutine[Any, Any, Connection]) -> None:
        flow.task = asyncio.get_running_loop().create_task(self._make(flow, decision, connecting))
        self._keep(flow.task, self._connecting)
        flow.task.add_done_callback(partial(self._made, flow))

    def _connect_hairpin(self, flow: Flow, decision: Decision, request: Request) -> None:
        """On one loopback a connection is made at once; only what meets a full backlog takes time."""
        assert self._engine
        assert self._namespace
        assert isinstance(request.target, InetURI)
        try:
            sock = self._namespace.socket_for(request)
            family = sock.family
            try:
                done = self._engine.connect(flow.handle, sock, request.target.sockaddr(family))
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            code = guest_errno(error)
            text = f"offload {decision.target} {errno_name(code)} ({decision.why}): {error.strerror}"
            self._refuse(flow, _OFFLOAD, code, text)
            return
        if not done:
            self._start(flow, decision, finish(request, sock))
            return
        self._drop_listener(flow)
        flow.open, flow.family = True, family
        self._say(flow, f"offload -> {decision.target} ({decision.why})")

    def _opened(self, event: Event) -> tuple[Flow, abi.Open] | None:
        """The flow of a CONNECT or BIND, new or known; None: refused already."""
        assert self._engine is not None
        try:
            wanted = abi.parse_open(event.payload)
            asked = uris.parse(wanted.uri)
        except (RequestError, URIError) as error:
            self._log(logging.WARNING, "#%d EINVAL: %s", event.flow, error)
            self._engine.refuse(event.handle, _OFFLOAD, errno.EINVAL)
            return None
        if not isinstance(asked, InetURI | IpxURI):
            self._log(logging.INFO, "#%d %s native (no address of a guest)", event.flow, asked)
            self._engine.refuse(event.handle, lib.VSO_NATIVE, 0)
            return None
        flow = self._flows.get(event.handle)
        now = time.monotonic()  # a loop's own clock may stand still within one turn of it
        if flow is None:
            netns = wanted.name or str(wanted.netns or INITIAL)
            flow = self._flows[event.handle] = Flow(event.handle, event.flow, asked, Guest(self.name, wanted.uid, netns), now)
        else:  # BIND came before, or a datagram socket connects anew
            flow.uri, flow.since = asked, now
        return flow, wanted

    async def _make(self, flow: Flow, decision: Decision, connecting: Coroutine[Any, Any, Connection]) -> None:
        """Connect, and answer."""
        what = f"offload {decision.handler} -> {decision.target}"
        why = f"({decision.why})"
        try:
            try:
                async with asyncio.timeout(decision.connect_timeout):
                    connection = await connecting
            finally:
                # before the answer: the guest may have it, and the next request here, before this task is seen to be done
                if flow.task:
                    self._connecting.discard(flow.task)
            self._adopt(flow, connection)
        except OSError as error:
            code = guest_errno(error)
            hint = f": {error.strerror}" if flow.uri.transport == "icmp" else ""
            self._refuse(flow, _OFFLOAD, code, f"{what} {errno_name(code)} {why} {1000 * self._age(flow):.1f} ms{hint}")
        except Exception:
            log.exception("%s %s: handler %s failed", self.name, flow, decision.handler)
            self._refuse(flow, _OFFLOAD, errno.ECONNABORTED, f"{what} ECONNABORTED {why}")
        else:
            self._say(flow, f"{what} {why} {1000 * self._age(flow):.1f} ms")

    def _made(self, flow: Flow, task: asyncio.Task[None]) -> None:
        if flow.task is task and task.cancelled():  # not by us: the handler cancelled itself, and the guest waits
            self._refuse(flow, _OFFLOAD, errno.ECONNABORTED, "ECONNABORTED: its handler was cancelled", logging.WARNING)

    def _adopt(self, flow: Flow, connection: Connection) -> None:
        """Hand a connection to the engine. OSError: it did not take it, and the request was answered with that."""
        assert self._engine is not None
        if connection.task:
            self._keep(connection.task, self._serving)
        if flow.uri.transport != "tcp":
            flow.family = connection.family  # of the addresses that it can send to
        try:
            taken = self._engine.connected(flow.handle, connection.detach(), str(connection.local), str(connection.peer))
        except OSError:
            connection.close()
            raise
        if not taken:
            connection.close()
            return
        self._drop_listener(flow)  # bound, then connected: the engine has closed the bound socket
        flow.open, flow.connection, flow.task = True, connection, None

    def _open_datagram(self, flow: Flow, decision: Decision, request: Request) -> None:
        try:
            if decision.hairpin and self._namespace:
                connection = self._namespace.open_datagram(request)
            else:
                connection = open_datagram(request)
            if not flow.open and self._engine and isinstance(request.target, InetURI):
                # what this request asks for: its first datagram need not wait, nor is it lost when CLOSE is right behind it
                address = request.target.sockaddr(connection.family)
                self._engine.destination(flow.handle, str(request.uri), address)
            self._adopt(flow, connection)
        except OSError as error:
            code = guest_errno(error)
            text = f"offload {decision.target} {errno_name(code)} ({decision.why}): {error.strerror}"
            self._refuse(flow, _OFFLOAD, code, text)
            return
        self._say(flow, f"offload datagrams -> {decision.target} ({decision.why})")

    def _destination(self, event: Event) -> None:
        """Another destination of a sendto(): policy decides on each. The driver is told what is refused, and why."""
        assert self._engine is not None
        text = event.payload.decode("ascii", "replace")
        flow = self._flows.get(event.handle)
        address, verdict, code, why = b"", _OFFLOAD, errno.EINVAL, "no such address"
        try:
            if flow is not None:
                asked = uris.parse(text)
                if str(asked) != text and isinstance(asked, IpxURI):  # the engine reads it, and knows one text for one address
                    raise URIError(f"write {asked}")
                address, verdict, code, why = self._decide_destination(flow, asked)
        except (URIError, OSError) as error:
            code, why = guest_errno(error) if isinstance(error, OSError) else errno.EINVAL, str(error)
        self._engine.destination(event.handle, text, address, verdict, code)
        outcome = "native" if verdict == lib.VSO_NATIVE else f"refused, {errno_name(code)}" if code else "offload"
        self._log(logging.INFO if code else logging.DEBUG, "#%d datagrams to %r %s (%s)", event.flow, text, outcome, why)

    def _decide_destination(self, flow: Flow, asked: URI) -> tuple[bytes, int, int, str]:
        """The socket address, or the verdict and errno that refuse it, and why."""
        if isinstance(flow.uri, IpxURI) and isinstance(asked, IpxURI) and self._ipx:
            return self._ipx.decide(asked, flow.guest, self.policy)
        if not isinstance(asked, InetURI) or asked.transport != flow.uri.transport:
            return b"", _OFFLOAD, errno.EAFNOSUPPORT, f"an address of {asked.scheme}"
        if address := self._client_of_its_port(flow, asked):
            return address, _OFFLOAD, 0, "a client of its port"
        decision = self.policy.decide(asked, flow.guest)
        if decision.action != "offload":
            return b"", _REFUSALS[decision.action], decision.errno, decision.why
        if not isinstance(decision.target, InetURI):
            return b"", _OFFLOAD, errno.ENETUNREACH, f"{decision.target} takes no datagrams, {decision.why}"
        return decision.target.sockaddr(flow.family or None), _OFFLOAD, 0, decision.why

    def _client_of_its_port(self, flow: Flow, asked: InetURI) -> bytes | None:
        """Of servers that share a port each may answer the others' clients: the host's kernel chooses which gets what."""
        assert self._engine is not None
        if flow.listener is None or self._listeners.holders(flow.listener.host) < 2:
            return None
        for other in self._flows.values():
            if other.listener and other.listener.host == flow.listener.host and other is not flow:
                address = self._engine.client(other.handle, str(asked))
                if address:
                    return address
        return None

    def _bind(self, event: Event) -> None:
        opened = self._opened(event)
        if opened is None:
            return
        flow, wanted = opened
        assert self._engine is not None
        if isinstance(flow.uri, IpxURI):
            self._bind_ipx(flow, flow.uri, self._engine)
            return
        v6only = bool(wanted.option(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
        try:
            decision = self.policy.decide_bind(flow.uri, flow.guest, v6only=v6only)
            if decision.action != "offload":
                self._refuse(flow, lib.VSO_NATIVE, 0, f"native ({decision.why})", level=logging.DEBUG)
                return
            listener = self._listeners.bind(
                flow.uri, decision, v6only=v6only,
                reuseaddr=bool(wanted.option(socket.SOL_SOCKET, socket.SO_REUSEADDR)),
                reuseport=bool(wanted.option(socket.SOL_SOCKET, socket.SO_REUSEPORT)),
                private=self._namespace.make if decision.hairpin and self._namespace else None,
            )  # fmt: skip
        except URIError as error:
            self._refuse(flow, _OFFLOAD, errno.EINVAL, f"EINVAL: {error}", level=logging.WARNING)
            return
        except OSError as error:
            code = guest_errno(error)
            text = f"publish as {decision.host} {errno_name(code)} ({decision.why})"
            self._refuse(flow, _OFFLOAD, code, text, logging.WARNING)
            return
        flow.listener, flow.publish = listener, decision.rule
        if isinstance(listener.host, InetURI):
            flow.family = listener.host.family  # of the addresses that a datagram socket can send to
        try:
            flow.open = self._engine.bound(flow.handle, listener.sock.detach(), str(listener.shown))
        except OSError as error:
            self._say(flow, f"publish as {listener.host} {errno_name(error.errno or errno.EIO)}", level=logging.WARNING)
        if flow.open:
            self._say(flow, f"published as {listener.host} ({decision.why})")
        else:
            self._forget(flow)

    def _group(self, event: Event) -> None:
        """A datagram server joins a multicast group or leaves it: on the host where its rule names the group, else natively."""
        assert self._engine is not None
        text, join = event.payload.decode("ascii", "replace"), event.error == lib.VSO_GROUP_JOIN
        flow = self._flows.get(event.handle)
        verdict, code, why = lib.VSO_NATIVE, 0, "no publish rule names it for this socket"
        try:
            asked = uris.parse_inet(text)
            served = flow and groups.named(flow.publish, asked.plain, flow.family) and (join or asked.plain in flow.groups)
            if flow and flow.publish and served:
                verdict, why = _OFFLOAD, str(flow.publish)
                with self._engine.duplicate(flow.handle) as sock:
                    groups.change(sock, asked, flow.publish.interface, join=join)
                (flow.groups.add if join else flow.groups.discard)(asked.plain)
        except (URIError, OSError) as error:
            code = guest_errno(error) if isinstance(error, OSError) else errno.EINVAL
            verdict, why = _OFFLOAD, f"{why}: {error}"
        self._engine.group(event.handle, verdict, code)
        outcome = "native" if verdict == lib.VSO_NATIVE else errno_name(code) if code else "on the host"
        self._log(logging.INFO, "#%d %s group %r: %s (%s)", event.flow, "joins" if join else "leaves", text, outcome, why)

    def _bind_ipx(self, flow: Flow, asked: IpxURI, engine: Engine) -> None:
        if not self._ipx or flow.guest.netns != INITIAL:
            why = f"no [[ipx]] of {self.policy.file} names this device" if not self._ipx else "another namespace"
            self._refuse(flow, lib.VSO_NATIVE, 0, f"native ({why})", level=logging.DEBUG)
            return
        text = ""
        try:
            self._ipx.check_local(asked)
            if not self._ipx_open:
                engine.ipx_open(self._ipx.socket(), self._ipx.network, self._ipx.peers)
                self._ipx_open = True
            text = engine.ipx_bound(flow.handle, asked.socket) or ""
        except OSError as error:
            code = guest_errno(error)
            self._refuse(flow, _OFFLOAD, code, f"{errno_name(code)} ({self._ipx}): {error.strerror}", logging.WARNING)
            return
        flow.open = bool(text)
        if flow.open:
            self._say(flow, f"bound as {text}, over {self._ipx.listen} ({self._ipx})")
        else:
            self._forget(flow)

    def _cancel(self, event: Event) -> None:
        flow = self._flows.get(event.handle)
        if flow is None:
            return
        task, flow.task = flow.task, None
        if task:
            task.cancel()
            self._say(flow, "cancelled by the guest")
        if not flow.open:
            self._forget(flow)

    def _accepted(self, event: Event) -> None:
        flow = self._flows.get(event.handle)
        if flow:
            self._say(flow, f"accepted {event.payload.decode('ascii', 'replace')}")

    def _ended(self, event: Event) -> None:
        flow = self._flows.get(event.handle)
        if flow is None:  # one that the device announced
            number = event.flow & ~lib.VSO_FLOW_DEVICE
            self._log(logging.INFO, "accepted connection #%d %s", number, ended_text(event, None))
            return
        age = self._age(flow)
        self._say(flow, f"not published any more, {age:.1f} s" if flow.listener else ended_text(event, age))
        if flow.connection and flow.connection.ended:
            flow.connection.ended(event.error)
        self._forget(flow)

    # ---- helpers

    def _refuse(self, flow: Flow, verdict: int, code: int, text: str, level: int = logging.INFO) -> None:
        if self._engine:
            self._engine.refuse(flow.handle, verdict, code)
        self._say(flow, text, level=level)
        flow.task = None
        if not flow.open:
            self._forget(flow)

    def _reset_flow(self, flow: Flow, error: int) -> None:
        if self._engine:
            self._engine.reset(flow.handle, error)

    def _forget(self, flow: Flow) -> None:
        self._drop_listener(flow)
        self._flows.pop(flow.handle, None)

    def _drop_listener(self, flow: Flow) -> None:
        if flow.listener:
            self._listeners.ended(flow.listener)
            flow.listener = None


_ANSWERS: Final[Mapping[str, Callable[[OffloadDevice, Event], None]]] = {
    "HELLO": OffloadDevice._hello,
    "CONNECT": OffloadDevice._connect,
    "BIND": OffloadDevice._bind,
    "DGRAM_DEST": OffloadDevice._destination,
    "GROUP": OffloadDevice._group,
    "CANCEL": OffloadDevice._cancel,
    "ACCEPTED": OffloadDevice._accepted,
    "ENDED": OffloadDevice._ended,
    "ROUTED": OffloadDevice._routed,
    "BROKEN": OffloadDevice._broken,
}
