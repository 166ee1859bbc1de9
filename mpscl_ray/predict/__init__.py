"""Label maps of new images in their own geometry: the predict command."""
