"""Whole models, composed of `pyseqnet.nn` layers; they call no operation directly."""

from pyseqnet.models.go_policy import GoPolicy
from pyseqnet.models.image_classifier import ImageClassifier
from pyseqnet.models.language_model import LanguageModel
from pyseqnet.models.recurrent_translator import RecurrentTranslator
from pyseqnet.models.sequence_tagger import SequenceTagger
from pyseqnet.models.sequence_translator import SequenceTranslator
from pyseqnet.models.vision_transformer import VisionTransformer
from pyseqnet.models.word_tagger import WordTagger

__all__ = [
    "GoPolicy",
    "ImageClassifier",
    "LanguageModel",
    "RecurrentTranslator",
    "SequenceTagger",
    "SequenceTranslator",
    "VisionTransformer",
    "WordTagger",
]
