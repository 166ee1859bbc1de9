"""What a checkpoint may hold, and how: a nested state as JSON plus one safetensors file.

A state is made of dicts (keys str or int), lists, tuples, tensors, str, bool, int, float and None. All of it comes back
equal and of the same type, floats and tensors bit for bit (NaN as NaN), with these exceptions: subclasses
come back as their plain base (an OrderedDict as a dict, a Parameter as a tensor; a named tuple is refused), tensors
come back contiguous, on the CPU, without gradient, and two names of one memory come back as two tensors.

In JSON a tensor is ``{"$tensor": name}``, a tuple ``{"$tuple": [...]}``, a dict with other than plain str keys
``{"$dict": [[key, value], ...]}``, a float that JSON lacks ``{"$float": "nan"}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def encode(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor], *, copy: bool = False) -> Any:
    """A value as JSON; its tensors are collected in ``tensors`` under the name that the JSON refers to.

    Args:
        value: What to keep.
        path: Keys that lead to it, for names and messages.
        tensors: Filled in: name -> dense tensor on the CPU.
        copy: Whether tensors share no memory with those of the value.

    Raises:
        TypeError: Names the entry that cannot be kept exactly.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, path, tensors, copy)
    if isinstance(value, list):
        return [encode(item, (*path, str(index)), tensors, copy=copy) for index, item in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [encode(item, (*path, str(index)), tensors, copy=copy) for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"a checkpoint cannot keep the key {key!r} of {_where(path)}: keys are str or int")
        items = [(key, encode(item, (*path, str(key)), tensors, copy=copy)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$dict": [[key, item] for key, item in items]}
    raise TypeError(
        f"a checkpoint cannot keep {_where(path)}, a {type(value).__module__}.{type(value).__qualname__}: "
        f"make it a tensor, a number, a str, a list, a tuple or a dict"
    )


def _encode_tensor(
    value: torch.Tensor, path: tuple[str, ...], tensors: dict[str, torch.Tensor], copy: bool
) -> dict[str, str]:
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise TypeError(f"a checkpoint cannot keep {_where(path)}: only dense tensors with values")
    kind = "$tensor"
    if tensor.is_complex():
        kind = "$complex"
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"a checkpoint cannot keep {_where(path)}: dtype {tensor.dtype} has no place in safetensors")
    name = ".".join(path) or "tensor"
    # "a.b" > "c" and "a" > "b.c" are different tensors; and safetensors keeps one name for itself.
    while name in tensors or name == "__metadata__":
        name += "'"
    kept = tensor.resolve_neg().cpu().contiguous()
    shared = kept.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    tensors[name] = kept.clone() if copy and shared else kept
    return {kind: name}


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Inverse of :func:`encode`."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "$tensor":
            return tensors[content]
        if kind == "$complex":
            return torch.view_as_complex(tensors[content])
        if kind == "$float":
            return float(content)
        if kind == "$tuple":
            return tuple(decode(item, tensors) for item in content)
        if kind == "$dict":
            return {key: decode(item, tensors) for key, item in content}
    return {key: decode(item, tensors) for key, item in value.items()}


def _where(path: tuple[str, ...]) -> str:
    return f"the state's entry {' > '.join(path)!r}" if path else "the state"


def safetensors_layout(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, list[torch.Tensor]]:
    """Header of a safetensors file, and the tensors in the order in which their bytes follow it.

    The file is put together here, not by safetensors.torch.save_file, so that it is hashed and written in one pass
    without a second copy of the weights in memory, and a full disk is an OSError like any other.
    """
    # Widest first, as the format's own writer does: each tensor is then aligned to its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensors[name] for name in names]


def safetensors_chunks(header: bytes, ordered: Sequence[torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file, from what :func:`safetensors_layout` returned."""
    yield memoryview(header)
    for tensor in ordered:
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
