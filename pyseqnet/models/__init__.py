"""Whole models, composed of `pyseqnet.nn` layers; they call no operation directly."""

from pyseqnet.models.copying_translator import CopyingTranslator
from pyseqnet.models.detr import DetectionTransformer
from pyseqnet.models.go_policy import GoPolicy
from pyseqnet.models.image_classifier import ImageClassifier
from pyseqnet.models.image_gan import ImageDiscriminator, ImageGenerator
from pyseqnet.models.label_attention import LabelAttention
from pyseqnet.models.language_model import LanguageModel
from pyseqnet.models.memory_network import MemoryNetwork
from pyseqnet.models.neural_turing_machine import NeuralTuringMachine
from pyseqnet.models.question_reader import QuestionReader
from pyseqnet.models.recurrent_translator import RecurrentTranslator
from pyseqnet.models.sentence_reader import SentenceReader
from pyseqnet.models.sequence_autoencoder import SequenceAutoencoder
from pyseqnet.models.sequence_tagger import SequenceTagger
from pyseqnet.models.sequence_translator import SequenceTranslator
from pyseqnet.models.speech_recognizer import SpeechEncoder, SpeechRecognizer
from pyseqnet.models.speech_synthesizer import SpeechSynthesizer
from pyseqnet.models.speech_translator import SpeechTranslator
from pyseqnet.models.spoken_question_answerer import SpokenQuestionAnswerer
from pyseqnet.models.text_classifier import TextClassifier
from pyseqnet.models.vision_transformer import VisionTransformer
from pyseqnet.models.visual_question_answerer import VisualQuestionAnswerer
from pyseqnet.models.word_tagger import WordTagger

__all__ = [
    "CopyingTranslator",
    "DetectionTransformer",
    "GoPolicy",
    "ImageClassifier",
    "ImageDiscriminator",
    "ImageGenerator",
    "LabelAttention",
    "LanguageModel",
    "MemoryNetwork",
    "NeuralTuringMachine",
    "QuestionReader",
    "RecurrentTranslator",
    "SentenceReader",
    "SequenceAutoencoder",
    "SequenceTagger",
    "SequenceTranslator",
    "SpeechEncoder",
    "SpeechRecognizer",
    "SpeechSynthesizer",
    "SpeechTranslator",
    "SpokenQuestionAnswerer",
    "TextClassifier",
    "VisionTransformer",
    "VisualQuestionAnswerer",
    "WordTagger",
]
