# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A pretrained encoder of Transformers in the model: weights, padding, statistics of its states and cached states."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from testing_utils import batch_of_rows
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertModel,
    DebertaV2Config,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    MT5Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
)
from transformers.generation import CompileConfig

from yan_hf import YanConfig, YanForAutoEncoding, YanForConditionalGeneration
from yan_hf.configuration_yan import AUTO_MAP


SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 26, "initializer_range": 0.15}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
LAYERS = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
FAMILIES = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, pad_token_id=1),
    "modernbert": ModernBertConfig(
        **SIZES, pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2, local_attention=8
    ),
    "deberta": DebertaV2Config(
        **SIZES,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        position_buckets=8,
        conv_kernel_size=3,  # as of the larger ones
    ),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "t5": T5Config(**T5),
    "mt5": MT5Config(**T5, tie_word_embeddings=False),
    "bart": BartConfig(
        vocab_size=60, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=26, **LAYERS
    ),
}
FIELDS = {"flow_layers": 2, "decoder_layers": 1, "max_position_embeddings": 24, "mask_token_id": 4}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A pretrained model of each family: of encoder-decoder models the whole."""
    found = {}
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        found[family] = tmp_path_factory.mktemp(family)
        AutoModel.from_config(config).save_pretrained(found[family])
    return found


def build(folder, **fields) -> YanForConditionalGeneration:
    torch.manual_seed(1)
    return YanForConditionalGeneration.from_encoder_pretrained(folder, **{**FIELDS, **fields}).eval()


def pairs(side: str = "right", **changes) -> dict[str, torch.Tensor]:
    _, ids, mask = batch_of_rows([4, 9, 6], side)
    _, labels, canvas = batch_of_rows([5, 3, 8], seed=2)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(canvas == 0, -100), **changes}


def with_lengths(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `start_state="fertility"` learns from: here every target belongs to its source's first token."""
    lengths = torch.zeros_like(batch["input_ids"])
    lengths[torch.arange(len(lengths)), batch["attention_mask"].argmax(dim=1)] = (batch["labels"] != -100).sum(dim=1)
    return {**batch, "token_lengths": lengths}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@FAMILY
