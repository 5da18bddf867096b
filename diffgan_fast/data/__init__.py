"""Data sets in memory, from names, folders, archives, arrays or other people's loaders."""

from .base import Data, FloatData, ImageData, to_uint8
from .loading import load, load_test
from .registry import datasets

__all__ = ["Data", "FloatData", "ImageData", "datasets", "load", "load_test", "to_uint8"]
