"""Public data sets: a card of each, checks of a copy, and files for the importers made of it."""
