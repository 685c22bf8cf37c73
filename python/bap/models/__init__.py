"""Backbones by name: plain networks, before :func:`bap_kernels.nn.switch_`."""

from bap.models.backbones import MODELS, Backbone, build, load_weights, stem_and_shortcuts
from bap.models.eval_mode import evaluating
from bap.models.rebuffi import RebuffiResNet26, URLResNet26, renamed_keys
from bap.models.resnet26 import ResNet26
from bap.models.wide_resnet import WideResNet

__all__ = [
    "MODELS",
    "Backbone",
    "RebuffiResNet26",
    "ResNet26",
    "URLResNet26",
    "WideResNet",
    "build",
    "evaluating",
    "load_weights",
    "renamed_keys",
    "stem_and_shortcuts",
]
