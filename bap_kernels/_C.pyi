"""Types of the compiled library."""
# ruff: noqa: N999

from collections.abc import Sequence
from typing import Any

from torch import Tensor

def gathered_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride_h: int,
    stride_w: int,
    pad_top: int,
    pad_bottom: int,
    pad_left: int,
    pad_right: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    cache_packed: bool,
    /,
) -> Tensor: ...
def set_backend(name: str) -> None: ...
def get_backend() -> str: ...
def why_not(backend: str) -> str | None: ...
def isa() -> str: ...
def isa_available() -> list[str]: ...
def has_avx512_bf16() -> bool: ...
def build_facts() -> dict[str, str]: ...
def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> dict[str, Any]: ...
def choices() -> list[dict[str, Any]]: ...
def clear_choices() -> None: ...
def set_choice_file(path: str) -> None: ...
def packed_cache_info() -> dict[str, int]: ...
def set_packed_cache_limit(bytes: int) -> None: ...
def clear_packed_cache() -> None: ...
