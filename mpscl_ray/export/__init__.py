"""A trained segmenter as one file, with its model card, and in the formats of other programs: the export command."""
