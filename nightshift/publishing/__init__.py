"""Models for others: published versions, files in other formats, and predictions.

`publish` stores an evaluated checkpoint as a version that never changes. `export` writes a model in another format,
reads the file back, and checks that it predicts what the model predicts. `prediction` classifies images with a
published version. Weights are used only after their sha256 was checked.
"""
