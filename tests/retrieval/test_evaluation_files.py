"""mra/retrieval/evaluation_files.py: digests of what was evaluated. What is written is tested with eval_retrieval.py."""

from mra.common.tables import load_split
from mra.retrieval.encode import undecoded
from mra.retrieval.evaluation_files import split_digests
from tests.helpers.retrieval import tiny_dataset


def test_digests_of_a_split_show_what_changed(tmp_path):
    """They hold for a copy in another folder, and change with one image, identity, caption or the order of rows."""
    split = tiny_dataset(num_ids=2)
    split.to_parquet(str(tmp_path / "test-00000-of-00001.parquet"))
    known = split_digests(split)
    assert split_digests(load_split(str(tmp_path), "test")) == known
    other = split_digests(tiny_dataset(num_ids=2, seed=1))
    assert other["images"] != known["images"] and other["captions"] != known["captions"]
    swapped = split_digests(split.select([1, 0, 2, 3]))
    assert swapped["images"] != known["images"] and swapped["captions"] != known["captions"]

    def change(**changes):
        return split_digests(split.map(lambda row, index: changes if index == 3 else {}, with_indices=True))

    with_bytes = undecoded(split)[:]["image"]
    for number, image in enumerate(with_bytes):
        (tmp_path / f"{number}.png").write_bytes(image["bytes"])
    for column in ([image["bytes"] for image in with_bytes], [str(tmp_path / f"{n}.png") for n in range(4)]):
        assert split_digests(split.remove_columns("image").add_column("image", column)) == known

    captions = change(captions=["a person in a red coat", "a red coat with a red coat and coat"])
    assert captions["images"] == known["images"] and captions["captions"] != known["captions"]
    identity = change(image_id=100)
    assert identity["images"] != known["images"] and identity["captions"] == known["captions"]
