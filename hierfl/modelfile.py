"""Models as files: safetensors in and out, ``.pt`` out where torch is installed.

A model's identity is its hash over layout and vectors (``hierfl/layout.py``), never a file's bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from hierfl.errors import ConfigError, DiskFull, NotFound, StorageError
from hierfl.folders import whole_file
from hierfl.types import Params

__all__ = ["FORMATS", "check_suffix", "read_safetensors", "write"]


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read named arrays; nothing in the file is executed.

    Raises:
        NotFound: No such file.
        ConfigError: Not a safetensors file, or with a dtype that NumPy lacks.
    """
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise NotFound("model file", str(path)) from None
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError("model.initial", str(path), f"must be a readable safetensors file ({error})") from None


def _write_safetensors(path: Path, params: Params, metadata: Mapping[str, str]) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.asarray(array, order="C") for name, array in params.items()}, path, metadata=dict(metadata))


def _write_torch(path: Path, params: Params, metadata: Mapping[str, str]) -> None:
    del metadata  # a state_dict has no place for it
    try:
        import torch
    except ImportError:
        raise ConfigError("file", str(path), "needs torch: pip install 'hierfl[torch]'") from None
    torch.save({name: torch.from_numpy(np.array(array)) for name, array in params.items()}, path)


FORMATS: Mapping[str, Callable[[Path, Params, Mapping[str, str]], None]] = {
    ".safetensors": _write_safetensors,
    ".pt": _write_torch,
}
"""By suffix of the file's name."""


def check_suffix(path: Path) -> None:
    """Refuse a file name whose suffix names no format."""
    if path.suffix not in FORMATS:
        raise ConfigError("file", str(path), f"must end in {' or '.join(FORMATS)}")


def write(path: Path, params: Params, metadata: Mapping[str, str]) -> None:
    """Write a model in the format that the suffix names: whole, or not at all.

    Raises:
        ConfigError: The suffix names no format, or one that needs a package which is not here.
        DiskFull, StorageError: It cannot be written there.
    """
    check_suffix(path)
    try:
        with whole_file(path) as temporary:
            FORMATS[path.suffix](temporary, params, metadata)
    except (OSError, RuntimeError, SafetensorError) as error:  # a library's word for a disk that refuses
        raise _not_written(path, params, error) from None


def _not_written(path: Path, params: Params, error: Exception) -> StorageError:
    folder, size = path.resolve().parent, sum(array.nbytes for array in params.values())
    if folder.is_dir() and shutil.disk_usage(folder).free < size:
        return DiskFull(f"no space left on the disk of {folder} for a model of {size:,} bytes; make room and try again")
    return StorageError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")
