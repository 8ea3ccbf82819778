"""Training sets: determinism, resuming, sharing between processes, and checks of the columns."""

import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st

from mra.common.streaming import StreamedTable, Streaming
from mra.training.augmentation import CaptionAugmenter
from mra.training.collator import TrainingCollator
from mra.training.data import build_finetuning_dataset, build_pretraining_dataset, phrase_to_id
from mra.training.order import make_sampler
from tests.helpers.properties import examples
from tests.helpers.training import GRID, SIZE, make_pedes, make_processor, make_sda


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def sda():
    return make_sda(24)


@pytest.fixture(scope="module")
def pedes():
    return make_pedes(10, captions=2)


def pretraining(dataset, processor, **options):
    return build_pretraining_dataset(dataset, processor, grid_size=GRID, **{"seed": 5, **options})


def finetuning(dataset, processor, **options):
    augmenter = CaptionAugmenter(operations=("random_swap", "random_deletion"))
    return build_finetuning_dataset(dataset, processor, **{"seed": 5, "augmenter": augmenter, **options})


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name


def differs(first, second):
    return [
        name
        for name, value in first.items()
        if not (torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name])
    ]


def batches(dataset, processor, start=0, epoch=1, num_workers=0, batch_size=4, **options):
    sampler = make_sampler(dataset, 3, batch_size)
    sampler.set_position(epoch, start)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=TrainingCollator(processor.tokenizer, 56),
        num_workers=num_workers,
        drop_last=True,
    )
    return list(prepare_data_loader(loader, **options) if options else loader)


def test_equal_phrases_share_an_identity():
    assert phrase_to_id("A Red  shirt") == phrase_to_id("a red shirt ") == 5754065960123607548
    assert 0 <= phrase_to_id("x") < 2**63


# Determinism


def test_images_of_a_batch_lie_in_one_tensor(sda, processor):
    """In a worker in shared memory, so that they are not copied to the main process."""
    dataset = pretraining(sda, processor)
    batch = dataset.__getitems__([(0, 3), (1, 2)])
    assert len(batch) == 2 and batch.pixel_values.shape == (2, 3, *SIZE) and not batch.pixel_values.is_shared()
    for item, key, pixels in zip(batch, [(0, 3), (1, 2)], batch.pixel_values, strict=True):
        assert_same(item, dataset[key])
        assert item["pixel_values"].data_ptr() == pixels.data_ptr()
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, sampler=[(0, 0), (0, 1)], num_workers=1, collate_fn=lambda b: b.pixel_values.is_shared()
    )
    assert list(loader) == [True]


