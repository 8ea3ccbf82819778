"""Web page over a gallery: what it asks, what it shows, what it accepts as an upload."""
