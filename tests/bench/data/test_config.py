"""The schema of `data` and the mistakes it names."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bench.data.config import DataConfig, check
from bench.errors import UserError

CONF = Path(__file__).parents[3] / "conf" / "data"
NEEDS = {"text": {"paths": ["x"]}, "shards": {"train": ["a"], "validation": ["b"]}}


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_each_yaml_fits_the_schema(file):
    values = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(file))
    config = OmegaConf.to_object(values)
    assert config.name == file.stem
    check(replace(config, **NEEDS.get(config.source, {})))


def test_embedded_is_the_schema_default():
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONF / "embedded.yaml"))
    assert OmegaConf.to_object(config) == DataConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "web"}, "data.source='web' is unknown: choose one of embedded, text, hub, shards"),
        ({"tokenizer": "gpt4"}, "data.tokenizer='gpt4' is unknown: choose one of bytes, gpt2, bpe"),
        ({"name": "../up"}, "data.name='../up' names a folder"),
        ({"validation_fraction": 0.0}, "data.validation_fraction=0.0 must lie between 0 and 1"),
        ({"validation_fraction": 1.0}, "data.validation_fraction=1.0 must lie between 0 and 1"),
        ({"documents": 0}, "data.documents=0 must be at least 1"),
        ({"vocabulary_size": -1}, "data.vocabulary_size=-1 must lie between 0 and 65536"),
        ({"vocabulary_size": 70000, "tokenizer": "bpe"}, "data.vocabulary_size=70000 must lie between 0 and 65536"),
        ({"tokenizer": "bpe"}, "data.tokenizer=bpe needs data.vocabulary_size of at least 257"),
        ({"vocabulary_size": 512}, "data.tokenizer=bytes has 256 tokens"),
        ({"vocabulary_size": 50304, "tokenizer": "gpt2"}, "data.tokenizer=gpt2 has its own vocabulary"),
        ({"source": "text"}, "data.source=text needs data.paths"),
        ({"source": "hub"}, "data.source=hub needs data.dataset"),
        ({"source": "hub", "dataset": "a/b", "column": None}, "data.source=hub needs data.column"),
        ({"source": "shards"}, "data.source=shards needs data.train"),
        ({"source": "shards", "train": ["a"]}, "data.source=shards needs data.validation"),
        (
            {"source": "shards", "train": ["a"], "validation": ["b"], "tokenizer": "bpe"},
            "ready-made shards of your own tokenizer need data.vocabulary_size",
        ),
    ],
)
def test_a_mistake_is_named(changes, message):
    with pytest.raises(UserError) as error:
        check(replace(DataConfig(), **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
