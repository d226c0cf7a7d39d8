import json

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from bench.errors import UserError
from bench.gains.sources.runs import read_curves, read_results, read_runs, read_study

LOSSES = [3, 2.5, 2.2, 2.1]


def test_a_row_for_each_finished_budget(study_folder):
    study_folder.add("rope+swiglu", [3, 2.5, 2.2, 2.1], seed=3, lr=2e-3)
    results = read_results(study_folder.path)
    assert results["budget"].to_list() == [1e12, 4e12, 16e12, 64e12]
    assert results["val_loss"].to_list() == [3, 2.5, 2.2, 2.1]
    row = results.to_dicts()[0]
    assert (row["study"], row["scale"], row["variant"]) == ("synthetic", "tiny", "rope+swiglu")
    assert (row["innovations"], row["seed"], row["lr"]) == (["rope", "swiglu"], 3, 2e-3)
    assert row["run"] == "tiny/rope+swiglu/seed=3,lr=0.002,00000001"
    assert row["bits_per_byte"] is None


def test_flops_beyond_64_bits_are_read(study_folder):
    study_folder.add("baseline", [3, 2], budgets=[1e21, 1e22])
    assert read_results(study_folder.path)["model_flops"].to_list() == [1e21, 1e22]


def test_columns_missing_from_a_row_are_null(study_folder):
    study_folder.add(
        "baseline", [3, 2], budgets=[1e12, 2e12], change=lambda row: {k: row[k] for k in ("budget", "val_loss")}
    )
    results = read_results(study_folder.path)
    assert results["seconds"].null_count() == 2
    assert results.schema["seconds"] == pl.Float64


@pytest.mark.parametrize(("state", "name"), [(None, "unfinished"), ("FAILED", "failed")])
def test_only_done_trajectories_count(study_folder, state, name):
    study_folder.add("baseline", [3, 2.5, 2.2, 2.1])
    study_folder.add("rope", [3, 2.5, 2.2, 2.1], state=state)
    assert set(read_results(study_folder.path)["variant"]) == {"baseline"}
    assert {run["variant"]: run["state"] for run in read_runs(study_folder.path)} == {"baseline": "done", "rope": name}


def test_a_folder_that_was_never_described_is_no_run(study_folder):
    (study_folder.path / "tiny" / "rope" / "seed=0").mkdir(parents=True)
    assert read_runs(study_folder.path) == []


def test_curves_are_the_rows_with_a_validation_loss(study_folder):
    rows = [
        {"step": 1, "branch": None, "train_loss": 5.0, "val_loss": None, "tokens": 10},
        {"step": 2, "branch": None, "train_loss": 4.0, "val_loss": 4.5, "tokens": 20},
        {"step": 3, "branch": 4e12, "train_loss": 3.0, "val_loss": 3.5, "tokens": 30},
    ]
    study_folder.add("baseline", [3, 2.5, 2.2, 2.1], metrics=rows)
    curves = read_curves(study_folder.path)
    assert curves["step"].to_list() == [2, 3]
    assert curves["branch"].to_list() == [None, 4e12]
    assert curves["val_loss"].to_list() == [4.5, 3.5]


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*absent: train the study first"):
        read_results(tmp_path / "absent")


def test_two_folders_with_one_result_are_both_named(study_folder):
    study_folder.add("rope", [3, 2.5, 2.2, 2.1])
    study_folder.add("rope", [3, 2.5, 2.2, 2.0])
    with pytest.raises(UserError, match=r"two results for rope at tiny, seed 0, lr 0.001, budget 1e.12") as error:
        read_results(study_folder.path)
    assert "lr=0.001,00000001" in str(error.value)
    assert "lr=0.001,00000002" in str(error.value)


def test_an_unfinished_twin_is_no_duplicate(study_folder):
    study_folder.add("rope", [3, 2.5, 2.2, 2.1])
    study_folder.add("rope", [3, 2.5, 2.2, 2.0], state=None)
    assert len(read_results(study_folder.path)) == 4


