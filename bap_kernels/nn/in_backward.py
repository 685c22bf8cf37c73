"""Forwards inside a backward: what checkpointing computes again has to equal what was computed first.

:func:`torch.utils.checkpoint.checkpoint` calls a layer a second time during the backward, when another domain may be
set, and when the layer has counted the call already. Autograd's sequence numbers tell: they grow with every node of a
thread, so a node that runs now and is older than the last change of a layer's domain belongs to a forward before it.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from bap_kernels.layer_kinds import Change, DomainLayer

__all__ = ["check_domain", "in_backward", "in_checkpoint", "once_for_each_forward", "replaying"]

_here = threading.local()
_graph_task = torch._C._current_graph_task_id
_reentrant_code = CheckpointFunction.forward.__code__


def in_backward() -> bool:
    """Whether this thread runs a backward; always false while compiling."""
    return not torch.compiler.is_compiling() and _graph_task() != -1


def replaying(on: bool) -> bool:
    """Sets, for this thread, whether layers have the state of the first forward; returns the previous setting."""
    before = getattr(_here, "replaying", False)
    _here.replaying = on
    return before


def check_domain(layer: DomainLayer) -> None:
    """Refuses a recomputed forward whose first one may have seen another domain; to be called in a backward.

    A domain that was set in another thread than that of the forward is not compared.

    Raises:
        RuntimeError: if the layer's domain was changed since.
    """
    if getattr(_here, "replaying", False):
        return
    changed = layer._changed
    node = torch._C._current_autograd_node()
    # Replicas of DataParallel run in threads of their own.
    if node is None or _numbers_of_another_thread(changed) or hasattr(layer, "_is_replica"):
        return
    if node._sequence_nr() < changed.at and node._sequence_nr() != changed.by:
        raise RuntimeError(
            f"{type(layer).__name__}(): expected the domain of the first forward when checkpointing computes it again, "
            "got one that was set in between. Hint: call backward() before set_domain, or use bk.nn.recompute, which "
            "remembers the domain."
        )


def _numbers_of_another_thread(changed: Change) -> bool:
    # Forwards are in the thread that calls backward(), or else in that of the change: threads of the engine are no
    # threads of Python's.
    if threading.get_ident() == changed.thread:
        return False
    return not isinstance(threading.current_thread(), threading._DummyThread)


def _hook_name() -> str:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return "" if hooks is None else getattr(hooks[0], "__qualname__", "")


def in_checkpoint() -> bool:
    """Whether a checkpoint that is not reentrant takes what autograd saves, in its first forward or in the second."""
    return not torch.compiler.is_compiling() and _hook_name().startswith(("_checkpoint_hook", "_recomputation_hook"))


def once_for_each_forward(key: object, decide: Callable[[], bool]) -> bool:
    """Calls ``decide()``, which counts training forwards, once for each forward, however often that is computed again.

    Args:
        key: stands for what counts.
        decide: called in every forward that has a gradient and is no recomputation.

    Returns:
        The result of ``decide()``; True where it has no effect.
    """
    if torch.compiler.is_compiling():
        return decide()
    # The first forward of a reentrant checkpoint is without gradient; the second one makes the node.
    firsts = [] if torch.is_grad_enabled() else _reentrant_contexts()
    if not (firsts or torch.is_grad_enabled()):
        return True
    if _graph_task() == -1:
        decision = decide()
    else:
        node = torch._C._current_autograd_node()
        if _hook_name().startswith("_recomputation_hook") or type(node).__name__ != "CheckpointFunctionBackward":
            # Not reentrant: the node of the first forward stays, and its decision with it.
            return True
        known = _decisions(node).get(key)
        if known:
            decision = known[0]
            # In their order for another backward through the same graph.
            known.rotate(-1)
        else:
            decision = decide()
    for context in firsts:
        _decisions(context).setdefault(key, deque()).append(decision)
    return decision


def _decisions(context: Any) -> dict[object, deque[bool]]:
    # An autograd context takes attributes of anyone.
    decisions: dict[object, deque[bool]] = context.__dict__.setdefault("_bap_decisions", {})
    return decisions


def _reentrant_contexts() -> list[Any]:
    """The autograd contexts of the reentrant checkpoints whose first forward this is, and that will have a second."""
    contexts = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _reentrant_code:
            contexts.append(frame.f_locals["ctx"])
        frame = frame.f_back
    # Without gradient a context leads nowhere.
    return [context for context in contexts if context.next_functions]
