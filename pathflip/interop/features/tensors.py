"""Tensors in .pt files of PyTorch, read without executing anything of them.

``torch.save`` writes a zip: a pickle that says how to put the object together, and the bytes of
each tensor. A pickle is a program, and unpickling runs it. Here its instructions are only looked at
(``pickletools.genops`` takes them apart and runs none), and only those that describe plain tensors,
and lists and dictionaries of them, are understood; anything else is refused by name. The numbers
are then read from their place in the zip as bytes, without torch.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.interop.features.record import FeatureFile, check_shape, reading, unusable

MAGIC = b"PK\x03\x04"
_PICKLE_BYTES = 1 << 20
"""Size of a pickle that describes tensors; one of a thousand has 100 kB."""
_ITEMS = 100_000
_LOCAL_HEADER = 30
_STORAGES = {
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "BFloat16Storage": "bf16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}
_FEATURE_KEYS = ("features", "feats", "embeddings", "feature", "x")
_COORDINATE_KEYS = ("coords", "coordinates")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor in a file, not read yet.

    Attributes:
        dtype: numpy's name of its numbers; ``bf16`` for bfloat16.
        offset: Its first byte in the file.
        shape: Its shape; rows lie one behind another.
    """

    dtype: str
    offset: int
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of a number."""
        return 2 if self.dtype == "bf16" else np.dtype(self.dtype).itemsize


def read_tensors(path: Path, slide: str) -> list[FeatureFile]:
    """Return the features that a .pt file holds: a tensor [n, d], or a dictionary with one.

    Raises:
        SlideError: The file is damaged (``unreadable``), or holds anything but plain tensors
            (``unsupported``).
    """
    with reading(path):
        found = load_tensors(path)
    coordinates: Tensor | None = None
    if isinstance(found, dict):
        features = next((found[key] for key in _FEATURE_KEYS if key in found), None)
        held = next((found[key] for key in _COORDINATE_KEYS if key in found), None)
        coordinates = held if isinstance(held, Tensor) and len(held.shape) == 2 else None
    else:
        features = found
    if not isinstance(features, Tensor):
        raise unusable(
            path,
            "holds no tensor of features",
            hint="It should hold a tensor [patches, width], or a dictionary with features.",
            code="unsupported",
        )
    shape = features.shape
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) == 1:
        return []  # the vector of a whole slide
    if len(shape) == 3:  # slide2vec: regions of patches
        shape = (shape[0] * shape[1], shape[2])
    if len(shape) != 2:
        raise unusable(path, f"holds a tensor of shape {features.shape}", code="unsupported")
    n, dim = shape
    check_shape(
        path, n=n, dim=dim, coordinates=None if coordinates is None else coordinates.shape[0]
    )
    flat = Tensor(dtype=features.dtype, offset=features.offset, shape=(n, dim))
    return [
        FeatureFile(
            path=path,
            format="pt",
            slide=slide,
            n=n,
            dim=dim,
            read=partial(_rows, path, flat),
            coordinates=None if coordinates is None else partial(_places, path, coordinates),
        )
    ]


def load_tensors(path: Path) -> Any:
    """Return the object of a .pt file with :class:`Tensor` in place of its tensors.

    Raises:
        SlideError: It is not one of torch 1.6 or later, or not of plain tensors (``unsupported``).
        ValueError, BadZipFile: It is damaged.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise unusable(
                path,
                "is no .pt file of PyTorch 1.6 or later",
                hint="Load it where it was made and save it again: torch.save(tensor, file).",
                code="unsupported",
            )
        with zipfile.ZipFile(file) as archive:
            names = {info.filename: info for info in archive.infolist()}
            main = next((name for name in names if name.endswith("/data.pkl")), None)
            if main is None or names[main].file_size > _PICKLE_BYTES:
                raise unusable(path, "holds no tensors of PyTorch", code="unsupported")
            root = main[: -len("data.pkl")]
            order = names.get(f"{root}byteorder")
            if order is not None and archive.read(order)[:8].strip() != b"little":
                raise unusable(path, "was written big-endian", code="unsupported")
            program = archive.read(main)

            def offset_of(key: str, size: int) -> int:
                info = names[f"{root}data/{key}"]
                if info.compress_type != zipfile.ZIP_STORED or info.file_size < size:
                    raise ValueError(f"the numbers of tensor {key} are not all there")
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER)
                # The lengths of name and extra field, which differ from those of the directory.
                name, extra = np.frombuffer(header, "<u2", 2, 26)
                return info.header_offset + _LOCAL_HEADER + int(name) + int(extra)

            return _described(path, program, offset_of)


class _Mark:
    """Mark on the stack of a pickle."""


