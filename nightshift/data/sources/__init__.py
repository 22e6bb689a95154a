"""Where a team's images are: a folder, an s3:// prefix, or a table of labels, behind one Protocol (`listed.Source`).

`files` reads files from a disk or a bucket. `folder` takes the class of an image from its folder, `table` from a CSV,
JSON Lines or Parquet file, and `places` finds out which is meant. A source says what it has (`list`) and gives the
bytes of one image (`read`). It decides nothing: what an image is worth, and which split it belongs to, is the
snapshot's business. `cifar10` is a source as well, of images that nightshift knows by content.
"""
