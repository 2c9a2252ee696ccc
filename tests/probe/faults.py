# SPDX-License-Identifier: BSD-3-Clause
"""One fault for each check of the probe: ``FAULTS`` says which, and what the probe's verdict on it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import Callable

from tests.probe.relay import Fault, Message, Relay, Step
from vhostsock import Chain, Queue
from vhostsock.devices.echo import Echo
from vhostsock.probe.check import Verdict
from vhostsock.proto import ProtocolFeature, VirtioFeature, wire
from vhostsock.proto import Request as R

__all__ = ["FAULTS"]

P, V = ProtocolFeature, VirtioFeature
FAIL, DIED, HUNG = Verdict.FAIL, Verdict.DIED, Verdict.HUNG

# ---- faults of one message


def on(request: int, step: Step, when: Callable[[Message], bool] = lambda message: True) -> Step:
    """``step`` for those messages of this kind, all others pass."""
    return lambda relay, message: step(relay, message) if message.request == request and when(message) else message


def refuse(relay: Relay, message: Message) -> None:
    relay.ack(message, 1)


def accept(relay: Relay, message: Message) -> None:
    relay.ack(message, 0)


def swallow(relay: Relay, message: Message) -> None:
    pass


def close(relay: Relay, message: Message) -> None:
    relay.close()


def die(relay: Relay, message: Message) -> None:
    relay.die()


def ack_as_well(relay: Relay, message: Message) -> Message:
    relay.reply(message.request, wire.U64.build(0))
    return message


def body(data: bytes) -> Step:
    return lambda relay, message: message.with_body(data)


def u64(value: int) -> Step:
    return body(wire.U64.build(value))


def base(change: Callable[[int], int]) -> Step:
    """GET_VRING_BASE is answered with another base."""
    return on(R.GET_VRING_BASE, lambda _, m: m.with_body(struct.pack("=II", m.words[0], change(m.words[1]) & 0xFFFFFFFF)))


def after(count: int, step: Step) -> Step:
    """The first ``count`` go well."""

    def counted(relay: Relay, message: Message) -> Message | None:
        key = f"after {message.request}"
        relay.memory[key] = relay.memory.get(key, 0) + 1
        return step(relay, message) if relay.memory[key] > count else message

    return counted


def without(bit: int) -> Step:
    """SET_FEATURES arrives without a bit."""
    return on(R.SET_FEATURES, lambda _, message: message.with_body(wire.U64.build(message.u64 & ~bit)))


def with_bit_30(relay: Relay, message: Message) -> Message:
    return message.with_body(wire.U64.build(message.u64 | V.PROTOCOL_FEATURES))


def drained(relay: Relay, message: Message) -> Message:
    """The kick that is in the descriptor is lost."""
    for fd in message.fds:
        relay.kept.append(os.dup(fd))
    for fd in relay.kept:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
    return message


def kept_kick(relay: Relay, message: Message) -> Message:
    """Remembers the descriptor of SET_VRING_KICK, and takes what is in it at SET_VRING_ENABLE."""
    if message.request == R.SET_VRING_KICK:
        relay.kept += map(os.dup, message.fds)
    return drained(relay, message) if message.request == R.SET_VRING_ENABLE else message


def leak(relay: Relay, message: Message) -> Message:
    relay.target.leaked += map(os.dup, message.fds)
    return dataclass_without_fds(message)


def dataclass_without_fds(message: Message) -> Message:
    return Message(message.request, message.flags, message.body, [])


def no_offsets(relay: Relay, message: Message) -> Message:
    table = wire.MEM_TABLE.parse(message.body)
    for region in table.regions:
        region.offset = 0
    return message.with_body(wire.MEM_TABLE.build(table))


def unsorted(message: Message) -> bool:
    places = [region.gpa for region in wire.MEM_TABLE.parse(message.body).regions]
    return places != sorted(places)


def disable_instead(relay: Relay, message: Message) -> Message:
    """SET_VRING_ENABLE 1 of a ring that is enabled disables it."""
    index, on = message.words
    before, relay.memory[f"enabled {index}"] = relay.memory.get(f"enabled {index}", 0), on
    return message.with_body(struct.pack("=II", index, 0)) if before and on else message


def others_index(message: Message) -> bool:
    return message.words[0] > 8


def ring_stays(relay: Relay, message: Message) -> None:
    relay.reply(R.GET_VRING_BASE, struct.pack("=II", message.words[0], 1))


def index_and_base(relay: Relay, message: Message) -> None:
    relay.reply(R.GET_VRING_BASE, struct.pack("=II", message.words[0], 7))


def nofd(message: Message) -> bool:
    return bool(message.u64 & 0x100)


def late(step: Step) -> Step:
    """After the ring has been started."""

    def watched(relay: Relay, message: Message) -> Message | None:
        if message.request == R.SET_VRING_ENABLE:
            relay.memory["started"] = 1
        return step(relay, message) if relay.memory.get("started") else message

    return watched


def data_anyway(relay: Relay, message: Message) -> Message:
    """GET_CONFIG that was refused is answered with zeros."""
    return message if message.body else message.with_body(struct.pack("=III", 0xFFFF_FFF0, 64, 0) + bytes(64))


def out_of(relay: Relay, message: Message) -> Message | None:
    """GET_CONFIG outside of all bounds is answered with zeros."""
    offset, size = message.words
    if offset < 256:
        return message
    relay.reply(R.GET_CONFIG, struct.pack("=III", offset, size, 0) + bytes(size))
    return None


def broken_ring(relay: Relay, message: Message) -> Message:
    """Dies when the sound back-end has signalled a broken ring."""
    if message.request == R.SET_VRING_ERR:
        relay.kept += map(os.dup, message.fds)
    for fd in relay.kept if message.request == R.GET_VRING_BASE else ():
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            continue
        relay.die()
    return message


# ---- features that the device does not offer, carried out by the relay, badly


def inflight(length: int, mark: bool) -> Step:
    def step(relay: Relay, message: Message) -> Message | None:
        if message.request == R.GET_INFLIGHT_FD:
            fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
            try:
                os.ftruncate(fd, length)
                relay.reply(R.GET_INFLIGHT_FD, struct.pack("=QQHH4x", length, 0, 1, 64), (fd,))
            finally:
                os.close(fd)
        elif message.request == R.SET_INFLIGHT_FD:
            if mark:
                os.pwrite(message.fds[0], b"\1", 16)
            relay.ack(message, 0)
        else:
            return message
        return None

    return step


def no_log(relay: Relay, message: Message) -> Message | None:
    if message.request == R.SET_LOG_BASE:
        relay.reply(R.SET_LOG_BASE, wire.U64.build(0))
        return None
    if message.request == R.SET_VRING_ADDR:
        return message.with_body(message.body[:4] + bytes(4) + message.body[8:])
    return without(V.LOG_ALL)(relay, message)


def no_state(relay: Relay, message: Message) -> Message | None:
    if message.request != R.SET_DEVICE_STATE_FD:
        return message
    relay.reply(R.SET_DEVICE_STATE_FD, wire.U64.build(0x101))
    return None


# ---- devices whose fault is in the rings


class Silent(Echo):
    """Answers nothing."""

    async def handle(self, queue: Queue, chain: Chain) -> None:
        pass


class Forgetful(Echo):
    """Completes thirty requests."""

    stop_timeout = 0.01

    async def handle(self, queue: Queue, chain: Chain) -> None:
        if self.answered >= 30:
            await asyncio.get_running_loop().create_future()
        await super().handle(queue, chain)


class FirstBuffer(Echo):
    """Takes it that a request has one buffer of 14 bytes to read, and so answers wrongly where it is cut at 7."""

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(chain.read(7))


class WaitsForKick(Echo):
    """Looks into a ring only after a kick."""

    def queue_started(self, queue: Queue) -> None:
        loop = asyncio.get_running_loop()

        def kicked() -> None:
            loop.remove_reader(queue.kick_fd)
            super(WaitsForKick, self).queue_started(queue)

        loop.add_reader(queue.kick_fd, kicked)

    def queue_stopped(self, queue: Queue) -> None:
        if queue.plane is None:
            asyncio.get_running_loop().remove_reader(queue.kick_fd)
        super().queue_stopped(queue)


class Backwards(Echo):
    """Completes what comes together from its end, one after the other."""

    async def handle(self, queue: Queue, chain: Chain) -> None:
        self.answered += 1
        await asyncio.sleep((10 - self.answered) * 0.02)
        chain.write(chain.read())


class ConfigFromTheStart(Echo):
    """Gives the beginning of the config space whatever the offset is."""

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes(range(1, 1 + size))


# ---- the table

MESSAGES: dict[str, tuple[Verdict, Fault]] = {
    # negotiation
    "features_are_offered_before_anything_else_is_said": (FAIL, Fault(answer=on(R.GET_FEATURES, body(bytes(4))))),
    "protocol_features_are_negotiated_before_set_features": (FAIL, Fault(on(R.GET_PROTOCOL_FEATURES, close))),
    "protocol_bits_come_with_those_they_rest_on": (FAIL, Fault(protocol=P.GET_VRING_BASE_INFLIGHT)),
    "all_offered_features_may_be_acked": (FAIL, Fault(on(R.SET_FEATURES, refuse))),
    "no_features_but_version_1_may_be_acked": (FAIL, Fault(on(R.SET_FEATURES, refuse, lambda m: not m.u64 & V.EVENT_IDX))),
    "the_number_of_queues_is_told": (FAIL, Fault(answer=on(R.GET_QUEUE_NUM, u64(0)))),
    "reset_owner_is_borne": (DIED, Fault(on(R.RESET_OWNER, die))),
    "a_status_reads_back": (FAIL, Fault(answer=on(R.GET_STATUS, u64(0)))),
    "a_channel_of_its_own_is_taken": (FAIL, Fault(on(R.SET_BACKEND_REQ_FD, after(1, refuse)))),
    # answers
    "a_request_that_asks_for_an_ack_gets_one_and_it_is_zero": (FAIL, Fault(answer=on(R.SET_VRING_ENABLE, u64(1)))),
    "a_request_that_asks_for_no_ack_gets_none": (FAIL, Fault(on(R.SET_VRING_NUM, ack_as_well))),
    "a_session_without_reply_ack_is_silent_too": (FAIL, Fault(on(R.SET_OWNER, ack_as_well))),
    "a_message_with_a_reply_of_its_own_is_answered_once": (
        FAIL,
        Fault(on(R.GET_FEATURES, ack_as_well, lambda m: bool(m.flags & 8))),
    ),
    "a_base_that_is_asked_for_with_need_reply_comes_once": (FAIL, Fault(answer=on(R.GET_VRING_BASE, ack_as_well))),
    "a_request_that_cannot_be_carried_out_is_acked_with_non_zero": (
        FAIL,
        Fault(lambda r, m: accept(r, m) if m.request in (R.SET_VRING_ADDR, R.SET_VRING_KICK) else m),
    ),
    "messages_may_arrive_in_pieces": (FAIL, Fault(whole_reads=True)),
    "messages_may_arrive_at_once": (HUNG, Fault(one_message=True)),
    # memory
    "a_table_of_eight_regions_is_taken": (FAIL, Fault(on(R.SET_MEM_TABLE, refuse, lambda m: m.words[0] > 7))),
    "a_table_replaces_the_one_before": (HUNG, Fault(on(R.SET_MEM_TABLE, after(1, accept)))),
    "memory_behind_an_offset_of_its_file_is_found": (HUNG, Fault(on(R.SET_MEM_TABLE, no_offsets))),
    "the_regions_of_a_table_may_come_in_any_order": (FAIL, Fault(on(R.SET_MEM_TABLE, refuse, unsorted))),
    "memory_is_added_and_removed_by_slots": (FAIL, Fault(on(R.REM_MEM_REG, refuse))),
    "a_removed_region_may_be_added_again": (FAIL, Fault(on(R.REM_MEM_REG, accept))),
    "as_many_slots_as_promised_can_be_filled": (FAIL, Fault(on(R.ADD_MEM_REG, after(100, refuse)))),
    "a_region_that_is_not_there_cannot_be_removed": (FAIL, Fault(on(R.REM_MEM_REG, accept))),
    # config
    "as_much_of_the_config_space_comes_as_was_asked_for": (FAIL, Fault(answer=on(R.GET_CONFIG, body(bytes(13))))),
    "a_part_of_the_config_space_is_that_part": (FAIL, Fault(device=ConfigFromTheStart)),
    "config_reads_outside_of_all_bounds_fail": (FAIL, Fault(on(R.GET_CONFIG, out_of))),
    # state
    "a_reset_device_starts_from_the_beginning": (FAIL, Fault(on(R.RESET_DEVICE, close))),
    "a_reset_device_leaves_its_rings_alone": (FAIL, Fault(on(R.RESET_DEVICE, swallow))),
    "the_inflight_buffer_has_room_for_all_queues": (FAIL, Fault(inflight(1024, False), protocol=P.INFLIGHT_SHMFD)),
    "requests_are_served_with_an_inflight_buffer": (FAIL, Fault(inflight(2048, True), protocol=P.INFLIGHT_SHMFD)),
    "what_the_device_writes_is_in_the_dirty_log": (FAIL, Fault(no_log, protocol=P.LOG_SHMFD, features=V.LOG_ALL)),
    "the_state_of_a_stopped_device_can_be_saved_and_loaded": (FAIL, Fault(no_state, protocol=P.DEVICE_STATE)),
    # connections
    "a_front_end_may_come_again": (HUNG, Fault(one_session=True)),
    "a_session_knows_nothing_of_the_one_before": (FAIL, Fault(answer=base(lambda value: 3))),
    "a_second_front_end_does_not_disturb_the_first": (FAIL, Fault(drops_first=True)),
    "what_a_session_opened_is_closed_with_it": (FAIL, Fault(on(R.SET_VRING_ERR, leak))),
}

RINGS: dict[str, tuple[Verdict, Fault]] = {
    "a_request_is_completed": (FAIL, Fault(device=Silent)),
    "a_full_ring_of_requests_is_completed": (HUNG, Fault(device=Forgetful)),
    "a_kick_before_set_vring_enable_is_not_lost": (HUNG, Fault(kept_kick, device=WaitsForKick)),
    "a_request_that_lay_in_the_ring_before_its_start_is_completed": (
        HUNG,
        Fault(on(R.SET_VRING_KICK, drained), device=WaitsForKick),
    ),
    "get_vring_base_gives_the_next_place_in_the_available_ring": (FAIL, Fault(answer=base(lambda value: value + 1))),
    "a_stopped_ring_is_left_alone_until_it_starts_again": (FAIL, Fault(on(R.GET_VRING_BASE, ring_stays))),
    "a_ring_goes_on_at_its_base": (HUNG, Fault(answer=base(lambda value: value + 1))),
    "a_ring_starts_at_any_base": (HUNG, Fault(on(R.SET_VRING_BASE, body(bytes(8))))),
    "a_ring_may_come_back_elsewhere_in_memory": (HUNG, Fault(on(R.SET_VRING_ADDR, after(1, swallow)))),
    "all_rings_may_stop_and_go_on_with_everything_said_again": (HUNG, Fault(on(R.SET_VRING_KICK, after(1, accept)))),
    "a_call_goes_to_the_descriptor_that_was_set_last": (HUNG, Fault(late(on(R.SET_VRING_CALL, accept)))),
    "a_ring_without_a_call_descriptor_is_served": (FAIL, Fault(on(R.SET_VRING_CALL, refuse, nofd))),
    "a_ring_without_an_error_descriptor_is_served": (FAIL, Fault(on(R.SET_VRING_ERR, refuse, nofd))),
    "a_ring_without_a_kick_descriptor_is_polled_or_refused": (HUNG, Fault(on(R.SET_VRING_KICK, accept, nofd))),
    "an_enabled_ring_may_be_enabled_again": (HUNG, Fault(on(R.SET_VRING_ENABLE, disable_instead))),
    "a_front_end_without_protocol_features_need_not_enable": (HUNG, Fault(on(R.SET_FEATURES, with_bit_30))),
    "a_size_other_than_the_largest_works": (FAIL, Fault(on(R.SET_VRING_NUM, body(struct.pack("=II", 0, 64))))),
    "a_ring_that_was_never_started_has_a_base": (FAIL, Fault(answer=base(lambda value: 0))),
    "a_request_may_be_cut_into_descriptors_anywhere": (FAIL, Fault(device=FirstBuffer)),
    "requests_in_indirect_tables_are_completed": (HUNG, Fault(without(V.INDIRECT_DESC))),
    "an_indirect_table_may_be_longer_than_a_few": (HUNG, Fault(without(V.INDIRECT_DESC))),
    "event_indices_lose_no_kick_and_no_call": (HUNG, Fault(without(V.EVENT_IDX))),
    "a_packed_ring_completes_requests": (HUNG, Fault(device=Forgetful)),
    "a_packed_ring_goes_on_at_its_base": (FAIL, Fault(answer=base(lambda value: value ^ 0x8000_8000))),
    "a_packed_ring_takes_indirect_tables": (HUNG, Fault(without(V.INDIRECT_DESC))),
    "requests_are_used_in_the_order_in_which_they_were_made": (
        FAIL,
        Fault(without(V.IN_ORDER), device=Backwards, features=V.IN_ORDER),
    ),
}

HOSTILE: dict[str, tuple[Verdict, Fault]] = {
    "a_ring_that_does_not_exist_is_refused": (FAIL, Fault(on(R.SET_VRING_NUM, accept, others_index))),
    "a_base_of_a_ring_that_does_not_exist_is_not_told": (FAIL, Fault(on(R.GET_VRING_BASE, index_and_base, others_index))),
    "descriptors_for_rings_that_do_not_exist_are_refused": (FAIL, Fault(on(R.SET_VRING_CALL, accept, others_index))),
    "impossible_ring_sizes_are_refused": (
        FAIL,
        Fault(lambda r, m: accept(r, m) if m.request in (R.SET_VRING_NUM, R.SET_VRING_KICK) else m),
    ),
    "rings_outside_of_memory_are_borne": (DIED, Fault(on(R.SET_VRING_KICK, die))),
    "a_kick_of_a_ring_that_is_not_set_up_is_borne": (DIED, Fault(on(R.SET_VRING_ENABLE, die))),
    "features_that_were_not_offered_are_refused": (FAIL, Fault(on(R.SET_FEATURES, accept))),
    "requests_that_nobody_knows_are_borne": (DIED, Fault(on(77, die))),
    "other_versions_are_borne": (DIED, Fault(lambda r, m: m if m.flags & 7 == 1 else r.die())),
    "payloads_that_are_too_short_are_borne": (DIED, Fault(on(R.SET_VRING_ADDR, die, lambda m: len(m.body) < 40))),
    "payloads_that_are_too_long_are_borne": (DIED, Fault(on(R.SET_VRING_NUM, die, lambda m: len(m.body) > 8))),
    "a_front_end_that_leaves_within_a_message_is_borne": (DIED, Fault(dies_inside=True)),
    "impossible_memory_is_refused": (FAIL, Fault(on(R.SET_MEM_TABLE, accept))),
    "tables_that_contradict_themselves_are_refused": (FAIL, Fault(on(R.SET_MEM_TABLE, accept))),
    "memory_that_ends_before_its_region_does_not_kill": (DIED, Fault(on(R.SET_MEM_TABLE, die))),
    "descriptors_of_the_wrong_kind_are_borne": (FAIL, Fault(on(R.SET_MEM_TABLE, accept))),
    "a_region_over_another_is_refused": (FAIL, Fault(on(R.ADD_MEM_REG, after(1, accept)))),
    "a_region_without_a_descriptor_is_refused": (FAIL, Fault(on(R.ADD_MEM_REG, accept))),
    "config_accesses_of_absurd_size_are_borne": (DIED, Fault(on(R.SET_CONFIG, die))),
    "a_log_that_does_not_lie_in_its_file_does_not_kill": (DIED, Fault(on(R.SET_LOG_BASE, die), protocol=P.LOG_SHMFD)),
    "an_inflight_buffer_of_absurd_size_is_not_made": (DIED, Fault(on(R.GET_INFLIGHT_FD, die), protocol=P.INFLIGHT_SHMFD)),
    "descriptors_that_nobody_asked_for_are_closed": (FAIL, Fault(on(R.GET_FEATURES, leak))),
    "chains_that_loop_or_leave_the_table_are_borne": (DIED, Fault(broken_ring)),
    "buffers_outside_of_memory_are_borne": (DIED, Fault(broken_ring)),
    "requests_that_make_no_sense_to_the_device_are_borne": (DIED, Fault(broken_ring)),
    "an_available_index_that_jumps_is_borne": (DIED, Fault(broken_ring)),
    "indirect_tables_that_cannot_be_are_borne": (DIED, Fault(broken_ring)),
}
FAULTS = MESSAGES | RINGS | HOSTILE
