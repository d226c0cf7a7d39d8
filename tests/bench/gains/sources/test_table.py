"""CSV and Parquet files as people have them."""

import gzip

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from bench.config import ColumnNames, SourceConfig
from bench.errors import UserError
from bench.gains.sources import find_source
from bench.gains.sources.table import ALIASES, read

ROWS = """variant,scale,seed,lr,flops,loss
baseline,tiny,0,1e-3,1e15,3.0
baseline,tiny,1,1e-3,1e15,3.1
rope,tiny,0,2e-3,2e15,2.9
"""


def read_text(path, text, **columns):
    path.write_text(text)
    return read(path, SourceConfig(source="table", columns=ColumnNames(**columns)), "theirs")


@pytest.fixture
def expected(tmp_path):
    return read_text(tmp_path / "expected.csv", ROWS).results


def test_a_csv(expected):
    assert expected["variant"].to_list() == ["baseline", "baseline", "rope"]
    assert expected["model_flops"].to_list() == [1e15, 1e15, 2e15]
    assert expected["lr"].to_list() == [1e-3, 1e-3, 2e-3]


@pytest.mark.parametrize("ending", [".csv", ".CSV", ".tsv", ".csv.gz", ".tsv.gz", ".parquet"])
def test_every_ending(tmp_path, expected, ending):
    file = tmp_path / f"results{ending}"
    text = ROWS.replace(",", "\t") if "tsv" in ending else ROWS
    if ending == ".parquet":
        pl.read_csv(ROWS.encode()).write_parquet(file)
    elif ending.endswith(".gz"):
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    found = find_source("table").read(file, SourceConfig(source="table"), "theirs")
    assert_frame_equal(found.results, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace(",", " , "),
        lambda text: text.rstrip("\n"),
        lambda text: "".join(f'"{line.replace(",", chr(34) + "," + chr(34))}"\n' for line in text.splitlines()),
        str.upper,
    ],
    ids=["byte order mark", "line ends of Windows", "spaces", "no last line end", "quotes", "upper case"],
)
def test_habits_of_other_programs(tmp_path, expected, change):
    found = read_text(tmp_path / "results.csv", change(ROWS)).results
    assert_frame_equal(found.with_columns(pl.col("variant", "scale").str.to_lowercase()).drop("run", "innovations"),
                       expected.drop("run", "innovations"))  # fmt: skip


def test_other_columns_are_ignored(tmp_path, expected):
    lines = ROWS.splitlines()
    text = "\n".join([lines[0] + ",train_loss,run,note", *(f"{line},9.9,7,x" for line in lines[1:])])
    assert_frame_equal(read_text(tmp_path / "results.csv", text).results, expected)


@pytest.mark.parametrize(
    ("column", "alias"), [(column, alias) for column, aliases in ALIASES.items() for alias in aliases]
)
def test_usual_names_need_no_option(tmp_path, column, alias):
    header = {
        "loss": "loss",
        "params": "params",
        "tokens": "tokens",
        "flops": "flops",
        "lr": "lr",
        "loss_se": "loss_se",
    }
    row = {"loss": 3.0, "params": 1e6, "tokens": 1e9, "flops": 7e15, "lr": 1e-3, "loss_se": 0.01}
    plain = ",".join(map(str, row.values()))
    usual = read_text(tmp_path / "usual.csv", ",".join(header) + "\n" + plain)
    renamed = read_text(tmp_path / "renamed.csv", ",".join((header | {column: alias}).values()) + "\n" + plain)
    assert_frame_equal(renamed.results, usual.results)


def test_epochs_table_of_chinchilla(tmp_path):
    text = "Model Size,Training FLOP,loss\n4e8,1e21,2.7\n7e10,5.76e23,1.9\n"
    results = read_text(tmp_path / "svg_extracted_data.csv", text).results
    assert results["flops_6nd"].to_list() == [1e21, 5.76e23]
    assert (results["flops_6nd"] / (6 * results["tokens"])).to_list() == pytest.approx([4e8, 7e10])


def test_one_letter_counts_only_as_a_capital(tmp_path):
    found = read_text(tmp_path / "results.csv", "n,N,D,L\n5,1e6,1e9,3.0\n").results
    assert found["flops_6nd"].to_list() == [6e15]


