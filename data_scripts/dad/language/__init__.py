"""English of the data factory: the word list, a parsed caption, its noun phrases and attribute edits."""