def test_the_states_are_those_of_the_pretrained_model(family, folders):
    source = AutoModel.from_pretrained(folders[family])
    source = source.get_encoder() if source.config.is_encoder_decoder else source
    model = build(folders[family])
    batch = pairs()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if family == "roberta":  # it finds padding by its token
        ids = ids.masked_fill(mask == 0, 1)
    expected = source(input_ids=ids, attention_mask=mask)[0]
    states = model.model.encoder.encode(ids, mask).last_hidden_state
    torch.testing.assert_close(states[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert not any("decoder" in name or "pooler" in name for name in model.model.encoder.state_dict())


@FAMILY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_changes_a_row(family, side, folders):
    model = build(folders[family])
    rows, ids, mask = batch_of_rows([4, 9, 6], side, extra=20)  # wider than any position table
    latents = model.model.encode(ids, mask).last_hidden_state
    for index, row in enumerate(rows):
        alone = model.model.encode(row[None]).last_hidden_state[0]
        torch.testing.assert_close(latents[index, mask[index].bool()], alone, rtol=1e-5, atol=1e-5)


@FAMILY
def test_training_reaches_what_trains(family, folders):
    model = build(folders[family]).train()
    model(**pairs(), generator=seeded()).loss.backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert not any("encoder" in name for name in without), without
    frozen = build(folders[family], frozen_parts=["encoder"]).train()
    assert not frozen.model.encoder.model.training and frozen.model.encoder.training
    frozen(**pairs()).loss.backward()
    assert all(weight.grad is None for weight in frozen.model.encoder.model.parameters())
    assert frozen.model.flow.norm.weight.grad is not None


LOAD = """
import sys, torch
for finder in {finders}:
    sys.meta_path.insert(0, finder)
{imports}
from transformers import AutoModelForSeq2SeqLM
inputs = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code={trust})
    torch.save(model.generate(**inputs, seeds=[0, 1, 2], max_new_tokens=8), folder + "/ids.pt")
"""


@pytest.mark.parametrize("with_code", [False, True])
@pytest.mark.slow
def test_a_new_process_generates_the_same_tokens(with_code, folders, tmp_path):
    """After a training step, from every family; also without the package, through the checkpoint's code."""
    inputs = {name: values for name, values in pairs("left").items() if name != "labels"}
    torch.save(inputs, tmp_path / "inputs.pt")
    expected = {}
    for family in FAMILIES:
        other_width = {"hidden_size": 48, "num_attention_heads": 4} if family == "electra" else {}
        model = build(folders[family], **other_width).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**pairs()).loss.backward()
        optimizer.step()
        model.fit_latent_statistics([pairs()])
        if with_code:
            model.config.auto_map = dict(AUTO_MAP)
        model.save_pretrained(tmp_path / family)
        expected[family] = model.eval().generate(**inputs, seeds=[0, 1, 2], max_new_tokens=8)
    refuse = "type('Refuse', (), {'find_spec': lambda self, name, path=None, target=None: exec('raise ImportError')"
    refuse += " if name.split('.')[0] == 'yan_hf' else None})()"
    options = {"finders": f"[{refuse}]" if with_code else "[]", "trust": with_code}
    script = LOAD.format(imports="" if with_code else "import yan_hf", **options)
    command = [sys.executable, "-c", script, str(tmp_path / "inputs.pt"), *(str(tmp_path / name) for name in FAMILIES)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    for family, ids in expected.items():
        assert torch.equal(torch.load(tmp_path / family / "ids.pt"), ids), family


def test_the_configuration_follows_the_encoder_and_takes_a_dictionary():
    encoder = FAMILIES["roberta"]
    config = YanConfig(encoder_config=encoder, hidden_size=32, num_attention_heads=4)
    assert (config.vocab_size, config.encoder_layers, config.max_position_embeddings) == (60, 2, 26)
    again = YanConfig.from_dict(config.to_dict())
    assert type(again.encoder_config) is RobertaConfig and again.to_dict() == config.to_dict()
    assert type(YanConfig(encoder_config=encoder.to_dict()).encoder_config) is RobertaConfig


def test_a_configuration_leaves_a_living_models_alone():
    model = BertModel(FAMILIES["bert"]).eval()
    before = model.config._attn_implementation
    YanConfig(encoder_config=model.config)
    assert before is not None and model.config._attn_implementation == before


def test_the_position_table_of_the_encoder_is_the_limit(folders):
    longest = {"bert": 26, "roberta": 24, "modernbert": 26, "bart": 26, "t5": 1024}
    for family, limit in longest.items():
        assert build(folders[family], max_position_embeddings=limit).config.max_position_embeddings == limit
        torch.manual_seed(0)
        found = YanForConditionalGeneration.from_encoder_pretrained(folders[family], flow_layers=1)
        assert found.config.max_position_embeddings == limit
    with pytest.raises(ValueError, match=r"max_position_embeddings=25.* 24 tokens"):
        build(folders["roberta"], max_position_embeddings=25)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dtype_and_attention_are_handed_down(implementation, folders, tmp_path):
    build(folders["bert"]).save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16, "attn_implementation": implementation}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, **options)
    for model in (loaded, build(folders["bert"], **options)):
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert model.config._attn_implementation == implementation
        assert model.model.encoder.model.config._attn_implementation == implementation
        assert model.generate(pairs()["input_ids"], max_new_tokens=4).shape[0] == 3
    # A model in float32 around a configuration that says otherwise.
    config = YanConfig(encoder_config={**FAMILIES["bert"].to_dict(), "dtype": "bfloat16"}, max_position_embeddings=24)
    assert YanForConditionalGeneration(config).model.encoder.model.dtype == torch.float32


def test_a_head_can_share_the_encoders_table(folders, tmp_path):
    model = build(folders["bert"], tie_word_embeddings=True)
    table = model.model.encoder.model.embeddings.word_embeddings
    assert model.get_input_embeddings() is table and model.lm_head.weight is table.weight
    assert table.weight is not build(folders["bert"]).lm_head.weight
    model.resize_token_embeddings(64)
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.out_features == 64
    assert model.config.vocab_size == model.config.encoder_config.vocab_size == 64
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight and loaded.lm_head.weight.shape[0] == 64
    with pytest.raises(ValueError, match="tie_word_embeddings.*has 16"):
        build(folders["electra"], tie_word_embeddings=True)


