"""The pickle inside a PyTorch file, read and written as plain data.

A pickle is a program whose instructions may import and call anything. `loads` is an interpreter of
its own for the few instructions with which torch.save writes dictionaries, numbers, texts and
tensors. It imports nothing and calls nothing by name: the names that may occur stand in the tables
below, and whatever else a pickle asks for is refused before anything of it is done.

Source: Python's `pickletools` (instructions); torch `_utils.py`, `serialization.py` (names).
"""

import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}

_DICTIONARY = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_NAMES = {
    *(f"torch {name}" for name in STORAGES),
    _TENSOR,
    "torch._utils _rebuild_parameter",
    _DICTIONARY,
    # A number of NumPy's, such as a loss kept beside the weights, and what it is described by.
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
    "numpy dtype",
    "_codecs encode",
}
_SCALAR_DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
MOST_AXES = 64  # of an array of NumPy

Kind = type | tuple[type, ...]


class Storage(NamedTuple):
    """A block of `count` numbers that lies elsewhere, under `key`."""

    key: str
    dtype: np.dtype
    count: int


class View(NamedTuple):
    """A tensor: numbers of a storage from `offset` on, `strides` apart, all counted in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(str):
    """One of the names in `_NAMES`: a word, not the thing it names."""


def loads(data: bytes, make_tensor: Callable[[View], np.ndarray]) -> Any:
    """The dictionaries, lists, tuples, numbers and texts of a pickle that torch.save wrote.

    Args:
      data: the pickle, of protocol 2.
      make_tensor: gives the array of each tensor, whose view lies within its storage.

    Raises:
      ValueError: what is wrong with the pickle, or that it asks for more than data.
    """
    machine = _Machine(make_tensor)
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name == "STOP":
            return machine.pop(object)
        machine.run(instruction.name, argument)
    raise ValueError("its pickle has no end")


def dumps(content: Mapping[str, Any]) -> tuple[bytes, list[np.ndarray]]:
    """The pickle that torch.load reads as `content`, and the arrays of its storages "0", "1", ...

    Args:
      content: dictionaries of texts, numbers, None and arrays.

    Raises:
      TypeError: something else is in it.
    """
    arrays: list[np.ndarray] = []
    return pickle.PROTO + b"\x02" + _dump(content, arrays) + pickle.STOP, arrays


class _Machine:
    """The stack machine that a pickle is a program for."""

    def __init__(self, make_tensor: Callable[[View], np.ndarray]):
        self._make_tensor = make_tensor
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, instruction: str, argument: Any) -> None:
        """Carries out one instruction, or raises a ValueError."""
        push = self._stack.append
        match instruction:
            case "PROTO":
                pass
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(instruction == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                push(argument)
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_LIST":
                push([])
            case "EMPTY_DICT":
                push({})
            case "MARK":
                self._marks.append(len(self._stack))
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(reversed([self.pop(object) for _ in range(int(instruction[-1]))])))
            case "APPEND":
                last = self.pop(object)
                self._top(list).append(last)
            case "APPENDS":
                rest = self._pop_to_mark()
                self._top(list).extend(rest)
            case "SETITEM":
                value, key = self.pop(object), self.pop(object)
                self._set(key, value)
            case "SETITEMS":
                pairs = self._pop_to_mark()
                for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                    self._set(key, value)
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top(object)
            case "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise ValueError("its pickle refers to something that it has not made")
                push(self._memo[argument])
            case "GLOBAL":
                if argument not in _NAMES:
                    raise ValueError(
                        f"its pickle asks for {argument.replace(' ', '.')[:80]!r}, which is no "
                        "part of a state dict; it was not run"
                    )
                push(_Name(argument))
            case "BINPERSID":
                push(_storage(self.pop(tuple)))
            case "REDUCE":
                arguments, name = self.pop(tuple), self.pop(_Name)
                push(self._call(name, arguments))
            case "BUILD":  # version numbers of a state dict, byte order of a dtype
                attributes = self.pop(object)
                if not (isinstance(self._top((dict, np.dtype)), dict) or _is_native(attributes)):
                    raise ValueError("its pickle holds a number of NumPy's in an unknown form")
            case _:
                raise ValueError(
                    f"its pickle uses the instruction {instruction}, which torch.save has no need "
                    "of for a state dict; it was not run"
                )

    def pop(self, kind: Kind) -> Any:
        """Takes the last value off the stack."""
        value = self._top(kind)
        self._stack.pop()
        return value

    def _top(self, kind: Kind) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("its pickle is malformed: a value is missing")
        if not isinstance(self._stack[-1], kind):
            found = type(self._stack[-1]).__name__
            raise ValueError(f"its pickle is malformed: a {found} where it cannot be")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("its pickle is malformed: a mark is missing")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _set(self, key: Any, value: Any) -> None:
        # Hashing anything else could run deep into nested tuples.
        if type(key) not in (str, int):
            raise ValueError(f"its pickle has a {type(key).__name__} as key of a dictionary")
        self._top(dict)[key] = value

    def _call(self, name: _Name, arguments: tuple[Any, ...]) -> Any:
        match name, arguments:
            case "collections OrderedDict", ():
                return {}
            case "torch._utils _rebuild_parameter", (np.ndarray() as tensor, _, _):
                return tensor
            case "torch._utils _rebuild_tensor_v2", (_, _, _, _, _, _, *flags) if len(flags) <= 1:
                # The fifth and sixth are about gradients, the flags about signs to be turned.
                if any(flag is not None and flag != {} for flag in flags):
                    raise ValueError("it holds a view with other signs; save it as plain tensors")
                return self._make_tensor(_view(*arguments[:4]))
            case "_codecs encode", (str() as text, "latin1"):
                return text.encode("latin1")
            case "numpy dtype", (str() as code, *_) if code in _SCALAR_DTYPES:
                return np.dtype(f"<{code}")
            case "numpy.core.multiarray scalar" | "numpy._core.multiarray scalar", (
                np.dtype() as dtype,
                bytes() as data,
            ) if len(data) == dtype.itemsize:
                return np.frombuffer(data, dtype)[0].item()
        raise ValueError(f"its pickle calls '{name.replace(' ', '.')}' in an unknown way")


def _storage(identity: tuple[Any, ...]) -> Storage:
    """The storage that torch.save called ("storage", its type, key, device, count)."""
    match identity:
        case ("storage", _Name() as name, str() as key, str(), int() as count):
            kind = name.removeprefix("torch ")
            if kind in STORAGES and key.isascii() and key.isdigit() and count >= 0:
                return Storage(key, STORAGES[kind], count)
    raise ValueError("its pickle names a storage in an unknown way")


def _is_native(state: Any) -> bool:
    """Whether the state of a dtype is that of plain numbers, the least byte first."""
    return isinstance(state, tuple) and state[1:] in (
        (order, None, None, None, -1, -1, 0) for order in "<|"
    )


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    """A view that was found to lie within its storage."""
    match storage, shape, strides:
        case Storage(), tuple(), tuple() if len(shape) == len(strides) <= MOST_AXES:
            numbers = (offset, *shape, *strides)
        case _:
            raise ValueError("its pickle describes a tensor in an unknown way")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("its pickle describes a tensor in an unknown way")
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # More numbers than there are: a few bytes could ask for any amount of memory.
    if count > storage.count or (count and last >= storage.count):
        raise ValueError(
            f"it describes a tensor of shape {shape} that reaches beyond its storage of "
            f"{storage.count} numbers"
        )
    return View(storage, offset, shape, strides)


def _dump(value: Any, arrays: list[np.ndarray]) -> bytes:
    """The instructions that leave `value` on the stack; its arrays are added to `arrays`."""
    match value:
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            number = pickle.encode_long(value)
            return pickle.LONG1 + struct.pack("<B", len(number)) + number
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            text = value.encode()
            return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
        case Mapping():
            pairs = (_dump(each, arrays) for pair in value.items() for each in pair)
            return pickle.EMPTY_DICT + pickle.MARK + b"".join(pairs) + pickle.SETITEMS
        case tuple():
            return pickle.MARK + b"".join(_dump(each, arrays) for each in value) + pickle.TUPLE
        case np.ndarray() if value.dtype in STORAGE_OF:
            return _dump_tensor(value, arrays)
    raise TypeError(f"torch.load could not read a {type(value).__name__} ({value!r:.40})")


def _dump_tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    key = str(len(arrays))
    arrays.append(array)
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    identity = (
        _dump("storage", arrays)
        + _dump_name(f"torch {STORAGE_OF[array.dtype]}")
        + b"".join(_dump(each, arrays) for each in (key, "cpu", array.size))
    )
    storage = pickle.MARK + identity + pickle.TUPLE + pickle.BINPERSID
    rest = b"".join(_dump(each, arrays) for each in (0, array.shape, strides, False))
    hooks = _dump_name(_DICTIONARY) + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = pickle.MARK + storage + rest + hooks + pickle.TUPLE
    return _dump_name(_TENSOR) + arguments + pickle.REDUCE


def _dump_name(name: str) -> bytes:
    return pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n"
