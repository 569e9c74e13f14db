"""Inspection: look at what was made: verify a store, preview samples, report on edits, export to plain files."""
