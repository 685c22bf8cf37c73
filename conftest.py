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
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="run the I-th of N parts of the tests: a sample for slow builds, or a share for one of N processes",
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
        # In an order of their own, so that a part never holds the same value of every parameter.
        shuffled = sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode()))
        chosen = {item.nodeid for item in shuffled[which - 1 :: of]}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]


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
