# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the page shows, apart from Gradio: drafts as they come, and a race with an autoregressive model."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

import yan_hf  # noqa: F401  registers YAN with the Auto classes
from yan_hf.data.sources import encode_source
from yan_hf.data.tokenization import CASE_MARK
from yan_hf.serving.engine import DraftStreamer


MASK = "<mask>"
MAX_CHARACTERS, MAX_STEPS, MAX_COPIES = 2000, 4, 3
CLOCK_SECONDS = 0.05  # between two looks at a running clock

Pieces = list[tuple[str, int | None]]  # of a text, each with its expert once that is known


@dataclass
class Drafts:
    """What is there of one call: for every solver step so far, a draft for each copy."""

    steps: list[list[Pieces]]
    seconds: float
    passes: int | None = None  # of the flow trunk, at the end


@dataclass
class Lane:
    """One system in a race."""

    text: str = ""
    seconds: float = 0.0
    passes: int | None = None  # of the flow trunk or of the autoregressive decoder, at the end


@dataclass
class Writer:
    """A model with its tokenizer, YAN or autoregressive."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, checkpoint: str) -> "Writer":
        """From a folder or the Hub, warmed up: a first call is slower than those that follow."""
        writer = cls(
            AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
        )
        writer.model.generate(**writer.encode("warm up"), max_new_tokens=8)
        return writer

    @property
    def millions(self) -> str:
        """Its parameters."""
        return f"{self.model.num_parameters() / 1e6:.1f} million parameters"

    def encode(self, text: str) -> dict[str, torch.Tensor]:
        """The source of `generate`, `(1, L)`, and its mask. Raises `ValueError` for what the model cannot take."""
        longest = self.model.config.max_position_embeddings
        ids = torch.tensor([encode_source(self.tokenizer, text, longest, "The text", mask_marker=MASK)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def options(self, steps: int, copies: int, seed: int) -> dict[str, Any]:
        """Options of YAN's `generate`. Raises `ValueError` for what the page does not offer."""
        for name, value, highest in (("steps", steps, MAX_STEPS), ("alternatives", copies, MAX_COPIES)):
            if value not in range(1, highest + 1):
                raise ValueError(f"The number of {name} must be from 1 to {highest}, but is {value}.")
        if not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(f"The seed must be a number from 0 to {2**31 - 1}, but is {seed}.")
        return {
            "num_inference_steps": int(steps),
            "num_return_sequences": int(copies),
            "seeds": list(range(seed, seed + int(copies))),
            "max_new_tokens": self.model.config.max_position_embeddings,
            "return_dict_in_generate": True,
            "keep_known": self.model.config.start_state == "aligned",
        }

    def write(self, text: str, steps: int, copies: int, seed: int) -> Iterator[Drafts]:
        """
        The drafts after every solver step, as they come; at the end once more, with experts.

        Raises:
            ValueError: for what the model cannot take.
        """
        source, options = self.encode(text), self.options(steps, copies, seed)

        def generate(put: Callable[[Any], None]):
            streamer = DraftStreamer(put)
            put(self.model.generate(**source, **options, streamer=streamer, output_expert_indices=True))

        drafts: list[torch.Tensor] = []
        for event, seconds in follow(generate):
            if isinstance(event, torch.Tensor):
                drafts.append(event)
                yield Drafts([self._pieces(draft) for draft in drafts], seconds)
            elif event is not None:
                experts = event.expert_indices
                experts = experts if experts.dim() == 3 else [experts] * len(drafts)
                drafts[-1] = event.sequences
                found = [self._pieces(draft, chosen) for draft, chosen in zip(drafts, experts)]
                yield Drafts(found, seconds, event.num_field_evaluations)

    def race(self, rival: "Writer", text: str, steps: int, seed: int) -> Iterator[tuple[Lane, Lane]]:
        """
        The same text by this YAN and then by an autoregressive model, greedily: both lanes, whenever a clock moves.
        They run one after the other, so that neither takes time from the other.
        """
        source, options = self.encode(text), self.options(steps, 1, seed)
        ours, theirs = Lane(), Lane()

        def generate(put: Callable[[Any], None]):
            output = self.model.generate(**source, **options)
            put((output.sequences[0].tolist(), output.num_field_evaluations))

        for event, ours.seconds in follow(generate):
            if event is not None:
                ids, ours.passes = event
                ours.text = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield ours, theirs

        for event, theirs.seconds in follow(lambda put: rival.continue_greedily(text, put)):
            if event is not None:
                theirs.text, theirs.passes = event
            yield ours, theirs

    def continue_greedily(self, text: str, put: Callable[[tuple[str, int]], None]):
        """An autoregressive model's text: after every token, what is there, and the passes of the decoder so far."""
        longest = self.model.config.max_position_embeddings - 1  # the decoder starts from a token of its own
        streamer = _TokenStreamer(
            lambda ids: put((self.tokenizer.decode(ids, skip_special_tokens=True), len(ids) - 1))
        )
        options = {"max_new_tokens": longest, "do_sample": False, "num_beams": 1, "use_cache": True}
        self.model.generate(**self.encode(text), **options, streamer=streamer)

    def _pieces(self, rows: torch.Tensor, experts: torch.Tensor | None = None) -> list[Pieces]:
        """Each row's pieces of text and their experts; one is a character's bytes, or a capital's mark and word."""
        found: list[Pieces] = []
        mark = self.tokenizer.get_vocab().get(CASE_MARK)
        known = [[None] * rows.shape[1]] * len(rows) if experts is None else experts.tolist()
        for row, chosen in zip(rows.tolist(), known):
            pieces, held = [], []
            for token, expert in zip(row, chosen):
                held.append(token)
                piece = self.tokenizer.decode(held, skip_special_tokens=True)
                if token == mark or ("\ufffd" in piece and len(held) < 4):
                    continue  # a character of UTF-8 has up to four bytes
                held = []
                if piece:
                    pieces.append((piece, expert))
            if held:
                pieces.append((piece, expert))
            found.append(pieces)
        return found


