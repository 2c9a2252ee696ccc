# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the life of a ring: when it starts, what a kick and a call do, where it stops and goes on."""

from __future__ import annotations

from ..proto import ProtocolFeature, Request, VirtioFeature, wire
from ..testing.driver import DriverQueue
from ..testing.frontend import BackendGone, Refused
from .check import Check, NotApplicable, Probe
from .connection import Connection, Failed

__all__ = ["CHECKS"]

P = ProtocolFeature


async def _restart(probe: Probe, connection: Connection) -> None:
    """Start the ring of the requests again where it stopped, as QEMU's cont does."""
    index = probe.traffic.queue
    await connection.set_up_ring(index)
    await connection.enable(index, True)


async def a_request_is_completed(probe: Probe) -> None:
    """A request of the device's type comes back, with what it asked for."""
    connection = await probe.running()
    await probe.exchange(connection)


async def a_full_ring_of_requests_is_completed(probe: Probe) -> None:
    """As many requests as the ring has descriptors for, made available at once with one kick; then again, until it wrapped."""
    connection = await probe.running()
    number, request = probe.add(connection)
    each = len(request.readable) + len(request.writable)
    probe.ring(connection).publish()
    probe.ring(connection).kick()
    await probe.completions(connection)
    probe.judge(number, request)
    for _ in range(3):
        await probe.exchange(connection, 64 // each)


async def a_kick_before_set_vring_enable_is_not_lost(probe: Probe) -> None:
    """A request that was kicked while the ring was started and disabled is completed when it is enabled."""
    connection = await probe.negotiated()
    await connection.set_up(enable=False)
    number, request = probe.add(connection)
    connection.kick(probe.ring(connection))
    await connection.settled()
    await connection.enable_all(True)
    if request not in await probe.completions(connection):
        raise Failed("another request than the one that was made was completed")
    probe.judge(number, request)


async def a_request_that_lay_in_the_ring_before_its_start_is_completed(probe: Probe) -> None:
    """Made available before SET_VRING_KICK, and the kick in the descriptor that is passed."""
    connection = await probe.negotiated()
    number, request = probe.add(connection)
    connection.kick(probe.ring(connection))
    await connection.set_up()
    await probe.completions(connection)
    probe.judge(number, request)


async def get_vring_base_gives_the_next_place_in_the_available_ring(probe: Probe) -> None:
    """After three requests the base of the ring is 3; of one that was never used, 0."""
    connection = await probe.running()
    await probe.exchange(connection, 3)
    for index in range(len(connection.queues)):
        base, due = await connection.stop_ring(index), 3 if index == probe.traffic.queue else 0
        if base != due:
            raise Failed(f"ring {index} of {due} requests has base {base}")


async def a_stopped_ring_is_left_alone_until_it_starts_again(probe: Probe) -> None:
    """A request kicked after GET_VRING_BASE stays in the ring, and is completed when the ring was started again."""
    connection = await probe.running()
    await probe.exchange(connection)
    await connection.stop_ring(probe.traffic.queue)
    queue = probe.ring(connection)
    number, request = probe.add(connection)
    connection.kick(queue)
    for _ in range(3):
        await connection.settled()
    if queue.collect():
        raise Failed("a request was completed while the ring was stopped")
    await _restart(probe, connection)
    connection.kick(queue)
    await probe.completions(connection)
    probe.judge(number, request)


async def a_ring_goes_on_at_its_base(probe: Probe) -> None:
    """Stopped and started again at the base that it reported, three times, with requests in between."""
    connection = await probe.running()
    for count in (1, 5, 20, 64):
        for _ in range(count):
            await probe.exchange(connection)
        await connection.stop_ring(probe.traffic.queue)
        await _restart(probe, connection)
    await probe.exchange(connection)


async def a_ring_starts_at_any_base(probe: Probe) -> None:
    """SET_VRING_BASE near the end of 16 bits, as after a migration; the indices go through 0."""
    connection = await probe.negotiated()
    index, old = probe.traffic.queue, probe.ring(connection)
    old.close()
    connection.queues[index] = DriverQueue(connection.memory, old.num, base=65533, event_idx=False, indirect=False)
    connection.bases[index] = 65533
    await connection.set_up()
    for _ in range(8):
        await probe.exchange(connection)
    base = await connection.stop_ring(index)
    if base != 5:
        raise Failed(f"after 8 requests from 65533 on, the base is {base}, not 5")


async def a_ring_may_come_back_elsewhere_in_memory(probe: Probe) -> None:
    """After a stop of all rings they are set up anew, with other addresses and base 0, as a guest's reboot does it."""
    connection = await probe.running()
    await probe.exchange(connection, 3)
    for index in range(len(connection.queues)):
        await connection.stop_ring(index)
    connection.renew_queues()
    await connection.set_up()
    await probe.exchange(connection, 3)


async def all_rings_may_stop_and_go_on_with_everything_said_again(probe: Probe) -> None:
    """Disable and stop all, then features and rings again, as QEMU's stop and cont do it."""
    connection = await probe.running()
    for _ in range(3):
        await probe.exchange(connection)
        await connection.enable_all(False)
        for index in range(len(connection.queues)):
            await connection.stop_ring(index)
        await connection.set_up()
    await probe.exchange(connection)


async def a_call_goes_to_the_descriptor_that_was_set_last(probe: Probe) -> None:
    """SET_VRING_CALL on a running ring, as QEMU does when the guest masks its interrupt: the new one is signalled."""
    connection = await probe.running()
    await probe.exchange(connection)
    queue = probe.ring(connection)
    other = DriverQueue(connection.memory, 8)
    try:
        queue.call_fd, other.call_fd = other.call_fd, queue.call_fd
        await connection.set_fd(Request.SET_VRING_CALL, probe.traffic.queue, queue.call_fd)
        await probe.exchange(connection, 2)
    finally:
        other.close()


async def a_ring_without_a_call_descriptor_is_served(probe: Probe) -> None:
    """SET_VRING_CALL with the invalid-FD flag: the driver looks at the ring, and finds its requests completed."""
    connection = await probe.negotiated()
    await connection.set_up(call=False)
    number, request = probe.add(connection)
    queue = probe.ring(connection)
    connection.kick(queue)
    await connection.polled(queue, 1)
    probe.judge(number, request)


async def a_ring_without_an_error_descriptor_is_served(probe: Probe) -> None:
    """SET_VRING_ERR with the invalid-FD flag is carried out, and the ring works."""
    connection = await probe.negotiated()
    for index in range(len(connection.queues)):
        await connection.set_fd(Request.SET_VRING_ERR, index, -1)
    await connection.set_up()
    await probe.exchange(connection)


async def a_ring_without_a_kick_descriptor_is_polled_or_refused(probe: Probe) -> None:
    """SET_VRING_KICK with the invalid-FD flag asks for polling. It may be refused; but who acks it with 0 has to look."""
    connection = await probe.negotiated()
    await connection.set_features()
    await connection.send_memory()
    for index, queue in enumerate(connection.queues):
        await connection.set_ring(index)
        await connection.set_fd(Request.SET_VRING_CALL, index, queue.call_fd)
        try:
            await connection.set_fd(Request.SET_VRING_KICK, index, -1)
        except (Refused, BackendGone):
            return
    await connection.enable_all(True)
    number, request = probe.add(connection)
    probe.ring(connection).publish()
    probe.transcript.note("the driver makes a request available, without a kick")
    await probe.completions(connection)
    probe.judge(number, request)


async def an_enabled_ring_may_be_enabled_again(probe: Probe) -> None:
    """SET_VRING_ENABLE 1 on a running ring changes nothing; 0 and 1 again loses no request."""
    connection = await probe.running()
    await connection.enable_all(True)
    await probe.exchange(connection)
    await connection.enable_all(False)
    await connection.enable_all(True)
    await probe.exchange(connection, 2)


async def a_front_end_without_protocol_features_need_not_enable(probe: Probe) -> None:
    """SET_FEATURES without PROTOCOL_FEATURES enables all rings at once: no SET_VRING_ENABLE comes, and requests are served."""
    connection = await probe.connect()
    connection.offered = int(probe.offer.features & VirtioFeature.VERSION_1)
    if not connection.offered:
        raise NotApplicable("VERSION_1 is not offered")
    await connection.call(Request.SET_OWNER)
    await connection.set_up()
    await probe.exchange(connection)


async def a_size_other_than_the_largest_works(probe: Probe) -> None:
    """Rings of 8 and of 256 descriptors, on the same connection."""
    connection = await probe.negotiated(size=8)
    await connection.set_up()
    for _ in range(20):
        await probe.exchange(connection)
    for index in range(len(connection.queues)):
        await connection.stop_ring(index)
    connection.size = 256
    connection.renew_queues()
    await connection.set_up()
    await probe.exchange(connection, 50)


async def a_ring_that_was_never_started_has_a_base(probe: Probe) -> None:
    """GET_VRING_BASE of a ring that has only got SET_VRING_BASE answers with that."""
    connection = await probe.negotiated()
    await connection.set_features()
    await connection.request(Request.SET_VRING_BASE, wire.VRING_STATE, {"index": 0, "num": 7})
    base = await connection.stop_ring(0)
    if base != 7:
        raise Failed(f"SET_VRING_BASE said 7, GET_VRING_BASE says {base}")


CHECKS = (
    Check(a_request_is_completed, "Ring states", traffic=True),
    Check(a_full_ring_of_requests_is_completed, "virtio 1.3, 2.7", traffic=True),
    Check(a_kick_before_set_vring_enable_is_not_lost, "Ring states", features=VirtioFeature.PROTOCOL_FEATURES, traffic=True),
    Check(a_request_that_lay_in_the_ring_before_its_start_is_completed, "Ring states", traffic=True),
    Check(get_vring_base_gives_the_next_place_in_the_available_ring, "GET_VRING_BASE", traffic=True),
    Check(a_stopped_ring_is_left_alone_until_it_starts_again, "Ring states", traffic=True),
    Check(a_ring_goes_on_at_its_base, "SET_VRING_BASE; GET_VRING_BASE", traffic=True),
    Check(a_ring_starts_at_any_base, "SET_VRING_BASE", traffic=True),
    Check(a_ring_may_come_back_elsewhere_in_memory, "SET_VRING_ADDR", traffic=True),
    Check(all_rings_may_stop_and_go_on_with_everything_said_again, "Ring states", traffic=True),
    Check(a_call_goes_to_the_descriptor_that_was_set_last, "SET_VRING_CALL; Ring states", traffic=True),
    Check(a_ring_without_a_call_descriptor_is_served, "SET_VRING_CALL", traffic=True),
    Check(a_ring_without_an_error_descriptor_is_served, "SET_VRING_ERR", traffic=True),
    Check(a_ring_without_a_kick_descriptor_is_polled_or_refused, "SET_VRING_KICK", P.REPLY_ACK, traffic=True),
    Check(an_enabled_ring_may_be_enabled_again, "SET_VRING_ENABLE", features=VirtioFeature.PROTOCOL_FEATURES, traffic=True),
    Check(a_front_end_without_protocol_features_need_not_enable, "Ring states", traffic=True),
    Check(a_size_other_than_the_largest_works, "SET_VRING_NUM", traffic=True),
    Check(a_ring_that_was_never_started_has_a_base, "SET_VRING_BASE; GET_VRING_BASE"),
)
