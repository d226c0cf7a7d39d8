"""What tests of several rooms share: a small corpus and the overrides of a trajectory that trains in a second."""

import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton's kernels decide when they are imported whether they are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

from bench.compose import compose_config
from bench.config import Experiment, settle
from bench.training import energy

# No deadline for a single example: on a busy machine it fails tests that are right. Where a change is judged (CI=true),
# the examples are always the same; on a developer's machine they are new on every run, and look for what is wrong.
settings.register_profile("cegbench", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("cegbench")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tests run in parallel processes; one thread each keeps them from fighting over cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_energy_counter():
    """Whether this machine lets its CPUs' joules be read must not change what tests see."""
    energy.POWERCAP = Path(os.devnull)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A text file of 400 short documents of made-up sentences."""
    words = ["the", "a", "king", "queen", "sword", "sea", "night", "day", "went", "came", "saw", "and", "dark", "old"]
    generator = random.Random(0)
    documents = [
        " ".join(generator.choice(words) for _ in range(generator.randint(60, 120))) + f" {number}."
        for number in range(400)
    ]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n\n".join(documents))
    return path


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def overrides(corpus, data_folder, tmp_path) -> list[str]:
    """Overrides of a trajectory with a trunk and three branches over 20 steps."""
    return [
        "data=text",
        f"data.paths=[{corpus}]",
        "data.validation_fraction=0.2",
        f"paths.data={data_folder}",
        f"paths.runs={tmp_path / 'runs'}",
        "study.name=test",
        "model.layers=1",
        "model.width=16",
        "model.heads=2",
        "model.context=32",
        "training.sequences=4",
        "evaluation.tokens=512",
        "logging.every=1",
        "logging.progress=none",
        "device=cpu",
        "budgets=[30000000,70000000,140000000]",
    ]


@pytest.fixture
def experiment(overrides) -> Experiment:
    return settle(compose_config(overrides))
