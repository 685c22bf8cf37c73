"""The exported folder stands alone, and its functions are right in Triton's interpreter."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest

from bap_kernels import _load
from tools import export_hf_kernels
from tools.export_hf_kernels import ExportError, export, imports_of
from tools.hf_kernels import torch_only

ROOT = Path(export_hf_kernels.__file__).parents[1]

# Runs where neither bap_kernels nor the tools can be imported; loads as the package `kernels` does.
ALONE = """
import importlib.util, json, sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("bap_kernels", "bap", "tools", "safetensors"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())

folder = Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules[name] = kernel
spec.loader.exec_module(kernel)
import torch
from torch.nn.functional import conv2d
"""
FORWARD = (
    ALONE
    + """
torch.manual_seed(0)
lists = {
    "all": None,
    "odd": torch.tensor([3, 0, 17, 8, 30], dtype=torch.int32),
    "blocks": torch.cat([torch.arange(16, 24), torch.arange(0, 8)]).int(),
    "none": torch.empty(0, dtype=torch.int32),
}
count = 0
for size, options in ((1, {}), (3, {"padding": 1, "stride": 2}), (3, {"padding": (0, 2), "dilation": (2, 1)})):
    for last in (False, True):
        for name in ("all", "odd", "blocks"):
            out_list = lists["odd" if name == "blocks" else name]
            x, w, b = torch.randn(2, 32, 7, 6), torch.randn(33, 32, size, size), torch.randn(33)
            if last:
                x = x.to(memory_format=torch.channels_last)
            i, o = lists[name], out_list
            read = slice(None) if i is None else i.long()
            rows = slice(None) if o is None else o.long()
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            others = [t.clone().double().requires_grad_() for t in (x, w, b)]
            y = kernel.gathered_conv2d(*leaves, i, o, **options)
            expected = conv2d(others[0][:, read], others[1][rows][:, read], others[2][rows], **options)
            torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
            assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            g = torch.randn_like(y)
            y.backward(g)
            expected.backward(g.double())
            for mine, other in zip(leaves, others):
                torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-4)
            count += 1
y = kernel.gathered_conv2d(x, w, b, lists["none"], None, padding=1)
torch.testing.assert_close(y, b[:, None, None].expand_as(y))
print(count)
"""
)
OTHERS = (
    ALONE
    + """
torch.manual_seed(0)
x, w, b = torch.randn(2, 20, 6, 5), torch.randn(9, 20, 3, 3), torch.randn(9)
switch = (torch.arange(20) % 3 != 0).float()
leaves = [t.clone().requires_grad_() for t in (x, w, b, switch)]
others = [t.clone().double().requires_grad_() for t in (x, w, b, switch)]
y = kernel.switched_conv2d(*leaves, padding=1)
expected = conv2d(others[0] * others[3][:, None, None], others[1], others[2], padding=1)
torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
y.square().sum().backward()
expected.square().sum().backward()
torch.testing.assert_close(leaves[3].grad.double(), others[3].grad, rtol=1e-3, atol=1e-3)
on = switch.bool()
torch.testing.assert_close(leaves[0].grad[:, on].double(), others[0].grad[:, on], rtol=1e-3, atol=1e-3)
torch.testing.assert_close(leaves[1].grad[:, on].double(), others[1].grad[:, on], rtol=1e-3, atol=1e-3)

i, o = torch.tensor([2, 5, 7], dtype=torch.int32), torch.tensor([1, 8], dtype=torch.int32)
for case in ("bfloat16", "float16"):
    dtype = getattr(torch, case)
    half = kernel.gathered_conv2d(x.to(dtype), w.to(dtype), None, i, o)
    torch.testing.assert_close(half.float(), conv2d(x[:, i], w[o][:, i]), rtol=0.05, atol=0.1)
full = torch.compile(lambda t: kernel.gathered_conv2d(t, w, b, i, o), fullgraph=True, backend="eager")(x)
torch.testing.assert_close(full, conv2d(x[:, i], w[o][:, i], b[o]), rtol=1e-4, atol=1e-4)