def test_images_of_fine_tuning_are_whole(pedes, processor):
    """Neither cropped nor padded: what the processor makes of them, but for mirroring and erasing."""
    dataset = finetuning(pedes, processor, flip_probability=0.0, erasing_probability=0.0)
    for pair in (0, 7):
        expected = processor(images=pedes[pair // 2]["image"])["pixel_values"][0]
        torch.testing.assert_close(dataset[(3, pair)]["pixel_values"], expected, rtol=0, atol=0.05)


def test_same_key_same_example(sda, pedes, processor):
    for first, second in (
        (pretraining(sda, processor), pretraining(sda, processor)),
        (finetuning(pedes, processor), finetuning(pedes, processor)),
    ):
        keys = [(epoch, row) for epoch in range(2) for row in range(len(first))]
        forward = {key: first[key] for key in keys}
        torch.manual_seed(9)
        for key in reversed(keys):
            assert_same(forward[key], second[key])


def test_epochs_and_seeds_differ(sda, processor):
    dataset, other = pretraining(sda, processor), pretraining(sda, processor, seed=6)
    for second in (dataset[(1, 0)], other[(0, 0)], dataset[(0, 1)]):
        assert {"pixel_values", "mask_seed"} <= set(differs(dataset[(0, 0)], second))


def test_options_keep_the_rest(sda, processor):
    """Leaving the regions out, or adding augmented captions, changes nothing else of an example."""
    example = pretraining(sda, processor)[(2, 3)]
    plain = pretraining(sda, processor, regions=False)[(2, 3)]
    augmented = pretraining(sda, processor, augmenter=CaptionAugmenter(operations=("random_swap",)))[(2, 3)]
    assert set(example) - set(plain) == {"phrase", "phrase_id", "region_attention_mask"}
    assert set(augmented) - set(example) == {"augmented_caption"}
    assert_same(plain, {name: example[name] for name in plain})
    assert_same(example, {name: augmented[name] for name in example})


def test_workers_equal_none(sda, pedes, processor):
    for dataset in (pretraining(sda, processor), finetuning(pedes, processor)):
        expected = batches(dataset, processor)
        found = batches(dataset, processor, num_workers=2)
        assert len(expected) == len(found) == len(dataset) // 4
        for first, second in zip(expected, found, strict=True):
            assert_same(first, second)


def test_resume_gives_the_tail(sda, processor):
    dataset = pretraining(sda, processor)
    everything = batches(dataset, processor)
    tail = batches(dataset, processor, start=8)
    assert len(tail) == len(everything) - 2
    for first, second in zip(everything[2:], tail, strict=True):
        assert_same(first, second)
    assert differs(everything[0], batches(dataset, processor, epoch=2)[0])


@pytest.mark.parametrize("start", [0, 8])
def test_two_processes_share_the_batches(sda, processor, start):
    """Whole batches in turn, the odd one dropped: two processes see what one sees, and resume alike."""
    dataset = pretraining(sda, processor)
    expected = batches(dataset, processor, start, batch_size=5)
    shares = [
        batches(dataset, processor, start, batch_size=5, num_processes=2, process_index=index) for index in (0, 1)
    ]
    assert len(shares[0]) == len(shares[1]) == len(expected) // 2
    for step, pair in enumerate(zip(*shares, strict=True)):
        for index, batch in enumerate(pair):
            assert_same(batch, expected[2 * step + index])


# Streaming


def stream(dataset, folder, readers=1):
    """The same rows from two files of row groups of four rows."""
    half = len(dataset) // 2
    files = []
    for number, rows in enumerate((range(half), range(half, len(dataset)))):
        files.append(str(folder / f"train-0000{number}-of-00002.parquet"))
        datasets.Dataset.to_parquet(dataset.select(rows), files[-1], batch_size=4)
    return StreamedTable(files, Streaming(lanes=2, buffer=8, num_readers=readers))


def test_streamed_examples_are_those_of_the_table(sda, pedes, processor, tmp_path):
    for build, table in ((pretraining, sda), (finetuning, pedes)):
        (tmp_path / build.__name__).mkdir()
        expected = build(table, processor)
        found = build(stream(table, tmp_path / build.__name__), processor)
        assert len(found) == len(expected) and found.num_identities == expected.num_identities
        keys = [(1, pair) for pair in reversed(range(len(expected)))]  # through the row groups and back
        for first, second in zip(found.__getitems__(keys), expected.__getitems__(keys), strict=True):
            assert_same(first, second)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_processes_share_the_batches_and_resume(sda, processor, tmp_path, num_workers):
    dataset = pretraining(stream(sda, tmp_path, 2 * max(num_workers, 1)), processor)
    expected = batches(dataset, processor)
    rows = torch.cat([batch["identity_ids"] for batch in expected])
    assert sorted(rows.tolist()) == sorted(sda["image_id"]) and rows.tolist() != sda["image_id"]
    for start in (0, 8):
        shares = [
            batches(dataset, processor, start, num_workers=num_workers, num_processes=2, process_index=index)
            for index in (0, 1)
        ]
        found = [batch for pair in zip(*shares, strict=True) for batch in pair]
        assert len(found) == len(expected) - start // 4
        for first, second in zip(expected[start // 4 :], found, strict=True):
            assert_same(first, second)


# Pretraining rows


@examples(30)
@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    fraction=st.floats(0.01, 1),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_pairs_are_drawn_once_and_in_order(processor, counts, fraction, seed, data):
    """Of a share of the images every caption is a pair; a number of pairs is drawn from those."""
    rows = make_pedes(len(counts), captions=4)
    table = rows.to_dict() | {"captions": [row[:count] for row, count in zip(rows["captions"], counts, strict=True)]}
    table["image"] = rows.cast_column("image", datasets.Image(decode=False))["image"][:]
    uneven = datasets.Dataset.from_dict(table, features=rows.features)
    whole = pretraining(uneven, processor, data_fraction=fraction, seed=seed)
    images = sorted(set(whole.image_rows.tolist()))
    assert len(images) == max(1, round(fraction * len(counts)))
    pairs = list(zip(whole.image_rows.tolist(), whole.caption_indices.tolist(), strict=True))
    assert pairs == [(image, caption) for image in images for caption in range(counts[image])]
    number = data.draw(st.integers(1, len(pairs)))
    part = pretraining(uneven, processor, data_fraction=fraction, seed=seed, num_pairs=number)
    drawn = list(zip(part.image_rows.tolist(), part.caption_indices.tolist(), strict=True))
    assert len(drawn) == number and drawn == sorted(set(drawn)) and set(drawn) <= set(pairs)


def test_region_draws(sda, processor):
    dataset = pretraining(sda, processor)
    row = next(index for index in range(len(sda)) if len(sda[index]["phrases"]) == 3)
    drawn = {dataset[(epoch, row)]["phrase"] for epoch in range(40)}
    assert drawn == set(sda[row]["phrases"])
    example = dataset[(0, 3)]  # every fourth row has no box
    assert example["phrase"] == example["caption"] == sda[3]["caption"]
    assert example["phrase_id"] == phrase_to_id(sda[3]["caption"])
    assert example["region_attention_mask"].tolist() == [1, 1, 1]
    assert example["identity_id"] == 1003


def test_data_fraction(sda, processor):
    half = pretraining(sda, processor, data_fraction=0.5)
    assert len(half) == 12 and len(set(half.image_rows)) == 12
    assert (half.image_rows == pretraining(sda, processor, data_fraction=0.5).image_rows).all()
    assert (half.image_rows != pretraining(sda, processor, data_fraction=0.5, seed=6).image_rows).any()
    assert len(pretraining(sda, processor, data_fraction=0.001)) == 1
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="`data_fraction`"):
            pretraining(sda, processor, data_fraction=wrong)


def test_pretraining_on_person_sets(pedes, processor):
    dataset = pretraining(pedes, processor)
    example = dataset[(0, 5)]
    assert len(dataset) == 20 and example["caption"] == pedes[2]["captions"][1] == example["phrase"]
    assert len(pretraining(pedes, processor, data_fraction=0.3)) == 6


def test_caption_style(processor):
    clean = make_processor(caption_style="clean")
    dataset = make_sda(4).map(lambda row: {"caption": "A MAN, in red!", "phrases": ["RED-shirt"] * len(row["boxes"])})
    assert pretraining(dataset, processor)[(0, 0)]["caption"] == "A MAN, in red!"
    example = pretraining(dataset, clean)[(0, 0)]
    assert (example["caption"], example["phrase"]) == ("a man in red ", "red shirt")


# Fine-tuning rows


def test_pairs_and_identities(processor):
    pedes = make_pedes(6, captions=2, first_person=40)
    uneven = pedes.map(lambda row, index: {"captions": row["captions"] * (index % 3 + 1)}, with_indices=True)
    dataset = finetuning(uneven, processor)
    expected = [(row, index) for row in range(6) for index in range(2 * (row % 3 + 1))]
    assert list(zip(dataset.image_rows, dataset.caption_indices, strict=True)) == expected
    assert dataset.num_identities == 3
    for pair, (row, index) in enumerate(expected):
        example = dataset[(0, pair)]
        assert example["caption"] == uneven[row]["captions"][index] and example["identity_id"] == row // 2


def test_selected_and_shuffled_tables(pedes, processor):
    """Rows are those of the table as passed, whatever indices it carries."""
    part = pedes.shuffle(seed=1).select(range(3, 9))
    dataset = finetuning(part, processor)
    persons = sorted(set(part["image_id"]))
    for pair in range(len(dataset)):
        example, row = dataset[(0, pair)], part[pair // 2]
        assert example["caption"] == row["captions"][pair % 2]
        assert example["identity_id"] == persons.index(row["image_id"])


def test_augmented_captions(pedes, processor):
    examples = [finetuning(pedes, processor)[(0, pair)] for pair in range(20)]
    same = sum(example["caption"] == example["augmented_caption"] for example in examples)
    assert 2 < same < 18 and all(example["augmented_caption"] for example in examples)
    assert "augmented_caption" not in build_finetuning_dataset(pedes, processor, seed=5)[(0, 0)]


def test_number_of_training_pairs(sda, pedes, processor):
    """A number draws the pairs that the same share of SDA draws; of several captions an image each is a pair."""
    for count in (1, 7, len(sda)):
        rows = pretraining(sda, processor, num_pairs=count).image_rows
        assert len(set(rows)) == count and list(rows) == sorted(rows)
    assert list(pretraining(sda, processor, num_pairs=6).image_rows) == list(
        pretraining(sda, processor, data_fraction=6 / len(sda)).image_rows
    )
    assert len(pretraining(pedes, processor, regions=False, num_pairs=13)) == 13
    pairs = pretraining(pedes, processor, regions=False, num_pairs=13)
    assert len(set(zip(pairs.image_rows, pairs.caption_indices, strict=True))) == 13
    assert list(pairs.image_rows) != list(
        pretraining(pedes, processor, regions=False, num_pairs=13, seed=6).image_rows
    )
    for count in (0, len(sda) + 1):
        with pytest.raises(ValueError, match=rf"`num_train_pairs` .* the {len(sda)} pairs .* got {count}"):
            pretraining(sda, processor, num_pairs=count)


@pytest.mark.parametrize("style", ["plain", "clean"])
def test_captions_are_augmented_before_they_are_cut(pedes, style):
    """Cleaning, then augmentation, then the cut: words behind the cut move in where others fall out."""
    words = ["Man-like!", *(f"{letter}word" for letter in "abcdefghij" * 6), "last"]
    long = pedes.map(lambda row: {"captions": [" ".join(words)]})
    augmenter = CaptionAugmenter(1.0, ("random_deletion",), deletion_probability=0.9)
    dataset = finetuning(long, make_processor(caption_style=style), augmenter=augmenter)
    texts = [dataset[(epoch, 0)]["augmented_caption"].split() for epoch in range(60)]
    assert 4 < sum(text[-1] == "last" for text in texts) < 60 and {"man", "like"} <= {
        word for t in texts for word in t
    }
    kept = CaptionAugmenter(1.0, ("random_deletion",), deletion_probability=0.0)
    example = finetuning(long, make_processor(caption_style=style), augmenter=kept)[(0, 0)]
    assert example["augmented_caption"].split() == ["man", "like", *words[1:55]]
    cut = example["caption"].split()
    assert cut == (["man", "like", *words[1:55]] if style == "clean" else words[:56])


# Errors


def test_wrong_tables(sda, pedes, processor):
    cases = [
        (sda, "lacks captions; expected the columns .*, got image, caption, .* prepare it"),
        (pedes.remove_columns("image_id"), "lacks image_id"),
        (pedes.cast_column("image_id", datasets.Value("string")), r"has image_id \(Value\('string'\)\)"),
        (
            datasets.DatasetDict({"train": pedes, "test": pedes}),
            r"got the splits train, test; pass dataset\['train'\]",
        ),
        (pedes.to_iterable_dataset(), "without streaming.*StreamedTable"),
        (pedes.select([]), "no rows"),
    ]
    for dataset, message in cases:
        with pytest.raises(ValueError, match=message):
            finetuning(dataset, processor)
    with pytest.raises(ValueError, match=r"boxes and phrases.*region_weight"):
        pretraining(sda.remove_columns("boxes"), processor)
    assert len(pretraining(sda.remove_columns("boxes"), processor, regions=False)) == 24
    with pytest.raises(ValueError, match="lacks caption or captions"):
        pretraining(sda.remove_columns("caption"), processor)
    with pytest.raises(ValueError, match="does not divide"):
        build_pretraining_dataset(sda, processor, grid_size=(3, 1), seed=0)


@pytest.mark.parametrize(
    ("column", "feature"),
    [
        ("image", datasets.Value("string")),
        ("image_id", datasets.Value("float32")),
        ("image_id", datasets.List(datasets.Value("int64"))),
        ("caption", datasets.Value("int64")),
        ("caption", datasets.List(datasets.Value("string"))),
        ("captions", datasets.List(datasets.Value("int64"))),
        ("captions", datasets.Value("string")),
        ("boxes", datasets.List(datasets.Value("float32"))),
        ("boxes", datasets.Value("float32")),
        ("phrases", datasets.List(datasets.Value("int64"))),
        ("phrases", datasets.Value("string")),
    ],
    ids=str,
)
def test_columns_of_another_type_are_named(sda, pedes, processor, column, feature):
    known = pedes.features if column == "captions" else sda.features
    rows = datasets.Dataset.from_dict(
        {name: [None] for name in known}, features=datasets.Features(known | {column: feature})
    )
    with pytest.raises(ValueError, match=rf"^the dataset has {column} \(.*; expected the columns .*boxes \(list"):
        pretraining(rows, processor)


@pytest.mark.parametrize("list_of", [datasets.List, datasets.LargeList])
@pytest.mark.parametrize("text", ["string", "large_string"])
def test_columns_of_long_lists_and_texts_fit(pedes, processor, list_of, text):
    large = pedes.cast_column("captions", list_of(datasets.Value(text)))
    assert len(finetuning(large, processor)) == len(pretraining(large, processor)) == 20
    assert finetuning(large, processor)[(0, 3)]["caption"] == pedes[1]["captions"][1]


def test_every_problem_of_the_columns_is_named_at_once(pedes, processor):
    wrong = pedes.remove_columns("image_id").cast_column("captions", datasets.List(datasets.Value("binary")))
    with pytest.raises(
        ValueError, match=r"lacks image_id and has captions \(.*; expected the columns image .Image., "
    ) as e:
        finetuning(wrong, processor)
    assert "boxes" not in str(e.value)


@pytest.mark.parametrize("key", [3, (1,), (1, 2, 3), [1, 2]])
def test_keys_are_an_epoch_and_a_row(pedes, processor, key):
    with pytest.raises(ValueError, match=r"\(epoch, row\), got .*; use the sampler of `make_sampler`"):
        finetuning(pedes, processor)[key]


def test_wrong_rows(sda, pedes, processor):
    broken = sda.map(lambda row: {"phrases": row["phrases"][:-1], "caption": ""})
    with pytest.raises(ValueError, match=r"row 0 \(image_id 1000\).*caption. is empty"):
        pretraining(broken, processor)[(0, 0)]
    broken = sda.map(lambda row: {"phrases": row["phrases"][:-1]})
    with pytest.raises(ValueError, match=r"row 0 .* boxes but .* phrases.*on_error skip"):
        pretraining(broken, processor)[(0, 0)]
    raw = pedes.cast_column("image", datasets.Image(decode=False))
    broken = raw.map(lambda row: {"image": {"bytes": row["image"]["bytes"][:60], "path": None}})
    with pytest.raises(ValueError, match=r"row 1 .*cannot be used"):
        finetuning(broken.cast_column("image", datasets.Image()), processor)[(0, 2)]
    with pytest.raises(ValueError, match="row 1 of the training set has no caption"):
        finetuning(pedes.map(lambda _, index: {"captions": [] if index == 1 else ["a"]}, with_indices=True), processor)
