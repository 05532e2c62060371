# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One table declares the options of `generate`: configuration, checks, documentation and command line follow it."""

import argparse
import re
import sys
from pathlib import Path

import pytest
from testing_utils import small_config

from yan_hf import YanGenerationConfig
from yan_hf.cli.arguments import add_generation_arguments, generation_options
from yan_hf.cli.main import main
from yan_hf.generation_config_yan import OPTIONS, Check, Option


DOCS = Path(__file__).resolve().parents[2] / "docs"
sys.path.insert(0, str(DOCS))

import write_tables  # noqa: E402


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    add_generation_arguments(parser)
    return generation_options(parser.parse_args(arguments))


def test_an_option_is_declared_in_one_place(monkeypatch, model, tmp_path):
    even = Check("an even number", lambda value: isinstance(value, int) and value % 2 == 0)
    monkeypatch.setitem(OPTIONS, "flow_warmth", Option(lambda config: config.num_experts, even, "how warm it flows"))
    monkeypatch.setattr(model, "generation_config", YanGenerationConfig.from_model_config(model.config))
    assert YanGenerationConfig().flow_warmth is None
    assert YanGenerationConfig().resolve(small_config(num_experts=4)).flow_warmth == 4
    YanGenerationConfig(flow_warmth=6).save_pretrained(tmp_path)
    assert YanGenerationConfig.from_pretrained(tmp_path).flow_warmth == 6
    with pytest.raises(ValueError, match="`flow_warmth` must be an even number, but is 3"):
        YanGenerationConfig(flow_warmth=3)
    with pytest.raises(ValueError, match="`flow_warmth` must be an even number, but is 3"):
        model.generate(model.dummy_inputs["input_ids"], flow_warmth=3)
    assert "| `flow_warmth` | how warm it flows | an even number |" in write_tables.generation_options()
    assert parse("--flow-warmth", "8") == {"flow_warmth": 8}


def test_every_default_passes_its_own_check():
    """Also the ones that come from the model's configuration."""
    config = YanGenerationConfig(do_sample=True).resolve(small_config())
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        assert value is None or option.check is None or option.check.holds(value), name
    assert (config.expert_scope, config.reselect_experts) == ("token", False)


@pytest.mark.parametrize("field, value", [("expert_scope", "batch"), ("reselect_experts", "yes")])
def test_choices_of_experts_are_checked(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*{value}"):
        YanGenerationConfig(**{field: value})


def test_the_documentation_and_the_docstring_list_every_option():
    page = (DOCS / "generation.md").read_text(encoding="utf-8")
    assert f"begin -->\n\n{write_tables.generation_options()}\n\n<!-- generation-options:end" in page
    assert re.findall(r"^        (\w+): ", YanGenerationConfig.__doc__, re.MULTILINE)[1:] == list(OPTIONS)


def test_the_command_line_reads_every_kind_of_value():
    assert parse() == {}
    assert parse("--steps", "2") == parse("--num-inference-steps", "2") == {"num_inference_steps": 2}
    assert parse("--solver", "heun", "--compile", "--no-do-sample") == {
        "solver": "heun",
        "compile": True,
        "do_sample": False,
    }
    assert parse("--time-schedule", "[0, 0.5, 1]", "--init-noise", ".5") == {
        "time_schedule": [0, 0.5, 1],
        "init_noise": 0.5,
    }
    assert parse("--expert-scope", "target", "--reselect-experts") == {
        "expert_scope": "target",
        "reselect_experts": True,
    }


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_the_command_line_refuses_what_the_table_refuses(command, capsys):
    for arguments in (["--solver", "dopri5"], ["--num-candidates", "1.5"], ["--init-noise", "None"]):
        with pytest.raises(SystemExit) as stopped:
            main([command, "checkpoint", *arguments])
        assert stopped.value.code == 2
        assert re.search(f"{arguments[0]}.*must be .*but is {arguments[1]}", capsys.readouterr().err)
