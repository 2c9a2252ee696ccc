"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from .engine import EngineUnderTest


@pytest.fixture
def make_engine() -> Iterator[Callable[..., EngineUnderTest]]:
    """Engines with other settings; the driver has said HELLO. They are closed at the end."""
    with ExitStack() as stack:

        def make(*, hello: bool = True, **options: Any) -> EngineUnderTest:
            engine = EngineUnderTest(**options)
            stack.callback(engine.close)
            if hello:
                engine.driver.hello()
            return engine

        yield make


@pytest.fixture
def engine(make_engine: Callable[..., EngineUnderTest]) -> EngineUnderTest:
    return make_engine()
