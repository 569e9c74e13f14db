"""Inspection of what was made: checks, pictures and galleries of stores and samples, and plain files of them.

verify      every byte and image of a store
preview/    pictures of samples, as training sees them
report      a gallery of the edits, as HTML
export      an ImageFolder for other loaders
"""
