"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .engine import EngineUnderTest


@pytest.fixture
def engine() -> Iterator[EngineUnderTest]:
    """An engine whose driver has said HELLO."""
    engine = EngineUnderTest()
    try:
        engine.driver.hello()
        yield engine
    finally:
        engine.close()
