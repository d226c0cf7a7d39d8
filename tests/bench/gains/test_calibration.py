import json
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from bench.gains import calibration
from bench.gains.calibration import ROWS, SETTINGS, Setting, draw, judge, main, markdown, summarise
from bench.gains.resampling import Resampling, Spread
from bench.gains.study import Study

STUDIES = 30  # of each setting below
# Of one size, 3 seeds at 0.002 nats. A seed does most of the noise to all variants alike: unless it cancels, it shows.
EQUAL = Setting("equal gamma", fixed=True, shared=0.9)
UNEQUAL = Setting("unequal gamma", fixed=True, shared=0.9, unequal=True)
# Two standard errors of a share of 90 % in twice as many studies as that, each with one gain.
LOWEST, HIGHEST = 0.9 - 2 * np.sqrt(0.09 / (2 * STUDIES)), 0.9 + 2 * np.sqrt(0.09 / (2 * STUDIES))


def judge_all(estimator: str) -> list[dict]:
    """Other studies in each setting, so that no noise is there twice."""
    tasks = [(EQUAL, number) for number in range(STUDIES)] + [(UNEQUAL, 100 + number) for number in range(STUDIES)]
    return [row for setting, number in tasks for row in judge(setting, estimator, number, replicates=100)]


@pytest.fixture(scope="module", params=["crossing", "scaling_law"])
def judged(request) -> pl.DataFrame:
    return pl.DataFrame(judge_all(request.param), schema=ROWS)


@pytest.mark.slow
class TestEstimators:
    def test_every_variant_has_a_gain(self, judged):
        assert len(judged) == 2 * STUDIES * 3
        assert judged["ceg"].null_count() == 0

    def test_intervals_cover_the_truth_as_often_as_they_say(self, judged):
        assert LOWEST < judged["covered_90"].mean() < HIGHEST
        assert LOWEST < judged["points_covered"].sum() / judged["points"].sum() < HIGHEST
        assert judged["covered_90"].mean() < judged["covered_95"].mean() < 1

    def test_errors_have_no_side(self, judged):
        means = judged.group_by("setting", "study").agg(pl.col("error").mean())["error"]
        assert abs(means.mean()) < 2.5 * means.std() / np.sqrt(len(means))

    def test_gammas_that_are_equal_are_seldom_told_apart(self, judged):
        # 5 % of 90 tests, of which three share a baseline; 2.5 standard errors above it, as if of 30.
        assert judged["false_slope"].mean() < 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / STUDIES)

    def test_gammas_that_differ_by_a_tenth_are_found(self, judged):
        assert judged["found_slope"].mean() > 0.8

    def test_replicates_converge(self, judged):
        assert (judged["not_converged"].drop_nulls() < 0.05).all()


def halve_intervals(monkeypatch):
    margin = Spread.margin
    monkeypatch.setattr(Spread, "margin", lambda self, level: margin(self, level) / 2)


def forget_pairing(monkeypatch):
    def resample(study: Study, tuned, values):
        own = Resampling(study.resampling.replicates, seed=sum(map(ord, tuned.variant)))
        return own.of_seeds(tuned.scale, tuned.seeds) @ values

    monkeypatch.setattr(Study, "resample", resample)


@pytest.mark.slow
@pytest.mark.parametrize("break_intervals", [halve_intervals, forget_pairing])
def test_broken_intervals_are_found_out(break_intervals: Callable, monkeypatch):
    break_intervals(monkeypatch)
    covered = summarise(judge_all("crossing")).select(pl.col("covered_90").mean()).item()
    assert not LOWEST < covered < HIGHEST


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_study_follows_from_its_setting_and_number(setting):
    first, again, other = (draw(setting, number) for number in (7, 7, 8))
    first, again, other = (study.simulate(generator).results for study, generator in (first, again, other))
    assert first.equals(again)
    assert not first.equals(other)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_studies_are_as_their_setting_says(setting):
    studies = [draw(setting, number)[0] for number in range(300)]
    last = [(study.losses()[0, -1], study.losses()[1:]) for study in studies]
    out_of_reach = np.concatenate([losses[:, -1] > target for target, losses in last])
    passed_at_once = np.concatenate([losses[:, 0] <= target for target, losses in last])
    ratios = np.concatenate([study.exponents[1:] / study.exponents[0] for study in studies])
    assert out_of_reach.mean() == pytest.approx(0.2 if setting.censored else 0.0, abs=0.03)
    assert not passed_at_once.any()
    gammas = {0.9, 1.1} if setting.fixed else {0.9, 1.0, 1.1} if setting.unequal else {1.0}
    assert set(ratios.round(12)) == gammas
    assert all((set(study.seeds[0]) == set(study.seeds[1])) == setting.shared_seeds for study in studies)
    assert {len(study.seeds[0]) for study in studies} == ({3} if setting.fixed else {2, 3, 4, 5})
    assert {len(study.budgets) for study in studies} == ({5} if setting.fixed else {3, 4, 5, 6})
    assert {len(study.variants) for study in studies} == ({4} if setting.fixed else {3, 4, 5, 6, 7, 8})
    assert all(0.001 <= study.noise <= 0.01 for study in studies)


