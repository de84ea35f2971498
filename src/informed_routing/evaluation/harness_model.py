"""A live model as lm-evaluation-harness sees it. Imports the harness: load this module only where it is there."""

from __future__ import annotations

import copy
from typing import Any

from lm_eval.models.huggingface import HFLM

from informed_routing.evaluation.numbers import FiniteLogits
from informed_routing.progress import NullProgress, Progress

from .harness_scoring import distinct, log_likelihoods


class LiveModel(HFLM):  # type: ignore[misc]
    """The harness' own wrapper (its tokenisation, windows and generation) with our log-likelihoods.

    Its own would hide padding from the model, call it in a form that native engines do not take, and compute the text
    of a question anew for each answer.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, progress: Progress | None = None) -> None:
        # a copy, since the wrapper may give it a padding token
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size)
        self.progress = progress or NullProgress()
        self.label = "log-likelihoods"

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        self.progress.stage(self.label, distinct(pairs))
        return log_likelihoods(
            self.model,
            pairs,
            max_length=self.max_length,
            batch_size=self.batch_size,
            dtype=self.softmax_dtype,
            progress=self.progress,
        )

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        from transformers import LogitsProcessorList

        check: Any = FiniteLogits(self.model, context.shape[1], f"{self.label}: a logit")
        return super()._model_generate(
            context, max_length, stop, logits_processor=LogitsProcessorList([check]), **settings
        )


class HarnessTokens:
    """The harness' tokenisation for `page_perplexity`: with the beginning of text where a tokenizer adds it."""

    def __init__(self, model: LiveModel) -> None:
        self._model = model
        self.bos_token_id: int | None = model.prefix_token_id
        self.eos_token_id: int | None = model.eot_token_id

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, as the harness counts them."""
        ids: list[int] = self._model.tok_encode(text)
        return ids
