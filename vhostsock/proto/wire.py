# SPDX-License-Identifier: BSD-3-Clause
"""The bytes of vhost-user messages, as construct Structs.

A message is a 12-byte header, ``size`` bytes of payload, and file descriptors beside it (at most 8, SCM_RIGHTS). All numbers
are in *native* byte order: both ends run on one host (the vhost-user document, "Message Specification"). Ring contents are
another matter and not seen here.

    header: u32 request | u32 flags | u32 size          flags: bits 0-1 version (1), bit 2 reply, bit 3 need_reply

A reply carries flags 0x5 exactly: QEMU compares the whole word.
"""

from __future__ import annotations

import enum
from typing import Any

from construct import (
    Array,
    Bytes,
    Construct,
    Default,
    ExprAdapter,
    GreedyBytes,
    Int8un,
    Int16un,
    Int32un,
    Int64un,
    Padding,
    Struct,
    this,
)  # fmt: skip

__all__ = [
    "ADDRESS", "CONFIG", "CONFIG_MAX", "EMPTY", "HEADER", "HEADER_SIZE", "INFLIGHT", "IOTLB", "LOG", "MAX_FDS", "MAX_PAYLOAD",
    "MEM_REGION", "MEM_TABLE", "MMAP", "NEED_REPLY_FLAGS", "RAW", "REPLY_FLAGS", "REQUEST_FLAGS", "SHMEM_CONFIG",
    "SHMEM_REGIONS", "TRANSFER", "U64", "UUID", "VRING_FD", "VRING_STATE", "BackendRequest", "Flag", "IotlbPermission",
    "IotlbType", "Request", "TransferDirection", "pack",
]  # fmt: skip


class Request(enum.IntEnum):
    """Every front-end message of the vhost-user document (QEMU 11.1). Those with a row in messages.py are served."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(enum.IntEnum):
    """Messages on the back-end channel (SET_BACKEND_REQ_FD), from us to the front-end.

    3 is VRING_HOST_NOTIFIER_MSG: it gives the guest a page of real hardware to write to, which a device in software lacks.
    """

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class IotlbType(enum.IntEnum):
    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class IotlbPermission(enum.IntFlag):
    READ = 1
    WRITE = 2


class TransferDirection(enum.IntEnum):
    SAVE = 0
    LOAD = 1


class Flag(enum.IntFlag):
    VERSION = 0x1  # the only version there is
    VERSION_MASK = 0x3
    REPLY = 0x4
    NEED_REPLY = 0x8


REQUEST_FLAGS = Flag.VERSION
NEED_REPLY_FLAGS = Flag.VERSION | Flag.NEED_REPLY
REPLY_FLAGS = Flag.VERSION | Flag.REPLY

HEADER_SIZE = 12
MAX_FDS = 8  # in one message (the document, "Communication"), and so the most regions of SET_MEM_TABLE
CONFIG_MAX = 256  # VHOST_USER_MAX_CONFIG_SIZE: the config space that can be reached by messages
# A bound on what a front-end can make us buffer. The largest payload in the document has 2056 bytes; a front-end may send a
# SET_MEM_TABLE longer than its regions need, by a whole table of 8.
MAX_PAYLOAD = 4096

HEADER: Construct = Struct("request" / Int32un, "flags" / Int32un, "size" / Int32un)

U64: Construct = Int64un
RAW: Construct = GreedyBytes
# SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE
VRING_STATE: Construct = Struct("index" / Int32un, "num" / Int32un)
# SET_VRING_ADDR: the addresses are the front-end's virtual ones
ADDRESS: Construct = Struct(
    "index" / Int32un, "flags" / Int32un, "desc" / Int64un, "used" / Int64un, "avail" / Int64un, "log" / Int64un
)
# SET_VRING_KICK, CALL, ERR: bits 0-7 the ring, bit 8 "no fd comes with this"
VRING_FD: Construct = ExprAdapter(
    Int64un,
    lambda value, _: {"index": value & 0xFF, "nofd": bool(value & 0x100)},
    lambda fields, _: fields["index"] | (0x100 if fields["nofd"] else 0),
)
_REGION = Struct("gpa" / Int64un, "size" / Int64un, "uva" / Int64un, "offset" / Int64un)
MEM_TABLE: Construct = Struct("n" / Int32un, "padding" / Default(Int32un, 0), "regions" / Array(this.n, _REGION))
MEM_REGION: Construct = Struct("padding" / Default(Int64un, 0), "region" / _REGION)  # ADD_MEM_REG, REM_MEM_REG
CONFIG: Construct = Struct("offset" / Int32un, "size" / Int32un, "flags" / Int32un, "data" / Bytes(this.size))
EMPTY: Construct = Struct()  # a reply that is only a header, and perhaps a descriptor
# struct vhost_iotlb_msg: perm is an IotlbPermission, type an IotlbType
IOTLB: Construct = Struct(
    "iova" / Int64un, "size" / Default(Int64un, 0), "uaddr" / Default(Int64un, 0), "perm" / Default(Int8un, 0), "type" / Int8un,
    Padding(6),
)  # fmt: skip
TRANSFER: Construct = Struct("direction" / Int32un, "phase" / Int32un)  # SET_DEVICE_STATE_FD
# The document: "first three components stored in big endian", which is how RFC 9562 writes a UUID as 16 bytes
UUID: Construct = Struct("uuid" / Bytes(16))
SHMEM_REGIONS = 256  # ids are 8 bits
SHMEM_CONFIG: Construct = Struct(
    "n" / Int32un, "padding" / Default(Int32un, 0), "sizes" / Array(SHMEM_REGIONS, Int64un)
)  # GET_SHMEM_CONFIG
# SHMEM_MAP, SHMEM_UNMAP: flags bit 0: writable
MMAP: Construct = Struct(
    "shmid" / Int8un, Padding(7), "fd_offset" / Int64un, "shm_offset" / Int64un, "len" / Int64un, "flags" / Int64un
)
# GET_INFLIGHT_FD, SET_INFLIGHT_FD: as the C structure of every implementation has it, padded to 24 bytes
INFLIGHT: Construct = Struct(
    "size" / Int64un, "offset" / Int64un, "num_queues" / Int16un, "queue_size" / Int16un, "padding" / Default(Int32un, 0)
)
LOG: Construct = Struct("size" / Int64un, "offset" / Int64un)  # SET_LOG_BASE

assert HEADER.sizeof() == HEADER_SIZE


def pack(request: int, flags: int, payload: Construct | None = None, value: Any = None) -> bytes:
    """One whole message. ``payload`` None: no payload."""
    body = payload.build(value) if payload is not None else b""
    return bytes(HEADER.build({"request": request, "flags": int(flags), "size": len(body)}) + body)

