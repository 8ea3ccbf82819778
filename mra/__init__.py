"""MRA: find a person in images from a sentence. The rooms are `common`, `training`, `retrieval`, `gallery` and `web`."""
