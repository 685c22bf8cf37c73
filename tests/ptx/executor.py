"""The executor of PTX from Python: modules, launches on the host's memory, and what stops them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tests.ptx.build import executor_library

_TEXT = 1 << 16


class PtxError(Exception):
    """What the executor found: the kernel, the line of the PTX, the instruction and what is wrong."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(executor_library()))
    library.ptx_parse.restype = ctypes.c_void_p
    library.ptx_parse.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
    library.ptx_free.argtypes = [ctypes.c_void_p]
    library.ptx_describe.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]
    library.ptx_spellings.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    library.ptx_add_tensor.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    library.ptx_launch.argtypes = [
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int64),
        *(ctypes.c_char_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p, ctypes.c_int64),
    ]
    return library


def known_spellings() -> list[str]:
    """The instructions that the executor knows."""
    text = ctypes.create_string_buffer(1 << 20)
    _library().ptx_spellings(text, len(text))
    return text.value.decode().splitlines()


@dataclass(frozen=True)
class Entry:
    """A kernel: threads of a block (0: not said), and offset and bytes of each parameter."""

    threads: int
    parameters: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Options:
    """How a launch is executed.

    Args:
        seed: which warp goes on when, and the order of blocks.
        truncate: tensor cores cut their sums towards zero, step by step.
        check_registers: a register without a value may not be read.
        check_shared: nor may shared memory that nothing has written.
    """

    seed: int = 0
    truncate: bool = False
    check_registers: bool = True
    check_shared: bool = True

    @property
    def flags(self) -> int:
        """As the library takes them."""
        return self.truncate + 2 * (not self.check_registers) + 4 * (not self.check_shared)


class Module:
    """PTX text, parsed.

    Raises:
        PtxError: for what the executor does not know, with its line.
    """

    def __init__(self, text: str) -> None:
        error = ctypes.create_string_buffer(_TEXT)
        self.handle = _library().ptx_parse(text.encode(), error, len(error))
        if not self.handle:
            raise PtxError(error.value.decode())
        description = ctypes.create_string_buffer(1 << 20)
        _library().ptx_describe(self.handle, description, len(description))
        self.entries: dict[str, Entry] = {}
        for line in description.value.decode().splitlines():
            name, threads, *parameters = line.split()
            pairs = tuple((int(at), int(size)) for at, size in (each.split(":") for each in parameters))
            self.entries[name] = Entry(int(threads), pairs)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            _library().ptx_free(self.handle)

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        threads: int,
        arguments: Sequence[int] | bytes,
        tensors: Iterable[Tensor],
        shared_bytes: int = 0,
        options: Options = Options(),
    ) -> None:
        """Runs a grid of blocks, one after the other.

        Args:
            arguments: numbers and addresses, one for each parameter, missing ones being zero; or the block's bytes.
            tensors: what the kernel may read and write: all memory of each, not only a view's.

        Raises:
            PtxError: the first thing that is wrong.
        """
        library, entry = _library(), self.entries[kernel]
        if not isinstance(arguments, bytes):
            block = bytearray(max((at + size for at, size in entry.parameters), default=0))
            for (at, size), value in zip(entry.parameters, arguments, strict=False):
                block[at : at + size] = (int(value) % (1 << 8 * size)).to_bytes(size, "little")
            arguments = bytes(block)
        library.ptx_clear_tensors()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                library.ptx_add_tensor(storage.data_ptr(), storage.nbytes())
        error = ctypes.create_string_buffer(_TEXT)
        sizes = (ctypes.c_int * 3)(*(*grid, 1, 1)[:3])
        failed = library.ptx_launch(
            *(self.handle, kernel.encode(), sizes, threads, shared_bytes, arguments, len(arguments)),
            *(options.seed, options.flags, error, len(error)),
        )
        if failed:
            raise PtxError(error.value.decode())
