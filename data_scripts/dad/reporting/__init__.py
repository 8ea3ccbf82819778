"""Report of the data factory: page, blocks and distance between domains."""
