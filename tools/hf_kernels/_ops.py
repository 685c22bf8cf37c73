"""The namespace of this kernel's ops; an export has an identifier of its own here."""

from __future__ import annotations

_OPS_NAME = "_bap_kernels_triton_local"


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op."""
    return f"{_OPS_NAME}::{op_name}"
