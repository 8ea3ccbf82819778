"""Streamed tables: the rows of the files, what is read and kept, other processes, and errors."""

import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from accelerate import PartialState

from mra.common import streaming
from mra.common.streaming import StreamedTable, Streaming, arrow_column, make_streaming
from mra.common.tables import load_split
from mra.training.splits import hold_out_identities
from tests.helpers.runs import ROOT
from tests.helpers.training import make_pedes, make_sda


@pytest.fixture(autouse=True)
def one_process():
    """Loggers and the number of readers ask which process they are in."""
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


@pytest.fixture
def rows():
    return make_sda(26)


@pytest.fixture
def folder(rows, tmp_path):
    """Two files of 13 rows in row groups of 4."""
    for number in range(2):
        part = rows.select(range(13 * number, 13 * number + 13))
        part.to_parquet(tmp_path / f"train-0000{number}-of-00002.parquet", batch_size=4)
    return tmp_path


def open_table(folder, lanes=2, buffer=8, num_readers=1) -> StreamedTable:
    return load_split(str(folder), "train", Streaming(lanes, buffer, num_readers))


def as_rows(columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_rows_are_those_of_the_files(folder, rows):
    table = open_table(folder)
    expected = rows.cast_column("image", datasets.Image(decode=False))
    assert len(table) == 26 and table.features == rows.features and table.column_names == rows.column_names
    assert table.row_groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] + [4] * 4 + [5] * 4 + [6] * 4 + [7]
    for wanted in ([0], [25, 0, 13, 12, 0], list(range(26)), [3, 2, 1]):
        assert as_rows(table[wanted]) == as_rows(expected[wanted])
    picked = table.select(np.array([20, 3, 4])).select_columns(["caption", "image_id"])
    assert picked[[0, 2]] == {"caption": [rows[20]["caption"], rows[4]["caption"]], "image_id": [1020, 1004]}
    assert picked.row_groups.tolist() == [5, 0, 1]
    assert arrow_column(picked, "image_id").to_pylist() == [1020, 1003, 1004]
    assert arrow_column(table, "caption").to_pylist() == arrow_column(rows, "caption").to_pylist() == rows["caption"]


def test_little_is_held(folder, monkeypatch):
    """Each row group is read once while it is needed, and no more than a run and two row groups a lane are kept."""
    read = []
    table = open_table(folder, lanes=2, buffer=4, num_readers=2)
    opened = streaming._open_parquet

    def counting(file, metadata=None):
        parquet = opened(file, metadata)
        return SimpleNamespace(
            read_row_group=lambda number, **options: (
                read.append((Path(file).name, number)) or parquet.read_row_group(number, **options)
            )
        )

    monkeypatch.setattr(streaming, "_open_parquet", counting)
    for row in range(26):
        table[[row]]
        assert table._cached_rows == sum(map(len, table._cache.values())) <= 2 + 2 * 4
    assert len(read) == len(set(read)) == 8
    table[[0]]
    assert len(read) == 9


def test_other_processes_open_the_files_themselves(folder, rows):
    table = open_table(folder)
    table[[0]]
    copied = pickle.loads(pickle.dumps(table))
    assert not copied._cache and copied[[5]]["caption"] == [rows[5]["caption"]]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(table.__getitem__, ([7],))["caption"] == [rows[7]["caption"]]


def test_number_of_readers(folder, caplog):
    def of(lanes, num_workers, streaming=True):
        return make_streaming(
            SimpleNamespace(streaming=streaming, streaming_lanes=lanes, streaming_buffer=64, num_workers=num_workers)
        )

    assert of(16, 4, streaming=False) is None
    assert of(16, 4) == Streaming(16, 64, 4) and of(16, 4).lanes_of_a_reader == 4
    assert of(16, 0).num_readers == 1 and not caplog.records
    assert of(16, 3).lanes_of_a_reader == 16
    assert "not a multiple of processes x workers (3)" in caplog.text and "set 18 instead" in caplog.text


def test_identities_are_held_out_of_a_stream(tmp_path):
    rows = make_pedes(20)
    rows.to_parquet(tmp_path / "train.parquet", batch_size=3)
    expected = hold_out_identities(rows, 0.3, seed=1)
    found = hold_out_identities(open_table(tmp_path), 0.3, seed=1)
    assert arrow_column(found[0], "image_id").to_pylist() == expected[0]["image_id"]
    assert isinstance(found[1], datasets.Dataset) and found[1].features == rows.features
    assert found[1].to_dict() == expected[1].to_dict()


def test_streams_from_the_hub(folder, rows, hub_server, tmp_path):
    """In a process of its own, since the libraries read the address of the Hub once."""

    code = (
        "import sys\n"
        "from accelerate import PartialState; PartialState(cpu=True)\n"
        "from huggingface_hub import HfApi\n"
        "from mra.common.tables import load_split\n"
        "from mra.common.streaming import Streaming\n"
        "HfApi().create_repo('user/sda', repo_type='dataset')\n"
        "HfApi().upload_folder(repo_id='user/sda', repo_type='dataset', folder_path=sys.argv[1])\n"
        "table = load_split('user/sda', 'train', Streaming(2, 8, 1))\n"
        "assert table.files[0].startswith('hf://datasets/user/sda@'), table.files\n"
        "print(len(table), table[[25, 0, 13]]['image_id'], len(table[[1]]['image'][0]['bytes']))\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=hub_server.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    size = len(rows.cast_column("image", datasets.Image(decode=False))[1]["image"]["bytes"])
    assert shown.stdout.splitlines()[-1:] == [f"26 [1025, 1000, 1013] {size}"], shown.stderr


def test_files_that_cannot_be_streamed(folder, tmp_path):
    with pytest.raises(ValueError, match=r"`streaming` reads Parquet files, got .*rows\.json"):
        StreamedTable([str(tmp_path / "rows.json")], Streaming(1, 1, 1))
    one_among_others = [str(folder / "train-00000-of-00002.parquet"), str(tmp_path / "rows.json")]
    with pytest.raises(ValueError, match=r"`streaming` reads Parquet files, got .*rows\.json"):
        StreamedTable(one_among_others, Streaming(1, 1, 1))
    with pytest.raises(ValueError, match="`streaming` reads Parquet files, got none"):
        StreamedTable([], Streaming(1, 1, 1))
    make_pedes(4).to_parquet(folder / "train-00002-of-00002.parquet")
    files = sorted(map(str, folder.glob("*.parquet")))
    with pytest.raises(ValueError, match=r"00002-of-00002\.parquet: its columns are not those of"):
        StreamedTable(files, Streaming(1, 1, 1))
    (folder / "cut.parquet").write_bytes((folder / "train-00000-of-00002.parquet").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.parquet: not a complete Parquet file"):
        StreamedTable([str(folder / "cut.parquet")], Streaming(1, 1, 1))
