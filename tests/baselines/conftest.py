"""The tiny model and text on disk that fits need; one thread, since a second only costs time on tiny models."""

from tests.training.conftest import _one_thread, text_file, tiny_folder

__all__ = ["_one_thread", "text_file", "tiny_folder"]
