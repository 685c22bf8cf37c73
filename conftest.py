"""Gives pytest the option ``--benchmark``: measure what is in benches/ instead of testing."""

import importlib.util
import zlib

import pytest

if importlib.util.find_spec("triton") is None:
    # Their documentation's examples would be imported; builds of torch for CPUs come without Triton.
    collect_ignore_glob = ["bap_kernels/triton/*", "tools/compile_triton.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmarks of benches/ and nothing else; without it no benchmark runs",
    )
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="run one test of N, always the same ones: a sample, for slow builds such as one with sanitizers",
    )
    parser.addoption(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="run the I-th of N parts of the tests, always the same ones: for processes that run side by side",
    )


def _part(text: str) -> tuple[int, int]:
    which, _, of = text.partition("/")
    if not (which.isdecimal() and of.isdecimal() and 1 <= int(which) <= int(of)):
        raise ValueError(f"--part: expected I/N with I from 1 to N, got {text!r}.")
    return int(which), int(of)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    which, of = config.option.part
    if of > 1:
        # By place among those that -k has left, so that the parts are alike.
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % of != which - 1])
        items[:] = items[which - 1 :: of]
    every = config.option.every
    if every > 1:
        left_out = [item for item in items if zlib.crc32(item.nodeid.encode()) % every]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % every == 0]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Runs before pytest-benchmark reads its own options in its pytest_configure.
    option = config.option
    has_plugin = hasattr(option, "benchmark_only")
    wanted = option.benchmark or getattr(option, "benchmark_only", False)
    if wanted and not has_plugin:
        raise pytest.UsageError("--benchmark needs pytest-benchmark. Hint: pip install -e '.[bench]'")
    if has_plugin and not option.benchmark_disable:
        option.benchmark_only = wanted
        option.benchmark_skip = not wanted
    if wanted:
        option.doctestmodules = False
        if config.args_source != pytest.Config.ArgsSource.ARGS:
            config.args = [str(config.rootpath / "benches")]
