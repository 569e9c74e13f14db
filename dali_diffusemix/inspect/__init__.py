"""Inspection of what was made: checks, pictures and galleries of stores and samples, and plain files of them.

verify      every byte and image of a store
preview/    pictures of samples, as training sees them
gallery     the edits of a store and what is shown of them
report      a gallery of the edits, as HTML
review      the same from a server on this machine, with choices
export      an ImageFolder for other loaders
"""
