"""Parameters for DIALS with commas, blanks and quotes: they arrive as they were written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import yaml

from braggflux.pipelines.commands.process import FLAGS
from braggflux.pipelines.config.flags import add_config_arguments, config_from_args
from braggflux.pipelines.config.run import DialsConfig, RunConfig, schema
from braggflux.pipelines.dials.chain import DialsChain


def parse(*argv: str) -> RunConfig:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, FLAGS)
    return config_from_args(RunConfig, parser.parse_args(argv), FLAGS)


@pytest.mark.parametrize(
    "text",
    [
        "image_range=3,16",
        "trusted_range=-1,20000 geometry.scan.oscillation=0,0.1",
        "lookup.mask='my mask, new.pickle'",
        "unit_cell=5.4,8.1,12,90,90,90",
    ],
)
def test_text_is_kept_whole_from_flags_files_and_set(text, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"dials": {"import_args": text}}))
    by_flag = parse("--import-args", text)
    assert by_flag.dials.import_args == (text,)
    assert parse("--set", f"dials.import_args={text}").dials == by_flag.dials
    assert parse("--config", str(file)).dials == by_flag.dials
    again = schema.from_mapping(RunConfig, yaml.safe_load(schema.annotated_yaml(by_flag)))
    assert again == by_flag


def test_repeated_flags_add_up():
    config = parse("--index-args", "max_cell=20", "--index-args", "detector.fix=all d_min=2,3")
    assert config.dials.index_args == ("max_cell=20", "detector.fix=all d_min=2,3")


@pytest.mark.dials
@pytest.mark.realdata
def test_image_range_reaches_dials_import(shared, dials, tmp_path):
    images = sorted((shared / "data" / "l_cysteine").glob("l-cyst_01_*.cbf.gz"))
    config = parse("--import-args", "image_range=3,12 trusted_range=0,20000").dials
    chain = DialsChain(tmp_path, DialsConfig(images=tuple(images)))
    paths = [str(Path(image).absolute()) for image in images]
    chain.step("import", paths, ["imported.expt"], extra=config.import_args)
    (scan,) = json.loads((tmp_path / "imported.expt").read_text())["scan"]
    assert scan["image_range"] == [3, 12]
