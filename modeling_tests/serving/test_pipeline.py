# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The pipeline "text2text-generation": what `generate` writes for each source, alone or in a batch."""

import subprocess
import sys

import pytest
import torch
from testing_utils import small_model
from transformers import T5Config, T5ForConditionalGeneration, pipeline

from yan_hf import encode_text, train_tokenizer


SOURCES = ["one two three", "four", "five six", "one </s> two", "seven eight nine ten"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["one two three four five six seven eight nine ten"] * 20, vocab_size=300)
    model = small_model(vocab_size=len(tokenizer), start_state="aligned", max_position_embeddings=48)
    # Words, drawn: other sources and seeds get other texts, of a model that was never trained too.
    model.generation_config.update(do_sample=True, suppress_tokens=list(range(261)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return pipeline("text2text-generation", model=str(folder), device="cpu", seed=3)


def texts(results) -> list[str]:
    return [result["generated_text"] for result in results]


def test_a_text_is_that_of_generate(writer):
    ids = torch.tensor(encode_text(writer.tokenizer, SOURCES[:1]))
    expected = writer.model.generate(ids, seeds=[3, 4], num_return_sequences=2, num_inference_steps=2)
    options = {"num_return_sequences": 2, "num_inference_steps": 2}
    assert texts(writer(SOURCES[0], **options)) == writer.tokenizer.batch_decode(expected, skip_special_tokens=True)
    found = writer(SOURCES[0], return_tensors=True, **options)
    assert [result["generated_token_ids"] for result in found] == expected.tolist()


def test_texts_do_not_depend_on_the_batch_and_a_generator_is_read_as_it_goes(writer):
    alone = [writer(source, num_return_sequences=2) for source in SOURCES]
    assert alone[0] != alone[1] and alone[0][0] != alone[0][1] and alone[0] != writer(SOURCES[0], seed=8)
    for side, size in (("right", 2), ("left", 5)):
        writer.tokenizer.padding_side = side
        assert writer(SOURCES, batch_size=size, num_return_sequences=2) == alone
    assert writer(SOURCES, batch_size=3) == [results[0] for results in alone]
    taken = []
    stream = writer((taken.append(source) or source for source in SOURCES), batch_size=2, num_return_sequences=2)
    assert next(iter(stream)) == alone[0] and len(taken) < len(SOURCES)
    assert writer([]) == [] and "text" in repr(writer)


def test_special_tokens_in_a_source_are_text_but_for_the_named_mask(writer):
    def ids(text, **marks):
        return writer.preprocess(text, **marks)["input_ids"][0].tolist()

    end, mask = writer.tokenizer.eos_token_id, writer.tokenizer.mask_token_id
    plain = ids("one </s><pad><mask> two")
    assert plain.count(end) == 1 and mask not in plain and writer.tokenizer.pad_token_id not in plain
    marked = ids("one </s> <mask> two", mask_marker="<mask>")
    assert marked.count(end) == 1 and marked.count(mask) == 1
    assert ids("one </s> two", split_special_tokens=False).count(end) == 2
    kept = writer("one <mask> three", mask_marker="<mask>", keep_known=True)
    assert kept[0]["generated_text"].startswith("one ") and kept[0]["generated_text"].endswith(" three")


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (" ", {}, ValueError, "empty"),
        ("one " * 99, {}, ValueError, "the model takes 48 at most"),
        (7, {}, TypeError, "must be a text"),
        ("one", {"num_beams": 2}, ValueError, "num_beams"),
        ("one", {"no_such_option": 2}, ValueError, "no_such_option"),
    ],
)
def test_what_cannot_be_used_is_refused(writer, source, options, error, message):
    with pytest.raises(error, match=message):
        writer(source, **options)


def test_stop_strings_and_a_saved_pipeline(writer, tmp_path):
    whole = writer(SOURCES[0])[0]["generated_text"]
    cut = writer(SOURCES[0], stop_strings=whole[1:2])[0]["generated_text"]
    assert whole.startswith(cut) and len(cut) < len(whole) and whole[1:2] in cut
    writer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert pipeline("text2text-generation", model=str(tmp_path), seed=3)(SOURCES) == writer(SOURCES)


def test_other_models_are_refused(writer):
    model = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="type 't5'"):
        pipeline("text2text-generation", model=model, tokenizer=writer.tokenizer)


@pytest.mark.slow
def test_import_alone_registers_it():
    code = "import yan_hf; from transformers.pipelines import check_task; print(check_task('text2text-generation')[0])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "text2text-generation"
