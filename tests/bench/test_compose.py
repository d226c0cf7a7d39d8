from pathlib import Path

import pytest

from bench.compose import CONFIG_FOLDER, compose_config, launch, split_sweep
from bench.config import settle
from bench.errors import UserError


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["scale", "data", "optimizer", "schedule", "device", "wandb", "study"])
def test_every_choice_of_every_group_composes(group):
    assert choices(group)
    for choice in choices(group):
        settle(compose_config([f"{group}={choice}"]))


@pytest.mark.parametrize("innovation", choices("innovation"))
def test_every_innovation_makes_a_model(innovation):
    experiment = settle(compose_config([f"innovation=[{innovation}]"]))
    assert experiment.innovations == (innovation,)
    assert experiment.model_config(256) != settle(compose_config([])).model_config(256)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("modle.width=3", "'modle'"),
        ("model.widht=3", "'widht'"),
        ("model.width=abc", "could not be converted to Integer"),
        ("innovation=[nope]", "innovation=nope is unknown: choose from .*rope"),
        ("study=nope", "study=nope is unknown: choose from .*quickstart"),
        ("seed", "seed is not of the form key=value"),
        ("hydra/launcher=nope", "nope"),
        ("lr=[1e-3", r"cannot read lr=\[1e-3"),
        ("seed=0,1", "seed=0,1.*multirun"),
    ],
)
def test_a_slip_is_one_line(override, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        compose_config([override])
    assert "\n" not in str(caught.value)


def test_a_plain_sweep_is_a_product():
    shared, jobs = split_sweep(["innovation=[],[rope,layer_norm]", "seed=0,1", "study.name=x"])
    assert shared == ["study.name=x"]
    assert jobs == [
        ["innovation=[]", "seed=0"],
        ["innovation=[]", "seed=1"],
        ["innovation=[rope,layer_norm]", "seed=0"],
        ["innovation=[rope,layer_norm]", "seed=1"],
    ]


def record(config) -> None:
    folder = Path(config.paths.runs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{'+'.join(config.innovation)}-{config.seed}-{config.lr}").touch()
    if config.seed == 1:
        raise RuntimeError("a job that fails")


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_jobs_of_any_shape_go_through_the_launcher_and_a_failure_stops_no_other(tmp_path, launcher):
    jobs = [["innovation=[rope]", "seed=1"], ["innovation=[]", "seed=0", "lr=0.1"], ["seed=2"]]
    launch([f"paths.runs={tmp_path}", f"hydra/launcher={launcher}"], jobs, record)
    found = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert found >= {"rope-1-None", "-0-0.1", "-2-None"}
