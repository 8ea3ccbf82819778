"""The factory's configuration: a YAML with a section for each stage, and `--section.key value` on the command line."""

import dataclasses
from dataclasses import dataclass
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