def test_another_width_gets_a_projection_that_trains(folders):
    model = build(folders["bert"], hidden_size=48, num_attention_heads=4, frozen_parts=["encoder"]).train()
    projection = model.model.encoder.proj
    torch.testing.assert_close(projection.weight.T @ projection.weight, torch.eye(32), rtol=1e-5, atol=1e-5)
    output = model(**pairs())
    assert output.target_latents.shape == (3, 8, 48)
    output.loss.backward()
    assert projection.weight.grad is not None and build(folders["bert"]).model.encoder.proj is None


def test_statistics_normalise_the_latents_of_real_tokens_and_are_saved(folders, tmp_path):
    model = build(folders["bert"])
    model.fit_latent_statistics([pairs("left"), pairs()])
    seen = []
    for side in ("left", "right"):
        batch = pairs(side)
        canvas = batch["labels"] != -100
        seen.append(model.model.encode(batch["input_ids"], batch["attention_mask"])[0][batch["attention_mask"].bool()])
        seen.append(model.model.encode(batch["labels"].masked_fill(~canvas, 0), canvas)[0][canvas])
    seen = torch.cat(seen)
    torch.testing.assert_close(seen.mean(dim=0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(dim=0, correction=0), torch.ones(32), atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.encoder.latent_mean, model.model.encoder.latent_mean)
    with pytest.raises(ValueError, match="at least two tokens"):
        model.fit_latent_statistics([])


def cached(model, batch):
    states = model.model.encoder.encode_batch(batch)
    return dict(zip(("encoder_states", "target_states"), (values for values, _ in states)))


@pytest.mark.parametrize("start_state", ["noise", "stretched", "fertility"])
def test_cached_states_give_the_same_loss(start_state, folders):
    fields = {"frozen_parts": ["encoder"], "latent_noise": 0.5, "hidden_size": 48, "num_attention_heads": 4}
    model = build(folders["roberta"], start_state=start_state, **fields)
    batch = with_lengths(pairs("left"))
    with torch.no_grad():
        states = cached(model, batch)
    ran = []
    model.model.encoder.model.register_forward_hook(lambda *_: ran.append(1))
    for train in (False, True):
        model.train(train)
        expected = model(**batch, generator=seeded()).loss
        assert len(ran) == 2
        found = model(**batch, **states, generator=seeded()).loss
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert len(ran) == 2
        ran.clear()
    quiet = build(folders["roberta"], start_state=start_state, **{**fields, "latent_noise": 0.0}).train()
    assert not torch.isclose(quiet(**batch, generator=seeded()).loss, expected, atol=1e-3)


def test_cached_states_that_would_be_wrong_are_refused(folders):
    model = build(folders["bert"]).train()
    batch = pairs()
    states = {name: values.detach() for name, values in cached(model, batch).items()}
    with pytest.raises(ValueError, match="the encoder trains"):
        model(**batch, **states)
    model.freeze("encoder")
    with pytest.raises(ValueError, match="together"):
        model(**batch, encoder_states=states["encoder_states"])
    with pytest.raises(ValueError, match=r"`target_states` must have shape \(3, 8, 32\)"):
        model(**batch, **{**states, "target_states": states["target_states"][:, 1:]})
    with pytest.raises(ValueError, match="decoder_attention_mask"):
        model(**batch, **states, decoder_attention_mask=batch["labels"] != -100)
    with pytest.raises(ValueError, match="`encoder_outputs`"):
        model(**batch, **states, encoder_outputs=(states["encoder_states"],))
    with pytest.raises(ValueError, match="has its own"):
        YanForConditionalGeneration(YanConfig(vocab_size=60, hidden_size=32, num_attention_heads=4))(**batch, **states)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_lora_on_encoder_and_flow(family, folders, tmp_path):
    base = build(folders[family], frozen_parts=["encoder"])
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)).train()
    model(**pairs()).loss.backward()
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert any(".encoder.model." in name for name in trained) and any(".flow." in name for name in trained)
    inputs = pairs()["input_ids"]
    expected = model.eval().generate(inputs, seeds=[0, 1, 2], max_new_tokens=8)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(folders[family], frozen_parts=["encoder"]), tmp_path).eval()
    assert torch.equal(loaded.generate(inputs, seeds=[0, 1, 2], max_new_tokens=8), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged.model.encode(inputs)[0], model.base_model.model.model.encode(inputs)[0])


