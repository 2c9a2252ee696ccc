# SPDX-License-Identifier: BSD-3-Clause
"""A disk (virtio 1.3, 5.2) on a raw image file or a block device of the host, for the stock virtio-blk driver.

A request is a header (type, sector), data, and a status byte that is the last writable byte, however the driver cut it into
buffers. It goes one way, from the loop to a thread of the pool and back:

    handle_batch       header checked, jobs submitted ........ a bad one ends here, with a status
    FilePool           bytes between file and guest memory ... any number of requests at once, ended in any order
    _ended             status written, chain completed ....... queues flushed once per batch

What the device promises:

  * The length it reports covers status and data, so a request that fails leaves zeros where data were asked for (2.7.8.2).
  * Write-back: a write that completed is in the host's page cache, a FLUSH that completed put all of those on stable storage
    (fdatasync). With a driver that did not take VIRTIO_BLK_F_FLUSH, or ``write_through``, each write is on stable storage when
    it completes (5.2.6.2). The driver cannot switch between the two (VIRTIO_BLK_F_CONFIG_WCE is not offered): what it chose
    would be forgotten when the back-end is restarted or the guest migrates, since no front-end repeats it.
  * A queue stops only when no request of it is under way, however long the storage takes: QEMU, and the guest behind it, may
    use the memory for something else from then on.
  * While a queue runs the image is locked, for all that respect it (fcntl(2), open file description locks): against writers, or
    if read-only against none but writers. So the two ends of a migration may have the image open, and one of them runs.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import stat
import struct
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

from ..device import Device, Queue
from ..errors import DriverError, FrontendError, RequestError, UsageError
from ..fileio import FileOp, FilePool
from ..ring import Chain

__all__ = ["Blk"]

log = logging.getLogger("vhostsock.blk")

SECTOR = 512  # the unit of every number of sectors, whatever the block size (5.2.4)
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1 << 2, 1 << 5, 1 << 6, 1 << 9
F_TOPOLOGY, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 10, 1 << 12, 1 << 13, 1 << 14
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
HEADER = struct.Struct("<IIQ")  # type, reserved, sector
SEGMENT = struct.Struct("<QII")  # sector, number of sectors, flags; of DISCARD and WRITE_ZEROES
SEGMENT_UNMAP = 1
ID_SIZE = 20
CONFIG = struct.Struct("<Q I I 4x I BBHI B x H I I I I I B 3x")  # 5.2.4, up to write_zeroes_may_unmap

MAX_SEGMENTS = 16  # ranges in a DISCARD or WRITE_ZEROES
MAX_DISCARD = 1 << 22  # sectors a range: 2 GiB, one system call that moves no data
MAX_ZEROES = 1 << 17  # sectors a range: 64 MiB, since a file that knows no holes has it written out
QUEUES_MAX = 256
COUNTS = (
    "reads", "read_bytes", "writes", "written_bytes", "flushes", "discards", "zeroes", "ids", "errors", "unsupported",
    "again",  # requests of any kind that had been under way before, in a process that died
)  # fmt: skip


class _Request:
    """A request with jobs under way. ``data``: bytes of its writable part before the status."""

    __slots__ = ("cancelled", "chain", "jobs", "kind", "queue", "status")

    def __init__(self, queue: Queue, chain: Chain) -> None:
        self.queue = queue
        self.chain = chain
        self.kind = -1
        self.jobs = 0
        self.status = S_OK
        self.cancelled = False  # a job of it was; it comes again, and is carried out from its start

    @property
    def room(self) -> int:
        """Writable bytes in front of the status."""
        return self.chain.writable - 1


class Blk(Device):
    """The disk. One front-end at a time.

    image          path of a raw image file or of a block device; bytes behind its last whole block are not the guest's
    read_only      open it so, and refuse writes
    num_queues     1..256, most that a front-end may ask for
    serial         what GET_ID answers, at most 20 ASCII characters
    block_size     the logical block size that the driver is told, a power of two from 512 to 4096
    seg_max        most data buffers in a request. QEMU's queue size must be larger by 2 at least (its default is 128)
    threads        requests that are in the kernel's hands at once; more wait their turn
    write_through  offer no FLUSH, make each write durable instead
    shared         do not lock the image: guests that run at once know how to share it
    postcopy       offer to be the destination of a postcopy migration, which needs the right to make a userfaultfd

    UsageError: what cannot be served, or an argument out of its range. OSError: the image cannot be opened.
    """

    virtio_id = 2
    packed = True
    inflight = True  # what was under way when the process died is carried out again, which leaves the disk as once does
    migratable = True

    def __init__(
        self,
        image: str | os.PathLike[str],
        *,
        read_only: bool = False,
        num_queues: int = 1,
        serial: str = "",
        block_size: int = SECTOR,
        seg_max: int = 126,
        threads: int = 8,
        write_through: bool = False,
        shared: bool = False,
        postcopy: bool = False,
    ) -> None:
        if not 1 <= num_queues <= QUEUES_MAX:
            raise UsageError(f"{num_queues} queues; may be 1..{QUEUES_MAX}")
        if len(serial) > ID_SIZE or not serial.isascii():
            raise UsageError(f"serial {serial!r}: at most {ID_SIZE} ASCII characters")
        if block_size not in (512, 1024, 2048, 4096):
            raise UsageError(f"block size {block_size}; may be 512, 1024, 2048 or 4096")
        if not 1 <= seg_max <= 1022:
            raise UsageError(f"{seg_max} segments; may be 1..1022")
        self.num_queues = num_queues
        self.read_only = read_only
        self.image = os.fspath(image)
        self._serial = serial.encode().ljust(ID_SIZE, b"\0")
        self._block_size = block_size
        self._seg_max = seg_max
        self._threads = threads
        self._write_through = write_through
        self._shared = shared
        self.postcopy = postcopy
        self._running: set[int] = set()  # queues, by index
        self._fd = os.open(image, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._fd)
        """Close the image; happens by itself when the device is no longer used."""
        kind = os.fstat(self._fd).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise UsageError(f"{self.image}: neither a file nor a block device")
        self.capacity = self._look()
        self.features = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY
        self.features |= F_RO if read_only else F_DISCARD | F_WRITE_ZEROES
        self.features |= 0 if write_through else F_FLUSH
        self.features |= F_MQ if num_queues > 1 else 0
        self.counts: Counter[str] = Counter()
        self._pool: FilePool[_Request] | None = None
        self._under_way = [0] * num_queues
        self._progress = asyncio.Event()
        self._errors: set[int] = set()

    def _look(self) -> int:
        """Sectors of the image now."""
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size % self._block_size:
            log.warning("%s: its last %d bytes are no whole block and not served", self.image, size % self._block_size)
        return size // self._block_size * (self._block_size // SECTOR)

    # ---- config space

    @property
    def has_config(self) -> bool:
        return True

    def read_config(self, offset: int, size: int) -> bytes:
        # preferred I/O size, in blocks of block_size (5.2.4)
        preferred = max(self._block_size, min(os.fstat(self._fd).st_blksize, 1 << 16))
        per_block = preferred // self._block_size
        discard = 0 if self.read_only else MAX_DISCARD, MAX_SEGMENTS, preferred // SECTOR
        zeroes = 0 if self.read_only else MAX_ZEROES, MAX_SEGMENTS, 1
        config = CONFIG.pack(
            self.capacity, 0, self._seg_max, self._block_size, per_block.bit_length() - 1, 0, per_block, 0,
            int(not self._write_through), self.num_queues, *discard, *zeroes,
        )  # fmt: skip
        return config[offset : offset + size].ljust(size, b"\0")

    def reload(self) -> None:
        """Look for a new size of the image, and tell the guest of it."""
        capacity = self._look()
        if capacity != self.capacity:
            log.info("%s: %d sectors now, before %d", self.image, capacity, self.capacity)
            self.capacity = capacity
            self.config_changed()

    # ---- life

    async def connected(self) -> None:
        self._pool = FilePool(self._threads, self._ended)

    async def disconnected(self) -> None:
        if self._pool:
            self._pool.close()
            self._pool = None

    def queue_started(self, queue: Queue) -> None:
        if not self._running and not self._lock(fcntl.F_RDLCK if self.read_only else fcntl.F_WRLCK):
            log.error("%s: another program has it locked, so this guest is not served (--shared would)", self.image)
            queue.fail(OSError(errno.EBUSY, f"{self.image} is locked by another program"))
            return
        self._running.add(queue.index)
        super().queue_started(queue)

    def queue_stopped(self, queue: Queue) -> None:
        super().queue_stopped(queue)
        self._running.discard(queue.index)
        if not self._running:
            self._lock(fcntl.F_UNLCK)

    def _lock(self, kind: int) -> bool:
        """Lock or unlock the whole image; False: another program has a lock that excludes this one."""
        if self._shared:
            return True
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            log.warning("%s: not locked: %s", self.image, error.strerror)  # a file system that knows no locks
        return True

    async def queue_draining(self, queue: Queue) -> None:
        await super().queue_draining(queue)
        late = asyncio.get_running_loop().call_later(
            self.stop_timeout, log.warning, "%s: queue %d stops, and waits for the storage", self.image, queue.index
        )
        while self._under_way[queue.index]:
            self._progress.clear()
            await self._progress.wait()
        late.cancel()

    async def queue_suspending(self, queue: Queue) -> None:
        """Requests that no thread has begun come again. One that runs on would write into guest memory: wait for those."""
        assert self._pool
        if queue.plane:
            queue.plane.close()  # takes no more, so that all that was taken is cancelled here
        self._pool.cancel(queue.index)
        await self.queue_draining(queue)

    def report(self) -> None:
        figures = " ".join(f"{name}={self.counts[name]}" for name in COUNTS)
        log.info("stats name=blk capacity=%d under_way=%d %s", self.capacity, sum(self._under_way), figures)

    # ---- requests

    def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
        for chain in chains:
            request = _Request(queue, chain)
            try:
                self._start(request)
            except DriverError as error:
                queue.vring.fail(str(error))
                chain.complete()
            except RequestError as error:
                self._refuse(request, error)
            except Exception:
                log.exception("%s: a request failed to start", self.image)
                self._refuse(request, RequestError("a bug", status=S_IOERR))

    def _start(self, request: _Request) -> None:
        chain = request.chain
        if not chain.writable:
            raise DriverError("a request has no room for its status", vring=request.queue.index)
        self.counts["again"] += chain.again
        header = chain.read(HEADER.size)
        if len(header) < HEADER.size:
            raise RequestError(f"the header has {len(header)} bytes, not {HEADER.size}", status=S_IOERR)
        request.kind, _, sector = HEADER.unpack(header)
        start = _STARTS.get(request.kind)
        if start is None:
            raise RequestError(f"request type {request.kind} is unknown", status=S_UNSUPP)
        if request.room and request.kind not in (T_IN, T_GET_ID):
            raise RequestError(f"type {request.kind} with {request.room} bytes of room for data", status=S_IOERR)
        start(self, request, sector)

    def _range(self, sector: int, sectors: int) -> tuple[int, int]:
        """Offset and length in bytes. RequestError when not wholly inside the disk."""
        if sector + sectors > self.capacity:  # of Python's integers, which do not wrap
            raise RequestError(f"sectors {sector} to {sector + sectors} of {self.capacity}", status=S_IOERR)
        return sector * SECTOR, sectors * SECTOR

    def _data_range(self, sector: int, length: int) -> int:
        """The offset of ``length`` bytes of data."""
        if length % SECTOR:
            raise RequestError(f"{length} bytes of data are no whole sectors", status=S_IOERR)
        return self._range(sector, length // SECTOR)[0]

    def _read(self, request: _Request, sector: int) -> None:
        offset = self._data_range(sector, request.room)
        self._submit(FileOp.READ, request, length=request.room, offset=offset)
        self.counts["reads"] += 1
        self.counts["read_bytes"] += request.room

    def _write(self, request: _Request, sector: int) -> None:
        self._check_writable()
        length = request.chain.readable - HEADER.size
        offset = self._data_range(sector, length)
        self._submit(FileOp.WRITE, request, skip=HEADER.size, length=length, offset=offset)
        self.counts["writes"] += 1
        self.counts["written_bytes"] += length

    def _flush(self, request: _Request, _sector: int) -> None:
        self._submit(FileOp.SYNC, request)
        self.counts["flushes"] += 1

    def _get_id(self, request: _Request, _sector: int) -> None:
        if request.room != ID_SIZE:
            raise RequestError(f"{request.room} bytes of room for the id, not {ID_SIZE}", status=S_IOERR)
        request.chain.write_at(0, self._serial)
        self.counts["ids"] += 1
        self._finish(request)

    def _discard(self, request: _Request, _sector: int) -> None:
        self._check_writable()
        # both before the first is carried out: a request that is refused has changed nothing
        for offset, length, _ in list(self._segments(request, MAX_DISCARD, 0)):
            self._submit(FileOp.DISCARD, request, length=length, offset=offset)
        self.counts["discards"] += 1

    def _write_zeroes(self, request: _Request, _sector: int) -> None:
        self._check_writable()
        for offset, length, flags in list(self._segments(request, MAX_ZEROES, SEGMENT_UNMAP)):
            op = FileOp.ZERO_UNMAP if flags & SEGMENT_UNMAP else FileOp.ZERO
            self._submit(op, request, length=length, offset=offset)
        self.counts["zeroes"] += 1

    def _segments(self, request: _Request, most: int, flags_known: int) -> Iterator[tuple[int, int, int]]:
        """(offset, length, flags) of each range, in bytes."""
        size = request.chain.readable - HEADER.size
        if not size or size % SEGMENT.size or size > MAX_SEGMENTS * SEGMENT.size:
            raise RequestError(f"{size} bytes are not 1 to {MAX_SEGMENTS} segments of {SEGMENT.size}", status=S_IOERR)
        for sector, sectors, flags in SEGMENT.iter_unpack(request.chain.read()):
            if flags & ~flags_known:  # 5.2.6.2, also UNMAP of a DISCARD
                raise RequestError(f"segment flags {flags:#x}", status=S_UNSUPP)
            if sectors > most:
                raise RequestError(f"a segment of {sectors} sectors, at most {most}", status=S_IOERR)
            yield (*self._range(sector, sectors), flags)

    def _check_writable(self) -> None:
        if self.read_only:
            raise RequestError("the disk is read-only", status=S_IOERR)

    def _submit(self, op: FileOp, request: _Request, *, skip: int = 0, length: int = 0, offset: int = 0) -> None:
        assert self._pool
        durable = self._write_through or not self.acked_features & F_FLUSH
        self._pool.submit(
            op, request, self._fd, chain=request.chain, skip=skip, length=length, offset=offset, durable=durable,
            group=request.queue.index,
        )  # fmt: skip
        request.jobs += 1
        self._under_way[request.queue.index] += 1

    def _refuse(self, request: _Request, error: RequestError) -> None:
        """End it with a status. The room for data is cleared first, on a thread: a hostile driver may give 4 GiB of it."""
        request.status = S_IOERR if error.status is None else error.status
        log.debug("%s, queue %d: request refused: %s", self.image, request.queue.index, error)
        if request.jobs:
            return  # the last one to end finishes it
        try:
            if request.room:
                self._submit(FileOp.CLEAR, request, length=request.room)
        except MemoryError:
            log.warning("%s: no memory to clear what a request did not read", self.image)
        if not request.jobs:
            self._finish(request)

    def _ended(self, jobs: list[tuple[_Request, int]]) -> None:
        queues = set()
        for request, error in jobs:
            request.jobs -= 1
            self._under_way[request.queue.index] -= 1
            if error == errno.ECANCELED:
                request.cancelled = True
            elif error:
                self._failed(error)
                request.status = S_UNSUPP if error == errno.EOPNOTSUPP else S_IOERR
            if not request.jobs:
                self._finish(request)
            queues.add(request.queue)
        for queue in queues:
            queue.flush()
            if queue.memory and queue.memory.poisoned:
                queue.fail(FrontendError("the front-end truncated guest memory that is in use"))
        self._progress.set()

    def _failed(self, error: int) -> None:
        """Say it once for each kind: a guest can repeat a request that fails as fast as it likes."""
        known = error in self._errors
        self._errors.add(error)
        log.log(logging.DEBUG if known else logging.WARNING, "%s: a request failed: %s", self.image, os.strerror(error))

    def _finish(self, request: _Request) -> None:
        chain = request.chain
        if request.cancelled:
            chain.abandon()
            return
        chain.write_at(request.room, bytes([request.status]))
        chain.written = chain.writable
        chain.complete()
        if request.status:
            self.counts["errors" if request.status == S_IOERR else "unsupported"] += 1


_STARTS: dict[int, Callable[[Blk, _Request, int], None]] = {
    T_IN: Blk._read,
    T_OUT: Blk._write,
    T_FLUSH: Blk._flush,
    T_GET_ID: Blk._get_id,
    T_DISCARD: Blk._discard,
    T_WRITE_ZEROES: Blk._write_zeroes,
}
