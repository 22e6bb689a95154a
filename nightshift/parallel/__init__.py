"""Several processes train one run, on one machine or on many, with the same batches in the same steps.

`launch` decides how many processes there are. `agent` starts and watches them with torch's elastic agent. `worker` is
the life of one of them, and `channel` connects it to its launcher. `ranks` is how they share a batch and agree.
"""
