"""Whole models, composed of `pyseqnet.nn` layers; they call no operation directly."""

from pyseqnet.models.image_classifier import ImageClassifier

__all__ = ["ImageClassifier"]
