"""Preparation of datasets: SDA, PEDES datasets, the sample set and the data factory."""
