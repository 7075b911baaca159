"""Pickles that want something done, and what the refusal of each must name. `CANARY` is the file that none may make."""

from __future__ import annotations

import pickle
import struct
from typing import Any

import numpy as np
import official_format as official
import torch

CANARY = "canary_that_must_not_appear"
_COMMAND = f"touch {CANARY}"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def whole(inside: bytes) -> bytes:
    """A checkpoint with `inside` where its dataset's options stand."""
    return b"\x80\x04}(" + text("training_set_kwargs") + inside + b"u."


def storage(count: int, data: bytes = b"\0" * 16, name: str = "FloatStorage", hidden: bytes = b"") -> bytes:
    """What torch.save writes for a storage, with a count of one's own, and something hidden among it."""
    magic, version = pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)
    system = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}, 2)
    identity = b"\x80\x02(" + text("storage") + hidden + f"ctorch\n{name}\n".encode()
    identity += text("0") + text("cpu") + integer(count) + b"NtQ."
    return magic + version + system + identity + pickle.dumps(["0"], 2) + struct.pack("<q", count) + data


def loaded(inner: bytes) -> bytes:
    return call("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(inner)) + inner)


def tensor(inner: bytes, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    view = integer(offset) + b"".join(b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, stride))
    return call("torch._utils", "_rebuild_tensor_v2", loaded(inner), view, b"\x89", call("collections", "OrderedDict"))


def network(state: dict[str, Any], class_name: str = "Generator") -> bytes:
    full = {"_parameters": {"weight": torch.ones(2)}, "_buffers": {}, "_modules": {}} | state
    return official.dumps({"G_ema": official.Persistent(class_name, full)})


def doubling(kind: type, times: int) -> Any:
    value: Any = kind()
    for _ in range(times):
        value = kind((value, value))
    return value


def _with_tuple_key() -> bytes:
    """The hash of a tuple of the same tuple twice, sixty times over, would take 2⁶⁰ steps."""
    pairs = b")\x940" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x940" for i in range(60))
    return b"\x80\x04" + pairs + b"}h" + bytes([60]) + b"Ns."


def _many_views() -> bytes:
    """One megabyte of numbers, claimed as the parameters of a network two thousand times over."""
    block = torch.zeros(1 << 18)
    views = {f"p{i}": block for i in range(2000)}  # one object: the stream has it once
    return network({"_parameters": views})


def _object_array() -> bytes:
    return b"\x80\x04" + pickle.dumps(np.array([None, "x"], dtype=object), 4)[2:]


IN_A_TENSOR = storage(4, hidden=call("os", "system", text(_COMMAND)))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (whole(call("os", "system", text(_COMMAND))), r"names os\.system"),
    "posix.system": (whole(call("posix", "system", text(_COMMAND))), r"names posix\.system"),
    "eval": (whole(call("builtins", "eval", text(f"open({CANARY!r}, 'w')"))), r"names builtins\.eval"),
    "exec": (whole(call("builtins", "exec", text(f"open({CANARY!r}, 'w')"))), r"names builtins\.exec"),
    "getattr": (whole(call("builtins", "getattr", b"cos\npath\n", text("os"))), r"names builtins\.getattr"),
    "open": (whole(call("io", "open", text(CANARY), text("w"))), r"names io\.open"),
    "Popen": (
        whole(call("subprocess", "Popen", b"](" + text("touch") + text(CANARY) + b"e")), r"names subprocess\.Popen",
    ),
    "call of a call": (
        whole(call("collections", "OrderedDict", call("os", "popen", text(_COMMAND)))), r"names os\.popen",
    ),
    "python 2 names": (whole(call("__builtin__", "apply", text("x"))), r"names __builtin__\.apply"),
    "runpy": (whole(call("runpy", "run_path", text("x.py"))), r"names runpy\.run_path"),
    "torch.load": (whole(call("torch", "load", text("x.pt"))), r"names torch\.load"),
    "torch hub": (whole(call("torch.hub", "load", text("x"), text("y"))), r"names torch\.hub\.load"),
    "torch unrestricted": (whole(call("torch.serialization", "_legacy_load", text("x"))), r"_legacy_load"),
    "pickle in pickle": (whole(call("pickle", "loads", text("x"))), r"names pickle\.loads"),
    "instance": (b"\x80\x04(" + text(_COMMAND) + b"ios\nsystem\n.", r"INST \(os\.system\)"),
    "new object": (b"\x80\x04csubprocess\nPopen\n(" + text(_COMMAND) + b"t\x81.", r"names subprocess\.Popen"),
    "new object with keywords": (b"\x80\x04ctorch.nn.modules.x\nY\n)}\x92.", r"NEWOBJ_EX"),
    "own state": (b"\x80\x04crandom\nRandom\n)\x81}b.", r"names random\.Random"),
    "state of a function": (b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n}b.", r"sets the state of torch\._utils"),
    "state of a dictionary": (b"\x80\x04}}b.", r"sets the state of dict"),
    "attribute of an attribute": (
        b"\x80\x04" + text("torch_utils.persistence") + text("_reconstruct_persistent_obj.__globals__") + b"\x93.",
        r"_reconstruct_persistent_obj\.__globals__, an attribute of an attribute",
    ),
    "private function": (
        whole(call("torch_utils.persistence", "_src_to_module", text("import os"))),
        r"names torch_utils\.persistence\._src_to_module",
    ),
    "import hook": (whole(call("torch_utils.persistence", "import_hook", text("x"))), r"persistence\.import_hook"),
    "in the bytes of a tensor": (
        whole(loaded(IN_A_TENSOR)),
        r"tensor whose bytes, a pickle again, are unusable: it names os\.system",
    ),
    "allowed outside, not in a tensor": (
        whole(loaded(storage(4, hidden=call("torch_utils.persistence", "_reconstruct_persistent_obj", b"}")))),
        r"_reconstruct_persistent_obj, which no storage needs",
    ),
    "unknown storage": (whole(loaded(storage(4, name="Storage"))), r"names torch\.Storage, which no storage needs"),
    "storage larger than its bytes": (whole(loaded(storage(1 << 40))), r"1,099,511,627,776 numbers .* 16 bytes"),
    "negative storage": (whole(loaded(storage(-4))), r"storage of -4 numbers"),
    "no storage": (whole(loaded(b"\x80\x02}.")), r"not in the form that torch\.save gives|cut off|truncated"),
    "negative stride": (whole(tensor(storage(4), 3, (2,), (-1,))), r"views a storage at 3 by \(2,\), \(-1,\)"),
    "offset outside": (whole(tensor(storage(4), 4, (1,), (1,))), r"views number 4 of a storage of 4"),
    "negative offset": (whole(tensor(storage(4), -1, (1,), (1,))), r"views a storage at -1"),
    "stride outside": (whole(tensor(storage(4), 0, (2, 2), (3, 1))), r"views number 4 of a storage of 4"),
    "one number as a terabyte": (
        whole(tensor(storage(4), 0, (1 << 20, 1 << 20, 2), (0, 0, 0))), r"shape \(1048576, 1048576, 2\)",
    ),
    "the same numbers as many tensors": (_many_views(), r"unfolds into 2,097,152,000 bytes"),
    "text of an exabyte": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".", r"1,152,921,504,606,846,976 bytes"),
    "bytes of an exabyte": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".", r"announces 1,152,921,504,606,8"),
    "bytearray of an exabyte": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".", r"announces 1,152,921,504"),
    "long integer": (b"\x80\x04\x8b" + struct.pack("<i", 1 << 30) + b".", r"integer of 1,073,741,824 bytes"),
    "negative length": (b"\x80\x04\x8b" + struct.pack("<i", -1) + b".", r"integer of -1 bytes"),
    "persistent id": (b"\x80\x04" + text("x") + b"Q.", r"BINPERSID \(a persistent id\)"),
    "persistent id in text": (b"Px\n.", r"PERSID \(a persistent id\)"),
    "extension": (b"\x80\x04\x82\x01.", r"the instruction EXT1"),
    "extension 4": (b"\x80\x04\x84\x01\0\0\0.", r"the instruction EXT4"),
    "copyreg": (whole(call("copyreg", "add_extension", text("os"), text("system"), b"K\x01")), r"copyreg\.add_ext"),
    "duplicate": (b"\x80\x04)2\x86.", r"the instruction DUP"),
    "array of objects": (_object_array(), r"numpy type 'O8' \(objects"),
    "tuple as a key": (_with_tuple_key(), r"uses a tuple as a key"),
    "arguments without end": (network({"_init_kwargs": {"z_dim": doubling(list, 60)}}), r"argument z_dim that is no"),
    "nested lists": (b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".", r"holds a list, not a dictionary"),
    "instructions without end": (b"\x80\x04" + b"N0" * 510_000 + b"N.", r"far more instructions"),
    "protocol 9": (b"\x80\x09N.", r"protocol 9"),
    "state that is no dictionary": (official.dumps({"G_ema": official.Persistent("Generator", [])}), r"or no state"),
    "next version": (official.dumps({"G_ema": official.Persistent("Generator", {}, version=7)}), r"in version 7"),
    "memo far away": (b"\x80\x04Nr\xff\xff\xff\xff.", r"holds a NoneType"),
    "memo of nothing": (b"\x80\x04h\x05.", r"makes no sense at byte"),
}  # fmt: skip


