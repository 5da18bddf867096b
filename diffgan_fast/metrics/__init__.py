"""What is measured: FID, KID and IS on features, a classifier that gives them for labelled data, and KL of points."""

from .distances import fid, fid_from_statistics, inception_score, kid
from .evaluation import available, evaluate, label
from .features import DomainClassifier
from .knn import knn_kl

__all__ = [
    "DomainClassifier",
    "available",
    "evaluate",
    "fid",
    "fid_from_statistics",
    "inception_score",
    "kid",
    "knn_kl",
    "label",
]
