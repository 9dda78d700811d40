"""How Parquet files are read: all of their rows, in bounded memory, by Arrow itself where they are local."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import access, parquet
from curate.parquet import batches_of, open_parquet
from curate.storage import Store

OPENERS = {"native": access.open_for_arrow, "python": access.open_input}


@pytest.mark.parametrize("how", OPENERS)
@pytest.mark.parametrize("fetched", [1, 3000, 2**26])
def test_rows_come_in_order_whatever_is_fetched_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, fetched: int
) -> None:
    table = pa.table({"a": range(1000), "b": [{"c": f"{row}", "d": row} for row in range(1000)], "e.f": range(1000)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=64)
    monkeypatch.setattr(parquet, "FETCHED_BYTES", fetched)
    asked: list[Any] = []
    iter_batches = pq.ParquetFile.iter_batches

    def noted(self: pq.ParquetFile, rows: int, **named: Any) -> Any:
        asked.append(named["row_groups"])
        return iter_batches(self, rows, **named)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    for columns, groups in ((None, None), (["a", "b"], None), (["e.f"], [0, 3, 15]), (None, [])):
        asked.clear()
        with open_parquet(OPENERS[how](str(tmp_path / "x.parquet"))) as file:
            found = [row for batch in batches_of(file, 100, columns, groups) for row in batch.to_pylist()]
        read = range(16) if groups is None else groups
        rows = [row for group in read for row in range(64 * group, min(1000, 64 * (group + 1)))]
        assert found == table.select(columns or table.schema.names).take(pa.array(rows, pa.int64())).to_pylist()
        assert [group for some in asked for group in some] == [*read]
        assert len(asked) == 1 or max(map(len, asked)) < {1: 2, 3000: 8, 2**26: 1}[fetched]


PEAK = """
import pathlib, re, sys
from curate import access
from curate.parquet import batches_of, open_parquet

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) // 1024

with open_parquet(getattr(access, sys.argv[1])(sys.argv[2])) as file:
    next(batches_of(file, 1, ["row"]))
    before = peak()
    rows = sum(batch.num_rows for batch in batches_of(file, 100))
print(rows, peak() - before)
"""


@pytest.mark.parametrize("opener", ["open_for_arrow", "open_input"])
def test_a_large_file_takes_bounded_memory(tmp_path: Path, opener: str) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "x.parquet"
    schema = pa.schema({"row": pa.int64(), "jpg": pa.binary()})
    with pq.ParquetWriter(path, schema) as writer:
        for _ in range(40):
            pictures = pa.array([random.bytes(50_000) for _ in range(200)], pa.binary())
            writer.write_table(pa.table({"row": range(200), "jpg": pictures}, schema))
    assert path.stat().st_size > 400e6
    command = [sys.executable, "-c", PEAK, opener, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows, peak_mib = map(int, done.stdout.split())
    assert rows == 8000
    assert peak_mib < 250  # Arrow's own iteration takes 450 where it reads ahead


def test_a_local_file_is_read_by_arrow_itself_and_refused_as_by_python(store: Store, tmp_path: Path) -> None:
    parquet.write_table(store, "some/x.parquet", pa.table({"a": [1]}))
    with store.open_for_arrow("some/x.parquet") as file:
        assert isinstance(file, pa.NativeFile)
    for path, error in ((tmp_path / "absent", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error) as found:
            access.open_for_arrow(str(path))
        with pytest.raises(error) as expected:
            path.read_bytes()
        assert str(found.value) == str(expected.value)