@dataclass(frozen=True)
class _Name:
    """Global that a pickle names; it is never looked up."""

    name: str


def _described(path: Path, program: bytes, offset_of: Callable[[str, int], int]) -> Any:
    """Follow the description of plain tensors; see the module."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    mark = _Mark()

    def since_mark() -> list[Any]:
        at = len(stack) - 1 - stack[::-1].index(mark)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        name = opcode.name
        if count > _ITEMS:
            raise unusable(path, "holds too many objects", code="unsupported")
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name == "MARK":
            stack.append(mark)
        elif name in ("GLOBAL", "INST"):
            stack.append(_Name(str(argument).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            member, module = stack.pop(), stack.pop()
            stack.append(_Name(f"{module}.{member}"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in _TUPLES:
            items = stack[-_TUPLES[name] :]
            del stack[-_TUPLES[name] :]
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            added = [stack.pop()] if name == "APPEND" else since_mark()
            _of(list, stack[-1]).extend(added)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
            _of(dict, stack[-1]).update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[_of(int, argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[_of(int, argument)])
        elif name == "BINPERSID":
            stack.append(("storage", *_of(tuple, stack.pop())))
        elif name == "REDUCE":
            arguments, function = _of(tuple, stack.pop()), stack.pop()
            stack.append(_made(path, function, arguments, offset_of))
        elif name == "BUILD" and not stack.pop():
            continue
        else:
            raise unusable(
                path,
                f"holds more than tensors (the pickle instruction {name})",
                hint="Save the tensor alone: torch.save(features, file).",
                code="unsupported",
            )
    raise ValueError("its description does not end")


def _made(
    path: Path,
    function: Any,
    arguments: tuple[Any, ...],
    offset_of: Callable[[str, int], int],
) -> Any:
    """Return what a call in the description stands for; only three are understood."""
    name = function.name if isinstance(function, _Name) else "?"
    if name == "collections.OrderedDict" and not arguments:
        return {}
    if name == "torch._utils._rebuild_parameter":
        return arguments[0]
    if name != "torch._utils._rebuild_tensor_v2":
        raise unusable(
            path,
            f"asks for {name}, which is not executed",
            hint="Save the tensor alone: torch.save(features, file).",
            code="unsupported",
        )
    storage, start, shape, strides = arguments[:4]
    kind, key = storage[2].name.rpartition(".")[2], str(storage[3])
    if storage[:2] != ("storage", "storage") or kind not in _STORAGES:
        raise unusable(path, f"holds numbers of the kind {kind}", code="unsupported")
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    if min((*shape, int(start), *strides), default=0) < 0:
        raise ValueError("a tensor has a negative size")
    expected = tuple(int(np.prod(shape[at + 1 :], dtype=object)) for at in range(len(shape)))
    if strides != expected and all(size > 1 for size in shape):
        raise unusable(
            path,
            "holds a view of another tensor",
            hint="Save a copy: torch.save(features.contiguous().clone(), file).",
            code="unsupported",
        )
    tensor = Tensor(dtype=_STORAGES[kind], offset=0, shape=shape)
    size = int(np.prod(shape, dtype=object))
    at = offset_of(key, (int(start) + size) * tensor.item_bytes)
    return Tensor(dtype=tensor.dtype, offset=at + int(start) * tensor.item_bytes, shape=shape)


def _of(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError("its description is damaged")
    return value


_CONSTANTS: Mapping[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}
_VALUES = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "INT", "LONG",
        "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE",
        "BINBYTES", "SHORT_BINBYTES", "SHORT_BINSTRING", "BINSTRING",
    }
)  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _rows(path: Path, tensor: Tensor, start: int, stop: int) -> NDArray[Any]:
    """Read rows [stop - start, d] of a tensor [n, d]."""
    width = tensor.shape[1]
    with reading(path):
        stored = "<u2" if tensor.dtype == "bf16" else tensor.dtype
        flat = np.fromfile(
            path,
            stored,
            count=(stop - start) * width,
            offset=tensor.offset + start * width * tensor.item_bytes,
        )
        rows = flat.reshape(stop - start, width)
    if tensor.dtype == "bf16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows


def read_vector(path: Path, tensor: Tensor) -> NDArray[Any]:
    """Read a tensor [d], or one whose other sizes are 1."""
    flat = Tensor(dtype=tensor.dtype, offset=tensor.offset, shape=(1, tensor.shape[-1]))
    return _rows(path, flat, 0, 1).reshape(-1)


def _places(path: Path, tensor: Tensor) -> NDArray[np.float64]:
    return np.asarray(_rows(path, tensor, 0, tensor.shape[0])[:, :2], np.float64)
