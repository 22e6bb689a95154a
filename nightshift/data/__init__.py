"""Training data that is known by its content, and batches that depend on nothing but seed, epoch and step.

`specs` lists the data sets with the sha256 of their arrays; nothing else is ever stored or trained on. `datasets` finds
one in the first source that has it (`sources` are those outside), packs it once into an immutable object, and maps it
into memory. `batches` makes each batch as a pure function, so a resumed run sees the images that an uninterrupted one
sees. `images` opens the image files of others. `names` refuses a wrong name before anything heavy is imported.
"""
