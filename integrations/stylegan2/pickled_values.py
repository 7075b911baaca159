"""The values in official checkpoints: torch's tensors and storages, numpy's scalars and arrays, as inert data."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from convlora.integrations.stylegan2.restricted import Budget, Built, Maker, Refused, load, shown

# torch's names of storages: the type of the tensor, and how its bytes lie in the file
_STORAGES: dict[str, tuple[torch.dtype, str]] = {
    "torch.FloatStorage": (torch.float32, "<f4"),
    "torch.DoubleStorage": (torch.float64, "<f8"),
    "torch.HalfStorage": (torch.float16, "<f2"),
    "torch.BFloat16Storage": (torch.bfloat16, "<i2"),  # numpy has no such type: only the bits matter
    "torch.LongStorage": (torch.int64, "<i8"),
    "torch.IntStorage": (torch.int32, "<i4"),
    "torch.ShortStorage": (torch.int16, "<i2"),
    "torch.CharStorage": (torch.int8, "|i1"),
    "torch.ByteStorage": (torch.uint8, "|u1"),
    "torch.BoolStorage": (torch.bool, "|b1"),
}
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_MOST_DIMENSIONS, _MOST_NUMBERS = 16, 1 << 40


class Storage(NamedTuple):
    """Numbers in the file, one after the other."""

    dtype: torch.dtype
    form: str  # numpy's word for their layout
    data: memoryview
    length: int


class TensorView(NamedTuple):
    """A tensor that is not made yet: a strided view whose bounds were checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.storage.form).itemsize

    def tensor(self) -> Tensor:
        """A contiguous tensor with memory of its own."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        form = np.dtype(self.storage.form)
        flat = np.frombuffer(self.storage.data, form, self.storage.length)
        strides = tuple(step * form.itemsize for step in self.stride)
        view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)
        made = torch.from_numpy(np.array(view, form.newbyteorder("="), order="C"))
        return made.view(torch.bfloat16) if self.storage.dtype is torch.bfloat16 else made


class _DType(Built):
    """numpy's description of one number."""

    def __init__(self, form: str) -> None:
        self.form = np.dtype(form)

    def build(self, state: Any) -> None:
        # (version, byte order, …): only the order can matter, and a scalar of the other order is not written here
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise Refused("describes numbers in a byte order that official files do not use")


class _Array(Built):
    """numpy's array: nothing until its state comes."""

    value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise Refused("fills an array with something that is no array's state")
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran is True else "C")


def find_value(name: str, budget: Budget) -> Maker | None:
    """What a name means in an official checkpoint, or None if it is not among the values they hold."""
    if name == "torch.storage._load_from_bytes":
        return Maker(name, lambda arguments: _storage(arguments, budget))
    return Maker(name, _MAKERS[name]) if name in _MAKERS else None


# ---- containers ----------------------------------------------------------------------------------------------------


def _dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise Refused("makes a dictionary from arguments, which no official file does")
    return {}


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    items = arguments[0] if len(arguments) == 1 else None if arguments else []
    if type(items) is not list or not all(type(item) in (str, int) for item in items):
        raise Refused("makes a set of something other than texts and integers")
    return set(items)


# ---- numpy ---------------------------------------------------------------------------------------------------------


def _dtype(arguments: tuple[Any, ...]) -> _DType:
    form = arguments[0] if arguments else None
    if form not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        kind = " (objects, which can be anything)" if form in ("O", "O8") else ""
        raise Refused(f"uses the numpy type {shown(form)}{kind}, which is no number")
    return _DType(str(form))


def _scalar(arguments: tuple[Any, ...]) -> int | float | bool:
    if len(arguments) != 2:
        raise Refused("makes a numpy scalar from something other than a type and bytes")
    value = _array(arguments[1], arguments[0], (), "C").item()
    assert isinstance(value, (int, float, bool))  # by the types that _dtype allows
    return value


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if type(dtype) is not _DType or type(data) is not memoryview or order not in ("C", "F"):
        raise Refused("makes a numpy array from something other than bytes and a type of numbers")
    if type(shape) is not tuple or len(shape) > _MOST_DIMENSIONS or not all(map(_is_count, shape)):
        raise Refused(f"gives a numpy array the shape {shown(shape)}")
    if math.prod(shape) * dtype.form.itemsize != len(data):
        raise Refused(f"gives {len(data):,} bytes to a numpy array of shape {shape} and type {dtype.form}")
    return np.frombuffer(data, dtype.form).reshape(shape, order=order)


