# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A page that restores text and fills holes in it, and shows every solver step's draft and each token's expert.

    python spaces/yan/app.py

The environment names checkpoints, as folders or on the Hub: `YAN_RESTORATION` and `YAN_INFILLING`, by default those in
`checkpoints/`, and `YAN_RIVAL`, an autoregressive model trained on the rows of `YAN_RESTORATION`, without which there
is no race.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from writing import (
    MASK,
    MAX_CHARACTERS,
    MAX_COPIES,
    MAX_STEPS,
    Drafts,
    Lane,
    Writer,
    choose_writer,
    milliseconds,
)


# Of Okabe and Ito, which colour-blind people tell apart; further experts use them again.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2", "#999999")
EXAMPLES = {
    "restoration": [
        "the city was founded in 1850 by german settlers it is now the capital of the state",
        "she closd the door and sat down why did you not tel me she asked",
    ],
    "infilling": [
        f"One day, a {MASK} named Tom went to the {MASK}. He was very {MASK} and wanted to play.",
        f"Lily had a red ball. {MASK} Then she went home.",
    ],
}
CSS = """
.draft {min-height: 4.5em}
.draft .token.token {margin: 0 1px 0 0; padding: 1px 0}
#message textarea {color: var(--error-text-color); font-weight: 600}
.clock p {font-size: 1.6em; font-variant-numeric: tabular-nums}
"""


def load_writers() -> dict[str, Writer]:
    """Those that are there, by what they do; `"rival"` too."""
    writers = {}
    for task in ("restoration", "infilling", "rival"):
        default = f"checkpoints/{task}" if Path(f"checkpoints/{task}").is_dir() else None
        if checkpoint := os.environ.get(f"YAN_{task.upper()}") or default:
            writers[task] = Writer.load(checkpoint)
    if not writers.keys() - {"rival"}:
        raise SystemExit("There is no checkpoint in checkpoints/: name one by YAN_RESTORATION or YAN_INFILLING.")
    return writers


def show_drafts(drafts: Drafts, steps: int, copies: int) -> list[Any]:
    """What the grid of drafts shows, a row for every step, and the sentence below it."""
    cells = []
    for step in range(MAX_STEPS):
        for copy in range(MAX_COPIES):
            pieces = drafts.steps[step][copy] if step < len(drafts.steps) and copy < copies else []
            value = [(piece, None if expert is None else f"expert {expert}") for piece, expert in pieces]
            cells.append(gr.update(value=value, visible=step < steps and copy < copies))
    time = milliseconds(drafts.seconds)
    if drafts.passes is None:
        return [*cells, f"{len(drafts.steps)} of {steps} steps, {time}"]
    return [*cells, f"{time} with all drafts: {steps} steps, {drafts.passes} passes of the flow."]


def show_lane(lane: Lane, is_running: bool) -> list[str]:
    """A lane's clock and text."""
    if lane.seconds == 0:
        return ["waits", ""]
    passes = "" if lane.passes is None else f" · {lane.passes} passes"
    return [f"**{milliseconds(lane.seconds)}**{passes}{' …' if is_running else ''}", lane.text]


