"""Reading a pickle that holds data only: nothing that a pickle says is imported or called."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, Final

import numpy as np

#: Types of numpy's arrays that are numbers, truth values or text.
_KINDS: Final = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())  # noqa: SIM905


class _DType:
    """Stand-in for numpy.dtype: remembers the type code and the byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else str(code)
        self.order = "|"
        text = self.code[:1] in ("U", "S") and self.code[1:].isdigit() and len(self.code) < 6
        if self.code not in _KINDS and not text:
            raise pickle.UnpicklingError(f"an array of type {self.code}")

    def __setstate__(self, state: Any) -> None:
        # Then come fields, shape and alignment, which the types above do not have.
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"the byte order {order!r}")
        self.order = order

    @property
    def type(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _NdArray:
    """Stand-in for numpy.ndarray, filled by the pickle's own state tuple."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("an array of no type")
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array without its bytes")
    raw: np.ndarray = np.frombuffer(data, dtype=dtype.type)
    return raw.reshape(tuple(int(n) for n in shape), order="F" if order == "F" else "C")


def _reconstruct(subtype: Any, shape: Any, code: Any) -> _NdArray:
    return _NdArray()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _NdArray:
    result = _NdArray()
    result.array = _array(data, dtype, shape, order)
    return result


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()].item()


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    """Protocol 2 writes Python 3's bytes as ``_codecs.encode(text, "latin1")``."""
    if codec not in ("latin1", b"latin1", "latin-1", b"latin-1"):
        raise pickle.UnpicklingError(f"the codec {codec}")
    return str(text).encode("latin1")


def _bytearray(data: Any = b"", codec: Any = "latin1") -> bytes:
    """Protocols below 5 write a bytearray as a call with its bytes, or with text and a codec."""
    if isinstance(data, bytes):
        return data
    if not isinstance(data, str):  # a number would be a length
        raise pickle.UnpicklingError("a bytearray without its bytes")
    return _encode(data, codec)


class _Frozen:
    """A callable that a pickle's BUILD instruction cannot alter."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"an assignment to {name}")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a changed function")


_NUMPY_CORE: Final = ("numpy.core.", "numpy._core.")
_ADMITTED: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _NdArray,
    ("_codecs", "encode"): _encode,
    **{(module, "bytearray"): _bytearray for module in ("builtins", "__builtin__")},
    **{(core + "multiarray", "_reconstruct"): _reconstruct for core in _NUMPY_CORE},
    **{(core + "multiarray", "scalar"): _scalar for core in _NUMPY_CORE},
    **{(core + "numeric", "_frombuffer"): _from_buffer for core in _NUMPY_CORE},
}

# Numbers, booleans, None; bytes and text; tuples and lists; the stack, the memo, the frame of the
# program; and for numpy's arrays a name, a call and a state.
_OPERATIONS: Final = frozenset(
    """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT NONE NEWTRUE NEWFALSE
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 MARK
    POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE PROTO FRAME STOP
    GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()  # noqa: SIM905
)


def _check_program(data: bytes) -> None:
    """Read a pickle's operations without carrying them out; UnpicklingError for a foreign one."""
    count = 0
    for count, (operation, argument, _) in enumerate(pickletools.genops(data), 1):
        if operation.name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"the operation {operation.name}")
        # The memo is an array: storing at 4 billion would take the memory of so many entries.
        stores = operation.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if stores and argument is not None and not 0 <= argument <= count:
            raise pickle.UnpicklingError(f"a reference numbered {argument}")


class _DataUnpickler(pickle.Unpickler):
    """Builds tuples, lists, bytes, booleans, numbers, strings and plain arrays; nothing else.

    Every global that a pickle names is looked up in a closed table of stand-ins defined above, so
    a pickle imports nothing and calls no function but those; numpy itself is not reached either.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _Frozen(_ADMITTED[module, name])
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module!r}.{name!r}") from None


def loads(data: bytes) -> Any:
    """The value of a pickle of protocol 0 to 5, Python 2's included.

    Raises:
        pickle.UnpicklingError: it is more than data; the message names what is not.
        Exception: it is damaged, which can fail in any operation of the machine.
    """
    _check_program(data)
    # Python 2 stored bytes as `str`, which only "bytes" keeps whole.
    return _plain(_DataUnpickler(io.BytesIO(data), encoding="bytes").load())


def _plain(value: Any, depth: int = 0) -> Any:
    """``value`` with arrays in the place of their stand-ins, in itself and its parts."""
    if isinstance(value, _NdArray):
        if value.array is None:
            raise pickle.UnpicklingError("an array without its bytes")
        return value.array
    if depth < 2 and isinstance(value, list | tuple):
        return [_plain(part, depth + 1) for part in value]
    return value