def test_columns_are_named_by_options(tmp_path, expected):
    text = ROWS.replace("variant,scale,seed,lr,flops,loss", "Optimiser,rung,try,eta,FLOPs used,final")
    options = {
        "variant": "optimiser",
        "scale": "rung",
        "seed": "try",
        "lr": "eta",
        "flops": "FLOPs used",
        "loss": "final",
    }
    assert_frame_equal(read_text(tmp_path / "results.csv", text, **options).results, expected)


def test_an_option_goes_before_the_usual_name(tmp_path):
    text = "flops,loss,test\n1e15,3.0,2.0\n"
    assert read_text(tmp_path / "results.csv", text, loss="test").results["val_loss"].to_list() == [2.0]


def test_an_option_that_names_no_column(tmp_path):
    with pytest.raises(UserError, match=r"no column lose \(data.columns.loss\); there are variant, .*, loss"):
        read_text(tmp_path / "results.csv", ROWS, loss="lose")


def test_two_columns_that_could_be_the_loss(tmp_path):
    text = "flops,loss,val_loss\n1e15,2.0,3.0\n"
    with pytest.raises(UserError, match=r"loss and val_loss could all be loss: choose by data.columns.loss=\.\.\."):
        read_text(tmp_path / "results.csv", text)
    assert read_text(tmp_path / "results.csv", text, loss="val_loss").results["val_loss"].to_list() == [3.0]


def test_a_missing_column_is_named_beside_those_there_are(tmp_path):
    with pytest.raises(UserError, match=r"need a column loss; there are flops, final, note: .* data.columns.loss="):
        read_text(tmp_path / "results.csv", "flops,final,note\n1e15,2.0,x\n")


def test_a_bad_row_is_named_with_its_file(tmp_path):
    found = read_text(tmp_path / "{}.csv", ROWS + "rope,tiny,1,2e-3,2e15,n.a.\n")
    assert found.warnings == ["1 of 4 rows are left out, the first row 4 of {}.csv: no loss above 0."]


@pytest.mark.parametrize("pattern", ["", "*.csv", "**/*.csv"])
def test_all_files_of_a_folder_or_a_glob(tmp_path, expected, pattern):
    folder = tmp_path / "results"
    folder.mkdir()
    lines = ROWS.splitlines()
    (folder / "a.csv").write_text("\n".join(lines[:2]))
    (folder / "b.csv").write_text("\n".join([lines[0].replace("loss", "Val_Loss"), *lines[2:]]))
    (folder / "notes.txt").write_text("no table")
    assert_frame_equal(read(folder / pattern, SourceConfig(), "theirs").results, expected)


def test_a_file_that_cannot_be_read_does_not_stop_the_others(tmp_path, expected):
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.parquet").write_text("no parquet")
    (tmp_path / "c.csv").write_text(ROWS)
    found = read(tmp_path, SourceConfig(), "theirs")
    assert len(found.results) == len(expected)
    left_out = [warning.split()[2] for warning in found.warnings if warning.startswith("Left out: ")]
    assert left_out == [str(tmp_path / "a.csv"), str(tmp_path / "b.parquet")]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("absent.csv", None, "is no file, folder or glob with results"),
        ("*.csv", None, "is no file, folder or glob with results"),
        ("empty.csv", b"", "empty.csv cannot be read: "),
        ("broken.parquet", b"no parquet", "broken.parquet cannot be read: "),
        ("broken.csv.gz", b"\x1f\x8bno gzip", "broken.csv.gz"),
        ("ragged.csv", b"flops,loss\n1,2,3\n", "ragged.csv cannot be read: "),
        ("twice.csv", b"flops,loss, loss\n1,2,3\n", "twice.csv cannot be read: "),
        ("results.xlsx", b"PK", "results.xlsx is not one of .csv, "),
        ("binary.csv", bytes(range(256)), "binary.csv"),
    ],
)
def test_no_table(tmp_path, name, content, sentence):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(file, SourceConfig(), "theirs")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_source_lists_those_there_are():
    with pytest.raises(UserError, match=r"data=tabel is no source of results: choose one of .*table"):
        find_source("tabel")
    for helper in ("columns", "runs"):
        with pytest.raises(UserError):
            find_source(helper)
