import pytest

from bench.compose import compose_config
from bench.errors import UserError
from bench.runs.folder import RunFolder
from bench.runs.study import plan_study, stand, steps_done, study_experiments
from bench.training.schedule import Leg

STUDY = ["study.name=s", "study.scales=[tiny]", "study.variants=[[],[rope],[rope,layer_norm]]", "study.seeds=[0,1]"]


def test_every_scale_variant_rate_and_seed():
    jobs = plan_study([*STUDY, "study.scales=[tiny,quickstart]", "study.lrs={default:[0.1],rope:[0.2,0.3]}"])
    assert len(jobs) == 2 * (1 + 2 + 1) * 2
    assert ["scale=quickstart", "innovation=[rope]", "seed=1", "lr=0.3"] in jobs
    assert ["scale=tiny", "innovation=[rope,layer_norm]", "seed=0", "lr=0.1"] in jobs
    assert len({tuple(job) for job in jobs}) == len(jobs)


def test_the_most_special_rates_and_budgets_win():
    jobs = plan_study(
        [
            *STUDY,
            "study.seeds=[0]",
            "study.lrs={default:[0.1],layer_norm+rope:[0.2],tiny/rope:[0.3]}",
            "study.budgets={rope:[1e12,2e12]}",
        ]
    )
    assert jobs == [
        ["scale=tiny", "innovation=[]", "seed=0", "lr=0.1"],
        ["scale=tiny", "innovation=[rope]", "budgets=[1000000000000.0, 2000000000000.0]", "seed=0", "lr=0.3"],
        ["scale=tiny", "innovation=[rope,layer_norm]", "seed=0", "lr=0.2"],
    ]


def test_without_rates_the_configuration_decides():
    assert all(not any(part.startswith("lr=") for part in job) for job in plan_study(STUDY))
    assert {experiment.optimizer.lr for experiment in study_experiments(STUDY)} == {1e-3}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed=3", r"study s varies seed itself: use study\.seeds"),
        ("innovation=[rope]", r"use study\.variants"),
        ("scale=tiny", r"use study\.scales"),
        ("lr=0.1", r"use study\.lrs"),
        ("study.lrs={rop:[0.1]}", r"study\.lrs names rop, which is no variant"),
        ("study.budgets={base:[1e9]}", r"study\.budgets names base"),
        ("study.lrs={rope:0.1}", r"study\.lrs must give each variant a list of numbers"),
        ("study.lrs=[0.1]", r"study\.lrs must give each variant a list of numbers"),
        ("study.variants=[]", "lists no variants"),
    ],
)
def test_slips_are_named(override, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_study([*STUDY, override])


def test_the_papers_study_is_the_papers():
    experiments = study_experiments(["study=sanderson2025", "study.seeds=[0]"])
    variants = {experiment.variant for experiment in experiments}
    assert variants == {
        "baseline", "layer_norm", "rope", "flash_attention", "mqa", "flash_attention+layer_norm+rope",
    }  # fmt: skip
    compact = next(e for e in experiments if e.scale == "sanderson_compact")
    full = next(e for e in experiments if e.scale == "sanderson_full")
    shape = ("layers", "heads", "width", "context", "dropout", "vocabulary_size")
    assert [compact.model[name] for name in shape] == [6, 6, 384, 512, 0.2, 50304]
    assert [full.model[name] for name in shape] == [10, 12, 768, 1024, 0.4, 50304]
    for experiment, rate in ((compact, 6e-4), (full, 3e-4)):
        optimizer = experiment.optimizer
        assert (optimizer.lr, optimizer.beta1, optimizer.beta2) == (rate, 0.9, 0.95)
        assert (optimizer.weight_decay, optimizer.clip) == (0.1, 1.0)
        assert experiment.training.sequences == 512
        assert (experiment.schedule.name, experiment.schedule.warmup, experiment.schedule.final) == (
            "cosine",
            0.02,
            0.1,
        )
        assert len(experiment.budgets) == 3


@pytest.mark.parametrize("scale", ["sanderson_compact", "sanderson_full"])
def test_the_papers_largest_budget_is_its_50000_iterations(scale):
    import torch

    from bench.training.schedule import steps_within
    from models.flops import flops_per_sequence
    from models.gpt import GPT

    experiment = next(e for e in study_experiments(["study=sanderson2025", "study.seeds=[0]"]) if e.scale == scale)
    with torch.device("meta"):
        config = experiment.model_config(50257)
    per_step = 512 * flops_per_sequence(GPT(config), config.context)["model_flops"]
    assert [steps_within(budget, per_step) for budget in experiment.budgets] == [12_500, 25_000, 50_000]


LEGS = [
    {"start": 0, "end": 8, "budget": None},
    {"start": 8, "end": 10, "budget": 1e9},
    {"start": 8, "end": 16, "budget": None},
    {"start": 16, "end": 20, "budget": 2e9},
]


@pytest.mark.parametrize(
    ("step", "branch", "done"), [(3, None, 3), (8, None, 8), (9, 1e9, 9), (10, 1e9, 10), (9, None, 11), (20, 2e9, 22)]
)
def test_steps_are_counted_over_trunk_and_branches(tmp_path, step, branch, done):
    folder = RunFolder(tmp_path)
    legs = [Leg(**leg) for leg in LEGS]
    assert steps_done(folder, legs) == 0
    folder.metrics.append({"step": step, "branch": branch})
    assert steps_done(folder, legs) == done


def test_standing(overrides, tmp_path):
    experiment = study_experiments([*overrides, "study.scales=[tiny]", "study.variants=[[]]"])[0]
    assert stand(experiment).state == "absent"
    folder = RunFolder(experiment.folder)
    folder.path.mkdir(parents=True)
    folder.fail("Traceback\nUserError: no such file\n")
    standing = stand(experiment)
    assert (standing.state, standing.error, standing.spent) == ("failed", "UserError: no such file", 0)
    folder.begin()
    folder.describe("", {"flops_per_token": {"model_flops": 10.0}, "tokens_per_step": 100, "legs": LEGS})
    folder.metrics.append({"step": 10, "branch": 1e9})
    standing = stand(experiment)
    assert (standing.state, standing.spent, standing.left) == ("unfinished", 10_000, 12_000)
    folder.finish()
    assert (stand(experiment).spent, stand(experiment).left) == (22_000, 0)


def test_what_is_left_of_a_trajectory_that_was_not_begun(overrides, data_folder):
    from bench.data import open_dataset
    from bench.training.train import train

    more = ["study.scales=[tiny]", "study.variants=[[rope]]"]
    absent = study_experiments([*overrides, *more, "paths.data=/nowhere"])[0]
    assert stand(absent).left is None
    experiment = study_experiments([*overrides, *more])[0]
    open_dataset(experiment.data, data_folder)
    planned = stand(experiment)
    assert (planned.state, planned.spent) == ("absent", 0)
    train(compose_config([*overrides, "innovation=[rope]"]))
    done = stand(experiment)
    assert (done.state, done.spent, done.left) == ("done", planned.left, 0)