def build_page(writers: dict[str, Writer]) -> gr.Blocks:
    """The page over these models."""
    rival = writers.get("rival") if "restoration" in writers else None
    raced = " In a race, an autoregressive model of the same size writes the text after YAN." if rival else ""
    masks = f" With `{MASK}` in it, its holes are filled." if "infilling" in writers else ""
    num_experts = max(writers[task].model.config.num_experts for task in writers if task != "rival")
    colours = {f"expert {expert}": COLOURS[expert % len(COLOURS)] for expert in range(num_experts)}
    with gr.Blocks(title="YAN", analytics_enabled=False) as page:
        gr.Markdown(
            f"# YAN\nA text without punctuation and case, or with typing errors, is restored.{masks} All tokens are "
            "written at once: every solver step makes a draft of the whole text, and each token has an expert, which "
            f"gives it its colour.{raced}"
        )
        with gr.Row():
            text = gr.Textbox(label="Text", lines=9, max_length=MAX_CHARACTERS, scale=3, elem_id="text")
            with gr.Column(scale=2):
                steps = gr.Slider(1, MAX_STEPS, value=3, step=1, label="Solver steps", elem_id="steps")
                copies = gr.Slider(1, MAX_COPIES, value=1, step=1, label="Alternatives", elem_id="copies")
                seed = gr.Number(0, label="Seed: another one draws other texts", precision=0, minimum=0)
        with gr.Row():
            write = gr.Button("Write", variant="primary", elem_id="write")
            race = gr.Button("Race", elem_id="race", visible=rival is not None)
        gr.Examples([[row] for task in writers if task in EXAMPLES for row in EXAMPLES[task]], text, label="Examples")
        message = gr.Textbox(
            show_label=False, visible=False, interactive=False, elem_id="message", container=False, lines=2
        )
        gr.HighlightedText(  # the legend
            [(name, name) for name in colours], color_map=colours, show_inline_category=False, container=False
        )
        cells = []
        for step in range(1, MAX_STEPS + 1):
            with gr.Row():
                for copy in range(1, MAX_COPIES + 1):
                    label = f"Step {step}" if copy == 1 else f"Step {step}, alternative {copy}"
                    look = {"color_map": colours, "show_inline_category": False, "visible": False, "min_width": 220}
                    cells.append(gr.HighlightedText(label=label, elem_classes="draft", **look))
        figures = gr.Markdown(elem_id="figures")
        lanes = []
        with gr.Row(visible=rival is not None):
            for name, writer in (("YAN", writers.get("restoration")), ("Autoregressive", rival)):
                with gr.Column():
                    size = f", {writer.millions}" if writer else ""
                    lanes.append(gr.Markdown(elem_classes="clock"))
                    lanes.append(gr.Textbox(label=f"{name}{size}", lines=3, interactive=False, elem_classes="lane"))

        def is_refused(error: ValueError) -> Any:
            return gr.update(value=str(error), visible=True)

        no_message = gr.update(visible=False)

        def on_write(text: str, steps: int, copies: int, seed: int) -> Iterator[list[Any]]:
            try:
                for drafts in choose_writer(writers, text).write(text, steps, copies, seed):
                    yield [*show_drafts(drafts, steps, copies), no_message]
            except ValueError as error:
                yield [*show_drafts(Drafts([], 0.0), 0, 0)[:-1], "", is_refused(error)]

        def on_race(text: str, steps: int, seed: int) -> Iterator[list[Any]]:
            try:
                if MASK in (text or ""):
                    raise ValueError(f"The autoregressive model has learnt to restore text only: leave out {MASK}.")
                for ours, theirs in choose_writer(writers, text).race(rival, text, steps, seed):
                    is_running = theirs.seconds == 0
                    yield [*show_lane(ours, is_running), *show_lane(theirs, not is_running), no_message]
            except ValueError as error:
                yield ["", "", "", "", is_refused(error)]
                return
            yield [*show_lane(ours, False), *show_lane(theirs, False), no_message]

        def on_change(text: str, *choices: int) -> Iterator[list[Any]]:
            if text:
                yield from on_write(text, *choices)

        choices, outputs = [text, steps, copies, seed], [*cells, figures, message]
        shown = {"show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "models"}
        gr.on([write.click, text.submit, steps.change, copies.change], lambda: [""] * 4, None, lanes, queue=False)
        gr.on([write.click, text.submit], on_write, choices, outputs, **shown)
        gr.on([steps.change, copies.change], on_change, choices, outputs, trigger_mode="always_last", **shown)
        race.click(on_race, [text, steps, seed], [*lanes, message], **shown)
    return page.queue(max_size=32)


if __name__ == "__main__":
    # Nothing is fetched from elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    build_page(load_writers()).launch(theme=theme, css=CSS, footer_links=["gradio"])
