"""The dataset card of a prepared set: what `load_dataset` needs to know, and what its reader does."""

from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from data_scripts.published_sizes import PUBLISHED, Size, compare_with_published


TITLES = {"sda": "SDA", "cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid", "csv": "Own captions"}
CAPTION_COLUMNS = ["image", "caption", "image_id"]

_ORIGIN = {
    "sda": """Synthetic Domain-Aligned images of pedestrians, made by a diffusion model that was tuned to the look of a
real set, each with a caption and with regions: boxes, the phrase of each, and the detector's score. For pretraining in
text-based person retrieval.""",
    "cuhk": """Photographs of pedestrians from five re-identification sets, most with two captions written by people.
Train, validation and test show different persons.""",
    "icfg": """Photographs of pedestrians from MSMT17, each with one fine-grained caption. Train and test show different
persons; there is no validation split.""",
    "rstp": """Photographs of pedestrians from MSMT17, five of each person from different cameras, each with two captions.
Train, validation and test show different persons. Some captions hold characters other than Latin letters; they are
kept as they came.""",
    "csv": """Photographs of people with captions, from a CSV file. Say here where they come from, who agreed to it, and
under which licence others may use them.""",
}

_COLUMNS = {
    "image": ("Image", "the file as it was, not encoded again"),
    "caption": ("string", "the caption"),
    "captions": ("list of string", "all captions of the image"),
    "boxes": (
        "list of 4 float32",
        "regions: centre x, centre y, width, height, each in 0..1 of the image; may be empty, then the region is the "
        "whole image and its phrase the caption",
    ),
    "logits": ("list of float32", "the detector's score of each box"),
    "phrases": ("list of string", "the words of each box"),
    "camera": ("string", "camera, where the file's name tells it, else null"),
}
_IDENTITY = {"sda": ("int64", "number of the image in the annotations"), "pedes": ("int64", "number of the person")}

_CITATIONS = {
    "sda": """@article{yang2026minimizing,
  title   = {Minimizing the Pretraining Gap: Domain-aligned Text-Based Person Retrieval},
  author  = {Yang, Shuyu and Wang, Yaxiong and Li, Yongrui and Zhu, Li and Zheng, Zhedong},
  journal = {Pattern Recognition},
  year    = {2026},
  note    = {arXiv:2507.10195}
}""",
    "cuhk": """@inproceedings{li2017person,
  title     = {Person Search with Natural Language Description},
  author    = {Li, Shuang and Xiao, Tong and Li, Hongsheng and Zhou, Bolei and Yue, Dayu and Wang, Xiaogang},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2017}
}""",
    "icfg": """@article{ding2021semantically,
  title   = {Semantically Self-Aligned Network for Text-to-Image Part-aware Person Re-identification},
  author  = {Ding, Zefeng and Ding, Changxing and Shao, Zhiyin and Tao, Dacheng},
  journal = {arXiv preprint arXiv:2107.12666},
  year    = {2021}
}""",
    "rstp": """@inproceedings{zhu2021dssl,
  title     = {DSSL: Deep Surroundings-person Separation Learning for Text-based Person Retrieval},
  author    = {Zhu, Aichun and Wang, Zijie and Li, Yifeng and Wan, Xili and Jin, Jing and Wang, Tian and Hu, Fangqiang
               and Hua, Gang},
  booktitle = {ACM International Conference on Multimedia (ACM MM)},
  year      = {2021}
}""",
}

_TERMS = """For research only, not for commercial use: the images and captions stay under the terms of {title}, which whoever
downloads or passes on this copy has to keep."""
_OWN_TERMS = (
    "Images and captions belong to those who made them; pass them on only if they, and the people shown, agree."
)

_BODY = """
# {title} in Parquet

{origin}

Written by the MRA toolkit from annotation files and images; the image bytes are inside the shards.

## Load it

```python
from datasets import load_dataset

dataset = load_dataset("{repository}")
{streamed}
```

## Columns

{columns}

## Sizes

{sizes}
{remarks}
## Licence and use

{terms} The images show, or are made to look like, people who did not choose to be found: do not use them to identify,
follow or watch people.

## Citation

```bibtex
{citations}
```
"""


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
    """
    Writes `README.md` beside the `data/` folder with the shards.

    SDA has two configurations on the same files: `region` (all columns, the default) and `caption` (image, caption
    and image_id, the other columns not read).

    `datasets` names its cached copy of a folder after the card and the patterns in it, not after the files. The patterns
    therefore hold the digest of the rows: other rows are another copy.

    Args:
        folder: of the prepared set.
        dataset: `sda`, `cuhk`, `icfg`, `rstp` or `csv`.
        features: of the shards.
        splits: name, rows and bytes of each split.
        sizes: images, captions and people of each split.
        repository: what `load_dataset` is given: Hub id or folder.
        digests: of the rows of each split, as in the names of its shards.
        num_rejected: rows left out.
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
    remarks = []
    if num_rejected:
        remarks.append(f"{num_rejected:,} rows of the source could not be used and were left out.")
    if compare_with_published(dataset, sizes):
        remarks.append(
            f"These are not the published sizes: this is a part of {TITLES[dataset]}, or other data in its layout."
        )
    body = _BODY.format(
        title=TITLES[dataset],
        origin=_ORIGIN[dataset],
        repository=repository,
        streamed=_streamed(dataset, repository),
        columns=_column_table(dataset, list(features)),
        sizes=_size_table(dataset, sizes),
        remarks="".join(f"\n{remark}\n" for remark in remarks),
        terms=_OWN_TERMS if dataset == "csv" else _TERMS.format(title=TITLES[dataset]),
        citations="\n\n".join(_CITATIONS[name] for name in dict.fromkeys((dataset, "sda")) if name in _CITATIONS),
    )
    Path(folder, "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{body}", encoding="utf-8")


def _streamed(dataset: str, repository: str) -> str:
    if dataset != "sda":
        return f'streamed = load_dataset("{repository}", split="train", streaming=True)'
    return (
        f'streamed = load_dataset("{repository}", "region", split="train", streaming=True)  # the default\n'
        f'pairs = load_dataset("{repository}", "caption", split="train")  # without boxes, logits and phrases'
    )


def _column_table(dataset: str, names: list[str]) -> str:
    identity = _IDENTITY["sda" if dataset == "sda" else "pedes"]
    rows = [(name, *_COLUMNS.get(name, identity)) for name in names]
    return "\n".join(
        ["| column | type | content |", "| --- | --- | --- |"] + [f"| `{a}` | {b} | {c} |" for a, b, c in rows]
    )


def _size_table(dataset: str, sizes: dict[str, Size]) -> str:
    counts = ("images", "captions") if dataset == "sda" else ("images", "captions", "people")
    rows = [["split", *counts], ["---", *["---:"] * len(counts)]]
    rows += [[split, *(f"{getattr(size, count):,}" for count in counts)] for split, size in sizes.items()]
    if dataset in PUBLISHED:
        rows[0].append(f"published {' / '.join(counts)}")
        rows[1].append("---")
        for row in rows[2:]:
            published = PUBLISHED[dataset].get(row[0])
            row.append(" / ".join(f"{getattr(published, count):,}" for count in counts) if published else "-")
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _size_category(images: int) -> str:
    limits = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next(name for limit, name in limits if images < limit)
