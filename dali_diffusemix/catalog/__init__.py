"""The catalog: a list of the originals with class and size, made once from their headers.

index("data/train")                      list a folder once and keep the result; later calls open it
Catalog.from_arrays(paths, labels, ...)  any other layout (lists of files, CUB, several folders)
read_layout("cub", "CUB_200_2011")       published datasets as they are unpacked
"""

from dali_diffusemix.catalog.headers import Listing, Rejected
from dali_diffusemix.catalog.layouts import LAYOUTS, Split, read_layout
from dali_diffusemix.catalog.listing import index, list_images
from dali_diffusemix.catalog.table import Catalog, StaleCatalogWarning, default_location

__all__ = [
    "LAYOUTS",
    "Catalog",
    "Listing",
    "Rejected",
    "Split",
    "StaleCatalogWarning",
    "default_location",
    "index",
    "list_images",
    "read_layout",
]
