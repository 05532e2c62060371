# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tokenizers: training, round trips through AutoTokenizer, and fitting existing ones."""

import io
import random

import pytest
import sentencepiece
from babi import simulate_many
from testing_utils import small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from yan_hf import encode_text, prepare_tokenizer, train_tokenizer
from yan_hf.data.tokenization import CASE_MARK, shown_texts


CORPUS = [" ".join(example.context) + " Ünïcode naïve café 123." for example in simulate_many(200, 4, seed=0)]
HARD_TEXTS = [
    "",
    " ",
    "  two  spaces, tab\tand\nnew line\r\n ",
    "▁ the sentencepiece space ▁▁",
    "日本語のテキスト, العربية, हिन्दी",
    "👩‍👩‍👧‍👦 e\u0301 vs é, \u200b zero width, \ufeff BOM, \x00 NUL, \x7f",
    "ﬁ ligature, ½, ²",
    "Mary went to the kitchen.",
    "\U0010ffff\ue000",
    "the literal <0x41> and <0x00>, <b>tags</b>, a < b",
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request, tmp_path_factory):
    """As a user gets it: trained, saved, and loaded through the Auto class."""
    folder = tmp_path_factory.mktemp(request.param)
    train_tokenizer(CORPUS, vocab_size=400, model_type=request.param).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_are_the_first_ids(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    ids = [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "unk", "mask")]
    assert ids == [0, 1, 2, 3, 4]


def test_encoding_appends_the_end_token_and_finds_the_mask(tokenizer):
    ids = tokenizer("Where is Mary? <mask>")["input_ids"]
    assert ids[-1] == 2 and ids.count(4) == 1 and 3 not in ids


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert 3 not in ids


def test_random_unicode_round_trips(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        points = (rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000), 32, 97]) for _ in range(20))
        text = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_batches_pad_and_mask(tokenizer):
    batch = tokenizer(["Mary", "Mary went to the kitchen."], padding=True)
    assert batch["attention_mask"][0][-1] == 0 and batch["input_ids"][0][-1] == 0


def test_same_segmentation_as_sentencepiece():
    """The converted vocabulary segments as sentencepiece itself does."""
    for model_type in ("unigram", "bpe"):
        buffer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=buffer,
            vocab_size=400,
            model_type=model_type,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=["<mask>"],
            minloglevel=2,
        )
        reference = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
        tokenizer = train_tokenizer(CORPUS, vocab_size=400, model_type=model_type)
        assert len(tokenizer) == reference.get_piece_size()
        for text in [*CORPUS[:50], "Daniel journeyed back", "something unseen: 東京"]:
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)


def test_bad_arguments():
    with pytest.raises(ValueError, match="model_type"):
        train_tokenizer(CORPUS, model_type="word")
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(CORPUS, vocab_size=100)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", "\n"], vocab_size=400)


# Existing tokenizers


def gpt2_style():
    """Byte-level pairs and one special token, as GPT-2's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"]))
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, unk_token=end)


def t5_style():
    """A unigram vocabulary with pad, end and unknown tokens, but neither begin nor mask."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    core.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def llama_style():
    """Begin and end tokens, no pad, no mask."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=special[0], eos_token=special[1])


def bert_style():
    """Word pieces with the special tokens of masked language models, of which none is called begin or end."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    names = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    core.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*names.values()]))
    return PreTrainedTokenizerFast(tokenizer_object=core, **{f"{name}_token": text for name, text in names.items()})


def padded_with_end():
    tokenizer = gpt2_style()
    tokenizer.pad_token = tokenizer.eos_token  # a common habit, which would hide the end from the loss
    return tokenizer


@pytest.mark.parametrize("make", [gpt2_style, t5_style, llama_style, bert_style, padded_with_end])
def test_existing_tokenizers_get_what_is_missing(make, tmp_path):
    tokenizer, model = make(), small_model()
    kept = (tokenizer.eos_token, tokenizer.bos_token)
    assert prepare_tokenizer(tokenizer, model) is tokenizer
    assert kept[0] in (None, tokenizer.eos_token) and kept[1] in (None, tokenizer.bos_token)
    ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id]
    assert None not in ids and len(set(ids)) == 3 and tokenizer.bos_token_id is not None
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == max(60, len(tokenizer))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    size = len(tokenizer)
    prepare_tokenizer(tokenizer, model)
    assert len(tokenizer) == size  # nothing twice
    ids = tokenizer(f"Mary went {tokenizer.mask_token}", return_tensors="pt")["input_ids"]
    assert (ids == tokenizer.mask_token_id).sum() == 1
    model.generate(ids, max_new_tokens=4)
    model.config.validate_architecture()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.mask_token_id == tokenizer.mask_token_id and len(loaded) == size


