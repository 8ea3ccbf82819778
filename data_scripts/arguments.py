"""Arguments of the preparation scripts."""

import re
from dataclasses import dataclass
from typing import Literal

from mra.common.arguments import option


REJECTED = "rejected.jsonl"


@dataclass
class PreparationArguments:
    """What to convert, where to, and what to do with rows that cannot be used."""

    annotations: str = option(help="annotation file, or a folder of them")
    images: str = option(help="folder of the images")
    output: str = option(help="folder to write")
    num_proc: int = option(1, "processes that read, check and write")
    max_shard_size: str = option("500MB", "largest Parquet file")
    on_error: Literal["raise", "skip"] = option(
        "raise",
        f"what becomes of a row that cannot be used: raise stops, skip leaves it out and lists it in {REJECTED}",
    )
    overwrite: bool = option(False, "replace a set that is already there")
    follow_symlinks: bool = option(False, "allow links that lead out of --images")
    no_size_check: bool = option(False, "do not compare with the published sizes")
    push_to_hub: str | None = option(None, "also upload the set to this dataset repository", metavar="USER/NAME")
    private: bool = option(False, "make the repository private if it is new")

    def __post_init__(self) -> None:
        if self.num_proc < 1:
            raise ValueError(f"--num_proc must be 1 or more, got {self.num_proc}")
        if not re.fullmatch(r"0*[1-9]\d*\s*[KMGTP]i?B", self.max_shard_size, re.IGNORECASE):
            raise ValueError(f"--max_shard_size must be a size such as 500MB, got {self.max_shard_size}")


@dataclass
class SdaArguments(PreparationArguments):
    """Annotations and images of SDA."""

    annotations: str = option(help="SDA JSON file, or a folder of them")


@dataclass(kw_only=True)
class PedesArguments(PreparationArguments):
    """Annotations and images of a person-search set, or of one's own."""

    annotations: str = option(
        help="official JSON file, processed JSON file, or a folder of them (files of other sets are left alone); for csv a "
        "file with the columns path, caption, identity and, if you like, split and camera"
    )
    dataset: Literal["cuhk", "icfg", "rstp", "csv"] = option(help="which of the three sets, or csv")
