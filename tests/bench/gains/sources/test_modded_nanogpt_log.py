"""What modded-nanogpt's scripts write, as in its folder records/: github.com/KellerJordan/modded-nanogpt."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.config import SourceConfig
from bench.errors import UserError
from bench.gains.sources.modded_nanogpt_log import parse, read

# Lines of records/track_1_short/2024-10-17_DistributedMuon: the script, what it runs on, the first and last steps.
SEQUENCES = """import os
@dataclass
class Hyperparameters:
    # optimization hyperparams
    batch_size : int = 8*64 # batch size, in sequences, across all devices
    device_batch_size : int = 64 # batch size, in sequences, per device
    sequence_length : int = 1024 # sequence length, in tokens
    num_iterations : int = 5100 # number of iterations to run
    learning_rate : float = 0.0036
args = Hyperparameters()
            print(f'step:{step}/{args.num_iterations} val_loss:{val_loss:.4f} train_time:{training_time_ms:.0f}ms')
====================================================================================================
Running pytorch 2.4.1+cu121 compiled for CUDA 12.1
| N/A   28C    P0            111W /  700W |    5786MiB /  81559MiB |      9%      Default |
====================================================================================================
"""
# records/010425_SoftCap
TOKENS = """    batch_size = 8*64*1024 # batch size in tokens
    max_device_batch_size = 64*1024 # batch size per device in tokens
    num_iterations = 1390 # number of iterations to run
