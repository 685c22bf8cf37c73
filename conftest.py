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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