@FAMILY
def test_gradient_checkpointing_changes_no_gradient(family, folders):
    def gradients(checkpointing: bool):
        model = build(folders[family])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(**pairs(), generator=seeded()).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("start_state", ["noise", "stretched", "aligned", "fertility"])
def test_every_start_state_trains_and_generates(start_state, folders):
    keep_known = start_state == "aligned"
    model = build(folders["bert"], start_state=start_state, keep_known=keep_known)
    batch = with_lengths(pairs())
    if keep_known:
        batch = {"input_ids": torch.tensor([[5, 4, 7]]), "labels": torch.tensor([[5, 8, 9, 7]])}
    assert model(**batch).loss.isfinite()
    rows = len(batch["input_ids"])
    options = {"max_new_tokens": 9, "num_candidates": 2, "rerank": "cycle", "return_dict_in_generate": True}
    output = model.generate(batch["input_ids"], seeds=list(range(rows)), **options)
    assert len(output.sequences) == rows and output.sequences.shape[1] <= 9
    if keep_known:
        row = output.sequences[0, : output.lengths[0]].tolist()
        assert row[0] == 5 and row[-1] == 7


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "bart"])
@pytest.mark.slow
def test_the_compiled_path_gives_the_same_tokens(family, folders):
    model = build(folders[family])
    batch = pairs("left")
    inputs = (batch["input_ids"], batch["attention_mask"])
    options = {"seeds": [0, 1, 2], "num_inference_steps": 1, "max_new_tokens": 8}
    compiler = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    expected = model.generate(*inputs, **options)
    assert torch.equal(model.generate(*inputs, compile=True, compile_config=compiler, **options), expected)


def test_an_auto_encoder_stands_on_it_too(folders, tmp_path):
    torch.manual_seed(0)
    fields = {**FIELDS, "frozen_parts": ["encoder"]}
    model = YanForAutoEncoding.from_encoder_pretrained(folders["t5"], **fields)
    ids = pairs()["input_ids"]
    model(ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path)
    whole = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(whole.lm_head.weight, model.lm_head.weight)
    name = "block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(whole.model.encoder.model.get_parameter(name), model.model.encoder.model.get_parameter(name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_config": {"model_type": "no-such"}}, "no-such.*no model of Transformers"),
        ({"encoder_config": {"hidden_size": 32}}, "None.*no model of Transformers"),
        ({"encoder_config": ViTConfig()}, "no vocabulary"),
        ({"encoder_config": BertConfig(**SIZES, is_decoder=True)}, "is_decoder"),
        ({"encoder_config": BertConfig(**SIZES), "encoder_layers": 3}, "encoder_layers=3.*left out"),
        ({"encoder_config": BertConfig(**SIZES), "vocab_size": 61}, "vocab_size=61.*has 60"),
        ({"encoder_config": BertConfig(**SIZES), "encoder_backbone": "mamba"}, "encoder_backbone.*own encoder"),
        ({"encoder_config": BertConfig(**SIZES), "embedding_dropout": 0.1}, "embedding_dropout.*own encoder"),
        ({"encoder_config": BertConfig(**SIZES), "repeat_window": 2}, "repeat_window=2.*own encoder"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        YanConfig(**fields)


def test_causal_models_and_missing_masks_are_refused(folders, tmp_path):
    causal = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=26)
    AutoModel.from_config(causal).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2.*causal"):
        build(tmp_path)
    with pytest.raises(ValueError, match="gpt2.*causal"):
        YanForConditionalGeneration(YanConfig(encoder_config=causal))
    with pytest.raises(ValueError, match="mask_token_id"):
        build(folders["bert"], mask_token_id=None, start_state="aligned")
    with pytest.raises(ValueError, match="encoder_config"):
        YanForConditionalGeneration(YanConfig(vocab_size=60)).fit_latent_statistics([])
