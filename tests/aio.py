# SPDX-License-Identifier: BSD-3-Clause
"""Tests that are coroutines, each on a loop of its own and bounded."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

__all__ = ["in_loop"]

LIMIT = 60.0
P = ParamSpec("P")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run the coroutine test on a new asyncio loop in debug mode; it fails when it takes longer than LIMIT seconds."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), LIMIT), debug=True)

    return run
