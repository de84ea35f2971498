"""Measuring a model: perplexity, wall-clock speed, and what it ran on.

Import from the modules (`evaluation.perplexity`, `evaluation.speed`, `evaluation.environment`); nothing is
loaded here, so that the command line can start without torch.
"""