"""
STEPS = """step:0/1390 val_loss:10.8258 train_time:0ms step_avg:nanms
step:1/1390 train_time:243813ms step_avg:nanms
step:10/1390 train_time:246800ms step_avg:nanms
step:11/1390 train_time:135ms step_avg:nanms
step:125/1390 train_time:15568ms step_avg:135.37ms
step:125/1390 val_loss:4.3686 train_time:15634ms step_avg:135.95ms
step:126/1390 train_time:15707ms step_avg:135.41ms
step:1390/1390 train_time:193711ms step_avg:140.37ms
step:1390/1390 val_loss:3.2790 train_time:193775ms step_avg:140.42ms
peak memory consumption: 36989 MiB
"""
# records/track_3_optimization: seconds, and only evaluations
SECONDS = """step:125/3148 val_loss:4.54643 train_time:125.376s step_avg:1003.01ms
step:3125/3148 val_loss:3.27946 train_time:615.172s step_avg:196.86ms
step:3148/3148 val_loss:3.27888 train_time:618.893s step_avg:196.60ms
"""
# records/2024-06-06_AdamW: llm.c
LLMC = "s:0 tel:10.968871\ns:0 trl:10.965596\ns:127 trl:6.042942\ns:128 tel:6.034447\ns:128 trl:6.08\n"
LLMC_END = "s:255 trl:5.268419\ns:256 tel:5.231128\n"


def read_text(folder: Path, text: str, **options):
    (folder / "muon").mkdir(exist_ok=True)
    (folder / "muon" / "31d6c427-f1f7-4d8a-91be-a67b5dcd13fd.txt").write_text(text)
    return read(folder, SourceConfig(source="modded_nanogpt_log", **options), "records")


def test_the_last_evaluation_is_the_result(tmp_path):
    found = read_text(tmp_path, TOKENS + STEPS, params=124e6)
    (row,) = found.results.to_dicts()
    assert (row["variant"], row["seed"], row["step"], row["val_loss"]) == ("muon", 0, 1390, 3.279)
    assert (row["seconds"], row["tokens"]) == (193.775, 1390 * 524288)
    assert row["model_flops"] == pytest.approx(6 * 124e6 * 1390 * 524288)
    assert found.curves.select("step", "val_loss", "seconds").rows() == [(125, 4.3686, 15.634), (1390, 3.279, 193.775)]
    assert found.warnings == []


def test_seconds_alone_will_do(tmp_path):
    (row,) = read_text(tmp_path, STEPS).results.to_dicts()
    assert (row["seconds"], row["budget"], row["tokens"], row["model_flops"]) == (193.775, 193.775, None, None)


@pytest.mark.parametrize(
    ("head", "tokens"),
    [
        (SEQUENCES, 8 * 64 * 1024),
        (TOKENS, 8 * 64 * 1024),
        (
            "    batch_size : int = 8#8*64 # batch size, in sequences\n    sequence_length : int = 64 * 1024\n",
            8 * 64 * 1024,
        ),
        ("    batch_size : int = 8*64 # batch size, in sequences\n", None),
        ("    device_batch_size : int = 64 # batch size, in sequences\n    sequence_length : int = 1024\n", None),
        ("batch_size = 8 * 64 * 1024\n", None),
    ],
)
def test_tokens_per_step_where_the_code_says_them_plainly(head, tokens):
    assert parse(head + STEPS).tokens_per_step == tokens


def test_the_code_at_the_head_is_no_result():
    assert parse(SEQUENCES).losses == {}
    assert list(parse(SEQUENCES + STEPS).losses) == [0, 125, 1390]


def test_seconds_in_seconds():
    found = parse(SECONDS)
    assert found.losses == {125: 4.54643, 3125: 3.27946, 3148: 3.27888}
    assert found.seconds == {125: 125.376, 3125: 615.172, 3148: 618.893}
    assert found.planned == 3148


def test_the_logs_of_llmc(tmp_path):
    assert parse(LLMC + LLMC_END).losses == {0: 10.968871, 128: 6.034447, 256: 5.231128}
    (row,) = read_text(tmp_path, LLMC + LLMC_END, tokens_per_step=1000.0).results.to_dicts()
    assert (row["step"], row["tokens"], row["seconds"], row["model_flops"]) == (256, 256000, None, None)
    with pytest.raises(
        UserError, match=r"does not say what a step costs, nor how long it took: set data\.tokens_per_st"
    ):
        read_text(tmp_path, LLMC + LLMC_END)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            STEPS.split("step:1390")[0],
            "its last evaluation is at step 125 of 1390: a loss in mid-schedule is no result",
        ),
        (LLMC, "goes on after its last evaluation, at step 128: a loss in mid-schedule is no result"),
        (SEQUENCES, "has no validation loss after step 0"),
    ],
)
def test_a_log_cut_short_is_no_result(tmp_path, text, reason):
    with pytest.raises(UserError, match=f"holds a finished result: muon/31d6c427-.*txt: {reason}; left out"):
        read_text(tmp_path, text, tokens_per_step=1000.0)


@pytest.mark.parametrize("kept", range(1, 60))
def test_a_line_that_is_cut_off_is_read_as_far_as_it_is_certain(kept):
    whole = "step:1390/1390 val_loss:3.2790 train_time:193775ms"
    found = parse(STEPS.split("step:1390")[0] + whole[:kept])
    assert found.losses in ({0: 10.8258, 125: 4.3686}, {0: 10.8258, 125: 4.3686, 1390: 3.279})
    assert found.planned == 1390
    assert found.seconds.get(1390) in (None, 193.775)


def test_several_logs_of_a_variant_are_its_seeds(tmp_path):
    for number, loss in enumerate(("3.2790", "3.2801", "3.2779")):
        name = f"31d6c427-f1f7-4d8a-91be-a67b5dcd13f{number}.txt"
        (tmp_path / "muon").mkdir(exist_ok=True)
        (tmp_path / "muon" / name).write_text(TOKENS + STEPS.replace("3.2790", loss))
    found = read(tmp_path, SourceConfig(source="modded_nanogpt_log"), "records")
    assert sorted(found.results["seed"]) == [0, 1, 2]
    assert sorted(found.results["val_loss"]) == [3.2779, 3.279, 3.2801]
    assert found.results["budget"].n_unique() == 1


@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.floats(0.1, 12), st.integers(1, 10**9)),
        min_size=1,
        unique_by=lambda evaluation: evaluation[0],
    )
)
def test_a_log_of_random_numbers_is_read_back_exactly(evaluations):
    evaluations.sort()
    planned = evaluations[-1][0]
    lines = [
        f"step:{step}/{planned} val_loss:{loss:.17f} train_time:{time}ms step_avg:{time / step:.2f}ms\n"
        for step, loss, time in evaluations
    ]
    found = parse("".join(lines))
    assert found.losses == {step: float(f"{loss:.17f}") for step, loss, _ in evaluations}
    assert found.seconds == {step: time / 1000 for step, _, time in evaluations}
    assert found.trained == found.planned == planned


@given(st.text(alphabet="step:0123456789/ val_loss.train_time tel trl ms\n#batch_size=in sequences*", max_size=300))
def test_no_text_breaks_the_parser(text):
    found = parse(text)
    assert list(found.losses) == sorted(found.losses)