def test_special_tokens_of_pretrained_encoders_are_kept():
    tokenizer = bert_style()
    size = len(tokenizer)
    prepare_tokenizer(tokenizer)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.mask_token) == ("[CLS]", "[SEP]", "[MASK]")
    assert tokenizer.pad_token == "[PAD]" and len(tokenizer) == size
    tokenizer = t5_style()
    tokenizer.add_tokens(["<extra_id_0>", "<extra_id_1>"], special_tokens=True)
    size = len(tokenizer)
    assert prepare_tokenizer(tokenizer).mask_token == "<extra_id_0>" and len(tokenizer) == size


# User text


SPELLED = "Mary </s> went <mask> to<pad>the <s> kitchen <unk></s>."


def trained(model_type):
    # Pieces of special tokens, and of bytes, are words of this corpus.
    words = " ".join(f"{'</'} s> {part}" for part in ("</ s>", "<ma sk>", "<m ask>", "<pa d>", "<0x4 1>", "sk>", "1>"))
    return train_tokenizer(
        [*CORPUS, *[words.replace(" ", gap) for gap in (" ", "") for _ in range(200)]], 450, model_type
    )


KINDS = {
    "unigram": lambda: trained("unigram"),
    "bpe": lambda: trained("bpe"),
    **{make.__name__: lambda make=make: prepare_tokenizer(make()) for make in (gpt2_style, t5_style, llama_style)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_text_and_only_the_marker_masks(kind):
    tokenizer = KINDS[kind]()
    mask = tokenizer.mask_token_id
    control = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
    specials = " ".join(tokenizer.all_special_tokens)
    plain = "Where is Mary? She is in the @@."
    rows = encode_text(tokenizer, [SPELLED, specials, plain, f"{SPELLED}@@", ""], "@@")
    masks, ends = [0, 0, 1, 1, 0], rows[-1]
    for row, count in zip(rows, masks):
        assert [i for i in row if i in control] == [mask] * count + ends
    # Without a special token in it, a text is what the tokenizer makes of it.
    assert rows[2] == tokenizer(plain.replace("@@", tokenizer.mask_token))["input_ids"]
    assert encode_text(tokenizer, [SPELLED], split_special_tokens=False) == [tokenizer(SPELLED)["input_ids"]]
    (cut,) = encode_text(tokenizer, [SPELLED], max_length=5)
    assert len(cut) == 5 and cut[5 - len(ends) :] == ends
    if kind in ("unigram", "bpe"):
        assert tokenizer.decode(rows[0][:-1]) == SPELLED and ends == [tokenizer.eos_token_id]


def test_pieces_of_the_vocabulary_never_merge_into_special_tokens():
    tokenizer = trained("bpe")
    assert not {0, 1, 2, 4} & {*tokenizer(SPELLED, add_special_tokens=False, split_special_tokens=True)["input_ids"]}
    assert tokenizer.decode(tokenizer("<0x41>")["input_ids"], skip_special_tokens=True) == "<0x41>"


def test_a_marker_needs_a_mask_token():
    with pytest.raises(ValueError, match="no mask token"):
        encode_text(gpt2_style(), ["a @@"], "@@")


def test_a_larger_table_is_left_alone():
    tokenizer, model = gpt2_style(), small_model(vocab_size=1000)
    prepare_tokenizer(tokenizer, model)
    assert model.config.vocab_size == 1000


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_with_marked_capitals_a_word_is_the_same_tokens_in_either_case(model_type, tmp_path):
    texts = ["Mary went to London.", "mary saw London and New York; NASA did not.", 'She said: "It is É."']
    tokenizer = train_tokenizer([*texts, *map(str.lower, texts)] * 5, 360, model_type, factor_case=True)
    tokenizer.save_pretrained(tmp_path)
    for made in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        mark = made.convert_tokens_to_ids(CASE_MARK)
        for text in [*texts, "A b C", "<mask> Ab"]:
            (ids,) = encode_text(made, [text])
            assert made.decode(ids, skip_special_tokens=True) == text
        capital, small = (encode_text(made, [f"to {word} now"])[0] for word in ("London", "london"))
        assert [token for token in capital if token != mark] == small and capital.count(mark) == 1
        assert "".join(shown_texts(made, capital[:-1])) == "to London now" and shown_texts(made, [mark]) == [""]
        # A mark before what is no letter, which a model may write, leaves nothing behind.
        assert made.decode([mark, *encode_text(made, ["1 b"])[0], mark, mark], skip_special_tokens=True) == "1 b"
