"""``bap_kernels/_C.pyi`` names what the compiled library has: every function, its arguments and their defaults."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import bap_kernels
from bap_kernels import _C

STUB = ast.parse((Path(bap_kernels.__file__).parent / "_C.pyi").read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
# What pybind11 calls an argument without a name, which can only be passed by its place.
UNNAMED = re.compile(r"arg\d+")


def compiled_arguments(name: str) -> list[tuple[str, bool]]:
    """Name and whether there is a default, of each argument, from the signature that pybind11 writes."""
    signature = (getattr(_C, name).__doc__ or "").splitlines()[0]
    inner = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    depth, parts = 0, [""]
    for character in inner:
        depth += (character in "[({") - (character in "])}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    arguments = [part.strip() for part in parts if part.strip() not in ("", "/", "*")]
    return [(argument.split(":")[0], " = " in argument) for argument in arguments]


def stub_arguments(name: str) -> list[tuple[str, bool]]:
    arguments = FUNCTIONS[name].args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    required = len(names) - len(arguments.defaults)
    return [(argument, place >= required) for place, argument in enumerate(names)]


def test_names_are_the_same() -> None:
    compiled = {name for name in dir(_C) if not name.startswith("__")}
    others = [
        node.name if isinstance(node, ast.ClassDef) else ast.unparse(node.target)
        for node in STUB.body
        if isinstance(node, ast.ClassDef | ast.AnnAssign)
    ]
    assert compiled == {*FUNCTIONS, *others}


def test_arguments_are_the_same() -> None:
    for name, node in FUNCTIONS.items():
        compiled, stub = compiled_arguments(name), stub_arguments(name)
        assert node.args.vararg is None, f"{name} has *{node.args.vararg} in the stub"
        unnamed = [UNNAMED.fullmatch(argument) is not None for argument, _ in compiled]
        assert unnamed == [True] * len(node.args.posonlyargs) + [False] * len(node.args.args), name
        expected = [
            (other, default) if hidden else (argument, default)
            for hidden, (argument, default), (other, _) in zip(unnamed, compiled, stub, strict=True)
        ]
        assert stub == expected, name


def test_direct_calls_follow_the_schemas() -> None:
    import torch

    for name, op in (("gathered_conv2d", "gathered_conv2d"), ("gathered_conv2d_fused", "_gathered_conv2d_fused")):
        schema = getattr(torch.ops.bap_kernels, op).default._schema
        assert [argument for argument, _ in stub_arguments(name)] == [argument.name for argument in schema.arguments]
