"""A pickle read as data: no import, no call, no object of a class that the file names.

torch's checkpoints keep their structure in a pickle, which is a program for a small stack machine. Run by `pickle`, it
may import and call anything; torch's own restricted reader still calls constructors and allocates what it is asked
for. Here the program is stepped through by `pickletools.genops`, which only decodes, and each of the few instructions
that a checkpoint needs is given a meaning of its own: dicts, lists, tuples and plain values are what they are, and the
names that may occur (tensors' rebuild functions, storages, `OrderedDict`, `argparse.Namespace`, ...) each stand for a
function in this file. A tensor comes out as a `TensorSpec`: which bytes, in which shape. Any other name is refused,
and told to the user.

The length of the program and the number of its steps are bounded; nothing here is recursive.
"""

from __future__ import annotations

import math
import mmap
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, cast

import torch

from visformer.conversion.containers import MAX_DIMENSIONS, check_shape, shown
from visformer.errors import UsageError

MAX_PICKLE_BYTES = 16 << 20
MAX_STEPS = 400_000
"""A tensor takes 33: this is seven times a training state of 350 with EMA weights, moments and counters."""

CANNOT_RUN = "load it where you trust it, keep its dict of tensors (`model.state_dict()`) and torch.save that alone"


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of `numel` values of `dtype`, kept in the file under `key`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorSpec:
    """A tensor that is not made yet: `offset` and `stride` count values of `dtype` in the storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Namespace:
    """The attributes of an `argparse.Namespace`."""

    attributes: dict


@dataclass(frozen=True, slots=True, eq=False)
class _Name:
    """A name of code, which is looked at and never imported."""

    full: str


_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}
_STORAGE_DTYPES = {
    f"{module}.{kind}Storage": dtype
    for kind, dtype in _STORAGES.items()
    for module in ("torch", "torch.cuda", "torch.storage")
}
_DTYPES = {
    str(dtype): dtype
    for dtype in (*_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
}
_STRANGE = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without content (on the meta device)",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
    **{f"torch.{name}Storage": "a quantised tensor" for name in ("QInt8", "QInt32", "QUInt8", "QUInt4x2", "QUInt2x4")},
}


class Window:
    """The bytes of a memory map from `start` to `stop`, as a stream of which no more is copied than is read."""

    def __init__(self, data: mmap.mmap, start: int, stop: int):
        self.data, self.at, self.stop = data, start, min(stop, len(data))

    def tell(self) -> int:
        return self.at

    def read(self, count: int) -> bytes:
        start, self.at = self.at, min(self.at + count, self.stop)
        return self.data[start : self.at]

    def readline(self) -> bytes:
        found = self.data.find(b"\n", self.at, self.stop)
        return self.read((self.stop if found < 0 else found + 1) - self.at)


def read_pickle(stream: Window) -> Any:
    """The value of the pickle at the stream's position, which afterwards is behind it.

    Values: None, bool, int, float, str, bytes, list, tuple, dict (string and number keys), `Namespace`, `TensorSpec`,
    `torch.dtype`. They may share parts and contain themselves. Raises `UsageError` (without the file's name) for code,
    for anything beyond the limits and for what is damaged.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], stream))):
            if count >= MAX_STEPS:
                raise UsageError(
                    f"its pickle has more than {MAX_STEPS} steps, so it is no image classifier's checkpoint"
                )
            machine.step(opcode.name, argument)
    except UsageError:
        raise
    except (ValueError, OverflowError) as error:  # what genops raises for an unknown opcode or a sudden end
        raise _damaged(str(error)) from error
    return machine.result()


