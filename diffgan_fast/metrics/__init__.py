"""What is measured: distances of features, what part of the data samples reach, and KL of points.

Each metric is a function on features and an object that is fed batch by batch; :func:`evaluate` brings them together.
"""

from .cautions import SampleRangeWarning, SmallSampleWarning
from .checks import NotFinite
from .evaluation import HIGHER_IS_BETTER, available, evaluate, label, usual
from .extractors import VGG, EffL0, Inception, extractors, find_extractor
from .features import DomainClassifier
from .frechet import Moments, fid, fid_from_statistics, fid_infinity
from .kernel import kid
from .knn import knn_kl
from .modes import class_coverage, inception_score, mode_coverage
from .neighbours import PRDC, density_coverage, prdc, precision_recall
from .streaming import FID, KID, ClassCoverage, InceptionScore, KnnKL, ModeCoverage, PrecisionRecallDensityCoverage

__all__ = [
    "FID",
    "HIGHER_IS_BETTER",
    "KID",
    "PRDC",
    "VGG",
    "ClassCoverage",
    "DomainClassifier",
    "EffL0",
    "Inception",
    "InceptionScore",
    "KnnKL",
    "ModeCoverage",
    "Moments",
    "NotFinite",
    "PrecisionRecallDensityCoverage",
    "SampleRangeWarning",
    "SmallSampleWarning",
    "available",
    "class_coverage",
    "density_coverage",
    "evaluate",
    "extractors",
    "fid",
    "fid_from_statistics",
    "fid_infinity",
    "find_extractor",
    "inception_score",
    "kid",
    "knn_kl",
    "label",
    "mode_coverage",
    "prdc",
    "precision_recall",
    "usual",
]
