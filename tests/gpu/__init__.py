"""What a GPU does with nightshift, part by part. `benchmarks/gpu.py` runs them all, where there is little but torch.

A part is a function of a `Stage` that yields what it has found, as it finds it (`stage.Figure`). It imports torch,
numpy and what `benchmarks/gpu.txt` names: no Prefect, no S3 client, nothing of pytest. `test_parts.py` tries the parts
on the CPU.
"""