@pytest.mark.parametrize("name", ["results.jsonl", "run.json"])
def test_a_damaged_file_is_named(study_folder, name):
    file = study_folder.add("rope", [3, 2.5, 2.2, 2.1]) / name
    file.write_text("{broken\n")
    with pytest.raises(UserError, match=f"{name} is not valid JSON: delete the run's folder"):
        read_results(study_folder.path)


def test_a_row_without_its_budget_is_refused(study_folder):
    study_folder.add("rope", [3, 2], budgets=[1, 2], change=lambda row: {"val_loss": 2.0})
    with pytest.raises(UserError, match=r"results.jsonl has a row without 'budget'"):
        read_results(study_folder.path)


def test_a_run_without_its_seed_is_refused(study_folder):
    file = study_folder.add("rope", [3, 2.5, 2.2, 2.1]) / "run.json"
    file.write_text(json.dumps({"study": "s", "scale": "tiny", "variant": "rope", "innovations": []}))
    with pytest.raises(UserError, match=r"run.json has no 'seed'"):
        read_results(study_folder.path)


def test_a_value_of_the_wrong_kind_is_refused(study_folder):
    study_folder.add("rope", [3, 2], budgets=[1, 2], change=lambda row: {**row, "val_loss": "low"})
    with pytest.raises(UserError, match=r"results.jsonl .* holds a value of the wrong kind"):
        read_results(study_folder.path)


def test_a_study_is_its_results_curves_and_runs(study_folder):
    evaluation = {"step": 2, "branch": None, "train_loss": 4.0, "val_loss": 4.5, "tokens": 20}
    study_folder.add("baseline", LOSSES, metrics=[evaluation])
    study = read_study(study_folder.path)
    assert (study.name, study.warnings) == ("synthetic", [])
    assert_frame_equal(study.results, read_results(study_folder.path))
    assert_frame_equal(study.curves, read_curves(study_folder.path))
    assert study.runs == read_runs(study_folder.path)


def test_a_study_without_a_finished_trajectory(study_folder):
    study_folder.add("baseline", LOSSES, state=None)
    with pytest.raises(UserError, match="has no finished trajectory: train the study first"):
        read_study(study_folder.path)


def test_unfinished_and_failed_trajectories_are_listed(study_folder):
    study_folder.add("rope", LOSSES)
    study_folder.add("rope", LOSSES, seed=1, state="FAILED")
    for seed in range(7):
        study_folder.add("mqa", LOSSES, seed=seed, state=None)
    unfinished, failed, without = read_study(study_folder.path).warnings
    assert unfinished.startswith("7 of 9 trajectories unfinished and left out (go on with `train`): tiny/mqa/seed=0,")
    assert unfinished.endswith("tiny/mqa/seed=4,lr=0.001,00000007 and 2 more.")
    assert failed == (
        "1 of 9 trajectories failed and left out (see the file FAILED there): tiny/rope/seed=1,lr=0.001,00000002."
    )
    assert without == "mqa at tiny: none of its trajectories is done, so it has no gain."


def test_only_planned_runs_are_taken_and_the_rest_is_named(study_folder):
    baseline = study_folder.add("baseline", LOSSES)
    study_folder.add("rope", LOSSES)
    study = read_study(study_folder.path, [baseline, baseline.parent / "seed=9,lr=1,00000000"])
    assert [run["variant"] for run in study.runs] == ["baseline"]
    assert study.results["variant"].unique().to_list() == ["baseline"]
    assert study.warnings == [
        "1 of 2 trajectories of the study are not trained yet.",
        f"1 trajectories in {study_folder.path} were trained with other settings than the study has now and are left "
        "out.",
    ]


def test_runs_on_different_data_are_not_compared(study_folder):
    for number, variant in enumerate(("baseline", "rope")):
        file = study_folder.add(variant, LOSSES) / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"data": {"fingerprint": f"{number}"}}))
    with pytest.raises(UserError, match=r"baseline.* and .*rope.* were trained on different data"):
        read_study(study_folder.path)
