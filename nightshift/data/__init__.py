"""Training data that is known by its content, and batches that depend on nothing but seed, epoch and step.

Images come from `sources`. A `snapshot` says which there were and stores their pixels; `packed` collects these on a
machine, and a `datasets.Dataset` is what training and judging see of them. `known` and `specs` have the data sets of
which nightshift knows what they must be. `batches` makes each batch as a pure function, so a resumed run sees the
images that an uninterrupted one sees. `images` opens the image files of others. `names` refuses a wrong name before
anything heavy is imported.
"""
