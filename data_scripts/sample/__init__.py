"""The drawn sample set: people, scenes, captions and the plan that joins them."""