def _damaged(what: str) -> UsageError:
    return UsageError(f"its pickle is damaged ({shown(what)}); fetch it again or save it again")


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSHED:
            self.stack.append(argument)
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name == "INST":
            self.name(argument.replace(" ", "."))
            raise _code(argument.replace(" ", "."))
        else:
            raise UsageError(f"its pickle uses {name}, which no checkpoint needs; {CANNOT_RUN}")

    def result(self) -> Any:
        if len(self.stack) != 1 or self.marked or isinstance(self.stack[0], _Name | Storage):
            raise _damaged("it does not end in one value")
        return self.stack[0]

    def pop(self, kind: type | tuple[type, ...] = object) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise _damaged("a value of another kind was expected")
        return self.stack.pop()

    def top(self, kind: type | tuple[type, ...]) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise _damaged("a value of another kind was expected")
        return self.stack[-1]

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        if not self.marked:
            raise _damaged("a mark is missing")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def tuple_of_marked(self) -> None:
        items = self.pop_to_mark()
        self.stack.append(tuple(items))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise _damaged("a value is missing")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise _damaged("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, float, bool, type(None)):  # hashing a deep tuple would be recursive
                raise _damaged("a dict's key is neither a text nor a number")
            target[key] = value

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top(object)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise _damaged("it refers to a value that is not there")
        self.stack.append(self.memo[index])

    def name(self, full: str) -> None:
        full = full.replace("__builtin__.", "builtins.", 1)  # as Python 2 and protocol 2 have it
        if full in _STRANGE:
            raise UsageError(f"it holds {_STRANGE[full]}, where plain dense tensors are needed; convert it in torch")
        if full in _DTYPES:
            self.stack.append(_DTYPES[full])
        elif full in _CALLS or full in _STORAGE_DTYPES or full == "argparse.Namespace":
            self.stack.append(_Name(full))
        else:
            raise _code(full)

    def call(self) -> None:
        arguments, function = self.pop(tuple), self.pop(_Name)
        if function.full not in _CALLS:
            raise _damaged(f"{function.full} is called")
        self.stack.append(_CALLS[function.full](arguments))

    def new_object(self) -> None:
        arguments, function = self.pop(tuple), self.pop(_Name)
        if function.full != "argparse.Namespace" or arguments:
            raise _damaged(f"{function.full} is made")
        self.stack.append(Namespace({}))

    def build(self) -> None:
        """Attributes: those of a Namespace are kept, those of a dict (a state dict's `_metadata`) are not needed."""
        state, target = self.pop(dict), self.top((dict, Namespace))
        if isinstance(target, Namespace):
            target.attributes = state


def _code(full: str) -> UsageError:
    return UsageError(f"it holds code ({shown(full)}), which is never run; {CANNOT_RUN}")


def _integers(value: Any, count: int | None = None) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS or any(type(item) is not int for item in value):
        raise _damaged("sizes are not a few whole numbers")
    if count is not None and len(value) != count:
        raise _damaged("sizes are missing")
    return value


def _storage(identity: tuple) -> Storage:
    """What a persistent id stands for: ("storage", type, key, device, number of values[, view of another])."""
    if len(identity) == 6 and identity[5] is None:  # as files before torch 1.6 have it
        identity = identity[:5]
    if len(identity) != 5 or identity[0] != "storage" or not isinstance(identity[1], _Name):
        raise _damaged("a storage is described in an unknown way")
    _, kind, key, _, numel = identity
    if kind.full not in _STORAGE_DTYPES or type(key) is not str or type(numel) is not int or numel < 0:
        raise _damaged("a storage is described in an unknown way")
    return Storage(key, _STORAGE_DTYPES[kind.full], numel)


def _rebuild_tensor(arguments: tuple) -> TensorSpec:
    """torch's `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])`."""
    if len(arguments) not in (4, 6, 7) or not isinstance(arguments[0], Storage):
        raise _damaged("a tensor without a storage")
    if len(arguments) == 7 and arguments[6]:
        raise UsageError("it holds a conjugated or negated view, where plain tensors are needed; convert it in torch")
    return _spec(arguments[0], arguments[0].dtype, *arguments[1:4])


def _rebuild_typed_tensor(arguments: tuple) -> TensorSpec:
    """torch's `_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])`."""
    if len(arguments) not in (7, 8) or not isinstance(arguments[0], Storage):
        raise _damaged("a tensor without a storage")
    if not isinstance(arguments[6], torch.dtype) or (len(arguments) == 8 and arguments[7]):
        raise UsageError("it holds a tensor of an unknown kind, where plain tensors are needed; convert it in torch")
    return _spec(arguments[0], arguments[6], *arguments[1:4])


def _spec(storage: Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> TensorSpec:
    """A tensor whose values all lie in the storage and none twice."""
    shape = _integers(size)
    strides = _integers(stride, len(shape))
    (first,) = _integers((offset,))
    check_shape("a tensor", shape)
    if first < 0 or any(step < 0 for step in strides):
        raise _damaged("a tensor outside its storage")
    if math.prod(shape):
        last = 0
        for step, length in sorted((step, length) for step, length in zip(strides, shape, strict=True) if length > 1):
            if step <= last:
                raise UsageError(
                    "it holds a tensor whose values overlap (an expanded view); save a contiguous copy of it"
                )
            last += step * (length - 1)
        if (first + last + 1) * dtype.itemsize > storage.numel * storage.dtype.itemsize:
            raise _damaged("a tensor reaches past its storage")
    return TensorSpec(storage, dtype, first, shape, strides)


def _parameter(arguments: tuple) -> TensorSpec:
    if arguments and isinstance(arguments[0], TensorSpec):
        return arguments[0]
    raise _damaged("a parameter without a tensor")


def _dict(arguments: tuple) -> dict:
    """`OrderedDict()`, filled later; `Counter(dict)`. Nothing is copied, or a short file could ask for much work."""
    if not arguments:
        return {}
    if len(arguments) == 1 and isinstance(arguments[0], dict):
        return arguments[0]
    raise _damaged("a dict is made in an unknown way")


def _sole(kind: type) -> Callable[[tuple], Any]:
    """A wrapper around one value of `kind` stands for the value."""

    def take(arguments: tuple) -> Any:
        if len(arguments) != 1 or not isinstance(arguments[0], kind):
            raise _damaged(f"a {kind.__name__} was expected")
        return arguments[0]

    return take


def _device(arguments: tuple) -> str:
    parts = [str(item) for item in arguments[:2] if (type(item) is str and len(item) < 32) or type(item) is int]
    if not parts or len(parts) != len(arguments):
        raise _damaged("a device without a name")
    return ":".join(parts)


_CALLS: dict[str, Callable[[tuple], Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "torch.Size": _sole(tuple),
    "torch.device": _device,
    "builtins.set": _sole(list),
}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"}
_PUSHED = _NUMBERS | _TEXTS
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: machine.tuple_of_marked(),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "BINPUT": lambda machine, index: machine.put(index),
    "LONG_BINPUT": lambda machine, index: machine.put(index),
    "MEMOIZE": lambda machine, _: machine.put(None),
    "BINGET": lambda machine, index: machine.get(index),
    "LONG_BINGET": lambda machine, index: machine.get(index),
    "GLOBAL": lambda machine, full: machine.name(full.replace(" ", ".")),
    "STACK_GLOBAL": lambda machine, _: machine.name(".".join([machine.pop(str), machine.pop(str)][::-1])),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.new_object(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.stack.append(_storage(machine.pop(tuple))),
}
