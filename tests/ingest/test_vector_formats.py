"""Files of vectors, block by block: without a store."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_store.errors import InputError
from lark_store.ingest.vector_formats import _blocks, _dense, _is_mean, _lines, _rows_per_block, open_vectors

RNG = np.random.default_rng(0)


def read(blocks, n, dimensions):
    """Return the rows that were read, NaN elsewhere, and the blocks' starts."""
    rows, starts = np.full((n, dimensions), np.nan), []
    for block in blocks:
        starts.append(block.start)
        assert len(block.facts) == len(block.vectors)
        rows[block.start : block.start + len(block.vectors)] = block.vectors
    return rows, starts


@pytest.mark.parametrize(
    ("dimensions", "rows"), [(2, 64), (1 << 17, 64), (1 << 18, 32), (1 << 22, 2), (1 << 24, 1), (0, 64)]
)
def test_block_has_64_rows_or_64_mebibytes(dimensions, rows):
    assert _rows_per_block(dimensions) == rows


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("selected", [range(150), [0], [64], [63, 149], [128]])
def test_blocks_with_selected_rows_are_read(tmp_path, order, selected):
    array = RNG.normal(size=(150, 3))
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    (tmp_path / "ids").write_text("".join(f"id-{n}\n" for n in range(150)))
    file = open_vectors(tmp_path / "a.npy", "auto", tmp_path / "ids")
    assert (file.kind, file.dimensions, file.number, file.ids[149]) == ("numpy", 3, "float64", "id-149")
    mask = np.zeros(150, bool)
    mask[list(selected)] = True
    rows, starts = read(file.read(mask), 150, 3)
    expected = sorted({n // 64 * 64 for n in selected})
    assert starts == expected
    for start in range(0, 150, 64):
        part = slice(start, start + 64)
        if start in expected:
            np.testing.assert_array_equal(rows[part], array[part])
        else:
            assert np.isnan(rows[part]).all()


def test_bfloat16_is_widened_and_facts_have_their_rows(tmp_path):
    values = np.array([[1.0, -2.5], [0.15625, 3e38]], np.float32)
    (values.view(np.uint32) >> 16).astype(np.uint16).tofile(tmp_path / "a.bin")
    array = np.memmap(tmp_path / "a.bin", np.uint16, "r", shape=(2, 2))
    (block,) = _blocks(array, np.ones(2, bool), lambda start, end: [{"n": n} for n in range(start, end)])
    assert block.vectors.dtype == np.float32
    np.testing.assert_allclose(block.vectors, values, rtol=1e-2)
    assert block.vectors[0].tolist() == [1.0, -2.5]
    assert block.facts == [{"n": 0}, {"n": 1}]


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float16())])
def test_lists_of_another_length_have_a_reason(kind):
    column = pa.array([[1.0, 2.0], None, [3.0], [4.0, None], [5.0, 6.0, 7.0]], kind)
    dense, faults = _dense(column, 2)
    assert faults == {
        1: "it has no vector",
        2: "its vector has 1 numbers, not 2",
        4: "its vector has 3 numbers, not 2",
    }
    np.testing.assert_array_equal(dense, [[1, 2], [0, 0], [0, 0], [4, np.nan], [0, 0]])


def test_parquet_is_read_with_its_facts(tmp_path):
    n = 130
    vectors = RNG.normal(size=(n, 4)).astype(np.float32)
    losses = [None if i == 2 else i / 2 for i in range(n)]
    columns = {"sample_id": range(n), "vector": pa.array([None, *vectors[1:].tolist()], pa.list_(pa.float32()))}
    pq.write_table(pa.table({**columns, "loss": losses, "n_tokens": list(range(n))}), tmp_path / "a.parquet")
    file = open_vectors(tmp_path / "a.parquet", "auto", None)
    assert (file.dimensions, file.number, file.ids[129]) == (4, "float32", "129")
    blocks = list(file.read(np.ones(n, bool)))
    rows, starts = read(blocks, n, 4)
    assert starts == [0, 64, 128]
    np.testing.assert_array_equal(rows[1:], vectors[1:])
    facts = [row for block in blocks for row in block.facts]
    assert facts[2] == {"n_tokens": 2}
    assert facts[129] == {"loss": 64.5, "n_tokens": 129}
    assert blocks[0].faults == {0: "it has no vector"}


@pytest.mark.parametrize("dimensions", [1, (1 << 22) + 1])
def test_dimensions_out_of_range_are_refused(tmp_path, dimensions):
    np.save(tmp_path / "a.npy", np.ones((1, dimensions), np.float16))
    (tmp_path / "ids").write_text("a")
    with pytest.raises(InputError, match=f"has vectors of {dimensions:,} dimensions, not from 2 to 4,194,304"):
        open_vectors(tmp_path / "a.npy", "numpy", tmp_path / "ids")


@pytest.mark.parametrize("dimensions", [2, 1 << 22])
def test_dimensions_at_their_limits_are_accepted(tmp_path, dimensions):
    np.save(tmp_path / "a.npy", np.ones((1, dimensions), np.float16))
    (tmp_path / "ids").write_text("a")
    assert open_vectors(tmp_path / "a.npy", "numpy", tmp_path / "ids").dimensions == dimensions


def test_ids_are_lines_byte_for_byte(tmp_path):
    (tmp_path / "ids").write_bytes("\ufeff a \r\nb\n\n \nc".encode())
    assert _lines(tmp_path / "ids") == [" a ", "b", "c"]


@pytest.mark.parametrize(
    ("config", "is_mean"),
    [
        ("loss_reduction: mean\n", True),
        ("a: 1\n  loss_reduction:  mean \nb: 2", True),
        ("loss_reduction: sum\n", False),
        ("loss_reduction: mean\nloss_reduction: sum\n", False),
        ("my_loss_reduction: mean\n", False),
        (None, False),
    ],
)
def test_losses_are_means_only_if_the_index_says_so(tmp_path, config, is_mean):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    assert _is_mean(tmp_path) == is_mean
