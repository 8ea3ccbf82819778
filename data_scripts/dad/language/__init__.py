"""English of the data factory: phrases of a caption, attribute edits, noun phrases, the word list."""
