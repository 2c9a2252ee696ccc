"""Socket handlers: a URI in, a connected file descriptor out."""

from __future__ import annotations

from .base import Connection, Handler, Request
from .direct import DirectHandler
from .inprocess import InProcessHandler, StreamFunction
from .unix import UnixHandler

__all__ = ["Connection", "DirectHandler", "Handler", "InProcessHandler", "Request", "StreamFunction", "UnixHandler"]
