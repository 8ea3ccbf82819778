"""What `verify` finds in a damaged gallery."""

import pyarrow as pa
import pyarrow.parquet as pq

from mra.gallery import Gallery
from tests.helpers.galleries import encoder_of


def test_verify_sees_an_index_that_was_rolled_back(model, damaged):
    place, records = damaged
    (records / "manifest.json").write_text("{")  # milvus-lite takes the one before, which is empty
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        (problem,) = gallery.verify().problems
    assert (problem.key, problem.reason[:30]) == ("index", "4 of 4 images are missing from")


def test_verify_sees_vectors_that_changed(model, damaged):
    place, records = damaged
    (file,) = records.rglob("*.parquet")
    table = pq.read_table(file)
    column = table.column_names.index("embedding")
    vectors = table["embedding"].to_pylist()
    vectors[2][5] *= -1
    pq.write_table(table.set_column(column, table.field(column), pa.array(vectors, table.field(column).type)), file)
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        (problem,) = gallery.verify().problems
    assert problem.reason == "the embedding differs from the one that was written"


def test_verify_sees_an_index_that_differs_from_the_records(model, damaged):
    place, records = damaged
    (file,) = records.rglob("*.embedding.flat.idx")
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x80  # the sign of the last number
    file.write_bytes(data)
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        (problem,) = gallery.verify().problems
    assert problem.reason == "the index has a different embedding than the record"


def test_a_damaged_copy_is_written_again_by_the_next_build(model, damaged, tmp_path):
    place, _ = damaged
    copies = [path for path in (place / "files" / "people" / "images").rglob("*") if path.is_file()]
    copies[0].write_bytes(b"x")
    copies[1].unlink()
    copies[2].unlink()
    copies[2].mkdir()
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        assert len(gallery.verify().problems) == 3
        gallery.build(tmp_path / "people", copy_images=True)
        assert gallery.verify().problems == []
