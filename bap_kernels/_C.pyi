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
def gathered_conv2d_fused(
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
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    residual: Tensor | None,
    out_relu: bool,
    cache_packed: bool,
    weight_index: Tensor | None,
    dual_store_index: Tensor | None,
    /,
) -> tuple[Tensor, Tensor | None]: ...
def set_backend(name: str) -> None: ...
def get_backend() -> str: ...
def set_default_backend(name: str) -> None: ...
def set_winograd(allowed: bool) -> None: ...
def get_winograd() -> bool: ...
def set_default_winograd(allowed: bool) -> None: ...
def force_winograd(size: int) -> None: ...
def forced_winograd() -> int: ...
def set_warn(issue: Callable[[str], None]) -> None: ...
def unsupported_reason(backend: str) -> str | None: ...
def set_unsupported_reason(reason: Callable[[str], str]) -> None: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def isa_available() -> list[str]: ...
def cpu_model() -> str: ...
def has_avx512_bf16() -> bool: ...
def build_info() -> dict[str, str]: ...
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
    cache_packed: bool = True,
) -> dict[str, Any]: ...
def set_verdicts(device: int, verdicts: dict[str, tuple[str, str]]) -> None: ...
def verdicts(device: int) -> dict[str, tuple[str, str]]: ...
def set_verify_hook(hook: Callable[[int], None] | None) -> None: ...
def cuda_families() -> list[str]: ...
def simulate_gpu(
    name: str | None,
    seconds: Callable[[str], float] | None = None,
    number: int = 0,
    capturing: Callable[[], bool] | None = None,
    now: Callable[[], float] | None = None,
    first_run_tells: bool = False,
    ran: Callable[[str], None] | None = None,
    families: dict[str, list[str]] | None = None,
) -> None: ...
def call_families(op: str, args: tuple[Any, ...]) -> list[str]: ...
def run_aten(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_relu: bool = False,
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
    residual: Tensor | None = None,
    out_relu: bool = False,
    cache_packed: bool = True,
    candidate: str = "gather",
    on_gpu: bool = False,
) -> Tensor: ...
def set_gpu_hooks(name: Callable[[int], str], capturing: Callable[[], bool]) -> None: ...
def choices() -> list[dict[str, Any]]: ...
def clear_choices() -> None: ...
def set_cuda_launcher(launcher: Any) -> bool: ...
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
