# SPDX-License-Identifier: BSD-3-Clause
"""vhost-user: the messages, and a back-end session without I/O.

    wire       the bytes (construct)          messages   the table: what is on the wire and when it is allowed
    features   the bits                       events     what a session asks its owner to do
    session    the state machine
"""

from .features import ProtocolFeature, VirtioFeature
from .session import Session, SessionConfig
from .wire import Request

__all__ = ["ProtocolFeature", "Request", "Session", "SessionConfig", "VirtioFeature"]
