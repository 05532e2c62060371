# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The model `yan` of lm-evaluation-harness, for its tasks of the type `generate_until`.

The harness knows models that were imported; `python -m yan_hf.evaluation.harness` is its command line with this one:

    python -m yan_hf.evaluation.harness run --model yan --model_args pretrained=CHECKPOINT --tasks TASK
"""

from collections import Counter
from typing import Any

import torch
from transformers.utils import logging

from ..data.tokenization import encode_text
from .evaluate import SEED_STRIDE


try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness cannot be used ({error}). Install it: pip install yan-hf[harness]"
    ) from error


logger = logging.get_logger(__name__)

_NO_LIKELIHOOD = (
    "YAN has no exact likelihood of a text, since it generates all tokens at once from a latent state: tasks of the "
    "types loglikelihood, loglikelihood_rolling and multiple_choice cannot be evaluated. Choose or write a task with "
    "`output_type: generate_until`."
)


@register_model("yan")
class YanLM(HFLM):
    """
    YAN for lm-evaluation-harness: a request's context is the source, and the text is cut before the first of its stop
    strings.

    Row `i` of a task draws from the seed that it has in [`evaluate_model`] too, so that neither the batch size nor the
    number of processes changes a text. A context that the model cannot take whole is cut on the left, with a warning;
    no more tokens are asked for than the model has positions.

    Args:
        pretrained: The checkpoint.
        mask_marker: What stands for the mask token in contexts; nothing by default.
        seed: Another one draws other texts.
        kwargs: What the harness's model `hf` takes, such as `dtype`, `device`, `batch_size` and `peft`.
    """

    def __init__(self, pretrained: str, mask_marker: str | None = None, seed: int = 0, **kwargs: Any):
        self.mask_marker, self.seed = mask_marker, int(seed)
        super().__init__(pretrained, **{**kwargs, "backend": "seq2seq"})

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False):
        """Raises `NotImplementedError`."""
        raise NotImplementedError(_NO_LIKELIHOOD)

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A text for each request, in their order."""
        texts, repeats, groups = [""] * len(requests), Counter(), {}
        for index, request in enumerate(requests):
            context, options = request.args
            row = (request.task_name, request.doc_id)
            seed = (self.seed + repeats[row]) * SEED_STRIDE + (request.doc_id or 0)
            repeats[row] += 1
            groups.setdefault(repr(options), []).append((self._encode(context), seed, index))
        size = self.batch_size if isinstance(self.batch_size, int) else 64
        hidden = disable_tqdm or self.rank != 0 or None
        with logging.tqdm(total=len(requests), desc="generate_until", disable=hidden) as bar:
            for rows in groups.values():
                options = requests[rows[0][2]].args[1]
                rows.sort(key=lambda row: len(row[0]))  # little padding
                for start in range(0, len(rows), size):
                    batch = rows[start : start + size]
                    for (_, _, index), text in zip(batch, self._generate(batch, options)):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return texts

    def _encode(self, context: str) -> list[int]:
        longest = self.model.config.max_position_embeddings
        (ids,) = encode_text(self.tokenizer, [context], mask_marker=self.mask_marker)
        if len(ids) > longest:
            logger.warning_once(f"Contexts of more than {longest} tokens, which the model takes, are cut on the left.")
            ids = ids[-longest:]
        return ids

    def _generate(self, rows: list[tuple[list[int], int, int]], options: dict[str, Any]) -> list[str]:
        longest = self.model.config.max_position_embeddings
        options = dict(normalize_gen_kwargs(options, longest))
        until, options["max_new_tokens"] = options.pop("until"), min(options.pop("max_gen_toks"), longest)
        batch = self.tokenizer.pad({"input_ids": [ids for ids, _, _ in rows]}, return_tensors="pt").to(self.device)
        names = ("input_ids", "attention_mask")
        with torch.no_grad():
            found = self.model.generate(**{n: batch[n] for n in names}, seeds=[seed for _, seed, _ in rows], **options)
        texts = self.tokenizer.batch_decode(found, skip_special_tokens=True)
        return [postprocess_generated_text(text, until, think_end_token=None) for text in texts]


if __name__ == "__main__":
    cli_evaluate()
