"""The tiny model and text on disk that fits need."""

from tests.training.conftest import text_file, tiny_folder

__all__ = ["text_file", "tiny_folder"]
