"""What becomes of tables that others keep, and what each kind of mistake in them is answered with."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from bench.errors import UserError
from bench.gains.sources.columns import COMPUTE_AXES, normalise
from bench.gains.sources.runs import COSTS, CURVES, PROVENANCE, RESULTS

FLOPS = (1e15, 4e15, 16e15, 64e15)
LOSSES = (3.0, 2.7, 2.5, 2.4)


def make_table(variants=("baseline", "rope", "mqa"), seeds=(0, 1), change=dict):
    """A row for each variant, seed and budget; `change` edits each."""
    return pl.DataFrame(
        [
            change({"variant": variant, "scale": "tiny", "seed": seed, "lr": 1e-3, "flops": flops, "loss": loss - gain})
            for gain, variant in zip((0, 0.02, 0.01), variants, strict=False)
            for seed in seeds
            for flops, loss in zip(FLOPS, np.add(LOSSES, 0.01 * seed), strict=True)
        ]
    )


def of(variant, change):
    """Changes the rows of one variant only."""
    return lambda row: change(row) if row["variant"] == variant else row


def set_cell(table, row, column, value):
    """`value` in row `row`, counted from 1 as in warnings; the column becomes text where it has to."""
    cells = table[column].to_list()
    cells[row - 1] = value
    strict = not isinstance(value, str)
    return table.with_columns(pl.Series(column, cells if strict else [str(cell) for cell in cells]))


def test_the_schema_is_that_of_our_own_runs():
    found = normalise("theirs", make_table())
    with_optimizer = {"model_flops_with_optimizer": pl.Float64}
    assert dict(found.results.schema) == RESULTS | with_optimizer
    assert dict(found.curves.schema) == CURVES | with_optimizer
    assert found.curves.is_empty()
    assert (found.name, found.warnings) == ("theirs", [])
    assert found.results["study"].unique().to_list() == ["theirs"]
    assert len(found.results) == 3 * 2 * 4


def test_a_row_comes_through_as_it_is():
    table = make_table(["rope+swiglu"], [3]).with_columns(
        loss_se=pl.lit(0.01), step=pl.lit(70), budget=pl.col("flops") * 1.2, seconds=pl.lit(5.0)
    )
    row = normalise("theirs", table).results.row(0, named=True)
    assert (row["variant"], row["innovations"]) == ("rope+swiglu", ["rope", "swiglu"])
    assert (row["scale"], row["seed"], row["lr"]) == ("tiny", 3, 1e-3)
    assert (row["model_flops"], row["budget"]) == (1e15, 1.2e15)
    assert (row["val_loss"], row["val_loss_se"], row["step"], row["seconds"]) == (3.03, 0.01, 70, 5.0)
    assert row["joules"] is None
    assert row["train_loss"] is None


def test_runs_are_described_as_far_as_they_are_known():
    table = make_table(["baseline"], [0, 1]).with_columns(params=pl.lit(1e6), run=pl.format("log{}.txt", "seed"))
    first, second = normalise("theirs", table, runs=[{"path": "log1.txt", "device": "H100"}]).runs
    assert first == {
        "path": "log0.txt", "study": "theirs", "scale": "tiny", "variant": "baseline", "innovations": [], "seed": 0,
        "lr": 1e-3, "state": "done", **dict.fromkeys(PROVENANCE), "parameters": {"total": 1000000},
    }  # fmt: skip
    assert (second["path"], second["device"]) == ("log1.txt", "H100")


def test_runs_without_a_path_are_named_by_what_they_are():
    found = normalise("theirs", make_table(["rope"], [1]))
    assert [run["path"] for run in found.runs] == ["tiny/rope/seed=1,lr=0.001"]
    assert found.results["run"].unique().to_list() == ["tiny/rope/seed=1,lr=0.001"]


class TestDerivedCosts:
    def read(self, **columns):
        return normalise("theirs", pl.DataFrame({"loss": [3.0, 2.5]} | columns)).results

    def test_params_and_tokens(self):
        results = self.read(params=[1e6, 3e6], tokens=[1e8, 7e8])
        assert results["flops_6nd"].to_list() == results["model_flops"].to_list() == [6e14, 1.26e16]

    def test_all_three_are_kept_apart(self):
        results = self.read(params=[1e6, 3e6], tokens=[1e8, 7e8], flops=[7e14, 2e16])
        assert results["model_flops"].to_list() == [7e14, 2e16]
        assert results["flops_6nd"].to_list() == [6e14, 1.26e16]
        assert results["tokens"].to_list() == [1e8, 7e8]

    @given(st.lists(st.tuples(st.floats(1e5, 1e12), st.floats(1e15, 1e26)), min_size=1, max_size=5, unique=True))
    def test_params_and_flops_alone_give_back_the_params(self, models):
        """Estimators take N = flops_6nd / (6 tokens)."""
        params, flops = zip(*models, strict=True)
        table = pl.DataFrame({"params": params, "flops": flops, "loss": [3.0] * len(models)})
        results = normalise("chinchilla", table).results
        assert sorted(results["flops_6nd"]) == sorted(flops)
        np.testing.assert_allclose(sorted(results["flops_6nd"] / (6 * results["tokens"])), sorted(params), rtol=1e-15)

    def test_flops_alone_say_nothing_of_tokens(self):
        results = self.read(flops=[1e15, 2e15])
        assert results["tokens"].null_count() == results["flops_6nd"].null_count() == 2

    def test_what_is_given_is_not_derived(self):
        results = self.read(params=[1e6, 3e6], tokens=[1e8, 7e8], flops_6nd=[1e15, 2e16])
        assert results["flops_6nd"].to_list() == [1e15, 2e16]

    def test_flops_with_the_optimizers(self):
        results = self.read(flops=[1e15, 2e15], optimizer_flops=[0.0, 1e12])
        assert results["model_flops_with_optimizer"].to_list() == [1e15, 2.001e15]

    @pytest.mark.parametrize("axis", ["seconds", "joules", "dollars", "grams_co2e", "tokens", "flops_palm"])
    def test_any_one_cost_is_enough(self, axis):
        results = self.read(**{axis: [10.0, 20.0]})
        assert results[axis].to_list() == results["budget"].to_list() == [10.0, 20.0]
        assert all(results[other].null_count() == 2 for other in COSTS if other != axis)


class TestKeys:
    def test_what_is_missing_has_a_name(self):
        row = normalise("theirs", pl.DataFrame({"loss": [3.0], "flops": [1e15]})).results.row(0, named=True)
        assert (row["variant"], row["scale"], row["seed"], row["lr"]) == ("baseline", "all", 0, 0.0)

    def test_without_scales_the_number_of_params_is_one(self):
        results = normalise(
            "theirs", make_table(change=lambda row: {**row, "scale": None, "params": 124_439_808})
        ).results
        assert results["scale"].unique().to_list() == ["1.2444e+08"]

    def test_a_scale_may_be_a_number(self):
        results = normalise("theirs", make_table(change=lambda row: {**row, "scale": 124_439_808})).results
        assert results["scale"].unique().to_list() == ["124439808"]

    def test_computes_of_seeds_within_a_percent_are_one_budget(self):
        table = make_table(
            ["baseline"], [0, 1, 2], lambda row: {**row, "flops": row["flops"] * (1 + 0.004 * row["seed"])}
        )
        results = normalise("theirs", table).results
        assert sorted(results["budget"].unique()) == pytest.approx(np.multiply(FLOPS, 1.004))
        assert results.group_by("budget").len()["len"].to_list() == [3] * 4
        assert results["model_flops"].n_unique() == 12

    def test_budgets_two_percent_apart_are_two(self):
        table = make_table(["baseline"], [0, 1], lambda row: {**row, "flops": row["flops"] * (1 + 0.02 * row["seed"])})
        assert normalise("theirs", table).results["budget"].n_unique() == 8

    def test_budgets_of_other_variants_are_their_own(self):
        table = make_table(change=of("mqa", lambda row: {**row, "flops": row["flops"] * 0.995}))
        results = normalise("theirs", table).results
        assert sorted(results.filter(pl.col("variant") == "mqa")["budget"].unique()) == [0.995 * f for f in FLOPS]

    def test_repeats_without_seeds_are_numbered(self):
        table = make_table(["baseline"], [5, 6, 9]).drop("seed")
        results = normalise("theirs", table).results
        assert results.group_by("budget").agg(pl.col("seed").sort())["seed"].to_list() == [[0, 1, 2]] * 4

    def test_repeats_beside_seeds_take_the_numbers_left(self):
        table = make_table(["baseline"], [1, 4, 5], lambda row: {**row, "seed": 1 if row["seed"] == 1 else None})
        results = normalise("theirs", table).results
        assert results.group_by("budget").agg(pl.col("seed").sort())["seed"].to_list() == [[0, 1, 2]] * 4
        assert results.filter(pl.col("seed") == 1)["val_loss"].to_list() == [loss + 0.01 for loss in LOSSES]

    def test_repeats_are_not_paired_by_their_losses(self):
        """Numbered by rank, the best would be paired with the best, and differences would seem to vary too little."""
        generator = np.random.default_rng(0)
        rows = [
            {"variant": variant, "flops": 1e15 * 2**budget, "loss": float(loss)}
            for variant in ("baseline", "rope")
            for budget in range(40)
            for loss in 3 + 0.01 * generator.standard_normal(8)
        ]
        results = normalise("theirs", pl.DataFrame(rows)).results
        wide = results.pivot("variant", index=["budget", "seed"], values="val_loss")
        centred = wide.with_columns(pl.col("baseline", "rope") - pl.col("baseline", "rope").mean().over("budget"))
        assert abs(np.corrcoef(centred["baseline"], centred["rope"])[0, 1]) < 0.2
        rank = pl.col("val_loss").rank().over("variant", "budget")
        assert abs(results.select(pl.corr(rank, "seed")).item()) < 0.2

    def test_two_runs_with_one_loss_are_two_repeats(self):
        table = pl.DataFrame({"run": ["a", "b"], "flops": [1e15, 1e15], "loss": [3.28, 3.28]})
        found = normalise("theirs", table)
        assert found.results["seed"].to_list() == [0, 1]
        assert found.warnings == []


class TestBadRows:
    @pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 0.0, -1.0, "low", ""])
    @pytest.mark.parametrize("column", ["loss", "flops"])
    def test_no_number_above_0(self, column, value):
        found = normalise("theirs", set_cell(make_table(), 3, column, value))
        assert len(found.results) == 23
        assert found.warnings == [f"1 of 24 rows are left out, the first row 3: no {column} above 0."]

    @pytest.mark.parametrize(
        ("column", "value", "what"),
        [
            ("seed", "one", "a seed that is no whole number"),
            ("seed", 0.5, "a seed that is no whole number"),
            ("seed", 1e300, "a seed that is no whole number"),
            ("seed", math.inf, "a seed that is no whole number"),
            ("lr", "high", "an lr that is no number"),
            ("lr", -1e-3, "an lr that is no number"),
            ("budget", "large", "a budget that is no number above 0"),
            ("budget", 0.0, "a budget that is no number above 0"),
        ],
    )
    def test_keys_that_are_no_numbers(self, column, value, what):
        table = make_table(change=lambda row: {**row, "budget": row["flops"], "seed": float(row["seed"])})
        found = normalise("theirs", set_cell(table, 24, column, value))
        assert len(found.results) == 23
        assert found.warnings == [f"1 of 24 rows are left out, the first row 24: {what}."]

    def test_rows_are_counted_and_the_first_is_named(self):
        table = make_table()
        for row in (20, 4, 9):
            table = set_cell(table, row, "loss", math.nan)
        assert normalise("theirs", table).warnings == ["3 of 24 rows are left out, the first row 4: no loss above 0."]

    @pytest.mark.parametrize("column", ["run", "origin"])
    def test_a_row_is_called_what_its_run_or_origin_says(self, column):
        named = pl.format("log {}", pl.int_range(pl.len())).alias(column)
        (warning,) = normalise("theirs", set_cell(make_table(), 2, "loss", None).with_columns(named)).warnings
        assert warning == "1 of 24 rows are left out, the first log 1: no loss above 0."

    @pytest.mark.parametrize("value", [math.nan, 0.0, -1.0, "unknown", None])
    def test_another_cost_that_is_no_number_is_not_measured(self, value):
        found = normalise("theirs", set_cell(make_table().with_columns(joules=pl.lit(5.0)), 3, "joules", value))
        assert found.warnings == []
        assert len(found.results) == 24
        assert found.results["joules"].null_count() == 1

    @pytest.mark.parametrize("column", ["step", "loss_se"])
    @pytest.mark.parametrize("value", [math.nan, math.inf, "many"])
    def test_a_remark_that_is_no_number_is_not_known(self, column, value):
        found = normalise("theirs", set_cell(make_table().with_columns(pl.lit(7.0).alias(column)), 3, column, value))
        known = found.results["val_loss_se" if column == "loss_se" else column]
        assert (known.null_count(), known.drop_nulls().unique().to_list()) == (1, [7])
        assert found.warnings == []

    def test_a_row_without_flops_is_left_out_though_it_has_seconds(self):
        found = normalise("theirs", set_cell(make_table().with_columns(seconds=pl.lit(5.0)), 3, "flops", None))
        assert found.warnings == ["1 of 24 rows are left out, the first row 3: no flops above 0."]

    def test_where_few_rows_have_flops_compute_is_what_most_have(self):
        table = make_table(["baseline"], [0]).with_columns(seconds=pl.col("flops") / 1e12)
        for row in (1, 2, 4):
            table = set_cell(table, row, "flops", None)
        found = normalise("theirs", table)
        assert found.results["budget"].to_list() == [1e3, 4e3, 16e3, 64e3]
        assert found.warnings == []

    def test_identical_rows_are_counted_once(self):
        table = make_table()
        found = normalise("theirs", pl.concat([table, table[[4, 2]]]))
        assert_frame_equal(found.results, normalise("theirs", table).results)
        assert found.warnings == [
            "2 of 26 rows say what another row says and are counted once, the first row 25; give repeats a seed."
        ]

    def test_contradicting_rows_are_all_left_out(self):
        table = make_table()
        found = normalise("theirs", pl.concat([table, set_cell(table[[2]], 1, "loss", 2.9)]))
        assert len(found.results) == 23
        assert found.warnings == [
            "baseline at tiny: 2 rows differ from others of the same seed, lr and budget, the first row 3; all of them "
            "are left out."
        ]

    @pytest.mark.parametrize(("variant", "factor"), [("rope", 1e3), ("mqa", 1e-9), ("baseline", 1e6)])
    def test_compute_in_other_units(self, variant, factor):
        found = normalise("theirs", make_table(change=of(variant, lambda row: {**row, "flops": row["flops"] * factor})))
        assert variant not in found.results["variant"]
        assert len(found.results) == 16
        assert found.warnings == [
            f"{variant} at tiny: its flops are {factor:.3g} times those of the others, as if they were in other units; "
            "it is left out."
        ]

    def test_of_two_in_different_units_the_baseline_is_believed(self):
        change = of("baseline", lambda row: {**row, "flops": row["flops"] / 1e12})
        found = normalise("theirs", make_table(["baseline", "rope"], change=change))
        assert found.results["variant"].unique().to_list() == ["baseline"]

    def test_a_variant_trained_a_hundred_times_longer_stays(self):
        found = normalise("theirs", make_table(change=of("mqa", lambda row: {**row, "flops": row["flops"] * 100})))
        assert found.warnings == []
        assert len(found.results) == 24

    @pytest.mark.parametrize("variant", ["baseline", "rope", "mqa"])
    def test_losses_in_bits(self, variant):
        change = of(variant, lambda row: {**row, "loss": row["loss"] / math.log(2)})
        found = normalise("theirs", make_table(change=change))
        assert variant not in found.results["variant"]
        (warning,) = found.warnings
        assert warning.startswith(f"{variant} at tiny: its losses are 1.44 times those of the others at every budget")
        assert warning.endswith("as if they were in bits; it is left out.")

    def test_losses_in_nats_beside_others_in_bits(self):
        in_bits = {"baseline", "rope"}
        table = make_table(
            change=lambda row: {**row, "loss": row["loss"] / (math.log(2) if row["variant"] in in_bits else 1)}
        )
        found = normalise("theirs", table)
        assert set(found.results["variant"]) == in_bits
        assert "as if they were in nats, and the others' in bits" in found.warnings[0]

    def test_a_loss_so_much_higher_at_some_budgets_only_stays(self):
        change = of("mqa", lambda row: {**row, "loss": row["loss"] / (math.log(2) if row["flops"] < 1e16 else 1)})
        assert len(normalise("theirs", make_table(change=change)).results) == 24

    def test_doubtful_flops_are_kept_and_named(self):
        table = make_table(change=lambda row: {**row, "params": 1e6, "tokens": row["flops"] / 6e6})
        found = normalise("theirs", set_cell(table, 7, "params", 1e3))
        assert len(found.results) == 24
        assert found.warnings == [
            "1 of 24 rows have flops more than 20 times above or below 6 x params x tokens, the first row 7: check the "
            "units."
        ]


class TestUnusable:
    def test_no_loss(self):
        with pytest.raises(UserError, match=r"need a column loss; there are los, flops: .* data.columns.loss=\.\.\."):
            normalise("theirs", pl.DataFrame({"los": [3.0], "flops": [1.0]}))

    @pytest.mark.parametrize("only", ["params", "tokens_", "optimizer_flops"])
    def test_no_cost(self, only):
        with pytest.raises(UserError, match=rf"need a cost, .*; there are loss, {only}: .* data.columns.flops=\.\.\."):
            normalise("theirs", pl.DataFrame({"loss": [3.0], only: [1.0]}))

    def test_no_row_is_left(self):
        with pytest.raises(UserError, match=r"no row of theirs can be used: 2 of 2 rows .* row 1: no loss above 0\."):
            normalise("theirs", pl.DataFrame({"loss": [0.0, -1.0], "flops": [1.0, 2.0]}))

    def test_no_row_at_all(self):
        with pytest.raises(UserError, match=r"no row of theirs can be used: it has none\."):
            normalise("theirs", pl.DataFrame({"loss": [], "flops": []}))


class TestCurves:
    table = pl.DataFrame(
        {
            "run": ["a", "b"],
            "variant": ["baseline", "rope"],
            "params": [1e6, 2e6],
            "tokens": [1e9, 1e9],
            "loss": [3.0, 2.9],
        }
    )

    def test_they_are_placed_by_their_run_and_their_costs_derived(self):
        curves = pl.DataFrame(
            {"run": ["b", "a", "a"], "step": [1, 2, 1], "val_loss": [5.0, 4.0, 6.0], "tokens": [10] * 3}
        )
        found = normalise("theirs", self.table, curves).curves
        assert found["run"].to_list() == ["a", "a", "b"]
        assert found["step"].to_list() == [1, 2, 1]
        assert found["variant"].to_list() == ["baseline", "baseline", "rope"]
        assert found["flops_6nd"].to_list() == found["model_flops"].to_list() == [6e7, 6e7, 12e7]

    def test_the_curve_of_a_run_with_one_result_leads_to_its_budget(self):
        curves = pl.DataFrame({"run": ["a", "b"], "step": [1, 1], "val_loss": [5.0, 4.0]})
        assert normalise("theirs", self.table, curves).curves["branch"].to_list() == [6e15, 12e15]

    def test_a_branch_that_is_given_is_kept(self):
        curves = pl.DataFrame({"run": ["a", "b"], "step": [1, 1], "val_loss": [5.0, 4.0], "branch": [7.0, 8.0]})
        assert normalise("theirs", self.table, curves).curves["branch"].to_list() == [7.0, 8.0]

    def test_those_of_a_run_without_a_result_are_dropped(self):
        curves = pl.DataFrame({"run": ["a", "c"], "step": [1, 1], "val_loss": [5.0, 4.0]})
        assert normalise("theirs", self.table, curves).curves["run"].to_list() == ["a"]

    def test_an_evaluation_without_a_loss_is_dropped(self):
        curves = pl.DataFrame({"run": ["a", "a"], "step": [1, 2], "val_loss": [math.nan, 4.0]})
        found = normalise("theirs", self.table, curves)
        assert found.curves["step"].to_list() == [2]
        assert found.warnings == ["1 of 2 evaluations in mid-schedule have no loss and are left out."]


@st.composite
def tables(draw):
    """Rows with every column there or not, numbers good or bad, seeds and labels repeated."""
    columns = {
        "loss": st.one_of(st.floats(1, 9), st.sampled_from([math.nan, 0.0, 3.0])),
        "flops": st.sampled_from([1e15, 1.004e15, 1.02e15, 4e15, 1e21, 0.0]),
        "variant": st.sampled_from(["baseline", "rope", "rope+swiglu", None]),
        "scale": st.sampled_from(["tiny", "small", None]),
        "seed": st.sampled_from([0, 1, 2, None]),
        "lr": st.sampled_from([1e-3, 2e-3, None]),
        "params": st.sampled_from([1e6, 2e6, None]),
        "tokens": st.sampled_from([1e8, 1.6e8, None]),
        "seconds": st.sampled_from([10.0, -1.0, None]),
    }
    optional = draw(st.sets(st.sampled_from([name for name in columns if name not in ("loss", "flops")])))
    row = st.fixed_dictionaries(
        {name: cells for name, cells in columns.items() if name in optional | {"loss", "flops"}}
    )
    rows = draw(st.lists(row, min_size=1, max_size=12))
    return pl.DataFrame(rows, infer_schema_length=None)


def outcome(table, **options):
    """Results and runs, or the start of what is wrong."""
    try:
        found = normalise("theirs", table, **options)
    except UserError:
        return None
    return found.results, found.runs


def assert_same(one, other):
    assert (one is None) == (other is None)
    if one is not None:
        assert_frame_equal(one[0], other[0])
        assert one[1] == other[1]


@given(tables(), st.randoms(use_true_random=False))
def test_the_order_of_rows_never_matters(table, random):
    order = list(range(len(table)))
    random.shuffle(order)
    assert_same(outcome(table), outcome(table[order]))


@given(tables(), st.randoms(use_true_random=False))
def test_the_order_of_columns_and_columns_beside_never_matter(table, random):
    names = random.sample(table.columns, len(table.columns))
    beside = table.select(names).with_columns(colour=pl.lit("red"), train_loss=pl.lit(0.0))
    assert_same(outcome(table), outcome(beside))


@given(tables())
def test_numbers_may_be_text(table):
    def text(cell):
        return None if cell is None else f" {cell!r} " if isinstance(cell, float) else str(cell)

    as_text = pl.DataFrame(
        {name: [text(cell) for cell in table[name]] for name in table.columns},
        schema_overrides=dict.fromkeys(table.columns, pl.String),
    )
    assert_same(outcome(table), outcome(as_text))


@given(tables())
def test_what_comes_out_is_usable(table):
    found = outcome(table)
    if found is not None:
        results, runs = found
        assert (results["val_loss"] > 0).all()
        assert results["val_loss"].is_finite().all()
        assert not results.select("scale", "variant", "seed", "lr", "budget").is_duplicated().any()
        assert results.select("scale", "variant", "seed", "lr", "budget").null_count().sum_horizontal().item() == 0
        assert {run["path"] for run in runs} == set(results["run"])


@given(tables())
def test_reading_what_came_out_changes_nothing(table):
    """Unless rows differ in which costs they have: of fewer rows another cost may be the one that most have."""
    found = outcome(table)
    if found is not None and all(found[0][axis].null_count() in (0, len(found[0])) for axis in COMPUTE_AXES):
        again = found[0].rename({"val_loss": "loss", "val_loss_se": "loss_se", "model_flops": "flops"})
        assert_frame_equal(outcome(again)[0], found[0])
