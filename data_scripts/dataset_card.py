"""Dataset card of a prepared dataset, for `load_dataset` and for readers."""

from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from data_scripts.published_sizes import PUBLISHED, Size, compare_with_published
from mra.common.cards import fill_card, markdown_table


TITLES = {"sda": "SDA", "cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid", "csv": "Own captions"}
CAPTION_COLUMNS = ["image", "caption", "image_id"]

_TEMPLATE = Path(__file__).parent / "templates" / "dataset_card.md"


def write_card(
    folder: str | Path,
    dataset: str,
    features: datasets.Features,
    splits: dict[str, datasets.SplitInfo],
    sizes: dict[str, Size],
    repository: str,
    digests: dict[str, str],
    num_rejected: int = 0,
) -> None:
    """Write `README.md` beside the `data/` folder with the shards.

    SDA has two configurations on the same files: `region` (default, all columns) and `caption` (only image, caption and
    image_id are read).

    `datasets` identifies its cached copy of a folder by the card and the patterns in it, not by the files. The patterns
    therefore contain the digest of the rows.

    Args:
        folder: folder of the prepared dataset.
        dataset: `sda`, `cuhk`, `icfg`, `rstp` or `csv`.
        features: features of the shards.
        splits: name, rows and bytes of each split.
        sizes: images, captions and people of each split.
        repository: Hub id or folder to pass to `load_dataset`.
        digests: digest of the rows of each split, as in the names of its shards.
        num_rejected: number of rows left out.
    """
    columns = (
        {"region": list(features), "caption": CAPTION_COLUMNS} if dataset == "sda" else {"default": list(features)}
    )
    shards = sum(path.stat().st_size for path in Path(folder, "data").glob("*.parquet"))
    infos, configs = {}, {}
    for config, names in columns.items():
        infos[config] = datasets.DatasetInfo(
            config_name=config,
            features=datasets.Features({name: features[name] for name in names}),
            splits=datasets.SplitDict(splits),
            download_size=shards,
            dataset_size=sum(split.num_bytes for split in splits.values()),
        )
        files = [{"split": split, "path": f"data/{split}-*-{digests[split]}.parquet"} for split in splits]
        configs[config] = {"data_files": files}
        if config == "region":
            configs[config]["default"] = True
        if names != list(features):
            configs[config]["columns"] = names
    data = DatasetCardData(
        pretty_name=TITLES[dataset],
        language="en",
        license="unknown" if dataset == "csv" else "other",
        license_name=None if dataset == "csv" else "research-only",
        size_categories=_size_category(sum(size.images for size in sizes.values())),
        tags=["text-based-person-retrieval", "image-text-retrieval", "person-search"],
    )
    DatasetInfosDict(infos).to_dataset_card_data(data)
    MetadataConfigs(configs).to_dataset_card_data(data)
    card = fill_card(
        _TEMPLATE,
        data,
        dataset=dataset,
        title=TITLES[dataset],
        repository=repository,
        columns=list(features),
        sizes=_size_table(dataset, sizes),
        num_rejected=num_rejected,
        is_part=bool(compare_with_published(dataset, sizes)),
    )
    Path(folder, "README.md").write_text(card, encoding="utf-8")


def _size_table(dataset: str, sizes: dict[str, Size]) -> str:
    counts = ("images", "captions") if dataset == "sda" else ("images", "captions", "people")
    header = ["split", *counts]
    rows = [[split, *(f"{getattr(size, count):,}" for count in counts)] for split, size in sizes.items()]
    if dataset in PUBLISHED:
        header.append(f"published {' / '.join(counts)}")
        for row in rows:
            published = PUBLISHED[dataset].get(row[0])
            row.append(" / ".join(f"{getattr(published, count):,}" for count in counts) if published else "-")
    return markdown_table(header, rows, text_columns=1)


def _size_category(images: int) -> str:
    limits = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next(name for limit, name in limits if images < limit)
