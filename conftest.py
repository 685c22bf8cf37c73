"""Options of pytest: ``--benchmark`` runs benches/ instead of the tests, ``--part`` a part of the tests."""

import importlib.util
import zlib

import pytest

if importlib.util.find_spec("triton") is None:
    # Collecting doctests would import these; CPU builds of torch come without Triton.
    collect_ignore_glob = ["bap_kernels/triton/*", "tools/compile_triton.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmarks of benches/ and nothing else",
    )
    parser.addoption(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="run the I-th of N parts of the tests, as a sample or as the share of one of N processes; "
        "those marked `sample` are in every part",
    )


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part: expected I/N with I from 1 to N, got {text!r}.")
    return int(number), int(count)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = config.option.part
    if count > 1:
        # Shuffled, so that a part does not hold the same value of every parameter.
        shuffled = sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode()))
        selected = {item.nodeid for item in shuffled[number - 1 :: count]}
        selected |= {item.nodeid for item in items if item.get_closest_marker("sample")}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in selected])
        items[:] = [item for item in items if item.nodeid in selected]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Runs before pytest-benchmark reads its options in its own pytest_configure.
    option = config.option
    has_plugin = hasattr(option, "benchmark_only")
    benchmark = option.benchmark or getattr(option, "benchmark_only", False)
    if benchmark and not has_plugin:
        raise pytest.UsageError("--benchmark: expected pytest-benchmark. Hint: pip install -e '.[bench]'")
    if has_plugin and not option.benchmark_disable:
        option.benchmark_only = benchmark
        option.benchmark_skip = not benchmark
    if benchmark:
        option.doctestmodules = False
        if config.args_source != pytest.Config.ArgsSource.ARGS:
            config.args = [str(config.rootpath / "benches")]
