"""What nanoGPT's train.py prints: github.com/karpathy/nanoGPT, train.py, model.py and configurator.py."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.config import SourceConfig
from bench.errors import UserError
from bench.gains.sources.nanogpt_log import parse, read

HEAD = """Overriding config with config/train_gpt2.py:
# config for training GPT-2 (124M) down to very nice loss of ~2.85 on 1 node of 8X A100 40GB
wandb_log = True
learning_rate = 3e-4 # half
max_iters = 1000

tokens per iteration will be: 491,520
Initializing a new model from scratch
defaulting to vocab_size of GPT-2 to 50304 (50257 rounded up for efficiency)
number of parameters: 123.59M
num decayed parameter tensors: 50, with 124,354,560 parameters
num non-decayed parameter tensors: 25, with 19,200 parameters
using fused AdamW: True
compiling the model... (takes a ~minute)
"""
TOKENS = 491520
PARAMS = 123.59e6


def log(evaluations, every=10, milliseconds=100.0, head=HEAD, last=None):
    """The log of a finished run that took the same time for each iteration, with evaluation and compilation on top."""
    lines = [head]
    for iteration in range(0, (max(evaluations) if last is None else last) + 1):
        if iteration in evaluations:
            lines.append(f"step {iteration}: train loss 1.2345, val loss {evaluations[iteration]:.4f}\n")
        if iteration % every == 0:
            time = 60_000.0 if iteration == 0 else 9_000.0 if iteration in evaluations else milliseconds
            lines.append(f"iter {iteration}: loss 3.9876, time {time:.2f}ms, mfu -100.00%\n")
    return "".join(lines)


FINISHED = {0: 10.9876, 500: 3.5, 1000: 3.2101}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read_all(folder: Path, **options):
    return read(folder, SourceConfig(source="nanogpt_log", **options), "study")


def test_the_last_evaluation_is_the_result(tmp_path):
    found = read_all(write(tmp_path, {"small/baseline/0.log": log(FINISHED)}))
    (row,) = found.results.to_dicts()
    assert (row["scale"], row["variant"], row["seed"], row["lr"]) == ("small", "baseline", 0, 3e-4)
    assert (row["step"], row["val_loss"], row["tokens"]) == (1000, 3.2101, 1000 * TOKENS)
    assert row["model_flops"] == row["flops_6nd"] == row["budget"] == pytest.approx(6 * PARAMS * 1000 * TOKENS)
    assert row["run"] == "small/baseline/0.log"
    assert found.name == "study"
    assert found.warnings == []


def test_earlier_evaluations_are_the_curve_of_that_budget(tmp_path):
    found = read_all(write(tmp_path, {"small/baseline/0.log": log(FINISHED)}))
    assert found.curves.select("step", "val_loss", "tokens", "branch").rows() == [
        (500, 3.5, 500 * TOKENS, found.results["budget"][0]),
        (1000, 3.2101, 1000 * TOKENS, found.results["budget"][0]),
    ]


def test_logs_of_different_length_are_different_budgets(tmp_path):
    half = log({0: 10.9, 500: 3.4}, head=HEAD.replace("max_iters = 1000", "max_iters = 500"))
    files = {"s/rope/long.log": log(FINISHED), "s/rope/half.log": half}
    found = read_all(write(tmp_path, files), pattern="{scale}/{variant}/{_}.log")
    assert found.results.sort("budget").select("variant", "seed", "val_loss", "step").rows() == [
        ("rope", 0, 3.4, 500),
        ("rope", 0, 3.2101, 1000),
    ]
    branches = dict(found.curves.select("run", "branch").rows())
    assert branches == dict(found.results.select("run", "budget").rows())


# Identity


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("small/rope/3.log", ("small", "rope", 3)),
        ("small/rope/seed=3.log", ("small", "rope", 3)),
        ("deep/er/small/rope/seed_3.txt", ("small", "rope", 3)),
        ("small/flash_attention+rope.log", ("small", "flash_attention+rope", 0)),
        ("rope.out", ("all", "rope", 0)),
        ("7.log", ("all", "baseline", 7)),
        ("rope/31d6c427-f1f7-4d8a-91be-a67b5dcd13fd.txt", ("all", "rope", 0)),
    ],
)
def test_a_path_says_whose_log_it_is(tmp_path, path, place):
    found = read_all(write(tmp_path, {path: log(FINISHED)}))
    assert found.results.select("scale", "variant", "seed").row(0) == place


def test_a_pattern_says_it_otherwise(tmp_path):
    files = {"logs/compact/run1_compact_no_features.log": log(FINISHED), "logs/compact/notes.txt": "none of it"}
    found = read_all(write(tmp_path, files), pattern="{scale}/run{_}_{_}_{variant}.log")
    assert found.results.select("scale", "variant").rows() == [("compact", "no_features")]
    assert found.warnings == [
        "logs/compact/notes.txt: its path does not have the form that data.pattern says; left out."
    ]


def test_a_pattern_names_seeds_and_rates(tmp_path):
    files = {f"rope-lr{lr}-s{seed}.log": log(FINISHED) for lr in ("1e-3", "0.002") for seed in (1, 2)}
    found = read_all(write(tmp_path, files), pattern="{variant}-lr{lr}-s{seed}.log")
    assert sorted(found.results.select("variant", "lr", "seed").rows()) == [
        ("rope", 0.001, 1),
        ("rope", 0.001, 2),
        ("rope", 0.002, 1),
        ("rope", 0.002, 2),
    ]


@pytest.mark.parametrize("pattern", ["{varant}.log", "{variant}/{variant}.log", "{}.log"])
def test_a_wrong_pattern_is_named(tmp_path, pattern):
    write(tmp_path, {"rope.log": log(FINISHED)})
    with pytest.raises(UserError, match=r"data\.pattern=.* is unknown or there twice: use \{scale\}, \{variant\}"):
        read_all(tmp_path, pattern=pattern)


def test_a_file_or_a_glob_will_do(tmp_path):
    write(tmp_path, {"a/base/1.log": log(FINISHED), "a/base/2.log": log(FINISHED), "a/base/1.csv": "no log"})
    assert read_all(tmp_path / "a" / "base" / "1.log").results["run"].to_list() == ["1.log"]
    globbed = read_all(tmp_path / "*" / "base" / "*.log")
    assert sorted(globbed.results["run"]) == ["a/base/1.log", "a/base/2.log"]


def test_where_there_is_no_log(tmp_path):
    with pytest.raises(UserError, match="there is no file or folder"):
        read_all(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no log: expected a file that ends in \.log, \.txt, \.out"):
        read_all(tmp_path)
    with pytest.raises(UserError, match="holds no log: expected such a file"):
        read_all(tmp_path / "*.log")


# Awkward logs


def test_a_log_cut_short_gives_no_result_and_takes_no_other_with_it(tmp_path):
    cut = log({0: 10.9, 250: 4.0, 500: 3.5}, last=700)
    found = read_all(write(tmp_path, {"s/base/1.log": log(FINISHED), "s/base/2.log": cut, "s/base/3.log": ""}))
    assert found.results["seed"].to_list() == [1]
    assert found.warnings == [
        "s/base/2.log: its last evaluation is at step 500 of 1000: a loss in mid-schedule is no result; left out.",
        "s/base/3.log: has no validation loss after step 0; left out.",
    ]


def test_without_max_iters_later_iterations_tell_that_a_log_is_cut_short(tmp_path):
    head = HEAD.replace("max_iters = 1000", "")
    files = {"s/base/1.log": log(FINISHED, head=head), "s/base/2.log": log(FINISHED, head=head, last=1100)}
    found = read_all(write(tmp_path, files))
    assert found.results["seed"].to_list() == [1]
    assert found.warnings == [
        "s/base/2.log: goes on after its last evaluation, at step 1000: a loss in mid-schedule is no result; left out."
    ]


@pytest.mark.parametrize("evaluations", [(320, 640, 960), (240, 480, 960)])
def test_the_last_evaluation_before_an_end_between_two_is_doubtful(tmp_path, evaluations):
    found = read_all(write(tmp_path, {"base.log": log({step: 3.3 for step in evaluations}, last=1000)}))
    assert found.results["step"].to_list() == [960]
    assert found.warnings == [
        "base.log: its last evaluation is at step 960 of 1000, which is taken as the end of its schedule."
    ]


@pytest.mark.parametrize("evaluations", [(300, 600, 900), (930, 960), (960, 960)])
def test_but_not_where_another_was_due_or_it_is_far_from_the_end(tmp_path, evaluations):
    write(tmp_path, {"base.log": log({step: 3.3 for step in evaluations} | {920: 3.4}, last=1000)})
    with pytest.raises(UserError, match="of 1000: a loss in mid-schedule is no result; left out"):
        read_all(tmp_path)


@pytest.mark.parametrize("kept", range(1, 60))
def test_a_number_that_is_cut_off_is_not_read(kept):
    whole = "iter 990: loss 3.9, time 100.00ms, mfu 30.1%\nstep 1000: train loss 3.1999, val loss 3.2101"
    losses = parse(log({0: 10.9, 500: 3.5}) + whole[: len(whole) - kept]).losses
    assert losses == {0: 10.9, 500: 3.5}


def test_a_file_may_end_with_its_last_digit():
    assert parse(log(FINISHED).rsplit("\niter", 1)[0]).losses == FINISHED


def test_only_options_may_be_overridden_on_the_command_line():
    text = HEAD + "Overriding: learning_rate = 0.0012\nOverriding: max_iters = 300\nmy_learning_rate = 7\n"
    assert (parse(text).lr, parse(text).planned) == (0.0012, 300)


def test_a_resumed_log_goes_on_from_where_it_was_resumed(tmp_path):
    first = log({0: 10.9, 250: 4.0, 500: 3.9, 750: 9.9}, last=800, milliseconds=100)
    second = log({500: 3.5, 1000: 3.2}, milliseconds=100)
    resumed = first + second[second.index("step 500") :]
    found = read_all(write(tmp_path, {"base.log": resumed}))
    assert found.results["val_loss"].to_list() == [3.2]
    assert found.curves.select("step", "val_loss").rows() == [(250, 4.0), (500, 3.5), (1000, 3.2)]
    assert found.results["seconds"][0] == pytest.approx(100.0)


def test_a_log_begun_anew_forgets_the_first_attempt():
    anew = parse(log({0: 10.9, 100: 5.0, 200: 4.5}) + log({0: 10.8, 100: 4.9}))
    assert anew.losses == {0: 10.8, 100: 4.9}
    assert anew.trained == 100


def test_ranks_that_print_at_the_same_time():
    """All ranks print what comes before training; their lines may run into each other."""
    doubled = HEAD + HEAD.replace("\n", "") + log(FINISHED, head="").replace("iter 500:", "[rank1]: whatiter 500:")
    found = parse(
        doubled + "step 1000: train loss 3.1000, val loss 3.2222step 1000: train loss 3.1000, val loss 3.3333\n"
    )
    assert (found.tokens_per_step, found.params, found.lr) == (TOKENS, PARAMS, 3e-4)
    assert found.losses == {**FINISHED, 1000: 3.3333}


def test_line_ends_and_bytes_of_any_kind(tmp_path):
    text = log(FINISHED).replace("\n", "\r\n").encode() + b"\xff\xfe\x00 done"
    (tmp_path / "base.log").write_bytes(text)
    assert read_all(tmp_path).results["val_loss"].to_list() == [3.2101]


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_diverged_run_is_left_out_with_its_name(tmp_path, loss):
    diverged = log(FINISHED).replace("val loss 3.2101", f"val loss {loss}")
    found = read_all(write(tmp_path, {"s/base/1.log": log(FINISHED), "s/base/2.log": diverged}))
    assert found.results["seed"].to_list() == [1]
    assert found.warnings == ["1 of 2 rows are left out, the first s/base/2.log: no loss above 0."]


def test_a_diverged_evaluation_in_mid_schedule_is_no_end(tmp_path):
    found = read_all(write(tmp_path, {"base.log": log(FINISHED).replace("val loss 3.5000", "val loss nan")}))
    assert found.results["val_loss"].to_list() == [3.2101]
    assert found.curves["step"].to_list() == [1000]


# Costs


def test_seconds_are_those_of_training():
    """The clock of train.py includes compiling and evaluating; 1000 iterations of 0.1 s take 100 s."""
    for every in (1, 10, 7):
        seconds = parse(log(FINISHED, every=every)).seconds
        assert seconds[0] == 0
        assert seconds[500] == pytest.approx(50)
        assert seconds[1000] == pytest.approx(100)


@given(
    times=st.lists(st.integers(1, 10**7), min_size=20, max_size=200),
    losses=st.lists(st.floats(0.1, 12).map(lambda loss: round(loss, 4)), min_size=1, max_size=5),
    tokens=st.integers(1, 10**9),
    params=st.integers(100, 10**7),
)
@settings(max_examples=50)
def test_a_log_of_random_numbers_is_read_back_exactly(times, losses, tokens, params):
    """Every iteration is logged, in hundredths of a millisecond; the first and those of evaluations are estimated."""
    stride = len(times) // len(losses)
    evaluations = {stride * number: loss for number, loss in enumerate(losses, 1)}
    lines = [f"tokens per iteration will be: {tokens:,}", f"number of parameters: {params / 100:.2f}M"]
    for iteration in range(max(evaluations) + 1):
        if iteration in evaluations:
            lines.append(f"step {iteration}: train loss 0.0000, val loss {evaluations[iteration]:.4f}")
        time = times[iteration] if iteration < len(times) else 1
        lines.append(f"iter {iteration}: loss 0.0000, time {time / 100:.2f}ms, mfu 1.00%")
    found = parse("\n".join(lines) + "\n")
    assert found.losses == evaluations
    assert found.tokens_per_step == tokens
    assert found.params == pytest.approx(params * 1e4, rel=1e-12)
    assert found.trained == max(evaluations)
    others = sorted(time for step, time in enumerate(times[: max(evaluations) + 1]) if step and step not in evaluations)
    middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
    counted = [middle if step == 0 or step in evaluations else time for step, time in enumerate(times)]
    for step in evaluations:
        assert found.seconds[step] == pytest.approx(math.fsum(counted[:step]) / 1e5)


def test_seconds_are_not_known_where_all_times_include_an_evaluation(tmp_path):
    text = log({0: 10.9, 500: 3.5, 1000: 3.2}, every=500)
    found = read_all(write(tmp_path, {"base.log": text}))
    assert found.results["seconds"].to_list() == [None]


def test_seconds_are_not_known_where_the_beginning_is_missing(tmp_path):
    text = HEAD + log(FINISHED, head="")[log(FINISHED, head="").index("step 500") :]
    found = read_all(write(tmp_path, {"base.log": text}))
    assert found.results["seconds"].to_list() == [None]


def test_a_small_model_is_counted_exactly():
    """Less than a million parameters are printed with two digits at most; then all tensors are counted."""
    small = (
        "number of parameters: 0.80M\nnum decayed parameter tensors: 18, with 804,096 parameters\n"
        "num non-decayed parameter tensors: 9, with 1,152 parameters\n"
    )
    assert parse(small).params == 805248


def test_options_say_what_a_log_does_not(tmp_path):
    write(tmp_path, {"base.log": log(FINISHED, head="")})
    (row,) = read_all(tmp_path, params=1e6, tokens_per_step=1000.0).results.to_dicts()
    assert (row["tokens"], row["model_flops"], row["flops_6nd"]) == (1e6, 6e12, 6e12)
    (row,) = read_all(tmp_path, tokens_per_step=1000.0, flops_per_token=7e6).results.to_dicts()
    assert (row["tokens"], row["model_flops"], row["flops_6nd"]) == (1e6, 7e12, None)


def test_options_do_not_overrule_a_log(tmp_path):
    write(tmp_path, {"base.log": log(FINISHED)})
    (row,) = read_all(tmp_path, params=1e6, tokens_per_step=1000.0).results.to_dicts()
    assert row["tokens"] == 1000 * TOKENS
    assert row["flops_6nd"] == pytest.approx(6 * PARAMS * 1000 * TOKENS)


def test_a_log_without_any_cost_says_what_to_do(tmp_path):
    write(tmp_path, {"base.log": "step 100: train loss 3.0000, val loss 3.1000\n"})
    with pytest.raises(
        UserError, match=r"holds a finished result: base\.log: does not say .* set data\.tokens_per_step"
    ):
        read_all(tmp_path)


@given(st.text(alphabet="step iter 0123456789:.,-\nlosvaltrainmemfu%nan{}", max_size=300))
def test_no_text_breaks_the_parser(text):
    found = parse(text)
    assert list(found.losses) == sorted(found.losses)


def test_variants_of_other_parameter_counts_are_of_one_scale(tmp_path):
    """Innovations change the number of parameters."""
    found = read_all(
        write(tmp_path, {"mqa.log": log(FINISHED, head=HEAD.replace("123.59", "116.51")), "base.log": log(FINISHED)})
    )
    assert found.results["scale"].to_list() == ["all", "all"]


@pytest.mark.parametrize("digits", ["9" * 400, "9" * 5000])
def test_no_number_is_too_long(digits):
    text = (
        f"max_iters = {digits}\ntokens per iteration will be: {digits}\nstep {digits}: train loss 1.0, val loss 1.0\n"
        f"num decayed parameter tensors: 1, with {digits} parameters\n"
        f"num non-decayed parameter tensors: 1, with , parameters\n"
    )
    found = parse(text)
    assert (found.planned, found.params, found.losses) == (None, None, {})
