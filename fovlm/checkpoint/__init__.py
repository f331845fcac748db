"""Saved states: writing, finding, reading, converting."""