class _TokenStreamer(BaseStreamer):
    """Hands on all tokens so far, whenever there is a new one."""

    def __init__(self, put_ids: Callable[[list[int]], None]):
        self.put_ids, self.ids = put_ids, []

    def put(self, value: torch.Tensor):
        self.ids += value.flatten().tolist()
        self.put_ids(list(self.ids))

    def end(self):
        """Nothing is left to do."""


def follow(job: Callable[[Callable[[Any], None]], None]) -> Iterator[tuple[Any, float]]:
    """
    Runs a job in a thread of its own, which is given a function to put something by.

    Yields:
        What it puts, as it comes, or `None` where only time has passed; and the seconds since it began. An error of
        the job is raised at its end.
    """
    events: SimpleQueue = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        began = time.perf_counter()

        def put(event: Any):
            events.put((event, time.perf_counter() - began))

        future = pool.submit(job, put)
        future.add_done_callback(lambda _: events.put(None))
        while True:
            try:
                event = events.get(timeout=CLOCK_SECONDS)
            except Empty:
                event = (None, time.perf_counter() - began)
            if event is None:
                return future.result()
            yield event


def choose_writer(writers: dict[str, Writer], text: str | None) -> Writer:
    """
    Of `"restoration"` and `"infilling"`, as far as they are there, the one for a text: with masks or without.

    Raises:
        ValueError: where the one is not there, and for no text, or one that is too long to look at.
    """
    if not text or not text.strip():
        raise ValueError("There is no text: write one first.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"The text has {len(text)} characters, but may have {MAX_CHARACTERS} at most: shorten it.")
    if MASK in text and "infilling" not in writers:
        raise ValueError(f"There is no model here that fills holes: leave out {MASK}.")
    if MASK not in text and "restoration" not in writers:
        raise ValueError(f"There is no model here that restores text: put in {MASK} where something is to be filled.")
    return writers["infilling" if MASK in text else "restoration"]


def milliseconds(seconds: float) -> str:
    """A time as the page shows it."""
    return f"{1000 * seconds:.0f} ms"
