"""Configuration of the factory: a YAML file with a section per stage, and `--section.key value` options."""

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
    """Arguments of all stages, one section each."""

    common: CommonSection
    train: TrainSection
    augment: AugmentSection
    generate: GenerateSection
    filter: FilterSection
    caption: CaptionSection
    ground: GroundSection
    report: ReportSection

    def deciding(self, section: str) -> dict[str, Any]:
        """Return the arguments of a section that affect its result: name -> value."""
        values = getattr(self, section)
        return {
            item.name: getattr(values, item.name)
            for item in dataclasses.fields(values)
            if item.metadata.get("decides", True)
        }


SECTIONS = get_type_hints(FactoryConfig)
STAGES = tuple(name for name in SECTIONS if name != "common")