def test_the_truth_at_the_measured_loss_is_as_good_as_that_at_the_true_one():
    for number in range(100):
        study, generator = draw(Setting("unequal gamma", unequal=True), number)
        results = study.simulate(generator).results
        last = results.filter(pl.col("variant") == "baseline", pl.col("budget") == study.budgets[-1])
        measured = study.log_gains(np.array([last["val_loss"].mean()]))[1:, 0]
        true = study.log_gains(study.losses()[0, -1:])[1:, 0]
        # A variant's gamma differs by a tenth, so that its gain moves by a tenth of how far the loss is off.
        assert np.abs((measured - true) / study.noise_errors()[1:]).max() < 0.5


def found(study, **changed) -> dict:
    """What `compute_gains` might say of the first variant of a study, and nothing of the others."""
    point = {"lower_bound": None, "upper_bound": None, "interval": [0.5, 8.0], "interval_90": [1.0, 4.0], "ceg": 2.0}
    slope = {"verdict": "inconclusive", "p_value": 0.3}
    point, slope = point | {k: v for k, v in changed.items() if k in point}, slope | changed.get("slope", {})
    curve = [
        {**point, "baseline_compute": study.budgets[1] * 1.0001, "interval_90": None, "lower_bound": 100.0},
        {**point, "baseline_compute": study.budgets[-1]},
    ]
    return {
        "gains": [{"variant": "variant_1", **curve[-1], "curve": curve}],
        "classes": [{"variant": "variant_1", "slope": slope}, {"variant": "variant_2", "slope": slope}],
        "fits": changed.get("fits", []),
    }


class TestJudge:
    """On a study in which the first variant's gain is 2."""

    @pytest.fixture
    def judged(self, monkeypatch) -> Callable[..., dict]:
        def judged(ratio: float = 1.0, **changed) -> dict:
            study, generator = draw(EQUAL, 0)
            study.exponents[1] *= ratio
            at_last = np.exp(study.exponents * np.log(study.budgets[-1] / study.budgets[0]))
            study.reducible[1] = study.reducible[0] * at_last[1] / at_last[0] * 2 ** -study.exponents[1]
            monkeypatch.setattr(calibration, "draw", lambda *_: (study, generator))
            monkeypatch.setattr(calibration, "compute_gains", lambda *_, **__: found(study, **changed))
            (row,) = judge(EQUAL, "crossing", 0, 100)
            assert list(pl.DataFrame([row], schema=ROWS).columns) == list(ROWS)
            assert row.keys() == ROWS.keys()
            return row

        return judged

    def test_a_gain_that_is_right(self, judged):
        row = judged()
        assert row["truth"] == pytest.approx(2)
        assert row["error"] == pytest.approx(0, abs=1e-9)
        assert row["covered_90"] is row["covered_95"] is row["two_sided_covered"] is True
        assert (row["points"], row["points_covered"]) == (2, 1)  # at the first, "at least 100" is false
        assert row["censored"] is False
        assert row["bound_holds"] is row["found_slope"] is row["not_converged"] is None

    def test_errors_are_in_standard_errors(self, judged):
        study, _ = draw(EQUAL, 0)
        unit = study.noise * np.sqrt(0.1 * 2 / 3) / (study.exponents[0] * (study.losses()[0, -1] - study.asymptote))
        assert judged(ceg=2.2)["error"] == pytest.approx(np.log(1.1) / unit)

    @pytest.mark.parametrize(
        ("interval", "covered", "two_sided"),
        [
            ([1.9, 2.1], True, True),
            ([2.1, 2.2], False, False),
            ([1.0, 1.9], False, False),
            ([None, 2.1], True, None),
            ([None, 1.9], False, None),
            ([2.1, None], False, None),
            ([None, None], True, None),
        ],
    )
    def test_sides_that_are_open_hold_everything(self, judged, interval, covered, two_sided):
        row = judged(interval_90=interval)
        assert row["covered_90"] is covered
        assert row["two_sided_covered"] is two_sided
        assert row["covered_95"] is True

    @pytest.mark.parametrize(("bound", "holds"), [(1.5, False), (2.5, True)])
    def test_a_bound_stands_in_for_a_gain_and_for_an_interval(self, judged, bound, holds):
        row = judged(ceg=None, upper_bound=bound, interval=None, interval_90=None)
        assert row["censored"] is True
        assert row["error"] is None
        assert row["bound_holds"] is row["covered_90"] is row["covered_95"] is holds

    def test_near_the_edge_of_what_was_trained_errors_are_not_judged(self, judged, monkeypatch):
        monkeypatch.setattr(calibration, "MARGIN", 1000.0)
        assert judged()["error"] is None

    @pytest.mark.parametrize(
        ("ratio", "verdict", "p_value", "false_slope", "false_verdict", "found_slope"),
        [
            (1.0, "inconclusive", 0.04, True, False, None),
            (1.0, "fading", 0.01, True, True, None),
            (1.0, "compute-dependent", 0.01, True, True, None),
            (1.0, "scale-invariant", None, False, False, None),
            (1.1, "compute-dependent", 0.01, None, None, True),
            (1.1, "fading", 0.01, None, None, False),
            (0.9, "fading", 0.01, None, None, True),
            (0.9, "inconclusive", 0.04, None, None, False),
        ],
    )
    def test_verdicts_are_right_or_wrong(
        self, judged, ratio, verdict, p_value, false_slope, false_verdict, found_slope
    ):
        row = judged(ratio, slope={"verdict": verdict, "p_value": p_value})
        assert (row["false_slope"], row["false_verdict"]) == (false_slope, false_verdict)
        assert row["found_slope"] is found_slope

    def test_replicates_are_counted_over_fits(self, judged):
        fits = [{"replicates_converged": share} for share in (1.0, 0.9)]
        assert judged(fits=fits)["not_converged"] == pytest.approx(0.05)


