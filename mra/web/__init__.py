"""Web page of a gallery: search, results and uploads."""
