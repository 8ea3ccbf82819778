"""Data factory: from a target dataset to a domain-aligned pretraining set with regions (docs/dad.md)."""
