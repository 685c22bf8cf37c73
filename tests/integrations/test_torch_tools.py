"""Tools of torch on swapped, planned and switched networks: results stay in every domain, or the tool is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import bap_kernels as bk
from tests.integrations.kinds import DOMAINS, KINDS, LAYERED, X, assert_same, dense, network_of, outputs, planned


def _by_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def _shared(model: nn.Module) -> nn.Module:
    return model.share_memory()


def _channels_last(model: nn.Module) -> nn.Module:
    return nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)


def _emptied(model: nn.Module) -> nn.Module:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def _swapping(model: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": _by_file,
    "convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "DataParallel": nn.DataParallel,
    "share_memory": _shared,
    "convert_conv2d_weight_memory_format": _channels_last,
    "to_empty": _emptied,
    "set_swap_module_params_on_conversion": _swapping,
    "compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_results_stay(change: str, kind: str) -> None:
    model = KINDS[kind]()
    expected = outputs(model)
    assert_same(outputs(CHANGES[change](model)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("option", "tolerance"),
    [(torch.float16, 1e-2), (torch.bfloat16, 4e-2), (torch.float64, 1e-4), (torch.channels_last, 1e-4)],
    ids=str,
)
def test_dtypes_and_formats(kind: str, option: Any, tolerance: float) -> None:
    model = KINDS[kind]()
    expected = outputs(model)
    options = {"memory_format": option} if option is torch.channels_last else {"dtype": option}
    assert_same(outputs(model.to(**options), X.to(**options)), expected, tolerance)


def _weight_norm(layer: nn.Module) -> Callable[[], Any]:
    parametrizations.weight_norm(layer)
    return lambda: parametrize.remove_parametrizations(layer, "weight")


def _old_weight_norm(layer: nn.Module) -> Callable[[], Any]:
    nn.utils.weight_norm(layer)  # type: ignore[deprecated]
    return lambda: nn.utils.remove_weight_norm(layer)


def _spectral_norm(layer: nn.Module) -> Callable[[], Any]:
    parametrizations.spectral_norm(layer).eval()
    return lambda: parametrize.remove_parametrizations(layer, "weight")


def _pruned(layer: nn.Module) -> Callable[[], Any]:
    prune.ln_structured(layer, "weight", 0.3, 2, 1)
    return lambda: prune.remove(layer, "weight")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compute", [_weight_norm, _old_weight_norm, _spectral_norm, _pruned])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_that_are_computed_for_a_time(kind: str, compute: Callable[[nn.Module], Callable[[], Any]]) -> None:
    """A plan sees a convolution of its network get a computed weight, and lose it again."""
    model = KINDS[kind]()
    layer = network_of(model).get_submodule("conv2")
    undo = compute(layer)
    network_of(model).eval()
    computed = outputs(network_of(model))
    assert_same(outputs(model), computed)
    undo()
    assert_same(outputs(model), computed)


def test_fuse_conv_bn_eval_keeps_the_lists() -> None:
    model = KINDS["swapped"]()
    expected = outputs(model)
    bk.set_domain(model, DOMAINS[0])
    model.conv2, model.bn3 = fuse_conv_bn_eval(model.conv2, model.bn3), nn.Identity()  # type: ignore[type-var]
    assert_same(outputs(model), expected)
    with pytest.raises(AttributeError, match="'DomainBatchNorm2d' object has no attribute 'running_mean'"):
        fuse_conv_bn_eval(KINDS["switched"]().conv2, KINDS["switched"]().bn3)  # type: ignore[type-var]


@pytest.mark.parametrize("kind", LAYERED)
def test_fx_passes_leave_the_layers_alone(kind: str) -> None:
    from torch.fx.experimental.optimization import fuse

    model = KINDS[kind]()
    expected = outputs(model)
    assert_same(outputs(fuse(model)), expected)
    assert_same(outputs(fx.symbolic_trace(model)), expected)


def test_a_plan_is_one_step_of_a_recorded_model_and_no_model_of_its_own() -> None:
    model = nn.Sequential(planned(), nn.ReLU())
    expected = outputs(model)
    traced = fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert_same(outputs(traced), expected)
    with pytest.raises(NotImplementedError, match=r"PlannedNetwork\(\): expected torch.fx to record a model"):
        fx.symbolic_trace(planned())


@pytest.mark.parametrize("kind", KINDS)
def test_traces_and_scripts(kind: str) -> None:
    model = KINDS[kind]()
    expected = outputs(model)
    traced = {}
    for name in DOMAINS:
        bk.set_domain(model, name)
        with torch.no_grad():
            traced[name] = torch.jit.trace(model, X)(X)
    assert_same(traced, expected)
    with pytest.raises(NotImplementedError, match=r"torch.jit.script\(\): expected a model without layers that depend"):
        torch.jit.script(model)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_calls(kind: str) -> None:
    """Parameters that are given for one call count for that call."""
    model, results = KINDS[kind](), {}
    before = outputs(model)
    with torch.no_grad():
        for name in DOMAINS:
            bk.set_domain(model, name)
            results[name] = functional_call(model, {key: 1.5 * value for key, value in model.named_parameters()}, X)
        assert_same(outputs(model), before)
        for parameter in network_of(model).parameters():
            parameter *= 1.5
    assert_same(results, outputs(model))


@pytest.mark.parametrize("kind", ["swapped", "masked"])
def test_ensembles_by_vmap(kind: str) -> None:
    models = [KINDS[kind](), KINDS[kind]()]
    with torch.no_grad():
        models[1].conv1.weight *= 2  # type: ignore[operator,union-attr]
    for model in models:
        bk.set_domain(model, "cars")
    parameters, buffers = stack_module_state(models)
    result = vmap(lambda p, b: functional_call(models[0], (p, b), (X,)))(parameters, buffers)
    torch.testing.assert_close(result, torch.stack([model(X) for model in models]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["planned", "switched"])
def test_what_has_no_values_under_vmap_is_refused(kind: str) -> None:
    models = [KINDS[kind](), KINDS[kind]()]
    for model in models:
        bk.set_domain(model, "cars")
    parameters, buffers = stack_module_state(models)
    expected = "expected tensors that hold their own" if kind == "planned" else "expected `score` to hold its values"
    with pytest.raises(NotImplementedError, match=expected):
        vmap(lambda p, b: functional_call(models[0], (p, b), (X,)))(parameters, buffers)


@pytest.mark.parametrize("kind", LAYERED)
def test_state_dicts_are_read_with_weights_only(kind: str) -> None:
    model = KINDS[kind]()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = KINDS[kind]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 2
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(outputs(other), outputs(model))


def test_flop_counter_counts_listed_channels() -> None:
    def count(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(X)
        return counter.get_total_flops()

    models = {kind: make() for kind, make in KINDS.items()}
    for model in models.values():
        bk.set_domain(model, "birds")
    counts = {kind: count(model) for kind, model in models.items()}
    assert counts["planned"] < counts["swapped"] < count(dense())
    assert counts["masked"] < counts["swapped"]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_hooks_of_summaries_see_every_call(kind: str) -> None:
    model = KINDS[kind]()
    expected = outputs(model)
    seen: list[tuple[int, ...]] = []
    layers = [module for module in network_of(model).modules() if not list(module.children())]
    handles = [layer.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape))) for layer in layers]
    assert_same(outputs(model), expected)
    assert seen
    for handle in handles:
        handle.remove()
    assert_same(outputs(model), expected)


def _replica(module: nn.Module) -> nn.Module:
    """What DataParallel makes of a module for a device: its parameters are plain attributes."""
    modules = list(module.modules())
    copies = {part: part._replicate_for_data_parallel() for part in modules}  # type: ignore[operator]
    for part, copied in copies.items():
        for name, child in part._modules.items():
            assert child is not None
            setattr(copied, name, copies[child])
        for table in (part._parameters, part._buffers):
            for name, value in table.items():
                if value is not None:
                    setattr(copied, name, value.detach().clone())
                elif table is part._parameters:
                    copied._parameters[name] = None
    return copies[module]


@pytest.mark.parametrize("kind", LAYERED)
def test_replicas_work_in_the_domain_of_the_model(kind: str) -> None:
    model = KINDS[kind]()
    expected, results = outputs(model), {}
    for name in DOMAINS:
        bk.set_domain(model, name)
        with torch.no_grad():
            results[name] = _replica(model)(X)
    assert_same(results, expected)


def test_a_plan_on_meta_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"plan\(\): expected tensors that hold their own values, got one on"):
        planned().to("meta")


class Wrapped(Tensor):
    """A tensor without memory of its own that stands for another one, as quantised and distributed ones do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [value.inner if isinstance(value, Wrapped) else value for value in args]
        if func is torch.ops.aten.detach.default:
            return Wrapped(unwrapped[0])
        return func(*unwrapped, **(kwargs or {}))


