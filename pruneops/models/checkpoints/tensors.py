"""Tensors on disk: reads safetensors and .bin files, whole or in shards; writes safetensors tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The files that a checkpoint keeps its tensors in, best first: an index of shards, or everything in one file.
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read when asked for.

    Attributes
    ----------
    shape : tuple of int
    dtype : torch.dtype
    file : Path
        Where it comes from.
    read : callable
        ``read() -> Tensor`` of that shape and dtype on the CPU, mapped from the file where the format allows it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name, in the order of its files; nothing but headers is read.

    Raises
    ------
    ValueError
        If the folder has no tensors, a shard that its index names is missing or cannot be read, or a shard lacks a
        tensor that the index promises.
    """
    for name in _INDEX_FILES:
        if (folder / name).is_file():
            return _read_shards(folder, name)
    for name in _SINGLE_FILES:
        if (folder / name).is_file():
            return _read_file(folder / name, _Pickles())
    raise ValueError(f"checkpoint: {folder} has no weights, expected one of {', '.join(_INDEX_FILES + _SINGLE_FILES)}")


def _read_shards(folder: Path, index: str) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise ValueError(f"checkpoint: {folder / index} is not an index of shards") from None
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"checkpoint: {len(missing)} of {len(files)} shards are missing from {folder}: {', '.join(missing)}"
        )
    pickles = _Pickles()
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        tensors.update(_read_file(folder / name, pickles))
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise ValueError(f"checkpoint: {index} names tensors that its shards do not hold: {shorten(lost)}")
    return tensors


def _read_file(path: Path, pickles: _Pickles) -> dict[str, StoredTensor]:
    try:
        return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path, pickles)
    except ValueError:
        raise
    except Exception as error:  # the readers raise whatever a broken file makes them trip over
        raise ValueError(f"checkpoint: cannot read {path}: {' '.join(str(error).split())}") from None


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    from safetensors import safe_open

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)

        return read

    tensors = {}
    with safe_open(path, "pt") as file:
        for name in list(file.keys()):
            part = file.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise ValueError(f"checkpoint: {name} in {path} has the unknown dtype {part.get_dtype()}")
            tensors[name] = StoredTensor(tuple(part.get_shape()), _DTYPES[part.get_dtype()], path, reader(name))
    return tensors


def _pickled(path: Path, pickles: _Pickles) -> dict[str, StoredTensor]:
    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: pickles.load(path)[name]

    tensors = {}
    for name, tensor in pickles.load(path).items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"checkpoint: {name} in {path} is not a tensor of a dtype that safetensors knows")
        tensors[name] = StoredTensor(tuple(tensor.shape), tensor.dtype, path, reader(name))
    return tensors


class _Pickles:
    """The .bin files of a checkpoint. One is open at a time: the old format cannot be mapped and takes memory."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._values: Mapping[str, Any] = {}

    def load(self, path: Path) -> Mapping[str, Any]:
        if self._path != path:
            self._path, self._values = None, {}
            options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
            try:
                values = torch.load(path, mmap=True, **options)
            except RuntimeError:  # written before torch 1.6, or not a checkpoint at all
                values = torch.load(path, **options)
            if not isinstance(values, Mapping):
                raise ValueError(f"checkpoint: {path} holds a {type(values).__name__}, expected named tensors")
            self._path, self._values = path, values
        return self._values


def shorten(names: Sequence[str], limit: int = 4) -> str:
    """A few names of a list, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def plan_shards(tensors: Mapping[str, StoredTensor], max_shard_bytes: int) -> list[list[str]]:
    """Cuts the tensors into shards of at most `max_shard_bytes`, one tensor at least, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    max_shard_bytes: int,
    progress: Callable[[str, int], None],
) -> list[Path]:
    """Write tensors as ``model.safetensors``, or as shards with their index.

    One tensor is in memory at a time, whatever the size of a shard. Files appear under their names when they are
    complete.

    Parameters
    ----------
    folder : Path
        Must exist.
    tensors : mapping of str to StoredTensor
    max_shard_bytes : int
        Largest shard; a tensor that is larger gets a shard of its own.
    progress : callable
        ``progress(name, nbytes)`` after each tensor.

    Returns
    -------
    list of Path
        The files that hold tensors.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    single = len(shards) == 1
    written, weight_map = [], {}
    for number, names in enumerate(shards, 1):
        file_name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path = folder / file_name
        part = path.with_suffix(".part")
        try:
            _write_file(part, {name: tensors[name] for name in names}, progress)
            part.replace(path)
        finally:
            with suppress(FileNotFoundError):
                part.unlink()
        written.append(path)
        weight_map.update(dict.fromkeys(names, file_name))
    if not single:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written


def _write_file(path: Path, tensors: Mapping[str, StoredTensor], progress: Callable[[str, int], None]) -> None:
    """The safetensors format: length of the header, the header in JSON, the bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # Wide dtypes first, so that every tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    for name in names:
        tensor = tensors[name]
        end = at + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            file.write(_bytes_of(name, tensors[name]))
            progress(name, tensors[name].nbytes)


def _bytes_of(name: str, stored: StoredTensor) -> Any:
    tensor = stored.read()
    if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
        raise ValueError(
            f"checkpoint: {name} in {stored.file} changed while it was read: got {tuple(tensor.shape)} {tensor.dtype}, "
            f"expected {stored.shape} {stored.dtype}"
        )
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
