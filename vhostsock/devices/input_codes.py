# SPDX-License-Identifier: BSD-3-Clause
"""Names of the event types and codes of Linux's input layer (input-event-codes.h), as far as our devices send or get them.

A number does for every other one.
"""

from __future__ import annotations

import enum

__all__ = ["CODES", "EventType", "code_name", "parse_code", "parse_type"]


class EventType(enum.IntEnum):
    EV_SYN = 0
    EV_KEY = 1
    EV_REL = 2
    EV_ABS = 3
    EV_LED = 17


def _numbered(prefix: str, first: int, names: str) -> dict[str, int]:
    """Consecutive codes; "-" leaves one out."""
    return {prefix + name: first + i for i, name in enumerate(names.split()) if name != "-"}


_KEYS = _numbered(
    "KEY_",
    1,
    "ESC 1 2 3 4 5 6 7 8 9 0 MINUS EQUAL BACKSPACE TAB Q W E R T Y U I O P LEFTBRACE RIGHTBRACE ENTER LEFTCTRL "
    "A S D F G H J K L SEMICOLON APOSTROPHE GRAVE LEFTSHIFT BACKSLASH Z X C V B N M COMMA DOT SLASH RIGHTSHIFT KPASTERISK "
    "LEFTALT SPACE CAPSLOCK F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 NUMLOCK SCROLLLOCK KP7 KP8 KP9 KPMINUS KP4 KP5 KP6 KPPLUS "
    "KP1 KP2 KP3 KP0 KPDOT - - 102ND F11 F12",
) | _numbered(
    "KEY_",
    96,
    "KPENTER RIGHTCTRL KPSLASH SYSRQ RIGHTALT - HOME UP PAGEUP LEFT RIGHT END DOWN PAGEDOWN INSERT DELETE - "
    "MUTE VOLUMEDOWN VOLUMEUP POWER KPEQUAL - PAUSE - - - - - LEFTMETA RIGHTMETA COMPOSE",
)

CODES: dict[EventType, dict[str, int]] = {
    EventType.EV_SYN: {"SYN_REPORT": 0},
    EventType.EV_KEY: _KEYS | _numbered("BTN_", 0x110, "LEFT RIGHT MIDDLE SIDE EXTRA"),
    EventType.EV_REL: {"REL_X": 0, "REL_Y": 1, "REL_HWHEEL": 6, "REL_WHEEL": 8},
    EventType.EV_ABS: {"ABS_X": 0, "ABS_Y": 1},
    EventType.EV_LED: {"LED_NUML": 0, "LED_CAPSL": 1, "LED_SCROLLL": 2},
}
_NAMES = {(kind, code): name for kind, codes in CODES.items() for name, code in codes.items()}


def parse_type(text: str) -> int:
    """ValueError: neither a name nor a number of 16 bits."""
    return int(EventType[text]) if text in EventType.__members__ else _number(text, "an event type")


def parse_code(kind: int, text: str) -> int:
    """A code of that type; ValueError as `parse_type`."""
    names = CODES[EventType(kind)] if kind in CODES else {}
    return names[text] if text in names else _number(text, f"a code of event type {kind}")


def code_name(kind: int, code: int) -> tuple[str, str]:
    """Both as text, which the functions above read again."""
    name = EventType(kind).name if kind in CODES else str(kind)
    return name, _NAMES.get((EventType(kind), code), str(code)) if kind in CODES else str(code)


def _number(text: str, what: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= 0xFFFF:
        raise ValueError(f"{text!r} is neither the name nor the number of {what}")
    return number