def modules_without_end(kind: str) -> bytes:
    """Modules in modules: a long chain, or a short one whose members are each counted twice."""
    child: Any = official.Persistent("Block", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    for _ in range(80 if kind == "chain" else 30):
        children = {"a": child} if kind == "chain" else {"a": child, "b": child}
        child = official.Persistent("Block", {"_parameters": {}, "_buffers": {}, "_modules": children})
    return official.dumps({"G_ema": child})


def deep_argument() -> bytes:
    inner: Any = 1
    for _ in range(200):
        inner = [inner]
    return network({"_init_kwargs": {"w_dim": inner}})


HOSTILE["modules in modules"] = modules_without_end("chain"), r"nests modules without end"
HOSTILE["modules that multiply"] = modules_without_end("double"), r"nests modules without end"
HOSTILE["deep arguments"] = deep_argument(), r"argument w_dim that is no"
HOSTILE["message without end"] = (
    official.dumps({"G": official.Persistent("Generator", {}, version=doubling(list, 60))}), r"in version a list",
)  # fmt: skip


def doubled(times: int = 60) -> bytes:
    """A list of twice the list before, and so on: its text would fill any memory."""
    return b"]\x940" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x940" for i in range(times))


HOSTILE["type without end"] = (
    b"\x80\x04" + doubled() + b"cnumpy\ndtype\n(h" + bytes([60]) + b"tR.", r"uses the numpy type a list",
)  # fmt: skip
HOSTILE["shape without end"] = (
    b"\x80\x04" + doubled()
    + call("torch._utils", "_rebuild_tensor_v2", loaded(storage(4)), b"K\x00", b"h" + bytes([60]) + b"\x85",
           b"(K\x01t", b"\x89", b"}") + b".",
    r"views a storage at 0 by a tuple, \(1,\)",
)  # fmt: skip
