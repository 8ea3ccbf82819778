"""Tiny random models with the layout of the real ones, for the demo and the tests."""