def row(study: int, **changed) -> dict:
    return {
        "setting": "a",
        "estimator": "crossing",
        "study": study,
        "variant": "variant_1",
        "truth": 2.0,
        "ceg": 2.0,
        "error": 1.0,
        "covered_90": True,
        "covered_95": True,
        "points": 3,
        "points_covered": 3,
        "two_sided_covered": True,
        "censored": False,
        "bound_holds": None,
        "false_slope": False,
        "false_verdict": False,
        "found_slope": None,
        "not_converged": None,
    } | changed


def test_a_summary_has_a_line_for_each_setting_and_estimator():
    rows = [
        row(0, error=3.0),
        row(0, error=-1.0, covered_90=False, two_sided_covered=False, false_slope=True, false_verdict=True),
        row(0, error=None, false_slope=True, false_verdict=True),
        row(1, error=None, covered_90=True, two_sided_covered=None, censored=True, bound_holds=True, points_covered=1),
        row(1, setting="b", false_slope=None, false_verdict=None, found_slope=True, not_converged=0.5),
        row(1, estimator="scaling_law"),
    ]
    summary = summarise(rows)
    assert summary.select("setting", "estimator").rows() == [
        ("a", "crossing"),
        ("b", "crossing"),
        ("a", "scaling_law"),
    ]
    first = summary.row(0, named=True)
    assert (first["studies"], first["variants"]) == (2, 4)
    assert (first["covered_90"], first["two_sided_covered"]) == (0.75, pytest.approx(2 / 3))
    assert first["points_covered"] == pytest.approx(10 / 12)
    assert (first["censored"], first["bound_holds"]) == (0.25, 1.0)
    assert first["bias"] == pytest.approx(1 / np.std([3, -1], ddof=1))
    assert (first["false_slope"], first["false_family"]) == (0.5, 0.5)  # of 4 tests, and of 2 studies
    second = summary.row(1, named=True)
    assert (second["false_slope"], second["found_slope"], second["not_converged"]) == (None, 1.0, 0.5)


def test_the_table_is_markdown():
    lines = markdown(summarise([row(0, error=2.0), row(1, error=-1.5, covered_90=False)])).split("\n")
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:5] == ["a", "crossing", "2", "2", "50.0 %"]
    assert cells[10] == "+0.10"
    assert cells[-2:] == ["–", "–"]


def test_the_command_prints_the_table_and_writes_the_rows(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--studies", "1", "--first", "3", "--estimator", "crossing", "--processes", "1", "--replicates", "100"]
    assert main([*arguments, "--json", str(path)]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == 2 + len(SETTINGS)
    rows = json.loads(path.read_text())
    assert [line.split("|")[1].strip() for line in lines[2:]] == [setting.name for setting in SETTINGS]
    assert [entry for entry in rows if entry["setting"] == SETTINGS[0].name] == judge(SETTINGS[0], "crossing", 3, 100)


@pytest.mark.parametrize(
    ("estimator", "says"), [("crosing", "estimator=crosing is unknown"), ("steps_to_target", "no loss was evaluated")]
)
def test_an_estimator_that_cannot_be_judged_is_one_line(estimator, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--studies", "1", "--estimator", estimator, "--processes", "1"])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err.split("\n")[-2]
