import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.compose import compose_config
from bench.config import ColumnNames, SourceConfig
from bench.errors import UserError
from bench.gains.sources.runs import PROVENANCE, read_study
from bench.gains.sources.wandb import _DamagedError, _records, read
from bench.training.train import train

wandb = pytest.importorskip("wandb")

CONFIG = {"variant": "rope", "scale": "small", "seed": 3, "lr": 1e-3, "params": 1e6}
HISTORY = [
    {"step": 10, "tokens": 1000, "val_loss": 4.0, "seconds": 1.5},
    {"step": 20, "tokens": 2000, "val_loss": 3.5, "seconds": 3.0},
]


def source(**options) -> SourceConfig:
    columns = {
        name: options.pop(name)
        for name in list(options)
        if name in ColumnNames.__dataclass_fields__ and name != "params"
    }
    return SourceConfig(source="wandb", columns=ColumnNames(**columns), **options)


def write_offline(folder, config, history, exit_code=0, **options) -> Path:
    """What wandb itself writes of a run; the run's folder."""
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    run = wandb.init(mode="offline", dir=str(folder), project="p", config=config, settings=settings, **options)
    for row in history:
        run.log(row)
    written = Path(run.dir).parent
    run.finish(exit_code=exit_code)
    wandb.teardown()  # only then is the file certain to be whole
    return written


