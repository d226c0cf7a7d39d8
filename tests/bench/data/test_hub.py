"""The hub, played by a module that stands in for `datasets`."""

import socket
import sys
from types import SimpleNamespace

import pytest

from bench.data import DataConfig, hub, open_dataset, prepare
from bench.errors import UserError

FINEWEB = DataConfig(name="fineweb", source="hub", dataset="HuggingFaceFW/fineweb", subset="sample-10BT")


@pytest.fixture
def fake_hub(monkeypatch):
    """Installs `datasets.load_dataset`; returns a function that says what it yields and a list of its calls."""
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [])

    def install(answer):
        def load_dataset(**wanted):
            calls.append(wanted)
            return answer(wanted)

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    return install


def failing(error, rows=()):
    yield from rows
    raise error


def test_streams_rows(fake_hub):
    rows = [{"text": "one"}, {"text": None}, {"text": " \n"}, {"text": "\ntwo\ud800\n\n\n\nand more"}]
    calls = fake_hub(lambda wanted: rows)
    assert list(hub.stream_documents(FINEWEB)) == ["one", "two?\n\n\n\nand more"]
    assert calls == [
        {"path": "HuggingFaceFW/fineweb", "name": "sample-10BT", "split": "train", "streaming": True},
    ]


def test_a_stream_is_read_row_by_row(fake_hub):
    """An endless stream stands for a corpus that no memory holds."""
    fake_hub(lambda wanted: iter(lambda: {"text": "again"}, None))
    stream = hub.stream_documents(FINEWEB)
    assert [next(stream), next(stream)] == ["again", "again"]


def test_script_data_sets_are_read_in_the_hubs_conversion(fake_hub):
    def answer(wanted):
        if "revision" not in wanted:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return [{"text": "converted"}]

    calls = fake_hub(answer)
    assert list(hub.stream_documents(FINEWEB)) == ["converted"]
    assert calls[1] == calls[0] | {"revision": "refs/convert/parquet"}


@pytest.mark.parametrize(
    "answer",
    [
        lambda wanted: next(failing(ConnectionError("Couldn't reach the hub\nhint"))),
        lambda wanted: failing(ConnectionError("Couldn't reach the hub\nhint"), [{"text": "one"}]),
    ],
    ids=["at once", "in mid-stream"],
)
def test_no_network_is_one_line(fake_hub, answer):
    fake_hub(answer)
    with pytest.raises(UserError) as error:
        list(hub.stream_documents(FINEWEB))
    assert "cannot stream HuggingFaceFW/fineweb (sample-10BT) from the Hugging Face hub" in str(error.value)
    assert "Couldn't reach the hub" in str(error.value)
    assert "\n" not in str(error.value)


def no_address(host, port):
    raise socket.gaierror(-2, "Name or service not known")


def test_without_network_the_hub_is_not_even_tried(fake_hub, monkeypatch, tmp_path):
    calls = fake_hub(lambda wanted: [{"text": "a file on this machine"}])
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"Name or service not known\. Check the network"):
        next(hub.stream_documents(FINEWEB))
    assert not calls
    assert list(hub.stream_documents(DataConfig(source="hub", dataset=str(tmp_path)))) == ["a file on this machine"]
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example")
    next(hub.stream_documents(FINEWEB))
    assert len(calls) == 2, "a proxy resolves names that this machine cannot"


def test_an_error_without_text_is_named_by_its_type(fake_hub):
    fake_hub(lambda wanted: next(failing(TimeoutError())))
    with pytest.raises(UserError, match=r"hub: TimeoutError\. Check the network"):
        list(hub.stream_documents(FINEWEB))


def test_columns(fake_hub):
    fake_hub(lambda wanted: [{"title": "a", "body": 3}])
    with pytest.raises(UserError, match=r"has no column 'text': set data\.column to one of title, body"):
        list(hub.stream_documents(FINEWEB))
    with pytest.raises(UserError, match=r"column 'body' of .* holds int, not text"):
        list(hub.stream_documents(DataConfig(source="hub", dataset="a/b", column="body")))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as error:
        next(hub.stream_documents(FINEWEB))
    assert str(error.value) == "data=fineweb needs the package datasets: pip install -e .[data]"


def test_prepare_from_the_hub(fake_hub, tmp_path):
    texts = [f"Document {number}, of its own." for number in range(400)] + ["Document 7, of its own."]
    calls = fake_hub(lambda wanted: ({"text": text} for text in texts))
    config = DataConfig(name="web", source="hub", dataset="a/b", validation_fraction=0.1)
    with pytest.raises(UserError, match="data=web is not prepared: run `python -m bench prepare data=web` first"):
        open_dataset(config, tmp_path)
    folder = prepare(config, tmp_path)
    assert prepare(config, tmp_path) == folder
    assert len(calls) == 1, "what is prepared is not downloaded again"
    data = open_dataset(config, tmp_path)
    splits = [bytes(split.shards[0].tolist()).decode().splitlines() for split in (data.train, data.validation)]
    assert sorted(splits[0] + splits[1]) == sorted(set(texts))
    assert splits[0] == [text for text in texts[:400] if text in splits[0]], "in the hub's order"


def test_prepare_stops_after_so_many_documents(fake_hub, tmp_path):
    fake_hub(lambda wanted: ({"text": f"Document {number}"} for number in iter(int, 1)))
    config = DataConfig(source="hub", dataset="a/b", documents=5)
    with pytest.raises(UserError, match="split is empty: data=embedded has only 1 different pieces"):
        prepare(config, tmp_path)


def test_a_tokenizer_is_trained_on_the_stream(fake_hub, tmp_path):
    calls = fake_hub(lambda wanted: ({"text": f"The same words, number {number}."} for number in range(300)))
    config = DataConfig(source="hub", dataset="a/b", tokenizer="bpe", vocabulary_size=280, validation_fraction=0.1)
    data = open_dataset_after_prepare(config, tmp_path)
    assert data.vocabulary_size == 280
    assert len(calls) == 2, "once for the tokenizer, once for the shards"


def open_dataset_after_prepare(config, folder):
    prepare(config, folder)
    return open_dataset(config, folder)
