"""Corpus -> token shards -> batches. Imports numpy only; tokenizers and the hub client load when they are needed."""

from bench.data.config import DataConfig
from bench.data.dataset import Dataset, open_dataset
from bench.data.loader import Loader, evaluation_batch
from bench.data.preparation import prepare
from bench.data.shards import Tokens

__all__ = ["DataConfig", "Dataset", "Loader", "Tokens", "evaluation_batch", "open_dataset", "prepare"]
