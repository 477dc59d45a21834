"""Options: one declaration behind files, flags and help; wrong ones are told in one line."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from braggflux.integrator.errors import UserError
from braggflux.pipelines.config.flags import RUN_FLAGS, add_config_arguments, config_from_args
from braggflux.pipelines.config.renamed import RENAMED
from braggflux.pipelines.config.run import (
    REFERENCE_CONFIG,
    DialsConfig,
    RunConfig,
    reference_text,
    schema,
)


def parse(*argv: str) -> RunConfig:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, RUN_FLAGS)
    return config_from_args(RunConfig, parser.parse_args(argv), RUN_FLAGS)


def test_reference_file_is_the_defaults():
    assert REFERENCE_CONFIG.read_text() == reference_text(), "run `make reference-config`"
    assert RunConfig.load(REFERENCE_CONFIG) == RunConfig()


def sections(cls: type) -> list[type]:
    hints = get_type_hints(cls)
    nested = [hints[f.name] for f in fields(cls) if is_dataclass(hints[f.name])]
    return [cls, *(s for n in nested for s in sections(n))]


@pytest.mark.parametrize("section", sections(RunConfig), ids=lambda s: s.__name__)
def test_every_option_is_explained(section):
    hints = get_type_hints(section)
    for name, text in schema.field_help(section).items():
        assert is_dataclass(hints[name]) or len(text) > 10, f"{section.__name__}.{name}"


def test_yaml_round_trip_keeps_every_value():
    config = schema.updated(
        RunConfig(),
        {
            "model": "a b.pdb",
            "dials.images": ["x_1.cbf", "x_2.cbf"],
            "dials.unit_cell": "5.4,8.1,12,90,90,90",
            "dials.index_args": ["detector.fix=all", "k='a b'"],
            "extraction.box": [7, 21, 21],
            "extraction.d_min": 1.1,
            "training.coupling": "staged",
        },
    )
    again = schema.from_mapping(RunConfig, yaml.safe_load(schema.annotated_yaml(config)))
    assert again == config
    assert config.dials.images == (Path("x_1.cbf"), Path("x_2.cbf"))
    assert config.dials.unit_cell == (5.4, 8.1, 12.0, 90.0, 90.0, 90.0)
    assert schema.difference(config, RunConfig())["extraction.box"] == [7, 21, 21]


def test_json_is_read_too(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"training": {"epochs": 3}}))
    assert RunConfig.load(file).training.epochs == 3


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training: {epochs: 3, seed: 5}\nextraction: {d_min: 1e-1}\n")
    config = parse("--config", str(file), "--epochs", "4", "--set", "training.batch_size=64")
    assert (config.training.epochs, config.training.seed) == (4, 5)
    assert config.training.batch_size == 64
    assert config.extraction.d_min == 0.1, "YAML 1.1 reads 1e-1 as text"
    assert config.training.device == RunConfig().training.device


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"trainin": {}}, "unknown configuration key: trainin; valid keys are expt, refl"),
        (
            {"training": {"epoch": 1}},
            "key in section training: epoch; valid keys are coupling, epochs",
        ),
        ({"training": {"epochs": "abc"}}, "training.epochs must be a whole number, got 'abc'"),
        ({"training": {"epochs": 1.5}}, "training.epochs must be a whole number, got 1.5"),
        ({"training": {"epochs": True}}, "training.epochs must be a whole number, got True"),
        ({"training": {"epochs": -1}}, "training: `epochs` must be at least 0, got -1"),
        ({"training": {"epochs": 0}}, "training: `epochs` must be at least 1 without a trained"),
        ({"training": {"coupling": "x"}}, "training.coupling must be one of joint, staged"),
        ({"training": {"device": "gpu"}}, "`device` must be auto, cpu, cuda or cuda:N"),
        ({"training": 5}, "section training must be a mapping"),
        ({"extraction": {"d_min": "nan"}}, "extraction.d_min must be a number, or null"),
        ({"extraction": {"d_min": 1e10}}, "extraction.d_min must be a number, or null"),
        ({"extraction": {"d_min": -1}}, "extraction: `d_min` must be positive, got -1"),
        ({"extraction": {"box": [3, 4, 5]}}, "`box` must be three odd positive numbers"),
        ({"extraction": {"box": [3, 5]}}, "extraction.box must be 3 values, each a whole number"),
        ({"dials": {"unit_cell": "1,2,x,90,90,90"}}, "dials.unit_cell must be 6 values"),
        ({"dials": {"unit_cell": [0, 2, 3, 90, 90, 90]}}, "six positive numbers"),
        (
            {"integrator": {"n_scoring_rounds": -1}},
            "integrator: `n_scoring_rounds` must be at least 0, got -1",
        ),
        ({"dials": {"has_reference": "maybe"}}, "must be true or false, got 'maybe'"),
        ({"model": ["a"]}, "model must be a path, or null, got"),
    ],
)
def test_wrong_options_are_named(mapping, message):
    with pytest.raises(UserError) as error:
        schema.from_mapping(RunConfig, mapping)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", RENAMED)
def test_options_of_earlier_versions_are_refused_with_a_remedy(key, tmp_path):
    """In a file, and as a flag."""
    section, name = key.split(".")
    file = tmp_path / "c.yaml"
    file.write_text(f"{section}: {{{name}: 1}}\n")
    for give in (lambda: RunConfig.load(file), lambda: parse("--set", f"{key}=1")):
        with pytest.raises(UserError) as error:
            give()
        reason = f"{key} is an option of an earlier version; {RENAMED[key]}"
        assert str(error.value) in (reason, f"{file}: {reason}")


def test_remedies_name_options_that_exist():
    known = schema.flatten(schema.to_mapping(RunConfig()))
    assert not set(RENAMED) & set(known)
    for remedy in RENAMED.values():
        named = [w.partition("=")[0] for w in re.findall(r"[a-z]+\.[a-z_]+(?:=[\w-]+)?", remedy)]
        assert named or remedy.startswith("leave it out: "), remedy
        assert set(named) <= set(known), remedy
    given = {"merge.prior": "wilson", "merge.photon_counts": "false", "training.merge_steps": 9}
    assert schema.updated(RunConfig(), given).merge.photon_counts is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not plain YAML or JSON"),
        ("[" * 3000, "is not plain YAML or JSON"),
        ("training: {epochs: " + "9" * 5000 + "}", "is not plain YAML or JSON"),
        ("training: {epochs: 0x" + "f" * 5000 + "}", "is not plain YAML or JSON"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("model: !!python/object/apply:os.getcwd []\n", "is not plain YAML or JSON"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        RunConfig.load(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_config_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read configuration .*none\.yaml"):
        RunConfig.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "many"], "training.epochs must be a whole number, got 'many'"),
        (["--set", "training.epochs"], "--set must be KEY=VALUE"),
        (["--set", "a.b=1"], "unknown configuration key: a.b; valid keys are"),
        (["--set", "training.epochs.x=1"], "unknown configuration key: training.epochs.x"),
    ],
)
def test_wrong_flags_are_named(argv, message):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert message in str(error.value)


def test_direct_construction_is_checked_too():
    with pytest.raises(ValueError, match="nproc"):
        DialsConfig(nproc=0)


def test_missing_inputs_are_named(tmp_path):
    config = RunConfig(expt=tmp_path / "none.expt", refl=tmp_path)
    with pytest.raises(UserError, match="model is not given"):
        config.require("expt", "model")
    with pytest.raises(UserError, match=r"expt: .*none\.expt does not exist"):
        config.require("expt")
    with pytest.raises(UserError, match=r"refl: .* is a folder"):
        RunConfig(refl=tmp_path).require("refl")


def test_resolved_paths_are_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = RunConfig(model=Path("m.pdb"), dials=DialsConfig(images=(Path("a.h5"),))).resolved()
    assert config.model == tmp_path / "m.pdb"
    assert config.dials.images == (tmp_path / "a.h5",)
