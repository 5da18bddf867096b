"""What is measured: FID, KID and IS on features, and a classifier that gives features for labelled data."""

from .distances import fid, fid_from_statistics, inception_score, kid
from .evaluation import available, evaluate, label
from .features import DomainClassifier

__all__ = [
    "DomainClassifier",
    "available",
    "evaluate",
    "fid",
    "fid_from_statistics",
    "inception_score",
    "kid",
    "label",
]