def message(**changed):
    arguments = {"input": x, "weight": w, "in_index": i, **changed}
    try:
        kernel.gathered_conv2d(**arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
print(message(in_index=torch.tensor([2, 20], dtype=torch.int32)))
print(message(in_index=torch.tensor([2, 2], dtype=torch.int32)))
print(message(in_index=torch.tensor([2])))
print(message(weight=w[:, :5]))
print(message(weight=w.double()))
print(message(stride=0))
print(message(weight=torch.randn(9, 20, 7, 7)))
print(message(input=x.double(), weight=w.double()))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "kernel"
    export(out)
    return out


def run_alone(folder: Path, script: str, **more: str) -> subprocess.CompletedProcess:
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    command = [sys.executable, "-c", script, str(folder / "build/torch-cuda")]
    return subprocess.run(command, cwd=folder.parent, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_gathered_conv2d_is_right_without_the_package(folder: Path) -> None:
    done = run_alone(folder, FORWARD, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "18", done.stderr[-2000:]


@pytest.mark.slow
def test_switch_dtypes_compile_and_errors_without_the_package(folder: Path) -> None:
    done = run_alone(folder, OTHERS, TRITON_INTERPRET="1")
    lines = done.stdout.splitlines()
    expected = (
        "IndexError: gathered_conv2d(): expected `in_index` to hold channels from 0 to 19, got 2 to 20.",
        "ValueError: gathered_conv2d(): expected `in_index` to hold distinct channels, got one twice.",
        "TypeError: gathered_conv2d(): expected `in_index` to be torch.int32 on cpu, got torch.int64 on cpu.",
        "ValueError: gathered_conv2d(): expected `weight` to read 20 channels, got 5.",
        "TypeError: gathered_conv2d(): expected `weight` to be torch.float32 on cpu, got torch.float64 on cpu.",
        "ValueError: gathered_conv2d(): expected `stride` to be one or two integers of at least 1, got 0.",
        "ValueError: gathered_conv2d(): expected a result of at least one pixel, got [0, -1].",
    )
    assert lines[:7] == list(expected), done.stderr[-2000:]
    assert lines[7].startswith("NotImplementedError: gathered_conv2d(): expected a call that backend `triton` can run")


@pytest.mark.slow
def test_tensors_on_a_cpu_are_refused(folder: Path) -> None:
    call = "x = torch.randn(1, 8, 3, 3)\nkernel.gathered_conv2d(x, torch.randn(4, 8, 1, 1))"
    done = run_alone(folder, ALONE + call, TRITON_INTERPRET="0")
    assert "NotImplementedError: gathered_conv2d()" in done.stderr
    assert "the tensors are on cpu" in done.stderr


def test_layout_is_that_of_hugging_face(folder: Path) -> None:
    name = export_hf_kernels.NAME
    sources = {path.name for path in (folder / "torch-ext" / name).iterdir()}
    variant = folder / "build/torch-cuda"
    built = {path.name for path in variant.iterdir()}
    # kernel-builder adds these two by itself.
    assert sources == built - {"_ops.py", "metadata.json"}
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"].isidentifier()
    assert metadata["id"] in (variant / "_ops.py").read_text()
    digests = {
        path.name: b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in variant.iterdir()
        if path.name != "metadata.json"
    }
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}


def test_all_imports_are_relative_or_of_torch_and_triton(folder: Path) -> None:
    for path in (folder / "build/torch-cuda").glob("*.py"):
        tree = ast.parse(path.read_text())
        absolute = {
            name.split(".")[0]
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [str(node.module)]
                if isinstance(node, ast.ImportFrom) and node.level == 0
                else []
            )
        }
        assert absolute <= {"torch", "triton", *sys.stdlib_module_names}, path.name


def test_export_replaces_an_earlier_one_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    old = folder / "build/torch-cuda/old.py"
    old.touch()
    export(folder)
    assert not old.exists()
    (tmp_path / "precious").touch()
    with pytest.raises(ExportError, match=r"to be empty or an earlier export, got other files"):
        export(tmp_path)


def test_foreign_import_is_refused() -> None:
    with pytest.raises(ExportError, match=r"ops imports bap_kernels\.settings, which an export cannot have"):
        imports_of("ops", "from bap_kernels.settings import settings")


def test_constant_of_the_library_is_the_same() -> None:
    assert _load._C.PACKED_ALIGNMENT == torch_only.PACKED_ALIGNMENT
