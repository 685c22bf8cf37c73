"""Types of the compiled library."""
# ruff: noqa: N999

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

def gathered_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    /,
    # stride (2), padding (4), dilation (2), groups, cache_packed
    *geometry: int,
) -> Tensor: ...
def gathered_conv2d_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    /,
    # stride (2), padding (4), dilation (2), groups; then the schema's arguments from in_scale on
    *geometry_and_fusion: Any,
) -> Tensor: ...
def gathered_conv2d_fused_copied(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    /,
    # as above
    *geometry_and_fusion: Any,
) -> tuple[Tensor, Tensor]: ...
def set_backend(name: str) -> None: ...
def get_backend() -> str: ...
def set_default_backend(name: str) -> None: ...
def set_warn(issue: Callable[[str], None]) -> None: ...
def why_not(backend: str) -> str | None: ...
def set_why_not(reason: Callable[[str], str]) -> None: ...
def isa() -> str: ...
def isa_available() -> list[str]: ...
def cpu_model() -> str: ...
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
def choose_as_on_gpu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    name: str,
    seconds: Callable[[str], float],
    capturing: bool = False,
    shown: Sequence[str] = (),
    now: Callable[[], float] | None = None,
    first_run_tells: bool = False,
) -> tuple[str, Tensor]: ...
def set_cuda_facts(name: Callable[[int], str], capturing: Callable[[], bool]) -> None: ...
def choices() -> list[dict[str, Any]]: ...
def clear_choices() -> None: ...
def set_choice_file(path: str, problem: str = "") -> None: ...
def choice_file_problem() -> str: ...
def set_choice_limit(cases: int) -> None: ...
def packed_cache_info() -> dict[str, int]: ...
def set_packed_cache_limit(bytes: int) -> None: ...
def clear_packed_cache() -> None: ...
def drop_packed(weight: Tensor) -> None: ...
def same_values(a: Tensor, b: Tensor) -> bool: ...
def convolution_fails(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool: ...
def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor: ...
def fingerprint(tensors: Sequence[Tensor]) -> bytes: ...