class Server:
    """wandb.Api as far as it is used: `runs` answers as the test says, and keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, None

    def __call__(self):
        return self

    def runs(self, path, filters=None):
        self.asked = (path, filters)
        if isinstance(self.answer, Exception):
            raise self.answer
        return iter(self.answer)


def online_run(config=CONFIG, history=HISTORY, state="finished", name="eager-fox-1", group=None, identity="a1"):
    return SimpleNamespace(
        id=identity, name=name, group=group, state=state, config=config, scan_history=lambda: iter(history)
    )


@pytest.fixture
def server(monkeypatch):
    def serve(*runs):
        api = Server(runs[0] if runs and isinstance(runs[0], Exception) else runs)
        monkeypatch.setattr(wandb, "Api", api)
        return api

    return serve


# Our own runs


def test_our_own_runs_come_back(overrides, tmp_path):
    """All that the files of a run say, from its mirror."""
    for options in (["seed=1"], ["seed=2", "innovation=[rope]"]):
        train(compose_config([*overrides, "wandb=offline", "evaluation.every=2", *options]))
    wandb.teardown()  # only then are the files certain to be whole
    study = tmp_path / "runs" / "test"
    expected = read_study(study, None)
    found = read(study, source(), "test")
    place = ["scale", "variant", "innovations", "seed", "lr", "budget"]
    measured = ["step", "val_loss", "val_loss_se", "tokens", "seconds", "model_flops", "flops_6nd", "flops_6nd_head"]
    more = ["flops_palm", "optimizer_flops", "model_flops_with_optimizer"]
    assert (
        found.results.select(*place, *measured, *more)
        .sort(place)
        .equals(expected.results.select(*place, *measured, *more).sort(place))
    )
    at = ["scale", "variant", "seed", "branch", "step"]
    assert (
        found.curves.select(*at, "val_loss", "model_flops")
        .sort(at)
        .equals(expected.curves.select(*at, "val_loss", "model_flops").sort(at))
    )
    by_variant = {run["variant"]: run for run in expected.runs}
    for run in found.runs:
        assert {key: run[key] for key in PROVENANCE} == {key: by_variant[run["variant"]][key] for key in PROVENANCE}
    assert found.warnings == expected.warnings == []


# Offline


def test_offline_runs_of_others(tmp_path):
    """Costs in rows of their own, nested keys, a record of several blocks, losses that are none, and a failed run."""
    history = [
        {"iter": 5, "seen": {"tokens": 500}, "note": "x" * 100_000},
        {"iter": 5, "val/loss": 4.0, "lr": 0.5},
        {"iter": 10, "seen": {"tokens": 1000}, "train": math.inf},
        {"iter": 10, "val/loss": 3.5},
    ]
    config = {"model": {"name": "rope", "size": 12}, "seed": 3, "learning_rate": 0.25}
    written = write_offline(tmp_path, config, history, group="g")
    write_offline(tmp_path, config, history, exit_code=1)
    diverged = write_offline(tmp_path, {**config, "seed": 4}, [*history, {"iter": 15, "val/loss": math.nan}])
    options = {"variant": "model.name", "scale": "model.size", "tokens": "seen.tokens"}
    found = read(tmp_path, source(**options, flops_per_token=6.0), "mine")
    (row,) = found.results.to_dicts()
    assert (row["variant"], row["scale"], row["seed"], row["lr"]) == ("rope", "12", 3, 0.25)
    assert (row["step"], row["val_loss"], row["tokens"], row["model_flops"]) == (10, 3.5, 1000, 6000)
    assert found.curves.select("step", "val_loss", "tokens").rows() == [(5, 4.0, 500), (10, 3.5, 1000)]
    assert row["run"] == written.name
    assert len(found.warnings) == 2
    assert "it is failed, not finished; left out." in found.warnings[0]
    assert diverged.name in found.warnings[1]
    alone = read(next(written.glob("*.wandb")), source(**options), "mine")
    assert alone.results["val_loss"].to_list() == [3.5]


def test_a_resumed_offline_run_is_one_run(tmp_path):
    cut = write_offline(tmp_path, CONFIG, HISTORY, id="same")
    file = next(cut.glob("*.wandb"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="it is cut off, not finished; left out"):
        read(tmp_path, source(), "mine")
    cut.rename(cut.parent / "offline-run-20200101_000000-same")
    again = [{**HISTORY[1], "val_loss": 3.4}, {"step": 30, "tokens": 3000, "val_loss": 3.0}]
    write_offline(tmp_path, CONFIG, again, id="same")
    found = read(tmp_path, source(), "mine")
    assert found.results.select("step", "val_loss", "seed").rows() == [(30, 3.0, 3)]
    assert found.curves.select("step", "val_loss").rows() == [(10, 4.0), (20, 3.4), (30, 3.0)]


def test_a_damaged_file_takes_no_other_with_it(tmp_path):
    write_offline(tmp_path, CONFIG, HISTORY)
    damaged = write_offline(tmp_path, CONFIG, HISTORY)
    file = next(damaged.glob("*.wandb"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    (damaged.parent / "run-text.wandb").write_text("no such thing")
    found = read(tmp_path, source(), "mine")
    assert len(found.results) == 1
    assert sorted(found.warnings) == sorted(
        [
            f"{damaged.name}: {file.name} cannot be read (damaged at byte {damage_begins(content)}); left out.",
            "wandb: run-text.wandb cannot be read (it is no .wandb file); left out.",
        ]
    )


def damage_begins(content: bytes) -> int:
    """Where the record begins that holds byte 100."""
    position = 7
    while position + 7 + (length := struct.unpack_from("<H", content, position + 4)[0]) <= 100:
        position += 7 + length
    return position


def test_where_there_is_no_offline_run(tmp_path):
    with pytest.raises(UserError, match=r"holds no offline run of W&B: expected wandb/offline-run-\*/run-\*\.wandb"):
        read(tmp_path, source(), "mine")


def test_a_wandb_that_cannot_read_offline_runs(tmp_path, monkeypatch):
    (tmp_path / "run-a.wandb").write_bytes(b":W&B\xe1\xbe\x00")
    monkeypatch.setitem(sys.modules, "wandb.proto", None)
    with pytest.raises(UserError, match=r"cannot read offline runs: install wandb>=0\.19"):
        read(tmp_path, source(), "mine")


# LevelDB's log format, from its description: blocks of 32 KiB, a record in one or several parts, none across a block


def write_records(records) -> bytes:
    content = b":W&B\xe1\xbe\x00"
    for record in records:
        first = True
        while first or record:
            left = 32768 - len(content) % 32768
            if left < 7:
                content += bytes(left)
                left = 32768
            part, record = record[: left - 7], record[left - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not record]
            content += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
    return content


@given(st.lists(st.tuples(st.integers(0, 70_000), st.integers(0, 255)), max_size=8))
def test_records_are_read_as_they_were_written(sizes):
    records = [bytes([value]) * size for size, value in sizes]
    assert list(_records(write_records(records))) == records


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=5), st.integers(1, 10**6))
def test_a_file_that_is_cut_off_gives_the_records_before(sizes, cut):
    records = [bytes(size) for size in sizes]
    content = write_records(records)
    found = list(_records(content[: max(7, len(content) - cut)]))
    assert found == records[: len(found)]
    assert len(found) < len(records)


def test_a_flipped_bit_is_found():
    content = bytearray(write_records([b"abc"]))
    content[-1] ^= 4
    with pytest.raises(_DamagedError, match="damaged at byte 7"):
        list(_records(bytes(content)))


# Online


def test_online_runs(server):
    api = server(online_run(), online_run({**CONFIG, "variant": "baseline"}, identity="a2"))
    found = read(Path("me/project"), source(), "mine")
    assert api.asked == ("me/project", None)
    assert found.results.select("variant", "scale", "seed", "lr", "val_loss", "run").sort("run").rows() == [
        ("rope", "small", 3, 1e-3, 3.5, "me/project/a1"),
        ("baseline", "small", 3, 1e-3, 3.5, "me/project/a2"),
    ]
    assert found.results["model_flops"].to_list() == [6 * 1e6 * 2000] * 2
    assert found.curves["step"].to_list() == [10, 20, 10, 20]


def test_one_group_of_a_project(server):
    api = server(online_run())
    read(Path("me/project/my group"), source(), "mine")
    assert api.asked == ("me/project", {"group": "my group"})


def test_options_name_other_keys(server):
    config = {"n": {"layer": 4, "heads": 2}, "rate": 0.5}
    history = [{"eval/nll": 3.0, "wall": 7.0}, {"loss": 9.0}]
    server(online_run(config, history, name="rope-1", group="rope"))
    options = {"variant": "group", "scale": "n.layer", "lr": "rate", "loss": "eval/nll", "seconds": "wall"}
    (row,) = read(Path("me/project"), source(**options), "mine").results.to_dicts()
    assert (row["variant"], row["scale"], row["seed"], row["lr"]) == ("rope", "4", 0, 0.5)
    assert (row["val_loss"], row["seconds"], row["tokens"]) == (3.0, 7.0, None)


def test_a_run_without_a_variant_has_its_own_name(server):
    server(online_run({}, HISTORY, name="rope"))
    found = read(Path("me/project"), source(), "mine")
    assert found.results["variant"].to_list() == ["rope"]


def test_options_say_what_runs_do_not(server):
    server(online_run({}, [{"iter": 100, "val/loss": 3.0}]))
    (row,) = read(Path("me/project"), source(params=1e6, tokens_per_step=50.0), "mine").results.to_dicts()
    assert (row["step"], row["tokens"], row["model_flops"]) == (100, 5000, 6 * 1e6 * 5000)


def test_rows_with_a_budget_are_results_and_the_others_the_curve(server):
    history = [
        {"step": 10, "model_flops": 10.0, "val_loss": 5.0},
        {"step": 20, "model_flops": 20.0, "val_loss": 4.0, "branch": 20.0},
        {"step": 20, "model_flops": 20.0, "val_loss": 4.0, "budget": 20.0},
        {"step": 30, "model_flops": 30.0, "val_loss": 3.5, "branch": 40.0},
        {"step": 40, "model_flops": 40.0, "val_loss": 3.0, "budget": 40.0, "val_loss_se": 0.01},
    ]
    server(online_run(CONFIG, history))
    found = read(Path("me/project"), source(), "mine")
    assert found.results.sort("budget").select("budget", "val_loss", "val_loss_se").rows() == [
        (20.0, 4.0, None),
        (40.0, 3.0, 0.01),
    ]
    assert found.curves.select("step", "branch").rows() == [(10, None), (20, 20.0), (30, 40.0)]


def test_text_in_place_of_a_number_is_no_loss(server):
    server(online_run(), online_run({**CONFIG, "seed": 4}, [*HISTORY, {"step": 30, "val_loss": "NaN"}], identity="a2"))
    found = read(Path("me/project"), source(), "mine")
    assert found.results["run"].to_list() == ["me/project/a1"]
    assert found.warnings == ["1 of 2 rows are left out, the first me/project/a2: no loss above 0."]


@pytest.mark.parametrize("state", ["running", "crashed", "failed", "killed"])
def test_runs_that_are_not_finished_are_left_out(server, state):
    server(online_run(), online_run(state=state, identity="a2"))
    found = read(Path("me/project"), source(), "mine")
    assert found.results["run"].to_list() == ["me/project/a1"]
    assert found.warnings == [f"me/project/a2: it is {state}, not finished; left out."]


def test_no_loss_lists_what_there_is(server):
    server(online_run(CONFIG, [{"loss": 3.0, "eval/nll": 2.0, "_step": 1}]))
    with pytest.raises(UserError, match=r"has no val_loss or .* data\.columns\.loss=\.\.\., there are eval/nll, loss$"):
        read(Path("me/project"), source(), "mine")


def test_no_cost_lists_what_there_is(server):
    server(online_run({}, [{"iter": 10, "val/loss": 3.0, "seen/tokens": 4.0, "_runtime": 7.0}]))
    with pytest.raises(UserError, match=r"says what it cost: .* there are iter, seen/tokens, val/loss$"):
        read(Path("me/project"), source(), "mine")


@pytest.mark.parametrize(
    "error",
    [
        wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in."),
        wandb.errors.CommError("No API key configured. Use `wandb login` to log in."),
        ValueError("No API key configured. Use `wandb login` to log in."),
        ConnectionError("No API key configured. Use `wandb login` to log in."),
    ],
)
def test_what_wandb_refuses_is_one_line(server, error):
    server(error)
    with pytest.raises(UserError) as raised:
        read(Path("me/project"), source(), "mine")
    assert str(raised.value) == (
        "W&B: No API key configured. Use `wandb login` to log in.; there is no folder me/project either"
    )


def test_an_empty_project(server):
    server()
    with pytest.raises(UserError, match="W&B has no run in me/project"):
        read(Path("me/project"), source(), "mine")


@pytest.mark.parametrize("path", ["absent", "/absent/folder", "../absent", "a/b/c/d", "wandb/offline-run-1"])
def test_what_is_neither_a_folder_nor_a_project(tmp_path, monkeypatch, server, path):
    server(AssertionError("W&B was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    with pytest.raises(
        UserError, match=f"there is no folder {path}: set path=... to a folder of W&B runs, or to entity"
    ):
        read(Path(path), source(), "mine")


def test_wandb_is_imported_only_when_it_is_needed():
    code = "import sys, bench.gains.sources.wandb; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_numbers_are_of_the_schema(server):
    """Whole numbers of W&B arrive as such, and as floats where a row has a fraction."""
    server(
        online_run(
            {**CONFIG, "seed": 3.0},
            [{"step": 1, "tokens": 7, "val_loss": 3}, {"step": 2.0, "tokens": 8.5, "val_loss": 2.5}],
        )
    )
    found = read(Path("me/project"), source(), "mine")
    assert found.results.schema["step"] == pl.Int64
    assert found.results.select("seed", "step", "tokens", "val_loss").row(0) == (3, 2, 8.5, 2.5)