def test_weights_that_stand_for_others_are_seen_by_a_plan() -> None:
    """Those of linear layers work, what the plan reads itself is refused, and no memory is read that is not there."""
    model = planned()
    expected = outputs(model)
    network = network_of(model)
    network.fc.weight = nn.Parameter(Wrapped(network.fc.weight.detach()), requires_grad=False)  # type: ignore[union-attr]
    assert_same(outputs(model), expected)
    network.bn1.bias = nn.Parameter(Wrapped(network.bn1.bias.detach()), requires_grad=False)  # type: ignore[union-attr]
    with pytest.raises(NotImplementedError, match=r"got a Wrapped that stands for others: bn1\.bias\. Hint: plan the"):
        outputs(model)


@pytest.mark.parametrize("wrap", [lambda plan: plan, nn.Sequential], ids=["itself", "in a model"])
def test_an_emptied_plan_waits_for_its_values(
    wrap: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory(like: torch.Tensor, **options: object) -> torch.Tensor:
        held = torch.zeros(like.shape, dtype=like.dtype)
        held.view(-1)[:1] = float("inf")  # of a channel that is left out, so that plan and network differ
        return held

    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 8, 3)).eval())
    bk.attach_(model, bk.ChannelTable({"a": {"0": bk.ChannelLists([1, 2])}}))
    x = torch.randn(2, 3, 12, 12)
    network = wrap(bk.plan(model, x, "a"))
    expected, state = network(x), {name: value.clone() for name, value in network.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", memory)
        network.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="finite numbers"):
        network(x)
    network.load_state_dict(state)
    torch.testing.assert_close(network(x), expected)