def _empty_array(arguments: tuple[Any, ...]) -> _Array:
    if not arguments or type(arguments[0]) is not Maker or arguments[0].name != "numpy.ndarray":
        raise Refused("rebuilds an array of a class other than numpy.ndarray")
    return _Array()


def _array_of_buffer(arguments: tuple[Any, ...]) -> _Array:
    if len(arguments) != 4:
        raise Refused("makes a numpy array from something other than bytes, type, shape and order")
    made = _Array()
    made.value = _array(*arguments)
    return made


def _not_called(name: str) -> Callable[[tuple[Any, ...]], Any]:
    def refuse(_: tuple[Any, ...]) -> Any:
        raise Refused(f"calls {name}, which official files only mention")

    return refuse


# ---- torch ---------------------------------------------------------------------------------------------------------


def _storage(arguments: tuple[Any, ...], budget: Budget) -> Storage:
    """The one storage in bytes that torch.save wrote: five pickles, a count, the numbers."""
    data = arguments[0] if len(arguments) == 1 else None
    if type(data) is not memoryview:
        raise Refused("loads a tensor from something that is no bytes")
    at = 0

    def following(persistent: Callable[[Any], Any] | None = None) -> Any:
        nonlocal at
        value, used = load(data[at:], _find_storage, budget, persistent)
        at += used
        return value

    try:
        magic, version, system = following(), following(), following()
        known = type(magic) is int and magic == _LEGACY_MAGIC and type(version) is int and version == _LEGACY_VERSION
        if not known or type(system) is not dict:
            raise Refused("is not in the form that torch.save gives a storage")
        if system.get("little_endian") is not True:
            raise Refused("was written on a machine of the other byte order")
        (form, dtype, count, key), keys = following(_storage_of), following()
        if type(keys) is not list or keys != [key]:
            raise Refused("names another storage than it holds")
        (announced,) = struct.unpack("<q", data[at : at + 8])
    except Refused as refusal:
        raise Refused(f"holds a tensor whose bytes, a pickle again, are unusable: it {refusal}") from None
    except (struct.error, ValueError, TypeError):
        raise Refused("holds a tensor whose bytes are cut off") from None
    numbers = data[at + 8 :]
    if announced != count or count * np.dtype(form).itemsize != len(numbers):
        raise Refused(f"announces a tensor of {count:,} numbers ({announced:,} there) in {len(numbers):,} bytes")
    return Storage(dtype, form, numbers, count)


def _find_storage(name: str) -> Maker:
    if name in _STORAGES or name == "collections.OrderedDict":
        return Maker(name, _MAKERS.get(name) or _not_called(name))
    raise Refused(f"names {name}, which no storage needs")


def _storage_of(identity: Any) -> tuple[str, torch.dtype, int, str]:
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise Refused("has a persistent id that is no storage")
    _, maker, key, location, count, *view = identity
    if type(maker) is not Maker or maker.name not in _STORAGES or type(key) is not str or type(location) is not str:
        raise Refused("describes a storage of no known type")
    if not _is_count(count) or view not in ([], [None]):
        raise Refused(f"describes a storage of {shown(count)} numbers, or a view of one")
    dtype, form = _STORAGES[maker.name]
    return form, dtype, count, key


def _view(arguments: tuple[Any, ...]) -> TensorView:
    if len(arguments) not in (6, 7):
        raise Refused(f"rebuilds a tensor from {len(arguments)} values; there are 6")
    storage, offset, shape, stride = arguments[:4]
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise Refused("rebuilds a tensor from something other than a storage, an offset, a shape and strides")
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS or not all(map(_is_count, (offset, *shape, *stride))):
        raise Refused(f"views a storage at {shown(offset)} by {shown(shape)}, {shown(stride)}")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride))
    empty = 0 in shape
    if (last >= storage.length and not empty) or math.prod(size or 1 for size in shape) > _MOST_NUMBERS:
        raise Refused(f"views number {last:,} of a storage of {storage.length:,}: shape {shape}, strides {stride}")
    return TensorView(storage, offset, shape, stride)


def _parameter(arguments: tuple[Any, ...]) -> TensorView:
    if len(arguments) != 3 or type(arguments[0]) is not TensorView:
        raise Refused("makes a parameter of something that is no tensor")
    return arguments[0]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


_MAKERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _dict,
    "dnnlib.util.EasyDict": _dict,
    "builtins.set": _set,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_parameter": _parameter,
    "numpy.dtype": _dtype,
    "numpy.ndarray": _not_called("numpy.ndarray"),
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_of_buffer for core in ("core", "_core")},
}
