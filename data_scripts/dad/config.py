"""The factory's configuration: a YAML with a section for each stage, and `--section.key value` on the command line."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from data_scripts.dad.sections import (
    AugmentSection,
    CaptionSection,
    CommonSection,
    FilterSection,
    GenerateSection,
    GroundSection,
    ReportSection,
    TrainSection,
)
from mra.common.arguments import read_arguments


@dataclass
class FactoryConfig:
    """The arguments of all stages, a section each."""

    common: CommonSection
    train: TrainSection
    augment: AugmentSection
    generate: GenerateSection
    filter: FilterSection
    caption: CaptionSection
    ground: GroundSection
    report: ReportSection

    def deciding(self, section: str) -> dict[str, Any]:
        """Return the arguments of a section that its result depends on: name -> value."""
        values = getattr(self, section)
        return {
            item.name: getattr(values, item.name)
            for item in dataclasses.fields(values)
            if item.metadata.get("decides", True)
        }


SECTIONS = get_type_hints(FactoryConfig)
STAGES = tuple(name for name in SECTIONS if name != "common")


def load_config(path: str | Path | None = None, argv: Sequence[str] = ()) -> FactoryConfig:
    """Read a configuration.

    Args:
        path: of the YAML; defaults alone when absent.
        argv: options as on the command line, which win over the file.

    Raises:
        ValueError: if a section or key is unknown, or a value is not what the argument takes.
    """
    return FactoryConfig(*read_arguments(SECTIONS, argv, path))
