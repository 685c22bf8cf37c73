"""Layers with one set of parameters per domain: norms and classifiers. Pickles of earlier versions name this module."""

from bap_kernels.nn.domain_heads import DomainConv2d, DomainHead, DomainLinear, outputs_of
from bap_kernels.nn.domain_norms import DomainBatchNorm2d, DomainNorm

__all__ = ["DomainBatchNorm2d", "DomainConv2d", "DomainHead", "DomainLinear", "DomainNorm", "outputs_of"]
