# SPDX-License-Identifier: BSD-3-Clause
"""What the tests read of QEMU's control socket: every event is there for who waits for it, whatever is asked in between."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

from tests.e2e.vm import Qmp


def test_an_event_that_came_with_an_answer_is_kept_over_the_next_command(tmp_path: Path) -> None:
    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as peer:
            peer.sendall(b'{"QMP": {}}\n')
            for _ in range(3):
                peer.recv(4096)  # one command: the next is sent when this one is answered
                event = {"event": "MIGRATION", "data": {"status": "completed"}}
                peer.sendall(b'{"return": {}}\n' + json.dumps(event).encode() + b"\n")  # in one piece

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        qmp = Qmp(tmp_path / "qmp")
        qmp.execute("query-migrate")
        qmp.execute("query-migrate")
        for _ in range(3):
            qmp.await_event("MIGRATION", status="completed")
        qmp.close()
        server.join()
