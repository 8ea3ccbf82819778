"""Report of the data factory: page, blocks, contact sheets, distance between domains."""
