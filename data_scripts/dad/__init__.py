"""The data factory: from a target set to a domain-aligned pretraining set with regions (docs/dad.md)."""
