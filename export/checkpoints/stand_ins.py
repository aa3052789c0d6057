"""Pickles without their code: only descriptions of tensors come out of one, all else becomes an inert stand-in.

Nothing of a file is imported, called or made. A global name in the pickle is looked up in the small table below; a
name that is not
there becomes a class of its own that takes any arguments and does nothing. So a training script's options, learning
rates, dates or
config objects beside the weights do not block, and a hostile pickle has nothing to call.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

# Names of torch's storage classes in a pickle, and of its dtypes.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
DTYPES = (*STORAGES.values(), "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "complex64", "complex128")
LARGEST_PICKLE = 256 * 2**20  # bytes; a pickle without its tensors is some hundred kB


class Inert:
    """Stands for a value of a foreign class, of which it keeps the name and what was put in as data."""

    __slots__ = ("entries", "state")
    name = "object"

    def __new__(cls, *arguments, **options):
        value = object.__new__(cls)
        value.entries, value.state = {}, None
        return value

    def __init__(self, *arguments, **options):
        pass

    def __call__(self, *arguments, **options):
        return Inert()

    def __setitem__(self, key, value):
        self.entries[key] = value

    def __setstate__(self, state):
        self.state = state

    def append(self, value):
        """Takes a value and forgets it."""

    extend = add = update = append


@dataclass(frozen=True, slots=True)
class Dtype:
    """An element type by torch's name, e.g. "float32"; stands for a storage class too."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes in the file. key: the file's name of them. dtype: of one element. start: first byte, for a view of a
    storage."""

    key: str
    dtype: str
    n: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the pickle describes it: offset, size and stride count elements of its storage."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Mapping(dict):
    """A dictionary whose attributes (a state dict's _metadata) are left out."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class Function:
    """A call of the pickle that is understood: one of torch's ways to write a tensor down."""

    __slots__ = ("call",)

    def __init__(self, call: Callable):
        object.__setattr__(self, "call", call)

    def __call__(self, *arguments):
        return self.call(*arguments)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError("the pickle changes a function")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("the pickle changes a function")


def _integers(values) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(type(v) is int and 0 <= v < 2**62 for v in values):
        raise pickle.UnpicklingError("a tensor's size or stride is no list of counts")
    return tuple(values)


def _tensor(storage, offset, size, stride, *rest, dtype: Dtype | None = None):
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor has no storage")
    size, stride = _integers(size), _integers(stride)
    if len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor's size and stride differ in length")
    return Tensor(storage, dtype.name if dtype else storage.dtype, *_integers([offset]), size, stride)


def _typed_tensor(storage, offset, size, stride, gradient, hooks, dtype, *rest):
    return _tensor(storage, offset, size, stride, dtype=dtype if isinstance(dtype, Dtype) else None)


def _subclass(function, cls, arguments, state):
    plain = isinstance(cls, type) and issubclass(cls, Inert) and cls.name in PLAIN
    return function(*arguments) if plain and isinstance(function, Function) else Inert()


def _reconstructed(cls, *rest):
    return cls() if isinstance(cls, type) and issubclass(cls, Inert) else Inert()


PLAIN = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
FUNCTIONS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": lambda size=(): tuple(size),
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
}
UNSUPPORTED = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)


class Unpickler(pickle._Unpickler):
    """Python's own unpickler with nothing behind its names.

    The one written in Python, for its memo is a dictionary: the one in C makes room for any index that a hostile file
    names.
    """

    dispatch = {
        code: act for code, act in pickle._Unpickler.dispatch.items() if code not in [c[0] for c in UNSUPPORTED]
    }

    def __init__(self, file: BinaryIO, storage: Callable | None = None):
        super().__init__(file, encoding="latin1")
        self.storage = storage
        self.classes: dict[str, type] = {}

    def find_class(self, module, name):
        """What stands for a global name of the pickle."""
        full = f"{module}.{name}"
        if full in FUNCTIONS:
            return Function(FUNCTIONS[full])
        if full in ("collections.OrderedDict", "collections.defaultdict"):
            return Function(lambda *arguments: Mapping())
        if module in ("torch", "torch.storage") and name in STORAGES:
            return Dtype(STORAGES[name])
        if module == "torch" and name in DTYPES:
            return Dtype(name)
        if full not in self.classes:
            self.classes[full] = type("Inert", (Inert,), {"__slots__": (), "name": full[:200]})
        return self.classes[full]

    def persistent_load(self, pid):
        """A storage that the pickle refers to."""
        if self.storage is None:
            raise pickle.UnpicklingError("a reference outside the pickle")
        return self.storage(pid)


def storage_of(pid) -> Storage:
    """The storage a persistent id of torch.save names: ("storage", class, key, device, elements[, view])."""
    if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module":
        return pid[1]
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Dtype):
        raise pickle.UnpicklingError("a storage of an unknown kind")
    (n,) = _integers([pid[4]])
    start = 0
    if len(pid) > 5 and pid[5] is not None:  # (key, offset, elements) of a view, in files of torch before 1.0
        _, start, n = pid[5]
        start, n = _integers([start, n])
    return Storage(str(pid[2]), pid[1].name, n, start)


def unpickle(file: BinaryIO, storage: Callable | None = None):
    """The data in one pickle, with stand-ins for all else.

    Args:
        file: at the pickle's first byte; it is left behind its last one.
        storage: what a persistent id becomes; without it none may occur.
    Raises:
        pickle.UnpicklingError: the bytes are no pickle, damaged, or do what no file of weights does.
    """
    try:
        return Unpickler(file, storage).load()
    except pickle.UnpicklingError:
        raise
    except RecursionError:
        raise pickle.UnpicklingError("nested too deeply") from None
    except Exception:  # any opcode of a damaged file may fail in any way
        raise pickle.UnpicklingError("damaged or cut; copy or download it again") from None
