"""Objects in a bucket, and documents that are changed in it without ever losing a change.

`store.Store` says what a store promises: writes that are whole, reads that see them, conditional writes, and one clock
for all. `s3` keeps the promises on any S3-compatible server and `memory` in one process; nothing else in nightshift
knows which it talks to. `documents` reads, checks and changes sealed JSON objects by compare-and-swap.
"""
