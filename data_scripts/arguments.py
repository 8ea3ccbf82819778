"""Arguments of the preparation scripts."""

import re
from dataclasses import dataclass
from typing import Literal

from mra.common.arguments import option


REJECTED = "rejected.jsonl"


@dataclass
class PreparationArguments:
    """Annotations, images and output, and the handling of rows that cannot be used."""

    annotations: str = option(help="annotation file, or a folder of them")
    images: str = option(help="folder of the images")
    output: str = option(help="folder to write")
    num_proc: int = option(1, "number of processes")
    max_shard_size: str = option("500MB", "largest size of a Parquet file")
    on_error: Literal["raise", "skip"] = option(
        "raise",
        f"handling of rows that cannot be used: raise stops with an error, skip leaves them out and lists them in {REJECTED}",
    )
    overwrite: bool = option(False, "replace an existing prepared dataset")
    follow_symlinks: bool = option(False, "allow symbolic links that lead out of --images")
    no_size_check: bool = option(False, "skip the comparison with the published sizes")
    push_to_hub: str | None = option(None, "dataset repository to upload to", metavar="USER/NAME")
    private: bool = option(False, "create the repository as private")

    def __post_init__(self) -> None:
        if self.num_proc < 1:
            raise ValueError(f"--num_proc must be 1 or more, got {self.num_proc}")
        if not re.fullmatch(r"0*[1-9]\d*\s*[KMGTP]i?B", self.max_shard_size, re.IGNORECASE):
            raise ValueError(f"--max_shard_size must be a size like 500MB, got {self.max_shard_size}")


@dataclass
class SdaArguments(PreparationArguments):
    """Annotations and images of SDA."""

    annotations: str = option(help="SDA JSON file, or a folder of them")


@dataclass(kw_only=True)
class PedesArguments(PreparationArguments):
    """Annotations and images of a person-search dataset, or your own."""

    annotations: str = option(
        help="official or processed JSON file, or a folder of them (files of other datasets are ignored); for csv a file "
        "with the columns path, caption, identity and optionally split and camera"
    )
    dataset: Literal["cuhk", "icfg", "rstp", "csv"] = option(help="which of the three datasets, or csv for your own")
