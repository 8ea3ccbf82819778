"""Preparation of data sets: SDA, PEDES sets, the sample set and the data factory."""
