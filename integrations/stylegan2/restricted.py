"""A reader of pickles that can only make data: it interprets the stream itself and never calls Python's unpickler.

A pickle is a program for a small stack machine. This machine knows the instructions that build numbers, texts, bytes
and containers, and hands every name in the stream to a function that knows the few that are harmless. Nothing is
imported, called, or set on a Python object by the file's will. What it makes costs memory in proportion to the file:
lengths are compared with the bytes that are there before anything is made of them, and instructions are counted.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

LONGEST_TEXT = 1 << 24  # bytes; the source of a whole Python module is far below
LONGEST_NAME = 512  # characters, module included
LONGEST_NUMBER = 32  # bytes of an integer


class Refused(Exception):
    """The stream is damaged, or asks for what this reader does not do. The message continues "a pickle that …"."""


class Maker(NamedTuple):
    """What a name in the stream stands for: a function from the tuple of arguments to a value."""

    name: str
    make: Callable[[tuple[Any, ...]], Any]


class Built:
    """A value that accepts the state which the stream gives an object after making it."""

    def build(self, state: Any) -> None:
        raise NotImplementedError


@dataclass
class Budget:
    """Instructions that may still be executed, over all streams of one file."""

    left: int


def shown(value: Any) -> str:
    """A value of the stream for a message: short, and without walking through lists that may have no end."""
    if type(value) is tuple and len(value) <= 16 and all(type(item) is int for item in value):
        return str(value)
    return repr(value)[:80] if type(value) in (int, str, float, bool) else f"a {type(value).__name__}"


_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_EMPTY: dict[int, Callable[[], Any]] = {ord(")"): tuple, ord("]"): list, ord("}"): dict, 0x8F: set}
_INTEGERS = {ord("K"): "<B", ord("M"): "<H", ord("J"): "<i"}
_TEXTS = {ord("X"): "<I", 0x8C: "<B", 0x8D: "<Q"}
_BYTES = {ord("B"): "<I", ord("C"): "<B", 0x8E: "<Q", 0x96: "<Q"}
_LONGS = {0x8A: "<B", 0x8B: "<i"}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_PUT = {ord("q"): "<B", ord("r"): "<I"}
_GET = {ord("h"): "<B", ord("j"): "<I"}
_PROTO, _FRAME, _STOP, _MARK, _POP, _POP_MARK = 0x80, 0x95, ord("."), ord("("), ord("0"), ord("1")
_TUPLE, _APPEND, _APPENDS, _SETITEM, _SETITEMS = ord("t"), ord("a"), ord("e"), ord("s"), ord("u")
_ADDITEMS, _FROZENSET, _MEMOIZE = 0x90, 0x91, 0x94
_GLOBAL, _STACK_GLOBAL, _REDUCE, _NEWOBJ, _BUILD, _BINPERSID = ord("c"), 0x93, ord("R"), 0x81, ord("b"), ord("Q")


def load(
    data: memoryview,
    find: Callable[[str], Maker],
    budget: Budget,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """(value, bytes used) of the pickle at the beginning of `data`; bytes in it come as views of `data`.

    Args:
        find: what a dotted name (module and attribute) stands for; raises `Refused` for all but the harmless ones.
        budget: is used up by one per instruction.
        persistent: the value of a persistent id; None refuses them.

    Raises:
        Refused: with the name, the instruction or the length that is wrong, and where.
    """
    machine = _Machine(data, find, budget, persistent)
    try:
        return machine.run(), machine.at
    except (IndexError, KeyError, struct.error, ValueError):  # ValueError: too few values, no UTF-8
        raise Refused(f"is damaged: it makes no sense at byte {machine.at:,}") from None


class _Machine:
    def __init__(
        self,
        data: memoryview,
        find: Callable[[str], Maker],
        budget: Budget,
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.data, self.find, self.budget, self.persistent = data, find, budget, persistent
        self.at = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self.data) - self.at:
            left = len(self.data) - self.at
            raise Refused(f"announces {count:,} bytes at byte {self.at:,} where {left:,} follow: truncated or damaged")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self, count: int) -> str:
        if count > LONGEST_TEXT:
            raise Refused(f"announces a text of {count:,} bytes at byte {self.at:,}")
        return str(self.take(count), "utf-8", "surrogatepass")

    def line(self) -> str:
        head = bytes(self.data[self.at : self.at + 512])
        end = head.find(b"\n")
        if end < 0:
            raise Refused(f"is damaged: no name ends near byte {self.at:,}")
        self.at += end + 1
        return head[:end].decode("utf-8")

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def run(self) -> Any:
        """Execute up to STOP and return the value on the stack."""
        while True:
            self.budget.left -= 1
            if self.budget.left < 0:
                raise Refused("has far more instructions than any generator's file: it is not one, or a trap")
            code = self.data[self.at] if self.at < len(self.data) else None
            if code is None:
                raise Refused(f"ends at byte {self.at:,} without its end mark: it is truncated")
            self.at += 1
            if code == _STOP:
                return self.stack.pop()
            self.execute(code)

    def execute(self, code: int) -> None:
        stack = self.stack
        if code in _TEXTS:
            stack.append(self.text(self.number(_TEXTS[code])))
        elif code in _GET:
            stack.append(self.memo[self.number(_GET[code])])
        elif code == _MEMOIZE:
            self.memo[len(self.memo)] = stack[-1]
        elif code in _PUT:
            self.memo[self.number(_PUT[code])] = stack[-1]
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _INTEGERS:
            stack.append(self.number(_INTEGERS[code]))
        elif code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code in _TUPLES:
            count = _TUPLES[code]
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [tuple(stack[-count:])]
        elif code in _BYTES:
            stack.append(self.take(self.number(_BYTES[code])))
        elif code in _LONGS:
            count = self.number(_LONGS[code])
            if not 0 <= count <= LONGEST_NUMBER:
                raise Refused(f"announces an integer of {count:,} bytes at byte {self.at:,}")
            stack.append(int.from_bytes(self.take(count), "little", signed=True))
        elif code == ord("G"):
            stack.append(struct.unpack(">d", self.take(8))[0])
        elif code == _MARK:
            self.marked.append(stack)
            self.stack = []
        elif code in (_TUPLE, _APPENDS, _SETITEMS, _ADDITEMS, _FROZENSET, _POP_MARK):
            self.close(code, self.since_mark())
        elif code == _APPEND:
            self.extend([stack.pop()])
        elif code == _SETITEM:
            value, key = stack.pop(), stack.pop()
            self.extend_dict([key, value])
        elif code == _POP:
            stack.pop()
        elif code in (_GLOBAL, _STACK_GLOBAL):
            module, name = (self.line(), self.line()) if code == _GLOBAL else stack[-2:]
            if code == _STACK_GLOBAL:
                del stack[-2:]
            stack.append(self.named(module, name))
        elif code in (_REDUCE, _NEWOBJ):
            arguments, maker = stack.pop(), stack.pop()
            if type(maker) is not Maker or type(arguments) is not tuple:
                raise Refused(f"calls something that is no known name, at byte {self.at:,}")
            stack.append(maker.make(arguments))
        elif code == _BUILD:
            state, value = stack.pop(), stack[-1]
            if not isinstance(value, Built):
                what = value.name if isinstance(value, Maker) else type(value).__name__
                raise Refused(f"sets the state of {what}, which has none, at byte {self.at:,}")
            value.build(state)
        elif code == _BINPERSID and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        elif code == _PROTO:
            if (version := self.number("<B")) > 5:
                raise Refused(f"is of pickle protocol {version}; 5 is the newest known")
        elif code == _FRAME:
            self.take(8)  # how much may be buffered: no matter here
        else:
            raise Refused(self.unknown(code))

    def close(self, code: int, items: list[Any]) -> None:
        if code == _TUPLE:
            self.stack.append(tuple(items))
        elif code == _APPENDS:
            self.extend(items)
        elif code == _SETITEMS:
            self.extend_dict(items)
        elif code == _ADDITEMS:
            if type(self.stack[-1]) is not set:
                raise Refused(f"adds items to something that is no set, at byte {self.at:,}")
            self.stack[-1].update(map(self.key, items))
        elif code == _FROZENSET:
            self.stack.append({self.key(item) for item in items})

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused(f"appends to something that is no list, at byte {self.at:,}")
        self.stack[-1].extend(items)

    def extend_dict(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise Refused(f"sets items of something that is no dictionary, at byte {self.at:,}")
        self.stack[-1].update(zip(map(self.key, items[::2]), items[1::2]))

    def key(self, value: Any) -> Any:
        # The hash of nested tuples that share parts takes time exponential in their depth.
        if type(value) not in (str, int):
            raise Refused(f"uses a {type(value).__name__} as a key, at byte {self.at:,}; only texts and integers are")
        return value

    def named(self, module: Any, name: Any) -> Maker:
        if type(module) is not str or type(name) is not str:
            raise Refused(f"names something without a text, at byte {self.at:,}")
        if len(module) + len(name) > LONGEST_NAME:
            raise Refused(f"uses a name of {len(module) + len(name):,} characters, at byte {self.at:,}")
        if "." in name:
            raise Refused(f"names {module}.{name}, an attribute of an attribute, which no generator's file needs")
        return self.find(f"{module}.{name}")

    def unknown(self, code: int) -> str:
        known = {op.code: op.name for op in pickletools.opcodes}.get(chr(code))
        if known is None:
            return f"is damaged: 0x{code:02x} at byte {self.at - 1:,} is no instruction"
        told = ""
        if known == "INST":
            told = f" ({self.line()}.{self.line()})"
        kind = " (a persistent id)" if known in ("PERSID", "BINPERSID") else ""
        return f"uses the instruction {known}{told}{kind} at byte {self.at - 1:,}, which no generator's file needs"
