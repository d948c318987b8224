"""The rooms behind data.py: the reader, the front end, views and batches, and one file for each family of
data sets.

Import from `data`, not from here. The order of the layers: listing, reader, inputs < views < batches < made,
check; made < toy < still."""
